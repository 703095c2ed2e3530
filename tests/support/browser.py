"""Headless Chromium over a page, whose every complaint is remembered."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """The browser's program, where there is one."""
    return next((path for name in CHROMIUM if (path := shutil.which(name))), None)


def why_no_browser() -> str | None:
    """Why pages cannot be tested here; None where they can."""
    if importlib.util.find_spec("playwright") is None:
        return "needs playwright"
    return None if chromium() else "needs chromium; apt-get install chromium"


@contextmanager
def browser() -> Iterator[Any]:
    """A browser for the block."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


@contextmanager
def page_of(opened: Any, **context: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page of its own, and what its console complained of."""
    made = opened.new_context(**context)
    page, complaints = made.new_page(), []
    page.set_default_timeout(60_000)
    page.on(
        "console",
        lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    try:
        yield page, complaints
    finally:
        made.close()
