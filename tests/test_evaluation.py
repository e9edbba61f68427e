"""Scores between chance (0) and real pictures (1), distances that equal torchmetrics', copies that are found out."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from minisd import PRESETS, LatentDiffusion, evaluation, load_clip
from minisd.data import CaptionedPictures, sample
from minisd.evaluation import judges, run, scores

STYLES = ("noto", "fluent", "noto blob")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Pictures of 40 concepts in three styles each. 15 of the concepts lack one in training, and 12 all three."""
    shipped = sample()
    folder = tmp_path_factory.mktemp("corpus")
    by_concept = {}
    for i, row in enumerate(shipped.rows):
        if row["style"] in STYLES:
            by_concept.setdefault(row["concept"], []).append(i)
    triples = [indices for indices in by_concept.values() if len(indices) == 3][:40]
    chosen = [i for triple in triples for i in triple]
    rows = [dict(shipped.rows[i], split="train", file_name=f"{n}.png") for n, i in enumerate(chosen)]
    for k in range(15):
        rows[3 * k + k % 3]["split"] = "test_pair"
    for row in rows[-36:]:
        row["split"] = "test_concept"
    write(folder, rows, np.stack([shipped.images[i] for i in chosen]))
    return folder


def write(folder, rows, images):
    """A data set of these rows and pictures."""
    for row, image in zip(rows, images, strict=True):
        Image.fromarray(image).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module", autouse=True)
def small_dictionary():
    """So that the judge that is trained apart is ready in a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judges.PatchJudge, "atoms", 64)
        yield


class Oracle(LatentDiffusion):
    """Draws what `answer` says, without any network."""

    def __init__(self, answer):
        torch.nn.Module.__init__(self)
        self.config, self.answer, self.scale_factor = PRESETS["tiny"], answer, 1.0
        self.first_stage_model = torch.nn.Identity()
        self.first_stage_model.encode = self.first_stage_model.decode = lambda x: x

    def txt2img(self, captions, **options):
        return type("Drawing", (), {"pictures": torch.stack([self.answer(c) for c in captions])})


@pytest.fixture(scope="module")
def clip():
    return load_clip("emoji")


@pytest.fixture(scope="module")
def data(corpus):
    return CaptionedPictures(corpus, size=32)


@pytest.fixture(scope="module")
def evaluator(corpus, data, clip):
    """Of a model that draws the real pictures."""
    real = {caption: data[i][0] for i, caption in enumerate(data.captions)}
    return evaluation.Evaluator(Oracle(real.__getitem__), corpus, clip, count=36)


def rows_of(data, split):
    chosen = [i for i, row in enumerate(data.rows) if row["split"] == split]
    return [data.rows[i] for i in chosen], data.batch(chosen)


# --- scores ---------------------------------------------------------------------------------------------------------


def test_a_model_that_draws_the_real_pictures_scores_one_in_every_question(evaluator):
    result = evaluation.evaluate(evaluator)
    assert {(s.split, s.judge) for s in result.scores} >= {
        (split, judge.name) for split in ("train", "test_pair", "test_concept") for judge in evaluator.judges
    }
    for s in result.scores:
        assert s.model == s.real == s.decoded
        assert math.isnan(s.score) or (s.score == pytest.approx(1) and s.error == pytest.approx(0, abs=1e-9))
    known = {(s.split, s.judge, s.question): s for s in result.scores}
    assert known["train", "nearest picture", "concept"].real == 1  # a training picture is its own neighbour
    assert known["test_concept", "nearest picture", "concept"].real > 0.1  # recognised by other artists' pictures
    assert not any(math.isnan(s.score) for s in result.scores if s.split == "train")


def test_a_model_that_does_not_read_scores_zero(corpus, clip, data):
    blind = evaluation.Evaluator(Oracle(lambda caption: data[1][0]), corpus, clip, count=36, groups=("train",))
    for s in blind.scores("train", blind.draw("train")):
        assert s.score == pytest.approx(0, abs=0.1)


def test_the_score_is_between_chance_and_the_real_pictures_and_its_error_shrinks_with_their_number():
    generator = np.random.default_rng(0)

    def measured(n):
        asked = generator.integers(10, size=n)
        found = np.where(generator.random(n) < 0.5, asked, generator.integers(10, size=n))
        hits, real = found[:, None] == asked[None], asked[:, None] == asked[None]
        return scores.score("train", "a judge", "style", hits, real, real, [str(i) for i in range(n)])

    few, many = measured(100), measured(1600)
    assert many.shuffled == pytest.approx(0.1, abs=0.01) and many.real == 1
    assert many.score == pytest.approx(0.5, abs=4 * many.error)
    # a binomial's: the standard deviation of a share of about 0.55 is 0.5/√n, and the scale is 0.9 long
    assert many.error == pytest.approx(0.5 / 40 / 0.9, rel=0.15)
    assert few.error == pytest.approx(4 * many.error, rel=0.3)


def test_pictures_of_one_concept_do_not_count_as_independent():
    hits = np.repeat(np.random.default_rng(0).random(50) < 0.5, 8)
    matrix, real = np.diag(hits), np.eye(400, dtype=bool)
    apart = scores.score("train", "a judge", "concept", matrix, real, real, [str(i) for i in range(400)])
    together = scores.score("train", "a judge", "concept", matrix, real, real, [str(i // 8) for i in range(400)])
    assert apart.score == together.score
    assert together.error == pytest.approx(8**0.5 * apart.error, rel=0.15)


def test_a_judge_that_fails_on_real_pictures_gives_no_score():
    model, names = np.eye(200, dtype=bool), [str(i) for i in range(200)]
    for hits, clear in ((0, False), (4, False), (40, True)):  # of 200; four of them are 2% ± 1%
        real = np.diag(np.arange(200) < hits)
        s = scores.score("train", "a judge", "concept", model, real, real, names)
        assert math.isnan(s.score) == math.isnan(s.error) == (not clear)


# --- judges ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    """Pictures of some 260 concepts in five styles, split as the corpus is that the shipped model was trained on."""
    return sample(32)


def shares(judge, data, split):
    rows, real = rows_of(data, split)
    return {question: hits.diagonal().mean() for question, hits in judge(real, rows).items()}


def test_the_independent_judge_recognises_held_out_pictures(shipped):
    judge = judges.PatchJudge(shipped.rows, shipped.batch(range(len(shipped))))
    known, pairs, concepts = (shares(judge, shipped, split) for split in ("train", "test_pair", "test_concept"))
    assert known["concept"] > 0.9 and known["style"] > 0.7
    assert pairs["concept"] > 0.2 and concepts["concept"] > 0.2  # by chance 1/260
    assert pairs["style"] > 0.4 and concepts["style"] > 0.4  # by chance 1/5


def test_clip_finds_the_caption_of_a_picture_that_it_was_trained_on(shipped, clip):
    judge = judges.ImageTowerJudge(*clip, shipped.rows)
    known, pairs = shares(judge, shipped, "train"), shares(judge, shipped, "test_pair")
    assert known["concept"] > 0.9 and known["R@5"] > 0.9
    assert known["R@5"] >= known["R@1"] > pairs["R@1"] > 0.05  # by chance 1/1,000


@pytest.mark.parametrize("split", ["train", "test_pair", "test_concept"])
def test_a_picture_is_never_compared_with_a_held_out_one_by_the_same_hand(data, split):
    # fluent and fluent flat are by one hand
    library = [dict(row, style={"noto": "fluent flat"}.get(row["style"], row["style"])) for row in data.rows]
    rows = [row for row in library if row["split"] == split]
    asked_for = np.zeros(len(rows), int)
    for asked, others in judges.shown(rows, library):
        asked_for[asked] += 1
        held_out = [library[i] for i in others if library[i]["split"] != "train"]
        assert {row["split"] for row in held_out} == ({"test_concept"} if split == "test_concept" else set())
        assert not {judges._hand(rows[i]) for i in asked} & {judges._hand(row) for row in held_out}
    assert (asked_for == 1).all()


def test_the_nearest_picture_is_found():
    library = torch.rand(20, 768)
    index, distance = evaluation.find_nearest(library[[4, 7]] + 0.01, library)
    assert index.tolist() == [4, 7]
    assert torch.allclose(distance, torch.full((2,), 0.01), atol=1e-3)


def test_the_captions_asked_for_do_not_depend_on_the_order_of_the_corpus(data):
    chosen = [data.rows[i]["file_name"] for i in run.choose(data.rows, 7)]
    backwards = data.rows[::-1]
    assert chosen == [backwards[i]["file_name"] for i in run.choose(backwards, 7)]


# --- distances ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_sets():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    y = torch.randn(400, 24, generator=generator) @ torch.randn(24, 24, generator=generator) + 0.5
    return x, y


def test_the_frechet_distance_is_that_of_torchmetrics(two_sets):
    from torchmetrics.image.fid import FrechetInceptionDistance

    as_is = torch.nn.Identity()
    as_is.num_features = 24
    theirs = FrechetInceptionDistance(feature=as_is).set_dtype(torch.float64)
    theirs.update(two_sets[0], real=False)
    theirs.update(two_sets[1], real=True)
    assert evaluation.frechet_distance(*two_sets) == pytest.approx(float(theirs.compute()), rel=1e-4)
    assert evaluation.frechet_distance(two_sets[0], two_sets[0]) == pytest.approx(0, abs=1e-6)


def test_on_a_line_the_frechet_distance_is_that_of_the_sorted_numbers():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2000, 1, generator=generator), 2 * torch.randn(2000, 1, generator=generator) + 3
    sorted_distance = (x.sort(dim=0).values - y.sort(dim=0).values).square().mean().item()
    by_hand = (x.mean() - y.mean()).square() + (x.std() - y.std()).square()
    assert evaluation.frechet_distance(x, y) == pytest.approx(by_hand.item(), rel=1e-4)
    assert evaluation.frechet_distance(x, y) == pytest.approx(sorted_distance, rel=0.01)


@pytest.mark.filterwarnings("ignore:Metric")
def test_the_kernel_distance_is_that_of_torchmetrics(two_sets):
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = two_sets[0], two_sets[1][:300]
    theirs = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=300)  # one subset: all of it
    theirs.update(x.double(), real=False)
    theirs.update(y.double(), real=True)
    assert evaluation.kernel_distance(x, y) == pytest.approx(float(theirs.compute()[0]), rel=1e-9)


def test_the_kernel_distance_of_equals_is_zero_on_average_and_the_frechet_distance_is_not():
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 100, 20, generator=generator) for _ in range(30)]
    kernel = torch.tensor([evaluation.kernel_distance(*pair) for pair in pairs])
    frechet = torch.tensor([evaluation.frechet_distance(*pair) for pair in pairs])
    assert abs(kernel.mean()) < 3 * kernel.std() / 30**0.5
    assert frechet.min() > 1


def test_the_error_of_a_distance_is_the_spread_of_repetitions_and_the_bias_is_taken_off():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(20_000, 16, generator=generator)
    measured = [
        evaluation.measure_distance("noise", "plain", torch.randn(400, 16, generator=generator) + 0.2, reference)
        for _ in range(12)
    ]
    found = torch.tensor([[d.frechet, d.frechet_infinity, d.frechet_error] for d in measured])
    truth = 16 * 0.2**2
    assert found[:, 0].mean() > truth + 0.1  # at N = 400
    assert found[:, 1].mean() == pytest.approx(truth, abs=0.05)  # at infinity
    assert found[:, 2].mean() == pytest.approx(found[:, 0].std().item(), rel=0.6)


def test_too_few_pictures_get_no_distance():
    x = torch.randn(64, 768)
    with pytest.raises(ValueError, match="768 features needs more than 768 pictures on each side, not 64"):
        evaluation.frechet_distance(x, torch.randn(1000, 768))
    with pytest.raises(ValueError, match="at least 50 pictures on each side, not 10"):
        evaluation.kernel_distance(x, x[:10])
    few = evaluation.measure_distance("noise", "plain", torch.randn(120, 768), torch.randn(800, 768), subsets=2)
    assert few.frechet is None and few.frechet_infinity is None and few.count == 120


# --- copies ---------------------------------------------------------------------------------------------------------


def test_copies_are_found_and_real_held_out_pictures_are_none(data):
    rows, training = rows_of(data, "train")
    _, held_out = rows_of(data, "test_concept")
    library = evaluation.features(training)
    noisy = training + 0.05 * torch.randn(training.shape, generator=torch.Generator().manual_seed(0))
    copied, distance, index = evaluation.nearness("copies", noisy, library)
    assert copied.near == 1 and index.tolist() == list(range(len(training)))
    assert copied.low <= copied.median <= copied.high == pytest.approx(distance.quantile(0.95).item())
    assert evaluation.nearness("held out", held_out, library)[0].near == 0


# --- the whole ------------------------------------------------------------------------------------------------------


def test_words_that_training_knows_are_reported_apart(corpus, clip, tmp_path):
    rows = [json.loads(line) for line in (corpus / "metadata.jsonl").read_text().splitlines()]
    known = next(row["concept"] for row in rows if row["split"] == "train")
    for row in rows[-12:]:
        row["concept"] = known  # held out, and yet in words of training captions
    write(tmp_path, rows, CaptionedPictures(corpus, 32, None).images)
    groups = evaluation.Evaluator(Oracle(None), tmp_path, clip).groups
    assert {row["file_name"] for row in groups["known_words"].rows} >= {row["file_name"] for row in rows[-12:]}
    assert len(groups["known_words"].rows) < len(groups["test_concept"].rows) == 36


def test_the_report_is_a_table_a_file_and_pictures(evaluator, tmp_path, capsys):
    evaluation.report(evaluation.evaluate(evaluator), evaluation.Setting(), tmp_path / "out")
    assert "test_concept" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written >= {"scores.json", "scores.svg", "nearest.svg", "train.png", "test_pair.png", "test_concept.png"}
    record = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert record["setting"]["steps"] == 25 and len(record["scores"]) >= 24 and record["nearness"]


def test_each_drawing_lies_above_its_real_picture(evaluator, tmp_path):
    drawn, real = torch.full((20, 3, 32, 32), -1.0), torch.zeros(20, 3, 32, 32)
    result = replace(evaluation.evaluate(evaluator), drawings={"train": (drawn, real)})
    evaluation.report(result, evaluation.Setting(), tmp_path)
    shown = np.asarray(Image.open(tmp_path / "train.png").convert("L"))
    height, width = shown.shape[0] // 4, shown.shape[1] // 16  # of a cell: sixteen in black, in grey; four more of each
    middles = shown[height // 2 :: height, width // 2 :: width]
    assert middles.tolist() == [[0] * 16, [128] * 16, [0] * 4 + [255] * 12, [128] * 4 + [255] * 12]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("concept"), "must name a concept"),
        (lambda row: row.update(split="train"), "captions of test_pair are needed: .* has 0 such rows"),
        (lambda row: row["style"] != "noto" and row.update(split="train"), "at least 10 captions of test_pair"),
    ],
)
def test_a_corpus_that_cannot_be_evaluated_is_refused(corpus, clip, tmp_path, change, message):
    rows = [json.loads(line) for line in (corpus / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        change(row)
    write(tmp_path, rows, CaptionedPictures(corpus, 32, None).images)
    with pytest.raises(ValueError, match=message):
        evaluation.Evaluator(Oracle(None), tmp_path, clip)
