"""The discriminator: is this patch from a picture, or from a reconstruction?

An autoencoder that minimises a mean error reconstructs the mean of all pictures that fit the latent, and a mean is
blurred. So a second network is trained to distinguish pictures from reconstructions, and the decoder is trained to make
reconstructions that it takes for real pictures (Goodfellow et al. 2014). It classifies patches, not whole pictures,
because the reconstruction error already gets the large shapes right.

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

    With three layers a patch is 70 pixels wide, with two 34. The parameters are named as in CompVis. The batch norms
    always use the mean and variance of the current batch, so no running means are kept. (With several processes, each
    uses those of its own part of the batch, as in CompVis. So with a discriminator, several processes do not give
    exactly the same result as one.)

    Args:
        input_nc: channels of the picture.
        ndf: channels after the first convolution. Each further convolution doubles them, up to 8 · ndf.
        n_layers: how many convolutions halve the picture.
    """

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3):
        super().__init__()
        self.smallest = 3 * 2**n_layers  # 3 pixels are left after the halvings; each of the last two convs removes one
        widths = [ndf * min(2**n, 8) for n in range(n_layers + 1)]
        # Each convolution has a 4x4 kernel, so the receptive field of a logit grows with the number of layers. All
        # convolutions except for the last two halve the map.
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
            ValueError: the pictures are too small for this number of layers.
        """
        if min(x.shape[-2:]) < self.smallest:
            raise ValueError(
                f"this discriminator needs pictures of {self.smallest} pixels at least, not {x.shape[-2]}x"
                f"{x.shape[-1]}: give it fewer layers (disc_num_layers)"
            )
        return self.main(x)


def weights_init(module: nn.Module) -> None:
    """DCGAN's initialisation: weights from N(0, 0.02²), gains of the norms from N(1, 0.02²) (Radford et al. 2015)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def hinge_d_loss(logits_real: Float[Tensor, "*p"], logits_fake: Float[Tensor, "*p"]) -> Float[Tensor, ""]:
    """½ E max(0, 1 - D(x)) + ½ E max(0, 1 + D(x̂)) (Lim & Ye 2017).

    A logit beyond 1 on the right side gives no gradient, so the discriminator does not become ever more confident.
    """
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def adaptive_weight(
    nll_loss: Float[Tensor, ""], g_loss: Float[Tensor, ""], last_layer: nn.Parameter, engine: Engine, limit: float = 1e4
) -> Float[Tensor, ""]:
    """λ = ‖∇ nll_loss‖ / (‖∇ g_loss‖ + 1e-4), at most `limit`; both gradients are with respect to the last layer.

    Multiplied by λ, the adversarial term has a gradient as long as that of the reconstruction error, whatever the size
    of the discriminator's logits. λ is a constant here: no gradient flows through it. (Esser et al., eq. 7; CompVis
    `calculate_adaptive_weight`.) In CompVis each process computes its own λ. Here the gradients are averaged first, so
    that λ is the same on all processes.
    """
    # Only the last layer of the decoder is used, because the gradients of all weights would cost two more full backward
    # passes.
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (nll_loss, g_loss)]
    nll_grads, g_grads = engine.gather(torch.stack(gradients)[None]).mean(dim=0)
    return (nll_grads.norm() / (g_grads.norm() + 1e-4)).clamp(0.0, limit)


def generator_loss(discriminator: nn.Module, fake: Float[Tensor, "b c H W"]) -> Float[Tensor, ""]:
    """-E D(x̂), the adversarial loss of the decoder. The discriminator's own weights get no gradient from it."""
    # Freeze the discriminator for this call. The gradient still flows through it to the reconstruction and the decoder.
    discriminator.requires_grad_(False)
    try:
        return -discriminator(fake).float().mean()
    finally:
        discriminator.requires_grad_(True)


def discriminator_loss(
    discriminator: nn.Module, real: Float[Tensor, "b c H W"], fake: Float[Tensor, "b c H W"]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The discriminator's loss, and its mean logits for the log. No gradient reaches the autoencoder (detach)."""
    logits_real, logits_fake = discriminator(real).float(), discriminator(fake.detach()).float()
    figures = {"logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
    return hinge_d_loss(logits_real, logits_fake), figures
