"""What lmdist-serve reports about each request: its id, a line in the access log, and its figures in the metrics.

    app = Observed(app, metrics, write=print)       # an ASGI application around another
    note_of(scope).work = request                   # inside

A line is JSON: time, request_id, client, method, route, status, seconds, bytes, and what was noted. It has no text of a request
or an answer, no address but that of the route, and no header but a request id of plain letters.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from lmdist_export.serving.failures import CLIENT_LEFT
from lmdist_export.serving.json_body import App, Message, Receive, Send
from lmdist_export.serving.metrics import Metrics
from lmdist_export.serving.requests import Work

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,100}")


@dataclass
class Note:
    """What is known about a request."""

    request_id: str
    route: str = "other"
    """The path as it is served; those that are not may have anything in them."""
    prompt_tokens: int = 0
    """Of its prompts."""
    work: Work | None = None
    """What it asks of the batching thread."""
    first_token_seconds: float | None = None
    """Of a stream."""
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Return the time since the request began."""
        return time.perf_counter() - self.began

    def token_counts(self) -> tuple[int, int]:
        """Return how many tokens of its prompts were read, and how many were generated, however it has ended."""
        return (min(self.prompt_tokens, self.work.num_read), self.work.num_written) if self.work else (0, 0)


def note_of(scope: Message) -> Note:
    """Return the note of a request."""
    return scope["lmdist.note"]


class Observed:
    """An ASGI application whose requests are reported."""

    def __init__(self, app: App, metrics: Metrics, write: Callable[[str], None] | None) -> None:
        """Report the requests of `app`; `write` takes the lines of the access log, None drops them."""
        self.app, self.metrics, self.write = app, metrics, write

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, and report it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        note = Note(given.decode("ascii") if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope["lmdist.note"] = note
        status, sent = CLIENT_LEFT, 0

        async def observed_send(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", note.request_id.encode())]
            sent += len(message.get("body", b""))
            await send(message)

        self.metrics.open_requests.inc()
        try:
            await self.app(scope, receive, observed_send)
        finally:
            self.metrics.open_requests.dec()
            self.report(scope, note, status, sent)

    def report(self, scope: Message, note: Note, status: int, sent: int) -> None:
        """Count a request that was answered, and log it."""
        seconds, (prompt_tokens, generated_tokens) = note.seconds, note.token_counts()
        self.metrics.requests.labels(note.route, str(status)).inc()
        self.metrics.seconds.labels(note.route).observe(seconds)
        self.metrics.prompt_tokens.inc(prompt_tokens)
        self.metrics.generated_tokens.inc(generated_tokens)
        if note.first_token_seconds is not None:
            self.metrics.first_token_seconds.observe(note.first_token_seconds)
        if self.write is None:
            return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": note.request_id,
            "client": scope["client"][0] if scope.get("client") else None,
            "method": scope["method"],
            "route": note.route,
            "status": status,
            "seconds": round(seconds, 4),
            "bytes": sent,
        }
        if prompt_tokens or generated_tokens:
            line |= {"prompt_tokens": prompt_tokens, "generated_tokens": generated_tokens}
        if note.first_token_seconds is not None:
            line["first_token_seconds"] = round(note.first_token_seconds, 4)
        self.write(json.dumps(line))
