"""All that minisd has for a GPU, in one command and within a given time: python -m benchmarks.gpu

    python -m benchmarks.gpu --data data/emoji data/scenes --out runs/gpu --minutes 9
    python -m benchmarks.gpu --small --device cpu --minutes 0.5        to see that it runs, in seconds

First it trains the model that ships, with `train_clip`, `train_vae` and `train_unet`, as `minisd train` does. A run of
CLIP or of the autoencoder that OUT already holds is not repeated. How many steps fit into the time is not known in
advance, because it depends on the card; so each training begins with some steps whose results are thrown away, and the
learning rate falls to zero when the time is over. What remains of the time goes to the tables of docs/benchmarks.md:
Stable Diffusion v1's own UNet, ours beside that of diffusers (where it is installed), eager and compiled.

OUT gets the run (clip/, vae/, unet/, model/), `gpu.md` with the tables, and `gpu.json` with all that was measured.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import minisd
from minisd import PRESETS
from minisd.data import Corpus, Mixture, Scenes, draw_shapes, open_corpus
from minisd.training import Recipe, SingleDevice, recipes, train_clip, train_unet, train_vae

from . import scale

# What a card is given instead of the CPU's recipes: larger batches, and a learning rate that grows about with the root
# of the batch.
CLIP = replace(recipes.CLIP["emoji-64"], batch_size=1024)
VAE = replace(recipes.VAE["emoji-64"], batch_size=128, lr=1.5e-3)
UNET = replace(recipes.UNET["emoji-64"], batch_size=1024, lr=2e-3, warmup=300, ema_decay=0.999, compile=True)
NEVER = 10**9  # steps between two checkpoints or sheets: the run is short
# How the time is shared, as parts of the whole. The UNet takes what CLIP and the autoencoder leave.
SHARES = {"clip": 0.08, "vae": 0.15, "tables": 0.35}
FEW = 5000  # pictures that one process makes as quickly as several
NEEDED = {"no": 15, "yes": 75}  # seconds that a row of the table needs, eager and compiled


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", help="folders of pictures, as `minisd train --data` takes them")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="a folder for the run and the tables")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--scenes", type=int, default=100_000, help="how many scenes are composed, if there are any")
    parser.add_argument("--batch", type=int, default=32, help="of Stable Diffusion's UNet in the tables")
    parser.add_argument("--no-tables", action="store_true", help="only train")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--small", action="store_true", help="small networks; without --data, on coloured shapes")
    options = parser.parse_args(argv)
    if not options.data and not options.small:
        parser.error("name folders of pictures by --data, or take --small")
    return options


# -- the pictures -------------------------------------------------------------------------------------------------


class Composed(Corpus):
    """A corpus whose pictures have all been made and lie in memory.

    A GPU takes pictures faster than one process composes scenes. So all cores compose them, before the training.
    """

    def __init__(self, corpus: Corpus):
        self.corpus, self.size, self.templates = corpus, corpus.size, corpus.templates
        everything = np.arange(len(corpus))
        if len(corpus) < FEW:
            self.images = corpus.pixels(everything)
            return
        corpus.captions  # noqa: B018  # made once here, and not in each process
        # The processes are forked, so that they share the corpus. Nothing has used the GPU or torch's threads yet.
        with multiprocessing.get_context("fork").Pool() as pool:
            self.images = np.concatenate(pool.map(corpus.pixels, np.array_split(everything, 4 * (os.cpu_count() or 1))))

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        return self.images[indices]

    captions = property(lambda self: self.corpus.captions)
    wordings = property(lambda self: self.corpus.wordings)
    fingerprint = property(lambda self: self.corpus.fingerprint)

    def describe(self, i: int) -> str:
        return self.corpus.describe(i)

    def __len__(self) -> int:
        return len(self.corpus)


def pictures(options: argparse.Namespace) -> Corpus:
    """The training pictures of all folders, in equal shares."""
    folders, parts = options.data or [options.out / "data"], []
    if not options.data:
        draw_shapes(folders[0], count=64, size=PRESETS["tiny"].image_size)
    for folder in folders:
        part = open_corpus([folder], captions=True)
        parts.append(Scenes(folder, count=options.scenes) if isinstance(part, Scenes) else part)
    return Composed(parts[0] if len(parts) == 1 else Mixture(parts))


# -- the training -------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """What came of one training."""

    stage: str
    steps: int
    batch: int
    seconds: float  # of the training, without the trial
    samples_per_s: float
    loss: float  # at the end


def train_for(
    seconds: float, stage: str, recipe: Recipe, train: Callable[[Recipe, Path], object], folder: Path, trial: int
) -> Trained:
    """Train for about that many seconds: a trial says how fast a step is, and the recipe gets that many steps."""
    recipe = replace(recipe, sample_every=NEVER, save_every=NEVER)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as throwaway:
        train(replace(recipe, steps=trial, log_every=max(1, trial // 3)), Path(throwaway))
        rate = last_line(Path(throwaway))["samples_per_s"] / recipe.batch_size  # steps a second, after the first ones
    took = time.perf_counter() - began
    left = seconds - took - (took - trial / rate)  # the start and the end will take as long once more
    steps = max(trial, int(left * rate))
    began = time.perf_counter()
    train(replace(recipe, steps=steps, warmup=min(recipe.warmup, steps // 4)), folder)
    line = last_line(folder)
    return Trained(
        stage, steps, recipe.batch_size, time.perf_counter() - began, steps * recipe.batch_size / line["seconds"],
        line["loss"],
    )  # fmt: skip


def last_line(folder: Path) -> dict:
    return json.loads((folder / "log.jsonl").read_text("utf-8").splitlines()[-1])


def train_all(options: argparse.Namespace, data: Corpus, finish: float) -> list[Trained]:
    """CLIP, the autoencoder and the UNet, one after the other. finish: the time at which the last should be done."""
    preset = "tiny" if options.small else "emoji-64"
    config, vision = PRESETS[preset], recipes.VISION[preset]
    engine, trial = SingleDevice(options.device, "bf16"), 6 if options.small else 40
    small = {"batch_size": 16, "log_every": 2, "compile": False}  # so that the recipes fit the rehearsal
    clip, vae, unet = (replace(recipe, **small) if options.small else recipe for recipe in (CLIP, VAE, UNET))
    whole, done = finish - time.perf_counter(), []

    def clip_into(recipe: Recipe, folder: Path) -> None:
        train_clip(config.cond_stage, vision, recipe, data, folder, engine)

    def vae_into(recipe: Recipe, folder: Path) -> None:
        train_vae(config.first_stage, recipe, data, folder, engine)

    def unet_into(recipe: Recipe, folder: Path) -> None:
        train_unet(config, recipe, data, folder, engine, options.out / "clip", options.out / "vae")

    for stage, recipe, train in (("clip", clip, clip_into), ("vae", vae, vae_into)):
        if not (options.out / stage / f"{stage}.safetensors").exists():
            done.append(train_for(SHARES[stage] * whole, stage, recipe, train, options.out / stage, trial))
    left = finish - time.perf_counter()
    done.append(train_for(left, "unet", unet, unet_into, options.out / "unet", trial))
    shutil.copytree(options.out / "unet" / "model", options.out / "model", dirs_exist_ok=True)
    return done


# -- Stable Diffusion's UNet --------------------------------------------------------------------------------------


@dataclass
class Row:
    """Stable Diffusion v1's UNet of one library, eager or compiled."""

    peer: str
    compiled: bool
    run: scale.Run | None = None
    steps_per_s: float | None = None  # calls for 512x512 with guidance: batch 2, bf16, channels_last
    reason: str = ""  # why it was not run


def tables(options: argparse.Namespace, finish: float) -> tuple[float, list[Row]]:
    """The card's best speed, and a row for each library, eager and compiled, as long as there is time."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # what autocast leaves in float32
    how = SimpleNamespace(
        device=options.device, small=options.small, batch=2 if options.small else options.batch, lr=1e-4,
        steps=6 if options.small else 60, recompute=False, profile=False,
    )  # fmt: skip
    z, context = scale.encoded(*((16, 32) if options.small else (256, 256)), options.device)
    peak = scale.peak_flops(options.device, 512 if options.small else 8192)
    rows = []
    for compiled in ("no",) if options.small else ("no", "yes"):
        for peer in ("minisd", "diffusers"):
            row = Row(peer, compiled == "yes")
            rows.append(row)
            if peer == "diffusers" and find_spec("diffusers") is None:
                row.reason = "diffusers is not installed"
            elif finish - time.perf_counter() < NEEDED[compiled] and not options.small:
                row.reason = "no time left"
            else:
                row.run = scale.train(peer, row.compiled, how, z, context, peak)
                row.steps_per_s = drawing_speed(peer, row.compiled, how, z, context)
                if options.device == "cuda":
                    torch._dynamo.reset()
                    torch.cuda.empty_cache()
            print(line(row), flush=True)
    return peak, rows


@torch.no_grad()
def drawing_speed(peer: str, compiled: bool, how: SimpleNamespace, z: torch.Tensor, context: torch.Tensor) -> float:
    """Calls a second of the UNet in a drawing with guidance: two samples, in bfloat16."""
    model, predict = scale.build(peer, scale.SMALL if how.small else minisd.UNetConfig(), how.device, recompute=False)
    torch.nn.Module.to(model, torch.bfloat16).eval()
    if compiled:
        model.compile()
    inputs = z[:2].bfloat16(), torch.full((2,), 500, device=how.device), context[:2].bfloat16()
    for _ in range(3):  # this is the warm-up, too
        predict(*inputs)
    calls, start = 3 if how.small else 50, scale.clock(how.device)
    for _ in range(calls):
        predict(*inputs)
    return calls / (scale.clock(how.device) - start)


def line(row: Row) -> str:
    what = f"{row.peer}, {'compiled' if row.compiled else 'eager'}"
    if row.run is None:
        return f"| {what} | not run: {row.reason} | | | | |"
    run = row.run
    return (
        f"| {what} | {run.batch} | {run.images_per_s:.1f} | {run.peak_gb:.1f} | {run.mfu:.1%} | {row.steps_per_s:.1f} |"
    )


def write(out: Path, name: str, trained: list[Trained], peak: float | None, rows: list[Row]) -> str:
    """Write the tables as docs/benchmarks.md shows them, and all figures as JSON. Returns the tables."""
    lines = [
        f"Measured on {name}, torch {torch.__version__}.", "",
        "| training | steps | batch | pictures/s | seconds | loss at the end |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {t.stage} | {t.steps:,} | {t.batch} | {t.samples_per_s:,.0f} | {t.seconds:.0f} | {t.loss:.4f} |"
        for t in trained
    ]
    if rows:
        lines += [
            "", f"Stable Diffusion v1's UNet; the card's own best in bf16 is {peak / 1e12:.0f} TFLOP/s.", "",
            "| what | batch | images/s in training | peak GB | MFU | it/s at 512x512 |", "|---|---|---|---|---|---|",
        ]  # fmt: skip
        lines += map(line, rows)
    record = {
        "device": name,
        "peak_flops": peak,
        "trained": list(map(asdict, trained)),
        "rows": list(map(asdict, rows)),
    }
    (out / "gpu.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    text = "\n".join(lines) + "\n"
    (out / "gpu.md").write_text(text, encoding="utf-8")
    return text


def main(argv: list[str] | None = None) -> str:
    options = arguments(argv)
    began = time.perf_counter()
    finish = began + 60 * options.minutes
    table_seconds = 0 if options.no_tables else SHARES["tables"] * 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    data = pictures(options)
    print(f"{len(data):,} pictures after {time.perf_counter() - began:.0f} s", flush=True)

    name = torch.cuda.get_device_name() if options.device == "cuda" else "a CPU"
    trained = train_all(options, data, finish - table_seconds)
    text = write(options.out, name, trained, None, [])  # the training is kept, whatever becomes of the tables
    if not options.no_tables:
        text = write(options.out, name, trained, *tables(options, finish))
    print(f"\n{text}\n{time.perf_counter() - began:.0f} s for everything")
    return text


if __name__ == "__main__":
    main()
