"""tokenizer.json, read by the real `tokenizers`, finds the ids that lmdist finds: in any text, in any of the settings."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import assume, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.normalizers import NFC

from lmdist.errors import CONTROLS
from lmdist.settings import Cleaning, TextSettings
from lmdist.settings import Tokenizer as Tokenizers
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import Vocabulary
from lmdist_export import export
from lmdist_export.bundle import Bundle
from lmdist_export.conversion.tokenizer_json import CHARACTERS, capitals, obstacle, tokenizer_json
from support.small_bundles import PLAIN_WORDS, SINGLE, make_bundle, make_run

DATA = Path(os.environ.get("LMDIST_DATA", Path(__file__).parents[3] / "shared" / "data"))

SPLITTERS: list[tuple[Tokenizers, Literal[1, 2]]] = [("wordpunct", 2), ("whitespace", 2), ("characters", 2), ("wordpunct", 1)]
CLEANINGS: list[Cleaning] = ["none", "tutorial"]
SETTINGS = [
    TextSettings(tokenizer, clean, lowercase, rules)
    for tokenizer, rules in SPLITTERS
    for clean in CLEANINGS
    for lowercase in (False, True)
]
# Blanks of Python and of others, capitals that are more than one letter in small or depend on their neighbours, marks that
# Unicode sees through, letters that are no letters to others, characters younger than some Unicode, and lmdist's own marks.
TRAPS = [
    *("\n", "\n\n", " ", "\t", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\xa0", "\u200b", "\u2028"),
    *("\u3000", "\ufeff", "\x00", "\U0010ffff", "<unk>", "<eos>", "<UNK>", "<EOS>", "a<unk>b", "<", ">", "-", "--", "_", "'"),
    *("the", "The", "THE", "don't", "U.S.", "well-known", "3.5%", "İ", "I\u0307", "i\u0307", "İstanbul", "\u0307", "ß", "ẞ"),
    *("Σ", "ΟΔΟΣ", "ΟΔΟΣ.", "ΑΣ'Α", "Α.Σ", "Α\u00adΣ", "ΑʰΣʰ", "Σ\u0301Α", "ς", "σ", "'ΣΣ'", "\u212a", "\u01c5", "\u1e9e"),
    *("e\u0301", "é", "A\u030a", "\u212b", "q\u0307\u0323", "\u00ad", "co\u00adop", "\u200f", "a\u200bb", "\u2581"),
    *(
        "हिन्दी",
        "क्\u200dष",
        "می\u200cخواهم",
        "كِتَابٌ",
        "ที่นี่",
        "❤\ufe0f",
        "\u0301a",
        "!\u0301a",
        "Σ\u0301\u0345",
        "각",
        "\u1100\u1161",
    ),
    *("Ⓐ", "Ⅷ", "½", "٣", "ª", "日本", "한국", "\u0903", "👩\u200d👩", "\ua7cb", "\u0264", "\ua7dc", "\u019b", "\U00010d50"),
]


def names(settings: TextSettings) -> str:
    return f"{settings.tokenizer}-{settings.clean}{'-lowercase' * settings.lowercase}{'-first' * (settings.rules == 1)}"


def vocabulary_of(settings: TextSettings, *texts: str) -> Vocabulary:
    """Of the words of these texts; those that the format cannot express, and control characters, are left out."""
    found = (word for text in texts for word in WordTokenizer(settings).tokenize(text))
    words = dict.fromkeys(word for word in found if not CONTROLS.search(word))
    if names(settings) == "wordpunct-none-lowercase-first":
        words = {word: None for word in words if "i\u0307" not in word}
    vocabulary = Vocabulary(["<unk>", "<eos>", *(word for word in words if word not in ("<unk>", "<eos>"))])
    assert not obstacle(settings, vocabulary)
    return vocabulary


def reader(settings: TextSettings, vocabulary: Vocabulary) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_json(settings, vocabulary)))


def expected(settings: TextSettings, vocabulary: Vocabulary, text: str) -> list[int]:
    return vocabulary.encode(WordTokenizer(settings).tokenize(text))


@pytest.fixture(scope="module", params=SETTINGS, ids=names)
def case(request: pytest.FixtureRequest) -> tuple[TextSettings, Vocabulary, Tokenizer]:
    """Settings, a vocabulary that holds most of the traps, and a reader of their tokenizer.json."""
    vocabulary = vocabulary_of(request.param, *TRAPS, " ".join(PLAIN_WORDS), *(f"x{trap}y {trap}z" for trap in TRAPS))
    return request.param, vocabulary, reader(request.param, vocabulary)


@effort(max_examples=100, deadline=None)
@given(text=st.lists(st.sampled_from(TRAPS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)).map("".join))
def test_any_text_has_the_same_ids(case: tuple[TextSettings, Vocabulary, Tokenizer], text: str) -> None:
    settings, vocabulary, tokenizer = case
    assume(settings.rules == 1 or NFC().normalize_str(text) == unicodedata.normalize("NFC", text))
    assert tokenizer.encode(text).ids == expected(settings, vocabulary, text)


@pytest.mark.parametrize("settings", SETTINGS, ids=names)
@effort(max_examples=10, deadline=None)
@given(
    known=st.lists(st.sampled_from(TRAPS), max_size=8).map(" ".join),
    text=st.lists(st.sampled_from([*TRAPS, " "]), max_size=30).map("".join),
)
def test_what_the_vocabulary_does_not_know_is_unknown_and_cut_alike(settings: TextSettings, known: str, text: str) -> None:
    vocabulary = vocabulary_of(settings, known)
    assert reader(settings, vocabulary).encode(text).ids == expected(settings, vocabulary, text)


@pytest.mark.parametrize("settings", SETTINGS, ids=names)
def test_a_word_that_these_settings_never_find_is_not_found(settings: TextSettings) -> None:
    vocabulary = Vocabulary(["<unk>", "<eos>", "The", "U.S."])
    assert reader(settings, vocabulary).encode("The the U.S.").ids == expected(settings, vocabulary, "The the U.S.")


@pytest.mark.parametrize("settings", SETTINGS, ids=names)
def test_every_kind_of_character_is_what_python_takes_it_for(settings: TextSettings) -> None:
    # Where letters, blanks and others begin and end, all capitals, and their neighbours.
    runs = re.findall(r"\w+|\s+|[^\w\s]+", CHARACTERS)
    edges = {ord(edge) for run in runs for edge in (run[0], run[-1])} | {
        ord(c) for capital in capitals() for c in capital.lower()
    }
    codes = {code + step for code in (*edges, *map(ord, capitals())) for step in (-1, 0, 1)}
    characters = [chr(code) for code in sorted(codes) if 0 <= code < 0x110000 and not 0xD800 <= code < 0xE000]
    text = "".join(f" {character} a{character}b" for character in characters)
    vocabulary = vocabulary_of(settings, " ".join(characters))
    assert len(vocabulary) > 3000
    assert reader(settings, vocabulary).encode(text).ids == expected(settings, vocabulary, text)


@pytest.mark.parametrize("settings", SETTINGS, ids=names)
def test_real_text_has_the_same_ids(settings: TextSettings) -> None:
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not here")
    texts = list(real_texts())
    vocabulary = vocabulary_of(settings, *texts[::2])
    tokenizer = reader(settings, vocabulary)
    for text in texts:
        assert tokenizer.encode(text).ids == expected(settings, vocabulary, text)


def real_texts() -> Iterator[str]:
    """Some of the documents of real corpora."""
    csv.field_size_limit(1 << 27)
    with (DATA / "news-sample/news_sample.csv").open(encoding="utf-8", newline="") as file:
        for row in list(csv.DictReader(file))[::5]:
            yield row.get("content") or max((text or "" for text in row.values()), key=len)
    yield (DATA / "wikitext-2/wiki.test.tokens").read_text(encoding="utf-8")[:300_000]


# --- in the bundle -------------------------------------------------------------------------------------------------


def test_a_bundle_has_the_file_and_its_sum(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, SINGLE, "wordpunct", PLAIN_WORDS)
    assert "tokenizer.json" in Bundle.load(bundle).manifest["files"]
    ids = Tokenizer.from_file(str(bundle / "tokenizer.json")).encode("the cat, that president").ids
    assert ids == [2, 3, 0, 7, 5]


def test_without_an_exact_file_a_line_explains_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path, SINGLE, "word_tokenize")
    assert not (bundle / "tokenizer.json").exists()
    assert "tokenizer.json" not in Bundle.load(bundle).manifest["files"]
    assert "without tokenizer.json: its format cannot express the rules of word_tokenize" in capsys.readouterr().err


def test_a_capital_that_would_end_a_word_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, SINGLE, "wordpunct", ["i\u0307zmir"])
    checkpoint = run / "checkpoints/step-000000007"
    settings = dataclasses.replace(WordTokenizer.load(checkpoint / "text.json").settings, lowercase=True, rules=1)
    assert WordTokenizer(settings).tokenize("İzmir") == ["i\u0307zmir"]
    vocabulary = Vocabulary.load(checkpoint / "vocab.txt")
    assert "would split 'i\u0307zmir' at its 'İ'" in obstacle(settings, vocabulary)
    # With the tutorial's cleaning letters are made small first by lmdist too, and the dot is a word of its own.
    assert obstacle(dataclasses.replace(settings, clean="tutorial"), vocabulary) == ""
    assert obstacle(dataclasses.replace(settings, tokenizer="whitespace"), vocabulary) == ""
    assert obstacle(dataclasses.replace(settings, lowercase=False), vocabulary) == ""
    assert obstacle(dataclasses.replace(settings, rules=2), vocabulary) == ""  # marks stay with their letters
    assert "HTML" in obstacle(dataclasses.replace(settings, clean="html"), vocabulary)
    export.main([str(run), "-o", str(tmp_path / "bundle")])
    assert (tmp_path / "bundle/tokenizer.json").exists()
