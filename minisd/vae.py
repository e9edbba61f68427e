"""The first stage: a picture becomes a small latent, and a latent a picture.

Diffusion at 512x512x3 is slow, and most of those 786,432 numbers are detail that no one would miss. The
autoencoder finds 64x64x4 numbers from which the picture can be drawn again; diffusion then happens there.

    picture [b 3 H W] ─► Encoder ─► quant_conv ─► N(mean, std) ─► z [b 4 h w] ─► post_quant_conv ─► Decoder ─► picture

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


@dataclass(frozen=True)
class AutoencoderConfig:
    """What an autoencoder is. The defaults are Stable Diffusion v1's KL-f8 (84 million parameters)."""

    in_channels: int = 3  # RGB
    out_ch: int = 3
    ch: int = 128  # width at full resolution; GroupNorm wants a multiple of 32
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level, in ch; each but the last halves the picture
    num_res_blocks: int = 2  # ResnetBlocks a level in the encoder (one more in the decoder)
    z_channels: int = 4  # channels between the convolutions
    embed_dim: int = 4  # channels of the latent
    double_z: bool = True  # the encoder says two numbers for each of z_channels: a mean and a log variance
    resolution: int = 256  # side of the pictures it was made for; only attn_resolutions is counted from it
    attn_resolutions: tuple[int, ...] = ()  # self-attention where the map of such a picture has this side; SD v1: none

    def __post_init__(self):
        sides = [self.resolution // 2**level for level in range(len(self.ch_mult))]
        unmet = [side for side in self.attn_resolutions if side not in sides]
        if unmet:
            raise ValueError(f"attn_resolutions has {unmet[0]}, but the maps have the sides {sides}: choose among them")

    @property
    def downsampling(self) -> int:
        """f: how many pixels of the picture, along each side, a pixel of the latent stands for (8 in SD v1)."""
        return 2 ** (len(self.ch_mult) - 1)

    def attends(self, level: int) -> bool:
        """Whether there is self-attention at this level, counted from the full resolution."""
        return self.resolution // 2**level in self.attn_resolutions


def nonlinearity(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """x · sigmoid(x) (SiLU, or swish), of a fresh x: where no gradient will ask for it, its memory is used again.

    The maps at full resolution are what drawing a picture costs in memory (134 MB each in SD v1, at 512x512), and
    this saves one.
    """
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResnetBlock(nn.Module):
    """Two convolutions, added to the input: the UNet's ResBlock without a time. CompVis `model.py: ResnetBlock`."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps=1e-6)  # 1e-6 throughout the VAE
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_out h w"]:
        # `h` names the normalised map as soon as there is one: the map before is let go while conv2 runs.
        h = self.norm2(self.conv1(nonlinearity(self.norm1(x))))
        h = self.conv2(nonlinearity(h))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Self-attention over the pixels, with one head. CompVis `model.py: AttnBlock`."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        h = self.norm(x)
        # contiguous: over strided tensors the CPU falls back to the kernel that holds the whole (h w) x (h w) table
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c").contiguous() for f in (self.q, self.k, self.v))
        out = rearrange(attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[-2])
        return x + self.proj_out(out)


class Downsample(nn.Module):
    """Half the size, by a convolution of stride 2 that pads right and below only (the UNet's pads all round)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size: repeat each pixel, then smooth by a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """One resolution: its layers, in the order in which they run.

    They are each ResnetBlock, with its attention after it where there is one; then the step to the next resolution,
    `downsample` or `upsample`, where there is one. Whoever runs them does so one by one: to call a level as a whole
    would keep the map that goes in alive until the level is done.
    """

    def __init__(
        self,
        blocks: list[ResnetBlock],
        attn: list[AttnBlock],
        downsample: Downsample | None = None,
        upsample: Upsample | None = None,
    ):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attn)  # one a block, or none at all
        if downsample is not None:
            self.downsample = downsample
        if upsample is not None:
            self.upsample = upsample

    def __iter__(self) -> Iterator[nn.Module]:
        for j, block in enumerate(self.block):
            yield block
            if self.attn:
                yield self.attn[j]
        if hasattr(self, "downsample"):
            yield self.downsample
        if hasattr(self, "upsample"):
            yield self.upsample


class Middle(nn.Module):
    """The bottom of both halves: every pixel may look at every other, once."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Picture → the numbers of each pixel of the latent: 2 × z_channels (mean and log variance) if `double_z`."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        c = config.ch
        for i, width in enumerate(widths):
            blocks = [ResnetBlock(c if j == 0 else width, width) for j in range(config.num_res_blocks)]
            attn = [AttnBlock(width) for _ in blocks if config.attends(i)]
            self.down.append(Level(blocks, attn, downsample=Downsample(width) if i < len(widths) - 1 else None))
            c = width
        self.mid = Middle(c)
        self.norm_out = nn.GroupNorm(32, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, (2 if config.double_z else 1) * config.z_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b z h w"]:
        h = self.conv_in(x)
        for level in self.down:
            for layer in level:
                h = layer(h)
        h = self.mid(h)
        return self.conv_out(nonlinearity(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent → picture: the encoder in reverse, with one ResnetBlock more a level."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        c = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, c, 3, padding=1)
        self.mid = Middle(c)
        levels = []
        for i, width in reversed(list(enumerate(widths))):
            blocks = [ResnetBlock(c if j == 0 else width, width) for j in range(config.num_res_blocks + 1)]
            attn = [AttnBlock(width) for _ in blocks if config.attends(i)]
            levels.append(Level(blocks, attn, upsample=Upsample(width) if i > 0 else None))
            c = width
        self.up = nn.ModuleList(reversed(levels))  # numbered from the full resolution: up.0 runs last
        self.norm_out = nn.GroupNorm(32, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, config.out_ch, 3, padding=1)

    def forward(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c H W"]:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for layer in level:
                h = layer(h)
        return self.conv_out(nonlinearity(self.norm_out(h)))


Generators = torch.Generator | list[torch.Generator] | None  # one for a batch, or one for each of its pictures


class DiagonalGaussianDistribution:
    """q(z given x) = N(mean, diag(exp(logvar))): what the encoder thinks the latent is, and how sure it is.

    `moments` [b 2c h w] holds mean and log variance, one after the other. CompVis `distributions.py`, with the same
    clamp of the log variance to [-30, 20].
    """

    def __init__(self, moments: Float[Tensor, "b two_c h w"]):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def sample(self, generator: Generators = None) -> Float[Tensor, "b c h w"]:
        """z = mean + std · ε, ε ~ N(0, I): the reparametrisation trick (Kingma & Welling, section 2.4).

        The noise is drawn on the CPU, so that a seed means the same on every device; with a list of generators, that
        of each picture comes from its own, whatever else is in the batch.
        """
        shape = self.mean.shape
        if isinstance(generator, list):
            noise = torch.stack([torch.randn(shape[1:], generator=one) for one in generator])
        else:
            noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Float[Tensor, "b c h w"]:
        """The most likely latent: the mean."""
        return self.mean

    def kl(self) -> Float[Tensor, "b"]:
        """KL(q(z given x) ‖ N(0, I)) = ½ Σ (mean² + var - 1 - log var), in nats, one number a picture."""
        return 0.5 * (self.mean**2 + self.var - 1.0 - self.logvar).sum(dim=(1, 2, 3))

    def nll(self, sample: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
        """-log q(sample given x), in nats: ½ Σ (log 2π + log var + (sample - mean)² / var)."""
        log_two_pi = 1.8378770664093453
        return 0.5 * (log_two_pi + self.logvar + (sample - self.mean) ** 2 / self.var).sum(dim=(1, 2, 3))


class FirstStage(nn.Module):
    """What the first stages share: both ways between picture and latent, in smaller parts where memory is short.

    Slicing takes one picture of a batch after the other: the numbers stay what they are.

    Tiling cuts each picture into overlapping squares, one after the other, and fades each into the next. It saves
    memory: the maps are only as large as a tile, so that SD v1 decodes any size in about the memory of 256x256. It
    costs time (at 512x512 half as much again, as tiles overlap) and truth: GroupNorm measures mean and variance, and
    the attention looks around, within one tile alone. Colours may drift from tile to tile, and a faint seam may show:
    the picture is near the whole one, not equal to it.

    Same tiles and same fading as diffusers' `AutoencoderKL.enable_tiling`.
    """

    tiling: tuple[int, int] | None = None  # side of a tile and width of an overlap, in pixels of the latent
    slicing: bool = False

    def enable_tiling(self, tile_size: int = 256, overlap: float = 0.25) -> None:
        """Encode and decode what is larger than `tile_size` pixels in tiles of that side.

        Args:
            tile_size: pixels of the picture, a multiple of the downsampling factor.
            overlap: the part of a tile that its neighbour computes too, between 0 and 1 (1 excluded).

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
        """Encode and decode one picture of a batch after the other."""
        self.slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode a batch as a whole again."""
        self.slicing = False

    def _encode(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d h w"]:
        f = self.config.downsampling
        if x.shape[-2] % f or x.shape[-1] % f:
            raise ValueError(f"height and width of a picture must be divisible by {f}, not {x.shape[-2]}x{x.shape[-1]}")
        return self._in_parts(lambda part: self.quant_conv(self.encoder(part)), x, scale_in=f, scale_out=1)

    def _decode(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c H W"]:
        f = self.config.downsampling
        return self._in_parts(lambda part: self.decoder(self.post_quant_conv(part)), z, scale_in=1, scale_out=f)

    def _in_parts(self, network: Callable[[Tensor], Tensor], x: Tensor, scale_in: int, scale_out: int) -> Tensor:
        """network(x), or the same in slices and tiles. `scale_…`: pixels, there, of one pixel of the latent."""

        def run(part: Tensor) -> Tensor:
            if self.tiling is None or max(part.shape[-2:]) <= self.tiling[0] * scale_in:
                return network(part)
            tile, overlap = self.tiling
            return in_tiles(network, part, tile * scale_in, overlap * scale_in, tile * scale_out, overlap * scale_out)

        return torch.cat([run(part) for part in x.split(1)]) if self.slicing and len(x) > 1 else run(x)


def in_tiles(
    network: Callable[[Tensor], Tensor], x: Float[Tensor, "b c h w"], tile: int, overlap: int, tile_out: int,
    overlap_out: int,
) -> Float[Tensor, "b c2 h2 w2"]:  # fmt: skip
    """network(x), a square of side `tile` at a time, row by row; each fades in over the one above and the one before.

    `tile_out`, `overlap_out`: side and overlap of what the network makes of a tile.
    """
    step, keep = tile - overlap, tile_out - overlap_out
    rows, above = [], []
    for i in range(0, x.shape[-2], step):
        row = []
        for j in range(0, x.shape[-1], step):
            out = network(x[..., i : i + tile, j : j + tile])
            if above:
                out = fade(above[len(row)], out, overlap_out, dim=-2)
            if row:
                out = fade(row[-1], out, overlap_out, dim=-1)
            row.append(out)
        rows.append(torch.cat([out[..., :keep, :keep] for out in row], dim=-1))
        above = row
    return torch.cat(rows, dim=-2)


def fade(
    a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h2 w2"], extent: int, dim: int
) -> Float[Tensor, "b c h2 w2"]:
    """b, but along `dim` its pixels k < extent are (1 - k / extent) · the last ones of a + (k / extent) · its own."""
    extent = min(b.shape[dim], extent)  # a tile at the edge may be smaller than an overlap
    weight = torch.arange(extent, dtype=b.dtype, device=b.device) / max(extent, 1)
    weight = weight if dim == -1 else weight[:, None]
    end, start = a.narrow(dim, a.shape[dim] - extent, extent), b.narrow(dim, 0, extent)
    return torch.cat([torch.lerp(end, start, weight), b.narrow(dim, extent, b.shape[dim] - extent)], dim=dim)


class AutoencoderKL(FirstStage):
    """The VAE of Stable Diffusion: `encode` gives a distribution, `decode` a picture.

    Pictures have values in [-1, 1]. The latents are *not* scaled here: `LatentDiffusion.scale_factor` does that.
    CompVis `autoencoder.py: AutoencoderKL`.

    Raises:
        ValueError: a config without `double_z`, which leaves no room for the variance.
    """

    def __init__(self, config: AutoencoderConfig = AutoencoderConfig()):
        super().__init__()
        if not config.double_z:
            raise ValueError("AutoencoderKL needs double_z=True, for mean and log variance; VQModel needs False")
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, x: Float[Tensor, "b 3 H W"]) -> DiagonalGaussianDistribution:
        """Picture in [-1, 1] → the distribution of its latent.

        Raises:
            ValueError: a height or width that is not divisible by the downsampling factor (8 in SD v1).
        """
        return DiagonalGaussianDistribution(self._encode(x))

    def decode(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Latent → picture, in about [-1, 1] (clamp before showing it)."""
        return self._decode(z)

    def forward(
        self,
        x: Float[Tensor, "b 3 H W"],
        sample_posterior: bool = True,
        generator: Generators = None,
        noise: Float[Tensor, "b c h w"] | None = None,
    ) -> tuple[Float[Tensor, "b 3 H W"], DiagonalGaussianDistribution]:
        """Reconstruction and posterior: what the training loss needs. `noise` is added to the latent on its way."""
        posterior = self.encode(x)
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z if noise is None else z + noise), posterior


@dataclass(frozen=True)
class IdentityConfig:
    """What `IdentityFirstStage` is: the face of a config that every first stage shows."""

    in_channels: int = 3  # RGB

    @property
    def embed_dim(self) -> int:
        """Channels of the latent: those of the picture."""
        return self.in_channels

    @property
    def downsampling(self) -> int:
        """A pixel of the latent stands for one of the picture."""
        return 1


class IdentityFirstStage(FirstStage):
    """No autoencoder at all: the latent is the picture, and diffusion works on pixels, as in DDPM.

    It has no weights, and tiling and slicing change nothing. CompVis `autoencoder.py: IdentityFirstStage`.
    """

    def __init__(self, config: IdentityConfig = IdentityConfig()):
        super().__init__()
        self.config = config

    def encode(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """The picture itself."""
        return x

    def decode(self, z: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """The latent itself."""
        return z

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """The picture itself."""
        return x
