"""How long the training loop keeps the program busy in a step, beside the networks: python -m benchmarks.host

While the program prepares a batch, a GPU may have nothing to do. So this measures what a step of `train_unet` costs
apart from the networks: the samples of the batch and all random numbers for latents of 16x16x4, which a second thread
draws while the step before is computed, and `Trainer.update` with a network of one weight. No GPU is needed.
"""

import tempfile
import time

import torch
from torch import nn

from minisd.training import Recipe, SingleDevice, Trainer

GOALS = {256: 1.0, 1024: 2.0}  # milliseconds to have a batch and its random numbers, by the batch size
STEPS, LATENT = 60, (4, 16, 16)


def milliseconds(batch_size: int) -> dict[str, float]:
    """The shortest times of a step: for the batch and its numbers, for `update`, and of the second thread."""
    times = {"batch": [], "update": [], "second thread": []}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(steps=STEPS, batch_size=batch_size, log_every=STEPS, save_every=STEPS)
        trainer = Trainer(nn.Linear(1, 1, bias=False), recipe, folder, SingleDevice("cpu"))
        trainer._reads_each_step = False  # as on a GPU
        for _ in trainer.steps():
            began = time.perf_counter()
            for batch in trainer.batches(10_000):
                # what `train_unet` draws: the form of the caption, t, whether to drop it, ε, and a sample of q(z|x)
                batch.randint(4), batch.randint(1000), batch.rand(), batch.randn(*LATENT), batch.randn(*LATENT)
                drew = time.perf_counter()
                trainer.backward(trainer.model(torch.ones(1, 1)).mean())
                waiting = time.perf_counter()
                for numbers in trainer._ahead.values():  # a GPU would compute meanwhile
                    numbers.result()
            computed = time.perf_counter()
            trainer.update()
            times["batch"].append(drew - began)
            times["update"].append(time.perf_counter() - computed)
            times["second thread"].append(computed - waiting)
    # without the first steps, whose numbers nobody could draw in advance, and the last, which is logged
    return {name: 1000 * min(values[3:-1]) for name, values in times.items()}


def main() -> None:
    print("milliseconds:   batch  (goal)   update   second thread")
    for batch_size, goal in GOALS.items():
        shortest = milliseconds(batch_size)
        batch, update, second = shortest.values()
        print(f"batch of {batch_size:5} {batch:7.2f} {goal:7.1f} {update:8.2f} {second:15.2f}")


if __name__ == "__main__":
    main()
