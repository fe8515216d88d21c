"""No function of the packages is longer than 80 lines."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for folder in ("lmdist", "export/lmdist_export") for path in (ROOT / folder).rglob("*.py"))
LONGEST = 80


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path: Path) -> None:
    """A function counts from its first decorator to its last line, docstring and nested functions included."""
    functions = [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = {}
    for function in functions:
        first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
        assert function.end_lineno is not None
        lengths[f"{function.name} in line {first}"] = function.end_lineno - first + 1
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}
