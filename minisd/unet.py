"""Stage 3: the UNet, the network that predicts the noise in a noisy latent.

    eps = unet(x, timesteps, context)          the widths and sizes are those of Stable Diffusion v1

    x [b 4 64 64]                                                                        eps [b 4 64 64]
      ▼                                                                                           ▲
     320 channels, 64×64  ──────────────────── skip connections ───────────────────►  320 channels, 64×64
       ▼                                                                                         ▲
       640 channels, 32×32  ────────────────────────────────────────────────────►  640 channels, 32×32
         ▼                                                                                     ▲
        1280 channels, 16×16  ───────────────────────────────────────────────►  1280 channels, 16×16
           ▼                                                                                 ▲
          1280 channels, 8×8  ────────────────────────────────────────────────►  1280 channels, 8×8
             ▼                                                                             ▲
             └───────────────────────► middle_block: 1280 channels, 8×8 ───────────────────┘
      input_blocks: the way down                                          output_blocks: the way up

The network has to separate the noise from the picture. For that it must know what the picture shows, and it must
answer for every single pixel. The way down gives the first: each level halves the map, so a 3×3 convolution covers
twice the height and width of the picture. But fine detail does not fit into a small map. The skip connections bring it
back: each block of the way up also receives what a block of the way down computed at the same size (U-Net).

Three kinds of layers do the work, and they are read in this order:

    ResBlock               mixes each pixel with its neighbours, and is told the timestep
    SpatialTransformer     lets each pixel read all other pixels, and then the prompt: `attention.py`
    Downsample, Upsample   change the size of the map

The comments write shapes as [batch channels height width], and cite these papers:

    U-Net         Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image …", 2015 (arXiv:1505.04597)
    Transformer   Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762)
    DDPM          Ho et al., "Denoising Diffusion Probabilistic Models", 2020 (arXiv:2006.11239)
    ADM           Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021 (arXiv:2105.05233)
    LDM           Rombach et al., "High-Resolution Image Synthesis with Latent …", 2022 (arXiv:2112.10752)

Classes and parameters have the names of CompVis, `ldm/modules/diffusionmodules/openaimodel.py`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import AttentionBlock, SpatialTransformer, zero_module


def timestep_embedding(timesteps: Int[Tensor, "b"], dim: int, max_period: float = 10_000) -> Float[Tensor, "b dim"]:
    """Turn each timestep into a vector that a linear layer can read.

    A layer could only scale a bare number t. Cosines and sines of many frequencies give each timestep a pattern of its
    own, and neighbouring timesteps similar patterns. (Transformer, section 3.5; CompVis: util.py, timestep_embedding)

    Args:
        timesteps: [b], integers, one for each picture.
        dim: length of each vector.
        max_period: the slowest pair of waves repeats after about 2π times as many timesteps.

    Returns [b dim] in float32, in [-1, 1]: the cosines, then the sines, then a zero if `dim` is odd.
    """
    half = dim // 2
    # ω_i = 10000^(-i / half), for i = 0 … half-1. The fast waves tell t from t + 1, the slow ones early from late:
    # they work together as the digits of a number do.
    i = torch.arange(half, dtype=torch.float32, device="cpu")
    frequencies = torch.exp(-math.log(max_period) * i / half).to(timesteps.device)
    # [b 1] · [1 half] -> [b half]. This needs float32, because bfloat16 would round t = 999 to 1000.
    angles = timesteps[:, None].float() * frequencies[None]
    # The weights that follow were trained with the cosines first. DDPM's own code has the sines first and divides
    # by half - 1, so an embedding made there does not fit a network trained here.
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim - 2 * half))


class ResBlock(nn.Module):
    """Mix each pixel with its neighbours, at a known timestep, and add the result to the input.

        x + f₂( f₁(x) + W SiLU(emb) )          f = Conv3×3 ∘ SiLU ∘ GroupNorm                  (ADM, section 3)

    `channels` become `out_channels`; height and width stay. (CompVis: openaimodel.py, ResBlock)
    """

    def __init__(self, channels: int, emb_channels: int, out_channels: int, dropout: float = 0.0):
        super().__init__()
        # The norm comes first, so that the layers after it get numbers of one scale, however deep in the network the
        # block is. GroupNorm takes mean and variance over each of 32 groups of channels, within one picture. BatchNorm
        # would take them over the batch, in which pictures have different timesteps, and so different amounts of noise.
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels),  # PyTorch's default eps, 1e-5, is the one that the checkpoint was trained with
            nn.SiLU(),  # x · sigmoid(x)
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        # The last convolution starts at zero, so a new block returns its input. However many blocks there are, the
        # signal and the gradient pass through all of them from the first step of training on.
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        # A sum needs equal numbers of channels. Where they differ, a 1×1 convolution brings the input to the new width.
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"], emb: Float[Tensor, "b e"]) -> Float[Tensor, "b c_out h w"]:
        # Normalise, activate, convolve: [b c h w] -> [b c_out h w].
        h = self.in_layers(x)
        # [b e] -> [b c_out 1 1]: one number for each channel is added to all pixels alike. It says how noisy the input
        # is, and so the activation that follows lets more or less of a channel through. SD v1 only shifts; ADM also
        # scales ("adaptive group normalization", section 3.1).
        h = h + self.emb_layers(emb)[:, :, None, None]
        # A second round at the new width. Two 3×3 convolutions let each pixel see 5×5 of the input.
        h = self.out_layers(h)
        # The block computes a correction to its input, which is easier to learn than the whole output
        # (He et al., "Deep Residual Learning for Image Recognition", 2016, eq. 1 and 2).
        return self.skip_connection(x) + h


class Downsample(nn.Module):
    """Halve height and width. An odd side is rounded up. (CompVis: openaimodel.py, Downsample)"""

    def __init__(self, channels: int):
        super().__init__()
        # A convolution with stride 2 learns what to keep. Pooling would decide that beforehand. One pixel is padded on
        # each side; the VAE's Downsample pads only on the right and at the bottom.
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.op(x)  # [b c h w] -> [b c h/2 w/2]


class Upsample(nn.Module):
    """Double height and width. (CompVis: openaimodel.py, Upsample)"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"], size: tuple[int, int] | None = None) -> Float[Tensor, "b c h2 w2"]:
        """Enlarge x to twice its size, or to `size` (height, width) where the skip connection has an odd side."""
        height, width = size or (2 * x.shape[-2], 2 * x.shape[-1])
        # Each pixel becomes a block of 2×2 equal ones, and the convolution smooths the blocks. A transposed convolution
        # would do both at once, but leaves a checkerboard pattern (Odena et al., "Deconvolution and Checkerboard
        # Artifacts", 2016).
        return self.conv(F.interpolate(x, (height, width), mode="nearest"))


class TimestepEmbedSequential(nn.Sequential):
    """One block of the UNet: a few layers in a row, each given the inputs that it takes beside the feature map.

    A plain nn.Sequential passes one tensor on and nothing else. (CompVis: openaimodel.py, TimestepEmbedSequential)
    """

    use_checkpoint: bool = False  # set for all blocks at once by UNetModel.use_checkpoint

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                inputs = x, emb
            elif isinstance(layer, SpatialTransformer):
                inputs = x, context
            elif isinstance(layer, Upsample):
                inputs = x, size
            else:  # a convolution, a Downsample, or the AttentionBlock of a UNet that reads no text
                inputs = (x,)
            # Training keeps everything that is computed inside a layer, because the backward pass needs it. Gradient
            # checkpointing keeps only what enters the layer, and computes the inside again once the gradients reach
            # it: a quarter more computation for a small part of the memory (Chen et al. 2016, arXiv:1604.06174).
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return x


@dataclass(frozen=True)
class UNetConfig:
    """What a UNet is. The defaults are Stable Diffusion v1's 860 million parameters."""

    in_channels: int = 4  # channels of the latent
    out_channels: int = 4  # channels of the predicted noise
    model_channels: int = 320  # width of the first level; a multiple of 32, because GroupNorm makes 32 groups
    num_res_blocks: int = 2  # ResBlocks in each level on the way down (one more on the way up)
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level in multiples of model_channels
    attention_resolutions: tuple[int, ...] = (4, 2, 1)  # levels with transformers, by downsampling factor
    num_heads: int | None = 8  # attention heads at every level, so that a head grows with the width; or None, and …
    num_head_channels: int | None = None  # … channels in each head, so that the number of heads grows instead
    use_spatial_transformer: bool = True  # False: self-attention alone (AttentionBlock), for a UNet that reads no text
    transformer_depth: int = 1  # transformer blocks in each SpatialTransformer
    context_dim: int | None = 768  # width of the context; None for a UNet that takes none
    dropout: float = 0.0

    def heads(self, channels: int) -> int:
        """Number of attention heads at a level of that many channels."""
        return self.num_heads if self.num_head_channels is None else channels // self.num_head_channels


class UNetModel(nn.Module):
    """eps = unet(x, timesteps, context): predict the noise in x.

    The parameters have the names of `sd-v1-4.ckpt`, under `model.diffusion_model`.
    (LDM, section 3.2 and 3.3; CompVis: openaimodel.py, UNetModel)
    """

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        if config.num_res_blocks < 0:
            raise ValueError(f"num_res_blocks is {config.num_res_blocks}, but a level has 0 ResBlocks or more")
        self.config = config
        time_embed_dim = 4 * config.model_channels

        def res_block(in_channels: int, out_channels: int) -> ResBlock:
            return ResBlock(in_channels, time_embed_dim, out_channels, config.dropout)

        def transformer(channels: int) -> SpatialTransformer | AttentionBlock:
            # The channels are divided among the heads: in SD v1, 8 heads with 40, 80 or 160 channels each.
            heads = config.heads(channels)
            if heads < 1 or channels % heads:
                raise ValueError(f"{channels} channels can't be divided among {heads} heads")
            if not config.use_spatial_transformer:
                return AttentionBlock(channels, heads)  # the pixels read each other, and there is no text
            head_channels = channels // heads
            return SpatialTransformer(
                channels, heads, head_channels, config.transformer_depth, config.context_dim, config.dropout
            )

        # The sinusoids of a timestep are the same for every network. Two linear layers turn them into what this one
        # wants to know about the timestep, and all ResBlocks share the result: [b 320] -> [b 1280].
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, time_embed_dim), nn.SiLU(), nn.Linear(time_embed_dim, time_embed_dim)
        )

        # -- the way down ----------------------------------------------------------------------------------
        # SD v1 has 12 input blocks of these widths, where ↓ is a Downsample:
        #     320 320 320 ↓320 640 640 ↓640 1280 1280 ↓1280 1280 1280
        # The first is a convolution that takes the 4 channels of the latent to the width of the first level.
        channels = config.model_channels
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(nn.Conv2d(config.in_channels, channels, 3, padding=1))]
        )
        skip_channels = [channels]  # the width of each input block's output, for the way up
        downsampling = 1  # by what factor the map is smaller than the latent
        for level, multiple in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                layers = [res_block(channels, multiple * config.model_channels)]
                channels = multiple * config.model_channels
                # Attention costs the square of the number of pixels, yet SD v1 has it even at the full size. It leaves
                # it out at the smallest, 8×8, where only the middle block has it.
                if downsampling in config.attention_resolutions:
                    layers.append(transformer(channels))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skip_channels.append(channels)
            if level < len(config.channel_mult) - 1:
                self.input_blocks.append(TimestepEmbedSequential(Downsample(channels)))
                skip_channels.append(channels)
                downsampling *= 2

        # -- the bottom ------------------------------------------------------------------------------------
        # The smallest map is where attention is cheapest and where each pixel stands for most of the picture, so the
        # middle block always has it, whatever `attention_resolutions` says.
        self.middle_block = TimestepEmbedSequential(
            res_block(channels, channels), transformer(channels), res_block(channels, channels)
        )

        # -- the way up ------------------------------------------------------------------------------------
        # The levels come in reverse order, and there is one output block for each input block. That makes one ResBlock
        # more in each level than on the way down, because the first convolution and the Downsamples have a skip too.
        self.output_blocks = nn.ModuleList()
        for level, multiple in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                # The skip is concatenated to the input, so the ResBlock takes the channels of both.
                layers = [res_block(channels + skip_channels.pop(), multiple * config.model_channels)]
                channels = multiple * config.model_channels
                if downsampling in config.attention_resolutions:
                    layers.append(transformer(channels))
                # An Upsample shares a block with the layers before it, where a Downsample has a block of its own.
                if level > 0 and i == config.num_res_blocks:
                    layers.append(Upsample(channels))
                    downsampling //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        # Back to the 4 channels of the latent. This convolution starts at zero too, so a new UNet predicts 0, the mean
        # of the noise, and its first loss is the variance of the noise, 1.
        self.out = nn.Sequential(
            nn.GroupNorm(32, channels),
            nn.SiLU(),
            zero_module(nn.Conv2d(channels, config.out_channels, 3, padding=1)),
        )

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        timesteps: Int[Tensor, "b"],
        context: Float[Tensor, "b n d"] | None = None,
    ) -> Float[Tensor, "b c_out h w"]:
        """Predict the noise.

        Args:
            x: [b in_channels h w], noisy latents of any height and width.
            timesteps: [b], integers in [0, 1000), one for each picture.
            context: [b n context_dim], the output of the text encoder, n tokens for each prompt.

        Returns [b out_channels h w], of about unit variance.

        Raises:
            ValueError: x has other channels than in_channels, or the context is missing or has another width.
        """
        self._check(x, context)
        # The timestep, as a vector that all ResBlocks read: [b] -> [b 320] -> [b 1280].
        emb = timestep_embedding(timesteps, self.config.model_channels).to(x.dtype)
        emb = self.time_embed(emb)

        # The way down: [b 4 64 64] -> [b 320 64 64] -> [b 640 32 32] -> [b 1280 16 16] -> [b 1280 8 8].
        # The output of every block is kept for the way up.
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)

        # The bottom, [b 1280 8 8]: here each of the 64 pixels gathers from the whole picture and from the prompt.
        h = self.middle_block(h, emb, context)

        # The way up, back to [b 320 64 64]. The skips are taken from the end, because the last map of the way down has
        # the size of the first of the way up. Concatenating them, instead of adding, leaves it to the ResBlock's
        # convolution what to take from the detail and what from the overview.
        for block in self.output_blocks:
            # This is a line of its own so that the two parts are freed before the block runs.
            h = torch.cat([h, skips.pop()], dim=1)
            # An Upsample aims at the size of the next skip, since a side of 5 was halved to 3 and twice 3 is 6.
            h = block(h, emb, context, skips[-1].shape[-2:] if skips else None)

        # [b 320 64 64] -> [b 4 64 64]
        return self.out(h)

    def use_checkpoint(self, on: bool = True) -> None:
        """Switch gradient checkpointing on or off: training in less memory and more time, with the same gradients.

        It says how a UNet is run and not what it is, so it is no part of the configuration.
        """
        for block in [*self.input_blocks, self.middle_block, *self.output_blocks]:
            block.use_checkpoint = on

    def _check(self, x: Tensor, context: Tensor | None) -> None:
        config = self.config
        if x.shape[1] != config.in_channels:
            raise ValueError(
                f"this UNet takes {config.in_channels} channels, and x has {x.shape[1]}: give it latents "
                f"[b {config.in_channels} h w]"
            )
        if config.context_dim is None or not config.use_spatial_transformer:
            return
        width = None if context is None else context.shape[-1]
        if width != config.context_dim:
            raise ValueError(
                f"this UNet reads a context of width {config.context_dim}, and {width or 'none'} was given: pass "
                f"context=[b n {config.context_dim}], the output of the text encoder that it was trained with"
            )
