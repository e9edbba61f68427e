"""The UNet: the one network that learns to see the noise in a noisy latent.

    x [b 4 h w] ──► input_blocks ──► middle_block ──► output_blocks ──► eps [b 4 h w]
                      │  each output is kept, and handed across  ▲
                      └──────────────────────────────────────────┘

Going down, the map gets smaller and wider: fine detail first, the whole picture last. Coming up, each block
is given what the block on the same level saw on the way down. A ResBlock mixes neighbouring pixels and is told
the time t; a SpatialTransformer lets all pixels talk to each other and read the prompt.

Source: Ronneberger et al. 2015 (arXiv:1505.04597); Dhariwal & Nichol 2021 (arXiv:2105.05233); Rombach et al. 2022
(arXiv:2112.10752); CompVis `ldm/modules/diffusionmodules/openaimodel.py`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import AttentionBlock, SpatialTransformer, zero_module


@dataclass(frozen=True)
class UNetConfig:
    """What a UNet is. The defaults are Stable Diffusion v1's 860 million parameters."""

    in_channels: int = 4  # channels of the latent
    out_channels: int = 4  # channels of the predicted noise
    model_channels: int = 320  # width at full resolution; GroupNorm wants a multiple of 32
    num_res_blocks: int = 2  # ResBlocks a level on the way down (one more on the way up)
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level, in model_channels; each halves the map
    attention_resolutions: tuple[int, ...] = (4, 2, 1)  # downsampling factors at which there are transformers
    num_heads: int | None = 8  # heads at each level: the head grows with the width. Or None and …
    num_head_channels: int | None = None  # … channels a head: the number of heads grows with the width
    use_spatial_transformer: bool = True  # False: self-attention alone (AttentionBlock), in a UNet that reads no text
    transformer_depth: int = 1  # blocks in each SpatialTransformer
    context_dim: int | None = 768  # width of the text context; None for a UNet without one
    dropout: float = 0.0
    use_checkpoint: bool = False  # gradient checkpointing: less memory, a third more time

    def heads(self, channels: int) -> int:
        """Number of attention heads at a level of that many channels."""
        return self.num_heads if self.num_head_channels is None else channels // self.num_head_channels


def timestep_embedding(timesteps: Int[Tensor, "b"], dim: int, max_period: float = 10_000) -> Float[Tensor, "b dim"]:
    """The time as a point on dim/2 circles of ever slower rotation, so that near times look alike and all differ.

    emb_i = cos(t / 10000^(i/half)), then the sines (Vaswani et al. 2017, section 3.5, with the cosines first, as in
    CompVis `util.py: timestep_embedding`; the original DDPM code has the sines first and divides by half - 1). An odd
    `dim` ends in a zero.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32) / half).to(timesteps.device)
    angles = timesteps[:, None].float() * frequencies[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim - 2 * half))


class ResBlock(nn.Module):
    """Two convolutions around the time embedding, added to the input.

    CompVis `openaimodel.py: ResBlock`. The last convolution starts at zero: a new block is the identity.
    """

    def __init__(
        self, channels: int, emb_channels: int, out_channels: int, dropout: float = 0.0, use_checkpoint: bool = False
    ):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels),  # eps 1e-5, the default
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        self.use_checkpoint = use_checkpoint

    def forward(self, x: Float[Tensor, "b c h w"], emb: Float[Tensor, "b e"]) -> Float[Tensor, "b c_out h w"]:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        h = h + self.emb_layers(emb)[:, :, None, None]  # the same shift for every pixel: what time it is
        h = self.out_layers(h)
        return self.skip_connection(x) + h


class Downsample(nn.Module):
    """Half the size, by a convolution of stride 2 that pads one pixel on each side."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.op(x)


class Upsample(nn.Module):
    """Twice the size: repeat each pixel, then smooth by a convolution.

    `size`: of what comes out, if not exactly twice. An odd side was rounded up when it was halved, and comes back odd.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"], size: tuple[int, int] | None = None) -> Float[Tensor, "b c h2 w2"]:
        height, width = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, (height, width), mode="nearest"))


class TimestepEmbedSequential(nn.Sequential):
    """A sequence that hands each layer what it wants beside x: the time, the context, the size to come back to."""

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class UNetModel(nn.Module):
    """eps = unet(x, timesteps, context): the noise in x, as far as the network can tell.

    The parameters are named as in `sd-v1-4.ckpt`, under `model.diffusion_model`. CompVis `openaimodel.py: UNetModel`.
    """

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        channels = config.model_channels
        time_embed_dim = 4 * channels

        def res_block(c_in: int, c_out: int) -> ResBlock:
            return ResBlock(c_in, time_embed_dim, c_out, config.dropout, config.use_checkpoint)

        def transformer(c: int) -> SpatialTransformer | AttentionBlock:
            heads, depth = config.heads(c), config.transformer_depth
            if not config.use_spatial_transformer:
                return AttentionBlock(c, heads)
            return SpatialTransformer(
                c, heads, c // heads, depth, config.context_dim, config.dropout, config.use_checkpoint
            )

        self.time_embed = nn.Sequential(
            nn.Linear(channels, time_embed_dim), nn.SiLU(), nn.Linear(time_embed_dim, time_embed_dim)
        )

        # Down. In SD v1: 320 320 320 ↓ 320 640 640 ↓ 640 1280 1280 ↓ 1280 1280 1280
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(nn.Conv2d(config.in_channels, channels, 3, padding=1))]
        )
        c, factor, skips = channels, 1, [channels]  # `skips`: what will be handed across, by its channels
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                layers = [res_block(c, mult * channels)]
                c = mult * channels
                if factor in config.attention_resolutions:
                    layers.append(transformer(c))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(c)
            if level < len(config.channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(Downsample(c)))
                skips.append(c)
                factor *= 2

        self.middle_block = TimestepEmbedSequential(res_block(c, c), transformer(c), res_block(c, c))

        # Up, with one ResBlock more a level: there is a skip for each input block, the convolution and the
        # downsampling ones too.
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                layers = [res_block(c + skips.pop(), mult * channels)]
                c = mult * channels
                if factor in config.attention_resolutions:
                    layers.append(transformer(c))
                if level > 0 and i == config.num_res_blocks:
                    layers.append(Upsample(c))
                    factor //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(
            nn.GroupNorm(32, c), nn.SiLU(), zero_module(nn.Conv2d(c, config.out_channels, 3, padding=1))
        )

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        timesteps: Int[Tensor, "b"],
        context: Float[Tensor, "b n d"] | None = None,
    ) -> Float[Tensor, "b c_out h w"]:
        """Predict the noise.

        Args:
            x: noisy latent, of any height and width.
            timesteps: integers in [0, 1000), one for each picture.
            context: what the text encoder made of the prompts.

        Raises:
            ValueError: other channels than in_channels, or a context that is missing or of another width.
        """
        self._check(x, context)
        emb = timestep_embedding(timesteps, self.config.model_channels).to(x.dtype)
        emb = self.time_embed(emb)
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)  # a line of its own: the two parts are not needed beyond it
            h = block(h, emb, context, skips[-1].shape[-2:] if skips else None)
        return self.out(h)

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        config = self.config
        if x.shape[1] != config.in_channels:
            raise ValueError(f"this UNet takes {config.in_channels} channels, and x has {x.shape[1]}")
        if config.context_dim is None or not config.use_spatial_transformer:
            return
        if context is None:
            raise ValueError(f"this UNet reads a context of width {config.context_dim}, and none was given")
        if context.shape[-1] != config.context_dim:
            raise ValueError(f"this UNet reads a context of width {config.context_dim}, not {context.shape[-1]}")


class BlockOutline(NamedTuple):
    """One block of a UNet, as `outline` tells of it. Shapes are (channels, height, width)."""

    name: str  # as in the checkpoint: "input_blocks.1"
    layers: tuple[str, ...]  # the classes of what is in it
    shape_in: tuple[int, int, int]  # of an output block: with what was handed across
    shape_out: tuple[int, int, int]
    skip: str  # the input block that hands its output across to here, or ""
    parameters: int


@torch.no_grad()
def outline(config: UNetConfig = UNetConfig(), size: int = 64) -> list[BlockOutline]:
    """The blocks of a UNet in the order of its forward pass, for latents of `size` by `size` pixels.

    It is built and run without memory and without arithmetic (torch's "meta" device): the shapes are what really
    came out, even of a UNet that this computer could not hold.
    """
    with torch.device("meta"):
        unet = UNetModel(config)
        x, t = torch.empty(1, config.in_channels, size, size), torch.empty(1, dtype=torch.int64)
        context = None if config.context_dim is None else torch.empty(1, 1, config.context_dim)
    named = {f"input_blocks.{i}": block for i, block in enumerate(unet.input_blocks)}
    named["middle_block"] = unet.middle_block
    named |= {f"output_blocks.{i}": block for i, block in enumerate(unet.output_blocks)}
    named["out"] = unet.out

    shapes = {}

    def watch(name: str):
        return lambda _, args, out: shapes.update({name: (tuple(args[0].shape[1:]), tuple(out.shape[1:]))})

    for name, block in named.items():
        block.register_forward_hook(watch(name))
    unet(x, t, context)

    across = [f"input_blocks.{i}" for i in range(len(unet.input_blocks))]
    return [
        BlockOutline(
            name,
            tuple(type(layer).__name__ for layer in block),
            *shapes[name],
            across.pop() if name.startswith("output_blocks") else "",
            sum(p.numel() for p in block.parameters()),
        )
        for name, block in named.items()
    ]
