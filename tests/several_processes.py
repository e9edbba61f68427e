"""A program for test_training.py, to be started by torchrun: the runs in FOLDER/one again, by several processes.

    torchrun --nproc_per_node 2 several_processes.py SHAPES FOLDER STEPS

Through the command line and from Python; a run that one process began; a loss that is no number in one process.
"""

import os
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from minisd import PRESETS, cli
from minisd.data import CaptionedPictures
from minisd.training import Recipe, Trainer, make_engine, recipes, train_unet
from minisd.training.unet import assemble, encode_prompts
from minisd.training.vae import encode_all

shapes, folder, steps = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
OPTIONS = "--preset tiny --device cpu --precision no --batch-size 8 --warmup 2 --log-every 1 --save-every 2".split()

for network, *more in (["clip"], ["vae"], ["unet", "--accumulate", "2"]):
    own = ["--data", shapes, "--out", str(folder / "ddp"), "--steps", steps, *more]
    cli.main(["train", network, *OPTIONS, *own])

engine = make_engine("cpu")
assert engine.num_processes == 2


def complaint(call, name: str) -> None:
    """Write down what each process has to say."""
    try:
        call()
    except (ValueError, FloatingPointError, KeyboardInterrupt) as error:
        (folder / f"{name}_{engine.process_index}.txt").write_text(str(error))


def uneven():
    Trainer(torch.nn.Linear(2, 1), Recipe(batch_size=7), folder / "uneven", engine)


def ctrl_c():
    """In one of them."""
    trainer = Trainer(torch.nn.Linear(2, 1), Recipe(batch_size=8), folder / "stopped", engine)
    for step in trainer.steps():
        if step == 1 and engine.process_index == 1:
            os.kill(os.getpid(), signal.SIGINT)
        for batch in trainer.batches(8):
            trainer.backward(trainer.model(batch.randn(2)).mean())
        trainer.update()
        first, *others = engine.gather(trainer.ema.weights["weight"])
        assert all(torch.equal(first, other) for other in others)


def nan():
    trainer = Trainer(torch.nn.Linear(2, 1), Recipe(batch_size=8), folder / "nan", engine)
    for _ in trainer.steps():
        for batch in trainer.batches(8):
            loss = trainer.model(batch.randn(2)).mean()
            trainer.backward(loss * torch.nan if 5 in batch.indices.tolist() else loss)
        trainer.update()


def engines():
    """That would not do what was asked for."""
    asked = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    for name, value in asked.items():
        os.environ[name] = value
        complaint(partial(make_engine, "cpu"), name)
        del os.environ[name]
    complaint(partial(make_engine, "cuda"), "cuda")


def encoded():
    """What the UNet's training encodes, and which pictures this process had to look at for it."""
    sd = assemble(PRESETS["tiny"], folder / "one/clip", folder / "one/vae")
    data, seen = CaptionedPictures(shapes, 32), []
    batch, data.batch = data.batch, lambda indices: seen.append(indices) or batch(indices)
    moments = encode_all(sd.first_stage_model, data, engine, batch_size=7)
    prompts = [form for forms in sd.cond_stage_model.prompts(data) for form in forms]
    contexts = encode_prompts(sd, prompts, engine, batch_size=24)
    found = {"moments": moments, "contexts": contexts, "seen": torch.cat(seen)}
    torch.save(found, folder / f"encoded_{engine.process_index}.pt")


encoded()
complaint(uneven, "uneven")
complaint(nan, "nan")
complaint(ctrl_c, "ctrl_c")
engines()

if engine.is_main_process:  # go on with what one process began
    shutil.copytree(folder / "one" / "unet", folder / "two")
    (folder / "two" / f"checkpoint_{int(steps):06d}.pt").unlink()
engine.wait_for_everyone()
data, vae = CaptionedPictures(shapes, 32, "train"), folder / "one" / "vae"
recipe = replace(recipes.UNET["tiny"], steps=int(steps), batch_size=8, warmup=2, log_every=1, save_every=1)
train_unet(PRESETS["tiny"], recipe, data, folder / "two", engine, folder / "one" / "clip", vae, keep_at=(int(steps),))
# a condition that is trained along with the UNet
train_unet(
    PRESETS["tiny"], recipe, data, folder / "classes" / "ddp", engine, None, vae, condition="classes", column="concept"
)
