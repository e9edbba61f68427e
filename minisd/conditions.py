"""Conditions: what a model knows about the picture to draw. A caption, a class, the rest of the picture, or nothing.

A condition turns prompts into a context [b n d], which the UNet reads by cross-attention, or it makes maps [b c h w],
which are concatenated to the noisy latent as further channels (`DiffusionWrapper`), or both. To add one, write a class
with `@condition("its name")` before it. Its name is then a choice of `minisd train unet --condition`, its `Config` is
written into config.json and read from it, and `txt2img` takes its prompts. `tests/test_training_conditions.py` has an
example, which conditions the model on the main colour of the picture. In training, a batch gets its maps from `maps`.
`txt2img` is given them as `c_concat`.

Rombach et al. 2022 (arXiv:2112.10752), section 3.3; CompVis `ldm/modules/encoders/modules.py`.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .clip import CLIPTextConfig, CLIPTextModel, FrozenCLIPEmbedder, Tokenizer

CONDITIONS: dict[str, type["Condition"]] = {}


def condition(name: str) -> Callable[[type["Condition"]], type["Condition"]]:
    """Register a class in CONDITIONS, where config.json, training and the command line find it."""

    def enter(cls: type["Condition"]) -> type["Condition"]:
        CONDITIONS[name] = cls
        return cls

    return enter


class Condition(nn.Module):
    """What all conditions have. `sd.cond_stage_model` is one of them."""

    Config: type  # a frozen dataclass: the `cond_stage` of a model's configuration. The class is built from it
    unconditional: str | int = ""  # the empty prompt ∅, for guidance and for training with dropped prompts
    frozen = False  # True: it is trained already, so all prompts are encoded once. False: it is trained with the UNet
    needs_captions = False  # True: each picture of the training data needs a caption
    reads_column = False  # True: its prompts come from a column of the data's rows, which can be chosen

    @classmethod
    def fits(cls, config) -> bool:
        """Whether a model of this `LatentDiffusionConfig` has this condition.

        A condition that shares its `Config` with another, as a subclass does, has to look at something else as well.
        """
        return isinstance(config.cond_stage, cls.Config)

    @classmethod
    def build(cls, config, tokenizer: Tokenizer | None) -> "Condition":
        """Build the condition that a `Config` describes. `tokenizer`: that of the model, if it reads text."""
        return cls(config)

    @classmethod
    def configure(cls, config, data, column: str | None = None):
        """The `LatentDiffusionConfig` of a preset, changed so that its model has this condition for these pictures.

        data: the `CaptionedPictures` that it will be trained on. column: the column of their rows to condition on, if
        there is a choice (`reads_column`).
        """
        return config

    @staticmethod
    def concat_channels(config) -> int:
        """How many channels `maps` has."""
        return 0

    def prompts(self, data) -> list[list[str | int]]:
        """The prompts of each picture of the data: one, or several forms of one. Every picture has the same number."""
        raise NotImplementedError

    def encode(self, prompts: Sequence[str | int]) -> Float[Tensor, "b n d"] | None:
        """Prompts → context; None for a UNet without cross-attention."""
        raise NotImplementedError

    def maps(self, sd, data, batch) -> Float[Tensor, "b c h w"] | None:
        """The channels to add to the latents of a training batch (`batch.indices`, `batch.generators`), or None."""
        return None


def condition_of(config) -> type[Condition]:
    """The condition that a model of this `LatentDiffusionConfig` has; if several fit, the one registered last."""
    for cls in reversed(CONDITIONS.values()):
        if cls.fits(config):
            return cls
    raise TypeError(f"no condition has {type(config.cond_stage).__name__} as its Config: {', '.join(CONDITIONS)}")


@condition("captions")
class Captions(FrozenCLIPEmbedder, Condition):
    """Captions, read by CLIP's text encoder: Stable Diffusion. The context has a vector for each token."""

    Config, frozen, needs_captions = CLIPTextConfig, True, True
    recorded_as = "FrozenCLIPEmbedder"  # in the folders of training runs

    @classmethod
    def build(cls, config: CLIPTextConfig, tokenizer: Tokenizer | None) -> "Captions":
        if tokenizer is None:
            raise ValueError("a model that reads prompts needs a tokenizer: for SD v1, BPETokenizer.clip()")
        return cls(CLIPTextModel(config), tokenizer, config.max_length)

    def prompts(self, data) -> list[list[str]]:
        return data.wordings


@condition("inpainting")
class Inpainting(Captions):
    """Captions by cross-attention, and by concatenation the mask and the picture with a hole: SD v1 for inpainting."""

    @classmethod
    def fits(cls, config) -> bool:
        return super().fits(config) and config.concat_channels == cls.concat_channels(config)

    @classmethod
    def configure(cls, config, data, column: str | None = None):
        channels = config.first_stage.embed_dim + cls.concat_channels(config)
        return replace(config, unet=replace(config.unet, in_channels=channels))

    @staticmethod
    def concat_channels(config) -> int:
        return 1 + config.first_stage.embed_dim  # five: the mask, and a latent of four channels

    def maps(self, sd, data, batch) -> Float[Tensor, "b c h w"]:
        pictures = data.batch(batch.indices).to(sd.device)
        masks = random_masks(batch.generators, data.size).to(sd.device)
        return sd.masked_picture(pictures, masks, batch.generators)


def random_masks(generators: Sequence[torch.Generator], size: int) -> Float[Tensor, "b 1 size size"]:
    """A mask for each generator: 1 in a random rectangle, where the model is to draw. One mask in four is 1 everywhere.

    From masks that are 1 everywhere, the model also learns to draw without a given picture. (One in four: the model
    card of Stable Diffusion v1.5 for inpainting.)
    """
    masks = torch.zeros(len(generators), 1, size, size, dtype=torch.float32, device="cpu")
    for mask, generator in zip(masks[:, 0], generators, strict=True):
        everything = torch.rand((), generator=generator, dtype=torch.float32, device="cpu") < 0.25
        sides = torch.randint(max(1, size // 4), size + 1, (2,), generator=generator, device="cpu")
        # The rectangle lies inside the mask.
        places = (torch.rand(2, generator=generator, dtype=torch.float32, device="cpu") * (size + 1 - sides)).long()
        (top, left), (height, width) = places.tolist(), sides.tolist()
        mask[top : top + height, left : left + width] = 1
        if everything:
            mask.fill_(1)
    return masks


@dataclass(frozen=True)
class ClassConfig:
    """The sizes and names of a `ClassEmbedder`. The defaults are those of CompVis's ImageNet model."""

    n_classes: int = 1001  # the last one stands for "no class", which guidance needs and no picture has
    embed_dim: int = 512  # width of the context
    names: tuple[str, ...] = ()  # of the classes, except for "no class"; empty if they only have numbers
    column: str = "folder"  # the column of the training data's rows that holds the class


@condition("classes")
class ClassEmbedder(Condition):
    """Classes → context [b 1 d]: a table, a learned vector for each. CompVis `encoders/modules.py: ClassEmbedder`."""

    Config, reads_column = ClassConfig, True

    def __init__(self, config: ClassConfig = ClassConfig()):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.n_classes, config.embed_dim)
        self.numbers = {name: number for number, name in enumerate(config.names)}

    @property
    def unconditional(self) -> int:
        """The number of "no class"."""
        return self.config.n_classes - 1

    @classmethod
    def configure(cls, config, data, column: str | None = None):
        column = column or "folder"
        names = tuple(sorted({str(entry) for entry in data.column(column)}))
        classes = ClassConfig(len(names) + 1, config.unet.context_dim, names, column)
        return replace(config, cond_stage=classes)

    def prompts(self, data) -> list[list[str | int]]:
        return [[str(entry)] for entry in data.column(self.config.column)]

    def encode(self, classes: Sequence[str | int]) -> Float[Tensor, "b 1 d"]:
        """Look the classes up, by their names or their numbers.

        Raises:
            ValueError: there is no such class.
        """
        ids = torch.tensor([self.number(c) for c in classes], device=self.embedding.weight.device)
        return self.embedding(ids)[:, None]

    def number(self, wanted: str | int) -> int:
        """The number of a class; that of "no class" for the empty prompt."""
        if wanted == "":
            return self.unconditional
        if wanted in self.numbers:
            return self.numbers[wanted]
        if str(wanted).isdecimal() and int(wanted) < self.config.n_classes:
            return int(wanted)
        if not self.numbers:
            raise ValueError(f"the classes of this model are numbers from 0 to {self.unconditional}, not {wanted!r}")
        some = difflib.get_close_matches(str(wanted), self.numbers, 3) or list(self.numbers)[:5]
        raise ValueError(f"{wanted!r} is none of this model's {len(self.numbers)} classes, such as {', '.join(some)}")


@condition("none")
class Nothing(Condition):
    """No condition: the model draws anything like its training pictures, and its UNet has no cross-attention."""

    Config = type(None)

    def __init__(self, config: None = None):
        super().__init__()

    @classmethod
    def configure(cls, config, data, column: str | None = None):
        unet = replace(config.unet, context_dim=None, use_spatial_transformer=False)
        return replace(config, cond_stage=None, unet=unet)

    def prompts(self, data) -> list[list[str]]:
        return [[""]] * len(data)

    def encode(self, prompts: Sequence[str | None]) -> None:
        for prompt in prompts:
            if prompt not in ("", None):
                raise ValueError(f'this model has no condition: its prompt must be "" or None, not {prompt!r}')
