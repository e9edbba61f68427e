# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3 · The UNet: which noise is in it?
#
# [Notebook 02](02_loss.ipynb) reduced everything to one question: given a noisy latent, a time and a text, which noise
# is in it? Here is the network that answers. In Stable Diffusion v1 it has 860 million parameters; in the model that
# ships with minisd, 9 million, with the same parts under the same names.
#
# You will understand
#
# - why it has the shape of a U, and what each level sees;
# - how it is told the time, and what happens if it is told the wrong one;
# - what is in a ResBlock and in a SpatialTransformer, line by line;
# - where the text comes in, what attention maps show, and what they do not show;
# - why some of its layers start at zero;
# - where the parameters are.
#
# About 60 minutes to read; it runs in two minutes or so on a laptop. The modules of this stage are
# [`minisd/unet.py`](../minisd/unet.py) and [`minisd/attention.py`](../minisd/attention.py).
#
# To see this network at work in your browser first, open the stops [The UNet](../docs/play.md#tour=unet), [The time
# embedding](../docs/play.md#tour=time) and [Cross-attention](../docs/play.md#tour=attention) of the guided tour.

# %% tags=["parameters"]
MODE = "full"  # "smoke": every line runs, on so little that the figures mean nothing

# %%
import time
from collections import Counter

import torch
from torch.nn import functional as F

import minisd
from minisd import viz
from minisd.instruments.unet_outline import outline
from minisd.unet import UNetConfig, UNetModel, timestep_embedding

full = MODE == "full"
start = time.time()

sd = minisd.load()  # "emoji": 32×32 pixels, latents of 4×8×8
unet = sd.model.diffusion_model
schedule = sd.schedule

# %% [markdown]
# ## The task
#
# $$\epsilon_\theta(x_t, t, c) \approx \epsilon,
#   \qquad x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\;\epsilon$$
#
# $x_0$ is a latent, $t$ the timestep, $c$ the context: what the text encoder made of the caption, one vector for each
# token. $\epsilon_\theta$ is the network, $\theta$ its parameters. Its answer has the shape of the question: one number
# for each number of the latent. We shall need noisy latents with their captions all the time, so let us make some.

# %%
torch.manual_seed(0)
corpus = minisd.data.sample(size=32)
count = 64 if full else 4
chosen = torch.randperm(len(corpus))[:count].tolist()
captions = [corpus.captions[i] for i in chosen]
context = sd.get_learned_conditioning(captions)  # [b n d]
x_0 = sd.get_first_stage_encoding(sd.encode_first_stage(corpus.batch(chosen)))  # [b 4 8 8]
noise = torch.randn_like(x_0)


@torch.no_grad()
def error(t, told=None, context=context, network=unet):
    """Mean squared error of ε at timestep t, where the network is told that it is `told`."""
    x_t = schedule.q_sample(x_0, torch.full((count,), t), noise)
    told = torch.full((count,), t if told is None else told)
    return (network(x_t, told, context) - noise).square().mean().item()


with torch.no_grad():
    t = torch.full((count,), 500)
    eps = unet(schedule.q_sample(x_0, t, noise), t, context)
print(f"x_t {list(x_0.shape)}, t {list(t.shape)}, context {list(context.shape)}  ->  eps {list(eps.shape)}")
print("error at t = 100, 500, 900:", ", ".join(f"{error(t):.3f}" for t in (100, 500, 900)), "(answering 0: about 1)")

# %% [markdown]
# ## The naive idea: a stack of convolutions
#
# A picture goes in and a picture comes out. So stack convolutions of 3×3, one upon the other, at full size? Each of
# them lets a pixel see one neighbour further. To see from one corner of a 64×64 latent to the other, it would take 63
# of them. And each works on all pixels, with all channels. It sees too little, and costs too much.
#
# The remedy is old. **Halve the map**: then a convolution reaches twice as far and costs a quarter. Halve it again, go
# on at the small size, and come back up. Below, both ways have ten convolutions. Blue is each pixel of a 64×64 latent
# on which the middle one of the answer depends. The cost is counted in multiplications, for one channel.


# %%
def reach(path, side=64):
    """What the middle pixel of the answer depends on [side side], and what the answer costs.

    path: the layers, each a convolution of 3×3. "c": at the size that there is; "d": to half the size; "u": to twice.
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
for name, path in [("a stack", "cccccccccc"), ("a U", "cdddccuuuc")]:
    seen, cost = reach(path)
    panels[f"{name}: {cost:,} multiplications,\nsees {int(seen.sum()):,} of {seen.numel():,} pixels"] = seen
viz.matrices(panels, cell=(0.03, 0.03), xlabel="x", ylabel="y")

# %% [markdown]
# What is saved is spent on channels. At the bottom of Stable Diffusion there are 8×8 pixels of 1,280 channels, each of
# which knows about the whole picture. But there one does not know any more *where exactly* something is, and the noise
# has to be named for each single number. So at each level, **hand across** to the way up what was seen on that level on
# the way down. That is the U (Ronneberger et al. 2015).

# %%
viz.unet_diagram(outline(UNetConfig(), size=64), "Stable Diffusion v1")

# %% [markdown]
# Read it down on the left and up on the right. Each box is a block, with the channels and the size of what comes out of
# it. A *Res* is a ResBlock, which mixes neighbouring pixels and is told the time. A *Transformer* lets all pixels look
# at each other and at the text; blocks with one are blue. Along a dashed line, the output of a block on the left is
# handed across, and joined (`torch.cat`) to what comes from below.
#
# **Predict, then run.** On the right, block 3 puts out 1,280 channels, and so does block 2 below it. How many channels
# does the ResBlock of block 3 take in? And that of block 5?
#
# <details><summary>Answer</summary>
#
# Block 3: 1,280 from below and 1,280 from the left make 2,560. Block 5 takes 1,280 from below, and on its dashed line
# 640 are handed across: 1,920. That is why the ResBlocks on the right are the largest in the network. The table below
# has a column for it.
#
# </details>

# %%
def table(blocks):
    lines = [f"{'block':18}{'what is in it':43}{'in':>6}{'out':>6}  {'size':9}{'parameters':>12}   joined with"]
    for block in blocks:
        channels_in, (channels, h, w) = block.shape_in[0], block.shape_out
        row = f"{block.name:18}{' + '.join(block.layers):43}{channels_in:6,}{channels:6,}  {f'{h}×{w}':9}"
        lines.append(f"{row}{block.parameters:12,}   {block.skip}".rstrip())
    print("\n".join(lines))


table(outline(UNetConfig(), size=64))

# %% [markdown]
# And the one that ships, which draws emoji. Two levels instead of four, one ResBlock a level on the way down instead of
# two, 96 channels to begin with instead of 320, and transformers only at half size:

# %%
config = sd.config.unet
table(outline(config, size=8))
viz.unet_diagram(outline(config, size=8), "emoji")

# %% [markdown]
# The number of blocks follows from the config. On the way down, each level has `num_res_blocks` ResBlocks, and all
# levels but the last a Downsample. On the way up, each level has one ResBlock more. The reason is the joining: there
# must be one block on the right for **every** block on the left, and the first convolution and the Downsamples count,
# too.
#
# The whole forward pass is this. It is the loop of `UNetModel.forward`, written out.


# %%
@torch.no_grad()
def forward(unet, x, timesteps, context):
    emb = unet.time_embed(timestep_embedding(timesteps, unet.config.model_channels))  # [b 384]
    h, skips = x, []
    for block in unet.input_blocks:
        h = block(h, emb, context)
        skips.append(h)  # remember …
    h = unet.middle_block(h, emb, context)
    for block in unet.output_blocks:
        h = torch.cat([h, skips.pop()], dim=1)  # … and join: the last one kept is the first one used
        h = block(h, emb, context)
    return unet.out(h)


t = torch.full((count,), 500)
x_t = schedule.q_sample(x_0, t, noise)
assert torch.equal(forward(unet, x_t, t, context), eps)

# %% [markdown]
# What is handed across, and is it needed? Put zeros in place of what one dashed line carries, and look at the error.
#
# **Predict, then run.** The emoji UNet has four such lines. Which of them can it least do without?
#
# <details><summary>Answer</summary>
#
# The topmost, from `input_blocks.0` to `output_blocks.3`. That first convolution has seen next to nothing; it hands
# across the noisy latent itself, at full size. At late $t$ nearly all of that *is* noise, and the answer is nearly a
# copy of the question. At early $t$ it is not, but there, too, each single number of the noise has to be named.
# (`input_blocks.1` has the full size as well, and is handed to the block below. This network has learned to rely on
# the topmost line.)
#
# </details>

# %%
blocks = outline(config, size=8)
joined = {}  # {who hands across: (to whom, how many channels)}
for below, block in zip(blocks[:-1], blocks[1:], strict=True):
    if block.skip:
        joined[block.skip] = block.name, block.shape_in[0] - below.shape_out[0]


def error_without(name, t):
    """The error at t if `name` is not handed across."""
    receiver, channels = joined[name]

    def cut(_, args):
        h = args[0].clone()
        h[:, -channels:] = 0  # what was joined stands behind what came from below
        return h, *args[1:]

    hook = unet.get_submodule(receiver).register_forward_pre_hook(cut)
    try:
        return error(t)
    finally:
        hook.remove()


lines = [f"{'':9}{'all there':>12}" + "".join(f"{'no ' + name:>19}" for name in joined) + f"{'answer x_t':>14}"]
for t in (100, 300, 600, 900):
    x_t = schedule.q_sample(x_0, torch.full((count,), t), noise)
    copied = (x_t - noise).square().mean()
    errors = "".join(f"{error_without(name, t):19.3f}" for name in joined)
    lines.append(f"t = {t:3}  {error(t):12.3f}{errors}{copied:14.3f}")
print("\n".join(lines))

# %% [markdown]
# First column: nothing is cut. Without the topmost line (`input_blocks.0`), the network answers nearly as badly as one
# that says nothing (which has an error of 1), or worse. The other lines matter less, and most where there is little
# noise. Last column: the error of whoever answers with $x_t$ itself. At $t = 900$ that is nearly right, at $t = 100$
# worse than saying nothing. (All this is about a network that was trained with its lines. One that is trained without
# them might find other ways.)
#
# ### How far does it look?
#
# The U can see everything. Does it? An answer $\epsilon_\theta$ is a guess at the clean latent, too (notebook 01):
#
# $$\hat x_0 = \frac{x_t - \sqrt{1-\bar\alpha_t}\;\epsilon_\theta(x_t, t, c)}{\sqrt{\bar\alpha_t}}$$
#
# So take one pixel of $\hat x_0$, and ask by how much it changes if a number of $x_t$ changes a little, here or there:
# that is a derivative, and autograd has it.
#
# **Predict, then run.** At which $t$ does it look far, and at which only at the pixel itself?
#
# <details><summary>Answer</summary>
#
# The more noise, the further. At $t = 20$ the pixel tells its own value, and there is no need to look elsewhere. At
# $t = 900$ it is drowned in noise, and all others together say more about it than it does. Seeing the whole is what the
# U is for, and at the beginning of a drawing it is all there is to see.
#
# </details>


# %%
def reliance(t, pictures=16, y=3, x=3):
    """How strongly x̂_0 at (y, x) depends on each pixel of x_t [8 8], root mean square over channels and pictures."""
    told = torch.full((len(x_0[:pictures]),), t)
    x_t = schedule.q_sample(x_0[:pictures], told, noise[:pictures]).requires_grad_()
    guess = schedule.predict_start_from_noise(x_t, told, unet(x_t, told, context[:pictures]))
    slopes = [torch.autograd.grad(channel, x_t, retain_graph=True)[0] for channel in guess[:, :, y, x].sum(0)]
    return torch.stack(slopes).square().mean((0, 1, 2)).sqrt()


panels = {}
for t in (20, 100, 300, 900):
    slope = reliance(t)
    own = slope[3, 3] ** 2 / slope.square().sum()
    panels[f"t = {t}\nown pixel: {own:.0%}"] = slope / slope.max()
viz.matrices(panels, cell=(0.17, 0.17), xlabel="x", ylabel="y")

# %% [markdown]
# Dark: what the pixel at (3, 3) of $\hat x_0$ depends on, in shares of the largest. Above each: the share of that pixel
# itself in the sum of the squares. From left to right there is more noise, and the network looks further: at the
# neighbours first, then at everything.
#
# ## What time is it?
#
# At $t = 900$ nearly everything is noise, at $t = 20$ very little. The network needs to know which. How could it?
#
# - **A network for each timestep.** That makes a thousand networks, each trained on a thousandth of the examples,
#   though neighbouring timesteps are nearly the same task.
# - **One more channel that holds the number t.** A number between 0 and 999 beside channels of size 1 is far too large.
#   Divided by 1,000, the difference between 10 and 11 is 0.001: a layer would have to amplify it a thousand times.
# - **Let it see for itself.** It could measure how noisy the latent is, and this even works to a degree. But it costs
#   layers, and the answer is known.
#
# **The real one**: many clocks. Turn $t$ into points on circles, where the first hand turns fast and each further one
# more slowly. The fast hands tell neighbours apart, the slow ones tell early from late. No number is larger than 1.
#
# $$\mathrm{emb}(t) = \big[\cos(t\,\omega_i),\; \sin(t\,\omega_i)\big], \qquad
#   \omega_i = 10000^{-i/\mathrm{half}}, \quad i = 0, \dots, \mathrm{half}-1
#   \qquad \text{(Vaswani et al. 2017, section 3.5)}$$

# %%
half = config.model_channels // 2  # 48 circles
times = torch.arange(1000)
omega = 10_000 ** (-torch.arange(half) / half)  # radians a timestep: from 1 down to about 0.0001
angles = times[:, None] * omega  # t ω_i
embedding = torch.cat([angles.cos(), angles.sin()], dim=1)  # [1000 96], the cosines first
assert torch.allclose(embedding, timestep_embedding(times, 2 * half), atol=1e-3)

with torch.no_grad():
    emb = unet.time_embed(embedding)  # [1000 384]: two Linear layers, learned
    shift = unet.input_blocks[1][0].emb_layers(emb)  # [1000 96]: what the first ResBlock makes of it
print(f"t [1000] -> embedding {list(embedding.shape)} -> emb {list(emb.shape)} -> shift {list(shift.shape)}")
panels = {"timestep embedding": embedding.T, "what the first ResBlock adds": shift.T}
viz.matrices(panels, cell=(0.003, 0.02), xlabel="t", ylabel="channel")

# %% [markdown]
# Red is above zero, blue below. A column is one timestep, a row one channel. Left, the clocks: fast on top, then
# slower; the cosines are the upper half, the sines the lower. Right, what becomes of them in the first ResBlock: a
# number for each channel, that is added to **all** pixels of that channel. It changes smoothly with $t$: of the fast
# clocks hardly anything is left. It is close to zero around $t = 200$, and from there grows to both ends: a little
# towards $t = 0$, and up to 17 towards $t = 999$, where each channel has gone its own way, up (red) or down (blue).
#
# How alike are two embeddings? Here is the cosine of the angle between those of $t$ and of 500.

# %%
similarity = F.cosine_similarity(embedding, embedding[500:501])  # [1000]
learned = F.cosine_similarity(emb, emb[500:501])
viz.curves({"": {"embedding": (times, similarity), "after time_embed": (times, learned)}}, ylabel="cosine", width=4)

# %% [markdown]
# The embedding tells 500 from every other time, even from its neighbours. The two learned layers after it tell early
# from late, and treat neighbours alike, as one should: the task hardly changes between 500 and 520.
#
# Does the network use what it is told, or does it look for itself? Lie to it.
#
# **Predict, then run.** There is much noise ($t = 900$), and it is told that there is none ($t = 0$). Will its answer
# be too small or too large? And the other way round: there is little ($t = 100$), and it is told 999?

# %%
told = list(range(0, 1000, 50 if full else 333)) + [999]
errors, sizes = {}, {}
for t in (100, 300, 500, 900):
    x_t = schedule.q_sample(x_0, torch.full((count,), t), noise)
    with torch.no_grad():
        answers = [unet(x_t, torch.full((count,), wrong), context) for wrong in told]
    errors[f"it is {t}"] = (told, [(eps - noise).square().mean().item() for eps in answers])
    sizes[f"it is {t}"] = (told, [eps.square().mean().sqrt().item() for eps in answers])
    alike = F.cosine_similarity(answers[-1].flatten(1), x_t.flatten(1)).mean()
    print(f"it is {t}, and it is told 999: cosine of the answer and x_t {alike:.3f}")
panels = {"size of the answer (root mean square)": sizes, "error": errors}
viz.curves(panels, xlabel="what it is told", width=4, height=2.8)

# %% [markdown]
# Right: each curve has its lowest point where the network is told the truth, or close by. So it *uses* what it is told.
# Left, the size of the answer, which should be 1, as that of the noise is:
#
# - **Told too early**, it answers too much, up to 1.65. As $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,
#   \epsilon$, whoever believes in a small $\sqrt{1-\bar\alpha_t}$ must divide what looks like noise by a small number.
# - **Told too late**, it answers too little. Told 999, it answers with $x_t$ itself: the cosine is 0.99 or more,
#   whatever $t$ really is. All is noise, says the clock, so the picture is called noise, too.
#
# ## The ResBlock
#
# Two convolutions around the time embedding, and the input added at the end:
#
# $$h = \mathrm{conv}\big(\mathrm{SiLU}(\mathrm{norm}(x))\big) + W\,\mathrm{SiLU}(\mathrm{emb}), \qquad
# \mathrm{out} = \mathrm{skip}(x) + \mathrm{conv}\big(\mathrm{SiLU}(\mathrm{norm}(h))\big)$$
#
# - **GroupNorm**: 32 groups of channels, each set to mean 0 and variance 1, so that no channel drowns the others
#   however deep the network. Each picture is measured by itself: its answer does not depend on the rest of the batch,
#   whose pictures may stand at other times.
# - **SiLU**: $x\,\sigma(x)$, a smooth ReLU.
# - **skip**: the identity, or a 1×1 convolution where the number of channels changes. Because the input is *added*,
#   a block only needs to learn what to change.


# %%
def res_block(block, x, emb):
    norm, _, conv = block.in_layers
    h = conv(F.silu(norm(x)))  # [b c_out h w]
    h = h + block.emb_layers[1](F.silu(emb))[:, :, None, None]  # [b c_out 1 1]: one number for all pixels of a channel
    norm, _, _, conv = block.out_layers
    h = conv(F.silu(norm(h)))
    return block.skip_connection(x) + h


block = unet.input_blocks[3][0]  # 96 channels in, 192 out
x, e = torch.randn(2, 96, 4, 4), emb[[100, 900]]
with torch.no_grad():
    assert torch.allclose(res_block(block, x, e), block(x, e), atol=1e-5)
    print(f"x {list(x.shape)}, emb {list(e.shape)} -> {list(block(x, e).shape)}")

# %% [markdown]
# ## The SpatialTransformer: where the text comes in
#
# A convolution sees neighbours. But the left ear should match the right one, and "panda" should have a say everywhere.
# So at some levels, all pixels may look at all others, and at all words. For this, the map is read as a sequence:
# $h \cdot w$ pixels, each with its $c$ numbers. Three things happen to them, each added to what is there:
#
# 1. **self-attention** (`attn1`): each pixel looks at all pixels;
# 2. **cross-attention** (`attn2`): each pixel looks at all tokens of the prompt;
# 3. **feed-forward** (`ff`): each pixel for itself thinks about what it saw.
#
# To look is to take a weighted mean. Each pixel asks a question (query $q$). Each token has a key $k$, which says what
# it has to offer, and a value $v$, which is what it gives:
#
# $$\mathrm{attention}(q, k, v) = \mathrm{softmax}\!\Big(\frac{q\,k^\top}{\sqrt d}\Big)\,v
#   \qquad \text{(Vaswani et al. 2017, eq. 1)}$$
#
# The softmax makes positive weights of the products, that sum to 1. The $\sqrt d$, $d$ being how many numbers a query
# has, keeps them moderate: if the numbers of $q$ and $k$ have variance 1, their product has variance $d$, and the
# softmax of large numbers is all on one token (Vaswani et al., section 3.2.1).
#
# In cross-attention, $q$ comes from the picture, and $k$ and $v$ from the context. **This is the only place in the
# network where the text comes in.** In self-attention, all three come from the picture.
#
# The feed-forward part widens each pixel's 192 numbers to 2 × 768, lets one half decide how much of the other passes
# (GEGLU; Shazeer 2020), and comes back: $\mathrm{ff}(x) = W_2\,\big(a \odot \mathrm{GELU}(g)\big)$ with
# $[a, g] = W_1 x$.

# %%
def cross_attention(layer, x, context):
    heads = layer.heads
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)  # [b n c], [b m c], [b m c]
    q, k, v = (a.unflatten(-1, (heads, -1)).transpose(1, 2) for a in (q, k, v))  # [b heads n or m d]
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)  # [b heads n m]; sums to 1 over m
    out = (weights @ v).transpose(1, 2).flatten(2)  # [b n c]
    return layer.to_out(out), weights


transformer = unet.input_blocks[3][1]
block = transformer.transformer_blocks[0]
with torch.no_grad():
    x = torch.randn(2, 192, 4, 4)
    tokens = transformer.proj_in(transformer.norm(x)).flatten(2).transpose(1, 2)  # [b n c]: pixels in a row
    tokens = tokens + cross_attention(block.attn1, block.norm1(tokens), block.norm1(tokens))[0]
    seen, weights = cross_attention(block.attn2, block.norm2(tokens), context[:2])
    tokens = tokens + seen
    value, gate = block.ff.net[0].proj(block.norm3(tokens)).chunk(2, dim=-1)  # [b n 768] each
    tokens = tokens + block.ff.net[2](value * F.gelu(gate))
    out = x + transformer.proj_out(tokens.transpose(1, 2).unflatten(2, (4, 4)))
    assert torch.allclose(out, transformer(x, context[:2]), atol=1e-4)
shapes = f"x {list(x.shape)} -> tokens {list(tokens.shape)}"
print(f"{shapes}; context {list(context[:2].shape)} -> weights {list(weights.shape)}; out {list(out.shape)}")

# %% [markdown]
# 16 pixels, 24 tokens, 3 **heads**: the attention is made three times over with other questions, each on 64 of the 192
# channels, and the answers stand side by side.
#
# **Predict.** A program takes the softmax over the pixels (`dim=-2`) instead of the tokens. Another forgets to split
# the heads. Does either stop with an error? What is wrong in each?
#
# <details><summary>Answer</summary>
#
# Neither stops: all shapes are as before. In the first, a pixel's weights do not sum to 1 any more; instead the pixels
# share out each *token* among themselves, and in the mean a pixel gets $\frac{m}{n} = \frac{24}{16}$ of a look. In the
# second, each pixel has one question of 192 numbers where the weights were learned for three of 64, and divides by
# $\sqrt{192}$. So compare with a known answer, as the `assert` above does; shapes tell nothing.
#
# </details>
#
# **Predict.** Self-attention compares each pixel with each. At 64×64 pixels, how many numbers has `weights` in one
# head? And at 8×8? Why is there no transformer at full size in the emoji model?
#
# <details><summary>Answer</summary>
#
# $4096^2 = 16.8$ million at 64×64, and $64^2 = 4096$ at 8×8: the cost grows with the fourth power of the side. (Such a
# table need never be held in memory. `scaled_dot_product_attention` makes the sum piece by piece.) At 8×8 one could
# afford it. The emoji model does without in order to be quick on a CPU. We shall pay for that below, where its
# attention maps have only 4×4 pixels.
#
# </details>
#
# Does the network need the text? Compare three contexts: the right caption, the empty one, and that of another picture.

# %%
empty = sd.get_learned_conditioning([""]).expand(count, -1, -1)
lines = [f"{'':9}{'right caption':>16}{'empty':>10}{'of another picture':>21}"]
for t in (100, 300, 600, 900):
    row = [error(t), error(t, context=empty), error(t, context=context.roll(1, 0))]
    lines.append(f"t = {t:3}  {row[0]:16.4f}{row[1]:10.4f}{row[2]:21.4f}")
print("\n".join(lines))

# %% [markdown]
# Where there is much noise, the caption helps: at $t = 900$ the error is half of what it is without. At $t = 100$ it
# seems to make no difference. But two things cancel here. 15 of these 64 pictures were held out of the training, and
# notebook 02 has measured the two kinds apart: at $t = 100$, the caption takes the loss from 0.26 to 0.20 on pictures
# of the training, and from 0.27 up to 0.35 on held-out ones, where the network believes to know a picture that is not
# this one. A *wrong* caption does harm everywhere: it is believed even where the picture says otherwise.
#
# ## What the levels see
#
# Now draw a fox, and keep what comes out of some blocks at one step in the middle ($t = 399$). (To draw, the network is
# asked twice at each step, without the prompt and with it, and the difference is exaggerated: guidance, notebook 06;
# `dpmpp_2m` is a sampler that is explained there. We look at the answer with the prompt.) Each row shows the seven
# channels that vary most over the picture: red above zero, blue below, and under each its number and its largest
# value.

# %%
options = {"steps": 25 if full else 3, "guidance_scale": 4.0, "seed": 0, "sampler": "dpmpp_2m"}
prompt = "fox, noto style"
shown_blocks = ["input_blocks.0", "input_blocks.1", "input_blocks.3", "middle_block"]
shown_blocks += ["output_blocks.1", "output_blocks.3"]
kept = {name: [] for name in shown_blocks}  # for each block, what came out of it, step by step
hooks = [
    unet.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: kept[name].append(out.detach()))
    for name in shown_blocks
]
drawing = sd.txt2img(prompt, **options)
for hook in hooks:
    hook.remove()

middle = 15 if full else 1
now = drawing.trajectory[middle]
layers = {}
for name, outputs in kept.items():
    out = outputs[middle][1]  # of [unconditional, conditional], the second
    layers[f"{name}\n{'×'.join(map(str, out.shape))}"] = out
print(f"step {middle}, t = {now.t}")
viz.feature_maps(layers, channels=7, size=0.8)

# %%
pictures = torch.cat([sd.decode_first_stage(x) for x in (now.x_t, now.x0, drawing.trajectory[-1].x)])
viz.strip([pictures], [f"$x_t$, t = {now.t}", r"$\hat x_0$", "result"])

# %% [markdown]
# - `input_blocks.0` and `1`: in some channels one can make out the head (red or blue), under noise. They see little
#   more than what goes in.
# - `input_blocks.3` and the middle: 4×4 pixels. These are not pictures any more. What they know about each sixteenth
#   of the picture is spread over 192 channels.
# - `output_blocks.1`: back at 8×8, and the head is back, with less noise, in larger numbers. This is what was concluded
#   at the bottom.
# - `output_blocks.3`: the noise is back too. That is right: the noise is what the network has to put out, and we saw
#   that it comes along the topmost dashed line.
#
# ## Where it looks: attention maps
#
# `minisd.record_attention` keeps the weights of each cross-attention while a picture is drawn. The picture is the same
# as without.

# %%
with minisd.record_attention(sd) as maps:
    recorded = sd.txt2img(prompt, **options)

assert torch.allclose(recorded.pictures, drawing.pictures, atol=1e-3)
print("tokens ", *maps.tokens[:8], "…")
print("layers ", "\n        ".join(maps.layers))
print("steps  ", len(maps.timesteps), "from t =", maps.timesteps[0], "to", maps.timesteps[-1])
print("maps   ", list(maps.at().shape), "tokens, height, width; the sum over tokens is 1 at each pixel")

# %% [markdown]
# The prompt has six tokens: a start, four pieces, an end. The remaining 18 are end tokens again, to fill it up to 24
# (they are printed as `<pad>`, and their maps are added up below). Here is how much each of the 4×4 pixels looks at
# each token, in the mean over heads and steps. A row is a layer. The colours go from dark (0) to yellow (the largest in
# the row), and the largest weight of each map stands under it.

# %%
words = ["<start>", "fox", ",", "noto", "style", "<end>", "<pad>"]
rows = [torch.stack([maps.at(layer=layer, token=word) for word in words]) for layer in maps.layers]
labels = [layer.split(".transformer")[0] for layer in maps.layers]
viz.attention_maps(rows, recorded.pictures[0], words, labels, size=0.85)

# %%
lines = [f"{'share of all looks':20}" + "".join(f"{word:>9}" for word in words)]
for label, row in zip(labels, rows, strict=True):
    lines.append(f"{label:20}" + "".join(f"{share:9.1%}" for share in row.mean((1, 2)).tolist()))
even = [maps.tokens.count(word) / len(maps.tokens) for word in words]
print("\n".join([*lines, f"{'if spread evenly':20}" + "".join(f"{share:9.1%}" for share in even)]))

# %% [markdown]
# - **Most looks go to the padding**, 67 to 90% of them. There are 18 pads of 24 tokens, so 75% would be an even share.
# - **The words get little**: "fox" at most 5.1%, where an even share would be 4.2%. In the first layer it gets none.
# - **One layer does what one hopes for**: in the middle block, the pixels in the centre look at "fox", up to 0.25, and
#   those at the edge do not. (They look at `<start>` even more. It comes before all words and its vector is the same in
#   every prompt, so it says nothing about this one. Perhaps it is a place to look at when there is nothing to ask.)
# - In the other layers the maps of "fox" show no fox. In the last, it is the *lower edge* that looks at the word.
#
# And step by step, in the middle block:

# %%
steps = [0, 6, 12, 18, 24] if full else [0, 1, 2]
columns = ["<start>", "fox", "noto", "style", "<end>"]
rows = [torch.stack([maps.at(step=i, layer="middle_block", token=word) for word in columns]) for i in steps]
x0 = sd.decode_first_stage(torch.cat([recorded.trajectory[i].x0 for i in steps]))
viz.attention_maps(rows, list(x0), columns, [f"t = {maps.timesteps[i]}" for i in steps], size=0.8)

# %% [markdown]
# In front of each row is the picture that the network has in mind at that step. The map of "fox" changes little: that
# the centre looks at it is decided at the first step, out of nearly pure noise. `<start>` gets less towards the end.
#
# So is it the fox that is seen there, or only the middle of the picture?
#
# **Predict, then run.** The same layer, for six prompts. Whose word is looked at, and from where?

# %%
names = ["fox", "rocket", "pizza", "panda", "red apple", "crescent moon"]
with minisd.record_attention(sd) as several:
    six = sd.txt2img([f"{name}, noto style" for name in names], **options)


def middle_map(i, *words):
    return sum(several.at(layer="middle_block", token=word, picture=i) for word in words)


rows = [torch.stack([middle_map(i, "<start>"), middle_map(i, *name.split())]) for i, name in enumerate(names)]
viz.attention_maps(rows, list(six.pictures), ["<start>", "the word"], names, size=0.72)

# %% [markdown]
# The word of *fox*, *rocket* and *pizza* is looked at from the same four pixels, whatever is drawn there. *panda* is
# hardly looked at, *red apple* and *crescent moon* from the edge. The maps tell the middle from the edge,
# and one prompt from another. They do not outline the thing: at 4×4 there is hardly a thing to outline, and as most
# emoji fill the middle, the network need not see a fox to know where to ask. One prompt would not have told us that.
#
# ## What attention maps do not show
#
# It is tempting to say: this is where the network reads "fox", so that token makes it a fox. That can be tested. Build
# contexts in which some tokens come from the prompt, and all others from the **empty** prompt, and draw with them.
#
# **Predict, then run.** Which of them still draw a fox: only the token "fox"? Only the `<end>`? Only the pads? All but
# "fox"?

# %%
whole = sd.get_learned_conditioning([prompt])  # [1 24 192]
nothing = sd.get_learned_conditioning([""])
noise_at_start = minisd.sampling.randn((4, 4, 8, 8), [torch.Generator().manual_seed(seed) for seed in range(4)])


def draw_with(kept):
    """Draw four pictures from a context of which only the tokens `kept` come from the prompt."""
    mixed = nothing.clone()
    mixed[:, kept] = whole[:, kept]
    eps_model = minisd.classifier_free_guidance(sd.apply_model, mixed, nothing, 4.0)
    *_, last = minisd.sampling.dpmpp_2m(eps_model, noise_at_start, schedule, options["steps"])
    return sd.decode_first_stage(last.x)


end = maps.tokens.index("<end>")
kinds = {
    "the whole prompt": list(range(24)),
    "only “fox”": [1],
    "only <end>": [end],
    "only the pads": list(range(end + 1, 24)),
    "all but “fox”": [0, *range(2, 24)],
    "nothing": [],
}
viz.strip([draw_with(kept) for kept in kinds.values()], labels=list(kinds), size=0.75)

# %% [markdown]
# <details><summary>Answer, and why</summary>
#
# The token "fox" alone draws no fox, but about the same as nothing. The end token alone draws one, and so do the pads.
# And without the token "fox", the fox is the same as ever.
#
# The text encoder makes it possible. It is causal: each token sees those before it (notebook 05). The vector at the
# place of "fox" knows nothing of the style. The vectors of the end token and of the pads, which come after, have read
# *everything*, and CLIP was trained so that its end token sums up the sentence. The UNet has learned to read there.
# (Not only there: notebook 05 repeats this with 32 prompts.)
#
# </details>
#
# So a map says where a pixel looks. It does not say what it finds there, nor what it does with it. In Stable
# Diffusion, with 16 layers and maps of up to 64×64, the maps of nouns do outline the things quite well, and to edit the
# maps does edit the picture (Hertz et al. 2022, "Prompt-to-Prompt"; Tang et al. 2022, "What the DAAM"). In this small
# model they do not. Take a map as a question, and change something to get the answer.
#
# ## Layers that start at zero
#
# Before training, some layers are set to zero on purpose: the last convolution of each ResBlock, the `proj_out` of each
# transformer, and the very last convolution of the network.
#
# **Predict, then run.** What does a fresh UNet answer? What is its loss? How many of its parameters get a gradient that
# is not zero, in the first training step?

# %%
torch.manual_seed(0)
fresh = UNetModel(config)
zero = [name for name, module in fresh.named_modules() if "weight" in module._parameters and not module.weight.any()]
print(f"{len(zero)} layers are zero:", ", ".join(zero[:4]), "…,", zero[-1])

optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-3)
parameters, lines = list(fresh.parameters()), []
for step in range(4):
    t = torch.randint(0, 1000, (count,))
    eps = fresh(schedule.q_sample(x_0, t, noise), t, context)
    loss = (eps - noise).square().mean()
    optimizer.zero_grad()
    loss.backward()
    reached = sum(p.grad.abs().max() > 0 for p in parameters)
    answer = f"answers of at most {eps.abs().max():.2f}, loss {loss:.3f}"
    lines.append(f"step {step}: {answer}, a gradient in {reached} of {len(parameters)} tensors")
    optimizer.step()
print("\n".join(lines))

# %% [markdown]
# <details><summary>Answer</summary>
#
# It answers exactly 0, and the loss is the mean square of the noise, about 1. That is an honest start: "I know nothing"
# instead of loud nonsense. Only the last layer has a gradient, in 2 tensors, its weight and its bias. All that stands
# before it has none, since its changes would be multiplied by zero.
#
# After one step the last layer is not zero any more. The gradient reaches the last layer of each branch, and what has
# no zero behind it: the skip connections, the first convolution, Down and Up. After two steps it reaches everything.
# The zeros open from the back to the front.
#
# </details>
#
# Each block ends in a zero, and its input is added. So each starts as the identity, and a deep network starts as a
# simple one. (For your tests: at its start, a network is half switched off. Two that differ inside a block give the
# same answer. The tests of minisd fill all layers with random numbers before they compare anything.)
#
# ## Where the parameters are

# %%
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
    networks = {"emoji": UNetModel(config), "SD v1": UNetModel(UNetConfig())}
counts = {name: Counter() for name in networks}
for name, network in networks.items():
    for parameter_name, parameter in network.named_parameters():
        counts[name][part(parameter_name)] += parameter.numel()
lines = [f"{'':32}" + "".join(f"{name:>14}{'share':>8}" for name in counts)]
for kind, _ in counts["SD v1"].most_common():
    lines.append(f"{kind:32}" + "".join(f"{c[kind]:14,}{c[kind] / c.total():8.1%}" for c in counts.values()))
print("\n".join([*lines, f"{'all':32}" + "".join(f"{c.total():14,}{'':8}" for c in counts.values()).rstrip()]))

# %% [markdown]
# More than half is in the ResBlocks. The text comes in by a twentieth of the network, or a little more.

# %%
print(f"This notebook took {time.time() - start:.0f} s.")

# %% [markdown]
# ## Recap
#
# - The UNet goes down to see the whole and comes up to name the noise of each number. What was seen on the way down is
#   handed across. The topmost line is the one it cannot do without. The more noise there is, the further it looks.
# - The time is told as points on many circles, goes through two Linear layers, and is added in each ResBlock, the same
#   for all pixels.
# - A ResBlock: norm, SiLU, convolution, time, norm, SiLU, convolution, plus the input.
# - A SpatialTransformer: pixels look at pixels, pixels look at words, each pixel thinks. The text comes in only by
#   the keys and values of `attn2`.
# - An attention map says where a pixel looks. What is read there is another question: change it, and see.
# - The last layer of each branch starts at zero, so that each block starts as the identity.
#
# ## In the CompVis source
#
# | here | there | file |
# |---|---|---|
# | `UNetModel` | `UNetModel` | `ldm/modules/diffusionmodules/openaimodel.py` |
# | `ResBlock`, `Downsample`, `Upsample` | the same | `ldm/modules/diffusionmodules/openaimodel.py` |
# | `TimestepEmbedSequential` | the same | `ldm/modules/diffusionmodules/openaimodel.py` |
# | `AttentionBlock` (UNets without text) | the same | `ldm/modules/diffusionmodules/openaimodel.py` |
# | `timestep_embedding`, `zero_module` | the same | `ldm/modules/diffusionmodules/util.py` |
# | `SpatialTransformer`, `BasicTransformerBlock` | the same | `ldm/modules/attention.py` |
# | `CrossAttention`, `FeedForward`, `GEGLU` | the same | `ldm/modules/attention.py` |
# | `UNetConfig` | `unet_config` | `configs/stable-diffusion/v1-inference.yaml` |
# | `outline`, `record_attention` | have no counterpart | |
#
# Two traps for whoever reads there: `attention_resolutions: [4, 2, 1]` are *downsampling factors*, not sizes of
# maps. And `image_size: 32` of the YAML is not used by anything; Stable Diffusion's latents are 64×64.
#
# ## Try it
#
# - Record a drawing of "panda, noto style". Which layer looks at the word, if the middle block does not?
# - `outline(UNetConfig(num_res_blocks=3))`: how many blocks are there, and how many parameters?
# - Draw with `sd.txt2img(prompt, height=64, width=64)`. The network has no size built in. Why is the picture
#   no larger fox?
# - The exercises of this stage are in [`exercises/03_unet.ipynb`](exercises/03_unet.ipynb), among them
#   `timestep_embedding`, `cross_attention`, `res_block` and `unet_forward`; a checker names the mistake.
#
# Next, in [notebook 04](04_vae.ipynb): where the latents come from. Before this one: [notebook 02](02_loss.ipynb).
# The map of it all is in [notebook 00](00_start_here.ipynb).
