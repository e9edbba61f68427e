"""The whole model: named as the checkpoint is, and one seed, one picture, however it is drawn."""

import functools
import inspect
import itertools
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minisd import PRESETS, Drawing, LatentDiffusion, LatentDiffusionConfig, load, sampling
from minisd.clip import CLIPTextConfig
from minisd.loss import LOSSES
from minisd.noising import ExactDenoiser
from minisd.sampling import SAMPLERS
from minisd.unet import UNetConfig
from minisd.vae import AutoencoderConfig

ROOT = Path(__file__).parents[1]
FOX = "a red fox, noto style"
BY_SAMPLER = pytest.mark.parametrize("sampler", SAMPLERS)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def last(steps):
    return list(steps)[-1]


@contextmanager
def unet_calls(sd):
    """The batch size of each call of the UNet."""
    sizes = []
    hook = sd.model.diffusion_model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    try:
        yield sizes
    finally:
        hook.remove()


# -- the checkpoint ------------------------------------------------------------------------------------------------


def test_names_and_shapes_are_those_of_the_checkpoint(load_fixture, tokenizer):
    """Of one with Stable Diffusion v1's structure and a tenth of its width, without the schedule."""
    _, info = load_fixture("sd_v1_tenth_width_keys")
    expected = {
        name: tuple(shape)
        for name, shape in info["keys"].items()
        if "." in name  # the others are the schedule's buffers
        and not name.startswith(("model_ema.", "first_stage_model.loss."))
        and not name.endswith("position_ids")
    }
    config = LatentDiffusionConfig(
        UNetConfig(model_channels=32, context_dim=64),
        AutoencoderConfig(ch=32),
        CLIPTextConfig(vocab_size=512, width=64, layers=2, heads=2),
    )
    with torch.device("meta"):
        state = LatentDiffusion(config, tokenizer).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def test_the_ema_names_of_the_checkpoint_are_the_unets_without_dots(load_fixture, tokenizer):
    """How a reader finds the EMA weights: no dot, so the names can't be taken apart, only put together."""
    _, info = load_fixture("sd_v1_tenth_width_keys")
    in_file = {name.removeprefix("model_ema.") for name in info["keys"] if name.startswith("model_ema.")}
    unet = [name.removeprefix("model.") for name in info["keys"] if name.startswith("model.")]
    assert {name.replace(".", "") for name in unet} == in_file - {"decay", "num_updates"}


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_fit_together(name, tokenizer):
    config = PRESETS[name]
    with torch.device("meta"):
        sd = LatentDiffusion(config, tokenizer)
    assert config.unet.context_dim == config.cond_stage.width
    assert config.unet.out_channels == config.first_stage.embed_dim
    assert config.concat_channels == (5 if name == "sd-v1-inpainting" else 0)
    channels, height, width = sd.latent_shape()
    assert height == width == config.image_size // config.first_stage.downsampling
    if name == "sd-v1":
        assert (channels, height) == (4, 64)
        assert sum(p.numel() for p in sd.parameters()) == 859_520_964 + 83_653_863 + 123_060_480


def test_autoencoder_and_text_encoder_are_frozen_and_the_unet_is_not(make_sd):
    frozen = {name.split(".")[0]: set() for name, _ in make_sd().named_parameters()}
    for name, parameter in make_sd().named_parameters():
        frozen[name.split(".")[0]].add(not parameter.requires_grad)
    assert frozen == {"model": {False}, "first_stage_model": {True}, "cond_stage_model": {True}}


# -- the stages ----------------------------------------------------------------------------------------------------


def test_latents_are_scaled_on_the_way_in_and_back_on_the_way_out(sd):
    pictures = draw(0, 2, 3, 32, 32).clamp(-1, 1)
    posterior = sd.encode_first_stage(pictures)
    z = sd.get_first_stage_encoding(posterior, torch.Generator().manual_seed(1))
    unscaled = posterior.sample(torch.Generator().manual_seed(1))
    assert z.shape == (2, *sd.latent_shape()) == (2, 4, 8, 8)
    torch.testing.assert_close(z, 0.5 * unscaled)
    with torch.no_grad():
        torch.testing.assert_close(sd.decode_first_stage(z), sd.first_stage_model.decode(unscaled), atol=1e-6, rtol=0)
    assert not posterior.mean.requires_grad and not sd.decode_first_stage(z).requires_grad


def test_conditioning_is_the_text_encoders_last_hidden_state(sd):
    context = sd.get_learned_conditioning([FOX, ""])
    assert context.shape == (2, 16, 32)
    assert torch.equal(context, sd.cond_stage_model([FOX, ""])) and not torch.equal(context[0], context[1])


@torch.no_grad()
def test_apply_model_is_the_unet(sd):
    x, t, context = draw(0, 2, 4, 8, 8), torch.tensor([1, 990]), sd.get_learned_conditioning([FOX, ""])
    assert torch.equal(sd.apply_model(x, t, context), sd.model.diffusion_model(x, t, context))


@pytest.mark.parametrize("parameterization", LOSSES)
def test_p_losses_is_the_loss_of_what_the_unet_predicts(make_sd, parameterization):
    sd = make_sd(parameterization=parameterization)
    x_start, noise, t = draw(0, 2, 4, 8, 8), draw(1, 2, 4, 8, 8), torch.tensor([20, 900])
    context = sd.get_learned_conditioning([FOX, ""])
    loss = sd.p_losses(x_start, context, t, noise)

    a = sd.schedule.alphas_cumprod[t][:, None, None, None]
    x_t = a.sqrt() * x_start + (1 - a).sqrt() * noise
    torch.testing.assert_close(sd.q_sample(x_start, t, noise), x_t)
    target = {"eps": noise, "v": a.sqrt() * noise - (1 - a).sqrt() * x_start, "x0": x_start}[parameterization]
    torch.testing.assert_close(loss, (sd.model.diffusion_model(x_t, t, context) - target).square().mean())

    loss.backward()
    with_gradient = {name.split(".")[0] for name, p in sd.named_parameters() if p.grad is not None}
    assert with_gradient == {"model"}
    assert all(p.grad is not None for p in sd.model.parameters())


def test_q_sample_and_p_losses_draw_their_noise_where_it_is_left_out(sd):
    x_start, t = torch.zeros(64, 4, 8, 8), torch.full((64,), 999)
    torch.manual_seed(0)
    assert sd.q_sample(x_start, t).std().item() == pytest.approx(0.998, abs=0.02)
    context = sd.get_learned_conditioning([""] * 2)
    losses = {sd.p_losses(x_start[:2], context, t[:2]).item() for _ in range(2)}
    assert len(losses) == 2


# -- drawing -------------------------------------------------------------------------------------------------------


@BY_SAMPLER
def test_the_same_seed_draws_the_same_picture_and_another_another(sd, sampler):
    options = {"steps": 3, "sampler": sampler, "guidance_scale": 2.0}
    first, again, other = (sd.txt2img(FOX, seed=seed, **options) for seed in (5, 5, 6))
    assert torch.equal(first.pictures, again.pictures)
    assert first.images[0].tobytes() == again.images[0].tobytes()
    assert (first.pictures - other.pictures).abs().max() > 0.05


# What PyTorch or numpy may have been told before, and may not change a picture.
SETTINGS = {
    "float64": lambda: _with(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: _with(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "another device": lambda: _with(torch.set_default_device, "meta", None),
    "a global seed": lambda: _with(torch.manual_seed, 5, 0),
}


@contextmanager
def _with(setter, value, before):
    setter(value)
    try:
        yield
    finally:
        setter(before)


def drawn_every_way(sd, seed):
    picture = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    mask = Image.fromarray(np.eye(32, dtype=np.uint8) * 255)
    over = {"steps": 3, "seed": seed}
    yield sd.txt2img(FOX, steps=2, seed=seed, num_images=2, sampler="euler_ancestral")
    yield sd.img2img(FOX, picture, **over)
    yield sd.inpaint(FOX, picture, mask, strength=0.7, blend="before", **over)


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_global_setting_changes_a_picture(sd, setting):
    expected = [drawing.pictures for drawing in drawn_every_way(sd, 3)]
    with SETTINGS[setting]():
        drawn = [drawing.pictures for drawing in drawn_every_way(sd, 3)]
    for picture, same in zip(drawn, expected, strict=True):
        assert picture.dtype == torch.float32 and torch.equal(picture, same)


@pytest.mark.parametrize("seed", [np.int64(255), np.uint8(255), np.array(255), torch.tensor(255, dtype=torch.uint8)])
def test_an_integer_of_numpy_or_torch_is_the_same_seed(sd, seed):
    for picture, same in zip(drawn_every_way(sd, seed), drawn_every_way(sd, 255), strict=True):
        assert torch.equal(picture.pictures, same.pictures)


def test_autocast_changes_what_the_networks_compute_and_not_the_noise(sd):
    options = {"steps": 2, "seed": 3}
    first, *_ = sd.sample(FOX, **options)
    with torch.autocast("cpu", torch.bfloat16):
        same, *_ = sd.sample(FOX, **options)
    assert torch.equal(same.x_t, first.x_t) and same.x.dtype == torch.float32


HALF, WHOLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "parts", [(HALF, WHOLE, WHOLE), (WHOLE, HALF, WHOLE), (WHOLE, WHOLE, HALF), (HALF, WHOLE, HALF)]
)
def test_each_part_may_have_a_dtype_of_its_own(make_sd, parts):
    sd = make_sd()
    expected = [drawing.pictures for drawing in drawn_every_way(sd, 3)]
    for part, dtype in zip((sd.model, sd.first_stage_model, sd.cond_stage_model), parts, strict=True):
        part.to(dtype)
    for drawing, close in zip(drawn_every_way(sd, 3), expected, strict=True):
        assert drawing.pictures.dtype == torch.float32 and (drawing.pictures - close).abs().mean() < 0.1


@BY_SAMPLER
def test_picture_k_of_many_is_the_picture_of_seed_plus_k(sd, sampler):
    """Drawn alone, or beside others: with their fresh noise in each step, too."""
    options = {"steps": 4, "sampler": sampler, "guidance_scale": 2.0} | ({"eta": 1.0} if sampler == "ddim" else {})
    together = last(sd.sample(FOX, seed=5, num_images=3, **options)).x
    spread = together.std().item()  # up to 18, as the random UNet does not find the noise
    for k in range(3):
        alone = last(sd.sample(FOX, seed=5 + k, **options)).x
        torch.testing.assert_close(together[k : k + 1], alone, atol=1e-5 * spread, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1 * spread


def test_several_prompts_are_drawn_one_after_the_other(sd):
    """num_images pictures for each, numbered through."""
    options = {"steps": 2, "guidance_scale": 3.0}
    both = last(sd.sample([FOX, "a heart"], num_images=2, seed=0, **options)).x
    assert len(both) == 4
    for k, prompt in enumerate([FOX, FOX, "a heart", "a heart"]):
        alone = last(sd.sample(prompt, seed=k, **options)).x
        torch.testing.assert_close(both[k : k + 1], alone, atol=1e-4, rtol=0)


def test_the_starting_noise_is_standard_normal(sd):
    x_T = next(sd.sample("", steps=1, num_images=100, guidance_scale=1.0)).x_t
    n = x_T.numel()
    assert x_T.shape == (100, 4, 8, 8)
    assert x_T.mean().abs() < 5 / n**0.5 and (x_T.var() - 1).abs() < 5 * (2 / n) ** 0.5
    assert (x_T**4).mean().item() == pytest.approx(3, abs=0.2)  # a Gaussian's kurtosis
    correlation = torch.corrcoef(x_T.flatten(1)).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / 256**0.5  # no two pictures start alike
    assert torch.equal(next(sd.sample(FOX, steps=1, seed=3)).x_t, draw(3, 4, 8, 8)[None])  # the same for each prompt


@pytest.mark.parametrize(("scale", "batch"), [(1.0, 2), (0.0, 4), (7.5, 4)])
def test_guidance_doubles_the_batch_and_no_guidance_does_not(sd, scale, batch):
    with unet_calls(sd) as sizes:
        list(sd.sample(FOX, steps=3, guidance_scale=scale, num_images=2))
    assert sizes == [batch] * 3


@torch.no_grad()
def test_guidance_exaggerates_what_the_prompt_changes(sd):
    step = next(sd.sample(FOX, steps=4, guidance_scale=5.0, seed=2))
    t, context = torch.tensor([step.t]), sd.get_learned_conditioning([FOX, ""])
    cond, uncond = (sd.apply_model(step.x_t, t, c[None]) for c in context)
    torch.testing.assert_close(step.eps_cond, cond, atol=1e-5, rtol=0)
    torch.testing.assert_close(step.eps_uncond, uncond, atol=1e-5, rtol=0)
    torch.testing.assert_close(step.eps, uncond + 5.0 * (cond - uncond), atol=1e-4, rtol=0)
    assert (cond - uncond).abs().max() > 1e-3
    plain = next(sd.sample(FOX, steps=4, guidance_scale=1.0, seed=2))
    torch.testing.assert_close(plain.eps, cond, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_empty_prompt_is_no_prompt(sd, scale):
    """At every guidance, it draws what any prompt draws at guidance 0."""
    empty = last(sd.sample("", steps=3, guidance_scale=scale)).x
    torch.testing.assert_close(empty, last(sd.sample(FOX, steps=3, guidance_scale=0.0)).x, atol=2e-5, rtol=2e-5)
    assert (empty - last(sd.sample(FOX, steps=3, guidance_scale=1.0)).x).abs().max() > 1e-3


@BY_SAMPLER
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_trajectory_has_as_many_steps_as_were_asked_for(sd, sampler, steps):
    drawing = sd.txt2img(FOX, steps=steps, sampler=sampler, guidance_scale=1.0)
    assert isinstance(drawing, Drawing) and len(drawing.trajectory) == steps
    assert [step.i for step in drawing.trajectory.steps] == list(range(steps))
    for before, after in itertools.pairwise(drawing.trajectory.steps):
        assert before.t > after.t and torch.equal(before.x, after.x_t)
    (image,) = drawing.images
    assert image.size == (32, 32) and image.mode == "RGB"
    assert not drawing.pictures.requires_grad


def test_a_drawing_decodes_its_last_latent(sd):
    drawing = sd.txt2img(FOX, steps=2, num_images=2)
    expected = sd.decode_first_stage(drawing.trajectory[-1].x)
    assert torch.equal(drawing.pictures, expected)
    pixels = ((expected.clamp(-1, 1) + 1) / 2 * 255).round().byte().permute(0, 2, 3, 1)
    assert [image.tobytes() for image in drawing.images] == [bytes(p.flatten().tolist()) for p in pixels]


@pytest.mark.parametrize(("height", "width"), [(16, 48), (20, 36)], ids=["even", "odd on the latent's grid"])
def test_other_sizes(sd, height, width):
    drawing = sd.txt2img(FOX, steps=1, height=height, width=width)
    assert drawing.trajectory[0].x.shape == (1, 4, height // 4, width // 4)
    assert drawing.images[0].size == (width, height)


def test_progress_changes_nothing_but_what_is_shown(sd, capsys):
    shown = sd.txt2img(FOX, progress=True, steps=3)
    assert "drawing" in capsys.readouterr().err
    assert torch.equal(shown.pictures, sd.txt2img(FOX, steps=3).pictures)
    assert not capsys.readouterr().err


# -- what the UNet predicts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", ["v", "x0"])
@BY_SAMPLER
@torch.no_grad()
def test_the_samplers_get_the_noise_that_agrees_with_the_prediction(make_sd, parameterization, sampler):
    """From the first step's x_t and the UNet's answer follow its noise and its x_0."""
    sd = make_sd(parameterization=parameterization)
    step = next(sd.sample(FOX, steps=10, guidance_scale=1.0, sampler=sampler, spacing="trailing", timesteps=[400, 200]))
    answer = sd.apply_model(step.x_t, torch.tensor([400]), sd.get_learned_conditioning([FOX]))
    a = sd.schedule.alpha_bar(400)
    x0 = {"v": a**0.5 * step.x_t - (1 - a) ** 0.5 * answer, "x0": answer}[parameterization]
    eps = (step.x_t - a**0.5 * x0) / (1 - a) ** 0.5
    if sampler not in ("plms", "heun"):  # which take the mean of two answers in their first step
        torch.testing.assert_close(step.eps, eps, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(step.x0, x0, atol=2e-5, rtol=2e-5)
    else:
        assert not torch.allclose(step.eps, answer, atol=1e-2)


class Exact(torch.nn.Module):
    """A UNet that knows the data set, and answers in the way that it is asked to."""

    def __init__(self, data, schedule, parameterization):
        super().__init__()
        self.denoiser, self.schedule, self.parameterization = ExactDenoiser(data, schedule), schedule, parameterization

    def forward(self, x, t, context):
        x0, eps = self.denoiser.x0(x, t), self.denoiser(x, t)
        return {"eps": eps, "x0": x0, "v": self.schedule.get_v(x0, eps, t)}[self.parameterization]


@BY_SAMPLER
def test_noise_velocity_and_picture_lead_to_the_same_picture_of_the_data(make_sd, sampler):
    data, found = draw(0, 3, 4, 8, 8), {}
    for parameterization in LOSSES:
        sd = make_sd(parameterization=parameterization)
        sd.model.diffusion_model = Exact(data, sd.schedule, parameterization)
        found[parameterization] = last(sd.sample("", steps=20, sampler=sampler, num_images=4)).x0
    for name in ("v", "x0"):
        torch.testing.assert_close(found[name], found["eps"], atol=2e-3, rtol=0)
    distances = torch.cdist(found["eps"].flatten(1), data.flatten(1)).min(dim=1).values
    assert distances.max() < 0.5  # between two of the data lie 22


# -- the trajectory as pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_a_trajectory_is_saved_as_a_film_of_its_steps(sd, tmp_path, suffix):
    trajectory = sd.txt2img(FOX, steps=4, num_images=2, guidance_scale=1.0).trajectory
    trajectory.save(tmp_path / f"fox{suffix}", frame_ms=50, scale=3)
    with Image.open(tmp_path / f"fox{suffix}") as film:
        assert film.n_frames == 4
        assert film.size == (2 * 3 * 32 + 2, 3 * 32)  # two pictures, each pixel nine, and a gap between
        film.seek(3)
        if suffix == ".webp":  # without loss: the last frame is the last x_0, enlarged
            corner = film.convert("RGB").crop((0, 0, 96, 96)).resize((32, 32), Image.NEAREST)
            assert corner.tobytes() == trajectory.x0_images()[-1][0].tobytes()


def test_a_trajectory_shows_x_t_and_the_estimates_of_x_0(sd):
    trajectory = sd.txt2img(FOX, steps=2, num_images=2).trajectory
    for images, latents in (
        (trajectory.x_t_images(), [step.x_t for step in trajectory.steps]),
        (trajectory.x0_images(), [step.x0 for step in trajectory.steps]),
    ):
        assert [len(row) for row in images] == [2, 2]
        for row, z in zip(images, latents, strict=True):
            pixels = ((sd.decode_first_stage(z).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
            assert [image.tobytes() for image in row] == [bytes(p.flatten().tolist()) for p in pixels]


# -- errors: one sentence that names what was given ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler_b"}, "'euler_b'.* ddpm, ddim, plms, dpmpp_2m, euler, euler_ancestral, heun"),
        ({"steps": 0}, "between 1 and 1000.* 0"),
        ({"steps": 1001}, "between 1 and 1000.* 1001"),
        ({"height": 34}, "multiples of 4 .*not 34x32: try 32x32"),
        ({"width": 19}, "multiples of 4 .*not 32x19: try 32x20"),
        ({"width": -8}, "multiples of 4 .*not 32x-8"),
        ({"num_images": 0}, "num_images is 0"),
        ({"num_images": 10**11}, "num_images is 100,000,000,000: at most 100,000"),
        ({"steps": 10**11}, "steps must lie between 1 and 1000"),
        ({"seed": 2**70}, "between .*but this one is 1180591620717411303424"),
        ({"prompt": []}, r"the prompt \[\]"),
        ({"prompt": "caf\udce9"}, r"a prompt has to be a text in Unicode, not 'caf\\udce9'"),
        ({"start_code": torch.zeros(0, 4, 8, 8)}, "0 start codes do not fit 1 drawings"),
        ({"sampler": "plms", "eta": 0.5}, "eta must be 0.* 0.5"),
        ({"spacing": "even"}, '"leading", "linspace" or "trailing".*"even"'),
    ],
    ids=lambda value: ascii(value)[:40] if isinstance(value, dict) else "",
)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(sd, options, message):
    with unet_calls(sd) as sizes, pytest.raises(ValueError) as refused:
        sd.txt2img(**{"prompt": FOX} | options)
    assert re.search(message, str(refused.value)) and "\n" not in str(refused.value)
    assert sizes == []


@pytest.mark.parametrize("size", [400_000, 4_000_000_000])
def test_a_picture_that_no_memory_holds_is_refused_with_what_to_lower(sd, size):
    with pytest.raises(torch.OutOfMemoryError, match="not enough memory: draw fewer pictures .* or smaller ones"):
        sd.txt2img(FOX, steps=1, height=size, width=size)


@pytest.mark.parametrize("device", ["gpu", "tpu", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=f"this machine has no device '{device}' .*: take '(cpu|cuda|mps)'"):
        load("tiny", device)


def test_a_prompt_too_long_is_drawn_with_a_warning(sd):
    with pytest.warns(UserWarning, match="longer than 16 tokens; cut off: 'a red fox'"):
        long = last(sd.sample("a red fox " * 4 + "a fox" + " a red fox", steps=1)).x
    assert torch.equal(long, last(sd.sample("a red fox " * 4 + "a fox", steps=1)).x)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("guidance", "guidance_scale"), ("num_inference_steps", "steps"), ("neg_prompt", "negative_prompt")],
)
def test_a_wrong_name_is_answered_with_the_one_that_was_meant(sd, given, meant):
    with pytest.raises(TypeError, match=f"txt2img has no argument '{given}': did you mean {meant}"):
        sd.txt2img(FOX, **{given: 3})


@pytest.mark.parametrize("method", ["sample", "txt2img", "img2img", "inpaint"])
def test_every_argument_of_a_drawing_stands_in_its_signature(method):
    parameters = inspect.signature(getattr(LatentDiffusion, method)).parameters
    assert {"prompt", "steps", "guidance_scale", "sampler", "seed", "eta", "spacing"} <= parameters.keys()
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())


def test_an_option_that_the_sampler_does_not_have_is_refused(sd):
    with pytest.raises(ValueError, match="sampler 'euler' has no lower_order_final"):
        sd.txt2img(FOX, steps=2, sampler="euler", lower_order_final=True)


def test_an_option_of_a_new_sampler_is_an_argument_of_a_drawing(sd, monkeypatch):
    monkeypatch.setattr("minisd.sampling.SAMPLERS", SAMPLERS.copy())

    @sampling.sampler(steps=4, spacing="leading")
    def less(x_t, eps, a_t, a_prev, *, share=1.0):
        return a_prev**0.5 * sampling.predict_x0(x_t, eps, a_t) + share * (1 - a_prev) ** 0.5 * eps

    plain, half = (sd.txt2img(FOX, steps=3, sampler="less", share=share).pictures for share in (None, 0.5))
    assert not torch.equal(plain, half)
    with pytest.raises(TypeError, match="has no argument 'shar': did you mean share"):
        sd.txt2img(FOX, steps=3, sampler="less", shar=0.5)


def test_a_sampler_may_be_given_itself_with_options_of_its_own(sd):
    given = functools.partial(SAMPLERS["dpmpp_2m"], set_alpha_to_one=False)
    named = sd.txt2img(FOX, steps=4, sampler="dpmpp_2m", set_alpha_to_one=False).pictures
    assert torch.equal(sd.txt2img(FOX, steps=4, sampler=given).pictures, named)
    assert not torch.equal(sd.txt2img(FOX, steps=4, sampler="dpmpp_2m").pictures, named)


def test_few_frames_lie_between_a_prompt_and_the_unet():
    """A reader who stops in the debugger inside the UNet finds the prompt again without searching."""
    code = """
import sys, minisd
from pathlib import Path
sd, own = minisd.load("tiny", "cpu"), str(Path(minisd.__file__).parent)
def forward(*args, found=[]):
    frame, between = sys._getframe(1), []
    while frame.f_code.co_name != "txt2img":
        if frame.f_code.co_filename.startswith(own):
            between.append(frame.f_code.co_qualname)
        frame = frame.f_back
    print(*between)
    return unet(*args)
unet = sd.model.diffusion_model.forward
sd.model.diffusion_model.forward = forward
sd.txt2img("a red circle", steps=1)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert len(run.stdout.split()) <= 4, run.stdout
