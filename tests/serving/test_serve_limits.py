"""lmdist-serve under clients that are slow, silent, broken, gone or too many: bounded, answered, and nothing is lost."""

from __future__ import annotations

import argparse
import asyncio
import gzip
import http.client
import json
import os
import re
import shutil
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from lmdist.errors import DataError, UsageError
from lmdist_export import serve
from lmdist_export.serving.access import ApiKeys, Hosts
from lmdist_export.serving.application import Application, reading_threads
from lmdist_export.serving.service import Service
from lmdist_export.serving.watching import Watched
from support.serving import Serving
from support.small_bundles import edit_json

PATH = "/v1/completions"
KEY = "sk-one.of-two"
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
# The command with limits that a test can wait for.
LIMITED = """
import sys
from lmdist_export.serving import connections
connections.READ_SECONDS = connections.WRITE_SECONDS = 1
connections.MAX_CONNECTIONS = 60
from lmdist_export import serve
serve.main(sys.argv[1:])
"""
# A server whose next bundle does not load, as one that is far away.
FAR_AWAY = """
import sys, time
from lmdist_export import serve
opened = serve.opened
def opened_once(*given):
    serve.opened = lambda *_: print("loading", file=sys.stderr, flush=True) or time.sleep(300)
    return opened(*given)
serve.opened = opened_once
serve.main(sys.argv[1:])
"""
LONG = {"prompt": "the", "max_tokens": 19_000, "ignore_eos": True, "no_repeat_ngram_size": 9}
"""No sequence may be repeated, so each call generates one token."""
LONG_PARAMS = {"max_new_tokens": 19_000, "ignore_eos": True, "no_repeat_ngram_size": 9}


@pytest.fixture(scope="module")
def folder(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that a test may spoil."""
    return Path(shutil.copytree(bundle, tmp_path_factory.mktemp("limited") / "news"))


@pytest.fixture(scope="module")
def limited(folder: Path) -> Iterator[Serving]:
    keys = folder.parent / "keys.txt"
    keys.write_text(f"# of the tests\nsk-other\n\n{KEY}\n")
    server = Serving(["-c", LIMITED, str(folder), "--api-key-file", str(keys), "--allowed-host", "news.example"], folder.parent)
    try:
        server.wait()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def complete(server: Serving, **asked: object) -> tuple[int, Any]:
    status, _, answer = server.request("POST", PATH, {"prompt": "the cat", "seed": 7, "max_tokens": 9} | asked, HEADERS)
    return status, json.loads(answer)


def figure(server: Serving, name: str) -> float:
    page = server.request("GET", "/metrics", headers=HEADERS)[2].decode()
    found = re.search(rf"^{name} (\S+)$", page, re.MULTILINE)
    assert found, page
    return float(found[1])


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.05)


def head(length: int | str, *more: str) -> bytes:
    """The head of a request."""
    lines = [f"POST {PATH} HTTP/1.1", "Host: localhost", *(f"{name}: {value}" for name, value in HEADERS.items())]
    return "\r\n".join([*lines, f"Content-Length: {length}", *more, "", ""]).encode()


def connect(server: Serving, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    client.sendall(sent)
    return client


def answer_to(server: Serving, sent: bytes) -> bytes:
    """All that the server sends until it closes the connection."""
    with connect(server, sent) as client:
        received = b""
        with suppress(ConnectionResetError):
            while piece := client.recv(65_536):
                received += piece
        return received


def sockets(files: Path) -> set[str]:
    """The sockets of a process, by the folder of its files."""
    found = set()
    for file in files.iterdir():
        with suppress(FileNotFoundError):  # it was closed meanwhile
            found.add(os.readlink(file))
    return {name for name in found if name.startswith("socket:")}


def streaming(server: Serving, **asked: object) -> http.client.HTTPConnection:
    """A client whose text has begun to come."""
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    client.request("POST", PATH, json.dumps({**asked, "stream": True}), HEADERS)
    return client


# --- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_requests_with_a_key_are_answered(limited: Serving) -> None:
    assert complete(limited)[0] == 200
    for given in ("Bearer sk-other2", "Bearer ", f"Basic {KEY}", KEY, "Bearer sk-öther"):
        for method, path, body in (("POST", PATH, {"prompt": ""}), ("GET", "/v1/models", None), ("GET", "/metrics", None)):
            headers = {"Content-Type": "application/json", "Authorization": given.encode("utf-8").decode("latin-1")}
            status, answered, text = limited.request(method, path, body, headers)
            assert (status, answered["www-authenticate"]) == (401, "Bearer")
            assert json.loads(text)["error"]["code"] == "invalid_api_key"
    status, answer = limited.post({"inputs": ["the"]})
    assert (status, answer["error_code"]) == (401, "UNAUTHENTICATED")
    assert limited.request("GET", "/ping")[0] == limited.request("GET", "/health")[0] == 200
    assert "sk-" not in limited.log.read_text()


@pytest.mark.slow
def test_names_that_were_allowed_are_the_names_of_the_server(limited: Serving) -> None:
    hosts = ("news.example", "NEWS.example:443", "localhost", "other.example")
    found = [limited.request("GET", "/v1/models", headers=HEADERS | {"Host": host})[0] for host in hosts]
    assert found == [200, 200, 200, 403]
    assert Hosts(["*"]).allow("other.example")


def test_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"# none\n\n")
    with pytest.raises(DataError, match="keys has no key"):
        ApiKeys.read(file)
    file.write_bytes(b"two words\n")
    with pytest.raises(DataError, match="has a line that is no key"):
        ApiKeys.read(file)
    file.write_bytes(b" one \r\ntwo")
    keys = ApiKeys.read(file)
    assert [keys.allow(f"Bearer {key}".encode()) for key in ("one", "two", "three", "", "# none")] == [True, True] + [False] * 3
    assert b"one" not in repr(vars(keys)).encode()


# --- bodies --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "headers", "status", "sentence"),
    [
        (gzip.compress(b'{"prompt": "the"}'), {"Content-Encoding": "gzip"}, 415, 'Content-Encoding is "gzip"; a body that'),
        ('{"prompt": "the"}'.encode("utf-16"), {}, 400, "the body is in UTF-16 or UTF-32; JSON in UTF-8"),
        ('{"prompt": "the"}'.encode("utf-16-le"), {}, 400, "the body is in UTF-16 or UTF-32; JSON in UTF-8"),
        (b'{"prompt": "\xff"}', {}, 400, "byte 13 of the body is not UTF-8"),
        (b'{"prompt": "the', {}, 400, "the body is not JSON (Unterminated string"),
        (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", {}, 400, " is [[[[[[[["),
        # Where the parser gives up depends on its caller.
        (b'{"prompt": ' + b"[" * 973 + b"]" * 973 + b"}", {}, 400, " is [[[[[[[[ | the body is nested too deeply"),
        (b'{"prompt": ' + b"[" * 100_000, {}, 400, "the body is nested too deeply"),
        (b'{"seed": ' + b"9" * 5_000 + b"}", {}, 400, "a number of thousands of digits"),
        (b"prompt=the", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "application/json is expected"),
        (b"x" * 2**26, {}, 413, "the body has 67,108,864 bytes; this server accepts at most 1,048,576"),
    ],
    ids="gzip utf-16 utf-16-le no-utf-8 cut brackets most-brackets more-brackets digits form 64MB".split(),
)
@pytest.mark.parametrize("path", [PATH, "/invocations"])
def test_a_body_that_is_none(
    limited: Serving, path: str, body: bytes, headers: dict[str, str], status: int, sentence: str
) -> None:
    if path != PATH:
        body = body.replace(b'{"prompt"', b'{"inputs"')
    found, _, answer = limited.request("POST", path, body, HEADERS | headers)
    message = json.loads(answer)["error"]["message"] if path == PATH else json.loads(answer)["message"]
    assert (found, any(one in message for one in sentence.split(" | "))) == (status, True), message
    assert len(message) < 300


@pytest.mark.slow
def test_a_body_with_two_lengths_is_a_400_and_the_end_of_the_connection(limited: Serving) -> None:
    found = answer_to(limited, head(4, "Transfer-Encoding: chunked") + b"0\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 400 ")
    assert b"both Content-Length and Transfer-Encoding" in found
    chunked = head(4).replace(b"Content-Length: 4", b"Transfer-Encoding: chunked\r\nConnection: close")
    body = b'{"prompt":"the","max_tokens":1}'
    assert answer_to(limited, chunked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.slow
def test_a_client_that_asks_first_sends_no_body_that_is_too_long(limited: Serving) -> None:
    found = answer_to(limited, head(2**26, "Expect: 100-continue"))
    assert found.startswith(b"HTTP/1.1 413 ")


# --- connections ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_silent_and_half_sent_connections_are_closed(limited: Serving) -> None:
    assert answer_to(limited, b"") == b""
    for sent in (b"POST /v1/comp", head(500) + b'{"prompt": '):
        assert answer_to(limited, sent).startswith(b"HTTP/1.1 408 ")
    with connect(limited) as client:  # one that is between two requests stays
        for _ in range(2):
            client.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"\r\n\r\n\n"):  # the head and the body, a line break
                more = client.recv(65_536)
                assert more, answer
                answer += more
            assert answer.startswith(b"HTTP/1.1 200 ")
            time.sleep(1.5)


@pytest.mark.slow
def test_more_connections_than_there_are_places(limited: Serving) -> None:
    with ExitStack() as clients:
        for _ in range(60):
            clients.enter_context(connect(limited))
        assert answer_to(limited, b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 503 ")
    until(lambda: complete(limited)[0] == 200)


@pytest.mark.slow
def test_a_client_that_does_not_read_is_disconnected(limited: Serving) -> None:
    body = json.dumps({"prompt": [[2] * 15_000], "echo": True, "max_tokens": 0, "logprobs": 20}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        client.connect(("127.0.0.1", limited.port))
        client.sendall(head(len(body)) + body)
        until(lambda: figure(limited, "lmdist_open_requests") == 2)
        until(lambda: figure(limited, "lmdist_open_requests") == 1, seconds=30)
    assert complete(limited)[0] == 200


@pytest.mark.slow
def test_nothing_is_left_of_clients_that_were_silent_slow_broken_or_gone(limited: Serving) -> None:
    files = Path(f"/proc/{limited.process.pid}/fd")

    def trouble() -> None:
        with ExitStack() as clients:
            for sent in [b""] * 20 + [head(500) + b'{"prompt": '] * 10:
                clients.enter_context(connect(limited, sent))
            for stream in [streaming(limited, **LONG) for _ in range(5)]:
                clients.callback(stream.close)
                assert stream.getresponse().readline().startswith(b"data: ")
            slow = clients.enter_context(connect(limited))
            with suppress(BrokenPipeError, ConnectionResetError):
                for byte in head(500)[:25]:
                    slow.send(bytes([byte]))
                    time.sleep(0.05)
            assert slow.recv(65_536).startswith(b"HTTP/1.1 408 "), "bytes that trickle in are no request in time"
            clients.enter_context(connect(limited, head(2**26) + b"x" * 2**22))
            assert limited.request("POST", PATH, b"\xff" * 2**26, HEADERS)[0] == 413
            assert limited.request("POST", PATH, b'{"prompt": "\xff\xfe"}', HEADERS)[0] == 400
        assert complete(limited)[0] == 200

    def left() -> tuple[int, float]:
        until(lambda: figure(limited, "lmdist_running_requests") == figure(limited, "lmdist_open_requests") - 1 == 0)
        until(lambda: not sockets(files) - listening, seconds=5)
        return len([*files.iterdir()]), figure(limited, "process_resident_memory_bytes")

    listening = sockets(files)
    trouble()
    num_files, memory = left()
    for _ in range(3):
        trouble()
    assert left()[0] == num_files
    assert left()[1] < memory + 2**25


# --- work ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_clients_ask_for_together_is_bounded_and_ends_when_they_leave(limited: Serving) -> None:
    names = "lmdist_prompt_tokens_total", "lmdist_generated_tokens_total"
    before = [figure(limited, name) for name in names]
    clients = [streaming(limited, **LONG) for _ in range(16)]
    until(lambda: figure(limited, "lmdist_queued_tokens") > 180_000)
    status, headers, answer = limited.request("POST", PATH, LONG, HEADERS)
    assert (status, int(headers["retry-after"]) >= 1) == (429, True)
    assert json.loads(answer)["error"]["message"].startswith("the server has as much work as it accepts")
    began = time.perf_counter()
    assert complete(limited, max_tokens=3)[0] == 200
    assert time.perf_counter() - began < 10
    for client in clients:
        client.close()
    until(lambda: figure(limited, "lmdist_queued_tokens") == figure(limited, "lmdist_running_requests") == 0)
    plain = http.client.HTTPConnection("127.0.0.1", limited.port)
    plain.request("POST", PATH, json.dumps(LONG), HEADERS)
    until(lambda: figure(limited, "lmdist_running_requests") == 1)
    plain.close()
    until(lambda: figure(limited, "lmdist_running_requests") == figure(limited, "lmdist_open_requests") - 1 == 0)
    read, written = (figure(limited, name) - old for name, old in zip(names, before, strict=True))
    assert read <= 10 + 2 + 1, "prompts that were refused were not read"
    assert written > 50, "what was generated for clients that left is counted too"


# --- one bundle ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_was_loaded_answers_whatever_becomes_of_the_folder(limited: Serving, folder: Path) -> None:
    asked = {"repetition_penalty": 1.2, "top_k": 3, "logprobs": 2}
    before = complete(limited, **asked)[1]["choices"]
    weights = folder / "weights.bin"
    with weights.open("r+b") as file:
        file.truncate(100)
    assert complete(limited, **asked)[1]["choices"] == before
    shutil.rmtree(folder)
    assert complete(limited, **asked)[1]["choices"] == before
    for other in (
        {"min_p": 0.1},
        {"num_beams": 2, "seed": None},
        {"typical_p": 0.5},
        {"temperature": 0},
    ):  # other graphs
        assert complete(limited, **other)[0] == 200


@pytest.mark.slow
def test_at_sigterm_what_was_received_is_answered(limited: Serving) -> None:
    """The last test of this server."""
    client = streaming(limited, **(LONG | {"max_tokens": 1_000}))
    response = client.getresponse()
    assert response.readline().startswith(b"data: ")
    half_sent, silent = connect(limited, head(500) + b'{"prompt": '), connect(limited)
    time.sleep(0.2)
    limited.process.terminate()
    rest = response.read()
    assert rest.endswith(b"data: [DONE]\n\n")
    assert rest.count(b'"finish_reason":"length"') == 1
    client.close()
    with half_sent, silent:
        assert half_sent.recv(65_536).startswith(b"HTTP/1.1 503 ")
        assert silent.recv(65_536) == b""
    assert limited.process.wait(timeout=20) == 0
    assert limited.log.read_text().endswith("lmdist-serve: all requests are answered\n")
    assert "Traceback" not in limited.log.read_text()


@pytest.mark.slow
def test_what_has_not_ended_within_drain_is_cancelled_and_no_loading_is_waited_for(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "news"))
    server = Serving(["-c", FAR_AWAY, str(folder), "--drain", "1", "--watch", "0.1"], tmp_path)
    try:
        server.wait()
        edit_json(folder / "generation_config.json", do_sample=False)
        until(lambda: "loading" in server.log.read_text())
        clients = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=60) for _ in range(3)]
        bodies = (PATH, LONG), (PATH, LONG | {"stream": True}), ("/invocations", {"inputs": ["the"], "params": LONG_PARAMS})
        for client, (path, body) in zip(clients, bodies, strict=True):
            client.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        until(lambda: figure(server, "lmdist_running_requests") == 3)
        server.process.terminate()
        began = time.monotonic()
        plain, streamed, invoked = (client.getresponse() for client in clients)
        assert (plain.status, streamed.status, invoked.status) == (503, 200, 503)
        *_, last = streamed.read().decode().split("\n\n")[:-1]
        for error in (json.load(plain)["error"], json.loads(last.removeprefix("data: "))["error"], json.load(invoked)):
            assert error["message"] == "this server is stopping, and the answer was not ready by then"
        assert server.process.wait(timeout=60) == 0
        assert time.monotonic() - began < 20
        for client in clients:
            client.close()
    finally:
        server.process.kill()
    logged = server.log.read_text()
    assert "warning: 3 requests had not ended within --drain, 1 second, and were cancelled\n" in logged
    assert "all requests are answered" not in logged
    assert "Traceback" not in logged


# --- another bundle ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_watched_folders_are_swapped_without_losing_a_request(bundle: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "news", tmp_path / "other"
    for copy in (folder, other):
        shutil.copytree(bundle, copy)
    edit_json(other / "generation_config.json", do_sample=False)
    server = Serving(["-m", "lmdist_export.serve", str(folder), "--watch", "0.2", "--name", "mine"], tmp_path)
    try:
        server.wait()
        client = streaming(server, **(LONG | {"max_tokens": 2_000}))
        began = client.getresponse()
        first = server.post({"prompt": "the", "ignore_eos": True}, path=PATH)[1]
        assert ("seed" in first, first["model"]) == (True, "mine")
        folder.rename(tmp_path / "before")
        until(lambda: "warning: --watch: " in server.log.read_text())  # and what was loaded answers
        assert "seed" in server.post({"prompt": "the", "ignore_eos": True}, path=PATH)[1]
        other.rename(folder)
        until(lambda: "mine: from now on version" in server.log.read_text())
        generated = figure(server, "lmdist_tokens_written_total")
        assert generated > 400, "those of the bundle before are still counted"
        assert "seed" not in server.post({"prompt": "the", "ignore_eos": True}, path=PATH)[1]
        assert began.read().endswith(b"data: [DONE]\n\n")
        client.close()
        assert figure(server, "lmdist_tokens_written_total") >= 2_000 + 3 * 200
        assert server.log.read_text().count("warning: --watch") == 1
    finally:
        code = server.stop()
    assert code == 0


def test_a_watch_frees_what_was_served_and_outlives_what_cannot_be_loaded(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "news"))
    arguments = serve.parser().parse_args([str(folder), "--watch", "0.1", "--port", "0"])
    tries: list[str] = []
    services: list[weakref.ref[Service]] = []
    opened = serve.opened

    def open_unless_it_is_too_large(address: str, given: argparse.Namespace) -> Service:
        tries.append(address)
        if len(tries) in (2, 3):
            raise MemoryError("as of a model that is too large")
        service = opened(address, given)
        services.append(weakref.ref(service))
        return service

    async def serve_meanwhile(application: Application, _: object, given: argparse.Namespace, *watch: Any) -> None:
        asyncio.get_running_loop().set_default_executor(reading_threads())
        watching = asyncio.ensure_future(serve.watch(application, given, *watch))
        edit_json(folder / "generation_config.json", do_sample=False)
        for _ in range(400):
            await asyncio.sleep(0.05)
            if len(services) == 2 and services[0]() is None:
                break
        assert not watching.done()
        assert [ref() for ref in services] == [None, application.service]
        watching.cancel()

    monkeypatch.setattr(serve, "opened", open_unless_it_is_too_large)
    monkeypatch.setattr(serve, "serve", serve_meanwhile)
    began = time.monotonic()
    serve.run(arguments)
    assert len(tries) == 4
    assert time.monotonic() - began > 0.2 + 0.4
    logged = capsys.readouterr().err
    assert logged.count("warning: --watch: MemoryError: as of a model that is too large; the model that was loaded") == 1


@pytest.mark.parametrize("address", ["models:/news/3", "runs:/abc/bundle"])
def test_what_is_always_the_same_is_not_watched(address: str) -> None:
    with pytest.raises(UsageError, match=f"--watch: {address} is always the same bundle"):
        Watched(address)
