"""Does it draw what the prompt says?

Ask for a picture by its caption, then look for the nearest picture among all that the model was trained on: does that
one show the same concept? Chance and the difficulty of the corpus are taken out by two yardsticks, drawings held
against the captions of others (0) and the real pictures (1):

    score = (hits of the model - hits of shuffled captions) / (hits of real pictures - hits of shuffled captions)

Asked for training captions, this measures what was learned; asked for held-out (concept, style) pairs, whether it can
draw a thing it knows in a style that it never saw it in.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from .checkpoint import write_json
from .data import CaptionedPictures
from .latent_diffusion import LatentDiffusion
from .viz import save_sheet

COPY = 0.05  # a drawing this close to its training picture (RMS, of a range of 1, at 16x16) is called a copy


@dataclass(frozen=True)
class ConceptScore:
    """How often the nearest training picture shows what was asked for."""

    split: str  # whose captions were asked for
    count: int  # how many
    model: float  # share of drawings whose nearest training picture shows the concept
    real: float  # the same for the real pictures of these captions
    shuffled: float  # the same for the drawings, each held against another's caption
    copies: int  # drawings that are all but the training picture of their caption

    @property
    def score(self) -> float:
        """0: as good as shuffled captions, 1: as good as real pictures."""
        return (self.model - self.shuffled) / max(1e-9, self.real - self.shuffled)


def evaluate(
    sd: LatentDiffusion,
    folder: str | Path,
    count: int = 200,
    steps: int = 25,
    guidance_scale: float = 4.0,
    sampler: str = "dpmpp_2m",
    seed: int = 0,
    batch_size: int = 50,
) -> tuple[list[ConceptScore], dict[str, tuple[Tensor, Tensor]]]:
    """Score a model on a corpus whose rows name `concept`, `style` and `split`.

    Returns the scores of the training captions and of the held-out pairs, and for each of the two splits the drawings
    and the real pictures, both [n 3 h w].

    Raises:
        ValueError: the corpus does not say which concepts its pictures show, or has no held-out pairs.
    """
    train = CaptionedPictures(folder, size=sd.config.image_size, split="train")
    if not all("concept" in row for row in train.rows):
        raise ValueError(f"the rows of {folder}/metadata.jsonl must name a concept, as those of `minisd data emoji` do")
    # both before anything is drawn: a corpus without held-out pairs is to be known of at once
    splits = {"train": train, "test_pair": CaptionedPictures(folder, size=sd.config.image_size, split="test_pair")}
    library = features(train.batch(torch.arange(len(train))))
    concepts = np.array([row["concept"] for row in train.rows])
    scores, drawings = [], {}
    for split, data in splits.items():
        chosen = choose(data.rows, count)
        rows = [data.rows[i] for i in chosen]
        asked = np.array([row["concept"] for row in rows])
        drawn = draw([data.captions[i] for i in chosen], sd, batch_size, f"drawing {split}", seed=seed, steps=steps,
                     guidance_scale=guidance_scale, sampler=sampler)  # fmt: skip
        nearest, distance = find_nearest(features(drawn), library)
        real, _ = find_nearest(features(data.batch(chosen)), library)
        found = concepts[nearest]
        same_picture = np.array(
            [train.rows[n]["file_name"] == row["file_name"] for n, row in zip(nearest, rows, strict=True)]
        )
        scores.append(ConceptScore(
            split, len(rows),
            model=float((found == asked).mean()),
            real=float((concepts[real] == asked).mean()),
            # each drawing against every other's caption: the mean over all shuffles, without drawing lots
            shuffled=float(np.mean([(found == np.roll(asked, k)).mean() for k in range(1, len(asked))])),
            copies=int((same_picture & (distance.numpy() < COPY)).sum()),
        ))  # fmt: skip
        drawings[split] = (drawn, data.batch(chosen))
    return scores, drawings


def choose(rows: list[dict], count: int) -> Int[Tensor, "n"]:
    """Rows to ask for: those whose file names have the smallest hashes, so that it is always the same ones."""
    hashes = [hashlib.sha256(row["file_name"].encode()).hexdigest() for row in rows]
    return torch.tensor(sorted(range(len(rows)), key=hashes.__getitem__)[:count])


def draw(
    captions: list[str], sd: LatentDiffusion, batch_size: int, title: str, seed: int, **options
) -> Float[Tensor, "n 3 h w"]:
    """One picture a caption; picture k from seed + k."""
    pictures = []
    for start in tqdm(range(0, len(captions), batch_size), desc=title):
        out = sd.txt2img(captions[start : start + batch_size], seed=seed + start, **options)
        pictures.append(out.pictures.clamp(-1, 1).cpu())
    return torch.cat(pictures)


def features(pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 768"]:
    """Pictures in [-1, 1] → 16x16 RGB in [0, 1], as a row: coarse enough to forgive a shifted line."""
    return (F.interpolate(pictures, size=(16, 16), mode="area").flatten(1) + 1) / 2


def find_nearest(
    queries: Float[Tensor, "n d"], library: Float[Tensor, "m d"]
) -> tuple[Int[np.ndarray, "n"], Float[Tensor, "n"]]:
    """Index of the nearest row of the library by Euclidean distance, and its root mean square difference."""
    distance, index = torch.cdist(queries, library).min(dim=1)
    return index.numpy(), distance / queries.shape[1] ** 0.5


def report(result: tuple[list[ConceptScore], dict], options: dict, folder: str | Path | None = None) -> None:
    """Print the table; with a folder, also write it (scores.json) and sheets: drawings above the real pictures."""
    scores, drawings = result
    print(f"{'captions':<12}{'count':>6}{'model':>8}{'real':>8}{'shuffled':>10}{'score':>8}{'copies':>8}")
    for s in scores:
        print(f"{s.split:<12}{s.count:>6}{s.model:>8.3f}{s.real:>8.3f}{s.shuffled:>10.3f}{s.score:>8.3f}{s.copies:>8}")
    if folder is None:
        return
    folder = Path(folder)
    record = {"options": options, "scores": [asdict(s) | {"score": s.score} for s in scores]}
    write_json(record, folder / "scores.json")
    for split, (drawn, real) in drawings.items():
        rows = [torch.cat([drawn[k : k + 16], real[k : k + 16]]) for k in range(0, min(64, len(drawn)), 16)]
        save_sheet(torch.cat(rows), folder / f"{split}.png", columns=16)
    print(f"wrote {folder}")
