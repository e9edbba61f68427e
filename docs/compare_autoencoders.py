"""Hold autoencoders against each other on pictures that none of them was trained on:

    python docs/compare_autoencoders.py minisd/data/sample sheet.png runs/pixels runs/alike emoji

Runs of `minisd train vae`, or models. One line each, and a sheet: above, the pictures; below, what each makes of them.
"""

import sys
from pathlib import Path

import torch

from minisd.checkpoint import load_clip, read_json
from minisd.data import CaptionedPictures
from minisd.training import CLIPPerceptual, SingleDevice, finished_vae
from minisd.training.vae import psnr, reconstruct
from minisd.viz import save_sheet

data, sheet, runs = CaptionedPictures(sys.argv[1], 32, "test_pair"), sys.argv[2], [Path(run) for run in sys.argv[3:]]
engine, alike = SingleDevice("cpu"), CLIPPerceptual(load_clip("emoji")[0])
x = data.batch(range(len(data)))
rows = [x[:: len(x) // 12][:12]]


def contrast(x: torch.Tensor) -> float:
    """The mean difference of neighbouring pixels: blur lowers it."""
    return float((x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()) / 2)


for run in runs:
    folder = run / "vae" if (run / "vae").is_dir() else run
    vae, _ = finished_vae(folder)
    record = read_json(folder / "vae.json") if folder != run else {}
    x_hat = torch.cat([reconstruct(vae, part, engine) for part in x.split(64)]).clamp(-1, 1)
    rows.append(x_hat[:: len(x) // 12][:12])
    trained = f", {record['psnr']:.2f} in training" if record else ""
    used = f"; {record['codes']} codes, perplexity {record['perplexity']:.0f}" if "codes" in record else ""
    print(
        f"{run.name:10} {psnr(vae, data, engine):.2f} dB held out{trained}; distance in CLIP "
        f"{alike(x, x_hat).mean():.3f}; contrast {contrast(x_hat) / contrast(x):.2f} of the pictures'{used}"
    )
save_sheet(torch.cat(rows), sheet, columns=12, scale=3)
