"""What a stored graph may call: operators that make results of operands, a few of Python's."""

from __future__ import annotations

import operator
import re
from keyword import iskeyword
from typing import Any

import torch
from torch import fx

from ..report import FusionError, Reason

_NAMESPACES = ("aten", "hf_fusion")
_OPERATORS = ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg", "truediv", "pow",
              "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")  # fmt: skip
# of those that read no tensor, the ones that make one of their arguments alone
_MAKERS = {"arange", "empty", "eye", "full", "linspace", "ones", "scalar_tensor", "tril_indices",
           "triu_indices", "zeros"}  # fmt: skip
# of those that may draw random numbers, the ones that do not without dropout
_DROPOUT = {"dropout", "scaled_dot_product_attention"}
# of those that are torch's own business, the ones that are not among its core operators
_PRIVATE = {"__and__", "__or__", "__xor__", "_convolution", "_unsafe_view", "_unsafe_index",
            "_weight_norm", "_weight_norm_interface"}  # fmt: skip
_RESULTS = ("Tensor", "List[Tensor]", "int", "SymInt", "float", "bool", "number")
_SIZE, _EXPONENT = 2**63, 64
_has_kernel = torch._C._dispatch_has_kernel


def names(given: Any) -> list[str]:
    """The names, each an identifier: fx writes them into code."""
    for name in given:
        if not isinstance(name, str) or not name.isidentifier() or iskeyword(name):
            raise ValueError(f"{name!r} is no name")
    return list(given)


def target_name(node: fx.Node) -> str:
    """What the node calls, as it is stored; FusionError for what cannot be."""
    target = node.target
    if node.op in ("placeholder", "get_attr", "output"):
        return str(target)
    if isinstance(target, torch._ops.OpOverload) and _is_plain(target):
        return f"{target._schema.name}.{target._overloadname}"
    name = getattr(target, "__name__", "")
    if (
        node.op == "call_function"
        and getattr(operator, name, None) is target
        and name in _OPERATORS
    ):
        return f"operator::{name}"
    raise FusionError(Reason.ARGUMENT, f"{node.name} calls {target}, which cannot be stored")


def _is_plain(target: torch._ops.OpOverload) -> bool:
    """Whether the operator is aten's or ours and only makes results of its operands: it reads a
    tensor, or is one of `_MAKERS`, writes to nothing, and draws no random numbers.
    """
    schema = target._schema
    space, _, name = schema.name.partition("::")
    if space not in _NAMESPACES or schema.is_mutable or not schema.returns:
        return False
    if torch.Tag.nondeterministic_seeded in target.tags and name not in _DROPOUT:
        return False
    if name.startswith("_") and torch.Tag.core not in target.tags and name not in _PRIVATE:
        return False
    if not _has_kernel(target.name()):
        return False
    reads = any("Tensor" in str(argument.type) for argument in schema.arguments)
    if not all(str(result.type) in _RESULTS for result in schema.returns):
        return False
    return reads or name in _MAKERS


def drops(node: fx.Node) -> bool:
    """Whether the node drops values at random."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = (argument.name for argument in node.target._schema.arguments)
    given = dict(zip(arguments, node.args)) | node.kwargs
    return any(given.get(name) for name in ("dropout", "dropout_p", "train"))


def check_numbers(target: Any, args: tuple) -> None:
    """ValueError where a function of Python gets no number, or one with which it could not end."""
    name = target.__name__
    if getattr(operator, name, None) is not target or target is operator.getitem:
        return
    kinds = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    for place, number in enumerate(args):
        limit = _EXPONENT if target is operator.pow and place else _SIZE
        if not isinstance(number, kinds) or type(number) is int and abs(number) > limit:
            raise ValueError(f"{name} is given {number!r:.30}, expected a number up to {limit}")


def resolved(op: str, name: str) -> Any:
    """The function a stored name stands for: plain operators, and a few of Python's; names of
    parameters and inputs are identifiers, since fx writes them into code.
    """
    if op == "get_attr":
        if not re.fullmatch(r"\w+(\.\w+)*", name):
            raise ValueError(f"{name!r} is no path of a parameter")
        return name
    if op == "placeholder":
        return names([name])[0]
    if op == "output":
        return op
    found = re.fullmatch(r"(\w+)::(\w+)(?:\.(\w+))?", name)
    if op != "call_function" or found is None:
        raise ValueError(f"{op} {name} is no operator")
    space, operator_name, overload = found.groups()
    if space == "operator" and operator_name in _OPERATORS:
        return getattr(operator, operator_name)
    if space in _NAMESPACES and overload:
        packet = getattr(getattr(torch.ops, space), operator_name, None)
        target = getattr(packet, overload, None)
        if isinstance(target, torch._ops.OpOverload) and _is_plain(target):
            return target
    raise ValueError(f"{name} is no operator that a graph may hold")
