"""The UNet: equal to CompVis's and to diffusers', output and gradients, with no layer left at zero."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from minisd.attention import CrossAttention, SpatialTransformer
from minisd.instruments.unet_outline import outline
from minisd.unet import Downsample, ResBlock, UNetConfig, UNetModel, Upsample, timestep_embedding

COMPVIS = UNetConfig(
    model_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(2, 1), num_heads=4, context_dim=32
)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def compvis(load_fixture):
    """Input, output, loss and gradients of CompVis's own UNetModel, and ours with the same weights."""
    tensors, info = load_fixture("compvis_unet_sd")
    unet = UNetModel(COMPVIS)
    unet.load_state_dict({name.removeprefix("w."): w for name, w in tensors.items() if name.startswith("w.")})
    return unet.eval(), tensors, info["config"]["grad_norms"]


def compvis_loss(unet, tensors):
    out = unet(tensors["x"], tensors["t"], tensors["context"])
    return out, (out - tensors["grad_target"]).square().mean()


# -- against CompVis -----------------------------------------------------------------------------------------------


def test_output_and_loss_equal_compvis(compvis):
    unet, tensors, _ = compvis
    with torch.no_grad():
        out, loss = compvis_loss(unet, tensors)
    torch.testing.assert_close(out, tensors["out"], atol=2e-5, rtol=0)
    torch.testing.assert_close(loss, tensors["loss"].reshape(()), atol=2e-5, rtol=0)


def test_gradients_equal_compvis(compvis):
    """The norm of the gradient of every parameter, and two gradients in full."""
    unet, tensors, norms = compvis
    _, loss = compvis_loss(unet, tensors)
    gradients = dict(zip(dict(unet.named_parameters()), torch.autograd.grad(loss, unet.parameters()), strict=True))
    assert gradients.keys() == norms.keys()
    for name, gradient in gradients.items():
        assert gradient.norm().item() == pytest.approx(norms[name], abs=2e-6, rel=2e-5), name
    whole = [name.removeprefix("grad.") for name in tensors if name.startswith("grad.")]
    assert len(whole) == 2
    for name in whole:
        torch.testing.assert_close(gradients[name], tensors[f"grad.{name}"], atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("dim", [320, 33], ids=["even", "odd"])
def test_timestep_embedding_equals_compvis(load_fixture, dim):
    tensors, _ = load_fixture("timestep_embedding")
    embedding = timestep_embedding(tensors["t"], dim)
    assert embedding.shape == (len(tensors["t"]), dim)
    torch.testing.assert_close(embedding, tensors[f"openai_{dim}"], atol=2e-5, rtol=0)


# -- against diffusers ---------------------------------------------------------------------------------------------

# As Stable Diffusion's: no transformer at the bottom level; but with a head that has the same width at each level.
OTHER = UNetConfig(
    model_channels=32, channel_mult=(1, 2, 2), attention_resolutions=(2, 1), num_heads=None, num_head_channels=16,
    context_dim=24,
)  # fmt: skip


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (7, 10), (5, 1)], ids=["square", "wide", "odd", "narrow"])
@torch.no_grad()
def test_output_equals_diffusers(diffusers, randomise, size):
    """The names are translated by diffusers' own reader of CompVis checkpoints."""
    ours = randomise(UNetModel(OTHER))
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4, 4),  # which is their number
        cross_attention_dim=24,
    ).eval()
    state = {f"model.diffusion_model.{name}": w for name, w in ours.state_dict().items()}
    convert = diffusers.loaders.single_file_utils.convert_ldm_unet_checkpoint
    theirs.load_state_dict(convert(state, theirs.config))

    x, t, context = draw(1, 2, 4, *size), torch.tensor([3, 870]), draw(2, 2, 7, 24)
    expected = theirs(x, t, encoder_hidden_states=context).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, t, context), expected, atol=2e-5, rtol=0)


# -- what it is made of --------------------------------------------------------------------------------------------


def test_stable_diffusion_v1_has_860_million_parameters():
    with torch.device("meta"):
        unet = UNetModel()
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


def test_the_norms_have_the_epsilons_of_the_checkpoint():
    """1e-6 in front of a SpatialTransformer, 1e-5 elsewhere: too little to show in an output of random weights."""
    unet = UNetModel(COMPVIS)
    norms = {name: layer.eps for name, layer in unet.named_modules() if isinstance(layer, nn.GroupNorm | nn.LayerNorm)}
    transformers = [name for name, layer in unet.named_modules() if isinstance(layer, SpatialTransformer)]
    before_transformers = {f"{name}.norm" for name in transformers}
    assert len(before_transformers) == 7
    assert norms == {name: 1e-6 if name in before_transformers else 1e-5 for name in norms}


def test_heads_by_number_or_by_width():
    assert [UNetConfig(num_heads=8).heads(c) for c in (320, 1280)] == [8, 8]
    assert [UNetConfig(num_heads=None, num_head_channels=64).heads(c) for c in (320, 1280)] == [5, 20]

    unet = UNetModel(OTHER)
    layers = [layer for layer in unet.modules() if isinstance(layer, CrossAttention)]
    assert all(layer.to_q.out_features == 16 * layer.heads for layer in layers)
    # two on the way down and three on the way up at each of two levels, one in the middle; each with attn1 and attn2
    assert len(layers) == 2 * (2 * (2 + 3) + 1)


def test_a_new_unet_predicts_zero_and_a_new_res_block_changes_nothing():
    block, x, emb = ResBlock(32, 16, 32), draw(0, 2, 32, 4, 4), draw(1, 2, 16)
    assert torch.equal(block(x, emb), x)
    unet = UNetModel(COMPVIS)
    assert torch.equal(unet(draw(0, 2, 4, 4, 4), torch.tensor([0, 999]), draw(1, 2, 3, 32)), torch.zeros(2, 4, 4, 4))


def test_down_halves_and_up_doubles(randomise):
    x = draw(0, 1, 32, 6, 4)
    assert randomise(Downsample(32))(x).shape == (1, 32, 3, 2)
    up = Upsample(32)
    with torch.no_grad():  # a convolution that passes its centre on: each pixel becomes four
        up.conv.weight.zero_()
        up.conv.weight[range(32), range(32), 1, 1] = 1
        up.conv.bias.zero_()
    assert torch.equal(up(x), x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


@torch.no_grad()
def test_every_input_counts_and_each_picture_has_its_own(compvis):
    """Another x, t or context of one picture changes that picture and no other."""
    unet, tensors, _ = compvis
    inputs = {name: tensors[name] for name in ("x", "t", "context")}
    before = unet(*inputs.values())
    for name, value in inputs.items():
        changed = value.clone()
        changed[1] = 500 if name == "t" else -changed[1]
        after = unet(*(inputs | {name: changed}).values())
        torch.testing.assert_close(after[0], before[0], atol=1e-5, rtol=0)
        assert (after[1] - before[1]).abs().max() > 1e-3, name


@torch.no_grad()
def test_the_order_of_the_words_changes_nothing(compvis):
    """Where a word stands is the text encoder's business: the UNet sees a set of words."""
    unet, tensors, _ = compvis
    out = unet(tensors["x"], tensors["t"], tensors["context"].flip(1))
    torch.testing.assert_close(out, tensors["out"], atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_unet_without_a_context(randomise):
    unet = randomise(UNetModel(replace(COMPVIS, context_dim=None)))
    assert unet(draw(0, 2, 4, 4, 4), torch.tensor([1, 2])).isfinite().all()


@torch.no_grad()
def test_in_half_precision_the_prediction_is_nearly_the_same(compvis):
    unet, tensors, _ = compvis
    half = UNetModel(COMPVIS).bfloat16()
    half.load_state_dict(unet.state_dict())
    out = half(tensors["x"].bfloat16(), tensors["t"], tensors["context"].bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out.float() - tensors["out"]).std() < 0.05 * tensors["out"].std()


# -- gradient checkpointing ----------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_neither_output_nor_gradients(compvis):
    unet, tensors, _ = compvis
    frugal = UNetModel(COMPVIS)
    frugal.use_checkpoint()
    frugal.load_state_dict(unet.state_dict())
    found = []
    for model in (unet, frugal):
        out, loss = compvis_loss(model, tensors)
        found.append([out, loss, *torch.autograd.grad(loss, model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(theirs, ours)


def test_gradient_checkpointing_keeps_less_for_the_backward_pass(randomise):
    """Counted: what autograd saves, without the parameters and without what enters a layer that is computed again."""
    unet = randomise(UNetModel(COMPVIS))
    parameters = {p.data_ptr() for p in unet.parameters()}
    kept = []
    for on in (False, True):
        unet.use_checkpoint(on)
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            unet(draw(0, 2, 4, 16, 16), torch.tensor([10, 500]), draw(1, 2, 3, 32))
        kept.append(sum(size for pointer, size in saved.items() if pointer not in parameters))
    assert kept[1] < kept[0] / 4


@pytest.mark.parametrize(("use_checkpoint", "times"), [(False, 1), (True, 2)], ids=["kept", "computed again"])
def test_gradient_checkpointing_computes_the_blocks_again(randomise, use_checkpoint, times):
    """And only where there will be gradients."""
    unet = randomise(UNetModel(COMPVIS))
    unet.use_checkpoint(use_checkpoint)
    calls = {"ResBlock": 0, "transformer": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    unet.middle_block[0].in_layers.register_forward_hook(count("ResBlock"))
    unet.middle_block[1].transformer_blocks[0].attn1.register_forward_hook(count("transformer"))
    inputs = draw(0, 1, 4, 4, 4), torch.tensor([10]), draw(1, 1, 3, 32)
    with torch.no_grad():
        unet(*inputs)
    assert calls == {"ResBlock": 1, "transformer": 1}
    unet(*inputs).sum().backward()
    assert calls == {"ResBlock": 1 + times, "transformer": 1 + times}


# -- its outline ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [UNetConfig(), COMPVIS], ids=["sd-v1", "small"])
def test_the_outline_fits_together(config):
    blocks = outline(config, 32)
    by_name = {block.name: block for block in blocks}
    assert blocks[0].shape_in == (4, 32, 32) and blocks[-1].shape_out == (4, 32, 32)
    used = []
    for before, block in zip(blocks, blocks[1:], strict=False):
        channels, *grid = before.shape_out
        if block.skip:
            used.append(block.skip)
            assert by_name[block.skip].shape_out[1:] == tuple(grid)
            channels += by_name[block.skip].shape_out[0]
        assert block.shape_in == (channels, *grid)
    assert used == [block.name for block in reversed(blocks) if block.name.startswith("input")]
    time_embed = 4 * config.model_channels * (config.model_channels + 1 + 4 * config.model_channels + 1)
    total = sum(block.parameters for block in blocks) + time_embed
    if config == UNetConfig():
        assert total == 859_520_964  # as everybody counts Stable Diffusion v1
    else:
        assert total == sum(p.numel() for p in UNetModel(config).parameters())


# -- errors --------------------------------------------------------------------------------------------------------


def test_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="takes 4 channels, and x has 9"):
        UNetModel(OTHER)(torch.zeros(1, 9, 8, 8), torch.tensor([0]), torch.zeros(1, 2, 24))


def test_a_missing_context_is_refused():
    with pytest.raises(ValueError, match="context of width 24, and none was given"):
        UNetModel(OTHER)(torch.zeros(1, 4, 8, 8), torch.tensor([0]))
    with pytest.raises(ValueError, match="context of width 24, and 32 was given"):
        UNetModel(OTHER)(torch.zeros(1, 4, 8, 8), torch.tensor([0]), torch.zeros(1, 2, 32))
