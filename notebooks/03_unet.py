# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3 · The UNet: the network that finds the noise
#
# The UNet gets a noisy latent, a timestep and a text, and estimates the noise in the latent. This notebook takes it
# apart: why it has this shape, and where the time and the text come in.
#
# At the end you can
#
# - explain why the network goes down to small maps and up again, and what its skip connections carry;
# - write the timestep embedding and cross-attention yourself;
# - follow a feature map through a ResBlock and a SpatialTransformer, with all shapes;
# - read an attention map, and say what it does not prove.
#
# About 70 minutes, with two exercises; it runs in about 2 minutes on a laptop.
#
# Before: [notebook 02](02_loss.ipynb), the loss that this network is trained with. After:
# [notebook 04](04_vae.ipynb), where the latents come from. The modules are [`minisd/unet.py`](../minisd/unet.py) and
# [`minisd/attention.py`](../minisd/attention.py). To see the network at work in your browser first, open the stops
# [The UNet](../docs/play.md#tour=unet), [The time embedding](../docs/play.md#tour=time) and
# [Cross-attention](../docs/play.md#tour=attention) of the guided tour.

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
import math  # noqa: F401  for an exercise
from collections import Counter
from collections.abc import Callable

import torch
from einops import rearrange  # noqa: F401  for an exercise
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

import minisd
from minisd import viz
from minisd.attention import SpatialTransformer
from minisd.coursework import check
from minisd.instruments.unet_outline import outline
from minisd.unet import ResBlock, UNetConfig, UNetModel

full = MODE == "full"
Layer = Callable[[Tensor], Tensor]  # the type of a function from a tensor to a tensor

# %% [markdown]
# ## Where we are

# %%
viz.pipeline("unet")

# %% [markdown]
# Training and drawing ask the UNet the same question: which noise is in $x_t$? These are its rows in the trace of a
# drawing (the table of notebook 00):

# %% tags=["hide-input"]
sd = minisd.load()
unet, schedule = sd.model.diffusion_model, sd.schedule
drawing = minisd.trace(sd, "fox, noto style", steps=20, guidance_scale=4.0)
print(*[row for row in drawing if row.stage == 3], sep="\n")

# %% [markdown]
# ## What goes in, what comes out
#
# $$\hat\epsilon = \epsilon_\theta(x_t, t, c)$$
#
# $x_t$ is a noisy latent and $t$ its timestep. The context $c$ is what the text encoder makes of the prompt: one vector
# for each token, that is, for each piece of the prompt (notebook 05). The output $\hat\epsilon$ has the shape of $x_t$.
# The error, for some pictures with captions:

# %%
torch.manual_seed(0)
corpus = minisd.data.sample(size=sd.config.image_size)
count = 64 if full else 4
chosen = torch.randperm(len(corpus))[:count].tolist()
context = sd.get_learned_conditioning([corpus.captions[i] for i in chosen])  # [b m d]: m tokens of d numbers each
x_0 = sd.get_first_stage_encoding(sd.encode_first_stage(corpus.batch(chosen)))  # [b 4 h w]: scaled latents
noise = torch.randn_like(x_0)


@torch.no_grad()
def errors(t, context=context):
    """The mean squared error of ε̂ at timestep t, for each picture [b]."""
    x_t = schedule.q_sample(x_0, torch.full((count,), t), noise)
    eps = unet(x_t, torch.full((count,), t), context)
    return (eps - noise).square().mean((1, 2, 3))


print(f"x_t {list(x_0.shape)}, t {[count]}, context {list(context.shape)} -> ε̂ {list(x_0.shape)}")
print(", ".join(f"error at t = {t}: {errors(t).mean():.3f}" for t in (100, 500, 900)))

# %% [markdown]
# ## Why a U?
#
# Output and input have the same size. So why not stack 3×3 convolutions at this size? Because each of them lets a pixel
# see only one neighbour further, and because each works on all pixels, which is expensive.
#
# The remedy is to **halve the map**. At half the size, a convolution reaches twice as far and costs a quarter. Halve
# again, work on the small map, then enlarge it again step by step. Below, both networks have ten convolutions. Blue are
# the pixels on which the middle pixel of the output depends.


# %% tags=["hide-input"]
def reach(path, side=64):
    """What the middle pixel of the output depends on [side side], and how many multiplications the output costs.

    path: one letter for each convolution of 3×3. "c": keeps the size; "d": halves it; "u": doubles it.
    """
    x = torch.zeros(1, 1, side, side, requires_grad=True)
    h, cost = x, 0
    for layer in path:
        if layer == "u":
            h = F.interpolate(h, scale_factor=2)  # each pixel becomes four
        h = F.conv2d(h, torch.full((1, 1, 3, 3), 1 / 9), stride=2 if layer == "d" else 1, padding=1)
        cost += 9 * h.numel()
    (slope,) = torch.autograd.grad(h[0, 0, side // 2, side // 2], x)  # zero where x makes no difference
    return (slope[0, 0] != 0).float(), cost


panels = {}
for name, path in [("a stack", "cccccccccc"), ("down and up", "cdddccuuuc")]:
    seen, cost = reach(path)
    panels[f"{name}: {cost:,} multiplications,\nsees {int(seen.sum()):,} of {seen.numel():,} pixels"] = seen
viz.matrices(panels, cell=(0.035, 0.035), xlabel="x", ylabel="y")

# %% [markdown]
# What this saves can be spent on more channels. But a small map no longer knows *where exactly* something is, and the
# noise has to be estimated for every single number. So the maps of the way down are kept, and concatenated
# (`torch.cat`) on the way up to what comes from below. These are the [**skip connections**](../docs/glossary.md), and
# the whole is the U of [Ronneberger et al. 2015](https://arxiv.org/abs/1505.04597):

# %%
config = sd.config.unet
blocks = outline(config, size=x_0.shape[-1])
viz.unet_diagram(blocks, "the UNet of this model")

# %% [markdown]
# Read it down on the left and up on the right. Each box is a block, with the channels and the size of its output. A
# *Res* (ResBlock) mixes neighbouring pixels and gets the time. A *Transformer* (blue) lets all pixels read each other
# and the text. The dashed lines are the skip connections, with the number of channels that they carry. Stable
# Diffusion's UNet has more levels and blocks, but no other parts (an optional section has it).
#
# This is `UNetModel.forward`, without its checks (`emb` is the time, as a vector):


# %%
@torch.no_grad()
def forward(unet, x, timesteps, context):
    emb = unet.time_embed(minisd.unet.timestep_embedding(timesteps, unet.config.model_channels))  # [b e]
    h, skips = x, []
    for block in unet.input_blocks:  # the way down
        h = block(h, emb, context)
        skips.append(h)  # keep the output for the way up
    h = unet.middle_block(h, emb, context)
    for block in unet.output_blocks:  # the way up
        h = torch.cat([h, skips.pop()], dim=1)  # the last one kept is the first one used
        h = block(h, emb, context)
    return unet.out(h)


t = torch.full((count,), 500)
x_t = schedule.q_sample(x_0, t, noise)
with torch.no_grad():
    assert torch.equal(forward(unet, x_t, t, context), unet(x_t, t, context))

# %% [markdown]
# Are the skip connections needed? We cut one at a time: what it carries is set to zero.
#
# **Predict, then run.** Which of the dashed lines in the diagram can the network least do without?

# %% tags=["hide-input", "hide-output"]
into = {}  # {block on the left: (block on the right, channels that are handed across)}
for below, block in zip(blocks[:-1], blocks[1:], strict=True):
    if block.skip:
        into[block.skip] = block.name, block.shape_in[0] - below.shape_out[0]


def error_without(name, t):
    """The error at t if what the block `name` hands across is zero."""
    receiver, channels = into[name]

    def cut(_, args):
        h = args[0].clone()
        h[:, -channels:] = 0  # the skip stands behind what comes from below
        return h, *args[1:]

    hook = unet.get_submodule(receiver).register_forward_pre_hook(cut)
    try:
        return errors(t).mean()
    finally:
        hook.remove()


print(f"{'':9}{'nothing cut':>12}" + "".join(f"{'cut ' + name:>20}" for name in into))
for t in (100, 300, 600, 900):
    print(f"t = {t:3}  {errors(t).mean():12.3f}" + "".join(f"{error_without(name, t):20.3f}" for name in into))

# %% [markdown]
# The topmost one, from `input_blocks.0`. Without it, the error is about that of always answering 0 (which is 1, the
# variance of the noise), or larger. That first convolution has seen next to nothing of the picture. What it hands
# across is the noisy latent itself, at full size, and this is needed to name the noise number by number.
#
# The U can see everything. Does it use that? We take the estimate of the clean latent (notebook 01), and ask how much
# one pixel of it changes if a number of $x_t$ changes a little. That is a derivative, so autograd computes it.
#
# $$\hat x_0 = \frac{x_t - \sqrt{1-\bar\alpha_t}\;\hat\epsilon}{\sqrt{\bar\alpha_t}}$$
#
# **Predict, then run.** At which $t$ does the network look far, and at which only at the pixel itself?


# %% tags=["hide-input", "hide-output"]
def reliance(t, y, x, pictures=16):
    """How strongly x̂_0 at (y, x) depends on each pixel of x_t [h w]: root mean square over channels and pictures."""
    clean = x_0[:pictures]
    t = torch.full((len(clean),), t)
    x_t = schedule.q_sample(clean, t, noise[:pictures]).requires_grad_()
    estimate = schedule.predict_start_from_noise(x_t, t, unet(x_t, t, context[:pictures]))
    slopes = [torch.autograd.grad(channel, x_t, retain_graph=True)[0] for channel in estimate[:, :, y, x].sum(0)]
    return torch.stack(slopes).square().mean((0, 1, 2)).sqrt()


middle = x_0.shape[-1] // 2 - 1
panels = {}
for t in (20, 100, 300, 900):
    slope = reliance(t, middle, middle)
    own = slope[middle, middle] ** 2 / slope.square().sum()
    panels[f"t = {t}\nown pixel: {own:.0%}"] = slope / slope.max()
viz.matrices(panels, cell=(1.36 / len(slope),) * 2, xlabel="x", ylabel="y")

# %% [markdown]
# The darker a pixel of $x_t$, the more the middle pixel of $\hat x_0$ depends on it. (Above each panel: the share of
# the pixel itself, in the sum of the squares.) With little noise, a pixel shows its own value. With much noise, all the
# others together say more about it than it does. This is why the network has to see the whole picture.
#
# ## How does it get the time?
#
# The answer depends on how much of $x_t$ is noise. Why not add the number $t$ as an input? Next to channels of size 1,
# a number up to 999 is far too large. Divided by 1,000, it hardly differs between 10 and 11.
#
# Instead, think of many clocks. Each turns $t$ into a point on a circle, two numbers in $[-1, 1]$. The hand of the
# first turns fast, and each further one more slowly. The fast hands distinguish neighbouring times, the slow ones
# distinguish early from late.
#
# $$\mathrm{emb}(t) = \big[\cos(t\,\omega_i),\; \sin(t\,\omega_i)\big], \qquad
#   \omega_i = 10000^{-i/\mathrm{half}}, \quad i = 0, \dots, \mathrm{half}-1
#   \qquad \text{(Vaswani et al. 2017, section 3.5)}$$
#
# ### Write it yourself: `timestep_embedding`
#
# worth it · about 15 minutes
#
# Turn a batch of timesteps [b] into their points on `dim / 2` circles. If you swap cosines and sines, all shapes still
# fit, but no trained network understands the result.


# %% tags=["exercise"]
def timestep_embedding(timesteps: Int[Tensor, "b"], dim: int, max_period: float) -> Float[Tensor, "b dim"]:
    """The time as a point on dim/2 circles of ever slower rotation: first all cosines, then all sines.

        angle_i = t / max_period^(i/half),   i = 0 ... half-1,   half = dim/2

    `dim` is even. (CompVis: ldm/modules/diffusionmodules/util.py, timestep_embedding)
    """
    raise NotImplementedError  # your code here


check.timestep_embedding(timestep_embedding)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# half = dim // 2
# frequencies = torch.exp(-math.log(max_period) * torch.arange(half) / half)
# angles = timesteps[:, None] * frequencies
# return torch.cat([angles.cos(), angles.sin()], dim=-1)
# ```
#
# </details>
#
# The embedding is the same for every network. Two learned Linear layers (`time_embed`) turn it into a vector `emb`, and
# each ResBlock turns `emb` into one number for each of its channels:

# %%
times = torch.arange(1000)
with torch.no_grad():
    embedding = minisd.unet.timestep_embedding(times, config.model_channels)  # [1000 model_channels]
    emb = unet.time_embed(embedding)  # [1000 e]
    shift = unet.input_blocks[1][0].emb_layers(emb)  # [1000 c]: what the first ResBlock makes of it
print(f"t {list(times.shape)} -> embedding {list(embedding.shape)} -> emb {list(emb.shape)} -> {list(shift.shape)}")
panels = {"timestep embedding": embedding.T, "what the first ResBlock adds": shift.T}
viz.matrices(panels, cell=(0.003, 2 / config.model_channels), xlabel="t", ylabel="channel")

# %% [markdown]
# A column is one timestep, a row one channel. Red is positive, blue is negative. Left are the clocks, from fast to
# slow: the cosines above, the sines below. Right is what the first ResBlock adds to all pixels of a channel. It changes
# smoothly with $t$, because the task hardly differs between neighbouring times.
#
# Does the network rely on this, or does it measure the noise by itself? We give it a wrong time.
#
# **Predict, then run.** There is much noise ($t = 900$), and the network gets $t = 0$, "almost no noise". Will its
# $\hat\epsilon$ be too small or too large? And if there is little noise ($t = 100$), and it gets 999?

# %% tags=["hide-input", "hide-output"]
stated = list(range(0, 1000, 50 if full else 333)) + [999]
error, size = {}, {}
for t in (100, 300, 500, 900):
    x_t = schedule.q_sample(x_0, torch.full((count,), t), noise)
    with torch.no_grad():
        answers = [unet(x_t, torch.full((count,), wrong), context) for wrong in stated]
    error[f"true t = {t}"] = (stated, [(eps - noise).square().mean().item() for eps in answers])
    size[f"true t = {t}"] = (stated, [eps.square().mean().sqrt().item() for eps in answers])
    alike = F.cosine_similarity(answers[-1].flatten(1), x_t.flatten(1)).mean()
    print(f"true t = {t}, stated t = 999: cosine between ε̂ and x_t {alike:.3f}")
viz.curves({"size of ε̂ (root mean square)": size, "error": error}, xlabel="stated t", width=4, height=2.8)

# %% [markdown]
# Right: each curve is lowest at the true time, or close to it. So the network *uses* the time that it gets. Left: the
# size of $\hat\epsilon$, which should be 1, like that of the noise.
#
# - **Stated too early**, $\hat\epsilon$ is too large. For an early $t$, the factor of $\epsilon$ in
#   $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$ is small, so the network divides by a small
#   number.
# - **Stated as 999**, $\hat\epsilon$ is nearly $x_t$ itself, because at $t = 999$ nearly all of $x_t$
#   is noise. Where there is little noise, that is too small.
#
# ## The ResBlock
#
# A ResBlock looks at the neighbours of each pixel twice, gets the time in between, and adds the result to its input:

# %%
viz.diagram("res_block")

# %% [markdown]
# $$h = \mathrm{conv}\big(\mathrm{SiLU}(\mathrm{norm}(x))\big) + W\,\mathrm{SiLU}(\mathrm{emb}), \qquad
# \mathrm{out} = \mathrm{skip}(x) + \mathrm{conv}\big(\mathrm{SiLU}(\mathrm{norm}(h))\big)$$
#
# - **GroupNorm** splits the channels into 32 groups and gives each group mean 0 and variance 1. It does so for each
#   picture by itself, because the pictures of a batch have different times and so different amounts of noise.
# - **SiLU** is $x\,\sigma(x)$, a smooth ReLU.
# - **skip** is the identity, or a 1×1 convolution where the number of channels changes. Because the input is *added*,
#   the block only has to learn what to change. The last convolution starts at zero, so that a new block changes nothing
#   (an optional section below shows why).


# %%
def res_block(block, x, emb):
    norm, _, conv = block.in_layers
    h = conv(F.silu(norm(x)))  # [b c_out h w]
    h = h + block.emb_layers[1](F.silu(emb))[:, :, None, None]  # [b c_out 1 1]: one number for all pixels of a channel
    norm, _, _, conv = block.out_layers
    h = conv(F.silu(norm(h)))
    return block.skip_connection(x) + h


block = next(m for m in unet.modules() if isinstance(m, ResBlock) and isinstance(m.skip_connection, nn.Conv2d))
x, e = torch.randn(2, block.in_layers[0].num_channels, 4, 4), emb[[100, 900]]
with torch.no_grad():
    assert torch.allclose(res_block(block, x, e), block(x, e), atol=1e-5)
    print(f"x {list(x.shape)}, emb {list(e.shape)} -> {list(block(x, e).shape)}")

# %% [markdown]
# ## Attention: where the text comes in
#
# A convolution sees neighbours. But the left ear should match the right one, and the word "panda" matters everywhere.
# **Attention** lets every pixel read from anywhere, where to read means to take a weighted mean. Each pixel has a
# **query** $q$: what it looks for. Each thing that can be read has a **key** $k$, by which it is found, and a **value**
# $v$, which is what it gives. Where query and key match, the weight is large:
#
# $$\mathrm{attention}(q, k, v) = \mathrm{softmax}\!\Big(\frac{q\,k^\top}{\sqrt d}\Big)\,v
#   \qquad \text{(Vaswani et al. 2017, eq. 1)}$$
#
# The softmax turns the products into positive weights with sum 1. If the $d$ numbers in $q$ and $k$ have variance 1, a
# product has variance $d$, and nearly all weight would go to one place. The division by $\sqrt d$ prevents that.
#
# There are two kinds, and they differ only in what is read:
#
# - **self-attention** (`attn1`): $q$, $k$ and $v$ all come from the pixels;
# - **cross-attention** (`attn2`): $q$ comes from the pixels, $k$ and $v$ from the context. **This is the only place in
#   the network where the text comes in.**
#
# A **SpatialTransformer** treats the feature map as a sequence of $h \cdot w$ pixels, and applies both. Then a
# feed-forward layer works on each pixel by itself. Each result is added to what was there:

# %%
viz.diagram("spatial_transformer")

# %% [markdown]
# A pixel may want to read one word for its colour and another for its shape. So the channels are cut into parts, the
# [**heads**](../docs/glossary.md). Each head attends with its own weights, and their outputs are put side by side
# again.

# %%
viz.diagram("heads")

# %% [markdown]
# ### Write it yourself: `cross_attention`
#
# essential · about 25 minutes
#
# Project the pixels to queries and the context to keys and values, split the heads, apply the equation, merge the
# heads, and project back. Through this layer a prompt acts on the picture. (To split the heads, use `rearrange` of
# einops, or `unflatten` and `transpose`.)


# %% tags=["exercise"]
def cross_attention(
    x: Float[Tensor, "b n c"],
    context: Float[Tensor, "b m e"],
    to_q: Layer,
    to_k: Layer,
    to_v: Layer,
    to_out: Layer,
    heads: int,
) -> Float[Tensor, "b n c"]:
    """Each pixel asks, each word answers: attention with `heads` heads, queries from x, keys and values from the
    context.

    to_q, to_k, to_v project to heads · d channels, to_out back to c. The heads are split as (h d).
    (CompVis: ldm/modules/attention.py, CrossAttention)
    """
    raise NotImplementedError  # your code here


check.cross_attention(cross_attention)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# q, k, v = to_q(x), to_k(context), to_v(context)
# q, k, v = (rearrange(a, "b n (h d) -> b h n d", h=heads) for a in (q, k, v))
# scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
# out = scores.softmax(dim=-1) @ v
# return to_out(rearrange(out, "b h n d -> b n (h d)"))
# ```
#
# </details>
#
# The whole SpatialTransformer, step by step. The assertion compares it with the class.

# %%
transformer = next(m for m in unet.modules() if isinstance(m, SpatialTransformer))
block = transformer.transformer_blocks[0]
with torch.no_grad():
    x = torch.randn(2, transformer.norm.num_channels, 4, 4)  # [b c h w]
    tokens = transformer.proj_in(transformer.norm(x)).flatten(2).transpose(1, 2)  # [b hw c]: one token for each pixel
    tokens = tokens + block.attn1(block.norm1(tokens))  # pixels read pixels
    tokens = tokens + block.attn2(block.norm2(tokens), context[:2])  # pixels read words
    tokens = tokens + block.ff(block.norm3(tokens))  # each pixel by itself
    out = x + transformer.proj_out(tokens.transpose(1, 2).unflatten(2, (4, 4)))  # back to [b c h w]
    assert torch.allclose(out, transformer(x, context[:2]), atol=1e-4)
print(f"x {list(x.shape)} -> tokens {list(tokens.shape)}, context {list(context[:2].shape)} -> {list(out.shape)}")
print(f"{block.attn2.heads} heads")

# %% [markdown]
# <details><summary>Optional: what the feed-forward layer computes</summary>
#
# It widens each pixel's $c$ numbers to two times $4c$, lets one half decide how much of the other passes (GEGLU;
# [Shazeer 2020](https://arxiv.org/abs/2002.05202)), and comes back to $c$:
# $\mathrm{ff}(x) = W_2\,\big(a \odot \mathrm{GELU}(g)\big)$ with $[a, g] = W_1 x$, without the biases. Attention
# only takes means of what is there. This layer computes something new from it.
#
# </details>
#
# <details><summary>Optional: two bugs that raise no error</summary>
#
# One program takes the softmax over the $n$ pixels (`dim=-2`) instead of the $m$ tokens. Then the weights of a pixel
# sum to $m/n$ in the mean, not to 1. Another forgets to split the heads. Then each pixel has one long query, although
# the layers were trained for several short ones. All shapes fit. So compare with a known result, as the assertion above
# does.
#
# </details>
#
# Does the network need the text? We compare three contexts: that of the right caption, that of the empty prompt ∅, and
# that of another picture's caption.
#
# **Predict, then run.** Where does the right caption help most: where there is little noise, or where there is much?

# %% tags=["hide-output"]
empty = sd.get_learned_conditioning([""]).expand(count, -1, -1)
contexts = {"right caption": context, "empty prompt": empty, "caption of another": context.roll(1, 0)}
held_out = torch.tensor([corpus.rows[i]["split"] != "train" for i in chosen])  # pictures that were not trained on
print(f"{'':31}" + "".join(f"{name:>20}" for name in contexts))
for t in (100, 300, 600, 900):
    measured = [errors(t, context=c) for c in contexts.values()]
    for kind, which in [("trained on", ~held_out), ("held out", held_out)]:
        row = "".join(f"{error[which].mean():20.4f}" for error in measured)
        print(f"t = {t:3}  {f'{int(which.sum())} pictures {kind}':22}{row}")

# %% [markdown]
# On pictures that the network was trained on, the right caption helps. In relation to the error, it helps more the more
# noise there is: at $t = 900$ the error is a third of that with the empty prompt. A wrong caption does harm. On
# held-out pictures, even the right one helps nowhere, and does harm except at the largest $t$. This small network has
# memorised its training pictures: it trusts the caption, and expects another picture than this one.
#
# ## Where it looks: attention maps
#
# `minisd.record_attention` keeps the weights of each cross-attention while a picture is drawn, step by step from much
# noise to none. (Notebook 06 explains the sampler and the guidance scale.) For one token, the weights of all pixels
# form an **attention map**.

# %%
prompt = "fox, noto style"
options = {"steps": 25 if full else 3, "guidance_scale": 4.0, "seed": 0, "sampler": "dpmpp_2m"}
with minisd.record_attention(sd) as maps:
    recorded = sd.txt2img(prompt, **options)

print("tokens ", *maps.tokens[:8], "…")
print("maps   ", list(maps.at().shape), "tokens, height, width; the sum over tokens is 1 at each pixel")
steps = [0, 6, 12, 18, 24] if full else [0, 1, 2]
columns = ["<start>", "fox", "noto", "style", "<end>"]
rows = [torch.stack([maps.at(step=i, layer="middle_block", token=word) for word in columns]) for i in steps]
x0 = sd.decode_first_stage(torch.cat([recorded.trajectory[i].x0 for i in steps]))
viz.attention_maps(rows, list(x0), columns, [f"t = {maps.timesteps[i]}" for i in steps], size=0.8)

# %% [markdown]
# These are the maps of the middle block, in the mean over its heads. In front of each row stands the network's estimate
# of the picture at that step. Dark is 0, yellow is the largest weight in the row, and under each map stands its own
# largest weight. The pixels in the centre look at "fox", those at the edge do not, and this is so from the first step
# on. They look at `<start>` even more (see *Optional: more attention maps*).
#
# ### What a map does not prove
#
# It is tempting to say: here the network reads "fox", so this token makes it a fox. We can test that with contexts in
# which some tokens come from the prompt and all others from the *empty* prompt.
#
# **Predict, then run.** Which of these still draws a fox: only the token "fox"? Only `<end>`? Only the padding that
# fills the prompt up to its full length? Everything but "fox"?

# %% tags=["hide-output"]
whole, nothing = sd.get_learned_conditioning([prompt]), sd.get_learned_conditioning([""])  # [1 m d]
start_noise = minisd.sampling.randn((4, *x_0.shape[1:]), [torch.Generator().manual_seed(seed) for seed in range(4)])


def draw_with(kept):
    """Draw four pictures from a context of which only the tokens `kept` come from the prompt."""
    mixed = nothing.clone()
    mixed[:, kept] = whole[:, kept]
    eps_model = minisd.classifier_free_guidance(sd.apply_model, mixed, nothing, 4.0)
    *_, last = minisd.sampling.dpmpp_2m(eps_model, start_noise, schedule, options["steps"])
    return sd.decode_first_stage(last.x)


length, fox, end = len(maps.tokens), maps.tokens.index("fox"), maps.tokens.index("<end>")
kinds = {
    "the whole prompt": list(range(length)),
    "only “fox”": [fox],
    "only <end>": [end],
    "only the padding": list(range(end + 1, length)),
    "all but “fox”": [i for i in range(length) if i != fox],
    "nothing": [],
}
viz.strip([draw_with(kept) for kept in kinds.values()], labels=list(kinds), size=0.75)

# %% [markdown]
# The token "fox" alone draws about the same as nothing. `<end>` alone draws a fox, and so does the padding. And without
# the token "fox", the fox is as it was. The text encoder makes this possible: in it, each token sees those before it
# (notebook 05). So `<end>` and the padding have read the *whole* prompt, and the UNet has learned to read there.
#
# A map says where a pixel looks. It does not say what it finds there, nor what it does with it. Take a map as a
# question, and change something to get the answer. (An optional section has more maps.)
#
# ## What you know now
#
# - The UNet goes down to see the whole and comes up to name the noise of each number. Its skip connections carry the
#   detail across. The more noise there is, the further it looks.
# - The time becomes points on circles, then a vector, then one number for each channel in each ResBlock.
# - In a SpatialTransformer pixels read pixels, then words. The text comes in only through the keys and values of
#   `attn2`.
# - An attention map shows where a pixel looks, not what it does with what it finds.
#
# **More exercises**, in [`exercises/03_unet.ipynb`](exercises/03_unet.ipynb): `attention` (15 minutes), `split_heads`
# (10), `merge_heads` (5), `geglu` (10), `transformer_block` (15), `spatial_transformer` (15), `res_block` (15),
# `group_norm` (15), `upsample` (5), `unet_forward` (15).
#
# **Next**: the UNet works on latents, never on pixels. [Notebook 04](04_vae.ipynb) shows the network that turns
# pictures into latents and back.

# %% [markdown]
# ## Optional: the UNet of Stable Diffusion
#
# It has 860 million parameters, in the same parts with the same names.

# %%
viz.unet_diagram(outline(UNetConfig(), size=64), "Stable Diffusion v1")


# %% tags=["hide-input"]
def table(blocks):
    lines = [f"{'block':18}{'what is in it':43}{'in':>6}{'out':>6}  {'size':9}{'parameters':>12}   joined with"]
    for block in blocks:
        channels_in, (channels, h, w) = block.shape_in[0], block.shape_out
        row = f"{block.name:18}{' + '.join(block.layers):43}{channels_in:6,}{channels:6,}  {f'{h}×{w}':9}"
        lines.append(f"{row}{block.parameters:12,}   {block.skip}".rstrip())
    print("\n".join(lines))


print("Stable Diffusion v1")
table(outline(UNetConfig(), size=64))
print("\nthe model of this notebook")
table(blocks)

# %% [markdown]
# On the right, block 3 gets 1,280 channels from below and 1,280 from the left, so its ResBlock takes 2,560. Each level
# has one ResBlock more there, because **every** block on the left needs a partner, also the first convolution and the
# Downsamples.
#
# ## Optional: layers that start at zero
#
# The last convolution of each ResBlock, the `proj_out` of each transformer and the very last convolution start at zero.
#
# **Predict, then run.** What does such a fresh UNet answer, and what is its loss? How many of its tensors get a
# gradient that is not zero in the first step, and how many in the third?

# %% tags=["hide-output"]
torch.manual_seed(0)
fresh = UNetModel(config)
optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-3)
parameters = list(fresh.parameters())
for step in range(4):
    t = torch.randint(0, 1000, (count,))
    eps = fresh(schedule.q_sample(x_0, t, noise), t, context)
    loss = (eps - noise).square().mean()
    optimizer.zero_grad()
    loss.backward()
    reached = sum(p.grad.abs().max() > 0 for p in parameters)
    print(f"step {step}: |ε̂| up to {eps.abs().max():.2f}, loss {loss:.3f}, "
          f"a gradient in {reached} of {len(parameters)} tensors")  # fmt: skip
    optimizer.step()

# %% [markdown]
# Exactly 0, with a loss of about 1. Only the last layer gets a gradient, because any change before it would be
# multiplied by zero. After one step it is no longer zero, and the gradient reaches the last layer of each branch and
# what stands beside the branches; after two, everything.
#
# So every block starts as the identity, however deep the network is. (A test that compares two fresh networks therefore
# sees nothing of what is inside the blocks.)
#
# ## Optional: where the parameters are


# %% tags=["hide-input"]
def part(name):
    if name.startswith("time_embed") or "emb_layers" in name:
        return "time: time_embed, emb_layers"
    if ".attn1." in name:
        return "self-attention: attn1"
    if ".attn2." in name:
        return "cross-attention: attn2"
    if ".ff." in name:
        return "feed-forward: ff"
    if "transformer_blocks" in name or ".proj_" in name or name.split(".")[2:4] == ["1", "norm"]:
        return "rest of the transformers"
    if "in_layers" in name or "out_layers" in name or "skip_connection" in name:
        return "ResBlocks, without the time"
    return "first, last, Down, Up"


with torch.device("meta"):  # no memory is used: only to be counted
    networks = {"this model": UNetModel(config), "SD v1": UNetModel(UNetConfig())}
counts = {name: Counter() for name in networks}
for name, network in networks.items():
    for parameter_name, parameter in network.named_parameters():
        counts[name][part(parameter_name)] += parameter.numel()
lines = [f"{'':32}" + "".join(f"{name:>14}{'share':>8}" for name in counts)]
for kind, _ in counts["SD v1"].most_common():
    lines.append(f"{kind:32}" + "".join(f"{c[kind]:14,}{c[kind] / c.total():8.1%}" for c in counts.values()))
print("\n".join([*lines, f"{'all':32}" + "".join(f"{c.total():14,}{'':8}" for c in counts.values()).rstrip()]))

# %% [markdown]
# More than half is in the ResBlocks. The layers through which the text comes in, `attn2`, have only a small share.
#
# ## Optional: what the levels see
#
# The output of each block at one step of the drawing, in the seven channels that vary most over the picture. Red is
# positive, blue negative. Under each map stand its channel and its largest value.

# %% tags=["hide-input"]
names = [block.name for block in blocks]
shown_blocks = [name for name in names if name.startswith(("input", "middle", "output"))]
kept = {name: [] for name in shown_blocks}  # for each block, what came out of it, step by step
hooks = [
    unet.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: kept[name].append(out.detach()))
    for name in shown_blocks
]
again = sd.txt2img(prompt, **options)
for hook in hooks:
    hook.remove()
assert torch.allclose(recorded.pictures, again.pictures, atol=1e-3)  # recording attention changes nothing

step = 15 if full else 1
now = again.trajectory[step]
layers = {}
for name, outputs in kept.items():
    out = outputs[step][1]  # of [without the prompt, with it], the second
    layers[f"{name}\n{'×'.join(map(str, out.shape))}"] = out
print(f"step {step}, t = {now.t}")
viz.feature_maps(layers, channels=7, size=0.8)

# %% tags=["hide-input"]
pictures = torch.cat([sd.decode_first_stage(x) for x in (now.x_t, now.x0, again.trajectory[-1].x)])
viz.strip([pictures], [f"$x_t$, t = {now.t}", r"$\hat x_0$", "result"])

# %% [markdown]
# First, some channels show the head, under noise. At the smallest size, the maps are no pictures any more. Right after
# the Upsample the head is back. In the last block the noise is back, too, because the network has to put it out.
#
# ## Optional: more attention maps
#
# All layers with cross-attention, in the mean over heads and steps. A row is a layer. The table gives the share of each
# token, in the mean over the pixels.

# %% tags=["hide-input"]
words = ["<start>", "fox", ",", "noto", "style", "<end>", "<pad>"]
rows = [torch.stack([maps.at(layer=layer, token=word) for word in words]) for layer in maps.layers]
labels = [layer.split(".transformer")[0] for layer in maps.layers]
lines = [f"{'share of the attention':23}" + "".join(f"{word:>9}" for word in words)]
for label, row in zip(labels, rows, strict=True):
    lines.append(f"{label:23}" + "".join(f"{share:9.1%}" for share in row.mean((1, 2)).tolist()))
even = [maps.tokens.count(word) / len(maps.tokens) for word in words]
print("\n".join([*lines, f"{'if spread evenly':23}" + "".join(f"{share:9.1%}" for share in even)]))
viz.attention_maps(rows, recorded.pictures[0], words, labels, size=0.85)

# %% [markdown]
# Most of the attention goes to the padding, about as much as an even share. In the middle block the centre looks at
# "fox", but even more at `<start>`, whose vector is the same in every prompt. (Perhaps it is a place to look at when
# there is nothing to ask.) Does the middle block show the fox, or
# only the middle of the picture? The same layer, for six prompts:

# %% tags=["hide-input"]
names = ["fox", "rocket", "pizza", "panda", "red apple", "crescent moon"]
with minisd.record_attention(sd) as several:
    six = sd.txt2img([f"{name}, noto style" for name in names], **options)


def middle_map(i, *words):
    return sum(several.at(layer="middle_block", token=word, picture=i) for word in words)


rows = [torch.stack([middle_map(i, "<start>"), middle_map(i, *name.split())]) for i, name in enumerate(names)]
viz.attention_maps(rows, list(six.pictures), ["<start>", "the word"], names, size=0.72)

# %% [markdown]
# The word of *fox*, *rocket* and *pizza* is looked at from the centre, whatever is drawn there. *panda* is hardly
# looked at, *red apple* and *crescent moon* from the edge. So these maps do not outline the thing. In Stable Diffusion,
# with maps of up to 64×64, those of nouns do so quite well ([Tang et al. 2022](https://arxiv.org/abs/2210.04885)), and
# editing the maps edits the picture ([Hertz et al. 2022](https://arxiv.org/abs/2208.01626)).
#
# ## Optional: in the CompVis source, and to try
#
# [The page of this stage](../docs/unet.md) lists the classes with their files. Two traps there: `attention_resolutions:
# [4, 2, 1]` are *downsampling factors*, not sizes of maps. And nothing uses the `image_size: 32` of the YAML; Stable
# Diffusion's latents are 64×64.
#
# - Record a drawing of "panda, noto style". Which layer looks at the word, if the middle block does not?
# - Draw at twice the model's size: `sd.txt2img(prompt, height=…, width=…)`. Why is the result not one larger fox?
