"""diffusers' layout: a folder of five parts, each with its own files, and with other names for the layers.

    model_index.json                    which class each part is of
    unet/ vae/                          config.json, diffusion_pytorch_model.safetensors
    text_encoder/                       config.json, model.safetensors
    tokenizer/                          vocab.json and merges.txt, or tokenizer.json
    scheduler/                          scheduler_config.json: the noise schedule

minisd reads and writes it without diffusers. One table, which is made by walking over the network, translates the names
of the layers in both directions. The weights of a part are in one file, a `.safetensors` or a `.bin`, and a variant
such as "fp16" may be there, too.

diffusers: `pipelines/stable_diffusion/pipeline_stable_diffusion.py`, `models/unets/unet_2d_condition.py`,
`models/autoencoders/autoencoder_kl.py`.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..clip import BPETokenizer, CLIPTextConfig
from ..latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from ..unet import UNetConfig, UNetModel
from ..vae import AutoencoderConfig, AutoencoderKL
from . import files
from .files import CheckpointError

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

# The tables in diffusers.json:
#   stems      names of the files of weights of each part, without the suffix; transformers has another one for .bin
#   names      CompVis's name of a layer and diffusers' name, for each class of network or block; other names are equal
#   kinds      how diffusers calls all blocks of a class
#   blocks     diffusers' name of a level with attention begins with the first; then the names of a level down and up
#   old_names  the name that diffusers gave a layer in 2022, and the name that it gives it today
#   must       keys that have another value in other models, and the value that Stable Diffusion v1 has (the default)
#   fields     the fields of our configurations, and diffusers' keys for the same numbers
#   schedules, predictions: what diffusers calls a schedule or a prediction, and what minisd calls it
#   written    keys that are written before those of our fields, and after them; those of the scheduler make
#              diffusers' DDIM take the same steps as ours
#   left_out   further keys that a configuration may leave out, and the values that they then have
#   pipeline   the contents of model_index.json
FIXED = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
STEMS, OLD_NAMES = FIXED["stems"], FIXED["old_names"]
SCHEDULES, PREDICTIONS = FIXED["schedules"], FIXED["predictions"]


# --- reading ----------------------------------------------------------------------------------------------------------


def read_folder(
    folder: Path, device: str | torch.device, dtype: torch.dtype, variant: str | None = None
) -> LatentDiffusion:
    """The model in a folder of diffusers' layout.

    Raises:
        FileNotFoundError: a part is missing. CheckpointError: a part is broken, or is not that of Stable Diffusion v1.
    """
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}: Stable Diffusion v1 of diffusers has {', '.join(PARTS)}"
        )
    config, tokenizer = read_config(folder), files.read_tokenizer(folder / "tokenizer")
    given = {part: read_part(folder / part, variant) for part in STEMS}
    sd = files.build(config, tokenizer, folder, sum(map(len, given.values())))
    for part, (network, names) in parts_of(sd).items():
        source, today = folder / part, _text_name if part == "text_encoder" else _layer_name
        state = {today(name): tensor for name, tensor in given[part].items() if not files.set_aside(name)}
        expected = {theirs: _as_theirs(ours, network.get_parameter(ours)) for ours, theirs in names.items()}
        files.check_names(expected, state, source)
        ours = {ours: state[theirs].reshape(network.get_parameter(ours).shape) for ours, theirs in names.items()}
        files.load_weights(network, ours, source, device, dtype)
    return sd.eval()


def read_config(folder: Path) -> LatentDiffusionConfig:
    """Read the four configurations in a folder as one.

    Raises:
        FileNotFoundError, CheckpointError: as `read_folder`.
    """
    configs = {part: files.read_json(folder / part / "config.json") for part in STEMS}
    configs["scheduler"] = files.read_json(folder / "scheduler" / "scheduler_config.json")
    with files.refused_as(f"the configurations in {folder} do not describe a model"):
        return _config(configs, folder)


def _config(configs: dict[str, dict], folder: Path) -> LatentDiffusionConfig:
    configs["text_encoder"] = configs["text_encoder"].get("text_config", configs["text_encoder"])  # a whole CLIP
    for part, must in FIXED["must"].items():
        for key, value in must.items():
            if configs[part].get(key, value) != value:
                raise CheckpointError(
                    f"{folder / part} has {key}: {configs[part][key]!r}, and Stable Diffusion v1 has {value!r}"
                )
    unet, vae, text, scheduler = (FIXED["left_out"][part] | configs[part] for part in FIXED["must"])
    text["projection_dim"] = text.get("projection_dim") or text["hidden_size"]
    channels, attends = unet["block_out_channels"], _attends(unet, folder / "unet")
    if any(c % channels[0] for c in channels):
        raise CheckpointError(f"{folder / 'unet'} has levels of {channels} channels, no multiples of the first")
    resolution = 2 ** (len(vae["down_block_types"]) + 7)  # any side that can be halved at each level
    in_vae = [resolution // 2**level for level, attend in enumerate(_attends(vae, folder / "vae")) if attend]
    first_stage = AutoencoderConfig(
        ch=vae["block_out_channels"][0],
        ch_mult=tuple(c // vae["block_out_channels"][0] for c in vae["block_out_channels"]),
        resolution=resolution,
        attn_resolutions=tuple(in_vae),
        **_ours("vae", vae),
    )
    schedule, prediction = scheduler["beta_schedule"], scheduler["prediction_type"]
    if schedule not in SCHEDULES or prediction not in PREDICTIONS:
        raise CheckpointError(f"{folder / 'scheduler'} has the schedule {schedule!r} and predicts {prediction!r}")
    side = unet.get("sample_size") or 64
    return LatentDiffusionConfig(
        unet=UNetConfig(
            model_channels=channels[0],
            channel_mult=tuple(c // channels[0] for c in channels),
            attention_resolutions=tuple(2**level for level, attend in reversed(list(enumerate(attends))) if attend),
            **_ours("unet", unet),
            **_heads(unet, channels, attends, folder / "unet"),
        ),
        first_stage=first_stage,
        cond_stage=CLIPTextConfig(**_ours("text_encoder", text)),
        image_size=(side if isinstance(side, int) else max(side)) * first_stage.downsampling,
        scale_factor=vae["scaling_factor"],
        beta_schedule=SCHEDULES[schedule],
        parameterization=PREDICTIONS[prediction],
        **_ours("scheduler", scheduler),
    )


def _ours(part: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are numbers in both configurations, under our names."""
    return {ours: config[theirs] for ours, theirs in FIXED["fields"][part].items()}


def _theirs(part: str, config) -> dict[str, Any]:
    """The same fields of our configuration, under diffusers' names."""
    return {theirs: getattr(config, ours) for ours, theirs in FIXED["fields"][part].items()}


def _heads(unet: Mapping[str, Any], channels: list[int], attends: list[bool], folder: Path) -> dict[str, int | None]:
    """The number of heads, which diffusers calls `attention_head_dim`: one number for all levels, or one for each."""
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim", 8)
    heads = [heads] * len(channels) if isinstance(heads, int) else list(heads)
    # a level without attention does not use its number; the middle block uses that of the last level
    counts = [(h, c) for h, c, attend in zip(heads, channels, [*attends[:-1], True], strict=True) if attend]
    if len({h for h, _ in counts}) == 1:
        return {"num_heads": counts[0][0], "num_head_channels": None}
    for width in range(1, channels[0] + 1):
        if all(c // width == h for h, c in counts):
            return {"num_heads": None, "num_head_channels": width}
    raise CheckpointError(f"{folder} has {heads} heads at {channels} channels: neither equally many nor equally wide")


def _attends(config: Mapping[str, Any], folder: Path) -> list[bool]:
    """Which levels have attention, by the names of their down blocks. The up blocks must have it at the same levels."""
    mark, down, _ = FIXED["blocks"][folder.name]
    attends = [kind == mark + down for kind in config["down_block_types"]]
    if any(list(config[key]) != kinds for key, kinds in _block_types(folder.name, attends).items()):
        kinds = [*config["down_block_types"], *config["up_block_types"]]
        raise CheckpointError(f"{folder} is built of {', '.join(kinds)}, not as Stable Diffusion v1 is")
    return attends


def _block_types(part: str, attends: list[bool]) -> dict[str, list[str]]:
    """The names of the blocks of all levels, on the way down and on the way up."""
    mark, down, up = FIXED["blocks"][part]
    return {
        "down_block_types": [mark + down if attend else down for attend in attends],
        "up_block_types": [mark + up if attend else up for attend in reversed(attends)],
    }


# --- files of a part --------------------------------------------------------------------------------------------------


def read_part(folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    """The weights of one part.

    Raises:
        FileNotFoundError: there is no file with all of them.
    """
    file = find_weights(folder, variant)
    if file is None:
        which = f" of the variant {variant!r}" if variant else ""
        raise FileNotFoundError(f"there are no weights{which} in {folder}, or not in one file")
    return files.read_weights(file)


def find_weights(folder: Path, variant: str | None = None) -> Path | None:
    """The file of a part's weights, a .safetensors before a .bin."""
    names = (name for suffix in (".safetensors", ".bin") for name in _names(folder.name, variant, suffix))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _names(part: str, variant: str | None, suffix: str) -> list[str]:
    """What the file of a part's weights may be called."""
    return [f"{stem}.{variant}{suffix}" if variant else f"{stem}{suffix}" for stem in STEMS[part]]


def fetch(name: str, variant: str | None = None) -> Path:
    """Download a model from the Hugging Face hub, "owner/name", and return its folder.

    Only the files that are read are downloaded, and only once. With HF_HUB_OFFLINE=1, the hub is never asked.

    Raises:
        FileNotFoundError: there is no such model, or the hub can't be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def patterns(suffix: str) -> list[str]:
        return [f"{part}/{name}" for part in STEMS for name in _names(part, variant, suffix)]

    about = ["model_index.json", *(f"{part}/*.json" for part in PARTS), "tokenizer/*.txt"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=about + patterns(".safetensors")))
        if (folder / "unet").is_dir() and find_weights(folder / "unet", variant) is None:  # a model from 2022
            folder = Path(snapshot_download(name, allow_patterns=about + patterns(".bin")))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"there is no model at {name}, neither as a file or folder nor on the hub ({reason[:160]})"
        ) from None
    return folder


# --- names ------------------------------------------------------------------------------------------------------------


def parts_of(sd: LatentDiffusion) -> dict[str, tuple[nn.Module, dict[str, str]]]:
    """The three networks by diffusers' names, each with {our name: diffusers' name} of its tensors."""
    return {
        "unet": (sd.model.diffusion_model, unet_names(sd.model.diffusion_model)),
        "vae": (sd.first_stage_model, vae_names(sd.first_stage_model)),
        "text_encoder": (sd.cond_stage_model.transformer, {n: n for n in sd.cond_stage_model.transformer.state_dict()}),
    }


def unet_names(unet: UNetModel) -> dict[str, str]:
    """{our name: diffusers' name} of each tensor of a UNet.

    CompVis numbers all blocks in one sequence, input_blocks.0 … 11. diffusers numbers the levels, and in each level the
    layers of each kind.
    """

    def place(block: str, i: int, layer: int) -> tuple[str, int]:
        # input_blocks.0 is a convolution, which the table names. After it, the levels begin.
        way, first = ("down", 1) if block.startswith("input") else ("up", 0)
        level, count = divmod(i - first, unet.config.num_res_blocks + 1)
        return f"{way}_blocks.{level}", count

    return _translated(unet, "UNetModel", place)


def vae_names(vae: AutoencoderKL) -> dict[str, str]:
    """{our name: diffusers' name} of each tensor of an autoencoder.

    diffusers numbers the decoder's levels in the order in which they run, CompVis the other way round.
    """

    def place(block: str, level: int, count: int = 0) -> tuple[str, int]:
        if block.startswith("encoder"):
            return f"encoder.down_blocks.{level}", count
        return f"decoder.up_blocks.{len(vae.config.ch_mult) - 1 - level}", count

    return _translated(vae, "AutoencoderKL", place)


def _translated(network: nn.Module, kind: str, place: Callable[..., tuple[str, int]]) -> dict[str, str]:
    """Translate each tensor's name: first that of its block, then that of the layer in the block.

    place: given a block's name and the numbers in it, diffusers' name of its level, and which of its kind it is there.
    """
    blocks = dict(FIXED["names"][kind])
    for name, block in network.named_modules():
        if name not in blocks and (group := FIXED["kinds"].get(type(block).__name__)):
            level, count = place(name, *map(int, re.findall(r"\d+", name)))
            blocks[name] = f"{level}.{group}.{0 if group.endswith('samplers') else count}"
    names = {}
    for ours in network.state_dict():
        block = max((name for name in blocks if ours.startswith(f"{name}.")), key=len, default=None)
        if block is None:
            names[ours] = ours
            continue
        layer, dot, parameter = ours.removeprefix(f"{block}.").rpartition(".")
        layers = FIXED["names"].get(type(network.get_submodule(block)).__name__, {})
        names[ours] = f"{blocks[block]}.{layers.get(layer, layer)}{dot}{parameter}"
    return names


def _layer_name(name: str) -> str:
    """The name that diffusers uses for a layer today, given one of today or of 2022."""
    *place, layer, kind = ["", *name.split(".")]
    layer = OLD_NAMES.get(layer, layer) if "attentions" in place else layer
    return ".".join([*place, layer, kind]).lstrip(".")


def _text_name(name: str) -> str:
    """The name of a tensor of the text tower with `text_model.` before it, which transformers 5 leaves out."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def _as_theirs(name: str, tensor: Tensor) -> Tensor:
    """Drop the 1x1 of the VAE's attention projections: they are convolutions in CompVis, Linear layers in diffusers."""
    in_attention = any(part.startswith("attn") for part in name.split(".")) and "transformer_blocks" not in name
    return tensor.flatten(1) if in_attention and tensor.ndim == 4 else tensor


# --- writing ----------------------------------------------------------------------------------------------------------


def write_folder(sd: LatentDiffusion, folder: Path, dtype: torch.dtype | None) -> None:
    """Write a model so that `diffusers.StableDiffusionPipeline.from_pretrained(folder)` draws with it.

    Its scheduler is DDIM, set so that it takes the same steps as DDIM in `sd.txt2img`, down to ᾱ_0.

    Raises:
        ValueError: diffusers' pipeline can't run such a model.
    """
    config = sd.config
    kinds = (type(config.first_stage), type(config.cond_stage), type(getattr(sd.cond_stage_model, "tokenizer", None)))
    if kinds != (AutoencoderConfig, CLIPTextConfig, BPETokenizer):
        raise ValueError(
            "diffusers' StableDiffusionPipeline has an AutoencoderKL and reads prompts, and this model has "
            f"{', '.join(kind.__name__ for kind in kinds)}: save it in minisd's layout"
        )
    if not config.unet.use_spatial_transformer:
        raise ValueError("diffusers' StableDiffusionPipeline has a UNet that reads text: save it in minisd's layout")
    if config.first_stage.z_channels != config.first_stage.embed_dim or config.unet.channel_mult[0] != 1:
        raise ValueError(
            "diffusers has one number for z_channels and embed_dim, and for model_channels and the width of the first "
            "level; in this model they differ: save it in minisd's layout"
        )
    if (folder / "config.json").exists() and not (folder / "model_index.json").exists():
        raise FileExistsError(f"{folder} holds something else than a model in diffusers' layout: choose another folder")
    configs = write_config(config, sd.cond_stage_model.tokenizer)
    with files.folder_written_whole(folder) as unfinished:
        for name, content in configs.items():
            files.write_json(content, unfinished / name)
        for part, (network, names) in parts_of(sd).items():
            state = {names[ours]: _as_theirs(ours, tensor) for ours, tensor in network.state_dict().items()}
            files.write_weights(files.cast(state, dtype), unfinished / part / f"{STEMS[part][0]}.safetensors")
        sd.cond_stage_model.tokenizer.save(unfinished / "tokenizer", config.cond_stage.max_length)


def write_config(config: LatentDiffusionConfig, tokenizer: BPETokenizer) -> dict[str, dict]:
    """The contents of the folder's JSON files, by their paths in it."""
    vae, inpainting = config.first_stage, "Inpaint" if config.concat_channels else ""
    sizes = {"sample_size": config.image_size, "scaling_factor": config.scale_factor}
    schedule = {
        "beta_schedule": {ours: theirs for theirs, ours in SCHEDULES.items()}[config.beta_schedule],
        "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[config.parameterization],
    }
    return {
        "model_index.json": {"_class_name": f"StableDiffusion{inpainting}Pipeline", **FIXED["pipeline"]},
        "unet/config.json": {"sample_size": config.image_size // vae.downsampling, **unet_config_json(config.unet)},
        "vae/config.json": sizes | vae_config_json(vae),
        "text_encoder/config.json": text_config_json(config.cond_stage, tokenizer),
        "scheduler/scheduler_config.json": _written("scheduler", config, **schedule),
    }


def unet_config_json(unet: UNetConfig) -> dict:
    """The config.json of a UNet2DConditionModel, except for the size of its latents."""
    channels = [unet.model_channels * mult for mult in unet.channel_mult]
    attends = [2**level in unet.attention_resolutions for level in range(len(channels))]
    heads = unet.num_heads if unet.num_head_channels is None else [unet.heads(c) for c in channels]
    blocks = {"block_out_channels": channels, **_block_types("unet", attends)}
    return _written("unet", unet, **blocks, attention_head_dim=heads)  # despite its name, the number of heads


def vae_config_json(vae: AutoencoderConfig) -> dict:
    """The config.json of an AutoencoderKL, except for the size of its pictures and the scale factor of its latents."""
    attends = [vae.attends(level) for level in range(len(vae.ch_mult))]
    channels = [vae.ch * mult for mult in vae.ch_mult]
    return _written("vae", vae, block_out_channels=channels, **_block_types("vae", attends))


def text_config_json(text: CLIPTextConfig, tokenizer: BPETokenizer) -> dict:
    """The config.json of a transformers CLIPTextModel."""
    return _written(
        "text_encoder",
        text,
        intermediate_size=4 * text.width,
        bos_token_id=tokenizer.start_token,
        eos_token_id=tokenizer.end_token,
        pad_token_id=tokenizer.pad_token,
    )


def _written(part: str, config, **computed) -> dict:
    """What a part's JSON file says: its class, the fields of our configuration, what follows from them, constants."""
    first, last = FIXED["written"][part]
    return {**first, **_theirs(part, config), **computed, **last}
