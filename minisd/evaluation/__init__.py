"""Evaluation: does a model draw what the prompt says, how close is it to real pictures, and does it generalise?

- `scores`: how often concept and style are recognised in the drawings, from 0 (chance) to 1 (real pictures)
- `judges`: three classifiers: the nearest real picture, CLIP's image tower, and one that is trained only for this
- `composition`: the same for scenes: which things, where, in which colours
- `distances`: between the distributions of drawings and pictures: Fréchet and MMD, with their errors; and from each
  drawing to the nearest training picture, to find copies
- `run`: `evaluate` computes all of it; an `Evaluator` draws for one group of captions and measures its drawings
- `tables`: the output: printed tables, scores.json, pictures
"""

from .composition import evaluate_composition
from .distances import Distance, Nearness, frechet_distance, kernel_distance, measure_distance, nearness
from .judges import ImageTowerJudge, NearestPicture, PatchJudge, features, find_nearest
from .run import Evaluation, Evaluator, Setting, evaluate
from .scores import Score, score
from .tables import report
