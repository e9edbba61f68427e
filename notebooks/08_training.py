# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 8 · Training: the recipe, line by line
#
# The loss is one line (notebook 02), the loop around it is ten. Why do trainings fail, then? Because of what stands
# *between* the lines: how long a step is, what is averaged, what is forgotten, what is computed once, what happens when
# the machine stops. CompVis's repository has the networks and the loss, and leaves most of the rest to a framework, to
# a configuration that was never published, or to a sentence in a model card. Here it is written down.
#
# You will understand
#
# - what each of the three networks is trained with, and which simpler loss fails;
# - learning rate, warm-up, clipping, EMA, min-SNR, text dropout: what breaks without each, in runs of seconds;
# - which loss is normal, and why it stops falling while the drawings get better;
# - why a run can be cut into parts, interrupted, and spread over processes, and still compute the same numbers;
# - what takes the memory, what takes the time, and what the 150,000 GPU hours of Stable Diffusion were spent on.
#
# About an hour to read; it runs in three to ten minutes on a laptop. The modules of this stage are the five pages of
# [`minisd/training/`](../minisd/training/trainer.py). Everything is trained on the small model `tiny`: what it shows
# about training is true of the large one, and where it is not, the text says so.
#
# Before: [notebook 07](07_latent_diffusion.ipynb), where the three networks were trained for the first time.

# %% tags=["parameters"]
MODE = "full"  # "smoke": every line runs, on so little that the figures mean nothing

# %%
import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import replace
from math import exp, log
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import minisd
from minisd import cli, viz
from minisd.checkpoint import SHIPPED, load_clip
from minisd.clip import contrastive_loss
from minisd.data import CaptionedPictures, draw_shapes, sample
from minisd.loss import epsilon_loss, min_snr_weight, text_dropout
from minisd.training import Recipe, SingleDevice, Trainer, finetune_unet, recipes
from minisd.training.clip import TEMPLATES, tokenize_templates
from minisd.training.unet import by_time, encode_captions
from minisd.training.vae import encode_all

full = MODE == "full"
start = time.time()
work = tempfile.TemporaryDirectory()
runs = Path(work.name)
engine = SingleDevice("cpu")  # one process; SingleDevice() would take a GPU, if there is one


@contextlib.contextmanager
def quietly():
    """Without progress bars, which would fill the page."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


with quietly():
    draw_shapes(runs / "shapes", count=1000 if full else 80)
shapes = CaptionedPictures(runs / "shapes", split="train")
print(f"{len(shapes)} pictures of {shapes.size}x{shapes.size} pixels, such as {shapes.captions[:3]}")

# %% [markdown]
# ## What the repository says, and what it leaves out
#
# Whoever wants to train Stable Diffusion v1 finds this.
#
# | what is needed | in CompVis's repository | here |
# |---|---|---|
# | the loss of the UNet | `ddpm.py: p_losses` | `loss.py` |
# | 10% of the captions are dropped | no code; a sentence in the model card | `loss.py: text_dropout` |
# | learning rate, warm-up | `v1-inference.yaml`: 1e-4, 10,000 steps | `recipes.py` |
# | batch, hardware, number of steps | the model card | `recipes.py` |
# | EMA | `ema.py: LitEma`; off in the configuration, which is for drawing | `trainer.py: EMA` |
# | the loop, devices, accumulation, checkpoints | the framework PyTorch Lightning | `trainer.py`, `engine.py` |
# | the data (`LAION`) | no class that reads it | `data/` |
# | the autoencoder's losses | `contperceptual.py`; parts in another repository, taming-transformers | `training/` |
# | CLIP's training | OpenAI's, unpublished code; a figure in the paper | `training/clip.py` |
#
# Three networks are trained one after the other (notebook 07 shows why in this order): CLIP, the autoencoder, the
# UNet. Each has a loss that looks more complicated than it need be. For each, we try the simpler one first.
#
# ## CLIP: pull together, and push apart
#
# CLIP is to place a picture and its caption near to each other (notebook 05). **The naive idea:** so make them near.
# Both towers give vectors of length 1; maximise the cosine of each pair, $\mathcal L = 1 - I_i \cdot T_i$.
#
# **Predict, then run.** How low does this loss get, and how often does the towers' best caption for a picture turn
# out to be the right one among 64?
#
# <details><summary>Answer</summary>
#
# The loss gets to 0, nearly, and the right caption is found no more often than by chance. There is a way of pleasing
# the loss without looking: map *all* pictures and *all* captions to one and the same vector. It is called collapse.
#
# </details>
#
# **The remedy** is contrast: the right caption must fit better than the 63 others. With $s = 1/\tau$, the inverse
# temperature,
#
# $$\mathcal L = \tfrac12\big(\mathrm{CE}(s\,I\,T^\top) + \mathrm{CE}(s\,T\,I^\top)\big), \qquad
#   \text{right answers on the diagonal} \qquad \text{(Radford et al. 2021, figure 3)}$$
#
# Cosines end at 1 and $-1$. With $s = 1$, the best that is possible (1 on the diagonal, $-1$ elsewhere, which is more
# than geometry allows) leaves a loss of $\log(1 + 63\,e^{-2})$. So $s$ has to be larger; nobody knows how large, so it
# is learned, as `logit_scale.exp()`, from $1/0.07 = 14.3$ on.
#
# And the **templates**: the captions of our corpus have one form, "a red circle"; people write "the red circle", or
# "a picture of a red circle". So each is read in one of four forms, drawn anew each time.

# %%
tiny = minisd.PRESETS["tiny"]
tokenizer = minisd.load("tiny", "cpu").cond_stage_model.tokenizer
tokens = tokenize_templates(tokenizer, shapes.captions, tiny.cond_stage.max_length)  # [n 4 16]: ids in four forms
print(f"tokens {list(tokens.shape)}, the forms: {TEMPLATES}")
exam = torch.arange(0, len(shapes), max(1, len(shapes) // 64))[:64]  # 64 pictures to be examined on


def train_towers(loss_of, forms=1, fixed_scale=None):
    """The towers after some steps of 64 pairs, and the loss of each step."""
    torch.manual_seed(0)
    towers = minisd.CLIPModel(tiny.cond_stage, recipes.VISION["tiny"], tokenizer.end_token)
    if fixed_scale:
        towers.logit_scale.data.fill_(log(fixed_scale))
        towers.logit_scale.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in towers.parameters() if p.requires_grad], lr=1e-3, betas=(0.9, 0.99))
    losses = []
    for _ in range(200 if full else 2):
        chosen = torch.randperm(len(shapes))[:64]
        form = torch.randint(forms, (len(chosen),))
        loss = loss_of(towers(tokens[chosen, form], shapes.batch(chosen)), towers.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return towers, losses


@torch.no_grad()
def examine(towers, form):
    """How often the right caption comes first among 64, and the mean cosine of pictures with *other* captions."""
    cosines = towers(tokens[exam, form], shapes.batch(exam)) / towers.logit_scale.exp()  # [64 64]
    others = cosines[~torch.eye(len(exam), dtype=torch.bool)]
    return (cosines.argmax(1) == torch.arange(len(exam))).float().mean().item(), others.mean().item()


variants = {
    "pull only": train_towers(lambda logits, s: 1 - logits.diagonal().mean() / s),
    "contrast, s = 1": train_towers(lambda logits, s: contrastive_loss(logits), fixed_scale=1.0),
    "contrast, s learned": train_towers(lambda logits, s: contrastive_loss(logits)),
    "... and four forms": train_towers(lambda logits, s: contrastive_loss(logits), forms=4),
}
print(f"chance: 1/64 = {1 / 64:.1%}, ln 64 = {log(64):.2f}; s = 1 can't get below {log(1 + 63 * exp(-2)):.2f}\n")
print(f"{'':20} {'loss':>6}  {'right':>6}  {'right, form 4':>13}  {'cosine with others':>18}  {'s':>5}")
for name, (towers, losses) in variants.items():
    (right, others), (right_4, _), s = examine(towers, 0), examine(towers, 3), towers.logit_scale.exp().item()
    last = sum(losses[-20:]) / len(losses[-20:])
    print(f"{name:20} {last:6.3f}  {right:6.0%}  {right_4:13.0%}  {others:18.2f}  {s:5.1f}")
panels = {"loss": {name: (range(1, len(losses) + 1), losses) for name, (_, losses) in variants.items()}}
viz.curves(panels, xlabel="step", width=6, height=2.6)

# %% [markdown]
# CLIP TEXT
#
# ## The autoencoder: four terms, and what each is for
#
# $$\mathcal L = \underbrace{\mathbb E\,|x - \hat x|}_{\text{each number}}
#   + \underbrace{w_p\, d(x, \hat x)}_{\text{looks alike}}
#   + \underbrace{w_{KL}\,\mathrm{KL}(q(z|x)\,\|\,\mathcal N(0, I))}_{\text{latents stay where they are}}
#   + \underbrace{w_d\,\lambda\,\big(-\mathbb E\, D(\hat x)\big)}_{\text{details look real}}$$
#
# This is `LPIPSWithDiscriminator` of CompVis, with $w_p = 1$, $w_{KL} = 10^{-6}$, $w_d = 0.5$. The first and the third
# are the subject of notebook 04, and all that the shipped `emoji` was trained with. What are the other two for?
#
# **The naive idea** is the first term alone. It counts numbers, one by one. Take a picture, and spoil it in three ways:
# shift it by one pixel; blur it; make it a little darker. Which of them would *you* call the worst, and which does
# $|x - \hat x|$ call the worst? Beside it, a **perceptual** distance: that of what a network sees which has learned to
# tell things from each other, here the image tower of the CLIP that ships. Its tokens are compared layer by layer, as
# vectors of length 1 (after Zhang et al. 2018, eq. 1; there the network is VGG).

# %%
clip, _ = load_clip(SHIPPED / "emoji")  # its image tower was trained beside the text tower that ships


@torch.no_grad()
def looks(x):
    """The tokens of the 16 patches in each layer but the last, of unit length, [b layers 16 192]."""
    tokens = clip.vision_model.pre_layrnorm(clip.vision_model.embeddings(x))  # [b 17 192]: a class token, 16 patches
    states = [tokens]
    for layer in clip.vision_model.encoder.layers[:-1]:
        states.append(layer(states[-1]))
    return F.normalize(torch.stack(states, dim=1)[:, :, 1:], dim=-1)


def perceptual(x, x_hat):
    return (looks(x) - looks(x_hat)).square().sum(-1).mean((1, 2))  # [b]


corpus = sample(size=32)
names = ["fox", "rocket", "watermelon", "sunflower", "guitar"]
x = corpus.batch([corpus.captions.index(f"{name}, noto style") for name in names])  # [5 3 32 32]
blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
spoilt = {
    "as it is": x,
    "shifted by 1": F.pad(x, (1, 0, 0, 0), mode="replicate")[..., :-1],
    "blurred": blurred,
    "darker": x - 0.15,
}
notes = [[f"L1 {a:.3f}  look {b:.3f}" for a, b in zip((x - y).abs().mean((1, 2, 3)), perceptual(x, y), strict=True)]
         for y in spoilt.values()]  # fmt: skip
print(f"{'':14} {'mean |x - x̂|':>14} {'perceptual':>12}")
for name, y in spoilt.items():
    print(f"{name:14} {(x - y).abs().mean():14.3f} {perceptual(x, y).mean():12.3f}")
viz.strip(list(spoilt.values()), names, list(spoilt), notes, size=1.2)

# %% [markdown]
# PERCEPTUAL TEXT
#
# The **discriminator** is for what the latent does not hold at all. Fur, grass, the stripes of a shirt: a latent of a
# twelfth of the numbers (a 48th, in Stable Diffusion) can say "stripes here" and not where each of them begins. An
# honest decoder that must minimise $|x - \hat x|$ then answers with the mean, or the median, of all the stripes that
# are possible: grey. Nobody would ever call it a picture of stripes.
#
# So let a second network $D$ judge whether a patch is real (Isola et al. 2017, PatchGAN), and let the decoder try to
# please it:
#
# $$\mathcal L_D = \tfrac12 \mathbb E \max(0, 1 - D(x)) + \tfrac12 \mathbb E \max(0, 1 + D(\hat x)), \qquad
#   \lambda = \frac{\|\nabla_{w} \mathcal L_{rec}\|}{\|\nabla_{w} (-\mathbb E D(\hat x))\| + 10^{-4}}$$
#
# $w$ are the weights of the decoder's last layer: $\lambda$ makes the two pull equally hard there, however sure of
# itself $D$ is (Esser et al. 2021, eq. 7). $D$ starts late (at step 50,001 in Stable Diffusion's autoencoder): before
# the reconstruction says anything, there is nothing to judge.
#
# Below, all pictures are stripes, at one of four places, and the latent is noise: it says nothing of the place.

# %%
def stripes(n):
    """Pictures of vertical stripes that begin at one of four places, [n 1 16 16]."""
    place = torch.arange(16) + torch.randint(4, (n, 1, 1, 1))
    return ((place // 2 % 2) * 2.0 - 1).expand(n, 1, 16, 16)


def train_decoder(weight, steps=900 if full else 3):
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 256), nn.Unflatten(1, (1, 16, 16)))
    halve = [nn.Conv2d(1, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 4, 2, 1), nn.LeakyReLU(0.2)]
    D = nn.Sequential(*halve, nn.Conv2d(32, 1, 3, 1, 1))  # [b 1 4 4]: a logit for each of 16 overlapping patches
    of_decoder, of_D = (torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.5, 0.9)) for net in (decoder, D))
    for step in range(steps):
        x = stripes(32)
        x_hat = decoder(torch.randn(32, 16))
        loss = rec = (x - x_hat).abs().mean()
        if weight and step >= steps // 5:  # disc_start
            g_loss = -D(x_hat).mean()
            pulls = [torch.autograd.grad(f, decoder[2].weight, retain_graph=True)[0].norm() for f in (rec, g_loss)]
            loss = rec + weight * pulls[0] / (pulls[1] + 1e-4) * g_loss
        of_decoder.zero_grad()
        loss.backward()
        of_decoder.step()
        if weight and step >= steps // 5:
            d_loss = (F.relu(1 - D(x)).mean() + F.relu(1 + D(x_hat.detach())).mean()) / 2  # hinge
            of_D.zero_grad()
            d_loss.backward()
            of_D.step()
    return decoder


rows, labels, z = [stripes(8)], ["real"], torch.randn(8, 16)
for name, weight in {"L1 alone": 0.0, "L1 and D": 0.8}.items():
    x_hat = train_decoder(weight)(z).detach()
    rows.append(x_hat)
    labels.append(name)
    off = (stripes(512)[:, None] - x_hat).abs().mean()  # over all places where the stripes might begin
    print(f"{name:9} mean |x - x̂| {off:.2f}, contrast (std) {x_hat.std():.2f}")
viz.strip(rows, labels=labels, size=0.7)

# %% [markdown]
# GAN TEXT
#
# ## The UNet: the loop
#
# The loss is that of notebook 02. Here is the loop that trains it, as it stands in `minisd/training/unet.py`, but for
# the sample sheets. (We leave three hooks in it, to spoil things and to look on.) The autoencoder and the text
# encoder do not change any more. So whatever depends on them alone is computed **once**, before the first step: the
# latent of each picture (its mean and variance, so that each step can draw another sample), and the context of each
# caption in each of its forms.

# %%
sd = minisd.load("tiny", "cpu")
with torch.no_grad():
    moments = encode_all(sd.first_stage_model, shapes, engine)  # [n 8 8 8]: mean and log variance
contexts = encode_captions(sd, shapes.captions).float()  # [n 4 16 32]
empty = sd.get_learned_conditioning([""])  # [1 16 32]
print(f"moments {list(moments.shape)}, contexts {list(contexts.shape)}, empty {list(empty.shape)}")


def fresh(seed=0):
    """`tiny` with a UNet that has learned nothing."""
    torch.manual_seed(seed)
    sd = minisd.load("tiny", "cpu")
    sd.model.diffusion_model = minisd.UNetModel(sd.config.unet)
    return sd


def train(sd, recipe, name, spoil=None, watch=None):
    """Train sd's UNet; returns the trainer, which holds the mean of the weights."""
    trainer = Trainer(sd.model.diffusion_model.train(), recipe, runs / name, engine)
    with quietly():
        for step in trainer.steps():
            for batch in trainer.batches(len(shapes)):  # one, unless gradients are accumulated
                # whatever is random is drawn from the batch, sample by sample
                form, t = batch.randint(len(TEMPLATES)), batch.randint(sd.schedule.timesteps)  # [b], [b]
                forget = batch.rand() < recipe.text_dropout  # [b]
                mean, logvar = moments[batch.indices].chunk(2, dim=1)  # [b 4 8 8] each
                noise, encoder_noise = batch.randn(4, 8, 8), batch.randn(4, 8, 8)
                z = sd.scale_factor * (mean + torch.exp(0.5 * logvar) * encoder_noise)  # a sample of q(z|x)
                context = text_dropout(contexts[batch.indices, form], empty, forget)  # [b 16 32]
                losses = epsilon_loss(trainer.model, sd.schedule, z, context, t, noise, reduction="none")  # [b]
                weight = min_snr_weight(sd.schedule.snr(t), recipe.min_snr_gamma) if recipe.min_snr_gamma else 1.0
                loss = (weight * losses).mean() * (spoil(step) if spoil else 1.0)
                trainer.backward(loss, **by_time(losses.detach(), t, sd.schedule.timesteps))  # gradients are added up
            trainer.update()  # clip, learning rate, AdamW, EMA, log
            if watch:
                watch(trainer)
    return trainer


def weights_of(trainer):
    """All weights in a row."""
    return nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()


def recipe(steps, **changes):
    """The recipe of `tiny`, in short: fewer steps, so a shorter warm-up and an EMA that looks back less far."""
    short = {"steps": steps if full else 3, "warmup": 30, "ema_decay": 0.98, "log_every": 5 if full else 1}
    return replace(recipes.UNET["tiny"], **(short | {"save_every": 10_000, "sample_every": 10_000} | changes))


def logged(name, key="loss"):
    """Steps and values from the log.jsonl of a run."""
    lines = [json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines], [line[key] for line in lines]


# is it the loop of the package?
short = recipe(3, log_every=1)
train(fresh(), short, "ours")
with quietly():
    finetune_unet(fresh(), short, shapes, runs / "theirs", engine)
print("ours   ", logged("ours")[1])
print("theirs ", logged("theirs")[1])
print(json.loads((runs / "ours/log.jsonl").read_text().splitlines()[-1]))

# %% [markdown]
# LOOP TEXT
#
# ## How long is a step? The learning rate

# %%
rates = [1e-4, 1e-3, 1e-2, 1e-1]
for lr in rates:
    train(fresh(), recipe(100, lr=lr, decay=False), f"lr {lr:g}")
panels = {
    "weighted loss": {f"lr = {lr:g}": logged(f"lr {lr:g}") for lr in rates},
    "length of the gradient": {f"lr = {lr:g}": logged(f"lr {lr:g}", "grad_norm") for lr in rates},
}
for lr in rates:
    print(f"lr {lr:<6g} loss {logged(f'lr {lr:g}')[1][-1]:.3f}")
viz.curves(panels, xlabel="step", log=list(panels), width=4)

# %% [markdown]
# LR TEXT
#
# ## The first steps: warm-up

# %%
def moved(unet, into):
    """Looks on at each step: how far did the weights move, on average, in units of the learning rate?"""
    last = [nn.utils.parameters_to_vector(unet.parameters()).detach().clone()]

    def watch(trainer):
        now = weights_of(trainer)
        into.append((now - last[0]).abs().mean().item() / trainer.recipe.lr_at(trainer.step))
        last[0] = now

    return watch


moves, panels = {}, {}
for lr in (3e-3, 3e-2):
    for warmup, label in {1: "none", 40: "40 steps"}.items():
        name, model = f"lr {lr:g}, warm-up: {label}", fresh()
        watch = moved(model.model.diffusion_model, moves.setdefault(name, []))
        train(model, recipe(80, lr=lr, warmup=warmup, decay=False), name, watch=watch)
        panels.setdefault(f"weighted loss, lr = {lr:g}", {})[label] = logged(name)
panels["mean |change of a weight| / lr, lr = 0.03"] = {
    label: (range(1, len(m) + 1), m) for label, m in zip(("none", "40 steps"), list(moves.values())[2:], strict=True)
}
viz.curves(panels, xlabel="step", log=list(panels)[:2], width=3.4)

# %% [markdown]
# WARMUP TEXT
#
# ## One bad batch: clipping

# %%
bad = 50 if full else 1
for name, limit in {"clipped": 1.0, "not clipped": 1e9}.items():
    spoil = lambda step: 1000.0 if step == bad else 1.0  # noqa: E731
    train(fresh(), recipe(110, clip_grad=limit, decay=False, log_every=1), name, spoil=spoil)
whole = {name: [torch.tensor(v) for v in logged(name)] for name in ("clipped", "not clipped")}
panels = {
    "weighted loss": {n: (s[s != bad + 1], y[s != bad + 1]) for n, (s, y) in whole.items()},
    "length of the gradient": {n: logged(n, "grad_norm") for n in whole},
}
viz.curves(panels, xlabel="step", log=list(panels), width=4)

# %% [markdown]
# CLIP GRAD TEXT
#
# ## The mean of the weights: EMA

# %%
prompts = [
    "a large red circle", "a large blue square", "a small pink star", "two green hearts",
    "three black triangles", "four pink circles", "an orange diamond on the left", "a purple heart above a red star",
]  # fmt: skip
titles = ["large\nred circle", "large\nblue square", "small\npink star", "two green\nhearts", "three black\ntriangles",
          "four pink\ncircles", "orange diamond\non the left", "purple heart\nabove red star"]  # fmt: skip
few = {"steps": 25 if full else 2, "guidance_scale": 3.0, "sampler": "dpmpp_2m"}
timesteps = [0, 20, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999] if full else [0, 999]
probe = torch.arange(0, len(shapes), max(1, len(shapes) // 64))[:64]
probe_z = sd.scale_factor * moments[probe].chunk(2, dim=1)[0]  # [64 4 8 8]
probe_noise = torch.randn(probe_z.shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def by_timestep(unet, context=None):
    """The loss at each of `timesteps`, unweighted, of the same pictures under the same noise: [timesteps]."""
    context = contexts[probe, 0] if context is None else context
    at = [torch.full((len(probe),), t) for t in timesteps]
    return torch.stack([epsilon_loss(unet.eval(), sd.schedule, probe_z, context, t, probe_noise) for t in at])


def mean_over_t(values):
    return (torch.trapezoid(values, torch.tensor(timesteps).float()) / (timesteps[-1] - timesteps[0])).item()


rows, labels = [], []
for lr in (3e-4, 1e-3):
    model = minisd.load("tiny", "cpu")  # the finished one
    unet = model.model.diffusion_model
    trainer = train(model, recipe(120, lr=lr, decay=False), f"on {lr:g}")
    for name, scope in {"the weights": contextlib.nullcontext(), "their mean": trainer.ema.applied_to(unet)}.items():
        with scope:
            rows.append(model.eval().txt2img(prompts, **few).pictures)
            value = mean_over_t(by_timestep(unet))
        labels.append(f"lr {lr:g}\n{name}")
        print(f"lr {lr:g}, {name:11}  mean loss over t {value:.4f}")
rows.append(sd.txt2img(prompts, **few).pictures)
labels.append("as it was")
print(f"as it was before       mean loss over t {mean_over_t(by_timestep(sd.model.diffusion_model)):.4f}")
viz.strip(rows, titles, labels)

# %% [markdown]
# EMA TEXT
#
# ## Which timesteps? Min-SNR weights, and text dropout

# %%
models = {"the recipe": {}, "no min-SNR": {"min_snr_gamma": None}, "no text dropout": {"text_dropout": 0.0}}
trained = {}
for name, change in models.items():
    trained[name] = fresh()
    trainer = train(trained[name], recipe(300, **change), name)
    trained[name].model.diffusion_model.load_state_dict(trainer.ema.weights, strict=False)
by_t = {name: by_timestep(model.model.diffusion_model) for name, model in trained.items()}
nothing = empty.expand(len(probe), -1, -1)  # [64 16 32]
no_caption = {name: by_timestep(model.model.diffusion_model, nothing) for name, model in trained.items()}
weight = min_snr_weight(sd.schedule.snr(torch.arange(1000)), 5.0)  # [1000]
share = weight.cumsum(0) / weight.sum()
print(f"{'t':>26}  " + "".join(f"{t:8d}" for t in timesteps))
for title, table in {"": by_t, ", no caption": no_caption}.items():
    for name, values in table.items():
        print(f"{name + title:>26}  " + "".join(f"{v:8.4f}" for v in values))
print(f"half of all min-SNR weight lies at t >= {int((share > 0.5).int().argmax())}")
panels = {
    "the weight of a timestep": {"min-SNR": (range(1000), weight), "none": ([0, 999], [1, 1])},
    "loss by t, as a share of the recipe's": {n: (timesteps, y / by_t["the recipe"]) for n, y in by_t.items()},
    "the same, without captions": {n: (timesteps, y / no_caption["the recipe"]) for n, y in no_caption.items()},
}
viz.curves(panels, width=3.5)

# %% [markdown]
# DROPOUT TEXT
#
# ## What the loss does

# %%
title = "the recipe, by timestep, from its log"
parts = {f"t from {t} to {t + 249}": logged("the recipe", f"loss_t{t:03d}") for t in (0, 250, 500, 750)}
viz.curves({title: parts}, xlabel="step", ylabel="loss", log=[title], width=6)

# %%
folder = SHIPPED / "tiny"
stages = {
    "0": fresh(),
    "100": minisd.load(folder / "after_000100_steps.safetensors", device="cpu"),
    "1,000": minisd.load(folder / "after_001000_steps.safetensors", device="cpu"),
    "10,000": sd,
}
by_stage = {name: by_timestep(model.model.diffusion_model) for name, model in stages.items()}
print(f"{'steps':>7}  " + "".join(f"{'t = ' + str(t):>9}" for t in timesteps[::2]) + "     mean")
for name, values in by_stage.items():
    print(f"{name:>7}  " + "".join(f"{v:9.4f}" for v in values[::2]) + f"  {mean_over_t(values):7.4f}")

torch.manual_seed(0)
single = []
for _ in range(60 if full else 2):  # the loss of single batches, as a log would have them
    chosen = torch.randperm(len(shapes))[:32]
    z, t = sd.scale_factor * moments[chosen].chunk(2, dim=1)[0], torch.randint(1000, (len(chosen),))
    with torch.no_grad():
        single.append(epsilon_loss(sd.model.diffusion_model.eval(), sd.schedule, z, contexts[chosen, 0], t).item())
print(f"\nsingle batches of 32, the model after 10,000 steps: from {min(single):.3f} to {max(single):.3f}, "
      f"standard deviation {torch.tensor(single).std():.3f}")  # fmt: skip
panels = {
    "loss by timestep": {f"{name} steps": (timesteps, v) for name, v in by_stage.items()},
    "as a share of that after 100 steps": {
        f"{name} steps": (timesteps, v / by_stage["100"]) for name, v in by_stage.items() if name != "0"
    },
}
viz.curves(panels, log=list(panels), width=4.4)

# %% [markdown]
# LOSS TEXT
#
# ## Randomness: a function of seed, step and sample

# %%
class OneOf(SingleDevice):
    """Makes believe that it is one of several processes: enough to see what each would draw."""

    def __init__(self, process_index, num_processes):
        super().__init__("cpu")
        self.process_index, self.num_processes = process_index, num_processes


def what_is_drawn(engine, step, accumulate=1):
    """The samples of a step, and the first number of the noise of each."""
    trainer = Trainer(nn.Linear(1, 1), Recipe(batch_size=8, accumulate=accumulate), runs / "draws", engine)
    trainer.step = step
    drawn = [(batch.indices, batch.randn(4, 8, 8)[:, 0, 0, 0]) for batch in trainer.batches(len(shapes))]
    trainer.folder.close()
    return drawn


for title, engines, accumulate in [
    ("one process", [OneOf(0, 1)], 1),
    ("one process, in 2 parts", [OneOf(0, 1)], 2),
    ("two processes", [OneOf(0, 2), OneOf(1, 2)], 1),
]:
    print(title)
    for e in engines:
        for indices, noise in what_is_drawn(e, step=7, accumulate=accumulate):
            print("   ", "  ".join(f"{i:4d}:{n:6.3f}" for i, n in zip(indices.tolist(), noise.tolist(), strict=True)))

# %% [markdown]
# RANDOM TEXT
#
# ## Accumulation: a large batch in small memory

# %%
in_one = train(fresh(), recipe(4, log_every=1), "in one")
in_four = train(fresh(), recipe(4, log_every=1, accumulate=4), "in four")
apart = max(abs(a - b) for a, b in zip(logged("in one")[1], logged("in four")[1], strict=True))
print(f"losses apart by {apart:.0e}, weights by {(weights_of(in_one) - weights_of(in_four)).abs().max():.0e}")
try:
    replace(recipes.CLIP["tiny"], accumulate=4)
except ValueError as error:
    print(f"CLIP: {error}")

# %% [markdown]
# ACCUMULATE TEXT
#
# ## Stopped, and gone on with

# %%
class PowerCut(Exception):
    pass


def cut(trainer):
    if trainer.step == 4:  # in the fifth step, one after the checkpoint
        raise PowerCut


careful = replace(recipe(8), steps=8, log_every=1, save_every=4)
whole = train(fresh(), careful, "whole")
with contextlib.suppress(PowerCut):
    train(fresh(), careful, "stopped", watch=cut)
left = sorted(path.name for path in (runs / "stopped").iterdir())
gone_on = train(fresh(seed=1), careful, "stopped")  # whatever it starts from, the checkpoint replaces
print(f"after the cut: {', '.join(left)}")
same = torch.equal(weights_of(whole), weights_of(gone_on))
same_mean = all(torch.equal(w, gone_on.ema.weights[name]) for name, w in whole.ema.weights.items())
print(f"weights equal to the last bit: {same}; their means: {same_mean}; logs: {logged('whole') == logged('stopped')}")
state = torch.load(runs / "whole/checkpoint_000008.pt", weights_only=True)
model_state, optimizer_state = state["networks"]["model"]
print({name: type(value).__name__ for name, value in state.items()})
print("of the optimiser, for each weight:", ", ".join(next(iter(optimizer_state["state"].values()))))

# %% [markdown]
# RESUME TEXT
#
# ## Many processes

# %%
command = [
    "-m", "minisd", "train", "unet", "--init", "tiny", "--data", str(runs / "shapes"), "--steps", "4",
    "--batch-size", "8", "--warmup", "2", "--log-every", "1", "--precision", "no", "--device", "cpu",
]  # fmt: skip
if full and importlib.util.find_spec("accelerate"):
    launch = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]}
    for name, launcher in launch.items():
        ran = subprocess.run([sys.executable, *launcher, *command, "--out", str(runs / name)], capture_output=True,
                             text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
        assert ran.returncode == 0, ran.stderr
    print(f"{'step':>4} {'one process':>14} {'two processes':>14} {'difference':>11}")
    for step, a, b in zip(*logged("one/unet"), logged("two/unet")[1], strict=True):
        print(f"{step:4d} {a:14.8f} {b:14.8f} {abs(a - b):11.0e}")

# %% [markdown]
# MANY TEXT
#
# ## Half the digits: bf16

# %%
half = torch.tensor(1.0, dtype=torch.bfloat16)
for name, change in {"a weight of 1, a step of 1e-3": 1e-3, "a step of 1e-2": 1e-2}.items():
    print(f"{name}: 1 + {change:g} = {(half + change).item():.6f} in bf16, {1 + change:.6f} in float32")
mean_of = {dtype: torch.zeros((), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
for _ in range(20_000):
    for dtype, mean in mean_of.items():
        mean.lerp_(torch.ones((), dtype=dtype), 1 - 0.999)  # EMA's line: the weight stands at 1
for dtype, mean in mean_of.items():
    print(f"an EMA with decay 0.999, after 20,000 steps at 1, kept in {str(dtype):14}: {mean.item():.4f}")

# %% [markdown]
# BF16 TEXT
#
# ## Where the memory goes

# %%
class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, weights aside; also of those that are only shapes."""

    def __init__(self, network):
        super().__init__()
        self.live, self.now, self.peak = {p.untyped_storage()._cdata for p in network.parameters()}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]:
            key, size = storage._cdata, storage.nbytes()
            if key not in self.live:
                self.live.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, key, size)
        return out

    def free(self, key, size):
        self.live.discard(key)
        self.now -= size


def on_meta(config, size, batch=1):
    """A UNet and its inputs, as shapes without numbers: Stable Diffusion fits into any machine so."""
    with torch.device("meta"):
        x, t, context = torch.empty(batch, 4, size, size), torch.zeros(batch).long(), (batch, 77, config.context_dim)
        return minisd.UNetModel(config).train(), x, t, torch.empty(context)


def readable(n):
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


sizes = {"tiny": 8, "emoji": 8, "sd-v1": 64}  # of the latents
columns = ["weights", "gradients", "Adam", "EMA", "together"]
print(f"{'':6} {'parameters':>12} " + "".join(f"{c:>10}" for c in columns) + "   activations per picture, recomputed")
kept = {}
for name, size in sizes.items():
    for recompute in (False, True):
        unet, *inputs = on_meta(replace(minisd.PRESETS[name].unet, use_checkpoint=recompute), size)
        with LiveBytes(unet) as memory:
            loss = unet(*inputs).square().mean()
            kept[name, recompute] = memory.now
    n = sum(p.numel() for p in unet.parameters())
    bytes_each = [4, 4, 8, 4, 20]  # float32; Adam has two means
    row = [readable(each * n) for each in bytes_each] + [readable(kept[name, recompute]) for recompute in (False, True)]
    print(f"{name:6} {n:12,} " + "".join(f"{entry:>10}" for entry in row[:5]) + f"   {row[5]:>23}, {row[6]}")
tables = 4 * 8 * 5 * (64 * 64) ** 2  # float32, 8 heads, 5 transformer blocks at 64x64 (notebook 03)
print(f"of sd-v1's activations, the attention weights [4096 4096] at 64x64: {readable(tables)}")

# %% [markdown]
# MEMORY TEXT
#
# ## What a picture costs

# %%
def flops(network, *inputs, backward=False):
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        out = network(*inputs)
        if backward:
            out.square().mean().backward()
    return counter.get_total_flops()


table = {}
for name, size in sizes.items():
    config = minisd.PRESETS[name]
    row = {}
    for recompute in (False, True):
        unet, *inputs = on_meta(replace(config.unet, use_checkpoint=recompute), size)
        row["forward"] = flops(unet, *inputs)
        row["step, recomputed" if recompute else "step"] = flops(unet, *inputs, backward=True)
    with torch.device("meta"):
        vae, text = minisd.AutoencoderKL(config.first_stage), minisd.CLIPTextModel(config.cond_stage)
        pixels = torch.empty(1, 3, config.image_size, config.image_size)
        ids = torch.zeros(1, config.cond_stage.max_length).long()
        row["encoder"], row["text"] = flops(vae.encode, pixels), flops(text, ids)
    table[name] = row
print("GFLOP for a picture" + "".join(f"{key:>18}" for key in table["tiny"]))
for name, row in table.items():
    print(f"{name:19}" + "".join(f"{value / 1e9:18.3f}" for value in row.values()))

# %%
def seconds(run, *inputs, times=3):
    """The best of some runs: the others were disturbed."""
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        run(*inputs)
        taken.append(time.perf_counter() - begin)
    return min(taken)


def step(unet, *inputs):
    unet(*inputs).square().mean().backward()


n, count = (1024, 32) if full else (64, 2)
peak = 2 * n**3 / seconds(torch.matmul, *torch.randn(2, n, n), times=50)  # of a matrix product at its best
print(f"this machine, {torch.get_num_threads()} thread(s): {peak / 1e9:.0f} GFLOP/s in float32")
for name in ("tiny", "emoji"):
    unet = minisd.UNetModel(minisd.PRESETS[name].unet)
    x, t, context = torch.randn(count, 4, 8, 8), torch.zeros(count).long(), (count, 24, unet.config.context_dim)
    taken = seconds(step, unet, x, t, torch.randn(context), times=10 if full else 2) / count
    achieved = table[name]["step"] / taken
    print(f"{name:6} {1 / taken:6.0f} images/s, {achieved / 1e9:6.1f} GFLOP/s: MFU {achieved / peak:.0%}")

# %%
hours, a100, batch = 150_000, 312e12, 2048  # the model card; NVIDIA's figure for bf16 matrix products, dense
at_256, at_512 = 237_000, 194_000 + 515_000 + 225_000  # steps: v1-1, then v1-2, then v1-4 from there
small, *inputs = on_meta(minisd.PRESETS["sd-v1"].unet, 32)
forward_256 = flops(small, *inputs)
needed = batch * 3 * (at_256 * forward_256 + at_512 * table["sd-v1"]["forward"])
pictures, gpus = batch * (at_256 + at_512), 32 * 8
print(f"pictures seen: {pictures / 1e9:.2f} billion; the UNet's operations for them: {needed:.1e}")
rate, possible = pictures / (hours * 3600), hours * 3600 * a100
print(f"{hours:,} hours on {gpus} cards at once: {hours / gpus / 24:.0f} days; {rate:.1f} pictures a second and card")
print(f"all that the cards could have computed: {possible:.1e}, so the UNet used {needed / possible:.1%}")
ours = 11_000 * 64 * table["emoji"]["step"]
print(f"emoji, 11,000 steps of 64: {ours:.1e}, one {needed / ours:,.0f}th of that")

# %% [markdown]
# COST TEXT
#
# ## The real run

# %%
if torch.cuda.is_available() and full:
    corpus_folder, out = Path("../data/emoji"), Path("../runs/emoji")
    if not corpus_folder.is_dir():
        cli.main(["data", "emoji", "--out", str(corpus_folder)])
    for network in ("clip", "vae", "unet"):  # each goes on where it stands, and does nothing if it is finished
        with quietly():
            cli.main(["train", network, "--data", str(corpus_folder), "--out", str(out)])
    picture = Image.open(sorted((out / "unet/samples").glob("*.png"))[-1])
else:
    picture = Image.open("../docs/pictures/emoji_curves.png")
picture

# %%
Image.open("../docs/pictures/evaluation/train.png").crop((0, 0, 1054, 264))

# %% [markdown]
# REAL TEXT
#
# ## Your own pictures

# %%
own = runs / "own"
own.mkdir()
black = [i for i, caption in enumerate(shapes.captions) if "black" in caption and caption.count(" ") < 3][:24]
for k, i in enumerate(black):
    pixels = shapes.images[i].copy()  # [32 32 3]
    pixels[..., 1:] = pixels[..., 1:].clip(190)  # black becomes turquoise, white stays white
    Image.fromarray(pixels).save(own / f"{k}.png")
    (own / f"{k}.txt").write_text(shapes.captions[i].replace("black", "turquoise"))
mine = CaptionedPictures(own, 32)

model = minisd.load("tiny", "cpu")
wishes = ["a turquoise star", "two turquoise squares", "a large turquoise heart", "a large red circle",
          "two green hearts"]  # fmt: skip
before = model.txt2img(wishes, **few).pictures
with quietly():
    gently = replace(recipes.FINETUNE, steps=150 if full else 2, warmup=20, log_every=10 if full else 1)
    finetune_unet(model, gently, mine, runs / "finetuned", engine)
after = model.txt2img(wishes, **few).pictures
_, loss = logged("finetuned")
print(f"{len(mine)} pictures, such as {mine.captions[:3]}; loss {loss[0]:.3f} -> {loss[-1]:.3f}")
some = mine.batch(range(5))
with torch.no_grad():
    again = model.first_stage_model.decode(model.first_stage_model.encode(some).mode())
labels = ["some of the\npictures", "through the\nautoencoder", "before", "after"]
viz.strip([some, again, before, after], labels=labels, notes=[[], [], [], wishes], size=1.2)

# %%
work.cleanup()
print(f"This notebook took {time.time() - start:.0f} s.")
