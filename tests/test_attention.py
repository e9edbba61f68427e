"""Attention: both kernels against the sum written out, and what must hold for any softmax."""

import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisd.attention import (
    GEGLU,
    AttentionBlock,
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    SpatialTransformer,
    attention,
)

MODULE = import_module("minisd.attention")  # as `minisd.attention` is the function
KERNELS = pytest.mark.parametrize("plain", [True, False], ids=["plain", "fused"])
seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(q, k, v, causal=False):
    """softmax(q kᵀ / √d) v, one query at a time, in float64."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        m = min(i + 1, k.shape[2]) if causal else k.shape[2]
        scores = [float(q[b, h, i].double() @ k[b, h, j].double()) / math.sqrt(q.shape[-1]) for j in range(m)]
        weights = [math.exp(score - max(scores)) for score in scores]
        out[b, h, i] = sum(w * v[b, h, j].double() for j, w in enumerate(weights)) / sum(weights)
    return out.float()


@pytest.fixture
def use(monkeypatch):
    """use(plain): have every attention computed by one kernel."""
    return lambda plain: monkeypatch.setattr(MODULE, "_plain_is_faster", lambda *_: plain)


@KERNELS
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(("n", "m"), [(6, 6), (4, 7), (7, 4)])
def test_both_kernels_equal_the_sum_written_out(use, plain, causal, n, m):
    use(plain)
    q, k, v = draw(0, 2, 3, n, 8), draw(1, 2, 3, m, 8), draw(2, 2, 3, m, 8)
    torch.testing.assert_close(attention(q, k, v, causal), by_hand(q, k, v, causal), atol=2e-6, rtol=0)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_both_kernels_have_the_same_gradients(use, causal):
    gradients = []
    for plain in (True, False):
        use(plain)
        inputs = [draw(i, 2, 2, 9, 16).requires_grad_() for i in range(3)]
        gradients.append(torch.autograd.grad((attention(*inputs, causal) * draw(3, 2, 2, 9, 16)).sum(), inputs))
    torch.testing.assert_close(*gradients, atol=2e-6, rtol=0)


def test_bfloat16_in_training_stays_bfloat16_and_near():
    """Where the plain kernel is chosen by itself: bf16, on a CPU, with gradients."""
    q, k, v = (draw(i, 1, 2, 5, 8) for i in range(3))
    out = attention(q.bfloat16().requires_grad_(), k.bfloat16(), v.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), by_hand(q, k, v), atol=0.03, rtol=0)


@KERNELS
@settings(max_examples=25, deadline=None)
@given(seed=seeds, scale=st.floats(0.01, 30), n=st.integers(1, 5), m=st.integers(1, 9), causal=st.booleans())
def test_the_output_is_a_weighted_mean_of_the_values(plain, seed, scale, n, m, causal):
    """So it lies between the smallest and the largest of them, channel by channel, and equal values are kept."""
    q, k, v = scale * draw(seed, 1, 2, n, 4), draw(seed + 1, 1, 2, m, 4), draw(seed + 2, 1, 2, m, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "_plain_is_faster", lambda *_: plain)
        out = attention(q, k, v, causal)
        constant = attention(q, k, torch.full_like(v, 3.0), causal)
    assert (out >= v.amin(dim=2, keepdim=True) - 1e-5).all() and (out <= v.amax(dim=2, keepdim=True) + 1e-5).all()
    torch.testing.assert_close(constant, torch.full_like(constant, 3.0), atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, order=st.permutations(range(6)))
def test_the_order_of_keys_with_their_values_changes_nothing(seed, order):
    q, k, v = draw(seed, 1, 2, 3, 4), draw(seed + 1, 1, 2, 6, 4), draw(seed + 2, 1, 2, 6, 4)
    torch.testing.assert_close(attention(q, k[:, :, order], v[:, :, order]), attention(q, k, v), atol=2e-6, rtol=0)


@KERNELS
def test_causal_attention_sees_nothing_later(use, plain):
    use(plain)
    q, k, v = (draw(i, 1, 1, 6, 4) for i in range(3))
    before = attention(q, k, v, causal=True)
    k[:, :, 4:], v[:, :, 4:] = 5.0, -5.0
    after = attention(q, k, v, causal=True)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.isclose(before[:, :, 4:], after[:, :, 4:]).all(dim=-1).any()


def test_cross_attention_equals_torchs_multi_head_attention(randomise):
    ours = randomise(CrossAttention(query_dim=24, context_dim=10, heads=3, dim_head=8))
    theirs = torch.nn.MultiheadAttention(24, 3, bias=True, kdim=10, vdim=10, batch_first=True)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(ours.to_q.weight)
        theirs.k_proj_weight.copy_(ours.to_k.weight)
        theirs.v_proj_weight.copy_(ours.to_v.weight)
        theirs.in_proj_bias.zero_()
        theirs.out_proj.load_state_dict(ours.to_out[0].state_dict())
    x, context = draw(0, 2, 5, 24), draw(1, 2, 7, 10)
    torch.testing.assert_close(ours(x, context), theirs(x, context, context)[0], atol=2e-5, rtol=0)


def test_without_a_context_pixels_look_at_each_other(randomise):
    layer, x = randomise(CrossAttention(query_dim=16, heads=2, dim_head=8)), draw(0, 2, 5, 16)
    assert torch.equal(layer(x), layer(x, x))


def test_geglu_by_hand():
    """The value first, the gate second, and the exact GELU, x Φ(x): the tanh approximation is 3e-4 off at 2.3."""
    layer = GEGLU(1, 1)
    with torch.no_grad():
        layer.proj.weight.copy_(torch.tensor([[3.0], [1.0]]))  # value 3x, gate x
        layer.proj.bias.zero_()
    for x in (-2.3, -0.5, 0.0, 1.0, 2.3):
        expected = 3 * x * x * 0.5 * (1 + math.erf(x / math.sqrt(2)))
        assert layer(torch.tensor([[[x]]])).item() == pytest.approx(expected, abs=1e-5)


def test_feed_forward_widens_by_four_and_treats_each_token_alone(randomise):
    layer, x = randomise(FeedForward(8)), draw(0, 2, 5, 8)
    assert layer.net[0].proj.out_features == 2 * 32 and layer.net[2].in_features == 32
    torch.testing.assert_close(layer(x)[:, 3:4], layer(x[:, 3:4]), atol=1e-6, rtol=0)


def test_a_transformer_block_normalises_before_and_adds_after(randomise):
    block, x, context = randomise(BasicTransformerBlock(16, 2, 8, context_dim=6)), draw(0, 2, 5, 16), draw(1, 2, 3, 6)
    h = x + block.attn1(block.norm1(x))
    h = h + block.attn2(block.norm2(h), context)
    torch.testing.assert_close(block(x, context), h + block.ff(block.norm3(h)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("heads", [1, 4])
@torch.no_grad()
def test_an_attention_block_equals_diffusers(diffusers, randomise, heads):
    """One convolution makes q, k and v, head by head; diffusers has a Linear layer for each."""
    ours = randomise(AttentionBlock(32, heads))
    theirs = diffusers.models.attention_processor.Attention(
        32, heads=heads, dim_head=32 // heads, norm_num_groups=32, eps=1e-5, bias=True, residual_connection=True
    ).eval()
    theirs.group_norm.load_state_dict(ours.norm.state_dict())
    for i, layer in enumerate((theirs.to_q, theirs.to_k, theirs.to_v)):
        layer.weight.copy_(ours.qkv.weight.reshape(heads, 3, 32 // heads, 32)[:, i].reshape(32, 32))
        layer.bias.copy_(ours.qkv.bias.reshape(heads, 3, 32 // heads)[:, i].reshape(32))
    theirs.to_out[0].weight.copy_(ours.proj_out.weight[..., 0])
    theirs.to_out[0].bias.copy_(ours.proj_out.bias)
    x = draw(0, 2, 32, 4, 6)
    torch.testing.assert_close(ours(x), theirs(x), atol=2e-5, rtol=0)
    assert torch.equal(AttentionBlock(32, heads)(x), x)  # a new one changes nothing


def test_a_new_spatial_transformer_changes_nothing():
    layer, x = SpatialTransformer(32, 2, 16, context_dim=6), draw(0, 2, 32, 4, 6)
    assert torch.equal(layer(x, draw(1, 2, 3, 6)), x)


def test_a_spatial_transformer_does_not_know_where_a_pixel_is(randomise):
    """There is no position in it (the convolutions around it have that): a mirrored map gives a mirrored map."""
    layer = randomise(SpatialTransformer(32, 2, 16, context_dim=6))
    x, context = draw(0, 2, 32, 4, 6), draw(1, 2, 3, 6)
    out = layer(x, context)
    assert out.shape == x.shape and not torch.allclose(out, x, atol=0.1)
    torch.testing.assert_close(layer(x.flip(3), context), out.flip(3), atol=2e-5, rtol=0)
    torch.testing.assert_close(layer(x.mT.contiguous(), context), out.mT, atol=2e-5, rtol=0)
