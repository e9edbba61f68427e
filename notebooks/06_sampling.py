# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 6 · Sampling: from noise back to a picture
#
# A trained network does one thing: it predicts the noise in $x_t$. A **sampler** calls it again and again, and turns
# its predictions into a picture. At the end you can
#
# - explain why one call is not enough, and why a sampler may have to add noise;
# - write DDPM's and DDIM's step, and say what $\eta$ changes;
# - write classifier-free guidance, and predict what happens when the scale grows;
# - choose a sampler and a number of steps.
#
# About 65 minutes, with two exercises; it runs in about three minutes on a laptop. Nothing is trained here. You need
# [notebook 01](01_noising.ipynb), and from [notebook 02](02_loss.ipynb) the idea that a network can predict the noise.
# The module is [`minisd/sampling.py`](../minisd/sampling.py).
#
# To see these steps with their numbers in your browser, open the stops [Guidance](../docs/play.md#tour=guidance), [One
# step](../docs/play.md#tour=step) and [The loop](../docs/play.md#tour=loop) of the guided tour.

# %% [markdown] tags=["colab"]
# <details><summary>To run this notebook in Colab</summary>
#
# Upload the folder of minisd as `upload.zip`, and run this in a new cell above
# ([more about it](../docs/install.md#colab-and-other-notebooks-in-the-cloud)):
#
# ```text
# !unzip -q upload.zip && pip install -q "./minisd[data]"
# %cd minisd/notebooks
# ```
#
# </details>

# %% tags=["parameters"]
MODE = "full"  # "smoke": every line runs, on so little that the figures mean nothing

# %%
import math
import os
import time
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

import minisd
from minisd import sampling, viz
from minisd.coursework import check
from minisd.data import sample

torch.set_grad_enabled(False)  # nothing is trained
full = MODE == "full"
start = time.time()


def seeded(seed):
    return torch.Generator().manual_seed(seed)

# %% [markdown]
# ## Where we are

# %%
viz.pipeline("sampling")

# %% [markdown]
# The sampler stands between pure noise and the decoder. These are its rows in the trace of a drawing: everything that
# happens in the first of 50 steps, and what is there after the last.

# %%
sd = minisd.load()
trace = minisd.trace(sd, "fox, noto style", steps=50 if full else 3, guidance_scale=4.0, seed=0)
print(*[row for row in trace if row.stage == 6], sep="\n")

# %% [markdown]
# ## Two models to sample from
#
# For the data we use two worlds. In the first, the data are three numbers, $-1.4$, $0.35$ and $1.05$. There the best
# possible prediction has a closed form (`ExactDenoiser`, notebook 01), so whatever goes wrong is the sampler's fault,
# and every path can be plotted. The second is the network that comes with minisd. It works on latents. For a sampler
# these are just another $x$.

# %%
schedule = minisd.NoiseSchedule.scaled_linear(0.00085, 0.012, timesteps=1000)  # the network's, too
T = schedule.timesteps
toy = torch.tensor([-1.4, 0.35, 1.05])
line = minisd.ExactDenoiser(toy, schedule)

prompts = ["a fox, noto style", "a grinning cat, twemoji style", "a rocket, noto style", "a snowman, noto style"]
x_T = sampling.randn((6, *sd.latent_shape()), [seeded(k) for k in range(6)])  # pure noise; each has its own seed


def network(prompts, scale=1.0):
    """The network as a function of x and t alone; `scale` is explained under Guidance."""
    context, empty = sd.get_learned_conditioning(prompts), sd.get_learned_conditioning([""])
    return minisd.classifier_free_guidance(sd.apply_model, context, empty, scale)


x, t = torch.randn(5, generator=seeded(0)), torch.full((5,), 999)
print(f"three numbers  x {list(x.shape)} -> eps {list(line(x, t).shape)}")
eps = network(prompts)(x_T[:4], torch.full((4,), 999))
print(f"the network    x {list(x_T[:4].shape)} -> eps {list(eps.shape)}")

# %% [markdown]
# Both predict noise. If you solve the forward process
# $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$ for $x_0$ and insert the prediction $\hat\epsilon$,
# you have an estimate of the finished picture:
#
# $$\hat x_0 = \frac{x_t - \sqrt{1-\bar\alpha_t}\;\hat\epsilon}{\sqrt{\bar\alpha_t}} \qquad \text{(DDPM, eq. 15)}$$

# %%
def estimate(x_t, eps, t):
    a_t = schedule.alpha_bar(t)  # ᾱ_t, a Python number
    return (x_t - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)  # x̂_0

# %% [markdown]
# ## Why one call is not enough
#
# Call the model once, at $t = 999$, and take $\hat x_0$ as the result.
#
# **Predict, then run.** The data are $-1.4$, $0.35$ and $1.05$. Where do five different $x_T$ end?

# %% tags=["hide-output"]
at_once = estimate(x, line(x, t), 999)
print("x_T  ", [f"{v:5.2f}" for v in x.tolist()])
print("x̂_0  ", [f"{v:5.2f}" for v in at_once.tolist()], f"  the mean of the data is {toy.mean():.2f}")

# %% [markdown]
# All end near the mean of the data, which is none of the three numbers. At $t = 999$ the input says almost nothing
# about $x_0$, and the prediction with the smallest squared error is then the mean of everything that is possible. For
# pictures this mean is a blur.
#
# ## Small steps, and why noise is added
#
# So go in small steps: from $t$ to a slightly smaller $t_{prev}$, with a new prediction each time. Notebook 01 has the
# formula of one exact step back, $q(x_{prev} \mid x_t, x_0)$: a Gaussian with mean $\tilde\mu_t$ and variance
# $\tilde\beta_t$. We do not know $x_0$, so we insert $\hat x_0$.
#
# It seems natural to go to the mean and to add no noise, because noise is what we want to get rid of. Let us try both:
# the mean alone, and the mean plus noise of variance $\tilde\beta_t$. The second is **DDPM**.

# %%
def mean_step(x_t, x0, t, t_prev):
    """The mean of q(x_prev | x_t, x_0), and its variance; t_prev None is the clean picture."""
    a_t, a_prev = schedule.alpha_bar(t), 1.0 if t_prev is None else schedule.alpha_bar(t_prev)
    beta = 1 - a_t / a_prev  # β_t; if timesteps are left out, that of all the small steps together
    # μ̃_t = √ᾱ_prev β_t / (1-ᾱ_t) x̂_0  +  √α_t (1-ᾱ_prev) / (1-ᾱ_t) x_t                       (DDPM, eq. 7)
    mean = math.sqrt(a_prev) * beta / (1 - a_t) * x0 + math.sqrt(1 - beta) * (1 - a_prev) / (1 - a_t) * x_t
    return mean, (1 - a_prev) / (1 - a_t) * beta  # β̃_t


def go_to_the_mean(eps_model, x, steps):
    """All x on the way, the start first."""
    timesteps = sampling.make_timesteps(steps, T, "linspace")  # 999 ... 0, evenly spread
    xs = [x]
    for t, t_prev in zip(timesteps, [*timesteps[1:], None], strict=True):
        x0 = estimate(x, eps_model(x, torch.full((len(x),), t)), t)
        x = mean_step(x, x0, t, t_prev)[0]
        xs.append(x)
    return torch.stack(xs)

# %% tags=["hide-input"]
x_T_line = torch.erfinv(torch.linspace(-0.96, 0.96, 9)) * 2**0.5  # 9 points, spread as N(0, 1) is
many = torch.randn(2000, generator=seeded(1))
long = T if full else 20


def shares(x):
    """Which part of the points ended at each of the three numbers."""
    nearest = (x[:, None] - toy).abs().argmin(1)
    return "  ".join(f"{number:5.2f}: {(nearest == i).float().mean():4.0%}" for i, number in enumerate(toy.tolist()))


panels, timesteps = {}, sampling.make_timesteps(long, T, "linspace")
panels["the mean alone"] = (timesteps, go_to_the_mean(line, x_T_line, long)[:-1])
steps = list(sampling.ddpm(line, x_T_line, schedule, long, generator=seeded(0)))
panels["DDPM: the mean, and noise"] = (timesteps, torch.stack([step.x_t for step in steps]))

*_, with_noise = sampling.ddpm(line, many, schedule, long, generator=seeded(0))
print("the data        ", shares(toy))
print("the mean alone  ", shares(go_to_the_mean(line, many, long)[-1]))
print("DDPM            ", shares(with_noise.x))
viz.density_over_time(toy, schedule, panels, width=3.4, height=2.3)

# %% [markdown]
# Read each panel from right to left. Grey shows where $x_t$ should be at each $t$. Without noise, all paths end at the
# same number. $\tilde\mu_t$ is an average over the places where $x_{prev}$ may be, so going there again and again
# shrinks the cloud. Soon $x_t$ contains less noise than the model expects at that $t$, and the model removes even more.
# **The fresh noise restores the variance that averaging removed.** (It does so exactly only for small steps, because
# $\hat x_0$ is a mean, too. This is why DDPM needs many.) With it, each number gets its third.
#
# The same happens to pictures:

# %% tags=["hide-input"]
few = 50 if full else 3
rows, labels = [], []
for name, prompt in {"no prompt": "", "a face": "a face, noto blob style"}.items():
    model = network([prompt] * 6)
    *_, drawn = sampling.ddpm(model, x_T, schedule, few, generator=[seeded(100 + k) for k in range(6)])
    results = {"the mean alone": go_to_the_mean(model, x_T, few)[-1], "DDPM": drawn.x}
    if name == "no prompt":
        results = {"one call": estimate(x_T, model(x_T, torch.full((6,), 999)), 999), **results}
    rows += [sd.decode_first_stage(z) for z in results.values()]
    labels += [f"{name}:\n{way}" for way in results]
viz.strip(rows, [f"seed {k}" for k in range(6)], labels, size=0.64)

# %% [markdown]
# One call gives blotches: the mean of what is possible is a blur, and at $t = 999$ an error of $\hat\epsilon$ becomes
# an error of $\hat x_0$ that is 14.6 times as large. Without a prompt, the mean alone gives smooth, nearly empty
# pictures; with one, it gives the same picture for every seed. DDPM differs from it by one term, and gives different
# pictures, with details, for different seeds.
#
# ## DDPM: algorithm 2 of the paper
#
# | | Algorithm 2: Sampling (Ho et al. 2020) | here |
# |---|---|---|
# | 1 | $x_T \sim \mathcal N(0, I)$ | `x = x_T` |
# | 2 | **for** $t = T, \dots, 1$ **do** | `for t in reversed(range(T)):` |
# | 3 | $z \sim \mathcal N(0, I)$ if $t > 1$, else $z = 0$ | `z = torch.randn(...) if t > 0 else 0` |
# | 4 | $x_{t-1} =$ the line below | `x = mean + math.sqrt(variance) * z` |
# | 5 | **return** $x_0$ | `return x` |
#
# $$x_{t-1} = \frac{1}{\sqrt{\alpha_t}}\Big(x_t - \frac{1-\alpha_t}{\sqrt{1-\bar\alpha_t}}\,\hat\epsilon\Big)
# + \sigma_t z
# \qquad \text{(line 4; the mean is DDPM, eq. 11)}$$
#
# Line 4 is $\tilde\mu_t$ with $\hat x_0$ inserted and multiplied out. minisd computes $\hat x_0$ first, because then
# you can look at it. The assertion checks that the two are the same.

# %%
def algorithm_2(eps_model, x_T, generator):
    x = x_T  # [b *d]
    for t in reversed(range(T)):
        eps = eps_model(x, torch.full((len(x),), t))  # [b *d]
        x0 = estimate(x, eps, t)  # [b *d], the finished picture, as far as it can be estimated now
        mean, variance = mean_step(x, x0, t, t - 1 if t > 0 else None)
        alpha, a = 1 - schedule.betas[t], schedule.alphas_cumprod[t]
        assert torch.allclose(mean, (x - (1 - alpha) / (1 - a).sqrt() * eps) / alpha.sqrt(), atol=1e-3)  # line 4
        z = torch.randn(x.shape, generator=generator) if t > 0 else 0
        x = mean + math.sqrt(variance) * z  # x_{t-1}
    return x


by_hand = algorithm_2(line, x_T_line, seeded(7))
*_, last = sampling.ddpm(line, x_T_line, schedule, generator=seeded(7))
print(f"by hand and minisd.sampling.ddpm differ by {(by_hand - last.x).abs().max():.0e}")

# %% [markdown]
# In minisd a sampler is a **generator**: a loop that yields each step as it is made, so you can look at every
# intermediate and store only what you want.

# %%
model = network(prompts)
steps = list(sampling.ddpm(model, x_T[:4], schedule, 100 if full else 3, generator=[seeded(100 + k) for k in range(4)]))
step = steps[1]
print(f"step {step.i} of {len(steps)}, t = {step.t}: x_t, eps, x0 and x are {list(step.x_t.shape)} each")
viz.trajectory(steps, sd.decode_first_stage, rows=("x_t", "eps", "x0"), every=20 if full else 1)

# %% [markdown]
# All three rows are latents, decoded as if they were pictures. $x_t$ becomes clear, $\hat\epsilon$ stays noise, and
# $\hat x_0$ goes from a blur to a picture. The early blur is not a mistake: it is the mean of what is still possible.
# Coarse things are decided first, and details last.
#
# ## DDIM: put the same noise back
#
# DDPM needs many steps, because its step back is a Gaussian only if the step is small. Look at one step as two
# operations: split $x_t$ into the estimate $\hat x_0$ and the noise $\hat\epsilon$, then mix them again with less
# noise. DDPM mixes in some noise that is new. **DDIM** (Song et al. 2021) uses the $\hat\epsilon$ that it has just
# taken out:
#
# $$x_{prev} = \sqrt{\bar\alpha_{prev}}\;\hat x_0 + \sqrt{1-\bar\alpha_{prev}}\;\hat\epsilon$$

# %%
viz.diagram("ddim_step")

# %%
x = x_T_line
timesteps = sampling.make_timesteps(50, T)  # 981, 961, ..., 1
for t, t_prev in zip(timesteps, [*timesteps[1:], 0], strict=True):
    a_prev = schedule.alpha_bar(t_prev)
    eps = line(x, torch.full((len(x),), t))
    x = math.sqrt(a_prev) * estimate(x, eps, t) + math.sqrt(1 - a_prev) * eps  # x_prev
*_, last = sampling.ddim(line, x_T_line, schedule, steps=50)
print(f"by hand and minisd.sampling.ddim differ by {(x - last.x).abs().max():.0e}")

# %% [markdown]
# Between the two lies a family. $\eta$ says how much of the noise is new: $\eta = 0$ is DDIM, $\eta = 1$ is DDPM.
#
# $$x_{prev} = \sqrt{\bar\alpha_{prev}}\;\hat x_0 + \sqrt{1-\bar\alpha_{prev}-\sigma_t^2}\;\hat\epsilon + \sigma_t z
# \qquad \text{(DDIM, eq. 12)}$$
# $$\sigma_t = \eta\,\sqrt{\frac{1-\bar\alpha_{prev}}{1-\bar\alpha_t}}\sqrt{1-\frac{\bar\alpha_t}{\bar\alpha_{prev}}}
# \qquad \text{(DDIM, eq. 16)}$$
#
# The term under the root keeps the total variance of the noise at $1-\bar\alpha_{prev}$, however much of it is new.
#
# ### Write it yourself: `ddim_step`
#
# essential · about 20 minutes
#
# One step of this family, from $\bar\alpha_t$ to $\bar\alpha_{prev}$. It is the step that Stable Diffusion's own script
# uses.

# %% tags=["exercise"]
def ddim_step(
    x_t: Float[Tensor, "b c h w"],
    eps: Float[Tensor, "b c h w"],
    a_t: float,
    a_prev: float,
    eta: float,
    noise: Float[Tensor, "b c h w"],
) -> Float[Tensor, "b c h w"]:
    """One step of the implicit model, from ᾱ_t to ᾱ_prev. (a_t and a_prev are these two: DDIM writes α for ᾱ.)

        x̂_0    = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t
        σ      = η √((1-ᾱ_prev) / (1-ᾱ_t)) √(1 - ᾱ_t / ᾱ_prev)                    (DDIM, eq. 16)
        x_prev = √ᾱ_prev x̂_0 + √(1 - ᾱ_prev - σ²) ε + σ z                         (DDIM, eq. 12)

    `noise` is z ~ N(0, I).
    """
    raise NotImplementedError  # your code here


check.ddim_step(ddim_step)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def ddim_step(
#     x_t: Float[Tensor, "b c h w"],
#     eps: Float[Tensor, "b c h w"],
#     a_t: float,
#     a_prev: float,
#     eta: float,
#     noise: Float[Tensor, "b c h w"],
# ) -> Float[Tensor, "b c h w"]:
#     x0 = (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5
#     sigma = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)) ** 0.5
#     return a_prev**0.5 * x0 + (1 - a_prev - sigma**2) ** 0.5 * eps + sigma * noise
# ```
#
# </details>
#
# **Predict, then run.** The same $x_T$ nine times, with different noise on the way. Where do the nine end under DDPM,
# and where under DDIM?

# %% tags=["hide-output"]
same = torch.full((9,), 0.6)
panels = {}
for name, eta in [("$\\eta = 1$ (DDPM)", 1.0), ("$\\eta = 0.3$", 0.3), ("$\\eta = 0$ (DDIM)", 0.0)]:
    steps = list(sampling.ddim(line, same, schedule, long // 4, eta=eta, spacing="linspace", generator=seeded(2)))
    panels[name] = ([step.t for step in steps], torch.stack([step.x_t for step in steps]))
viz.density_over_time(toy, schedule, panels, width=2.6, height=2.2)

# %% [markdown]
# Under DDPM they end anywhere in the data, because the noise of the first steps already replaces what $x_T$ contained.
# Under DDIM all end at the same number: there is no noise on the way, so $x_T$ alone decides. This is what makes DDIM
# useful beyond speed. An $x_T$ *is* a picture, so you can move between two of them, or go backwards from a picture to
# its $x_T$.
#
# ## Guidance
#
# A network that was trained with captions follows the prompt, but only weakly. Classifier-free guidance (Ho & Salimans
# 2022) calls it twice, once with the prompt's context $c$ and once with that of the empty prompt, $\varnothing$, and
# **multiplies the difference** by a scale $s$:
#
# $$\hat\epsilon = \hat\epsilon(x_t, \varnothing) + s\,\big(\hat\epsilon(x_t, c) - \hat\epsilon(x_t, \varnothing)\big)
# \qquad \text{(CFG, eq. 6, with } s = 1 + w)$$

# %%
viz.diagram("guidance")

# %% [markdown]
# $s = 0$ ignores the prompt, $s = 1$ is the plain conditional model, and 7.5 is Stable Diffusion's default. The
# prediction without a prompt has to be good, too. So in training one caption in ten is replaced by the empty one
# (`minisd.text_dropout`), and one network learns both. A **negative prompt** is another text in the place of
# $\varnothing$: the picture is pushed away from it.
#
# ### Write it yourself: `guided_eps`
#
# essential · about 15 minutes
#
# Both predictions come from one call with a batch of twice the size, because that is faster than two calls.

# %% tags=["exercise"]
def guided_eps(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Float[Tensor, "b c h w"],
    t: Int[Tensor, "b"],
    context: Float[Tensor, "b n d"],
    uncond_context: Float[Tensor, "b n d"],
    scale: float,
) -> Float[Tensor, "b c h w"]:
    """Ask the model with and without the prompt, in one call, and guide.

    model(x, t, context) returns ε for a batch of any size. Call it once, with a batch of 2b, since that is faster than
    two calls. Then ε = ε_uncond + scale (ε_cond - ε_uncond). (CompVis: DDIMSampler.p_sample_ddim)
    """
    raise NotImplementedError  # your code here


check.guided_eps(guided_eps)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def guided_eps(
#     model: Callable[[Tensor, Tensor, Tensor], Tensor],
#     x: Float[Tensor, "b c h w"],
#     t: Int[Tensor, "b"],
#     context: Float[Tensor, "b n d"],
#     uncond_context: Float[Tensor, "b n d"],
#     scale: float,
# ) -> Float[Tensor, "b c h w"]:
#     contexts = torch.cat([uncond_context, context])
#     eps_uncond, eps_cond = model(torch.cat([x, x]), torch.cat([t, t]), contexts).chunk(2)
#     return eps_uncond + scale * (eps_cond - eps_uncond)
# ```
#
# </details>
#
# **Predict, then run.** The same $x_T$, with $s$ from 0 to 12. What happens to the colours?

# %% tags=["hide-output"]
options = {"ddim": {"set_alpha_to_one": True}, "plms": {"set_alpha_to_one": True}}  # all end at the clean picture


def sampled(sampler, steps, scale, prompts=prompts, x_T=x_T[:4], spacing="trailing", **more):
    """The steps of a drawing by the network."""
    more = {**options.get(sampler, {}), **more}
    return list(sampling.SAMPLERS[sampler](network(prompts, scale), x_T, schedule, steps, spacing=spacing, **more))


scales = [0, 1, 2, 4, 7.5, 12]
rows = []
for scale in scales:
    z = sampled("ddim", few, float(scale))[-1].x
    rows.append(sd.decode_first_stage(z))
    outside = (rows[-1].abs() > 1).float().mean()
    print(f"s = {scale:4}: std of the latent {z.std():.2f}, pixel values beyond [-1, 1] {outside:4.0%}")
shown = torch.stack(rows, dim=1)[:3]  # [3 scales 3 h w]
viz.strip(shown, [f"s = {s}" for s in scales], [p.split(",")[0] for p in prompts[:3]], size=0.64)

# %% [markdown]
# At $s = 0$ something else is drawn. From 1 on, the same picture becomes clearer and then harsher. Colours saturate,
# and more and more pixel values lie outside of the range of the data and have to be cut off. The price of guidance is
# two predictions a step.
#
# <details><summary>Somebody swaps the two halves of that batch. What is drawn at s = 1, and at s = 4?</summary>
#
# $\hat\epsilon(c) + s\,(\hat\epsilon(\varnothing) - \hat\epsilon(c))$ is guidance with the scale $1 - s$. At $s = 1$
# the prompt is ignored. At $s = 4$ the scale is $-3$: the picture is pushed away from the prompt, and a *higher* scale
# gives *less* of what was asked for.
#
# </details>
#
# ## A curve, and how to follow it in few steps
#
# Why does DDIM manage with 50 steps? Divide by $\sqrt{\bar\alpha}$: let $\bar x = x/\sqrt{\bar\alpha}$ and
# $\sigma = \sqrt{1-\bar\alpha}/\sqrt{\bar\alpha}$. Then $\bar x = x_0 + \sigma\,\epsilon$, a picture plus noise of size
# $\sigma$, and DDIM's step becomes
#
# $$\bar x_{prev} = \bar x + (\sigma_{prev} - \sigma)\;\hat\epsilon, \qquad\text{an Euler step for}\qquad
# \frac{d\bar x}{d\sigma} = \hat\epsilon \qquad \text{(DDIM, eq. 13 and 14)}$$
#
# So there is a curve, and the model gives its slope at every point. To sample is to follow the curve from a large
# $\sigma$ down to 0. DDIM goes straight along the slope at the beginning of each step, which is **Euler's method**.
# Samplers for few steps use more than one slope:
#
# | sampler | direction of a step | calls for $n$ steps | fresh noise |
# |---|---|---|---|
# | DDIM, Euler | $\hat\epsilon$ at the beginning of the step | $n$ | none |
# | DDPM, Euler ancestral | the same, then fresh noise | $n$ | yes |
# | Heun | the mean of $\hat\epsilon$ at both ends of the step | $2n - 1$ | none |
# | PLMS | a polynomial through the last four $\hat\epsilon$ | $n + 1$ | none |
# | DPM-Solver++(2M) | a line through the last two $\hat x_0$ | $n$ | none |
#
# For the three numbers the exact curve is known. Here are four steps of each sampler beside it.

# %% tags=["hide-input"]
def rank(x, t):
    """Which share of q(x_t) lies below x: the mean of the Gaussians' distribution functions."""
    a = schedule.alpha_bar(t)
    return torch.special.ndtr((x[:, None] - math.sqrt(a) * toy.double()) / math.sqrt(1 - a)).mean(1)


def exact_path(x, t, t_later):
    """Where the curve through x at t is at t_later. Paths cannot cross, so each keeps its rank: search for it."""
    wanted, low, high = rank(x, t), torch.full_like(x, -9), torch.full_like(x, 9)
    for _ in range(60):
        middle = (low + high) / 2
        below = rank(middle, t_later) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def walk(sampler, model, x, timesteps):
    """x at each of the timesteps, [steps+1 b]. (The sampler's last step, on to the clean picture, is not made.)"""
    xs = [x]
    for step in sampler(model, x, schedule, timesteps=timesteps):
        xs.append(step.x)
        if step.i == len(timesteps) - 2:
            break
    return torch.stack(xs)


def scaled(x, t):
    """σ and x̄ at each timestep."""
    a = torch.tensor([schedule.alpha_bar(int(i)) for i in t], dtype=torch.float64)
    return ((1 - a) / a).sqrt(), x / a.sqrt()


here, there, x_start = 700, 100, torch.tensor([-0.6], dtype=torch.float64)
curve_t = range(here, there - 1, -4)
curve = torch.cat([exact_path(x_start, here, t) for t in curve_t])
coarse = list(range(here, there - 1, -150))  # 700, 550, 400, 250, 100
samplers = {
    "DDIM = Euler": sampling.ddim,
    "Heun": sampling.heun,
    "PLMS": sampling.plms,
    "DPM-Solver++(2M)": sampling.dpmpp_2m,
}
panels = {}
for name, sampler in samplers.items():
    xs = walk(sampler, line, x_start, coarse)[:, 0]
    panels[name] = scaled(xs, coarse)
    print(f"{name:17} ends {abs(xs[-1] - curve[-1]):.3f} beside the curve")

exact = dict.fromkeys(panels, scaled(curve, curve_t))
lines = {name: {"four steps": steps} for name, steps in panels.items()}
figure = viz.curves(lines, r"$\sigma$", r"$\bar x$", exact=exact, exact_label="exact", width=2.5, height=2.3)
for axes in figure.axes:
    axes.invert_xaxis()  # sampling goes from much noise to little
    axes.set_ylim(-2.2, -0.6)
    axes.lines[0].set(marker="o", markersize=4)
figure

# %% [markdown]
# DDIM leaves the curve where it bends, because it trusts the slope at the beginning of each step. (This start was
# chosen so that you can see the difference. One path is no measurement; the optional section on order has one.)
#
# ## How many steps are enough?
#
# For the network, the reference is a drawing of 200 steps. The distance is the root mean square difference over pixels,
# averaged over four prompts. Left is the plain model, right is guidance with $s = 4$.

# %% tags=["hide-input"]
counts = [6, 10, 16, 24, 40] if full else [2, 4]
panels = {}
for scale in (1.0, 4.0):
    reference = sd.decode_first_stage(sampled("plms", 200 if full else 5, scale)[-1].x)
    title = "the plain model" if scale == 1 else f"guidance {scale:g}"
    panels[title] = {}
    for name in ("ddim", "heun", "plms", "dpmpp_2m"):
        calls, errors = [], []
        for n in counts:
            pictures = sd.decode_first_stage(sampled(name, n // 2 if name == "heun" else n, scale)[-1].x)
            calls.append({"heun": n - 1, "plms": n + 1}.get(name, n))
            errors.append((pictures - reference).square().mean((1, 2, 3)).sqrt().mean().item())
        panels[title][name] = (calls, errors)
        print(f"{title:16} {name:9}" + "".join(f"{n:4} calls {e:.3f}" for n, e in zip(calls, errors, strict=True)))
viz.convergence(panels, slopes=(1,), ylabel="distance to 200 steps")

# %% [markdown]
# With the plain model, PLMS comes closest at every number of calls. (The reference is a drawing of PLMS, too.) With
# guidance the order changes: with few calls PLMS and Heun are far off, while DDIM and DPM-Solver++ stay close. Guidance
# makes $\hat\epsilon$ change faster along the way. The curve bends more, and a method that extrapolates from old slopes
# with weights as large as 55/24 and −59/24 is thrown off. DPM-Solver++ was made for guided sampling: it extrapolates
# $\hat x_0$, and only along a line. So which sampler is best depends on the model and on the scale, and has to be
# measured.
#
# ## Which timesteps?
#
# The schedule has 1000 timesteps, and a sampler visits, for example, ten of them. Three rules are in use:

# %%
ends = {"leading": "to t = 0", "linspace": "to x₀", "trailing": "to x₀"}
viz.ruler({name: (sampling.make_timesteps(10, T, name), end) for name, end in ends.items()})

# %% [markdown]
# **leading** is CompVis's rule. With 50 steps it visits 981, 961, …, 1, so **999 is never visited**. But sampling
# starts from pure noise and tells the network "this is $t = 981$", where training showed it noise with a little of a
# picture. The fewer steps, the larger this mismatch. **trailing** visits 999, 979, …, 19, and **linspace** has both
# ends. With 50 steps you hardly see a difference. With two steps you do.
#
# ## Starting part of the way: img2img
#
# A sampler need not start from pure noise. Noise a picture to some $t$ in the middle with `q_sample`, and sample from
# there under a prompt (SDEdit, Meng et al. 2022). What the noise has covered is drawn anew, and the rest stays.
# `strength` is the share of the way.

# %%
corpus = sample(size=sd.config.image_size)
fox = corpus.batch([corpus.captions.index("fox, noto style")])  # [1 3 h w]
z = sd.get_first_stage_encoding(sd.encode_first_stage(fox), seeded(0))  # a latent
timesteps = sampling.make_timesteps(few, T)[-few // 2 :]  # the second half
x = schedule.q_sample(z, torch.tensor([timesteps[0]]), torch.randn(z.shape, generator=seeded(1)))
*_, last = sampling.ddim(network(["a panda, noto style"], 4.0), x, schedule, timesteps=timesteps)
print(f"picture {list(fox.shape)} -> z {list(z.shape)}, noised to t = {timesteps[0]} -> {len(timesteps)} steps")

strengths = [0.1, 0.3, 0.4, 0.6, 0.8] if full else [0.5, 1.0]
rows = []
for prompt in ("a panda, noto style", "a tiger face, noto style"):
    drawn = [sd.img2img(prompt, fox, strength=s, guidance_scale=3.0, steps=few, seed=1).pictures for s in strengths]
    rows.append(torch.cat([fox, *drawn]))
titles = ["the\npicture", *(f"strength\n{s:g}" for s in strengths)]
viz.strip(rows, titles, ["to: a panda", "to: a tiger"], size=0.64)

# %% [markdown]
# At a small strength the fox stays a fox. Towards 0.6 it becomes the animal of the prompt.
#
# ## What you know now
#
# - One prediction is a mean, so one call gives a blur. A sampler makes many small steps.
# - DDPM adds fresh noise in each step, which restores the variance that averaging removed. DDIM puts the same noise
#   back, so $x_T$ alone decides. $\eta$ goes from one to the other.
# - DDIM is Euler's method on a curve. Heun, PLMS and DPM-Solver++ follow the same curve with more than one slope.
# - Guidance multiplies the difference between two predictions. It needs text dropout in training.
#
# **More exercises** in [`exercises/06_sampling.ipynb`](exercises/06_sampling.ipynb), among them `ddpm_step` and
# `dpmpp_2m_step`. **Try it:** draw with `"plms"` and guidance 7.5 at 50, 20 and 10 steps, and with `"ddim"`. At which
# number does each break?
#
# **Next**: you have a text encoder, a UNet, an autoencoder and a sampler. [Notebook 07](07_latent_diffusion.ipynb) puts
# them together, and trains a model.

# %%
print(f"This notebook took {time.time() - start:.0f} s.")

# %% [markdown]
# ## Optional: Heun, PLMS and DPM-Solver++ as formulas
#
# **Heun** makes DDIM's step, calls the model at its end, goes back, and repeats the step with the mean of both
# predictions.
#
# **PLMS** (Liu et al. 2022) keeps the predictions of earlier steps. It puts a polynomial through the last four and
# averages it over the coming step ($t+1$ means one step ago):
#
# $$\epsilon' = \tfrac{1}{24}\big(55\,\hat\epsilon_t - 59\,\hat\epsilon_{t+1} + 37\,\hat\epsilon_{t+2}
# - 9\,\hat\epsilon_{t+3}\big)
# \qquad \text{(PNDM, eq. 12)}$$
#
# Then it makes a DDIM step along $\epsilon'$. In its first step it has no past and does what Heun does, which costs
# **one extra call**. With one old prediction it uses $\tfrac12(3\hat\epsilon_t - \hat\epsilon_{t+1})$, with two
# $\tfrac1{12}(23\hat\epsilon_t - 16\hat\epsilon_{t+1} + 5\hat\epsilon_{t+2})$. The weights sum to 1, so if all
# predictions are the same, PLMS is DDIM.
#
# **DPM-Solver++(2M)** (Lu et al. 2022) extrapolates $\hat x_0$, which hardly changes in the second half of the way, and
# measures the way in $\lambda = \log(\sqrt{\bar\alpha}/\sqrt{1-\bar\alpha})$, so that halving $\sigma$ is always the
# same distance $h$. With a constant $\hat x_0$ the step can be computed exactly (here $\alpha = \sqrt{\bar\alpha}$ and
# $\sigma = \sqrt{1-\bar\alpha}$, as in the paper):
#
# $$x_{prev} = \frac{\sigma_{prev}}{\sigma_t}\,x_t - \alpha_{prev}\,(e^{-h} - 1)\,D
# \qquad \text{(DPM-Solver++, algorithm 2)}$$
#
# With $D = \hat x_0$ this is DDIM again. "2M" takes the line through the last two estimates, half a step ahead:
# $D = \hat x_0 + \frac{h}{2h_{old}}(\hat x_0 - \hat x_0^{old})$.
#
# The next cell computes two such steps by hand, and then counts the calls that ten steps of each sampler take.

# %%
def dpmpp_step(x_t, x0, a_t, a_prev, x0_old=None, h_old=None):
    log_snr_half = lambda a: math.log(a / (1 - a)) / 2  # noqa: E731  (λ)
    h = log_snr_half(a_prev) - log_snr_half(a_t)
    D = x0 if x0_old is None else x0 + h / (2 * h_old) * (x0 - x0_old)
    return math.sqrt((1 - a_prev) / (1 - a_t)) * x_t - math.sqrt(a_prev) * math.expm1(-h) * D, h


a = [schedule.alpha_bar(t) for t in (800, 600, 400)]
x = x_T_line
x0 = estimate(x, line(x, torch.full((9,), 800)), 800)
first, h = dpmpp_step(x, x0, a[0], a[1])
assert torch.allclose(first, walk(sampling.ddim, line, x, [800, 600])[-1], atol=1e-5)  # with D = x̂_0 it is DDIM
x0_new = estimate(first, line(first, torch.full((9,), 600)), 600)
second, _ = dpmpp_step(first, x0_new, a[1], a[2], x0, h)
assert torch.allclose(second, walk(sampling.dpmpp_2m, line, x_T_line, [800, 600, 400])[-1], atol=1e-5)
print("The first step of DPM-Solver++ is DDIM's, and the second is that of minisd.sampling.dpmpp_2m.")


class Counted:
    """A model that records the timesteps at which it is called."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, x, t):
        self.calls.append(int(t[0]))
        return self.model(x, t)


for name, sampler in samplers.items():
    counted = Counted(line)
    list(sampler(counted, x_T_line, schedule, 10, spacing="leading"))
    print(f"{name:17} {len(counted.calls):2} calls: {', '.join(map(str, counted.calls[:5]))}, ...")

timesteps = sampling.make_timesteps(20, T)
pairs = {
    "euler           is ddim": [(sampling.euler, {}), (sampling.ddim, {"set_alpha_to_one": True})],
    "euler_ancestral is ddpm": [(sampling.euler_ancestral, {}), (sampling.ddpm, {})],
    "ddim, eta = 1   is ddpm": [(sampling.ddim, {"eta": 1.0, "set_alpha_to_one": True}), (sampling.ddpm, {})],
}
for name, pair in pairs.items():
    one, other = (
        list(f(line, x_T_line, schedule, timesteps=timesteps, generator=seeded(5), **kw))[-1].x for f, kw in pair
    )
    print(f"{name}: they differ by {(one - other).abs().max():.0e}")

# %% [markdown]
# Heun's last step leads to $\sigma = 0$, where there is no noise to predict, so ten steps take 19 calls. The second
# call of PLMS is at the timestep to which the first step leads, and so is its third. If a library reports 51 calls for
# 50 steps, this is the reason.
#
# ## Optional: what a higher order buys
#
# If you double the number of steps, the error of a first-order method halves, and that of a second-order method falls
# to a quarter. On logarithmic axes these are lines of slope 1 and 2. Left are the three numbers with the exact
# solution; right, the data are two half-moons of points in the plane, and the reference is Heun with a step for every
# timestep.

# %% tags=["hide-input"]
angle = torch.linspace(0, math.pi, 24)
upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
moons = 1.1 * torch.cat([upper, -upper])  # [48 2]
plane = minisd.ExactDenoiser(moons, schedule)

starts = {
    "on the line": (line, torch.linspace(-2, 2, 41, dtype=torch.float64)),
    "in the plane": (plane, torch.randn(100, 2, generator=seeded(0), dtype=torch.float64)),
}
counts = [5, 8, 10, 16, 20, 32, 40, 80, 160, 320] if full else [5, 8]
panels = {}
for title, (model, x) in starts.items():
    finest = list(range(999, 38, -1 if full else -48))
    best = exact_path(x, 999, 39) if x.ndim == 1 else walk(sampling.heun, model, x, finest)[-1]
    panels[title] = {}
    for name, sampler in samplers.items():
        calls, errors = [], []
        for n in counts:
            counted = Counted(model)
            end = walk(sampler, counted, x, list(range(999, 38, -960 // n)))[-1]
            calls.append(len(counted.calls))
            errors.append((end - best).abs().mean().item())
        panels[title][name] = (calls, errors)
print("mean error on the line       " + "".join(f"{n:>9}" for n in counts[::3]) + "  steps")
for name, (_, errors) in panels["on the line"].items():
    print(f"   {name:26}" + "".join(f"{error:9.5f}" for error in errors[::3]))
viz.convergence(panels)

# %% [markdown]
# DDIM runs along slope 1, Heun and DPM-Solver++ along slope 2, and PLMS, once it has four predictions, even steeper. At
# the left ends, with five or ten calls, the lines meet. **Order is a statement about small steps.** It says nothing
# about large ones.
#
# The same in the plane: five paths from the same five $x_T$. A ring is where a path begins, a disc where it ends.

# %% tags=["hide-input"]
x = torch.randn(5, 2, generator=seeded(9))
way = lambda n: sampling.make_timesteps(n, T, "trailing")  # noqa: E731
panels = {
    "DDPM, 50 steps": list(sampling.ddpm(plane, x, schedule, timesteps=way(50), generator=seeded(0))),
    "DDIM, 50 steps": list(sampling.ddim(plane, x, schedule, timesteps=way(50), set_alpha_to_one=True)),
    "DDIM, 6 steps": list(sampling.ddim(plane, x, schedule, timesteps=way(6), set_alpha_to_one=True)),
    "DPM-Solver++, 6 steps": list(sampling.dpmpp_2m(plane, x, schedule, timesteps=way(6))),
}
paths = {name: torch.stack([x, *(step.x for step in steps)]) for name, steps in panels.items()}
for name in ("DDIM, 6 steps", "DPM-Solver++, 6 steps"):
    apart = (paths[name][-1] - paths["DDIM, 50 steps"][-1]).norm(dim=1).mean()
    print(f"{name:22} ends {apart:.2f} from where 50 steps of DDIM do, on average")
viz.walks(moons, paths)

# %% [markdown]
# ## Optional: one trajectory of each
#
# The same $x_T$ and the same six timesteps. $x_t$ and $\hat\epsilon$ are latents, with three of their four channels as
# red, green and blue; $\hat x_0$ is decoded. The printed cosine between one $\hat\epsilon$ and the next is 1 if they
# point the same way. If $\hat\epsilon$ did not change at all, the path would be a straight line and one step would be
# enough: this is why few steps are enough for DDIM, PLMS and DPM-Solver++, and not for DDPM.

# %% tags=["hide-input"]
six = sampling.make_timesteps(6, T, "trailing")
model, walked = network(prompts[:1]), {}
for name in ("ddpm", "ddim", "plms", "dpmpp_2m"):
    walked[name] = list(sampling.SAMPLERS[name](model, x_T[:1], schedule, timesteps=six, generator=seeded(100)))
    eps = torch.cat([step.eps for step in walked[name]]).flatten(1)  # [6 c·h·w]
    cosines = torch.cosine_similarity(eps[:-1], eps[1:])  # [5]
    print(f"{name:9} from one eps to the next:  " + "  ".join(f"{c:.2f}" for c in cosines))

rows, labels = [], []
for field, symbol in {"x_t": "$x_t$", "eps": r"$\hat\epsilon$", "x0": r"$\hat x_0$"}.items():
    for name, steps in walked.items():
        x = torch.cat([getattr(step, field) for step in steps])
        rows.append(sd.decode_first_stage(x) if field == "x0" else x[:, :3] / 2.5)
        labels.append(f"{symbol}   {name}")
viz.strip(rows, [f"t = {t}" for t in six], labels, size=0.56)

# %% [markdown]
# The noise on the way comes from another seed than $x_T$. With the same seed, the first fresh noise would be $x_T$
# again, and nothing would warn you.
#
# ## Optional: a slider
#
# `txt2img` keeps all steps in `.trajectory`, and `.trajectory.save("rocket.gif")` writes a film. The slider computes
# what it shows, so it works only while a kernel runs. Where the notebook is only read, you see the strip below it.

# %% tags=["hide-input"]
out = sd.txt2img("a rocket, noto style", steps=25 if full else 3, guidance_scale=4.0, sampler="dpmpp_2m", seed=2)
trajectory = out.trajectory


def show(i):
    step = trajectory[i]
    decoded = sd.decode_first_stage(torch.cat([step.x_t, step.x0]))
    return viz.strip([decoded], ["$x_t$", r"$\hat x_0$"], [f"step {step.i}\nt = {step.t}"], size=1.6)


# Only Jupyter, VS Code and Colab can show a slider; a test, a build of the docs or a script cannot.
if any(name in os.environ for name in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")):
    from ipywidgets import interact

    interact(show, i=(0, len(trajectory) - 1))

chosen = trajectory.steps[:: 3 if full else 1]
stills = [trajectory.decode(torch.cat([getattr(step, field) for step in chosen])) for field in ("x_t", "x0")]
viz.strip(stills, [f"t = {step.t}" for step in chosen], ["$x_t$", r"$\hat x_0$"], size=0.64)

# %% [markdown]
# ## Optional: the same seed, another picture
#
# Two programs draw different pictures from one seed if they differ in any of these. Check them in this order.
#
# 1. **The noise.** Is it made on the CPU or on the GPU? Do all pictures of a batch share one generator, or has each its
#    own? minisd: on the CPU, and picture $k$ from seed + $k$.
# 2. **The timesteps.** leading, linspace or trailing; whole numbers, or fractions as in DPM-Solver's own code. For
#    numbers of steps that do not divide 1000, CompVis makes more than were asked for (31 for 30).
# 3. **The last step.** Does it lead to $\bar\alpha = 1$, or to $\bar\alpha_0 = 0.99915$ as in CompVis
#    (`set_alpha_to_one=False`)?
# 4. **The start.** $x_T$ itself, or $\sigma_T\,x_T$ in the variable $\bar x$ (k-diffusion): 0.2% apart at $t = 999$.
# 5. **The noise on the way**, if $\eta > 0$: in which order is it made?
# 6. **Guidance.** Is the scale $s$ or $w = s - 1$, and which text stands for the empty prompt?
# 7. **The network.** Precision, kernels and device. These differences are small at first and grow on the way.
#
# ## Optional: in the CompVis source
#
# All in `ldm/models/diffusion/`.
#
# | here | there | file |
# |---|---|---|
# | `ddpm` | `DDPM.p_sample`, `p_sample_loop` | `ddpm.py` |
# | `ddim`, one step of it | `DDIMSampler.sample`, `p_sample_ddim` | `ddim.py` |
# | `plms` | `PLMSSampler.sample`, `p_sample_plms` | `plms.py` |
# | `dpmpp_2m` | `DPMSolverSampler`, on `NoiseScheduleVP` and `DPM_Solver` | `dpm_solver/` |
# | `euler`, `euler_ancestral`, `heun` | not there; k-diffusion's `sample_euler` and so on | |
# | `classifier_free_guidance` | `unconditional_guidance_scale` in each sampler | `ddim.py`, `plms.py` |
# | `make_timesteps` | `make_ddim_timesteps` (in `ldm/modules/diffusionmodules/util.py`) | `util.py` |
# | `q_sample`, then `timesteps=` | `DDIMSampler.stochastic_encode`, `decode` | `ddim.py` |
# | `Step.x0` | `pred_x0` among the `intermediates` | `ddim.py` |
