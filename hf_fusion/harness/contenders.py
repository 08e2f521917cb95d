"""Who is timed on one piece of work: stock, rungs and peers, each ready to run and to be judged."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hf_fusion

from . import peers
from .inputs import RUNGS, STOCK, unaccepted
from .timing import Sample, noted_calls
from .workloads import Inputs, run_model

PACKED = "packed"
WORK_RUNGS = (*RUNGS, PACKED)
DEFAULT_RUNGS = tuple(rung for rung in WORK_RUNGS if rung != "none")
PRECISIONS = ("highest", "high", "medium")
SETTLE_SECONDS = 0.005
"""Before each run: worker threads of the contender before may still spin for work."""
_NO_TOKENS = torch.empty(0, dtype=torch.int64)


@dataclass
class Contender:
    """A name, a call, and how many calls ran fused; `file` is what a peer's engine reads."""

    name: str
    call: Callable[[Inputs], torch.Tensor]
    counters: Callable[[], dict[str, Any]] = dict
    precision: str | None = None
    file: Path | None = field(default=None)

    def run(self, inputs: Inputs, new_tokens: int) -> Sample:
        """One timed call; there are no tokens."""
        time.sleep(SETTLE_SECONDS)
        begin = time.perf_counter()
        self.call(inputs)
        seconds = time.perf_counter() - begin
        return Sample(seconds, (seconds,), _NO_TOKENS)


def work_rungs(values: tuple[str, ...]) -> tuple[str, ...]:
    """The rungs in ladder order, stock first, without repeats."""
    for value in values:
        if value not in WORK_RUNGS:
            raise unaccepted("rung", value, WORK_RUNGS)
    return tuple(rung for rung in WORK_RUNGS if rung in {STOCK, *values})


def rung_contender(model: nn.Module, kind: str, rung: str, backend: str) -> Contender:
    """`rung` on a module tree of its own over the same parameters, so that what a patch prepares
    (packed copies among it) is prepared once.
    """
    own = sharing_copy(model)
    counters: Callable[[], dict[str, Any]] = dict
    if rung != STOCK:
        fusion = "full" if rung == PACKED else rung
        hf_fusion.patch(own, fusion=fusion, backend=backend, packed=rung == PACKED)
        counters = lambda: noted_calls(own)  # noqa: E731
    return Contender(rung, lambda inputs: run_model(own, kind, inputs), counters)


def peer_contender(
    peer: str, model: nn.Module, kind: str, example: Inputs, precision: str, threads: int,
    folder: Path,
) -> Contender:  # fmt: skip
    """A peer that has run `example` once; InputError where it cannot."""
    call, file = peers.build(
        peer, sharing_copy(model), kind, example, precision, threads, folder
    )
    return Contender(peer, call, precision=precision, file=file)


def sharing_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the modules around the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@contextmanager
def matmul_precision(name: str | None) -> Iterator[None]:
    """torch.set_float32_matmul_precision for the block, put back afterwards; None leaves it."""
    name = name or torch.get_float32_matmul_precision()
    if name not in PRECISIONS:
        raise unaccepted("matmul precision", name, PRECISIONS)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
