"""Run a notebook as a newcomer does: JupyterLab, a browser, "Run All Cells", and look at the last figure.

    python tests/jupyterlab_in_browser.py [notebooks/00_start_here.ipynb] [--headed] [--screenshot lab.png]

Apart from the tests: it takes a minute, and needs JupyterLab ([notebooks]), playwright ([site]) and Chromium.
"""

import argparse
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from chromium import find_chromium, is_root, launch
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]

# How far the kernel is: code cells that have run, of how many; and what went wrong.
PROGRESS = """() => {
    const panel = jupyterapp.shell.currentWidget;
    const cells = [...panel.content.model.cells].filter((cell) => cell.type === "code");
    const outputs = cells.flatMap((cell) => cell.toJSON().outputs);
    return {
        ran: cells.filter((cell) => cell.executionCount).length,
        of: cells.filter((cell) => cell.sharedModel.source.trim()).length,
        status: panel.sessionContext.session?.kernel?.status,
        errors: outputs.filter((output) => output.output_type === "error").map((output) => output.evalue),
    };
}"""

# The last cell that has a picture, scrolled to: JupyterLab draws a cell when one comes near it.
LAST_FIGURE = """async () => {
    const notebook = jupyterapp.shell.currentWidget.content;
    const pictured = (cell) =>
        cell.model.type === "code" &&
        cell.model.toJSON().outputs.some((o) => Object.keys(o.data ?? {}).some((kind) => kind.startsWith("image/")));
    const last = notebook.widgets.findLastIndex(pictured);
    await notebook.scrollToItem(last, "end");
    return notebook.widgets[last].node;
}"""


@contextmanager
def jupyterlab(folder: Path):
    """JupyterLab serves a folder; yields its address, with the token to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--expose-app-in-browser"]
    command += ["--allow-root"] if is_root() else []
    with open(folder / "jupyterlab.log", "wb") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            if server.poll() is not None:
                sys.exit(f"JupyterLab ended:\n{(folder / 'jupyterlab.log').read_text()}")
            try:
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            sys.exit("JupyterLab did not answer within two minutes")
        yield address, token
    finally:
        server.terminate()
        server.wait(30)


def open_notebook(page: Page, address: str) -> None:
    """With its outputs cleared, so that what is seen afterwards is of this run."""
    page.goto(address)
    kernel = "globalThis.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
    page.wait_for_function(f"() => {kernel}?.status === 'idle'", timeout=120_000)
    page.evaluate("() => jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    assert page.evaluate(PROGRESS)["ran"] == 0


def run_all_cells(page: Page, limit_s: int) -> dict:
    """By the menu, as one does. Returns the state in which it came to rest."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    start = time.monotonic()
    while True:
        now = page.evaluate(PROGRESS)
        if now["errors"]:
            sys.exit(f"a cell ended in an error: {now['errors'][0]}")
        if now["ran"] == now["of"] and now["status"] == "idle":
            return now
        if time.monotonic() - start > limit_s:
            sys.exit(f"not through after {limit_s} s: {now}")
        page.wait_for_timeout(500)


def size_of_last_figure(page: Page) -> tuple[int, int]:
    """In pixels, as the browser has it on the screen."""
    cell = page.evaluate_handle(LAST_FIGURE).as_element()
    figure = cell.wait_for_selector(".jp-OutputArea-output img", state="visible")
    return tuple(figure.evaluate("(img) => img.decode().then(() => [img.naturalWidth, img.naturalHeight])"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", nargs="?", type=Path, default=ROOT / "notebooks" / "00_start_here.ipynb")
    parser.add_argument("--headed", action="store_true", help="show the browser")
    parser.add_argument("--screenshot", type=Path, help="where to keep a picture of the end")
    parser.add_argument("--limit", type=int, default=300, help="seconds that the cells may take")
    args = parser.parse_args()
    if find_chromium() is None:
        sys.exit("no chromium on the PATH (Debian: apt-get install chromium)")

    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        shutil.copy(args.notebook, scratch)  # a copy, because JupyterLab saves what it ran
        with jupyterlab(Path(scratch)) as (address, token):
            browser = launch(playwright, headless=not args.headed)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            open_notebook(page, f"{address}/lab/tree/{args.notebook.name}?token={token}")
            start = time.monotonic()
            end = run_all_cells(page, args.limit)
            took = time.monotonic() - start
            width, height = size_of_last_figure(page)
            if args.screenshot:
                page.screenshot(path=args.screenshot)
            browser.close()
    print(f"{args.notebook.name}: {end['ran']} of {end['of']} code cells in {took:.0f} s; last figure {width}x{height}")


if __name__ == "__main__":
    main()
