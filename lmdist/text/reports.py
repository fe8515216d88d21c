"""What lmdist-prepare says: which files it reads, how far it is, and what it has written.

This module does not know how any of that is done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdist.console import ProgressBar, duration, log
from lmdist.counted import counted
from lmdist.settings import TextSettings
from lmdist.text.rows import FILTERED

if TYPE_CHECKING:
    from lmdist.text.counting import Sources

SECONDS_BETWEEN_LINES = 5.0


def announce(sources: Sources, output: Path) -> None:
    """Say which files are read."""
    files = [file for documents in sources.values() for file in documents.files]
    log(f"reading {', '.join(map(str, files[:3]))}{', ...' if len(files) > 3 else ''} into {output}")


@contextmanager
def reading_progress(size: int) -> Iterator[ReadingProgress]:
    """Yield the progress of reading `size` bytes, shown on stderr."""
    with ProgressBar(size, "B", unit_scale=True, seconds_between_lines=SECONDS_BETWEEN_LINES) as bar:
        yield ReadingProgress(bar, size)


class ReadingProgress:
    """How far the reading of `size` bytes is, how fast it goes and how long it will take."""

    def __init__(self, bar: ProgressBar, size: int) -> None:
        self.bar = bar
        self.size = size
        self.first: tuple[float, int, int] | None = None
        """Time, bytes and tokens after the first chunk; before it were imports."""

    def show(self, bytes_read: int, documents: int, tokens: int) -> None:
        """Show the progress after a chunk."""
        now = time.perf_counter()
        self.first = self.first or (now, bytes_read, tokens)
        began, first_bytes, first_tokens = self.first
        seconds = max(1e-9, now - began)
        rate = f"{(tokens - first_tokens) / seconds:,.0f} tokens/s"
        left = seconds * (self.size - bytes_read) / max(1, bytes_read - first_bytes)
        found = counted(documents, "document")
        self.bar.show(
            f"{found}, {rate}",
            f"{bytes_read / 1e6:,.1f} of {self.size / 1e6:,.1f} MB  {found}  {counted(tokens, 'token')}  {rate}  "
            f"{duration(left)} left",
        )
        self.bar.update(bytes_read)


def summary(meta: Mapping[str, Any], output: Path) -> str:
    """Return the table at the end of the command."""
    lines = [f"{'':<8}{'documents':>12}{'tokens':>16}{'unknown':>10}"]
    lines += [
        f"{split:<8}{facts['documents']:>12,}{facts['tokens']:>16,}{facts['unknown_rate']:>10.2%}"
        for split, facts in meta["splits"].items()
    ]
    units = "pieces of words" if TextSettings(**meta["text"]).has_pieces else "words"
    lines.append(f"vocabulary: {meta['vocabulary_size']:,} {units}, including <unk> and <eos>")
    if given := meta.get("vocabulary"):
        lines.append(
            f"  {given['words']:,} are those of {given['from']}, which has {counted(given['shared'], 'word')} of this text; "
            f"{given['new']:,} of it are new, {given['dropped']:,} became <unk>"
        )
    if filtered := meta["skipped"].get(FILTERED):
        rows = sum(facts["documents"] for facts in meta["splits"].values()) + sum(meta["skipped"].values())
        lines.append(f"--where left {rows - filtered:,} of {counted(rows, 'row')}")
    if meta["skipped"]:
        lines.append("skipped: " + ", ".join(f"{count:,} {reason}" for reason, count in meta["skipped"].items()))
    lines.append(f"written to {output}")
    return "".join(f"{line}\n" for line in lines)
