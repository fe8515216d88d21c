"""Learn pieces from the words of the train split: byte-level BPE or a unigram model, by Hugging Face's `tokenizers`.

    count    a text is split into words: a run of letters with the space before it, digits, signs, whitespace, a line break
    merge    pieces are learned from the words of the train split and how often each stands there
             respell: a shard of words becomes one of pieces, and the token files are made of these

A piece never crosses the border of two words, so each distinct word is split into pieces once, and what is learned depends on
the counts alone: neither on the number of shards nor on who has counted them. Words are written in GPT-2's alphabet, a
character for each byte of UTF-8, and all 256 of it are pieces: every text has pieces, whatever its script.

Pieces are ordered by falling frequency in the train split, as words are. This module does not know how texts are read.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from lmdist.errors import DataError
from lmdist.text.pieces import BYTE_OF, Pieces, Saved, byte_level_tokenizer
from lmdist.text.shard_files import DOCUMENT, DOCUMENTS, TOKENS, WORDS, blocks, words_of_shard
from lmdist.text.vocabulary import END, UNKNOWN

MAX_CHARACTERS = 200_000_000
"""Of all words, each as often as it stands in the text. Of more they are counted in proportion, and rare ones in part."""
CHUNK_CHARACTERS = 1 << 20
SCORE_DIGITS = 4
"""Of a piece's log-probability in a unigram model."""
END_SIGNS = [sign for sign, byte in BYTE_OF.items() if byte in (0xC0, 0xC1) or byte > 0xF4]
"""The bytes that UTF-8 never has."""
BYTE_STEP = 0.0001
"""Between the scores of two bytes that no text has, by the trainer."""


def learn(kind: str, counts: Mapping[str, int], size: int) -> Saved:
    """Return a model of `size` pieces, `<unk>` and `<eos>` included, fewer where the words have no more.

    `counts` are those of `Corpus.counts`. Raises DataError where no word is in the train split.
    """
    frequencies = sorted((word, number) for word, number in counts.items() if number)
    if not frequencies:
        raise DataError("there is no text to train on, so no pieces are learned from it: take more text")
    model = trained_model(kind, frequencies, size - 2)
    return {"library": "tokenizers", "model": byte_level_tokenizer(by_frequency(model, frequencies))}


def trained_model(kind: str, frequencies: Sequence[tuple[str, int]], size: int) -> dict[str, Any]:
    """Return what a tokenizer.json has of a model with `size` pieces at most, trained on words and their counts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trainer: Any
    frequencies = in_proportion(frequencies)
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=[*BYTE_OF], show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        frequencies += [*with_ends(frequencies)]
        more = size // 10 + len(BYTE_OF)  # of which some have an END_SIGN
        trainer = trainers.UnigramTrainer(vocab_size=size + more, initial_alphabet=[*BYTE_OF], show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # GPT-2's alphabet has no whitespace
    tokenizer.train_from_iterator(repeated(frequencies), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model if kind == "bpe" else finished_unigram(model, size)


def with_ends(frequencies: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Yield each word once with an END_SIGN behind it.

    The trainer's first candidates are what two different characters follow somewhere in its list of distinct words. The end of
    a word is no character to it, so "that" would be no piece unless other words begin with it.
    """
    for word, _ in frequencies:
        yield word + END_SIGNS[len(word) % len(END_SIGNS)], 1


def repeated(frequencies: Iterable[tuple[str, int]]) -> Iterator[str]:
    """Yield texts with each word as often as it was counted: the trainers take texts only."""
    for word, number in frequencies:
        while number > 0:
            some = min(number, max(1, CHUNK_CHARACTERS // len(word)))
            yield f"{word} " * some
            number -= some


def in_proportion(frequencies: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return the words that are left, and their counts, of about MAX_CHARACTERS.

    A count's share is rounded up or down by a hash of the word, so that on the average it stays: of words that occur once,
    as most clauses of a script without spaces do, a part is left rather than none.
    """
    total = sum((len(word) + 1) * number for word, number in frequencies)
    share = min(1.0, MAX_CHARACTERS / total)
    if share == 1:
        return [*frequencies]
    return [(word, left) for word, number in frequencies if (left := int(number * share + crc32(word.encode()) / 2**32))]


def by_frequency(model: dict[str, Any], frequencies: Iterable[tuple[str, int]]) -> dict[str, Any]:
    """Return a model with its pieces by falling frequency in the words, behind `<unk>` and `<eos>`."""
    split = splitter(byte_level_tokenizer(model))
    counts: Counter[str] = Counter()
    for word, number in frequencies:
        for piece in split(word):
            counts[piece] += number
    names = sorted(dict(model["vocab"]), key=lambda name: (-counts[name], name))
    if model["type"] == "BPE":
        return model | {"vocab": {name: token for token, name in enumerate([UNKNOWN, END, *names])}}
    scores = dict(model["vocab"])
    lowest = min(scores.values())  # no word has both letters and signs, so neither mark is ever found
    return model | {"unk_id": None, "vocab": [[UNKNOWN, lowest], [END, lowest], *([name, scores[name]] for name in names)]}


def finished_unigram(model: dict[str, Any], size: int) -> dict[str, Any]:
    """Return a unigram model with the `size` best pieces, whose scores are the same in each process.

    The trainer adds up in an order that differs (the last digits), and so does the order of the bytes that no text has, to
    which it gives scores one after the other above the lowest.
    """
    scores = {name: round(score, SCORE_DIGITS) for name, score in model["vocab"]}
    lowest = min(scores.values())
    limit = lowest + len(BYTE_OF) * BYTE_STEP
    signs = {name: lowest if score <= limit else score for name, score in scores.items() if len(name) == 1}
    pieces = {name: score for name, score in scores.items() if len(name) > 1 and not set(END_SIGNS) & set(name)}
    best = sorted(pieces, key=lambda name: (-pieces[name], name))[: size - len(signs)]
    return model | {"vocab": [*signs.items(), *((name, pieces[name]) for name in best)]}


def splitter(tokenizer_json: dict[str, Any]) -> Callable[[str], list[str]]:
    """Return the function from a word in GPT-2's alphabet to its pieces in it."""
    from tokenizers import Tokenizer

    model = Tokenizer.from_str(json.dumps(tokenizer_json)).model
    return lambda word: [token.value for token in model.tokenize(word)]


def respell(shard: Path, target: Path, saved: Saved) -> None:
    """Write the empty folder of a shard of pieces from that of a shard of words in GPT-2's alphabet.

    Its temporary ids are those of the model's own pieces, in order of first occurrence.
    """
    pieces = Pieces(saved)
    spelling = dict(zip(pieces.entries.names, pieces.words, strict=True))
    assert isinstance(saved["model"], dict)
    split = splitter(saved["model"])
    ids: dict[str, int] = {}
    num_pieces, of_words = array("q"), array("I")  # of each word, and the ids of all one after the other
    for word in words_of_shard(shard):
        before = len(of_words)
        of_words.extend(ids.setdefault(piece, len(ids)) for piece in split(word))
        num_pieces.append(len(of_words) - before)
    lengths, flat = np.array(num_pieces), np.array(of_words)
    starts = np.cumsum(lengths) - lengths
    documents = np.fromfile(shard / DOCUMENTS, DOCUMENT)
    with (target / TOKENS).open("wb") as file:
        for some, num_words, tokens in blocks(shard):
            each = lengths[tokens]
            ends = np.cumsum(each)
            # The places in `flat` of the pieces of each word: one after the other from where the word's begin.
            places = np.arange(each.sum()) + np.repeat(starts[tokens] - (ends - each), each)
            file.write(flat[places].astype("<u4").tobytes())
            before = np.concatenate([[0], ends])
            stops = np.cumsum(num_words)
            found = before[stops] - before[stops - num_words]
            rows = documents[some]
            rows["length"] = np.where(rows["length"] > 0, found, rows["length"])
    documents.tofile(target / DOCUMENTS)
    (target / WORDS).write_text("".join(f"{spelling[piece]}\n" for piece in ids), encoding="utf-8", newline="\n")
