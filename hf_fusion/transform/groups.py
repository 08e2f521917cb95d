"""Groups of nodes that run as one callable, and the order that makes a set of them possible."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from .nodes import bytes_of, class_of, is_kernel, name_of

PARALLEL = "parallel linear"
CORE = "attention core"
NORM_RESIDUAL = "norm and residual"
NORM = "norm"
EPILOGUE = "gemm epilogue"
GLU = "gated unit"
ROPE = "rotary embedding"
ELEMENTWISE = "elementwise"
CHAIN = "chain"
BLOCK = "block"


@dataclass(eq=False)
class FusionGroup:
    """Nodes that run as one; `details` is what the rule that found it knows, by role.

    backend and refused are filled in when the group is made executable: who runs it, and why those
    asked before would not. name: its place in the order of the accepted.
    """

    kind: str
    nodes: list[fx.Node]
    owner: str = ""
    fusion_pattern: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    backend: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self):
        order = {node: i for i, node in enumerate(self.nodes[0].graph.nodes)} if self.nodes else {}
        self.nodes = sorted(dict.fromkeys(self.nodes), key=order.__getitem__)
        # what the report says stays true when the nodes have moved into a callable
        self.operators = [name_of(node) for node in self.nodes if is_kernel(node)]
        inside = set(self.nodes)
        ends = [n for n in self.nodes if any(user not in inside for user in n.users)]
        kept = [n for n in self.nodes if is_kernel(n) and n not in ends]
        entering = {n for node in self.nodes for n in node.all_input_nodes if n not in inside}
        self.estimated_internal_bytes = sum(map(bytes_of, kept))
        self.estimated_boundary_bytes = sum(
            bytes_of(n) for n in (*entering, *ends) if class_of(n) != "shape"
        )
        self.fusion_pattern = self.fusion_pattern or "_".join(self.operators)

    @property
    def num_operators(self) -> int:
        """Operators in the group; views are none."""
        return len(self.operators)

    def to_dict(self) -> dict[str, Any]:
        """The group in strings and numbers."""
        return {
            "name": self.name,
            "kind": self.kind,
            "pattern": self.fusion_pattern,
            "owner": self.owner,
            "operators": self.operators,
            "backend": self.backend,
            "refused": dict(self.refused),
            "estimated": {
                "internal_bytes": self.estimated_internal_bytes,
                "boundary_bytes": self.estimated_boundary_bytes,
            },
        }


class ParallelFusionGroup(FusionGroup):
    """Projections of one input by one owner, two or more, of any widths: one product does them.

    operations: the projection nodes. producer: the node they all read. widths: their columns.
    """

    def __init__(
        self,
        operations: list[fx.Node],
        can_fuse_together: bool = True,
        producer: fx.Node | None = None,
        widths: tuple[int, ...] = (),
        owner: str = "",
        purpose: str = "",
    ):
        self.operations, self.can_fuse_together = list(operations), can_fuse_together
        self.producer, self.widths = producer, widths
        pattern = f"Parallel{purpose}_Linear ({len(operations)} parallel)"
        super().__init__(PARALLEL, self.operations, owner, pattern)
        # the input, read once instead of once per member
        self.estimated_saved_bytes = (
            bytes_of(producer) * (len(operations) - 1) if producer is not None else 0
        )


class Claims:
    """Groups accepted so far: disjoint, and without a cycle when each is one node."""

    def __init__(self, graph: fx.Graph):
        self.nodes = list(graph.nodes)
        self.group_of: dict[fx.Node, FusionGroup] = {}
        self.groups: list[FusionGroup] = []

    def free(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether no accepted group has one of the nodes."""
        return not any(node in self.group_of for node in nodes)

    def accept(self, group: FusionGroup) -> str | None:
        """Adds the group; otherwise says why it cannot be one."""
        if not group.nodes:
            return "it has no nodes"
        if not self.free(group.nodes):
            return "a node of it is in another group"
        for node in group.nodes:
            self.group_of[node] = group
        if not self._ordered():
            for node in group.nodes:
                del self.group_of[node]
            return "something outside would have to run in the middle of it"
        group.name = f"group_{len(self.groups)}"
        self.groups.append(group)
        return None

    def _ordered(self) -> bool:
        """Whether groups and single nodes can be put in an order (Kahn's algorithm)."""
        unit = self.group_of.get
        waits: dict[Any, set] = {}
        feeds: dict[Any, set] = {}
        for node in self.nodes:
            here = unit(node, node)
            mine = waits.setdefault(here, set())
            for source in node.all_input_nodes:
                there = unit(source, source)
                if there is not here:
                    mine.add(there)
                    feeds.setdefault(there, set()).add(here)
        ready, done = [u for u, sources in waits.items() if not sources], 0
        while ready:
            here = ready.pop()
            done += 1
            for user in feeds.get(here, ()):
                waits[user].discard(here)
                if not waits[user]:
                    ready.append(user)
        return done == len(waits)
