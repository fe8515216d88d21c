"""The HTTP application of lmdist-serve: OpenAI's completions API, MLflow's scoring protocol, metrics and the page, on one port.

    application = Application(service, "news", version="3")
    server_of(application.asgi, ...)                    # connections.py
    application.replace(service, version="4")           # requests that began go on with the service before

It reads requests in threads and waits for the batching thread in the event loop, so that many clients cost little. What a
request means is known by openai_request.py and invocations.py, what it may cost by service.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from lmdist import __version__
from lmdist.console import log
from lmdist_export.options import Options
from lmdist_export.sampling.completion import to_completion
from lmdist_export.sampling.prompt import Prompt
from lmdist_export.sampling.resolved_options import ResolvedOptions
from lmdist_export.serving import invocations, tokenize_api
from lmdist_export.serving.access import ApiKeys, Hosts
from lmdist_export.serving.batching import Request
from lmdist_export.serving.completing import complete, stream
from lmdist_export.serving.event_stream import EventStream
from lmdist_export.serving.failures import ErrorResponse, mlflow_error, openai_error, status_and_message
from lmdist_export.serving.json_body import MAX_BODY_BYTES, App, BadRequest, encoded, parse, quoted, read_body
from lmdist_export.serving.metrics import CONTENT_TYPE, Metrics
from lmdist_export.serving.observing import Note, Observed, note_of
from lmdist_export.serving.openai_answer import model_facts
from lmdist_export.serving.openai_request import EXAMPLE, NO_CHAT, ApiError, no_model, read_request
from lmdist_export.serving.page_files import MEDIA_TYPES, PAGE_HEADERS, SERVER_ENGINE, page_files
from lmdist_export.serving.running import SHORT_BYTES, SHORT_TOKENS, ClientLeft, Growth, done_by, finish
from lmdist_export.serving.service import Service

ANSWERED_AS = {"index.html": "", SERVER_ENGINE: "engine.js"}
READERS = 4
"""Threads that read requests: tokenizing the longest takes a second, and short ones go by it."""
MAX_HELD_BYTES = 2**26
"""Of the bodies that are read, or wait for a thread, at a time."""

TOO_MANY_BYTES = "the bodies of other requests fill this server's memory for them: ask again"

T = TypeVar("T")
Endpoint = Callable[[HttpRequest], Awaitable[Response]]


class Application:
    """What lmdist-serve answers."""

    def __init__(
        self,
        service: Service,
        name: str,
        version: str = "",
        *,
        keys: ApiKeys | None = None,
        hosts: Hosts | None = None,
        timeout_seconds: float = 600,
        cors_origins: Sequence[str] = (),
        access_log: bool = True,
    ) -> None:
        """Answer as the model `name`; with `keys` only requests that have one, with `hosts` only those that name one.

        A request has `timeout_seconds` to end.
        """
        self.service, self.name = service, name
        self.loaded = int(time.time())
        self.keys, self.hosts, self.timeout_seconds = keys, hosts, timeout_seconds
        self.held_bytes = 0
        self.metrics = Metrics()
        self.metrics.follow(service)
        self.metrics.model.labels(name, version).set(1)
        app: App = Starlette(routes=self.routes(), exception_handlers={HTTPException: self.no_route})
        if cors_origins:
            app = CORSMiddleware(app, allow_origins=cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"])
        self.asgi: App = Observed(app, self.metrics, log if access_log else None)

    def replace(self, service: Service, version: str) -> None:
        """Answer with another service from the next request on; those that began go on with the one before."""
        self.service = service
        self.loaded = int(time.time())
        self.metrics.follow(service)
        self.metrics.model.clear()
        self.metrics.model.labels(self.name, version).set(1)

    def routes(self) -> list[Route]:
        """Return what is answered, and by what; the page and what says that the server is up need no key."""
        text_invocations = invocations.TEXT_PATH + invocations.PATH
        found = [
            self.route("/v1/completions", self.completions, openai_error, "POST"),
            self.route("/v1/models", self.models, openai_error, "GET"),
            self.route("/v1/models/{model:path}", self.models, openai_error, "GET"),
            self.route("/v1/{other:path}", self.no_chat, openai_error, "POST"),
            self.route(invocations.PATH, self.invocations, mlflow_error, "POST"),
            self.route(text_invocations, self.invocations, mlflow_error, "POST"),
            *(self.route(path, self.tokenizer(*how), openai_error, "POST") for path, how in tokenize_api.ROUTES.items()),
            self.route("/tokenizer_info", self.tokenizer_info, openai_error, "GET"),
            self.route("/metrics", self.figures, openai_error, "GET"),
        ]
        is_open: dict[str, Endpoint] = {"/ping": self.ping, "/health": self.ping, "/version": self.version}
        for file in page_files():
            is_open[f"/{ANSWERED_AS.get(file.name, file.name)}"] = page_file(file)
        return found + [self.route(path, answer, openai_error, "GET", is_open=True) for path, answer in is_open.items()]

    def route(
        self, path: str, endpoint: Endpoint, error_response: ErrorResponse, method: str, *, is_open: bool = False
    ) -> Route:
        """Return a route whose errors are answered in the form of its protocol."""

        async def answered(request: HttpRequest) -> Response:
            note_of(request.scope).route = path
            try:
                host = request.headers.get("host", "")
                if self.hosts and not self.hosts.allow(host):
                    raise ApiError(f"Host is {quoted(host)}, no name of this server: --allowed-host adds one", 403)
                key = request.headers.get("authorization", "").encode("latin-1")
                if self.keys and not is_open and not self.keys.allow(key):
                    raise ApiError("an API key is expected: Authorization: Bearer KEY", 401, code="invalid_api_key")
                return await endpoint(request)
            except (Exception, asyncio.CancelledError) as error:
                return error_response(error, *status_and_message(error))

        return Route(path, answered, methods=[method])

    async def no_route(self, request: HttpRequest, error: Exception) -> Response:
        """Answer what is not served."""
        assert isinstance(error, HTTPException)
        sentence = "this path is not served; POST /v1/completions generates text, and GET /v1/models has the model"
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            sentence = f"this path is served by {(error.headers or {}).get('Allow', '')} only"
        response = openai_error(error, error.status_code, sentence)
        response.headers.update(error.headers or {})
        return response

    # --- bodies

    @contextmanager
    def counted(self, request: HttpRequest) -> Iterator[Callable[[], Awaitable[Any]]]:
        """Yield a `receive` of the request; raises BadRequest where it brings more bytes than this server holds at a time."""
        held = 0

        async def receive() -> Any:
            nonlocal held
            message = await request.receive()
            length = min(len(message.get("body", b"")), MAX_BODY_BYTES - held)  # the rest is discarded
            held += length
            self.held_bytes += length
            if self.held_bytes > MAX_HELD_BYTES:
                raise BadRequest(TOO_MANY_BYTES, 503)
            return message

        try:
            yield receive
        finally:
            self.held_bytes -= held

    async def read_from(self, request: HttpRequest, read: Callable[[bytes], T]) -> T:
        """Return what was read from the body of a request, which goes with this call: it is counted no longer."""
        with self.counted(request) as receive:
            body = await body_of(request, receive)
            return await done_by(len(body) > SHORT_BYTES, lambda: read(body))

    def begun(self, request: HttpRequest) -> tuple[Service, Note, float]:
        """Return what answers a request to its end, what is noted of it, and when its time is over, by the loop's clock."""
        return self.service, note_of(request.scope), asyncio.get_running_loop().time() + self.timeout_seconds

    # --- OpenAI's API

    async def completions(self, request: HttpRequest) -> Response:
        """Answer with texts, or with a stream of them."""
        service, note, deadline = self.begun(request)
        asked = await self.read_from(request, lambda body: read_request(parse(body, EXAMPLE), service, self.name))
        note.prompt_tokens = asked.prompt_tokens
        if not asked.stream:
            answer = await complete(asked, service, request.receive, note, deadline)
            counted = answer["usage"]
            is_long = counted["completion_tokens"] + counted["prompt_tokens"] * asked.n * asked.echo > SHORT_TOKENS
            body = await done_by(is_long, lambda: encoded(answer, is_long=is_long))
            return Response(body, media_type="application/json")
        return EventStream(*await stream(asked, service, request.receive, note, deadline))

    async def models(self, request: HttpRequest) -> Response:
        """Answer with the one model."""
        model = {
            "id": self.name,
            "object": "model",
            "created": self.loaded,
            "owned_by": "lmdist",
            "lmdist": model_facts(self.service.bundle),
        }
        if (asked := request.path_params.get("model", self.name)) != self.name:
            raise no_model(asked, self.name)
        return JSONResponse(model if request.path_params else {"object": "list", "data": [model]})

    async def no_chat(self, request: HttpRequest) -> Response:
        """Answer what OpenAI has and a word-level model has not."""
        raise ApiError(NO_CHAT, 404)

    # --- the tokenizer

    def tokenizer(self, example: str, answer: Callable[[dict[str, Any], Service], dict[str, Any]]) -> Endpoint:
        """Return what answers with a function of tokenize_api.py."""

        async def answered(request: HttpRequest) -> Response:
            return JSONResponse(await self.read_from(request, lambda body: answer(parse(body, example), self.service)))

        return answered

    async def tokenizer_info(self, request: HttpRequest) -> Response:
        """Answer with the marks of the vocabulary."""
        return JSONResponse(tokenize_api.INFO)

    # --- MLflow's protocol

    async def invocations(self, request: HttpRequest) -> Response:
        """Answer as MLflow's scoring server."""
        service, note, deadline = self.begun(request)
        as_text = request.scope["path"].startswith(invocations.TEXT_PATH)
        growth = Growth()

        def read(body: bytes) -> tuple[list[Prompt], ResolvedOptions, Request]:
            given = parse(body, invocations.EXAMPLE)
            texts, params = invocations.prompts_and_params(invocations.as_gateway(given) if as_text else given)
            prompts, resolved = service.resolve(service.prompts(texts), Options.from_values(params))
            logprobs = resolved.options.logprobs
            return prompts, resolved, service.request(prompts, resolved, logprobs=logprobs, on_end=growth.on_end)

        prompts, resolved, job = await self.read_from(request, read)
        note.prompt_tokens, note.work = sum(len(prompt.ids) for prompt in prompts), job
        await finish(service.batcher, job, growth, request.receive, deadline)

        texts, echo = job.texts, resolved.options.echo
        is_long = sum(len(text.tokens) + len(text.prompt) * echo for text in texts) > SHORT_TOKENS

        def predictions() -> bytes:
            found = [to_completion(service.sampler, text, prompts[text.prompt_number], resolved) for text in texts]
            predicted = [text.text if as_text else invocations.answer(text) for text in found]
            return encoded({"predictions": predicted}, is_long=is_long)

        return Response(await done_by(is_long, predictions), media_type="application/json")

    async def ping(self, request: HttpRequest) -> Response:
        """Answer that the model is loaded."""
        return PlainTextResponse("\n", media_type="application/json")

    async def version(self, request: HttpRequest) -> Response:
        """Answer with the version of lmdist."""
        return PlainTextResponse(__version__)

    async def figures(self, request: HttpRequest) -> Response:
        """Answer Prometheus."""
        return Response(self.metrics.page(), media_type=CONTENT_TYPE)


async def body_of(request: HttpRequest, receive: Callable[[], Awaitable[Any]]) -> bytes:
    """Return the body of a request; raises BadRequest, or ClientLeft."""
    body = await read_body(dict(request.scope["headers"]), receive)
    if body is None:
        raise ClientLeft
    return body


# --- the page ------------------------------------------------------------------------------------------------------


def page_file(file: Path) -> Endpoint:
    """Return what answers with a file of the page, which is read once."""
    content = file.read_bytes()

    async def answer(request: HttpRequest) -> Response:
        return Response(content, media_type=MEDIA_TYPES[file.suffix], headers=PAGE_HEADERS)

    return answer


def reading_threads() -> ThreadPoolExecutor:
    """Return the threads that read requests, for a loop to have by default."""
    return ThreadPoolExecutor(READERS, "reader")
