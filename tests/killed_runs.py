"""A program for test_training.py: one run that is left alone, and one that is killed (-9) again and again.

    python killed_runs.py SHAPES FOLDER        prints how often it killed

Each life of a run is a fork of this process, which has imported everything and computed nothing.
"""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

# What the optimiser would import, in every life.
import torch._dynamo  # noqa: F401
from tqdm import tqdm

from minisd import PRESETS
from minisd.data import CaptionedPictures
from minisd.training import CLIPRecipe, SingleDevice, recipes, train_clip

# All forks share tqdm's lock. If one of them is killed while it holds the lock, all later ones would wait for ever.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # no thread that could hold it during a fork
data, folder = CaptionedPictures(sys.argv[1], 32), Path(sys.argv[2])
recipe = CLIPRecipe(steps=30, batch_size=4, warmup=2, log_every=1, save_every=1, keep_checkpoints=1)
dice = random.Random(0)


def start(name: str) -> int:
    """The process id of a new life of the run."""
    child = os.fork()
    if child == 0:
        config = PRESETS["tiny"]
        train_clip(config.cond_stage, recipes.VISION["tiny"], recipe, data, folder / name, SingleDevice("cpu"))
        os._exit(0)
    return child


def steps_logged(name: str) -> int:
    log = folder / name / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_and_kill(child: int, steps: int) -> bool:
    """Kill a life at a random moment some steps later. Returns False if it ended by itself before."""
    target = steps_logged("killed") + steps
    while steps_logged("killed") < target:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    time.sleep(dice.uniform(0, 0.05))  # somewhere in a step, a checkpoint, the log
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


os.waitpid(start("whole"), 0)
kills = 0
while wait_and_kill(start("killed"), dice.randint(1, 6)):
    kills += 1
print(kills)
