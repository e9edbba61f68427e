"""The discriminator: is this patch from a picture, or from a reconstruction?

An autoencoder that is trained on the mean error draws the mean of all that may have been there, and a mean is blurred.
A second network learns to tell pictures from reconstructions, and the decoder learns to deceive it (Goodfellow et al.
2014). It judges patch by patch, because the mean error already takes care of the large forms.

Source: Isola et al. 2017 (arXiv:1611.07004), section 3.2.2; Lim & Ye 2017 (arXiv:1705.02894); Esser et al. 2021
(arXiv:2012.09841), section 3.1; CompVis taming-transformers `taming/modules/discriminator/model.py`,
`taming/modules/losses/vqperceptual.py`.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .engine import Engine


class NLayerDiscriminator(nn.Module):
    """PatchGAN: picture → a logit for each of its overlapping patches, above zero where it looks real.

    With three layers a patch is 70 pixels wide, with two 34. The parameters are named as in CompVis. The norms always
    use the mean and variance of the batch, so no running means are kept. (With several processes, each uses those of
    its own part of the batch, as in CompVis: with a discriminator, many processes are not exactly one.)

    Args:
        input_nc: channels of the picture.
        ndf: channels after the first convolution; each further one has twice as many, up to eight times.
        n_layers: convolutions that halve the picture.
    """

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3):
        super().__init__()
        self.smallest = 3 * 2**n_layers  # after the halvings, two convolutions at the end each take one pixel off
        widths = [ndf * min(2**n, 8) for n in range(n_layers + 1)]
        # Each convolution sees 4x4 of what the one before it made, so a logit depends on a patch that grows with the
        # number of layers. All but the last two halve the map.
        layers = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for n, (before, width) in enumerate(pairwise(widths), 1):
            stride = 2 if n < n_layers else 1
            conv = nn.Conv2d(before, width, 4, stride, padding=1, bias=False)  # the norm has a bias of its own
            layers += [conv, nn.BatchNorm2d(width, track_running_stats=False), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(weights_init)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b 1 h w"]:
        """Pictures in [-1, 1] → logits.

        Raises:
            ValueError: pictures too small for so many layers.
        """
        if min(x.shape[-2:]) < self.smallest:
            raise ValueError(
                f"this discriminator needs pictures of {self.smallest} pixels at least, not {x.shape[-2]}x"
                f"{x.shape[-1]}: give it fewer layers (disc_num_layers)"
            )
        return self.main(x)


def weights_init(module: nn.Module) -> None:
    """DCGAN's: weights from N(0, 0.02²), gains of the norms from N(1, 0.02²) (Radford et al. 2015)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def hinge_d_loss(logits_real: Float[Tensor, "*p"], logits_fake: Float[Tensor, "*p"]) -> Float[Tensor, ""]:
    """½ E max(0, 1 - D(x)) + ½ E max(0, 1 + D(x̂)): no gradient where it is already sure (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def adaptive_weight(
    nll_loss: Float[Tensor, ""],
    g_loss: Float[Tensor, ""],
    last_layer: nn.Parameter,
    engine: Engine,
    limit: float = 1e4,
) -> Float[Tensor, ""]:
    """λ = ‖∇ nll_loss‖ / (‖∇ g_loss‖ + 1e-4), at most `limit`; both gradients are those of the decoder's last layer.

    Multiplied by λ, the discriminator pulls at the decoder as strongly as the reconstruction does, however sure it is.
    λ itself has no gradient. (Esser et al., eq. 7; CompVis `calculate_adaptive_weight`.) In CompVis each process has a
    λ of its own. Here the gradients are averaged first, so that λ is the same on all.
    """
    # The last layer stands for the decoder: the gradients of all its weights would cost two more passes backwards.
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (nll_loss, g_loss)]
    nll_grads, g_grads = engine.gather(torch.stack(gradients)[None]).mean(dim=0)
    return (nll_grads.norm() / (g_grads.norm() + 1e-4)).clamp(0.0, limit)


def generator_loss(discriminator: nn.Module, fake: Float[Tensor, "b c H W"]) -> Float[Tensor, ""]:
    """-E D(x̂): what the decoder is to lower. The discriminator's own weights get no gradient from it."""
    # Frozen for this call, the discriminator only passes the gradient on to the picture, and so to the decoder.
    discriminator.requires_grad_(False)
    try:
        return -discriminator(fake).float().mean()
    finally:
        discriminator.requires_grad_(True)


def discriminator_loss(
    discriminator: nn.Module, real: Float[Tensor, "b c H W"], fake: Float[Tensor, "b c H W"]
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the discriminator is to lower, and its mean logits for the log. No gradient reaches the autoencoder."""
    logits_real, logits_fake = discriminator(real).float(), discriminator(fake.detach()).float()
    figures = {"logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
    return hinge_d_loss(logits_real, logits_fake), figures
