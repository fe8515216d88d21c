"""The body of a request: JSON in UTF-8 of a bounded length, or an error with one sentence.

    body = await read_body(headers, receive)        # bytes; None where the client disconnects before their end
    given = parse(body, EXAMPLE)                    # an object

Both servers read their requests by it: middleware.py before MLflow's, application.py in lmdist-serve. This module does not know
what is in a body.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

from lmdist.errors import UsageError
from lmdist_export import options

MAX_BODY_BYTES = 2**20
"""50 for each of the tokens that a request may have."""
MAX_DISCARDED_BYTES = 2**26
"""Of a body that is too long: most clients read no answer before they have sent everything."""
MAX_QUOTED = 40
"""Characters of the given value in a message."""
JSON_TYPE = re.compile(r'application/json\s*(;\s*charset\s*=\s*("utf-8"|utf-8)\s*)?', re.IGNORECASE)

MAX_ITEMS = 64
"""That are encoded at a time: half a millisecond, as between two looks at whether another thread waits (serve.py)."""
TO_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class BadRequest(UsageError):
    """A request that is answered with `status` and a sentence; a UsageError of the options is answered with 400."""

    def __init__(self, message: str, status: int = 400, *, closes: bool = False) -> None:
        """Answer with `status`; `closes` is for a request after which the connection cannot go on."""
        super().__init__(message)
        self.status, self.closes = status, closes


def framing_fault(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return what makes the end or the host of a request ambiguous, by its headers in lowercase; "" where nothing does.

    Where a proxy sees another end than this server, a client may hide a request in the body of another (request smuggling,
    RFC 9112 sections 6.1, 6.3 and 11.2). What httptools refuses is not looked for: several Content-Length, line breaks that
    are not CR LF, folded headers, spaces before a colon.
    """
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        found.setdefault(name, []).append(value.strip(b" \t").lower())
    codings = found.get(b"transfer-encoding")
    if codings and b"content-length" in found:
        return "the request has both Content-Length and Transfer-Encoding; one of them is expected"
    if codings and codings != [b"chunked"]:
        return "the request has a Transfer-Encoding that is not chunked; Content-Length or chunked is expected"
    if len(found.get(b"host", [])) > 1:
        return "the request has several Host headers; one is expected"
    return ""


def check_headers(headers: Mapping[bytes, bytes]) -> None:
    """Raise BadRequest unless the headers of a request, in lowercase, are those of one JSON text in UTF-8."""
    content_type = headers.get(b"content-type", b"").decode("latin-1")
    if not JSON_TYPE.fullmatch(content_type.strip()):
        given = f"Content-Type is {quoted(content_type)}" if content_type else "no Content-Type is given"
        raise BadRequest(f"{given}; application/json is expected, in UTF-8", 415)
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
    if encoding.strip().lower() not in ("", "identity"):
        raise BadRequest(f"Content-Encoding is {quoted(encoding)}; a body that is not compressed is expected", 415)


async def read_body(headers: Mapping[bytes, bytes], receive: Receive) -> bytes | None:
    """Return the body of a request; None where the client disconnects before its end.

    Raise BadRequest as `check_headers`, and for a body that is too long. It is read nevertheless, unless the client asks
    before it sends it.
    """
    length = headers.get(b"content-length", b"0")
    if b"expect" in headers and length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise too_long(int(length), closes=True)
    body, received, more_follows = bytearray(), 0, True
    while more_follows and received <= MAX_DISCARDED_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        piece = message.get("body", b"")
        received += len(piece)
        if received <= MAX_BODY_BYTES:
            body += piece
        more_follows = message.get("more_body", False)
    check_headers(headers)
    if received > MAX_BODY_BYTES:
        raise too_long(received, closes=more_follows)
    return bytes(body)


def too_long(length: int, *, closes: bool) -> BadRequest:
    """Return the error of a body that is too long."""
    return BadRequest(f"the body has {length:,} bytes; this server accepts at most {MAX_BODY_BYTES:,}", 413, closes=closes)


async def disconnect(receive: Receive) -> Message:
    """Wait for the message that the client has disconnected."""
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message


def parse(body: bytes, example: str) -> dict[str, Any]:
    """Return the JSON object of a body; raises BadRequest, with an `example` of what is expected."""
    if body[:2] in (b"\xff\xfe", b"\xfe\xff") or 0 in body[:4]:
        raise BadRequest("the body is in UTF-16 or UTF-32; JSON in UTF-8 is expected")
    try:
        given = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRequest(f"byte {error.start + 1} of the body is not UTF-8, in which JSON is expected") from None
    except json.JSONDecodeError as error:
        raise BadRequest(
            f"the body is not JSON ({error.msg}: line {error.lineno}, column {error.colno}); expected is {example}"
        ) from None
    except RecursionError:
        raise BadRequest(f"the body is nested too deeply; expected is {example}") from None
    except ValueError:
        raise BadRequest("the body has a number of thousands of digits; one of at most 64 bits is expected") from None
    if not isinstance(given, dict):
        raise BadRequest(f"the body is {quoted(given)}; an object is expected, as {example}")
    return given


def encoded(value: Any, *, is_long: bool = False) -> bytes:
    """Return a value as JSON. What `is_long` is encoded a few items at a time, for meanwhile no other thread goes on."""
    return ("".join(json_pieces(value)) if is_long else TO_JSON(value)).encode()


def json_pieces(value: Any, depth: int = 4) -> Iterator[str]:
    """Yield the JSON of a value in pieces of MAX_ITEMS items, as far as lists and objects are no deeper than `depth`."""
    if depth and isinstance(value, dict) and value:
        for place, (name, item) in enumerate(value.items()):
            yield f"{',' if place else '{'}{TO_JSON(name)}:"
            yield from json_pieces(item, depth - 1)
        yield "}"
    elif isinstance(value, list) and len(value) > MAX_ITEMS:
        for start in range(0, len(value), MAX_ITEMS):
            yield f"{',' if start else '['}{TO_JSON(value[start : start + MAX_ITEMS])[1:-1]}"
        yield "]"
    elif depth and isinstance(value, list) and value:
        for place, item in enumerate(value):
            yield "," if place else "["
            yield from json_pieces(item, depth - 1)
        yield "]"
    else:
        yield TO_JSON(value)


def quoted(value: Any) -> str:
    """Return a value as JSON, cut off after MAX_QUOTED characters; nothing behind them is looked at, however deep it is.

    A lone surrogate, which JSON can have and no answer in UTF-8, is written as JSON writes it, \\ud800.
    """
    text = ""
    # Not json.dumps: it descends into all of the value, which may be nested as deeply as the parser allows.
    for piece in json.JSONEncoder(ensure_ascii=False, default=repr).iterencode(value):
        text += piece.encode("utf-8", "backslashreplace").decode("utf-8")
        if len(text) > MAX_QUOTED:
            return f"{text[:MAX_QUOTED]}..."
    return text


strings_of = partial(options.strings_of, quoted=quoted)
"""The values, with one that is not a string quoted as JSON."""
