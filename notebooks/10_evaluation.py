# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10 · Evaluation: does it draw what was asked?
#
# The model draws. Is it any good? Is it better than yesterday's? Does it draw, or does it hand out what it was shown?
# One would like a number. There are many, and each of them can be fooled. So this notebook does with numbers what the
# others did with networks: it takes the naive one first and watches it fail. **Before you believe a measure, you should
# have seen it be wrong.**
#
# You will understand
#
# - why neither the loss nor twenty pictures can tell you whether a model got better;
# - retrieval: shown a drawing, which caption was asked for? Hits, chance, real pictures as the yardstick, errors;
# - why a network must not be judged by the network that it reads with;
# - the Fréchet distance (FID is one), from two Gaussians on a line on, and three traps: how many pictures, which
#   features, and copies;
# - what the curve in the model card of Stable Diffusion v1 shows: fidelity against variety;
# - how to find out whether drawings are copies of training pictures.
#
# About 60 minutes to read; it takes about three minutes on one processor. Nothing is trained. The module of this stage
# is [`minisd/evaluation/`](../minisd/evaluation/__init__.py), its page [docs/evaluation.md](../docs/evaluation.md).
# Before it: [notebook 09](09_stable_diffusion_v1.ipynb), the official weights; what you need is guidance, from
# [notebook 06](06_sampling.ipynb), and CLIP's two towers, from [notebook 05](05_clip.ipynb). Next: [notebook
# 11](11_why_is_it_noise.ipynb), every classic mistake made on purpose.
#
# To see in your browser what guidance does to a drawing, open the stop [Guidance](../docs/play.md#tour=guidance) of the
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
import contextlib
import io
import time
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.nn.functional as F

import minisd
from minisd import evaluation, viz
from minisd.data import sample
from minisd.evaluation import Setting

torch.set_grad_enabled(False)  # nothing is trained
full = MODE == "full"
start = time.time()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def quietly():
    """Without progress bars, which would fill the page."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


# %% [markdown]
# ## What is asked for
#
# A model is examined on what it has not seen. Our corpus was split before the training (`minisd/data/split.py`). Some
# pairs of a concept and a style were held out, though the model saw the concept in other styles, and the style on other
# concepts: the split `test_pair`. Who draws those has put together what it knew. By captions of the split `train`, a
# model may simply recite.
#
# Here we work with the sample that ships with minisd, five of the seven styles and 266 concepts. It is about an eighth
# of the corpus, cut along the same split, so that the held-out pairs were never shown to the UNet that ships. Fewer
# pictures mean larger errors, and judges that have learned less; the page [evaluation](../docs/evaluation.md) has the
# numbers from the whole corpus.
#
# `Evaluator` holds all that is needed: captions, their real pictures, the same pictures once through the model's
# autoencoder ("decoded": no drawing can be sharper than the decoder), and three judges.

# %%
sd, corpus = minisd.load("emoji" if full else "tiny", "cpu"), sample(size=32)
if not full:
    evaluation.PatchJudge.atoms = 64
with quietly():
    evaluator = evaluation.Evaluator(
        sd, corpus.folder, minisd.load_clip(), count=156 if full else 100, groups=("train", "test_pair")
    )
pairs, training = evaluator.groups["test_pair"], evaluator.training
captions = [row["text"] for row in pairs.rows]
train_rows = [row for row in corpus.rows if row["split"] == "train"]  # of the pictures in `training`
concepts, styles = (sorted({row[question] for row in corpus.rows}) for question in ("concept", "style"))
print(f"{len(corpus)} pictures of {len(concepts)} concepts in {len(styles)} styles")
print(f"of the training split {list(training.shape)}")
print(f"asked for: {len(captions)} held-out pairs, such as {captions[:3]}")
print(f"their real pictures {list(pairs.real.shape)}, decoded {list(pairs.decoded.shape)}")


def names(question, rows):
    """The concept, or the style, of each row."""
    return np.array([row[question] for row in rows])


# %% [markdown]
# All drawings of this notebook but a few are made here, once: every held-out pair at four guidance scales, and as many
# training captions at the usual one. Caption $k$ gets the noise of seed $k$ each time, so that two scales differ by
# nothing but the scale.

# %%
scales = [1.0, 2.0, 4.0, 8.0]
setting = Setting(steps=15 if full else 1, guidance_scale=4.0, sampler="ddim", seed=0)
with quietly():
    drawn = {s: evaluator.draw("test_pair", replace(setting, guidance_scale=s)) for s in scales}  # each [n 3 32 32]
    recited = evaluator.draw("train", setting)
print(f"{sum(map(len, drawn.values())) + len(recited)} drawings in {time.time() - start:.0f} s")

# %% [markdown]
# ## Naive idea 1: the loss says so
#
# The loss is what was made small in training. Surely the better model has the smaller loss?
#
# **Predict, then run.** Take held-out pictures, noise them, and ask the model for the noise: without the prompt, and
# with it. From the two answers, make the guided one, $\epsilon_\varnothing + s\,(\epsilon_c - \epsilon_\varnothing)$,
# for many scales $s$. At which $s$ is the loss $|\epsilon - \epsilon_s|^2$ the smallest? And at which $s$ would you
# rather have your pictures drawn?
#
# <details><summary>Answer</summary>
#
# For training captions near $s = 1$: that answer is the one that was trained to have a small loss. For held-out pairs
# lower still: on pictures that it never saw, the answer with the prompt has a larger loss than the one without. (The
# prompt makes the model sure of details, and they are the wrong ones: a guess.) The loss would rather it did not read
# at all. Pictures are drawn at 4, or at 7.5, where the loss is larger by far.
#
# </details>

# %%
n = len(captions)
many = torch.linspace(0, 4, 33).tolist()


def guided_losses(group):
    """The loss of the guided answer at each of the scales, on a group's real pictures."""
    z = sd.get_first_stage_encoding(sd.encode_first_stage(group.real), seeded(0))  # [n 4 8 8]
    context = sd.get_learned_conditioning([row["text"] for row in group.rows])  # [n 24 192]
    empty = sd.get_learned_conditioning([""]).expand_as(context)
    answers = []
    for repeat in range(3 if full else 1):
        t = (torch.arange(n) * 1000 // n + 333 * repeat) % 1000  # [n]: another for each picture, spread evenly
        noise = torch.randn(z.shape, generator=seeded(repeat))
        x_t = sd.q_sample(z, t, noise)
        answers.append((noise, sd.apply_model(x_t, t, empty), sd.apply_model(x_t, t, context)))
    noise, eps_uncond, eps_cond = (torch.cat(parts) for parts in zip(*answers, strict=True))  # [3n 4 8 8] each
    return [(noise - (eps_uncond + s * (eps_cond - eps_uncond))).square().mean().item() for s in many]


lines = {"training captions": guided_losses(evaluator.groups["train"]), "held-out pairs": guided_losses(pairs)}
for what, losses in lines.items():
    some = ", ".join(f"{losses[many.index(s)]:.3f} at {s:g}" for s in (0, 1, 2, 4))
    print(f"{what:18} {some}; the smallest at s = {many[int(np.argmin(losses))]:.2f}")
panels = {"loss of the guided answer": {what: (many, losses) for what, losses in lines.items()}}
viz.curves(panels, "guidance scale s", width=4.6, height=2.3)

# %%
rows = [drawn[1.0][:9], drawn[4.0][:9], pairs.real[:9]]
viz.strip(rows, [c.replace(", ", ",\n") for c in captions[:9]], ["guidance 1", "guidance 4", "real"], size=0.84)

# %% [markdown]
# By the loss, one would draw the first row or something weaker still, and nobody would ever have used guidance. The
# loss is the error of *one* answer, the mean over all $t$. A drawing is the result of many answers in a row, steered on
# the way and decoded at the end. **Of guidance, of the sampler, of the number of steps and of the decoder, the loss
# knows nothing.** It is good for what it was made for: to train by, and to find a bug by ([notebook
# 08](08_training.ipynb), where it stands still while the drawings get better).
#
# ## Naive idea 2: look at twenty pictures
#
# Do look: it is the first thing to do, and a broken model is found in a glance. But to tell a good model from a better
# one, twenty pictures are no witness. One is tempted to choose them; and even if they are chosen by lot, they are few.
# How few that is, can be said as soon as hits can be counted. So, count.
#
# ## Retrieval: which caption was asked for?
#
# Show a drawing to a judge who doesn't know the caption, and let the judge say what it is. If that is what was asked
# for, it is a **hit**. The simplest judge that there is: look for the picture of the training split that looks most
# alike (16×16 pixels, the smallest Euclidean distance), and say its concept and its style.

# %%
library = evaluation.features(training)  # [m 768]: 16x16 RGB in [0, 1], as rows
index, distance = evaluation.find_nearest(evaluation.features(drawn[4.0]), library)  # [n], [n]
asked, found = names("concept", pairs.rows), names("concept", train_rows)[index]
hit = found == asked
print(f"library {list(library.shape)}, index {list(index.shape)}, {hit.sum()} hits of {n}")

chosen = np.concatenate([np.flatnonzero(hit)[:5], np.flatnonzero(~hit)[:5]])
rows = [drawn[4.0][chosen], training[index[chosen]], pairs.real[chosen]]
notes = [[], [name if len(name) < 19 else name[:17] + "…" for name in found[chosen]], []]
titles = [captions[i].removesuffix(" style").replace(", ", ",\n") for i in chosen]
viz.strip(rows, titles, ["drawn", "the judge's\nnearest picture", "real"], notes, size=0.98)

# %% [markdown]
# Five hits on the left, five misses on the right, as regards the concept. (The titles say what was asked for; under the
# second row stands what the judge found.) Look at the misses. In some the drawing is wrong. In others you would have
# known it, and the judge did not. And nothing like "the judge erred" can be seen in the number of hits.
#
# So ask the same judge the same question about the **real pictures** of these captions. If it fails on those, too, it
# is not the model's fault. And ask how many hits there would be **by chance**: each drawing held against the captions
# of all others. Between the two lies the scale to measure on:
#
# $$\text{score} = \frac{\text{hits of the model} - \text{hits by chance}}
#   {\text{hits of real pictures} - \text{hits by chance}}$$
#
# 0 is a model that does not read. 1 is as good as the artists, for this judge.

# %%
hits = found[:, None] == asked[None, :]  # [n n]: would picture i be a hit for caption j?
model = hits.diagonal().mean()
chance = (hits.sum() - hits.diagonal().sum()) / (n * (n - 1))  # off the diagonal: the mean over all ways to shuffle
index_real, _ = evaluation.find_nearest(evaluation.features(pairs.real), library)
real = (names("concept", train_rows)[index_real] == asked).mean()
print(f"hits of the model {model:.1%}, by chance {chance:.1%}, of real pictures {real:.1%}")
print(f"score {(model - chance) / (real - chance):.2f}")

scores = {s: evaluator.scores("test_pair", drawn[s]) for s in scales}  # all judges, all questions
(same,) = [one for one in scores[4.0] if (one.judge, one.question) == ("nearest picture", "concept")]
print(f"and by minisd.evaluation: {same.score:.2f} ± {same.error:.2f}")

# %% [markdown]
# A score may be larger than 1. This judge knows the concept by the other artists' pictures of it. The model has learned
# from those very pictures, and draws what they have in common; the artist whose picture was held out was free to draw
# something else.
#
# **The error** says how far the score would move, if we had asked for other captions. It is found by a *bootstrap*:
# draw captions from ours by lot, with repetitions, as many as there are; compute the score; do that a thousand times,
# and take the standard deviation. (By lot are drawn *concepts*, with all their pictures. A model that can't draw a
# violin fails in every style: five failures, one reason.)
#
# **Predict, then run.** Back to the twenty pictures. A friend judges a model by twenty drawings and finds a share of
# hits. Another friend takes twenty other drawings of the *same* model. How far apart may their shares be?

# %%
patch_judge = evaluator.judges[2]  # the third judge, of whom more below
by_patches = {s: patch_judge(drawn[s], pairs.rows) for s in scales}  # of each question: [n n]
hit = by_patches[4.0]["concept"].diagonal()
lots = np.random.default_rng(0)
shares = {}
for k in (20, n):
    share = np.array([lots.choice(hit, k).mean() for _ in range(3000)])
    low, high = np.quantile(share, [0.05, 0.95])
    print(f"{k:3} drawings: nine times in ten, the share of hits is between {low:.0%} and {high:.0%}")
    shares[f"{k} drawings"] = torch.tensor(share + (lots.random(3000) - 0.5) / k)  # each over the width of one hit
viz.histograms({"share of hits, by lot": shares}, bins=40, width=4.6, height=2.1)

# %% [markdown]
# With twenty pictures, one and the same model looks like a good one or like a poor one. The width shrinks with
# $1/\sqrt N$: to halve it takes four times as many. Two models that are a few points apart can't be told from each
# other by looking.
#
# ## Three judges
#
# | judge | knows a picture by | trained on |
# |---|---|---|
# | nearest picture | 16×16 pixels | nothing: it compares |
# | CLIP | the caption whose vector is nearest, of all 1,280 | the training split, with its text tower |
# | patches | small patches, and where they are | the pictures of this training split, in seconds |
#
# CLIP is asked two things more: **R@1**, is the very caption the nearest of all, and **R@5**, is it among the nearest
# five? Its text tower is what our model reads by; we shall come to that.
#
# The third is linear algebra on features of patches (after Coates & Ng 2011), and it has nothing in common with the
# model but pictures: no network, no stored weights.

# %%
def table(scores):
    print(f"{'judge':17}{'question':10}{'model':>7}{'real':>8}{'decoded':>9}{'by chance':>11}{'score':>14}")
    for one in scores:
        score = "-" if np.isnan(one.score) else f"{one.score:.2f} ± {one.error:.2f}"
        shares = f"{one.model:7.1%}{one.real:8.1%}{one.decoded:9.1%}{one.shuffled:11.1%}"
        print(f"{one.judge:17}{one.question:10}{shares}{score:>14}")


table(scores[4.0])

# %% [markdown]
# Read *real* before *model*: that is how good the judge is. None of them is very good. They were taught by a thousand
# pictures, and are asked about concepts in styles in which they never saw them. And still a score means something: what
# a judge gets wrong, it gets wrong for the drawings and for the real pictures alike. Where real pictures do no better
# than chance, though, there is nothing to measure with, and no score: "-". The nearest picture of this small sample
# does not know styles.
#
# *decoded* is the ceiling: the real picture, once through the autoencoder. What is lost there, no UNet can win back.
# (With so few pictures, it may by chance come out a little above the real ones.)
#
# Judges disagree about numbers, since they look at different things. That is the reason to have three. If two models
# are ranked alike by all of them, believe it.
#
# ### Which style is taken for which?
#
# A share of hits does not say *what* went wrong. The matrix does: rows are asked for, columns found, by the patches.
#
# **Predict, then run.** noto blob is the older noto, by the same makers; fluent and fluent flat are one set, with and
# without gradients. Which styles will be taken for each other even in the real pictures? And whose confusions will
# those of the drawings resemble: those of the real pictures, or those of the decoded ones?

# %%
of_style = torch.tensor(names("style", pairs.rows)[:, None] == np.array(styles)).double()  # [n 5]
panels = {}
yardsticks = {"real": patch_judge(pairs.real, pairs.rows), "real, decoded": patch_judge(pairs.decoded, pairs.rows)}
for what, hits in (yardsticks | {"drawn": by_patches[4.0]}).items():
    matrix = torch.tensor(hits["style"]).double()  # [n n]
    panels[what] = of_style.T @ matrix @ of_style / of_style.sum(0)[:, None] / of_style.sum(0)  # [5 5]
viz.matrices(panels, styles, styles, numbers=".2f", cell=(0.42, 0.32), xlabel="found", ylabel="asked for")

# %% [markdown]
# Even of the real pictures, those in noto are taken for noto blob more often than for noto. That is no fault of any
# model, and it is the reason why a share of hits without a yardstick says nothing.
#
# What changes from the first matrix to the second is the autoencoder's doing: once decoded, most of fluent flat is
# taken for fluent. Where the third agrees with the second, the UNet is not to blame: it drew the right latent, as far
# as this judge can tell, and the decoder lost the style.
#
# ### Why CLIP must not be the judge
#
# Papers give a "CLIP score": the cosine between the picture's vector and the caption's. Stable Diffusion reads with a
# text tower of CLIP, and is then judged by an image tower that was trained to agree with such a one. Look at CLIP's
# lines in the table: of the *real* pictures it knows few, of the drawings many more. By CLIP, the model draws far
# better than the artists did. The judge by patches, a stranger to the model, finds the concept much more often in the
# artists' pictures, and the style about as often in both. What CLIP likes so much is its own idea of the prompt, given
# back.
#
# It can be driven further. A judge that is a network has a gradient, and whoever follows the gradient pleases the
# judge. Start with a grey square, and change its pixels until CLIP's image tower says "yes".
#
# **Predict, then run.** After sixty steps: how often will CLIP pick the right caption, out of all of them? What will
# the pictures show? And what will the judge by patches say?

# %%
asked_some = [pairs.rows[i] for i in range(24)]
towers, all_captions = evaluator.tower.clip, list(evaluator.tower.captions)
texts = evaluator.tower.texts[[all_captions.index(row["text"]) for row in asked_some]]  # [24 p]: what to please
x = torch.zeros(len(texts), 3, 32, 32, requires_grad=True)  # grey
with torch.enable_grad():
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(60 if full else 2):
        cosines = (towers.get_image_features(x.clamp(-1, 1)) * texts).sum(1)  # [24]
        optimizer.zero_grad()
        (-cosines.mean()).backward()
        optimizer.step()
pleasing = x.detach().clamp(-1, 1)

print(f"{'':28}{'CLIP, R@1':>10}{'patches, concept':>18}")
for what, pictures in {"real": pairs.real[:24], "drawn": drawn[4.0][:24], "made to please CLIP": pleasing}.items():
    right_1 = evaluator.tower(pictures, asked_some)["R@1"].diagonal().mean()
    right_concept = patch_judge(pictures, asked_some)["concept"].diagonal().mean()
    print(f"{what:28}{right_1:10.0%}{right_concept:18.0%}")
rows = [pleasing[:6], pairs.real[:6]]
viz.strip(rows, [c.replace(", ", ",\n") for c in captions[:6]], ["made to\nplease CLIP", "real"], size=0.84)

# %% [markdown]
# Noise, to us and to the patches; and CLIP prefers it to the artists' own pictures. It picks the right caption out of
# all of them, each time. A model that was trained by a judge, or chosen by it among many, learns that judge's
# mistakes. **Keep one judge out of the loop, and let it have the last word.** (CLIP's score is still of use, to compare
# settings of one model, as the curves below do, with this in mind.)
#
# ## Distances: do the drawings look like the pictures, as a whole?
#
# A hit asks about one drawing. It does not ask whether the drawings are as varied as the pictures, or as crisp. For
# that, two *sets* are compared, without regard to which drawing belongs to which caption. A picture becomes a point, a
# row of $d$ features. A set of pictures is a cloud of points. How far is one cloud from another?
#
# ### Two Gaussians on a line
#
# Begin with a single feature: how bright a picture is. Below, the real pictures of two styles. A cloud on a line, if it
# is bell-shaped, is told by its mean $\mu$ and its standard deviation $\sigma$.
#
# The Fréchet distance is an answer to this: carry the one cloud over into the other, like earth, such that the mean
# *squared* way is as short as possible. On a line the best plan is to keep the order, the darkest to the darkest. A
# Gaussian is carried into another by $y = \mu_2 + \frac{\sigma_2}{\sigma_1}(x - \mu_1)$: a shift and a stretch. The
# mean squared way is
#
# $$d^2 = \mathbb E\,(x - y)^2 = (\mu_1 - \mu_2)^2 + (\sigma_1 - \sigma_2)^2$$

# %%
bright = {style: training[names("style", train_rows) == style].mean((1, 2, 3))[:190] for style in ("noto blob", "fx")}
x, y = bright.values()  # [190], [190]
shift, stretch = (x.mean() - y.mean()).square(), (x.std() - y.std()).square()
print(f"means {x.mean():.3f}, {y.mean():.3f}; standard deviations {x.std():.3f}, {y.std():.3f}")
print(f"by the formula        {shift:.4f} + {stretch:.4f} = {shift + stretch:.4f}")
print(f"minisd.evaluation     {evaluation.frechet_distance(x[:, None], y[:, None]):.4f}")
print(f"carried over in order {(x.sort().values - y.sort().values).square().mean():.4f}")
bells = {style: (x.mean().item(), x.var().item()) for style, x in bright.items()}
viz.histograms({style: {"brightness": x} for style, x in bright.items()}, bells, "Gaussian", bins=24, width=3.0)

# %% [markdown]
# By hand and by minisd it is the same. The best plan costs more than the formula says: the formula would be exact for
# Gaussians, and look at the clouds: they lean to one side. The distance does not care. **It sees means and standard
# deviations, and nothing else**, and it is no more than a lower bound of the true way.
#
# ### In many dimensions
#
# With $d$ features the mean is a vector and the spread a covariance matrix $\Sigma$. The formula becomes (Dowson &
# Landau 1982; used for pictures by [Heusel et al. 2017](https://arxiv.org/abs/1706.08500))
#
# $$d^2 = \lvert\mu_1-\mu_2\rvert^2 + \operatorname{tr}\Sigma_1 + \operatorname{tr}\Sigma_2
# - 2\operatorname{tr}\,(\Sigma_1\Sigma_2)^{1/2}$$
#
# If both clouds lie along the same axes, this is the formula above, once for each axis, added up: $\sigma_1^2 +
# \sigma_2^2 - 2\sigma_1\sigma_2$. Otherwise the last term takes care of how the axes lie. The trace of a root is the
# sum of the roots of the eigenvalues.

# %%
def frechet(x, y):
    S1, S2 = torch.cov(x.T), torch.cov(y.T)  # Σ₁, Σ₂  [d d]
    crossed = torch.linalg.eigvals(S1 @ S2).real.clamp(min=0).sqrt().sum()  # tr (Σ₁ Σ₂)^½
    return (x.mean(0) - y.mean(0)).square().sum() + S1.trace() + S2.trace() - 2 * crossed


def widest(space, count=32):
    """The same features in fewer numbers: along the directions in which the training split is widest."""
    z = space(training).double()  # [m d]
    values, vectors = torch.linalg.eigh(torch.cov(z.T))  # from the narrowest to the widest
    print(f"{z.shape[1]} features -> {count}, which hold {values[-count:].sum() / values.sum():.0%} of the variance")
    return lambda pictures: (space(pictures).double() - z.mean(0)) @ vectors[:, -count:]


print("spaces:", ", ".join(evaluator.spaces))
spaces = {name: widest(space) for name, space in evaluator.spaces.items()}
clouds = {name: space(training) for name, space in spaces.items()}  # [m 32] each
x, y = clouds["CLIP"].chunk(2)
print(f"x {list(x.shape)}, y {list(y.shape)}: by hand {frechet(x, y):.6f}", end=", ")
print(f"minisd.evaluation {evaluation.frechet_distance(x, y):.6f}")

# %% [markdown]
# Two spaces: pixels, 16×16 in three colours; and what CLIP's image tower makes of a picture. In both we keep the 32
# directions in which pictures differ most, since a covariance matrix wants more pictures than features, and far more if
# it is to be exact. How many more, is the first trap.
#
# ### Trap 1: how many pictures
#
# **Predict, then run.** Draw $N$ pictures of the training split by lot, and $N$ others. Both are real, from the same
# corpus, so the true distance is 0. What is $d^2$ for $N = 50$? And for $N = 540$?

# %%
sizes = [50, 80, 120, 200, 300, 540]
frechets, kernels, c = {}, {}, {}  # by space: [sizes lots]
for name, z in clouds.items():
    orders = [torch.randperm(len(z), generator=seeded(k)) for k in range(20 if full else 2)]
    by_lot = [[z[order[: 2 * N]] for order in orders] for N in sizes]
    frechets[name] = torch.tensor([[evaluation.frechet_distance(*a.chunk(2)) for a in of_size] for of_size in by_lot])
    kernels[name] = torch.tensor([[evaluation.kernel_distance(*a.chunk(2)) for a in of_size] for of_size in by_lot])
    v = torch.linalg.eigvalsh(torch.cov(z.T))  # [32]: the variances λ along the axes
    c[name] = (2 * v.sum() + (v[:, None] * v / (v[:, None] + v)).sum() + v.sum() / 2).item()

print("real pictures from real pictures, d²:")
print(f"{'N':>14}" + "".join(f"{N:>15}" for N in sizes))
for name in spaces:
    print(f"{name:14}" + "".join(f"{f'{d.mean():.2f} ± {d.std():.2f}':>15}" for d in frechets[name]))
panels = {
    f"{kind}, {name}": {"": [(d.mean().item(), d.std().item()) for d in of[name]]}
    for kind, of in {"Fréchet d²": frechets, "MMD²": kernels}.items()
    for name in ["CLIP"]
}
viz.with_errors(panels, [str(N) for N in sizes], "N", marks=(0,))

# %% [markdown]
# Far from 0, on the left, and the fewer the pictures, the farther. A mean of few pictures is off by chance, and so is a
# covariance, and a *squared* distance counts what is too large and what is too small both as distance. Errors that
# don't cancel are a **bias**. For Gaussians it can be worked out, to second order: with variances $\lambda_i$ along the
# axes, and $N$ pictures on each side,
#
# $$\mathbb E\, d^2 \approx \frac cN, \qquad
# c = \underbrace{2\sum_i \lambda_i}_{\text{means}}
# + \underbrace{\sum_{i,j} \frac{\lambda_i\lambda_j}{\lambda_i+\lambda_j}
# + \tfrac12\sum_i\lambda_i}_{\text{covariances}}$$
#
# (For $d$ equal variances: $c = \lambda\,(d^2 + 5d)/2$. The double sum is the expensive one: **twice the features need
# four times the pictures.** FID has 2,048 features, and is computed from tens of thousands of pictures.)
#
# If the bias is a straight line in $1/N$, it can be taken off: measure at $N$ and at $N/2$, draw the line through both,
# and read it at $1/N = 0$ ([Chong & Forsyth 2020](https://arxiv.org/abs/1911.07023)). That is what
# `measure_distance` gives as `frechet_infinity`.

# %%
panels = {}
for name in spaces:
    over, means = [1000 / N for N in sizes], [d.mean().item() for d in frechets[name]]
    at_infinity = 2 * means[-1] - np.interp(2 * over[-1], over[::-1], means[::-1])  # twice d² at N, less that at N/2
    panels[name] = {"measured": (over, means), "c / N": ([0, over[0]], [0, c[name] / sizes[0]])}
    ends = " and ".join(f"{means[i] * sizes[i]:.0f} at N = {sizes[i]}" for i in (0, -1))
    print(f"{name:10} c is {c[name]:.0f}; N d² is {ends}; at infinity d² is {at_infinity:+.2f}")
viz.curves(panels, xlabel="1000 / N", ylabel="d², real from real")

# %% [markdown]
# The line holds, and what is left at infinity is about 0, as it must be. Our features are not Gaussian, and $c$ is
# within a fifth of what is measured.
#
# So a $d^2$ without its $N$ says nothing, and two $d^2$ at different $N$ can't be compared. Fifty *real* pictures are
# farther from the real ones than 540 pictures that have been turned upside down, as the next table shows.
#
# **MMD** (right, above) is the alternative: the *kernel* distance of [Bińkowski et al. 2018
# ](https://arxiv.org/abs/1801.01401), who call it KID in Inception's features,
#
# $$\mathrm{MMD}^2 = \mathbb E\,k(x,x') + \mathbb E\,k(y,y') - 2\,\mathbb E\,k(x,y), \qquad
# k(x,y) = \Big(\frac{x^\top y}{d}+1\Big)^3$$
#
# How alike are two of the one set, two of the other, and one of each? No picture is compared with itself, and therefore
# the estimate is unbiased: around 0 at every $N$, on both sides of it. The error at small $N$ is large all the same:
# unbiased is not exact.
#
# ### Trap 2: which features
#
# Half of the training pictures are the reference. The other half is spoilt, each time in another way. What a distance
# can't feel, a model that has this fault is not charged for.
#
# **Predict, then run.** Which of these will pixels not notice, which will CLIP not notice? Which is worse, *blurred* or
# *darker*?
#
# - blurred; darker by a twentieth of the range; with noise; mirrored; upside down;
# - *no fluent*: one of the five styles never comes (a model that left out part of the data: **mode dropping**);
# - *54, ten times*: few different pictures, again and again (**mode collapse**);
# - *the reference* itself: the pictures of the other half, handed out one by one.

# %%
order = torch.randperm(len(training), generator=seeded(0))
half = len(training) // 2 if full else 100
reference, others = training[order[:half]], training[order[half : 2 * half]]  # [540 3 32 32] each
not_fluent = np.flatnonzero(names("style", train_rows)[order[half : 2 * half].numpy()] != "fluent")
spoilt = {
    "as they are": others,
    "blurred": F.avg_pool2d(F.pad(others, (1, 1, 1, 1), mode="replicate"), 3, stride=1),
    "darker": (others - 0.1).clamp(-1, 1),
    "with noise": (others + 0.2 * torch.randn(others.shape, generator=seeded(1))).clamp(-1, 1),
    "mirrored": others.flip(-1),
    "upside down": others.flip(-2),
    "no fluent": others[np.resize(not_fluent, half)],
    "54, ten times": others[torch.arange(half) % 54],
    "the reference": reference,
}
usual = {name: (d[-1].mean().item(), d[-1].std().item()) for name, d in frechets.items()}  # real from real, at this N
print(f"{'':16}" + "".join(f"{f'd², {name}':>15}{'beyond':>10}" for name in spaces))
beyond = {name: [] for name in spaces}
for what, pictures in spoilt.items():
    line = f"{what:16}"
    for name, space in spaces.items():
        d2 = evaluation.frechet_distance(space(pictures), clouds[name][order[:half]])
        beyond[name].append((d2 - usual[name][0]) / usual[name][1])
        line += f"{abs(d2):15.2f}{beyond[name][-1]:+10.1f}"
    print(line)
print("beyond: in standard deviations of what two halves of real pictures have")
rows = [torch.stack([pictures[k] for pictures in spoilt.values()]) for k in (3, 8)]
viz.strip(rows, [what.replace(" ", "\n", 1) for what in spoilt], size=0.84)

# %% [markdown]
# Take 3 standard deviations for noticed.
#
# - **Blur** is invisible to pixels at 16×16: whoever halves the size can't see it. CLIP finds little that is worse.
# - **Darker** or **blurred**? Pixels call the darker pictures by far the worse, CLIP the blurred ones. *Two sets, two
#   spaces, two orders.* Neither is wrong. A person would side with CLIP, here.
# - **A style that never comes** is noticed by CLIP, and not by pixels.
# - **Mirrored** pictures are noticed by neither. Emoji are nearly symmetrical; a mirrored clock or letter would be a
#   grave fault, and both would let it pass.
# - **Few pictures, again and again** are noticed by both.
#
# ### Trap 3: copies
#
# The last line is the worst of all. Whoever hands out the reference pictures has $d^2 = 0$: better than any other real
# pictures, at this $N$. **The best model by this measure is a photocopier.** A Fréchet distance is worth something
# together with a test for copies, and with a reference that the model has not seen, if one can afford it.
#
# ### And what no distance of this kind sees
#
# Both distances look at a few moments: Fréchet at means and covariances, the cubic kernel at those and the third ones.
# On a line, with mean 0 and variance 1 each:

# %%
generator = seeded(0)
bell = torch.randn(4000, 1, generator=generator)
shapes = {
    "another bell": torch.randn(4000, 1, generator=generator),
    "a waiting time": -torch.rand(4000, 1, generator=generator).log() - 1,  # exponential: a long tail on one side
    "a coin": torch.randint(2, (4000, 1), generator=generator) * 2.0 - 1,  # -1 or 1, and nothing between
}
print(f"{'from a bell':16}{'Fréchet d²':>12}{'MMD²':>10}")
for what, x in shapes.items():
    print(f"{what:16}{evaluation.frechet_distance(x, bell):12.3f}{evaluation.kernel_distance(x, bell):10.3f}")
panels = {what: {"samples": x} for what, x in shapes.items()}
viz.histograms(panels, dict.fromkeys(shapes, (0.0, 1.0)), "a bell", bins=40)

# %% [markdown]
# A coin is no bell, and both distances say that it is one. The waiting time is found out by the kernel, through its
# third moment. Whether two clouds in a network's features differ in such a way, no distance of this kind will tell.
#
# ### FID, and the numbers in papers
#
# **FID** is $d^2$ in 2,048 features of Inception, a network that learned to tell the thousand classes of ImageNet
# apart, at 299×299 pixels. We don't call ours FID, because it is not: another network is another space with another
# scale, and nothing can be converted. (Neither do numbers of one network agree if pictures were made smaller in
# different ways, or saved as JPEG: [Parmar et al. 2022](https://arxiv.org/abs/2104.11222).)
#
# The model card of Stable Diffusion v1 has no number, but a figure, `assets/v1-variants-scores.jpg`: FID over CLIP
# score for the checkpoints, a curve each, along guidance scales 1.5, 2, 3, 4, 5, 6, 7 and 8. It says: 50 steps of PLMS,
# 10,000 prompts from the validation set of COCO 2017, 512×512 pixels, "Not optimized for FID scores". You can now read
# this. 10,000 pictures: compare it with nothing that was measured at 30,000 or 50,000. COCO: photographs, so a model of
# drawings would lose. CLIP score: a judge that is kin to what the model reads with. The card claims no more than such a
# figure can: the curves "show the relative improvements of the checkpoints".
#
# And ours? The drawings of the held-out pairs, from the training split, beside two yardsticks of the same size.

# %%
print(f"{'from the training split':26}{'space':12}{'N':>5}{'d²':>16}{'at N = ∞':>11}{'MMD²':>16}")
for name, space in spaces.items():
    for what, pictures in {"real, held out": pairs.real, "real, decoded": pairs.decoded, "drawn": drawn[4.0]}.items():
        d = evaluation.measure_distance(what, name, space(pictures), clouds[name])
        spread = f"{d.frechet:.2f} ± {d.frechet_error:.2f}", f"{d.mmd:.3f} ± {d.mmd_error:.3f}"
        print(f"{what:26}{name:12}{d.count:5}{spread[0]:>16}{d.frechet_infinity:>11.2f}{spread[1]:>16}")

# %% [markdown]
# First look at the yardstick: real held-out pictures are not at 0, and that is the bias. What is above it, is the
# model's; and how much of that is the decoder's, the second line tells. With so few pictures, the order is within the
# errors: by CLIP, the drawings even come out nearer than the decoded pictures. This is what the sample can say, and no
# more.
#
# ## Guidance: what it buys, and what it costs
#
# Now all measures at all four scales.

# %%
far = {
    name: [evaluation.measure_distance("drawn", name, space(drawn[s]), clouds[name]) for s in scales]
    for name, space in spaces.items()
}
panels = {"score, concept": {}, "score, style": {}}
for s in scales:
    for one in scores[s]:
        if f"score, {one.question}" in panels:
            panels[f"score, {one.question}"].setdefault(one.judge, []).append((one.score, one.error))
panels |= {f"d², {name}": {"": [(d.frechet, d.frechet_error) for d in far[name]]} for name in far}
viz.with_errors(panels, [f"{s:g}" for s in scales], "guidance scale", marks=(0,))

# %% [markdown]
# From left to right: is it what was asked for, in the concept, in the style? And do the drawings as a whole look like
# the pictures, to pixels and to CLIP? (The judge by nearest picture has no score for styles here.) Where a distance
# falls and rises again, the drawings are looser than the pictures at the left end, and harder at the right. The judges
# need not agree on which scale is best, and CLIP's opinion has been dealt with.
#
# **Predict, then run.** By the patches, the bars of scale 1 and scale 4 overlap, for concept and for style. May one say
# that guidance 4 draws better? Think of where the bars come from: other captions. But at both scales, the captions were
# *the same*.
#
# <details><summary>Answer</summary>
#
# One may not go by the bars. A hard caption is hard at every scale, so the scores go up and down together, and the
# *difference* is surer than either. So take the difference for each caption, and bootstrap that.
#
# </details>

# %%
concepts, of_concept = np.unique(names("concept", pairs.rows), return_inverse=True)
k = len(concepts)
times = np.random.default_rng(0).multinomial(k, np.full(k, 1 / k), size=2000)  # [2000 k]: how often each was drawn


def hits_at(s, question):
    return by_patches[s][question].diagonal().astype(float)  # [n]


def error(per_caption):
    """The standard deviation of the mean, by a bootstrap over concepts."""
    sums, counts = np.bincount(of_concept, weights=per_caption), np.bincount(of_concept)
    return (times @ sums / (times @ counts)).std()


print("hits by the patches         difference      as if of different captions")
for question in ("concept", "style"):
    for a, b in ((1.0, 2.0), (2.0, 4.0), (4.0, 8.0), (1.0, 4.0)):
        first, second = hits_at(a, question), hits_at(b, question)
        naive = (error(first) ** 2 + error(second) ** 2) ** 0.5
        paired = f"{(second - first).mean():+6.1%} ± {error(second - first):.1%}"
        print(f"{question:8} from s = {a:g} to {b:g}   {paired}            ± {naive:.1%}")

# %% [markdown]
# The error of the difference is smaller than the naive one, for concepts by half and more. *Compare on the same
# captions and the same noise*, always: it costs nothing. And still it is no magic. From 1 to 4 both differences point
# upwards, by about one error and by nearly two: 156 captions can say "probably".
#
# What does guidance cost? Draw each of four prompts several times, and look at how different the drawings are: the
# standard deviation of a pixel over the seeds, the mean over all pixels.

# %%
prompts = ["fox, noto style", "red apple, fluent style", "rocket, fx style", "crying face, noto blob style"]
count = 6 if full else 2
rows, variety = [], []
for s in scales:
    how = asdict(replace(setting, guidance_scale=s))
    several = [sd.txt2img(prompt, **how, num_images=count).pictures.clamp(-1, 1) for prompt in prompts]
    several = torch.stack(several)  # [4 seeds 3 32 32]
    variety.append(several.std(dim=1).mean().item())
    rows.append(several[:2].flatten(0, 1))
    print(f"s = {s:g}: drawings {list(several.shape)}, standard deviation over the seeds {variety[-1]:.3f}")
viz.strip(rows, labels=[f"s = {s:g}" for s in scales], size=0.64)

# %%
fidelity = [score for score, _ in panels["score, concept"]["patches"]]
curves = {"distance": [d.frechet for d in far["CLIP"]], "variety": variety}
panels = {f"{what} over fidelity": {"": (fidelity, y)} for what, y in curves.items()}
figure = viz.curves(panels, "score, concept, patches")
for axes, (what, y) in zip(figure.axes, curves.items(), strict=True):
    axes.set_ylabel({"distance": "d², CLIP", "variety": "standard deviation over seeds"}[what], fontsize=8)
    axes.plot(fidelity, y, "o", color=viz.COLOURS[0], markersize=4)
    for i, (s, *at) in enumerate(zip(scales, fidelity, y, strict=True)):
        axes.annotate(f"s = {s:g}", at, (5, (4, -9)[i % 2]), textcoords="offset points", fontsize=8)
    axes.margins(0.12)
figure

# %% [markdown]
# This is the form of the figure in the model card, with a judge and features of our own. Follow a curve along $s$; to
# the right means: draws more of what was asked for. Guidance buys that, and pays with variety, and from some scale on
# with distance. There is no best $s$ without saying what for: one picture for a prompt, or many that differ.
#
# (Nor is "variety" safe from being fooled. Draw with ten steps of DPM-Solver++(2M), and it *rises* at $s = 8$: the
# steps are too long for so hard a push, and each drawing is damaged in its own way. A standard deviation takes damage
# for variety.)
#
# The README of CompVis's latent-diffusion has the same bargain in numbers, for the ImageNet model (guided by a
# classifier there):
#
# | | FID | Inception score | precision | recall |
# |---|---|---|---|---|
# | without guidance | 15.82 | 78.82 | 0.65 | 0.63 |
# | with guidance | 7.77 | 201.56 | 0.84 | 0.35 |
#
# *Precision* is the share of drawings that could be real, *recall* the share of real pictures that could be drawn. The
# FID halved, and the recall nearly did, too: FID liked what was gained better than it minded what was lost.
#
# ## Copies
#
# A photocopier had the best distance. Is our model one? The plain question is: how near is each drawing to the
# *nearest* training picture?
#
# **Predict, then run.** A drawing by a training caption is at 0.05 (root mean square, of a range of 1) from a training
# picture. A copy?
#
# <details><summary>Answer</summary>
#
# By itself, the number says nothing. Two artists' full moons may be one disc, and nobody copied. One has to know two
# things: how near come pictures that *can't* be copies, and how near comes a picture that *is* one?
#
# </details>
#
# The first yardstick are the real held-out pictures: nobody copied them from the training split. The second are the
# training pictures, encoded and decoded by the autoencoder. It is what our model would draw if it had memorised a
# latent to the last digit.

# %%
known = evaluator.groups["train"]  # captions of the training split, and their pictures
own = torch.tensor([[row["file_name"] for row in train_rows].index(row["file_name"]) for row in known.rows])  # [n]
sets = {
    "drawn, training captions": recited,
    "drawn, held-out captions": drawn[4.0],
    "real, held out": pairs.real,
    "training, decoded": known.decoded,
}
distances, nearest = {}, {}
print(f"{'nearest training picture':26}{'< 0.05':>8}{'5%':>8}{'median':>8}{'95%':>8}{'is its own':>12}")
for what, pictures in sets.items():
    near, distances[what], index = evaluation.nearness(what, pictures, library)
    closest = distances[what].argsort()[:12]
    nearest[what] = [pictures[closest], training[index[closest]]]
    itself = f"{(index == own).float().mean():.0%}" if "training" in what else "-"
    print(f"{what:26}{near.near:8.1%}{near.low:8.3f}{near.median:8.3f}{near.high:8.3f}{itself:>12}")
viz.histograms({"distance to the nearest training picture": distances}, bins=40, width=6.6, height=2.8)

# %% [markdown]
# *Is its own*: how often the nearest picture is the very one that the caption belongs to. For the decoded pictures that
# is nearly always so. For drawings by training captions, a large share is no proof of copying by itself: the caption
# asked for just that concept in that style.
#
# Here are the nearest of each kind, the most suspicious first, each above its nearest training picture.

# %%
rows = [row for pair in nearest.values() for row in pair]
labels = [label for what in nearest for label in (what.replace(", ", ",\n"), "the nearest")]
viz.strip(rows, labels=labels, size=0.62)

# %% [markdown]
# How to conclude:
#
# - If the drawings by *training* captions lay where the *decoded* pictures lie, it would be a photocopier.
# - If they lie where the *held-out* pictures lie, their nearness is what any two emoji of one thing have.
# - Between the two: it comes nearer than chance, and copies nothing to the pixel. This is learning by heart in part,
#   and to be expected of a model that saw each picture some ninety times.
# - Drawings by *held-out* captions are the control for the model itself: same decoder, same colours, and nothing to
#   recite.
#
# Two cautions. The library here is the sample, and the model saw more than seven times as many pictures: for the whole
# see [near copies](../docs/evaluation.md#near-copies). And a distance of pixels does not find a copy that is shifted,
# mirrored or recoloured.
#
# Stable Diffusion does copy, rarely. [Carlini et al. 2023](https://arxiv.org/abs/2301.13188) drew 175 million pictures
# by the captions of the 350,000 training pictures that stood most often in its data, and found 94 direct copies. What
# stands in the data many times over is learned by heart. (Our corpus has each picture once.)
#
# ## Your own model
#
# After a training, or a [fine-tuning](../docs/finetuning.md):
#
# ```bash
# minisd evaluate --model runs/mine --clip emoji --count 400 --out evaluation    # tables, scores.json, sheets, figures
# minisd evaluate --data minisd/data/sample --count 156                          # with nothing but what ships
# ```
#
# The folder of the corpus has to tell which concept a picture shows, and which pictures were held out (`concept`,
# `style` and `split` in its `metadata.jsonl`). **Hold something out before you train.** It can't be done afterwards.
# Without these, the pieces still serve: `minisd.evaluation.measure_distance` and `minisd.evaluation.nearness` take
# pictures and ask for no captions.
#
# And write down what you compare: the same captions, the same seeds, the same $N$, the same features. Then look at the
# pictures, the first sixty-four, none of them chosen.

# %%
print(f"This notebook took {time.time() - start:.0f} s.")

# %% [markdown]
# ## Recap
#
# - The loss measures one answer. Guidance, sampler, steps and decoder come after it.
# - Looking finds what is broken. Twenty pictures don't tell a good model from a better one.
# - A score needs three numbers: the model's hits, those by chance, those of real pictures. And an error.
# - A judge that takes part in the training, or in the choosing, can be pleased. Keep one out.
# - $d^2$ compares means and covariances. It has a bias of $c/N$, so it goes with its $N$ and a yardstick at the same
#   $N$. Features decide what it can see. A photocopier has $d^2 = 0$.
# - Guidance: more of what was asked for, less variety. Differences on the same captions and noise are surer than bars.
# - Copies: a distance says nothing without two yardsticks, what can't be a copy and what is one.
#
# ## In the CompVis source
#
# Neither CompVis/stable-diffusion nor CompVis/latent-diffusion has a script that computes an FID or a CLIP score. What
# there is:
#
# | here | there | file |
# |---|---|---|
# | guidance curves | the figure of FID and CLIP score | `assets/v1-variants-scores.jpg`, in the model card |
# | `measure_distance` | tables: FID, Inception score, precision, recall | `README.md` of latent-diffusion |
# | `decoded` | `log_images`: `reconstruction` beside `inputs` and `samples` | `ldm/models/diffusion/ddpm.py` |
# | sheets of drawings while it trains | `ImageLogger` | `main.py` |
# | `minisd.evaluation` as a whole | has no counterpart | |
#
# (`check_safety` in `scripts/txt2img.py` is a judge, too, of another question: it looks for what should not be shown,
# picture by picture, and says nothing about quality.)
#
# ## Try it
#
# - Sort the drawings by how sure the nearest-picture judge is. Is it right more often where it is surer?
# - Repeat the table of trap 2 with 8 and with 128 of the widest directions. What does pixels' space notice now?
# - Draw with 5 steps instead of 15. Which measure notices first? And with `sampler="dpmpp_2m"` at guidance 8?
# - Please CLIP beginning with a drawing, not with grey. How little has to be changed?
# - Send `photograph()` of `minisd.data` through `nearness`. How far is a cat from all emoji?
#
# There are no exercises for this stage; the page is [evaluation](../docs/evaluation.md), with the whole corpus.
#
# Before: [09 · Stable Diffusion v1](09_stable_diffusion_v1.ipynb).
# Next: [11 · Why is it noise?](11_why_is_it_noise.ipynb), where every classic mistake is made on purpose: the symptom,
# the cause, the test.
