"""For which sizes a graph is the model: what torch.export found out about them, as plain data.

A condition is a list: an operator's name, then its operands, each a number, the name of a free
extent, or such a list. It holds nothing that can run, and JSON can.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

from torch import SymInt

Condition = list
_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": lambda *terms: sum(terms),
    "mul": lambda *terms: reduce(operator.mul, terms),
    "floordiv": operator.floordiv, "truediv": operator.truediv, "mod": operator.mod,
    "max": max, "min": min, "float": float, "ceil": math.ceil, "floor": math.floor,
    "trunc": math.trunc,
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge,
    "and": lambda *terms: all(terms), "or": lambda *terms: any(terms), "not": operator.not_,
}  # fmt: skip
# classes of sympy and of torch.utils._sympy.functions
_NAMES = {
    "Add": "add", "Mul": "mul", "FloorDiv": "floordiv", "CleanDiv": "floordiv", "Mod": "mod",
    "PythonMod": "mod", "IntTrueDiv": "truediv", "FloatTrueDiv": "truediv", "Max": "max",
    "Min": "min", "ToFloat": "float", "CeilToInt": "ceil", "FloorToInt": "floor",
    "TruncToInt": "trunc", "Equality": "eq", "Unequality": "ne", "StrictLessThan": "lt",
    "LessThan": "le", "StrictGreaterThan": "gt", "GreaterThan": "ge", "And": "and", "Or": "or",
    "Not": "not",
}  # fmt: skip
_SIGNS = {"add": "+", "mul": "*", "floordiv": "//", "truediv": "/", "mod": "%", "eq": "==",
          "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "and": "and", "or": "or",
          }  # fmt: skip


def conditions_on(extents: list[SymInt], captured: Mapping[str, int]) -> list[Condition]:
    """What a graph traced with these free extents takes for granted of them.

    captured: the extents' sizes by name. Extents in a condition that has no form here are held to
    them. Of a size of 1, which export never takes for granted, nothing is said.
    """
    if not extents:
        return []
    environment, found = extents[0].node.shape_env, []
    for extent in extents:
        name = str(extent.node.expr)
        if not name.isidentifier():
            found.append(["eq", name, extent.node.expr])
            continue
        bounds = environment.var_to_range[extent.node.expr]
        for sign, bound in (("ge", bounds.lower), ("le", bounds.upper)):
            if str(bound).isdigit() and not (sign == "ge" and int(bound) <= 2):
                found.append([sign, name, int(bound)])
    found += [environment.replace(guard.expr) for guard in environment.guards]
    spelled: list[Condition] = []
    for term in found:
        try:
            condition = _spelled(term, captured)
        except ValueError as error:
            held = {str(symbol) for symbol in error.args[0].free_symbols} & set(captured)
            spelled += [["eq", name, captured[name]] for name in sorted(held)]
            continue
        if condition is not True and condition not in spelled:
            spelled.append(condition)
    return spelled


def _spelled(term: Any, names: Mapping[str, int]) -> Any:
    """The expression as lists; ValueError(expression) where it has no form."""
    if isinstance(term, list):
        return [term[0], *(x if isinstance(x, (str, int)) else _spelled(x, names)
                           for x in term[1:])]  # fmt: skip
    if term.is_Symbol and str(term) in names:
        return str(term)
    if term.is_Boolean and str(term) in ("True", "False"):
        return str(term) == "True"
    if term.is_Integer:
        return int(term)
    if term.is_Float:
        return float(term)
    if term.is_Rational:
        return ["truediv", int(term.p), int(term.q)]
    if term.is_Pow and term.exp.is_Integer and 0 < term.exp <= 8:
        return ["mul", *[_spelled(term.base, names)] * int(term.exp)]
    name = _NAMES.get(type(term).__name__)
    if name is None:
        raise ValueError(term)
    try:
        return [name, *(_spelled(operand, names) for operand in term.args)]
    except ValueError:
        raise ValueError(term) from None


def value(term: Any, sizes: Mapping[str, int]) -> Any:
    """A term of a condition for these sizes."""
    if isinstance(term, str):
        return sizes[term]
    if not isinstance(term, list):
        return term
    return _OPERATORS[term[0]](*(value(operand, sizes) for operand in term[1:]))


def unmet(conditions: list[Condition], sizes: Mapping[str, int]) -> Condition | None:
    """The first condition that does not hold for these sizes, None where all do."""
    for condition in conditions:
        try:
            if value(condition, sizes) is not True:
                return condition
        except (ZeroDivisionError, OverflowError):
            return condition
    return None


def text(term: Any, places: Mapping[str, str]) -> str:
    """A term as one would write it; places: what to call the extents."""
    if not isinstance(term, list):
        return places.get(term, str(term)) if isinstance(term, str) else str(term)
    name, *operands = term
    parts = [text(operand, places) for operand in operands]
    if name not in _SIGNS or len(parts) < 2:
        return f"{name}({', '.join(parts)})"
    parts = [f"({part})" if isinstance(operand, list) else part
             for part, operand in zip(parts, operands, strict=True)]  # fmt: skip
    return f" {_SIGNS[name]} ".join(parts)
