"""Line breaks as tokens: poems and dialogues keep their lines, in training, in a prompt and in what is generated."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from lmdist.errors import UsageError
from lmdist.settings import PrepareSettings, TextSettings
from lmdist.text.markup import lines_of_html
from lmdist.text.prepare import prepare
from lmdist.text.tokenizer import WordTokenizer
from lmdist.training.data import DataFolder

POEM = "Tyger Tyger, burning bright,\nIn the forests of the night;\r\n\n What immortal hand or eye\n"
NL = "<nl>"


@pytest.mark.parametrize("kind", ["word_tokenize", "wordpunct", "characters"])
def test_each_line_break_is_a_token_and_is_written_back(kind) -> None:
    tokenizer = WordTokenizer.train(TextSettings(kind, line_breaks=True), [POEM])
    words = tokenizer.tokenize(POEM)
    assert words.count(NL) == 3
    assert words[-1] != NL
    text = tokenizer.detokenize(words)
    assert text == "Tyger Tyger, burning bright,\nIn the forests of the night;\n\nWhat immortal hand or eye"
    assert tokenizer.tokenize("bright,\n", continues=True)[-1] == NL
    assert tokenizer.tokenize("\nIn", continues=True)[0] == NL
    assert tokenizer.tokenize(" \n ") == []
    assert NL not in WordTokenizer.train(TextSettings(kind), [POEM]).tokenize(POEM)
    assert NL not in tokenizer.tokenize("<nl>")


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ("<p>Roses<br>are\n   red</p>\n<p>x</p>", "Roses\nare red\nx"),
        ("<div><p>a <b>b</b></p>\n <ul>\n<li>c<LI>d</ul></div>e", "a b\nc\nd\ne"),
        ("a<br/> <br />b<br></p><p>c &lt;br&gt;", "a\n\nb\nc <br>"),
        ("x<pre>\n  if a:\n    b\n</pre>y", "x\n  if a:\n    b\ny"),
        ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</table>", "a b\nc"),
        ("one &amp; <i>two</i>\nthree", "one & two\nthree"),
        ("<script>a\n</script>b<br>c", "b\nc"),
    ],
)
def test_the_lines_of_html_are_those_that_a_browser_shows(document, text) -> None:
    lines = [line.split() for line in text.split("\n")]
    tokenizer = WordTokenizer(TextSettings("wordpunct", "html", line_breaks=True))
    assert tokenizer.tokenize(document) == tokenizer.tokenize(text.replace("<", "&lt;"))
    assert [line.split() for line in lines_of_html(document).strip("\n").split("\n")] == lines


@pytest.mark.parametrize("piece", ["<br>", "<pre>", "<br> ", "<p", "<br><pre></pre ", "\x1e "])
def test_html_that_never_closes_takes_no_longer_than_its_length(piece) -> None:
    began = time.perf_counter()
    lines_of_html(f"<p>{piece * 20_000}{' ' * 50_000}x")
    assert time.perf_counter() - began < 10


def test_a_line_is_tokenized_as_a_text(tmp_path: Path) -> None:
    settings = TextSettings(line_breaks=True)
    tokenizer = WordTokenizer.train(settings, [POEM])
    assert tokenizer.tokenize("They met Mr.\nHe said so.", continues=True)[:4] == ["They", "met", "Mr.", NL]
    tokenizer.save(tmp_path / "text.json")
    assert WordTokenizer.load(tmp_path / "text.json").settings == settings


def test_the_data_folder_has_them_and_others_have_no_new_key(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(f"{json.dumps({'text': f'{number} {POEM}'})}\n" for number in range(4)))
    asked = PrepareSettings(train=str(source), tokenizer="wordpunct", line_breaks=True)
    prepare(asked, tmp_path / "data")
    data = DataFolder(tmp_path / "data")
    assert data.vocabulary.words.index(NL) < 6
    assert data.meta["prepare"]["line_breaks"] is data.meta["text"]["line_breaks"] is True
    prepare(PrepareSettings(train=str(source), vocabulary=str(tmp_path / "data")), tmp_path / "same")
    assert (tmp_path / "same/train.bin").read_bytes() == (tmp_path / "data/train.bin").read_bytes()
    prepare(PrepareSettings(train=str(source), tokenizer="wordpunct"), tmp_path / "without")
    assert "line_breaks" not in (tmp_path / "without/meta.json").read_text() + (tmp_path / "without/text.json").read_text()
    with pytest.raises(UsageError, match=r"whitespace keeps line breaks: leave it out"):
        PrepareSettings(train=str(source), tokenizer="whitespace", line_breaks=True)
