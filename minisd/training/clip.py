"""Training CLIP: which caption belongs to which picture?

First the tokenizer learns its vocabulary from the captions. Then the image encoder and the text encoder (the two
"towers") are trained together. Each step takes a batch of pictures with their captions, and the features of a picture
should be more similar to those of its own caption than to those of any other caption in the batch (Radford et al. 2021,
arXiv:2103.00020, figure 3). Stable Diffusion uses the text tower that OpenAI trained on 400 million pairs. Here it is
trained on your own pictures. Stable Diffusion does not need the image tower, but evaluation uses it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import save_clip
from ..clip import BPETokenizer, CLIPModel, CLIPTextConfig, CLIPVisionConfig, contrastive_loss
from ..data import Corpus
from .engine import Engine, gather_with_grad
from .trainer import Recipe, Trainer, one_training, refuse_another_size


@dataclass(frozen=True)
class CLIPRecipe(Recipe):
    """How CLIP is trained."""

    batch_size: int = 256  # larger is better: each picture has the 255 other captions of its batch as negatives
    lr: float = 1e-3  # learning rate after the warm-up
    weight_decay: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.accumulate != 1:
            raise ValueError(
                f"accumulate is {self.accumulate}, but CLIP compares each picture with all captions of its batch, so "
                "the batch can't be cut into parts: set accumulate to 1, and use a smaller batch_size or more processes"
            )


class CLIPOverProcesses(CLIPModel):
    """CLIP that gathers the features of all processes, so that every process computes the logits of the whole batch.

    Without this, a picture would only have the captions of its own process as negatives.
    """

    def get_text_features(self, input_ids: Tensor) -> Tensor:
        return gather_with_grad(super().get_text_features(input_ids))

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return gather_with_grad(super().get_image_features(pixels))


@one_training()
def train_clip(
    text: CLIPTextConfig, vision: CLIPVisionConfig, recipe: CLIPRecipe, data: Corpus, folder: str | Path, engine: Engine
) -> tuple[CLIPModel, BPETokenizer]:
    """Train the tokenizer and both towers, and write `clip.safetensors`, `clip.json` and `tokenizer/` to the folder.

    Returns the towers with their EMA weights, and the tokenizer. If the folder holds a checkpoint, the run continues
    from it.

    Raises:
        ValueError: the pictures do not have the image tower's size, or there are fewer of them than a batch needs.
    """
    refuse_another_size(data, vision.image_size, "the image tower sees")
    if recipe.batch_size > len(data):
        raise ValueError(
            f"a batch of {recipe.batch_size} would hold some of the {len(data)} pictures twice, and CLIP can't tell "
            f"two equal pictures apart: take a batch_size of at most {len(data)}"
        )
    torch.manual_seed(recipe.seed)  # the initial weights

    # A caption is "red fox, noto style", but people will write "a red fox". So the data have several wordings for a
    # caption (`templates`). The tokenizer learns its merges from all of them, and the text tower and the UNet are
    # trained on all of them.
    wordings = data.wordings
    tokenizer = BPETokenizer.train([form for forms in wordings for form in forms], text.vocab_size)
    # The token ids of every caption in every wording. Each text is read once, because a mixture of data repeats them.
    number = {form: k for k, form in enumerate(dict.fromkeys(form for forms in wordings for form in forms))}
    ids = tokenizer(list(number), text.max_length).ids
    tokens = ids[torch.tensor([[number[form] for form in forms] for forms in wordings])]  # [n forms max_length]
    towers = CLIPOverProcesses(text, vision, tokenizer.end_token)
    given = {"data": data.fingerprint, "templates": str(data.templates)}
    trainer = Trainer(towers, recipe, folder, engine, given=given, describe=data.describe)
    for _ in trainer.steps():
        for batch in trainer.batches(len(data)):
            form = batch.randint(tokens.shape[1])  # [b]: a wording for each caption, drawn anew in every step
            # With mixed precision, `autocast` computes convolutions and matrix products in bfloat16.
            with engine.autocast():
                ids, pixels = tokens[batch.indices, form], data.batch(batch.indices)  # [b max_length], [b 3 H W]
                # Both towers, and then all pairs of features: entry (i, j) is a learned scale (the inverse of a
                # temperature) times the cosine between picture i and caption j. The logits are [B B], where B counts
                # the samples of all processes, because every picture is compared with every caption.
                ids, pixels = (x.to(engine.device, non_blocking=True) for x in (ids, pixels))
                logits = trainer.model(ids, pixels)
            # For the log: the share of pictures whose own caption has the largest logit. Row i should have its largest
            # entry on the diagonal.
            right = (logits.argmax(dim=1) == torch.arange(len(logits), device=logits.device)).float().mean()
            # The mean of two cross-entropies, over rows (which caption belongs to this picture?) and over columns
            # (which picture belongs to this caption?). The softmax is computed in float32: it adds up B exponentials.
            trainer.backward(contrastive_loss(logits.float()), accuracy=right)
        trainer.update()  # clip the gradient, take the AdamW step, update the EMA

    # The finished towers get the EMA weights. They are a plain CLIPModel, which does not gather over processes.
    with trainer.finishing():
        clip = CLIPModel(text, vision, tokenizer.end_token).to(engine.device).eval()
        clip.load_state_dict(trainer.ema.weights)
        if engine.is_main_process:
            save_clip(clip, tokenizer, folder)
    return clip, tokenizer
