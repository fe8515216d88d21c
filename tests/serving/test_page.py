"""The page of lmdist-serve in Chromium, against the real server: what people do with it, by mouse and by keys alone."""

from __future__ import annotations

import http.client
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import lmdist
from lmdist_export.api import Model
from support.chromium import chromium, fresh_page
from support.serving import Serving
from support.small_bundles import UNTIED, edit_json, make_bundle

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

WORDS = "the cat dog president presidential said that it is n't 's . , `` '' ( ) we old".split()
KEY = "a-key-of-the-tests"


def serve(bundle: Path, folder: Path, *options: str) -> Serving:
    """Start `lmdist-serve`."""
    serving = Serving(["-m", "lmdist_export.serve", str(bundle), "--threads", "1", *options], folder)
    serving.wait()
    return serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def bundle(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_bundle(tmp_path_factory.mktemp("page"), UNTIED, words=WORDS)
    edit_json(made / "generation_config.json", max_new_tokens=30)
    return made


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return lmdist.load(bundle, threads=1)


@pytest.fixture(scope="module")
def serving(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    started = serve(bundle, tmp_path_factory.mktemp("serving"))
    yield started
    started.stop()


@pytest.fixture
def page(browser: Browser, serving: Serving) -> Iterator[Page]:
    with fresh_page(browser, ("400 (Bad Request)", "429 (Too Many Requests)")) as opened:
        opened.goto(address(serving))
        opened.locator("#text:enabled").wait_for()
        yield opened


def fill(page: Page, **values: object) -> None:
    """Set options by their numbers, and the seed."""
    for name, value in values.items():
        if name == "seed":
            page.locator("#seed").fill(str(value))
            continue
        number = page.locator(f".option:has(#option-{name}) input[type=number]")
        if not number.is_visible():
            page.get_by_text("More options").click()
        number.fill(str(value))


def address(serving: Serving) -> str:
    return f"http://127.0.0.1:{serving.port}/"


def text_of(page: Page) -> str:
    return page.locator("#text").input_value()


def until(page: Page, condition: Callable[[], bool]) -> None:
    """Wait for what no selector says; the page forbids `eval`, by which Playwright's wait_for_function waits."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        page.wait_for_timeout(20)


def wait_for_status(page: Page, text: str) -> None:
    page.locator("#status", has_text=text).wait_for()


def candidates(page: Page) -> Locator:
    return page.locator("#next-words:not(.old) .word")


def words_of(found: Locator) -> list[tuple[str, str]]:
    """The candidates that are shown, each with its probability as it is written."""
    return [(word, share) for word, _, share in (text.rpartition(" ") for text in found.all_inner_texts())]


# --- type, stream, stop


def test_a_text_streams_and_is_that_of_the_python_api(page: Page, model: Model) -> None:
    page.evaluate(
        """() => {
            window.lengths = [];
            new MutationObserver(() => lengths.push(document.getElementById("text").value.length))
                .observe(document.getElementById("mirror"), {childList: true});
        }"""
    )
    page.locator("#text").press_sequentially("the cat said")
    options = {"temperature": 1.5, "max_new_tokens": 500, "min_new_tokens": 500}
    fill(page, seed=7, **options)
    page.get_by_role("button", name="Generate").click()
    wait_for_status(page, "with seed 7.")
    expected = model.generate("the cat said", seed=7, **options)
    assert text_of(page) == expected.text
    lengths: list[int] = page.evaluate("lengths")
    assert len({length for length in lengths if length > len("the cat said")}) > 5, "the text came in few pieces"
    assert page.locator("#mirror .generated").inner_text() == expected.text.removeprefix("the cat said ")
    assert page.locator("#announcement").inner_text().strip() == expected.text.removeprefix("the cat said").strip()


def test_undo_and_another(page: Page) -> None:
    page.locator("#text").fill("we said ")
    fill(page, temperature=2, min_new_tokens=10)
    page.get_by_role("button", name="Generate").click()
    wait_for_status(page, "with seed")
    first = text_of(page)
    seed = page.locator("#seed").input_value()
    page.get_by_role("button", name="Try another").click()
    until(page, lambda: page.locator("#seed").input_value() != seed)
    wait_for_status(page, "with seed")
    assert text_of(page).startswith("we said ")
    page.get_by_role("button", name="Undo").click()
    assert text_of(page) == "we said "
    fill(page, seed=seed)
    page.get_by_role("button", name="Generate").click()
    wait_for_status(page, f"with seed {seed}.")
    assert text_of(page) == first
    page.locator("#text").press_sequentially("x")
    assert page.get_by_role("button", name="Undo").is_disabled()


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_a_text_is_stopped(page: Page, how: str) -> None:
    page.locator("#text").fill("the")
    fill(page, max_new_tokens=15_000, min_new_tokens=14_000, temperature=1)
    page.get_by_role("button", name="Generate").click()
    until(page, lambda: len(text_of(page)) > 100)
    assert not page.locator("#text").is_editable()
    page.get_by_role("button", name="Stop").click() if how == "button" else page.keyboard.press("Escape")
    wait_for_status(page, "Stopped.")
    stopped = text_of(page)
    page.get_by_role("button", name="Generate").wait_for()
    candidates(page).first.wait_for()
    assert text_of(page) == stopped
    assert page.locator("#text").is_editable()


# --- options


def test_sliders_and_numbers_are_what_is_asked_for(page: Page, model: Model) -> None:
    page.locator("#text").fill("the cat")
    slider = page.get_by_role("slider", name="Temperature")
    assert slider.input_value() == "0.7"
    assert "below 1 likely tokens become likelier" in (page.locator("#help-temperature").text_content() or "")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#option-cache_weight").count() == 0, "this bundle has no neural cache"
    slider = page.get_by_role("slider", name="Top-k")
    slider.fill("3")
    fill(page, repetition_penalty=3.5, seed=3)  # beyond what the slider spans
    with page.expect_request("**/v1/completions") as request:
        page.get_by_role("button", name="Generate").click()
    asked = request.value.post_data_json
    assert asked
    expected = {"prompt": "the cat", "temperature": 0.75, "top_k": 3, "repetition_penalty": 3.5, "seed": 3, "stream": True}
    assert {name: value for name, value in asked.items() if name != "model"} == expected
    wait_for_status(page, "with seed 3.")
    assert text_of(page) == model.generate("the cat", temperature=0.75, top_k=3, repetition_penalty=3.5, seed=3).text
    page.get_by_role("button", name="Reset").click()
    assert page.get_by_role("slider", name="Temperature").input_value() == "0.7"
    assert page.get_by_role("button", name="Reset").is_hidden()


def test_beam_search_is_shown_at_its_end(page: Page, model: Model) -> None:
    page.locator("#text").fill("the cat")
    fill(page, num_beams=3)
    page.get_by_role("button", name="Generate").click()
    wait_for_status(page, "after")
    assert text_of(page) == model.generate("the cat", num_beams=3).text


def test_a_model_that_searches_by_default(browser: Browser, bundle: Path, tmp_path: Path) -> None:
    """Its tokens are characters, which have their own spaces, whatever the likeliest of them are."""
    folder = make_bundle(tmp_path, UNTIED, tokenizer="characters", words=[*"the\u2581"])
    edit_json(folder / "generation_config.json", num_beams=3, max_new_tokens=8)
    model, serving = lmdist.load(folder, threads=1), serve(folder, tmp_path)
    with ExitStack() as stack:
        stack.callback(serving.stop)
        page = stack.enter_context(fresh_page(browser))
        page.goto(address(serving))
        page.locator("#text:enabled").wait_for()
        page.locator("#text").press_sequentially("th")
        page.get_by_text("Use it from a program").click()
        page.locator("#seed").fill("3")
        assert "seed" not in page.locator("#snippets").inner_text()
        page.get_by_role("button", name="Generate").click()
        wait_for_status(page, "after")
        assert text_of(page) == model.generate("th").text
        page.locator("#text").clear()
        page.locator("#text").press_sequentially("th")
        candidates(page).filter(has_text=re.compile("^e ")).click()
        assert text_of(page) == "the"


def test_a_value_that_the_model_does_not_take_is_one_sentence(page: Page) -> None:
    page.locator("#text").fill("the cat")
    fill(page, top_p=7)
    page.get_by_role("button", name="Generate").click()
    assert page.get_by_role("alert").filter(has_text="top_p is 7").inner_text()
    fill(page, top_p=0.9, seed="-1")
    page.get_by_role("button", name="Generate").click()
    assert "It must be an integer from 0" in page.get_by_role("alert").inner_text()
    assert text_of(page) == "the cat"
    assert page.get_by_role("button", name="Undo").is_disabled()


# --- next words


def test_next_words_are_those_of_the_model(page: Page, model: Model) -> None:
    page.locator("#text").press_sequentially("the cat ")
    found = candidates(page)
    found.first.wait_for()
    expected = [(word, value) for word, value in model.next_words("the cat", 8) if word != "<eos>"][:6]
    shown = words_of(found)
    assert [word for word, _ in shown] == [{"``": '"', "''": '"'}.get(word, word) for word, _ in expected]
    assert [float(share.strip("<%")) for _, share in shown] == pytest.approx([100 * value for _, value in expected], rel=0.06)
    page.keyboard.press("Tab")
    first = text_of(page)
    assert first.rstrip() in (f"the cat {shown[0][0]}", f"the cat{shown[0][0]}")
    # Escape, and then Tab moves on as everywhere; a click inserts too.
    candidates(page).first.wait_for()
    page.keyboard.press("Escape")
    page.keyboard.press("Tab")
    assert text_of(page) == first
    assert page.evaluate("document.activeElement.className") == "word"
    page.keyboard.press("Enter")
    assert len(text_of(page)) > len(first)
    assert page.evaluate("document.activeElement.id") == "text"


def test_next_words_are_those_at_the_caret(page: Page, model: Model) -> None:
    page.locator("#text").press_sequentially("the cat ")
    candidates(page).nth(1).click()  # while the first one shows that Tab inserts it
    assert len(text_of(page)) > len("the cat ")
    page.locator("#text").clear()
    page.locator("#text").press_sequentially("the cat said")
    for _ in " said":
        page.keyboard.press("ArrowLeft")
    expected = [word for word, _ in model.next_words("the cat", 19) if word not in ("<eos>", "``", "''")]
    until(page, lambda: [word for word, _ in words_of(candidates(page)) if word != '"'][:2] == expected[:2])
    candidates(page).filter(has_text=re.compile(f"^{re.escape(expected[0])} ")).click()
    assert re.fullmatch(rf"the cat ?{re.escape(expected[0])} said", text_of(page))


def test_next_words_depend_on_whole_characters_and_words(page: Page) -> None:
    """Of a text that is too long to be read for each letter."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append((request.post_data_json or {}).get("prompt", "")))
    for text, expected in {"🙂" * 1500 + "日": 1999, "the\n" * 1000: 1997}.items():
        asked.clear()
        page.locator("#text").fill(text)
        until(page, lambda: len(candidates(page).all()) > 0 and any(asked))
        longest = max(asked, key=len)
        assert text.endswith(longest)
        assert len(longest.encode("utf-16-le", "surrogatepass")) == 2 * expected


def test_tab_before_the_words_are_there_inserts_them(page: Page, model: Model) -> None:
    page.locator("#text").press_sequentially("the pre")
    page.keyboard.press("Tab")
    until(page, lambda: len(text_of(page)) > len("the pre"))
    likelier = next(word for word, _ in model.next_words("the", 19) if word.startswith("pre"))
    assert text_of(page) == f"the {likelier} "


def test_tab_inserts_nothing_where_nobody_types(page: Page) -> None:
    page.locator("#text").fill("the cat ")
    candidates(page).first.wait_for()
    page.locator("#generate").focus()
    page.locator("#text").focus()
    page.keyboard.press("Tab")
    assert text_of(page) == "the cat "
    assert page.evaluate("document.activeElement.className") == "word"


# --- surprisal


def test_each_token_has_the_colour_of_its_surprisal(page: Page, model: Model) -> None:
    text = '😀 The zebra said "it is" old.\n\nthe cat isn\'t (the) dog, we said'
    page.locator("#text").fill(text)
    page.get_by_role("switch", name="Colour by surprisal").click()
    spans = page.locator("#mirror .token")
    spans.first.wait_for()
    score = model.score(text, end=False)
    least = [0, 1, 3, 6, 9, 12]
    found = page.evaluate("[...document.querySelectorAll('#mirror .token')].map((part) => [part.textContent, part.className])")
    assert [written for written, _ in found] == [{"``": '"', "''": '"'}.get(token, token) for token, *_ in score.per_token]
    for (written, classes), (_, log_probability, unknown) in zip(found, score.per_token, strict=True):
        level = sum(-log_probability / math.log(2) >= bits for bits in least) - 1
        assert f"level-{level}" in classes.split(), written
        assert ("unknown" in classes.split()) == unknown, written
    assert {"😀", "zebra"} <= {written for written, classes in found if "unknown" in classes}
    assert page.evaluate("document.getElementById('mirror').textContent.replace('\\u200b', '')") == text
    assert page.locator("#perplexity").inner_text().replace(",", "") == f"{score.perplexity:.1f}"
    assert int(page.locator("#unknown").inner_text()) == sum(score.unknown)
    colours = page.evaluate(
        "[...document.querySelectorAll('#legend li')].map((part) => getComputedStyle(part).backgroundColor)",
    )
    assert len(set(colours)) == len(least)
    assert "wavy" in page.locator("#mirror .unknown").first.evaluate("(part) => getComputedStyle(part).textDecorationStyle")

    # The token at the caret, the one under the pointer, and all as a table.
    page.locator("#text").evaluate("(area) => { area.focus(); area.setSelectionRange(8, 8); }")
    page.locator("#token", has_text="zebra").wait_for()
    assert "unknown word" in page.locator("#token").inner_text()
    box = spans.last.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.locator("#token", has_text="said").wait_for()
    page.get_by_text("All tokens as a table").click()
    rows = page.locator("#rows tr")
    rows.last.wait_for()  # the browser tells the page of the open table a moment later
    assert rows.count() == len(score.tokens)
    _, log_probability, _ = list(score.per_token)[-1]
    assert rows.last.locator("td").first.inner_text() == f"{-log_probability / math.log(2):.1f}"


def test_colours_follow_the_text(page: Page, model: Model) -> None:
    page.locator("#text").fill("the cat")
    page.get_by_role("switch", name="Colour by surprisal").click()
    page.locator("#tokens", has_text="2").wait_for()
    page.locator("#text").press_sequentially(" said that")
    page.locator("#tokens", has_text="4").wait_for()
    expected = model.score("the cat said that", end=False)
    assert page.locator("#bits-per-token").inner_text() == f"{-expected.log_probability / math.log(2) / 4:.2f}"
    page.get_by_role("switch", name="Colour by surprisal").click()
    assert page.locator("#mirror .token").count() == 0
    assert page.locator("#surprisal").is_hidden()


def test_letters_lie_on_their_colours(page: Page) -> None:
    """The textarea and its mirror have the same metrics, in a long text and in a narrow window too."""
    page.set_viewport_size({"width": 360, "height": 740})
    page.locator("#text").fill("the cat said that it is old and we said so " * 12 + "\n\nwe")
    heights = page.evaluate(
        "[...document.querySelectorAll('#text, #mirror')].map((part) => [part.scrollHeight, part.clientWidth])"
    )
    assert heights[0] == heights[1]
    styles = [
        page.locator(part).evaluate(
            "(part) => ['font', 'letterSpacing', 'padding', 'whiteSpace', 'overflowWrap', 'wordBreak', 'tabSize', 'textIndent']"
            ".map((name) => getComputedStyle(part)[name])"
        )
        for part in ("#text", "#mirror")
    ]
    assert styles[0] == styles[1]


# --- errors


def test_a_busy_server_says_when_to_try_again(page: Page, serving: Serving) -> None:
    body = {"prompt": "the", "max_tokens": 19_990, "min_new_tokens": 19_990, "stream": True}
    with ExitStack() as leaving:
        for _ in range(10):  # of the 200,000 tokens that it has in work
            client = leaving.enter_context(closing(http.client.HTTPConnection("127.0.0.1", serving.port)))
            client.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            assert client.getresponse().status == 200
        page.locator("#text").fill("the cat")
        fill(page, max_new_tokens=15_000)
        page.get_by_role("button", name="Generate").click()
        page.get_by_role("alert").filter(has_text=re.compile(r"The server is busy\. Try again in (a|\d+) second")).wait_for()
    assert text_of(page) == "the cat"


@pytest.fixture(scope="module")
def locked(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server that wants a key; the last test that uses it kills it."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "keys").write_text(f"{KEY}\n")
    (folder / "keys").chmod(0o600)
    started = serve(bundle, folder, "--api-key-file", str(folder / "keys"))
    yield started
    started.process.kill()
    started.process.wait()


def test_an_api_key_is_asked_for_and_kept_in_memory_only(browser: Browser, locked: Serving) -> None:
    with fresh_page(browser, ("401",)) as page:
        page.goto(address(locked))
        dialog = page.get_by_role("dialog")
        dialog.wait_for()
        page.keyboard.type("another")
        page.keyboard.press("Enter")
        until(page, lambda: page.locator("#key").input_value() == "")
        assert dialog.is_visible(), "a wrong key is asked for again"
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        page.locator("#text:enabled").wait_for()
        page.locator("#text").fill("the cat")
        page.get_by_role("button", name="Generate").click()
        wait_for_status(page, "with seed")
        page.get_by_text("Use it from a program").click()
        page.locator("#snippets pre").first.wait_for()
        assert KEY not in page.content()
        assert "$LMDIST_API_KEY" in page.locator("#snippets").inner_text()
        kept = page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.cookie, location.href]")
        assert KEY not in "".join(kept)
        page.reload()
        dialog.wait_for()
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("alert").filter(has_text="Without an API key").wait_for()


def test_a_server_that_is_gone(browser: Browser, locked: Serving) -> None:
    with fresh_page(browser, ("Failed to load", "ERR_")) as page:
        page.goto(address(locked))
        page.locator("#key").fill(KEY)
        page.keyboard.press("Enter")
        page.locator("#text").fill("the cat")
        fill(page, max_new_tokens=15_000, min_new_tokens=14_000)
        page.get_by_role("button", name="Generate").click()
        until(page, lambda: len(text_of(page)) > 100)
        locked.process.kill()
        locked.process.wait()
        page.get_by_role("alert").filter(has_text="connection to the server broke").wait_for()
        assert len(text_of(page)) > 100, "what had come stays"
        page.get_by_role("button", name="Generate").click()
        page.get_by_role("alert").filter(has_text="cannot be reached").wait_for()
        assert page.get_by_role("button", name="Generate").is_enabled()


# --- keys, screen readers, phones, the dark


def test_keys_alone_do_everything(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("the cat")
    page.keyboard.press("Control+Enter")
    wait_for_status(page, "with seed")
    candidates(page).first.wait_for()
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        here = page.evaluate(
            """() => {
                const {activeElement: part} = document;
                const {outlineStyle, outlineWidth} = getComputedStyle(part);
                return [part.id || part.className || part.tagName, outlineStyle !== "none" && outlineWidth !== "0px"];
            }"""
        )
        if here[0] == "BODY":
            break
        reached.append(here)
    names = [name for name, _ in reached]
    assert all(visible for _, visible in reached), reached
    assert {"word", "generate", "another", "undo", "colours", "option-temperature", "seed", "new-seed", "SUMMARY"} <= {*names}
    page.locator("#colours").focus()
    page.keyboard.press("Space")
    page.locator("#mirror .token").first.wait_for()


def test_every_control_has_a_name(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    page.locator("#text").fill("the cat ")
    candidates(page).first.wait_for()
    controls = re.findall(r"- (?:button|slider|spinbutton|textbox|checkbox|switch)\b.*", page.locator("body").aria_snapshot())
    assert len(controls) > 40
    assert [control for control in controls if not re.match(r'- \w+ "[^"]+"', control)] == []
    live = page.evaluate("[...document.querySelectorAll('[aria-live], [role=status], [role=alert]')].map((part) => part.id)")
    assert {"status", "error", "announcement", "token"} <= {*live}
    assert page.locator("#mirror").get_attribute("aria-hidden") == "true"


def test_a_phone_in_the_dark_without_motion(browser: Browser, serving: Serving) -> None:
    phone = {"width": 360, "height": 740}
    with fresh_page(
        browser, viewport=phone, color_scheme="dark", reduced_motion="reduce", has_touch=True, is_mobile=True
    ) as page:
        page.goto(address(serving))
        page.locator("#text").fill("the cat said that it is old " * 9)
        page.locator("#colours").check()
        page.locator("#mirror .token").first.wait_for()
        page.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        red, green, blue = map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))
        assert red + green + blue < 120
        page.locator(".word").first.wait_for()
        heights = page.locator(".actions button:visible, .word:visible").evaluate_all(  # at once: words may still change
            "(all) => all.map((control) => [control.innerText, control.getBoundingClientRect().height])"
        )
        assert [text for text, height in heights if height < 40] == [], "too small for a finger"
        page.locator("body").evaluate("(body) => body.classList.add('running')")
        assert page.locator("#mirror .end").evaluate("(part) => getComputedStyle(part).animationName") == "none"


PAGE = Path(lmdist.__file__).parents[1] / "export/lmdist_export/serving/page"


def luminance(colour: str) -> float:
    """The relative luminance of #rrggbb, by WCAG 2."""
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(scheme: str) -> None:
    """WCAG 2's contrast for text, 4.5, of each pair of colours that the page has; it needs no browser."""
    light, dark = re.findall(r":root \{(.*?)\}", (PAGE / "page.css").read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", light)) | (
        dict(re.findall(r"--([\w-]+): (#\w{6})", dark)) if scheme == "dark" else {}
    )
    pairs = [(ink, behind) for ink in ("ink", "soft", "error") for behind in ("ground", "paper")]
    pairs += [("ink", f"level-{level}") for level in range(1, 6)]
    pairs += [("ink", "tint"), ("soft", "tint"), ("on-accent", "accent")]
    for ink, behind in pairs:
        dim, bright = sorted((luminance(colours[ink]), luminance(colours[behind])))
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (ink, behind)


# --- as code


def test_copied_commands_give_the_text_of_the_page(page: Page, model: Model) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    prompt = 'the cat\'s (old) dog, "we" \\ $HOME'
    page.locator("#text").fill(prompt)
    fill(page, seed=11, top_k=5)
    page.get_by_text("Use it from a program").click()
    expected = model.generate(prompt, seed=11, top_k=5, echo=False).text

    def copied(language: str) -> str:
        button = page.locator(".snippet", has_text=language).get_by_role("button")
        button.click()
        button.filter(has_text="Copied").wait_for()
        return page.evaluate("navigator.clipboard.readText()")

    done = subprocess.run(["bash", "-c", copied("curl")], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["text"].strip() == expected
    code = copied("Python")
    compile(code, "copied", "exec")
    pytest.importorskip("openai")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_the_wheel_has_the_page() -> None:
    """Each file of the page is text that the wheel includes, and refers to no other place."""
    files = {path.name for path in PAGE.iterdir()}
    assert {"index.html", "page.js", "page.css", "server_engine.js"} <= files
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path.name
        for name in re.findall(r'(?:from|src=|href=) ?"(?:\./)?([\w.]+)"', text):
            assert name in files | {"engine.js"}, f"{path.name} refers to {name}"
