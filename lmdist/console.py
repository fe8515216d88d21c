"""What a command prints while it works: log lines, a progress bar on a terminal, and the table of names and values at the end.

All of it but the table goes to stderr; stdout is for results. tqdm is imported only to draw a bar, so commands that sample
work without it. This module does not know what the commands do.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def log(line: str, command: str = "") -> None:
    """Print a line on stderr, after the name of the command where one is given."""
    sys.stderr.write(f"{command}: {line}\n" if command else f"{line}\n")
    sys.stderr.flush()


def table(rows: Mapping[str, object], width: int = 0) -> str:
    """Return a line for each name and its value, the values aligned at column `width` or after the longest name."""
    width = max(width, 2 + max(map(len, rows)))
    return "".join(f"{name:<{width}}{value}\n" for name, value in rows.items())


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
        """`unit_scale` writes 12.3M for 12,345,678; `seconds_between_lines` holds for `show` where there is no terminal."""
        self.silent = silent
        self.seconds_between_lines = seconds_between_lines
        self.shown = time.perf_counter()
        self.bar: tqdm | None = None
        if not silent and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:  # lines will do
                return
            self.bar = tqdm(total=total, initial=done, unit=unit, unit_scale=unit_scale, dynamic_ncols=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def log(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        elif not self.silent:
            log(line)

    def update(self, position: int) -> None:
        """Move the bar to `position` of the total."""
        if self.bar is not None:
            self.bar.update(position - self.bar.n)

    def show(self, figures: str, line: str) -> None:
        """Show figures beside the bar; where there is none print `line`, which says how far the work is as well."""
        if self.bar is not None:
            self.bar.set_postfix_str(figures, refresh=False)
        elif time.perf_counter() - self.shown >= self.seconds_between_lines:
            self.shown = time.perf_counter()
            self.log(line)


class Console:
    """Progress of a run on stderr."""

    def __init__(self, total_steps: int, done_steps: int, *, silent: bool) -> None:
        self.silent = silent
        self.total_steps = total_steps
        self.bar: tqdm | None = None
        if not silent and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total_steps, initial=done_steps, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def say(self, line: str) -> None:
        """Print a line."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        elif not self.silent:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def advance(self) -> None:
        """Count one step."""
        if self.bar is not None:
            self.bar.update()

    def show(self, step: int, nats: float, perplexity: float, tokens_per_second: float, rate: float, eta: float) -> None:
        """Show the figures of the last steps: on the bar, or as a line."""
        figures = f"loss {nats:.4f}  ppl {perplexity:,.1f}  tokens/s {tokens_per_second:,.0f}  lr {rate:.3g}"
        if self.bar is not None:
            self.bar.set_postfix_str(figures)
        else:
            self.say(f"step {step}/{self.total_steps}  {figures}  eta {duration(eta)}")


def duration(seconds: float) -> str:
    """Seconds as people write them: 59s, 2m05s, 3h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
