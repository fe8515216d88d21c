"""Long work in short steps: a generator that yields before each of them, so that other work can have its turn.

    text = result_of(steps)             # all at once,
    text = yield from steps             # or as a part of other work in steps

What reads a prompt, searches or scores is written once, as such a generator; a command runs it to its end, and the server gives
each a step in turn. No onnxruntime here.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")

Steps = Generator[None, None, Result]
"""Work that yields before each step and returns its result."""
STEP_SECONDS = 0.02
"""Of a step: too short to be noticed, and long enough that what a call costs beside its tokens does not count."""


def result_of(steps: Steps[Result]) -> Result:
    """Return the result of work in steps, after all of them."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class Pace:
    """How many tokens the next step may have: as many as take STEP_SECONDS, or others, by the step before it."""

    def __init__(self, tokens: int, most: int, seconds: float = STEP_SECONDS) -> None:
        self.tokens, self.most, self.seconds = tokens, most, seconds

    def learn(self, tokens: int, seconds: float) -> None:
        """Remember how long a step of so many tokens took."""
        self.tokens = max(1, min(self.most, int(self.seconds * tokens / seconds)))
