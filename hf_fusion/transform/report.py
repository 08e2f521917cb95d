"""What was fused, what was not and why, and what a measurement found; estimates are named so."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..report import markdown_table, table
from .groups import FusionGroup


@dataclass(frozen=True)
class Leftover:
    """An operator in no group, and why."""

    name: str
    operator: str
    owner: str
    reason: str
    estimated_bytes: int


@dataclass(eq=False)
class FusionReport:
    """Groups and leftovers of one graph.

    expected: attention layers of the model by module path; found: the module each attention of the
    graph ran in. measured: filled in by `measure`, empty before. notes: what the user should know.
    """

    model: str
    subgraphs: list[FusionGroup]
    leftovers: list[Leftover]
    original_operators: int
    source: fx.GraphModule | None = None
    pre_packed: dict[str, str] = field(default_factory=dict)
    expected: dict[str, str] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)
    road: str = ""
    shapes: list[str] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    packed_bytes: int = 0
    measured: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def fused_subgraphs(self) -> list[FusionGroup]:
        """The groups."""
        return self.subgraphs

    @property
    def total_subgraphs(self) -> int:
        """Groups and single operators."""
        return len(self.subgraphs) + len(self.leftovers)

    @property
    def avg_fusion_size(self) -> float:
        """Operators per group or single operator."""
        return self.original_operators / max(self.total_subgraphs, 1)

    @property
    def max_fusion_size(self) -> int:
        """Operators in the largest group."""
        return max(
            (group.num_operators for group in self.subgraphs), default=min(1, len(self.leftovers))
        )

    @property
    def data_movement_reduction(self) -> float:
        """Estimated share of the operators' outputs that stays inside groups, each tensor once."""
        inside = sum(group.estimated_internal_bytes for group in self.subgraphs)
        across = sum(group.estimated_boundary_bytes for group in self.subgraphs)
        across += sum(entry.estimated_bytes for entry in self.leftovers)
        return inside / max(inside + across, 1)

    @property
    def detected(self) -> list[str]:
        """Expected attention layers that the graph has."""
        return [
            path for path in self.expected
            if any(owner == path or owner.startswith(f"{path}.") for owner in self.found)
        ]  # fmt: skip

    @property
    def missed(self) -> dict[str, str]:
        """Expected attention layers that the graph has not, and why."""
        lost = set(self.expected) - set(self.detected)
        return {
            path: f"no attention of the graph ran in {self.expected[path]}" for path in sorted(lost)
        }

    @property
    def detection_rate(self) -> float:
        """Share of the expected attention layers that the graph has; 1 where none is expected."""
        return len(self.detected) / len(self.expected) if self.expected else 1.0

    def coverage(self) -> list[tuple[str, int, int, str]]:
        """(operator, in groups, left over, reasons) by operator, the most frequent first."""
        fused = Counter(name for group in self.subgraphs for name in group.operators)
        left = Counter(entry.operator for entry in self.leftovers)
        why: dict[str, Counter] = {}
        for entry in self.leftovers:
            why.setdefault(entry.operator, Counter())[entry.reason] += 1
        rows = [
            (name, fused[name], left[name], "; ".join(why.get(name, ()))) for name in fused | left
        ]
        return sorted(rows, key=lambda row: (-row[1] - row[2], row[0]))

    def get_fused_operator_statistics(self) -> dict[str, int]:
        """How many groups of each kind the graph has, by kind and back end."""
        keys = (f"{g.kind} ({g.backend})" if g.backend else g.kind for g in self.subgraphs)
        return dict(sorted(Counter(keys).items()))

    def summary_stats(self) -> str:
        """The numbers of the partition as text; the estimate is marked."""
        lines = [
            f"{self.model}: {self.original_operators} operators, {self.total_subgraphs} subgraphs, "
            f"{len(self.subgraphs)} of them groups",
            f"operators per subgraph {self.avg_fusion_size:.2f}, largest {self.max_fusion_size}",
            f"estimated data movement reduction {100 * self.data_movement_reduction:.1f} %",
            f"attention layers found {len(self.detected)} of {len(self.expected)}",
        ]
        lines += [
            f"  {kind}: {count}" for kind, count in self.get_fused_operator_statistics().items()
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report in strings and numbers, ready for JSON; measured and estimated kept apart."""
        return {
            "model": self.model,
            "road": self.road,
            "operators": self.original_operators,
            "subgraphs": self.total_subgraphs,
            "groups": [group.to_dict() for group in self.subgraphs],
            "leftovers": [vars(entry) for entry in self.leftovers],
            "statistics": self.get_fused_operator_statistics(),
            "attention": {
                "expected": self.expected,
                "detected": self.detected,
                "missed": self.missed,
                "pre_packed": self.pre_packed,
            },
            "estimated": {"data_movement_reduction": self.data_movement_reduction},
            "verified": {"shapes": self.shapes, "largest_errors": self.errors},
            "packed_bytes": self.packed_bytes,
            "measured": self.measured,
            "notes": self.notes,
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """The report as a page."""
        parts = [f"# {self.model}", "", "```", self.summary_stats(), "```"]
        if self.road:
            parts += ["", f"Captured by: {self.road}. Packed weights: {self.packed_bytes} bytes."]
        if self.shapes:
            worst = max(self.errors)
            parts += [
                f"Equal to the model at {', '.join(self.shapes)}; largest difference {worst:.1e}."
            ]
        parts += [f"Note: {note}" for note in self.notes]
        for path, why in self.missed.items():
            parts += [f"Attention layer {path} not found: {why}."]
        rows = [tuple(map(str, row)) for row in self.coverage()]
        parts += [
            "",
            "## Operators",
            "",
            *markdown_table(("operator", "fused", "left", "why left"), rows),
        ]
        refusals = Counter(
            (group.kind, name, why)
            for group in self.subgraphs
            for name, why in group.refused.items()
        )
        if refusals:
            rows = [(*key, str(n)) for key, n in refusals.items()]
            parts += ["", "## Back ends that refused", ""]
            parts += markdown_table(("group", "back end", "why", "groups"), rows)
        if self.measured:
            parts += ["", "## Measured", "", *self._measured_rows()]
        return "\n".join(parts) + "\n"

    def _measured_rows(self) -> list[str]:
        header = ("form", "kernels", "peak activation MB", "written MB", "ms (quartiles)")
        rows = []
        for name, reading in self.measured.items():
            if not isinstance(reading, dict) or "kernels" not in reading:
                continue
            peak = reading.get("peak_bytes")
            seconds, written = reading.get("seconds"), reading.get("written_bytes")
            rows.append((
                name, str(reading["kernels"]), "-" if peak is None else f"{peak / 1e6:.3f}",
                "-" if written is None else f"{written / 1e6:.2f}",
                "-" if not seconds else
                f"{1e3 * seconds[1]:.2f} ({1e3 * seconds[0]:.2f}-{1e3 * seconds[2]:.2f})",
            ))  # fmt: skip
        return markdown_table(header, rows)

    def __str__(self) -> str:
        rows = [
            (g.name, g.kind, g.fusion_pattern, g.backend or "-", g.owner) for g in self.subgraphs
        ]
        return "\n".join(
            [self.summary_stats(), *table(("group", "kind", "pattern", "back end", "module"), rows)]
        )
