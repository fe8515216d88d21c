"""Server-sent events as an answer, which ends where its client leaves or the server stops.

    return EventStream(events, close)

What is in an event is known by completing.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lmdist_export.serving.completing import error_event
from lmdist_export.serving.json_body import disconnect


class EventStream(Response):
    """Server-sent events."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        """Send `events`; `close` is called when they end, or their client leaves."""
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies hand on each event
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self.events, self.close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events. Starlette's own response has a group of tasks for that, which takes longer than the events."""
        sending = asyncio.current_task()
        assert sending

        def stop(_: object) -> None:
            sending.cancel()

        leaving = asyncio.ensure_future(disconnect(receive))
        leaving.add_done_callback(stop)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for events in self.events:
                await send({"type": "http.response.body", "body": events, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError as error:  # the server is stopping, or nobody is there
            await send({"type": "http.response.body", "body": error_event(error)})
        finally:
            leaving.remove_done_callback(stop)
            leaving.cancel()
            self.close()
