"""Tokenizers: their tokens against NLTK's, their saved file, and the text that tokens are joined to."""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdist.errors import DataError, MissingInputError, UsageError
from lmdist.settings import Cleaning, TextSettings, Tokenizer
from lmdist.text import detokenizer
from lmdist.text.tokenizer import WordTokenizer

NEWS = [
    "Mr. Smith went to Washington, D.C., on Jan. 5 of that year. He didn't say much: "
    '"I can\'t," he said. Why not? Nobody knows.',
    "The U.S. economy grew 2.5 percent. “It’s a start,” said Dr. Jones (the chairman). The boys' club paid $3.88...",
    "J. P. Morgan reported earnings. The bank's profit rose 10%; costs fell. Mrs. Brown -- the owner -- cannot agree!",
] * 20

MESSY = [
    "",
    " \n\t ",
    "...",
    "No stop",
    'A "quote',
    "x" * 5000,
    "Grüße, Straße! Ça va?",
    "日本語。テスト",
    "a\x00b \x85 c\u2028d",
]


OF_WORDS = [kind for kind in get_args(Tokenizer) if not TextSettings(kind).has_pieces]


@pytest.fixture(scope="module")
def english() -> WordTokenizer:
    return WordTokenizer.train(TextSettings(), NEWS)


def test_word_tokenize_is_nltks_own(english, monkeypatch):
    import nltk.tokenize
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    from lmdist.text.words import punkt_parameters

    punkt = PunktSentenceTokenizer(punkt_parameters(english.punkt))
    monkeypatch.setattr(nltk.tokenize, "_get_punkt_tokenizer", lambda language: punkt)
    for document in [*NEWS[:3], "\n\n".join(NEWS[:3]), *MESSY]:
        assert english.tokenize(document) == nltk.tokenize.word_tokenize(document)


def test_sentences_end_where_they_should(english):
    words = english.tokenize(NEWS[0])
    assert words[:9] == ["Mr.", "Smith", "went", "to", "Washington", ",", "D.C.", ",", "on"]
    assert words[words.index("much") - 3 : words.index("much") + 2] == ["did", "n't", "say", "much", ":"]
    assert [word for word in words if word.endswith(".") and len(word) > 1] == ["Mr.", "D.C.", "Jan."]


def test_wordpunct_is_nltks_own():
    from nltk.tokenize import wordpunct_tokenize

    tokenizer = WordTokenizer(TextSettings(tokenizer="wordpunct"))
    for document in [*NEWS[:3], *MESSY]:
        assert tokenizer.tokenize(document) == wordpunct_tokenize(document)


@given(st.text())
def test_whitespace_is_split_with_an_end_mark_between_lines(document):
    words = WordTokenizer(TextSettings(tokenizer="whitespace")).tokenize(document)
    spelled = unicodedata.normalize("NFC", document)
    assert " ".join(word for word in words if word != "<eos>") == " ".join(spelled.split()).replace("<eos>", "")
    assert words.count("<eos>") == document.removesuffix("\n").count("\n") + document.split().count("<eos>")


@given(st.lists(st.text(st.characters(exclude_characters="\n")), min_size=1))
def test_whitespace_tokenizes_a_file_as_its_lines(lines):
    tokenizer = WordTokenizer(TextSettings(tokenizer="whitespace"))
    whole = tokenizer.tokenize("".join(f"{line}\n" for line in lines))
    assert [*whole, "<eos>"] == [word for line in lines for word in [*tokenizer.tokenize(line), "<eos>"]]


@given(st.text(), st.sampled_from(OF_WORDS), st.sampled_from(get_args(Cleaning)), st.booleans())
@settings(max_examples=200, deadline=None)
def test_words_are_never_empty_and_hold_no_blank(english, document, tokenizer, clean, lowercase):
    words = WordTokenizer(TextSettings(tokenizer, clean, lowercase), english.punkt).tokenize(document)
    assert all(word and not any(map(str.isspace, word)) for word in words)
    assert not lowercase or all(word == word.lower() for word in words)


def test_the_tutorials_cleaning():
    tokenizer = WordTokenizer.train(TextSettings(clean="tutorial"), [])
    assert tokenizer.tokenize("The well-known U.S. President's \"Plan\" -- it can't fail!") == (
        ["the", "well", "known", "us", "presidents", "plan", "it", "cant", "fail"]
    )


def test_lowercase_does_not_move_the_ends_of_sentences(english):
    lower = WordTokenizer(TextSettings(lowercase=True), english.punkt)
    for document in NEWS[:3]:
        assert lower.tokenize(document) == [word.lower() for word in english.tokenize(document)]


@pytest.mark.parametrize("tokenizer", OF_WORDS)
def test_a_saved_tokenizer_finds_the_same_words(tmp_path, english, tokenizer):
    before = WordTokenizer(TextSettings(tokenizer), english.punkt if tokenizer == "word_tokenize" else None)
    before.save(tmp_path / "text.json")
    after = WordTokenizer.load(tmp_path / "text.json")
    assert after.settings == before.settings
    assert after.punkt == before.punkt
    for document in [*NEWS[:3], "\n\n".join(NEWS[:3]), *MESSY]:
        assert after.tokenize(document) == before.tokenize(document)


@pytest.mark.slow
def test_training_writes_the_same_bytes_in_every_process(tmp_path):
    program = (
        "import json, sys; from pathlib import Path; from lmdist.settings import TextSettings; "
        "from lmdist.text.tokenizer import WordTokenizer; "
        "WordTokenizer.train(TextSettings(), json.load(sys.stdin)).save(Path(sys.argv[1]))"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", program, tmp_path / seed],
            input=json.dumps(NEWS),
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_training_reads_no_more_than_it_needs(monkeypatch):
    monkeypatch.setattr("lmdist.text.tokenizer.PUNKT_CHARACTERS", 20_000)
    monkeypatch.setattr("lmdist.text.tokenizer.PUNKT_CHUNK", 10_000)

    def documents():
        for number in range(100):
            assert number < 50, "the whole corpus was read"
            yield f"Word{number} is here. " * 50

    WordTokenizer.train(TextSettings(tokenizer="whitespace"), documents())
    assert WordTokenizer.train(TextSettings(), documents()).punkt


def test_tokenizing_does_not_grow_what_was_learnt(english):
    english.tokenize("Never seen before. Xyzzy. Plugh said so. " * 3)
    assert "xyzzy" not in english.punkt["contexts"]
    assert "plugh" not in english._split.nltk_punkt._params.ortho_context


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "a JSON object is expected"),
        ("{}", "has the format None"),
        ('{"format": "lmdist text", "version": 9}', "version 9"),
        ('{"format": "lmdist text", "version": 1}', "damaged"),
        ('{"format": "lmdist text", "version": 1, "settings": {"colour": 1}, "punkt": null, "nltk": "3"}', "colour"),
        ('{"format": "lmdist text", "version": 1, "settings": {}, "punkt": null, "nltk": "3"}', "Punkt"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text, message):
    path = tmp_path / "text.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        WordTokenizer.load(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MissingInputError, match=r"text\.json"):
        WordTokenizer.load(tmp_path / "text.json")


@pytest.mark.parametrize("wrong", [{"tokenizer": "bert"}, {"clean": "all"}])
def test_a_wrong_setting_names_the_right_ones(wrong):
    with pytest.raises(UsageError, match="expected one of"):
        TextSettings(**wrong)


def test_another_nltk_is_named_in_a_warning(capsys):
    WordTokenizer(TextSettings(clean="tutorial"), nltk_version="2.0.1").tokenize("a")
    assert "NLTK 2.0.1" in capsys.readouterr().err


def test_a_document_on_which_nltk_fails_is_a_data_error(english, monkeypatch):
    def slow(document):
        raise TimeoutError

    monkeypatch.setitem(english.__dict__, "_split", slow)
    with pytest.raises(DataError, match="gave up"):
        english.tokenize(". . .")


@pytest.mark.parametrize("document", [*NEWS[:3], "I'm gonna say: you'll get 5% (or $6) more, 'if so'; #3 isn't…"])
def test_joined_text_is_readable(english, document):
    assert english.detokenize(english.tokenize(document)) == document


@pytest.mark.parametrize(
    "document",
    [
        "A well-known man's \"odd idea\", (she said) didn't work. Why?",
        '("Not so," he said.) "It\'s 3/4 of $5!" And so on...',
    ],
)
def test_joined_text_of_wordpunct_is_readable(document):
    wordpunct = WordTokenizer(TextSettings("wordpunct"))
    assert wordpunct.detokenize(wordpunct.tokenize(document)) == document


def test_the_marks_of_wikitext_are_joined_to_readable_text():
    words = "the 1 @,@ 000 @-@ year war 's end , \" so it is \" . <eos> They don 't <unk> ( yet ) ."
    expected = "the 1,000-year war's end, \"so it is\".\nThey don't <unk> (yet)."
    assert WordTokenizer(TextSettings("whitespace")).detokenize(words.split()) == expected


WORDS = """
    the cat can not don n't 's 't is boys `` '' " ' ’ “ ” ( ) . , -- - / @-@ <eos> <unk> ... $ 5 % ." "(
""".split()


@given(st.lists(st.sampled_from(WORDS)), st.integers(0, 20), st.sampled_from(OF_WORDS))
def test_the_text_of_the_first_words_begins_the_text_of_all(words, count, tokenizer):
    from lmdist.text.detokenizer import Place, pieces

    place = Place()
    begun = list(pieces(words[:count], tokenizer, place))
    assert list(pieces(words, tokenizer))[:count] == begun
    for _ in range(2):  # as often as one likes
        assert [*begun, *pieces(words[count:], tokenizer, place.copy())] == list(pieces(words, tokenizer))


@pytest.mark.parametrize("wordpunct", [True, False])
def test_a_plain_word_is_written_as_any_other(wordpunct, monkeypatch):
    """What is remembered of a word is what the rules find, after whatever word."""
    words = ["it", "'", "s", "S", "’", "n't", "'T", "'t", "not", "can", "@-@", "@a@", "@", "``", "don", "5", "é", "x" * 50]
    words += [second for _, second in detokenizer.PAIRS]
    found = [detokenizer.spaced(word, before, [], wordpunct=wordpunct) for word in words for before in ["", *words]]
    monkeypatch.setattr(detokenizer, "is_plain", lambda _: False)
    assert found == [detokenizer.spaced(word, before, [], wordpunct=wordpunct) for word in words for before in ["", *words]]


def test_importing_text_is_light():
    program = (
        "import sys; from lmdist.settings import TextSettings; "
        "from lmdist.text.tokenizer import WordTokenizer; "
        "WordTokenizer(TextSettings('wordpunct')).tokenize('a.'); "
        "assert not {'nltk', 'torch', 'pandas', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
