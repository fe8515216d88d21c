"""What lmdist-serve answers where it cannot do what is asked: a status and a sentence, in the form of OpenAI or of MLflow.

    status, message = status_and_message(error)
    openai_error(error, status, message)                # a response

A defect goes to the log, as the places in the code where it came up: its message may quote a text.
"""

from __future__ import annotations

import math
import traceback
from asyncio import CancelledError
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse, Response

from lmdist.console import log
from lmdist.errors import UsageError
from lmdist_export.options import PARAMS
from lmdist_export.serving import invocations
from lmdist_export.serving.batching import QueueFull
from lmdist_export.serving.openai_request import OPENAI_NAMES
from lmdist_export.serving.running import ClientLeft

ErrorResponse = Callable[[BaseException, int, str], Response]
CLIENT_LEFT = 499
"""The status in the log of a request whose client has disconnected before its answer began, as nginx has it."""
MLFLOW_CODES = {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 429: "RESOURCE_EXHAUSTED", 500: "INTERNAL_ERROR"}
"""MLflow's names of errors; others are the client's mistake below 500, and from there on a matter of time."""


def status_and_message(error: BaseException) -> tuple[int, str]:
    """Return the status of an error and its sentence; log what is a defect."""
    match error:
        case UsageError():
            return getattr(error, "status", 400), str(error)
        case QueueFull():
            return 429, str(error)
        case TimeoutError():
            return 504, "the answer took longer than this server gives a request"
        case ClientLeft():
            return CLIENT_LEFT, "the client has disconnected"
        case CancelledError():
            return 503, "this server is stopping, and the answer was not ready by then"
    frames = "".join(traceback.format_tb(error.__traceback__))
    log(f"a request could not be answered: {type(error).__name__}\n{frames.rstrip()}")
    return 500, f"{type(error).__name__}: the server's log has more"


def error_object(error: BaseException, status: int, message: str) -> dict[str, Any]:
    """Return an error in OpenAI's form; `param` is the name with which the message of a table's option begins."""
    first = message.partition(" ")[0]
    param = getattr(error, "param", None) or (first if first in PARAMS or first in OPENAI_NAMES else None)
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": getattr(error, "code", None)}}


def openai_error(error: BaseException, status: int, message: str) -> Response:
    """Return an error in OpenAI's form."""
    return JSONResponse(error_object(error, status, message), status, error_headers(error, status))


def mlflow_error(error: BaseException, status: int, message: str) -> Response:
    """Return an error in MLflow's form."""
    usual = "INVALID_PARAMETER_VALUE" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "TEMPORARILY_UNAVAILABLE"
    body = invocations.error_body(MLFLOW_CODES.get(status, usual), message)
    return Response(body, status, error_headers(error, status), media_type="application/json")


def error_headers(error: BaseException, status: int) -> dict[str, str]:
    """Return the headers that a status has beside."""
    if isinstance(error, QueueFull):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after_seconds)))}
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(status, {})
    return {**headers, "Connection": "close"} if getattr(error, "closes", False) else headers
