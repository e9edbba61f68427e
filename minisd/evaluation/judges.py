"""Three judges (classifiers) that decide which concept and style a picture shows.

Each judge is applied to drawings and to real pictures alike, so that its own mistakes cancel in the score. The table
also shows how often it is right on real held-out pictures.

    NearestPicture    the nearest picture of the training split, pixel by pixel
    ImageTowerJudge   CLIP: the caption that fits best. It is not independent: the model's text encoder was trained
                      together with this image tower
    PatchJudge        a classifier trained only on the pictures of the training split, by linear algebra in a minute

A judge has a name, and learns from the rows and pictures of a data set. It is called with pictures and with the rows
whose captions they were drawn for. For each question it returns whether picture i would be a hit for caption j, [n n].
It never sees the real pictures of those rows, except for those of the training split.

The training split has no picture of a held-out concept, so a judge could not recognise it. For such a concept, the
held-out pictures by other artists are added to the library. (Two styles by the same artist are nearly the same picture,
so the other style is not added.)
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..clip import BPETokenizer, CLIPModel
from ..data.split import TWINS

Hits = dict[str, Bool[np.ndarray, "n n"]]


# --- what all judges need -------------------------------------------------------------------------------------------


def column(rows: list[dict], key: str) -> np.ndarray:
    """The entry `key` of each row, or "" if a row has none."""
    return np.array([row.get(key, "") for row in rows])


def questions(rows: list[dict]) -> list[str]:
    """The columns that a judge can predict ("concept", "style"), as far as all rows of the data set have them."""
    return [question for question in ("concept", "style") if all(question in row for row in rows)]


def hits(found: dict[str, np.ndarray], rows: list[dict]) -> Hits:
    """Compare the predicted name of each picture with that of every row, [n n]."""
    return {question: names[:, None] == column(rows, question)[None] for question, names in found.items()}


def shown(rows: list[dict], library: list[dict]) -> Iterator[tuple[Int[np.ndarray, "q"], Int[np.ndarray, "m"]]]:
    """Which pictures of the library each row may be compared with: (rows, pictures), in as few groups as possible."""
    train = np.array([row.get("split", "train") == "train" for row in library])
    hand, asked = (np.array([_hand(row) for row in some]) for some in (library, rows))
    for one in np.unique(asked):
        others = train | ((hand != "") & (hand != one)) if one else train
        yield np.flatnonzero(asked == one), np.flatnonzero(others)


def _hand(row: dict) -> str:
    """Who drew the picture of a held-out concept; "" for all other pictures."""
    style = row.get("style", "") if row.get("split") == "test_concept" else ""
    return TWINS.get(style, style)


def to_size(pictures: Float[Tensor, "n 3 h w"], size: int) -> Float[Tensor, "n 3 s s"]:
    """Pictures resized to the size that a judge needs."""
    return pictures if pictures.shape[-1] == size else F.interpolate(pictures, size=(size, size), mode="area")


# --- the nearest picture --------------------------------------------------------------------------------------------


def features(pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 768"]:
    """Pictures in [-1, 1] → 16x16 RGB in [0, 1], flattened. At this size a slightly shifted line hardly matters."""
    return (to_size(pictures, 16).flatten(1) + 1) / 2


def find_nearest(
    queries: Float[Tensor, "n d"], library: Float[Tensor, "m d"]
) -> tuple[Int[np.ndarray, "n"], Float[Tensor, "n"]]:
    """The index of the nearest row of the library by Euclidean distance, and its root mean square difference."""
    distance, index = torch.cdist(queries, library).min(dim=1)
    return index.numpy(), distance / queries.shape[1] ** 0.5


class NearestPicture:
    """Predicts the concept and style of the nearest picture, by `features`."""

    name = "nearest picture"

    def __init__(self, rows: list[dict], pictures: Float[Tensor, "m 3 h w"]):
        self.rows, self.library = rows, features(pictures)

    def __call__(self, pictures: Float[Tensor, "n 3 h w"], rows: list[dict]) -> Hits:
        nearest, queries = np.zeros(len(rows), int), features(pictures)
        for asked, others in shown(rows, self.rows):
            nearest[asked] = others[find_nearest(queries[asked], self.library[others])[0]]
        return hits({question: column(self.rows, question)[nearest] for question in questions(self.rows)}, rows)


# --- CLIP -----------------------------------------------------------------------------------------------------------


class ImageTowerJudge:
    """CLIP, zero-shot: which of all captions of the data set, including held-out ones, fits the picture best?

    Concept and style are those of that caption. R@1 and R@5 (recall) ask whether the prompt itself is the best caption,
    or among the best five.
    """

    name = "CLIP"

    @torch.no_grad()
    def __init__(self, clip: CLIPModel, tokenizer: BPETokenizer, rows: list[dict]):
        self.clip, unique = clip, {row["text"]: row for row in rows}
        self.captions, self.rows = np.array(list(unique)), list(unique.values())
        ids = tokenizer(list(unique), clip.text_config.max_length).ids
        self.texts = torch.cat([clip.get_text_features(part) for part in ids.split(512)])  # [captions p]

    @torch.no_grad()
    def features(self, pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n p"]:
        """The image tower's features of pictures: unit vectors."""
        pictures = to_size(pictures, self.clip.vision_config.image_size)
        return torch.cat([self.clip.get_image_features(part) for part in pictures.split(256)])

    def __call__(self, pictures: Float[Tensor, "n 3 h w"], rows: list[dict]) -> Hits:
        best = (self.features(pictures) @ self.texts.T).topk(min(5, len(self.texts)), dim=1).indices.numpy()
        fits = self.captions[best][:, None] == column(rows, "text")[None, :, None]  # [n n 5]
        found = {question: column(self.rows, question)[best[:, 0]] for question in questions(self.rows)}
        return hits(found, rows) | {"R@1": fits[..., 0], "R@5": fits.any(axis=-1)}


# --- a separate classifier ------------------------------------------------------------------------------------------


class PatchJudge:
    """Predicts concept and style from a picture's small patches and their positions.

    The features follow Coates & Ng 2011 ("The Importance of Encoding Versus Training"). A dictionary of patches is
    learned by spherical k-means, the similarity of each patch of a picture to each entry is computed, and these are
    averaged over 3x3 fields of the picture. From the features, the concept is the one whose mean is nearest, by the
    cosine after whitening within concepts (linear discriminant analysis). The style is the largest output of a ridge
    regression. There is no network, no gradient and no stored weight, so this judge shares nothing with the model
    except for the training pictures.
    """

    name = "patches"
    patch, atoms, fields = 5, 320, 3  # patch size in pixels, entries of the dictionary, fields along each side

    def __init__(self, rows: list[dict], pictures: Float[Tensor, "m 3 h w"]):
        self.rows, train = rows, [i for i, row in enumerate(rows) if row.get("split", "train") == "train"]
        self._learn_dictionary(pictures[train])
        x = self._encode(pictures)
        self.mean, self.std = x[train].mean(dim=0), x[train].std(dim=0) + 1e-3
        self.library = (x - self.mean) / self.std
        self._learn_concepts(self.library[train], column(rows, "concept")[train])
        self._learn_styles(self.library[train], column(rows, "style")[train])

    def __call__(self, pictures: Float[Tensor, "n 3 h w"], rows: list[dict]) -> Hits:
        x = (self._encode(pictures) - self.mean) / self.std
        style = self.styles[(x @ self.style_weights + self.style_bias).argmax(dim=1).numpy()]
        concept = np.empty(len(rows), dtype=object)
        names = column(self.rows, "concept")
        for asked, others in shown(rows, self.rows):
            candidates, member = np.unique(names[others], return_inverse=True)
            means = F.normalize(_means(self.whitened[others], torch.from_numpy(member)), dim=1)
            concept[asked] = candidates[(x[asked] @ self.whitening @ means.T).argmax(dim=1).numpy()]
        found = {"concept": concept, "style": style}
        return hits({question: found[question] for question in questions(self.rows)}, rows)

    def _patches(self, pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n l d"]:
        """The patches, normalised in brightness and contrast: 28x28 for pictures of 32 pixels, 30x30 for 64."""
        patches = F.unfold(pictures, self.patch, stride=max(1, pictures.shape[-1] // 32)).transpose(1, 2)
        patches = patches - patches.mean(dim=-1, keepdim=True)
        return patches / (patches.var(dim=-1, keepdim=True) + 0.01).sqrt()

    def _learn_dictionary(self, pictures: Float[Tensor, "n 3 h w"], count: int = 60_000, rounds: int = 10) -> None:
        generator = torch.Generator().manual_seed(0)
        each = -(-count // len(pictures))
        some = []
        for part in pictures.split(256):  # a few patches of each picture; all of them would fill the memory
            patches = self._patches(part)
            pick = torch.randint(patches.shape[1], (len(part), each), generator=generator)
            some.append(patches[torch.arange(len(part))[:, None], pick].flatten(0, 1))
        x = torch.cat(some)
        x = x[x.std(dim=1) > 0.1]  # leave out patches of a uniform colour, such as the white background
        self.patch_mean = x.mean(dim=0)
        values, vectors = torch.linalg.eigh(torch.cov(x.T))
        self.patch_whitening = vectors * (values + 0.1).rsqrt() @ vectors.T
        x = (x - self.patch_mean) @ self.patch_whitening
        atoms = F.normalize(torch.randn(self.atoms, x.shape[1], generator=generator), dim=1)
        for _ in range(rounds):  # spherical k-means: an atom is the mean direction of the patches most similar to it
            likeness, nearest = (x @ atoms.T).max(dim=1)
            atoms = F.normalize((0.1 * atoms).index_add(0, nearest, x * likeness[:, None]), dim=1)
        self.dictionary = self.patch_whitening @ atoms.T  # [d atoms]

    def _encode(self, pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n f"]:
        """The mean similarity to each atom in each field of the picture, [n atoms · fields²]."""
        encoded = []
        for part in pictures.split(64):
            patches = self._patches(part) - self.patch_mean
            likeness = F.relu(patches @ self.dictionary - 0.25)  # soft threshold: a small similarity counts as 0
            side = round(likeness.shape[1] ** 0.5)
            pooled = F.adaptive_avg_pool2d(likeness.transpose(1, 2).unflatten(2, (side, side)), self.fields)
            encoded.append(pooled.flatten(1).sqrt())  # the root reduces the weight of features that are everywhere
        return torch.cat(encoded)

    def _learn_concepts(self, x: Float[Tensor, "n f"], concepts: np.ndarray, ridge: float = 0.3) -> None:
        _, member = np.unique(concepts, return_inverse=True)
        member = torch.from_numpy(member)
        within = x - _means(x, member)[member]
        covariance = within.T @ within / max(1, len(x) - int(member.max()) - 1)
        values, vectors = torch.linalg.eigh(covariance + ridge * torch.eye(x.shape[1]))
        self.whitening = vectors * values.rsqrt()
        self.whitened = self.library @ self.whitening

    def _learn_styles(self, x: Float[Tensor, "n f"], styles: np.ndarray, ridge: float = 0.03) -> None:
        self.styles, member = np.unique(styles, return_inverse=True)
        target = F.one_hot(torch.from_numpy(member), len(self.styles)).float()
        self.style_bias = target.mean(dim=0)
        gram = x.T @ x / len(x) + ridge * torch.eye(x.shape[1])
        self.style_weights = torch.linalg.solve(gram, x.T @ (target - self.style_bias) / len(x))


def _means(x: Float[Tensor, "n f"], member: Int[Tensor, "n"]) -> Float[Tensor, "k f"]:
    """The mean of each class."""
    sums = torch.zeros(int(member.max()) + 1, x.shape[1]).index_add(0, member, x)
    return sums / torch.bincount(member)[:, None]
