"""Small patterns over nodes: an operator's name and what its operands are."""

from __future__ import annotations

from typing import Any

from torch import fx

from .nodes import name_of

_COMMUTATIVE = {"add", "mul"}


class P:
    """An operator `name` whose leading operands match `operands`.

    An operand is a P, a string, which stands for one node wherever it is written, a number, or None
    for anything. `skip`: names of operators between this one and its reader that may be absent.
    """

    def __init__(self, name: str, *operands: Any, skip: tuple[str, ...] = ()):
        self.name, self.operands, self.skip = name, operands, skip


def match(pattern: Any, node: Any) -> tuple[dict[str, fx.Node], list[fx.Node]] | None:
    """(nodes by the pattern's strings, nodes of the pattern), or None."""
    bound: dict[str, Any] = {}
    inside: list[fx.Node] = []
    return (bound, inside) if _match(pattern, node, bound, inside) else None


def _match(pattern: Any, node: Any, bound: dict[str, Any], inside: list[fx.Node]) -> bool:
    if pattern is None:
        return True
    if isinstance(pattern, str):
        return bound.setdefault(pattern, node) is node or bound[pattern] == node
    if isinstance(pattern, (int, float)):
        return isinstance(node, (int, float)) and abs(node - pattern) < 1e-6 * max(1, abs(pattern))
    if isinstance(pattern, list):
        return isinstance(node, (list, tuple)) and len(node) == len(pattern) and all(
            _match(p, n, bound, inside) for p, n in zip(pattern, node, strict=True)
        )  # fmt: skip
    if not isinstance(node, fx.Node):
        return False
    passed = []
    while name_of(node) in pattern.skip and name_of(node) != pattern.name:
        passed.append(node)
        if not node.args or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    if name_of(node) != pattern.name or node.kwargs.get("alpha", 1) != 1:
        return False
    orders = [tuple(node.args)]
    if pattern.name in _COMMUTATIVE and len(node.args) == 2:
        orders.append((node.args[1], node.args[0]))
    for args in orders:
        if len(args) < len(pattern.operands):
            continue
        names, found = dict(bound), []
        if all(_match(p, a, names, found) for p, a in zip(pattern.operands, args)):
            bound.clear()
            bound.update(names)
            inside += [*passed, node, *found]
            return True
    return False


_TO = ("to",)
_SQUARES = P("mean", P("pow", "x", 2, skip=_TO))
_SCALED = P("mul", "x", P("rsqrt", P("add", _SQUARES, "eps")), skip=_TO)
RMS_NORM = P("mul", "weight", _SCALED, skip=_TO)
_CUBE = P("add", "x", P("mul", P("pow", "x", 3), 0.044715))
_TANH = P("tanh", P("mul", _CUBE, 0.7978845608))
GELU_TANH = P("mul", P("mul", "x", 0.5), P("add", _TANH, 1.0))
_TURNED = P("cat", [P("neg", P("slice", "x", "dim", "half")), P("slice", "x", "dim", 0, "half")])
ROTATED = P("add", P("mul", "x", "cos"), P("mul", _TURNED, "sin"))
