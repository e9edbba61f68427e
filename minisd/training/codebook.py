"""A codebook in use: which codes are chosen, and what happens to those that never are.

A code learns from the vectors that choose it. One that lies where no vectors are is never chosen, so it never moves: it
is dead, and a codebook may collapse to a handful of codes. The remedy is that of Jukebox (Dhariwal et al. 2020,
arXiv:2005.00341, section 3.1): put each dead code onto a vector of the encoder, which then chooses it.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..data import CaptionedPictures
from ..vq import VQModelInterface
from .engine import Engine

PER_CODE = 16  # so many vectors are looked at for each code; a code that none of them chooses is called dead


@torch.no_grad()
def revive_dead_codes(
    vae: VQModelInterface, data: CaptionedPictures, mean_codes: Float[Tensor, "n d"], seed: list[int], engine: Engine
) -> int:
    """Look at some pictures, and put each code that none of their vectors chooses onto one of these vectors.

    Nothing is remembered from step to step, so that a run that was interrupted goes on as if it had not been.

    Args:
        mean_codes: the running mean of the codes (EMA). It is moved as well, because it would take long to follow.
        seed: of the choice of pictures and vectors.

    Returns how many codes were moved.
    """
    random, codes = np.random.default_rng(seed), vae.quantize.embedding.weight
    a_picture = (data.size // vae.config.downsampling) ** 2  # the vectors of one picture: h · w
    count = min(len(data), -(-PER_CODE * len(codes) // a_picture))
    h = vectors_of(vae, data, torch.from_numpy(random.choice(len(data), count, replace=False)), engine)
    # A code is dead if it is the nearest one to no vector of these pictures.
    dead = vae.quantize.usage(vae.quantize.nearest(h)) == 0
    vectors = h.movedim(1, -1).flatten(0, -2)
    drawn = vectors[torch.from_numpy(random.integers(len(vectors), size=int(dead.sum()))).to(vectors.device)]
    moved = torch.stack([codes, mean_codes])
    moved[:, dead] = drawn
    # All processes look at the same pictures. If one of them rounds differently, the first one counts.
    for ours, given in zip((codes, mean_codes), engine.gather(moved[None])[0], strict=True):
        ours.copy_(given)
    return len(drawn)


@torch.no_grad()
def vectors_of(
    vae: VQModelInterface, data: CaptionedPictures, indices: Int[Tensor, "n"], engine: Engine
) -> Float[Tensor, "n d h w"]:
    """The encoder's answers to these pictures, before they are quantised."""
    return torch.cat([vae.encode(data.batch(part).to(engine.device)) for part in indices.split(64)])


def measure_codebook(vae: VQModelInterface, data: CaptionedPictures, engine: Engine) -> dict[str, float]:
    """How many codes all pictures together use, and their perplexity."""
    indices = vae.quantize.nearest(vectors_of(vae, data, torch.arange(len(data)), engine))
    used = (vae.quantize.usage(indices) > 0).sum()
    return {"codes": int(used), "perplexity": float(vae.quantize.perplexity(indices))}
