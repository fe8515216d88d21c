"""Addresses without the passwords, signatures and tokens in them, as they are shown and stored.

    without_credentials("https://u:secret@host/a.csv?sig=abc")      # https://host/a.csv?...

This module does not know who has the addresses.
"""

from __future__ import annotations

import re

USER = re.compile(r"(?<=://)[^/\s?#]*@")
"""The name and the password of a user, before the host."""
QUERY = re.compile(r"\?(?=[^/?\s]*=)\S*")
"""What follows the path, where it has names and values: a signature or a token gives access to the file."""


def without_credentials(text: str) -> str:
    """Return an address, or a message with addresses in it, without passwords, signatures and tokens."""
    return QUERY.sub("?...", USER.sub("", text))
