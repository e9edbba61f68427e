"""How many steps are enough, with which sampler, and how much guidance? python -m benchmarks.steps

    python -m benchmarks.steps --data data/emoji --count 100 --out outputs/steps

For captions of held-out pairs, from the same noise with every setting. Two measures for each sampler and number of
steps: how well the judges recognise the drawings (a score of 1: as well as real pictures), and how far the drawings are
from where the sampler ends with very many steps. For the samplers without fresh noise this is the solution of one
differential equation, so it is drawn once, by 200 steps of DDIM. A sampler with fresh noise has no such limit.

OUT gets steps.json with all figures, steps.png with the curves, and a sheet of drawings for each sampler.
"""

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch

import minisd
from minisd import evaluation, viz
from minisd.sampling import SAMPLERS

STEPS = (2, 3, 5, 8, 12, 16, 25, 50)
GUIDANCE = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
LIMIT = evaluation.Setting(steps=200, sampler="ddim")
STOCHASTIC = {"ddpm", "euler_ancestral"}
SHOWN = 12  # drawings in a row of a sheet


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji", help="a model, as `minisd evaluate --model` takes it")
    parser.add_argument("--clip", help="whose image tower is one of the judges; the model's, if left out")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="the corpus that it was trained on")
    parser.add_argument("--count", type=int, default=100, help="how many captions")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--guidance", type=float, nargs="+", default=GUIDANCE, help="scales, for 25 steps of dpmpp_2m")
    parser.add_argument("--device", help="cuda, mps or cpu")
    parser.add_argument("--out", type=Path, default=Path("outputs/steps"))
    return parser.parse_args(argv)


def measured(evaluator: evaluation.Evaluator, drawn: torch.Tensor, limit: torch.Tensor | None) -> dict[str, float]:
    """The mean score of the judges for each question, its error, and the distance to the limit in gray levels.

    A judge that does not recognise the real pictures of so few captions has no score.
    """
    found, scores = {}, evaluator.scores("test_pair", drawn)
    for question in ("concept", "style"):
        asked = [score for score in scores if score.question == question and not math.isnan(score.error)]
        if asked:
            found[question] = sum(score.score for score in asked) / len(asked)
            found[f"{question} ±"] = max(score.error for score in asked)  # the judges see the same drawings
    if limit is not None:
        found["distance"] = 127.5 * (drawn - limit).square().mean().sqrt().item()
    return found


def main(argv: list[str] | None = None) -> dict:
    options = arguments(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    sd, clip = minisd.load(options.model, options.device), minisd.load_clip(options.clip or options.model)
    evaluator = evaluation.Evaluator(sd, options.data, clip, options.count, groups=("test_pair",))
    limit, results = evaluator.draw("test_pair", LIMIT), {"samplers": {}, "guidance": {}}

    heads = "".join(f"{steps:>18}" for steps in options.steps)
    print(f"concept, style, distance to 200 steps\n{'steps':<16}{heads}")
    for sampler in options.samplers:
        found, rows = results["samplers"].setdefault(sampler, {}), []
        for steps in options.steps:
            drawn = evaluator.draw("test_pair", evaluation.Setting(steps=steps, sampler=sampler))
            found[steps] = measured(evaluator, drawn, None if sampler in STOCHASTIC else limit)
            rows.append(drawn[:SHOWN])
        viz.save_sheet(torch.cat([*rows, limit[:SHOWN]]), options.out / f"{sampler}.png", columns=len(rows[0]))
        print(f"{sampler:<16}" + "".join(f"{cell(values):>18}" for values in found.values()), flush=True)

    print(f"\n{'guidance':<16}" + "".join(f"{scale:>18}" for scale in options.guidance))
    for scale in options.guidance:
        drawn = evaluator.draw("test_pair", replace(evaluation.Setting(), guidance_scale=scale))
        results["guidance"][scale] = measured(evaluator, drawn, None)
    print(f"{'dpmpp_2m':<16}" + "".join(f"{cell(values):>18}" for values in results["guidance"].values()))

    record = {"model": options.model, "count": options.count, "limit": asdict(LIMIT)} | results
    (options.out / "steps.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    figure(results["samplers"]).savefig(options.out / "steps.png", dpi=200)
    return record


def cell(values: dict[str, float]) -> str:
    return ", ".join(f"{values[name]:.2f}" for name in ("concept", "style", "distance") if name in values) or "-"


def figure(samplers: dict[str, dict[int, dict[str, float]]]):
    """Curves over the number of steps: the score for the concept, and the distance to the limit."""
    titles = {"concept": "recognised (1: as real pictures)", "distance": "distance to 200 steps (of 255)"}
    panels = {
        title: {
            sampler: (list(found), [values[name] for values in found.values()])
            for sampler, found in samplers.items()
            if all(name in values for values in found.values())
        }
        for name, title in titles.items()
    }
    return viz.curves(panels, xlabel="steps", log=[titles["distance"]], width=4.0, height=3.0)


if __name__ == "__main__":
    main()
