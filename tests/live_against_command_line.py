"""The live page in Chromium against the command line, with any model:

    python tests/live_against_command_line.py runs/emoji/unet/model [--pictures 20] [--seed 0]

Random settings are drawn by `minisd txt2img` and by the page that `minisd page` writes, opened as a file and from a
server. Printed are by how much the pictures differ, how long 25 guided steps take in the page and in torch with one
thread (time of the processor, so that other work on the machine does not count), the time from the arrival of the
weights to the first step, and the memory of the tab's process, which only Linux tells.

It is no test of pytest, because it takes minutes with a model of 64×64 pixels. It ends with an error if fewer than 19
of 20 pictures are equal up to 1 of 255, or if one differs by more than 4.
"""

import argparse
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import numpy as np
from chromium import launch, served
from PIL import Image
from playwright.sync_api import sync_playwright

import minisd
from minisd import cli

WORDS = "a an the red blue green fox cat rocket apple heart star sunflower left above two small grinning zebra".split()
STYLES = ["noto style", "fluent style", "twemoji style", "emojione style", "", "日本", "it's <b>5</b> o'clock"]

# A drawing as a reader makes it: with previews and attention. Then the memory holds what a tab holds.
FIRST = """async () => {
    await live.prepared;
    const { engine } = live;
    const [script, at] = [engine.script, {}];
    engine.script = async (name) => {
        const content = await script(name);
        at.arrived = performance.now();
        return content;
    };
    live.addEventListener("step", () => (at.step ??= performance.now()));
    await live.draw({ prompt: "a red fox, noto style", steps: 25, guidance: 4, seed: 0 });
    if (!live.run.done || live.run.recorded) throw new Error(live.find(".status").textContent);
    return at.step - at.arrived;
}"""
DRAW = """async (options) => {
    const { picture, seconds } = await live.engine.draw(options);
    return { rgba: Array.from(picture.rgba), seconds };
}"""


def settings(pick: random.Random, samplers: list[str]) -> dict:
    """Random options of a drawing, under the page's names, which are those of the command line."""

    def prompt() -> str:
        return " ".join(pick.choices(WORDS, k=pick.randint(0, 7))) + f", {pick.choice(STYLES)}"

    return {
        "prompt": prompt(),
        "negative": pick.choice(["", "", prompt()]),
        "seed": pick.choice([pick.randrange(100), pick.randrange(2**32), pick.randrange(2**53)]),
        "sampler": pick.choice(samplers),
        "steps": pick.choice([1, 5, 10, 15, 25, pick.randint(2, 30)]),
        "guidance": pick.choice([0, 1, 2.5, 4, 7.5, round(pick.uniform(-1, 15), 2)]),
    }


def on_the_command_line(model: str, options: dict, out: Path) -> np.ndarray:
    """The picture that `minisd txt2img` writes, [h w 3]."""
    flags = [f"--{name}={value}" for name, value in options.items() if name != "prompt"]
    flags += ["--model", model, "--num-images", "1", "--scale", "1", "--device", "cpu", "--out", str(out)]
    cli.main(["txt2img", *flags, "--", options["prompt"]])
    return np.asarray(Image.open(out).convert("RGB")).astype(int)


class Tab:
    """The process that draws, as Chromium and the system know it."""

    def __init__(self, browser):
        self.session = browser.new_browser_cdp_session()

    def process(self) -> dict:
        processes = self.session.send("SystemInfo.getProcessInfo")["processInfo"]
        return max((each for each in processes if each["type"] == "renderer"), key=lambda each: each["cpuTime"])

    def seconds(self) -> float:
        return self.process()["cpuTime"]

    def memory(self) -> str:
        """Now, and at most so far, in MB. "?" where the system does not say."""
        status = Path(f"/proc/{self.process()['id']}/status")
        found = dict(re.findall(r"(Vm\w+):\s+(\d+) kB", status.read_text() if status.exists() else ""))
        now, most = (int(found[name]) * 1024 // 10**6 if found else "?" for name in ("VmRSS", "VmHWM"))
        return f"{now} MB, at most {most}"


def opened(playwright, address: str, cases: list[dict], theirs: list[np.ndarray], torch_seconds) -> list[int]:
    """Draw all cases in a new browser, print the figures, and return by how much each picture differs."""
    browser = launch(playwright)
    page, tab = browser.new_page(), Tab(browser)
    page.goto(address)
    page.evaluate("live.prepared")
    print(f"{address}\n  memory before loading: {tab.memory()}")
    print(f"  from the arrival of the weights to the first step: {page.evaluate(FIRST) / 1000:.1f} s")
    print(f"  memory after the first drawing: {tab.memory()}", flush=True)
    options = {"prompt": "a red fox, noto style", "steps": 25, "guidance": 4, "sampler": "dpmpp_2m"}
    ours, reference = [], []
    for seed in range(3):
        before = tab.seconds()
        page.evaluate(DRAW, options | {"seed": seed})
        ours.append(tab.seconds() - before)
        reference.append(torch_seconds(seed))
    ours, reference = min(ours), min(reference)
    print(f"  25 guided steps: {ours:.2f} s, torch {reference:.2f} s, {ours / reference:.1f} times as long", flush=True)
    differences = []
    for case, image in zip(cases, theirs, strict=True):
        rgba = np.array(page.evaluate(DRAW, case)["rgba"]).reshape(*image.shape[:2], 4)
        differences.append(int(np.abs(rgba[..., :3] - image).max()))
        if differences[-1] > 1:
            print(f"  differs by {differences[-1]}: {case}")
    equal = sum(difference <= 1 for difference in differences)
    print(f"  {equal} of {len(cases)} pictures within 1 of 255, the worst {max(differences)}")
    print(f"  memory after all drawings: {tab.memory()}", flush=True)
    browser.close()
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="emoji", help="a model that ships, or a folder")
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of settings")
    given = parser.parse_args()
    pick = random.Random(given.seed)
    sd = minisd.load(given.model, "cpu")

    def torch_seconds(seed: int) -> float:
        began = time.process_time()
        sd.txt2img("a red fox, noto style", steps=25, guidance_scale=4.0, sampler="dpmpp_2m", seed=seed)
        return time.process_time() - began

    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "page"
        cli.main(["page", "--model", given.model, "--out", str(site)])
        cases = [settings(pick, ["ddim", "dpmpp_2m", "euler"]) for _ in range(given.pictures)]
        theirs = [on_the_command_line(given.model, case, Path(folder) / "out.png") for case in cases]
        with sync_playwright() as playwright, served(site) as server:
            both = [f"{server}/index.html", (site / "index.html").as_uri()]
            differences = [opened(playwright, address, cases, theirs, torch_seconds) for address in both]
    for each in differences:
        if sum(difference > 1 for difference in each) > given.pictures // 20 or max(each) > 4:
            sys.exit("the pictures are not those of the command line")


if __name__ == "__main__":
    main()
