"""Which pictures a model never sees: a split that is decided by hashes of names, so that it never moves.

Two questions, two test sets. `test_pair`: (concept, style) pairs that are held out while the concept is seen in
other styles and the style on other concepts: does the model compose what it knows? `test_concept`: concepts that
are held out in every style: what does it make of words that it has never seen together?
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

from .packages import STYLES

PAIRS = 0.13  # of the cells that may be held out; the rule of MIN_LEFT takes it down to about a tenth of all cells
CONCEPTS = 0.05  # of the families of each group
MIN_LEFT = 3  # styles in which a concept must remain in training

# Near twins by the same hands: a model that has seen one has nearly seen the other, so they are held out together.
TWINS = {style.name: style.twin_of for style in STYLES.values() if style.twin_of}


def unit_hash(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(f"minisd/{key}".encode()).digest()[:8]) / 2**64


def held_out_families(families: Iterable[tuple[str, str]], share: float = CONCEPTS) -> set[str]:
    """The families whose hashes come first in their group. families: (group, family), repeated or not."""
    by_group: dict[str, set[str]] = defaultdict(set)
    for group, family in families:
        by_group[group].add(family)
    held_out: set[str] = set()
    for members in by_group.values():
        ranked = sorted(members, key=lambda family: unit_hash(f"family/{family}"))
        held_out.update(ranked[: round(share * len(members))])
    return held_out


def held_out_styles(concept: str, styles: Sequence[str], counted: Sequence[str], share: float = PAIRS) -> set[str]:
    """The styles of one concept that go to `test_pair`.

    Twins go together, and at least MIN_LEFT of the styles in `counted` stay in training: only those count, so that
    a style added on request moves no picture of the default styles.
    """
    pairs: dict[str, set[str]] = defaultdict(set)
    for style in styles:
        pairs[TWINS.get(style, style)].add(style)
    hashes = {first: unit_hash(f"pair/{concept}/{first}") for first in pairs}
    left, held_out = set(styles) & set(counted), set()
    for first in sorted(pairs, key=lambda first: (first not in counted, hashes[first])):
        if hashes[first] < share and len(left - pairs[first]) >= MIN_LEFT:
            left -= pairs[first]
            held_out |= pairs[first]
    return held_out


def in_known_words(rows: Iterable[dict]) -> list[dict]:
    """The rows of `test_concept` whose every word occurs in training captions.

    They are reported apart, because no model can know what the words of the others mean.
    """
    rows = list(rows)
    known = {word for row in rows if row["split"] == "train" for word in row["concept"].split()}
    return [row for row in rows if row["split"] == "test_concept" and known.issuperset(row["concept"].split())]
