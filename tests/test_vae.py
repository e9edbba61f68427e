"""The autoencoder: equal to diffusers', whole and in tiles, and its distribution to that of torch.distributions."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from minisd.vae import (
    AttnBlock,
    AutoencoderConfig,
    AutoencoderKL,
    DiagonalGaussianDistribution,
    Downsample,
    Encoder,
    IdentityConfig,
    IdentityFirstStage,
    in_tiles,
)

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
        sample_size=32,  # its tiles have this side
    ).eval()
    state = {f"first_stage_model.{name}": w.clone() for name, w in vae.state_dict().items()}
    model.load_state_dict(diffusers.loaders.single_file_utils.convert_ldm_vae_checkpoint(state, model.config))
    return model


@pytest.fixture
def tiled(vae, theirs):
    """Both, in tiles of 32 pixels."""
    vae.enable_tiling(tile_size=32)
    theirs.enable_tiling()
    yield vae, theirs
    vae.disable_tiling()
    theirs.disable_tiling()


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


@torch.no_grad()
def test_attention_between_the_blocks_equals_diffusers(diffusers, randomise):
    """At the second of three levels, whose map has side 16 in a picture of side 32."""
    ours = randomise(AutoencoderKL(replace(SMALL, num_res_blocks=1, resolution=32, attn_resolutions=(16,))))
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    ).eval()
    reader = diffusers.loaders.single_file_utils
    ldm = {name: w.clone() for name, w in ours.state_dict().items()}
    between = [name for name in ldm if ".attn." in name]  # its reader of whole checkpoints does not know these
    assert {name.split(".attn.")[0] for name in between} == {"encoder.down.1", "decoder.up.1"}
    state = {f"first_stage_model.{name}": w for name, w in ldm.items() if name not in between}
    state = reader.convert_ldm_vae_checkpoint(state, theirs.config)
    for half, step in (("encoder", "down"), ("decoder", "up")):
        names = {"old": f"{half}.{step}.1.attn", "new": f"{half}.{step}_blocks.1.attentions"}
        reader.update_vae_attentions_ldm_to_diffusers([n for n in between if n.startswith(half)], state, ldm, names)
    theirs.load_state_dict(state)

    x, z = draw(1, 1, 3, 16, 24), draw(2, 1, 4, 4, 6)
    torch.testing.assert_close(ours.encode(x).mean, theirs.encode(x).latent_dist.mean, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, atol=2e-5, rtol=0)


# -- in parts --------------------------------------------------------------------------------------------------------


SIZES = pytest.mark.parametrize("h, w", [(16, 16), (8, 20), (13, 9), (8, 5), (14, 12)])  # in pixels of the latent


@SIZES
@torch.no_grad()
def test_tiled_decode_equals_diffusers(tiled, h, w):
    """Tiles of 8 that overlap by 2; the last of a row may be small; the last but one may reach the edge already."""
    ours, theirs = tiled
    z = draw(1, 2, 4, h, w)
    out = ours.decode(z)
    assert out.shape == (2, 3, 4 * h, 4 * w)
    torch.testing.assert_close(out, theirs.decode(z).sample, atol=2e-5, rtol=0)


@SIZES
@torch.no_grad()
def test_tiled_encode_equals_diffusers(tiled, h, w):
    ours, theirs = tiled
    x = draw(1, 2, 3, 4 * h, 4 * w)
    posterior, expected = ours.encode(x), theirs.encode(x).latent_dist
    assert posterior.mean.shape == (2, 4, h, w)
    torch.testing.assert_close(posterior.mean, expected.mean, atol=2e-5, rtol=0)
    torch.testing.assert_close(posterior.logvar, expected.logvar, atol=2e-5, rtol=0)


@torch.no_grad()
def test_what_fits_in_a_tile_is_not_cut(vae):
    x, z = draw(1, 1, 3, 32, 20), draw(2, 1, 4, 5, 8)
    whole = vae.encode(x).mean, vae.decode(z)
    larger = draw(2, 1, 4, 5, 9)
    large = vae.decode(larger)
    vae.enable_tiling(tile_size=32)
    assert torch.equal(vae.encode(x).mean, whole[0]) and torch.equal(vae.decode(z), whole[1])
    assert not torch.allclose(vae.decode(larger), large, atol=1e-2)
    vae.disable_tiling()
    assert torch.equal(vae.decode(larger), large)


@settings(max_examples=50, deadline=None)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    tile=st.integers(1, 8),
    scale=st.integers(1, 3),
    data=st.data(),
)
def test_tiles_of_what_sees_only_its_pixel_make_the_whole(size, tile, scale, data):
    """For all sizes, every pixel is there once, at its place, and the weights of the fading sum to one."""
    overlap = data.draw(st.integers(0, tile - 1))
    x = draw(0, 1, 2, *size).double()

    def repeat(part):
        return part.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)

    out = in_tiles(repeat, x, tile, overlap, tile * scale, overlap * scale)
    torch.testing.assert_close(out, repeat(x), atol=1e-12, rtol=0)


def test_gradients_pass_through_tiles(tiled):
    gradients = []
    for model in tiled:
        z = draw(1, 1, 4, 10, 10).requires_grad_()
        out = model.decode(z)
        loss = (out if model is tiled[0] else out.sample).square().mean()
        gradients.append(torch.autograd.grad(loss, z)[0])
    assert gradients[1].abs().max() > 1e-4
    torch.testing.assert_close(*gradients, atol=2e-6, rtol=2e-5)


@torch.no_grad()
def test_slicing_changes_no_number_and_takes_one_picture_at_a_time(vae):
    x, z = draw(1, 3, 3, 16, 16), draw(2, 3, 4, 4, 4)
    mean, decoded = vae.encode(x).mean, vae.decode(z)
    sizes, halves = [], (vae.encoder, vae.decoder)
    hooks = [half.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]))) for half in halves]
    vae.enable_slicing()
    torch.testing.assert_close(vae.encode(x).mean, mean, atol=2e-5, rtol=0)
    torch.testing.assert_close(vae.decode(z), decoded, atol=2e-5, rtol=0)
    vae.disable_slicing()
    vae.decode(z)
    for hook in hooks:
        hook.remove()
    assert sizes == [1] * 6 + [3]


@pytest.mark.parametrize("wrong, message", [
    ({"tile_size": 30}, "multiple of 4 pixels, not 30"), ({"tile_size": 0}, "multiple of 4 pixels, not 0"),
    ({"overlap": 1}, "less than 1, not 1"), ({"overlap": -0.1}, "not -0.1"),
])  # fmt: skip
def test_a_tile_that_cannot_be_is_refused(vae, wrong, message):
    with pytest.raises(ValueError, match=message):
        vae.enable_tiling(**wrong)
    assert vae.tiling is None


@pytest.fixture(scope="module")
def peak(tmp_path_factory):
    """peak(f) -> bytes that torch held at most while f ran, beyond what it held before."""

    @torch.no_grad()
    def measure(f) -> int:
        f()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            f()
        file = tmp_path_factory.mktemp("profile") / "trace.json"
        profile.export_chrome_trace(str(file))
        events = [event for event in json.loads(file.read_text("utf-8"))["traceEvents"] if event["name"] == "[memory]"]
        events = [event["args"] for event in sorted(events, key=lambda event: event["ts"])]
        return max(e["Total Allocated"] for e in events) - (events[0]["Total Allocated"] - events[0]["Bytes"])

    return measure


def test_decoding_takes_no_more_memory_than_diffusers_and_less_in_tiles(vae, theirs, peak):
    z = draw(1, 1, 4, 32, 32)
    whole, expected = peak(lambda: vae.decode(z)), peak(lambda: theirs.decode(z).sample)
    assert whole <= expected
    vae.enable_tiling(tile_size=64)
    tiled = peak(lambda: vae.decode(z))
    vae.disable_tiling()
    assert tiled <= 0.65 * whole


def test_a_block_takes_no_more_memory_than_diffusers(vae, theirs, peak):
    """The last of the decoder, at full resolution."""
    x = draw(0, 1, 32, 128, 128)
    ours, expected = vae.decoder.up[0].block[2], theirs.decoder.up_blocks[2].resnets[2]
    assert peak(lambda: ours(x)) <= peak(lambda: expected(x, None))


def test_the_attention_holds_no_table_of_all_pairs_of_pixels(randomise, peak):
    layer, x = randomise(AttnBlock(32)), draw(0, 1, 32, 48, 48)
    assert peak(lambda: layer(x)) < 0.5 * (48 * 48) ** 2 * 4


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


def test_attention_is_at_the_sides_that_the_config_names():
    with torch.device("meta"):
        vae = AutoencoderKL(AutoencoderConfig(resolution=256, attn_resolutions=(32, 128)))  # sides 256, 128, 64, 32
    assert [len(level.attn) for level in vae.encoder.down] == [0, 2, 0, 2]
    assert [len(level.attn) for level in vae.decoder.up] == [0, 3, 0, 3]
    with pytest.raises(ValueError, match=r"attn_resolutions has 16, but the maps have the sides \[256, 128, 64, 32\]"):
        AutoencoderConfig(attn_resolutions=(32, 16))


def test_without_double_z_the_encoder_says_one_number_a_channel():
    config = AutoencoderConfig(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=5, double_z=False)
    assert Encoder(config).conv_out.out_channels == 5
    assert Encoder(replace(config, double_z=True)).conv_out.out_channels == 10
    with pytest.raises(ValueError, match="AutoencoderKL needs double_z=True"):
        AutoencoderKL(config)


def test_the_identity_hands_pictures_through_and_has_the_face_of_the_others():
    stage, x = IdentityFirstStage(IdentityConfig(in_channels=4)), draw(0, 2, 4, 6, 7)
    assert (stage.config.downsampling, stage.config.embed_dim, stage.config.in_channels) == (1, 4, 4)
    assert not stage.state_dict() and IdentityConfig().embed_dim == 3
    stage.enable_tiling(tile_size=4)
    stage.enable_slicing()
    assert stage.encode(x) is x and stage.decode(x) is x and stage(x) is x


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


def test_a_list_of_generators_gives_each_picture_its_own_noise():
    posterior = DiagonalGaussianDistribution(draw(0, 2, 8, 3, 3))
    alone = DiagonalGaussianDistribution(draw(0, 2, 8, 3, 3)[1:])
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = alone.sample(torch.Generator().manual_seed(6))
    assert torch.equal(posterior.sample(generators)[1:], expected)
    with pytest.raises(ValueError, match="1 generators cannot draw noise for 2 pictures: pass one"):
        posterior.sample(generators[:1])


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
