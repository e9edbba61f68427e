# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 0 · Start here: a picture from a prompt
#
# First a picture, then everything that happened on the way to it. You will understand
#
# - why a prompt alone does not decide on a picture, and what noise has to do with it;
# - which three networks Stable Diffusion is made of, and what each of them takes and gives;
# - every number between a prompt and a picture: its shape, its equation, its name in the source of CompVis, the group
#   that made Stable Diffusion;
# - what waits in which of the notebooks that follow.
#
# About 15 minutes to read; it runs in about a minute on a laptop. You need to have met a neural network before, and
# PyTorch. Everything else is explained on the way, most of it in a later notebook.
#
# To watch all of it in your browser, [take the tour](../docs/play.md#tour=overview): it follows one drawing through
# thirteen stops.

# %% tags=["parameters"]
MODE = "full"  # "smoke": every line runs, on so little that the figures mean nothing

# %%
import time

import minisd
from minisd import viz

start = time.time()

sd = minisd.load()  # the model that ships: emoji of 32×32 pixels
drawing = sd.txt2img("fox, noto style", steps=50, guidance_scale=4.0, seed=0, num_images=4)
viz.sheet(drawing.images, scale=4)

# %% [markdown]
# Four foxes. They were not looked up anywhere: they were made out of noise, in a few seconds, by networks that were
# trained on two cores of a CPU. The model has all parts of **Stable Diffusion v1**, at about a hundredth of the size.
# It draws small pictures, 32×32 pixels, enlarged here so that each pixel is a square of 4×4. (They are nearly the same
# fox, since it knows only one in this style. We shall come to that.)
#
# Ask it for something else. A prompt is "WHAT, STYLE style", as in the captions that it was trained on. (A style is the
# hand of one group of artists: noto, fluent, twemoji and so on.)

# %%
full = MODE == "full"
prompts = [f"{what}, noto style" for what in ("panda", "rocket", "red apple")]
prompts += ["fox, twemoji style", "a red fox, noto style"]
drawn = sd.txt2img(prompts, steps=50 if full else 3, guidance_scale=4.0, seed=0)
viz.strip([drawn.pictures], [p.replace(", ", ",\n") for p in prompts], size=1.0)

# %% [markdown]
# The last one went wrong, and that is worth a look. No caption of the training set says "red fox". The captions know
# "red" from "red apple", "red heart" and "red circle", and what came out has the colour of a fox and the shape of a
# heart. This is a small model that learned from about 8,000 pictures. Stable Diffusion saw some hundred thousand times
# as many. The *mechanism* is the same, and here you can watch all of it.
#
# ## The naive idea, and why noise is needed
#
# How would you build such a machine? Here is the obvious way. Take pairs of a caption and a picture. Train a network to
# turn the one into the other, with the mean squared error as its loss.
#
# The trouble is that one caption fits many pictures. Below are all foxes of minisd's small corpus. For "a fox", which
# of them should the network draw? The squared error has one best answer: their mean.

# %%
import torch

corpus = minisd.data.sample(size=32)
foxes = [i for i, row in enumerate(corpus.rows) if row["concept"] == "fox"]
x_0 = corpus.batch(foxes)  # [n 3 32 32], in [-1, 1]
styles = [corpus.rows[i]["style"] for i in foxes]
viz.strip([torch.cat([x_0, x_0.mean(0, keepdim=True)])], [*styles, "their mean"])

# %% [markdown]
# The mean is a ghost: every ear of every fox, at a fifth of its strength. And these few are alike; the mean of all
# photographs of foxes would be a brown fog. A machine that draws must be able to **choose**. So it needs something to
# choose by, something that is different each time. That is what the noise is for:
#
# - **training**: add noise to a picture, much or little, and have a network find the noise. (Whoever finds it has found
#   the picture, too. Under a little noise the picture is plain to see; under much, one can only guess at it.)
# - **drawing**: start from pure noise, ask the network which noise is in it, take away a little of that, and ask again.
#
# In each step the network's best answer is still a mean, of all pictures that are possible so far. But a little of it
# goes into the picture, and at the next step fewer are possible. Step by step, the blur becomes one picture.

# %%
viz.trajectory(drawing.trajectory, sd.decode_first_stage, every=7)

# %% [markdown]
# Above: what the network is shown, $x_t$, from noise to picture. (The timestep $t$ counts down, from much noise to
# none.) Below it: the picture that it has in mind at that moment, called $\hat x_0$, read "x-zero-hat": 0 for "no noise
# left", and the hat for "a guess". At first it is rough, too dark and too strong in colour. But a fox is there long
# before the noise is gone.
#
# You may have expected fine grain, as on an old television. These are blots and strokes, because the noise is not in
# the pixels. It is in a smaller picture, the latent, and what you see is that latent decoded. The section after the
# next one says why.
#
# **Predict, then run.** Two things go into a drawing: the prompt, and the noise at the start, which the seed decides
# on. Draw three prompts, the last of them empty,
# with five seeds each. What will the pictures of one column, of one seed, have in common?
#
# <details><summary>Answer</summary>
#
# Next to nothing that one could name. The noise decides on what the prompt leaves open. Here the prompt leaves little
# open: this model has seen one fox and one panda in that style, and guidance exaggerates what the prompt says. So the
# rows vary only in details. With the empty prompt, the seed alone decides *what* is drawn.
#
# </details>

# %%
prompts = ["fox, noto style", "panda, noto style", ""]
seeds = [0, 1, 2, 3, 4]
rows = [
    sd.txt2img(prompt, steps=25 if full else 3, guidance_scale=4.0, seed=seeds[0], num_images=len(seeds)).pictures
    for prompt in prompts
]
viz.strip(rows, [f"seed {seed}" for seed in seeds], [prompt or "(empty)" for prompt in prompts], size=0.8)

# %% [markdown]
# ## Three networks
#
# Stable Diffusion does not add noise to pixels. An **autoencoder** first squeezes the picture into a **latent**, a
# small picture with four channels. All noising and denoising happens to latents. In the end the latent is decoded.
#
# **Predict, then run.** Stable Diffusion v1 draws 512×512 pixels in colour, and its latent has 4 channels of 64×64. How
# many times fewer numbers does the diffusion have to deal with? And here, with 32×32 pixels and latents of 4×8×8?
#
# <details><summary>Answer</summary>
#
# $512\cdot512\cdot3 = 786{,}432$ against $64\cdot64\cdot4 = 16{,}384$: 48 times fewer. Here,
# $32\cdot32\cdot3 = 3{,}072$ against $8\cdot8\cdot4 = 256$: 12 times.
#
# </details>

# %%
parts = {
    "FrozenCLIPEmbedder   cond_stage_model       text → context": sd.cond_stage_model,
    "UNetModel            model.diffusion_model  latent, t, context → noise": sd.model.diffusion_model,
    "AutoencoderKL        first_stage_model      picture ↔ latent": sd.first_stage_model,
}
with torch.device("meta"):  # builds Stable Diffusion v1 without its 4 GB of memory: only to count
    v1 = minisd.LatentDiffusion(minisd.PRESETS["sd-v1"], sd.cond_stage_model.tokenizer)
v1_parts = [v1.cond_stage_model, v1.model.diffusion_model, v1.first_stage_model]

print(f"{'network':21}{'its name in sd':23}{'what it does':32}{'here':>11}{'SD v1':>14}")
for (name, network), other in zip(parts.items(), v1_parts, strict=True):
    here, there = (sum(p.numel() for p in n.parameters()) for n in (network, other))
    print(f"{name:76}{here:11,}{there:14,}")

# %% [markdown]
# The first reads: it makes of the prompt a **context**, one vector for each token (a token is a word, or a piece of
# one). The second is the only one that knows about noise. The third goes between pictures and latents. Here is how they
# work together when the model draws.

# %%
viz.sampling_diagram()

# %% [markdown]
# Read it from the top. The **UNet** is asked about the same noisy latent twice: once with the prompt's context $c$,
# once with that of the empty prompt, $c_\emptyset$. The **sampler** exaggerates the difference (this is "guidance") and
# takes a step. Then the UNet is asked again, about a latent with a little less noise: in 50 steps a hundred questions.
# After the last step, the autoencoder decodes. The text is read once, and the picture decoded once.
#
# (There are $T = 1000$ noise levels, counted from 0; and $x_{t-1}$ means the *next* latent, at the next level that is
# visited. The table below visits every twentieth.)
#
# ## The map
#
# And this is the same drawing with all that was computed on the way. Each intermediate has two lines: what it is, with
# its shape and its range; then how it came about, and where CompVis's source computes it. The number in front is the
# stage, and the notebook that explains it. **Every notebook comes back to this table.** You need not understand it now.
# Look for the shapes: how the `[1, 24]` tokens become `[1, 24, 192]`, how each latent and each noise from `x_T` to `z`
# is `[1, 4, 8, 8]`, and how `[1, 3, 32, 32]` comes out.

# %%
trace = minisd.trace(sd, "fox, noto style", steps=50 if full else 3, guidance_scale=4.0, seed=0)
print(trace)

# %% [markdown]
# The tensors themselves are in it, `trace["x_T"].value`. Here are those that can be looked at as pictures: the first
# step's latents and noises, channel by channel.

# %%
symbols = ["x_T", "eps_cond", "eps", "x0", "z"]
rows = [trace[symbol].value[0, :, None] for symbol in symbols]  # [4 1 8 8]: each channel as a grey picture
rows = [row / row.abs().max() for row in rows]
viz.strip(rows, [f"channel {i}" for i in range(4)], [f"{s}:\n{trace[s].name}" for s in symbols], size=0.8)

# %%
def how_far(a, b):
    """Root mean square of the difference of two intermediates."""
    return (trace[a].value - trace[b].value).square().mean().sqrt().item()


print(f"x_T has the standard deviation {trace['x_T'].std:.3f}")
for a, b in [("x_T", "eps_uncond"), ("x_T", "eps_cond"), ("eps_uncond", "eps_cond"), ("x_T", "eps")]:
    print(f"{a:10} and {b:10} differ by {how_far(a, b):.3f}")

# %% [markdown]
# The first three rows look alike. At the first step, $x_T$ is nothing but noise, and the network says so: what it finds
# is $x_T$, but for 0.039 without the prompt and 0.075 with it. All that decides on the picture is in these small
# remainders. Its two answers differ by 0.073, which is what the prompt says. Guidance takes this difference four times,
# and the remainder grows to 0.287. In the last two rows there is no noise any more: in channel 2 one can make out the
# shape of the fox's head.
#
# (DDIM, the sampler that drew this, visits every twentieth timestep if it has 50 steps: 981, 961, …, 21, 1. So the
# first one, at which the noise is called $x_T$, is 981 and not 999.)
#
# **Predict, then run.** Set `guidance_scale=1.0`. Then the sampler goes by the prompt as it is, without exaggeration.
# Which lines of the table will no longer be there?
#
# <details><summary>Answer</summary>
#
# `eps_uncond` and the separate `eps_cond`: with nothing to exaggerate, the UNet is asked only once a step, and has half
# as much to compute. (The empty prompt's context is still in the table. It was computed, and nobody asked for it.)
#
# </details>

# %%
plain = minisd.trace(sd, "fox, noto style", steps=50 if full else 3, guidance_scale=1.0, seed=0)
gone = [entry.symbol for entry in trace if entry.symbol not in [other.symbol for other in plain]]
print("gone:", ", ".join(gone))
viz.strip([torch.cat([trace["x"].value, plain["x"].value])], ["guidance 4", "guidance 1"])

# %% [markdown]
# ## How it was trained
#
# Training is shorter than drawing: there is no loop in it. Take a picture and its caption, a random timestep $t$ and
# random noise $\epsilon$. Add the noise, and let the UNet find it. The loss is the squared error. The autoencoder and
# the text encoder have been trained before, and are **frozen**. (The decoder has no part in this step. So it can be
# trained further when all is done, and that of this model was: [notebook 04](04_vae.ipynb).)

# %%
viz.training_diagram()

# %% [markdown]
# `minisd.trace` follows a training step too, if it is given the picture that the prompt describes.

# %%
fox = corpus.batch([corpus.captions.index("fox, noto style")])[0]  # [3 32 32]
step = minisd.trace(sd, "fox, noto style", image=fox, t=500, seed=0)
print(step)

# %% [markdown]
# The last line is the loss at this one timestep, 0.055. A network that knows nothing and answers 0 would have a loss of
# about 1, the variance of the noise.
#
# The equations of both tables fit on a page, and the rest of the course is about why they are what they are. In them,
# $x_0$ is the clean latent ($z$ in the tables), $\epsilon$ the noise and $\epsilon_\theta$ the UNet's answer
# ($\theta$: its weights); $\bar\alpha_t$ is the share of the variance that is still picture at $t$, from nearly 1 down
# to nearly 0; $s$ is the guidance scale, and $t-1$ the next timestep that is visited.
#
# $$x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\;\epsilon \qquad \text{noising, notebook 01}$$
# $$L = \big|\epsilon - \epsilon_\theta(x_t, t, c)\big|^2 \qquad \text{training, notebook 02}$$
# $$\epsilon = \epsilon_\theta(x_t, t, c_\emptyset)
#   + s\,\big(\epsilon_\theta(x_t, t, c) - \epsilon_\theta(x_t, t, c_\emptyset)\big)
#   \qquad \text{guidance, notebook 06}$$
# $$\hat x_0 = \frac{x_t - \sqrt{1-\bar\alpha_t}\;\epsilon}{\sqrt{\bar\alpha_t}}, \qquad
#   x_{t-1} = \sqrt{\bar\alpha_{t-1}}\,\hat x_0 + \sqrt{1-\bar\alpha_{t-1}}\;\epsilon
#   \qquad \text{a step of the sampler, notebook 06}$$
#
# ## The classes, and where they stand
#
# minisd keeps the names of CompVis's source, so that whoever has read the one can read the other. The parameters have
# the names of the official checkpoint, `sd-v1-4.ckpt`, which loads as it is.

# %%
viz.class_diagram()

# %% [markdown]
# To the right: the file in `minisd/`, and the file in CompVis's repository. (CompVis takes CLIP from the library
# `transformers`. Here it is written out, and can be trained.)
#
# ## What follows
#
# One stage has one name: `minisd/noising.py`, `notebooks/01_noising`, `docs/noising.md`, `tests/test_noising.py`.
#
# | notebook | what it is about |
# |---|---|
# | [01_noising](01_noising.ipynb) | how a picture dissolves: $\beta_t$, $\bar\alpha_t$; drawing without any network |
# | [02_loss](02_loss.ipynb) | why "find the noise" is the right task, and how to learn it; first in two dimensions |
# | [03_unet](03_unet.ipynb) | the network that finds the noise: its blocks, its time, where the text comes in |
# | [04_vae](04_vae.ipynb) | from pictures to latents and back; where Stable Diffusion's 0.18215 comes from |
# | [05_clip](05_clip.ipynb) | from a sentence to the context: tokens, attention, a space shared with pictures |
# | [06_sampling](06_sampling.ipynb) | DDPM, DDIM, PLMS and faster ways back from noise; guidance |
# | [07_latent_diffusion](07_latent_diffusion.ipynb) | the three networks as one, trained on a laptop |
# | [08_training](08_training.ipynb) | the recipe of the training, line by line; on one device and on many |
# | [09_stable_diffusion_v1](09_stable_diffusion_v1.ipynb) | the official weights; CompVis's source, file by file |
# | [10_evaluation](10_evaluation.ipynb) | does it draw what was asked? hits, Fréchet distance, guidance, copies |
# | [11_why_is_it_noise](11_why_is_it_noise.ipynb) | every classic mistake, on purpose: symptom, cause, test |
#
# 01 to 03 and 06 make one thread: noise, loss, network, sampler. 04 and 05 can be read at any time.
#
# ## How to work with these notebooks
#
# - **Predict, then run.** Where these words stand, write an answer down before you unfold ours. A wrong guess teaches
#   more than a right reading.
# - **Change something.** Each notebook ends with a few things to try. No run of a cell is precious.
# - **Write it yourself.** Each stage has exercises, in a notebook of the same name, beginning with
#   [`exercises/01_noising.ipynb`](exercises/01_noising.ipynb): functions to be written from their equations. A
#   checker runs yours against minisd's, says which mistake it is, and can put yours into minisd and draw with it. It
#   can be asked from a terminal, too:
#
# ```
# python -m minisd.coursework list                 all exercises, by stage
# python -m minisd.coursework show q_sample        what is asked for
# python -m minisd.coursework check my_answers.py  right, or which mistake it is
# ```
#
# A good rhythm: the notebook of a stage, then its exercises, then the module, which you will now read like a text that
# you might have written.

# %%
print(f"This notebook took {time.time() - start:.0f} s.")

# %% [markdown]
# ## Recap
#
# - A caption fits many pictures, and their mean is none of them. Noise is what the machine chooses by.
# - Training: add noise $\epsilon$ to a latent, and learn to find it. Drawing: start from pure noise, and take away what
#   the network finds, step by step.
# - Three networks: `FrozenCLIPEmbedder` reads, `UNetModel` finds noise, `AutoencoderKL` goes between pictures and
#   latents. Only the UNet is trained for diffusion.
# - `minisd.trace` prints everything between prompt and picture.
#
# ## In the CompVis source
#
# | here | there | file |
# |---|---|---|
# | `minisd.load()` | `load_model_from_config` | `scripts/txt2img.py` |
# | `sd.txt2img(prompt, …)` | the script itself | `scripts/txt2img.py` |
# | `sd.get_learned_conditioning` | `LatentDiffusion.get_learned_conditioning` | `ldm/models/diffusion/ddpm.py` |
# | `sd.apply_model` | `LatentDiffusion.apply_model` | `ldm/models/diffusion/ddpm.py` |
# | `minisd.sampling.ddim` | `DDIMSampler.sample`, `p_sample_ddim` | `ldm/models/diffusion/ddim.py` |
# | `sd.decode_first_stage` | `LatentDiffusion.decode_first_stage` | `ldm/models/diffusion/ddpm.py` |
# | `x_T`, the noise at the start | `x_T`; `start_code` with `--fixed_code` | `ddim.py`, `scripts/txt2img.py` |
# | `minisd.trace` | has no counterpart | |
#
# ## Try it
#
# - Draw something of your own. Which things does the model know? `corpus.captions` names some of them.
# - `minisd.trace(..., step=40)` shows a later step from the inside. How large is `x0` now, and how far is `eps_cond`
#   from `eps_uncond`?
# - Print the training trace at `t=50` and at `t=950`. At which is the loss larger, and why?
#
# The exercises begin with the next notebook: there is nothing to compute yet.
#
# Next, in [notebook 01](01_noising.ipynb): what noise does to a picture, and how it could be undone.
