"""One spelling for what graphs spell in many ways, and nothing that computes nothing.

Values are bit for bit what they were. What leaves: dropout outside training, aliases, conversions
to the type a tensor has, whole slices, additions of 0 and products with 1 in the same type,
assertions on types, copies for contiguity, masks that are all true. What makes a copy stays where
a result would be the memory of an input or a parameter without it. `view` becomes `reshape`, which
does not mind strides.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from .uniform import drop_open_masks

aten = torch.ops.aten
_END = 2**63 - 1
_ASSERTIONS = {aten._assert_tensor_metadata.default}
_COPIES = {aten.alias.default, aten.detach.default, aten.detach_.default, aten.lift_fresh.default}
_CONVERSIONS = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default,
    aten.type_as.default,
}  # fmt: skip


def _same_tensor(node: fx.Node) -> bool:
    """Whether input and output have the same type, device and shape."""
    source = node.args[0]
    before = source.meta.get("val") if isinstance(source, fx.Node) else None
    after = node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    same = before.dtype == after.dtype and before.device == after.device
    return same and before.dim() == after.dim() and all(
        str(a) == str(b) for a, b in zip(before.shape, after.shape, strict=True)
    )  # fmt: skip


def _whole_slice(node: fx.Node) -> bool:
    args = node.args
    start = args[2] if len(args) > 2 else None
    end = args[3] if len(args) > 3 else None
    step = args[4] if len(args) > 4 else 1
    return start in (None, 0) and end in (None, _END) and step == 1


def _neutral(value: float) -> Callable[[fx.Node], bool]:
    def matches(node: fx.Node) -> bool:
        other = node.args[1]
        number = isinstance(other, (int, float)) and not isinstance(other, bool)
        plain = number and other == value and not node.kwargs
        return plain and _same_tensor(node) and not leaves(node)

    return matches


def _no_dropout(node: fx.Node) -> bool:
    return node.args[2] is False or node.args[1] == 0.0


def _no_conversion(node: fx.Node) -> bool:
    copied = node.target is aten._to_copy.default or True in node.args or node.kwargs.get("copy")
    return _same_tensor(node) and not (copied and leaves(node))


def _plain_contiguous(node: fx.Node) -> bool:
    """A copy for a layout that its one reader does not need; several readers may be glad of it."""
    return len(node.users) <= 1 and not node.kwargs and not leaves(node)


def leaves(node: fx.Node, over: Callable[[fx.Node], bool] = lambda user: False) -> bool:
    """Whether the node's memory is, or may be, a result's: it is one, or read by views of one.

    over: other readers whose results are taken for views of what they read.
    """
    waiting, seen = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            if user.op == "output":
                return True
            if user not in seen and (is_view(user) or user.target in _MAY_SHARE or over(user)):
                seen.add(user)
                waiting.append(user)
    return False


_MAY_SHARE = {aten.dropout.default, aten.feature_dropout.default, *_CONVERSIONS, *_COPIES}
_REMOVABLE: dict[object, Callable[[fx.Node], bool]] = {
    aten.dropout.default: _no_dropout,
    aten.feature_dropout.default: _no_dropout,
    aten.slice.Tensor: _whole_slice,
    aten.add.Tensor: _neutral(0),
    aten.mul.Tensor: _neutral(1),
    aten.contiguous.default: _plain_contiguous,
    aten.clone.default: _plain_contiguous,
    **dict.fromkeys(_CONVERSIONS, _no_conversion),
    **dict.fromkeys(_COPIES, lambda node: True),
}


def canonicalise(module: fx.GraphModule) -> None:
    """Rewrites the graph of `module` in place, as this file's head says."""
    graph = module.graph
    _without_writes(graph)
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn" or node.target in _ASSERTIONS:
            graph.erase_node(node)
            continue
        if node.op != "call_function":
            continue
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        test = _REMOVABLE.get(node.target)
        if test is not None and test(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    drop_open_masks(graph)
    graph.eliminate_dead_code()
    graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()


def mutates(node: fx.Node) -> bool:
    """Whether the node writes into an operand."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _plain_form(node: fx.Node) -> object:
    """The operator without the write, where the value written over has one name; else None."""
    target = node.args[0] if node.args else None
    name = node.target._schema.name.removeprefix("aten::")
    if not isinstance(target, fx.Node) or target.op != "call_function" or name[-1:] != "_":
        return None
    shared = (target, *target.users)
    if any(is_view(other) or other.target in _MAY_SHARE for other in shared):
        return None
    return getattr(getattr(aten, name[:-1], None), node.target._overloadname, None)


def writes_are_plain(graph: fx.Graph) -> bool:
    """Whether every write of the graph can be undone node by node, as `canonicalise` does."""
    return all(_plain_form(node) is not None for node in graph.nodes if mutates(node))


def _without_writes(graph: fx.Graph) -> None:
    """relu_(x) becomes relu(x), and what read x afterwards reads that."""
    for node in list(graph.nodes):
        if not mutates(node) or _plain_form(node) is None:
            continue
        target = node.args[0]
        later = {user for user in target.users if user > node}
        node.target = _plain_form(node)
        target.replace_all_uses_with(node, delete_user_cb=later.__contains__)


def is_view(node: fx.Node) -> bool:
    """Whether the node's value shares memory with its input, or may."""
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable:
        return False
    may_share = {aten.reshape.default, aten.contiguous.default, aten.flatten.using_ints}
    return node.target in may_share or any(
        result.alias_info is not None for result in schema.returns
    )
