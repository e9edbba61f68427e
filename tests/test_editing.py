"""Editing: inversion beside diffusers', and attention that is taken over word by word."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisd import editing
from minisd.attention import RECORDING, CrossAttention
from minisd.instruments.attention_maps import record_attention
from minisd.noising import ExactDenoiser, NoiseSchedule
from minisd.sampling import Guided, ddim, make_timesteps

SCHEDULE = NoiseSchedule.scaled_linear()
FOX, CAT = "a red fox, noto style", "a red cat, noto style"


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(seed: int = 5) -> torch.Tensor:
    """Smooth colours, 32x32."""
    return torch.nn.functional.interpolate(draw(seed, 1, 3, 4, 4), (32, 32), mode="bilinear").tanh()


def latent(sd, image):
    return sd.get_first_stage_encoding(sd.encode_first_stage(image).mode())


@pytest.fixture(scope="module")
def mild(make_sd):
    """A model with random weights, whose ε changes little with x, as that of a trained one does."""
    sd = make_sd()
    with torch.no_grad():
        for parameter in sd.model.diffusion_model.out[2].parameters():
            parameter.mul_(0.1)
    return sd


# -- inversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_one", [False, True])
def test_ddim_inversion_equals_diffusers(diffusers, spacing, to_one):
    eps_model = ExactDenoiser(draw(0, 5, 4, 3, 3).double(), SCHEDULE)
    x_0 = draw(1, 2, 4, 3, 3).double()
    theirs = diffusers.DDIMInverseScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=to_one,
        timestep_spacing=spacing, steps_offset=1 if spacing == "leading" else 0,
    )  # fmt: skip
    theirs.set_timesteps(20)
    x, steps = x_0, list(editing.ddim_inversion(eps_model, x_0, SCHEDULE, 20, spacing, to_one))
    assert [step.t for step in steps] == theirs.timesteps.tolist()
    for step, t in zip(steps, theirs.timesteps, strict=True):
        x = theirs.step(eps_model(x, t.expand(2)), t, x).prev_sample
        torch.testing.assert_close(step.x, x, atol=2e-4, rtol=2e-4)  # theirs has ᾱ in float32


def test_with_many_steps_ddim_leads_back_to_the_picture():
    """The error of a round trip falls with the length of a step, about in proportion."""

    def eps_model(x, t):  # the best possible one for data from N(0, 0.5²)
        a = SCHEDULE.alpha_bar(int(t[0]))
        return (1 - a) ** 0.5 * x / (0.25 * a + 1 - a)

    x_0, errors = 0.5 * draw(1, 4, 6).double(), []
    for steps in (20, 100, 500):
        *_, up = editing.ddim_inversion(eps_model, x_0, SCHEDULE, steps)
        *_, down = ddim(eps_model, up.x, SCHEDULE, steps)
        errors.append((down.x - x_0).abs().mean().item())
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 2e-3


@pytest.mark.parametrize("scale", [1.0, 4.0, 9.0])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_edit_friendly_inversion_is_exact_at_every_scale(sd, scale, strength):
    start = editing.invert(sd, picture(), FOX, 10, scale, "edit_friendly", strength)
    assert len(start.timesteps) == len(start.noises) == int(10 * strength)
    drawn = editing.redraw(sd, FOX, start, scale)
    torch.testing.assert_close(drawn.trajectory[-1].x, latent(sd, picture()), atol=1e-3, rtol=0)


def test_its_noises_are_those_of_the_equation():
    """x_prev = μ(x_t) + σ z, with the mean and variance of q(x_prev | x_t, x̂_0), written out."""
    x_0, timesteps = draw(0, 2, 3).double(), [981, 501, 21]
    x, zs = editing.edit_friendly(lambda x, t: x / 2, x_0, SCHEDULE, timesteps, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    for i, t in enumerate(timesteps):
        a, a_prev = SCHEDULE.alpha_bar(t), SCHEDULE.alpha_bar(timesteps[i + 1]) if i < 2 else SCHEDULE.alpha_bar(0)
        expected = a**0.5 * x_0 + (1 - a) ** 0.5 * torch.randn((2, 3), generator=generator)
        torch.testing.assert_close(x, expected, atol=1e-6, rtol=1e-6)
        beta = 1 - a / a_prev
        x0 = (x - (1 - a) ** 0.5 * x / 2) / a**0.5
        mean = a_prev**0.5 * beta / (1 - a) * x0 + (1 - beta) ** 0.5 * (1 - a_prev) / (1 - a) * x
        x = mean + ((1 - a_prev) / (1 - a) * beta) ** 0.5 * zs[i]
    torch.testing.assert_close(x, x_0)


def test_ddim_inversion_is_good_without_guidance_and_poor_with_it(mild):
    errors = {}
    for scale in (1.0, 8.0):
        start = editing.invert(mild, picture(), FOX, 20, scale)
        assert not start.noises and start.timesteps == make_timesteps(20, 1000)
        drawn = editing.redraw(mild, FOX, start, scale)
        errors[scale] = (drawn.trajectory[-1].x - latent(mild, picture())).abs().mean().item()
    assert 3 * errors[1.0] < errors[8.0]


def test_a_guided_answer_is_inverted_by_the_noise_that_guidance_uses():
    plain = editing.ddim_inversion(lambda x, t: x / 3, draw(0, 2, 3), SCHEDULE, 5)
    guided = editing.ddim_inversion(lambda x, t: Guided(x / 3, x, x), draw(0, 2, 3), SCHEDULE, 5)
    assert torch.equal([*plain][-1].x, [*guided][-1].x)


def test_what_cannot_be_inverted_is_refused(sd):
    with pytest.raises(ValueError, match='method must be "ddim" or "edit_friendly"'):
        editing.invert.__wrapped__(sd, picture(), FOX, method="null_text")
    with pytest.raises(ValueError, match="strength must be 1, but it is 0.5"):
        editing.invert(sd, picture(), FOX, strength=0.5)
    with pytest.raises(ValueError, match="one picture can be inverted at a time, but 2 were given"):
        editing.invert(sd, picture().expand(2, 3, 32, 32), FOX)


# -- prompt-to-prompt -----------------------------------------------------------------------------------------------


def test_a_start_from_a_seed_draws_what_txt2img_draws(sd):
    drawn = editing.redraw(sd, FOX, editing.from_seed(sd, seed=3, steps=4), guidance_scale=3.0)
    assert torch.equal(drawn.pictures, sd.txt2img(FOX, steps=4, guidance_scale=3.0, seed=3).pictures)


def test_the_old_picture_is_the_same_as_without_the_edit(sd):
    start = editing.from_seed(sd, seed=1, steps=4)
    both = editing.prompt_to_prompt(sd, FOX, CAT, start, 3.0)
    torch.testing.assert_close(both.pictures[:1], editing.redraw(sd, FOX, start, 3.0).pictures)
    alone = editing.redraw(sd, CAT, start, 3.0).pictures
    assert (both.pictures[1:] - alone).abs().max() > 1e-3
    nothing = editing.prompt_to_prompt(sd, FOX, CAT, start, 3.0, cross_steps=(0, 0), self_steps=(0, 0))
    torch.testing.assert_close(nothing.pictures[1:], alone)
    elsewhere = editing.prompt_to_prompt(sd, FOX, CAT, start, 3.0, layers=["no layer"])
    torch.testing.assert_close(elsewhere.pictures[1:], alone)


def test_the_same_prompt_gives_the_same_picture_twice(sd):
    both = editing.prompt_to_prompt(sd, FOX, FOX, editing.from_seed(sd, steps=3), 3.0)
    torch.testing.assert_close(both.pictures[0], both.pictures[1])


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["unguided", "guided"])
@pytest.mark.parametrize(
    "target, options",
    [(CAT, {}), ("a red small fox, noto style", {"emphasis": {"small": 3.0, "fox": 0.5}}),
     (CAT, {"cross_steps": (0.25, 0.5), "self_steps": (0.5, 1.0)}), (CAT, {"layers": ["middle_block"]})],
    ids=["swapped", "added and weighed", "some steps", "some layers"],
)  # fmt: skip
def test_the_weights_are_those_of_the_paper(sd, scale, target, options):
    """Each weight of the new picture, in every step and layer, beside the rule of Hertz et al., word by word."""
    with record_attention(sd, self_attention=True, by_head=True) as maps:
        editing.prompt_to_prompt(sd, FOX, target, editing.from_seed(sd, steps=4), scale, **options)
    old_words, new_words = (sd.cond_stage_model.tokenize([p])[0].tolist() for p in (FOX, target))
    end = sd.cond_stage_model.tokenizer.end_token
    layers = options.get("layers", [""])
    cross, own = options.get("cross_steps", (0, 0.8)), options.get("self_steps", (0, 0.4))
    for step in range(4):
        for layer in maps.layers:
            old, new = maps.raw(step, layer)[-2:]
            first, last = cross if layer.endswith("attn2") else own
            if not (layer.startswith(tuple(layers)) and first <= step / 4 < last):
                torch.testing.assert_close(new.sum(-1), torch.ones(new.shape[:-1]))  # its own
                continue
            if layer.endswith("attn1"):
                torch.testing.assert_close(new, old)
            elif target == CAT:
                torch.testing.assert_close(new, old)  # one word for another, of one token each
            else:
                length = new_words.index(end)
                at = old_words.index(end)
                added = length - at  # the tokens of "small", after "a red"
                fox = new_words[length - 1]  # the last token stays the last
                assert added > 0 and fox == old_words[at - 1]
                torch.testing.assert_close(new[..., :3], old[..., :3])  # start, a, red
                torch.testing.assert_close(new[..., length:], old[..., at:-added])  # the padding moves up
                places = editing.places(sd, target, "fox")
                torch.testing.assert_close(new[..., places], 0.5 * old[..., [p - added for p in places]])


def test_swapped_words_share_the_weight_of_the_old_ones(sd):
    source, target = torch.tensor([0, 5, 6, 9, 9, 9]), torch.tensor([0, 7, 8, 6, 9, 9])
    moved, added = editing.align(source, target)
    weights = torch.tensor([0.1, 0.4, 0.2, 0.15, 0.1, 0.05])
    assert torch.equal(added, torch.zeros(6))
    torch.testing.assert_close(weights @ moved, torch.tensor([0.1, 0.2, 0.2, 0.2, 0.15, 0.1]))


@settings(deadline=None, max_examples=50)
@given(
    source=st.lists(st.integers(1, 6), max_size=5), target=st.lists(st.integers(1, 6), max_size=5), same=st.booleans()
)
def test_each_new_token_has_a_counterpart_or_keeps_its_own_weight(source, target, same):
    rows = [torch.tensor([0, *words, *[9] * (7 - len(words))]) for words in (source, source if same else target)]
    moved, added = editing.align(*rows)
    if same:
        assert torch.equal(moved, torch.eye(8)) and not added.any()
    assert torch.equal(moved.sum(0) > 0, added == 0)  # one of the two
    assert (moved.sum(1) <= 1 + 1e-6).all()  # no weight is given twice


def test_a_word_is_found_by_all_its_tokens(sd):
    found = editing.places(sd, FOX, "noto")
    ids = sd.cond_stage_model.tokenize([FOX, "noto"]).tolist()
    assert [ids[0][i] for i in found] == ids[1][1 : 1 + len(found)] and ids[1][1 + len(found)] == ids[1][-1]
    with pytest.raises(ValueError, match="has no word 'wolf': name one of its own"):
        editing.prompt_to_prompt(sd, FOX, CAT, editing.from_seed(sd), emphasis={"wolf": 2.0})


def test_nothing_is_left_behind(sd):
    with pytest.raises(ValueError, match="channels"):
        editing.prompt_to_prompt(sd, FOX, CAT, editing.Start(torch.zeros(1, 9, 8, 8), [1]))
    assert not RECORDING.recorders
    assert all(m.record is None for m in sd.modules() if isinstance(m, CrossAttention))


def test_a_real_picture_is_edited_from_its_inversion(sd):
    start = editing.invert(sd, picture(), FOX, 10, 3.0, "edit_friendly", strength=0.7)
    both = editing.prompt_to_prompt(sd, FOX, CAT, start, 3.0)
    torch.testing.assert_close(both.trajectory[-1].x[:1], latent(sd, picture()), atol=1e-3, rtol=0)
    assert (both.pictures[0] - both.pictures[1]).abs().max() > 1e-3
