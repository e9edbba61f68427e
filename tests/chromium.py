"""The Chromium of this machine, for playwright, which would otherwise fetch one, and a server for what it opens."""

import functools
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Inside the `with`, this machine serves the folder under the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def launch(playwright, headless: bool = True):
    """A browser. Its sandbox does not start for root, so root (as one is in a container) goes without."""
    options = {"executable_path": find_chromium(), "args": ["--no-sandbox"] if is_root() else []}
    return playwright.chromium.launch(headless=headless, **options)
