"""Stage 3, continued: attention, by which each pixel reads the other pixels and the prompt.

    attention(Q, K, V) = softmax(Q Kᵀ / √d) V                                             (Transformer, eq. 1)

In a convolution, a pixel sees only its neighbours, and there is no input for a text. Attention solves both problems. It
works on tokens, which are vectors in a sequence: here the h·w pixels of a feature map, or the words of the prompt. Each
token that reads has a query, which says what it looks for. Each token that is read has a key, which says what it can be
found by, and a value, which is what it passes on. The better a key matches the query, the more of its value is taken.

    self-attention     queries, keys and values from the pixels: distant parts of the picture can agree
    cross-attention    queries from the pixels, keys and values from the prompt: this is where the text comes in

From the inside out: `attention` is the equation, CrossAttention makes its queries, keys and values,
BasicTransformerBlock joins both kinds with a FeedForward, and SpatialTransformer turns a feature map into tokens and
back. The comments cite:

    Transformer   Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762)
    LDM           Rombach et al., "High-Resolution Image Synthesis with Latent …", 2022 (arXiv:2112.10752)

Classes and parameters have the names of CompVis, `ldm/modules/attention.py`.
"""

import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


def attention(
    q: Float[Tensor, "b heads n d"],
    k: Float[Tensor, "b heads m d"],
    v: Float[Tensor, "b heads m d"],
    causal: bool = False,
    record: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "b heads n d"]:
    """softmax(q kᵀ / √d) v: each of n queries takes a weighted mean of m values (Transformer, eq. 1).

    This is the only attention in the package: UNet, VAE and CLIP all call it.

    Args:
        q, k, v: queries [b heads n d], keys and values [b heads m d].
        causal: let token i read tokens 0 … i only, as a language model must (CLIP's text encoder).
        record: a function that receives the weights [b heads n m] and returns those to use instead: the same for
            `minisd.record_attention`, which only looks at them, and others for `editing.prompt_to_prompt`.
    """
    if record or _plain_is_faster(q):
        # How well does each query match each key? [b heads n d] @ [b heads d m] -> [b heads n m]. A dot product sums
        # d terms, so its standard deviation grows as √d. Without the division the largest score would soon take all
        # the weight, and the gradient of the softmax would vanish (Transformer, section 3.2.1).
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if causal:
            # Above the diagonal are the tokens that come later. exp(-∞) = 0, so they get no weight.
            n, m = scores.shape[-2:]
            scores = scores.masked_fill(torch.ones(n, m, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
        # Each row becomes positive weights that sum to 1: how much of each value this query takes.
        weights = scores.softmax(dim=-1)
        if record:
            weights = record(weights)
        # The weighted mean of the values: [b heads n m] @ [b heads m d] -> [b heads n d]. Under autocast the softmax
        # was computed in float32, which the values are not.
        return weights.to(v.dtype) @ v
    # The same in one kernel, which works through the keys in pieces and never holds all n × m weights. At 64×64 pixels
    # they would be 16.8 million for each head (Rabe & Staats 2021, arXiv:2112.05682; FlashAttention: Dao et al. 2022,
    # arXiv:2205.14135).
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _plain_is_faster(q: Tensor) -> bool:
    """In bf16 on a CPU, the backward pass of the fused kernel is several times slower than the plain equation."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()


class _Recording(threading.local):
    """The functions that record or change attention weights in this thread, by the layers that they belong to.

    They are not kept in the layers, because other threads use these too, and a copy of the model would copy them.
    """

    def __init__(self):
        self.recorders: list[dict[nn.Module, Callable[[Tensor], Tensor]]] = []


RECORDING = _Recording()


class CrossAttention(nn.Module):
    """Attention from the tokens x to the tokens of a context, or, without a context, to x itself.

        Q = W_Q x,  K = W_K context,  V = W_V context;  W_O attention(Q, K, V) + b_O             (LDM, section 3.3)

    Args:
        query_dim: channels of x, and of the output.
        context_dim: channels of the context; None for self-attention.
        heads, dim_head: number of heads, and channels in each.

    (CompVis: attention.py, CrossAttention. The first three projections have no bias, as in the checkpoint.)
    """

    def __init__(self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64):
        super().__init__()
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, heads * dim_head, bias=False)
        # Pixels and words have different widths (320 and 768 at the first level of SD v1). These two bring the words
        # to the width of the queries, so that the two can be compared.
        self.to_k = nn.Linear(context_dim, heads * dim_head, bias=False)
        self.to_v = nn.Linear(context_dim, heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, query_dim))  # in the checkpoint, it is to_out.0

    @property
    def record(self) -> Callable[[Tensor], Tensor] | None:
        """The function that receives this layer's weights; None if nothing records or changes them in this thread."""
        recorders = [recorder[self] for recorder in RECORDING.recorders if self in recorder]

        def in_turn(weights: Tensor) -> Tensor:
            # Each function gets the weights that the one before it returned.
            for record in recorders:
                weights = record(weights)
            return weights

        return in_turn if recorders else None

    def forward(
        self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m d"] | None = None
    ) -> Float[Tensor, "b n c"]:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        # The channels are cut into heads. Each head attends with weights of its own, so one pixel can read the word
        # for its colour in one head and the opposite edge of the object in another (Transformer, section 3.2.2).
        q, k, v = (rearrange(a, "b n (h d) -> b h n d", h=self.heads) for a in (q, k, v))
        out = attention(q, k, v, record=self.record)
        # The heads are put side by side again, and the last layer mixes them: [b heads n d] -> [b n c].
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    """A linear layer with a gate: value · GELU(gate), where one product makes both.

    (Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202, section 2; CompVis: attention.py, GEGLU)
    """

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c_out"]:
        # [b n 2·c_out] -> two of [b n c_out]. The value comes first, as in the checkpoint. If the two are swapped, all
        # shapes still fit and the output is wrong.
        x, gate = self.proj(x).chunk(2, dim=-1)
        # The gate says for each channel how much of its value passes. This is the exact GELU, x Φ(x); CLIP in SD v1
        # uses an approximation, x · sigmoid(1.702 x).
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers that process each token by itself, [b n c] -> [b n c].

    Attention only takes means of what is there already. This network computes something new from what a token has
    gathered: it widens the token to `mult` times its channels, gates them, and brings it back.
    (Transformer, section 3.3; CompVis: attention.py, FeedForward)
    """

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0):
        super().__init__()
        # The dropout is in the middle even if it is 0, because in the checkpoint the last layer is net.2.
        self.net = nn.Sequential(GEGLU(dim, mult * dim), nn.Dropout(dropout), nn.Linear(mult * dim, dim))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward network, each normalised before and added after.

    Without a context, the second attention is self-attention too. (LDM, appendix E.2.1; CompVis: attention.py,
    BasicTransformerBlock)
    """

    def __init__(self, dim: int, heads: int, dim_head: int, context_dim: int | None = None, dropout: float = 0.0):
        super().__init__()
        # The names attn1 and attn2, and this order, are those of the checkpoint.
        self.attn1 = CrossAttention(dim, None, heads, dim_head)
        self.ff = FeedForward(dim, dropout=dropout)
        self.attn2 = CrossAttention(dim, context_dim, heads, dim_head)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self, x: Float[Tensor, "b n c"], context: Float[Tensor, "b m d"] | None = None
    ) -> Float[Tensor, "b n c"]:
        # Each line computes a correction and adds it to x [b n c]. The norm is inside the branch, so the sum runs
        # from the input to the output untouched, which keeps deep transformers trainable ("pre-norm": Xiong et al.,
        # "On Layer Normalization in the Transformer Architecture", 2020).
        x = x + self.attn1(self.norm1(x))  # pixels read pixels
        x = x + self.attn2(self.norm2(x), context)  # pixels read words
        x = x + self.ff(self.norm3(x))  # each pixel by itself
        return x


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, [b c h w] -> [b c h w].

    The projections around the blocks are 1×1 convolutions in SD 1, and Linear layers in SD 2.
    (LDM, appendix E.2.1; CompVis: attention.py, SpatialTransformer)
    """

    def __init__(
        self,
        in_channels: int,
        heads: int,
        dim_head: int,
        depth: int = 1,
        context_dim: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        inner_dim = heads * dim_head
        # The checkpoint was trained with eps 1e-6 here and with 1e-5 in the ResBlocks, which its weights do not show.
        self.norm = nn.GroupNorm(32, in_channels, eps=1e-6)
        # Into the blocks and out of them again. Inside, a token has dim_head channels for each head.
        self.proj_in = nn.Conv2d(in_channels, inner_dim, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner_dim, heads, dim_head, context_dim, dropout) for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Conv2d(inner_dim, in_channels, 1))

    def forward(
        self, x: Float[Tensor, "b c h w"], context: Float[Tensor, "b m d"] | None = None
    ) -> Float[Tensor, "b c h w"]:
        h, w = x.shape[-2:]
        # The map becomes a sequence of h·w tokens, row by row. Attention does not know where in the map a token was,
        # and no position is added: the convolutions around this layer, which pad the edges with zeros, tell it.
        # contiguous() puts the numbers of a token side by side in memory, once, or each LayerNorm would have to.
        # [b c h w] -> [b hw inner_dim], where inner_dim is c in SD v1
        tokens = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c").contiguous()
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        # Folded back to a map, [b hw inner_dim] -> [b c h w], and added to the input: a new layer, whose proj_out is
        # zero, changes nothing.
        return x + self.proj_out(rearrange(tokens, "b (h w) c -> b c h w", h=h, w=w))


class AttentionBlock(nn.Module):
    """Self-attention alone, [b c h w] -> [b c h w], for a UNet that reads no text.

    (CompVis: openaimodel.py, AttentionBlock with QKVAttentionLegacy; not used in SD v1)
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(32, channels)  # eps 1e-5 here, not the 1e-6 of SpatialTransformer
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        # [b c h w] -> [b c n], then one 1×1 convolution makes queries, keys and values: [b 3c n].
        tokens = self.qkv(self.norm(x).flatten(2))
        # Its channels are sorted by head first, and by q, k, v within a head.
        q, k, v = rearrange(tokens, "b (h three d) n -> three b h n d", h=self.heads, three=3)
        out = rearrange(attention(q, k, v), "b h n d -> b (h d) n")
        return x + self.proj_out(out).reshape(x.shape)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of a module to zero, and return it. (CompVis: util.py, zero_module)

    A residual branch that ends in it adds nothing at first, so that the network starts as the identity and each branch
    comes in as it learns. The zeros do not stay: the gradient of a layer's weights depends on its input, not on them.
    """
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
