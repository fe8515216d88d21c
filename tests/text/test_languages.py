"""Text of any language: marks stay with their letters, one spelling a word, spaces where the language writes them, HTML."""

import csv
import dataclasses
import json
import os
import re
import time
import unicodedata
from pathlib import Path
from typing import get_args

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdist.errors import DataError
from lmdist.settings import PrepareSettings, TextSettings, Tokenizer
from lmdist.text.detokenizer import SPACE
from lmdist.text.markup import text_of_html
from lmdist.text.prepare import prepare
from lmdist.text.tokenizer import LETTER, PLAIN, WORDPUNCT, WORDPUNCT_MARKS, WordTokenizer, cleaned, pattern
from lmdist.text.vocabulary import Vocabulary

CASES = Path(os.environ.get("LMDIST_DATA", Path(__file__).parents[3] / "shared" / "data")).parent / "cases"

WORDPUNCT_TOKENIZER = WordTokenizer(TextSettings("wordpunct"))
CHARACTERS = WordTokenizer(TextSettings("characters"))

# Words with marks: a script a line.
MARKED = """
    हिन्दी क्\u200dष অসমীয়া ਗੁਰਮੁਖੀ ગુજરાતી தமிழ் తెలుగు ಕನ್ನಡ മലയാളം සිංහල
    ที่นี่ ພາສາລາວ ខ្មែរ မြန်မာ བོད ꦗꦮ
    كِتَابٌ می\u200cخواهم שָׁלוֹם ܣܘܪܝܝܐ ދިވެހި
    e\u0301te\u0301 q\u0323\u0307 Tie\u0302\u0301ng и\u0306 ἀ\u0301
""".split()


# --- marks stay with their letters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("word", MARKED)
def test_a_word_with_marks_is_one_word(word):
    spelled = unicodedata.normalize("NFC", word)
    assert WORDPUNCT_TOKENIZER.tokenize(f"{word}, {word}!") == [spelled, ",", spelled, "!"]


def test_a_hindi_corpus_comes_back_as_it_was():
    if not CASES.is_dir():
        pytest.skip(f"{CASES} is not here")
    with (CASES / "hi.csv").open(encoding="utf-8", newline="") as file:
        for row in list(csv.DictReader(file))[:20]:
            assert WORDPUNCT_TOKENIZER.detokenize(WORDPUNCT_TOKENIZER.tokenize(row["content"])) == row["content"]


ANY_SCRIPT = st.lists(
    st.sampled_from(MARKED) | st.sampled_from([" ", ", ", "! ", " “", "” ", "'", "’"]) | st.text(max_size=4)
).map("".join)


@given(ANY_SCRIPT, st.sampled_from(["wordpunct", "characters"]))
@settings(max_examples=200, deadline=None)
def test_letters_keep_their_marks_in_every_script(text, tokenizer):
    splitter = WordTokenizer(TextSettings(tokenizer))
    again = splitter.detokenize(splitter.tokenize(text))
    spelled = regex.sub("[\u00ad\u061c\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]", "", text.replace("\u200b", " "))
    spelled = unicodedata.normalize("NFC", spelled.replace(SPACE, " ") if tokenizer == "characters" else spelled)
    # Nothing but spaces has changed, and none stands where a mark follows its letter.
    assert "".join(again.split()) == "".join(spelled.split())
    for word in regex.findall(r"[\p{L}\p{N}][\p{M}\u200c\u200d]+", spelled):
        assert word in again


@given(st.text(), st.sampled_from(get_args(Tokenizer)[1:4]))
def test_text_splits_alike_when_it_was_put_together_from_its_spellings(text, tokenizer):
    splitter = WordTokenizer(TextSettings(tokenizer))
    assert splitter.tokenize(unicodedata.normalize("NFD", text)) == splitter.tokenize(unicodedata.normalize("NFC", text))


def test_what_is_split_without_the_package_regex_is_split_alike():
    plain = [chr(code) for code in range(0x110000) if PLAIN.fullmatch(chr(code))]
    assert len(plain) > 800
    text = "".join(f"a{character}b {character} " for character in plain)
    assert text == unicodedata.normalize("NFC", text) == cleaned(f"{text}\u0300", TextSettings())[:-1]  # with a mark, not plain
    assert pattern(WORDPUNCT_MARKS).findall(text) == WORDPUNCT.findall(text)
    # Beyond these too, each letter of Python's is one.
    beyond = "".join(map(chr, [*range(0x300, 0xD800), *range(0xE000, 0x20000)]))
    assert set(pattern(f"[{LETTER}]").findall(beyond)) >= set(re.findall(r"\w", beyond))


# --- one spelling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["wordpunct", "characters"])
def test_what_looks_alike_is_one_word(tokenizer):
    splitter = WordTokenizer(TextSettings(tokenizer))
    assert splitter.tokenize("cafe\u0301 co\u00adop \u200fabc\ufeff \u212b") == splitter.tokenize("caf\u00e9 coop abc \u00c5")
    assert splitter.tokenize("one\u200btwo") == splitter.tokenize("one two")


def test_text_that_is_split_already_keeps_its_signs():
    assert WordTokenizer(TextSettings("whitespace")).tokenize("W \ufeff / e\u0301") == ["W", "\ufeff", "/", "é"]


def test_a_folder_from_before_is_split_as_it_was(tmp_path):
    (tmp_path / "text.json").write_text(
        json.dumps(
            {
                "format": "lmdist text",
                "version": 1,
                "settings": {"tokenizer": "wordpunct", "clean": "none", "lowercase": False},
                "nltk": "3.10.0",
                "punkt": None,
            }
        )
    )
    before = WordTokenizer.load(tmp_path / "text.json")
    assert before.tokenize("खोला। e\u0301t co\u00adop") == ["ख", "ो", "ल", "ा।", "e", "\u0301", "t", "co", "\u00ad", "op"]
    before.save(tmp_path / "again.json")
    assert WordTokenizer.load(tmp_path / "again.json").settings == before.settings
    assert WordTokenizer(TextSettings("wordpunct")).settings.rules == 2
    # Its marks are joined to their letters at least.
    assert before.detokenize(["ख", "ो", "ला", "।"]) == "खो ला।"


# --- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "last"),
    [
        ("They met Mr.", "Mr."),
        ("It was Dr.", "Dr."),
        ("In the U.S.", "U.S."),
        ("John F.", "F."),
        ("That is all.", "."),
        ("The", "The"),
    ],
)
@pytest.mark.parametrize("lowercase", [False, True])
def test_an_abbreviation_at_the_end_of_a_prompt_keeps_its_full_stop(prompt, last, lowercase):
    news = ["Mr. Smith met Dr. Jones in Washington. The U.S. economy grew. All of it is there. John left."] * 20
    tokenizer = WordTokenizer.train(TextSettings(lowercase=lowercase), news)
    assert tokenizer.tokenize(prompt, continues=True)[-1] == (last.lower() if lowercase else last)
    assert tokenizer.tokenize(prompt)[-1] == ("." if prompt.endswith(".") else last.lower() if lowercase else last)
    assert tokenizer.tokenize("", continues=True) == tokenizer.tokenize(" ", continues=True) == []


# --- back to text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "„Hallo“, sagte er. „Wie geht’s?“ Gut.",
        "»Hallo«, sagte er. »Ja.« Das kostet 5 € und mehr.",
        "Powiedział: „Nie”, i poszedł. „Tak!”",
        "Hon sade: ”Hej”, och gick. ”Nej”, sade han.",
        "C’est l’homme qu’il faut, d’accord? «Oui!» Aujourd’hui. C'est lui.",
        "Dell’anno, un’altra, c’è l’Italia.",
        "¿Qué tal? ¡Hola!, dijo.",
        "П’ять хвилин, м’яч: «так».",
        "ما هو السوق؟ نعم، هو كبير؛ حقا.",
        "नगर के मेयर ने पुल खोला। आज मौसम बहुत अच्छा है॥",
        "צה״ל ובית־ספר, שלום!",
        "ինչպե՞ս ես։ Լավ։",
        "他说：“好！”走了。《书》（一）",
        "“He said ‘yes’,” she said. “No.” (“Not so.”)",
        "O’Brien’s boys’ books cost $5, it’s said.",
    ],
)
def test_other_languages_are_joined_to_readable_text(text):
    assert WORDPUNCT_TOKENIZER.detokenize(WORDPUNCT_TOKENIZER.tokenize(text)) == text


@pytest.mark.parametrize("text", ["日本語。テスト iPhone 15", "ที่นี่ดีมาก", "The cat, isn't it? “Yes”", "हिन्दी में"])
def test_characters_lose_nothing(text):
    words = CHARACTERS.tokenize(f" {text}\n")
    assert CHARACTERS.detokenize(words) == text
    assert len(words) == len(regex.findall(r"\P{M}[\p{M}\u200c\u200d]*", text))


# --- HTML ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ("<p>Fish &amp; chips</p><p>th<b>re</b>e</p>", "Fish & chips three"),
        ("one<br/>two<BR>three<wbr>four", "one two threefour"),
        ('<a href="x>y" title=\'it"s\'>link</a>, <img alt="a > b">end', "link, end"),
        ("<p title='it's'>x</p>", "x"),
        ("a < b and 3 > 2, I <3 you, AT&T", "a < b and 3 > 2, I <3 you, AT&T"),
        ("&lt;b&gt; &#8217;s&nbsp;&eacute;&copy", "<b> ’s é©"),
        ("<script>var a = '<p>';</script >z<style>p {}", "z"),
        ("<!DOCTYPE html><!-- a <b> -->x<![foo bar]><?php y ?>z", "x z"),
        ("plain", "plain"),
    ],
)
def test_html_becomes_its_text(document, text):
    assert text_of_html(document).split() == text.split()
    words = WordTokenizer(TextSettings("wordpunct", "html")).tokenize(document)
    assert words == WORDPUNCT_TOKENIZER.tokenize(text)


def test_entities_are_decoded_before_words_are_spelled_and_abbreviations_learnt():
    assert WordTokenizer(TextSettings("wordpunct", "html")).tokenize("co&shy;op cafe&#769;") == ["coop", "café"]
    documents = ["<p>The xyz.&nbsp;council met the xyz.&nbsp;board.</p> <p>It was late.</p>"] * 60
    punkt = WordTokenizer.train(TextSettings(clean="html"), documents).punkt
    assert punkt
    assert "xyz" in punkt["abbreviations"]
    assert not any("<" in word or "&" in word for word in punkt["contexts"])


@pytest.mark.parametrize(
    "piece", ["<!--", "<a ", "</", "<!", "<a b='", '<a b="', "<script", "<script>", "<?", "&#", "<a = ", "<![CDATA["]
)
def test_html_that_never_closes_takes_no_longer_than_its_length(piece):
    began = time.perf_counter()
    text_of_html(piece * 20_000)
    assert time.perf_counter() - began < 10  # of 60 kB; html.parser needs minutes


# --- which setting suits a text ------------------------------------------------------------------------------------


def test_a_text_without_spaces_is_told_of_characters(tmp_path):
    clauses = ["".join(chr(0x4E00 + (7919 * (9 * row + column)) % 5000) for column in range(9)) for row in range(400)]
    text = [f"{''.join(f'{clause}，' for clause in clauses[row : row + 4])}" for row in range(0, 400, 4)]
    (tmp_path / "zh.txt").write_text("\n\n".join(text), encoding="utf-8")
    values = PrepareSettings(inputs=[str(tmp_path / "zh.txt")], tokenizer="word_tokenize")
    with pytest.raises(DataError, match=r"no word occurs 2 times in the text to train on: .* --tokenizer characters"):
        prepare(values, tmp_path / "out")
    prepare(dataclasses.replace(values, tokenizer="characters"), tmp_path / "out")
    words = Vocabulary.load(tmp_path / "out/vocab.txt").words
    assert words[2] == "，"
    assert set("".join(clauses)) >= set("".join(words[3:]))


def test_html_among_the_most_frequent_words_is_named(tmp_path, capsys):
    (tmp_path / "a.csv").write_text(
        "content\n" + "".join(f'"<p>No. {row} &amp; more</p>"\n' for row in range(60)), encoding="utf-8"
    )
    values = PrepareSettings(inputs=[str(tmp_path / "a.csv")], tokenizer="wordpunct")
    prepare(values, tmp_path / "out")
    assert (
        "note: this text seems to be HTML, whose tags are among its most frequent words; --clean html"
        in capsys.readouterr().err
    )
    prepare(dataclasses.replace(values, clean="html"), tmp_path / "out", overwrite=True)
    assert "note" not in capsys.readouterr().err
    assert {"No", ".", "&", "more"} <= set(Vocabulary.load(tmp_path / "out/vocab.txt").words)
    assert not {"<", ">", "p", "amp"} & set(Vocabulary.load(tmp_path / "out/vocab.txt").words)


# --- words, not letters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [Vocabulary(["<unk>", "<eos>", "the"]).encode, Vocabulary, WORDPUNCT_TOKENIZER.detokenize])
def test_a_text_in_place_of_its_words_is_an_error(call):
    with pytest.raises(TypeError, match=r"a list of words is expected, not the text 'the president': tokenize\(text\)"):
        call("the president")
