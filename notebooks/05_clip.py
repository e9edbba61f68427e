# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5 · CLIP: from a sentence to numbers that a picture can use
#
# The UNet multiplies and adds numbers. A prompt is letters. Between them stands the **text encoder**: it turns a
# sentence into the **context**, a tensor $[b\ n\ d]$: for each of $b$ sentences, $n$ rows of $d$ numbers, a row for
# each token (a piece of text).
#
#     "a red fox"  →  tokens  →  embeddings   →  3 layers     →  context      →  UNet
#      letters        [1 24]     [1 24 192]      [1 24 192]      [1 24 192]
#
# You will understand
#
# - what a token is, how a tokenizer learns its pieces, and what becomes of words that it never saw;
# - what a text transformer does with tokens, step by step and shape by shape, and what the causal mask is for;
# - why Stable Diffusion hands the UNet a whole sequence and not one vector;
# - how CLIP learns what words *look like*, from nothing but pictures and their captions;
# - what such an encoder does not see. Word order is on the list.
#
# About 60 minutes to read; it runs in a minute or two on a laptop. Nothing is trained here. The modules of
# this stage are [`minisd/tokenizer.py`](../minisd/tokenizer.py) and [`minisd/clip.py`](../minisd/clip.py).
# [Notebook 04](04_vae.ipynb) was about the pictures' side; [notebook 03](03_unet.ipynb) showed where the context enters
# the UNet. Next: [notebook 06](06_sampling.ipynb).
#
# To see the tokens and the context of a prompt of your own in your browser first, open the stops
# [Tokens](../docs/play.md#tour=tokens) and [Context](../docs/play.md#tour=context) of the guided tour.

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
import math
import random
import time
from collections import Counter

import torch
import torch.nn.functional as F
from einops import rearrange

import minisd
from minisd import viz
from minisd.clip import contrastive_loss
from minisd.data import sample
from minisd.data.shapes import COLOURS, scene, shape_corpus
from minisd.evaluation import features, find_nearest

full = MODE == "full"
start = time.time()

corpus = sample(size=32)
sd = minisd.load(device="cpu")  # "emoji": draws 32x32 emoji
clip, tokenizer = minisd.load_clip()  # its text tower once more, with the image tower that it was trained beside

prompt = "a red fox, noto style"
context = sd.get_learned_conditioning([prompt])
print(f"{prompt!r}  ->  context {context.dtype} {list(context.shape)}")

# %% [markdown]
# That is all that the UNet is ever told: 24 rows of 192 numbers. (Stable Diffusion v1: 77 rows of 768.)
#
# ## Naive idea 1: a number for each word
#
# Sort the words, number them, done. Here are the words of all captions of our corpus.

# %%
vocabulary = sorted({word for caption in corpus.captions for word in caption.replace(",", " ,").split()})
number = {word: i for i, word in enumerate(vocabulary)}
words = ["fox", "wolf", "tiger", "fries", "tomato", "castle"]
print(f"{len(vocabulary)} words:", {word: number[word] for word in words})

numbers = torch.tensor([number[word] for word in words]).float()[:, None]  # [6 1]
one_hot = F.one_hot(numbers[:, 0].long(), len(vocabulary)).float()  # [6 V]: a 1 at the word's number, else 0
panels = {"distance,\none number a word": torch.cdist(numbers, numbers)}
panels["distance,\none-hot"] = torch.cdist(one_hot, one_hot)
viz.matrices(panels, words, words, numbers=".3g", cell=(0.42, 0.34))

# %% [markdown]
# Left: the alphabet decides what is alike. *tiger* and *tomato* are neighbours, *fox* and *wolf* are far apart.
# And a network takes numbers for amounts: *wolf* would be a lot more than *fox*, and their mean would be a third
# word that has nothing to do with them.
#
# ## Naive idea 2: a place of its own for each word
#
# **One-hot**: a vector as long as the vocabulary, 0 everywhere but at the word's number (above, on the right). Now no
# word is more than another. But all are equally strange to each other: every distance is $\sqrt2 \approx 1.41$. And a
# word that is not in the list has no vector at all: with *fox* in it, *foxes* is unknown.
#
# ## Naive idea 3: a bag of words
#
# A sentence has many words. Add up their one-hots: how often does each word occur?

# %%
def bag(sentence: str, vocabulary: list[str]) -> torch.Tensor:
    return torch.tensor([float(sentence.split().count(word)) for word in vocabulary])


known = ["bites", "dog", "man"]
a, b = bag("dog bites man", known), bag("man bites dog", known)
print(f"dog bites man  {a.tolist()}\nman bites dog  {b.tolist()}\nequal: {torch.equal(a, b)}")

# %% [markdown]
# One is not news, the other is, and to the bag both are the same. A sum forgets the order.
#
# So this is what we want:
#
# 1. any text can be written, with a vocabulary of bounded size → **tokens**;
# 2. words that mean similar things get similar vectors, and these are learned → **embeddings**;
# 3. the order counts, and a word may change what its neighbours mean → **positions**, **attention**;
# 4. "similar" means: *looks* similar. The pictures have to have a say → **contrastive training**.
#
# ## Tokens: pieces of words
#
# Letters could write any text with a vocabulary of 26. But sentences would get long, and a letter means nothing.
# Words mean something, but there are too many. In between: **pieces** of words, as large as they are
# frequent. *Byte-pair encoding* (BPE; Sennrich et al. 2016) finds them in a most simple way:
#
# > Begin with single letters. Find the pair of neighbours that occurs most often. Make it one piece. Repeat.
#
# The last letter of a word carries `</w>`, so that *red* in *red* and in *redo* can be told apart. Here it is,
# on six captions.

# %%
captions = ["red apple, noto style", "red heart, noto style", "red circle, fluent style",
            "fox, noto style", "hot dog, fx style", "dog, fluent style"]  # fmt: skip
counts = Counter(word for caption in captions for word in caption.replace(",", " ,").split())
spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}  # "fox": ["f", "o", "x</w>"]
# Whatever it learns later, a tokenizer knows all 256 bytes, in a word and at its end, and two special tokens: 514.
ids = dict(minisd.BPETokenizer.train(captions, vocab_size=514).vocab)


def merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Make one piece of each such pair of neighbours."""
    merged = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


table = {"letters": [piece for word in ("red", "heart", ",", "noto", "style") for piece in spelled[word]]}
merges = []
for k in range(1, 100):
    pairs = Counter()
    for word, pieces in spelled.items():
        for pair in zip(pieces, pieces[1:], strict=False):
            pairs[pair] += counts[word]
    if not pairs:
        break  # every word is whole
    # the most frequent; among equals, the one whose pieces have been known for longer
    best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
    merges.append(best)
    ids[best[0] + best[1]] = len(ids)
    spelled = {word: merge(pieces, best) for word, pieces in spelled.items()}
    if k <= 9:
        print(f"merge {k}: {best[0]:>3} + {best[1]:7} -> {best[0] + best[1]:9} (seen {pairs[best]} times)")
    if k in (1, 4, 9, 26):
        table[f"after {k}"] = [piece for word in ("red", "heart", ",", "noto", "style") for piece in spelled[word]]

print(f"after {len(merges)} merges, every word is one piece; the last: {merges[-1][0]} + {merges[-1][1]}")
assert merges == minisd.BPETokenizer.train(captions, vocab_size=514 + len(merges)).merges  # the engine's are the same
viz.token_table(table)

# %% [markdown]
# The caption "red heart, noto style" after so many merges. Orange: the word goes on; blue: the word ends here. The
# word *style*, which stands in every caption, is whole after four merges. *heart*, seen once, is the last to
# become whole. Nobody told the algorithm about words or syllables: **what is frequent gets short**.
#
# The list of merges *is* the tokenizer. To read a new text, split it into letters, and apply the merges in their
# order. Two such lists come with minisd: ours, learned from the captions of our corpus, and that of OpenAI's CLIP,
# learned from far more text, which Stable Diffusion v1 uses.
#
# **Predict, then run.** Into how many tokens does CLIP cut *foxes*, *cyberpunk*, *axolotl*, *2024* and the emoji of a
# fox? And ours?
#
# <details><summary>Answer</summary>
#
# CLIP: 1, 1, 4, 4 and 2. Ours: 3, 4, 5, 4 and 4. It depends on what each has read. See below.
#
# </details>

# %%
openai = minisd.BPETokenizer.clip()
for name, t in (("ours", tokenizer), ("CLIP's", openai)):
    print(f"{name:7} {len(t.vocab):6,} pieces = 512 bytes + {len(t.merges):6,} merges + 2; first merges {t.merges[:4]}")


def read(t, text: str, max_length: int = 77) -> list[int]:
    """Token ids of a text, from the start token to the first end token."""
    ids = t([text], max_length).ids[0].tolist()
    return ids[: ids.index(t.end_token) + 1]


texts = {prompt: prompt, "Foxes, cyberpunk": "Foxes, cyberpunk", "an axolotl": "an axolotl",
         "in 2024": "in 2024", "naïve, and a fox emoji": "naïve 🦊"}  # fmt: skip
pieces, numbers = {}, {}
for label, text in texts.items():
    for name, t in (("ours", tokenizer), ("CLIP's", openai)):
        ids_of_text = read(t, text) if text == prompt else read(t, text)[1:-1]  # start and end once are enough
        numbers[f"{label}\n{name}"], pieces[f"{label}\n{name}"] = ids_of_text, t.pieces(ids_of_text)
viz.token_table(pieces, numbers)

# %% [markdown]
# Under each piece its **id**: its number in the vocabulary. Every sentence stands between a start and an end token
# (grey; left out below the first pair).
#
# - **Case** is gone: *Foxes* and *foxes* are the same.
# - **Frequent words are whole**, and what is frequent depends on who was asked. *noto* is one piece to us, two to CLIP.
#   *cyberpunk* is one to CLIP.
# - **Rare words** fall apart into pieces that mean little by themselves. What an *ax-o-lot-l* is, the model has to
#   find out.
# - **Numbers** are read digit by digit. 2024 is four tokens.
# - **Nothing is unknown.** What no merge covers is spelled in *bytes*: *ï* is two, an emoji is four. Each of the 256
#   bytes has a sign, so that it can be written down. That is where the strange letters come from.
#
# Can be written does not mean can be understood. Remember this for later.
#
# **Predict, then run.** A poet gives CLIP a prompt of 100 words. What will the model draw of the last 20?
#
# <details><summary>Answer</summary>
#
# Nothing. The context has 77 rows. Two are for start and end, so 75 tokens remain, and whatever comes after is cut off.
# minisd warns, and says what was lost. **Padding** is the other side of the coin: a short prompt is filled up to 77
# tokens, in Stable Diffusion v1 by more end tokens.
#
# </details>

# %%
long = "a red fox, " + "very " * 70 + "proud, wearing a crown, in front of a castle"
tokens = openai([prompt, long], max_length=77)
print(f"ids {list(tokens.ids.shape)}, lost: {tokens.lost}")
end = (tokens.ids == openai.end_token).int().argmax(dim=1)
print(f"the first end token stands at {end.tolist()}; what follows it is padding: {(76 - end).tolist()} more of it")

# %% [markdown]
# ## Embeddings: a row for each token, a row for each place
#
# From here on, in our model: 24 places, $d = 192$.

# %%
input_ids = sd.cond_stage_model.tokenize([prompt])  # [b n], int64
tower = sd.cond_stage_model.transformer.text_model
token_table, position_table = tower.embeddings.token_embedding.weight, tower.embeddings.position_embedding.weight

x = token_table[input_ids] + position_table  # [b n d]: look up, and add the place's own vector
assert torch.equal(x, tower.embeddings(input_ids))

print(f"input_ids {list(input_ids.shape)}: {input_ids[0].tolist()}")
print(f"token table {list(token_table.shape)}, position table {list(position_table.shape)}  ->  x {list(x.shape)}")
parameters = sum(p.numel() for p in tower.parameters())
print(f"text tower: {parameters:,} parameters, {token_table.numel() / parameters:.0%} of them in the token table")

# %% [markdown]
# Looking up row $i$ is the same as multiplying a one-hot vector by the table. So idea 2 is still in here, but the
# table is **learned**, and has 192 columns rather than one for each word. Words can be near to each other now. (The
# table has 3,072 rows, a few more than there are pieces.)
#
# And the **positions**: attention, which comes next, asks what is in a row, not where the row stands. So a vector
# that says "I am the third" is added to the third row. It is crude, and it works.
#
# ## A layer, step by step
#
# Three layers of the same kind follow (in SD v1: twelve). Each has two halves. **Attention** lets a row gather from
# other rows. The **MLP**, two linear maps with a bend between them, works on each row by itself. Both see the rows
# normalised ($\mathrm{LN}$, LayerNorm), and both add to what is there:
#
# $$x \leftarrow x + \mathrm{Attention}(\mathrm{LN}_1(x)), \qquad x \leftarrow x + \mathrm{MLP}(\mathrm{LN}_2(x))$$
# $$\mathrm{Attention} = \mathrm{softmax}\!\left(\frac{QK^\top}{\sqrt{d_h}} + M\right)V
#   \qquad \text{(Vaswani et al. 2017, eq. 1, with a mask)}$$
#
# $d_h$ is the width of a head: the attention is done three times side by side, on 64 of the 192 numbers each. $M$ is
# the **causal mask**: $-\infty$ above the diagonal, else 0. As $e^{-\infty} = 0$, token $i$ gets nothing from the
# tokens after it.

# %%
layer = tower.encoder.layers[0]
attn, mlp, heads = layer.self_attn, layer.mlp, 3
n, d = x.shape[1:]

with torch.no_grad():
    h = layer.layer_norm1(x)  # mean 0, variance 1 in each row, then scaled and shifted
    # three views of each row: what I look for, what I offer, what I hand over; d splits into heads
    q, k, v = (
        f(h).unflatten(-1, (heads, d // heads)).transpose(1, 2) for f in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(d // heads)  # QKᵀ / √d_h: how well does key j fit query i?
    mask = torch.full((n, n), -torch.inf).triu(1)  # M
    weights = (scores + mask).softmax(dim=-1)  # each row sums to 1
    gathered = (weights @ v).transpose(1, 2).flatten(2)
    after_attention = x + attn.out_proj(gathered)

    wide = mlp.fc1(layer.layer_norm2(after_attention))
    wide = wide * torch.sigmoid(1.702 * wide)  # quick-GELU
    y = after_attention + mlp.fc2(wide)

    assert torch.allclose(y, layer(x), atol=1e-4)

for name, value in {"x": x, "q, k, v": q, "scores, weights": weights, "gathered": gathered,
                    "wide": wide, "y": y}.items():  # fmt: skip
    print(f"{name:16} {list(value.shape)}")

# %% [markdown]
# What may a token see, and what does it look at? Below, a row is the token that looks, a column is what it looks at.
# Grey is masked.

# %%
shown = 9  # the prompt, its end token, and one token of padding
names = [piece.removesuffix("</w>") for piece in tokenizer.pieces(input_ids[0, :shown].tolist())]
names[0], names[-2], names[-1] = "start", "end", "padding"
visible = weights[0, :, :shown, :shown].masked_fill(torch.ones(shown, shown).triu(1).bool(), torch.nan)
viz.matrices({f"layer 1, head {i + 1}": visible[i] for i in range(heads)}, names, names, cell=(0.24, 0.24))

# %% [markdown]
# Look at the row of *end*. It may see everything, and its three heads divide the work: the first reads *red* and *fox*,
# the second *fox* alone, the third *noto* as well. Nobody told them to. Padding, further down, looks at the same.
#
# Why a mask at all? A language model needs one: it is to predict the next word, and must not see it. CLIP predicts no
# words. Its authors kept the mask so that the tower could start from a language model, or be trained as one on the
# side (Radford et al. 2021, section 2.4). They did neither. What remains is a consequence: **only the last
# token has seen the whole sentence**. It is the end token that has to speak for it.
#
# **Predict, then run.** We change *noto* to *fx* in "a red fox, noto style". Which of the 24 rows of the context
# change?
#
# <details><summary>Answer</summary>
#
# The changed word's own row and every row after it. Not one before: *start*, *a*, *red*, *fox* and the comma stay
# the same to the last bit, since they cannot see what comes later. The row of *fox* does not know in which style the
# fox will be drawn. But *style*, *end* and all of the padding do.
#
# </details>

# %%
def difference(one: str, other: str) -> torch.Tensor:
    """How far apart two contexts are, token by token [n], relative to the length of a row."""
    a, b = sd.get_learned_conditioning([one, other])
    return (a - b).norm(dim=-1) / a.norm(dim=-1)


changes = {"noto → fx": "a red fox, fx style", "fox → panda": "a red panda, noto style",
           "red → blue": "a blue fox, noto style"}  # fmt: skip
rows = torch.stack([difference(prompt, other) for other in changes.values()])  # [3 n]
names = ["start", *names[1:-2], "end", *["pad"] * (n - 8)]
viz.matrices({f"difference from the context of {prompt!r}": rows}, list(changes), names, ".1f", (0.33, 0.3))

# %% [markdown]
# (1.4, the root of 2, is the distance of two rows at right angles: nothing in common.) Look at the column *fox*. To
# exchange *red* changes it more (1.5) than to exchange *fox* itself (0.9). This is what the layers are for: after them,
# the row does not say "fox". It says something like "what was called red is a fox".
#
# One detail of the MLP. Its bend is the **quick-GELU**, $x\,\sigma(1.702\,x)$, which OpenAI took instead of the exact
# GELU, $x\,\Phi(x)$: an approximation that is quicker to compute (Hendrycks & Gimpel 2016). The two are near, not
# equal. Weights trained with one and run with the other give a model that is slightly off, without any error message.

# %%
u = torch.linspace(-4, 4, 161)
quick, exact = u * torch.sigmoid(1.702 * u), F.gelu(u)
print(f"largest difference: {(quick - exact).abs().max():.3f}")
panels = {"the bend": {"quick-GELU": (u, quick), "exact GELU": (u, exact), "ReLU": (u, F.relu(u))}}
panels["quick-GELU minus exact GELU"] = {"": (u, quick - exact)}
viz.curves(panels, xlabel="in", ylabel="out", width=2.8, height=2.1)

# %% [markdown]
# ## The last hidden state
#
# After the last layer comes one more LayerNorm, and that is the context. As a picture:

# %%
with torch.no_grad():
    hidden = tower.embeddings(input_ids)
    for layer in tower.encoder.layers:
        hidden = layer(hidden)
    hidden = tower.final_layer_norm(hidden)
assert torch.allclose(hidden, context, atol=1e-4)

print(f"mean {context.mean():.2f}, standard deviation {context.std():.2f}; length of a row {context[0, 5].norm():.2f}")
alike = F.cosine_similarity(context[0, 8:], context[0, 7:8])  # each row of padding, and the end token
print(f"cosine of the end token and each row of padding: from {alike.min():.3f} to {alike.max():.3f}")
viz.matrices({f"context of {prompt!r}": context[0]}, names, cell=(0.036, 0.15), xlabel="192 numbers for each token")

# %% [markdown]
# One row of the figure is one token. The rows of words differ. From the end token on, they are all but the same:
# stripes. Each of them has seen the whole sentence, and has nothing to add.
#
# ## Why the whole sequence, and not one vector?
#
# If the end token has seen everything, why not hand over its row alone? There are arguments.
#
# - It is trained to tell pictures apart, no more. What is not needed for this may be lost in it.
# - In cross-attention, every pixel asks its own question, and each row of the context may answer (notebook 03). With
#   one row, all pixels get the same answer: the softmax over one row is 1.
#
# Arguments are cheap, and we can try. `draw` is what `txt2img` does inside, with a context of our choice. We keep some
# rows of the context, and put those of the empty prompt in the place of the others. In the last variant, the end
# token's row stands in all places, which to attention is the same as one row alone.


# %%
@torch.no_grad()
def draw(model, context, x_T, steps=12, guidance_scale=4.0):
    """Context [b n d] and noise [b 4 h w] → pictures [b 3 H W]."""
    empty = model.get_learned_conditioning([""]).expand_as(context)
    eps_model = minisd.classifier_free_guidance(model.apply_model, context, empty, guidance_scale)
    *_, last = minisd.sampling.dpmpp_2m(eps_model, x_T, model.schedule, steps if full else 2)
    return model.decode_first_stage(last.x)


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


train = [i for i, row in enumerate(corpus.rows) if row["split"] == "train"]
asked = random.Random(1).sample(train, 32 if full else 8)
prompts = [corpus.captions[i] for i in asked]

c = sd.get_learned_conditioning(prompts)  # [b n d]
empty = sd.get_learned_conditioning([""]).expand_as(c)
end = (sd.cond_stage_model.tokenize(prompts) == tokenizer.end_token).int().argmax(dim=1)[:, None]  # [b 1]
place = torch.arange(n)[None]  # [1 n]
contexts = {
    "all rows": c,
    "words only": torch.where((place < end)[..., None], c, empty),
    "end and\npadding only": torch.where((place < end)[..., None], empty, c),
    "end token only": torch.where((place == end)[..., None], c, empty),
    "end token\neverywhere": c[torch.arange(len(c)), end[:, 0]][:, None].expand_as(c),
}

# %% [markdown]
# How do we judge a drawing? As [`minisd/evaluation`](../minisd/evaluation/__init__.py) does: find the nearest training
# picture (at 16×16 pixels) and see whether it shows the concept that was asked for.
#
# **Predict, then run.** Which does the UNet need more, the rows of the words, or those of the end token and the
# padding?
#
# <details><summary>Answer</summary>
#
# Those of the end token and the padding. They outnumber the words, and each of them knows the whole sentence.
#
# </details>

# %%
library = features(corpus.batch(train))  # [m 768]
concepts = [row["concept"] for row in corpus.rows]
drawn, lines = {}, []
for name, variant in contexts.items():
    drawn[name] = draw(sd, variant, noise(len(asked)))
    nearest, _ = find_nearest(features(drawn[name]), library)
    hits = sum(concepts[train[j]] == concepts[i] for i, j in zip(asked, nearest, strict=True))
    lines.append(f"{name.replace(chr(10), ' '):22} {hits:2} of {len(asked)} right")
print("\n".join(lines))
titles = [concepts[i] for i in asked[:6]]
viz.strip([pictures[:6] for pictures in drawn.values()], titles, list(drawn), size=0.64)

# %% [markdown]
# With all rows, 29 of 32 drawings show the right thing. Without the words: 25. With the words alone: 21. (32 are few: a
# difference of 4 may be chance, one of 8 hardly is.) This UNet reads the **padding** at least as much as the words. It
# looks like waste, and is not. Whoever zeroes it, or leaves it out, as is right in other transformers, gives this UNet
# a context that it was never trained on.
#
# And one vector everywhere? 28, so for "concept, style" it is enough. Our captions are too short for the arguments
# above to show. Those speak of prompts with many things in them, each of which has to find its place. CompVis has a
# class for the one vector, too; SD v1 does not use it.
#
# ## CLIP: who taught the tower what words look like?
#
# Nothing so far says that *fox* has to do with orange. That comes from training, and from a second tower, which turns
# *pictures* into vectors. It is a transformer as well: the picture is cut into 16 patches of 8×8 pixels, and each
# patch is a token.

# %%
vision = clip.vision_model
picture = corpus.batch([corpus.captions.index("fox, noto style")])  # [1 3 32 32]
patches = rearrange(picture, "1 c (i h) (j w) -> (i j) c h w", h=8, w=8)  # [16 3 8 8]
with torch.no_grad():
    # a row for each patch: its 192 numbers times a matrix of 192×192
    patch_rows = patches.flatten(1) @ vision.embeddings.patch_embedding.weight.flatten(1).T  # [16 192]
    seq = torch.cat([vision.embeddings.class_embedding[None], patch_rows])  # [17 192]: a class token in front
    seq = (seq + vision.embeddings.position_embedding.weight)[None]  # where each patch was, [1 17 192]
    hidden = vision.encoder(vision.pre_layrnorm(seq))  # four layers as above, but without a mask
    pooled = vision.post_layernorm(hidden[:, 0])  # the class token has gathered the whole, [1 192]
    I_fox = F.normalize(clip.visual_projection(pooled), dim=-1)  # of length 1, [1 192]
    assert torch.allclose(I_fox, clip.get_image_features(picture), atol=1e-4)
print(f"picture {list(picture.shape)} -> patches {list(patches.shape)} -> rows {list(patch_rows.shape)}")
print(f"with the class token {list(seq.shape)} -> its last state {list(pooled.shape)} -> I {list(I_fox.shape)}")
viz.strip([picture, patches], labels=["picture", "patches"], size=0.4)

# %% [markdown]
# Two things are other than in the text tower. There is no mask: every patch may look at every other. And what speaks
# for the whole is not the last token but the first, a learned **class token** that stands for no patch. (CLIP ViT-L/14
# cuts 224×224 pixels into 256 patches of 14×14.)
#
# Take a batch of $N$ pictures and their captions. Each tower ends in one vector of length 1: $I_i$ for picture $i$,
# and, from the end token, $T_j$ for caption $j$. Their **similarity** is the cosine, $I_i \cdot T_j$. Training has
# one aim, **contrast**: the right caption fits better than the $N-1$ others, and the right picture fits better than
# the $N-1$ others.
#
# $$\mathrm{logits}_{ij} = \frac{I_i \cdot T_j}{\tau}, \qquad
#   L = \tfrac12\Big(\underbrace{-\tfrac1N\sum_i \log \mathrm{softmax}_j(\mathrm{logits}_{ij})\big|_{j=i}}_{
#   \text{which caption?}}
#   + \underbrace{-\tfrac1N\sum_j \log \mathrm{softmax}_i(\mathrm{logits}_{ij})\big|_{i=j}}_{\text{which picture?}}\Big)
#   \qquad \text{(Radford et al. 2021, figure 3)}$$
#
# (In code each half is a cross-entropy: the rows are the logits, and picture $i$'s right class is $i$. So it is
# `F.cross_entropy(logits, arange(N))`, once for `logits` and once for `logits.T`. If the features were not scaled to
# length 1 first, $I_i \cdot T_j$ would be no cosine, and a long vector would count for more than a short one.)
#
# $\tau$ is the **temperature**. It is learned too, from 0.07 on: the code has $1/\tau$ = `logit_scale.exp()`, at most
# 100 (Radford et al., section 2.5). Why is it needed? Cosines lie in $[-1, 1]$, and a softmax of such small numbers can
# never be sure of anything. Even with 1 on the diagonal and 0 elsewhere, the right one among 256 would get a share of
# $e/(e+255) = 1\%$.

# %%
def index(caption: str) -> int:
    return corpus.captions.index(caption)


chosen = ["fox, noto style", "fox, fluent style", "pizza, noto style", "wolf, noto style", "red apple, noto style",
          "green apple, noto style", "rocket, noto style"]  # fmt: skip
pixels = corpus.batch([index(caption) for caption in chosen])  # [7 3 32 32]
with torch.no_grad():
    I_e = clip.get_image_features(pixels)  # [7 192], unit vectors
    T_e = clip.get_text_features(tokenizer(chosen, 24).ids)  # [7 192], unit vectors
    scale = clip.logit_scale.exp()
    assert torch.allclose(scale * I_e @ T_e.T, clip(tokenizer(chosen, 24).ids, pixels), atol=1e-4)

print(f"pictures {list(pixels.shape)} -> I_e {list(I_e.shape)}; captions -> T_e {list(T_e.shape)}; 1/τ = {scale:.1f}")
similarity = I_e @ T_e.T
panels = {"cosine": similarity, "softmax along the row, τ = 1": similarity.softmax(dim=1)}
panels[f"softmax along the row, τ = 1/{scale:.1f}"] = (scale * similarity).softmax(dim=1)
viz.matrices(panels, columns=chosen, numbers=".2f", cell=(0.4, 0.4), pictures=pixels)

# %% [markdown]
# A row is a picture, a column a caption; the right answers are on the diagonal. With $\tau = 1$, the softmax hardly
# prefers the right caption. With the learned $\tau$ it is sure, but for the second fox.
#
# The cosines off the diagonal tell something, too. The two foxes are near to each other, so are the two apples, and so
# are *fox* and *pizza*. We'll come back to this.
#
# The loss, by hand, of the first three:

# %%
logits = scale * similarity[:3, :3]
which_caption = -logits.softmax(dim=1).diagonal().log()  # for each picture, -log of the right caption's share
which_picture = -logits.softmax(dim=0).diagonal().log()  # for each caption, -log of the right picture's share
by_hand = (which_caption.mean() + which_picture.mean()) / 2
assert torch.allclose(by_hand, contrastive_loss(logits))
print("logits\n", logits.numpy().round(1))
print(f"which caption? {which_caption.numpy().round(4)}\nwhich picture? {which_picture.numpy().round(4)}")
print(f"loss {by_hand:.4f}")

# %% [markdown]
# Nearly all of the loss is one term, 5.79. The second caption, "fox, fluent style", fits the first picture (15.0)
# better than its own (9.2), so its own gets a share of $e^{-5.79}$, 0.3%. That is no accident. This picture is one of
# those that were **held out**: it was never trained on.
#
# **Predict, then run.** A new CLIP, with random weights, on a batch of 64. About how large is the loss?
#
# <details><summary>Answer</summary>
#
# It guesses: each of 64 captions is as likely as the next, so $-\log\frac1{64} = 4.16$, or a little more, because a
# random network is not quite undecided. This is the number to compare with when a training starts. For our
# batches of 256 it is 5.55, and for OpenAI's of 32,768 it is 10.4.
#
# </details>

# %%
torch.manual_seed(0)
untrained = minisd.CLIPModel(clip.text_config, clip.vision_config, clip.end_token)
batch = random.Random(0).sample(train, 64)
batch_ids, batch_pixels = tokenizer([corpus.captions[i] for i in batch], 24).ids, corpus.batch(batch)
with torch.no_grad():
    losses = [contrastive_loss(model(batch_ids, batch_pixels)) for model in (untrained, clip)]
print(f"untrained {losses[0]:.3f}, guessing {math.log(64):.3f}, shipped {losses[1]:.3f}")

# %% [markdown]
# ## What the vectors know: searching
#
# A sentence and all pictures are points in one space, so a sentence can be searched for. Below, each row shows the
# six pictures that are nearest to a query, and their cosines.

# %%
everything = corpus.batch(range(len(corpus)))  # [m 3 32 32]


@torch.no_grad()
def text_features(sentences: list[str]) -> torch.Tensor:
    return clip.get_text_features(tokenizer(sentences, 24).ids)


with torch.no_grad():
    image_features = clip.get_image_features(everything)  # [m 192]

queries = ["a fox", "something red", "a sad face", "fluent style", "a puppy", "zorblax"]
cosines = text_features(queries) @ image_features.T  # [6 m]
best = cosines.topk(6)
notes = [[f"{value:.2f}" for value in row] for row in best.values.tolist()]
viz.strip(everything[best.indices], labels=queries, notes=notes, size=0.64)

# %% [markdown]
# And which *words* are near to a word? The cosines of a few with the names of all 266 concepts:

# %%
names_of_concepts = sorted(set(concepts))
concept_features = text_features(names_of_concepts)  # [k 192]
for query in ("fox", "dog", "red", "sad face", "puppy", "kitten", "zorblax"):
    top = (text_features([query]) @ concept_features.T)[0].topk(5)
    print(f"{query:9}", ", ".join(f"{names_of_concepts[i]} {v:.2f}" for v, i in zip(*top, strict=True)))

# %% [markdown]
# This is worth a long look.
#
# - The words that are nearest to *fox*, after itself, are *camel* and *pizza*. Near means: **looks alike**, here by
#   colour. A dictionary would say *wolf*. OpenAI's CLIP was trained on 400 million captions, which speak of more
#   than looks. Ours has seen 8,000 pictures, each with its name.
# - *red* is near to a rose and a balloon, whose captions do not say that they are red. The pictures do. (So is a door,
#   which is brown. And *something red* finds Mount Fuji: *something* is in no caption, and blurs the query.)
# - *fluent style* finds the two fluent styles, and nothing else: style is in the vectors as well.
# - *puppy* and *kitten* stand in no caption. They can be written, and they get vectors, but the vectors **mean
#   nothing**: a puppy is a locomotive, as *zorblax* is a hammer. And the cosines do not warn us: 0.72 and 0.74 are as
#   high as that of *fox* and *camel*. There is no answer "I don't know".
#
# ## Zero-shot: a classifier made of sentences
#
# Whoever can compare pictures with sentences can classify without training a classifier. Write a caption for each
# class, and choose the one that is nearest. Better yet, write several captions for each class and take the mean of
# their vectors (Radford et al. 2021, section 3.1.4). Two tasks: which style (of 5)? Which concept (of 266)?

# %%
styles = ["noto", "noto blob", "fluent", "fluent flat", "fx"]
kept = names_of_concepts if full else names_of_concepts[:20]
grid = text_features([f"{concept}, {style} style" for concept in kept for style in styles])
grid = grid.unflatten(0, (len(kept), len(styles)))  # [concepts styles 192]
style_classifier, concept_classifier = F.normalize(grid.mean(0), dim=-1), F.normalize(grid.mean(1), dim=-1)

style_guess = [styles[i] for i in (image_features @ style_classifier.T).argmax(1).tolist()]
concept_guess = [kept[i] for i in (image_features @ concept_classifier.T).argmax(1).tolist()]
print(f"{'pictures of':22} {'count':>5}   style   concept")
for split, name in (("train", "training"), ("test_pair", "held-out pairs"), ("test_concept", "held-out concepts")):
    members = [i for i, row in enumerate(corpus.rows) if row["split"] == split]
    style_right = sum(style_guess[i] == corpus.rows[i]["style"] for i in members) / len(members)
    concept_right = sum(concept_guess[i] == concepts[i] for i in members) / len(members)
    print(f"{name:22} {len(members):5}    {style_right:4.0%}      {concept_right:4.0%}")
print(f"{'guessing':22} {'':5}    {1 / len(styles):4.0%}      {1 / len(kept):4.1%}")

# %% [markdown]
# Three rows, three lessons.
#
# - **Training pictures**: 92% of the concepts. This is memory.
# - **Held-out pairs**: it knows the thing and it knows the style, but never saw the two together. 29% is seventy times
#   better than guessing, and far from 92%.
# - **Held-out concepts**: none right. How could it be? Nobody ever told it which picture *lady beetle* is. But the
#   *style* of these pictures it names in half of the cases: style carries over to things that are new.
#
# With 400 million pairs, hardly a thing is new. That is the secret of "zero-shot": OpenAI's best CLIP names 76% of
# ImageNet's pictures right, among 1,000 classes, and was never trained on ImageNet (Radford et al. 2021, section 3.1).
#
# ## What a changed word changes
#
# Same noise, one word exchanged.

# %%
fruit = ["a red apple, noto style", "a yellow apple, noto style", "a green apple, noto style",
         "a blue apple, noto style", "a red heart, noto style", "a green heart, noto style"]  # fmt: skip
styled = [f"a fox, {style} style" for style in ("noto", "noto blob", "emojione", "fx", "fluent", "fluent flat")]
rockets = [sentence.replace("fox", "rocket") for sentence in styled]
pictures = [
    draw(sd, sd.get_learned_conditioning(row), noise(1, seed=1).expand(6, -1, -1, -1), steps=20)
    for row in (fruit, styled, rockets)
]
viz.strip(pictures[:1], [s.removeprefix("a ").removesuffix(", noto style") for s in fruit], ["noto style"])

# %%
viz.strip(pictures[1:], [s.removeprefix("a fox, ").removesuffix(" style") for s in styled], ["a fox", "a rocket"])

# %% [markdown]
# The word that is exchanged changes what it names, and little else: the same noise gives apples of the same pose, with
# the same light. *yellow apple* and *blue apple* stand in no caption. The yellow one is put together from a
# yellow it knows and an apple it knows; the blue one loses its form on the way. *fluent* and *fluent flat*, which look
# much alike in truth, look alike here.
#
# ## Between two sentences
#
# The context is a tensor, and tensors can be mixed: $c = (1-w)\,c_A + w\,c_B$. No sentence has such a context. What is
# drawn from it?

# %%
w = torch.linspace(0, 1, 7)[:, None, None]
pairs = [("a fox, noto style", "a panda, noto style"), ("a red apple, noto style", "a green apple, noto style"),
         ("a fox, noto style", "a rocket, noto style")]  # fmt: skip
mixed = []
for one, other in pairs:
    a, b = sd.get_learned_conditioning([one, other])
    print(f"{one} and {other}: their contexts differ by {(a - b).norm() / a.norm():.2f}")
    mixed.append(draw(sd, (1 - w) * a + w * b, noise(1).expand(7, -1, -1, -1), steps=20))
labels = ["fox to panda", "red to green apple", "fox to rocket"]
viz.strip(mixed, [f"w = {value:.2f}" for value in w.flatten().tolist()], labels, size=0.64)

# %% [markdown]
# Between fox and panda lives an animal that is neither. The apple passes through brown, a mixture of both reds and
# greens. Between fox and rocket there is nothing sensible. The UNet was trained on no context between two sentences, in
# none of the three rows. It gets by where both pictures have a shape in common, a head or an apple. It is not the
# distance: the contexts of fox and panda differ by as much as those of fox and rocket. Nearby contexts give nearby
# pictures, and that is all that one may hope for.
#
# ## Does it see the order of words?
#
# The tower has positions and a mask. It *can* see the order. Does it?
#
# **First test: CLIP.** Find each training picture by its caption, among all pictures. Then with the words of the
# caption shuffled, and reversed.

# %%
def reorder(caption: str, how) -> str:
    return " ".join(how(caption.replace(",", " ,").split()))


shuffler = random.Random(0)
forms = {
    "as it is": lambda words: words,
    "shuffled": lambda words: shuffler.sample(words, len(words)),
    "reversed": lambda words: words[::-1],
}
original = text_features(corpus.captions)
lines = []
for name, how in forms.items():
    vectors = text_features([reorder(caption, how) for caption in corpus.captions])
    found = (vectors @ image_features.T).argmax(1)
    right = sum(found[i].item() == i for i in train) / len(train)
    cosine = (vectors * original).sum(1).mean()
    lines.append(f"{name:9} {right:4.0%} found; mean cosine with the caption as it is: {cosine:.2f}")
bags = {tuple(sorted(caption.replace(",", " ").split())) for caption in corpus.captions}
lines.append(f"mean cosine of any two captions: {(original @ original.T).mean():.2f}")
lines.append(f"{len(corpus)} captions, {len(bags)} different bags of words")
print("\n".join(lines))

# %% [markdown]
# So it notices: fewer are found. But a shuffled caption still points the same way as the caption (0.91; two captions
# that have nothing to do with each other are at 0.03). And fewer hits show only that shuffled captions are strange to
# it. They do not show that it knows what order *means*. In this sample it means nothing: each caption has a bag of
# words of its own, so to know the bag is to know the caption.
#
# **Second test, where order means something.** The model `tiny` draws shapes, from captions such as "a red circle above
# a blue square". Exchange the two things: same words, another picture.

# %%
tiny = minisd.load("tiny", device="cpu")
palette = {name: torch.tensor(rgb) / 127.5 - 1 for name, rgb in COLOURS.items()}


def is_above(picture: torch.Tensor, one: str, other: str) -> bool:
    """Does the colour `one` stand higher in a picture [3 h w] than `other`?"""
    rows = torch.arange(picture.shape[1])[:, None]
    heights = []
    for colour in (one, other):
        near = torch.exp(-(picture - palette[colour][:, None, None]).square().sum(0) / 0.3)  # [h w], 1 where it is
        heights.append((near * rows).sum() / near.sum())  # the mean row, counted from the top
    return bool(heights[0] < heights[1])


drawer, things = random.Random(0), []
for _ in range(32 if full else 4):
    c1, c2 = drawer.sample(["red", "blue", "yellow", "purple"], 2)
    s1, s2 = drawer.sample(["circle", "square", "triangle", "heart"], 2)
    things.append((c1, f"a {c1} {s1}", c2, f"a {c2} {s2}"))
forwards = tiny.get_learned_conditioning([f"{one} above {other}" for _, one, _, other in things])
backwards = tiny.get_learned_conditioning([f"{other} above {one}" for _, one, _, other in things])
drawn = {
    name: draw(tiny, context, noise(len(things)), steps=20, guidance_scale=2.0)
    for name, context in (("A above B", forwards), ("B above A", backwards))
}

A_on_top, lines = {}, []
for name, pictures in drawn.items():
    A_on_top[name] = [is_above(p, c1, c2) for p, (c1, _, c2, _) in zip(pictures, things, strict=True)]
    lines.append(f"{name}: A is on top in {sum(A_on_top[name])} of {len(things)} drawings")
changed = sum(one != other for one, other in zip(*A_on_top.values(), strict=True))
lines.append(f"exchanging A and B in the prompt exchanged them in the drawing: {changed} of {len(things)}")

scenes = [scene(0, k) for k in range(2000 if full else 200)]
real, _ = shape_corpus(len(scenes))
tests = [
    is_above(torch.from_numpy(real[k]).permute(2, 0, 1) / 127.5 - 1, s.items[0].colour, s.items[1].colour)
    for k, s in enumerate(scenes)
    if " above " in s.caption and s.items[0].colour != s.items[1].colour
]
lines.append(f"(the measure, on real pictures: right in {sum(tests)} of {len(tests)})")
print("\n".join(lines))
titles = [f"A: {one.removeprefix('a ')}\nB: {other.removeprefix('a ')}" for _, one, _, other in things[:6]]
viz.strip([pictures[:6] for pictures in drawn.values()], titles, list(drawn), size=1.12)

# %% [markdown]
# In 4 of 32, and with A on top in half of the drawings, whichever was asked for. Both rows start from the same noise,
# and differ little. The model has understood "above": there are two things, and one is above the other. Which one it
# is, the noise decides, not the prompt. (Nor does it keep apart which of the two has which colour and shape, although
# it mostly draws one thing alone, or four alike, as it is told: notebook 07.)
#
# Is the order lost in the text tower, or does the UNet not listen? Compare the contexts, token by token:

# %%
length = forwards.norm(dim=-1).mean()
swapped = (forwards - backwards).norm(dim=-1).mean(0) / length  # [n]
strangers = (forwards - forwards.roll(1, dims=0)).norm(dim=-1).mean(0) / length  # [n]: to another prompt
places = ["start", "a", "A", "A", "above", "a", "B", "B", "end", *["pad"] * 7]
panel = torch.stack([swapped, strangers])

orders = {}
for s in scenes:
    orders.setdefault(tuple(sorted(s.caption.split())), set()).add(s.caption)
both = sum(len(captions) for captions in orders.values() if len(captions) > 1)
print(f"of {len({s.caption for s in scenes})} captions, {both} have a partner with the same words in another order")

labels = ["A above B, B above A", "two other prompts"]
viz.matrices({"mean difference of contexts": panel}, labels, places, ".1f", (0.4, 0.3))

# %% [markdown]
# Upper row: the two orders of the same prompt. Lower row: two different prompts. At the words, the contexts of the two
# orders are about as far apart as those of strangers. So the order **is** in the context. But from the end token on,
# where the tower sums up, they are nearly the same (0.2 to 0.3, against 0.7 to 0.8). Contrastive training had little
# need of the order: only 80 of 1,052 captions have a partner with the same words in another order, and hardly ever are
# both in one batch of 64. Whoever knows the bag of words finds the right picture. And the UNet has not learned to use
# what the rows of the words still say.
#
# This is not only a weakness of small models. OpenAI's CLIP and others have been shown to treat captions much like bags
# of words, for the same reason (Yuksekgonul et al. 2023, "When and why vision-language models behave like
# bags-of-words"). Remember it when Stable Diffusion draws a red cube on a blue one, and you had asked for the opposite.

# %%
print(f"This notebook took {time.time() - start:.0f} s.")

# %% [markdown]
# ## Recap
#
# - **Tokens.** BPE merges the most frequent pair, again and again. Frequent words are whole, rare ones are spelled,
#   nothing is unknown. Start, end, padding; what is beyond 77 tokens is cut off.
# - **Embeddings.** A learned row for each token, plus one for each place.
# - **Layers.** Attention under a causal mask, then an MLP with the quick-GELU. A token sees what stands before it, so
#   only the end token, and the padding behind it, have seen all.
# - **Context.** The last hidden state, all of it, after the final LayerNorm: $[b\ n\ d]$.
# - **CLIP.** Two towers, cosines, a temperature, and a cross-entropy along rows and columns. Near means: looks alike.
# - **Limits.** A word from no caption gets a vector without meaning. Order is in the context, and is not
#   understood unless training makes it pay.
#
# ## In the CompVis source
#
# `modules.py` stands in `ldm/modules/encoders/`, `ddpm.py` in `ldm/models/diffusion/`.
#
# | here | there | file |
# |---|---|---|
# | `FrozenCLIPEmbedder` | `FrozenCLIPEmbedder` | `modules.py` |
# | `sd.cond_stage_model` | `LatentDiffusion.cond_stage_model` | `ddpm.py` |
# | `sd.get_learned_conditioning(prompts)` | `LatentDiffusion.get_learned_conditioning` | `ddpm.py` |
# | `CLIPTextModel` | `transformers.CLIPTextModel`, `last_hidden_state` | `modules.py` |
# | `BPETokenizer.clip()` | `transformers.CLIPTokenizer` | `modules.py` |
# | the end token's row alone | `FrozenCLIPTextEmbedder`, not used by SD v1 | `modules.py` |
# | `CLIPModel`, `contrastive_loss` | has no counterpart: the weights are OpenAI's | |
#
# | | ours (`emoji`) | Stable Diffusion v1: CLIP ViT-L/14 |
# |---|---|---|
# | context | 24 × 192 | 77 × 768 |
# | layers, heads | 3, 3 | 12, 12 |
# | vocabulary | 3,036 | 49,408 |
# | parameters of the text tower | 1.9 million | 123 million |
# | trained on | 8,106 emoji | 400 million pictures from the internet |
#
# The text tower is **frozen** there as here: the UNet is trained for the contexts that it gives, and it stays as it is.
#
# ## Try it
#
# - Train a tokenizer on captions of your own, with 600, 1,000 and 3,000 pieces. How many tokens do they need?
# - Give `draw` a context whose rows stand in another order. Does the UNet care? (It has no positions of its own.)
# - Find the word that changes the drawing of "a house, noto style" the most, and the one that changes it the least.
# - The exercises of this stage are in [`exercises/05_clip.ipynb`](exercises/05_clip.ipynb): a merge of BPE, padding,
#   the causal mask, the quick-GELU, the contrastive loss and others; a checker names the mistake.
#
# Before this: [notebook 04](04_vae.ipynb), where the picture becomes a latent. Next: [notebook 06](06_sampling.ipynb),
# how the drawing is done.
