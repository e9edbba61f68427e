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
# - what takes the memory, what takes the time, and what the 150,000 GPU hours of Stable Diffusion were spent on;
# - what a model can be told instead of a caption: classes, the rest of a picture, and whatever you write a class for.
#
# About an hour to read; it runs in five to ten minutes on a laptop. The modules of this stage are the pages of
# [`minisd/training/`](../minisd/training/trainer.py). Everything is trained on the small model `tiny`. What is
# known of the large one alone is taken from its model card, or computed.
#
# Before: [notebook 07](07_latent_diffusion.ipynb), where the three networks were trained for the first time. Next:
# [notebook 09](09_stable_diffusion_v1.ipynb), the official weights.
#
# To see one training example in your browser first, open the stop [What training did](../docs/play.md#tour=training) of
# the guided tour.

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
from PIL import Image, ImageDraw
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import minisd
from minisd import cli, viz
from minisd.checkpoint import SHIPPED, load_clip
from minisd.clip import contrastive_loss
from minisd.conditions import CONDITIONS, Captions, Inpainting, condition, random_masks
from minisd.data import CaptionedPictures, draw_shapes, sample
from minisd.data.shapes import scene, shape_corpus, with_article
from minisd.loss import epsilon_loss, min_snr_weight, text_dropout
from minisd.pictures import read_picture
from minisd.training import CLIPPerceptual, Recipe, SingleDevice, Trainer, recipes, train_unet
from minisd.training.discriminator import adaptive_weight, hinge_d_loss
from minisd.training.unet import by_time, encode_prompts
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
# the forms in which each caption is read, one a line
(runs / "shapes/templates.txt").write_text("{}\na {}\nthe {}\na picture of a {}\n", encoding="utf-8")
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
# | learning rate, warm-up | `v1-inference.yaml`: 1e-4, 10,000 steps | `recipes.toml` |
# | batch, hardware, number of steps | the model card | `recipes.toml` |
# | EMA | `ema.py: LitEma`; off in the configuration, which is for drawing | `trainer.py: EMA` |
# | the loop, devices, accumulation, checkpoints | the framework PyTorch Lightning | `trainer.py`, `engine.py` |
# | the data (`LAION`) | no class that reads it | `data/` |
# | the autoencoder's losses | `contperceptual.py`; parts in another repository, taming-transformers | `training/` |
# | CLIP's training | not there, nor in OpenAI's repository; a figure of the paper | `training/clip.py` |
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
max_length = tiny.cond_stage.max_length
forms = [[form.format(caption) for caption in shapes.captions] for form in shapes.templates]
tokens = torch.stack([tokenizer(texts, max_length).ids for texts in forms], dim=1)  # [n 4 16]: ids in four forms
print(f"tokens {list(tokens.shape)}, the forms: {shapes.templates}")
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
# **Pull only** is a perfect success by its own measure: a loss of 0.000. Look at the cosine with *other* captions:
# 1.00. Everything lies in one point, and the right caption is found hardly more often than by chance.
#
# **With $s = 1$** there is contrast, and the towers do learn: 61% are right. But the loss creeps from 4.16 to 3.35, on
# its way to a floor of 2.25: it cannot tell a good tower from a very good one. **With $s$ learned**, the same steps
# bring 83% and a loss of 0.63. ($s$ is kept from growing past 100, as in the paper.)
#
# **Four forms** cost nothing here on the form that the others know by heart (86%), and buy everything else: of the
# captions in the fourth form, "a picture of a red circle", 88% find their picture, instead of 30%.
#
# What is normal: the loss starts at $\ln N$ for batches of $N$ or a little above, stays there for some steps, and
# falls. `emoji`, with batches of 256, went from $\ln 256 = 5.55$ to 0.059, with 99.2% right. OpenAI took batches of
# 32,768: the more others a picture has to be told from, the finer the distinctions that are worth learning. This is why
# a batch of CLIP cannot be cut into parts (see "accumulation" below). [`training/clip.py`](../minisd/training/clip.py)
# is the page.
#
# ## The autoencoder: four terms, and what each is for
#
# $$\mathcal L = \underbrace{\mathbb E\,|x - \hat x|}_{\text{each number}}
#   + \underbrace{w_p\, d(x, \hat x)}_{\text{looks alike}}
#   + \underbrace{w_{KL}\,\mathrm{KL}(q(z|x)\,\|\,\mathcal N(0, I))}_{\text{latents stay where they are}}
#   + \underbrace{w_d\,\lambda\,\big(-\mathbb E\, D(\hat x)\big)}_{\text{details look real}}$$
#
# This is `LPIPSWithDiscriminator` of CompVis, with $w_p = 1$, $w_{KL} = 10^{-6}$, $w_d = 0.5$. The first and the third
# are the subject of notebook 04, and all that the latents of the shipped `emoji` were made with. What are the other two
# for?
#
# **The naive idea** is the first term alone. It counts numbers, one by one. Take a picture, and spoil it in three ways:
# shift it by one pixel; blur it; make it a little darker. Which of them would *you* call the worst, and which does
# $|x - \hat x|$ call the worst? Beside it, a **perceptual** distance: that of what a network sees which has
# learned to tell things from each other. `CLIPPerceptual` takes the image tower of a CLIP for that, here of the one
# that ships: the tokens of the patches, layer by layer, as vectors of length 1 (after Zhang et al. 2018, eq. 1).

# %%
clip, _ = load_clip(SHIPPED / "emoji")  # its image tower was trained beside the text tower that ships
perceptual = CLIPPerceptual(clip)  # the mean over layers and places of |f(x) - f(x̂)|², [b]

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
# For $|x - \hat x|$, the darker picture is by far the worst and the blurred one the best of the three. A person would
# say the reverse: the darker rocket is the same rocket, the blurred one is not sharp. The perceptual distance agrees as
# to these two: blurred is almost nine times as far as darker. So an autoencoder that minimises $|x-\hat x|$ alone is
# paid for blur, and one that minimises both is not.
#
# It is no oracle: by this tower, the shift is the worst of all, which no person would say. The distance that Stable
# Diffusion's autoencoder was trained with is LPIPS: a VGG, with weights that were fitted to what people judged. (The
# class `LPIPS` takes it, if you have its files.)
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
# itself $D$ is (Esser et al. 2021, eq. 7, there with $10^{-6}$). $D$ starts late (at step 50,001 in Stable Diffusion's
# autoencoder): before the reconstruction says anything, there is nothing to judge.
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
            loss = rec + weight * adaptive_weight(rec, g_loss, decoder[2].weight, engine) * g_loss  # λ, as above
        of_decoder.zero_grad()
        loss.backward()
        of_decoder.step()
        if weight and step >= steps // 5:
            d_loss = hinge_d_loss(D(x), D(x_hat.detach()))
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
# Each picture of the second row is what $|x - \hat x|$ asks for: a pale mixture of all places, and none of them could
# stand in the first row. In the third row there are stripes, some of them crisp. The price is in the table: their mean
# $|x - \hat x|$ is *higher*, 1.08 against 1.00, since the place is still a guess, and now a bold one. **A discriminator
# does not add information; it makes the decoder commit itself.** So it makes details up.
#
# In four real runs of `tiny` on emoji ([lab log](../docs/lab_log.md)), the perceptual distance brought the
# reconstructions of held-out pictures from 18.54 to 19.35 dB, and the discriminator took 0.2 dB of that back, for a
# contrast of 1.01 times that of real pictures, where it had been 0.90.
#
# ![Above, held-out pictures; below, what each of the four makes of them](../docs/pictures/autoencoders.png)
#
# From above: held-out pictures; by pixels alone; with the perceptual distance; with the discriminator as well; with a
# codebook in place of the KL (pixels alone). The discriminator brings back the colours, and overdoes some.
#
# **The decoder may go on by itself.** The UNet learns latents, so once it is trained, the encoder must stay as it is;
# the decoder need not. That of the `emoji` that ships was trained further when all else was done, by `minisd train vae
# --init`: squared errors, 0.1 times the perceptual distance, and at last noise on the latents, so that it overlooks the
# small mistakes that a sampler makes. Held-out pictures went from 23.3 to 24.1 dB. *From the very same latents*, 50.7%
# of the drawings of held-out captions were taken for the style that was asked for, where it had been 44.5% (for the
# concept 39.2%, after 41.2%, no more than the error). The command, the pictures and what Stability AI did alike for
# Stable Diffusion are in [a better decoder for a finished
# model](../docs/training.md#a-better-decoder-for-a-finished-model).
#
# The sum of all terms is `AutoencoderLoss` in [`vae.py`](../minisd/training/vae.py); its parts are in
# [`perceptual.py`](../minisd/training/perceptual.py), [`discriminator.py`](../minisd/training/discriminator.py) and,
# for an autoencoder with a codebook, [`codebook.py`](../minisd/training/codebook.py). The KL term is the smallest of
# the four, and is for the UNet: it keeps latents of about one size and close together (notebook 04).
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
prompts = sd.cond_stage_model.prompts(shapes)  # n lists of 4 wordings
contexts = encode_prompts(sd, [wording for each in prompts for wording in each], engine).float()
contexts = contexts.unflatten(0, (len(prompts), -1))  # [n 4 16 32]
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
                form, t = batch.randint(len(shapes.templates)), batch.randint(sd.schedule.timesteps)  # [b], [b]
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
    train_unet(fresh(), short, shapes, runs / "theirs", engine)
print("ours   ", logged("ours")[1])
print("theirs ", logged("theirs")[1])
print(json.loads((runs / "ours/log.jsonl").read_text().splitlines()[-1]))

# %% [markdown]
# The same losses to the last digit: it is the same loop. (Instead of a model, `train_unet` also takes a configuration
# and the folders of the two other networks.) Below, every line of it is taken away or overdone once.
#
# The last line printed is a line of the run's log. Two things to know about it. `grad_norm` is the length of the
# gradient before it is clipped. `loss_t000` … `loss_t750` are the losses of a quarter of the timesteps each, before any
# weight.
#
# And what does "computed once" save? The table under "What a picture costs" has the answer: for `tiny`, encoding a
# picture takes more operations than the UNet's forward pass, and nearly half as many as its whole step.
#
# ## How long is a step? The learning rate
#
# The gradient says which way is down, not how far. **The naive idea:** as far as possible, to be there sooner. The same
# network, the same pictures and noise, four rates, each constant after a warm-up of 30 steps.
#
# **Predict, then run.** What will the curve of a rate that is far too high look like?
#
# <details><summary>Answer</summary>
#
# Like an explosion, but a short one: gradients are clipped, and AdamW makes no step much longer than the rate. In its
# first steps, the weights are thrown so far off that the network is dead. It ends about where it began, at the loss of
# a network that answers 0, and stays there.
#
# </details>

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
# Four rates, all else equal. **Too low** (1e-4) is not wrong, only slow: 0.427 where the others are done with the easy
# part. **1e-3** is half of the recipe's. **1e-2** was far ahead in the first fifty steps, and after a hundred it is
# where 1e-3 is; a short run always flatters a high rate, as it pays for large steps only later, when the loss is to be
# made of fine detail. **0.1 is too high**, and shows what that looks like. No NaN: the loss leaps to above 3, comes
# back, and hangs at about 1 from then on. That is hardly better than a network that answers 0, whose loss is 0.9
# (notebook 07: the mean of the min-SNR weights). So **a loss that comes back to its first value and stays is a learning
# rate that was too high**, and waiting does not help.
#
# Stable Diffusion took 1e-4, and kept it constant after the warm-up. `minisd` lets it fall to 0 along half a cosine:
# the last steps are small, and what EMA does for a constant rate (see below) is half done.
#
# ## The first steps: warm-up
#
# AdamW moves each weight by $\mathrm{lr} \cdot m/\sqrt v$: the running mean of its gradients over the root of that of
# their squares (Kingma & Ba 2015, algorithm 1). At the first step, both are made of one and the same gradient, and
# $m/\sqrt v$ is $\pm 1$: each weight that has a gradient moves by the full learning rate, however little there is to
# learn from one batch. Later, batches contradict each other, $m$ shrinks, and steps get shorter by themselves.
#
# So the rate is raised slowly, in a straight line from 0: the **warm-up**. Two rates, each with and without. On the
# right: how far a weight moves on average, in units of the rate.

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
# At one and a half times the recipe's rate (left), the warm-up is nothing but a delay. At fifteen times (middle), it
# decides: with it, the network learns; without, it is dead after five steps, at a loss above that of the answer 0, and
# eighty steps don't bring it back. The right panel shows why: at step 3 an average weight moves by six tenths of the
# rate, later by a tenth or less, in both runs alike. The long steps come first, and warm-up makes them shorter.
#
# And look at the very first step on the right: next to nothing. The last layer starts at zero (notebook 03), and what
# stands before a zero has no gradient: in step 1 only this layer moves, a two-hundredth of all weights. It is a
# warm-up of one step, built in.
#
# So all recipes have one. At a sensible rate it costs a hundredth of the steps; and a large network, which is trained
# once, is not the place to find out what rate is sensible. Stable Diffusion: 10,000 steps, from $10^{-6}$ of the rate
# up (`LambdaLinearScheduler` in `v1-inference.yaml`).
#
# ## One bad batch: clipping
#
# Ten thousand good batches, and one bad: a picture that was broken, a number that overflowed. Here the loss of one step
# is multiplied by 1000, and so is its gradient.

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
# In one step of 110, the loss was multiplied by 1000: a broken picture, a number that overflowed. (That point is left
# out on the left; on the right it is the needle.) **Clipping** scales the whole gradient down to a length of 1,
# whatever it was. Its run hardly notices. **Without**, the loss climbs for six steps, up to that of a network that
# answers 0, and sixty steps later it is still at more than twice that of the other run.
#
# One might think that the step was a thousand times too long. It was not: AdamW divides the mean of the gradients by
# the root of the mean of their squares, so no step is much longer than the learning rate. The harm is that both means
# *remember*. The first points along the bad gradient for some ten steps ($0.9^{10} = 0.35$). The second takes its time
# to forget how large it was, $0.99^{138} = 1/4$, so that for a hundred steps and more all others seem tiny beside it.
#
# (CompVis's code sets no clipping; Lightning, its framework, can be told to by a flag. And a gradient that is *no*
# number can't be scaled: `minisd` then stops before it touches a weight, and names the pictures of that batch.)
#
# ## The mean of the weights: EMA
#
# **The naive idea:** the model is what the last step left. But each step follows *its* batch. At a constant rate the
# weights never come to rest, and the last ones are good for the last few batches by chance. The remedy is to keep a
# running mean beside them:
#
# $$\bar\theta \leftarrow d\,\bar\theta + (1-d)\,\theta \qquad d = \min\Big(d_{max}, \frac{1+n}{10+n}\Big)
#   \qquad \text{(CompVis } \texttt{ema.py)}$$
#
# after each step $n$. With $d_{max} = 0.9999$ it looks ten thousand steps back; the second term keeps it from
# remembering the random start. Nothing is trained on it. It is what is saved, and drawn with.
#
# To see it, take the finished `tiny`, and train it on at a constant rate (120 steps, $d_{max} = 0.98$).
#
# **Predict, then run.** A mean of *pictures* is a blur. Is a mean of fifty *networks* a network that blurs?
#
# <details><summary>Answer</summary>
#
# No. The fifty lie close together in one valley, and differ by the jitter of single batches; their mean lies nearer to
# its bottom.
#
# </details>

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
# By the drawings alone it is hard to say which row is best: the weights at 1e-3 put a yellow patch into the circle, and
# both means smear a triangle. (The star that should be a diamond, and the two hearts, are mistakes that `tiny` made
# before.) The loss tells: at 3e-4, it is 0.0377 for the weights, and 0.0366 for their mean; at 1e-3, half of the
# recipe's first rate, it falls from 0.0423 to 0.0387, over nothing but an average. (Both means are above the 0.0363 of
# before: the run that made `tiny` let its rate fall to 0.)
#
# So **with a constant rate, as in Stable Diffusion, never judge a run by its raw weights.** And know which of the two
# is in a file: CompVis's README speaks of "EMA-only" checkpoints, and of "full" ones, which hold both.
#
# ## Which timesteps? Min-SNR weights, and text dropout
#
# Two lines of the loop change what is learned rather than how fast. Notebook 02 shows on points what they are for:
# **min-SNR** weights each timestep by $\min(\mathrm{SNR}_t, 5)/\mathrm{SNR}_t$, **text dropout** forgets one caption in
# ten, so that the network has an answer to the empty prompt, which guidance subtracts. Now with pictures: three runs of
# 300 steps, measured alike, without weights, first with the right captions, then with none.

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
# **Min-SNR** (middle): at small $t$, where its weight is low, the run without it is ahead by up to 15%; from $t = 100$
# on it is behind, by 3 to 19%. Neither is better as such: they spend the same effort in different places. The recipe
# spends it where shapes and colours are decided. Stable Diffusion had no such weights.
#
# **Text dropout** costs next to nothing: with captions, the run without it is ahead by 2% at best. What it buys is on
# the right. Without captions, the run that never heard an empty prompt is worse by 6 to 26%, after no more than 300
# steps. Guidance multiplies this error by $s - 1$; notebook 02 draws what becomes of it in a network that was trained
# for longer.
#
# **It is in no line of CompVis's repository.** The model card says it of v1-3, "10% dropping of the text-conditioning",
# and of the two checkpoints before it says nothing.
#
# ## What the loss does
#
# Two questions that everybody asks: why does the loss fall within minutes and then stand still for hours? And why do
# the drawings get better all the same? First the run "the recipe" from its log, with a curve for each quarter of the
# timesteps. Then the two UNets of `tiny` that ship, as they were after 500 and 5,000 steps, and one that has learned
# nothing, measured on the same noise.

# %%
title = "the recipe, by timestep, from its log"
parts = {f"t from {t} to {t + 249}": logged("the recipe", f"loss_t{t:03d}") for t in (0, 250, 500, 750)}
viz.curves({title: parts}, xlabel="step", ylabel="loss", log=[title], width=6)

# %%
folder = SHIPPED / "tiny"
stages = {
    "0": fresh(),
    "500": minisd.load(folder / "after_000500_steps.safetensors", device="cpu"),
    "5,000": sd,
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
print(f"\nsingle batches of 32, the model after 5,000 steps: from {min(single):.3f} to {max(single):.3f}, "
      f"standard deviation {torch.tensor(single).std():.3f}")  # fmt: skip
panels = {
    "loss by timestep": {f"{name} steps": (timesteps, v) for name, v in by_stage.items()},
    "as a share of that after 500 steps": {
        f"{name} steps": (timesteps, v / by_stage["500"]) for name, v in by_stage.items() if name != "0"
    },
}
viz.curves(panels, log=list(panels), width=4.4)

# %% [markdown]
# **Why does it stand still?** For three reasons, and the tables show them.
#
# 1. *The mean is made where little can be learned.* At $t = 0$ the loss is 0.78 after 5,000 steps. The noise there
#    is so faint that no network tells it from the picture, unless it knows the pictures by heart (notebook 02). At
#    $t = 999$ it is 0.002. A mean over $t$ hardly sees the right end.
# 2. *What remains is small.* In the first 500 steps the mean falls by 0.94, in the next 4,500 by 0.03.
# 3. *And it is buried.* Single batches of the finished model lie between 0.016 and 0.066, by the luck of their $t$.
#    Their standard deviation, 0.013, is a third of the loss itself. Between 500 and 5,000 steps, the mean falls by
#    eight *millionths* a step.
#
# **Why do the drawings get better?** Look at the right panel: at $t = 999$ the loss after 5,000 steps is 29% of what it
# was after 500; at $t = 0$ it is 90%. At large $t$ it is decided what the picture is of, where, and in which colour.
# There the loss is small in any case, and a small difference is a large one. Each step of drawing builds on the ones
# before, too: errors add up.
#
# So: log the loss by timestep, judge by drawings from fixed noise (`sample_every`), and let a run that stands still go
# on.
#
# ## Randomness: a function of seed, step and sample
#
# Noise, timesteps, forgotten captions, the sample of the latent, the order of the pictures: a step is full of dice. Let
# us look at what is drawn in step 7: by one process; by one that cuts its batch in two parts; and by two processes.

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
# Each entry is `index of the picture : first number of its noise`. **The naive way** is `torch.manual_seed(0)` at the
# start and `torch.randn(…)` in each step. It works until anything changes: a batch in two parts draws in another order;
# two processes with one seed draw the *same* noise for different pictures; a run that goes on after a crash draws again
# what the first steps had drawn, unless the state of every generator was saved.
#
# Here nothing is remembered. Sample $k$ of step $n$ has a generator of its own, seeded by (seed, $n$, $k$):
# `batch.randn`, `batch.randint`, `batch.rand` draw from those, on the CPU, so that a GPU gets the same numbers. Which
# picture it is follows from the seed and the epoch. All three ways above are then step 7 of the same run. Everything in
# the next three sections comes from this.
#
# ## Accumulation: a large batch in small memory
#
# Four steps with batches of 32 in one piece, and in four pieces of 8.

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
# Batch 32 does not fit? Take four parts of 8, add up their gradients (each loss divided by 4), and only then make the
# step. The gradient of a mean is the mean of the gradients, so this is *the same* step, but for rounding. It costs
# time, not memory, and no accuracy; it would be otherwise if a layer looked across the batch, as batch norm does. The
# UNet has none.
#
# CLIP's loss does look across the batch: each picture is told from all the others. So it refuses.
#
# ## Stopped, and gone on with
#
# A run of eight steps with a checkpoint every four; and the same run, with the power cut in the fifth.

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
# The power went in the fifth step, one after the checkpoint. The run that went on lost one step, made it again, and
# ended with the same bits. It began with *other* random weights (`seed=1`), which the checkpoint replaced.
#
# A checkpoint is more than the weights. Without Adam's two means (`exp_avg`, `exp_avg_sq`) the first steps would be as
# blind as at the start; without the EMA, the mean would have to be collected anew; without `step`, learning rate, noise
# and the order of the pictures would begin again. (`weights_only=True`: a checkpoint is data, and reading one must not
# run code that somebody put into it.) [`docs/training.md`](../docs/training.md) says what else may happen to a run:
# Ctrl-C, a full disk, a damaged file.
#
# ## Many processes
#
# The run of one process, and the same command started by `torchrun`, which starts two. They talk to each other, and
# both compute on this CPU. (In smoke mode this is left out.)

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
# Two processes, each with four of the eight pictures, and the losses of one, to the last digits of float32. What
# happens in a step with $P$ processes (data parallelism, DDP):
#
# 1. each has all weights, takes its $1/P$ of the batch, and computes the gradient of its part;
# 2. the gradients are averaged over all (`all-reduce`): the same sum as in accumulation, spread over space, not time;
# 3. each clips the same gradient and makes the same step. So the weights stay equal, and never have to be sent.
#
# The batch is that of *all* together, so the recipe need not change with the number of cards. CLIP needs one more
# thing: each process gathers the vectors of all, with their gradients, and tells its pictures from the whole batch.
#
# The loop is the one that you have read; `Accelerator` takes the place of `SingleDevice`
# ([`engine.py`](../minisd/training/engine.py)). On eight GPUs:
#
# ```bash
# accelerate launch --multi_gpu --num_processes 8 -m minisd train unet
# torchrun --nproc_per_node 8 -m minisd train unet             # the same
# ```
#
# ## Half the digits: bf16
#
# The matrix units of a GPU compute several times faster with 16 bits than with 32. What can go wrong?

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
# A bfloat16 has as large a range as a float32, and only 8 significant bits, two and a half decimal digits. **The naive
# way** is to turn the whole model into bf16, `model.bfloat16()`. Half the memory, much of the time saved, and it learns
# badly: a step of 1e-3 on a weight of 1 is rounded away, each time. An EMA is worse off, as each of its steps is a
# thousandth of a difference: it got stuck at a quarter of the way.
#
# **The remedy** is `autocast`: the weights, their gradients, Adam's means and the EMA stay float32; for each
# convolution and each matrix product, weights and activations are rounded to bf16, and multiplied fast. Errors of
# single products cancel in sums, and don't pile up from step to step. The loss is computed in float32. (float16, which
# older cards need, has a short range as well, and so needs a scaler for the loss; bf16 needs none.)
#
# For `emoji` on two cores, bf16 autocast brought 138 images a second, against 84 in float32 ([lab
# log](../docs/lab_log.md)). `minisd train` has it on (`--precision bf16`); this notebook has it off, so that rounding
# hides nothing.
#
# ## Where the memory goes
#
# **Predict, then run.** The UNet of Stable Diffusion v1 has 860 million parameters, so 3.4 GB in float32. How much
# memory does it take to train it, before the first picture comes in? And how much for each picture?

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
        unet, *inputs = on_meta(minisd.PRESETS[name].unet, size)
        unet.use_checkpoint(recompute)
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
# Read the line of `sd-v1`. The weights are 3.44 GB, and that is the least of it. Each parameter takes **20 bytes** in
# training: 4 for itself, 4 for its gradient, 8 for Adam's two means, 4 for the EMA. These 17 GB do not depend on the
# batch.
#
# The **activations** do: what each layer gave is kept until the way back, since the gradient of a product needs its
# factors. 4.8 GB for each picture, of which 2.7 GB are the weights of attention. (They are counted as if attention were
# written out. A fused kernel (Dao et al. 2022), which PyTorch takes on a GPU, never holds them: without them we counted
# 1.9 GB.) A card with 40 GB, as in the model card, would hold four pictures, and no more.
#
# **Gradient checkpointing** (Chen et al. 2016) keeps only what goes into each layer, and computes its inside again on
# the way back: 0.16 GB, plus one layer at a time. The next section says what it costs: a quarter more operations.
# CompVis's configuration has it on (`use_checkpoint: True`).
#
# How does the table know, without 20 GB? The network is built on the device `meta`, where tensors have a shape and no
# numbers. A `TorchDispatchMode` sees each operation, and counts the bytes of what is made and freed.
#
# ## What a picture costs
#
# How many additions and multiplications is a step, and how fast can they be done?

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
        unet, *inputs = on_meta(config.unet, size)
        unet.use_checkpoint(recompute)
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
# A matrix product of $[m, k]$ and $[k, n]$ takes $2mkn$ operations, a multiplication and an addition for each of $mkn$
# pairs. `FlopCounterMode` adds up what the network's products and convolutions take. Three things to see in the first
# table.
#
# - **A step is three times a forward pass.** On the way back there are two products for each one on the way there: the
#   gradient for the layer's input, and that for its weights. With recomputation it is 3.7 times.
# - **An encoder is not cheap.** In `sd-v1`, to encode a picture of 512×512 takes more than the UNet's forward pass, and
#   nearly half of its whole step. Who computes latents once saves that in every epoch but the first. (Stable
#   Diffusion's authors encoded anew in each step: `get_input` in `ddpm.py`.)
# - `sd-v1` needs two thousand times as much for a picture as `emoji`.
#
# **MFU**, the model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B): the operations that the mathematics of
# the model needs, a second, over those that the machine can do. Recomputation does not count: it is work, but not
# progress. `emoji` in float32 on one thread of an idle CPU came to 98% of what a large matrix product reaches, `tiny`
# to 76%: the smaller the products, the more of the time goes to everything that is not a product. (Measure on a machine
# that is idle. Other work ran beside the run above: the product reached 91 GFLOP/s in place of 102, and the MFU came
# out as 72% and 74%.)
#
# And Stable Diffusion? The model card gives 150,000 hours of A100, batches of 2,048 (32 machines × 8 cards × 4 pictures
# × 2 accumulated), and the steps: 237,000 at 256×256; at 512×512, 194,000 to v1-1, 515,000 more to v1-2, and 225,000
# from there to v1-4. Together, if all hours went into these, this is what comes out: 24 days on 256 cards, 4.4 pictures
# a second on each, and the UNet's own mathematics is **3% of what the cards could have done** in bf16.
#
# Where is the rest? We can account for some: recomputation and the encoders make 1.7 times the work. The card doesn't
# say in which precision they computed (with TF32, an A100's limit is half), nor which hours are counted. The published
# code writes attention out; how long it waited for its data, we don't know. At an MFU of 40%, with the latents computed
# before, the same steps would take about 11,000 hours. **The recipe was the discovery; the speed is engineering**, and
# it is what [`benchmarks/scale.py`](../benchmarks/scale.py) measures on a GPU.
#
# ## The real run
#
# What the same functions give when they are left alone for long enough.

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
# The three runs that made `emoji`, the model that ships: two cores of a CPU, 106 minutes in all, and 45 more of one
# core for its decoder, which was trained further ([lab log](../docs/lab_log.md)). Below, its drawings (first and third
# row) over the real pictures of the same captions, from its training. With a GPU, the cell above trains it anew, by the
# first four of the commands that you would type:
#
# ```bash
# minisd data emoji
# minisd train clip
# minisd train vae
# minisd train unet
# minisd train vae --init runs/emoji/unet/model    # its decoder, once more
# ```
#
# **Which loss is normal?** These are; all from real runs.
#
# | network | the first steps | on the way | at the end |
# |---|---|---|---|
# | CLIP, batch 256 | $\ln 256 = 5.55$ | stays there a little, then falls steadily | 0.059; 99.2% right among 256 |
# | autoencoder, mean of the absolute error | about 0.7 | 0.12 after 500 steps | 0.07; 23.4 dB |
# | its decoder, trained further | 23.4 dB | 27.0 dB after 5,000 steps | 25.8 dB after 2,500 more with noise |
# | UNet, min-SNR weights | 0.9 | 0.1 after 500 steps, 0.07 after 4,000 | 0.044 |
# | UNet, no weights (`tiny`, measured above) | 1.0 | 0.071 after 500 steps | 0.036 after 5,000 |
#
# The UNet's curve is the one that people worry about: a cliff, then a plain. On the plain, its loss halved in ten
# thousand steps, and on this plain everything was learned that one would call drawing.
#
# ## Your own pictures
#
# A finished model can be taught more, by the same loop: `train_unet`, or
#
# ```bash
# minisd train unet --init emoji --data FOLDER
# ```
#
# with a folder of pictures, and beside each a `.txt` with its caption. [`docs/finetuning.md`](../docs/finetuning.md)
# teaches `emoji` an eighth style from forty pictures, and says what to expect. Here, in seconds: `tiny` knows eight
# colours, and turquoise is not among them. We give it two dozen turquoise shapes.

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
    train_unet(model, gently, mine, runs / "finetuned", engine)
after = model.txt2img(wishes, **few).pictures
_, loss = logged("finetuned")
print(f"{len(mine)} pictures, such as {mine.captions[:3]}; loss {loss[0]:.3f} -> {loss[-1]:.3f}")
some = mine.batch(range(min(5, len(mine))))
with torch.no_grad():
    again = model.first_stage_model.decode(model.first_stage_model.encode(some).mode())
labels = ["some of the\npictures", "through the\nautoencoder", "before", "after"]
viz.strip([some, again, before, after], labels=labels, notes=[[], [], [], wishes], size=1.2)

# %% [markdown]
# (Prompts stand under the last row; the first two rows are pictures of the folder.) "Turquoise" was no word before:
# blue, and violet. Now the star is a star, the squares are squares, and the heart is a large one. But the colour is a
# *grey of green and purple*. The second row says why: the autoencoder of `tiny` has never seen turquoise, and turns it
# into just that on the way through. **What the autoencoder can't draw, the UNet can't learn.** So before you fine-tune,
# send your pictures through the autoencoder alone, and look. (Where the latent has kept what the decoder does not show,
# the decoder can be [trained further, too](../docs/finetuning.md#4-lines-the-decoder).)
#
# The last two columns ask for old things. The red circle has turned orange, the green hearts have grown dark: two dozen
# pictures of one colour pull at all others. More pictures, fewer steps, a smaller rate.

# %% [markdown]
# ## What else a model can be told
#
# So far our models were told a caption. The UNet does not mind where that comes from. It has two ways in, and takes
# whatever fits one of them (notebook 07):
#
# - **cross-attention** reads a sequence of vectors, the context [b n d]. A sequence has no place in the picture, so it
#   suits what is true of the whole: a caption, a class;
# - **concatenation** lays maps [b c h w] on the noisy latent, as further channels of the first convolution. A map says
#   something about each place: what is there already, where something should be.
#
# Whatever a model is told is a *condition*, and for each kind there is one class in
# [`conditions.py`](../minisd/conditions.py). It answers four questions:
#
# | | what the model gets: `encode`, `maps` | by which way | what says nothing | training needs |
# |---|---|---|---|---|
# | `Captions` | a vector for each token, by CLIP, which is finished | attention | `""` | captions |
# | `ClassEmbedder` | a row of a table, which is trained along | attention | a row of its own | a class for each one |
# | `Inpainting` | a caption; the mask and the rest of the picture | both | `""` | captions; it makes the masks |
# | `Nothing` | nothing | neither: the UNet has no cross-attention | always | pictures |
#
# To try them we need pictures that can be told apart in more than one way. Below are shapes of one kind and colour,
# sorted into folders. Under each stands its caption, above it the name of its folder. The other two rows show what two
# further conditions would say about it.

# %%
in_folders = runs / "in_folders"  # star/17.png, and beside it star/17.txt with "a red star"
for k, pixels in enumerate(shape_corpus(4000 if full else 100, seed=1)[0]):
    described = scene(1, k)
    item = described.items[0]
    if described.kind != "relation" and described.split == "train":  # no pictures of two kinds of shapes
        (in_folders / item.shape).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(in_folders / item.shape / f"{k}.png")
        (in_folders / item.shape / f"{k}.txt").write_text(with_article(item.name))
with quietly():
    sorted_shapes = CaptionedPictures(in_folders, 32)


def plan_of(x):
    """Where a picture is not white: the share of each patch of 4x4 pixels, [b 3 32 32] -> [b 1 8 8]."""
    return F.avg_pool2d((x.amin(dim=1, keepdim=True) < 0.8).float(), 4)


chosen = torch.linspace(0, len(sorted_shapes) - 1, 9).long().tolist()
x = sorted_shapes.batch(chosen)
masks = random_masks([torch.Generator().manual_seed(k) for k in range(len(chosen))], 32)  # as training draws them
print(f"{len(sorted_shapes)} pictures in the folders {', '.join(sorted(set(sorted_shapes.column('folder'))))}")
viz.strip(
    [x, x * (1 - masks), 1 - 2 * plan_of(x)],
    titles=[sorted_shapes.column("folder")[i] for i in chosen],
    labels=["the picture", "inpainting:\nthe rest of it", "a plan:\nwhere it is not white"],
    notes=[[sorted_shapes.captions[i] for i in chosen], [], []],
)

# %% [markdown]
# ### Classes: a row of a table
#
# The classes are numbered, and each has a learned vector (CompVis's `ClassEmbedder`; their ImageNet model has 1,000 of
# them). That is a context of one word. The table starts at random and is trained along with the UNet. A further row,
# the last, stands for "no class". Training takes it for one picture in ten, so that guidance has something to subtract,
# as the empty prompt does for captions.
#
# On the command line, `--condition` says what the model is told
# ([training](../docs/training.md#what-the-model-is-told)):
#
# ```bash
# minisd train unet --condition classes --data FOLDER          # the classes are the names of its folders
# ```
#
# That trains a UNet from scratch. Here it is quicker to take `tiny`, which can draw shapes already, and to exchange the
# text encoder for a table. Nothing in the UNet has to change for this.
#
# **Predict, then run.** The classes are the six folders. What will colour, size and number be, if the model is told
# "star"?
#
# <details><summary>Answer</summary>
#
# Whatever they are in the folder of stars, at random. What a model is not told, it draws as it comes in the data.
#
# </details>

# %%
def told_by(name):
    """`tiny` with another condition. Channels that its UNet has not had so far start at zero, a table at random."""
    torch.manual_seed(0)
    config = CONDITIONS[name].configure(sd.config, sorted_shapes)
    model, weights = minisd.LatentDiffusion(config, tokenizer), sd.state_dict()
    first = "model.diffusion_model.input_blocks.0.0.weight"  # of the first convolution, [64 4 3 3]
    further = model.config.concat_channels
    weights[first] = F.pad(weights[first], (0, 0, 0, 0, 0, further))  # [64 4+further 3 3]
    model.load_state_dict(weights, strict=False)
    return model


def retrain(model, name, steps, **changes):
    """What it draws with after that many steps, read from its folder again."""
    quick = replace(recipes.FINETUNE, steps=steps if full else 2, lr=2e-3, warmup=20, ema_decay=0.98, log_every=10,
                    sample_every=10_000, save_every=10_000)  # fmt: skip
    with quietly():
        train_unet(model, replace(quick, **changes), sorted_shapes, runs / name, engine)
    return minisd.load(runs / name / "model", "cpu")


by_class = retrain(told_by("classes"), "classes", 300)
table = by_class.cond_stage_model
print(f"{type(table).__name__}: {table.config.names}, and 'no class', number {table.unconditional}")
print("context", list(by_class.get_learned_conditioning(["star", "heart"]).shape))
rows = [by_class.txt2img(table.config.names, seed=10 * k, **few).pictures for k in range(3)]
rows.append(by_class.txt2img([table.unconditional] * len(table.config.names), **few).pictures)
try:
    by_class.txt2img("hexagon")
except ValueError as error:
    print(error)
viz.strip(rows, table.config.names, ["", "", "", '"no class"'])

# %% [markdown]
# Each column shows the shape that was asked for. Colour, size, place and number are different in each row, because the
# model was not told them. The last row was told "no class", and draws any shape. (A model that is told nothing at all,
# `--condition none`, does only that.)
#
# The error message is the price of a table. A table has a row for each class and no words, so that a new class has no
# vector, and two classes cannot be put together as "red" and "star" can. In return it needs no CLIP and no captions.

# %% [markdown]
# ### A new condition is one class
#
# What if your pictures come with something else: a sketch, a pose, a temperature? Then write a class. Ours is told a
# caption and a *plan*, a map of where something is to be drawn. It inherits from `Captions`, so that `encode` and the
# prompts are done, and adds one channel. `@condition("plan")` enters it where the command line, config.json and the
# training loop look. A model that is saved with it can be loaded wherever this class has been imported.
#
# The weights of the new channel start at **zero**. So at first the model draws just as before, and then it learns to
# look. The official inpainting model was made from the ordinary one in the same way (model card of v1-5-inpainting).

# %%
@condition("plan")
class Plan(Captions):
    """A caption by cross-attention, and by concatenation where the picture is not white."""

    @classmethod
    def fits(cls, config):  # is a model of this configuration told this?
        return super().fits(config) and config.concat_channels == 1

    @classmethod
    def configure(cls, config, data, column=None):
        return replace(config, unet=replace(config.unet, in_channels=config.first_stage.embed_dim + 1))

    @staticmethod
    def concat_channels(config):
        return 1

    def maps(self, sd, data, batch):  # for a training batch
        return plan_of(data.batch(batch.indices)).to(sd.device)


def discs(*boxes):
    """Black discs on white, [1 3 32 32]: drawn by hand, so to speak."""
    image = Image.new("RGB", (32, 32), "white")
    for box in boxes:
        ImageDraw.Draw(image).ellipse(box, fill="black")
    return read_picture(image)


by_plan = retrain(told_by("plan"), "plan", 400)
print(type(by_plan.cond_stage_model).__name__, "was loaded, and its UNet takes", by_plan.config.unet.in_channels)
drawings = torch.cat([
    discs((2, 2, 12, 12)),
    discs((2, 20, 12, 30), (20, 2, 30, 12)),
    discs((1, 2, 10, 11), (21, 2, 30, 11), (11, 20, 20, 29)),
    discs((1, 1, 10, 10), (12, 11, 20, 19), (22, 21, 31, 30)),
    discs((1, 1, 9, 9), (22, 1, 30, 9), (11, 11, 20, 20), (1, 22, 9, 30), (22, 22, 30, 30)),
    discs((4, 5, 27, 27)),
    discs((11, 1, 21, 30)),
])  # fmt: skip
plans = plan_of(drawings)
wanted = ["a red heart", "a blue square", "a green star", "a purple circle"]
gently = few | {"guidance_scale": 2.0}
rows = [by_plan.txt2img([wish] * len(plans), c_concat=plans, **gently).pictures for wish in wanted]
viz.strip([drawings, 1 - 2 * plans, *rows], labels=["drawn by hand", "the plan", *wanted])

# %% [markdown]
# In each column the plan is the same, in each row the caption. The plan decides on place, number and size, the caption
# on shape and colour. In the first three columns both are followed everywhere. No picture of the corpus shows two
# shapes on a diagonal, and none shows five, but the model can draw them when the plan says so.
#
# Look at where it fails, too. With five circles, two are missing. In the large disc and in the narrow ellipse, a star
# can't be drawn so that it fills them: there the model tries to follow both, and draws something in between. It has
# been trained for 400 steps.
#
# This is the idea of ControlNet (Zhang et al. 2023), on the smallest scale. ControlNet leaves the UNet as it is and
# trains a copy of half of it to read the map. Its new layers start at zero, too.

# %% [markdown]
# ### Inpainting: the rest of the picture
#
# `sd.inpaint` of an ordinary model needs no training: at each step it puts the part that is to be kept back
# (notebook 07, RePaint). But the UNet draws the *whole* picture each time, and does not know that a part of it will be
# replaced. A model that was trained to inpaint is told the mask and the rest of the picture at each step, in five more
# channels: the mask, and the latent of the picture with a hole.
#
# ```bash
# minisd train unet --condition inpainting --data FOLDER
# minisd inpaint "a red star" picture.png mask.png --model runs/emoji/unet/model
# ```
#
# The hole is grey, pixels of value 0. Before training, do what we said about your own pictures: send them through the
# autoencoder alone, and look.

# %%
pixels, captions = shape_corpus(600 if full else 200, seed=7)
usual = [k for k in range(len(captions)) if scene(7, k).split == "train"]
large = [k for k in usual if " large " in captions[k]]
fours = [k for k in usual if captions[k].startswith("four")]
whole = torch.from_numpy(pixels[large + fours]).permute(0, 3, 1, 2) / 127.5 - 1  # [n 3 32 32]
masks = torch.zeros(len(whole), 1, 32, 32)
groups = {"half of a large shape": slice(len(large)), "the last of four": slice(len(large), None)}
masks[: len(large), ..., 16:] = 1
masks[len(large) :, ..., 16:, 16:] = 1
shown = [*range(5), *range(-5, 0)]  # five of each


def seen(x):
    """What is left of pictures when they have gone through the autoencoder of `tiny`."""
    with torch.no_grad():
        return sd.first_stage_model.decode(sd.first_stage_model.encode(x).mode())


grey, white = whole * (1 - masks), whole * (1 - masks) + masks
for name, holed in {"grey": grey, "white": white}.items():
    off = ((seen(holed) - holed).abs() * (1 - masks)).sum() / (3 * (1 - masks).sum())
    print(f"a {name:5} hole: the rest of the picture comes back with an error of {off:.3f}")
viz.strip([grey[shown], seen(grey[shown]), seen(white[shown])], labels=["a grey hole", "seen", "a white hole, seen"])

# %% [markdown]
# The first row goes in, and the second is what the autoencoder gives back. The grey comes back orange or green. What is
# worse, the colours *beside* it are lost: the blue heart and the purple stars have turned grey. This autoencoder was
# trained on shapes on white and has never seen a large grey area. The norms in its encoder average over the whole
# picture, so the grey changes the latent everywhere, and the UNet cannot read from it which colour the rest has.
#
# (Stable Diffusion's autoencoder was trained on photographs, and grey is nothing special to it. For your own
# autoencoder, look before you train.)
#
# With a white hole nothing is lost (third row). The mask still says where the hole is. So we want another inpainting
# condition, and that is again one class:

# %%
@condition("inpainting on white")
class WhiteHole(Inpainting):
    """As `Inpainting`, with a hole that is white."""

    def maps(self, sd, data, batch):
        return self.rest(sd, data.batch(batch.indices), random_masks(batch.generators, data.size), batch.generators)

    def rest(self, sd, pictures, masks, generators=None):
        """[b 5 8 8]: where to draw, and the latent of the picture with a hole."""
        z = sd.get_first_stage_encoding(sd.encode_first_stage(pictures * (1 - masks) + masks), generators)
        return torch.cat([F.interpolate(masks, z.shape[-2:]), z], dim=1)


# always without a caption, so that the picture itself is all there is to go by
nine = retrain(told_by("inpainting on white"), "nine", 700, text_dropout=1.0)
free = few | {"guidance_scale": 1.0}
four_channels = []
for group in groups.values():
    count, options = len(whole[group]), free | {"blend": "before", "seed": group.start or 0}
    four_channels.append(sd.inpaint([""] * count, whole[group], masks[group][0, 0], **options).pictures)
rest = nine.cond_stage_model.rest(nine, whole, masks)  # [n 5 8 8]
nine_channels = nine.txt2img([""] * len(whole), c_concat=rest, **free).pictures

torch.manual_seed(0)
z = sd.get_first_stage_encoding(sd.encode_first_stage(whole))  # [n 4 8 8]


def put_back(x, t):
    """Before each step: what is kept of the picture, as noisy as it is at t. (`sd.inpaint` does it by itself.)"""
    return rest[:, :1] * x + (1 - rest[:, :1]) * sd.q_sample(z, torch.full((len(x),), t))


both = nine.txt2img([""] * len(whole), c_concat=rest, before_step=put_back, **free).pictures
names = ["four channels, put back", "nine channels", "nine, and put back"]
filled = dict(zip(names, [torch.cat(four_channels), nine_channels, both], strict=True))
for name, drawn in filled.items():
    for missing, group in groups.items():
        off = ((drawn - whole).abs() * masks)[group].sum() / (3 * masks[group].sum())
        print(f"{name:23}  {missing:21}  {len(whole[group])} pictures: mean error in the hole {off:.3f}")
rows = [row[shown] for row in (whole, grey, *filled.values())]
viz.strip(rows, labels=["the picture", "the hole", *(name.replace(", ", ",\n") for name in names)])

# %% [markdown]
# **Four channels** (third row). Nothing was trained; what is kept is put back at each step. The UNet does not know that
# it will be, and has to guess from the noisy latent. Half a star goes on as a green square, and the last of four has
# another shape and another colour, or is missing.
#
# **Nine channels** (fourth row), after 700 steps. The blue heart is whole, and where there were three shapes, a fourth
# comes in their colour in four pictures of five. But this model draws the kept part, too, and after so short a training
# it does not copy colours exactly: the black stars have become green, and the green hearts black.
#
# **Both** (last row): nine channels, and what is kept is put back at each step. Now the colours are those of the
# picture, except for the large green heart, and each fourth shape has the colour of the other three. The mean error in
# the hole falls from 0.23 to 0.17. (A perfect model would not have 0, because the rest of the picture does not say
# exactly where the fourth shape stands.) What is still wrong is the kind of shape: a heart beside three circles, a
# square beside three others. The official model was trained to inpaint for 440,000 steps.

# %%
work.cleanup()
print(f"This notebook took {time.time() - start:.0f} s.")

# %% [markdown]
# ## Recap
#
# - CLIP: contrast, or all collapses; a learned temperature, or it can't be sure; templates, or it knows one form only.
# - Autoencoder: the mean error is paid for blur. A perceptual distance is not; a discriminator makes the decoder commit
#   itself. As long as the encoder stays, the decoder may be trained further, and the UNet need not know.
# - UNet: whatever does not change is computed once. A rate that is too high ends at the loss of the answer 0. Clipping
#   is for the one bad batch. EMA is the model.
# - Min-SNR and text dropout move effort from where it is not needed; each costs a little elsewhere.
# - The loss stands still because its mean is made at small $t$; the drawings get better because of what happens at
#   large $t$.
# - Randomness is a function of seed, step and sample. So parts, processes and restarts compute one and the same run.
# - 20 bytes for each parameter, plus activations. A step is three forward passes. MFU says what share of a machine
#   works.
# - A condition is a context, which cross-attention reads, or maps, which lie on the latent as further channels. A new
#   one is one class. Whatever goes through the autoencoder must be something that it has seen.
#
# ## In the CompVis source
#
# | here | there | file |
# |---|---|---|
# | `train_unet`, `Trainer.steps` | `DDPM.training_step`, `Trainer` of PyTorch Lightning | `ddpm.py`, `main.py` |
# | `Recipe.lr_at` | `LambdaLinearScheduler` | `ldm/lr_scheduler.py` |
# | AdamW, with weight decay for matrices only | `configure_optimizers`: AdamW as PyTorch has it, for all | `ddpm.py` |
# | `EMA`, `EMA.applied_to` | `LitEma`, `ema_scope`; updated in `on_train_batch_end` | `ema.py`, `ddpm.py` |
# | `moments`, `contexts`, once | `get_input`: in each step | `ddpm.py` |
# | `text_dropout`, `min_snr_gamma` | have no counterpart | |
# | `accumulate` | `accumulate_grad_batches` of Lightning | `main.py` |
# | `Batch`, randomness by sample | `seed_everything` | `main.py` |
# | `ClassEmbedder`, trained along | the same name; `cond_stage_trainable` | `encoders/modules.py`, `ddpm.py` |
# | `Inpainting`, `masked_picture` | `LatentInpaintDiffusion`; only in the repositories that came after it | `ddpm.py` |
# | `Plan` | not there; `SpatialRescaler` makes maps for `c_concat`, such as segmentations | `encoders/modules.py` |
# | `AutoencoderLoss` | `LPIPSWithDiscriminator` | `contperceptual.py` |
# | `train_clip` | has no counterpart: `FrozenCLIPEmbedder` takes OpenAI's | `encoders/modules.py` |
#
# A trap for who trains with that repository: `main.py` multiplies the learning rate of the configuration by the number
# of cards, the batch of each, and the parts that are accumulated (`scale_lr`, on by default). The 1e-4 of the model
# card is the rate itself.
#
# ## Try it
#
# - Train `fresh()` with `ema_decay=0.9999` for 300 steps, and draw with the mean. What has it not forgotten yet?
# - Set $\lambda = 1$ in the stripes. Who wins, the error or the discriminator?
# - Resume a run with `exp_avg` and `exp_avg_sq` set to zero. How many steps does the loss need to come back?
# - Give `train_unet` pictures with the caption "a red circle" that show something else. What else changes?
# - Write a condition that is told the number of shapes (`minisd.data.shapes.scene` knows it). What says nothing then?
# - Draw a plan of a shape of another kind than the caption's, such as a star for "a red circle". Which one wins?
# - `LiveBytes` for a batch of 4 and of 8: is it linear? And for latents of 128×128 (pictures of 1024×1024)?
#
# Before: [07 · Latent diffusion](07_latent_diffusion.ipynb).
# Next: [09 · Stable Diffusion v1](09_stable_diffusion_v1.ipynb), the official weights.
# The pages: [training](../docs/training.md), how to run it; [fine-tuning](../docs/finetuning.md); the
# [lab log](../docs/lab_log.md) of the real runs.
