"""The Python API: strings in and out, and the texts of lmdist-generate and of the server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmdist
from lmdist.errors import UsageError
from lmdist_export import api, generate
from lmdist_export.api import GenerationOptions, Model
from lmdist_export.options import PARAMS
from support.small_bundles import PLAIN_WORDS, UNTIED, command, make_bundle, neutral, same_text

ROOT = Path(__file__).parents[2]
PROMPTS = ["the cat", "", "zebra said", "is not it"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the whitespace tokenizer."""
    return neutral(make_bundle(tmp_path_factory.mktemp("api"), UNTIED, "whitespace", PLAIN_WORDS))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return lmdist.load(folder)


# --- importing -----------------------------------------------------------------------------------------------------


def test_what_is_imported_before_a_model_is_loaded_is_light() -> None:
    code = "import sys, lmdist; had = set(sys.modules); lmdist.load; print(*had, '|', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    at_first, all_of_it = (set(names.split()) for names in done.stdout.split("|"))
    assert "lmdist_export" not in at_first
    assert (
        not all_of_it & {"numpy", "onnxruntime", "torch", "nltk", "regex", "pandas", "mlflow", "socket", "argparse"} - at_first
    )
    assert not all_of_it & {"numpy", "onnxruntime", "torch", "nltk", "regex", "pandas", "mlflow"}


def test_a_model_needs_no_torch_and_no_mlflow(folder: Path) -> None:
    code = f"""if True:
        import sys, lmdist
        model = lmdist.load({str(folder)!r})
        model.generate("the cat", max_new_tokens=3), model.score("the cat"), model.next_words("the"), model.vector("cat")
        model.read("the cat").save({str(folder.parent / "state.npz")!r})
        print({{"torch", "pandas", "mlflow", "onnx", "nltk"}} & set(sys.modules))"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_package_has_load_and_is_typed() -> None:
    assert lmdist.load is api.load
    assert "load" in dir(lmdist)
    with pytest.raises(AttributeError, match="module 'lmdist' has no attribute 'loads'"):
        getattr(lmdist, "loads")  # noqa: B009
    for package in ("lmdist", "export/lmdist_export"):
        assert (ROOT / package / "py.typed").is_file()
    assert set(GenerationOptions.__annotations__) | {"n"} == set(PARAMS), "the names of the table are typed"


# --- generating ----------------------------------------------------------------------------------------------------


ASKED = [
    {},
    {"ignore_eos": True, "n": 3},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95, "echo": False},
    {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1, "no_repeat_ngram_size": 3},
    {"min_new_tokens": 25, "stop": ["the cat", "so", "the zebra"]},
    {"bad_words": ["the dog", "in"], "logit_bias": ["cat=2", "not=-inf"], "allow_unk": True},
    {"temperature": 0, "logprobs": 2, "ignore_eos": True},
    {"num_beams": 4, "n": 2, "length_penalty": 0.5},
]


@pytest.fixture(scope="module")
def served(folder: Path) -> Any:
    """The bundle as MLflow loads it."""
    import mlflow

    return mlflow.pyfunc.load_model(str(folder))


@pytest.mark.parametrize("options", ASKED, ids=lambda options: "-".join(options) or "none")
def test_texts_are_those_of_the_command_and_of_the_server(
    model: Model, folder: Path, served: Any, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"max_new_tokens": 30, **({} if "num_beams" in options else {"seed": 7}), **options}
    texts = list(model.completions(PROMPTS, **asked))
    flags = []
    for name, value in asked.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags += [flag if value else flag.replace("--", "--no-", 1)]
        else:
            flags += [part for one in (value if isinstance(value, list) else [value]) for part in (flag, str(one))]
    (tmp_path / "prompts").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    generate.main([str(folder), "--json", "--prompts-file", str(tmp_path / "prompts"), *flags])
    assert [text.as_object() for text in texts] == [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    answers = served.predict(PROMPTS, asked)
    assert [answer.pop("seed", None) for answer in answers] == [text.seed for text in texts]
    assert [answer.pop("warnings", []) for answer in answers] == [text.warnings for text in texts]
    assert answers == [text.as_object() for text in texts]


def test_a_text_is_that_of_another_process(model: Model, folder: Path) -> None:
    asked = ("--seed", 3, "--max-new-tokens", 40)
    done = command("lmdist_export.generate", folder, "--prompt", "the zebra", *asked)
    text = model.generate("the zebra", seed=3, max_new_tokens=40)
    assert text.text + "\n" == done.stdout
    assert text.unknown_words == ["zebra"]
    assert text.warnings == ["not in the vocabulary, and read as <unk>: zebra"]
    assert f"warning: {text.warnings[0]}\n" in done.stderr


def test_what_is_returned_has_the_shape_of_what_is_given(model: Model) -> None:
    asked = {"seed": 5, "max_new_tokens": 8, "ignore_eos": True}
    one = model.generate("the cat", **asked)
    (same_one,) = model.generate(["the cat"], **asked)
    (first,) = model.generate("the cat", n=1, **asked)
    several = model.generate("the cat", n=3, **asked)
    table = model.generate(("the cat", "we"), n=3, **asked)
    assert same_text(one, same_one)
    assert same_text(one, first)
    assert [len(row) for row in (several, *table)] == [3, 3, 3]
    assert all(map(same_text, several, table[0]))
    assert len({text.text for text in several}) == 3
    assert model.generate([], **asked) == model.generate([], n=2, **asked) == []
    assert same_text(model.generate(**asked), model.generate("", **asked))
    found = model.generate("the cat", num_beams=3, n=3, max_new_tokens=4, logprobs=0, ignore_eos=True)
    totals = [sum(text.token_logprobs or []) for text in found]
    assert totals == sorted(totals, reverse=True)
    assert {text.seed for text in found} == {None}


def test_a_random_seed_is_returned_and_gives_the_text_again(model: Model) -> None:
    first, second = (model.generate("the dog", ignore_eos=True, max_new_tokens=40) for _ in range(2))
    assert first.seed != second.seed
    assert same_text(first, model.generate("the dog", ignore_eos=True, max_new_tokens=40, seed=first.seed))


@pytest.mark.parametrize("options", [{}, {"ignore_eos": True}, {"echo": False, "stop": ["so it"]}, {"top_k": 3, "logprobs": 1}])
def test_the_pieces_of_a_stream_are_the_text(model: Model, options: dict[str, Any]) -> None:
    for seed in range(4):
        for prompt in ("the cat", ""):
            text = model.generate(prompt, seed=seed, max_new_tokens=30, **options)
            stream = model.stream(prompt, seed=seed, max_new_tokens=30, **options)
            assert stream.completion is None
            pieces = list(stream)
            assert "".join(pieces) == text.text
            assert stream.completion is not None
            assert same_text(stream.completion, text)
            assert len(pieces) == len(text.tokens) + (0 if options.get("echo") is False else len(prompt.split()))


def test_a_stream_comes_while_it_is_generated(model: Model) -> None:
    stream = model.stream("the cat", max_new_tokens=1_000_000, ignore_eos=True)  # far more than a test may take
    assert [next(stream) for _ in range(20)][:2] == ["the", " cat"]


def test_prompts_are_read_when_it_is_their_turn(model: Model) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "the cat"

    texts = model.completions(endless(), batch_size=4, max_new_tokens=3)
    for number in range(40):
        assert next(texts).prompt_number == number
        assert read <= number + 8


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"temprature": 1}, "^temprature is no option of generation; did you mean temperature?"),
    ({"quux": 1}, "^quux is no option of generation; expected is one of max_new_tokens, "),
    ({"temperature": "hot"}, "^temperature is 'hot'; a number is expected"),
    ({"temperature": -1}, "^temperature is -1.0; it must be at least 0"),
    ({"top_k": 2.5}, "^top_k is 2.5; an integer is expected"),
    ({"max_new_tokens": True}, "^max_new_tokens is True; an integer is expected"),
    ({"ignore_eos": 1}, "^ignore_eos is 1; true or false is expected"),
    ({"stop": 3}, "^stop is 3; a list of strings is expected"),
    ({"stop": ["the", 3]}, "^stop number 1 is 3; a string is expected"),
    ({"bad_words": [" "]}, "^bad_words ' ' has no words"),
    ({"n": 0}, "^n is 0; it must be from 1 to 1,000,000"),
    ({"seed": 2**64}, "^seed is .*; an integer of at most 64 bits is expected"),
    ({"num_beams": 2, "seed": 1}, "^num_beams is for beam search, and seed for sampling"),
    ({"batch_size": 0}, "^batch_size is 0"),
    ({"cache_weight": 0.1}, "^cache_weight is 0.1, and this bundle has no neural cache"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[next(iter(options)) for options, _ in WRONG])
def test_mistakes_are_one_line_before_anything_is_generated(model: Model, options: dict[str, Any], message: str) -> None:
    for method in (model.generate, model.completions, *([] if "batch_size" in options or "n" in options else [model.stream])):
        with pytest.raises(UsageError, match=message) as raised:
            method("the", **options)
        assert "\n" not in str(raised.value)


def test_other_mistakes(model: Model) -> None:
    wrong: Any
    for wrong in (7, None, b"the", ["the", 7]):
        with pytest.raises(UsageError, match=r"^the prompt is (7|None|b'the'); a string is expected"):
            model.generate(wrong)
        for method in (model.score, model.perplexity):
            with pytest.raises(UsageError, match=r"^(the text|text number 1) is .*; a string is expected"):
                method(wrong)
    for wrong, message in (
        (lambda value: lmdist.load(model.name, threads=value), "threads"),
        (lambda value: model.completions(["the"], batch_size=value), "batch_size"),
        (lambda value: model.scorer(batch_size=value), "batch_size"),
        (lambda value: model.next_words("the", value), "k"),
        (model.read("the").fork, "n"),
    ):
        for value, expected in ((-1, "-1; it must be"), ("4", "'4'; an integer"), (1.5, "1.5; an integer"), (True, "True; an")):
            with pytest.raises(UsageError, match=f"^{message} is {expected}"):
                wrong(value)
    for wrong in ("the cat", b"the", None):
        with pytest.raises(UsageError, match=r"^the prompts are ('the cat'|b'the'|None); a list is expected, as \["):
            model.completions(wrong)
    with pytest.raises(UsageError, match="has a lone surrogate"):
        model.score("the \ud800")
    with pytest.raises(UsageError, match=r"^n is 2; a stream is one text"):
        model.stream("the", n=2)  # pyright: ignore[reportCallIssue]
    with pytest.raises(UsageError, match="num_beams is for beam search, and a stream for sampling"):
        model.stream("the", num_beams=2)
    with pytest.raises(UsageError, match="k is 0; it must be from 1 to"):
        model.next_words("the", 0)


def test_numbers_of_numpy_and_a_string_for_a_list(model: Model) -> None:
    asked = {"temperature": np.float32(0.5), "max_new_tokens": np.int64(9), "seed": np.uint8(3), "stop": "so", "top_k": None}
    assert same_text(
        model.generate("the", **asked), model.generate("the", temperature=0.5, max_new_tokens=9, seed=3, stop=["so"])
    )


def test_many_threads_get_what_each_gets_alone(folder: Path) -> None:
    asked = [{"seed": number, "max_new_tokens": 30, **({"top_p": 0.8} if number % 3 == 0 else {})} for number in range(24)]
    alone = [lmdist.load(folder, threads=1).generate("the cat", **options) for options in asked]
    shared = lmdist.load(folder, threads=1)  # no session is open yet
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda options: shared.generate("the cat", **options), asked))
        loaded = list(threads.map(lambda _: lmdist.load(folder, threads=1), range(8)))
        scores = list(threads.map(lambda _: shared.score("the cat said").log_probability, range(8)))
    assert all(map(same_text, found, alone))
    assert len(set(scores)) == 1
    assert all(same_text(one.generate("the cat", **asked[0]), alone[0]) for one in loaded)
