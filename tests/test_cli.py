"""The command line, called as a person would call it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minisd import load, save
from minisd.cli import main
from minisd.training import recipes


def run(*arguments):
    main([str(a) for a in arguments])


def fails(capsys, *arguments) -> str:
    """The one line that a command that can't be done ends in."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    message = str(stop.value.code)
    assert message.startswith("minisd: ") and "\n" not in message and "Traceback" not in capsys.readouterr().err
    return message


def draw(path, *options):
    run("txt2img", "a fox, noto style", "--steps", 3, "--num-images", 2, "--out", path, *options)
    return np.asarray(Image.open(path).convert("RGB"))


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(tmp_path):
    first, again = draw(tmp_path / "a.png", "--seed", 1), draw(tmp_path / "b.png", "--seed", 1)
    other = draw(tmp_path / "c.png", "--seed", 2)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    half = first.shape[1] // 2  # picture 1 of seed 1 is picture 0 of seed 2
    assert np.abs(first[:, half + 1 :].astype(int) - other[:, : half - 1]).mean() < 1


def test_guidance_changes_the_picture(tmp_path):
    plain, strong = draw(tmp_path / "a.png", "--guidance", 1), draw(tmp_path / "b.png", "--guidance", 8)
    assert np.abs(plain.astype(int) - strong).mean() > 5


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_the_film_has_a_frame_for_each_step(tmp_path, suffix):
    film = tmp_path / f"fox.{suffix}"
    draw(tmp_path / "a.png", "--trajectory", film)
    assert Image.open(film).n_frames == 3


def test_an_empty_prompt_draws_and_a_long_one_is_cut_with_a_note(tmp_path, capsys):
    run("txt2img", "", "--steps", 2, "--num-images", 1, "--out", tmp_path / "a.png")
    assert "note:" not in capsys.readouterr().err
    run("txt2img", "red " * 40 + "unicorn", "--steps", 2, "--num-images", 1, "--out", tmp_path / "b.png")
    note = capsys.readouterr().err
    assert "note: the prompt is longer than" in note and "unicorn" in note
    assert (tmp_path / "b.png").exists()


def test_a_picture_is_drawn_over_and_a_part_of_it_anew(tmp_path):
    before = draw(tmp_path / "fox.png", "--num-images", 1, "--scale", 1)
    mask = np.zeros((32, 32), np.uint8)
    mask[16:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = ("--num-images", 1, "--scale", 1, "--steps", 4, "--out", tmp_path / "a.png")

    def drawn():
        return np.abs(np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int) - before).mean(axis=(1, 2))

    run("img2img", "a red apple", tmp_path / "fox.png", "--strength", 0.3, *options)
    near = drawn().mean()
    run("img2img", "a red apple", tmp_path / "fox.png", "--strength", 1.0, *options)
    assert 0 < near < drawn().mean()
    run("inpaint", "a red apple", tmp_path / "fox.png", tmp_path / "mask.png", *options)
    assert drawn()[:12].mean() < drawn()[20:].mean()


def test_a_negative_prompt_and_half_precision(tmp_path):
    plain = draw(tmp_path / "a.png")
    negative, half = draw(tmp_path / "b.png", "--negative", "orange"), draw(tmp_path / "c.png", "--dtype", "bf16")
    assert np.abs(plain.astype(int) - negative).mean() > 1
    assert 0 < np.abs(plain.astype(int) - half).mean() < 20


@pytest.mark.parametrize("layout", ["minisd", "diffusers", "compvis"])
def test_a_converted_model_draws_the_same(tmp_path, capsys, layout):
    target = tmp_path / ("tiny.safetensors" if layout == "compvis" else "tiny")
    run("convert", "tiny", target, *(() if layout == "compvis" else ("--layout", layout)))
    run("info", target)
    place = {"minisd": "minisd's layout", "diffusers": "diffusers' layout", "compvis": "one file"}[layout]
    assert place in capsys.readouterr().out
    config = ("--config", tmp_path / "tiny.yaml") if layout == "compvis" else ()
    first, second = (draw(tmp_path / f"{i}.png", "--model", m, *c) for i, (m, c) in
                     enumerate([("tiny", ()), (target, config)]))  # fmt: skip
    assert np.array_equal(first, second)


def test_a_checkpoint_that_runs_a_program_is_refused(tmp_path, capsys):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": print}, tmp_path / "evil.ckpt")
    for command in (("txt2img", "a fox", "--model"), ("info",), ("convert",)):
        rest = (tmp_path / "out",) if command == ("convert",) else ()
        message = fails(capsys, *command, tmp_path / "evil.ckpt", *rest)
        assert "holds more than tensors" in message and "evil.ckpt" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "nowhere"), "there is no model at nowhere"),
        (("--height", 33), "multiples of"),
        (("--steps", 0), "steps"),
        (("--steps", 1001), "steps"),
        (("--out", "no/such/folder/a.png"), "there is no folder"),
        (("--out", "a.xyz"), "a.xyz"),
        (("--out", "a" * 300 + ".png"), "cannot be written (File name too long)"),
        (("--trajectory", "no/such/folder/a.gif"), "there is no folder"),
        (("--height", 0), "multiples of"),
        (("--scale", 0), "--scale enlarges"),
        (("--num-images", 0), "num_images"),
        (("--num-images", 10**11), "num_images is 100,000,000,000: at most 100,000"),
        (("--scale", 10**6), "1 to 1,000 pixels"),
        (("--height", 32 * 10**28), "there is not enough memory: draw fewer pictures"),
    ],
)
def test_a_mistake_gets_one_sentence_and_writes_nothing(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in fails(capsys, "txt2img", "a fox", *arguments)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_found_before_the_drawing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("minisd.cli.load", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "taken.png").mkdir()
    (tmp_path / "kept.png").write_text("mine")
    assert "taken.png cannot be written (Is a directory)" in fails(
        capsys, "txt2img", "x", "--out", tmp_path / "taken.png"
    )
    film = ("--out", tmp_path / "kept.png", "--trajectory", tmp_path / "taken.gif")
    (tmp_path / "taken.gif").mkdir()
    assert "taken.gif cannot be written" in fails(capsys, "txt2img", "x", *film)
    assert (tmp_path / "kept.png").read_text() == "mine"


def test_a_full_disk_leaves_the_old_picture(tmp_path, capsys, monkeypatch):
    def full_disk(image, path, *_, **__):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    film = ("--trajectory", tmp_path / "a.gif")
    before = draw(tmp_path / "a.png", *film, "--model", "tiny")
    monkeypatch.setattr(Image.Image, "save", full_disk)
    told = fails(capsys, "txt2img", "x", "--steps", 1, "--model", "tiny", "--out", tmp_path / "a.png")
    assert "could not write" in told and "No space left on device" in told and "is untouched" in told
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png").convert("RGB")), before)
    assert sorted(os.listdir(tmp_path)) == ["a.gif", "a.png"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("data", "shapes", "--count", 10**20), "1 to 1,000,000 can be drawn"),
        (("data", "shapes", "--count", 2, "--seed", -1), "from a seed of at least 0"),
        (("data", "shapes", "--count", 2, "--size", 10**9), "there is not enough memory: ask for fewer or smaller"),
    ],
)
def test_an_absurd_number_is_refused_at_once(tmp_path, capsys, command, words):
    assert words in fails(capsys, *command, "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (("unet", "--preset", "tiny"), "--preset"),
        (("vae", "--preset=emoji"), "--preset"),
        (("vae", "--first-stage", "kl"), "--first-stage"),
        (("unet", "--parameterization", "eps"), "--parameterization"),
        (("unet", "--condition", "none"), "--condition"),
    ],
)
def test_a_flag_that_a_finished_model_leaves_no_room_for_is_refused(capsys, arguments, flag):
    message = fails(capsys, "train", arguments[0], "--init", "tiny", "--device", "cpu", *arguments[1:])
    assert flag in message and "leave" in message


@pytest.mark.parametrize("encoding", ["cp1252", "gbk"])
def test_what_is_printed_can_be_printed_anywhere(encoding):
    code = "import minisd; print('\\u1fb1\\u2205\\ud800'); from minisd.cli import main; main(['--help'])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}, timeout=120
    )
    assert run.returncode == 0 and b"txt2img" in run.stdout, run.stderr.decode(encoding, "replace")


def test_a_terminal_is_not_commanded_by_the_name_of_a_file(tmp_path, capsys):
    evil = "\x1b]0;title\x07\x9b31m.png"
    message = fails(capsys, "img2img", "a fox", tmp_path / evil, "--model", "tiny", "--out", tmp_path / "a.png")
    assert "\\x1b]0;title\\x07\\x9b31m.png: the file is missing" in message and "\x1b" not in message


def test_a_missing_corpus_says_how_to_make_it(tmp_path, capsys):
    assert "minisd data" in fails(capsys, "train", "vae", "--data", tmp_path / "nothing", "--out", tmp_path / "run")
    assert "minisd data" in fails(capsys, "evaluate", "--data", tmp_path / "nothing")


def test_a_model_without_an_image_tower_says_where_to_take_one(tmp_path, capsys):
    run("data", "shapes", "--out", tmp_path, "--count", 2)
    message = fails(capsys, "evaluate", "--model", "tiny", "--data", tmp_path)
    assert "tiny has no image tower" in message and "--clip" in message
    assert "at least 10 captions of train are needed" in fails(
        capsys, "evaluate", "--model", "tiny", "--clip", "emoji", "--data", tmp_path
    )


def test_a_model_is_trained_from_a_folder_of_pictures_to_a_drawing(tmp_path, capsys, monkeypatch):
    shapes, out = tmp_path / "shapes", tmp_path / "run"
    run("data", "shapes", "--out", shapes, "--count", 90)
    options = ("--data", shapes, "--out", out, "--preset", "tiny", "--steps", 2, "--batch-size", 4, "--device", "cpu")
    assert "minisd train clip" in fails(capsys, "train", "unet", *options)  # in this order, please
    for network in ("clip", "vae", "unet"):
        run("train", network, *options)
    model = out / "unet" / "model"
    run("txt2img", "a red circle", "--model", model, "--steps", 2, "--out", tmp_path / "a.png")
    run("info", model)
    assert "cond_stage_model" in capsys.readouterr().out
    monkeypatch.setattr("minisd.evaluation.PatchJudge.atoms", 32)  # a judge that is ready at once
    options = ("--model", model, "--data", shapes, "--count", 10, "--out", tmp_path / "scores")
    run("evaluate", "--steps", 2, *options)
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())["scores"]
    assert list(dict.fromkeys(s["split"] for s in scores)) == ["train", "test_pair"]
    assert {s["question"] for s in scores} == {"concept", "R@1", "R@5"}  # shapes have no styles
    # and from there, on pictures of one's own
    own = ("--init", model, "--data", shapes, "--out", tmp_path / "own", "--steps", 1, "--device", "cpu")
    run("train", "unet", *own)
    assert (tmp_path / "own/unet/model/clip.json").exists()
    run("txt2img", "a red circle", "--model", tmp_path / "own/unet/model", "--steps", 2, "--out", tmp_path / "b.png")
    run("train", "vae", *own, "--perceptual-weight", 0.1)  # by its own CLIP's eyes
    assert (tmp_path / "own/vae/model/clip.json").exists()
    run("txt2img", "a red circle", "--model", tmp_path / "own/vae/model", "--steps", 2, "--out", tmp_path / "c.png")
    run("convert", model, tmp_path / "theirs", "--layout", "diffusers")  # where there is no image tower
    theirs = ("--init", tmp_path / "theirs", *own[2:4], "--out", tmp_path / "more", "--steps", 1, "--device", "cpu")
    assert "--perceptual-weight 0" in fails(capsys, "train", "vae", *theirs)
    run("train", "vae", *theirs, "--perceptual-weight", 0)


@pytest.mark.parametrize("model", ["emoji", "their/model"], ids=["a folder", "on the hub"])
def test_a_model_without_the_rest_of_clip_is_trained_further(tmp_path, monkeypatch, model):
    """A folder of one's own may be called as a model that ships, which has it."""
    save(load("tiny", "cpu"), tmp_path / "emoji")
    save(load("tiny", "cpu"), tmp_path / "cache", layout="diffusers")
    monkeypatch.setattr("minisd.checkpoint.diffusers.fetch", lambda name, variant: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    run("data", "shapes", "--out", "shapes", "--count", 20)
    run("train", "unet", "--init", model, "--data", "shapes", "--steps", 1, "--batch-size", 2, "--device", "cpu")
    assert (tmp_path / "runs/finetuned/unet/model/config.json").exists()
    assert not (tmp_path / "runs/finetuned/unet/model/clip.json").exists()


@pytest.mark.parametrize("preset", recipes.VISION)
def test_the_image_tower_is_given_pictures_of_its_own_size(tmp_path, monkeypatch, preset):
    """That of `sd-v1` sees 224 pixels, where the model draws 512."""
    run("data", "shapes", "--out", tmp_path, "--count", 2)
    given = []
    train_clip = "minisd.training.train_clip"
    monkeypatch.setattr(train_clip, lambda text, vision, recipe, data, *_: given.append((vision, data)))
    run("train", "clip", "--preset", preset, "--data", tmp_path, "--device", "cpu")
    vision, data = given[0]
    assert vision == recipes.VISION[preset] and data.size == vision.image_size


def test_a_recipe_starts_from_its_preset(capsys):
    with pytest.raises(SystemExit):
        run("train", "clip", "--preset", "sd-v1", "--help")
    help_text = capsys.readouterr().out
    assert "32768" in help_text.replace("_", "")
    for init in (["--init", "emoji"], ["--init=emoji"]):
        with pytest.raises(SystemExit):
            run("train", "unet", *init, "--help")
        assert f"(default: {recipes.FINETUNE.lr})" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            run("train", "vae", *init, "--help")
        assert f"(default: {recipes.FINETUNE_DECODER.steps})" in capsys.readouterr().out
    assert "the 255 other captions of its batch" in " ".join(help_text.replace("│", " ").split())


def test_an_autoencoder_is_trained_with_all_that_the_command_line_offers(tmp_path, capsys):
    shapes, out = tmp_path / "shapes", tmp_path / "run"
    run("data", "shapes", "--out", shapes, "--count", 20)
    options = ("--data", shapes, "--out", out, "--preset", "tiny", "--steps", 2, "--batch-size", 4, "--device", "cpu")
    judged = ("--disc-weight", 0.5, "--disc-num-layers", 2, "--perceptual-weight", 0.5, "--first-stage", "vq")
    assert "minisd train clip" in fails(capsys, "train", "vae", *options, *judged)  # by whose eyes?
    assert "nowhere.pth" in fails(capsys, "train", "vae", *options, *judged, "--lpips", "nowhere.pth", "lin.pth")
    run("train", "clip", *options)
    run("train", "vae", *options, *judged)
    record = json.loads((out / "vae" / "vae.json").read_text())
    assert record["first_stage"]["kind"] == "VQConfig" and record["first_stage"]["n_embed"] == 256
    assert record["recipe"]["disc_weight"] == record["recipe"]["perceptual_weight"] == 0.5
    assert "other networks" in fails(capsys, "train", "vae", *options, *judged[:-1], "kl")
    run("train", "unet", *options)
    run("txt2img", "a red circle", "--model", out / "unet" / "model", "--steps", 2, "--out", tmp_path / "a.png")
