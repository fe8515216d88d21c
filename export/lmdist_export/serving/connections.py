"""Connections of clients: uvicorn's, with limits on their number and on the time that a client takes to send or to read.

uvicorn closes a connection that is idle after an answer. Here one is closed too that sends no request, or only a part of one,
or does not read its answer; and a request that is half sent does not hold up the end of the server. Requests are parsed by
httptools, in C, which takes a tenth of the time of uvicorn's other parser. This module does not know what is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
from collections.abc import Generator
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lmdist_export.serving.json_body import framing_fault

CANCEL_SECONDS = 2
"""For cancelled requests to say so to their clients."""
MAX_CONNECTIONS = 1_000
"""Another one is answered with 503 and closed. Each takes some 20 kB, and a descriptor."""
MAX_HEAD_BYTES = 2**16
"""Of a request without its body; some more where they come at once."""
READ_SECONDS = 30
"""From the first byte of a request, or the beginning of a connection, to the last byte of its body."""
WRITE_SECONDS = 60
"""For a client to read what was sent before."""
KEEP_ALIVE_SECONDS = 65
"""An idle connection stays open: longer than the idle timeout of the usual proxies, so that they close it first."""


class Connection(HttpToolsProtocol):
    """A connection of a client."""

    reading: asyncio.TimerHandle | None = None
    writing: asyncio.TimerHandle | None = None
    is_receiving = False
    """Whether a request has begun to come whose end has not."""
    has_head = False
    """Whether the headers of that one have come."""
    head_bytes = 0
    """Of what comes without a body: headers, and what follows a body in chunks."""
    fault = "the request is not HTTP/1.1"
    """What a client is told for what the parser does not go on with."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Accept a connection, or close it where there are too many."""
        super().connection_made(transport)
        assert self.parser is not None
        self.parser.set_dangerous_leniencies(lenient_chunked_length=True)  # `framing_fault` refuses two lengths by a sentence
        transport.set_write_buffer_limits(high=0)  # a client that does not read a short answer has to be seen too
        if len(self.connections) > MAX_CONNECTIONS:
            self.close_with(503, "this server has too many connections", unasked=True)
        else:
            self.reading = self.loop.call_later(READ_SECONDS, self.read_timed_out)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self.stop_timer("reading")
        self.stop_timer("writing")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request."""
        if self.transport.is_closing():
            return
        self.head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.is_receiving and self.head_bytes > MAX_HEAD_BYTES:
            self.close_with(431, f"the request has more than {MAX_HEAD_BYTES:,} bytes of headers")
        elif self.is_receiving or not self.is_answering:
            self.reading = self.reading or self.loop.call_later(READ_SECONDS, self.read_timed_out)
        else:
            self.stop_timer("reading")

    # --- of the parser

    def on_message_begin(self) -> None:
        """Begin to receive a request."""
        self.is_receiving, self.has_head = True, False
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; what follows a body in chunks is none, or it would pass a proxy that looks at headers."""
        if not self.has_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Take the headers of a request; refuse those whose end may be elsewhere for a proxy."""
        self.has_head, self.head_bytes = True, 0
        assert self.parser is not None
        upgrades, fault = self.parser.should_upgrade(), framing_fault(self.headers)
        if upgrades and {b"content-length", b"transfer-encoding"} & dict(self.headers).keys():
            fault = "the request has Upgrade and a body; one of them is expected"  # the parser drops its body
        if fault:
            self.fault = fault
            raise ValueError(fault)  # which ends the parser, so that nothing behind it is a request
        begun = self.cycle
        super().on_headers_complete()
        if upgrades and self.cycle is not begun:
            self.cycle.keep_alive = False  # the parser drops what has come behind it

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self.head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Take the end of a request."""
        self.is_receiving, self.head_bytes = False, 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self.is_receiving = True
        self.close_with(400, self.fault)

    # --- time

    @property
    def is_answering(self) -> bool:
        """Return whether a request, of which the headers have come, is not answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def read_timed_out(self) -> None:
        """Close a connection whose client has not sent its request in time."""
        self.reading = None
        if self.pipeline or (self.is_answering and not self.has_head):  # the one before it is answered first
            self.reading = self.loop.call_later(READ_SECONDS, self.read_timed_out)
        elif not self.transport.is_closing():
            self.close_with(408, f"the request was not received within {READ_SECONDS} seconds")

    def pause_writing(self) -> None:
        """Wait until the client has read, but not for ever."""
        super().pause_writing()
        self.writing = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on writing."""
        self.stop_timer("writing")
        super().resume_writing()

    def shutdown(self) -> None:
        """Close a connection at the end of the server, once the request that was received is answered."""
        if self.is_answering and not self.is_receiving:
            super().shutdown()
        else:
            self.close_with(503, "this server is stopping")

    def close_with(self, status: int, message: str, *, unasked: bool = False) -> None:
        """Close the connection, with an answer where a part of a request was received, or `unasked`."""
        half_sent = self.is_answering
        if half_sent:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if unasked or (not self.cycle.response_started if half_sent else self.is_receiving):
            kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
            body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}})
            lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "content-type: application/json", "connection: close"]
            lines += [f"content-length: {len(body)}", *(["retry-after: 1"] if status == HTTPStatus.SERVICE_UNAVAILABLE else [])]
            self.transport.write("\r\n".join([*lines, "", body]).encode())
        self.transport.close()

    def stop_timer(self, name: str) -> None:
        """Stop one of the timers."""
        if timer := getattr(self, name):
            timer.cancel()
            setattr(self, name, None)


class Server(uvicorn.Server):
    """uvicorn's server, which returns once it has answered all requests after a SIGTERM or Ctrl-C, or has cancelled them."""

    num_cancelled = 0
    """Requests that had not ended in the time that they had after the signal."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Have open requests end, then cancel them; these are answered that the server is stopping."""
        await super().shutdown(sockets)
        if late := self.server_state.tasks.copy():
            self.num_cancelled = len(late)
            await asyncio.wait(late, timeout=CANCEL_SECONDS)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle the signals inside; uvicorn's own would raise them again, and the exit code would be theirs."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def server_of(app: Any, drain_seconds: int) -> Server:
    """Return a server of an ASGI application; open requests have `drain_seconds` to end after a signal."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=drain_seconds,
    )
    return Server(config)
