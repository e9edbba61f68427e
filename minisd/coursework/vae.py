"""Exercises of stage 4: the autoencoder, its distribution, and its cousin with a codebook."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import vq
from ..training import vae as training_vae
from ..vae import DiagonalGaussianDistribution, Downsample
from ..vq import VectorQuantizer
from .exercise import exercise

Layer = Callable[[Tensor], Tensor]


def _moments(b: int, c: int = 4, h: int = 3, w: int = 5) -> dict[str, Tensor]:
    return {"mean": torch.randn(b, c, h, w), "logvar": 1.5 * torch.randn(b, c, h, w) - 0.5}


def _put_sample(f):
    def sample(self, generator=None):
        noise = torch.randn(self.mean.shape, generator=generator, dtype=torch.float32, device="cpu").to(self.mean)
        return f(torch.cat([self.mean, self.logvar], dim=1), noise).to(self.mean)

    return [(DiagonalGaussianDistribution, "sample", sample)]


def _sample_case(b: int, c: int, h: int, w: int, spread: float = 1.5) -> dict:
    return {"moments": torch.cat([torch.randn(b, c, h, w), spread * torch.randn(b, c, h, w)], dim=1),
            "noise": torch.randn(b, c, h, w)}


def _far_below() -> dict:
    """So little variance that only a large noise shows where it is clamped; and means beyond these bounds."""
    mean, logvar = 40 * torch.randn(2, 4, 3, 5), -60 * torch.rand(2, 4, 3, 5)
    return {"moments": torch.cat([mean, logvar - 30], dim=1), "noise": 1e8 * torch.randn(2, 4, 3, 5)}


@exercise(
    difficulty=2,
    minutes=15,
    cases=lambda: {
        "two pictures": _sample_case(2, 4, 3, 5),
        "one picture": _sample_case(1, 2, 4, 3),
        "square latents": _sample_case(2, 4, 4, 4),
        "log variances beyond the bounds": _sample_case(2, 4, 3, 5, spread=30.0),
        "log variances far below": _far_below(),
    },
    hints=(
        "Cut the channels into two halves: mean and log variance.",
        "std = √var = √exp(logvar) = exp(logvar / 2).",
        "z = mean + std · ε, with logvar clamped to [-30, 20] first.",
    ),
    mistakes=[
        ("torch.exp(0.5 * logvar)", "torch.exp(logvar)",
         "exp(logvar) is the variance: noise is scaled by the standard deviation, exp(logvar / 2)."),
        ("torch.exp(0.5 * logvar)", "logvar",
         "You took the log variance itself for the standard deviation: that is exp(logvar / 2)."),
        ("torch.exp(0.5 * logvar)", "logvar.abs().sqrt()",
         "A root of the log variance is not the standard deviation: first exp, then the root, which is exp(logvar /"
         " 2)."),
        ("torch.exp(0.5 * logvar)", "torch.exp(-0.5 * logvar)",
         "The sign in the exponent is wrong: exp(+ logvar / 2)."),
        ("torch.exp(0.5 * logvar)", "torch.exp(2 * logvar)", "The ½ in the exponent became a 2: exp(logvar / 2)."),
        ("mean, logvar = moments", "logvar, mean = moments",
         "The halves are exchanged: the mean comes first, then the log variance."),
        ("chunk(2, dim=1)", "unflatten(1, (-1, 2)).unbind(2)",
         "You took every other channel: mean and log variance are two halves, one after the other."),
        ("chunk(2, dim=1)", "chunk(2, dim=0)", "You cut the batch: the channels, axis 1, are cut."),
        ("torch.exp(0.5 * logvar)", "F.softplus(logvar)",
         "You took a softplus of the log variance: the standard deviation is exp(logvar / 2)."),
        ("torch.exp(0.5 * logvar) * noise", "torch.exp(0.5 * logvar) + noise",
         "The standard deviation is added: it multiplies the noise."),
        ("chunk(2, dim=1)", "chunk(2, dim=-1)", "You cut the columns: the channels, axis 1, are cut."),
        (".clamp(-30.0, 20.0)", "",
         "The log variance is not clamped to [-30, 20]: exp overflows where the encoder goes astray."),
        (".clamp(-30.0, 20.0)", ".clamp(max=20.0)",
         "The log variance is clamped from above only: from below, too, at -30."),
        (".clamp(-30.0, 20.0)", ".clamp(min=-30.0)",
         "The log variance is clamped from below only: from above, too, at 20."),
        (".clamp(-30.0, 20.0)\nreturn mean + torch.exp(0.5 * logvar) * noise",
         "\nreturn mean + torch.exp(0.5 * logvar).clamp(-30.0, 20.0) * noise",
         "You clamped the standard deviation: it is the log variance that is clamped to [-30, 20], before the exp."),
        (".clamp(-30.0, 20.0)\nreturn mean + torch.exp(0.5 * logvar) * noise",
         "\nreturn mean + torch.exp((0.5 * logvar).clamp(-30.0, 20.0)) * noise",
         "You clamped half of the log variance: first clamp it to [-30, 20], then halve it."),
        ("moments.chunk", "moments.clamp(-30.0, 20.0).chunk",
         "You clamped the mean as well: only the log variance is clamped."),
        (".clamp(-30.0, 20.0)", ".clamp(-20.0, 30.0)", "The bounds are exchanged: from -30 to 20."),
        (".clamp(-30.0, 20.0)", ".clamp(-1.0, 1.0)", "The log variance is clamped to [-30, 20], not to [-1, 1]."),
        ("mean + torch.exp(0.5 * logvar) * noise", "mean",
         "The noise does not come in: this is the mode, not a sample."),
        ("mean + torch.exp(0.5 * logvar) * noise", "torch.exp(0.5 * logvar) * noise", "The mean is missing."),
        ("mean + torch.exp(0.5 * logvar) * noise", "mean + noise",
         "The noise is not scaled by the standard deviation."),
        ("mean + torch.exp(0.5 * logvar) * noise", "(mean + noise) * torch.exp(0.5 * logvar)",
         "The mean is scaled, too: only the noise is."),
        ("mean + torch.exp(0.5 * logvar) * noise", "mean + (torch.exp(0.5 * logvar) * noise).detach()",
         "The noise term is detached: the values are right, but the encoder never learns its variance."),
        ("mean + torch.exp(0.5 * logvar) * noise", "(mean + torch.exp(0.5 * logvar) * noise).detach()",
         "No gradient flows to mean and variance: that it does is what the reparametrisation is for."),
        ("mean + torch.exp", "mean - torch.exp",
         "The noise is subtracted: it is added (it is given, so its sign counts)."),
        ("0.5 * logvar", "0.5 * torch.log1p(logvar.exp())",
         "You put a softplus around the variance: the encoder gives its logarithm, so that exp is enough."),
    ],
    gradients=("moments",),
    swap=_put_sample,
)  # fmt: skip
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


@exercise(
    difficulty=2,
    minutes=15,
    cases=lambda: {
        "two pictures": _moments(2),
        "one picture": _moments(1, 2, 4, 3),
        "three square latents": _moments(3, 4, 4, 4),
    },
    hints=(
        "For one number: KL(N(m, s²) ‖ N(0, 1)) = ½ (m² + s² - 1 - log s²).",
        "The numbers of a latent are independent: their KLs add up.",
        "s² is exp(logvar), log s² is logvar. One sum for each picture, over channels, rows and columns.",
    ),
    mistakes=[
        ("0.5 * (", "(", "The ½ is missing."),
        ("0.5 * (", "-0.5 * (", "The sign is wrong: a KL divergence is never negative."),
        (" - 1", "", "The - 1 is missing: for N(0, 1) itself the KL has to be 0."),
        (" - 1", " + 1", "It is - 1, not + 1: for N(0, 1) itself the KL has to be 0."),
        (" - logvar", " + logvar", "The log variance is subtracted: ½ (m² + s² - 1 - log s²)."),
        (" - logvar", "", "The log variance is missing: without it nothing keeps the variance from going to 0."),
        (" - logvar", " - 2 * logvar",
         "The log variance counts twice: ½ (m² + s² - 1 - log s²), and log s² is logvar."),
        ("return 0.5 * (", "return 1 / 0.6931472 * 0.5 * (", "You divided by ln 2, which gives bits: nats are wanted."),
        ("mean**2 + ", "", "The square of the mean is missing: nothing would hold the means at 0."),
        ("mean**2", "mean", "The mean is squared in it."),
        ("mean**2", "mean.abs()", "The mean comes in squared, not by its absolute value."),
        ("logvar.exp()", "(0.5 * logvar).exp()",
         "That is the standard deviation: the variance exp(logvar) belongs there."),
        ("logvar.exp()", "logvar", "The variance is exp(logvar): with logvar itself the two terms cancel."),
        ("logvar.exp()", "(2 * logvar).exp()", "The variance is exp(logvar), without the square."),
        ("logvar.exp() - 1 - logvar", "logvar**2 - 1 - torch.log(logvar**2)",
         "You took logvar for the standard deviation: it is the log of the variance, so that s² is exp(logvar)."),
        (" + logvar.exp()", "", "The variance exp(logvar) is missing."),
        (".sum(dim=(1, 2, 3))", ".mean(dim=(1, 2, 3))",
         "You took the mean over the numbers of a latent: their KLs add up."),
        (".sum(dim=(1, 2, 3))", ".sum()", "You summed over the batch, too: one number for each picture."),
        (".sum(dim=(1, 2, 3))", ".mean()", "You took the mean over everything: a sum for each picture."),
        (".sum(dim=(1, 2, 3))", ".sum(dim=(1, 2, 3)).mean()",
         "You took the mean over the batch: one number for each picture is wanted."),
        (".sum(dim=(1, 2, 3))", ".sum(dim=(2, 3)).mean(dim=1)",
         "You took the mean over the channels: they are summed as well."),
        (" - logvar", " - 0.5 * logvar", "You subtracted log s: it is log s², the log variance itself."),
        ("0.5 * (mean**2 + logvar.exp() - 1 - logvar)", "0.5 * ((1 + mean**2) / logvar.exp() - 1 + logvar)",
         "This is the KL the other way round, KL(N(0, 1) ‖ q). Wanted is KL(q ‖ N(0, 1))."),
        ("mean**2 + logvar.exp() - 1 - logvar", "mean**2 + (2 * logvar).exp() - 1 - 2 * logvar",
         "You took logvar for the log of the standard deviation: it is that of the variance, so that σ² is"
         " exp(logvar)."),
        ("mean**2 + logvar.exp()", "mean**2 / logvar.exp() + logvar.exp()",
         "The square of the mean is divided by the variance of q: it is divided by that of N(0, I), which is 1."),
    ],
    gradients=("mean", "logvar"),
    swap=lambda f: [(DiagonalGaussianDistribution, "kl", lambda self: f(self.mean, self.logvar))],
)  # fmt: skip
def kl(mean: Float[Tensor, "b c h w"], logvar: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
    """KL(N(mean, diag(exp(logvar))) ‖ N(0, I)) in nats: how far the latents' distribution is from N(0, I).

    One number for each picture: of all its c·h·w numbers together. (Kingma & Welling 2013, appendix B)
    """
    # BEGIN SOLUTION
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))
    # END SOLUTION


def _vae_case(b: int, h: int, w: int, weight: float) -> dict:
    return {"x": torch.rand(b, 3, h, w) * 2 - 1, "reconstruction": torch.randn(b, 3, h, w), **_moments(b, 4, 2, 3),
            "kl_weight": weight}


@exercise(
    difficulty=2,
    minutes=15,
    cases=lambda: {
        "two pictures": _vae_case(2, 4, 6, 0.1),
        "one picture": _vae_case(1, 8, 4, 0.5),
        "three square pictures": _vae_case(3, 6, 6, 1e-2),
    },
    hints=(
        "The mean of |x - reconstruction| over everything.",
        "KL: ½ Σ (mean² + exp(logvar) - 1 - logvar), summed over a latent, averaged over the batch.",
        "Divide the KL by the number of values in a picture, x[0].numel(), since the first term is a mean over these.",
    ),
    mistakes=[
        ("(x - reconstruction).abs()", "(x - reconstruction).square()",
         "You took squares (L2): here it is the absolute difference, which blurs less."),
        ("kl_weight * kl", "kl", "The weight of the KL is missing: at full strength nothing would be reconstructed."),
        ("rec + kl_weight * kl", "kl_weight * rec + kl",
         "The weight stands before the wrong term: it belongs to the KL."),
        ("rec + kl_weight * kl", "rec - kl_weight * kl",
         "The KL comes in with the wrong sign: it is never negative, and as a penalty it is added."),
        (" / x[0].numel()", "",
         "The KL is not divided by the number of values in a picture, as the reconstruction's mean is."),
        (" / x[0].numel()", " / mean[0].numel()",
         "The KL is divided by the number of values in a picture, not in a latent."),
        (" / x[0].numel()", " / x.numel()",
         "The KL is divided by the values of the whole batch: by those of one picture (the batch is averaged"
         " already)."),
        ("rec + kl_weight * kl", "(rec / x[0].numel() + kl_weight * kl)",
         "The reconstruction is divided by the number of values, too: it is a mean already."),
        (" / x[0].numel()", " / x[0, 0].numel()",
         "The KL is divided by the number of pixels: by that of values, 3·H·W."),
        (" / x[0].numel()", " / len(x)", "The KL is divided by the batch size once more: by the values in a picture."),
        ("rec + kl_weight * kl", "rec", "The KL is missing."),
        ("rec + kl_weight * kl", "kl_weight * kl", "The reconstruction is missing."),
        (".sum(dim=(1, 2, 3)).mean()", ".sum()", "The KL is summed over the batch: averaged."),
        (".sum(dim=(1, 2, 3)).mean()", ".mean()",
         "The KL is averaged over a latent: summed, since its numbers are independent."),
        ("0.5 * (mean**2", "(mean**2", "The ½ of the KL is missing."),
        (" - logvar)", " + logvar)", "In the KL the log variance is subtracted."),
        ("abs().mean()", "abs().sum() / len(x)",
         "The reconstruction is summed over each picture and averaged over the batch only: it is a mean over"
         " everything."),
        ("abs().mean()", "abs().sum()", "The reconstruction is summed: it is a mean over everything."),
        ("(x - reconstruction).abs().mean()", "(x - reconstruction).mean().abs()",
         "First the absolute value, then the mean: in yours, errors of different signs cancel."),
        ("logvar.exp()", "(0.5 * logvar).exp()",
         "In the KL stands the variance, exp(logvar), not the standard deviation."),
    ],
    gradients=("reconstruction", "mean", "logvar"),
    swap="minisd has no place for it: `minisd.training.vae` adds these terms up in the midst of its own loop.",
)  # fmt: skip
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


def _put_nearest(f):
    @torch.no_grad()
    def nearest(self, z):
        b, _, h, w = z.shape
        return f(rearrange(z, "b d h w -> (b h w) d"), self.embedding.weight).view(b, h, w)

    return [(VectorQuantizer, "nearest", nearest)]


def _put_vq_loss(f):
    """In quantisers with legacy=False: the others weigh the terms the other way round."""
    real = VectorQuantizer.loss
    return [(VectorQuantizer, "loss",
             lambda self, z, codes: real(self, z, codes) if self.legacy else f(z, codes, self.beta))]  # fmt: skip


def _code_case(n: int, k: int, d: int) -> dict:
    codes = torch.randn(k, d) * torch.linspace(0.3, 3.0, k)[:, None]
    return {"z": torch.randn(n, d) * 2, "codebook": codes}


@exercise(
    difficulty=2,
    minutes=15,
    cases=lambda: {
        "20 vectors, 6 codes": _code_case(20, 6, 3),
        "one vector": _code_case(1, 5, 4),
        "as many vectors as codes": _code_case(8, 8, 8),
        "many codes": _code_case(30, 40, 2),
    },
    hints=(
        "Squared distances [n k]: of each vector to each code. Then the index of the smallest in each row.",
        "z[:, None] - codebook[None] is [n k d].",
    ),
    mistakes=[
        ("argmin", "argmax", "You took the farthest code: the nearest is that of the smallest distance, argmin."),
        ("argmin(dim=1)", "argmin(dim=0)",
         "For each code you look for the nearest vector: for each vector the nearest code is wanted, along axis 1."),
        ("(z[:, None] - codebook).square().sum(dim=-1)", "(-(z @ codebook.T))",
         "You compare by the dot product, which prefers long codes: the distance is wanted."),
        ("(z[:, None] - codebook).square().sum(dim=-1)",
         "(-(F.normalize(z, dim=-1) @ F.normalize(codebook, dim=-1).T))",
         "You compare directions (cosine similarity): the distance is wanted."),
        ("(z[:, None] - codebook).square().sum(dim=-1)", "(z[:, None] - codebook).sum(dim=-1)",
         "The square is missing: positive and negative differences cancel."),
        ("(z[:, None] - codebook).square().sum(dim=-1)", "(z[:, None] - codebook).sum(dim=-1).abs()",
         "First the square (or the absolute value), then the sum: in yours differences of different signs cancel."),
        ("(z[:, None] - codebook).square().sum(dim=-1)", "(z[:, None] - codebook).abs().sum(dim=-1)",
         "You took the L1 distance: the Euclidean one is wanted, with squares."),
        ("(z[:, None] - codebook).square().sum(dim=-1)", "(z[:, None] - codebook).square().amax(dim=-1)",
         "You took the largest difference: the sum of all squares is wanted."),
        ("(z[:, None] - codebook).square().sum(dim=-1)", "(z[:, None] + codebook).square().sum(dim=-1)",
         "A plus for a minus: the distance is that of a difference, |z|² - 2 z·c + |c|²."),
        ("(z[:, None] - codebook).square().sum(dim=-1)", "((codebook**2).sum(dim=-1) + z @ codebook.T)",
         "In |z|² - 2 z·c + |c|² the sign of the middle term is wrong, and its 2 is missing."),
        ("(z[:, None] - codebook).square().sum(dim=-1)", "((codebook**2).sum(dim=-1) - z @ codebook.T)",
         "In |z|² - 2 z·c + |c|² the 2 of the middle term is missing."),
        ("(z[:, None] - codebook).square().sum(dim=-1)", "(-(z @ codebook.T).abs())",
         "You compare by the size of the dot product: the distance is wanted."),
        ("return (z[:, None] - codebook).square().sum(dim=-1).argmin(dim=1)",
         "return codebook[(z[:, None] - codebook).square().sum(dim=-1).argmin(dim=1)]",
         "You returned the codes: their indices are wanted."),
        ("return (z[:, None] - codebook).square().sum(dim=-1).argmin(dim=1)",
         "return F.one_hot((z[:, None] - codebook).square().sum(dim=-1).argmin(dim=1), len(codebook))",
         "You returned a one-hot code, a row of 0 and a 1: the index itself is wanted."),
        ("return (z[:, None] - codebook).square().sum(dim=-1).argmin(dim=1)",
         "return (z[:, None] - codebook).square().sum(dim=-1).amin(dim=1)",
         "You returned the smallest distances: the indices are wanted, argmin."),
        ("argmin(dim=1)", "amin(dim=1).sqrt()",
         "You returned the smallest distance of each vector: wanted is where it is, the index, argmin."),
    ],
    swap=_put_nearest,
)  # fmt: skip
def nearest_code(z: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"]) -> Int[Tensor, "n"]:
    """For each vector of z the index of the code that is nearest to it, by Euclidean distance.

    (van den Oord et al. 2017, "Neural discrete representation learning", eq. 1)
    """
    # BEGIN SOLUTION
    return (z[:, None] - codebook).square().sum(dim=-1).argmin(dim=1)
    # END SOLUTION


@exercise(
    difficulty=3,
    minutes=10,
    cases=lambda: {
        "5 vectors": {"z": torch.randn(5, 3), "z_q": torch.randn(5, 3)},
        "one vector": {"z": torch.randn(1, 4), "z_q": torch.randn(1, 4)},
        "latents": {"z": torch.randn(2, 4, 3, 5), "z_q": torch.randn(2, 4, 3, 5)},
    },
    hints=(
        "Forwards the value of z_q, backwards as if it were z: `detach` stops a gradient.",
        "z + (something that is z_q - z, and lets no gradient through).",
    ),
    mistakes=[
        ("z + (z_q - z).detach()", "z_q",
         "The value is right, but no gradient reaches z, the encoder: it goes to the codes z_q. Detach the"
         " difference z_q - z, and nothing else: argmin has no gradient, so it must be led around."),
        ("z + (z_q - z).detach()", "z_q + (z - z_q).detach()",
         "The wrong way round: your value is z, and the gradient goes to the codes. Value z_q, gradient to z."),
        ("z + (z_q - z).detach()", "z", "You returned z: forwards the value is z_q."),
        ("z + (z_q - z).detach()", "(z + (z_q - z)).detach()", "Everything is detached: nothing gets a gradient."),
        ("z + (z_q - z).detach()", "z_q - z + z.detach()",
         "The gradient to z has the wrong sign, and there is one to z_q as well: detach the whole difference z_q -"
         " z."),
        ("z + (z_q - z).detach()", "z + z_q - z.detach()",
         "z_q gets a gradient as well: detach the whole difference z_q - z."),
        ("(z_q - z)", "(z - z_q)", "The difference is the wrong way round: z + (z_q - z) is z_q."),
        ("z + (z_q - z).detach()", "z + z_q.detach()", "The value is z + z_q: subtract z again, inside of the detach."),
        ("z + (z_q - z).detach()", "(z + z_q) / 2 + ((z_q - z) / 2).detach()",
         "Half of the gradient goes to z, half to z_q: all of it goes to z."),
    ],
    gradients=("z", "z_q"),
    swap=lambda f: [(vq, "straight_through", f)],
)  # fmt: skip
def straight_through(z: Float[Tensor, "*d"], z_q: Float[Tensor, "*d"]) -> Float[Tensor, "*d"]:
    """Forwards the codes z_q, backwards the identity: the gradient is handed to z, the encoder's output, unchanged;
    z_q gets none.

    (van den Oord et al. 2017, section 3.2)
    """
    # BEGIN SOLUTION
    return z + (z_q - z).detach()
    # END SOLUTION


@exercise(
    difficulty=3,
    minutes=15,
    cases=lambda: {
        "beta 0.25": {"z": torch.randn(5, 3), "z_q": torch.randn(5, 3), "beta": 0.25},
        "beta 2": {"z": torch.randn(4, 4), "z_q": torch.randn(4, 4), "beta": 2.0},
        "latents": {"z": torch.randn(2, 4, 3, 5), "z_q": torch.randn(2, 4, 3, 5), "beta": 0.5},
    },
    hints=(
        "Both terms have the same value, ‖z - z_q‖². They differ in what is detached.",
        "The codes move to the encoder (z detached); the encoder commits to the codes (z_q detached), with the weight"
        " β.",
    ),
    mistakes=[
        ("codes + beta * commit", "beta * codes + commit",
         "β stands before the wrong term: it weighs the commitment, in which z_q is detached."),
        ("codes + beta * commit", "codes + commit", "The weight β of the commitment is missing."),
        ("codes + beta * commit", "beta * (codes + commit)",
         "β stands before both terms: it weighs the commitment only."),
        ("codes + beta * commit", "(1 + beta) * commit",
         "Both terms detach z_q, so that the codes do not learn: in the first, z is detached."),
        ("codes + beta * commit", "(1 + beta) * codes",
         "Both terms detach z, so that the encoder does not learn: in the second, z_q is detached."),
        ("codes + beta * commit", "codes", "The commitment is missing: the encoder may run away from the codes."),
        ("codes + beta * commit", "beta * commit", "The term that moves the codes is missing: they would never learn."),
        ("(z.detach() - z_q)", "(z - z_q)", "In the first term z is not detached: it is to move the codes only."),
        ("(z - z_q.detach())", "(z - z_q)", "In the second term z_q is not detached: it is to move the encoder only."),
        ("", "return (z.detach() - z_q).norm() + beta * (z - z_q.detach()).norm()",
         "You took the lengths of the differences, with a root: the means of the squares."),
        ("codes + beta * commit", "codes - beta * commit", "The commitment is subtracted: both are added."),
        ("(z - z_q.detach()).square().mean()", "(z - z_q.detach()).square().sum()",
         "The commitment is summed: both are means."),
        ("(z.detach() - z_q).square().mean()", "(z.detach() - z_q).square().sum()",
         "The first term is summed: both are means."),
        ("", "return (1 + beta) * (z - z_q).square().mean()",
         "Nothing is detached: the value is right, but each term is to move one side only."),
        ("", "return ((1 + beta) * (z - z_q).square().mean()).detach()",
         "No gradient flows: the value alone teaches nothing."),
        ("", "return (z.detach() - z_q).square().sum() + beta * (z - z_q.detach()).square().sum()",
         "Both terms are summed: they are means."),
        ("", "return (z.detach() - z_q).abs().mean() + beta * (z - z_q.detach()).abs().mean()",
         "You took absolute differences: squares."),
    ],
    gradients=("z", "z_q"),
    swap=_put_vq_loss,
)  # fmt: skip
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


@exercise(
    difficulty=1,
    minutes=5,
    cases=lambda: {
        "four latents": {
            "latents": torch.tensor([1.0, 3, 6, 9]).view(4, 1, 1, 1) * torch.randn(4, 4, 3, 5)
            + torch.tensor([-3.0, 0, 1, 3]).view(1, 4, 1, 1)
        },
        "one latent, a mean far from 0": {"latents": 0.3 * torch.randn(1, 4, 8, 8) + 2},
        "square latents": {"latents": 2.0 * torch.randn(4, 4, 4, 4)},
    },
    hints=("latents · scale_factor is to have the standard deviation 1.",
           "One number for all channels: `.std()` of everything."),
    mistakes=[
        ("1 / latents.std()", "latents.std()",
         "You returned the standard deviation: the factor is 1 / std, since the latents are multiplied by it."),
        ("latents.std()", "latents.var()", "You divided by the variance: by its root."),
        ("latents.std()", "latents.abs().max()", "You scaled to a maximum of 1: to a standard deviation of 1."),
        ("latents.std()", "latents.abs().mean()", "You took the mean absolute value: the standard deviation."),
        ("latents.std()", "latents.mean(dim=(2, 3)).std()",
         "You took the deviation of the means: that of all values."),
        ("latents.std()", "latents.norm()",
         "You divided by the norm, which grows with the number of values: by the standard deviation."),
        ("latents.std()", "latents.square().mean().sqrt()",
         "The mean is not subtracted: this is the root mean square, not the standard deviation."),
        ("latents.std()", "latents.mean()", "You divided by the mean: by the standard deviation."),
        ("latents.std()", "latents.std(dim=(0, 2, 3))", "There is a factor for each channel: one for all."),
        ("latents.std()", "latents.std(dim=0).mean()",
         "You took the standard deviation over the batch at each place, and averaged: take that of all values"
         " together."),
        ("latents.std()", "latents.flatten(1).std(dim=1).mean()",
         "You averaged the standard deviations of the pictures: take that of all values together."),
        ("1 / latents.std()", "(1 / latents.flatten(1).std(dim=1)).mean()",
         "You averaged the factors of the pictures: one standard deviation, of all values together."),
        ("1 / latents.std()", "(1 / latents.std(dim=(0, 2, 3))).mean()",
         "You averaged the factors of the channels: one standard deviation, of all values together."),
        ("1 / latents.std()", "torch.tensor(0.18215)",
         "0.18215 was measured on Stable Diffusion's own latents: measure these."),
        ("latents.std()", "latents.var(dim=(0, 2, 3)).mean().sqrt()",
         "You took the variance within each channel: that of all values together."),
        ("latents.std()", "latents.flatten(1).std(dim=1)",
         "There is a factor for each picture: one for all."),
        ("1 / latents.std()", "latents / latents.std()",
         "You returned the scaled latents: the factor alone is wanted."),
    ],
    tolerance=8e-3,
    swap=lambda f: [(training_vae, "measure_scale_factor", lambda vae, data,
                     engine: float(f(training_vae.encode_all(vae, data, engine).chunk(2, dim=1)[0])))],
)  # fmt: skip
def scale_factor(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """What latents are multiplied by to have a standard deviation of 1 (0.18215 in Stable Diffusion).

    One number for all, measured over pictures, channels and pixels together.
    (Rombach et al. 2022, appendix G; CompVis: LatentDiffusion.on_train_batch_start)
    """
    # BEGIN SOLUTION
    return 1 / latents.std()
    # END SOLUTION


@exercise(
    difficulty=2,
    minutes=10,
    cases=lambda: {
        "4 x 6 pixels": {"x": torch.randn(2, 3, 4, 6), "conv": nn.Conv2d(3, 3, 3, stride=2)},
        "one picture": {"x": torch.randn(1, 2, 8, 4), "conv": nn.Conv2d(2, 2, 3, stride=2)},
        "a square": {"x": torch.randn(2, 3, 6, 6), "conv": nn.Conv2d(3, 3, 3, stride=2)},
        "odd sizes": {"x": torch.randn(1, 3, 5, 7), "conv": nn.Conv2d(3, 3, 3, stride=2)},
    },
    hints=(
        "F.pad counts from the last axis: (left, right, above, below).",
        "One column on the right, one row below: (0, 1, 0, 1).",
    ),
    mistakes=[
        ("(0, 1, 0, 1)", "(1, 1, 1, 1)",
         "You padded on all sides, as the UNet does: the VAE pads right and below only."),
        ("conv(F.pad(x, (0, 1, 0, 1)))", "x[:, :, ::2, ::2]",
         "You took every other pixel: `conv` makes it smaller, after the padding."),
        ("F.pad(x, (0, 1, 0, 1))", "F.pad(F.max_pool2d(x, 2), (0, 1, 0, 1))",
         "There is a pooling before the convolution, which halves the size itself."),
        ("(0, 1, 0, 1)", "(0, 2, 0, 2)", "You padded two columns and rows: one of each."),
        ("(0, 1, 0, 1)", "(1, 0, 1, 0)",
         "You padded left and above: the VAE pads right and below. Trained weights see everything shifted by a pixel."),
        ("conv(F.pad(x, (0, 1, 0, 1)))", "conv(x)", "The padding is missing: the map loses a row and a column."),
        ("F.pad(x, (0, 1, 0, 1))", 'F.pad(x, (0, 1, 0, 1), mode="replicate")',
         "You repeated the edge: it is padded with zeros."),
        ("F.pad(x, (0, 1, 0, 1))", 'F.pad(x, (0, 1, 0, 1), mode="reflect")',
         "You mirrored at the edge: it is padded with zeros."),
        ("(0, 1, 0, 1)", "(0, 1, 1, 0)", "You padded right and above: right and below."),
        ("(0, 1, 0, 1)", "(1, 0, 0, 1)", "You padded left and below: right and below."),
        ("(0, 1, 0, 1)", "(0, 0, 1, 1)", "You padded above and below: F.pad counts left, right, above, below."),
        ("(0, 1, 0, 1)", "(1, 1, 0, 0)", "You padded left and right: right and below."),
        ("(0, 1, 0, 1)", "(0, 1)", "You padded the columns only: a row below, too."),
        ("conv(F.pad(x, (0, 1, 0, 1)))", "F.avg_pool2d(x, 2)",
         "You averaged squares: the convolution `conv` makes it smaller."),
        ("F.pad(x, (0, 1, 0, 1))", "F.pad(x, (0, 1, 0, 1), value=1.0)", "You padded with ones: with zeros."),
        ("return conv(F.pad(x, (0, 1, 0, 1)))", "return F.pad(conv(x), (0, 1, 0, 1))",
         "You padded what comes out of the convolution: what goes in is padded."),
        ("(0, 1, 0, 1)", "(0, 0, 0, 1)",
         "You padded the rows only: a column on the right, too."),
    ],
    swap=lambda f: [(Downsample, "forward", lambda self, x: f(x, self.conv))],
)  # fmt: skip
def vae_downsample(x: Float[Tensor, "b c h w"], conv: Layer) -> Float[Tensor, "b c h2 w2"]:
    """Half the size, as in the VAE: one column of zeros on the right and one row of them below, then `conv`.

    conv is 3x3, with a stride of 2 and without a padding of its own.
    (CompVis: ldm/modules/diffusionmodules/model.py, Downsample)
    """
    # BEGIN SOLUTION
    return conv(F.pad(x, (0, 1, 0, 1)))
    # END SOLUTION
