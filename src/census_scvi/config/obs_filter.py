"""Value filters on obs: parse them, check them against the columns, and rewrite them for TileDB-SOMA.

TileDB-SOMA 2.3 crashes on the negation of a group, `not (a in [...])`. It also truncates a fraction that is compared
with a column of whole numbers, so that `nnz >= 317.5` finds 317. Here negations are moved to the comparisons (De
Morgan's laws), and every literal is checked against the type of its column. As in TileDB and in nullable columns of
pandas, a comparison never matches a missing value, but `== None` does. NaN in a column of floats matches only `!=`.
The negation of `<` becomes `>=`, which does not match NaN, and TileDB has no condition that could add it.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, Literal

from census_scvi.config.messages import shown, suggestion
from census_scvi.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

EXAMPLE = "tissue == 'blood' and nnz >= 300"
_LISTED = "list values as in tissue in ['blood', 'lung']"
_MOST_PARTS = 2000  # TileDB evaluates them recursively
_PRECEDENCE = "& and | bind closer than ==: put each comparison in parentheses, or write and, or"
_OPERATORS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.In: "in",
    ast.NotIn: "not in", ast.Is: "==", ast.IsNot: "!=",
}  # fmt: skip
_NEGATED = {"==": "!=", "<": ">=", "<=": ">", "in": "not in"}
_NEGATED |= {negated: operator for operator, negated in _NEGATED.items()}
_MIRRORED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
# Comparison of whole numbers with a fraction such as 317.5: operator, and function that rounds the fraction.
_WHOLE = {"<": ("<", math.ceil), ">=": (">=", math.ceil), ">": (">", math.floor), "<=": ("<=", math.floor)}


class FilterError(UserError):
    """A value filter that cannot be used; the message begins with the setting or argument that contains it."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of a column with a literal, or with a list of literals for `in` and `not in`."""

    column: str
    operator: str
    value: Any


@dataclass(frozen=True)
class Group:
    """Conditions combined with `and` or `or`."""

    word: Literal["and", "or"]
    parts: tuple[Condition, ...]


Condition = Comparison | Group


def parse_filter(text: str) -> Condition:
    """Parse a value filter to conditions without negations.

    Raises
    ------
    ValueError
        The text is not a value filter; the message has the reason and usually an example.
    """
    try:
        return _condition(_expression(text), negated=False)
    except (RecursionError, MemoryError):
        raise ValueError(f"it is nested too deep; {_LISTED}") from None


def usable_filter(text: str, schema: pa.Schema, setting: str) -> str:
    """Rewrite a value filter so that TileDB-SOMA evaluates it correctly.

    Parameters
    ----------
    text
        A value filter.
    schema
        Schema of obs.
    setting
        Setting or argument that contains the filter, for the error.

    Raises
    ------
    FilterError
        The text is not a value filter, contains an unknown column, or compares a column with a value of another type.
    """
    try:
        return _text(parse_filter(text), schema)
    except RecursionError:
        raise FilterError(f"{setting} {shown(text)} is nested too deep") from None
    except ValueError as error:
        raise FilterError(f"{setting} {shown(text)} cannot be used on obs: {error}") from None


@contextmanager
def in_section(section: str) -> Iterator[None]:
    """Add the section of the configuration to the setting in a `FilterError`: `query.obs_filter`."""
    try:
        yield
    except FilterError as error:
        raise FilterError(f"{section}.{error}") from None


# --- from text to conditions


def _expression(text: str) -> ast.expr:
    if not text.strip():
        raise ValueError("it is empty; null takes all cells")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            # In brackets, the text may have several lines, and must not close more parentheses than it opens.
            body = ast.parse(f"[{text}\n]", mode="eval").body
            text.encode()
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{_syntax_problem(text, error)}; example: {EXAMPLE}") from None
    if not isinstance(body, ast.List) or len(body.elts) != 1:
        raise ValueError(f"it must be one condition; example: {EXAMPLE}")
    return body.elts[0]


def _syntax_problem(text: str, error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "it has a character that is not valid Unicode"
    try:
        ast.parse(text.strip(), mode="eval")  # without the brackets, which the user did not write
    except SyntaxError as own:
        error = own
    except ValueError:
        pass
    return str(getattr(error, "msg", None) or error)


def _condition(node: ast.expr, *, negated: bool) -> Condition:
    match node:
        case ast.BoolOp(op=op, values=values):
            return _group("and" if isinstance(op, ast.And) else "or", values, negated=negated)
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr() as op, left=left, right=right):
            _require_conditions(left, right)
            return _group("and" if isinstance(op, ast.BitAnd) else "or", [left, right], negated=negated)
        case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
            return _condition(operand, negated=not negated)
        case ast.Compare():
            return _comparisons(node, negated=negated)
        case ast.Name() | ast.Call():  # is_primary_data stands for is_primary_data == True
            return Comparison(_column(node), "!=" if negated else "==", True)
    raise ValueError(f"{_source(node)} is not a condition; example: {EXAMPLE}")


def _require_conditions(*nodes: ast.expr) -> None:
    if any(isinstance(node, ast.Constant) for node in nodes):
        raise ValueError(_PRECEDENCE)


def _group(word: Literal["and", "or"], nodes: list[ast.expr], *, negated: bool) -> Group:
    if negated:
        word = "or" if word == "and" else "and"
    parts: list[Condition] = []
    for node in nodes:
        part = _condition(node, negated=negated)
        parts += part.parts if isinstance(part, Group) and part.word == word else [part]
    if len(parts) > _MOST_PARTS:
        raise ValueError(f"it has {len(parts):,} conditions, at most {_MOST_PARTS:,} can be read; {_LISTED}")
    return Group(word, tuple(parts))


def _comparisons(node: ast.Compare, *, negated: bool) -> Condition:
    """Split a chain such as `1 < nnz <= 3` into two comparisons combined with `and`."""
    sides = [node.left, *node.comparators]
    found = [
        _comparison(left, _OPERATORS[type(op)], right, negated=negated)
        for left, op, right in zip(sides[:-1], node.ops, sides[1:], strict=True)
    ]
    return found[0] if len(found) == 1 else Group("or" if negated else "and", tuple(found))


def _comparison(left: ast.expr, operator: str, right: ast.expr, *, negated: bool) -> Comparison:
    if not _is_column(left):
        if operator not in _MIRRORED or not _is_column(right):
            raise ValueError(
                f"{_source(left)} {operator} {_source(right)} has no obs column"
                f" {'on one side' if operator in _MIRRORED else 'before ' + operator}; example: {EXAMPLE},"
                " or tissue in ['blood', 'lung']"
            )
        left, operator, right = right, _MIRRORED[operator], left
    operator = _NEGATED[operator] if negated else operator
    column = _column(left)
    if operator not in ("in", "not in"):
        if _is_column(right):
            raise ValueError(
                f"{column} is compared with {_source(right)}: two columns cannot be compared, and text needs quotes,"
                f" {column} {operator} '{_column(right)}'"
            )
        return Comparison(column, operator, _literal(right))
    if not isinstance(right, ast.List | ast.Tuple | ast.Set) or not right.elts:
        raise ValueError(f"{column} {operator} needs a list of one value or more, as in tissue in ['blood', 'lung']")
    return Comparison(column, operator, [_literal(item) for item in right.elts])


def _is_column(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) or (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attr"
    )


def _column(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Call(func=ast.Name(id="attr"), args=[ast.Constant(value=str(name))], keywords=[]):
            return name
    raise ValueError(
        f"{_source(node)} is not a column; for a column whose name is not a Python name write attr('name')"
    )


def _literal(node: ast.expr) -> bool | int | float | str | None:
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
            value = _literal(operand)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return -value if isinstance(op, ast.USub) else value
        case ast.Call(func=ast.Name(id="val"), args=[value_node], keywords=[]):
            return _literal(value_node)
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
            raise ValueError(_PRECEDENCE)
    raise ValueError(f"{_source(node)} is not a value; expected a number, True, False, None or text in quotes")


def _source(node: ast.expr) -> str:
    text = ast.unparse(node)
    return text if len(text) <= 60 else f"{text[:60]}..."


# --- from conditions to text for TileDB-SOMA


def _text(condition: Condition, schema: pa.Schema) -> str:
    if isinstance(condition, Group):
        return f" {condition.word} ".join(f"({_text(part, schema)})" for part in condition.parts)
    column, operator, value = condition.column, condition.operator, condition.value
    if column not in schema.names:
        raise ValueError(f"{column} is not an obs column of the Census{suggestion(column, schema.names)}")
    kind = _Kind.of(schema, column)
    name = column if column.isidentifier() and not iskeyword(column) else f"attr({column!r})"
    if isinstance(value, list):
        return _membership(name, operator, [kind.literal("==", item)[1] for item in value], kind)
    operator, value = kind.literal(operator, value)
    return f"{name} {operator} {value!r}"


def _membership(name: str, operator: str, values: list[Any], kind: _Kind) -> str:
    if None in values:
        raise ValueError(f"None in a list; for missing values write {name} == None")
    if kind.lists:
        return f"{name} {operator} {values!r}"
    comparison, word = ("==", " or ") if operator == "in" else ("!=", " and ")
    return word.join(f"{name} {comparison} {value!r}" for value in values)


@dataclass(frozen=True)
class _Kind:
    """Kind of the values of a column, which determines the literals that it can be compared with."""

    column: str
    holds: str
    ordered: bool
    lists: bool = True  # False: TileDB-SOMA does not support `in` for the type
    low: float = -math.inf
    high: float = math.inf

    @classmethod
    def of(cls, schema: pa.Schema, column: str) -> _Kind:
        # Imported here: the syntax of filters is checked with the configuration, before slow imports.
        import numpy as np
        from pyarrow import types

        dtype = schema.field(column).type
        ordered = True
        if types.is_dictionary(dtype):
            dtype, ordered = dtype.value_type, dtype.ordered
        if types.is_string(dtype) or types.is_large_string(dtype):
            return cls(column, "text", ordered)
        if types.is_boolean(dtype):
            return cls(column, "true or false", ordered=False, lists=False)
        if types.is_integer(dtype):
            limits = np.iinfo(dtype.to_pandas_dtype())
            lists = not (types.is_int16(dtype) or types.is_uint8(dtype))
            return cls(column, "whole numbers", ordered, lists, int(limits.min), int(limits.max))
        if types.is_floating(dtype):
            largest = float(np.finfo(dtype.to_pandas_dtype()).max)
            return cls(column, "numbers", ordered, low=-largest, high=largest)
        return cls(column, str(dtype), ordered)

    def literal(self, operator: str, value: Any) -> tuple[str, Any]:
        """Operator and literal of a comparison, adapted to the column; ValueError if the comparison is not possible."""
        if value is None:
            if operator not in ("==", "!="):
                raise ValueError(f"{self.column} {operator} None; for missing values write == None or != None")
            return operator, None
        if not self.ordered and operator not in ("==", "!=", "in", "not in"):
            raise ValueError(
                f"the values of {self.column} have no order, so {operator} is not possible; use ==, !="
                + ("" if self.holds == "true or false" else f" or {self.column} in ['a', 'b']")
            )
        match self.holds:
            case "text":
                if not isinstance(value, str):
                    raise self._unfit(value, f"put it in quotes, '{value}'")
            case "true or false":
                if value not in (0, 1):
                    raise self._unfit(value, "compare with True or False")
                return operator, bool(value)
            case "numbers" | "whole numbers":
                return self._number(operator, value)
        return operator, value

    def _number(self, operator: str, value: Any) -> tuple[str, Any]:
        if isinstance(value, bool | str):
            raise self._unfit(value, "compare with a number, without quotes")
        whole = self.holds == "whole numbers"
        if whole and isinstance(value, float) and math.isfinite(value):
            if not value.is_integer():
                if operator not in _WHOLE:
                    raise self._unfit(value, "compare with a whole number")
                operator, rounded = _WHOLE[operator]
                value = rounded(value)
            value = int(value)
        if not self.low <= value <= self.high:
            raise self._unfit(value, f"they lie between {self.low:g} and {self.high:g}")
        return operator, value if whole else float(value)

    def _unfit(self, value: Any, way_out: str) -> ValueError:
        return ValueError(f"{self.column} holds {self.holds} and is compared with {shown(value)}; {way_out}")
