"""Check a CompVis file on this machine: are all layers as in diffusers? The report has one page, to be sent to us.

    minisd verify v1-5-pruned-emaonly.ckpt

The file is read twice: by minisd, and by the classes of diffusers and transformers, for which diffusers' own reader of
CompVis files translates the names. So a mistake in how minisd reads would show, too. The layers are compared on the
CPU, because GPUs round differently. Then one picture is drawn.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint import diffusers, find_device, load, read_weights
from ..latent_diffusion import LatentDiffusion
from .comparison import compare

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "diffusers", "transformers")
PROMPT = "a photograph of an astronaut riding a horse"


def verify(path: str | Path, picture: Path, config: str | Path | None = None, device: str | None = None) -> str:
    """Compare, draw, and return the report. Raises what `load` raises if the file can't be read."""
    device, began = find_device(device), time.perf_counter()
    sd, state = load(path, "cpu", config=config, use_ema=False), read_weights(path, check=False)
    names = "\n".join(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in sorted(state.items()))
    installed = [name for name in PACKAGES if importlib.util.find_spec(name)]
    report = {
        "read": f"in {time.perf_counter() - began:.1f} s, as {sd.config}",
        "tensors": f"{len(state):,}; sha256 of their names and shapes {hashlib.sha256(names.encode()).hexdigest()}",
        "machine": f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores, {device}",
        "packages": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in installed),
    }
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    report["file"] = f"{path}, {os.path.getsize(path):,} bytes, sha256 {digest}"
    if {"diffusers", "transformers"} <= set(installed):
        report |= compare_with_diffusers(sd, state)
    else:
        report["layers"] = "not compared, because diffusers and transformers are not installed"
    began = time.perf_counter()
    out = sd.to(device).txt2img(PROMPT, steps=20, guidance_scale=7.5, seed=42)
    out.images[0].save(picture)
    report["picture"] = (
        f"{picture}, {PROMPT!r} in {time.perf_counter() - began:.1f} s; its numbers have the mean "
        f"{out.pictures.mean():.4f} and the standard deviation {out.pictures.std():.4f}"
    )
    if importlib.util.find_spec("resource"):  # not on Windows
        import resource

        report["memory"] = f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:,} kB (bytes on a Mac)"
    return "\n".join(f"{name:<11}{text}" for name, text in report.items())


def compare_with_diffusers(sd: LatentDiffusion, state: dict[str, Tensor]) -> dict[str, str]:
    """A sentence for each part: the largest difference of all layers, or the first layer that differs."""
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as reader

    configs = diffusers.write_config(sd.config, sd.cond_stage_model.tokenizer)
    unet = UNet2DConditionModel.from_config(configs["unet/config.json"])
    vae = AutoencoderKL.from_config(configs["vae/config.json"])
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**configs["text_encoder/config.json"]))
    _fill(unet, reader.convert_ldm_unet_checkpoint(state, unet.config))
    _fill(vae, reader.convert_ldm_vae_checkpoint(state, vae.config))
    _fill(text, reader.convert_ldm_clip_checkpoint(state))
    # A latent of 8x8 shows the same mistakes as one of 64x64, and takes a fraction of the time and memory.
    random, f = torch.Generator().manual_seed(0), sd.config.first_stage.downsampling
    x, t = torch.randn(1, sd.config.unet.in_channels, 8, 8, generator=random), torch.tensor([500])
    image = torch.randn(1, 3, 8 * f, 8 * f, generator=random)
    ids, context = sd.cond_stage_model.tokenize([PROMPT]), sd.get_learned_conditioning([PROMPT])
    comparisons = {
        "text tower": compare(sd.cond_stage_model.transformer, text, ids),
        "UNet": compare(sd.model.diffusion_model, unet, (x, t, context)),
        "encoder": compare(sd.first_stage_model.encode, vae.encode, image),
        "decoder": compare(sd.first_stage_model.decode, vae.decode, x[:, : sd.config.first_stage.embed_dim]),
    }
    report = {}
    for part, found in comparisons.items():
        largest = max((row.relative for row in found.rows if row.difference >= 0), default=float("nan"))
        verdict = "as in diffusers" if found.equal else f"DIFFERS: {' '.join(found.conclusion.split())}"
        report[part] = f"{verdict} ({len(found.rows)} layers, largest relative difference {largest:.1e})"
    return report


def _fill(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load all weights. Version 5 of transformers leaves `text_model.` out of the names."""
    own = network.eval().state_dict()
    state = {name if name in own else name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    network.load_state_dict({name: tensor for name, tensor in state.items() if not name.endswith("position_ids")})
