"""Read pictures, convert them to tensors and back, lay them out on sheets, and keep all steps of a drawing.

open_picture      a file, its bytes, a PIL image or an array → an upright RGB image without transparency: the one
                  place where minisd reads a picture
read_picture      the same, or a tensor → [b c H W] in [-1, 1], as the autoencoder takes it
read_mask         a picture in black and white → [b 1 H W], 1 where something new is drawn
to_pil, sheet     tensors → PIL images, and many of them on one page
Drawing           what `txt2img`, `img2img` and `inpaint` return, with the `Trajectory` that led to it
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Picture = Image.Image | str | Path | np.ndarray | Tensor  # a PIL image, the path of a file, or numbers
# What PIL decodes by itself. For other formats it may start a program, such as Ghostscript for EPS.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")


# --- reading ----------------------------------------------------------------------------------------------------------


def open_picture(source: Image.Image | str | Path | bytes | np.ndarray, background: str = "white") -> Image.Image:
    """A PIL image, the path of a file, the bytes of one or an array → an RGB image: upright, 8 bits, not transparent.

    Args:
        source: of an animation, the first frame is taken. An array is [H W] or [H W c] with 1, 3 or 4 channels (grey,
            RGB, RGBA), of uint8, of bool, or of floats in [0, 1].
        background: the colour that is seen through what is transparent.

    Raises:
        OSError: there is no such file, or it holds no picture that can be read. ValueError: an array of another kind.
    """
    if isinstance(source, np.ndarray):
        source = _from_array(source)
    name = f"{source}: " if isinstance(source, str | Path) else ""
    # A pipe or a device is no file. Reading it could wait for ever.
    if name and not Path(source).is_file():
        raise FileNotFoundError(f"{name}{'not a file' if Path(source).exists() else 'the file is missing'}")
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source, background)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as opened:
            return _upright_rgb(opened, background)
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, struct.error, DecompressionBombError
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"its format is none of {', '.join(FORMATS)}"
        empty = source == b"" or name and not Path(source).stat().st_size
        raise OSError(name + ("the file is empty" if empty else f"not a readable picture ({reason})")) from error


def _from_array(array: np.ndarray) -> Image.Image:
    pixels = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if pixels.dtype.kind in "bf" and pixels.size and pixels.min() >= 0 and pixels.max() <= 1:
        pixels = (pixels * 255.0).round().astype(np.uint8)
    if pixels.dtype != np.uint8 or not pixels.size or (pixels.ndim != 2 and pixels.shape[2:] not in ((3,), (4,))):
        kinds = "[H W], [H W 1], [H W 3] or [H W 4] of uint8, of bool or of floats in [0, 1]"
        raise ValueError(f"an array must be {kinds}, and this one is {list(array.shape)} of {array.dtype}")
    return Image.fromarray(pixels)


def _upright_rgb(picture: Image.Image, background: str) -> Image.Image:
    if not all(picture.size):
        raise ValueError("it has no pixels")
    # Cameras and phones save what the sensor saw, and note in the EXIF data how the picture is to be turned.
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        # 16 bits a pixel: divide by 257 = 65535 / 255, because PIL would clip everything above 255 to white.
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    elif picture.mode == "F" and picture.getextrema()[1] <= 1:
        picture = _from_array(np.asarray(picture))  # floats from 0 to 1; PIL expects them from 0 to 255
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
    return picture.convert("RGB")


def read_picture(image: Picture, height: int | None = None, width: int | None = None) -> Float[Tensor, "b c H W"]:
    """A picture as the model takes it: values in [-1, 1], the channels first.

    Args:
        image: a PIL image, the path of one or an array as in `open_picture`, which is resized if a size is given; or a
            tensor [c H W] or [b c H W] in [-1, 1], which is not resized.

    Raises:
        ValueError: a tensor of another shape, or with other values. OSError: as in `open_picture`.
    """
    if isinstance(image, Tensor):
        if image.ndim not in (3, 4) or not image.numel():
            raise ValueError(f"image must be an image, path, or tensor [c H W] or [b c H W], not {list(image.shape)}")
        if not -1.01 <= image.min() <= image.max() <= 1.01:
            spans = f"[{image.min():.3g}, {image.max():.3g}]"
            raise ValueError(f"a picture has values in [-1, 1], and this tensor in {spans}")
        return image.float().reshape(-1, *image.shape[-3:])
    picture = open_picture(image)
    if height or width:
        picture = picture.resize((width or picture.width, height or picture.height), Image.Resampling.LANCZOS)
    return rearrange(torch.from_numpy(np.array(picture)), "H W c -> 1 c H W").float() / 127.5 - 1  # 0 … 255 → -1 … 1


def read_mask(mask: Picture, height: int, width: int) -> Float[Tensor, "b 1 H W"]:
    """A mask for `inpaint`: 1 where it is white (0.5 or more) and a new picture is drawn, 0 where the old one is kept.

    Args:
        mask: a PIL image of any size, the path of one or an array as in `open_picture`, whose transparent part counts
            as black; or a tensor [H W] or [b 1 H W] in [0, 1].
        height, width: of the picture that it lies on.

    Raises:
        ValueError: a tensor of another size, or a mask that is black everywhere. OSError: as in `open_picture`.
    """
    if not isinstance(mask, Tensor):
        grey = open_picture(mask, background="black").convert("L")
        nearest = grey.resize((width, height), Image.Resampling.NEAREST)
        whole, mask = ((torch.from_numpy(np.array(part)) >= 128).float()[None] for part in (grey, nearest))
        # Where a large mask is made smaller, NEAREST jumps over thin strokes. What it jumped over is found again.
        near = F.max_pool2d(mask, 3, stride=1, padding=1)
        mask = torch.maximum(mask, F.adaptive_max_pool2d(whole, (height, width)) * (1 - near))
    if tuple(mask.shape[-2:]) != (height, width) or not mask.numel():
        raise ValueError(f"mask must have the picture's size, {height}x{width}, not {list(mask.shape)}")
    mask = (mask.reshape(-1, 1, height, width) >= 0.5).float()
    if not mask.flatten(1).any(1).all():
        raise ValueError("the mask is black everywhere, or transparent: there is nothing to draw (white is drawn anew)")
    return mask


# --- writing ----------------------------------------------------------------------------------------------------------


def to_pil(x: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """Pictures in [-1, 1] → PIL images. Values outside are clamped: a decoder may overshoot a little."""
    pixels = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in rearrange(pixels, "b c h w -> b h w c").numpy()]


def sheet(images: list[Image.Image], columns: int | None = None, gap: int = 2, scale: int = 1) -> Image.Image:
    """Images of one size side by side on a white page, row by row. `scale` enlarges each pixel to a square."""
    columns = columns or len(images)
    width, height = (scale * side for side in images[0].size)
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        enlarged = image.resize((width, height), Image.Resampling.NEAREST)
        page.paste(enlarged, (column * (width + gap), row * (height + gap)))
    return page


def save_sheet(x: Float[Tensor, "b 3 h w"], path: str | Path, columns: int, scale: int = 2) -> None:
    """Write a sheet of pictures in [-1, 1] as PNG, and make its folder if there is none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet(to_pil(x), columns, scale=scale).save(path)


# --- what drawing returns ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trajectory:
    """All steps of a drawing. They hold latents, which are decoded to pictures only when you ask for those."""

    steps: list  # a `sampling.Step` for each; typed as a list, so that this module imports no other
    decode: Callable[[Tensor], Tensor]  # latents → pictures in [-1, 1]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int):
        return self.steps[i]

    def x0_images(self) -> list[list[Image.Image]]:
        """For each step, the estimates x̂_0 of the final pictures, decoded: first a blur, then more and more detail."""
        return [to_pil(self.decode(step.x0)) for step in self.steps]

    def x_t_images(self) -> list[list[Image.Image]]:
        """For each step, the noisy latents x_t that went in, decoded as if they were clean."""
        return [to_pil(self.decode(step.x_t)) for step in self.steps]

    def save(self, path: str | Path, frame_ms: int = 80, scale: int = 4) -> None:
        """Write the estimates x̂_0 as a film, .webp or .gif. The last frame is shown twenty times as long."""
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
