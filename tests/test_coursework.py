"""The exercises: each is sound, its mistakes are named, other right forms are accepted, minisd draws with it."""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

import minisd
from minisd import coursework
from minisd.coursework import EXERCISES, STAGES, check, draw, judge, mutants, picture, swap, texts
from minisd.coursework.__main__ import main
from minisd.coursework.export import FORMS, export, table
from minisd.coursework.picture import caption
from minisd.coursework.running import cases_of, right_outcomes, same

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks/exercises"

each_exercise = pytest.mark.parametrize("exercise", EXERCISES.values(), ids=lambda exercise: exercise.name)
VARIANTS, UNSEEN = [], []  # right solutions of other forms; mistakes that are in no table


def variant(function):
    VARIANTS.append(function)
    return function


def unseen(function):
    UNSEEN.append(function)
    return function


def exercise_of(function):
    return EXERCISES[re.sub(r"_(variant|mistake)_\d+$", "", function.__name__)]


# --- the exercises ----------------------------------------------------------------------------------------------------


def test_there_are_exercises_on_every_stage():
    assert len(EXERCISES) >= 30
    assert list(dict.fromkeys(e.stage for e in EXERCISES.values())) == list(STAGES)
    assert all(len([e for e in EXERCISES.values() if e.stage == stage]) >= 4 for stage in STAGES)


@each_exercise
def test_a_stub_says_what_is_asked_and_not_how(exercise):
    assert exercise.stub.startswith(f"def {exercise.name}(")
    assert exercise.solution not in exercise.stub and "SOLUTION" not in exercise.stub
    assert all(f"{argument}: " in exercise.stub for argument in exercise.arguments), "each argument has a type"
    assert " -> " in exercise.head and len(exercise.task) > 40
    assert 1 <= exercise.difficulty <= 5 and 5 <= exercise.minutes <= 30 and exercise.hints
    assert "written yet" in judge(exercise, _compiled(exercise.stub, exercise)).message


@each_exercise
def test_the_solution_is_right(exercise):
    assert judge(exercise, _compiled(exercise.answer, exercise)).right
    assert judge(exercise, exercise.reference).right
    start = time.perf_counter()
    assert judge(exercise, exercise.reference).right
    assert time.perf_counter() - start < 1  # 0.2 s on a machine that does nothing else


@each_exercise
def test_each_known_mistake_is_named(exercise):
    assert len(exercise.mistakes) >= 8
    assert len({mistake.sentence for mistake in exercise.mistakes}) == len(exercise.mistakes)
    for mistake in exercise.mistakes:
        solution = mistake.edit(exercise.solution)
        assert solution is not None, f"{mistake.old!r} must occur exactly once in the solution"
        verdict = judge(exercise, exercise.compile(solution))
        assert not verdict.right, f"accepted: {mistake.sentence}"
        assert verdict.mistake.startswith(mistake.sentence), f"{mistake.sentence!r} was called {verdict.mistake!r}"


@each_exercise
def test_the_cases_are_the_same_each_time(exercise):
    assert len(cases_of(exercise)) >= 2
    again = cases_of.__wrapped__(exercise)
    for label, args in cases_of(exercise).items():
        assert list(args) == list(exercise.arguments), label
        for name, value in args.items():
            if isinstance(value, torch.Tensor):
                assert same(again[label][name], value, 0)


def _compiled(source, exercise):
    namespace = dict(vars(sys.modules[exercise.reference.__module__]))
    exec(source, namespace)
    return namespace[exercise.name]


# --- minisd's own functions are right solutions -----------------------------------------------------------------------


def _schedule(betas):
    return minisd.NoiseSchedule(betas)


def _of_alphas(alphas_cumprod):
    before = torch.cat([torch.ones(1), alphas_cumprod[:-1]]).double()
    return minisd.NoiseSchedule(1 - alphas_cumprod.double() / before)


OURS = {
    "scaled_linear_betas": lambda start, end, T: minisd.NoiseSchedule.scaled_linear(start, end, T).betas,
    "alphas_cumprod": lambda betas: _schedule(betas).alphas_cumprod,
    "q_sample": lambda x_0, t, noise, bar: _of_alphas(bar).q_sample(x_0, t, noise),
    "predict_start_from_noise": lambda x_t, t, noise, bar: _of_alphas(bar).predict_start_from_noise(x_t, t, noise),
    "get_v": lambda x_0, noise, t, bar: _of_alphas(bar).get_v(x_0, noise, t),
    "predict_start_from_v": lambda x_t, t, v, bar: _of_alphas(bar).predict_start_from_v(x_t, t, v),
    "predict_noise_from_v": lambda x_t, t, v, bar: _of_alphas(bar).predict_noise_from_v(x_t, t, v),
    "snr": lambda t, bar: _of_alphas(bar).snr(t),
    "q_posterior_mean": lambda x_0, x_t, t, betas: _schedule(betas).q_posterior(x_0, x_t, t)[0],
    "q_posterior_variance": lambda t, betas: _schedule(betas).q_posterior(t * 1.0, t * 1.0, t)[1],
    "exact_x0": lambda x, t, data, bar: minisd.ExactDenoiser(data, _of_alphas(bar)).x0(x, t),
    "epsilon_loss": lambda model, x_0, context, t, noise, bar: minisd.epsilon_loss(
        model, _of_alphas(bar), x_0, context, t, noise
    ),
    "text_dropout": minisd.text_dropout,
    "min_snr_weight": minisd.loss.min_snr_weight,
    "timestep_embedding": minisd.unet.timestep_embedding,
    "attention": minisd.attention.attention,
    "kl": lambda mean, logvar: minisd.DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1)).kl(),
    "contrastive_loss": lambda image, text, scale: minisd.clip.contrastive_loss(
        scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    ),
    "leading_timesteps": minisd.sampling.make_timesteps,
    "plms_combine": lambda old: sum(
        w * e for w, e in zip(minisd.sampling.ADAMS_BASHFORTH.get(len(old), (1,)), old, strict=True)
    ),
    "guided_eps": lambda model, x, t, context, uncond, scale: (
        minisd.classifier_free_guidance(model, context, uncond, scale)(x, t).eps
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_our_own_function_is_right(name):
    assert judge(EXERCISES[name], lambda *args: OURS[name](*args)).right


# --- right solutions of other forms: loops, einsum, other libraries, float64 inside -----------------------------------


@variant
def q_sample_variant_1(x_0, t, noise, alphas_cumprod):
    return torch.stack(
        [
            math.sqrt(float(alphas_cumprod[int(k)])) * x + math.sqrt(1 - float(alphas_cumprod[int(k)])) * n
            for x, k, n in zip(x_0, t, noise, strict=False)
        ]
    )


@variant
def q_sample_variant_2(x_0, t, noise, alphas_cumprod):
    a = alphas_cumprod.double().gather(0, t)
    return (
        torch.einsum("b,bchw->bchw", a.sqrt(), x_0.double())
        + torch.einsum("b,bchw->bchw", (1 - a).sqrt(), noise.double())
    ).float()


@variant
def q_sample_variant_3(x_0, t, noise, alphas_cumprod):
    a = alphas_cumprod.double()[t][:, None, None, None]
    return a**0.5 * x_0 + (1 - a) ** 0.5 * noise


@variant
def q_sample_variant_4(x, timesteps, eps, abar):
    a = torch.from_numpy(np.sqrt(abar.numpy()))[timesteps].view(-1, 1, 1, 1)
    b = torch.sqrt(1 - a * a)
    return torch.add(a * x, b * eps)


@variant
def scaled_linear_betas_variant_1(beta_start, beta_end, timesteps):
    return torch.from_numpy(np.linspace(beta_start**0.5, beta_end**0.5, timesteps) ** 2)


@variant
def scaled_linear_betas_variant_2(beta_start, beta_end, timesteps):
    return torch.tensor(
        [(beta_start**0.5 + (beta_end**0.5 - beta_start**0.5) * i / (timesteps - 1)) ** 2 for i in range(timesteps)]
    )


@variant
def alphas_cumprod_variant_1(betas):
    out = []
    p = 1.0
    for b in betas:
        p = p * (1 - b)
        out.append(p)
    return torch.stack(out)


@variant
def alphas_cumprod_variant_2(betas):
    return torch.log1p(-betas).cumsum(0).exp()


@variant
def alphas_cumprod_variant_3(betas):
    return torch.tensor(np.cumprod(1 - betas.numpy()))


@variant
def q_posterior_mean_variant_1(x_0, x_t, t, betas):
    ab = torch.cumprod(1 - betas, 0).double()
    out = torch.empty_like(x_0)
    for i, ti in enumerate(t.tolist()):
        prev = ab[ti - 1] if ti > 0 else torch.tensor(1.0).double()
        b = betas[ti].double()
        out[i] = (prev.sqrt() * b / (1 - ab[ti]) * x_0[i] + (1 - b).sqrt() * (1 - prev) / (1 - ab[ti]) * x_t[i]).float()
    return out


@variant
def q_posterior_mean_variant_2(x_0, x_t, t, betas):
    al = 1 - betas
    ab = al.cumprod(0)
    abp = F.pad(ab[:-1], (1, 0), value=1.0)
    v = abp.sqrt() * betas / (1 - ab)
    w = al.sqrt() * (1 - abp) / (1 - ab)

    def e(c):
        return c.gather(-1, t).reshape(-1, *((1,) * (x_t.ndim - 1)))

    return e(v) * x_0 + e(w) * x_t


@variant
def q_posterior_variance_variant_1(t, betas):
    ab = torch.cumprod(1 - betas, 0)
    prev = torch.where(t > 0, ab[(t - 1).clamp(min=0)], torch.ones(()))
    return betas[t] * (1 - prev) / (1 - ab[t])


@variant
def exact_x0_variant_1(x, t, data, alphas_cumprod):
    a = alphas_cumprod[t]
    out = []
    for i in range(len(x)):
        d = torch.tensor([float(((x[i] - a[i].sqrt() * y) ** 2).sum()) for y in data])
        w = torch.exp(-d / (2 * (1 - a[i])))
        w = w / w.sum()
        out.append((w[:, None] * data).sum(0))
    return torch.stack(out)


@variant
def exact_x0_variant_2(x, t, data, alphas_cumprod):
    a = alphas_cumprod[t]
    d = (x**2).sum(1, keepdim=True) - 2 * a.sqrt()[:, None] * (x @ data.T) + a[:, None] * (data**2).sum(1)[None]
    return torch.softmax(-d / (2 * (1 - a))[:, None], 1) @ data


@variant
def epsilon_loss_variant_1(model, x_0, context, t, noise, alphas_cumprod):
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    return F.mse_loss(model(a.sqrt() * x_0 + (1 - a).sqrt() * noise, t, context), noise)


@variant
def text_dropout_variant_1(context, empty_context, drop):
    m = drop.float().view(-1, 1, 1)
    return m * empty_context + (1 - m) * context


@variant
def text_dropout_variant_2(context, empty_context, drop):
    c = context.clone()
    c[drop] = empty_context
    return c


@variant
def min_snr_weight_variant_1(snr, gamma):
    return torch.minimum(torch.ones_like(snr), gamma / snr)


@variant
def timestep_embedding_variant_1(timesteps, dim, max_period):
    h = dim // 2
    return torch.tensor(
        [
            [math.cos(int(t) * max_period ** (-i / h)) for i in range(h)]
            + [math.sin(int(t) * max_period ** (-i / h)) for i in range(h)]
            for t in timesteps
        ]
    )


@variant
def timestep_embedding_variant_2(timesteps, dim, max_period):
    h = dim // 2
    f = max_period ** (-torch.arange(h, dtype=torch.float64) / h)
    a = torch.outer(timesteps.double(), f)
    return torch.hstack((a.cos(), a.sin())).float()


@variant
def attention_variant_1(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@variant
def attention_variant_2(q, k, v):
    s = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.size(-1))
    e = (s - s.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhij,bhjd->bhid", e / e.sum(-1, keepdim=True), v)


@variant
def split_heads_variant_1(x, heads):
    return torch.stack(x.chunk(heads, -1), 1)


@variant
def merge_heads_variant_1(x):
    return torch.cat(x.unbind(1), -1)


@variant
def cross_attention_variant_1(x, context, to_q, to_k, to_v, to_out, heads):
    b, n, _ = x.shape
    m = context.size(1)
    q = to_q(x).view(b, n, heads, -1).transpose(1, 2)
    k = to_k(context).view(b, m, heads, -1).transpose(1, 2)
    v = to_v(context).view(b, m, heads, -1).transpose(1, 2)
    o = F.scaled_dot_product_attention(q, k, v)
    return to_out(o.transpose(1, 2).contiguous().view(b, n, -1))


@variant
def geglu_variant_1(x, proj):
    y = proj(x)
    h = y.shape[-1] // 2
    g = y[..., h:]
    return y[..., :h] * (g * 0.5 * (1 + torch.erf(g / math.sqrt(2))))


@variant
def res_block_variant_1(x, emb, in_layers, emb_layers, out_layers, skip_connection):
    return out_layers(in_layers(x) + rearrange(emb_layers(emb), "b c -> b c 1 1")) + skip_connection(x)


@variant
def group_norm_variant_1(x, groups, weight, bias, eps):
    return F.group_norm(x, groups, weight, bias, eps)


@variant
def upsample_variant_1(x, conv):
    return conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@variant
def unet_forward_variant_1(x, input_blocks, middle_block, output_blocks):
    hs = []
    for b in input_blocks:
        x = b(x)
        hs.append(x)
    x = middle_block(x)
    for b, s in zip(output_blocks, reversed(hs), strict=False):
        x = b(torch.cat((x, s), 1))
    return x


@variant
def sample_posterior_variant_1(moments, noise):
    c = moments.shape[1] // 2
    m, lo = moments[:, :c], torch.clamp(moments[:, c:], -30, 20)
    return m + torch.sqrt(torch.exp(lo)) * noise


@variant
def kl_variant_1(mean, logvar):
    return (
        torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
        )
        .flatten(1)
        .sum(1)
    )


@variant
def kl_variant_2(mean, logvar):
    return -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp(), dim=[1, 2, 3])


@variant
def nearest_code_variant_1(z, codebook):
    return torch.cdist(z, codebook).argmin(-1)


@variant
def nearest_code_variant_2(z, codebook):
    return torch.tensor([min(range(len(codebook)), key=lambda j: float(((v - codebook[j]) ** 2).sum())) for v in z])


@variant
def straight_through_variant_1(z, z_q):
    class ST(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            return b.clone()

        @staticmethod
        def backward(ctx, g):
            return g, None

    return ST.apply(z, z_q)


@variant
def vq_loss_variant_1(z, z_q, beta):
    return F.mse_loss(z_q, z.detach()) + beta * F.mse_loss(z, z_q.detach())


@variant
def causal_mask_variant_1(n):
    m = torch.zeros(n, n)
    for i in range(n):
        m[i, i + 1 :] = float("-inf")
    return m


@variant
def causal_mask_variant_2(n):
    return torch.empty(n, n).fill_(float("-inf")).triu_(1)


@variant
def contrastive_loss_variant_1(image_features, text_features, logit_scale):
    i = image_features / image_features.norm(dim=-1, keepdim=True)
    t = text_features / text_features.norm(dim=-1, keepdim=True)
    lo = torch.einsum("id,jd->ij", i, t) * torch.exp(logit_scale)
    return -(lo.log_softmax(1).diag().mean() + lo.log_softmax(0).diag().mean()) / 2


@variant
def pooled_state_variant_1(hidden, input_ids, end_token):
    return torch.stack([h[ids.tolist().index(end_token)] for h, ids in zip(hidden, input_ids, strict=False)])


@variant
def bpe_merge_variant_1(pieces, ranks):
    pairs = [(ranks[p], p) for p in zip(pieces, pieces[1:], strict=False) if p in ranks]
    if not pairs:
        return list(pieces)
    a, b = min(pairs)[1]
    out = []
    i = 0
    while i < len(pieces):
        if i + 1 < len(pieces) and pieces[i] == a and pieces[i + 1] == b:
            out.append(a + b)
            i += 2
        else:
            out.append(pieces[i])
            i += 1
    return out


@variant
def bpe_merge_variant_2(pieces, ranks):
    pairs = sorted((pair for pair in zip(pieces, pieces[1:], strict=False) if pair in ranks), key=ranks.get)
    merged, word = [], []
    for piece in pieces:
        word = [*word, piece]
        if word[-2:] != list(pairs[0] if pairs else ()):
            continue
        merged += [*word[:-2], "".join(word[-2:])]
        word = []
    return merged + word


@variant
def pad_tokens_variant_1(ids, start, end, max_length):
    out = torch.full((max_length,), end)
    k = ids[: max_length - 2]
    out[0] = start
    if k:
        out[1 : 1 + len(k)] = torch.tensor(k)
    return out


@variant
def patchify_variant_1(image, size):
    return F.unfold(image, size, stride=size).transpose(1, 2)


@variant
def patchify_variant_2(image, size):
    return rearrange(image, "b c (y p) (x q) -> b (y x) (c p q)", p=size, q=size)


@variant
def ddpm_step_variant_1(x_t, eps, a_t, a_prev, noise):
    alpha = a_t / a_prev
    mean = (x_t - (1 - alpha) / math.sqrt(1 - a_t) * eps) / math.sqrt(alpha)
    var = (1 - alpha) * (1 - a_prev) / (1 - a_t)
    return mean + math.sqrt(var) * noise if a_prev < 1 else mean


@variant
def ddim_step_variant_1(x_t, eps, a_t, a_prev, eta, noise):
    a_t, a_prev = torch.tensor(a_t), torch.tensor(a_prev)
    s = eta * torch.sqrt((1 - a_prev) / (1 - a_t)) * torch.sqrt(1 - a_t / a_prev)
    p = (x_t - torch.sqrt(1 - a_t) * eps) / torch.sqrt(a_t)
    return torch.sqrt(a_prev) * p + torch.sqrt(torch.clamp(1 - a_prev - s**2, min=0)) * eps + s * noise


@variant
def leading_timesteps_variant_1(steps, T):
    return np.flip(np.arange(0, T, T // steps) + 1)


@variant
def leading_timesteps_variant_2(steps, T):
    return list(reversed(range(1, T, T // steps)))


@variant
def plms_combine_variant_1(old_eps):
    e = old_eps
    if len(e) == 1:
        return e[0]
    if len(e) == 2:
        return (3 * e[0] - e[1]) / 2
    if len(e) == 3:
        return (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
    return (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24


@variant
def guidance_variant_1(eps_uncond, eps_cond, scale):
    return torch.lerp(eps_uncond, eps_cond, scale)


@variant
def guided_eps_variant_1(model, x, t, context, uncond_context, scale):
    c = model(x, t, context)
    u = model(x, t, uncond_context)
    return (1 - scale) * u + scale * c


@variant
def guided_eps_variant_2(model, x, t, context, uncond_context, scale):
    c, u = model(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat((context, uncond_context))).chunk(2)
    return u + scale * (c - u)


@variant
def dpmpp_2m_step_variant_1(x_t, x0, x0_old, a_old, a_t, a_prev):
    def lo(a):
        return torch.log(torch.tensor(a) ** 0.5 / (1 - torch.tensor(a)) ** 0.5)

    h = lo(a_prev) - lo(a_t)
    r = (lo(a_t) - lo(a_old)) / h
    D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_old
    return math.sqrt(1 - a_prev) / math.sqrt(1 - a_t) * x_t - math.sqrt(a_prev) * (torch.exp(-h) - 1) * D


@variant
def euler_step_variant_1(x, denoised, sigma, sigma_next):
    return torch.lerp(denoised, x, sigma_next / sigma)


@variant
def img2img_timesteps_variant_1(timesteps, strength):
    skip = len(timesteps) - int(len(timesteps) * strength)
    return timesteps[skip:]


@variant
def img2img_timesteps_variant_2(timesteps, strength):
    n = int(len(timesteps) * strength)
    return timesteps[-n:] if n else []


@variant
def inpaint_blend_variant_1(x_t, z_0, noise, mask, a_t):
    m = mask.float()
    return m * x_t + (1 - m) * (math.sqrt(a_t) * z_0 + math.sqrt(1 - a_t) * noise)


@variant
def ema_update_variant_1(ema, weight, decay):
    return ema.mul_(decay).add_(weight, alpha=1 - decay)


@variant
def ema_update_variant_2(ema, weight, decay):
    return ema.lerp(weight, 1 - decay)


@variant
def to_uint8_variant_1(x):
    return (x.add(1).div(2).clamp(0, 1) * 255).round().byte()


@variant
def to_uint8_variant_2(x):
    return (x.clamp(-1, 1) * 127.5 + 128).floor().clamp(0, 255).to(torch.uint8)


@variant
def initial_noise_variant_1(seeds, shape):
    out = []
    for s in seeds:
        torch.manual_seed(s)
        out.append(torch.randn(*shape))
    return torch.stack(out)


@variant
def snr_variant_1(t, alphas_cumprod):
    a = alphas_cumprod[t].double()
    return 1 / (1 / a - 1)


@variant
def scale_factor_variant_1(latents):
    return 1 / (latents - latents.mean()).pow(2).mean().sqrt()


@variant
def scale_factor_variant_2(latents):
    return float(1 / latents.flatten().std().item())


@variant
def sampling_loop_variant_1(eps_model, x_T, timesteps, alphas_cumprod):
    x = x_T.clone()
    for i in range(len(timesteps)):
        t = timesteps[i]
        a = float(alphas_cumprod[t])
        an = float(alphas_cumprod[timesteps[i + 1]] if i + 1 < len(timesteps) else alphas_cumprod[0])
        e = eps_model(x, torch.tensor([t] * x.shape[0]))
        x = math.sqrt(an / a) * x + (math.sqrt(1 - an) - math.sqrt(an * (1 - a) / a)) * e
    return x


@variant
def unet_forward_variant_2(x, input_blocks, middle_block, output_blocks):
    if not input_blocks:
        return middle_block(x)
    skip = input_blocks[0](x)
    below = unet_forward_variant_2(skip, input_blocks[1:], middle_block, output_blocks[:-1])
    return output_blocks[-1](torch.cat((below, skip), 1))


@variant
def q_sample_variant_5(x_0, t, noise, alphas_cumprod):
    bars = alphas_cumprod.numpy()[t.numpy()][:, None, None, None]
    return torch.from_numpy(np.sqrt(bars) * x_0.numpy() + np.sqrt(1 - bars) * noise.numpy())


@variant
def upsample_variant_2(x, conv):
    return conv(torch.kron(x, torch.ones(1, 1, 2, 2)))


@variant
def kl_variant_3(mean, logvar):
    normal = torch.distributions.Normal
    ours, theirs = normal(mean, (logvar / 2).exp()), normal(torch.zeros_like(mean), 1.0)
    return torch.distributions.kl_divergence(ours, theirs).sum((1, 2, 3))


@variant
def pooled_state_variant_2(hidden, input_ids, end_token):
    ends = input_ids == end_token
    return hidden[ends & (ends.cumsum(1) == 1)]


@variant
def embed_tokens_variant_1(input_ids, token_table, position_table):
    return F.embedding(input_ids, token_table) + F.embedding(torch.arange(input_ids.size(1)), position_table)[None]


@variant
def loss_by_time_variant_1(losses, t, T, bins):
    return torch.stack([losses[(t >= T * i / bins) & (t < T * (i + 1) / bins)].mean() for i in range(bins)])


@pytest.mark.parametrize("function", VARIANTS, ids=lambda function: function.__name__)
def test_another_form_of_a_right_solution_is_accepted(function):
    verdict = judge(exercise_of(function), function)
    assert verdict.right, verdict.message


# --- mistakes that stand in no table ----------------------------------------------------------------------------------


@unseen
def q_sample_mistake_1(x_0, t, noise, alphas_cumprod):
    a = alphas_cumprod[t]
    return a.sqrt()[:, None, None, None] * x_0 + (1 - a.sqrt())[:, None, None, None] * noise


@unseen
def q_sample_mistake_2(x_0, t, noise, alphas_cumprod):
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    return a * x_0 + (1 - a) * noise


@unseen
def q_sample_mistake_3(x_0, t, noise, alphas_cumprod):
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a).sqrt() * torch.randn_like(x_0)


@unseen
def q_sample_mistake_4(x_0, t, noise, alphas_cumprod):
    a = alphas_cumprod[t - 1].view(-1, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a).sqrt() * noise


@unseen
def q_sample_mistake_5(x_0, t, noise, alphas_cumprod):
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    x_0 *= a.sqrt()
    x_0 += (1 - a).sqrt() * noise
    return x_0


@unseen
def q_sample_mistake_6(x_0, t, noise, alphas_cumprod):
    a = alphas_cumprod[999 - t].view(-1, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a).sqrt() * noise


@unseen
def q_sample_mistake_7(x_0, t, noise, alphas_cumprod):
    a = alphas_cumprod[t[0]]
    return a.sqrt() * x_0 + (1 - a).sqrt() * noise


@unseen
def q_sample_mistake_8(x_0, t, noise, alphas_cumprod):
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    return (a.sqrt() * x_0 + (1 - a).sqrt() * noise).half()


@unseen
def q_sample_mistake_9(x_0, t, noise, alphas_cumprod):
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    return x_0 + (1 - a).sqrt() / a.sqrt() * noise


@unseen
def predict_start_from_noise_mistake_1(x_t, t, noise, alphas_cumprod):
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    return x_t / a.sqrt() - (1 / a).sqrt() * noise


@unseen
def predict_start_from_noise_mistake_2(x_t, t, noise, alphas_cumprod):
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    return x_t / a.sqrt() - (1 / a - 1) * noise


@unseen
def q_posterior_mean_mistake_1(x_0, x_t, t, betas):
    ab = torch.cumprod(1 - betas, 0)
    prev = ab[t - 1].view(-1, 1, 1, 1)
    ab = ab[t].view(-1, 1, 1, 1)
    b = betas[t].view(-1, 1, 1, 1)
    return prev.sqrt() * b / (1 - ab) * x_0 + (1 - b).sqrt() * (1 - prev) / (1 - ab) * x_t


@unseen
def q_posterior_mean_mistake_2(x_0, x_t, t, betas):
    ab = torch.cumprod(1 - betas, 0)
    prev = torch.cat([torch.ones(1), ab[:-1]])[t].view(-1, 1, 1, 1)
    ab = ab[t].view(-1, 1, 1, 1)
    b = betas[t].view(-1, 1, 1, 1)
    return prev.sqrt() * b / (1 - ab).sqrt() * x_0 + (1 - b).sqrt() * (1 - prev) / (1 - ab).sqrt() * x_t


@unseen
def exact_x0_mistake_1(x, t, data, alphas_cumprod):
    a = alphas_cumprod[t][:, None, None]
    d = ((x[:, None] - a.sqrt() * data) ** 2).sum(-1)
    return torch.softmax(-d / (2 * (1 - a[..., 0]) ** 2), 1) @ data


@unseen
def epsilon_loss_mistake_1(model, x_0, context, t, noise, alphas_cumprod):
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    x = a.sqrt() * x_0 + (1 - a).sqrt() * noise
    with torch.no_grad():
        p = model(x, t, context)
    return F.mse_loss(p, noise)


@unseen
def epsilon_loss_mistake_2(model, x_0, context, t, noise, alphas_cumprod):
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    x = a.sqrt() * x_0 + (1 - a).sqrt() * noise
    return F.mse_loss(model(x, t, context), torch.randn_like(x))


@unseen
def epsilon_loss_mistake_3(model, x_0, context, t, noise, alphas_cumprod):
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    x = a.sqrt() * x_0 + (1 - a).sqrt() * noise
    return F.l1_loss(model(x, t, context), noise)


@unseen
def epsilon_loss_mistake_4(model, x_0, context, t, noise, alphas_cumprod):
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    x = a.sqrt() * x_0 + (1 - a).sqrt() * noise
    return F.mse_loss(model(x, t, context), noise).item()


@unseen
def epsilon_loss_mistake_5(model, x_0, context, t, noise, alphas_cumprod):
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    x = a.sqrt() * x_0 + (1 - a).sqrt() * noise
    return F.mse_loss(model(x, t, context), x - x_0)


@unseen
def text_dropout_mistake_1(context, empty_context, drop):
    context[drop] = empty_context
    return context


@unseen
def text_dropout_mistake_2(context, empty_context, drop):
    return torch.where(torch.rand(len(context))[:, None, None] < 0.1, empty_context, context)


@unseen
def min_snr_weight_mistake_1(snr, gamma):
    return torch.minimum(snr, torch.tensor(gamma)) / gamma


@unseen
def timestep_embedding_mistake_1(timesteps, dim, max_period):
    h = dim // 2
    f = torch.exp(-math.log(max_period) * torch.arange(h) / (h - 1))
    a = timesteps[:, None] * f
    return torch.cat([a.sin(), a.cos()], -1)


@unseen
def timestep_embedding_mistake_2(timesteps, dim, max_period):
    h = dim // 2
    f = torch.exp(-math.log10(max_period) * torch.arange(h) / h)
    a = timesteps[:, None] * f
    return torch.cat([a.cos(), a.sin()], -1)


@unseen
def timestep_embedding_mistake_3(timesteps, dim, max_period):
    h = dim // 2
    f = torch.exp(-math.log(max_period) * torch.arange(h) / h)
    a = timesteps[:, None] * f
    return torch.cat([a.cos(), a.sin()], 0)


@unseen
def attention_mistake_1(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2), -1) / math.sqrt(q.shape[-1]) @ v


@unseen
def attention_mistake_2(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(k.shape[2]), -1) @ v


@unseen
def attention_mistake_3(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -3) / math.sqrt(k.shape[2]), -1) @ v


@unseen
def cross_attention_mistake_1(x, context, to_q, to_k, to_v, to_out, heads):
    b, n, _ = x.shape
    m = context.size(1)
    q = to_q(x).view(b, heads, n, -1)
    k = to_k(context).view(b, heads, m, -1)
    v = to_v(context).view(b, heads, m, -1)
    o = F.scaled_dot_product_attention(q, k, v)
    return to_out(o.transpose(1, 2).reshape(b, n, -1))


@unseen
def cross_attention_mistake_2(x, context, to_q, to_k, to_v, to_out, heads):
    q, k, v = to_q(x), to_k(context), to_v(context)
    return to_out(torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1] // heads), -1) @ v)


@unseen
def geglu_mistake_1(x, proj):
    a, b = proj(x).chunk(2, -1)
    return F.gelu(a) * F.gelu(b)


@unseen
def geglu_mistake_2(x, proj):
    a, b = proj(x).chunk(2, -1)
    return a * torch.tanh(b)


@unseen
def res_block_mistake_1(x, emb, in_layers, emb_layers, out_layers, skip_connection):
    h = in_layers(x) + emb_layers(emb)[:, :, None, None]
    return skip_connection(x) + out_layers(h) + h


@unseen
def res_block_mistake_2(x, emb, in_layers, emb_layers, out_layers, skip_connection):
    h = in_layers(x)
    h = h + emb_layers(F.silu(emb))[:, :, None, None]
    return skip_connection(x) + out_layers(h)


@unseen
def kl_mistake_1(mean, logvar):
    return 0.5 * (mean**2 + logvar.exp() ** 2 - 1 - logvar).sum((1, 2, 3))


@unseen
def kl_mistake_2(mean, logvar):
    return -0.5 * (1 + logvar + mean**2 - logvar.exp()).sum((1, 2, 3))


@unseen
def kl_mistake_3(mean, logvar):
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / mean.shape[0]


@unseen
def sample_posterior_mistake_1(moments, noise):
    m, lo = moments.chunk(2, 1)
    return m + lo.clamp(-30, 20).exp().pow(2) * noise


@unseen
def straight_through_mistake_1(z, z_q):
    return z_q.detach()


@unseen
def vq_loss_mistake_1(z, z_q, beta):
    return F.mse_loss(z_q, z) + beta * F.mse_loss(z, z_q)


@unseen
def vq_loss_mistake_2(z, z_q, beta):
    return F.mse_loss(z_q.detach(), z) * 1 + beta * F.mse_loss(z.detach(), z_q)


@unseen
def causal_mask_mistake_1(n):
    return torch.triu(torch.ones(n, n) * -1e-9, 1)


@unseen
def causal_mask_mistake_2(n):
    return torch.tril(torch.ones(n, n)) * float("-inf")


@unseen
def contrastive_loss_mistake_1(i, t, s):
    i, t = F.normalize(i, dim=-1), F.normalize(t, dim=-1)
    lo = i @ t.T / s.exp()
    y = torch.arange(len(lo))
    return (F.cross_entropy(lo, y) + F.cross_entropy(lo.T, y)) / 2


@unseen
def contrastive_loss_mistake_2(i, t, s):
    i, t = F.normalize(i, dim=-1), F.normalize(t, dim=-1)
    lo = s.exp() * i @ t.T
    y = torch.arange(len(lo))
    return F.cross_entropy(lo, y)


@unseen
def contrastive_loss_mistake_3(i, t, s):
    i, t = F.normalize(i, dim=-1), F.normalize(t, dim=-1)
    lo = s.exp() * i @ t.T
    return -(torch.log_softmax(lo, 1).diag().mean() + torch.log_softmax(lo, 1).diag().mean()) / 2


@unseen
def pooled_state_mistake_1(hidden, input_ids, end_token):
    return hidden[torch.arange(len(hidden)), input_ids.argmin(1)]


@unseen
def ddpm_step_mistake_1(x_t, eps, a_t, a_prev, noise):
    alpha = a_t / a_prev
    return (x_t - (1 - alpha) / math.sqrt(1 - a_t) * eps) / math.sqrt(alpha) + math.sqrt(1 - alpha) * noise


@unseen
def ddpm_step_mistake_2(x_t, eps, a_t, a_prev, noise):
    alpha = a_t
    return (x_t - (1 - alpha) / math.sqrt(1 - a_t) * eps) / math.sqrt(alpha) + math.sqrt(
        (1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)
    ) * noise


@unseen
def ddpm_step_mistake_3(x_t, eps, a_t, a_prev, noise):
    alpha = a_t / a_prev
    return (x_t - (1 - alpha) * eps) / math.sqrt(alpha) + math.sqrt((1 - a_prev) / (1 - a_t) * (1 - alpha)) * noise


@unseen
def ddim_step_mistake_1(x_t, eps, a_t, a_prev, eta, noise):
    s = eta * math.sqrt((1 - a_prev) / (1 - a_t)) * math.sqrt(1 - a_t / a_prev)
    x0 = (x_t - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
    return math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev) * eps - s * eps + s * noise


@unseen
def ddim_step_mistake_2(x_t, eps, a_t, a_prev, eta, noise):
    s = eta * math.sqrt((1 - a_prev) / (1 - a_t)) * math.sqrt(1 - a_prev / a_t if a_prev < a_t else 0)
    x0 = (x_t - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
    return math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev - s * s) * eps + s * noise


@unseen
def plms_combine_mistake_1(e):
    if len(e) < 4:
        return e[0]
    return (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24


@unseen
def plms_combine_mistake_2(e):
    if len(e) == 1:
        return e[0]
    if len(e) == 2:
        return (3 * e[0] - e[1]) / 2
    if len(e) == 3:
        return (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
    return (55 * e[-1] - 59 * e[-2] + 37 * e[-3] - 9 * e[-4]) / 24


@unseen
def guidance_mistake_1(u, c, s):
    return u + s * (c - u) + c


@unseen
def guidance_mistake_2(u, c, s):
    return (1 + s) * c - s * u


@unseen
def guided_eps_mistake_1(model, x, t, context, uncond_context, scale):
    u, c = model(torch.cat([x, x]), t, torch.cat([uncond_context, context])).chunk(2)
    return u + scale * (c - u)


@unseen
def euler_step_mistake_1(x, denoised, sigma, sigma_next):
    return x + (x - denoised) / sigma * (sigma - sigma_next)


@unseen
def inpaint_blend_mistake_1(x_t, z_0, noise, mask, a_t):
    return mask * (math.sqrt(a_t) * z_0 + math.sqrt(1 - a_t) * noise) + (~mask) * x_t


@unseen
def ema_update_mistake_1(ema, weight, decay):
    return ema * (1 - decay) + weight * decay


@unseen
def bpe_merge_mistake_1(pieces, ranks):
    for pair in ranks:
        for i in range(len(pieces) - 1):
            if (pieces[i], pieces[i + 1]) == pair:
                pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
                return pieces
    return pieces


@unseen
def bpe_merge_mistake_2(pieces, ranks):
    for pair in ranks:
        for i in range(len(pieces) - 1):
            if (pieces[i], pieces[i + 1]) == pair:
                return pieces[:i] + [pieces[i] + pieces[i + 1]] + pieces[i + 2 :]
    return pieces


@unseen
def pad_tokens_mistake_1(ids, start, end, max_length):
    return [start] + ids + [end] + [0] * (max_length - 2 - len(ids))


@unseen
def sampling_loop_mistake_1(eps_model, x_T, timesteps, alphas_cumprod):
    x = x_T
    for t in timesteps:
        e = eps_model(x, torch.full((len(x),), t))
        a = alphas_cumprod[t]
        an = alphas_cumprod[max(t - 1, 0)]
        x = an.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - an).sqrt() * e
    return x


@unseen
def sampling_loop_mistake_2(eps_model, x_T, timesteps, alphas_cumprod):
    x = x_T
    for i, t in enumerate(timesteps[:-1]):
        e = eps_model(x, torch.full((len(x),), t))
        a = alphas_cumprod[t]
        an = alphas_cumprod[timesteps[i + 1]]
        x = an.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - an).sqrt() * e
    return x


@unseen
def to_uint8_mistake_1(x):
    return ((x + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)


@unseen
def to_uint8_mistake_2(x):
    return (x * 255).clamp(0, 255).round().to(torch.uint8)


@unseen
def group_norm_mistake_1(x, groups, weight, bias, eps):
    return F.layer_norm(x, x.shape[1:], eps=eps) * weight[:, None, None] + bias[:, None, None]


@unseen
def group_norm_mistake_2(x, groups, weight, bias, eps):
    return F.batch_norm(x, None, None, weight, bias, True, 0, eps)


@unseen
def unet_forward_mistake_1(x, input_blocks, middle_block, output_blocks):
    h = x
    s = []
    for b in input_blocks:
        s.append(h)
        h = b(h)
    h = middle_block(h)
    for b in output_blocks:
        h = b(torch.cat([h, s.pop()], 1))
    return h


@unseen
def nearest_code_mistake_1(z, codebook):
    return ((z[:, None] - codebook) ** 2).sum(-1).argmin()


@unseen
def scale_factor_mistake_1(latents):
    return 1 / latents.std(0).mean()


@unseen
def dpmpp_2m_step_mistake_1(x_t, x0, x0_old, a_old, a_t, a_prev):
    def lo(a):
        return math.log(math.sqrt(a) / math.sqrt(1 - a))

    h = lo(a_prev) - lo(a_t)
    r = (lo(a_t) - lo(a_old)) / h
    D = (1 + 1 / (2 * r)) * x0 + 1 / (2 * r) * x0_old
    return math.sqrt(1 - a_prev) / math.sqrt(1 - a_t) * x_t - math.sqrt(a_prev) * (math.exp(-h) - 1) * D


@unseen
def training_loss_mistake_1(
    model, mean, std, encoder_noise, scale_factor, context, empty_context, drop, t, noise, alphas_cumprod
):
    z = scale_factor * (mean + std**2 * encoder_noise)
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    context = torch.where(drop[:, None, None], empty_context, context)
    return F.mse_loss(model(a.sqrt() * z + (1 - a).sqrt() * noise, t, context), noise)


@unseen
def decode_first_stage_mistake_1(z, scale_factor, decode):
    return decode(1 / scale_factor * z).clamp(-1, 1) * 0.5


@unseen
def first_stage_encoding_mistake_1(mean, logvar, noise, scale_factor):
    return scale_factor * (mean + logvar.exp().sqrt() * torch.randn_like(mean))


@unseen
def patchify_mistake_1(image, size):
    return F.unfold(image, size, stride=size)


@pytest.mark.parametrize("function", UNSEEN, ids=lambda function: function.__name__)
def test_a_mistake_that_is_in_no_table_is_refused_and_named(function):
    verdict = judge(exercise_of(function), function)
    assert not verdict.right and verdict.mistake, verdict.message


# --- what is said in every exercise -----------------------------------------------------------------------------------


def q_sample(x_0, t, noise, alphas_cumprod):
    alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise


def changed(change):
    """q_sample, with something done to what it returns."""
    return lambda x_0, t, noise, alphas_cumprod: change(q_sample(x_0, t, noise, alphas_cumprod))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (torch.ones(2, 3), "the function itself"),
        (lambda x_0, t: x_0, "takes \\(x_0, t\\)"),
        (lambda t, x_0, noise, alphas_cumprod: x_0, "another order"),
        (changed(lambda x: None), "returns None"),
        (changed(print), "returns None.*printed"),
        (changed(lambda x: x.numpy()), "NumPy"),
        (changed(lambda x: [x]), "returns a list"),
        (changed(lambda x: x.half()), "float16"),
        (changed(lambda x: x.int()), "int32"),
        (changed(lambda x: x.transpose(-1, -2)), "axes are in the wrong order"),
        (changed(lambda x: x[None]), "right numbers, but the shape"),
        (changed(lambda x: x.mean(dim=0)), "mean over axis 0"),
        (changed(lambda x: x / 0), "infinity|divide by zero"),
        (changed(lambda x: x * torch.nan), "NaN"),
        (changed(lambda x: 3 * x), "3 times"),
        (changed(lambda x: -x), "wrong sign|minus"),
        (changed(lambda x: x + 0.5), "plus 0.5"),
        (changed(lambda x: x * x[0].numel()), "number of entries of `x_0` in each sample"),
        (changed(lambda x: x**2), "square"),
        (changed(lambda x: x.exp()), "exp of"),
        (changed(lambda x: x.clamp(-1, 1)), "clamped to \\[-1, 1\\]"),
        (changed(lambda x: x.relu()), "without its negative"),
        (changed(lambda x: x.flip(-1)), "reversed along axis 3"),
        (changed(lambda x: x.roll(1, 1)), "shifted by one along axis 1"),
        (changed(lambda x: torch.cat([x[:1], 0 * x[1:]])), "first entry of a batch only"),
        (changed(lambda x: x + torch.rand(())), "different numbers"),
        (lambda x_0, t, noise, alphas_cumprod: x_0, "`x_0` as it came in"),
        (lambda x_0, t, noise, alphas_cumprod: q_sample(x_0, t, noise, alphas_cumprod.flip(0)), "runs backwards"),
        (lambda x_0, t, noise, alphas_cumprod: q_sample(noise, t, x_0, alphas_cumprod), "exchanged"),
        (lambda x_0, t, noise, alphas_cumprod: q_sample(x_0, t, noise, alphas_cumprod) + noise, "plus `noise`"),
        (lambda x_0, t, noise, alphas_cumprod: x_0.mul_(0) + q_sample(x_0, t, noise, alphas_cumprod), "in place"),
        (lambda x_0, t, noise, alphas_cumprod: q_sample(x_0, t, noise, alphas_cumprod[:1000].view(12)), "RuntimeError"),
        (lambda x_0, t, noise, alphas_cumprod: x_0 / undefined, "NameError.*misspelt"),
        (lambda x_0, t, noise, alphas_cumprod: (x for x in x_0), "generator"),
        (
            lambda x_0, t, noise, alphas_cumprod: q_sample(x_0, t.clamp(min=1), noise, alphas_cumprod),
            "every t except t = 0",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_named_that_any_function_can_have(function, said):
    verdict = check.q_sample(function)
    assert not verdict.right
    assert re.search(said, verdict.mistake or "", re.DOTALL), verdict.message


@pytest.mark.parametrize(
    "name, function, said",
    [
        ("q_sample", lambda *args: (q_sample(*args), args[2]), "returns a tuple.*place 0 is right"),
        ("q_sample", lambda *args: {"x_t": q_sample(*args)}, "a dict.*under 'x_t' is right"),
        ("q_sample", lambda *args: list(q_sample(*args)), "Its values are right.*torch.stack"),
        ("q_sample", lambda *args: q_sample(*args)[-1], "Only the last entry along axis 0.*loop"),
        ("q_sample", lambda *args: q_sample(*args)[:, :2], "Axis 1 is too short by 1 at its end"),
        ("q_sample", lambda x, t, n, bar: q_sample(x, t, torch.arange(n.numel()).sin().view_as(n), bar),
         "does not depend on `noise`.*noise of your own"),
        ("q_sample", lambda *args: torch.cat([q_sample(*args)[:1], 0 * args[0][1:]]), "`return` inside of a loop"),
        ("q_sample", lambda *args: 3 * q_sample(*args).relu(), "without its negative numbers.*multiplied by 3"),
        ("snr", lambda t, bar: bar / (1 - bar), "the whole table. Return its entries at `t`"),
        ("snr", lambda t, bar: (bar[t] / (1 - bar[t])).expand(len(t), -1).clone(), "shape is .* but it should be"),
        ("kl", lambda m, logvar: EXERCISES["kl"].compile()(m, logvar) * math.pi, "and that number is π"),
        ("leading_timesteps", lambda steps, T: reversed(range(1, T, T // steps)), "range_iterator.*list"),
        ("leading_timesteps", lambda steps, T: [T / steps * i + 1 for i in range(steps)][::-1], "floats, .* integers"),
        ("leading_timesteps", lambda steps, T: [*range(T - T // steps + 1, 0, -(T // steps)), 0], r"Leave out \[0\]"),
        ("pad_tokens", lambda ids, start, end, n: ([start, *ids[: n - 2], end] + [7] * n)[:n], "The first 5 of 8 are"),
        ("to_uint8", lambda x: ((x.clamp(-1, 1) + 1) * 127.5).round().short(), "integers, but not bytes"),
        ("plms_combine", lambda e: sum(w * x for w, x in zip((4 / 3, -1 / 3, 0, 0), e, strict=False)), "4/3, -1/3, 0"),
        ("straight_through", lambda z, z_q: z / 2 + (z_q - z / 2).detach(), "the gradient .* is 0.5 and 1 times"),
        ("embed_tokens", lambda ids, tokens, places: tokens[ids] + places[:-1], "that do not fit. Print both"),
        ("predict_start_from_noise", lambda x, t, n, bar: (x - (1 - bar[-1]) ** 0.5 * n) / bar[-1] ** 0.5,
         "does not depend on `t`"),
        ("q_sample", lambda x, t, n, bar: q_sample(x, t.max().expand_as(t), n, bar), "largest entry of `t`"),
        ("predict_noise_from_v", lambda x, t, v, bar: q_sample(v, t, x, bar), r"must become \[b 1\] before"),
        ("attention", lambda q, k, v: (q @ k.T).softmax(-1) @ v, r"`\.T` reverses all axes"),
        ("split_heads", lambda x, heads: rearrange(x, "b (h n) d -> b h n d", h=heads), "can't divide axis of length"),
        ("bpe_merge", lambda pieces, ranks: min(zip(pieces, pieces[1:], strict=False), key=ranks.__getitem__),
         "no such key"),
        ("training_loss", lambda model, *a: model(a[0] + torch.randn_like(a[0]), a[-3], a[4]).mean(),
         "the ones to use are given: `t` and `drop`"),
        ("attention", lambda q, k, v: q @ k / math.sqrt(q), "torch has functions for whole tensors|Print both|inner"),
        ("geglu", lambda x, proj: proj(x[..., :-1]), "comes from a function that you call"),
        ("q_sample", type("Noiser", (), {"__call__": lambda self, x_0, t, noise, bar: x_0}), "Noiser is a class"),
        ("q_sample", type("Noisy", (), {"__init__": lambda self, x_0, t, noise, bar: None}), "Noisy is a class"),
        ("q_sample", lambda *args: object(), "returns an object, but it should return a tensor of shape"),
        ("q_sample", lambda x, *_: F.pad(x[..., None, None, None], [1] * 8, "reflect"), "raises NotImpl.*Only 2D"),
        ("leading_timesteps", lambda steps, T: (t for t in range(1, T)), r"generator.*`\(\.\.\. for \.\.\.\)`.*square"),
        ("leading_timesteps", lambda steps, T: (1, list(range(1, T, T // steps))[::-1]), "a tuple.*place 1 is right"),
        ("plms_combine", lambda e: e[0] if len(e) == 1 else None, "None in some cases"),
        ("kl", lambda mean, logvar: mean.sum().item(), "a Python number. Return a tensor"),
        ("vae_loss", lambda *args: vae_loss_in_numbers(*args), r"gradient flows through `kl`.*`\.item\(\)`"),
        ("snr", lambda t, bar: bar[t] // (1 - bar[t]), "you divided with `//`"),
        ("ema_decay", lambda n, decay: {"decay": decay}, "a dict, but it should return a number"),
    ],
)
def test_a_result_in_another_form_is_described(name, function, said):
    verdict = check(name, function)
    assert not verdict.right
    assert re.search(said, verdict.mistake or "", re.DOTALL), verdict.message


def test_errors_need_not_be_the_same_where_wrong_results_can_be_compared():
    """A reshape that fits by chance in the square case only: there it is recognised."""

    def spatial_transformer(x, context, norm, proj_in, blocks, proj_out):
        tokens = norm(x).flatten(2).mT  # no projection: blocks of another width complain, each in its own words
        for block in blocks:
            tokens = block(tokens, context)
        return x + proj_out(tokens.mT.unflatten(2, x.shape[2:]))

    assert check.spatial_transformer(spatial_transformer).mistake == "proj_in is missing. Apply it after the norm."


def vae_loss_in_numbers(x, reconstruction, mean, logvar, kl_weight):
    """The loss, with a KL that is a Python number."""
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / len(x)
    return (x - reconstruction).abs().mean() + kl_weight * kl.item() / x[0].numel()


def test_a_method_that_returns_none_is_named():
    def leading_timesteps(steps, T):
        timesteps = list(range(1, T, T // steps))
        return timesteps.reverse()

    assert "`.reverse()` changes a list and returns None" in check.leading_timesteps(leading_timesteps).mistake


def test_a_split_into_pieces_of_two_is_told_from_a_split_into_two():
    """On two channels they are the same. Elsewhere there are too many parts, as chunk(3) would make."""

    def sample_posterior(moments, noise):
        mean, logvar = moments.split(2, dim=1)
        return mean + (logvar.clamp(-30, 20) / 2).exp() * noise

    mistake = check.sample_posterior(sample_posterior).mistake
    assert "too many values" in mistake and "`.split(2)` makes parts with 2 entries" in mistake


@pytest.mark.parametrize("name", ["q_sample", "nearest_code", "kl", "leading_timesteps", "ema_decay", "causal_mask"])
def test_a_result_on_another_device_is_refused_and_not_compared(name):
    """As a student with a GPU returns it. Nothing can be read from the device "meta", so that a comparison fails."""
    right = EXERCISES[name].compile()
    for returned in (lambda x: x, lambda x: [1, x], lambda x: {"x": x}, lambda x: x.long()[None]):
        verdict = judge(EXERCISES[name], lambda *args, form=returned: form(torch.as_tensor(right(*args)).to("meta")))
        assert "Your result is on meta, but the arguments are on the CPU." in verdict.mistake


def test_what_a_student_does_to_a_model_stays_in_this_call():
    right = EXERCISES["epsilon_loss"].compile()

    def moved(model, *args):
        model.to("meta")

    def emptied(model, *args):
        model.requires_grad_(False).conv.weight.zero_()

    for function in (moved, emptied):
        assert not check.epsilon_loss(function)
        assert check.epsilon_loss(right)


def test_a_function_that_goes_back_through_its_own_graph_is_told_so():
    def epsilon_loss(*args):
        loss = EXERCISES["epsilon_loss"].compile()(*args)
        loss.backward()
        return loss

    assert "calls `.backward()`. Leave it out" in check.epsilon_loss(epsilon_loss).mistake


def test_two_calls_of_the_model_are_right_and_get_a_remark():
    verdict = check.guided_eps(guided_eps_variant_1)
    assert verdict.right and "calls the model more than once" in verdict.message
    assert check.guided_eps(guided_eps_variant_2).message == "guided_eps: right."


def test_a_tensor_in_place_of_a_list_gets_a_remark():
    verdict = check.leading_timesteps(lambda steps, T: torch.arange(1, T, T // steps).flip(0))
    assert verdict.right and "the stub asks for a list" in verdict.message


ODD = [
    None, 3.0, 2, True, "abc", [], [1, 2], (torch.ones(2), 3), {"a": 1}, ..., len, torch.nn.Linear(2, 2),
    torch.tensor(1.5), torch.ones(3), torch.randn(2, 4, 3, 5), torch.full((2, 4, 3, 5), torch.nan), torch.arange(4),
    torch.tensor(torch.inf), torch.ones(3, 3).bool(), torch.ones(2, 2) * 1j, torch.zeros(0, 4, 3, 5),
    np.ones(3), np.float32(2), [torch.ones(2)] * 3, [None, None],
]  # fmt: skip


@each_exercise
def test_the_checker_survives_whatever_comes_back(exercise, monkeypatch):
    monkeypatch.setattr(sys.modules["minisd.coursework.judge"], "PAIRS", 10)  # each of them would be searched for long
    for value in ODD[list(EXERCISES).index(exercise.name) % 5 :: 5]:
        verdict = judge(exercise, lambda *args, value=value: value)
        assert not verdict.right, value


def test_an_error_is_reported_with_its_line():
    def with_a_slip(x_0, t, noise, alphas_cumprod):
        a = alphas_cumprod[t][0]
        return a * x_0 + the_noise

    verdict = check.q_sample(with_a_slip)
    assert "NameError" in verdict.mistake and "`return a * x_0 + the_noise" in verdict.mistake


def test_a_change_of_an_argument_is_refused_even_where_the_result_is_right():
    def q_sample(x_0, t, noise, alphas_cumprod):
        alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return x_0.mul_(alpha_bar.sqrt()).add_((1 - alpha_bar).sqrt() * noise)

    assert "`x_0` in place" in check.q_sample(q_sample).mistake
    assert check.ema_update(lambda ema, weight, decay: ema.mul_(decay).add_(weight, alpha=1 - decay))  # there it may


def test_float64_is_accepted_with_a_remark():
    verdict = check.q_sample(lambda x_0, t, noise, bar: q_sample(x_0.double(), t, noise, bar.double()))
    assert verdict.right and "float64" in verdict.message


def test_two_mistakes_are_named_together():
    def both(x_0, t, noise, alphas_cumprod):
        alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return alpha_bar.sqrt() * x_0 - (1 - alpha_bar) * noise

    mistake = check.q_sample(both).mistake
    assert "-(1-ᾱ_t)" in mistake and "√(1-ᾱ_t)" in mistake


def test_a_loop_without_an_end_is_stopped(monkeypatch):
    monkeypatch.setattr("minisd.coursework.running.SECONDS", 0.2)

    def bpe_merge(pieces, ranks):
        while True:
            pass

    assert "still running" in check.bpe_merge(bpe_merge).mistake


@pytest.mark.parametrize("ends_on", [0, 1], ids=["first case", "second case"])
def test_one_time_out_ends_the_check(ends_on, monkeypatch):
    monkeypatch.setattr("minisd.coursework.running.SECONDS", 0.2)
    calls = []

    def bpe_merge(pieces, ranks):
        calls.append(pieces)
        print("call", len(calls))
        while len(calls) > ends_on:
            pass

    verdict = judge(EXERCISES["bpe_merge"], bpe_merge)
    assert len(calls) == ends_on + 1, "no other case is tried"
    label = list(cases_of(EXERCISES["bpe_merge"]))[ends_on]
    assert re.search(f"while len.*still running.*never ends.*{re.escape(label)}", verdict.mistake)
    assert verdict.printed == "call 1\n"


def test_a_time_out_that_comes_late_ends_the_check(monkeypatch):
    """A function that ends on every case, but neither at another t nor on other numbers: it is waited for twice."""
    monkeypatch.setattr("minisd.coursework.running.SECONDS", 0.2)
    monkeypatch.setattr(sys.modules["minisd.coursework.judge"], "PAIRS", 10)  # the search itself is not tested here
    exercise, late = EXERCISES["q_sample"], []
    usual = [(args["t"].tolist(), args["noise"].flatten()[0].item()) for args in cases_of(exercise).values()]

    def q_sample(x_0, t, noise, alphas_cumprod):
        if (t.tolist(), noise.flatten()[0].item()) not in usual:
            late.append(t)
            while True:
                pass
        return x_0.sin() * 1.1 + noise.cos()

    assert not judge(exercise, q_sample)
    assert len(late) == 2


# --- torch's global state ---------------------------------------------------------------------------------------------


def _torch_state():
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    return grad, inference, torch.is_autocast_enabled("cpu"), dtype, device, torch.get_rng_state().tolist()


@contextmanager
def _with(setting, value, usual):
    """A setting as a cell of a notebook leaves it: on, until another cell puts it back."""
    setting(value)
    try:
        yield
    finally:
        setting(usual)


SETTINGS = {
    "set_grad_enabled": lambda: _with(torch.set_grad_enabled, False, True),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "set_default_dtype": lambda: _with(torch.set_default_dtype, torch.float64, torch.float32),
    "set_default_device": lambda: _with(torch.set_default_device, "meta", None),
    "with device": lambda: torch.device("meta"),
}
each_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture
def new_process():
    """Nothing is known yet of right outcomes, and nothing stays that was found out."""
    kept = (cases_of, right_outcomes)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


def _gives_no_gradient(z, z_q):
    return z_q


@each_setting
def test_the_callers_torch_settings_change_no_verdict_then_or_later(setting, new_process):
    with setting():
        before = _torch_state()
        assert "no gradient reaches z" in check.straight_through(_gives_no_gradient).mistake
        assert check.straight_through(lambda z, z_q: z + (z_q - z).detach())
        assert check.attention(EXERCISES["attention"].compile()).right
        assert check.timestep_embedding(EXERCISES["timestep_embedding"].compile()).right
        assert not check.q_sample(lambda x_0, t, noise, bar: x_0.sin() + 1.1 * noise.cos())  # all mistakes are tried
        assert _torch_state() == before
    for name in ("straight_through", "attention", "timestep_embedding"):
        assert check(name, EXERCISES[name].compile()).right
    assert "no gradient reaches z" in check.straight_through(_gives_no_gradient).mistake


LEFT_ON = []  # what a student's function entered and did not leave


def _leave_on(context):
    context.__enter__()
    LEFT_ON.append(context)


@pytest.mark.parametrize(
    "change",
    [
        lambda: torch.set_grad_enabled(False),
        lambda: _leave_on(torch.no_grad()),
        lambda: _leave_on(torch.inference_mode()),
        lambda: _leave_on(torch.autocast("cpu", torch.bfloat16)),
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_default_device("meta"),
        lambda: torch.manual_seed(7),
    ],
    ids=["set_grad_enabled", "no_grad", "inference_mode", "autocast", "default_dtype", "default_device", "seed"],
)
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_what_a_function_changes_of_torch_is_undone(change, fails, new_process):
    def straight_through(z, z_q):
        result = z + (z_q - z).detach()
        change()
        if fails:
            raise ValueError("too late")
        return result

    before = _torch_state()
    try:
        assert check.straight_through(straight_through).right is not fails
        assert _torch_state() == before
        assert "no gradient reaches z" in check.straight_through(_gives_no_gradient).mistake
        assert check.timestep_embedding(EXERCISES["timestep_embedding"].compile()).right
    finally:
        LEFT_ON.clear()
        assert _torch_state() == before


def test_torch_seeds_of_gpus_are_left_alone(monkeypatch):
    of_a_gpu = torch.Generator().manual_seed(3)  # this machine may have none
    monkeypatch.setattr(torch.cuda, "default_generators", (of_a_gpu,))
    check.q_sample(lambda x_0, t, noise, bar: of_a_gpu.manual_seed(5) and x_0)
    assert of_a_gpu.initial_seed() == 3


def test_a_picture_is_drawn_whatever_the_callers_torch_settings():
    """With `text_dropout` in it, a network is trained on first: without gradients there would be nothing to train."""
    solution = EXERCISES["text_dropout"].compile()
    usual = draw("text_dropout", solution, "a red circle", "tiny", steps=2)
    for name, setting in SETTINGS.items():
        with setting():
            before = _torch_state()
            image = draw("text_dropout", solution, "a red circle", "tiny", steps=2)
            assert _torch_state() == before, name
        assert image is not None and np.array_equal(np.asarray(image), np.asarray(usual)), name


def test_the_students_random_numbers_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check.q_sample(lambda x_0, t, noise, bar: torch.randn_like(x_0))
    assert torch.equal(torch.rand(2), expected)


def test_an_unknown_mistake_is_described_in_numbers():
    verdict = check.to_uint8(lambda x: (7 + 0 * x).to(torch.uint8))
    assert not verdict.right and verdict.mistake is None
    assert "should begin" in verdict.message


def test_the_part_that_is_wrong_is_found_if_the_mistake_has_no_name():
    def inpaint_blend(x_t, z_0, noise, mask, a_t):
        known = a_t**0.5 * z_0 + (1 - a_t) ** 0.5 * noise
        return torch.where(mask, x_t.sin() * 1.1, known)

    mistake = check.inpaint_blend(inpaint_blend).mistake
    assert "influence of `z_0` and `noise`" in mistake and "influence of `x_t` is not" in mistake


# --- the checker's face -----------------------------------------------------------------------------------------------


def test_the_verdict_is_printed_and_serves_pytest(capsys):
    verdict = check.q_sample(q_sample)
    assert verdict and capsys.readouterr().out == "q_sample: right.\n"
    verdict.expect()
    check.snr(lambda t, bar: print("t is", t.shape) or bar[t] / (1 - bar[t]))
    assert capsys.readouterr().out == "--- printed on the first case:\nt is torch.Size([3])\n---\nsnr: right.\n"
    verdict = check("q_sample", lambda x_0, t, noise, alphas_cumprod: x_0)
    assert capsys.readouterr().out.startswith("q_sample: not right yet. Your function returns `x_0`")
    with pytest.raises(AssertionError, match="not right yet"):
        verdict.expect()


def test_hints_are_printed_one_by_one(capsys):
    hints = EXERCISES["res_block"].hints
    for _ in range(len(hints) + 1):
        check.res_block.hint()
    printed = capsys.readouterr().out.splitlines()
    numbered = [f"Hint {i} of {len(hints)}: {hint}" for i, hint in enumerate(hints, 1)]
    assert printed == [*numbered, numbered[0]]


def test_what_is_right_is_answered_by_minisds_own_solution_once_and_folded(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    exercise = EXERCISES["min_snr_weight"]
    check("min_snr_weight", exercise.compile())._ipython_display_()
    (data,) = shown
    assert textwrap.indent(exercise.solution, "    ") in data["text/plain"]
    opening = "<details><summary>This is how minisd does it</summary><pre>def min_snr_weight("
    assert data["text/html"].startswith(opening)
    assert "-&gt;" in data["text/html"] and '"""' not in data["text/html"]
    check("min_snr_weight", lambda snr, gamma: snr)._ipython_display_()
    check("min_snr_weight", _compiled(exercise.stub, exercise))._ipython_display_()
    assert len(shown) == 1, "nothing is given away before it is right"


def test_the_checks_are_found_by_name():
    assert set(dir(check)) == set(EXERCISES)
    assert "x_t" in check.q_sample.__doc__ or "timestep" in check.q_sample.__doc__
    with pytest.raises(AttributeError, match="no exercise 'q_samples'"):
        check.q_samples  # noqa: B018
    with pytest.raises(ValueError, match="choose one of"):
        check("nonsense", q_sample)


def test_coursework_is_imported_when_it_is_used_and_is_the_same_package_by_both_names():
    """By whichever name its modules are imported, they are the same, with the same exercises."""
    code = (
        "import sys, minisd\n"
        "assert not [name for name in sys.modules if 'coursework' in name]\n"
        "import minisd.coursework.judge, minisd_coursework.judge\n"
        "from minisd.coursework import EXERCISES, check\n"
        "from minisd.coursework.exercise import EXERCISES as others\n"
        "assert minisd.coursework is minisd_coursework and minisd.coursework.judge is minisd_coursework.judge\n"
        "assert EXERCISES is others is minisd_coursework.EXERCISES and check is minisd_coursework.check"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for command in (["-c", code], ["-m", "minisd.coursework", "list"]):
        command = [sys.executable, *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == (len(EXERCISES) if "-m" in command else 0)


# --- the TOML files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A function that edits a TOML file of the package, in a copy, and reads all of them again."""
    folder = tmp_path / "minisd_coursework"
    shutil.copytree(texts.FOLDER, folder)
    monkeypatch.setattr(texts, "FOLDER", folder)

    def edit(name, old, new):
        text = (folder / name).read_text("utf-8")
        assert text.count(old), old
        (folder / name).write_text(text.replace(old, new, 1), "utf-8")
        for read in (texts.read, texts.sentences):
            read.cache_clear()

    yield edit
    for read in (texts.read, texts.sentences):
        read.cache_clear()


def test_an_edited_sentence_is_what_the_student_reads(edited):
    shared = (texts.FOLDER / "shared.toml").read_text("utf-8")
    first = re.search(r'^\[not_reshaped\]$.*?^(sentence = """.*?"""$)', shared, re.MULTILINE | re.DOTALL)[1]
    edited("shared.toml", first, 'sentence = "Anders."')
    table = texts.of_exercise("noising", "q_sample", EXERCISES["q_sample"].solution)
    assert "Anders." in [mistake.sentence for mistake in table["mistakes"]]
    edited("sentences.toml", "{name}: right.", "{name}: richtig.")
    texts.check_sentences()
    assert check.snr(EXERCISES["snr"].reference).message == "snr: richtig."


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('[snr]\n', '[snrr]\n', "noising.toml, snr: the key `difficulty` is missing"),
        ('minutes = 5\n', '', "noising.toml, snr: the key `minutes` is missing"),
        ('minutes = 5\n', 'minutes = "5"\n', "snr: `minutes` has to be of type int, not '5'"),
        ('minutes = 5\n', 'minutes = 5\nminuets = 5\n', "snr: there is no key `minuets`"),
        ("new = '(1 - alpha_bar) / alpha_bar'\n", "", r"snr, mistake 1 \(\".+\"\): the key `new` is missing"),
        ("old = 'alpha_bar / (1 - alpha_bar)'", "old = 'alpha_bar'",
         r"noising.toml, snr, mistake 1 \(\".+\"\): `old` has to occur exactly once .* 'alpha_bar' occurs 3 times"),
        ('shared = "t_early"', 'shared = "t_erly"', r"snr, mistake 10: shared.toml has no mistake \[t_erly\]"),
        ('hints = [', 'hints = [[', "noising.toml is not valid TOML"),
    ],
)  # fmt: skip
def test_a_toml_file_that_is_wrong_says_where(edited, old, new, said):
    begin = (texts.FOLDER / "noising.toml").read_text("utf-8").index("[snr]\n")
    whole = (texts.FOLDER / "noising.toml").read_text("utf-8")
    assert old in whole[begin:], old
    part = whole[begin:].replace(old, new, 1)
    edited("noising.toml", whole[begin:], part)
    with pytest.raises(ValueError, match=said):
        texts.of_exercise("noising", "snr", EXERCISES["snr"].solution)


def test_an_exercise_without_a_table_is_refused():
    with pytest.raises(ValueError, match=r"noising.toml has no table \[kl\], which the exercise in noising.py needs"):
        texts.of_exercise("noising", "kl", EXERCISES["kl"].solution)


def test_a_wrong_sentence_of_the_checker_says_where(edited):
    edited("sentences.toml", "by up to {far}", "by up to {fur}")
    with pytest.raises(ValueError, match=r"sentences.toml, verdict.by_up_to: there is no placeholder \{fur\}.*\{far\}"):
        texts.check_sentences()
    edited("sentences.toml", "by up to {fur}", "by up to {far")
    with pytest.raises(ValueError, match=r"sentences.toml, verdict.by_up_to: .*brace"):
        texts.check_sentences()
    edited("sentences.toml", "by_up_to = ", "by = ")
    with pytest.raises(ValueError, match="has no sentence verdict.by_up_to, which judge.py needs"):
        texts.check_sentences()


def test_a_wrong_sentence_of_a_mutant_says_where(edited, monkeypatch):
    edited("mutants.toml", "the factor `{b}` is missing", "the factor `{c}` is missing")
    monkeypatch.setattr(mutants, "TABLES", texts.read("mutants.toml"))
    with pytest.raises(ValueError, match=r"mutants.toml, operators \(.*factor.*\): there is no placeholder \{c\}"):
        mutants.check_tables()


def test_every_table_belongs_to_an_exercise_and_every_sentence_to_a_call():
    for stage in STAGES:
        assert set(texts.read(f"{stage}.toml")) == {e.name for e in EXERCISES.values() if e.stage == stage}
    tables = [table for stage in STAGES for table in texts.read(f"{stage}.toml").values()]
    shared = {mistake["shared"] for table in tables for mistake in table["mistakes"] if "shared" in mistake}
    assert shared == set(texts.read("shared.toml"))
    code = "".join(file.read_text("utf-8") for file in sorted(texts.FOLDER.glob("*.py")))
    calls = re.findall(r"""say\(\s*(f?)["']([^"']+)["']""", code)
    asked = [re.escape(key) if not dynamic else re.sub(r"\{.*?\}", ".+", key) for dynamic, key in calls]
    assert not [name for name in texts.sentences() if not any(re.fullmatch(key, name) for key in asked)]


# --- swapped in -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def drawn():
    """drawn(name, function) -> the pixels of that picture, or None. What all of the pictures need is read only once."""
    by_minisd, read, read_clip = {}, cache(picture.load), cache(picture.load_clip)

    def load(name, device):
        sd = copy.deepcopy(read(name, device))
        sd.schedule = sd.config.schedule()  # which a student may make, as where a model is loaded now
        return sd

    def pixels(name, function):
        kind = caption(name)
        if function is None and kind in by_minisd:  # with minisd's own function, their picture is the same
            return by_minisd[kind]
        steps = 2 if name in LONG else 4
        try:
            image = picture.drawn_with(function, name, "a large red circle", "tiny", steps, seed=0)
        except Exception:
            return None
        array = np.asarray(image, dtype=int)
        if function is None:
            by_minisd[kind] = array
        return array

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picture, "sample", cache(picture.sample))
        patch.setattr(picture, "load", load)
        patch.setattr(picture, "load_clip", lambda name: copy.deepcopy(read_clip(name)))  # it is trained further
        yield pixels


LONG = ["kl", "vae_loss", "straight_through", "vq_loss", "contrastive_loss"]  # an autoencoder or CLIP is trained first


@pytest.mark.filterwarnings("ignore:the prompt is longer")
@pytest.mark.parametrize("name", EXERCISES)
def test_the_pipeline_draws_with_a_students_function(name, drawn):
    """The same picture with the right one, another with a wrong one."""
    exercise = EXERCISES[name]

    def pixels(function):
        return drawn(name, function)

    ours = pixels(None)
    right = pixels(exercise.compile())
    assert right.shape == ours.shape and abs(right - ours).max() <= 2
    for mistake in exercise.mistakes:
        wrong = pixels(exercise.compile(mistake.edit(exercise.solution)))
        if wrong is not None and (wrong.shape != ours.shape or abs(wrong - ours).max() > 30):
            return
    pytest.fail("no mistake changes the picture: the student's function is not in use")


def test_only_inside_the_swap():
    real = minisd.NoiseSchedule.q_sample
    with pytest.raises(ZeroDivisionError), swap("q_sample", q_sample):
        assert minisd.NoiseSchedule.q_sample is not real
        raise ZeroDivisionError
    assert minisd.NoiseSchedule.q_sample is real


def test_kl_is_swapped_into_the_autoencoder():
    posterior = minisd.DiagonalGaussianDistribution(torch.randn(2, 8, 3, 5))
    with swap("kl", lambda mean, logvar: mean[:, 0, 0, 0]):
        assert torch.equal(posterior.kl(), posterior.mean[:, 0, 0, 0])
    with swap("kl", EXERCISES["kl"].compile()):
        inside = posterior.kl()
    assert torch.allclose(inside, posterior.kl())


@pytest.mark.parametrize("name", ["contrastive_loss", "pooled_state", "patchify"])
def test_clip_is_trained_with_a_students_function(name):
    from minisd.training import clip as training_clip

    clip, tokenizer = minisd.load_clip("emoji")
    ids = tokenizer(["a fox", "a red apple", "a rocket"], clip.text_config.max_length).ids
    pictures = torch.randn(3, 3, clip.vision_config.image_size, clip.vision_config.image_size)

    def loss():
        return training_clip.contrastive_loss(clip(ids, pictures)).item()

    ours, exercise = loss(), EXERCISES[name]
    with swap(name, exercise.compile()):
        assert loss() == pytest.approx(ours, rel=1e-4)
    wrong = {"contrastive_loss": "You used only one", "pooled_state": "You took the start", "patchify": "You put the"}
    mistake = next(m for m in exercise.mistakes if m.sentence.startswith(wrong[name]))
    with swap(name, exercise.compile(mistake.edit(exercise.solution))):
        assert loss() != pytest.approx(ours, rel=1e-4)


def test_an_exercise_without_a_place_in_minisd_says_so():
    with pytest.raises(ValueError, match="vae_loss cannot be swapped in. minisd has no place for it"):
        with swap("vae_loss", print):
            pass
    with pytest.raises(ValueError, match="no exercise 'nonsense'"):
        draw("nonsense", print)


def test_a_function_that_leads_to_no_picture_is_answered_in_one_sentence(capsys):
    assert draw("q_sample", lambda x_0, t, noise, bar: x_0[:, :2], "a red circle", "tiny", steps=2) is None
    said = capsys.readouterr().out
    assert re.fullmatch(r"With your q_sample, minisd cannot draw a picture. It raises \w+: .+\n", said)


def test_yours_stands_beside_what_it_should_be_for_each_prompt():
    """The wrong picture on the left, the right one on the right, each as it is drawn alone."""
    prompts = ["a large red circle", "a small blue square"]
    wrong = EXERCISES["guidance"].compile("return eps_uncond")
    page = draw("guidance", wrong, prompts, "tiny", steps=2)
    alone = [picture.drawn_with(f, "guidance", prompts, "tiny", 2, 0) for f in (wrong, None)]
    width, height = alone[0].size
    above = page.height - height
    assert page.width >= 2 * width and above > 10
    columns = [page.crop((x, above, x + width, page.height)) for x in (0, page.width - width)]
    assert [column.tobytes() for column in columns] == [image.tobytes() for image in alone]
    assert alone[0].tobytes() != alone[1].tobytes()
    for x in (0, page.width - width):  # each has its label
        assert page.crop((x, 0, x + width, above)).convert("L").getextrema()[0] < 100
    one = picture.drawn_with(None, "guidance", prompts[:1], "tiny", 2, 0)
    assert draw("guidance", prompt=prompts, model="tiny", steps=2).height > 1.9 * one.height, "a row for each prompt"


def test_the_table_of_pictures_names_exercises_and_samplers():
    tables = texts.read("pictures.toml")
    assert set(tables["exercises"]) | {"drawn"} == set(picture.PICTURES)
    named = [name for names in tables["exercises"].values() for name in names]
    assert len(named) == len(set(named)) and {*named, *tables["samplers"]} <= set(EXERCISES)
    assert set(tables["samplers"].values()) <= set(minisd.sampling.SAMPLERS)


def test_every_picture_has_a_caption():
    assert all(re.fullmatch(r"[A-Z].*\.", caption(name)) for name in EXERCISES)


# --- the command line and the notebooks -------------------------------------------------------------------------------


def test_the_command_line_lists_and_shows(capsys):
    main(["list"])
    assert len(capsys.readouterr().out.splitlines()) == len(EXERCISES)
    main(["show", "kl", "--hints", "1"])
    out = capsys.readouterr().out
    assert "raise NotImplementedError" in out and "Hint 1" in out and "Hint 2" not in out
    with pytest.raises(SystemExit, match="no exercise 'nonsense'"):
        main(["show", "nonsense"])


def test_the_command_line_checks_a_file(tmp_path, capsys):
    answers = tmp_path / "answers.py"
    answers.write_text("def snr(t, alphas_cumprod):\n    a = alphas_cumprod[t]\n    return a / (1 - a)\n")
    main(["check", str(answers)])
    assert "1 of 1 are right" in capsys.readouterr().out
    answers.write_text("def snr(t, alphas_cumprod):\n    return alphas_cumprod[t]\n")
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(answers)])
    assert stopped.value.code == 1 and "Divide it by the variance of the noise" in capsys.readouterr().out
    answers.write_text("x = 1\n")
    with pytest.raises(SystemExit, match="no function with the name"):
        main(["check", str(answers)])
    with pytest.raises(SystemExit, match="there is no file"):
        main(["check", str(tmp_path / "nowhere.py")])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for form in FORMS:
        export(folder / form, form)
    return folder


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_students_get_stubs_and_teachers_solutions(exported):
    students, teachers = (sorted((exported / "plain" / kind).glob("*.ipynb")) for kind in ("exercises", "solutions"))
    assert (
        [p.name for p in students]
        == [p.name for p in teachers]
        == [f"{i:02}_{s}.ipynb" for i, s in enumerate(STAGES, 1)]
    )
    for theirs, ours in zip(students, teachers, strict=True):
        exercises = [e for e in EXERCISES.values() if e.stage == theirs.stem[3:]]
        theirs, ours = (["\n".join(c.source for c in read(path).cells)][0] for path in (theirs, ours))
        for exercise in exercises:
            assert exercise.stub.strip() in theirs and exercise.solution not in theirs
            assert exercise.answer.strip() in ours
            assert f"check.{exercise.name}({exercise.name})" in theirs
            assert theirs.count("<summary>Hint 1") == len(exercises)


def test_the_notebooks_that_ship_are_what_the_source_makes(exported):
    ship, made = ({p.name: p.read_text("utf-8") for p in sorted(folder.glob("*"))}
                  for folder in (NOTEBOOKS, exported / "plain/exercises"))  # fmt: skip
    assert ship == made, "make them anew: python -m minisd.coursework export notebooks --no-solutions --overwrite"


@pytest.mark.parametrize("stage", STAGES)
def test_a_notebook_runs_from_start_to_end_when_it_is_filled_in(stage, run_notebook):
    """All its checks, and one drawing: test_the_pipeline_draws_with_a_students_function makes the others."""
    notebook = read(next(NOTEBOOKS.glob(f"*_{stage}.ipynb")))
    exercises = [exercise for exercise in EXERCISES.values() if exercise.stage == stage]
    stubs = {exercise.stub.strip(): exercise.answer for exercise in exercises}
    drawings = [cell for cell in notebook.cells if "\ndraw(" in cell.source]
    notebook.cells = [cell for cell in notebook.cells if cell not in drawings[1:]]
    for cell in notebook.cells:
        cell.source = stubs.get(cell.source, cell.source)
    run_notebook(notebook, NOTEBOOKS, timeout=120)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert said.splitlines() == [f"{exercise.name}: right." for exercise in exercises]
    assert len(drawings) == len(exercises) and "image/png" in drawings[0].outputs[0].data


def test_a_notebook_that_is_not_filled_in_says_so_and_goes_on(capsys):
    namespace = {}
    for cell in read(NOTEBOOKS / "04_vae.ipynb").cells[:12]:
        if cell.cell_type == "code":
            exec(cell.source, namespace)
    said = capsys.readouterr().out
    for name in ("sample_posterior", "kl"):
        assert f"{name} is not written yet. Write it in the place of the line `raise NotImplementedError`" in said
        assert f"`check.{name}.hint()` prints a hint." in said
        assert f"{name} is not written yet, so there is nothing to draw with." in said


def test_nbgraders_cells(exported):
    cells = read(exported / "nbgrader/source/01_noising/01_noising.ipynb").cells
    marked = {c.metadata.nbgrader.grade_id: c for c in cells if "nbgrader" in c.metadata}
    own, graded = marked["q_sample"], marked["check_q_sample"]
    assert own.metadata.nbgrader.solution and not own.metadata.nbgrader.grade
    assert "    ### BEGIN SOLUTION\n" in own.source and "    ### END SOLUTION" in own.source
    assert graded.metadata.nbgrader.grade and graded.metadata.nbgrader.locked
    assert graded.metadata.nbgrader.points == EXERCISES["q_sample"].difficulty
    assert graded.source == "check.q_sample(q_sample).expect()"
    with pytest.raises(AssertionError, match="written yet"):
        exec(graded.source, {"check": check, "q_sample": _compiled(EXERCISES["q_sample"].stub, EXERCISES["q_sample"])})


def test_otters_cells(exported):
    cells = read(exported / "otter/01_noising/01_noising.ipynb").cells
    raws = [c.source.splitlines()[0] for c in cells if c.cell_type == "raw"]
    count = sum(e.number == 1 for e in EXERCISES.values())
    assert raws[0] == "# ASSIGNMENT CONFIG"
    one = ["# BEGIN QUESTION", "# BEGIN SOLUTION", "# END SOLUTION", "# BEGIN TESTS", "# END TESTS", "# END QUESTION"]
    assert raws[1:] == one * count
    tests = next(c.source for c in cells if "def test_snr(snr)" in c.source)
    exec(tests, {"snr": EXERCISES["snr"].compile()})
    with pytest.raises(AssertionError, match="noise to signal"):
        exec(tests, {"snr": lambda t, bar: (1 - bar[t]) / bar[t]})


def test_an_unknown_form_is_refused(tmp_path):
    with pytest.raises(ValueError, match="plain, nbgrader, otter"):
        export(tmp_path, "pdf")


@pytest.mark.parametrize("form", FORMS)
def test_a_notebook_in_which_somebody_has_worked_is_not_overwritten(tmp_path, form):
    paths = export(tmp_path, form)
    assert export(tmp_path, form) == paths, "what has not been changed may be written again"
    paths[-1].write_text("my answers", "utf-8")
    paths[0].unlink()
    with pytest.raises(ValueError, match=f"{paths[-1].name} has been changed: give another folder, or .* --overwrite"):
        export(tmp_path, form)
    assert paths[-1].read_text("utf-8") == "my answers" and not paths[0].exists(), "nothing is written, or all"
    export(tmp_path, form, overwrite=True)
    assert "nbformat" in paths[-1].read_text("utf-8") and paths[0].exists()


def test_a_full_disk_leaves_the_notebook_that_would_be_replaced(tmp_path, monkeypatch):
    path = export(tmp_path)[0]
    path.write_text("my answers", "utf-8")

    def full_disk(file, *_, **__):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left on device.*what was there before is untouched"):
        export(tmp_path, overwrite=True)
    assert path.read_text("utf-8") == "my answers" and not list(tmp_path.rglob("*.unfinished"))


def test_the_teachers_page_is_up_to_date():
    page = (ROOT / "docs/coursework.md").read_text("utf-8")
    assert table() in page, "print it anew: python -c 'from minisd.coursework.export import table; print(table())'"
    assert "coursework" in (ROOT / "docs/index.md").read_text("utf-8")
    known = sum(len(e.mistakes) for e in EXERCISES.values())
    assert f"{len(EXERCISES)} exercises" in page and f"{known} mistakes" in page
    assert json.dumps(coursework.STAGES) and all(stage in page for stage in STAGES)
