"""Pictures as files, pixel by pixel: tensors to PIL images, and sheets of many."""

from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor


def to_pil(x: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """Pictures in [-1, 1] (clamped) → PIL images."""
    pixels = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(p) for p in rearrange(pixels, "b c h w -> b h w c").numpy()]


def sheet(images: list[Image.Image], columns: int | None = None, gap: int = 2, scale: int = 1) -> Image.Image:
    """Images of one size side by side, on white, row by row. `scale` enlarges each pixel to a square."""
    columns = columns or len(images)
    width, height = (scale * n for n in images[0].size)
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        page.paste(image.resize((width, height), Image.NEAREST), (column * (width + gap), row * (height + gap)))
    return page


def save_sheet(x: Float[Tensor, "b 3 h w"], path: str | Path, columns: int, scale: int = 2) -> None:
    """Write a sheet of pictures in [-1, 1] as PNG, making the folder if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet(to_pil(x), columns, scale=scale).save(path)
