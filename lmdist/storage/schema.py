"""Check JSON against expected types, given as Python annotations.

Data folders, checkpoints and bundles are all checked here. Matching checksums do not prove a well-formed file: a stranger
can compute them too. This module does not know what the values mean.
"""

from __future__ import annotations

import math
import reprlib
from itertools import repeat
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lmdist.errors import DataError, UsageError, one_line

Kind = TypeVar("Kind")

SIMPLE = {int: "an integer", float: "a number", str: "a string", bool: "true or false", NoneType: "null"}


def check_version(value: dict[str, Any], expected: tuple[str, int], path: Path) -> None:
    """Raise DataError unless a JSON object has the expected format and version."""
    found = value.get("format"), value.get("version")
    if found != expected:
        raise DataError(
            f"{path} has the format {reprlib.repr(found[0])}, version {reprlib.repr(found[1])}; "
            f"this lmdist reads {expected[0]!r}, version {expected[1]}"
        )


def check_schema(value: Any, schema: Any, path: Path, place: str = "") -> None:
    """Raise DataError, naming the file and the place in it, unless a value of JSON has a schema.

    A schema is a type, as in an annotation: int, float, str, bool, Literal[...], list[...], tuple[..., ...], a tuple of fixed
    length, dict[str, ...] or a union; or an object with at least certain keys: a dict of their schemas, a TypedDict or a
    dataclass. Integers fit into 64 bits, other numbers are finite.
    """
    problem = find_mismatch(value, schema)
    if problem:
        raise DataError(f"{path}: {(place + problem).lstrip('. ')}")


def find_mismatch(value: Any, schema: Any) -> str:
    """Return the place in a value that does not match a schema, and why; empty if all of it does."""
    if isinstance(schema, type) and schema in SIMPLE:
        fits = is_number(value, schema) if schema in (int, float) else isinstance(value, schema)
        return "" if fits else is_not(value, SIMPLE[schema])
    kind, choices = get_origin(schema), get_args(schema)
    if kind in (Union, UnionType):
        problems = [find_mismatch(value, choice) for choice in choices]
        return problems[0] if all(problems) else ""
    if kind is Literal:
        return "" if value in choices else is_not(value, " or ".join(map(repr, choices)))
    if kind in (list, tuple):
        if not isinstance(value, list):
            return is_not(value, "a list")
        each = kind is tuple and choices[-1] is not Ellipsis  # a schema for each item
        if each and len(value) != len(choices):
            return is_not(value, f"a list of {len(choices)}")
        for number, (item, choice) in enumerate(zip(value, choices if each else repeat(choices[0]), strict=False)):
            if problem := find_mismatch(item, choice):
                return f"[{number}]{problem}"
        return ""
    if not isinstance(value, dict):
        return is_not(value, "an object")
    if kind is dict:
        for key, item in value.items():
            if problem := find_mismatch(item, choices[1]):
                return f".{reprlib.repr(key)}{problem}"
        return ""
    for key, expected in (schema if isinstance(schema, dict) else get_type_hints(schema)).items():
        if problem := find_mismatch(value[key], expected) if key in value else " is missing":
            return f".{key}{problem}"
    return ""


def is_number(value: Any, kind: type) -> bool:
    """Return whether a value is an int of 64 bits, or where `kind` is float a finite float."""
    # bool is a subclass of int in Python, not in JSON.
    return abs(value) < 2**63 if type(value) is int else type(value) is kind and math.isfinite(value)


def is_not(value: Any, expected: str) -> str:
    """Return the end of a message: what the value is, and what is expected."""
    return f" is {reprlib.repr(value)}; {expected} is expected"


def dataclass_from_json(kind: type[Kind], values: dict[str, Any], path: Path, place: str = "") -> Kind:
    """Build a dataclass from a JSON object; raise DataError for an unknown name and for a value of the wrong type.

    A field that the object does not name has its default: it may be newer than the file. A list becomes a tuple.
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
