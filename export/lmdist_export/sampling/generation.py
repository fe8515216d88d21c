"""Texts that grow: prompts in, tokens out, until each text ends.

    for text, tokens in continuations(sampler, prompts, config, seed=1):
        ...     # `tokens` were appended to `text`; text.finish_reason says when it has ended

Many texts are generated at a time; when one ends, the next prompt takes its place. Most options are nodes of the generation
graph. Those that depend on sequences of tokens (no-repeat-ngram, bad sequences, a bias of the caller's) are computed here
before each token and enter the graph as a bias of each row. This module knows ids only.

Shapes: B rows, N new tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from lmdist_export.options import GenerationConfig, features_of
from lmdist_export.sampling.log_probabilities import TokenScores, log_probability_steps
from lmdist_export.sampling.sampler import PREFILL_TOKENS, Sampler, all_masked, fixed_bias
from lmdist_export.sampling.seams import ANYTHING, Begin
from lmdist_export.sampling.state import DrawnAhead, State, concatenate
from lmdist_export.sampling.steps import Pace, result_of
from lmdist_export.sampling.stops import NO_STOPS, Stops

BATCH_SIZE = 16
TOKENS_PER_CALL = 32  # of the graph: a text that ends within a call is generated to the call's end for nothing
CALL_TOKENS = 0.5  # what a call costs beside its tokens, in tokens of a batch

CustomBias = Callable[[Sequence[int]], NDArray[np.floating]]
"""From the tokens of a text so far, its prompt included, to what is added to the logits (V) of the next one."""


@dataclass
class Text:
    """A text that continues a prompt."""

    prompt: list[int]
    prompt_number: int
    number: int
    """The number of the text among those of its prompt."""
    tokens: list[int] = field(default_factory=list)
    """The tokens after the prompt, without the end mark or the stop that ended the text."""
    finish_reason: str = ""
    """stop: its end or a stop came; length: it has max_new_tokens tokens; exhausted: no token is allowed; empty: not ended."""
    rest: bytes = b""
    """What the text has of a piece in which a stop began; the piece before may have the beginning of a character of it."""
    begin: Begin = field(default=ANYTHING, repr=False, compare=False)
    """What it begins with, beside its tokens."""
    scores: TokenScores | None = field(default=None, repr=False, compare=False)
    """What `log_probabilities` returns, where it was computed with the text."""
    stop_place: int = field(default=0, repr=False, compare=False)
    """The place in `Generation.stops` after the last token."""
    ngrams: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)
    """The tokens that followed each sequence of n - 1 tokens: an index that `banned_by_ngrams` extends."""
    num_indexed: int = field(default=0, repr=False, compare=False)
    """How many tokens, those of the prompt included, are in `ngrams`."""

    def last(self, count: int) -> list[int]:
        """Return the last `count` tokens, those of the prompt included, or all."""
        tokens = self.tokens[max(0, len(self.tokens) - count) :]
        return [*self.prompt[max(0, len(self.prompt) - (count - len(tokens))) :], *tokens]

    @property
    def overlap(self) -> int:
        """Return how many bytes of the next token are no part of the text, for the prompt has them."""
        return 0 if self.tokens else self.begin.overlap

    def extended(self, token: int, stop_place: int) -> Text:
        """Return a copy with one token more; this one can be extended by another."""
        return replace(self, tokens=[*self.tokens, token], ngrams=dict(self.ngrams), stop_place=stop_place)


@dataclass(frozen=True)
class Generation:
    """How texts are generated, and what ends them."""

    config: GenerationConfig
    stops: Stops = NO_STOPS
    """What ends a text and is not part of it."""
    ignore_end: bool = False
    """Whether the end mark is a token as any other."""

    @property
    def end(self) -> tuple[int, ...]:
        """Return the tokens that end a text by themselves: the end mark, or none."""
        return () if self.ignore_end else (self.config.eos_token_id,)


def continuations(
    sampler: Sampler,
    prompts: Iterable[Sequence[int]],
    config: GenerationConfig,
    seed: int,
    n: int = 1,
    stops: Stops = NO_STOPS,
    ignore_end: bool = False,
    batch_size: int = BATCH_SIZE,
    stream: bool = False,
    custom_bias: CustomBias | None = None,
) -> Iterator[tuple[Text, list[int]]]:
    """Yield (text, new tokens) as `n` texts continue each of `prompts`, `batch_size` at a time.

    Text i of a prompt depends on the prompt, the seed and i, not on the texts in the same batch. It ends with its end mark, or
    before any of the `stops`. With `stream` tokens are yielded as soon as they are sampled.
    """
    texts = new_texts(sampler, prompts, config, seed, n)
    generation = Generation(config, stops, ignore_end)
    return grow(sampler, texts, generation, batch_size, stream=stream, custom_bias=custom_bias)


def grow(
    sampler: Sampler,
    texts: Iterator[tuple[Text, State]],
    generation: Generation,
    batch_size: int = BATCH_SIZE,
    *,
    stream: bool = False,
    custom_bias: CustomBias | None = None,
) -> Iterator[tuple[Text, list[int]]]:
    """Yield (text, new tokens) as `texts` grow from their states, `batch_size` at a time; see `continuations`.

    A text leaves the batch when it has a finish_reason, and the next one takes its place before the next call of the graph.
    """
    batch = Batch(sampler, generation, stream=stream, custom_bias=custom_bias)
    while True:
        batch.join(list(islice(texts, batch_size - len(batch))))
        if not batch.texts:
            return
        yield from batch.step()


class Batch:
    """Texts that grow together: each is a row of the same calls of the graph. They come and go between two calls."""

    def __init__(
        self, sampler: Sampler, generation: Generation, *, stream: bool = False, custom_bias: CustomBias | None = None
    ) -> None:
        """Take no texts yet; with `stream` a call takes STEP_SECONDS, or a token."""
        config = generation.config
        self.sampler, self.generation, self.custom_bias = sampler, generation, custom_bias
        self.texts: list[Text] = []
        self.state: State | None = None
        self.bias = fixed_bias(config, sampler.sizes.vocabulary_size)
        self.by_token = bool(config.no_repeat_ngram_size or any(len(ids) > 1 for ids in config.bad_words_ids) or custom_bias)
        self.has_row_bias = self.by_token or (config.min_new_tokens > 0 and not generation.ignore_end)
        self.features = features_of(config, self.has_row_bias)
        self.stops = (*generation.end, *generation.stops.tokens)
        self.learns = stream and not self.by_token
        self.pace = Pace(1 if stream or self.by_token else TOKENS_PER_CALL, TOKENS_PER_CALL)

    def __len__(self) -> int:
        return len(self.texts)

    def join(self, starting: Sequence[tuple[Text, State]]) -> None:
        """Add texts, each with its state."""
        if not starting:
            return
        state = concatenate([start for _, start in starting])
        if self.texts and state.tokens.shape[1] > 1:  # read apart: the rows that are here have but one token to read
            state = self.sampler.prefill(state, self.generation.config)
        self.texts += [text for text, _ in starting]
        self.state = concatenate([self.state, state]) if self.state else state

    def leave(self, rows: Collection[int]) -> list[tuple[Text, State]]:
        """Remove the rows with these numbers; return their texts, each with its state, which may join again."""
        assert self.state, "a batch without texts"
        leaving = [(self.texts[row], self.state.rows([row])) for row in rows]
        self.keep([row for row in range(len(self)) if row not in rows])
        return leaving

    def keep(self, rows: Sequence[int]) -> None:
        """Remove all rows but those with these numbers."""
        self.texts = [self.texts[row] for row in rows]
        self.state = self.state.rows(rows) if rows and self.state else None

    def step(self) -> list[tuple[Text, list[int]]]:
        """Call the graph once; return its texts with what it has appended to each. Those that have ended leave.

        Where some must begin with certain tokens, each has one token.
        """
        assert self.state, "a batch without texts"
        texts, config, generation, bias = self.texts, self.generation.config, self.generation, self.bias
        began = time.perf_counter()
        added = row_bias(texts, config, len(bias), generation.end, self.custom_bias) if self.has_row_bias else None
        is_first = any(map(first_tokens, texts))
        if is_first:
            bias, masks = np.where(np.isneginf(bias), np.float32(0), bias), first_masks(texts, bias)
            added = masks if added is None else masks + added
        if added is not None:
            exhausted = [text for text, row in zip(texts, bias + added, strict=True) if all_masked(row)]
            if exhausted:  # they end; the others continue with the next call
                for text in exhausted:
                    text.finish_reason = "exhausted"
                self.keep([row for row, text in enumerate(texts) if not text.finish_reason])
                return [(text, append(text, [], generation)) for text in exhausted]
        sampled, self.state = self.sampler.generate(
            self.state,
            config,
            tokens_of_call(texts, config, 1 if is_first else self.pace.tokens),
            stops=self.stops,
            bias=bias,
            row_bias=added,
            in_prompt=prompt_mask(texts, len(bias)) if config.repetition_penalty != 1 else None,
            moves_on=True,
        )  # (N, B)
        if self.learns and not is_first:
            self.pace.learn(len(sampled), time.perf_counter() - began)
        growth = [(text, append(text, tokens, generation)) for text, tokens in zip(texts, sampled.T.tolist(), strict=True)]
        if is_first:
            self.state = replace(self.state, counts=self.counts_of_generated(self.state))
        self.keep([row for row, text in enumerate(texts) if not text.finish_reason])
        return growth

    def counts_of_generated(self, state: State) -> NDArray[np.float32] | None:
        """Return the counts (B, V') of a state after a first call, for what wants them; what came again was in a prompt."""
        if not self.features.adjusted or state.counts is None:
            return None
        return state.counts * np.array([[bool(text.tokens)] for text in self.texts])


def tokens_of_call(texts: Sequence[Text], config: GenerationConfig, most: int) -> int:
    """Return how many tokens, `most` at most, to generate of all texts by one call.

    None must not end and then may. Some may become too long: what they have too much is for nothing, but so is what a call
    costs beside its tokens, and most of all calls counts what is used of them.
    """
    most = min([most, *(config.min_new_tokens - len(text.tokens) for text in texts if not may_end(text, config))])
    to_longest = np.array([config.max_new_tokens - len(text.tokens) for text in texts])
    numbers = np.unique(np.minimum(to_longest, most))
    used = np.minimum(to_longest, numbers[:, None]).sum(axis=1)
    return int(numbers[np.argmax(used / (numbers + CALL_TOKENS))])


def new_texts(
    sampler: Sampler, prompts: Iterable[Sequence[int]], config: GenerationConfig, seed: int, n: int
) -> Iterator[tuple[Text, State]]:
    """Yield each text and the state from which it starts. A prompt of several texts is read once."""
    for prompt_number, prompt in enumerate(prompts):
        state = sampler.start([[config.bos_token_id, *prompt]], cached=config.cache_weight > 0)
        yield from forks(sampler, state, prompt, prompt_number, config, seed, range(n))


def forks(
    sampler: Sampler,
    state: State,
    prompt: Sequence[int],
    prompt_number: int,
    config: GenerationConfig,
    seed: int,
    numbers: Sequence[int],
    begin: Begin = ANYTHING,
) -> Iterator[tuple[Text, State]]:
    """Yield a text for each of `numbers`, a part of its seed, and the state from which it starts, that of a prompt."""
    if len(numbers) > 1 or state.tokens.size > PREFILL_TOKENS + 1:
        state = sampler.prefill(state, config)
    tokens = list(prompt)
    for place, number in enumerate(numbers):
        # The prompt is part of the seed, so that texts of different prompts have different random numbers. A spawn key is
        # mixed in word by word, whereas entropy is padded with zeros: [w] and [w, 0] would be the same.
        entropy = np.random.SeedSequence(seed, spawn_key=(number, *prompt))
        ahead = DrawnAhead(np.random.default_rng(entropy))
        yield Text(tokens, prompt_number, place, begin=begin), replace(state, generators=(ahead,))


def append(text: Text, tokens: list[int], generation: Generation) -> list[int]:
    """Append new tokens to a text up to where it ends; return those that are certain to stay.

    Tokens that may turn out to be the beginning of a stop are held back until that is known.
    """
    stops, end, most = generation.stops, generation.end, generation.config.max_new_tokens
    if not text.tokens and tokens[:1] == [text.begin.again]:
        text.prompt, text.begin, tokens = [*text.prompt, *tokens[:1]], ANYTHING, tokens[1:]
    if not stops:  # as in most requests: there is nothing to look for token by token
        added = tokens[: most - len(text.tokens)]
        for mark in end:
            if mark in added:
                added, text.finish_reason = added[: added.index(mark)], "stop"
        text.tokens += added
        if not text.finish_reason and len(text.tokens) == most:
            text.finish_reason = "length"
        return added
    shown = len(text.tokens) - stops.held_back(text.stop_place, text.tokens)
    for token in tokens:
        if token in end:
            text.finish_reason = "stop"
            break
        text.stop_place = stops.next(text.stop_place, token, text.overlap)
        text.tokens.append(token)
        if found := stops.ending(text.stop_place, text.tokens, text.begin.overlap):
            del text.tokens[-found.num_tokens :]
            text.rest = found.rest
            text.finish_reason = "stop"
            break
        if len(text.tokens) == most:
            text.finish_reason = "length"
            break
    until = len(text.tokens) if text.finish_reason else len(text.tokens) - stops.held_back(text.stop_place, text.tokens)
    return text.tokens[shown:until]


def may_end(text: Text, config: GenerationConfig) -> bool:
    """Return whether a text has min_new_tokens tokens."""
    return len(text.tokens) >= config.min_new_tokens


def log_probabilities(sampler: Sampler, text: Text, top: int) -> TokenScores:
    """Return the log-probability of each token of a text, and the `top` most likely tokens in its place, the best first.

    They are the model's own: no option of the generation changes them.
    """
    return result_of(log_probability_steps(sampler, text.prompt, text.tokens, top))


# --- what is added to logits ---------------------------------------------------------------------------------------


def row_bias(
    texts: Sequence[Text],
    config: GenerationConfig,
    vocabulary_size: int,
    end: Collection[int],
    custom_bias: CustomBias | None = None,
) -> NDArray[np.float32]:
    """Return what is added to the logits of the next token of each text, (B, V)."""
    bias = np.zeros((len(texts), vocabulary_size), np.float32)
    for row, text in zip(bias, texts, strict=True):
        if custom_bias:
            row += np.asarray(custom_bias([*text.prompt, *text.tokens]), np.float32)
        row[banned_tokens(text, config, end)] = -np.inf
    return bias


def first_tokens(text: Text) -> tuple[int, ...]:
    """Return the tokens one of which must come next; none where it may be any."""
    return () if text.tokens else text.begin.tokens


def first_masks(texts: Sequence[Text], bias: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what forbids tokens in the place of the next one of each text, (B, V): 0, or -inf.

    Those that a `bias` (V) of all texts forbids, and in a text that must begin with certain tokens all others. The one that
    was taken back from its prompt is never forbidden: where it comes again, it is not generated.
    """
    forbidden = np.where(np.isneginf(bias), -np.inf, 0).astype(np.float32)
    masks = np.tile(forbidden, (len(texts), 1))
    for row, text in zip(masks, texts, strict=True):
        if begins := list(first_tokens(text)):
            row[:] = -np.inf
            row[begins] = forbidden[begins]
            if text.begin.again is not None:
                row[text.begin.again] = 0
    return masks


def banned_tokens(text: Text, config: GenerationConfig, end: Collection[int]) -> list[int]:
    """Return the tokens that must not come next: they would end the text too early, repeat an n-gram, or complete a bad one."""
    banned = [] if may_end(text, config) else list(end)
    if config.no_repeat_ngram_size:
        banned += banned_by_ngrams(text, config.no_repeat_ngram_size)
    last = text.last(1)
    likely = (bad for bad in config.bad_words_ids if list(bad[-2:-1]) == last != [])  # of many bad ones few
    banned += [bad[-1] for bad in likely if text.last(len(bad) - 1) == list(bad[:-1])]
    return [token for token in banned if text.tokens or token != text.begin.again]


def banned_by_ngrams(text: Text, size: int) -> tuple[int, ...]:
    """Return the tokens that would complete an n-gram of `size` tokens that the text already has.

    Only the tokens since the last call are indexed, so the time for a text grows with its length, not with its square.
    """
    length = len(text.prompt) + len(text.tokens)
    tokens = text.last(length - text.num_indexed + size - 1)
    for start in range(len(tokens) - size + 1):
        *before, token = tokens[start : start + size]
        text.ngrams[*before,] = (*text.ngrams.get((*before,), ()), token)
    text.num_indexed = length
    return text.ngrams.get(tuple(text.last(size - 1)), ())


def prompt_mask(texts: Sequence[Text], vocabulary_size: int) -> NDArray[np.bool_]:
    """Return which tokens (B, V) the prompt of each text has."""
    mask = np.zeros((len(texts), vocabulary_size), np.bool_)
    for row, text in zip(mask, texts, strict=True):
        row[text.prompt] = True
    return mask
