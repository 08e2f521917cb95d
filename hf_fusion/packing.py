"""Packed copies of weights: made once, counted in bytes, and noticed when what they copy has changed.

A copy is trusted while the instruction set, the precision that chose its panels, and the version counters of the
tensors are what they were, and while a sample of the weights is: every check reads one cache line of every eighth row,
others each time. A write that passes by the version counter (`.data`) is noticed at once where it touches a whole
matrix, within eight calls where it touches whole rows, and within eight times a row's cache lines wherever it is;
`packed=False` has no copies and no such delay.
"""

from __future__ import annotations

import ctypes

import torch

from . import native

_LINE = 64


def team_width() -> int:
    """Threads of a native call: torch's, as many as one takes."""
    return min(torch.get_num_threads(), native.MAX_THREADS)


def packed_size(dtype: int, rows: int, cols: int) -> int:
    """Bytes that the panels of a matrix take in a PackedWeights."""
    precision = native.PRECISIONS[torch.get_float32_matmul_precision()] if dtype == native.F32 else 0
    return -(-native.load().hff_packed_bytes(dtype, precision, rows, cols) // _LINE) * _LINE


class PackedWeights:
    """The panels of some matrices in one buffer; the `packed` field of their structs points into it.

    Raises FusionError where a matrix cannot be packed.
    """

    def __init__(self, linears: list[native.Linear], weights: list[torch.Tensor], dtype: int):
        library = native.load()
        self._library, self._weights, self._dtype = library, weights, dtype
        self._isa, self._precision = native.isa(), self._precision_now()
        threads = team_width()
        sizes = [library.hff_packed_bytes(dtype, self._precision, n.rows, n.cols) for n in linears]
        self.bytes = sum(-(-size // _LINE) * _LINE for size in sizes)
        self._buffer = torch.empty(self.bytes + _LINE, dtype=torch.uint8)
        at = -(-self._buffer.data_ptr() // _LINE) * _LINE
        for linear, size in zip(linears, sizes, strict=True):
            linear.packed = native.Buffer(at, size)
            plain = native.Linear.from_buffer_copy(linear)
            plain.packed = native.Buffer()
            native.check(
                library.hff_pack(ctypes.byref(plain), dtype, self._precision, threads, linear.packed)
            )
            at += -(-size // _LINE) * _LINE
        self._sampled = (native.Linear * len(linears))(*linears)
        self._versions = self._versions_now()
        lines = max(-(-w.shape[1] * w.element_size() // _LINE) for w in weights)
        self._samples = [self._sample(phase) for phase in range(native.SAMPLED_ROWS * lines)]
        self._phase, self._stale = 0, False

    def _precision_now(self) -> int:
        # it changes nothing but fp32 products
        return native.PRECISIONS[torch.get_float32_matmul_precision()] if self._dtype == native.F32 else 0

    def _versions_now(self) -> list[int]:
        return [-1 if weight.is_inference() else weight._version for weight in self._weights]

    def _sample(self, phase: int) -> int:
        return self._library.hff_fingerprint(self._sampled, len(self._sampled), self._dtype, phase)

    def fresh(self) -> bool:
        """Whether the panels are still what packing now would give, as far as one sample shows; once stale, for good."""
        # a model asks before its layers do, and the next sample need not show what the last one did
        self._stale = self._stale or not self._unchanged()
        return not self._stale

    def _unchanged(self) -> bool:
        if self._versions != self._versions_now() or self._precision != self._precision_now():
            return False
        phase = self._phase = (self._phase + 1) % len(self._samples)
        return self._isa == native.isa() and self._sample(phase) == self._samples[phase]
