"""Figures show what they were given: as many pictures, the same pixels, the same numbers, in the right place."""

import io
import re
import unicodedata
from types import SimpleNamespace
from unittest.mock import MagicMock
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module")
def minisd():
    import matplotlib

    matplotlib.use("agg")  # draws without a screen
    import minisd

    return minisd


@pytest.fixture(scope="module")
def viz(minisd):
    return minisd.viz


@pytest.fixture
def pictures():
    """Two rows of three pictures, exact in uint8, so that nothing is lost to rounding."""
    pixels = torch.randint(0, 256, (2, 3, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    return pixels / 127.5 - 1


def shown(axes) -> torch.Tensor:
    """The picture that an axes shows, [3 h w] in [-1, 1]."""
    return torch.as_tensor(axes.images[0].get_array()).permute(2, 0, 1).float() * 2 - 1


def drawn(figure) -> np.ndarray:
    """The figure as it is drawn, [h w 4]: raises if something in it can't be."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file))


def words(axes) -> set[str]:
    return {axes.get_title(), *(text.get_text() for text in axes.texts)} - {""}


def is_closed(figure) -> bool:
    import matplotlib.pyplot as plt

    return figure not in [plt.figure(number) for number in plt.get_fignums()]


# -- pictures as files --------------------------------------------------------------------------------------


def test_to_pil_and_back(viz, pictures):
    for image, picture in zip(viz.to_pil(pictures[0]), pictures[0], strict=True):
        back = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(back, picture)


def test_to_pil_clamps(viz):
    black, white = viz.to_pil(torch.stack([torch.full((3, 2, 2), -7.0), torch.full((3, 2, 2), 7.0)]))
    assert black.getpixel((0, 0)) == (0, 0, 0)
    assert white.getpixel((1, 1)) == (255, 255, 255)


def test_sheet_is_a_grid_on_white(viz):
    images = viz.to_pil(-torch.ones(5, 3, 4, 6))  # black, 6 wide and 4 high
    page = viz.sheet(images, columns=3, gap=2, scale=2)
    assert page.size == (3 * 12 + 2 * 2, 2 * 8 + 2)
    black, white = (0, 0, 0), (255, 255, 255)
    assert page.getpixel((0, 0)) == page.getpixel((11, 7)) == black  # the first picture, each pixel a square of 2
    assert page.getpixel((12, 0)) == page.getpixel((0, 8)) == white  # the gaps
    assert page.getpixel((14, 10)) == black  # the fifth picture
    assert page.getpixel((28, 10)) == white  # where a sixth would be
    assert viz.sheet(images).size == (5 * 6 + 4 * 2, 4)  # one row, if nobody says


def test_save_sheet_makes_the_folder(viz, pictures, tmp_path):
    viz.save_sheet(pictures[0], tmp_path / "new" / "sheet.png", columns=3, scale=1)
    with Image.open(tmp_path / "new" / "sheet.png") as page:
        assert page.size == (3 * 8 + 2 * 2, 8)


# -- pictures side by side ----------------------------------------------------------------------------------


def test_strip_shows_every_picture_where_it_belongs(viz, pictures):
    notes = [[f"note {i}{j}" for j in range(3)] for i in range(2)]
    figure = viz.strip(pictures, ["a", "b", "c"], ["upper", "lower"], notes)
    assert len(figure.axes) == 6
    for k, axes in enumerate(figure.axes):
        i, j = divmod(k, 3)
        torch.testing.assert_close(shown(axes), pictures[i, j], atol=1e-6, rtol=0)
        assert f"note {i}{j}" in words(axes)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c", "", "", ""]
    assert "upper" in words(figure.axes[0]) and "lower" in words(figure.axes[3])
    # from left to right, from top to bottom, and nothing overlaps
    boxes = [axes.get_position() for axes in figure.axes]
    assert boxes[0].x1 < boxes[1].x0 and boxes[1].x1 < boxes[2].x0 and boxes[3].y1 < boxes[0].y0
    assert min(box.x0 for box in boxes) > 0 and min(box.y0 for box in boxes) > 0
    assert max(box.x1 for box in boxes) <= 1 and max(box.y1 for box in boxes) <= 1
    assert is_closed(figure)  # or a notebook would draw it twice


@pytest.mark.parametrize("upper", [True, False])  # whichever of the two comes first
def test_strip_takes_rows_that_differ(viz, upper):
    long, square = torch.zeros(3, 3, 4, 8), torch.zeros(1, 3, 16, 16)
    figure = viz.strip([long, square] if upper else [square, long], size=1.0)
    assert len(figure.axes) == 4
    box = figure.axes[0 if upper else 1].get_window_extent()
    assert box.width == pytest.approx(2 * box.height) == pytest.approx(100)  # one inch at 100 dpi


def test_strip_clamps_and_shows_one_channel_as_grey(viz):
    figure = viz.strip([torch.tensor([-9.0, 0.0, 9.0]).reshape(1, 1, 1, 3)])
    torch.testing.assert_close(shown(figure.axes[0])[:, 0], torch.tensor([[-1.0, 0.0, 1.0]] * 3))


def test_a_latent_is_refused_as_a_picture(viz):
    with pytest.raises(ValueError, match="4, 8, 8.*decode"):
        viz.strip([torch.zeros(1, 4, 8, 8)])


def test_noising_strip_is_q_sample(minisd, viz, pictures):
    schedules = {"ours": minisd.NoiseSchedule.scaled_linear(), "theirs": minisd.NoiseSchedule.cosine()}
    figure = viz.noising_strip(pictures[0][:2], schedules, [0, 500, 999], labels=["one", "two"], seed=7)
    assert len(figure.axes) == 4 * 4  # (2 pictures x 2 schedules) x (x_0 and three timesteps)
    assert [axes.get_title() for axes in figure.axes[:4]] == ["$x_0$", "t = 0", "t = 500", "t = 999"]
    assert "two\ntheirs" in words(figure.axes[12])
    noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(7))[None]
    expected = schedules["ours"].q_sample(pictures[0][1:2], torch.tensor([500]), noise)[0].clamp(-1, 1)
    torch.testing.assert_close(shown(figure.axes[10]), expected, atol=1e-5, rtol=0)


def test_noising_strip_on_its_own_ends_at_the_last_timestep(minisd, viz, pictures):
    figure = viz.noising_strip(pictures[0][:1], minisd.NoiseSchedule.scaled_linear())
    assert [axes.get_title() for axes in figure.axes][-1] == "t = 999"
    figure = viz.noising_strip(pictures[0][:1], minisd.NoiseSchedule.linear(0.1, 0.5, timesteps=3))
    assert len(figure.axes) == 4


@pytest.fixture
def steps(minisd, pictures):
    schedule = minisd.NoiseSchedule.scaled_linear()
    exact = minisd.ExactDenoiser(pictures[0], schedule)
    x_T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return list(minisd.sampling.ddim(exact, x_T, schedule, steps=8))


def test_trajectory_shows_each_step(viz, steps):
    figure = viz.trajectory(steps, rows=("x_t", "x0"), every=1)
    assert len(figure.axes) == 2 * 8
    assert [axes.get_title() for axes in figure.axes[:8]] == [f"t = {step.t}" for step in steps]
    torch.testing.assert_close(shown(figure.axes[2]), steps[2].x_t[0].clamp(-1, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(shown(figure.axes[8 + 5]), steps[5].x0[0].clamp(-1, 1), atol=1e-6, rtol=0)


def test_trajectory_never_leaves_out_the_last_step(viz, steps):
    figure = viz.trajectory(steps, rows=("x0",), every=3, pictures=(1, 0), labels=["one", "two"])
    titles = [axes.get_title() for axes in figure.axes[:4]]
    assert titles == [f"t = {steps[i].t}" for i in (0, 3, 6, 7)]
    torch.testing.assert_close(shown(figure.axes[3]), steps[-1].x0[1].clamp(-1, 1), atol=1e-6, rtol=0)
    assert "one\n$\\hat x_0$" in words(figure.axes[0])


def test_trajectory_decodes(viz, steps):
    figure = viz.trajectory(steps, decode=lambda z: z[:, :, ::2] * 0, rows=("x_t",), every=7)
    assert len(figure.axes) == 2
    assert shown(figure.axes[0]).shape == (3, 4, 8) and not shown(figure.axes[0]).any()


def test_a_whole_trajectory_serves_as_steps(minisd, viz, steps):
    whole = minisd.Trajectory(steps, decode=lambda z: z)
    assert len(viz.trajectory(whole, decode=whole.decode).axes) == 2 * 8


# -- numbers against t --------------------------------------------------------------------------------------


def test_schedule_curves_are_those_of_the_schedules(minisd, viz):
    schedules = {"a": minisd.NoiseSchedule.scaled_linear(), "b": minisd.NoiseSchedule.cosine(timesteps=50)}
    figure = viz.schedule_curves(schedules)
    beta, alpha_bar, log_snr = figure.axes
    for axes, of in [
        (beta, lambda s: s.betas),
        (alpha_bar, lambda s: s.alphas_cumprod),
        (log_snr, lambda s: s.log_snr(torch.arange(s.timesteps))),
    ]:
        assert [line.get_label() for line in axes.lines] == ["a", "b"]
        for line, schedule in zip(axes.lines, schedules.values(), strict=True):
            torch.testing.assert_close(torch.as_tensor(line.get_ydata()).float(), of(schedule))
            assert len(line.get_xdata()) == schedule.timesteps
    assert beta.get_yscale() == "log" and alpha_bar.get_yscale() == "linear"
    assert [axes.get_legend() is not None for axes in figure.axes] == [True, False, False]  # said once
    assert len({(line.get_color(), line.get_linestyle()) for line in beta.lines}) == 2


def test_curves_has_a_legend_wherever_the_lines_change(viz):
    y = torch.tensor([1.0, 2.0])
    figure = viz.curves({"one": {"a": (y, y)}, "two": {"b": (y, y), "c": (y, y)}, "none": {"": (y, y)}}, log=["two"])
    assert [axes.get_legend() is not None for axes in figure.axes] == [True, True, False]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log", "linear"]
    assert [axes.get_title() for axes in figure.axes] == ["one", "two", "none"]


def test_histograms_are_densities_and_the_gaussian_is_the_one_that_was_asked_for(viz):
    samples = 2 + 0.5 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    figure = viz.histograms({"t": {"a": samples, "b": samples}}, {"t": (2.0, 0.25)})
    axes = figure.axes[0]
    x, y = (torch.as_tensor(values) for values in axes.lines[0].get_data())
    assert torch.trapezoid(y, x).item() == pytest.approx(1, abs=1e-3)
    assert x[y.argmax()].item() == pytest.approx(2, abs=1e-3)
    outline = axes.patches[-1].get_path().vertices  # of the second, drawn as steps
    assert outline[:, 1].max() == pytest.approx(y.max().item(), rel=0.1)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "exact"]


def test_density_over_time(minisd, viz):
    schedule = minisd.NoiseSchedule.scaled_linear()
    x_0 = torch.tensor([-1.0, 1.0])
    paths = {"left": (range(1000), torch.stack([torch.full((1000,), 0.9), torch.full((1000,), -0.9)], 1))}
    paths["right"] = ([999, 500, 1], torch.tensor([[0.0], [0.5], [1.0]]))
    figure = viz.density_over_time(x_0, schedule, paths)
    left, right = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["left", "right"]

    density = torch.as_tensor(left.images[0].get_array())  # [y T]
    assert density.isfinite().all() and (density >= 0).all()
    _, _, bottom, top = left.images[0].get_extent()
    mass = density.sum(0) * (top - bottom) / (len(density) - 1)
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=0.02, rtol=0)  # a density, at every t
    torch.testing.assert_close(density, density.flip(0), atol=1e-4, rtol=1e-3)  # the data are symmetrical

    assert len(left.lines) == 2 and len(right.lines) == 1
    assert left.lines[0].get_color() == right.lines[0].get_color() != left.lines[1].get_color()  # by where they end
    assert list(right.lines[0].get_xdata()) == [999, 500, 1]
    assert len(viz.density_over_time(x_0, schedule).axes[0].lines) == 0  # no paths: the density alone


def test_every_figure_can_be_drawn(minisd, viz, pictures, steps):
    schedule = minisd.NoiseSchedule.scaled_linear()
    figures = [
        viz.strip(pictures, ["a", "b", "c"], ["$x_t$", r"$\epsilon$"]),
        viz.trajectory(steps, rows=("x_t", "eps", "x0", "x")),
        viz.schedule_curves({"a": schedule}),
        viz.histograms({"a": {"b": torch.randn(50)}}),
        viz.density_over_time(torch.tensor([0.0]), schedule),
    ]
    for figure in figures:
        assert drawn(figure).std() > 5  # not an empty page
        assert is_closed(figure)


# -- words and matrices -------------------------------------------------------------------------------------


def boxes_of(figure) -> list:
    return list(figure.axes[0].patches)


def test_token_table_shows_each_piece_and_its_id(viz):
    sentences = {"first": ["<|s|>", "re", "d</w>"], "second": ["$x$</w>"]}
    figure = viz.token_table(sentences, {"first": [5, 6, 77], "second": [8]})
    said = words(figure.axes[0])
    assert said == {"first", "second", "<|s|>", "re", "d</w>", "$x$</w>", "5", "6", "77", "8"}
    special, inside, end, other = (box.get_facecolor() for box in boxes_of(figure))
    assert end == other and len({special, inside, end}) == 3  # what ends a word, goes on, or is no text
    drawn(figure)


def test_token_table_draws_a_run_once(viz):
    figure = viz.token_table({"": ["a</w>", "<|e|>", "<|e|>", "<|e|>"], "two": ["b</w>", "b</w>"]})
    assert "<|e|> x 3" in words(figure.axes[0])
    assert len(boxes_of(figure)) == 4


def test_token_table_breaks_what_is_longer_than_its_width(viz):
    figure = viz.token_table({"long": ["abcdefgh</w>", "ijklmnop</w>"] * 8}, width=4.0)
    boxes = boxes_of(figure)
    assert len(boxes) == 16
    assert max(box.get_x() + box.get_width() for box in boxes) <= 4.0
    assert len({box.get_y() for box in boxes}) > 2
    assert figure.get_figwidth() <= 4.1


def test_matrices_show_the_numbers(viz):
    matrix = torch.tensor([[0.5, 1.0], [0.25, 0.0]])
    figure = viz.matrices({"m": matrix}, ["fox", "cat"], ["red", "green"], numbers=".2f")
    (axes,) = figure.axes
    torch.testing.assert_close(torch.as_tensor(axes.images[0].get_array()), matrix)
    assert words(axes) == {"m", "0.50", "1.00", "0.25", "0.00"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fox", "cat"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["red", "green"]
    assert axes.images[0].norm.vmin == 0  # white is nothing
    drawn(figure)


def test_matrices_keep_white_for_zero_where_there_are_signs(viz):
    figure = viz.matrices({"m": torch.tensor([[-1.0, 3.0]]), "n": torch.zeros(1, 2)})
    signed, zeros = (axes.images[0] for axes in figure.axes if axes.get_title())
    assert (signed.norm.vmin, signed.norm.vmax) == (-3, 3)
    assert min(signed.to_rgba(0.0)) > 0.95
    assert min(zeros.to_rgba(0.0)) > 0.95
    assert len(figure.axes) == 4  # each with its scale
    drawn(figure)


def test_matrices_number_what_is_too_many_to_be_named(viz):
    panels = {"m": torch.rand(60, 900), "n": torch.rand(60, 900)}
    figure = viz.matrices(panels, cell=(0.004, 0.03), xlabel="t", ylabel="c")
    first, second = (axes for axes in figure.axes if axes.get_title())
    assert (first.get_xlabel(), first.get_ylabel(), second.get_ylabel()) == ("t", "c", "")
    assert {"0", "400"} < {label.get_text() for label in first.get_xticklabels()} and len(first.get_yticks()) > 2
    assert len(second.get_yticks()) == 0  # the same as the first's
    drawn(figure)


def test_matrices_show_what_is_missing_in_grey(viz):
    figure = viz.matrices({"m": torch.tensor([[0.5, float("nan")]])}, numbers=".1f")
    assert words(figure.axes[0]) == {"m", "0.5"}
    pixels = figure.axes[0].images[0].to_rgba(figure.axes[0].images[0].get_array())
    assert pixels[0, 1].tolist() == pytest.approx([0.8, 0.8, 0.8, 1.0])


def test_matrices_put_a_picture_beside_each_row(viz, pictures):
    figure = viz.matrices({"m": torch.ones(3, 2)}, ["a", "b", "c"], numbers=".0f", pictures=pictures[0])
    matrix, *thumbnails = figure.axes
    assert len(thumbnails) == 3
    for row, (axes, picture) in enumerate(zip(thumbnails, pictures[0], strict=True)):
        torch.testing.assert_close(shown(axes), picture, atol=1e-6, rtol=0)
        assert axes.get_position().x1 < matrix.get_position().x0
        height = matrix.get_position().height / 3
        assert (matrix.get_position().y1 - axes.get_position().y1) // height == row
    drawn(figure)


# -- inside the UNet, and the model as boxes ----------------------------------------------------------------


def test_unet_diagram_says_what_every_block_is_and_hands_on(minisd, viz):
    from minisd.instruments.unet_outline import outline

    blocks = outline(minisd.PRESETS["emoji"].unet, size=8)
    figure = viz.unet_diagram(blocks, "small")
    texts = [text.get_text() for text in figure.axes[0].texts]
    for block in blocks[:-1]:
        channels, h, w = block.shape_out
        assert f"{channels}, {h}×{w}" in texts
    assert len(figure.axes[0].patches) >= len(blocks) - 1  # a box for each, except for `out`
    assert "Res + Transformer + Up" in texts and "Down" in texts and "small" in texts
    handed = sorted(block.shape_out[0] for block in blocks if block.name.startswith("input_blocks"))
    assert sorted(int(text) for text in texts if text in {"96", "192"}) == handed


def test_feature_maps_show_the_channels_that_vary_most(viz):
    maps = torch.zeros(5, 4, 4)
    maps[3, 0, 0], maps[1, :2] = -4.0, 1.0
    figure = viz.feature_maps({"layer": maps, "small": maps[:1]}, channels=2)
    assert len(figure.axes) == 3
    assert words(figure.axes[0]) == {"layer", "#3: 4.0"} and words(figure.axes[1]) == {"#1: 1.0"}
    torch.testing.assert_close(torch.as_tensor(figure.axes[0].images[0].get_array()).float(), maps[3])
    assert figure.axes[0].images[0].get_clim() == (-4.0, 4.0)


def test_attention_maps_lie_on_the_picture(viz, pictures):
    weights = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    figure = viz.attention_maps(weights, pictures[0, 0], ["a", "b", "c"], ["one", "two"])
    assert len(figure.axes) == 2 * (1 + 3)
    torch.testing.assert_close(shown(figure.axes[0]), pictures[0, 0])
    for row in range(2):
        for column in range(3):
            axes = figure.axes[row * 4 + 1 + column]
            grey, heat = axes.images
            assert heat.get_extent() == grey.get_extent() == [0, 8, 8, 0]
            torch.testing.assert_close(torch.as_tensor(heat.get_array()).float(), weights[row, column])
            assert heat.get_clim() == (0, pytest.approx(weights[row].max().item()))  # one scale a row
            assert f"{weights[row, column].max():.2f}" in words(axes)
    assert figure.axes[1].get_title() == "a" and words(figure.axes[4]) == {"two"}
    each = viz.attention_maps(weights, list(pictures[0, :2]))
    torch.testing.assert_close(shown(each.axes[4]), pictures[0, 1])


def svg_of(diagram) -> ElementTree.Element:
    return ElementTree.fromstring(diagram._repr_svg_())


def test_the_diagrams_name_classes_and_methods_that_exist(minisd, viz):
    diagrams = [viz.training_diagram(), viz.sampling_diagram(), viz.class_diagram()]
    training, sampling, classes = (" ".join(svg_of(diagram).itertext()) for diagram in diagrams)
    for method in ("get_learned_conditioning", "encode_first_stage", "q_sample", "apply_model", "p_losses"):
        assert method in training and hasattr(minisd.LatentDiffusion, method)
    for method in ("get_learned_conditioning", "apply_model", "decode_first_stage"):
        assert method in sampling and hasattr(minisd.LatentDiffusion, method)
    from importlib import import_module

    for module, names in {
        "latent_diffusion": ["LatentDiffusion"],
        "unet": ["UNetModel", "ResBlock", "Downsample", "Upsample"],
        "attention": ["SpatialTransformer", "CrossAttention", "FeedForward"],
        "vae": ["AutoencoderKL", "Encoder", "Decoder", "ResnetBlock", "AttnBlock", "DiagonalGaussianDistribution"],
        "vq": ["VQModel"],
        "clip": ["FrozenCLIPEmbedder", "CLIPTextModel", "CLIPAttention", "CLIPMLP"],
        "tokenizer": ["BPETokenizer"],
    }.items():
        assert f"{module}.py" in classes
        for name in names:
            assert name in classes and hasattr(import_module(f"minisd.{module}"), name)


STAGES = ["noising", "loss", "unet", "vae", "clip", "sampling", "latent_diffusion"]
IDEAS = ["chain", "res_block", "spatial_transformer", "heads", "autoencoder", "ddim_step", "guidance"]
SVG = "{http://www.w3.org/2000/svg}"


def all_diagrams(viz) -> list:
    whole = [viz.training_diagram(), viz.sampling_diagram(), viz.class_diagram()]
    return [*whole, *map(viz.diagram, IDEAS), *map(viz.pipeline, STAGES)]


def length(text: ElementTree.Element) -> float:
    """How long a text is drawn, in pixels. Most letters of a sans-serif font are narrower than 0.52 of their height."""
    size = float(text.get("font-size", 13))
    mono = text.get("font-family") == "monospace"
    letters = [letter for letter in "".join(text.itertext()) if not unicodedata.combining(letter)]
    return size * len(letters) * (0.61 if mono else 0.485)


def test_the_diagrams_can_be_read_on_a_phone_and_on_a_dark_page(viz):
    for diagram in all_diagrams(viz):
        svg = svg_of(diagram)
        width, height = (float(svg.get(side)) for side in ("width", "height"))
        assert svg.get("viewBox") == f"0 0 {width:.0f} {height:.0f}"
        assert width <= 480  # so that its smallest letters are still 9 pixels high on a phone that is 390 wide
        assert min(float(part.get("font-size", 13)) for part in svg.iter(f"{SVG}text")) >= 12
        page = svg.find(f"{SVG}rect")  # behind everything else
        assert (page.get("fill"), float(page.get("width")), float(page.get("height"))) == ("#ffffff", width, height)
        for text in svg.iter(f"{SVG}text"):
            left = float(text.get("x")) - length(text) * {"middle": 0.5, "end": 1.0}.get(text.get("text-anchor"), 0.0)
            assert left > 0 and left + length(text) < width and float(text.get("y")) < height
        assert len(diagram._repr_svg_()) < 20_000
        assert repr(diagram).startswith("Diagram(name=")  # not the path of the file, which a notebook would keep


def test_the_diagrams_can_be_read_aloud_and_need_no_other_file(viz):
    for diagram in all_diagrams(viz):
        svg, source = svg_of(diagram), diagram._repr_svg_()
        assert svg.get("role") == "img" and svg.find(f"{SVG}title").text and len(svg.find(f"{SVG}desc").text) > 60
        assert all(image.get("href").startswith("data:image/png;base64,") for image in svg.iter(f"{SVG}image"))
        assert "http" not in source.replace("http://www.w3.org/2000/svg", "") and "@import" not in source
        assert set(re.findall(r"url\(#(\w+)\)", source)) <= {marker.get("id") for marker in svg.iter(f"{SVG}marker")}


def test_in_the_pipeline_the_parts_of_one_stage_are_lit(viz):
    def parts(stage: str) -> dict[bool, str]:
        groups = [group for group in svg_of(viz.pipeline(stage)).iter(f"{SVG}g") if group.get("class")]
        lit = {True: "", False: ""}
        for group in groups:
            assert (stage in group.get("class").split()) == ("opacity" not in group.attrib)
            lit["opacity" not in group.attrib] += " ".join(group.itertext()) + " "
        return lit

    for stage in STAGES:
        assert f"{stage}.py" in parts(stage)[True] and f"{stage}.py" not in parts(stage)[False]
    assert "context c" in parts("unet")[True] and "clip.py" in parts("unet")[False]
    assert parts("latent_diffusion")[False] == ""
    every = "".join(parts("latent_diffusion")[True])
    assert all(f"{stage}.py" in every for stage in STAGES)


def test_a_diagram_that_is_not_there_is_answered_by_the_names_that_are(viz):
    with pytest.raises(ValueError, match="no stage 'training'.*noising, loss, unet, vae, clip, sampling, latent_diff"):
        viz.pipeline("training")
    with pytest.raises(ValueError, match="no diagram 'resblock'.*chain,.*heads,.*res_block,.*spatial_transformer"):
        viz.diagram("resblock")


def test_the_diagrams_of_single_ideas_have_the_names_of_the_code(minisd, viz):
    words_of = {name: " ".join(svg_of(viz.diagram(name)).itertext()) for name in IDEAS}
    from minisd.attention import CrossAttention, SpatialTransformer
    from minisd.unet import ResBlock

    def children(module) -> set[str]:
        return {name for name, _ in module.named_children()}

    assert all(name in words_of["res_block"] for name in children(ResBlock(32, 128, 64)))
    transformer = SpatialTransformer(32, 2, 16, context_dim=8)
    names = children(transformer) - {"transformer_blocks"} | children(transformer.transformer_blocks[0])
    assert all(name in words_of["spatial_transformer"] for name in names)
    assert "to_out" in words_of["heads"] and "to_out" in children(CrossAttention(32, None, 2, 16))
    assert all(name in words_of["autoencoder"] for name in ("moments", "mean", "logvar", "scale_factor"))


def test_the_step_and_the_guidance_are_drawn_true_to_their_equations(minisd, viz):
    """The points of both drawings, from the numbers that are in them, by the functions of the package."""
    from minisd.sampling import predict_x0

    def points(name: str) -> list[torch.Tensor]:
        circles = svg_of(viz.diagram(name)).iter(f"{SVG}circle")
        return [torch.tensor([float(circle.get("cx")), -float(circle.get("cy"))]) for circle in circles]

    x_t, x_prev, x_0 = points("ddim_step")
    up = re.search(r"M(\d+) (\d+)A(\d+)", viz.diagram("ddim_step")._repr_svg_())  # the arc begins at ε
    left, top, radius = (float(number) for number in up.groups())
    origin, eps = torch.tensor([left, -top - radius]), torch.tensor([0.0, radius])
    torch.testing.assert_close(predict_x0(x_t - origin, eps, 0.2), x_0 - origin, atol=0.5, rtol=0)
    torch.testing.assert_close(0.6**0.5 * (x_0 - origin) + 0.4**0.5 * eps, x_prev - origin, atol=0.5, rtol=0)

    uncond, cond, guided, x_t = points("guidance")
    torch.testing.assert_close(uncond + 4 * (cond - uncond), guided, atol=0.5, rtol=0)
    assert x_t[0] < uncond[0] < cond[0] < guided[0]


# -- what a notebook shows ----------------------------------------------------------------------------------


def test_a_notebook_shows_lines_as_svg_and_pictures_at_twice_the_resolution(viz, pictures, monkeypatch):
    from IPython.core.formatters import DisplayFormatter
    from matplotlib.figure import Figure

    # As IPython's inline backend leaves it: figures are PNGs, and no kernel is needed to ask what would be shown.
    shell = SimpleNamespace(display_formatter=DisplayFormatter(), events=MagicMock())
    shell.display_formatter.active_types = list(shell.display_formatter.formatters)
    shell.display_formatter.formatters["image/png"].for_type(Figure, lambda figure: b"a PNG of one resolution")
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    lines = viz.curves({"": {"line": (range(100), range(100))}})
    many = viz.clouds({"": {"": torch.randn(4000, 2)}})
    strip = viz.strip(pictures)

    data, metadata = shell.display_formatter.format(lines)
    assert set(data) == {"image/svg+xml", "text/plain"} and not metadata
    assert ElementTree.fromstring(data["image/svg+xml"]).tag == f"{SVG}svg" and len(data["image/svg+xml"]) < 100_000
    again = viz.curves({"": {"line": (range(100), range(100))}})
    assert shell.display_formatter.format(again)[0]["image/svg+xml"] == data["image/svg+xml"]  # no date, no other ids

    for figure in (strip, many):
        data, metadata = shell.display_formatter.format(figure)
        assert set(data) == {"image/png", "text/plain"}
        image = Image.open(io.BytesIO(data["image/png"]))
        assert metadata == {"image/png": {"width": image.width // 2}}
        inches = figure.get_size_inches()[0]
        assert image.width / inches == pytest.approx(200, rel=0.15)  # the margins are cut off


def test_no_row_of_panels_is_wider_than_a_page(viz):
    """A page would show it smaller, with letters that can't be read."""
    line = {"line": ([0, 1], [0, 1])}
    for count in (1, 2, 3, 4):
        figure = viz.curves({str(i): line for i in range(count)})
        assert figure.get_size_inches()[0] == min(3.1 * count, 7.4)
    assert viz.ruler({"up": ([981, 1], "to 0")}).get_size_inches()[0] == 7.4
    assert viz.token_table({"long": ["abcdefgh</w>"] * 2 + ["<|e|>", "ijklmnop</w>"] * 20}).get_size_inches()[0] < 7.6


def test_without_a_notebook_a_figure_is_a_plain_one(viz):
    figure = viz.curves({"": {"line": ([0, 1], [0, 1])}})
    file = io.BytesIO()
    figure.savefig(file)
    assert Image.open(file).width == pytest.approx(310)


# -- a toy in two dimensions, and the loss at each t --------------------------------------------------------


def test_clouds_hold_their_points_and_one_name_has_one_colour(viz):
    data, a, b = torch.randn(20, 2), torch.rand(5, 2), -torch.rand(7, 2)
    figure = viz.clouds({"one": {"a": a, "b": b}, "two": {"b": b}, "three": {"a": a}}, behind=data, columns=2)
    one, two, three = figure.axes  # and no empty fourth
    assert [axes.get_title() for axes in figure.axes] == ["one", "two", "three"]
    for axes, expected in [(one, [data, a, b]), (two, [data, b]), (three, [data, a])]:
        points = [torch.as_tensor(c.get_offsets().data).float() for c in axes.collections]
        assert [len(p) for p in points] == [len(p) for p in expected]
        assert all(torch.allclose(p, q) for p, q in zip(points, expected, strict=True))
    assert np.array_equal(two.collections[1].get_facecolor(), one.collections[2].get_facecolor())
    assert not np.array_equal(one.collections[1].get_facecolor(), one.collections[2].get_facecolor())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert drawn(figure).std() > 5 and is_closed(figure)
    assert not viz.clouds({"one": {"a": a}}).legends  # a single name tells nothing


def test_vector_field_keeps_directions_and_caps_lengths(viz):
    places = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    vectors = torch.tensor([[1.0, 0.0], [0.0, -40.0], [0.0, 0.0]])
    panels = {"t = 5": (places, {"exact": vectors, "learned": -vectors})}
    figure = viz.vector_field(panels, {"t = 5": torch.randn(9, 2)}, longest=2.0, spacing=0.5)
    cloud, exact, learned = figure.axes[0].collections
    assert len(cloud.get_offsets()) == 9
    assert np.allclose(np.stack([exact.U, exact.V], 1), [[0.25, 0.0], [0.0, -0.5], [0.0, 0.0]])
    assert np.allclose(learned.V, [0.0, 0.5, 0.0])
    assert np.allclose(exact.XY, places.numpy())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["exact", "learned"]
    assert drawn(figure).std() > 5 and is_closed(figure)


def test_curves_draws_what_is_exact_in_black(viz):
    t = [0, 500, 999]
    panels = {"toy": {"a": (t, [0.9, 0.5, 0.1])}, "pictures": {"a": (t, torch.tensor([0.8, 0.2, 0.01]))}}
    figure = viz.curves(panels, exact={"toy": (t, [0.8, 0.4, 0.05])}, log=["pictures"])
    toy, pictures = figure.axes
    assert [line.get_color() for line in toy.lines] == [viz.COLOURS[0], "black"]
    assert list(toy.lines[1].get_ydata()) == pytest.approx([0.8, 0.4, 0.05])
    assert len(pictures.lines) == 1 and pictures.get_yscale() == "log" and toy.get_yscale() == "linear"
    assert [text.get_text() for text in toy.get_legend().get_texts()] == ["a", "the best possible"]
    assert drawn(figure).std() > 5 and is_closed(figure)


# -- latents ------------------------------------------------------------------------------------------------


def test_maps_show_the_numbers_each_row_on_its_scale(viz, pictures):
    rows = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.rand(4, 8, 8) * 100]
    figure = viz.maps(rows, ["a", "b", "c", "d"], ["mean", "std"], pictures[0][:2])
    assert len(figure.axes) == 2 * (1 + 4 + 1)  # a picture, four channels and a scale
    torch.testing.assert_close(shown(figure.axes[6]), pictures[0, 1], atol=1e-6, rtol=0)
    for i, row in enumerate(rows):
        for j, axes in enumerate(figure.axes[6 * i + 1 : 6 * i + 5]):
            torch.testing.assert_close(torch.as_tensor(axes.images[0].get_array()), row[j])
            low, high = axes.images[0].get_clim()
            assert high == pytest.approx(row.abs().max().item())
            assert low == (0 if i else -high), "white is zero, wherever there are signs"
    assert [axes.get_title() for axes in figure.axes[1:5]] == ["a", "b", "c", "d"]
    assert "mean" in words(figure.axes[0]) and "std" in words(figure.axes[6])
    assert max(axes.get_position().x1 for axes in figure.axes) < 1
    assert is_closed(figure) and drawn(figure).std() > 5


def test_maps_do_without_pictures_and_with_nothing_but_zeros(viz):
    figure = viz.maps(torch.zeros(1, 2, 4, 4), labels=["zero"])
    assert len(figure.axes) == 3 and "zero" in words(figure.axes[0])
    assert drawn(figure).std() > 5


def test_plane_puts_pictures_and_points_where_they_belong(viz):
    pictures = torch.linspace(-1, 1, 6).view(2, 3, 1, 1, 1).expand(-1, -1, 3, 4, 4)  # dark to light
    points = torch.tensor([[0.0, 10.0], [1.0, 20.0]])
    figure = viz.plane({"left": (pictures, (0, 2, 10, 20), points), "right": (pictures, (0, 2, 10, 20), points)})
    assert [axes.get_title() for axes in figure.axes] == ["left", "right"]
    image = figure.axes[0].images[0]
    assert tuple(image.get_extent()) == (-0.5, 2.5, 5, 25)
    mosaic = torch.as_tensor(image.get_array())  # [8 12 3]: its first row is the top, as matplotlib draws it
    assert mosaic[0, 0, 0] == 0 and mosaic[-1, -1, 0] == 1 and mosaic[0, -1, 0] == pytest.approx(0.4)
    xs, ys = figure.axes[0].lines[0].get_data()
    assert list(xs) == [0, 1] and list(ys) == [10, 20]
    assert is_closed(figure) and drawn(figure).std() > 5


# -- pictures with their captions ---------------------------------------------------------------------------


def test_captioned_puts_each_caption_under_its_picture(viz, pictures):
    long = "a small purple triangle in the bottom left"
    figure = viz.captioned(pictures[0], ["a fox", long, "a house"], columns=2)
    assert len(figure.axes) == 3
    for axes, picture in zip(figure.axes, pictures[0], strict=True):
        torch.testing.assert_close(shown(axes), picture, atol=1e-6, rtol=0)
    captions = [axes.texts[0] for axes in figure.axes]
    assert [text.get_text().replace("\n", " ") for text in captions] == ["a fox", long, "a house"]
    assert "\n" in captions[1].get_text() and "\n" not in captions[0].get_text()
    boxes = [text.get_window_extent() for text in captions]
    assert boxes[0].x1 < boxes[1].x0  # side by side, and they don't run into each other
    assert boxes[1].y0 > figure.axes[2].get_window_extent().y1  # nor into the row below
    assert drawn(figure).std() > 5 and is_closed(figure)
    with pytest.raises(ValueError, match="3 pictures and 1 captions"):
        viz.captioned(pictures[0], ["a fox"])


def test_strip_has_room_for_titles_of_two_lines(viz, pictures):
    figure = viz.strip(pictures, ["one line", "one\nand another", "three"])
    assert figure.axes[1].title.get_window_extent().y1 <= figure.bbox.y1
    assert figure.axes[0].get_window_extent().width == pytest.approx(96)  # the pictures are as large as ever


# -- how samplers walk, and how well ------------------------------------------------------------------------


def test_walks_draws_each_path_from_its_ring_to_its_disc(viz):
    data, paths = torch.tensor([[0.0, 0.5], [1.0, -1.0]]), torch.randn(4, 3, 2)
    axes = viz.walks(data, {"a": paths, "b": paths[:2]}).axes
    assert [a.get_title() for a in axes] == ["a", "b"]
    torch.testing.assert_close(torch.as_tensor(axes[0].collections[0].get_offsets().data).float(), data)
    path, ring, disc = axes[0].lines[3:6]  # of the second path
    torch.testing.assert_close(torch.as_tensor(path.get_xydata()).float(), paths[:, 1])
    torch.testing.assert_close(torch.as_tensor(ring.get_xydata()[0]).float(), paths[0, 1])
    torch.testing.assert_close(torch.as_tensor(disc.get_xydata()[0]).float(), paths[-1, 1])


def test_walks_leaves_no_path_outside_of_a_panel(viz):
    far = torch.tensor([[[0.0, 0.0]], [[-7.0, 1.0]], [[0.0, 3.0]]])
    for axes in viz.walks(torch.zeros(1, 2), {"near": far / 10, "far": far}).axes:
        low, high = axes.get_xlim()
        assert low < -7 and high == -low and axes.get_ylim() == (low, high)


def test_convergence_has_guides_of_the_slopes_that_were_asked_for(viz):
    n = torch.tensor([5.0, 50.0])
    (axes,) = viz.convergence({"a": {"first": (n, 1 / n), "second": (n, 1 / n**2)}}).axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    for line, slope in zip(axes.lines, [1, 2, 1, 2], strict=True):  # the data, then two guides
        x, y = (torch.as_tensor(values).double().log() for values in line.get_data())
        assert ((y[0] - y[-1]) / (x[-1] - x[0])).item() == pytest.approx(slope, rel=1e-4)


def test_guides_end_where_the_data_do(viz):
    (axes,) = viz.convergence({"a": {"flat": (torch.tensor([5.0, 50.0]), torch.tensor([1.0, 0.5]))}}).axes
    assert len(axes.lines) == 3
    for line in axes.lines:
        assert list(line.get_ydata()) == pytest.approx([1.0, 0.5])


def test_ruler_marks_each_timestep(viz):
    (axes,) = viz.ruler({"up": ([981, 1], "to 0"), "down": ([999, 499], "to x")}).axes
    assert axes.collections[0].get_offsets().data.tolist() == [[981, 1], [1, 1]]
    assert {"981", "1", "999", "499", "to 0", "to x"} <= words(axes)


# -- numbers with their errors ------------------------------------------------------------------------------


def test_with_errors_shows_each_number_and_its_error(viz):
    numbers = {"a": [(0.5, 0.1), (0.25, 0.05)], "b": [(1.0, 0.2), (float("nan"), float("nan"))]}
    figure = viz.with_errors({"first": numbers, "second": {"": [(3.0, 1.0)] * 2}}, ["left", "right"], marks=(0, 1))
    first, second = figure.axes
    for bars, expected in zip(first.containers, numbers.values(), strict=True):
        line, _, (segments,) = bars.lines
        values, errors = np.array(expected).T
        np.testing.assert_allclose(line.get_ydata(), values, rtol=1e-6)
        heights = np.array([np.ptp(segment[:, 1]) for segment in segments.get_segments() if len(segment)])
        np.testing.assert_allclose(heights, 2 * errors[: len(heights)], rtol=1e-5)
    assert [label.get_text() for label in first.get_xticklabels()] == ["left", "right"]
    assert first.get_legend() and not second.get_legend()
    assert drawn(figure).size
