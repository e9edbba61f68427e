"""CompVis checkpoints: one file with the names that minisd uses itself, and a YAML file that says what the model is.

    v1-5-pruned.ckpt      {"state_dict": {"model.diffusion_model.…", "first_stage_model.…", "cond_stage_model.…", …}}
    v1-inference.yaml     model.params: linear_start, …, unet_config, first_stage_config, cond_stage_config

The weights need no translation, because minisd uses the same names. The configuration is translated, and if it asks for
a part that minisd does not have, the error names that part. Writing makes both files. A CompVis YAML can't say how many
heads the text tower has, or hold a tokenizer, so if these differ from CLIP's, a folder with them is written beside it.

CompVis: `configs/stable-diffusion/v1-inference.yaml`, `ldm/util.py: instantiate_from_config`, `ldm/modules/ema.py`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..clip import BPETokenizer, CLIPTextConfig
from ..conditions import ClassConfig
from ..latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from ..noising import NoiseSchedule
from ..unet import UNetConfig
from ..vae import AutoencoderConfig, IdentityConfig
from ..vq import VQConfig
from . import files
from .diffusers import text_config_json
from .files import CheckpointError

# {CompVis's name of a schedule: our name}. CompVis's names mislead: its "linear" interpolates √β, and its "sqrt_linear"
# interpolates β itself.
BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}

# The classes that a YAML may name as its first stage.
FIRST_STAGES = {"AutoencoderKL": AutoencoderConfig, "VQModelInterface": VQConfig, "IdentityFirstStage": IdentityConfig}

# "model": values of model.params that a YAML may leave out, which are then the defaults of CompVis's class. "unet":
# keys that unet_config may have beside the fields of UNetConfig, with one value that minisd accepts ("must") or with
# any value ("ignored"), and the values of the fields that it leaves out ("left_out"), which are the defaults of
# CompVis's class, not those of SD v1. "modules": where CompVis's classes are. "networks": how the names of the three
# networks begin. "others": names that only other whole models have. "strangers": names in files that are no whole
# model, if they have no UNet of CompVis's.
TABLES = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))


# --- YAML → configuration ---------------------------------------------------------------------------------------------


def yaml_beside(path: Path) -> Path | None:
    """The YAML that lies beside a file of weights under the same name, as `write_file` leaves it there."""
    return next((yaml for suffix in (".yaml", ".yml") if (yaml := path.with_suffix(suffix)).is_file()), None)


def read_yaml(source: str | Path | Mapping) -> dict:
    """The `model.params` of a CompVis YAML, from its file or as the mapping that was read from it.

    Raises:
        FileNotFoundError: no such file. CheckpointError: it is not YAML, or does not describe a latent diffusion
            model.
    """
    import yaml

    name = "the configuration" if isinstance(source, Mapping) else str(source)
    if not isinstance(source, Mapping):
        if not Path(source).is_file():
            raise FileNotFoundError(f"there is no configuration at {source}")
        text = files.read_text(Path(source), most=50_000)  # CompVis's have 2 kB, and PyYAML is slow
        with files.refused_as(f"{name} is no YAML that can be read"):
            # A value can be repeated by an alias (*name). Aliases of aliases can make a few lines take up all memory,
            # and brackets in brackets all time.
            aliases = depth = 0
            for event in yaml.parse(text, yaml.SafeLoader):
                aliases += isinstance(event, yaml.AliasEvent)
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if max(aliases, depth) > 30:
                    raise ValueError("it has more than 30 aliases, or lists within lists")
            source = yaml.safe_load(text)  # safe_load runs no code
    try:
        model = source["model"]
        target, params = str(model["target"]), dict(model["params"])
        params["unet_config"], params["first_stage_config"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{name} does not describe a latent diffusion model: expected model.target and model.params with "
            "unet_config, first_stage_config and cond_stage_config, as in CompVis's v1-inference.yaml"
        ) from None
    _one_of(target, {"LatentDiffusion", "LatentInpaintDiffusion"}, "model.target", name)
    return params


def config_from_yaml(
    params: Mapping[str, Any], state: Mapping[str, Tensor], name: str, base: Path
) -> LatentDiffusionConfig:
    """The configuration that a CompVis YAML describes. Paths in the YAML are relative to the folder `base`.

    The YAML names a CLIP model and does not give the sizes of its text tower, so they are read off the weights.

    Raises:
        CheckpointError: the YAML asks for a part that minisd does not have. The message names it.
    """
    with files.refused_as(f"{name} does not describe a model"):
        unet = _unet(params["unet_config"]["params"], name)
        first_stage = _first_stage(params["first_stage_config"], name)
        given = {key: type(default)(params.get(key, default)) for key, default in TABLES["model"].items()}
        betas = params.get("beta_schedule", "linear")
        if betas not in BETA_SCHEDULES:
            raise CheckpointError(f"{name}: beta_schedule is {betas!r}; minisd knows {', '.join(BETA_SCHEDULES)}")
        given["beta_schedule"] = BETA_SCHEDULES[betas]
        # CompVis's image_size is that of the latent; v1's YAML has another in unet_config, which is not used
        given["image_size"] *= first_stage.downsampling
        cond_stage = _cond_stage(params, state, name, base)
        return LatentDiffusionConfig(unet=unet, first_stage=first_stage, cond_stage=cond_stage, **given)


def _unet(params: Mapping[str, Any], name: str) -> UNetConfig:
    own, must = [field.name for field in fields(UNetConfig)], TABLES["unet"]["must"]
    for key, value in params.items():
        if key in must and value != must[key] and value is not None:
            raise CheckpointError(f"{name}: unet_config has {key}: {value}, and minisd's UNet only {must[key]}")
        if key not in (*own, *must, *TABLES["unet"]["ignored"]):
            raise CheckpointError(f"{name}: unet_config has {key}: {value}, which minisd's UNet does not know")
    params = TABLES["unet"]["left_out"] | params
    given = {key: params[key] for key in own}
    if isinstance(given["context_dim"], list):  # some YAMLs have a list of one number
        (given["context_dim"],) = given["context_dim"]
    for key in ("num_heads", "num_head_channels"):  # CompVis writes -1 if the other one is given
        given[key] = None if given[key] == -1 else given[key]
    if given["num_head_channels"] is not None:
        given["num_heads"] = None
    return UNetConfig(**{key: _tuple(value) for key, value in given.items()})


def _first_stage(part: Mapping[str, Any], name: str) -> AutoencoderConfig | VQConfig | IdentityConfig:
    kind = FIRST_STAGES[_one_of(part["target"], FIRST_STAGES, "first_stage_config", name)]
    if kind is IdentityConfig:
        return kind()
    params = part["params"]
    known = {field.name for field in fields(kind)}
    given = {key: _tuple(value) for key, value in params["ddconfig"].items() if key in known}
    given |= {key: params[key] for key in ("embed_dim", "n_embed") if key in known}
    return kind(**given)


def _cond_stage(params: Mapping[str, Any], state: Mapping[str, Tensor], name: str, base: Path):
    part = params.get("cond_stage_config")
    if part is None or isinstance(part, str):  # "__is_unconditional__", "__is_first_stage__": no network of its own
        return None
    target = _one_of(part["target"], {"FrozenCLIPEmbedder", "ClassEmbedder"}, "cond_stage_config", name)
    if target == "ClassEmbedder":
        return ClassConfig(n_classes=part["params"].get("n_classes", 1000), embed_dim=part["params"]["embed_dim"])
    folder = tokenizer_folder(params, base)
    described = folder is not None and (folder / "config.json").is_file()
    return text_config(state, files.read_json(folder / "config.json")["num_attention_heads"] if described else None)


def tokenizer_folder(params: Mapping[str, Any], base: Path) -> Path | None:
    """The folder that a YAML gives as the `version` of its CLIP; None if that is a name on the hub, as it mostly is."""
    part = params.get("cond_stage_config")
    version = (part.get("params") or {}).get("version") if isinstance(part, Mapping) else None
    return None if version is None or not (base / str(version)).is_dir() else base / str(version)


def text_config(state: Mapping[str, Tensor], heads: int | None = None) -> CLIPTextConfig:
    """The configuration of a checkpoint's text tower, from the shapes of its weights; ViT-L/14's if it has none.

    The number of heads does not follow from the shapes. If it is left out, there is one head for every 64 channels, as
    in all of OpenAI's models.
    """
    prefix = "cond_stage_model.transformer.text_model."
    tokens = state.get(prefix + "embeddings.token_embedding.weight")
    positions = state.get(prefix + "embeddings.position_embedding.weight")
    if tokens is None or positions is None or tokens.ndim != 2 or positions.ndim != 2:
        return CLIPTextConfig()
    width = tokens.shape[1]
    return CLIPTextConfig(
        vocab_size=tokens.shape[0], max_length=positions.shape[0], width=width, projection_dim=width,
        layers=_count(state, prefix + "encoder.layers."), heads=heads or max(1, width // 64),
    )  # fmt: skip


def _one_of(target: str, known, where: str, name: str) -> str:
    kind = str(target).split(".")[-1]
    if kind not in known:
        raise CheckpointError(f"{name}: {where} names {target}, and minisd has only {', '.join(sorted(known))}")
    return kind


def _tuple(value):
    return tuple(value) if isinstance(value, list | tuple) else value


def _count(state: Mapping[str, Any], prefix: str) -> int:
    """How many modules are numbered after the prefix: `prefix0.…`, `prefix1.…`, …"""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


# --- configuration → YAML ---------------------------------------------------------------------------------------------


def yaml_from_config(config: LatentDiffusionConfig, version: str) -> str:
    """A CompVis YAML of a model. `version`: where its tokenizer is, relative to the YAML, or a name on the hub."""
    import yaml

    parts = json.loads(json.dumps(asdict(config)))  # with lists in the place of tuples
    side = config.image_size // config.first_stage.downsampling
    heads = {key: parts["unet"].pop(key) for key in ("num_heads", "num_head_channels")}
    unet = parts["unet"] | {"image_size": side}  # CompVis requires it, and ignores it
    unet |= {key: -1 if value is None else value for key, value in heads.items()} | {"legacy": False}
    target = {kind: name for name, kind in FIRST_STAGES.items()}[type(config.first_stage)]
    first_stage, condition = _part(target), config.cond_stage
    if not isinstance(config.first_stage, IdentityConfig):
        outside = {key: parts["first_stage"].pop(key, None) for key in ("embed_dim", "n_embed", "beta", "legacy")}
        own = {key: outside[key] for key in ("embed_dim", "n_embed") if outside[key] is not None}
        ddconfig = parts["first_stage"] | {"dropout": 0.0}
        first_stage = _part(target, **own, ddconfig=ddconfig, lossconfig={"target": "torch.nn.Identity"})
    if condition is None:
        cond_stage = "__is_unconditional__"
    elif isinstance(condition, CLIPTextConfig):
        cond_stage = _part("FrozenCLIPEmbedder", version=version, max_length=condition.max_length)
    elif isinstance(condition, ClassConfig):  # whose classes have no names in CompVis
        cond_stage = _part("ClassEmbedder", n_classes=condition.n_classes, embed_dim=condition.embed_dim)
    else:
        raise ValueError(
            f"CompVis's layout has no condition like {type(condition).__qualname__}: save the model as a folder"
        )
    ways_in = {(True, False): "crossattn", (False, True): "concat", (True, True): "hybrid", (False, False): None}
    model = {key: getattr(config, key) for key in TABLES["model"]} | {
        "beta_schedule": {ours: theirs for theirs, ours in BETA_SCHEDULES.items()}[config.beta_schedule],
        "image_size": side,
        "conditioning_key": ways_in[condition is not None, config.concat_channels > 0],
        "use_ema": False,
        "unet_config": _part("UNetModel", **unet),
        "first_stage_config": first_stage,
        "cond_stage_config": cond_stage,
    }
    return yaml.safe_dump({"model": _part("LatentDiffusion", **model)}, sort_keys=False)


def _part(name: str, **params) -> dict[str, Any]:
    return {"target": f"{TABLES['modules'][name]}.{name}", "params": params}


# --- weights ----------------------------------------------------------------------------------------------------------


def ema_names(state: Mapping[str, Tensor], source: str | Path) -> dict[str, str]:
    """{name of a tensor of the UNet: name of its running mean in the same file}.

    `LitEma` removes the dots from the UNet's names, because PyTorch allows none in the name of a buffer. The dots can't
    be put back, so each name is formed from that of the UNet's tensor: `model_ema.diffusion_modelinput_blocks00weight`.

    Raises:
        CheckpointError: the file has no EMA weights, or lacks some of them.
    """
    own = [name for name in state if name.startswith("model.diffusion_model.")]
    means = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in own}
    lacking = [name for name in own if means[name] not in state]
    if lacking:
        raise CheckpointError(
            f"{source} has no EMA weights for {len(lacking)} of {len(own)} tensors of the UNet ({lacking[0]}, …): "
            "load it with use_ema=False"
        )
    return means


def check_schedule(state: Mapping[str, Tensor], config: LatentDiffusionConfig, source: str | Path) -> None:
    """Compare the schedule that a file has in its buffers with that of the configuration.

    Raises:
        CheckpointError: they differ, so the weights were trained with other noise levels than they would be used with.
    """
    theirs = state.get("betas")
    ours = config.schedule().betas
    if theirs is None:
        return
    # A file in half precision may have its schedule rounded as well: bfloat16 moves a number by up to 0.4%.
    rounding = torch.finfo(theirs.dtype).eps / 2 if theirs.is_floating_point() else 0.0
    if len(theirs) == len(ours) and torch.allclose(theirs.float(), ours, rtol=1e-3 + rounding, atol=1e-6):
        return
    there, here = (
        f"{len(b)} timesteps, from β = {b[0]:.5g} to {b[-1]:.5g} ({b[len(b) // 2]:.5g} in the middle)"
        for b in (theirs, ours)
    )
    raise CheckpointError(
        f"the schedule in {source} has {there}, and that of the configuration {here}: give the configuration that it "
        "was trained with (config=)"
    )


def schedule_buffers(schedule: NoiseSchedule) -> dict[str, Tensor]:
    """The schedule as CompVis keeps it among the weights (`DDPM.register_schedule`)."""
    buffers = {name: value for name, value in vars(schedule).items() if isinstance(value, Tensor)}
    return buffers | {"log_one_minus_alphas_cumprod": 2 * schedule.sqrt_one_minus_alphas_cumprod.log()}


def as_compvis(sd: LatentDiffusion) -> dict[str, Tensor]:
    """The state_dict of CompVis's LatentDiffusion: the weights, the schedule, and the text tower's position_ids."""
    state = sd.state_dict() | schedule_buffers(sd.schedule)
    if isinstance(sd.config.cond_stage, CLIPTextConfig):
        name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
        state[name] = torch.arange(sd.config.cond_stage.max_length)[None]
    return state


def write_file(sd: LatentDiffusion, path: Path, dtype: torch.dtype | None) -> None:
    """Write a model in CompVis's layout: the weights in one file, and the YAML beside it.

    If the tokenizer is not CLIP's, or the text tower has another number of heads than CLIP's, both are described in a
    folder beside the YAML, which names it as the `version` of its CLIP. The folder has the files of a CLIP in
    transformers' layout, without weights.
    """
    text, version, yaml = sd.config.cond_stage, "openai/clip-vit-large-patch14", path.with_suffix(".yaml")
    tokenizer = sd.cond_stage_model.tokenizer if isinstance(text, CLIPTextConfig) else None
    if tokenizer and (tokenizer.vocab != BPETokenizer.clip().vocab or text.heads != max(1, text.width // 64)):
        version = f"{path.stem}.clip"
    configuration = yaml_from_config(sd.config, version)
    if yaml.is_file() and yaml.read_bytes() != configuration.encode():
        others = [other for suffix in (".ckpt", ".safetensors") if (other := path.with_suffix(suffix)) != path]
        if others[0].exists() or b"unet_config" not in yaml.read_bytes():
            raise FileExistsError(f"{yaml} belongs to something else than {path.name}: choose another name")
    part = path.name in ("model.safetensors", "clip.safetensors") or (path.exists() and not yaml.is_file())
    if part and any((path.parent / name).is_file() for name in ("config.json", f"{path.stem}.json")):
        raise FileExistsError(f"{path} is a part of the model in {path.parent}: choose another name, or that folder")
    with files.folder_written_whole(path, into=path.parent) as unfinished:
        if version == f"{path.stem}.clip":
            tokenizer.save(unfinished / version, text.max_length)
            files.write_json(text_config_json(text, tokenizer), unfinished / version / "config.json")
        (unfinished / yaml.name).write_text(configuration, encoding="utf-8")
        files.write_weights(files.cast(as_compvis(sd), dtype), unfinished / path.name)


# --- what is it? ------------------------------------------------------------------------------------------------------


def what_it_is(state: Mapping[str, Tensor]) -> str:
    """A sentence that says, by the names of the tensors, to which model they belong; "" if that is not known."""
    has = {what: any(name.startswith(prefix) for name in state) for prefix, what in TABLES["networks"].items()}
    for pattern, what in (TABLES["others"] | ({} if has["UNet"] else TABLES["strangers"])).items():
        if any(re.search(pattern, name) for name in state):
            return f"By its names, {what}"
    if all(has.values()):
        return "By its names, it is a whole latent diffusion model; config= takes its YAML or its configuration"
    if any(has.values()):
        own, lacking = ([what for what in has if has[what] is there] for there in (True, False))
        return f"It has only the {' and the '.join(own)}, and no {' and no '.join(lacking)}"
    return ""
