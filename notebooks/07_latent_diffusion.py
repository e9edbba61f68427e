# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7 · Latent diffusion: three networks as one
#
# All parts are there: a UNet that finds noise (notebook 03), an autoencoder that makes pictures small (04), a text
# encoder (05), and samplers (06). This notebook puts them together, first by hand, then in one class. Then it trains
# all three from scratch, and puts a finished model to use.
#
# You will understand
#
# - how a prompt becomes a picture, from the first line to the last, with nothing left out;
# - what each method of `LatentDiffusion` takes and returns, under the names of the CompVis source;
# - in which order the three networks are trained, why, and which losses are normal;
# - img2img, inpainting, interpolation and negative prompts: all are small changes to what goes into the sampler;
# - what a saved model consists of, and what changes when it is a thousand times larger.
#
# About an hour to read; it runs in about five minutes on one or two cores: some two for the three networks, one for
# two mistakes that we make on purpose, the rest for drawing. (The last cell tells each part.) The modules of this
# stage are [`minisd/latent_diffusion.py`](../minisd/latent_diffusion.py),
# [`minisd/training/`](../minisd/training/unet.py) and [`minisd/checkpoint/`](../minisd/checkpoint/__init__.py). Before
# this: [notebook 06](06_sampling.ipynb).
#
# To follow a drawing in your browser first, from its noise to its pixels, open the stops [The drawing starts from
# noise](../docs/play.md#tour=noise) and [Decoding](../docs/play.md#tour=decoding) of the guided tour.

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
import io
import json
import tempfile
import time
from collections import Counter
from dataclasses import replace
from math import log, sqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import minisd
from minisd import viz
from minisd.checkpoint import SHIPPED, read_json, read_weights
from minisd.data import CaptionedPictures, sample, shapes
from minisd.training import (
    CLIPRecipe,
    SingleDevice,
    UNetRecipe,
    VAERecipe,
    recipes,
    train_clip,
    train_unet,
    train_vae,
)

full = MODE == "full"
start = time.time()

# %% [markdown]
# ## By hand
#
# A model that ships with minisd is a folder: a file of weights, a description, a tokenizer. The weights are one long
# list of named tensors. The first part of a name says whose they are.

# %%
folder = SHIPPED / "emoji"
weights = read_weights(folder / "model.safetensors")  # {name: tensor}
numbers = Counter()
for name, tensor in weights.items():
    numbers[name.split(".")[0]] += tensor.numel()

print(f"{len(weights)} tensors, such as")
for name in [next(name for name in weights if name.startswith(part)) for part in numbers]:
    print(f"    {name}  {list(weights[name].shape)}")
for part, count in numbers.items():
    print(f"{part:18} {count:10,} numbers")

# %% [markdown]
# Three networks. `model` is the UNet, `first_stage_model` the autoencoder, `cond_stage_model` the text encoder
# (CompVis: the "condition" is what the model is told). Build the three, and give each its share of the weights.

# %%
config = minisd.PRESETS["emoji"]  # how large the networks are: numbers of channels, of layers, …
scale_factor = read_json(folder / "config.json")["scale_factor"]  # measured when the autoencoder was trained


def share(prefix):
    """The weights whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


unet = minisd.UNetModel(config.unet)
unet.load_state_dict(share("model.diffusion_model."))

vae = minisd.AutoencoderKL(config.first_stage)
vae.load_state_dict(share("first_stage_model."))

text_tower = minisd.CLIPTextModel(config.cond_stage)
text_tower.load_state_dict(share("cond_stage_model.transformer."))
tokenizer = minisd.BPETokenizer.load(folder / "tokenizer")
embedder = minisd.FrozenCLIPEmbedder(text_tower, tokenizer, config.cond_stage.max_length)

schedule = minisd.NoiseSchedule.scaled_linear(0.00085, 0.012, timesteps=1000)
print(f"scale factor {scale_factor:.4f};  {schedule}")

# %% [markdown]
# Now draw. The sampler is DDIM, written out, and guidance is two answers of the UNet instead of one (notebook 06).


# %%
@torch.no_grad()
def draw_by_hand(prompt, seed=0, steps=25, guidance_scale=4.0):
    c = embedder([prompt])  # what to draw: context [1 24 192]
    empty = embedder([""])  # the prompt that says nothing [1 24 192]
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))  # x_T ~ N(0, I), a latent of noise
    times = [i * 1000 // steps + 1 for i in reversed(range(steps))]  # 961, 921, … 1
    for t, t_prev in zip(times, [*times[1:], 0], strict=True):
        a, a_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)  # ᾱ_t, and that of the next, smaller t
        at = torch.tensor([t])
        eps_c, eps_empty = unet(x, at, c), unet(x, at, empty)
        eps = eps_empty + guidance_scale * (eps_c - eps_empty)  # ε = ε(∅) + s (ε(c) - ε(∅))
        x0 = (x - sqrt(1 - a) * eps) / sqrt(a)  # x̂_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t
        x = sqrt(a_prev) * x0 + sqrt(1 - a_prev) * eps  # DDIM: the same noise again, only less of it
    return vae.decode(x / scale_factor)  # [1 3 32 32]


prompts = ["a fox, noto style", "a panda, noto style", "a rocket, noto style", "a sunflower, emojione style"]
steps = 25 if full else 2
by_hand = torch.cat([draw_by_hand(prompt, steps=steps) for prompt in prompts])

# %% [markdown]
# That is the whole of Stable Diffusion. What remains is to say it in one place, so that nobody forgets a part.
# `LatentDiffusion` holds the three networks, the schedule and the scale factor. `minisd.load` builds it from a
# folder. It draws the same pictures:

# %%
sd = minisd.load(folder, device="cpu")
options = {"steps": steps, "guidance_scale": 4.0, "sampler": "ddim", "seed": 0}
alone = torch.cat([sd.txt2img(prompt, **options).pictures for prompt in prompts])
drawing = sd.txt2img(prompts, **options)

difference = (by_hand - alone).abs().max().item()
print(f"by hand {list(by_hand.shape)}, LatentDiffusion {list(alone.shape)}; largest difference {difference:.0e}")
assert difference < 1e-3
titles = [prompt.removeprefix("a ").removesuffix(" style").replace(", ", ",\n") for prompt in prompts]
viz.strip([by_hand, alone, drawing.pictures], titles, ["by hand", "LatentDiffusion", "all at once"])

# %% [markdown]
# (`.pictures` are tensors in about $[-1, 1]$. `.images` are files to be saved: clamped to $[-1, 1]$, then
# $127.5\,(x+1)$, rounded, as bytes. Without the clamp, $x = 1.02$ would be 258, a byte holds no more than 255 and
# begins again at 0, and the brightest spots would turn black.)
#
# The first two rows are equal, but for rounding. (Each picture was drawn alone, from seed 0.) The third row was drawn
# in one call. There, picture $k$ starts from seed $0 + k$, so that the pictures of a batch differ from each other;
# only the first is the same.
#
# **Predict, then run.** The last line divides by the scale factor, 0.628. Forget it: what happens to the picture?
# And what if one divides where one should multiply, so that the latent arrives 2.5 times too small?
#
# <details><summary>Answer</summary>
#
# The latent that arrives at the decoder is too small. The decoder still understands it, because the latent points in
# the right *direction*. But everything is said too softly: colours are paler, contrasts are lower, fine parts crumble.
# The smaller the latent, the more it looks like what the decoder makes of $z = 0$. No error is raised. With Stable
# Diffusion's factor, 0.18215, much less would be left (notebook 04 shows it). So: **if pictures are pale, look for the
# scale factor.**
#
# </details>

# %%
z = drawing.trajectory[-1].x  # the latents that the sampler ended with, [4 4 8 8]
with torch.no_grad():
    rows = [vae.decode(latent) for latent in (z / scale_factor, z, z * scale_factor, z * 0)]
viz.strip(rows, titles, ["z / 0.628 (right)", "z", "z · 0.628", "0"])

# %% [markdown]
# ## Every method once
#
# Here is the map of the class. Two ways lead through it: one for training, one for drawing. In it, and from here on,
# $z$ is the *scaled* latent, as in the other notebooks (notebook 04 writes $\tilde z$ for the autoencoder's own). A
# diffusion model on pixels calls it $x_0$, and the noisy $z_t$ its $x_t$. $\hat\epsilon$ is what the UNet predicts.
#
#     training   picture ─ encode_first_stage ─ get_first_stage_encoding ─► z ─ q_sample ─► z_t ┐
#                caption ─ get_learned_conditioning ─► c ───────────────────────────────────────┴ apply_model ─► ε̂
#                                                                 p_losses: |ε - ε̂|², at random times
#     drawing    prompt ─ get_learned_conditioning ─► c ─ sample (asks apply_model) ─► z ─ decode_first_stage ─► picture
#
# Walk the first way with one real picture, and print every shape.

# %%
corpus = sample(size=32)


def picture_of(caption):
    return corpus.batch([corpus.captions.index(caption)])  # [1 3 32 32]


g = torch.Generator().manual_seed(0)
x = picture_of("fox, noto style")
posterior = sd.encode_first_stage(x)  # q(z|x): a Gaussian for each number of the latent
z = sd.get_first_stage_encoding(posterior, g)  # scale_factor · (a sample of it)
c = sd.get_learned_conditioning(["fox, noto style"])
t, noise = torch.tensor([400]), torch.randn(z.shape, generator=g)
z_t = sd.q_sample(z, t, noise)  # √ᾱ_t z + √(1-ᾱ_t) ε
with torch.no_grad():
    eps = sd.apply_model(z_t, t, c)  # the UNet's answer: the noise in z_t
    loss = sd.p_losses(z, c, t, noise)
z_0 = sd.schedule.predict_start_from_noise(z_t, t, eps)  # (z_t - √(1-ᾱ_t) ε̂) / √ᾱ_t
pictures = sd.decode_first_stage(torch.cat([z, z_t, z_0]))  # each divided by scale_factor, then decoded

values = {
    "x": x,
    "encode_first_stage(x).mean": posterior.mean,
    "get_first_stage_encoding(posterior)": z,
    "get_learned_conditioning([caption])": c,
    "q_sample(z, t, noise)": z_t,
    "apply_model(z_t, t, c)": eps,
    "p_losses(z, c, t, noise)": loss,
    "decode_first_stage(z_0)": pictures[2:],
}
for name, value in values.items():
    std = f", std {value.std():.3f}" if value.ndim else ""
    print(f"{name:36} {list(value.shape)!s:16} mean {value.mean():6.3f}{std}")
assert torch.allclose(loss, F.mse_loss(eps, noise))  # p_losses is nothing more than this

# %%
channels = [value[0, :, None] / 3 for value in (z, z_t, noise, eps)]  # 4 channels as 4 grey pictures, ±3 is white/black
viz.strip(
    [*channels, torch.cat([x, pictures])],
    ["channel 0", "1", "2", "3"],
    ["z", "$z_t$, t = 400", r"$\epsilon$, true", r"$\hat\epsilon$, guessed", "pictures"],
    [[], [], [], [], ["the picture", "z, decoded", "$z_t$, decoded", r"$\hat z_0$, decoded"]],
)

# %% [markdown]
# Each latent has four channels, shown in grey. Compare the rows of $\epsilon$ and $\hat\epsilon$: the guess is
# close. The last row shows the same in pictures: from a $z_t$ in which we see little, one call of the UNet makes a
# rough fox. A sampler asks many times, with less and less noise.
#
# ## Which loss is normal?
#
# **Predict, then run.** Take the finished model, and its loss at each $t$. Where is it largest: with little noise in
# $z_t$ ($t$ near 0) or with much ($t$ near 999)? Then give the model the *wrong* captions, or empty ones. By how much
# does the loss grow?
#
# <details><summary>Answer</summary>
#
# It is largest near $t = 0$. The target is the noise, and a little noise is hard to see. A network that answered 0
# everywhere would have a loss of exactly 1, at all times. Near $t = 999$ nearly all of $z_t$ is noise, and the loss
# is close to 0.
#
# Empty captions cost nothing in the mean (0.154, against 0.155). Two things cancel: 14 of these 48 pictures were held
# out of the training. On pictures of the training the caption helps at nearly every $t$; on held-out ones it does harm
# (notebook 02 shows the two kinds apart). From $t = 400$ on it helps in the mean, but there all errors are small. Yet
# it is there that a drawing becomes a fox or a panda. So **the mean loss hardly tells whether the model listens.**
# *Wrong* captions double the loss: the model has learned to trust them.
#
# (In notebook 02 the same model had 0.078 on pictures of its training. That was the mean over *all* $t$. This is the
# mean of twelve columns, of which half lie at $t \le 400$, and of other pictures. Compare like with like.)
#
# </details>

# %%
count = 48 if full else 4
times = [5, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 980] if full else [5, 900]
torch.manual_seed(0)
chosen = torch.randperm(len(corpus))[:count]
z = sd.get_first_stage_encoding(sd.encode_first_stage(corpus.batch(chosen)), g)  # [48 4 8 8]
contexts = {"right caption": sd.get_learned_conditioning([corpus.captions[i] for i in chosen])}  # [48 24 192]
contexts["empty caption"] = sd.get_learned_conditioning([""]).expand(count, -1, -1)
contexts["another's caption"] = contexts["right caption"].roll(1, dims=0)
noise = torch.randn(z.shape, generator=g)

lines = {}
with torch.no_grad():
    for name, context in contexts.items():
        at = [sd.p_losses(z, context, torch.full((count,), t), noise) for t in times]
        lines[name] = (times, torch.stack(at))
print(f"{'t':>18}  " + "".join(f"{t:7d}" for t in times) + "     mean")
for name, (_, loss) in lines.items():
    print(f"{name:>18}  " + "".join(f"{v:7.3f}" for v in loss) + f"  {loss.mean():7.3f}")
viz.curves({"loss of the finished model, by t": lines}, ylabel="mean squared error of ε", width=5.5, height=3)

# %% [markdown]
# The same noise and the same pictures for all three lines.
#
# ## Training all three
#
# Now from scratch, on this computer: a model that draws what its prompt says, in minutes. So the world that it has to
# learn is small. A picture has 16×16 pixels and shows one coloured shape on white. Eight colours, six shapes, two
# sizes: 96 captions. Six pairs of a colour and a shape are **held out**: training never shows them, though it shows
# each of the colours and each of the shapes. At the end we ask for them.
#
# Any folder with pictures NAME.png and their captions NAME.txt will do for minisd ([`docs/data.md`](../docs/data.md)).
# Here we draw one.

# %%
work = tempfile.TemporaryDirectory()
runs = Path(work.name)
seconds = {}  # what each part takes


@contextlib.contextmanager
def quietly(what):
    """Without progress bars, which would fill the page; and with two clocks: the processor's, and that on the wall."""
    processor, wall = time.process_time(), time.time()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
    seconds[what] = time.process_time() - processor
    print(f"{what}: {seconds[what]:.0f} s of a processor, {time.time() - wall:.0f} s on the clock")


with quietly("drawing the shapes"):
    for part in ("train", "held out"):
        (runs / part).mkdir()
    for k in range(12_000 if full else 600):
        scene = shapes.scene(0, k)
        if scene.kind == "size" and "small" not in scene.caption:  # one shape in the middle, large enough for 16x16
            file = runs / ("train" if scene.split == "train" else "held out") / f"{k:05}.png"
            Image.fromarray(shapes.render(scene, 16)).save(file)
            file.with_suffix(".txt").write_text(scene.caption)

train, held_out = CaptionedPictures(runs / "train"), CaptionedPictures(runs / "held out")
print(f"{len(train)} pictures of {train.size}x{train.size} pixels, with {len(set(train.captions))} captions")
print(f"never shown in training: {', '.join(sorted(shapes.HELD_OUT))}")
viz.captioned(train.batch(range(16)), train.captions[:16], size=0.8)

# %% [markdown]
# ### How large should the networks be?
#
# As small as they may be, but there is a trap. In a ResBlock, the time is a number that is added to each channel
# (notebook 03). Right after it comes `GroupNorm(32)`: it cuts the channels into 32 groups, and gives each group mean 0.
#
# **Predict, then run.** A network of 32 channels has one channel in each group. What can its ResBlocks know of the
# time?
#
# <details><summary>Answer</summary>
#
# Nothing. The same number was added to all pixels of a channel, and the norm takes the mean of that channel away
# again. With two channels in a group, their mean goes, but the difference between the two remains.
#
# </details>

# %%
g = torch.Generator().manual_seed(0)
for channels in (32, 64):
    torch.manual_seed(0)
    block = minisd.unet.ResBlock(channels, 4 * channels, channels)
    torch.nn.init.normal_(block.out_layers[-1].weight, std=0.05)  # it starts at zero, and would hide everything
    x, emb = torch.randn(1, channels, 8, 8, generator=g), torch.randn(2, 4 * channels, generator=g)  # two times
    with torch.no_grad():
        apart = (block(x, emb[:1]) - block(x, emb[1:])).abs().max()
    print(f"{channels} channels: at two different times, its outputs differ by at most {apart:.6f}")

# %% [markdown]
# So 64 channels it is, for the UNet and for the autoencoder. In the autoencoder there is no time, but there is
# brightness: what a norm over one channel takes away is how strong that channel is in the whole picture.

# %%
lesson = minisd.LatentDiffusionConfig(
    unet=minisd.UNetConfig(
        model_channels=64,
        num_res_blocks=1,
        channel_mult=(1,),  # 4x4 pixels are not made smaller still
        attention_resolutions=(),  # a transformer in the middle, and no others
        num_heads=None,
        num_head_channels=32,
        context_dim=32,
    ),
    first_stage=minisd.AutoencoderConfig(ch=64, ch_mult=(1, 1, 1), num_res_blocks=1),  # 16x16x3 -> 4x4x4
    cond_stage=minisd.PRESETS["tiny"].cond_stage,
    image_size=16,
    scale_factor=1.0,  # to be measured
)
vision = replace(recipes.VISION["tiny"], image_size=16, patch_size=4)
engine = SingleDevice("cpu")  # SingleDevice() would take a GPU, if there is one
common = {"log_every": 20 if full else 1}


def logged(run, name="loss"):
    """The steps and values that a run wrote into its log.jsonl, a line every 20 steps."""
    lines = [json.loads(line) for line in (runs / run / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines], [line[name] for line in lines]


# %% [markdown]
# ### First the text encoder
#
# CLIP learns which caption belongs to which picture (notebook 05). 64 pictures and 64 captions at a time: who knows
# nothing has one chance in 64, and a loss of $\ln 64 = 4.16$. So we know where the curve begins before it is drawn.
#
# **Predict, then run.** Where does it end? There are only 84 captions in the training split. Among 64 pictures, some
# have the same caption.
#
# <details><summary>Answer</summary>
#
# If a caption is there $k$ times in the batch, the best that can be done is to be right once in $k$. With $n = 84$ and
# $b = 64$ the mean of $1/k$ is $\frac nb\,(1 - (1-\frac1n)^b) = 70\%$. The curve that stops there has learned
# everything, and a loss that does not go to 0 is no fault.
#
# </details>

# %%
with quietly("CLIP"):
    clip_recipe = CLIPRecipe(steps=300 if full else 2, batch_size=64, **common)
    train_clip(lesson.cond_stage, vision, clip_recipe, train, runs / "clip", engine)

(_, loss), (_, accuracy) = logged("clip"), logged("clip", "accuracy")
n, b = len(set(train.captions)), 64
print(f"ln 64 = {log(64):.2f}; loss {loss[0]:.2f} -> {loss[-1]:.2f}")
print(f"right: {accuracy[0]:.0%} -> {accuracy[-1]:.0%}, at best {n / b * (1 - (1 - 1 / n) ** b):.0%}")
panels = {"contrastive loss": {"": logged("clip")}, "right among 64": {"": logged("clip", "accuracy")}}
viz.curves(panels, xlabel="step", width=3.4)

# %% [markdown]
# ### The naive idea: the UNet next
#
# The UNet draws. So train it now, and the autoencoder at the end, to turn its latents into pictures? Or all at once?
# Let us see what comes of it. Take an autoencoder that has made one single step of its training, and train a UNet on
# its latents.

# %%
early_steps = 300 if full else 2
unet_recipe = UNetRecipe(steps=early_steps, batch_size=32, lr=2e-3, ema_decay=0.99, **common)
vae_recipe = VAERecipe(steps=1, batch_size=8, lr=2e-3, ema_decay=0.99, rec_power=2, **common)
with quietly("an autoencoder that knows nothing, and the UNet on its latents"):
    train_vae(lesson.first_stage, vae_recipe, train, runs / "vae untrained", engine)
    folders = {"clip": runs / "clip", "vae": runs / "vae untrained"}
    too_early = train_unet(lesson, unet_recipe, train, runs / "unet too early", engine, **folders)

steps, loss = logged("unet too early")
print(f"loss: {loss[0]:.3f} (mean of steps 1 to {steps[0]}) -> {loss[-1]:.3f}")

# %% [markdown]
# That went well, it seems: the loss has fallen. Put it aside for a moment.
#
# ### The autoencoder
#
# It learns to draw each picture again (notebook 04): $\mathcal L = |x - \hat x|^p + 0.001 \cdot \mathrm{KL}$. At its
# end, the scale factor is measured: one over the standard deviation of its latents. (Both terms are divided by the 768
# numbers of a picture: a KL of 0.4 in the log is some 300 nats for a picture.)
#
# A word in the recipes, `ema_decay`: beside the weights that are trained, each training keeps their **exponential
# moving average** (EMA). After each step, $\bar w \leftarrow d\,\bar w + (1-d)\,w$, here with $d = 0.99$, and less in
# the $n$-th of the first steps: $\min\big(d, \frac{1+n}{10+n}\big)$, so that the random start is soon forgotten. The
# mean of the last hundred steps or so jitters less than the last step does. What is saved, and draws, is $\bar w$.
#
# In the CompVis source $p = 1$. Our pictures are special: most of each is white. Train two, with $p = 1$ and $p = 2$,
# that are equal in all else.
#
# **Predict, then run.** While an autoencoder does not know yet what a pixel is, which single value lowers $|x - \hat
# x|$ the most, and which $(x - \hat x)^2$? Which of the two will be the first to show colours?
#
# <details><summary>Answer</summary>
#
# The median of what could be there, and the mean. The median of a pixel that is white in most pictures is white. The
# mean is pale, but it has some colour from the start. So $p = 2$ should show colours first. The figure tells.
#
# </details>

# %%
vae_steps, vaes = 600 if full else 2, {}
for p in (1, 2):
    with quietly(f"the autoencoder, p = {p}"):
        vae_recipe = VAERecipe(steps=vae_steps, batch_size=8, lr=2e-3, ema_decay=0.99, rec_power=p, **common)
        vaes[p] = train_vae(lesson.first_stage, vae_recipe, train, runs / f"vae {p}", engine)
    measured = read_json(runs / f"vae {p}" / "vae.json")
    print(f"    PSNR {measured['psnr']:.1f} dB; scale factor {measured['scale_factor']:.3f}", end=", ")
    print(f"so the latents' std is {1 / measured['scale_factor']:.2f}")

x = train.batch(range(10))
with torch.no_grad():
    again = [vae.decode(vae.encode(x).mode()) for vae in vaes.values()]
viz.strip([x, *again], labels=["picture", r"$|x - \hat x|$", r"$(x - \hat x)^2$"], size=0.7)

# %%
panels = {
    r"error, $p = 1$": {"": logged("vae 1", "rec")},
    r"error, $p = 2$": {"": logged("vae 2", "rec")},
    "KL": {"p = 1": logged("vae 1", "kl"), "p = 2": logged("vae 2", "kl")},
}
viz.curves(panels, xlabel="step", log=list(panels)[:2], width=2.9)

# %% [markdown]
# With $p = 1$, after as many steps, green has become blue or violet, black has become violet, and pink orange: 21.3 dB,
# against 27.0 with $p = 2$. The reconstruction falls fast and then slowly; the KL **rises** at first, and should: it
# counts how much the latents say about the picture, and at the start they say nothing. What blurs here will be blurred
# in every drawing, and a colour that is lost here is lost for good: **what a latent does not hold, no UNet can draw.**
# We go on with $p = 2$.
#
# (The models of CompVis have $p = 1$, together with a perceptual loss, and are trained for hundreds of thousands of
# steps on photographs. What is right for a few hundred steps on flat shapes need not be right there.)
#
# ### The UNet
#
# Text encoder and autoencoder now stay as they are. So the latent of each picture and the context of each caption are
# computed once, and every step works on those. Each step is the loss of notebook 02, on latents, with the caption
# forgotten one time in ten (`text_dropout`, which guidance needs).
#
# Again, the first value of the loss can be foretold. The last layer of the UNet starts at zero, so its first answer
# is $\hat\epsilon = 0$, and $|\epsilon - 0|^2$ is 1 on average. The recipe weights the times by
# $\min(\mathrm{SNR}_t, 5)/\mathrm{SNR}_t$ (min-SNR, notebook 02), so it is the mean of these weights. (The log has the
# mean of the first 20 steps, which is a little lower: they have learned something already.)

# %%
weight = minisd.loss.min_snr_weight(schedule.snr(torch.arange(1000)), gamma=5.0)  # [1000]
print(f"expected first loss: {weight.mean():.3f}")

unet_steps, keep_at = (2000, (100, 300, 1000)) if full else (3, (2,))
with quietly("the UNet"):
    unet_recipe = replace(unet_recipe, steps=unet_steps)
    folders = {"clip": runs / "clip", "vae": runs / "vae 2"}
    ours = train_unet(lesson, unet_recipe, train, runs / "unet", engine, keep_at=keep_at, **folders)

steps, loss = logged("unet")
print(f"loss: {loss[0]:.3f} (mean of steps 1 to {steps[0]}) -> {loss[-1]:.3f}")

# %% [markdown]
# **Predict, then run.** Two UNets: one on the latents of the untrained autoencoder, one on those of the trained one.
# Which curve is lower? And what do the two draw, with the autoencoder that they learned with, and (the first) with the
# trained one?
#
# <details><summary>Answer</summary>
#
# The loss of both falls, but that of the first stops at 0.30, where the second goes below 0.1 in the same 300 steps,
# and to 0.024 in the end. An untrained encoder says little about the picture, and its latents are for a good part the
# noise that $q(z|x)$ draws, which cannot be learned. But 0.30 alone would not have warned us: what is normal depends on
# the latents. And no decoder helps. Its own never learned to draw, and the trained one learned another language.
#
# </details>

# %%
panels = {"weighted loss of ε": {"too early": logged("unet too early"), "after the autoencoder": logged("unet")}}
viz.curves(panels, xlabel="step", log=list(panels), width=5.5)

# %%
nine = [
    "a large red circle", "a large blue square", "a large pink star", "a green heart", "a large black triangle",
    "an orange diamond", "a large purple heart", "a yellow circle", "a large green star",
]  # fmt: skip
short = [prompt.removeprefix("a ").removeprefix("an ").replace(" ", "\n") for prompt in nine]
few = {"steps": 20 if full else 2, "guidance_scale": 3.0, "sampler": "dpmpp_2m"}
stages = {
    f"{k:,} steps": minisd.load(runs / "unet" / "model" / f"after_{k:06d}_steps.safetensors", device="cpu")
    for k in keep_at
}
stages[f"{unet_steps:,} steps"] = ours

rows = [too_early.txt2img(nine, **few).pictures]
too_early.first_stage_model.load_state_dict(vaes[2].state_dict())  # the decoder that is trained by now
too_early.scale_factor = measured["scale_factor"]
rows += [model.txt2img(nine, **few).pictures for model in (too_early, *stages.values())]
viz.strip(rows, short, ["too early,\nits decoder", "too early,\ntrained decoder", *stages], size=0.7)

# %% [markdown]
# The upper two rows: too early. Below: in order, the same prompts and the same noise, as the training goes on: blots
# after 100 steps, half of the colours and shapes after 300, nearly all after 1,000. So:
# **CLIP and the autoencoder first, in any order, and until they are good; then freeze both; then the UNet.**
#
# Training all at once looks no better on paper (we have not tried it here): the latents would change under the UNet
# while it learns them. And an encoder that may please the UNet has an easy way: make all latents alike. Then $z_t$ is
# all noise, the loss is 0, and the pictures are gone.
#
# ### Does it draw what the prompt says?
#
# Nine pictures that look right prove little. So ask for all 96 captions, and let a judge decide who never saw the
# prompt: for each drawing it finds the nearest of all real pictures (in pixels), and reads that one's caption.

# %%
real = torch.cat([train.batch(range(len(train))), held_out.batch(range(len(held_out)))])  # [n 3 16 16]
captions = [*train.captions, *held_out.captions]
known, unknown = sorted(set(train.captions)), sorted(set(held_out.captions))


def words(caption):
    """A caption → colour, shape, size."""
    *before, colour, shape = caption.split()
    return colour, shape, "large" if "large" in before else "medium"


def judged(pictures):
    """What each picture shows: the words of the nearest real one."""
    nearest = torch.cdist(pictures.clamp(-1, 1).flatten(1), real.flatten(1)).argmin(1)
    return [words(captions[i]) for i in nearest]


def share_right(prompts, shown):
    """The shares of pictures with the right colour, shape, size, and with all three right."""
    right = [[a == b for a, b in zip(words(p), w, strict=True)] for p, w in zip(prompts, shown, strict=True)]
    right = torch.tensor(right)  # [n 3]
    return [*right.float().mean(0).tolist(), right.all(1).float().mean().item()]


with torch.no_grad():
    upper_limit = vaes[2].decode(vaes[2].encode(real[::20]).mode())  # what the autoencoder makes of real pictures
print(f"{'':34}  colour  shape   size    all")
table = {"real pictures, by the autoencoder": (captions[::20], judged(upper_limit))}
with quietly("drawing for the judge"):
    drawn = {name: model.txt2img(known, **few).pictures for name, model in stages.items()}
    drawn["held out"] = ours.txt2img(unknown, **few).pictures
table |= {name: (unknown if name == "held out" else known, judged(x)) for name, x in drawn.items()}
table["the last, other prompts"] = (known[1:] + known[:1], table[list(stages)[-1]][1])
for name, (prompts, shown) in table.items():
    print(f"{name:34}" + "".join(f"{share:8.0%}" for share in share_right(prompts, shown)))

# %%
some = slice(None, None, 7)  # above: 12 of the 84 captions that were trained; below: the 12 that were held out
pictures = torch.cat([drawn[list(stages)[-1]][some], drawn["held out"]])
viz.captioned(pictures, [*known[some], *unknown], columns=12, size=0.7)

# %% [markdown]
# The upper row: 12 of the 84 captions of the training. The lower row: the 12 captions with a held-out pair.
#
# Read the table from the top. The judge can be trusted: real pictures that went through the autoencoder it reads
# without a mistake. And the model listens: after 2,000 steps 99% of its drawings show colour, shape and size of their
# prompts; where chance would give one colour in eight, one shape in six, one size in two. As to the order: after 100
# steps it is hardly better than chance, after 300 most sizes are there and half of the colours and shapes, after 1,000
# nearly all.
#
# The held-out pairs come out as well, ten of twelve (two have another colour): it has not learned 96 pictures by
# heart, but a word for each colour and each shape. (Twelve drawings are few. Train with another seed, and expect
# other slips.)
#
# The last line is a check of the check: the same drawings held against wrong prompts, each against the next in the
# alphabet. That one often begins with the same size and colour, and has nearly always another shape: nothing is right
# as a whole.
#
# ## Learning can be seen
#
# The `tiny` that ships was trained for 5,000 steps on a larger world: 32×32 pixels, up to four shapes, and places. Its
# UNet after 500 steps ships as well. Same prompts, same noise:

# %%
folder = SHIPPED / "tiny"
snapshots = {
    "after 500": minisd.load(folder / "after_000500_steps.safetensors", device="cpu"),
    "after 5,000": minisd.load(folder, device="cpu"),
}
eight = [
    "a large red circle", "a large blue square", "a small pink star", "two green hearts",
    "three black triangles", "four pink circles", "an orange diamond on the left", "a purple heart above a red star",
]  # fmt: skip
short = ["large\nred circle", "large\nblue square", "small\npink star", "two green\nhearts", "three black\ntriangles",
         "four pink\ncircles", "orange diamond\non the left", "purple heart\nabove red star"]  # fmt: skip
viz.strip([model.txt2img(eight, **few).pictures for model in snapshots.values()], short, list(snapshots))

# %% [markdown]
# After 500 steps: blots, often of the right size and colour, or nothing. After 5,000: sizes, counts, places and
# colours.
# (But there is a star where a diamond should be. And see the last column: there are two shapes, one above the other,
# and both are hearts. Which of two things has which colour and shape, this model does not read from the prompt:
# notebook 05.)
#
# Put a number on it. Ask for large circles in eight colours, and look which of the eight is nearest to what was drawn.

# %%
palette = torch.tensor(list(shapes.COLOURS.values())) / 127.5 - 1  # [8 3], in [-1, 1]
each = 4 if full else 1
asked = torch.arange(len(palette)).repeat_interleave(each)  # [32]
circles = [f"{shapes.with_article(f'large {colour} circle')}" for colour in shapes.COLOURS]
for name, model in {**snapshots, "ours": ours}.items():
    pictures = model.txt2img(circles, num_images=each, **few).pictures.clamp(-1, 1)
    middle = slice(3 * pictures.shape[-1] // 8, 5 * pictures.shape[-1] // 8)  # the circle is there
    nearest = torch.cdist(pictures[:, :, middle, middle].mean((2, 3)), palette).argmin(1)  # [32]
    share = (nearest == asked).float().mean()
    print(f"{name:14} {share:4.0%} of the circles have the right colour (by chance: 12%)")

# %% [markdown]
# Its world is harder than ours: a word for a colour has to be found in captions of four kinds. All the same, the `tiny`
# that shipped before this one had no more than 34% here, after twice as many steps. It had both of the faults that you
# have met: its autoencoder was trained with $p = 1$, and one real picture in eight came out of it in another colour
# (none does now); and its UNet had 32 channels. Told a wrong time, it gave the same answer to the fifth digit, and
# nobody noticed: it drew, and its loss looked as usual, since a network can see by itself about how noisy its input
# is. Both were mended at once, so that we can't say what each was worth ([lab log](../docs/lab_log.md)).
#
# ## Draw over a picture: img2img
#
# From here on we use the larger `emoji` model again (25 steps of DPM-Solver++, guidance 4).
#
# txt2img starts at $x_T$, from noise alone. img2img starts part of the way, from a picture that was noised until
# there (SDEdit, Meng et al. 2022):
#
# $$z_t = \sqrt{\bar\alpha_t}\; z_\text{picture} + \sqrt{1-\bar\alpha_t}\;\epsilon,$$
#
# and from $z_t$ on, the sampler goes its usual way, under a new prompt. `strength` says how far back: of $n$
# steps, the last `int(strength · n)` are made. That is all there is to it.

# %%
good = {"steps": 25 if full else 2, "guidance_scale": 4.0, "sampler": "dpmpp_2m"}
strength, fox, prompt = 0.5, picture_of("fox, noto style"), "a panda, noto style"

times = minisd.sampling.make_timesteps(good["steps"], 1000, "trailing")[-int(strength * good["steps"]) :]
g = torch.Generator().manual_seed(0)
z = sd.get_first_stage_encoding(sd.encode_first_stage(fox), g)
z_t = sd.q_sample(z, torch.tensor(times[:1]), torch.randn(z.shape, generator=g))
*_, last = sd.sample(prompt, start_code=z_t, timesteps=times, **good)

same = sd.img2img(prompt, fox, strength=strength, seed=0, **good)
assert torch.allclose(sd.decode_first_stage(last.x), same.pictures, atol=1e-3)
kept = sqrt(schedule.alpha_bar(times[0]))
print(f"strength {strength}: {len(times)} of {good['steps']} steps, from t = {times[0]}, where √ᾱ_t = {kept:.2f}")

# %%
strengths = [0.08, 0.2, 0.4, 0.6, 0.8, 1.0] if full else [0.5, 1.0]
wishes = {"fox, noto style": "a panda, noto style", "red heart, noto style": "a blue heart, noto style"}
rows = []
for caption, prompt in wishes.items():
    image = picture_of(caption)
    rows.append(torch.cat([image, *(sd.img2img(prompt, image, strength=s, **good).pictures for s in strengths)]))
viz.strip(rows, ["picture", *(f"strength {s}" for s in strengths)], ["to a panda", "to blue"])

# %% [markdown]
# The stronger, the less of the picture is kept. Eyes and ears go first, then the orange, and at 0.6 nothing is left of
# the fox. The heart keeps its outline all along: the new prompt wants the same one. (At 0.08, 2 steps are made, and the
# fox has lost a good deal. The autoencoder alone would have kept more: compare "z, decoded", above.)
#
# **Predict, then run.** The same seed is used in every column. Is the last column, at strength 1, what `txt2img`
# draws from that seed?
#
# <details><summary>Answer</summary>
#
# Nearly, but not exactly. At strength 1 the picture is noised to $t = 999$, where Stable Diffusion's schedule keeps
# $\sqrt{\bar\alpha_T} = 0.068$ of it (notebook 01). And the generator has already drawn the noise of the latent, so
# the noise that follows is another than `txt2img` starts from.
#
# </details>
#
# ## Draw a part anew: inpainting
#
# A mask says what is drawn anew (white, 1) and what is kept (black, 0). The model knows nothing of masks. So let
# it draw everything, and put back what is to be kept, at every step, with as much noise as belongs there at that $t$:
#
# $$z_t \leftarrow m \odot z_t
#   + (1-m) \odot \big(\sqrt{\bar\alpha_t}\,z_\text{picture} + \sqrt{1-\bar\alpha_t}\,\epsilon\big)$$
#
# There are two habits. `blend="after"` puts back after each step, and the clean latent at the end (diffusers).
# `blend="before"` puts back before each step, with fresh noise, and not after the last one (CompVis): the UNet has
# the last word.

# %%
mask = torch.zeros(32, 32)
mask[:16] = 1  # the upper half is drawn anew
wishes = {"fox, noto style": "a panda, noto style", "panda, noto style": "a fox, noto style"}
rows = []
for caption, prompt in wishes.items():
    image = picture_of(caption)
    kept_again = sd.decode_first_stage(sd.get_first_stage_encoding(sd.encode_first_stage(image).mode()))
    row, changed = [image, image * (1 - mask)], {}
    for blend in ("after", "before"):
        row.append(sd.inpaint(prompt, image, mask, blend=blend, num_images=2, **good).pictures)
        changed[blend] = (row[-1] - kept_again)[:, :, 20:].abs().mean()
    rows.append(torch.cat(row))
    print(f"{prompt}: mean change of what was to be kept: " + ", ".join(f"{v:.3f} {k}" for k, v in changed.items()))
titles = ["picture", "hole", "after", "after", "before", "before"]
viz.strip(rows, titles, ["to a panda", "to a fox"])

# %% [markdown]
# (The change is measured against the picture as the autoencoder draws it, in the lower third.) With `after`, what is
# kept stays, and there is a seam. With `before`, both halves have moved towards each other. Neither half knew of the
# other when training: Stable Diffusion v1 has a model of its own for inpainting, with 5 more channels into which mask
# and hole are put (`PRESETS["sd-v1-inpainting"]`; `c_concat` of `apply_model`).
#
# ## Between two prompts
#
# A context is a tensor, so one can walk from one to the other along a straight line:
# $c = (1-w)\,c_\text{a} + w\,c_\text{b}$. The noise stays the same. Any eps_model will do for a sampler, so here is
# one with a context that belongs to no sentence.

# %%
w = torch.linspace(0, 1, 8 if full else 2)
x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
ends = [("a fox", "a panda"), ("a red apple", "a lemon"), ("a red heart", "a blue heart")]
rows = []
for one, other in ends:
    c_a, c_b = sd.get_learned_conditioning([f"{one}, noto style", f"{other}, noto style"]).split(1)  # [1 24 192] each
    c = torch.cat([torch.lerp(c_a, c_b, k) for k in w])  # [8 24 192]
    eps_model = minisd.classifier_free_guidance(sd.apply_model, c, sd.get_learned_conditioning([""]), 4.0)
    *_, last = minisd.sampling.dpmpp_2m(eps_model, x_T.expand(len(w), -1, -1, -1), sd.schedule, good["steps"])
    rows.append(sd.decode_first_stage(last.x))
viz.strip(rows, [f"w = {k:.2f}" for k in w], [f"{one}\nto {other}" for one, other in ends])

# %% [markdown]
# Between fox and panda stands an animal that no caption ever named. Between red and blue there is violet. The space
# of contexts is smooth, although it was learned from single points.
#
# ## Between two seeds
#
# Now the other way round: the prompt stays, the noise changes from $x_a$ to $x_b$. A straight line again?
#
# **Predict, then run.** $x_a$ and $x_b$ have 256 independent numbers each, from $\mathcal N(0, 1)$. How long is such
# a vector? How long is the mean of two of them? And what will the model make of it?
#
# <details><summary>Answer</summary>
#
# The norm of each is about $\sqrt{256} = 16$, hardly ever below 14 or above 18. Their mean has the variance
# $\tfrac14 + \tfrac14 = \tfrac12$, so a norm of about $16/\sqrt2 = 11.3$. No noise of the training was ever so small.
# To the UNet it looks as if less noise were there than $t$ says, and a dull, smooth picture is what has so little
# variation.
#
# The remedy is to go along the sphere: **slerp**, with the angle $\theta$ between the two (about 90°, as for any two
# independent vectors of so many dimensions):
# $x = \frac{\sin((1-w)\theta)}{\sin\theta}\,x_a + \frac{\sin(w\theta)}{\sin\theta}\,x_b$.
#
# </details>


# %%
def slerp(x_a, x_b, w):
    theta = torch.acos((x_a * x_b).sum() / (x_a.norm() * x_b.norm()))  # the angle between them
    return (torch.sin((1 - w) * theta) * x_a + torch.sin(w * theta) * x_b) / torch.sin(theta)


def noise_of(seed):
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


w = torch.linspace(0, 1, 7 if full else 2)
rows, labels, notes = [], [], []
for prompt, scale in [("", 1.0), ("a flower, noto style", 4.0)]:
    for between in (torch.lerp, slerp):
        start_code = torch.cat([between(noise_of(0), noise_of(7), k) for k in w])  # [7 4 8 8]
        options = good | {"guidance_scale": scale, "num_images": len(w), "start_code": start_code}
        rows.append(sd.txt2img(prompt, **options).pictures)
        labels.append(f"{between.__name__}\n{prompt.split(',')[0] or 'no prompt'}")
        notes.append([f"norm {x.norm():.1f}" for x in start_code])
viz.strip(rows, [f"w = {k:.2f}" for k in w], labels, notes)

# %% [markdown]
# In the middle of a straight line the norm falls from 15 to 10.3, and the pictures there are duller (no prompt) or
# blurred (flower). Along the sphere the norm stays, and the change is gradual. With a strong prompt, the noise
# decides little.
#
# ## What not to draw: negative prompts
#
# Guidance goes away from one answer and towards another: $\epsilon = \epsilon(\text{negative}) + s\,(\epsilon(c) -
# \epsilon(\text{negative}))$. Usually the negative prompt is the empty one. Put something else there, and the drawing
# goes away from *that*.

# %%
negatives = ["", "blue", "yellow", "red heart, noto style"]
rows = [
    torch.cat([sd.txt2img(prompt, negative_prompt=n, num_images=2, **good).pictures for n in negatives])
    for prompt in ("a heart, noto style", "a bird, noto style")
]
titles = [f'not "{n.removesuffix(", noto style")}"' if n else "(none)" for n in negatives for _ in range(2)]
viz.strip(rows, titles, ["a heart", "a bird"])

# %% [markdown]
# Without blue, the bird is red; without yellow, the orange heart is blue or black. It is a push away, at full
# guidance, and it can push too far: a heart that must not be a red heart is hardly a heart any more.
#
# ## What a saved model consists of
#
# `minisd.save` writes three layouts, and `minisd.load` reads them all. Save the model that we trained above in each,
# look what lies there, and load it again.

# %%
targets = {"minisd": "ours", "diffusers": "ours for diffusers", "compvis": "ours for CompVis/model.safetensors"}
reference = ours.txt2img(nine[:1], **few).pictures
for layout, target in targets.items():
    path = runs / "saved" / target
    path.parent.mkdir(parents=True, exist_ok=True)
    minisd.save(ours, path, layout=layout, dtype=torch.float16)  # half the size, and no picture changes visibly
    again = minisd.load(path, device="cpu", config=path.with_suffix(".yaml") if layout == "compvis" else None)
    difference = (again.txt2img(nine[:1], **few).pictures - reference).abs().max()
    print(f"{layout}: loads again, largest difference of a picture {difference:.3f}")
    whole = path if path.is_dir() else path.parent
    for file in sorted(file for file in whole.rglob("*") if file.is_file()):
        print(f"    {file.relative_to(whole).as_posix():48} {file.stat().st_size / 1000:8.1f} kB")

# %% [markdown]
# - **minisd**: one file of weights, one description, the tokenizer. The scale factor stands in `config.json`.
# - **diffusers**: each network in a folder of its own, with other names for its weights; what
#   `StableDiffusionPipeline.from_pretrained` reads.
# - **CompVis**: one file with everything, under the names that you saw at the top, and a YAML that says what it is.
#
# Whatever the layout, the same things have to be there: the weights of three networks, how they are built, the
# tokenizer, the schedule, and the scale factor. A model that lacks one of them draws, but draws wrongly.
# ([`docs/checkpoint.md`](../docs/checkpoint.md) tells of the layouts, and of official weights.)
#
# ## At full scale
#
# Stable Diffusion v1 is the same class with other numbers in its config. On the device "meta", tensors have shapes
# but no memory, so that we can build it here and count.

# %%
with torch.device("meta"):
    v1 = minisd.LatentDiffusion(minisd.PRESETS["sd-v1"], minisd.BPETokenizer.clip())


def millions(network):
    return sum(p.numel() for p in network.parameters()) / 1e6


print("          million parameters of               latent          memory to train")
print("              UNet       VAE      text                        the UNet, at least")
for name, model in {"ours": ours, "tiny": snapshots["after 5,000"], "emoji": sd, "sd-v1": v1}.items():
    parts = [millions(part) for part in (model.model, model.first_stage_model, model.cond_stage_model)]
    # in float32: weights, gradients, two means of Adam, EMA
    memory = 5 * 4 * parts[0] / 1000
    print(f"{name:8}" + "".join(f"{n:10.2f}" for n in parts) + f"    {model.latent_shape()!s:14}{memory:10.2f} GB")

seen = {"ours": unet_steps * 32, "tiny": 5_000 * 32, "emoji": 11_000 * 64, "sd-v1 (v1.4 alone)": 225_000 * 2048}
print("pictures seen by the UNet: " + ", ".join(f"{name} {count:,}" for name, count in seen.items()))

# %% [markdown]
# What is different there, apart from the size:
#
# - **Memory.** The last column counts weights, gradients, Adam's two means and the EMA. Activations come on top; they
#   are the larger part. Hence bfloat16, and gradient checkpointing (`use_checkpoint`): compute them again rather than
#   keep them.
# - **Time.** The model card of v1 says 150,000 hours of A100 GPUs, with batches of 2,048 over 256 of them. The loop
#   is the one that ran above; `accelerate.Accelerator` takes the place of `SingleDevice`
#   ([notebook 08](08_training.ipynb)).
# - **The data do not fit.** Two billion pictures from the web: latents are computed anew each time.
# - **The text encoder is not trained.** It is OpenAI's, from 400 million pairs. The autoencoder is trained with two
#   more losses, a perceptual one and a discriminator, against the blur that you saw above.
# - **The learning rate stays constant** (1e-4 after 10,000 steps of warm-up), and the EMA remembers longer (0.9999).
# - **The loss looks the same.** It starts at 1, falls fast, and then moves by less than its own noise, while the
#   pictures go on getting better. Look at pictures, not at the loss.

# %%
work.cleanup()
for what, taken in seconds.items():
    print(f"{taken:6.0f} s of a processor for {what}")
print(f"This notebook took {time.process_time():.0f} s of a processor, {time.time() - start:.0f} s on the clock.")

# %% [markdown]
# ## Recap
#
# - A prompt becomes a context; noise becomes a latent, under guidance; the latent, divided by the scale factor,
#   becomes a picture. A page of code, three networks.
# - Training turns it round: picture to latent, times the scale factor; noise; the UNet's guess; squared error.
# - In order: CLIP and autoencoder, then freeze, then the UNet. Its loss starts at 1 (or at the mean of its weights),
#   and it does not tell whether the latents are any good nor whether the captions are read.
# - What a latent does not hold, no UNet can draw: the autoencoder has to be good first. With much white paper and few
#   steps, squared errors find colours sooner than absolute ones.
# - GroupNorm with one channel in a group takes the time out of a ResBlock: 64 channels are the least.
# - Whether a model draws what the prompt says can be counted, by a judge who has not seen the prompt. The loss does not
#   tell.
# - img2img starts part of the way; inpainting puts back what is known at each step; contexts mix along a line (lerp),
#   noise along a sphere (slerp); a negative prompt takes the place of the empty one.
# - A model is weights, configuration, tokenizer, schedule and scale factor. All five.
#
# ## In the CompVis source
#
# `ddpm.py` and `ddim.py` stand in `ldm/models/diffusion/`.
#
# | here | there | file |
# |---|---|---|
# | `LatentDiffusion` | `LatentDiffusion(DDPM)` | `ddpm.py` |
# | `DiffusionWrapper`, `c_crossattn`, `c_concat` | `DiffusionWrapper`, `conditioning_key` | `ddpm.py` |
# | `get_learned_conditioning(prompts)` | the same | `ddpm.py` |
# | `encode_first_stage`, `get_first_stage_encoding`, `decode_first_stage` | the same | `ddpm.py` |
# | `apply_model(x_noisy, t, cond)` | the same | `ddpm.py` |
# | `p_losses(x_start, cond, t, noise)` | the same; weighted by `l_simple_weight`, `original_elbo_weight` | `ddpm.py` |
# | `sample`, `txt2img` | `scripts/txt2img.py`, which calls `DDIMSampler.sample` or `PLMSSampler.sample` | `scripts/` |
# | `img2img` | `scripts/img2img.py`; `DDIMSampler.stochastic_encode`, `decode` | `ddim.py` |
# | `inpaint(blend="before")` | `DDIMSampler.ddim_sampling(mask=…)`; its mask is 1 for what is **kept** | `ddim.py` |
# | `start_code` | `x_T`; `--fixed_code` | `ddim.py`, `scripts/txt2img.py` |
# | `negative_prompt` | the prompt behind `unconditional_conditioning`, always empty there | `scripts/txt2img.py` |
# | `EMA.applied_to` | `DDPM.ema_scope` | `ddpm.py` |
# | `train_unet` | `DDPM.training_step`, `shared_step`, `configure_optimizers` | `ddpm.py`, `main.py` |
# | `scale_factor` | `scale_factor`; measured on the first batch if `scale_by_std` is set | `ddpm.py` |
#
# ## Try it
#
# - Train the UNet with `text_dropout=1.0`: no caption is ever seen. How much worse is its loss, and what does it
#   draw?
# - Save a model, change `scale_factor` in its `config.json` to 1.0, load it, and draw. Which symptom do you know?
# - Let img2img draw the result of img2img, ten times, at strength 0.2 and with an empty prompt. Where does it go?
# - Mix three contexts, or take 1.5 times one minus 0.5 times another. Is that the same as a negative prompt?
#
# [Exercises of this stage](exercises/07_latent_diffusion.ipynb).
#
# Next, in [notebook 08](08_training.ipynb): the recipe line by line, and what it takes at full scale, on one GPU and on
# many.
