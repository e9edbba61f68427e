"""The first stage: an autoencoder that turns a picture into a small latent, and a latent into a picture.

Diffusion over 512x512x3 numbers is slow, and most of those 786,432 numbers describe detail that the eye hardly
notices. The encoder keeps 64x64x4 numbers, 48 times fewer, from which the decoder can paint the picture again. The
UNet then only has to learn what those numbers look like.

    picture [b 3 H W] ─► Encoder ─► quant_conv ─► N(mean, std²) ─► z [b 4 h w] ─► post_quant_conv ─► Decoder ─► picture

In this order: the blocks; the encoder and the decoder, which are made of them; the Gaussian that the encoder
predicts; AutoencoderKL, which joins all three. How to work on a picture in parts, when memory is short, comes last.

Source: Kingma & Welling 2013 (arXiv:1312.6114); Esser et al. 2021 (arXiv:2012.09841); Rombach et al. 2022
(arXiv:2112.10752), section 3.1; CompVis `ldm/models/autoencoder.py`, `ldm/modules/diffusionmodules/model.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from .attention import attention
from .noising import Generators, randn


@dataclass(frozen=True)
class AutoencoderConfig:
    """The architecture of an autoencoder. The defaults are Stable Diffusion v1's KL-f8 (84 million parameters).

    Raises:
        ValueError: `attn_resolutions` names a side that no feature map has.
    """

    in_channels: int = 3  # RGB
    out_ch: int = 3
    ch: int = 128  # channels at full resolution, a multiple of 32 because GroupNorm has 32 groups
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)  # channels of each level, in multiples of ch; all levels but the last halve
    num_res_blocks: int = 2  # ResnetBlocks in each level of the encoder; the decoder has one more
    z_channels: int = 4  # channels between encoder or decoder and their 1x1 convolution
    embed_dim: int = 4  # channels of the latent
    double_z: bool = True  # the encoder predicts a mean and a log variance for each of z_channels, not one number
    resolution: int = 256  # side of the training pictures; it only gives attn_resolutions a meaning
    attn_resolutions: tuple[int, ...] = ()  # sides of the feature maps of such a picture that get self-attention

    def __post_init__(self):
        sides = [self.resolution // 2**level for level in range(len(self.ch_mult))]
        unmet = [side for side in self.attn_resolutions if side not in sides]
        if unmet:
            raise ValueError(f"attn_resolutions has {unmet[0]}, but the maps have the sides {sides}: choose among them")

    @property
    def downsampling(self) -> int:
        """f: a latent pixel stands for a square of f x f pixels of the picture (8 in SD v1)."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, counted from the full resolution."""
        return [self.ch * mult for mult in self.ch_mult]

    def attends(self, level: int) -> bool:
        """Whether the level has self-attention, counted from the full resolution."""
        return self.resolution // 2**level in self.attn_resolutions


# --- the blocks -------------------------------------------------------------------------------------------------------


def Normalize(channels: int) -> nn.GroupNorm:
    """The norm of the whole autoencoder: 32 groups, and ε = 1e-6, with which SD v1 was trained. (The UNet has 1e-5.)

    Mean and variance are those of one picture alone (Wu & He 2018, arXiv:1803.08494), so the result does not depend on
    the rest of the batch, which is small when pictures are large. CompVis `model.py: Normalize`.
    """
    return nn.GroupNorm(32, channels, eps=1e-6)


def nonlinearity(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """SiLU, also called swish: x · sigmoid(x). Overwrites x when no gradient is recorded.

    Decoding needs most of its memory for the feature maps at full resolution, 134 MB each in SD v1 at 512x512. Writing
    the result into x saves one of them. Every caller passes the fresh output of a norm, so nothing else reads x.
    """
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResnetBlock(nn.Module):
    """Two convolutions whose result is added to the input: the UNet's ResBlock without the time embedding.

    CompVis `model.py: ResnetBlock`.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = Normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Normalize(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:  # "nin" is CompVis's name for a 1x1 convolution: network in network
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_out h w"]:
        # A norm before each convolution keeps the activations at one scale, however deep the network is. The calls
        # are nested because a name would keep its map in memory while the next layer runs.
        h = self.norm2(self.conv1(nonlinearity(self.norm1(x))))  # [b c h w] -> [b c_out h w]
        h = self.conv2(nonlinearity(h))
        # The block learns a correction F to its input, y = x + F(x), because a deep stack of corrections is easier to
        # train than a deep stack of maps (He et al. 2015, arXiv:1512.03385, eq. 1). Where the number of channels
        # changes, a 1x1 convolution takes x to the new number first (their eq. 2).
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    """Self-attention over the pixels, with one head. CompVis `model.py: AttnBlock`."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Normalize(channels)
        # 1x1 convolutions: each maps the channels of a pixel, as a linear layer does, and leaves the pixels apart.
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        h = self.norm(x)
        # A pixel becomes a token of c numbers; the 1 is the single head. On strided tensors the CPU would fall back to
        # a kernel that holds the whole table of (h w) x (h w) weights, so each token is copied into one piece.
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c").contiguous() for f in (self.q, self.k, self.v))
        # A 3x3 convolution only sees neighbours. Here each pixel takes a weighted mean over the whole map, so that two
        # eyes, for example, can agree on their colour: softmax(q kᵀ / √c) v (Vaswani et al. 2017, eq. 1).
        out = rearrange(attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[-2])
        return x + self.proj_out(out)


class Downsample(nn.Module):
    """Half the height and width, by a convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        # A column of zeros on the right and a row below, because CompVis ported this from TensorFlow, which pads like
        # this at stride 2. With zeros on all four sides, as the UNet has them, every map would be shifted by a pixel.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the height and width: repeat each pixel, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        # The convolution smooths the squares that repeating makes. A transposed convolution would do both in one step,
        # but it covers its output unevenly and leaves a checkerboard (Odena et al. 2016, distill.pub).
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The layers at one resolution, in the order in which they run.

    That is each ResnetBlock, followed by its AttnBlock if the level attends; then the step to the next resolution, if
    the encoder or the decoder has set one as `downsample` or `upsample`. Iterate over a level instead of calling it: a
    call would hold its input in memory until the last layer is done.
    """

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attends: bool):
        super().__init__()
        # The first block changes the number of channels, the others keep it.
        self.block = nn.ModuleList(ResnetBlock(out_channels if i else in_channels, out_channels) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(blocks if attends else 0))

    def __iter__(self) -> Iterator[nn.Module]:
        for i, block in enumerate(self.block):
            yield block
            if self.attn:
                yield self.attn[i]
        for step in ("downsample", "upsample"):
            if hasattr(self, step):
                yield getattr(self, step)


class Middle(nn.Module):
    """The lowest resolution of both halves. Attention over all pixels is cheap here, so it is always there."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.block_2(self.attn_1(self.block_1(x)))


# --- the two halves ---------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Picture → what describes each pixel of the latent: 2 · z_channels numbers with `double_z`, else z_channels."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        # From the 3 channels of the picture to the width of the first level, 128 in SD v1.
        channels = config.ch
        self.conv_in = nn.Conv2d(config.in_channels, channels, 3, padding=1)
        # The levels, from the full resolution down. In SD v1 they have 128, 256, 512 and 512 channels. Each but the
        # last ends by halving height and width, so f = 2³ = 8.
        self.down = nn.ModuleList()
        for i, width in enumerate(config.widths):
            level = Level(channels, width, config.num_res_blocks, config.attends(i))
            if i < len(config.widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
            channels = width
        # At the lowest resolution, every pixel is compared with every other.
        self.mid = Middle(channels)
        # The end: few channels, because these are all that is kept. With double_z there are twice as many, for a mean
        # and a log variance.
        self.norm_out = Normalize(channels)
        self.conv_out = nn.Conv2d(channels, (2 if config.double_z else 1) * config.z_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b z h w"]:
        h = self.conv_in(x)  # [b 3 H W] -> [b ch H W]
        # Each level looks at a larger part of the picture with each of its pixels, and has more channels to say what is
        # there. After the levels of SD v1: [b 128 H/2 W/2], [b 256 H/4 W/4], [b 512 H/8 W/8], [b 512 H/8 W/8].
        for level in self.down:
            for layer in level:
                h = layer(h)
        h = self.mid(h)
        # No skip connection leads around this bottleneck, unlike in a UNet: whatever the decoder is to know about the
        # picture has to fit into these few channels.
        return self.conv_out(nonlinearity(self.norm_out(h)))  # [b 512 h w] -> [b 8 h w] in SD v1


class Decoder(nn.Module):
    """Latent → picture: the encoder in reverse, with one more ResnetBlock in each level."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        # From the 4 channels of the latent to the width of the lowest level, 512 in SD v1.
        channels = config.widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels)
        # The levels, from the lowest resolution up. Each but the last ends by doubling height and width.
        levels = []
        for i, width in reversed(list(enumerate(config.widths))):
            level = Level(channels, width, config.num_res_blocks + 1, config.attends(i))
            if i > 0:
                level.upsample = Upsample(width)
            levels.append(level)
            channels = width
        # The checkpoint numbers the levels from the full resolution, so up.0 runs last.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = Normalize(channels)
        self.conv_out = nn.Conv2d(channels, config.out_ch, 3, padding=1)

    def forward(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c H W"]:
        # The layout of the whole picture is settled first, at the lowest resolution, where attention sees all of it.
        h = self.mid(self.conv_in(z))  # [b 4 h w] -> [b 512 h w] in SD v1
        # Then each level adds finer detail: [b 512 2h 2w], [b 512 4h 4w], [b 256 8h 8w], [b 128 8h 8w].
        for level in reversed(self.up):
            for layer in level:
                h = layer(h)
        # The last layer is a plain convolution, without a tanh, so that values may leave [-1, 1] by a little.
        return self.conv_out(nonlinearity(self.norm_out(h)))  # [b 128 H W] -> [b 3 H W]


# --- what lies between them -------------------------------------------------------------------------------------------


class DiagonalGaussianDistribution:
    """q(z | x) = N(mean, diag(std²)): the encoder's prediction of the latent, with its uncertainty.

    Without the variance the encoder could scatter pictures anywhere. Because the decoder has to cope with every sample
    of the Gaussian, latents that are near each other decode to similar pictures. Kingma & Welling, eq. 9; CompVis
    `distributions.py`.

    Args:
        moments: [b 2c h w], the mean and then the log variance.

    Attributes:
        mean, logvar, std, var: [b c h w] each.
    """

    def __init__(self, moments: Float[Tensor, "b two_c h w"]):
        self.mean, logvar = moments.chunk(2, dim=1)
        # The network predicts log σ² because every real number is a valid one. Its exponential is kept from overflowing
        # and from vanishing; the bounds are CompVis's.
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)  # σ = exp(½ log σ²)
        self.var = torch.exp(self.logvar)

    def sample(self, generator: Generators | None = None) -> Float[Tensor, "b c h w"]:
        """z = mean + std · ε with ε ~ N(0, I).

        Args:
            generator: of the CPU, or one for each picture: see `noising.randn`.
        """
        noise = randn(self.mean.shape, generator)
        # The reparametrisation trick: all randomness is in ε, so the gradient reaches mean and std as if they were
        # ordinary activations (Kingma & Welling, section 2.4).
        return self.mean + self.std * noise.to(self.mean, non_blocking=True)

    def mode(self) -> Float[Tensor, "b c h w"]:
        """The most likely latent, which is the mean."""
        return self.mean

    def kl(self) -> Float[Tensor, "b"]:
        """KL(q(z | x) ‖ N(0, I)) in nats, summed over the latent: one number for each picture."""
        # ½ Σ (μ² + σ² - 1 - log σ²) (Kingma & Welling, eq. 10 and appendix B). It is zero for N(0, I). Training adds it
        # with a tiny weight, which only keeps the latents from growing without bound.
        return 0.5 * (self.mean**2 + self.var - 1.0 - self.logvar).sum(dim=(1, 2, 3))

    def nll(self, sample: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
        """-log q(sample | x) in nats, summed over the latent: one number for each picture."""
        # ½ Σ (log 2π + log σ² + (z - μ)² / σ²): minus the logarithm of the Gaussian's density.
        log_two_pi = 1.8378770664093453
        return 0.5 * (log_two_pi + self.logvar + (sample - self.mean) ** 2 / self.var).sum(dim=(1, 2, 3))


# --- the autoencoders -------------------------------------------------------------------------------------------------


class FirstStage(nn.Module):
    """What AutoencoderKL and VQModel share: the way to the latent and back, in parts when memory is short.

    Slicing takes the pictures of a batch one after the other. Every picture comes out as before.

    Tiling cuts each picture into overlapping squares, works on one after the other, and fades each into the next. The
    feature maps are then never larger than those of a tile, so that SD v1 decodes any size in about the memory of
    256x256. There are two costs. It takes longer, about 1.5 times as long at 512x512, because the overlaps are computed
    twice. And the result is only close to that of the whole picture, because GroupNorm and the attention see a single
    tile: colours may drift from tile to tile, and a seam may be faintly visible.

    The tiles and the fading are those of diffusers' `AutoencoderKL.enable_tiling`.
    """

    tiling: tuple[int, int] | None = None  # side of a tile and width of the overlap, in pixels of the latent
    slicing: bool = False

    def _encode(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d h w"]:
        f = self.config.downsampling
        if x.shape[-2] % f or x.shape[-1] % f:
            raise ValueError(f"height and width of a picture must be divisible by {f}, not {x.shape[-2]}x{x.shape[-1]}")
        # The encoder works with z_channels; its 1x1 convolution leads to the embed_dim channels of the latent. In SD v1
        # both are 4: [b 3 H W] -> [b 8 h w] -> [b 8 h w].
        return self._in_parts(lambda part: self.quant_conv(self.encoder(part)), x, scale_in=f, scale_out=1)

    def _decode(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c H W"]:
        f = self.config.downsampling
        # [b 4 h w] -> [b 4 h w] -> [b 3 H W] in SD v1.
        return self._in_parts(lambda part: self.decoder(self.post_quant_conv(part)), z, scale_in=1, scale_out=f)

    def _in_parts(self, network: Callable[[Tensor], Tensor], x: Tensor, scale_in: int, scale_out: int) -> Tensor:
        """network(x), in slices and tiles if these are switched on.

        scale_in, scale_out: how many pixels of its input and of its output belong to a pixel of the latent.
        """

        def run(part: Tensor) -> Tensor:
            if self.tiling is None or max(part.shape[-2:]) <= self.tiling[0] * scale_in:
                return network(part)
            tile, overlap = self.tiling
            return in_tiles(network, part, tile * scale_in, overlap * scale_in, tile * scale_out, overlap * scale_out)

        return torch.cat([run(part) for part in x.split(1)]) if self.slicing and len(x) > 1 else run(x)

    def enable_tiling(self, tile_size: int = 256, overlap: float = 0.25) -> None:
        """Encode and decode in tiles anything that is larger than `tile_size` pixels.

        Args:
            tile_size: side of a tile in pixels of the picture, a multiple of the downsampling factor.
            overlap: the part of its side by which a tile overlaps the next, at least 0 and less than 1.

        Raises:
            ValueError: another tile_size or overlap.
        """
        f = self.config.downsampling
        if tile_size < f or tile_size % f:
            raise ValueError(f"tile_size must be a positive multiple of {f} pixels, not {tile_size}")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must be a part of a tile, at least 0 and less than 1, not {overlap}")
        self.tiling = tile_size // f, int(tile_size // f * overlap)

    def disable_tiling(self) -> None:
        """Encode and decode each picture as a whole again."""
        self.tiling = None

    def enable_slicing(self) -> None:
        """Encode and decode the pictures of a batch one after the other."""
        self.slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode a batch as a whole again."""
        self.slicing = False


class AutoencoderKL(FirstStage):
    """The VAE of Stable Diffusion: `encode` predicts a distribution over latents, `decode` paints a picture.

    Pictures have values in [-1, 1]. Latents are *not* scaled here; `LatentDiffusion` multiplies them by its
    `scale_factor`, so that the UNet sees a standard deviation of about 1. CompVis `autoencoder.py: AutoencoderKL`.

    Raises:
        ValueError: a config without `double_z`, which has no channels for the variance.
    """

    def __init__(self, config: AutoencoderConfig = AutoencoderConfig()):
        super().__init__()
        if not config.double_z:
            raise ValueError("AutoencoderKL needs double_z=True, for mean and log variance; VQModel needs False")
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        # Two 1x1 convolutions, one on each side of the latent, lead from z_channels to embed_dim and back. In SD v1
        # both are 4, so they only mix the channels.
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, x: Float[Tensor, "b 3 H W"]) -> DiagonalGaussianDistribution:
        """Picture in [-1, 1] → the distribution of its latent [b c h w].

        Raises:
            ValueError: a height or width that is not divisible by the downsampling factor (8 in SD v1).
        """
        return DiagonalGaussianDistribution(self._encode(x))

    def decode(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Latent → picture, about in [-1, 1]: clamp it before you show it."""
        return self._decode(z)

    def forward(
        self,
        x: Float[Tensor, "b 3 H W"],
        sample_posterior: bool = True,
        generator: Generators | None = None,
        noise: Float[Tensor, "b c h w"] | None = None,
    ) -> tuple[Float[Tensor, "b 3 H W"], DiagonalGaussianDistribution]:
        """Reconstruction and posterior, from which the training loss is computed.

        Args:
            x: pictures in [-1, 1].
            sample_posterior: decode a sample of the posterior; if False, its mean.
            generator: for the sample.
            noise: is added to the latent before it is decoded.
        """
        posterior = self.encode(x)
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        # The UNet's latents are never quite exact. A decoder that is trained on noisy ones learns to tolerate that.
        return self.decode(z if noise is None else z + noise), posterior


@dataclass(frozen=True)
class IdentityConfig:
    """The config of `IdentityFirstStage`, with the attributes that every first stage's config has."""

    in_channels: int = 3  # RGB

    @property
    def embed_dim(self) -> int:
        """Channels of the latent, which are those of the picture."""
        return self.in_channels

    @property
    def downsampling(self) -> int:
        """1, because a latent pixel is a pixel of the picture."""
        return 1


class IdentityFirstStage(FirstStage):
    """No autoencoder: the latent is the picture, so that diffusion works on pixels, as in DDPM.

    It has no weights, and tiling and slicing make no difference. CompVis `autoencoder.py: IdentityFirstStage`.
    """

    def __init__(self, config: IdentityConfig = IdentityConfig()):
        super().__init__()
        self.config = config

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """Return what was given, a picture or a latent."""
        return x

    encode = decode = forward


# --- a picture in parts -----------------------------------------------------------------------------------------------


def in_tiles(
    network: Callable[[Tensor], Tensor], x: Float[Tensor, "b c h w"], tile: int, overlap: int, tile_out: int,
    overlap_out: int,
) -> Float[Tensor, "b c2 h2 w2"]:  # fmt: skip
    """network(x), computed on one square at a time, row by row.

    Args:
        network: keeps or scales height and width.
        x: the whole picture, or the whole latent.
        tile, overlap: side and overlap of the squares that are cut out of x.
        tile_out, overlap_out: side and overlap of what the network makes of them.
    """
    step, keep = tile - overlap, tile_out - overlap_out
    rows, above = [], []  # finished rows; the uncropped tiles of the row above, which fade out into the next
    for i in range(0, x.shape[-2], step):
        row = []
        for j in range(0, x.shape[-1], step):
            out = network(x[..., i : i + tile, j : j + tile])
            # Neighbouring tiles disagree a little where they overlap, because each saw another part of the picture.
            # Fading from the one into the other hides the seam.
            if above:
                out = fade(above[len(row)], out, overlap_out, dim=-2)
            if row:
                out = fade(row[-1], out, overlap_out, dim=-1)
            row.append(out)
        # The next tile begins where this one is cropped, and has taken over the overlap.
        rows.append(torch.cat([out[..., :keep, :keep] for out in row], dim=-1))
        above = row
    return torch.cat(rows, dim=-2)


def fade(
    a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h2 w2"], extent: int, dim: int
) -> Float[Tensor, "b c h2 w2"]:
    """b, with its first `extent` pixels along `dim` faded in over the last ones of a. `dim` is -1 or -2."""
    extent = min(b.shape[dim], extent)  # a tile at the edge of the picture may be smaller than the overlap
    # Along the overlap, the weight of b rises from 0 in a straight line. It is a row [extent] or a column [extent 1].
    weight = torch.arange(extent, dtype=b.dtype, device=b.device) / max(extent, 1)
    weight = weight if dim == -1 else weight[:, None]
    # Both tiles show the same part of the picture here: the last pixels of a are the first of b. Pixel k of it becomes
    # (1 - k / extent) · a + (k / extent) · b. The rest of b stays.
    end, start = a.narrow(dim, a.shape[dim] - extent, extent), b.narrow(dim, 0, extent)
    return torch.cat([torch.lerp(end, start, weight), b.narrow(dim, extent, b.shape[dim] - extent)], dim=dim)
