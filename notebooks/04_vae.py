# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4 · The autoencoder: small pictures that mean large ones
#
# Stable Diffusion never noises a picture, and never denoises one. It works on a **latent**: a small stack of numbers
# from which another network, the autoencoder, can draw the picture again. This notebook is about that network.
#
# You will understand
#
# - why diffusion moved from pixels to latents, and what that saves;
# - why an autoencoder that only reconstructs leaves holes in its latent space, and what fills them;
# - what the encoder says (a mean and a variance), how one samples from that and still gets gradients, and what the KL
#   term costs;
# - the other way: a codebook (VQ), how it collapses, and how to repair it;
# - where 0.18215 comes from, and what happens without it;
# - what an autoencoder loses, on a photograph and at the seams of tiles.
#
# About 60 minutes to read; it runs in two or three minutes on a laptop. You need $\bar\alpha_t$ and the
# signal-to-noise ratio from [notebook 01](01_noising.ipynb). The modules of this stage are
# [`minisd/vae.py`](../minisd/vae.py) and [`minisd/vq.py`](../minisd/vq.py).
#
# To change a latent in your browser and see it decoded, open the stop [Decoding](../docs/play.md#tour=decoding) of the
# guided tour.

# %% tags=["parameters"]
MODE = "full"  # "smoke": every line runs, on so little that the figures mean nothing

# %%
import time
from dataclasses import asdict

import torch
from einops import rearrange
from torch import nn

import minisd
from minisd import viz
from minisd.data import photograph, sample
from minisd.vae import AttnBlock, DiagonalGaussianDistribution, Downsample, ResnetBlock, Upsample
from minisd.vq import VectorQuantizer, VQConfig, VQModel

full = MODE == "full"
start = time.time()

# %% [markdown]
# ## Why a latent at all?
#
# How much work is a denoising step? Nearly all of it is in two kinds of layers. Let a map have $n \times n$ places.
#
# - A **convolution** does the same work at each place: $n^2$.
# - **Self-attention** compares each place with each other place: $n^2 \cdot n^2 = n^4$.
#
# We measure both, and the UNet that ships, which is made of both. What is measured is the processor's time: it does
# not count the time in which other programs had the processor.


# %%
@torch.no_grad()
def milliseconds(f, *inputs):
    """Processor time of one call: the smallest of some."""
    times = []
    for _ in range(4 if full else 1):
        before = time.process_time()
        f(*inputs)
        times.append(1000 * (time.process_time() - before))
    return min(times[-3:])


sd = minisd.load()
unet, vae = sd.model.diffusion_model, sd.first_stage_model
convolution = nn.Conv2d(96, 96, 3, padding=1)
context = torch.zeros(1, 24, 192)  # as for a prompt (notebook 05)

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
viz.curves({"one call": lines}, "log2 of the side (3: 8x8, 6: 64x64)", "ms", log=["one call"], width=4.6, height=2.9)

# %% [markdown]
# What to see: each step to the right doubles the side. The convolution then costs about 4 times as much, attention in
# the end 16 times. (A very small call has a price of its own.) The UNet does its attention
# at half the side, so that for a while the convolutions set its price.
#
# **Predict, then run.** Stable Diffusion draws 512×512 pixels from a latent of 64×64. By which factor is a
# convolution cheaper, by which is attention?
#
# <details><summary>Answer</summary>
#
# $8^2 = 64$ times and $8^4 = 4096$ times. In pixels, one attention layer would compare 262,144 places with each other:
# 69 billion numbers, for one head of one layer. So DDPM-like models in pixels either stay small, or have no attention
# where the maps are large.
#
# </details>

# %%
for name, side in [("pixels", 512), ("latents", 64)]:
    print(f"{name:8} {side:3}x{side:<3}  {side**2:9,} places, {side**4:18,} pairs of places")
pixels, latents = 512 * 512 * 3, 64 * 64 * 4
print(f"numbers  {pixels:,} in pixels, {latents:,} in latents: {pixels // latents} times fewer")
print(f"factor   {512**2 // 64**2} for a convolution, {512**4 // 64**4} for attention")

# %% [markdown]
# The models that ship do the same in small: 32×32×3 pixels become 8×8×4 latents, 12 times fewer numbers.
# The downsampling factor is called $f$; here $f = 4$, in Stable Diffusion $f = 8$.
#
# ## The naive idea: PCA
#
# To describe a picture by fewer numbers, one needs no network. The best *linear* way is known: principal component
# analysis (PCA). Encode $z = B^\top (x - \mu)$, decode $\hat x = \mu + B z$, where the columns of $B$ are the
# directions in which the data vary most. Two ways to end up with 256 numbers for each picture:
#
# - **of patches**: each patch of 4×4×3 pixels becomes 4 numbers, the same way everywhere. The latent is 8×8×4.
# - **of pictures**: the whole picture, 3,072 numbers, becomes 256.
#
# The error is measured as the **peak signal-to-noise ratio**, in decibels. Values span 2, from $-1$ to $1$:
#
# $$\mathrm{PSNR} = 10 \log_{10} \frac{2^2}{\mathrm{mean}\,(x - \hat x)^2}$$
#
# 10 dB more are a tenth of the squared error. As a rule of thumb, below 20 one sees the loss at once, above 35 hardly.

# %%
corpus = sample(size=32)
training = [i for i, row in enumerate(corpus.rows) if row["split"] == "train"]
held_out = [i for i, row in enumerate(corpus.rows) if row["split"] != "train"]  # kept out of training
x_train = corpus.batch(training if full else training[:300])  # [n 3 32 32]
x_test = corpus.batch(held_out[:: 2 if full else 20])


def psnr(x, x_hat):
    return (10 * torch.log10(4 / (x - x_hat.clamp(-1, 1)).square().mean())).item()


def patches(x):
    return rearrange(x, "b c (h i) (w j) -> b h w (c i j)", i=4, j=4)  # [b h w 48]


def principal_components(rows, k):
    """Mean [d] and the k directions of largest variance [d k] of rows [n d]."""
    mean = rows.mean(0)
    _, _, B = torch.svd_lowrank(rows - mean, q=k, niter=3)
    return mean, B


torch.manual_seed(0)
patch_mean, patch_B = principal_components(patches(x_train).flatten(0, 2), 4)
picture_mean, picture_B = principal_components(x_train.flatten(1), 256)


def pca_patches(x):
    z = (patches(x) - patch_mean) @ patch_B  # encode: [b 8 8 4]
    x_hat = patch_mean + z @ patch_B.T  # decode
    return rearrange(x_hat, "b h w (c i j) -> b c (h i) (w j)", i=4, j=4, c=3)


def pca_pictures(x):
    z = (x.flatten(1) - picture_mean) @ picture_B  # encode: [b 256]
    return (picture_mean + z @ picture_B.T).view_as(x)  # decode


@torch.no_grad()
def autoencode(x):
    z = vae.encode(x).mode()  # [b 4 8 8]; mode: see below
    return vae.decode(z)  # [b 3 32 32]


methods = {"PCA of patches": pca_patches, "PCA of pictures": pca_pictures, "the VAE that ships": autoencode}
print(f"                     training   held out  (PSNR in dB; {len(x_train)} and {len(x_test)} pictures)")
few = x_train[::8]
for name, f in methods.items():
    print(f"{name:19}   {psnr(few, f(few)):6.1f}     {psnr(x_test, f(x_test)):6.1f}")

few_shown = [i % len(x_test) for i in (11, 44, 55, 77)]
shown = x_test[few_shown]
rows = [shown, *(f(shown) for f in methods.values())]
notes = [[f"{psnr(a, b):.1f} dB" for a, b in zip(shown, row, strict=True)] for row in rows[1:]]
viz.strip(rows, labels=["held-out picture", *methods], notes=[[], *notes])

# %% [markdown]
# What to see: with the same 256 numbers, each method fails in its own way.
#
# - PCA of patches knows a mean colour and a slope or two for each square of 4×4. The picture is a mosaic.
# - PCA of pictures does well on what it was made from, 25.8 dB, and loses 4 dB on new pictures: coloured noise. Each of
#   its 256 directions is a whole picture, and some 1,000 pictures tell too little about so many.
# - The VAE is a convolutional network with the same few weights at every place. It is as good on its training pictures,
#   25.9 dB, and the best of the three on new ones. These cost it 2.4 dB, since its decoder has seen the others
#   some thirty times. It keeps outlines clean and blurs what is small: the spots of the beetle, the hands of the watch.
#
# (The VAE was trained on 8,000 emoji, PCA on those of them that are in the sample. A handful of the held-out pictures
# the VAE did see; its model card (minisd/weights/emoji/README.md) says so.)
#
# ## An autoencoder, and the holes in its latents
#
# So let a network find the code. An **encoder** $E$ makes $z = E(x)$, a **decoder** $D$ makes $\hat x = D(z)$, and
# training makes $\hat x$ like $x$:
#
# $$L = \lVert x - D(E(x)) \rVert^2$$
#
# This is all that is needed to store pictures. But we want to *make* pictures: diffusion will put a **new** $z$
# into the decoder, one that came from no picture. What is drawn then?
#
# To see it, take a latent that fits on paper: two numbers. The pictures are 80 emoji of 16×16 pixels, the networks
# three linear layers each. The code trains both autoencoders of this section. For now only the first matters, with
# `kl_weight=0`.

# %%
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


def train_toy(kl_weight, steps=2000 if full else 5):
    torch.manual_seed(0)
    encoder, decoder = layers(768, 128, 128, 4), layers(2, 128, 128, 768)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()])
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        moments = encoder(x_toy.flatten(1))[:, :, None, None]  # [80 4 1 1]: two means and two log variances
        posterior = DiagonalGaussianDistribution(moments)
        z = posterior.sample() if kl_weight else posterior.mode()  # [80 2 1 1]
        x_hat = decoder(z.flatten(1)).view_as(x_toy)
        # Σ (x - x̂)² + kl_weight · KL, divided by the numbers in a picture
        loss = (x_toy - x_hat).square().mean() + kl_weight * posterior.kl().mean() / x_toy[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return decoder, posterior


def draw(decoder, z):
    """Latents [... 2] to pictures [... 3 16 16]."""
    return decoder(z).detach().unflatten(-1, (3, 16, 16))


def rms(x):
    return x.square().mean().sqrt().item()


plain_decoder, plain_posterior = train_toy(kl_weight=0)
z = plain_posterior.mean.flatten(1).detach()  # [80 2]
centre, spread = z.mean(0), z.std(0)
print(f"latents {list(z.shape)}, mean {centre[0]:.1f} and {centre[1]:.1f}, std {spread[0]:.1f} and {spread[1]:.1f}")
print(f"error of the reconstructions (root mean square): {rms(draw(plain_decoder, z) - x_toy):.3f}")


def panel(decoder, points, centre, spread, side=9):
    """The plane between centre ± 2 spread, as viz.plane wants it."""
    u = torch.linspace(-2, 2, side)
    grid = torch.stack(torch.meshgrid(u, -u, indexing="xy"), dim=-1)  # [side side 2], the first row on top
    (x0, y0), (x1, y1) = (centre - 2 * spread).tolist(), (centre + 2 * spread).tolist()
    return draw(decoder, centre + spread * grid), (x0, x1, y0, y1), points


viz.plane({"a plain autoencoder": panel(plain_decoder, z, centre, spread)}, width=2.88)

# %% [markdown]
# What to see: each dot is where the encoder puts one picture; the little pictures are what the decoder makes of
# each place.
#
# At the dots all is well, and nothing else was asked for. Between them there are **holes**: mixtures, smears, whole
# regions of garbage where no picture ever was. The dots also lie anywhere they like, in a cloud with a scale of its
# own. Nobody told the encoder otherwise.
#
# For diffusion this fails twice. A sampler ends *near* a latent, never quite on it: the decoder must forgive small
# errors. And a sampler starts from noise of standard deviation 1: the latents should live at that scale.
#
# ## The remedy: say how sure you are
#
# The **variational** autoencoder (Kingma & Welling 2013) has its encoder answer not with a point, but with a
# Gaussian, the **posterior** (the distribution of $z$ once $x$ is known):
#
# $$q(z \mid x) = \mathcal N\big(\mu(x),\, \sigma^2(x)\, I\big)$$
#
# The decoder gets a *sample* of it, so it learns that a whole neighbourhood means the same picture. That alone would
# not last: the encoder would make $\sigma$ tiny and spread the means far apart. So each picture pays for how far its
# Gaussian is from $\mathcal N(0, I)$:
#
# $$L = \lVert x - D(z) \rVert^2 + \lambda\, \mathrm{KL}\big(q(z \mid x) \,\Vert\, \mathcal N(0, I)\big),
#   \qquad z \sim q(z \mid x)$$
#
# With $\lambda = 1$ this is, up to a constant, the bound on the likelihood (ELBO) for pixels with a Gaussian noise of
# variance ½; notebook 02 met the same bound. Same network, same data, same steps, $\lambda = 1$:

# %%
decoder, posterior_toy = train_toy(kl_weight=1)
z_vae = posterior_toy.mean.flatten(1).detach()
centre, spread = z_vae.mean(0), z_vae.std(0)
print(f"latents {list(z_vae.shape)}, mean {centre[0]:.1f} and {centre[1]:.1f}, std {spread[0]:.1f} and {spread[1]:.1f}")
print(f"error of the reconstructions (root mean square): {rms(draw(decoder, z_vae) - x_toy):.3f}")
viz.plane({"a variational autoencoder": panel(decoder, z_vae, torch.zeros(2), torch.ones(2))}, width=2.88)

# %% [markdown]
# What to see: the same 80 pictures, now around 0 at a scale of about 1. Every place draws something like a
# picture, and neighbours are alike: hearts beside hearts, faces beside faces. The price is a larger error at the dots.
#
# Two numbers for the two failures. How far is the drawing of a *random* latent from the nearest real picture? And how
# far does a drawing move, if its latent is wrong by a tenth of the latents' standard deviation?

# %%
torch.manual_seed(0)
print("                 random latent, to the nearest picture    latent off by 0.1 std, change of the drawing")
for name, D, codes in [("plain", plain_decoder, z), ("variational", decoder, z_vae)]:
    random = draw(D, codes.mean(0) + codes.std(0) * torch.randn(1000, 2))
    nearest = torch.cdist(random.flatten(1), x_toy.flatten(1)).min(1).values.mean() / x_toy[0].numel() ** 0.5
    moved = rms(draw(D, codes + 0.1 * codes.std(0) * torch.randn_like(codes)) - draw(D, codes))
    print(f"{name:12}     {nearest:.2f} {'':38} {moved:.2f}")

# %% [markdown]
# Both are less than half as large. The neighbours of a picture are pictures too, and that is what diffusion needs.
#
# ## The reparametrisation trick
#
# $z$ is drawn at random. How does a gradient pass through a dice roll? Draw the dice somewhere else:
#
# $$z = \mu + \sigma\,\epsilon, \qquad \epsilon \sim \mathcal N(0, I) \qquad \text{(Kingma \& Welling, section 2.4)}$$
#
# Now $z$ is a plain function of $\mu$ and $\sigma$, and the randomness is an input like any other. A check
# on a case where the answer is known. Let $L = z^2$. Its mean is $\mu^2 + \sigma^2$, so the gradient
# must be $2\mu$ with respect to $\mu$, and $\sigma^2$ with respect to $\log \sigma^2$, which is what the
# encoder says. (So $\sigma = \exp(\tfrac12 \log\sigma^2)$. Who forgets the ½ takes the variance for the standard
# deviation, and no shape tells. In the class, the log variance is also clamped to $[-30, 20]$, so that no
# exponential can overflow.)

# %%
torch.manual_seed(0)
n = 200_000
mu, logvar = torch.tensor(0.7, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
sigma = torch.exp(0.5 * logvar)
sampled = mu + sigma * torch.randn(n)  # z = μ + σ ε
sampled.square().mean().backward()
print(f"with respect to μ       {mu.grad:.3f}, exact {2 * mu.item():.3f}")
print(f"with respect to log σ²  {logvar.grad:.3f}, exact {logvar.exp().item():.3f}")

rolled = torch.distributions.Normal(mu, sigma).sample((n,))  # the same distribution, drawn without the trick
print(f"drawn without the trick: does a gradient reach μ? {rolled.requires_grad}")

# %% [markdown]
# ## The KL term
#
# For two Gaussians the divergence has a closed form. A number with mean $\mu$ and variance $\sigma^2$ pays
#
# $$\mathrm{KL} = \tfrac12\big(\mu^2 + \sigma^2 - 1 - \log \sigma^2\big) \quad \text{nats}
#   \qquad \text{(Kingma \& Welling, appendix B)}$$
#
# Being off zero costs, and being sure costs. It is free only to say nothing: $\mu = 0$, $\sigma = 1$. In the
# code of `DiagonalGaussianDistribution.kl` it is summed over all numbers of a latent. (A nat is what a bit is to base
# $e$ instead of 2: 0.693 nats are a bit.)
#
# ## The autoencoder that ships
#
# Now the real thing, on a few pictures. It is the same class as Stable Diffusion's, `AutoencoderKL`, and was trained
# with $\lambda = 0.001$ and absolute instead of squared errors: reconstruction comes first.
#
# When the UNet was done, too, the **decoder alone** was trained further. The encoder stayed, so the latents did, and
# the UNet that had learned to draw them had nothing to learn anew. Three things were different this time:
#
# - squared errors, whose pull grows with the mistake;
# - beside them, 0.1 times a *perceptual* distance: how far picture and reconstruction are apart for another network,
#   here the image tower of CLIP ([notebook 05](05_clip.ipynb));
# - in the last third of the steps, noise on the latents. A sampler ends near a latent, not on one, and so the decoder
#   learned what to overlook.
#
# Stability AI had done the first two for Stable Diffusion v1, with LPIPS in place of CLIP. Their decoder,
# `sd-vae-ft-mse`, can be put in the place of the one that came with the model, for the same reason.
# ([Training](../docs/training.md#a-better-decoder-for-a-finished-model) has the command, and pictures from before and
# after.)
#
# **Predict, then run.** Encoder and decoder are built from the blocks of the UNet (notebook 03), without time and text.
# One thing of the UNet must be missing. Which, and why?
#
# <details><summary>Answer</summary>
#
# Nothing is handed across. What the decoder gets must be in the latent, all of it: when a picture is drawn, there is no
# encoder beside it.
#
# </details>

# %%
fox = corpus.batch([corpus.captions.index("fox, noto style")])
ends = ["encoder.conv_in", "encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in", "decoder.conv_out"]
passed, hooks = [], []  # what each layer put out, in the order in which they ran


def note(label):
    return lambda _, args, out: passed.append(f"{label}{list(out.shape)}")


for name, layer in vae.named_modules():
    if name in ends or isinstance(layer, (ResnetBlock, AttnBlock, Downsample, Upsample)):
        hooks.append(layer.register_forward_hook(note(f"{name:26}{type(layer).__name__:13}")))
with torch.no_grad():
    vae.decode(vae.encode(fox).mode())
for hook in hooks:
    hook.remove()
half = 1 + [row.startswith("quant_conv") for row in passed].index(True)
print("\n".join([*passed[:half], "", *passed[half:]]))

# %% [markdown]
# Above the blank line is the encoder: three levels, 32, 64 and 96 channels wide, and at the bottom one look of each
# pixel at all others (`AttnBlock`). It ends in 8 channels, which `quant_conv`, a convolution of 1×1, mixes: 4 means and
# 4 log variances. Below is the decoder, the same in reverse, with one ResnetBlock more at each level. Stable
# Diffusion's has four levels, of 128, 256, 512 and 512 channels.
#
# **Predict.** A Downsample is a 3×3 convolution of stride 2. Here, zeros are padded on the right and below only; in the
# UNet, all round. Someone writes `padding=1` here, too. The weights load and all shapes agree. What comes back?
#
# <details><summary>Answer</summary>
#
# Each convolution now looks one pixel further up and to the left than it was trained to. The first Downsample works at
# the full size, where that is one pixel of the picture, the second at half size, where it is two. So the picture comes
# back three pixels too far to the right and below: the PSNR falls from 23.5 to 10.6 dB, and if one shifts the picture
# back by three, to only 17.8. No error is raised. If a port of an autoencoder draws everything a little displaced, look
# here.
#
# </details>
#
# What comes out is a `DiagonalGaussianDistribution`: `.mode()` is its mean, `.sample()` draws from it.

# %%
wanted = ["fox", "watermelon", "rocket"]
x_0 = corpus.batch([corpus.captions.index(f"{name}, noto style") for name in wanted])
with torch.no_grad():
    posterior = vae.encode(x_0)
    z = posterior.sample(generator=torch.Generator().manual_seed(0))
    x_hat = vae.decode(z)

for name, value in [("x", x_0), ("posterior.mean", posterior.mean), ("posterior.logvar", posterior.logvar),
                    ("posterior.std", posterior.std), ("z", z), ("x_hat", x_hat)]:  # fmt: skip
    print(f"{name:17} {list(value.shape)!s:16} from {value.min():7.3f} to {value.max():6.3f}")
channels = [f"channel {i}" for i in range(4)]
viz.maps(posterior.mean, channels, wanted, pictures=x_0)

# %% [markdown]
# What to see: a latent is still a picture, 8×8 with four channels instead of red, green and blue. Shapes stay where
# they are. No channel is a colour, though: each place mixes brightness, hue and edges as the networks agreed among
# themselves.
#
# The rest of what the encoder says, for the fox: how sure it is of each number, and what each number pays.

# %%
kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)  # the formula above, [3 4 8 8]
assert torch.allclose(kl.sum((1, 2, 3)), posterior.kl(), rtol=1e-4)

rows = [posterior.mean[0], posterior.std[0], kl[0]]
print("channel                     " + "".join(f"{c:>9}" for c in range(4)))
print("std of the means            " + "".join(f"{s:9.3f}" for s in posterior.mean.std((0, 2, 3))))
print("mean of the posterior's std " + "".join(f"{s:9.3f}" for s in posterior.std.mean((0, 2, 3))))
print("KL in nats, mean of a pixel " + "".join(f"{s:9.2f}" for s in kl.mean((0, 2, 3))))
for name, nats in zip(wanted, posterior.kl().tolist(), strict=True):
    print(f"{name:10}  KL {nats:6.0f} nats = {nats / 0.6931:5.0f} bits (its pixels have {8 * x_0[0].numel():,} bits)")
viz.maps(rows, channels, ["mean", "std", "KL (nats)"])

# %% [markdown]
# What to see:
#
# - **mean**: channel 2 tells the figure from the ground, and does most of the work. Its means are spread over a
#   range more than five times that of channel 0.
# - **std**: the encoder is very sure, to about 0.01 where the means spread over 0.5 to 2.6. It is least sure at the
#   border and in the corners, up to 0.05. Would an error do less harm there? See below.
# - **KL**: what is unusual is dear. The fox's face pays up to 16 nats for a number in channel 2. But the floor is
#   high too: being sure to $\sigma = 0.012$ costs $-\log \sigma - \tfrac12 \approx 3.9$ nats by itself, and 256
#   numbers pay it. So about two thirds of the fox's 1,454 nats are the price of precision.
#
# One may read the KL as a size: how many bits this latent says beyond what $\mathcal N(0, I)$ would have said. It is
# some 2,000 bits, for a picture whose raw pixels have 24,576.
#
# Where may it be unsure? Make the same error at one place of the latent after the other, and see by how much the
# picture changes.

# %%
torch.manual_seed(0)
with torch.no_grad():
    some = vae.encode(x_test[:16])
    drawn, change = vae.decode(some.mean), torch.zeros(8, 8)
    for i in range(8):
        for j in range(8):
            z_off = some.mean.clone()
            z_off[:, :, i, j] += 0.2 * torch.randn(len(z_off), 4)
            change[i, j] = rms(vae.decode(z_off) - drawn)
panels = {"the posterior's std": some.std.mean((0, 1)), "change of the picture,\nif this place is wrong by 0.2": change}
viz.matrices(panels, cell=(0.2, 0.2))

# %% [markdown]
# What to see: at the border, and most of all in the corners, an error does less harm, and there the encoder is least
# sure. Precision costs nats, and it seems to be spent where it pays. (The two figures do not agree everywhere: the
# network is the surest one pixel away from the border.)
#
# **Predict, then run.** Replace the posterior's mean by a sample: by how much does the picture change? And what does
# the decoder draw from numbers that have each channel's mean and standard deviation, but come from no picture?
#
# <details><summary>Answer</summary>
#
# The sample changes nothing that one could see: the encoder is sure of itself to a hundredth. Random
# latents give coloured scraps. This KL term is far too weak to turn the latents into $\mathcal N(0, I)$, and in Stable
# Diffusion it is a thousand times weaker still. It makes the latents smooth *around* pictures, and no
# more. Which latents are pictures, the **diffusion model** learns: that is its job.
#
# </details>

# %%
torch.manual_seed(0)
with torch.no_grad():
    test_posterior = vae.encode(x_test)
    means = test_posterior.mean
    mean, std = means.mean((0, 2, 3), keepdim=True), means.std((0, 2, 3), keepdim=True)  # [1 4 1 1]
    from_mean, from_sample = vae.decode(posterior.mean), vae.decode(posterior.sample())
    from_nothing = vae.decode(mean + std * torch.randn(3, 4, 8, 8))
print(f"drawn from a sample and from the mean: they differ by {rms(from_sample - from_mean):.4f} (root mean square)")
viz.strip([torch.cat([x_0[:2], from_mean[:2], from_sample[:2], from_nothing[:2]])],
          [*wanted[:2], *["mean"] * 2, *["sample"] * 2, *["random"] * 2])  # fmt: skip

# %% [markdown]
# ## The other way: a codebook
#
# The KL term is one way to keep latents in order. **Vector quantisation** (VQ) is the other. There is a list of
# `n_embed` vectors, the **codebook**. Each pixel of the encoder's map $h$ is replaced by the nearest of them:
#
# $$z = e_k, \qquad k = \arg\min_j \lVert h - e_j \rVert^2 \qquad \text{(van den Oord et al. 2017, eq. 1 and 2)}$$
#
# So a picture is a table of 8×8 whole numbers. No variance, no sampling, no KL: with 256 codes, a pixel costs 8 bits.
#
# ### The straight-through gradient
#
# The choice of the nearest has no gradient: move $h$ a little, and the same code is chosen. So VQ pretends.
# Forwards, $z$ is the code; backwards, the gradient at the code is handed to $h$ as if nothing had happened:
#
# $$z = h + \mathrm{sg}[e_k - h], \qquad \mathrm{sg}: \text{no gradient through here}$$
#
# Here is what this does, on a line. There are three codes, $-1$, $0$ and $1$. The vector $h$ starts at 0.1, and the
# decoder would like to have $z = 1$: the loss is $(z - 1)^2$.

# %%
quantizer = VectorQuantizer(n_embed=3, embed_dim=1, legacy=False)
quantizer.embedding.weight.data = torch.tensor([[-1.0], [0.0], [1.0]])


def push(straight_through, steps=40):
    h, path = torch.full((1, 1, 1, 1), 0.1, requires_grad=True), []
    for _ in range(steps):
        quantized = quantizer(h)
        z = quantized.z if straight_through else quantizer.lookup(quantized.indices)
        path.append((h.item(), z.item()))
        commitment = (h - z.detach()).square().mean()
        loss = (z - 1).square().mean() + 0.25 * commitment
        (gradient,) = torch.autograd.grad(loss, h)
        h = (h - 0.02 * gradient).detach().requires_grad_()
    return torch.tensor(path).T  # [2 steps]


panels = {}
for title, on in [("straight-through", True), ("without it", False)]:
    vector, code = push(on)
    panels[title] = {"$h$": (torch.arange(40), vector), "its code $z$": (torch.arange(40), code)}
viz.curves(panels, "step", width=3.4, height=2.3)

# %% [markdown]
# What to see, left: the code 0 is wrong by 1, and says so; $h$ is pushed up. Nothing seems to happen, until $h$ is
# past the middle and the next code is the nearer one. Right: the code complains as loudly, but $h$ does not hear it,
# and only the second term of the loss is left, which pulls $h$ onto the wrong code.
#
# That second term is the **commitment**. VQModel's loss for the quantiser has two terms:
#
# $$\lVert \mathrm{sg}[h] - e_k \rVert^2 + \beta\, \lVert h - \mathrm{sg}[e_k] \rVert^2
#   \qquad \text{(van den Oord et al., eq. 3)}$$
#
# The first moves the codes to the vectors, the second keeps the vectors near their codes.
#
# ### KL and VQ side by side
#
# To train the autoencoder that ships took 17 minutes on two cores, and its decoder 45 more on one. To see the
# difference it is enough to start from it. We take its encoder (of the posterior, only the mean) and its decoder, put a
# codebook of 256 codes between them, and train on. Same size, same pictures, same latent.


# %%
def with_codebook(vae, n_embed=256):
    """A VQModel that starts with the weights of an AutoencoderKL."""
    model = VQModel(VQConfig(**asdict(vae.config) | {"double_z": False}, n_embed=n_embed, legacy=False))
    weights = {name: w.clone() for name, w in vae.state_dict().items()}
    # The encoder says 8 numbers a pixel, and quant_conv makes 4 means and 4 log variances of them. Both are linear:
    # fold the half of quant_conv that makes the means into the convolution before it.
    to_mean, shift = weights["quant_conv.weight"][:4, :, 0, 0], weights["quant_conv.bias"][:4]
    last, bias = weights["encoder.conv_out.weight"], weights["encoder.conv_out.bias"]
    weights["encoder.conv_out.weight"] = torch.einsum("oi,icyx->ocyx", to_mean, last)
    weights["encoder.conv_out.bias"] = to_mean @ bias + shift
    weights["quant_conv.weight"] = torch.eye(4)[:, :, None, None]
    weights["quant_conv.bias"] = torch.zeros(4)
    model.load_state_dict(weights, strict=False)  # all but the codebook
    return model


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

        chosen.append(model.encode(x).indices)  # [batch 8 8]
        recent = torch.cat(chosen[-10:])
        in_use = (model.quantize.usage(recent) > 0).sum().item()
        log.append((error.item(), in_use, model.quantize.perplexity(recent).item()))
    return model, torch.tensor(log).T


collapsed, collapsed_log = train_vq(revive=None)
print(f"{steps} steps. Codes in use: {collapsed_log[1, -1]:.0f} of 256; perplexity {collapsed_log[2, -1]:.1f}")

# %% [markdown]
# **Perplexity** is a fairer count than "in use": $\exp(-\sum_k p_k \log p_k)$, where $p_k$ is the share of code
# $k$. It is 256 if all are chosen equally often, and 1 if it is always the same one.
#
# What we see is **codebook collapse**. Codes start as tiny random vectors, all close to 0, in the middle of nowhere. A
# few happen to be the nearest to many vectors. These are chosen, get gradients, and move to where the vectors are. So
# they are chosen again. The others are nobody's nearest, get no gradient, and stay where they are: dead.
#
# **Predict.** How would you revive a code that is never chosen?
#
# <details><summary>One remedy</summary>
#
# Move it to where vectors are. Every 10 steps, each code that was not chosen in the last 10 is set onto a random
# vector of the batch. From there it is somebody's nearest, and takes part. Others are: a start at the means of
# k-means, smaller codes (the VQ-f4 of CompVis has vectors of 3 numbers only), codes that follow their vectors by
# a running mean instead of by gradients.
#
# </details>


# %%
@torch.no_grad()
def revive(model, x, recent):
    h = model._encode(x).movedim(1, -1).flatten(0, -2)  # what the encoder says, before the codebook: [b·8·8, 4]
    codebook = model.quantize.embedding.weight
    dead = model.quantize.usage(torch.cat(recent)) == 0 if recent else torch.ones(len(codebook), dtype=torch.bool)
    codebook[dead] = h[torch.randint(len(h), (int(dead.sum()),))]


revived, revived_log = train_vq(revive)
print(f"{steps} steps. Codes in use: {revived_log[1, -1]:.0f} of 256; perplexity {revived_log[2, -1]:.1f}")
few_steps = torch.arange(steps)
panels = {}
for i, title in enumerate(["mean absolute error", "codes in use, last 10 steps", "perplexity, last 10 steps"]):
    panels[title] = {"plain": (few_steps, collapsed_log[i]), "dead codes revived": (few_steps, revived_log[i])}
viz.curves(panels, "step", width=2.5, height=2.2)

# %%
with torch.no_grad():
    results = {"KL": autoencode(x_test)}
    for name, model in [("VQ, collapsed", collapsed), ("VQ, revived", revived)]:
        results[name] = torch.cat([model(part)[0] for part in x_test.split(64)])
nats = test_posterior.kl().mean().item()
codes = revived.encode(shown[:1]).indices
print(f"a picture is {list(codes.shape[1:])} codes, the first row: {codes[0, 0].tolist()}")
print(f"held-out pictures:  {'KL':14} {psnr(x_test, results['KL']):.1f} dB, {nats / 0.6931:.0f} bits a picture")
for name in ("VQ, collapsed", "VQ, revived"):
    print(f"{'':20}{name:14} {psnr(x_test, results[name]):.1f} dB, at most {64 * 8} bits a picture")
rows = [shown, *(x_hat[few_shown] for x_hat in results.values())]
viz.strip(rows, labels=["held-out picture", *results])

# %% [markdown]
# And the two codebooks, as they are used on the held-out pictures: a cell for each of the 256 codes, the most used
# first, row by row. The darker, the larger its share in percent.

# %%
panels = {}
for name, model in [("collapsed", collapsed), ("revived", revived)]:
    with torch.no_grad():
        usage = model.quantize.usage(torch.cat([model.encode(part).indices for part in x_test.split(64)]))  # [256]
    share = 100 * usage.float() / usage.sum()
    title = f"{name}: {int((usage > 0).sum())} codes are used,\nthe first for {share.max():.0f}% of all pixels"
    panels[title] = share.sort(descending=True).values.view(16, 16)
viz.matrices(panels, cell=(0.13, 0.13))

# %% [markdown]
# What to see: the curves first. Reviving the dead brings nearly all codes into use within 20 steps. The error by
# then is below what the collapsed codebook reaches after 150. (That one does recover, but slowly: it wins a code now
# and then, when the vectors come by.) In the pictures, some 40 codes are too few for the colours: purple turns blue,
# the beetle brown and the apple yellow. With 253 codes most colours come back. (44 and 253 were counted in the last ten
# batches of the training, 47 and 255 in the last figure on the held-out pictures.)
#
# KL still draws better, by 2 dB. It also says four times as much: its latents carry some 2,000 bits for a picture, and
# 64 codes of 8 bits only 512. Also, the VQ model was trained for half a minute. The official VQ-f4 has 64×64 codes out
# of 8,192 for 256×256 pixels.
#
# Which one does diffusion use? Rombach et al. tried both, and Stable Diffusion took KL. With VQ, the codebook
# belongs to the decoder: noise is added to $h$, and what comes out is moved to its code before it is decoded
# (`VQModelInterface`).
#
# ## Where 0.18215 comes from
#
# Diffusion adds noise of variance 1. Notebook 01 showed that data of another variance is not preserved, and
# that its signal-to-noise ratio is another. So latents are multiplied by a **scale factor** that makes
# their variance 1:
#
# $$s = \frac{1}{\mathrm{std}(z)}, \qquad z \text{ sampled, over all pictures, channels and places}
#   \qquad \text{(Rombach et al., appendix G)}$$
#
# Stable Diffusion's 0.18215 is just that: its latents have a standard deviation of about $1 / 0.18215 = 5.49$ (R.
# Rombach says so himself, in issue 437 of huggingface/diffusers). CompVis's code can measure it on the first batch of a
# training run (`scale_by_std`); for Stable Diffusion it is a number in the configuration. Let us measure ours, and see
# how many of its digits one batch can tell.

# %%
z_test = test_posterior.sample(generator=torch.Generator().manual_seed(0))  # [n 4 8 8]
print(f"std of the latents {z_test.std():.3f}, so the factor is {1 / z_test.std():.4f}")
print(f"in the model, measured on all its training pictures: {sd.scale_factor:.4f}")
print("by channel, after scaling:  mean", [f"{m:.2f}" for m in (sd.scale_factor * z_test).mean((0, 2, 3))],
      " std", [f"{s:.2f}" for s in (sd.scale_factor * z_test).std((0, 2, 3))])  # fmt: skip

with torch.no_grad():
    z_train = torch.cat([vae.encode(part).sample() for part in x_train.split(64)])
for size in (4, 16, 64):
    measured = [1 / z_train[torch.randint(len(z_train), (size,))].std().item() for _ in range(100)]
    print(f"on one batch of {size:2}, 100 times: the factor is between {min(measured):.3f} and {max(measured):.3f}")

_, between = train_toy(kl_weight=0.01)
stds = [p.mean.std().item() for p in (plain_posterior, between, posterior_toy)]
print("the toy's latents: std", ", ".join(f"{s:.1f} (KL weight {w})" for s, w in zip(stds, (0, 0.01, 1), strict=True)))

# %% [markdown]
# Five remarks.
#
# - The two factors differ a little, as they were measured on different pictures. A few pictures tell it roughly, and
#   not to five digits. That does no harm. What does is another factor in drawing than in training: a model keeps the
#   one of its training.
# - From here on there are two latents: the autoencoder's own, which this notebook calls $z$, and the scaled one,
#   $s \cdot z$, which is noised. The latter is the $x_0$ of notebooks 01 to 03, and `z` in notebook 07.
# - There is **one** factor for all channels. After it, they are not alike: channel 2 has four times the standard
#   deviation of channel 0, and the means are not 0. Only the variance of all numbers together is about 1.
# - The weaker the KL term, the larger the latents: the toy shows it. Stable Diffusion's term is very weak,
#   $\lambda = 10^{-6}$, and its latents are larger than ours, 5.5 against 1.6.
# - VQ has no KL term, and Rombach et al. found a variance near 1 there, and left the factor out (appendix G).
#
# **Predict, then run.** Suppose that somebody forgets the factor. The data has variance $1/s^2$ instead of 1. What
# becomes of the curve of the log SNR?
#
# <details><summary>Answer</summary>
#
# It moves up by a constant. The signal $\sqrt{\bar\alpha_t}\,z$ has the variance $\bar\alpha_t / s^2$, so
# $\log \mathrm{SNR} = \log\frac{\bar\alpha_t}{1 - \bar\alpha_t} - 2 \log s$. For $s = 0.18215$ these are 3.4 nats, at
# every $t$: the clock of notebook 01 is slow. And at the end, where nothing should be left of the picture,
# $0.068 \cdot 5.49 = 0.37$ of it is.
#
# </details>

# %%
schedule = sd.schedule
t = torch.arange(schedule.timesteps)
factors = {"scaled": 1.0, "ours, unscaled": sd.scale_factor, "Stable Diffusion's, unscaled": 0.18215}
snr, left = {}, {}
for name, s in factors.items():
    snr[name] = (t, schedule.log_snr(t) - 2 * torch.log(torch.tensor(s)))
    left[name] = (t, schedule.sqrt_alphas_cumprod / s)
    half = (snr[name][1] < 0).int().argmax()
    print(f"{name:29} more noise than signal from t = {half}; std of the signal that is left at the end: "
          f"{left[name][1][-1]:.3f}")  # fmt: skip
viz.curves({"log SNR": snr, "std of the signal that is left": left}, log=["std of the signal that is left"], width=4.2)

# %% [markdown]
# How does it look? Below, a fox's latent is noised as training would. What is shown is $x_t$ divided by the standard
# deviation of its latents, decoded: so the rows differ only in how much noise there is.

# %%
times = [0, 350, 700, 999]
noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(len(times), -1, -1, -1)
unit = (sd.scale_factor * posterior.mean[:1]).expand_as(noise)  # latents of std 1
rows = []
for s in factors.values():
    z_t = schedule.q_sample(unit / s, torch.tensor(times), noise)  # the data has the standard deviation 1 / s
    rows.append(sd.decode_first_stage(z_t * s))
viz.strip(rows, [f"t = {t}" for t in times], list(factors))

# %% [markdown]
# In the lowest row the fox can still be seen at $t = 700$, where in the uppermost it is long gone. (It is pink, with
# stripes: $\sqrt{\bar\alpha_t}$ has shrunk it, and latents so small the decoder was never shown.) A network that is
# trained so gets easy questions at most $t$, and hardly ever the one that a drawing begins with: nothing but noise.
#
# It also goes wrong with a network that was trained *with* the factor, if its user forgets it. The sampler below
# draws latents of standard deviation 1, as it was taught. The decoder wants them at their own scale, $z / s$.

# %%
prompt, options = "a fox, noto style", dict(steps=20 if full else 2, guidance_scale=4.0, seed=3, num_images=5)
*_, last = sd.sample(prompt, **options)  # the generator under txt2img
with torch.no_grad():
    z = last.x / sd.scale_factor  # as the decoder wants them
    rows = [vae.decode(z), vae.decode(last.x), vae.decode(0.18215 * z)]
    assert torch.equal(rows[0], sd.decode_first_stage(last.x))
print(f"what the sampler drew: {list(last.x.shape)}, std {last.x.std():.2f}; divided by the factor: {z.std():.2f}")
viz.strip(rows, labels=["divided by the factor", "forgotten", "forgotten, if it were 0.18215"])

# %% [markdown]
# What to see: in the second row the decoder is told 0.63 of what was meant, and the foxes get blotches, and pink into
# their white. In the third it is told 0.18, and little is left but stripes on pink. If a model of yours draws the right
# things in the wrong colours, look here first. (`get_first_stage_encoding` and `decode_first_stage` are the places that
# know the factor. Whoever calls `vae.encode` and `vae.decode` has to apply it.)
#
# ## Between two pictures
#
# Half-way between two pictures lies no picture: in pixels, one shines through the other. In latents?

# %%
weights = torch.linspace(0, 1, 5)[:, None, None, None]  # [5 1 1 1]
fox, panda = (corpus.batch([corpus.captions.index(f"{name}, noto style")]) for name in ("fox", "panda"))
in_pixels = torch.lerp(fox, panda, weights)  # (1 - w) · fox + w · panda, [5 3 32 32]
with torch.no_grad():
    z_fox, z_panda = vae.encode(fox).mode(), vae.encode(panda).mode()
    in_latents = vae.decode(torch.lerp(z_fox, z_panda, weights))
pair = [[small.captions[i] for i in toy].index(f"{name}, noto style") for name in ("fox", "panda")]
toy_path = draw(decoder, torch.lerp(z_vae[pair[0]], z_vae[pair[1]], weights.flatten()[:, None]))
print(f"half-way, pixels and latents differ by {rms(in_latents[2] - in_pixels[2]):.3f} (root mean square)")
viz.strip([in_pixels, in_latents, toy_path], [f"{w:.2f}" for w in weights.flatten()],
          ["in pixels", "in 8x8x4 latents", "in the toy's two numbers"])  # fmt: skip

# %% [markdown]
# What to see: in pixels, two heads shine through each other. In the 8×8×4 latents it is not so different. The
# picture is cleaner, with one outline at a time, but it is still a dissolve. No wonder: the latent keeps every place
# where it is, and each place changes by itself. Only in the toy, where two numbers mean the whole picture, is every
# stop *something*. On its way from the fox to the panda it passes the hearts, because these lie between.
#
# The smaller a latent, the more it means and the less it keeps. Stable Diffusion's is large: it is a compressed
# picture, not an idea. What a fox is, the UNet has to know.
#
# ## What is lost on a photograph
#
# The autoencoder that ships has seen emoji and nothing else. But it is a convolutional network, so it takes
# any picture whose sides are divisible by 4. Here is a cat, 64×64 pixels.
#
# **Predict, then run.** PCA of patches, made from emoji, had nearly 5 dB less than the VAE on new emoji. Which does
# better on the photograph?
#
# <details><summary>Answer</summary>
#
# PCA, and by far. A mean colour and a slope describe fur as well as they describe anything. The VAE learned what
# *emoji* look like, and what it has never seen, it turns into what it knows. Knowing the data is why it wins there, and
# why it loses here.
#
# </details>

# %%
cat = photograph(64)  # [1 3 64 64]
with torch.no_grad():
    z_cat = vae.encode(cat).mode()  # [1 4 16 16]
print(f"photograph {list(cat.shape)}, latent {list(z_cat.shape)}")
versions = {"photograph": cat, "PCA of patches": pca_patches(cat), "the VAE that ships": autoencode(cat)}
notes = [["", *(f"{psnr(cat, x_hat):.1f} dB" for x_hat in list(versions.values())[1:])]]
quarters = rearrange(cat, "1 c (i h) (j w) -> (i j) c h w", i=2, j=2)  # [4 3 32 32], a size that the VAE knows
print(f"the VAE, on the four quarters one by one: {psnr(quarters, autoencode(quarters)):.1f} dB")
viz.strip([torch.cat(list(versions.values()))], list(versions), notes=notes, size=1.92)

# %% [markdown]
# What to see: PCA keeps colours and shapes, in a mosaic. The VAE paints the cat with a broad brush: fur turns into
# smooth strokes, the eyes go out, bright flecks appear where there are none, and a thin frame along the edges, where
# emoji are white. It is not only the size: on quarters of 32×32 pixels, each encoded by itself, it gains 1 dB, and PCA
# is still 4 dB better.
#
# Stable Diffusion's autoencoder was trained on photographs, and is far better at them. But with 48 times fewer numbers
# it must lose something too: small letters, the faces of a crowd, fine regular texture. What the first stage can't
# draw, no prompt will bring back. To see what a model can draw at best, encode a picture and decode it again.
#
# ## A large picture in tiles
#
# The maps at full resolution are what decoding costs in memory. For a large picture one may decode the latent in
# **tiles**, one after the other: `vae.enable_tiling`. But each tile sees only itself. `GroupNorm` measures mean and
# variance over the tile, attention looks around in the tile, and a convolution finds nothing beyond its edge. So tiles
# do not fit together exactly. The remedy is to let them overlap, and to fade each into the next.
#
# **Predict, then run.** The larger the tiles, the nearer to decoding the whole. Does that make them nearer to the
# photograph, too?

# %%
with torch.no_grad():
    pictures = {"whole": vae.decode(z_cat)}
    for side, overlap in [(32, 0.0), (16, 0.25), (32, 0.25), (48, 0.25)]:
        vae.enable_tiling(tile_size=side, overlap=overlap)
        pictures[f"tiles of {side},\noverlap {overlap:.0%}"] = vae.decode(z_cat)
    vae.disable_tiling()

print(f"photograph {list(cat.shape)}, latent {list(z_cat.shape)}; tiles of 32x32 pixels are 8x8 in the latent")
for name, x in pictures.items():
    across = (x[..., 1:] - x[..., :-1]).abs().mean((0, 1, 2))  # from each column to the next, [63]
    seam = across[31] / across.median()  # between columns 31 and 32 the tiles of 32 meet, where they do not overlap
    from_whole, from_cat = rms(x - pictures["whole"]), rms(x.clamp(-1, 1) - cat)
    print(f"{name.replace(chr(10), ' '):26} from the whole {from_whole:.2f}, from the photograph {from_cat:.2f}; "
          f"the step in the middle is {seam:.1f} times the usual one")  # fmt: skip
viz.strip([torch.cat(list(pictures.values()))], list(pictures), size=1.28)

# %% [markdown]
# What to see: without overlap there is a bright cross, and the step across it is several times the usual one. It comes
# from the zeros that a convolution pads with at an edge (see *Try it*): they mean that a *picture* ends here, and where
# emoji end, they are white. With overlap and fading the cross is gone. The colours still are not those of the whole:
# each tile has norms and attention of its own.
#
# The whole is not the nearest to the photograph: tiles of 32 and of 48 with an overlap are a little nearer. 32 is the
# size of the pictures of the training, and the likely reason is that the norms and the attention find there what they
# are used to. Tiles of 16 are the farthest. So a tile should not be smaller than those pictures; for Stable Diffusion
# they have 256×256, which is the default of `enable_tiling`.

# %%
print(f"This notebook took {time.time() - start:.0f} s.")

# %% [markdown]
# ## Recap
#
# - A latent makes each layer cheaper: convolutions by $f^2$, attention by $f^4$.
# - An autoencoder that only reconstructs leaves holes. A VAE answers with a mean and a variance, samples
#   $z = \mu + \sigma \epsilon$, and pays $\tfrac12(\mu^2 + \sigma^2 - 1 - \log\sigma^2)$ for each number.
# - In Stable Diffusion the KL term is tiny. It keeps latents smooth and in reach; to know which latents are pictures
#   is left to diffusion.
# - VQ replaces each pixel of the latent by the nearest of a list of codes. Gradients go straight through. Codes that
#   are never chosen die, and can be revived.
# - The scale factor is $1 / \mathrm{std}(z)$. Without it, the noise schedule is another one than you think.
# - A decoder can be trained further by itself. As long as the encoder stays, the latents do, and the UNet fits.
# - An autoencoder knows what it was trained on, and no more.
#
# ## In the CompVis source
#
# | here | there | file |
# |---|---|---|
# | `AutoencoderKL`, `VQModel`, `VQModelInterface` | the same names | `ldm/models/autoencoder.py` |
# | `Encoder`, `Decoder`, `ResnetBlock`, `AttnBlock` | the same names | `ldm/modules/diffusionmodules/model.py` |
# | `DiagonalGaussianDistribution` | the same name | `ldm/modules/distributions/distributions.py` |
# | `VectorQuantizer` | `VectorQuantizer2`, in taming-transformers | `taming/modules/vqvae/quantize.py` |
# | `legacy=False` | `legacy=True` is the default there, with $\beta$ on the other term | same |
# | `sd.scale_factor` | `scale_factor` in the YAML; or measured, with `scale_by_std` | `ldm/models/diffusion/ddpm.py` |
# | `get_first_stage_encoding` | the same name: `scale_factor * posterior.sample()` | same |
# | `decode_first_stage` | the same name: divides by `scale_factor`, then decodes | same |
# | L1 and KL; if asked, more (`training/vae.py`) | `LPIPSWithDiscriminator`: LPIPS, GAN | `ldm/modules/losses/` |
# | `enable_tiling` | has no counterpart; diffusers has the same | |
#
# With an error of pixels alone, what the latent does not say becomes a middle of all that is possible: a blur. CompVis
# adds a perceptual distance (LPIPS) and a discriminator, which would rather see wrong detail than none.
#
# ## Try it
#
# - Train the toy with `kl_weight=30`. What does the plane look like, and why? (It is called posterior collapse.)
# - Give the codebook 16 codes, then 1,024. How do PSNR and perplexity follow?
# - Try `photograph(32)`: is the cat easier as an icon?
# - Where does the cross come from? Set `padding_mode = "replicate"` on each `nn.Conv2d` of `vae.decoder` that pads, and
#   decode in tiles without overlap again. (The bright cross goes, and the cat with it. What else did the zeros tell?)
# - The exercises of this stage are in [`exercises/04_vae.ipynb`](exercises/04_vae.ipynb): the sample, the KL, the
#   nearest code, the straight-through gradient, the scale factor and others; a checker names the mistake.
#
# Before this: [notebook 03](03_unet.ipynb), the network that reads latents. Next: [notebook 05](05_clip.ipynb), how a
# sentence becomes numbers.
