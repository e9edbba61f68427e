"""The quantised autoencoder: equal to diffusers' VQModel; and the quantiser, whatever the codebook."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisd.vae import AutoencoderConfig, AutoencoderKL
from minisd.vq import VectorQuantizer, VQConfig, VQModel, VQModelInterface

SMALL = VQConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=2, z_channels=4, embed_dim=3, n_embed=48)
PICTURE = (2, 3, 16, 24)  # 4x6 codes
seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer(seed: int, n_embed: int, embed_dim: int) -> VectorQuantizer:
    layer = VectorQuantizer(n_embed, embed_dim)
    torch.nn.init.normal_(layer.embedding.weight, generator=torch.Generator().manual_seed(seed))
    return layer


@pytest.fixture(scope="module")
def vq(randomise):
    return randomise(VQModel(SMALL))


@pytest.fixture(scope="module")
def interface(vq):
    model = VQModelInterface(SMALL).eval()
    model.load_state_dict(vq.state_dict())
    return model


@pytest.fixture(scope="module")
def theirs(diffusers, vq):
    """diffusers' VQModel with our weights; its reader of CompVis checkpoints knows all names but the codebook's."""
    model = diffusers.VQModel(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=4,
        vq_embed_dim=3,
        num_vq_embeddings=48,
    ).eval()
    state = {f"first_stage_model.{name}": w.clone() for name, w in vq.state_dict().items()}
    state = diffusers.loaders.single_file_utils.convert_ldm_vae_checkpoint(state, model.config)
    model.load_state_dict(state | {"quantize.embedding.weight": vq.quantize.embedding.weight})
    return model


# -- against diffusers ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_encode_equals_diffusers(vq, interface, theirs):
    x = draw(1, *PICTURE).clamp(-1, 1)
    h = theirs.encode(x).latents
    assert h.std() > 0.1
    torch.testing.assert_close(interface.encode(x), h, atol=2e-5, rtol=0)
    z, loss, (_, _, indices) = theirs.quantize(h)
    ours = vq.encode(x)
    assert ours.indices.shape == (2, 4, 6) and ours.indices.unique().numel() > 5
    assert torch.equal(ours.indices.flatten(), indices)
    torch.testing.assert_close(ours.z, z, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.loss, loss, atol=2e-5, rtol=0)


@torch.no_grad()
def test_decode_equals_diffusers(vq, interface, theirs):
    h = draw(1, 2, 3, 4, 6)
    quantised, continuous = theirs.decode(h).sample, theirs.decode(h, force_not_quantize=True).sample
    assert (quantised - continuous).std() > 0.1
    torch.testing.assert_close(interface.decode(h), quantised, atol=2e-5, rtol=0)
    torch.testing.assert_close(interface.decode(h, force_not_quantize=True), continuous, atol=2e-5, rtol=0)
    torch.testing.assert_close(vq.decode(h), continuous, atol=2e-5, rtol=0)
    indices = vq.quantize(h).indices
    torch.testing.assert_close(vq.decode_code(indices), quantised, atol=2e-5, rtol=0)
    torch.testing.assert_close(interface.decode_code(indices), quantised, atol=2e-5, rtol=0)


def test_forward_and_its_gradients_equal_diffusers(vq, interface, theirs):
    """Through the straight-through estimator, back to the picture, and to the codebook."""
    x = draw(1, *PICTURE)
    results = []
    for model in (vq, interface, theirs):
        picture = x.clone().requires_grad_()
        out, loss = model(picture) if model is not theirs else model(picture, return_dict=False)
        total = (out - draw(3, *PICTURE)).square().mean() + loss
        codebook = model.quantize.embedding.weight
        results.append((out.detach(), loss.detach(), *torch.autograd.grad(total, (picture, codebook))))
    assert results[2][2].abs().max() > 1e-4 and results[2][3].abs().max() > 1e-4
    for ours in results[:2]:
        torch.testing.assert_close(ours, results[2], atol=2e-5, rtol=2e-5)


def test_forward_tells_which_codes_were_chosen_if_asked(vq, interface):
    x = draw(1, *PICTURE)
    expected = vq.encode(x)
    for model in (vq, interface):
        out, loss, indices = model(x, return_pred_indices=True)
        assert torch.equal(indices, expected.indices) and torch.equal(loss, expected.loss)
        assert torch.equal(out, model(x)[0]) and torch.equal(out, vq.decode_code(indices))


@pytest.mark.parametrize("legacy", [True, False])
def test_loss_and_gradients_equal_diffusers_whichever_term_beta_weighs(diffusers, legacy):
    from diffusers.models.autoencoders.vae import VectorQuantizer as Theirs

    theirs, ours = Theirs(20, 5, beta=0.3, legacy=legacy), VectorQuantizer(20, 5, beta=0.3, legacy=legacy)
    torch.nn.init.normal_(theirs.embedding.weight, generator=torch.Generator().manual_seed(0))
    ours.load_state_dict(theirs.state_dict())
    results = []
    for layer in (theirs, ours):
        z = draw(1, 2, 5, 3, 4).requires_grad_()
        quantised, loss = layer(z)[:2]
        total = (quantised * draw(2, 2, 5, 3, 4)).sum() + 10 * loss
        results.append((quantised.detach(), loss.detach(), *torch.autograd.grad(total, (z, layer.embedding.weight))))
    torch.testing.assert_close(results[1], results[0], atol=2e-6, rtol=2e-5)


def test_legacy_puts_beta_on_the_codes_and_the_paper_on_the_commitment():
    """d loss / d e and d loss / d z of one vector at distance 2 from the only code; squares of one number, averaged."""
    for legacy, of_code, of_vector in ((True, -4 * 0.25, 4.0), (False, -4.0, 4 * 0.25)):
        layer = VectorQuantizer(1, 1, beta=0.25, legacy=legacy)
        torch.nn.init.ones_(layer.embedding.weight)
        z = torch.full((1, 1, 1, 1), 3.0, requires_grad=True)
        loss = layer(z).loss
        assert loss.item() == 1.25 * 4
        loss.backward()
        assert (layer.embedding.weight.grad.item(), z.grad.item()) == (of_code, of_vector)


# -- the quantiser ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=st.integers(1, 40), d=st.integers(1, 6), scale=st.sampled_from([1e-3, 1.0, 1e3]))
@torch.no_grad()
def test_each_vector_becomes_its_nearest_code(seed, n, d, scale):
    layer, z = quantizer(seed, n, d), scale * draw(seed + 1, 2, d, 3, 4)
    layer.embedding.weight *= scale
    quantised = layer(z)
    codes = layer.embedding.weight.double()
    distances = (z.double().movedim(1, -1)[..., None, :] - codes).square().sum(dim=-1)  # [b h w n]
    chosen = distances.gather(-1, quantised.indices[..., None])[..., 0]
    torch.testing.assert_close(chosen, distances.amin(dim=-1), atol=1e-5 * scale**2, rtol=1e-5)
    assert torch.equal(quantised.z, layer.lookup(quantised.indices))  # exactly the code, not z + (code - z)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, n=st.integers(1, 40), d=st.integers(1, 6))
@torch.no_grad()
def test_codes_are_encoded_as_themselves(seed, n, d):
    layer = quantizer(seed, n, d)
    once = layer(draw(seed + 1, 1, d, 4, 4))
    twice = layer(once.z)
    assert torch.equal(once.z, twice.z) and torch.equal(once.indices, twice.indices) and twice.loss == 0


@settings(max_examples=25, deadline=None)
@given(seed=seeds, n=st.integers(2, 40))
@torch.no_grad()
def test_the_order_of_the_codebook_changes_numbers_and_nothing_else(seed, n):
    layer, shuffled = quantizer(seed, n, 3), VectorQuantizer(n, 3)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shuffled.embedding.weight.copy_(layer.embedding.weight[order])
    z = draw(seed + 1, 2, 3, 4, 4)
    expected, out = layer(z), shuffled(z)
    assert torch.equal(out.z, expected.z) and torch.equal(order[out.indices], expected.indices)
    assert torch.equal(shuffled.usage(out.indices), layer.usage(expected.indices)[order])
    torch.testing.assert_close(shuffled.perplexity(out.indices), layer.perplexity(expected.indices))


@settings(max_examples=25, deadline=None)
@given(seed=seeds, n=st.integers(1, 40), shape=st.tuples(*[st.integers(1, 5)] * 3))
@torch.no_grad()
def test_usage_counts_each_pixel_once(seed, n, shape):
    b, h, w = shape
    layer = quantizer(seed, n, 2)
    indices = layer(draw(seed + 1, b, 2, h, w)).indices
    counts = layer.usage(indices)
    assert counts.shape == (n,) and counts.sum() == b * h * w
    assert all(counts[i] == (indices == i).sum() for i in range(n))
    assert 1 - 1e-5 <= layer.perplexity(indices) <= min(n, b * h * w) + 1e-3


def test_perplexity_is_the_number_of_codes_that_are_used_equally_often():
    layer = VectorQuantizer(16, 2)
    for used in (1, 2, 5, 16):
        assert layer.perplexity(torch.arange(used).repeat(3)).item() == pytest.approx(used, rel=1e-5)
    p = torch.tensor([0.75, 0.25])
    expected = torch.distributions.Categorical(p).entropy().exp().item()
    assert layer.perplexity(torch.tensor([4, 4, 7, 4])).item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_the_code_is_handed_to_the_vector():
    layer, z, gradient = quantizer(0, 8, 3), draw(1, 2, 3, 4, 4).requires_grad_(), draw(2, 2, 3, 4, 4)
    layer(z).z.backward(gradient)
    assert torch.equal(z.grad, gradient) and layer.embedding.weight.grad is None


def test_many_vectors_are_compared_a_part_at_a_time():
    """6,000 of them: every part, the last and smaller one too, comes out at its place."""
    layer, z = quantizer(0, 16, 3), draw(1, 2, 3, 50, 60)
    distances = (z[:, None] - layer.embedding.weight[:, :, None, None]).square().sum(dim=2)  # [b n h w]
    chosen = distances.gather(1, layer(z).indices[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.amin(dim=1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_half_precision_around_it_leaves_the_choice_to_full_precision():
    layer, z = quantizer(0, 512, 3), draw(1, 1, 3, 16, 16)
    expected = layer(z).indices
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(z).indices, expected)


def test_the_codebook_starts_within_one_over_its_size_and_is_all_there_is_to_save():
    layer = VectorQuantizer(500, 4)
    assert list(layer.state_dict()) == ["embedding.weight"]
    assert 0.9 / 500 < layer.embedding.weight.abs().max() <= 1 / 500


@pytest.mark.parametrize("index", [-1, 48])
def test_a_number_that_no_code_has_is_refused(vq, index):
    with pytest.raises(ValueError, match="numbered from 0 to 47, but the indices reach from"):
        vq.decode_code(torch.full((1, 2, 2), index))


# -- the model -------------------------------------------------------------------------------------------------------


def test_the_defaults_are_vq_f4(diffusers):
    with torch.device("meta"):
        ours = VQModel()
        theirs = diffusers.VQModel(
            block_out_channels=(128, 256, 512),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=2,
            num_vq_embeddings=8192,
        )
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) == 55_322_782
    assert ours.config.downsampling == 4 and ours.encoder.conv_out.out_channels == ours.config.z_channels == 3


def test_the_names_are_those_of_compvis():
    """Beside encoder and decoder, whose names are AutoencoderKL's."""
    with torch.device("meta"):
        vq, kl = VQModel(SMALL), AutoencoderKL(replace(SMALL, double_z=True))
    names = {"quantize.embedding.weight"} | {f"{c}quant_conv.{w}" for c in ("", "post_") for w in ("weight", "bias")}
    halves = {name for name in kl.state_dict() if name.startswith(("encoder.", "decoder."))}
    assert set(vq.state_dict()) == names | halves


@torch.no_grad()
def test_tiles_and_slices_are_joined_before_they_are_quantised(diffusers, vq, interface):
    x = draw(1, 2, 3, 32, 40)
    whole = interface.encode(x)
    for model in (vq, interface):
        model.enable_tiling(tile_size=16)
    h = interface.encode(x)
    quantised = vq.quantize(h)
    assert not torch.allclose(h, whole, atol=1e-2)
    assert torch.equal(vq.encode(x).indices, quantised.indices) and torch.equal(vq.encode(x).z, quantised.z)
    torch.testing.assert_close(interface.decode(h), vq.decode(quantised.z), atol=2e-5, rtol=0)
    for model in (vq, interface):
        model.disable_tiling()
        model.enable_slicing()
    torch.testing.assert_close(interface.encode(x), whole, atol=2e-5, rtol=0)
    expected = vq.quantize(whole)
    torch.testing.assert_close(vq.encode(x).loss, expected.loss, atol=2e-5, rtol=0)
    for model in (vq, interface):
        model.disable_slicing()


def test_a_size_that_cannot_be_halved_is_refused(vq):
    with pytest.raises(ValueError, match="divisible by 4, not 16x18"):
        vq.encode(torch.zeros(1, 3, 16, 18))


def test_a_config_with_a_variance_is_refused():
    with pytest.raises(ValueError, match="VQModel needs double_z=False"):
        VQModel(replace(SMALL, double_z=True))
    assert AutoencoderConfig().double_z and not VQConfig().double_z
