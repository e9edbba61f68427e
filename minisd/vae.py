"""The first stage: a picture becomes a small latent, and a latent a picture.

Diffusion at 512x512x3 is slow, and most of those 786,432 numbers are detail that no one would miss. The
autoencoder finds 64x64x4 numbers from which the picture can be drawn again; diffusion then happens there.

    picture [b 3 H W] ─► Encoder ─► quant_conv ─► N(mean, std) ─► z [b 4 h w] ─► post_quant_conv ─► Decoder ─► picture

Source: Kingma & Welling 2013 (arXiv:1312.6114); Esser et al. 2021 (arXiv:2012.09841); Rombach et al. 2022
(arXiv:2112.10752), section 3.1; CompVis `ldm/models/autoencoder.py`, `ldm/modules/diffusionmodules/model.py`.
"""

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

    @property
    def downsampling(self) -> int:
        """f: how many pixels of the picture, along each side, a pixel of the latent stands for (8 in SD v1)."""
        return 2 ** (len(self.ch_mult) - 1)


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
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Self-attention over the pixels with one head, at the bottom of the VAE. CompVis `model.py: AttnBlock`."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
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
    """One resolution: its ResnetBlocks, and the step to the next (`downsample` or `upsample`), if there is one."""

    def __init__(
        self, blocks: list[ResnetBlock], downsample: nn.Module | None = None, upsample: nn.Module | None = None
    ):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        if downsample is not None:
            self.downsample = downsample
        if upsample is not None:
            self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


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
    """Picture → the 2 × z_channels numbers (mean and log variance) of each pixel of the latent."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        c = config.ch
        for i, width in enumerate(widths):
            blocks = [ResnetBlock(c if j == 0 else width, width) for j in range(config.num_res_blocks)]
            self.down.append(Level(blocks, downsample=Downsample(width) if i < len(widths) - 1 else None))
            c = width
        self.mid = Middle(c)
        self.norm_out = nn.GroupNorm(32, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 2 * config.z_channels, 3, padding=1)  # `double_z`: mean and log variance

    def forward(self, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b two_z h w"]:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))


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
            levels.append(Level(blocks, upsample=Upsample(width) if i > 0 else None))
            c = width
        self.up = nn.ModuleList(reversed(levels))  # numbered from the full resolution: up.0 runs last
        self.norm_out = nn.GroupNorm(32, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, config.out_ch, 3, padding=1)

    def forward(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b 3 H W"]:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


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

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "b c h w"]:
        """z = mean + std · ε, ε ~ N(0, I): the reparametrisation trick (Kingma & Welling, section 2.4).

        The noise is drawn on the CPU, so that a seed means the same on every device.
        """
        noise = torch.randn(self.mean.shape, generator=generator, dtype=torch.float32, device="cpu")
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


class AutoencoderKL(nn.Module):
    """The VAE of Stable Diffusion: `encode` gives a distribution, `decode` a picture.

    Pictures have values in [-1, 1]. The latents are *not* scaled here: `LatentDiffusion.scale_factor` does that.
    CompVis `autoencoder.py: AutoencoderKL`.
    """

    def __init__(self, config: AutoencoderConfig = AutoencoderConfig()):
        super().__init__()
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
        f = self.config.downsampling
        if x.shape[-2] % f or x.shape[-1] % f:
            raise ValueError(f"height and width of a picture must be divisible by {f}, not {x.shape[-2]}x{x.shape[-1]}")
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Latent → picture, in about [-1, 1] (clamp before showing it)."""
        return self.decoder(self.post_quant_conv(z))

    def forward(
        self, x: Float[Tensor, "b 3 H W"], sample_posterior: bool = True, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "b 3 H W"], DiagonalGaussianDistribution]:
        """Reconstruction and posterior: what the training loss needs."""
        posterior = self.encode(x)
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z), posterior
