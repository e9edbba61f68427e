"""Draw the pictures of README and docs anew:   python docs/draw_pictures.py [runs/emoji]

With the folder of a run, also the curves of its logs.
"""

import base64
import io
import json
import sys
from pathlib import Path

from draw_play import PROMPTS as PLAYED
from PIL import Image
from resvg_py import svg_to_bytes

import minisd
from minisd import viz
from minisd.data import Scenes
from minisd.data.scenes import KINDS
from minisd.viz import captioned, sheet

PICTURES = Path(__file__).parent / "pictures"
PROMPTS = [*PLAYED, "an automobile, fluent flat style", "a snowman, noto style"]


def first_drawings(sd: minisd.LatentDiffusion) -> None:
    """README's picture: eight prompts, seeds 0 and up, nothing chosen."""
    images = sd.txt2img(PROMPTS, steps=25, guidance_scale=4.0, sampler="dpmpp_2m", seed=0).images
    sheet(images, columns=8, scale=3, gap=6).save(PICTURES / "first_drawings.png")


def guidance(sd: minisd.LatentDiffusion) -> None:
    """The same prompts and the same noise at four guidance scales: a sheet each, three seeds below each other."""
    for scale in (1, 2, 4, 8):
        images = []
        for seed in (0, 100, 200):
            images += sd.txt2img(PROMPTS, steps=25, guidance_scale=scale, sampler="dpmpp_2m", seed=seed).images
        sheet(images, columns=8, scale=3, gap=6).save(PICTURES / f"guidance_{scale}.png")


def learning(sd: minisd.LatentDiffusion) -> None:
    """The tiny model after 500 and after 5,000 steps, from the same noise."""
    prompts = ["a red circle", "two blue squares", "a purple star", "three green triangles"]
    folder = minisd.checkpoint.SHIPPED / "tiny"
    rows = []
    for name in ("after_000500_steps.safetensors", "model.safetensors"):
        tiny = minisd.load(folder / name, sd.device)
        rows += tiny.txt2img(prompts, steps=25, guidance_scale=3.0, sampler="dpmpp_2m", seed=0, num_images=2).images
    sheet(rows, columns=8, scale=3, gap=6).save(PICTURES / "learning.png")


def scenes() -> None:
    """Six scenes of each kind, from data/scenes: the first ones that do not name their style."""
    scenes, chosen = Scenes("data/scenes", count=400), []
    for kind in KINDS:
        chosen += [i for i, s in enumerate(scenes.scenes) if s.kind == kind and not s.names_style][:6]
    figure = captioned(scenes.batch(chosen), [scenes.captions[i] for i in chosen], columns=6, size=1.2)
    figure.savefig(PICTURES / "scenes.png", dpi=110)


# README's map: for each notebook, a figure of it (known by a piece of the cell that draws it), and the part to show, in
# pixels of the page.
THUMBNAILS = {
    "00_start_here": ("viz.sheet(drawing.images", (0, 0, 518, 128)),
    "01_noising": ("viz.noising_strip(", (88, 20, 492, 120)),
    "02_loss": ("viz.vector_field(", (370, 20, 725, 196)),
    "03_unet": ("viz.attention_maps(rows, list(x0)", (57, 222, 358, 304)),
    "04_vae": ("viz.maps(posterior.mean", (82, 22, 488, 118)),
    "05_clip": ("viz.matrices(panels, columns=chosen", (0, 22, 332, 152)),
    "06_sampling": ('rows=("x_t", "eps", "x0")', (242, 22, 636, 122)),
    "07_latent_diffusion": ("to {other}", (300, 20, 705, 118)),
    "08_training": ("torch.cuda.is_available() and full", (750, 4, 1096, 270)),
    "09_stable_diffusion_v1": ("difference of each layer, relative", (20, 18, 656, 270)),
    "10_evaluation": ("over fidelity", (2, 20, 318, 258)),
    "11_why_is_it_noise": ("patients = [", (66, 18, 404, 152)),
}


def thumbnails(width: int = 200) -> None:
    """README's map of the stages: parts of the notebooks' figures, as they were run."""
    (PICTURES / "stages").mkdir(exist_ok=True)
    for name, (piece, box) in THUMBNAILS.items():
        cells = json.loads((PICTURES.parents[1] / "notebooks" / f"{name}.ipynb").read_text("utf-8"))["cells"]
        outputs = [out for cell in cells if piece in "".join(cell["source"]) for out in cell.get("outputs", [])]
        shown = next(out for out in outputs if {"image/svg+xml", "image/png"} & set(out.get("data", {})))
        figure, scale = as_picture(shown["data"], shown.get("metadata", {}))
        figure = figure.crop([round(scale * side) for side in box])
        small = figure.resize((width, round(width * figure.height / figure.width)), Image.Resampling.LANCZOS)
        small.quantize(64).save(PICTURES / "stages" / f"{name}.png", optimize=True)


def as_picture(data: dict, metadata: dict) -> tuple[Image.Image, float]:
    """A figure of a notebook, and how many of its pixels are one pixel of the page."""
    if "image/svg+xml" in data:
        # matplotlib measures in points, of which an inch has 72, and a page has 96 pixels.
        drawn = svg_to_bytes(svg_string="".join(data["image/svg+xml"]), dpi=2 * 96)
        return Image.open(io.BytesIO(bytes(drawn))).convert("RGB"), 2
    figure = Image.open(io.BytesIO(base64.b64decode("".join(data["image/png"])))).convert("RGB")
    return figure, figure.width / metadata.get("image/png", {}).get("width", figure.width)


def curves(run: Path) -> None:
    """Loss over steps of the three trainings."""
    losses = {"clip": "contrastive loss", "vae": "reconstruction |x - x̂|", "unet": "weighted ε loss"}
    panels = {}
    for name, what in losses.items():
        lines = [json.loads(line) for line in (run / name / "log.jsonl").read_text().splitlines()]
        steps, values = [line["step"] for line in lines], [line.get("rec", line["loss"]) for line in lines]
        panels[f"{name}: {what}"] = {"": (steps, values)}
    figure = viz.curves(panels, "step", log=list(panels))
    figure.savefig(PICTURES / f"{run.name}_curves.svg", metadata={"Date": None})


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    shipped = minisd.load("emoji", "cpu")
    first_drawings(shipped)
    guidance(shipped)
    learning(shipped)
    thumbnails()
    scenes()
    if len(sys.argv) > 1:
        curves(Path(sys.argv[1]))
