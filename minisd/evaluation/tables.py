"""The output of an evaluation: tables in the terminal, and scores.json and pictures in a folder."""

import math
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from ..checkpoint import write_json
from ..viz import histograms, save_sheet, with_errors
from .distances import COPY
from .run import Evaluation, Setting

COLUMNS = 16  # pictures in a row of a sample sheet


def report(result: Evaluation, setting: Setting, folder: str | Path | None = None) -> None:
    """Print the tables; with a folder, also write scores.json and pictures. For scenes, it is composition.json."""
    heads = f"{'count':>6}{'model':>8}{'real':>8}{'decoded':>9}{'shuffled':>10}{'score':>15}"
    print(f"{'captions':<14}{'judge':<17}{'question':<10}{heads}")
    for s in result.scores:
        shares = f"{s.model:>8.3f}{s.real:>8.3f}{s.decoded:>9.3f}{s.shuffled:>10.3f}"
        value = "-" if math.isnan(s.score) else f"{s.score:.2f} ± {s.error:.2f}"
        print(f"{s.split:<14}{s.judge:<17}{s.question:<10}{s.count:>6}{shares}{value:>15}")
    if result.distances:
        print(f"\n{'distance from training':<26}{'features':<12}{'N':>6}{'Fréchet':>18}{'at N = ∞':>10}{'MMD²':>20}")
    for d in result.distances:
        frechet, infinity = f"needs N > {d.dimension}", "-"
        if d.frechet is not None:
            frechet, infinity = f"{d.frechet:.2f} ± {d.frechet_error:.2f}", f"{d.frechet_infinity:.2f}"
        mmd = f"{d.mmd:.4f} ± {d.mmd_error:.4f}"
        print(f"{d.what:<26}{d.features:<12}{d.count:>6}{frechet:>18}{infinity:>10}{mmd:>20}")
    if result.nearness:
        print(f"\n{'nearest training picture':<26}{'count':>7}{f'< {COPY}':>9}{'5%':>8}{'median':>8}{'95%':>8}")
    for n in result.nearness:
        print(f"{n.what:<26}{n.count:>7}{n.near:>9.1%}{n.low:>8.3f}{n.median:>8.3f}{n.high:>8.3f}")
    if folder is not None:
        _write(result, setting, Path(folder))
        print(f"wrote {folder}")


def _write(result: Evaluation, setting: Setting, folder: Path) -> None:
    none = {"error": None, "score": None}  # null in JSON, which does not have NaN
    scores = [asdict(s) | (none if math.isnan(s.score) else {"score": s.score}) for s in result.scores]
    distances = [asdict(d) for d in result.distances]
    record = {"setting": asdict(setting), "scores": scores, "distances": distances}
    if result.nearness:
        write_json(record | {"nearness": [asdict(n) for n in result.nearness]}, folder / "scores.json")
        panels: dict = {"concept": {}, "style": {}}  # for each judge, its score and error in each group
        for s in result.scores:
            if s.question in panels:
                panels[s.question].setdefault(s.judge, []).append((s.score, s.error))
        panels = {question: judges for question, judges in panels.items() if judges}
        groups = list(dict.fromkeys(s.split for s in result.scores))
        figure = with_errors(panels, groups, ylabel="score", lines=False, marks=(0, 1))
        figure.savefig(folder / "scores.svg")
        panel = {"distance to the nearest training picture": result.to_training}
        histograms(panel, bins=40, width=7.5, height=3.0).savefig(folder / "nearest.svg")
    else:
        write_json(record, folder / "composition.json")
    # A sheet for each group: drawings, and below each the real picture of its caption. Rows are filled up with white.
    for name, (drawn, real) in result.drawings.items():
        parts = zip(drawn[:64].split(COLUMNS), real[:64].split(COLUMNS), strict=True)
        rows = [F.pad(row, (0, 0, 0, 0, 0, 0, 0, COLUMNS - len(row)), value=1.0) for pair in parts for row in pair]
        save_sheet(torch.cat(rows), folder / f"{name}.png", columns=COLUMNS)
    for what, pairs in result.nearest.items():
        save_sheet(pairs, folder / f"nearest_{what.replace(', ', '_')}.png", columns=len(pairs) // 2)
