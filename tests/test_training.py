"""The three loops, and what they share: one run, whatever kills it and however many processes it has."""

import copy
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import minisd.training.unet as unet_training
from minisd import PRESETS, AutoencoderKL, LatentDiffusion, cli, load
from minisd.checkpoint import load_clip
from minisd.data import CaptionedPictures, Mixture, draw_shapes
from minisd.training import (
    EMA,
    CLIPRecipe,
    Recipe,
    SingleDevice,
    Trainer,
    UNetRecipe,
    VAERecipe,
    make_engine,
    recipes,
    run_folder,
    train_clip,
    train_unet,
    train_vae,
)
from minisd.training.run_folder import RunFolder
from minisd.training.unet import assemble, by_time, encode_prompts
from minisd.training.vae import encode_all, measure_scale_factor

ROOT = Path(__file__).parents[1]
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
    """The lines of a log, without the times, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("samples_per_s", "seconds")} for line in lines]


def losses(folder):
    return [line["loss"] for line in log(folder)]


def take_step(trainer, n=16, broken=None):
    """A step of a linear model on the numbers of its samples; the loss of the sample `broken` is no number."""
    for batch in trainer.batches(n):
        x = torch.stack([batch.indices / n, batch.randn(1)[:, 0]], dim=1)
        loss = trainer.model(x).square().mean()
        trainer.backward(loss * torch.nan if broken in batch.indices.tolist() else loss)
    trainer.update()


class Interrupted(Exception):
    pass


@pytest.fixture
def signals_interrupt():
    """What a signal does where a run does not wait with it; by default, it would end the tests."""

    def interrupt(signum, frame):
        raise Interrupted(signal.Signals(signum).name)

    before = {how: signal.signal(how, interrupt) for how in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield interrupt
    for how, handler in before.items():
        signal.signal(how, handler)


# --- one run, however often it is stopped -----------------------------------------------------------------------------


def test_a_run_that_was_interrupted_gives_the_losses_of_one_that_was_not(shapes, engine, parts, tmp_path, monkeypatch):
    recipe = UNetRecipe(steps=7, **SHORT)
    train_unet(PRESETS["tiny"], recipe, shapes, tmp_path / "whole", engine, *parts)

    update = Trainer.update

    def break_in_step_5(trainer):
        if trainer.step == 5:  # one step after the checkpoint of step 4
            raise Interrupted
        update(trainer)

    monkeypatch.setattr(Trainer, "update", break_in_step_5)
    with pytest.raises(Interrupted):
        train_unet(PRESETS["tiny"], recipe, shapes, tmp_path / "broken", engine, *parts)
    monkeypatch.undo()
    sd = train_unet(PRESETS["tiny"], recipe, shapes, tmp_path / "broken", engine, *parts)

    assert log(tmp_path / "whole") == log(tmp_path / "broken")
    assert [line["step"] for line in log(tmp_path / "broken")] == [1, 2, 3, 4, 5, 6, 7]
    other = load(tmp_path / "whole" / "model", "cpu")
    for (name, ours), theirs in zip(sd.half().state_dict().items(), other.half().state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_ctrl_c_sigterm_and_sighup_finish_the_step_and_the_next_run_goes_on(tmp_path):
    program = textwrap.dedent(
        """
        import os, signal, sys, time, torch
        import torch._dynamo  # the optimiser would import it, in each run
        from minisd.training import Recipe, SingleDevice, Trainer

        def train():
            torch.manual_seed(0)
            recipe = Recipe(steps=10_000, batch_size=2, log_every=1, save_every=10_000)
            trainer = Trainer(torch.nn.Linear(2, 1), recipe, sys.argv[1], SingleDevice("cpu"))
            print(os.getpid(), trainer.step, flush=True)
            for step in trainer.steps():
                for batch in trainer.batches(8):
                    trainer.backward(trainer.model(batch.randn(2)).square().mean())
                trainer.update()
                time.sleep(0.02)

        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for _ in signals:  # each run is a fork of this process, which has imported everything
            child = os.fork()
            if child == 0:
                for which in signals:
                    signal.signal(which, signal.SIG_DFL)  # under nohup, SIGHUP would be ignored here, too
                try:
                    train()
                except KeyboardInterrupt as stop:
                    print(stop, flush=True)
                os._exit(0)
            os.waitpid(child, 0)
        """
    )
    command, environment = [sys.executable, "-c", program, str(tmp_path)], os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for how in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            child, began = map(int, process.stdout.readline().split())
            while not (tmp_path / "log.jsonl").exists() or len(log(tmp_path)) < began + 3:
                assert process.poll() is None
                time.sleep(0.02)
            os.kill(child, how)
            assert "goes on from there" in process.stdout.readline()
    assert process.returncode == 0
    assert began >= 6  # each run began where the one before it was stopped
    steps = [line["step"] for line in log(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))  # and no step was lost or made twice


def test_a_run_that_is_killed_at_any_moment_ends_as_one_that_was_not(shapes, tmp_path):
    program, environment = Path(__file__).with_name("killed_runs.py"), os.environ | {"PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # threads do not survive a fork
    command = [sys.executable, str(program), str(shapes.folder), str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert process.returncode == 0, process.stderr[-4000:]
    assert int(process.stdout) >= 4
    assert log(tmp_path / "whole") == log(tmp_path / "killed")
    assert [line["step"] for line in log(tmp_path / "killed")] == list(range(1, 31))
    whole, killed = ((tmp_path / name / "clip.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed


@pytest.fixture(scope="module")
def killed_while_writing(shapes, parts, tmp_path_factory):
    """The folder with the runs of that program, and the names that it printed for each network."""
    folder = tmp_path_factory.mktemp("killed")
    program, environment = Path(__file__).with_name("killed_while_writing.py"), os.environ | {"PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # threads do not survive a fork
    (folder / "parts").symlink_to(parts[0].parent)
    command = [sys.executable, str(program), str(shapes.folder), str(folder)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert process.returncode == 0, process.stderr[-4000:]
    return folder, [line.split() for line in process.stdout.splitlines()]


@pytest.mark.parametrize("network", ["clip", "vae", "unet"])
def test_a_run_that_is_killed_at_anything_it_writes_ends_as_one_that_was_not(network, killed_while_writing):
    folder, killed_at = killed_while_writing
    checkpoints = [f"checkpoint_{step:06d}.pt" for step in (1, 2)]
    model = {
        # all of a CLIP is whole in clip.json.to_be_moved, before its files get their places one by one; the same for
        # an autoencoder
        "clip": ["clip.json.to_be_moved", "clip.json", "clip.safetensors", "tokenizer/merges.txt"],
        "vae": ["vae.json.to_be_moved", "vae.json", "vae.safetensors"],
        # inside model.unfinished, before the whole of it is moved to model, where the UNet after step 1 is already
        "unet": [
            "model.unfinished/config.json", "model.unfinished/model.safetensors", "model.to_be_moved",
            "model/config.json", "model/model.safetensors", "model/tokenizer/merges.txt", "model/clip.json",
            "model/clip.safetensors",
        ],
    }  # fmt: skip
    expected = [*checkpoints, *model[network]]
    assert [name for which, name in killed_at if which == network and name in expected] == expected

    runs = folder / network / "whole", folder / network / "killed"
    assert log(runs[0]) == log(runs[1])
    whole, killed = (
        {p.relative_to(run): p for p in sorted(run.rglob("*")) if p.is_file() and p.suffix not in (".pt", ".jsonl")}
        for run in runs
    )
    assert list(whole) == list(killed)  # nothing is missing, and nothing unfinished is left
    for name in whole:
        assert whole[name].read_bytes() == killed[name].read_bytes(), name


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_asked_to_stop_while_it_writes_its_model_writes_it_to_the_end(
    how, shapes, engine, parts, tmp_path, monkeypatch, signals_interrupt
):
    save = run_folder.save

    def ask_to_stop_and_save(*arguments, **options):
        os.kill(os.getpid(), how)
        save(*arguments, **options)
        os.kill(os.getpid(), how)  # and again: two within a second count as one

    monkeypatch.setattr(run_folder, "save", ask_to_stop_and_save)
    with pytest.raises(KeyboardInterrupt, match="finished, and its model is written"):
        train_unet(PRESETS["tiny"], UNetRecipe(steps=1, **SHORT), shapes, tmp_path, engine, *parts)
    assert signal.getsignal(how) == signals_interrupt
    load(tmp_path / "model", "cpu")
    load_clip(tmp_path / "model")  # which is written after what the signals came in
    assert not list(tmp_path.rglob("*.unfinished"))


def test_a_signal_in_the_last_step_ends_the_process_once_the_model_is_written(tmp_path, engine, signals_interrupt):
    trainer, written = Trainer(nn.Linear(2, 1), Recipe(steps=1, batch_size=4), tmp_path, engine), False
    for _ in trainer.steps():
        take_step(trainer)
        os.kill(os.getpid(), signal.SIGTERM)  # after the processes have agreed whether to stop
    with pytest.raises(KeyboardInterrupt), trainer.finishing():
        written = True
    assert written


def test_under_nohup_a_run_outlives_its_terminal(tmp_path, engine, signals_interrupt):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    trainer = Trainer(nn.Linear(2, 1), Recipe(steps=3, batch_size=4), tmp_path, engine)
    for _ in trainer.steps():
        os.kill(os.getpid(), signal.SIGHUP)
        take_step(trainer)
    assert trainer.step == 3


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, engine):
    trainer = Trainer(nn.Linear(2, 1), Recipe(steps=9, batch_size=4), tmp_path, engine)
    steps = iter(trainer.steps())
    next(steps)
    take_step(trainer)
    trainer.save()
    before = (tmp_path / "checkpoint_000000.pt").read_bytes()
    next(steps)
    take_step(trainer)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))  # no file may grow past this
        with pytest.raises(OSError, match="could not write .*_000001.pt .*; checkpoint_000000.pt is untouched"):
            trainer.save()
        (tmp_path / "log.jsonl").write_text("x" * (len(before) // 2))
        trainer.step = trainer.recipe.log_every - 1
        with pytest.raises(OSError, match="could not write .*log.jsonl .*; the run stands at its last checkpoint"):
            take_step(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "checkpoint_000000.pt").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_000000.pt", "log.jsonl"]


def test_a_damaged_checkpoint_is_skipped(tmp_path, engine):
    recipe = Recipe(steps=6, batch_size=4, save_every=2, log_every=1, keep_checkpoints=3)
    run = tmp_path / "run"

    def go_on():
        trainer = Trainer(nn.Linear(2, 1), recipe, run, engine)
        began = trainer.step
        for _ in trainer.steps():
            take_step(trainer)
        return began, trainer.model.weight

    torch.manual_seed(0)
    _, expected = go_on()
    lines = log(run)
    content = bytearray((run / "checkpoint_000006.pt").read_bytes())
    place = content.index(expected.detach().numpy().tobytes())
    content[place] ^= 1  # one bit, which torch.load would not miss
    (run / "checkpoint_000006.pt").write_bytes(content)
    (run / "checkpoint_000004.pt").write_bytes(b"half of it")
    (run / "log.jsonl").open("a").write('{"step": 3, "lo')
    (run / "checkpoint_000007.pt.unfinished").write_bytes(b"left by a process that was killed")
    (run / "model.unfinished" / "tokenizer").mkdir(parents=True)  # as well
    (run / "model.unfinished" / "config.json").write_text("{")

    with pytest.warns(UserWarning, match="broken .* going on from checkpoint_000002.pt"):
        began, weight = go_on()
    assert began == 2 and torch.equal(weight, expected) and log(run) == lines
    assert not list(run.glob("*.unfinished"))

    for path in run.glob("checkpoint_*.pt"):
        path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="delete what is broken to start again"):
        go_on()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_what_only_has_the_name_of_a_file_of_the_run_is_not_read(tmp_path, engine):
    """Nothing waits for a pipe, and a name without a number is no checkpoint."""
    recipe, run = Recipe(steps=2, batch_size=4, save_every=1, log_every=1), tmp_path / "run"
    trainer = Trainer(nn.Linear(2, 1), recipe, run, engine)
    for step in trainer.steps():
        take_step(trainer)
        if step == 1:
            break
    os.mkfifo(run / "checkpoint_000008.pt")
    (run / "checkpoint_000009.pt").mkdir()
    (run / "checkpoint_best.pt").write_bytes(b"somebody's own")
    torch.save({"step": 7, "ema": {}}, run / "checkpoint_000007.pt")
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": "two"}\n{"step": Infinity}\n[]\n')
    with pytest.warns(UserWarning, match="000007.pt is broken .it is another kind of file.: going on from .*000001.pt"):
        assert Trainer(nn.Linear(2, 1), recipe, run, engine).step == 1
    assert [line["step"] for line in log(run)] == [1]
    (run / "log.jsonl").unlink()
    os.mkfifo(run / "log.jsonl")
    with pytest.raises(OSError, match="log.jsonl is not a file: remove it, or choose another folder"):
        Trainer(nn.Linear(2, 1), recipe, run, engine)


def test_only_so_many_checkpoints_are_kept(tmp_path, engine):
    trainer = Trainer(nn.Linear(2, 1), Recipe(steps=7, batch_size=4, save_every=2), tmp_path, engine)
    for _ in trainer.steps():
        take_step(trainer)
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["checkpoint_000006.pt", "checkpoint_000007.pt"]


def test_a_run_that_died_before_its_first_checkpoint_logs_no_step_twice(tmp_path, engine):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss"')
    trainer = Trainer(nn.Linear(2, 1), Recipe(steps=2, batch_size=4, log_every=1), tmp_path, engine)
    for _ in trainer.steps():
        take_step(trainer)
    assert [line["step"] for line in log(tmp_path)] == [1, 2]


def test_two_runs_do_not_share_a_folder(tmp_path, engine):
    program = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", program + "; print(flush=True); input()", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process trains in"):
            Trainer(nn.Linear(2, 1), Recipe(), tmp_path, engine)
        other.kill()  # -9, and yet the folder is free at once
    Trainer(nn.Linear(2, 1), Recipe(), tmp_path, engine)
    refused = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert "BlockingIOError" in refused.stderr


@pytest.mark.parametrize("network", ["clip", "vae", "unet", "decoder"])
def test_a_run_holds_its_folder_until_its_model_is_written(network, shapes, engine, parts, tmp_path, monkeypatch):
    config, held = PRESETS["tiny"], []
    rename = os.replace

    def look_and_rename(source, target):
        held.append(not free(tmp_path))
        rename(source, target)

    monkeypatch.setattr(os, "replace", look_and_rename)
    if network == "clip":
        recipe = CLIPRecipe(steps=1, **SHORT)
        train_clip(config.cond_stage, recipes.VISION["tiny"], recipe, shapes, tmp_path, engine)
    elif network == "vae":
        train_vae(config.first_stage, VAERecipe(steps=1, **SHORT), shapes, tmp_path, engine)
    elif network == "unet":
        train_unet(config, UNetRecipe(steps=1, **SHORT), shapes, tmp_path, engine, *parts)
    else:
        recipe = VAERecipe(steps=1, decoder_only=True, **SHORT)
        train_vae(load("tiny", "cpu"), recipe, shapes, tmp_path, engine)
    assert len(held) >= 3 and all(held)
    assert free(tmp_path)


def free(folder):
    """Whether another process could train in this folder."""
    handle = os.open(folder, os.O_RDONLY)  # a handle of its own has no part in the lock of this process
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(handle)


@pytest.mark.parametrize("how", ["break", "an error", "an iterator that is dropped", "a signal"])
def test_a_loop_that_is_left_gives_back_its_folder_and_ctrl_c(how, tmp_path, engine, signals_interrupt):
    trainer = Trainer(nn.Linear(2, 1), Recipe(steps=5, batch_size=4), tmp_path, engine)
    steps = trainer.steps()  # as in a notebook, where a variable keeps it
    if how == "break":
        for _ in steps:
            assert not free(tmp_path) and signal.getsignal(signal.SIGINT) != signals_interrupt
            break
    elif how == "an error":
        with pytest.raises(ZeroDivisionError):
            for _ in steps:
                take_step(trainer)
                1 / 0  # noqa: B018
    elif how == "a signal":
        with pytest.raises(KeyboardInterrupt, match="stopped after step 1"):
            for _ in steps:
                os.kill(os.getpid(), signal.SIGINT)
                take_step(trainer)
    else:
        iterator = iter(steps)
        next(iterator)
        del iterator
    assert free(tmp_path) and signal.getsignal(signal.SIGINT) == signals_interrupt

    for _ in trainer.steps():  # and can be entered again
        assert not free(tmp_path)
        take_step(trainer)
    assert trainer.step == 5


def test_a_training_that_ends_before_its_first_step_gives_back_its_folder(shapes, engine, parts, tmp_path, monkeypatch):
    monkeypatch.setattr("minisd.training.unet.encode_prompts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_unet(PRESETS["tiny"], UNetRecipe(steps=1, **SHORT), shapes, tmp_path, engine, *parts)
    assert free(tmp_path)


def test_too_little_memory_says_what_to_lower(shapes, engine, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "backward", lambda *_, **figures: torch.empty(10**15))
    with pytest.raises(torch.OutOfMemoryError, match="not enough memory: take a smaller batch_size"):
        train_unet(PRESETS["tiny"], UNetRecipe(steps=1, **SHORT), shapes, tmp_path, engine, *parts)


def test_no_default_of_pytorch_changes_a_training(shapes, engine, tmp_path):
    recipe, config = CLIPRecipe(steps=1, **SHORT), PRESETS["tiny"].cond_stage
    train_clip(config, recipes.VISION["tiny"], recipe, shapes, tmp_path / "usual", engine)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        train_clip(config, recipes.VISION["tiny"], recipe, shapes, tmp_path / "other", engine)
        assert torch.get_default_dtype() == torch.float64 and torch.get_default_device().type == "meta"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert log(tmp_path / "usual") == log(tmp_path / "other")


def test_a_recipe_with_numbers_of_numpy_is_gone_on_with(tmp_path, engine):
    recipe = Recipe(steps=3, batch_size=4, lr=np.float64(0.5))  # which is a float, too
    Trainer(nn.Linear(2, 1), recipe, tmp_path, engine).save()
    Trainer(nn.Linear(2, 1), Recipe(steps=3, batch_size=4, lr=0.5), tmp_path, engine)


@pytest.mark.parametrize("of", ["ema", "the other networks"])
def test_weights_that_are_no_numbers_are_not_saved(of, tmp_path, engine):
    others = {"critic": nn.Linear(1, 1)}
    trainer = Trainer(nn.Linear(2, 1), Recipe(steps=1, batch_size=4), tmp_path, engine, others)
    weights = trainer.ema.weights["weight"] if of == "ema" else others["critic"].weight.data
    with pytest.raises(FloatingPointError, match="weight of the .* after step 1, which is not saved, is NaN or infin"):
        for _ in trainer.steps():
            take_step(trainer)
            weights[0, 0] = torch.inf
    assert not trainer.folder.checkpoints() and free(tmp_path)


def test_a_checkpoint_whose_ema_is_no_number_is_passed_over(tmp_path, engine):
    recipe = Recipe(steps=4, batch_size=4, save_every=2)
    trainer = Trainer(nn.Linear(2, 1), recipe, tmp_path, engine)
    for _ in trainer.steps():
        take_step(trainer)
    expected = trainer.ema.weights["weight"].clone()
    state = trainer.folder.load()
    state["ema"]["weight"] = torch.full_like(expected, torch.nan)
    trainer.folder.save(4, state)
    with pytest.warns(UserWarning, match="000004.pt is broken .weight of its EMA is NaN .* going on from .*000002.pt"):
        again = Trainer(nn.Linear(2, 1), recipe, tmp_path, engine)
    for _ in again.steps():
        take_step(again)
    assert torch.equal(again.ema.weights["weight"], expected)


def test_a_run_does_not_continue_with_another_recipe(tmp_path, engine):
    recipe = Recipe(steps=5)
    Trainer(nn.Linear(2, 1), recipe, tmp_path, engine).save()
    with pytest.raises(ValueError, match="lr was 0.0001, now 0.1"):
        Trainer(nn.Linear(2, 1), replace(recipe, lr=0.1), tmp_path, engine)
    for network, others in ((nn.Linear(3, 1), {}), (nn.Linear(2, 1), {"critic": nn.Linear(1, 1)})):
        with pytest.raises(ValueError, match="holds a run of other networks"):
            Trainer(network, recipe, tmp_path, engine, others)
    Trainer(nn.Linear(2, 1), replace(recipe, save_every=1), tmp_path, engine)  # how often to save may change


def test_a_run_continues_only_with_the_data_that_it_was_started_with(shapes, engine, parts, tmp_path):
    draw_shapes(tmp_path / "others", count=30, size=32)
    others, (clip, vae), config = CaptionedPictures(tmp_path / "others", size=32), parts, PRESETS["tiny"]
    refused = pytest.raises(ValueError, match=r"data was 40 pictures of 32x32 \(.*\), now 30 .*choose another folder")
    with refused:
        train_clip(config.cond_stage, recipes.VISION["tiny"], CLIPRecipe(steps=3, **SHORT), others, clip, engine)
    with refused:
        train_vae(config.first_stage, VAERecipe(steps=3, **SHORT), others, vae, engine)
    train_unet(config, UNetRecipe(steps=1, **SHORT), shapes, tmp_path / "unet", engine, *parts)
    with refused:
        train_unet(config, UNetRecipe(steps=1, **SHORT), others, tmp_path / "unet", engine, *parts)


def test_a_run_continues_only_with_the_templates_that_it_was_started_with(shapes, engine, parts, tmp_path):
    (clip, _), config, recipe = parts, PRESETS["tiny"], UNetRecipe(steps=1, **SHORT)
    tower = CLIPRecipe(steps=3, **SHORT)
    train_unet(config, recipe, shapes, tmp_path, engine, *parts)
    others = copy.copy(shapes)
    others.templates = ("a drawing of {}",)
    with pytest.raises(ValueError, match=r"holds another run \(templates was .*, now \('a drawing of {}',\)\)"):
        train_clip(config.cond_stage, recipes.VISION["tiny"], tower, others, clip, engine)
    with pytest.raises(ValueError, match=r"holds another run \(prompts was .*, now 1 for each picture"):
        train_unet(config, recipe, others, tmp_path, engine, *parts)
    # a checkpoint of an older version says nothing of them, so its run goes on
    path = RunFolder(tmp_path).checkpoints()[-1]
    state = torch.load(path, weights_only=True)
    del state["given"]["prompts"]
    torch.save(state, path)
    train_unet(config, recipe, others, tmp_path, engine, *parts)


def test_a_unet_continues_only_with_the_same_other_networks_and_the_same_target(shapes, engine, parts, tmp_path):
    (clip, vae), config, recipe = parts, PRESETS["tiny"], UNetRecipe(steps=1, **SHORT)
    train_unet(config, recipe, shapes, tmp_path / "unet", engine, *parts)
    train_vae(config.first_stage, VAERecipe(steps=1, **SHORT), shapes, tmp_path / "vae", engine)
    tower = CLIPRecipe(steps=1, **SHORT)
    train_clip(config.cond_stage, recipes.VISION["tiny"], tower, shapes, tmp_path / "clip", engine)
    for what, changed, folders in (
        ("text tower was FrozenCLIPEmbedder", config, (tmp_path / "clip", vae)),
        ("autoencoder was AutoencoderKL", config, (clip, tmp_path / "vae")),
        ("parameterization was eps, now v", replace(config, parameterization="v"), parts),
    ):
        with pytest.raises(ValueError, match=rf"holds another run \({what}"):
            train_unet(changed, recipe, shapes, tmp_path / "unet", engine, *folders)


def test_a_second_network_is_stepped_and_saved_beside_the_first(tmp_path, engine):
    start = torch.tensor([[0.5]])

    def run(folder, stop_at):
        torch.manual_seed(0)
        critic = nn.Linear(1, 1)
        critic.load_state_dict({"weight": start, "bias": torch.zeros(1)})
        recipe = Recipe(steps=6, batch_size=4, save_every=2, log_every=1, lr=0.1)
        trainer = Trainer(nn.Linear(2, 1), recipe, folder, engine, others={"critic": critic})
        critic = trainer.models["critic"]
        for _ in trainer.steps():
            for batch in trainer.batches(8):
                out = trainer.model(batch.randn(2))
                trainer.backward(out.square().mean())
                trainer.backward(critic(out.detach()).square().mean(), "critic_loss")
            if trainer.step == stop_at:
                raise Interrupted
            trainer.update()
        return [*trainer.model.parameters(), *critic.parameters()]

    whole = run(tmp_path / "whole", None)
    with pytest.raises(Interrupted):
        run(tmp_path / "broken", 5)
    again = run(tmp_path / "broken", None)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert log(tmp_path / "whole") == log(tmp_path / "broken")
    assert not torch.equal(whole[2], start) and log(tmp_path / "whole")[0]["grad_norm_critic"] > 0


# --- a loss that is no number ---------------------------------------------------------------------------------------


def test_a_nan_loss_stops_the_run_before_it_touches_the_weights(tmp_path, engine):
    recipe = Recipe(steps=3, batch_size=4, accumulate=2)
    trainer = Trainer(nn.Linear(2, 1), recipe, tmp_path, engine, describe="picture {}".format)
    before = trainer.model.weight.clone()
    steps = iter(trainer.steps())
    next(steps)
    first, second = (batch.indices.tolist() for batch in trainer.batches(16))
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan, over the samples") as error:
        take_step(trainer, broken=second[0])
    assert all(f"picture {i}" in str(error.value) for i in second)  # the half that it was in
    assert not any(f"picture {i};" in str(error.value) for i in first)
    assert torch.equal(before, trainer.model.weight)


def test_many_samples_of_a_nan_loss_are_named_in_a_file(tmp_path, engine):
    trainer = Trainer(nn.Linear(2, 1), Recipe(steps=3, batch_size=10), tmp_path, engine, describe="picture {}".format)
    next(iter(trainer.steps()))
    with pytest.raises(FloatingPointError, match="and 2 others, named in no_number_000001.txt"):
        take_step(trainer, n=10, broken=3)
    named = (tmp_path / "no_number_000001.txt").read_text().splitlines()
    assert sorted(named) == [f"picture {i}" for i in range(10)]


def test_a_nan_gradient_stops_the_run(tmp_path, engine):
    trainer = Trainer(nn.Linear(2, 1), Recipe(steps=3, batch_size=4), tmp_path, engine)
    next(iter(trainer.steps()))
    for _ in trainer.batches(16):
        trainer.backward((trainer.model.bias - trainer.model.bias.detach()).abs().sqrt().sum())  # 0 / 0
    with pytest.raises(FloatingPointError, match="the grad_norm of step 1 is nan"):
        trainer.update()


@pytest.mark.parametrize("read_at", ["the next line of the log", "the next checkpoint"])
def test_where_figures_are_read_later_a_loss_that_is_no_number_touches_no_weights(read_at, tmp_path, engine):
    """As on a GPU, which would have nothing to do while the program waits for the loss of each step."""
    every = {"log_every": 4, "save_every": 100} if "log" in read_at else {"log_every": 100, "save_every": 4}
    torch.manual_seed(0)
    trainer = Trainer(nn.Linear(2, 1), Recipe(steps=9, batch_size=4, lr=0.1, **every), tmp_path, engine)
    trainer._reads_each_step = False
    weights = []
    with pytest.raises(FloatingPointError, match="the loss of step 2 is nan, over the samples"):
        for step in trainer.steps():
            broken = [i for batch in trainer.batches(16) for i in batch.indices.tolist()][0] if step == 1 else None
            take_step(trainer, broken=broken)
            weights.append(trainer.model.weight.clone())
    assert len(weights) == (3 if "log" in read_at else 4)  # it was read in step 4, or after it
    assert not torch.equal(weights[0], weights[2]) and torch.equal(weights[0], weights[1])
    assert all(w.isfinite().all() for w in [*weights, trainer.ema.weights["weight"]])
    assert not trainer.folder.checkpoints() and free(tmp_path)


def test_when_figures_are_read_changes_nothing_in_a_run(tmp_path, engine):
    def run(each_step):
        torch.manual_seed(0)
        recipe = Recipe(steps=7, batch_size=4, log_every=3, save_every=2)
        trainer = Trainer(nn.Linear(2, 1), recipe, tmp_path / str(each_step), engine)
        trainer._reads_each_step = each_step
        for _ in trainer.steps():
            take_step(trainer)
        return trainer.ema.weights["weight"], log(tmp_path / str(each_step))

    (now, lines), (later, same_lines) = run(True), run(False)
    assert torch.equal(now, later) and lines == same_lines and [line["step"] for line in lines] == [3, 6]


# --- one run, however many processes --------------------------------------------------------------------------------


def test_an_epoch_visits_every_sample_once(tmp_path, engine):
    trainer = Trainer(nn.Linear(2, 1), Recipe(steps=9, batch_size=4), tmp_path, engine)
    seen = [i for trainer.step in range(9) for batch in trainer.batches(12) for i in batch.indices.tolist()]
    epochs = [seen[:12], seen[12:24], seen[24:]]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_processes_and_parts_draw_what_one_process_would_have_drawn(tmp_path):
    def drawn(rank, processes, accumulate, batch_size=8):
        engine = SingleDevice("cpu")
        engine.process_index, engine.num_processes = rank, processes
        trainer = Trainer(nn.Linear(2, 1), Recipe(batch_size=batch_size, accumulate=accumulate), tmp_path, engine)
        trainer.step = 5
        batches = list(trainer.batches(100))
        numbers = [(b.indices, b.randint(1000), b.rand(), b.randn(2, 3)) for b in batches]
        return [torch.cat(column) for column in zip(*numbers, strict=True)]

    whole = drawn(0, 1, 1)
    assert all(len(column.unique()) > 1 for column in whole)
    assert all(torch.equal(a, b) for a, b in zip(drawn(0, 1, 4), whole, strict=True))
    shares = zip(drawn(0, 2, 2), drawn(1, 2, 2), whole, strict=True)
    assert all(torch.equal(torch.cat([a, b]), c) and len(a) == 4 for a, b, c in shares)
    many = drawn(0, 1, 1, 200)  # of which 64 share a generator
    assert all(torch.equal(a, b) for a, b in zip(drawn(0, 1, 5, 200), many, strict=True))
    noise = drawn(0, 1, 1, 2000)[3]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05 and len(noise.unique(dim=0)) == 2000


def test_numbers_that_are_drawn_in_advance_are_those_that_would_be_drawn(tmp_path, engine):
    trainer, again = (Trainer(nn.Linear(2, 1), Recipe(batch_size=8, accumulate=2), tmp_path, engine) for _ in range(2))
    shapes = [(2, 3), (2, 3), (2, 3), (5,)]  # the last step asks for something else
    for trainer.step, shape in enumerate(shapes):
        for k, batch in enumerate(trainer.batches(16)):
            numbers = batch.randint(9), batch.randn(*shape), batch.rand()
            assert bool(batch.ahead) == (trainer.step > 0)  # from the third batch on
            again.step, again._ahead, again._draws = trainer.step, {}, []
            same = list(again.batches(16))[k]
            assert torch.equal(same.randint(9), numbers[0]) and torch.equal(same.randn(*shape), numbers[1])
            assert torch.equal(same.rand(), numbers[2])


def test_a_run_of_a_version_that_drew_other_numbers_is_refused(tmp_path, engine):
    recipe = Recipe(steps=4, batch_size=4)
    trainer = Trainer(nn.Linear(2, 1), recipe, tmp_path, engine)
    trainer.save()
    state = trainer.folder.load()
    del state["given"]["random numbers"]  # as an older version wrote it
    trainer.folder.save(0, state)
    with pytest.raises(ValueError, match="random numbers was those of an older minisd, with which it can be finished"):
        Trainer(nn.Linear(2, 1), recipe, tmp_path, engine)


@pytest.mark.parametrize("network", ["vae", "unet"])
def test_gradients_that_are_added_up_are_those_of_the_whole_batch(network, shapes, engine, parts, tmp_path):
    for accumulate in (1, 4):
        folder, options = tmp_path / str(accumulate), {"steps": 3, "accumulate": accumulate, **SHORT}
        if network == "vae":
            train_vae(PRESETS["tiny"].first_stage, VAERecipe(**options), shapes, folder, engine)
        else:
            train_unet(PRESETS["tiny"], UNetRecipe(**options), shapes, folder, engine, *parts)
    whole, added = log(tmp_path / "1"), log(tmp_path / "4")
    for a, b in zip(whole, added, strict=True):
        assert b == pytest.approx(a, rel=1e-5)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)


def test_a_batch_that_cannot_be_divided_evenly_is_refused(tmp_path, monkeypatch):
    engine = SingleDevice("cpu")
    engine.num_processes = 3
    with pytest.raises(ValueError, match="a batch of 8 can't be shared out evenly to 3 processes .* a multiple of 6"):
        Trainer(nn.Linear(2, 1), Recipe(batch_size=8, accumulate=2), tmp_path, engine)
    with pytest.raises(ValueError, match="the batch can't be cut into parts: set accumulate to 1"):
        CLIPRecipe(accumulate=2)
    monkeypatch.setenv("WORLD_SIZE", "2")  # without a launcher behind it
    with pytest.raises(ValueError, match="one of 2 processes, and a SingleDevice knows only itself"):
        SingleDevice("cpu")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r'2 processes .* pip install "minisd\[train\]"'):
        make_engine("cpu")


# Relative; all other figures must be equal.
EXACT = dict.fromkeys(["loss", "loss_t000", "loss_t250", "loss_t500", "loss_t750", "rec"], 1e-6)
EXACT |= {"kl": 1e-5, "grad_norm": 2e-5}  # of a young autoencoder, the KL is a small difference of large numbers


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(b[name] == pytest.approx(a[name], rel=EXACT.get(name, 0), abs=0) for name in a), (a, b)
    return True


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """The same short runs, by one process in one/, by two in ddp/, and by two that went on with one's in two/."""
    folder = tmp_path_factory.mktemp("several")
    draw_shapes(folder / "shapes", count=40, size=32)
    (folder / "shapes" / "templates.txt").write_text("{}\na {}\nthe {}\na picture of a {}\n")
    options = ["--preset", "tiny", "--device", "cpu", "--precision", "no", "--data", str(folder / "shapes")]
    options += ["--steps", "4", "--batch-size", "8", "--warmup", "2", "--log-every", "1", "--save-every", "2"]
    for network in ("clip", "vae", "unet"):
        cli.main(["train", network, "--out", str(folder / "one"), *options])
    program = str(Path(__file__).with_name("several_processes.py"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, program, str(folder / "shapes"), str(folder), "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert process.returncode == 0, process.stderr[-4000:]
    return folder


@pytest.mark.parametrize("network", ["clip", "vae", "unet"])
def test_two_processes_train_as_one_does(network, several):
    two = log(several / "ddp" / network)
    assert [line["step"] for line in two] == [1, 2, 3, 4]  # and but one of them writes
    assert same(log(several / "one" / network), two)


def test_each_process_encodes_its_share_and_has_what_one_would_have_encoded(several, engine):
    data = CaptionedPictures(several / "shapes", 32)
    sd = assemble(PRESETS["tiny"], several / "one/clip", several / "one/vae")
    moments = encode_all(sd.first_stage_model, data, engine, batch_size=7)  # 40 pictures: five batches and five
    prompts = sd.cond_stage_model.prompts(data)
    contexts = encode_prompts(sd, prompts, engine, batch_size=24)  # 160 forms of captions: six and sixteen
    shares = [torch.load(several / f"encoded_{rank}.pt") for rank in range(2)]
    for share in shares:
        assert torch.equal(share["moments"], moments) and torch.equal(share["contexts"], contexts)
    assert [len(share["seen"]) for share in shares] == [21, 19]
    assert sorted(torch.cat([share["seen"] for share in shares]).tolist()) == list(range(40))


def test_a_run_continues_with_another_number_of_processes(several, engine):
    one, two = log(several / "one" / "unet"), log(several / "two")
    assert one[:2] == two[:2] and same(one, two)  # two processes went on from a checkpoint of one …
    (several / "two" / "checkpoint_000004.pt").unlink()
    recipe = replace(recipes.UNET["tiny"], steps=4, batch_size=8, warmup=2, log_every=1)
    data, parts = CaptionedPictures(several / "shapes", 32, "train"), [several / "one" / p for p in ("clip", "vae")]
    train_unet(PRESETS["tiny"], recipe, data, several / "two", engine, *parts)
    assert same(two, log(several / "two"))  # … and one process goes on from a checkpoint of two
    drawn = load(several / "two" / "model" / "after_000004_steps.safetensors", "cpu").state_dict()  # by two
    for name, weight in load(several / "two" / "model", "cpu").state_dict().items():
        assert torch.allclose(weight, drawn[name], atol=1e-3), name


def test_two_processes_train_a_table_of_classes_as_one_does(several, engine):
    recipe = replace(recipes.UNET["tiny"], steps=4, batch_size=8, warmup=2, log_every=1)
    data, folder = CaptionedPictures(several / "shapes", 32, "train"), several / "classes"
    config, vae = PRESETS["tiny"], several / "one" / "vae"
    sd = train_unet(config, recipe, data, folder / "one", engine, None, vae, condition="classes", column="concept")
    assert same(log(folder / "one"), log(folder / "ddp"))
    two = load(folder / "ddp" / "model", "cpu").state_dict()
    torch.manual_seed(recipe.seed)
    start = assemble(config, None, vae, data, "classes", "concept").state_dict()
    for name, weight in sd.state_dict().items():
        assert torch.allclose(weight, two[name], atol=1e-3), name
        if name.startswith("cond_stage_model"):
            assert not torch.equal(weight, start[name]), name


def test_all_processes_stop_at_a_nan_loss_in_one(several):
    said = [(several / f"nan_{rank}.txt").read_text() for rank in range(2)]
    assert said[0] == said[1] and "the loss of step 1 is nan, over the samples" in said[0]
    samples = said[0].split("samples ")[1].split(".")[0].split("; ")
    assert len(samples) == 4 and "5" in samples  # of the process that had it


def test_all_processes_stop_if_one_is_asked_to(several):
    said = [(several / f"ctrl_c_{rank}.txt").read_text() for rank in range(2)]
    assert said[0] == said[1] and "stopped after step 2" in said[0]
    assert [path.name for path in RunFolder(several / "stopped").checkpoints()] == ["checkpoint_000002.pt"]


def test_several_processes_refuse_what_they_could_not_do_as_asked(several):
    for rank in range(2):
        said = {path.stem: path.read_text() for path in several.glob(f"*_{rank}.txt")}
        assert "a batch of 7 can't be shared out evenly to 2" in said[f"uneven_{rank}"]
        assert "FSDP is not supported: use DDP" in said[f"ACCELERATE_USE_FSDP_{rank}"]
        assert "give --accumulate 4 to minisd" in said[f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS_{rank}"]
        assert "asked to be on cuda, and Accelerate chose cpu" in said[f"cuda_{rank}"]


# --- what is computed -----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("recipe", "values", "words"),
    [
        (Recipe, {"batch_size": 0}, "batch_size must be at least 1"),
        (Recipe, {"batch_size": 10**12}, "batch_size must be at least 1 and at most 1,000,000, not 1,000,000,000,000"),
        (Recipe, {"seed": -1}, "seed must be at least 0"),
        (Recipe, {"ema_decay": 9.0}, "ema_decay is a share, from 0 to 1, not 9.0"),
        (Recipe, {"clip_grad": 0.0}, "clip_grad must be more than 0"),
        (UNetRecipe, {"text_dropout": 10.0}, "text_dropout is a share, from 0 to 1, not 10.0"),
        (UNetRecipe, {"min_snr_gamma": -5.0}, "min_snr_gamma must be more than 0"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(recipe, values, words):
    with pytest.raises(ValueError, match=words):
        recipe(**values)


def test_what_would_only_fail_in_the_end_is_refused_at_the_start(shapes, engine, parts, tmp_path):
    config, small = PRESETS["tiny"], CaptionedPictures(shapes.folder, size=16)
    run = (tmp_path, engine)
    with pytest.raises(ValueError, match="draws 32x32 pixels, and the pictures are 16x16: .* size=32"):
        train_unet(config, UNetRecipe(**SHORT), small, *run, *parts)
    with pytest.raises(ValueError, match="sees 32x32 pixels, and the pictures are 16x16: .* size=32"):
        train_clip(config.cond_stage, recipes.VISION["tiny"], CLIPRecipe(**SHORT), small, *run)
    with pytest.raises(ValueError, match="a batch of 64 would hold some of the 40 pictures twice"):
        train_clip(config.cond_stage, recipes.VISION["tiny"], CLIPRecipe(batch_size=64), shapes, *run)
    with pytest.raises(ValueError, match="keep_at names step 9, but this run has steps 1 to 8"):
        train_unet(config, UNetRecipe(steps=8, **SHORT), shapes, *run, *parts, keep_at=(8, 9))
    sd = load("tiny", "cpu")
    masked = replace(sd.config, unet=replace(sd.config.unet, in_channels=7))
    sd = LatentDiffusion(masked, sd.cond_stage_model.tokenizer)
    with pytest.raises(ValueError, match="takes 3 channels beside the noisy latent, such as a mask"):
        train_unet(sd, UNetRecipe(**SHORT), shapes, *run)
    assert not list(tmp_path.iterdir())


def test_the_log_tells_the_loss_by_time(shapes, engine, parts, tmp_path):
    recipe = UNetRecipe(steps=4, **SHORT | {"batch_size": 32, "log_every": 4}, min_snr_gamma=None)
    train_unet(PRESETS["tiny"], recipe, shapes, tmp_path, engine, *parts)
    (line,) = log(tmp_path)
    quarters = [line[f"loss_t{t:03d}"] for t in (0, 250, 500, 750)]
    assert sum(quarters) / 4 == pytest.approx(line["loss"], rel=1e-5)  # of plain losses, the mean of its parts
    assert all(0.3 < quarter < 3 for quarter in quarters)  # an untrained UNet predicts 0, and the noise has variance 1


def test_the_loss_by_time_is_the_mean_of_each_bin():
    losses, t = torch.tensor([1.0, 3.0, 10.0, 20.0]), torch.tensor([0, 249, 250, 999])
    assert by_time(losses, t, 1000) == {"loss_t000": 4.0, "loss_t250": 10.0, "loss_t500": 0.0, "loss_t750": 20.0}


def test_latents_and_contexts_that_are_not_kept_are_computed_in_each_step(
    shapes, engine, parts, tmp_path, monkeypatch
):
    """Too many pictures to keep what they are encoded to: the losses are the same, except for rounding."""
    for name in ("kept", "anew"):
        train_unet(PRESETS["tiny"], UNetRecipe(steps=4, **SHORT), shapes, tmp_path / name, engine, *parts)
        monkeypatch.setattr(unet_training, "KEPT", 0)
        monkeypatch.setattr(unet_training, "encode_prompts", None)  # nothing is encoded before the first step
    assert losses(tmp_path / "anew") == pytest.approx(losses(tmp_path / "kept"), rel=2e-3)


def test_the_three_networks_are_trained_on_a_mixture_of_data_sets(shapes, engine, tmp_path):
    mixture = Mixture([shapes, shapes])
    run, config, recipe = tmp_path / "run", PRESETS["tiny"], {"steps": 2, **SHORT}
    train_clip(config.cond_stage, recipes.VISION["tiny"], CLIPRecipe(**recipe), mixture, run / "clip", engine)
    train_vae(config.first_stage, VAERecipe(**recipe), mixture, run / "vae", engine)
    sd = train_unet(config, UNetRecipe(**recipe), mixture, run / "unet", engine, run / "clip", run / "vae")
    assert sd.txt2img(mixture.captions[0], steps=2).images[0].size == (32, 32)
    assert measure_scale_factor(sd.first_stage_model, mixture, engine) == pytest.approx(sd.scale_factor)


def test_of_many_pictures_some_are_encoded_at_random(shapes, engine):
    vae = AutoencoderKL(PRESETS["tiny"].first_stage).eval()
    every, some = encode_all(vae, shapes, engine), encode_all(vae, shapes, engine, most=5)
    found = [int((every - latent).abs().amax((1, 2, 3)).argmin()) for latent in some]
    assert len(set(found)) == 5 and found != sorted(found)
    assert torch.allclose(every[found], some, atol=1e-5)


def test_gradient_checkpointing_changes_no_loss(shapes, engine, parts, tmp_path):
    recipe = UNetRecipe(steps=2, **SHORT)
    train_unet(PRESETS["tiny"], recipe, shapes, tmp_path / "plain", engine, *parts)
    sparing = replace(recipe, gradient_checkpointing=True)
    train_unet(PRESETS["tiny"], sparing, shapes, tmp_path / "sparing", engine, *parts)
    assert losses(tmp_path / "sparing") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    assert load(tmp_path / "sparing/model").config == load(tmp_path / "plain/model").config


def test_a_compiled_network_has_the_same_losses(tmp_path):
    """In a process of its own: what is compiled can't be watched by jaxtyping."""
    code = """
        import sys, torch
        from functools import partial
        from pathlib import Path
        from minisd.training import Recipe, SingleDevice, Trainer

        # the default backend takes a minute for its kernels; this one traces as it does, and runs what it traced
        torch.compile = partial(torch.compile, backend="aot_eager")
        for compiled in (False, True):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
            recipe = Recipe(steps=3, batch_size=4, log_every=1, compile=compiled)
            trainer = Trainer(model, recipe, Path(sys.argv[1], str(compiled)), SingleDevice("cpu"))
            assert (model._compiled_call_impl is not None) == compiled
            for _ in trainer.steps():
                for batch in trainer.batches(16):
                    trainer.backward(trainer.model(batch.randn(4)).square().mean())
                trainer.update()
            assert list(trainer.ema.weights) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path], check=True, timeout=300)
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-6)


@pytest.mark.parametrize("parameterization", ["v", "x0"])
def test_the_unet_learns_to_predict_what_its_configuration_says(parameterization, shapes, engine, parts, tmp_path):
    config = replace(PRESETS["tiny"], parameterization=parameterization)
    train_unet(config, UNetRecipe(steps=2, **SHORT), shapes, tmp_path, engine, *parts)
    sd = load(tmp_path / "model")
    assert sd.config.parameterization == parameterization
    assert sd.txt2img("a red circle", steps=2).pictures.isfinite().all()


def test_a_finished_model_is_trained_further(shapes, engine, parts, tmp_path):
    start = train_unet(PRESETS["tiny"], UNetRecipe(steps=2, **SHORT), shapes, tmp_path / "start", engine, *parts)
    before = {name: weight.clone() for name, weight in start.state_dict().items()}
    model = tmp_path / "start/model"

    again = train_unet(load(model), UNetRecipe(steps=3, **SHORT), shapes, tmp_path / "more", engine, clip=model)
    for name, weight in again.state_dict().items():
        start = before[name].half().float()  # as the file has it
        if name.startswith("model."):
            assert torch.allclose(weight, start, atol=5e-3), name  # three small steps from there
            assert weight.ndim == 1 or not torch.equal(weight, start), name
        else:
            assert torch.equal(weight, start), name
    clip, _ = load_clip(tmp_path / "more/model")  # so that `minisd evaluate` can judge it
    assert clip.vision_config == recipes.VISION["tiny"]
    assert len(losses(tmp_path / "more")) == 3


def test_a_model_that_was_loaded_in_half_precision_is_trained_in_full(shapes, engine, tmp_path):
    recipe = UNetRecipe(steps=1, **SHORT)
    for dtype in (torch.float16, torch.float32):  # the file of tiny holds float16
        train_unet(load("tiny", "cpu", dtype), recipe, shapes, tmp_path / str(dtype), engine)
    assert log(tmp_path / "torch.float16") == log(tmp_path / "torch.float32")
