"""Does a drawing show what a scene's caption says? Judged on crops, by a judge that learned from real scenes."""

import json

import numpy as np
import pytest
import torch

from minisd import cli
from minisd.data import Scenes
from minisd.data.folder import write_corpus
from minisd.data.scenes import COLOURS, Item, Scene, main_hue, rgb
from minisd.evaluation.composition import CROP, PatchJudge, answers, background, crop, main_colour, place, real_crops

SIZE, SIDE = 32, 30


def thing(name: str, colour: str) -> np.ndarray:
    """A plain thing on transparent ground; the name says its form."""
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    forms = {
        "disc": x**2 + y**2 < 0.7, "bar": abs(x) < 0.25, "plank": abs(y) < 0.25,
        "cross": (abs(x) < 0.2) | (abs(y) < 0.2), "stripes": (x * 3 % 1 < 0.5) & (abs(y) < 0.8),
        "corner": (x < -0.3) | (y > 0.4),
    }  # fmt: skip
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    pixels[forms[name]] = [*rgb(colour), 255]
    return pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    colours = {"disc": "red", "bar": "green", "plank": "blue", "cross": "purple", "stripes": "yellow", "corner": "pink"}
    pictures = [thing(*item) for item in colours.items()]
    rows = [
        {"file_name": f"images/{name}.png", "text": name, "concept": name, "style": "noto", "hue": main_hue(picture)}
        for name, picture in zip(colours, pictures, strict=True)
    ]
    write_corpus(folder, rows, np.stack(pictures), {"made_by": "build_scenes", "size": SIZE})
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_judge():
    """A judge with few features, which is trained in a second. It has to tell six things apart, not 1,251."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PatchJudge, "atoms", 40)
        yield


@pytest.fixture(scope="module")
def judge(folder, small_judge):
    return PatchJudge(*real_crops(Scenes(folder, count=250, seed=2)))


def compose(folder, kind, items, relation=None, behind=None):
    """One scene, and its picture. items: (name, colour, left, top, side)."""
    scenes = Scenes(folder, count=1)
    numbers = {row["concept"]: i for i, row in enumerate(scenes.things)}
    parts = tuple(Item(numbers[name], name, *rest) for name, *rest in items)
    scenes.scenes = [Scene(kind, "noto", parts, relation, behind, False)]
    return scenes.scenes[0], scenes.batch([0])


def test_the_judge_recognises_real_scenes_it_has_not_seen(folder, judge):
    data = Scenes(folder, count=60, seed=1)
    hits = answers(data.batch(range(60)), data.scenes, judge)
    for question, asked in {"thing": "colour", "two things": "relation", "position": "both", "colour": "colour",
                            "two colours": "both"}.items():  # fmt: skip
        chosen = [i for i, scene in enumerate(data.scenes) if scene.kind == asked]
        assert hits[question].diagonal()[chosen].mean() > 0.8, question
    assert hits["background"].diagonal().all()


def test_things_that_have_changed_places_are_two_things_in_the_wrong_position(folder, judge):
    boxes = [(1, 9, 15), (17, 9, 15)]
    scene, _ = compose(folder, "both", [("disc", "red", *boxes[0]), ("cross", "blue", *boxes[1])], "to the left of")
    _, swapped = compose(folder, "both", [("disc", "red", *boxes[1]), ("cross", "blue", *boxes[0])], "to the right of")
    _, other = compose(folder, "both", [("disc", "blue", *boxes[0]), ("cross", "red", *boxes[1])], "to the left of")
    right, wrong, recoloured = (
        {question: bool(hit[0, 0]) for question, hit in answers(picture, [scene], judge).items()}
        for picture in (scene_picture(folder, scene), swapped, other)
    )
    assert right["two things"] and right["position"] and right["two colours"]
    assert wrong["two things"] and not wrong["position"] and not wrong["two colours"]
    assert recoloured["position"] and not recoloured["two colours"]


def scene_picture(folder, scene):
    scenes = Scenes(folder, count=1)
    scenes.scenes = [scene]
    return scenes.batch([0])


@pytest.mark.parametrize(
    "relation, places",
    [("to the left of", ("left", "right")), ("to the right of", ("right", "left")), ("above", ("top", "bottom")),
     ("below", ("bottom", "top")), (None, ("whole", "whole"))],
)  # fmt: skip
def test_a_thing_should_be_where_the_caption_says(relation, places):
    scene = Scene("relation", "noto", (), relation, None, False)
    assert (place(scene, 0), place(scene, 1)) == places


def test_a_crop_is_what_stands_out_on_white_however_faint_the_noise(folder):
    scene, picture = compose(folder, "background", [("bar", None, 1, 1, SIDE)], behind="yellow")
    noisy = picture + 0.05 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    assert (background(noisy)[0, :, 0, 0] - picture[0, :, 0, 0]).abs().max() < 0.03
    cut = crop(noisy[0], "whole")
    assert cut.shape == (3, CROP, CROP)
    assert (cut[:, :, :8] == 1).all() and (cut[:, 8:24, 15:17] < 0.5).any(dim=0).all(), "the bar, in the middle"
    assert (crop(picture[0, :, :, :2].expand(3, 32, 2), "whole") == 1).all(), "nothing stands out"


@pytest.mark.parametrize("colour", COLOURS)
def test_the_main_colour_of_a_thing_is_found(colour):
    pixels = torch.ones(3, 8, 8)
    pixels[:, 2:5] = torch.from_numpy(rgb(colour) / 127.5 - 1).float()[:, None, None]
    pixels[:, 5:] = -1  # more black than colour
    assert main_colour(pixels) == colour
    assert main_colour(torch.ones(3, 8, 8)) == ""


def test_the_command_scores_seen_and_held_out_scenes_and_writes_sheets(folder, tmp_path, capsys):
    options = ["--composition", "--scenes", folder, "--model", "tiny", "--count", 60, "--steps", 1, "--device", "cpu"]
    cli.main(["evaluate", *map(str, options), "--out", str(tmp_path)])
    scores = json.loads((tmp_path / "composition.json").read_text())["scores"]
    assert {score["split"] for score in scores} == {"seen", "held out"}
    assert {"thing", "background", "colour", "position"} <= {score["question"] for score in scores}
    assert all(score["real"] > 0.8 >= score["model"] for score in scores if score["question"] == "position")
    assert (tmp_path / "seen_relation.png").exists() and (tmp_path / "held_out_both.png").exists()
    assert "two colours" in capsys.readouterr().out
