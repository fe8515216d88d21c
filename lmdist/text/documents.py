"""The documents of several files: each text once, and a count of what was skipped and why.

    documents = Documents(find_files(["news/*.csv.gz"]), ReadOptions(group_by="title"))
    for document in documents:
        document.text, document.group
    documents.skipped           # {"empty": 3, "duplicate": 11}
    documents.check_losses()    # DataError where many lines could not be read

A `Part` of them is what one process of several reads: the rows whose position lies in it. The position of a row is how many
bytes of the files were read before it, which only a reader knows: neither a packed file nor a quoted cell can be entered in its
middle. So a part reads its first file from the beginning, and skips what belongs to the parts before; reading is 20 times as
fast as tokenizing. What is said of a file as a whole, its lines, losses and notes, is said by the part with its last byte.

One row is held at a time. Memory grows by 100 bytes a row, the hash by which a duplicate is recognized. This module does not
know file formats (readers.py does), nor what a word is.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lmdist.counted import counted
from lmdist.errors import DataError
from lmdist.text.readers import ROWS_CHECKED, format_of, members_to_read, read
from lmdist.text.rows import Document, Row, Skipped
from lmdist.text.sources import File, ReadOptions, Source, open_sources, shortened, size_of
from lmdist.text.vocabulary import well_formed

# Why a row has no document, beside the reasons of the readers.
EMPTY, DUPLICATE = "empty", "duplicate"

MOST_LOST = 0.01
"""Share of the lines; more is an error unless it is allowed."""


@dataclass
class Loss:
    """Rows of a source that cannot be read, for one reason."""

    name: str
    why: str
    line: int
    """Number of the first line of the first one."""
    rows: int = 0
    lines: int = 0

    def __str__(self) -> str:
        rows, lines = counted(self.rows, "row"), counted(self.lines, "line")
        return f"{self.name}: {self.why}: {rows} on {lines}, the first at line {self.line:,}"


class Part(NamedTuple):
    """A part of the bytes of several files, one after the other."""

    start: int = 0
    stop: int = sys.maxsize


class Documents:
    """The documents of several files, one after the other, or a part of them; each iteration reads the files again."""

    def __init__(self, files: Sequence[File], options: ReadOptions | None = None, part: Part | None = None) -> None:
        self.files = files
        self.options = options or ReadOptions()
        self.part = part or Part()
        self.bytes = sum(map(size_of, files))
        self.bytes_read = 0
        """Bytes read so far, as they lie on the disk."""
        self.lines = 0
        """Lines of the files, or rows of formats without lines."""
        self.skipped: Counter[str] = Counter()
        """Rows without a document, by reason."""
        self.losses: dict[tuple[str, str], Loss] = {}
        """What cannot be read, by source and by what is wrong with it."""
        self.notes: list[str] = []
        """What the user should know about the files, the losses included."""
        self.num_rows = 0
        """Rows read so far."""
        self.rows: dict[int, tuple[int, int]] = {}
        """The first row of the part and the one after its last, by the number of the file."""

    def part_of(self, start: int, stop: int) -> Documents:
        """Return a part of these documents."""
        return Documents(self.files, self.options, Part(start, stop))

    def absolute(self) -> Documents:
        """Return the same documents for a process in another folder."""
        files = [file.absolute() if isinstance(file, Path) else file for file in self.files]
        return Documents(files, self.options, self.part)

    def check(self) -> None:
        """Read the beginning of each file, so that an error in the last one is known before the first takes hours."""
        for _, file, _, _ in self._spans():
            for source in self._sources(file):
                with closing(read(source, format_of(source))) as rows:
                    documents = (row for row in islice(rows, ROWS_CHECKED) if isinstance(row, Document))
                    next((row for row in documents if row.group or not self.options.group_by), None)

    @property
    def lost_lines(self) -> int:
        """Return the number of lines that cannot be read."""
        return sum(loss.lines for loss in self.losses.values())

    def check_losses(self) -> None:
        """Raise DataError where more than MOST_LOST of the lines cannot be read, unless the options allow it."""
        lost = self.lost_lines
        if lost > MOST_LOST * self.lines and not self.options.allow_losses:
            raise DataError(
                f"{lost:,} of {self.lines:,} lines ({lost / self.lines:.1%}) cannot be read: "
                f"{shortened([*map(str, self.losses.values())])}. Mend the file, or leave these lines out by --allow-losses"
            )

    def __iter__(self) -> Iterator[Document]:
        return (document for document, _ in self.with_digests())

    def with_digests(self) -> Iterator[tuple[Document, int | None]]:
        """Yield each document and a hash of its text, by which duplicates are found; None where they are meant."""
        self.forget()
        self.bytes_read = self.num_rows = 0
        seen: set[int] = set()
        for number, file, before, last in self._spans():
            self.bytes_read = position = before
            first = end = 0
            with closing(self._rows(file, says_all=last < self.part.stop)) as rows:
                for source, row, keeps_duplicates in rows:
                    # Each member of an archive begins at 0, and they need not lie there in the order in which they are read.
                    position = max(position, min(before + source.bytes_read, last))
                    if position >= self.part.stop:
                        break
                    end += 1
                    self.bytes_read = position
                    if position < self.part.start:
                        first = end
                    elif isinstance(row, Document):
                        text, group = well_formed(row.text), row.group and well_formed(row.group)
                        digest = None if keeps_duplicates else digest_of(text)
                        if digest is None or self._is_new(text, digest, seen):
                            yield Document(text, group), digest
                    self.num_rows += 1
                    if self.num_rows == self.options.rows:
                        self._note_unread(number)
                        return
            self.rows[number] = first, end
            self.bytes_read = min(before + size_of(file), self.part.stop)

    def _spans(self) -> Iterator[tuple[int, File, int, int]]:
        """Yield the files of the part: number, file, and the positions of the first rows and the last ones that it can have."""
        before = 0
        for number, file in enumerate(self.files):
            size = size_of(file)
            last = before + max(0, size - 1)
            if last >= self.part.start and before < self.part.stop:
                yield number, file, before, last
            before += size

    def _sources(self, file: File) -> Generator[Source]:
        return open_sources(file, self.options, members_to_read)

    def _rows(self, file: File, *, says_all: bool) -> Generator[tuple[Source, Row, bool]]:
        """Yield the rows of a file, each with its source and whether its format keeps duplicates.

        `says_all`: what cannot be read is counted, and what there is to say of the file is said at its end.
        """
        with closing(self._sources(file)) as sources:
            for source in sources:
                found = format_of(source)
                source.rows_left = max(0, self.options.rows - self.num_rows)
                try:
                    for row in read(source, found):
                        if says_all and isinstance(row, Skipped):
                            self._count(row, source)
                        yield source, row, found.keeps_duplicates
                finally:
                    if says_all:
                        self.lines += source.lines
                        self.notes += map(str, source.notes)
                        self.notes += [str(loss) for (name, _), loss in self.losses.items() if name == source.name]

    def _count(self, row: Skipped, source: Source) -> None:
        """Count a row that is skipped."""
        self.skipped[row.reason] += 1
        if row.why:
            loss = self.losses.setdefault((source.name, row.why), Loss(source.name, row.why, row.line))
            loss.rows += 1
            loss.lines += row.num_lines

    def _note_unread(self, number: int) -> None:
        """Note which files are not read because `rows` ended in the one of this number."""
        others = [str(file) for file in self.files[number + 1 :]]
        if others:
            self.notes.append(f"--rows {self.options.rows:,} ended in {self.files[number]}; not read were {shortened(others)}")

    def _is_new(self, text: str, digest: int, seen: set[int]) -> bool:
        """Return whether a text is neither empty nor a duplicate; count the reason if it is."""
        reason = EMPTY if not text or text.isspace() else DUPLICATE if digest in seen else None
        if reason is None:
            seen.add(digest)
            return True
        self.skipped[reason] += 1
        return False

    # --- what is said of what was read ---

    def forget(self) -> None:
        """Forget what was said before."""
        self.lines = 0
        for found in (self.skipped, self.losses, self.notes, self.rows):
            found.clear()

    def facts(self) -> dict[str, Any]:
        """Return what there is to say, as JSON has it."""
        return {
            "lines": self.lines,
            "skipped": dict(self.skipped),
            "losses": [asdict(loss) for loss in self.losses.values()],
            "notes": self.notes,
            "rows": {str(number): rows for number, rows in self.rows.items()},
        }

    def add(self, facts: Mapping[str, Any]) -> None:
        """Add the facts of the next part to those of the parts before; raise DataError where rows are missing between them."""
        self.lines += facts["lines"]
        self.skipped.update(facts["skipped"])
        for found in facts["losses"]:
            # Two addresses may have the same name, for it is without what gives access.
            loss = self.losses.setdefault((found["name"], found["why"]), Loss(found["name"], found["why"], found["line"]))
            loss.rows += found["rows"]
            loss.lines += found["lines"]
        self.notes += facts["notes"]
        for name, (first, end) in facts["rows"].items():
            number = int(name)
            before = self.rows.get(number, (0, 0))[1]
            if first != before:
                raise DataError(
                    f"{self.files[number]} was not read alike by all shards: one ends before row {before:,}, the next begins "
                    f"at row {first:,}; was the file changed? Count the shards again"
                )
            self.rows[number] = 0, end


def digest_of(text: str) -> int:
    """Return a hash of a text, below 2**64."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
