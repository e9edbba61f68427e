"""The page of the live model, as a reader uses it, in a headless Chromium: its pictures are compared with minisd's."""

import base64
import io
import re
import shlex
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pytest
import torch
from chromium import served
from PIL import Image

import minisd
from minisd import cli, live
from minisd.instruments.attention_maps import record_attention

WEIGHTS = Path(minisd.__file__).parent / "weights"
FOLDER = Path(live.__file__).parent
MOST_LINES = 1500  # of JavaScript, CSS and HTML in the page, with its tour: neither blank lines nor comments
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True}


@pytest.fixture(scope="module")
def tiny():
    return minisd.load("tiny", "cpu")


@pytest.fixture(scope="module")
def site(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    recording = live.record(tiny, "a red circle")
    renamed = recording | {"request": recording["request"] | {"prompt": "two blue squares"}}
    live.write_page(WEIGHTS / "tiny", folder, "tiny", [recording, renamed])
    return folder


@pytest.fixture(scope="module")
def server(site):
    with served(site) as address:
        yield address


@pytest.fixture
def opened(browser, server):
    """opened(fragment, **options of the browser's page) -> the page, when what it shows at first is there.

    No page may ask any other machine for anything, and none may fail without saying so.
    """
    pages, requests, failures = [], [], []

    def open_page(fragment: str = "", address: str = f"{server}/index.html", **options):
        page = browser.new_page(reduced_motion="reduce", **options)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(address + fragment)
        page.evaluate("live.prepared")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not failures
    assert all(url.startswith((server + "/", "file:", "data:", "blob:")) for url in requests), requests


def draw(page, **changes) -> None:
    page.evaluate("(changes) => live.draw(changes)", {"steps": 4} | changes)
    assert page.evaluate("live.run.done"), page.inner_text("[role=status]")


def shown(page, selector: str = ".pictures figure:last-child canvas") -> np.ndarray:
    """What is on a canvas, [h w 3]."""
    url = page.eval_on_selector(selector, "(canvas) => canvas.toDataURL()")
    return pixels(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def off(ours: np.ndarray, theirs) -> int:
    """By how much the two pictures differ at most, of 255."""
    return int(np.abs(ours - (theirs if isinstance(theirs, np.ndarray) else pixels(theirs))).max())


def unfold(page) -> None:
    page.eval_on_selector_all("details", "(all) => all.forEach((details) => (details.open = true))")


# --- the size of the page --------------------------------------------------------------------------------------------


def code_lines(name: str) -> int:
    """Lines of a file that are neither blank nor a comment."""
    comments = r"^ *//.*$" if name.endswith(".js") else r"(?s)/\*.*?\*/|<!--.*?-->"
    text = re.sub(comments, "", (FOLDER / name).read_text("utf-8"), flags=re.MULTILINE)
    return sum(bool(line.strip()) for line in text.splitlines())


def test_the_page_stays_small():
    assert sum(map(code_lines, live.PAGE)) <= MOST_LINES


# --- what is there before the model ----------------------------------------------------------------------------------


def test_a_recording_stands_there_before_the_model_is_fetched(opened, tiny):
    page = opened()
    assert page.evaluate("live.run.recorded") and page.evaluate("live.about") is None
    scripts = page.evaluate("performance.getEntriesByType('resource').map(({ name }) => name.split('/').at(-1))")
    assert "recording_0.js" in scripts and "model.js" not in scripts and "weights_0.js" not in scripts
    assert "fetches the model (3 MB)" in page.inner_text("[role=status]")

    drawing = tiny.txt2img("a red circle", steps=25, guidance_scale=4.0, sampler="dpmpp_2m", seed=0)
    assert off(shown(page), drawing.images[0]) == 0
    page.evaluate("live.select(7)")
    assert off(shown(page), drawing.trajectory.x0_images()[7][0]) == 0
    page.click("text=two blue squares")
    page.wait_for_function("live.request.prompt === 'two blue squares' && live.run.done")
    assert page.input_value("[name=prompt]") == "two blue squares"


def test_a_recording_says_what_a_drawing_says(opened):
    """The tour shows either: the same numbers, but for the 16 bits that a recording has.

    The maps of the padding are added up, as everything that is shown of them is. Of a block, the channel that is shown.
    """
    page = opened()
    compare = """async () => {
        const spread = (x) => {
            const mean = x.reduce((a, b) => a + b, 0) / x.length;
            return x.reduce((sum, v) => sum + (v - mean) ** 2, 0);
        };
        const numbers = ({ start, steps }) => {
            const { i, t, a_t, a_prev, x_t, eps, eps_cond, eps_uncond, x0, x, attention, activations } = steps[9];
            const pad = start.tokens.pieces.indexOf("<pad>");
            const maps = Object.values(attention).flatMap(({ h, w, weights }) => {
                const added = new Float32Array((pad + 1) * h * w);
                weights.forEach((v, k) => (added[Math.min(k, pad * h * w + (k % (h * w)))] += v));
                return [h, w, ...added];
            });
            const { time_embed, ...blocks } = activations;
            const seen = Object.entries(blocks).map(([name, { c, h, w, values }]) => {
                const channel = (_, k) => values.slice(k * h * w, (k + 1) * h * w);
                const channels = Array.from({ length: values.length / h / w }, channel);
                return [name, c, h, w, ...channels.sort((a, b) => spread(b) - spread(a))[0]];
            });
            const arrays = [start.x_T, start.context, x_t, eps, eps_cond, eps_uncond, x0, x].flatMap((a) => [...a]);
            const rest = [start.shape, start.timesteps, start.tokens, i, t, a_t, a_prev, time_embed.c];
            return { arrays, maps, seen, emb: [...time_embed.values], rest };
        };
        const recorded = numbers(live.run);
        await live.draw({ attention: true, activations: true });
        return [recorded, numbers(live.run)];
    }"""
    recorded, drawn = page.evaluate(compare)
    assert recorded["rest"] == drawn["rest"]
    assert np.abs(np.array(recorded["arrays"]) - drawn["arrays"]).max() < 0.01
    assert np.abs(np.array(recorded["maps"]) - drawn["maps"]).max() < 1e-4
    assert np.abs(np.array(recorded["emb"]) - drawn["emb"]).max() < 1e-3
    assert len(recorded["seen"]) == len(drawn["seen"]) == 3
    for ours, theirs in zip(recorded["seen"], drawn["seen"], strict=True):
        assert ours[:4] == theirs[:4]
        assert np.abs(np.array(ours[4:]) - theirs[4:]).max() < 1e-3 * np.abs(theirs[4:]).max()


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_each_step_can_be_seen_while_and_after_it_is_drawn(opened, tiny):
    """Also the steps that were not decoded while they were drawn, and while the page was opened as a file."""
    page = opened()
    page.evaluate("live.seen = []; live.addEventListener('select', () => live.seen.push(live.selected))")
    draw(page, prompt="a green heart", steps=6, seed=3, preview=3, sampler="euler", guidance=3)
    assert {2, 5} <= set(page.evaluate("live.seen"))
    trajectory = tiny.txt2img("a green heart", steps=6, seed=3, sampler="euler", guidance_scale=3.0).trajectory
    for step in (0, 4):
        page.locator("[name=step]").fill(str(step + 1))
        page.wait_for_function(f"live.seen.at(-1) === {step}")
        assert off(shown(page), trajectory.x0_images()[step][0]) <= 1
        assert off(shown(page, ".pictures canvas"), trajectory.x_t_images()[step][0]) <= 1
    assert page.inner_text("output") == f"5 of 6 · t = {trajectory[4].t}"


CASES = [
    {"prompt": 'it\'s <b>"two"</b> $HOME `squares`', "negative": "red 'star'", "seed": 2**32 + 5, "guidance": 2.5},
    {"prompt": "--a circle", "sampler": "ddim", "seed": 1},
    {"prompt": "", "sampler": "euler", "guidance": 1},
]


@pytest.mark.parametrize("case", CASES, ids=["quotes", "dash", "empty"])
def test_the_copied_command_draws_the_same_picture(opened, case, tmp_path, monkeypatch):
    page = opened()
    draw(page, **case)
    command, python = page.eval_on_selector_all(".elsewhere code", "(all) => all.map((code) => code.textContent)")[:2]
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command)
    assert arguments[:2] == ["minisd", "txt2img"]
    cli.main(arguments[1:2] + ["--scale", "1", "--device", "cpu"] + arguments[2:])
    assert off(shown(page), Image.open("out.png")) <= 1
    Path("out.png").unlink()
    exec(python, {})
    assert off(shown(page), Image.open("out.png")) <= 1


def test_what_is_copied_is_the_command(opened):
    page = opened()
    unfold(page)
    page.locator(".elsewhere button").first.click()
    page.fill("[name=negative]", "")
    page.focus("[name=negative]")
    page.keyboard.press("Control+V")
    assert page.input_value("[name=negative]") == page.locator(".elsewhere code").first.text_content()


def test_a_drawing_can_be_stopped(opened):
    page = opened()
    page.fill("[name=prompt]", "a star")
    page.evaluate("live.fields.steps.value = 1000")
    page.click("[name=go]")
    page.wait_for_function("live.run.steps.length > 2 && !live.run.recorded")
    page.click("[name=stop]")
    assert page.inner_text("[role=status]") == "Stopped."
    assert page.is_hidden("[name=stop]")
    steps = page.evaluate("live.run.steps.length")
    draw(page, prompt="a star")
    assert steps < 900 and page.evaluate("live.run.steps.length") == 4


def test_new_noise_is_another_seed(opened):
    page = opened()
    draw(page)
    first = shown(page)
    page.click("[name=again]")
    page.wait_for_function("live.request.seed !== 0 && live.run.done")
    assert page.input_value("[name=seed]") != "0" and off(shown(page), first) > 10


def test_a_prompt_stays_text(opened):
    """In the form, in the panels, and in a link."""
    evil = "<img src=x onerror=alert(1)> <b>a</b>"
    page = opened()
    page.on("dialog", lambda dialog: pytest.fail("the markup was run"))
    draw(page, prompt=evil, second=evil + " <i>b</i>", negative=evil)
    page.evaluate("live.work(() => null)")
    page.click(".each", force=True) if page.is_visible(".each") else page.evaluate("live.find('.each').click()")
    page.wait_for_function("document.querySelector('[role=status]').textContent.startsWith('Choose')")
    other = opened(page.evaluate("'#' + live.link().split('#')[1]"))
    for each in (page, other):
        assert each.query_selector(".minisd :is(img, i, figcaption > b b)") is None
        assert each.input_value("[name=prompt]") == evil


def test_a_prompt_that_is_too_long_is_cut_and_the_page_says_so(opened):
    page = opened()
    draw(page, prompt="a red circle " * 9)
    assert "The model reads 16 tokens, so “" in page.inner_text("[role=status]")


# --- the panels ------------------------------------------------------------------------------------------------------


def test_words_show_where_the_pixels_read_them(opened, tiny):
    """The same whether a word is pointed at, reached by the keyboard, or held. The noisy picture does not change."""
    page = opened()
    draw(page, prompt="a red circle", steps=4)
    page.evaluate("live.select(1)")
    plain = [shown(page, ".pictures canvas"), shown(page)]
    red = page.locator(".words button", has_text="red")
    red.focus()
    veiled = shown(page)
    assert off(veiled, plain[1]) > 10 and off(shown(page, ".pictures canvas"), plain[0]) == 0
    with record_attention(tiny) as maps:
        tiny.txt2img("a red circle", steps=4, guidance_scale=4.0, sampler="dpmpp_2m", seed=0)
    assert f"“red” gets {100 * maps.at(1, token='red').mean():.1f} %" in page.inner_text(".attention .says")

    page.focus("[name=prompt]")
    assert off(shown(page), plain[1]) == 0
    red.hover()
    assert off(shown(page), veiled) == 0
    red.click()
    page.hover("h1")
    page.focus("[name=prompt]")
    assert off(shown(page), veiled) == 0 and red.get_attribute("aria-pressed") == "true"
    page.select_option("[name=layer]", index=1)
    assert page.locator(".words button").count() == 6  # <start> a red circle <end> <pad>


def test_two_prompts_are_drawn_from_the_same_noise(opened, tiny):
    page = opened()
    draw(page, prompt="a red circle", second="a blue circle")
    assert page.evaluate("live.run.start.x_T.every((x, i) => x === live.other.start.x_T[i])")
    assert page.eval_on_selector_all(".comparison mark", "(all) => all.map((mark) => mark.textContent)") == [
        "red",
        "blue",
    ]
    theirs = tiny.txt2img("a blue circle", steps=4, guidance_scale=4.0, sampler="dpmpp_2m", seed=0).images[0]
    page.wait_for_function("document.querySelector('.comparison figure:last-child canvas').width === 32")
    assert off(shown(page, ".comparison figure:last-child canvas"), theirs) <= 1


def test_words_are_switched_off_one_by_one(opened):
    page = opened()
    unfold(page)
    draw(page, prompt="a red circle", steps=4)
    whole = shown(page)
    page.click(".each")
    page.wait_for_function("document.querySelector('[role=status]').textContent.startsWith('Choose')")
    names = page.eval_on_selector_all(".gallery button", "(all) => all.map((button) => button.textContent)")
    without = [f"without “{word}”" for word in ("a", "red", "circle", "<end>", "<pad>")]
    assert names == ["all tokens", *without, "only <end>"]
    assert off(shown(page, ".gallery button canvas"), whole) == 0

    page.click("text=without “red”")
    page.wait_for_function("live.request.hide?.length && live.run.done")
    assert page.evaluate("live.request.hide") == [2]
    hidden = page.evaluate("Object.values(live.run.steps[0].attention).map(({ h, w, weights }) => weights[2 * h * w])")
    assert all(weight == 0 for weight in hidden)
    assert off(shown(page), whole) > 3
    assert page.is_visible("text=only this page can switch them off")
    page.click(".restore")
    page.wait_for_function("live.request.hide.length === 0 && live.run.done")
    assert off(shown(page), whole) == 0


def test_a_picture_of_ones_own_is_drawn_over(opened, tmp_path, monkeypatch):
    """Painted with the mouse; and the command that is shown makes the same of it."""
    page = opened()
    unfold(page)
    page.locator(".pad").scroll_into_view_if_needed()
    box = page.locator(".pad").bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.up()
    painted = shown(page, ".pad")
    assert (painted[16, 11:21] == [0xE8, 0x59, 0x0C]).all() and (painted[0] == 255).all()

    page.locator("[name=strength]").fill("0.5")
    draw(page, prompt="a red square", steps=8)
    assert page.evaluate("live.run.steps.length") == 4
    command = page.locator(".elsewhere code").first.text_content()
    assert command.startswith("minisd img2img 'a red square' picture.png")
    monkeypatch.chdir(tmp_path)
    with page.expect_download() as download:
        page.click(".given")
    download.value.save_as(download.value.suggested_filename)
    cli.main([*shlex.split(command)[1:], "--scale", "1", "--device", "cpu"])
    assert off(shown(page), Image.open("out.png")) <= 1


def test_the_autoencoder_shows_what_it_makes_of_a_picture(opened, tiny, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "mine.png")
    page = opened()
    draw(page)
    page.set_input_files(".file", tmp_path / "mine.png")
    page.wait_for_function("document.querySelector('.made').width === 32")
    with torch.no_grad():
        x = minisd.pictures.read_picture(Image.fromarray(picture))
        made = minisd.pictures.to_pil(tiny.first_stage_model.decode(tiny.encode_first_stage(x).mode()))[0]
    assert off(shown(page, ".pad"), picture.astype(int)) == 0
    assert off(shown(page, ".made"), made) <= 1
    assert "[4 8 8]" in page.text_content(".shape")


def test_a_file_that_is_no_picture_is_refused_in_one_sentence(opened, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    page = opened()
    page.set_input_files(".file", tmp_path / "notes.txt")
    page.wait_for_selector(".error")
    said = page.inner_text("[role=status]")
    assert said == "“notes.txt” is no picture that this browser can read: give a PNG, JPEG or WebP."


def test_the_schedule_marks_the_step(opened):
    page = opened()
    page.evaluate("live.select(9)")
    t = page.evaluate("live.run.steps[9].t")
    signal = minisd.NoiseSchedule.scaled_linear().alpha_bar(t) ** 0.5
    assert f"t = {t} of 1000: x_t = {signal:.3f} · picture" in page.text_content(".schedule .says")
    assert page.locator(".schedule circle.visited").count() == 25
    assert page.locator(".schedule circle.current").count() == 1


# --- the link --------------------------------------------------------------------------------------------------------


def test_a_link_holds_the_whole_state(opened, tmp_path):
    """Also the picture of one's own, and the step and word that are looked at."""
    page = opened()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(tmp_path / "mine.png")
    page.set_input_files(".file", tmp_path / "mine.png")
    page.wait_for_function("live.fields.init.value")
    assert "over=1&" in page.locator(".elsewhere code").last.text_content()
    state = {
        "prompt": "a & b = c # d",
        "negative": "é",
        "seed": 7,
        "guidance": 3.5,
        "sampler": "euler",
        "strength": 0.9,
    }
    draw(page, **state, steps=5, second="a & b", hide=[2], preview=4)
    page.locator("[name=step]").fill("2")
    page.evaluate("live.find('.words button:nth-child(3)').click()")
    page.wait_for_function("live.selected === 1")
    link = page.evaluate("live.link()")
    assert {name: values[0] for name, values in parse_qs(link.split("#")[1]).items()}["step"] == "2"

    again = opened("#" + link.split("#")[1])
    assert again.evaluate("live.run") is None and again.input_value("[name=negative]") == "é"
    again.evaluate("live.draw()")
    assert again.evaluate("live.selected") == 1
    again.wait_for_function("live.shown && live.other.done")
    assert off(shown(again), shown(page)) == 0 and off(shown(again, ".pad"), shown(page, ".pad")) == 0
    assert again.evaluate("live.request.hide") == [2] and again.evaluate("live.request.init.strength") == 0.9
    assert again.evaluate("live.link()") == link


def test_the_address_of_the_page_is_the_link(opened):
    page = opened()
    draw(page, prompt="a star")
    assert page.evaluate("location.href") == page.evaluate("live.link()")
    page.evaluate("location.hash = 'prompt=a+heart&seed=4'")
    page.wait_for_function("live.fields.seed.value === '4'")
    assert page.input_value("[name=prompt]") == "a heart"


# --- when something is in the way ------------------------------------------------------------------------------------


def test_errors_are_shown_in_one_sentence_and_can_be_overcome(opened):
    page = opened()
    page.route("**/weights_0.js", lambda route: route.abort())
    page.click("[name=go]")
    page.wait_for_selector(".error")
    assert page.inner_text("[role=status]") == "There is no model/weights_0.js."
    assert page.is_hidden("[name=stop]")
    page.unroute("**/weights_0.js")
    draw(page)
    assert page.query_selector(".error") is None

    page.evaluate("live.fields.sampler.add(new Option('plms', 'plms', true, true))")
    page.click("[name=go]")
    page.wait_for_selector(".error")
    assert page.inner_text("[role=status]") == 'There is no sampler "plms", only ddim,dpmpp_2m,euler.'


def test_a_page_that_is_a_file_draws_too(opened, site, tiny):
    page = opened(address=(site / "index.html").as_uri())
    assert page.evaluate("live.run.recorded")
    page.fill("[name=prompt]", "a purple star")
    page.evaluate("live.fields.steps.value = 4")
    page.press("[name=prompt]", "Enter")
    page.wait_for_function("live.about && live.run.done && !live.run.recorded")
    theirs = tiny.txt2img("a purple star", steps=4, guidance_scale=4.0, sampler="dpmpp_2m", seed=0).images[0]
    page.wait_for_function("live.selected === 3 && live.shown.last")
    assert off(shown(page), theirs) <= 1
    assert "prompt=a+purple+star" in page.evaluate("location.href")


# --- for everybody ---------------------------------------------------------------------------------------------------


def test_the_keyboard_alone_reaches_everything(opened):
    page = opened()
    for reached in ("Take the tour", "prompt"):
        page.keyboard.press("Tab")
        assert reached in page.evaluate("document.activeElement.name || document.activeElement.textContent")
    page.keyboard.press("Control+A")
    page.keyboard.type("a heart")
    page.keyboard.press("Enter")
    page.wait_for_function("live.run.done && live.request.prompt === 'a heart'", timeout=20000)
    page.focus("[name=step]")
    page.keyboard.press("Home")
    page.wait_for_function("live.selected === 0")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("live.selected === 1")

    unfold(page)
    unreached = """() => {
        const all = [...document.querySelectorAll(".minisd :is(button, input, select, summary)")];
        return all.filter((element) => element.checkVisibility() && element.tabIndex < 0).map((e) => e.outerHTML);
    }"""
    assert page.evaluate(unreached) == []
    page.focus(".comparison summary")
    page.keyboard.press("Enter")
    assert not page.evaluate("document.querySelector('.comparison').open")


@pytest.mark.parametrize("width", [360, 800])
def test_no_width_needs_scrolling_sideways(opened, width):
    page = opened(viewport={"width": width, "height": 740})
    unfold(page)
    draw(page, prompt="a " + "verylongword" * 9, second="b" * 99, steps=2)
    page.wait_for_function("live.other.done")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_first_screen_has_the_prompt_and_both_pictures(opened):
    for options in ({"viewport": {"width": 1280, "height": 800}}, PHONE):
        page = opened(**options)
        for selector in ("[name=prompt]", "[name=go]", "canvas >> nth=0", "canvas >> nth=1", "[name=step]"):
            box = page.locator(selector).bounding_box()
            assert box["y"] + box["height"] <= options["viewport"]["height"], selector


def test_everything_has_a_name_for_a_screen_reader(opened):
    page = opened()
    unfold(page)
    draw(page, second="a star", steps=2)
    nameless = """() => {
        const named = (e) => e.ariaLabel || e.labels?.[0]?.textContent.trim() || e.textContent.trim() || e.title;
        const all = document.querySelectorAll(".minisd :is(button, input, select, progress, [role=img], [role=group])");
        return [...all].filter((e) => e.type !== "hidden" && !named(e)).map((e) => e.outerHTML);
    }"""
    assert page.evaluate(nameless) == []
    assert page.get_attribute("[name=step]", "aria-valuetext") == "2 of 2, t = 499"


# --- minisd page -----------------------------------------------------------------------------------------------------


def test_minisd_page_writes_a_page_of_any_model(opened, sd, tmp_path, capsys):
    """Here one with random weights, of other sizes than those that ship."""
    minisd.save(sd, tmp_path / "mine")
    out = tmp_path / "page"
    cli.main(["page", "--model", str(tmp_path / "mine"), "--out", str(out), "--prompts", "a red fox"])
    assert f"wrote {out}: open {out / 'index.html'} in a browser" in capsys.readouterr().out
    page = opened(address=(out / "index.html").as_uri())
    draw(page, prompt="a red fox", steps=3)
    theirs = sd.txt2img("a red fox", steps=3, guidance_scale=4.0, sampler="dpmpp_2m", seed=0).images[0]
    assert off(shown(page), theirs) <= 1
    assert str(tmp_path / "mine") in page.locator(".elsewhere code").first.text_content()
    cli.main(["page", "--model", "tiny", "--out", str(out), "--prompts"])  # another in its place, without a recording


def test_a_page_of_64x64_pixels_records_and_draws_the_same(opened, randomise, tmp_path):
    """With the sizes of the preset, whose UNet reads the prompt on maps of three sizes, and random weights."""
    tokenizer = minisd.BPETokenizer.load(WEIGHTS / "emoji" / "tokenizer")
    sd = randomise(minisd.LatentDiffusion(minisd.PRESETS["emoji-64"], tokenizer))
    minisd.save(sd, tmp_path / "mine", dtype=torch.float16)
    sd = minisd.load(tmp_path / "mine", "cpu")
    live.write_page(tmp_path / "mine", tmp_path / "page", "mine", [live.record(sd, "a red fox")])
    page = opened(address=(tmp_path / "page" / "index.html").as_uri())
    sizes = "Object.values(live.run.steps[9].attention).map(({ h, w, weights }) => [h, w, weights.length / h / w])"
    assert page.evaluate(sizes) == [[side, side, 32] for side in (16, 8, 4, 8, 8, 16, 16)]
    case = {"prompt": "a red fox above a heart", "negative": "blue", "seed": 4, "sampler": "euler"}
    draw(page, **case, steps=3, guidance=3)
    theirs = sd.txt2img(
        case["prompt"], negative_prompt="blue", steps=3, guidance_scale=3.0, sampler="euler", seed=4
    ).images[0]
    assert shown(page).shape == (64, 64, 3) and off(shown(page), theirs) <= 1


@pytest.mark.parametrize("before", ["nothing", "a page"])
def test_a_page_is_written_whole_or_not_at_all(before, tmp_path, monkeypatch):
    """A full disk leaves nothing that looks like a page, and the page that was there."""
    out = tmp_path / "page"
    if before == "a page":
        live.write_page(WEIGHTS / "tiny", out, "the old one")
    files = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}

    def write_text(path, *given):
        if path.name == "recording.js":  # the last but the recordings
            raise OSError(28, "No space left on device")
        return written(path, *given)

    written = Path.write_text
    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(OSError, match="No space left on device.*what was there before is untouched"):
        live.write_page(WEIGHTS / "tiny", out, "the new one")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == files

    monkeypatch.undo()
    (out / "mine.txt").parent.mkdir(exist_ok=True)
    (out / "mine.txt").write_text("what else is in the folder stays")
    live.write_page(WEIGHTS / "tiny", out, "the new one")
    assert "the new one" in (out / "model" / "recording.js").read_text("utf-8")
    assert (out / "mine.txt").exists() and [path.name for path in tmp_path.iterdir()] == ["page"]


REFUSED = {
    "unet": ({}, ["--model", "nowhere"], "nowhere holds no model in minisd's layout: `minisd convert MODEL FOLDER`"),
    "out": ({}, ["--out", "full"], "full holds something else than a page: give --out another folder"),
    "large": ({"MOST_BYTES": 1 << 20}, [], "the weights of .* have 1 MB, and a page can hold 1: give a smaller model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_minisd_page_refuses_in_one_sentence(case, tmp_path, monkeypatch):
    changes, arguments, sentence = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    for name, value in changes.items():
        monkeypatch.setattr(live, name, value)
    Path("full").mkdir()
    Path("full/letter.txt").touch()
    with pytest.raises(SystemExit, match=sentence):
        cli.main(["page", "--model", "tiny", "--out", "page", *arguments])
    assert not Path("page").exists() and [path.name for path in Path("full").iterdir()] == ["letter.txt"]


def test_a_model_that_the_engine_cannot_run_is_refused(make_sd, tmp_path):
    from minisd.conditions import ClassConfig
    from minisd.vq import VQConfig

    kinds = {
        "classes": {"cond_stage": ClassConfig(3, 32)},
        "vq": {"first_stage": VQConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4, embed_dim=4)},
    }
    for name, changes in kinds.items():
        sd = make_sd(**changes)
        minisd.save(sd, tmp_path / name)
        with pytest.raises(ValueError, match="it needs a model that reads prompts and has a KL autoencoder"):
            live.check(sd, tmp_path / name)
