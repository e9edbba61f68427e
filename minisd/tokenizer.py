"""The tokenizer: a prompt becomes a row of numbers, the ids of words and of pieces of words.

A table of whole words would be endless and would still lack the next name; single letters would make prompts long and
carry little meaning. Byte-pair encoding (BPE) lies between. It learns a list of merges from text: beginning with single
bytes, the most frequent pair of neighbours becomes one piece, again and again. Frequent words end up as one piece, and
a rare word is spelled with several. With CLIP's vocabulary:

    "a red Axolotl" ─► clean      "a red axolotl"
                    ─► split      "a"  "red"  "axolotl"
                    ─► bytes      a</w>   r e d</w>   a x o l o t l</w>           ("</w>" marks the end of a word)
                    ─► merge      a</w>   red</w>     ax o lot l</w>              (first "lo", then "ax", then "lot")
                    ─► ids        49406   320   736   3165 78 5132 331   49407 49407 …

Every id is a row of the text tower's embedding table (`clip.py`).

Source: Sennrich et al. 2016 (arXiv:1508.07909), section 3.2; Radford et al. 2021 (arXiv:2103.00020), section 2.4;
OpenAI's `clip/simple_tokenizer.py`. The merging itself is done by the `tokenizers` library, because plain Python would
be too slow for training captions; notebook 05 writes it out.
"""

import json
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
CLIP_VOCABULARY = Path(__file__).parent / "weights" / "clip_vocabulary"


class Tokens(NamedTuple):
    """Prompts as ids, all of one length."""

    ids: Int[Tensor, "b n"]  # int64: the start token, the pieces, the end token, and padding up to the length
    lost: list[str]  # the end of each prompt that did not fit, as it was written; "" if all of it did


@runtime_checkable
class Tokenizer(Protocol):
    """Anything that turns prompts into tokens: BPETokenizer, or a wrapper around another library's."""

    end_token: int

    def __call__(self, prompts: list[str], max_length: int) -> Tokens: ...


class BPETokenizer:
    """CLIP's byte-pair encoding.

    Args:
        vocab: id of each piece. A piece that ends a word carries "</w>".
        merges: the pairs that become one piece, in the order in which they were learned, the most frequent first.
        pad: the token that fills a row up: the end token, or "!" in Stable Diffusion 2.
        added: ids of words that were added later, by textual inversion. Each stays whole, wherever it is in a prompt.

    Attributes:
        start_token, end_token, pad_token: ids.

    Raises:
        ValueError: a vocabulary without start, end or padding token, or merges of pieces that it does not have.
    """

    def __init__(
        self, vocab: dict[str, int], merges: list[tuple[str, str]], pad: str = END, added: dict[str, int] | None = None
    ):
        # Some files list start and end among the added words, but these two are part of every vocabulary.
        self.added = {word: i for word, i in (added or {}).items() if word not in (START, END)}
        vocab = vocab | self.added
        unknown = [token for token in (START, END, pad) if token not in vocab]
        if unknown:
            raise ValueError(f"the vocabulary has no {' and no '.join(unknown)}, which every sentence needs")
        self.vocab, self.merges, self.pad = vocab, merges, pad
        self.start_token, self.end_token, self.pad_token = vocab[START], vocab[END], vocab[pad]
        self.engine = _engine(vocab, merges)
        # As in CLIP, a special token that is written out in a prompt becomes that token, and not its letters.
        self.engine.add_special_tokens([START, END])
        self.engine.add_tokens(list(self.added))

    def __call__(self, prompts: list[str], max_length: int) -> Tokens:
        """Prompts → ids [b max_length], and the end of each prompt that did not fit."""
        for prompt in prompts:
            if not isinstance(prompt, str) or prompt.encode("utf-8", "replace").decode() != prompt:
                raise ValueError(f"a prompt has to be a text in Unicode, not {prompt!r}")
        ids, lost = [], []
        for encoding, prompt in zip(self.engine.encode_batch(prompts), prompts, strict=True):
            kept = encoding.ids[: max_length - 2]  # start and end token take two places, even if the prompt is cut
            # CLIP reads the meaning of the sentence at its first end token, so padding does not change it. Stable
            # Diffusion's UNet, however, sees the states of all places, and was trained with this padding.
            padding = [self.pad_token] * (max_length - 2 - len(kept))
            ids.append([self.start_token, *kept, self.end_token, *padding])
            # Each piece knows where in the prompt it began. Cutting the prompt there keeps its capitals and accents.
            lost.append(prompt[encoding.offsets[len(kept)][0] :] if len(kept) < len(encoding.ids) else "")
        return Tokens(torch.tensor(ids, device="cpu"), lost)

    def pieces(self, ids: list[int]) -> list[str]:
        """The pieces of words that the ids stand for."""
        names = {i: piece for piece, i in self.vocab.items()}
        return [names[i] for i in ids]

    # --- where a vocabulary comes from: OpenAI, captions, a folder ---

    @classmethod
    def clip(cls) -> "BPETokenizer":
        """OpenAI's vocabulary of 49,408 pieces, which Stable Diffusion v1 uses. It ships with minisd (MIT license)."""
        merges = _read_merges(CLIP_VOCABULARY / "merges.txt")
        # The ids follow from the merges: first the bytes, then what each merge makes, then start and end.
        pieces = [*_single_bytes(), *(a + b for a, b in merges), START, END]
        return cls({piece: i for i, piece in enumerate(pieces)}, merges)

    @classmethod
    def train(cls, captions: list[str], vocab_size: int = 2048) -> "BPETokenizer":
        """Learn a vocabulary of at most `vocab_size` pieces from captions. The same captions give the same ids.

        Raises:
            ValueError: a vocab_size below 514, too small for the bytes and the two special tokens.
        """
        from tokenizers import trainers

        # With every byte in the vocabulary, in a word and at its end, any prompt can be written. All are named
        # beforehand because the trainer would number those that it meets in an order that changes from run to run.
        known = [START, END, *_single_bytes()]
        if vocab_size < len(known):
            raise ValueError(f"a vocabulary holds at least {len(known)} pieces, which write any text, not {vocab_size}")
        engine = _engine()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, end_of_word_suffix=END_OF_WORD, special_tokens=known, show_progress=False
        )
        engine.train_from_iterator(captions, trainer)
        model = json.loads(engine.to_str())["model"]
        return cls(model["vocab"], [tuple(merge) for merge in model["merges"]])

    @classmethod
    def load(cls, folder: str | Path) -> "BPETokenizer":
        """Read the files of a `transformers.CLIPTokenizer`: `vocab.json` and `merges.txt`, or a `tokenizer.json`.

        Raises:
            FileNotFoundError: the folder has neither.
            ValueError: its files are broken, or are no CLIP vocabulary.
        """
        folder = Path(folder)
        two_files = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
        if not two_files and not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"there is no tokenizer in {folder}: it has neither vocab.json and merges.txt nor tokenizer.json"
            )
        try:
            # What all files together say beside the vocabulary. A file that is not there says nothing: {}.
            one_file, config, added = (
                json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
                for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
            )
            # The padding: a string, or a dict in some versions. Without one, the end token, as in Stable Diffusion v1.
            pad = config.get("pad_token")
            pad = (pad["content"] if isinstance(pad, dict) else pad) or END
            # Words that were added to a vocabulary. Each version of transformers writes them to another place, so all
            # three are read.
            added |= {token["content"]: int(i) for i, token in config.get("added_tokens_decoder", {}).items()}
            added |= {token["content"]: token["id"] for token in one_file.get("added_tokens", [])}
            # The vocabulary and the merges, in two files ...
            if two_files:
                vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
                return cls(vocab, _read_merges(folder / "merges.txt"), pad, added)
            # ... or in one. Old versions of the library write a merge as "a b" in it, new ones as ["a", "b"].
            bpe = one_file["model"]
            if bpe["type"] != "BPE":
                raise ValueError(f"its model is {bpe['type']}, not BPE")
            pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in bpe["merges"]]
            return cls(bpe["vocab"], pairs, pad, added)
        except Exception as error:  # a damaged file may cause an error of any kind
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise ValueError(f"the tokenizer in {folder} can't be used: {reason}") from None

    def save(self, folder: str | Path, max_length: int) -> None:
        """Write the files of a `transformers.CLIPTokenizer` into a folder, which is made if it is not there.

        Args:
            folder: where to write `vocab.json`, `merges.txt` and `tokenizer_config.json`.
            max_length: tokens in a context, which transformers is to cut prompts to.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        vocab = {piece: i for piece, i in self.vocab.items() if piece not in self.added}
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False, indent=0), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        config = {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": max_length,
            "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": self.pad,
        }  # fmt: skip
        if self.added:
            config["added_tokens_decoder"] = {str(i): {"content": word} for word, i in self.added.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# --- from text to pieces ----------------------------------------------------------------------------------------------


def _engine(vocab: dict[str, int] | None = None, merges: list[tuple[str, str]] | None = None):
    """The `tokenizers.Tokenizer` that cleans, splits and merges as CLIP does. Without a vocabulary, one to be trained.

    Raises:
        ValueError: merges of pieces that the vocabulary does not have.
    """
    from tokenizers import Regex, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    try:
        engine = Engine(models.BPE(vocab, merges, end_of_word_suffix=END_OF_WORD, unk_token=END))
    except Exception as error:  # the library raises a plain Exception
        raise ValueError(f"the merges do not fit the vocabulary ({error})") from None
    # Clean: one code point for a letter and its accent (NFC), one space for any run of spaces, and lower case, so that
    # what looks the same has the same ids.
    clean = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    engine.normalizer = normalizers.Sequence(clean)
    # Split, because a merge must not reach across words. In this order: special tokens, English contractions, runs of
    # letters, single digits, and runs of other characters except spaces. Spaces are dropped, because "</w>" says where
    # a word ends.
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(words, behavior="removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)  # UTF-8, with a character for each byte: see below
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    return engine


def _single_bytes() -> list[str]:
    """The 512 pieces that merging begins with: all 256 bytes inside a word, then all at its end.

    A byte is written as one character, because a vocabulary is a text file. Bytes that Latin-1 shows as a visible
    character stand for themselves. The other 68, such as the space and the control characters, are written as the
    characters from U+0100 on. OpenAI `gpt-2/src/encoder.py: bytes_to_unicode`.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    return alphabet + [byte + END_OF_WORD for byte in alphabet]


# --- the files of transformers ----------------------------------------------------------------------------------------


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """The pair of pieces in each line. The first line, with the version, and empty lines are left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
