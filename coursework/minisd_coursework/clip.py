"""Exercises of stage 5: from words to tokens, to vectors, and to vectors that agree with pictures."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minisd import attention as attention_module
from minisd import clip as clip_module
from minisd.clip import END, START, BPETokenizer, CLIPModel, Tokens
from minisd.training import clip as training_clip

from .exercise import exercise
from .places import method

# --- words to tokens -------------------------------------------------------------------------------------------------


def _put_merge_step(f):
    def call(self, prompts, max_length):
        ids, lost = [], []
        ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        for prompt in prompts:
            text = self.engine.normalizer.normalize_str(prompt)
            kept = []
            for word, _ in self.engine.pre_tokenizer.pre_tokenize_str(text):
                pieces = [*word[:-1], word[-1] + "</w>"]
                while len(merged := list(f(list(pieces), dict(ranks)))) < len(pieces):
                    pieces = merged
                kept += [self.vocab.get(piece, self.end_token) for piece in pieces]
            lost.append("" if len(kept) <= max_length - 2 else prompt)
            kept = kept[: max_length - 2]
            ids.append([self.start_token, *kept] + [self.end_token] * (max_length - 1 - len(kept)))
        return Tokens(torch.tensor(ids), lost)

    return [(BPETokenizer, "__call__", call)]


_RANKS = {("l", "o"): 0, ("e", "r</w>"): 1, ("lo", "w"): 2, ("n", "e"): 3, ("low", "er</w>"): 4, ("a", "a"): 5,
          ("w", "er</w>"): 6}


@exercise(
    cases=lambda: {
        '"lower"': (["l", "o", "w", "e", "r</w>"], _RANKS),
        "a word that cannot be merged": (["x", "y", "z</w>"], _RANKS),
        "the same pair twice": (["l", "o", "x", "l", "o", "w</w>"], _RANKS),
        "three of a kind": (["a", "a", "a", "b</w>"], _RANKS),
        "the better pair comes later": (["n", "e", "l", "o", "w</w>"], _RANKS),
        "one piece": (["a</w>"], _RANKS),
        "half way": (["lo", "w", "er</w>"], _RANKS),
        "at the end": (["x", "e", "r</w>"], _RANKS),
    },
    swap=_put_merge_step,
)  # fmt: skip
def bpe_merge(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """One step of byte-pair encoding: of all neighbours, the pair of the smallest rank is merged, wherever it occurs.

    From left to right, and no piece twice: a a a with the pair (a, a) becomes aa a. Pieces of which no pair stands in
    `ranks` are returned as they are. The last piece of a word carries "</w>". (Sennrich et al. 2016)
    """
    # BEGIN SOLUTION
    if len(pieces) < 2:
        return pieces
    pairs = list(zip(pieces, pieces[1:], strict=False))
    best = min(pairs, key=lambda pair: ranks.get(pair, math.inf))
    if best not in ranks:
        return pieces
    merged, i = [], 0
    while i < len(pieces):
        if tuple(pieces[i : i + 2]) == best:
            merged.append(pieces[i] + pieces[i + 1])
            i += 2
        else:
            merged.append(pieces[i])
            i += 1
    return merged
    # END SOLUTION


def again(pieces, ranks):
    """For a mistake above: merge on until nothing changes."""
    while True:
        pairs = [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in ranks]
        if not pairs:
            return pieces
        i = list(zip(pieces, pieces[1:], strict=False)).index(min(pairs, key=ranks.get))
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]


def _put_pad(f):
    real = BPETokenizer.__call__

    def call(self, prompts, max_length):
        long = [self.engine.encode(prompt).ids for prompt in prompts]
        lost = real(self, prompts, max_length).lost
        return Tokens(torch.tensor([f(ids, self.vocab[START], self.vocab[END], max_length) for ids in long]), lost)

    return [(BPETokenizer, "__call__", call)]


@exercise(
    cases=lambda: {
        "three words of eight": ([5, 9, 7], 100, 101, 8),
        "too long": ([1, 2, 3, 4, 5, 6, 7, 8, 9], 100, 101, 6),
        "it just fits": ([1, 2, 3, 4], 100, 101, 6),
        "the empty prompt": ([], 100, 101, 5),
        "one too many": ([1, 2, 3, 4, 5], 50, 51, 6),
    },
    swap=_put_pad,
)  # fmt: skip
def pad_tokens(ids: list[int], start: int, end: int, max_length: int) -> list[int]:
    """The row of tokens that CLIP reads: start, the words, end, and end tokens up to max_length.

    A prompt that is too long loses its last words, never the end token. (OpenAI's CLIP: clip.tokenize; Stable
    Diffusion pads with the end token)
    """
    # BEGIN SOLUTION
    row = [start, *ids[: max_length - 2], end]
    return row + [end] * (max_length - len(row))
    # END SOLUTION


@exercise(
    cases=lambda: {
        "two sentences": (torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]), torch.randn(10, 4), torch.randn(8, 4)),
        "one sentence": (torch.tensor([[7, 7, 0]]), torch.randn(8, 6), torch.randn(5, 6)),
        "as many sentences as tokens, as wide as long": (
            torch.tensor([[0, 1, 2], [3, 4, 5], [5, 4, 3]]), torch.randn(6, 3), torch.randn(3, 3),
        ),
    },
    swap=method(clip_module.CLIPTextEmbeddings, "forward", "token_embedding.weight", "position_embedding.weight"),
)  # fmt: skip
def embed_tokens(
    input_ids: Int[Tensor, "b n"], token_table: Float[Tensor, "vocab d"], position_table: Float[Tensor, "max_length d"]
) -> Float[Tensor, "b n d"]:
    """A vector for each token plus a vector for each place in the sentence: row i of `token_table` belongs to the token
    with the id i, row i of `position_table` to the place i. The sentence may be shorter than that table.
    """
    # BEGIN SOLUTION
    n = input_ids.shape[1]
    return token_table[input_ids] + position_table[:n]
    # END SOLUTION


# --- the tower -------------------------------------------------------------------------------------------------------


def _put_mask(f):
    real = attention_module.attention

    def attention(q, k, v, causal=False):
        if not causal:
            return real(q, k, v)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + f(q.shape[-2]).to(q)
        return scores.softmax(dim=-1) @ v

    return [(clip_module, "attention", attention)]


@exercise(
    cases=lambda: {
        "five tokens": (5,), "three tokens": (3,), "one token": (1,), "CLIP's 77": (77,),
    },
    read=lambda mask: mask.masked_fill(mask < -1e4, -math.inf) if mask.is_floating_point() else mask,  # -1e9 will do
    swap=_put_mask,
)  # fmt: skip
def causal_mask(n: int) -> Float[Tensor, "n n"]:
    """What is added to the attention scores of n tokens so that none sees what comes after it: 0 where token i (the
    row) may look at token j (the column), -inf where it may not. A token sees itself.
    """
    # BEGIN SOLUTION
    return torch.triu(torch.full((n, n), -math.inf), diagonal=1)
    # END SOLUTION


@exercise(
    cases=lambda: {
        "a few numbers": (torch.linspace(-4, 4, 9),),
        "tokens": (torch.randn(2, 3, 8),),
    },
    tolerance=1e-5,
    swap=lambda f: [(clip_module.CLIPMLP, "forward", lambda self, x: self.fc2(f(self.fc1(x))))],
)  # fmt: skip
def quick_gelu(x: Float[Tensor, "*d"]) -> Float[Tensor, "*d"]:
    """CLIP's activation, a fast stand-in for the GELU: x · sigmoid(1.702 x)."""
    # BEGIN SOLUTION
    return x * torch.sigmoid(1.702 * x)
    # END SOLUTION


def _put_pooled(f):
    def get_text_features(self, input_ids):
        return F.normalize(self.text_projection(f(self.text_model(input_ids), input_ids, self.end_token)), dim=-1)

    return [(CLIPModel, "get_text_features", get_text_features)]


@exercise(
    cases=lambda: {
        "two sentences": (torch.randn(2, 6, 4), torch.tensor([[50, 3, 7, 51, 51, 51], [50, 9, 2, 8, 4, 51]]), 51),
        "the empty sentence": (torch.randn(1, 4, 5), torch.tensor([[50, 51, 51, 51]]), 51),
        "an end token that is not the largest id": (
            torch.randn(3, 5, 5), torch.tensor([[0, 7, 1, 1, 1], [0, 9, 3, 1, 1], [0, 1, 1, 1, 1]]), 1,
        ),
        "as many sentences as tokens": (
            torch.randn(4, 4, 4), torch.tensor([[0, 2, 1, 1], [0, 3, 9, 1], [0, 1, 1, 1], [0, 4, 1, 1]]), 1,
        ),
    },
    swap=_put_pooled,
)  # fmt: skip
def pooled_state(
    hidden: Float[Tensor, "b n d"], input_ids: Int[Tensor, "b n"], end_token: int
) -> Float[Tensor, "b d"]:
    """The one vector that stands for a sentence: the hidden state at its first end token.

    With the causal mask, this token is the first that has seen the whole sentence; what follows is padding, end tokens
    too.
    """
    # BEGIN SOLUTION
    place = (input_ids == end_token).int().argmax(dim=1)
    return hidden[torch.arange(len(hidden)), place]
    # END SOLUTION


# --- both towers -----------------------------------------------------------------------------------------------------


def _put_contrastive(f):
    real = clip_module.contrastive_loss

    def forward(self, input_ids, pixels):
        scale = self.logit_scale.exp().clamp(max=100.0)
        logits = scale * self.get_image_features(pixels) @ self.get_text_features(input_ids).T
        logits.features = self.get_image_features(pixels), self.get_text_features(input_ids), self.logit_scale
        return logits

    def contrastive_loss(logits):
        if hasattr(logits, "features"):
            return f(*logits.features)
        return real(logits)  # logits of another model: what they were made of is not known

    return [(CLIPModel, "forward", forward), (clip_module, "contrastive_loss", contrastive_loss),
            (training_clip, "contrastive_loss", contrastive_loss)]  # fmt: skip


def _pairs_case(b: int, d: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return 2 * torch.randn(b, d), 0.5 * torch.randn(b, d), torch.tensor(scale)


@exercise(
    cases=lambda: {
        "five pairs": _pairs_case(5, 8, 1.5),
        "three pairs": _pairs_case(3, 4, math.log(1 / 0.07)),
        "as many pairs as numbers": _pairs_case(4, 4, 0.5),
        "two pairs": _pairs_case(2, 6, 1.0),
    },
    gradients=("image_features", "text_features", "logit_scale"),
    swap=_put_contrastive,
)  # fmt: skip
def contrastive_loss(
    image_features: Float[Tensor, "b d"], text_features: Float[Tensor, "b d"], logit_scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """CLIP's loss: which text belongs to which picture, and the other way round.

    Pair i is row i of both; the vectors come as they are, of any length. The logits are exp(logit_scale) times the
    cosine similarities; the loss is the mean of the cross-entropies along rows and along columns. (Radford et al.
    2021, figure 3)
    """
    # BEGIN SOLUTION
    image = F.normalize(image_features, dim=-1)
    text = F.normalize(text_features, dim=-1)
    logits = logit_scale.exp() * image @ text.T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    # END SOLUTION


def _put_patches(f):
    def forward(self, pixels):
        size = self.patch_embedding.kernel_size[0]
        patches = f(pixels, size) @ self.patch_embedding.weight.flatten(1).T
        class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight.to(patches.dtype)

    return [(clip_module.CLIPVisionEmbeddings, "forward", forward)]


@exercise(
    cases=lambda: {
        "4 x 6 pixels in patches of 2": (torch.randn(2, 3, 4, 6), 2),
        "one picture in patches of 3": (torch.randn(1, 3, 6, 3), 3),
        "a square": (torch.randn(2, 3, 4, 4), 2),
        "three by three patches of 3": (torch.randn(1, 3, 9, 9), 3),
    },
    swap=_put_patches,
)  # fmt: skip
def patchify(image: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b n d"]:
    """Cut pictures into squares of `size` x `size` pixels, and make each a token, as a vision transformer reads them.

    The squares are taken row by row; the numbers of a square by channel, then row, then column: (c y x).
    h and w are multiples of size; n = h/size · w/size, d = c · size². (Dosovitskiy et al. 2021, section 3.1)
    """
    # BEGIN SOLUTION
    b, c, h, w = image.shape
    split = image.reshape(b, c, h // size, size, w // size, size)
    return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    # END SOLUTION
