"""The conditions: captions, classes, a mask, none, and one that is added here. Each is trained, saved and drawn from.

The pictures are real ones, those of `minisd.data.sample`.
"""

import copy
import functools
import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from minisd import PRESETS, ClassEmbedder, cli, load, save
from minisd.conditions import CONDITIONS, Captions, Condition, Inpainting, condition, condition_of, random_masks
from minisd.data import CaptionedPictures
from minisd.data.sample_pictures import SAMPLE
from minisd.training import SingleDevice, Trainer, UNetRecipe, train_unet

RECIPE = UNetRecipe(
    steps=4, batch_size=4, lr=2e-3, warmup=2, log_every=1, sample_every=4, save_every=2, ema_decay=0.9, text_dropout=0.2
)
TOLD = {"captions": "a fox", "classes": "fox", "inpainting": "a fox", "none": ""}  # and a prompt of each


@pytest.fixture(scope="module")
def engine():
    return SingleDevice("cpu")


def subset(data, chosen):
    """Only these pictures of a corpus. A run encodes all that there are before its first step."""
    data = copy.copy(data)
    data.images, data.rows = data.images[chosen], [data.rows[i] for i in chosen]
    data.captions = [data.captions[i] for i in chosen]
    return data


@pytest.fixture(scope="module")
def pictures():
    """One picture of each concept."""
    data = CaptionedPictures(SAMPLE, 32, "train", captions=False)
    concepts = data.column("concept")
    return subset(data, sorted(concepts.index(concept) for concept in set(concepts)))


@pytest.fixture(scope="module")
def few_pictures(pictures, tmp_path_factory):
    """The folder of sixteen of them, a fox among them, for the command line."""
    folder = tmp_path_factory.mktemp("pictures")
    chosen = subset(pictures, [pictures.column("concept").index("fox"), *range(15)])
    rows = [row | {"file_name": f"{i}.png"} for i, row in enumerate(chosen.rows)]
    for row, pixels in zip(rows, chosen.images, strict=True):
        Image.fromarray(pixels).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """CLIP and autoencoder of the tiny model that ships, as runs of `minisd train` leave them."""
    from minisd.checkpoint import part_to_json, save_clip, write_json, write_weights
    from minisd.clip import CLIPModel
    from minisd.training import recipes

    folder, sd = tmp_path_factory.mktemp("parts"), load("tiny", "cpu")
    tokenizer = sd.cond_stage_model.tokenizer
    save_clip(CLIPModel(sd.config.cond_stage, recipes.VISION["tiny"], tokenizer.end_token), tokenizer, folder / "clip")
    write_weights(sd.first_stage_model.state_dict(), folder / "vae/vae.safetensors")
    record = {"first_stage": part_to_json(sd.config.first_stage), "scale_factor": sd.scale_factor}
    write_json(record, folder / "vae/vae.json")
    return folder / "clip", folder / "vae"


def train(told, folder, pictures, engine, parts, recipe=RECIPE):
    column = "concept" if told == "classes" else None
    return train_unet(PRESETS["tiny"], recipe, pictures, folder, engine, *parts, condition=told, column=column)


@pytest.fixture(scope="module")
def trained(pictures, engine, parts, tmp_path_factory):
    """trained(told) -> the model of a short run, and the run's folder. Both are shared: change a copy."""

    @functools.cache
    def once(told):
        folder = tmp_path_factory.mktemp(told) / "run"
        return train(told, folder, pictures, engine, parts), folder

    return once


def lines(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("samples_per_s", "seconds")} for line in lines]


def hole():
    mask = torch.zeros(32, 32)
    mask[8:24, 8:24] = 1
    return mask


def drawn(sd, prompt, pictures):
    """A drawing of the model, whichever it is."""
    if sd.config.concat_channels:
        return sd.inpaint(prompt, pictures.batch([0]), hole(), steps=3, seed=1).pictures
    return sd.txt2img(prompt, steps=3, seed=1).pictures


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("told", TOLD)
def test_each_condition_is_trained_interrupted_saved_loaded_and_drawn_from(
    told, pictures, engine, parts, trained, tmp_path, monkeypatch
):
    whole, folder = trained(told)

    update = Trainer.update

    def break_in_step_3(trainer):
        if trainer.step == 3:  # one step after the checkpoint of step 2
            raise Interrupted
        update(trainer)

    monkeypatch.setattr(Trainer, "update", break_in_step_3)
    with pytest.raises(Interrupted):
        train(told, tmp_path / "broken", pictures, engine, parts)
    monkeypatch.undo()
    again = train(told, tmp_path / "broken", pictures, engine, parts)
    assert lines(folder) == lines(tmp_path / "broken")
    for (name, ours), theirs in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name

    loaded = load(folder / "model", "cpu")
    assert loaded.config == whole.config and condition_of(loaded.config) is CONDITIONS[told]
    assert type(loaded.cond_stage_model) is CONDITIONS[told]
    first = drawn(loaded, TOLD[told], pictures)
    assert first.isfinite().all()
    save(loaded, tmp_path / "again")
    again = drawn(load(tmp_path / "again", "cpu"), TOLD[told], pictures)  # of weights that lie elsewhere in memory
    torch.testing.assert_close(again, first, atol=1e-4, rtol=0)
    assert (folder / "samples/000004.png").exists()


@pytest.mark.parametrize("told", ["classes", "inpainting", "none"])
def test_the_losses_fall_with_every_condition(told, pictures, engine, parts, tmp_path):
    recipe = replace(RECIPE, steps=40, batch_size=16, sample_every=100, save_every=100, min_snr_gamma=None)
    train(told, tmp_path, pictures, engine, parts, recipe)
    losses = [line["loss"] for line in lines(tmp_path)]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])


def test_classes_are_learned_with_the_unet_under_their_names(pictures, parts, trained):
    sd, folder = trained("classes")
    names = sd.config.cond_stage.names
    assert names == tuple(sorted({row["concept"] for row in pictures.rows})) and len(names) > 200
    assert sd.state_dict()["cond_stage_model.embedding.weight"].shape == (len(names) + 1, 32)  # and "no class"
    assert not sd.cond_stage_model.embedding.weight.requires_grad

    # the file has the mean of the table's weights, too, and that has moved
    torch.manual_seed(RECIPE.seed)
    from minisd.training.unet import assemble

    start = assemble(PRESETS["tiny"], None, parts[1], pictures, "classes", "concept").cond_stage_model.embedding.weight
    checkpoint = torch.load(folder / "checkpoint_000004.pt", weights_only=True)
    mean = checkpoint["ema"]["cond_stage_model.embedding.weight"]
    assert torch.equal(mean, sd.cond_stage_model.embedding.weight) and not torch.equal(mean, start)
    assert not torch.equal(mean, checkpoint["networks"]["model"][0]["cond_stage_model.embedding.weight"])
    nothing = len(names)  # some prompts were dropped, so the row of "no class" has been trained as well
    assert not torch.equal(mean[nothing], start[nothing])

    loaded, number = load(folder / "model", "cpu"), names.index("fox")
    by_name, by_number = loaded.txt2img("fox", steps=2).pictures, loaded.txt2img(number, steps=2).pictures
    assert torch.equal(by_name, by_number)
    assert torch.equal(loaded.txt2img(str(number), steps=2).pictures, by_number)  # as the command line has it
    assert not torch.equal(loaded.txt2img("pig", steps=2).pictures, by_name)
    # guidance goes away from "no class", which the empty prompt stands for
    assert torch.equal(loaded.txt2img("fox", steps=2, negative_prompt="").pictures, by_name)
    assert not torch.equal(loaded.txt2img("fox", steps=2, negative_prompt="pig").pictures, by_name)
    with pytest.raises(ValueError, match=r"'foxx' is none of this model's \d+ classes, such as fox\b") as error:
        loaded.txt2img("foxx")
    assert "\n" not in str(error.value)


def test_a_class_model_is_trained_further_on_its_own_classes_alone(pictures, engine, trained, tmp_path):
    before, folder = trained("classes")
    few = subset(pictures, range(16))
    few.rows = [row | {"concept": "fox"} for row in few.rows]
    after = train_unet(load(folder / "model", "cpu"), RECIPE, few, tmp_path / "more", engine)
    fox, pig = (before.config.cond_stage.names.index(name) for name in ("fox", "pig"))
    moved = after.cond_stage_model.embedding.weight - before.cond_stage_model.embedding.weight
    assert moved[fox].abs().max() > 0 and moved[pig].abs().max() < 1e-3 * 2  # weight decay alone
    few.rows[7] = few.rows[7] | {"concept": "gryphon"}
    with pytest.raises(ValueError, match="'gryphon' is none of"):
        train_unet(load(folder / "model", "cpu"), RECIPE, few, tmp_path / "other", engine)


def test_a_run_continues_only_with_the_classes_that_it_was_started_with(pictures, engine, parts, trained, tmp_path):
    _, run = trained("classes")
    with pytest.raises(ValueError, match="condition was ClassEmbedder"):
        train_unet(PRESETS["tiny"], RECIPE, pictures, run, engine, *parts, condition="classes", column="style")
    swapped = copy.copy(pictures)
    concepts = reversed(pictures.column("concept"))
    swapped.rows = [row | {"concept": concept} for row, concept in zip(pictures.rows, concepts, strict=True)]
    with pytest.raises(ValueError, match=r"holds another run \(prompts was 1 for each picture"):
        train("classes", run, swapped, engine, parts)
    with pytest.raises(ValueError, match="captions are not read from a column"):
        train_unet(PRESETS["tiny"], RECIPE, pictures, tmp_path / "other", engine, *parts, column="style")


def test_the_folders_are_the_classes_if_no_column_is_named(pictures, engine, parts, tmp_path):
    for name, first in (("cats", 0), ("dogs", 4)):
        (tmp_path / name).mkdir()
        for i in range(first, first + 4):
            Image.fromarray(pictures.images[i]).save(tmp_path / name / f"{i}.png")
    data = CaptionedPictures(tmp_path, 32, captions=False)
    sd = train_unet(PRESETS["tiny"], RECIPE, data, tmp_path / "run", engine, None, parts[1], condition="classes")
    assert sd.config.cond_stage.names == ("cats", "dogs")


def test_an_inpainting_model_sees_the_mask_and_the_rest_of_the_picture(pictures, trained):
    sd, _ = trained("inpainting")
    assert sd.config.unet.in_channels == 9 and "cond_stage_model.transformer" in " ".join(sd.state_dict())
    x, z = pictures.batch([0, 1]), torch.zeros(2, 4, 8, 8)
    masks = torch.stack([hole()[None], 1 - hole()[None]])

    def answer(pictures, masks):
        cond = {"c_crossattn": sd.get_learned_conditioning(["", ""]), "c_concat": sd.masked_picture(pictures, masks)}
        with torch.no_grad():
            return sd.apply_model(z, torch.tensor([500, 500]), cond)

    assert not torch.equal(answer(x, masks), answer(x.flip(0), masks))
    assert not torch.equal(answer(x, masks), answer(x, masks.flip(0)))


def test_training_masks_are_rectangles_and_follow_from_the_generators_alone():
    def draw(seeds):
        return random_masks([torch.Generator().manual_seed(seed) for seed in seeds], 32)

    masks = draw(range(200))
    assert torch.equal(masks[50:60], draw(range(50, 60)))  # whatever else is in the batch
    full = masks.mean(dim=(1, 2, 3)) == 1
    assert 0.15 < full.float().mean() < 0.35
    for mask in masks[:, 0]:
        rows, columns = mask.amax(dim=1), mask.amax(dim=0)
        assert mask.sum() == rows.sum() * columns.sum() >= 8 * 8  # all that its rows and columns have in common
    assert len({tuple(mask.flatten().tolist()) for mask in masks[~full]}) > 100


def test_what_does_not_fit_is_refused(make_sd, pictures, engine, tmp_path):
    sketches = make_sd(unet=replace(PRESETS["tiny"].unet, in_channels=7))
    with pytest.raises(ValueError, match="3 channels beside the noisy latent"):
        train_unet(sketches, RECIPE, pictures, tmp_path, engine)
    assert condition_of(make_sd(unet=replace(PRESETS["tiny"].unet, in_channels=9)).config) is Inpainting
    with pytest.raises(ValueError, match='its prompt must be "" or None, not \'a fox\''):
        make_sd(unet=replace(PRESETS["tiny"].unet, context_dim=None, use_spatial_transformer=False),
                cond_stage=None).txt2img("a fox")  # fmt: skip


# --- one that somebody adds: all of it is here ------------------------------------------------------------------------


@condition("colour")
class MainColour(Condition):
    """The mean colour of the picture, written as in a web page: "#ff8800" → context [b 1 d]."""

    @dataclass(frozen=True)
    class Config:
        width: int

    def __init__(self, config):
        super().__init__()
        self.layer = nn.Linear(4, config.width)

    @classmethod
    def configure(cls, config, data, column=None):
        return replace(config, cond_stage=cls.Config(width=config.unet.context_dim))

    def prompts(self, data):
        means = [data.batch([i])[0].mean(dim=(1, 2)) for i in range(len(data))]
        return [["#" + "".join(f"{int(127.5 * (value + 1)):02x}" for value in mean)] for mean in means]

    def encode(self, prompts):
        # red, green and blue, and whether there is a colour at all: the empty prompt has none
        rows = [[int(p[k : k + 2], 16) / 255 for k in (1, 3, 5)] + [1] if p else [0, 0, 0, 0] for p in prompts]
        return self.layer(torch.tensor(rows, device=self.layer.weight.device).float())[:, None]


def test_a_condition_that_somebody_adds_is_one_class(pictures, engine, parts, tmp_path):
    recipe = replace(RECIPE, steps=30, batch_size=16, min_snr_gamma=None, sample_every=100)
    sd = train_unet(
        PRESETS["tiny"], recipe, pictures, tmp_path / "run", engine, None, parts[1], condition="colour"
    )  # fmt: skip
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert np.mean(losses[-10:]) < np.mean(losses[:5])

    loaded = load(tmp_path / "run/model", "cpu")
    assert isinstance(loaded.cond_stage_model, MainColour) and loaded.config == sd.config
    assert json.loads((tmp_path / "run/model/config.json").read_text())["cond_stage"]["kind"] == "MainColour.Config"
    red, blue = (loaded.txt2img(colour, steps=3, seed=0).pictures for colour in ("#ff0000", "#0000ff"))
    assert red.isfinite().all() and not torch.equal(red, blue)
    more = train_unet(loaded, replace(recipe, steps=2), pictures, tmp_path / "more", engine)
    assert not torch.equal(more.cond_stage_model.layer.weight, sd.cond_stage_model.layer.weight)
    with pytest.raises(ValueError, match=r"CompVis's layout has no condition like MainColour"):
        save(sd, tmp_path / "model.ckpt")


@condition("light")
class Light(Captions):
    """The caption, and how light the picture is at each pixel of the latent: one channel beside the latent."""

    @classmethod
    def fits(cls, config):
        return super().fits(config) and config.concat_channels == 1

    @classmethod
    def configure(cls, config, data, column=None):
        return replace(config, unet=replace(config.unet, in_channels=config.first_stage.embed_dim + 1))

    @staticmethod
    def concat_channels(config):
        return 1

    def maps(self, sd, data, batch):
        return F.interpolate(data.batch(batch.indices).mean(dim=1, keepdim=True), sd.latent_shape()[1:])


def test_a_condition_that_somebody_adds_may_be_told_by_a_map(pictures, engine, parts, few_pictures, tmp_path, capsys):
    train("light", tmp_path / "run", subset(pictures, range(16)), engine, parts)
    more = ["--init", str(tmp_path / "run/model"), "--data", str(few_pictures), "--out", str(tmp_path / "more")]
    cli.main(["train", "unet", *more, "--steps", "1", "--batch-size", "4", "--device", "cpu"])
    assert "try `minisd txt2img" in capsys.readouterr().out, "a map need not be a mask"

    sd = load(tmp_path / "more/unet/model", "cpu")
    assert type(sd.cond_stage_model) is Light and condition_of(PRESETS["tiny"]) is Captions
    light, dark = (sd.txt2img("a fox", steps=2, c_concat=torch.full((1, 1, 8, 8), value)) for value in (1.0, -1.0))
    assert not torch.equal(light.pictures, dark.pictures)


def test_a_model_that_names_a_condition_that_is_not_there_is_refused(tmp_path):
    save(load("tiny", "cpu"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["cond_stage"] = {"kind": "Smell.Config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not describe a model of minisd .*Smell"):
        load(tmp_path, "cpu")


# --- on the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", ["classes", "inpainting", "none"])
def test_a_model_is_trained_by_one_command_and_drawn_from_by_another(
    told, parts, few_pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(parts[1], "run/vae")
    if told == "inpainting":
        shutil.copytree(parts[0], "run/clip")
    data = ["--data", str(few_pictures)]
    options = ["--preset", "tiny", *data, "--out", "run", "--steps", "2", "--batch-size", "4"]
    column = ["--class-column", "concept"] if told == "classes" else []
    cli.main(["train", "unet", *options, "--condition", told, *column, "--device", "cpu"])
    said = capsys.readouterr().out
    assert f"try `minisd {'inpaint' if told == 'inpainting' else 'txt2img'}" in said
    model = ["--model", "run/unet/model", "--steps", "2", "--num-images", "1", "--out", "drawn.png"]
    if told == "inpainting":
        Image.new("RGB", (32, 32), "red").save("red.png")
        Image.fromarray((255 * hole()).byte().numpy()).save("mask.png")
        cli.main(["inpaint", TOLD[told], "red.png", "mask.png", *model])
    else:
        cli.main(["txt2img", TOLD[told], *model])
    assert Image.open("drawn.png").size == (128, 128)
    # and further, as it is
    more = ["--init", "run/unet/model", *data, "--out", "more", "--steps", "1", "--batch-size", "4"]
    cli.main(["train", "unet", *more, "--device", "cpu"])
    assert load("more/unet/model", "cpu").config == load("run/unet/model", "cpu").config
    with pytest.raises(SystemExit, match="leave --condition, --class-column and --parameterization out"):
        cli.main(["train", "unet", *more, "--condition", told])


def test_a_class_by_its_number_is_drawn_by_a_model_whose_classes_have_no_names():
    table = ClassEmbedder()
    assert table.number(3) == table.number("3") == 3 and table.number("") == 1000
    for wrong in ("fox", 1001, -1, "-1"):
        with pytest.raises(ValueError, match="numbers from 0 to 1000, not"):
            table.number(wrong)
