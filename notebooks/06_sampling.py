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
# A trained model answers one question: *which noise is in $x_t$?* That is all it can do. It does not draw. A
# **sampler** does, by asking the model again and again. This notebook is about what to do with the answers.
#
# You will understand
#
# - why one cannot simply subtract the noise, all at once or bit by bit;
# - DDPM's algorithm 2, line by line, and what its fresh noise is good for;
# - DDIM, Euler, Heun, PLMS and DPM-Solver++ as one idea, refined, and what the refinements buy;
# - guidance: the two answers it compares, and what it costs;
# - which timesteps are visited, and why two libraries draw different pictures from the same seed.
#
# About 70 minutes to read; it takes about two minutes of one processor's time (the last line tells of the clock where
# its figures were made, on a busy machine). Nothing is trained here. The module of this
# stage is [`minisd/sampling.py`](../minisd/sampling.py). Before it: [notebook 05](05_clip.ipynb), the text; after it:
# [notebook 07](07_latent_diffusion.ipynb). You need [notebook 01](01_noising.ipynb), and from
# [notebook 02](02_loss.ipynb) only that a model can learn to predict the noise.

# %% tags=["parameters"]
MODE = "full"  # "smoke": every line runs, on so little that the figures mean nothing

# %%
import math
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from IPython.display import Image

import minisd
from minisd import sampling, viz
from minisd.data import sample

torch.set_grad_enabled(False)  # nothing is trained
full = MODE == "full"
start = time.time()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## Two models to ask
#
# The first is exact. If the data are three numbers, the best answer has a closed form (notebook 01, `ExactDenoiser`).
# It is never wrong, it takes microseconds, and its $x_t$ can be plotted. Whatever goes wrong with it is the sampler's
# fault.
#
# The second is the network that ships. It draws emoji of 32×32 pixels. They are made from **latents** of 4×8×8 numbers
# that the decoder turns into pixels (notebooks 04 and 07). For a sampler they are just another $x$.

# %%
schedule = minisd.NoiseSchedule.scaled_linear(0.00085, 0.012, timesteps=1000)
T = schedule.timesteps
toy = torch.tensor([-1.4, 0.35, 1.05])
line = minisd.ExactDenoiser(toy, schedule)

x, t = torch.randn(5, generator=seeded(0)), torch.full((5,), 999)
print(f"line   x {list(x.shape)}, t {list(t.shape)} of {t.dtype}  ->  eps {list(line(x, t).shape)}")

sd = minisd.load()  # its schedule is the same


def asked_for(prompts, scale=1.0):
    """An eps_model(x, t) that draws these prompts; what `scale` does is told under Guidance."""
    context, empty = sd.get_learned_conditioning(prompts), sd.get_learned_conditioning([""])
    return minisd.classifier_free_guidance(sd.apply_model, context, empty, scale)


prompts = ["a fox, noto style", "a grinning cat, twemoji style", "a rocket, noto style", "a snowman, noto style"]
x_T = sampling.randn((6, 4, 8, 8), [seeded(k) for k in range(6)])  # six latents, pure noise; each has a seed of its own
eps = asked_for(prompts)(x_T[:4], torch.full((4,), 999))
print(f"sd     x {list(x_T[:4].shape)}  ->  eps {list(eps.shape)}  (decoded: {list(sd.decode_first_stage(eps).shape)})")

# %% [markdown]
# Whoever knows the noise knows the picture. The forward process, $x_t = \sqrt{\bar\alpha_t}\,x_0 +
# \sqrt{1-\bar\alpha_t}\,\epsilon$, solved for $x_0$:
#
# $$\hat x_0 = \frac{x_t - \sqrt{1-\bar\alpha_t}\;\epsilon_\theta(x_t, t)}{\sqrt{\bar\alpha_t}} \qquad
# \text{(DDPM, eq. 15)}$$
#
# $\epsilon_\theta$ is the model's answer. The hat says that $\hat x_0$ is a guess.


# %%
def guess(x_t, eps, t):
    a_t = schedule.alpha_bar(t)  # ᾱ_t, a Python number
    return (x_t - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)  # x̂_0


# %% [markdown]
# ## Naive idea 1: take out all the noise at once
#
# Ask once, at $t = 999$, and take the noise out. Done?
#
# **Predict, then run.** The three numbers are −1.4, 0.35 and 1.05. Where do five different $x_T$ end?
#
# <details><summary>Answer</summary>
#
# All near the mean of the data, which is 0. At $t = 999$ hardly anything can be known about $x_0$, and the best guess
# (the one with the smallest mean squared error) is then the mean of all that is possible. No such number is in the
# data.
#
# </details>

# %%
at_once = guess(x, line(x, t), 999)
print("x_T  ", [f"{v:5.2f}" for v in x.tolist()])
print("x̂_0  ", [f"{v:5.2f}" for v in at_once.tolist()], f"  the mean of the data is {toy.mean():.2f}")

# %% [markdown]
# For pictures, such a mean is a blur. It will be the first row of the figure below.
#
# ## Naive idea 2: take out a little at a time
#
# Ask 50 times, on the way from $t = 999$ to $t = 0$. Each time, take out only a little of the noise. Two versions of it
# come to everybody's mind:
#
# - **"subtract a bit"**: $x \leftarrow x - \epsilon/50$.
# - **"the mean step"**: notebook 01 has the exact step back, $q(x_{t-1} \mid x_t, x_0)$, a Gaussian with mean
#   $\tilde\mu_t$. Put $\hat x_0$ into the formula of $\tilde\mu_t$, go there, and repeat. It seems only sensible to
#   go to the mean, and not to add noise to a picture that one wants to be rid of noise.


# %%
def mean_step(x_t, x0, t, t_prev):
    """The mean of q(x_prev | x_t, x_0), and its variance; t_prev None is the clean picture."""
    a_t, a_prev = schedule.alpha_bar(t), 1.0 if t_prev is None else schedule.alpha_bar(t_prev)
    beta = 1 - a_t / a_prev  # β_t; if timesteps are left out, that of all the small steps together
    # μ̃_t = √ᾱ_prev β_t / (1-ᾱ_t) x̂_0  +  √α_t (1-ᾱ_prev) / (1-ᾱ_t) x_t                       (DDPM, eq. 7)
    mean = math.sqrt(a_prev) * beta / (1 - a_t) * x0 + math.sqrt(1 - beta) * (1 - a_prev) / (1 - a_t) * x_t
    return mean, (1 - a_prev) / (1 - a_t) * beta  # β̃_t


def naive(eps_model, x, steps, way):
    """All x on the way, the start first."""
    timesteps = sampling.make_timesteps(steps, T, "linspace")  # 999 ... 0, evenly spread
    xs = [x]
    for t, t_prev in zip(timesteps, [*timesteps[1:], None], strict=True):
        eps = eps_model(x, torch.full((len(x),), t))
        x = x - eps / steps if way == "subtract a bit" else mean_step(x, guess(x, eps, t), t, t_prev)[0]
        xs.append(x)
    return torch.stack(xs)


empty = asked_for([""] * 6)  # the empty prompt: draw whatever comes
faces = asked_for(["a face, noto blob style"] * 6)
few = 50 if full else 3
rows, labels, notes = [], [], []
for name, model in {"no prompt": empty, "a face": faces}.items():
    *_, drawn = sampling.ddpm(model, x_T, schedule, few, generator=[seeded(100 + k) for k in range(6)])
    results = {"the mean step": naive(model, x_T, few, "the mean step")[-1], "DDPM": drawn.x}
    if name == "no prompt":
        blur = guess(x_T, model(x_T, torch.full((6,), 999)), 999)
        bit = naive(model, x_T, few, "subtract a bit")[-1]
        results = {"all at once": blur, "subtract a bit": bit, **results}
    rows += [sd.decode_first_stage(z) for z in results.values()]
    labels += [f"{name}:\n{way}" for way in results]
for label, row in zip(labels, rows, strict=True):
    print(f"{label.replace(chr(10), ' '):26} spread between the six pictures {row.std(0).mean():.3f}")
viz.strip(rows, [f"seed {k}" for k in range(6)], labels, size=0.64)

# %% [markdown]
# (Spread: the standard deviation of a pixel over the six pictures, the mean over all pixels.)
#
# "All at once" gives blurs. "Subtract a bit" is worse: it does not take out what is in $x_t$, and the dimmed picture is
# never brought back to its strength, so at each next step the model sees an $x$ that no training showed it. "The mean
# step" is the interesting one. It gives a smooth, empty disc for every seed, and of a face one and the same. (The fine
# lines in the blurs and on the discs are the decoder's: it was never shown a mean.) The rows called DDPM are what we
# want. DDPM differs from the mean step in one line of code: it adds noise after each step.
#
# Why does noise make a *better* picture? On the line we can see it.

# %%
torch.manual_seed(0)
x_T_line = torch.erfinv(torch.linspace(-0.96, 0.96, 9)) * 2**0.5  # 9 points, spread as N(0, 1) is
many = torch.randn(2000, generator=seeded(1))
long = T if full else 20


def shares(x):
    """Which part of the points ended at each of the three numbers."""
    nearest = (x[:, None] - toy).abs().argmin(1)
    return "  ".join(f"{number:5.2f}: {(nearest == i).float().mean():4.0%}" for i, number in enumerate(toy.tolist()))


panels, timesteps = {}, sampling.make_timesteps(long, T, "linspace")
panels["the mean step"] = (timesteps, naive(line, x_T_line, long, "the mean step")[:-1])
steps = list(sampling.ddpm(line, x_T_line, schedule, long, generator=seeded(0)))
panels["DDPM: the mean step, and noise"] = (timesteps, torch.stack([step.x_t for step in steps]))

*_, with_noise = sampling.ddpm(line, many, schedule, long, generator=seeded(0))
print("data           ", shares(toy))
print("the mean step  ", shares(naive(line, many, long, "the mean step")[-1]))
print("DDPM           ", shares(with_noise.x))
viz.density_over_time(toy, schedule, panels, width=3.4, height=2.3)

# %% [markdown]
# Read from right to left. In grey: where $x_t$ *should* be at each $t$ (notebook 01). Without noise all paths are drawn
# into the middle, and all end at the same number. That is no accident. $\tilde\mu_t$ is the mean of where one may have
# been, and to go to the mean again and again is to shrink the cloud. Too little noise is left in $x_t$ for its $t$, and
# the model, which is told $t$ and believes it, takes out still more. **The fresh noise puts the variance back that the
# mean took away.** Then the points follow the grey, and all three numbers get their third.
#
# ## Algorithm 2: DDPM
#
# The paper's whole sampler (Ho et al. 2020), beside the code that does it.
#
# | | Algorithm 2: Sampling | here |
# |---|---|---|
# | 1 | $x_T \sim \mathcal N(0, I)$ | `x = x_T` |
# | 2 | **for** $t = T, \dots, 1$ **do** | `for t in reversed(range(T)):` |
# | 3 | $z \sim \mathcal N(0, I)$ if $t > 1$, else $z = 0$ | `z = torch.randn(...) if t > 0 else 0` |
# | 4 | $x_{t-1} =$ the line below | `x = mean + math.sqrt(variance) * z` |
# | 5 | **return** $x_0$ | `return x` |
#
# $$x_{t-1} = \frac{1}{\sqrt{\alpha_t}}\Big(x_t - \frac{1-\alpha_t}{\sqrt{1-\bar\alpha_t}}\,
# \epsilon_\theta(x_t, t)\Big) + \sigma_t z \qquad \text{(line 4; the mean is DDPM, eq. 11)}$$
#
# Line 4 is $\tilde\mu_t$ with $\hat x_0$ put in, multiplied out. The long way, by way of $\hat x_0$, shows what
# happens, and lets one look at the guess, so that is what minisd computes. For $\sigma_t^2$ we take $\tilde\beta_t$,
# the variance of the exact step back. (The paper also tries $\beta_t$, with similar results.) With $\tilde\beta_t$ the
# condition in line 3 changes nothing: $\tilde\beta$ is 0 in the last step. With $\beta_t$, whoever forgets it leaves a
# grain of $\sqrt{\beta_0} = 0.03$ on the finished $x_0$.


# %%
def algorithm_2(eps_model, x_T, generator):
    x = x_T  # [b *d]
    for t in reversed(range(T)):
        eps = eps_model(x, torch.full((len(x),), t))  # [b *d]
        x0 = guess(x, eps, t)  # [b *d], what comes out in the end, as far as one can tell now
        mean, variance = mean_step(x, x0, t, t - 1 if t > 0 else None)
        # line 4 as it stands in the paper, and the long way: the same
        alpha, a = 1 - schedule.betas[t], schedule.alphas_cumprod[t]
        assert torch.allclose(mean, (x - (1 - alpha) / (1 - a).sqrt() * eps) / alpha.sqrt(), atol=1e-3)
        z = torch.randn(x.shape, generator=generator) if t > 0 else 0
        x = mean + math.sqrt(variance) * z  # x_{t-1}
    return x


by_hand = algorithm_2(line, x_T_line, seeded(7))
*_, last = sampling.ddpm(line, x_T_line, schedule, generator=seeded(7))
print(f"by hand and minisd.sampling.ddpm differ by {(by_hand - last.x).abs().max():.0e}")

# %% [markdown]
# In minisd a sampler is a **generator**: a loop that hands out each step as it is made. So all intermediates can be
# looked at, and nobody has to store what they don't want.

# %%
model = asked_for(prompts)  # four prompts
steps = list(sampling.ddpm(model, x_T[:4], schedule, 100 if full else 3, generator=[seeded(100 + k) for k in range(4)]))
step = steps[1]
print(f"{len(steps)} steps. Step {step.i}, at t = {step.t}:")
print(f"  step.x_t {list(step.x_t.shape)}   what went in             std {step.x_t.std():.2f}")
print(f"  step.eps {list(step.eps.shape)}   the noise in it          std {step.eps.std():.2f}")
print(f"  step.x0  {list(step.x0.shape)}   what remains without it  std {step.x0.std():.2f}")
print(f"  step.x   {list(step.x.shape)}   what came out: x_t of the next step")
viz.trajectory(steps, sd.decode_first_stage, rows=("x_t", "eps", "x0"), every=20 if full else 1)

# %% [markdown]
# All three are latents, decoded as if they were pictures. From left to right: $x_t$ clears up, $\epsilon$ stays
# noise, and the guess $\hat x_0$ goes from a blur to a picture. The blur is not wrong. It is the right answer to the
# question of the mean, as long as much is possible. Coarse things are settled first, details last.
#
# ## Keep the noise: DDIM
#
# A thousand calls for one picture are many. DDPM needs them, as each of its steps pretends that $q(x_{t-1} \mid x_t)$
# is a Gaussian, and that holds only for small steps.
#
# Look at one step in two halves. First, split $x_t$ into a guess $\hat x_0$ and a noise $\epsilon$. Then mix them
# anew, with a little less noise: $\sqrt{\bar\alpha_{prev}}\,\hat x_0 + \sqrt{1-\bar\alpha_{prev}}\;(\text{noise})$.
# Which noise? DDPM's is partly new. **DDIM (Song et al. 2021) puts back the same $\epsilon$ that was just taken
# out.** In general:
#
# $$x_{prev} = \sqrt{\bar\alpha_{prev}}\;\hat x_0 + \sqrt{1-\bar\alpha_{prev}-\sigma_t^2}\;\epsilon_\theta + \sigma_t z
# \qquad \text{(DDIM, eq. 12)}$$
# $$\sigma_t = \eta\,\sqrt{\frac{1-\bar\alpha_{prev}}{1-\bar\alpha_t}}\sqrt{1-\frac{\bar\alpha_t}{\bar\alpha_{prev}}}
# \qquad \text{(DDIM, eq. 16)}$$
#
# The squares under the root make sure that the noise has the right size, however much of it is new. $\eta = 1$ is DDPM,
# $\eta = 0$ is what one means by DDIM. Below, the step by hand.


# %%
def ddim_step(x_t, eps, a_t, a_prev, eta=0.0, z=0.0):
    x0 = (x_t - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
    sigma_t = eta * math.sqrt((1 - a_prev) / (1 - a_t)) * math.sqrt(1 - a_t / a_prev)
    return math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev - sigma_t**2) * eps + sigma_t * z


x = x_T_line
timesteps = sampling.make_timesteps(50, T)  # 981, 961, ..., 1
for t, t_prev in zip(timesteps, [*timesteps[1:], 0], strict=True):
    x = ddim_step(x, line(x, torch.full((len(x),), t)), schedule.alpha_bar(t), schedule.alpha_bar(t_prev))
*_, last = sampling.ddim(line, x_T_line, schedule, steps=50)
assert torch.allclose(x, last.x, atol=1e-5)

same_noise = {"timesteps": timesteps, "generator": seeded(3)}
*_, one = sampling.ddim(line, x_T_line, schedule, eta=1.0, set_alpha_to_one=True, **same_noise)
same_noise["generator"] = seeded(3)  # from its beginning again
*_, other = sampling.ddpm(line, x_T_line, schedule, **same_noise)
print(f"ddim with eta = 1 and ddpm, same noise: they differ by {(one.x - other.x).abs().max():.0e}")

# %% [markdown]
# **Predict, then run.** One $x_T$, nine times over, with different noise on the way. Where do the nine end under DDPM,
# and where under DDIM?
#
# <details><summary>Answer</summary>
#
# Under DDPM anywhere in the data: the noise of the first steps already makes $x_T$ forgotten. Under DDIM
# all at the same number: there is no noise on the way, and $x_T$ alone decides.
#
# </details>

# %%
same = torch.full((9,), 0.6)
panels = {}
for name, eta in [("$\\eta = 1$ (DDPM)", 1.0), ("$\\eta = 0.3$", 0.3), ("$\\eta = 0$ (DDIM)", 0.0)]:
    walked = sampling.ddim(line, same, schedule, long // 4, eta=eta, spacing="linspace", generator=seeded(2))
    steps = list(walked)
    panels[name] = ([step.t for step in steps], torch.stack([step.x_t for step in steps]))
viz.density_over_time(toy, schedule, panels, width=2.6, height=2.2)

# %% [markdown]
# Now in pictures. No prompt, and the *same* $x_T$ everywhere; from column to column only the noise on the way differs.

# %%
etas = [0.0, 0.3, 0.6, 1.0]
model = asked_for([""] * 6)
rows, table = [], []
for eta in etas:
    drawn = sampling.ddim(model, x_T[5:].expand(6, -1, -1, -1), schedule, few, eta=eta,
                          generator=[seeded(100 + k) for k in range(6)])  # fmt: skip
    pictures = sd.decode_first_stage(list(drawn)[-1].x)
    rows.append(pictures)
    table.append(f"eta {eta:.2f}: spread between the columns {pictures.std(0).mean():.3f}")
print("\n".join(table))
viz.strip(rows, [f"noise {k}" for k in range(6)], [rf"$\eta$ = {eta:g}" for eta in etas], size=0.64)

# %% [markdown]
# The first row is one picture six times. With a little $\eta$, the rough shape stays, and colours and details change.
# The larger $\eta$, the more of the trajectory is drawn afresh, and the less stays: at 1, nearly nothing.
# What DDIM gains: an $x_T$ *is* a picture, the same for every number of
# steps; one can go from one $x_T$ to another and watch the picture change; one can even walk backwards, from a
# picture to its $x_T$.
#
# ## It is an equation
#
# Why does DDIM need fewer steps? Undo the dimming: let $\bar x = x/\sqrt{\bar\alpha}$. Then
#
# $$\bar x = x_0 + \sigma\,\epsilon, \qquad \sigma = \frac{\sqrt{1-\bar\alpha}}{\sqrt{\bar\alpha}}$$
#
# a picture under a heap of noise of height $\sigma$ (without an index: not the $\sigma_t$ of eq. 12, the size of the
# fresh noise, which is 0 here), and eq. 12 with $\eta = 0$ becomes
#
# $$\bar x_{prev} = \bar x + (\sigma_{prev} - \sigma)\;\epsilon_\theta \qquad\text{: an Euler step for}\qquad
# \frac{d\bar x}{d\sigma} = \epsilon_\theta \qquad \text{(DDIM, eq. 13 and 14)}$$
#
# So there is a curve, and the model tells its slope everywhere. To draw is to follow the curve from a large $\sigma$
# down to 0. DDIM goes straight along the slope where it stands, as far as the next $\sigma$: **Euler's method**. That
# is why a sampler called "Euler" and DDIM are the same, written in other variables, and why "Euler ancestral" is
# DDPM.

# %%
timesteps = sampling.make_timesteps(20, T)
pairs = {
    "euler            is ddim": [(sampling.euler, {}), (sampling.ddim, {"set_alpha_to_one": True})],
    "euler_ancestral  is ddpm": [(sampling.euler_ancestral, {}), (sampling.ddpm, {})],
}
for name, pair in pairs.items():
    one, other = (
        list(f(line, x_T_line, schedule, timesteps=timesteps, generator=seeded(5), **kw))[-1].x for f, kw in pair
    )
    print(f"{name}: they differ by {(one - other).abs().max():.0e}")

# %% [markdown]
# On the line, the curve is known exactly. Deterministic paths cannot cross. So each keeps its rank among all: who has
# 30% of the probability below at the start has 30% below at every $t$. Find the $x$ with that rank, and you have the
# solution without making a step.


# %%
def rank(x, t):
    """Which share of q(x_t) lies below x: the mean of the bells' distribution functions."""
    a = schedule.alpha_bar(t)
    return torch.special.ndtr((x[:, None] - math.sqrt(a) * toy.double()) / math.sqrt(1 - a)).mean(1)


def exact_path(x, t, t_later):
    """Where the curve through x at t is at t_later: halve an interval until it holds nothing but the right rank."""
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


def undimmed(x, t):
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
    panels[name] = undimmed(xs, coarse)
    print(f"{name:17} ends {abs(xs[-1] - curve[-1]):.3f} beside the curve")

exact = dict.fromkeys(panels, undimmed(curve, curve_t))
lines = {name: {"four steps": steps} for name, steps in panels.items()}
figure = viz.curves(lines, r"$\sigma$", r"$\bar x$", exact=exact, exact_label="exact", width=2.5, height=2.3)
for axes in figure.axes:
    axes.invert_xaxis()  # sampling goes from much noise to little
    axes.set_ylim(-2.2, -0.6)
    axes.lines[0].set(marker="o", markersize=4)
figure

# %% [markdown]
# The black curve is exact, the dots are four steps. Time runs to the right. See how DDIM leaves the curve where it
# bends: it trusts the slope at the *start* of each step. The others look at more than one slope. (This start was
# chosen so that the difference can be seen; from another, DDIM may come out closest. One path is no measure: the next
# figure has one.)
#
# ## Better steps
#
# **Heun** makes DDIM's step, asks for the slope at its end, goes back, and makes the step again with the mean of the
# two. Two calls a step.
#
# **PLMS** (Liu et al. 2022) has had the slopes of earlier steps already. It puts a polynomial through the last four,
# and takes the mean of this polynomial over the coming step:
#
# $$\epsilon' = \tfrac{1}{24}\big(55\,\epsilon_t - 59\,\epsilon_{t+1} + 37\,\epsilon_{t+2} - 9\,\epsilon_{t+3}\big)
# \qquad \text{(PNDM, eq. 12)}$$
#
# where $t+1$ means one step ago. Then a DDIM step along $\epsilon'$. One call a step. In the first step there is no
# past, and it does what Heun does: **one extra call**. With one old slope it takes $\tfrac12(3\epsilon_t -
# \epsilon_{t+1})$, with two $\tfrac1{12}(23\epsilon_t - 16\epsilon_{t+1} + 5\epsilon_{t+2})$: lines and parabolas,
# until there are four. (In each row the weights sum to 1. If all $\epsilon$ are the same, PLMS is DDIM: a check for
# yours.)
#
# **Predict, then run.** How many calls do ten steps take? Which timestep does PLMS ask for in its second call?
#
# <details><summary>Answer</summary>
#
# DDIM and DPM-Solver++ 10, PLMS 11, Heun 19 (its last step leads to $\sigma = 0$, where there is no noise to ask for).
# The second call of PLMS is at 801, where the first step leads; so is its third, when the walk gets there. If a counter
# of calls in some library says 51 for 50 steps, this is why.
#
# </details>


# %%
class Counted:
    """A model that remembers at which timesteps it was asked."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, x, t):
        self.calls.append(int(t[0]))
        return self.model(x, t)


for name, sampler in samplers.items():
    counted = Counted(line)
    list(sampler(counted, x_T_line, schedule, 10, spacing="leading"))
    print(f"{name:17} {len(counted.calls):2} calls: {', '.join(map(str, counted.calls[:5]))}, ...")

# %% [markdown]
# **DPM-Solver++(2M)** (Lu et al. 2022) changes the question. Don't extrapolate $\epsilon$, extrapolate $\hat x_0$,
# which hardly changes in the second half of the way. And measure the way in $\lambda = \log(\sqrt{\bar\alpha}/
# \sqrt{1-\bar\alpha}) = -\log\sigma$, so that halving the noise is always the same distance $h$. With a constant
# $\hat x_0$ the step can be computed exactly:
#
# $$x_{prev} = \frac{\sigma_{prev}}{\sigma_t}\,x_t - \alpha_{prev}\,(e^{-h} - 1)\,D
# \qquad \text{(DPM-Solver++, algorithm 2)}$$
#
# (in this formula, as in the paper, $\alpha = \sqrt{\bar\alpha}$ and $\sigma = \sqrt{1-\bar\alpha}$). With $D = \hat
# x_0$ this is DDIM once more. "2M" takes the line through the last two guesses instead, half a step ahead: $D = \hat
# x_0 + \frac{h}{2h_{old}}(\hat x_0 - \hat x_0^{old})$. One call a step.


# %%
def dpmpp_step(x_t, x0, a_t, a_prev, x0_old=None, h_old=None):
    log_snr_half = lambda a: math.log(a / (1 - a)) / 2  # noqa: E731  (λ)
    h = log_snr_half(a_prev) - log_snr_half(a_t)
    D = x0 if x0_old is None else x0 + h / (2 * h_old) * (x0 - x0_old)
    return math.sqrt((1 - a_prev) / (1 - a_t)) * x_t - math.sqrt(a_prev) * math.expm1(-h) * D, h


a = [schedule.alpha_bar(t) for t in (800, 600, 400)]
x = x_T_line
x0 = guess(x, line(x, torch.full((9,), 800)), 800)
first, h = dpmpp_step(x, x0, a[0], a[1])
assert torch.allclose(first, ddim_step(x, line(x, torch.full((9,), 800)), a[0], a[1]), atol=1e-5)  # D = x̂_0 is DDIM
x0_new = guess(first, line(first, torch.full((9,), 600)), 600)
second, _ = dpmpp_step(first, x0_new, a[1], a[2], x0, h)
assert torch.allclose(second, walk(sampling.dpmpp_2m, line, x_T_line, [800, 600, 400])[-1], atol=1e-5)
print("its first step is DDIM's; its second is minisd.sampling.dpmpp_2m's")

# %% [markdown]
# So all of them are DDIM's step with another answer put in:
#
# | sampler | goes along | calls for $n$ steps | fresh noise |
# |---|---|---|---|
# | DDIM, Euler | the last $\epsilon$ | $n$ | none |
# | DDPM, Euler ancestral | the last $\epsilon$, then fresh noise | $n$ | yes |
# | Heun | the mean of $\epsilon$ at both ends of the step | $2n - 1$ | none |
# | PLMS | a polynomial through the last four $\epsilon$ | $n + 1$ | none |
# | DPM-Solver++(2M) | a line through the last two $\hat x_0$ | $n$ | none |
#
# ## What it buys
#
# Halve the steps of a first-order method, and its error doubles. A second-order method's error grows fourfold. Put
# the other way: **twice the calls leave a half of the error, or a quarter.** On paper with logarithmic axes these are
# lines of slope 1 and 2. On the line we compare with the exact solution. In the plane the data are two half-moons of
# points, and the reference is Heun with a step for every timestep. All go from $t = 999$ to $t = 39$ in equal steps.

# %%
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
# DDIM runs along slope 1, Heun and DPM-Solver++ along slope 2, and PLMS, once it has its four slopes, even steeper. But
# look at the left ends. With five or ten calls the lines meet. **Order is a promise about small steps.** It says
# nothing about large ones. (Heun pays two calls a step; that is why it stands further right.)
#
# The same in the plane, to look at: five paths from the same five $x_T$.

# %%
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
# (A ring is where a path begins, a disc where it ends.) DDPM staggers, DDIM glides. With six steps, the two are
# polygons: they get roughly there.
#
# ## On pictures
#
# Now the network. The reference is a long walk: 200 steps of PLMS. The distance of a picture from it is the root mean
# square over its pixels, which run from −1 to 1; the mean over four prompts, each with a seed of its own. Left the
# plain model, right guidance of scale 4, of which more below.

# %%
options = {"ddim": {"set_alpha_to_one": True}, "plms": {"set_alpha_to_one": True}}  # all to the clean picture


def draw(sampler, steps, scale, prompts=prompts, x_T=x_T[:4], spacing="trailing", **more):
    """The steps of a drawing by the network."""
    more = {**options.get(sampler, {}), **more}
    return list(sampling.SAMPLERS[sampler](asked_for(prompts, scale), x_T, schedule, steps, spacing=spacing, **more))


counts = [6, 10, 16, 24, 40] if full else [2, 4]
shown, panels = {}, {}
for scale in (1.0, 4.0):
    reference = sd.decode_first_stage(draw("plms", 200 if full else 5, scale)[-1].x)
    title = "the plain model" if scale == 1 else f"guidance {scale:g}"
    panels[title] = {}
    for name in ("ddim", "heun", "plms", "dpmpp_2m"):
        calls, errors = [], []
        for n in counts:
            pictures = sd.decode_first_stage(draw(name, n // 2 if name == "heun" else n, scale)[-1].x)
            calls.append({"heun": n - 1, "plms": n + 1}.get(name, n))
            errors.append((pictures - reference).square().mean((1, 2, 3)).sqrt().mean().item())
            if n == counts[1]:
                shown[scale, name] = pictures
        panels[title][name] = (calls, errors)
        print(f"{title:16} {name:9}" + "".join(f"{n:4} calls {e:.3f}" for n, e in zip(calls, errors, strict=True)))
    shown[scale, "reference"] = reference
viz.convergence(panels, slopes=(1,), ylabel="distance to 200 steps")

# %%
names = ["reference", "ddim", "heun", "plms", "dpmpp_2m"]
rows = [torch.cat([shown[1.0, name][[0, 2]], shown[4.0, name][[0, 2]]]) for name in names]
labels = [name if name == "reference" else f"{name}, ~{counts[1]} calls" for name in names]
viz.strip(rows, ["plain"] * 2 + ["guided"] * 2, labels, size=0.64)

# %% [markdown]
# Left: with the plain model, PLMS is the best at every number of calls. Right: guidance turns the order around.
# PLMS fails below 40 calls, Heun is poor, while DDIM and DPM-Solver++ hardly suffer. Why? One suspect is that guidance
# makes $\epsilon$ change faster along the way: the curve bends more, and whoever extrapolates from old slopes, with
# weights as large as 55/24 and −59/24, is thrown off it. That can be measured: by how much does $\epsilon$ change from
# one step of DDIM to the next, as a share of its size?

# %%
for scale in (1.0, 4.0):
    eps = torch.stack([step.eps for step in draw("ddim", counts[1], scale)])  # [10 4 4 8 8]
    change = (eps[1:] - eps[:-1]).flatten(2).norm(dim=2) / eps[1:].flatten(2).norm(dim=2)  # [9 4]
    print(f"guidance {scale:g}: eps changes by " + " ".join(f"{c:.2f}" for c in change.mean(1)))

# %% [markdown]
# So it does, most of all at the start of the way, where PLMS has but a few slopes to go by. DPM-Solver++ was made for
# guided sampling: it extrapolates $\hat x_0$, and only along a line.
#
# With guidance 4, this small network is drawn well by DDIM in 10 calls. Other models may need other numbers: measure.
# (Heun's last step here is one long Euler step, which limits it.)
#
# ## One trajectory for each
#
# The same $x_T$, the same six timesteps, four samplers side by side. $x_t$ and $\epsilon$ are shown as they are, as
# latents of 8×8 (three of the four channels, as red, green and blue); $\hat x_0$ is decoded. Read from left to right.
#
# **Predict, then run.** DDIM keeps its noise, DDPM draws some anew at each step. In which of the four does $\epsilon$
# stay the same from step to step? The answer in numbers is the cosine between one $\epsilon$ and the next: 1 if they
# point the same way, 0 if they have nothing in common.

# %%
six = sampling.make_timesteps(6, T, "trailing")
model, walked = asked_for(prompts[:1]), {}
for name in ("ddpm", "ddim", "plms", "dpmpp_2m"):
    walked[name] = list(sampling.SAMPLERS[name](model, x_T[:1], schedule, timesteps=six, generator=seeded(100)))
    eps = torch.cat([step.eps for step in walked[name]]).flatten(1)  # [6 256]
    cosines = torch.cosine_similarity(eps[:-1], eps[1:])  # [5]
    print(f"{name:9} from one eps to the next:  " + "  ".join(f"{c:.2f}" for c in cosines))

rows, labels = [], []
for field, symbol in {"x_t": "$x_t$", "eps": r"$\epsilon$", "x0": r"$\hat x_0$"}.items():
    for name, steps in walked.items():
        x = torch.cat([getattr(step, field) for step in steps])  # [6 4 8 8]
        rows.append(sd.decode_first_stage(x) if field == "x0" else x[:, :3] / 2.5)
        labels.append(f"{symbol}   {name}")
viz.strip(rows, [f"t = {t}" for t in six], labels, size=0.56)

# %% [markdown]
# (The noise on the way comes from another seed than $x_T$. With the same seed, the first fresh noise would be $x_T$
# once more: a mistake that no error tells of.)
#
# The second block is the one to compare: DDPM's $\epsilon$ changes from step to step, since there is new noise to be
# found. In the other three it stays nearly the same. Were it exactly the same, the path would be a straight line, and
# one step would do: that is why few steps are enough.
#
# ## Guidance
#
# The network was trained with captions, and it draws what they say: a little timidly. Classifier-free guidance (Ho &
# Salimans 2022) asks it twice, once with the prompt $c$ and once with the empty one, $\varnothing$, and **exaggerates
# the difference**:
#
# $$\epsilon = \epsilon_\theta(x_t, \varnothing)
# + s\,\big(\epsilon_\theta(x_t, c) - \epsilon_\theta(x_t, \varnothing)\big)
# \qquad \text{(CFG, eq. 6, with } s = 1 + w)$$
#
# $s = 0$ ignores the prompt, $s = 1$ is the plain conditional model, 7.5 is Stable Diffusion's default. Both answers
# come from one call with a batch of twice the size; a guided step costs twice as much. ($t$ is left out of the formula:
# it is the same in all three places. Notebook 02 wrote $\hat\epsilon$ for the guided answer, notebook 00 $c_\emptyset$
# for the empty context.)
#
# **Predict.** Someone swaps the two halves of that batch. What is drawn at $s = 1$, and what at $s = 4$?
#
# <details><summary>Answer</summary>
#
# $\epsilon_\theta(c) + s\,(\epsilon_\theta(\varnothing) - \epsilon_\theta(c))$, for $s = 1$, is
# $\epsilon_\theta(\varnothing)$: the prompt is ignored. In general it is guidance of the scale $1 - s$, so at 4 it is
# $-3$: away from the prompt, and the harder, the more one turns it up. The symptom: a *higher* scale gives *less* of
# what was asked for.
#
# </details>

# %%
context, nothing = sd.get_learned_conditioning(prompts[:1]), sd.get_learned_conditioning([""])
t = torch.full((1,), 700)
x_t = draw("ddim", few, 1.0)[few // 4].x_t[:1]
eps_uncond, eps_cond = sd.apply_model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([nothing, context])).chunk(2)
eps = eps_uncond + 4.0 * (eps_cond - eps_uncond)
guided = asked_for(prompts[:1], 4.0)(x_t, t)  # Guided(eps, cond, uncond)
assert torch.allclose(guided.eps, eps, atol=1e-4)
print(f"context {list(context.shape)}, eps_cond {list(eps_cond.shape)}")
difference = eps_cond - eps_uncond
print(f"std of eps_cond {eps_cond.std():.2f}, of eps_uncond {eps_uncond.std():.2f}, of the difference", end=" ")
print(f"{difference.std():.2f}")

steps = draw("ddim", few, 4.0)
columns = steps[:: max(1, few // 6)]
rows = []
for field in ("eps_uncond", "eps_cond", "eps"):
    rows.append(sd.decode_first_stage(torch.cat([guess(s.x_t[1:2], getattr(s, field)[1:2], s.t) for s in columns])))
labels = [r"from $\epsilon(x_t, \varnothing)$", r"from $\epsilon(x_t, c)$", "guided, s = 4"]
viz.strip(rows, [f"t = {s.t}" for s in columns], labels, size=0.64)

# %% [markdown]
# The three guesses at $x_0$ of the two answers, and of what guidance makes of them, at the same $x_t$, for "a
# grinning cat, twemoji style". Without the prompt, the model sees *something* in the noise; with it, a cat. The
# guided guess lies beyond the second, on the line from the first.
#
# **Why text dropout?** The answer $\epsilon_\theta(x_t, \varnothing)$ has to be a good one. A network that was never
# shown an empty caption has no idea what to do with one. So in training, one caption in ten is replaced by the empty
# one (`minisd.text_dropout`), and a single network learns both. A negative prompt is the same trick: put another text
# where $\varnothing$ stands, and the picture is pushed away from it.
#
# **Predict, then run.** The same $x_T$, $s$ from 0 to 12. What happens to the colours?
#
# <details><summary>Answer</summary>
#
# They get stronger until they hit the limits: the guided $\hat x_0$ leaves the range of the data, and pixels are cut
# off at −1 and 1. The pictures get simpler, and those of different seeds more alike.
#
# </details>

# %%
scales = [0, 1, 2, 4, 7.5, 12]
rows = []
for scale in scales:
    z = draw("ddim", few, float(scale))[-1].x
    rows.append(sd.decode_first_stage(z))
    outside = (rows[-1].abs() > 1).float().mean()
    print(f"s = {scale:4}: std of the latent {z.std():.2f}, pixel values beyond [-1, 1] {outside:4.0%}")
shown = torch.stack(rows, dim=1)[:3]  # [3 scales 3 32 32]
viz.strip(shown, [f"s = {s}" for s in scales], [p.split(",")[0] for p in prompts[:3]], size=0.64)

# %% [markdown]
# $s = 0$ draws something else. From 1 on the same picture gets firmer, then harsher: colours saturate, and what is dark
# gets darker. The share of pixel values that have to be cut off grows from 19% at $s = 1$ to 32% at 12.
#
# ## Which timesteps?
#
# The schedule has 1000 timesteps, and 50 of them are visited. Which? Three rules are in use, here with ten steps.

# %%
ends = {"leading": "to t = 0", "linspace": "to x₀", "trailing": "to x₀"}
viz.ruler({name: (sampling.make_timesteps(10, T, name), end) for name, end in ends.items()})

# %% [markdown]
# **leading** is CompVis's: every 100th timestep from 0, plus 1 ("to get the final alpha values right", says the comment
# in their `make_ddim_timesteps`). With 50 steps these are 1, 21, ..., 981. **999 is never visited**, and neither is 0:
# an off-by-one that others have kept, to draw the same pictures. But drawing starts with pure noise, and tells the
# model "this is $t = 981$", where training showed it noise with a little of a picture. The fewer steps, the bigger the
# lie.
#
# **trailing** counts from the end: 999, 979, ..., 19. It starts where the noise is. **linspace** has both ends, 999
# and 0. Also, the last step may lead to the clean picture, or only to $\bar\alpha_0 = 0.99915$, as CompVis has it
# (`set_alpha_to_one=False`).

# %%
print("      first t, and √ᾱ there")
for n in (50, 10, 2):
    firsts = {name: sampling.make_timesteps(n, T, name)[0] for name in ends}
    print(f"{n:3} steps:  " + "   ".join(f"{k} {t} {math.sqrt(schedule.alpha_bar(t)):.3f}" for k, t in firsts.items()))
rows = []
for name in ends:
    drawn = [draw("ddim", n, 2.0, spacing=name)[-1].x[[0, 2, 3]] for n in (50 if full else 3, 2)]
    rows.append(sd.decode_first_stage(torch.cat(drawn)))
viz.strip(rows, ["50 steps"] * 3 + ["2 steps"] * 3, list(ends), size=0.64)

# %% [markdown]
# With 50 steps one hardly sees a difference. With two, *leading* starts at $t = 501$, where training showed half a
# picture, and *linspace* goes from 999 to 0 in a single step. *trailing* holds up best.
#
# ## Starting part of the way: img2img
#
# Nothing says that one has to start from pure noise. Take a picture, noise it to some $t$ in the middle with
# `q_sample`, and walk down from there under a prompt (SDEdit, Meng et al. 2022). All that the noise has covered is
# drawn anew, and what it has not covered stays. `strength` is the share of the way. In the code it is two lines: `x =
# q_sample(z, t, noise)`, and a sampler that is given the remaining `timesteps`.

# %%
corpus = sample(size=32)
fox = corpus.batch([corpus.captions.index("fox, noto style")])  # [1 3 32 32]
z = sd.get_first_stage_encoding(sd.encode_first_stage(fox), seeded(0))  # [1 4 8 8], a latent
timesteps = sampling.make_timesteps(few, T)[-few // 2 :]  # the second half
x = schedule.q_sample(z, torch.tensor([timesteps[0]]), torch.randn(z.shape, generator=seeded(1)))
*_, last = sampling.ddim(asked_for(["a panda, noto style"], 4.0), x, schedule, timesteps=timesteps)
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
# ## A slider and a film
#
# `txt2img` keeps all steps in `.trajectory`. A slider has to compute what it shows, so **it works only while a kernel
# runs**: open this notebook in Jupyter, VS Code or Colab, run it, and drag. Where it is only read, as on GitHub, there
# are a strip of stills and a film below, which show the same.

# %%
out = sd.txt2img("a rocket, noto style", steps=25 if full else 3, guidance_scale=4.0, sampler="dpmpp_2m", seed=2)
trajectory = out.trajectory


def show(i):
    step = trajectory[i]
    decoded = sd.decode_first_stage(torch.cat([step.x_t, step.x0]))
    return viz.strip([decoded], ["$x_t$", r"$\hat x_0$"], [f"step {step.i}\nt = {step.t}"], size=1.6)


# Someone who can drag a slider sits in Jupyter, VS Code or Colab; a test, a build of the docs or a script doesn't.
if any(name in os.environ for name in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")):
    from ipywidgets import interact

    interact(show, i=(0, len(trajectory) - 1))
else:
    show(len(trajectory) // 2)  # nobody to drag it: no slider, but the function is run
    print(f"No slider here. With a running kernel, this would be one over the {len(trajectory)} steps.")

# %%
chosen = trajectory.steps[:: 3 if full else 1]
stills = [trajectory.decode(torch.cat([getattr(step, field) for step in chosen])) for field in ("x_t", "x0")]
viz.strip(stills, [f"t = {step.t}" for step in chosen], ["$x_t$", r"$\hat x_0$"], size=0.64)

# %% [markdown]
# And the guesses $\hat x_0$ as a film (a `.webp` would be smaller, but not every viewer of notebooks shows one):

# %%
with tempfile.TemporaryDirectory() as folder:
    film = Path(folder) / "rocket.gif"
    every_other = replace(trajectory, steps=trajectory.steps[::2])  # half the frames, half the size
    every_other.save(film, frame_ms=200, scale=2)
    shown = Image(film.read_bytes(), format="gif", width=128)
print(f"{len(every_other)} frames, {len(shown.data) / 1000:.0f} kB")
shown

# %%
print(f"This notebook took {time.time() - start:.0f} s.")

# %% [markdown]
# ## Recap
#
# - The model names the noise. One guess is a mean, so a blur; and going to the mean step by step shrinks the cloud
#   until all pictures are one.
# - DDPM adds fresh noise after each step, as much as the mean step took away.
# - DDIM puts the same noise back. Then $x_T$ decides, and the walk follows a curve, $d\bar x/d\sigma = \epsilon$.
#   $\eta$ goes from one to the other.
# - Euler, Heun, PLMS and DPM-Solver++ follow the same curve. Higher order pays where steps are small and the
#   curve is smooth; guidance makes it less so.
# - Guidance exaggerates the difference between two answers. It needs text dropout in training.
# - Timesteps, the last step and the noise have to agree before two libraries can draw the same picture.
#
# ## In the CompVis source
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
#
# ## The same seed, another picture
#
# Two programs draw different pictures from one seed if they differ in any of these. Look in this order.
#
# 1. **The noise.** Drawn on the CPU or on the GPU? All pictures of a batch from one generator, or each from its own?
#    minisd: CPU, picture $k$ from seed + $k$.
# 2. **The timesteps.** leading, linspace or trailing; whole numbers, or fractions as in DPM-Solver's own code. For
#    numbers of steps that do not divide 1000, CompVis makes more than were asked for (31 for 30).
# 3. **The last step.** To $\bar\alpha = 1$ or to $\bar\alpha_0$.
# 4. **The start.** $x_T$ itself, or $\sigma_T$ times it in the undimmed variable (k-diffusion): at $t = 999$, 0.2%
#    apart.
# 5. **The noise on the way**, where $\eta > 0$: in which order it is drawn.
# 6. **Guidance**: where the scale counts from, and what stands for the empty prompt.
# 7. The network: the precision, the kernels, the device. These differences are small at first, and grow on the way.
#
# ## Try it
#
# - Draw with `"plms"` and guidance 7.5 at 50 steps, then at 20, 15, 10. At which does it break? And `"ddim"`?
# - Take two $x_T$ and draw with DDIM from mixtures $\cos(\phi)\,x_T + \sin(\phi)\,x_T'$. Why not from
#   $(1-\phi)\,x_T + \phi\,x_T'$?
# - In `mean_step`, add only half of the noise. Which picture is between "the mean step" and DDPM?
#
# [Exercises of this stage](exercises/06_sampling.ipynb): write the samplers yourself, with checks that tell what is
# wrong.
#
# Next, in [notebook 07](07_latent_diffusion.ipynb): the three networks as one.
