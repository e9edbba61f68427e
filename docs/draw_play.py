"""Draw what the page `play` shows, unless it is there already:   python docs/draw_play.py

For each prompt a sheet of all x_t and x̂_0, and for all of them play_data.js: the timesteps, the words, and how much the
pixels look at each. The build of the docs runs this (conf.py); what it draws lies in docs/play_pictures.
"""

import base64
import json
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE / "play_pictures"
WEIGHTS = HERE.parent / "minisd" / "weights" / "emoji" / "model.safetensors"

PROMPTS = [
    "a fox, noto style",
    "a red apple, fluent style",
    "a grinning cat, twemoji style",
    "a rocket, noto style",
    "a sunflower, emojione style",
    "a crying face, noto blob style",
]
SCALES = [0, 1, 2, 4, 8]
STEPS = 25
LAYER = "middle_block"  # where notebook 03 finds most to see; 4x4 pixels


def key() -> str:
    """What the pictures depend on: the weights, and this file."""
    return sha256(WEIGHTS.read_bytes() + Path(__file__).read_bytes()).hexdigest()


def is_drawn(key: str) -> bool:
    data = FOLDER / "play_data.js"
    return data.exists() and data.read_text("utf-8").startswith(f"// {key}\n")


def draw() -> tuple[list, dict]:
    """The sheets, and what goes into play_data.js."""
    import torch

    import minisd
    from minisd.viz import sheet

    sd = minisd.load("emoji", "cpu")
    rows = [[] for _ in PROMPTS]  # for each prompt, of each scale: the x_t of all steps, then the x̂_0
    looks = [[] for _ in PROMPTS]  # for each prompt, of each scale: [steps words 4 4]
    for scale in SCALES:
        with minisd.record_attention(sd) as maps:
            options = {"steps": STEPS, "guidance_scale": float(scale), "sampler": "dpmpp_2m", "seed": 0}
            trajectory = sd.txt2img(PROMPTS, **options).trajectory
        for by_step in (trajectory.x_t_images(), trajectory.x0_images()):
            for row, images in zip(rows, zip(*by_step, strict=True), strict=True):
                row += images
        for k, prompt in enumerate(PROMPTS):
            at = [[maps.at(i, LAYER, word, picture=k) for word in words(prompt)] for i in range(STEPS)]
            looks[k].append(torch.stack([torch.stack(step) for step in at]))

    drawings = []
    for k, prompt in enumerate(PROMPTS):
        weights = torch.stack(looks[k])  # [scales steps words 4 4]
        peaks = weights.amax((0, 1, 3, 4))
        shades = (weights / peaks[:, None, None] * 255).round().to(torch.uint8)
        drawings.append({
            "prompt": prompt,
            "sheet": f"play_{k}.webp",
            "words": words(prompt),
            "peaks": [round(peak, 4) for peak in peaks.tolist()],  # the weight that 255 stands for
            "maps": base64.b64encode(shades.numpy().tobytes()).decode(),
        })  # fmt: skip
    data = {"scales": SCALES, "timesteps": maps.timesteps, "drawings": drawings}
    return [sheet(row, columns=STEPS, gap=0) for row in rows], data


def words(prompt: str) -> list[str]:
    return ["<start>", *prompt.replace(",", " ,").split(), "<end>", "<pad>"]


if __name__ == "__main__":
    key = key()
    if not is_drawn(key):
        print("drawing the pictures of the page `play` (under a minute, once)", flush=True)
        FOLDER.mkdir(exist_ok=True)
        sheets, data = draw()
        for drawing, picture in zip(data["drawings"], sheets, strict=True):
            picture.save(FOLDER / drawing["sheet"], lossless=True, method=4)
        # A script, not JSON: a page that is opened as a file may not fetch, but it may load scripts. Written last: a
        # build that was interrupted has no key.
        (FOLDER / "play_data.js").write_text(f"// {key}\nconst PLAY = {json.dumps(data)};\n", "utf-8")
