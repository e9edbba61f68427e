"""Stage 12: editing. Change a picture by changing a word of its prompt.

    # Which noise would become this picture?
    start = invert(sd, "fox.png", "fox, noto style", guidance_scale=4.0, method="edit_friendly")
    out = prompt_to_prompt(sd, "fox, noto style", "wolf, noto style", start, guidance_scale=4.0)
    out.images                                        # the picture drawn again, and the edited one

If you draw "fox" and "wolf" from the same noise, more changes than the animal. So editing needs two things. For a
picture that the model did not draw, we need the noise from which the model would draw it (inversion). And while the
new prompt is drawn, the layout of the old picture has to stay. For this, the new drawing takes over the attention
weights of the old one (prompt-to-prompt).

    ddim_inversion     the steps of ddim, backwards. It has an error, which grows with the guidance scale
    edit_friendly      noise for each step of ddpm, chosen so that the steps lead back to the picture at every scale
    prompt_to_prompt   the old prompt decides which pixel reads which word, and the new prompt what the word says

A `Start` is the noise from which a drawing begins, and the noise of its steps. It comes from a seed or from a picture.
The papers that the comments cite:

    DDIM               Song, Meng & Ermon, "Denoising Diffusion Implicit Models", 2021 (arXiv:2010.02502)
    Null-text          Mokady et al., "Null-text Inversion for Editing Real Images …", 2022 (arXiv:2211.09794)
    Edit-friendly      Huberman-Spiegelglas, Kulikov & Michaeli, "An Edit Friendly DDPM …", 2023 (arXiv:2304.06140)
    Prompt-to-prompt   Hertz et al., "Prompt-to-Prompt Image Editing with Cross …", 2022 (arXiv:2208.01626)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from itertools import pairwise
from math import sqrt
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import sampling
from .attention import RECORDING, CrossAttention
from .latent_diffusion import LatentDiffusion
from .noising import Generators, NoiseSchedule, Seed, randn, seeded
from .pictures import Drawing, Picture, Trajectory, read_picture
from .sampling import BeforeStep, EpsModel, Guided, Step, X, ddim, make_timesteps, predict_x0

Span = tuple[float, float]  # a range of the drawing: (0, 0.8) are the first 80% of its steps


# -- where a drawing begins -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Start:
    """The noise of a drawing. The same start, prompt and guidance scale give the same picture."""

    x: Float[Tensor, "1 d h w"]  # the noisy latent before the first step
    timesteps: list[int]  # of the steps, in falling order
    noises: tuple[Float[Tensor, "1 d h w"], ...] = ()  # the noise of each step; empty for ddim, which needs none


def from_seed(sd: LatentDiffusion, seed: Seed = 0, steps: int = 50) -> Start:
    """The start of a picture that the model draws itself, with ddim."""
    x_T = randn((1, *sd.latent_shape()), seeded(seed)).to(sd.device)
    return Start(x_T, make_timesteps(steps, sd.schedule.timesteps, ddim.spacing))


def redraw(
    sd: LatentDiffusion,
    prompts: str | Sequence[str],
    start: Start,
    guidance_scale: float = 4.0,
    before_step: BeforeStep | None = None,
) -> Drawing:
    """Draw one prompt or several, all from the same start.

    If the start is from `invert`, the prompt and the guidance scale that were given there lead back to its picture.
    """
    count = 1 if isinstance(prompts, str) else len(prompts)
    played_back = iter(start.noises)
    steps = sd.sample(
        prompts, guidance_scale=guidance_scale, sampler="ddim", timesteps=start.timesteps, start_code=start.x,
        eta=1.0 if start.noises else 0.0, before_step=before_step,
        generator=lambda *shape: next(played_back).expand(count, *shape),
    )  # fmt: skip
    return Drawing(Trajectory(list(steps), sd.decode_first_stage))


# -- inversion: from a picture to its start -------------------------------------------------------------------


def ddim_inversion(
    eps_model: EpsModel, x_0: X, schedule: NoiseSchedule, steps: int = 50, spacing: str = "leading",
    set_alpha_to_one: bool = False,
) -> Iterator[Step]:  # fmt: skip
    """The steps of ddim from a picture up to its noise (DDIM, section 4.3). Its arguments are those of `sampling.ddim`.

    The step of ddim from x_t down to x_prev uses the noise ε(x_t, t). On the way up we do not know x_t yet, so we use
    ε(x_prev, t) instead, as if the network saw the same noise at both ends of a step. Without guidance the difference
    is small. Guidance amplifies it, and the next step starts from the error (Null-text, section 3.2).
    (diffusers: DDIMInverseScheduler)
    """
    # The picture counts as the end of ddim's last step: ᾱ_0, or 1 with set_alpha_to_one.
    x, a_t = x_0, 1.0 if set_alpha_to_one else schedule.alpha_bar(0)
    for i, t in enumerate(reversed(make_timesteps(steps, schedule.timesteps, spacing))):
        a_next = schedule.alpha_bar(t)
        eps = _noise(eps_model, x, t)
        # The same line as in ddim, but to a higher noise level: x_next = √ᾱ_next x̂_0 + √(1-ᾱ_next) ε  (DDIM, eq. 12)
        x0 = predict_x0(x, eps, a_t)
        x_next = sqrt(a_next) * x0 + sqrt(1 - a_next) * eps
        yield Step(i, t, x, eps, x0, x_next)
        x, a_t = x_next, a_next


def edit_friendly(
    eps_model: EpsModel, x_0: X, schedule: NoiseSchedule, timesteps: Sequence[int], generator: Generators | None = None
) -> tuple[X, list[X]]:
    """x_t of the first timestep, and the noise of each step of ddpm that leads to x_0 (Edit-friendly, Algorithm 1).

    A step of ddpm is x_prev = μ(x_t) + σ z. When the model draws a picture, z is random and x_prev follows from it.
    Here all the x_t are made from the picture first, and we solve for z. If these z are used in a drawing with the same
    network, prompt and guidance scale, its steps go through the same x_t and end at x_0. Nothing is approximated.
    """
    # Each x_t gets fresh noise: x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε_t. When ddpm itself adds noise step by step, two
    # neighbouring x_t share most of it. Here their noises are independent, so a step has to change more, and the z are
    # larger. The paper finds that such z hold the layout of the picture better when the prompt changes.
    times = torch.tensor(timesteps, device=x_0.device)[:, None].expand(-1, len(x_0))  # [steps b]
    path = [schedule.q_sample(x_0, t, randn(x_0.shape, generator).to(x_0)) for t in times]
    alphas = [*(schedule.alpha_bar(t) for t in timesteps), schedule.alpha_bar(0)]
    x_t, zs = path[0], []
    for t, x_prev, (a_t, a_prev) in zip(timesteps, [*path[1:], x_0], pairwise(alphas), strict=True):
        # ddim with η = 1 is ddpm. Without its noise, the step gives the mean μ; and σ is that of DDIM, eq. 16.
        mean, _, _ = ddim.rule(x_t, _noise(eps_model, x_t, t), a_t, a_prev, 1.0, torch.zeros_like(x_t))
        sigma = sqrt((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev))
        # x_prev = μ + σ z, solved for z
        zs.append((x_prev - mean) / sigma)
        # This is x_prev as the drawing will compute it. The next step starts from there, so that rounding errors do not
        # add up.
        x_t = mean + sigma * zs[-1]
    return path[0], zs


def invert(
    sd: LatentDiffusion, image: Picture, prompt: str, steps: int = 50, guidance_scale: float = 1.0,
    method: Literal["ddim", "edit_friendly"] = "ddim", strength: float = 1.0, seed: Seed = 0,
) -> Start:  # fmt: skip
    """The start from which `redraw` draws a given picture again, with the same prompt and guidance scale.

    guidance_scale: the one at which you will draw. `redraw` and `prompt_to_prompt` draw at 4.0 unless you say so.
    method: "ddim", which has an error that grows with the guidance scale; or "edit_friendly", which leads back to the
        picture at every scale, except for rounding, and whose noise comes from `seed`.
    strength: for "edit_friendly", where the drawing begins, as in img2img. Below 1 it begins later and keeps more.
    """
    if method not in ("ddim", "edit_friendly"):
        raise ValueError(f'method must be "ddim" or "edit_friendly", but it is {method!r}')
    if method == "ddim" and strength != 1:
        raise ValueError(f"ddim inverts a picture up to pure noise: strength must be 1, but it is {strength}")
    # Picture → latent, [1 3 H W] -> [1 d h w]: the mean of the encoder's Gaussian, because nothing random is wanted.
    pictures = read_picture(image, sd.config.image_size, sd.config.image_size).to(sd.device)
    if len(pictures) != 1:
        raise ValueError(f"one picture can be inverted at a time, but {len(pictures)} were given")
    posterior = sd.encode_first_stage(pictures)
    z = sd.get_first_stage_encoding(posterior if isinstance(posterior, Tensor) else posterior.mode())
    contexts = (sd.get_learned_conditioning([p]) for p in (prompt, sd.cond_stage_model.unconditional))
    eps_model = sampling.classifier_free_guidance(sd.predict_noise, *contexts, guidance_scale)
    # The steps that the drawing will make. A strength below 1 leaves out the first ones, which decide the layout.
    timesteps = sampling.remaining_timesteps(make_timesteps(steps, sd.schedule.timesteps, ddim.spacing), strength)
    if method == "ddim":
        *_, last = ddim_inversion(eps_model, z, sd.schedule, steps)
        return Start(last.x, timesteps)
    x, noises = edit_friendly(eps_model, z, sd.schedule, timesteps, seeded(seed))
    return Start(x, timesteps, tuple(noises))


@torch.no_grad()
def _noise(eps_model: EpsModel, x: X, t: int) -> X:
    answer = eps_model(x, torch.full((len(x),), t, device=x.device))
    return answer.eps if isinstance(answer, Guided) else answer


# -- prompt-to-prompt: the old prompt decides where, the new one what -------------------------------------------


def align(source: Int[Tensor, "m"], target: Int[Tensor, "m"]) -> tuple[Float[Tensor, "m m"], Float[Tensor, "m"]]:
    """Pair the tokens of two prompts, so that a new token can take over the attention weights of an old one.

    Returns `moved` [m m]: the old weights times it, [n m] @ [m m] -> [n m], are the weights of the new tokens. And
    `added` [m]: 1 for each new token without a counterpart, which keeps its own weights.
    """
    moved, added = torch.zeros(len(source), len(target)), torch.zeros(len(target))
    matcher = SequenceMatcher(None, source.tolist(), target.tolist(), autojunk=False)
    for kind, i, i_end, j, j_end in matcher.get_opcodes():
        if kind == "equal":  # the same words on both sides, perhaps at other places
            moved[range(i, i_end), range(j, j_end)] = 1
        elif kind == "replace":  # swapped words: the weight of the old ones is shared out evenly to the new ones
            moved[i:i_end, j:j_end] = 1 / (j_end - j)
        elif kind == "insert":  # words that were not there
            added[j:j_end] = 1
    return moved, added


def places(sd: LatentDiffusion, prompt: str, word: str) -> list[int]:
    """The places of a word's tokens in a prompt. Raises ValueError if it is not there."""
    row, (_, *piece) = sd.cond_stage_model.tokenize([prompt, word]).tolist()
    piece = piece[: piece.index(sd.cond_stage_model.tokenizer.end_token)]  # between the start and the end token
    found = [i for i in range(len(row)) if piece and row[i : i + len(piece)] == piece]
    if not found:
        raise ValueError(f"the prompt {prompt!r} has no word {word!r}: name one of its own")
    return [i + k for i in found for k in range(len(piece))]


def prompt_to_prompt(
    sd: LatentDiffusion,
    source: str,
    target: str,
    start: Start,
    guidance_scale: float = 4.0,
    *,
    emphasis: Mapping[str, float] | None = None,
    cross_steps: Span = (0.0, 0.8),
    self_steps: Span = (0.0, 0.4),
    layers: Sequence[str] = ("",),
) -> Drawing:
    """Draw a prompt and its edited version from one start. The drawing has two pictures, the old and the new one.

    Attention weights say which pixel reads which word (cross-attention), and which pixels read one another
    (self-attention). Much of a picture's layout depends on them. The values that are read make it a fox or a wolf. So
    both prompts are drawn side by side, and the new drawing uses the weights of the old one with its own values. Words
    can be swapped ("fox" → "wolf"), added ("fox" → "blue fox") and left out.

    Args:
        emphasis: factors for the weights of words, {"blue": 2.0}. More than 1 strengthens the word, less than 1 weakens
            it. They hold in the steps of `cross_steps`.
        cross_steps, self_steps: the part of the drawing in which the weights are taken over. The early steps decide the
            layout. With a shorter part, the new picture may differ more from the old one.
        layers: the layers in which this is done, by the beginnings of their names, such as "middle_block".
    """
    moved, added = align(*sd.cond_stage_model.tokenize([source, target]))
    factors = torch.ones_like(added)
    for word, factor in (emphasis or {}).items():
        factors[places(sd, target, word)] = factor
    step = -1

    def count(x: X, t: int) -> X:
        nonlocal step
        step += 1
        return x

    def edited(name: str, weights: Float[Tensor, "b heads n m"]) -> Float[Tensor, "b heads n m"]:
        # The batch is [source, target], or with guidance [∅, ∅, source, target]. Only the last row is changed.
        old, new = weights[-2], weights[-1]  # [heads n m]
        is_cross = name.endswith("attn2")
        first, last = cross_steps if is_cross else self_steps
        if first <= step / len(start.timesteps) < last:
            # Cross-attention: M*_ij = M_i,A(j) for a word j with the counterpart A(j), its own weight for an added one,
            # times the factor of the word (Prompt-to-prompt, section 3.2). Self-attention: the old weights, as in the
            # authors' code (`self_replace_steps`).
            new = (old @ moved.to(old) + new * added.to(new)) * factors.to(new) if is_cross else old
        return torch.cat([weights[:-1], new[None]])

    changed = {
        module: partial(edited, name)
        for name, module in sd.model.diffusion_model.named_modules()
        if isinstance(module, CrossAttention) and name.startswith(tuple(layers))
    }
    # First in the list, so that `record_attention` around this shows the weights that were used.
    RECORDING.recorders.insert(0, changed)
    try:
        return redraw(sd, [source, target], start, guidance_scale, before_step=count)
    finally:
        RECORDING.recorders.remove(changed)
