"""A request as it comes over HTTP: what is wrong with its form is answered here, in a sentence, before MLflow reads it.

MLflow's server has an answer of its own for each thing that it cannot read, with the whole input in it or a traceback, and
passes over what it does not know. So this stands before it: what comes through is JSON of one form, with texts for prompts
and params of the right types. It says as well when nobody waits for an answer any more.

    Door(app)        an ASGI application around MLflow's
    CLIENT_GONE      in the thread that answers a request: done when its client has gone, or has its answer

This module knows HTTP and JSON; what a model does with prompts and params it leaves to served_model.py.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

from lmdist.errors import UsageError
from lmdist_export.sampling.completion import Options

MOST_BYTES = 2**20
"""Of a body: 50 for each of the words that a request may have."""
MOST_REQUESTS = 64
"""At a time: those beyond wait in the server. Threads that wait cost little; each of them makes room in a batch."""
MOST_SHOWN = 40
"""Characters of what was given, in a sentence about it."""

FORMS = {
    "inputs": '["We must"]',
    "instances": '["We must"]',
    "dataframe_records": '[{"prompt": "We must"}]',
    "dataframe_split": '{"columns": ["prompt"], "data": [["We must"]]}',
}
"""The names that MLflow has for what goes into a model, and how each is written."""
EXAMPLE = '{"inputs": ["We must"], "params": {"seed": 7}}'
JSON_TYPE = re.compile(r'application/json\s*(;\s*charset\s*=\s*("utf-8"|utf-8)\s*)?', re.IGNORECASE)

CLIENT_GONE: ContextVar[Future[None] | None] = ContextVar("CLIENT_GONE", default=None)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Wrong(UsageError):
    """What is answered to a request that has no right form."""

    def __init__(self, sentence: str, status: int = 400) -> None:
        super().__init__(sentence)
        self.status = status


# --- the server ----------------------------------------------------------------------------------------------------


def stand_before(module: ModuleType | None) -> None:
    """Put a door before the app of a module that is being imported; nothing where no server imports it.

    A server takes `app` from the module that loads the model, the last moment that both of its commands share.
    """
    if module is not None:
        module.__class__ = BehindDoor


class BehindDoor(ModuleType):
    """A module whose `app` has a door before it."""

    @property
    def app(self) -> Door:
        """What the module calls so, behind a door."""
        return Door(vars(self)["app"])


class Door:
    """An ASGI application around that of MLflow's server."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer what has a wrong form, and let all else through."""
        if scope["type"] == "lifespan":
            # MLflow answers each request in a thread of the loop's pool, which has six on two cores: behind six long requests
            # a short one would wait for all of one, and it would not share a batch.
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(MOST_REQUESTS))
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith("/invocations"):
            await self.app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            check_type(headers.get(b"content-type", b"").decode("latin-1"))
            body = await read_body(receive)
            if body is None:
                return
            plain = json.dumps(plain_form(body)).encode()
        except Wrong as wrong:
            await answer(send, wrong)
            return
        others = [(name, value) for name, value in scope["headers"] if name not in (b"content-type", b"content-length")]
        typed = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
        await self.let_through(typed, plain, receive, send)

    async def let_through(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        """Have MLflow answer a request with this body, and say in its context when nobody waits for the answer."""
        gone: Future[None] = Future()
        CLIENT_GONE.set(gone)
        leaving = asyncio.ensure_future(disconnect(receive))
        leaving.add_done_callback(lambda _: gone.set_result(None))
        bodies = iter([{"type": "http.request", "body": body}])

        async def received() -> Message:
            return next(bodies, None) or await asyncio.shield(leaving)

        try:
            await self.app(scope, received, send)
        finally:
            leaving.cancel()


async def disconnect(receive: Receive) -> Message:
    """The message that a client has gone."""
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message


async def read_body(receive: Receive) -> bytes | None:
    """The body of a request; None where its client goes before it is all there.

    Raises Wrong where it is too long, after it all has come: clients read no answer before they have sent everything.
    """
    body, length, more = bytearray(), 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        piece = message.get("body", b"")
        length += len(piece)
        if length <= MOST_BYTES:
            body += piece
        more = message.get("more_body", False)
    if length > MOST_BYTES:
        raise Wrong(f"the body has {length:,} bytes; this server takes at most {MOST_BYTES:,}", 413)
    return bytes(body)


async def answer(send: Send, wrong: Wrong) -> None:
    """Send what is wrong."""
    body = error_body("INVALID_PARAMETER_VALUE", str(wrong)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": wrong.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(code: str, sentence: str) -> str:
    """The body of an answer that is an error: an object with the names that MLflow's has."""
    return json.dumps({"error_code": code, "message": sentence})


# --- the form ------------------------------------------------------------------------------------------------------


def check_type(content_type: str) -> None:
    """Raise Wrong for what is no JSON in UTF-8."""
    if not JSON_TYPE.fullmatch(content_type.strip()):
        given = f"Content-Type is {shown(content_type)}" if content_type else "no Content-Type is given"
        raise Wrong(f"{given}; application/json is expected, in UTF-8", 415)


def plain_form(body: bytes) -> dict[str, Any]:
    """What a body says, in the one form that MLflow is given; raises Wrong where it says it in none."""
    try:
        given = json.loads(body)
    except json.JSONDecodeError as error:
        raise Wrong(
            f"the body is no JSON ({error.msg}: line {error.lineno}, column {error.colno}); what is expected is {EXAMPLE}"
        ) from None
    except UnicodeDecodeError as error:
        raise Wrong(f"byte {error.start + 1} of the body is not UTF-8, in which JSON is expected") from None
    except RecursionError:
        raise Wrong(f"the body has too many brackets in brackets; what is expected is {EXAMPLE}") from None
    except ValueError:
        raise Wrong("the body has a number of thousands of digits; one of at most 64 bits is expected") from None
    if not isinstance(given, dict):
        raise Wrong(f"the body is {shown(given)}; an object is expected, as {EXAMPLE}")
    for name in given:
        if name not in FORMS and name != "params":
            raise Wrong(f"the body has {shown(name)}, which is not known; known are {', '.join(FORMS)} and params")
    forms = [name for name in FORMS if name in given]
    if len(forms) != 1:
        raise Wrong(f"the body has {' and '.join(forms) or 'no input'}; one of {', '.join(FORMS)} is expected, as {EXAMPLE}")
    prompts = prompts_of(forms[0], given[forms[0]])
    params = params_of(given.get("params"))
    return {"dataframe_split": {"columns": ["prompt"], "data": [[prompt] for prompt in prompts]}, "params": params}


def prompts_of(form: str, given: Any) -> list[str]:
    """The prompts that are written in one of FORMS."""
    rows: list[Any]
    match form, given:
        case "dataframe_split", {"columns": ["prompt"], "data": list(rows)} if given.keys() <= {"columns", "data", "index"}:
            found = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in rows]
        case "inputs" | "instances", {"prompt": column, **others} if not others:
            found = column if isinstance(column, list) else [column]
        case "inputs" | "instances" | "dataframe_records", list(rows):
            found = [row["prompt"] if isinstance(row, dict) and row.keys() == {"prompt"} else row for row in rows]
        case _:
            raise Wrong(f"{form} is {shown(given)}; what is expected is {FORMS[form]}")
    return texts_of("prompt", found, f", as in {FORMS[form]}")


def params_of(given: Any) -> dict[str, Any]:
    """The params that are given, and not null, each of its type."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise Wrong(f'params is {shown(given)}; an object is expected, as {{"seed": 7}}')
    known = param_types()
    for name, value in given.items():
        if name not in known:
            raise Wrong(f"params: {shown(name)} is not known; known are {', '.join(known)}")
        if value is not None:
            check_param(name, value, *known[name])
    return {name: value for name, value in given.items() if value is not None}


@cache
def param_types() -> dict[str, tuple[type, bool]]:
    """Of each param its type, and whether it is a list of these."""
    found = {}
    for name, hint in get_type_hints(Options).items():
        of = next(of for of in (bool, int, float, str) if hint is of or of in get_args(hint))
        found[name] = of, get_origin(hint) is Sequence
    return found


def check_param(name: str, value: Any, of: type, is_list: bool) -> None:
    """Raise Wrong for a value of another type; a whole number is a number too."""
    if is_list:
        if not isinstance(value, list):
            raise Wrong(f"{name} is {shown(value)}; a list of texts is expected")
        texts_of(name, value)
        return
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if type(value) is not of and (of, type(value)) != (float, int):
        raise Wrong(f"{name} is {shown(value)}; {names[of]} is expected")
    if type(value) is int and abs(value) >= 2**64:
        raise Wrong(f"{name} is {shown(value)}; {names[of]} of at most 64 bits is expected")


def texts_of(name: str, values: Iterable[Any], example: str = "") -> list[str]:
    """The values; raises Wrong where one is no text."""
    found = list(values)
    for place, value in enumerate(found):
        if not isinstance(value, str):
            raise Wrong(f"{name} number {place} is {shown(value)}; a text is expected{example}")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise Wrong(f"{name} number {place} has half of a character, \\ud800 to \\udfff; a text is expected{example}")
    return found


def shown(value: Any) -> str:
    """A value as JSON writes it, or the beginning of that."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
