"""The names of emoji: CLDR names and keywords, matched to the icons of each package.

The names are the English ones of Unicode's CLDR, from the package emojibase-data. If an icon package lists code points,
its icons are matched to concepts by code point, otherwise by name. The packages are of different ages, so an icon can
have the present CLDR name of its concept, a former one, or the Unicode name of its code point.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache

from .tables import read_table


@dataclass(frozen=True)
class Concept:
    """One thing to draw."""

    name: str  # plain and lower case, as in the caption: "red apple"
    codepoint: str  # the sequence that stands for it, in hex: "1F34E"
    group: str  # one of CLDR's ten: "food-drink"
    subgroup: str  # "food-fruit"
    keywords: tuple[str, ...]
    family: str  # concepts of one family are held out together: "man astronaut" and "astronaut"


# Names whose only distinguishing character is lost in plain text.
SPELT_OUT = {"keycap: #": "keycap hash", "keycap: *": "keycap asterisk"}

# Words that say who does something, not what. Only they differ between the members of a family.
WHO = {"man", "men", "woman", "women", "person", "people", "boy", "girl", "child", "adult", "mx", "mrs"}


def plain(label: str) -> str:
    """A CLDR label as a caption has it: lower case, plain letters, no punctuation but - and '."""
    label = SPELT_OUT.get(label, label).replace("’", "'")
    label = unicodedata.normalize("NFKD", label.lower()).encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"[^a-z0-9'\- ]+", " ", label).split())


def slug(name: str) -> str:
    """A name as it is written in file names and by Iconify: "men's room" -> "mens-room"."""
    return re.sub(r"[^a-z0-9]+", "-", plain(name).replace("'", "")).strip("-")


def family(label: str, group: str) -> str:
    """What a label is about, without who does it: "woman astronaut" -> "astronaut", "kiss: man, man" -> "kiss"."""
    words = [word for word in plain(label.split(":")[0]).split() if word not in WHO]
    if group == "animals-nature" and len(words) > 1 and words[-1] == "face":
        words.pop()  # "cat face" is a cat
    return " ".join(words) or "person"


def concepts(data: list[dict], groups: dict, tones: bool = False, flags: bool = False) -> list[Concept]:
    """The concepts in CLDR's order. data, groups: `en/data.json` and `meta/groups.json` of emojibase-data."""
    found = []
    for entry in data:
        group = groups["groups"].get(str(entry.get("group")))
        if group is None or group == "component" or (group == "flags" and not flags):
            continue  # without a group: the regional indicators; component: bare skin tones and hair
        subgroup = groups["subgroups"][str(entry["subgroup"])]
        keywords, kin = tuple(entry.get("tags", ())), family(entry["label"], group)
        for member in [entry, *(entry.get("skins", []) if tones else [])]:
            found.append(Concept(plain(member["label"]), member["hexcode"], group, subgroup, keywords, kin))
    return found


def bare(codepoint: str) -> str:
    """A code point sequence without joiners and variation selectors, because only some packages write them."""
    return "-".join(c for c in codepoint.lower().split("-") if c not in ("fe0f", "200d"))


def squashed(name: str) -> str:
    return slug(name).replace("-", "")


def unicode_name(codepoint: str) -> str:
    """The name that Unicode gave a single code point. It never changes, unlike CLDR's names."""
    codes = [c for c in codepoint.split("-") if c != "FE0F"]
    return unicodedata.name(chr(int(codes[0], 16)), "") if len(codes) == 1 else ""


@cache
def icon_names(package: str) -> dict[str, dict[str, str]]:
    """Our own table for the icons of a package: `draws`, `left_out` and `shows`, as icon_names.toml explains."""
    table = read_table("icon_names.toml").get(package, {})
    return {"draws": {}, "left_out": {}, "shows": {}} | table


def join(concepts: list[Concept], icons: dict, chars: dict[str, str], package: str = "") -> dict[str, str]:
    """Which icon draws which concept: {concept's code point: icon's name}.

    icons: a package's `icons.json`; chars: its `chars.json` ({code point: icon}), {} if it has none. An icon
    is matched by code point, else by our own table, else by CLDR name, else by the code point's Unicode name, else by
    the CLDR name with a number: from the most to the least reliable. It is used at most once.
    """
    by_codepoint = {bare(code): name for code, name in chars.items()}
    known = icons["icons"] | icons.get("aliases", {})
    # Compared without spaces, because fxemoji has none. If two names are then the same, the first one counts.
    by_name = {squashed(name): name for name in reversed(known)}
    table = icon_names(package)
    own = {concept: icon for icon, concept in table["draws"].items()}

    found: dict[str, str] = {}
    used = set(table["left_out"])
    ways = (
        lambda c: by_codepoint.get(bare(c.codepoint)),
        lambda c: own.get(c.name),
        lambda c: by_name.get(squashed(c.name)),
        lambda c: by_name.get(squashed(unicode_name(c.codepoint))),
        lambda c: by_name.get(squashed(f"{c.name}-1")),  # the first of several drawings of it
    )
    # Each way is tried for all concepts before the next way. Otherwise a concept could take, by a former name, an icon
    # whose name is now that of another concept.
    for way in ways:
        for concept in concepts:
            icon = way(concept)
            if icon in known and icon not in used and concept.codepoint not in found:
                found[concept.codepoint] = icon
                used.add(icon)
    return found
