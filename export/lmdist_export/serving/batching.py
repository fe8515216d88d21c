"""Continuous batching: texts of many requests are generated in the same inference calls, by one sampler.

    batcher = Batcher(sampler)
    texts = batcher.generate(Request(sampler, prompts, config, seed), timeout_seconds=60)      # in each request's own thread

One thread generates all tokens. Requests of equal settings (those that hold for all rows of an inference call) share a batch:
a text joins it after the current call, which takes 20 ms at most or one token, and leaves it when it ends. Batches of
different settings take turns, a call each. Requests that share a batch take turns to start their texts, so none waits for the
last text of a large one. The same seed gives the same text whatever else is in the batch (sampling/generation.py).

This module knows ids, and nothing of HTTP.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from lmdist_export.options import GenerationConfig
from lmdist_export.sampling.beam_search import beam_search
from lmdist_export.sampling.generation import BATCH_SIZE, Generation, Text, generation_steps, new_texts
from lmdist_export.sampling.sampler import Sampler, fixed_bias
from lmdist_export.sampling.state import State
from lmdist_export.sampling.stops import Stop

MAX_GRAPHS = 8
"""Options with other nodes need a graph of their own, with its own copy of the weights; requests could ask for 68 of them."""


class RequestTimeout(Exception):
    """A request was not finished in its time, or was cancelled."""


class Request:
    """Texts that are asked for together, with one seed."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        seed: int,
        n: int = 1,
        stops: Sequence[Stop] = (),
        ignore_end: bool = False,
    ) -> None:
        """Ask for `n` texts of each of `prompts`; raises UsageError where `config` leaves no token to sample."""
        fixed_bias(config, sampler.sizes.vocabulary_size)
        self.sampler, self.prompts, self.seed, self.n = sampler, prompts, seed, n
        self.generation = Generation(config, stops, ignore_end)
        self.batch_key = repr(self.generation)
        """Equal for requests that can share a batch."""
        self.finished = threading.Event()
        self.cancelled = False
        self.error: Exception | None = None
        self.restart()

    def restart(self) -> None:
        """Drop the texts that were generated."""
        self.new_texts = new_texts(self.sampler, self.prompts, self.generation.config, self.seed, self.n)
        self.texts: list[Text] = []

    def start_next(self) -> tuple[Text, State]:
        """Return the next text that has not started, and its state."""
        text, state = next(self.new_texts)
        self.texts.append(text)
        return text, state

    def cancel(self) -> None:
        """Stop waiting: its texts leave their batch after the current call, and no further one starts."""
        self.cancelled = True
        self.finished.set()

    @property
    def all_started(self) -> bool:
        """Return whether all texts have started."""
        return len(self.texts) == len(self.prompts) * self.n

    @property
    def all_ended(self) -> bool:
        """Return whether all texts have ended."""
        return self.all_started and all(text.finish_reason for text in self.texts)


class SharedBatch:
    """Requests with one batch key, and the inference calls that generate their texts.

    One thread calls `step`; others append to `queue`.
    """

    def __init__(self, like: Request, batch_size: int) -> None:
        self.queue: deque[Request] = deque()
        """Requests with texts that have not started."""
        self.active: list[Request] = []
        """Requests with texts that have started."""
        self.steps = generation_steps(like.sampler, self.admit, like.generation, batch_size, stream=True)

    def admit(self, free: int) -> list[tuple[Text, State]]:
        """Start texts for the free places, one of each request in turn."""
        started = []
        while self.queue and len(started) < free:
            request = self.queue.popleft()
            if request.cancelled:
                continue
            if request not in self.active:
                self.active.append(request)
            started.append(request.start_next())
            if not request.all_started:
                self.queue.append(request)
        return started

    def step(self) -> bool:
        """Make an inference call and finish the requests whose texts have ended; return whether texts are left."""
        has_more = next(self.steps, None) is not None
        active, self.active = self.active, []
        for request in active:
            if request.cancelled:
                for text in request.texts:  # frees their places
                    text.finish_reason = text.finish_reason or "cancelled"
            elif request.all_ended:
                request.finished.set()
            else:
                self.active.append(request)
        return has_more


class Batcher:
    """Generates the texts of requests from many threads."""

    def __init__(self, sampler: Sampler, batch_size: int = BATCH_SIZE) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.batches: dict[str, SharedBatch] = {}
        self.changed = threading.Condition()
        """Held where a request is added to a batch, or a batch is removed."""
        self.searching = threading.Lock()
        threading.Thread(target=self.run, name="batcher", daemon=True).start()

    def generate(self, request: Request, timeout_seconds: float) -> list[Text]:
        """Return the texts of a request; raises RequestTimeout, and whatever error occurred in generating them."""
        if request.generation.config.num_beams > 1:
            return self.search(request, timeout_seconds)
        self.add(request, request.batch_key)
        if not request.finished.wait(timeout_seconds):
            request.cancel()
        if request.cancelled:
            raise RequestTimeout
        if request.error:
            raise request.error
        return request.texts

    def search(self, request: Request, timeout_seconds: float) -> list[Text]:
        """Return the texts of beam search; one search runs at a time, beside the batches."""
        if not self.searching.acquire(timeout=timeout_seconds):
            raise RequestTimeout
        try:
            how = request.generation
            for number, prompt in enumerate(request.prompts):
                if request.cancelled:
                    raise RequestTimeout
                found = beam_search(self.sampler, prompt, how.config, request.n, how.stops, how.ignore_end)
                request.texts += [replace(text, prompt_number=number) for text in found]
            return request.texts
        finally:
            self.searching.release()

    def add(self, request: Request, batch_key: str) -> None:
        """Queue a request for the batch of this key."""
        with self.changed:
            if batch_key not in self.batches:
                self.batches[batch_key] = SharedBatch(request, self.batch_size)
            self.batches[batch_key].queue.append(request)
            self.changed.notify()

    def run(self) -> None:
        """Step each batch in turn, forever."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.batches)
                turns = list(self.batches.items())
            for batch_key, batch in turns:
                sessions = self.sampler.generation_sessions
                while len(sessions) > MAX_GRAPHS:  # the oldest; it is built again when it is needed
                    del sessions[next(iter(sessions))]
                try:
                    if not batch.step():
                        self.remove(batch_key, batch)
                except Exception as error:  # whatever it is, it is reported to the requests, and other batches continue
                    self.fail(batch_key, batch, error)

    def remove(self, batch_key: str, batch: SharedBatch) -> None:
        """Remove a batch without texts; requests that were queued meanwhile go into a new one."""
        with self.changed:
            del self.batches[batch_key]
        for request in batch.queue:
            self.add(request, batch_key)

    def fail(self, batch_key: str, batch: SharedBatch, error: Exception) -> None:
        """Report an error to the one request of a batch; of several, each is tried again alone, since one may be the cause."""
        with self.changed:
            del self.batches[batch_key]
        requests = list(dict.fromkeys([*batch.active, *batch.queue]))
        for request in requests:
            if len(requests) == 1:
                request.error = error
                request.finished.set()
            else:
                request.restart()
                self.add(request, f"{batch_key} {id(request)}")
