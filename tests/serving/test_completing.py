"""What a request holds while it is answered, and that what was accepted is answered to its end."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmdist.errors import UsageError
from lmdist.text import detokenizer
from lmdist_export.bundle import Bundle
from lmdist_export.options import Options
from lmdist_export.sampling.generation import Text
from lmdist_export.sampling.sampler import Sampler
from lmdist_export.serving import application, connections, requests
from lmdist_export.serving.batching import Work
from lmdist_export.serving.completing import complete, nobody, stream
from lmdist_export.serving.json_body import encoded
from lmdist_export.serving.observing import Note
from lmdist_export.serving.openai_request import CompletionRequest, read_request
from lmdist_export.serving.running import Growth, wake_loops
from lmdist_export.serving.service import FIRST_PROMPT, MAX_KNOWN, Service


@pytest.fixture(scope="module")
def service(bundle: Path) -> Iterator[Service]:
    found = Service(Sampler(Bundle.load(bundle), threads=1))
    yield found
    found.batcher.close()


async def events(service: Service, seconds: float, given: dict[str, Any]) -> str:
    """All that a stream sends."""
    asked = read_request(given | {"stream": True}, service, "news")
    found, close = await stream(asked, service, nobody, Note("id"), asyncio.get_running_loop().time() + seconds)
    try:
        return b"".join([event async for event in found]).decode()
    finally:
        close()


def test_what_was_accepted_is_scored_although_the_queue_is_full_by_then(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = read_request({"prompt": "the", "max_tokens": 5, "echo": True, "logprobs": 0, "seed": 1}, service, "news")
    others = read_request(
        {"prompt": "the", "max_tokens": 19_000, "ignore_eos": True, "no_repeat_ngram_size": 9}, service, "news"
    )
    long = service.request(others.tokenized, others.resolved)
    service.batcher.submit(long)
    submit = service.batcher.submit

    def submit_the_last(work: Work, **how: Any) -> None:
        submit(work, **how)
        service.batcher.max_queued_tokens = 1

    monkeypatch.setattr(service.batcher, "max_queued_tokens", 200_000)
    monkeypatch.setattr(service.batcher, "submit", submit_the_last)

    async def answer() -> dict[str, Any]:
        return await complete(asked, service, nobody, Note("id"), asyncio.get_running_loop().time() + 60)

    try:
        (choice,) = asyncio.run(answer())["choices"]
        assert len(choice["logprobs"]["tokens"]) >= 2
        assert not long.finished.is_set()
    finally:
        long.cancel()


def test_a_prompt_is_written_once_for_all_its_texts(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    spaced = detokenizer.spaced

    def noted(word: str, *rest: Any, **others: Any) -> tuple[str, bool, bool]:
        written.append(word)
        return spaced(word, *rest, **others)

    monkeypatch.setattr(detokenizer, "spaced", noted)
    given = {"prompt": "the cat " * 100, "n": 5, "max_tokens": 4, "ignore_eos": True, "seed": 1}

    async def answer(asked: CompletionRequest) -> dict[str, Any]:
        return await complete(asked, service, nobody, Note("id"), asyncio.get_running_loop().time() + 60)

    streamed = asyncio.run(events(service, 60, given))
    assert 200 < len(written) <= 200 + 5 * 4
    choices = asyncio.run(answer(read_request(given, service, "news")))["choices"]
    assert 2 * 200 < len(written) <= 2 * (200 + 5 * 4)
    parts = [json.loads(line[6:])["choices"][0] for line in streamed.splitlines() if line.startswith("data: {")]
    for choice in choices:
        assert "".join(part["text"] for part in parts if part["index"] == choice["index"]) == choice["text"]


def test_a_stream_that_is_not_scored_in_time_ends_with_an_error(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_end(*_: object) -> Iterator[None]:
        while True:
            yield

    given = {"prompt": "the", "max_tokens": 3, "logprobs": 0, "seed": 1}
    assert asyncio.run(events(service, 60, given)).endswith("data: [DONE]\n\n")
    monkeypatch.setattr(requests, "start_steps", without_end)
    *_, last = asyncio.run(events(service, 0.5, given)).split("\n\n")[:-1]
    assert "took longer than this server gives a request" in json.loads(last.removeprefix("data: "))["error"]["message"]


def test_a_body_is_not_held_while_its_request_is_answered(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    async def complete_nothing(*_: object) -> dict[str, Any]:
        await asyncio.sleep(0.1)  # the thread that has read it lets go
        held.append(tracemalloc.get_traced_memory()[0])
        return {"usage": {"prompt_tokens": 1, "completion_tokens": 0}}

    async def receive() -> dict[str, Any]:
        body = {"prompt": "the", "user": "x" * 1_000_000}
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: Any) -> None:
        held.append(message.get("status", 200))

    monkeypatch.setattr(application, "complete", complete_nothing)
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    asgi = application.Application(service, "news", access_log=False).asgi

    async def ask() -> None:
        await asgi(dict(scope), receive, send)

    asyncio.run(ask())  # what stays from the first request is not counted
    held.clear()
    tracemalloc.start()
    try:
        asyncio.run(ask())
    finally:
        tracemalloc.stop()
    assert held[1:] == [200, 200]
    assert held[0] < 500_000


def test_a_long_answer_of_mlflow_is_written_by_a_thread(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long by the prompts that it repeats, too: the event loop has other clients."""
    threads: set[str] = set()
    write = application.to_completion

    def noted(*given: Any) -> Any:
        threads.add(threading.current_thread().name)
        return write(*given)

    monkeypatch.setattr(application, "to_completion", noted)
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/invocations", "headers": headers, "query_string": b""}
    asgi = application.Application(service, "news", access_log=False).asgi
    statuses: list[int] = []

    async def ask(num_words: int, **params: Any) -> None:
        body = {"inputs": ["the " * num_words], "params": {"n": 8, "max_new_tokens": 1, "seed": 1, **params}}
        messages = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

        async def receive() -> Any:
            return next(messages, None) or await nobody()

        async def send(message: Any) -> None:
            statuses.append(message.get("status", 200))

        await asgi(dict(scope), receive, send)

    main = threading.current_thread().name
    for num_words, params, in_loop in ((2, {}, True), (100, {"echo": False}, True), (100, {}, False)):
        threads.clear()
        asyncio.run(ask(num_words, **params))
        assert [name == main for name in threads] == [in_loop], (num_words, params)
    assert set(statuses) == {200}


def test_a_client_that_does_not_read_a_short_answer_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * 50_000})

    async def seconds_connected() -> float:
        server = connections.server_of(answer, 1)
        serving = asyncio.ensure_future(server.serve([listening]))
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, listening.getsockname())
            await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            began = loop.time()
            await asyncio.sleep(0.2)
            assert len(server.server_state.connections) == 1
            while server.server_state.connections and loop.time() < began + 10:
                await asyncio.sleep(0.05)
            seconds = loop.time() - began
        server.should_exit = True
        await serving
        return seconds

    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.5)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        assert asyncio.run(seconds_connected()) < 9


@pytest.mark.parametrize(
    "value",
    [
        {"choices": [{"text": "ä", "logprobs": {"tokens": ["a"] * 300, "top": [{"a": -1.5}] * 65}}], "n": 1},
        {"a": [], "b": {}, "c": [[1, [2, [3, [4, list(range(200))]]]]], "ü": None},
        list(range(128)),
        [{"a": True}],
        "a",
    ],
)
def test_json_in_pieces_is_json(value: Any) -> None:
    for is_long in (False, True):
        assert encoded(value, is_long=is_long).decode() == json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def test_what_a_text_grows_while_nobody_takes_it_is_one_event() -> None:
    async def grow() -> None:
        growth, texts = Growth(), [Text([], 0, number) for number in range(2)]
        taken = aiter(growth)
        threading.Thread(target=lambda: (growth.on_growth(texts[0], [1]), wake_loops())).start()
        assert await anext(taken) == [(texts[0], [1], "")]
        for number, tokens in ((0, [2, 3]), (1, [7]), (0, [4]), (1, [])):
            texts[number].finish_reason = "length" if not tokens else ""
            growth.on_growth(texts[number], tokens)
        growth.on_end()
        wake_loops()
        assert await anext(taken) == [(texts[0], [2, 3, 4], ""), (texts[1], [7], "length")]
        assert [event async for event in taken] == []

    asyncio.run(grow())


def test_a_service_is_warm_once_it_has_read_words_too(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    read, prompts = [], service.prompts
    monkeypatch.setattr(service, "prompts", lambda texts: [time.sleep(0.1), read.append(*texts), *prompts(texts)][2:])
    service.warm_up(60)
    assert sorted(read) == ["", FIRST_PROMPT]


def test_options_that_were_resolved_before_have_a_seed_of_their_own(service: Service) -> None:
    def resolved(**values: Any) -> tuple[Any, int | None]:
        prompts = service.prompts(["the"])
        _, found = service.resolve(prompts, Options.from_values({"top_k": 3} | values))
        assert found.options.seed == values.get("seed")
        return found.config, found.seed

    first, again, other = resolved(seed=1), resolved(seed=2), resolved(seed=1, top_k=4)
    assert (first[0] is again[0], first[1], again[1]) == (True, 1, 2)
    assert (other[0].top_k, first[0].top_k) == (4, 3)
    assert resolved()[1] != resolved()[1]  # none is given, so each has a random one
    for _ in range(2):
        with pytest.raises(UsageError, match="num_beams is for beam search, and top_k for sampling"):
            resolved(num_beams=2)
        assert service.resolve(service.prompts([""]), Options.from_values({"num_beams": 2}))[1].seed is None
    for number in range(2 * MAX_KNOWN):
        resolved(max_new_tokens=1 + number)
    assert len(service.known) <= MAX_KNOWN
