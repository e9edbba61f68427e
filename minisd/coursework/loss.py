"""Exercises of stage 2: from "which noise is in it?" to a number that can be trained on."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: F401  for mistakes that name it
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .. import loss
from ..loss import LOSSES
from ..noising import NoiseSchedule
from ..training import unet as training_unet
from .exercise import exercise
from .noising import NOT_RESHAPED, alphas_cumprod_of, of_t, pictures


class ToyUNet(nn.Module):
    """A model with weights to learn, which hears x, t and context."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return torch.tanh(self.conv(x)) + 0.1 * t.view(-1, 1, 1, 1) + context.mean(dim=(1, 2)).view(-1, 1, 1, 1)


def _loss_case(t: list[int], T: int, h: int = 4, w: int = 5) -> dict:
    b = len(t)
    return {
        "model": ToyUNet(), "x_0": pictures(b, h, w), "context": torch.randn(b, 3, 6), "t": torch.tensor(t),
        "noise": pictures(b, h, w), "alphas_cumprod": alphas_cumprod_of(T),
    }  # fmt: skip


def _put_epsilon_loss(f):
    real = LOSSES["eps"]

    def epsilon_loss(model, schedule, x_0, context=None, t=None, noise=None, min_snr_gamma=None):
        if min_snr_gamma is not None:
            return real(model, schedule, x_0, context, t, noise, min_snr_gamma)
        if t is None:
            t = torch.randint(0, schedule.timesteps, (len(x_0),), device=x_0.device)
        noise = torch.randn_like(x_0) if noise is None else noise
        return f(model, x_0, context, t, noise, schedule.alphas_cumprod.to(x_0.device))

    return [(LOSSES, "eps", epsilon_loss), (loss, "epsilon_loss", epsilon_loss)]


@exercise(
    difficulty=2,
    minutes=15,
    cases=lambda: {
        "three pictures": _loss_case([3, 8, 5], 12),
        "one picture": _loss_case([6], 12, 3, 4),
        "square pictures": _loss_case([1, 9], 10, 3, 3),
        "as many pictures as columns": _loss_case([2, 7, 9, 4], 12, 3, 4),
    },
    hints=(
        "Three lines: x_t from x_0, t and noise; the model's answer; the mean of the squared differences.",
        "The target is the noise that went in.",
        "One mean over everything: batch, channels and pixels.",
    ),
    mistakes=[
        NOT_RESHAPED,
        ("return (noise - prediction)", "return (x_0 - prediction)",
         "Your target is x_0: this model is asked for the noise that went in."),
        ("return (noise - prediction)", "return (x_t - prediction)",
         "Your target is x_t: the model is asked for the noise that is in it."),
        ("return (noise - prediction)", "return (alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0 - prediction)",
         "Your target is the velocity v: this model is asked for the noise."),
        ("return (noise - prediction)", "return (x_t - x_0 - prediction)",
         "Your target is x_t - x_0. That is not the noise that went in: x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε. The target is"
         " ε itself."),
        ("return (noise - prediction)", "return ((1 - alpha_bar).sqrt() * noise - prediction)",
         "Your target is the noise times √(1-ᾱ_t): the model is asked for ε itself, of variance 1 at each t."),
        ("return (noise - prediction)",
         "return (x_0 - (x_t - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt())",
         "You compare pictures, x_0 and the one that follows from the prediction: that weights each t by 1 / SNR."
         " Compare the noise."),
        ("model(x_t, t, context)", "model(x_t, t / len(alphas_cumprod), context)",
         "The model is told t / T: it is told t itself, an integer."),
        ("return (noise - prediction).square().mean()", "return prediction",
         "You returned the prediction: the loss compares it with the noise."),
        ("model(x_t, t, context)", "model(x_t, t / 1000, context)", "The model is told t / 1000: it is told t itself."),
        ("return (noise - prediction).square().mean()", "return F.smooth_l1_loss(prediction, noise)",
         "This is the Huber loss (smooth L1): the loss is the mean of the squares."),
        (".square().mean()", ".square().sum()",
         "You took the sum: the loss is a mean, which does not change with the size of batch and picture."),
        (".square().mean()", ".square().flatten(1).sum(1).mean()",
         "You summed over each picture and took the mean over the batch only: it is a mean over everything."),
        (".square().mean()", ".abs().mean()",
         "You took absolute differences (L1): the loss is the mean of the squares."),
        (".square().mean()", ".mean()", "The square is missing: positive and negative errors cancel."),
        (".square().mean()", ".square().mean().sqrt()",
         "You took a root at the end: it is the mean of the squares, not its root."),
        (".square().mean()", ".mean().square()",
         "First the square, then the mean; in yours errors of different signs cancel."),
        (".square().mean()", ".flatten(1).norm(dim=1).mean()",
         "You took the length of each picture's error, with a root: it is the mean of the squares."),
        ("return (noise - prediction).square().mean()", "return 1 - F.cosine_similarity(noise, prediction).mean()",
         "You compared directions (cosine similarity): it is the mean of the squared differences."),
        ("model(x_t, t, context)", "model(x_t, context, t)",
         "The model is called as model(x_t, t, context): t and the context are exchanged."),
        (".square().mean()", ".square().mean() / 2", "The ½ does not belong to it."),
        (".square().mean()", ".square().mean(dim=(1, 2, 3))",
         "There is a loss for each picture: at the end, take the mean over the batch too."),
        ("model(x_t, t, context)", "model(x_0, t, context)",
         "You showed the model the clean x_0: there is no noise to be seen in it. It is given x_t."),
        ("model(x_t, t, context)", "model(x_t, torch.zeros_like(t), context)", "The model was not told the time t."),
        ("model(x_t, t, context)", "model(x_t, t, torch.zeros_like(context))", "The model was not told the context."),
        ("model(x_t, t, context)", "model(noise, t, context)",
         "You showed the model the noise itself: it is given x_t, the mixture."),
        ("alpha_bar.sqrt() * x_0 +", "alpha_bar * x_0 +", "In x_t, x_0 is multiplied by ᾱ_t: the root is missing."),
        ("(1 - alpha_bar).sqrt() * noise", "(1 - alpha_bar) * noise",
         "In x_t, the noise is multiplied by 1-ᾱ_t: the root is missing."),
        ("(1 - alpha_bar).sqrt() * noise", "noise",
         "In x_t the noise comes in at full strength: its factor √(1-ᾱ_t) is missing."),
        ("alpha_bar.sqrt() * x_0 +", "x_0 +", "In x_t, x_0 is not shrunk by √ᾱ_t."),
        ("alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise",
         "(1 - alpha_bar).sqrt() * x_0 + alpha_bar.sqrt() * noise",
         "In x_t the factors of picture and noise are exchanged."),
        ("prediction = model(x_t, t, context)", "prediction = model(x_t, t, context).detach()",
         "The prediction is detached: the value is right, but no gradient reaches the model, and nothing is learned."),
        ("[t]", "[t[:1]]", "In x_t the first timestep is used for the whole batch, but each picture has its own t."),
        (".square().mean()", ".square().mean() * (1 - alpha_bar).mean()",
         "The loss is weighted by 1-ᾱ_t: L_simple has no weights."),
        ("return (noise - prediction).square().mean()",
         "return (alpha_bar / (1 - alpha_bar) * (noise - prediction).square()).mean()",
         "Each picture's loss is weighted by the signal-to-noise ratio: L_simple drops the weights of the bound."),
    ],
    gradients=("model",),
    swap=_put_epsilon_loss,
)  # fmt: skip
def epsilon_loss(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_0: Float[Tensor, "b c h w"],
    context: Float[Tensor, "b n d"],
    t: Int[Tensor, "b"],
    noise: Float[Tensor, "b c h w"],
    alphas_cumprod: Float[Tensor, "T"],
) -> Float[Tensor, ""]:
    """The training loss of Stable Diffusion: the mean squared error of the predicted noise.

        L_simple = E ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t, c)‖²              (DDPM, eq. 14)

    model(x_t, t, context) predicts the noise. Returns one number, the mean over everything, from which gradients flow
    back to the model.
    """
    # BEGIN SOLUTION
    alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    prediction = model(x_t, t, context)
    return (noise - prediction).square().mean()
    # END SOLUTION


def _dropout_case(drop: list[bool], n: int, d: int) -> dict:
    return {"context": torch.randn(len(drop), n, d), "empty_context": torch.randn(1, n, d), "drop": torch.tensor(drop)}


@exercise(
    difficulty=1,
    minutes=10,
    cases=lambda: {
        "three captions, one dropped": _dropout_case([False, True, False], 5, 6),
        "one caption, kept": _dropout_case([False], 4, 6),
        "as many captions as tokens": _dropout_case([True, False, False, True], 4, 4),
        "all dropped": _dropout_case([True, True], 3, 5),
    },
    hints=(
        "torch.where(condition, a, b) takes a where the condition holds.",
        "`drop` has the shape [b], the context [b n d]: `drop[:, None, None]`.",
    ),
    mistakes=[
        ("drop[:, None, None], empty_context, context", "drop[:, None, None], context, empty_context",
         "The mask is the wrong way round: where `drop` is set, the empty context comes in."),
        ("drop[:, None, None], empty_context, context", "drop[:, None, None], torch.zeros_like(context), context",
         "You put zeros in: the empty prompt has a context of its own, and that is what the model sees when it"
         " draws without a prompt."),
        ("drop[:, None, None]", "drop[None, :, None]",
         "`drop` runs along the tokens: it says something about whole captions, [b 1 1]."),
        ("drop[:, None, None]", "drop[None, None, :]",
         "`drop` falls on the last axis, the channels: it says something about whole captions, so reshape it to [b"
         " 1 1]. (With as many captions as channels there is no error.)"),
        ("drop[:, None, None]", "drop.any()", "One dropped caption drops them all: each is decided for itself."),
        ("drop[:, None, None]", "drop.all()", "You look whether all are dropped: each caption is decided for itself."),
        ("return torch.where(drop[:, None, None], empty_context, context)", "return context",
         "Nothing is dropped: `drop` is not used."),
        ("return torch.where(drop[:, None, None], empty_context, context)",
         "out = context.clone()\nout[drop.int().argmax()] = torch.where(drop.any(), empty_context[0], context[0])"
         "\nreturn out",
         "Only the first of the dropped captions is replaced: is there a `break`, or a `return`, in the loop?"),
        ("return torch.where(drop[:, None, None], empty_context, context)",
         "out = context.clone()\nout[drop] = empty_context[drop]\nreturn out",
         "There is one empty context for all, [1 n d], so that it can't be indexed by `drop`: out[drop] ="
         " empty_context."),
        ("return torch.where(drop[:, None, None], empty_context, context)", "return context[~drop]",
         "You threw the dropped captions away: their pictures stay in the batch, and need a context, the empty one."),
        ("return torch.where(drop[:, None, None], empty_context, context)",
         "return torch.where(drop[:, None, None], context + empty_context, context)",
         "You added the empty context; it takes the place of the caption's."),
        ("return torch.where(drop[:, None, None], empty_context, context)",
         "return torch.where(drop[:, None, None], context.mean(dim=0, keepdim=True), context)",
         "You put the mean of all contexts in: the empty prompt's belongs there."),
        ("return torch.where(drop[:, None, None], empty_context, context)",
         "return torch.where(drop[:, None, None] & (torch.arange(context.shape[1]) == 0)[None, :, None],"
         " empty_context, context)",
         "Only the first token is replaced: the whole sequence is."),
        ("return torch.where(drop[:, None, None], empty_context, context)", "return F.dropout(context, 0.1)",
         "This is the dropout of single numbers. Here whole captions are forgotten, those which `drop` names."),
        ("empty_context, context)", "empty_context, context / (1 - 0.1))",
         "The captions that stay are scaled up, as in nn.Dropout: here they stay as they are. It is a choice, not a"
         " layer."),
    ],
    swap=lambda f: [(module, "text_dropout", f) for module in (loss, training_unet)],
)  # fmt: skip
def text_dropout(
    context: Float[Tensor, "b n d"], empty_context: Float[Tensor, "1 n d"], drop: Bool[Tensor, "b"]
) -> Float[Tensor, "b n d"]:
    """Forget some captions: where `drop` is set, the context of the empty prompt takes the place of the caption's.

    The network so learns to draw without a prompt, too, as guidance needs. (Ho & Salimans 2022, algorithm 1)
    """
    # BEGIN SOLUTION
    return torch.where(drop[:, None, None], empty_context, context)
    # END SOLUTION


def _put_min_snr(f):
    real = loss.min_snr_weight
    return [(loss, "min_snr_weight", lambda snr, gamma=5.0,
             kind="eps": f(snr, gamma) if kind == "eps" else real(snr, gamma, kind))]


@exercise(
    difficulty=2,
    minutes=10,
    cases=lambda: {
        "gamma 5": {"snr": torch.tensor([1000.0, 20.0, 5.0, 1.0, 0.01]), "gamma": 5.0},
        "gamma 1": {"snr": torch.tensor([3.0, 0.5, 7.0, 0.2]), "gamma": 1.0},
        "one time": {"snr": torch.tensor([40.0]), "gamma": 2.0},
    },
    hints=(
        "Where there is little signal, the weight is 1; where there is much, γ / SNR.",
        "`.clamp(max=gamma)` is the smaller of the two.",
    ),
    mistakes=[
        ("clamp(max=gamma)", "clamp(min=gamma)",
         "You took the larger of SNR and γ: the smaller. Easy times, with a large SNR, are to count less."),
        (" / snr", "",
         "You returned min(SNR, γ), the weight of an error in x_0. An error in ε is an error in x_0 times √SNR:"
         " divide by SNR."),
        (" / snr", " / (snr + 1)", "SNR + 1 is the divisor for a model that predicts v; for ε it is SNR."),
        ("snr.clamp(max=gamma) / snr", "snr / snr.clamp(max=gamma)",
         "The quotient is the wrong way round: the weights are at most 1."),
        ("snr.clamp(max=gamma) / snr", "gamma / snr",
         "The minimum is missing: where SNR is less than γ, the weight is 1, not γ / SNR."),
        (" / snr", " / gamma", "You divided by γ; divide by SNR."),
        ("snr.clamp(max=gamma) / snr", "(snr.clamp(max=gamma) / snr).sqrt()",
         "You took a root: the weight multiplies squared errors."),
        ("snr.clamp(max=gamma) / snr", "(snr.log().clamp(max=gamma)) / snr",
         "You clamped log SNR: it is SNR itself that is compared with γ."),
        ("clamp(max=gamma)", "clamp(max=5.0)", "You wrote down γ = 5: it comes with the argument."),
        ("snr.clamp(max=gamma) / snr", "torch.ones_like(snr)",
         "Every time counts the same in yours: that is L_simple without weights."),
        ("snr.clamp(max=gamma)", "snr.min().clamp(max=gamma)",
         "You took the minimum over the batch: the smaller of SNR and γ, for each sample."),
        ("snr.clamp(max=gamma) / snr", "gamma / (gamma + snr)",
         "γ / (γ + SNR) goes smoothly from 1 to 0: here it is min(SNR, γ) / SNR, which is 1 up to γ."),
        ("snr.clamp(max=gamma) / snr", "(1 / snr).clamp(max=gamma)",
         "You compared 1/SNR with γ: it is min(SNR, γ), and then divided by SNR."),
        ("snr.clamp(max=gamma) / snr", "(snr > gamma).float()",
         "You made a mask of it: times with a large SNR count less, by γ / SNR, and others fully."),
        ("snr.clamp(max=gamma) / snr", "(snr <= gamma).float()",
         "You left out the times with a large SNR: they count less, by γ / SNR, but they count."),
        ("snr.clamp(max=gamma) / snr", "(lambda w: w / w.mean())(snr.clamp(max=gamma) / snr)",
         "You normalised the weights to a mean of 1: they stay as they are."),
    ],
    swap=_put_min_snr,
)  # fmt: skip
def min_snr_weight(snr: Float[Tensor, "b"], gamma: float) -> Float[Tensor, "b"]:
    """How much each sample's squared error of ε counts: min(SNR, γ) / SNR.

    Nearly clean pictures, where SNR is large, are easy, and would drown the others. (Hang et al. 2023, section 3.4)
    """
    # BEGIN SOLUTION
    return snr.clamp(max=gamma) / snr
    # END SOLUTION


@exercise(
    difficulty=3,
    minutes=15,
    cases=lambda: {
        "three points": {"x_t": torch.randn(3, 6), "t": torch.tensor([3, 8, 5]), "v": torch.randn(3, 6),
                         "alphas_cumprod": alphas_cumprod_of(12)},
        "one point": {"x_t": torch.randn(1, 4), "t": torch.tensor([6]), "v": torch.randn(1, 4),
                      "alphas_cumprod": alphas_cumprod_of(12)},
        "as many points as coordinates": {"x_t": torch.randn(4, 4), "t": torch.tensor([1, 9, 4, 6]),
                                          "v": torch.randn(4, 4), "alphas_cumprod": alphas_cumprod_of(11)},
    },
    hints=(
        "x_t = √ᾱ x_0 + √(1-ᾱ) ε and v = √ᾱ ε - √(1-ᾱ) x_0: get rid of x_0.",
        "Multiply the first by √(1-ᾱ) and the second by √ᾱ, and add: ε = √(1-ᾱ_t) x_t + √ᾱ_t v.",
    ),
    mistakes=[
        ("[:, None]", "",
         "The coefficients have the shape [b], and [b] times [b d] multiplies coordinates, not points: make them [b"
         " 1]."),
        ("x_t + alpha", "x_t - alpha", "A minus for a plus: put x_t and v in, and see which sign makes x_0 fall out."),
        ("(1 - alpha_bar).sqrt() * x_t + alpha_bar.sqrt() * v", "alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v",
         "This is x_0: wanted is the noise."),
        ("(1 - alpha_bar).sqrt() * x_t + alpha_bar.sqrt() * v", "alpha_bar.sqrt() * x_t + (1 - alpha_bar).sqrt() * v",
         "The two factors are exchanged."),
        ("(1 - alpha_bar).sqrt() * x_t", "(1 - alpha_bar) * x_t", "x_t is multiplied by 1-ᾱ_t: the root is missing."),
        ("alpha_bar.sqrt() * v", "alpha_bar * v", "v is multiplied by ᾱ_t: the root is missing."),
        ("(1 - alpha_bar).sqrt() * x_t + ", "", "The part of x_t is missing: √(1-ᾱ_t) x_t."),
        ("alpha_bar.sqrt() * v", "v", "The factor √ᾱ_t of v is missing."),
        ("(1 - alpha_bar).sqrt() * x_t + alpha_bar.sqrt() * v",
         "(x_t - alpha_bar.sqrt() * v) / (1 - alpha_bar).sqrt()",
         "You took v for x_0: this is how ε follows from x_0."),
        ("[t]", "[(t - 1).clamp(min=0)]", "Your coefficients are those of t-1."),
        ("[t]", "[t[:1]]", "You use the first timestep for the whole batch, but each point has its own t."),
    ],
    linear=("x_t", "v"),
    quantities=of_t,
    swap=lambda f: [
        (NoiseSchedule, "predict_noise_from_v",
         lambda self, x_t, t, v: f(x_t.flatten(1), t, v.flatten(1),
                                   self.alphas_cumprod.to(x_t.device)).to(x_t).view_as(x_t)),
    ],
)  # fmt: skip
def predict_noise_from_v(
    x_t: Float[Tensor, "b d"], t: Int[Tensor, "b"], v: Float[Tensor, "b d"], alphas_cumprod: Float[Tensor, "T"]
) -> Float[Tensor, "b d"]:
    """The noise in x_t, from the velocity v: samplers ask for ε, even of a model that predicts v.

    v = √ᾱ_t ε - √(1-ᾱ_t) x_0. Here x_t holds points, such as those of a 2-D toy. (Salimans & Ho 2022, appendix D)
    """
    # BEGIN SOLUTION
    alpha_bar = alphas_cumprod[t][:, None]
    return (1 - alpha_bar).sqrt() * x_t + alpha_bar.sqrt() * v
    # END SOLUTION


@exercise(
    difficulty=2,
    minutes=10,
    cases=lambda: {
        "eight losses of four bins": {"losses": torch.rand(8), "t": torch.tensor([0, 3, 5, 11, 7, 8, 2, 10]), "T": 12,
                                      "bins": 4},
        "all bins hit": {"losses": torch.rand(6), "t": torch.tensor([0, 9, 4, 5, 1, 6]), "T": 10, "bins": 2},
        "one bin": {"losses": torch.rand(5), "t": torch.tensor([0, 3, 7, 1, 2]), "T": 8, "bins": 1},
        "nearly all are early, none at the ends": {
            "losses": torch.rand(9), "t": torch.tensor([2, 1, 3, 1, 2, 1, 5, 7, 8]), "T": 12, "bins": 3,
        },
        "bins that T does not divide": {"losses": torch.rand(7), "t": torch.tensor([6, 0, 3, 4, 5, 2, 1]), "T": 7,
                                        "bins": 2},
    },
    hints=(
        "Which bin does a t belong to? t * bins // T.",
        "`torch.bincount(bin, weights=losses, minlength=bins)` adds up the losses of each bin.",
        "Divide the sums by the numbers of samples.",
    ),
    mistakes=[
        ("return sums / counts", "return sums",
         "You returned the sums: divide them by the number of samples in each bin."),
        ("return sums / counts", "return sums / len(losses)",
         "You divided by the number of all samples: by that of each bin."),
        ("return sums / counts", "return torch.stack([part.mean() for part in losses[t.argsort()].chunk(bins)])",
         "You sorted the samples and cut them in equal parts: it is the stretches of time that are equally long."),
        ("return sums / counts", "return torch.stack([part.mean() for part in losses.chunk(bins)])",
         "You cut the losses in the order in which they came: their t says which bin they belong to."),
        ("t * bins // T", "(t - t.min()) * bins // (t.max() - t.min() + 1)",
         "Your bins go from the smallest t to the largest that there is: from 0 to T."),
        ("t * bins // T", "t * bins // (t.max() + 1)",
         "Your bins end at the largest t that there is: they go from 0 to T."),
        ("t * bins // T", "((t - t.min()) * bins // (t.max() - t.min()).clamp(min=1)).clamp(max=bins - 1)",
         "Your bins go from the smallest t to the largest that there is, as torch.histc's and linspace's do: from 0 to"
         " T."),
        ("t * bins // T", "(t // (T // bins)).clamp(max=bins - 1)",
         "The width of a bin is T / bins, and you rounded it down: the last bin is then longer than the others."),
        ("t * bins // T", "t % bins",
         "t % bins deals the times out in turn: a bin holds times that lie beside each other."),
        ("t * bins // T", "(t * bins / T).round().long().clamp(max=bins - 1)",
         "You rounded t · bins / T to the nearest: rounded down, or all bins begin half a bin too early."),
        ("return sums / counts",
         "return torch.stack([losses[place == k].median() for k in range(bins)])",
         "You took the median of each bin: the mean."),
        ("t * bins // T\n", "t // (T // bins)\nlosses, place = losses[place < bins], place[place < bins]\n",
         "The width of a bin is T / bins; you rounded it down, and the last times are left out."),
        ("return sums / counts",
         "edges = [k * T / bins for k in range(bins + 1)]\nreturn torch.stack([losses[(t >= a) & (t <= b)].mean()"
         " for a, b"
         " in zip(edges, edges[1:], strict=False)])",
         "A t at the edge counts in both bins: it belongs to the upper one only, a ≤ t < b."),
        ("return sums / counts", "return sums.cumsum(0) / counts.cumsum(0)",
         "Each bin of yours holds the samples before it as well: those of its own stretch only."),
        ("return sums / counts", "return torch.stack([losses[place == k].max() for k in range(bins)])",
         "You took the largest loss of each bin: the mean."),
        ("return sums / counts", "return sums / counts.max()",
         "You divided all by the same number: each by the number of samples in its bin."),
        ("return sums / counts",
         "out = torch.zeros(bins)\nfor loss, k in zip(losses, place, strict=True):\n    out[k] = loss\nreturn out",
         "The last loss of each bin overwrites the others: add them up, and divide by their number."),
        ("t * bins // T", "((t / T * bins).ceil().long() - 1).clamp(min=0)",
         "You rounded up: a t at an edge belongs to the upper bin, so that it is rounded down."),
        ("return sums / counts", "return counts.float()",
         "You returned how many samples there are in each bin, not their mean loss."),
        ("t * bins // T", "t // bins",
         "t // bins is off: the bins are T / bins wide, so that the bin is t * bins // T."),
        ("t * bins // T", "t * (bins - 1) // (T - 1)",
         "The last bin gets the very last t only: from t = 0 ... T-1, the bin is t * bins // T."),
        ("return sums / counts", "return losses.mean().expand(bins)",
         "Every bin has the mean of all: sort the losses by their t first."),
        ("return sums / counts", "return (sums / counts).flip(0)",
         "The bins are the wrong way round: bin 0 holds the smallest t."),
        ("return sums / counts", "return sums / sums.sum()",
         "You made shares of the sums that sum to 1; wanted is the mean loss of each bin."),
        ("t * bins // T", "(t // bins).clamp(max=bins - 1)",
         "`t // bins` makes bins that are `bins` timesteps long: there are `bins` of them, each T / bins long."),
    ],
    swap="minisd has no place for it: a training needs the mean over all times, and this is to look at a model with.",
)  # fmt: skip
def loss_by_time(losses: Float[Tensor, "n"], t: Int[Tensor, "n"], T: int, bins: int) -> Float[Tensor, "bins"]:
    """The mean loss in each of `bins` equally long stretches of time: where is the model good, and where not?

    losses: one number a sample, at its timestep t in 0 ... T-1. Bin 0 holds the smallest t. No bin is empty. One looks
    at it because the mean over all times hides that nearly clean pictures are hard and nearly pure noise is easy.
    """
    # BEGIN SOLUTION
    place = t * bins // T
    sums = torch.bincount(place, weights=losses, minlength=bins)
    counts = torch.bincount(place, minlength=bins)
    return sums / counts
    # END SOLUTION
