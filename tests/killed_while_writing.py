"""A program for test_training.py: a run that is left alone, and one that is killed (-9) at everything it writes.

    python killed_while_writing.py SHAPES FOLDER        prints each network and a name at which it was killed, in order

The UNet is trained with the networks in FOLDER/parts. Whatever a run keeps is first written under another name and then
renamed (`written_whole`, `folder_written_whole`). Each life of the killed run is a fork of this process. It ends just
before the first renaming at which no life before it has ended, so the run is killed once at each checkpoint, and once
at each file of the finished model.
"""

import os
import signal
import sys
import threading
from pathlib import Path

# What the optimiser would import, in every life.
import torch._dynamo  # noqa: F401
from tqdm import tqdm

from minisd import PRESETS
from minisd.data import CaptionedPictures
from minisd.training import CLIPRecipe, SingleDevice, UNetRecipe, VAERecipe, recipes, train_clip, train_unet, train_vae

# All forks share tqdm's lock. If one of them is killed while it holds the lock, all later ones would wait for ever.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # no thread that could hold it during a fork
shapes, folder = sys.argv[1], Path(sys.argv[2])
data, config, engine = CaptionedPictures(shapes, 32), PRESETS["tiny"], SingleDevice("cpu")
SHORT = {"steps": 2, "batch_size": 4, "warmup": 2, "log_every": 1, "save_every": 1, "sample_every": 100}


def train(network: str, run: Path) -> None:
    if network == "clip":
        train_clip(config.cond_stage, recipes.VISION["tiny"], CLIPRecipe(**SHORT), data, run, engine)
    elif network == "vae":
        train_vae(config.first_stage, VAERecipe(**SHORT), data, run, engine)
    else:
        parts = folder / "parts"
        train_unet(config, UNetRecipe(**SHORT), data, run, engine, parts / "clip", parts / "vae", keep_at=(1,))


def live(network: str, run: Path, killed_at: list[str] | None = None) -> str | None:
    """One life of the run in a process of its own. Returns the name at which it was killed; None if it finished."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        rename = os.replace

        def rename_or_die(source, target):
            name = str(Path(target).relative_to(run))
            if killed_at is not None and name not in killed_at:
                os.write(into, name.encode())
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        os.replace = rename_or_die
        train(network, run)
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        name = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    if status not in (0, signal.SIGKILL):
        sys.exit(f"a run that was killed at {', '.join(killed_at)} could not be gone on with")
    return name or None


for network in ("clip", "vae", "unet"):
    live(network, folder / network / "whole")
    killed_at = []
    while name := live(network, folder / network / "killed", killed_at):
        killed_at.append(name)
        print(network, name, flush=True)
