"""Scenes: pictures composed of emoji, whose captions are exact; and several data sets as one."""

import colorsys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisd import PRESETS
from minisd.data import CaptionedPictures, Mixture, Scenes, open_corpus, sample
from minisd.data.folder import write_corpus
from minisd.data.scenes import COLOURS, RELATIONS, Item, Scene, apart, can_be_shown, cut_out, main_hue, recoloured, rgb
from minisd.tokenizer import BPETokenizer

SIZE, SIDE = 16, 14
NAMES = ["fox", "rocket", "bus", "orange", "grapes", "skull"]


def square(colour: str | None) -> np.ndarray:
    """A plain thing on transparent ground: a square of a colour (None: grey)."""
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    pixels[2:-2, 2:-2] = [*(rgb(colour) if colour else (120, 120, 120)), 255]
    return pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six things in two styles; the skull is grey, the others have one hue."""
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    colours = ["orange", "red", "yellow", "green", "purple", None]
    rows, pictures = [], []
    for style in ("noto", "fluent 3d"):
        for name, colour in zip(NAMES, colours, strict=True):
            pictures.append(square(colour))
            about = {"concept": name, "style": style, "hue": main_hue(pictures[-1])}
            rows.append({"file_name": f"images/{style}/{name}.png", "text": name} | about)
    write_corpus(folder, rows, np.stack(pictures), {"made_by": "build_scenes", "size": SIZE})
    return folder


def shown(scenes: Scenes, i: int) -> dict[str, np.ndarray]:
    """Which pixels of a scene each thing covers, by its name in the caption."""
    scene, covered = scenes.scenes[i], {}
    for item in scene.items:
        where = np.zeros((SIZE, SIZE), bool)
        where[item.top : item.top + item.side, item.left : item.left + item.side] = True
        covered[item.name] = where
    return covered


# What a scene is ---------------------------------------------------------------------------------------------------


def test_scene_k_depends_on_the_seed_and_k_alone(folder):
    few, many, other = Scenes(folder, count=20), Scenes(folder, count=60), Scenes(folder, count=20, seed=1)
    assert many.captions[:20] == few.captions != other.captions
    assert np.array_equal(many.picture(7), few.picture(7))
    assert torch.equal(many.batch([7, 3])[1], few[3][0])
    assert few.fingerprint != other.fingerprint


def test_every_kind_of_caption_occurs_and_only_one_scene_in_two_names_its_style(folder):
    scenes = Scenes(folder, count=400)
    kinds = Counter(scene.kind for scene in scenes.scenes)
    assert kinds.keys() == {"background", "colour", "relation", "both"} and min(kinds.values()) > 40
    named = sum("style" in caption for caption in scenes.captions)
    assert 160 < named < 240


def test_things_stand_where_the_caption_says(folder):
    scenes = Scenes(folder, count=300)
    seen = Counter()
    for i, scene in enumerate(scenes.scenes):
        if not scene.relation:
            continue
        (rows_a, columns_a), (rows_b, columns_b) = (np.nonzero(where) for where in shown(scenes, i).values())
        right_of = {"to the right of": 1, "to the left of": -1}.get(scene.relation)
        if right_of:
            gap = columns_a.min() - columns_b.max() if right_of > 0 else columns_b.min() - columns_a.max()
        else:
            gap = rows_a.min() - rows_b.max() if scene.relation == "below" else rows_b.min() - rows_a.max()
        assert gap > 0, scene.caption
        seen[scene.relation] += 1
    assert seen.keys() == RELATIONS.keys()


def test_backgrounds_and_recoloured_things_have_the_colour_that_the_caption_says(folder):
    scenes = Scenes(folder, count=300)
    for i, scene in enumerate(scenes.scenes):
        picture = scenes.picture(i)
        corners = [picture[0, 0], picture[0, -1], picture[-1, 0], picture[-1, -1]]
        background = rgb(scene.background) if scene.background else np.uint8([255, 255, 255])
        assert all(np.array_equal(corner, background) for corner in corners), scene.caption
        for item in scene.items:
            if item.colour:
                middle = picture[item.top + item.side // 2, item.left + item.side // 2]
                assert np.abs(middle.astype(int) - rgb(item.colour)).max() <= 6, scene.caption


def test_a_thing_is_never_hidden_by_a_background_of_its_own_colour(folder):
    for scene in Scenes(folder, count=300).scenes:
        for item in scene.items:
            if item.colour and scene.background:
                assert apart(COLOURS[item.colour][0], COLOURS[scene.background][0]) >= 20


def test_a_scene_is_the_emoji_over_its_background_and_small_things_are_means_of_pixels(folder):
    scenes = Scenes(folder, count=1)
    soft = np.zeros((SIDE, SIDE, 4), np.uint8)
    soft[:, ::2] = [200, 40, 40, 255]  # every second column is transparent: half as small, each pixel is half of each
    scenes.cut_outs = soft[None]
    scenes.scenes = [Scene("background", "noto", (Item(0, "fox", None, 1, 2, SIDE // 2),), None, "blue", False)]
    inside = scenes.picture(0)[2 : 2 + SIDE // 2, 1 : 1 + SIDE // 2].astype(float)
    assert np.abs(inside - (np.array([200, 40, 40]) + rgb("blue")) / 2).max() <= 1


# Captions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, phrase",
    [("fox", "a fox"), ("orange", "an orange"), ("grapes", "grapes"), ("bus", "a bus"), ("old key", "an old key")],
)  # fmt: skip
def test_names_stand_with_their_article(name, phrase):
    assert Item(0, name, None, 0, 0, 8).name == phrase


def test_names_that_would_contradict_a_caption_are_left_out():
    assert can_be_shown("fox") and can_be_shown("roller coaster")
    refused = ["red heart", "down arrow", "t-rex on top", "person in suit levitating", "white flag", "blue-green algae"]
    assert not any(map(can_be_shown, refused))


# Colours -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", COLOURS)
def test_a_plain_thing_has_its_hue_and_takes_any_other(colour):
    hue = main_hue(square(colour))
    assert apart(hue, COLOURS[colour][0]) <= 10
    for target in COLOURS:
        middle = recoloured(square(colour), hue, target)[SIDE // 2, SIDE // 2]
        assert np.abs(middle[:3].astype(int) - rgb(target)).max() <= 6 and middle[3] == 255


def test_grey_and_two_coloured_things_have_no_main_hue():
    half = square("red")
    half[: SIDE // 2, :, :3] = rgb("blue")
    assert main_hue(square(None)) is None and main_hue(half) is None
    assert main_hue(np.zeros((SIDE, SIDE, 4), np.uint8)) is None


def test_recolouring_keeps_what_is_grey_and_the_shading():
    thing = square("red")
    thing[4, 4] = [255, 255, 255, 255]
    dark = np.uint8(np.round(255 * np.array(colorsys.hsv_to_rgb(2 / 360, 0.82, 0.45))))
    thing[5, 5, :3] = dark
    blue = recoloured(thing, main_hue(thing), "blue")
    assert blue[4, 4].tolist() == [255, 255, 255, 255]
    assert blue[5, 5, :3].max() == pytest.approx(blue[7, 7, :3].max() / 2, abs=3)
    assert np.array_equal(blue[..., 3], thing[..., 3])


def test_a_cut_out_does_not_take_colour_from_transparent_pixels():
    pytest.importorskip("resvg_py")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="3" height="8" fill="#f00"/></svg>'
    pixels = cut_out(svg, 4, 8)
    assert pixels[:, 0].tolist() == [[255, 0, 0, 255]] * 4
    assert pixels[0, 1, :3].tolist() == [255, 0, 0] and 120 < pixels[0, 1, 3] < 135, "half covered, and wholly red"
    assert not pixels[:, 2:, 3].any()


# What is held out --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words_of_training(folder):
    return {word.strip(",") for caption in Scenes(folder, count=2000).captions for word in caption.split()}


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_held_out_combinations_never_occur_in_training_and_each_word_of_them_does(folder, words_of_training, seed):
    train, test = Scenes(folder, count=150, seed=seed), Scenes(folder, "test_scene", count=30, seed=seed)
    known = {combination for scene in train.scenes for combination in scene.combinations}
    assert all(scene.split == "train" for scene in train.scenes)
    for scene in test.scenes:
        assert set(scene.combinations) - known, scene.caption
    assert {word.strip(",") for caption in test.captions for word in caption.split()} <= words_of_training


def test_what_is_held_out_in_one_wording_is_held_out_in_the_other():
    def scene(first: str, relation: str, second: str) -> Scene:
        items = tuple(Item(0, name, None, 0, 0, 8) for name in (first, second))
        return Scene("relation", "noto", items, relation, None, False)

    for one, other in [("to the left of", "to the right of"), ("above", "below")]:
        assert scene("fox", one, "bus").combinations == scene("bus", other, "fox").combinations
        assert scene("fox", one, "bus").combinations != scene("fox", other, "bus").combinations


# Several data sets as one ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji") / "emoji"
    rows = [{"file_name": f"images/{i}.png", "text": f"thing {i}"} for i in range(3)]
    pictures = np.full((3, SIZE, SIZE, 3), np.arange(3, dtype=np.uint8)[:, None, None, None])
    write_corpus(folder, rows, pictures, {"made_by": "draw_shapes"}, {"templates.txt": "{}\na {}\n"})
    return folder


def test_a_mixture_has_equal_shares_of_its_parts(folder, emoji):
    data = Mixture([CaptionedPictures(emoji), Scenes(folder, count=10)])
    assert len(data) == 20
    assert data.captions[0::2] == [f"thing {i % 3}" for i in range(10)]
    assert data.captions[1::2] == Scenes(folder, count=10).captions
    assert data.wordings[2] == ["thing 1", "a thing 1"] and data.wordings[1] == [data.captions[1]] * 2
    pixels = (data.batch([4, 9, 0])[:, 0, 0, 0] + 1) * 127.5
    assert pixels[0].round() == 2 and pixels[2].round() == 0
    assert torch.equal(data.batch([9])[0], Scenes(folder, count=10)[4][0])
    assert data.describe(9).startswith("scene 4") and "thing 2" in data.describe(4)
    assert Scenes(folder, count=10).fingerprint in data.fingerprint


def test_folders_are_opened_as_what_they_hold(folder, emoji):
    assert isinstance(open_corpus([folder]), Scenes)
    assert isinstance(open_corpus([emoji]), CaptionedPictures)
    both = open_corpus([emoji, folder])
    assert isinstance(both, Mixture) and both.size == SIZE
    with pytest.raises(ValueError, match="16x16, and 32x32 is needed"):
        open_corpus([folder], size=32)


def test_parts_of_several_sizes_and_no_folder_are_one_clear_sentence(folder, emoji, tmp_path):
    write_corpus(tmp_path / "x", [{"file_name": "images/0.png", "text": "x"}], np.zeros((1, 8, 8, 3), np.uint8), {})
    with pytest.raises(ValueError, match="have several .*8x8"):
        open_corpus([folder, tmp_path / "x"])
    with pytest.raises(ValueError, match="no folder of pictures was given"):
        open_corpus([])


def test_no_caption_is_truncated():
    """Nor the longest that the grammar can make of the sample's names, by a vocabulary learned from such captions."""
    corpus, text = sample(), PRESETS["emoji-64"].cond_stage
    names = sorted({row["concept"] for row in corpus.rows if can_be_shown(row["concept"])})
    words = [list(COLOURS), list(RELATIONS), sorted({row["style"] for row in corpus.rows})]

    def caption(names, colours, relation, style) -> str:
        items = tuple(Item(0, name, colour, 0, 0, 15) for name, colour in zip(names, colours, strict=True))
        return Scene("both", style, items, relation, colours[0], names_style=True).caption

    scenes = []
    for i in range(len(names)):
        colour, relation, style = (options[i % len(options)] for options in words)
        scenes.append(caption([names[i], names[i - 1]], [colour, colour], relation, style))
    tokenizer = BPETokenizer.train(scenes + corpus.captions, text.vocab_size)

    def longest(options) -> list[str]:
        return sorted(options, key=lambda option: len(tokenizer.engine.encode(option).ids))[-2:]

    colours, relations, styles = map(longest, words)
    scenes.append(caption(longest(names), colours, relations[-1], styles[-1]))
    assert not any(tokenizer(scenes + corpus.captions, text.max_length).lost)
