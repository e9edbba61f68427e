"""The autoencoder: equal to diffusers', and its distribution to that of torch.distributions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from minisd.vae import AttnBlock, AutoencoderConfig, AutoencoderKL, DiagonalGaussianDistribution, Downsample

SMALL = AutoencoderConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=2, z_channels=4, embed_dim=4)
seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vae(randomise):
    return randomise(AutoencoderKL(SMALL))


@pytest.fixture(scope="module")
def theirs(diffusers, vae):
    """diffusers' AutoencoderKL with our weights, their names translated by its own reader of CompVis checkpoints.

    It also turns the 1x1 convolutions of our AttnBlock into the Linear layers that diffusers has there.
    """
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
    ).eval()
    state = {f"first_stage_model.{name}": w.clone() for name, w in vae.state_dict().items()}
    model.load_state_dict(diffusers.loaders.single_file_utils.convert_ldm_vae_checkpoint(state, model.config))
    return model


# -- against diffusers ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_encode_equals_diffusers(vae, theirs):
    x = draw(1, 2, 3, 16, 24).clamp(-1, 1)
    ours, expected = vae.encode(x), theirs.encode(x).latent_dist
    assert ours.mean.shape == (2, 4, 4, 6) and expected.mean.std() > 0.1 and expected.logvar.std() > 0.1
    torch.testing.assert_close(ours.mean, expected.mean, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.logvar, expected.logvar, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.kl(), expected.kl(), atol=0, rtol=2e-5)
    z = draw(2, 2, 4, 4, 6)
    torch.testing.assert_close(ours.nll(z), expected.nll(z), atol=0, rtol=2e-5)


@torch.no_grad()
def test_decode_equals_diffusers(vae, theirs):
    z = draw(1, 2, 4, 4, 6)
    expected = theirs.decode(z).sample
    assert expected.shape == (2, 3, 16, 24) and expected.std() > 0.1
    torch.testing.assert_close(vae.decode(z), expected, atol=2e-5, rtol=0)


def test_gradients_equal_diffusers(vae, theirs):
    """Through both halves and the sample, back to the picture."""
    gradients = []
    for model in (vae, theirs):
        x = draw(1, 1, 3, 8, 8).requires_grad_()
        posterior = model.encode(x) if model is vae else model.encode(x).latent_dist
        z = posterior.mean + posterior.std * draw(2, 1, 4, 2, 2)
        out = model.decode(z) if model is vae else model.decode(z).sample
        loss = (out - draw(3, 1, 3, 8, 8)).square().mean() + 0.01 * posterior.kl().mean()
        gradients.append(torch.autograd.grad(loss, x)[0])
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, atol=2e-6, rtol=2e-5)


# -- what it is made of --------------------------------------------------------------------------------------------


def test_stable_diffusion_v1_has_84_million_parameters():
    with torch.device("meta"):
        vae = AutoencoderKL()
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863


def test_the_norms_have_the_epsilon_of_the_checkpoint(vae):
    """1e-6 throughout: too little to show in an output of random weights."""
    assert {layer.eps for layer in vae.modules() if isinstance(layer, torch.nn.GroupNorm)} == {1e-6}


@pytest.mark.parametrize("config", [
    AutoencoderConfig(ch=32, ch_mult=(1,), num_res_blocks=1),
    AutoencoderConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1),
    AutoencoderConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=6, embed_dim=3),
], ids=["f1", "f8", "z_channels and embed_dim differ"])  # fmt: skip
@torch.no_grad()
def test_the_latent_is_smaller_by_the_downsampling_factor(randomise, config):
    vae, f = randomise(AutoencoderKL(config)), config.downsampling
    z = vae.encode(draw(0, 1, 3, 2 * f, 3 * f)).mode()
    assert z.shape == (1, config.embed_dim, 2, 3)
    assert vae.decode(z).shape == (1, 3, 2 * f, 3 * f)


def test_down_pads_right_and_below_only(randomise):
    """Pixel (0, 0) of the smaller map is computed from pixels 0-2 of the larger, without any padding."""
    layer, x = randomise(Downsample(8)), draw(0, 1, 8, 6, 6)
    corner = torch.nn.functional.conv2d(x[:, :, :3, :3], layer.conv.weight, layer.conv.bias)
    torch.testing.assert_close(layer(x)[:, :, :1, :1], corner, atol=1e-5, rtol=0)
    assert layer(x).shape == (1, 8, 3, 3)


def test_the_attention_has_one_head_and_sees_the_whole_map(randomise):
    layer = randomise(AttnBlock(32))
    x = draw(0, 1, 32, 3, 4)
    q, k, v = (f(layer.norm(x)).flatten(2).mT for f in (layer.q, layer.k, layer.v))  # [1 12 32]
    weights = (q @ k.mT / 32**0.5).softmax(dim=-1)
    expected = x + layer.proj_out((weights @ v).mT.reshape(1, 32, 3, 4))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_forward_decodes_a_sample_or_the_mode(vae):
    x = draw(1, 1, 3, 8, 8)
    out, posterior = vae(x, sample_posterior=False)
    assert torch.equal(out, vae.decode(posterior.mean))
    out, posterior = vae(x, generator=torch.Generator().manual_seed(3))
    assert torch.equal(out, vae.decode(posterior.mean + posterior.std * draw(3, 1, 4, 2, 2)))


@pytest.mark.parametrize("size", [(18, 16), (16, 18)], ids=["height", "width"])
def test_a_size_that_cannot_be_halved_is_refused(vae, size):
    with pytest.raises(ValueError, match=f"divisible by 4, not {size[0]}x{size[1]}"):
        vae.encode(torch.zeros(1, 3, *size))


# -- the distribution of the latent --------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=seeds, spread=st.floats(0.1, 5))
def test_kl_and_nll_equal_torch_distributions(seed, spread):
    moments = spread * draw(seed, 3, 4, 2, 2)
    posterior, z = DiagonalGaussianDistribution(moments), draw(seed + 1, 3, 2, 2, 2)
    normal = Normal(moments[:, :2].double(), (moments[:, 2:].double() / 2).exp())
    kl = kl_divergence(normal, Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.kl().double(), kl, atol=1e-4, rtol=1e-5)
    nll = -normal.log_prob(z.double()).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.nll(z).double(), nll, atol=1e-4, rtol=1e-5)


def test_kl_is_zero_for_the_standard_normal_alone():
    assert DiagonalGaussianDistribution(torch.zeros(2, 8, 3, 3)).kl().tolist() == [0, 0]
    assert DiagonalGaussianDistribution(torch.full((1, 8, 3, 3), 0.1)).kl() > 0


def test_samples_have_the_mean_and_the_deviation():
    mean, std, n = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0]), 40_000
    moments = torch.cat([mean, 2 * std.log()]).reshape(1, 4, 1, 1).expand(n, 4, 1, 1)
    sample = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(0)).reshape(n, 2)
    assert ((sample.mean(0) - mean).abs() < 5 * std / n**0.5).all()
    assert ((sample.std(0) / std - 1).abs() < 5 / (2 * n) ** 0.5).all()


def test_a_sample_is_mean_plus_std_times_noise_of_the_seed():
    posterior = DiagonalGaussianDistribution(draw(0, 2, 8, 3, 3))
    expected = posterior.mean + posterior.std * draw(5, 2, 4, 3, 3)
    assert torch.equal(posterior.sample(torch.Generator().manual_seed(5)), expected)
    assert torch.equal(posterior.mode(), posterior.mean)
    assert not torch.equal(posterior.sample(), posterior.sample())


def test_a_sample_passes_gradients_to_mean_and_variance():
    moments = draw(0, 1, 4, 2, 2).requires_grad_()
    DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(1)).sum().backward()
    mean, logvar = moments.grad.chunk(2, dim=1)
    assert torch.equal(mean, torch.ones(1, 2, 2, 2))  # dz/dmean = 1, dz/dlogvar = std ε / 2
    expected = (moments[:, 2:] / 2).exp() * draw(1, 1, 2, 2, 2) / 2
    torch.testing.assert_close(logvar, expected.detach(), atol=1e-6, rtol=1e-5)


def test_the_log_variance_is_kept_between_minus_30_and_20():
    logvar = torch.tensor([-1e4, -31.0, -30.0, 0.0, 20.0, 21.0, 1e4])
    moments = torch.stack([torch.zeros(7), logvar]).reshape(1, 2, 7, 1)
    posterior = DiagonalGaussianDistribution(moments)
    assert posterior.logvar.flatten().tolist() == [-30, -30, -30, 0, 20, 20, 20]
    assert posterior.kl().isfinite().all() and posterior.sample().isfinite().all()
    torch.testing.assert_close(posterior.var, posterior.std**2, atol=0, rtol=1e-5)
