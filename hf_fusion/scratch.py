"""What native calls take beside tensors, where a profile of memory sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from . import native
from .step import CpuBackend


@contextlib.contextmanager
def as_tensors() -> Iterator[None]:
    """Within, every native call on the CPU is followed by a tensor as large as its scratch was.

    The call's operands and results are alive then, as they were during the call. For measuring: it
    holds for the whole process.
    """

    def shown(function):
        def called(*arguments):
            result = function(*arguments)
            torch.empty(native.load().hff_scratch_bytes(), dtype=torch.uint8)
            return result

        return called

    run, check = CpuBackend._run, native.check
    CpuBackend._run, native.check = shown(run), shown(check)
    try:
        yield
    finally:
        CpuBackend._run, native.check = run, check
