"""Dead codes: finding the codes of a VQModel that are never chosen, and moving them to where they will be.

A code gets a gradient only from the encoder's vectors that choose it, those to which it is the nearest code. A code far
from all vectors is never chosen, so it never moves: it is dead. A codebook can collapse to a handful of codes in this
way. The remedy is that of Jukebox (Dhariwal et al. 2020, arXiv:2005.00341, section 3.1): set each dead code to one of
the encoder's vectors, which will then choose it.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..data import Corpus
from ..vq import VQModelInterface
from .engine import Engine

PER_CODE = 16  # vectors of the encoder for each code in the search; a code that none of them chooses counts as dead


@torch.no_grad()
def revive_dead_codes(
    vae: VQModelInterface, data: Corpus, mean_codes: Float[Tensor, "n d"], seed: list[int], engine: Engine
) -> int:
    """Encode some pictures, and set each code that none of their vectors chooses to a random one of these vectors.

    Jukebox counts usage over many steps. Here nothing is kept between steps, so an interrupted run continues exactly.

    Args:
        mean_codes: the running mean of the codes (EMA). It is set as well, because it would follow only slowly.
        seed: for the random choice of pictures and vectors.

    Returns how many codes were moved.
    """
    random, codes = np.random.default_rng(seed), vae.quantize.embedding.weight
    a_picture = (data.size // vae.config.downsampling) ** 2  # number of vectors in one picture: h · w
    count = min(len(data), -(-PER_CODE * len(codes) // a_picture))
    h = vectors_of(vae, data, torch.from_numpy(random.choice(len(data), count, replace=False)), engine)
    # A code is dead if it is not the nearest code of any vector of these pictures.
    dead = vae.quantize.usage(vae.quantize.nearest(h)) == 0
    vectors = h.movedim(1, -1).flatten(0, -2)
    chosen = vectors[torch.from_numpy(random.integers(len(vectors), size=int(dead.sum()))).to(vectors.device)]
    moved = torch.stack([codes, mean_codes])
    moved[:, dead] = chosen
    # All processes encode the same pictures, but their rounding may differ. So all take the result of the first one.
    for ours, given in zip((codes, mean_codes), engine.gather(moved[None])[0], strict=True):
        ours.copy_(given)
    return len(chosen)


@torch.no_grad()
def vectors_of(
    vae: VQModelInterface, data: Corpus, indices: Int[Tensor, "n"], engine: Engine
) -> Float[Tensor, "n d h w"]:
    """The encoder's output for these pictures, before it is quantised."""
    return torch.cat([vae.encode(data.batch(part).to(engine.device)) for part in indices.split(64)])


def measure_codebook(vae: VQModelInterface, data: Corpus, engine: Engine) -> dict[str, float]:
    """How many codes are used by all pictures together, and the perplexity of their frequencies."""
    indices = vae.quantize.nearest(vectors_of(vae, data, torch.arange(len(data)), engine))
    used = (vae.quantize.usage(indices) > 0).sum()
    return {"codes": int(used), "perplexity": float(vae.quantize.perplexity(indices))}
