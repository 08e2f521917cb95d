"""Encoders and prompts: stock, rungs and peers on batches, lengths and images, each with a verdict.

The verdict of a row: its largest error against stock in higher precision, at the positions that are
not padding, is at most twice stock's own in the same dtype, over the inputs that were timed first.
Where fp32 products may be less exact, stock computes them in full: "high" grants a relative L2
error of 2^-14, and of "medium" stock's error in bf16 is the yardstick. A rung without a verdict has
no time; a peer keeps its time beside the failed one.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from . import machine, peers
from .cases import one_by_one
from .contenders import (
    DEFAULT_RUNGS,
    PRECISIONS,
    Contender,
    matmul_precision,
    peer_contender,
    rung_contender,
    work_rungs,
)
from .encoders import DECODER, IMAGE, TEXT, kind_of, load_any
from .inputs import (
    DTYPES,
    STOCK,
    InputError,
    at_least,
    backend_name,
    thread_count,
    unaccepted,
)
from .memory import fresh_process
from .models import LoadedModel
from .parity import Parity, raised
from .progress import progress
from .timing import Recording, Spread, interleave, torch_threads
from .work_result import WorkItem, WorkResult, WorkRow
from .workloads import Inputs, Work, judged, make_inputs, make_work, run_model, work_flops

JUDGED = 2
"""Inputs on which errors are measured, of those that are timed."""
GRANTED_BY_HIGH = 2.0**-14
LENGTHS = {TEXT: (128,), DECODER: (512,), IMAGE: (0,)}
Peak = Callable[[int], float | None]


@dataclass(frozen=True)
class WorkSettings:
    """What is measured; one point per case, batch and length. `lengths` None means 128 for a text
    encoder and 512 for a prompt; an image encoder takes none.
    """

    cases: tuple[tuple[str, str], ...]
    rungs: tuple[str, ...] = DEFAULT_RUNGS
    peers: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1,)
    lengths: tuple[int, ...] | None = None
    ragged: bool = False
    backend: str = "auto"
    rounds: int = 7
    threads: int | None = None
    seed: int = 0
    matmul_precision: str = "highest"
    memory: bool = False

    def checked(self) -> WorkSettings:
        """The same with normal names; InputError for what is not accepted."""
        backend_name(self.backend)
        at_least("rounds", self.rounds, 1)
        if not self.cases:
            raise InputError("no cases: expected some such as bert-base:bf16")
        if not self.batches or self.lengths == ():
            raise InputError("no batches or lengths: expected integers such as 1,8")
        for what, values in (("batch", self.batches), ("length", self.lengths or ())):
            for value in values:
                at_least(what, value, 1)
        if self.matmul_precision not in PRECISIONS:
            raise unaccepted("matmul precision", self.matmul_precision, PRECISIONS)
        for model, _ in self.cases:
            kind = kind_of(model)
            if kind == IMAGE and (self.lengths or self.ragged):
                given = "ragged lengths" if self.ragged else f"length {self.lengths[0]}"
                raise InputError(f"model {model!r} takes images: expected no {given}")
            if kind == DECODER and self.ragged:
                raise InputError(
                    f"model {model!r} is a decoder: expected a text encoder for ragged lengths"
                )
        return replace(
            self,
            rungs=work_rungs(self.rungs),
            peers=peers.peer_names(self.peers),
            threads=thread_count(self.threads),
        )


def run_work(settings: WorkSettings, peak: Callable[..., Peak] | None = None) -> WorkResult:
    """Measures every point of `settings`; `peak(dtype)` replaces the measured peak's kernel."""
    settings = settings.checked()
    with (
        one_by_one() as found,
        matmul_precision(settings.matmul_precision),
        torch_threads(settings.threads),
    ):
        for model, dtype in settings.cases:
            with found.one(f"{model} {dtype}"):
                loaded, kind = load_any(model, dtype, settings.seed)
                measured = (peak or machine.multiply_add_peak)(DTYPES[loaded.dtype])
                points = [
                    make_work(loaded, kind, batch, length, settings.ragged, settings.seed)
                    for batch in settings.batches
                    for length in settings.lengths or LENGTHS[kind]
                ]
                for work in points:
                    with found.one(f"{model} {dtype} {work.label}"):
                        found.results.append(_measure(settings, loaded, work, measured))
    record = machine.environment(settings.threads)
    record["versions"] |= machine.versions(settings.peers)
    return WorkResult(settings, found.results, record, found.ending)


def _measure(settings: WorkSettings, loaded: LoadedModel, work: Work, peak: Peak) -> WorkItem:
    inputs = make_inputs(loaded, work, settings.rounds, settings.seed)
    count = len(settings.rungs) + len(settings.peers)
    total = len(settings.peers) + count * (settings.rounds + 2) + 1
    title = f"{loaded.name} {loaded.dtype} {work.label}"
    with tempfile.TemporaryDirectory() as folder, progress(title, total) as advance:
        contenders = [
            rung_contender(loaded.model, work.kind, rung, settings.backend)
            for rung in settings.rungs
        ]
        found, absent = _peers(settings, loaded, work, inputs[0], Path(folder), advance)
        contenders += found
        recording = interleave(contenders, inputs, 0, settings.threads, peak, advance)
        parity = _parity(loaded, work, contenders, recording, inputs[:JUDGED], advance)
        rows = [_row(one, recording, parity, settings.backend) for one in contenders]
        peak_flops = Spread.of(recording.stream) if recording.stream else None
        flops = work_flops(loaded.model, work)
        _relate(rows, recording, work, flops, peak_flops)
        if settings.memory:
            _add_memory(rows, contenders, settings, loaded, inputs[0], work, Path(folder))
    if peers.COMPILE in settings.peers:
        torch.compiler.reset()
    return WorkItem(
        loaded.name, loaded.dtype, loaded.source, work, flops, peak_flops, rows, absent
    )


def _peers(
    settings: WorkSettings,
    loaded: LoadedModel,
    work: Work,
    example: Inputs,
    folder: Path,
    advance: Callable[[str], None],
) -> tuple[list[Contender], dict[str, str]]:
    """The peers that are ready, and why the others are not."""
    found, absent = [], {}
    for peer in settings.peers:
        advance(f"making {peer}")
        reason = peers.absent(peer, loaded.dtype, settings.matmul_precision)
        if reason is None:
            place = folder / peer
            place.mkdir()
            precision = peers.precision_of(peer, loaded.dtype, settings.matmul_precision)
            try:
                made = peer_contender(
                    peer, loaded.model, work.kind, example, precision, settings.threads, place
                )
                found.append(made)
            except InputError as error:
                reason = str(error)
        if reason is not None:
            absent[peer] = reason
    return found, absent


def _parity(
    loaded: LoadedModel,
    work: Work,
    contenders: Sequence[Contender],
    recording: Recording,
    inputs: Sequence[Inputs],
    advance: Callable[[str], None],
) -> dict[str, Parity]:
    """Parity of every contender that ran, stock's first, as its yardstick."""
    advance("reference")
    wide = torch.float64 if loaded.dtype == "fp32" else torch.float32
    asked = torch.get_float32_matmul_precision() if loaded.dtype == "fp32" else "highest"
    with matmul_precision("highest"):
        expected = list(_outputs(raised(loaded.model), work, inputs, wide))
    norm = float(torch.stack([part.norm() for part in expected]).norm()) or 1.0

    def errors(found: Iterable[torch.Tensor]) -> tuple[float, float]:
        # one at a time: a peer may give the same memory again
        gaps = [one.to(wide) - want for one, want in zip(found, expected)]
        largest = torch.stack([gap.abs().max() for gap in gaps]).max()
        return float(largest), float(torch.stack([gap.norm() for gap in gaps]).norm()) / norm

    stock = None
    if asked == "medium":
        narrow = copy.deepcopy(loaded.model).to(torch.bfloat16)
        stock = errors(_outputs(narrow, work, inputs, torch.bfloat16))[0]
    granted = GRANTED_BY_HIGH if asked == "high" else 0.0
    parity: dict[str, Parity] = {}
    for contender in contenders:
        advance(f"parity of {contender.name}")
        if contender.name in recording.failures:
            continue
        error, distance = errors(judged(work, contender.call(one)) for one in inputs)
        stock = error if stock is None else stock
        parity[contender.name] = Parity(error, stock, distance, granted=granted)
    return parity


def _outputs(
    model: nn.Module, work: Work, inputs: Sequence[Inputs], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """What `model` makes of the inputs, in `dtype`."""
    return (judged(work, run_model(model, work.kind, _widened(one, dtype))) for one in inputs)


def _widened(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _row(
    contender: Contender, recording: Recording, parity: dict[str, Parity], backend: str
) -> WorkRow:
    """A row with its verdict, times not yet in it."""
    row = WorkRow(contender.name, contender.precision, recording.failures.get(contender.name))
    row.parity, row.calls = parity.get(row.name), contender.counters()
    if row.failure:
        return row
    if row.name == "none" and not any(row.calls["calls"].values()):
        row.failure = "the wrapper was never called"
    elif row.calls and row.name != "none" and not row.calls["fused"]:
        refused = ", ".join(f"{why} x {count}" for why, count in row.calls["refused"].items())
        row.failure = f"nothing was fused on back end {backend} ({refused or 'no reason counted'})"
    elif row.name != STOCK and not row.parity.passed:
        row.failure = (
            f"error {row.parity.error:.3g} is {row.parity.ratio:.3g} times stock's own "
            f"{row.parity.stock_error:.3g}, limit {row.parity.limit:g}"
        )
    return row


def _relate(
    rows: Sequence[WorkRow], recording: Recording, work: Work, flops: int, peak: Spread | None
) -> None:
    """Fills the times, and their relation to stock and to the measured peak."""
    stock = Spread.of([sample.step for sample in recording.samples[STOCK]]).median
    for row in rows:
        if row.name in recording.failures or (row.failure and not row.peer):
            continue
        seconds = Spread.of([sample.step for sample in recording.samples[row.name]])
        row.ms, row.speedup = seconds.scaled(1e3), stock / seconds.median
        row.per_second = work.items / seconds.median
        row.peak_share = flops / seconds.median / peak.median if peak else None


def _add_memory(
    rows: Sequence[WorkRow],
    contenders: Sequence[Contender],
    settings: WorkSettings,
    loaded: LoadedModel,
    inputs: Inputs,
    work: Work,
    folder: Path,
) -> None:
    """Peak memory of each row that has a time, in a process of its own."""
    save_file(
        {name: value.contiguous() for name, value in inputs.items()}, folder / "inputs.safetensors"
    )
    for row, contender in zip(rows, contenders):
        if row.ms is None:
            continue
        row.memory = fresh_process(
            f"{__package__}.work_memory",
            {
                "contender": row.name,
                "model": loaded.name,
                "dtype": loaded.dtype,
                "kind": work.kind,
                "backend": settings.backend,
                "precision": row.precision,
                "matmul_precision": settings.matmul_precision,
                "threads": settings.threads,
                "seed": settings.seed,
                "file": contender.file and str(contender.file),
                "inputs": str(folder / "inputs.safetensors"),
            },
            f"{row.label}",
        )
