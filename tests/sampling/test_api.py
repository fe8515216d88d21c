"""The Python API: strings in and out, the texts and scores of the commands and the server, states, MLflow's addresses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmdist
from lmdist.cache_settings import NeuralCache
from lmdist.errors import DataError, MissingInputError, UsageError
from lmdist_export import api, generate, score
from lmdist_export.api import GenerationOptions, Model
from lmdist_export.bundle import Bundle
from lmdist_export.options import PARAMS
from lmdist_export.sampling.completion import Completion
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.serving import registry
from support.small_bundles import PLAIN_WORDS, UNTIED, bare_bundle, command, make_bundle, make_model, neutral

ROOT = Path(__file__).parents[2]
PROMPTS = ["the cat", "", "zebra said", "is not it"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the whitespace tokenizer."""
    return neutral(make_bundle(tmp_path_factory.mktemp("api"), UNTIED, "whitespace", PLAIN_WORDS))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return lmdist.load(folder)


def same(one: Completion, other: Completion) -> bool:
    """Whether two texts are one, but for their places among others."""
    return (one.text, one.tokens, one.finish_reason) == (other.text, other.tokens, other.finish_reason)


# --- importing -----------------------------------------------------------------------------------------------------


def test_what_is_imported_before_a_model_is_loaded_is_light() -> None:
    code = "import sys, lmdist; had = set(sys.modules); lmdist.load; print(*had, '|', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    at_first, all_of_it = (set(names.split()) for names in done.stdout.split("|"))
    assert "lmdist_export" not in at_first
    assert not all_of_it & {"numpy", "onnxruntime", "torch", "nltk", "regex", "pandas", "mlflow", "socket", "argparse"} - at_first
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
    assert same(one, same_one)
    assert same(one, first)
    assert [len(row) for row in (several, *table)] == [3, 3, 3]
    assert all(map(same, several, table[0]))
    assert len({text.text for text in several}) == 3
    assert model.generate([], **asked) == model.generate([], n=2, **asked) == []
    assert model.generate(**asked).text == " ".join(model.generate("", **asked).tokens).replace(" <eos> ", "\n")
    found = model.generate("the cat", num_beams=3, n=3, max_new_tokens=4, logprobs=0)
    totals = [sum(text.token_logprobs or []) / len(text.token_logprobs or [0]) for text in found]
    assert totals == sorted(totals, reverse=True)
    assert {text.seed for text in found} == {None}


def test_a_random_seed_is_returned_and_gives_the_text_again(model: Model) -> None:
    first, second = (model.generate("the dog", ignore_eos=True, max_new_tokens=40) for _ in range(2))
    assert first.seed != second.seed
    assert same(first, model.generate("the dog", ignore_eos=True, max_new_tokens=40, seed=first.seed))


@pytest.mark.parametrize("options", [{}, {"ignore_eos": True}, {"echo": False, "stop": ["so it"]}, {"top_k": 3, "logprobs": 1}])
def test_the_pieces_of_a_stream_are_the_text(model: Model, options: GenerationOptions) -> None:
    for seed in range(4):
        for prompt in ("the cat", ""):
            text = model.generate(prompt, seed=seed, max_new_tokens=30, **options)
            stream = model.stream(prompt, seed=seed, max_new_tokens=30, **options)
            assert stream.completion is None
            pieces = list(stream)
            assert "".join(pieces) == text.text
            assert stream.completion is not None
            assert same(stream.completion, text)
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
    ({"n": 0}, "^n is 0; it must be at least 1"),
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
        with pytest.raises(UsageError, match="prompt number 0 is .*; a string is expected"):
            model.generate(wrong)
    for call in (lambda: model.score(7), lambda: model.perplexity(b"the")):  # pyright: ignore[reportCallIssue,reportArgumentType]
        with pytest.raises(UsageError, match="a string, or a list of strings, is expected"):
            call()
    with pytest.raises(UsageError, match="has a lone surrogate"):
        model.score("the \ud800")
    with pytest.raises(UsageError, match=r"^n is 2; a stream is one text"):
        model.stream("the", n=2)  # pyright: ignore[reportCallIssue]
    with pytest.raises(UsageError, match="num_beams is for beam search, and a stream for sampling"):
        model.stream("the", num_beams=2)
    with pytest.raises(UsageError, match="k is 0; it must be at least 1"):
        model.next_words("the", 0)


def test_numbers_of_numpy_and_a_string_for_a_list(model: Model) -> None:
    asked = {"temperature": np.float32(0.5), "max_new_tokens": np.int64(9), "seed": np.uint8(3), "stop": "so", "top_k": None}
    assert same(model.generate("the", **asked), model.generate("the", temperature=0.5, max_new_tokens=9, seed=3, stop=["so"]))


def test_many_threads_get_what_each_gets_alone(folder: Path) -> None:
    asked = [{"seed": number, "max_new_tokens": 30, **({"top_p": 0.8} if number % 3 == 0 else {})} for number in range(24)]
    alone = [lmdist.load(folder, threads=1).generate("the cat", **options) for options in asked]
    shared = lmdist.load(folder, threads=1)  # no session is open yet
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda options: shared.generate("the cat", **options), asked))
        scores = list(threads.map(lambda _: shared.score("the cat said").log_probability, range(8)))
    assert all(map(same, found, alone))
    assert len(set(scores)) == 1


# --- states --------------------------------------------------------------------------------------------------------


def test_a_prompt_that_was_read_gives_the_texts_of_its_string(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 20, "ignore_eos": True}
    state = model.read("the zebra said")
    assert state.words == ["the", "zebra", "said"]
    assert state.unknown_words == ["zebra"]
    four = model.generate("the zebra said", n=4, seed=7, **asked)
    monkeypatch.setattr(model.sampler, "start", None)  # nothing is read again
    assert same(model.generate(state, seed=7, **asked), four[0])
    assert all(map(same, model.generate(state, n=4, seed=7, **asked), four))
    assert all(map(same, model.generate(state.fork(4), seed=7, **asked), four))
    pairs = model.generate(state.fork(2), n=2, seed=7, **asked)
    assert all(map(same, [text for pair in pairs for text in pair], four))
    assert "".join(model.stream(state, seed=7, **asked)) == four[0].text
    beams = model.generate(state, num_beams=3, n=2, max_new_tokens=6)
    words = model.next_words(state, 4)
    monkeypatch.undo()
    assert all(map(same, beams, model.generate("the zebra said", num_beams=3, n=2, max_new_tokens=6)))
    expected = model.next_words("the zebra said", 4)
    assert [word for word, _ in words] == [word for word, _ in expected]
    assert [share for _, share in words] == pytest.approx([share for _, share in expected], rel=1e-4)


def test_reading_goes_on(model: Model) -> None:
    whole = model.read("the zebra said that it is")
    parts = model.read("that it is", after=model.read("the zebra said"))
    assert (parts.words, parts.tokens) == (whole.words, whole.tokens)
    assert same(model.generate(parts, seed=2, max_new_tokens=20), model.generate(whole, seed=2, max_new_tokens=20))
    text = model.generate(whole, seed=2, max_new_tokens=5, ignore_eos=True)
    after = model.read(text)
    again = model.read(text.text)
    assert after.words == [*whole.words, *text.tokens]
    assert same(model.generate(after, seed=3, max_new_tokens=9), model.generate(again, seed=3, max_new_tokens=9))
    assert model.read("").words == []
    assert same(model.generate(model.read(""), seed=4), model.generate("", seed=4))


def test_a_long_prompt_is_read_in_parts(model: Model) -> None:
    long = " ".join(PLAIN_WORDS * 70)  # 1,260 words
    state = model.read("we said", after=model.read(long))
    assert same(model.generate(state, seed=1, max_new_tokens=9), model.generate(f"{long} we said", seed=1, max_new_tokens=9))


def test_a_state_in_a_file(model: Model, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "said.npz"
    state = model.read("the zebra said").fork(3)[2]
    path.write_text("older")
    state.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["said.npz"]
    loaded = lmdist.load(folder).load_prompt(path)
    assert (loaded.words, loaded.tokens, loaded.number) == (state.words, state.tokens, 2)
    assert same(model.generate(loaded, seed=7), model.generate("the zebra said", n=3, seed=7)[2])
    with pytest.raises(MissingInputError, match="none does not exist"):
        model.load_prompt(tmp_path / "none")
    state.state.save(path)  # a state without words
    with pytest.raises(DataError, match="said.npz"):
        model.load_prompt(path)
    with pytest.raises(UsageError, match=r"nothing of this prompt was read"):
        model.prompt("the cat").save(path)


def test_a_state_of_another_model_is_refused(model: Model, tmp_path: Path) -> None:
    other = lmdist.load(make_bundle(tmp_path, UNTIED, "whitespace", [*PLAIN_WORDS[:-1], "other"], precision="fp16"))
    state = other.read("the cat")
    for call in (model.generate, model.stream, model.next_words, model.read):
        with pytest.raises(UsageError, match="the prompt was read by another model"):
            call(state)
    state.save(tmp_path / "state.npz")
    with pytest.raises(UsageError, match=r"state\.npz was saved by another model"):
        model.load_prompt(tmp_path / "state.npz")


def test_a_state_without_a_memory_is_read_again_for_the_cache(folder: Path) -> None:
    bundle = replace(Bundle.load(folder), cache=NeuralCache(size=100, theta=0.5, weight=0.3))
    model = Model("cached", Sampler(bundle))
    asked: dict[str, Any] = {"cache_weight": 0.4, "seed": 1, "max_new_tokens": 12, "ignore_eos": True}
    expected = model.generate("the cat said the cat", **asked)
    state = model.read("the cat said the cat")
    remembering = Model("cached", Sampler(replace(bundle, generation=replace(bundle.generation, cache_weight=0.4))))
    with_memory = remembering.read("the cat said the cat")
    assert [len(one.state.model) for one in (state, with_memory)] == [2, 4]
    assert same(model.generate(state, **asked), expected)
    assert same(model.generate(with_memory, **asked), expected)
    plain = model.generate("the cat said the cat", **asked | {"cache_weight": 0})
    assert all(same(text, plain) for text in model.generate([state, with_memory], **asked | {"cache_weight": 0}))
    assert model.next_words(state, cache=True) == model.next_words("the cat said the cat", cache=True)
    assert model.next_words(state) != model.next_words(state, cache=True)


# --- scoring -------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_command(
    model: Model, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["the cat is here", "the zebra", "", "we said"]
    (tmp_path / "text").write_text("".join(f"{text}\n" for text in texts))

    def written(*options: str) -> list[Any]:
        score.main([str(folder), str(tmp_path / "text"), "--json", *options])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    scores = model.score(texts)
    assert [one.log_probability for one in scores] == [line["log_probability"] for line in written("--sentences")]
    assert [token._asdict() for one in scores for token in one.per_token] == [
        {"token": line["word"], "log_probability": line["log_probability"], "unknown": line["unknown"]}
        for line in written("--words")
    ]
    for options, flags in (({}, ()), ({"end": False}, ("--no-eos",)), ({"carry_state": True}, ("--carry-state",))):
        assert model.perplexity(texts, **options) == written(*flags)[0]["perplexity"]
    assert [
        {"text": text, "next": [{"word": word, "probability": share} for word, share in model.next_words(text, 3)]}
        for text in texts
    ] == written("--next", "3")
    alone = model.score("the zebra")
    assert alone.tokens == ["the", "zebra", "<eos>"]
    assert alone.unknown.tolist() == [False, True, False]
    assert alone.log_probability == pytest.approx(scores[1].log_probability, abs=1e-4)
    assert alone.perplexity == pytest.approx(np.exp(-alone.log_probability / 3))
    assert model.perplexity("the zebra") == pytest.approx(alone.perplexity)
    assert repr(alone).startswith("Score('the zebra', log_probability=-")
    assert repr(alone).endswith("tokens=3, unknown=1)")
    assert np.isnan(model.score("", end=False).perplexity)
    with pytest.raises(DataError, match="at least one line"):
        model.perplexity([])
    with pytest.raises(UsageError, match="this bundle has no neural cache"):
        model.score("the", cache=True)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_a_vector_is_the_row_of_the_embedding(precision: str, tmp_path: Path) -> None:
    model = Model("bare", Sampler(bare_bundle(tmp_path / "bare", UNTIED, precision)))
    rows = make_model(UNTIED, 300).embedding.weight.detach().numpy()
    for word, token in (("word2", 2), ("word299", 299), ("<unk>", 0)):
        vector = model.vector(word)
        assert (vector.shape, vector.dtype) == ((UNTIED.embedding_size,), np.float32)
        tolerance = {"fp32": 0, "fp16": 1e-3}.get(precision, np.abs(rows[token]).max() / 127)
        np.testing.assert_allclose(vector, rows[token], atol=tolerance)


def test_a_word_without_a_vector(model: Model) -> None:
    for word, message in (("zebra", "'zebra' is no word of the vocabulary$"), ("The", "'The' is .*; 'the' is"), ("the cat", "no"), ("", "no")):
        with pytest.raises(UsageError, match=message):
            model.vector(word)


# --- where it comes from -------------------------------------------------------------------------------------------


def test_a_model_says_what_it_is(model: Model, folder: Path) -> None:
    assert repr(model) == f"<lmdist model {folder}: LSTM 10-10, embedding 6, vocabulary 20, fp32, on cpu>"


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="does not exist"):
        lmdist.load(tmp_path / "none")
    with pytest.raises(UsageError, match="the provider is 'tpu'"):
        lmdist.load(tmp_path, provider="tpu")  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose mlflow.db has the bundle as `news`, version 1, alias `champion`."""
    place = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        registry.register(folder, "news", "champion")
        yield place


@pytest.mark.slow
def test_a_bundle_in_mlflow(store: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.chdir(store)
    client = mlflow.MlflowClient("sqlite:///mlflow.db")
    run = client.get_model_version("news", "1").run_id
    expected = model.generate("the cat", seed=7, max_new_tokens=20)
    for name in ("models:/news@champion", "models:/news/1", f"runs:/{run}/news"):
        with lmdist.load(name) as found:
            assert name in repr(found)
            downloaded = found.bundle.folder
            assert same(found.generate("the cat", seed=7, max_new_tokens=20), expected)
        assert not downloaded.exists()
    pieces = lmdist.load("models:/news@champion").stream("the cat", seed=7, max_new_tokens=20)
    assert "".join(pieces) == expected.text  # the model is in use as long as its stream is
    assert not list(Path(downloaded.parents[1]).glob("lmdist-*/"))
    for name, message in (
        ("models:/news@nobody", "has no models:/news@nobody"),
        ("models:/olds/1", "has no models:/olds/1"),
        (f"runs:/{run}/other", "has no runs:"),
    ):
        with pytest.raises(MissingInputError, match=message):
            lmdist.load(name)
    done = command("lmdist_export.generate", "models:/news@champion", "--prompt", "the cat", "--seed", 7, "--max-new-tokens", 20)
    assert done.stdout == f"{expected.text}\n"
    assert len(done.stderr.splitlines()) == 1, done.stderr
    done = command("lmdist_export.score", f"runs:/{run}/news", "--sentences", given="the cat\n")
    assert done.stdout.split("\t")[0] == f"{model.score('the cat').log_probability:.6f}"
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_mlflow_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(MissingInputError, match=r"models:/news@champion: mlflow\.db does not exist; set MLFLOW_TRACKING_URI"):
        lmdist.load("models:/news@champion")
    assert list(tmp_path.iterdir()) == []
