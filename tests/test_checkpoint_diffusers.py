"""The folder of diffusers: read as it writes it, written as it reads it, and the same picture drawn by both."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisd import CheckpointError, load, save
from minisd.checkpoint import describe
from minisd.checkpoint import diffusers as layout
from minisd.conditions import ClassConfig
from minisd.vae import AutoencoderConfig
from minisd.vq import VQConfig

FOX = "a red fox, noto style"


@pytest.fixture(scope="module")
def pipeline(diffusers, transformers, randomise, tokenizer, tmp_path_factory):
    """A small StableDiffusionPipeline, made of diffusers' and transformers' own classes."""
    tokenizer.save(tmp_path_factory.mktemp("tokenizer"), 77)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=4, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=640, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
        )
    )
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    folder = tmp_path_factory.mktemp("clip")
    tokenizer.save(folder, 77)
    return diffusers.StableDiffusionPipeline(
        vae=randomise(vae, 1), text_encoder=randomise(text, 2), unet=randomise(unet, 3), scheduler=scheduler,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture
def folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def draws_the_same(sd, pipeline, diffusers):
    """20 guided steps of DDIM, of the latents 1e-3 and of the pictures 1e-4."""
    pipeline.set_progress_bar_config(disable=True)
    before = pipeline.scheduler
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(before.config, clip_sample=False, set_alpha_to_one=False)
    f = sd.config.first_stage.downsampling
    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    options = {"num_inference_steps": 20, "guidance_scale": 7.5, "height": 8 * f, "width": 8 * f}
    latents = pipeline(FOX, latents=x_T, output_type="latent", **options).images
    pictures = pipeline(FOX, latents=x_T, output_type="np", **options).images
    pipeline.scheduler = before
    ours = sd.txt2img(FOX, steps=20, guidance_scale=7.5, start_code=x_T)
    torch.testing.assert_close(ours.trajectory[-1].x, latents, atol=1e-3, rtol=1e-4)
    shown = (ours.pictures.clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(shown.permute(0, 2, 3, 1), torch.from_numpy(pictures), atol=1e-4, rtol=0)
    assert pictures.std() > 0.05


# -- reading -------------------------------------------------------------------------------------------------------


def test_what_diffusers_wrote_draws_what_diffusers_draws(pipeline, folder, diffusers):
    sd = load(folder, "cpu")
    assert sd.config.image_size == 16 and sd.config.unet.num_heads == 4
    draws_the_same(sd, pipeline, diffusers)
    texts = [FOX, "", "Ünïcödé 🦊 <|endoftext|>, it's 12!"]
    ids = pipeline.tokenizer(texts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert sd.cond_stage_model.tokenize(texts).tolist() == ids


@pytest.mark.parametrize(
    "how",
    [
        {"safe_serialization": False},
        {"variant": "fp16"},
        {"safe_serialization": False, "variant": "fp16"},
    ],
    ids=lambda how: ", ".join(map(str, how.values())),
)
def test_every_form_of_its_files_is_read(pipeline, folder, tmp_path, how):
    pipeline.save_pretrained(tmp_path / "other", **how)
    expected, found = load(folder, "cpu").state_dict(), load(tmp_path / "other", "cpu", variant=how.get("variant"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    assert "unet" in describe(tmp_path / "other", how.get("variant"))


def test_a_variant_is_read_only_if_asked_for_and_whole(pipeline, folder):
    ordinary = load(folder, "cpu").state_dict()
    pipeline.to(torch.float16).save_pretrained(folder, variant="fp16")
    pipeline.to(torch.float32)
    again, half = load(folder, "cpu").state_dict(), load(folder, "cpu", variant="fp16").state_dict()
    assert all(torch.equal(tensor, ordinary[name]) for name, tensor in again.items())
    assert all(torch.equal(tensor, ordinary[name].half().float()) for name, tensor in half.items())
    for file in folder.glob("vae/*fp16*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no weights of the variant 'fp16' in .*vae"):
        load(folder, "cpu", variant="fp16")


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_the_text_encoders_names_of_transformers_4_and_5(folder, prefix):
    file = folder / "text_encoder" / "model.safetensors"
    expected = load(folder, "cpu").state_dict()
    state = {prefix + name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
    if prefix:
        state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, file, {"format": "pt"})
    found = load(folder, "cpu").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_the_autoencoders_names_of_2022(folder):
    expected = load(folder, "cpu").state_dict()
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        for old, new in layout.OLD_NAMES.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = tensor
    assert any("proj_attn" in name for name in renamed)
    save_file(renamed, file, {"format": "pt"})
    found = load(folder, "cpu").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_model_of_the_hub_is_found_where_the_hub_keeps_it(folder, tmp_path, monkeypatch):
    """In the cache of huggingface_hub, laid out as it lays it out; offline, nothing else is asked."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--someone--small-diffusion"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    shutil.copytree(folder, repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
    sd = load("someone/small-diffusion", "cpu")
    assert torch.equal(sd.model.diffusion_model.out[2].weight, load(folder, "cpu").model.diffusion_model.out[2].weight)
    with pytest.raises(FileNotFoundError, match="no model at someone/else, neither as a file or folder nor on the hub"):
        load("someone/else", "cpu")


def test_only_what_is_read_is_fetched(monkeypatch, folder):
    from fnmatch import fnmatch

    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)

    def fetched(name):
        return any(fnmatch(name, pattern) for pattern in asked[-1])

    layout.fetch("a/b")
    wanted = ("model_index.json", "unet/config.json", "tokenizer/merges.txt", "text_encoder/model.safetensors")
    assert all(map(fetched, (*wanted, "unet/diffusion_pytorch_model.safetensors")))
    assert not any(map(fetched, ("v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.bin",
                                 "safety_checker/model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
                                 "unet/diffusion_pytorch_model.non_ema.safetensors")))  # fmt: skip
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").touch()
    layout.fetch("a/b", "fp16")
    assert fetched("unet/diffusion_pytorch_model.fp16.safetensors")
    assert len(asked) == 2


# -- what can't be read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", layout.PARTS)
def test_a_folder_with_one_part_missing_says_which(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(FileNotFoundError, match=f"has no {part}: Stable Diffusion v1"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/config.json", {"use_linear_projection": True}, "use_linear_projection: True, and .* v1 has False"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type: 'text_time'"),
        ("unet/config.json", {"attention_head_dim": [4, 3]}, "neither equally many nor equally wide"),
        ("unet/config.json", {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "is built of AttnDownBlock2D"),
        ("unet/config.json", {"block_out_channels": [32, 48]}, "no multiples of the first"),
        ("unet/config.json", {"cross_attention_dim": 64}, "of another shape"),
        ("unet/config.json", {"layers_per_block": "two"}, "do not describe a model"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "_class_name: 'AutoencoderTiny'"),
        ("vae/config.json", {"use_quant_conv": False}, "use_quant_conv: False"),
        ("vae/config.json", {"block_out_channels": []}, "do not describe a model"),
        ("text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act: 'gelu', and .* v1 has 'quick_gelu'"),
        ("text_encoder/config.json", {"num_hidden_layers": 3}, "missing"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "the schedule 'sigmoid'"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: True"),
    ],
)
def test_what_stable_diffusion_v1_does_not_have_is_named(folder, file, change, message):
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_broken_files_are_named(folder):
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is no JSON"):
        load(folder)


@pytest.mark.parametrize(
    "text", ["[]", '{"model": {"type": "WordPiece"}}', '{"model": {"type": "BPE", "vocab": {}, "merges": []}}']
)
def test_a_tokenizer_of_something_else_is_named(folder, text):
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        load(folder)
    (folder / "tokenizer" / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="the tokenizer in .* can't be used"):
        load(folder)


def test_weights_that_are_missing_or_truncated_are_named(folder, tmp_path, pipeline):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="vae/diffusion_pytorch_model.safetensors is no whole"):
        load(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no weights in .*vae"):
        load(folder)
    pipeline.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    with pytest.raises(FileNotFoundError, match="no weights in .*unet, or not in one file"):
        load(tmp_path / "sharded")


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "emoji", "sd-v1", "sd-v1-inpainting"])
def test_the_names_are_those_that_diffusers_itself_gives(diffusers, tokenizer, name):
    """Its UNet and its autoencoder of that configuration have just these tensors, of these shapes."""
    from minisd import PRESETS, LatentDiffusion

    with torch.device("meta"):
        sd = LatentDiffusion(PRESETS[name], tokenizer)
        configs = layout.write_config(sd.config, tokenizer)
        theirs = {
            "unet": diffusers.UNet2DConditionModel.from_config(configs["unet/config.json"]),
            "vae": diffusers.AutoencoderKL.from_config(configs["vae/config.json"]),
        }
    for part, network in theirs.items():
        ours, names = layout.parts_of(sd)[part]
        found = {names[n]: layout._as_theirs(n, t).shape for n, t in ours.state_dict().items()}
        assert found == {n: t.shape for n, t in network.state_dict().items()}


# -- writing -------------------------------------------------------------------------------------------------------


def test_diffusers_draws_with_what_was_written(sd, diffusers, tmp_path):
    save(sd, tmp_path / "ours", layout="diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    draws_the_same(sd, pipeline, diffusers)
    # Its own settings are ours: without touching the scheduler, it draws the same, too.
    pipeline.set_progress_bar_config(disable=True)
    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    theirs = pipeline(FOX, latents=x_T, num_inference_steps=10, output_type="latent").images
    ours = sd.txt2img(FOX, steps=10, start_code=x_T).trajectory[-1].x
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["tiny", "emoji"])
def test_the_models_that_ship_make_the_way_to_diffusers_and_back(name, tmp_path):
    sd = load(name, "cpu")
    save(sd, tmp_path / name, layout="diffusers")
    again = load(tmp_path / name, "cpu")
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in sd.state_dict().items())
    first, second = (model.txt2img("a red circle", steps=3, num_images=2).pictures for model in (sd, again))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["sd-v1", "sd-v1-inpainting", "emoji", "tiny"])
def test_a_configuration_that_was_written_is_read_as_it_was(tokenizer, tmp_path, name):
    from minisd import PRESETS

    config = PRESETS[name]
    for file, content in layout.write_config(config, tokenizer).items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps(content))
    again = layout.read_config(tmp_path)
    # what counts only where there is attention: the resolution of the VAE, the heads of a level
    assert replace(again.first_stage, resolution=config.first_stage.resolution) == config.first_stage
    same_heads = {"num_heads": config.unet.num_heads, "num_head_channels": config.unet.num_head_channels}
    assert replace(again, first_stage=config.first_stage, unet=replace(again.unet, **same_heads)) == config
    for level, mult in enumerate(config.unet.channel_mult):
        c = config.unet.model_channels * mult
        assert again.unet.heads(c) == config.unet.heads(c) or 2**level not in config.unet.attention_resolutions


@pytest.mark.parametrize("parameterization", ["v", "x0"])
def test_what_the_unet_predicts_is_kept(make_sd, tmp_path, parameterization):
    sd = make_sd(parameterization=parameterization, beta_schedule="linear", linear_start=1e-4, linear_end=0.02)
    save(sd, tmp_path / "model", layout="diffusers")
    again = load(tmp_path / "model", "cpu").config
    for field in ("parameterization", "beta_schedule", "linear_start", "linear_end", "scale_factor", "image_size"):
        assert getattr(again, field) == getattr(sd.config, field)


def test_half_precision_takes_half_the_room(sd, tmp_path):
    sizes = {}
    for dtype in (torch.float32, torch.float16):
        save(sd, tmp_path / str(dtype), layout="diffusers", dtype=dtype)
        sizes[dtype] = (tmp_path / str(dtype) / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert sizes[torch.float16] < 0.6 * sizes[torch.float32]
    assert load(tmp_path / "torch.float16", "cpu").dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first_stage": VQConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, embed_dim=4, n_embed=8)}, "VQConfig"),
        ({"cond_stage": ClassConfig(4, 32)}, "ClassConfig"),
        ({"first_stage": AutoencoderConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=8)}, "z_channels"),
    ],
)
def test_what_diffusers_has_no_place_for_is_refused_and_nothing_is_written(make_sd, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        save(make_sd(**change), tmp_path / "model", layout="diffusers")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_the_folder_as_it_was(sd, make_sd, tmp_path, monkeypatch):
    save(sd, tmp_path / "model", layout="diffusers")
    before = {file: file.read_bytes() for file in (tmp_path / "model").rglob("*") if file.is_file()}

    def full_disk(state, file, metadata):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minisd.checkpoint.files.save_file", full_disk)
    for target in ("model", "another"):
        with pytest.raises(OSError, match="could not write"):
            save(make_sd(scale_factor=0.1), tmp_path / target, layout="diffusers")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert replace(load(tmp_path / "model", "cpu").config, image_size=32).scale_factor == 0.5
