"""The folder of `--layout web` in Chromium, from a static server: the text of lmdist-generate, and no server's help."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import lmdist
from lmdist_export import export
from lmdist_export.api import Model
from lmdist_export.conversion import web
from support.chromium import chromium, fresh_page
from support.javascript import MODULES, needs_package
from support.small_bundles import UNTIED, WORDS, edit_json, make_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

pytestmark = needs_package("onnxruntime-web")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def both(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """A page and a bundle of one run."""
    folder = tmp_path_factory.mktemp("page")
    run = make_run(folder, UNTIED, words=[*WORDS, "old"])
    flags = ["--precision", "int8", "--max-perplexity-loss", "100"]
    runtime = ["--layout", "web", "--onnxruntime-web", str(MODULES / "onnxruntime-web")]
    export.main([str(run), "-o", str(folder / "page"), *flags, *runtime])
    export.main([str(run), "-o", str(folder / "bundle"), *flags])
    return folder / "page", lmdist.load(folder / "bundle", threads=1)


POLICY = "default-src 'self'; script-src 'self' blob: 'wasm-unsafe-eval'; connect-src 'self' https://cdn.jsdelivr.net"
"""The strictest one that docs/browser.md promises to be enough; `fresh_page` fails at what it forbids."""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A static server without a log, and with a Content-Security-Policy."""

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", POLICY)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Yield the address at which a static server has a folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def page(browser: Browser, both: tuple[Path, Model]) -> Iterator[Page]:
    with serving(both[0]) as address, fresh_page(browser) as opened:
        requested: list[str] = []
        opened.on("request", lambda request: requested.append(request.url))
        opened.goto(address)
        opened.locator("#text:enabled").wait_for()
        yield opened
        assert requested
        assert all(url.startswith((address, f"blob:{address}")) for url in requested)


def test_it_writes_what_lmdist_generate_writes(page: Page, both: tuple[Path, Model]) -> None:
    model = both[1]
    prompt = "We said that the president"
    page.locator("#text").fill(prompt)
    page.locator("#seed").fill("7")
    page.locator(".option:has(#option-max_new_tokens) input[type=number]").fill("40")
    page.get_by_role("button", name="Generate").click()
    page.locator("#status", has_text="with seed 7").wait_for()
    assert page.locator("#text").input_value() == model.generate(prompt, seed=7, max_new_tokens=40).text


def test_it_offers_the_next_words_and_colours_tokens(page: Page, both: tuple[Path, Model]) -> None:
    model = both[1]
    page.locator("#text").fill("The president said ")
    page.locator("#next-words:not(.old) .word").first.wait_for()
    offered = [text.split()[0] for text in page.locator("#next-words .word").all_inner_texts()]
    expected = [
        {"``": '"', "''": '"'}.get(word, word) for word, _ in model.next_words("The president said", 8) if word != "<eos>"
    ]
    assert offered == expected[: len(offered)]
    assert len(offered) >= 5
    page.locator("#text").fill("We said that it is unheardof.")
    page.get_by_role("switch").check()
    score = model.score("We said that it is unheardof.", end=False)
    page.locator("#unknown", has_text=str(score.unknown.sum())).wait_for()
    assert float(page.locator("#perplexity").inner_text().replace(",", "")) == pytest.approx(score.perplexity, abs=0.06)


def test_a_text_that_grows_can_be_stopped(page: Page) -> None:
    page.locator("#text").fill("We said")
    page.locator(".option:has(#option-max_new_tokens) input[type=number]").fill("100000")
    page.get_by_text("More options").click()
    page.locator(".option:has(#option-min_new_tokens) input[type=number]").fill("90000")
    page.get_by_role("button", name="Generate").click()
    while len(page.locator("#text").input_value()) < 100:
        page.wait_for_timeout(50)
    page.get_by_role("button", name="Stop").click()
    page.locator("#status", has_text="Stopped.").wait_for()


def test_without_a_package_the_files_come_from_the_cdn(browser: Browser, both: tuple[Path, Model], tmp_path: Path) -> None:
    if json.loads((MODULES / "onnxruntime-web" / "package.json").read_bytes())["version"] not in web.CDN:
        pytest.skip(f"the package is not of the version of {web.CDN}")
    copy = tmp_path / "page"
    shutil.copytree(both[0], copy, ignore=shutil.ignore_patterns("onnxruntime-web"))
    edit_json(copy / "model" / "model.json", runtime=web.ON_CDN._asdict())

    def answer(route: Route) -> None:
        name = route.request.url.removeprefix(f"{web.CDN}/")
        route.fulfill(path=MODULES / "onnxruntime-web" / "dist" / name, headers={"Access-Control-Allow-Origin": "*"})

    with serving(copy) as address, fresh_page(browser) as page:
        page.route(f"{web.CDN}/*", answer)
        page.goto(address)
        page.locator("#text:enabled").wait_for()


def test_a_file_that_is_not_what_was_exported_is_not_used(browser: Browser, both: tuple[Path, Model], tmp_path: Path) -> None:
    copy = tmp_path / "page"
    shutil.copytree(both[0], copy)
    weights = bytearray((copy / "model" / "weights.bin").read_bytes())
    weights[100] ^= 1
    (copy / "model" / "weights.bin").write_bytes(weights)
    with serving(copy) as address, fresh_page(browser, expected_errors=("integrity", "digest")) as page:
        page.goto(address)
        page.locator("#error", has_text="/model/weights.bin cannot be loaded").wait_for()
