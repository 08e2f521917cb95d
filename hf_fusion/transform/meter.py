"""What running a callable costs: kernels, memory of activations, bytes written, time.

Kernels and bytes written come from the dispatcher: an operator counts where it allocates a result
or writes into an operand; views and bare allocations do not. Peak memory comes from the allocator's
own events, which see temporaries inside operators, and from native calls, which say what they took;
inputs and weights are not in it. Work that the dispatcher cannot see, a native call or a compiled
region, announces itself by `opaque`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .. import scratch

_BARE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_active = threading.local()


@dataclass
class Reading:
    """One measurement. seconds: quartiles of the interleaved rounds, None where not timed."""

    kernels: int
    peak_bytes: int
    written_bytes: int
    operators: dict[str, int] = field(default_factory=dict)
    seconds: tuple[float, float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The reading in numbers."""
        return asdict(self)


class _Dispatched(TorchDispatchMode):
    """Counts operators that allocate or write."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.written = 0, 0
        self.operators: dict[str, int] = {}

    def count(self, name: str, kernels: int, written: int) -> None:
        self.kernels += kernels
        self.written += written
        self.operators[name] = self.operators.get(name, 0) + kernels

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[-1]
        if name in _BARE:
            return out
        before = {
            leaf.untyped_storage().data_ptr()
            for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }  # fmt: skip
        results = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        made = [t for t in results if t.untyped_storage().data_ptr() not in before]
        if function._schema.is_mutable:
            self.count(name, 1, sum(t.nbytes for t in results))
        elif made:
            self.count(name, 1, sum(t.nbytes for t in made))
        return out


def counting() -> bool:
    """Whether `kernels` counts what this thread runs, by a mode of its own."""
    return getattr(_active, "counter", None) is not None


@contextlib.contextmanager
def opaque(name: str, kernels: int) -> Iterator[Callable[[Any], Any]]:
    """Around work that counts as `kernels`; pass its result through what this yields."""
    counter = getattr(_active, "counter", None)
    if counter is None:
        yield lambda result: result
        return

    def written(result: Any) -> Any:
        leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        counter.count(name, kernels, sum(leaf.nbytes for leaf in leaves))
        return result

    with _disable_current_modes():
        yield written


@torch.no_grad()
def kernels(call: Callable[[], Any]) -> tuple[int, int, dict[str, int]]:
    """(kernels, bytes written, kernels by operator) of one call."""
    counter = _Dispatched()
    _active.counter = counter
    try:
        with counter:
            call()
    finally:
        _active.counter = None
    return counter.kernels, counter.written, counter.operators


@torch.no_grad()
def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory that one call holds at once above what it began with, results included."""
    with scratch.as_tensors(), torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = call()
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@torch.no_grad()
def seconds(
    calls: dict[str, Callable[[], Any]], rounds: int = 7
) -> dict[str, tuple[float, float, float]]:
    """Quartiles of each call's time over interleaved rounds, each begun by another call, after one
    call to warm up.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    names = list(calls)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            begin = time.perf_counter()
            calls[name]()
            taken[name].append(time.perf_counter() - begin)
    return {name: tuple(_quartiles(times)) for name, times in taken.items()}


def _quartiles(times: list[float]) -> list[float]:
    if len(times) == 1:
        return times * 3
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return torch.quantile(torch.tensor(times, dtype=torch.float64), at).tolist()


def read(call: Callable[[], Any]) -> Reading:
    """Everything but time, of one call after one to warm up."""
    with torch.no_grad():
        call()
    count, written, operators = kernels(call)
    return Reading(count, peak_bytes(call), written, operators)
