"""lmdist-export --layout web: the folder, and its engine in onnxruntime-web, which generates what lmdist-generate does."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lmdist
from lmdist.errors import UsageError
from lmdist.settings import TextSettings
from lmdist.text.tokenizer import WordTokenizer
from lmdist_export import export
from lmdist_export.api import Model
from lmdist_export.conversion import web
from lmdist_export.conversion.exporting import TrainedModel
from lmdist_export.options import PARAMS
from support import failures
from support.javascript import MODULES, NODE, ROOT, Engine, needs_package
from support.small_bundles import ADAPTIVE, PLAIN_WORDS, TIED, UNTIED, WORDS, make_run, make_run_of_pieces

RUNTIME = MODULES / "onnxruntime-web"
PROMPT = "We said that the president is old. The cat"


def export_both(folder: Path, exported: Path, *flags: object) -> tuple[Path, Model]:
    """A page and a bundle of one run."""
    for name, layout in (("page", ["--layout", "web"]), ("bundle", [])):
        export.main([str(exported), "-o", str(folder / name), *layout, *map(str, flags)])
    return folder / "page", lmdist.load(folder / "bundle")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    folder = tmp_path_factory.mktemp("web")
    return export_both(folder, make_run(folder))


@pytest.fixture(scope="module")
def run(both: tuple[Path, Model]) -> Path:
    return both[0].parent / "runs" / "small"


def failure(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and message of an export that fails."""
    return failures.last_line(export.main, capsys, *arguments)


# --- the folder ----------------------------------------------------------------------------------------------------


def test_the_folder_has_the_page_the_engine_and_the_model(both: tuple[Path, Model]) -> None:
    page, model = both
    about = json.loads((page / "model" / "model.json").read_text(encoding="utf-8"))
    assert {"index.html", "page.js", "page.css", "engine.js", "engine", "model"} <= {path.name for path in page.iterdir()}
    assert not (page / "server_engine.js").exists()
    assert len(list((page / "model").glob("generate*.onnx"))) == 17
    for name, facts in about["files"].items():
        content = (page / "model" / name).read_bytes()
        assert facts["bytes"] == len(content)
        assert facts["integrity"] == f"sha384-{base64.b64encode(hashlib.sha384(content).digest()).decode()}"
    assert {path.name for path in (page / "model").iterdir()} == {*about["files"], "model.json"}
    assert (page / "model" / "weights.bin").read_bytes() == bytes(model.bundle.weights)
    assert about["runtime"]["script"]["address"].startswith("https://cdn.jsdelivr.net/npm/onnxruntime-web@")
    imported = re.findall(r'from "(\.[^"]+)"', "".join(path.read_text("utf-8") for path in page.glob("engine/*.js")))
    assert {(page / "engine" / name).resolve() for name in imported} <= set(page.glob("engine/*.js"))


def test_every_option_but_those_left_out_is_in_the_page(both: tuple[Path, Model]) -> None:
    about = json.loads((both[0] / "model" / "model.json").read_text(encoding="utf-8"))
    options = {option["name"]: option for option in about["options"]}
    assert {*options} | web.LEFT_OUT == {*PARAMS}
    engine = "".join(path.read_text(encoding="utf-8") for path in web.ENGINE.glob("engine/*.js"))
    assert [name for name in options if not re.search(rf"\b{name}\b", engine)] == []
    assert options["top_p"] | {"help": ""} == {
        "name": "top_p",
        "type": "float",
        "default": 0.9,
        "help": "",
        "minimum": 0,
        "maximum": 1,
        "bounds": "above 0 and at most 1 (1 keeps all)",
        "includes_minimum": False,
        "includes_maximum": True,
    }
    assert options["temperature"]["maximum"] is None


def test_only_a_page_is_overwritten(
    both: tuple[Path, Model], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [run, "-o", tmp_path / "page", "--layout", "web"]
    shutil.copytree(both[0], tmp_path / "page")
    assert failure(arguments, capsys)[0] == 64
    export.main([*map(str, arguments), "--overwrite"])
    (tmp_path / "page" / "mine.txt").write_text("mine")
    assert "is no page" in failure([*arguments, "--overwrite"], capsys)[1]
    assert (tmp_path / "page" / "mine.txt").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--precision", "int4"], "--precision int4: --layout web is written in fp32 or int8"),
        (["--precision", "int8", "--data", "none"], "--precision int8 needs held-out text to measure its cost"),
        (["--register", "news"], "--register news: --layout web is written in fp32 or int8 and is no model of MLflow"),
        (["--onnxruntime-web", "nowhere"], "--onnxruntime-web nowhere is no folder"),
        (
            ["--onnxruntime-web", "."],
            "has no dist/ort.wasm.bundle.min.mjs: the folder of npm's package is expected",
        ),
        (["--layout", "bundle", "--onnxruntime-web", "."], "--onnxruntime-web .: --layout bundle is no page; leave it out"),
    ],
)
def test_flags_that_mean_nothing_are_refused(
    flags: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = failure([run, "-o", tmp_path / "page", "--layout", "web", *flags], capsys)
    assert code in (64, 66)
    assert message in line
    assert not (tmp_path / "page").exists()


def test_a_tokenizer_that_javascript_does_not_have_is_refused(run: Path, tmp_path: Path) -> None:
    trained = dataclasses.replace(TrainedModel.load(run), tokenizer=WordTokenizer(TextSettings("sentencepiece")))
    with pytest.raises(UsageError, match="was split by sentencepiece, and the page knows word_tokenize, wordpunct, "):
        web.write(trained, tmp_path / "page", None, "fp32", None, None)


@needs_package("onnxruntime-web")
def test_the_files_on_the_cdn_are_those_of_the_package(run: Path, tmp_path: Path) -> None:
    export.main([str(run), "-o", str(tmp_path / "page"), "--layout", "web", "--onnxruntime-web", str(RUNTIME)])
    found = json.loads((tmp_path / "page" / "model" / "model.json").read_text(encoding="utf-8"))["runtime"]
    for name, file in found.items():
        assert (tmp_path / "page" / file["address"]).stat().st_size == file["bytes"]
        if json.loads((RUNTIME / "package.json").read_bytes())["version"] in web.CDN:
            assert file | {"address": ""} == getattr(web.ON_CDN, name) | {"address": ""}
    sent = [file for file in (tmp_path / "page").rglob("*") if file.is_file() and file.parent.name != "model"]
    assert sum(len(gzip.compress(file.read_bytes())) for file in sent) < 4_000_000, "the page and the runtime"


# --- the engine in onnxruntime-web ---------------------------------------------------------------------------------

CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 1.3, "top_p": 1},
    {"top_p": 0.4, "min_p": 0.05},
    {"top_k": 3, "top_p": 1},
    {"top_k": 5, "top_p": 0.8, "min_p": 0.1, "typical_p": 0.7},
    {"typical_p": 0.5},
    {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": -0.5, "temperature": 0.9},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 20},
    {"min_new_tokens": 30, "max_new_tokens": 35},
    {"stop": ["said that", "dog"], "bad_words": ["the cat", "it"], "logit_bias": ["said=2.5", "old=-inf", "nowhere=1"]},
    {"ignore_eos": True, "allow_unk": True, "max_new_tokens": 70},
]
KINDS = {
    "word_tokenize": {"settings": TIED, "words": [*WORDS, "old", "The"]},
    "int8": {"settings": UNTIED, "tokenizer": "wordpunct", "words": PLAIN_WORDS},
    "bpe": {},
    "unigram": {},
    "adaptive": {"settings": ADAPTIVE, "tokenizer": "characters", "words": [*"abcdefghijklmnopqrstuvwxyz\u2581.WTs"][:20]},
}


@pytest.fixture(scope="module", params=KINDS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Model]]:
    flags = ["--precision", "int8", "--max-perplexity-loss", "100"] if request.param == "int8" else ["--data", "none"]
    folder = tmp_path_factory.mktemp("engine")
    run = make_run(folder, **KINDS[request.param]) if KINDS[request.param] else make_run_of_pieces(folder, request.param)
    page, model = export_both(folder, run, *flags)
    with Engine() as engine:
        facts = engine.call("open", str(page), str(MODULES), "onnxruntime-web")
        assert facts["vocabulary_size"] == model.bundle.sizes.vocabulary_size
        assert facts["precision"] == model.bundle.sizes.precision
        yield engine, model


@needs_package("onnxruntime-web")
@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(options) or "default")
def test_the_same_seed_gives_the_text_of_python(opened: tuple[Engine, Model], options: dict[str, Any]) -> None:
    engine, model = opened
    # Inside of a word, where the last piece may go on.
    beginnings = [PROMPT[:length] for length in range(len(PROMPT))]
    inside = [prompt for prompt in beginnings if (seam := model.prompt(prompt).seam) and seam.removed][:4]
    assert len(inside) == 4 or model.bundle.tokenizer.settings.tokenizer != "bpe"
    for seed, prompt in ((7, PROMPT), (2**64 - 1, ""), (3, "  (the unheardof “dog's "), *enumerate(inside)):
        expected = model.generate(prompt, seed=seed, **options)
        text, reasons = engine.call("generate", prompt, {"seed": str(seed), **options})
        before = model.bundle.tokenizer.detokenize(model.prompt(prompt).tokens)
        assert before + " " * model.prompt(prompt).space + text == expected.text
        assert reasons == [None] * (len(reasons) - 1) + [expected.finish_reason]


@needs_package("onnxruntime-web")
def test_no_option_forbids_the_end_of_a_prompt(opened: tuple[Engine, Model]) -> None:
    engine, model = opened
    beginnings = [PROMPT[:length] for length in range(len(PROMPT))]
    inside = [prompt for prompt in [*beginnings, "presid a presid"] if (seam := model.prompt(prompt).seam) and seam.removed]
    for prompt in inside[-3:]:
        biases = [f"{model.bundle.vocabulary.words[token]}=-inf" for token in model.prompt(prompt).begin.tokens]
        options = {"logit_bias": biases, "no_repeat_ngram_size": 2, "max_new_tokens": 3, "ignore_eos": True}
        expected = model.generate(prompt, seed=5, echo=False, **options)
        assert expected.follows_all
        assert engine.call("generate", prompt, {"seed": "5", **options})[0] == expected.text
        assert expected.finish_reason == "length"


@needs_package("onnxruntime-web")
def test_next_words_are_those_of_python(opened: tuple[Engine, Model]) -> None:
    engine, model = opened
    for prompt in ("", "We said", PROMPT, "We said that", "The", PROMPT * 70):
        found = engine.call("nextWords", prompt, 6)
        expected = model.next_words(prompt, 6)
        assert [word["word"] for word in found] == [word for word, _ in expected]
        assert [word["probability"] for word in found] == pytest.approx([probability for _, probability in expected], rel=1e-4)


@needs_package("onnxruntime-web")
def test_scores_are_those_of_python(opened: tuple[Engine, Model]) -> None:
    engine, model = opened
    for text in ("", "We", PROMPT + ' It isn\'t "unheardof".', PROMPT * 9):
        found = engine.call("score", text)
        expected = model.score(text, end=False)
        assert [token["token"] for token in found] == expected.tokens
        assert [token["unknown"] for token in found] == expected.unknown.tolist()
        assert [token["log_probability"] for token in found] == pytest.approx(expected.log_probabilities.tolist(), abs=1e-4)
        if model.bundle.tokenizer.settings.has_pieces:  # which may end inside of a character
            assert "".join(text[token["start"] : token["end"]] for token in found) == text.replace(" ", "")
        else:
            assert all(text[token["start"] : token["end"]] for token in found)


@needs_package("onnxruntime-web")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0}, "top_p is 0; it must be above 0 and at most 1 (1 keeps all)"),
        ({"top_k": 1.5}, "top_k is 1.5; an integer is expected"),
        ({"num_beams": 4}, "num_beams is no option here; expected is one of max_new_tokens,"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens is 9; it must be from 0 to max_new_tokens, 3"),
        ({"seed": str(2**64)}, "seed is 18446744073709551616; it must be from 0 to 18446744073709551615"),
        ({"logit_bias": ["dog"]}, 'logit_bias is "dog"; WORD=X is expected'),
        ({"stop": [""]}, 'stop "" has no words'),
    ],
)
def test_a_mistake_is_a_sentence(opened: tuple[Engine, Model], options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        opened[0].call("generate", "we", {"seed": "1", **options})


# --- what docs/browser.md shows ------------------------------------------------------------------------------------


@needs_package("onnxruntime-node")
def test_the_example_of_the_docs_runs_in_node(both: tuple[Path, Model], tmp_path: Path) -> None:
    (example,) = re.findall(r"```js\n(.*?)```", (ROOT / "docs" / "browser.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(example.splitlines()) <= 30
    page, model = both
    shutil.copytree(page, tmp_path / "news-page")
    (tmp_path / "node_modules").symlink_to(MODULES)
    (tmp_path / "example.mjs").write_text(example, encoding="utf-8")
    done = subprocess.run([str(NODE), "example.mjs"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    text = model.generate("The president said", seed=7, max_new_tokens=40).text
    assert text in done.stdout
    for word, probability in model.next_words("The president", 3):
        assert f"{word} {probability:.3f}" in done.stdout
