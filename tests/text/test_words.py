"""words.py against NLTK itself: token for token, on adversarial texts and on real ones."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdist.text import words
from lmdist.text.tokenizer import train_punkt
from lmdist.text.words import WordFinder, punkt_parameters

DATA = Path(os.environ.get("LMDIST_DATA", Path(__file__).parents[3] / "shared" / "data"))

# Enough for Punkt to learn words that begin sentences, collocations and abbreviations.
TEXT = [
    "Mr. Smith went to Washington, D.C., on Jan. 5 of that year. He didn't say much. The chairman, Dr. J. Jones, did. "
    "No. 5 lost to No. 7 in the U.S. Open. the men of St. Mary's said so. Sen. A. Brown agreed. But he left. It rained."
] * 50

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


BLANKS = [
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1f",
    "\x85",
    "\xa0",
    "\u2003",
    "\u2028",
    "\u3000",
    "",
]
MARKS = list(".?!,:;'\"`´‘’‚“”„«»‹›()[]{}<>-‐–—―…*&%$#@£€/\\|~^_=+")
LETTERS = [
    *"aAbdDeiIlLmMnNrRsSTtvVyY019",
    "İ",
    "ı",
    "ſ",
    "K",
    "é",
    "ß",
    "Σ",
    "e\u0301",
    "٣",
    "²",
    "日",
    "。",
    "😀",
    "\u200d",
    "\0",
    "\ufeff",
]
TOKENS = """
    a x go Go word Word. I A. J. Mr. Mr U.S. D.C. No. St. Jan. Jan i.e. 5 5. 5, 1,000 10:30 3.14 -5 2016. 5th 10% $5 #1 @me
    the The he He. But But. however Smith Jones Mary's 5's U.S.'s cannot Cannot, (gonna) wanna gotta lemme gimme d'ye more'n
    'tis 'twas wannabe can not don't Don't, can't. it's It’s boys' boys'. 'em 's 'S n't N'T we'll WE'LL they've I'm I'd
    rock'n'roll 'quoted' "quoted" “quoted” ‘quoted’ "quoted." "quoted". “quoted.” (so.) (so). so.) [sic] a.b a,b a:b ,a :a a: a,
    a,, a:, a,: "a "" '' ``a'' `a' a" a' a'' "' '" ." .' .) .” ?" ! ? ?! !! ... .. . .. .... ….. a... a… -- --- - a--b a-b a—b
    .-- ."-- )-- ( ) " ' ’ ” “ ‘ (" ["a <"a {''a ("a") a. a? a! a?" a!) a.' a.'' a.]} e.g., etc.) etc.). etc., a.”) x's's x's'
    x'S. <unk> http://a.b/c?d=e&f#g a@b.c .5 ,5 5,a 5:a #### ** *a* a;b R&B
""".split()

# Such as Punkt may learn from a text that is no text.
STRANGE = {
    "abbreviations": ["mr", "go", "x", "“a", "”", "’", "'", "5", "a)", "e", "é", "u.s", "word", "quoted", "5th", "b", "-"],
    "collocations": [[".", "a"], ["go", "he"], ["##number##", "the"], ["word", "but"], ["?", "a"], ['"', "he"], ["i", "jones"]],
    "sentence_starters": ["he", "but", "the", "x", "a"],
    "contexts": {word: 2 + 20 * number for number, word in enumerate(["a", "go", "word", "he", "but", "5"])},
}


def text_of(parts: list[str], longest: int) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(parts), max_size=longest).map("".join)


chunk = st.one_of(st.sampled_from(TOKENS), text_of(MARKS + LETTERS, 6))
chunks = st.lists(st.tuples(chunk, st.sampled_from([" "] * 20 + BLANKS)).map("".join), max_size=12).map("".join)
characters = text_of(BLANKS * 2 + MARKS * 2 + LETTERS, 30)
few_marks = text_of([*MARKS, *"asnt5.", *" " * 12], 12)


@given(st.one_of(chunks, characters, few_marks, st.text(max_size=30)))
@settings(max_examples=800, deadline=None)
def test_it_finds_what_nltk_finds(finder, nltk, document):
    same(finder, nltk, document)


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
        "assert 'nltk' not in sys.modules; "
        "assert find('Mr. Smith')[0] == 'Mr.' and 'nltk' in sys.modules"
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
