"""The three loops, and what they share: exact resuming, the mean of the weights, the order of the data."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from minisd import PRESETS, AutoencoderKL, load
from minisd.checkpoint import load_clip
from minisd.data import CaptionedPictures, draw_shapes
from minisd.training import (
    EMA,
    CLIPRecipe,
    Recipe,
    SingleDevice,
    Trainer,
    UNetRecipe,
    VAERecipe,
    recipes,
    train_clip,
    train_unet,
    train_vae,
)

SHORT = {"batch_size": 4, "log_every": 1, "sample_every": 100, "save_every": 2, "warmup": 2}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    draw_shapes(folder, count=40, size=32)
    return CaptionedPictures(folder, size=32)


@pytest.fixture(scope="module")
def engine():
    return SingleDevice("cpu")


@pytest.fixture(scope="module")
def parts(shapes, engine, tmp_path_factory):
    """Folders of a CLIP and a VAE that were trained for three steps."""
    folder, config = tmp_path_factory.mktemp("run"), PRESETS["tiny"]
    train_clip(config.cond_stage, recipes.VISION["tiny"], CLIPRecipe(steps=3, **SHORT), shapes, folder / "clip", engine)
    train_vae(config.first_stage, VAERecipe(steps=3, **SHORT), shapes, folder / "vae", engine)
    return folder / "clip", folder / "vae"


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["loss"] for line in log(folder)]


class Interrupted(Exception):
    pass


def test_a_run_that_was_interrupted_gives_the_losses_of_one_that_was_not(shapes, engine, parts, tmp_path, monkeypatch):
    recipe = UNetRecipe(steps=7, **SHORT)
    train_unet(PRESETS["tiny"], recipe, shapes, tmp_path / "whole", engine, *parts)

    update = Trainer.update

    def break_in_step_5(trainer, loss, **figures):
        if trainer.step == 5:  # one step after the checkpoint of step 4
            raise Interrupted
        update(trainer, loss, **figures)

    monkeypatch.setattr(Trainer, "update", break_in_step_5)
    with pytest.raises(Interrupted):
        train_unet(PRESETS["tiny"], recipe, shapes, tmp_path / "broken", engine, *parts)
    monkeypatch.undo()
    sd = train_unet(PRESETS["tiny"], recipe, shapes, tmp_path / "broken", engine, *parts)

    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert [line["step"] for line in log(tmp_path / "broken")] == [1, 2, 3, 4, 5, 6, 7]
    other = load(tmp_path / "whole" / "model", "cpu")
    for (name, ours), theirs in zip(sd.half().state_dict().items(), other.half().state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_ctrl_c_finishes_the_step_and_the_next_run_goes_on(tmp_path):
    program = textwrap.dedent(
        """
        import sys, time, torch
        from minisd.training import Recipe, SingleDevice, Trainer
        torch.manual_seed(0)
        recipe = Recipe(steps=10_000, batch_size=2, log_every=1, save_every=10_000)
        trainer = Trainer(torch.nn.Linear(2, 1), recipe, sys.argv[1], SingleDevice("cpu"))
        print("from", trainer.step, flush=True)
        for step in trainer.steps():
            trainer.update(trainer.model(torch.randn(2, 2, generator=trainer.generator())).square().mean())
            time.sleep(0.02)
        """
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        began = int(process.stdout.readline().split()[1])
        while not (tmp_path / "log.jsonl").exists() or len(log(tmp_path)) < began + 3:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert "goes on from there" in errors
    assert began >= 3  # the second run began where the first was stopped
    steps = [line["step"] for line in log(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))  # and no step was lost or made twice


def test_a_checkpoint_is_never_half_written(tmp_path, engine, monkeypatch):
    trainer = Trainer(nn.Linear(2, 1), Recipe(steps=1), tmp_path, engine)
    trainer.save()
    before = trainer.checkpoint.read_bytes()

    def full_disk(state, path):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="the checkpoint before it is untouched"):
        trainer.save()
    assert trainer.checkpoint.read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_another_recipe_does_not_go_on_with_this_run(tmp_path, engine):
    recipe = Recipe(steps=5)
    Trainer(nn.Linear(2, 1), recipe, tmp_path, engine).save()
    with pytest.raises(ValueError, match="lr was 0.0001, now 0.1"):
        Trainer(nn.Linear(2, 1), replace(recipe, lr=0.1), tmp_path, engine)
    Trainer(nn.Linear(2, 1), replace(recipe, save_every=1), tmp_path, engine)  # how often to save may change


def test_a_broken_checkpoint_is_named(tmp_path, engine):
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="delete it to start again"):
        Trainer(nn.Linear(2, 1), Recipe(), tmp_path, engine)


def test_a_loss_that_is_no_number_stops_the_run_before_it_touches_the_weights(tmp_path, engine):
    trainer = Trainer(nn.Linear(2, 1), Recipe(steps=3), tmp_path, engine)
    before = trainer.model.weight.clone()
    with pytest.raises(FloatingPointError, match="the loss of step 0 is nan"):
        for _ in trainer.steps():
            trainer.update(trainer.model(torch.full((1, 2), torch.nan)).mean())
    assert torch.equal(before, trainer.model.weight)


def test_an_epoch_visits_every_sample_once(tmp_path, engine):
    trainer = Trainer(nn.Linear(2, 1), Recipe(steps=9, batch_size=4), tmp_path, engine)
    seen = [i for trainer.step in range(9) for i in trainer.batch(12).tolist()]
    epochs = [seen[:12], seen[12:24], seen[24:]]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_two_processes_share_what_one_would_have_drawn(tmp_path):
    engine = SingleDevice("cpu")
    trainer = Trainer(nn.Linear(2, 1), Recipe(batch_size=8), tmp_path, engine)
    whole = trainer.batch(100)
    shares = []
    for rank in range(2):
        engine.process_index, engine.num_processes = rank, 2
        shares.append(trainer.batch(100))
    assert torch.equal(torch.cat(shares), whole) and len(shares[0]) == 4


def test_ema_is_the_formula_of_compvis(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema, expected = EMA(model, decay=0.3), 0.0
    for n in range(1, 8):
        nn.init.constant_(model.weight, n)
        ema.update(model)
        decay = min(0.3, (1 + n) / (10 + n))
        expected -= (1 - decay) * (expected - n)
        assert ema.weights["weight"].item() == pytest.approx(expected, rel=1e-5)
    with ema.applied_to(model):
        assert model.weight.item() == pytest.approx(expected, rel=1e-5)
    assert model.weight.item() == 7


def test_the_learning_rate_warms_up_and_falls_to_zero():
    recipe = Recipe(steps=100, warmup=10, lr=1.0)
    rates = [recipe.lr_at(step) for step in range(100)]
    assert np.allclose(rates[:10], np.arange(1, 11) / 10)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False)) and rates[-1] < 0.001
    assert replace(recipe, decay=False).lr_at(99) == 1.0


def test_the_scale_factor_gives_latents_of_unit_variance(shapes, engine, parts):
    from minisd.training.unet import assemble

    sd = assemble(PRESETS["tiny"], *parts)
    posterior = sd.encode_first_stage(shapes.batch(range(len(shapes))))
    z = sd.get_first_stage_encoding(posterior, torch.Generator().manual_seed(0))
    assert z.std().item() == pytest.approx(1.0, abs=0.05)


def test_training_learns(shapes, engine, tmp_path):
    recipe = VAERecipe(steps=30, lr=2e-3, **SHORT)
    train_vae(PRESETS["tiny"].first_stage, recipe, shapes, tmp_path / "vae", engine)
    history = losses(tmp_path / "vae")
    assert np.mean(history[-5:]) < 0.7 * np.mean(history[:5])
    assert list((tmp_path / "vae" / "samples").iterdir())


@pytest.mark.parametrize("power", [1, 2])
def test_an_autoencoder_lowers_the_power_of_the_error_that_its_recipe_says(
    shapes, engine, tmp_path, monkeypatch, power
):
    seen, forward = [], AutoencoderKL.forward

    def watched(self, x, **options):
        reconstruction, posterior = forward(self, x, **options)
        seen.append((x - reconstruction).abs())
        return reconstruction, posterior

    monkeypatch.setattr(AutoencoderKL, "forward", watched)
    train_vae(PRESETS["tiny"].first_stage, VAERecipe(steps=1, rec_power=power, **SHORT), shapes, tmp_path, engine)
    assert log(tmp_path)[0]["rec"] == pytest.approx((seen[0] ** power).mean().item(), rel=1e-5)


def test_a_unet_run_leaves_a_model_that_draws(shapes, engine, parts, tmp_path):
    recipe = UNetRecipe(steps=2, **SHORT)
    train_unet(PRESETS["tiny"], recipe, shapes, tmp_path, engine, *parts, keep_at=(1,))
    for path in (tmp_path / "model", tmp_path / "model" / "after_000001_steps.safetensors"):
        images = load(path, "cpu").txt2img("a red circle", steps=2, num_images=2).images
        assert [image.size for image in images] == [(32, 32)] * 2
    clip, tokenizer = load_clip(tmp_path / "model")  # the text tower comes from the model's own file
    theirs, _ = load_clip(parts[0])
    ids = tokenizer(["a red circle"], clip.text_config.max_length).ids
    assert torch.equal(clip.get_text_features(ids), theirs.get_text_features(ids))


def test_a_recipe_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Recipe(batch_size=0)
