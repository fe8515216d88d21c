"""Compare JSON with the types that are expected of it.

`check_schema` is the one place that does so for data folders, checkpoints and bundles. Matching checksums are no proof of a
well-formed file, for a stranger can compute them too.
"""

from __future__ import annotations

import reprlib
from itertools import repeat
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lmdist.errors import DataError, UsageError, one_line

Made = TypeVar("Made")

SIMPLE = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}


def check_version(value: dict[str, Any], expected: tuple[str, int], path: Path) -> None:
    """Raise DataError unless a JSON object says that it has the expected format and version."""
    found = value.get("format"), value.get("version")
    if found != expected:
        raise DataError(
            f"{path} says it is {reprlib.repr(found[0])}, version {reprlib.repr(found[1])}; "
            f"this lmdist reads {expected[0]!r}, version {expected[1]}"
        )


def check_schema(value: Any, shape: Any, path: Path, place: str = "") -> None:
    """Raise DataError, naming the file and the place in it, unless a value of JSON has a shape.

    A shape is a type, as annotations have it: int, float, str, bool, Literal[...], list[...], tuple[..., ...], a tuple of
    certain length, dict[str, ...] or a union; or an object with at least certain keys: a dict of their shapes, a TypedDict or
    a dataclass. Numbers are finite and fit into 64 bits.
    """
    problem = mismatch(value, shape)
    if problem:
        raise DataError(f"{path}: {(place + problem).lstrip('. ')}")


def mismatch(value: Any, shape: Any) -> str:
    """Where a value does not have a shape, and why not; empty where it has."""
    if isinstance(shape, type) and shape in SIMPLE:
        fits = is_number(value, shape) if shape in (int, float) else isinstance(value, shape)
        return "" if fits else unlike(value, SIMPLE[shape])
    kind, choices = get_origin(shape), get_args(shape)
    if kind in (Union, UnionType):
        problems = [mismatch(value, choice) for choice in choices]
        return problems[0] if all(problems) else ""
    if kind is Literal:
        return "" if value in choices else unlike(value, " or ".join(map(repr, choices)))
    if kind in (list, tuple):
        if not isinstance(value, list):
            return unlike(value, "a list")
        each = kind is tuple and choices[-1] is not Ellipsis  # a shape for each item
        if each and len(value) != len(choices):
            return unlike(value, f"a list of {len(choices)}")
        for number, (item, choice) in enumerate(zip(value, choices if each else repeat(choices[0]), strict=False)):
            if problem := mismatch(item, choice):
                return f"[{number}]{problem}"
        return ""
    if not isinstance(value, dict):
        return unlike(value, "an object")
    if kind is dict:
        for key, item in value.items():
            if problem := mismatch(item, choices[1]):
                return f".{reprlib.repr(key)}{problem}"
        return ""
    for key, expected in (shape if isinstance(shape, dict) else get_type_hints(shape)).items():
        if problem := mismatch(value[key], expected) if key in value else " is missing":
            return f".{key}{problem}"
    return ""


def is_number(value: Any, kind: type) -> bool:
    """Whether a value is an int, or a float where that is asked for, and fits into 64 bits."""
    # In Python true is an int; in JSON it is none. And what is no number is not below anything.
    return type(value) in (int, kind) and abs(value) < 2**63


def unlike(value: Any, expected: str) -> str:
    """That a value is not what is expected."""
    return f" is {reprlib.repr(value)}; {expected} is expected"


def dataclass_from_json(kind: type[Made], values: dict[str, Any], path: Path, place: str = "") -> Made:
    """Make a dataclass of a JSON object; raises DataError for a name it does not know and for a value it does not take.

    What the object does not name has its default: a field may be younger than the file. A list becomes a tuple.
    """
    hints = get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise DataError(
                f"{path}: {reprlib.repr(name)} is not known {f'in {place}' if place else 'here'}; known are {', '.join(hints)}"
            )
    check_schema(values, {name: hints[name] for name in values}, path, place)
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except UsageError as error:
        raise DataError(f"{path}: {one_line(error)}") from None
