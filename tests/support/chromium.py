"""A headless Chromium for the tests of pages: Debian's, or whatever is installed; where there is none, they are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the installed browser; Playwright's own is never downloaded."""
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@contextmanager
def fresh_page(browser: Browser, expected_errors: tuple[str, ...] = (), **context: object) -> Iterator[Page]:
    """Yield a page without cookies or cache; at its end, neither it nor the browser has complained of anything unexpected.

    A violation of the page's Content-Security-Policy is such a complaint, and so is each request that failed.
    """
    opened: BrowserContext = browser.new_context(**context)  # pyright: ignore[reportArgumentType]
    page = opened.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))
    page.set_default_timeout(30_000)
    yield page
    opened.close()
    unexpected = [text for text in complaints if not any(part in text for part in expected_errors)]
    assert not unexpected, unexpected
