"""Exercises on every stage, with a checker that names the mistake.

    from minisd.coursework import check, swap

    def q_sample(x_0, t, noise, alphas_cumprod): ...

    check.q_sample(q_sample)         # "right", or which mistake it is
    with swap("q_sample", q_sample): # and minisd runs with it
        ...

    python -m minisd.coursework list | show q_sample | check my_answers.py | export FOLDER

A module of the name of each stage holds its exercises, and the TOML file beside it what is said in them;
docs/coursework.md is for teachers. `minisd.coursework` is another name of this package. It is no part of `import
minisd`: it is imported by those who want it.
"""

from . import noising, loss, unet, vae, clip, sampling, latent_diffusion  # noqa: F401, I001  the stages, in their order
from .check import check
from .exercise import EXERCISES, STAGES, Exercise, find, swap
from .judge import Verdict, judge
from .mutants import check_tables
from .picture import draw
from .texts import Mistake, check_sentences

__all__ = ["EXERCISES", "STAGES", "Exercise", "Mistake", "Verdict", "check", "draw", "find", "judge", "swap"]

check_sentences()
check_tables()
