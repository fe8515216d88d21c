"""Texts that grow: prompts in, words out, until each text ends.

    for text, words in continuations(sampler, prompts, config, seed=1):
        ...     # `words` were added to `text`; text.finish_reason says when it is done

Many texts are made at a time, and when one ends the next prompt takes its place. Most options are nodes of the generation
graph. Those that depend on which words stand side by side (no-repeat-ngram, sequences that may not come, a rule of the
caller's) are found here before each word and go into the graph as numbers added to the logits. This module knows ids only.

Shapes: B rows, N new words, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from lmdist.errors import UsageError
from lmdist_export.bundle import GenerationConfig
from lmdist_export.sampling.sampler import PREFILL_WORDS, READ_AT_ONCE, Sampler, log_softmax
from lmdist_export.sampling.state import State, joined

BATCH_SIZE = 16
WORDS_AT_ONCE = 32  # in one run of the graph: a text that ends inside it is made on for nothing
STREAM_SECONDS = 0.02  # words that come within this time may come together: nobody sees it

Rule = Callable[[Sequence[int]], NDArray[np.floating]]
"""Of the words of a text so far, its prompt included, the numbers (V) to be added to the logits of the next."""


@dataclass
class Text:
    """A text that goes on from a prompt."""

    prompt: list[int]
    prompt_number: int
    number: int
    """Which of the texts of this prompt."""
    words: list[int] = field(default_factory=list)
    """Those after the prompt, without the end mark or the stop that ended it."""
    finish_reason: str = ""
    """stop: its end or a stop came; length: it has max_new_tokens words; exhausted: no word may follow; empty: it goes on."""
    followers: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)
    """Of words that stand side by side in it those that came next: what `repeats` has found so far."""
    indexed: int = field(default=0, repr=False, compare=False)
    """How many words, those of the prompt among them, `followers` knows."""

    def last(self, count: int) -> list[int]:
        """The last `count` words, those of the prompt among them, or all."""
        words = self.words[max(0, len(self.words) - count) :]
        return [*self.prompt[max(0, len(self.prompt) - (count - len(words))) :], *words]

    def grown(self, word: int) -> Text:
        """The text with one word more, beside which it can go on with another."""
        return replace(self, words=[*self.words, word], followers=dict(self.followers))


def continuations(
    sampler: Sampler,
    prompts: Iterable[Sequence[int]],
    config: GenerationConfig,
    seed: int,
    n: int = 1,
    stops: Sequence[Sequence[int]] = (),
    ignore_end: bool = False,
    batch_size: int = BATCH_SIZE,
    stream: bool = False,
    rule: Rule | None = None,
) -> Iterator[tuple[Text, list[int]]]:
    """Yield (text, new words) as `n` texts go on from each of `prompts`, `batch_size` at a time.

    Text i of a prompt depends on the prompt, the seed and i, not on what is made beside it. It ends with its end mark, or
    before any of the sequences `stops`. With `stream` words come as soon as they are made.
    """
    waiting = beginnings(sampler, prompts, config, seed, n)
    for made in runs(
        sampler, lambda room: list(islice(waiting, room)), config, stops, ignore_end, batch_size, stream=stream, rule=rule
    ):
        yield from made


def runs(
    sampler: Sampler,
    begin: Callable[[int], list[tuple[Text, State]]],
    config: GenerationConfig,
    stops: Sequence[Sequence[int]] = (),
    ignore_end: bool = False,
    batch_size: int = BATCH_SIZE,
    *,
    stream: bool = False,
    rule: Rule | None = None,
) -> Iterator[list[tuple[Text, list[int]]]]:
    """Yield what each run of the graph has added to its texts, (text, new words), until no text is left.

    Before each run `begin` gives texts that are to be made as well, at most as many as there is room for. A text is left out
    of the next run when it has a finish_reason, whoever gave it one.
    """
    end = () if ignore_end else (config.eos_token_id,)
    single = [stop[0] for stop in stops if len(stop) == 1]
    step_by_step = bool(config.no_repeat_ngram_size or any(len(words) > 1 for words in config.bad_words_ids) or rule)
    with_row_bias = step_by_step or (config.min_new_tokens > 0 and not ignore_end)
    bias = bias_of(config, sampler.sizes.vocabulary_size)
    texts: list[Text] = []
    state: State | None = None
    words_at_once = 1 if stream else WORDS_AT_ONCE
    while True:
        begun = begin(batch_size - len(texts))
        texts += [text for text, _ in begun]
        if not texts:
            return
        state = joined([*([state] if state else []), *(start for _, start in begun)])
        count = min(config.max_new_tokens - len(text.words) for text in texts)
        count = min([count, *(config.min_new_tokens - len(text.words) for text in texts if not may_end(text, config))])
        count = 1 if step_by_step else min(count, words_at_once)
        began = time.perf_counter()
        added = row_bias(texts, config, len(bias), end, rule) if with_row_bias else None
        exhausted = [] if added is None else [text for text, row in zip(texts, added + bias, strict=True) if none_left(row)]
        if exhausted:  # they end; the others go on with the next run
            for text in exhausted:
                text.finish_reason = "exhausted"
            yield [(text, add(text, [], config, end, stops)) for text in exhausted]
        else:
            made, state = sampler.make(
                state,
                config,
                count,
                stops=(*end, *single),
                bias=bias,
                row_bias=added,
                in_prompt=words_of_prompts(texts, sampler.sizes.vocabulary_size) if config.repetition_penalty != 1 else None,
            )
            if stream:
                seconds = (time.perf_counter() - began) / len(made)
                words_at_once = max(1, min(WORDS_AT_ONCE, int(STREAM_SECONDS / seconds)))
            yield [(text, add(text, words, config, end, stops)) for text, words in zip(texts, made.T.tolist(), strict=True)]
        going = [row for row, text in enumerate(texts) if not text.finish_reason]
        texts = [texts[row] for row in going]
        state = state.rows(going) if going else None


def beginnings(
    sampler: Sampler, prompts: Iterable[Sequence[int]], config: GenerationConfig, seed: int, n: int
) -> Iterator[tuple[Text, State]]:
    """Each text to be made, and the state from which it goes on. A prompt of several texts is read once."""
    for prompt_number, prompt in enumerate(prompts):
        state = sampler.start([[config.bos_token_id, *prompt]])
        if n > 1 or len(prompt) > READ_AT_ONCE:
            state = sampler.read(state, config)
        for number in range(n):
            # The prompt is in it, so that texts of different prompts are not drawn alike.
            generator = np.random.default_rng([seed, number, *prompt])
            yield Text(list(prompt), prompt_number, number), replace(state, generators=(generator,))


def add(
    text: Text, words: list[int], config: GenerationConfig, end: Collection[int], stops: Sequence[Sequence[int]]
) -> list[int]:
    """Add new words to a text up to where it ends; give those that will stay.

    Words that may turn out to be the beginning of a stop wait until it is known.
    """
    shown = len(text.words) - waiting_words(text.words, stops)
    for word in words:
        if word in end:
            text.finish_reason = "stop"
            break
        text.words.append(word)
        stop = next((stop for stop in stops if ends_with(text.words, stop)), None)
        if stop is not None:
            del text.words[-len(stop) :]
            text.finish_reason = "stop"
            break
        if len(text.words) == config.max_new_tokens:
            text.finish_reason = "length"
            break
    until = len(text.words) if text.finish_reason else len(text.words) - waiting_words(text.words, stops)
    return text.words[shown:until]


def waiting_words(words: Sequence[int], stops: Sequence[Sequence[int]]) -> int:
    """How many of the last words are the beginning of a stop."""
    lengths = [length for stop in stops for length in range(1, len(stop)) if ends_with(words, stop[:length])]
    return max(lengths, default=0)


def ends_with(words: Sequence[int], last: Sequence[int]) -> bool:
    """Whether the last of `words` are these."""
    return list(words[-len(last) :]) == list(last)


def may_end(text: Text, config: GenerationConfig) -> bool:
    """Whether a text has the words that it must have, so that it may end."""
    return len(text.words) >= config.min_new_tokens


def log_probabilities(sampler: Sampler, text: Text, likeliest: int) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Of each word of a text its log-probability, and the `likeliest` words in its place with theirs, the best first.

    They are the model's own: no option of the generation is in them.
    """
    context = [sampler.bundle.generation.bos_token_id, *text.prompt]
    if not text.words:
        return [], []
    logits, state = sampler.prefill(context)  # (1, V)
    of_words, tops = [], []
    for start in range(0, len(text.words), PREFILL_WORDS):
        words = np.array(text.words[start : start + PREFILL_WORDS])
        after, state = sampler.step(words[None], state)  # (1, T, V)
        scores = log_softmax(np.concatenate([logits, after[0, :-1]]))  # (T, V)
        logits = after[:, -1]
        of_words += scores[np.arange(len(words)), words].tolist()
        order = np.argsort(-scores, axis=1, kind="stable")[:, :likeliest]
        tops += [[(index, float(row[index])) for index in best] for row, best in zip(scores, order.tolist(), strict=True)]
    return of_words, tops


# --- what is added to logits ---------------------------------------------------------------------------------------


def bias_of(config: GenerationConfig, vocabulary_size: int) -> NDArray[np.float32]:
    """What is added to the logits (V) of every text, always: -inf for a word that never comes."""
    bias = np.zeros(vocabulary_size, np.float32)
    for words, value in config.sequence_bias:
        bias[words] += np.float32(value)
    bias[list(config.suppress_tokens)] = -np.inf
    bias[[words[0] for words in config.bad_words_ids if len(words) == 1]] = -np.inf
    if none_left(bias):
        raise UsageError("no word is left to draw: suppress_tokens, bad words and logit bias take all of them")
    return bias


def row_bias(
    texts: Sequence[Text], config: GenerationConfig, vocabulary_size: int, end: Collection[int], rule: Rule | None
) -> NDArray[np.float32]:
    """What is added to the logits of each text (B, V) before its next word."""
    added = np.zeros((len(texts), vocabulary_size), np.float32)
    for row, text in zip(added, texts, strict=True):
        if rule:
            row += np.asarray(rule([*text.prompt, *text.words]), np.float32)
        row[forbidden(text, config, end)] = -np.inf
    return added


def none_left(added: NDArray[np.floating]) -> bool:
    """Whether what is added to logits (V) leaves no word that may come."""
    return bool(np.isneginf(added).all())


def forbidden(text: Text, config: GenerationConfig, end: Collection[int]) -> list[int]:
    """The words that may not come next: they would end the text too early, repeat a sequence, or complete a bad one."""
    found = [] if may_end(text, config) else list(end)
    if config.no_repeat_ngram_size:
        found += repeats(text, config.no_repeat_ngram_size)
    found += [bad[-1] for bad in config.bad_words_ids if len(bad) > 1 and text.last(len(bad) - 1) == list(bad[:-1])]
    return found


def repeats(text: Text, size: int) -> tuple[int, ...]:
    """The words that have come after the last `size` - 1 words of a text before.

    Only the words that are new since the last call are looked at, so the time for a text grows with its length, not with its
    square.
    """
    length = len(text.prompt) + len(text.words)
    words = text.last(length - text.indexed + size - 1)
    for start in range(len(words) - size + 1):
        *before, word = words[start : start + size]
        text.followers[*before,] = (*text.followers.get((*before,), ()), word)
    text.indexed = length
    return text.followers.get(tuple(text.last(size - 1)), ())


def words_of_prompts(texts: Sequence[Text], vocabulary_size: int) -> NDArray[np.bool_]:
    """Which words (B, V) the prompt of each text has."""
    there = np.zeros((len(texts), vocabulary_size), np.bool_)
    for row, text in zip(there, texts, strict=True):
        row[text.prompt] = True
    return there
