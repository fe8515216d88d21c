"""The JavaScript of `--layout web` against Python: words, text and random numbers, the same ones."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from lmdist.settings import TextSettings
from lmdist.text.detokenizer import is_wide, pieces
from lmdist.text.learning import by_frequency, trained_model
from lmdist.text.pieces import SIGN_OF, Pieces, Saved, byte_level_tokenizer, word_splitter
from lmdist.text.tokenizer import WordTokenizer, train_punkt
from lmdist_export.sampling.seams import seam_of
from support.javascript import Engine, needs_node
from support.odd_texts import LETTERS, MARKS, STRANGE, TEXT, TOKENS, odd_texts

pytestmark = needs_node

DATA = Path(os.environ.get("LMDIST_DATA", Path(__file__).parents[3] / "shared" / "data"))
SETTINGS = [
    TextSettings("word_tokenize"),
    TextSettings("word_tokenize", lowercase=True),
    TextSettings("word_tokenize", "tutorial"),
    TextSettings("wordpunct"),
    TextSettings("wordpunct", lowercase=True, rules=1),
    TextSettings("whitespace"),
    TextSettings("whitespace", "tutorial"),
    TextSettings("characters"),
    TextSettings("word_tokenize", line_breaks=True),
    TextSettings("characters", line_breaks=True),
]
OTHER_SCRIPTS = [
    *"नमस्ते हिन्दी שָׁלוֹם сім'я Ελλάς ΟΔΟΣ 日本語、 한국 ½ Ⅷ İ l·l d' ’s « » „ “ ‹ ¿ ¡ — 5 € $ ²".split(),
    *["e\u0301", "\u00ad", "\u200b", "\u200d", "\n", "\x1c", "\x85", "\ufeff"],
]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as opened:
        yield opened


def opened(engine: Engine, settings: TextSettings, punkt: dict[str, object] | None = None) -> WordTokenizer:
    """A tokenizer, and the same one in JavaScript."""
    needed = punkt or train_punkt(TEXT) if settings.needs_sentences else None
    engine.call("tokenizer", {"settings": dataclasses.asdict(settings), "punkt": needed})
    return WordTokenizer(settings, needed)


# --- random numbers ------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**64 - 1) | st.integers(0, 2**33),
    key=st.lists(st.integers(0, 2**20), max_size=12),
    counts=st.lists(st.integers(2, 50), max_size=4),
    unused=st.integers(0, 2),
)
@effort(max_examples=60, deadline=None)
def test_random_numbers_are_numpys(engine: Engine, seed: int, key: list[int], counts: list[int], unused: int) -> None:
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=tuple(key)))
    expected = [generator.random(count - unused, np.float32).tolist() for count in counts]
    assert engine.call("numbers", str(seed), key, counts, unused) == expected


# --- words ---------------------------------------------------------------------------------------------------------


def name_of(settings: TextSettings) -> str:
    parts = settings.tokenizer, settings.clean, "lowercase" * settings.lowercase, "lines" * settings.line_breaks, settings.rules
    return "-".join(map(str, filter(None, parts)))


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_words_are_pythons(engine: Engine, settings: TextSettings) -> None:
    tokenizer = opened(engine, settings)

    @given(odd_texts | st.lists(st.sampled_from([*OTHER_SCRIPTS, *TOKENS, " "]), max_size=12).map("".join), st.booleans())
    @effort(max_examples=60, deadline=None)
    def compare(text: str, continues: bool) -> None:
        if all(unicodedata.category(character) != "Cn" for character in text):  # which Unicode versions disagree on
            assert engine.call("words", text, continues) == tokenizer.tokenize(text, continues=continues)

    compare()


def test_a_prompt_may_end_with_the_sign_of_what_is_no_character(engine: Engine) -> None:
    pytest.importorskip("tokenizers")

    def signs(content: bytes) -> str:
        return content.decode("latin-1").translate(SIGN_OF)

    longer = ["\ufffd".encode()[:2], "\ufffd".encode(), "\ufffd!".encode()]
    names = ["<unk>", "<eos>", *map(signs, [*(bytes([byte]) for byte in range(256)), *longer])]
    merges = [" ".join(map(signs, (whole[:-1], whole[-1:]))) for whole in longer[:2]]
    model = {"type": "BPE", "vocab": {name: token for token, name in enumerate(names)}, "merges": merges}
    saved = Saved(library="tokenizers", model=byte_level_tokenizer(model))
    python = WordTokenizer(TextSettings("bpe"), model=Pieces(saved))
    assert python.model
    engine.call("tokenizer", {"settings": {"tokenizer": "bpe"}, "punkt": None, "pieces": saved}, python.model.words)
    words = python.tokenize("a\ufffd", continues=True)
    seam = seam_of(python, words, [python.model.words.index(word) for word in words], space=False)
    found = engine.call("seam", words, False)
    assert seam
    assert [python.model.words[token] for token in seam.begin.tokens] == found["words"]
    assert (seam.given, seam.begin.overlap, words[-1]) == (found["given"], found["overlap"], found["again"])
    assert engine.call("seam", python.model.words[2 + 0xEF :][:1], False) is None  # a part of a character


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_pieces_are_those_of_the_library(engine: Engine, kind: Literal["bpe", "unigram"]) -> None:
    pytest.importorskip("tokenizers")
    texts = [*OTHER_SCRIPTS, *TOKENS, *TEXT[:2], *map(" ".join, pairwise(TOKENS))]
    counted = sorted(Counter(word for text in texts for word in word_splitter()(text)).items())
    saved = Saved(library="tokenizers", model=byte_level_tokenizer(by_frequency(trained_model(kind, counted, 600), counted)))
    python = WordTokenizer(TextSettings(kind), model=Pieces(saved))
    assert python.model
    engine.call("tokenizer", {"settings": {"tokenizer": kind}, "punkt": None, "pieces": saved}, python.model.words)

    @given(odd_texts | st.lists(st.sampled_from([*OTHER_SCRIPTS, *TOKENS, " "]), max_size=12).map("".join), st.booleans())
    @effort(max_examples=150, deadline=None)
    @example("\ud83d \ude00\ud800", False)
    @example("word" * 500, False)
    def compare(text: str, continues: bool) -> None:
        if all(unicodedata.category(character) != "Cn" for character in text):  # which Unicode versions disagree on
            assert engine.call("words", text, continues) == python.tokenize(text, continues=continues)

    @given(st.lists(st.sampled_from(python.model.words[1:]), max_size=30))
    @effort(max_examples=100, deadline=None)
    def write(words: list[str]) -> None:
        found, expected = engine.call("written", words), list(python.pieces(words))
        assert found[: len(words)] == expected[: len(words)]
        assert "".join(found) == "".join(expected)

    compare()
    write()


def test_words_are_nltks_with_parameters_that_no_text_has_taught(engine: Engine) -> None:
    tokenizer = opened(engine, TextSettings("word_tokenize"), STRANGE)

    @example("wanna\x1ca ")
    @given(odd_texts)
    @effort(max_examples=100, deadline=None)
    def compare(text: str) -> None:
        if all(unicodedata.category(character) != "Cn" for character in text):
            assert engine.call("words", text, False) == tokenizer.tokenize(text)

    compare()


def test_words_of_real_text_are_nltks(engine: Engine) -> None:
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not here")
    csv.field_size_limit(1 << 27)
    with (DATA / "bbc-news" / "bbc_test.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][::9]
    tokenizer = opened(engine, TextSettings("word_tokenize"), train_punkt(texts))
    for text in texts:
        assert engine.call("words", text, False) == tokenizer.tokenize(text)


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
def test_words_are_found_where_they_stand(engine: Engine, settings: TextSettings) -> None:
    opened(engine, settings)
    text = 'He said: "Cafe\u0301 isn\'t  so." The END,\nof\u00ad it'
    words: list[str] = engine.call("words", text, False)
    spans = engine.call("spans", text)
    found = [text[start:end] for start, end in spans]
    assert len(found) == len(words)
    assert [start for start, _ in spans] == sorted(start for start, _ in spans)
    same = {"``": '"', "''": '"', "<eos>": "\n", "<nl>": "\n", "\u2581": " "}

    def folded(piece: str) -> str:
        """A piece without what the settings leave out."""
        plain = unicodedata.normalize("NFC", piece).replace("\u00ad", "").lower()
        return re.sub(r"[^\w\s]", "", plain) if settings.clean == "tutorial" else plain

    for word, piece in zip(words, found, strict=True):
        assert folded(piece) == folded(same.get(word, word)) or (word == "\u2581" and piece.isspace())


# --- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["word_tokenize", "wordpunct", "whitespace", "characters"])
def test_text_of_words_is_pythons(engine: Engine, tokenizer: str) -> None:
    notation = ["<eos>", "<nl>", "\u2581", "@-@", "@,@", "``", "''", "'s", "n't", "o"]
    odd = st.sampled_from([*TOKENS, *OTHER_SCRIPTS, *MARKS, *LETTERS, *notation])
    mark = st.lists(st.sampled_from(MARKS), min_size=1, max_size=3).map("".join)

    @given(st.lists(odd | mark, max_size=15))
    @effort(max_examples=100, deadline=None)
    def compare(words: list[str]) -> None:
        assert engine.call("pieces", words, tokenizer) == list(pieces(words, tokenizer))

    compare()


def test_marks_and_digits_are_those_of_unicode(engine: Engine) -> None:
    """Each punctuation mark and each digit beside a word: which are wide, open, close or count."""
    every = [chr(code) for code in range(0x20000) if unicodedata.category(chr(code))[0] in "PSN"]
    marks = [mark for mark in every if unicodedata.category(mark) in ("Sc", "Sk") or unicodedata.category(mark)[0] == "P"]
    words = [word for mark in marks for word in ("a", mark)]
    assert engine.call("pieces", words, "whitespace") == list(pieces(words, "whitespace"))
    assert any(map(is_wide, marks))
    digits = [word for digit in every for word in (digit, "€", "<eos>")]
    assert engine.call("pieces", digits, "whitespace") == list(pieces(digits, "whitespace"))
