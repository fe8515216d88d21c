"""The format of a data folder's meta.json: what lmdist-prepare writes and training reads."""

from __future__ import annotations

from typing import Literal, TypedDict

from lmdist.storage.checksums import FileFacts

FORMAT = "lmdist data"
VERSION = 1


class SplitFacts(TypedDict):
    """What meta.json says of a split, among other things."""

    tokens: int


META = {
    "dtype": Literal["uint16", "uint32"],
    "vocabulary_size": int,
    "splits": dict[str, SplitFacts],
    "files": dict[str, FileFacts],
}
"""What whoever reads meta.json may count on."""
