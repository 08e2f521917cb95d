"""Attention in a graph: where it is, what it says, and the projections behind it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from .explicit import AttentionCall, attention_call
from .nodes import (
    ATTENTION,
    GEMM,
    INPUT,
    LINEAR,
    POINTWISE,
    SHAPE,
    VIEW,
    class_of,
    name_of,
    owner_of,
)


@dataclass(frozen=True)
class Attention:
    """An attention in the graph: its nodes, the last of them, and what it says where known."""

    nodes: tuple[fx.Node, ...]
    last: fx.Node
    owner: str
    call: AttentionCall | None


def attentions(graph: fx.Graph) -> list[Attention]:
    """Every attention: one node, the nodes one was spelled out to, or products around a softmax."""
    found, spelled = [], {}
    for node in graph.nodes:
        mark = node.meta.get("hf_fusion", {})
        if "attention" in mark:
            spelled.setdefault(mark["attention"], []).append(node)
        elif class_of(node) == ATTENTION:
            found.append(Attention((node,), node, owner_of(node), attention_call(node)))
        elif class_of(node) == "softmax":
            nodes = _around_softmax(node)
            if nodes:
                found.append(Attention(tuple(nodes), nodes[-1], owner_of(node), None))
    for nodes in spelled.values():
        last = next(node for node in nodes if "call" in node.meta["hf_fusion"])
        call = last.meta["hf_fusion"]["call"]
        found.append(Attention(tuple(nodes), last, owner_of(last), call))
    order = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda attention: order[attention.last])


_PRODUCTS = {"matmul", "bmm", "baddbmm"}


def _around_softmax(softmax: fx.Node) -> list[fx.Node]:
    """From the product that makes the scores to the one that reads the weights, in order."""
    if "hf_fusion" in softmax.meta or not softmax.args:
        return []
    up, node = [softmax], softmax.args[0]
    while isinstance(node, fx.Node) and name_of(node) not in _PRODUCTS:
        if class_of(node) not in (POINTWISE, VIEW) or not node.all_input_nodes:
            return []
        up.append(node)
        node = node.args[0]
    up.append(node)
    down, node = [], softmax
    while name_of(node) not in _PRODUCTS:
        readers = [
            u for u in node.users if class_of(u) in (POINTWISE, VIEW) or name_of(u) in _PRODUCTS
        ]
        products = [u for u in readers if name_of(u) in _PRODUCTS]
        if not readers or class_of(node) == VIEW and len(readers) > 1:
            return []
        node = (products or readers)[0]
        down.append(node)
    return [*reversed(up), *down]


def is_projection(node: fx.Node) -> bool:
    """Whether the node is a linear layer whose weight is a parameter."""
    if node.op == "call_module":
        return name_of(node) == "linear"
    if name_of(node) not in LINEAR:
        return False
    weight = node.args[1] if name_of(node) == "linear" else node.args[-1]
    return isinstance(weight, fx.Node) and weight.op == "get_attr"


def projection_input(node: fx.Node) -> fx.Node:
    """The activations that a projection reads."""
    return node.args[1] if name_of(node) == "addmm" else node.args[0]


def projection_width(node: fx.Node) -> int:
    """Columns that a projection writes."""
    if node.op == "call_module":
        return node.graph.owning_module.get_submodule(node.target).out_features
    return int(node.meta["val"].shape[-1])


def projections_behind(attention: Attention) -> dict[str, set[fx.Node]]:
    """The nearest matrix products behind q, k and v."""
    if attention.call is None:
        return {}
    call = attention.call
    return {
        letter: _products_behind(node)
        for letter, node in zip("QKV", (call.query, call.key, call.value), strict=True)
    }


def _products_behind(node: fx.Node) -> set[fx.Node]:
    found, waiting, seen = set(), [node], set()
    while waiting:
        here = waiting.pop()
        if here in seen or class_of(here) in (INPUT, SHAPE):
            continue
        seen.add(here)
        if class_of(here) == GEMM:
            found.add(here)
        elif class_of(here) in (VIEW, POINTWISE) or name_of(here) == "cat":
            waiting += here.all_input_nodes
    return found


def pre_packed(graph: fx.Graph) -> dict[fx.Node, str]:
    """Projections that give two or more of q, k and v already, and which they give."""
    found = {}
    for attention in attentions(graph):
        behind = projections_behind(attention)
        for node in set().union(*behind.values()):
            letters = "".join(letter for letter, sources in behind.items() if node in sources)
            if len(letters) > 1 and is_projection(node):
                found[node] = letters
    return found
