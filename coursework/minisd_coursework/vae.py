"""Exercises of stage 4: the autoencoder, its distribution, and its cousin with a codebook."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from minisd import vq
from minisd.sampling import randn
from minisd.training import vae as training_vae
from minisd.vae import DiagonalGaussianDistribution, Downsample
from minisd.vq import VectorQuantizer

from .exercise import case, exercise
from .places import function, instead_of, method
from .unet import Layer


def _moments(b: int, c: int = 4, h: int = 3, w: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(b, c, h, w), 1.5 * torch.randn(b, c, h, w) - 0.5


@instead_of("sample", DiagonalGaussianDistribution)
def _put_sample(f, real, self, generator=None):
    noise = randn(self.mean.shape, generator).to(self.mean)
    return f(torch.cat([self.mean, self.logvar], dim=1), noise).to(self.mean)


def _sample_case(b: int, c: int, h: int, w: int, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    moments = torch.cat([torch.randn(b, c, h, w), spread * torch.randn(b, c, h, w)], dim=1)
    return moments, torch.randn(b, c, h, w)


def _far_below() -> tuple[Tensor, Tensor]:
    """So little variance that only a large noise shows where it is clamped; and means beyond these bounds."""
    mean, logvar = 40 * torch.randn(2, 4, 3, 5), -60 * torch.rand(2, 4, 3, 5)
    return torch.cat([mean, logvar - 30], dim=1), 1e8 * torch.randn(2, 4, 3, 5)


@exercise(gradients=("moments",), swap=_put_sample)
@case("two pictures", lambda: _sample_case(2, 4, 3, 5))
@case("one picture", lambda: _sample_case(1, 2, 4, 3))
@case("square latents", lambda: _sample_case(2, 4, 4, 4))
@case("log variances beyond the bounds", lambda: _sample_case(2, 4, 3, 5, spread=30.0))
@case("log variances far below", lambda: _far_below())
def sample_posterior(
    moments: Float[Tensor, "b two_c h w"], noise: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """A sample of q(z | x) = N(mean, diag(exp(logvar))), by the reparametrisation trick: z = mean + std · ε.

    `moments` is what the encoder returns: along the channels first the mean, then the log variance, which is clamped to
    [-30, 20]. `noise` is ε ~ N(0, I). Gradients flow to both. (Kingma & Welling 2013, section 2.4; CompVis:
    distributions.py)
    """
    # BEGIN SOLUTION
    mean, logvar = moments.chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)
    return mean + torch.exp(0.5 * logvar) * noise
    # END SOLUTION


@exercise(gradients=("mean", "logvar"), swap=method(DiagonalGaussianDistribution, "kl", "mean", "logvar"))
@case("two pictures", lambda: _moments(2))
@case("one picture", lambda: _moments(1, 2, 4, 3))
@case("three square latents", lambda: _moments(3, 4, 4, 4))
def kl(mean: Float[Tensor, "b c h w"], logvar: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
    """KL(N(mean, diag(exp(logvar))) ‖ N(0, I)) in nats: how far the latents' distribution is from N(0, I).

    One number for each picture: of all its c·h·w numbers together. (Kingma & Welling 2013, appendix B)
    """
    # BEGIN SOLUTION
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))
    # END SOLUTION


def _vae_case(b: int, h: int, w: int, weight: float) -> tuple:
    return torch.rand(b, 3, h, w) * 2 - 1, torch.randn(b, 3, h, w), *_moments(b, 4, 2, 3), weight


@exercise(
    gradients=("reconstruction", "mean", "logvar"),
    swap="minisd has no place for it: `minisd.training.vae` adds these terms up in the midst of its own loop.",
)
@case("two pictures", lambda: _vae_case(2, 4, 6, 0.1))
@case("one picture", lambda: _vae_case(1, 8, 4, 0.5))
@case("three square pictures", lambda: _vae_case(3, 6, 6, 1e-2))
def vae_loss(
    x: Float[Tensor, "b 3 H W"],
    reconstruction: Float[Tensor, "b 3 H W"],
    mean: Float[Tensor, "b c h w"],
    logvar: Float[Tensor, "b c h w"],
    kl_weight: float,
) -> Float[Tensor, ""]:
    """What the autoencoder is trained on: mean |x - reconstruction| + kl_weight · KL / (values in a picture).

    KL is that of `kl`, averaged over the batch; the values in a picture are 3·H·W.
    """
    # BEGIN SOLUTION
    rec = (x - reconstruction).abs().mean()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean() / x[0].numel()
    return rec + kl_weight * kl
    # END SOLUTION


# --- a codebook in the place of the distribution ---------------------------------------------------------------------


@instead_of("nearest", VectorQuantizer)
@torch.no_grad()
def _put_nearest(f, real, self, z):
    b, _, h, w = z.shape
    return f(rearrange(z, "b d h w -> (b h w) d"), self.embedding.weight).view(b, h, w)


@instead_of("loss", VectorQuantizer)
def _put_vq_loss(f, real, self, z, codes):
    # legacy: β · codes + commitment = β (codes + 1/β · commitment)
    return self.beta * f(z, codes, 1 / self.beta) if self.legacy else f(z, codes, self.beta)


def _code_case(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    codes = torch.randn(k, d) * torch.linspace(0.3, 3.0, k)[:, None]
    return torch.randn(n, d) * 2, codes


@exercise(swap=_put_nearest)
@case("20 vectors, 6 codes", lambda: _code_case(20, 6, 3))
@case("one vector", lambda: _code_case(1, 5, 4))
@case("as many vectors as codes", lambda: _code_case(8, 8, 8))
@case("many codes", lambda: _code_case(30, 40, 2))
def nearest_code(z: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"]) -> Int[Tensor, "n"]:
    """For each vector of z the index of the code that is nearest to it, by Euclidean distance.

    (van den Oord et al. 2017, "Neural discrete representation learning", eq. 1)
    """
    # BEGIN SOLUTION
    return (z[:, None] - codebook).square().sum(dim=-1).argmin(dim=1)
    # END SOLUTION


@exercise(gradients=("z", "z_q"), swap=function("straight_through", vq))
@case("5 vectors", lambda: (torch.randn(5, 3), torch.randn(5, 3)))
@case("one vector", lambda: (torch.randn(1, 4), torch.randn(1, 4)))
@case("latents", lambda: (torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)))
def straight_through(z: Float[Tensor, "*d"], z_q: Float[Tensor, "*d"]) -> Float[Tensor, "*d"]:
    """Forwards the codes z_q, backwards the identity: the gradient is handed to z, the encoder's output, unchanged;
    z_q gets none.

    (van den Oord et al. 2017, section 3.2)
    """
    # BEGIN SOLUTION
    return z + (z_q - z).detach()
    # END SOLUTION


@exercise(gradients=("z", "z_q"), swap=_put_vq_loss)
@case("beta 0.25", lambda: (torch.randn(5, 3), torch.randn(5, 3), 0.25))
@case("beta 2", lambda: (torch.randn(4, 4), torch.randn(4, 4), 2.0))
@case("latents", lambda: (torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), 0.5))
def vq_loss(z: Float[Tensor, "*d"], z_q: Float[Tensor, "*d"], beta: float) -> Float[Tensor, ""]:
    """What makes codes and encoder meet: mean (sg(z) - z_q)² + β mean (z - sg(z_q))², means over all numbers.

    sg stops the gradient. The first term moves the codes, the second, the commitment, the encoder.
    (van den Oord et al. 2017, eq. 3; CompVis: taming's VectorQuantizer, with legacy=False)
    """
    # BEGIN SOLUTION
    codes = (z.detach() - z_q).square().mean()
    commit = (z - z_q.detach()).square().mean()
    return codes + beta * commit
    # END SOLUTION


# --- sizes -----------------------------------------------------------------------------------------------------------


@instead_of("measure_scale_factor", training_vae)
def _put_scale_factor(f, real, vae, data, engine):
    mean, logvar = training_vae.encode_all(vae, data, engine).chunk(2, dim=1)
    std = torch.exp(0.5 * logvar)
    return float(f(torch.cat([mean - std, mean + std])))  # these have the variance that samples have on average


@exercise(tolerance=8e-3, swap=_put_scale_factor)
@case(
    "four latents",
    lambda: (
        torch.tensor([1.0, 3, 6, 9]).view(4, 1, 1, 1) * torch.randn(4, 4, 3, 5)
        + torch.tensor([-3.0, 0, 1, 3]).view(1, 4, 1, 1),
    ),
)
@case("one latent, a mean far from 0", lambda: (0.3 * torch.randn(1, 4, 8, 8) + 2,))
@case("square latents", lambda: (2.0 * torch.randn(4, 4, 4, 4),))
def scale_factor(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """What latents are multiplied by to have a standard deviation of 1 (0.18215 in Stable Diffusion).

    One number for all, measured over pictures, channels and pixels together.
    (Rombach et al. 2022, appendix G; CompVis: LatentDiffusion.on_train_batch_start)
    """
    # BEGIN SOLUTION
    return 1 / latents.std()
    # END SOLUTION


@exercise(swap=method(Downsample, "forward", "conv"))
@case("4 x 6 pixels", lambda: (torch.randn(2, 3, 4, 6), nn.Conv2d(3, 3, 3, stride=2)))
@case("one picture", lambda: (torch.randn(1, 2, 8, 4), nn.Conv2d(2, 2, 3, stride=2)))
@case("a square", lambda: (torch.randn(2, 3, 6, 6), nn.Conv2d(3, 3, 3, stride=2)))
@case("odd sizes", lambda: (torch.randn(1, 3, 5, 7), nn.Conv2d(3, 3, 3, stride=2)))
def vae_downsample(x: Float[Tensor, "b c h w"], conv: Layer) -> Float[Tensor, "b c h2 w2"]:
    """Half the size, as in the VAE: one column of zeros on the right and one row of them below, then `conv`.

    conv is 3x3, with a stride of 2 and without a padding of its own.
    (CompVis: ldm/modules/diffusionmodules/model.py, Downsample)
    """
    # BEGIN SOLUTION
    return conv(F.pad(x, (0, 1, 0, 1)))
    # END SOLUTION
