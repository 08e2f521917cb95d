"""Masks that hide nothing, proven from the graph: every element is true whatever the inputs are."""

from __future__ import annotations

import torch
from torch import fx

from .ops import attention

aten = torch.ops.aten
_ONES = {aten.ones.default, aten.new_ones.default, aten.ones_like.default}
_CARRIES = {
    aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.expand.default, aten.flatten.using_ints, aten.select.int, aten.slice.Tensor,
    aten.transpose.int, aten.index.Tensor, aten.upsample_nearest2d.vec, aten.to.dtype,
    aten.to.device, aten.to.dtype_layout, aten.clone.default, aten.contiguous.default,
    aten.alias.default, aten.permute.default, aten.repeat.default,
}  # fmt: skip
_AND = {aten.__and__.Tensor, aten.logical_and.default, aten.bitwise_and.Tensor}


def drop_open_masks(graph: fx.Graph) -> int:
    """Attention nodes lose a bool mask that is all true; returns how many did."""
    known: dict[fx.Node, bool] = {}
    dropped = 0
    for node in graph.nodes:
        mask = node.args[3] if node.target is attention and len(node.args) > 3 else None
        if (
            isinstance(mask, fx.Node)
            and mask.meta["val"].dtype == torch.bool
            and _all_one(mask, known)
        ):
            node.args = (*node.args[:3], None, *node.args[4:])
            dropped += 1
    return dropped


def _all_one(node: object, known: dict[fx.Node, bool]) -> bool:
    """Whether every element is one, or true."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if node not in known:
        if node.target in _AND:
            known[node] = all(_all_one(operand, known) for operand in node.args)
        elif node.target is aten.ge.Scalar:
            known[node] = node.args[1] == 0 and _counts_up(node.args[0])
        else:
            carried = node.target in _CARRIES and _all_one(node.args[0], known)
            known[node] = node.target in _ONES or carried
    return known[node]


def _counts_up(node: object) -> bool:
    """Whether the elements are those of arange(n), which are not negative."""
    while isinstance(node, fx.Node) and node.target in _CARRIES:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.target is aten.arange.default
