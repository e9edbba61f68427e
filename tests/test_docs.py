"""The docs pages are right: their examples run, their names exist, their links lead somewhere."""

import ast
import functools
import importlib
import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
STAGES = {
    "noising": ["noising"],
    "loss": ["loss"],
    "unet": ["unet", "attention"],
    "vae": ["vae", "vq"],
    "clip": ["clip", "tokenizer"],
    "sampling": ["sampling"],
    "latent_diffusion": ["latent_diffusion"],
    "editing": ["editing"],
    "lora": ["lora"],
    "flow": ["flow"],
}

each_stage = pytest.mark.parametrize("stage", STAGES)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(page: Path) -> str:
    return page.read_text("utf-8")


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", [*STAGES, "path"])
def test_examples_run_and_have_the_shapes_that_they_say(name, monkeypatch, tmp_path):
    """The blocks of a page share their variables. A comment "# [2 4 8 8]" holds for what its line assigns."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(text_of(DOCS / f"{name}.md"))
    assert blocks, "a page without an example"
    variables = {}
    for block in blocks:
        lines = block.splitlines()
        for node in ast.parse(block).body:  # one statement at a time, because a later one may assign the same name
            exec(compile(ast.Module([node], []), f"{name}.md", "exec"), variables)
            said = re.search(r"# \[([\d ]+)\]", lines[node.end_lineno - 1])
            if said and isinstance(node, ast.Assign):
                variable = node.targets[0].id
                shape = " ".join(map(str, variables[variable].shape))
                assert shape == said[1], f"{variable} is [{shape}], not [{said[1]}]"


@each_stage
def test_page_of_a_stage_names_all_that_its_module_offers(stage):
    named = set(re.findall(r"`(?:\w+\.)*(\w+)", text_of(DOCS / f"{stage}.md")))
    for module in (importlib.import_module(f"minisd.{name}") for name in STAGES[stage]):
        offered = {
            name
            for name, thing in vars(module).items()
            if not name.startswith("_")
            and (inspect.isclass(thing) or inspect.isfunction(thing))
            and thing.__module__ == module.__name__
        }
        assert offered, f"{module.__name__} offers nothing"
        missing = offered - named
        assert not missing, f"docs/{stage}.md says nothing of {sorted(missing)}"


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "noising"])  # tables by equation, by schedule
def test_names_table_of_a_stage_names_what_exists(stage):
    """The first column of the table under "Names": `UNetModel`, `LatentDiffusion.apply_model`, ..."""
    section = re.search(r"^## Names\n(.*?)(?=^## )", text_of(DOCS / f"{stage}.md"), re.DOTALL | re.MULTILINE)
    for row in re.findall(r"^\| (`.*?) \|", section[1], re.MULTILINE):
        for name in re.findall(r"`([\w.]+)`", row):
            assert any(exists(f"minisd.{module}.{name}") for module in STAGES[stage]), f"there is no {name}"


@functools.cache
def exists(name: str) -> bool:
    """Whether "minisd.unet.UNetModel.forward" can be had: as modules, then attributes, then a field."""
    first, *rest = name.split(".")
    thing = importlib.import_module(first)
    for part in rest:
        if hasattr(thing, part):
            thing = getattr(thing, part)
        elif inspect.ismodule(thing):
            try:
                thing = importlib.import_module(f"{thing.__name__}.{part}")
            except ModuleNotFoundError:
                return False
        else:  # a field without a default
            return part == rest[-1] and part in getattr(thing, "__dataclass_fields__", {})
    return True


@each_page
def test_names_of_minisd_exist(page):
    found = set(re.findall(r"(?<![\w/.-])minisd(?:\.[A-Za-z_]\w*)+", text_of(page)))
    missing = {name for name in found if not exists(name)}
    assert not missing, f"{page.name} names {sorted(missing)}"


@each_page
def test_links_lead_somewhere(page):
    """To a file of the tree, or to a heading of it. (The build copies the notebooks to docs/notebooks/.)"""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, heading = link.partition("#")
        assert not link.startswith("../notebooks/"), f"{page.name} leads to {link}: the build has it at {link[3:]}"
        target = page if not path else page.parent / path
        if not target.exists() and target.is_relative_to(DOCS / "notebooks"):
            target = ROOT / "notebooks" / target.relative_to(DOCS / "notebooks")
        assert target.exists(), f"{page.name} leads to {link}, which is not there"
        assert target.is_file() or page.parent == ROOT, f"{page.name} leads to {link}, a folder"
        if heading.startswith("tour="):  # a stop of the guided tour, which the build leads to
            stops = json.loads(text_of(ROOT / "minisd" / "live" / "tour.json"))["stops"]
            assert path.endswith("play.md") and heading[5:] in {stop["id"] for stop in stops}, f"{link} is no stop"
        elif heading:
            headings = re.findall(r"^#+ (.*)$", text_of(target), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
            assert heading in slugs, f"{page.name} leads to {link}, but there is no such heading"


@each_page
def test_pages_fetch_nothing(page):
    """Pictures and scripts lie beside the pages."""
    assert not re.findall(r"!\[[^\]]*\]\(https?:|src=[\"']?(?:https?:)?//|<iframe", text_of(page))


def walk(heading: str) -> dict[str, list[str]]:
    """A table of docs/path.md: {symbol: its shape in the model that ships, in Stable Diffusion v1}, in its order."""
    section = text_of(DOCS / "path.md").split(f"## {heading}\n")[1]
    rows = re.findall(r"^\| \d+ \| `(.*?)` \| .*? \| (.*?) \| (.*?) \|", section.split("\n## ")[0], re.MULTILINE)
    return {symbol: list(shapes) for symbol, *shapes in rows}


def shapes_by_config(config, symbols, steps: int = 25) -> list[str]:
    """The shapes of a table, computed from a configuration alone, so that it works for SD v1, too."""
    latent = f"[1 {config.first_stage.embed_dim}" + 2 * f" {config.image_size // config.first_stage.downsampling}" + "]"
    context = f"[1 {config.cond_stage.max_length} {config.cond_stage.width}]"
    channels = config.unet.model_channels
    known = {
        "prompt": "text", "tokens": f"[1 {config.cond_stage.max_length}]", "c": context, "c_empty": context,
        "timesteps": f"[{steps}]", "t": "[1]", "t_emb": f"[1 {channels}]", "emb": f"[1 {4 * channels}]",
        "x": f"[1 3 {config.image_size} {config.image_size}]", "loss": "[]",
    }  # fmt: skip
    return [known.get(symbol, latent) for symbol in symbols]


@pytest.mark.parametrize("heading", ["A drawing", "A step of training"])
def test_path_is_what_trace_prints(heading):
    import minisd

    sd = minisd.load("emoji", "cpu")
    if heading == "A drawing":
        trace = minisd.trace(sd, "a fox, noto style", steps=25, guidance_scale=4.0)
    else:
        trace = minisd.trace(sd, "a fox, noto style", image=minisd.data.sample(size=32).batch([0]))
    told = walk(heading)
    assert list(told) == [entry.symbol for entry in trace]
    shapes = ["text" if isinstance(e.value, str) else f"[{' '.join(map(str, e.shape))}]" for e in trace]
    assert [emoji for emoji, _ in told.values()] == shapes == shapes_by_config(sd.config, told)
    assert [sd_v1 for _, sd_v1 in told.values()] == shapes_by_config(minisd.PRESETS["sd-v1"], told)


COMPVIS_ROW = re.compile(r"^\| ([^|]*) \| (`(?:ldm|scripts|taming|main)[^|]*) \| ([^|]*) \|", re.MULTILINE)


@pytest.fixture
def source_lines():
    """The module by which the build finds where a name stands."""
    spec = importlib.util.spec_from_file_location("source_lines", DOCS / "source_lines.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_diagram_is_described_to_those_who_cannot_see_it(tmp_path):
    spec = importlib.util.spec_from_file_location("diagram_words", DOCS / "diagram_words.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    title, desc = '<title>"Heads" &amp; more</title>', "<desc>Four of\nthem.</desc>"
    (tmp_path / "diagram").write_text(f"<svg>{title}\n{desc}</svg>", "utf-8")
    (tmp_path / "figure").write_text("<svg><path/></svg>", "utf-8")
    files = {"a1.svg": tmp_path / "diagram", "b2.svg": tmp_path / "figure"}
    same = '<img alt="drawn" src="../_images/b2.svg" /> <img alt="drawn" src="../_images/c3.png" />'
    page = module.with_words(f'<img alt="drawn" src="../_images/a1.svg" /> {same}', files)
    words = "&quot;Heads&quot; &amp; more. Four of\nthem."
    assert page == f'<img alt="{words}" src="../_images/a1.svg" /> {same}'


def test_compvis_page_leads_to_the_line_of_each_name(source_lines):
    """The line that the build finds is compared with the one that Python names for the object."""
    rows = COMPVIS_ROW.findall(text_of(DOCS / "compvis.md"))
    assert len(rows) > 50
    for theirs, file, ours in rows:
        names = re.findall(r"`(minisd[\w.]+)`", ours)
        assert names or ours == "not there", f"what stands for {theirs} of {file}?"
        for name in names:
            assert exists(name), f"there is no {name}"
            found = source_lines.where(name)
            thing = functools.reduce(getattr, name.split(".")[1:], importlib.import_module("minisd"))
            thing = thing.fget if isinstance(thing, property) else thing
            if inspect.isclass(thing) or inspect.isroutine(thing):
                thing = inspect.unwrap(thing)
                file, lines = inspect.getsourcefile(thing), inspect.getsourcelines(thing)
                start = next(i for i, line in enumerate(lines[0]) if line.lstrip().startswith(("def ", "class ")))
                place = Path(file).relative_to(ROOT / "minisd").as_posix()
                assert found == f"{place}:{lines[1] + start}", f"{name} stands at {place}:{lines[1] + start}"
            else:
                assert found, f"{name} is nowhere in the source"


@each_page
def test_names_of_minisd_lead_to_their_lines(page, source_lines):
    """By whichever name: `minisd.UNetModel` stands where `minisd.unet.UNetModel` does."""
    named = set(re.findall(r"(?<!\[)`(minisd(?:\.\w+)+)`", text_of(page)))
    modules = {name for name in named if any(ROOT.glob(name.replace(".", "/") + end) for end in (".py", "/*.py"))}
    lost = {name for name in named - modules if not source_lines.where(name)}
    assert not lost, f"{page.name} names {sorted(lost)}, which are nowhere in the source"
    assert source_lines.where("minisd.UNetModel.forward") == source_lines.where("minisd.unet.UNetModel.forward")


def test_compvis_page_has_what_trace_names():
    """`minisd.trace` names methods of CompVis, and readers look for them on this page."""
    import minisd

    sd = minisd.load("tiny", "cpu")
    picture = minisd.data.sample(size=32).batch([0])
    traces = [minisd.trace(sd, "a red circle", steps=2), minisd.trace(sd, "a red circle", image=picture)]
    page = text_of(DOCS / "compvis.md")
    for entry in (entry for trace in traces for entry in trace):
        assert entry.file in page, f"{entry.file} is not on the page"
        last = entry.compvis.split(",")[0].split(".")[-1]
        if "." in entry.compvis and last not in ("tokenizer", "forward", "time_embed", "decode"):  # parts of classes
            assert last in page, f"{entry.compvis} is not on the page"


def test_glossary_has_each_term_once_and_in_both_languages():
    rows = re.findall(r"^\| (?!English|---)(.*) \|$", text_of(DOCS / "glossary.md"), re.MULTILINE)
    columns = [row.split(" | ") for row in rows]
    assert len(columns) >= 50
    assert all(len(row) == 5 for row in columns)
    for english, chinese, meaning, _, _ in columns:
        assert re.search(r"[A-Za-z]", english) and re.search(r"[\u4e00-\u9fff]", chinese), f"{english}: {chinese}"
        assert re.search(r"[a-z].*[\u4e00-\u9fff]", meaning), f"{english} is explained in one language"
    for terms in zip(*(row[:2] for row in columns), strict=True):
        assert len(set(terms)) == len(terms)


def test_teaching_page_counts_the_exercises_that_there_are():
    from minisd.coursework import EXERCISES

    text = text_of(DOCS / "teaching.md")
    rows = re.findall(r"^\| \[(\d+) [^|]* \| \d+ \| [\d ]*\| [^|]*\| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    said = {int(stage): (int(count), int(minutes)) for stage, count, minutes in rows}
    stages = {exercise.number for exercise in EXERCISES.values()}
    of_stage = {stage: [e for e in EXERCISES.values() if e.number == stage] for stage in stages}
    assert said == {stage: (len(those), sum(e.minutes for e in those)) for stage, those in of_stage.items()}
    total = sum(e.minutes for e in EXERCISES.values())
    assert f"{len(EXERCISES)} exercises that take about {total / 60:.0f} hours" in text

    weeks = "\n".join(re.findall(r"^\| \d+ \| (?!\[).*$", text, re.MULTILINE))
    named = set(re.findall(r"`(\w+)`", weeks))
    assert named and named <= EXERCISES.keys(), f"no exercise is called {sorted(named - EXERCISES.keys())}"


def test_coursework_page_counts_the_mistakes_that_are_known():
    from minisd.coursework import EXERCISES

    text = text_of(DOCS / "coursework.md")
    rows = re.findall(r"^\| \d \w+ \| `(\w+)` \|.*\| (\d+) \| \w* *\|$", text, re.MULTILINE)
    said = {name: int(count) for name, count in rows}
    assert said == {name: len(exercise.mistakes) for name, exercise in EXERCISES.items()}
    assert set(re.findall(r"(\d+) mistakes", text)) == {str(sum(said.values()))}


def test_readme_is_light():
    """Its small pictures are read over slow lines, and git keeps every version of them."""
    sizes = [file.stat().st_size for file in (DOCS / "pictures" / "stages").iterdir()]
    assert max(sizes) <= 15_000 and sum(sizes) <= 120_000
    shown = set(re.findall(r"\]\(docs/pictures/stages/(.*?)\)", text_of(ROOT / "README.md")))
    assert shown == {file.name for file in (DOCS / "pictures" / "stages").iterdir()}


def test_citation_is_of_this_version():
    import yaml

    import minisd

    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    assert citation["version"] == minisd.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
