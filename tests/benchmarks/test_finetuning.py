"""benchmarks/finetuning.py: the small text is the beginning of a file, by rows of a CSV and by lines of other text."""

from __future__ import annotations

import csv

import finetuning


def test_a_text_is_cut_after_the_row_that_has_the_last_word(tmp_path):
    rows = [["content", "category"], ["one two\nthree", "a"], ['four, "five"', "b"], ["six", "c"]]
    with (tmp_path / "all.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    cut = finetuning.cut(tmp_path / "all.csv", 7, tmp_path / "cut.csv")
    with cut.open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == rows[:3]
    (tmp_path / "all.txt").write_text("one two\nthree\nfour\n")
    assert finetuning.cut(tmp_path / "all.txt", 3, tmp_path / "cut.txt").read_text() == "one two\nthree\n"
    assert finetuning.cut(tmp_path / "all.txt", 99, tmp_path / "cut.txt").read_text() == "one two\nthree\nfour\n"


def test_another_text_is_tokenized_as_the_base_s():
    settings = {"tokenizer": "wordpunct", "clean": "none", "lowercase": True, "rules": 2}
    assert finetuning.tokenizer_flags(settings) == ["--tokenizer=wordpunct", "--clean=none", "--lowercase"]
