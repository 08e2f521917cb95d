"""Measures the table of attention blocks (csrc/attend_table.h) again: every candidate beside the
one that the table chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from hf_fusion import attend as kernels

from . import machine
from .attention_study import AttentionSettings, Operands, operands
from .cases import Ending, one_by_one
from .contenders import Contender
from .progress import progress
from .timing import interleave, torch_threads

TUNED = ("tiled", "flash")
QUERIES = (32, 64, 128, 192, 256, 384)
KEYS = (64, 128, 256)
TOLERANCE = 1.05
"""Blocks this much slower than the best ones are as good: runs differ by as much."""


@dataclass
class TuneRow:
    """One kernel at one point: (queries, keys) of the table's block and of the fastest, with their
    median milliseconds.
    """

    kernel: str
    dtype: str
    head_dim: int
    tokens: int
    table: tuple[int, int]
    table_ms: float
    best: tuple[int, int]
    best_ms: float

    @property
    def ratio(self) -> float:
        """Time with the table's blocks over time with the best ones."""
        return self.table_ms / self.best_ms

    @property
    def holds(self) -> bool:
        """Whether the table's row is as good as any."""
        return self.ratio <= TOLERANCE


@dataclass
class TuneResult:
    """All rows with what they were measured on."""

    settings: AttentionSettings
    rows: list[TuneRow]
    environment: dict[str, Any]
    tolerance: float = TOLERANCE
    ending: Ending = field(default_factory=Ending)

    @property
    def passed(self) -> bool:
        """Whether every row was measured; one that does not hold is a finding, not a failure."""
        return self.ending.complete

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        rows = [{**asdict(row), "ratio": row.ratio, "holds": row.holds} for row in self.rows]
        return {
            "kind": "attention blocks",
            "passed": self.passed,
            **self.ending.to_dict(),
            "tolerance": self.tolerance,
            "settings": asdict(self.settings),
            "rows": rows,
            "environment": self.environment,
        }

    def markdown(self) -> str:
        """One table."""
        from .attention_view import tune_markdown

        return tune_markdown(self)


def run_tune(
    settings: AttentionSettings,
    queries: Sequence[int] = QUERIES,
    keys: Sequence[int] = KEYS,
) -> TuneResult:
    """Times every pair of `queries` and `keys` at every point of `settings`."""
    settings = replace(settings, contenders=()).checked()
    candidates = list(product(queries, keys))
    points = product(TUNED, settings.dtypes, settings.head_dims, settings.lengths)
    with one_by_one() as found, torch_threads(settings.threads), torch.no_grad():
        kernels.share_threads()
        for kernel, dtype, dim, tokens in points:
            with found.one(f"{kernel} {dtype} head size {dim}, {tokens} tokens"):
                row = _tune(settings, kernel, dtype, dim, tokens, candidates)
                found.results.append(row)
    record = machine.environment(settings.threads)
    return TuneResult(settings, found.results, record, ending=found.ending)


def _tune(
    settings: AttentionSettings,
    kernel: str,
    dtype: str,
    dim: int,
    tokens: int,
    candidates: Sequence[tuple[int, int]],
) -> TuneRow:
    heads = settings.heads
    inputs = operands(settings.seed, settings.batch, heads, heads, tokens, tokens, dim, dtype)
    chosen = kernels.plan(*inputs, kernel=kernel, causal=settings.causal)[:2]
    blocks = {chosen, *(pair for pair in candidates if max(pair) <= tokens)}
    ready = [
        Contender(_name(pair), partial(_call, kernel, settings.causal, pair))
        for pair in sorted(blocks, key=lambda pair: pair != chosen)
    ]
    title = f"{kernel} {dtype} head size {dim}, {tokens} tokens"
    with progress(title, len(ready) * (settings.rounds + 1)) as advance:
        recording = interleave(
            ready, [inputs] * settings.rounds, 0, settings.threads, lambda threads: None, advance
        )
    medians = {
        pair: 1e3 * torch.tensor([s.step for s in recording.samples[_name(pair)]]).median().item()
        for pair in blocks
        if _name(pair) not in recording.failures
    }
    best = min(medians, key=medians.__getitem__)
    return TuneRow(kernel, dtype, dim, tokens, chosen, medians[chosen], best, medians[best])


def _name(pair: tuple[int, int]) -> str:
    return "{} x {}".format(*pair)


def _call(kernel: str, causal: bool, pair: tuple[int, int], inputs: Operands) -> None:
    kernels.attend(*inputs, kernel=kernel, causal=causal, blocks=pair)
