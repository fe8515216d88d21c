"""An ASGI middleware before MLflow's server: it validates the body of a request, and reports when the client disconnects.

MLflow's server answers malformed input in several ways, with the whole input in the answer or a traceback, and ignores names
that it does not know. The middleware answers such requests with one sentence and lets through JSON of one form, with strings
for prompts and params of the correct types.

    RequestMiddleware(app)     an ASGI application around MLflow's
    CLIENT_DISCONNECTED        in the thread that answers a request: done when its client has disconnected, or has its answer

This module knows HTTP and JSON; what a model does with prompts and params is known by mlflow_model.py.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any

from lmdist.errors import UsageError
from lmdist_export import options
from lmdist_export.options import PARAMS, typed

MAX_BODY_BYTES = 2**20
"""50 for each of the tokens that a request may have."""
MAX_REQUESTS = 64
"""At a time; others wait in the server. Threads that wait cost little, and each can add a request to a batch."""
MAX_QUOTED = 40
"""Characters of the given value in a message."""

FORMS = {
    "inputs": '["We must"]',
    "instances": '["We must"]',
    "dataframe_records": '[{"prompt": "We must"}]',
    "dataframe_split": '{"columns": ["prompt"], "data": [["We must"]]}',
}
"""MLflow's names for the input of a model, and an example of each."""
EXAMPLE = '{"inputs": ["We must"], "params": {"seed": 7}}'
JSON_TYPE = re.compile(r'application/json\s*(;\s*charset\s*=\s*("utf-8"|utf-8)\s*)?', re.IGNORECASE)

CLIENT_DISCONNECTED: ContextVar[Future[None] | None] = ContextVar("CLIENT_DISCONNECTED", default=None)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class BadRequest(UsageError):
    """A request that the middleware answers itself; a UsageError of the options is answered with 400."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


# --- the server ----------------------------------------------------------------------------------------------------


def install(module: ModuleType | None, cors_origins: Sequence[str] = ()) -> None:
    """Put the middleware before the `app` of a module that is being imported; None is no module, as without a server.

    Browsers let pages of `cors_origins`, as "https://example.org" or "*", read the answers. The server takes `app` from the
    module that loads the model: both server commands import this module, and nothing later.
    """
    if module is not None:
        module.__class__ = ModuleWithMiddleware
        vars(module)["cors_origins"] = cors_origins


class ModuleWithMiddleware(ModuleType):
    """A module whose `app` is behind the middleware."""

    @property
    def app(self) -> App:
        """The `app` of the module, behind the middleware."""
        app: App = RequestMiddleware(vars(self)["app"])
        if origins := vars(self)["cors_origins"]:
            from starlette.middleware.cors import CORSMiddleware  # MLflow's server is built on starlette

            # Outermost, so that a page can read the sentence of an error too.
            app = CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
        return app


class RequestMiddleware:
    """An ASGI application around that of MLflow's server."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer malformed requests to /invocations, and pass everything else on."""
        if scope["type"] == "lifespan":
            # MLflow answers each request in a thread of the loop's pool, which has six on two cores: behind six long requests
            # a short one would wait for all of one, and it would not share a batch.
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(MAX_REQUESTS))
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith("/invocations"):
            await self.app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            check_content_type(headers.get(b"content-type", b"").decode("latin-1"))
            body = await read_body(receive)
            if body is None:
                return
            normalized = json.dumps(normalize(body)).encode()
        except UsageError as error:
            await answer(send, error)
            return
        others = [(name, value) for name, value in scope["headers"] if name not in (b"content-type", b"content-length")]
        typed = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
        await self.pass_on(typed, normalized, receive, send)

    async def pass_on(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        """Have MLflow answer a request with this body, and set CLIENT_DISCONNECTED in its context."""
        disconnected: Future[None] = Future()
        CLIENT_DISCONNECTED.set(disconnected)
        leaving = asyncio.ensure_future(disconnect(receive))
        leaving.add_done_callback(lambda _: disconnected.set_result(None))
        bodies = iter([{"type": "http.request", "body": body}])

        async def received() -> Message:
            return next(bodies, None) or await asyncio.shield(leaving)

        try:
            await self.app(scope, received, send)
        finally:
            leaving.cancel()


async def disconnect(receive: Receive) -> Message:
    """Wait for the message that the client has disconnected."""
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message


async def read_body(receive: Receive) -> bytes | None:
    """Return the body of a request; None where the client disconnects before its end.

    Raises BadRequest for a body that is too long, once all of it was received: clients read no answer before they have sent
    everything.
    """
    body, length, more = bytearray(), 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        piece = message.get("body", b"")
        length += len(piece)
        if length <= MAX_BODY_BYTES:
            body += piece
        more = message.get("more_body", False)
    if length > MAX_BODY_BYTES:
        raise BadRequest(f"the body has {length:,} bytes; this server accepts at most {MAX_BODY_BYTES:,}", 413)
    return bytes(body)


async def answer(send: Send, error: UsageError) -> None:
    """Send an error."""
    body = error_body("INVALID_PARAMETER_VALUE", str(error)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": getattr(error, "status", 400), "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(code: str, message: str) -> str:
    """Return the body of an error: an object with the names that MLflow's has."""
    return json.dumps({"error_code": code, "message": message})


# --- the body ------------------------------------------------------------------------------------------------------


def check_content_type(content_type: str) -> None:
    """Raise BadRequest unless a Content-Type is that of JSON in UTF-8."""
    if not JSON_TYPE.fullmatch(content_type.strip()):
        given = f"Content-Type is {quoted(content_type)}" if content_type else "no Content-Type is given"
        raise BadRequest(f"{given}; application/json is expected, in UTF-8", 415)


def normalize(body: bytes) -> dict[str, Any]:
    """Return a body in the one form that MLflow is given; raises BadRequest for a body of no known form."""
    try:
        given = json.loads(body)
    except json.JSONDecodeError as error:
        raise BadRequest(
            f"the body is not JSON ({error.msg}: line {error.lineno}, column {error.colno}); expected is {EXAMPLE}"
        ) from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"byte {error.start + 1} of the body is not UTF-8, in which JSON is expected") from None
    except RecursionError:
        raise BadRequest(f"the body is nested too deeply; expected is {EXAMPLE}") from None
    except ValueError:
        raise BadRequest("the body has a number of thousands of digits; one of at most 64 bits is expected") from None
    if not isinstance(given, dict):
        raise BadRequest(f"the body is {quoted(given)}; an object is expected, as {EXAMPLE}")
    for name in given:
        if name not in FORMS and name != "params":
            raise BadRequest(f"the body has {quoted(name)}, which is not known; known are {', '.join(FORMS)} and params")
    forms = [name for name in FORMS if name in given]
    if len(forms) != 1:
        found = " and ".join(forms) or "no input"
        raise BadRequest(f"the body has {found}; one of {', '.join(FORMS)} is expected, as {EXAMPLE}")
    prompts = prompts_of(forms[0], given[forms[0]])
    params = params_of(given.get("params"))
    return {"dataframe_split": {"columns": ["prompt"], "data": [[prompt] for prompt in prompts]}, "params": params}


def prompts_of(form: str, given: Any) -> list[str]:
    """Return the prompts of an input in one of FORMS."""
    rows: list[Any]
    match form, given:
        case "dataframe_split", {"columns": ["prompt"], "data": list(rows)} if given.keys() <= {"columns", "data", "index"}:
            found = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in rows]
        case "inputs" | "instances", {"prompt": column, **others} if not others:
            found = column if isinstance(column, list) else [column]
        case "inputs" | "instances" | "dataframe_records", list(rows):
            found = [row["prompt"] if isinstance(row, dict) and row.keys() == {"prompt"} else row for row in rows]
        case _:
            raise BadRequest(f"{form} is {quoted(given)}; expected is {FORMS[form]}")
    return strings_of("prompt", found, f", as in {FORMS[form]}")


def params_of(given: Any) -> dict[str, Any]:
    """Return the params that are given, and not null; raises UsageError for an unknown name or a wrong type."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise BadRequest(f'params is {quoted(given)}; an object is expected, as {{"seed": 7}}')
    params = {}
    for name, value in given.items():
        if name not in PARAMS:
            raise BadRequest(f"params: {quoted(name)} is not known; known are {', '.join(PARAMS)}")
        if value is not None:
            params[name] = typed(PARAMS[name], value, quoted)
    return params


def quoted(value: Any) -> str:
    """Return a value as JSON, cut off after MAX_QUOTED characters."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


strings_of = partial(options.strings_of, quoted=quoted)
"""The values, with one that is not a string quoted as JSON."""
