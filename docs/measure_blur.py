"""Where the model that ships loses detail, for the table in docs/faq.md:   python docs/measure_blur.py

Detail is what a picture loses when each pixel is replaced by the mean of its 3x3 neighbours, as a standard deviation.
It is given as a share of that of the real pictures.
"""

import torch
import torch.nn.functional as F

import minisd
from minisd.data import sample

COUNT, STEPS, SCALES = 64, 50, (1.0, 2.0, 4.0, 7.5)


def detail(x: torch.Tensor) -> float:
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return float((x - blurred).std())


@torch.no_grad()
def measure() -> dict[str, float]:
    sd = minisd.load()
    data = sample(sd.config.image_size)
    chosen = range(0, len(data), len(data) // COUNT)[:COUNT]
    x, captions = data.batch(chosen).clamp(-1, 1), [data.captions[i] for i in chosen]
    shown = {"real pictures": x}
    shown["encoded and decoded"] = sd.first_stage_model.decode(sd.first_stage_model.encode(x).mode())
    for scale in SCALES:
        out = sd.txt2img(captions, steps=STEPS, guidance_scale=scale)
        if scale == 1:
            for i in range(0, STEPS, STEPS // 5):
                shown[f"x̂_0 at step {i} of {STEPS}, guidance 1"] = out.trajectory.decode(out.trajectory[i].x0)
        shown[f"drawn, guidance {scale:g}"] = out.pictures
    return {name: detail(x.clamp(-1, 1)) for name, x in shown.items()}


if __name__ == "__main__":
    found = measure()
    for name, value in found.items():
        print(f"{name:34} {value / found['real pictures']:.0%}")
