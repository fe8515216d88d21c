"""Clients of lmdist-serve in one process, for benchmarks/serving.py: they ask, wait for the answer, and ask again.

A worker (workers.py): each question is a Load in JSON, each answer what its clients have measured. The clients speak HTTP by
asyncio and parse nothing while they measure, because they run on the server's CPUs.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
DONE = b"data: [DONE]"


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
    """What a client has measured of a request."""

    seconds: float
    first_seconds: float
    """To the first piece of the answer's body: the first words, where it is streamed."""
    gaps: list[float]
    """Between pieces, in seconds."""
    status: int
    body: bytes


class Client:
    """A connection that stays open."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: dict[str, Any], *, leave: bool = False) -> Answer | None:
        """Send a request and return its answer; None where the client leaves before it."""
        self.streams = self.streams or await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)
        reader, writer = self.streams
        content = json.dumps(body).encode()
        began = time.perf_counter()
        writer.write(HEAD.format(len(content)).encode() + content)
        if leave:
            await asyncio.sleep(0.01)
            self.close()
            return None
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        times, answer = [], b""
        if "transfer-encoding: chunked" in head:
            while size := int(await reader.readline(), 16):
                answer += (await reader.readexactly(size + 2))[:-2]
                times.append(time.perf_counter() - began)
            await reader.readline()
        else:
            length = next(int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("content-length"))
            answer = await reader.readexactly(length)
            times.append(time.perf_counter() - began)
        gaps = [after - before for before, after in pairwise(times)]
        return Answer(times[-1], times[0], gaps, int(head.split()[1]), answer)

    def close(self) -> None:
        """Leave."""
        if self.streams:
            self.streams[1].close()
        self.streams = None


async def measure(load: Load) -> dict[str, Any]:
    """Return the seconds of a load, its latencies, and its errors."""
    numbers = iter(range(len(load.bodies)))
    answers: list[Answer] = []

    async def take_turns(client: Client) -> None:
        for number in numbers:
            leave = load.leave_every > 0 and number % load.leave_every == load.leave_every - 1
            answer = await client.ask(load.bodies[number], leave=leave)
            answers.extend([answer] if answer else [])
        client.close()

    async def ask_again_and_again(client: Client) -> None:
        while True:
            for body in load.beside:
                answer = await client.ask(body)
                assert answer, "it does not leave"
                assert answer.status == 200, answer.body[:500]

    beside = asyncio.ensure_future(ask_again_and_again(Client(load.port))) if load.beside else None
    await asyncio.sleep(0.1 if beside else 0)
    began = time.perf_counter()
    await asyncio.gather(*(take_turns(Client(load.port)) for _ in range(load.clients)))
    seconds = time.perf_counter() - began
    if beside:
        assert not beside.done(), beside.exception()
        beside.cancel()
        with suppress(asyncio.CancelledError):
            await beside
    failed = [answer for answer in answers if answer.status != 200 or b'"error"' in answer.body[-2000:]]
    streams = [answer for answer in answers if DONE in answer.body[-100:]]
    return {
        "seconds": seconds,
        "answers": len(answers),
        "errors": [f"{answer.status}: {answer.body[-500:].decode(errors='replace')}" for answer in failed[:3]],
        "latencies": [answer.seconds for answer in answers],
        "first": [answer.first_seconds for answer in streams],
        "gaps": [gap for answer in streams for gap in answer.gaps[:-1]],  # the last piece has no words
        "tokens": sum(completion_tokens(answer) for answer in answers),
    }


def completion_tokens(answer: Answer) -> int:
    """Return how many tokens the server says that it has generated."""
    lines = answer.body.split(b"data: ")
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
