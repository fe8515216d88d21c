"""Take pictures of the page of lmdist-serve, in a headless Chromium.

    python benchmarks/page_picture.py bundles/demo --plot docs/images/page.png      # the picture of docs/serving.md
    python benchmarks/page_picture.py bundles/demo --all /tmp/pictures              # light, dark, and on a phone

The page continues a text with a fixed seed, and colours it by surprisal. Needed are the extra `dev-browser` and Chromium, as in
Debian's package `chromium`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servers import answers, free_port

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PROMPT = "my fellow americans, the robots of tomorrow are here to"
SEED = "8"
TOKENS = "60"
DESKTOP = {"viewport": {"width": 1080, "height": 690}}
PHONE = {"viewport": {"width": 360, "height": 800}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
PICTURES: dict[str, dict[str, Any]] = {
    "light": DESKTOP,
    "dark": DESKTOP | {"color_scheme": "dark"},
    "phone": PHONE,
    "phone-dark": PHONE | {"color_scheme": "dark"},
}


@contextmanager
def serving(bundle: Path) -> Iterator[str]:
    """Start lmdist-serve and yield the address of its page."""
    url = f"http://127.0.0.1:{(port := free_port())}/"
    process = subprocess.Popen([sys.executable, "-m", "lmdist_export.serve", str(bundle), "--port", str(port)])
    try:
        while not answers(url):
            if process.poll() is not None:
                raise SystemExit("lmdist-serve does not start")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def take(browser: Browser, url: str, picture: Path, context: dict[str, Any]) -> None:
    """Use the page as a person would, and write what it looks like then."""
    page = browser.new_page(**context)
    page.goto(url)
    page.locator("#text:enabled").wait_for()
    page.locator("#text").fill(PROMPT)
    page.locator(".option:has(#option-max_new_tokens) input[type=number]").fill(TOKENS)
    page.locator("#seed").fill(SEED)
    page.locator("#generate").click()
    page.locator("#status", has_text="with seed").wait_for()
    page.locator("#colours").check()
    page.locator("#mirror .token").first.wait_for()
    page.locator("#text").press("End")
    page.locator("#text").press_sequentially(" ")
    page.locator("#next-words:not(.old) .word").first.wait_for()
    page.wait_for_timeout(1_000)  # the colours of the last word
    page.locator("#mirror .unknown").first.hover(force=True)
    page.screenshot(path=picture, full_page="is_mobile" in context)
    page.close()


def main() -> None:
    """Take one picture, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--plot", type=Path, help="write the light one here")
    parser.add_argument("--all", type=Path, help="write all of them into this folder")
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with serving(arguments.bundle) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        if arguments.all:
            arguments.all.mkdir(parents=True, exist_ok=True)
            for name, context in PICTURES.items():
                take(browser, url, arguments.all / f"{name}.png", context)
        if arguments.plot:
            take(browser, url, arguments.plot, PICTURES["light"])
        browser.close()


if __name__ == "__main__":
    main()
