"""Conditions on the columns of a table, as --where takes them: read by their syntax tree before anything evaluates them.

    condition = Condition("publication == 'Atlantic' and year >= 2016")
    condition.kinds             # {"publication": "text", "year": "number"}: its columns, and as what their cells are compared
    condition.expression        # "(column_0 == constant_0) and (column_1 >= constant_1)"
    condition.constants         # {"constant_0": "Atlantic", "constant_1": 2016.0}

The language is the part of `DataFrame.query`'s that compares: columns, numbers and texts, comparisons, arithmetic, and, or,
not. The string of the user is parsed and never evaluated: what pandas gets is `expression`, which is written anew from the
tree, and in which all names are those above. Calls, attributes, subscripts and variables have no place in it. A cell is
compared as what the expression compares it with, and not as what it looks like, so that no row depends on others of its
chunk. This module does not know pandas.
"""

from __future__ import annotations

import ast
import re
import reprlib
import warnings
from typing import Literal

from lmdist.errors import UsageError

Kind = Literal["text", "number"]

LONGEST = 10_000
"""Characters of a condition."""
LARGEST_INTEGER = 2**53
"""A float is no integer's alone from here on: it is that of 2**53 + 1 as well."""

SCANNED = re.compile(r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|`([^`]*)`|([&|])""", re.DOTALL)
"""What Python has no syntax for, outside of strings: names in backticks, and pandas' spelling of `and` and `or`."""

ORDERS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
COMPARISONS = {ast.Eq: "==", ast.NotEq: "!=", **ORDERS}
MEMBERSHIPS = {ast.In: "in", ast.NotIn: "not in"}
JUNCTIONS = {ast.And: "and", ast.Or: "or"}
ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%"}
SIGNS = {ast.UAdd: "+", ast.USub: "-"}
# No power: 9**9**9 would not end.


class Condition:
    """A condition on the cells of a row; raises UsageError for what is not in the language."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.kinds: dict[str, Kind] = {}
        """The columns that it names, in the order of `column_0`, `column_1`, and as what their cells are compared."""
        self.constants: dict[str, str | float | list[str] | list[float]] = {}
        self._in_backticks: dict[str, str] = {}
        try:
            self.expression = self._condition(self._parsed())
        except RecursionError:
            raise self._mistake("it is nested too deeply") from None

    def __str__(self) -> str:
        """Return the condition as messages show it."""
        return f"--where {self.text if len(self.text) <= 100 else self.text[:100] + '...'!r}"

    def _parsed(self) -> ast.expr:
        if len(self.text) > LONGEST:
            raise self._mistake(f"it has {len(self.text):,} characters, and {LONGEST:,} are the most")
        name = "in_backticks_"
        while name in self.text:
            name += "_"

        def python(match: re.Match[str]) -> str:
            string, column, junction = match.groups()
            if column is not None:
                self._in_backticks[f"{name}{len(self._in_backticks)}"] = column
                return f" {name}{len(self._in_backticks) - 1} "
            return string or (" and " if junction == "&" else " or ")

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of '\d' in a string
                tree = ast.parse(SCANNED.sub(python, self.text).strip(), mode="eval")
        except SyntaxError as error:
            raise self._mistake(error.msg) from None
        except (ValueError, MemoryError) as error:  # a NUL character, too many parentheses
            raise self._mistake(str(error) or "it is nested too deeply") from None
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and type(node.value) is int and node.value >= LARGEST_INTEGER:
                shown = reprlib.repr(node.value)
                raise self._mistake(
                    f"numbers are compared as floats, which round {shown}: for just this number give '{shown}', a text in "
                    f"quotes, or as a limit {shown}.0"
                )
        return tree.body

    # --- from the tree to an expression ---

    def _condition(self, node: ast.expr) -> str:
        if isinstance(node, ast.BoolOp):
            return f" {JUNCTIONS[type(node.op)]} ".join(f"({self._condition(value)})" for value in node.values)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
            return f"not ({self._condition(node.operand)})"
        if isinstance(node, ast.Compare):
            return self._comparison(node)
        raise self._mistake(f"{self._shown(node)} is no comparison")

    def _comparison(self, node: ast.Compare) -> str:
        operands = [node.left, *node.comparators]
        if isinstance(node.ops[0], ast.In | ast.NotIn) and len(operands) == 2:
            operands, values = [node.left], self._values(node.comparators[0])
        elif all(type(operator) in COMPARISONS for operator in node.ops):
            values = []
        else:
            raise self._mistake(
                f"{self._shown(node)} has another comparison than {', '.join(COMPARISONS.values())} and a single in"
            )
        if not any(map(names_a_column, operands)):
            raise self._mistake(f"{self._shown(node)} compares no column")
        kinds = {kind_of(operand) for operand in operands} | {kind_of_value(value) for value in values}
        if {"number", "text"} <= kinds:
            raise self._mistake(f"{self._shown(node)} compares a number with a text")
        # Two columns by themselves: an order is that of numbers.
        ordered = any(type(operator) in ORDERS for operator in node.ops)
        kind: Kind = "number" if "number" in kinds or ("text" not in kinds and ordered) else "text"
        written = [self._operand(operand, kind) for operand in operands]
        if values:
            return f"{written[0]} {MEMBERSHIPS[type(node.ops[0])]} {self._constant(values)}"
        signs = [COMPARISONS[type(operator)] for operator in node.ops]
        return " and ".join(f"({a} {sign} {b})" for a, sign, b in zip(written, signs, written[1:], strict=False))

    def _values(self, node: ast.expr) -> list[str] | list[float]:
        values = [value_of(part) for part in node.elts] if isinstance(node, ast.List | ast.Tuple) else []
        if not values or None in values:
            raise self._mistake(f"{self._shown(node)} is no list of texts or numbers, like ['Atlantic', 'Vox']")
        return values  # pyright: ignore[reportReturnType]

    def _operand(self, node: ast.expr, kind: Kind) -> str:
        value = value_of(node)
        if isinstance(value, str) and kind == "number":
            raise self._mistake(f"it calculates with the text {value!r}")
        if value is not None:
            return self._constant(value)
        if isinstance(node, ast.Name):
            return self._column(self._in_backticks.get(node.id, node.id), kind)
        if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
            return f"({SIGNS[type(node.op)]}{self._operand(node.operand, kind)})"
        if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and names_a_column(node):
            return f"({self._operand(node.left, kind)} {ARITHMETIC[type(node.op)]} {self._operand(node.right, kind)})"
        raise self._mistake(f"{self._shown(node)} is neither a column nor a number, nor a text in quotes")

    def _column(self, name: str, kind: Kind) -> str:
        if self.kinds.setdefault(name, kind) != kind:
            raise self._mistake(f"it compares {name} with a number and with a text")
        return f"column_{list(self.kinds).index(name)}"

    def _constant(self, value: str | float | list[str] | list[float]) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = value
        return name

    # --- errors ---

    def _shown(self, node: ast.expr) -> str:
        """Return a part of the condition as its user wrote it, or nearly so."""
        written = ast.unparse(node)
        for name, column in self._in_backticks.items():
            written = written.replace(name, f"`{column}`")
        return written if len(written) <= 60 else f"{written[:60]}..."

    def _mistake(self, why: str) -> UsageError:
        return UsageError(
            f"{self}: {why}. Columns are compared with numbers or with texts in quotes, by == != < <= > >= in, not in, "
            "and comparisons are joined by and, or, not: --where \"publication == 'Atlantic' and year >= 2016\""
        )


def value_of(node: ast.expr) -> str | float | None:
    """Return the text or the number that a node is, or None."""
    if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
        number = value_of(node.operand)
        return None if not isinstance(number, float) else -number if isinstance(node.op, ast.USub) else number
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):  # not True, which is an int too
        try:
            return float(node.value)  # pyright: ignore[reportArgumentType]
        except OverflowError:
            return None
    return None


def kind_of(node: ast.expr) -> Kind | None:
    """Return what a column is compared as that is compared with a node; None where it is a column too."""
    if isinstance(node, ast.BinOp | ast.UnaryOp):
        return "number"
    return kind_of_value(value_of(node))


def kind_of_value(value: str | float | None) -> Kind | None:
    """Return the kind of a constant."""
    return None if value is None else "text" if isinstance(value, str) else "number"


def names_a_column(node: ast.expr) -> bool:
    """Return whether a column is in an expression: what has none is the same for all rows, and 1 / 0 is an error."""
    return any(isinstance(part, ast.Name) for part in ast.walk(node))
