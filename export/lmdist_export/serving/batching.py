"""Continuous batching: one thread does all inference, and many requests share its calls.

    batcher = Batcher(sampler)
    texts = batcher.generate(Request(sampler, prompts, config, seed), timeout_seconds=60)      # in each request's own thread
    batcher.submit(request)     # or at once, with callbacks; raises QueueFull

Requests of equal settings (those that hold for all rows of an inference call) share a batch: a text joins it after the current
call, which takes 10 ms at most or one token, and leaves it when it ends (shared_batch.py). Everything else is work in steps as
short (requests.py): prompts that are long are read in pieces, and so is what is scored; a search goes token by token.

A call of a batch and other work for as long take turns. The batch goes first whose requests have had the least so far, and so
does other work; what is new begins where the others are. So a long request delays a short one by a few steps, not by its
length, and whether a client is still there is looked at before every step. The same seed gives the same text whatever else is
in the batch (sampling/generation.py); with int4 as far as the last bits of the logits choose no other token.

This module knows ids, and nothing of HTTP.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from lmdist_export.sampling.generation import BATCH_SIZE, Text
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.serving.requests import Paces, Request, Scoring, Work, WorkSteps
from lmdist_export.serving.shared_batch import CALL_SECONDS, SharedBatch

__all__ = ["Batcher", "Figures", "QueueFull", "Request", "RequestTimeout", "Scoring"]

MAX_GRAPHS = 8
"""Options with other nodes need a graph of their own; requests could ask for 68 of them."""
MAX_QUEUED_TOKENS = 200_000
"""To read and to write for all requests together: a minute or two of work for a small model on two cores."""
RATE_SECONDS = 1.0
"""Of work, over which the rate of tokens is measured."""


class RequestTimeout(Exception):
    """A request was not finished in its time, or was cancelled."""


class QueueFull(Exception):
    """More work waits than the batcher accepts."""

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__(f"the server has as much work as it accepts: try again in {retry_after_seconds:.0f} seconds")
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True)
class Figures:
    """What a batcher does, and has done so far."""

    requests_waiting: int
    """Of which nothing was read yet."""
    requests_running: int
    tokens_queued: int
    """To read and to write at most, of all requests."""
    rows: int
    """Of the last call."""
    calls_by_rows: dict[int, int]
    """How many calls had so many rows."""
    tokens_read: int
    tokens_written: int


class Batcher:
    """Does the work of many clients in one thread."""

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int = BATCH_SIZE,
        max_queued_tokens: int = MAX_QUEUED_TOKENS,
        after_reports: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to wait for work; `after_reports` is called in the batching thread when it has reported what a call brought.

        Whoever is woken by that contends with it for the interpreter's lock: so it is done just before it computes, or waits.
        """
        self.sampler, self.after_reports = sampler, after_reports
        self.batch_size = batch_size
        self.max_queued_tokens = max_queued_tokens
        self.changed = threading.Condition()
        """Held where work comes or goes."""
        self.works: dict[Work, WorkSteps] = {}
        """All work that has not ended, and its steps."""
        self.arrived: deque[Work] = deque()
        self.is_closing = False
        # The rest is of the batching thread alone.
        self.batches: dict[str, SharedBatch] = {}
        self.paces = Paces()
        self.turns: list[tuple[float, int, Work]] = []
        """A heap of the work that has a step to do: that with the least seconds first, of equal ones the newest."""
        self.numbers = count(0, -1)
        self.least_seconds = self.least_batch_seconds = 0.0
        """Of the work, and of the batch, that had the last turn: there new ones begin, and do not go first for long."""
        self.credit = 0.0
        """Seconds that work may take before the next call of a batch."""
        self.rows = 0
        self.calls_by_rows: Counter[int] = Counter()
        self.num_read = self.num_written = 0
        """Tokens, of work that has ended."""
        self.num_measured, self.busy_seconds = 0, 0.0
        """Tokens that were done when the rate was measured, and the seconds of work since then."""
        self.tokens_per_second = 0.0
        self.thread = threading.Thread(target=self.run, name="batcher", daemon=True)
        self.thread.start()

    # --- of any thread

    def generate(self, request: Request, timeout_seconds: float) -> list[Text]:
        """Return the texts of a request; raises RequestTimeout, QueueFull, and whatever error occurred in generating them."""
        self.submit(request)
        if not request.finished.wait(timeout_seconds):
            request.cancel()
        if request.error:
            raise request.error
        if request.cancelled:
            raise RequestTimeout
        return request.texts

    def submit(self, work: Work, *, completes: bool = False) -> None:
        """Queue work and return at once; raises QueueFull where all that is queued would be more than is accepted.

        Work that `completes` what was accepted is accepted too: else that was done in vain, and would be asked for again.
        """
        with self.changed:
            queued = self.num_queued()
            excess = queued + work.cost - self.max_queued_tokens
            if self.is_closing or (queued and excess > 0 and not completes):
                raise QueueFull(max(1.0, excess / self.tokens_per_second if self.tokens_per_second else 1.0))
            self.works[work] = work.steps(self.paces, self.offer)
            self.arrived.append(work)
            self.changed.notify()

    def num_queued(self) -> int:
        """Return how many tokens are to be read and written; `changed` is held."""
        return sum(max(0, work.left) for work in self.works)

    def figures(self) -> Figures:
        """Return what is done now, and was so far."""
        with self.changed:
            running = sum(work.num_read > 0 for work in self.works)
            read = self.num_read + sum(work.num_read for work in self.works)
            written = self.num_written + sum(work.num_written for work in self.works)
            calls = dict(self.calls_by_rows)
            return Figures(len(self.works) - running, running, self.num_queued(), self.rows, calls, read, written)

    def close(self) -> None:
        """Wait until all work that was queued has ended, and end the thread; no more is accepted."""
        with self.changed:
            self.is_closing = True
            self.changed.notify()
        self.thread.join()

    # --- of the batching thread

    def run(self) -> None:
        """Give all work its turn, round by round, until the batcher is closed."""
        while self.wait_for_work():
            began = time.perf_counter()
            try:
                self.give_turns(began)
            except Exception as error:  # a defect: it ends what is being done, but not the server
                logging.getLogger(__name__).exception("the batching thread has failed")
                self.batches.clear()
                for work in [*self.works]:
                    self.end(work, error)
            self.measure(time.perf_counter() - began)

    def give_turns(self, began: float) -> None:
        """Begin new work, give the batch that goes first a call, and other work its steps."""
        while self.arrived:
            self.advance(self.arrived.popleft())
        for work in [*self.works]:
            if work.cancelled:
                self.end(work)
        if self.batches:
            self.step_batch(*min(reversed(self.batches.items()), key=lambda item: item[1].seconds))
            self.credit = min(self.credit + time.perf_counter() - began, CALL_SECONDS)
        self.step_works()

    def wait_for_work(self) -> bool:
        """Wait for something to do; return False where there will be nothing more."""
        self.after_reports()
        with self.changed:
            self.changed.wait_for(lambda: self.arrived or self.turns or self.batches or self.is_closing)
            return bool(self.works or not self.is_closing)

    def offer(self, request: Request) -> int:
        """Have a batch take the texts of a request that are ready; return how many may wait for it."""
        batch = self.batches.get(request.batch_key)
        if batch is None:
            batch = self.batches[request.batch_key] = SharedBatch(request, self.batch_size, self.least_batch_seconds)
        return batch.offer(request)

    def step_works(self) -> None:
        """Give work steps for about as long as a call of a batch takes."""
        if not self.batches:
            self.credit = CALL_SECONDS
        if self.turns and self.credit > 0:
            self.after_reports()
        while self.turns and self.credit > 0:
            self.least_seconds, _, work = heapq.heappop(self.turns)
            began = time.perf_counter()
            self.advance(work)
            self.credit -= time.perf_counter() - began
        if not self.turns:
            self.credit = 0.0

    def advance(self, work: Work) -> None:
        """Do the next step of work; the first one, and that after waiting, only find out whether there is more to do."""
        steps = self.works.get(work)
        if steps is None or work.cancelled:
            self.end(work)
            return
        began = time.perf_counter()
        try:
            work.is_waiting = bool(next(steps))
        except StopIteration:
            self.end(work)
        except Exception as error:  # whatever it is, it is reported to the client, and others continue
            self.end(work, error)
        else:
            work.seconds = max(work.seconds, self.least_seconds) + time.perf_counter() - began
            if not work.is_waiting:
                heapq.heappush(self.turns, (work.seconds, next(self.numbers), work))

    def step_batch(self, key: str, batch: SharedBatch) -> None:
        """Make an inference call of a batch, and report what it has generated."""
        self.sampler.keep_graphs(batch.batch.features, MAX_GRAPHS)
        self.least_batch_seconds = batch.seconds
        try:
            joined, growth = batch.step()
        except Exception as error:
            self.fail(key, batch, error)
            return
        self.rows = len(growth)
        self.calls_by_rows[self.rows] += 1
        for request, text, tokens in growth:
            try:
                request.grow(text, tokens)
            except Exception as error:  # of its client's callback
                self.end(request, error)
        for request in [*joined, *(request for request, text, _ in growth if text.finish_reason)]:
            if request.is_waiting:
                self.advance(request)
        self.drop_if_empty(key)

    def drop_if_empty(self, key: str) -> None:
        """Forget a batch without texts."""
        if key in self.batches and self.batches[key].is_empty:
            del self.batches[key]

    def fail(self, key: str, batch: SharedBatch, error: Exception) -> None:
        """Report an error to the one request of a batch; of several, each is tried again alone, since one may be the cause."""
        del self.batches[key]
        requests = batch.requests
        for request in requests:
            if len(requests) == 1:
                self.end(request, error)
            else:
                request.restart()
                request.batch_key = f"{key} {id(request)}"
                with self.changed:
                    self.works[request].close()
                    self.works[request] = request.steps(self.paces, self.offer)
                if request.is_waiting:
                    self.advance(request)

    def end(self, work: Work, error: Exception | None = None) -> None:
        """End work: its steps are closed, its texts leave their batch, and its client is told."""
        with self.changed:
            steps = self.works.pop(work, None)
            self.num_read += work.num_read if steps else 0
            self.num_written += work.num_written if steps else 0
        if steps is None:
            return
        steps.close()
        work.error = error
        try:
            if isinstance(work, Request) and work.batch_key in self.batches:
                self.batches[work.batch_key].remove(work)
                self.drop_if_empty(work.batch_key)
        finally:
            work.finish()

    def measure(self, seconds: float) -> None:
        """Count the seconds of a round for the rate of tokens."""
        self.busy_seconds += seconds
        if self.busy_seconds > RATE_SECONDS:
            figures = self.figures()
            done = figures.tokens_read + figures.tokens_written
            self.tokens_per_second = (done - self.num_measured) / self.busy_seconds
            self.num_measured, self.busy_seconds = done, 0.0
