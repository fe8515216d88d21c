"""A connection of lmdist-serve closes what is no request, whatever a client sends in whatever pieces."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from lmdist_export.serving import connections
from lmdist_export.serving.middleware import RequestMiddleware

REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers with the body of a request, a moment after it has come."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    await asyncio.sleep(0.05)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def talk_to_a_server(talk: Talk) -> list[list[tuple[bytes, bytes]]]:
    """Return the headers of each request that has come to the application."""
    calls = []

    async def noted(scope: Any, receive: Any, send: Any) -> None:
        calls.append(scope["headers"])
        await echo(scope, receive, send)

    talk_to(lambda: connections.server_of(noted, 1), talk)
    return calls


def talk_to(server_of: Callable[[], uvicorn.Server], talk: Talk) -> None:
    async def run(listening: socket.socket) -> None:
        server = server_of()
        serving = asyncio.ensure_future(server.serve([listening]))
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        try:
            await asyncio.wait_for(talk(reader, writer), 20)
        finally:
            writer.close()
            server.should_exit = True
            await serving

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        asyncio.run(run(listening))


async def answers(reader: asyncio.StreamReader, bodies: list[bytes]) -> None:
    for body in bodies:
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert await reader.readexactly(len(body)) == body


def test_requests_that_come_in_pieces_or_together_are_each_answered() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for at in (1, 20, len(REQUEST) - 1):
            writer.write(REQUEST[:at])
            await asyncio.sleep(0.02)
            writer.write(REQUEST[at:])
            await answers(reader, [b"abc"])
        writer.write(REQUEST * 3 + CHUNKED + b"2\r\nde\r\n1;x=y\r\nf\r\n0\r\nTrailer: t\r\n\r\n" + REQUEST)
        await answers(reader, [b"abc", b"abc", b"abc", b"def", b"abc"])

    talk_to_a_server(talk)


@pytest.mark.parametrize(
    ("begin", "sent", "status"),
    [
        (b"", b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 69_000, 431),
        (b"", b"GET /" + b"y" * 69_000, 431),
        (b"", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 11_500, 431),
        (CHUNKED + b"2\r\nde\r\n0\r\n", b"X: y\r\n" * 11_500, 431),
        (b"", b"\x16\x03\x01\x02", 400),
        (b"", b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"", b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"", CHUNKED + b"zz\r\n", 400),
    ],
    ids="header address headers trailers tls version length chunk".split(),
)
def test_what_is_no_request_is_answered_and_closed(begin: bytes, sent: bytes, status: int) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """No byte follows the one that is too much: to a client that goes on sending, the answer may be lost."""
        for piece in (begin, *(sent[start : start + 10_000] for start in range(0, len(sent), 10_000))):
            writer.write(piece)
            await asyncio.sleep(0.01)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert json.loads(await reader.read())["error"]["type"] == "invalid_request_error"

    talk_to_a_server(talk)


NEXT = b"GET /next HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [
        (b"Content-Length: 44\r\nTransfer-Encoding: chunked", "both Content-Length and Transfer-Encoding"),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 44", "both Content-Length and Transfer-Encoding"),
        (b"Transfer-Encoding: identity\r\nContent-Length: 5", "both Content-Length and Transfer-Encoding"),
        (b"Transfer-Encoding: gzip, chunked", "a Transfer-Encoding that is not chunked"),
        (b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked", "a Transfer-Encoding that is not chunked"),
        (b"Transfer-Encoding: xchunked", "a Transfer-Encoding that is not chunked"),
        (b"Transfer-Encoding: chunked, identity", "not HTTP/1.1"),
        (b"Transfer-Encoding : chunked", "not HTTP/1.1"),
        (b"Transfer-Encoding:\r\n chunked", "not HTTP/1.1"),
        (b"X: a\n Transfer-Encoding: chunked", "not HTTP/1.1"),
        (b"X: a\nTransfer-Encoding: chunked", "not HTTP/1.1"),
        (b"Content-Length: 5\r\nContent-Length: 5", "not HTTP/1.1"),
        (b"Content-Length: 5\r\nContent-Length: 44", "not HTTP/1.1"),
        (b"Content-Length: 5, 5", "not HTTP/1.1"),
        (b"Host: y\r\nTransfer-Encoding: chunked", "several Host headers"),
        (b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 44", "Upgrade and a body"),
    ],
)
@pytest.mark.parametrize("line", [b"GET /ping", b"POST /v1/chat/completions"])
def test_a_request_whose_end_is_ambiguous_gets_one_answer_and_the_end(line: bytes, headers: bytes, sentence: str) -> None:
    """Whatever reads its body or does not: what stands behind it may be another request, or not, for a proxy."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"%b HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n" % (line, headers))
        await asyncio.sleep(0.01)
        writer.write(b"0\r\n\r\n" + NEXT)
        found = await reader.read()
        assert found.startswith(b"HTTP/1.1 400 ")
        assert found.count(b"HTTP/1.1 ") == 1
        assert sentence in json.loads(found.partition(b"\r\n\r\n")[2])["error"]["message"]

    assert not talk_to_a_server(talk)


@pytest.mark.parametrize("path", ["/ping", "/invocations"])
@pytest.mark.parametrize("parser", ["httptools", "h11"])
def test_two_lengths_end_a_connection_of_mlflows_server_too(parser: Any, path: str) -> None:
    """By each of uvicorn's parsers: of two lengths h11 takes one."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        two = b"Content-Length: 44\r\nTransfer-Encoding: chunked"
        writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n0\r\n\r\n" % (path.encode(), two) + NEXT)
        found = await reader.read()
        assert found.startswith(b"HTTP/1.1 400 ")
        assert found.count(b"HTTP/1.1 ") == 1

    config = uvicorn.Config(RequestMiddleware(echo), http=parser, lifespan="off", log_config=None)
    talk_to(lambda: uvicorn.Server(config), talk)


def test_an_upgrade_without_a_body_is_ignored_and_ends_the_connection() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + NEXT)
        await answers(reader, [b""])
        assert await reader.read() == b""

    assert len(talk_to_a_server(talk)) == 1


def test_what_follows_a_body_in_chunks_is_no_header() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"2\r\nde\r\n0\r\nAuthorization: Bearer k\r\nContent-Length: 9\r\nHost: y\r\n\r\n" + REQUEST)
        await answers(reader, [b"de", b"abc"])

    assert [[name for name, _ in headers] for headers in talk_to_a_server(talk)] == [
        [b"host", b"transfer-encoding"],
        [b"host", b"content-length"],
    ]


def test_who_sends_line_breaks_only_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a request they are allowed, and they begin none."""
    monkeypatch.setattr(connections, "READ_SECONDS", 0.2)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            writer.write(b"\r\n" + REQUEST)
            await answers(reader, [b"abc"])
        writer.write(b"\r\n")
        assert await reader.read() == b""

    talk_to_a_server(talk)


def test_a_request_behind_another_has_its_time_once_that_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READ_SECONDS", 0.02)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(REQUEST + REQUEST[:20])
        await answers(reader, [b"abc"])
        assert (await reader.read()).startswith(b"HTTP/1.1 408 ")

    talk_to_a_server(talk)
