"""The CPU back end: a block spec, its tensors and a cache become C structs; one native call runs a
layer or a whole model.

Any number of rows (batch times queries) goes through one native call: `block` for a layer, `decode`
for everything from embedding to logits, `steps` for several tokens, `encode` for an encoder's
layers. Weights are read in place. Cache lengths move last, all together.
"""

from __future__ import annotations

from typing import Any

import torch

from . import native
from .attend import share_threads
from .frame import Frame, Frames, framed
from .packing import packed_size, precision_of, team_width
from .report import FusionError, Reason
from .rope import rope_of_call
from .sampling import Sampler
from .spec import BlockSpec, BlockTensors, tensor_shapes
from .structs import DTYPES, NativeBlock, NativeModel, caches_of, set_mask


def _packs(spec: BlockSpec, packed: bool | None) -> bool:
    return packed if packed is not None else not spec.attention.causal and native.isa() == "amx"


class CpuBackend:
    """The calls of a back end through the native library; arguments as in
    reference.ReferenceBackend.
    """

    name = "cpu"
    asynchronous = False

    def __init__(self):
        self._library = native.load()
        share_threads()
        self._frames = Frames()

    @property
    def _frame(self) -> Frame:
        return self._frames.current

    @property
    def isa(self) -> str:
        """Name of the instruction set in use."""
        return native.isa()

    def check_device(self, device: torch.device) -> None:
        """Raises FusionError unless weights on `device` can be read."""
        if device.type != "cpu":
            raise FusionError(Reason.DEVICE, f"the weights are on {device}, expected cpu")

    def check_call(self, batch: int, queries: int, cache: Any) -> None:
        """Any number of rows runs, with a cache or without."""

    def bind_block(
        self, spec: BlockSpec, tensors: BlockTensors, packed: bool | None = False
    ) -> NativeBlock:
        """Structs over the tensors; FusionError where dtype, shape or strides do not fit.

        `packed`: whether matrix kernels read packed copies of the weights. None: an encoder's do on
        AMX, whose products are faster than packing as they go; elsewhere packing as they go costs a
        few per cent (BENCHMARKS.md).
        """
        self.check_device(tensors.qkv_weight.device)
        return NativeBlock(spec, tensors, _packs(spec, packed))

    def packed_bytes(self, spec: BlockSpec, dtype: torch.dtype, packed: bool | None) -> int:
        """Bytes of the copies that `bind_block` would make."""
        if not _packs(spec, packed) or dtype not in DTYPES:
            return 0
        matrices = (shape for shape in tensor_shapes(spec) if shape and len(shape) == 2)
        return sum(packed_size(DTYPES[dtype], *shape) for shape in matrices)

    def bind_model(
        self, blocks, embedding_weight, final_norm, head_weight=None, head_bias=None
    ) -> NativeModel:
        """Structs over a whole model; `final_norm` is (NormSpec, weight, bias)."""
        model = NativeModel(blocks, embedding_weight, final_norm, head_weight, head_bias)
        model.back_by_huge_pages()
        return model

    def _set_call(
        self, block: NativeBlock, batch, queries, past, mask, positions, rope, starts=None
    ) -> tuple:
        """Fills the hff_call. Returns what must stay alive until the native call returns: the rope
        table, the positions, and the rest.
        """
        frame = self._frame
        call = frame.call
        call.dtype, call.threads = DTYPES[block.dtype], team_width()
        call.batch, call.queries = batch, queries
        call.causal = block.spec.attention.causal
        call.precision = precision_of(call.dtype)
        frame.set_starts(starts)
        mask = set_mask(frame.mask, mask, block.dtype)
        if rope is None:
            return None, None, (mask, starts)
        table, positions = rope_of_call(rope, queries, past, positions)
        frame.set_rows(table.current)
        frame.set_positions(positions)
        return table, positions, mask

    def _run(self, function, alive, *arguments) -> None:
        """One native call; a position past the RoPE table grows the table and calls again."""
        status = function(*arguments)
        if status == native.OUT_OF_RANGE:
            table, positions, _ = alive
            if table is not None and table.cover(positions):
                self._frame.set_rows(table.current)
                status = function(*arguments)
        if status != native.OK:
            native.check(status)

    def _run_model(self, model: NativeModel, caches: Any, alive) -> None:
        forward, frame = self._library.hff_model_forward, self._frame
        self._run(forward, alive, frame.call_ref, model.reference, caches, frame.io_ref)

    @framed
    def decode(self, model: NativeModel, ids, embeds, slots, mask, positions, rope, keep=0):
        """(hidden (B, q, hidden), None) after the final norm or, with a head, (None, logits (B,
        keep, vocab)).
        """
        batch, queries = ids.shape if ids is not None else embeds.shape[:2]
        frame = self._frame
        past = slots[0].length if slots[0] is not None else 0
        caches = caches_of(slots, batch, queries, model.blocks)
        alive = self._set_call(model.blocks[0], batch, queries, past, mask, positions, rope)
        if ids is not None:
            frame.set_ids(ids)
        else:
            embeds = embeds.contiguous()
            frame.set_x(embeds)
        hidden = logits = None
        if model.head_weight is not None:
            frame.io.keep = keep = min(keep, queries) or queries
            logits = torch.empty((batch, keep, model.head_rows), dtype=model.dtype)
        else:
            hidden = torch.empty((batch, queries, model.struct.hidden), dtype=model.dtype)
        frame.set_model_out(logits, hidden)
        self._run_model(model, caches, alive)
        return hidden, logits

    @framed
    def steps(
        self,
        model: NativeModel,
        ids,
        slots,
        mask,
        positions,
        rope,
        steps: int,
        sampler: Sampler,
        uniforms=None,
    ) -> torch.Tensor:
        """Tokens (B, steps) that follow ids (B, 1), each as `sampler` takes it; for a model with a
        head.

        As `steps` calls of `decode`: a step reads the token of the one before, at positions one
        further. The mask covers the keys of all steps. `uniforms`: (B, steps) fp64, contiguous,
        where tokens are drawn.
        """
        batch, frame = ids.shape[0], self._frame
        caches = caches_of(slots, batch, 1, model.blocks)
        alive = table, first, _ = self._set_call(
            model.blocks[0], batch, 1, slots[0].length, mask, positions, rope
        )
        frame.set_ids(ids)
        frame.io.keep = 1
        logits = torch.empty((batch, 1, model.head_rows), dtype=model.dtype)
        tokens = torch.empty((batch, steps), dtype=torch.int64)
        frame.set_model_out(logits, None, tokens)
        if sampler.do_sample:
            frame.set_sampling(sampler, uniforms)
        last = table, None if first is None else first + (steps - 1), None
        self._run_model(model, caches, last)
        del alive
        return tokens

    def encode(
        self, model: NativeModel, x: torch.Tensor, mask: torch.Tensor | None, owned=False
    ) -> torch.Tensor:
        """Hidden states (B, S, hidden) of x (B, S, hidden) after all layers and the final norm, if
        there is one.

        mask: None, (B, S) nonzero for tokens, or (B|1, 1, S|1, S) as `block` takes it. What a
        (B, S) mask calls padding is left out of the computation, and zero in the result. `owned`:
        the result may take the place of x.
        """
        if mask is None or mask.dim() == 4 or bool((mask != 0).all()):
            mask = mask if mask is not None and mask.dim() == 4 else None
            x, given = x.contiguous(), x
            out = x if owned or x is not given else torch.empty_like(x)
            return self._encode_rows(model, x, out, x.shape[0], x.shape[1], mask)
        tokens = mask != 0
        rows = tokens.flatten().nonzero().squeeze(1)
        if rows.numel() == 0:
            return torch.zeros_like(x, memory_format=torch.contiguous_format)
        lengths = tokens.sum(1)
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=starts[1:])
        hidden = x.shape[2]
        packed = x.reshape(-1, hidden).index_select(0, rows)
        longest = int(lengths.max())
        packed = self._encode_rows(model, packed, packed, x.shape[0], longest, None, starts)
        out = torch.zeros_like(x, memory_format=torch.contiguous_format)
        out.view(-1, hidden).index_copy_(0, rows, packed)
        return out

    @framed
    def _encode_rows(
        self, model: NativeModel, x, out, batch, queries, mask, starts=None
    ) -> torch.Tensor:
        """`out`, which may be x, filled with the hidden states of the rows of x."""
        frame = self._frame
        alive = self._set_call(model.blocks[0], batch, queries, 0, mask, None, None, starts)
        frame.set_x(x)
        frame.set_model_out(None, out)
        self._run_model(model, None, alive)
        return out

    @framed
    def block(self, block: NativeBlock, stage: str, x, slot, mask, positions, rope):
        """One layer up to `stage`, as ReferenceBackend.block."""
        batch, queries, hidden = x.shape
        past = slot.length if slot is not None else 0
        caches = caches_of([slot], batch, queries, [block]) if block.spec.attention.causal else None
        alive = self._set_call(block, batch, queries, past, mask, positions, rope)
        x, frame = x.contiguous(), self._frame
        out, up = torch.empty((batch, queries, hidden), dtype=block.dtype), None
        if stage == "attention+up":
            up = torch.empty((batch, queries, block.spec.mlp.width), dtype=block.dtype)
        frame.set_block_out(stage, x, out, up)
        references = (block.reference, caches, frame.block_io_ref)
        self._run(self._library.hff_block_forward, alive, frame.call_ref, *references)
        return out if up is None else (out, up)
