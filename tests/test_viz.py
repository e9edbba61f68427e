"""Figures show what they were given: as many pictures, the same pixels, the same numbers, in the right place."""

import io

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


def test_a_latent_is_no_picture(viz):
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


# -- how samplers walk, and how well ------------------------------------------------------------------------


def test_plane_draws_each_path_from_its_ring_to_its_disc(viz):
    data, paths = torch.tensor([[0.0, 0.5], [1.0, -1.0]]), torch.randn(4, 3, 2)
    axes = viz.plane(data, {"a": paths, "b": paths[:2]}).axes
    assert [a.get_title() for a in axes] == ["a", "b"]
    torch.testing.assert_close(torch.as_tensor(axes[0].collections[0].get_offsets().data).float(), data)
    path, ring, disc = axes[0].lines[3:6]  # of the second path
    torch.testing.assert_close(torch.as_tensor(path.get_xydata()).float(), paths[:, 1])
    torch.testing.assert_close(torch.as_tensor(ring.get_xydata()[0]).float(), paths[0, 1])
    torch.testing.assert_close(torch.as_tensor(disc.get_xydata()[0]).float(), paths[-1, 1])


def test_pursuit_shows_the_curve_in_each_panel_and_noise_falling_to_the_right(viz):
    curve, steps = (torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0.0, 1.0, 0.0])), ([3.0, 1.0], [0.0, 0.5])
    for axes in viz.pursuit(curve, {"a": steps, "b": steps}).axes:
        assert list(axes.lines[0].get_ydata()) == [0, 1, 0] and list(axes.lines[1].get_ydata()) == [0, 0.5]
        assert axes.xaxis_inverted()


def test_convergence_has_guides_of_the_slopes_that_were_asked_for(viz):
    n = torch.tensor([5.0, 50.0])
    (axes,) = viz.convergence({"a": {"first": (n, 1 / n), "second": (n, 1 / n**2)}}).axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    for line, slope in zip(axes.lines, [1, 2, 1, 2], strict=True):  # two guides, then the data
        x, y = (torch.as_tensor(values).double().log() for values in line.get_data())
        assert ((y[0] - y[-1]) / (x[-1] - x[0])).item() == pytest.approx(slope, rel=1e-4)


def test_ruler_marks_each_timestep(viz):
    (axes,) = viz.ruler({"up": ([981, 1], "to 0"), "down": ([999, 499], "to x")}).axes
    assert axes.collections[0].get_offsets().data.tolist() == [[981, 1], [1, 1]]
    assert {"981", "1", "999", "499", "to 0", "to x"} <= words(axes)
