"""Exercises of stage 5: from words to tokens, to vectors, and to vectors that agree with pictures."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minisd import clip as clip_module
from minisd.clip import END, START, BPETokenizer, CLIPModel, Tokens
from minisd.training import clip as training_clip

from .exercise import case, exercise
from .places import instead_of, method

# --- words to tokens -------------------------------------------------------------------------------------------------


@instead_of("__call__", BPETokenizer)
def _put_merge_step(f, real, self, prompts, max_length):
    ids = []
    ranks = {pair: rank for rank, pair in enumerate(self.merges)}
    for prompt in prompts:
        text = self.engine.normalizer.normalize_str(prompt)
        kept = []
        for word, _ in self.engine.pre_tokenizer.pre_tokenize_str(text):
            pieces = [*word[:-1], word[-1] + "</w>"]
            while len(merged := list(f(list(pieces), dict(ranks)))) < len(pieces):
                pieces = merged
            kept += [self.vocab.get(piece, self.end_token) for piece in pieces]
        ids.append(pad_tokens(kept, self.start_token, self.end_token, max_length))
    return Tokens(torch.tensor(ids), real(self, prompts, max_length).lost)


_RANKS = {("l", "o"): 0, ("e", "r</w>"): 1, ("lo", "w"): 2, ("n", "e"): 3, ("low", "er</w>"): 4, ("a", "a"): 5,
          ("w", "er</w>"): 6}


@exercise(swap=_put_merge_step)
@case('"lower"', lambda: (["l", "o", "w", "e", "r</w>"], _RANKS))
@case("a word that cannot be merged", lambda: (["x", "y", "z</w>"], _RANKS))
@case("the same pair twice", lambda: (["l", "o", "x", "l", "o", "w</w>"], _RANKS))
@case("three of a kind", lambda: (["a", "a", "a", "b</w>"], _RANKS))
@case("the better pair comes later", lambda: (["n", "e", "l", "o", "w</w>"], _RANKS))
@case("one piece", lambda: (["a</w>"], _RANKS))
@case("half way", lambda: (["lo", "w", "er</w>"], _RANKS))
@case("at the end", lambda: (["x", "e", "r</w>"], _RANKS))
@case("pieces that end and begin like the pair", lambda: (["al", "o", "l", "o", "wl", "or</w>"], _RANKS))
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


@instead_of("__call__", BPETokenizer)
def _put_pad(f, real, self, prompts, max_length):
    long = [self.engine.encode(prompt).ids for prompt in prompts]
    lost = real(self, prompts, max_length).lost
    return Tokens(torch.tensor([f(ids, self.vocab[START], self.vocab[END], max_length) for ids in long]), lost)


@exercise(swap=_put_pad)
@case("three words of eight", lambda: ([5, 9, 7], 100, 101, 8))
@case("too long", lambda: ([1, 2, 3, 4, 5, 6, 7, 8, 9], 100, 101, 6))
@case("it just fits", lambda: ([1, 2, 3, 4], 100, 101, 6))
@case("the empty prompt", lambda: ([], 100, 101, 5))
@case("one too many", lambda: ([1, 2, 3, 4, 5], 50, 51, 6))
def pad_tokens(ids: list[int], start: int, end: int, max_length: int) -> list[int]:
    """The row of tokens that CLIP reads: start, the words, end, and end tokens up to max_length.

    A prompt that is too long loses its last words, never the end token. (OpenAI's CLIP: clip.tokenize; Stable
    Diffusion pads with the end token)
    """
    # BEGIN SOLUTION
    row = [start, *ids[: max_length - 2], end]
    return row + [end] * (max_length - len(row))
    # END SOLUTION


def _embed_case(ids: list[list[int]], vocab_size: int, max_length: int, d: int) -> tuple:
    return torch.tensor(ids), torch.randn(vocab_size, d), torch.randn(max_length, d)


@exercise(swap=method(clip_module.CLIPTextEmbeddings, "forward", "token_embedding.weight", "position_embedding.weight"))
@case("two sentences", lambda: _embed_case([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], 10, 8, 4))
@case("one sentence", lambda: _embed_case([[7, 7, 0]], 8, 5, 6))
@case("as many sentences as tokens, as wide as long", lambda: _embed_case([[0, 1, 2], [3, 4, 5], [5, 4, 3]], 6, 3, 3))
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


@instead_of("attention", clip_module)
def _put_mask(f, real, q, k, v, causal=False):
    if not causal:
        return real(q, k, v)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + f(q.shape[-2]).to(q)
    return scores.softmax(dim=-1) @ v


@exercise(
    # -1e9 does as well as -inf
    read=lambda m: m.masked_fill(m < -1e4, -math.inf) if isinstance(m, Tensor) and m.is_floating_point() else m,
    swap=_put_mask,
)
@case("five tokens", lambda: (5,))
@case("three tokens", lambda: (3,))
@case("one token", lambda: (1,))
@case("CLIP's 77", lambda: (77,))
def causal_mask(n: int) -> Float[Tensor, "n n"]:
    """What is added to the attention scores of n tokens so that none sees what comes after it: 0 where token i (the
    row) may look at token j (the column), -inf where it may not. A token sees itself.
    """
    # BEGIN SOLUTION
    return torch.triu(torch.full((n, n), -math.inf), diagonal=1)
    # END SOLUTION


@exercise(tolerance=1e-5, swap=lambda f: [(clip_module.CLIPMLP, "forward", lambda self, x: self.fc2(f(self.fc1(x))))])
@case("a few numbers", lambda: (torch.linspace(-4, 4, 9),))
@case("tokens", lambda: (torch.randn(2, 3, 8),))
def quick_gelu(x: Float[Tensor, "*d"]) -> Float[Tensor, "*d"]:
    """CLIP's activation, a fast stand-in for the GELU: x · sigmoid(1.702 x)."""
    # BEGIN SOLUTION
    return x * torch.sigmoid(1.702 * x)
    # END SOLUTION


@instead_of("get_text_features", CLIPModel)
def _put_pooled(f, real, self, input_ids):
    return F.normalize(self.text_projection(f(self.text_model(input_ids), input_ids, self.end_token)), dim=-1)


def _pool_case(ids: list[list[int]], d: int, end_token: int) -> tuple:
    return torch.randn(len(ids), len(ids[0]), d), torch.tensor(ids), end_token


@exercise(swap=_put_pooled)
@case("two sentences", lambda: _pool_case([[50, 3, 7, 51, 51, 51], [50, 9, 2, 8, 4, 51]], 4, 51))
@case("the empty sentence", lambda: _pool_case([[50, 51, 51, 51]], 5, 51))
@case(
    "an end token that is not the largest id",
    lambda: _pool_case([[0, 7, 1, 1, 1], [0, 9, 3, 1, 1], [0, 1, 1, 1, 1]], 5, 1),
)
@case("as many sentences as tokens", lambda: _pool_case([[0, 2, 1, 1], [0, 3, 9, 1], [0, 1, 1, 1], [0, 4, 1, 1]], 4, 1))
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
        images, texts = self.get_image_features(pixels), self.get_text_features(input_ids)
        logits = (self.logit_scale.exp().clamp(max=100.0) * images @ texts.T).float()  # which training asks for
        logits.features = images.float(), texts.float(), self.logit_scale
        return logits

    def contrastive_loss(logits):
        # what the logits of another model were made of is not known
        return f(*logits.features) if hasattr(logits, "features") else real(logits)

    return [(CLIPModel, "forward", forward), (clip_module, "contrastive_loss", contrastive_loss),
            (training_clip, "contrastive_loss", contrastive_loss)]  # fmt: skip


def _pairs_case(b: int, d: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return 2 * torch.randn(b, d), 0.5 * torch.randn(b, d), torch.tensor(scale)


@exercise(gradients=("image_features", "text_features", "logit_scale"), swap=_put_contrastive)
@case("five pairs", lambda: _pairs_case(5, 8, 1.5))
@case("three pairs", lambda: _pairs_case(3, 4, math.log(1 / 0.07)))
@case("as many pairs as numbers", lambda: _pairs_case(4, 4, 0.5))
@case("two pairs", lambda: _pairs_case(2, 6, 1.0))
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


@instead_of("forward", clip_module.CLIPVisionEmbeddings)
def _put_patches(f, real, self, pixels):
    size = self.patch_embedding.kernel_size[0]
    patches = f(pixels, size) @ self.patch_embedding.weight.flatten(1).T
    class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight.to(patches.dtype)


@exercise(swap=_put_patches)
@case("4 x 6 pixels in patches of 2", lambda: (torch.randn(2, 3, 4, 6), 2))
@case("one picture in patches of 3", lambda: (torch.randn(1, 3, 6, 3), 3))
@case("a square", lambda: (torch.randn(2, 3, 4, 4), 2))
@case("three by three patches of 3", lambda: (torch.randn(1, 3, 9, 9), 3))
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
