"""What goes into a drawing and what comes out of it: pictures and masks as tensors, trajectories as films."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from .sampling import Step
from .viz import sheet, to_pil


@dataclass(frozen=True)
class Trajectory:
    """All steps of a drawing; decoded to pictures when asked."""

    steps: list[Step]
    decode: Callable[[Tensor], Tensor]  # latents → pictures in [-1, 1]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> Step:
        return self.steps[i]

    def x0_images(self) -> list[list[Image.Image]]:
        """For each step, the pictures that the model has in mind: x_0 as it is predicted there, decoded."""
        return [to_pil(self.decode(step.x0)) for step in self.steps]

    def x_t_images(self) -> list[list[Image.Image]]:
        """For each step, the noisy latents that went in, decoded as if they were clean."""
        return [to_pil(self.decode(step.x_t)) for step in self.steps]

    def save(self, path: str | Path, frame_ms: int = 80, scale: int = 4) -> None:
        """A film of the predictions of x_0, as .webp or .gif; it rests on the last."""
        frames = [sheet(images, scale=scale) for images in self.x0_images()]
        durations = [frame_ms] * (len(frames) - 1) + [20 * frame_ms]
        options = {"lossless": True} if Path(path).suffix == ".webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, **options)


@dataclass(frozen=True)
class Drawing:
    """What `txt2img`, `img2img` and `inpaint` return."""

    trajectory: Trajectory

    @cached_property
    def pictures(self) -> Float[Tensor, "b c H W"]:
        """The pictures as a tensor, in about [-1, 1]."""
        return self.trajectory.decode(self.trajectory[-1].x)

    @cached_property
    def images(self) -> list[Image.Image]:
        """The pictures as PIL images."""
        return to_pil(self.pictures)


Picture = Image.Image | str | Path | Tensor  # as PIL has it, in a file, or as numbers


def read_picture(
    image: Picture, height: int | None = None, width: int | None = None
) -> Float[Tensor, "b c H W"]:
    """A PIL image or the path of one, resized where a size is given; or [c H W] or [b c H W] → pictures in [-1, 1].

    Raises:
        ValueError: a tensor of another shape, or with other values. OSError: no file of a picture there.
    """
    if not isinstance(image, Tensor):
        image = _opened(image)
        if image.has_transparency_data:  # what is transparent is seen on white paper
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        if height or width:
            image = image.resize((width or image.width, height or image.height), Image.Resampling.LANCZOS)
        return _pixels(image.convert("RGB")).permute(2, 0, 1)[None] / 127.5 - 1  # 0 … 255 → -1 … 1
    if image.ndim not in (3, 4):
        raise ValueError(f"image must be an image, a path, or a tensor [c H W] or [b c H W], not {list(image.shape)}")
    if not -1.01 <= image.min() <= image.max() <= 1.01:
        raise ValueError(f"a picture has values in [-1, 1], and this tensor in [{image.min():.3g}, {image.max():.3g}]")
    return image.float().reshape(-1, *image.shape[-3:])


def read_mask(mask: Picture, height: int, width: int) -> Float[Tensor, "b 1 H W"]:
    """A PIL image of any size or its path, or [H W] or [b 1 H W] in [0, 1] → 1 where it is white (0.5 or more), else 0.

    Raises:
        ValueError: a tensor of another size, or a mask that is black everywhere. OSError: no file of a picture there.
    """
    if not isinstance(mask, Tensor):
        grey = _opened(mask).convert("L").resize((width, height), Image.Resampling.NEAREST)
        mask = _pixels(grey)[..., 0] / 255
    if tuple(mask.shape[-2:]) != (height, width):
        raise ValueError(f"mask must have the picture's size, {height}x{width}, not {list(mask.shape)}")
    mask = (mask.reshape(-1, 1, height, width) >= 0.5).float()
    if not mask.any():
        raise ValueError("the mask is black everywhere: there is nothing to draw (white is what is drawn anew)")
    return mask


def _pixels(image: Image.Image) -> UInt8[Tensor, "H W c"]:
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.reshape(image.height, image.width, -1)


def _opened(image: Image.Image | str | Path) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.open(image)
