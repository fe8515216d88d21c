"""The tokens of a split, read where they lie on the disk: from one file or from several, as one sequence.

    tokens = Tokens([TokenFile(folder, "train.bin", ...)])
    tokens[1000:1035]                       # (35,) uint16: only these are read

A block of a file is checked when something of it is read for the first time, on whichever rank that is: its checksum, if the
folder has one, and that its ids are of the vocabulary. So the start of a job reads nothing, and a damaged block is named by its
place, not by what trains on it. Files are read and not mapped: one that is truncated meanwhile, or that its disk or its server
cannot deliver, is an error with a name, and not the signal SIGBUS. This module does not know what is made of the tokens.
"""

from __future__ import annotations

import os
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from lmdist.errors import DataError, OwnDataError
from lmdist.storage.checksums import BLOCK_BYTES
from lmdist.storage.held import HeldFolder


class TokenFile:
    """A token file that is held open, and which of its blocks were checked."""

    def __init__(
        self, folder: HeldFolder, name: str, dtype: str, num_tokens: int, vocabulary_size: int, sums: Sequence[int] | None
    ) -> None:
        """Open a file of `num_tokens` ids below `vocabulary_size`; raise MissingInputError, or DataError for another size.

        `sums` are the CRC-32 of its blocks; None in a folder of before there were any.
        """
        self.folder = folder
        self.name = name
        self.path = folder.path / name
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.num_tokens = num_tokens
        self.vocabulary_size = vocabulary_size
        self.sums = sums
        self.descriptor, self.bytes = folder.descriptor(name), folder.size(name)
        if self.bytes != num_tokens * self.dtype.itemsize:
            raise DataError(f"{self.path} has {self.bytes} bytes; {num_tokens} tokens of {self.dtype.itemsize} are expected")
        self.num_blocks = -(-self.bytes // BLOCK_BYTES)
        if sums is not None and len(sums) != self.num_blocks:
            raise DataError(f"{folder.path} is damaged: it has {len(sums)} sums of the {self.num_blocks} blocks of {name}")
        self.checked = bytearray(self.num_blocks)
        """1 for each block that was checked."""
        self.before = os.fstat(self.descriptor)

    def read(self, tokens: NDArray[np.unsignedinteger], start: int) -> None:
        """Fill `tokens` (N,) with those from number `start` on; raise DataError where a block that they lie in is damaged."""
        offset = start * self.dtype.itemsize
        for block in range(offset // BLOCK_BYTES, -(-(offset + tokens.nbytes) // BLOCK_BYTES)):
            if not self.checked[block]:
                self.check(block)
        self.read_bytes(tokens.view(np.uint8).data, offset)

    def check(self, block: int) -> None:
        """Check a block; raise OwnDataError, naming its place, where it is damaged."""
        start = block * BLOCK_BYTES
        content = bytearray(min(BLOCK_BYTES, self.bytes - start))
        self.read_bytes(memoryview(content), start)
        damaged = (
            f"{self.path} is damaged in its block {block + 1} of {self.num_blocks}, bytes {start} to {start + len(content)}"
        )
        if self.sums is not None and zlib.crc32(content) != self.sums[block]:
            raise OwnDataError(f"{damaged}: its checksum is not the one recorded when it was written; prepare the folder anew")
        largest = int(np.frombuffer(content, self.dtype).max())
        if largest >= self.vocabulary_size:  # on a GPU an error that does not name the file, hours later
            raise OwnDataError(f"{damaged}: it has a token {largest}, and the vocabulary ends at {self.vocabulary_size - 1}")
        self.checked[block] = 1

    def read_bytes(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from `offset` on."""
        done = 0
        try:
            while done < len(buffer):  # no call returns more than 2 GiB
                count = os.preadv(self.descriptor, [buffer[done:]], offset + done)
                if not count:
                    raise OwnDataError(f"{self.path} was truncated while it was read: prepare the folder anew")
                done += count
        except OSError as error:
            raise OwnDataError(f"{self.path} cannot be read: {error.strerror}") from None

    def check_unchanged(self, expected: str) -> None:
        """Raise DataError if the file was written to since it was opened, and has not the sha256 that is `expected`.

        One that was removed, or replaced by another file, is still what it was to this process.
        """
        now = os.fstat(self.descriptor)
        if (now.st_size, now.st_mtime_ns) == (self.before.st_size, self.before.st_mtime_ns):
            return
        if self.folder.sha256(self.name) != expected:
            raise DataError(
                f"{self.path} was overwritten while the job read it, and nothing is saved since: prepare other text "
                "into another folder, and this one anew to continue"
            )
        self.before = now


class Tokens:
    """The tokens of some files, one after the other."""

    def __init__(self, files: Sequence[TokenFile]) -> None:
        assert files
        self.files = files
        self.ends = list(accumulate(file.num_tokens for file in files))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, place: slice) -> NDArray[np.unsignedinteger]:
        """Return a slice with a step of 1, (N,) uint16 or uint32; raise DataError where a block that it lies in is damaged."""
        start, stop, step = place.indices(len(self))
        assert step == 1, place
        tokens = np.empty(max(0, stop - start), self.files[0].dtype)
        number, filled = bisect_right(self.ends, start), 0
        while filled < len(tokens):
            file = self.files[number]
            first = start + filled - (self.ends[number] - file.num_tokens)
            count = min(len(tokens) - filled, file.num_tokens - first)
            file.read(tokens[filled : filled + count], first)
            number, filled = number + 1, filled + count
        return tokens
