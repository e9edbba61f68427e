"""The folder of diffusers: five parts, each with its own files and with names of its own.

    model_index.json                    which class each part is of
    unet/ vae/                          config.json, diffusion_pytorch_model.safetensors
    text_encoder/                       config.json, model.safetensors
    tokenizer/                          vocab.json and merges.txt, or tokenizer.json
    scheduler/                          scheduler_config.json: the noise schedule

It is read and written without diffusers: the names of the layers are one table, made by walking over the network, and
serve both directions. The weights may lie in one file or in several (an index says where), in `.safetensors` or `.bin`,
and in a variant ("fp16").

diffusers: `pipelines/stable_diffusion/pipeline_stable_diffusion.py`, `models/unets/unet_2d_condition.py`,
`models/autoencoders/autoencoder_kl.py`.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import SpatialTransformer
from ..clip import BPETokenizer, CLIPTextConfig
from ..latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from ..unet import Downsample, ResBlock, UNetConfig, UNetModel, Upsample
from ..vae import AttnBlock, AutoencoderConfig, AutoencoderKL, ResnetBlock
from . import files
from .files import CheckpointError

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

# The same thing in two languages.
SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}

# "must": what the configurations may say of other models, and what it has to be here (it is so where it is left out);
# "pipeline": what model_index.json says; "ddim": the settings with which diffusers' DDIM takes the same steps as ours.
FIXED = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))


# --- reading ----------------------------------------------------------------------------------------------------------


def read_folder(
    folder: Path, device: str | torch.device, dtype: torch.dtype, variant: str | None = None
) -> LatentDiffusion:
    """The model in a folder of diffusers' layout.

    Raises:
        FileNotFoundError: a part is missing. CheckpointError: a part is broken, or is not of Stable Diffusion v1.
    """
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}: Stable Diffusion v1 in diffusers' layout has "
            f"{', '.join(PARTS)}"
        )
    config, tokenizer = read_config(folder), files.read_tokenizer(folder / "tokenizer")
    sd = files.build(config, tokenizer, folder)
    variant = _variant(folder, variant)
    for part, (network, names) in parts_of(sd).items():
        source, today = folder / part, _text_name if part == "text_encoder" else _layer_name
        given = read_part(source, variant)
        state = {today(name): tensor for name, tensor in given.items() if not files.set_aside(name)}
        expected = {theirs: _as_theirs(ours, network.get_parameter(ours)).shape for ours, theirs in names.items()}
        files.check_names(expected, {name: tensor.shape for name, tensor in state.items()}, source)
        ours = {ours: state[theirs].reshape(network.get_parameter(ours).shape) for ours, theirs in names.items()}
        files.load_weights(network, ours, source, device, dtype)
    return sd.eval()


def read_config(folder: Path) -> LatentDiffusionConfig:
    """The four configurations in a folder as one.

    Raises:
        FileNotFoundError, CheckpointError: as `read_folder`.
    """
    unet, vae, text = (files.read_json(folder / part / "config.json") for part in ("unet", "vae", "text_encoder"))
    scheduler = files.read_json(folder / "scheduler" / "scheduler_config.json")
    with files.refused_as(f"the configurations in {folder} do not describe a model", IndexError, ZeroDivisionError):
        return _config(unet, vae, text, scheduler, folder)


def _config(unet: dict, vae: dict, text: dict, scheduler: dict, folder: Path) -> LatentDiffusionConfig:
    text = text.get("text_config", text)  # that of a whole CLIPModel
    for part, config in (("unet", unet), ("vae", vae), ("text_encoder", text), ("scheduler", scheduler)):
        for key, value in FIXED["must"][part].items():
            if config.get(key, value) != value:
                raise CheckpointError(
                    f"{folder / part} has {key}: {config[key]!r}, and Stable Diffusion v1 has {value!r}"
                )
    channels, down, up = unet["block_out_channels"], unet["down_block_types"], unet["up_block_types"]
    attends = _attends(down, up, "CrossAttn", ("DownBlock2D", "UpBlock2D"), folder / "unet")
    if any(c % channels[0] for c in channels):
        raise CheckpointError(f"{folder / 'unet'} has levels of {channels} channels, no multiples of the first")
    first_stage = AutoencoderConfig(
        in_channels=vae["in_channels"],
        out_ch=vae["out_channels"],
        ch=vae["block_out_channels"][0],
        ch_mult=tuple(c // vae["block_out_channels"][0] for c in vae["block_out_channels"]),
        num_res_blocks=vae["layers_per_block"],
        z_channels=vae["latent_channels"],
        embed_dim=vae["latent_channels"],
        **_vae_attention(vae, folder / "vae"),
    )
    schedule, prediction = scheduler.get("beta_schedule", "linear"), scheduler.get("prediction_type", "epsilon")
    if schedule not in SCHEDULES or prediction not in PREDICTIONS:
        raise CheckpointError(f"{folder / 'scheduler'} has the schedule {schedule!r} and predicts {prediction!r}")
    return LatentDiffusionConfig(
        unet=UNetConfig(
            in_channels=unet["in_channels"],
            out_channels=unet["out_channels"],
            model_channels=channels[0],
            num_res_blocks=unet["layers_per_block"],
            channel_mult=tuple(c // channels[0] for c in channels),
            attention_resolutions=tuple(2**level for level, attend in reversed(list(enumerate(attends))) if attend),
            transformer_depth=unet.get("transformer_layers_per_block", 1),
            context_dim=unet["cross_attention_dim"],
            dropout=unet.get("dropout", 0.0),
            **_heads(unet, channels, attends, folder / "unet"),
        ),
        first_stage=first_stage,
        cond_stage=CLIPTextConfig(
            vocab_size=text["vocab_size"],
            max_length=text["max_position_embeddings"],
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            projection_dim=text.get("projection_dim") or text["hidden_size"],
        ),
        image_size=_side(unet.get("sample_size") or 64) * first_stage.downsampling,
        scale_factor=vae.get("scaling_factor", 0.18215),
        beta_schedule=SCHEDULES[schedule],
        linear_start=scheduler.get("beta_start", 1e-4),
        linear_end=scheduler.get("beta_end", 2e-2),
        timesteps=scheduler.get("num_train_timesteps", 1000),
        parameterization=PREDICTIONS[prediction],
    )


def _heads(unet: Mapping[str, Any], channels: list[int], attends: list[bool], folder: Path) -> dict[str, int | None]:
    """The number of heads, which diffusers calls `attention_head_dim`: one number for all levels, or one for each."""
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim", 8)
    heads = [heads] * len(channels) if isinstance(heads, int) else list(heads)
    # where there is no attention, the number says nothing; in the middle, it is the last level's
    counts = [(h, c) for h, c, attend in zip(heads, channels, [*attends[:-1], True], strict=True) if attend]
    if len({h for h, _ in counts}) == 1:
        return {"num_heads": counts[0][0], "num_head_channels": None}
    for width in range(1, channels[0] + 1):
        if all(c // width == h for h, c in counts):
            return {"num_heads": None, "num_head_channels": width}
    raise CheckpointError(f"{folder} has {heads} heads at {channels} channels: neither equally many nor equally wide")


def _vae_attention(vae: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    down, up = vae["down_block_types"], vae["up_block_types"]
    attends = _attends(down, up, "Attn", ("DownEncoderBlock2D", "UpDecoderBlock2D"), folder)
    side = 2 ** (len(down) + 7)  # any size whose halves have all different sides
    return {"resolution": side, "attn_resolutions": tuple(side // 2**i for i, attend in enumerate(attends) if attend)}


def _attends(down: list[str], up: list[str], mark: str, plain: tuple[str, str], folder: Path) -> list[bool]:
    """At which levels there is attention, by the names of their blocks on the way down; on the way up, the same."""
    attends = [kind == mark + plain[0] for kind in down]
    for kinds, name, order in ((down, plain[0], attends), (up, plain[1], attends[::-1])):
        if list(kinds) != [mark + name if attend else name for attend in order]:
            raise CheckpointError(f"{folder} is built of {', '.join([*down, *up])}, not as Stable Diffusion v1 is")
    return attends


def _side(sample_size) -> int:
    return sample_size if isinstance(sample_size, int) else max(sample_size)


# --- files of a part --------------------------------------------------------------------------------------------------


STEMS = {  # of the files, by the part that they are of; transformers has another for .bin
    "unet": ("diffusion_pytorch_model",), "vae": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
}  # fmt: skip


def read_part(folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    """The weights of one part, from one file or several.

    Raises:
        FileNotFoundError: none there, or one of several is missing.
    """
    file = find_weights(folder, variant)
    if file is None:
        raise FileNotFoundError(f"there are no weights{f' of the variant {variant}' if variant else ''} in {folder}")
    if file.suffix != ".json":
        return files.read_weights(file)
    state: dict[str, Tensor] = {}
    shards = files.read_json(file).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{file} does not say in which file each tensor is (weight_map)")
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:  # an index says which file beside it, and no other place
            raise CheckpointError(f"{file} points out of its folder, to {shard}")
        state |= files.read_weights(folder / shard)
    return state


def find_weights(folder: Path, variant: str | None = None) -> Path | None:
    """The file of a part's weights, or the index of its files: .safetensors before .bin, the variant if it is there."""
    stems = STEMS[folder.name]
    for kind in (f".{variant}", "") if variant else ("",):
        for stem, suffix in [(stem, s) for s in (".safetensors", ".bin") for stem in stems]:
            mark = kind.removeprefix(".")
            for name in (f"{stem}{kind}{suffix}", f"{stem}{suffix}.index{mark and '.' + mark}.json"):
                if (folder / name).is_file():
                    return folder / name
    return None


def _variant(folder: Path, variant: str | None) -> str | None:
    """The variant, if any part has it; a part without it takes its ordinary weights, with a warning."""
    if variant is None:
        return None
    networks = ("unet", "vae", "text_encoder")
    found = {part: find_weights(folder / part, variant) for part in networks}
    without = [part for part in networks if found[part] is not None and f".{variant}" not in found[part].name]
    if len(without) == len(networks):
        raise FileNotFoundError(f"{folder} has no weights of the variant {variant!r}: leave variant out")
    if without:
        warnings.warn(f"{folder} has no {variant} weights for {' and '.join(without)}; took the others", stacklevel=4)
    return variant


def fetch(name: str, variant: str | None = None) -> Path:
    """Bring a model of the Hugging Face hub, "owner/name", and return the folder that it lies in.

    Only what is read is fetched. What was fetched once is not fetched again; HF_HUB_OFFLINE=1 never asks.

    Raises:
        FileNotFoundError: no such model, or no way to it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def patterns(suffix: str) -> list[str]:
        marks = ([f".{variant}"] if variant else []) + [""]
        ends = [mark + shard for mark in marks for shard in ("", "-0*-of-0*")]
        return [f"{part}/{stem}{end}{suffix}" for part, stems in STEMS.items() for stem in stems for end in ends]

    about = ["model_index.json", *(f"{part}/*.json" for part in PARTS), "tokenizer/*.txt"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=about + patterns(".safetensors")))
        if (folder / "unet").is_dir() and find_weights(folder / "unet", variant) is None:  # as in 2022
            folder = Path(snapshot_download(name, allow_patterns=about + patterns(".bin")))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"there is no model at {name}, neither as a file or folder nor on the hub ({reason[:160]})"
        ) from None
    return folder


# --- names ------------------------------------------------------------------------------------------------------------

# Inside a block: what CompVis calls a layer, and what diffusers calls it. What is not named is called the same.
RES_BLOCK = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
VAE_RES_BLOCK = {"nin_shortcut": "conv_shortcut"}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# … and what diffusers called it in 2022.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def parts_of(sd: LatentDiffusion) -> dict[str, tuple[nn.Module, dict[str, str]]]:
    """The three networks under diffusers' names, and for each the names of its tensors, by ours."""
    return {
        "unet": (sd.model.diffusion_model, unet_names(sd.model.diffusion_model)),
        "vae": (sd.first_stage_model, vae_names(sd.first_stage_model)),
        "text_encoder": (sd.cond_stage_model.transformer, {n: n for n in sd.cond_stage_model.transformer.state_dict()}),
    }


def unet_names(unet: UNetModel) -> dict[str, str]:
    """{our name: diffusers' name} of each tensor of a UNet.

    CompVis numbers the blocks through, input_blocks.0 … 11; diffusers counts by level, and within a level by kind.
    """
    names = {
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
        "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
    }  # fmt: skip
    for way, blocks in (("down", "input_blocks"), ("up", "output_blocks")):
        level = count = 0
        for i, block in enumerate(getattr(unet, blocks)):
            kinds = {ResBlock: f"resnets.{count}", SpatialTransformer: f"attentions.{count}",
                     Downsample: "downsamplers.0", Upsample: "upsamplers.0"}  # fmt: skip
            for j, layer in enumerate(block):
                if type(layer) in kinds:  # input_blocks.0 is a convolution, named above
                    names[f"{blocks}.{i}.{j}"] = f"{way}_blocks.{level}.{kinds[type(layer)]}"
            if isinstance(block[-1], Downsample | Upsample):
                level, count = level + 1, 0
            elif isinstance(block[0], ResBlock):
                count += 1
    return _translated(unet, names, {ResBlock: RES_BLOCK, Downsample: {"op": "conv"}})


def vae_names(vae: AutoencoderKL) -> dict[str, str]:
    """{our name: diffusers' name} of each tensor of an autoencoder. diffusers numbers the decoder as it runs."""
    names = {}
    last = len(vae.config.ch_mult) - 1
    for level in range(last + 1):
        for half, ours, theirs in (
            ("encoder", f"encoder.down.{level}", f"encoder.down_blocks.{level}"),
            ("decoder", f"decoder.up.{level}", f"decoder.up_blocks.{last - level}"),
        ):
            for j in range(vae.config.num_res_blocks + (half == "decoder")):
                names[f"{ours}.block.{j}"] = f"{theirs}.resnets.{j}"
                names[f"{ours}.attn.{j}"] = f"{theirs}.attentions.{j}"
            names[f"{ours}.downsample"] = f"{theirs}.downsamplers.0"
            names[f"{ours}.upsample"] = f"{theirs}.upsamplers.0"
    for half in ("encoder", "decoder"):
        names |= {f"{half}.mid.block_{i}": f"{half}.mid_block.resnets.{i - 1}" for i in (1, 2)}
        names |= {f"{half}.mid.attn_1": f"{half}.mid_block.attentions.0", f"{half}.norm_out": f"{half}.conv_norm_out"}
    return _translated(vae, names, {ResnetBlock: VAE_RES_BLOCK, AttnBlock: VAE_ATTENTION})


def _translated(
    network: nn.Module, names: Mapping[str, str], inside: Mapping[type, Mapping[str, str]]
) -> dict[str, str]:
    """Each tensor's name: the part that `names` has, translated, and behind it what `inside` has for such a block."""
    table = {}
    for ours in network.state_dict():
        parts = ours.split(".")
        cuts = [i for i in range(len(parts), 0, -1) if ".".join(parts[:i]) in names]
        if not cuts:
            table[ours] = ours
            continue
        block, rest = ".".join(parts[: cuts[0]]), ".".join(parts[cuts[0] :])
        words = inside.get(type(network.get_submodule(block)), {})
        layer, _, kind = rest.rpartition(".")
        table[ours] = f"{names[block]}.{words[layer]}.{kind}" if layer in words else f"{names[block]}.{rest}"
    return table


def _layer_name(name: str) -> str:
    """The name of a layer as diffusers calls it today."""
    *place, layer, kind = ["", *name.split(".")]
    layer = OLD_NAMES.get(layer, layer) if "attentions" in place else layer
    return ".".join([*place, layer, kind]).lstrip(".")


def _text_name(name: str) -> str:
    """The name of a tensor of the text tower with `text_model.` before it, which transformers 5 leaves out."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def _as_theirs(name: str, tensor: Tensor) -> Tensor:
    """The VAE's attention projects by 1x1 convolutions in CompVis, by Linear layers, without the 1x1, in diffusers."""
    in_attention = any(part.startswith("attn") for part in name.split(".")) and "transformer_blocks" not in name
    return tensor.flatten(1) if in_attention and tensor.ndim == 4 else tensor


# --- writing ----------------------------------------------------------------------------------------------------------


def write_folder(sd: LatentDiffusion, folder: Path, dtype: torch.dtype | None) -> None:
    """Write a model so that `diffusers.StableDiffusionPipeline.from_pretrained(folder)` draws with it.

    Its scheduler is DDIM as `sd.txt2img` has it: the same steps, ending at ᾱ_0.

    Raises:
        ValueError: a model that diffusers' pipeline has no place for.
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
    configs = write_config(config, sd.cond_stage_model.tokenizer)
    with files.folder_written_whole(folder) as unfinished:
        for name, content in configs.items():
            files.write_json(content, unfinished / name)
        for part, (network, names) in parts_of(sd).items():
            state = {names[ours]: _as_theirs(ours, tensor) for ours, tensor in network.state_dict().items()}
            file = "model" if part == "text_encoder" else "diffusion_pytorch_model"
            files.write_weights(files.cast(state, dtype), unfinished / part / f"{file}.safetensors")
        sd.cond_stage_model.tokenizer.save(unfinished / "tokenizer", config.cond_stage.max_length)


def write_config(config: LatentDiffusionConfig, tokenizer: BPETokenizer) -> dict[str, dict]:
    """The JSON files of the folder, by their places in it."""
    vae = config.first_stage
    inpainting = "Inpaint" if config.concat_channels else ""
    index = {"_class_name": f"StableDiffusion{inpainting}Pipeline", **FIXED["pipeline"]}
    return {
        "model_index.json": index,
        "unet/config.json": {"sample_size": config.image_size // vae.downsampling, **unet_config_json(config.unet)},
        "vae/config.json": {
            "sample_size": config.image_size,
            "scaling_factor": config.scale_factor,
            **vae_config_json(vae),
        },
        "text_encoder/config.json": text_config_json(config.cond_stage, tokenizer),
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": config.timesteps,
            "beta_schedule": {ours: theirs for theirs, ours in SCHEDULES.items()}[config.beta_schedule],
            "beta_start": config.linear_start,
            "beta_end": config.linear_end,
            "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[config.parameterization],
            **FIXED["ddim"],
        },
    }


def unet_config_json(unet: UNetConfig) -> dict:
    """The config.json of a UNet2DConditionModel, except for the size of its latents."""
    channels = [unet.model_channels * mult for mult in unet.channel_mult]
    attends = [2**level in unet.attention_resolutions for level in range(len(channels))]
    heads = unet.num_heads if unet.num_head_channels is None else [unet.heads(c) for c in channels]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": channels,
        "layers_per_block": unet.num_res_blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "attention_head_dim": heads,  # which is their number
        "transformer_layers_per_block": unet.transformer_depth,
        "cross_attention_dim": unet.context_dim,
        "dropout": unet.dropout,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
    }


def vae_config_json(vae: AutoencoderConfig) -> dict:
    """The config.json of an AutoencoderKL, except for the size of its pictures and the scale factor of its latents."""
    attends = [vae.attends(level) for level in range(len(vae.ch_mult))]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": vae.in_channels,
        "out_channels": vae.out_ch,
        "latent_channels": vae.embed_dim,
        "block_out_channels": [vae.ch * mult for mult in vae.ch_mult],
        "layers_per_block": vae.num_res_blocks,
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)],
        "act_fn": "silu",
        "norm_num_groups": 32,
    }


def text_config_json(text: CLIPTextConfig, tokenizer: BPETokenizer) -> dict:
    """The config.json of a transformers CLIPTextModel."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_length,
        "hidden_size": text.width,
        "intermediate_size": 4 * text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "projection_dim": text.projection_dim,
        "bos_token_id": tokenizer.start_token,
        "eos_token_id": tokenizer.end_token,
        "pad_token_id": tokenizer.pad_token,
        **FIXED["must"]["text_encoder"],
    }
