"""The cpu back end: a block spec, its tensors and a cache become C structs; one native call runs a layer or a token.

Any number of rows (batch times queries) goes through one native call: `block` for a layer, `decode` for everything
from embedding to logits. Weights are read in place. Cache lengths move last, all together.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import torch

from . import native
from .packing import packed_size
from .rope import RopeRows, RopeTable, rope_of_call
from .spec import BlockSpec, BlockTensors, tensor_shapes
from .structs import DTYPES, NativeBlock, NativeModel, buffer, caches_of, set_mask

__all__ = ["CpuBackend", "RopeTable"]


class _Frame(threading.local):
    """The call structs of one thread, reused from call to call."""

    def __init__(self):
        self.call, self.io = native.sized(native.Call), native.sized(native.ModelIo)
        self.block_io, self.attention_io = native.sized(native.BlockIo), native.sized(native.AttentionIo)
        self.positions, self.mask, self.starts = self.call.positions, self.call.mask, self.call.starts
        self.cos, self.sin = self.call.cos, self.call.sin
        self.ids, self.x = self.io.ids, self.io.x
        self.logits, self.hidden = self.io.logits, self.io.hidden
        self.call_ref, self.io_ref = ctypes.byref(self.call), ctypes.byref(self.io)
        self.rows: Any = None  # the RopeRows whose addresses are set


def _packs(spec: BlockSpec, packed: bool | None) -> bool:
    return packed if packed is not None else not spec.attention.causal and native.isa() == "amx"


class CpuBackend:
    """The calls of a back end through the native library; arguments as in reference.ReferenceBackend."""

    name = "cpu"

    def __init__(self):
        self._library = native.load()
        self.threads_of = native.use_openmp(Path(torch.__file__).parent / "lib")
        self._frame = _Frame()

    @property
    def isa(self) -> str:
        """Name of the instruction set in use."""
        return native.isa()

    def bind_block(self, spec: BlockSpec, tensors: BlockTensors, packed: bool | None = False) -> NativeBlock:
        """Structs over the tensors; FusionError where dtype, shape or strides do not fit.

        `packed`: whether matrix kernels read packed copies of the weights. None: for an encoder on AMX, whose products
        are faster than packing as they go; elsewhere that costs 8 % (BENCHMARKS.md).
        """
        return NativeBlock(spec, tensors, _packs(spec, packed))

    def packed_bytes(self, spec: BlockSpec, dtype: torch.dtype, packed: bool | None) -> int:
        """Bytes of the copies that `bind_block` would make."""
        if not _packs(spec, packed) or dtype not in DTYPES:
            return 0
        return sum(
            packed_size(DTYPES[dtype], *shape) for shape in tensor_shapes(spec) if shape and len(shape) == 2
        )

    def bind_model(self, blocks, embedding_weight, final_norm, head_weight=None, head_bias=None) -> NativeModel:
        """Structs over a whole model; `final_norm` is (NormSpec, weight, bias)."""
        return NativeModel(blocks, embedding_weight, final_norm, head_weight, head_bias)

    def _set_call(self, block: NativeBlock, batch, queries, past, mask, positions, rope, starts=None):
        """Fills the thread's hff_call; returns what must stay alive until the native call returns."""
        frame = self._frame
        call = frame.call
        call.dtype, call.threads = DTYPES[block.dtype], torch.get_num_threads()
        call.batch, call.queries = batch, queries
        call.causal = block.spec.attention.causal
        call.precision = native.PRECISIONS[torch.get_float32_matmul_precision()]
        frame.starts.data, frame.starts.bytes = (None, 0) if starts is None else (starts.data_ptr(), starts.nbytes)
        mask = set_mask(frame.mask, mask, block.dtype)
        if rope is None:
            return None, None, (mask, starts)
        table, positions = rope_of_call(rope, batch, queries, past, positions)
        self._set_rows(table.current)
        (batch_stride, query_stride), rows = positions.stride(), positions.shape[0]
        call.position_batch_stride = batch_stride if rows > 1 else 0
        call.position_query_stride = query_stride
        frame.positions.data = positions.data_ptr()
        frame.positions.bytes = 8 * ((rows - 1) * batch_stride + (queries - 1) * query_stride + 1)
        return table, positions, mask

    def _set_rows(self, rows: RopeRows) -> None:
        frame = self._frame
        if frame.rows is rows:
            return
        frame.rows, frame.call.rope_rows = rows, rows.cos.shape[0]
        frame.cos.data, frame.cos.bytes = rows.cos.data_ptr(), rows.cos.nbytes
        frame.sin.data, frame.sin.bytes = rows.sin.data_ptr(), rows.sin.nbytes

    def _run(self, function, alive, *arguments) -> None:
        """One native call; a position past the RoPE table grows the table and calls again."""
        status = function(*arguments)
        if status == native.OUT_OF_RANGE:
            table, positions, _ = alive
            if table is not None and table.cover(positions):
                self._set_rows(table.current)
                status = function(*arguments)
        if status != native.OK:
            native.check(status)

    def decode(self, model: NativeModel, ids, embeds, slots, mask, positions, rope, keep=0):
        """(hidden (B, q, hidden), None) after the final norm or, with a head, (None, logits (B, keep, vocab))."""
        batch, queries = ids.shape if ids is not None else embeds.shape[:2]
        frame = self._frame
        past = slots[0].length if slots[0] is not None else 0
        caches = caches_of(slots, batch, queries, model.blocks)
        alive = self._set_call(model.blocks[0], batch, queries, past, mask, positions, rope)
        io, dtype = frame.io, model.dtype
        if ids is not None:
            (io.id_batch_stride, io.id_query_stride) = strides = ids.stride()
            frame.ids.data = ids.data_ptr()
            frame.ids.bytes = 8 * ((batch - 1) * strides[0] + (queries - 1) * strides[1] + 1)
        else:
            embeds = embeds.contiguous()
            frame.ids.data = None
            frame.x.data, frame.x.bytes = embeds.data_ptr(), embeds.numel() * embeds.element_size()
        hidden = logits = None
        if model.head_weight is not None:
            io.keep = keep = min(keep, queries) or queries
            logits = torch.empty((batch, keep, model.head_rows), dtype=dtype)
            frame.logits.data, frame.logits.bytes = logits.data_ptr(), logits.nbytes
            frame.hidden.data = None
        else:
            hidden = torch.empty((batch, queries, model.struct.hidden), dtype=dtype)
            frame.hidden.data, frame.hidden.bytes = hidden.data_ptr(), hidden.nbytes
            frame.logits.data = None
        self._run(
            self._library.hff_model_forward, alive, frame.call_ref, model.reference, caches, frame.io_ref
        )
        return hidden, logits

    def encode(self, model: NativeModel, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Hidden states (B, S, hidden) of x (B, S, hidden) after all layers and the final norm, if there is one.

        mask: None, (B, S) nonzero for tokens, or (B|1, 1, S, S) as `block` takes it. What a (B, S) mask calls padding
        is left out of the computation, and zero in the result.
        """
        if mask is None or mask.dim() == 4 or bool((mask != 0).all()):
            mask = mask if mask is not None and mask.dim() == 4 else None
            return self._encode_rows(model, x.contiguous(), x.shape[0], x.shape[1], mask)
        tokens = mask != 0
        rows = tokens.flatten().nonzero().squeeze(1)
        out = torch.zeros_like(x, memory_format=torch.contiguous_format)
        if rows.numel() == 0:
            return out
        lengths = tokens.sum(1)
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=starts[1:])
        hidden = x.shape[2]
        packed = x.reshape(-1, hidden).index_select(0, rows)
        packed = self._encode_rows(model, packed, x.shape[0], int(lengths.max()), None, starts)
        out.view(-1, hidden).index_copy_(0, rows, packed)
        return out

    def _encode_rows(self, model: NativeModel, x, batch, queries, mask, starts=None) -> torch.Tensor:
        frame = self._frame
        alive = self._set_call(model.blocks[0], batch, queries, 0, mask, None, None, starts)
        out = torch.empty_like(x)
        frame.ids.data = frame.logits.data = None
        frame.x.data, frame.x.bytes = x.data_ptr(), x.nbytes
        frame.hidden.data, frame.hidden.bytes = out.data_ptr(), out.nbytes
        self._run(
            self._library.hff_model_forward, alive, frame.call_ref, model.reference, None, frame.io_ref
        )
        return out

    def block(self, block: NativeBlock, stage: str, x, slot, mask, positions, rope):
        """One layer up to `stage`, as ReferenceBackend.block."""
        batch, queries, hidden = x.shape
        past = slot.length if slot is not None else 0
        caches = caches_of([slot], batch, queries, [block]) if block.spec.attention.causal else None
        alive = self._set_call(block, batch, queries, past, mask, positions, rope)
        x = x.contiguous()
        io = self._frame.block_io
        io.stage, io.x = native.STAGES[stage], buffer(x)
        out = torch.empty((batch, queries, hidden), dtype=block.dtype)
        result: Any = out
        if stage == "full":
            io.out = buffer(out)
        else:
            io.attention_out = buffer(out)
        if stage == "attention+up":
            up = torch.empty((batch, queries, block.spec.mlp.width), dtype=block.dtype)
            io.up_out, result = buffer(up), (out, up)
        call, io_ref = self._frame.call_ref, ctypes.byref(io)
        self._run(
            self._library.hff_block_forward, alive, call, ctypes.byref(block.struct), caches, io_ref
        )
        return result
