"""Training CLIP: which caption belongs to which picture?

First the tokenizer learns its pieces of words from the captions; then both towers learn to agree on 256 pictures and
their captions at a time. Stable Diffusion took its text tower from OpenAI, who trained on 400 million pairs; here it
is trained on the pictures at hand, and the image tower, which Stable Diffusion has no use for, is kept for evaluation.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import save_clip
from ..clip import BPETokenizer, CLIPModel, CLIPTextConfig, CLIPVisionConfig, contrastive_loss
from ..data import CaptionedPictures
from .engine import Engine, gather_with_grad
from .trainer import Recipe, Trainer

# A caption is "red fox, noto style"; a person will write "a red fox". Both towers and the UNet see all of these forms.
TEMPLATES = ("{}", "a {}", "the {}", "a picture of a {}")


@dataclass(frozen=True)
class CLIPRecipe(Recipe):
    """How CLIP is trained."""

    batch_size: int = 256  # each picture is told from 255 others
    lr: float = 1e-3  # learning rate after the warm-up
    weight_decay: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.accumulate != 1:
            raise ValueError(
                "CLIP tells each picture from all others of its batch, so the batch can't be cut into parts: leave "
                f"accumulate at 1 (not {self.accumulate}), and take a smaller batch_size or more processes"
            )


class CLIPOverProcesses(CLIPModel):
    """The features of all processes, so that the logits are those of the whole batch, on every process."""

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

    Returns the towers with their EMA weights, and the tokenizer. A folder with a checkpoint in it is gone on with.

    Raises:
        ValueError: pictures of another size than the image tower's, or fewer than a batch; FSDP.
    """
    if data.size != vision.image_size:
        raise ValueError(
            f"the image tower sees {vision.image_size}x{vision.image_size} pixels, and the pictures are {data.size}x"
            f"{data.size}: open them with size={vision.image_size}"
        )
    if recipe.batch_size > len(data):
        raise ValueError(
            f"CLIP tells each picture of a batch from all others, and a batch of {recipe.batch_size} would hold some "
            f"of the {len(data)} pictures twice: take a batch_size of at most {len(data)}"
        )
    if getattr(engine, "is_fsdp2", False):
        raise ValueError("FSDP can't cut up CLIP's temperature, a single number: train clip with DDP (multi_gpu)")
    torch.manual_seed(recipe.seed)  # the initial weights
    tokenizer = BPETokenizer.train([t.format(c) for c in data.captions for t in TEMPLATES], text.vocab_size)
    tokens = tokenize_templates(tokenizer, data.captions, text.max_length)
    towers = CLIPOverProcesses(text, vision, tokenizer.end_token)
    trainer = Trainer(towers, recipe, folder, engine, given={"data": data.fingerprint}, describe=data.describe)
    for _ in trainer.steps():
        for batch in trainer.batches(len(data)):
            form = batch.randint(len(TEMPLATES))
            with engine.autocast():
                ids, pixels = tokens[batch.indices, form], data.batch(batch.indices)
                logits = trainer.model(ids.to(engine.device), pixels.to(engine.device))
            right = (logits.argmax(dim=1) == torch.arange(len(logits), device=logits.device)).float().mean()
            trainer.backward(contrastive_loss(logits.float()), accuracy=right)
        trainer.update()

    with trainer.finishing():
        clip = CLIPModel(text, vision, tokenizer.end_token).to(engine.device).eval()
        clip.load_state_dict(dict(trainer.ema.items()))
        if engine.is_main_process:
            save_clip(clip, tokenizer, folder)
        engine.wait_for_everyone()
    return clip, tokenizer


def tokenize_templates(tokenizer: BPETokenizer, captions: list[str], max_length: int) -> Tensor:
    """Ids of every caption in every form [n, templates, max_length]."""
    forms = [tokenizer([template.format(c) for c in captions], max_length).ids for template in TEMPLATES]
    return torch.stack(forms, dim=1)
