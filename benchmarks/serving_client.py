"""Clients of lmdist-serve in one process, for benchmarks/serving.py: they ask, wait for the answer, and ask again.

A worker (workers.py): each question is a Load in JSON, each answer what its clients have measured. The clients speak HTTP by
asyncio and parse nothing while they measure, because they run on the server's CPUs.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from typing import Any

HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
DONE = b"data: [DONE]"
END_OF_HEAD = b"\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
LENGTH = re.compile(rb"content-length: (\d+)\r\n", re.IGNORECASE)


@dataclass
class Load:
    """What clients ask of a server."""

    port: int
    clients: int
    bodies: list[dict[str, Any]]
    """The requests, which the clients take in turn."""
    beside: list[dict[str, Any]] = field(default_factory=list)
    """Requests that one more client sends meanwhile, again and again; they are not measured."""
    leave_every: int = 0
    """Of so many requests, one is left by its client before the answer; 0: none."""


@dataclass
class Answer:
    """What a client has received of a request."""

    began: float
    times: list[float]
    """When each piece came, by time.perf_counter."""
    pieces: list[bytes]

    @property
    def received(self) -> bytes:
        """Return all of it."""
        return b"".join(self.pieces)

    @property
    def head(self) -> bytes:
        """Return the head, with the empty line after it."""
        return self.received.partition(END_OF_HEAD)[0] + END_OF_HEAD

    @property
    def status(self) -> int:
        """Return the status."""
        return int(self.received.split(maxsplit=2)[1])

    @property
    def body(self) -> bytes:
        """Return the body, that of a stream without the sizes of its chunks."""
        rest = self.received.partition(END_OF_HEAD)[2]
        if not is_chunked(self.head):
            return rest
        body = b""
        while size := int(rest.partition(b"\r\n")[0], 16):
            start = rest.index(b"\r\n") + 2
            body, rest = body + rest[start : start + size], rest[start + size + 2 :]
        return body

    @property
    def seconds(self) -> list[float]:
        """Return when each piece with something of the body came: the first words, and the end, are the first and the last."""
        ends = accumulate(map(len, self.pieces))
        return [when - self.began for when, end in zip(self.times, ends, strict=True) if end > len(self.head)]


def is_chunked(head: bytes) -> bool:
    """Return whether a body comes in chunks."""
    return b"transfer-encoding: chunked" in head.lower()


class Client(asyncio.Protocol):
    """A connection that stays open; what it receives is looked at afterwards."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.transport: asyncio.Transport | None = None
        self.answer = Answer(0, [], [])
        self.ended: asyncio.Future[bool] | None = None
        self.left: int | None = None
        """Bytes that are still to come: -1 of a stream, and None before the head has come."""

    async def ask(self, request: bytes, *, leave: bool = False) -> Answer | None:
        """Send a request and return its answer; None where the client leaves before it."""
        loop = asyncio.get_running_loop()
        if self.transport is None:
            self.transport, _ = await loop.create_connection(lambda: self, "127.0.0.1", self.port)
        self.ended, self.left = loop.create_future(), None
        self.answer = Answer(time.perf_counter(), [], [])
        self.transport.write(request)
        if leave:
            await asyncio.sleep(0.01)
            self.close()
            return None
        assert await self.ended, "the server has closed the connection"
        return self.answer

    def data_received(self, data: bytes) -> None:
        """Note a piece, and whether it is the last one."""
        self.answer.times.append(time.perf_counter())
        self.answer.pieces.append(data)
        if self.left is None:
            received, head = self.answer.received, self.answer.head
            if len(received) < len(head):
                return
            length = LENGTH.search(head)
            self.left = int(length[1]) - len(received) + len(head) if length else -1
        elif self.left > 0:
            self.left -= len(data)
        tail = data if len(data) >= len(LAST_CHUNK) else self.answer.received
        if self.left == 0 or (self.left < 0 and tail.endswith(LAST_CHUNK)):
            self.end(whole=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever waits."""
        self.end(whole=False)

    def end(self, *, whole: bool) -> None:
        """End the waiting."""
        if self.ended and not self.ended.done():
            self.ended.set_result(whole)

    def close(self) -> None:
        """Leave."""
        if self.transport:
            self.transport.close()
        self.transport = None


def request_of(body: dict[str, Any]) -> bytes:
    """Return a request as it is sent."""
    content = json.dumps(body).encode()
    return HEAD.format(len(content)).encode() + content


async def measure(load: Load) -> dict[str, Any]:
    """Return the seconds of a load, those of CPU that its clients took, its latencies, and its errors."""
    requests, long = [request_of(body) for body in load.bodies], [request_of(body) for body in load.beside]
    numbers = iter(range(len(requests)))
    answers: list[Answer] = []

    async def take_turns(client: Client) -> None:
        for number in numbers:
            leave = load.leave_every > 0 and number % load.leave_every == load.leave_every - 1
            answer = await client.ask(requests[number], leave=leave)
            answers.extend([answer] if answer else [])
        client.close()

    async def ask_again_and_again(client: Client) -> None:
        while True:
            for request in long:
                answer = await client.ask(request)
                assert answer, "it does not leave"
                assert answer.status == 200, answer.body[:500]

    beside = asyncio.ensure_future(ask_again_and_again(Client(load.port))) if load.beside else None
    await asyncio.sleep(0.1 if beside else 0)
    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(take_turns(Client(load.port)) for _ in range(load.clients)))
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    if beside:
        assert not beside.done(), beside.exception()
        beside.cancel()
        with suppress(asyncio.CancelledError):
            await beside
    bodies = [answer.body for answer in answers]
    failed = [
        f"{answer.status}: {body[-500:].decode(errors='replace')}"
        for answer, body in zip(answers, bodies, strict=True)
        if answer.status != 200 or b'"error"' in body[-2000:]
    ]
    times = [answer.seconds for answer in answers]
    streams = [found for found, body in zip(times, bodies, strict=True) if DONE in body[-100:]]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "answers": len(answers),
        "errors": failed[:3],
        "latencies": [found[-1] for found in times],
        "first": [found[0] for found in streams],
        "gaps": [after - before for found in streams for before, after in pairwise(found[:-1])],  # the last piece has no words
        "tokens": sum(map(completion_tokens, bodies)),
    }


def completion_tokens(body: bytes) -> int:
    """Return how many tokens the server says that it has generated for an answer."""
    lines = body.split(b"data: ")
    usage = next((found for line in lines[::-1] if (found := usage_of(line))), None)
    return usage["completion_tokens"] if usage else 0


def usage_of(line: bytes) -> dict[str, int] | None:
    """Return the usage in a piece of an answer, if it has one."""
    try:
        return json.loads(line).get("usage")
    except ValueError:
        return None


def quantile(values: Sequence[float], percent: int) -> float | None:
    """Return a percentile; None of nothing."""
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def question(load: Load) -> str:
    """Return a load as a worker is asked for it."""
    return json.dumps(asdict(load))


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(asyncio.run(measure(Load(**json.loads(line))))), flush=True)
