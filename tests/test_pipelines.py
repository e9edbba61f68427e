"""Whole drawings, from prompt to picture, beside diffusers' pipelines and CompVis's recorded runs."""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minisd import ClassConfig, LatentDiffusion
from minisd.noising import ExactDenoiser
from minisd.pictures import read_mask, read_picture
from minisd.sampling import SAMPLERS
from minisd.unet import UNetConfig
from minisd.vae import AutoencoderConfig, IdentityConfig
from minisd.vq import VQConfig

FOX, CAT = "a red fox, noto style", "two green squares"
SMALL = AutoencoderConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1)
VQ = VQConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, embed_dim=4, n_embed=16)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def photo(seed: int = 0, height: int = 32, width: int = 32) -> Image.Image:
    """A picture with smooth colours."""
    y, x = np.mgrid[0:height, 0:width] / 8
    waves = [np.sin(x + seed + c) + np.cos(y * (c + 1)) for c in range(3)]
    return Image.fromarray(((np.stack(waves, -1) + 2) * 63).astype(np.uint8))


def hole(height: int = 32, width: int = 32) -> Image.Image:
    """White in the middle, and not symmetrical: a mask that was turned would show."""
    mask = np.zeros((height, width), np.uint8)
    mask[8:20, 12 : width - 4] = 255
    return Image.fromarray(mask)


@pytest.fixture(scope="module")
def pipelines(diffusers, sd, make_sd, tmp_path_factory):
    """diffusers' pipelines with the weights of `sd`; for inpainting, also with those of a UNet of 9 channels."""
    from minisd import save

    nine = make_sd(unet=replace(sd.config.unet, in_channels=9))
    models, found = {"four": sd, "nine": nine}, {}
    for name, model in models.items():
        folder = tmp_path_factory.mktemp("models") / name
        save(model, folder, layout="diffusers")
        kinds = {"txt2img": diffusers.StableDiffusionPipeline, "img2img": diffusers.StableDiffusionImg2ImgPipeline,
                 "inpaint": diffusers.StableDiffusionInpaintPipeline}  # fmt: skip
        for kind in kinds if name == "four" else ["inpaint"]:
            pipeline = kinds[kind].from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
            pipeline.set_progress_bar_config(disable=True)
            found[kind, name] = pipeline
    return models, found


def same(ours, pipeline, **options):
    """Latents to 1e-3 and pictures in [0, 1] to 1e-4, relative to the spread of what random networks draw."""
    generator = options.pop("seed", None)

    def theirs(kind):
        made = None if generator is None else [torch.Generator().manual_seed(s) for s in generator]
        return pipeline(**options, generator=made, output_type=kind).images

    latents, pictures = theirs("latent"), torch.from_numpy(theirs("np"))
    spread = max(1.0, latents.std().item())
    torch.testing.assert_close(ours.trajectory[-1].x, latents, atol=1e-3 * spread, rtol=0)
    shown = (ours.pictures.clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(shown.permute(0, 2, 3, 1), pictures, atol=1e-4, rtol=0)
    assert latents.std() > 0.1 and 0.02 < pictures.std()


# -- txt2img -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (24, 56)], ids=["square", "wide"])
def test_txt2img_with_a_negative_prompt_equals_diffusers(pipelines, size):
    models, found = pipelines
    height, width = size
    x_T = draw(3, 1, 4, height // 4, width // 4)
    ours = models["four"].txt2img(FOX, steps=20, negative_prompt=CAT, start_code=x_T, height=height, width=width)
    same(ours, found["txt2img", "four"], prompt=FOX, negative_prompt=CAT, num_inference_steps=20, latents=x_T,
         height=height, width=width)  # fmt: skip


def test_several_prompts_and_several_pictures_of_each_equal_diffusers(pipelines):
    """Each with a negative prompt of its own; picture k from seed 7 + k."""
    models, found = pipelines
    ours = models["four"].txt2img([FOX, CAT], steps=10, negative_prompt=["a heart", ""], num_images=2, seed=7)
    same(ours, found["txt2img", "four"], prompt=[FOX, CAT], negative_prompt=["a heart", ""], num_images_per_prompt=2,
         num_inference_steps=10, seed=range(7, 11))  # fmt: skip


def test_a_negative_prompt_takes_the_place_of_the_empty_one(sd):
    asked = ({}, {"negative_prompt": CAT}, {"negative_prompt": ""})
    plain, negative, empty = (sd.txt2img(FOX, steps=3, **options).pictures for options in asked)
    assert torch.equal(plain, empty) and (plain - negative).abs().max() > 1e-3
    with pytest.raises(ValueError, match="2 negative prompts do not fit 3 pictures"):
        sd.txt2img(FOX, num_images=3, negative_prompt=[CAT, ""])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_nearly_the_same_is_drawn(make_sd, sd, dtype):
    half = make_sd().to(dtype)
    ours, expected = (model.txt2img(FOX, steps=4, guidance_scale=2.0) for model in (half, sd))
    assert ours.pictures.dtype == torch.float32
    assert (ours.pictures - expected.pictures).abs().mean() < 0.1 * expected.pictures.std()


# -- img2img -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_img2img_equals_diffusers(pipelines, strength):
    models, found = pipelines
    ours = models["four"].img2img(FOX, photo(), strength=strength, steps=20, guidance_scale=5.0, seed=3)
    assert len(ours.trajectory) == int(strength * 20)
    same(ours, found["img2img", "four"], prompt=FOX, image=photo(), strength=strength, num_inference_steps=20,
         guidance_scale=5.0, seed=[3])  # fmt: skip


class Recorded(torch.nn.Module):
    """The function that stood in for a UNet when CompVis's samplers were recorded."""

    def forward(self, x, t, context=None):
        t = t.to(x).reshape(-1, 1, 1, 1)
        return 0.9 * torch.tanh(x) + 0.1 * torch.cos(t / 100) * torch.roll(x, 1, -1)


@pytest.fixture
def recorded(make_sd, monkeypatch):
    """A model of that function in plain pixels, whose noises come from the record."""
    sd = make_sd(first_stage=IdentityConfig(4), cond_stage=None, scale_factor=1.0,
                 unet=UNetConfig(model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(),
                                 context_dim=None))  # fmt: skip
    sd.model.diffusion_model = Recorded()

    def play(noises):
        noises = iter(noises)
        monkeypatch.setattr("minisd.latent_diffusion.randn", lambda shape, generator=None: next(noises))
        return sd

    return play


class Exact(torch.nn.Module):
    """A UNet that knows the data."""

    def __init__(self, data, schedule):
        super().__init__()
        self.denoiser = ExactDenoiser(data, schedule)

    def forward(self, x, t, context):
        return self.denoiser(x, t)


def in_range(x: torch.Tensor) -> torch.Tensor:
    return x / x.abs().max()


def test_img2img_with_noise_ahead_equals_compvis(load_fixture, recorded):
    """img2img.py noises to t = 741 and denoises from 721."""
    tensors, _ = load_fixture("samplers_compvis")
    sd, x_0 = recorded([tensors["img2img.noise"]] * 2), tensors["img2img.x0"]
    sd.scale_factor = x_0.abs().max().item()  # pictures are within [-1, 1], what was recorded is not
    options = {"strength": 0.75, "steps": 50, "guidance_scale": 1.0, "num_images": len(x_0)}
    ours = sd.img2img(None, in_range(x_0), noise_ahead=True, **options)
    torch.testing.assert_close(ours.trajectory[0].x_t, tensors["img2img.z_enc_t37of50"], atol=5e-5, rtol=0)
    torch.testing.assert_close(ours.trajectory[-1].x, tensors["img2img.decoded"], atol=5e-5, rtol=0)
    assert ours.trajectory[0].t == 721
    plain = sd.img2img(None, in_range(x_0), **options).trajectory
    assert plain[0].t == 721 and (plain[0].x_t - ours.trajectory[0].x_t).abs().max() > 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_img2img_starts_part_of_the_way_and_draws_what_is_there(make_sd, sampler):
    """With a UNet that knows the data, a picture of the data that was noised half of the way comes back."""
    sd = make_sd(first_stage=IdentityConfig(), scale_factor=1.0,
                 unet=UNetConfig(in_channels=3, out_channels=3, model_channels=32, channel_mult=(1,), num_res_blocks=1,
                                 attention_resolutions=(), context_dim=32))  # fmt: skip
    data = draw(0, 5, 3, 8, 8).clamp(-1, 1)
    sd.model.diffusion_model = Exact(data, sd.schedule)
    out = sd.img2img(FOX, data[2], strength=0.5, steps=20, sampler=sampler, seed=9)
    assert len(out.trajectory) == 10 and out.trajectory[0].t < 550
    assert (out.pictures - data[2]).abs().max() < 0.1


def test_a_size_can_be_asked_for_and_a_picture_may_be_a_tensor(sd):
    large = photo(height=64, width=96)
    out = sd.img2img(FOX, large, strength=0.5, steps=4, height=32, width=48)
    assert out.images[0].size == (48, 32)
    resized = large.resize((48, 32), Image.Resampling.LANCZOS)
    x = torch.from_numpy(np.asarray(resized)).permute(2, 0, 1) / 127.5 - 1
    for image in (x, x[None]):
        assert torch.equal(sd.img2img(FOX, image, strength=0.5, steps=4).pictures, out.pictures)


def test_a_picture_may_be_a_file_and_what_is_transparent_is_white(sd, tmp_path):
    image = photo().convert("RGBA")
    image.putalpha(hole())
    image.save(tmp_path / "a.png")
    on_white = Image.new("RGB", image.size, "white")
    on_white.paste(image, mask=hole())
    options = {"strength": 0.5, "steps": 4}
    expected = sd.img2img(FOX, on_white, **options).pictures
    torch.testing.assert_close(sd.img2img(FOX, tmp_path / "a.png", **options).pictures, expected, atol=1e-4, rtol=0)
    (tmp_path / "b.png").write_text("no picture")
    for name in ("b.png", "c.png"):
        with pytest.raises(OSError, match=name):
            sd.img2img(FOX, tmp_path / name)


def test_a_photograph_of_a_phone_stands_upright_wherever_it_is_given(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo(height=24).save(tmp_path / "phone.png", exif=exif)
    upright = read_picture(photo(height=24).rotate(-90, expand=True))
    assert upright.shape == (1, 3, 32, 24)
    for given in (tmp_path / "phone.png", str(tmp_path / "phone.png"), Image.open(tmp_path / "phone.png")):
        assert torch.equal(read_picture(given), upright)
    mask = Image.fromarray(np.eye(8) > 0)
    mask.save(tmp_path / "mask.png", exif=exif)
    assert torch.equal(read_mask(tmp_path / "mask.png", 8, 8), torch.eye(8).flip(1)[None, None])


@pytest.mark.parametrize("kind", [np.uint8, np.float16, np.float64])
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_a_picture_may_be_an_array(kind, channels):
    array = np.random.default_rng(0).integers(0, 256, (6, 5, *channels), np.uint8)
    expected = read_picture(Image.fromarray(array[..., 0] if channels == (1,) else array))
    assert torch.equal(read_picture(array if kind is np.uint8 else (array / 255).astype(kind)), expected)
    black = read_picture(np.zeros((6, 5, *channels), bool))
    assert torch.equal(black, torch.full((1, 3, 6, 5), -1.0))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jp2", "a.pgm"])
def test_sixteen_bits_are_scaled_in_pictures_and_masks(tmp_path, name):
    Image.fromarray((np.arange(64).reshape(8, 8) * 1040).astype(np.uint16)).save(tmp_path / name)
    assert read_picture(tmp_path / name).unique().numel() == 64
    assert read_mask(tmp_path / name, 8, 8).sum() == 32


@pytest.mark.parametrize(
    "kind", ["an eps", "a pipe", "a folder", "a device", "an enormous one", "half of one", "nothing"]
)
def test_what_is_no_picture_is_one_sentence_that_names_it(tmp_path, kind):
    path = tmp_path / "a.png"
    photo().save(path)
    data = path.read_bytes()
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a device":
        path = Path("/dev/zero")
    elif kind == "an eps":  # which PIL reads by starting Ghostscript
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    elif kind == "an enormous one":
        Image.new("1", (20_000, 10_000)).save(path)
    else:
        path.write_bytes(data[: len(data) // 2] if kind == "half of one" else b"")
    said = {"an eps": "its format is none of PNG, ", "an enormous one": "exceeds limit", "nothing": "the file is empty",
            "half of one": "not a readable picture"}.get(kind, "not a file")  # fmt: skip
    for read in (read_picture, lambda given: read_mask(given, 8, 8)):
        with pytest.raises(OSError, match=said) as refused:
            read(path)
        assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)


# -- inpainting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("channels", ["four", "nine"])
def test_inpainting_equals_diffusers(pipelines, channels, strength):
    models, found = pipelines
    options = {"strength": strength, "guidance_scale": 5.0}
    ours = models[channels].inpaint(FOX, photo(), hole(), steps=20, seed=4, **options)
    same(ours, found["inpaint", channels], prompt=FOX, image=photo(), mask_image=hole(), num_inference_steps=20,
         height=32, width=32, seed=[4], **options)  # fmt: skip


def test_inpainting_blended_before_each_step_equals_compvis(load_fixture, recorded):
    """CompVis's mask says what is kept, ours what is drawn anew."""
    tensors, _ = load_fixture("samplers_compvis")
    x_0, keep = tensors["img2img.x0"], tensors["inpaint.mask"]
    sd = recorded([tensors["x_T"], *tensors["inpaint.q_noises"]])
    sd.scale_factor = x_0.abs().max().item()
    mask = (1 - keep).expand(len(x_0), 1, *x_0.shape[-2:])
    ours = sd.inpaint(None, in_range(x_0), mask, blend="before", steps=10, guidance_scale=1.0, num_images=len(x_0))
    torch.testing.assert_close(ours.trajectory[-1].x, tensors["inpaint.S10.x0"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_the_mask_keeps_is_kept_and_the_rest_is_new(sd, sampler):
    x = torch.from_numpy(np.asarray(photo())).permute(2, 0, 1)[None] / 127.5 - 1
    for seed in (0, 1):
        out = sd.inpaint(FOX, photo(), hole(), steps=6, sampler=sampler, seed=seed, guidance_scale=1.0)
        z = sd.get_first_stage_encoding(sd.encode_first_stage(x), torch.Generator().manual_seed(seed))
        new = torch.zeros(8, 8, dtype=torch.bool)
        new[2:5, 3:7] = True
        difference = (out.trajectory[-1].x - z).abs().amax(dim=1)[0]
        assert difference[~new].max() < 1e-5 and difference[new].min() > 1e-3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_in_a_mask_is_kept(tmp_path, mode):
    strokes = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    strokes.paste((255, 255, 255, 255), (8, 8, 16, 16))
    strokes.convert(mode).save(tmp_path / "strokes.png")
    assert read_mask(tmp_path / "strokes.png", 32, 32)[0, 0].nonzero().tolist() == [
        [y, x] for y in range(8, 16) for x in range(8, 16)
    ]


def test_a_thin_stroke_is_not_lost_where_a_large_mask_is_made_smaller():
    mask = np.zeros((2000, 3000), bool)
    mask[700:702] = True  # between the rows that NEAREST takes
    assert read_mask(mask, 32, 32)[0, 0].nonzero()[:, 0].unique().tolist() == [11]
    thick = np.zeros((2000, 3000), bool)
    thick[700:1200, 401:1777] = True
    nearest = Image.fromarray(thick).convert("L").resize((32, 32), Image.Resampling.NEAREST)
    assert torch.equal(read_mask(thick, 32, 32)[0, 0], torch.from_numpy(np.array(nearest)) / 255)


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("stroke", ["row", "slope", "dot"])
def test_a_stroke_that_is_thinner_than_a_pixel_of_the_latent_is_drawn(make_sd, sd, stroke, channels):
    model = make_sd(unet=replace(sd.config.unet, in_channels=channels))
    y, x = np.mgrid[0:32, 0:32]
    mask = {"row": (y > 12) & (y < 16), "slope": y == x // 2 + 5, "dot": (y == 9) & (x == 14)}[stroke]
    touched = torch.from_numpy(mask.reshape(8, 4, 8, 4).any((1, 3)))
    fox, cat = (model.inpaint(p, photo(), mask, steps=2).trajectory[-1].x[0] for p in (FOX, CAT))
    changed = (fox - cat).abs().amax(0) > 1e-6
    assert (changed == touched).all() if channels == 4 else changed[touched].all()
    if channels == 9:
        seen = model.masked_picture(read_picture(photo()), read_mask(mask, 32, 32), [torch.Generator()])[0, 0]
        assert torch.equal(seen.bool(), touched)


def test_a_mask_without_thin_strokes_is_sampled_as_in_diffusers(sd):
    y, x = np.mgrid[0:32, 0:32]
    for k in range(4, 14):
        for shape in ((y - 15) ** 2 + (x - 13) ** 2 < k**2, (y > 3) & (y < 8 + k) & (x > k) & (x < 27)):
            mask = read_mask(shape, 32, 32)
            assert torch.equal(sd._latent_mask(mask), torch.nn.functional.interpolate(mask, (8, 8)))


def test_the_trajectory_of_inpainting_can_be_filmed(sd, tmp_path):
    out = sd.inpaint(FOX, photo(), hole(), steps=3, num_images=2)
    out.trajectory.save(tmp_path / "film.webp")
    assert Image.open(tmp_path / "film.webp").n_frames == 3


# -- other conditions, other first stages --------------------------------------------------------------------------


def test_a_model_of_classes(make_sd):
    sd = make_sd(cond_stage=ClassConfig(n_classes=5, embed_dim=32))
    context = sd.get_learned_conditioning([0, 3])
    assert context.shape == (2, 1, 32) and torch.equal(context[1, 0], sd.cond_stage_model.embedding.weight[3])
    step = next(sd.sample([1, 3], steps=2, guidance_scale=3.0))
    t = torch.tensor([step.t] * 2)
    with torch.no_grad():
        eps = {c: sd.apply_model(step.x_t, t, sd.get_learned_conditioning(c)) for c in ((1, 3), (4, 4))}
    # the last class stands for none
    torch.testing.assert_close(step.eps, eps[4, 4] + 3.0 * (eps[1, 3] - eps[4, 4]), atol=1e-4, rtol=1e-4)
    for wrong in ("a fox", 5, -1):
        with pytest.raises(ValueError, match=re.escape(f"numbers from 0 to 4, not {wrong!r}")):
            sd.txt2img(wrong)


@pytest.mark.parametrize("key", ["crossattn", "concat", "hybrid", None])
@torch.no_grad()
def test_conditions_reach_the_unet_by_attention_and_by_channels(make_sd, key):
    """As in CompVis's DiffusionWrapper: dicts of lists, or one tensor."""
    by_attention, by_channels = key in ("crossattn", "hybrid"), key in ("concat", "hybrid")
    unet = UNetConfig(model_channels=32, num_res_blocks=1, channel_mult=(1, 1), attention_resolutions=(2,), num_heads=2,
                      in_channels=7 if by_channels else 4, context_dim=32 if by_attention else None,
                      use_spatial_transformer=by_attention)  # fmt: skip
    sd = make_sd(unet=unet, cond_stage=ClassConfig(5, 32) if by_attention else None)
    x, t, context, concat = draw(0, 2, 4, 8, 8), torch.tensor([10, 900]), draw(1, 2, 3, 32), draw(2, 2, 3, 8, 8)
    cond = ({"c_crossattn": [context[:, :1], context[:, 1:]]} if by_attention else {}) | (
        {"c_concat": [concat[:, :2], concat[:, 2:]]} if by_channels else {}
    )
    inputs = torch.cat([x, concat], dim=1) if by_channels else x
    expected = sd.model.diffusion_model(inputs, t, context if by_attention else None)
    assert torch.equal(sd.apply_model(x, t, cond or None), expected)
    options = {"c_concat": concat} if by_channels else {}
    out = sd.txt2img([0, 1] if by_attention else [None, None], steps=2, guidance_scale=2.0, **options)
    assert out.pictures.isfinite().all() and (out.pictures[0] - out.pictures[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="channels beside the noisy latent"):
        sd.apply_model(x, t, {**cond, "c_concat": draw(0, 2, 1, 8, 8)})


@pytest.mark.parametrize(
    "first_stage",
    [VQ, IdentityConfig(4), SMALL],
    ids=["VQ", "pixels", "KL"],
)
def test_first_stages_are_scaled_on_the_way_in_and_back_on_the_way_out(make_sd, first_stage):
    sd = make_sd(first_stage=first_stage)
    x = draw(0, 2, first_stage.in_channels, 16, 16).clamp(-1, 1)
    posterior = sd.encode_first_stage(x)
    z = sd.get_first_stage_encoding(posterior, torch.Generator().manual_seed(1))
    f = first_stage.downsampling
    assert z.shape == (2, 4, 16 // f, 16 // f)
    unscaled = posterior if isinstance(posterior, torch.Tensor) else posterior.sample(torch.Generator().manual_seed(1))
    torch.testing.assert_close(z, sd.scale_factor * unscaled)
    with torch.no_grad():
        torch.testing.assert_close(sd.decode_first_stage(z), sd.first_stage_model.decode(unscaled), atol=1e-5, rtol=0)


@pytest.mark.parametrize("first_stage", [VQ, SMALL])
def test_such_a_model_is_saved_and_loaded(make_sd, first_stage, tmp_path):
    from minisd import load, save

    sd = make_sd(first_stage=first_stage, cond_stage=ClassConfig(5, 32))
    save(sd, tmp_path / "model")
    again = load(tmp_path / "model", "cpu")
    assert again.config == sd.config and isinstance(again, LatentDiffusion)
    assert torch.equal(again.txt2img(3, steps=2).pictures, sd.txt2img(3, steps=2).pictures)


def test_tiles_and_slices_are_asked_of_the_first_stage(sd, make_sd):
    tiled = make_sd()
    tiled.first_stage_model.enable_tiling(16)
    tiled.first_stage_model.enable_slicing()
    whole, in_parts = (model.txt2img(FOX, steps=2, num_images=2) for model in (sd, tiled))
    assert torch.equal(whole.trajectory[-1].x, in_parts.trajectory[-1].x)
    assert 0 < (whole.pictures - in_parts.pictures).abs().mean() < 0.5


# -- errors: one sentence that names what was given ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("img2img", {"strength": 0.0}, "above 0 and at most 1, but it is 0.0"),
        ("img2img", {"strength": 1.5}, "above 0 and at most 1, but it is 1.5"),
        ("img2img", {"strength": 0.01}, "none of 50 steps is made"),
        ("img2img", {"image": torch.zeros(32, 32)}, r"must be an image, path, or tensor .* not \[32, 32\]"),
        ("img2img", {"image": torch.full((3, 32, 32), 255.0)}, r"values in \[-1, 1\], and this tensor in \[255, 255\]"),
        ("img2img", {"image": torch.zeros(1, 32, 32)}, "pictures have 3 channels, not 1"),
        ("img2img", {"image": photo(height=30)}, "multiples of 4 for this model, not 30x32: try 32x32"),
        ("img2img", {"image": torch.zeros(2, 3, 32, 32), "num_images": 3}, "2 pictures do not fit 3 drawings"),
        ("img2img", {"sampler": "magic"}, "no sampler 'magic'"),
        ("img2img", {"height": 0}, "multiples of 4 for this model, not 0x32"),
        (
            "img2img",
            {"image": torch.zeros(3, 32, 32), "height": 64},
            "not resized: it has 32 pixels where 64 are asked",
        ),
        (
            "img2img",
            {"image": torch.zeros(0, 3, 32, 32)},
            r"must be an image, path, or tensor .* not \[0, 3, 32, 32\]",
        ),
        (
            "img2img",
            {"image": np.zeros((3, 32, 32), np.uint8)},
            r"an array must be .* this one is \[3, 32, 32\] of uint8",
        ),
        ("img2img", {"image": np.full((32, 32, 3), 2.0)}, r"floats in \[0, 1\], and this one is .* of float64"),
        ("img2img", {"image": np.zeros((32, 32), np.int64)}, "this one is .* of int64"),
        ("txt2img", {"start_code": torch.zeros(1, 4, 8, 8), "height": 64}, r"start_code is .* ask for \[1, 4, 16, 8\]"),
        ("inpaint", {"mask": torch.ones(0, 1, 32, 32)}, r"the picture's size, 32x32, not \[0, 1, 32, 32\]"),
        ("inpaint", {"mask": Image.new("LA", (32, 32), (255, 0))}, "black everywhere, or transparent"),
        (
            "inpaint",
            {"mask": torch.eye(2)[:, :1, None, None].expand(2, 1, 32, 32), "num_images": 2},
            "black everywhere",
        ),
        ("inpaint", {"mask": Image.new("L", (32, 32))}, "black everywhere"),
        ("inpaint", {"mask": torch.ones(16, 16)}, r"the picture's size, 32x32, not \[16, 16\]"),
        ("inpaint", {"blend": "never"}, '"after" or "before" each step, but it is \'never\''),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(sd, method, arguments, message):
    arguments = (
        ({} if method == "txt2img" else {"image": photo()})
        | ({"mask": hole()} if method == "inpaint" else {})
        | arguments
    )
    with pytest.raises(ValueError, match=message) as error:
        getattr(sd, method)(FOX, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("asked", [{"start_code": torch.zeros(1, 4, 8, 8)}, {"timesteps": [100, 1]}])
def test_an_argument_that_a_picture_leaves_no_room_for_is_refused(sd, asked):
    with pytest.raises(TypeError, match=f"img2img has no argument '{next(iter(asked))}'"):
        sd.img2img(FOX, photo(), **asked)


def test_what_a_model_has_no_use_for_is_refused(make_sd, sd):
    unet = replace(sd.config.unet, context_dim=None, use_spatial_transformer=False)
    with pytest.raises(ValueError, match="this model has no condition"):
        make_sd(unet=unet, cond_stage=None).txt2img(None, steps=2, negative_prompt="a dog")
    nine = make_sd(unet=replace(sd.config.unet, in_channels=9))
    with pytest.raises(ValueError, match="for a model with further channels \"after\", but it is 'before'"):
        nine.inpaint(FOX, photo(), hole(), blend="before", steps=2)
