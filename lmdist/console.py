"""What a person sees of a run: a bar on a terminal, plain lines elsewhere. Rank 0 only; the others get a silent one."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm


class Console:
    """Progress of a run on stderr."""

    def __init__(self, total_steps: int, done_steps: int, *, silent: bool) -> None:
        self.silent = silent
        self.total_steps = total_steps
        self.bar: tqdm | None = None
        if not silent and sys.stderr.isatty():
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
