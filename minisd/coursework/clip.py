"""Exercises of stage 5: from words to tokens, to vectors, and to vectors that agree with pictures."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .. import attention as attention_module
from .. import clip as clip_module
from ..clip import END, START, BPETokenizer, CLIPModel, Tokens
from ..training import clip as training_clip
from .exercise import exercise

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
    difficulty=4,
    minutes=25,
    cases=lambda: {
        '"lower"': {"pieces": ["l", "o", "w", "e", "r</w>"], "ranks": _RANKS},
        "a word that cannot be merged": {"pieces": ["x", "y", "z</w>"], "ranks": _RANKS},
        "the same pair twice": {"pieces": ["l", "o", "x", "l", "o", "w</w>"], "ranks": _RANKS},
        "three of a kind": {"pieces": ["a", "a", "a", "b</w>"], "ranks": _RANKS},
        "the better pair comes later": {"pieces": ["n", "e", "l", "o", "w</w>"], "ranks": _RANKS},
        "one piece": {"pieces": ["a</w>"], "ranks": _RANKS},
        "half way": {"pieces": ["lo", "w", "er</w>"], "ranks": _RANKS},
        "at the end": {"pieces": ["x", "e", "r</w>"], "ranks": _RANKS},
    },
    hints=(
        "Which neighbours stand in the table, and which of those pairs has the smallest rank?",
        "If there is none, return the pieces as they are.",
        "Go through the pieces with a while loop: at the pair take a step of two, else of one.",
    ),
    mistakes=[
        ("best = min(pairs, key=lambda pair: ranks.get(pair, math.inf))",
         "best = max(pairs, key=lambda pair: ranks.get(pair, -1))",
         "You merge the pair with the largest rank: the smallest, which was learned first, is merged first."),
        ("min(pairs, key=", "max(pairs, key=",
         "You took the largest rank, and a pair that does not stand in the table has an infinite one, so that nothing"
         " is merged: the smallest rank comes first."),
        ("best = min(pairs, key=lambda pair: ranks.get(pair, math.inf))",
         "best = next((pair for pair in pairs if pair in ranks), pairs[0])",
         "You merge the first pair that stands in the table: the one with the smallest rank, wherever it is."),
        ("best = min(pairs, key=lambda pair: ranks.get(pair, math.inf))",
         "best = min([pair for pair in pairs if pair in ranks] or pairs)",
         "You took the pair that comes first in the alphabet: the one with the smallest rank."),
        ("",
         "for i in range(len(pieces) - 1):\n    if (pieces[i], pieces[i + 1]) in ranks:\n        return [*pieces[:i],"
         " pieces[i] + pieces[i + 1], *pieces[i + 2 :]]\nreturn pieces",
         "You merge the first pair that stands in the table, and once: the pair with the smallest rank, wherever it"
         " occurs."),
        ("merged.append(pieces[i] + pieces[i + 1])", 'merged.append(pieces[i] + " " + pieces[i + 1])',
         "There is a space between the two: they are joined without one."),
        ("return merged", "return list(best)", "You returned the pair: the whole word, with the pair merged in it."),
        ("return merged",
         "merged, i = [], len(pieces) - 1\nwhile i >= 0:\n    two = i > 0 and (pieces[i - 1], pieces[i]) == best\n"
         "    merged.insert(0, pieces[i - 1] + pieces[i] if two else pieces[i])\n    i -= 2 if two else 1\nreturn"
         " merged",
         "You merge from right to left: from left to right, so that a a a becomes aa a."),
        ("merged.append(pieces[i] + pieces[i + 1])", "merged.append(best)",
         "You appended the pair, a tuple: its two pieces are joined to one string."),
        ("        i += 2\n", "        i += 2\n        merged += pieces[i:]\n        break\n",
         "You merge the pair once: every occurrence of it is merged in one step."),
        ("        i += 2\n", "        i += 1\n", "After a merge both pieces are used up: go on two further."),
        ("merged.append(pieces[i] + pieces[i + 1])", "merged.append(pieces[i + 1] + pieces[i])",
         "The two pieces are joined in the wrong order."),
        ("return merged", "return merged if len(merged) < 2 or merged == pieces else again(merged, ranks)",
         "You go on until nothing can be merged: this function does one step, one pair."),
        ("if best not in ranks:\n    return pieces\n", "",
         "A pair that does not stand in the table is merged: then the pieces stay as they are."),
        ("if len(pieces) < 2:\n    return pieces\n", "",
         "A single piece has no pairs: min() of nothing raises an error. Return it as it is."),
        ("while i < len(pieces):", "while i < len(pieces) - 1:",
         "The last piece is lost: the loop ends one too early."),
        ("ranks.get(pair, math.inf)", "ranks.get(pair, 0)",
         "Pairs that are not in the table get the rank 0, the best of all: give them an infinite rank."),
        ("ranks.get(pair, math.inf)", "ranks.get(pair, -1)",
         "Pairs that are not in the table come first in yours: give them an infinite rank."),
        ("return merged", 'return " ".join(merged)', "You returned a string: a list of pieces is wanted."),
        ("return merged", 'return [piece.removesuffix("</w>") for piece in merged]',
         "The </w> at the end of the word is lost: it belongs to the piece."),
        ("ranks.get(pair, math.inf)", "ranks[pair]",
         "`ranks[pair]` raises KeyError where a pair was never learned: leave such pairs out, or give them the rank"
         " infinity."),
        ("key=lambda pair: ranks.get(pair, math.inf))\nif best not in ranks:\n    return pieces",
         "key=lambda pair: -pairs.count(pair))",
         "You merge the most frequent pair, which is how the table is learned: to use it, merge the pair of the"
         " smallest rank."),
        ("merged.append(pieces[i] + pieces[i + 1])",
         'merged.append((pieces[i] + pieces[i + 1]).replace("</w>", ""))',
         'You took "</w>" away: it is a part of the last piece, and says that the word ends there.'),
    ],
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
    difficulty=2,
    minutes=10,
    cases=lambda: {
        "three words of eight": {"ids": [5, 9, 7], "start": 100, "end": 101, "max_length": 8},
        "too long": {"ids": [1, 2, 3, 4, 5, 6, 7, 8, 9], "start": 100, "end": 101, "max_length": 6},
        "it just fits": {"ids": [1, 2, 3, 4], "start": 100, "end": 101, "max_length": 6},
        "the empty prompt": {"ids": [], "start": 100, "end": 101, "max_length": 5},
        "one too many": {"ids": [1, 2, 3, 4, 5], "start": 50, "end": 51, "max_length": 6},
    },
    hints=(
        "Start and end take two places, so that max_length - 2 are left.",
        "CLIP pads with the end token.",
    ),
    mistakes=[
        ("ids[: max_length - 2]", "ids[: max_length - 1]",
         "You kept one token too many: start and end take two places."),
        ("ids[: max_length - 2]", "ids[: max_length - 3]",
         "You cut one token too many: max_length - 2 have place between start and end."),
        ("", "row = [start, *ids[: max_length - 2]]\nreturn row + [0] * (max_length - 1 - len(row)) + [end]",
         "You filled up with 0, and the end token comes at the very end: it follows the last word, and then fills the"
         " row."),
        ("ids[: max_length - 2]", "ids[: max_length]",
         "You cut to max_length, and start and end come on top: cut the words to max_length - 2."),
        ("ids[: max_length - 2]", "ids", "A prompt that is too long is not cut: at most max_length tokens come out."),
        ("return row + [end] * (max_length - len(row))", "return row + [0] * (max_length - len(row))",
         "You padded with 0: CLIP pads with the end token."),
        ("return row + [end] * (max_length - len(row))", "return row + [-1] * (max_length - len(row))",
         "You padded with -1: CLIP pads with the end token."),
        ("return row + [end] * (max_length - len(row))", "return row",
         "The padding is missing: all rows of a batch have the length max_length."),
        ("[start, *ids[: max_length - 2], end]", "ids[:max_length]", "Start and end token are missing."),
        ("[start, *ids[: max_length - 2], end]", "[*ids[: max_length - 2], end]", "The start token is missing."),
        ("return row + [end] * (max_length - len(row))", "return [end] * (max_length - len(row)) + row",
         "The padding comes first: it goes behind the sentence."),
        ("return row + [end] * (max_length - len(row))", "return row + [start] * (max_length - len(row))",
         "You padded with the start token: with the end token."),
        ("[start, *ids[: max_length - 2], end]", "[end, *ids[: max_length - 2], start]",
         "Start and end are exchanged."),
        ("ids[: max_length - 2]", "ids[max(0, len(ids) - max_length + 2):]",
         "You kept the end of a long prompt: CLIP keeps its beginning."),
        ("[start, *ids[: max_length - 2], end]", "[start, *ids, end][:max_length]",
         "You cut after the end token was put on: a long prompt loses it. Cut the words to max_length - 2 first."),
        ("* (max_length - len(row))", "* (77 - len(row))", "You wrote down 77: the length comes with the argument."),
    ],
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


def _put_embeddings(f):
    def forward(self, input_ids):
        return f(input_ids, self.token_embedding.weight, self.position_embedding.weight)

    return [(clip_module.CLIPTextEmbeddings, "forward", forward)]


@exercise(
    difficulty=1,
    minutes=5,
    cases=lambda: {
        "two sentences": {"input_ids": torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]),
                          "token_table": torch.randn(10, 4), "position_table": torch.randn(8, 4)},
        "one sentence": {"input_ids": torch.tensor([[7, 7, 0]]), "token_table": torch.randn(8, 6),
                         "position_table": torch.randn(5, 6)},
        "as many sentences as tokens, as wide as long": {
            "input_ids": torch.tensor([[0, 1, 2], [3, 4, 5], [5, 4, 3]]),
            "token_table": torch.randn(6, 3), "position_table": torch.randn(3, 3),
        },
    },
    hints=("A row of the table for each id: `token_table[input_ids]`.",
           "The first n rows of the position table, the same for each sentence."),
    mistakes=[
        (" + position_table[:n]", "",
         "The places are missing: without them the order of the words makes no difference."),
        ("token_table[input_ids] + position_table[:n]", "token_table[input_ids] * position_table[:n]",
         "You multiplied: the two vectors are added."),
        ("position_table[:n]", "position_table[input_ids.clamp(max=len(position_table) - 1)]",
         "The place is looked up by the token's id: it is its index in the sentence, 0 ... n-1."),
        ("position_table[:n]", "position_table",
         "You added the whole table of places: the first n, as many as there are tokens."),
        ("position_table[:n]", "position_table[input_ids % len(position_table)]",
         "The place is looked up by the token's id (modulo the table): it is its index in the sentence, 0 ... n-1."),
        ("position_table[:n]", "position_table[torch.arange(len(input_ids))][:, None]",
         "The place is the number of the sentence in the batch: it is that of the token in its sentence."),
        ("position_table[:n]", "position_table[1 : n + 1]", "Your places begin at 1: the first token has the place 0."),
        ("position_table[:n]", "position_table[0]", "Every token has the place 0."),
        ("position_table[:n]", "position_table[-n:]", "You took the last n places: the first n."),
        ("position_table[:n]", "position_table[:n].flip(0)", "The places run backwards."),
        ("token_table[input_ids] + position_table[:n]",
         "torch.cat([token_table[input_ids], position_table[:n].expand(len(input_ids), -1, -1)], dim=-1)",
         "You put the vectors side by side: they are added."),
        ("token_table[input_ids] + ", "", "The tokens are missing: only the places are left."),
        ("token_table[input_ids] + position_table[:n]", "(token_table[input_ids] + position_table[:n]) / 2",
         "You took the mean: the two vectors are added."),
        ("token_table[input_ids]", "token_table[input_ids] * token_table.shape[1] ** 0.5",
         "You multiplied the token's vector by √d, as the first transformer did: CLIP does not."),
        ("token_table[input_ids]", "F.normalize(token_table[input_ids], dim=-1)",
         "You normalised the token's vector: it is added as it is."),
    ],
    swap=_put_embeddings,
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
    difficulty=2,
    minutes=10,
    cases=lambda: {"five tokens": {"n": 5}, "three tokens": {"n": 3}, "one token": {"n": 1}, "CLIP's 77": {"n": 77}},
    hints=(
        "Row i is the token that looks, column j the one that is looked at. Allowed is j ≤ i.",
        "torch.triu(matrix, 1) keeps what is above the diagonal, and makes the rest 0.",
    ),
    mistakes=[
        ("diagonal=1", "diagonal=0",
         "The diagonal is masked as well: a token may see itself. (The first one would see nothing, and the softmax"
         " gives NaN.)"),
        ("torch.triu(torch.full((n, n), -math.inf), diagonal=1)",
         "torch.tril(torch.full((n, n), -math.inf), diagonal=-1)",
         "The wrong way round: the past is masked. A token sees itself and those before it."),
        ("torch.triu(torch.full((n, n), -math.inf), diagonal=1)",
         "torch.full((n, n), -math.inf).triu(1).T.contiguous().nan_to_num(0.0, neginf=1.0)",
         "You wrote 1 where the past is: -inf where the future is, since it is added to the scores."),
        ("torch.triu(torch.full((n, n), -math.inf), diagonal=1)", "torch.ones(n, n).tril()",
         "This is a matrix of 1 and 0: it is added to the scores, so 0 where one may look, and -inf where not."),
        ("torch.triu(torch.full((n, n), -math.inf), diagonal=1)", "torch.ones(n, n).triu(1)",
         "You wrote 1 where one may not look: -inf, since it is added to the scores."),
        ("torch.triu(torch.full((n, n), -math.inf), diagonal=1)", "torch.ones(n, n).tril().bool()",
         "This is a mask of True and False: numbers are wanted, to be added to the scores, 0 or -inf."),
        ("torch.triu(torch.full((n, n), -math.inf), diagonal=1)", "torch.ones(n, n).triu(1).bool()",
         "This is a mask of True and False (True where one may not look): numbers are wanted, 0 or -inf."),
        ("torch.triu(torch.full((n, n), -math.inf), diagonal=1)", "torch.ones(n, n).triu(1) * -math.inf",
         "You multiplied -inf by 0, and that is NaN: fill a matrix with -inf and keep what is above the diagonal, or"
         " use masked_fill."),
        ("torch.triu(torch.full((n, n), -math.inf), diagonal=1)", "(1 - torch.ones(n, n).tril()) * -1e3",
         "The future is masked by a number that is not large enough: -inf."),
        ("-math.inf", "math.inf",
         "+inf in the future lets a token see nothing else: -inf, so that the softmax gives 0."),
        ("torch.triu(torch.full((n, n), -math.inf), diagonal=1)",
         "torch.full((n, n), -math.inf).masked_fill(torch.ones(n, n).triu(1).bool(), 0.0)",
         "The wrong way round, and the diagonal as well: a token sees itself and those before it."),
        ("-math.inf", "-1.0", "-1 only makes the future less likely: -inf makes it impossible."),
        ("diagonal=1", "diagonal=2", "The next token can still be seen: the mask begins right above the diagonal."),
        ("torch.triu(torch.full((n, n), -math.inf), diagonal=1)", "torch.zeros(n, n)", "Nothing is masked."),
        ("(n, n)", "(77, 77)", "You wrote down 77 tokens: their number comes with the argument."),
        ("return torch.triu(torch.full((n, n), -math.inf), diagonal=1)",
         "return torch.full((n, n), -math.inf).fill_diagonal_(0)",
         "Everything but the diagonal is masked: a token also sees those before it."),
        ("-math.inf", "-100.0",
         "-100 leaves the future a tiny weight, and large scores outweigh it: -inf makes it impossible."),
    ],
    read=lambda mask: mask.masked_fill(mask < -1e4,
                                       -math.inf) if mask.is_floating_point() else mask,  # -1e9 does as well
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
    difficulty=1,
    minutes=5,
    cases=lambda: {
        "a few numbers": {"x": torch.linspace(-4, 4, 9)},
        "tokens": {"x": torch.randn(2, 3, 8)},
    },
    hints=("x times a sigmoid of 1.702 x.",),
    mistakes=[
        ("x * torch.sigmoid(1.702 * x)", "torch.sigmoid(1.702 * x)",
         "The x before the sigmoid is missing: the sigmoid is a gate."),
        ("1.702 * x", "x", "The 1.702 is missing: x · sigmoid(x) is the SiLU."),
        ("x * torch.sigmoid(1.702 * x)", "F.gelu(x)",
         "This is the exact GELU: close, but CLIP's weights were trained with x · sigmoid(1.702 x)."),
        ("x * torch.sigmoid(1.702 * x)", 'F.gelu(x, approximate="tanh")',
         "This is the tanh approximation of the GELU: CLIP has x · sigmoid(1.702 x)."),
        ("x * torch.sigmoid(1.702 * x)", "1.702 * x * torch.sigmoid(x)", "The 1.702 belongs into the sigmoid."),
        ("x * torch.sigmoid(1.702 * x)", "1.702 * x * torch.sigmoid(1.702 * x)",
         "The 1.702 belongs into the sigmoid only."),
        ("torch.sigmoid(1.702 * x)", "torch.sigmoid(1.702 * x) ** 2", "The sigmoid comes in twice."),
        ("torch.sigmoid(1.702 * x)", "torch.softmax(1.702 * x, dim=-1)",
         "A softmax for a sigmoid: each number is gated for itself."),
        ("torch.sigmoid", "torch.tanh", "A tanh for a sigmoid: the gate lies between 0 and 1."),
        ("1.702 * x", "-1.702 * x", "The sign in the sigmoid is wrong: large x are let through."),
        ("1.702 * x", "x / 1.702", "You divided by 1.702: multiply."),
        ("x * torch.sigmoid(1.702 * x)", "torch.relu(x)", "This is a ReLU: the gate is smooth."),
        ("1.702", "1.072", "The number is 1.702."),
    ],
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
    difficulty=3,
    minutes=15,
    cases=lambda: {
        "two sentences": {"hidden": torch.randn(2, 6, 4),
                          "input_ids": torch.tensor([[50, 3, 7, 51, 51, 51], [50, 9, 2, 8, 4, 51]]), "end_token": 51},
        "the empty sentence": {"hidden": torch.randn(1, 4, 5), "input_ids": torch.tensor([[50, 51, 51, 51]]),
                               "end_token": 51},
        "an end token that is not the largest id": {
            "hidden": torch.randn(3, 5, 5), "end_token": 1,
            "input_ids": torch.tensor([[0, 7, 1, 1, 1], [0, 9, 3, 1, 1], [0, 1, 1, 1, 1]]),
        },
        "as many sentences as tokens": {
            "hidden": torch.randn(4, 4, 4), "end_token": 1,
            "input_ids": torch.tensor([[0, 2, 1, 1], [0, 3, 9, 1], [0, 1, 1, 1], [0, 4, 1, 1]]),
        },
    },
    hints=(
        "Where is the first end token of each row? The argmax of zeros and ones finds the first one.",
        "hidden[torch.arange(b), place] takes one vector of each row.",
    ),
    mistakes=[
        ("(input_ids == end_token).int().argmax(dim=1)", "input_ids.argmax(dim=1)",
         "You look for the largest id, as OpenAI's code does: that is the end token in CLIP's vocabulary only."
         " Compare with end_token."),
        ("hidden[torch.arange(len(hidden)), place]", "hidden[:, -1]",
         "You took the last place, or the last end token: the padding is made of end tokens too, and it is the"
         " first one that closes the sentence."),
        ("hidden[torch.arange(len(hidden)), place]", "hidden[:, 0]",
         "You took the start token: with the causal mask it has seen nothing. The end token has seen all. (Or no end"
         " token was found, and the argmax of zeros is 0: compare with end_token.)"),
        ("hidden[torch.arange(len(hidden)), place]", "hidden.mean(dim=1)",
         "You took the mean over all tokens: the vector at the first end token."),
        ("hidden[torch.arange(len(hidden)), place]",
         "torch.stack([h[: k + 1].mean(dim=0) for h, k in zip(hidden, place.tolist(), strict=True)])",
         "You took the mean up to the end token: the vector at the end token itself, which has seen the others."),
        ("hidden[torch.arange(len(hidden)), place]",
         "(hidden * (input_ids == end_token)[..., None]).sum(dim=1)",
         "You added up the vectors of all end tokens: that of the first one only, the others are padding."),
        ("hidden[torch.arange(len(hidden)), place]",
         "(hidden * (input_ids == end_token)[..., None]).sum(dim=1) / (input_ids == end_token).sum(dim=1)[:, None]",
         "You took the mean over all end tokens: the vector of the first one only, the others are padding."),
        ("hidden[torch.arange(len(hidden)), place]", "hidden.sum(dim=1)",
         "You added up all tokens: the vector at the first end token."),
        ("hidden[torch.arange(len(hidden)), place]", "hidden[:, place]",
         "hidden[:, place] takes the places of all sentences from each sentence, [b b d]: one of each is wanted,"
         " hidden[arange(b), place]."),
        ("hidden[torch.arange(len(hidden)), place]", "hidden[torch.arange(len(hidden)), place - 1]",
         "You took the last word: the end token after it."),
        ("hidden[torch.arange(len(hidden)), place]", "hidden[torch.arange(len(hidden)), place[0]]",
         "You take the first sentence's place for all: each has its own."),
        ("hidden[torch.arange(len(hidden)), place]", "hidden.amax(dim=1)",
         "You took the maximum over all tokens: the vector at the first end token."),
        ("hidden[torch.arange(len(hidden)), place]",
         "hidden[torch.arange(len(hidden)), (place + 1).clamp(max=hidden.shape[1] - 1)]",
         "One too far: the vector at the first end token."),
        ("(input_ids == end_token).int().argmax(dim=1)", "input_ids.argmin(dim=1)",
         "You look for the smallest id: compare with end_token, and take the first place where it stands."),
        ("return hidden[torch.arange(len(hidden)), place]",
         "words = (input_ids != end_token).to(hidden.dtype)[..., None]\nreturn (hidden * words).sum(dim=1) /"
         " words.sum(dim=1)",
         "You took the mean over the words, without the end tokens: the vector at the first end token, which has"
         " seen them all."),
    ],
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


def _pairs_case(b: int, d: int, scale: float) -> dict:
    return {"image_features": 2 * torch.randn(b, d), "text_features": 0.5 * torch.randn(b, d),
            "logit_scale": torch.tensor(scale)}


@exercise(
    difficulty=4,
    minutes=25,
    cases=lambda: {
        "five pairs": _pairs_case(5, 8, 1.5),
        "three pairs": _pairs_case(3, 4, math.log(1 / 0.07)),
        "as many pairs as numbers": _pairs_case(4, 4, 0.5),
        "two pairs": _pairs_case(2, 6, 1.0),
    },
    hints=(
        "Normalise both to length 1; the logits [b b] are exp(logit_scale) times all cosine similarities.",
        "Picture i belongs to text i: the labels are 0 ... b-1. F.cross_entropy(logits, labels) goes over rows.",
        "Rows: which text for this picture? Columns: which picture for this text? The mean of both.",
    ),
    mistakes=[
        ("", "image, text = image_features / image_features.norm(), text_features / text_features.norm()\n"
         "logits = logit_scale.exp() * image @ text.T\nlabels = torch.arange(len(logits))\n"
         "return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2",
         "You divided by the norm of the whole batch: each vector by its own, along the last axis."),
        ("(F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2", "-logits.diag().mean()",
         "You only pull each pair together (the mean of the diagonal): the others have to be pushed away, by a"
         " cross-entropy over each row and column."),
        ("(F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2",
         "F.mse_loss(logits.softmax(dim=-1), torch.eye(len(logits)))",
         "You compare with the identity by squares: it is a choice among b, so a cross-entropy."),
        ("image = F.normalize(image_features, dim=-1)", "image = image_features",
         "The picture's vectors are not normalised: without it length counts, not direction alone."),
        ("text = F.normalize(text_features, dim=-1)", "text = text_features",
         "The text's vectors are not normalised: without it length counts, not direction alone."),
        ("",
         "logits = logit_scale.exp() * image_features @ text_features.T\nlabels = torch.arange(len(logits))\nreturn"
         " (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2",
         "Neither of the two is normalised: it is the cosine that is compared, so both vectors must have length 1."),
        ("(F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2",
         "F.cross_entropy(logits, labels)",
         "Only one direction: which text for each picture. The other one, which picture for each text, is missing."),
        ("(F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2",
         "F.cross_entropy(logits.T, labels)",
         "Only one direction: which picture for each text. The other one, which text for each picture, is missing."),
        ("labels)) / 2", "labels))", "You added both directions: their mean."),
        ("logit_scale.exp() *", "logit_scale *", "logit_scale is a logarithm: multiply by exp(logit_scale)."),
        ("logit_scale.exp() *", "1 / logit_scale.exp() *",
         "You divided by exp(logit_scale): it is 1 / temperature already, so multiply."),
        ("logit_scale.exp() *", "", "The scale is missing: cosines between -1 and 1 can't make a sharp softmax."),
        ("labels = torch.arange(len(logits))", "labels = torch.zeros(len(logits), dtype=torch.int64)",
         "Your labels are all 0: picture i belongs to text i, so they are 0 ... b-1."),
        ("image = F.normalize(image_features, dim=-1)", "image = F.normalize(image_features, dim=0)",
         "The picture's vectors are normalised along the batch: each vector by itself, along the last axis."),
        ("text = F.normalize(text_features, dim=-1)", "text = F.normalize(text_features, dim=0)",
         "The text's vectors are normalised along the batch: each vector by itself, along the last axis."),
        ("",
         "image, text = F.normalize(image_features, dim=0), F.normalize(text_features, dim=0)\nlogits ="
         " logit_scale.exp() * image @ text.T\nlabels = torch.arange(len(logits))\nreturn (F.cross_entropy(logits,"
         " labels) + F.cross_entropy(logits.T, labels)) / 2",
         "You normalised along the batch: each vector by itself, along the last axis."),
        ("F.cross_entropy(logits, labels) +", "F.cross_entropy(logits.softmax(dim=-1), labels) +",
         "cross_entropy takes logits and does the softmax itself: yours is done twice."),
        ("",
         "image, text = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)\nlogits ="
         " (logit_scale.exp() * image @ text.T).softmax(dim=-1)\nlabels = torch.arange(len(logits))\nreturn"
         " (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2",
         "You took a softmax before cross_entropy, which takes logits and does it itself."),
        ("(F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2", "F.mse_loss(image, text)",
         "You only pull each pair together (a mean squared difference): the others have to be pushed away."),
        ("(F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2",
         "-(logits.softmax(dim=0).diag().mean() + logits.softmax(dim=1).diag().mean()) / 2",
         "The logarithm is missing: cross-entropy is minus the log of the softmax."),
        ("(F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2",
         "(F.cross_entropy(logits.softmax(dim=1), labels) + F.cross_entropy(logits.T.softmax(dim=1), labels)) / 2",
         "There is a softmax before both cross-entropies, which take logits and do it themselves."),
        ("image @ text.T", "image @ image.T", "You compare pictures with pictures: pictures with texts."),
        ("image @ text.T", "text @ text.T", "You compare texts with texts: pictures with texts."),
        ("return (F", "return -(F", "The sign is wrong: cross_entropy is already the negative logarithm."),
        ("image = F.normalize(image_features, dim=-1)", "image = F.normalize(image_features, dim=-1).detach()",
         "The picture's vectors are detached: the value is right, but the image tower would not learn."),
        ("text = F.normalize(text_features, dim=-1)", "text = F.normalize(text_features, dim=-1).detach()",
         "The text's vectors are detached: the value is right, but the text tower would not learn."),
        ("(F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2",
         "1 - (image * text).sum(dim=-1).mean()",
         "You only pull each pair together: without the others to push away, all vectors become the same."),
        ("(F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2",
         "(F.cross_entropy(logits, labels, reduction='sum') + F.cross_entropy(logits.T, labels, reduction='sum')) /"
         " 2",
         "You summed over the batch: a mean over it."),
        ("(F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2",
         "F.binary_cross_entropy_with_logits(logits, torch.eye(len(logits)))",
         "Each pair is judged for itself, by a sigmoid: here each row and each column is a choice among b, a"
         " softmax."),
        ("return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2",
         'return F.cross_entropy(logits, labels, reduction="sum")',
         "There is one direction only, and it is summed: the mean over the batch, and over both directions."),
        ("",
         "image = image_features / image_features.square().sum(dim=-1, keepdim=True)\ntext = text_features /"
         " text_features.square().sum(dim=-1, keepdim=True)\nlogits = logit_scale.exp() * image @ text.T\nlabels ="
         " torch.arange(len(logits))\nreturn (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) /"
         " 2",
         "You divided each vector by the square of its length: by the length, so that the length becomes 1."),
        ("image @ text.T", "-torch.cdist(image, text)",
         "You compare by minus the distance: by the cosine, the product of the normalised vectors."),
        ("return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2",
         "return -F.logsigmoid(logits * (2 * torch.eye(len(logits)) - 1)).sum() / len(logits)",
         "This is the loss of SigLIP, a sigmoid for each pair: CLIP takes a softmax over each row and each column."),
        ("labels = torch.arange(len(logits))",
         "labels = torch.ones(len(logits), dtype=torch.int64).clamp(max=len(logits) - 1)",
         "Your labels are all 1: picture i belongs to text i, so they are 0 ... b-1."),
        ("image @ text.T", "image.T @ text",
         "You multiplied [d b] with [b d], which compares features: [b d] with [d b] compares each picture with each"
         " text."),
    ],
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
    difficulty=3,
    minutes=15,
    cases=lambda: {
        "4 x 6 pixels in patches of 2": {"image": torch.randn(2, 3, 4, 6), "size": 2},
        "one picture in patches of 3": {"image": torch.randn(1, 3, 6, 3), "size": 3},
        "a square": {"image": torch.randn(2, 3, 4, 4), "size": 2},
        "three by three patches of 3": {"image": torch.randn(1, 3, 9, 9), "size": 3},
    },
    hints=(
        "Split the height into (rows, size) and the width into (columns, size): [b c rows size columns size].",
        "Then bring rows and columns to the front, and c, size, size to the end, and merge.",
    ),
    mistakes=[
        ("permute(0, 2, 4, 1, 3, 5)", "permute(0, 4, 2, 1, 3, 5)", "The patches go column by column: row by row."),
        ("permute(0, 2, 4, 1, 3, 5)", "permute(0, 2, 4, 3, 5, 1)",
         "Within a patch the channels come last: they come first, (c y x), as in a convolution's weights."),
        ("permute(0, 2, 4, 1, 3, 5)", "permute(0, 2, 4, 1, 5, 3)", "Within a patch rows and columns are exchanged."),
        ("split = image.reshape(b, c, h // size, size, w // size, size)",
         "split = image.reshape(b, c, size, h // size, size, w // size)",
         "The axes are split the wrong way: first which patch, then which pixel in it, (rows size). Yours takes"
         " pixels from all over the picture."),
        ("permute(0, 2, 4, 1, 3, 5)", "permute(0, 1, 2, 3, 4, 5)",
         "You only reshaped, without bringing the axes in order: each patch is a square of the picture."),
        ("return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)",
         "return image.reshape(b, (h // size) * (w // size), -1)",
         "You only reshaped the picture: a token is then a piece of its rows, not a square. Split height and width"
         " first, and bring the axes in order."),
        ("return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)",
         "return image.permute(0, 2, 3, 1).reshape(b, (h // size) * (w // size), -1)",
         "The channels are brought to the end and the rest is only reshaped: a token is then a piece of a row, not a"
         " square."),
        ("",
         "b, c, h, w = image.shape\nsplit = image.reshape(b, c, size, h // size, size, w // size)\nreturn"
         " split.permute(0, 3, 5, 1, 2, 4).flatten(3).flatten(1, 2)",
         "A token holds every n-th pixel, from all over the picture: a patch is a square of neighbours, so that the"
         " height splits into (h size), the size last."),
        ("", "return F.unfold(image, size).transpose(1, 2)",
         "Your patches overlap, one for each pixel: a patch begins where the one before ends, stride=size."),
        ("return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)",
         "return split.permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)",
         "The channels are still an axis of their own, [b c n (y x)]: they belong into the token, (c y x)."),
        ("return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)",
         "return F.avg_pool2d(image, size).flatten(2).transpose(1, 2)",
         "You averaged each patch: a token holds all its pixels."),
        ("permute(0, 2, 4, 1, 3, 5)", "permute(0, 3, 5, 1, 2, 4)",
         "Which patch, and which pixel in it, are exchanged."),
        (".flatten(3).flatten(1, 2)", ".flatten(3)",
         "Rows and columns of patches are still apart: one axis of tokens."),
        (".flatten(3).flatten(1, 2)", ".flatten(3).flatten(1, 2).transpose(1, 2)",
         "The axes are [b d n]: tokens first, [b n d]."),
        (".flatten(3).flatten(1, 2)", ".mean(3).flatten(3).flatten(1, 2)", "The channels are averaged."),
        ("permute(0, 2, 4, 1, 3, 5).", "permute(0, 2, 4, 1, 3, 5).flip(1).",
         "The rows of patches run from below: from above."),
    ],
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
