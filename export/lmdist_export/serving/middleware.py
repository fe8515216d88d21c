"""An ASGI middleware before MLflow's server: it validates the body of a request, and reports when the client disconnects.

MLflow's server answers malformed input in several ways, with the whole input in the answer or a traceback, and ignores names
that it does not know. The middleware answers such requests with one sentence and lets through JSON of one form, with strings
for prompts and params of the correct types (invocations.py).

    RequestMiddleware(app)     an ASGI application around MLflow's
    CLIENT_DISCONNECTED        in the thread that answers a request: done when its client has disconnected, or has its answer
    AS_TEXT                    in the same thread: whether predictions are strings

What a model does with prompts and params is known by mlflow_model.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from types import ModuleType

from lmdist.errors import UsageError
from lmdist_export.serving import invocations
from lmdist_export.serving.json_body import App, BadRequest, Message, Receive, Send, disconnect, framing_fault, parse, read_body

MAX_REQUESTS = 64
"""At a time; others wait in the server. Threads that wait cost little, and each can add a request to a batch."""

CLIENT_DISCONNECTED: ContextVar[Future[None] | None] = ContextVar("CLIENT_DISCONNECTED", default=None)
AS_TEXT: ContextVar[bool] = ContextVar("AS_TEXT", default=False)


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
        """Answer malformed requests to /invocations, and to any path where their end is ambiguous; pass everything else on."""
        if scope["type"] == "lifespan":
            # MLflow answers each request in a thread of the loop's pool, which has six on two cores: behind six long requests
            # a short one would wait for all of one, and it would not share a batch.
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(MAX_REQUESTS))
        if scope["type"] == "http" and (fault := framing_fault(scope["headers"])):
            await answer(send, BadRequest(fault, closes=True))
            return
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(invocations.PATH):
            await self.app(scope, receive, send)
            return
        path = scope["path"].removesuffix(f"{invocations.TEXT_PATH}{invocations.PATH}")
        as_text = path != scope["path"]
        AS_TEXT.set(as_text)
        try:
            body = await read_body(dict(scope["headers"]), receive)
            if body is None:
                return
            normalized = json.dumps(normalize(body, as_text=as_text)).encode()
        except UsageError as error:
            await answer(send, error)
            return
        others = [(name, value) for name, value in scope["headers"] if name not in (b"content-type", b"content-length")]
        typed = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
        if as_text:
            typed |= {"path": f"{path}{invocations.PATH}", "raw_path": f"{path}{invocations.PATH}".encode()}
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


def normalize(body: bytes, *, as_text: bool = False) -> dict[str, object]:
    """Return a body in the one form that MLflow is given; raises BadRequest for a body of no known form."""
    given = parse(body, invocations.EXAMPLE)
    prompts, params = invocations.prompts_and_params(invocations.as_gateway(given) if as_text else given)
    return {"dataframe_split": {"columns": ["prompt"], "data": [[prompt] for prompt in prompts]}, "params": params}


async def answer(send: Send, error: UsageError) -> None:
    """Send an error."""
    body = invocations.error_body("INVALID_PARAMETER_VALUE", str(error)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] if getattr(error, "closes", False) else []
    await send({"type": "http.response.start", "status": getattr(error, "status", 400), "headers": headers})
    await send({"type": "http.response.body", "body": body})
