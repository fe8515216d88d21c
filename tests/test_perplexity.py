"""Perplexity per word and bits per byte: what is counted of a text, and what the figures are."""

from __future__ import annotations

import math

import pytest

from lmdist.perplexity import TextSize, per_word_and_byte


@pytest.mark.parametrize(
    ("text", "words", "size"),
    [
        ("", 0, 0),
        ("the cat.", 2, 8),
        (" the\tcat \n\n said ", 3, 17),
        ("größe und maß", 3, 16),
        ("12\u00a0000\u3000ok", 3, 12),  # Unicode's spaces separate words too
        ("猫が好き", 1, 12),
        ("👍🏽", 1, 8),
    ],
)
def test_words_and_bytes_of_a_text(text, words, size):
    assert TextSize.of(text, ends=0) == (words, size)
    assert TextSize.of(text) == (words + 1, size + 1)
    assert TextSize.of(text).plus(TextSize.of("a b")) == (words + 1 + 3, size + 1 + 4)


def test_figures():
    assert per_word_and_byte(12.0, TextSize(4, 24)) == {
        "perplexity_per_word": pytest.approx(math.exp(3)),
        "bits_per_byte": pytest.approx(0.5 / math.log(2)),
    }
    assert per_word_and_byte(12.0, None) == {}
    assert per_word_and_byte(2000.0, TextSize(2, 900)).keys() == {"bits_per_byte"}, "one word of 600 characters"
    assert per_word_and_byte(1.0, TextSize(0, 3)).keys() == {"bits_per_byte"}, "spaces without an end"
    assert per_word_and_byte(math.nan, TextSize(2, 3)) == {}


def test_the_size_of_a_split_is_in_its_facts_or_unknown():
    assert TextSize.read({"tokens": 9, **TextSize(7, 30).as_figures()}) == (7, 30)
    assert TextSize.read({"tokens": 9}) is None
