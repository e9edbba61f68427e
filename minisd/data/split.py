"""The split into training and test pictures. It is decided by hashes of names, so it never changes.

There are two test sets, for two questions. `test_pair` holds out (concept, style) pairs, while training shows the
concept in other styles and the style on other concepts: can the model combine what it knows? `test_concept` holds out
concepts in every style: what does the model draw for words that it has never seen together?
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

from .packages import FIRST_STYLES, STYLES

PAIRS = 0.13  # share of the cells that may be held out; MIN_LEFT reduces it to about a tenth of all cells
CONCEPTS = 0.05  # share of the families in each group
MIN_LEFT = 3  # styles in which a concept must remain in training

# Near twins by the same artists: a model that has seen one has nearly seen the other, so they are held out together.
TWINS = {style.name: style.twin_of for style in STYLES.values() if style.twin_of}


def unit_hash(key: str) -> float:
    """A number in [0, 1) that depends only on the key."""
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


def held_out_styles(concept: str, styles: Sequence[str], share: float = PAIRS) -> set[str]:
    """The styles of one concept that go to `test_pair`.

    Twins are held out together, and at least MIN_LEFT of FIRST_STYLES stay in training. Other styles (those
    that joined later, those on request) do not count, so that they move no picture of these styles to another split.
    """
    pairs: dict[str, set[str]] = defaultdict(set)
    for style in styles:
        pairs[TWINS.get(style, style)].add(style)
    hashes = {first: unit_hash(f"pair/{concept}/{first}") for first in pairs}
    left, held_out = set(styles) & set(FIRST_STYLES), set()
    for first in sorted(pairs, key=lambda first: (first not in FIRST_STYLES, hashes[first])):
        if hashes[first] < share and len(left - pairs[first]) >= MIN_LEFT:
            left -= pairs[first]
            held_out |= pairs[first]
    return held_out


def in_known_words(rows: Sequence[dict]) -> list[dict]:
    """The rows of `test_concept` whose every word occurs in training captions.

    They are reported separately, because the other rows have words whose meaning the model can't have learned.
    """
    known = {word for row in rows if row.get("split", "train") == "train" for word in row["concept"].split()}
    return [row for row in rows if row.get("split") == "test_concept" and known.issuperset(row["concept"].split())]
