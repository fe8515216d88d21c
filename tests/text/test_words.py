"""words.py against NLTK itself: token for token, on adversarial texts and on real ones."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdist.settings import TextSettings
from lmdist.text import words
from lmdist.text.tokenizer import ABBREVIATIONS, WordTokenizer, train_punkt
from lmdist.text.words import WordFinder, punkt_parameters
from support.odd_texts import STRANGE, TEXT, TOKENS, odd_texts

DATA = Path(os.environ.get("LMDIST_DATA", Path(__file__).parents[3] / "shared" / "data"))

NLTK = tuple[Callable[[str], list[str]], Callable[[str], list[str]]]


@pytest.fixture(scope="module", params=["learnt", "strange"])
def finder(request) -> WordFinder:
    return WordFinder(train_punkt(TEXT) if request.param == "learnt" else STRANGE)


@pytest.fixture(scope="module")
def nltk(finder) -> NLTK:
    from nltk.tokenize.destructive import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    return PunktSentenceTokenizer(punkt_parameters(finder.punkt)).tokenize, NLTKWordTokenizer().tokenize


def same(finder: WordFinder, nltk: NLTK, document: str) -> None:
    """Sentences and words are NLTK's."""
    find_sentences, find_words = nltk
    sentences = find_sentences(document)
    if not words.SEPARATOR.search(document):
        assert finder.sentences(document) == sentences
    assert finder(document) == [word for sentence in sentences for word in find_words(sentence)]


@given(odd_texts)
@settings(max_examples=800, deadline=None)
def test_it_finds_what_nltk_finds(finder, nltk, document):
    same(finder, nltk, document)


def test_two_modules_of_nltk_alone_find_the_same(tmp_path):
    """Without its others, and what these import; a program that imports NLTK afterwards gets it whole."""
    tokenizer = WordTokenizer.train(TextSettings(tokenizer="word_tokenize"), TEXT)
    tokenizer.save(tmp_path / "text.json")
    code = """if True:
        import json, sys
        from pathlib import Path
        from lmdist.text.tokenizer import WordTokenizer, train_punkt
        folder, *texts = sys.argv[1:]
        tokenizer = WordTokenizer.load(Path(folder, "text.json"))
        found = [[*map(tokenizer.tokenize, texts)], train_punkt(texts)]
        assert not {"nltk", "scipy"} & {*sys.modules}
        import nltk
        assert nltk.tokenize.punkt.PunktSentenceTokenizer and nltk.tokenize.destructive is not None
        assert found[0] == [*map(tokenizer.tokenize, texts)]
        print(json.dumps(found))"""
    texts = [*TEXT, " ".join(TOKENS).replace("\0", "")]
    done = subprocess.run([sys.executable, "-c", code, tmp_path, *texts], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[*map(tokenizer.tokenize, texts)], train_punkt(texts)]


def test_what_it_has_kept_is_forgotten_in_time(finder, nltk, monkeypatch):
    monkeypatch.setattr(words, "MAX_CACHED", 3)
    monkeypatch.setattr(words, "MAX_CHARACTERS", 6)
    small = WordFinder(finder.punkt)
    for _ in range(2):
        same(small, nltk, f"{TEXT[0]} 'Twas so. {' '.join(TOKENS)}")
    assert small.inner
    assert all(len(kept) <= 3 for kept in (small.breaks, small.inner, small.first, small.last, small.uncut))


def test_another_nltk_finds_all_the_words_itself(finder, nltk, monkeypatch):
    monkeypatch.setattr(words, "RULES", ["2", "0"])
    other = WordFinder(finder.punkt)
    same(other, nltk, TEXT[0])
    assert not other.inner


def test_a_text_without_marks_is_one_sentence(nltk):
    _, find_words = nltk
    for document in ("", " \n", "the man\nwho cannot\t gonna “go” \n", "no “mark’ s wanna"):
        assert WordFinder(None)(document) == find_words(document)


def test_blanks_are_what_it_takes_them_for():
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    blanks = [character for character in every if character.isspace()]
    assert [blank for blank in blanks if blank.isprintable()] == [" "]
    assert [blank for blank in blanks if not words.SEPARATOR.match(blank)] == regex.findall(r"\s", every)


def test_ordinary_text_needs_no_import_of_nltk():
    program = (
        "import sys; from lmdist.text.words import WordFinder; "
        "find = WordFinder({'abbreviations': ['mr'], 'collocations': [], 'sentence_starters': [], 'contexts': {}}); "
        "print(find('\"Well,\" said the man (he didn\\'t know), \"it\\'s 1,000 years. Is it so?\" He left.')); "
        "assert 'lmdist.text.light_nltk' not in sys.modules; "
        "assert find('Mr. Smith')[0] == 'Mr.' and 'lmdist.text.light_nltk' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    expected = "`` Well , '' said the man ( he did n't know ) , `` it 's 1,000 years . Is it so ? '' He left ."
    assert done.stdout.strip() == str(expected.split())


def real_texts() -> Iterator[str]:
    """Some of the documents of real corpora; NLTK takes minutes for all."""
    csv.field_size_limit(1 << 27)
    for name, column, step in (
        ("bbc-news/bbc_test.csv", "text", 4),
        ("news-sample/news_sample.csv", "content", 5),
        ("news-sample/hhs_press_releases_2019.csv", "", 5),
    ):
        with (DATA / name).open(encoding="utf-8", newline="") as file:
            for row in list(csv.DictReader(file))[::step]:
                yield row.get(column) or max((text or "" for text in row.values()), key=len)
    yield from (DATA / "wikitext-2" / "wiki.test.tokens").read_text(encoding="utf-8").split("\n")[::12]


def test_it_finds_what_nltk_finds_in_real_text(nltk, finder):
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not here")
    for document in real_texts():
        same(finder, nltk, document)


@given(st.lists(odd_texts, min_size=1, max_size=5), st.sampled_from(["", *TEXT[:1]]))
@settings(max_examples=40, deadline=None)
def test_punkt_learns_what_nltk_learns(texts, regular):
    from nltk.tokenize.punkt import PunktTrainer

    class InOrder(PunktTrainer):
        def _unique_types(self, tokens: Any) -> Any:
            return sorted(super()._unique_types(tokens))

    texts = [f"{text} {regular}" for text in texts]
    trainer = InOrder()
    trainer.train("\n\n".join(texts), finalize=False)
    expected = trainer.get_params()
    found = train_punkt(texts)
    assert {*found["abbreviations"]} == {*expected.abbrev_types, *ABBREVIATIONS}
    assert [*map(tuple, found["collocations"])] == sorted(expected.collocations)
    assert found["sentence_starters"] == sorted(expected.sent_starters)
    assert found["contexts"] == dict(expected.ortho_context)
