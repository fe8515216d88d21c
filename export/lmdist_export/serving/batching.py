"""Many requests, one sampler: texts that are asked for at the same time are made in the same runs.

    batcher = Batcher(sampler)
    texts = batcher.make(Request(sampler, prompts, config, seed), seconds=60)      # from as many threads as there are requests

One thread makes all words. Requests of equal settings (what a run takes for all of its rows) share a batch: a text joins it
after the run in which it came, 20 ms at most or one word, and leaves it when it ends. Batches of other settings take turns
with it, a run each. Requests that share a batch take turns to begin their texts, so none waits for the last text of a large
one. The same seed gives the same text whatever it is made beside (generation.py).

This module knows ids, and nothing of HTTP.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from lmdist_export.bundle import GenerationConfig
from lmdist_export.sampling.beam_search import beam_search
from lmdist_export.sampling.generation import BATCH_SIZE, Text, beginnings, bias_of, runs
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.sampling.state import State

MOST_GRAPHS = 8
"""Options that are other nodes have a graph of their own, with weights arranged for it; requests could ask for 34 of them."""


class Overdue(Exception):
    """A request was not answered in its time, or given up before."""


class Request:
    """Texts that are asked for together, by one seed."""

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        seed: int,
        n: int = 1,
        stops: Sequence[Sequence[int]] = (),
        ignore_end: bool = False,
    ) -> None:
        """Ask for `n` texts of each of `prompts`; raises UsageError where `config` leaves no word to draw."""
        bias_of(config, sampler.sizes.vocabulary_size)
        self.sampler, self.prompts, self.config, self.seed, self.n = sampler, prompts, config, seed, n
        self.stops, self.ignore_end = stops, ignore_end
        self.settings = repr((config, stops, ignore_end))
        """Equal where a run can serve both."""
        self.answered = threading.Event()
        self.given_up = False
        self.error: Exception | None = None
        self.restart()

    def restart(self) -> None:
        """Forget what was made."""
        self.beginnings = beginnings(self.sampler, self.prompts, self.config, self.seed, self.n)
        self.texts: list[Text] = []

    def begin(self) -> tuple[Text, State]:
        """The next text that has not begun."""
        text, state = next(self.beginnings)
        self.texts.append(text)
        return text, state

    def give_up(self) -> None:
        """Wait no longer; its texts leave their batch after the run that goes on, and what has not begun never does."""
        self.given_up = True
        self.answered.set()

    @property
    def has_begun(self) -> bool:
        """Whether all of its texts have begun."""
        return len(self.texts) == len(self.prompts) * self.n

    @property
    def has_ended(self) -> bool:
        """Whether all of its texts have ended."""
        return self.has_begun and all(text.finish_reason for text in self.texts)


class Batch:
    """Requests of equal settings, and the runs that make their texts. One thread runs it; others append to `waiting`."""

    def __init__(self, like: Request, batch_size: int) -> None:
        self.waiting: deque[Request] = deque()
        """Those with texts that have not begun."""
        self.growing: list[Request] = []
        """Those with texts that have begun."""
        settings = like.config, like.stops, like.ignore_end, batch_size
        self.runs = runs(like.sampler, self.begin, *settings, stream=True)

    def begin(self, room: int) -> list[tuple[Text, State]]:
        """Texts for the places that are free, one of each request in turn."""
        begun = []
        while self.waiting and len(begun) < room:
            request = self.waiting.popleft()
            if request.given_up:
                continue
            if request not in self.growing:
                self.growing.append(request)
            begun.append(request.begin())
            if not request.has_begun:
                self.waiting.append(request)
        return begun

    def run(self) -> bool:
        """Make a run and answer the requests that have all of their texts; gives whether there are more."""
        going = next(self.runs, None) is not None
        growing, self.growing = self.growing, []
        for request in growing:
            if request.given_up:
                for text in request.texts:  # their places are for others
                    text.finish_reason = text.finish_reason or "given up"
            elif request.has_ended:
                request.answered.set()
            else:
                self.growing.append(request)
        return going


class Batcher:
    """Makes the texts of requests from many threads."""

    def __init__(self, sampler: Sampler, batch_size: int = BATCH_SIZE) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.batches: dict[str, Batch] = {}
        self.changed = threading.Condition()
        """Held where a batch gets a request or is given up."""
        self.searching = threading.Lock()
        threading.Thread(target=self.work, name="batcher", daemon=True).start()

    def make(self, request: Request, seconds: float) -> list[Text]:
        """The texts of a request; raises Overdue, and whatever went wrong in making them."""
        if request.config.num_beams > 1:
            return self.search(request, seconds)
        self.add(request, request.settings)
        if not request.answered.wait(seconds):
            request.give_up()
        if request.given_up:
            raise Overdue
        if request.error:
            raise request.error
        return request.texts

    def search(self, request: Request, seconds: float) -> list[Text]:
        """The likeliest texts; one search goes on at a time, beside the batches."""
        if not self.searching.acquire(timeout=seconds):
            raise Overdue
        try:
            how = request.config, request.n, request.stops, request.ignore_end
            for number, prompt in enumerate(request.prompts):
                if request.given_up:
                    raise Overdue
                request.texts += [replace(text, prompt_number=number) for text in beam_search(self.sampler, prompt, *how)]
            return request.texts
        finally:
            self.searching.release()

    def add(self, request: Request, settings: str) -> None:
        """Put a request into the batch of these settings."""
        with self.changed:
            if settings not in self.batches:
                self.batches[settings] = Batch(request, self.batch_size)
            self.batches[settings].waiting.append(request)
            self.changed.notify()

    def work(self) -> None:
        """Give each batch a run in turn, for ever."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.batches)
                turns = list(self.batches.items())
            for settings, batch in turns:
                while len(self.sampler.generation) > MOST_GRAPHS:  # the oldest goes, and is made anew when it is asked for
                    del self.sampler.generation[next(iter(self.sampler.generation))]
                try:
                    if not batch.run():
                        self.end(settings, batch)
                except Exception as error:  # whatever it is, those who wait are told, and the others go on
                    self.fail(settings, batch, error)

    def end(self, settings: str, batch: Batch) -> None:
        """Give up a batch; what has come meanwhile goes into another."""
        with self.changed:
            del self.batches[settings]
        for request in batch.waiting:
            self.add(request, settings)

    def fail(self, settings: str, batch: Batch, error: Exception) -> None:
        """Tell the one request of a batch what went wrong; of several each is tried by itself, for one may be the cause."""
        with self.changed:
            del self.batches[settings]
        requests = list(dict.fromkeys([*batch.growing, *batch.waiting]))
        for request in requests:
            if len(requests) == 1:
                request.error = error
                request.answered.set()
            else:
                request.restart()
                self.add(request, f"{settings} {id(request)}")
