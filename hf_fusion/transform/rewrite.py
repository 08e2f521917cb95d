"""Groups become callables: the graph is copied, cut by fx's own tools, and each piece replaced."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.fx.passes.utils.fuser_utils import fuse_by_partitions

from .backends import Backend, chosen
from .groups import FusionGroup
from .linears import PackedLinear
from .report import FusionReport
from .site import Site, fresh_results

PREFIX = "group_"


def copied(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy of the graph over the same parameters, and its nodes by the original's."""
    graph, nodes = fx.Graph(), {}
    output = graph.graph_copy(module.graph, nodes)
    graph.output(output)
    graph.output_node().meta = dict(module.graph.output_node().meta)
    return fx.GraphModule(module, graph, type(module).__name__), nodes


def rewrite(report: FusionReport, backends: tuple[str, ...] | None = None) -> fx.GraphModule:
    """The report's graph with every group run by the first back end that takes it.

    Fills in each group's `backend` and `refused`, and the report's `packed_bytes`. Parameters that
    were packed are, in the new graph's owner and in the report's source, views of the packed ones.
    """
    outer, nodes = copied(report.source)
    partitions = [{nodes[node]: None for node in group.nodes} for group in report.subgraphs]
    fuse_by_partitions(outer, partitions, prefix=PREFIX)
    calls = {node.target: node for node in outer.graph.nodes if node.op == "call_module"}
    groups = {f"{PREFIX}{i}": group for i, group in enumerate(report.subgraphs)}
    table = chosen(backends)
    # producers before readers: whether memory may be reused depends on who made it
    for name in [name for name in calls if name in groups]:
        group = groups[name]
        inner = outer.get_submodule(name)
        inner.fresh_results = fresh_results(inner)
        site = Site(group, inner, calls[name], outer)
        module = _built(site, group, table)
        takes = getattr(module, "takes", None)
        packed = next((m for m in module.modules() if isinstance(m, PackedLinear)), None)
        weights = _weights(site) if packed is not None else []
        if takes is not None:
            site.call.args = tuple(site.call.args[i] for i in takes)
        outer.set_submodule(name, module)
        if weights:
            report.packed_bytes += packed.packed_bytes
            _as_views(report.source, weights, packed)
    outer.graph.eliminate_dead_code()
    outer.graph.lint()
    outer.recompile()
    # what nothing reads any more is not kept
    lean = fx.GraphModule(outer, outer.graph, type(report.source).__name__)
    lean.meta = dict(report.source.meta)
    return lean.eval()


def _built(site: Site, group: FusionGroup, table: list[Backend]) -> nn.Module:
    group.refused = {}
    for backend in table:
        why = backend.refuses(site)
        if why is None:
            group.backend = backend.name
            return backend.build(site)
        group.refused[backend.name] = why
    raise AssertionError("the eager back end refuses nothing")


def _weights(site: Site) -> list[tuple[str, str | None]]:
    """(weight, bias) paths of the projections that were packed, in order."""
    found = []
    for node in site.inner.graph.nodes:
        if node.op != "call_function" or node.target is not torch.ops.aten.linear.default:
            continue
        paths = [
            site.call.args[site.placeholders.index(a)].target
            for a in node.args[1:]
            if a is not None
        ]
        found.append((paths[0], paths[1] if len(paths) > 1 else None))
    return found


def _as_views(source: fx.GraphModule, weights: list[tuple[str, str | None]], packed: PackedLinear):
    """The source's parameters become views of the packed ones; the user's model keeps its own."""
    for (weight, bias), (weight_view, bias_view) in zip(weights, packed.parts(), strict=True):
        for path, view in ((weight, weight_view), (bias, bias_view)):
            if path is not None:
                parent, _, name = path.rpartition(".")
                owner = source.get_submodule(parent)
                setattr(owner, name, nn.Parameter(view, requires_grad=False))
