"""Exercises of stage 3: the parts of the UNet, and where the text comes in."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from minisd import attention as attention_module
from minisd import clip as clip_module
from minisd import unet as unet_module
from minisd import vae as vae_module
from minisd.attention import BasicTransformerBlock

from .exercise import case, exercise
from .places import instead_of, method

Layer = Callable[[Tensor], Tensor]


def maps(b: int = 2, c: int = 4, h: int = 3, w: int = 5) -> Float[Tensor, "b c h w"]:
    return torch.randn(b, c, h, w)


def tokens(b: int, n: int, d: int) -> Float[Tensor, "b n d"]:
    return torch.randn(b, n, d)


# --- the time --------------------------------------------------------------------------------------------------------


@instead_of("timestep_embedding", unet_module)
def _put_embedding(f, real, timesteps, dim, max_period=10_000):
    return f(timesteps, dim, max_period).float()


@exercise(tolerance=2e-3, swap=_put_embedding)
@case("three times, 8 numbers each", lambda: (torch.tensor([0, 7, 40]), 8, 10_000))
@case("one time", lambda: (torch.tensor([13]), 6, 10_000))
@case("another period", lambda: (torch.tensor([2, 5]), 8, 100))
@case("as many times as numbers", lambda: (torch.tensor([1, 3, 9, 27]), 4, 10_000))
def timestep_embedding(timesteps: Int[Tensor, "b"], dim: int, max_period: float) -> Float[Tensor, "b dim"]:
    """The time as a point on dim/2 circles of ever slower rotation: first all cosines, then all sines.

        angle_i = t / max_period^(i/half),   i = 0 ... half-1,   half = dim/2

    `dim` is even. (CompVis: ldm/modules/diffusionmodules/util.py, timestep_embedding)
    """
    # BEGIN SOLUTION
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half) / half)
    angles = timesteps[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
    # END SOLUTION


# --- attention -------------------------------------------------------------------------------------------------------


@instead_of("attention", attention_module, vae_module, clip_module)
def _put_attention(f, real, q, k, v, causal=False, record=None):
    return real(q, k, v, causal, record) if causal or record else f(q, k, v).to(v)


@exercise(swap=_put_attention)
@case("5 queries, 7 keys", lambda: (torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)))
@case("as many queries as keys", lambda: (torch.randn(2, 2, 4, 6), torch.randn(2, 2, 4, 6), torch.randn(2, 2, 4, 6)))
@case("all sizes equal", lambda: (torch.randn(4, 4, 4, 4), torch.randn(4, 4, 4, 4), torch.randn(4, 4, 4, 4)))
@case("one head of one text", lambda: (torch.randn(1, 1, 3, 16), torch.randn(1, 1, 5, 16), torch.randn(1, 1, 5, 16)))
def attention(
    q: Float[Tensor, "b heads n d"], k: Float[Tensor, "b heads m d"], v: Float[Tensor, "b heads m d"]
) -> Float[Tensor, "b heads n d"]:
    """softmax(q kᵀ / √d) v: every query takes a weighted mean of the values. (Vaswani et al. 2017, eq. 1)

    Write it out: F.scaled_dot_product_attention would be right, but it is what this exercise is about.
    """
    # BEGIN SOLUTION
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # [b heads n m]
    return scores.softmax(dim=-1) @ v
    # END SOLUTION


@instead_of("forward", attention_module.CrossAttention)
def _put_split(f, real, self, x, context=None):
    context = x if context is None else context
    q, k, v = (f(layer(a), self.heads) for layer, a in ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
    return self.to_out(rearrange(attention_module.attention(q, k, v), "b h n d -> b n (h d)"))


@instead_of("forward", attention_module.CrossAttention)
def _put_merge(f, real, self, x, context=None):
    context = x if context is None else context
    q, k, v = (layer(a) for layer, a in ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
    q, k, v = (rearrange(a, "b n (h d) -> b h n d", h=self.heads) for a in (q, k, v))
    return self.to_out(f(attention_module.attention(q, k, v)))


@exercise(swap=_put_split)
@case("2 heads of 3", lambda: (tokens(2, 5, 6), 2))
@case("4 heads of 2", lambda: (tokens(1, 3, 8), 4))
@case("2 heads of 2, as many tokens", lambda: (tokens(2, 2, 4), 2))
@case("3 heads of 4", lambda: (tokens(2, 12, 12), 3))
def split_heads(x: Float[Tensor, "b n c"], heads: int) -> Float[Tensor, "b heads n d"]:
    """Deal the channels of each token out to the heads: c = heads · d, those of one head beside each other, (h d)."""
    # BEGIN SOLUTION
    b, n, c = x.shape
    d = c // heads
    return x.reshape(b, n, heads, d).transpose(1, 2)
    # END SOLUTION


@exercise(swap=_put_merge)
@case("2 heads of 3", lambda: (torch.randn(2, 2, 5, 3),))
@case("as many heads as tokens", lambda: (torch.randn(1, 4, 4, 2),))
@case("3 heads of 4", lambda: (torch.randn(2, 3, 7, 4),))
def merge_heads(x: Float[Tensor, "b heads n d"]) -> Float[Tensor, "b n c"]:
    """Put what the heads found side by side again: the inverse of split_heads, c = heads · d."""
    # BEGIN SOLUTION
    return x.transpose(1, 2).flatten(2)
    # END SOLUTION


def _cross_case(b: int, n: int, m: int, c: int, e: int, heads: int, d: int) -> tuple:
    given = tokens(b, n, c), tokens(b, m, e)
    to_qkv = [nn.Linear(width, heads * d, bias=False) for width in (c, e, e)]
    return *given, *to_qkv, nn.Linear(heads * d, c), heads


@instead_of("forward", attention_module.CrossAttention)
def _put_cross(f, real, self, x, context=None):
    return f(x, x if context is None else context, self.to_q, self.to_k, self.to_v, self.to_out, self.heads)


@exercise(swap=_put_cross)
@case("5 pixels, 3 words", lambda: _cross_case(2, 5, 3, 8, 6, 2, 4))
@case("one picture", lambda: _cross_case(1, 4, 7, 6, 9, 3, 2))
@case("as many pixels as words", lambda: _cross_case(2, 4, 4, 8, 8, 2, 4))
@case("one head", lambda: _cross_case(2, 3, 5, 4, 6, 1, 4))
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
    # BEGIN SOLUTION
    q, k, v = to_q(x), to_k(context), to_v(context)
    q, k, v = (rearrange(a, "b n (h d) -> b h n d", h=heads) for a in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    out = scores.softmax(dim=-1) @ v
    return to_out(rearrange(out, "b h n d -> b n (h d)"))
    # END SOLUTION


# --- the transformer around it ---------------------------------------------------------------------------------------


@exercise(swap=method(attention_module.GEGLU, "forward", "proj"))
@case("tokens of 4 channels, to 6", lambda: (tokens(2, 5, 4), nn.Linear(4, 12)))
@case("one token", lambda: (tokens(1, 1, 3), nn.Linear(3, 4)))
@case("as many tokens as channels", lambda: (tokens(4, 4, 4), nn.Linear(4, 8)))
def geglu(x: Float[Tensor, "b n c"], proj: Layer) -> Float[Tensor, "b n c_out"]:
    """value · GELU(gate): half of the channels decide how much of the other half passes. (Shazeer 2020, "GLU variants")

    proj makes 2 c_out channels of c: first the value's, then the gate's. The GELU is the exact one.
    """
    # BEGIN SOLUTION
    value, gate = proj(x).chunk(2, dim=-1)
    return value * F.gelu(gate)
    # END SOLUTION


class _Tells(nn.Module):
    """An attention of which one sees whether it was given the context."""

    def __init__(self, d: int, e: int = 0):
        super().__init__()
        self.own, self.told = nn.Linear(d, d), nn.Linear(e or d, d)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.tanh(self.own(x) + self.told(x if context is None else context).mean(dim=1, keepdim=True))


def _norm(d: int) -> nn.Module:
    norm = nn.LayerNorm(d)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return norm


def _block_case(b: int, n: int, d: int, m: int, e: int) -> tuple:
    attentions = tokens(b, n, d), tokens(b, m, e), _Tells(d), _Tells(d, e)
    return *attentions, nn.Sequential(nn.Linear(d, d), nn.Tanh()), _norm(d), _norm(d), _norm(d)


@exercise(swap=method(BasicTransformerBlock, "forward", "attn1", "attn2", "ff", "norm1", "norm2", "norm3"))
@case("5 pixels, 3 words", lambda: _block_case(2, 5, 4, 3, 6))
@case("one picture", lambda: _block_case(1, 3, 6, 4, 5))
@case("widths that are equal", lambda: _block_case(3, 4, 4, 4, 4))
def transformer_block(
    x: Float[Tensor, "b n d"],
    context: Float[Tensor, "b m e"],
    attn1: Callable[..., Tensor],
    attn2: Callable[..., Tensor],
    ff: Layer,
    norm1: Layer,
    norm2: Layer,
    norm3: Layer,
) -> Float[Tensor, "b n d"]:
    """Self-attention attn1(x), cross-attention attn2(x, context), feed-forward ff(x).

    Each reads x through its own norm (norm1, norm2, norm3), and what it finds is added to x.
    (CompVis: ldm/modules/attention.py, BasicTransformerBlock)
    """
    # BEGIN SOLUTION
    x = x + attn1(norm1(x))
    x = x + attn2(norm2(x), context)
    return x + ff(norm3(x))
    # END SOLUTION


class _Mixes(nn.Module):
    """A block over tokens, in which each token's place counts."""

    def __init__(self, d: int, e: int):
        super().__init__()
        self.own, self.told = nn.Linear(d, d), nn.Linear(e, d)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        place = torch.arange(1, x.shape[1] + 1)[None, :, None]
        return torch.tanh(self.own(x).cumsum(1) / place + self.told(context).mean(dim=1, keepdim=True))


def _spatial_case(b: int, c: int, d: int, h: int, w: int) -> tuple:
    norm = nn.GroupNorm(2, c)
    nn.init.normal_(norm.weight)
    given = maps(b, c, h, w), tokens(b, 3, 6), norm
    return *given, nn.Conv2d(c, d, 1), [_Mixes(d, 6), _Mixes(d, 6)], nn.Conv2d(d, c, 1)


@instead_of("forward", attention_module.SpatialTransformer)
def _put_spatial(f, real, self, x, context=None):
    return f(x, context, self.norm, self.proj_in, list(self.transformer_blocks), self.proj_out)


@exercise(swap=_put_spatial)
@case("a map of 3 x 5", lambda: _spatial_case(2, 4, 6, 3, 5))
@case("one picture", lambda: _spatial_case(1, 4, 8, 4, 2))
@case("a square map", lambda: _spatial_case(2, 4, 4, 4, 4))
def spatial_transformer(
    x: Float[Tensor, "b c h w"],
    context: Float[Tensor, "b m e"],
    norm: Layer,
    proj_in: Layer,
    blocks: list[Callable[[Tensor, Tensor], Tensor]],
    proj_out: Layer,
) -> Float[Tensor, "b c h w"]:
    """A transformer over the pixels of a map: normalise, project, flatten, run the blocks, fold back, project, add to
    x.

    proj_in and proj_out are 1x1 convolutions; each block is called as block(tokens [b (h w) d], context). The pixels
    are taken row by row. (CompVis: ldm/modules/attention.py, SpatialTransformer)
    """
    # BEGIN SOLUTION
    height = x.shape[-2]
    tokens = rearrange(proj_in(norm(x)), "b c h w -> b (h w) c")
    for block in blocks:
        tokens = block(tokens, context)
    return x + proj_out(rearrange(tokens, "b (h w) c -> b c h w", h=height))
    # END SOLUTION


# --- the convolutions ------------------------------------------------------------------------------------------------


def _res_case(b: int, c: int, c_out: int, h: int, w: int, e: int = 6) -> tuple:
    x, emb = maps(b, c, h, w), torch.randn(b, e)
    in_layers = nn.Sequential(nn.GroupNorm(2, c), nn.SiLU(), nn.Conv2d(c, c_out, 3, padding=1))
    emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(e, c_out))
    out_layers = nn.Sequential(nn.GroupNorm(2, c_out), nn.SiLU(), nn.Conv2d(c_out, c_out, 3, padding=1))
    skip_connection = nn.Identity() if c == c_out else nn.Conv2d(c, c_out, 1)
    return x, emb, in_layers, emb_layers, out_layers, skip_connection


@exercise(swap=method(unet_module.ResBlock, "forward", "in_layers", "emb_layers", "out_layers", "skip_connection"))
@case("from 4 channels to 6", lambda: _res_case(2, 4, 6, 3, 5))
@case("one picture", lambda: _res_case(1, 4, 8, 4, 3))
@case("as many channels as before, a square", lambda: _res_case(2, 4, 4, 4, 4))
@case("as many pictures as rows", lambda: _res_case(4, 2, 4, 4, 4, 4))
def res_block(
    x: Float[Tensor, "b c h w"],
    emb: Float[Tensor, "b e"],
    in_layers: Layer,
    emb_layers: Layer,
    out_layers: Layer,
    skip_connection: Layer,
) -> Float[Tensor, "b c_out h w"]:
    """Two convolutions around the time embedding, added to the input.

    in_layers: [b c h w] -> [b c_out h w]; emb_layers: [b e] -> [b c_out], added to every pixel; out_layers keeps the
    shape; skip_connection: [b c h w] -> [b c_out h w]. (CompVis: openaimodel.py, ResBlock)
    """
    # BEGIN SOLUTION
    h = in_layers(x)
    h = h + emb_layers(emb)[:, :, None, None]
    h = out_layers(h)
    return skip_connection(x) + h
    # END SOLUTION


@exercise(swap=method(nn.GroupNorm, "forward", "num_groups", "weight", "bias", "eps"))
@case("2 groups of 2", lambda: (maps(2, 4, 3, 5), 2, torch.randn(4), torch.randn(4), 1e-5))
@case("one picture, 3 groups", lambda: (maps(1, 6, 4, 3), 3, torch.randn(6), torch.randn(6), 1e-5))
@case("a square with few numbers", lambda: (0.05 * maps(4, 4, 4, 4), 2, torch.randn(4), torch.randn(4), 1e-3))
def group_norm(
    x: Float[Tensor, "b c h w"], groups: int, weight: Float[Tensor, "c"], bias: Float[Tensor, "c"], eps: float
) -> Float[Tensor, "b c h w"]:
    """Normalise each group of channels of each picture to mean 0 and variance 1; then scale and shift each channel.

    The c channels form `groups` groups of neighbours; mean and (biased) variance are taken over a group's channels and
    pixels. Write it out, without F.group_norm. (Wu & He 2018)
    """
    # BEGIN SOLUTION
    b, c = x.shape[:2]
    grouped = x.reshape(b, groups, -1)
    mean = grouped.mean(dim=-1, keepdim=True)
    variance = grouped.var(dim=-1, keepdim=True, unbiased=False)
    normal = (grouped - mean) / (variance + eps).sqrt()
    return normal.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    # END SOLUTION


@instead_of("forward", unet_module.Upsample, vae_module.Upsample)
def _put_upsample(f, real, self, x, size=None):
    twice = 2 * x.shape[-2], 2 * x.shape[-1]
    return f(x, self.conv) if tuple(size or twice) == twice else real(self, x, size)


@exercise(swap=_put_upsample)
@case("3 x 5 pixels", lambda: (maps(), nn.Conv2d(4, 4, 3, padding=1)))
@case("one picture", lambda: (maps(1, 2, 4, 3), nn.Conv2d(2, 2, 3, padding=1)))
@case("a square", lambda: (maps(2, 4, 4, 4), nn.Conv2d(4, 4, 3, padding=1)))
def upsample(x: Float[Tensor, "b c h w"], conv: Layer) -> Float[Tensor, "b c h2 w2"]:
    """Twice the size: repeat each pixel to a square of 2 x 2, then smooth by `conv`, which keeps the size."""
    # BEGIN SOLUTION
    return conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    # END SOLUTION


class _Plus(nn.Module):
    """A block that shows in which order it was called, and on how many channels."""

    def __init__(self, c: int, c_out: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(c, c_out, 3, padding=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))


def _unet_case(b: int, h: int, w: int, c: int = 3) -> tuple:
    x, down, middle = maps(b, 2, h, w), [_Plus(2, c), _Plus(c, c), _Plus(c, c)], _Plus(c, c)
    return x, down, middle, [_Plus(2 * c, c) for _ in down]


@instead_of("forward", unet_module.UNetModel)
def _put_unet(f, real, self, x, timesteps, context=None):
    self._check(x, context)
    emb = self.time_embed(unet_module.timestep_embedding(timesteps, self.config.model_channels).to(x.dtype))

    def told(block):
        return lambda h: block(h, emb, context)

    down, up = ([told(block) for block in blocks] for blocks in (self.input_blocks, self.output_blocks))
    return self.out(f(x, down, told(self.middle_block), up))


@exercise(swap=_put_unet)
@case("two pictures", lambda: _unet_case(2, 3, 5))
@case("one picture", lambda: _unet_case(1, 4, 3))
@case("square pictures", lambda: _unet_case(2, 4, 4, 4))
@case("as many channels everywhere", lambda: _unet_case(2, 3, 4, 2))
def unet_forward(
    x: Float[Tensor, "b c h w"], input_blocks: list[Layer], middle_block: Layer, output_blocks: list[Layer]
) -> Float[Tensor, "b c_out h w"]:
    """The U: down through the input blocks, through the middle, and up through the output blocks.

    Each output block is given, besides what comes from below, the output of the input block across: joined along the
    channels, h first. There are as many output blocks as input blocks. (Time and context are left out here.)
    (CompVis: openaimodel.py, UNetModel.forward)
    """
    # BEGIN SOLUTION
    h, skips = x, []
    for block in input_blocks:
        h = block(h)
        skips.append(h)
    h = middle_block(h)
    for block in output_blocks:
        h = block(torch.cat([h, skips.pop()], dim=1))
    return h
    # END SOLUTION
