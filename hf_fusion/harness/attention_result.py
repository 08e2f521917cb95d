"""What a study of the attention kernels finds: rows of contenders, points, and all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .cases import Ending
from .timing import Spread

if TYPE_CHECKING:
    from .attention_study import AttentionSettings

SDPA, EAGER = "sdpa", "eager"
TORCH = {
    "sdpa": "torch SDPA",
    "sdpa_flash": "torch SDPA, flash",
    "sdpa_math": "torch SDPA, math",
    "eager": "eager",
}


@dataclass
class AttentionRow:
    """One contender at one point. No result: `ms` is None and `failure` says why. extra_bytes: what
    the kernel plans to take; peak_bytes: how much a process grows while it runs.
    """

    name: str
    failure: str | None = None
    absent: str | None = None
    ms: Spread | None = None
    error: float | None = None
    allowed: float | None = None
    extra_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def label(self) -> str:
        """The name as tables print it."""
        return TORCH.get(self.name, self.name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "label": self.label, "ms": self.ms and self.ms.to_dict()}


@dataclass
class AttentionPoint:
    """Rows of one dtype, head size and length: `kind` "prefill", or one of `GROUPS` for a decode
    step through LAYERS caches of `cache_bytes` each.
    """

    kind: str
    dtype: str
    head_dim: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    cache_bytes: int
    rows: list[AttentionRow] = field(default_factory=list)

    def row(self, name: str) -> AttentionRow | None:
        """The row called `name`, None without one."""
        return next((row for row in self.rows if row.name == name), None)

    def ratio(self, name: str, to: str) -> float | None:
        """Median time of `to` over that of `name`; None where either has none."""
        mine, other = self.row(name), self.row(to)
        if mine is None or other is None or mine.ms is None or other.ms is None:
            return None
        return other.ms.median / mine.ms.median

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with each row's speed-up over naive and over torch's SDPA."""
        rows = [
            {
                **row.to_dict(),
                "over_naive": self.ratio(row.name, "naive"),
                "over_sdpa": self.ratio(row.name, SDPA),
            }
            for row in self.rows
        ]
        return {**vars(self), "rows": rows}


@dataclass
class AttentionResult:
    """All points with what they were measured on."""

    settings: AttentionSettings
    points: list[AttentionPoint]
    environment: dict[str, Any]
    ending: Ending = field(default_factory=Ending)

    @property
    def passed(self) -> bool:
        """Whether every point was measured and every row that was run has its verdict."""
        return self.ending.complete and all(
            row.failure is None for point in self.points for row in point.rows
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "kind": "attention",
            "passed": self.passed,
            **self.ending.to_dict(),
            "settings": asdict(self.settings),
            "points": [point.to_dict() for point in self.points],
            "environment": self.environment,
        }

    def markdown(self) -> str:
        """Tables of the lengths, of memory and of decode steps."""
        from .attention_view import attention_markdown

        return attention_markdown(self)
