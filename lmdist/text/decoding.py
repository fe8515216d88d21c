"""From bytes to lines of text: the encoding is found from the first bytes, and what is not text is refused.

    for line in lines_of(source, newline="\n"):
        line            # with its line break

Where no encoding is named it is UTF-8, or UTF-16 or UTF-32 with a byte order mark; a few bytes that are not UTF-8 are read as
Windows-1252. Many NUL bytes or many bytes that are not UTF-8 refute that. This module does not know formats.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator

from lmdist.counted import counted
from lmdist.errors import DataError
from lmdist.text.sources import Source

LONGEST_ROW = 1 << 27
"""Characters, more than any novel has. A longer row is a quote left open, or a line of zeros that gzip made small."""
PROGRESS_CHARACTERS = 1 << 16
"""Characters between two updates of `Source.bytes_read`, and between two looks at the share of odd bytes."""

MOST_UNDECODABLE = 0.1
"""Share of the characters. In the languages of Windows-1252 it is 0.01 (German) to 0.1 (Icelandic), in others 0.15 to 1."""
MOST_NULS = 0.001
"""Share of the first bytes."""
FEWEST = 10
"""So few bytes of either kind are an accident, whatever their share."""

MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's mark, with which it begins
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def lines_of(source: Source, newline: str) -> Iterator[str]:
    """Yield the lines of a source, decoded; `newline` is that of `open`, and line breaks stay.

    Raises DataError for what is not text, and for a line that is too long to be held in memory.
    """
    undecodable = UndecodableBytes(source)
    characters = shown = 0
    with decode(source, undecodable, newline) as decoded:
        while line := decoded.readline(LONGEST_ROW):
            if len(line) == LONGEST_ROW:
                raise DataError(f"{source.name} has a line of more than {LONGEST_ROW:,} characters: text has line breaks")
            characters += len(line)
            source.lines += 1
            if characters - shown > PROGRESS_CHARACTERS:  # tell() is a system call: one a line would take a third of the time
                source.bytes_read, shown = max(source.bytes_read, source.position()), characters
                check_share(undecodable.count, characters, str(source))
            yield line
    check_share(undecodable.count, characters, str(source))


def decode(source: Source, undecodable: UndecodableBytes, newline: str) -> io.TextIOWrapper:
    """Return the text of a source, whose encoding is guessed from its first bytes where none is named."""
    head = source.head()
    encoding = source.options.encoding or next((name for mark, name in MARKS.items() if head.startswith(mark)), "")
    if encoding:
        return io.TextIOWrapper(source.stream, encoding, newline=newline)
    check_nuls(head, source.name)
    text = head.decode("utf-8", "surrogateescape")
    check_share(0 if text.isascii() else sum("\udc80" <= letter <= "\udcff" for letter in text), len(text), source.name)
    codecs.register_error("lmdist", undecodable)
    return io.TextIOWrapper(source.stream, "utf-8-sig", "lmdist", newline=newline)


def check_nuls(head: bytes, name: str) -> None:
    """Raise DataError where the first bytes of a file are UTF-16 without a mark, or no text at all."""
    nuls = head.count(0)
    if nuls <= max(FEWEST, MOST_NULS * len(head)):
        return
    at_odd = head[1::2].count(0)
    for encoding, count in (("utf-16-le", at_odd), ("utf-16-be", nuls - at_odd)):
        if count > 0.95 * nuls:
            raise DataError(f"{name} seems to be UTF-16 without a byte order mark: give --encoding {encoding}")
    raise DataError(
        f"{name} is not text: {nuls:,} of its first {len(head):,} bytes are NUL; or name its encoding by --encoding"
    )


def check_share(undecodable: int, characters: int, name: str) -> None:
    """Raise DataError where too many bytes are not UTF-8, of so many characters, to be Windows-1252."""
    if undecodable > max(FEWEST, MOST_UNDECODABLE * characters):
        raise DataError(
            f"{name} is not UTF-8: {undecodable:,} bytes in {characters:,} characters are not, too many for Windows-1252; "
            "name its encoding by --encoding (gb18030, cp1251, shift_jis, utf-16-le), or it is not text"
        )


class UndecodableBytes:
    """An error handler of codecs: reads bytes that are not UTF-8 as Windows-1252, as browsers do, and counts them.

    It is itself the note of the source, so the count is right wherever reading stops.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.count = 0
        self.example = ""

    def __call__(self, error: UnicodeError) -> tuple[str, int]:
        """Return the characters of undecodable bytes, and where to continue (the protocol of codecs.register_error)."""
        assert isinstance(error, UnicodeDecodeError)
        if not self.count:
            self.source.notes.append(self)
            around = error.object[max(0, error.start - 20) : error.end + 20].decode("cp1252", "replace").split()
            self.example = " ".join(around[1:-1] if len(around) > 2 else around)
        self.count += error.end - error.start
        return error.object[error.start : error.end].decode("cp1252", "replace"), error.end

    def __str__(self) -> str:
        read = counted(self.count, "byte is not UTF-8 and was read", "bytes are not UTF-8 and were read")
        return f"{self.source.name}: {read} as Windows-1252, as in {self.example!r}; --encoding names another"
