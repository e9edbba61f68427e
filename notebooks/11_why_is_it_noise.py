# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 11 · Why is it noise? Every classic mistake, made on purpose
#
# Something is wrong with the pictures. There is no error message, all shapes fit, and the loss looks as it should.
# Where do you begin?
#
# The naive way is to look at the picture and guess. So let us see how far that leads. This notebook takes a model
# that works, and breaks it in some fifty ways: those that people report again and again. Each time it shows the
# **symptom** as a picture, names the **cause**, and gives the **test** that would have caught it, a few lines that
# pass on the healthy model and fail on the broken one.
#
# You will understand
#
# - which numbers a healthy run shows, so that you have a yardstick;
# - what each mistake looks like, when drawing and when training, and why so few of them give noise;
# - why the worst mistakes are those that one can't see, and what an equality test is for;
# - in which order to look.
#
# About 95 minutes to read; it takes about two minutes of one processor's time. You need notebooks
# [01](01_noising.ipynb), [02](02_loss.ipynb), [06](06_sampling.ipynb) and [07](07_latent_diffusion.ipynb); before this
# one comes [notebook 10](10_evaluation.ipynb), which measures how good a healthy model is. In a hurry, with a sick
# model? The table is at the end.
#
# Names such as "diffusers#271" are public threads on GitHub (number 271 of huggingface/diffusers) in which people
# describe that symptom.
#
# To see in your browser what a healthy step looks like, open the stop [One step](../docs/play.md#tour=step) of the
# guided tour.

# %% [markdown] tags=["colab"]
# <details><summary>To run this notebook in Colab</summary>
#
# Upload the folder of minisd as `upload.zip`, and run this in a new cell above
# ([more about it](../docs/install.md#colab-and-other-notebooks-in-the-cloud)):
#
# ```text
# !unzip -q upload.zip && pip install -q "./minisd[data]"
# %cd minisd/notebooks
# ```
#
# </details>

# %% tags=["parameters"]
MODE = "full"  # "smoke": every line runs, on so little that the figures mean nothing

# %%
import copy
import time
import warnings
from math import sqrt

import torch
import torch.nn.functional as F
from torch import nn

import minisd
from minisd import sampling, viz
from minisd.coursework import check
from minisd.data import sample, shapes
from minisd.training.trainer import EMA

torch.set_grad_enabled(False)  # until we train
full = MODE == "full"
start = time.time()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## A healthy run, and its numbers
#
# The model that ships, three prompts, 20 steps of DDIM, guidance 4. `draw` is all that we need: an eps_model, $x_T$
# and a schedule go in, latents come out. Most mistakes below are a change of one of the three.

# %%
sd = minisd.load(device="cpu")
schedule = sd.schedule
names = ["fox", "rocket", "red heart"]
prompts = [f"a {name}, noto style" for name in names]
steps = 20 if full else 2

x_T = sampling.randn((3, 4, 8, 8), [seeded(k) for k in range(3)])  # [3 4 8 8]
context = sd.get_learned_conditioning(prompts)  # [3 24 192]
empty = sd.get_learned_conditioning([""])  # [1 24 192]


def guided(model=sd, context=context, empty=empty, scale=4.0):
    """An eps_model(x, t): ε(∅) + s (ε(c) - ε(∅))."""
    return minisd.classifier_free_guidance(model.apply_model, context, empty, scale)


def eps_of(x, t):
    """The healthy answer, guided: ε alone."""
    return guided()(x, t).eps


def draw(eps_model=eps_of, x=x_T, schedule=schedule):
    *_, last = sampling.ddim(eps_model, x, schedule, steps, spacing="trailing", set_alpha_to_one=True)
    return last.x


z = draw()
healthy = sd.decode_first_stage(z)
print(f"latents {list(z.shape)}, std {z.std():.2f}   pictures {list(healthy.shape)}")
viz.strip([healthy], names)

# %% [markdown]
# Now the yardstick. On the way from noise to picture, three things have a size that you can know beforehand. $x_t$
# has a standard deviation of about 1 at every $t$ (the forward process preserves variance, notebook 01; guidance adds
# a little). So has the predicted noise. The guess $\hat x_0$ ends with the spread of the data; at first it is a blur,
# which guidance exaggerates (the printed line has both).

# %%
path = list(sampling.ddim(guided(), x_T, schedule, steps, spacing="trailing", set_alpha_to_one=True))
times = [step.t for step in path]
lines = {name: (times, [getattr(step, name).std() for step in path]) for name in ("x_t", "eps", "x0")}

corpus = sample(size=32)
some = torch.randperm(len(corpus), generator=seeded(0))[: 48 if full else 8]
pictures = corpus.batch(some)  # real pictures, [48 3 32 32]
captions = [corpus.captions[i] for i in some]
latents = sd.get_first_stage_encoding(sd.encode_first_stage(pictures), seeded(0))  # [48 4 8 8]
contexts = sd.get_learned_conditioning(captions)  # [48 24 192]
noise = torch.randn(latents.shape, generator=seeded(1))


def loss_at(t, told=None, contexts=contexts, model=sd):
    """The loss of real pictures at t; `told` is the time that the model is told."""
    x_t = schedule.q_sample(latents, torch.full((len(latents),), t), noise)
    answer = model.apply_model(x_t, torch.full((len(latents),), t if told is None else told), contexts)
    return (answer - noise).square().mean().item()


grid = [1, 50, 100, 200, 400, 600, 800, 980] if full else [100, 900]
lines_of_loss = {"right caption": (grid, [loss_at(t) for t in grid])}
lines_of_loss["wrong caption"] = (grid, [loss_at(t, contexts=contexts.roll(1, dims=0)) for t in grid])

print(f"pictures        {pictures.min():.2f} to {pictures.max():.2f}")
print(f"latents         std {latents.std():.2f}, mean {latents.mean():.2f}")
print(f"x_T             std {x_T.std():.2f}, mean {x_T.mean():.2f}")
print(f"context         std {context.std():.2f}")
first = path[0]
x0 = schedule.predict_start_from_noise(first.x_t, torch.full((len(x_T),), first.t), first.eps_cond)
print(f"first guess     std {first.x0.std():.2f}, without guidance {x0.std():.2f}")
print(f"schedule        ᾱ_0 = {schedule.alpha_bar(0):.5f}, ᾱ_999 = {schedule.alpha_bar(999):.5f}")
panels = {"a drawing: standard deviations": lines, "real pictures: loss of ε": lines_of_loss}
viz.curves(panels, width=4.2, height=2.6)

# %% [markdown]
# The same drawing in pictures, of the fox: what went into each step, and what the model had in mind.

# %%
shown = path[:: max(1, len(path) // 6)]
rows = [sd.decode_first_stage(torch.cat([getattr(step, field)[:1] for step in shown])) for field in ("x_t", "x0")]
viz.strip(rows, [f"t = {step.t}" for step in shown], ["$x_t$", r"$\hat x_0$"], size=0.64)

# %% [markdown]
# Noise thins out, and a coarse mask, glaring by guidance, becomes a fox. When a drawing is bad, look at this strip
# first: at which $t$ does $\hat x_0$ go wrong?
#
# Write such numbers down for every model that works. A mistake that moves one of them by a third is found by a `print`.
#
# One more number is needed: how large is a difference that means nothing? Below, each broken picture has the mean
# absolute difference from the healthy one written under it, on the scale where black is −1 and white is 1. As a
# comparison: the same prompt with another seed, and the picture of another prompt.


# %%
def apart(x, y=healthy):
    """Mean absolute difference of pictures as they are seen, [b]."""
    return (x.clamp(-1, 1) - y.clamp(-1, 1)).abs().mean(dim=(1, 2, 3))


other_seeds = sd.decode_first_stage(draw(x=sampling.randn(x_T.shape, [seeded(100 + k) for k in range(3)])))
another_seed, another_prompt = apart(other_seeds).mean().item(), apart(healthy.roll(1, dims=0)).mean().item()
print(f"another seed: {another_seed:.3f}      another prompt: {another_prompt:.3f}")

gallery = {}  # all broken pictures, by mistake, for the end


def show(mistakes, size=0.64):
    """A strip: healthy pictures above, each mistake in a row. mistakes: {name: latents or pictures}."""
    rows = {name: sd.decode_first_stage(x) if x.shape[1] == 4 else x for name, x in mistakes.items()}
    gallery.update(rows)
    notes = [[], *([f"{v:.3f}" for v in apart(x)] for x in rows.values())]
    return viz.strip([healthy, *rows.values()], names, ["healthy", *rows], notes, size=size)


def caught(test, right, wrong):
    """A test must pass on the right thing. Then try it on wrong ones, {name: thing}."""
    test(right)
    for name, thing in wrong.items():
        try:
            test(thing)
        except AssertionError as error:
            print(f"{name:28} caught: {error}")
        else:
            print(f"{name:28} NOT caught")


# %% [markdown]
# ## Part 1: mistakes at drawing time
#
# We walk along the path of a picture, from file to file, and break one part after the other.
#
# ### The file: from pixels to numbers and back
#
# A file holds bytes, 0 to 255, pixel after pixel: [height, width, 3], in the order red, green, blue. The network wants
# [3, height, width] in $[-1, 1]$. On the way in and out, five things go wrong:
#
# - **[0, 1]**: `x / 255`, and not `x / 127.5 - 1`. Here: on the way in.
# - **BGR**: OpenCV reads and writes blue first.
# - **reshape**: `reshape(3, h, w)` in place of `permute(2, 0, 1)`. The shape is right.
# - **no (x + 1) / 2** on the way out: `x * 255`.
# - **no clamp** on the way out: 1.02 becomes 258, and a byte that can't hold 258 begins again at 0.
#
# **Predict, then run.** Which of them makes pictures pale? Which makes a fox blue? Which is the mosaic?

# %%
bytes_in = ((healthy.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)  # as in a file: [3 32 32 3], 0 to 255


def load(pixels):  # [h w 3] in 0 … 255 -> [3 h w] in [-1, 1]
    return pixels.permute(2, 0, 1) / 127.5 - 1


def save(x):  # and back
    return ((x.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0)


loaders = {
    "[0, 1]": lambda p: p.permute(2, 0, 1) / 255,
    "BGR": lambda p: load(p.flip(2)),
    "reshape": lambda p: p.reshape(3, *p.shape[:2]) / 127.5 - 1,
}
savers = {
    "no (x + 1) / 2": lambda x: (x * 255).clamp(0, 255).round().permute(1, 2, 0),
    "no clamp": lambda x: ((x + 1) * 127.5).round().permute(1, 2, 0) % 256,
}
as_read = {name: torch.stack([f(p) for p in bytes_in]) for name, f in loaders.items()}
again = {name: sd.decode_first_stage(sd.get_first_stage_encoding(sd.encode_first_stage(x).mode()))
         for name, x in as_read.items()}  # fmt: skip
written = {name: torch.stack([load(f(x)) for x in healthy]) for name, f in savers.items()}
show(again | written)

# %% [markdown]
# (The first three rows went through the autoencoder, so they are a little softer for that reason alone.)
#
# - **[0, 1]** is pale: $(x+1)/2$ has half of the contrast, and black has become grey. Threads call it "whited out"
#   (mlcommons/training#721); SVD_Xtend#16 had trained so.
# - **BGR** turns what is red and orange blue. In sd-webui-deforum#8 only the files had it, and the previews
#   were right: that says where to look.
# - **reshape** cuts the picture into pieces: three numbers of one pixel become three neighbours.
# - **no (x + 1) / 2**: all that was darker than grey is black, and colours are pure.
# - **no clamp**: confetti wherever it was white. White is 1 give or take a little, and what is above begins again at 0.
#
# **The test.** One picture catches them all, if it is chosen well: orange, so that the three channels differ, and are
# the two ends of the range and its middle; wider than high, so that the axes differ; and saved from a little beyond
# the range. (Our first test picture was pure red. It missed the fourth mistake: 0 and 1 times 255 are right at both
# ends.)


# %%
def test_an_orange_picture_survives(functions):
    load, save = functions
    orange = torch.tensor([255.0, 128, 0]).expand(4, 8, 3)  # 4 high, 8 wide
    x = load(orange)
    assert x.shape == (3, 4, 8), f"shape {list(x.shape)}"
    values = [round(v, 1) for v in x[:, 0, 0].tolist()]
    assert (x[0] == 1).all() and (x[2] == -1).all() and x[1].abs().max() < 0.01, f"orange becomes {values}"
    assert torch.equal(save(1.02 * x), orange), f"orange comes back as {save(1.02 * x)[0, 0].tolist()}"


wrong = {name: (f, save) for name, f in loaders.items()} | {name: (load, f) for name, f in savers.items()}
caught(test_an_orange_picture_survives, (load, save), wrong)

# %% [markdown]
# ### The latent: the scale factor
#
# Latents are multiplied by `scale_factor` after encoding, so that they have variance 1, and divided by it before
# decoding. Ours is 0.628. Stable Diffusion's is 0.18215, as its latents have a standard deviation of about 5.5.
#
# - **forgotten**: $z$ is decoded as it is. With our factor, it arrives 0.63 times as large as it should.
# - **forgotten, as in SD v1**: the same where the factor is 0.18215: 0.18 times as large.
# - **0.18215**: the number was copied from a tutorial, but the autoencoder is another.
# - **clamped**: $\hat x_0$ is kept to $[-1, 1]$ at each step. DDPM's code does that, and it is right for pixels.
#
# **Predict, then run.** Which one is pale, which is glaring, which is hardly there? And what has a clamp to do with
# colours?


# %%
def clamped(x, t):
    x0 = schedule.predict_start_from_noise(x, t, eps_of(x, t)).clamp(-1, 1)
    return schedule.predict_noise_from_start(x, t, x0)


factor = sd.scale_factor
show({
    "forgotten": z * factor,
    "forgotten, as in SD v1": z * 0.18215,
    "0.18215": z * factor / 0.18215,
    "clamped": draw(clamped),
})  # fmt: skip

# %% [markdown]
# The latent's direction says *what* is there, its length *how much* (notebook 07). Too short is pale, with scratches;
# much too short is a pink ghost; too long is glaring, with black outlines. Clamped latents lose what is beyond ±1, and
# that is a good part:

# %%
print(f"share of the numbers of healthy latents beyond ±1: {(latents.abs() > 1).float().mean():.0%}")

# %% [markdown]
# So colours and contrast go. (diffusers#271: DDIM works "only if clip_sample=False"; kohya-ss/sd-scripts#1432:
# samples during training looked bad for that reason alone. Scale factor: diffusers#5166, where it was missing at the
# decoder; CompVis/latent-diffusion#187, where it was the suspect at the encoder.)
#
# **The test.** The first idea is a round trip: encode, decode, compare. Try it on a program that forgot the factor on
# the way out, in, and on **both**.


# %%
def test_round_trip(encode_decode):
    encode, decode = encode_decode
    error = apart(decode(encode(pictures[:8])), pictures[:8]).mean()
    assert error < 1.2 * floor, f"error {error:.3f}"


def test_unit_variance(encode_decode):
    std = encode_decode[0](pictures).std()
    assert 0.8 < std < 1.25, f"std of the latents {std:.2f}"


def encode(x):
    return sd.get_first_stage_encoding(sd.encode_first_stage(x).mode())


def decode(z):
    return sd.decode_first_stage(z)


def decode_forgetful(z):
    return sd.first_stage_model.decode(z)


def encode_forgetful(x):
    return encode(x) / factor


floor = apart(decode(encode(pictures[:8])), pictures[:8]).mean()  # what this autoencoder loses when all is right
wrong = {
    "forgotten on the way out": (encode, decode_forgetful),
    "on the way in": (encode_forgetful, decode),
    "on both": (encode_forgetful, decode_forgetful),
}
for test in (test_round_trip, test_unit_variance):
    print(test.__name__)
    caught(test, (encode, decode), wrong)

# %% [markdown]
# A mistake made twice passes the round trip: what comes back is perfect, and the UNet would be shown latents of the
# wrong size. The second test looks at the number *between*, and misses what happens after it. Together they catch all
# three. **Test each interface, not only the ends.** (`tests/test_latent_diffusion.py`:
# `test_latents_are_scaled_on_the_way_in_and_back_on_the_way_out`.)
#
# ### The schedule
#
# Stable Diffusion's $\sqrt\beta$ is linear, from 0.00085 to 0.012; diffusers and minisd call this `scaled_linear`.
# CompVis calls it `"linear"`, and there lies the trap (CompVis/stable-diffusion#314, ComfyUI#1998).
#
# - **linear**: the right ends, but $\beta$ itself is linear.
# - **DDPM's**: linear from 0.0001 to 0.02, the default of many a tutorial.
# - **cosine**: a schedule that reaches $\bar\alpha = 0$, or nearly.
#
# **Predict, then run.** Which of the three would you notice, without the first row to compare with?

# %%
schedules = {
    "linear": minisd.NoiseSchedule.linear(0.00085, 0.012),
    "DDPM's": minisd.NoiseSchedule.linear(),
    "cosine": minisd.NoiseSchedule.cosine(),
}
show({name: draw(schedule=s) for name, s in schedules.items()})

# %%
log_snr = schedule.log_snr(torch.arange(1000))
print("the wrong schedule has as much noise at t = 250, 500, 750 as the right one has at")
for name, s in schedules.items():
    at = [(log_snr - s.log_snr(torch.tensor([t]))).abs().argmin().item() for t in (250, 500, 750)]
    print(f"    {name:8} {at}     1/√ᾱ_999 = {s.alpha_bar(999) ** -0.5:,.0f}")
viz.schedule_curves({"scaled_linear": schedule} | schedules)

# %% [markdown]
# **A wrong schedule is a wrong time** (notebook 01: a schedule is a clock). With `linear`, the model is told a $t$
# that is some 60 to 100 steps too small for the noise that is there, and it hardly minds. With DDPM's it is up to
# 250, and contrast grows. The cosine schedule ends at an $\bar\alpha$ of nearly 0, and the first step divides by its
# root: whatever is wrong with $\epsilon$ is multiplied by 20,000. That one can be seen: it is a glaring poster.
#
# With a larger picture the slight ones show as a grain: in echomimic#127 the background was noisy until inference took
# the schedule of the training.
#
# **The test.** No property tells `linear` from `scaled_linear`: both are valid schedules. Two numbers of the
# reference do.


# %%
def test_schedule_is_the_checkpoints(schedule):
    first, middle, last = (schedule.alpha_bar(t) for t in (0, 500, 999))
    assert abs(middle - 0.2763) < 1e-3 and abs(last - 0.0047) < 1e-4, f"ᾱ {first:.4f} … {middle:.4f} … {last:.4f}"


caught(test_schedule_is_the_checkpoints, schedule, schedules)

# %% [markdown]
# This is an **equality test**: the number comes from somewhere else, from the official model. Remember the kind: more
# than once below, no other will do. (`tests/test_noising.py`: `test_alphas_cumprod_equal_the_references`.)
#
# ### The time
#
# The model is told $t$, a whole number between 0 and 999. Tell it something else:
#
# - **t − 1**: off by one. **t + 50**: the timestep of the step before, with our 20 steps.
# - **999 − t**: the order is reversed.
# - **t / 1000**: somebody thought that times are in $[0, 1]$.
# - **always 500**: $t$ is not handed on.
#
# **Predict, then run.** Which of these give noise?

# %%
clocks = {
    "t - 1": lambda t: (t - 1).clamp(min=0),
    "t + 50": lambda t: (t + 50).clamp(max=999),
    "999 - t": lambda t: 999 - t,
    "t / 1000": lambda t: t / 1000,
    "always 500": lambda t: torch.full_like(t, 500),
}
show({name: draw(lambda x, t, clock=clock: eps_of(x, clock(t))) for name, clock in clocks.items()})

# %% [markdown]
# None of them, for this model! Off by one is invisible. Even with the times reversed one sees a fox. Can the network do
# without $t$? Look at the loss: the right noise, and a wrong time beside it.

# %%
offsets = [-200, -100, -50, -20, -1, 0, 1, 20, 50, 100, 200] if full else [-1, 0, 200]
told = {f"t = {t}": (offsets, [loss_at(t, t + d) for d in offsets]) for t in (300, 600)}
for name, (_, loss) in told.items():
    at = dict(zip(offsets, loss, strict=True))
    print(f"{name}: loss {at[0]:.4f}, told t - 1 {at[-1]:.4f}, told t + 200 {at[200]:.4f}")
viz.curves({"loss, if the model is told t + d": told}, xlabel="d", width=5.5)

# %% [markdown]
# A valley with a flat floor. The network can see for itself how noisy its input is, it seems, and $t$ only helps.
# Ours knows its few thousand pictures well; a larger model need not be as forgiving. So do not conclude that $t$ does
# not matter, conclude that **a picture can't tell you whether $t$ is right**. Nor can the loss: off by one changes it
# in the fourth digit.
#
# (DDIM's `+ 1` has its own threads: latent-diffusion#136, CompVis/stable-diffusion#686. What did show, to sharp
# eyes, was a last step that did not lead to the clean picture: "smudgy", in diffusers#6068.)
#
# **The test** compares with what the reference visits: 50 steps are 981, 961, … 1.


# %%
def test_timesteps_are_compvis(timesteps):
    ends = timesteps[0], timesteps[1], timesteps[-1]
    assert len(timesteps) == 50 and ends == (981, 961, 1), f"{len(timesteps)} steps, {ends}"


times = sampling.make_timesteps(50, 1000)
wrong = {"off by one": [t - 1 for t in times], "reversed": times[::-1], "fractions": [t / 1000 for t in times]}
caught(test_timesteps_are_compvis, times, wrong)
try:
    next(sampling.ddim(eps_of, x_T, schedule, timesteps=times[::-1]))
except ValueError as error:
    print(f"minisd says: {str(error)[:62]} …")

# %% [markdown]
# (`tests/test_sampling.py`: `test_leading_timesteps_equal_compvis`. And `extract_into_tensor` refuses a $t$ that is no
# integer, or out of range: an error at once is the best test.)
#
# ### The answer: ε, x₀ or v
#
# The network answers with a tensor of the shape of $x$. Three answers are in use, and the shape doesn't say which:
# $\epsilon$ (SD v1), the picture $x_0$, or (SD 2 at 768 pixels)
#
# $$v = \sqrt{\bar\alpha}\;\epsilon - \sqrt{1-\bar\alpha}\;x_0.$$
#
# Ours is $\epsilon$. Take one for the other, or get a sign wrong:

# %%
def v_of(x, t):
    """What a model of v would answer, which knows what ours knows."""
    eps = eps_of(x, t)
    return schedule.get_v(schedule.predict_start_from_noise(x, t, eps), eps, t)


taken = {
    "ε taken for x0": lambda x, t: schedule.predict_noise_from_start(x, t, eps_of(x, t)),
    "ε taken for v": lambda x, t: schedule.predict_noise_from_v(x, t, eps_of(x, t)),
    "v taken for ε": v_of,
    "-ε": lambda x, t: -eps_of(x, t),
}
show({name: draw(f) for name, f in taken.items()})

# %% [markdown]
# Here it is at last: **noise**. If $\epsilon$ is taken for $x_0$, the sampler steers towards the noise, and is
# faithful. With the wrong sign, noise is added where it should be taken away, and the numbers explode.
#
# The other two are less plain: one is pale, one a glaring poster. Where there is much noise, $v \approx \epsilon$, so
# that the first steps are nearly right and decide on the picture; where there is little, $v \approx -x_0$, and the
# last steps go wrong. (A model of $v$ read as one of $\epsilon$ gave "unusably noisy" pictures in InvokeAI#7495.)
#
# **The test.** Ask the model about a mixture that you made yourself, and look which target its answer is nearest to.


# %%
def test_it_predicts_the_noise(model):
    t = torch.full((len(latents),), 300)
    answer = model(schedule.q_sample(latents, t, noise), t)
    targets = {"ε": noise, "x_0": latents, "v": schedule.get_v(latents, noise, t), "-ε": -noise}
    errors = {name: (answer - target).square().mean().item() for name, target in targets.items()}
    nearest = min(errors, key=errors.get)
    assert nearest == "ε", f"its answer is {nearest}: {', '.join(f'{n} {e:.2f}' for n, e in errors.items())}"


def ask(x, t):
    return sd.apply_model(x, t, contexts)


others = {
    "a model of x_0": lambda x, t: schedule.predict_start_from_noise(x, t, ask(x, t)),
    "a model of v": lambda x, t: schedule.get_v(schedule.predict_start_from_noise(x, t, ask(x, t)), ask(x, t), t),
    "a model of -ε": lambda x, t: -ask(x, t),
}
caught(test_it_predicts_the_noise, ask, others)

# %% [markdown]
# ### The step
#
# A step of DDIM takes the guess $\hat x_0$ and mixes it anew with a little less noise (notebook 06):
#
# $$x_{prev} = \sqrt{\bar\alpha_{prev}}\;\hat x_0 + \sqrt{1-\bar\alpha_{prev}-\sigma^2}\;\epsilon + \sigma z$$
#
# - **no roots**: $\bar\alpha\,\hat x_0 + (1-\bar\alpha)\,\epsilon$.
# - **β for ᾱ**: $\beta_t$ is looked up where $\bar\alpha$ belongs.
# - **no noise back**: $\sqrt{\bar\alpha}\,\hat x_0$, as one does want to be rid of it.
# - **too much noise**: $\sigma z$ is added, and $\sigma^2$ is not taken off under the root.
# - **other noise**: $z \sim \mathcal N(0, I)$ in the place of $\epsilon$.
# - **rand**: the step is right, but $x_T$ comes from `torch.rand`, not `torch.randn`: uniform in $[0, 1]$.


# %%
def by_hand(step, eps_model=eps_of, x=x_T, steps=steps):
    """DDIM with a step of your own: step(x0, eps, a_prev, z, t, sigma)."""
    times, g = sampling.make_timesteps(steps, 1000, "trailing"), seeded(5)
    for t, t_prev in zip(times, [*times[1:], None], strict=True):
        at, a_t = torch.full((len(x),), t), schedule.alpha_bar(t)
        a_prev = 1.0 if t_prev is None else schedule.alpha_bar(t_prev)
        sigma = sqrt((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev))  # η = 1, for the row that needs it
        eps = eps_model(x, at)
        x0 = schedule.predict_start_from_noise(x, at, eps)
        x = step(x0, eps, a_prev, torch.randn(x.shape, generator=g), t, sigma)
    return x


def right_step(x0, eps, a, z, t, sigma):
    return sqrt(a) * x0 + sqrt(1 - a) * eps


betas = schedule.betas.tolist()
wrong_steps = {
    "no roots": lambda x0, eps, a, z, t, sigma: a * x0 + (1 - a) * eps,
    "β for ᾱ": lambda x0, eps, a, z, t, sigma: sqrt(1 - betas[t]) * x0 + sqrt(betas[t]) * eps,
    "no noise back": lambda x0, eps, a, z, t, sigma: sqrt(a) * x0,
    "too much noise": lambda x0, eps, a, z, t, sigma: sqrt(a) * x0 + sqrt(1 - a) * eps + sigma * z,
    "other noise": lambda x0, eps, a, z, t, sigma: sqrt(a) * x0 + sqrt(1 - a) * z,
}
drawn = {name: by_hand(step) for name, step in wrong_steps.items()}
show(drawn | {"rand": draw(x=torch.rand(x_T.shape, generator=seeded(0)))})

# %% [markdown]
# Two are plain to see. With $\beta$ for $\bar\alpha$, the steps are told that hardly any noise is left, while nearly
# all is; the error is blown up each time, to a poster. Too much noise tears the picture into spots. The others? Pale,
# or smooth, or simply *another* fox. Without the first row, nobody would object.
#
# **The test.** Replace the network by the best denoiser there is: `ExactDenoiser`, which knows its data. With three
# numbers as data, a right sampler must end *at* one of the three (so the last step is right), and reach each equally
# often (so all steps are).


# %%
def test_three_numbers(step):
    data = torch.tensor([-1.4, 0.35, 1.05])
    x = by_hand(step, minisd.ExactDenoiser(data, schedule), torch.randn(2000, generator=seeded(2)), steps=100)
    distance, nearest = (x[:, None] - data).abs().min(dim=1)
    shares = nearest.bincount(minlength=3) / len(x)
    assert distance.mean() < 0.02, f"mean distance from the data {distance.mean():.2g}"
    assert (shares - 1 / 3).abs().max() < 0.08, f"shares {', '.join(f'{s:.0%}' for s in shares)}"


caught(test_three_numbers, right_step, wrong_steps)

# %% [markdown]
# All are caught, those included that one could not see. Look at the shares: with "no noise back" and "no roots" all
# points end at *one* number. Each drawing is fine, and they are all the same: what a single picture can't show.
# "Other noise" draws good foxes, too, and draws some too often. (DDPM also adds fresh noise, but as much as belongs
# there, and its shares are right.) The last row, `rand`, is no fault of a step. It is found by the first number of the
# yardstick: $x_T$ with a mean of 0.5 and a standard deviation of 0.29.
#
# (`tests/test_sampling.py`: `test_exact_denoiser_is_led_to_pictures_of_its_data`,
# `test_ddpm_restores_the_distribution_of_the_data`, `test_one_seed_one_picture`.)
#
# You need not write all these tests yourself. The [exercises](exercises/06_sampling.ipynb) bring a checker that names
# mistakes. Here is "too much noise", as a student would hand it in:


# %%
def ddim_step(x_t, eps, alpha_bar, alpha_bar_prev, eta, noise):
    x0 = (x_t - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
    sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)) ** 0.5
    return alpha_bar_prev**0.5 * x0 + (1 - alpha_bar_prev) ** 0.5 * eps + sigma * noise  # too much noise


check.ddim_step(ddim_step);

# %% [markdown]
# ### Guidance
#
# $\epsilon = \epsilon(\varnothing) + s\,(\epsilon(c) - \epsilon(\varnothing))$. One call answers for both, in the order
# [without, with the prompt].
#
# - **swapped**: the two halves of that call are taken the wrong way round.
# - **wrong sign**: $\epsilon(\varnothing) - s\,(\dots)$.
# - **s = 20**: more is not better.
# - **s = 1**: `guidance_scale` was not handed on. **s = 0**: only the answer without prompt is used.
# - **negative = zeros**: a tensor of zeros stands in for the context of the empty prompt.
#
# **Predict, then run.** "A fox" with the halves swapped: noise, a faint fox, or something else?


# %%
def combined(f):
    """An eps_model from f(uncond, cond)."""

    def eps_model(x, t):
        answer = guided()(x, t)
        return f(answer.uncond, answer.cond)

    return eps_model


formulas = {
    "swapped": lambda u, c: c + 4 * (u - c),
    "wrong sign": lambda u, c: u - 4 * (c - u),
    "s = 20": lambda u, c: u + 20 * (c - u),
    "s = 1": lambda u, c: u + 1 * (c - u),
    "s = 0": lambda u, c: u,
}
drawn = {name: draw(combined(f)) for name, f in formulas.items()}
show(drawn | {"negative = zeros": draw(guided(empty=torch.zeros_like(empty)))})

# %% [markdown]
# Swapped guidance draws what is *least* like a fox: where the fox is orange, there is blue and green. (It is guidance
# of the scale $1 - s = -3$.) The symptom to remember: **the higher the scale, the less of the prompt**. Much too high
# is torn, in harsh colours. At 1 the model is timid; at 0 it is fluent, and draws anything.
#
# **The test** needs no network: let a "model" answer with its context.


# %%
def test_guidance(combine):
    u, c = torch.tensor(10.0), torch.tensor(12.0)
    values = combine(u, c, 7.5).item(), combine(u, c, 1.0).item(), combine(u, c, 0.0).item()
    assert values == (25.0, 12.0, 10.0), f"{values} at s = 7.5, 1, 0, and not (25, 12, 10)"


def ours(u, c, s):  # minisd's own, asked with a model that hands its context back
    answer = minisd.classifier_free_guidance(lambda x, t, context: context, c.view(1, 1), u.view(1, 1), s)
    answer = answer(torch.zeros(1, 1), torch.zeros(1).long())
    return answer.eps[0, 0] if isinstance(answer, sampling.Guided) else answer[0, 0]


wrong = {
    "swapped": lambda u, c, s: c + s * (u - c),
    "wrong sign": lambda u, c, s: u - s * (c - u),
    "scale not handed on": lambda u, c, s: c,
    "the paper's w for s": lambda u, c, s: (1 + s) * c - s * u,
}
caught(test_guidance, ours, wrong)

# %% [markdown]
# The last one is a difference of convention, not of pictures: $s = 1 + w$. Taken for the other, 4 means 5, and nobody
# sees it. (`tests/test_sampling.py`: `test_guidance_extrapolates`,
# `test_guidance_asks_for_both_in_one_call_unconditional_first`.)
#
# ### The text
#
# CLIP's tower reads a fixed number of tokens: start, words, end, and then end tokens up to the length (77 in Stable
# Diffusion v1, 24 here). Each token sees only those before it.
#
# - **pad with 0**: the rest is filled with token 0, as SD 2 does.
# - **no padding**: the context ends with the longest prompt.
# - **no causal mask**: all tokens see all.
# - **no final norm**: the context is taken before the last LayerNorm.

# %%
embedder, tower = sd.cond_stage_model, sd.cond_stage_model.transformer
ids, nothing = embedder.tokenize(prompts), embedder.tokenize([""])  # [3 24], [1 24]
end = embedder.tokenizer.end_token
print("a fox, noto style:", ids[0, :10].tolist(), "…")


def padded_with_0(ids):
    after = (ids == end).cumsum(dim=1) > 1  # all end tokens but the first
    return ids.masked_fill(after, 0)


all_see_all = copy.deepcopy(tower)
for layer in all_see_all.text_model.encoder.layers:
    layer.self_attn.causal = False

longest = (ids == end).int().argmax(dim=1).max() + 1
readers = {
    "pad with 0": lambda ids: tower(padded_with_0(ids)),
    "no padding": lambda ids: tower(ids[:, :longest]),
    "no causal mask": all_see_all,
    "no final norm": lambda ids: tower.text_model.encoder(tower.text_model.embeddings(ids)),
}
show({name: draw(guided(context=read(ids), empty=read(nothing))) for name, read in readers.items()})

# %% [markdown]
# All prompts are still drawn. They are drawn *worse*: other colours, ears lost. No single picture shows it, and so
# these mistakes live for years. (Stability-AI/stablediffusion#28, InvokeAI#2378, diffusers#2201: two versions of
# Stable Diffusion pad differently, and each is right for itself. With a prompt of 5 tokens, 19 of our 24 are padding,
# and the UNet looks at them like at any other.)
#
# **The test.** Equality with transformers would find all four (`tests/test_clip.py`:
# `test_the_last_hidden_state_equals_transformers`; `tests/test_tokenizer.py`:
# `test_ids_equal_transformers_token_for_token`). Without it, properties help: the length, the size of the numbers, and
# that a later token changes nothing before it.


# %%
def test_context(read):
    context = read(ids)
    assert context.shape[1] == 24, f"{context.shape[1]} tokens, not 24"
    changed = ids.clone()
    changed[:, -1] = 7  # another last token
    early = (read(changed)[:, :-1] - context[:, :-1]).abs().max()
    assert early < 1e-4, f"a later token changes those before it by {early:.2g}"
    gain, shift = tower.text_model.final_layer_norm.weight, tower.text_model.final_layer_norm.bias
    normed = ((context - shift) / gain).std(dim=-1)
    assert (normed - 1).abs().max() < 0.05, f"std of a token, norm undone: {normed.min():.2f} to {normed.max():.2f}"


caught(test_context, tower, readers)

# %% [markdown]
# "Pad with 0" passes: it breaks no law, it is only not what this tower learned with. Again, only a comparison with the
# reference finds it, such as `ids[0, -1] == end`.
#
# ### The network itself
#
# - **train()**: the model is left in training mode, so that dropout goes on.
# - **GroupNorm's eps**: $10^{-5}$ in the ResBlocks, $10^{-6}$ in the transformers and in the VAE. Take $10^{-5}$
#   everywhere, as PyTorch does if left alone; or $10^{-3}$, as TensorFlow does.
# - **float16**: half the memory, but no number above 65,504.
#
# **Predict, then run.** Our UNet has dropout layers. How bad is it to forget `.eval()`?

# %%
def changed(change):
    """Latents that a changed copy of the UNet draws."""
    broken = copy.deepcopy(sd)
    change(broken.model)
    return draw(lambda x, t: guided(broken)(x, t).eps)


def training(p):
    def change(network):
        network.train()
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = p

    return change


def norms(eps):
    def change(network):
        for module in network.modules():
            if isinstance(module, nn.GroupNorm):
                module.eps = eps

    return change


torch.manual_seed(0)
p = {module.p for module in sd.model.modules() if isinstance(module, nn.Dropout)}
print(f"dropout of the model that ships: {p}")
drawn = {
    "train(), dropout 0": changed(training(0.0)),
    "train(), dropout 0.1": changed(training(0.1)),
    "eps 1e-5 everywhere": changed(norms(1e-5)),
    "eps 1e-3 everywhere": changed(norms(1e-3)),
}
show(drawn)

# %% [markdown]
# Here it makes no difference at all, since the dropout is 0 (as in Stable Diffusion v1): the mistake is there, and
# waits. With 0.1, edges are torn, and details are lost. (It would be worse if the decoder did not help to hide it: ours
# was trained on [latents with noise](../docs/training.md#a-better-decoder-for-a-finished-model), to overlook small
# mistakes.) And the eps of the norms is beyond what an eye can see.
#
# **The tests.** Same question, same answer, for the first. For the second, nothing but equality with another
# implementation (notebook 09), or a look at the settings: mlx-examples#1434 found such a difference of 6e-4 at the
# UNet's output, after all else was right. **A mistake that you can't see is the reason for equality tests.**
# (`tests/test_unet.py`, `tests/test_vae.py`: `test_the_norms_have_the_epsilon…`, `…equals_diffusers`.)


# %%
def test_same_question_same_answer(model):
    at = torch.full((len(x_T),), 500)
    first, second = (model.apply_model(x_T, at, context) for _ in range(2))
    assert torch.equal(first, second), f"two answers differ by {(first - second).abs().max():.2g}"


def test_norms_have_compvis_eps(model):
    res = {m.eps for name, m in model.model.named_modules() if name.endswith(("in_layers.0", "out_layers.0"))}
    rest = {m.norm.eps for m in model.model.modules() if isinstance(m, minisd.attention.SpatialTransformer)}
    assert (res, rest) == ({1e-5}, {1e-6}), f"ResBlocks {res}, transformers {rest}"


def broken(change):
    model = copy.deepcopy(sd)
    change(model.model)
    return model


wrong = {"train(), dropout 0": broken(training(0.0)), "train(), dropout 0.1": broken(training(0.1))}
caught(test_same_question_same_answer, sd, wrong)
wrong = {"eps 1e-5 everywhere": broken(norms(1e-5)), "eps 1e-3 everywhere": broken(norms(1e-3))}
caught(test_norms_have_compvis_eps, sd, wrong)

# %% [markdown]
# #### Black
#
# The best known symptom of all has to do with numbers that are too large. A network can be right and have large
# numbers *inside*, which the next norm divides away again. In float32 that is harmless. In float16 they become
# infinite, $\infty - \infty$ is NaN, and NaN spreads to every pixel. Let us build such an autoencoder: multiply the
# weights of one convolution that a norm follows. In float32 it draws the same pictures.

# %%
def to_file(x):
    """Numbers in [-1, 1] → bytes → numbers again, as most scripts have it."""
    as_bytes = (255 * ((x + 1) / 2).clamp(0, 1)).permute(0, 2, 3, 1).numpy().round().astype("uint8")
    return torch.tensor(as_bytes).permute(0, 3, 1, 2) / 127.5 - 1


vae = copy.deepcopy(sd.first_stage_model)
inside = vae.decoder.up[0].block[0]
for parameter in inside.conv1.parameters():
    parameter *= 30_000  # norm2 comes next, and divides it away
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    in_float32 = to_file(vae.decode(z / factor))
    in_float16 = to_file(vae.half().decode((z / factor).half()).float())
    usual = to_file(copy.deepcopy(sd.first_stage_model).half().decode((z / factor).half()).float())
print("numpy says:", *(warning.message for warning in said))
show({"float16": usual, "large inside, float32": in_float32, "large inside, float16": in_float16})

# %% [markdown]
# Black, without an error, but for one line in the log: *invalid value encountered in cast*
# (stable-diffusion-webui#15412; black now and then, and never when looked for, in diffusers#5803). On some cards it
# is a plain green instead (CompVis/stable-diffusion#69). The cure: the decoder in float32 or bfloat16, which has the
# range of float32. (Or the safety checker has blackened your picture. minisd has none.)
#
# **The test**: `assert torch.isfinite(x).all()`, after the UNet *and* after the decoder. minisd's samplers do the first
# themselves:

# %%
try:
    draw(lambda x, t: eps_of(x, t) / 0)
except FloatingPointError as error:
    print(f"FloatingPointError: {error}")

# %% [markdown]
# ## Part 2: mistakes in training
#
# Training takes long, so a mistake in it costs the most. We need a world in which a model is trained in seconds, and in
# which the truth is known: 48 pictures of 10×10 pixels, eight colours times six shapes, and a small network. No
# autoencoder: $x_0$ are the pixels. `ExactDenoiser` knows all 48 and tells the best possible loss.

# %%
named = [(colour, shape) for shape in shapes.SHAPES for colour in shapes.COLOURS]
scenes = [shapes.Scene("", "size", (shapes.Item(c, s, 0.5, 0.5, shapes.SIZES["large"]),)) for c, s in named]
world = torch.stack([torch.tensor(shapes.render(scene, 10)).permute(2, 0, 1) / 127.5 - 1 for scene in scenes])
colours, kinds = list(shapes.COLOURS), list(shapes.SHAPES)
words = torch.stack([F.one_hot(torch.tensor([colours.index(c), 8 + kinds.index(s)]), 14).sum(0) for c, s in named])
words = words.float()[:, None]  # the caption of each picture as a context, [48 1 14]
no_words = torch.zeros(1, 1, 14)
exact = minisd.ExactDenoiser(world, schedule)
print(f"world {list(world.shape)}, std {world.std():.2f}; words {list(words.shape)}")


class Denoiser(nn.Module):
    """Two hidden layers; and the noisy picture itself, times a number that depends on t."""

    def __init__(self, width=256, pixels=300):
        super().__init__()
        self.picture, self.rest = nn.Linear(pixels, width), nn.Linear(64 + 14, width)
        self.layers = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, pixels))
        self.gain = nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 1))
        for last in (self.layers[-1], self.gain[-1]):  # its first answer is 0, as a UNet's
            nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)

    def forward(self, x, t, context):
        time = minisd.unet.timestep_embedding(t, 64)  # [b 64]
        rest = torch.cat([time, context.expand(len(x), -1, -1).flatten(1)], dim=1)
        h = self.picture(x.flatten(1)) + self.rest(rest)
        return self.layers(h).view_as(x) + self.gain(time)[..., None, None] * x


# %% [markdown]
# And here is the training loop, each line of which can be got wrong. What we want to break is an argument.


# %%
def fresh(g, i, shape):
    return torch.randn(shape, generator=g)


@torch.enable_grad()
def train(world=world, q_sample=schedule.q_sample, noise_of=fresh, drop=0.1, lr=2e-3, ema_of=EMA, decay=0.99):
    """Returns the network, its mean weights, and the loss of each step."""
    torch.manual_seed(0)
    g, network, losses = seeded(0), Denoiser(), []
    ema = ema_of(network, decay)
    optimizer = torch.optim.Adam(network.parameters(), lr, betas=(0.9, 0.99))
    for _ in range(1000 if full else 3):
        i, t = torch.randint(48, (48,), generator=g), torch.randint(1000, (48,), generator=g)
        x_0 = world[i]
        eps = noise_of(g, i, x_0.shape)
        context = minisd.text_dropout(words[i], no_words, torch.rand(48, generator=g) < drop)
        loss = (network(q_sample(x_0, t, eps), t, context) - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(network)
        losses.append(loss.item())
    return network, ema, losses


asked_for = ["red circle", "orange square", "green triangle", "blue diamond", "orange star", "black heart",
             "pink circle", "pink square"]  # fmt: skip
asked = [named.index(tuple(name.split())) for name in asked_for]
start_code = torch.randn(8, 3, 10, 10, generator=seeded(1))


def pictures_of(network, scale=2.0):
    model = minisd.classifier_free_guidance(network, words[asked], no_words, scale)
    *_, last = sampling.ddim(model, start_code, schedule, 25 if full else 2, spacing="trailing", set_alpha_to_one=True)
    return last.x


def examined(network):
    """On fresh noise, at all t: the loss; the best one without captions; the distance from that best answer."""
    t, g = torch.arange(0, 1000, 10), seeded(3)
    i, eps = torch.randint(48, (100,), generator=g), torch.randn(100, 3, 10, 10, generator=g)
    x_t = schedule.q_sample(world[i], t, eps)
    best = exact(x_t, t)
    errors = network(x_t, t, words[i]) - eps, best - eps, network(x_t, t, no_words) - best
    return [error.square().mean().item() for error in errors]


def mean_of_last(losses):
    return sum(losses[-50:]) / len(losses[-50:])


trained, rows = {}, {"data": world[asked]}


def try_out(name, **changes):
    network, ema, losses = train(**changes)
    with ema.applied_to(network):
        true, best, distance = examined(network)
        rows[name] = pictures_of(network)
    trained[name] = network, ema, losses
    print(f"{name:24} loss in its log {mean_of_last(losses):6.3f}, on fresh noise {true:7.3f};", end=" ")
    print(f"from the best {distance:7.3f}")


short = [name.replace(" ", "\n") for name in asked_for]
try_out("healthy")
print(f"(the best possible without captions: {examined(trained['healthy'][0])[1]:.4f})")
viz.strip(list(rows.values()), short, list(rows), size=0.6)

# %% [markdown]
# It draws what it is asked for, give or take a shade. (It knows 48 pictures and draws those; that is the point of a
# toy.) Three numbers go with each training: the loss in its own log; the loss on noise that we draw, with our $q$;
# and the distance from `ExactDenoiser`. In a healthy run the first two agree, and the third is small.
#
# ### The data, the noising and the noise
#
# - **[0, 1]**: the pictures are scaled to $[0, 1]$; the sampler and the file know nothing of it.
# - **no roots**: $x_t = \bar\alpha\,x_0 + (1-\bar\alpha)\,\epsilon$.
# - **β for ᾱ**: $x_t = \sqrt{1-\beta_t}\,x_0 + \sqrt{\beta_t}\,\epsilon$: one small step where all are meant.
# - **a noise for each picture**: drawn once, before the loop, and reused in every epoch.
# - **one noise for all**: drawn once.
#
# **Predict, then run.** Whose loss in the log will be the *lowest*? And which of them would you have stopped?


# %%
def mixed(signal, sigma):
    def q_sample(x_0, t, eps):
        return signal[t].view(-1, 1, 1, 1) * x_0 + sigma[t].view(-1, 1, 1, 1) * eps

    return q_sample


a = schedule.alphas_cumprod
no_roots = mixed(a, 1 - a)
beta_for_alpha = mixed((1 - schedule.betas).sqrt(), schedule.betas.sqrt())
kept = torch.randn(world.shape, generator=seeded(4))


def one_for_each(g, i, shape):
    return kept[i]


def one_for_all(g, i, shape):
    return kept[:1].expand(shape)


try_out("[0, 1]", world=(world + 1) / 2)
try_out("no roots", q_sample=no_roots)
try_out("β for ᾱ", q_sample=beta_for_alpha)
try_out("a noise for each picture", noise_of=one_for_each)
try_out("one noise for all", noise_of=one_for_all)
viz.strip(list(rows.values()), short, list(rows), size=0.6)

# %% [markdown]
# The two worst models have the best losses. With the noise reused there is nothing to find out: the network learns the
# noise by heart. **A loss that is too good is a symptom.** Here we can say what "too good" is, as the exact denoiser
# has the lowest loss that is possible without captions.
#
# With $\beta$ for $\bar\alpha$ the network has only ever seen nearly clean pictures. It is asked about pure noise for
# the first time when it draws (see its loss on our noise); and it finishes whatever shape it imagines there. In this
# world, which it knows by heart, that gives perfect shapes, some of the wrong colour! We would not hope for that with
# real pictures. Without the roots, colours are a little dull, and no more. Pale pictures come from $[0, 1]$, as in
# Part 1; and look at the loss in its log: no worse than the healthy one. Losses of different data can't be compared.
#
# **The tests.** Of the data, that there is something on both sides of 0. Of $q$, that it preserves variance, and that
# at the end nothing of the picture is left. Of the noise, that two batches have different ones.


# %%
def test_range(x):
    assert x.min() < -0.5 and x.max() > 0.5, f"from {x.min():.1f} to {x.max():.1f}"


def test_q(q_sample):
    x_0, eps = torch.randn(1000, 1, 4, 4, generator=seeded(0)), torch.randn(1000, 1, 4, 4, generator=seeded(1))
    for t in (0, 300, 600, 999):
        x_t = q_sample(x_0, torch.full((1000,), t), eps)
        assert abs(x_t.var() - 1) < 0.05, f"variance {x_t.var():.2f} at t = {t}"
    assert (x_t * x_0).mean() < 0.1, f"correlation with the picture at t = 999: {(x_t * x_0).mean():.2f}"


def test_noise_is_new(noise_of):
    g, i = seeded(0), torch.tensor([0, 1])
    first, second = (noise_of(g, i, (2, 3, 10, 10)) for _ in range(2))
    assert not torch.equal(first, second), "two epochs draw the same noise"


caught(test_range, world, {"[0, 1]": (world + 1) / 2})
caught(test_q, schedule.q_sample, {"no roots": no_roots, "β for ᾱ": beta_for_alpha})
caught(test_noise_is_new, fresh, {"a noise for each picture": one_for_each, "one noise for all": one_for_all})

# %% [markdown]
# (`tests/test_noising.py`: `test_variance_is_preserved`, `test_q_sample_equals_compvis`.) The checker of the
# exercises finds both factors:


# %%
def q_sample(x_0, t, noise, alphas_cumprod):
    alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
    return alpha_bar * x_0 + (1 - alpha_bar) * noise


check.q_sample(q_sample);

# %% [markdown]
# ### The optimiser and its mean
#
# - **learning rate 0.03**, 15 times too high, and **0.3**.
# - **no EMA**: the last weights draw, not their running mean (notebook 08).
# - **EMA too slow**: a decay of 0.9999, right for a million steps, in a run of a thousand; and without the warm-up that
#   CompVis's `LitEma` has.
#
# **Predict, then run.** Which one draws noise though its loss is healthy?


# %%
class WithoutWarmUp(EMA):
    def update(self, model):
        self.num_updates = 10**9  # past it
        super().update(model)


try_out("learning rate 0.03", lr=0.03)
try_out("learning rate 0.3", lr=0.3)
try_out("EMA too slow", ema_of=WithoutWarmUp, decay=0.9999)
rows["no EMA"] = pictures_of(trained["healthy"][0])
print(f"{'no EMA':24} from the best {examined(trained['healthy'][0])[2]:.3f}")
chosen = ["healthy", "no EMA", "EMA too slow", "learning rate 0.03", "learning rate 0.3"]
viz.strip([rows[name] for name in chosen], short, chosen, size=0.6)

# %%
losses = {name: trained[name][2] for name in ("healthy", "learning rate 0.03", "learning rate 0.3")}
every = 20 if full else 1
panel = {name: (range(0, len(v), every), torch.tensor(v).unfold(0, every, every).mean(1)) for name, v in losses.items()}
viz.curves({"loss": panel}, xlabel="step", log=["loss"], width=7)

# %% [markdown]
# The slow mean is the trap. It is still nearly the random start:

# %%
for decay, count in [(0.9999, 1000), (0.9999, 50_000), (0.99, 1000)]:
    print(f"decay {decay}, {count:,} steps: {decay**count:.1%} of the mean is still the random start")

# %% [markdown]
# People meet it at their first checkpoint: the loss is at 0.03, and the samples are noise
# (openai/improved-diffusion#59: it was the EMA); noise after 1000 epochs with EMA, pictures without (diffusers#1772).
# The other way round, to leave the EMA away, is mild: some measure no difference (BK-SDM#47). Ours is a little
# further from the best answer; in the pictures one can't say which row is the better one.
#
# Too high a learning rate shows in the loss: it falls, jumps up and stays high (DALLE2-pytorch#164, at 4e-3), or
# stays at 1 or above, where nothing is known (latent-diffusion#135; a smaller rate helped one). **The test** of an
# optimiser is to overfit one batch: a network that can't learn a few pictures by heart will not learn many. And of an
# EMA, that the start is forgotten.


# %%
def test_it_learns(losses):
    assert mean_of_last(losses) < 0.1, f"loss {mean_of_last(losses):.3f} after {len(losses)} steps on 48 pictures"


def test_the_start_is_forgotten(ema):
    torch.manual_seed(0)
    first = torch.cat([p.flatten() for p in Denoiser().parameters()])  # the same random start
    mean = torch.cat([p.flatten() for p in ema.weights.values()])
    last = torch.cat([p.flatten() for p in trained["healthy"][0].parameters()])
    way = ((mean - first) @ (last - first) / (last - first).square().sum()).item()  # 0: at the start, 1: at the end
    assert way > 0.7, f"the mean has gone {way:.0%} of the way"


if full:
    slow = {name: trained[name][2] for name in ("learning rate 0.03", "learning rate 0.3")}
    caught(test_it_learns, trained["healthy"][2], slow)
    caught(test_the_start_is_forgotten, trained["healthy"][1], {"EMA too slow": trained["EMA too slow"][1]})

# %% [markdown]
# (`tests/test_training.py`: `test_training_learns`, `test_ema_is_the_formula_of_compvis`.)
#
# ### Guidance without text dropout
#
# Guidance asks for the answer without a prompt. A model that never saw an empty prompt in training gives *some*
# answer. How bad is it? In the threads, opinions differ (mlfoundations/open-diffusion#6: no practical difference;
# imagen-pytorch#280: guidance still helped). Measure.

# %%
try_out("no text dropout", drop=0.0)
scales, table = [0.0, 1.0, 2.0, 6.0], {}
for name in ("healthy", "no text dropout"):
    network, ema, _ = trained[name]
    with ema.applied_to(network):
        print(f"{name:24} distance from the best answer without a prompt: {examined(network)[2]:.3f}")
        table |= {f"{name}, s = {s:g}": pictures_of(network, s) for s in scales}
viz.strip(list(table.values()), short, list(table), size=0.6)

# %% [markdown]
# The distance says that the answer without a prompt is worse: nobody ever asked for it in training. At $s = 0$, where
# it stands alone, one sees that: shapes and colours are mixtures. With guidance, both models draw what they are asked
# for; at 6, the colours of the second are harsher. So both sides of the threads have a point: the mistake is real,
# can be measured, and hides behind a prompt and a moderate scale. (A guess why it is so mild here: our context
# without words is a zero, in the middle of all captions. CLIP's empty prompt is no such middle.)
#
# **The test**: draw at $s = 0$, and compare the loss with the *empty* caption at large $t$, on pictures that training
# has not seen, with that of the right one (notebook 07 has both for the model that ships).
#
# ## Part 3: what have we seen?
#
# All that was broken at drawing time, for one prompt, from the least to the greatest difference.

# %%
ranked = sorted(gallery, key=lambda name: apart(gallery[name]).mean().item())
amount = {name: apart(gallery[name]).mean().item() for name in ranked}
captions_of = [f"{name} ({amount[name]:.3f})" for name in ranked]
tiles = torch.stack([gallery[name][0].clamp(-1, 1) for name in ranked])
unseen = [name for name in ranked if amount[name] < another_seed]
print(f"{len(ranked)} rows; {len(unseen)} differ from the healthy ones by less than another seed ({another_seed:.3f})")
viz.captioned(tiles, captions_of, columns=11, size=0.64)

# %% [markdown]
# "Why is it noise?" is the question that everybody asks, and noise is a rare symptom. Of these rows, only −ε and
# $\epsilon$ taken for $x_0$ are noise; in Part 2 it was the noise that was used again, the learning rate, and the
# slow mean. In the upper half, nearly all are foxes that one would have accepted, and some differ from the healthy
# one by less than another seed would. (Three of them are no mistakes: float16, large numbers in float32, and a
# dropout of 0.) **Those are the dangerous ones.** They cost quality, nobody sees why, and no look at a picture finds
# them.
#
# ## Which is it? A game
#
# Six patients, three pictures of each; on the right, what it should have been. What do they have? Write down your
# diagnosis, and the test that you would run first, before you open the answers. (One of them is well.)

# %%
gallery["healthy"] = healthy
patients = [sorted(gallery)[k] for k in (1, 3, 14, 37, 33, 12)]
rows = [torch.stack([*(gallery[name][i] for name in patients), healthy[i]]) for i in range(3)]
viz.strip(rows, [*"ABCDEF", "should be"], names, size=0.64)

# %% [markdown]
# <details><summary>Answers</summary>
#
# - **A**: the latent is too long. 0.18215 was taken for an autoencoder whose factor is 0.628. $v$ taken for $\epsilon$,
#   or a schedule that ends at $\bar\alpha = 0$, is glaring, too; but then shapes are coarse, and these are whole. First
#   test: the std of the latent that is decoded.
# - **B**: red and blue are swapped; shapes are perfect. First test: an orange picture, loaded and saved.
# - **C**: is well.
# - **D**: torn, with spots: too much noise in each step. Guidance that is far too high and dropout are milder cases.
#   First tests: print the scale; ask the same question twice (dropout); three numbers and the exact denoiser.
# - **E**: the opposite of what was asked for: the halves of guidance are swapped. First test: does a higher scale give
#   more of the prompt?
# - **F**: pale, with scratches. The factor was forgotten at the decoder. $[0, 1]$ is as pale, but smooth; a clamp at
#   ±1 is as dirty, but in other colours. First test: the std of the latent, then the range of the pictures.
#
# </details>
#
# For half of the six, the picture alone did not decide. That is the rule. A symptom has several causes, and a test has
# one answer.
#
# ## In which order to look
#
# From the outside to the inside, and from cheap to dear:
#
# 1. **The file**: an orange picture, loaded and saved.
# 2. **The autoencoder**: the round trip of real pictures, and the std of the latents between.
# 3. **The schedule and the timesteps**: equal to the checkpoint's numbers.
# 4. **The sampler**, without your network: `ExactDenoiser` through it.
# 5. **The network**, without your sampler: the loss of real pictures by $t$, beside your notes; what its answer is; the
#    same question twice.
# 6. **The text**: the loss with the right and with a wrong caption.
# 7. **The training**: overfit one batch; is the loss lower than it can be?
# 8. Then, and for all that still differs from a reference, **equality**, layer by layer: `minisd.compare` (notebook
#    09).
#
# Halve the program at each question. If 2 passes, the decoder is right, however ugly the drawing. If 4 passes, the
# sampler is. Here are the checks that need a model, each in a few lines, tried on models that we break.


# %%
def round_trip(m):
    x = m.decode_first_stage(m.get_first_stage_encoding(m.encode_first_stage(pictures[:8]).mode()))
    assert torch.isfinite(x).all() and apart(x, pictures[:8]).mean() < 1.2 * floor


def latent_std(m):
    assert 0.8 < m.get_first_stage_encoding(m.encode_first_stage(pictures).mode()).std() < 1.25


def right_schedule(m):
    test_schedule_is_the_checkpoints(m.schedule)


def errors_at(m, t, captions):
    """How wrong it is about real pictures, noised as this model does it."""
    z = m.get_first_stage_encoding(m.encode_first_stage(pictures[:24]), seeded(0))
    at, eps = torch.full((len(z),), t), noise[: len(z)]
    return m.apply_model(m.q_sample(z, at, eps), at, m.get_learned_conditioning(captions[: len(z)])) - eps


def loss_by_t(m, captions=captions):
    return [errors_at(m, t, captions).square().mean().item() for t in (100, 400)]


notes = loss_by_t(sd)  # written down while the model was well


def loss_noted(m):
    assert all(now < 1.1 * then for now, then in zip(loss_by_t(m), notes, strict=True))


def caption_swap(m):
    right, wrong = loss_by_t(m)[1], loss_by_t(m, captions[1:] + captions[:1])[1]
    assert wrong > 1.1 * right


def asked_twice(m):
    assert torch.equal(errors_at(m, 400, captions), errors_at(m, 400, captions))


def later_token(m):
    test_context(m.cond_stage_model.transformer)


def wrap(answer):
    """A change of a model: apply_model becomes answer(old apply_model, x, t, cond)."""

    def change(m):
        old = m.apply_model
        m.apply_model = lambda x, t, cond: answer(old, x, t, cond)

    return change


def mask_off(m):
    for layer in m.cond_stage_model.transformer.text_model.encoder.layers:
        layer.self_attn.causal = False


def captions_shifted(m):
    old = m.get_learned_conditioning
    m.get_learned_conditioning = lambda prompts: old(prompts).roll(1, dims=0)


def bgr(m):
    old = m.encode_first_stage
    m.encode_first_stage = lambda x: old(x.flip(1))


cases = {
    "healthy": lambda m: None,
    "scale factor 0.18215": lambda m: setattr(m, "scale_factor", 0.18215),
    "BGR": bgr,
    "DDPM's schedule": lambda m: setattr(m, "schedule", minisd.NoiseSchedule.linear()),
    "schedule linear in β": lambda m: setattr(m, "schedule", schedules["linear"]),
    "told t - 1": wrap(lambda old, x, t, c: old(x, (t - 1).clamp(min=0), c)),
    "told 999 - t": wrap(lambda old, x, t, c: old(x, 999 - t, c)),
    "answers -ε": wrap(lambda old, x, t, c: -old(x, t, c)),
    "dropout left on": lambda m: training(0.1)(m.model),
    "captions of others": captions_shifted,
    "no causal mask": mask_off,
    "eps of the norms 1e-5": lambda m: norms(1e-5)(m.model),
}
tests = [round_trip, latent_std, right_schedule, loss_noted, asked_twice, caption_swap, later_token]
print(f"{'':24}" + "".join(f"{test.__name__:>15}" for test in tests))
for name, change in list(cases.items())[: None if full else 2]:
    model, line = copy.deepcopy(sd), f"{name:24}"
    change(model)
    for test in tests:
        try:
            test(model)
        except AssertionError:
            line += f"{'X':>15}"
        else:
            line += f"{'.':>15}"
    print(line)

# %% [markdown]
# (X: caught. A dot: passed.) Read the rows. Most mistakes are caught by a check that names the part. And some rows have
# nothing but dots: off by one, and the eps of the norms. They are in no picture, in no loss, in no property. What finds
# them is a number from somebody else's program: `tests/test_sampling.py`, `tests/test_unet.py`
# (`test_output_equals_diffusers`, `test_output_and_loss_equal_compvis`).
#
# ## The table
#
# | symptom | likely causes | the quick test |
# |---|---|---|
# | **noise** | ε taken for $x_0$; a wrong sign | `test_it_predicts_the_noise` |
# | | noise reused in training: a loss too good to be true | `test_noise_is_new`; `ExactDenoiser`'s loss |
# | | EMA too slow for the run | draw with the last weights |
# | | learning rate too high; not trained yet | `test_it_learns`: overfit one batch |
# | **spots, torn edges** | too much noise in a step | `test_three_numbers` |
# | | dropout left on | `test_same_question_same_answer` |
# | | guidance far too high | print the scale |
# | **pale, grey** | scale factor forgotten | std of the latents, `test_unit_variance` |
# | | pictures in [0, 1] | `test_range`, `test_an_orange_picture_survives` |
# | | ε taken for v; the step without roots | `test_it_predicts_the_noise`, `test_three_numbers` |
# | | guidance 1 | print the scale |
# | **glaring, dark outlines** | another autoencoder's scale factor | std of the latents |
# | | β for ᾱ; another schedule, above all one that ends at ᾱ = 0 | `test_three_numbers`, `test_schedule_is_…` |
# | | v taken for ε | `test_it_predicts_the_noise` |
# | **faded colours, holes** | latents clamped | share of the numbers beyond ±1 |
# | **black** | NaN in float16; the safety checker | `torch.isfinite`, after UNet and after decoder |
# | **dark, pure colours** | no $(x + 1) / 2$ | `test_an_orange_picture_survives` |
# | **confetti in the white** | no clamp before bytes | the same |
# | **blue for red** | BGR | the same |
# | **mosaic, stripes** | reshape for permute; $t$ along the wrong axis | the same; sizes that all differ |
# | **not what was asked for** | guidance swapped: a higher scale, less of it | `test_guidance` |
# | | captions in another order than the pictures | `caption_swap` |
# | **drawn, but badly** | causal mask, final norm, padding | `test_context`; `ids[0, -1] == end` |
# | | no EMA, no text dropout | the loss with the last weights, with "" |
# | | a slightly wrong schedule or time | equality with the checkpoint's numbers |
# | **nothing to be seen** | off by one, eps of a norm, another spacing | equality with a reference |
#
# And where the right line is:
#
# | | minisd | CompVis |
# |---|---|---|
# | file, numbers, file | `minisd.data`, `minisd.viz.to_pil` | `img2img.py`: `load_img`; `txt2img.py`: `torch.clamp` |
# | scale factor | `get_first_stage_encoding`, `decode_first_stage` | `ddpm.py`, the same names |
# | schedule | `NoiseSchedule.scaled_linear` | `util.py`: `make_beta_schedule`, `"linear"` |
# | noising, loss | `NoiseSchedule.q_sample`, `epsilon_loss` | `ddpm.py`: `q_sample`, `p_losses` |
# | timesteps | `sampling.make_timesteps` | `util.py`: `make_ddim_timesteps`, its `+ 1` |
# | the step | `sampling.ddim` | `ddim.py`: `p_sample_ddim` |
# | guidance | `classifier_free_guidance` | `ddim.py`: `e_t_uncond, e_t = ….chunk(2)` |
# | ε or v | `LatentDiffusionConfig.parameterization` | `ddpm.py`: `parameterization` |
# | padding | `BPETokenizer.__call__` | `encoders/modules.py`: `padding="max_length"` |
# | norms | `unet.ResBlock`, `attention.SpatialTransformer` | `GroupNorm32` (`util.py`), `Normalize` (`attention.py`) |
# | EMA | `training.trainer.EMA` | `ema.py`: `LitEma`; `ddpm.py`: `ema_scope` |
# | text dropout | `minisd.text_dropout` | not there |
#
# (`ddpm.py` and `ddim.py` are in `ldm/models/diffusion/`, `util.py` in `ldm/modules/diffusionmodules/`.)

# %%
print(f"This notebook took {time.process_time():.0f} s of a processor, {time.time() - start:.0f} s on the clock.")

# %% [markdown]
# ## Recap
#
# - Write down the numbers of a healthy run: range, std of latents, of $x_t$ and of ε, loss by $t$.
# - Noise is a rare symptom. Most mistakes give another picture, which one would have accepted.
# - A wrong schedule is a wrong time, and a network is told the time but also sees it.
# - A mistake made twice passes a round trip. Test what is between.
# - A loss can be too good. Know the floor; `ExactDenoiser` does.
# - Test the sampler without the network, and the network without the sampler.
# - A property test asks "is it sound?", an equality test "is it the same?". What one can't see needs the second.
#
# ## Try it
#
# - Add a mistake of your own to `cases`, and one more check that catches it.
# - Draw with guidance 1 and the times reversed. Does the fox survive? And with another sampler?
# - In the small world: reset $t$ to one number for the whole batch, or forget `zero_grad`. Which of the three numbers
#   tells?
# - `minisd.coursework.draw(name, function)` draws with a function that you broke. Take the
#   [exercises](exercises/06_sampling.ipynb), make the mistake that you fear the most, and look.
#
# This is the last notebook. The [FAQ](../docs/faq.md) has the short answers.
