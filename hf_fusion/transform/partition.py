"""Graphs cut into groups: the plain partitioner, and the one that knows attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

from torch import fx, nn

from . import rules
from .attention import attentions, pre_packed
from .blocks import blocks, read_layer
from .groups import BLOCK, CHAIN, CORE, Claims, FusionGroup, ParallelFusionGroup
from .interface import attention_layers
from .nodes import (
    ATTENTION,
    GEMM,
    NORM,
    POINTWISE,
    SHAPE,
    VIEW,
    bytes_of,
    class_of,
    exclusive_views_down,
    name_of,
    owner_of,
)
from .report import FusionReport, Leftover
from .rules import FusionRule, counted, parallel


class FusionBasedPartitioner:
    """The baseline: chains in which each operator is the only reader of the one before.

    Takes graphs of torch.export and of torch.fx.symbolic_trace.
    """

    def __init__(self) -> None:
        self._report: FusionReport | None = None

    def partition(self, module: fx.GraphModule) -> FusionReport:
        """Groups and leftovers of the graph; the graph is not changed."""
        claims = Claims(module.graph)
        for group in self._propose(module.graph, claims):
            claims.accept(group)
        return self._finish(module, claims, {})

    def _propose(self, graph: fx.Graph, claims: Claims):
        for first in counted(graph):
            chain, last = [first], first
            while claims.free(chain):
                views = exclusive_views_down(last)
                end = views[-1] if views else last
                readers = list(end.users)
                if len(readers) != 1 or class_of(readers[0]) not in (POINTWISE, NORM, "softmax"):
                    break
                last = readers[0]
                chain += [*views, last]
            if claims.free(chain) and sum(class_of(n) not in (VIEW, SHAPE) for n in chain) > 1:
                yield FusionGroup(CHAIN, chain, owner_of(first))

    def _finish(self, module, claims: Claims, refused: dict[fx.Node, str]) -> FusionReport:
        graph = module.graph
        packed = pre_packed(graph)
        leftovers = [
            Leftover(node.name, name_of(node), owner_of(node), self._reason(node, packed, refused),
                     bytes_of(node))
            for node in counted(graph) if node not in claims.group_of
        ]  # fmt: skip
        self._report = FusionReport(
            type(module).__name__, claims.groups, leftovers, len(counted(graph)), source=module,
            pre_packed={node.name: letters for node, letters in packed.items()},
            expected=dict(module.meta.get("attention_layers", {})),
            found=[attention.owner for attention in attentions(graph)],
        )  # fmt: skip
        return self._report

    def _reason(self, node: fx.Node, packed: dict, refused: dict[fx.Node, str]) -> str:
        if node in packed:
            return f"pre-packed: it gives {', '.join(packed[node])} in one product already"
        if node in refused:
            return refused[node]
        kind = class_of(node)
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return "it writes into its input"
        return {
            GEMM: "no projection beside it reads the same input, nothing after it is its own",
            NORM: "no residual addition before it",
            ATTENTION: "its operands are not (batch, heads, tokens, size)",
            POINTWISE: "alone between operators of other kinds",
        }.get(kind, f"no rule for {name_of(node)}")


class AttentionFusionPartitioner(FusionBasedPartitioner):
    """Groups around attention: projections side by side, the attention itself, norms, epilogues.

    rules: in order of priority, those registered where None. pack_cross_kv_across_layers: one
    product for the keys and values of all decoder layers; fewer launches, and all of them in memory
    at once. model: where the expected attention layers are counted, if the graph does not say.
    whole_layers: a layer that a native kernel runs in one call is one group.
    """

    def __init__(
        self,
        rules: Sequence[FusionRule] | None = None,
        pack_cross_kv_across_layers: bool = False,
        model: nn.Module | None = None,
        whole_layers: bool = False,
    ) -> None:
        super().__init__()
        self._rules, self._model, self._whole = rules, model, whole_layers
        self._across = pack_cross_kv_across_layers

    def partition(self, module: fx.GraphModule) -> FusionReport:
        """Groups and leftovers of the graph; the graph is not changed."""
        claims, refused = Claims(module.graph), {}
        table = list(self._rules or rules.RULES)
        if self._whole:
            table.append(FusionRule(BLOCK, 1, blocks))
        for rule in sorted(table, key=lambda entry: entry.order):
            propose = rule.propose
            if self._across and propose is parallel:
                propose = partial(parallel, across_owners=True)
            for group in propose(module.graph, claims):
                why = claims.accept(group)
                if why is not None:
                    for node in group.nodes:
                        refused.setdefault(node, f"{group.kind}: {why}")
        report = self._finish(module, claims, refused)
        if self._whole:
            why = Counter(read_layer(attention)[1] for attention in attentions(module.graph))
            report.notes += [
                f"{n} layers are not one call: {text}" for text, n in why.items() if text
            ]
        if self._model is not None:
            layers = attention_layers(self._model)
            report.expected = {name: type(layer).__name__ for name, layer in layers.items()}
        return report

    def get_attention_fusion_stats(self) -> dict[str, float | int]:
        """What became of attention in the last graph; bytes are estimates from captured sizes."""
        report = self._last()
        parallel_groups = [g for g in report.subgraphs if isinstance(g, ParallelFusionGroup)]
        return {
            "parallel_fusions_created": len(parallel_groups),
            "parallel_fusion_subgraphs": sum(len(g.operations) for g in parallel_groups),
            "attention_sequential_fusions": sum(g.kind == CORE for g in report.subgraphs),
            "parallel_fusion_memory_saved_bytes": sum(
                g.estimated_saved_bytes for g in parallel_groups
            ),
            "pre_packed": len(report.pre_packed),
            "expected_layers": len(report.expected),
            "detected_layers": len(report.detected),
            "detection_rate": report.detection_rate,
        }

    def print_attention_fusion_summary(self) -> str:
        """Prints the statistics, and returns what it prints."""
        stats = self.get_attention_fusion_stats()
        width = max(map(len, stats))
        text = "\n".join(
            ["Attention fusion", *(f"  {name:{width}}  {value:g}" for name, value in stats.items())]
        )
        print(text)
        return text

    def _last(self) -> FusionReport:
        if self._report is None:
            raise RuntimeError("partition() has not run")
        return self._report
