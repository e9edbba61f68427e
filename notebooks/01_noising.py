# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1 · Noising: a picture dissolves
#
# A diffusion model learns to undo one particular kind of damage. This notebook is about the damage: how it is done,
# why just so, and how it could be undone by somebody who knew all pictures by heart.
#
# You will understand
#
# - what $\beta_t$, $\alpha_t$ and $\bar\alpha_t$ are, and why a picture is shrunk before noise is added;
# - how to jump to any timestep in one line, $q(x_t \mid x_0)$;
# - what a schedule decides, and what Stable Diffusion's leaves undone at its end;
# - what one step back looks like, $q(x_{t-1} \mid x_t, x_0)$, and why the steps must be small;
# - that the best denoiser of all needs no network and no training, and why nobody would want it.
#
# About 45 minutes to read; it runs in about a minute on a laptop. Nothing is trained here. The module of this stage is
# [`minisd/noising.py`](../minisd/noising.py): a few lines for each equation below.
#
# Before: [notebook 00](00_start_here.ipynb), the map of the whole. Next: [notebook 02](02_loss.ipynb), where a network
# learns to undo the damage.
#
# The papers are cited by these names: **DDPM**, [Ho et al. 2020](https://arxiv.org/abs/2006.11239); **Improved DDPM**,
# [Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672); **Variational Diffusion Models**,
# [Kingma et al. 2021](https://arxiv.org/abs/2107.00630); **EDM**,
# [Karras et al. 2022](https://arxiv.org/abs/2206.00364).
#
# To see a picture and noise mixed in your browser first, open the stop [What training
# did](../docs/play.md#tour=training) of the guided tour.

# %% tags=["parameters"]
MODE = "full"  # "smoke": every line runs, on so little that the figures mean nothing

# %%
import time

import torch

import minisd
from minisd import viz
from minisd.data import sample

full = MODE == "full"
start = time.time()

# %% [markdown]
# ## A picture is a point
#
# minisd ships with a small corpus of captioned emoji. A network sees a picture as numbers in $[-1, 1]$: $-1$ is black,
# $1$ is white. A picture of 32×32 pixels is 3,072 of them, so it is one point in a space of 3,072 dimensions. All that
# follows happens to points. The same formulas will work for latents, where Stable Diffusion uses them, and for single
# numbers, where we can plot them.

# %%
corpus = sample(size=32)
names = ["fox", "tropical fish", "rocket", "watermelon", "panda", "house", "sunflower", "guitar"]
x_0 = corpus.batch([corpus.captions.index(f"{name}, noto style") for name in names])

print(f"corpus  {len(corpus)} pictures, {corpus.images.dtype} {list(corpus.images.shape)}")
print(f"x_0     {x_0.dtype} {list(x_0.shape)}, from {x_0.min():.2f} to {x_0.max():.2f}")
viz.strip([x_0], titles=names)

# %% [markdown]
# ## The naive idea: add noise, again and again
#
# To ruin a picture, add a little Gaussian noise. Then a little more. A thousand times:
#
# $$x_t = x_{t-1} + 0.1\,\epsilon_t, \qquad \epsilon_t \sim \mathcal N(0, I)$$
#
# To be shown, each picture below is clamped to $[-1, 1]$. The number under it is the standard deviation of what is
# really there. We count as the code does, from 0: $t = 0$ is the picture after the first step, $t = 999$ the one after
# the thousandth. The clean picture is $x_0$ in the papers, and has no timestep in the code. So the papers' $t$ is our
# $t + 1$, and what they call $x_T$ and $\bar\alpha_T$, the last ones, stand at $t = 999$ here. (A sampler calls the
# noise that it begins with $x_T$ too, even if its first timestep is an earlier one, such as 981.)

# %%
torch.manual_seed(0)
shown = [0, 10, 50, 100, 250, 500, 999]

x, naive = x_0[0], [x_0[0]]
for t in range(1000):
    x = x + 0.1 * torch.randn_like(x)
    if t in shown:
        naive.append(x)

naive = torch.stack(naive)  # [columns 3 32 32]
titles = ["$x_0$", *(f"t = {t}" for t in shown)]
viz.strip([naive], titles, ["add"], notes=[[f"std {x.std():.2f}" for x in naive]])

# %% [markdown]
# It works, and it fails us twice.
#
# 1. **It grows.** Each step adds 0.01 to the variance, and nothing takes any away. A network would have to read
#    numbers of size 0.7 at one end and 3 at the other.
# 2. **It arrives nowhere.** To draw a picture, we want to start from noise that *no* picture was needed to make. But
#    the picture is still in there at full strength, under noise whose size depends on how long we went on.
#
# (One can live with that: the "variance-exploding" models do. EDM divides by the size before the network looks, which
# comes to the same as what follows. Stable Diffusion follows DDPM, which never lets the numbers grow.)
#
# The remedy: **shrink first, then add**, and shrink just so much that the noise makes up for the variance that is lost.
#
# ## One small step
#
# $$q(x_t \mid x_{t-1}) = \mathcal N\!\big(\sqrt{1-\beta_t}\;x_{t-1},\; \beta_t I\big) \qquad \text{(DDPM, eq. 2)}$$
#
# $\beta_t$ is the variance of the noise that step $t$ adds. Multiplying by $\sqrt{1-\beta_t}$ leaves the share
# $1-\beta_t$ of the variance that was there. If that was 1, it is $(1-\beta_t) + \beta_t = 1$ again.
#
# The thousand $\beta_t$ together are the **schedule**. Here is Stable Diffusion's.

# %%
schedule = minisd.NoiseSchedule.scaled_linear(0.00085, 0.012, timesteps=1000)
T = schedule.timesteps
print(schedule)
print(f"betas   {list(schedule.betas.shape)}, from {schedule.betas[0]:.5f} to {schedule.betas[-1]:.5f}")

# %% [markdown]
# **Predict, then run.** No step takes away more than 1.2% of the variance. How much of the picture is left after a
# thousand of them?
#
# <details><summary>Answer</summary>
#
# Next to nothing. The mean $\beta_t$ is about 0.00535, and $0.99465^{1000} \approx 0.0047$: small losses, one upon
# the other, multiply. In amplitude, that is $\sqrt{0.0047} \approx 0.07$ of the picture. Keep this number in
# mind, it comes back.
#
# </details>

# %%
torch.manual_seed(0)
x, kept = x_0[0], [x_0[0]]
for t in range(T):
    beta, epsilon = schedule.betas[t], torch.randn_like(x)
    # x_t = √(1-β_t) x_{t-1} + √β_t ε                                                           (DDPM, eq. 2)
    x = (1 - beta).sqrt() * x + beta.sqrt() * epsilon
    if t in shown:
        kept.append(x)

kept = torch.stack(kept)
notes = [[f"std {x.std():.2f}" for x in row] for row in (naive, kept)]
viz.strip([naive, kept], titles, ["add", "shrink, add"], notes)

# %% [markdown]
# Now the end is a known place: mean about 0, standard deviation about 1, whatever picture we came from.
#
# The picture itself starts below 1, and rises to it. "Variance-preserving" is exact for data of variance 1 only. Our
# pixels have less; latents are scaled to have just that (the famous 0.18215, notebook 04).
#
# ## All steps in one jump
#
# Training needs pictures at random timesteps, millions of them. Nobody walks a thousand steps for each. Put two steps
# into one another, with $\alpha_t = 1 - \beta_t$:
#
# $$x_t = \sqrt{\alpha_t}\,
#   \big(\underbrace{\sqrt{\alpha_{t-1}}\,x_{t-2} + \sqrt{1-\alpha_{t-1}}\;\epsilon_{t-1}}_{x_{t-1}}\big)
#   + \sqrt{1-\alpha_t}\;\epsilon_t$$
#
# There are two Gaussian noises in it. Their sum is Gaussian again (this is why the noise is Gaussian and not, say,
# uniform), and the variances add up:
# $\alpha_t(1-\alpha_{t-1}) + (1-\alpha_t) = 1 - \alpha_t\alpha_{t-1}$. So two steps look like one step with
# $\alpha_t\alpha_{t-1}$ in place of $\alpha_t$, and so do three, and so do all:
#
# $$q(x_t \mid x_0) = \mathcal N\!\big(\sqrt{\bar\alpha_t}\;x_0,\; (1-\bar\alpha_t) I\big),
#   \qquad \bar\alpha_t = \prod_{s \le t} \alpha_s \qquad \text{(DDPM, eq. 4)}$$
#
# No other formula is used as often in this project. It is two lines.


# %%
def q_sample(x_0, t, noise):
    alpha_bar = torch.cumprod(1 - schedule.betas, dim=0)[t][:, None, None, None]  # ᾱ_t, [b 1 1 1]
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise  # x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε


t = torch.tensor([0, 20, 60, 120, 250, 400, 600, 999])  # [b]: each picture of a batch has a timestep of its own
noise = torch.randn_like(x_0)
x_t = q_sample(x_0, t, noise)
assert torch.allclose(x_t, schedule.q_sample(x_0, t, noise), atol=1e-4)  # minisd computes ᾱ in float64

print(f"x_0 {list(x_0.shape)}, t {list(t.shape)}, noise {list(noise.shape)}  ->  x_t {list(x_t.shape)}")
titles = [f"t = {i}" for i in t.tolist()]
viz.strip([x_0, noise, x_t], titles, ["$x_0$", r"$\epsilon$", "$x_t$"])

# %% [markdown]
# **Predict.** Two programs are wrong, and neither stops with an error. One has forgotten the roots: its factors are
# $\bar\alpha_t$ and $1-\bar\alpha_t$. The other leaves out `[:, None, None, None]`, and its batch happens to have
# 32 pictures of 32×32 pixels. What do their $x_t$ look like?
#
# <details><summary>Answer</summary>
#
# Variances add up, standard deviations do not. Without the roots the variance is $\bar\alpha_t^2 + (1-\bar\alpha_t)^2$
# (if that of the data is 1): 1 at both ends, and only ½ in the middle. Such an $x_t$ is too dim, and holds less noise
# than a sampler believes. In the second, `[32]` meets `[32 3 32 32]` and is spread along the *last* axis: every
# picture gets its first column of pixels at the first picture's $t$, its second at the second's, and so on: stripes.
# With any other number of pictures (but 1) there would have been an error. Test with sizes that all differ.
#
# </details>
#
# Is the jump really the same as the walk? Not for a single picture: they draw different noise. What must agree is the
# **distribution**. Take one pixel, $x_0 = 0.9$. Walk many copies of it through all steps, jump with as many others, and
# compare both with the Gaussian of eq. 4.

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
# The bell starts as a needle at 0.9, gets wider, and slides towards 0.
#
# ## The whole process, on a line
#
# A picture is a point, and a data set is a cloud of points. With numbers instead of pictures, we can see all of
# it at once. Let the data set be three numbers. In grey: the density of $q(x_t)$ at every $t$, a sum of three
# bells. In colour: two walks from each of the numbers.

# %%
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
# Three things to see.
#
# - Early on, $x_t$ tells from which number it came. Later the bells overlap, and it does not.
# - The two numbers that are close to each other melt together first. Noise wipes out **small differences before large
#   ones**.
# - At the end there is one bell, $\mathcal N(0, 1)$. Nearly.
#
# Does the second hold for pictures? Cut them into squares of $2k \times 2k$ pixels, and ask how much the four quarters
# of a square differ from its mean. For $k = 1$ this is the finest texture, for $k = 16$ whether the picture is
# brighter on the left or at the top. In the mean over $k^2$ pixels most of the noise cancels: its variance is $1/k^2$
# of that of a pixel, and three quarters of this are left once the mean of the whole square is subtracted.

# %%
level, k = corpus.batch(range(len(corpus))), 1  # [1280 3 32 32]
snr = schedule.snr(torch.arange(T))
while k < 32:
    coarser = torch.nn.functional.avg_pool2d(level, 2)  # the mean of each square, [1280 3 16/k 16/k]
    detail = level - coarser.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    variance = detail.square().mean()
    gone = (snr * variance / (0.75 / k**2) < 1).int().argmax()  # 0.75 / k²: the variance if it were pure noise
    print(f"quarters of {k:2} × {k:2} pixels: std {variance.sqrt():.2f}, drowned in noise from t = {gone}")
    level, k = coarser, 2 * k

# %% [markdown]
# The differences themselves are of much the same size at all scales, 0.15 to 0.29. But a large square has little noise.
# So noise takes the texture first, then the outline, and at last what is dark and what is light.
#
# ## Which schedule?
#
# Three are in use.
#
# - **linear**, DDPM: $\beta$ grows linearly from 0.0001 to 0.02.
# - **scaled_linear**, Stable Diffusion: $\sqrt\beta$ grows linearly, so that $\beta$ goes from 0.00085 to 0.012.
# - **cosine**, Improved DDPM: $\bar\alpha_t$ falls like a squared cosine, and $\beta_t$ is what that takes (eq. 17).
#
# Looking at $\beta$, one would hardly guess what they do. The **signal-to-noise ratio** tells:
#
# $$\mathrm{SNR}(t) = \frac{\bar\alpha_t}{1-\bar\alpha_t} \qquad \text{(Variational Diffusion Models, eq. 2)}$$

# %%
schedules = {
    "scaled_linear": minisd.NoiseSchedule.scaled_linear(),
    "linear": minisd.NoiseSchedule.linear(),
    "cosine": minisd.NoiseSchedule.cosine(),
}
for name, s in schedules.items():
    half = (s.alphas_cumprod < 0.5).int().argmax()
    print(f"{name:14} more noise than signal from t = {half}; at the end, ᾱ_T = {s.alphas_cumprod[-1]:.2g}")
viz.schedule_curves(schedules)

# %%
viz.noising_strip(x_0[1:2], schedules, [99, 199, 299, 399, 599, 799, 999])

# %% [markdown]
# One noise serves the whole figure, so that only the amounts differ. DDPM's linear schedule is done with these pictures
# early, and spends nearly half of its time on what looks like noise anyway. The cosine schedule was made to destroy
# information more slowly (Improved DDPM, section 3.2). Stable Diffusion's is in between, and it stops early, as we
# shall see.
#
# **Predict, then run.** For each schedule, take the $t$ at which the SNR has a given value. How do the three noisy
# pictures differ?
#
# <details><summary>Answer</summary>
#
# Hardly at all. $\bar\alpha_t$ follows from the SNR, and $x_t$ from $\bar\alpha_t$ and the noise. Only whole timesteps
# leave a little rounding. A schedule is a **clock**: it decides when each amount of noise comes, and so how much time
# training and sampling spend on it. It does not decide what there is to see.
#
# </details>

# %%
noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
log_snrs = [4, 2, 0, -2, -4]
rows, notes = [], []
for s in schedules.values():
    t = torch.stack([(s.log_snr(torch.arange(T)) - wanted).abs().argmin() for wanted in log_snrs])  # [5]
    rows.append(s.q_sample(x_0[2].expand(5, -1, -1, -1), t, noise.expand(5, -1, -1, -1)))
    notes.append([f"t = {i}" for i in t.tolist()])
viz.strip(rows, [f"log SNR = {wanted}" for wanted in log_snrs], list(schedules), notes)

# %% [markdown]
# ## Is the end really pure noise?
#
# Drawing starts from $\mathcal N(0, I)$; training ends at $q(x_T \mid x_0)$. The two should be the same. But
# under Stable Diffusion's schedule,
#
# $$x_T = \underbrace{\sqrt{\bar\alpha_T}}_{0.068}\,x_0 + \underbrace{\sqrt{1-\bar\alpha_T}}_{0.998}\,\epsilon$$
#
# and 7% of the picture is still there. How far one Gaussian is from another is measured by the Kullback-Leibler
# divergence (notebook 02 explains it). Here it is called $L_T$ (DDPM, eq. 5), and for each dimension it is
# $\tfrac12\big(\bar\alpha_T\,x_0^2 - \bar\alpha_T - \log(1-\bar\alpha_T)\big)$; divided by $\log 2$, it is in bits.

# %%
everything = corpus.batch(range(len(corpus)))  # [n 3 32 32]
table = [f"{'':14}   √ᾱ_T     L_T per dimension    per picture"]
for name, s in schedules.items():
    a = s.alphas_cumprod[-1].double()
    L_T = (a * everything.square().mean() - a - torch.log1p(-a)) / 2
    bits = L_T / torch.log(torch.tensor(2.0))
    table.append(f"{name:14}  {a.sqrt():.5f}   {bits:.1e} bits         {bits * x_0[0].numel():.5f} bits")
print("\n".join(table))

# %% [markdown]
# Two thousandths of a bit for each number look like nothing. But there are 3,072 numbers, and that makes 7 bits.
# Average them all: the noise averages out, and its standard deviation falls to $1/\sqrt{3072} = 0.018$. The leak does
# not. The mean brightness of the picture is still there, times 0.068. (DDPM chose its schedule so that this would not
# happen: $L_T \approx 10^{-5}$ bits per dimension, says section 4.)

# %%
torch.manual_seed(0)
t = torch.full((len(everything),), T - 1)
panels = {}
for name, s in schedules.items():
    x_T = s.q_sample(everything, t, torch.randn_like(everything))
    panels[name] = {"mean of $x_T$, made from a picture": x_T.mean((1, 2, 3))}
variance = 1 / x_0[0].numel()  # of the mean of d numbers from N(0, 1)
viz.histograms(panels, {name: (0.0, variance) for name in panels}, "mean of pure noise", bins=40, width=3.2)

# %% [markdown]
# Under Stable Diffusion's schedule, most of the emoji (they stand on white) can be told from pure noise by their mean
# alone. A network that is trained on it learns to **trust the mean of $x_T$**. When drawing, it is
# given pure noise, with a mean of about 0, and takes that for a picture of middling brightness. Lin et al. (2023,
# ["Common Diffusion Noise Schedules and Sample Steps are Flawed"](https://arxiv.org/abs/2305.08891)) found that
# Stable Diffusion hardly draws anything very bright or very dark, and that this is why. We shall catch it in the act
# further down, with no network at all.
#
# ## One step back, if you know where you came from
#
# Forwards is easy. To go back from $x_t$ to $x_{t-1}$, one would have to know the picture. Suppose that
# somebody tells us $x_0$. Then Bayes' rule makes of the Gaussians above one more:
#
# $$q(x_{t-1} \mid x_t, x_0) = \mathcal N(\tilde\mu_t,\, \tilde\beta_t I) \qquad \text{(DDPM, eq. 6, 7)}$$
# $$\tilde\mu_t = \frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{1-\bar\alpha_t}\,x_0
#   + \frac{\sqrt{\alpha_t}\,(1-\bar\alpha_{t-1})}{1-\bar\alpha_t}\,x_t,
# \qquad \tilde\beta_t = \frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}\,\beta_t$$
#
# A mixture of two: a little of where the picture is, most of where we are. (At our $t = 0$, the step before is the
# clean picture: $\bar\alpha_{t-1}$ is 1 there. So $\tilde\beta_0 = 0$, and $\tilde\mu_0 = x_0$.) Check it without
# Bayes, by counting.
# Send many numbers from $x_0 = 1$ forwards, on a coarse schedule of 8 large steps, so that there is something
# to see. Then keep only those that arrived at a given $x_t$, and look where they had been one step before.

# %%
torch.manual_seed(0)
coarse = minisd.NoiseSchedule.linear(0.05, 0.5, timesteps=8)
t, n = 4, 4_000_000 if full else 20_000
ones = torch.ones(n)
before = coarse.q_sample(ones, torch.full((n,), t - 1), torch.randn(n))  # x_{t-1}
after = (1 - coarse.betas[t]).sqrt() * before + coarse.betas[t].sqrt() * torch.randn(n)  # x_t, one step later

mean, variance, _ = coarse.q_mean_variance(ones[:1], torch.tensor([t - 1]))
panels, gaussians = {"all": {"$x_{t-1}$": before}}, {"all": (mean.item(), variance.item())}
for x_t in (-1.0, 0.5, 2.0):
    title = f"those that went on to $x_t$ = {x_t}"
    chosen = before[(after - x_t).abs() < 0.02]
    mean, variance, _ = coarse.q_posterior(ones[:1], torch.tensor([x_t]), torch.tensor([t]))
    panels[title], gaussians[title] = {"$x_{t-1}$": chosen}, (mean.item(), variance.item())
    print(f"x_t = {x_t:4.1f}: {len(chosen):6} of {n}, mean before {chosen.mean():6.3f}, exact {mean.item():6.3f}")
viz.histograms(panels, gaussians, bins=40)

# %% [markdown]
# Knowing $x_t$ moves the bell and narrows it.
#
# **Predict, then run.** Noise the fox to $x_T$. Then walk back, step by step, with `q_posterior`, but say that
# $x_0$ was the watermelon. Which picture comes out?
#
# <details><summary>Answer</summary>
#
# The watermelon, exactly. Each step pulls towards the $x_0$ that it is told, and the last one lands on it
# ($\tilde\beta = 0$). Of where the walk began, nothing is left. All that is drawn comes from what the walker is
# told about $x_0$. In a diffusion model, the one who tells is the network: it puts a guess $\hat x_0(x_t, t)$
# into this formula. That is DDPM (notebook 06).
#
# </details>

# %%
torch.manual_seed(0)
told = x_0[[0, 3]]  # [2 3 32 32]: the truth, and a lie
x = schedule.q_sample(x_0[[0, 0]], torch.tensor([T - 1, T - 1]), torch.randn(3, 32, 32).expand(2, -1, -1, -1))
shown, back = [999, 600, 400, 200, 100, 30], []
for t in reversed(range(T)):
    if t in shown:
        back.append(x)
    mean, variance, _ = schedule.q_posterior(told, x, torch.tensor([t, t]))
    x = mean + variance.sqrt() * torch.randn_like(x)
back = torch.stack([*back, x], dim=1)  # [2 columns 3 32 32]
print(f"largest difference from what was told: {(x - told).abs().max():.1e}")
viz.strip(back, [*(f"t = {t}" for t in shown), "result"], ["told: fox", "told: melon"])

# %% [markdown]
# ## Why the steps must be small
#
# And if nobody tells us $x_0$? Forwards, one jump does what a thousand steps do. Why not go back in one jump, too? Let
# us count again, now with the three numbers of the toy, and with $x_t$ as all that is known. We keep the walks that
# come by $x_{300} = 0$, and look where they were 300, 150, 40 and 4 steps earlier.

# %%
torch.manual_seed(0)
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
# 300 steps back, three needles: the three numbers. No Gaussian is anything like it. But a *short* way back ends in a
# bell, and two numbers say all about it, mean and variance. This is what a network can give. (That small steps back
# have the form of the steps forwards is what DDPM builds on, after Sohl-Dickstein et al. 2015.) So the thousand steps
# are not for the way there. They are for the way back.
#
# ## The best possible guess
#
# The mean of that bell follows from a guess at $x_0$, as in `q_posterior`. What is the best guess? If the data are $n$
# pictures, each as likely as the next, then nothing need be learned. Bayes' rule says how probable it is that $x_t$ was
# made from picture $x_i$, and the mean under these probabilities is the guess with the smallest squared error:
#
# $$w_i = \mathrm{softmax}_i\!\left(-\frac{|x_t - \sqrt{\bar\alpha_t}\,x_i|^2}{2\,(1-\bar\alpha_t)}\right), \qquad
# \hat x_0 = \sum_i w_i\,x_i \qquad \text{(EDM, appendix B.3)}$$
#
# How far is $x_t$ from each picture, shrunk as that would be by now, in units of the noise? Then a softmax. (A close
# relative of attention, by the way: the query is $x_t$, keys and values are the data.)


# %%
def best_guess(x_t, t, data):
    a = schedule.alphas_cumprod[t]
    squared_distances = (x_t[:, None] - a.sqrt() * data).flatten(2).square().sum(-1)  # [b n]
    w = torch.softmax(-squared_distances / (2 * (1 - a)), dim=1)  # [b n], each row sums to 1
    return torch.einsum("bn,nchw->bchw", w, data)  # x̂_0, [b 3 32 32]


data = everything if full else everything[:: len(everything) // 100]
exact = minisd.ExactDenoiser(data, schedule)

t = torch.full((2,), 960)
x_t = schedule.q_sample(x_0[:2], t, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
assert torch.allclose(best_guess(x_t, 960, data), exact.x0(x_t, t), atol=1e-2)  # minisd computes in float64

w = exact.posterior(x_t, t)  # [b n]
print(f"x_t {list(x_t.shape)}, weights {list(w.shape)}, x̂_0 {list(exact.x0(x_t, t).shape)}")
top = w[0].topk(6).indices  # the six pictures that weigh most, [6]
titles = ["$x_t$", r"$\hat x_0$", *(f"$w$ = {w[0, i]:.3f}" for i in top)]
viz.strip([torch.cat([x_t[:1], exact.x0(x_t, t)[:1], data[top]])], titles, ["t = 960"])

# %% [markdown]
# From left to right: what the denoiser is given (a noised fox), its answer, and the six pictures that weigh most in it.
#
# How many pictures weigh in? If $k$ of them shared the weight equally, $1/\sum_i w_i^2$ would be $k$. So take
# that as the **effective number** of pictures. Below, it stands under each answer.

# %%
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
# Read the upper half from left to right. At first the best guess is the mean of everything. Then it is a blur
# of what is still possible. Then one picture. The blur is not a flaw of the denoiser: it is the right answer to
# the question that it was asked, and a trained network will show the same blur (notebooks 02 and 06).
#
# Where the denoiser is already sure, you and I still see nothing but noise. Its task is easier than ours. It
# need not see a fox, only tell some 1,300 known points apart, and each of 3,072 numbers helps.
#
# Now compare the first columns. Under Stable Diffusion's schedule there is a shortlist at the very last timestep, where
# nothing should be known. That is the leak.
#
# **Predict, then run.** The same schedule, the same $t$, but pictures of 16, 32 and 64 pixels. In which size does the
# picture survive the longest?
#
# <details><summary>Answer</summary>
#
# In the largest. Shrink a noisy picture by 2: each new pixel is the mean of four, so that the noise is halved
# while the picture stays. A noised picture of 64 pixels therefore contains one of 32, with 4 times the SNR. At
# 64 pixels the denoiser names the right picture even at $t = 999$ in about half of the trials. There is no
# schedule for all sizes, and this is one more reason to diffuse small latents rather than large pictures.
#
# </details>

# %%
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
# ## Drawing without a network
#
# A sampler asks one thing of a model: which noise is in $x_t$? The exact denoiser can answer that,
# $\epsilon = (x_t - \sqrt{\bar\alpha_t}\,\hat x_0)/\sqrt{1-\bar\alpha_t}$. So it can draw. How samplers work is the
# matter of notebook 06; here we only watch two of them.
#
# First on the line. DDPM goes back in small random steps, DDIM without any randomness. Both start from
# $\mathcal N(0, 1)$, and both end in the data.

# %%
torch.manual_seed(1)
line = minisd.ExactDenoiser(toy, schedule)
x_T = torch.erfinv(torch.linspace(-0.96, 0.96, 9)) * 2**0.5  # 9 points, spread as N(0, 1) is
panels = {}
for name, sampler in [("DDPM", minisd.sampling.ddpm), ("DDIM", minisd.sampling.ddim)]:
    steps = list(sampler(line, x_T, schedule, T if full else 20))
    panels[name] = ([step.t for step in steps], torch.stack([step.x_t for step in steps]))
viz.density_over_time(toy, schedule, panels)

# %% [markdown]
# Read them from right to left. A path's colour tells where it ends.
#
# Now the same in 3,072 dimensions: DDIM, 50 steps, from pure noise. Let us take DDPM's linear schedule, which leaks a
# hundred times less.

# %%
linear = schedules["linear"]
draws = 96 if full else 8
x_T = torch.randn(draws, 3, 32, 32, generator=torch.Generator().manual_seed(0))

steps = list(minisd.sampling.ddim(minisd.ExactDenoiser(data, linear), x_T[:2], linear, steps=50 if full else 5))
print(f"{len(steps)} steps; step.x_t {list(steps[0].x_t.shape)}, step.x0 {list(steps[0].x0.shape)}")
viz.trajectory(steps, pictures=(1,))

# %% [markdown]
# A picture out of noise, and nothing was trained. In $\hat x_0$ one can watch the decision: everything, a shortlist,
# one picture. From there on, it is only cleaning.
#
# Are they *new* pictures? Draw more, and look up the nearest of the corpus for each.


# %%
def draw(x_T, s):
    *_, last = minisd.sampling.ddim(minisd.ExactDenoiser(data, s), x_T, s, steps=25 if full else 5, spacing="trailing")
    return last.x0


def nearest(pictures):
    """Which picture of the corpus is nearest to each, and how far it is (root mean square)."""
    distances = torch.cdist(pictures.flatten(1).double(), data.flatten(1).double()) / pictures[0].numel() ** 0.5
    return distances.min(1).indices, distances.min(1).values


drawn = draw(x_T, linear)
index, distance = nearest(drawn)
print(f"{draws} drawn, {len(index.unique())} different; at most {distance.max():.0e} from a picture of the corpus")
viz.strip(drawn[:28].unflatten(0, (2, 14)) if full else [drawn], size=0.64)

# %% [markdown]
# Not one of them is new.
#
# **Predict, then run.** Now with Stable Diffusion's schedule. What will the pictures look like, if they start from pure
# noise, where this schedule would have left 7% of a picture?
#
# <details><summary>Answer</summary>
#
# Too dark. The emoji mostly stand on white, and their $x_T$ have a mean of about $0.068 \cdot 0.6 = 0.04$. Pure
# noise has a mean of 0, as only the $x_T$ of mid-grey pictures would. The denoiser does its sums right, and
# draws what fits. Start from honest $x_T$ instead, made from pictures, and all is well.
#
# </details>

# %%
torch.manual_seed(0)
chosen = torch.randperm(len(data))[:draws]
noised = schedule.q_sample(data[chosen], torch.full((draws,), T - 1), x_T)
results = {
    "linear, from pure noise": drawn,
    "scaled_linear, from noised pictures": draw(noised, schedule),
    "scaled_linear, from pure noise": draw(x_T, schedule),
}
table = [f"mean brightness of the corpus:        {data.mean():.2f}"]
for name, pictures in results.items():
    brightness, different = pictures.mean((1, 2, 3)), len(nearest(pictures)[0].unique())
    error = brightness.std() / draws**0.5  # of the mean
    table.append(f"{name + ':':36}  {brightness.mean():.2f} ± {error:.2f}   {different} different")
print("\n".join(table))
viz.strip([pictures[:12] for pictures in results.values()], labels=[n.replace(", ", ",\n") for n in results], size=0.64)

# %% [markdown]
# The leak, caught in the act, and no network to blame for it. (The first two rows are as bright as the corpus, but for
# what 96 draws leave to chance.)
#
# ## The lesson
#
# One last experiment. Take all foxes out of the corpus. Noise the fox *only a little*, and ask the denoiser
# that never saw one.

# %%
kept = [i for i, row in enumerate(corpus.rows) if row["concept"] != "fox"]
timesteps = [600, 400, 200, 100, 50, 20, 5, 0]
t = torch.tensor(timesteps)
fox = x_0[0].expand(len(t), -1, -1, -1)
x_t = schedule.q_sample(fox, t, torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)).expand_as(fox))
guesses = {
    "$x_t$": x_t,
    r"$\hat x_0$, knows foxes": minisd.ExactDenoiser(everything, schedule).x0(x_t, t),
    r"$\hat x_0$, no foxes": minisd.ExactDenoiser(everything[kept], schedule).x0(x_t, t),
}
errors = {name: (guess - fox).square().mean((1, 2, 3)).sqrt() for name, guess in guesses.items()}  # [columns] each
notes = [[f"error {error:.2f}" for error in row] for row in errors.values()]
viz.strip(list(guesses.values()), [f"t = {t}" for t in timesteps], list(guesses), notes)

# %% [markdown]
# (Error: the root mean square of the difference from the fox.)
#
# At $t = 5$ there is hardly any noise. A child can see the fox. The best possible denoiser *for its data* sees
# the nearest thing that it knows. Its error would be far smaller if it returned what it was given.
#
# **The exact optimum only recalls.** Whoever minimises the training loss perfectly has learned the training set by
# heart, and can draw nothing else. So a real network draws new things *because it is not exact*. What keeps it from
# being exact is a matter of research. One answer: it is built from convolutions, which judge each corner of a picture
# by itself and by the same rules, so that it can put together corners of different pictures (Kamb & Ganguli 2024,
# ["An analytic theory of creativity in convolutional diffusion models"](https://arxiv.org/abs/2412.20292)). What it
# lacks to the optimum is what we want from it. And real networks do recall some of their training pictures, above all
# those that the training set contains many times (Carlini et al. 2023,
# ["Extracting Training Data from Diffusion Models"](https://arxiv.org/abs/2301.13188)).
#
# The exact denoiser stays useful all the same. It runs every sampler before there is a network, and it tells
# the tests of this project what the right answer is.

# %%
print(f"This notebook took {time.time() - start:.0f} s.")

# %% [markdown]
# ## Recap
#
# - One step: shrink by $\sqrt{1-\beta_t}$, add noise of variance $\beta_t$. The numbers keep their size, and end in
#   $\mathcal N(0, I)$.
# - All steps: $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$. No loop, and each picture of
#   a batch may have a $t$ of its own.
# - A schedule is a clock for the signal-to-noise ratio. Stable Diffusion's stops at
#   $\sqrt{\bar\alpha_T} = 0.068$: a leak.
# - Whoever knows $x_0$ can step back exactly. A model puts a guess in its place. That its steps may be Gaussians, it
#   owes to their being small.
# - The best guess is a weighted mean of the training pictures. It can draw, but only what it has seen.
#
# ## In the CompVis source
#
# `ddpm.py` stands in `ldm/models/diffusion/`, `util.py` in `ldm/modules/diffusionmodules/`.
#
# | here | there | file |
# |---|---|---|
# | `NoiseSchedule(betas)` | `DDPM.register_schedule` | `ddpm.py` |
# | `NoiseSchedule.scaled_linear` | `make_beta_schedule("linear", …)`: "linear" means $\sqrt\beta$ | `util.py` |
# | `NoiseSchedule.linear` | `make_beta_schedule("sqrt_linear", …)` | `util.py` |
# | `NoiseSchedule.cosine` | `make_beta_schedule("cosine", …)` | `util.py` |
# | `extract_into_tensor` | `extract_into_tensor` | `util.py` |
# | `q_sample(x_0, t, noise)` | `DDPM.q_sample(x_start, t, noise)` | `ddpm.py` |
# | `q_mean_variance`, `q_posterior` | `DDPM.q_mean_variance`, `DDPM.q_posterior` | `ddpm.py` |
# | `predict_start_from_noise` | `DDPM.predict_start_from_noise` | `ddpm.py` |
# | `sampling.ddim` | `DDIMSampler` | `ddim.py`, beside `ddpm.py` |
# | `ExactDenoiser` | has no counterpart | |
#
# ## Try it
#
# - Set `beta_end=0.05` in `scaled_linear`. What becomes of the leak, and of the time that is spent on pictures that one
#   can still recognise?
# - Put a fourth number, 1.2, into `toy`. From which $t$ on can you no longer tell it from its neighbour?
# - Draw with the exact denoiser of two pictures only, one all black and one all white. What decides which one you get?
# - Exercises: [`exercises/01_noising.ipynb`](exercises/01_noising.ipynb), where you write `q_step`, `q_sample`,
#   `q_posterior_mean`, `exact_x0` and more from their equations, and are told which mistake it is.
#
# Before: [00 · Start here](00_start_here.ipynb). Next: [02 · Loss](02_loss.ipynb), how to *learn* a guess at the noise,
# and why the loss is so simple. To look something up: [`docs/noising.md`](../docs/noising.md).
