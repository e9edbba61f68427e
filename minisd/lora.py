"""Stage 13: teach a model something new with few numbers. LoRA and textual inversion.

    y = W x + b + s (α/r) B A x        A [r, in], B [out, r], and r much smaller than both           (LoRA, eq. 3)

Fine-tuning changes all weights of the UNet, and gives a new model as large as the old one. LoRA assumes that the change
of each matrix W has a low rank r, so that it can be written as the product of a tall and a flat matrix. W stays as it
is, and only A and B are trained. In the model that ships at 32×32, with r = 4, they have 49,152 numbers, and the UNet
has 8.9 million. They are saved in a file of their own. It can be added to a model at any strength s, and taken off.

Textual inversion changes even less: all weights stay as they are, and the text encoder gets one new word. Only the
vector of this word in the table of tokens is trained, so that the model draws the new thing when it reads the word. The
model itself does not change, so this finds only what it can draw already.

    lora = load_lora(sd, "runs/finetuned/lora", strength=0.8)     # a file or a folder of minisd, diffusers or peft
    load_token(sd, "runs/finetuned/token")                        # now a prompt can contain the new word

Both are an `Adapter`: a module that stands in the UNet's place during training, and has only the new parameters. So
`training.train_unet` trains it as it trains a UNet. The strength s is not in the paper. In diffusers it is the weight
of an adapter. The papers that the comments cite:

    LoRA                Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv:2106.09685)
    Textual inversion   Gal et al., "An Image is Worth One Word: Personalizing …", 2022 (arXiv:2208.01618)
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from .checkpoint.diffusers import unet_names
from .checkpoint.files import cast, read_json, read_weights, refused_as, write_weights
from .clip import FrozenCLIPEmbedder
from .latent_diffusion import LatentDiffusion
from .noising import Seed, randn, seeded
from .tokenizer import BPETokenizer
from .unet import UNetModel

# The four projections of each attention. The paper changes only these (LoRA, section 4.2). In its table 5, changing all
# four is as good as changing some of them with the same number of parameters, or better.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LORA_FILE, PEFT_FILE, TOKEN_FILE = (
    "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "learned_embeds.safetensors"
)  # fmt: skip


class Adapter(nn.Module):
    """New parameters that are trained while the model's own stay as they are. It is called like the UNet.

    A subclass has these parameters, puts them into effect in the UNet, such as by forward hooks, and has a method
    `save(path)`, which writes them to a file.
    """

    file_name: str  # of what it saves, in the folder of a run

    def __init__(self, unet: nn.Module):
        super().__init__()
        # In a tuple, PyTorch does not see the UNet. So its weights are no parameters of this module: the optimiser, the
        # EMA and the checkpoints hold only the few new ones.
        self._unet = (unet,)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        return self._unet[0](x, t, context)

    def reads(self, prompt: str) -> bool:
        """Whether it is in effect for a prompt."""
        return True


# -- LoRA -----------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A change of one linear layer, (α/r) B A.

    scale: α/r. With α fixed, less has to be tuned anew when another rank is chosen (LoRA, section 4.1).
    """

    def __init__(self, A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], scale: float = 1.0):
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(A), nn.Parameter(B), scale

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        # Down to r numbers and up again, [b n] -> [b r] -> [b m]. The matrix B A itself is not needed for this.
        return self.scale * F.linear(F.linear(x, self.A), self.B)


class LoRA(Adapter):
    """Low-rank changes of some linear layers of a UNet, by the names of the layers. They are in effect at once.

    strength: s, the factor for all changes. 0 is the model as it was. It can be set at any time, except while the
        changes are merged.
    """

    file_name = LORA_FILE

    def __init__(self, unet: nn.Module, changes: Mapping[str, LowRank], strength: float = 1.0):
        super().__init__(unet)
        self.strength, self.merged = strength, False
        # A module's name must not contain dots, which those of the layers do.
        self.changes = nn.ModuleDict({name.replace(".", "/"): change for name, change in changes.items()})
        # y = W x + b is followed by this hook, which adds s (α/r) B A x. The layer and its name do not change.
        self._hooks = [
            layer.register_forward_hook(lambda _, args, y, change=change: self._changed(args[0], y, change))
            for _, layer, change in self.layers()
        ]

    @classmethod
    def new(
        cls, sd: LatentDiffusion, rank: int = 4, alpha: float | None = None, targets: tuple[str, ...] = TARGETS,
        seed: Seed = 0,
    ) -> "LoRA":  # fmt: skip
        """A LoRA to be trained. alpha: by default the rank, so that α/r is 1. targets: how the layers' names end."""
        unet, generator, changes = sd.model.diffusion_model, seeded(seed), {}
        if rank < 1:
            raise ValueError(f"the rank must be at least 1, but it is {rank}")
        for name, layer in linear_layers(unet).items():
            if name.endswith(targets):
                # A is random and B is 0, so B A = 0, and training starts from the model as it is (LoRA, section 4.1).
                # If both were 0, both gradients would be 0 as well, and nothing would be learned.
                A = randn((rank, layer.in_features), generator) * layer.in_features**-0.5
                B = torch.zeros(layer.out_features, rank)
                changes[name] = LowRank(A, B, (rank if alpha is None else alpha) / rank).to(layer.weight)
        if not changes:
            raise ValueError(f"this model's UNet has no linear layers named {', '.join(targets)}, which a LoRA changes")
        return cls(unet, changes)

    def layers(self) -> list[tuple[str, nn.Linear, LowRank]]:
        """The name of each layer, the layer, and its change."""
        names = {key: key.replace("/", ".") for key in self.changes}
        return [(n, self._unet[0].get_submodule(n), self.changes[key]) for key, n in names.items()]

    def _changed(self, x: Tensor, y: Tensor, change: LowRank) -> Tensor:
        # If the changes are merged, W has them already.
        return y if self.merged else y + self.strength * change(x).to(y)

    @torch.no_grad()
    def merge(self, merged: bool = True) -> None:
        """Add the changes to the weights, W ← W + s (α/r) B A. `minisd.save` then saves them with the model."""
        # The sign is 1 to add, -1 to subtract, and 0 if nothing is left to do. So a second call changes nothing.
        sign = merged - self.merged
        for _, layer, change in self.layers():
            layer.weight += sign * self.strength * change.scale * change.B @ change.A
        self.merged = merged

    def unmerge(self) -> None:
        """Subtract them again, which leaves the weights as they were, except for rounding."""
        self.merge(False)

    def remove(self) -> None:
        """Take the changes off the model."""
        self.unmerge()
        for hook in self._hooks:
            hook.remove()

    def save(self, path: str | Path) -> None:
        """Write a file in diffusers' layout, in float16: `StableDiffusionPipeline.load_lora_weights` reads it.

        The tensors of this layout do not include α, and a reader that finds no α takes α = r. So B is written with the
        factor α/r in it.
        """
        theirs, state = diffusers_names(self._unet[0]), {}
        for name, _, change in self.layers():
            state[f"unet.{theirs[name]}.lora_A.weight"] = change.A
            state[f"unet.{theirs[name]}.lora_B.weight"] = change.scale * change.B
        write_weights(cast(state, torch.float16), path)


def linear_layers(unet: UNetModel) -> dict[str, nn.Linear]:
    """The linear layers of a UNet by their names in the checkpoint."""
    return {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear)}


def diffusers_names(unet: UNetModel) -> dict[str, str]:
    """{our name: diffusers' name} of each linear layer."""
    names = unet_names(unet)
    return {layer: names[f"{layer}.weight"].removesuffix(".weight") for layer in linear_layers(unet)}


def load_lora(sd: LatentDiffusion, path: str | Path, strength: float = 1.0) -> LoRA:
    """Add a LoRA to a model: a file in diffusers' or peft's layout, or a folder with one.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is no LoRA for linear layers of this model's UNet.
    """
    file = _file_in(Path(path), LORA_FILE, PEFT_FILE)
    # First, sort the tensors by layer: {our name: {"A": [r n], "B": [m r]}}.
    layers, parts = linear_layers(sd.model.diffusion_model), {}
    ours = {theirs: name for name, theirs in diffusers_names(sd.model.diffusion_model).items()}
    for key, tensor in read_weights(file).items():
        # "unet.….attn1.to_q.lora_A.weight" in diffusers; "base_model.model.….attn1.to_q.lora_A.weight" in peft
        layer, _, part = key.removeprefix("base_model.model.").removeprefix("unet.").rpartition(".lora_")
        if layer not in ours or part not in ("A.weight", "B.weight"):
            raise ValueError(f"{file} has {key}, which is no lora_A or lora_B of a linear layer of this model's UNet")
        parts.setdefault(ours[layer], {})[part[0]] = tensor.to(layers[ours[layer]].weight)
    # Then check each pair, because a matrix of another width would only fail in the middle of a drawing.
    alpha, changes = _alpha(file), {}
    for name, given in parts.items():
        out, into = layers[name].weight.shape
        shapes = [list(given[part].shape) for part in ("A", "B") if part in given]
        rank = shapes[0][0] if shapes[0] else 0
        if rank == 0 or shapes != [[rank, into], [out, rank]]:
            raise ValueError(f"{file} does not fit this model: {name} takes A [r {into}] and B [{out} r], not {shapes}")
        changes[name] = LowRank(given["A"], given["B"], (rank if alpha is None else alpha) / rank)
    if not changes:
        raise ValueError(f"{file} is empty: there is no LoRA in it")
    return LoRA(sd.model.diffusion_model, changes, strength).requires_grad_(False)


def _alpha(file: Path) -> float | None:
    """α of a LoRA, which is not among its tensors. None if it is not given, which means that it is the rank.

    peft writes it to a file next to the tensors, and diffusers to the metadata of the safetensors file.
    """
    beside, settings = file.with_name("adapter_config.json"), {}
    with refused_as(f"{file} does not say how its LoRA was made in a form that can be read"):
        if file.name == PEFT_FILE and beside.is_file():
            settings = read_json(beside)
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                written = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
            settings = {key.removeprefix("unet."): value for key, value in written.items()}
        alpha = settings.get("lora_alpha")
        alpha = None if alpha is None else float(alpha)
    # With these settings, tensors of the same names mean something else. The drawing would be wrong without a warning.
    for other in ("use_rslora", "use_dora", "alpha_pattern"):
        if settings.get(other):
            raise ValueError(f"{file} was made with {other}, which minisd does not know: only plain LoRA can be read")
    return alpha


def _file_in(path: Path, *names: str) -> Path:
    return next((path / name for name in names if (path / name).is_file()), path)


# -- textual inversion ----------------------------------------------------------------------------------------


def _table(sd: LatentDiffusion) -> nn.Embedding:
    """The table of the text encoder, a vector for each token."""
    embedder = sd.cond_stage_model
    if not isinstance(embedder, FrozenCLIPEmbedder) or not isinstance(embedder.tokenizer, BPETokenizer):
        raise ValueError("this model has no text encoder of minisd's, so it can't learn a new word")
    return embedder.transformer.text_model.embeddings.token_embedding


def add_token(sd: LatentDiffusion, word: str, vector: Float[Tensor, "d"]) -> int:
    """Give a model a new word, such as "<toy>", which stays whole wherever it stands in a prompt. Returns its id."""
    table, embedder = _table(sd), sd.cond_stage_model
    old, count = embedder.tokenizer, len(table.weight)
    if vector.shape != table.weight.shape[1:]:
        raise ValueError(f"this model's words are vectors [{table.weight.shape[1]}], and not {list(vector.shape)}")
    if word in old.vocab or f"{word}</w>" in old.vocab or word != "".join(word.lower().split()) or not word:
        raise ValueError(f"{word!r} can't be a new word: take one in small letters that is no token yet, as <{word}>")
    # The table gets one more row, and the tokenizer a word with the number of that row. `minisd.save` saves both.
    embedder.tokenizer = BPETokenizer(old.vocab, old.merges, old.pad, old.added | {word: count})
    grown = torch.cat([table.weight.data, vector[None].to(table.weight)])
    embedder.transformer.text_model.embeddings.token_embedding = nn.Embedding.from_pretrained(grown)
    embedder.transformer.config = replace(embedder.transformer.config, vocab_size=count + 1)
    sd.config = replace(sd.config, cond_stage=embedder.transformer.config)
    return count


class NewToken(Adapter):
    """A word to be trained: v* = argmin_v E ‖ε - ε_θ(z_t, t, c(v))‖². All else is fixed (Textual inversion, eq. 2).

    like: words that the model knows and that describe the new thing roughly. Training starts from the mean of their
        vectors. (The paper takes one word.)
    """

    file_name = TOKEN_FILE

    def __init__(self, sd: LatentDiffusion, word: str, like: str):
        super().__init__(sd.model.diffusion_model)
        ids = sd.cond_stage_model.tokenize([like])[0].tolist()
        ids = ids[1 : ids.index(sd.cond_stage_model.tokenizer.end_token)]  # between the start and the end token
        if not ids:
            raise ValueError("like must be words that the model knows, and describe the new thing, but it is empty")
        vector = _table(sd).weight[ids].mean(0)
        self.word, number = word, add_token(sd, word, vector)
        self.vector = nn.Parameter(vector.detach().clone())
        # For the new id, the look-up gives the vector that is trained, and for all others the row of the table.
        self._hook = _table(sd).register_forward_hook(
            lambda _, args, rows: torch.where((args[0] == number)[..., None], self.vector, rows)
        )
        # The prompts have to be encoded anew in each step, because their context depends on the vector.
        sd.cond_stage_model.frozen = False

    def reads(self, prompt: str) -> bool:
        return self.word in prompt.lower()

    def save(self, path: str | Path) -> None:
        """Write the vector under its word: `StableDiffusionPipeline.load_textual_inversion` reads it."""
        write_weights({self.word: self.vector}, path)


def load_token(sd: LatentDiffusion, path: str | Path) -> str:
    """Give a model the word of a file of textual inversion, or of a folder with one. Returns the word."""
    file = _file_in(Path(path), TOKEN_FILE)
    words = read_weights(file)
    if len(words) != 1:
        raise ValueError(f"{file} holds {len(words)} tensors, and a file of textual inversion has one: word and vector")
    (word, vector), = words.items()  # fmt: skip
    add_token(sd, word, vector.squeeze(0) if vector.ndim == 2 else vector)
    return word
