"""What a command prints while it works: log lines, a progress bar on a terminal, and the table of names and values at the end.

All of it but the table goes to stderr; stdout is for results. tqdm is imported only to show a bar, so commands that sample
work without it. This module does not know what the commands do.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lmdist.errors import escaped

if TYPE_CHECKING:
    from tqdm import tqdm


def log(line: str, command: str = "") -> None:
    """Print a line on stderr, after the name of the command where one is given."""
    sys.stderr.write(escaped(f"{command}: {line}\n" if command else f"{line}\n"))
    sys.stderr.flush()


def next_line(*commands: Sequence[object]) -> str:
    """Return the line that ends the output of a command: what to run next, as a shell takes it."""
    return f"next: {'; '.join(shlex.join(map(str, command)) for command in commands)}"


def unused_path(path: Path) -> Path:
    """Return a name that is free, for a command that a user may run next: this one, or NAME-2, NAME-3 and so on."""
    names = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in count(1))
    return next(name for name in names if not os.path.lexists(name))


def table(rows: Mapping[str, object], width: int = 0) -> str:
    """Return a line for each name and its value, the values aligned at column `width` or after the longest name."""
    width = max(width, 2 + max(map(len, rows)))
    return "".join(f"{name:<{width}}{escaped(value)}\n" for name, value in rows.items())


def shown(value: object) -> str:
    """Return a figure as people read it."""
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 10 else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


class ProgressBar:
    """Progress on stderr: a bar on a terminal, lines elsewhere; nothing where `silent`, as on ranks other than 0."""

    def __init__(
        self,
        total: int,
        unit: str,
        *,
        done: int = 0,
        silent: bool = False,
        unit_scale: bool = False,
        seconds_between_lines: float = 0.0,
    ) -> None:
        """A `total` of 0 is not known yet. `unit_scale` writes 12.3M for 12,345,678; `seconds_between_lines` holds for `show`
        where there is no terminal.
        """
        self.silent = silent
        self.seconds_between_lines = seconds_between_lines
        self.shown = time.perf_counter()
        self.bar: tqdm | None = None
        if not silent and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:  # lines will do
                return
            self.bar = tqdm(total=total or None, initial=done, unit=unit, unit_scale=unit_scale, dynamic_ncols=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def log(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(escaped(line), file=sys.stderr)
        elif not self.silent:
            log(line)

    def update(self, position: int) -> None:
        """Move the bar to `position` of the total."""
        if self.bar is not None:
            self.bar.update(position - self.bar.n)

    def set_total(self, total: int) -> None:
        """Take another total."""
        if self.bar is not None:
            self.bar.total = total
            self.bar.refresh()

    def show(self, figures: str, line: str) -> None:
        """Show figures beside the bar; where there is none print `line`, which includes the progress."""
        if self.bar is not None:
            self.bar.set_postfix_str(figures)
        elif time.perf_counter() - self.shown >= self.seconds_between_lines:
            self.shown = time.perf_counter()
            self.log(line)


def duration(seconds: float) -> str:
    """Return a duration in words: 59s, 2m05s, 3h07m."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded}s"
    if rounded < 3600:
        return f"{rounded // 60}m{rounded % 60:02d}s"
    return f"{rounded // 3600}h{rounded % 3600 // 60:02d}m"
