"""Draw pictures for the captions of a data set, and compare them with the real ones.

The captions are evaluated in groups. Each is left out if the data set does not have it:

    train           captions of the training split: were they learned?
    test_pair       a concept in a style that training never combined: does the model generalise to new combinations?
    test_concept    a concept that does not occur in training
    known_words     those of test_concept that have only words of training captions: a model cannot know other words
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from ..clip import BPETokenizer, CLIPModel
from ..data import CaptionedPictures
from ..data.split import in_known_words
from ..latent_diffusion import LatentDiffusion
from .distances import MINIMUM, Distance, Nearness, measure_distance, nearness
from .judges import ImageTowerJudge, NearestPicture, PatchJudge, features
from .scores import Score, score

SPLITS = ("train", "test_pair", "test_concept")
FEWEST = 10  # captions that a group needs; with fewer, a score is not meaningful
BATCH = 50  # pictures that are drawn, or encoded and decoded, together
Towers = tuple[CLIPModel, BPETokenizer]  # both towers of CLIP, and their tokenizer


@dataclass(frozen=True)
class Setting:
    """How pictures are drawn."""

    steps: int = 25
    guidance_scale: float = 4.0
    sampler: str = "dpmpp_2m"
    seed: int = 0  # picture k is drawn from seed + k


@dataclass(frozen=True)
class Group:
    """Captions to draw for, and their real pictures."""

    rows: list[dict]
    real: Float[Tensor, "n 3 h w"]
    decoded: Float[Tensor, "n 3 h w"]  # the same, encoded and decoded: the best that this autoencoder allows


@dataclass(frozen=True)
class Evaluation:
    """All results. Those of scenes (`composition`) have only scores and drawings."""

    scores: list[Score]
    drawings: dict[str, tuple[Tensor, Tensor]]  # for each group: drawings and real pictures, both [n 3 h w]
    distances: list[Distance] = field(default_factory=list)
    nearness: list[Nearness] = field(default_factory=list)
    to_training: dict[str, Tensor] = field(default_factory=dict)  # the distances that `nearness` summarises
    # The drawings nearest to a training picture, followed by those training pictures.
    nearest: dict[str, Tensor] = field(default_factory=dict)


class Evaluator:
    """A model, the data set that it was trained on, and the judges.

    Args:
        folder: the data set. Its rows have the columns `concept` and `split` and, if there are styles, `style`.
        clip: both towers and their tokenizer (`minisd.load_clip`).
        count: the largest number of captions in a group. They are chosen by the hashes of their file names.
        groups: the groups to draw for; `evaluate` needs train and test_pair, the methods of this class only their own.

    Raises:
        ValueError: the rows do not name concepts, or there are too few pictures of training or of held-out pairs.
    """

    def __init__(
        self, sd: LatentDiffusion, folder: str | Path, clip: Towers, count: int = 1000, groups: Sequence[str] = SPLITS
    ):
        self.sd = sd
        self.data = data = CaptionedPictures(folder, size=sd.config.image_size)
        if not all("concept" in row for row in data.rows):
            raise ValueError(f"the rows of {folder}/metadata.jsonl must name a concept, as `minisd data emoji` does")
        members = {s: [i for i, row in enumerate(data.rows) if row.get("split", "train") == s] for s in SPLITS}
        for split in ("train", "test_pair"):
            if min(count, len(members[split])) < FEWEST:
                raise ValueError(
                    f"at least {FEWEST} captions of {split} are needed: {folder} has {len(members[split])} such rows, "
                    f"and {count} were asked for"
                )
        pictures, self.groups = data.batch(range(len(data))), {}
        for name, indices in members.items():
            if name in groups and len(indices) >= FEWEST:
                chosen = [indices[i] for i in choose([data.rows[i] for i in indices], count)]
                real = pictures[chosen]
                self.groups[name] = Group([data.rows[i] for i in chosen], real, autoencode(sd, real))
        if "test_concept" in self.groups:
            whole = self.groups["test_concept"]
            names = {row["file_name"] for row in in_known_words(data.rows)}
            self.known_words = some = [i for i, row in enumerate(whole.rows) if row["file_name"] in names]
            if len(some) >= FEWEST:
                rows = [whole.rows[i] for i in some]
                self.groups["known_words"] = Group(rows, whole.real[some], whole.decoded[some])
        self.training = pictures[members["train"]]
        self.tower = ImageTowerJudge(*clip, data.rows)
        self.judges = [NearestPicture(data.rows, pictures), self.tower, PatchJudge(data.rows, pictures)]
        stretch = self.tower.texts.shape[1] ** 0.5  # scales CLIP's unit vectors to length √d, so that x·y/d is a cosine
        self.spaces = {"16x16 RGB": features, "CLIP": lambda x: stretch * self.tower.features(x)}
        self._reference = {name: space(self.training) for name, space in self.spaces.items()}
        self._yardsticks: dict = {}  # the judges' predictions for real pictures, by group; computed only once

    def draw(self, group: str, setting: Setting = Setting()) -> Float[Tensor, "n 3 h w"]:
        """Draw a picture for each caption of a group; picture k uses seed + k."""
        return draw(self.sd, [row["text"] for row in self.groups[group].rows], setting, group)

    def scores(self, name: str, drawn: Float[Tensor, "n 3 h w"]) -> list[Score]:
        """The scores of a group's drawings, for each judge and question."""
        group = self.groups[name]
        concepts = [row["concept"] for row in group.rows]
        found = []
        for judge in self.judges:
            if (name, judge) not in self._yardsticks:
                self._yardsticks[name, judge] = judge(group.real, group.rows), judge(group.decoded, group.rows)
            real, decoded = self._yardsticks[name, judge]
            for question, model in judge(drawn, group.rows).items():
                found.append(score(name, judge.name, question, model, real[question], decoded[question], concepts))
        return found

    def distances(self, what: str, pictures: Float[Tensor, "n 3 h w"]) -> list[Distance]:
        """The distances of these pictures from the training split in each feature space; [] for too few pictures."""
        if min(len(pictures), len(self.training)) < 2 * MINIMUM:
            return []
        spaces = self.spaces.items()
        return [measure_distance(what, name, space(pictures), self._reference[name]) for name, space in spaces]


def evaluate(evaluator: Evaluator, setting: Setting = Setting(), sheet: int = 16) -> Evaluation:
    """Draw for every group, and compute all scores and distances.

    sheet: how many of the drawings nearest to a training picture are kept for the result.
    """
    groups = evaluator.groups
    drawn = {name: evaluator.draw(name, setting) for name in groups if name != "known_words"}
    if "known_words" in groups:
        drawn["known_words"] = drawn["test_concept"][evaluator.known_words]
    pairs = groups["test_pair"]
    drawings = {"drawings, train": drawn["train"], "drawings, test_pair": drawn["test_pair"]}
    far = drawings | {"real, test_pair": pairs.real, "real, decoded, test_pair": pairs.decoded}
    near = drawings | {"real, test_pair": pairs.real, "real, decoded, train": groups["train"].decoded}
    training, nearest = features(evaluator.training), {}
    measured = {what: nearness(what, pictures, training) for what, pictures in near.items()}
    for what, (_, distance, index) in measured.items():
        order = distance.argsort()[:sheet]
        nearest[what] = torch.cat([near[what][order], evaluator.training[index[order]]])
    return Evaluation(
        scores=[s for name in groups for s in evaluator.scores(name, drawn[name])],
        distances=[d for what, pictures in far.items() for d in evaluator.distances(what, pictures)],
        nearness=[summary for summary, _, _ in measured.values()],
        drawings={name: (drawn[name], group.real) for name, group in groups.items()},
        to_training={what: distance for what, (_, distance, _) in measured.items()},
        nearest=nearest,
    )


def choose(rows: list[dict], count: int) -> Int[Tensor, "n"]:
    """The rows whose file names have the smallest hashes. It looks random, but always gives the same rows."""
    hashes = [hashlib.sha256(row["file_name"].encode()).hexdigest() for row in rows]
    return torch.tensor(sorted(range(len(rows)), key=hashes.__getitem__)[:count])


def draw(sd: LatentDiffusion, captions: list[str], setting: Setting, name: str) -> Float[Tensor, "n 3 h w"]:
    """Draw a picture for each caption; picture k uses seed + k. name: of these captions, for the progress bar."""
    pictures = []
    for start in tqdm(range(0, len(captions), BATCH), f"drawing {name}"):
        options = asdict(replace(setting, seed=setting.seed + start))
        pictures.append(sd.txt2img(captions[start : start + BATCH], **options).pictures.clamp(-1, 1).cpu())
    return torch.cat(pictures)


def autoencode(sd: LatentDiffusion, pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Encode pictures and decode them again, without sampling noise (the mode of q(z|x))."""
    decoded = []
    for part in pictures.split(BATCH):
        latent = sd.encode_first_stage(part.to(sd.device))
        latent = latent if isinstance(latent, Tensor) else latent.mode()
        decoded.append(sd.decode_first_stage(sd.get_first_stage_encoding(latent)).clamp(-1, 1).cpu())
    return torch.cat(decoded)
