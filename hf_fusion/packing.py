"""Packed copies of weights: made once, counted in bytes, and checked before every use.

A copy is trusted while four things are what they were: the instruction set, the precision that
chose its panels, the version counters of the tensors, and a sample of the weights. A check samples
one cache line of every eighth row, other lines and rows each time. A write through `.data` leaves
the version counter as it was. It is noticed at once where it touches a whole matrix, within eight
calls where it touches whole rows, and anywhere within eight times as many calls as a row has cache
lines. `packed=False` has no copies and no such delay.
"""

from __future__ import annotations

import ctypes

import torch

from . import native

_LINE = 64
# names of torch.backends for what lies below fp32
_PRECISIONS = {"tf32": native.PRECISIONS["high"], "bf16": native.PRECISIONS["medium"]}


def team_width() -> int:
    """Threads of a native call: torch's, as many as one takes."""
    return min(torch.get_num_threads(), native.MAX_THREADS)


def precision_of(dtype: int) -> int:
    """What torch lets products of `dtype` be computed in; it says so of fp32 alone."""
    if dtype != native.F32:
        return 0
    try:
        return native.PRECISIONS[torch.get_float32_matmul_precision()]
    except RuntimeError:  # torch.backends has been set otherwise: mkldnn's is the CPU's
        return _PRECISIONS.get(torch.backends.mkldnn.matmul.fp32_precision, 0)


def _whole_lines(size: int) -> int:
    return -(-size // _LINE) * _LINE


def packed_size(dtype: int, rows: int, cols: int) -> int:
    """Bytes that the panels of a matrix take in a PackedWeights."""
    return _whole_lines(native.load().hff_packed_bytes(dtype, precision_of(dtype), rows, cols))


class PackedWeights:
    """The panels of some matrices in one buffer; their structs' `packed` fields point into it.

    Raises FusionError where a matrix cannot be packed.
    """

    def __init__(self, linears: list[native.Linear], weights: list[torch.Tensor], dtype: int):
        library = native.load()
        self._library, self._weights, self._dtype = library, weights, dtype
        self._isa, self._precision = native.isa(), precision_of(dtype)
        threads = team_width()
        sizes = [library.hff_packed_bytes(dtype, self._precision, n.rows, n.cols) for n in linears]
        self.bytes = sum(map(_whole_lines, sizes))
        self._buffer = torch.empty(self.bytes + _LINE, dtype=torch.uint8)
        at = _whole_lines(self._buffer.data_ptr())
        for linear, size in zip(linears, sizes, strict=True):
            linear.packed = native.Buffer(at, size)
            plain = native.Linear.from_buffer_copy(linear)
            plain.packed = native.Buffer()
            given = ctypes.byref(plain), dtype, self._precision, threads, linear.packed
            native.check(library.hff_pack(*given))
            at += _whole_lines(size)
        self._sampled = (native.Linear * len(linears))(*linears)
        self._versions = self._versions_now()
        lines = max(-(-w.shape[1] * w.element_size() // _LINE) for w in weights)
        self._samples = [self._sample(phase) for phase in range(native.SAMPLED_ROWS * lines)]
        self._phase, self._stale = 0, False

    def _versions_now(self) -> list[int]:
        return [-1 if weight.is_inference() else weight._version for weight in self._weights]

    def _sample(self, phase: int) -> int:
        return self._library.hff_fingerprint(self._sampled, len(self._sampled), self._dtype, phase)

    def fresh(self) -> bool:
        """Whether the panels are still what packing now would give, as far as one sample shows.
        Once stale, they stay stale.
        """
        # a model asks before its layers do, and the next sample need not show what the last one did
        self._stale = self._stale or not self._unchanged()
        return not self._stale

    def _unchanged(self) -> bool:
        if self._versions != self._versions_now() or self._precision != precision_of(self._dtype):
            return False
        phase = self._phase = (self._phase + 1) % len(self._samples)
        return self._isa == native.isa() and self._sample(phase) == self._samples[phase]
