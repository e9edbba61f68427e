"""The Chromium of this machine, for playwright, which would otherwise fetch one."""

import os
import shutil


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def launch(playwright, headless: bool = True):
    """A browser. Its sandbox does not start for root, so root (as one is in a container) goes without."""
    options = {"executable_path": find_chromium(), "args": ["--no-sandbox"] if is_root() else []}
    return playwright.chromium.launch(headless=headless, **options)
