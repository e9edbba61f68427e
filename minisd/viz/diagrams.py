"""The model as boxes: the UNet's blocks, a step of training, how a picture is drawn, and the classes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .page import empty_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What the boxes of the diagrams are filled with: pale, so that black letters stand out.
_FILLS = {"text": "#FBE3C8", "unet": "#D3E6F3", "vae": "#D5EFE6", "sampler": "#F3DDE9", "plain": "white", "": "#F0F0F0"}


def unet_diagram(blocks: Sequence, title: str = "") -> "Figure":
    """The U: down on the left, up on the right, dashed what is handed across, each at the height of its source.

    blocks: what `minisd.instruments.unet_outline.outline` returns. A box says what is in a block, and the channels and
    the size of what comes out of it. Blue: with attention. On a dashed line: the channels that are joined to what comes
    from below.
    """
    down = [block for block in blocks if block.name.startswith("input_blocks")]
    up = {block.skip: block for block in blocks if block.skip}
    middle, out = ([b for b in blocks if b.name == name][0] for name in ("middle_block", "out"))
    sides = sorted({block.shape_out[-1] for block in down}, reverse=True)  # of the maps, the largest first
    row, tall, wide, step = 0.34, 0.27, 2.75, 0.16  # inches; each level stands a step further in
    width, head = 2 * wide + 2.7, 0.5 if title else 0.3
    height = head + row * (len(down) + 1)
    figure, axes = _canvas(width, height)
    axes.text(width / 2, height - 0.15, title, ha="center", va="center", fontsize=9)
    short = {"Conv2d": "conv", "ResBlock": "Res", "SpatialTransformer": "Transformer", "AttentionBlock": "Attention",
             "Downsample": "Down", "Upsample": "Up"}  # fmt: skip

    def draw(block, x: float, y: float) -> None:
        attends = {"SpatialTransformer", "AttentionBlock"} & set(block.layers)
        _box(axes, x, y, wide, tall, "", "unet" if attends else "")
        place = block.name.split(".")[1] if "." in block.name else "middle"
        style = {"va": "center", "fontsize": 7.5}
        axes.text(x + 0.06, y + tall / 2, place, color="0.35", **style)
        axes.text(x + wide / 2 - 0.1, y + tall / 2, " + ".join(short[la] for la in block.layers), ha="center", **style)
        channels, h, w = block.shape_out
        axes.text(x + wide - 0.06, y + tall / 2, f"{channels}, {h}×{w}", ha="right", **style)

    y = height - head
    for x, ha, name, (channels, h, w) in ((0, "left", "x → input_blocks", down[0].shape_in),
                                          (width, "right", "output_blocks → out", out.shape_out)):  # fmt: skip
        axes.text(x, y + 0.12, f"{name}   ({channels}, {h}×{w})", ha=ha, va="center", fontsize=8, color="0.35")
    for block in down:
        y -= row
        inset = step * sides.index(block.shape_out[-1])
        left, right = inset + wide, width - inset - wide  # where the line across begins and ends
        draw(block, inset, y)
        draw(up[block.name], right, y)
        _arrow(axes, (left, y + tall / 2), (right, y + tall / 2), str(block.shape_out[0]), dashed=True)
        if block is not down[-1]:
            _arrow(axes, (inset + 0.3, y), (inset + 0.3, y - row + tall))
            _arrow(axes, (width - inset - 0.3, y - row + tall), (width - inset - 0.3, y))
    draw(middle, (width - wide) / 2, y - row)
    _path(axes, [(inset + 0.3, y), (inset + 0.3, y - row + tall / 2), ((width - wide) / 2, y - row + tall / 2)], "")
    end = width - inset - 0.3
    _path(axes, [((width + wide) / 2, y - row + tall / 2), (end, y - row + tall / 2), (end, y)], "")
    return figure


def training_diagram() -> "Figure":
    """One training step of Stable Diffusion: three inputs, three networks of which one is trained, and the loss."""
    figure, axes = _canvas(9.0, 3.5)
    _box(axes, 0.05, 2.65, 1.2, 0.6, "caption\n“fox, noto style”", "plain")
    _box(axes, 0.05, 1.45, 1.2, 0.6, "its picture\n$x$  [3 H W]", "plain")
    _box(axes, 0.05, 0.25, 1.2, 0.6, "chance\n" r"$\epsilon\sim N(0, I)$,  $t$", "plain")
    _box(axes, 1.75, 2.55, 2.2, 0.8, "FrozenCLIPEmbedder\nget_learned_conditioning\nfrozen", "text")
    _box(axes, 1.75, 1.35, 2.2, 0.8, "AutoencoderKL or VQModel\nencode_first_stage\nfrozen", "vae")
    _box(axes, 4.55, 1.35, 1.3, 0.8, "q_sample\n" r"$\sqrt{\bar\alpha_t}z+\sqrt{1-\bar\alpha_t}\,\epsilon$", "")
    _box(axes, 6.35, 1.35, 1.2, 0.8, "UNetModel\napply_model\ntrained", "unet", heavy=True)
    _box(axes, 7.9, 0.15, 1.05, 0.8, "loss\np_losses\n" r"$|\epsilon-\epsilon_\theta|^2$", "")
    _arrow(axes, (1.25, 2.95), (1.75, 2.95))
    _arrow(axes, (1.25, 1.75), (1.75, 1.75))
    _arrow(axes, (3.95, 1.75), (4.55, 1.75), "$z$  [4 h w]")
    _arrow(axes, (5.85, 1.75), (6.35, 1.75), "$x_t$")
    _path(axes, [(3.95, 2.95), (6.95, 2.95), (6.95, 2.15)], "context $c$  [n d]")
    _path(axes, [(1.25, 0.65), (5.2, 0.65), (5.2, 1.35)], r"$\epsilon$  [4 h w] and $t$")
    _path(axes, [(5.2, 0.65), (6.95, 0.65), (6.95, 1.35)], "$t$")
    _path(axes, [(1.25, 0.35), (7.9, 0.35)], r"$\epsilon$: what the UNet should have found")
    _path(axes, [(7.55, 1.75), (8.42, 1.75), (8.42, 0.95)], r"$\epsilon_\theta$")
    return figure


def sampling_diagram() -> "Figure":
    """How Stable Diffusion draws: prompt and noise go in, the UNet is asked again and again, a picture comes out."""
    figure, axes = _canvas(9.0, 3.3)
    _box(axes, 0.05, 2.35, 1.2, 0.7, "prompt, and the\nempty prompt “”", "plain")
    _box(axes, 0.05, 0.75, 1.2, 0.7, "start_code\n$x_T\\sim N(0, I)$", "plain")
    _box(axes, 1.75, 2.3, 2.2, 0.8, "FrozenCLIPEmbedder\nget_learned_conditioning", "text")
    _box(axes, 2.3, 0.7, 1.25, 0.8, "UNetModel\napply_model\ntwice: $c_\\emptyset$, $c$", "unet")
    _box(axes, 4.15, 0.7, 1.45, 0.8, "sampler\nguidance, then\na step: p_sample_ddim", "sampler")
    _box(axes, 6.35, 0.7, 1.35, 0.8, "AutoencoderKL\ndecode_first_stage", "vae")
    _box(axes, 8.05, 0.75, 0.9, 0.7, "picture\n[3 H W]", "plain")
    _arrow(axes, (1.25, 2.7), (1.75, 2.7))
    _path(axes, [(2.925, 2.3), (2.925, 1.5)], "")
    axes.text(3.0, 1.85, r"contexts $c$, $c_\emptyset$  [n d]", fontsize=7.5, va="center")
    _arrow(axes, (1.25, 1.1), (2.3, 1.1), "$x_T$  [4 h w]")
    _arrow(axes, (3.55, 1.1), (4.15, 1.1), r"$\epsilon$, $\epsilon_\emptyset$")
    _arrow(axes, (5.6, 1.1), (6.35, 1.1), "$x_0$ = $z$")
    _arrow(axes, (7.7, 1.1), (8.05, 1.1))
    _path(axes, [(4.875, 0.7), (4.875, 0.25), (2.6, 0.25), (2.6, 0.7)], "")
    again = "$x_{t-1}$, a little less noisy: again, from t = 999 down to 0, in 25 or 50 steps"
    axes.text(3.74, 0.2, again, fontsize=7.5, ha="center", va="top")
    return figure


def class_diagram() -> "Figure":
    """The classes by what holds what; under each name, the file of minisd and the file of CompVis's source."""
    figure, axes = _canvas(9.0, 4.15)
    w, h = 2.7, 0.5

    def box(x, y, name, here, there, fill, width=w):
        _box(axes, x, y, width, h, "", fill)
        axes.text(x + width / 2, y + 0.34, name, ha="center", va="center", fontsize=8, weight="bold")
        axes.text(x + width / 2, y + 0.14, f"{here}  |  {there}", ha="center", va="center", fontsize=6.8)

    box(2.95, 3.6, "LatentDiffusion", "latent_diffusion.py", "ddpm.py", "", 3.1)
    columns = [
        ("model.diffusion_model", "unet",
         [("UNetModel", "unet.py", "openaimodel.py"), ("ResBlock, Downsample, Upsample", "unet.py", "openaimodel.py"),
          ("SpatialTransformer", "attention.py", "attention.py"),
          ("CrossAttention, FeedForward", "attention.py", "attention.py")]),
        ("first_stage_model", "vae",
         [("AutoencoderKL or VQModel", "vae.py, vq.py", "autoencoder.py"), ("Encoder, Decoder", "vae.py", "model.py"),
          ("ResnetBlock, AttnBlock", "vae.py", "model.py"),
          ("DiagonalGaussianDistribution", "vae.py", "distributions.py")]),
        ("cond_stage_model", "text",
         [("FrozenCLIPEmbedder", "clip.py", "encoders/modules.py"), ("BPETokenizer", "tokenizer.py", "transformers"),
          ("CLIPTextModel", "clip.py", "transformers"), ("CLIPAttention, CLIPMLP", "clip.py", "transformers")]),
    ]  # fmt: skip
    for i, (attribute, fill, classes) in enumerate(columns):
        x = 0.1 + 3.05 * i
        for j, (name, here, there) in enumerate(classes):
            y = 2.4 - 0.62 * j
            box(x, y, name, here, there, fill)
            if j:
                _arrow(axes, (x + 0.3, y + 0.62), (x + 0.3, y + h))
        _path(axes, [(3.3 + 1.2 * i, 3.6), (3.3 + 1.2 * i, 3.35), (x + w / 2, 3.35), (x + w / 2, 2.9)], "")
        axes.text(x + w / 2 + 0.06, 3.12, attribute, fontsize=7.5, va="center")
    beside = [
        "beside them:  NoiseSchedule (noising.py | ddpm.py, util.py)",
        "epsilon_loss (loss.py | ddpm.py)",
        "ddim, plms, … (sampling.py | ddim.py, plms.py)",
    ]
    axes.text(0.1, 0.22, ",  ".join(beside), fontsize=7.5, va="center")
    return figure


def _canvas(width: float, height: float) -> "tuple[Figure, Axes]":
    """A page to draw on, in inches from the lower left."""
    figure = empty_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _box(axes: "Axes", x: float, y: float, w: float, h: float, text: str, fill: str, heavy: bool = False) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": _FILLS[fill], "edgecolor": "0.3"}
    axes.add_patch(FancyBboxPatch((x, y), w, h, linewidth=1.8 if heavy else 0.8, **style))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=8, linespacing=1.35)


def _arrow(axes: "Axes", start: tuple, end: tuple, label: str = "", dashed: bool = False) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 8, "color": "0.25", "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style | {"linestyle": "--" if dashed else "-"})
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    axes.text(x, y + 0.03, label, ha="center", va="bottom", fontsize=7.5)


def _path(axes: "Axes", points: Sequence[tuple], label: str) -> None:
    """An arrow round corners; the label over its first stretch."""
    for a, b in zip(points[:-2], points[1:-1], strict=True):
        axes.plot(*zip(a, b, strict=True), color="0.25", linewidth=0.9, solid_capstyle="butt")
    _arrow(axes, points[-2], points[-1])
    (x0, y0), (x1, y1) = points[:2]
    axes.text((x0 + x1) / 2, (y0 + y1) / 2 + 0.05, label, ha="center", va="bottom", fontsize=7.5)
