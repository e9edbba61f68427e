"""What a model is told about the picture that it is to draw: captions, classes, a mask, or nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class ClassConfig:
    """What a `ClassEmbedder` is. The defaults are those of CompVis's ImageNet model."""

    n_classes: int = 1001  # the last one stands for "no class": guidance needs it, no picture has it
    embed_dim: int = 512  # width of the context


class ClassEmbedder(nn.Module):
    """Classes → context [b 1 d]: a table, a learned vector for each. CompVis `encoders/modules.py: ClassEmbedder`."""

    def __init__(self, config: ClassConfig = ClassConfig()):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.n_classes, config.embed_dim)

    @property
    def unconditional(self) -> int:
        """The class that stands for none."""
        return self.config.n_classes - 1

    @torch.no_grad()
    def encode(self, classes: Sequence) -> Float[Tensor, "b 1 d"]:
        """Look the classes up.

        Raises:
            ValueError: a class that is no number from 0 to n_classes - 1.
        """
        wrong = [c for c in classes if isinstance(c, str) or not 0 <= int(c) < self.config.n_classes]
        if wrong:
            raise ValueError(f"this model draws classes, numbers from 0 to {self.unconditional}, and not {wrong[0]!r}")
        ids = torch.tensor([int(c) for c in classes], device=self.embedding.weight.device)
        return self.embedding(ids)[:, None]
