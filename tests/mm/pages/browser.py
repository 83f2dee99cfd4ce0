"""A real browser for tests of pages: Chromium without a window, driven by playwright (docs/testing.md)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def browser(given: Path | None) -> Iterator[Any]:
    """A browser: `given`, one on the PATH, or playwright's own. Skips, saying why, where there is none."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="needs the extra `browser`: pip install '.[browser]'"
    )
    found = given or next((path for name in NAMES if (path := shutil.which(name))), None)
    with api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        if found is None and not own.exists():
            pytest.skip("no browser: --browser PATH, Chromium on the PATH, or `playwright install chromium`")
        # Tests run as root in containers, where Chromium's sandbox cannot; pages here are our own files.
        arguments = ["--no-sandbox"]
        running = playwright.chromium.launch(executable_path=str(found or own), args=arguments)
        try:
            yield running
        finally:
            running.close()
