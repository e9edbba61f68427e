"""How the autoencoder is trained: each loss against its source, the discriminator, the codebook, and whole runs."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from minisd import PRESETS, cli, load
from minisd.checkpoint import CheckpointError, read_json, save_clip, write_json
from minisd.clip import BPETokenizer, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from minisd.data import CaptionedPictures, draw_shapes
from minisd.training import SingleDevice, Trainer, UNetRecipe, VAERecipe, finished_vae, train_unet, train_vae
from minisd.training.codebook import measure_codebook, revive_dead_codes
from minisd.training.discriminator import (
    NLayerDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    hinge_d_loss,
)
from minisd.training.perceptual import LPIPS, CLIPPerceptual
from minisd.training.run_folder import RunFolder
from minisd.training.unet import assemble
from minisd.training.vae import AutoencoderLoss, encode_all
from minisd.vae import AutoencoderKL
from minisd.vq import VQConfig, VQModelInterface

SMALL = replace(PRESETS["tiny"].first_stage, ch_mult=(1, 1))
SMALL_VQ = VQConfig(**asdict(SMALL) | {"double_z": False}, n_embed=32)


@pytest.fixture(scope="module")
def engine():
    return SingleDevice("cpu")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    draw_shapes(folder, count=40, size=32)
    return CaptionedPictures(folder, size=32)


def pictures(n=3, size=32, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- the discriminator ----------------------------------------------------------------------------------------------


def published_discriminator(input_nc=3, ndf=64, n_layers=3):
    """taming-transformers, discriminator/model.py: NLayerDiscriminator without ActNorm, as its loop lays it out."""
    layers = [nn.Conv2d(input_nc, ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
    mult = 1
    for n in range(1, n_layers):
        before, mult = mult, min(2**n, 8)
        layers += [nn.Conv2d(ndf * before, ndf * mult, 4, 2, 1, bias=False), nn.BatchNorm2d(ndf * mult)]
        layers += [nn.LeakyReLU(0.2)]
    before, mult = mult, min(2**n_layers, 8)
    layers += [nn.Conv2d(ndf * before, ndf * mult, 4, 1, 1, bias=False), nn.BatchNorm2d(ndf * mult), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(ndf * mult, 1, 4, 1, 1))


@pytest.mark.parametrize(("n_layers", "size"), [(1, 8), (2, 32), (3, 64), (5, 128)])
def test_the_discriminator_is_compvis_s_and_takes_its_weights(n_layers, size):
    torch.manual_seed(0)
    theirs, ours = published_discriminator(3, 8, n_layers), NLayerDiscriminator(3, 8, n_layers)
    ours.load_state_dict({f"main.{name}": tensor for name, tensor in theirs.named_parameters()})
    x = pictures(2, size)
    assert torch.equal(ours(x), theirs(x))


def test_a_logit_of_the_discriminator_sees_a_patch_of_70_pixels():
    """Isola et al.'s PatchGAN: measured by what of the picture has a gradient."""
    for n_layers, patch in [(3, 70), (2, 34)]:
        network, x = NLayerDiscriminator(3, 4, n_layers), pictures(1, 128).requires_grad_()
        for module in network.modules():  # whose statistics would see the whole picture
            if isinstance(module, nn.BatchNorm2d):
                module.forward = lambda h: h
        logits = network(x)
        middle = logits.shape[-1] // 2
        (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], x)
        rows = gradient.abs().sum(dim=(0, 1, 3)).nonzero()
        assert rows.max() - rows.min() + 1 == patch


def test_the_discriminator_starts_as_dcgan():
    torch.manual_seed(0)
    assert sum(p.numel() for p in NLayerDiscriminator(6).parameters()) == 2_768_705  # pix2pix: "2.769 M"
    state = NLayerDiscriminator().state_dict()
    assert state["main.8.weight"].std() == pytest.approx(0.02, rel=0.01)  # 256 to 512 channels
    assert state["main.9.weight"].mean() == pytest.approx(1, abs=0.005) and not state["main.9.bias"].any()


def test_a_picture_too_small_for_the_discriminator_is_refused():
    NLayerDiscriminator(3, 8, 3)(pictures(1, 24))
    with pytest.raises(ValueError, match="24 pixels at least, not 16x16: give it fewer layers"):
        NLayerDiscriminator(3, 8, 3)(pictures(1, 16))


def test_the_hinge_loss_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.5, -0.5])
    # 0, 0.5, 2 of the real; 0, 1.5, 0.5 of the fake
    assert hinge_d_loss(real, fake).item() == pytest.approx(0.5 * (2.5 / 3 + 2.0 / 3))
    assert hinge_d_loss(torch.tensor([1.5]), torch.tensor([-1.5])) == 0


def test_with_the_adaptive_weight_both_losses_pull_equally_at_the_last_layer(engine):
    torch.manual_seed(0)
    last, judge = nn.Conv2d(4, 3, 3, padding=1), NLayerDiscriminator(3, 8, 2)
    h, x = torch.randn(2, 4, 32, 32), pictures(2)
    x_hat = last(h)
    nll, g = (x - x_hat).abs().mean(), -judge(x_hat).mean()
    weight = adaptive_weight(nll, g, last.weight, engine)
    g_grads = torch.autograd.grad(g, last.weight, retain_graph=True)[0]
    nll_grads = torch.autograd.grad(nll, last.weight, retain_graph=True)[0]
    assert weight.item() == pytest.approx((nll_grads.norm() / (g_grads.norm() + 1e-4)).item())
    assert (weight * g_grads).norm().item() == pytest.approx(nll_grads.norm().item(), rel=0.02)
    assert not weight.requires_grad
    assert adaptive_weight(nll, g, last.weight, engine, limit=0.25 * weight.item()) == 0.25 * weight
    assert adaptive_weight(nll, 0 * g, last.weight, engine).item() == pytest.approx(nll_grads.norm().item() / 1e-4)


def test_the_decoder_s_loss_leaves_the_discriminator_alone_and_the_other_way_round():
    torch.manual_seed(0)
    judge = NLayerDiscriminator(3, 8, 2)
    real, fake = pictures(4), pictures(4, seed=1).requires_grad_()
    loss = generator_loss(judge, fake)
    assert loss == -judge(fake).mean() and all(p.requires_grad for p in judge.parameters())
    loss.backward()
    assert fake.grad.abs().max() > 0 and all(p.grad is None for p in judge.parameters())

    fake.grad = None
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-3)
    for _ in range(20):
        loss, figures = discriminator_loss(judge, real, fake)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert fake.grad is None
    assert figures["logits_real"] > 0.5 > -0.5 > figures["logits_fake"] and loss < 0.5  # it has learned


# --- do two pictures look alike? ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(randomise):
    text = CLIPTextConfig(vocab_size=10, max_length=4, width=32, layers=1, heads=2, projection_dim=16)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, width=32, layers=3, heads=2, projection_dim=16)
    return randomise(CLIPModel(text, vision, end_token=9))


def test_the_distance_in_clip_is_that_of_the_tokens_that_transformers_sees(clip, transformers):
    theirs = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            image_size=32, patch_size=8, hidden_size=32, intermediate_size=128, num_hidden_layers=3,
            num_attention_heads=2, layer_norm_eps=1e-5,
        )  # fmt: skip
    ).eval()
    theirs.load_state_dict(
        {re.sub("^", prefix_of(theirs), name): tensor for name, tensor in clip.vision_model.state_dict().items()},
        strict=True,
    )
    x, x_hat = pictures(3), pictures(3, seed=1)
    with torch.no_grad():
        ours = CLIPPerceptual(clip)(x, x_hat)
        states = [theirs(pixel_values=p, output_hidden_states=True).hidden_states for p in (x, x_hat)]
    expected = torch.zeros(3)
    for a, b in list(zip(*states, strict=True))[:-1]:  # the input and all layers but the last
        cosine = F.cosine_similarity(a[:, 1:], b[:, 1:], dim=-1)  # without the class token
        expected += (2 - 2 * cosine).mean(dim=1) / 3  # ‖a - b‖² of unit vectors
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def prefix_of(model):
    return "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""


def test_the_distance_in_clip_teaches_the_reconstruction_alone(clip):
    perceptual = CLIPPerceptual(clip)
    x, x_hat = pictures(2).requires_grad_(), pictures(2, seed=1).requires_grad_()
    distance = perceptual(x, x_hat)
    distance.sum().backward()
    assert x.grad is None and x_hat.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in perceptual.parameters())
    assert (distance > 0).all() and (distance < 4).all()
    torch.testing.assert_close(perceptual(x, x.detach()), torch.zeros(2))


def test_pictures_of_another_size_are_brought_to_that_of_the_tower(clip):
    perceptual, pair = CLIPPerceptual(clip), (pictures(2, 80), pictures(2, 80, seed=1))
    resized = [torch.stack([pil_resize(p, 32) for p in picture]) for picture in pair]
    torch.testing.assert_close(perceptual(*pair), perceptual(*resized), atol=1e-4, rtol=0)


def pil_resize(picture, side):
    """PIL's bilinear filter, which takes the mean of all pixels that become one; channel by channel in float."""
    channels = [Image.fromarray(c.numpy()).resize((side, side), Image.Resampling.BILINEAR) for c in picture]
    return torch.stack([torch.from_numpy(np.array(c)) for c in channels])


def vgg16():
    """torchvision's `vgg16().features`, with random weights."""
    torch.manual_seed(0)
    layers, before = [], 3
    for width in (64, 64, None, 128, 128, None, *[256] * 3, None, *[512] * 3, None, *[512] * 3, None):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2, 2)]
        before = width or before
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """Such a VGG16 in a file as torchvision's; and LPIPS' own weights as published, which torchmetrics has."""
    import torchmetrics.functional.image.lpips as oracle

    path = tmp_path_factory.mktemp("lpips") / "vgg16.pth"
    state = {f"features.{name}": tensor for name, tensor in vgg16().state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, path)
    return path, Path(oracle.__file__).parent / "lpips_models" / "vgg.pth"


def test_lpips_equals_torchmetrics(lpips_files, monkeypatch):
    """Its network comes from torchvision, which is not there: it is handed the same layers."""
    import torchmetrics.functional.image.lpips as oracle

    ours = LPIPS.from_files(*lpips_files)
    monkeypatch.setattr(oracle, "_get_tv_model_features", lambda net, pretrained: vgg16())
    theirs = oracle._LPIPS(net="vgg")

    x, x_hat = pictures(2, 48), pictures(2, 48, seed=1).requires_grad_()
    expected = theirs(x, x_hat).flatten()
    torch.testing.assert_close(ours(x, x_hat), expected, atol=1e-6, rtol=1e-4)
    gradients = [torch.autograd.grad(f(x, x_hat).sum(), x_hat)[0] for f in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-3)
    assert expected.min() > 0.01 and not any(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("which", ["clip", "lpips"])
def test_small_distances_survive_half_precision(which, clip, lpips_files):
    """The networks may compute in bfloat16; what is left of nearly equal pictures may not."""
    perceptual = CLIPPerceptual(clip) if which == "clip" else LPIPS.from_files(*lpips_files)
    x = pictures(2)
    x_hat = x + 0.1 * pictures(2, seed=1)
    exact = perceptual(x, x_hat)
    with SingleDevice("cpu", "bf16").autocast():
        rounded = perceptual(x, x_hat)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0)


def test_lpips_from_the_wrong_files_is_refused(lpips_files):
    vgg, lin = lpips_files
    with pytest.raises(ValueError, match="do not fit the model"):
        LPIPS.from_files(lin, vgg)
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        LPIPS.from_files(vgg, Path("nowhere.pth"))


# --- the codebook -----------------------------------------------------------------------------------------------------


def collapsed(shapes):
    """A VQModel with 32 codes, of which one lies among the vectors of the pictures; and these vectors."""
    torch.manual_seed(0)
    vae = VQModelInterface(SMALL_VQ)
    with torch.no_grad():
        vae.quantize.embedding.weight.copy_(100 + torch.arange(32.0)[:, None])
        vae.quantize.embedding.weight[5] = 0
        h = vae.encode(shapes.batch(range(len(shapes))))
    return vae, h.movedim(1, -1).flatten(0, -2)


def test_unused_codes_are_moved_to_vectors_of_pictures_and_are_then_used(shapes, engine):
    vae, vectors = collapsed(shapes)
    codes = vae.quantize.embedding.weight.detach()
    mean, before = codes.clone(), codes.clone()
    assert measure_codebook(vae, shapes, engine) == {"codes": 1, "perplexity": pytest.approx(1)}
    assert revive_dead_codes(vae, shapes, mean, [0, 0], engine) == 31

    revived = [i for i in range(32) if i != 5]
    assert torch.equal(codes[5], before[5])
    distances = (codes[revived, None] - vectors).norm(dim=2).min(dim=1).values  # up to the rounding of a batch
    assert distances.max() < 1e-5 < torch.pdist(vectors[:500]).median()
    assert torch.equal(mean, codes)  # else the mean of the weights would drag behind for a thousand steps
    usage = measure_codebook(vae, shapes, engine)
    assert usage["codes"] > 25 and usage["perplexity"] > 15

    counts = vae.quantize.usage(vae.quantize.nearest(vae.encode(shapes.batch(range(len(shapes))))))
    common, before = counts > 4 * counts.sum() / 32 / 16, codes.clone()  # a few might be missed in what is looked at
    revive_dead_codes(vae, shapes, mean, [0, 1], engine)
    assert torch.equal(codes[common], before[common])  # codes that are in use stay where they are


def test_which_codes_are_moved_where_depends_on_the_seed_alone(shapes, engine):
    results = []
    for seed in ([3, 100], [3, 100], [3, 200]):
        vae, _ = collapsed(shapes)
        torch.manual_seed(len(results))  # the global one has no say
        revive_dead_codes(vae, shapes, torch.zeros(32, 4), seed, engine)
        results.append(vae.quantize.embedding.weight.detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


class Follower(SingleDevice):
    """The second of two processes."""

    def __init__(self, first):
        super().__init__("cpu")
        self.first = first

    def gather(self, tensor):
        return torch.cat([self.first, tensor])


def test_all_processes_have_the_codes_of_the_first(shapes):
    vae, _ = collapsed(shapes)
    first, mean = torch.randn(1, 2, 32, 4), torch.zeros(32, 4)
    revive_dead_codes(vae, shapes, mean, [0, 0], Follower(first))
    assert torch.equal(vae.quantize.embedding.weight, first[0, 0]) and torch.equal(mean, first[0, 1])


# --- the whole loss ---------------------------------------------------------------------------------------------------


def published_loss(x, x_hat, p_loss, kl, codebook_loss, judge, last_layer, weights):
    """CompVis `contperceptual.py: LPIPSWithDiscriminator.forward` with its logvar of 0, both of its calls; or, with a
    codebook_loss, taming-transformers `vqperceptual.py: VQLPIPSWithDiscriminator.forward`."""
    rec_loss = torch.abs(x - x_hat) + weights["perceptual"] * p_loss[:, None, None, None]
    if codebook_loss is None:
        logvar = torch.zeros(())
        nll_loss = rec_loss / torch.exp(logvar) + logvar
        nll_loss = torch.sum(nll_loss) / nll_loss.shape[0]
        kl_loss = torch.sum(kl) / kl.shape[0]
    else:
        nll_loss = torch.mean(rec_loss)
    g_loss = -torch.mean(judge(x_hat))
    nll_grads = torch.autograd.grad(nll_loss, last_layer, retain_graph=True)[0]
    g_grads = torch.autograd.grad(g_loss, last_layer, retain_graph=True)[0]
    d_weight = torch.norm(nll_grads) / (torch.norm(g_grads) + 1e-4)
    d_weight = torch.clamp(d_weight, 0.0, 1e4).detach() * weights["disc"]
    loss = nll_loss + d_weight * g_loss
    loss = loss + (weights["kl"] * kl_loss if codebook_loss is None else 1.0 * codebook_loss.mean())
    logits_real, logits_fake = judge(x.detach()), judge(x_hat.detach())
    d_loss = 0.5 * (torch.mean(F.relu(1.0 - logits_real)) + torch.mean(F.relu(1.0 + logits_fake)))
    return loss, d_loss, d_weight


@pytest.mark.parametrize("config", [SMALL, SMALL_VQ], ids=["kl", "vq"])
@pytest.mark.parametrize("strength", [100.0, 1.0], ids=["", "at its limit"])
def test_the_loss_and_its_gradients_are_compvis_s(config, strength, clip, engine, randomise):
    """Where they add up over the numbers of a picture and we take the mean, all is theirs divided by that many."""
    quantised = isinstance(config, VQConfig)
    vae = randomise(VQModelInterface(config) if quantised else AutoencoderKL(config))
    recipe = VAERecipe(kl_weight=0.3, perceptual_weight=0.7, disc_weight=0.6)
    torch.manual_seed(0)
    judge, x = NLayerDiscriminator(3, 8, 2), pictures(3)
    limit = 1e4 if quantised else 1e4 / x[0].numel()
    loss_of = AutoencoderLoss(recipe, engine, CLIPPerceptual(clip), judge, vae.decoder.conv_out.weight, limit)
    with torch.no_grad():
        judge.main[-1].weight.mul_(strength)  # the weaker its gradient, the larger λ
    if quantised:
        x_hat, codebook_loss = vae(x)
        posterior, latent_loss = None, codebook_loss
    else:
        x_hat, posterior = vae(x, generator=torch.Generator().manual_seed(0))
        codebook_loss, latent_loss = None, recipe.kl_weight * posterior.kl().mean() / x[0].numel()
    ours, figures = loss_of(x, x_hat, latent_loss, step=0)
    d_ours, _ = discriminator_loss(judge, x, x_hat)
    theirs, d_theirs, d_weight = published_loss(
        x, x_hat, CLIPPerceptual(clip)(x, x_hat), None if quantised else posterior.kl(), codebook_loss, judge,
        vae.decoder.conv_out.weight, {"perceptual": 0.7, "disc": 0.6, "kl": 0.3},
    )  # fmt: skip
    numbers = 1 if quantised else x[0].numel()
    assert (d_weight.item() == pytest.approx(0.6e4)) == (strength == 1 and not quantised)
    torch.testing.assert_close(numbers * figures["d_weight"], d_weight, rtol=1e-4, atol=0)
    torch.testing.assert_close(numbers * ours, theirs, rtol=1e-4, atol=0)
    torch.testing.assert_close(d_ours, d_theirs)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (ours, theirs)]
    largest = max(wanted.abs().max().item() for wanted in gradients[1])
    for mine, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(numbers * mine, wanted, rtol=1e-3, atol=1e-6 * largest)


def test_without_weights_the_loss_is_that_of_the_pixels_alone(engine):
    vae = AutoencoderKL(SMALL)
    loss_of = AutoencoderLoss(VAERecipe(), engine, None, None, vae.decoder.conv_out.weight)
    x, x_hat = pictures(2), pictures(2, seed=1)
    loss, figures = loss_of(x, x_hat, torch.tensor(0.25), step=10**6)
    assert loss == (x - x_hat).abs().mean() + 0.25 and set(figures) == {"rec"}


# --- runs -------------------------------------------------------------------------------------------------------------

SHORT = {"batch_size": 4, "log_every": 1, "sample_every": 100, "save_every": 2, "warmup": 2}
JUDGED = {"disc_weight": 0.5, "disc_num_layers": 2, "disc_ndf": 8}


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["loss"] for line in log(folder)]


def networks(folder):
    """All that the newest checkpoint holds of the networks and their optimisers."""
    return RunFolder(folder).load()["networks"]


def test_the_discriminator_starts_at_its_step(shapes, engine, tmp_path):
    recipe = VAERecipe(steps=4, disc_start=2, **JUDGED, **SHORT)
    train_vae(SMALL, replace(recipe, steps=2, decay=False), shapes, tmp_path / "before", engine)
    train_vae(SMALL, replace(recipe, decay=False), shapes, tmp_path / "judged", engine)
    train_vae(SMALL, VAERecipe(steps=4, decay=False, **SHORT), shapes, tmp_path / "alone", engine)
    assert losses(tmp_path / "judged")[:2] == losses(tmp_path / "alone")[:2]
    assert losses(tmp_path / "judged")[2] != losses(tmp_path / "alone")[2]
    of_disc = {"gen", "d_weight", "disc", "logits_real", "logits_fake"}
    assert [of_disc <= set(line) for line in log(tmp_path / "judged")] == [False, False, True, True]
    assert all(of_disc.isdisjoint(line) for line in log(tmp_path / "alone"))
    for name, steps in {"before": 0, "judged": 2}.items():
        _, optimizer = networks(tmp_path / name)["discriminator"]
        # 0 is main.0.weight; before its first step, the optimiser has nothing to remember
        assert (optimizer["state"][0]["step"] if steps else len(optimizer["state"])) == steps
        assert optimizer["param_groups"][0]["betas"] == (0.5, 0.9)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("config", [SMALL, SMALL_VQ], ids=["kl", "vq"])
def test_a_run_with_all_its_parts_continues_as_if_it_had_not_been_stopped(
    config, shapes, engine, clip, tmp_path, monkeypatch
):
    recipe = VAERecipe(steps=7, perceptual_weight=0.5, disc_start=3, revive_every=3, **JUDGED, **SHORT)
    run = (config, recipe, shapes)
    whole = train_vae(*run, tmp_path / "whole", engine, CLIPPerceptual(clip))
    update, broken_in = Trainer.update, []

    def break_in_steps_2_and_5(trainer):  # before the discriminator begins, and after; both after a checkpoint
        if trainer.step in {2, 5} - set(broken_in):
            broken_in.append(trainer.step)
            raise Interrupted
        update(trainer)

    monkeypatch.setattr(Trainer, "update", break_in_steps_2_and_5)
    for _ in range(2):
        with pytest.raises(Interrupted):
            train_vae(*run, tmp_path / "broken", engine, CLIPPerceptual(clip))
    broken = train_vae(*run, tmp_path / "broken", engine, CLIPPerceptual(clip))

    timed = {"samples_per_s": 0, "seconds": 0}
    for ours, theirs in zip(log(tmp_path / "whole"), log(tmp_path / "broken"), strict=True):
        assert ours | timed == theirs | timed
    ours, theirs = whole.state_dict(), broken.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (flat(networks(tmp_path / name)) for name in ("whole", "broken"))
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(name.startswith("/discriminator") and name.endswith("exp_avg") for name in ours)


def test_a_discriminator_that_starts_later_does_not_depend_on_when_the_run_was_saved(shapes, engine, tmp_path):
    recipe = VAERecipe(steps=4, disc_start=2, **JUDGED, **SHORT)
    train_vae(SMALL, recipe, shapes, tmp_path / "often", engine)
    train_vae(SMALL, replace(recipe, save_every=100), shapes, tmp_path / "once", engine)
    assert losses(tmp_path / "often") == losses(tmp_path / "once")


def flat(state, name=""):
    """All tensors of a nested state, by their paths."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {path: tensor for key, value in items for path, tensor in flat(value, f"{name}/{key}").items()}


def test_a_codebook_is_used_and_learns(shapes, engine, tmp_path):
    recipe = VAERecipe(steps=40, lr=3e-3, revive_every=10, **SHORT)
    vae = train_vae(SMALL_VQ, recipe, shapes, tmp_path, engine)
    lines = log(tmp_path)
    assert lines[-1]["rec"] < 0.7 * lines[0]["rec"]
    assert lines[-1]["codes"] > 8 and 1 < lines[-1]["perplexity"] <= lines[-1]["codes"]
    record = read_json(tmp_path / "vae.json")
    assert record["first_stage"]["kind"] == "VQConfig" and record["psnr"] > 5
    indices = vae.quantize.nearest(vae.encode(shapes.batch(range(len(shapes)))))
    assert record["codes"] == len(indices.unique()) == measure_codebook(vae, shapes, engine)["codes"]
    assert list((tmp_path / "samples").iterdir())


def save_some_clip(shapes, randomise, folder):
    """A CLIP with random weights that knows the words of the shapes."""
    tokenizer = BPETokenizer.train(shapes.captions, 640)
    text = replace(PRESETS["tiny"].cond_stage, vocab_size=len(tokenizer.vocab))
    vision = CLIPVisionConfig(image_size=32, patch_size=8, width=32, layers=1, heads=2, projection_dim=32)
    save_clip(randomise(CLIPModel(text, vision, tokenizer.end_token)), tokenizer, folder)


def test_a_model_with_a_codebook_is_trained_from_pictures_to_a_drawing(shapes, engine, randomise, tmp_path):
    """KL and VQ feed the same UNet: it sees the latents from before they are quantised."""
    vq = VQConfig(**asdict(PRESETS["tiny"].first_stage) | {"double_z": False}, n_embed=64)
    trained = train_vae(vq, VAERecipe(steps=8, **SHORT), shapes, tmp_path / "vae", engine)
    save_some_clip(shapes, randomise, tmp_path / "clip")

    sd = assemble(PRESETS["tiny"], tmp_path / "clip", tmp_path / "vae")
    assert isinstance(sd.first_stage_model, VQModelInterface) and sd.config.first_stage == vq
    x = shapes.batch(range(len(shapes)))
    z = sd.get_first_stage_encoding(sd.encode_first_stage(x))
    assert z.std().item() == pytest.approx(1, abs=0.05)
    mean, logvar = encode_all(trained, shapes, engine).chunk(2, dim=1)
    torch.testing.assert_close(sd.scale_factor * mean, z)
    assert (logvar == -torch.inf).all()
    quantised = trained.decode(trained.quantize(mean[:4]).z, force_not_quantize=True)
    torch.testing.assert_close(sd.decode_first_stage(z[:4]), quantised, atol=1e-5, rtol=1e-5)

    recipe = UNetRecipe(steps=3, **SHORT)
    train_unet(PRESETS["tiny"], recipe, shapes, tmp_path / "unet", engine, tmp_path / "clip", tmp_path / "vae")
    assert all(np.isfinite(loss) for loss in losses(tmp_path / "unet"))
    loaded = load(tmp_path / "unet" / "model", "cpu")
    assert loaded.config.first_stage == vq
    images = loaded.txt2img("a red circle", steps=2, num_images=2).images
    assert [image.size for image in images] == [(32, 32)] * 2 and images[0].tobytes() != images[1].tobytes()


class Killed(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


def test_an_autoencoder_and_its_scale_factor_are_replaced_together(engine, tmp_path, monkeypatch):
    """A run is killed whenever it gives a file its name, in a folder where the files of another run lie."""
    found, rename = {}, os.replace
    draw_shapes(tmp_path / "shapes", count=4, size=16)
    four = CaptionedPictures(tmp_path / "shapes", size=16)
    for seed in (0, 1):
        train_vae(SMALL, VAERecipe(steps=1, seed=seed, **SHORT), four, tmp_path / str(seed), engine)
        found[seed] = read_vae(tmp_path / str(seed))
    for moment in range(100):
        run, left = tmp_path / f"killed {moment}", [moment]
        shutil.copytree(tmp_path / "1", run)  # it has nothing more to do than to write what it has learned
        for name in ("vae.json", "vae.safetensors"):
            shutil.copy(tmp_path / "0" / name, run)

        def rename_or_die(source, target, left=left):
            left[0] -= 1
            if left[0] == -1:
                raise Killed
            rename(source, target)

        with monkeypatch.context() as patched, contextlib.suppress(Killed), warnings.catch_warnings():
            patched.setattr(os, "replace", rename_or_die)
            train_vae(SMALL, VAERecipe(steps=1, seed=1, **SHORT), four, run, engine)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it reads what an interrupted save has left
            seen = read_vae(run)
        if left[0] >= 0:  # it was not killed
            break
        assert seen in found.values()
    assert moment > 5 and seen == found[1]
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in (tmp_path / "1").iterdir())


def read_vae(folder):
    vae, scale_factor = finished_vae(folder)
    return scale_factor, vae.decoder.conv_in.weight.flatten().tolist()


@pytest.mark.parametrize(
    "change", [{"first_stage": None}, {"first_stage": {"num_res_blocks": 10**9}}, {"scale_factor": []}]
)
def test_a_damaged_description_of_an_autoencoder_is_refused_in_a_sentence(shapes, engine, tmp_path, change):
    train_vae(SMALL, VAERecipe(steps=1, **SHORT), shapes, tmp_path, engine)
    write_json(read_json(tmp_path / "vae.json") | change, tmp_path / "vae.json")
    with pytest.raises(CheckpointError, match="does not describe an autoencoder of minisd"):
        finished_vae(tmp_path)


def test_a_unet_for_other_latents_is_refused(shapes, engine, randomise, tmp_path):
    train_vae(replace(SMALL, embed_dim=3), VAERecipe(steps=1, **SHORT), shapes, tmp_path / "vae", engine)
    save_some_clip(shapes, randomise, tmp_path / "clip")
    with pytest.raises(ValueError, match="have 3 channels, and the UNet takes 4"):
        assemble(PRESETS["tiny"], tmp_path / "clip", tmp_path / "vae")
    (tmp_path / "vae" / "vae.json").write_text('{"first_stage": {"kind": "Words"}}')
    with pytest.raises(ValueError, match="does not describe an autoencoder of minisd"):
        assemble(PRESETS["tiny"], tmp_path / "clip", tmp_path / "vae")


def test_what_cannot_be_trained_is_refused(shapes, engine, tmp_path):
    recipe = VAERecipe(steps=1, **SHORT)
    with pytest.raises(ValueError, match="perceptual_weight is 0.5, but train_vae was given no perceptual distance"):
        train_vae(SMALL, replace(recipe, perceptual_weight=0.5), shapes, tmp_path, engine)
    with pytest.raises(ValueError, match="revive_every must be at least 1"):
        VAERecipe(revive_every=0)
    train_vae(SMALL, recipe, shapes, tmp_path, engine)
    with pytest.raises(ValueError, match="holds a run of other networks"):
        train_vae(SMALL_VQ, recipe, shapes, tmp_path, engine)


def test_a_run_continues_only_with_the_same_perceptual_network(shapes, engine, clip, lpips_files, tmp_path):
    recipe = VAERecipe(steps=1, perceptual_weight=0.5, **SHORT)
    run = (SMALL, recipe, shapes, tmp_path, engine)
    train_vae(*run, CLIPPerceptual(clip))
    train_vae(*run, CLIPPerceptual(clip))
    another = deepcopy(clip)
    with torch.no_grad():
        another.vision_model.encoder.layers[0].mlp.fc1.bias[0] += 1
    for other in (CLIPPerceptual(another), LPIPS.from_files(*lpips_files), F.mse_loss):
        with pytest.raises(ValueError, match=r"perceptual network was CLIPPerceptual \(\w+\), now "):
            train_vae(*run, other)


def test_a_run_from_before_a_field_of_the_recipe_was_added_continues(shapes, engine, tmp_path):
    recipe = VAERecipe(steps=2, **SHORT)
    train_vae(SMALL, recipe, shapes, tmp_path, engine)
    folder = RunFolder(tmp_path)
    state = folder.load()
    del state["recipe"]["disc_weight"], state["given"]["data"]
    folder.save(2, state)
    train_vae(SMALL, recipe, shapes, tmp_path, engine)
    with pytest.raises(ValueError, match="disc_weight was 0.0, now 0.5"):
        train_vae(SMALL, replace(recipe, **JUDGED), shapes, tmp_path, engine)


def test_two_processes_train_one_autoencoder_and_one_discriminator(shapes, tmp_path):
    """Each normalises by its own part of the batch, so it is not the run of one process; but there is one of each."""
    program = tmp_path / "train.py"
    program.write_text(
        textwrap.dedent(
            """
            import sys, torch
            from dataclasses import asdict, replace
            from pathlib import Path
            from minisd import PRESETS
            from minisd.data import CaptionedPictures
            from minisd.training import Trainer, VAERecipe, make_engine, train_vae
            from minisd.vq import VQConfig

            engine, shapes, out = make_engine("cpu"), CaptionedPictures(sys.argv[1], size=32), Path(sys.argv[2])
            trainers, steps = [], Trainer.steps
            Trainer.steps = lambda trainer: trainers.append(trainer) or steps(trainer)
            small = replace(PRESETS["tiny"].first_stage, ch_mult=(1, 1))
            small = VQConfig(**asdict(small) | {"double_z": False}, n_embed=32)
            recipe = VAERecipe(steps=3, batch_size=8, accumulate=2, log_every=1, warmup=1, revive_every=2,
                               disc_start=1, disc_weight=0.5, disc_num_layers=2, disc_ndf=8)
            train_vae(small, recipe, shapes, out / "run", engine)
            networks = {name: engine.unwrap_model(model).state_dict() for name, model in trainers[0].models.items()}
            torch.save(networks, out / f"{engine.process_index}.pt")
            """
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program]
    done = subprocess.run([*command, shapes.folder, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (flat(torch.load(tmp_path / f"{rank}.pt")) for rank in range(2))
    assert len(first) > 50 and all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(0)
    vae = VQModelInterface(SMALL_VQ)
    untrained = flat({"model": vae.state_dict(), "discriminator": NLayerDiscriminator(3, 8, 2).state_dict()})
    moved = {name for name, tensor in first.items() if not torch.equal(tensor, untrained[name])}
    assert {"/discriminator/main.0.weight", "/model/encoder.conv_in.weight"} < moved
    assert [set(line) >= {"disc", "d_weight"} for line in log(tmp_path / "run")] == [False, True, True]


# --- the decoder alone ----------------------------------------------------------------------------------------------

DECODER = VAERecipe(steps=8, lr=2e-3, rec_power=2, decoder_only=True, **SHORT)


def test_a_decoder_that_is_trained_further_draws_the_same_latents_better(shapes, engine, tmp_path):
    sd, x = load("tiny", "cpu"), shapes.batch(torch.arange(8))
    sd.first_stage_model.decoder = AutoencoderKL(sd.config.first_stage).decoder  # one that draws nothing yet
    before = {name: weight.clone() for name, weight in sd.state_dict().items()}
    latents = sd.first_stage_model.encode(x).mean
    error = (sd.first_stage_model.decode(latents) - x).square().mean()

    train_vae(sd, DECODER, shapes, tmp_path, engine)
    after = load(tmp_path / "model", "cpu")
    assert torch.equal(after.first_stage_model.encode(x).mean, latents)
    assert (after.first_stage_model.decode(latents) - x).square().mean() < 0.5 * error
    for name, weight in after.state_dict().items():
        decoder = name.startswith(("first_stage_model.decoder.", "first_stage_model.post_quant_conv."))
        assert torch.equal(weight, before[name]) != decoder, name
    assert after.config == sd.config == load("tiny", "cpu").config  # the scale factor, too
    assert read_json(tmp_path / "vae.json")["recipe"]["decoder_only"]


def test_a_decoder_of_codes_is_trained_further_and_its_codes_stay(shapes, engine, tmp_path):
    start = train_vae(SMALL_VQ, VAERecipe(steps=2, **SHORT), shapes, tmp_path / "start", engine)
    before = {name: weight.clone() for name, weight in start.state_dict().items()}
    recipe = replace(DECODER, steps=2, revive_every=1)
    after = train_vae(start, recipe, shapes, tmp_path / "more", engine).state_dict()
    changed = {name.split(".")[0] for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_a_decoder_is_trained_on_noisy_latents(shapes, engine, tmp_path):
    seen, config = [], PRESETS["tiny"].first_stage
    vae = AutoencoderKL(config)
    vae.decoder.register_forward_pre_hook(lambda _, z: seen.append(z[0].detach().float()))
    vae.quant_conv.weight.data.zero_()  # every latent is 0, and as sure as can be: what is left is noise
    vae.quant_conv.bias.data.copy_(torch.tensor([0.0] * 4 + [-30.0] * 4))
    vae.post_quant_conv.weight.data.copy_(torch.eye(4)[:, :, None, None])
    vae.post_quant_conv.bias.data.zero_()
    recipe = replace(DECODER, steps=1, lr=0.0, batch_size=20, latent_noise=0.5)
    train_vae(vae, recipe, shapes, tmp_path, engine)
    stds = torch.cat([z for z in seen if len(z) == 20]).std(dim=(1, 2, 3)).sort().values
    assert stds[0] < 0.15 and 0.35 < stds[-1] < 0.6 and 0.15 < stds.mean() < 0.35  # of each picture, up to 0.5
    with pytest.raises(ValueError, match="latent_noise is 0.1, but a VQModel replaces"):
        train_vae(SMALL_VQ, VAERecipe(steps=1, latent_noise=0.1, **SHORT), shapes, tmp_path / "codes", engine)


def test_a_decoder_alone_is_trained_only_from_a_finished_model(shapes, engine, tmp_path):
    with pytest.raises(ValueError, match="give it a finished autoencoder or model"):
        train_vae(SMALL, DECODER, shapes, tmp_path, engine)
    with pytest.raises(ValueError, match="decoder_only=True"):
        train_vae(load("tiny", "cpu"), VAERecipe(steps=1, **SHORT), shapes, tmp_path, engine)


# --- the whole autoencoder, further ---------------------------------------------------------------------------------


def test_a_whole_autoencoder_is_trained_further_at_the_size_of_the_data(shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = load("tiny", "cpu").first_stage_model.state_dict()
    cli.main(["data", "shapes", "--count", "20", "--size", "64", "--out", "shapes"])
    further = ["train", "vae", "--no-decoder-only", "--data", "shapes", "--device", "cpu", "--batch-size", "4"]
    cli.main([*further, "--init", "tiny", "--steps", "2", "--out", "first"])  # a finished model: 32 pixels
    assert not Path("first/vae/model").exists()
    assert Image.open("first/vae/samples/000002.png").size == (12 * 2 * 64 + 11 * 2, 2 * 2 * 64 + 2)
    after, scale_factor = finished_vae("first/vae")
    assert after.config == PRESETS["tiny"].first_stage and scale_factor > 0
    steps = {name: (weight - before[name]).abs().max() for name, weight in after.state_dict().items()}
    assert all(0 < step < 0.1 for step in steps.values()), "of the encoder, too, and from where the model stood"

    cli.main([*further, "--init", "first/vae", "--preset", "tiny", "--steps", "1", "--out", "second"])  # a finished run
    assert Image.open("second/vae/samples/000001.png").size == (12 * 2 * 32 + 11 * 2, 2 * 2 * 32 + 2)
