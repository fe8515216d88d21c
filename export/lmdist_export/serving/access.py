"""Which requests lmdist-serve answers: those that have an API key, and those that ask for it by a name of its own.

    keys = ApiKeys.read(Path("keys.txt"))       # a key a line
    keys.allow(b"Bearer sk-...")                # of the header Authorization
    hosts = Hosts(["news.example.org"])
    hosts.allow("localhost:8000")               # of the header Host

Keys are kept as their sha256 and compared in constant time; no message has one in it.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path

from lmdist.errors import DataError
from lmdist.storage.reading import read_bytes

MAX_FILE_BYTES = 2**20


class ApiKeys:
    """The keys of which a request needs one."""

    def __init__(self, keys: list[bytes]) -> None:
        self.digests = [sha256(key).digest() for key in keys]

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """Read a file with a key a line; empty lines and those that begin with # are none.

        Raise MissingInputError, or DataError for a file without a key, or with one that no header can hold.
        """
        lines = (line.strip() for line in read_bytes(path, MAX_FILE_BYTES).splitlines())
        keys = [line for line in lines if line and not line.startswith(b"#")]
        if not keys:
            raise DataError(f"{path} has no key; one in each line is expected")
        if not all(key.isascii() and key.decode("ascii").isprintable() and b" " not in key for key in keys):
            raise DataError(f"{path} has a line that is no key: letters, digits and punctuation of ASCII are expected")
        return cls(keys)

    def allow(self, authorization: bytes) -> bool:
        """Return whether the value of an Authorization header has one of the keys; all are compared, in constant time."""
        scheme, _, key = authorization.partition(b" ")
        digest = sha256(key.strip()).digest()
        found = [hmac.compare_digest(digest, known) for known in self.digests]
        return scheme.lower() == b"bearer" and any(found)


class Hosts:
    """The names by which a server may be asked: `localhost`, those that it was given, and addresses in numbers.

    A web page may have its own name lead to this machine, and then reads what a server here answers, past the rules of browsers
    (DNS rebinding). The name stays in the header Host.
    """

    def __init__(self, names: Iterable[str]) -> None:
        """Allow the names of this machine and `names`; `*` is any."""
        self.names = {"", "localhost", *(name.lower() for name in names)}  # none is in a request of HTTP/1.0

    def allow(self, host: str) -> bool:
        """Return whether the value of a Host header, with a port or without, is one of the names."""
        name = re.sub(r":\d*\Z", "", host.strip()).strip("[]").removesuffix(".").lower()
        if name in self.names or name.endswith(".localhost") or "*" in self.names:
            return True
        with suppress(ValueError):
            return bool(ip_address(name))
        return False
