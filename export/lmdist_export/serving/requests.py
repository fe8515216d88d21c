"""What clients ask of the batching thread: texts that continue prompts, or the log-probabilities of given texts.

    request = Request(sampler, prompts, config, seed)       # in the client's thread
    request.finished.wait(); request.texts                  # once batching.py has done it
    request.cancel()                                        # at any time

Each is a generator of short steps, which the batching thread takes in turn with others: a piece of a prompt, a step of a beam
search, a piece of a text whose log-probabilities are wanted. Sampled texts grow in batches that requests share, and meanwhile
their generators wait. This module knows ids, and nothing of HTTP.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TypeAlias

from lmdist.errors import UsageError
from lmdist_export.options import GenerationConfig
from lmdist_export.sampling.beam_search import beam_search_steps
from lmdist_export.sampling.generation import Generation, Text, forks
from lmdist_export.sampling.log_probabilities import TokenScores, log_probability_steps, start_steps, steps_after
from lmdist_export.sampling.sampler import PREFILL_TOKENS, STEP_TOKENS, Sampler, fixed_bias
from lmdist_export.sampling.seams import ANYTHING, Begin
from lmdist_export.sampling.state import State
from lmdist_export.sampling.steps import Pace
from lmdist_export.sampling.stops import NO_STOPS, Stops

MAX_PHRASE_TOKENS = 4_096
"""In the stops and bad words of a request together."""
JOINT_TOKENS = 32
"""Of the end of a prompt, which is read together with the ends of others that join the batch."""
READING_SECONDS = 0.005
"""Of a piece of a prompt or of a text to score: half the time of a call that generates."""

WAIT = True
"""Yielded by work that has nothing to do until a text of it has joined its batch, or has ended."""
WorkSteps = Generator[bool | None, None, None]
Offer: TypeAlias = "Callable[[Request], int]"


@dataclass
class Paces:
    """How many tokens a step may have, as the batching thread has learned it."""

    reading: Pace = field(default_factory=lambda: Pace(STEP_TOKENS, PREFILL_TOKENS, READING_SECONDS))
    scoring: Pace = field(default_factory=lambda: Pace(1, STEP_TOKENS, READING_SECONDS))


class Work:
    """What a client waits for."""

    def __init__(self, cost: int, on_end: Callable[[], None] | None) -> None:
        self.cost = self.left = cost
        """Tokens to read and to write: all, and those that are left."""
        self.num_read = self.num_written = 0
        self.seconds = 0.0
        """What its own steps took, from the start that fair turns give it."""
        self.is_waiting = False
        self.finished = threading.Event()
        self.cancelled = False
        self.error: Exception | None = None
        self.on_end = on_end
        """Called in the batching thread, once: it has its results, its error, or was cancelled."""

    def steps(self, paces: Paces, offer: Offer) -> WorkSteps:
        """Do all of it; `offer` has a batch take texts that are ready, and returns how many may wait for that."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Stop waiting: whatever is done for it ends after the current step."""
        self.cancelled = True
        self.finished.set()

    def finish(self) -> None:
        """Tell the client that there is nothing more to wait for."""
        self.finished.set()
        try:
            if self.on_end:
                self.on_end()
        except Exception:  # as from an event loop that is closed
            logging.getLogger(__name__).exception("the client of a request could not be told of its end")

    def has_read(self, expected: int, tokens: int) -> None:
        """Count tokens that were read of those that its cost expects."""
        self.left -= expected
        self.num_read += tokens


class Request(Work):
    """Texts that are asked for together, with one seed."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        seed: int,
        n: int = 1,
        stops: Stops = NO_STOPS,
        ignore_end: bool = False,
        logprobs: int | None = None,
        on_growth: Callable[[Text, list[int]], None] | None = None,
        on_end: Callable[[], None] | None = None,
        begins: Sequence[Begin] = (),
    ) -> None:
        """Ask for `n` texts of each of `prompts`, with `logprobs` for the scores of their tokens, and of so many others.

        `on_growth` is called in the batching thread with a text and its new tokens, and must return at once. Raises UsageError
        where `config` leaves no token to sample, for tokens that the model does not have, and for too many stops. `begins` has
        what the texts of each prompt begin with, where not with anything.
        """
        fixed_bias(config, sampler.sizes.vocabulary_size)
        check_tokens(sampler, prompts)
        check_phrases(sampler, config, stops)
        read = sum(1 + len(prompt) for prompt in prompts)
        written = len(prompts) * max(n, config.num_beams) * config.max_new_tokens
        scored = 0 if logprobs is None else read + len(prompts) * n * config.max_new_tokens
        super().__init__(read + written + scored, on_end)
        self.sampler, self.prompts, self.seed, self.n = sampler, prompts, seed, n
        self.begins = begins or [ANYTHING] * len(prompts)
        self.logprobs, self.on_growth = logprobs, on_growth
        self.generation = Generation(config, stops, ignore_end)
        self.batch_key = f"{config.key} {stops} {ignore_end}"
        """Equal for requests that can share a batch."""
        self.texts: list[Text] = []
        self.row_seconds = 0.0
        """The share of its texts in the calls of their batch, from the start that fair turns give it."""
        self.shown: Counter[tuple[int, int]] = Counter()
        """How many tokens of each text were reported."""
        self.restart()

    def restart(self) -> None:
        """Drop the texts that were generated. They are generated again, but what was reported of them is not again."""
        self.reported, self.ended_before = self.shown.copy(), {text_key(text) for text in self.texts if text.finish_reason}
        self.texts = []
        self.ready: deque[tuple[Text, State]] = deque()
        """Texts that can join a batch."""
        self.ended: list[Text] = []

    def steps(self, paces: Paces, offer: Offer) -> WorkSteps:
        """Do all of it."""
        yield from self.search(paces) if self.generation.config.num_beams > 1 else self.sample(paces, offer)
        if self.logprobs is not None:
            yield from self.score(paces, self.logprobs)
        while len(self.ended) < len(self.texts):
            yield WAIT

    def sample(self, paces: Paces, offer: Offer) -> WorkSteps:
        """Read the prompts, and have a batch continue them."""
        sampler, config = self.sampler, self.generation.config
        for number, prompt in enumerate(self.prompts):
            state = sampler.start([[config.bos_token_id, *prompt]], cached=config.cache_weight > 0)
            keep = min(JOINT_TOKENS, paces.reading.tokens) if self.n == 1 else 1
            state = yield from sampler.prefill_steps(state, config, paces.reading, keep)
            self.has_read(len(prompt) + 1, len(prompt) + 1)
            for text, start in forks(sampler, state, prompt, number, config, self.seed, range(self.n), self.begins[number]):
                self.texts.append(text)
                self.ready.append((text, start))
                most = offer(self)
                while len(self.ready) >= most:
                    yield WAIT

    def search(self, paces: Paces) -> WorkSteps:
        """Search the most likely texts of each prompt."""
        for number, prompt in enumerate(self.prompts):
            found = yield from beam_search_steps(self.sampler, prompt, self.generation, self.n, pace=paces.reading)
            self.has_read(len(prompt) + 1, len(prompt) + 1)
            self.left -= (self.generation.config.num_beams - len(found)) * self.generation.config.max_new_tokens
            for text in (replace(text, prompt_number=number) for text in found):
                self.texts.append(text)
                self.grow(text, text.tokens)

    def score(self, paces: Paces, top: int) -> WorkSteps:
        """Compute the scores of each text, prompt by prompt, so that one prompt's state is held; each prompt is read once."""
        for number, texts in groupby(self.texts, key=lambda text: text.prompt_number):
            prompt = self.prompts[number]
            start = yield from start_steps(self.sampler, prompt, paces.reading)
            self.has_read(1 + len(prompt), 1 + len(prompt))
            for text in texts:
                while not text.finish_reason:
                    yield WAIT
                again = text.prompt[len(prompt) :]  # its scores are not asked for
                of_tokens, tops = yield from steps_after(self.sampler, start, [*again, *text.tokens], top, paces.scoring)
                text.scores = of_tokens[len(again) :], tops[len(again) :]
                self.has_read(self.generation.config.max_new_tokens, len(text.tokens))

    def grow(self, text: Text, tokens: list[int]) -> None:
        """Count and report new tokens of a text, and its end."""
        key, length = text_key(text), len(tokens)
        self.left -= length
        self.num_written += length
        repeated = min(length, self.reported[key])
        self.reported[key] -= repeated
        self.shown[key] += length - repeated
        if text.finish_reason:
            self.ended.append(text)
            self.left -= self.generation.config.max_new_tokens - len(text.tokens)
        ends_now = text.finish_reason and key not in self.ended_before
        if self.on_growth and (repeated < length or ends_now):
            self.on_growth(text, tokens[repeated:])


class Scoring(Work):
    """The log-probabilities of the tokens of given texts, by the model itself; each begins after the end of another."""

    def __init__(
        self,
        sampler: Sampler,
        texts: Sequence[Sequence[int]],
        top: int,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        """Ask for the scores of each token, and of the `top` most likely in its place; raises UsageError as Request does."""
        check_tokens(sampler, texts)
        super().__init__(sum(1 + len(tokens) for tokens in texts), on_end)
        self.sampler, self.given, self.top = sampler, texts, top
        self.scores: list[TokenScores] = []
        """Of each text, in the order of the texts."""

    def steps(self, paces: Paces, offer: Offer) -> WorkSteps:
        """Do all of it."""
        for tokens in self.given:
            found = yield from log_probability_steps(self.sampler, [], tokens, self.top, paces.reading, paces.scoring)
            self.scores.append(found)
            self.has_read(len(tokens) + 1, len(tokens) + 1)


def text_key(text: Text) -> tuple[int, int]:
    """Return what tells a text from the others of its request."""
    return text.prompt_number, text.number


def check_tokens(sampler: Sampler, texts: Sequence[Sequence[int]]) -> None:
    """Raise UsageError for tokens that the model does not have: in a batch they would fail those of others too."""
    last = sampler.sizes.vocabulary_size - 1
    for tokens in texts:
        for token in (min(tokens, default=0), max(tokens, default=0)):
            if not 0 <= token <= last:
                raise UsageError(f"the id of a token is {token}; one from 0 to {last} is expected")


def check_phrases(sampler: Sampler, config: GenerationConfig, stops: Stops) -> None:
    """Raise UsageError for more tokens in stops and bad words, those of the bundle aside, than a server looks for."""
    own = sum(map(len, sampler.bundle.generation.bad_words_ids))
    tokens = sum(map(len, (*stops.stops, *config.bad_words_ids))) - own
    if tokens > MAX_PHRASE_TOKENS:
        kind = "tokens and bytes" if stops.spelling else "tokens"
        raise UsageError(f"stop and bad_words have {tokens:,} {kind} together; a server accepts at most {MAX_PHRASE_TOKENS:,}")
