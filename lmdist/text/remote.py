"""Files at addresses with a scheme, such as s3://, gs://, https:// and memory://, by fsspec.

    for file in find_remote("s3://bucket/news/*.parquet"):
        file.open(), file.size(), str(file)         # the address as messages name it, without credentials

A file is read where it lies, by ranges of bytes; where a web server sends no ranges, `can_seek` is False, and sources.py copies
the file first, as it does with a pipe. What goes wrong on the way is a DataError. This module does not know formats.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import IO, Any, Literal, cast
from urllib.parse import unquote

from lmdist.credentials import without_credentials
from lmdist.errors import DataError, MissingInputError, UsageError, missing_package, one_line, require

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[^/]*)?://")
WEB = re.compile(r"https?://", re.IGNORECASE)
OTHER_CERTIFICATES = "SSL_CERT_FILE, or of s3:// AWS_CA_BUNDLE, names a file of the certificates to trust"
VERSIONS = (
    *("etag", "md5hash", "content-md5", "digest", "sha", "crc32c"),  # of the content
    *("mtime", "lastmodified", "last-modified", "last_modified", "last_write_time", "modificationtime", "modify", "updated"),
    *("created", "date_time"),
)
"""Under which of these names a file system has what changes with the content of a file, the best first; in small letters."""


def is_remote(name: str) -> bool:
    """Return whether a name is an address with a scheme."""
    return ADDRESS.match(name) is not None


def find_remote(pattern: str, files_to_name: Callable[[str, Iterable[str]], str]) -> list[RemoteFile]:
    """Return the files that an address or a glob of addresses matches; raise MissingInputError where there are none.

    `files_to_name` returns what to name in a folder with such files, for the error of one that is given.
    """
    shown = without_credentials(pattern)
    if "::" in pattern:
        raise UsageError(f"{shown} is a chain of addresses, which is not read: name the file itself, which may be packed")
    with errors_of_any_kind(shown):
        filesystem, path = filesystem_of(pattern)
        # In the address of a web page a question mark begins the query, and brackets may be those of a host.
        is_glob = re.search("[*]" if WEB.match(pattern) else "[*?[]", path)
        if is_glob and filesystem._get_kwargs_from_urls(pattern):
            # A host, a user, a password: the addresses of the files that it finds would lack them.
            raise UsageError(f"{shown} is a pattern, and at such an address each file must be named")
        try:
            found = filesystem.glob(path, detail=True) if is_glob else {path: filesystem.info(path)}
        except FileNotFoundError as error:
            if WEB.match(pattern) and error.__cause__ is not None and getattr(error.__cause__, "status", None) != 404:
                raise error.__cause__ from None  # a web server that refuses, or that does not answer
            raise MissingInputError(f"{shown} does not exist") from None
        if not is_glob and found[path]["type"] == "directory":
            raise UsageError(f"{shown} is a folder; {files_to_name(shown.rstrip('/'), names_below(filesystem, path))}")
    files = [filesystem.unstrip_protocol(name) for name, info in sorted(found.items()) if info["type"] == "file"]
    if not files:
        raise MissingInputError(f"no file matches {shown}")
    return [RemoteFile(file) for file in files] if is_glob else [RemoteFile(pattern)]


def names_below(filesystem: Any, path: str) -> Iterator[str]:
    """Yield the names of the files in a folder, and then those of the folders in it."""
    start = len(path.rstrip("/"))
    for folder, _, names in filesystem.walk(path, maxdepth=4):
        yield from (f"{folder[start:].strip('/')}/{name}".lstrip("/") for name in names)


def filesystem_of(address: str) -> tuple[Any, str]:
    """Return the file system of an address and the path in it; raise UsageError where a package that it needs is missing."""
    purpose = f"{without_credentials(address)} cannot be read: "
    require("fsspec", purpose=purpose)
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(address)
    except ImportError as error:
        from lmdist.extras import not_installed

        package = missing_package(error)
        raise UsageError(purpose + (not_installed(package) if package else one_line(error))) from None
    except ValueError as error:  # an unknown scheme
        raise UsageError(purpose + described(error)) from None


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address."""

    address: str

    def __str__(self) -> str:
        return without_credentials(self.address)

    @property
    def name(self) -> str:
        """Return the last part of the path, which has the extension."""
        path = re.split("[?#]", self.address)[0] if WEB.match(self.address) else self.address
        return unquote(PurePosixPath(path).name)

    def size(self) -> int:
        """Return the size in bytes."""
        return self._size or 0

    @property
    def version(self) -> str:
        """What differs once the file has other content, such as its ETag or the time of its last change, or ""."""
        return self._facts[1]

    @property
    def _size(self) -> int | None:
        return self._facts[0]

    @cached_property
    def _facts(self) -> tuple[int | None, str]:
        with errors_of_any_kind(str(self)):
            filesystem, path = filesystem_of(self.address)
            info = {str(name).lower(): value for name, value in filesystem.info(path).items()}
            return info.get("size"), next((str(info[name]) for name in VERSIONS if info.get(name)), "")

    @property
    def can_seek(self) -> bool:
        """Whether the file can be read at any place: some web servers send it only as a whole."""
        return self._can_seek

    @cached_property
    def _can_seek(self) -> bool:
        if not WEB.match(self.address) or not self._size:
            return self._size is not None
        with errors_of_any_kind(str(self)), self._opened("rb") as stream:
            try:
                stream.seek(self._size - 1)
                return len(stream.read(1)) == 1
            except ValueError:
                return False

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Open the file for reading, at any place where it can be."""
        with errors_of_any_kind(str(self)):
            stream = self._opened(mode) if self.can_seek else self._opened(mode, block_size=0)  # as a whole
        return cast("IO[bytes]", Readable(stream, str(self)))

    def _opened(self, mode: str, **options: Any) -> Any:
        filesystem, path = filesystem_of(self.address)
        return filesystem.open(path, mode, **options)


class Readable(io.RawIOBase):
    """A stream of fsspec's with errors that name the file."""

    def __init__(self, stream: Any, shown: str) -> None:
        self.stream = stream
        self.shown = shown

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def seekable(self) -> bool:
        """Return whether it can be read at any place."""
        return self.stream.seekable()

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; return the number of bytes."""
        with errors_of_any_kind(self.shown):
            data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place and return it."""
        with errors_of_any_kind(self.shown):
            return self.stream.seek(offset, whence)

    def tell(self) -> int:
        """Return the place."""
        return self.stream.tell()

    def close(self) -> None:
        """Close the stream."""
        if not self.closed:
            self.stream.close()
        super().close()


@contextmanager
def errors_of_any_kind(name: str) -> Iterator[None]:
    """Turn the errors of a file system into DataError, without credentials; each file system has errors of its own."""
    try:
        yield
    except (UsageError, DataError, MissingInputError):
        raise
    except Exception as error:
        raise DataError(f"{name} cannot be read: {described(error)}") from None


def described(error: Exception) -> str:
    """Return the message of an error without credentials, or its kind where it has none."""
    message = one_line(OSError(without_credentials(str(error)))) or type(error).__name__
    return f"{message}; {OTHER_CERTIFICATES}" if "CERTIFICATE_VERIFY_FAILED" in message else message
