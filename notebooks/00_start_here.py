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
# This notebook draws a picture from a prompt, and then shows everything that was computed on the way. At the end you
# can
#
# - say why a prompt alone does not determine a picture, and what the noise is for;
# - name the three networks of Stable Diffusion, with what each takes and returns;
# - find, for every tensor between prompt and picture, its shape, its equation and the notebook that explains it.
#
# About 20 minutes; it runs in about a minute on a laptop. You should have trained a neural network in PyTorch before.
# Everything else is explained here or in a later notebook.
#
# To watch the same computation in your browser, [take the tour](../docs/play.md#tour=overview).

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

import minisd
from minisd import viz

start = time.time()

sd = minisd.load()  # the model that comes with minisd
drawing = sd.txt2img("fox, noto style", steps=50, guidance_scale=4.0, seed=0, num_images=4)
viz.sheet(drawing.images, scale=4)

# %% [markdown]
# These four foxes were not looked up. The model made them out of noise, in a few seconds. It has all parts of **Stable
# Diffusion v1** at about a hundredth of the size, and was trained on two CPU cores. Its pictures are small and are
# enlarged here. The four are nearly the same because the training set has one fox in this style.
#
# You can ask for something else. A prompt reads "THING, STYLE style", like the captions that the model was trained on.
# A style is the name of a set of emoji: noto, fluent, twemoji and so on.

# %%
full = MODE == "full"
prompts = [f"{what}, noto style" for what in ("panda", "rocket", "red apple")]
prompts += ["fox, twemoji style", "a red fox, noto style"]
drawn = sd.txt2img(prompts, steps=50 if full else 3, guidance_scale=4.0, seed=0)
viz.strip([drawn.pictures], [p.replace(", ", ",\n") for p in prompts], size=1.0)

# %% [markdown]
# The last one is wrong: a heart with the colours of a fox. No caption in the training set says "red fox". The model
# knows "red" only from captions such as "red apple" and "red heart". It is a small model that learned from about 8,000
# pictures, and Stable Diffusion saw some hundred thousand times as many. The computation is the same, and here you can
# look at all of it.
#
# ## Why noise is needed
#
# The obvious way to build such a model is to train a network that turns a caption into a picture, with the mean squared
# error as its loss. But one caption fits many pictures. Below are all foxes of the small corpus that comes with minisd.
# For the caption "a fox", the squared error is smallest when the network returns their mean.

# %%
import torch

corpus = minisd.data.sample(size=32)
foxes = [i for i, row in enumerate(corpus.rows) if row["concept"] == "fox"]
x_0 = corpus.batch(foxes)  # [n 3 32 32], in [-1, 1]
styles = [corpus.rows[i]["style"] for i in foxes]
viz.strip([torch.cat([x_0, x_0.mean(0, keepdim=True)])], [*styles, "their mean"])

# %% [markdown]
# The mean shows every ear of every fox at a fraction of its strength, and looks like none of them. The mean of all
# photographs of foxes would be a brown blur. So the model has to **choose** one picture, and it needs an input that is
# different each time to choose by. That input is noise.
#
# - **Training.** Add noise to a picture, a little or a lot, and train a network to predict the noise. If you know the
#   noise, you can subtract it, so predicting the noise is as good as predicting the picture.
# - **Sampling.** Start from pure noise. Predict the noise in it, remove a small part of that, and repeat.
#
# At each step the network's best prediction is still a mean, over all pictures that fit what it sees. But only a small
# part of it is used. After each step fewer pictures fit, and the mean becomes sharper, until one picture is left.

# %%
viz.trajectory(drawing.trajectory, sd.decode_first_stage, every=7)

# %% [markdown]
# The upper row is the network's input $x_t$, from noise to picture. The timestep $t$ counts down from much noise to
# none. The lower row is $\hat x_0$, the network's current estimate of the finished picture: the 0 stands for "no
# noise", and the hat for "estimate". The first estimates are rough, but the subject is there long before the noise is
# gone.
#
# The noise does not look like the grain of an old television because it was not added to the pixels. It was added to a
# smaller picture, the **latent**, and what you see is that latent decoded. The section on the three networks says why.
#
# **Predict, then run.** Two things determine a drawing: the prompt, and the noise at the start, which is made from the
# seed. We draw two prompts and the empty prompt with five seeds each. What will the pictures of one column, which share
# their seed, have in common?

# %% tags=["hide-output"]
prompts = ["fox, noto style", "panda, noto style", ""]
seeds = [0, 1, 2, 3, 4]
rows = [
    sd.txt2img(prompt, steps=25 if full else 3, guidance_scale=4.0, seed=seeds[0], num_images=len(seeds)).pictures
    for prompt in prompts
]
viz.strip(rows, [f"seed {seed}" for seed in seeds], [prompt or "(empty)" for prompt in prompts], size=0.8)

# %% [markdown]
# They have next to nothing in common. The noise decides what the prompt leaves open. Here the prompt leaves little
# open, because the training set has one fox and one panda in that style, so the pictures of a row differ only in
# details. With the empty prompt, the seed alone decides *what* is drawn.
#
# ## Three networks
#
# 1. **CLIP's text encoder** turns the prompt into the **context**: one vector for each token. (A token is a word or a
#    piece of a word.)
# 2. The **UNet** gets a noisy latent, the timestep and the context, and predicts the noise.
# 3. The **autoencoder** turns a picture into a latent and back. The latent is a small picture with four channels. All
#    noising and denoising happens to latents, because they have far fewer numbers than pixels.
#
# **Predict.** Stable Diffusion v1 draws 512×512 pixels in three colours, and its latent has 4 channels of
# 64×64. How many times fewer numbers is that?
#
# <details><summary>Answer</summary>
#
# $512\cdot512\cdot3 = 786{,}432$ numbers against $64\cdot64\cdot4 = 16{,}384$: 48 times fewer.
#
# </details>
#
# The next cell counts the parameters of the three networks, here and in Stable Diffusion v1.

# %% tags=["hide-input"]
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
# This is how they work together when the model draws:

# %%
viz.sampling_diagram()

# %% [markdown]
# The text is encoded once. Then the **sampler** repeats one step, here 50 times. In each step, the UNet sees the same
# noisy latent twice: once with the prompt's context $c$, and once with the context of the empty prompt, $c_\emptyset$.
# The difference between its two predictions is what the prompt contributes. **Guidance** multiplies this difference,
# here by four. The sampler then removes a part of the predicted noise. After the last step, the autoencoder decodes the
# latent once.
#
# There are $T = 1000$ noise levels, counted from 0. With 50 steps, the sampler visits every twentieth.
#
# ## Everything between prompt and picture
#
# `minisd.trace` draws a picture and records every tensor on the way. Each has two lines: what it is, with its shape and
# range; then how it is computed, and where the source of CompVis, the group that made Stable Diffusion, computes it.
# The number in front is the notebook that explains it. **Every notebook comes back to its rows of this table**, so you
# need not understand them now. Follow the shapes: from tokens to context, from `x_T` to `z`, and from there to a
# picture.

# %%
trace = minisd.trace(sd, "fox, noto style", steps=50 if full else 3, guidance_scale=4.0, seed=0)
print(trace)

# %% [markdown]
# The tensors themselves are in the trace, for example `trace["x_T"].value`. These are the latents and noises of the
# first step, each of the four channels as a grey picture.

# %%
symbols = ["x_T", "eps_cond", "eps", "x0", "z"]
rows = [trace[symbol].value[0, :, None] for symbol in symbols]  # [4 1 8 8]: each channel as a grey picture
rows = [row / row.abs().max() for row in rows]
viz.strip(rows, [f"channel {i}" for i in range(4)], [f"{s}:\n{trace[s].name}" for s in symbols], size=0.8)

# %% tags=["hide-input"]
def how_far(a, b):
    """Root mean square of the difference of two intermediates."""
    return (trace[a].value - trace[b].value).square().mean().sqrt().item()


print(f"x_T has the standard deviation {trace['x_T'].std:.3f}")
for a, b in [("x_T", "eps_uncond"), ("x_T", "eps_cond"), ("eps_uncond", "eps_cond"), ("x_T", "eps")]:
    print(f"{a:10} and {b:10} differ by {how_far(a, b):.3f}")

# %% [markdown]
# At the first step the input $x_T$ is nearly pure noise, so the UNet predicts that nearly all of it is noise, and the
# first three rows look alike. What is left of $x_T$ without the predicted noise is the first trace of a picture. The
# difference between the predictions with and without the prompt is small, too, and guidance multiplies it by four. In
# the last two rows the noise is gone, and in channel 2 you can make out the shape of the head.
#
# **Predict, then run.** With `guidance_scale=1.0` the sampler uses the prediction for the prompt as it is. Which rows
# of the table will be missing?

# %% tags=["hide-output"]
plain = minisd.trace(sd, "fox, noto style", steps=50 if full else 3, guidance_scale=1.0, seed=0)
gone = [entry.symbol for entry in trace if entry.symbol not in [other.symbol for other in plain]]
print("gone:", ", ".join(gone))
viz.strip([torch.cat([trace["x"].value, plain["x"].value])], ["guidance 4", "guidance 1"])

# %% [markdown]
# `eps_uncond` and `eps_cond` are gone. Without guidance there is nothing to compare, so the UNet is called only once in
# each step, and a drawing costs half as much.
#
# ## One step of training
#
# A training step has no loop. Take a picture and its caption, a random timestep $t$ and random noise $\epsilon$. Add
# the noise to the picture's latent, let the UNet predict it, and compute the squared error. The autoencoder and the
# text encoder were trained before and are not changed.

# %%
viz.training_diagram()

# %% [markdown]
# `minisd.trace` records a training step, too, if you pass it a picture.

# %%
fox = corpus.batch([corpus.captions.index("fox, noto style")])[0]  # [3 32 32]
step = minisd.trace(sd, "fox, noto style", image=fox, t=500, seed=0)
print(step)

# %% [markdown]
# The last row is the loss at this one timestep. A network that always predicts 0 has a loss of about 1, because that is
# the variance of the noise.
#
# ## The course
#
# The equations of both tables fit on half a page, and the notebooks explain why they are what they are.
#
# $$x_t = \sqrt{\bar\alpha_t}\,z + \sqrt{1-\bar\alpha_t}\;\epsilon \qquad \text{noising (01)}$$
# $$L = \big\|\epsilon - \hat\epsilon(x_t, t, c)\big\|^2 \qquad \text{the loss (02)}$$
# $$\hat\epsilon = \hat\epsilon(x_t, t, c_\emptyset)
#   + s\,\big(\hat\epsilon(x_t, t, c) - \hat\epsilon(x_t, t, c_\emptyset)\big)
#   \qquad \text{guidance (06)}$$
# $$\hat z_0 = \frac{x_t - \sqrt{1-\bar\alpha_t}\;\hat\epsilon}{\sqrt{\bar\alpha_t}}, \qquad
#   x_{t-1} = \sqrt{\bar\alpha_{t-1}}\,\hat z_0 + \sqrt{1-\bar\alpha_{t-1}}\;\hat\epsilon
#   \qquad \text{a step of the sampler (06)}$$
#
# $z$ is the clean latent, $\epsilon$ the noise and $\hat\epsilon$ the prediction. $\bar\alpha_t$ is the share of the
# variance that is still picture at $t$, from nearly 1 down to nearly 0. $s$ is the guidance scale, and $t-1$ stands for
# the next timestep that is visited.
#
# The **core path**, notebooks 00 to 07, takes about seven hours with the exercises that stand in the text.
#
# | notebook | the question that it answers |
# |---|---|
# | [01_noising](01_noising.ipynb) | How is noise added, and why in just this way? |
# | [02_loss](02_loss.ipynb) | Why is predicting the noise enough to draw pictures? |
# | [03_unet](03_unet.ipynb) | What is inside the network that predicts it? How does it know the time and the prompt? |
# | [04_vae](04_vae.ipynb) | How does a picture become a latent, and where does Stable Diffusion's 0.18215 come from? |
# | [05_clip](05_clip.ipynb) | How does a sentence become the context? |
# | [06_sampling](06_sampling.ipynb) | How does noise become a picture, and in how many steps? |
# | [07_latent_diffusion](07_latent_diffusion.ipynb) | How do the networks work together? How are they trained? |
#
# The others can be read in any order afterwards.
#
# | notebook | the question that it answers |
# |---|---|
# | [08_training](08_training.ipynb) | What does the full training recipe do, line by line, on one device and on many? |
# | [09_stable_diffusion_v1](09_stable_diffusion_v1.ipynb) | How do the official weights load? |
# | [10_evaluation](10_evaluation.ipynb) | How do you measure whether the model draws what was asked? |
# | [11_why_is_it_noise](11_why_is_it_noise.ipynb) | Your model draws noise: what went wrong? |
#
# 01, 02, 03 and 06 follow one thread: noise, loss, network, sampler. 04 and 05 can be read at any time.
#
# Each notebook works in the same way:
#
# - **Predict, then run**: where you see these words, write down an answer before you look at the output. A wrong
#   prediction shows you what you have not understood yet.
# - **Write it yourself**: where a notebook has explained a function, you write it, and a checker says "right" or names
#   the mistake. Each stage has more of them in a notebook of its own, such as
#   [`exercises/01_noising.ipynb`](exercises/01_noising.ipynb).
# - **Optional** sections and folded boxes hold derivations and measurements that you can skip.
#
# Every stage has one name: `minisd/noising.py`, `notebooks/01_noising`, `docs/noising.md`, `tests/test_noising.py`.
# When you have finished a notebook, read the module. You will understand every line of it.

# %%
print(f"This notebook took {time.time() - start:.0f} s.")

# %% [markdown]
# ## What you know now
#
# - One caption fits many pictures, and their mean is none of them. The noise is what the model chooses by.
# - Training adds noise to a latent and learns to predict it. Sampling starts from pure noise and removes what the
#   network predicts, step by step.
# - CLIP's text encoder turns the prompt into the context, the UNet predicts noise, and the autoencoder turns latents
#   into pictures. Only the UNet is trained on noise.
#
# **Try it.** Draw something of your own (`corpus.captions` lists what the model has seen). Print the training trace at
# `t=50` and at `t=950`: at which is the loss larger, and why?
#
# **Next**: everything above starts from noisy pictures. [Notebook 01](01_noising.ipynb) makes them.
#
# ## Optional: the classes and their counterparts in CompVis's source
#
# minisd keeps the names of CompVis's source, so that you can read one beside the other. The parameters have the names
# of the official checkpoint, `sd-v1-4.ckpt`, which loads as it is. The diagram shows which class contains which, with
# the file in `minisd/` and the file in CompVis's repository. (CompVis takes CLIP from the library `transformers`.
# minisd has its own, which can be trained.)

# %%
viz.class_diagram()

# %% [markdown]
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
