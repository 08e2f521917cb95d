"""The same measurement over a range: context lengths, batch sizes, or model shapes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import machine
from .ablation import AblationResult, Settings, run_ablation
from .cases import Ending, one_by_one
from .inputs import COMPILED, STOCK, InputError, at_least, dtype_name
from .models import ACCEPTED, load_model
from .render import bench_markdown, sweep_markdown

BENCH_CASES = (
    "pythia-14m:fp32",
    "pythia-70m:bf16",
    "pythia-160m:bf16",
    "pythia-410m:bf16",
    "pythia-160m:fp16",
    "pythia-160m:fp32",
)


@dataclass
class SweepResult:
    """kind: "context" (tokens in the cache when decoding starts) or "batch"; one ablation per
    point.
    """

    kind: str
    points: list[tuple[int, AblationResult]]
    ending: Ending = field(default_factory=Ending)

    @property
    def passed(self) -> bool:
        """Whether every point was measured and has its verdicts."""
        return self.ending.complete and all(point.passed for _, point in self.points)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        points = [{self.kind: value, **point.to_dict()} for value, point in self.points]
        return {
            "kind": "sweep",
            "over": self.kind,
            "passed": self.passed,
            **self.ending.to_dict(),
            "points": points,
        }

    def markdown(self) -> str:
        """One row per point."""
        return sweep_markdown(self)


@dataclass
class BenchResult:
    """One ablation of stock and full per shape and dtype."""

    items: list[AblationResult]
    ending: Ending = field(default_factory=Ending)

    @property
    def passed(self) -> bool:
        """Whether every case was measured and has its verdicts."""
        return self.ending.complete and all(item.passed for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "kind": "bench",
            "passed": self.passed,
            **self.ending.to_dict(),
            "items": [item.to_dict() for item in self.items],
        }

    def markdown(self) -> str:
        """One row per case."""
        return bench_markdown(self)


def run_context_sweep(
    settings: Settings,
    contexts: Sequence[int],
    stream: Callable[[int], float | None] = machine.read_stream,
) -> SweepResult:
    """Decode latency with the cache filled to each of `contexts` by a prompt of that length."""
    return _sweep("context", "prompt_tokens", settings, contexts, stream)


def run_batch_sweep(
    settings: Settings,
    batches: Sequence[int],
    stream: Callable[[int], float | None] = machine.read_stream,
) -> SweepResult:
    """Decode latency at each of `batches`."""
    return _sweep("batch", "batch", settings, batches, stream)


def parse_case(text: str) -> tuple[str, str]:
    """(model, dtype) of "model:dtype"."""
    model, separator, dtype = text.rpartition(":")
    if not separator or not model:
        raise InputError(
            f"case {text!r}: expected model:dtype such as pythia-160m:bf16; models are "
            f"{', '.join(ACCEPTED)}"
        )
    return model, dtype_name(dtype)


def run_bench(
    cases: Sequence[str] = BENCH_CASES,
    settings: Settings = Settings(rungs=(STOCK, "full")),
    stream: Callable[[int], float | None] = machine.read_stream,
) -> BenchResult:
    """Stock, full and the read stream for each "model:dtype"; `settings` gives everything else."""
    if not cases:
        raise InputError(f"no cases: expected some of {', '.join(BENCH_CASES)}")
    rungs = (STOCK, COMPILED, "full") if COMPILED in settings.rungs else (STOCK, "full")
    with one_by_one() as found:
        for model, dtype in [parse_case(case) for case in cases]:
            chosen = replace(settings, model=model, dtype=dtype, rungs=rungs)
            with found.one(f"{model} {dtype}"):
                found.results.append(run_ablation(chosen, stream=stream))
    return BenchResult(found.results, found.ending)


def _sweep(
    kind: str,
    name: str,
    settings: Settings,
    values: Sequence[int],
    stream: Callable[[int], float | None],
) -> SweepResult:
    if not values:
        raise InputError(f"no {kind} values: expected integers such as 1,2,4")
    for value in values:
        at_least(kind, value, 1)
    settings = settings.checked()
    loaded = load_model(settings.model, settings.dtype, settings.seed)
    with one_by_one() as found:
        for value in values:
            chosen = replace(settings, **{name: value})
            with found.one(f"{kind} {value}"):
                found.results.append((value, run_ablation(chosen, loaded, stream=stream)))
    return SweepResult(kind, found.results, found.ending)
