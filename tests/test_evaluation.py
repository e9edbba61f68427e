"""The score: 1 for the real pictures, 0 for drawings without a relation to the captions."""

import numpy as np
import pytest
import torch

from minisd import PRESETS, LatentDiffusion, evaluation
from minisd.data import CaptionedPictures, sample


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Pictures of 30 concepts, in two styles each, one of them held out for ten."""
    import json

    shipped = sample()
    folder = tmp_path_factory.mktemp("corpus")
    by_concept = {}
    for i, row in enumerate(shipped.rows):
        by_concept.setdefault(row["concept"], []).append(i)
    pairs = [indices[:2] for indices in by_concept.values() if len(indices) >= 2][:30]
    chosen = [i for pair in pairs for i in pair]
    rows = [dict(shipped.rows[i], split="train") for i in chosen]
    for k in range(10):
        rows[2 * k + 1]["split"] = "test_pair"
    for n, row in enumerate(rows):
        row["file_name"] = f"{n}.png"
    np.save(folder / "pictures.npy", np.stack([shipped.images[i] for i in chosen]))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Oracle(LatentDiffusion):
    """Draws what `answer` says, without any network."""

    def __init__(self, answer):
        torch.nn.Module.__init__(self)
        self.config, self.answer = PRESETS["tiny"], answer

    def txt2img(self, captions, **options):
        return type("Drawing", (), {"pictures": torch.stack([self.answer(c) for c in captions])})


def scores(oracle, corpus):
    result, drawings = evaluation.evaluate(oracle, corpus, count=20)
    return {s.split: s for s in result}, drawings


def test_a_model_that_draws_the_real_pictures_scores_one(corpus):
    data = CaptionedPictures(corpus, size=32)
    real = {caption: data[i][0] for i, caption in enumerate(data.captions)}
    found, drawings = scores(Oracle(real.__getitem__), corpus)
    assert found["train"].score == pytest.approx(1) and found["train"].model == found["train"].real == 1
    assert found["test_pair"].score == pytest.approx(1)
    assert found["train"].copies == 20 and found["test_pair"].copies == 0  # a held-out picture can't be a copy
    assert drawings["test_pair"][0].shape == (10, 3, 32, 32)


def test_a_model_that_does_not_read_scores_zero(corpus):
    data = CaptionedPictures(corpus, size=32)
    found, _ = scores(Oracle(lambda caption: data[0][0]), corpus)
    assert abs(found["train"].score) < 0.1 and found["train"].copies <= 1


def test_the_captions_asked_for_do_not_depend_on_the_order_of_the_corpus(corpus):
    rows = CaptionedPictures(corpus, size=32).rows
    chosen = [rows[i]["file_name"] for i in evaluation.choose(rows, 7)]
    backwards = rows[::-1]
    assert chosen == [backwards[i]["file_name"] for i in evaluation.choose(backwards, 7)]


def test_the_nearest_picture_is_found(corpus):
    library = torch.rand(20, 768)
    index, distance = evaluation.find_nearest(library[[4, 7]] + 0.01, library)
    assert index.tolist() == [4, 7]
    assert torch.allclose(distance, torch.full((2,), 0.01), atol=1e-3)


def test_a_corpus_that_names_no_concepts_is_refused(corpus, tmp_path):
    CaptionedPictures(corpus, size=32)  # that one does
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a fox"}\n')
    np.save(tmp_path / "pictures.npy", np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="must name a concept"):
        evaluation.evaluate(Oracle(lambda caption: None), tmp_path)
