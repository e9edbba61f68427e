"""Does a model draw what the prompt says? As well as the real pictures? And concepts that it has not seen?

- `scores`: concept and style of what is drawn, as three judges see them, between chance (0) and real pictures (1)
- `judges`: the nearest real picture, CLIP's image tower, and a judge that is trained apart
- `distances`: how far the drawings as a whole are from the pictures: Fréchet distance and MMD, with their errors
- `copies`: are the drawings new, or are they training pictures?
- `run`: `evaluate` does all of it, `sweep` does it over guidance, steps or samplers
- `tables`: what is printed and written: tables, scores.json, pictures
"""

from .copies import Nearness, nearness
from .distances import Distance, frechet_distance, kernel_distance, measure_distance
from .judges import ImageTowerJudge, NearestPicture, PatchJudge, features, find_nearest
from .run import Evaluation, Evaluator, Setting, evaluate, sweep
from .scores import Score, score
from .tables import report, report_sweep

__all__ = [
    "Distance", "Evaluation", "Evaluator", "ImageTowerJudge", "Nearness", "NearestPicture", "PatchJudge", "Score",
    "Setting", "evaluate", "features", "find_nearest", "frechet_distance", "kernel_distance", "measure_distance",
    "nearness", "report", "report_sweep", "score", "sweep",
]  # fmt: skip
