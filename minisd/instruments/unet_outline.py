"""A UNet as a table: the layers of each block, its input and output shapes, and where its skip connection comes from.

    for block in outline(UNetConfig(), size=64):
        print(block.name, block.layers, block.shape_in, block.shape_out)

`viz.unet_diagram` draws the table as a U.
"""

import re
from typing import NamedTuple

import torch

from ..unet import UNetConfig, UNetModel


class BlockOutline(NamedTuple):
    """One block of a UNet. Shapes are (channels, height, width)."""

    name: str  # as in the checkpoint: "input_blocks.1"
    layers: tuple[str, ...]  # the class of each layer in it
    shape_in: tuple[int, int, int]  # for an output block, including the channels of its skip connection
    shape_out: tuple[int, int, int]
    skip: str  # the input block whose output is concatenated to this block's input, or ""
    parameters: int


@torch.no_grad()
def outline(config: UNetConfig = UNetConfig(), size: int = 64) -> list[BlockOutline]:  # noqa: B008, it is frozen
    """The blocks of a UNet in the order of its forward pass, for latents of `size` by `size` pixels.

    The UNet is built and run on torch's "meta" device, where tensors have shapes but no numbers. So this also works for
    a UNet that does not fit into the memory of your computer.
    """
    with torch.device("meta"):
        unet = UNetModel(config)
        x, t = torch.empty(1, config.in_channels, size, size), torch.empty(1, dtype=torch.int64)
        context = None if config.context_dim is None else torch.empty(1, 1, config.context_dim)
    blocks = r"\w+_blocks\.\d+|middle_block|out"
    names = {block: name for name, block in unet.named_modules() if re.fullmatch(blocks, name)}
    skips = [f"input_blocks.{i}" for i in range(len(unet.input_blocks))]  # the last is used first
    outlines = []

    def watch(block, args, out):
        layers = tuple(type(layer).__name__ for layer in block)
        shapes = tuple(args[0].shape[1:]), tuple(out.shape[1:])
        skip = skips.pop() if names[block].startswith("output_blocks") else ""
        outlines.append(BlockOutline(names[block], layers, *shapes, skip, sum(p.numel() for p in block.parameters())))

    for block in names:
        block.register_forward_hook(watch)
    unet(x, t, context)
    return outlines
