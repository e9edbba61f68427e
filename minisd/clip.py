"""CLIP: two transformers, one for text and one for pictures, that learn to agree.

Each turns its input into one vector. Training pulls the vectors of a picture and of its caption together, and pushes
all others apart, so that the text tower learns how the things that a text names look. Stable Diffusion keeps the text
tower, and uses the whole sequence of its hidden states [b n d] instead of the one vector, so that the UNet can look at
every word.

    "a red fox" ─► tokens [b n] ─► CLIPTextTransformer ─► last hidden state [b n d]   (the context)
                                                     └──► state at the end token ─► text_projection ──► ┐
    picture [b 3 H W] ─► patches ─► CLIPVisionTransformer ─► class token ─► visual_projection ────────► ┴ similarity

In this order: the transformer that both towers are made of; the text tower; FrozenCLIPEmbedder, which is all that
Stable Diffusion needs to draw; then the image tower, and both towers as they are trained.

Source: Radford et al. 2021 (arXiv:2103.00020); CompVis `ldm/modules/encoders/modules.py: FrozenCLIPEmbedder`. The
parameters are named as in transformers' `CLIPModel`, which is what Stable Diffusion's checkpoints hold.
"""

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from .attention import attention
from .tokenizer import END, START, BPETokenizer, Tokenizer, Tokens  # noqa: F401 (can be imported from here, too)


@dataclass(frozen=True)
class CLIPTextConfig:
    """The architecture of a text tower. The defaults are CLIP ViT-L/14's, as in Stable Diffusion v1 (123 million)."""

    vocab_size: int = 49408  # pieces that the tokenizer knows
    max_length: int = 77  # tokens in a context; longer prompts are cut
    width: int = 768  # channels of the hidden states, and so the UNet's context_dim
    layers: int = 12
    heads: int = 12
    projection_dim: int = 768  # dimensions of the space shared with pictures


@dataclass(frozen=True)
class CLIPVisionConfig:
    """The architecture of an image tower. The defaults are CLIP ViT-L/14's (304 million parameters)."""

    image_size: int = 224  # pixels along each side
    patch_size: int = 14  # pixels along each side of the square that becomes a token
    width: int = 1024
    layers: int = 24
    heads: int = 16
    projection_dim: int = 768


# --- the transformer that both towers are made of ---------------------------------------------------------------------


class CLIPAttention(nn.Module):
    """Self-attention, with a bias at each of the four projections.

    Args:
        width: channels of a token.
        heads: each has width / heads channels.
        causal: a token sees only itself and those before it.
    """

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"{width} channels can't be divided among {heads} heads")
        self.heads, self.causal = heads, causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        # Each head compares tokens by its own part of the channels, so that different heads can follow different
        # relations between the words: [b n d] -> [b heads n d/heads].
        q, k, v = (
            rearrange(f(x), "b n (h d) -> b h n d", h=self.heads) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        # softmax(q kᵀ / √d) v in each head (Vaswani et al. 2017, arXiv:1706.03762, eq. 1). The heads are joined again,
        # and out_proj mixes them.
        return self.out_proj(rearrange(attention(q, k, v, causal=self.causal), "b h n d -> b n (h d)"))


class CLIPMLP(nn.Module):
    """What a layer computes for each token by itself: widen by four, activate, and narrow again."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        h = self.fc1(x)  # [b n d] -> [b n 4d]
        # Quick-GELU, OpenAI's cheap approximation of the GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2).
        # The weights were trained with it: with the exact GELU, the context would differ a little in every layer.
        return self.fc2(h * torch.sigmoid(1.702 * h))


class CLIPEncoderLayer(nn.Module):
    """Attention, then the MLP, each added to the hidden states."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.self_attn = CLIPAttention(width, heads, causal)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = CLIPMLP(width)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        # Pre-norm: only the branch is normalised, and x itself, the residual stream, runs through all layers and is
        # only added to. This makes deep transformers easier to train (Xiong et al. 2020, arXiv:2002.04745).
        x = x + self.self_attn(self.layer_norm1(x))  # tokens exchange information
        return x + self.mlp(self.layer_norm2(x))  # each token works on what it has gathered


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
        # Attention compares tokens wherever they stand. The vector for the place lets it tell "a cat on a mat" from
        # "a mat on a cat".
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.token_embedding(input_ids) + self.position_embedding(positions)  # [b n] -> [b n d]


class CLIPTextTransformer(nn.Module):
    """Ids of tokens → last hidden state, after the final norm: what Stable Diffusion calls the context."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(config)
        # The mask of a language model, which OpenAI chose so that the tower could start from one (section 2.4). With
        # it, a token does not see those after it, and the end token is the first that has seen the whole sentence.
        self.encoder = CLIPEncoder(config.width, config.heads, config.layers, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        # With pre-norm, every layer adds to the residual stream and none rescales it. The final norm does, once.
        return self.final_layer_norm(self.encoder(self.embeddings(input_ids)))


class CLIPTextModel(nn.Module):
    """The text tower under the name that the checkpoint gives it: `transformer.text_model.…`."""

    def __init__(self, config: CLIPTextConfig = CLIPTextConfig()):
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)

    def forward(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.text_model(input_ids)


# --- what Stable Diffusion reads prompts with -------------------------------------------------------------------------


class FrozenCLIPEmbedder(nn.Module):
    """Prompts → context [b n d], by a tokenizer and a text tower that is not trained further.

    This is Stable Diffusion's `cond_stage_model`. CompVis `encoders/modules.py: FrozenCLIPEmbedder`.

    Args:
        transformer: the text tower, ids [b n] → last hidden state [b n d].
        tokenizer: what turns prompts into ids.
        max_length: n, the tokens in a context.
    """

    unconditional = ""  # the prompt that stands for "any picture" in classifier-free guidance

    def __init__(self, transformer: nn.Module, tokenizer: Tokenizer, max_length: int = 77):
        super().__init__()
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.freeze()

    @classmethod
    def from_transformers(cls, folder: str, max_length: int = 77) -> "FrozenCLIPEmbedder":
        """The same with the classes of Hugging Face, as in CompVis. `folder` may also be the id of a repository."""
        import transformers

        text_model = transformers.CLIPTextModel.from_pretrained(folder)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        return cls(_TransformersText(text_model), _TransformersTokenizer(tokenizer), max_length)

    def freeze(self) -> None:
        """Switch dropout and gradients off.

        The tower learned from far more captions than the UNet sees, and training it on those would make it forget.
        """
        self.eval().requires_grad_(False)

    def tokenize(self, prompts: list[str]) -> Int[Tensor, "b n"]:
        """Prompts → ids. If a prompt is longer than the context, a warning says what was cut off."""
        tokens = self.tokenizer(prompts, self.max_length)
        for prompt, lost in zip(prompts, tokens.lost, strict=True):
            if lost:
                warnings.warn(
                    f"the prompt is longer than {self.max_length} tokens; cut off: {lost!r} (of {prompt!r})",
                    stacklevel=2,
                )
        return tokens.ids

    def forward(self, prompts: list[str]) -> Float[Tensor, "b n d"]:
        """Prompts → context: the states of all tokens, those of the padding included."""
        # There is no mask for the padding. Stable Diffusion was trained without one, and its UNet uses those places,
        # too: after the end token, every state describes the whole sentence.
        device = next(self.transformer.parameters()).device
        return self.transformer(self.tokenize(prompts).to(device))  # [b n] -> [b n d]

    encode = forward


class _TransformersText(nn.Module):
    """transformers' CLIPTextModel, called as ours is: ids → last hidden state."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.model(input_ids=input_ids).last_hidden_state


class _TransformersTokenizer:
    """transformers' CLIPTokenizer, called as ours is: see `Tokenizer`."""

    def __init__(self, tokenizer):
        self.tokenizer, self.end_token = tokenizer, tokenizer.eos_token_id

    def __call__(self, prompts: list[str], max_length: int) -> Tokens:
        options = {"truncation": True, "max_length": max_length, "padding": "max_length", "return_tensors": "pt"}
        ids = self.tokenizer(prompts, **options)["input_ids"]
        # transformers does not say what it cuts off, so a second pass without a limit finds what was lost.
        uncut = self.tokenizer(prompts)["input_ids"]
        lost = [self.tokenizer.decode(row[max_length - 1 : -1]) if len(row) > max_length else "" for row in uncut]
        return Tokens(ids, lost)

    def pieces(self, ids: list[int]) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(ids)


# --- the image tower --------------------------------------------------------------------------------------------------


class CLIPVisionEmbeddings(nn.Module):
    """Cut the picture into patches, one token each, after a class token that gathers information from all of them.

    Dosovitskiy et al. 2020 (arXiv:2010.11929), eq. 1.
    """

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(config.width) * config.width**-0.5)
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        patches = (config.image_size // config.patch_size) ** 2
        self.position_embedding = nn.Embedding(patches + 1, config.width)

    def forward(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b n d"]:
        # A convolution whose stride is its size maps each patch on its own, as a linear layer would do with its pixels.
        # In ViT-L/14: [b 3 224 224] -> [b 1024 16 16] -> [b 256 1024].
        patches = rearrange(self.patch_embedding(pixels), "b d h w -> b (h w) d")
        # The class token starts the same for every picture. Attention then adds information from the patches to it.
        class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        tokens = torch.cat([class_token, patches], dim=1)  # [b 256 1024] -> [b 257 1024]
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
        # The norm before the first layer is CLIP's own addition to the vision transformer (section 2.4).
        tokens = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        # Only the class token is used, so the patches of the last layer have no training signal of their own.
        return self.post_layernorm(tokens[:, 0])  # [b n d] -> [b d]


# --- both together, as they are trained -------------------------------------------------------------------------------


class CLIPModel(nn.Module):
    """The two towers and the space that they share.

    Args:
        text, vision: the architectures, with the same projection_dim.
        end_token: the id that closes a sentence.

    Raises:
        ValueError: projection dimensions that differ.
    """

    def __init__(self, text: CLIPTextConfig, vision: CLIPVisionConfig, end_token: int):
        super().__init__()
        if text.projection_dim != vision.projection_dim:
            raise ValueError(f"the two towers must share one space: {text.projection_dim} != {vision.projection_dim}")
        self.text_config, self.vision_config, self.end_token = text, vision, end_token
        self.text_model = CLIPTextTransformer(text)
        self.vision_model = CLIPVisionTransformer(vision)
        # In ViT-L/14, the text tower ends in vectors of 768 numbers and the image tower in vectors of 1024. Two linear
        # maps without bias bring both to one space of 768, where a cosine compares a picture with a sentence.
        self.text_projection = nn.Linear(text.width, text.projection_dim, bias=False)
        self.visual_projection = nn.Linear(vision.width, vision.projection_dim, bias=False)
        # The temperature τ = 0.07 to begin with, learned as log(1/τ), which keeps it positive (section 2.5).
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        # PyTorch would draw the embeddings of tokens from N(0, 1), and beside these, what a new layer adds would hardly
        # count. OpenAI's are 50 times smaller.
        initialise(self)

    def get_text_features(self, input_ids: Int[Tensor, "b n"]) -> Float[Tensor, "b p"]:
        """Ids of sentences, padded by end tokens → unit vectors."""
        hidden = self.text_model(input_ids)  # [b n] -> [b n d]
        # The sentence is read at its end token, the first that has seen all of it (section 2.4). argmax finds the first
        # end token; the others are padding.
        end = (input_ids == self.end_token).int().argmax(dim=1)
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), end]  # [b n d] -> [b d]
        return F.normalize(self.text_projection(pooled), dim=-1)  # [b d] -> [b p]

    def get_image_features(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b p"]:
        """Pictures in [-1, 1], of the config's image_size → unit vectors."""
        return F.normalize(self.visual_projection(self.vision_model(pixels)), dim=-1)  # [b 3 H W] -> [b d] -> [b p]

    def forward(self, input_ids: Int[Tensor, "b n"], pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b b"]:
        """Logits of all pairs: row i says how well picture i fits each of the captions."""
        # The product of unit vectors is their cosine, in [-1, 1]: too small a range for a softmax to become
        # confident. The scale 1/τ widens it, up to 100, because training is unstable beyond that (section 2.5).
        scale = self.logit_scale.exp().clamp(max=100.0)
        return scale * self.get_image_features(pixels) @ self.get_text_features(input_ids).T


def contrastive_loss(logits: Float[Tensor, "b b"]) -> Float[Tensor, ""]:
    """Which caption belongs to which picture, and the other way round (Radford et al., figure 3).

    A model that guesses at random has a loss of ln b, and a perfect one of 0.
    """
    # Picture i was given with caption i, so the right answers are on the diagonal. A row is a classification of one
    # picture among all captions of the batch, a column one of a caption among all pictures.
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def initialise(clip: CLIPModel) -> None:
    """Fill the towers with OpenAI's initial weights (`clip/model.py: initialize_parameters`)."""
    text, vision = clip.text_model, clip.vision_model
    nn.init.normal_(text.embeddings.position_embedding.weight, std=0.01)
    nn.init.normal_(text.embeddings.token_embedding.weight, std=0.02)
    _initialise_layers(text.encoder, clip.text_config.width)
    nn.init.normal_(vision.embeddings.position_embedding.weight, std=clip.vision_config.width**-0.5)
    _initialise_layers(vision.encoder, clip.vision_config.width)


def _initialise_layers(encoder: CLIPEncoder, width: int) -> None:
    for layer in encoder.layers:
        # A sum of d products has a variance d times as large, so a weight's variance is 1/d. Outputs then have the size
        # of inputs. fc1 has half of that variance.
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            nn.init.normal_(projection.weight, std=width**-0.5)
        nn.init.normal_(layer.mlp.fc1.weight, std=(2 * width) ** -0.5)
        # Each layer adds twice to the residual stream. Dividing by √(2 · layers) keeps the sum of all at its size
        # (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3).
        for projection in (layer.self_attn.out_proj, layer.mlp.fc2):
            nn.init.normal_(projection.weight, std=width**-0.5 * (2 * len(encoder.layers)) ** -0.5)
