"""A group cut out of its graph: the nodes as a module of their own, and the call that runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .canonical import is_view
from .groups import FusionGroup
from .nodes import name_of

# Results that no other name shares; operators that may hand back their input are not among them.
_FRESH = {
    "linear", "addmm", "mm", "bmm", "matmul", "baddbmm", "conv1d", "conv2d", "layer_norm", "add",
    "mul", "sub", "div", "gelu", "relu", "silu", "tanh", "sigmoid", "cat", "embedding", "softmax",
    "pow", "rsqrt", "neg", "attention", "_linear_pointwise",
}  # fmt: skip
# Views in which every element is one of the input's and none is there twice.
_PLAIN_VIEWS = {
    "reshape", "view", "transpose", "permute", "t", "unsqueeze", "squeeze", "flatten", "unflatten",
    "contiguous", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "getitem",
    "narrow", "movedim", "alias", "detach", "to",
}  # fmt: skip

_PARTS = {"slice", "select", "narrow"}  # what is left of their memory would live as long


@dataclass(eq=False)
class Site:
    """Where a group was: `inner` runs its nodes, `call` is the node that calls it.

    A back end reads both and gives a module that takes the call's arguments, or those of them whose
    indices its `takes` lists, and returns what `inner` returns.
    """

    group: FusionGroup
    inner: fx.GraphModule
    call: fx.Node
    outer: fx.GraphModule

    @property
    def placeholders(self) -> list[fx.Node]:
        """The inner graph's inputs, in the order of the call's arguments."""
        return self.inner.graph.find_nodes(op="placeholder")

    @property
    def results(self) -> list[fx.Node]:
        """The inner nodes whose values are returned."""
        returned = self.inner.graph.output_node().args[0]
        return list(returned) if isinstance(returned, tuple) else [returned]

    def node(self, name: str) -> fx.Node | None:
        """The inner node that was called `name` in the model's graph."""
        return next((node for node in self.inner.graph.nodes if node.name == name), None)

    def parameter(self, placeholder: fx.Node | None) -> Tensor | None:
        """The parameter or buffer that an inner input stands for, None for a computed one."""
        if placeholder is None or placeholder.op != "placeholder":
            return None
        argument = self.call.args[self.placeholders.index(placeholder)]
        return attribute(self.outer, argument.target) if argument.op == "get_attr" else None

    def value(self, node: fx.Node) -> Tensor | None:
        """The captured value of an inner node: shape and type, no data."""
        value = node.meta.get("val")
        return value if isinstance(value, Tensor) else None

    def exclusive(self, index: int) -> bool:
        """Whether nothing but this call will read the argument's memory: it may be reused."""
        return owns(self.outer, self.call.args[index], self.call)


def attribute(module: nn.Module, target: str) -> Tensor:
    """A parameter or buffer by its path."""
    path, _, name = target.rpartition(".")
    return getattr(module.get_submodule(path), name)


def owns(outer: fx.GraphModule, node: fx.Node, reader: fx.Node) -> bool:
    """Whether `reader` alone reads the memory of `node`."""
    if not isinstance(node, fx.Node) or set(node.users) != {reader}:
        return False
    if node.args.count(node) > 1:
        return False
    if name_of(node) == "getitem" and node.args[0].op == "call_module":
        inner = outer.get_submodule(node.args[0].target)
        return _returns_fresh(inner, node.args[1])
    if node.op == "call_module":
        return _returns_fresh(outer.get_submodule(node.target), None)
    if node.op != "call_function":
        return False
    if is_view(node):
        return name_of(node) in _PLAIN_VIEWS and owns(outer, node.args[0], node)
    return name_of(node) in _FRESH


def _is_plain_view(node: object) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and is_view(node)
        and name_of(node) in _PLAIN_VIEWS
    )


def _returns_fresh(module: nn.Module, index: int | None) -> bool:
    fresh = getattr(module, "fresh_results", None)
    return bool(fresh) and (fresh[0] if index is None else fresh[index])


def fresh_results(inner: fx.GraphModule) -> tuple[bool, ...]:
    """Per result of a group, whether its memory is its own, no input's and no other result's."""
    returned = inner.graph.output_node().args[0]
    results = list(returned) if isinstance(returned, tuple) else [returned]
    roots = []
    for node in results:
        while _is_plain_view(node):
            node = node.args[0]
        roots.append(node)
    return tuple(
        root.op == "call_function" and name_of(root) in _FRESH and roots.count(root) == 1
        for root in roots
    )


_IN_PLACE = {
    name: getattr(getattr(torch.ops.aten, f"{name}_"), overload)
    for name, overload in (
        ("add", "Tensor"), ("mul", "Tensor"), ("gelu", "default"), ("relu", "default"),
        ("silu", "default"), ("tanh", "default"), ("sigmoid", "default"),
    )
}  # fmt: skip
_SWAPS = {"add", "mul"}


def reuse_memory(site: Site) -> int:
    """Elementwise operators of the inner graph write over an operand that nobody reads again.

    The operand has the result's shape and type, one reader, and memory of its own. Returns how many
    operators were changed.
    """
    graph, changed = site.inner.graph, 0
    for node in list(graph.nodes):
        name = name_of(node)
        target = _IN_PLACE.get(name) if node.op == "call_function" else None
        plain = getattr(torch.ops.aten, name, None)
        if target is None or node.target is not getattr(plain, target._overloadname):
            continue
        for args in (node.args, node.args[::-1]) if name in _SWAPS else (node.args,):
            if len(args) > 1 and node.kwargs.get("alpha", 1) != 1:
                break
            if _reusable(site, args[0], node) and args.count(args[0]) == 1:
                node.target, node.args = target, tuple(args)
                changed += 1
                break
    if changed:
        site.inner.recompile()
    return changed


def _reusable(site: Site, operand: object, node: fx.Node) -> bool:
    if not isinstance(operand, fx.Node):
        return False
    before, after = site.value(operand), site.value(node)
    if before is None or after is None or before.dtype != after.dtype:
        return False
    if str(tuple(before.shape)) != str(tuple(after.shape)):
        return False
    reader = node
    while _is_plain_view(operand):
        if set(operand.users) != {reader} or name_of(operand) in _PARTS:
            return False
        reader, operand = operand, operand.args[0]
    if set(operand.users) != {reader}:
        return False
    if operand.op == "placeholder":
        return site.exclusive(site.placeholders.index(operand))
    written = operand.target in _IN_PLACE.values()
    return operand.op == "call_function" and (written or name_of(operand) in _FRESH)
