"""CLIP: two transformers, one for sentences and one for pictures, that learn to agree.

Each maps its input to a vector, and training pulls the vectors of a picture and of its caption together and all
others apart. Stable Diffusion keeps the text half: not the one vector, but the whole sequence of hidden states
[b n d], so that the UNet can look at every word.

    "a red fox" ─► tokens [b n] ─► CLIPTextTransformer ─► last hidden state [b n d]   (the context)
                                                     └──► state at the end token ─► text_projection ──► ┐
    picture [b 3 H W] ─► patches ─► CLIPVisionTransformer ─► class token ─► visual_projection ────────► ┴ similarity

Source: Radford et al. 2021 (arXiv:2103.00020); CompVis `ldm/modules/encoders/modules.py: FrozenCLIPEmbedder`. The
parameters are named as in transformers' `CLIPModel`, which is what Stable Diffusion's checkpoints hold.
"""

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from .attention import attention


@dataclass(frozen=True)
class CLIPTextConfig:
    """What a text tower is. The defaults are CLIP ViT-L/14's, which Stable Diffusion v1 uses (123 million)."""

    vocab_size: int = 49408  # words and pieces of words
    max_length: int = 77  # tokens in a context; longer prompts are cut
    width: int = 768  # of the hidden states, so the UNet's context_dim
    layers: int = 12
    heads: int = 12
    projection_dim: int = 768  # of the space shared with pictures


@dataclass(frozen=True)
class CLIPVisionConfig:
    """What an image tower is. The defaults are CLIP ViT-L/14's (304 million)."""

    image_size: int = 224  # pixels along each side
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    projection_dim: int = 768


# --- the transformer that both towers are made of ------------------------------------------------------------------


class CLIPAttention(nn.Module):
    """Self-attention with a bias at each of the four projections. `causal`: a token sees those before it only."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = (
            rearrange(f(x), "b n (h d) -> b h n d", h=self.heads) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(rearrange(attention(q, k, v, causal=self.causal), "b h n d -> b n (h d)"))


class CLIPMLP(nn.Module):
    """Widen by four, quick-GELU, come back."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))  # quick-GELU: OpenAI's fast stand-in for the GELU


class CLIPEncoderLayer(nn.Module):
    """Attention, then the MLP; each normalised before and added after (pre-norm)."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.self_attn = CLIPAttention(width, heads, causal)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = CLIPMLP(width)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, width: int, heads: int, layers: int, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(width, heads, causal) for _ in range(layers))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        for layer in self.layers:
            x = layer(x)
        return x


# --- the text tower ---------------------------------------------------------------------------------------------------


class CLIPTextEmbeddings(nn.Module):
    """A vector for each token plus a vector for each place in the sentence."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_length, config.width)

    def forward(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.token_embedding(input_ids) + self.position_embedding(positions)


class CLIPTextTransformer(nn.Module):
    """Tokens → last hidden state, after the final norm: what Stable Diffusion calls the context."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config.width, config.heads, config.layers, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids)))


class CLIPTextModel(nn.Module):
    """The text tower under the name that the checkpoint gives it: `transformer.text_model.…`."""

    def __init__(self, config: CLIPTextConfig = CLIPTextConfig()):
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)

    def forward(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.text_model(input_ids)


# --- the image tower --------------------------------------------------------------------------------------------------


class CLIPVisionEmbeddings(nn.Module):
    """Cut the picture into patches, one token each, behind a class token that will gather the whole."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(config.width) * config.width**-0.5)
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        patches = (config.image_size // config.patch_size) ** 2
        self.position_embedding = nn.Embedding(patches + 1, config.width)

    def forward(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b n d"]:
        patches = rearrange(self.patch_embedding(pixels), "b d h w -> b (h w) d")
        class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        tokens = torch.cat([class_token, patches], dim=1)
        return tokens + self.position_embedding.weight.to(tokens.dtype)


class CLIPVisionTransformer(nn.Module):
    """Picture → the class token after the last layer: one vector for the whole picture."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)  # the name is misspelt in every CLIP checkpoint
        self.encoder = CLIPEncoder(config.width, config.heads, config.layers, causal=False)
        self.post_layernorm = nn.LayerNorm(config.width)

    def forward(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d"]:
        tokens = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(tokens[:, 0])


# --- both together, as they are trained -------------------------------------------------------------------------------


class CLIPModel(nn.Module):
    """The two towers and the space that they share.

    `end_token` is the id that closes a sentence: there, with the causal mask, the text tower has seen all of it.
    """

    def __init__(self, text: CLIPTextConfig, vision: CLIPVisionConfig, end_token: int):
        super().__init__()
        if text.projection_dim != vision.projection_dim:
            raise ValueError(f"the two towers must share one space: {text.projection_dim} != {vision.projection_dim}")
        self.text_config, self.vision_config, self.end_token = text, vision, end_token
        self.text_model = CLIPTextTransformer(text)
        self.vision_model = CLIPVisionTransformer(vision)
        self.text_projection = nn.Linear(text.width, text.projection_dim, bias=False)
        self.visual_projection = nn.Linear(vision.width, vision.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # log of 1 / temperature, learned
        initialise(self)

    def get_text_features(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b p"]:
        """Sentences → unit vectors."""
        hidden = self.text_model(input_ids)
        end = (input_ids == self.end_token).int().argmax(dim=1)  # the first end token; the rest is padding
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), end]
        return F.normalize(self.text_projection(pooled), dim=-1)

    def get_image_features(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b p"]:
        """Pictures in [-1, 1] → unit vectors."""
        return F.normalize(self.visual_projection(self.vision_model(pixels)), dim=-1)

    def forward(self, input_ids: Int[Tensor, "b n"], pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b b"]:
        """Logits: row i holds how well picture i fits each of the captions."""
        scale = self.logit_scale.exp().clamp(max=100.0)  # as in the paper: more than 100 is unstable
        return scale * self.get_image_features(pixels) @ self.get_text_features(input_ids).T


def contrastive_loss(logits: Float[Tensor, "b b"]) -> Float[Tensor, ""]:
    """Which caption belongs to which picture, and the other way round (Radford et al., figure 3).

    The right answers are on the diagonal: the mean of the cross-entropies along rows and columns.
    """
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def initialise(model: nn.Module) -> None:
    """OpenAI's initialisation: standard deviations that shrink with width and depth keep the residual stream tame."""
    for name, tower in model.named_children():
        if not isinstance(tower, (CLIPTextTransformer, CLIPVisionTransformer)):
            continue
        layers = tower.encoder.layers
        width = layers[0].layer_norm1.normalized_shape[0]
        nn.init.normal_(tower.embeddings.position_embedding.weight, std=0.01 if name == "text_model" else width**-0.5)
        if name == "text_model":
            nn.init.normal_(tower.embeddings.token_embedding.weight, std=0.02)
        for layer in layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                nn.init.normal_(projection.weight, std=width**-0.5)
            nn.init.normal_(layer.mlp.fc1.weight, std=(2 * width) ** -0.5)
            for projection in (layer.self_attn.out_proj, layer.mlp.fc2):
                nn.init.normal_(projection.weight, std=width**-0.5 * (2 * len(layers)) ** -0.5)


# --- words to tokens --------------------------------------------------------------------------------------------------

START, END = "<|startoftext|>", "<|endoftext|>"


class Tokens(NamedTuple):
    """Prompts as numbers, all of one length."""

    ids: Int[Tensor, "b n"]  # start token, words, end token, and end tokens up to the length
    lost: list[str]  # what did not fit, prompt by prompt; mostly empty strings


@runtime_checkable
class Tokenizer(Protocol):
    """Anything that turns prompts into tokens: the one below, or a wrapper of another library's."""

    end_token: int

    def __call__(self, prompts: list[str], max_length: int) -> Tokens: ...


class BPETokenizer:
    """CLIP's byte-pair encoding: words are split into the pieces that were frequent in the training captions.

    Lower case; a piece that ends a word carries "</w>"; each sentence stands between the start and the end token, and
    is padded by end tokens (or by `pad`, as Stable Diffusion 2 has it). Saved as `vocab.json` and `merges.txt`, the two
    files that `transformers.CLIPTokenizer` reads. Sennrich et al. 2016 (arXiv:1508.07909); the engine is the
    `tokenizers` library.

    Raises:
        ValueError: merges of pieces that the vocabulary lacks, or no start, end or padding token in it.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], pad: str = END):
        from tokenizers import Tokenizer as Engine
        from tokenizers import models

        unknown = [token for token in (START, END, pad) if token not in vocab]
        if unknown:
            raise ValueError(f"the vocabulary has no {' and no '.join(unknown)}, which every sentence needs")
        self.vocab, self.merges, self.pad = vocab, merges, pad
        self.start_token, self.end_token, self.pad_token = vocab[START], vocab[END], vocab[pad]
        try:
            model = models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=END)
        except Exception as error:  # the engine knows no finer one
            raise ValueError(f"the merges do not fit the vocabulary ({error})") from None
        self.engine = _as_clip(Engine(model))
        self.engine.add_special_tokens([START, END])  # written out in a prompt, they count as themselves, as in CLIP

    @classmethod
    def clip(cls) -> "BPETokenizer":
        """OpenAI's own, with 49,408 entries, which Stable Diffusion v1 reads prompts by. It ships with minisd (MIT)."""
        merges = _read_merges(CLIP_VOCABULARY / "merges.txt")
        # The 256 bytes, the same at the end of a word, what each merge makes, start and end: in this order.
        pieces = _byte_alphabet()
        pieces += [byte + "</w>" for byte in pieces] + [a + b for a, b in merges] + [START, END]
        return cls({piece: i for i, piece in enumerate(pieces)}, merges)

    @classmethod
    def train(cls, captions: list[str], vocab_size: int = 2048) -> "BPETokenizer":
        """Learn the pieces from captions. All 256 bytes are in the vocabulary, so every prompt can be written.

        Raises:
            ValueError: a vocab_size too small for the bytes, in a word and at its end, and the two special tokens: 514.
        """
        from tokenizers import Tokenizer as Engine
        from tokenizers import models, pre_tokenizers, trainers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        known = [START, END, *alphabet, *(byte + "</w>" for byte in alphabet)]
        if vocab_size < len(known):
            raise ValueError(f"a vocabulary holds at least {len(known)} pieces, which write any text, not {vocab_size}")
        engine = _as_clip(Engine(models.BPE(end_of_word_suffix="</w>", unk_token=END)))
        # A byte that ends a word must be known though no caption ends in it. And all are named beforehand: the trainer
        # numbers what it meets in an order that changes from run to run, but the same captions must give the same ids.
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, end_of_word_suffix="</w>", special_tokens=known, show_progress=False
        )
        engine.train_from_iterator(captions, trainer)
        model = json.loads(engine.to_str())["model"]
        return cls(model["vocab"], [tuple(merge) for merge in model["merges"]])

    def __call__(self, prompts: list[str], max_length: int) -> Tokens:
        """Prompts → ids [b max_length] and, for each prompt, the words that were cut off."""
        ids, lost = [], []
        for encoding, prompt in zip(self.engine.encode_batch(prompts), prompts, strict=True):
            kept = encoding.ids[: max_length - 2]
            padding = [self.pad_token] * (max_length - 2 - len(kept))
            ids.append([self.start_token, *kept, self.end_token, *padding])
            lost.append(prompt[encoding.offsets[len(kept)][0] :] if len(kept) < len(encoding.ids) else "")
        return Tokens(torch.tensor(ids), lost)

    def pieces(self, ids: list[int]) -> list[str]:
        """Ids → the pieces of words that they stand for, to look at."""
        names = {i: piece for piece, i in self.vocab.items()}
        return [names[i] for i in ids]

    def save(self, folder: str | Path, max_length: int) -> None:
        """Write the files of a `transformers.CLIPTokenizer` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(self.vocab, ensure_ascii=False, indent=0), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        config = {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": max_length,
            "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": self.pad,
        }  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "BPETokenizer":
        """Read the files of a `transformers.CLIPTokenizer`: `vocab.json` and `merges.txt`, or a `tokenizer.json`.

        Raises:
            FileNotFoundError: the folder has neither. ValueError: what it has is broken, or no CLIP vocabulary.
        """
        folder = Path(folder)
        whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        if not whole.is_file() and not (vocab.is_file() and merges.is_file()):
            raise FileNotFoundError(
                f"there is no tokenizer in {folder}: it has neither vocab.json and merges.txt nor tokenizer.json"
            )
        try:
            pad = _padding(folder)
            if vocab.is_file() and merges.is_file():
                return cls(json.loads(vocab.read_text(encoding="utf-8")), _read_merges(merges), pad)
            model = json.loads(whole.read_text(encoding="utf-8"))["model"]
            if model["type"] != "BPE":
                raise ValueError(f"its model is {model['type']}, not BPE")
            pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
            return cls(model["vocab"], pairs, pad)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the tokenizer in {folder} can't be used: {error}") from None


CLIP_VOCABULARY = Path(__file__).parent / "weights" / "clip_vocabulary"


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """A pair of pieces a line, those that were merged first at the top."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]


def _padding(folder: Path) -> str:
    """The padding token that a folder of transformers names, or the end token, as in Stable Diffusion v1."""
    path = folder / "tokenizer_config.json"
    pad = json.loads(path.read_text(encoding="utf-8")).get("pad_token") if path.is_file() else None
    return (pad["content"] if isinstance(pad, dict) else pad) or END


def _byte_alphabet() -> list[str]:
    """A sign for each of the 256 bytes: itself where it can be seen, else one from beyond; the visible ones first."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]


def _as_clip(engine):
    """Clean and split text as CLIP does: NFC, one space, lower case; words, numbers digit by digit, and signs."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    engine.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return engine


class FrozenCLIPEmbedder(nn.Module):
    """Prompts → context [b n d]: tokenizer and text tower, never trained further.

    This is Stable Diffusion's `cond_stage_model`: `transformer` is the text tower, and the context is its last hidden
    state, padding included. CompVis `encoders/modules.py: FrozenCLIPEmbedder`.
    """

    def __init__(self, transformer: nn.Module, tokenizer: Tokenizer, max_length: int = 77):
        super().__init__()
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.freeze()

    unconditional = ""  # the prompt that says nothing

    def freeze(self) -> None:
        """No dropout, no gradients."""
        self.eval().requires_grad_(False)

    @classmethod
    def from_transformers(cls, folder: str, max_length: int = 77) -> "FrozenCLIPEmbedder":
        """As CompVis does it: transformers' own CLIPTextModel and CLIPTokenizer, from a folder or a hub id."""
        import transformers

        text_model = transformers.CLIPTextModel.from_pretrained(folder)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        return cls(_TransformersText(text_model), _TransformersTokenizer(tokenizer), max_length)

    def tokenize(self, prompts: list[str]) -> Int[Tensor, "b n"]:
        """Prompts → ids. Warns, and says what was lost, where a prompt is longer than the context."""
        tokens = self.tokenizer(prompts, self.max_length)
        for prompt, lost in zip(prompts, tokens.lost, strict=True):
            if lost:
                warnings.warn(
                    f"the prompt is longer than {self.max_length} tokens; cut off: {lost!r} (of {prompt!r})",
                    stacklevel=2,
                )
        return tokens.ids

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> Float[Tensor, "b n d"]:
        device = next(self.transformer.parameters()).device
        return self.transformer(self.tokenize(prompts).to(device))

    encode = forward


class _TransformersText(nn.Module):
    """transformers' CLIPTextModel behind our call: ids → last hidden state."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.model(input_ids=input_ids).last_hidden_state


class _TransformersTokenizer:
    """transformers' CLIPTokenizer behind our call."""

    def __init__(self, tokenizer):
        self.tokenizer, self.end_token = tokenizer, tokenizer.eos_token_id

    def __call__(self, prompts: list[str], max_length: int) -> Tokens:
        options = {"truncation": True, "max_length": max_length, "padding": "max_length", "return_tensors": "pt"}
        ids = self.tokenizer(prompts, **options)["input_ids"]
        whole = self.tokenizer(prompts)["input_ids"]
        lost = [self.tokenizer.decode(w[max_length - 1 : -1]) if len(w) > max_length else "" for w in whole]
        return Tokens(ids, lost)

    def pieces(self, ids: list[int]) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(ids)
