"""CompVis files: the names of sd-v1-4.ckpt, EMA, schedule and all; and the YAML that says what they are."""

from dataclasses import replace

import pytest
import torch
import yaml

from minisd import CheckpointError, LatentDiffusion, LatentDiffusionConfig, UNetConfig, VQConfig, load, save
from minisd.checkpoint import compvis, describe, write_weights
from minisd.clip import CLIPTextConfig
from minisd.conditions import ClassConfig
from minisd.vae import AutoencoderConfig, IdentityConfig

# Stable Diffusion v1 at a tenth of its width, as a LatentDiffusionConfig and as CompVis's YAML has it.
CONFIG = LatentDiffusionConfig(
    UNetConfig(model_channels=32, context_dim=64),
    AutoencoderConfig(ch=32),
    CLIPTextConfig(vocab_size=512, width=64, layers=2, heads=1, projection_dim=64),
)
YAML = """
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: 64
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: False
    scheduler_config:
      target: ldm.lr_scheduler.LambdaLinearScheduler
      params: {warm_up_steps: [10000], cycle_lengths: [10000000000000], f_start: [1.e-6], f_max: [1.], f_min: [1.]}
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 32 # unused
        in_channels: 4
        out_channels: 4
        model_channels: 32
        attention_resolutions: [4, 2, 1]
        num_res_blocks: 2
        channel_mult: [1, 2, 4, 4]
        num_heads: 8
        use_spatial_transformer: True
        transformer_depth: 1
        context_dim: 64
        use_checkpoint: True
        legacy: False
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig: {double_z: true, z_channels: 4, resolution: 256, in_channels: 3, out_ch: 3, ch: 32,
                   ch_mult: [1, 2, 4, 4], num_res_blocks: 2, attn_resolutions: [], dropout: 0.0}
        lossconfig: {target: torch.nn.Identity}
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
"""


@pytest.fixture(scope="module")
def official(load_fixture):
    """A checkpoint with every name and shape of a real one at a tenth of its width, filled with random numbers."""
    _, info = load_fixture("sd_v1_tenth_width_keys")
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in info["keys"].items():
        noise = torch.randn(shape, generator=generator)
        state[name] = noise * (noise.numel() / max(1, shape[0] if shape else 1)) ** -0.5
    state |= compvis.schedule_buffers(CONFIG.schedule())
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["model_ema.num_updates"] = torch.tensor(7)
    return state


@pytest.fixture(scope="module")
def clip_folder(tokenizer, tmp_path_factory):
    """A tokenizer of fewer pieces than the 512 that its text tower knows."""
    from minisd.clip import BPETokenizer

    folder = tmp_path_factory.mktemp("clip")
    merges = tokenizer.merges[:-200]
    pieces = {piece: i for i, piece in enumerate(list(tokenizer.vocab)[:512])}
    BPETokenizer(pieces, [m for m in merges if m[0] + m[1] in pieces][:0], "<|endoftext|>").save(folder, 77)
    return folder


@pytest.fixture
def files(official, clip_folder, tmp_path):
    torch.save({"state_dict": official, "global_step": 470_000}, tmp_path / "model.ckpt")
    (tmp_path / "model.yaml").write_text(YAML)
    return tmp_path


def is_the_file(sd, official, prefix="") -> bool:
    return all(torch.equal(tensor, official[prefix + name]) for name, tensor in sd.state_dict().items())


# -- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "older than zip", "safetensors", "renamed safetensors", "float16"])
def test_every_form_of_the_file_loads_to_the_last_bit(official, files, clip_folder, form):
    from safetensors.torch import save_file

    state = {name: t.half() if t.is_floating_point() else t for name, t in official.items()}
    expected = official if form != "float16" else {name: t.float() for name, t in state.items()}
    file = files / "a.ckpt"
    if "safetensors" in form:
        file = files / ("a.ckpt" if "renamed" in form else "a.safetensors")
        save_file(official, file)
    else:
        content = {"state_dict": state if form == "float16" else official}
        torch.save(content, file, _use_new_zipfile_serialization=form != "older than zip")
    sd = load(file, "cpu", config=files / "model.yaml", tokenizer=clip_folder)
    assert sd.config == CONFIG
    assert is_the_file(sd, expected)
    assert sd.txt2img("a", steps=1, height=64, width=64).images[0].size == (64, 64)


def test_the_yaml_may_be_a_file_a_mapping_or_a_config_of_ours(official, files, clip_folder):
    for config in (files / "model.yaml", str(files / "model.yaml"), yaml.safe_load(YAML), CONFIG):
        sd = load(files / "model.ckpt", "cpu", config=config, tokenizer=clip_folder)
        assert sd.config == CONFIG and is_the_file(sd, official)


@pytest.mark.parametrize(("asked", "in_yaml", "ema"), [(True, False, True), (False, True, False), (None, True, True),
                                                       (None, False, False)])  # fmt: skip
def test_the_ema_weights_take_the_place_of_the_unets(official, files, clip_folder, asked, in_yaml, ema):
    (files / "model.yaml").write_text(YAML.replace("use_ema: False", f"use_ema: {in_yaml}"))
    sd = load(files / "model.ckpt", "cpu", config=files / "model.yaml", use_ema=asked, tokenizer=clip_folder)
    for name, tensor in sd.model.state_dict().items():
        mean = official["model_ema." + name.replace(".", "")]
        assert torch.equal(tensor, mean if ema else official[f"model.{name}"])


@pytest.mark.parametrize(("use_ema", "bad"), [(True, "model_ema.diffusion_modelout2bias"),
                                              (False, "model.diffusion_model.out.2.bias")])  # fmt: skip
def test_nan_is_looked_for_in_the_weights_that_are_used(official, files, clip_folder, use_ema, bad):
    """The EMA weights or the UNet's own: a NaN in the others does no harm."""
    state = dict(official) | {bad: torch.full_like(official[bad], torch.nan)}
    write_weights(state, files / "model.ckpt")

    def read(use_ema):
        return load(files / "model.ckpt", "cpu", config=files / "model.yaml", use_ema=use_ema, tokenizer=clip_folder)

    assert all(tensor.isfinite().all() for tensor in read(not use_ema).state_dict().values())
    with pytest.raises(CheckpointError, match=f"{bad} in .* holds NaN"):
        read(use_ema)


def test_missing_ema_weights_are_named(official, files, clip_folder):
    state = {name: tensor for name, tensor in official.items() if not name.startswith("model_ema.")}
    torch.save(state, files / "pruned.ckpt")
    with pytest.raises(CheckpointError, match="no EMA weights for 686 of 686 .*use_ema=False"):
        load(files / "pruned.ckpt", config=files / "model.yaml", use_ema=True)


def test_a_bare_file_is_stable_diffusion_v1_or_its_inpainting():
    """Their own shapes, on the meta device: nothing of a gigabyte is made."""
    from minisd.checkpoint import _without_yaml
    from minisd.presets import PRESETS

    for name, channels in (("sd-v1", 4), ("sd-v1-inpainting", 9)):
        state = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, channels, 3, 3, device="meta")}
        assert _without_yaml(state) is PRESETS[name]
    assert _without_yaml({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(9)}) is PRESETS["sd-v1"]


def test_prompts_are_read_by_clips_vocabulary_if_no_other_is_named(official, files, transformers, tmp_path):
    state, config = dict(official), replace(CONFIG, cond_stage=replace(CONFIG.cond_stage, vocab_size=49408))
    embedding = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    state[embedding] = torch.randn(49408, 64, generator=torch.Generator().manual_seed(1))
    torch.save(state, files / "full.ckpt")
    sd = load(files / "full.ckpt", "cpu", config=files / "model.yaml")
    assert sd.config == config

    sd.cond_stage_model.tokenizer.save(tmp_path / "clip", 77)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "clip")
    prompts = ["a photograph of an astronaut riding a horse", "", "Ünïcödé 🦊, it's 12,345!"]
    expected = theirs(prompts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert sd.cond_stage_model.tokenize(prompts).tolist() == expected
    # as CLIP's own tokenizer numbers them, published with every example of it
    assert expected[0][:10] == [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]


def test_a_vocabulary_larger_than_the_text_encoder_is_refused(files):
    with pytest.raises(CheckpointError, match="knows 512 tokens, and the vocabulary has 49,408.*tokenizer="):
        load(files / "model.ckpt", config=files / "model.yaml")


def test_the_scale_factor_that_a_file_carries_is_used(official, files, clip_folder):
    torch.save({**official, "scale_factor": torch.tensor(0.25)}, files / "model.ckpt")
    sd = load(files / "model.ckpt", "cpu", config=files / "model.yaml", tokenizer=clip_folder)
    assert sd.scale_factor == 0.25


# -- what the YAML may say -----------------------------------------------------------------------------------------


def changed(path: str, value) -> dict:
    """The YAML with something else at model.params.PATH; None takes it away."""
    whole = yaml.safe_load(YAML)
    *way, last = path.split(".")
    place = whole["model"]["params"]
    for step in way:
        place = place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return whole


def config_of(whole: dict) -> LatentDiffusionConfig:
    from pathlib import Path

    return compvis.config_from_yaml(compvis.read_yaml(whole), {}, "a.yaml", Path())


def test_the_parts_of_other_models_of_compvis():
    """VQ-f4 with classes (cin256-v2), pixels without conditions, a mask beside the latent."""
    ddconfig = {"double_z": False, "z_channels": 3, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
                "ch_mult": [1, 2, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
    vq = {"target": "ldm.models.autoencoder.VQModelInterface", "params": {"embed_dim": 3, "n_embed": 8192,
          "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}}}  # fmt: skip
    assert config_of(changed("first_stage_config", vq)).first_stage == VQConfig()

    identity = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    assert config_of(changed("first_stage_config", identity)).first_stage == IdentityConfig()

    classes = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"n_classes": 1001, "embed_dim": 512,
               "key": "class_label"}}  # fmt: skip
    assert config_of(changed("cond_stage_config", classes)).cond_stage == ClassConfig()
    assert config_of(changed("cond_stage_config", "__is_unconditional__")).cond_stage is None
    assert config_of(changed("unet_config.params.in_channels", 9)).concat_channels == 5


def test_what_is_left_out_is_as_in_compvis_not_as_in_stable_diffusion():
    unet = config_of(changed("unet_config.params.use_spatial_transformer", None)).unet
    assert not unet.use_spatial_transformer
    config = config_of(changed("linear_end", None))
    assert (config.linear_start, config.linear_end) == (0.00085, 0.02)
    assert config_of(changed("scale_factor", None)).scale_factor == 1.0
    heads = config_of(changed("unet_config.params.num_head_channels", 32)).unet
    assert (heads.num_heads, heads.num_head_channels) == (None, 32)


@pytest.mark.parametrize("name", compvis.BETA_SCHEDULES)
def test_a_schedule_under_compviss_name_has_compviss_numbers(load_fixture, name):
    tensors, _ = load_fixture("schedules")
    whole = changed("beta_schedule", name)
    expected = {"linear": "betas_f64", "cosine": "betas_cosine_f64", "sqrt_linear": "betas_sqrt_linear_f64"}[name]
    betas = config_of(whole).schedule().betas.double()
    torch.testing.assert_close(betas, tensors[expected], atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("cond_stage_config.target", "ldm.modules.encoders.modules.BERTEmbedder", "BERTEmbedder, and minisd has only"),
        ("first_stage_config.target", "ldm.models.autoencoder.Cascade", "first_stage_config names .*Cascade"),
        ("unet_config.params.resblock_updown", True, "resblock_updown: True"),
        ("unet_config.params.use_linear_in_transformer", True, "use_linear_in_transformer: True"),
        ("unet_config.params.num_classes", 1000, "num_classes: 1000"),
        ("unet_config.params.wings", 2, "wings: 2"),
        ("unet_config.params.model_channels", None, "does not describe a model"),
        ("first_stage_config.params.embed_dim", None, "does not describe a model .*embed_dim"),
        ("beta_schedule", "sqrt", "beta_schedule is 'sqrt'"),
        ("timesteps", "many", "does not describe a model"),
        ("timesteps", float("inf"), "does not describe a model"),
        ("first_stage_config.params.ddconfig", [4], "does not describe a model"),
        ("unet_config", None, "does not describe a latent diffusion model"),
        ("unet_config.params.model_channels", 33, "describes a model that can't be built .*divisible"),
        ("unet_config.params.model_channels", -32, "describes a model that can't be built"),
        ("unet_config.params.num_heads", 0, "describes a model that can't be built"),
    ],
)
def test_what_minisd_does_not_have_is_named(files, clip_folder, path, value, message):
    (files / "model.yaml").write_text(yaml.safe_dump(changed(path, value)))
    with pytest.raises(CheckpointError, match=message) as error:
        load(files / "model.ckpt", config=files / "model.yaml", tokenizer=clip_folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "no YAML that can be read"),
        ("trained: 2022-13-45", "no YAML that can be read"),
        ("trained: !!timestamp ''", "no YAML that can be read"),
        ("steps: !!int ''", "no YAML that can be read"),
        ("", "does not describe a latent diffusion model"),
        ("- 1\n- 2", "does not describe a latent diffusion model"),
        ("model: {target: ldm.models.autoencoder.AutoencoderKL, params: {embed_dim: 4}}", "does not describe a latent"),
        ("!!python/object/apply:os.system ['touch it_ran']", "no YAML that can be read"),
        ("a: &a [x]\nb: [" + "*a, " * 31 + "]", "more than 30 aliases"),
        ("[" * 40_000, "lists within lists"),
        ("a" * 60_000, "60,000 bytes, far too many"),
    ],
)
def test_a_yaml_of_something_else_is_refused(files, monkeypatch, text, message):
    monkeypatch.chdir(files)
    (files / "model.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load(files / "model.ckpt", config=files / "model.yaml")
    assert not (files / "it_ran").exists()
    with pytest.raises(FileNotFoundError, match="no configuration at"):
        load(files / "model.ckpt", config=files / "nowhere.yaml")


# -- the YAML beside a file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "suffix"), [("model.ckpt", ".yaml"), ("model.safetensors", ".yml"), ("model.v2.ckpt", ".yml")]
)
def test_the_yaml_beside_a_file_says_what_it_is(official, tmp_path, clip_folder, weights, suffix):
    """A model that predicts v has the names and shapes of one that predicts the noise: only the YAML tells."""
    file = tmp_path / weights
    write_weights(official, file)
    file.with_suffix(suffix).write_text(yaml.safe_dump(changed("parameterization", "v") | {"more": 1}))
    sd = load(file, "cpu", tokenizer=clip_folder)
    assert sd.config == replace(CONFIG, parameterization="v") and is_the_file(sd, official)
    assert f"configuration is read from {file.with_suffix(suffix).name}" in describe(file)


def test_an_argument_wins_over_the_yaml_beside_and_yaml_over_yml(official, files, clip_folder):
    (files / "model.yml").write_text("model: [")
    assert load(files / "model.ckpt", "cpu", tokenizer=clip_folder).config == CONFIG
    (files / "model.yaml").write_text("model: [")
    for config in (changed("parameterization", "v"), replace(CONFIG, parameterization="v")):
        sd = load(files / "model.ckpt", "cpu", config=config, tokenizer=clip_folder)
        assert sd.config.parameterization == "v"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "model.yaml is no YAML that can be read"),
        ("\0", "model.yaml is no YAML that can be read"),
        ("steps: 3", "model.yaml does not describe a latent diffusion model"),
        (YAML.replace("AutoencoderKL", "Cascade"), "model.yaml: first_stage_config names .*Cascade"),
        (YAML.replace("linear_end: 0.0120", "linear_end: 0.02"), "the schedule in .*model.ckpt has 1000 timesteps"),
        (YAML.replace("linear_start: 0.00085", "linear_start: 0.0001"), "the schedule in .*model.ckpt has 1000"),
        (YAML.replace("model_channels: 32", "model_channels: 64"), "the weights in .*model.ckpt do not fit the model"),
    ],
)  # fmt: skip
def test_the_error_says_why_a_yaml_beside_the_file_was_read(files, clip_folder, monkeypatch, text, message):
    monkeypatch.chdir(files)  # a YAML in the working directory goes by its name as well
    (files / "model.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        load("model.ckpt", "cpu", tokenizer=clip_folder)
    assert "model.yaml was read because it lies beside model.ckpt" in str(error.value)
    assert "config=" in str(error.value) and "\n" not in str(error.value)


def test_damaged_weights_are_not_blamed_on_the_yaml_beside(files):
    (files / "model.ckpt").write_bytes((files / "model.ckpt").read_bytes()[:1000])
    with pytest.raises(CheckpointError) as error:
        load(files / "model.ckpt")
    assert "model.yaml" not in str(error.value)


def test_a_file_with_its_own_yaml_is_no_part_of_the_minisd_folder_that_it_lies_in(sd, tmp_path):
    save(sd, tmp_path)
    save(predicting_v(sd), tmp_path / "v.safetensors")
    assert load(tmp_path / "v.safetensors", "cpu").config.parameterization == "v"
    assert "v.yaml" in describe(tmp_path / "v.safetensors")
    assert load(tmp_path, "cpu").config == load(tmp_path / "model.safetensors", "cpu").config == sd.config


# -- what does not fit ---------------------------------------------------------------------------------------------


def test_a_model_of_another_size_is_refused_with_what_to_give(files):
    """A file of a tenth of the width, loaded as if it were Stable Diffusion v1."""
    (files / "model.yaml").unlink()
    with pytest.raises(CheckpointError) as error:
        load(files / "model.ckpt", "cpu")
    message = str(error.value)
    assert "time_embed.0.weight is [128, 32] instead of [1280, 320]" in message
    assert "it is a whole latent diffusion model; config= takes its YAML" in message
    assert "a whole latent diffusion model" in describe(files / "model.ckpt")


@pytest.mark.parametrize("config", [LatentDiffusionConfig(), CONFIG], ids=["SD v1", "a tenth"])
def test_the_sizes_of_the_text_tower_are_read_off_the_weights(config, tokenizer):
    with torch.device("meta"):
        state = LatentDiffusion(config, tokenizer).state_dict()
    assert compvis.text_config(state, config.cond_stage.heads) == config.cond_stage


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "Stable Diffusion XL"),
        ("cond_stage_model.model.ln_final.bias", "Stable Diffusion 2"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("down_blocks.0.resnets.0.norm1.weight", "diffusers' names"),
        ("encoder.down.0.block.0.norm1.weight", "an autoencoder alone"),
    ],
)
def test_files_of_something_else_are_recognised(tmp_path, name, what):
    torch.save({name: torch.zeros(4)}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=f"By its names, it is .*{what}|{what}"):
        load(tmp_path / "a.ckpt")
    assert what in describe(tmp_path / "a.ckpt")


def test_swapped_names_are_found_if_their_shapes_differ(official, files, clip_folder):
    a, b = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight", "model.diffusion_model.out.2.weight"
    torch.save({**official, a: official[b], b: official[a]}, files / "model.ckpt")
    with pytest.raises(CheckpointError, match="2 of another shape"):
        load(files / "model.ckpt", config=files / "model.yaml", tokenizer=clip_folder)


def test_another_schedule_than_the_files_is_refused(files, clip_folder):
    for path, value in (("linear_end", 0.02), ("timesteps", 500)):
        with pytest.raises(CheckpointError, match="the schedule in .* has 1000 timesteps, from β = 0.00085 to 0.012"):
            load(files / "model.ckpt", config=changed(path, value), tokenizer=clip_folder)
    # CompVis's two names that are taken for each other: both schedules begin and end alike
    with pytest.raises(CheckpointError, match=r"0\.0048\d* in the middle.*0\.0064\d* in the middle"):
        load(files / "model.ckpt", config=changed("beta_schedule", "sqrt_linear"), tokenizer=clip_folder)


# -- writing -------------------------------------------------------------------------------------------------------


def predicting_v(sd):
    """The same weights in a model that says of itself that it predicts v."""
    again = LatentDiffusion(replace(sd.config, parameterization="v"), sd.cond_stage_model.tokenizer)
    again.load_state_dict(sd.state_dict())
    return again


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_saved_is_loaded_in_every_dtype_without_being_told_what_it_is(sd, tmp_path, suffix, dtype):
    sd = predicting_v(sd)
    save(sd, tmp_path / f"mine{suffix}", dtype=dtype)
    again = load(tmp_path / f"mine{suffix}", "cpu")
    assert again.config == sd.config
    assert is_the_file(again, {name: tensor.to(dtype).float() for name, tensor in sd.state_dict().items()})
    assert again.cond_stage_model.tokenizer.vocab == sd.cond_stage_model.tokenizer.vocab


@pytest.mark.parametrize("schedule", compvis.BETA_SCHEDULES.values())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_schedule_that_was_rounded_is_the_same_and_one_that_is_another_is_not(schedule, dtype):
    config = replace(CONFIG, beta_schedule=schedule)
    state = {"betas": config.schedule().betas.to(dtype)}
    compvis.check_schedule(state, config, "a.ckpt")
    others = [replace(config, beta_schedule=other) for other in set(compvis.BETA_SCHEDULES.values()) - {schedule}]
    if schedule != "cosine":  # it reads neither end
        others += [replace(config, linear_start=0.00086), replace(config, linear_end=0.0122)]
    for other in [*others, replace(config, timesteps=999)]:
        with pytest.raises(CheckpointError, match="the schedule in a.ckpt has 1000 timesteps"):
            compvis.check_schedule(state, other, "a.ckpt")


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_what_was_saved_is_loaded(sd, tmp_path, suffix):
    """With a tokenizer of its own, and with two heads of 16 channels in its text tower."""
    save(sd, tmp_path / f"mine{suffix}")
    again = load(tmp_path / f"mine{suffix}", "cpu", config=tmp_path / "mine.yaml")
    assert again.config.unet == sd.config.unet and again.config.cond_stage == sd.config.cond_stage
    first, second = (model.txt2img("a red fox", steps=2, seed=3).pictures for model in (sd, again))
    assert torch.equal(first, second)


def test_the_file_has_every_name_of_an_official_one(official, files, clip_folder):
    sd = load(files / "model.ckpt", "cpu", config=files / "model.yaml", tokenizer=clip_folder)
    ours = compvis.as_compvis(sd)
    assert ours.keys() == {name for name in official if not name.startswith("model_ema.")}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, official[name], atol=1e-6, rtol=1e-6)


def test_the_schedule_buffers_equal_compvis(load_fixture):
    theirs, _ = load_fixture("schedules")
    ours = compvis.schedule_buffers(LatentDiffusionConfig().schedule())
    same = [name for name in ours if any(name in key for key in theirs)]
    assert len(same) >= 2
    for key, expected in theirs.items():
        for name in ours:
            if key.endswith("." + name) or key == name:
                torch.testing.assert_close(ours[name].double(), expected.double(), atol=1e-6, rtol=2e-5)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, first_stage=VQConfig(ch=32, embed_dim=4, n_embed=9), cond_stage=ClassConfig(10, 64)),
        LatentDiffusionConfig(
            UNetConfig(in_channels=3, out_channels=3, model_channels=32, channel_mult=(1, 2), num_heads=2,
                       attention_resolutions=(2,), use_spatial_transformer=False, context_dim=None),
            IdentityConfig(), None, image_size=64, scale_factor=1.0, beta_schedule="linear", linear_start=1e-4,
            linear_end=0.02, parameterization="x0"),
    ],
    ids=["text", "VQ and classes", "pixels alone"],
)  # fmt: skip
def test_a_yaml_that_was_written_is_read_as_it_was(config):
    from pathlib import Path

    params = compvis.read_yaml(yaml.safe_load(compvis.yaml_from_config(config, "openai/clip-vit-large-patch14")))
    again = compvis.config_from_yaml(params, {}, "a.yaml", Path())
    assert replace(again, cond_stage=None) == replace(config, cond_stage=None)
    if isinstance(config.cond_stage, ClassConfig):
        assert again.cond_stage == config.cond_stage
