# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1 · Noising: how a picture dissolves
#
# A diffusion model learns to remove noise from pictures. This notebook shows how the noisy pictures are made on which
# it practises, and what it takes to get back to the clean picture.
#
# At the end you can
#
# - add noise to a picture as Stable Diffusion does, for any timestep, in one line;
# - explain $\beta_t$, $\bar\alpha_t$ and the signal-to-noise ratio;
# - compute the clean picture from a noisy one and its noise;
# - say why there are a thousand small steps, although one jump gives noisy pictures of the same kind;
# - draw pictures without any network, and explain why that is not enough.
#
# About 50 minutes, with two exercises; it runs in about a minute on a laptop. Nothing is trained here.
#
# Before: [00](00_start_here.ipynb), the map. After: [02](02_loss.ipynb), where a network learns to find the noise. The
# module is [`minisd/noising.py`](../minisd/noising.py). In the browser:
# [What training did](../docs/play.md#tour=training), a stop of the guided tour.

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
import time

import torch
from jaxtyping import Float, Int
from torch import Tensor

import minisd
from minisd import viz
from minisd.coursework import check
from minisd.data import sample

full = MODE == "full"
start = time.time()

# %% [markdown]
# ## Where we are

# %%
viz.pipeline("noising")

# %% [markdown]
# In training, noising comes between the autoencoder and the UNet. It mixes a clean latent with noise $\epsilon$, and
# gives the UNet the result $x_t$. These are its two rows in the trace of a training step (the table of notebook 00):

# %% tags=["hide-input"]
corpus = sample(size=32)
sd = minisd.load()
fox = corpus.batch([corpus.captions.index("fox, noto style")])[0]  # [3 32 32]
step = minisd.trace(sd, "fox, noto style", image=fox, t=500)
print(*[row for row in step if row.stage == 1], sep="\n")

# %% [markdown]
# ## A picture is a point
#
# A network sees a picture as numbers from $-1$ (black) to $1$ (white). 32×32 pixels in three colours are 3,072 numbers,
# so a picture is one point in a space of 3,072 dimensions. All formulas below work for any points: for latents, where
# Stable Diffusion uses them, and for single numbers, which we can plot.

# %%
names = ["fox", "tropical fish", "rocket", "watermelon", "panda", "house", "sunflower", "guitar"]
x_0 = corpus.batch([corpus.captions.index(f"{name}, noto style") for name in names])

print(f"corpus  {len(corpus)} pictures, {corpus.images.dtype} {list(corpus.images.shape)}")
print(f"x_0     {x_0.dtype} {list(x_0.shape)}, from {x_0.min():.2f} to {x_0.max():.2f}")
viz.strip([x_0], titles=names)

# %% [markdown]
# ## Shrink a little, then add a little noise
#
# The simplest way to ruin a picture is to add a little Gaussian noise, a thousand times. But then the numbers grow with
# every step. So we do it in two moves: first **shrink** the picture a little, then **add** just enough noise to make up
# for it. Multiplying $x$ by $\sqrt{1-\beta}$ multiplies its variance by $1-\beta$. Noise of variance $\beta$ brings a
# variance of 1 back to $(1-\beta) + \beta = 1$. This is one step of DDPM
# ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)), and of Stable Diffusion:
#
# $$x_t = \sqrt{1-\beta_t}\;x_{t-1} + \sqrt{\beta_t}\;\epsilon, \qquad \epsilon \sim \mathcal N(0, I)
# \qquad \text{(DDPM, eq. 2)}$$
#
# $\beta_t$ is the variance of the noise that step $t$ adds. All $\beta_t$ together are the
# [noise schedule](../docs/glossary.md).
#
# **How we count.** In the code, $t = 0$ is the picture after the first step, and $t = 999$ the one after the
# thousandth. The papers count from 1, so their last picture is $x_T$ with $T = 1000$. The clean picture is called $x_0$
# in both (so $x_0$ is not the picture at $t = 0$).

# %%
schedule = minisd.NoiseSchedule.scaled_linear(0.00085, 0.012, timesteps=1000)  # Stable Diffusion's
T = schedule.timesteps
print(f"betas  {list(schedule.betas.shape)}, from {schedule.betas[0]:.5f} to {schedule.betas[-1]:.5f}")

# %% [markdown]
# **Predict, then run.** No step takes away more than 1.2% of the variance of the picture. How much of the picture is
# left after a thousand steps, and which standard deviation do the numbers have then?

# %% tags=["hide-output"]
torch.manual_seed(0)
shown = [0, 10, 50, 100, 250, 500, 999]
added = shrunk = x_0[0]
rows = [[added], [shrunk]]
for t in range(T):
    beta, epsilon = schedule.betas[t], torch.randn_like(x_0[0])
    added = added + 0.1 * epsilon  # noise is added, and nothing is shrunk
    shrunk = (1 - beta).sqrt() * shrunk + beta.sqrt() * epsilon  # one step of DDPM, eq. 2
    if t in shown:
        rows[0].append(added)
        rows[1].append(shrunk)

left = (1 - schedule.betas).prod()
print(f"left of the picture: {left:.4f} of its variance, so a factor of {left.sqrt():.3f}")
notes = [[f"std {x.std():.2f}" for x in row] for row in rows]
titles = ["$x_0$", *(f"t = {t}" for t in shown)]
viz.strip([torch.stack(row) for row in rows], titles, ["add", "shrink,\nthen add"], notes)

# %% [markdown]
# Next to nothing is left, because many small losses multiply. Remember the factor of 0.068; it comes back.
#
# In the upper row the standard deviation grows to more than 3. In the lower row it goes to 1, from any picture. So the
# end is always the same: noise of mean 0 and standard deviation 1. Drawing will start from there. (If the data have
# variance 1, it stays exactly 1 at every step. Our pixels have less. Latents are scaled to have it: notebook 04.)
#
# <details><summary>Optional: models that only add</summary>
#
# "Variance exploding" models, such as EDM ([Karras et al. 2022](https://arxiv.org/abs/2206.00364)), let the numbers
# grow, and divide $x_t$ by its size before the network sees it. This comes to the same.
#
# </details>
#
# ## The chain, and its way back

# %%
viz.diagram("chain")

# %% [markdown]
# To the right goes the [forward process](../docs/glossary.md) $q$: the steps that we have just taken. It is fixed. To
# the left goes the [reverse process](../docs/glossary.md) $p_\theta$, which removes a little noise in each step. It
# needs a network with weights $\theta$. Notebook 02 trains one, and notebook 06 walks back with it.
#
# ## All steps in one jump
#
# Training needs noisy pictures at random timesteps. Nobody walks there step by step, because two steps in a
# row do the same as one larger step: shrinking twice is shrinking once by the product of the factors, and two
# independent Gaussian noises add up to one whose variance is the sum of theirs.
#
# The same holds for any number of steps. Write $\alpha_t = 1-\beta_t$ for the share of the variance that step $t$
# keeps, and $\bar\alpha_t$ ("alpha bar") for the product of all shares up to $t$:
#
# $$x_t = \sqrt{\bar\alpha_t}\;x_0 + \sqrt{1-\bar\alpha_t}\;\epsilon, \qquad
#   \bar\alpha_t = \alpha_0\,\alpha_1 \cdots \alpha_t \qquad \text{(DDPM, eq. 4)}$$
#
# So $\bar\alpha_t$ is the share of the picture's variance that is left at $t$, and $1-\bar\alpha_t$ is the variance of
# the noise. Written as a distribution:
# $q(x_t \mid x_0) = \mathcal N\big(\sqrt{\bar\alpha_t}\,x_0,\,(1-\bar\alpha_t)I\big)$. No other formula is used as
# often in this course.
#
# <details><summary>Optional: the algebra for two steps</summary>
#
# $$x_t = \sqrt{\alpha_t}\,
#   \big(\underbrace{\sqrt{\alpha_{t-1}}\,x_{t-2} + \sqrt{1-\alpha_{t-1}}\;\epsilon_{t-1}}_{x_{t-1}}\big)
#   + \sqrt{1-\alpha_t}\;\epsilon_t$$
#
# The two noises are independent, so their variances add up:
# $\alpha_t(1-\alpha_{t-1})+(1-\alpha_t)=1-\alpha_t\alpha_{t-1}$. This is one step with $\alpha_t\alpha_{t-1}$ in place
# of $\alpha_t$. (The sum of two uniform noises is not uniform. This is one reason why the noise is Gaussian.)
#
# </details>

# %% [markdown]
# ### Write it yourself: `q_sample`
#
# essential · about 10 minutes
#
# Noise a batch of pictures by this formula. Each picture has a timestep of its own, so `t` has the shape `[b]`.

# %% tags=["exercise"]
def q_sample(
    x_0: Float[Tensor, "b c h w"],
    t: Int[Tensor, "b"],
    noise: Float[Tensor, "b c h w"],
    alphas_cumprod: Float[Tensor, "T"],
) -> Float[Tensor, "b c h w"]:
    """Noise each picture to its own timestep, in one go: a sample of q(x_t | x_0).

        q(x_t | x_0) = N(√ᾱ_t x_0, (1-ᾱ_t) I)                            (DDPM, eq. 4)

    `noise` is ε ~ N(0, I), to be used as it is; ᾱ_t is alphas_cumprod[t].
    """
    raise NotImplementedError  # your code here


check.q_sample(q_sample)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# # x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε
# alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
# return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
# ```
#
# </details>

# %% [markdown]
# In the package it is a method of the schedule, which knows $\bar\alpha_t$:

# %%
t = torch.tensor([0, 20, 60, 120, 250, 400, 600, 999])  # [b]
noise = torch.randn_like(x_0)
x_t = schedule.q_sample(x_0, t, noise)
print(f"x_0 {list(x_0.shape)}, t {list(t.shape)}, noise {list(noise.shape)}  ->  x_t {list(x_t.shape)}")
viz.strip([x_0, noise, x_t], [f"t = {i}" for i in t.tolist()], ["$x_0$", r"$\epsilon$", "$x_t$"])

# %% [markdown]
# <details><summary>Optional: two mistakes that no error message reports</summary>
#
# **Without the roots**, the factors are $\bar\alpha_t$ and $1-\bar\alpha_t$. For data of variance 1, the variance is
# then $\bar\alpha_t^2 + (1-\bar\alpha_t)^2$: right at both ends, and only ½ in the middle. Such an $x_t$ is too pale,
# and contains less noise than a sampler believes.
#
# **Without `[:, None, None, None]`**, and with 32 pictures of 32×32 pixels, `[32]` multiplies `[32 3 32 32]` along the
# *last* axis. Each column of pixels gets the $t$ of another picture, which looks like stripes. With other numbers
# PyTorch would have complained. So test with sizes that all differ.
#
# </details>
#
# ## The whole process, on a line
#
# With numbers instead of pictures, we can see everything at once. Let the data set be three numbers. Grey shows the
# density of $x_t$ at every $t$: the sum of three bells, one from each number. The lines are two walks from each number.

# %% tags=["hide-input"]
torch.manual_seed(3)
toy = torch.tensor([-1.4, 0.35, 1.05])
points = toy.repeat(2)
walks = []
for beta in schedule.betas:
    points = (1 - beta).sqrt() * points + beta.sqrt() * torch.randn(len(points))
    walks.append(points)
walks = torch.stack(walks)  # [T 6]

viz.density_over_time(toy, schedule, {"a thousand small random steps": (range(T), walks)}, width=6)

# %% [markdown]
# Early on, you can tell from $x_t$ which number it came from. Later the bells overlap. The two numbers that are close
# to each other merge first: noise destroys **small differences before large ones**. At the end there is one bell,
# nearly $\mathcal N(0, 1)$.
#
# ## How much noise is that? The signal-to-noise ratio
#
# $\beta_t$ does not show how noisy $x_t$ is. The **signal-to-noise ratio** ([SNR](../docs/glossary.md)) does. It is the
# variance of what is left of the picture, divided by the variance of the noise:
#
# $$\mathrm{SNR}(t) = \frac{\bar\alpha_t}{1-\bar\alpha_t}$$
#
# At an SNR of 1 there is as much picture as noise. Three schedules are in use: DDPM's `linear`, Stable Diffusion's
# `scaled_linear` and the `cosine` of [Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672). The names say what
# grows linearly ($\beta$, or $\sqrt\beta$) or falls like a squared cosine ($\bar\alpha$).

# %%
schedules = {
    "scaled_linear": minisd.NoiseSchedule.scaled_linear(),
    "linear": minisd.NoiseSchedule.linear(),
    "cosine": minisd.NoiseSchedule.cosine(),
}
for name, s in schedules.items():
    half = (s.alphas_cumprod < 0.5).int().argmax()
    print(f"{name:14} more noise than signal from t = {half}; at the end, √ᾱ_T = {s.alphas_cumprod[-1].sqrt():.5f}")
viz.schedule_curves(schedules)

# %%
viz.noising_strip(x_0[1:2], schedules, [99, 199, 299, 399, 599, 799, 999])

# %% [markdown]
# (All rows have the same noise, so that only its amount differs.) A schedule is a **clock**: it decides at which $t$
# each SNR comes, and so how much time training and sampling spend there. At equal SNR, all three give the same noisy
# picture.
#
# What does noise destroy first? Here the pictures are split into details of five sizes. Each line ends with the
# timestep from which the noise is larger than the detail.

# %% tags=["hide-input"]
everything = corpus.batch(range(len(corpus)))  # [1280 3 32 32]
level, k = everything, 1
snr = schedule.snr(torch.arange(T))
while k < 32:
    # A square of 2k × 2k pixels has four quarters: how much do they differ from the mean of the square?
    coarser = torch.nn.functional.avg_pool2d(level, 2)  # the mean of each square, [1280 3 16/k 16/k]
    detail = level - coarser.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    variance = detail.square().mean()
    # The mean over k² pixels of noise has the variance 1/k². Subtracting the mean of the square leaves ¾ of it.
    gone = (snr * variance / (0.75 / k**2) < 1).int().argmax()
    print(f"details of {k:2} × {k:2} pixels: std {variance.sqrt():.2f}, below the noise from t = {gone}")
    level, k = coarser, 2 * k

# %% [markdown]
# Over a large area the noise averages out, so large details survive longer, up to 8 pixels in these pictures. Noise
# takes the texture first and the outline later. A model that removes noise works in the opposite order: it
# decides on the large shapes first.
#
# ## Is the end really pure noise?
#
# Not quite. Under Stable Diffusion's schedule, 7% of the picture (the factor 0.068) is still in the last $x_t$. How far
# is that from pure noise, from which drawing starts? Such distances are measured by the **Kullback-Leibler divergence**
# ([KL](../docs/glossary.md)), $D_{KL}(q\,\|\,p) = \mathbb E_q[\log q - \log p]$. It is 0 if two distributions are the
# same, and it grows as they become easier to tell apart. With logarithms to the base 2 it is measured in bits.

# %% tags=["hide-input"]
table = [f"{'':14}   √ᾱ_T     KL per number    KL per picture"]
for name, s in schedules.items():
    a = s.alphas_cumprod[-1].double()
    # KL of N(√ᾱ x_0, 1-ᾱ) from N(0, 1): ½ (ᾱ x_0² - ᾱ - log(1-ᾱ)), called L_T in DDPM, eq. 5
    L_T = (a * everything.square().mean() - a - torch.log1p(-a)) / 2
    bits = L_T / torch.log(torch.tensor(2.0))
    table.append(f"{name:14}  {a.sqrt():.5f}   {bits:.1e} bits     {bits * x_0[0].numel():.5f} bits")
print("\n".join(table))

# %% [markdown]
# Two thousandths of a bit for each number look like nothing, but 3,072 of them make 7 bits. A network can use them, and
# this is why Stable Diffusion hardly ever draws very dark or very bright pictures
# ([Lin et al. 2023](https://arxiv.org/abs/2305.08891)). The optional section *The leak at the end* shows how.
#
# ## If you know the noise, you know the picture
#
# $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$ is one equation. Suppose that you know $x_t$ and
# the noise in it. Then only $x_0$ is unknown, and you can solve for it. So it is enough to find the noise, which is
# what the network of the next notebook learns.

# %% [markdown]
# ### Write it yourself: `predict_start_from_noise`
#
# essential · about 10 minutes
#
# Solve the formula of `q_sample` for $x_0$. Every sampler does this in each step, with the network's estimate of the
# noise.

# %% tags=["exercise"]
def predict_start_from_noise(
    x_t: Float[Tensor, "b c h w"],
    t: Int[Tensor, "b"],
    noise: Float[Tensor, "b c h w"],
    alphas_cumprod: Float[Tensor, "T"],
) -> Float[Tensor, "b c h w"]:
    """The picture x_0 that x_t was made from, if `noise` is the noise in it: q_sample, solved for x_0. (DDPM, eq. 15)
    """
    raise NotImplementedError  # your code here


check.predict_start_from_noise(predict_start_from_noise)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
# return (x_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
# ```
#
# </details>

# %% [markdown]
# **Predict, then run.** A network never finds the noise exactly. Below, the noise is wrong by 10% at every $t$ (random
# errors with a standard deviation of 0.1). At which $t$ is the computed picture $\hat x_0$ worst?

# %% tags=["hide-output"]
t = torch.tensor([50, 300, 600, 850, 999])
clean, noise = x_0[:1].expand(5, -1, -1, -1), torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
noise = noise.expand_as(clean)  # the same noise five times
wrong = noise + 0.1 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1))
x_t = schedule.q_sample(clean, t, noise)
x0_exact = schedule.predict_start_from_noise(x_t, t, noise)
x0_wrong = schedule.predict_start_from_noise(x_t, t, wrong)

notes = [[f"error {e:.2f}" for e in (x - clean).square().mean((1, 2, 3)).sqrt()] for x in (x0_exact, x0_wrong)]
labels = ["$x_t$", r"$\hat x_0$, from" "\nthe exact noise", r"$\hat x_0$, from" "\nwrong noise"]
viz.strip([x_t, x0_exact, x0_wrong], [f"t = {i}" for i in t.tolist()], labels, [[], *notes])

# %% [markdown]
# At large $t$. There the formula divides by $\sqrt{\bar\alpha_t}$, down to 0.068. The error of the noise is multiplied
# by $\sqrt{1-\bar\alpha_t}/\sqrt{\bar\alpha_t} = 1/\sqrt{\mathrm{SNR}}$: by 14.6 at $t = 999$. At $t = 50$ you hardly
# see the same error. So one jump from noise to picture does not work, even with a good network.
#
# ## Why the steps must be small
#
# Forwards, one jump does what a thousand steps do. Backwards it does not, because $x_0$ is not known. Take the three
# numbers from above, and suppose that all you know is that $x_{300} = 0$. Where was the walk 300, 150, 40 and 4 steps
# earlier? We simulate many walks, and keep those that arrive there.

# %% tags=["hide-input"]
torch.manual_seed(0)
n = 4_000_000 if full else 20_000
origin = toy[torch.randint(len(toy), (n,))]
t, panels, gaussians = 300, {}, {}
for back_by in (300, 150, 40, 4):
    s = t - back_by
    x_s = schedule.q_sample(origin, torch.full((n,), s), torch.randn(n))
    alpha = schedule.alphas_cumprod[t] / schedule.alphas_cumprod[s]  # α_{s+1} ⋯ α_t: those steps as one
    x_t = alpha.sqrt() * x_s + (1 - alpha).sqrt() * torch.randn(n)
    chosen = x_s[x_t.abs() < 0.02]
    title = f"{back_by} steps earlier"
    panels[title], gaussians[title] = {"where they were": chosen}, (chosen.mean().item(), chosen.var().item())
viz.histograms(panels, gaussians, "the Gaussian with their mean and variance", bins=80)

# %% [markdown]
# 300 steps earlier there are three needles: the three numbers. No Gaussian is anything like that. But a *short* way
# back ends in a bell, and a bell needs only two numbers: its mean, which a network can estimate, and its variance,
# which is nearly that of the step itself, $\beta_t$. **The thousand steps are needed for the way back.** (If you know
# $x_0$, the step back is a Gaussian, however long it is: see the optional section *One step back*.)
#
# ## The best possible estimate
#
# What is missing is an estimate of $x_0$. If the data set is small, the best one can be computed, without a network.
# Compare $x_t$ with each picture of the data set, shrunk as it would be by now. A picture that is close is a likely
# origin. The best estimate (the one with the smallest mean squared error) is the mean of all pictures, weighted by how
# likely each of them is:
#
# $$w_i = \mathrm{softmax}_i\!\left(-\frac{|x_t - \sqrt{\bar\alpha_t}\,x_i|^2}{2\,(1-\bar\alpha_t)}\right), \qquad
# \hat x_0 = \sum_i w_i\,x_i$$
#
# (This is Bayes' rule for $n$ equally likely pictures; [Karras et al. 2022](https://arxiv.org/abs/2206.00364), appendix
# B.3.)


# %%
def best_estimate(x_t, t, data):
    a = schedule.alphas_cumprod[t]
    squared_distances = (x_t[:, None] - a.sqrt() * data).flatten(2).square().sum(-1)  # [b n]
    w = torch.softmax(-squared_distances / (2 * (1 - a)), dim=1)  # [b n], each row sums to 1
    return torch.einsum("bn,nchw->bchw", w, data)  # x̂_0, [b 3 32 32]


data = everything if full else everything[:: len(everything) // 100]
exact = minisd.ExactDenoiser(data, schedule)  # the same in the package

t = torch.full((2,), 960)
x_t = schedule.q_sample(x_0[:2], t, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
assert torch.allclose(best_estimate(x_t, 960, data), exact.x0(x_t, t), atol=1e-2)  # minisd computes in float64

w = exact.posterior(x_t, t)  # [b n]
print(f"x_t {list(x_t.shape)}, weights {list(w.shape)}, x̂_0 {list(exact.x0(x_t, t).shape)}")
top = w[0].topk(6).indices  # the six pictures that weigh most, [6]
titles = ["$x_t$", r"$\hat x_0$", *(f"$w$ = {w[0, i]:.3f}" for i in top)]
viz.strip([torch.cat([x_t[:1], exact.x0(x_t, t)[:1], data[top]])], titles, ["t = 960"])

# %% [markdown]
# From left to right: a noisy fox, the best estimate, and the six pictures with the largest weights. `ExactDenoiser`
# will be our yardstick, because no network can be better on its data.
#
# Below is its estimate of the same fox at several $t$. Under each stands the number of pictures that share the weight
# ($1/\sum_i w_i^2$).

# %% tags=["hide-input"]
timesteps = [999, 900, 800, 700, 650, 600, 400, 200]
t = torch.tensor(timesteps)
noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(len(t), -1, -1, -1)
rows, labels, notes = [], [], []
for name in ("linear", "scaled_linear"):
    denoiser = minisd.ExactDenoiser(data, schedules[name])
    x_t = schedules[name].q_sample(x_0[0].expand(len(t), -1, -1, -1), t, noise)
    effective = 1 / denoiser.posterior(x_t, t).square().sum(1)
    rows += [x_t, denoiser.x0(x_t, t)]
    labels += [f"{name}\n$x_t$", r"$\hat x_0$"]
    notes += [[], [f"{k:.1f} pictures" if k < 9.95 else f"{k:.0f} pictures" for k in effective.tolist()]]
viz.strip(rows, [f"t = {t}" for t in timesteps], labels, notes)

# %% [markdown]
# Read the upper half from left to right. First the best estimate is the mean of nearly all pictures, then a blur of
# what is still possible, then one picture. **The blur is not a fault.** It is the right answer as long as many pictures
# are possible, and a trained network gives it, too. In the lower half, under Stable Diffusion's schedule, only a
# fraction of the pictures is left even at $t = 999$, because $x_t$ still contains a little of the picture.
#
# ## Drawing without a network
#
# A sampler needs only an estimate of the noise, and here is one:
# $\hat\epsilon = (x_t - \sqrt{\bar\alpha_t}\,\hat x_0)/\sqrt{1-\bar\alpha_t}$. So the exact denoiser can draw. We let
# the sampler DDIM (notebook 06) draw 96 pictures from pure noise, under the linear schedule.
#
# **Predict, then run.** How many of them are new, that is, not in the corpus?

# %% tags=["hide-output"]
linear = schedules["linear"]
draws = 96 if full else 8
x_T = torch.randn(draws, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def drawn_from(x_T, s, steps=25 if full else 5):
    return list(minisd.sampling.ddim(minisd.ExactDenoiser(data, s), x_T, s, steps=steps, spacing="trailing"))


def nearest(pictures):
    """Which picture of the corpus is nearest to each, and how far it is (root mean square)."""
    distances = torch.cdist(pictures.flatten(1).double(), data.flatten(1).double()) / pictures[0].numel() ** 0.5
    return distances.min(1).indices, distances.min(1).values


drawn = drawn_from(x_T, linear)[-1].x0
index, distance = nearest(drawn)
print(f"{draws} drawn, {len(index.unique())} different; at most {distance.max():.0e} from a picture of the corpus")
viz.trajectory(drawn_from(x_T[:2], linear, steps=50 if full else 5), pictures=(1,))

# %% [markdown]
# None. Each is a copy of a picture in the corpus. The figure shows the steps of one: a picture out of noise, and
# nothing was trained. In the row of $\hat x_0$ you can watch it decide: all pictures, then a few, then one.
#
# **Predict, then run.** Now we take all foxes out of the data. Then we show the denoiser a fox with very little noise.
# What does it answer?

# %% tags=["hide-output"]
kept = [i for i, row in enumerate(corpus.rows) if row["concept"] != "fox"]
timesteps = [600, 400, 200, 100, 50, 20, 5, 0]
t = torch.tensor(timesteps)
foxes = x_0[0].expand(len(t), -1, -1, -1)
x_t = schedule.q_sample(foxes, t, torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)).expand_as(foxes))
estimates = {
    "$x_t$": x_t,
    r"$\hat x_0$, knows foxes": minisd.ExactDenoiser(everything, schedule).x0(x_t, t),
    r"$\hat x_0$, no foxes": minisd.ExactDenoiser(everything[kept], schedule).x0(x_t, t),
}
errors = {name: (estimate - foxes).square().mean((1, 2, 3)).sqrt() for name, estimate in estimates.items()}
notes = [[f"error {error:.2f}" for error in row] for row in errors.values()]
viz.strip(list(estimates.values()), [f"t = {t}" for t in timesteps], list(estimates), notes)

# %% [markdown]
# At $t = 5$ there is hardly any noise, and a child sees the fox. The denoiser answers with the nearest picture that it
# knows. Its error (root mean square) is six times as large as if it had returned its input.
#
# **The perfect denoiser only remembers its data.** A network with the smallest possible training loss would be this
# denoiser, and could draw nothing new. A real network draws new pictures *because it is not perfect*.
#
# <details><summary>Optional: what keeps a network from being perfect?</summary>
#
# This is a matter of research. One answer: convolutions judge each part of a picture by itself and by the same rules,
# so they can combine parts of different pictures ([Kamb & Ganguli 2024](https://arxiv.org/abs/2412.20292)). But real
# networks do remember some training pictures, above all those that occur many times
# ([Carlini et al. 2023](https://arxiv.org/abs/2301.13188)).
#
# </details>
#
# ## What you know now
#
# - One step of noising shrinks by $\sqrt{1-\beta_t}$ and adds noise of variance $\beta_t$. The end is nearly
#   $\mathcal N(0, I)$.
# - All steps at once are `q_sample`. If you know the noise, you know the picture.
# - A schedule is a clock for the SNR.
# - A step back is nearly a Gaussian if it is small. Its mean needs an estimate of $x_0$.
# - The best estimate is a weighted mean of the training pictures. It can draw, but only what it has seen.
#
# **More exercises** in [`exercises/01_noising.ipynb`](exercises/01_noising.ipynb): `scaled_linear_betas` (10 minutes),
# `alphas_cumprod` (5), `q_step` (10), `snr` (5), `q_posterior_mean` (20), `q_posterior_variance` (10), `exact_x0` (25);
# after notebook 02 also `get_v` (10) and `predict_start_from_v` (15). To look something up, see
# [`docs/noising.md`](../docs/noising.md), which has the names in the CompVis source, too.
#
# **Next**: the exact denoiser needs the whole data set at every step, and only repeats it. In
# [02 · Loss](02_loss.ipynb), a network learns to estimate the noise from examples: `q_sample` makes the examples.

# %% [markdown]
# ## Optional: the jump and the walk agree
#
# For a single picture they give different results, because they draw different noise. But their **distributions**
# agree. We take one pixel, $x_0 = 0.9$, walk many copies of it through all steps, jump with as many others, and compare
# both with the Gaussian of eq. 4.

# %%
torch.manual_seed(0)
copies = 50_000 if full else 500
stops = [5, 50, 300, 999]
pixel = torch.full((copies,), 0.9)

walk, walked = pixel, {}
for t in range(T):
    walk = (1 - schedule.betas[t]).sqrt() * walk + schedule.betas[t].sqrt() * torch.randn(copies)
    if t in stops:
        walked[t] = walk

table = ["           mean                       std", "  t    walk    jump   exact      walk    jump   exact"]
panels, gaussians = {}, {}
for t in stops:
    jumped = schedule.q_sample(pixel, torch.full((copies,), t), torch.randn(copies))
    mean, variance, _ = schedule.q_mean_variance(pixel[:1], torch.tensor([t]))
    means = f"{walked[t].mean():6.3f}  {jumped.mean():6.3f}  {mean.item():6.3f}"
    table.append(f"{t:3d}  {means}    {walked[t].std():6.3f}  {jumped.std():6.3f}  {variance.sqrt().item():6.3f}")
    panels[f"t = {t}"] = {"t + 1 small steps": walked[t], "one jump": jumped}
    gaussians[f"t = {t}"] = (mean.item(), variance.item())
print("\n".join(table))
viz.histograms(panels, gaussians)

# %% [markdown]
# ## Optional: one step back
#
# Suppose that you know the picture $x_0$. Then Bayes' rule gives the exact distribution of $x_{t-1}$, and it is one
# more Gaussian:
#
# $$q(x_{t-1} \mid x_t, x_0) = \mathcal N(\tilde\mu_t,\, \tilde\beta_t I), \qquad
#   \tilde\mu_t = \frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{1-\bar\alpha_t}\,x_0
#   + \frac{\sqrt{\alpha_t}\,(1-\bar\alpha_{t-1})}{1-\bar\alpha_t}\,x_t, \qquad
#   \tilde\beta_t = \frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}\,\beta_t \qquad \text{(DDPM, eq. 6, 7)}$$
#
# Its mean is a weighted sum: a little of where the picture is, and most of where we are. (At $t = 0$,
# $\bar\alpha_{t-1}$ is 1, so $\tilde\mu_0 = x_0$ and $\tilde\beta_0 = 0$.) In the package it is `q_posterior`.
#
# **Predict, then run.** We noise the fox, and walk back with `q_posterior`, but claim that $x_0$ is the watermelon.
# Which picture comes out?

# %% tags=["hide-output"]
torch.manual_seed(0)
claimed = x_0[[0, 3]]  # [2 3 32 32]: the truth, and a lie
x = schedule.q_sample(x_0[[0, 0]], torch.tensor([T - 1, T - 1]), torch.randn(3, 32, 32).expand(2, -1, -1, -1))
shown, back = [999, 600, 400, 200, 100, 30], []
for t in reversed(range(T)):
    if t in shown:
        back.append(x)
    mean, variance, _ = schedule.q_posterior(claimed, x, torch.tensor([t, t]))
    x = mean + variance.sqrt() * torch.randn_like(x)
back = torch.stack([*back, x], dim=1)  # [2 columns 3 32 32]
print(f"largest difference between the result and what was claimed: {(x - claimed).abs().max():.1e}")
viz.strip(back, [*(f"t = {t}" for t in shown), "result"], ["claim: fox", "claim: melon"])

# %% [markdown]
# The watermelon, exactly. Each step moves towards the claimed $x_0$, and the last step lands on it. So the
# $x_0$ that you insert decides what is drawn. DDPM's sampler inserts the network's estimate $\hat x_0$ (notebook 06).
#
# A check without Bayes' rule: we send many numbers forwards from $x_0 = 1$, on a schedule of 8 large steps. Then we
# keep those that arrive at a given $x_t$, and look where they were one step before.

# %%
torch.manual_seed(0)
coarse = minisd.NoiseSchedule.linear(0.05, 0.5, timesteps=8)
t, ones = 4, torch.ones(n)
before = coarse.q_sample(ones, torch.full((n,), t - 1), torch.randn(n))  # x_{t-1}
after = (1 - coarse.betas[t]).sqrt() * before + coarse.betas[t].sqrt() * torch.randn(n)  # x_t, one step later

mean, variance, _ = coarse.q_mean_variance(ones[:1], torch.tensor([t - 1]))
panels, gaussians = {"all": {"$x_{t-1}$": before}}, {"all": (mean.item(), variance.item())}
for x_t in (-1.0, 0.5, 2.0):
    title = f"then $x_t$ = {x_t}"
    chosen = before[(after - x_t).abs() < 0.02]
    mean, variance, _ = coarse.q_posterior(ones[:1], torch.tensor([x_t]), torch.tensor([t]))
    panels[title], gaussians[title] = {"$x_{t-1}$": chosen}, (mean.item(), variance.item())
    print(f"x_t = {x_t:4.1f}: {len(chosen):6} of {n}, mean before {chosen.mean():6.3f}, exact {mean.item():6.3f}")
viz.histograms(panels, gaussians, bins=40)

# %% [markdown]
# If you know $x_t$, the bell moves, and it becomes narrower.
#
# ## Optional: a schedule is a clock
#
# **Predict, then run.** For each schedule, take the $t$ at which the SNR has a given value. How do the three noisy
# pictures differ?

# %% tags=["hide-output"]
noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
log_snrs = [4, 2, 0, -2, -4]
rows, notes = [], []
for s in schedules.values():
    t = torch.stack([(s.log_snr(torch.arange(T)) - wanted).abs().argmin() for wanted in log_snrs])  # [5]
    rows.append(s.q_sample(x_0[2].expand(5, -1, -1, -1), t, noise.expand(5, -1, -1, -1)))
    notes.append([f"t = {i}" for i in t.tolist()])
viz.strip(rows, [f"log SNR = {wanted}" for wanted in log_snrs], list(schedules), notes)

# %% [markdown]
# Hardly at all. $\bar\alpha_t$ follows from the SNR, and $x_t$ from $\bar\alpha_t$ and the noise. (The timesteps are
# whole numbers, so the SNRs are not exactly equal.)
#
# ## Optional: the leak at the end
#
# Take the mean of all 3,072 numbers of $x_T$, the last $x_t$. The noise averages out: its standard deviation falls to
# $1/\sqrt{3072} = 0.018$. What is left of the picture does not average out: its mean brightness is there, times 0.068.

# %%
torch.manual_seed(0)
t = torch.full((len(everything),), T - 1)
panels = {}
for name, s in schedules.items():
    noised = s.q_sample(everything, t, torch.randn_like(everything))
    panels[name] = {"mean of $x_T$, made from a picture": noised.mean((1, 2, 3))}
variance = 1 / x_0[0].numel()  # of the mean of d numbers from N(0, 1)
viz.histograms(panels, {name: (0.0, variance) for name in panels}, "mean of pure noise", bins=40, width=3.2)

# %% [markdown]
# Most emoji stand on white, so most of these $x_T$ can be told from pure noise by their mean alone. A model that is
# trained on them learns to **trust the mean of $x_T$**.
#
# **Predict, then run.** When drawing, $x_T$ is pure noise, and its mean is about 0. What will the pictures look like?

# %% tags=["hide-output"]
torch.manual_seed(0)
chosen = torch.randperm(len(data))[:draws]
noised = schedule.q_sample(data[chosen], torch.full((draws,), T - 1), x_T)
results = {
    "linear, from pure noise": drawn,
    "scaled_linear, from noised pictures": drawn_from(noised, schedule)[-1].x0,
    "scaled_linear, from pure noise": drawn_from(x_T, schedule)[-1].x0,
}
table = [f"mean brightness of the corpus:        {data.mean():.2f}"]
for name, pictures in results.items():
    brightness, different = pictures.mean((1, 2, 3)), len(nearest(pictures)[0].unique())
    error = brightness.std() / draws**0.5  # of the mean
    table.append(f"{name + ':':36}  {brightness.mean():.2f} ± {error:.2f}   {different} different")
print("\n".join(table))
viz.strip([pictures[:12] for pictures in results.values()], labels=[n.replace(", ", ",\n") for n in results], size=0.64)

# %% [markdown]
# Too dark. A mean of 0 is what a mid-grey picture would have left, while an emoji on white leaves about
# $0.068 \cdot 0.6 = 0.04$. So the denoiser draws darker pictures. From noised pictures (second row), the brightness is
# close to that of the corpus. No network is to blame.
#
# ## Optional: larger pictures survive longer
#
# **Predict, then run.** The same schedule and the same $t$, but pictures of 16, 32 and 64 pixels. In which size does
# the picture survive the longest?

# %% tags=["hide-output"]
torch.manual_seed(0)
probes = 96 if full else 4
times = torch.arange(T - 1, -1, -45 if full else -333)


def effective_number(pictures, s):
    """At each of `times`: how many pictures a noised one may come from (median), and how often the right one leads."""
    denoiser, effective, right = minisd.ExactDenoiser(pictures, s), [], []
    chosen = torch.randperm(len(pictures))[:probes]
    for t in times:
        x_t = s.q_sample(pictures[chosen], t.expand(probes), torch.randn(pictures[chosen].shape))
        w = denoiser.posterior(x_t, t.expand(probes))  # [probes n]
        effective.append((1 / w.square().sum(1)).median())
        right.append((w.argmax(1) == chosen).float().mean())
    return torch.stack(effective), torch.stack(right)


by_size, by_schedule, lines = {}, {}, []
for size in (16, 32, 64):
    pictures = sample(size=size)
    effective, right = effective_number(pictures.batch(range(len(pictures))), schedule)
    by_size[f"{size} pixels"] = (times, effective)
    lines.append(f"{size} pixels, t = {T - 1}: the right one of {len(pictures)} leads in {right[0]:4.0%} of the trials")
for name, s in schedules.items():
    by_schedule[name] = (times, effective_number(everything, s)[0])

print("\n".join(lines))
panels = {"by size, under scaled_linear": by_size, "by schedule, at 32 pixels": by_schedule}
viz.curves(panels, ylabel="pictures that weigh in", log=list(panels), width=4.2, height=2.8)

# %% [markdown]
# In the largest. Shrink a noisy picture to half its side: each new pixel is the mean of four, so the noise is halved,
# and the picture stays. So a noised picture of 64 pixels contains one of 32 with four times the SNR. No schedule fits
# all sizes: one more reason to diffuse small latents.
#
# ## Optional: try it
#
# - Set `beta_end=0.05` in `scaled_linear`. What becomes of the leak?
# - Put a fourth number, 1.2, into `toy`. From which $t$ on can you no longer tell it from its neighbour?
# - Draw with the exact denoiser of two pictures only, one all black and one all white. What decides which one you get?

# %%
print(f"This notebook took {time.time() - start:.0f} s.")
