"""Attention spelled out in the graph: every operator node becomes the nodes that define it.

The explicit graph runs and gives what the semantic one gives. Nodes carry, in
`meta["hf_fusion"]`, the attention they belong to and their part in it; what the operator said
stays with the last of them, so that a partitioner can put the attention together again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import ops

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


@dataclass
class AttentionCall:
    """The arguments of an attention node, of ours or of the library's.

    merged: whether the node gives (B, Q, H, E); the library's gives (B, H, Q, E).
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None = None
    bias: fx.Node | None = None
    sinks: fx.Node | None = None
    scale: float | None = None
    causal: bool = False
    window: int = 0
    softcap: float = 0.0
    dropout: float = 0.0
    merged: bool = True

    @property
    def tensors(self) -> list[fx.Node]:
        """Its tensor operands, those that are given."""
        all_of_them = (self.query, self.key, self.value, self.mask, self.bias, self.sinks)
        return [node for node in all_of_them if node is not None]


_OURS = ("query", "key", "value", "mask", "bias", "sinks")
_LIBRARY = ("query", "key", "value", "mask", "dropout", "causal")


def attention_call(node: fx.Node) -> AttentionCall | None:
    """What an attention node says, None for any other node and for operands that are not 4-D."""
    if node.op != "call_function" or node.target not in (ops.attention, SDPA):
        return None
    ours = node.target is ops.attention
    given = dict(zip(_OURS if ours else _LIBRARY, node.args))
    given |= {
        {"attn_mask": "mask", "dropout_p": "dropout", "is_causal": "causal"}.get(name, name): value
        for name, value in node.kwargs.items()
        if name != "enable_gqa"
    }
    call = AttentionCall(**given, merged=ours)
    value = call.query.meta.get("val")
    return call if isinstance(value, torch.Tensor) and value.dim() == 4 else None


class _Spelling:
    """Appends nodes before an attention node, with values and paths like a traced graph's."""

    def __init__(self, node: fx.Node, number: int):
        self.node, self.number = node, number

    def __call__(self, part: str, target: Callable, *args: Any, **kwargs: Any) -> fx.Node:
        with self.node.graph.inserting_before(self.node):
            made = self.node.graph.call_function(target, args, kwargs)
        for name in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if name in self.node.meta:
                made.meta[name] = copy.copy(self.node.meta[name])
        made.meta["hf_fusion"] = {"attention": self.number, "part": part}
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        mode = self.node.meta["val"].fake_mode
        with mode:
            made.meta["val"] = target(*values[0], **values[1])
        return made

    def size(self, node: fx.Node, dim: int) -> fx.Node | int:
        """An extent: the number, or the node that asks for it where the graph leaves it free."""
        extent = node.meta["val"].shape[dim]
        if str(extent).isdigit():
            return int(extent)
        return self("shape", aten.sym_size.int, node, dim)


def _heads(put: _Spelling, tensor: fx.Node, heads: int) -> fx.Node:
    groups = int(tensor.meta["val"].shape[1])
    if groups == heads:
        return tensor
    return put("repeat", aten.repeat_interleave.self_int, tensor, heads // groups, 1)


def _visible(put: _Spelling, call: AttentionCall) -> fx.Node | None:
    if not call.causal and call.window <= 0:
        return None
    device = call.query.meta["val"].device
    rows = put("visible", aten.arange.default, put.size(call.query, 2), device=device)
    rows = put("visible", aten.unsqueeze.default, rows, 1)
    columns = put("visible", aten.arange.default, put.size(call.key, 2), device=device)
    seen = put("visible", aten.le.Tensor, columns, rows) if call.causal else None
    if call.window > 0:
        edge = put("visible", aten.sub.Tensor, rows, call.window)
        near = put("visible", aten.gt.Tensor, columns, edge)
        seen = near if seen is None else put("visible", aten.logical_and.default, seen, near)
    return seen


def _spell(put: _Spelling, call: AttentionCall) -> fx.Node:
    query = call.query.meta["val"]
    heads, dtype = int(query.shape[1]), query.dtype
    key, value = _heads(put, call.key, heads), _heads(put, call.value, heads)
    scores = put("scores", aten.matmul.default, call.query,
                 put("scores", aten.transpose.int, key, 2, 3))  # fmt: skip
    scale = call.scale if call.scale is not None else int(query.shape[-1]) ** -0.5
    scores = put("scale", aten.mul.Tensor, scores, scale)
    if call.softcap > 0:
        scores = put("softcap", aten.div.Tensor, scores, call.softcap)
        scores = put("softcap", aten.tanh.default, scores)
        scores = put("softcap", aten.mul.Tensor, scores, call.softcap)
    hidden = []
    for part, added in (("bias", call.bias), ("mask", call.mask), ("visible", _visible(put, call))):
        if added is None:
            continue
        if added.meta["val"].dtype == torch.bool:
            unseen = put(part, aten.logical_not.default, added)
            scores = put(part, aten.masked_fill.Scalar, scores, unseen, torch.finfo(dtype).min)
            hidden.append(unseen)
        else:
            scores = put(part, aten.add.Tensor, scores, added)
    if call.sinks is not None:
        extra = put("sinks", aten.reshape.default, call.sinks, [1, -1, 1, 1])
        extents = [put.size(scores, 0), -1, put.size(scores, 2), 1]
        extra = put("sinks", aten.expand.default, extra, extents)
        scores = put("sinks", aten.cat.default, [scores, extra], -1)
    weights = put("softmax", aten.softmax.int, scores, -1)
    if call.sinks is not None:
        weights = put("sinks", aten.slice.Tensor, weights, -1, 0, -1)
    given = call.mask is not None and call.mask.meta["val"].dtype == torch.bool
    if given and call.softcap <= 0 and call.sinks is None:
        # a row that sees no key is zero, as scaled_dot_product_attention has it
        for unseen in hidden:
            weights = put("hidden", aten.masked_fill.Scalar, weights, unseen, 0.0)
    weights = put("dropout", aten.dropout.default, weights, call.dropout, call.dropout > 0)
    context = put("context", aten.matmul.default, weights, value)
    if not call.merged:
        return context
    merged = put("merge", aten.transpose.int, context, 1, 2)
    return put("merge", aten.contiguous.default, merged)


def put_together(graph: fx.Graph) -> fx.Node | None:
    """Replaces one spelled-out attention in the graph by the operator; the node, or None."""
    parts: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        mark = node.meta.get("hf_fusion", {})
        parts.setdefault(mark.get("part", ""), []).append(node)
        if "call" in mark:
            last, call = node, mark["call"]
    if "scores" not in parts or "context" not in parts:
        return None
    turned, product = parts["scores"]
    value = parts["context"][0].args[1]

    def ungrouped(node: fx.Node) -> fx.Node:
        return node.args[0] if node in parts.get("repeat", ()) else node

    def operand(part: str) -> fx.Node | None:
        added = parts.get(part, [])
        return added[0].args[0 if len(added) > 1 else 1] if added else None

    operands = (product.args[0], ungrouped(turned.args[0]), ungrouped(value), operand("mask"),
                operand("bias"), parts["sinks"][0].args[0] if "sinks" in parts else None,
                )  # fmt: skip
    said = {
        name: getattr(call, name) for name in ("scale", "causal", "window", "softcap", "dropout")
    }
    with graph.inserting_before(last):
        made = graph.call_function(ops.attention, operands, said)
        made.meta = {name: value for name, value in last.meta.items() if name != "hf_fusion"}
        if not call.merged:
            made = graph.call_function(aten.transpose.int, (made, 1, 2))
    last.replace_all_uses_with(made)
    graph.eliminate_dead_code()
    return made


def spell_out(module: fx.GraphModule) -> int:
    """Replaces every attention node of the graph by its definition; returns how many there were."""
    nodes = [(node, attention_call(node)) for node in module.graph.nodes]
    found = [(node, call) for node, call in nodes if call is not None]
    for number, (node, call) in enumerate(found):
        last = _spell(_Spelling(node, number), call)
        last.meta["hf_fusion"]["call"] = call
        node.replace_all_uses_with(last)
        # a later attention may read this one: its record follows
        for _, other in found[number + 1 :]:
            for name, value in vars(other).items():
                if value is node:
                    setattr(other, name, last)
        module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return len(found)
