"""The ablation: how much faster each rung of fusion is than stock, and whether it is right.

A speed is a result only with its verdict: a rung that fused nothing, whose logits miss the parity
limit, or whose tokens leave stock's without rounding as the cause, gets its reason in the table
instead of its time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from . import machine
from .inputs import (
    COMPILED,
    LADDER,
    RUNGS,
    STOCK,
    at_least,
    backend_name,
    dtype_name,
    label,
    rung_names,
    thread_count,
)
from .memory import peak_memory
from .models import LoadedModel, bytes_per_step, load_model, prompts
from .parity import Divergence, Parity, compare_tokens, measure_parity
from .progress import progress
from .render import ablation_markdown
from .timing import Recording, RungRunner, Runner, Sample, Spread, interleave, torch_threads


@dataclass(frozen=True)
class Settings:
    """What an ablation measures. `rungs` always gain stock; `threads` None is torch's own width;
    `sample` draws tokens as timing.SAMPLING says, which are then not compared.
    """

    model: str = "tiny"
    dtype: str = "bf16"
    rungs: tuple[str, ...] = RUNGS
    backend: str = "auto"
    rounds: int = 7
    prompt_tokens: int = 32
    new_tokens: int = 64
    batch: int = 1
    threads: int | None = None
    seed: int = 0
    loop: str = "generate"
    sample: bool = False
    memory: bool = False

    def checked(self) -> Settings:
        """The same with normal names; InputError for what is not accepted."""
        backend_name(self.backend)
        at_least("rounds", self.rounds, 1)
        at_least("prompt length", self.prompt_tokens, 1)
        at_least("new tokens", self.new_tokens, 2)
        at_least("batch", self.batch, 1)
        changes = {
            "dtype": dtype_name(self.dtype),
            "rungs": rung_names(self.rungs),
            "threads": thread_count(self.threads),
        }
        return Settings(**{**asdict(self), **changes})


@dataclass
class Row:
    """One contender. Times are None, and `failure` says why, when there is no verdict that they are
    right.
    """

    name: str
    failure: str | None = None
    step_ms: Spread | None = None
    prefill_ms: Spread | None = None
    tokens_per_s: float | None = None
    speedup: float | None = None
    stream_share: float | None = None
    tokens_equal: float | None = None
    divergences: list[Divergence] = field(default_factory=list)
    parity: Parity | None = None
    calls: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, int] | None = None

    @property
    def label(self) -> str:
        """The name as tables print it."""
        return label(self.name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        spreads = {
            key: value and value.to_dict()
            for key, value in (("step_ms", self.step_ms), ("prefill_ms", self.prefill_ms))
        }
        return {
            "name": self.name,
            "label": self.label,
            "failure": self.failure,
            **spreads,
            "tokens_per_s": self.tokens_per_s,
            "speedup": self.speedup,
            "stream_share": self.stream_share,
            "tokens_equal": self.tokens_equal,
            "divergences": [item.to_dict() for item in self.divergences],
            "parity": self.parity and self.parity.to_dict(),
            "calls": self.calls,
            "memory": self.memory,
        }


@dataclass
class AblationResult:
    """Rows in ladder order with what they were measured on and against."""

    settings: Settings
    source: str
    rows: list[Row]
    bytes_per_step: int
    stream_gbs: Spread | None
    wrapper_us: Spread | None
    environment: dict[str, Any]
    positions: int | None = None

    def row(self, name: str) -> Row | None:
        """The row of a rung, None when it was not asked for."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def ladder(self) -> str:
        """Whether each rung is at least as fast as the one before it, by medians; names the first
        that is not.
        """
        steps = [row for name in LADDER if (row := self.row(name)) and row.step_ms]
        if len(steps) < 2:
            return "not judged (fewer than two rungs)"
        inside = False
        for before, after in zip(steps, steps[1:]):
            if after.step_ms.median > before.step_ms.median:
                if after.step_ms.low > before.step_ms.high:
                    return f"not monotone ({after.name} is slower than {before.name})"
                inside = True
        return "monotone within the spread" if inside else "monotone"

    @property
    def beyond(self) -> str | None:
        """Says where the tokens leave the positions that the model was made for."""
        needed = self.settings.prompt_tokens + self.settings.new_tokens
        if not self.positions or needed <= self.positions:
            return None
        return f"prompt and new tokens, {needed}, exceed the model's {self.positions} positions"

    @property
    def stream_floor_ms(self) -> float | None:
        """Milliseconds the measured read stream needs for the bytes of one step."""
        return self.bytes_per_step / self.stream_gbs.median / 1e6 if self.stream_gbs else None

    @property
    def passed(self) -> bool:
        """Whether every contender has a verdict."""
        return all(row.failure is None for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "kind": "ablation",
            "settings": asdict(self.settings),
            "source": self.source,
            "positions": self.positions,
            "bytes_per_step": self.bytes_per_step,
            "stream_gbs": self.stream_gbs and self.stream_gbs.to_dict(),
            "stream_floor_ms": self.stream_floor_ms,
            "ladder": self.ladder,
            "wrapper_us_per_layer_call": self.wrapper_us and self.wrapper_us.to_dict(),
            "passed": self.passed,
            "rows": [row.to_dict() for row in self.rows],
            "environment": self.environment,
        }

    def markdown(self) -> str:
        """The table with the lines it needs below it."""
        return ablation_markdown(self)


def run_ablation(
    settings: Settings,
    loaded: LoadedModel | None = None,
    peers: Sequence[Runner] = (),
    stream: Callable[[int], float | None] = machine.read_stream,
) -> AblationResult:
    """Measures `settings`. `loaded` reuses a model; `peers` are other engines timed in the same
    rounds, after the rungs.
    """
    settings = settings.checked()
    loaded = loaded or load_model(settings.model, settings.dtype, settings.seed)
    fed = prompts(loaded, settings.rounds, settings.batch, settings.prompt_tokens, settings.seed)
    runners = [
        RungRunner(loaded.model, rung, settings.backend, settings.loop, settings.sample)
        for rung in settings.rungs
    ]
    contenders = [*runners, *peers]
    judged = [rung for rung in settings.rungs if rung != COMPILED]
    total = len(contenders) * (settings.rounds + 1) + len(judged)
    with progress(f"{settings.model} {settings.dtype}", total) as advance:
        recording = interleave(
            contenders, fed, settings.new_tokens, settings.threads, stream, advance
        )
        loaded.model.__dict__.pop("_compiled_call", None)
        with torch_threads(settings.threads):
            judged = [rung for rung in judged if rung not in recording.failures]
            stock = [sample.tokens for sample in recording.samples[STOCK]]
            parity = measure_parity(
                loaded.model, judged, fed[0], stock[0], settings.backend, advance
            )
            rows = [
                _row(runner.name, recording, parity, loaded, fed, settings.sample)
                for runner in contenders
            ]
    _relate(rows, settings, recording, loaded)
    if settings.memory:
        _add_memory([row for row in rows if row.name in judged], settings)
    return AblationResult(
        settings,
        loaded.source,
        rows,
        _bytes(loaded, settings),
        Spread.of(recording.stream).scaled(1e-9) if recording.stream else None,
        _wrapper_cost(recording, loaded),
        machine.environment(settings.threads),
        loaded.positions,
    )


def _row(
    name: str,
    recording: Recording,
    parity: dict[str, Parity],
    loaded: LoadedModel,
    fed: Sequence[Any],
    drawn: bool,
) -> Row:
    """A row with verdicts, times not yet in it; `drawn` tokens have none."""
    row = Row(name, failure=recording.failures.get(name), parity=parity.get(name))
    if row.failure:
        return row
    samples = recording.samples[name]
    row.calls = _sum_calls(samples) if name in RUNGS[1:] else {}
    if not drawn:
        stock = [sample.tokens for sample in recording.samples[STOCK]]
        error = parity[STOCK].error + (row.parity or parity[STOCK]).error
        row.tokens_equal, row.divergences = compare_tokens(
            loaded.model, fed, stock, [sample.tokens for sample in samples], error
        )
    if name in RUNGS:
        row.failure = _verdict(row)
    return row


def _verdict(row: Row) -> str | None:
    """Why the row's times are no result, or None."""
    if row.name not in (STOCK, "none") and not row.calls["fused"]:
        reasons = ", ".join(f"{reason} x {count}" for reason, count in row.calls["refused"].items())
        return f"nothing was fused ({reasons or 'no reason counted'})"
    if row.name == "none" and not any(row.calls["calls"].values()):
        return "the wrapper was never called"
    if row.name != STOCK and not row.parity.passed:
        return (
            f"logit error {row.parity.error:.3g} is {row.parity.ratio:.3g} times stock's own "
            f"{row.parity.stock_error:.3g}, limit {row.parity.limit:g}"
        )
    for item in row.divergences:
        if not item.explained:
            return (
                f"token {item.token} of prompt {item.prompt} differs from stock's with a top-2 "
                f"gap of {item.gap:.3g}, beyond the logit error {item.error:.3g}"
            )
    return None


def _relate(rows: list[Row], settings: Settings, recording: Recording, loaded: LoadedModel) -> None:
    """Fills the times of the rows that have a verdict, and their relation to stock and to the
    stream.
    """
    stock = _steps(recording, STOCK)
    needed = _bytes(loaded, settings)
    for row in rows:
        if row.failure:
            continue
        steps = _steps(recording, row.name)
        row.step_ms = Spread.of(steps).scaled(1e3)
        row.prefill_ms = Spread.of(
            [sample.prefill for sample in recording.samples[row.name]]
        ).scaled(1e3)
        row.tokens_per_s = settings.batch * 1e3 / row.step_ms.median
        row.speedup = Spread.of(stock).median / Spread.of(steps).median
        if recording.stream:
            row.stream_share = needed / Spread.of(steps).median / Spread.of(recording.stream).median


def _wrapper_cost(recording: Recording, loaded: LoadedModel) -> Spread | None:
    """Microseconds per layer call that the bare wrapper adds, by the paired differences of the
    rounds.
    """
    if not recording.samples.get("none") or "none" in recording.failures:
        return None
    pairs = zip(recording.samples["none"], recording.samples[STOCK])
    costs = [wrapped.quiet_step - plain.quiet_step for wrapped, plain in pairs]
    return Spread.of(costs).scaled(1e6 / loaded.layers)


def _add_memory(rows: Sequence[Row], settings: Settings) -> None:
    with progress("peak memory", len(rows)) as advance:
        for row in rows:
            row.memory = peak_memory(asdict(settings), row.name)
            advance(row.name)


def _bytes(loaded: LoadedModel, settings: Settings) -> int:
    return bytes_per_step(
        loaded.model, settings.batch, settings.prompt_tokens + settings.new_tokens // 2
    )


def _steps(recording: Recording, name: str) -> list[float]:
    return [sample.step for sample in recording.samples[name]]


def _sum_calls(samples: Sequence[Sample]) -> dict[str, Any]:
    """The counters of all rounds added up."""
    total: dict[str, Any] = {"fused": 0, "refused": {}, "downgraded": {}, "calls": {}}
    for sample in samples:
        total["fused"] += sample.calls.get("fused", 0)
        for key in ("refused", "downgraded", "calls"):
            for name, count in sample.calls.get(key, {}).items():
                total[key][name] = total[key].get(name, 0) + count
    return total
