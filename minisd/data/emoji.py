"""The emoji corpus: 1,641 concepts, drawn in up to nine styles, each with a name that a person wrote.

A caption is "CONCEPT, STYLE style". This is a good first corpus for text-to-image: it is small, clean and free to use,
and it is a grid of concepts and styles. A cell that was held out of training shows whether a model can combine a
concept with a style, or only remembers pictures.
"""

import importlib.util
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from ..pictures import open_picture
from .concepts import Concept, bare, concepts, icon_names, join, slug
from .folder import DOWNLOADS, corpus_folder, write_corpus
from .packages import DEFAULT_STYLES, NAMES, STYLES, Style, attribution, fetch, read_files, read_json
from .split import held_out_families, held_out_styles

# The forms of a caption on which CLIP is trained, so that a prompt may be a sentence and not only a name.
TEMPLATES = ("{}", "a {}", "the {}", "a picture of a {}")

Rendered = tuple[list[Concept], UInt8[np.ndarray, "n size size 3"]]  # a style's concepts, and a picture of each


# From an icon to pixels -----------------------------------------------------------------------------------------------


def svg(icons: dict, name: str) -> str:
    """The SVG of one icon of an Iconify set, centred in a square. An alias may stand for a mirrored icon."""
    alias = icons.get("aliases", {}).get(name, {"parent": name})
    icon = icons["icons"][alias["parent"]]
    left, top = (icon.get(key, icons.get(key, 0)) for key in ("left", "top"))
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    body, side = icon["body"], max(width, height)
    if alias.get("hFlip"):
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{side}" height="{side}">{body}</svg>'
    )


def picture_file(source: str | bytes, size: int, master: int) -> bytes:
    """The bytes of a picture: an SVG is rendered at about master x master pixels, a picture stays as it is."""
    if isinstance(source, bytes):
        return source
    import resvg_py

    side = size * max(1, round(master / size))  # a whole multiple, so that a pixel is the mean of whole pixels
    return bytes(resvg_py.svg_to_bytes(svg_string=source, width=side, height=side))


def render(source: str | bytes, size: int, master: int) -> UInt8[np.ndarray, "size size 3"]:
    """An SVG or a picture as pixels, on white: rendered at about master x master and averaged down to size x size."""
    picture = open_picture(picture_file(source, size, master))
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX))


# The grid of concepts and styles --------------------------------------------------------------------------------------


def distinct(names: Sequence[str], pictures: UInt8[np.ndarray, "n h w 3"]) -> list[int]:
    """The indices of the pictures to keep: none that is blank, and only one of several identical ones.

    Otherwise the same picture could be on both sides of a split. The one with the plainest name is kept: a silhouette
    that stands for every family is "family", not "family man woman boy".
    """
    # The dict keeps the last of identical pictures: the one with the fewest words, or the first of several such.
    plainest_last = sorted(range(len(names)), key=lambda i: (len(names[i].split()), i), reverse=True)
    kept = {pictures[i].tobytes(): i for i in plainest_last if pictures[i].min() != pictures[i].max()}
    return sorted(kept.values())


def as_shown(concept: Concept, style: Style) -> Concept:
    """The concept, renamed if this style shows something else: older styles have a pistol for the water pistol."""
    return replace(concept, name=icon_names(style.package.npm)["shows"].get(concept.name, concept.name))


def metadata(cells: Sequence[tuple[Concept, str]], everything: Iterable[Concept]) -> list[dict]:
    """The rows of metadata.jsonl for (concept, style) cells.

    everything: all concepts, whether there is a picture or not. The test concepts are chosen among them, so that they
    do not depend on which styles are built.
    """
    unseen = held_out_families((concept.group, concept.family) for concept in everything)
    styles: dict[str, list[str]] = {}
    for concept, style in cells:
        styles.setdefault(concept.name, []).append(style)
    held_out = {(name, style) for name, have in styles.items() for style in held_out_styles(name, have)}
    rows = []
    for concept, style in cells:
        split = "test_pair" if (concept.name, style) in held_out else "train"
        row = {
            "file_name": f"images/{slug(style)}/{slug(concept.name)}.png",
            "text": f"{concept.name}, {style} style",
            "concept": concept.name,
            "style": style,
            "group": concept.group,
            "subgroup": concept.subgroup,
            "keywords": list(concept.keywords),
            "split": "test_concept" if concept.family in unseen else split,
            "codepoint": concept.codepoint,
        }
        rows.append(row)
    return rows


def grid(everything: Sequence[Concept], rendered: Mapping[Style, Rendered]) -> tuple[list[dict], np.ndarray]:
    """The rows and pictures of a corpus: concept by concept in CLDR's order, and style by style within a concept."""
    rank = {concept.codepoint: i for i, concept in enumerate(everything)}
    cells = [(as_shown(concept, style), style.name) for style, (found, _) in rendered.items() for concept in found]
    order = sorted(range(len(cells)), key=lambda i: rank[cells[i][0].codepoint])  # sorted() keeps the styles' order
    cells = [cells[i] for i in order]
    pictures = np.concatenate([pictures for _, pictures in rendered.values()])[order]
    kept = distinct([concept.name for concept, _ in cells], pictures)
    return metadata([cells[i] for i in kept], everything), pictures[kept]


# Where the pictures come from -----------------------------------------------------------------------------------------


def read_concepts(cache: Path, tones: bool = False, flags: bool = False) -> list[Concept]:
    """All concepts, from the package of names in `cache`."""
    names = cache / NAMES.tarball
    return concepts(read_json(names, "en/data.json"), read_json(names, "meta/groups.json"), tones, flags)


def sources(style: Style, everything: Sequence[Concept], cache: Path) -> dict[int, str | bytes]:
    """The SVG, or the file of pixels, of each concept that a style has, by the concept's index."""
    tarball = cache / style.package.tarball
    if style.picture_files:
        files = {bare(code): content for code, content in read_files(tarball, style.picture_files).items()}
        return {i: files[code] for i, concept in enumerate(everything) if (code := bare(concept.codepoint)) in files}
    icons, chars = (read_json(tarball, name) for name in ("icons.json", "chars.json"))
    if style.codepoints_of:
        chars = read_json(fetch(STYLES[style.codepoints_of].package, cache), "chars.json")
    icon_of = join(everything, icons, chars, style.package.npm)
    return {i: svg(icons, icon_of[c.codepoint]) for i, c in enumerate(everything) if c.codepoint in icon_of}


def render_style(style: Style, everything: Sequence[Concept], cache: Path, size: int) -> Rendered:
    """The concepts that a style has, and a picture of each."""
    found = sources(style, everything, cache)
    pictures = [render(source, size, style.master) for source in tqdm(found.values(), style.name, unit=" pictures")]
    return [everything[i] for i in found], np.stack(pictures)


# The corpus -----------------------------------------------------------------------------------------------------------


def asked_for(size: int, styles: Sequence[str]) -> list[Style]:
    """The styles that were asked for, in our order. Raises ValueError or ImportError if one can't be had."""
    asked = {name.replace("-", " ") for name in ([styles] if isinstance(styles, str) else styles)}
    if not asked or asked - STYLES.keys():
        wrong = ", ".join(sorted(asked - STYLES.keys())) or "none"
        raise ValueError(f"No such style: {wrong}; there are: {', '.join(STYLES)}.")
    if not 16 <= size <= 512:
        raise ValueError(f"size is {size}; a width in pixels from 16 to 512 is needed.")
    if importlib.util.find_spec("resvg_py") is None:
        raise ImportError('resvg-py, which draws the SVGs, is not installed: pip install "minisd[data]"')
    return [style for style in STYLES.values() if style.name in asked]


def build_emoji(
    folder: str | Path = "data/emoji",
    size: int = 64,
    styles: Sequence[str] = DEFAULT_STYLES,
    tones: bool = False,
    flags: bool = False,
) -> Path:
    """Fetch, verify, render and write the emoji corpus; return its folder, which `CaptionedPictures` reads.

    size: width in pixels, 16 to 512. styles: some of STYLES. "openmoji" and "emojione v1" have share-alike licences, so
    they are only built if you name them. tones, flags: whether to add skin-tone variants and flags, which double the
    corpus and teach a model little.

    You can interrupt and repeat this: downloads are kept, and a complete corpus is not built again.
    Raises ValueError (an argument, a checksum, a folder with something else in it), ImportError (resvg-py is missing),
    FileNotFoundError (npm is missing), ConnectionError (npm could not download), OSError (disk full), each in one
    sentence.
    """
    chosen = asked_for(size, styles)
    folder = Path(folder).expanduser()
    cache = folder / DOWNLOADS
    recipe = {"made_by": "build_emoji", "size": size, "styles": [style.name for style in chosen]}
    recipe |= {"tones": tones, "flags": flags, "source": "npm", "templates": list(TEMPLATES)}
    with corpus_folder(folder, recipe, f"{len(chosen)} styles at {size}x{size}") as complete:
        if complete:
            return folder
        # Everything is downloaded first, then rendered.
        for package in tqdm([NAMES, *(style.package for style in chosen)], "fetching", unit=" packages"):
            fetch(package, cache)
        everything = read_concepts(cache, tones, flags)
        rendered = {style: render_style(style, everything, cache, size) for style in chosen}
        rows, pictures = grid(everything, rendered)
        texts = {"ATTRIBUTION.md": attribution(chosen), "templates.txt": "\n".join(TEMPLATES) + "\n"}
        write_corpus(folder, rows, pictures, recipe, texts)
    splits = ", ".join(f"{name} {count:,}" for name, count in Counter(row["split"] for row in rows).items())
    print(f"{folder}: {len(rows):,} pictures at {size}x{size} ({splits}).")
    return folder
