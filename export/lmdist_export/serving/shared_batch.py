"""A batch that requests share: texts of equal settings, whatever their requests, are rows of the same inference calls.

A text joins between two calls and leaves when it ends. The next place is for a text of the request that has had the least of
the calls, so none waits for the last text of a large one. Where requests without any text in a full batch wait for a place,
texts that have had their turn make room, and come back later: the state of a text is a few kilobytes. All of it happens in the
batching thread.
"""

from __future__ import annotations

import heapq
import time
from collections import deque

from lmdist_export.sampling.generation import Batch, Text
from lmdist_export.sampling.state import State
from lmdist_export.serving.requests import Request

CALL_SECONDS = 0.01
"""Of an inference call: a text that has ended waits for its end, and one that has come waits to join; each call takes half a
millisecond beside its tokens."""
TURN_SECONDS = 0.5
"""How long a text keeps its place in a batch while others wait for one."""


class SharedBatch:
    """Requests with one batch key, and the inference calls that generate their texts."""

    def __init__(self, like: Request, batch_size: int, seconds: float) -> None:
        self.seconds = seconds
        """What its calls took for each request that shared them, from the start that fair turns give it."""
        self.least_row_seconds = 0.0
        """Of the request whose text was the last to join: there new requests begin, so that they do not go first for long."""
        self.batch = Batch(like.sampler, like.generation, stream=True)
        self.batch.pace.seconds = CALL_SECONDS
        self.batch_size = batch_size
        self.queue: dict[Request, None] = {}
        """Requests with texts that are ready, in their order."""
        self.owners: dict[int, tuple[Request, float]] = {}
        """The request of each text in the batch, by the text's `id`, and when it joined."""

    @property
    def is_empty(self) -> bool:
        """Return whether no text is in the batch or can join it."""
        return not self.queue and not self.batch.texts

    @property
    def requests(self) -> list[Request]:
        """Return all requests with texts in the batch, or ready for it."""
        return list(dict.fromkeys([*(request for request, _ in self.owners.values()), *self.queue]))

    def offer(self, request: Request) -> int:
        """Take the texts of a request that are ready, now or later; return how many may wait for that."""
        request.row_seconds = max(request.row_seconds, self.least_row_seconds)
        self.queue.setdefault(request)
        return self.batch_size

    def step(self) -> tuple[list[Request], list[tuple[Request, Text, list[int]]]]:
        """Make an inference call; return the requests whose texts have joined for it, and what it has appended to each."""
        began = time.perf_counter()
        self.make_room()
        joined = self.admit(self.batch_size - len(self.batch))
        rows = [self.owners[id(text)][0] for text in self.batch.texts]
        growth = [(self.owners[id(text)][0], text, tokens) for text, tokens in self.batch.step()]
        seconds = time.perf_counter() - began
        self.seconds += seconds / len(set(rows))
        for request in rows:
            request.row_seconds += seconds / len(rows)
        for _, text, _ in growth:
            if text.finish_reason:
                del self.owners[id(text)]
        return joined, growth

    def make_room(self) -> None:
        """Have texts that have had their turn wait again, where requests without any text in the batch wait for a place."""
        running = {request for request, _ in self.owners.values()}
        lacking = sum(request not in running for request in self.queue) - (self.batch_size - len(self.batch))
        if lacking <= 0:
            return
        until = time.perf_counter() - TURN_SECONDS
        joined = [(self.owners[id(text)][1], row) for row, text in enumerate(self.batch.texts)]
        rows = [row for when, row in sorted(joined)[:lacking] if when < until]
        for text, state in self.batch.leave(rows) if rows else ():
            request, _ = self.owners.pop(id(text))
            request.ready.appendleft((text, state))
            self.queue.setdefault(request)

    def admit(self, free: int) -> list[Request]:
        """Have texts join in free places; return their requests."""
        joining: list[tuple[Text, State]] = []
        requests: list[Request] = []
        now = time.perf_counter()
        taking = deque(heapq.nsmallest(free, self.queue, key=lambda request: request.row_seconds))
        while taking and len(joining) < free:
            request = taking.popleft()
            joining.append(request.ready.popleft())
            requests.append(request)
            self.owners[id(joining[-1][0])] = request, now
            self.least_row_seconds = request.row_seconds
            if request.ready:
                taking.append(request)  # another text of it, once each has one
            else:
                del self.queue[request]
        self.batch.join(joining)
        return requests

    def remove(self, request: Request) -> None:
        """Remove the texts of a request."""
        self.queue.pop(request, None)
        rows = [row for row, text in enumerate(self.batch.texts) if self.owners[id(text)][0] is request]
        for text, _ in self.batch.leave(rows) if rows else ():
            del self.owners[id(text)]
            text.finish_reason = "cancelled"
