"""The live page: Stable Diffusion in JavaScript, running in the reader's browser. It draws the picture of `txt2img`.

The engine's files are read beside the modules of the same names: noising.js, tokenizer.js, clip.js, attention.js,
unet.js, vae.js, sampling.js, latent_diffusion.js. Below them are layers.js (convolution, norms), gemm.js with gemm.wat
(the matrix product, in WebAssembly) and safetensors.js; above them worker.js (the messages, explained at its top) and
live.js, which is what a page uses. The page itself is index.html with page.js, panels.js, figures.js and page.css; its
guided tour is tour.js and tour.css, with all texts in tour.json.
"""

import base64
import io
import json
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from ..checkpoint import files
from ..clip import CLIPTextConfig
from ..instruments.attention_maps import record_attention
from ..latent_diffusion import LatentDiffusion
from ..pictures import sheet
from ..vae import AutoencoderConfig

HERE = Path(__file__).parent
# In the order in which a page has to load them: each uses those before it.
SCRIPTS = [
    "gemm.js", "layers.js", "attention.js", "unet.js", "clip.js", "vae.js", "noising.js", "sampling.js",
    "safetensors.js", "tokenizer.js", "latent_diffusion.js", "worker.js", "live.js",
]  # fmt: skip
PAGE = ["figures.js", "panels.js", "page.js", "page.css", "tour.js", "tour.css", "index.html"]
PIECE = 3 << 20  # bytes of the weights in one script, a multiple of 3 so that base64 needs no padding in between
BLOCKS = re.compile(r"time_embed|(input|output)_blocks\.\d+|middle_block")  # of the UNet, which the tour shows
MOST_BYTES = 200 << 20  # of weights. In float32, as they are computed with, they may take twice as much of a tab


def check(sd: LatentDiffusion, model: Path) -> None:
    """Raise a ValueError if the engine can't draw with the model that this minisd folder holds."""
    config, size = sd.config, (model / "model.safetensors").stat().st_size
    kinds = type(config.cond_stage), type(config.first_stage)  # a VQConfig is an AutoencoderConfig, too
    if kinds != (CLIPTextConfig, AutoencoderConfig) or config.concat_channels or sd.cond_stage_model.tokenizer.added:
        raise ValueError(
            f"a page can't draw with {model}: it needs a model that reads prompts and has a KL autoencoder, is not for "
            "inpainting, and has learned no words by textual inversion"
        )
    if size > MOST_BYTES:
        raise ValueError(
            f"the weights of {model} have {size >> 20:,} MB, and a page can hold {MOST_BYTES >> 20}: give a smaller "
            "model, or halve its weights by `minisd convert --dtype fp16`"
        )


def record(sd: LatentDiffusion, prompt: str) -> dict:
    """A drawing as numbers and pictures, which the page shows before it has loaded the model."""
    options = {"prompt": prompt, "steps": 25, "sampler": "dpmpp_2m", "seed": 0}
    blocks: dict[str, list[torch.Tensor]] = {}
    with record_attention(sd) as maps, ExitStack() as hooks:
        for name, block in sd.model.diffusion_model.named_modules():
            if BLOCKS.fullmatch(name):  # of the batch, the last picture has the prompt
                keep = partial(lambda kept, _, inputs, out: kept.append(out[-1]), blocks.setdefault(name, []))
                hooks.enter_context(block.register_forward_hook(keep))
        trajectory = sd.txt2img(**options, guidance_scale=4.0).trajectory
    # All x_t in a row, decoded, and below them all x̂_0.
    film, frames = io.BytesIO(), [*trajectory.x_t_images(), *trajectory.x0_images()]
    sheet([images[0] for images in frames], columns=len(trajectory), gap=0).save(film, "webp", lossless=True)
    # The page shows the padding as one, so that the mean of its maps can stand for each: [k h w] instead of [n h w].
    k = [*maps.tokens[:-1], "<pad>"].index("<pad>")
    each = {layer: [maps.at(i, layer) for i in range(len(trajectory))] for layer in maps.layers}
    attention = {layer: [torch.cat([m[:k], m[k:].mean(0, keepdim=True)]) for m in each[layer]] for layer in each}
    latents = [torch.cat([step.x_t, step.eps_cond, step.eps_uncond]) for step in trajectory.steps]
    tokens = sd.cond_stage_model.tokenizer([prompt], sd.cond_stage_model.max_length)
    return {
        "request": options | {"guidance": 4},
        "shape": list(latents[0].shape[1:]),
        "timesteps": maps.timesteps,
        "tokens": {"ids": tokens.ids[0].tolist(), "pieces": maps.tokens, "lost": tokens.lost[0]},
        "context": _packed(sd.get_learned_conditioning([prompt])[0].T),  # [d n]
        "latents": _packed(torch.stack(latents)),  # [steps 3 c h w]: x_t, ε with the prompt, and ε without
        # By layer or block, because their maps have different sizes: [steps k h w], and [steps c h w].
        "attention": {layer: _packed(torch.stack(read)) for layer, read in attention.items()},
        "activations": {name: _packed_channel(torch.stack(maps)) for name, maps in blocks.items()},
        "film": f"data:image/webp;base64,{base64.b64encode(film.getvalue()).decode()}",
    }


def _packed(x: torch.Tensor) -> dict:
    """A tensor as integers of 16 bits, in base64, and what 1 stands for."""
    one = float(x.abs().max()) / 32767
    numbers = (x / one).round().to(torch.int16).contiguous().numpy()
    return {"shape": list(x.shape), "one": one, "numbers": base64.b64encode(numbers.tobytes()).decode()}


def _packed_channel(x: torch.Tensor) -> dict:
    """Of what a block returns at each step [steps c h w], the channel that varies most. All would be too much.

    The time embedding [steps c] stays whole.
    """
    if x.ndim == 2:
        return {"c": x.shape[1]} | _packed(x[:, :, None, None])
    most = x.flatten(2).std(2, correction=0).argmax(1)
    return {"c": x.shape[1]} | _packed(x[range(len(x)), most][:, None])


def write_model_scripts(model: Path, folder: Path, name: str = "", recordings: Sequence[dict] = ()) -> None:
    """Write a minisd folder as scripts, which a page can load where it may not fetch: from a file.

    recording.js says what the model is, and recording_0.js, recording_1.js … are drawings of it. The rest is loaded
    when something is to be drawn: model.js, with the tokenizer, and weights_0.js, weights_1.js … in base64.
    """
    config = json.loads((model / "config.json").read_text("utf-8"))
    tokenizer, special = model / "tokenizer", model / "tokenizer" / "tokenizer_config.json"
    weights = (model / "model.safetensors").read_bytes()
    pieces = [weights[i : i + PIECE] for i in range(0, len(weights), PIECE)]
    tokens = {
        "vocab": json.loads((tokenizer / "vocab.json").read_text("utf-8")),
        "merges": (tokenizer / "merges.txt").read_text("utf-8"),
        "config": json.loads(special.read_text("utf-8")) if special.exists() else None,
    }
    prompts = [recording["request"]["prompt"] for recording in recordings]
    about = {"name": name or model.name, "bytes": len(weights) * 4 // 3, "config": config, "prompts": prompts}
    sizes = {"pieces": len(pieces), "size": PIECE, "bytes": len(weights)}
    scripts = {"model.js": {"config": config, "tokenizer": tokens} | sizes}
    scripts |= {f"weights_{i}.js": base64.b64encode(piece).decode() for i, piece in enumerate(pieces)}
    scripts |= {"recording.js": about}
    scripts |= {f"recording_{i}.js": recording for i, recording in enumerate(recordings)}
    for script, content in scripts.items():
        (folder / script).write_text(f"globalThis.minisdModel = {json.dumps(content)};\n", "utf-8")


def write_page(model: Path, folder: Path, name: str = "", recordings: Sequence[dict] = ()) -> None:
    """Write a folder that draws with the model in a minisd folder, opened as a file or served. Whole or not at all.

    name: what --model of the command line has to be to load the same model.
    """
    with files.folder_written_whole(folder.resolve()) as unfinished:
        for file in [*SCRIPTS, *PAGE]:
            shutil.copyfile(HERE / file, unfinished / file)
        texts = (HERE / "tour.json").read_text("utf-8")
        (unfinished / "tour_texts.js").write_text(f"globalThis.minisdTour = {texts.strip()};\n", "utf-8")
        (unfinished / "model").mkdir()
        write_model_scripts(model, unfinished / "model", name, recordings)
