"""Exercises of stage 3: the parts of the UNet, and where the text comes in."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import attention as attention_module
from .. import clip as clip_module
from .. import unet as unet_module
from .. import vae as vae_module
from .exercise import exercise

Layer = Callable[[Tensor], Tensor]


def maps(b: int = 2, c: int = 4, h: int = 3, w: int = 5) -> Float[Tensor, "b c h w"]:
    return torch.randn(b, c, h, w)


def tokens(b: int, n: int, d: int) -> Float[Tensor, "b n d"]:
    return torch.randn(b, n, d)


# --- the time --------------------------------------------------------------------------------------------------------


def _put_embedding(f):
    return [(unet_module, "timestep_embedding", lambda timesteps, dim,
             max_period=10_000: f(timesteps, dim, max_period).float())]


@exercise(
    difficulty=2,
    minutes=15,
    cases=lambda: {
        "three times, 8 numbers each": {"timesteps": torch.tensor([0, 7, 40]), "dim": 8, "max_period": 10_000},
        "one time": {"timesteps": torch.tensor([13]), "dim": 6, "max_period": 10_000},
        "another period": {"timesteps": torch.tensor([2, 5]), "dim": 8, "max_period": 100},
        "as many times as numbers": {"timesteps": torch.tensor([1, 3, 9, 27]), "dim": 4, "max_period": 10_000},
    },
    hints=(
        "Half of the numbers are cosines, half are sines, of the same angles: t times a frequency.",
        "The frequencies fall from 1 by equal factors: 10000^(-i/half), i = 0 ... half-1.",
        "Angles [b half] = timesteps[:, None] * frequencies[None]; then cat([cos, sin]) along the last axis.",
    ),
    mistakes=[
        ("[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]",
         "The sines come first in yours: here the cosines do, as in CompVis. (Trained weights expect one order;"
         " DDPM's code has the other.)"),
        ("/ half)", "/ (half - 1))",
         "You divided by half - 1, as DDPM's code does: here the exponent is i / half, and the slowest circle is a"
         " little faster than the period."),
        ("-math.log(max_period)", "math.log(max_period)",
         "Your frequencies grow: the exponent is negative, from 1 down to about 1 / max_period."),
        ("torch.arange(half)", "torch.arange(1, half + 1)",
         "Your i begins at 1: it counts 0 ... half-1, so that the first frequency is 1."),
        ("half = dim // 2", "half = dim",
         "You made dim angles, and so 2 dim numbers: half of dim are cosines, half are sines."),
        ("/ half)", "/ dim)",
         "The exponent is i / half, not i / dim: in yours the frequencies fall to the root of the period only."),
        ("/ half)", "/ half * 2)", "The exponent is i / half: yours falls twice as fast."),
        ("torch.cat([angles.cos(), angles.sin()], dim=-1)",
         "torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)",
         "Cosines and sines alternate in yours: here first come all cosines, then all sines."),
        ("torch.cat([angles.cos(), angles.sin()], dim=-1)",
         "torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)",
         'Sines and cosines alternate, as in "Attention is all you need": here first come all cosines, then all'
         " sines."),
        ("torch.cat([angles.cos(), angles.sin()], dim=-1)", "torch.cat([angles.cos(), angles.cos()], dim=-1)",
         "The second half holds cosines again: sines belong there."),
        ("torch.cat([angles.cos(), angles.sin()], dim=-1)", "torch.cat([angles.sin(), angles.sin()], dim=-1)",
         "Both halves hold sines: the first holds the cosines."),
        ("torch.arange(half)", "torch.arange(half).flip(0)",
         "Your frequencies rise: they fall, the fastest first."),
        ("angles = timesteps[:, None] * frequencies", "angles = torch.deg2rad(timesteps[:, None] * frequencies)",
         "You took the angles for degrees: they are radians."),
        ("math.log(max_period)", "math.log(10000)", "You wrote down 10000: the period comes with the argument."),
        ("timesteps[:, None] * frequencies", "timesteps[:, None] / 1000 * frequencies",
         "You divided t by 1000: t comes in as it is, an integer in 0 ... T-1."),
        ("timesteps[:, None] * frequencies", "2 * math.pi * timesteps[:, None] * frequencies",
         "The factor 2π does not belong to the angle: it is t times the frequency."),
        ("torch.exp(-math.log(max_period) * torch.arange(half) / half)", "torch.linspace(1, 1 / max_period, half)",
         "Your frequencies fall by equal amounts: they fall by equal factors."),
        ("torch.exp(-math.log(max_period) * torch.arange(half) / half)", "1 - torch.arange(half) / half",
         "Your frequencies fall by the same amount each: by the same factor, 1 / max_period^(1/half)."),
    ],
    tolerance=2e-3,
    swap=_put_embedding,
)  # fmt: skip
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


def _put_attention(f):
    real = attention_module.attention

    def plain(q, k, v, causal=False, record=None):
        return real(q, k, v, causal, record) if causal or record else f(q, k, v).to(v)

    return [(module, "attention", plain) for module in (attention_module, vae_module, clip_module)]


@exercise(
    difficulty=3,
    minutes=15,
    cases=lambda: {
        "5 queries, 7 keys": {"q": torch.randn(2, 3, 5, 4), "k": torch.randn(2, 3, 7, 4), "v": torch.randn(2, 3, 7, 4)},
        "as many queries as keys": {"q": torch.randn(2, 2, 4, 6), "k": torch.randn(2, 2, 4, 6),
                                    "v": torch.randn(2, 2, 4, 6)},
        "all sizes equal": {"q": torch.randn(4, 4, 4, 4), "k": torch.randn(4, 4, 4, 4), "v": torch.randn(4, 4, 4, 4)},
        "one head of one text": {"q": torch.randn(1, 1, 3, 16), "k": torch.randn(1, 1, 5, 16),
                                 "v": torch.randn(1, 1, 5, 16)},
    },
    hints=(
        "Scores: each query with each key, [b heads n m] = q @ kᵀ. Divide by √d.",
        "The weights of each query over all keys sum to 1: softmax along the last axis.",
        "`k.transpose(-1, -2)` exchanges the last two axes.",
    ),
    mistakes=[
        (" / q.shape[-1] ** 0.5", "",
         "The scores are not divided by √d: they grow with the width of a head, and the softmax becomes a maximum."),
        (" / q.shape[-1] ** 0.5", " / q.shape[-1]",
         "You divided by d, not by its root (or by √d twice): a sum of d products of unit variance has the standard"
         " deviation √d."),
        (" / q.shape[-1] ** 0.5", " * q.shape[-1] ** 0.5", "You multiplied by √d: divide by it."),
        (" / q.shape[-1] ** 0.5", " / (q.shape[1] * q.shape[-1]) ** 0.5",
         "d is the width of one head, q.shape[-1]: you divided by the root of that of all heads."),
        (" / q.shape[-1] ** 0.5", " / k.shape[-2] ** 0.5",
         "You divided by the root of the number of keys: it is the width of a head, d."),
        (" / q.shape[-1] ** 0.5  # [b heads n m]\nreturn scores.softmax(dim=-1)",
         "\nreturn scores.softmax(dim=-1) / q.shape[-1] ** 0.5",
         "You divided by √d after the softmax: the scores are divided, before it, or the weights no longer sum to"
         " 1."),
        (" / q.shape[-1] ** 0.5", " / 8", "You wrote down √64 = 8: d comes with q, it is q.shape[-1]."),
        (" / q.shape[-1] ** 0.5", " / 8**0.5", "You wrote down √8: d comes with q, it is q.shape[-1]."),
        ("scores.softmax(dim=-1)", "scores.exp().softmax(dim=-1)",
         "You took the exponential before the softmax, which does it itself."),
        ("softmax(dim=-1)", "softmax(dim=-2)",
         "The softmax runs over the queries: the weights of each query over all keys have to sum to 1, along the"
         " last axis."),
        ("softmax(dim=-1)", "softmax(dim=1)", "The softmax runs over the heads: it runs over the keys, the last axis."),
        ("softmax(dim=-1)", "softmax(dim=0)", "The softmax runs over the batch: it runs over the keys, the last axis."),
        ("scores.softmax(dim=-1)", "scores", "The softmax is missing: scores are not weights that sum to 1."),
        ("scores.softmax(dim=-1)", "scores.sigmoid()",
         "A sigmoid makes each weight for itself: they have to sum to 1, by a softmax over the keys."),
        ("scores.softmax(dim=-1)", "(scores / scores.sum(dim=-1, keepdim=True))",
         "You divided by the sum, without the exponential: scores may be negative."),
        ("scores.softmax(dim=-1)", "(scores.exp() / scores.exp().sum())",
         "You divided by the sum over everything: each query has its own sum, over its keys."),
        (" / q.shape[-1] ** 0.5", " / q.shape[1] ** 0.5",
         "You divided by the root of the number of heads: it is the width of a head, d = q.shape[-1]."),
        (" / q.shape[-1] ** 0.5", " / q.shape[-2] ** 0.5",
         "You divided by the root of the number of queries: it is the width of a head, d = q.shape[-1]."),
        ("", "return q.softmax(dim=-1) @ (k.softmax(dim=-2).transpose(-1, -2) @ v)",
         "This is linear attention, with a softmax over q and one over k: here it is one over the scores q kᵀ / √d."),
        ("scores.softmax(dim=-1) @ v", "scores.softmax(dim=-1).transpose(-1, -2) @ v",
         "The weights are transposed: their rows are queries, their columns keys, as they are."),
        ("", "return q.softmax(dim=-1) @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 @ v",
         "The softmax is around q alone: around the scores, q kᵀ / √d."),
        ("scores.softmax(dim=-1)", "scores.exp()",
         "The exponentials are not divided by their sum: the weights of each query have to sum to 1."),
        ("scores.softmax(dim=-1)", "scores.flatten(2).softmax(dim=-1).view_as(scores)",
         "The softmax runs over queries and keys together: the weights of each query have to sum to 1."),
        ("k.transpose(-1, -2)", "k.reshape(*k.shape[:2], k.shape[3], k.shape[2])",
         "You reshaped k in the place of transposing it, which mixes its keys: exchange the last two axes."),
        ("q @ k.transpose(-1, -2)", "q @ k.transpose(-1, -2).sum(dim=1, keepdim=True)",
         "The keys of all heads are added up: each head compares with its own keys."),
        ("scores.softmax(dim=-1)", "scores.log_softmax(dim=-1)",
         "You took the logarithm of the softmax: the weights themselves are wanted."),
        ("scores.softmax(dim=-1) @ v", "scores.softmax(dim=-1) @ k",
         "The weights are applied to the keys: it is the values that are averaged."),
        ("scores.softmax(dim=-1) @ v", "scores.softmax(dim=-1)",
         "You returned the weights: multiply them with the values."),
        ("q @ k.transpose(-1, -2)", "k @ q.transpose(-1, -2)",
         "Queries and keys are exchanged in the scores: rows are queries, columns are keys."),
        ("scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5",
         "scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(torch.ones(q.shape[-2],"
         " k.shape[-2]).triu(1).bool(), -math.inf)",
         "You masked the future: pixels have none, here every query sees every key."),
        ("scores.softmax(dim=-1)",
         "((scores.softmax(dim=-1) == scores.softmax(dim=-1).amax(dim=-1, keepdim=True)) * 1.0)",
         "Each query takes the best key's value only: it is a weighted mean over all."),
        ("q @ k.transpose(-1, -2)", "F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)",
         "You normalised queries and keys: the scores are plain products, divided by √d."),
    ],
    swap=_put_attention,
)  # fmt: skip
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


def _put_split(f):
    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (f(layer(a), self.heads) for layer, a in ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
        return self.to_out(rearrange(attention_module.attention(q, k, v), "b h n d -> b n (h d)"))

    return [(attention_module.CrossAttention, "forward", forward)]


def _put_merge(f):
    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (layer(a) for layer, a in ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
        q, k, v = (rearrange(a, "b n (h d) -> b h n d", h=self.heads) for a in (q, k, v))
        return self.to_out(f(attention_module.attention(q, k, v)))

    return [(attention_module.CrossAttention, "forward", forward)]


@exercise(
    difficulty=2,
    minutes=10,
    cases=lambda: {
        "2 heads of 3": {"x": tokens(2, 5, 6), "heads": 2},
        "4 heads of 2": {"x": tokens(1, 3, 8), "heads": 4},
        "2 heads of 2, as many tokens": {"x": tokens(2, 2, 4), "heads": 2},
        "3 heads of 4": {"x": tokens(2, 12, 12), "heads": 3},
    },
    hints=(
        "The channels of one head lie beside each other: (h d), the head first.",
        "Unflatten the last axis to [heads, d]; then exchange the axes n and heads.",
    ),
    mistakes=[
        ("x.reshape(b, n, heads, d).transpose(1, 2)", "x.reshape(b, n, d, heads).permute(0, 3, 1, 2)",
         "The channels are split as (d h): those of one head lie beside each other, (h d), or trained weights go to"
         " the wrong heads."),
        ("x.reshape(b, n, heads, d).transpose(1, 2)", "x.reshape(b, heads, n, d)",
         "You only reshaped: that cuts across the tokens. First split the last axis, [b n heads d], then exchange n"
         " and heads."),
        (".transpose(1, 2)", "", "The axes are still [b n heads d]: exchange n and heads."),
        (".transpose(1, 2)", ".permute(0, 2, 3, 1)",
         "The axes are [b heads d n]: tokens come before the channels, [b heads n d]."),
        (".transpose(1, 2)", ".transpose(1, 2).flatten(0, 1)",
         "You merged batch and heads, [(b heads) n d], as the original code does: here they stay apart."),
        (".transpose(1, 2)", ".transpose(1, 2).flip(1)", "The heads are in the reverse order."),
        ("return x.reshape(b, n, heads, d).transpose(1, 2)", "return x[:, None].expand(b, heads, n, c)",
         "Every head has all channels: each has its own d = c / heads."),
        (".transpose(1, 2)", ".permute(2, 0, 1, 3)", "The heads come first, [heads b n d]: the batch does."),
        ("x.reshape(b, n, heads, d).transpose(1, 2)",
         "x.transpose(1, 2).reshape(b, heads, d, n).transpose(2, 3)[..., list(range(1, d)) + [0]]",
         "The channels within a head are shifted."),
    ],
    swap=_put_split,
)  # fmt: skip
def split_heads(x: Float[Tensor, "b n c"], heads: int) -> Float[Tensor, "b heads n d"]:
    """Deal the channels of each token out to the heads: c = heads · d, those of one head beside each other, (h d)."""
    # BEGIN SOLUTION
    b, n, c = x.shape
    d = c // heads
    return x.reshape(b, n, heads, d).transpose(1, 2)
    # END SOLUTION


@exercise(
    difficulty=2,
    minutes=5,
    cases=lambda: {
        "2 heads of 3": {"x": torch.randn(2, 2, 5, 3)},
        "as many heads as tokens": {"x": torch.randn(1, 4, 4, 2)},
        "3 heads of 4": {"x": torch.randn(2, 3, 7, 4)},
    },
    hints=("First bring the axes to [b n heads d], then merge the last two.",
           "`.flatten(2)` merges all axes from the third on."),
    mistakes=[
        ("x.transpose(1, 2).flatten(2)", "x.reshape(x.shape[0], x.shape[2], -1)",
         "You only reshaped: that mixes tokens. First exchange heads and n, then merge."),
        ("x.transpose(1, 2).flatten(2)", "x.permute(0, 2, 3, 1).flatten(2)",
         "The channels are merged as (d h): those of one head lie beside each other, (h d)."),
        (".flatten(2)", "", "The last two axes are still apart: merge them to c = heads · d."),
        ("x.transpose(1, 2).flatten(2)", "x.transpose(2, 3).reshape(x.shape[0], x.shape[2], -1)",
         "You exchanged n and d: it is heads and n that are exchanged before they are merged."),
        ("x.transpose(1, 2).flatten(2)", "x.mean(dim=1)",
         "You averaged over the heads: their channels are put side by side."),
        ("x.transpose(1, 2).flatten(2)", "x.sum(dim=1)",
         "You added the heads up: their channels are put side by side."),
        ("x.transpose(1, 2).flatten(2)", "x.flatten(1, 2)",
         "You merged heads and tokens: heads belong to the channels."),
        ("x.transpose(1, 2).flatten(2)", "x[:, 0]", "Only the first head is left."),
        ("x.transpose(1, 2).flatten(2)", "x.transpose(1, 2).flip(2).flatten(2)", "The heads are in the reverse order."),
    ],
    swap=_put_merge,
)  # fmt: skip
def merge_heads(x: Float[Tensor, "b heads n d"]) -> Float[Tensor, "b n c"]:
    """Put what the heads found side by side again: the inverse of split_heads, c = heads · d."""
    # BEGIN SOLUTION
    return x.transpose(1, 2).flatten(2)
    # END SOLUTION


def _cross_case(b: int, n: int, m: int, c: int, e: int, heads: int, d: int) -> dict:
    def linear(a, b, bias=False):
        return nn.Linear(a, b, bias=bias)

    return {
        "x": tokens(b, n, c), "context": tokens(b, m, e), "to_q": linear(c, heads * d), "to_k": linear(e, heads * d),
        "to_v": linear(e, heads * d), "to_out": linear(heads * d, c, True), "heads": heads,
    }  # fmt: skip


def _put_cross(f):
    def forward(self, x, context=None):
        return f(x, x if context is None else context, self.to_q, self.to_k, self.to_v, self.to_out, self.heads)

    return [(attention_module.CrossAttention, "forward", forward)]


@exercise(
    difficulty=4,
    minutes=25,
    cases=lambda: {
        "5 pixels, 3 words": _cross_case(2, 5, 3, 8, 6, 2, 4),
        "one picture": _cross_case(1, 4, 7, 6, 9, 3, 2),
        "as many pixels as words": _cross_case(2, 4, 4, 8, 8, 2, 4),
        "one head": _cross_case(2, 3, 5, 4, 6, 1, 4),
    },
    hints=(
        "Who asks, and who answers? Queries from the picture, keys and values from the context.",
        "Split q, k and v into heads, attend, merge the heads, and send the result through to_out.",
        '`rearrange(a, "b n (h d) -> b h n d", h=heads)` splits; the reverse merges.',
    ),
    mistakes=[
        ("to_k(context), to_v(context)", "to_k(x), to_v(x)",
         "Keys and values come from x: that is self-attention, and the text has no say. They come from the context."),
        ("to_q(x), to_k(context), to_v(context)", "to_q(context), to_k(x), to_v(x)",
         "The wrong way round: the pixels ask, x gives the queries, and the context answers."),
        ("to_k(context), to_v(context)", "to_k(context), to_k(context)",
         "The values are made by to_k, as the keys are: they have a projection of their own, to_v."),
        ("to_k(context), to_v(context)", "to_v(context), to_k(context)", "to_k and to_v are exchanged."),
        ("scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5",
         "scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5\nscores = scores.masked_fill(torch.ones(q.shape[-2],"
         " k.shape[-2]).triu(1).bool(), -math.inf)",
         "You masked the future (causal): a pixel asks all words."),
        ("to_k(context), to_v(context)",
         "to_k(context.mean(dim=1, keepdim=True)), to_v(context.mean(dim=1, keepdim=True))",
         "You averaged the words first: each pixel attends to every word."),
        ("to_k(context), to_v(context)", "to_k(context), context", "The values are not projected: to_v is missing."),
        (" / q.shape[-1] ** 0.5", "", "The scores are not divided by √d."),
        (" / q.shape[-1] ** 0.5", " / (heads * q.shape[-1]) ** 0.5",
         "d is the width of one head: you divided by the root of that of all heads together."),
        (" / q.shape[-1] ** 0.5", " / heads**0.5",
         "You divided by the root of the number of heads: it is the width of one, d."),
        (" / q.shape[-1] ** 0.5", " / q.shape[-1]", "You divided by d, not by √d (or by √d twice)."),
        ("softmax(dim=-1)", "softmax(dim=-2)",
         "The softmax runs over the pixels: the weights of each pixel over all words have to sum to 1."),
        ("softmax(dim=-1)", "softmax(dim=1)",
         "The softmax runs over the heads: it runs over the words, the last axis."),
        ('"b n (h d) -> b h n d"', '"b n (d h) -> b h n d"',
         "The channels are split as (d h): those of one head lie beside each other, (h d)."),
        ('"b h n d -> b n (h d)"', '"b h n d -> b n (d h)"',
         "The heads are merged as (d h): they were split as (h d)."),
        ('to_out(rearrange(out, "b h n d -> b n (h d)"))', 'rearrange(out, "b h n d -> b n (h d)")',
         "to_out is missing: the last projection mixes what the heads found."),
        (" / q.shape[-1] ** 0.5\nout = scores.softmax(dim=-1) @ v",
         "\nout = scores.softmax(dim=-1) / q.shape[-1] ** 0.5 @ v",
         "You divided by √d after the softmax: the scores are divided, before it."),
        ("h=heads)", "h=1)", "There is one head only: the channels are split into `heads` of them."),
        ("/ q.shape[-1] ** 0.5\nout = scores.softmax(dim=-1) @ v",
         '/ q.shape[-1] ** 0.5\nw = rearrange(q, "b h n d -> b 1 n (h d)") @ rearrange(k, "b h n d -> b 1 (h d) n")'
         "\nout = (w / q.shape[-1] ** 0.5).softmax(dim=-1) @ v",
         "There is one head only: the channels are split into `heads` of them (only the √d is that of one)."),
        ('rearrange(a, "b n (h d) -> b h n d", h=heads) for', "a.reshape(len(a), heads, a.shape[1], -1) for",
         "You split the heads by a reshape alone, which cuts across the tokens: first [b n heads d], then exchange"
         " n and heads."),
        ('to_out(rearrange(out, "b h n d -> b n (h d)"))', 'x + to_out(rearrange(out, "b h n d -> b n (h d)"))',
         "You added x: the residual belongs to the block around it, which would then add it twice."),
        ('to_out(rearrange(out, "b h n d -> b n (h d)"))', "to_out(out.reshape(len(x), x.shape[1], -1))",
         "The heads are merged by a reshape alone, which mixes pixels: exchange heads and n first."),
        ("out = scores.softmax(dim=-1) @ v", "out = scores @ v", "The softmax is missing."),
        ("h=heads)", "d=heads)", "`heads` is taken for the width of a head: it is their number."),
    ],
    swap=_put_cross,
)  # fmt: skip
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


@exercise(
    difficulty=2,
    minutes=10,
    cases=lambda: {
        "tokens of 4 channels, to 6": {"x": tokens(2, 5, 4), "proj": nn.Linear(4, 12)},
        "one token": {"x": tokens(1, 1, 3), "proj": nn.Linear(3, 4)},
        "as many tokens as channels": {"x": tokens(4, 4, 4), "proj": nn.Linear(4, 8)},
    },
    hints=(
        "One projection, then cut the channels into two halves.",
        "The first half is the value, the second the gate; F.gelu goes around the gate.",
    ),
    mistakes=[
        ("value * F.gelu(gate)", "gate * F.gelu(value)",
         "The GELU is around the wrong half: the first half is the value, the second the gate."),
        ("value * F.gelu(gate)", "F.gelu(value * gate)",
         "The GELU is around the product: it goes around the gate alone."),
        ("value * F.gelu(gate)", "value + F.gelu(gate)", "You added: the gate multiplies the value."),
        ("value * F.gelu(gate)", "value * gate", "The GELU around the gate is missing."),
        ("F.gelu(gate)", "F.sigmoid(gate)",
         "The gate goes through a GELU here, not through a sigmoid (that would be a GLU)."),
        ("F.gelu(gate)", "F.silu(gate)",
         "The gate goes through a GELU here, not through a SiLU (that would be SwiGLU)."),
        ("F.gelu(gate)", "F.relu(gate)", "The gate goes through a GELU here, not through a ReLU."),
        ("F.gelu(gate)", 'F.gelu(gate, approximate="tanh")',
         "You took the tanh approximation of the GELU: the trained weights were made with the exact one."),
        ("F.gelu(gate)", "gate * torch.sigmoid(1.702 * gate)",
         "This is CLIP's quick-GELU: the UNet has the exact one, F.gelu."),
        ("value, gate = proj(x).chunk(2, dim=-1)", "value = gate = proj(x)",
         "Value and gate are the same, all channels: proj's channels are cut in two halves."),
        ("dim=-1", "dim=1", "You cut the tokens in two: the channels, the last axis, are cut."),
        ("dim=-1", "dim=0", "You cut the batch in two: the channels, the last axis, are cut."),
        ("value, gate = proj(x).chunk(2, dim=-1)", "value, gate = proj(x)[..., ::2], proj(x)[..., 1::2]",
         "You took every other channel: value and gate are two halves, one after the other."),
        ("value * F.gelu(gate)", "F.gelu(value) * F.gelu(gate)",
         "There is a GELU around both halves: around the gate alone."),
        ("value * F.gelu(gate)", "x + value * F.gelu(gate) if x.shape == value.shape else value * F.gelu(gate)",
         "You added x: the residual belongs to the block around it."),
        ("", "value, gate = proj(F.gelu(x)).chunk(2, dim=-1)\nreturn value * gate",
         "The GELU is around x, before proj: it goes around the gate, behind proj."),
    ],
    swap=lambda f: [(attention_module.GEGLU, "forward", lambda self, x: f(x, self.proj))],
)  # fmt: skip
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


def _block_case(b: int, n: int, d: int, m: int, e: int) -> dict:
    return {
        "x": tokens(b, n, d), "context": tokens(b, m, e), "attn1": _Tells(d), "attn2": _Tells(d, e),
        "ff": nn.Sequential(nn.Linear(d, d), nn.Tanh()), "norm1": _norm(d), "norm2": _norm(d), "norm3": _norm(d),
    }  # fmt: skip


def _put_block(f):
    def forward(self, x, context=None):
        return f(x, context, self.attn1, self.attn2, self.ff, self.norm1, self.norm2, self.norm3)

    return [(attention_module.BasicTransformerBlock, "forward", forward)]


@exercise(
    difficulty=3,
    minutes=15,
    cases=lambda: {
        "5 pixels, 3 words": _block_case(2, 5, 4, 3, 6),
        "one picture": _block_case(1, 3, 6, 4, 5),
        "widths that are equal": _block_case(3, 4, 4, 4, 4),
    },
    hints=(
        "Three lines of the same form: x = x + layer(norm(x)).",
        "First the pixels look at each other, then at the words, then each thinks for itself.",
    ),
    mistakes=[
        ("", "h = norm1(x)\nx = x + attn1(h)\nx = x + attn2(h, context)\nreturn x + ff(h)",
         "You normalised once, at the beginning: each layer reads the sum that the one before has left, through its own"
         " norm."),
        ("", "x = x + attn1(norm1(x))\nx = x + ff(norm3(x))\nreturn x + attn2(norm2(x), context)",
         "ff comes before attn2 in yours: it is the last of the three."),
        ("x = x + attn1(norm1(x))", "x = attn1(norm1(x))", "The residual around attn1 is missing: x + attn1(...)."),
        ("x = x + attn2(norm2(x), context)", "x = attn2(norm2(x), context)",
         "The residual around attn2 is missing: x + attn2(...)."),
        ("return x + ff(norm3(x))", "return ff(norm3(x))", "The residual around ff is missing: x + ff(...)."),
        ("attn1(norm1(x))", "attn1(x)", "norm1 is missing: each layer reads the normalised x."),
        ("attn2(norm2(x), context)", "attn2(x, context)", "norm2 is missing: each layer reads the normalised x."),
        ("ff(norm3(x))", "ff(x)", "norm3 is missing: each layer reads the normalised x."),
        ("attn2(norm2(x), context)", "attn2(norm2(x))", "attn2 was not given the context: the text never comes in."),
        ("norm1(x)", "norm2(x)", "The first norm is norm1."),
        ("", "x = norm1(x + attn1(x))\nx = norm2(x + attn2(x, context))\nreturn norm3(x + ff(x))",
         "You normalise after each sum (post-norm, as in the first transformer): here it is before each layer, and"
         " the sum stays as it is."),
        ("", "x = attn1(norm1(x))\nx = attn2(norm2(x), context)\nreturn ff(norm3(x))",
         "There is no residual: what each layer finds is added to x."),
        ("", "h = x + attn1(norm1(x))\nh = h + attn2(norm2(h), context)\nreturn x + ff(norm3(h))",
         "The last residual adds the x of the beginning: it adds what ff has read, before its norm."),
        ("", "h = x + attn1(norm1(x))\nh = x + attn2(norm2(h), context)\nreturn h + ff(norm3(h))",
         "The second residual adds the x of the beginning, so that what attn1 found is lost."),
        ("", "h = x + attn1(norm1(x))\nh = x + attn2(norm2(h), context)\nreturn x + ff(norm3(h))",
         "Each residual adds the x of the beginning: it adds the sum that the layer before has left."),
        ("", "x = x + attn2(norm1(x), context)\nx = x + attn1(norm2(x))\nreturn x + ff(norm3(x))",
         "attn1 and attn2 are exchanged: first self-attention, attn1, then cross-attention, attn2."),
        ("", "h = x + attn1(norm1(x))\nh = norm2(h)\nh = h + attn2(h, context)\nreturn h + ff(norm3(h))",
         "The second residual adds the normalised x: x itself is added."),
        ("", "x = x + attn2(norm2(x), context)\nx = x + attn1(norm1(x))\nreturn x + ff(norm3(x))",
         "Cross-attention comes first in yours: first the pixels look at each other (attn1), then at the words"
         " (attn2)."),
        ("", "return x + attn1(norm1(x)) + attn2(norm2(x), context) + ff(norm3(x))",
         "All three read the same x: each reads the sum that the one before has left."),
        ("", "x = norm1(x)\nx = x + attn1(x)\nx = norm2(x)\nx = x + attn2(x, context)\nx = norm3(x)\nreturn x + ff(x)",
         "The norm is put on the residual as well: x itself is added, not the normalised x."),
        ("", "h = attn1(norm1(x))\nh = attn2(norm2(h), context)\nreturn x + ff(norm3(h))",
         "There is one residual around everything: each of the three layers has its own."),
        ("x = x + attn1(norm1(x))", "x = x + attn1(norm1(x), context)",
         "attn1 was given the context: it is self-attention."),
        ("attn2(norm2(x), context)", "attn2(norm2(x), x)",
         "attn2 was given x as its context: it is the cross-attention, and reads the words."),
        ("", "x = x + attn1(x)\nx = x + attn2(x, context)\nreturn x + ff(x)",
         "The three norms are missing: each layer reads the normalised x."),
        ("", "x = x + attn1(norm1(x))\nx = x + attn2(norm1(x), context)\nreturn x + ff(norm1(x))",
         "All three read through norm1: each layer has a norm of its own."),
        ("", "x = x + ff(norm3(x))\nx = x + attn1(norm1(x))\nreturn x + attn2(norm2(x), context)",
         "ff comes first in yours: it is the last of the three."),
        ("return x + ff(norm3(x))", "return x", "ff is missing: the feed-forward layer is the third of three."),
        ("x = x + attn2(norm2(x), context)", "pass", "attn2 is missing: the text never comes in."),
        ("x = x + attn1(norm1(x))", "pass", "attn1 is missing: the pixels look at each other first."),
        ("norm2(x)", "norm1(x)", "The second norm is norm2."),
        ("norm3(x)", "norm2(x)", "The third norm is norm3."),
    ],
    swap=_put_block,
)  # fmt: skip
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


def _spatial_case(b: int, c: int, d: int, h: int, w: int) -> dict:
    norm = nn.GroupNorm(2, c)
    nn.init.normal_(norm.weight)
    return {
        "x": maps(b, c, h, w), "context": tokens(b, 3, 6), "norm": norm, "proj_in": nn.Conv2d(c, d, 1),
        "blocks": [_Mixes(d, 6), _Mixes(d, 6)], "proj_out": nn.Conv2d(d, c, 1),
    }  # fmt: skip


def _put_spatial(f):
    def forward(self, x, context=None):
        return f(x, context, self.norm, self.proj_in, list(self.transformer_blocks), self.proj_out)

    return [(attention_module.SpatialTransformer, "forward", forward)]


@exercise(
    difficulty=3,
    minutes=15,
    cases=lambda: {
        "a map of 3 x 5": _spatial_case(2, 4, 6, 3, 5),
        "one picture": _spatial_case(1, 4, 8, 4, 2),
        "a square map": _spatial_case(2, 4, 4, 4, 4),
    },
    hints=(
        "Normalise and project the map [b c h w]; then make tokens [b (h w) d] of it.",
        "Run the blocks one after the other, each with the context; fold the tokens back.",
        'rearrange(h, "b c h w -> b (h w) c") and back; at the end proj_out, and x is added.',
    ),
    mistakes=[
        ("return x + proj_out", "return proj_out", "The residual is missing: what comes out is added to x."),
        ("proj_in(norm(x))", "proj_in(x)", "The norm is missing: it comes before proj_in."),
        ("b c h w -> b (h w) c", "b c h w -> b (w h) c",
         "The pixels are flattened column by column: row by row, (h w), and folded back the same way."),
        ('"b (h w) c -> b c h w", h=height', '"b (w h) c -> b c h w", h=height',
         "The tokens are folded back column by column, but were flattened row by row."),
        ("",
         'tokens = rearrange(proj_in(norm(x)), "b c h w -> b (w h) c")\nfor block in blocks:'
         "\n    tokens = block(tokens, context)"
         '\nreturn x + proj_out(rearrange(tokens, "b (w h) c -> b c h w", h=x.shape[-2]))',
         "The pixels are taken column by column, (w h), on the way in and back: row by row, (h w)."),
        ("for block in blocks:", "for block in blocks[-1:]:",
         "Only the last block counts: the others are not run, or what they return is not handed on to the next."),
        ('    tokens = block(tokens, context)', '    tokens = block(tokens, context)\ntokens = tokens +'
         ' rearrange(proj_in(norm(x)), "b c h w -> b (h w) c")',
         "There is a residual too many, around the blocks: the only one is x, at the end."),
        ("proj_in(norm(x))", "norm(x)", "proj_in is missing."),
        ('proj_out(rearrange(tokens, "b (h w) c -> b c h w", h=height))',
         'rearrange(tokens, "b (h w) c -> b c h w", h=height)', "proj_out is missing."),
        ("",
         'height = x.shape[-2]\ntokens = rearrange(norm(x), "b c h w -> b (h w) c")\nfor block in blocks:\n    tokens ='
         ' block(tokens, context)\nreturn x + rearrange(tokens, "b (h w) c -> b c h w", h=height)',
         "Both projections are missing, proj_in and proj_out."),
        ("proj_in(norm(x))", "norm(proj_in(x)) if proj_in.weight.shape[0] == x.shape[1] else norm(x[:, :1])",
         "The norm comes after proj_in: before it."),
        ("block(tokens, context)", "block(tokens, context * 0)", "The blocks were not given the context."),
        ("for block in blocks:", "for block in blocks[:1]:", "Only the first block is run: all, one after the other."),
        ("tokens = block(tokens, context)", "tokens = tokens + block(tokens, context)",
         "You added the tokens to what each block returns: the blocks have their own residuals inside."),
        ("return x + proj_out", "return norm(x) + proj_out", "You added the normalised x: x itself is added."),
        ('rearrange(proj_in(norm(x)), "b c h w -> b (h w) c")',
         "proj_in(norm(x)).reshape(x.shape[0], x.shape[2] * x.shape[3], -1)",
         "You only reshaped [b c h w] to [b (h w) c], which mixes channels and pixels: the channels have to be"
         " brought to the end first."),
        ("for block in blocks:", "for block in blocks[::-1]:", "The blocks run in the reverse order."),
        ("for block in blocks:", "for block in []:", "No block is run."),
        ('rearrange(tokens, "b (h w) c -> b c h w", h=height)', "tokens.reshape(x.shape[0], -1, *x.shape[2:])",
         "The tokens are only reshaped on the way back, which mixes channels and pixels: exchange the axes first."),
        ("return x + proj_out", "return 0.5 * x + 0.5 * proj_out", "You took the mean of both: they are added."),
    ],
    swap=_put_spatial,
)  # fmt: skip
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


def _res_case(b: int, c: int, c_out: int, h: int, w: int, e: int = 6) -> dict:
    return {
        "x": maps(b, c, h, w), "emb": torch.randn(b, e),
        "in_layers": nn.Sequential(nn.GroupNorm(2, c), nn.SiLU(), nn.Conv2d(c, c_out, 3, padding=1)),
        "emb_layers": nn.Sequential(nn.SiLU(), nn.Linear(e, c_out)),
        "out_layers": nn.Sequential(nn.GroupNorm(2, c_out), nn.SiLU(), nn.Conv2d(c_out, c_out, 3, padding=1)),
        "skip_connection": nn.Identity() if c == c_out else nn.Conv2d(c, c_out, 1),
    }  # fmt: skip


def _put_res_block(f):
    def forward(self, x, emb):
        return f(x, emb, self.in_layers, self.emb_layers, self.out_layers, self.skip_connection)

    return [(unet_module.ResBlock, "forward", forward)]


@exercise(
    difficulty=3,
    minutes=15,
    cases=lambda: {
        "from 4 channels to 6": _res_case(2, 4, 6, 3, 5),
        "one picture": _res_case(1, 4, 8, 4, 3),
        "as many channels as before, a square": _res_case(2, 4, 4, 4, 4),
        "as many pictures as rows": _res_case(4, 2, 4, 4, 4, 4),
    },
    hints=(
        "Two halves, in_layers and out_layers; between them the time is added.",
        "emb_layers(emb) has the shape [b c]: the same shift for each pixel, so [b c 1 1].",
        "At the end the input is added, through skip_connection, since the number of channels may have changed.",
    ),
    mistakes=[
        ("skip_connection(x) + h", "h", "The residual is missing: skip_connection(x) is added at the end."),
        ("skip_connection(x) + h", "x + h if x.shape == h.shape else h",
         "x is added as it is: it has to go through skip_connection, which fits the channels."),
        ("h = h + emb_layers(emb)[:, :, None, None]", "pass",
         "The time never comes in: emb_layers(emb) is added between the two halves."),
        ("h + emb_layers(emb)[:, :, None, None]", "h * emb_layers(emb)[:, :, None, None]",
         "The time multiplies: here it is added. (A scale is used in other networks, with 1 + scale.)"),
        ("h + emb_layers(emb)[:, :, None, None]", "h * (1 + emb_layers(emb)[:, :, None, None])",
         "The time scales: here it is added, as a shift."),
        ("h + emb_layers(emb)[:, :, None, None]", "h - emb_layers(emb)[:, :, None, None]",
         "The time is subtracted: it is added."),
        ("[:, :, None, None]", "",
         "The time [b c] was not reshaped: it falls on rows and columns. It must be [b c 1 1]."),
        ("emb_layers(emb)", "emb_layers[1](emb)",
         "The SiLU before the Linear of emb_layers was left out: call emb_layers as a whole."),
        ("", "h = out_layers(in_layers(x))\nh = h + emb_layers(emb)[:, :, None, None]\nreturn skip_connection(x) + h",
         "The time is added at the end: it belongs between in_layers and out_layers, where the convolutions can"
         " react to it."),
        ("h = out_layers(h)\nreturn skip_connection(x) + h", "return out_layers(skip_connection(x) + h)",
         "The input is added before out_layers: it goes around both halves, and is added at the end."),
        ("", "h = in_layers(x)\nh = skip_connection(x) + h + emb_layers(emb)[:, :, None, None]"
         "\nreturn h + out_layers(h)",
         "The residual goes around out_layers alone: at the end skip_connection(x) is added, and nothing else."),
        ("h = in_layers(x)\nh = h + emb_layers(emb)[:, :, None, None]",
         "h = in_layers(x + emb_layers(emb)[:, :, None, None])",
         "The time is added to x, before in_layers: it belongs between in_layers and out_layers."),
        ("[:, :, None, None]", "[:, None, None, :]",
         "The time [b c] falls on the columns: [b 1 1 c]. It belongs to the channels, [b c 1 1]."),
        ("h = in_layers(x)", "h = x", "in_layers is missing."),
        ("return skip_connection(x) + h", "return in_layers(x) + emb_layers(emb)[:, :, None, None] + h",
         "What is added at the end is the hidden map, not the input: skip_connection(x) + h."),
        ("out_layers(h)", "h", "out_layers is missing."),
        ("h = out_layers(h)", "h = h + out_layers(h)",
         "There is a residual too many, around out_layers: the only one is skip_connection(x)."),
        ("emb_layers(emb)", "F.silu(emb_layers(emb))",
         "There is a SiLU too many after the time: emb_layers begins with one, and its Linear comes last."),
        ("emb_layers(emb)", "emb_layers(F.silu(emb))",
         "There is a SiLU too many before the time: emb_layers begins with one."),
        ("skip_connection(x) + h", "F.silu(skip_connection(x) + h)",
         "There is an activation at the end: the sum stays as it is."),
        ("skip_connection(x) + h", "2 * skip_connection(x) + h", "The input is added twice."),
        ("emb_layers(emb)", "emb_layers(emb.mean(dim=0, keepdim=True))",
         "You averaged the time over the batch: each picture has its own."),
        ("skip_connection(x) + h", "skip_connection(x) * h", "You multiplied: the input is added."),
        ("skip_connection(x) + h", "(skip_connection(x) + h) / 2**0.5",
         "You divided by √2 (other networks do): here it is the plain sum."),
        ("skip_connection(x) + h", "skip_connection(in_layers[0](x)) + h", "The normalised x is added: x itself is."),
        ("h + emb_layers(emb)[:, :, None, None]", "h + emb_layers(emb)[:1, :, None, None]",
         "The time of the first picture is used for all."),
        ("skip_connection(x) + h", "skip_connection(x) - h", "A minus for a plus: the input is added."),
    ],
    swap=_put_res_block,
)  # fmt: skip
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


@exercise(
    difficulty=3,
    minutes=15,
    cases=lambda: {
        "2 groups of 2": {"x": maps(2, 4, 3, 5), "groups": 2, "weight": torch.randn(4), "bias": torch.randn(4),
                          "eps": 1e-5},
        "one picture, 3 groups": {"x": maps(1, 6, 4, 3), "groups": 3, "weight": torch.randn(6), "bias": torch.randn(6),
                                  "eps": 1e-5},
        "a square with few numbers": {"x": 0.05 * maps(4, 4, 4, 4), "groups": 2, "weight": torch.randn(4),
                                      "bias": torch.randn(4), "eps": 1e-3},
    },
    hints=(
        "Reshape to [b groups (c/groups · h · w)]: mean and variance are taken over the last axis.",
        "The variance is the biased one: divided by n, not by n - 1.",
        "Then fold back, and multiply each channel by its weight and add its bias, [1 c 1 1].",
    ),
    mistakes=[
        ("unbiased=False", "unbiased=True",
         "You took the variance divided by n - 1: in a norm it is divided by n (unbiased=False)."),
        ("(variance + eps).sqrt()", "(variance.sqrt() + eps)",
         "eps is added to the standard deviation: it is added to the variance, under the root."),
        ("(variance + eps).sqrt()", "(variance + eps)", "You divided by the variance: by its root."),
        ("(variance + eps).sqrt()", "variance.sqrt()",
         "eps is missing: a group without variance would be divided by 0."),
        ("grouped - mean", "grouped", "The mean is not subtracted."),
        ("x.reshape(b, groups, -1)", "x.reshape(b, 1, -1).expand(b, groups, -1)[:, :1]",
         "You normalise over all channels together: each group for itself."),
        ("x.reshape(b, groups, -1)", "x.reshape(b, c, -1)",
         "You normalise each channel for itself (an instance norm): over the channels of a group together."),
        ("",
         "mean = x.mean(dim=(0, 2, 3), keepdim=True)\nvariance = x.var(dim=(0, 2, 3), keepdim=True, unbiased=False)"
         "\nreturn (x - mean) / (variance + eps).sqrt() * weight[:, None, None] + bias[:, None, None]",
         "You took mean and variance over the batch (a batch norm): each picture for itself, over the channels of a"
         " group and all pixels."),
        ("(grouped - mean) / (variance + eps).sqrt()",
         "grouped / (grouped.square().mean(dim=-1, keepdim=True) + eps).sqrt()",
         "You divided by the root mean square and subtracted nothing (an RMS norm): the mean goes first."),
        ("* weight[:, None, None] + bias[:, None, None]", "* weight[:, None, None] + (bias * weight)[:, None, None]",
         "The bias is added before the weight multiplies: first scale, then shift."),
        ("grouped.var(dim=-1, keepdim=True, unbiased=False)", "grouped.square().mean(dim=-1, keepdim=True)",
         "The variance is taken around 0: around the mean, which is subtracted before the square."),
        ("mean = grouped.mean(dim=-1, keepdim=True)\nvariance = grouped.var(dim=-1, keepdim=True, unbiased=False)",
         "mean = grouped.mean(dim=(0, 2), keepdim=True)\nvariance = grouped.var(dim=(0, 2), keepdim=True,"
         " unbiased=False)",
         "Mean and variance run over the batch as well: each picture for itself."),
        ("x.reshape(b, groups, -1)", "x.reshape(b, c // groups, -1)",
         "You took `groups` for the number of channels in a group: it is the number of groups."),
        ("* weight[:, None, None] + bias[:, None, None]", "", "Weight and bias are missing."),
        ("+ bias[:, None, None]", "", "The bias is missing."),
        ("* weight[:, None, None]", "* (1 + weight[:, None, None])", "The weight multiplies as it is, without 1 +."),
        ("* weight[:, None, None]", "", "The weight is missing."),
        ("eps).sqrt()", "1e-5).sqrt()", "You wrote down eps = 1e-5: it comes with the argument."),
        ("x.reshape(b, groups, -1)", "x.reshape(b, c // groups, groups, -1).transpose(1, 2).reshape(b, groups, -1)",
         "The groups are made of every n-th channel, and the channels come back in another order: those of a group lie"
         " beside each other."),
        ("grouped = x.reshape(b, groups, -1)\nmean = grouped.mean(dim=-1, keepdim=True)\nvariance ="
         " grouped.var(dim=-1, keepdim=True, unbiased=False)",
         "grouped = x.reshape(b, c // groups, groups, -1)\nmean = grouped.mean(dim=(1, 3), keepdim=True)\nvariance ="
         " grouped.var(dim=(1, 3), keepdim=True, unbiased=False)",
         "The groups are made of every n-th channel: the channels of a group lie beside each other."),
        ("",
         "b, c = x.shape[:2]\ngrouped = x.reshape(b, groups, c // groups, -1)\nmean = grouped.mean(dim=-1,"
         " keepdim=True).mean(dim=2, keepdim=True)\nvariance = grouped.var(dim=-1, keepdim=True,"
         " unbiased=False).mean(dim=2, keepdim=True)\nreturn ((grouped - mean) / (variance +"
         " eps).sqrt()).reshape(x.shape) * weight[:, None, None]"
         " + bias[:, None, None]",
         "You averaged the variances of the channels, each around its own mean: the variance is that of all numbers of"
         " a group around their common mean."),
        ("+ bias[:, None, None]", "- bias[:, None, None]", "The bias is subtracted: it is added."),
        ("* weight[:, None, None] + bias[:, None, None]", "* weight + bias",
         "Weight and bias [c] fall on the columns: they belong to the channels, [c 1 1]."),
        ("",
         "b, c = x.shape[:2]\ngrouped = x.reshape(b, groups, c // groups, *x.shape[2:])\nmean, variance ="
         " grouped.mean(dim=2, keepdim=True), grouped.var(dim=2, keepdim=True, unbiased=False)\nnormal = (grouped -"
         " mean) / (variance + eps).sqrt()\nreturn normal.reshape(x.shape) * weight[:, None, None] + bias[:, None,"
         " None]",
         "Mean and variance run over the channels of a group only, for each pixel by itself: over all pixels as"
         " well."),
        ("",
         "scaled = x * weight[:, None, None] + bias[:, None, None]\ngrouped = scaled.reshape(len(x), groups,"
         " -1)\nmean = grouped.mean(dim=-1, keepdim=True)\nvariance = grouped.var(dim=-1, keepdim=True,"
         " unbiased=False)\nreturn ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)",
         "Weight and bias come in before the norm, which undoes a part of them: scale and shift what is normalised."),
    ],
    swap=lambda f: [(nn.GroupNorm, "forward",
                     lambda self, x: f(x, self.num_groups, self.weight, self.bias, self.eps))],
)  # fmt: skip
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


@exercise(
    difficulty=1,
    minutes=5,
    cases=lambda: {
        "3 x 5 pixels": {"x": maps(), "conv": nn.Conv2d(4, 4, 3, padding=1)},
        "one picture": {"x": maps(1, 2, 4, 3), "conv": nn.Conv2d(2, 2, 3, padding=1)},
        "a square": {"x": maps(2, 4, 4, 4), "conv": nn.Conv2d(4, 4, 3, padding=1)},
    },
    hints=("F.interpolate(x, scale_factor=2, mode=...) or repeat_interleave along both axes.",
           "Repeat each pixel first, then smooth."),
    mistakes=[
        ('mode="nearest"', 'mode="bilinear"',
         "You interpolated: each pixel is repeated (nearest), and the convolution smooths."),
        ('mode="nearest"', 'mode="bilinear", align_corners=True',
         "You interpolated (with the corners aligned): each pixel is repeated (nearest)."),
        ('mode="nearest"', 'mode="bicubic"', "You interpolated with cubic curves: each pixel is repeated (nearest)."),
        ('return conv(F.interpolate(x, scale_factor=2, mode="nearest"))',
         'return F.interpolate(conv(x), scale_factor=2, mode="nearest")',
         "You convolved first: repeat the pixels first, so that the convolution smooths the steps."),
        ('return conv(F.interpolate(x, scale_factor=2, mode="nearest"))',
         'return F.interpolate(x, scale_factor=2, mode="nearest")',
         "The convolution is missing."),
        ('return conv(F.interpolate(x, scale_factor=2, mode="nearest"))', "return conv(x.repeat(1, 1, 2, 2))",
         "You put the picture down four times: each pixel is repeated, not the whole."),
        ('conv(F.interpolate(x, scale_factor=2, mode="nearest"))',
         'conv(conv(F.interpolate(x, scale_factor=2, mode="nearest")))', "You convolved twice."),
        ('return conv(F.interpolate(x, scale_factor=2, mode="nearest"))', "return conv(x)", "The map is not enlarged."),
        ('return conv(F.interpolate(x, scale_factor=2, mode="nearest"))',
         'u = F.interpolate(x, scale_factor=2, mode="nearest")\nreturn u + conv(u)',
         "You added the enlarged map: there is no residual here."),
        ("scale_factor=2", "scale_factor=4", "Four times the size: twice."),
        ("scale_factor=2", "scale_factor=(2, 1)", "Only the height is doubled: the width is, too."),
        ("scale_factor=2", "scale_factor=(1, 2)", "Only the width is doubled: the height is, too."),
        ('return conv(F.interpolate(x, scale_factor=2, mode="nearest"))',
         "u = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])\nu[..., ::2, ::2] = x\nreturn conv(u)",
         "Between the pixels there are zeros: each pixel is repeated."),
    ],
    swap=lambda f: [(unet_module.Upsample, "forward", lambda self, x, size=None: f(x, self.conv)),
                    (vae_module.Upsample, "forward", lambda self, x: f(x, self.conv))],
)  # fmt: skip
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


def _unet_case(b: int, h: int, w: int, c: int = 3) -> dict:
    return {
        "x": maps(b, 2, h, w), "input_blocks": [_Plus(2, c), _Plus(c, c), _Plus(c, c)], "middle_block": _Plus(c, c),
        "output_blocks": [_Plus(2 * c, c), _Plus(2 * c, c), _Plus(2 * c, c)],
    }  # fmt: skip


def _put_unet(f):
    def forward(self, x, timesteps, context=None):
        self._check(x, context)
        emb = self.time_embed(unet_module.timestep_embedding(timesteps, self.config.model_channels).to(x.dtype))

        def told(block):
            return lambda h: block(h, emb, context)

        down, up = ([told(block) for block in blocks] for blocks in (self.input_blocks, self.output_blocks))
        return self.out(f(x, down, told(self.middle_block), up))

    return [(unet_module.UNetModel, "forward", forward)]


@exercise(
    difficulty=3,
    minutes=15,
    cases=lambda: {
        "two pictures": _unet_case(2, 3, 5),
        "one picture": _unet_case(1, 4, 3),
        "square pictures": _unet_case(2, 4, 4, 4),
        "as many channels everywhere": _unet_case(2, 3, 4, 2),
    },
    hints=(
        "Down: keep the output of each input block in a list. Up: each output block is given one of them.",
        "The last that was kept is the first that is used: .pop().",
        "torch.cat([h, skips.pop()], dim=1): first h, then what comes from across, along the channels.",
    ),
    mistakes=[
        ("skips.pop()", "skips.pop(0)",
         "The skips are used in the order in which they were made: the last one first, since the way up is the way"
         " down in reverse."),
        ("[h, skips.pop()]", "[skips.pop(), h]",
         "The order of the two in `cat` is wrong: first h, then the skip. Trained weights expect it so."),
        ("h = middle_block(h)", "pass", "The middle block is missing."),
        ("dim=1", "dim=0", "You joined along the batch: along the channels, dim=1."),
        ("",
         "h, skips = x, [x]\nfor block in input_blocks:\n    h = block(h)\n    skips.append(h)\nh = middle_block(h)\n"
         "for block in output_blocks:\n    h = block(torch.cat([h, skips.pop(0)], dim=1))\nreturn h",
         "The skips begin with x, and are used from the first on: only what comes out of the input blocks, the last one"
         " first."),
        ("[h, skips.pop()]", "[h, (h, skips.pop())[0]]", "Nothing comes from across: you joined h with itself."),
        ("[h, skips.pop()]", "[h, h + skips.pop()]", "You added: the skip is put beside h, along the channels."),
        ("    h = block(h)\n    skips.append(h)", "    skips.append(h)\n    h = block(h)",
         "You kept what goes into each input block: what comes out of it is kept."),
        ("    h = block(h)\n    skips.append(h)", "    h = block(x)\n    skips.append(h)",
         "Each input block reads x: it reads what the one before has returned."),
        ("dim=1", "dim=2", "You joined along the height: along the channels, dim=1."),
        ("dim=1", "dim=3", "You joined along the width: along the channels, dim=1."),
        ("torch.cat([h, skips.pop()], dim=1)", "h + skips.pop()",
         "The skip is not put beside h, along the channels: torch.cat([h, skip], dim=1). (If it is added, or left out,"
         " the output block finds half of the channels that it expects.)"),
        ("h = middle_block(h)", "h = middle_block(h)\nskips.append(h)",
         "You kept the middle's output, too, and the first output block is given it twice: only those of the input"
         " blocks are kept."),
        ("h = middle_block(h)\nfor block in output_blocks:\n    h = block(torch.cat([h, ",
         "for block in output_blocks:\n    h = block(torch.cat([middle_block(h), ",
         "The middle block runs before each output block: once, after the last input block."),
        ("h = middle_block(h)", "h = middle_block(middle_block(h))", "The middle block runs twice."),
        ("h = middle_block(h)", "h = middle_block(h) + h",
         "You added h to what the middle block returns: it has its own residuals inside."),
        ("    skips.append(h)", "    skips.append(h * 0)",
         "Zeros are handed across: it is the output of each input block."),
        ("h = block(torch.cat([h, skips.pop()], dim=1))", "h = h + block(torch.cat([h, skips.pop()], dim=1))",
         "You added h to what an output block returns: the blocks have their own residuals inside."),
        ("for block in output_blocks:", "for block in output_blocks[::-1]:",
         "The output blocks run in the reverse order: the first of the list is the lowest."),
        ("[h, skips.pop()]", "[h, skips[-1]]", "Every output block is given the last skip: each has its own."),
        ("[h, skips.pop()]", "[h, skips[0]]", "Every output block is given the first skip: each has its own."),
        ("    h = block(torch.cat([h, skips.pop()], dim=1))\nreturn h",
         "    last = block(torch.cat([h, skips.pop()], dim=1))\nreturn last",
         "Each output block is given the middle's output: what one returns is handed on to the next."),
    ],
    swap=_put_unet,
)  # fmt: skip
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
