# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2 · Loss: guess the noise
#
# A diffusion model is trained with one line: add noise to a picture, ask the network which noise it was, square the
# error. This notebook is about that line: why this question and no other, and what the number that it prints means.
#
# You will understand
#
# - why a network that is asked for a picture answers with grey;
# - how the bound on the likelihood becomes $\|\epsilon-\epsilon_\theta\|^2$, what is dropped on the way, and why;
# - algorithm 1 of DDPM, line by line, on points that we can see;
# - why $\epsilon$, $v$ and $x_0$ are one answer in three forms, and where each is hard;
# - which loss is normal, and why it hardly falls while the pictures get better;
# - what min-SNR weights do, and why guidance needs training without text.
#
# About an hour to read; it runs in about a minute on two cores. Small networks are trained on the way, each in seconds.
# The module of this stage is [`minisd/loss.py`](../minisd/loss.py), a hundred lines.
#
# Before: [notebook 01](01_noising.ipynb), where $\bar\alpha_t$, $q(x_t \mid x_0)$ and the exact denoiser are
# explained. Next: [notebook 03](03_unet.ipynb).
#
# The papers: **DDPM**, [Ho et al. 2020](https://arxiv.org/abs/2006.11239), whose equations are counted as there;
# [Nichol & Dhariwal 2021](https://arxiv.org/abs/2102.09672) (Improved DDPM);
# [Salimans & Ho 2022](https://arxiv.org/abs/2202.00512) ($v$); [Ho & Salimans 2022](https://arxiv.org/abs/2207.12598)
# (guidance without a classifier); [Hang et al. 2023](https://arxiv.org/abs/2303.09556) (min-SNR).
#
# To see one training example in your browser first, open the stop [What training did](../docs/play.md#tour=training) of
# the guided tour.

# %% tags=["parameters"]
MODE = "full"  # "smoke": every line runs, on so little that the figures mean nothing

# %%
import copy
import time

import torch
from torch import nn

import minisd
from minisd import viz
from minisd.data import sample

full = MODE == "full"
start = time.time()
schedule = minisd.NoiseSchedule.scaled_linear()  # Stable Diffusion's
T = schedule.timesteps

# %% [markdown]
# ## The naive idea: noise in, picture out
#
# We want a machine that turns noise into a picture. So take a network, feed it noise, and ask for a picture. Let
# us do that, with pictures of 16×16 pixels: each time fresh noise, each time a picture of the corpus as the target.
#
# **Predict, then run.** What will it draw when the training is over?
#
# <details><summary>Answer</summary>
#
# The same grey blur, whatever noise it is given. The noise says nothing about the picture that it will be compared
# with. One answer has to serve for all 1,280 pictures, and the one with the smallest squared error is their **mean**.
#
# </details>

# %%
corpus = sample(size=16)
pictures = corpus.batch(range(len(corpus)))  # [1280 3 16 16], in [-1, 1]

torch.manual_seed(0)
painter = nn.Sequential(nn.Flatten(), nn.Linear(768, 256), nn.SiLU(), nn.Linear(256, 768), nn.Unflatten(1, (3, 16, 16)))
optimizer = torch.optim.Adam(painter.parameters(), lr=1e-3)
steps = 800 if full else 3
decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)  # at the end, the learning rate is 0
for _ in range(steps):
    x_0 = pictures[torch.randint(len(pictures), (256,))]  # [256 3 16 16]
    loss = (x_0 - painter(torch.randn_like(x_0))).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    decay.step()

names = ["fox", "panda", "rocket", "sunflower", "house", "tiger"]
noise = torch.randn(len(names), 3, 16, 16)
answers = painter(noise).detach()
mean = pictures.mean(0)  # [3 16 16]
told = [torch.stack([pictures[i] for i, row in enumerate(corpus.rows) if row["concept"] == name]) for name in names]
told = torch.stack([same.mean(0) for same in told])  # [6 3 16 16]: for each name, the mean of its pictures

print(f"loss of the trained network        {loss:.3f}")
print(f"loss of answering with the mean    {(pictures - mean).square().mean():.3f}")
rows = [noise, answers, mean.expand_as(noise), told]
viz.strip(rows, names, ["noise", "its answer", "mean of all", "mean of these"], size=0.64)

# %% [markdown]
# Second row: six different noises, and nearly one answer. It is the third row, the mean of the corpus, a brownish grey;
# and the loss is what that mean would cost.
#
# The network is not to blame. Among all numbers $c$, the mean of $x$ is the one with the smallest
# $\mathbb E\,(x-c)^2$. **A squared error asks for a mean**, and many sharp pictures have a blurred mean. Keep this in
# mind: every loss below is a squared error, so every answer below is a mean.
#
# Would it help to say what is wanted? The fourth row is the best possible answer to a caption such as "a fox": the
# mean of all foxes of the corpus. There are only five of each, one in each style, and rocket and tiger are ghosts
# already. A caption of real life fits millions of pictures.
#
# ## The second naive idea: the picture before
#
# One step from noise to picture is too long: too many pictures are possible. So let us take the thousand small
# steps of notebook 01 backwards, and ask for the picture one step before: $x_t$ in, $x_{t-1}$ out. Of two
# neighbours, little is open. The table compares the best possible answer (we have the exact denoiser) with a
# network that has learned nothing at all, and hands back what it was given.

# %%
exact = minisd.ExactDenoiser(pictures, schedule)
torch.manual_seed(0)
chosen = torch.randint(len(pictures), (512 if full else 8,))
print("  t    target²     copying x_t    the best possible    to be gained")
for t in (10, 100, 400, 800):
    here, before = torch.full_like(chosen, t), torch.full_like(chosen, t - 1)
    x_prev = schedule.q_sample(pictures[chosen], before, torch.randn(len(chosen), 3, 16, 16))  # x_{t-1}
    beta = schedule.betas[t]
    x_t = (1 - beta).sqrt() * x_prev + beta.sqrt() * torch.randn_like(x_prev)  # one small step
    # the best: the mean of x_{t-1}, from x_t and from the best guess at x_0 (notebook 01)
    best, _, _ = schedule.q_posterior(exact.x0(x_t, here), x_t, here)
    copied, floor = (x_prev - x_t).square().mean(), (x_prev - best).square().mean()
    target, gain = x_prev.square().mean(), 1 - floor / copied
    print(f"{t:3d}    {target:.4f}      {copied:.6f}        {floor:.6f}            {gain:6.1%}")

# %% [markdown]
# ("target²" is the mean square of $x_{t-1}$: what it would cost to answer 0.) At $t = 400$, a network that has
# learned *nothing* is within half a percent of the best. Nearly all of $x_{t-1}$ stands in
# $x_t$ already. Nearly all of the rest is fresh noise, which nobody can guess. What can be learned is a crumb
# between the two.
#
# The second idea is better than the first all the same. The answer is a mean again, but a mean of neighbours is not
# grey. What it lacks is noise of a known size, and that can be put back. So we keep the small steps, and **ask for
# the crumb and nothing else**. Which crumb, and with which weight? That follows from what we want.
#
# ## What we want: make the data probable
#
# The model draws by a walk from noise to picture. It starts from $p(x_T) = \mathcal N(0, I)$, and each of its steps
# is a Gaussian, with a mean from a network with weights $\theta$:
#
# $$p_\theta(x_{t-1} \mid x_t) = \mathcal N\big(\mu_\theta(x_t, t),\; \sigma_t^2 I\big) \qquad \text{(DDPM, eq. 1)}$$
#
# We want this model to draw real pictures with a high probability: $-\log p_\theta(x_0)$ should be small. It can't be
# computed, since a picture is reached by infinitely many walks, and one would have to integrate over all of them:
#
# $$p_\theta(x_0) = \int p_\theta(x_{0:T})\;dx_{1:T} = \mathbb E_{q(x_{1:T} \mid x_0)}\!\left[
#   \frac{p_\theta(x_{0:T})}{q(x_{1:T} \mid x_0)}\right]$$
#
# The second form is a mean over the walks of notebook 01, from the picture to the noise; those we *can* draw. The
# logarithm of a mean is at least the mean of the logarithm (Jensen's inequality). So
#
# $$-\log p_\theta(x_0) \;\le\; \mathbb E_q\!\left[-\log \frac{p_\theta(x_{0:T})}{q(x_{1:T} \mid x_0)}\right]
#   =: L \qquad \text{(DDPM, eq. 3)}$$
#
# $-L$ is the **ELBO**, the evidence lower bound. Pushing $L$ down pushes the probability of the data up, or at
# least its bound.
#
# Both walks are products of $T$ steps. Write each forward step by Bayes' rule as one that goes back:
#
# $$q(x_t \mid x_{t-1}) = q(x_{t-1} \mid x_t, x_0)\;\frac{q(x_t \mid x_0)}{q(x_{t-1} \mid x_0)}$$
#
# The two factors of the fraction cancel from step to step, all but the first and the last. What remains is a sum:
#
# $$L = \mathbb E_q\Big[\underbrace{D_{KL}\big(q(x_T \mid x_0)\,\|\,p(x_T)\big)}_{L_T}
#  + \sum_{t>1} \underbrace{D_{KL}\big(q(x_{t-1} \mid x_t, x_0)\,\|\,p_\theta(x_{t-1} \mid x_t)\big)}_{L_{t-1}}
#  \underbrace{{}-\log p_\theta(x_0 \mid x_1)}_{L_0}\Big] \qquad \text{(DDPM, eq. 5)}$$
#
# $D_{KL}(q\,\|\,p) = \mathbb E_q[\log q - \log p]$, the Kullback-Leibler divergence, says how far $p$ is from $q$:
# 0 if they are the same, else more. So each term compares one step of the model with the step back of *somebody who
# knows the picture*. This is what `q_posterior` of notebook 01 was good for.
#
# From here to the loss in use there are six steps. Each drops something.
#
# | | step | what goes | why it may |
# |---|---|---|---|
# | 1 | drop $L_T$ | how far $x_T$ is from pure noise | nothing in it can be learned |
# | 2 | fix $\sigma_t^2 = \tilde\beta_t$ | the model's own say in its width | in many small steps, the mean decides |
# | 3 | build $\mu_\theta$ from $x_t$ and $\epsilon_\theta$ | what $x_t$ shows already | it need not be learned |
# | 4 | set the weight of each $t$ to 1 | the bound | the pictures get better |
# | 5 | treat $L_0$ like the others | the last step's own formula | it is one step of a thousand ($t = 0$ in the code) |
# | 6 | replace the sum over $t$ by one random $t$ | the other 999 | in the mean it is the same |
#
# (To step 2: DDPM tried $\tilde\beta_t$ and $\beta_t$, with similar results (section 3.2 there). Nichol & Dhariwal
# (2021, section 3.1) say why: the more steps, the less the width matters.)
#
# Steps 2 and 3 are calculations; let us do them. For two Gaussians of the same variance,
#
# $$D_{KL}\big(\mathcal N(\tilde\mu, \sigma^2 I)\,\|\,\mathcal N(\mu_\theta, \sigma^2 I)\big) =
# \frac{\|\tilde\mu-\mu_\theta\|^2}{2\sigma^2}:$$
#
# all but the distance of the means cancels (DDPM, eq. 8). Now put
# $x_0 = (x_t - \sqrt{1-\bar\alpha_t}\,\epsilon)/\sqrt{\bar\alpha_t}$ into $\tilde\mu_t$ of notebook 01:
#
# $$\tilde\mu_t = \frac{1}{\sqrt{\alpha_t}}\Big(x_t - \frac{\beta_t}{\sqrt{1-\bar\alpha_t}}\,\epsilon\Big), \qquad
#   \mu_\theta = \frac{1}{\sqrt{\alpha_t}}\Big(x_t - \frac{\beta_t}{\sqrt{1-\bar\alpha_t}}\,\epsilon_\theta(x_t, t)\Big)
#   \qquad \text{(DDPM, eq. 10, 11)}$$
#
# The left one is a fact. The right one is a choice: $x_t$ is known, so only $\epsilon$ is left to guess. Here is
# the crumb: the factor before
# $\epsilon$ is small, and it is taken out of the network's hands. In the difference, $x_t$ cancels:
#
# $$L_{t-1} = \underbrace{\frac{\beta_t^2}{2\,\tilde\beta_t\,\alpha_t\,(1-\bar\alpha_t)}}_{\text{weight}}\;
#   \big\|\epsilon - \epsilon_\theta(x_t, t)\big\|^2 \qquad \text{(DDPM, eq. 12)}$$
#
# Don't believe it, compute it. Take a single number for a picture, one step of the walk, and a network whose guess is
# wrong by 0.3. Compute the KL in three ways: by adding up $q\,\log(q/p)$ over a fine grid; from the two means; from
# the error of the noise.

# %%
beta, alpha, alpha_bar = schedule.betas.double(), 1 - schedule.betas.double(), schedule.alphas_cumprod.double()
bound = torch.full((T,), torch.nan, dtype=torch.float64)  # eq. 12's weight; from t = 1 on, since β̃_0 is 0
bound[1:] = (beta**2 / (2 * schedule.posterior_variance.double() * alpha * (1 - alpha_bar)))[1:]

x_0, noise, t = torch.tensor([0.6]).double(), torch.tensor([-0.8]).double(), torch.tensor([100])
x_t = schedule.q_sample(x_0, t, noise)
guess = noise + 0.3  # what a network might say

mean, variance, _ = schedule.q_posterior(x_0, x_t, t)  # of the step by somebody who knows x_0
mean_theta, _, _ = schedule.q_posterior(schedule.predict_start_from_noise(x_t, t, guess), x_t, t)  # ... by the network
eq_10 = (x_t - beta[t] / (1 - alpha_bar[t]).sqrt() * noise) / alpha[t].sqrt()
torch.testing.assert_close(mean, eq_10, rtol=1e-5, atol=0)

q, p = (torch.distributions.Normal(m, variance.sqrt()) for m in (mean, mean_theta))
x = mean + variance.sqrt() * torch.linspace(-12, 12, 100_001, dtype=torch.float64)
by_integral = (q.log_prob(x).exp() * (q.log_prob(x) - p.log_prob(x))).sum() * (x[1] - x[0])  # Σ q log(q/p) Δx
by_means = (mean - mean_theta) ** 2 / (2 * variance)  # eq. 8
by_noise = bound[t] * (noise - guess) ** 2  # eq. 12

print(f"q(x_t-1 | x_t, x_0): mean {mean.item():.5f}, standard deviation {variance.sqrt().item():.5f}")
print(f"p_θ(x_t-1 | x_t):    mean {mean_theta.item():.5f}, the same standard deviation")
for name, value in {"sum over a grid": by_integral, "means, eq. 8": by_means, "noise, eq. 12": by_noise}.items():
    print(f"KL from the {name:16} {value.item():.7f}")

# %% [markdown]
# Three times the same number. For a picture, one adds up over its pixels, and for the whole bound, over $t$.
#
# (`q_posterior` stands for both sides: with the true $x_0$ it is $q$; with the $\hat x_0$ that follows from
# $\epsilon_\theta$ it is $p_\theta$. This is how DDPM draws, too.)
#
# ## The weight that is dropped
#
# Step 4 is the bold one. How large are the weights that $L_{simple}$ replaces by 1?
#
# **Predict, then run.** A network's $\epsilon_\theta$ is wrong by 0.3 at all timesteps. Where does the bound punish
# it the most: where the picture is nearly clean, or where it is nearly noise?
#
# <details><summary>Answer</summary>
#
# Where it is nearly clean, and by far. There the step back is narrow ($\tilde\beta_t$ is small, and it stands below
# the line), so that a small error is already improbable.
#
# </details>

# %%
times = torch.arange(1, T)
snr = schedule.snr(times).double()
errors = {  # the same loss, told as a weight of the error of ε, and of the error of x_0
    "weight of the error of $\\epsilon$": {"the bound": (times, bound[1:]), "$L_{simple}$": (times, torch.ones(T - 1))},
    "weight of the error of $x_0$": {"the bound": (times, bound[1:] * snr), "$L_{simple}$": (times, snr)},
}
share = bound[1:].cumsum(0) / bound[1:].sum()
print(f"weights of the bound: {bound[1]:.3f} at t = 1, {bound[100]:.4f} at t = 100, {bound[600]:.4f} at t = 600")
print(f"half of all the bound's weight lies at t <= {int((share > 0.5).int().argmax()) + 1}")
viz.curves(errors, log=list(errors), width=3.4, height=2.4)

# %% [markdown]
# What to see, left: the bound weighs the first timesteps a hundred times as much as the middle. There, the noise is
# so faint that nobody sees it. But to a likelihood each last bit of each pixel counts, and most bits of a picture
# are just such faint detail (more than half of them, DDPM finds in section 4.3). $L_{simple}$ takes this emphasis away.
# It leaves the network to care for what one *sees*: shapes and colours, decided at larger $t$. It is no longer a bound
# on anything. DDPM reports that its pictures are better and its likelihoods worse (table 1 there). Stable Diffusion was
# trained with it.
#
# $$L_{simple} = \mathbb E_{t, x_0, \epsilon}\,\Big\|\epsilon - \epsilon_\theta\big(\sqrt{\bar\alpha_t}\,x_0 +
#   \sqrt{1-\bar\alpha_t}\,\epsilon,\; t\big)\Big\|^2 \qquad \text{(DDPM, eq. 14)}$$
#
# (The right panel shows the same two losses, told for $x_0$: an error of $\epsilon$ is $\sqrt{\mathrm{SNR}}$ times an
# error of $x_0$. Even $L_{simple}$ weighs small $t$ heavily if one looks at it so. This comes back under "min-SNR".)
#
# **Predict.** Does dropping the weights change what the best possible network answers?
#
# <details><summary>Answer</summary>
#
# No. At each $x_t$ and $t$, the best answer to a squared error is the mean $\mathbb E[\epsilon \mid x_t]$, whatever
# positive number stands before it. Weights matter because a real network is not the best possible: they say where it
# should spend its effort.
#
# </details>
#
# ## Algorithm 1
#
# Now train. So that we can see what is learned, let the "pictures" be points in the plane: two moons. A batch of
# points has the shape `[b 2]`, where pictures have `[b 3 h w]`; not a line of `minisd` minds.
#
# The network is three layers that are told $x_t$ and $t$. $t$ comes as sines and cosines of 16 frequencies, because
# one number between 0 and 999 is hard to read for a network (notebook 03). `context` is what it is told besides:
# nothing as yet.


# %%
def two_moons(n, generator):
    which = torch.arange(n) % 2  # 0: the upper moon, 1: the lower one
    angle = torch.pi * torch.rand(n, generator=generator)
    side = 1 - 2 * which
    points = torch.stack([side * angle.cos() + which, side * angle.sin() + which / 2], dim=1)
    points = points + 0.08 * torch.randn(n, 2, generator=generator)
    # mean 0 and variance 1, as for latents (notebook 04)
    return (points - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5]), which


class Guesser(nn.Module):
    """ε_θ(x_t, t, context) for points: x [b 2], t [b], context [b n d] or None -> [b 2]."""

    def __init__(self, context_size=0, width=128):
        super().__init__()
        self.frequencies = torch.exp(torch.linspace(0, 6, 16))
        sizes = [2 + 32 + context_size, width, width, width]
        hidden = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x, t, context=None):
        phase = t[:, None] / T * self.frequencies  # [b 16]
        told = [x, phase.sin(), phase.cos()] + ([] if context is None else [context.flatten(1)])
        return self.net(torch.cat(told, dim=1))


moons, which = two_moons(2000 if full else 100, torch.Generator().manual_seed(0))
print(f"moons {list(moons.shape)}, mean {moons.mean():.2f}, variance {moons.var(0).mean():.2f}")

# %% [markdown]
# Algorithm 1 of the paper, and beside each line what stands for it in the code below:
#
# | | DDPM, algorithm 1 | in the code |
# |---|---|---|
# | 1 | repeat | `for step in range(1, steps + 1):` |
# | 2 | $\quad x_0 \sim q(x_0)$ | `chosen = torch.randint(len(moons), (512,))` |
# | 3 | $\quad t \sim \mathrm{Uniform}(\{1, \dots, T\})$ | `t = torch.randint(0, T, (len(x_0),))` |
# | 4 | $\quad \epsilon \sim \mathcal N(0, I)$ | `noise = torch.randn_like(x_0)` |
# | 5 | $\quad$ take a gradient descent step on | `loss.backward()`, `optimizer.step()` |
# | | $\qquad \nabla_\theta \lVert\epsilon - \epsilon_\theta(x_t, t)\rVert^2$, | `(noise - model(…)).square().mean()` |
# | | $\qquad x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$ | `x_t = alpha_bar.sqrt() * x_0 + …` |
# | 6 | until converged | until `steps` are done |


# %%
def L_simple(model, x_0):
    t = torch.randint(0, T, (len(x_0),))  # line 3: for each point a t of its own (counted from 0), [b]
    noise = torch.randn_like(x_0)  # line 4, [b 2]
    alpha_bar = schedule.alphas_cumprod[t][:, None]  # [b 1]
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise  # [b 2]
    return (noise - model(x_t, t, None)).square().mean()  # line 5


def train(model, loss_of, steps, keep=()):
    """Lines 1, 2 and 6. Returns the loss of each step, and copies of the model as it was after the steps in `keep`."""
    steps = steps if full else 5
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)  # smaller and smaller steps, down to 0
    losses, kept = [], {}
    for step in range(1, steps + 1):  # line 1
        chosen = torch.randint(len(moons), (512,))  # line 2: which points, [b]
        loss = loss_of(model, chosen)
        optimizer.zero_grad()
        loss.backward()  # line 5: the gradient
        optimizer.step()
        decay.step()
        losses.append(loss.item())
        if step in keep:
            kept[step] = copy.deepcopy(model)
    return torch.tensor(losses), kept  # line 6: converged, or out of patience


torch.manual_seed(0)
model = Guesser()
print(f"before training: loss {L_simple(model, moons).item():.3f}")
keep = (100, 500) if full else (1, 2)
losses, kept = train(model, lambda model, chosen: L_simple(model, moons[chosen]), 3000, keep)
print(f"after {len(losses)} steps: loss {losses[-500:].mean():.3f}, the mean of the last 500")

# the same in the package, given the same t and noise
torch.manual_seed(1)
ours = L_simple(model, moons)
torch.manual_seed(1)
theirs = minisd.epsilon_loss(model, schedule, moons)
torch.testing.assert_close(ours, theirs)

# %% [markdown]
# One could be disappointed: from 1.0 to about a third, and there it stuck. Before we judge the number, look at what
# was learned. The orange arrows are $-\epsilon_\theta(x_t, t)$, the way out of the noise, over the whole plane.
# Beneath them, pale blue and broad, the exact answer of `minisd.ExactDenoiser`; in grey, the data noised to the same
# $t$. (Long arrows are cut to one length.)

# %%
exact = minisd.ExactDenoiser(moons, schedule)
grid = torch.arange(-2.4, 2.5, 0.6)
places = torch.cartesian_prod(grid, grid)  # [81 2]
fields, noised = {}, {}
for t in (800, 300, 100, 20):
    here = torch.full((len(places),), t)
    fields[f"t = {t}"] = (places, {"exact": -exact(places, here), "learned": -model(places, here).detach()})
    some = moons[:300]
    noised[f"t = {t}"] = schedule.q_sample(some, torch.full((len(some),), t), torch.randn_like(some))
viz.vector_field(fields, noised)

# %% [markdown]
# What to see: at $t = 800$ all arrows point to the middle. This is the grey mean again, and here it is right. As
# the noise falls, they turn to the nearer moon. Where there are grey points, the learned arrows lie on the exact
# ones. Where there are none, as at the right edge at $t = 20$, they may be wrong, and it costs nothing: training
# never went there.
#
# The field has a second name. With the best guess for $\epsilon$, $-\epsilon/\sqrt{1-\bar\alpha_t}$ is the **score**,
# $\nabla_{x_t} \log q(x_t)$: the direction in which the density of the noised data rises most steeply. So whoever can
# guess the noise knows the way to where data are (Vincent 2011; Song & Ermon 2019). Don't believe it: $q(x_t)$ is a
# Gaussian around each shrunk point of the data, so let `torch` take the gradient of its logarithm.

# %%
for t in (800, 300, 100):
    a = schedule.alphas_cumprod[t].double()
    x = places.double().requires_grad_()
    squares = (x[:, None] - a.sqrt() * moons).square().sum(-1)  # [81 2000]
    log_q = torch.logsumexp(-squares / (2 * (1 - a)), dim=1)  # log q(x_t), but for a constant, [81]
    (score,) = torch.autograd.grad(log_q.sum(), x)  # [81 2]
    from_noise = -exact(places, torch.full((len(places),), t)) / (1 - a).sqrt()
    apart = (score - from_noise).abs().max()
    print(f"t = {t}: the score is up to {score.norm(dim=1).max():5.2f} long; the two differ by {apart:.0e} at most")

# %% [markdown]
# Can one draw with it? A sampler asks for nothing but $\epsilon_\theta(x_t, t)$ (notebook 06).

# %%
torch.manual_seed(0)
x_T = torch.randn(400 if full else 20, 2)
steps = list(minisd.sampling.ddim(model, x_T, schedule, steps=50 if full else 5))
panels = {f"$x_t$, t = {steps[i].t}": {"drawn": steps[i].x_t} for i in ((0, 30, 40, 46) if full else (0, 1, 2, 3))}
panels["result"] = {"drawn": steps[-1].x}


def to_data(points):
    return torch.cdist(points, moons).min(1).values.mean()


fresh, _ = two_moons(600, torch.Generator().manual_seed(1))
*_, recalled = minisd.sampling.ddim(exact, x_T, schedule, steps=50 if full else 5)
print(f"mean distance to the nearest of the data:  new points of the true moons  {to_data(fresh):.3f}")
print(f"                                           drawn by the network          {to_data(steps[-1].x):.3f}")
print(f"                                           drawn by the exact denoiser   {to_data(recalled.x):.3f}")
viz.clouds(panels, behind=moons[:300])

# %% [markdown]
# (In grey, the data.) A loss that sticks near a third, and it draws moons. Not perfect ones: a few points stray,
# and the mean distance to the data is 0.033, where new points of the true moons have 0.027. But the same kind of
# question that gave us grey at the start works now, because it is asked fifty times, each time after a small step,
# each time with less left open. (Why the exact denoiser's points lie even closer to the data than new ones: it
# recalls them, notebook 01.)
#
# ## Which loss is normal?
#
# People have asked for years: "the loss sticks at 0.3 (0.15, 1.0): is that normal?" We can answer, because we know
# the best possible loss. The answer of the exact denoiser is the mean of all noises that are possible at $x_t$; the
# true one is just one of them. The rest can't be guessed by anybody. That rest is the **floor**.

# %%
probes = 2000 if full else 20
timesteps = [0, 3, 8, 15, 30, 60, 100, 200, 300, 400, 500, 650, 800, 999] if full else [0, 999]
probe = torch.Generator().manual_seed(2)
probe_0 = moons[torch.randint(len(moons), (probes,), generator=probe)]
probe_noise = torch.randn(probes, 2, generator=probe)  # the same for all models and all t
probe_noise = probe_noise / probe_noise.square().mean().sqrt()  # of variance 1 exactly, so that to answer 0 costs 1.000


@torch.no_grad()
def by_timestep(model, loss=minisd.epsilon_loss):
    """The loss at each of `timesteps`, [timesteps]: everything is the same but the model."""
    return torch.stack(
        [loss(model, schedule, probe_0, t=torch.full((probes,), t), noise=probe_noise) for t in timesteps]
    )


@torch.no_grad()
def above_the_floor(model):
    """What a model could still learn: its squared distance from the exact answer, at each of `timesteps`."""
    distances = []
    for t in (torch.full((probes,), t) for t in timesteps):
        x_t = schedule.q_sample(probe_0, t, probe_noise)
        distances.append((model(x_t, t, None) - exact(x_t, t)).square().mean())
    return torch.stack(distances)


def mean_over_t(values):
    """What the mean over all t would be, from straight lines between `timesteps`."""
    return torch.trapezoid(values, torch.tensor(timesteps).float()) / (T - 1)


floor = by_timestep(exact)
landmarks = {
    "answers 0": lambda x, t, context: torch.zeros_like(x),
    "answers x_t": lambda x, t, context: x,
    "√(1-ᾱ_t) x_t: the best multiple of x_t": lambda x, t, context: (1 - schedule.alphas_cumprod[t, None]).sqrt() * x,
    **{f"trained for {step} steps": model for step, model in kept.items()},
    f"trained for {len(losses)} steps": model,
}
by_model = {name: by_timestep(answer) for name, answer in landmarks.items()}
print("mean loss over all t")
for name, values in [*by_model.items(), ("the floor", floor)]:
    print(f"  {name:40} {mean_over_t(values):.3f}")

smooth = losses.unfold(0, min(50, len(losses)), 1).mean(1)  # the mean of 50 steps
step = torch.arange(len(losses))
lines = {"each 10th step": (step[::10], losses[::10]), "mean of 50": (step[-len(smooth) :], smooth)}
bottom = {"while training": (step[[0, -1]], mean_over_t(floor).expand(2))}
viz.curves({"while training": lines}, "step", "loss", (), bottom, "the floor", width=4.4, height=2.1)

# %%
trained = [name for name in by_model if name.startswith("trained")]
models = [*kept.values(), model]
above = {name: (timesteps, above_the_floor(m)) for name, m in zip(trained, models, strict=True)}
difference, distance = mean_over_t(by_model[trained[-1]] - floor), mean_over_t(above[trained[-1]][1])
print(f"{trained[-1]}: loss - floor = {difference:.4f}, squared distance from the exact answer {distance:.4f}")
panels = {
    "loss": {name: (timesteps, by_model[name]) for name in trained},
    "loss above the floor": above,
}
viz.curves(panels, "t", "loss", exact={"loss": (timesteps, floor)}, width=3.4, height=2.4)

# %% [markdown]
# What to see, left: the loss is high at small $t$ and low at large $t$, for the best possible model as for ours.
# Where there is hardly any noise, it is hard to say which (it drowns in the data); where there is nothing else, it
# is plain to see. (The floor's dip at the far left: there, the noise is hardly larger than the distance between
# neighbouring points of the data, and the exact denoiser begins to know which point it is.) Right: what is left to
# learn, nearly all of it at small $t$.
#
# The line above the figure shows a handy fact. A squared error splits in two: the loss is the floor plus the squared
# distance from the exact answer. (For the mean over all noise. Here we have 2,000 draws, and it holds but for the last
# digit.) The first part can't be changed, the second is what training works on.
#
# This answers the question.
#
# - **1.0 is the loss of a network that answers 0.** A loss that stays there means that nothing is learned: wrong
#   learning rate, broken gradient, or a target that does not belong to the input.
# - **It falls fast at first.** That $x_t$ is mostly noise at large $t$ is quick to learn. The best multiple of
#   $x_t$, which knows nothing of moons, is at 0.38 already, and our network after 100 steps at 0.36.
# - **Then it sticks, and that is normal.** The curve is the floor plus a little, and the floor does not move. What
#   improves is the little. It fell from 0.048 to 0.003 between steps 100 and 3000, and the eye misses it
#   under the jitter that comes from drawing $t$ and $\epsilon$ at random.
# - **There is no normal number.** The floor belongs to the data, the schedule and the weights of the loss. For our
#   moons it is 0.32. For pictures it is far lower, as we shall see. Compare losses of the same data, at the same
#   $t$, with the same noise; else look at samples.
#
# ## One answer, three forms
#
# $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$ is one equation. Whoever is given
# $x_t$ and knows one of $x_0$ and $\epsilon$ knows the other. A third form mixes both: the velocity
#
# $$v = \sqrt{\bar\alpha_t}\,\epsilon - \sqrt{1-\bar\alpha_t}\,x_0
#   \qquad \text{(Salimans \& Ho 2022, section 4 and appendix D)}$$
#
# Stable Diffusion v1 predicts $\epsilon$, the 768-pixel version of v2 predicts $v$.
#
# The way back is as short. $\bar\alpha_t$ and $1-\bar\alpha_t$ sum to 1, so their roots are the cosine and the sine of
# an angle, and $(x_t, v)$ is $(x_0, \epsilon)$ turned by it. Turn it back:
#
# $$x_0 = \sqrt{\bar\alpha_t}\,x_t - \sqrt{1-\bar\alpha_t}\,v, \qquad
#   \epsilon = \sqrt{1-\bar\alpha_t}\,x_t + \sqrt{\bar\alpha_t}\,v$$

# %%
corpus = sample(size=32)
fox = corpus.batch([corpus.captions.index("fox, noto style")])  # [1 3 32 32]
columns = torch.tensor([50, 300, 600, 850, 999])  # timesteps
x_0 = fox.expand(len(columns), -1, -1, -1)  # [5 3 32 32]
noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)).expand_as(x_0)
x_t = schedule.q_sample(x_0, columns, noise)
v = schedule.get_v(x_0, noise, columns)

torch.testing.assert_close(schedule.predict_start_from_noise(x_t, columns, noise), x_0, rtol=0, atol=1e-4)
torch.testing.assert_close(schedule.predict_noise_from_start(x_t, columns, x_0), noise, rtol=0, atol=1e-4)
torch.testing.assert_close(schedule.predict_start_from_v(x_t, columns, v), x_0, rtol=0, atol=1e-4)
torch.testing.assert_close(schedule.predict_noise_from_v(x_t, columns, v), noise, rtol=0, atol=1e-4)
print(f"x_t, noise, v, x_0: {list(x_t.shape)} each")
viz.strip([x_t, v], [f"t = {t}" for t in columns.tolist()], ["$x_t$", "$v$"], size=0.64)

# %% [markdown]
# $x_t$ turns from the picture into noise. $v$ turns from noise into the *negative* of the picture.
#
# The three carry the same information, but not the same errors. Let a network be wrong by the same small amount in
# each form (noise of standard deviation 0.1 on its answer), and look at the picture that it means.
#
# **Predict, then run.** Which of the three gives the worst picture at $t = 999$? And which gives the worst *noise* at
# $t = 0$?
#
# <details><summary>Answer</summary>
#
# $\epsilon$ at $t = 999$: the picture is $(x_t -
# \sqrt{1-\bar\alpha_t}\,\epsilon)/\sqrt{\bar\alpha_t}$, and to divide by 0.068 makes 14.6 times the error. $x_0$ at
# $t = 0$: the noise is $(x_t - \sqrt{\bar\alpha_t}\,x_0)/\sqrt{1-\bar\alpha_t}$, and to divide by 0.029 makes 34
# times the error. $v$ is never multiplied by more than 1.
#
# </details>

# %%
wrong = 0.1 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1))
pictures_meant = {
    r"from $\epsilon$": schedule.predict_start_from_noise(x_t, columns, noise + wrong),
    "from $v$": schedule.predict_start_from_v(x_t, columns, v + wrong),
    "from $x_0$": x_0 + wrong,
}
notes = [[f"error {e:.2f}" for e in (p - x_0).square().mean((1, 2, 3)).sqrt()] for p in pictures_meant.values()]
viz.strip(list(pictures_meant.values()), [f"t = {t}" for t in columns.tolist()], list(pictures_meant), notes, size=0.64)

# %% [markdown]
# To the picture, an error of $\epsilon$ hardly matters at small $t$, and matters a lot at large $t$.
#
# Now from the other side: how hard is each to guess? A network that is given $x_t$ has part of the answer before its
# eyes. The floors of the moons, in the three forms, each as a share of what the answer 0 would cost:

# %%
exact_in = {
    "eps": (minisd.epsilon_loss, exact),
    "v": (minisd.v_loss, lambda x, t, context: schedule.get_v(exact.x0(x, t), exact(x, t), t)),
    "x0": (minisd.x0_loss, lambda x, t, context: exact.x0(x, t)),
}
floors = {name: by_timestep(answer, loss) for name, (loss, answer) in exact_in.items()}
zero = {name: by_timestep(lambda x, t, context: torch.zeros_like(x), loss) for name, (loss, _) in exact_in.items()}
ratio = (1 - schedule.alphas_cumprod[timesteps]).double()  # the error of x_0, from that of v: 1-ᾱ_t times its square
torch.testing.assert_close(floors["x0"].double(), floors["v"].double() * ratio, rtol=1e-3, atol=1e-5)
symbols = {"eps": r"$\epsilon$", "v": "$v$", "x0": "$x_0$"}
lines = {symbol: (timesteps, floors[name] / zero[name]) for name, symbol in symbols.items()}
viz.curves({"what nobody can guess": lines}, ylabel="share", width=4, height=2.2)

# %% [markdown]
# - $\epsilon$ is hard at small $t$. At large $t$, copying $x_t$ nearly does.
# - $x_0$ is the opposite. At small $t$, copying $x_t$ nearly does; at large $t$ there is only the mean.
# - $v$ is $\epsilon$ on the left and $-x_0$ on the right: copying never does.
#
# With $\epsilon$, training spends little on large $t$ (the loss is small there), and sampling suffers the most from
# errors there. It works all the same, as long as something of the picture is left in
# $x_T$. A schedule that ends in *pure* noise ($\bar\alpha_T = 0$) makes $\epsilon$ useless at its end, since one
# would divide by 0: then $v$ is needed.
#
# ## Min-SNR: weights again
#
# $L_{simple}$ gives each $t$ the weight 1 for the error of $\epsilon$. For the error of $x_0$ that is the weight
# $\mathrm{SNR}(t)$: 1175 at $t = 0$, 0.0047 at the end. Hang et al. (2023) cap it at $\gamma = 5$:
#
# $$w_t = \frac{\min(\mathrm{SNR}(t),\, \gamma)}{\mathrm{SNR}(t)} \quad\text{before}\quad \|\epsilon-\epsilon_\theta\|^2
#   \qquad \text{(Min-SNR, section 3.4)}$$
#
# Where the picture is nearly clean, the weight falls; elsewhere it stays 1. The effort goes to where the picture is
# decided. The authors report that training converges 3.4 times faster than with the weights before theirs, and `minisd`
# trains its models so. Do the moons gain from it? We train three networks alike, but for the weights: none, the
# bound's, and min-SNR's. All are measured alike, without weights, by their distance from the exact answer.


# %%
def bound_loss(model, schedule, x_0, context=None):
    """The weights of eq. 12, scaled to a mean of 1."""
    t, noise = torch.randint(1, T, (len(x_0),)), torch.randn_like(x_0)
    squares = (noise - model(schedule.q_sample(x_0, t, noise), t, context)).square().mean(1)  # [b]
    return (bound[t] / bound[1:].mean() * squares).mean().float()


def min_snr_loss(model, schedule, x_0, context=None):
    return minisd.epsilon_loss(model, schedule, x_0, context, min_snr_gamma=5.0)


by_weight = {"no weights": model}  # L_simple
for name, loss_of in {"the bound": bound_loss, "min-SNR": min_snr_loss}.items():
    torch.manual_seed(0)
    by_weight[name] = Guesser()
    train(by_weight[name], lambda model, chosen, f=loss_of: f(model, schedule, moons[chosen]), 3000)

weights = {"no weights": torch.ones(T - 1), "the bound": bound[1:], "min-SNR": minisd.loss.min_snr_weight(snr)}
above = {name: (timesteps, above_the_floor(trained_so)) for name, trained_so in by_weight.items()}
shown = [0, 2, 5, 7, 10, 12] if full else [0, 1]  # of `timesteps`
print("above the floor:  " + "".join(f"t = {timesteps[i]:<6}" for i in shown) + " samples: distance to the data")
for name, trained_so in by_weight.items():
    *_, last = minisd.sampling.ddim(trained_so, x_T, schedule, steps=50 if full else 5)
    print(f"{name:16}  " + "".join(f"{above[name][1][i]:<10.4f}" for i in shown) + f" {to_data(last.x):.3f}")
panels = {
    "weight (mean 1)": {name: (times, w / w.mean()) for name, w in weights.items()},
    "above the floor, unweighted": above,
}
viz.curves(panels, log=list(panels), width=3.4, height=2.4)

# %% [markdown]
# What to see: each gets what its weights ask for, and pays elsewhere. The bound is the best at $t = 0$, where its
# weight is the largest, and the worst at large $t$. Min-SNR is level with $L_{simple}$ or better at large $t$, and
# behind at small $t$, which it hardly weighs. The samples of both are further from the data than those of
# $L_{simple}$: 0.055 and 0.054 against 0.033.
#
# So the moons gain nothing. They are thin, and what we measured, the distance to them, is decided at small $t$. Of a
# picture one sees, above all, what is decided at large $t$ (notebook 01: texture drowns first), where min-SNR has its
# weight. No weights are right without saying what is wanted. The bound's have a second problem: the few points of a
# batch that fall on the first timesteps weigh so much that the gradient is noisy (Nichol & Dhariwal 2021, section 3.3).
#
# ## Text dropout, and why guidance needs it
#
# So far the network draws what it likes. Let it be told *what* to draw: the context. For the moons it is one of
# two vectors, upper or lower, in the shape of a prompt with one word, `[b 1 2]`.
#
# At drawing time, **guidance** asks the network twice, with the context and without, and exaggerates the difference:
#
# $$\hat\epsilon = \epsilon_\theta(x_t, t, \varnothing) +
#   s\,\big(\epsilon_\theta(x_t, t, c) - \epsilon_\theta(x_t, t, \varnothing)\big)$$
#
# (Ho & Salimans 2022; notebook 06 draws with it.) For this the network must have an answer to "nothing said",
# $\varnothing$. It has one only if it was trained on it. So in training, one context in ten is replaced by the
# empty one: `minisd.text_dropout`. (Stable Diffusion has done so from v1.3 on; it is in the model card, but in no
# line of the public code. We drop two in ten here: the moons have few steps to learn from.)
#
# **Predict, then run.** Train without dropout, then ask the network for its answer to $\varnothing$ all the same.
# What will guidance do?
#
# <details><summary>Answer</summary>
#
# The answer to a context that it never saw is arbitrary. Guidance takes the difference to it for what the prompt
# means, and makes it larger. The result drifts off, the further the larger $s$ is. At $s = 1$ nothing is wrong:
# there the empty answer cancels. So the mistake hides until guidance is turned up.
#
# </details>

# %%
contexts = torch.eye(2)[:, None]  # [2 1 2]: "upper" and "lower", each a prompt of one word
empty = torch.zeros(1, 1, 2)


def conditional_loss(drop):
    def loss_of(model, chosen):
        forget = torch.rand(len(chosen)) < drop  # [b]
        context = minisd.text_dropout(contexts[which[chosen]], empty, forget)  # [b 1 2]
        return minisd.epsilon_loss(model, schedule, moons[chosen], context)

    return loss_of


panels = {}
for drop in (0.0, 0.2):
    torch.manual_seed(0)
    told = Guesser(context_size=2)
    train(told, conditional_loss(drop), 3000)
    guided = {
        "told nothing": minisd.classifier_free_guidance(told, empty, empty, 1.0),
        **{f"upper, s = {s}": minisd.classifier_free_guidance(told, contexts[:1], empty, float(s)) for s in (1, 2, 4)},
    }
    for name, eps_model in guided.items():
        *_, last = minisd.sampling.ddim(eps_model, x_T, schedule, steps=50 if full else 5)
        far = (torch.cdist(last.x, moons).min(1).values > 0.5).float().mean()
        panels[f"{drop:.0%} dropped:\n{name}"] = {"drawn": last.x}
        print(f"{drop:4.0%} dropped, {name:13} {far:4.0%} further than 0.5 from all data")
viz.clouds(panels, behind=moons[:300], columns=4, size=1.6, reach=4.5)

# %% [markdown]
# What to see, first column: the network that never heard "nothing" (upper row) draws nonsense when told nothing, two
# bars where no moon is. (They lie between the moons, so that the number above does not notice.) The other one draws
# both moons, a little loosely. Second column: at $s = 1$ both are fine, and the mistake hides. Then it shows: above,
# the points drift off; at $s = 4$, nearly all of them are far from all data, and many have left the panel. Below, they
# stay.
#
# Below, guidance has a price too. At $s = 4$, only the middle of the upper moon is drawn, the part that is the
# least like the lower one. Guidance buys "more like what was asked for" with variety
# ([`docs/guidance.md`](../docs/guidance.md) shows it in pictures).
#
# ## Real pictures
#
# Now the model that ships. It works on latents $z$ `[b 4 8 8]`, which its autoencoder makes of pictures (notebook
# 04); to the loss they are points like all others. We compare its loss with the floor of the sample, with the
# caption and without, and do so twice: for pictures of its training, and for pictures that were held out (kept back, so
# that training never saw them).

# %%
sd = minisd.load()
rows = corpus.rows if full else corpus.rows[:60]
seen = [i for i, row in enumerate(rows) if row["split"] == "train"]
unseen = [i for i, row in enumerate(rows) if row["split"] != "train"]


def latents(indices):
    return sd.get_first_stage_encoding(sd.encode_first_stage(corpus.batch(indices)).mode())  # no noise of its own


z_all = torch.cat([latents(range(i, min(i + 128, len(rows)))) for i in range(0, len(rows), 128)])  # [1280 4 8 8]
exact = minisd.ExactDenoiser(z_all[seen], sd.schedule)  # knows the training pictures of the sample, and no others
print(f"z_all {list(z_all.shape)}; {len(seen)} training pictures, {len(unseen)} held out")


@torch.no_grad()
def measure(model, z, noise, context=None):
    """The mean loss of all z at each of `timesteps`."""
    at = [torch.full((len(z),), t) for t in timesteps]
    return torch.stack([minisd.epsilon_loss(model, sd.schedule, z, context, t, noise) for t in at])


n, timesteps = (64, [0, 20, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999]) if full else (4, [0, 999])
panels, floors = {}, {}
for title, indices in {"pictures of the training": seen, "held-out pictures": unseen}.items():
    indices = indices[:: max(1, len(indices) // n)][:n]
    z = z_all[indices]  # [n 4 8 8]
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    caption = sd.get_learned_conditioning([corpus.captions[i] for i in indices])  # [n 24 192]
    no_caption = sd.get_learned_conditioning([""] * len(indices))
    lines = {
        "with its caption": measure(sd.apply_model, z, noise, caption),
        "no caption": measure(sd.apply_model, z, noise, no_caption),
    }
    floors[title] = (timesteps, measure(exact, z, noise))
    panels[title] = {name: (timesteps, y) for name, y in lines.items()}
    print(f"\n{title}\n{'t':>16}  " + "  ".join(f"{t:5d}" for t in timesteps))
    for name, y in [*lines.items(), ("exact", floors[title][1])]:
        print(f"{name:>16}  " + "  ".join(f"{v:5.3f}" if v < 10 else f"{v:5.0f}" for v in y.tolist()))
    print(f"mean over t:     {', '.join(f'{name} {mean_over_t(y):.3f}' for name, y in lines.items())}")
    w = minisd.loss.min_snr_weight(sd.schedule.snr(torch.tensor(timesteps)), 5.0)
    print(f"min-SNR weights: {', '.join(f'{name} {mean_over_t(w * y):.3f}' for name, y in lines.items())}")

figure = viz.curves(panels, "t", "loss", list(panels), floors, "exact, knows the training pictures", 3.4, 2.4)
for axes in figure.axes:
    axes.set_ylim(5e-4, 1e3)
figure

# %% [markdown]
# What to see, left: the shape of the curves is that of the moons. It starts near 0.9, *in a finished model*, and
# falls below 0.01. The mean over $t$ is 0.078 with the caption. With min-SNR weights, the same model has 0.045, and
# these are the weights that it was trained with: its training ended at 0.0438. So before you compare your loss with
# somebody else's, ask for the weights.
#
# - **The floor is nearly 0, and nobody wants to reach it.** Up to $t = 300$ the exact denoiser knows without fail
#   which of the 1,081 training pictures it is looking at. A network that did so would have learned them by heart.
# - **Right: on pictures that it does not know, the exact denoiser fails.** At $t = 0$ its loss is 418, against 1
#   for answering 0. It sees the nearest picture that it knows, and takes the difference for noise. The network,
#   with 0.97, knows what pictures look like in general. Only from $t = 600$ on, where no picture can be told any
#   more, are they alike.
# - **With its caption, the network gets below the floor at large $t$** (left, from 700 on). Is that possible? The
#   exact denoiser was not told the caption. Each floor belongs to what is known: with the caption, it would be
#   lower still.
# - **Captions help on the left and do harm on the right** (0.118 down to 0.078; 0.118 up to 0.149). Without a
#   caption the network is as good on held-out pictures as on its own. With one, it believes to know which picture
#   is meant, and on the right that picture is another. This gap is what learning by heart looks like in a loss:
#   measure it on held-out pictures.
#
# And how does the loss fall while the pictures get better? The small model `tiny`, which draws coloured shapes,
# ships as it was after 500 and after 5,000 steps. Both draw from the same noise.

# %%
pixels, captions = minisd.data.shape_corpus(64 if full else 4)  # uint8 [64 32 32 3]: pictures of its training
shapes = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
prompts = ["a green triangle", "a blue square", "a yellow star", "a red circle", "a pink heart"]
folder = minisd.checkpoint.SHIPPED / "tiny"
drawings, labels = [], []
for name, path in {"500": folder / "after_000500_steps.safetensors", "5,000": "tiny"}.items():
    tiny = minisd.load(path)
    z = tiny.get_first_stage_encoding(tiny.encode_first_stage(shapes).mode())
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    value = mean_over_t(measure(tiny.apply_model, z, noise, tiny.get_learned_conditioning(captions)))
    drawing = tiny.txt2img(prompts, steps=20 if full else 2, guidance_scale=3.0, sampler="dpmpp_2m")
    drawings.append(drawing.pictures)  # [5 3 32 32]
    labels.append(f"{name} steps\nloss {value:.3f}")
viz.strip(drawings, prompts, labels)

# %% [markdown]
# In its first 500 steps the loss has gone from 1 to 0.070, more than nine tenths of the way, and there is nothing to
# see but blots. What tells blots from shapes are the small numbers after that. And the loss does not say what is still
# wrong at 0.036: the yellow star is pale, and no star. A loss is a bad judge of pictures: look at samples.
#
# ## The grey mean, once more
#
# One last look at the naive idea. Ask the model for $\hat x_0$, the whole picture in one step, from a noised fox at
# each $t$. Then ask the exact denoiser the same.

# %%
columns = torch.tensor([999, 900, 800, 700, 600, 400, 200, 50])
z = z_all[corpus.captions.index("fox, noto style") if full else 0].expand(len(columns), -1, -1, -1)
z_t = sd.schedule.q_sample(z, columns, torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5)).expand_as(z))
with torch.no_grad():
    eps = sd.apply_model(z_t, columns, sd.get_learned_conditioning([""] * len(columns)))
guesses = {
    "network,\nno caption": sd.schedule.predict_start_from_noise(z_t, columns, eps),
    "exact": exact.x0(z_t, columns),
}
shown = [sd.decode_first_stage(guess) for guess in guesses.values()]
viz.strip(shown, [f"t = {t}" for t in columns.tolist()], list(guesses), size=0.64)

# %% [markdown]
# At $t = 999$ both answer with a blur: the mean of what is possible, as at the start of this notebook. Training has
# not made that answer any sharper, and it can't. Sampling does, by asking again and again while the noise falls.
#
# Two differences are worth a look. At $t = 999$ the network's blur has dark strokes, and the exact one's has hardly
# any: this is a small error of $\epsilon$, multiplied by 14.6. And at $t = 700$ the exact denoiser shows the fox, where
# the network still shows a blur. It does not know the 1,081 pictures by heart, and that is why it can draw others.

# %%
print(f"This notebook took {time.time() - start:.0f} s.")

# %% [markdown]
# ## Recap
#
# - A squared error asks for a mean. From pure noise, the mean of all pictures is grey; small steps leave less open.
# - The bound compares each step of the model with the step of somebody who knows
#   $x_0$. For Gaussians of one width, that is the distance of two means, and with $x_t$ taken out, the error of the
#   noise.
# - $L_{simple}$ drops the bound's weights, which look after detail that nobody sees.
# - $\epsilon$, $v$ and $x_0$ are one answer. $\epsilon$ is hard at small $t$, $x_0$ at large $t$, $v$ nowhere free.
# - The loss has a floor above 0. A loss that sticks a little above it is a trained model; 1.0 is a model that
#   answers 0.
# - Weights such as min-SNR's say where a network should spend its effort. Losses with different weights can't be
#   compared.
# - Guidance subtracts the answer to the empty prompt. It must have been trained, hence text dropout.
#
# ## In the CompVis source
#
# All of it stands in `ldm/models/diffusion/ddpm.py`.
#
# | here | there |
# |---|---|
# | `epsilon_loss` | `DDPM.p_losses`, `LatentDiffusion.p_losses` with `parameterization="eps"`, `loss_type="l2"` |
# | `x0_loss` | the same with `parameterization="x0"` |
# | `v_loss` | has no counterpart; it came with Stable Diffusion 2 |
# | $t$ drawn for each picture | `DDPM.forward`, `LatentDiffusion.forward` |
# | `bound`, the weights of eq. 12 | `lvlb_weights` in `DDPM.register_schedule`; times `original_elbo_weight`, 0 |
# | $L_{simple}$ | `loss_simple`, times `l_simple_weight`, 1 |
# | `min_snr_gamma` | has no counterpart |
# | `text_dropout` | has no counterpart; the model card says 10% |
# | `LatentDiffusion.p_losses(x_start, cond, t, noise)` | the same name |
#
# One line there divides by $e^{\log\sigma_t^2}$ with `logvar` and adds it again. `logvar` is 0 and stays 0 unless
# `learn_logvar` is set: it changes nothing. The weights for `parameterization="x0"` read `2. * 1 - alphas_cumprod`, a
# missing pair of brackets; they are multiplied by 0.
#
# ## Try it
#
# - Give the moons ten times the noise (0.8 for 0.08 in `two_moons`). What becomes of the floor? And of its dip at
#   $t = 0$, if the data are ten times as many points?
# - Train `Guesser` with `minisd.v_loss`, and draw with it: which conversion must stand before the sampler?
# - Leave out $t$ (put `0 * t` into `phase`). How much does the loss rise, and why not more?
# - Exercises: [`exercises/02_loss.ipynb`](exercises/02_loss.ipynb), where you write `epsilon_loss`, `text_dropout`,
#   `min_snr_weight`, `predict_noise_from_v` and `loss_by_time`, and are told which mistake it is.
#
# Before: [01 · Noising](01_noising.ipynb). Next: [03 · UNet](03_unet.ipynb), the network that guesses the noise of
# a picture.
