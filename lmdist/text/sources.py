"""Files, stdin and the members of zip archives as sources of bytes, unpacked by what the bytes say and not by a name.

    for source in open_sources(Path("news.zip"), ReadOptions()):
        source.name, source.stream.read()      # "news.zip: articles1.csv", b"id,title,..."

A compression is a line in PACKED, a kind of file that holds no text to read is one in REFUSED. What cannot be read twice,
stdin or a pipe, is copied to a temporary file. This module does not know formats, nor encodings.
"""

from __future__ import annotations

import atexit
import bz2
import gzip
import io
import lzma
import os
import re
import shutil
import stat
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path, PurePath
from typing import IO, Any, Literal, NamedTuple, Protocol

from lmdist.counted import counted
from lmdist.errors import DataError, UsageError, one_line, require
from lmdist.settings import ReadSettings, TextSettings
from lmdist.text.where import Condition

STDIN = Path("-")
SAMPLE_BYTES = 1 << 15
"""What of the beginning of a file tells what it is."""


@dataclass(frozen=True)
class ReadOptions(ReadSettings):
    """What to read of a file, and how."""

    group_by: str = ""
    """The column of the groups, if any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.condition  # a mistake in it is known before anything is read

    @cached_property
    def condition(self) -> Condition | None:
        """The condition on the columns of a row, if any."""
        return Condition(self.where) if self.where else None

    @classmethod
    def of(cls, settings: ReadSettings, text: TextSettings, group_by: str = "") -> ReadOptions:
        """Return the options of a command that reads files as the settings say, for a tokenizer with these settings."""
        values: dict[str, Any] = {setting.name: getattr(settings, setting.name) for setting in fields(ReadSettings)}
        values["lines"] = settings.lines or text.line_by_line
        return cls(**values, group_by=group_by)


class OtherFile(Protocol):
    """A file that is no path; its __str__ is what messages call it."""

    @property
    def name(self) -> str:
        """Return its last part, with the extension."""
        ...

    @property
    def can_seek(self) -> bool:
        """Whether it can be read at any place."""
        ...

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Open it as a path is opened."""
        ...

    @property
    def version(self) -> str:
        """What differs once it has other content, as far as that is known, or ""."""
        ...

    def size(self) -> int:
        """Return the size in bytes."""
        ...


File = Path | OtherFile


@dataclass
class Source:
    """A file that is being read, or a member of an archive."""

    name: str
    """As messages name it."""
    file_name: PurePath
    """Its extension says which format it has."""
    stream: io.BufferedReader
    """Its unpacked bytes."""
    options: ReadOptions
    position: Callable[[], int]
    """Returns how many bytes of the file on the disk were read."""
    size: int
    """Of the file on the disk, in bytes."""
    notes: list[object] = field(default_factory=list)
    """What the user should know about the source; an object that counts is a note too, by its __str__."""
    bytes_read: int = 0
    """Of the file on the disk, so far."""
    lines: int = 0
    """Lines read so far, or rows of a format without lines."""
    rows_left: int = 0
    """Rows that will be asked for; 0: all. Readers that read ahead stop there."""

    def head(self) -> bytes:
        """Return the first bytes of the stream, which stay in it."""
        return self.stream.peek(SAMPLE_BYTES)[:SAMPLE_BYTES]


def open_sources(
    path: File, options: ReadOptions, choose: Callable[[Sequence[str]], Sequence[str]] = list
) -> Generator[Source]:
    """Yield what a file holds: itself, or the members of a zip archive whose names `choose` returns.

    A source can be read until the next one is asked for. Raises DataError, naming the file, for what is not text.
    """
    with errors_of(str(path)), ExitStack() as stack:
        raw = stack.enter_context(open_once(path))
        size = size_of(path)
        file = Source(str(path), PurePath(path.name), unpacked(raw, str(path), stack), options, raw.tell, size)
        archive = stack.enter_context(zipfile.ZipFile(file.stream)) if file.head().startswith(ZIP) else None
        if archive is None or spreadsheet_engine(archive):
            if archive:
                file.stream.seek(0)
            yield file
            return
        names = members(archive, str(path))
        chosen = sorted(choose(names))
        left_out = [name for name in names if name not in chosen]
        notes: list[object] = [f"{path}: not read were {shortened(left_out)}"] if left_out else []
        for name in chosen:
            if archive.getinfo(name).flag_bits & 1:
                raise DataError(f"{path}: {name} is encrypted: unpack the archive, and name its files")
            with ExitStack() as of_member:
                stream = unpacked(of_member.enter_context(archive.open(name)), f"{path}: {name}", of_member)
                member = Source(f"{path}: {name}", PurePath(name), stream, options, raw.tell, size, notes)
                if member.head().startswith(ZIP):
                    raise DataError(f"{member.name} is an archive in an archive: unpack the outer one, and name its files")
                yield member
            notes = []


def spreadsheet_engine(archive: zipfile.ZipFile) -> str:
    """Return the package that reads an archive which is a spreadsheet, or ""."""
    names = {info.filename: info for info in archive.infolist()}
    kind = names.get("mimetype")
    if kind and kind.file_size == len(OPEN_DOCUMENT_SHEET) and not kind.flag_bits & 1:
        return "odf" if archive.read(kind) == OPEN_DOCUMENT_SHEET else ""
    return "openpyxl" if "xl/workbook.xml" in names else ""


def members(archive: zipfile.ZipFile, name: str) -> list[str]:
    """Return the names of an archive's files; raise DataError where it is a document of an office program, or empty."""
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    if "[Content_Types].xml" in names or "mimetype" in names:
        raise DataError(f"{name} is not text but a document or a spreadsheet: save it as CSV or as plain text")
    names = [name for name in names if not name.startswith("__MACOSX/") and not PurePath(name).name.startswith(".")]
    if not names:
        raise DataError(f"{name} is an archive without a file")
    return names


def shortened(names: Sequence[str], most: int = 5) -> str:
    """Return the first names in a row, and how many others there are."""
    return ", ".join(names[:most]) + (f" and {counted(len(names) - most, 'other')}" if len(names) > most else "")


@contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Turn the errors of reading a file into DataError, naming it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{name} cannot be read: {one_line(error)}") from None


# --- files that can be read once -----------------------------------------------------------------------------------


def open_once(path: File) -> IO[bytes]:
    """Open a file, stdin or a pipe at its beginning."""
    if not is_pipe(path):
        return path.open("rb")
    file = os.fdopen(os.dup(copied(path).fileno()), "rb")
    file.seek(0)
    return file


def size_of(path: File) -> int:
    """Return the size in bytes of a file, of stdin or of what came through a pipe."""
    if is_pipe(path):
        return os.fstat(copied(path).fileno()).st_size
    with errors_of(str(path)):
        return path.stat().st_size if isinstance(path, Path) else path.size()


def is_pipe(path: File) -> bool:
    """Return whether a path is `-` for stdin, or a pipe such as the shell's <(zcat news.gz), or else can only be read once."""
    if not isinstance(path, Path):
        return not path.can_seek
    try:
        return stat.S_ISFIFO(path.stat().st_mode)
    except (OSError, ValueError):  # ValueError: not a possible name
        return path == STDIN


@cache
def copied(path: File) -> IO[bytes]:
    """Return a temporary file with all that comes through a pipe; it has no name, and goes with the process."""
    if path == STDIN and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("- is stdin, and nothing is piped into it: name a file, or pipe text into the command")
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile())
        try:
            with sys.stdin.buffer if path == STDIN else path.open("rb") as pipe:
                shutil.copyfileobj(pipe, file, SAMPLE_BYTES)
            file.flush()
        except OSError as error:
            place = tempfile.gettempdir()
            raise DataError(
                f"{path} cannot be copied to {place}: {error.strerror}; the variable TMPDIR names another folder"
            ) from None
        atexit.register(stack.pop_all().close)
    return file


# --- what the bytes say --------------------------------------------------------------------------------------------

ZIP = (b"PK\x03\x04", b"PK\x05\x06")
OPEN_DOCUMENT_SHEET = b"application/vnd.oasis.opendocument.spreadsheet"


@contextmanager
def open_zstd(raw: IO[bytes]) -> Iterator[io.RawIOBase]:
    """Decompress zstd, for which Python has no module."""
    require("zstandard", purpose="a file packed with zstd cannot be read: ")
    import zstandard

    class Decompressed(io.RawIOBase):
        """The decompressed bytes; an error of zstandard's is an OSError, as those of the other compressions are."""

        stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            try:
                return self.stream.readinto(buffer)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None

    yield Decompressed()


PACKED: dict[bytes, Callable[[IO[bytes]], AbstractContextManager[Any]]] = {
    rb"\x1f\x8b\x08": gzip.open,
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": bz2.open,
    rb"\xfd7zXZ\x00": lzma.open,
    rb"(\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)": open_zstd,
}
"""The first bytes of packed files, and how each is unpacked."""
PACKED_EXTENSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")
"""They say nothing of the format, which is that of the extension before them."""


class Refused(NamedTuple):
    """A kind of file without text that could be read: its name, and what its owner can do."""

    name: str
    advice: str


REFUSED: dict[bytes, Refused] = {
    rb"%PDF-": Refused("a PDF", "save its text as plain text, with pdftotext for example"),
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a": Refused("an image", "name files of text"),
    rb"\{\\rtf": Refused("a document in Rich Text Format", "save it as plain text"),
    rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": Refused("a document or a spreadsheet", "save it as CSV or as plain text"),
    rb"(?s).{257}ustar": Refused("a tar archive", "unpack it, and name the files in it"),
    rb"7z\xbc\xaf\x27\x1c": Refused("a 7z archive", "unpack it, and name the files in it"),
    rb"Rar!\x1a\x07": Refused("a RAR archive", "unpack it, and name the files in it"),
    rb"\x04\x22\x4d\x18": Refused("packed with lz4", "unpack it, or pack it with gzip, bzip2, xz or zstd"),
    rb"\x1f\x9d": Refused("packed with compress", "unpack it, or pack it with gzip, bzip2, xz or zstd"),
    rb"SQLite format 3\x00": Refused("a database of SQLite", "save its table as CSV"),
}
"""The first bytes of files that are refused; others show by their NUL bytes that they are not text."""


def unpacked(stream: IO[bytes], name: str, stack: ExitStack) -> io.BufferedReader:
    """Return the bytes of a stream with all compression taken off; raise DataError for what is not text."""
    while True:
        buffered: Any = stack.enter_context(io.BufferedReader(stream, SAMPLE_BYTES))  # pyright: ignore[reportArgumentType]
        head = buffered.peek(SAMPLE_BYTES)
        for magic, refused in REFUSED.items():
            if re.match(magic, head):
                raise DataError(f"{name} is not text but {refused.name}: {refused.advice}")
        opener = next((opener for magic, opener in PACKED.items() if re.match(magic, head)), None)
        if opener is None:
            return buffered
        stream = stack.enter_context(opener(buffered))
