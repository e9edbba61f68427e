# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2 · Loss: a network finds the noise
#
# A diffusion model is trained with one line: add noise to a picture, let a network find it, square the error. In this
# notebook you train such a model in seconds, see it draw, and learn to read its loss.
#
# At the end you can
#
# - explain why a network that has to find noise can draw, and one that has to draw can't;
# - write Stable Diffusion's training loss;
# - say which loss is normal, and why it hardly falls while the pictures get better;
# - explain why captions are left out now and then in training.
#
# About 55 minutes, with two exercises; it runs in about two minutes on a laptop.
#
# Before: [01](01_noising.ipynb), noising and the exact denoiser. After: [03](03_unet.ipynb), the network of Stable
# Diffusion. The module is [`minisd/loss.py`](../minisd/loss.py). In the browser:
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
import copy
import time
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import minisd
from minisd import viz
from minisd.coursework import check
from minisd.data import sample, shapes

full = MODE == "full"
start = time.time()
schedule = minisd.NoiseSchedule.scaled_linear()  # Stable Diffusion's
T = schedule.timesteps

# %% [markdown]
# ## Where we are

# %%
viz.pipeline("loss")

# %% [markdown]
# The loss is the last row in the trace of a training step. It compares the noise that was added with the noise that the
# UNet found:

# %% tags=["hide-input"]
sd = minisd.load()
corpus = sample(size=32)
fox = corpus.batch([corpus.captions.index("fox, noto style")])[0]  # [3 32 32]
print(*[row for row in minisd.trace(sd, "fox, noto style", image=fox, t=500) if row.stage == 2], sep="\n")

# %% [markdown]
# ## A world of 48 pictures
#
# To train in seconds, we need a small world: 48 pictures of 10×10 pixels, eight colours times six shapes.

# %%
named = [(colour, shape) for shape in shapes.SHAPES for colour in shapes.COLOURS]
scenes = [shapes.Scene("", "size", (shapes.Item(c, s, 0.5, 0.5, shapes.SIZES["large"]),)) for c, s in named]
world = torch.stack([torch.tensor(shapes.render(scene, 10)).permute(2, 0, 1) / 127.5 - 1 for scene in scenes])
print(f"world {list(world.shape)}, from {world.min():.0f} to {world.max():.0f}")
viz.strip(world.unflatten(0, (6, 8)), list(shapes.COLOURS), list(shapes.SHAPES), size=0.5)

# %% [markdown]
# We also need a network. It has three layers, and does not know what it will be used for: a picture and a timestep go
# in, something in the shape of a picture comes out. (`context` is for later.)


# %%
class Network(nn.Module):
    """x [b 3 10 10], t [b], context [b 1 d] or None -> [b 3 10 10]"""

    def __init__(self, context_size=0, width=256):
        super().__init__()
        sizes = [300 + 64 + context_size, width, width]
        hidden = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 300))
        self.gain = nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, x, t, context=None):
        # 64 sines and cosines of t, because a network can hardly read a single number up to 999 (notebook 03): [b 64]
        time = minisd.unet.timestep_embedding(t, 64)
        inputs = [x.flatten(1), time] + ([] if context is None else [context.flatten(1)])
        # The layers are narrower than a picture. So we add the input itself, times a number that depends on t.
        return self.layers(torch.cat(inputs, dim=1)).view_as(x) + self.gain(time)[..., None, None] * x


def train(network, loss_of, steps=1000):
    """The loop of every training: take some pictures, compute the loss, change the weights. Returns all losses."""
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps if full else 3):
        chosen = torch.randint(len(world), (48,))  # which pictures
        loss = loss_of(network, chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


# %% [markdown]
# ## First try: noise in, picture out
#
# We want a machine that turns noise into a picture. The obvious way is to train just that: each time fresh noise goes
# in, and a picture of our world is the target. The loss is the squared error.
#
# **Predict, then run.** What does this network draw after training, from eight different noises?


# %% tags=["hide-output"]
def noise_to_picture(network, chosen):
    noise = torch.randn_like(world[chosen])
    no_time = torch.zeros(len(chosen), dtype=torch.long)
    return (world[chosen] - network(noise, no_time)).square().mean()


torch.manual_seed(0)
painter = Network()
losses = train(painter, noise_to_picture)
eight = torch.randn(8, 3, 10, 10)
with torch.no_grad():
    painted = painter(eight, torch.zeros(8, dtype=torch.long))
mean = world.mean(0)  # [3 10 10]
print(f"loss of the network {losses[-100:].mean():.3f}, loss of the mean {(world - mean).square().mean():.3f}")
viz.strip([eight, painted, mean.expand_as(eight)], labels=["noise", "its answer", "mean of all"], size=0.6)

# %% [markdown]
# Nearly the same grey blur, whatever the noise. It is close to the mean of the 48 pictures (last row), and so is its
# loss. The network is not to blame. The noise does not say which picture it will be compared with, so one answer has to
# serve for all. The answer with the smallest squared error is their mean. **A squared error asks for a mean.** And the
# mean of many sharp pictures is a blur.
#
# ## Second try: find the noise
#
# Now we turn the task around. Take a picture, add noise to it, and ask the network **which noise that was**. Why is
# this enough to draw?
#
# 1. **Examples cost nothing.** We add the noise ourselves with `q_sample`, so we know the right answer. One picture
#    gives as many examples as we like.
# 2. **If you know the noise, you know the picture** (notebook 01). So the answer is an estimate of the picture, too.
# 3. **We can ask again.** The answer is still a mean: the mean of all pictures that are possible for this $x_t$. Under
#    much noise that is a blur again. But we do not stop there. We remove a *little* of the noise and ask again, and
#    then fewer pictures are possible. Step by step, the blur becomes one picture.
#
# The network, the pictures, the training loop and the squared error stay the same. Only the question is new:


# %%
def find_the_noise(network, chosen):
    x_0 = world[chosen]  # [b 3 10 10]
    t = torch.randint(0, T, (len(x_0),))  # for each picture a random timestep, [b]
    noise = torch.randn_like(x_0)
    x_t = schedule.q_sample(x_0, t, noise)  # notebook 01
    return (noise - network(x_t, t)).square().mean()


torch.manual_seed(0)
model = Network()
losses = train(model, find_the_noise)
print(f"loss: {losses[0]:.2f} at the first step, {losses[-100:].mean():.3f} at the end")

# %% [markdown]
# To draw, we start from pure noise at $t = 999$ and repeat three lines: ask for the noise, compute the picture that it
# means, and add the same noise to this picture again, but a little less of it. (This is the sampler DDIM; notebook 06.)
#
# **Predict, then run.** Same network, same pictures, same squared error. Does it draw a blur again?


# %% tags=["hide-output"]
@torch.no_grad()
def draw(network, x, steps=25, context=None):
    """Returns x_t and the estimate of the picture at each step, [steps b 3 10 10] each."""
    timesteps = torch.linspace(T - 1, 0, steps if full else 3).long()
    path, estimates = [], []
    for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
        path.append(x)
        noise = network(x, t.expand(len(x)), context)  # ask for the noise,
        x_0 = schedule.predict_start_from_noise(x, t.expand(len(x)), noise)  # compute the picture that it means,
        x = x_0 if t_next is None else schedule.q_sample(x_0, t_next.expand(len(x)), noise)  # add less noise again
        estimates.append(x_0)
    return torch.stack(path), torch.stack(estimates)


path, estimates = draw(model, eight)
columns = [0, 3, 6, 9, 12, 15, 18, 21, 24] if full else [0, 1, 2]
rows = [path[columns, 0], estimates[columns, 0], estimates[-1]]
labels = ["$x_t$", r"$\hat x_0$, the" "\nestimate", "all eight\ndrawings"]
viz.strip(rows, [f"step {i + 1}" for i in columns], labels, size=0.6)

# %% [markdown]
# It draws. The first two rows follow one drawing. At step 1 the estimate is rough, because at $t = 999$ an error of the
# noise is multiplied by 14.6 (notebook 01). A few steps later it is a blur, as before. Then some pictures become
# impossible, the blur gets a colour and a shape, and in the end one picture is left. The third row shows what became of
# the eight noises: pictures of our world, with small faults. That is the whole method. Stable Diffusion does the same
# with a better network, on latents, and with a text.
#
# ## The equation
#
# Now we can write it down. $\epsilon_\theta(x_t, t, c)$ is the network's output for the noisy picture $x_t$ at timestep
# $t$; $\theta$ are its weights, and $c$ is the context (the text, if there is one). The loss of DDPM and of Stable
# Diffusion is
#
# $$L_{simple} = \mathbb E_{x_0, t, \epsilon}\,\Big\|\epsilon - \epsilon_\theta\big(
#   \underbrace{\sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon}_{x_t},\; t,\; c\big)\Big\|^2
#   \qquad \text{(DDPM, eq. 14)}$$
#
# $\mathbb E$ means: the mean over random pictures, timesteps and noises. In code it is the mean over a batch, and over
# all numbers of a picture. This is algorithm 1 of [the paper](https://arxiv.org/abs/2006.11239), beside our code:
#
# | DDPM, algorithm 1 | in the code above |
# |---|---|
# | repeat | `for _ in range(steps)` |
# | $x_0 \sim q(x_0)$ | `chosen = torch.randint(…)`, `x_0 = world[chosen]` |
# | $t \sim \mathrm{Uniform}(\{1, \dots, T\})$ | `t = torch.randint(0, T, …)` (we count from 0) |
# | $\epsilon \sim \mathcal N(0, I)$ | `noise = torch.randn_like(x_0)` |
# | gradient step on $\lVert\epsilon - \epsilon_\theta(x_t, t)\rVert^2$ | `loss.backward()`, `optimizer.step()` |
#
# Where does this loss come from? We did not need a derivation, but there is one: see the section *Optional: from the
# bound to the loss*.

# %% [markdown]
# ### Write it yourself: `epsilon_loss`
#
# essential · about 15 minutes
#
# Write the loss for any model and any pictures, with $\bar\alpha_t$ in `alphas_cumprod`. Here `t` and `noise` come in
# as arguments, so that the check can compare.

# %% tags=["exercise"]
def epsilon_loss(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_0: Float[Tensor, "b c h w"],
    context: Float[Tensor, "b n d"],
    t: Int[Tensor, "b"],
    noise: Float[Tensor, "b c h w"],
    alphas_cumprod: Float[Tensor, "T"],
) -> Float[Tensor, ""]:
    """The training loss of Stable Diffusion: the mean squared error of the predicted noise.

        L_simple = E ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t, c)‖²              (DDPM, eq. 14)

    model(x_t, t, context) predicts the noise. Returns one number, the mean over everything, from which gradients flow
    back to the model.
    """
    raise NotImplementedError  # your code here


check.epsilon_loss(epsilon_loss)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
# x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
# prediction = model(x_t, t, context)
# return (noise - prediction).square().mean()
# ```
#
# </details>

# %% [markdown]
# ## Which loss is normal?
#
# People often ask: "My loss sticks at 0.1 (or 0.3, or 1.0). Is that normal?" In our world we can answer, because we
# know the best possible loss: that of the exact denoiser (notebook 01). It is not 0. Several pictures and noises can
# lead to the same $x_t$, and nobody can know which it was. We call the best possible loss the **floor**.
#
# **Predict, then run.** What is the loss of a network that always answers 0? And at which $t$ is our network's loss
# largest?

# %% tags=["hide-output"]
exact = minisd.ExactDenoiser(world, schedule)
generator = torch.Generator().manual_seed(2)
probe_0 = world.repeat(10, 1, 1, 1)  # [480 3 10 10]
probe_noise = torch.randn(probe_0.shape, generator=generator)  # the same for all models and all t
timesteps = [0, 10, 25, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999] if full else [0, 999]


@torch.no_grad()
def loss_by_t(model, x_0=probe_0, noise=probe_noise, context=None, schedule=schedule):
    """The package's loss of a model at each of `timesteps`."""
    at = [torch.full((len(x_0),), t) for t in timesteps]
    return torch.stack([minisd.epsilon_loss(model, schedule, x_0, context, t, noise) for t in at])


def mean_over_t(values):
    """What the mean over all t would be, from straight lines between `timesteps`."""
    return torch.trapezoid(values, torch.tensor(timesteps).float()) / (T - 1)


def copies_x_t(x, t, context):
    return (1 - schedule.alphas_cumprod[t, None, None, None]).sqrt() * x  # the best multiple of x_t


def answers_0(x, t, context):
    return torch.zeros_like(x)


by_model = {"answers 0": answers_0, "copies x_t": copies_x_t, "our network": model, "exact (the floor)": exact}
by_model = {name: loss_by_t(answer) for name, answer in by_model.items()}
for name, values in by_model.items():
    print(f"{name:18} mean loss over all t: {mean_over_t(values):.3f}")
smooth = losses.unfold(0, min(25, len(losses)), 1).mean(1)
panels = {
    "while training (mean of 25 steps)": {"loss": (torch.arange(len(smooth)), smooth)},
    "after training, by t": {name: (timesteps, by_model[name]) for name in ("copies x_t", "our network")},
}
floors = {"after training, by t": (timesteps, by_model["exact (the floor)"])}
figure = viz.curves(panels, "step, or t", "loss", list(panels), floors, "the floor", width=3.4)
figure.axes[-1].set_ylim(1e-4, 2)
figure

# %% [markdown]
# - **1.0 is the loss of a network that answers 0**, because the noise has variance 1. If your loss stays there, the
#   network learns nothing: a wrong learning rate, or a target that does not belong to the input.
# - **It falls fast at first.** Under much noise, $x_t$ is nearly the noise. To copy it is quickly learned.
# - **Then it seems to stop, and that is normal.** What still improves is small, and the random $t$ of each batch hide
#   it.
# - **The loss is largest at small $t$.** Where there is hardly any noise, it is hard to tell from the picture. At large
#   $t$ it is all there is. (Only the exact denoiser finds small $t$ easy, because it knows the 48 pictures by heart.)
#
# Now the model that ships. We measure it on pictures of its training and on pictures that were held out, with the right
# caption and with none. (The exact denoiser knows the training pictures only.)

# %% tags=["hide-input"]
rows = corpus.rows if full else corpus.rows[:60]
seen = [i for i, row in enumerate(rows) if row["split"] == "train"]
unseen = [i for i, row in enumerate(rows) if row["split"] != "train"]
small = sample(size=sd.config.image_size)


def latents(indices):
    return sd.get_first_stage_encoding(sd.encode_first_stage(small.batch(indices)).mode())  # no noise of its own


z_all = torch.cat([latents(range(i, min(i + 128, len(rows)))) for i in range(0, len(rows), 128)])  # [n 4 h w]
knows_all = minisd.ExactDenoiser(z_all[seen], sd.schedule)  # knows the training pictures of the sample, and no others

n, timesteps = (64, [0, 20, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999]) if full else (4, [0, 999])
panels, floors = {}, {}
for title, indices in {"pictures of the training": seen, "held-out pictures": unseen}.items():
    indices = indices[:: max(1, len(indices) // n)][:n]
    z = z_all[indices]
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    lines = {}
    for name, texts in {"with its caption": [corpus.captions[i] for i in indices], "no caption": [""] * n}.items():
        lines[name] = loss_by_t(sd.apply_model, z, noise, sd.get_learned_conditioning(texts[: len(z)]), sd.schedule)
    floors[title] = (timesteps, loss_by_t(knows_all, z, noise, None, sd.schedule))
    panels[title] = {name: (timesteps, y) for name, y in lines.items()}
    print(f"\n{title}\n{'t':>16}  " + "  ".join(f"{t:5d}" for t in timesteps))
    for name, y in [*lines.items(), ("exact", floors[title][1])]:
        print(f"{name:>16}  " + "  ".join(f"{v:5.3f}" if v < 10 else f"{v:5.0f}" for v in y.tolist()))
    print(f"mean over t:     {', '.join(f'{name} {mean_over_t(y):.3f}' for name, y in lines.items())}")
    w = minisd.loss.min_snr_weight(sd.schedule.snr(torch.tensor(timesteps)), 5.0)
    print(f"min-SNR weights: {', '.join(f'{name} {mean_over_t(w * y):.3f}' for name, y in lines.items())}")

figure = viz.curves(panels, "t", "loss", list(panels), floors, "exact, knows the training pictures", width=3.4)
for axes in figure.axes:
    axes.set_ylim(5e-4, 1e3)
figure

# %% [markdown]
# - **Nobody wants to reach the floor.** Up to $t = 300$ the exact denoiser recognises the training picture without
#   fail. A network that does so has memorised its data. On held-out pictures (right) the exact denoiser fails at small
#   and middle $t$: it explains the difference from the nearest picture that it knows as noise. The network has learned
#   what pictures look like in general.
# - **With its caption, the network gets below the floor at large $t$** (left). That is possible because the exact
#   denoiser does not know the caption.
# - **Captions help on the training pictures and hurt on the held-out ones.** With a caption the network believes that
#   it knows which picture is meant, and on the right it is another one. This gap is what memorising looks like in a
#   loss.
# - **Weights change the number.** The last line is the same model, with each $t$ weighted as in its training (see
#   *Optional: min-SNR weights*). So before you compare two losses, ask for the weights.
#
# Does a lower loss mean better pictures? The small model `tiny` ships as it was after 500 and after 5,000 steps.

# %% tags=["hide-input"]
pixels, captions = minisd.data.shape_corpus(64 if full else 4)  # uint8 [64 32 32 3]: pictures of its training
pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
prompts = ["a green triangle", "a blue square", "a yellow star", "a red circle", "a pink heart"]
folder = minisd.checkpoint.SHIPPED / "tiny"
drawings, labels = [], []
for name, checkpoint in {"500": folder / "after_000500_steps.safetensors", "5,000": "tiny"}.items():
    tiny = minisd.load(checkpoint)
    z = tiny.get_first_stage_encoding(tiny.encode_first_stage(pictures).mode())
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    context = tiny.get_learned_conditioning(captions)
    value = mean_over_t(loss_by_t(tiny.apply_model, z, noise, context, tiny.schedule))
    drawing = tiny.txt2img(prompts, steps=20 if full else 2, guidance_scale=3.0, sampler="dpmpp_2m")
    drawings.append(drawing.pictures)  # [5 3 32 32]
    labels.append(f"{name} steps\nloss {value:.3f}")
viz.strip(drawings, prompts, labels)

# %% [markdown]
# After 500 steps the loss has fallen from 1 to 0.07, more than nine tenths of the way, and there are little more than
# blots. The difference between blots and shapes is in the small numbers after that. And the last loss does not tell
# that the star is still wrong. **Judge a model by its pictures.**
#
# ## Leave the caption out, now and then
#
# Until now our network drew what it liked. To ask for something, we give it a context $c$: here a vector with a 1 for
# the colour and a 1 for the shape. In Stable Diffusion it is the text encoder's output (notebook 05).
#
# There is one more trick. When drawing, [guidance](../docs/glossary.md) asks the network twice, with the context and
# with an empty one, written $\varnothing$, and exaggerates the difference (notebook 06):
#
# $$\hat\epsilon = \epsilon_\theta(x_t, t, \varnothing) +
#   s\,\big(\epsilon_\theta(x_t, t, c) - \epsilon_\theta(x_t, t, \varnothing)\big)$$
#
# So the network needs an answer to the empty context, and it has one only if it was trained with it. This is why one
# context in ten is replaced by the empty one in training ([Ho & Salimans 2022](https://arxiv.org/abs/2207.12598)).

# %% [markdown]
# ### Write it yourself: `text_dropout`
#
# worth it · about 10 minutes
#
# Replace the context by the empty one for those pictures where `drop` is true.

# %% tags=["exercise"]
def text_dropout(
    context: Float[Tensor, "b n d"], empty_context: Float[Tensor, "1 n d"], drop: Bool[Tensor, "b"]
) -> Float[Tensor, "b n d"]:
    """Forget some captions: where `drop` is set, the context of the empty prompt takes the place of the caption's.

    The network so learns to draw without a prompt, too, as guidance needs. (Ho & Salimans 2022, algorithm 1)
    """
    raise NotImplementedError  # your code here


check.text_dropout(text_dropout)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# return torch.where(drop[:, None, None], empty_context, context)
# ```
#
# </details>

# %% [markdown]
# Now the package's version at work. The training is the same as before, with a context.

# %%
colours, kinds = list(shapes.COLOURS), list(shapes.SHAPES)
words = torch.zeros(48, 1, 14)  # [48 1 14]: a context of one token for each picture
for i, (colour, shape) in enumerate(named):
    words[i, 0, colours.index(colour)] = words[i, 0, 8 + kinds.index(shape)] = 1
no_words = torch.zeros(1, 1, 14)


def with_context(network, chosen):
    context = minisd.text_dropout(words[chosen], no_words, torch.rand(len(chosen)) < 0.1)
    return minisd.epsilon_loss(network, schedule, world[chosen], context)  # draws t and noise itself


torch.manual_seed(0)
conditional = Network(context_size=14)
train(conditional, with_context)

asked = ["red circle", "orange square", "green triangle", "blue diamond", "orange star", "black heart"]
context = words[[named.index(tuple(name.split())) for name in asked]]
guided = minisd.classifier_free_guidance(conditional, context, no_words, 3.0)  # the equation above, with s = 3
rows = {
    "empty context": draw(conditional, eight[:6], context=no_words.expand(6, -1, -1)),
    "context": draw(conditional, eight[:6], context=context),
    "guidance, s = 3": draw(lambda x, t, _: guided(x, t).eps, eight[:6]),
}
drawings = [estimates[-1] for _, estimates in rows.values()]
viz.strip(drawings, [name.replace(" ", "\n") for name in asked], list(rows), size=0.6)

# %% [markdown]
# All three rows start from the same noise. With the empty context, the noise decides what is drawn. With the context,
# most shapes are those that we asked for, and the colours nearly; the star is a round blob. Guidance exaggerates what
# the context changes. Now the star is a star, and the colours are right, too.
#
# ## One answer in three forms
#
# A network can be asked for something else than the noise: for the picture $x_0$, or for the
# [velocity](../docs/glossary.md) $v = \sqrt{\bar\alpha_t}\,\epsilon - \sqrt{1-\bar\alpha_t}\,x_0$. Because $x_t$ is
# known, each of the three can be computed from each other one. They differ in how errors count: a wrong $\epsilon$
# ruins the picture at large $t$ (notebook 01), a wrong $x_0$ ruins the noise at small $t$, and $v$ has neither problem.
# Stable Diffusion v1 predicts $\epsilon$, the 768-pixel version of v2 predicts $v$.
#
# ## What you know now
#
# - A squared error asks for a mean. From pure noise, that is a blur.
# - A network that finds the noise can draw, because it is asked again and again while the noise falls.
# - The loss is the mean squared error of the noise, at random timesteps.
# - A loss of 1 is that of the answer 0. The floor is above 0. Losses can be compared only if everything else is the
#   same.
# - Guidance needs the answer to the empty context. So some captions are left out in training.
#
# **More exercises** in [`exercises/02_loss.ipynb`](exercises/02_loss.ipynb): `min_snr_weight` (10 minutes),
# `predict_noise_from_v` (15) and `loss_by_time` (10). To look something up, see [`docs/loss.md`](../docs/loss.md),
# which has the names in the CompVis source, too.
#
# **Next**: three layers are enough for 48 tiny pictures. For real ones the network must see edges and shapes wherever
# they are, and connect them with words. That is the UNet, in [03 · UNet](03_unet.ipynb).

# %% [markdown]
# ## Optional: from the bound to the loss
#
# A good model makes the real pictures probable. That probability can't be computed, because a picture can be reached by
# infinitely many walks. But there is a bound for it, the evidence lower bound ([ELBO](../docs/glossary.md)). For
# Gaussian steps the bound is our squared error, with another weight for each $t$. DDPM dropped the weights, because the
# pictures got better.
#
# <details><summary>Optional: the derivation</summary>
#
# The model starts from $p(x_T) = \mathcal N(0, I)$, and each step is a Gaussian whose mean comes from the network:
#
# $$p_\theta(x_{t-1} \mid x_t) = \mathcal N\big(\mu_\theta(x_t, t),\; \sigma_t^2 I\big) \qquad \text{(DDPM, eq. 1)}$$
#
# We want $-\log p_\theta(x_0)$ to be small for real pictures. It is an integral over all walks that lead to $x_0$. We
# can write it as a mean over the walks of notebook 01, from the picture to the noise, which are easy to sample. The
# logarithm of a mean is at least the mean of the logarithm (Jensen's inequality), so
#
# $$-\log p_\theta(x_0) = -\log \mathbb E_q\!\left[\frac{p_\theta(x_{0:T})}{q(x_{1:T} \mid x_0)}\right]
#   \;\le\; \mathbb E_q\!\left[-\log \frac{p_\theta(x_{0:T})}{q(x_{1:T} \mid x_0)}\right] =: L
#   \qquad \text{(DDPM, eq. 3)}$$
#
# Both walks are products of $T$ steps. By Bayes' rule, each forward step is
#
# $$q(x_t \mid x_{t-1}) = q(x_{t-1} \mid x_t, x_0)\,q(x_t \mid x_0)\,/\,q(x_{t-1} \mid x_0)$$
#
# The last two factors cancel between neighbouring steps, except the first and the last. What remains is a sum of KL
# divergences (notebook 01):
#
# $$L = \mathbb E_q\Big[\underbrace{D_{KL}\big(q(x_T \mid x_0)\,\|\,p(x_T)\big)}_{L_T}
#  + \sum_{t>1} \underbrace{D_{KL}\big(q(x_{t-1} \mid x_t, x_0)\,\|\,p_\theta(x_{t-1} \mid x_t)\big)}_{L_{t-1}}
#  \underbrace{{}-\log p_\theta(x_0 \mid x_1)}_{L_0}\Big] \qquad \text{(DDPM, eq. 5)}$$
#
# Each term compares a step of the model with the step back of somebody who knows the picture (`q_posterior`, notebook
# 01, *Optional: one step back*). Six steps lead from here to the loss in use:
#
# 1. Drop $L_T$: nothing in it can be learned.
# 2. Fix the variance, $\sigma_t^2 = \tilde\beta_t$. With many small steps it hardly matters (Improved DDPM,
#    [section 3.1](https://arxiv.org/abs/2102.09672)).
# 3. Compute $\mu_\theta$ from $x_t$ and an estimate of the noise, because $x_t$ is known.
# 4. Set the weight of each $t$ to 1. Then it is no bound any more, but the pictures get better.
# 5. Treat $L_0$ like the others.
# 6. Replace the sum over $t$ by one random $t$. On average it is the same, except for a factor.
#
# Steps 2 and 3 are a calculation. The KL of two Gaussians with the same variance is
# $\|\tilde\mu-\mu_\theta\|^2/2\sigma^2$ (DDPM, eq. 8). Put
#
# $$x_0 = (x_t - \sqrt{1-\bar\alpha_t}\,\epsilon)/\sqrt{\bar\alpha_t}$$
#
# into $\tilde\mu_t$ of notebook 01, and give the network the same form:
#
# $$\tilde\mu_t = \frac{1}{\sqrt{\alpha_t}}\Big(x_t - \frac{\beta_t}{\sqrt{1-\bar\alpha_t}}\,\epsilon\Big), \qquad
#   \mu_\theta = \frac{1}{\sqrt{\alpha_t}}\Big(x_t - \frac{\beta_t}{\sqrt{1-\bar\alpha_t}}\,\epsilon_\theta(x_t, t)\Big)
#   \qquad \text{(DDPM, eq. 10, 11)}$$
#
# In the difference, $x_t$ cancels, and the error of the noise is left:
#
# $$L_{t-1} = \underbrace{\frac{\beta_t^2}{2\,\tilde\beta_t\,\alpha_t\,(1-\bar\alpha_t)}}_{\text{weight}}\;
#   \big\|\epsilon - \epsilon_\theta(x_t, t)\big\|^2 \qquad \text{(DDPM, eq. 12)}$$
#
# </details>
#
# A check, with a single number as the picture, one step, and a network whose answer is wrong by 0.3. The KL divergence
# between the right step and that of the network is computed in three ways: as a sum of $q\,\log(q/p)$ over a fine grid,
# from the two means, and from the error of the noise.

# %%
beta, alpha, alpha_bar = schedule.betas.double(), 1 - schedule.betas.double(), schedule.alphas_cumprod.double()
bound = torch.full((T,), torch.nan, dtype=torch.float64)  # eq. 12's weight; from t = 1 on, since β̃_0 is 0
bound[1:] = (beta**2 / (2 * schedule.posterior_variance.double() * alpha * (1 - alpha_bar)))[1:]

x_0, noise, t = torch.tensor([0.6]).double(), torch.tensor([-0.8]).double(), torch.tensor([100])
x_t = schedule.q_sample(x_0, t, noise)
answer = noise + 0.3  # what a network might say

mean, variance, _ = schedule.q_posterior(x_0, x_t, t)  # of the step by somebody who knows x_0
mean_theta, _, _ = schedule.q_posterior(schedule.predict_start_from_noise(x_t, t, answer), x_t, t)  # by the network
eq_10 = (x_t - beta[t] / (1 - alpha_bar[t]).sqrt() * noise) / alpha[t].sqrt()
torch.testing.assert_close(mean, eq_10, rtol=1e-5, atol=0)

q, p = (torch.distributions.Normal(m, variance.sqrt()) for m in (mean, mean_theta))
x = mean + variance.sqrt() * torch.linspace(-12, 12, 100_001, dtype=torch.float64)
by_sum = (q.log_prob(x).exp() * (q.log_prob(x) - p.log_prob(x))).sum() * (x[1] - x[0])  # Σ q log(q/p) Δx
by_means = (mean - mean_theta) ** 2 / (2 * variance)  # eq. 8
by_noise = bound[t] * (noise - answer) ** 2  # eq. 12
for name, value in {"sum over a grid": by_sum, "means, eq. 8": by_means, "noise, eq. 12": by_noise}.items():
    print(f"KL from the {name:16} {value.item():.7f}")

# %% [markdown]
# **Predict, then run.** The loss in use replaces the weights of the bound by 1. Where were they largest: where the
# picture is nearly clean, or where it is nearly noise?

# %% tags=["hide-output"]
times = torch.arange(1, T)
snr = schedule.snr(times).double()
weights = {  # the same loss, written as a weight of the error of ε, and of the error of x_0
    "weight of the error of $\\epsilon$": {"the bound": (times, bound[1:]), "$L_{simple}$": (times, torch.ones(T - 1))},
    "weight of the error of $x_0$": {"the bound": (times, bound[1:] * snr), "$L_{simple}$": (times, snr)},
}
share = bound[1:].cumsum(0) / bound[1:].sum()
print(f"weights of the bound: {bound[1]:.3f} at t = 1, {bound[100]:.4f} at t = 100, {bound[600]:.4f} at t = 600")
print(f"half of all the bound's weight lies at t <= {int((share > 0.5).int().argmax()) + 1}")
viz.curves(weights, log=list(weights), width=3.4, height=2.4)

# %% [markdown]
# Where it is nearly clean, by a factor of a hundred. There the step back is narrow, so a small error is already
# improbable. Nobody sees such faint noise, but to a likelihood each bit of each pixel counts. $L_{simple}$ leaves the
# network to care for shapes and colours. DDPM reports better pictures and worse likelihoods (table 1; section 4.3: more
# than half of the bits of a picture are detail that nobody sees).
#
# Weights do not change the *best possible* answer, which is always the mean $\mathbb E[\epsilon \mid x_t]$. They say
# where a real network should spend its effort.
#
# ## Optional: why not ask for the picture one step before?
#
# That would be a small step, too: $x_t$ in, $x_{t-1}$ out. The table compares the best possible answer with a network
# that has learned nothing and returns its input.

# %%
torch.manual_seed(0)
chosen = torch.randint(len(world), (512 if full else 8,))
print("  t    target²     copying x_t    the best possible    to be gained")
for t in (10, 100, 400, 800):
    here, before = torch.full_like(chosen, t), torch.full_like(chosen, t - 1)
    x_prev = schedule.q_sample(world[chosen], before, torch.randn(len(chosen), 3, 10, 10))  # x_{t-1}
    beta_t = schedule.betas[t]
    x_t = (1 - beta_t).sqrt() * x_prev + beta_t.sqrt() * torch.randn_like(x_prev)  # one small step
    # the best: the mean of x_{t-1}, from x_t and from the best estimate of x_0 (notebook 01)
    best, _, _ = schedule.q_posterior(exact.x0(x_t, here), x_t, here)
    copied, floor = (x_prev - x_t).square().mean(), (x_prev - best).square().mean()
    target, gain = x_prev.square().mean(), 1 - floor / copied
    print(f"{t:3d}    {target:.4f}      {copied:.6f}        {floor:.6f}            {gain:6.1%}")

# %% [markdown]
# ("target²" is what the answer 0 would cost.) At large $t$, a network that has learned *nothing* is within a percent of
# the best. Nearly all of $x_{t-1}$ can be read off $x_t$, and most of the rest is fresh noise, which nobody can know.
# To ask for the noise is to ask only for the small part in between.
#
# ## Optional: points in the plane
#
# Let the "pictures" be points in the plane, `[b 2]`: two moons. Nothing in `minisd` has to change, and we can see
# everything that the network has learned.


# %%
def two_moons(n, generator):
    which = torch.arange(n) % 2  # 0: the upper moon, 1: the lower one
    angle = torch.pi * torch.rand(n, generator=generator)
    side = 1 - 2 * which
    points = torch.stack([side * angle.cos() + which, side * angle.sin() + which / 2], dim=1)
    points = points + 0.08 * torch.randn(n, 2, generator=generator)
    # mean 0 and variance 1, as for latents (notebook 04)
    return (points - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5]), which


class PointNetwork(nn.Module):
    """x [b 2], t [b], context [b n d] or None -> [b 2]"""

    def __init__(self, context_size=0, width=128):
        super().__init__()
        self.frequencies = torch.exp(torch.linspace(0, 6, 16))
        sizes = [2 + 32 + context_size, width, width, width]
        hidden = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x, t, context=None):
        phase = t[:, None] / T * self.frequencies  # [b 16]
        inputs = [x, phase.sin(), phase.cos()] + ([] if context is None else [context.flatten(1)])
        return self.net(torch.cat(inputs, dim=1))


def train_points(model, loss_of, steps=3000, keep=()):
    """Returns the loss of each step, and copies of the model as it was after the steps in `keep`."""
    steps = steps if full else 5
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)  # smaller and smaller steps, down to 0
    losses, kept = [], {}
    for step in range(1, steps + 1):
        loss = loss_of(model, torch.randint(len(moons), (512,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
        if step in keep:
            kept[f"after {step} steps"] = copy.deepcopy(model)
    return torch.tensor(losses), kept


moons, which = two_moons(2000 if full else 100, torch.Generator().manual_seed(0))
print(f"moons {list(moons.shape)}, mean {moons.mean():.2f}, variance {moons.var(0).mean():.2f}")
torch.manual_seed(0)
model = PointNetwork()
keep = (100, 500) if full else (1, 2)
losses, kept = train_points(model, lambda m, chosen: minisd.epsilon_loss(m, schedule, moons[chosen]), keep=keep)
kept[f"after {len(losses)} steps"] = model
print(f"loss: {losses[0]:.3f} at the first step, {losses[-500:].mean():.3f} in the last 500")

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
# The orange arrows are $-\epsilon_\theta(x_t, t)$, the way out of the noise; the broad pale ones are the exact answer;
# grey are the data, noised to the same $t$. (Long arrows are cut to one length.) At $t = 800$ all arrows point to the
# middle: the grey mean again. As the noise falls, they turn to the nearer moon. Where there are no grey points, the
# learned arrows may be wrong, because training never went there.
#
# This field has a name. $-\mathbb E[\epsilon \mid x_t]/\sqrt{1-\bar\alpha_t}$ is the [score](../docs/glossary.md),
# $\nabla_{x_t} \log q(x_t)$: the direction in which the noised data become more probable most quickly. We check it with
# the gradient of $\log q(x_t)$, computed by PyTorch.

# %%
for t in (800, 300, 100):
    a = schedule.alphas_cumprod[t].double()
    x = places.double().requires_grad_()
    squares = (x[:, None] - a.sqrt() * moons).square().sum(-1)  # [81 2000]
    log_q = torch.logsumexp(-squares / (2 * (1 - a)), dim=1)  # log q(x_t), except for a constant, [81]
    (score,) = torch.autograd.grad(log_q.sum(), x)  # [81 2]
    from_noise = -exact(places, torch.full((len(places),), t)) / (1 - a).sqrt()
    apart = (score - from_noise).abs().max()
    print(f"t = {t}: the score is up to {score.norm(dim=1).max():5.2f} long; the two differ by {apart:.0e} at most")

# %% [markdown]
# And it draws moons:

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
# For the moons the floor is high, so that the loss seems not to move at all. Yet it is **the floor plus the squared
# distance from the exact answer**, and only the second part can be learned:

# %%
probes = 2000 if full else 20
timesteps = [0, 3, 8, 15, 30, 60, 100, 200, 300, 400, 500, 650, 800, 999] if full else [0, 999]
probe = torch.Generator().manual_seed(2)
probe_0 = moons[torch.randint(len(moons), (probes,), generator=probe)]
probe_noise = torch.randn(probes, 2, generator=probe)
probe_noise = probe_noise / probe_noise.square().mean().sqrt()  # variance 1, so that the answer 0 costs 1.000


@torch.no_grad()
def above_the_floor(model):
    """The squared distance of a model from the exact answer, at each of `timesteps`."""
    distances = []
    for t in (torch.full((probes,), t) for t in timesteps):
        x_t = schedule.q_sample(probe_0, t, probe_noise)
        distances.append((model(x_t, t, None) - exact(x_t, t)).square().mean())
    return torch.stack(distances)


floor = loss_by_t(exact, probe_0, probe_noise)
by_model = {name: loss_by_t(m, probe_0, probe_noise) for name, m in kept.items()}
above = {name: above_the_floor(m) for name, m in kept.items()}
print(f"{'the floor':18} mean loss {mean_over_t(floor):.3f}")
for name, values in by_model.items():
    print(f"{name:18} mean loss {mean_over_t(values):.3f}, squared distance {mean_over_t(above[name]):.3f}")
panels = {
    "loss": {name: (timesteps, y) for name, y in by_model.items()},
    "squared distance from the exact answer": {name: (timesteps, y) for name, y in above.items()},
}
viz.curves(panels, exact={"loss": (timesteps, floor)}, exact_label="the floor", width=3.4)

# %% [markdown]
# (The floor dips at the far left: there the noise is hardly larger than the distance between neighbouring points, and
# the exact denoiser begins to recognise each point.)
#
# ## Optional: one answer in three forms
#
# $\bar\alpha_t$ and $1-\bar\alpha_t$ sum to 1, so their roots are the cosine and the sine of an angle, and $(x_t, v)$
# is $(x_0, \epsilon)$ turned by it. Turning it back is as short ([Salimans & Ho
# 2022](https://arxiv.org/abs/2202.00512), appendix D):
#
# $$x_0 = \sqrt{\bar\alpha_t}\,x_t - \sqrt{1-\bar\alpha_t}\,v, \qquad
#   \epsilon = \sqrt{1-\bar\alpha_t}\,x_t + \sqrt{\bar\alpha_t}\,v$$
#
# **Predict, then run.** Let a network be wrong by the same small amount in each form (noise with a standard deviation
# of 0.1). Which form gives the worst picture at $t = 999$?

# %% tags=["hide-output"]
columns = torch.tensor([50, 300, 600, 850, 999])  # timesteps
x_0 = fox.expand(len(columns), -1, -1, -1)  # [5 3 32 32]
noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)).expand_as(x_0)
x_t = schedule.q_sample(x_0, columns, noise)
v = schedule.get_v(x_0, noise, columns)
torch.testing.assert_close(schedule.predict_start_from_v(x_t, columns, v), x_0, rtol=0, atol=1e-4)
torch.testing.assert_close(schedule.predict_noise_from_v(x_t, columns, v), noise, rtol=0, atol=1e-4)

wrong = 0.1 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1))
rows = {
    "$x_t$": x_t,
    "$v$": v,
    r"from $\epsilon$": schedule.predict_start_from_noise(x_t, columns, noise + wrong),
    "from $v$": schedule.predict_start_from_v(x_t, columns, v + wrong),
    "from $x_0$": x_0 + wrong,
}
errors = [[f"error {e:.2f}" for e in (p - x_0).square().mean((1, 2, 3)).sqrt()] for p in list(rows.values())[2:]]
viz.strip(list(rows.values()), [f"t = {t}" for t in columns.tolist()], list(rows), [[], [], *errors], size=0.64)

# %% [markdown]
# The form $\epsilon$: its error is multiplied by 14.6. From $x_0$ it is the noise that suffers: at $t = 0$, an error of
# $x_0$ is multiplied by 34. $v$ is never multiplied by more than 1. ($v$ turns from noise into the *negative* of the
# picture.)
#
# And how hard is each to find? The floors of the moons, each as a share of what the answer 0 would cost:

# %%
exact_in = {
    r"$\epsilon$": (minisd.epsilon_loss, exact),
    "$v$": (minisd.v_loss, lambda x, t, context: schedule.get_v(exact.x0(x, t), exact(x, t), t)),
    "$x_0$": (minisd.x0_loss, lambda x, t, context: exact.x0(x, t)),
}
shares = {}
for symbol, (loss, answer) in exact_in.items():
    at = [torch.full((probes,), t) for t in timesteps]
    best = torch.stack([loss(answer, schedule, probe_0, None, t, probe_noise) for t in at])
    zero = torch.stack([loss(answers_0, schedule, probe_0, None, t, probe_noise) for t in at])
    shares[symbol] = (timesteps, best / zero)
viz.curves({"what nobody can know": shares}, ylabel="share", width=4, height=2.2)

# %% [markdown]
# $\epsilon$ is hard at small $t$, $x_0$ at large $t$. $v$ is like $\epsilon$ on the left and like $-x_0$ on the right,
# so a copy of $x_t$ helps at neither end. A schedule that ends in *pure* noise ($\bar\alpha_T = 0$) needs $v$, because
# with $\epsilon$ one would divide by 0.
#
# ## Optional: min-SNR weights
#
# $L_{simple}$ gives the error of $\epsilon$ the weight 1 at each $t$. For the error of $x_0$, that is the weight
# $\mathrm{SNR}(t)$: 1175 at $t = 0$, 0.0047 at the end. [Hang et al. 2023](https://arxiv.org/abs/2303.09556) (section
# 3.4) limit it to $\gamma = 5$, by the weight
#
# $$w_t = \min(\mathrm{SNR}(t),\, \gamma)\,/\,\mathrm{SNR}(t) \quad\text{for}\quad \|\epsilon-\epsilon_\theta\|^2$$
#
# The weight falls where the picture is nearly clean, and is 1 elsewhere. The authors report 3.4 times faster
# convergence than with earlier weights, and `minisd` trains its models so. We train three networks on the moons that
# differ only in their weights. All are measured without weights.


# %%
def bound_loss(model, chosen):
    """The weights of eq. 12, scaled to a mean of 1."""
    x_0, t = moons[chosen], torch.randint(1, T, (len(chosen),))
    noise = torch.randn_like(x_0)
    squares = (noise - model(schedule.q_sample(x_0, t, noise), t)).square().mean(1)  # [b]
    return (bound[t] / bound[1:].mean() * squares).mean().float()


def min_snr_loss(model, chosen):
    return minisd.epsilon_loss(model, schedule, moons[chosen], min_snr_gamma=5.0)


by_weight = {"no weights": model}  # L_simple
for name, loss_of in {"the bound": bound_loss, "min-SNR": min_snr_loss}.items():
    torch.manual_seed(0)
    by_weight[name] = PointNetwork()
    train_points(by_weight[name], loss_of)

weights = {"no weights": torch.ones(T - 1), "the bound": bound[1:], "min-SNR": minisd.loss.min_snr_weight(snr)}
above = {name: (timesteps, above_the_floor(trained)) for name, trained in by_weight.items()}
shown = [0, 2, 5, 7, 10, 12] if full else [0, 1]  # of `timesteps`
print("above the floor:  " + "".join(f"t = {timesteps[i]:<6}" for i in shown) + " samples: distance to the data")
for name, trained in by_weight.items():
    *_, last = minisd.sampling.ddim(trained, x_T, schedule, steps=50 if full else 5)
    print(f"{name:16}  " + "".join(f"{above[name][1][i]:<10.4f}" for i in shown) + f" {to_data(last.x):.3f}")
panels = {
    "weight (mean 1)": {name: (times, w / w.mean()) for name, w in weights.items()},
    "above the floor, unweighted": above,
}
viz.curves(panels, log=list(panels), width=3.4, height=2.4)

# %% [markdown]
# The moons gain nothing from min-SNR, because
# they are thin: the distance to them is decided at small $t$. In a picture you see above all what is decided at large
# $t$ (notebook 01), where min-SNR has its weight. The bound has another problem: a few examples at the first timesteps
# weigh so much that the gradient is noisy (Improved DDPM, section 3.3).
#
# ## Optional: guidance without text dropout
#
# **Predict, then run.** We train one network on the moons without dropout and one with it. The context says "upper" or
# "lower". What does guidance do with a network that has never seen the empty context?

# %% tags=["hide-output"]
contexts = torch.eye(2)[:, None]  # [2 1 2]: "upper" and "lower", each a context of one token
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
    conditional = PointNetwork(context_size=2)
    train_points(conditional, conditional_loss(drop))
    guided = {
        "empty context": minisd.classifier_free_guidance(conditional, empty, empty, 1.0),
        **{
            f"upper, s = {s}": minisd.classifier_free_guidance(conditional, contexts[:1], empty, float(s))
            for s in (1, 2, 4)
        },
    }
    for name, eps_model in guided.items():
        *_, last = minisd.sampling.ddim(eps_model, x_T, schedule, steps=50 if full else 5)
        far = (torch.cdist(last.x, moons).min(1).values > 0.5).float().mean()
        panels[f"{drop:.0%} dropped:\n{name}"] = {"drawn": last.x}
        print(f"{drop:4.0%} dropped, {name:13} {far:4.0%} further than 0.5 from all data")
viz.clouds(panels, behind=moons[:300], columns=4, size=1.6, reach=4.5)

# %% [markdown]
# Without dropout (upper row), the answer to the empty context is arbitrary, and guidance exaggerates the difference
# from it. At $s = 1$ the empty answer cancels, so the mistake hides. At $s = 4$ nearly all points are far from the
# data. With dropout (lower row) they stay, but at $s = 4$ only that part of the moon is left which is farthest from the
# other moon: guidance has a price ([`docs/guidance.md`](../docs/guidance.md)). Stable Diffusion has dropped 10% of the
# captions from v1.3 on. The model card says so; the public code does not show it.
#
# ## Optional: the grey mean, once more
#
# We ask the model that ships for the whole picture in one step, $\hat x_0$, from a noised fox at each $t$; and the
# exact denoiser of its training pictures, too.

# %%
columns = torch.tensor([999, 900, 800, 700, 600, 400, 200, 50])
z = z_all[corpus.captions.index("fox, noto style") if full else 0].expand(len(columns), -1, -1, -1)
noise = torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(5)).expand_as(z)
z_t = sd.schedule.q_sample(z, columns, noise)
with torch.no_grad():
    eps = sd.apply_model(z_t, columns, sd.get_learned_conditioning([""] * len(columns)))
estimates = {
    "network,\nno caption": sd.schedule.predict_start_from_noise(z_t, columns, eps),
    "exact": knows_all.x0(z_t, columns),
}
decoded = [sd.decode_first_stage(estimate) for estimate in estimates.values()]
viz.strip(decoded, [f"t = {t}" for t in columns.tolist()], list(estimates), size=0.64)

# %% [markdown]
# At $t = 999$ both answer with a blur: the mean of what is possible. Training can't make this answer sharper. Sampling
# does, by asking again while the noise falls. The exact denoiser recognises the fox earlier, because it has memorised
# the pictures.
#
# ## Optional: try it, and read CompVis's source
#
# - Give the moons ten times the noise (0.8 instead of 0.08 in `two_moons`). What becomes of the floor?
# - Train `PointNetwork` with `minisd.v_loss`, and draw with it. Which conversion is needed before the sampler?
# - Leave out $t$ (put `0 * t` into `Network.forward`). How much does the loss rise, and why not more?
#
# CompVis's `p_losses` (in `ldm/models/diffusion/ddpm.py`) is this loss. Its `lvlb_weights` are the weights of the
# bound, multiplied by 0. In those for `parameterization="x0"`, `2. * 1 - alphas_cumprod`, brackets are missing. More is
# in [`docs/loss.md`](../docs/loss.md).

# %%
print(f"This notebook took {time.time() - start:.0f} s.")
