"""Why MLflow did not accept something: a line without secrets, and whether another attempt may succeed.

Exceptions of MLflow and of the libraries below it quote addresses, and an address may hold a password. This module does not
import mlflow.
"""

from __future__ import annotations

import errno
import os
import re
from urllib.parse import unquote

from lmdist.errors import DataError, causes, one_line

FINAL_CODES = {
    "BAD_REQUEST",
    "ENDPOINT_NOT_FOUND",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
}
"""MLflow's codes of errors that a request has again, whenever it is sent."""
DAMAGED = re.compile(
    r"no such (table|column)|duplicate column|(table|index) \S+ already exists|not a database|malformed"
    r"|out-of-date database schema|Can't locate revision"
)
"""What SQLite and MLflow say of a database that does not mend itself."""
DATABASES = re.compile(r"(mlflow|sqlalchemy|sqlite3|alembic)\b")
"""Modules whose exceptions may have such a text."""
WRAPPERS = re.compile(r"(mlflow|requests|urllib3|sqlalchemy)\b")
"""Modules whose exceptions repeat a cause that says more."""
SECRET_NAME = re.compile("PASSWORD|SECRET|CREDENTIAL|(^|_)TOKENS?(_|$)|_KEYS?(_|$)", re.IGNORECASE)
"""The name of a variable that holds a secret: GITHUB_TOKEN, and not TOKENIZERS_PARALLELISM."""
NO_SECRET = re.compile("true|false|yes|no|on|off|none|[0-9.]{1,7}", re.IGNORECASE)
"""The value of such a variable that is a switch, or a small number."""
SHORTEST_SECRET = 3
"""A shorter one would be found in every text."""


class UploadError(Exception):
    """MLflow did not accept a request, and may later. The message contains no secret."""


class FinalError(UploadError):
    """MLflow did not accept a request, and never will unless somebody mends what the message names."""


def upload_error(error: Exception) -> UploadError:
    """Return an error of MLflow as one whose message contains no secret."""
    if isinstance(error, UploadError):
        return error
    kind = FinalError if is_final(error) else UploadError
    return kind(reason_without_secrets(error))


def is_final(error: Exception) -> bool:
    """Return whether the same request would fail again, however long one waits."""
    if isinstance(error, UploadError):
        return isinstance(error, FinalError)
    return any(
        isinstance(one, PermissionError | ImportError | DataError)
        or getattr(one, "errno", None) == errno.EROFS
        or getattr(one, "error_code", "") in FINAL_CODES
        or is_damaged_database(one)
        for one in causes(error)
    )


def reason_without_secrets(error: Exception) -> str:
    """Return the type and the message of an error, without secrets, in one line."""
    if isinstance(error, UploadError):
        return str(error)
    cause: BaseException = error
    for one in causes(error):
        module = type(one).__module__
        if module == "builtins" and not isinstance(one, OSError) and one is not error:
            break  # such as the KeyError that MLflow's own message explains
        cause = one
        if not WRAPPERS.match(module):
            break
    code = getattr(error, "error_code", "")
    name = f"{type(cause).__name__} {code}" if cause is error and re.fullmatch("[A-Z_]+", str(code)) else type(cause).__name__
    text = getattr(cause, "strerror", None) or cause
    message = without_secrets(one_line(Exception(text)))
    damaged = any(is_damaged_database(one) for one in causes(error))
    hint = "; the database is damaged, or of another version of MLflow: move it away" if damaged else ""
    return (f"{name}: {message}" if message else name) + hint


def is_damaged_database(error: BaseException) -> bool:
    """Return whether an error is one of a database that does not mend itself."""
    return bool(DATABASES.match(type(error).__module__) and DAMAGED.search(str(error)))


def without_secrets(text: str) -> str:
    """Return a text without passwords: of the addresses in it, of MLFLOW_TRACKING_URI, and of variables named like secrets."""
    secrets = {value for name, value in os.environ.items() if SECRET_NAME.search(name) and not NO_SECRET.fullmatch(value)}
    userinfo = re.search(r"//(.*)@", os.environ.get("MLFLOW_TRACKING_URI", ""))  # as in `without_password`
    parts = [userinfo[1], *userinfo[1].split(":", 1)] if userinfo else []
    secrets |= {*parts, *map(unquote, parts)}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, "***")
    # A query may hold a signature.
    return re.sub(r"(://[^\s?]*)\?[^\s'\")]*", r"\1", re.sub(r"//[^/\s]*@", "//", text))
