"""The Python API: states that are forked, continued and saved, scores, next words, vectors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmdist
from lmdist.cache_settings import NeuralCache
from lmdist.errors import DataError, MissingInputError, UsageError
from lmdist_export import score
from lmdist_export.api import Model
from lmdist_export.bundle import Bundle
from lmdist_export.graph.cell import STATE
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.sampling.scoring import Score, Scorer
from support.small_bundles import PLAIN_WORDS, UNTIED, bare_bundle, make_bundle, make_model, neutral, same_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the whitespace tokenizer."""
    return neutral(make_bundle(tmp_path_factory.mktemp("api"), UNTIED, "whitespace", PLAIN_WORDS))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return lmdist.load(folder)


# --- states --------------------------------------------------------------------------------------------------------


def test_a_prompt_that_was_read_gives_the_texts_of_its_string(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 20, "ignore_eos": True}
    state = model.read("the zebra said")
    assert state.tokens == ["the", "zebra", "said"]
    assert state.unknown_words == ["zebra"]
    four = model.generate("the zebra said", n=4, seed=7, **asked)
    monkeypatch.setattr(model.sampler, "start", None)  # nothing is read again
    assert same_text(model.generate(state, seed=7, **asked), four[0])
    assert all(map(same_text, model.generate(state, n=4, seed=7, **asked), four))
    assert all(map(same_text, model.generate(state.fork(4), seed=7, **asked), four))
    pairs = model.generate(state.fork(2), n=2, seed=7, **asked)
    assert all(map(same_text, [text for pair in pairs for text in pair], four))
    assert "".join(model.stream(state, seed=7, **asked)) == four[0].text
    beams = model.generate(state, num_beams=3, n=2, max_new_tokens=6)
    words = model.next_words(state, 4)
    monkeypatch.undo()
    assert all(map(same_text, beams, model.generate("the zebra said", num_beams=3, n=2, max_new_tokens=6)))
    expected = model.next_words("the zebra said", 4)
    assert [word for word, _ in words] == [word for word, _ in expected]
    assert [share for _, share in words] == pytest.approx([share for _, share in expected], rel=1e-4)


def test_reading_goes_on(model: Model) -> None:
    whole = model.read("the zebra said that it is")
    parts = model.read("that it is", after=model.read("the zebra said"))
    assert (parts.tokens, parts.ids) == (whole.tokens, whole.ids)
    assert same_text(model.generate(parts, seed=2, max_new_tokens=20), model.generate(whole, seed=2, max_new_tokens=20))
    text = model.generate(whole, seed=2, max_new_tokens=5, ignore_eos=True)
    after = model.read(text)
    again = model.read(text.text)
    assert after.tokens == [*whole.tokens, *text.tokens]
    assert same_text(model.generate(after, seed=3, max_new_tokens=9), model.generate(again, seed=3, max_new_tokens=9))
    assert model.read("").tokens == []
    assert same_text(model.generate(model.read(""), seed=4), model.generate("", seed=4))


def test_a_long_prompt_is_read_in_parts(model: Model) -> None:
    long = " ".join(PLAIN_WORDS * 70)  # 1,260 words
    state = model.read("we said", after=model.read(long))
    assert same_text(
        model.generate(state, seed=1, max_new_tokens=9), model.generate(f"{long} we said", seed=1, max_new_tokens=9)
    )


def test_a_state_in_a_file(model: Model, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "said.npz"
    state = model.read("the zebra said").fork(3)[2]
    path.write_text("older")
    state.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["said.npz"]
    loaded = lmdist.load(folder).load_prompt(path)
    assert (loaded.tokens, loaded.ids, loaded.number) == (state.tokens, state.ids, 2)
    assert same_text(model.generate(loaded, seed=7), model.generate("the zebra said", n=3, seed=7)[2])
    with pytest.raises(MissingInputError, match="none does not exist"):
        model.load_prompt(tmp_path / "none")
    assert state.state
    state.state.save(path)  # a state without words
    with pytest.raises(DataError, match=r"said\.npz"):
        model.load_prompt(path)
    with pytest.raises(UsageError, match=r"nothing of this prompt was read"):
        model.prompt("the cat").save(path)


@pytest.mark.parametrize(
    ("name", "forged", "error"),
    [
        ("number", -1, DataError),
        ("said", ["the", "\x1b[31m"], DataError),
        ("words", np.array([[-99]]), UsageError),
        ("words", np.array([[10**6]]), UsageError),
        ("lengths", np.array([0]), UsageError),
        ("lengths", np.array([7]), UsageError),
        ("lengths", np.array(1), DataError),
        ("lengths", np.array([], np.int64), DataError),
        ("rows", 2, DataError),
        ("rows", 0, DataError),
    ],
)
def test_a_forged_state_is_refused(name: str, forged: Any, error: type[Exception], model: Model, tmp_path: Path) -> None:
    path = tmp_path / "said.npz"
    model.read("the cat").save(path)
    with np.load(path) as file:
        arrays = dict(file)
    notes = json.loads(str(arrays["notes"]))
    if name == "rows":
        arrays |= {part: np.repeat(arrays[part], forged, axis=0) for part in ("words", "lengths", *STATE)}
    elif name in arrays:
        arrays[name] = forged
    else:
        notes[{"said": "words"}.get(name, name)] = forged
    changed: dict[str, Any] = arrays | {"notes": np.array(json.dumps(notes))}
    np.savez(path, **changed)
    with pytest.raises(error, match=r"not this model's|said\.npz") as raised:
        model.load_prompt(path)
    assert "\n" not in str(raised.value)


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
    assert [len(one.state.model) for one in (state, with_memory) if one.state] == [2, 4]
    assert same_text(model.generate(state, **asked), expected)
    assert same_text(model.generate(with_memory, **asked), expected)
    asked["cache_weight"] = 0
    plain = model.generate("the cat said the cat", **asked)
    assert all(same_text(text, plain) for text in model.generate([state, with_memory], **asked))
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
    variants: list[tuple[dict[str, Any], str]] = [
        ({}, ""),
        ({"end": False}, "--no-eos"),
        ({"carry_state": True}, "--carry-state"),
    ]
    for options, flag in variants:
        assert model.perplexity(texts, **options) == written(*filter(None, [flag]))[0]["perplexity"]
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
    assert (alone.original_words, alone.bytes) == (3, 10)
    assert alone.bits_per_byte == pytest.approx(-alone.log_probability / np.log(2) / 10)
    assert model.perplexity("the zebra", per="byte") == pytest.approx(2**alone.bits_per_byte)
    two = "the zebra\nis here"  # two lines of the tokenizer, with an <eos> each; one text, of four words and an end
    assert (len(model.score(two).tokens), model.score(two).original_words) == (6, 5)
    assert model.score(two).perplexity_per_word == pytest.approx(np.exp(-model.score(two).log_probability / 5))
    assert model.perplexity(two, per="word") == pytest.approx(model.score(two).perplexity_per_word)
    assert repr(alone).startswith("Score('the zebra', log_probability=-")
    assert repr(alone).endswith("tokens=3, unknown=1)")
    nothing = model.score("", end=False)
    assert np.isnan([nothing.perplexity, nothing.perplexity_per_word, nothing.bits_per_byte]).all()
    with pytest.raises(UsageError, match="per is 'words'; expected one of token, word, byte"):
        model.perplexity("the", per="words")  # pyright: ignore[reportArgumentType]
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


def test_a_perplexity_beyond_a_float_is_infinite(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Score("a", ["a"], np.zeros(1, np.bool_), np.array([-1000], np.float32), bytes=2, original_words=1)
    monkeypatch.setattr(Scorer, "score", lambda *_: iter([found]))
    assert model.perplexity("a", per="word") == model.perplexity("a") == np.inf


def test_a_word_without_a_vector(model: Model) -> None:
    for word, message in (
        ("zebra", "'zebra' is no word of the vocabulary$"),
        ("The", "'The' is .*; 'the' is"),
        ("the cat", "no"),
        ("", "no"),
    ):
        with pytest.raises(UsageError, match=message):
            model.vector(word)
