"""Log-probabilities of text, word by word, and the most likely next words.

    scorer = Scorer(Sampler(Bundle.load("bundle")))
    for score in scorer.score(["the cat is here .", "we said it ."]):
        score.log_probability, score.tokens, score.unknown

Sentences are scored in batches, a column of tokens at a time, and a prefix that several of them have is read once. The n-best
lists of speech recognizers and translators consist mostly of such prefixes. Sorted by their tokens:

    the  cat  sat  .     <eos>
               is  here  .     <eos>      continues the state after "the cat" above it
    we   said  it  .     <eos>            continues the state after <eos>, with which every text begins

There is no padding to read. This module does not read files, and does not print scores.

Shapes: B rows, T tokens, V vocabulary, S the sum of the layers' sizes.
"""

from __future__ import annotations

import math
import reprlib
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmdist.cache_settings import NeuralCache
from lmdist.errors import DataError, UsageError
from lmdist.perplexity import TextSize, per_word_and_byte, perplexity
from lmdist.text.vocabulary import END, END_ID, UNKNOWN_ID
from lmdist_export.options import BATCH_SIZES, check_count, items_of
from lmdist_export.sampling.prompt import Prompt, prompt_of
from lmdist_export.sampling.sampler import Sampler, log_softmax
from lmdist_export.sampling.state import ModelState, select

BATCH_SIZE = 256  # enough rows for fast matrix multiplication also where half of the prefixes are shared
TOPS = (1, 3, 5)  # a keyboard suggests three words, or five


class TokenScore(NamedTuple):
    """A token and how likely it is after those before it."""

    token: str
    log_probability: float
    """In nats; divided by 2.3026 it is KenLM's log10."""
    unknown: bool
    """Whether the vocabulary does not have the token: what is scored is then `<unk>`."""


@dataclass(frozen=True, eq=False)
class Score:
    """A text and the log-probability of each of its tokens."""

    text: str
    tokens: list[str]
    """As tokenized; the last is the `<eos>` that ends the sentence, where it is scored."""
    unknown: NDArray[np.bool_]
    """(T,): whether a token is not in the vocabulary, and scored as `<unk>`."""
    log_probabilities: NDArray[np.float32]
    """(T,), in nats."""
    bytes: int
    """The bytes of the text in UTF-8, and one for the line break in place of `<eos>`, where it is scored."""
    original_words: int
    """The words of the text between whitespace, however it is tokenized, and one for `<eos>`, where it is scored."""

    def __repr__(self) -> str:
        return (
            f"Score({reprlib.repr(self.text)}, log_probability={self.log_probability:.4f}, perplexity={self.perplexity:.2f}, "
            f"tokens={len(self.tokens)}, unknown={int(self.unknown.sum())})"
        )

    @property
    def per_token(self) -> list[TokenScore]:
        """Return each token with its log-probability in nats and whether it is unknown, as KenLM's `full_scores` does."""
        return list(map(TokenScore, self.tokens, self.log_probabilities.tolist(), self.unknown.tolist()))

    @property
    def perplexity(self) -> float:
        """Return the perplexity per token; NaN where there is none to score."""
        return perplexity(-self.log_probability / len(self.tokens)) if self.tokens else math.nan

    @property
    def size(self) -> TextSize:
        """Return the size of the original text, by which models of different tokenizers compare."""
        return TextSize(self.original_words, self.bytes)

    @property
    def perplexity_per_word(self) -> float:
        """Return the perplexity per word of the original text; NaN where there is none, or it is beyond a float."""
        return per_word_and_byte(-self.log_probability, self.size).get("perplexity_per_word", math.nan)

    @property
    def bits_per_byte(self) -> float:
        """Return the bits per byte of the original text; NaN where there is none."""
        return per_word_and_byte(-self.log_probability, self.size).get("bits_per_byte", math.nan)

    @property
    def log_probability(self) -> float:
        """Return the log-probability of the sentence, in nats."""
        return float(self.log_probabilities.sum(dtype=np.float64))

    @property
    def known_log_probability(self) -> float:
        """Return the log-probability without the unknown words, in nats."""
        return float(self.log_probabilities[~self.unknown].sum(dtype=np.float64))


class Scorer:
    """A bundle that scores text."""

    def __init__(
        self,
        sampler: Sampler,
        *,
        end: bool = True,
        carry_state: bool = False,
        batch_size: int = BATCH_SIZE,
        cache: NeuralCache | None = None,
    ) -> None:
        """Score `batch_size` sentences at a time; with `end` the `<eos>` after each is scored too.

        With `carry_state` a sentence continues the state of the one before, as in the text that was trained on: there a line
        without a word is no document, unless the tokenizer reads line by line. The neural `cache`, as
        `sampler.cache`, remembers what the state has read. Raises UsageError for options that exclude each other.
        """
        check_count("batch_size", batch_size, BATCH_SIZES)
        if carry_state and not end:
            raise UsageError("a carried state has read the <eos> between two sentences: it cannot be left out")
        self.sampler = sampler
        self.end = end
        self.carry_state = carry_state
        self.batch_size = batch_size
        self.cache = cache

    def encode(self, sentence: str) -> tuple[list[str], list[int]]:
        """Return the words that are scored, and their ids."""
        tokenizer = self.sampler.bundle.tokenizer
        words = tokenizer.tokenize(sentence) if sentence else []
        if self.end and (words or not self.carry_state or tokenizer.settings.line_by_line):
            words.append(END)
        return words, self.sampler.bundle.vocabulary.encode(words)

    def score(self, sentences: Iterable[str]) -> Iterator[Score]:
        """Yield the score of each sentence, in their order; no more than a batch of them is held at a time.

        Raises UsageError for a single string.
        """
        return self.score_in_batches(items_of("the sentences", sentences))

    def score_in_batches(self, coming: Iterator[str]) -> Iterator[Score]:
        """Do so; being a generator, it begins with the first score."""
        state = self.sampler.initial_state(1, cached=self.cache is not None)
        for batch in batches(coming, self.batch_size):
            encoded = [self.encode(sentence) for sentence in batch]
            texts = [ids for _, ids in encoded]
            if self.carry_state:
                scores, state = score_stream(self.sampler, texts, state, self.cache)
            else:
                scores = score_batch(self.sampler, texts, self.cache)
            for sentence, (words, ids), log_probabilities in zip(batch, encoded, scores, strict=True):
                unknown = np.array(ids, np.int64) == UNKNOWN_ID
                # A line that a carried state passes over is no document, and so no text, as in a data folder.
                passed = self.carry_state and not words
                size = TextSize(0, 0) if passed else TextSize.of(sentence, ends=int(self.end))
                yield Score(sentence, words, unknown, log_probabilities, bytes=size.bytes, original_words=size.words)

    def next_words(self, text: str | Prompt, count: int) -> list[tuple[str, float]]:
        """Return the `count` most likely words after a text, never `<unk>`, each with its probability."""
        bundle = self.sampler.bundle
        prompt = text if isinstance(text, Prompt) else prompt_of(bundle, text)
        logits, _ = self.sampler.next_logits(prompt.start(self.sampler, END_ID, cached=self.cache is not None), self.cache)
        best = most_likely(logits[0], count)
        return list(zip(bundle.vocabulary.decode(best), np.exp(log_softmax(logits[0])[best]).tolist(), strict=True))

    def predict(self, sentences: Iterable[str]) -> Predictions:
        """Predict each word of sentences from those before it, one call a word, as a keyboard does."""
        sentences = items_of("the sentences", sentences)
        beginning = self.sampler.initial_state(1, cached=self.cache is not None)
        self.step(END_ID, beginning)  # the first call of a session takes longer than any after it
        found, state = Predictions(), beginning
        for sentence in sentences:
            _, ids = self.encode(sentence)
            found.sentences += 1
            if not self.carry_state:
                state = beginning
            for before, token in pairwise([END_ID, *ids]):
                began = time.perf_counter()
                logits, state = self.step(before, state)
                best = most_likely(logits, max(TOPS))
                found.seconds.append(time.perf_counter() - began)
                found.unknown += token == UNKNOWN_ID
                if token in best:
                    found.ranks[int(np.flatnonzero(best == token)[0])] += 1
        return found

    def step(self, token: int, state: ModelState) -> tuple[NDArray[np.float32], ModelState]:
        """Read a token; return the logits (V,) after it, with a cache log-probabilities, and the state."""
        tokens = np.array([[token]])
        if self.cache:
            scores, state = self.sampler.step_cached(tokens, state, self.cache)
            return scores[0], state
        logits, state = self.sampler.step(tokens, state)
        return logits[0, 0], state


def batches(sentences: Iterator[str], size: int) -> Iterator[list[str]]:
    """Yield the sentences in lists of `size`; where one cannot be read, those before it come before the error."""
    batch: list[str] = []
    try:
        for sentence in sentences:
            batch.append(sentence)
            if len(batch) == size:
                yield batch
                batch = []
    except DataError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


# --- reading -------------------------------------------------------------------------------------------------------


def score_batch(sampler: Sampler, texts: Sequence[list[int]], cache: NeuralCache | None = None) -> list[NDArray[np.float32]]:
    """Return the log-probabilities of the tokens of each text; each begins after `<eos>`, and with a memory of its own."""
    order = sorted(range(len(texts)), key=texts.__getitem__)
    rows = [texts[index] for index in order]
    lengths = np.array([len(row) for row in rows])
    # The length of the prefix that a row has in common with the one above it: it is not read again.
    shared = np.array([0, *(common_prefix(above, row) for above, row in pairwise(rows))])
    found = [np.empty(length, np.float32) for length in lengths]

    logits, state = sampler.next_logits([END_ID], cache)
    first = log_softmax(logits[0])  # (V,)
    for row, scores in zip(rows, found, strict=True):
        scores[:1] = first[row[:1]]
    above = np.array([0])
    # The set of rows to read changes where a row begins to differ from the one above it, and where one ends.
    places = np.union1d(shared, lengths)
    for start, stop in pairwise([1, *places[places > 1].tolist()]):
        reading = np.flatnonzero((shared <= start) & (lengths > start))
        # A row that was not read before continues the nearest above it that was: their tokens are the same so far.
        from_row = np.searchsorted(above, reading, side="right") - 1
        tokens = np.array([rows[index][start - 1 : stop] for index in reading], np.int64)  # (B, T + 1)
        scores, state = sampler.score(tokens[:, :-1], tokens[:, 1:], select(state, from_row), cache)  # (B, T), (B, S) each
        for index, piece in zip(reading, scores, strict=True):
            found[index][start:stop] = piece
        above = reading
    for index in range(1, len(rows)):
        found[index][: shared[index]] = found[index - 1][: shared[index]]

    in_order = dict(zip(order, found, strict=True))
    return [in_order[index] for index in range(len(texts))]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    differing = (place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differing, min(len(one), len(other)))


def score_stream(
    sampler: Sampler, texts: Sequence[list[int]], state: ModelState, cache: NeuralCache | None = None
) -> tuple[list[NDArray[np.float32]], ModelState]:
    """Return the log-probabilities of the tokens of each text, all read as one stream from `state`, and the state after it.

    The token before the stream is `<eos>`, and each text ends with one.
    """
    tokens = np.array([END_ID, *(token for text in texts for token in text)], np.int64)[None]  # (1, T + 1)
    scores, state = sampler.score(tokens[:, :-1], tokens[:, 1:], state, cache)
    ends = np.cumsum([len(text) for text in texts])
    return np.split(scores[0], ends[:-1]), state


def most_likely(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return the ids of the `count` most likely tokens by logits (V,), the best first, never `<unk>`; fewer if V is smaller."""
    costs = -logits
    costs[UNKNOWN_ID] = np.inf
    count = min(count, len(costs) - 1)
    best = np.sort(np.argpartition(costs, count - 1)[:count])
    return best[np.argsort(costs[best], kind="stable")]


# --- sums ----------------------------------------------------------------------------------------------------------


class Totals:
    """Sums and counts over the scores of many sentences, divided once, at the end."""

    def __init__(self) -> None:
        self.sentences = self.words = self.unknown = self.bytes = self.unknown_bytes = self.original_words = 0
        self.nats = self.known_nats = 0.0

    def add(self, score: Score) -> None:
        """Add a sentence."""
        unknown = [word for word, is_unknown in zip(score.tokens, score.unknown, strict=True) if is_unknown]
        self.sentences += 1
        self.words += len(score.tokens)
        self.unknown += len(unknown)
        self.bytes += score.bytes
        self.original_words += score.original_words
        self.unknown_bytes += sum(len(word.encode()) for word in unknown)
        self.nats -= score.log_probability
        self.known_nats -= score.known_log_probability

    def figures(self) -> dict[str, int | float | None]:
        """Return counts, rates and perplexities by name; None where the divisor is 0. Raises DataError without any words."""
        if not self.words:
            raise DataError("there are no words to score; at least one line is expected")
        known_words, known_bytes = self.words - self.unknown, self.bytes - self.unknown_bytes
        compared = per_word_and_byte(self.nats, TextSize(self.original_words, self.bytes))
        return {
            "sentences": self.sentences,
            "words": self.words,
            "unknown_words": self.unknown,
            "unknown_rate": self.unknown / self.words,
            "original_words": self.original_words,
            "bytes": self.bytes,
            "log_probability": -self.nats,
            "log_probability_without_unknown": -self.known_nats,
            "perplexity": perplexity(self.nats / self.words),
            "perplexity_without_unknown": perplexity(self.known_nats / known_words) if known_words else None,
            "perplexity_per_word": compared.get("perplexity_per_word"),
            "bits_per_byte": compared.get("bits_per_byte"),
            "perplexity_per_byte": perplexity(self.nats / self.bytes),
            "perplexity_per_byte_without_unknown": perplexity(self.known_nats / known_bytes) if known_bytes > 0 else None,
        }


class Predictions:
    """How often the next word was among the most likely ones, and the time for each prediction."""

    def __init__(self) -> None:
        self.sentences = self.unknown = 0
        self.ranks = [0] * max(TOPS)
        """How often the next word was the most likely, the second, and so on."""
        self.seconds = array("d")
        """The seconds of each prediction: to read the word before it, and to find the most likely ones."""

    def figures(self) -> dict[str, int | float]:
        """Return counts, accuracies and latency percentiles by name. Raises DataError without any words."""
        words = len(self.seconds)
        if not words:
            raise DataError("there are no words to predict; at least one line is expected")
        p50, p95, p99 = (1000 * np.percentile(self.seconds, (50, 95, 99))).tolist()
        return {
            "sentences": self.sentences,
            "words": words,
            "unknown_words": self.unknown,
            "unknown_rate": self.unknown / words,
            **{f"top_{top}_accuracy": sum(self.ranks[:top]) / words for top in TOPS},
            "latency_p50_ms": p50,
            "latency_p95_ms": p95,
            "latency_p99_ms": p99,
        }
