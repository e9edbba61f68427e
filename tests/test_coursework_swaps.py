"""The solution of each exercise, swapped in: minisd draws and trains with it just as it does without it."""

import copy
import json
import warnings
from dataclasses import replace
from functools import cache, wraps

import pytest
import torch

import minisd
from minisd import PRESETS
from minisd.coursework import EXERCISES, swap
from minisd.coursework.texts import read
from minisd.data import CaptionedPictures, draw_shapes
from minisd.sampling import SAMPLERS
from minisd.training import (
    CLIPRecipe,
    SingleDevice,
    Trainer,
    UNetRecipe,
    VAERecipe,
    recipes,
    train_clip,
    train_unet,
    train_vae,
)

SAMPLER_OF = read("pictures.toml")["samplers"]  # of the exercises that another sampler than ddim calls

ONE_STEP = {"steps": 1, "batch_size": 4, "warmup": 1, "log_every": 1}
DRAWINGS = ["txt2img", "img2img", "inpaint"]  # made with every exercise, by the sampler that it is about, or by ddim
# Where the student's function is called: in which of these drawings, and in what else. An exercise that is missing here
# fails a test.
CALLED_IN = {
    "scaled_linear_betas": "txt2img img2img inpaint exact unet",
    "alphas_cumprod": "txt2img img2img inpaint exact unet",
    "q_step": "img2img inpaint unet",
    "q_sample": "img2img inpaint unet",
    "predict_start_from_noise": "txt2img img2img inpaint exact",
    "get_v": "unet_on_v",
    "predict_start_from_v": "exact",
    "snr": "unet",
    "q_posterior_mean": "txt2img img2img inpaint exact",
    "q_posterior_variance": "txt2img img2img inpaint exact",
    "exact_x0": "exact",
    "epsilon_loss": "unet",
    "text_dropout": "unet",
    "min_snr_weight": "unet",
    "predict_noise_from_v": "txt2img_of_v",
    "loss_by_time": "",
    "timestep_embedding": "txt2img img2img inpaint unet",
    "attention": "txt2img img2img inpaint clip vae vq unet",
    "split_heads": "txt2img img2img inpaint unet",
    "merge_heads": "txt2img img2img inpaint unet",
    "cross_attention": "txt2img img2img inpaint unet",
    "geglu": "txt2img img2img inpaint unet",
    "transformer_block": "txt2img img2img inpaint unet",
    "spatial_transformer": "txt2img img2img inpaint unet",
    "res_block": "txt2img img2img inpaint unet",
    "group_norm": "txt2img img2img inpaint vae vq unet",
    "upsample": "txt2img img2img inpaint vae vq",
    "unet_forward": "txt2img img2img inpaint unet",
    "sample_posterior": "img2img inpaint vae unet",
    "kl": "vae",
    "vae_loss": "",
    "nearest_code": "vq",
    "straight_through": "vq",
    "vq_loss": "vq",
    "scale_factor": "vae vq",
    "vae_downsample": "img2img inpaint vae vq unet",
    "bpe_merge": "txt2img img2img inpaint clip unet",
    "pad_tokens": "txt2img img2img inpaint clip unet",
    "embed_tokens": "txt2img img2img inpaint clip unet",
    "causal_mask": "txt2img img2img inpaint clip unet",
    "quick_gelu": "txt2img img2img inpaint clip unet",
    "pooled_state": "clip",
    "contrastive_loss": "clip",
    "patchify": "clip",
    "ddpm_step": "txt2img img2img inpaint",
    "ddim_step": "txt2img img2img inpaint",
    "leading_timesteps": "txt2img img2img inpaint",
    "plms_combine": "txt2img img2img inpaint",
    "guidance": "txt2img img2img inpaint",
    "guided_eps": "txt2img img2img inpaint",
    "dpmpp_2m_step": "txt2img inpaint",
    "euler_step": "txt2img img2img inpaint",
    "img2img_timesteps": "img2img inpaint",
    "inpaint_blend": "inpaint",
    "sigmas": "txt2img img2img inpaint",
    "ema_update": "clip vae unet",
    "ema_decay": "clip vae unet",
    "first_stage_encoding": "img2img inpaint unet",
    "decode_first_stage": "txt2img img2img inpaint",
    "to_uint8": "txt2img",
    "initial_noise": "txt2img",
    "sampling_loop": "txt2img img2img inpaint",
    "training_loss": "unet",
}


class Runs:
    """What a user does with minisd, each a function of the sampler's name that returns what is to be compared."""

    def __init__(self, folder):
        draw_shapes(folder / "shapes", count=8, size=32)
        self.folder, self.data, self.engine = folder, CaptionedPictures(folder / "shapes", size=32), SingleDevice("cpu")
        self.shipped, self.count = minisd.load("tiny"), 0
        self.undisturbed = cache(lambda name, sampler: getattr(self, name)(sampler))

    def model(self, **changes):
        """The shipped model, with a schedule that was made now, as a model that is loaded now would have."""
        sd = copy.deepcopy(self.shipped)
        sd.config = replace(sd.config, **changes)
        sd.schedule = sd.config.schedule()
        return sd

    def options(self, sampler):
        return {"prompt": "a red circle", "sampler": sampler, "seed": 3, "num_images": 2, "guidance_scale": 3.0}

    # --- drawing ---

    def txt2img(self, sampler, **changes):
        out = self.model(**changes).txt2img(steps=5, **self.options(sampler))
        return {"pictures": out.pictures, "bytes": [image.tobytes() for image in out.images]}

    def img2img(self, sampler):
        image = self.data.batch([0])
        return {"pictures": self.model().img2img(image=image, strength=0.5, steps=4, **self.options(sampler)).pictures}

    def inpaint(self, sampler):
        mask = torch.zeros(32, 32)
        mask[:, 16:] = 1
        image = self.data.batch([0])
        return {"pictures": self.model().inpaint(image=image, mask=mask, steps=4, **self.options(sampler)).pictures}

    def txt2img_of_v(self, sampler):
        return self.txt2img(sampler, parameterization="v")

    def exact(self, sampler):
        schedule = self.model().schedule
        eps_model = minisd.ExactDenoiser(self.data.batch(range(8)), schedule)
        x_T = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(1)
        *_, last = SAMPLERS[sampler](eps_model, x_T, schedule, steps=5, generator=generator)
        t = torch.tensor([400, 600])
        mean, variance, _ = schedule.q_posterior(last.x, x_T, t)
        from_v = schedule.predict_start_from_v(x_T, t, last.x)
        x0 = eps_model.x0(x_T, t), schedule.predict_start_from_noise(x_T, t, last.x)
        return {"pictures": last.x, "mean": mean, "variance": variance, "from v": from_v, "x0": torch.stack(x0)}

    # --- training: a step of each network ---

    def trained(self, train, *args, **options):
        self.count += 1
        folder = self.folder / f"run {self.count}"
        network = train(*args, data=self.data, folder=folder, engine=self.engine, **options)
        line = json.loads((folder / "log.jsonl").read_text())
        figures = {name: value for name, value in line.items() if name not in ("samples_per_s", "seconds")}
        return network, {name: torch.tensor(value) for name, value in figures.items()}

    def clip(self, _):
        config, vision = PRESETS["tiny"].cond_stage, recipes.VISION["tiny"]
        (clip, _), figures = self.trained(train_clip, config, vision, CLIPRecipe(**ONE_STEP))
        return figures | {"weights": weights(clip)}

    def vae(self, _, config=PRESETS["tiny"].first_stage):
        vae, figures = self.trained(train_vae, config, VAERecipe(**ONE_STEP))
        measured = json.loads((self.folder / f"run {self.count}/vae.json").read_text())["scale_factor"]
        return figures | {"weights": weights(vae), "scale_factor": torch.tensor(measured)}

    def vq(self, _):
        return self.vae(_, recipes.VQ["tiny"])

    def unet(self, _, **changes):
        recipe = UNetRecipe(text_dropout=0.5, **ONE_STEP)
        sd, figures = self.trained(train_unet, self.model(**changes), recipe)
        return figures | {"weights": weights(sd.model)}

    def unet_on_v(self, _):
        return self.unet(_, parameterization="v")


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Sheets of samples are drawn by txt2img, which is run anyway.
        patch.setattr(Trainer, "sheet", lambda *args: None)
        yield Runs(tmp_path_factory.mktemp("swaps"))


def is_as_without(now, before):
    """Equal up to the rounding of float32, which grows over guided steps and in the gradient of a loss."""
    for name, right in before.items():
        value = now[name]
        if name == "bytes":
            assert all(abs(a - b) <= 1 for a, b in zip(b"".join(value), b"".join(right), strict=True))
        elif name == "weights":  # AdamW divides by the gradient, so where that is nearly 0, a step of 1e-3 may turn
            assert (value - right).abs().mean() < 1e-5
        elif right.ndim == 0:  # the scale factor is that of a sample of the latents, and of their distribution
            tolerance = {"scale_factor": 1e-3}.get(name, 1e-5)
            assert value.item() == pytest.approx(right.item(), rel=tolerance, abs=1e-7), name
        else:
            assert (value - right).abs().max() < 5e-4 * right.abs().max(), name


def test_every_exercise_says_where_it_is_called():
    assert set(CALLED_IN) == set(EXERCISES)


@pytest.mark.parametrize("name", CALLED_IN)
def test_minisd_draws_and_trains_with_the_solution_as_without_it(runs, name):
    exercise, sampler, called = EXERCISES[name], SAMPLER_OF.get(name, "ddim"), []
    solution = exercise.compile()
    if isinstance(exercise.swap, str):
        assert not CALLED_IN[name]
        return

    @wraps(solution)
    def counted(*args):
        called.append(run)
        return solution(*args)

    for run in dict.fromkeys([*DRAWINGS, *CALLED_IN[name].split()]):
        before = runs.undisturbed(run, sampler)
        with swap(name, counted):
            now = getattr(runs, run)(sampler)
        is_as_without(now, before)
    assert set(called) == set(CALLED_IN[name].split())


# --- what else a function is called with ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nine_channels(make_sd):
    """A small model for inpainting, which is told a mask and a picture beside the prompt."""
    unet = make_sd().config.unet
    return make_sd(unet=replace(unet, in_channels=9))


def swapped(name):
    return swap(name, EXERCISES[name].compile())


@pytest.mark.parametrize("name", ["guidance", "guided_eps", "sampling_loop", "initial_noise", "first_stage_encoding"])
def test_a_model_that_is_shown_a_mask_draws_the_same(nine_channels, name):
    image, mask = torch.rand(1, 3, 32, 32) * 2 - 1, torch.zeros(32, 32)
    mask[:, 16:] = 1

    def drawn():
        return nine_channels.inpaint("a red fox", image, mask, num_images=2, steps=2).pictures

    before = drawn()
    with swapped(name):
        assert torch.allclose(drawn(), before, atol=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["epsilon_loss", "training_loss"])
def test_the_loss_of_each_sample_is_that_of_the_model(nine_channels, name, reduction):
    """With conditions as CompVis has them, lists of tensors by name; and as `minisd.epsilon_loss` of any model."""
    sd, generator = nine_channels, torch.Generator().manual_seed(0)
    z, noise, maps = (torch.randn(3, c, 8, 8, generator=generator) for c in (4, 4, 5))
    t, context = torch.tensor([3, 500, 900]), sd.get_learned_conditioning(["a red fox", "a cat", ""])
    cond = {"c_crossattn": [context], "c_concat": [maps]}

    def model(x, t, context):
        return sd.apply_model(x, t, {"c_crossattn": context, "c_concat": maps[: len(x)]})

    def losses():
        with_lists = sd.p_losses(z, cond, t, noise, reduction=reduction)
        return with_lists, minisd.epsilon_loss(model, sd.schedule, z[:1], context[:1], t[:1], noise[:1])

    before = losses()
    with swapped(name):
        now = losses()
    assert now[0].shape == before[0].shape
    for value, right in zip(now, before, strict=True):
        assert torch.allclose(value, right, rtol=1e-5)
    with swap(name, lambda *args: torch.tensor(7.0)):
        assert all((value == 7).all() for value in losses())


def test_a_seed_that_has_drawn_already_draws_what_comes_next():
    """Only x_T is drawn by `initial_noise`: over a picture, the generators have drawn the latent before."""
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    first, second = (minisd.sampling.randn((2, 4, 8, 8), generators) for _ in range(2))
    with swapped("initial_noise"):
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        drawn = [minisd.latent_diffusion.randn((2, 4, 8, 8), generators) for _ in range(2)]
    assert torch.equal(drawn[0], first) and torch.equal(drawn[1], second)


@pytest.mark.parametrize(
    "name, options",
    [
        ("ddpm_step", {"clip_denoised": True}),
        ("q_posterior_mean", {"clip_denoised": True}),
        ("q_posterior_variance", {"clip_denoised": True}),
        ("dpmpp_2m_step", {"set_alpha_to_one": False, "lower_order_final": False}),
    ],
)
def test_the_options_of_a_sampler_have_an_effect(runs, name, options):
    def drawn(options):
        return runs.shipped.txt2img("a red circle", steps=3, sampler=SAMPLER_OF[name], **options).pictures

    before, last = drawn(options), list(options)[-1]
    assert not torch.allclose(before, drawn(options | {last: not options[last]}), atol=1e-2)
    with swapped(name):
        assert torch.allclose(drawn(options), before, atol=1e-3)


def test_a_swapped_loop_is_that_of_sampling_too():
    with swap("sampling_loop", lambda eps_model, x_T, timesteps, alphas_cumprod: eps_model(x_T, torch.tensor([7]))):
        *_, last = minisd.sampling.ddim(lambda x, t: 2 * x, torch.ones(1, 4), minisd.NoiseSchedule.scaled_linear(), 1)
    assert torch.equal(last.x, torch.full((1, 4), 2.0))


def test_a_side_that_cannot_be_halved_has_its_size_again_at_the_end(sd):
    """A latent of 5 x 5 has a map of 3 x 3 below, and twice that is not what the skip connection needs."""
    before = sd.txt2img("a red fox", steps=2, height=20, width=20).pictures
    with swapped("upsample"):
        assert torch.allclose(sd.txt2img("a red fox", steps=2, height=20, width=20).pictures, before, atol=1e-4)
