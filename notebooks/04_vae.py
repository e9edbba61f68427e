# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4 · The autoencoder: from pictures to latents and back
#
# Stable Diffusion never adds noise to a picture. It works on **latents**: small stacks of numbers, from which another
# network, the autoencoder, can draw the picture again. This is that network.
#
# At the end you can
#
# - say what diffusion saves by working on latents;
# - explain why a plain autoencoder is not enough, and what its variational form changes;
# - sample a latent in a way that lets gradients through;
# - compute the scale factor (0.18215 in Stable Diffusion), and recognise a picture for which it was forgotten;
# - say what an autoencoder loses, and why its pictures tend to be blurred.
#
# About 45 minutes, with two exercises; it runs in about 3 minutes on a laptop.
#
# Before: [notebook 03](03_unet.ipynb), the network that works on latents. After: [notebook 05](05_clip.ipynb), how a
# prompt becomes numbers. The modules are [`minisd/vae.py`](../minisd/vae.py) and [`minisd/vq.py`](../minisd/vq.py). To
# change a latent in your browser and see it decoded, open the stop [Decoding](../docs/play.md#tour=decoding) of the
# guided tour.

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
from dataclasses import asdict

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

import minisd
from minisd import viz
from minisd.coursework import check
from minisd.data import photograph, sample
from minisd.vae import AttnBlock, DiagonalGaussianDistribution, Downsample, ResnetBlock, Upsample
from minisd.vq import VectorQuantizer, VQConfig, VQModel

full = MODE == "full"

# %% [markdown]
# ## Where we are

# %%
viz.pipeline("vae")

# %% [markdown]
# The encoder comes first in training, the decoder last in drawing. These are their inputs and outputs in the traces of
# a training step and of a drawing:

# %% tags=["hide-input"]
sd = minisd.load()
vae, unet = sd.first_stage_model, sd.model.diffusion_model
size = sd.config.image_size  # side of the training pictures
corpus = sample(size=size)
fox = corpus.batch([corpus.captions.index("fox, noto style")])[0]  # [3 H W]
step = minisd.trace(sd, "fox, noto style", image=fox)
drawing = minisd.trace(sd, "fox, noto style", steps=20, guidance_scale=4.0)
print("training", *[step[symbol] for symbol in ("x", "E(x)", "z")], sep="\n")
print("\ndrawing", *[drawing[symbol] for symbol in ("z", "z/s", "x")], sep="\n")

# %% [markdown]
# ## Why latents at all?
#
# How much work is one denoising step? Nearly all of it is in two kinds of layers. On a map of $n \times n$ places, a
# **convolution** does the same work at each place, so its cost grows as $n^2$. **Self-attention** compares each place
# with each other place, $n^2 \cdot n^2 = n^4$.
#
# **Predict, then run.** Stable Diffusion draws 512×512 pixels from a latent of 64×64. By which factor does that make
# a convolution cheaper, and by which self-attention?

# %% tags=["hide-output"]
for name, side in [("pixels", 512), ("latents", 64)]:
    print(f"{name:8} {side:3}×{side:<3}  {side**2:9,} places, {side**4:18,} pairs of places")
print(f"factor   {512**2 // 64**2} for a convolution, {512**4 // 64**4:,} for attention")
pixels, latents = 512 * 512 * 3, 64 * 64 * 4
print(f"numbers  {pixels:,} in pixels, {latents:,} in latents: {pixels // latents} times fewer")

# %% [markdown]
# In pixels, one head of one attention layer would compare 69 billion pairs. The side of the picture divided by that of
# the latent is called $f$, so $f = 8$ here. Our small model does the same with $f = 4$.
#
# ## Encode and decode
#
# An **encoder** $E$ turns the picture $x$ into a latent, and a **decoder** $D$ turns the latent into a picture
# $\hat x$. Training makes $\hat x$ like $x$:
#
# $$L = \lVert x - \hat x \rVert^2, \qquad \hat x = D(E(x))$$

# %%
viz.diagram("autoencoder")

# %% [markdown]
# Both are built from the ResBlocks of notebook 03, without the time, and with self-attention at the smallest size. One
# thing is missing: there are no skip connections. When a picture is drawn, there is no encoder beside the decoder, so
# everything has to be in the latent.
#
# Here is the autoencoder of our model, on held-out pictures. (A few of these it has seen: see its model card.) Its
# encoder returns a distribution, for a reason that follows; for now we take the mean.

# %%
held_out = [i for i, row in enumerate(corpus.rows) if row["split"] != "train"]
x_test = corpus.batch(held_out[:: 2 if full else 20])  # [n 3 H W]
with torch.no_grad():
    test_posterior = vae.encode(x_test)
few = [i % len(x_test) for i in (11, 44, 55, 77, 20, 33)]
with torch.no_grad():
    restored = vae.decode(test_posterior.mode()[few])
viz.strip([x_test[few], restored], labels=["held-out picture", "encoded and decoded"], size=0.9)

# %% [markdown]
# And this is what latents look like:

# %%
wanted = ["fox", "watermelon", "rocket"]
x = corpus.batch([corpus.captions.index(f"{name}, noto style") for name in wanted])
with torch.no_grad():
    posterior = vae.encode(x)
print(f"x {list(x.shape)} -> mean of the posterior {list(posterior.mean.shape)}")
viz.maps(posterior.mean, [f"channel {i}" for i in range(4)], wanted, pictures=x)

# %% [markdown]
# A latent is still a kind of picture, with four channels instead of red, green and blue. Shapes stay where they are. No
# channel is a colour, though: each mixes brightness, hue and edges as encoder and decoder agreed among themselves.
#
# ## The holes in a plain autoencoder
#
# This is all that is needed to *store* pictures. But we want to *make* pictures: the UNet will give the decoder a
# **new** latent, one that came from no picture. What is drawn then?
#
# To see it, we take a latent that fits on paper: two numbers. The data are 80 emoji of 16×16 pixels, encoder and
# decoder are three linear layers each. For now `kl_weight` is 0, so this is a plain autoencoder.

# %% tags=["hide-input"]
toy_names = """red heart, yellow heart, green heart, purple heart, broken heart, red circle, blue circle, full moon,
crescent moon, sun, star, cloud, droplet, fire, balloon, red apple, green apple, lemon, pear, tomato, banana,
strawberry, watermelon, peach, cherries, ghost, skull, alien, grinning face, winking face, neutral face, angry face,
clown face, fox, panda, koala, frog, pig face, cat face, lion"""
toy_names = {" ".join(name.split()) for name in toy_names.split(",")}
small = sample(size=16)
toy = [i for i, r in enumerate(small.rows) if r["concept"] in toy_names and r["style"] in ("noto", "fluent")]
x_toy = small.batch(toy)  # [80 3 16 16]


def layers(*widths):
    pairs = [(nn.Linear(a, b), nn.SiLU()) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*[layer for pair in pairs for layer in pair][:-1])


def toy_pictures(decoder, latents):
    """Latents [... 2] to pictures [... 3 16 16]."""
    return decoder(latents).detach().unflatten(-1, (3, 16, 16))


def rms(x):
    return x.square().mean().sqrt().item()


def panel(decoder, points, centre, spread, side=9):
    """The plane between centre ± 2 spread, as viz.plane wants it."""
    u = torch.linspace(-2, 2, side)
    grid = torch.stack(torch.meshgrid(u, -u, indexing="xy"), dim=-1)  # [side side 2], the first row on top
    (x0, y0), (x1, y1) = (centre - 2 * spread).tolist(), (centre + 2 * spread).tolist()
    return toy_pictures(decoder, centre + spread * grid), (x0, x1, y0, y1), points


# %%
def train_toy(kl_weight, steps=2000 if full else 5):
    torch.manual_seed(0)
    encoder, decoder = layers(768, 128, 128, 4), layers(2, 128, 128, 768)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()])
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        moments = encoder(x_toy.flatten(1))[:, :, None, None]  # [80 4 1 1]: two means and two log variances
        posterior = DiagonalGaussianDistribution(moments)
        latents = posterior.sample() if kl_weight else posterior.mode()  # [80 2 1 1]
        x_hat = decoder(latents.flatten(1)).view_as(x_toy)
        # Σ (x - x̂)² + kl_weight · KL, divided by the numbers in a picture
        loss = (x_toy - x_hat).square().mean() + kl_weight * posterior.kl().mean() / x_toy[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return decoder, posterior.mean.flatten(1).detach(), posterior


plain_decoder, plain, plain_posterior = train_toy(kl_weight=0)  # plain: the latents [80 2]
viz.plane({"a plain autoencoder": panel(plain_decoder, plain, plain.mean(0), plain.std(0))}, width=2.88)

# %% [markdown]
# Each dot is where the encoder puts one picture. The little pictures are what the decoder draws at each place.
#
# At the dots the pictures are good, because the loss measures only them. Elsewhere there are **holes**: smears and,
# outside of the dots, whole regions of garbage. The dots also lie on a scale of their own. For diffusion both are bad.
# A sampler ends *near* a latent and never exactly on it, so the decoder must forgive small errors. And it starts from
# noise with a standard deviation of 1, so the latents should have that scale.
#
# ## The remedy: a variational autoencoder
#
# In a [**variational autoencoder**](../docs/glossary.md) ([Kingma & Welling 2013](https://arxiv.org/abs/1312.6114)),
# the encoder does not return a point but a Gaussian, the **posterior**. The decoder gets a *sample* of it. So it learns
# that a whole neighbourhood means the same picture.
#
# $$q(\tilde z \mid x) = \mathcal N\big(\mu(x),\, \mathrm{diag}\,\sigma^2(x)\big)$$
#
# ($\tilde z$ is the autoencoder's own latent. We keep $z$ for the scaled one that the UNet gets; see below.)
#
# By itself, this would not last: the encoder would make $\sigma$ tiny and spread the means far apart, and the holes
# would be back. So each picture pays for the distance of its Gaussian from $\mathcal N(0, I)$, measured by the
# [KL divergence](../docs/glossary.md) of notebook 01, with a weight $\lambda$:
#
# $$L = \lVert x - D(\tilde z) \rVert^2 + \lambda\, \mathrm{KL}\big(q(\tilde z \mid x) \,\Vert\, \mathcal N(0, I)\big),
#   \qquad \tilde z \sim q(\tilde z \mid x)$$
#
# <details><summary>Optional: what this has to do with the likelihood</summary>
#
# With $\lambda = 1$ this is, up to a constant, the bound on the likelihood (ELBO), if the pixels have Gaussian noise of
# variance ½: then $-\log p(x \mid \tilde z) = \lVert x - D(\tilde z) \rVert^2 + \text{const}$.
#
# </details>
#
# We train the same network on the same data again, with $\lambda = 1$.
#
# **Predict, then run.** What will change in the picture of the plane: the scale of the dots, the holes, the error at
# the dots?

# %% tags=["hide-output"]
decoder, variational, toy_posterior = train_toy(kl_weight=1)
print(f"{'':13}{'std of the latents':>20}{'error at the dots':>20}{'random latent':>16}{'latent off by 0.1 std':>24}")
for name, D, codes in [("plain", plain_decoder, plain), ("variational", decoder, variational)]:
    torch.manual_seed(0)
    drawn = toy_pictures(D, codes)
    random = toy_pictures(D, codes.mean(0) + codes.std(0) * torch.randn(1000, 2))
    nearest = torch.cdist(random.flatten(1), x_toy.flatten(1)).min(1).values.mean() / x_toy[0].numel() ** 0.5
    moved = rms(toy_pictures(D, codes + 0.1 * codes.std(0) * torch.randn_like(codes)) - drawn)
    print(f"{name:13}{codes.std():20.1f}{rms(drawn - x_toy):20.3f}{nearest:16.2f}{moved:24.2f}")
viz.plane({"a variational autoencoder": panel(decoder, variational, torch.zeros(2), torch.ones(2))}, width=2.88)

# %% [markdown]
# The same 80 pictures now lie around 0, on a scale near 1. Every place draws something like a picture, and
# neighbours are alike: hearts beside hearts, faces beside faces. The table measures it. *Random latent*: how far its
# picture is from the nearest real one. *Latent off by 0.1 std*: how much the picture changes. Both are less than half
# as large. The price is a larger error at the dots.
#
# ### A gradient through a random number
#
# $\tilde z$ is random. How can a gradient pass through it to the encoder? Take the randomness from outside:
#
# $$\tilde z = \mu + \sigma\,\epsilon, \qquad \epsilon \sim \mathcal N(0, I)
#   \qquad \text{(Kingma \& Welling, section 2.4)}$$
#
# Now $\tilde z$ is an ordinary function of $\mu$ and $\sigma$, and $\epsilon$ is an input like any other. This is the
# [reparametrisation trick](../docs/glossary.md). The network outputs $\log \sigma^2$, which may be any number, so
# $\sigma = \exp(\tfrac12 \log\sigma^2)$. If you forget the ½, you use the variance as a standard deviation. The shapes
# are the same, so nothing warns you.
#
# ### Write it yourself: `sample_posterior`
#
# essential · about 15 minutes
#
# The encoder's output `moments` holds $\mu$ and $\log\sigma^2$ one after the other along the channels. Turn it, and
# noise, into a sample. (The docstring writes $z$, as the papers do, for what is $\tilde z$ here.)


# %% tags=["exercise"]
def sample_posterior(
    moments: Float[Tensor, "b two_c h w"], noise: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """A sample of q(z | x) = N(mean, diag(exp(logvar))), by the reparametrisation trick: z = mean + std · ε.

    `moments` is what the encoder returns: along the channels first the mean, then the log variance, which is clamped to
    [-30, 20]. `noise` is ε ~ N(0, I). Gradients flow to both. (Kingma & Welling 2013, section 2.4; CompVis:
    distributions.py)
    """
    raise NotImplementedError  # your code here


check.sample_posterior(sample_posterior)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# mean, logvar = moments.chunk(2, dim=1)
# logvar = logvar.clamp(-30.0, 20.0)
# return mean + torch.exp(0.5 * logvar) * noise
# ```
#
# </details>
#
# ### What the KL term costs
#
# For Gaussians there is a closed form. For one number of the latent it is
#
# $$\mathrm{KL} = \tfrac12\big(\mu^2 + \sigma^2 - 1 - \log \sigma^2\big) \quad \text{nats}
#   \qquad \text{(Kingma \& Welling, appendix B)}$$
#
# and these are summed over the latent. A mean away from 0 costs, and so does a small $\sigma$. Only $\mu = 0$,
# $\sigma = 1$ costs nothing, but then the latent says nothing about the picture.
#
# ## How variational is ours?
#
# In Stable Diffusion $\lambda$ is only $10^{-6}$, and in our model it is small, too. Good reconstructions come first.
#
# **Predict, then run.** Decode the posterior's mean, then a sample of the posterior: can one see the difference? And
# what does the decoder draw from random numbers that have each channel's mean and standard deviation?

# %% tags=["hide-output"]
torch.manual_seed(0)
mean = test_posterior.mean.mean((0, 2, 3), keepdim=True)  # [1 4 1 1]
std = test_posterior.mean.std((0, 2, 3), keepdim=True)
with torch.no_grad():
    from_mean, from_sample = vae.decode(posterior.mean), vae.decode(posterior.sample())
    from_nothing = vae.decode(mean + std * torch.randn_like(posterior.mean))
print(f"std of the posterior: {posterior.std.mean():.3f}, std of the means: {posterior.mean.std():.3f}")
print(f"pictures from the mean and from a sample differ by {rms(from_sample - from_mean):.4f} (root mean square)")
viz.strip([x, from_mean, from_sample, from_nothing], labels=["picture", "mean", "sample", "random"], size=0.9)

# %% [markdown]
# The sample changes nothing that one could see, because the encoder is sure of its numbers to about a hundredth. Random
# latents give coloured scraps. A weak KL term does not turn the latents into $\mathcal N(0, I)$. It makes them smooth
# *around* pictures, and no more. Which latents are pictures, the UNet has to learn.
#
# ### Why are the pictures blurred?
#
# A latent has far fewer numbers than a picture, so it can't say everything. If the loss compares pixels, the best that
# the decoder can do about the rest is to draw the middle of all that is possible, and that is a blur. So CompVis trains
# with two further losses. A **perceptual loss** ([LPIPS](../docs/glossary.md),
# [Zhang et al. 2018](https://arxiv.org/abs/1801.03924)) compares the features that a network trained on photographs
# finds in both pictures, which is closer to what people see. And a **discriminator**, a network that learns to
# tell real pictures from decoded ones, makes the decoder draw sharp detail, even if it is not the right one.
#
# <details><summary>Optional: a better decoder for a finished model</summary>
#
# The decoder alone can be trained further. The encoder stays, so the latents stay, and the UNet still fits. Stability
# AI did so for Stable Diffusion v1 (`sd-vae-ft-mse`), and we for our model, with a perceptual distance, and noise on
# the latents because a sampler ends near a latent and not on it.
# [Training](../docs/training.md#a-better-decoder-for-a-finished-model) has the command and pictures.
#
# </details>
#
# ## The scale factor: where 0.18215 comes from
#
# Diffusion adds noise of variance 1 and expects data of variance 1 (notebook 01). The latents $\tilde z$ have another
# variance. So they are multiplied by a **scale factor**, one number for the whole model:
#
# $$z = \text{scale factor} \cdot \tilde z, \qquad \text{scale factor} = \frac{1}{\mathrm{std}(\tilde z)}
#   \qquad \text{(Rombach et al. 2022, appendix G)}$$
#
# This $z$ is the $x_0$ of notebooks 01 to 03: it is noised in training, and the sampler draws it. Before decoding, it
# is divided by the factor again.
#
# ### Write it yourself: `scale_factor`
#
# worth it · about 5 minutes
#
# One number for all latents together: over pictures, channels and pixels. With the wrong one, a model draws the right
# things in the wrong colours.


# %% tags=["exercise"]
def scale_factor(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """What latents are multiplied by to have a standard deviation of 1 (0.18215 in Stable Diffusion).

    One number for all, measured over pictures, channels and pixels together.
    (Rombach et al. 2022, appendix G; CompVis: LatentDiffusion.on_train_batch_start)
    """
    raise NotImplementedError  # your code here


check.scale_factor(scale_factor)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# return 1 / latents.std()
# ```
#
# </details>
#
# Stable Diffusion's latents have a standard deviation of about $1 / 0.18215 = 5.49$ (R. Rombach says so in
# [issue 437 of diffusers](https://github.com/huggingface/diffusers/issues/437)). Now ours:

# %%
raw = test_posterior.sample(generator=torch.Generator().manual_seed(0))  # [n 4 h w], not scaled
print(f"std of the latents of held-out pictures {raw.std():.3f}, so the factor is {1 / raw.std():.4f}")
print(f"in the model, measured on its training pictures: {sd.scale_factor:.4f}")
print("by channel, after scaling:  mean", [f"{m:.2f}" for m in (sd.scale_factor * raw).mean((0, 2, 3))],
      " std", [f"{s:.2f}" for s in (sd.scale_factor * raw).std((0, 2, 3))])  # fmt: skip

# %% [markdown]
# The two differ a little, because they were measured on different pictures. That does no harm, as long as training and
# drawing use the same one. It is **one** factor for all channels, so the single channels are not alike after it; only
# the variance of all numbers together is about 1.
#
# Now suppose that somebody forgets it after drawing. The sampler draws $z$, with a standard deviation of about 1, and
# the decoder gets it as it is, instead of $z$ divided by the factor.
#
# **Predict, then run.** What will the pictures look like? And with Stable Diffusion's factor, where the latents would
# be 5.5 times too small?

# %% tags=["hide-output"]
prompt, options = "a fox, noto style", dict(steps=20 if full else 2, guidance_scale=4.0, seed=3, num_images=5)
*_, last = sd.sample(prompt, **options)  # the generator under txt2img
z = last.x
with torch.no_grad():
    right = vae.decode(z / sd.scale_factor)
    rows = [right, vae.decode(z), vae.decode(0.18215 * z / sd.scale_factor)]
    assert torch.equal(right, sd.decode_first_stage(z))
print(f"z {list(z.shape)}, std {z.std():.2f}; divided by the factor: {(z / sd.scale_factor).std():.2f}")
viz.strip(rows, labels=["divided by the factor", "forgotten", "forgotten, if it were 0.18215"])

# %% [markdown]
# In the second row the decoder gets latents that are too small. The foxes get blotches, and pink in what should be
# white. In the third row little is left but stripes. If a model of yours draws the right things in the wrong colours,
# look here first. In minisd, `get_first_stage_encoding` multiplies by the factor and `decode_first_stage` divides by
# it. If you call `vae.encode` and `vae.decode` yourself, you have to apply it.
#
# ## What is lost
#
# Our autoencoder has seen emoji and nothing else. But it is a convolutional network, so it takes any picture whose
# sides are divisible by $f$.
#
# **Predict, then run.** What will it make of a photograph of a cat?

# %% tags=["hide-output"]
cat = photograph(2 * size)  # [1 3 H W]
with torch.no_grad():
    raw_cat = vae.encode(cat).mode()
    cat_hat = vae.decode(raw_cat)
print(f"photograph {list(cat.shape)}, latent {list(raw_cat.shape)}")
viz.strip([torch.cat([cat, cat_hat])], ["photograph", "encoded and decoded"], size=1.92)

# %% [markdown]
# It paints the cat with a broad brush: fur turns into smooth strokes, and a thin frame appears at the edges, where
# emoji are white. An autoencoder knows what it was trained on.
#
# Stable Diffusion's has seen photographs, and is far better at them. But with 48 times fewer numbers it, too, must lose
# something: small letters, the faces of a crowd, fine texture. **What the first stage can't draw, no prompt will bring
# back.** To see the best that a model can draw, encode a picture and decode it again.
#
# ## What you know now
#
# - A latent makes convolutions cheaper by $f^2$ and attention by $f^4$.
# - A plain autoencoder leaves holes between its latents. A variational one returns a mean and a variance, samples
#   $\mu + \sigma \epsilon$, and pays $\tfrac12(\mu^2 + \sigma^2 - 1 - \log\sigma^2)$ for each number.
# - In Stable Diffusion the KL term is tiny. It makes the latents smooth *around* pictures. Which latents are pictures
#   is for the UNet to learn.
# - The scale factor is $1 / \mathrm{std}(\tilde z)$. Forget it, and the colours are wrong.
# - What the latent does not say, the decoder draws as a blur.
#
# **More exercises**, in [`exercises/04_vae.ipynb`](exercises/04_vae.ipynb): `kl` (15 minutes), `vae_loss` (15),
# `vae_downsample` (10), and for the optional section on codebooks `nearest_code` (15), `straight_through` (10),
# `vq_loss` (15).
#
# **Next**: pictures have become numbers. The other input of the UNet is the prompt. [Notebook 05](05_clip.ipynb) turns
# it into the context that cross-attention reads.

# %% [markdown]
# ## Optional: the cost, measured
#
# The processor time of one call:


# %% tags=["hide-input"]
@torch.no_grad()
def milliseconds(f, *inputs):
    """Processor time of one call: the smallest of some."""
    times = []
    for _ in range(4 if full else 1):
        before = time.process_time()
        f(*inputs)
        times.append(1000 * (time.process_time() - before))
    return min(times[-3:])


convolution = nn.Conv2d(96, 96, 3, padding=1)
context = sd.get_learned_conditioning([""])
sides = [8, 16, 32, 64] if full else [8, 16]
cost = {"convolution": [], "self-attention": [], "whole UNet": []}
for n in sides:
    q = torch.randn(1, 1, n * n, 96)  # [b heads n·n c]
    cost["convolution"].append(milliseconds(convolution, torch.randn(1, 96, n, n)))
    cost["self-attention"].append(milliseconds(minisd.attention.attention, q, q, q))
    cost["whole UNet"].append(milliseconds(unet, torch.randn(1, 4, n, n), torch.tensor([500]), context))
print("side of the map   " + "".join(f"{n:>10}" for n in sides))
for name, row in cost.items():
    print(f"{name:15} ms" + "".join(f"{ms:10.2f}" for ms in row))
lines = {name: (torch.tensor(sides).log2(), row) for name, row in cost.items()}
viz.curves({"one call": lines}, "log2 of the side (3: 8×8, 6: 64×64)", "ms", log=["one call"], width=4.6, height=2.9)

# %% [markdown]
# Where the side doubles, the convolution costs about 4 times as much, attention in the end 16 times. The UNet has its
# attention on smaller maps, so for a while its convolutions set the price.
#
# ## Optional: does it take a network? PCA
#
# The best *linear* code for pictures is principal component analysis (PCA): encode
# $B^\top (x - \mu)$, decode $\mu + B \tilde z$, where the columns of $B$ are the directions in which the data vary
# most. With equally many numbers, we compare the VAE with PCA of patches ($f \times f$ pixels become 4
# numbers) and of whole pictures. The **peak signal-to-noise ratio** in decibels measures the error: 10 dB more are a
# tenth of the squared error.
#
# $$\mathrm{PSNR} = 10 \log_{10} \frac{2^2}{\mathrm{mean}\,(x - \hat x)^2}
#   \qquad \text{(the values span 2, from } -1 \text{ to } 1 \text{)}$$

# %% tags=["hide-input"]
training = [i for i, row in enumerate(corpus.rows) if row["split"] == "train"]
x_train = corpus.batch(training if full else training[:300])  # [n 3 H W]
f = vae.config.downsampling


def psnr(x, x_hat):
    return (10 * torch.log10(4 / (x - x_hat.clamp(-1, 1)).square().mean())).item()


def patches(x):
    return rearrange(x, "b c (h i) (w j) -> b h w (c i j)", i=f, j=f)


def principal_components(rows, k):
    """Mean [d] and the k directions of largest variance [d k] of rows [n d]."""
    mean = rows.mean(0)
    _, _, B = torch.svd_lowrank(rows - mean, q=k, niter=3)
    return mean, B


torch.manual_seed(0)
patch_mean, patch_B = principal_components(patches(x_train).flatten(0, 2), 4)
picture_mean, picture_B = principal_components(x_train.flatten(1), min(4 * (size // f) ** 2, len(x_train)))


def pca_patches(x):
    x_hat = patch_mean + (patches(x) - patch_mean) @ patch_B @ patch_B.T  # encode to 4 numbers a patch, decode
    return rearrange(x_hat, "b h w (c i j) -> b c (h i) (w j)", i=f, j=f, c=3)


def pca_pictures(x):
    return (picture_mean + (x.flatten(1) - picture_mean) @ picture_B @ picture_B.T).view_as(x)


@torch.no_grad()
def autoencode(x):
    return vae.decode(vae.encode(x).mode())


methods = {"PCA of patches": pca_patches, "PCA of pictures": pca_pictures, "the VAE": autoencode}
print(f"                     training   held out  (PSNR in dB; {len(x_train)} and {len(x_test)} pictures)")
for name, method in methods.items():
    print(f"{name:19}   {psnr(x_train[::8], method(x_train[::8])):6.1f}     {psnr(x_test, method(x_test)):6.1f}")
for name in ("PCA of patches", "the VAE"):
    print(f"photograph, {name:14} {psnr(cat, methods[name](cat)):5.1f} dB")
quarters = rearrange(cat, "1 c (i h) (j w) -> (i j) c h w", i=2, j=2)  # a size that the VAE knows
print(f"photograph, the VAE on its four quarters, one by one: {psnr(quarters, autoencode(quarters)):.1f} dB")
shown = x_test[few[:4]]
rows = [shown, *(method(shown) for method in methods.values())]
notes = [[f"{psnr(a, b):.1f} dB" for a, b in zip(shown, row, strict=True)] for row in rows[1:]]
viz.strip(rows, labels=["held-out picture", *methods], notes=[[], *notes])

# %% [markdown]
# PCA of patches draws a mosaic. PCA of pictures does well on what it was made from, and worse on new pictures, because
# a thousand pictures are too few to fix that many directions. The VAE is the best on new emoji. On the photograph PCA
# of patches wins by far: a mean colour and a slope describe fur as well as anything, while the VAE knows only emoji.
#
# ## Optional: what the encoder is sure of

# %% tags=["hide-input"]
kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)  # the formula above, [3 4 h w]
assert torch.allclose(kl.sum((1, 2, 3)), posterior.kl(), rtol=1e-4)
precision = 0.5 * (posterior.var - 1 - posterior.logvar)  # what is left of it if the means were 0
for name, nats, sure in zip(wanted, kl.sum((1, 2, 3)), precision.sum((1, 2, 3)), strict=True):
    print(f"{name:10}  KL {nats:6.0f} nats = {nats / 0.6931:5.0f} bits, of these for small σ {sure / nats:.0%} "
          f"(its pixels have {8 * x[0].numel():,} bits)")  # fmt: skip
rows = [posterior.mean[0], posterior.std[0], kl[0]]
viz.maps(rows, [f"channel {i}" for i in range(4)], ["mean", "std", "KL (nats)"])

# %% tags=["hide-input"]
torch.manual_seed(0)
side = size // f
with torch.no_grad():
    some = vae.encode(x_test[:16])
    drawn, change = vae.decode(some.mean), torch.zeros(side, side)
    for i in range(side):
        for j in range(side):
            off = some.mean.clone()
            off[:, :, i, j] += 0.2 * torch.randn(len(off), 4)
            change[i, j] = rms(vae.decode(off) - drawn)
panels = {"the posterior's std": some.std.mean((0, 1)), "change of the picture,\nif this place is wrong by 0.2": change}
viz.matrices(panels, cell=(1.6 / side, 1.6 / side))

# %% [markdown]
# The KL is a size: how many bits this latent says beyond what $\mathcal N(0, I)$ would have said. Unusual numbers cost
# most, but most of the bits are the price of being sure: a small $\sigma$ costs about $-\log\sigma - \tfrac12$,
# whatever the mean. The encoder is least sure at the border and in the corners. The last figure shows that an error
# does less harm there.
#
# ## Optional: all layers, and a bug that moves the picture

# %% tags=["hide-input"]
ends = ["encoder.conv_in", "encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in", "decoder.conv_out"]
passed, hooks = [], []  # what each layer put out, in the order in which they ran


def note(label):
    return lambda _, args, out: passed.append(f"{label}{list(out.shape)}")


for name, layer in vae.named_modules():
    if name in ends or isinstance(layer, (ResnetBlock, AttnBlock, Downsample, Upsample)):
        hooks.append(layer.register_forward_hook(note(f"{name:26}{type(layer).__name__:13}")))
with torch.no_grad():
    vae.decode(vae.encode(x[:1]).mode())
for hook in hooks:
    hook.remove()
half = 1 + [row.startswith("quant_conv") for row in passed].index(True)
print("\n".join([*passed[:half], "", *passed[half:]]))

# %% [markdown]
# Above the blank line is the encoder. It ends in 4 means and 4 log variances. Below is the decoder.
#
# A Downsample is a 3×3 convolution of stride 2. Here zeros are padded on the right and below only, in the UNet all
# round. With `padding=1` here, too, the weights load and all shapes agree. But each convolution then looks one pixel
# further up and to the left than it was trained to, and the picture comes back displaced.
#
# ## Optional: a codebook instead of a Gaussian
#
# **Vector quantisation** (VQ) keeps latents in order in another way. Each pixel of the encoder's output $h$ is replaced
# by the nearest vector of a list, the **codebook**. So a picture becomes a table of whole numbers.
#
# $$e_k, \qquad k = \arg\min_j \lVert h - e_j \rVert^2 \qquad \text{(van den Oord et al. 2017, eq. 1 and 2)}$$
#
# The choice of the nearest has no gradient, so VQ passes it **straight through**: forwards it uses the code, backwards
# the gradient goes to $h$ as if nothing had happened. With $\mathrm{sg}$ for "no gradient through here", this is
# $h + \mathrm{sg}[e_k - h]$. Here it is on a line, with the codes $-1$, $0$ and $1$. $h$ starts at 0.1, and the decoder
# would like to get 1.

# %% tags=["hide-input"]
quantizer = VectorQuantizer(n_embed=3, embed_dim=1, legacy=False)
quantizer.embedding.weight.data = torch.tensor([[-1.0], [0.0], [1.0]])


def push(straight_through, steps=40):
    h, path = torch.full((1, 1, 1, 1), 0.1, requires_grad=True), []
    for _ in range(steps):
        quantized = quantizer(h)
        code = quantized.z if straight_through else quantizer.lookup(quantized.indices)
        path.append((h.item(), code.item()))
        commitment = (h - code.detach()).square().mean()
        loss = (code - 1).square().mean() + 0.25 * commitment
        (gradient,) = torch.autograd.grad(loss, h)
        h = (h - 0.02 * gradient).detach().requires_grad_()
    return torch.tensor(path).T  # [2 steps]


panels = {}
for title, on in [("straight-through", True), ("without it", False)]:
    vector, code = push(on)
    panels[title] = {"$h$": (torch.arange(40), vector), "its code": (torch.arange(40), code)}
viz.curves(panels, "step", width=3.4, height=2.3)

# %% [markdown]
# Left: $h$ is pushed up. Nothing seems to happen until $h$ is past the middle and the next code is nearer. Right: no
# gradient reaches $h$ from the code. Only the second term of the quantiser's loss is left, the **commitment**, which
# pulls $h$ onto the wrong code:
#
# $$\lVert \mathrm{sg}[h] - e_k \rVert^2 + \beta\, \lVert h - \mathrm{sg}[e_k] \rVert^2
#   \qquad \text{(van den Oord et al., eq. 3)}$$
#
# The first term moves the codes to the vectors, the second keeps the vectors near their codes. To compare KL and VQ, we
# put a codebook of 256 codes into our VAE, and train on for a short time.


# %% tags=["hide-input"]
def with_codebook(vae, n_embed=256):
    """A VQModel that starts with the weights of an AutoencoderKL."""
    model = VQModel(VQConfig(**asdict(vae.config) | {"double_z": False}, n_embed=n_embed, legacy=False))
    weights = {name: w.clone() for name, w in vae.state_dict().items()}
    # The encoder outputs 8 numbers a pixel, and quant_conv makes 4 means and 4 log variances of them. Both are linear:
    # fold the half of quant_conv that makes the means into the convolution before it.
    to_mean, shift = weights["quant_conv.weight"][:4, :, 0, 0], weights["quant_conv.bias"][:4]
    last, bias = weights["encoder.conv_out.weight"], weights["encoder.conv_out.bias"]
    weights["encoder.conv_out.weight"] = torch.einsum("oi,icyx->ocyx", to_mean, last)
    weights["encoder.conv_out.bias"] = to_mean @ bias + shift
    weights["quant_conv.weight"] = torch.eye(4)[:, :, None, None]
    weights["quant_conv.bias"] = torch.zeros(4)
    model.load_state_dict(weights, strict=False)  # all but the codebook
    return model


@torch.no_grad()
def revive(model, x, recent):
    """Set each code that was not chosen recently onto a random vector of the batch."""
    h = model._encode(x).movedim(1, -1).flatten(0, -2)  # the encoder's output, before the codebook: [b·h·w 4]
    codebook = model.quantize.embedding.weight
    dead = model.quantize.usage(torch.cat(recent)) == 0 if recent else torch.ones(len(codebook), dtype=torch.bool)
    codebook[dead] = h[torch.randint(len(h), (int(dead.sum()),))]


steps, batch = (150, 4) if full else (4, 2)


def train_vq(revive):
    torch.manual_seed(0)
    model = with_codebook(vae)
    codebook = model.quantize.embedding.weight  # [256 4]
    networks = [p for p in model.parameters() if p is not codebook]
    optimizer = torch.optim.AdamW([{"params": networks, "lr": 5e-4}, {"params": [codebook], "lr": 1e-2}])
    chosen, log = [], []  # the codes that were chosen, step by step
    for step in range(steps):
        x = x_train[torch.randint(len(x_train), (batch,))]
        if revive and step % 10 == 0 and step <= steps * 0.7:
            revive(model, x, chosen[-10:])
        x_hat, quantizer_loss = model(x)  # reconstruction, and the two terms above
        error = (x - x_hat).abs().mean()
        optimizer.zero_grad()
        (error + quantizer_loss).backward()
        optimizer.step()

        chosen.append(model.encode(x).indices)  # [batch h w]
        recent = torch.cat(chosen[-10:])
        in_use = (model.quantize.usage(recent) > 0).sum().item()
        log.append((error.item(), in_use, model.quantize.perplexity(recent).item()))
    return model, torch.tensor(log).T


collapsed, collapsed_log = train_vq(revive=None)
revived, revived_log = train_vq(revive)
for name, log in [("plain", collapsed_log), ("revived", revived_log)]:
    print(f"{name:8} after {steps} steps: {log[1, -1]:.0f} of 256 codes in use; perplexity {log[2, -1]:.1f}")
panels = {}
for i, title in enumerate(["mean absolute error", "codes in use, last 10 steps", "perplexity, last 10 steps"]):
    panels[title] = {
        "plain": (torch.arange(steps), collapsed_log[i]),
        "dead codes revived": (torch.arange(steps), revived_log[i]),
    }
viz.curves(panels, "step", width=2.5, height=2.2)

# %% [markdown]
# **Perplexity** is $\exp(-\sum_k p_k \log p_k)$, where $p_k$ is the share of code $k$: 256 if all are chosen equally
# often, 1 if it is always the same one.
#
# The plain run shows **codebook collapse**. All codes start near 0. A few happen to be the nearest to many vectors, get
# gradients, and move to where the vectors are, so they are chosen again. The others get no gradient: they are dead. In
# the other run, every 10 steps each code that was not chosen lately is set onto a random vector of the batch.

# %% tags=["hide-input"]
with torch.no_grad():
    results = {"KL": autoencode(x_test)}
    for name, model in [("VQ, collapsed", collapsed), ("VQ, revived", revived)]:
        results[name] = torch.cat([model(part)[0] for part in x_test.split(64)])
places = revived.encode(x_test[:1]).indices[0].numel()
print(f"held-out pictures:  {'KL':14} {psnr(x_test, results['KL']):.1f} dB, "
      f"{test_posterior.kl().mean() / 0.6931:.0f} bits a picture")  # fmt: skip
for name in ("VQ, collapsed", "VQ, revived"):
    print(f"{'':20}{name:14} {psnr(x_test, results[name]):.1f} dB, at most {8 * places} bits a picture")
viz.strip([shown, *(x_hat[few[:4]] for x_hat in results.values())], labels=["held-out picture", *results])

# %% [markdown]
# A collapsed codebook has too few codes for the colours. With the revived one most of them come back. KL still draws
# better, but its latents also carry far more bits. Rombach et al. tried both, and Stable Diffusion took KL. With VQ
# they added noise to $h$, moved the result to its code before decoding (`VQModelInterface`), and left the scale factor
# out, because they found a variance near 1 (appendix G).
#
# ## Optional: training without the scale factor
#
# Without the factor, the data have variance $1/\text{factor}^2$ instead of 1. So the curve of the log SNR (notebook 01)
# moves up by a constant:
#
# $$\log \mathrm{SNR} = \log\frac{\bar\alpha_t}{1 - \bar\alpha_t} - 2 \log(\text{factor})$$

# %% tags=["hide-input"]
schedule = sd.schedule
t = torch.arange(schedule.timesteps)
factors = {"scaled": 1.0, "ours, unscaled": sd.scale_factor, "Stable Diffusion's, unscaled": 0.18215}
snr, left = {}, {}
for name, factor in factors.items():
    snr[name] = (t, schedule.log_snr(t) - 2 * torch.log(torch.tensor(factor)))
    left[name] = (t, schedule.sqrt_alphas_cumprod / factor)
    crossing = (snr[name][1] < 0).int().argmax()
    print(f"{name:29} more noise than signal from t = {crossing}; std of the signal that is left at the end: "
          f"{left[name][1][-1]:.3f}")  # fmt: skip
viz.curves({"log SNR": snr, "std of the signal that is left": left}, log=["std of the signal that is left"], width=4.2)

# %% tags=["hide-input"]
times = [0, 350, 700, 999]
noise = torch.randn(1, *raw.shape[1:], generator=torch.Generator().manual_seed(0)).expand(len(times), -1, -1, -1)
unit = (sd.scale_factor * posterior.mean[:1]).expand_as(noise)  # latents of std 1
rows = []
for factor in factors.values():
    x_t = schedule.q_sample(unit / factor, torch.tensor(times), noise)  # the data have a std of 1 / factor
    alpha_bar = schedule.alphas_cumprod[times][:, None, None, None]
    rows.append(sd.decode_first_stage(x_t / (alpha_bar / factor**2 + 1 - alpha_bar).sqrt()))  # at std 1 again
viz.strip(rows, [f"t = {t}" for t in times], list(factors))

# %% [markdown]
# The figure decodes noisy latents of a fox, each brought to a standard deviation of 1, so that the rows differ only in
# their share of noise. In the last row the fox is still there at $t = 700$. A network that is trained like this gets
# easy questions at most $t$, and never sees what a drawing begins with: nothing but noise.
#
# How well is the factor known? How does the KL weight change the size of the latents?

# %% tags=["hide-input"]
with torch.no_grad():
    raw_train = torch.cat([vae.encode(part).sample() for part in x_train.split(64)])
for count in (4, 16, 64):
    measured = [1 / raw_train[torch.randint(len(raw_train), (count,))].std().item() for _ in range(100)]
    print(f"on one batch of {count:2}, 100 times: the factor is between {min(measured):.3f} and {max(measured):.3f}")
_, _, between = train_toy(kl_weight=0.01)
for weight, p in [(0, plain_posterior), (0.01, between), (1, toy_posterior)]:
    print(f"the toy's latents with a KL weight of {weight}: std {p.mean.std():.1f}")

# %% [markdown]
# CompVis's code can measure the factor on the first batch (`scale_by_std`), so only roughly. And the weaker the KL
# term, the larger the latents: those of Stable Diffusion are large.
#
# ## Optional: between two pictures

# %% tags=["hide-input"]
weights = torch.linspace(0, 1, 5)[:, None, None, None]  # [5 1 1 1]
one, other = (corpus.batch([corpus.captions.index(f"{name}, noto style")]) for name in ("fox", "panda"))
with torch.no_grad():
    ends = vae.encode(one).mode(), vae.encode(other).mode()
    in_latents = vae.decode(torch.lerp(*ends, weights))
pair = [[small.captions[i] for i in toy].index(f"{name}, noto style") for name in ("fox", "panda")]
in_toy = toy_pictures(decoder, torch.lerp(variational[pair[0]], variational[pair[1]], weights.flatten()[:, None]))
viz.strip([torch.lerp(one, other, weights), in_latents, in_toy], [f"{w:.2f}" for w in weights.flatten()],
          ["in pixels", "in latents", "in the toy's two numbers"])  # fmt: skip

# %% [markdown]
# In pixels, one head shines through the other. In latents it is not so different, because each place changes by itself.
# Only in the toy, where two numbers mean the whole picture, is every stop *something*. The smaller a latent, the more
# it means and the less it keeps. Stable Diffusion's is large: a compressed picture, not an idea.
#
# ## Optional: a large picture in tiles
#
# To save memory, a large latent can be decoded in **tiles** (`vae.enable_tiling`). But norms and attention see only
# their tile, and a convolution finds zeros beyond its edge. So tiles overlap, and each fades into the next.

# %% tags=["hide-input"]
with torch.no_grad():
    pictures = {"whole": cat_hat}
    for side, overlap in [(size, 0.0), (size // 2, 0.25), (size, 0.25), (3 * size // 2, 0.25)]:
        vae.enable_tiling(tile_size=side, overlap=overlap)
        pictures[f"tiles of {side},\noverlap {overlap:.0%}"] = vae.decode(raw_cat)
    vae.disable_tiling()
for name, picture in pictures.items():
    across = (picture[..., 1:] - picture[..., :-1]).abs().mean((0, 1, 2))  # from each column to the next
    seam = across[size - 1] / across.median()  # in the middle, where two tiles meet if they do not overlap
    from_whole, from_cat = rms(picture - cat_hat), rms(picture.clamp(-1, 1) - cat)
    print(f"{name.replace(chr(10), ' '):26} from the whole {from_whole:.2f}, from the photograph {from_cat:.2f}; "
          f"the step in the middle is {seam:.1f} times the usual one")  # fmt: skip
viz.strip([torch.cat(list(pictures.values()))], list(pictures), size=1.28)

# %% [markdown]
# Without overlap there is a bright cross. It comes from the zeros: to this decoder they mean that a *picture* ends
# here, and where emoji end they are white. With overlap the cross is gone, though the colours are not those of the
# whole. Tiles of half the training size are the farthest from the photograph, so tiles should not be smaller than the
# pictures of the training (256×256 for Stable Diffusion, the default).
#
# ## Optional: in the CompVis source, and to try
#
# [The page of this stage](../docs/vae.md) lists the classes with their files. One trap: `VectorQuantizer2` of
# taming-transformers has `legacy=True` by default, with $\beta$ on the other term.
#
# - Train the toy with `kl_weight=30`. What does the plane look like, and why? (Posterior collapse.)
# - Set `padding_mode = "replicate"` on each `nn.Conv2d` of `vae.decoder` that pads. What becomes of the cross, and of
#   the cat?
