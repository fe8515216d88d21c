"""How likely a model finds text: word by word, and which words it expects next.

    scorer = Scorer(Sampler(Bundle.load(Path("bundle"))))
    for score in scorer.score(["the cat is here .", "we said it ."]):
        score.log_probability, score.words, score.unknown

Sentences are read side by side, a column of words at a time, and what several of them begin with is read once. Of the lists
of hypotheses that recognisers and translators make, most is such a beginning. In order of their words:

    the  cat  sat  .     <eos>
               is  here  .     <eos>      goes on from the state after "the cat" above it
    we   said  it  .     <eos>            from the state after <eos>, with which every text begins

So no place is read in vain, as padded ones would be. This module does not know files, nor how a score is printed.

Shapes: B rows, T words, V vocabulary, S the sum of the layers' sizes.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
from numpy.typing import NDArray

from lmdist.errors import DataError, UsageError
from lmdist.perplexity import perplexity
from lmdist.text.vocabulary import END, END_ID, UNKNOWN_ID
from lmdist_export.sampling.sampler import Sampler, log_softmax
from lmdist_export.sampling.state import ModelState

BATCH_SIZE = 256  # as many rows as keep a core's arithmetic busy also where half of them are read already
TOPS = (1, 3, 5)  # a keyboard shows three words, or five


@dataclass(frozen=True, eq=False)
class SentenceScore:
    """A sentence with the log-probability of each of its words."""

    text: str
    words: list[str]
    """As the tokenizer finds them; the last is the `<eos>` that ends the sentence, where it is scored."""
    unknown: NDArray[np.bool_]
    """Of each word, whether it is not in the vocabulary, and scored as `<unk>`: (T,)."""
    log_probabilities: NDArray[np.float32]
    """Of each word, in nats: (T,)."""
    bytes: int
    """Of the text in UTF-8, and one for the line break that `<eos>` stands for, where it is scored."""

    @property
    def log_probability(self) -> float:
        """Of the whole sentence, in nats."""
        return float(self.log_probabilities.sum(dtype=np.float64))

    @property
    def known_log_probability(self) -> float:
        """The same without the unknown words."""
        return float(self.log_probabilities[~self.unknown].sum(dtype=np.float64))


class Scorer:
    """A bundle that scores text."""

    def __init__(self, sampler: Sampler, *, end: bool = True, carry_state: bool = False, batch_size: int = BATCH_SIZE) -> None:
        """Read `batch_size` sentences side by side; with `end` the `<eos>` after each is scored too.

        With `carry_state` a sentence begins where the one before ended, as in training, and not from the state zero.
        Raises UsageError where that contradicts itself.
        """
        if batch_size < 1:
            raise UsageError(f"the batch size is {batch_size}; it must be at least 1")
        if carry_state and not end:
            raise UsageError("a state that is carried on has read the <eos> between two sentences: it cannot be left out")
        self.sampler = sampler
        self.end = end
        self.carry_state = carry_state
        self.batch_size = batch_size

    def encode(self, sentence: str) -> tuple[list[str], list[int]]:
        """The words that are scored, and their ids."""
        words = self.sampler.bundle.tokenizer.tokenize(sentence) if sentence else []
        if self.end:
            words.append(END)
        return words, self.sampler.bundle.vocabulary.encode(words)

    def score(self, sentences: Iterable[str]) -> Iterator[SentenceScore]:
        """The score of each sentence, in their order; no more than a batch of them is held at a time."""
        coming = iter(sentences)
        state = self.sampler.initial_state(1)
        while batch := list(islice(coming, self.batch_size)):
            encoded = [self.encode(sentence) for sentence in batch]
            texts = [ids for _, ids in encoded]
            if self.carry_state:
                scores, state = one_after_another(self.sampler, texts, state)
            else:
                scores = side_by_side(self.sampler, texts)
            for sentence, (words, ids), log_probabilities in zip(batch, encoded, scores, strict=True):
                unknown = np.array(ids, np.int64) == UNKNOWN_ID
                yield SentenceScore(sentence, words, unknown, log_probabilities, len(sentence.encode()) + self.end)

    def next_words(self, text: str, count: int) -> list[tuple[str, float]]:
        """The `count` likeliest words after `text`, never `<unk>`, and the probability that the model gives to each."""
        words = self.sampler.bundle.tokenizer.tokenize(text) if text else []
        vocabulary = self.sampler.bundle.vocabulary
        logits, _ = self.sampler.prefill([END_ID, *vocabulary.encode(words)])
        best = likeliest(logits[0], count)
        return list(zip(vocabulary.decode(best), np.exp(log_softmax(logits[0])[best]).tolist(), strict=True))

    def predict(self, sentences: Iterable[str]) -> Predictions:
        """Read sentences as a keyboard does, word by word, and see how often the next one is among the likeliest."""
        step = self.sampler.step
        beginning = self.sampler.initial_state(1)
        step(np.array([[END_ID]]), beginning)  # the first run of a session takes longer than any after it
        found, state = Predictions(), beginning
        for sentence in sentences:
            _, ids = self.encode(sentence)
            found.sentences += 1
            if not self.carry_state:
                state = beginning
            for before, word in pairwise([END_ID, *ids]):
                began = time.perf_counter()
                logits, state = step(np.array([[before]]), state)
                best = likeliest(logits[0, 0], max(TOPS))
                found.seconds.append(time.perf_counter() - began)
                found.unknown += word == UNKNOWN_ID
                if word in best:
                    found.places[int(np.flatnonzero(best == word)[0])] += 1
        return found


# --- reading -------------------------------------------------------------------------------------------------------


def side_by_side(sampler: Sampler, texts: Sequence[list[int]]) -> list[NDArray[np.float32]]:
    """The log-probabilities of the words of each text, every text from its beginning, after `<eos>`, on."""
    order = sorted(range(len(texts)), key=texts.__getitem__)
    rows = [texts[index] for index in order]
    lengths = np.array([len(row) for row in rows])
    # How many words a row has in common with the one above it: those are not read again.
    shared = np.array([0, *(common(above, row) for above, row in pairwise(rows))])
    found = [np.empty(length, np.float32) for length in lengths]

    logits, (h, c) = sampler.prefill([END_ID])
    first = log_softmax(logits[0])  # (V,)
    for row, scores in zip(rows, found, strict=True):
        scores[:1] = first[row[:1]]
    above = np.array([0])
    # Which rows are read changes where one begins to differ from that above it, and where one ends.
    places = np.union1d(shared, lengths)
    for start, stop in pairwise([1, *places[places > 1].tolist()]):
        reading = np.flatnonzero((shared <= start) & (lengths > start))
        # A row that was not read before goes on from the nearest above it that was: the words are the same so far.
        from_row = np.searchsorted(above, reading, side="right") - 1
        words = np.array([rows[index][start - 1 : stop] for index in reading], np.int64)
        scores, (h, c) = sampler.score(words[:, :-1], words[:, 1:], (h[from_row], c[from_row]))  # (B, T), (B, S) each
        for index, piece in zip(reading, scores, strict=True):
            found[index][start:stop] = piece
        above = reading
    for index in range(1, len(rows)):
        found[index][: shared[index]] = found[index - 1][: shared[index]]

    in_order = dict(zip(order, found, strict=True))
    return [in_order[index] for index in range(len(texts))]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many words two texts begin with that are the same."""
    differing = (place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differing, min(len(one), len(other)))


def one_after_another(
    sampler: Sampler, texts: Sequence[list[int]], state: ModelState
) -> tuple[list[NDArray[np.float32]], ModelState]:
    """The log-probabilities of the words of each text, all of them one stream from `state` on; and the state after it.

    What stands before the stream is `<eos>`, and each text ends with it.
    """
    words = np.array([END_ID, *(word for text in texts for word in text)], np.int64)[None]  # (1, T + 1)
    scores, state = sampler.score(words[:, :-1], words[:, 1:], state)
    ends = np.cumsum([len(text) for text in texts])
    return np.split(scores[0], ends[:-1]), state


def likeliest(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The ids of the `count` likeliest words by logits (V,), the best first, never `<unk>`; fewer where there are no more."""
    words = -logits
    words[UNKNOWN_ID] = np.inf
    count = min(count, len(words) - 1)
    best = np.sort(np.argpartition(words, count - 1)[:count])
    return best[np.argsort(words[best], kind="stable")]


# --- sums ----------------------------------------------------------------------------------------------------------


class Totals:
    """What the scores of many sentences come to: sums and counts, divided once, at the end."""

    def __init__(self) -> None:
        self.sentences = self.words = self.unknown = self.bytes = self.unknown_bytes = 0
        self.nats = self.known_nats = 0.0

    def add(self, score: SentenceScore) -> None:
        """Add a sentence."""
        unknown = [word for word, is_unknown in zip(score.words, score.unknown, strict=True) if is_unknown]
        self.sentences += 1
        self.words += len(score.words)
        self.unknown += len(unknown)
        self.bytes += score.bytes
        self.unknown_bytes += sum(len(word.encode()) for word in unknown)
        self.nats -= score.log_probability
        self.known_nats -= score.known_log_probability

    def figures(self) -> dict[str, int | float | None]:
        """Counts, rates and perplexities by name; None where nothing is left to divide by. Raises DataError for no words."""
        if not self.words:
            raise DataError("there are no words to score; at least one line is expected")
        known_words, known_bytes = self.words - self.unknown, self.bytes - self.unknown_bytes
        return {
            "sentences": self.sentences,
            "words": self.words,
            "unknown_words": self.unknown,
            "unknown_rate": self.unknown / self.words,
            "bytes": self.bytes,
            "log_probability": -self.nats,
            "log_probability_without_unknown": -self.known_nats,
            "perplexity": perplexity(self.nats / self.words),
            "perplexity_without_unknown": perplexity(self.known_nats / known_words) if known_words else None,
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "perplexity_per_byte": perplexity(self.nats / self.bytes),
            "perplexity_per_byte_without_unknown": perplexity(self.known_nats / known_bytes) if known_bytes > 0 else None,
        }


class Predictions:
    """How often the next word was among the likeliest, and how long it took to know them."""

    def __init__(self) -> None:
        self.sentences = self.unknown = 0
        self.places = [0] * max(TOPS)
        """How often the next word was the likeliest, the second, and so on."""
        self.seconds = array("d")
        """Of each word: to read the one before it, and to find the likeliest."""

    def figures(self) -> dict[str, int | float]:
        """Counts, shares of the words, and percentiles by name. Raises DataError for no words."""
        words = len(self.seconds)
        if not words:
            raise DataError("there are no words to predict; at least one line is expected")
        p50, p95, p99 = (1000 * np.percentile(self.seconds, (50, 95, 99))).tolist()
        return {
            "sentences": self.sentences,
            "words": words,
            "unknown_words": self.unknown,
            "unknown_rate": self.unknown / words,
            **{f"top_{top}_accuracy": sum(self.places[:top]) / words for top in TOPS},
            "latency_p50_ms": p50,
            "latency_p95_ms": p95,
            "latency_p99_ms": p99,
        }
