"""Training CLIP: which caption belongs to which picture?

First the tokenizer learns its pieces of words from the captions. Then both towers learn to agree on 256 pictures and
their captions at a time (Radford et al. 2021, arXiv:2103.00020, figure 3). Stable Diffusion took its text tower from
OpenAI, who trained it on 400 million pairs. Here it is trained on the pictures at hand. The image tower, which Stable
Diffusion does not need, is kept for evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from ..checkpoint import save_clip
from ..clip import BPETokenizer, CLIPModel, CLIPTextConfig, CLIPVisionConfig, contrastive_loss
from ..data import CaptionedPictures
from .engine import Engine, gather_with_grad
from .trainer import Recipe, Trainer


@dataclass(frozen=True)
class CLIPRecipe(Recipe):
    """How CLIP is trained."""

    batch_size: int = 256  # each picture is told apart from 255 others
    lr: float = 1e-3  # learning rate after the warm-up
    weight_decay: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.accumulate != 1:
            raise ValueError(
                "CLIP tells each picture apart from all others of its batch, so the batch can't be cut into parts: "
                f"leave accumulate at 1 (not {self.accumulate}), and take a smaller batch_size or more processes"
            )


class CLIPOverProcesses(CLIPModel):
    """CLIP whose features are those of all processes, so that every process has the logits of the whole batch."""

    def get_text_features(self, input_ids: Tensor) -> Tensor:
        return gather_with_grad(super().get_text_features(input_ids))

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return gather_with_grad(super().get_image_features(pixels))


def train_clip(
    text: CLIPTextConfig,
    vision: CLIPVisionConfig,
    recipe: CLIPRecipe,
    data: CaptionedPictures,
    folder: str | Path,
    engine: Engine,
) -> tuple[CLIPModel, BPETokenizer]:
    """Train tokenizer and both towers; leaves `clip.safetensors`, `clip.json` and `tokenizer/` in the folder.

    Returns the towers with their EMA weights, and the tokenizer. If the folder holds a checkpoint, the run goes on from
    there.

    Raises:
        ValueError: pictures of another size than the image tower's, or fewer than a batch.
    """
    if data.size != vision.image_size:
        raise ValueError(
            f"the image tower sees {vision.image_size}x{vision.image_size} pixels, and the pictures are {data.size}x"
            f"{data.size}: open them with size={vision.image_size}"
        )
    if recipe.batch_size > len(data):
        raise ValueError(
            f"CLIP tells each picture of a batch apart from all others, and a batch of {recipe.batch_size} would hold "
            f"some of the {len(data)} pictures twice: take a batch_size of at most {len(data)}"
        )
    torch.manual_seed(recipe.seed)  # the initial weights

    # A caption is "red fox, noto style", but people will write "a red fox". Both towers and the UNet see every caption
    # in all the forms that the data give (`templates`), and the tokenizer learns its merges from all of them.
    tokenizer = BPETokenizer.train([form.format(c) for c in data.captions for form in data.templates], text.vocab_size)
    tokens = tokenize_templates(tokenizer, data.captions, data.templates, text.max_length)  # [n forms max_length]
    towers = CLIPOverProcesses(text, vision, tokenizer.end_token)
    given = {"data": data.fingerprint, "templates": str(data.templates)}
    trainer = Trainer(towers, recipe, folder, engine, given=given, describe=data.describe)
    for _ in trainer.steps():
        for batch in trainer.batches(len(data)):
            form = batch.randint(len(data.templates))  # for each caption, the form in which it is read this time
            with engine.autocast():
                ids, pixels = tokens[batch.indices, form], data.batch(batch.indices)  # [b max_length], [b 3 H W]
                # Entry (i, j) says how well picture i fits caption j: a learned scale times the cosine of their
                # features. [B B], where B is the batch of all processes, since all pictures meet all captions.
                logits = trainer.model(ids.to(engine.device), pixels.to(engine.device))
            # The right answers are on the diagonal: the largest entry of row i should be the one of caption i.
            right = (logits.argmax(dim=1) == torch.arange(len(logits), device=logits.device)).float().mean()
            # The mean of two cross-entropies: which caption belongs to this picture, and which picture to this caption?
            trainer.backward(contrastive_loss(logits.float()), accuracy=right)
        trainer.update()

    with trainer.finishing():
        clip = CLIPModel(text, vision, tokenizer.end_token).to(engine.device).eval()
        clip.load_state_dict(dict(trainer.ema.items()))
        if engine.is_main_process:
            save_clip(clip, tokenizer, folder)
        engine.wait_for_everyone()
    return clip, tokenizer


def tokenize_templates(
    tokenizer: BPETokenizer, captions: Sequence[str], templates: Sequence[str], max_length: int
) -> Int[Tensor, "n forms max_length"]:
    """The ids of every caption in every form."""
    forms = [tokenizer([template.format(c) for c in captions], max_length).ids for template in templates]
    return torch.stack(forms, dim=1)
