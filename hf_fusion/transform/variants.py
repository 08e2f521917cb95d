"""Attention of forms the package does not know: what it looks like, and who computes it.

    register_attention_variant("block diagonal", match, fused)

match(attention, module) looks at one `Attention` of a graph and returns what it found out about it,
or None. `attention.call` names its operands, `module` holds the parameters. The dictionary may hold
"nodes", further nodes that the group takes in, such as those that make a bias.

fused(query, key, value, mask, bias, sinks, call, details) computes it: query (B, H, Q, D) to
(B, Q, H, E), as `ops.attention` does. supports(call, details) may refuse with a reason; then the
group runs as attention of the common form. What an example must show is in the tests: the same
outputs, and fewer kernels or bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import ops
from .attention import Attention, attentions
from .backends import _aten_build, register_backend, unregister_backend
from .explicit import put_together
from .groups import CORE, FusionGroup
from .nodes import INPUT, class_of, exclusive_views_down, exclusive_views_up, name_of
from .rules import register_fusion_rule, unregister_fusion_rule
from .site import Site

Match = Callable[[Attention, fx.GraphModule], "dict[str, Any] | None"]


@dataclass(frozen=True)
class Variant:
    """A registered form of attention."""

    name: str
    match: Match
    fused: Callable[..., Tensor]
    supports: Callable[[Any, dict[str, Any]], str | None]


def register_attention_variant(
    name: str,
    match: Match,
    fused: Callable[..., Tensor],
    supports: Callable[[Any, dict[str, Any]], str | None] = lambda call, details: None,
) -> Variant:
    """Adds a form of attention, see this file's head; a form of the same name is replaced."""
    variant = Variant(name, match, fused, supports)
    register_fusion_rule(_label(name), partial(_propose, variant), order=15)
    register_backend(_label(name), 30, partial(_refuses, variant), partial(_build, variant), True)
    return variant


def unregister_attention_variant(name: str) -> None:
    """Takes a form of attention out."""
    unregister_fusion_rule(_label(name))
    unregister_backend(_label(name))


def _label(name: str) -> str:
    return f"attention variant {name}"


def _propose(variant: Variant, graph: fx.Graph, claims: Any):
    for attention in attentions(graph):
        details = None
        if attention.call is not None:
            details = variant.match(attention, graph.owning_module)
        if details is None:
            continue
        call, nodes = attention.call, [*attention.nodes, *details.get("nodes", ())]
        for node in {call.query: 0, call.key: 0, call.value: 0}:
            nodes += [view for view in exclusive_views_up(node) if name_of(view) != "getitem"]
        nodes += exclusive_views_down(attention.last)
        yield FusionGroup(
            CORE, nodes, attention.owner, f"Attention_{variant.name.replace(' ', '_')}",
            {"attention": attention, "variant": variant.name, "found": details},
        )  # fmt: skip


def _refuses(variant: Variant, site: Site) -> str | None:
    if site.group.details.get("variant") != variant.name:
        return f"no {variant.name} attention"
    return variant.supports(site.group.details["attention"].call, site.group.details["found"])


def _build(variant: Variant, site: Site) -> nn.Module:
    put_together(site.inner.graph)
    _fold_constants(site)
    details, call = site.group.details["found"], site.group.details["attention"].call
    for node in list(site.inner.graph.nodes):
        if node.target is ops.attention:
            given = dict(zip(("query", "key", "value", "mask", "bias", "sinks"), node.args))
            operands = [given.get(n, node.kwargs.get(n)) for n in
                        ("query", "key", "value", "mask", "bias", "sinks")]  # fmt: skip
            node.target = partial(variant.fused, call=call, details=details)
            node.target.__name__ = node.target.__qualname__ = "attention_variant"
            node.target.__module__ = __name__
            node.args, node.kwargs = tuple(operands), {}
    return _aten_build(site)


def _fold_constants(site: Site) -> None:
    """Nodes that depend on parameters alone are computed now and kept.

    Later changes of those parameters do not show, as with packed weights.
    """
    graph, known = site.inner.graph, {}
    for node in graph.nodes:
        if node.op == "placeholder":
            value = site.parameter(node)
            if value is not None:
                known[node] = value.detach()
        elif node.op == "call_function" and node.all_input_nodes:
            if all(source in known for source in node.all_input_nodes):
                args = fx.node.map_arg(node.args, known.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, known.__getitem__)
                with torch.no_grad():
                    known[node] = node.target(*args, **kwargs)
    for node, value in known.items():
        outside = [user for user in node.users if user not in known]
        if node.op == "placeholder" or not outside or not isinstance(value, Tensor):
            continue
        name = f"constant_{node.name}"
        site.inner.register_buffer(name, value.contiguous(), persistent=False)
        with graph.inserting_before(node):
            made = graph.get_attr(name)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
    graph.eliminate_dead_code()
    site.inner.recompile()


def parameter_only(node: fx.Node | None) -> list[fx.Node]:
    """The nodes that make `node` out of parameters alone, itself included, or none."""
    found, waiting = [], [node] if isinstance(node, fx.Node) else []
    while waiting:
        here = waiting.pop()
        if here in found or here.op == "get_attr":
            continue
        if class_of(here) == INPUT or not here.all_input_nodes:
            return []
        found.append(here)
        waiting += here.all_input_nodes
    return found
