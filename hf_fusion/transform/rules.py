"""What may be grouped: one function per kind, each yields groups that it would like.

A rule reads the graph and what is free, and proposes; `Claims` decides. `register_fusion_rule`
adds a kind, before or after the ones here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from . import patterns
from .attention import (
    attentions,
    is_projection,
    projection_input,
    projection_width,
    projections_behind,
)
from .canonical import leaves
from .groups import (
    CORE,
    ELEMENTWISE,
    EPILOGUE,
    GLU,
    NORM,
    NORM_RESIDUAL,
    ROPE,
    Claims,
    FusionGroup,
    ParallelFusionGroup,
)
from .nodes import (
    ACTIVATIONS,
    POINTWISE,
    VIEW,
    class_of,
    exclusive_views_down,
    exclusive_views_up,
    is_kernel,
    name_of,
    owner_of,
)

Rule = Callable[[fx.Graph, Claims], Iterator[FusionGroup]]


def parallel(graph: fx.Graph, claims: Claims, across_owners: bool = False) -> Iterator[FusionGroup]:
    """Projections with one input and one owner; with `across_owners` those of several owners.

    Not those whose own memory, or what elementwise work makes of it in place, is a result of the
    graph: columns of a wider product are neither contiguous nor alone in memory.
    """
    siblings: dict[tuple, list[fx.Node]] = {}
    for node in graph.nodes:
        if is_projection(node) and claims.free([node]) and not leaves(node, _is_pointwise):
            owner = "" if across_owners else owner_of(node)
            key = (projection_input(node), name_of(node), node.op, owner, _dtype(node))
            siblings.setdefault(key, []).append(node)
    reads = [projections_behind(attention) for attention in attentions(graph)]
    for (source, _, _, owner, _), nodes in siblings.items():
        if len(nodes) < 2:
            continue
        letters = ""
        for behind in reads:
            parts = [letter for letter, sources in behind.items() if sources & set(nodes)]
            letters = "".join(parts) if len(parts) > len(letters) else letters
        widths = tuple(map(projection_width, nodes))
        purpose = f"_{letters}" if letters else ""
        yield ParallelFusionGroup(nodes, True, source, widths, owner, purpose)


def _is_pointwise(node: fx.Node) -> bool:
    return class_of(node) == POINTWISE


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def attention_core(graph: fx.Graph, claims: Claims) -> Iterator[FusionGroup]:
    """An attention with the views that nobody else reads, before and after."""
    for attention in attentions(graph):
        nodes = list(attention.nodes)
        if attention.call is not None:
            call = attention.call
            for node in {call.query: 0, call.key: 0, call.value: 0}:
                nodes += [view for view in exclusive_views_up(node) if name_of(view) != "getitem"]
            nodes += exclusive_views_down(attention.last)
        nodes = [node for node in dict.fromkeys(nodes) if claims.free([node])]
        if set(attention.nodes) <= set(nodes):
            yield FusionGroup(
                CORE, nodes, attention.owner, "Attention_Core", {"attention": attention}
            )


def rms_norms(graph: fx.Graph, claims: Claims) -> Iterator[FusionGroup]:
    """Root-mean-square norms spelled out, with the residual addition before them if any."""
    for node in graph.nodes:
        found = patterns.match(patterns.RMS_NORM, node) if name_of(node) == "mul" else None
        if found is None or not isinstance(found[0]["weight"], fx.Node):
            continue
        roles, nodes = found
        if roles["weight"].op != "get_attr" or not _over_the_last(nodes):
            continue
        nodes = _with_conversion(roles, nodes)
        yield _norm_group(node, nodes, roles["x"], {"rms": roles}, claims)


def _over_the_last(nodes: list[fx.Node]) -> bool:
    """Whether the mean among the nodes is over the last dimension, which stays."""
    mean = next(node for node in nodes if name_of(node) == "mean")
    dims = mean.args[1] if len(mean.args) > 1 else mean.kwargs.get("dim")
    keeps = mean.args[2] if len(mean.args) > 2 else mean.kwargs.get("keepdim", False)
    value = mean.args[0].meta.get("val")
    last = (-1, value.dim() - 1) if value is not None else (-1,)
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    return len(dims) == 1 and dims[0] in last and bool(keeps)


def _with_conversion(roles: dict[str, fx.Node], nodes: list[fx.Node]) -> list[fx.Node]:
    """The group's nodes and the conversion to fp32 before them; `x` is then what it converts."""
    x = roles["x"]
    if name_of(x) == "to" and set(x.users) <= set(nodes):
        roles["x"] = x.args[0]
        return [*nodes, x]
    return nodes


def layer_norms(graph: fx.Graph, claims: Claims) -> Iterator[FusionGroup]:
    """Layer norms after a residual addition."""
    for node in graph.nodes:
        if name_of(node) == "layer_norm" and node.args:
            group = _norm_group(node, [node], node.args[0], {}, claims)
            if group.kind == NORM_RESIDUAL:
                yield group


def _norm_group(last, nodes, source, details, claims) -> FusionGroup:
    details = {"norm": last, "source": source, **details}
    if is_residual(source) and claims.free([source]):
        nodes = [source, *nodes]
        return FusionGroup(NORM_RESIDUAL, nodes, owner_of(last), "Add_Norm", details)
    return FusionGroup(NORM, nodes, owner_of(last), "Norm", details)


def is_residual(node: fx.Node) -> bool:
    """Whether the node adds two tensors of one shape, neither a parameter."""
    if not isinstance(node, fx.Node) or name_of(node) != "add" or len(node.all_input_nodes) != 2:
        return False
    if node.kwargs.get("alpha", 1) != 1:
        return False
    shapes = [getattr(n.meta.get("val"), "shape", None) for n in (node, *node.all_input_nodes)]
    same = len({str(shape) for shape in shapes}) == 1
    return same and all(n.op != "get_attr" for n in node.all_input_nodes)


def gated(graph: fx.Graph, claims: Claims) -> Iterator[FusionGroup]:
    """act(gate) * up."""
    for node in graph.nodes:
        if name_of(node) != "mul" or len(node.all_input_nodes) != 2:
            continue
        for act, other in (node.args, node.args[::-1]):
            if name_of(act) in ACTIVATIONS and len(act.users) == 1 and act is not other:
                yield FusionGroup(GLU, [act, node], owner_of(node))
                break


def epilogues(graph: fx.Graph, claims: Claims) -> Iterator[FusionGroup]:
    """A projection with the activation, or the residual addition, that alone reads it."""
    for node in graph.nodes:
        found = patterns.match(patterns.GELU_TANH, node) if name_of(node) == "mul" else None
        if found is not None:
            source, nodes = found[0]["x"], found[1]
            details = {"gelu_tanh": source}
            if not set(source.users) <= set(nodes):
                source = None
        elif name_of(node) in ACTIVATIONS and node.all_input_nodes:
            source, nodes, details = node.all_input_nodes[0], [node], {}
            source = source if len(source.users) == 1 else None
        else:
            continue
        views = []
        if source is not None and class_of(source) == VIEW:
            views = [source, *exclusive_views_up(source.args[0])]
        product = views[-1].args[0] if views else source
        if product is not None and is_projection(product) and claims.free([product, *views]):
            if len(product.users) == 1 or not views:
                yield FusionGroup(
                    EPILOGUE, [product, *views, *nodes], owner_of(product), "", details
                )
                continue
        if details:
            yield FusionGroup(ELEMENTWISE, nodes, owner_of(node), "Gelu", details)


def residual_epilogues(graph: fx.Graph, claims: Claims) -> Iterator[FusionGroup]:
    """A projection and the residual addition after it."""
    for node in graph.nodes:
        if not is_residual(node) or not claims.free([node]):
            continue
        for source in node.all_input_nodes:
            if is_projection(source) and len(source.users) == 1 and claims.free([source]):
                yield FusionGroup(EPILOGUE, [source, node], owner_of(source))
                break


def narrow_residual_epilogues(graph: fx.Graph, claims: Claims) -> Iterator[FusionGroup]:
    """Those of a linear whose input, which lives as long, is no wider than its result."""
    for group in residual_epilogues(graph, claims):
        source = group.nodes[0]
        weight = source.args[1].meta.get("val") if name_of(source) == "linear" else None
        if weight is not None and weight.shape[1] <= weight.shape[0]:
            yield group


def rotary(graph: fx.Graph, claims: Claims) -> Iterator[FusionGroup]:
    """x cos + rotate_half(x) sin."""
    for node in graph.nodes:
        found = patterns.match(patterns.ROTATED, node) if name_of(node) == "add" else None
        if found is not None:
            yield FusionGroup(ROPE, found[1], owner_of(node), "Rotary", {"rope": found[0]})


def elementwise(graph: fx.Graph, claims: Claims) -> Iterator[FusionGroup]:
    """Connected elementwise operations that no other rule wanted, two or more."""
    for first in graph.nodes:
        if class_of(first) != POINTWISE or not claims.free([first]):
            continue
        region, grown = {first: None}, True
        while grown:
            grown = False
            for node in list(region):
                for near in node.users:
                    if near not in region and class_of(near) == POINTWISE and claims.free([near]):
                        if all(n in region or n < first for n in near.all_input_nodes):
                            region[near] = None
                            grown = True
        if len(region) > 1:
            yield FusionGroup(ELEMENTWISE, list(region), owner_of(first))


@dataclass(frozen=True)
class FusionRule:
    """A named rule; lower `order` proposes earlier."""

    kind: str
    order: int
    propose: Rule


RULES: list[FusionRule] = [
    FusionRule("parallel linear", 10, parallel),
    FusionRule("attention core", 20, attention_core),
    FusionRule("narrow residual epilogue", 29, narrow_residual_epilogues),
    FusionRule("norm", 30, rms_norms),
    FusionRule("norm and residual", 31, layer_norms),
    FusionRule("gated unit", 40, gated),
    FusionRule("gemm epilogue", 50, epilogues),
    FusionRule("residual epilogue", 51, residual_epilogues),
    FusionRule("rotary embedding", 60, rotary),
    FusionRule("elementwise", 90, elementwise),
]


def register_fusion_rule(kind: str, propose: Rule, order: int = 5) -> FusionRule:
    """Adds a rule; its groups go before those of every rule of a higher order (10 to 90 here).

    propose(graph, claims): yields FusionGroups; one that overlaps another or cannot be ordered is
    left out, with the reason in the report. A kind with a rule already is replaced.
    """
    rule = FusionRule(kind, order, propose)
    RULES[:] = [other for other in RULES if other.kind != kind]
    RULES.append(rule)
    RULES.sort(key=lambda entry: entry.order)
    return rule


def unregister_fusion_rule(kind: str) -> None:
    """Takes a rule out."""
    RULES[:] = [rule for rule in RULES if rule.kind != kind]


def counted(graph: fx.Graph) -> list[fx.Node]:
    """The graph's operators: nodes that are work."""
    return [node for node in graph.nodes if is_kernel(node)]
