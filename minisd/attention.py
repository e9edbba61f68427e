"""Attention: where pixels look at each other, and where the text comes in.

A feature map of h x w pixels is read as a sequence of h*w tokens. Each transformer block lets every
pixel look at every other pixel (self-attention, `attn1`), then at every word of the prompt
(cross-attention, `attn2`), then thinks about what it saw (`ff`).

Source: Vaswani et al. 2017 (arXiv:1706.03762); Rombach et al. 2022 (arXiv:2112.10752), section 3.3;
CompVis `ldm/modules/attention.py`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def attention(
    q: Float[Tensor, "b heads n d"],
    k: Float[Tensor, "b heads m d"],
    v: Float[Tensor, "b heads m d"],
    causal: bool = False,
    record: Callable[[Tensor], None] | None = None,
) -> Float[Tensor, "b heads n d"]:
    """softmax(q kᵀ / √d) v: every query takes a weighted mean of the values (Vaswani et al., eq. 1).

    The one attention of the package: UNet, VAE and CLIP all call it, and it picks the kernel.
    `causal` lets token i look at tokens 0..i only, as a language model must (CLIP's text tower).
    `record` is called with the weights [b heads n m], which the fused kernel never holds (minisd.record_attention).
    """
    if record or _plain_is_faster(q):
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if causal:
            n, m = scores.shape[-2:]
            scores = scores.masked_fill(torch.ones(n, m, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
        weights = scores.softmax(dim=-1)
        if record:
            record(weights)
        return weights.to(v.dtype) @ v
    # The same sum without ever holding the n x m table in memory: at 64x64 pixels that table has 16.8 million
    # entries a head. Rabe & Staats 2021 (arXiv:2112.05682), Dao et al. 2022 (arXiv:2205.14135).
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _plain_is_faster(q: Tensor) -> bool:
    """In bf16 on a CPU the fused kernel's backward pass is several times slower than the three lines above."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()


class CrossAttention(nn.Module):
    """Queries from the picture, keys and values from the context: each pixel asks, each word answers.

    Without a context it is self-attention. No biases on the way in, one on the way out, as the checkpoint has it.

    Args:
        query_dim: channels of x.
        context_dim: channels of the context; None for self-attention.
        heads, dim_head: the inner width is heads * dim_head.
    """

    record: Callable[[Tensor], None] | None = None  # is called with the weights, while somebody looks at them

    def __init__(self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64):
        super().__init__()
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(context_dim, heads * dim_head, bias=False)
        self.to_v = nn.Linear(context_dim, heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, query_dim))

    def forward(
        self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m d"] | None = None
    ) -> Float[Tensor, "b n c"]:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(a, "b n (h d) -> b h n d", h=self.heads) for a in (q, k, v))
        out = attention(q, k, v, record=self.record)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    """x · GELU(gate): half of the channels decide how much of the other half passes (Shazeer 2020, arXiv:2002.05202).

    The value comes first and the gate second; the GELU is the exact one (erf), not the tanh approximation.
    """

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c_out"]:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """What a token does on its own: widen by `mult`, gate, and come back."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, mult * dim), nn.Dropout(dropout), nn.Linear(mult * dim, dim))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; each normalised before and added after (pre-norm).

    CompVis `attention.py: BasicTransformerBlock`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        context_dim: int | None = None,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        self.attn1 = CrossAttention(dim, None, heads, dim_head)  # pixels look at pixels
        self.ff = FeedForward(dim, dropout=dropout)
        self.attn2 = CrossAttention(dim, context_dim, heads, dim_head)  # pixels look at words
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.use_checkpoint = use_checkpoint

    def forward(
        self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m d"] | None = None
    ) -> Float[Tensor, "b n c"]:
        # Gradient checkpointing: forget what happened inside and compute it again on the way back, which
        # trades a third more time for most of the memory (Chen et al. 2016, arXiv:1604.06174).
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, context, use_reentrant=False)
        return self._forward(x, context)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        x = x + self.ff(self.norm3(x))
        return x


class SpatialTransformer(nn.Module):
    """A transformer over the pixels of a feature map: flatten, attend, fold back, add.

    `proj_out` starts at zero, so that a new block changes nothing until it has learned something. The
    projections are 1x1 convolutions in SD 1 (SD 2 has Linear layers there). CompVis `attention.py: SpatialTransformer`.
    """

    def __init__(
        self,
        in_channels: int,
        heads: int,
        dim_head: int,
        depth: int = 1,
        context_dim: int | None = None,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        inner_dim = heads * dim_head
        self.norm = nn.GroupNorm(32, in_channels, eps=1e-6)  # 1e-6 here, 1e-5 in the UNet's ResBlocks
        self.proj_in = nn.Conv2d(in_channels, inner_dim, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner_dim, heads, dim_head, context_dim, dropout, use_checkpoint)
            for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Conv2d(inner_dim, in_channels, 1))

    def forward(
        self, x: Float[Tensor, "b c h w"], context: Float[Tensor, "b m d"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        h, w = x.shape[-2:]
        # contiguous: the numbers of a token side by side, once, or each LayerNorm below would have to copy them so
        tokens = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c").contiguous()
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(rearrange(tokens, "b (h w) c -> b c h w", h=h, w=w))


class AttentionBlock(nn.Module):
    """Self-attention over the pixels alone, in the UNets that read no text. CompVis `openaimodel.py: AttentionBlock`.

    One 1-D convolution makes queries, keys and values; its channels are sorted by head first, and by q, k, v within.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(32, channels)  # eps 1e-5 here, not SpatialTransformer's 1e-6
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        tokens = self.qkv(self.norm(x).flatten(2))
        q, k, v = rearrange(tokens, "b (h three d) n -> three b h n d", h=self.heads, three=3)
        out = rearrange(attention(q, k, v), "b h n d -> b (h d) n")
        return x + self.proj_out(out).reshape(x.shape)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters to zero: a residual branch that ends in it starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
