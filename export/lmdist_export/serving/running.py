"""Requests of the batching thread, waited for in an event loop: until they end, their client leaves, or their time is over.

    growth = Growth()
    job = Request(..., on_growth=growth.on_growth, on_end=growth.on_end)
    await finish(service.batcher, job, growth, receive, deadline)           # or, for who wants the tokens as they come,
    service.batcher.submit(job)
    async for events in growth: ...     # (text, tokens, finish_reason) of each text that has grown since

This module knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TypeVar
from weakref import WeakKeyDictionary

from lmdist_export.sampling.generation import Text
from lmdist_export.serving.batching import Batcher, Request, Scoring
from lmdist_export.serving.json_body import Receive, disconnect

Event = tuple[Text, list[int], str]
"""A text, the tokens that were appended to it, and why it has ended, if it has."""
T = TypeVar("T")

SHORT_BYTES = 4_096
"""Of a body, and of what is written, up to which a request is answered without a thread."""
SHORT_TOKENS = 512


class ClientLeft(Exception):
    """The client has disconnected: nobody waits for the answer."""


async def done_by(thread: bool, work: Callable[[], T]) -> T:
    """Return what `work` returns: by a thread where it is long. What is short is done at once, for a hop takes longer."""
    return await asyncio.to_thread(work) if thread else work()


class Mailbox:
    """Events on their way from the batching thread into a loop, which is woken once for all that come together.

    At each time that it is woken the two threads contend for the interpreter's lock, and a step brings an event for each text.
    """

    def __init__(self) -> None:
        self.events: deque[tuple[Growth, Event | None]] = deque()
        self.is_waiting = False
        """Whether the loop is to be woken, or was."""

    def put(self, growth: Growth, event: Event | None) -> None:
        """Have the loop of a growth take an event, once `wake_loops` is called."""
        self.events.append((growth, event))
        if not self.is_waiting:
            self.is_waiting = True
            NEWS.append(growth)

    def deliver(self) -> None:
        """Hand over all events."""
        self.is_waiting = False
        while self.events:
            growth, event = self.events.popleft()
            growth.take(event)


NEWS: deque[Growth] = deque()
"""A growth of each loop that is to be woken."""


def wake_loops() -> None:
    """Have the loops take their events. The batching thread does so once a round, when its own work in Python is done."""
    with suppress(IndexError):  # none is left; while a bundle replaces another, two threads take them
        while True:
            growth = NEWS.popleft()
            with suppress(RuntimeError):  # the loop has ended before the batching thread
                growth.loop.call_soon_threadsafe(growth.mailbox.deliver)


MAILBOXES: WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = WeakKeyDictionary()


class Growth:
    """What the texts of a request have grown, as an asynchronous iterator; the batching thread calls two of its methods."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.mailbox = MAILBOXES.setdefault(self.loop, Mailbox())
        self.events: dict[tuple[int, int], Event] = {}
        """Those that nobody has taken yet: what a text grows meanwhile is one."""
        self.is_over = False
        self.changed = asyncio.Event()

    def on_growth(self, text: Text, tokens: list[int]) -> None:
        """Take tokens that were appended to a text."""
        self.mailbox.put(self, (text, tokens, text.finish_reason))

    def on_end(self) -> None:
        """Take the end of all texts, or of the request."""
        self.mailbox.put(self, None)

    def take(self, event: Event | None) -> None:
        """Take an event in the loop."""
        self.changed.set()
        if event is None:
            self.is_over = True
            return
        text, tokens, reason = event
        key = text.prompt_number, text.number
        before = self.events.get(key)
        self.events[key] = (text, [*before[1], *tokens], reason) if before else event

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        """Yield what waits, of each text together, again and again until the end."""
        while self.events or not self.is_over:
            await self.changed.wait()
            self.changed.clear()
            events, self.events = [*self.events.values()], {}
            if events:
                yield events


async def finish(
    batcher: Batcher, job: Request | Scoring, growth: Growth, receive: Receive, deadline: float, *, completes: bool = False
) -> None:
    """Run a request to its end; raises its error, QueueFull at once, TimeoutError at the loop's time `deadline`, or ClientLeft.

    Whatever ends the waiting, the request is cancelled then, which frees its rows within a step.
    """
    batcher.submit(job, completes=completes)
    leaving = asyncio.ensure_future(disconnect(receive))
    leaving.add_done_callback(lambda _: growth.changed.set())
    try:
        async with asyncio.timeout_at(deadline):
            while not growth.is_over:
                if leaving.done():
                    raise ClientLeft
                await growth.changed.wait()
                growth.changed.clear()
        if job.error:
            raise job.error
    finally:
        job.cancel()
        leaving.cancel()
