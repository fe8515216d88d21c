"""Bounds of settings, written in their annotations and checked by one function: every number has a range.

    @dataclass
    class DataSettings:
        global_batch: Annotated[int, at_least(1)] = 20

        def __post_init__(self) -> None:
            check_bounds(self, "data")      # UsageError: data.global_batch is 0; it must be at least 1

This module does not know which settings exist. What concerns several fields of a class stays in its `__post_init__`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from lmdist.errors import UsageError

LARGEST = 10**12
"""The high end of what needs no other: a checkpoint, in which numbers have 64 bits, can hold it."""


@dataclass(frozen=True)
class Bounds:
    """An interval of numbers. NaN lies in none."""

    low: float = -math.inf
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True
    note: str = ""
    """What a special value means, such as "0 keeps all"."""

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.includes_low else value > self.low
        below = value <= self.high if self.includes_high else value < self.high
        return above and below

    def __str__(self) -> str:
        """Return the interval in words: "at least 1", "above 0 and at most 1", "from 0 to 1"."""
        low = f"{'at least' if self.includes_low else 'above'} {self.low:,}"
        high = "finite" if self.high == math.inf else f"{'at most' if self.includes_high else 'below'} {self.high:,}"
        if self.high == math.inf and self.includes_high:
            text = low
        elif self.low == -math.inf:
            text = high
        elif self.includes_low and self.includes_high:
            text = f"from {self.low:,} to {self.high:,}"
        else:
            text = f"{low} and {high}"
        return f"{text} ({self.note})" if self.note else text


def at_least(low: float, note: str = "") -> Bounds:
    """Return the bounds low <= value <= LARGEST."""
    return Bounds(low, LARGEST, note=note)


def above(low: float, note: str = "") -> Bounds:
    """Return the bounds low < value <= LARGEST."""
    return Bounds(low, LARGEST, includes_low=False, note=note)


def between(low: float, high: float, note: str = "", *, includes_low: bool = True, includes_high: bool = True) -> Bounds:
    """Return the bounds low <= value <= high; either end can be excluded."""
    return Bounds(low, high, includes_low, includes_high, note)


SEED = between(-(2**63), 2**63 - 1)
"""Seeds of torch's and numpy's generators."""


def check(name: str, value: Any, expected: Any) -> None:
    """Raise UsageError, with `name` in it, unless `value` is within `expected`: Bounds, or the choices of a Literal."""
    if isinstance(expected, Bounds):
        if value not in expected:
            raise UsageError(f"{name} is {value}; it must be {expected}")
    elif value not in expected:
        raise UsageError(f"{name} is {value!r}; expected one of {', '.join(map(str, expected))}")


def check_name(name: str, value: str) -> None:
    """Raise UsageError, with the `name` of a setting in it, for what no folder is called: nothing, or a name with NUL in it.

    To Python the empty name is the folder that one is in, which would be filled with files.
    """
    if not value or "\0" in value:
        raise UsageError(f"{name} is {value!r}; the name of a folder is expected")


def check_bounds(settings: object, section: str = "") -> None:
    """Raise UsageError unless each field of a dataclass lies within its bounds and each Literal is one of its choices.

    `section` stands before the name of a field in the message: "data" names `data.window`. None is a setting that is not given.
    """
    prefix = f"{section}." if section else ""
    for name, expected in bounds_of(type(settings)).items():
        value = getattr(settings, name)
        if value is not None:
            check(f"{prefix}{name}", value, expected)


@cache
def bounds_of(kind: type) -> dict[str, Bounds | tuple[Any, ...]]:
    """Return the Bounds, or the choices of the Literal, of each field that has either."""
    found: dict[str, Bounds | tuple[Any, ...]] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if get_origin(hint) is Annotated:
            found.update((name, extra) for extra in hint.__metadata__ if isinstance(extra, Bounds))
        elif get_origin(hint) is Literal:
            found[name] = get_args(hint)
    return found
