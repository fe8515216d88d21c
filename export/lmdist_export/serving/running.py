"""Requests of the batching thread, waited for in an event loop: until they end, their client leaves, or their time is over.

    growth = Growth()
    job = Request(..., on_growth=growth.on_growth, on_end=growth.on_end)
    await finish(service.batcher, job, growth, receive, deadline)           # or, for who wants the tokens as they come,
    service.batcher.submit(job)
    async for text, tokens, finish_reason in growth: ...

This module knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from weakref import WeakKeyDictionary

from lmdist_export.sampling.generation import Text
from lmdist_export.serving.batching import Batcher, Request, Scoring
from lmdist_export.serving.json_body import Receive, disconnect

Event = tuple[Text, list[int], str]
"""A text, the tokens that were appended to it, and why it has ended, if it has."""


class ClientLeft(Exception):
    """The client has disconnected: nobody waits for the answer."""


class Mailbox:
    """Events on their way from the batching thread into a loop, which is woken once for all that come together.

    At each time that it is woken the two threads contend for the interpreter's lock, and a step brings an event for each text.
    """

    def __init__(self) -> None:
        self.events: deque[tuple[asyncio.Queue[Event | None], Event | None]] = deque()
        self.is_woken = False

    def put(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Event | None], event: Event | None) -> None:
        """Have the loop put an event into a queue."""
        self.events.append((queue, event))
        if not self.is_woken:
            self.is_woken = True
            with suppress(RuntimeError):  # the loop has ended before the batching thread
                loop.call_soon_threadsafe(self.deliver)

    def deliver(self) -> None:
        """Put all events into their queues."""
        self.is_woken = False
        while self.events:
            queue, event = self.events.popleft()
            queue.put_nowait(event)


MAILBOXES: WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = WeakKeyDictionary()


class Growth:
    """What the texts of a request have grown, as an asynchronous iterator; the batching thread calls its methods."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.mailbox = MAILBOXES.setdefault(self.loop, Mailbox())
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()

    def on_growth(self, text: Text, tokens: list[int]) -> None:
        """Take tokens that were appended to a text."""
        self.put((text, tokens, text.finish_reason))

    def on_end(self) -> None:
        """Take the end of all texts, or of the request."""
        self.put(None)

    def put(self, event: Event | None) -> None:
        """Hand an event to the loop."""
        self.mailbox.put(self.loop, self.events, event)

    async def __aiter__(self) -> AsyncIterator[Event]:
        while (event := await self.events.get()) is not None:
            yield event


async def finish(
    batcher: Batcher, job: Request | Scoring, growth: Growth, receive: Receive, deadline: float, *, completes: bool = False
) -> None:
    """Run a request to its end; raises its error, QueueFull at once, TimeoutError at the loop's time `deadline`, or ClientLeft.

    Whatever ends the waiting, the request is cancelled then, which frees its rows within a step.
    """
    batcher.submit(job, completes=completes)
    leaving, ending = asyncio.ensure_future(disconnect(receive)), asyncio.ensure_future(end_of(growth))
    try:
        async with asyncio.timeout_at(deadline):
            await asyncio.wait({leaving, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not ending.done():
            raise ClientLeft
        if job.error:
            raise job.error
    finally:
        job.cancel()
        leaving.cancel()
        ending.cancel()


async def end_of(growth: Growth) -> None:
    """Wait for the end."""
    async for _ in growth:
        pass
