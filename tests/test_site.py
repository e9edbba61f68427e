"""The built docs, as a reader's browser has them:   MINISD_SITE=docs/_build/html pytest tests/test_site.py

What needs a browser drives the Chromium on the PATH with playwright (pip install -e ".[site]"; it need not fetch a
browser of its own). Where one of them is missing, those tests are skipped.
"""

import json
import os
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from chromium import served

if "MINISD_SITE" not in os.environ:
    pytest.skip("MINISD_SITE names no folder of built docs, such as docs/_build/html", allow_module_level=True)

SITE = Path(os.environ["MINISD_SITE"]).resolve()
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if "_static" not in path.parts)
CODE = [page for page in PAGES if page.startswith("code/minisd/")]  # all made alike
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True}


def test_the_docs_are_built():
    assert {"index.html", "play.html", "noising.html", "notebooks/00_start_here.html"} <= set(PAGES), f"in {SITE}"


# --- links -----------------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """Where a page leads (href, src), and which places it has (id)."""

    def __init__(self, page: str):
        super().__init__()
        self.targets, self.places = set(), {""}
        self.feed((SITE / page).read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.targets.add(value)
            elif name == "id" or (tag, name) == ("a", "name"):
                self.places.add(value)


def test_no_link_or_picture_is_broken():
    links = {page: Links(page) for page in PAGES}
    # The stops of the guided tour, which are built in the browser.
    stops = json.loads((Path(__file__).parents[1] / "minisd" / "live" / "tour.json").read_text("utf-8"))["stops"]
    links["play.html"].places |= {f"tour={stop['id']}" for stop in stops}
    broken, checked = [], 0
    for page in PAGES:
        for target in links[page].targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:  # elsewhere, or the picture itself (data:)
                continue
            checked += 1
            file = (SITE / page).parent.joinpath(unquote(url.path)).resolve() if url.path else SITE / page
            name = str(file.relative_to(SITE)) if file.is_relative_to(SITE) else None
            if not name or not file.is_file() or (name in links and unquote(url.fragment) not in links[name].places):
                broken.append(f"{page}: {target}")
    assert not broken, "\n".join(broken)
    assert checked > 1000, "hardly any links: were they read?"


# --- in the browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    """The address under which the site is served, on this machine."""
    with served(SITE) as address:
        yield address


@pytest.fixture
def page(browser):
    """An empty page of a phone's width."""
    context = browser.new_context(**PHONE)
    yield context.new_page()
    context.close()


# What a look at a page finds. MathJax sets what Sphinx marks as .math: each has to hold glyphs then, and no formula may
# be left as it was typed, but in code.
LOOK = r"""async () => {
    if (window.MathJax) await MathJax.startup.promise;
    const maths = [...document.querySelectorAll(".math")];
    const set = (m) => m.querySelector("mjx-math :is(mjx-c, mjx-mspace)") && !m.querySelector("mjx-merror");
    const article = document.querySelector("article") ?? document.body;
    const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
    const typed = [];
    for (let text; (text = walker.nextNode()); ) {
        const typing = text.parentElement.closest("pre, code, script, style");
        if (!typing && /\$\$|\\[a-zA-Z([]/.test(text.data)) typed.push(text.data.trim());
    }
    // What is too wide may scroll in a box of its own, as code does; the text may not.
    const boxed = (element) => {
        for (let box = element.parentElement; box && box !== article; box = box.parentElement)
            if (getComputedStyle(box).overflowX !== "visible") return true;
        return false;
    };
    const screen = document.documentElement.clientWidth;
    const outside = (element) => element.getBoundingClientRect().right > screen + 1 && !boxed(element);
    const wide = [...article.querySelectorAll(":not(mjx-assistive-mml, mjx-assistive-mml *)")].filter(outside);
    return {
        maths: maths.length,
        unset: maths.filter((m) => !set(m)).map((m) => m.textContent).concat(typed),
        wide: wide.map((element) => element.outerHTML.slice(0, 100)),
    };
}"""


@pytest.fixture(scope="module")
def seen(browser, server):
    """{page: what was found there}, of all pages except those of code, of which one is enough, each opened on a phone.

    Four pages load at the same time, because most of the time goes into their formulas, and a browser has many cores.
    """
    found = {}
    context = browser.new_context(**PHONE)
    names = sorted({*PAGES} - {*CODE[1:]})
    for group in (names[i : i + 4] for i in range(0, len(names), 4)):
        opened = {name: context.new_page() for name in group}
        for name, page in opened.items():
            requests, failures = [], []
            page.on("request", lambda request, to=requests: to.append(request.url))
            page.on("pageerror", lambda error, to=failures: to.append(str(error)))
            page.on("response", lambda answer, to=failures: answer.status < 400 or to.append(answer.url))
            found[name] = {"requests": requests, "failures": failures}
            page.goto(f"{server}/{name}", wait_until="commit")
        for name, page in opened.items():
            page.wait_for_load_state()
            found[name] |= page.evaluate(LOOK)
            page.close()
    context.close()
    return found


def findings(seen: dict, name: str) -> dict:
    return {page: found[name] for page, found in seen.items() if found[name]}


def test_maths_is_set(seen):
    assert not findings(seen, "unset")
    assert sum(found["maths"] for found in seen.values()) > 100
    assert any(url.endswith(".woff") for found in seen.values() for url in found["requests"]), "without its fonts"


def test_nothing_is_fetched_from_elsewhere(seen, server):
    own = (server + "/", "data:", "blob:")
    elsewhere = {page: [u for u in found["requests"] if not u.startswith(own)] for page, found in seen.items()}
    assert not {page: urls for page, urls in elsewhere.items() if urls}
    assert all(found["requests"] for found in seen.values())


def test_nothing_fails_to_load(seen, server):
    optional = f"{server}/favicon.ico"  # the browser asks for it on its own
    failures = {page: [f for f in found["failures"] if f != optional] for page, found in seen.items()}
    assert not {page: failed for page, failed in failures.items() if failed}


def test_no_page_is_wider_than_a_phone(seen):
    assert not findings(seen, "wide")


def test_what_is_folded_is_shown_when_a_reader_asks_for_it(page, server):
    """Code that only measures, and the outputs that a reader is to predict."""
    folded = {name: (SITE / name).read_text("utf-8").count("admonition hide") for name in PAGES}
    name = max(folded, key=folded.get)
    page.goto(f"{server}/{name}")
    asked = page.query_selector_all("details.hide > summary")
    assert len(asked) == folded[name] > 0, "no cell of any notebook is tagged hide-output or hide-input"
    for summary in asked:
        content = summary.evaluate_handle("summary => summary.nextElementSibling").as_element()
        assert summary.inner_text().strip() in ("Show the code", "Show the output") and not content.is_visible()
        summary.click()
        assert summary.inner_text().strip() in ("Hide the code", "Hide the output") and content.is_visible()


@pytest.mark.parametrize("width", [700, 1024, 1280, 1400, 1920])
def test_no_page_scrolls_sideways(browser, server, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    for name in ("index.html", "compvis.html", "notebooks/02_loss.html"):
        page.goto(f"{server}/{name}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
    page.close()


@pytest.mark.parametrize("word", ["噪声", "无分类器引导"])  # two characters, and a whole term
def test_search_finds_chinese_words(page, server, word):
    page.goto(f"{server}/search.html?q={word}")
    page.wait_for_selector("#search-results li a[href^='glossary.html']")


def test_search_finds_a_function(page, server):
    page.goto(f"{server}/search.html?q=q_sample")
    for found in ("noising.html", "notebooks/01_noising.html"):  # the results come in one after the other
        page.wait_for_selector(f"#search-results li a[href^='{found}']")



# --- the page to play with -------------------------------------------------------------------------------------------


def test_the_live_page_shows_a_recording_and_then_draws(browser, server):
    """With the model that ships, which is fetched when something is drawn, and not before."""
    page, requests = browser.new_page(reduced_motion="reduce"), []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"{server}/play.html")
    page.wait_for_function("live.run?.recorded && live.run.done")
    shown = "document.querySelectorAll('#live .pictures canvas')[1].toDataURL()"
    recorded = page.evaluate(shown)
    assert not any("weights" in url for url in requests)

    page.fill("#live [name=prompt]", "a rocket, noto style")
    page.click("#live [name=go]")
    page.wait_for_function("live.about && live.run.done && !live.run.recorded")
    page.wait_for_function(f"{shown} !== {json.dumps(recorded)}")
    assert any("weights" in url for url in requests)
    assert all(url.startswith((server + "/", "data:", "blob:")) for url in requests)
    page.close()


def test_nothing_lies_over_the_title_of_a_stop_on_a_phone(browser, server):
    """Furo shows its button "Back to top" when a reader has scrolled up, as the button "Next" of the tour does."""
    page = browser.new_page(**PHONE)
    page.goto(f"{server}/play.html#tour=unet")
    page.wait_for_function("live.run?.done")
    page.locator("#tour button.main").tap()
    page.wait_for_function("document.activeElement.tagName === 'H2'")
    page.mouse.wheel(0, 600)
    page.wait_for_timeout(200)
    page.mouse.wheel(0, -100)
    page.wait_for_timeout(200)
    assert page.locator(".back-to-top").is_hidden()
    page.close()


def test_every_recording_of_the_live_page_can_be_shown(page, server):
    page.goto(f"{server}/play.html")
    page.wait_for_selector("#live .examples button")
    shown = set()
    for button in page.query_selector_all("#live .examples button"):
        button.click()
        page.wait_for_function("(prompt) => live.request?.prompt === prompt && live.run.done", arg=button.inner_text())
        shown.add(page.evaluate("live.run.done.picture.rgba.join()"))
    assert len(shown) >= 4
