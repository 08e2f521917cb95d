"""The call structs of one call, filled from tensors and reused from call to call."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from . import native
from .rope import RopeRows
from .sampling import Sampler


class Frame:
    """hff_call, hff_model_io and hff_block_io of one call, and references to them.

    Setters store addresses only: who calls keeps the tensors alive until the native call returns.
    """

    def __init__(self):
        self.call, self.io = native.sized(native.Call), native.sized(native.ModelIo)
        self.block_io = native.sized(native.BlockIo)
        call = self.call
        self.positions, self.mask, self.starts = call.positions, call.mask, call.starts
        self.cos, self.sin, self.workspace = call.cos, call.sin, call.workspace
        self.ids, self.x = self.io.ids, self.io.x
        self.logits, self.hidden, self.next = self.io.logits, self.io.hidden, self.io.next
        self.sampling = native.sized(native.Sampling)
        self.call_ref, self.io_ref = ctypes.byref(self.call), ctypes.byref(self.io)
        self.block_io_ref = ctypes.byref(self.block_io)
        self.rows: Any = None  # the RopeRows whose addresses are set

    def set_rows(self, rows: RopeRows) -> None:
        """The table of cos and sin."""
        if self.rows is rows:
            return
        self.rows, self.call.rope_rows = rows, rows.cos.shape[0]
        self.cos.data, self.cos.bytes = rows.cos.data_ptr(), rows.cos.nbytes
        self.sin.data, self.sin.bytes = rows.sin.data_ptr(), rows.sin.nbytes

    def set_positions(self, positions: torch.Tensor | None) -> None:
        """Positions (B|1, q) of int64, or none."""
        if positions is None:
            self.positions.data, self.positions.bytes = None, 0
            return
        (batch_stride, query_stride), (rows, queries) = positions.stride(), positions.shape
        self.call.position_batch_stride = batch_stride if rows > 1 else 0
        self.call.position_query_stride = query_stride
        self.positions.data = positions.data_ptr()
        self.positions.bytes = 8 * ((rows - 1) * batch_stride + (queries - 1) * query_stride + 1)

    def set_starts(self, starts: torch.Tensor | None) -> None:
        """Where sequences of different lengths start, (B + 1) of int64, contiguous, or none."""
        there = starts is not None
        self.starts.data = starts.data_ptr() if there else None
        self.starts.bytes = starts.nbytes if there else 0

    def set_ids(self, ids: torch.Tensor) -> None:
        """Token ids (B, q) of int64, in place of x."""
        (batch, queries), strides = ids.shape, ids.stride()
        self.io.id_batch_stride, self.io.id_query_stride = strides
        self.ids.data = ids.data_ptr()
        self.ids.bytes = 8 * ((batch - 1) * strides[0] + (queries - 1) * strides[1] + 1)

    def set_x(self, x: torch.Tensor) -> None:
        """Hidden states (rows, hidden), contiguous, in place of ids."""
        self.ids.data = None
        self.x.data, self.x.bytes = x.data_ptr(), x.nbytes

    def set_model_out(
        self,
        logits: torch.Tensor | None,
        hidden: torch.Tensor | None,
        tokens: torch.Tensor | None = None,
    ) -> None:
        """Where a model writes: logits, hidden states or both, and (B, steps) tokens of int64."""
        buffers = (self.logits, logits), (self.hidden, hidden), (self.next, tokens)
        for buffer, tensor in buffers:
            there = tensor is not None
            buffer.data, buffer.bytes = (tensor.data_ptr(), tensor.nbytes) if there else (None, 0)
        self.io.steps, self.io.sampling = tokens.shape[1] if tokens is not None else 0, None

    def set_sampling(self, sampler: Sampler, uniforms: torch.Tensor) -> None:
        """How the tokens of the next call are drawn: (B, steps) uniforms of fp64, contiguous."""
        sampling = self.sampling
        sampling.uniforms.data, sampling.uniforms.bytes = uniforms.data_ptr(), uniforms.nbytes
        sampling.temperature, sampling.top_p = sampler.temperature, sampler.top_p
        sampling.top_k = min(sampler.top_k or 0, (1 << 63) - 1)  # ctypes would take it modulo 2^64
        self.io.sampling = ctypes.addressof(sampling)

    def set_block_out(
        self, stage: str, x: torch.Tensor, out: torch.Tensor, up: torch.Tensor | None
    ) -> None:
        """What a layer reads, and where it writes up to `stage`; all contiguous."""
        io = self.block_io
        io.stage, io.x = native.STAGES[stage], native.Buffer(x.data_ptr(), x.nbytes)
        target = io.out if stage == "full" else io.attention_out
        target.data, target.bytes = out.data_ptr(), out.nbytes
        if up is not None:
            io.up_out.data, io.up_out.bytes = up.data_ptr(), up.nbytes


class Frames(threading.local):
    """The frames of one thread: that of the call under way, and those that wait for another."""

    def __init__(self):
        self.current, self.idle = Frame(), [Frame()]


def framed(method: Callable) -> Callable:
    """A method of a back end with a frame of its own as `self._frames.current`: a signal handler or
    a finaliser that runs a model in the midst of another's call leaves that call's structs alone.
    """

    @functools.wraps(method)
    def run(self, *arguments, **options):
        frames = self._frames
        before = frames.current
        frames.current = frame = frames.idle.pop() if frames.idle else Frame()
        try:
            return method(self, *arguments, **options)
        finally:
            frames.current = before
            frames.idle.append(frame)

    return run
