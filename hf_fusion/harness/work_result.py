"""What a bench of encoders and prompts finds: rows of contenders, points, and all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from . import peers
from .cases import Ending
from .contenders import PACKED
from .inputs import label
from .parity import Parity
from .timing import Spread
from .workloads import Work

if TYPE_CHECKING:
    from .work import WorkSettings


@dataclass
class WorkRow:
    """One contender, `precision` that of a peer's arithmetic. No result: times are None."""

    name: str
    precision: str | None = None
    failure: str | None = None
    ms: Spread | None = None
    per_second: float | None = None
    peak_share: float | None = None
    speedup: float | None = None
    parity: Parity | None = None
    calls: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, int] | None = None

    @property
    def peer(self) -> bool:
        """Whether this is another engine."""
        return self.name in peers.PEERS

    @property
    def label(self) -> str:
        """The name as tables print it."""
        if self.peer:
            return f"{peers.LABELS[self.name]} {self.precision}"
        return "full, packed copies" if self.name == PACKED else label(self.name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **vars(self),
            "label": self.label,
            "ms": self.ms and self.ms.to_dict(),
            "parity": self.parity and self.parity.to_dict(),
        }


@dataclass
class WorkItem:
    """One point: rows, and the peers that are absent with the reason. `peak`: multiply-adds of a
    large square product in the same rounds, in floating-point operations per second.
    """

    model: str
    dtype: str
    source: str
    work: Work
    flops: int
    peak: Spread | None
    rows: list[WorkRow]
    absent: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every row has its verdict."""
        return all(row.failure is None for row in self.rows)

    def row(self, name: str) -> WorkRow | None:
        """The row called `name`, None without one."""
        return next((row for row in self.rows if row.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "source": self.source,
            "work": self.work.to_dict(),
            "unit": self.work.unit,
            "gflop": self.flops / 1e9,
            "measured_peak_gflops": self.peak and self.peak.scaled(1e-9).to_dict(),
            "passed": self.passed,
            "rows": [row.to_dict() for row in self.rows],
            "absent": self.absent,
        }


@dataclass
class WorkResult:
    """All points with what they were measured on."""

    settings: WorkSettings
    items: list[WorkItem]
    environment: dict[str, Any]
    ending: Ending = field(default_factory=Ending)

    @property
    def passed(self) -> bool:
        """Whether every point was measured and every row has its verdict."""
        return self.ending.complete and all(item.passed for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "kind": "work",
            "passed": self.passed,
            **self.ending.to_dict(),
            "settings": asdict(self.settings),
            "items": [item.to_dict() for item in self.items],
            "environment": self.environment,
        }

    def markdown(self) -> str:
        """One table per model and dtype, one row per point and contender."""
        from .work_view import work_markdown

        return work_markdown(self)
