"""The guided tour of the live page: what its texts name exists, and every stop shows the tensors of a real drawing."""

import ast
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from chromium import served

import minisd
from minisd import live
from minisd.coursework import EXERCISES

ROOT = Path(__file__).parents[1]
TEXTS = json.loads((Path(live.__file__).parent / "tour.json").read_text("utf-8"))
STOPS = {stop["id"]: stop for stop in TEXTS["stops"]}
IN_CODE = [name for name, stop in STOPS.items() if "code" in stop]  # all but the last
STAGES = {1: "noising", 2: "loss", 3: "unet", 4: "vae", 5: "clip", 6: "sampling", 7: "latent_diffusion"}
PHONE = {"width": 390, "height": 844}
WEIGHTS = Path(minisd.__file__).parent / "weights"

# All lines of code that are named, with the stop and the sampler for which each stands there.
LINES = [(name, None, stop["code"]) for name, stop in STOPS.items() if "code" in stop]
for name, stop in STOPS.items():
    LINES += [(name, sampler, rule["code"]) for sampler, rule in stop.get("by_sampler", {}).items()]

each_stop = pytest.mark.parametrize("name", STOPS)
each_stop_in_code = pytest.mark.parametrize("name", IN_CODE)


# --- the texts --------------------------------------------------------------------------------------------------------


def test_there_are_about_twelve_stops_in_their_order():
    assert list(STOPS) == [
        "overview", "tokens", "context", "noise", "unet", "time", "attention", "guidance", "step", "loop", "decoding",
        "training", "next",
    ]  # fmt: skip


@pytest.mark.parametrize("code", [code for *_, code in LINES], ids=lambda code: code["name"])
def test_the_line_of_code_stands_in_what_is_named(code):
    _, module, *path = code["name"].split(".")
    source = (ROOT / "minisd" / f"{module}.py").read_text("utf-8")
    node = ast.parse(source)
    for part in path:
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    body = source.splitlines()[node.lineno - 1 : node.end_lineno]
    assert [line for line in body if line.split("  #")[0].strip() == code["line"]], f"{code['name']}: {code['line']}"


@each_stop_in_code
def test_names_in_the_original_source_are_those_of_the_reading_of_it(name):
    """docs/compvis.md and notebook 09 are checked against that source."""
    page = (ROOT / "docs" / "compvis.md").read_text("utf-8")
    theirs = STOPS[name]["compvis"]
    assert f"`{theirs['file']}`" in page
    for part in set(theirs["name"].split(".")) - {"forward"}:
        assert re.search(rf"\b{part}\b", page), f"{part} is not on the page"


@each_stop_in_code
def test_notebook_and_exercises_exist(name):
    stop = STOPS[name]
    assert (ROOT / "notebooks" / f"{stop['notebook']}.ipynb").is_file()
    for exercise, notebook in stop["exercises"].items():
        number = EXERCISES[exercise].number
        assert notebook == f"{number:02}_{STAGES[number]}"
        assert (ROOT / "notebooks" / "exercises" / f"{notebook}.ipynb").is_file()


def test_the_last_stop_names_every_notebook():
    named = [notebook for notebook, _ in STOPS["next"]["stages"]]
    assert named == sorted(path.stem for path in (ROOT / "notebooks").glob("*.py"))


def stops_linked(file: Path) -> set[str]:
    return set(re.findall(r"play\.md#tour=(\w+)", file.read_text("utf-8")))


@pytest.mark.parametrize("notebook", [notebook for notebook, _ in STOPS["next"]["stages"]])
def test_every_notebook_leads_to_the_stop_of_its_stage(notebook):
    linked = stops_linked(ROOT / "notebooks" / f"{notebook}.py")
    assert linked and linked <= set(STOPS)
    assert linked >= {name for name in IN_CODE if STOPS[name]["notebook"] == notebook}


def test_the_home_page_leads_into_the_tour():
    assert {"overview", "unet", "step"} <= stops_linked(ROOT / "docs" / "index.md") <= set(STOPS)


def test_links_to_stops_and_from_them_to_lines_of_code_are_made_by_the_build(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    links = importlib.import_module("tour_links")
    made = links.to_tour_links("see [the stop](../docs/play.md#tour=unet).", "notebooks/03_unet.ipynb")
    assert made == "see <a href='../play.html#tour=unet'>the stop</a>."
    assert links.to_tour_links("[it](play.md#tour=unet) [page](play.md)", "index") == (
        "<a href='play.html#tour=unet'>it</a> [page](play.md)"
    )
    made = {stop["id"]: stop for stop in links.tour_texts()["stops"]}
    for name, sampler, code in LINES:
        rule = made[name]["by_sampler"][sampler] if sampler else made[name]
        page, line = re.fullmatch(r"code/(minisd/\w+)\.html#L-(\d+)", rule["code"]["page"]).groups()
        text = (ROOT / f"{page}.py").read_text("utf-8").splitlines()[int(line) - 1]
        assert text.split("  #")[0].strip() == code["line"]


def shapes(config) -> dict[str, list[int]]:
    side = config.image_size // config.first_stage.downsampling
    n, latent = config.cond_stage.max_length, [config.first_stage.embed_dim, side, side]
    emb = [4 * config.unet.model_channels]
    return {"tokens": [n], "context": [n, config.cond_stage.width], "latent": latent, "emb": emb}


def test_shapes_of_stable_diffusion_are_right():
    """Those are the only shapes in the texts. All others are read from the tensors that are shown."""
    real = shapes(minisd.PRESETS["sd-v1"])
    said = {stop["shape"]: stop["sd_v1"] for stop in STOPS.values() if "sd_v1" in stop}
    assert said == {name: f"[{' '.join(map(str, real[name]))}]" for name in said} and len(said) == 4
    written = re.findall(r"\[\d+(?: \d+)*\]", json.dumps(TEXTS))
    assert written == [stop["sd_v1"] for stop in STOPS.values() if "sd_v1" in stop]
    assert "16,384 numbers instead of 786,432" in STOPS["noise"]["text"][-1] and 512 * 512 * 3 == 48 * 64 * 64 * 4


# --- in the browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    live.write_page(WEIGHTS / "tiny", folder)
    with served(folder) as address:
        yield address


@pytest.fixture(scope="module")
def errors():
    return []


@pytest.fixture(scope="module")
def page(browser, site, errors):
    """A page with a drawing of `tiny`, of 16 steps, made through the tour."""
    page = browser.new_page(viewport=PHONE)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(f"{message.text} {message.location}"))
    page.goto(f"{site}/index.html#tour=overview")
    page.evaluate("live.prepared")
    page.evaluate("tour.draw({ prompt: 'a large red circle, shape', seed: 3, steps: 16, guidance: 4 })")
    yield page
    page.close()


@pytest.fixture
def open_stop(page, errors):
    def open_stop(name: str):
        page.evaluate("(name) => tour.open(name)", name)
        page.evaluate("live.select(7)")
        settle(page)
        return page

    errors.clear()
    yield open_stop
    assert not errors


def settle(page):
    """Until everything is shown, with the pictures that the worker decodes."""
    page.wait_for_function("tour.waiting === null && tour.turn === null")


PAINTED = """() => [...document.querySelectorAll(".minisd-tour canvas")].filter((c) => c.offsetParent).map((canvas) => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return new Set(new Uint32Array(data.buffer)).size;
})"""


@each_stop
def test_every_stop_opens_and_shows_its_tensor(open_stop, name):
    page, stop = open_stop(name), STOPS[name]
    tour = page.locator(".minisd-tour")
    assert tour.locator("nav [aria-current=step]").count() == 1
    assert tour.locator("h2").inner_text().replace("\n", "") == stop["title"].replace("_", "")
    assert tour.locator(".stop > section:first-child > p").count() == len(stop["text"])
    colours = page.evaluate(PAINTED)
    if name not in ("tokens", "next"):
        assert colours and all(count > 1 for count in colours), colours
    assert "…" not in [place.strip() for place in tour.locator(".value").all_inner_texts()], "a number is missing"
    assert tour.locator(".try button").count() >= 1
    if "code" in stop:
        rule = stop | stop.get("by_sampler", {}).get(page.evaluate("live.request.sampler"), {})
        assert tour.locator("pre").inner_text().strip() == rule["code"]["line"]
        assert tour.locator(".formula").count() >= len(stop.get("equation", []))


@each_stop
def test_no_stop_is_wider_than_a_phone(open_stop, name):
    assert open_stop(name).evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_shapes_are_those_of_the_model(open_stop):
    real = shapes(minisd.PRESETS["tiny"])
    for name, stop in STOPS.items():
        if stop.get("shape") in real:
            said = open_stop(name).locator(".minisd-tour .caption").last.inner_text()
            assert f"{TEXTS['ui']['shape']} [{' '.join(map(str, real[stop['shape']]))}]" in said
    shown = open_stop("attention").locator(".words figure").count()
    tokens = open_stop("attention").evaluate("live.run.start.tokens.pieces")
    assert shown == len([piece for piece in tokens if piece != "<pad>"]) + 1


def test_arrow_keys_and_buttons_lead_through_all_stops(open_stop):
    page = open_stop("overview")
    for name in list(STOPS)[1:]:
        page.keyboard.press("ArrowRight")
        assert page.evaluate("tour.stop.id") == name
        assert f"tour={name}" in page.url.split("#")[1].split("&")
    assert page.locator(".minisd-tour > .tools:last-child button").last.is_hidden()
    page.click(".minisd-tour > .tools:last-child button:first-child")
    assert page.evaluate("tour.stop.id") == "training"
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("tour.stop.id") == "decoding"
    page.click(".minisd-tour nav li:nth-child(3) button")
    assert page.evaluate("tour.stop.id") == "context"


def test_the_address_holds_the_stop_beside_the_drawing(open_stop):
    page = open_stop("overview")
    page.evaluate("location.hash = '#prompt=a+star&tour=attention'")
    page.wait_for_function("tour.stop.id === 'attention'")
    page.keyboard.press("ArrowRight")
    assert {"prompt=a+star", "tour=guidance"} <= set(page.url.split("#")[1].split("&"))
    page.click(".minisd-tour > .tools:first-child button")
    assert page.evaluate("tour.stop") is None and "tour=" not in page.url
    assert page.evaluate("document.activeElement.textContent") == TEXTS["ui"]["start"]
    page.get_by_role("button", name=TEXTS["ui"]["start"]).click()
    assert page.evaluate("tour.stop.id") == "overview"


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler"])
def test_the_equation_of_a_step_holds_with_the_numbers_that_it_shows(open_stop, page, sampler):
    """Each line is computed from the numbers on its right, as a reader with a pocket calculator would.

    The line of the code is that of this sampler, too.
    """
    page.evaluate("(sampler) => tour.draw({ sampler, steps: 16 })", sampler)
    open_stop("step")
    assert f"sampling.py: {sampler}" in page.locator(".minisd-tour").inner_text()
    for step in (0, 7, 15):
        page.evaluate("(step) => { tour.index = 100 + step; return live.select(step); }", step)
        settle(page)
        assert page.evaluate("Array.from(live.run.steps.at(live.selected).x)[tour.index]") == pytest.approx(
            float(page.evaluate("tour.numbers().x_prev"))
        )
        lines = page.locator(".formula").all_inner_texts()
        numbers = [line.replace("−", "-") for line in lines if re.match(r"[−\d]", line)]
        assert len(numbers) == len({**STOPS["step"], **STOPS["step"]["by_sampler"].get(sampler, {})}["numbers"])
        for line in numbers:
            left, right = line.split(" = ")
            assert float(left) == pytest.approx(eval(right.replace("·", "*")), abs=0.02), line


def test_guidance_can_be_moved_along_the_arrow(open_stop):
    """At s = 1 the noise is that with the prompt, whatever the drawing was made with."""
    page = open_stop("guidance")
    slider = page.locator(".minisd-tour .steps input").last
    shown = []
    for s in ("1", "20"):
        slider.fill(s)
        settle(page)
        canvases = page.locator(".minisd-tour .pair canvas")
        shown.append([canvases.nth(k).evaluate("(canvas) => canvas.toDataURL()") for k in range(5)])
    (_, cond, arrow_1, at_1, picture_1), (_, _, arrow_20, at_20, picture_20) = shown
    assert at_1 == cond and at_20 != at_1 and picture_20 != picture_1 and arrow_1 == arrow_20


def test_the_slider_of_guidance_follows_the_drawing(open_stop):
    page = open_stop("guidance")
    slider = page.locator(".minisd-tour .steps input").last
    for guidance in (20, 4):
        page.evaluate("(guidance) => tour.draw({ guidance })", guidance)
        assert slider.input_value() == str(guidance)


def test_a_button_undoes_what_another_has_set(open_stop):
    """One step of DDIM begins at t = 1, where nothing is removed; one step of DPM-Solver++ begins at pure noise."""
    page = open_stop("step")
    page.evaluate("tour.draw({ sampler: 'ddim', negative: 'a circle' })")
    page.get_by_role("button", name="Draw in one single step").click()
    page.wait_for_selector(".minisd-tour [aria-live] canvas")
    assert page.evaluate("[live.request.sampler, live.request.negative, live.run.start.timesteps[0]]") == [
        "dpmpp_2m", "", 999
    ]  # fmt: skip


def test_a_button_draws_and_shows_before_and_after(open_stop):
    page = open_stop("noise")
    seed = page.evaluate("Number(live.request.seed)")
    page.click(".minisd-tour .try button")
    page.wait_for_selector(".minisd-tour [aria-live] canvas")
    assert page.evaluate("Number(live.request.seed)") == seed + 1
    before, after = page.locator(".minisd-tour [aria-live] canvas").evaluate_all("all => all.map((c) => c.toDataURL())")
    assert before != after
    assert page.evaluate("live.request.steps") == 25, "a button changes one thing, and all else is as usual"


def test_the_curve_of_the_loop_runs_from_noise_to_the_picture_as_its_pictures_do(open_stop):
    page = open_stop("loop")
    marks = page.locator(".minisd-tour .figure circle").evaluate_all(
        "all => all.map((mark) => +mark.getAttribute('cx'))"
    )
    assert len(marks) == page.evaluate("live.run.steps.length") > 1 and marks == sorted(marks)
    assert re.findall(r"\d+", page.locator(".minisd-tour svg + figcaption").inner_text()) == ["999", "0"]


def test_hidden_words_are_not_read(open_stop):
    open_stop("attention").evaluate("tour.draw({ prompt: 'a large red circle, shape' })")
    page = open_stop("attention")
    page.click(".minisd-tour .try button")
    page.wait_for_selector(".minisd-tour [aria-live] canvas")
    settle(page)
    thing = page.evaluate("live.run.start.tokens.pieces[tour.thing()]")
    assert thing == "circle"
    assert page.locator(".words figure", has_text=thing).inner_text().endswith("0 %")
    page.evaluate("tour.draw({ hide: [] })")


def test_a_place_of_the_latent_changes_its_surroundings(open_stop):
    page = open_stop("decoding")
    picture = page.locator(".minisd-tour .pair canvas").nth(1)
    pixels = "(c) => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"
    drawn = picture.evaluate(pixels)
    page.get_by_role("button", name=STOPS["decoding"]["try"][0]["label"]).click()  # the place in the middle
    settle(page)
    changed = np.abs(np.subtract(drawn, picture.evaluate(pixels))).reshape(32, 32, 4)
    middle = changed[10:26, 10:26]
    around = (changed.sum() - middle.sum()) / (changed.size - middle.size)
    assert middle.mean() > 4 * around  # attention and the norms carry a little of it everywhere
    page.locator(".minisd-tour .pair canvas").first.click(position={"x": 3, "y": 3})
    settle(page)
    assert page.locator(".minisd-tour .mark").first.evaluate("(mark) => mark.style.left") == "0%"
    page.get_by_role("button", name=STOPS["decoding"]["try"][1]["label"]).click()
    settle(page)
    assert picture.evaluate(pixels) == drawn


@pytest.mark.parametrize("name", ["step", "decoding"])
def test_the_place_that_is_marked_can_be_moved_by_the_keyboard(open_stop, name):
    page = open_stop(name)
    mark = page.locator(".minisd-tour .mark").first
    before = mark.get_attribute("style")
    for _ in range(5):  # one may find the same place again
        page.locator(".minisd-tour .try button").last.press("Enter")
        settle(page)
    assert mark.get_attribute("style") != before


def test_the_unet_finds_much_of_the_noise_of_an_example(open_stop):
    """The loss of a network that says nothing, 0 everywhere, is 1."""
    page = open_stop("training")
    page.click(".minisd-tour .try button")
    page.wait_for_selector(".minisd-tour figure:nth-child(4) canvas")
    loss = float(page.locator(".minisd-tour .steps output").last.inner_text().split(":")[-1])
    assert 0.0 < loss < 0.7


def test_the_size_of_the_time_embedding_is_known_without_the_activations(open_stop):
    """A drawing that was made without the tour holds none."""
    page = open_stop("time")
    page.evaluate("tour.step.activations = {}")
    config = minisd.PRESETS["tiny"].unet
    assert page.evaluate("[tour.numbers().emb_size, tour.numbers().sines]") == [
        4 * config.model_channels, config.model_channels
    ]  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The address of a page with a recording."""
    folder = tmp_path_factory.mktemp("recorded")
    live.write_page(WEIGHTS / "tiny", folder, "tiny", [live.record(minisd.load("tiny", "cpu"), "a red circle")])
    with served(folder) as address:
        yield f"{address}/index.html"


@pytest.mark.parametrize("name", ["unet", "time"])
def test_a_recording_shows_what_the_blocks_computed(browser, recorded, open_stop, name):
    """The same as the live model, with which the drawing is repeated here, and at a step in the middle."""
    page = browser.new_page()
    page.goto(f"{recorded}#tour={name}")
    page.evaluate("live.prepared")
    page.wait_for_selector(".minisd-tour .figure canvas")
    settle(page)
    assert page.evaluate("[live.run.recorded, live.selected, live.about]") == [True, 12, None]
    assert page.locator(".minisd-tour").get_by_role("button", name=TEXTS["ui"]["draw"]).is_hidden()
    count = page.locator(".minisd-tour .figure canvas").count()
    text = page.locator(".minisd-tour").inner_text()
    page.evaluate("tour.draw()")
    settle(page)
    assert page.evaluate("live.run.recorded") is None and page.evaluate("live.selected") == 12
    assert page.locator(".minisd-tour .figure canvas").count() == count > 1
    assert page.locator(".minisd-tour").inner_text() == text
    page.close()


def test_a_drawing_without_the_tour_is_repeated_for_a_stop_that_needs_more(open_stop, page):
    page.evaluate("tour.open('tokens')")
    page.evaluate("live.draw({ steps: 9 })")
    assert page.evaluate("Object.keys(live.run.steps[0].activations).length") == 0
    page.evaluate("tour.open('time')")
    page.wait_for_selector(".minisd-tour .figure canvas")
    page.wait_for_function("live.run.done && live.selected === 4")
    settle(page)
    assert page.evaluate("Object.keys(live.run.steps[0].activations).length") > 3


def test_a_drawing_that_lacks_something_is_not_repeated_for_ever(open_stop, page):
    """Made by the tour itself, but without guidance, and without pictures of its steps."""
    page.evaluate("tour.draw({ steps: 3, preview: 0, guidance: 1 })")
    page.evaluate("live.starts = 0; live.addEventListener('start', () => live.starts++)")
    for name in STOPS:
        open_stop(name)
    assert page.evaluate("live.starts") == 0
    open_stop("guidance").get_by_role("button", name=TEXTS["ui"]["draw"]).click()
    page.wait_for_selector(".minisd-tour .pair canvas")
    page.wait_for_function("live.run.done")
    assert page.evaluate("[live.starts, live.request.guidance]") == [1, 4]


def test_a_stop_with_a_slider_opens_in_the_middle_unless_a_step_was_chosen(open_stop, page):
    page.evaluate("live.select(live.run.steps.length - 1)")
    page.evaluate("tour.open('loop')")
    page.wait_for_function("live.selected === Math.floor((live.run.steps.length - 1) / 2)")
    page.evaluate("live.select(1)")
    page.evaluate("tour.open('step')")
    settle(page)
    assert page.evaluate("live.selected") == 1


def test_without_a_drawing_the_tour_can_be_read_and_offers_to_draw(browser, site):
    page = browser.new_page()
    page.goto(f"{site}/index.html#tour=unet")
    page.get_by_role("button", name=TEXTS["ui"]["draw"]).wait_for()
    assert "is the network that is asked in each step" in page.locator(".minisd-tour").inner_text()
    page.get_by_role("button", name=TEXTS["ui"]["draw"]).click()
    page.wait_for_selector(".minisd-tour .u canvas")
    page.keyboard.press("ArrowRight")  # the button that had the focus is gone
    assert page.evaluate("tour.stop.id") == "time"
    page.close()
