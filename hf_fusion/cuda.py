"""The CUDA back end: a decode step of a causal decoder, a layer or a whole model, queued on torch's
current stream.

Nothing here waits for the device or reads from it. Ids, positions and cache lengths are for its
kernels to read: a position past the table of rotary embeddings, a token past the vocabulary or a
step past the end of a cache gives NaN. Prompts, batches of more than MOST_BATCH, fp32 and encoders
are refused with a reason and run stock.

Inside torch.cuda.graph a step with a StaticCache is recorded as it is: a replay reads ids,
positions and the length of the cache anew and moves that length on. What it needs must be there
before: one call has bound the model and made the tables. A graph holds the addresses of weights and
tables; after a change of weights, patch or unpatch it must be recorded again.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from transformers.cache_utils import StaticCache

from . import native, streams
from .frame import Frame, Frames, framed
from .report import FusionError, Reason, renew_in_child
from .rope import RopeTable, rope_of_call
from .spec import BlockSpec, BlockTensors
from .structs import DTYPES, NativeBlock, NativeModel, device_caches_of, set_mask

MOST_BATCH = 4  # rows that one pass over the weights serves
_ALIGNMENT = 256


class Workspaces:
    """What the kernels of one bound model, or layer, keep between each other: a piece of memory for
    every stream, batch and plan.

    A graph that is being recorded gets a piece of its own, cleared at every replay. `lock` is held
    while a call is queued: the kernels of two calls that share a piece must not mix.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._pieces: dict[tuple, torch.Tensor] = {}
        renew_in_child(self, "lock", threading.Lock)

    def piece(self, size: int, *key: Any) -> torch.Tensor:
        """`size` bytes behind an aligned address, zero at first; the same for the same key."""
        if streams.capturing():
            return self._zeros(size)
        found = self._pieces.get(key)
        if found is None:
            found = self._pieces[key] = self._zeros(size)
        return found

    def _zeros(self, size: int) -> torch.Tensor:
        with torch.inference_mode(False):
            memory = torch.zeros(size + _ALIGNMENT, dtype=torch.uint8, device=self.device)
        return memory[-memory.data_ptr() % _ALIGNMENT :][:size]


def _model_of(block: NativeBlock) -> native.Model:
    """A layer as a model without embedding or head."""
    model = native.sized(native.Model)
    model.hidden, model.block_count = block.spec.hidden, 1
    model.blocks = ctypes.pointer(block.struct)
    return model


class CudaBackend:
    """The calls of a back end through the CUDA kernels; arguments as in reference.ReferenceBackend.

    `plan`: how a model runs a step, "chain" (three kernels a layer), "token" (one kernel), or
    "auto". Raises FusionError(Reason.BACKEND_ABSENT) where the build, the driver or the device is
    absent.
    """

    name = "cuda"
    asynchronous = True

    def __init__(self):
        self._library = native.load()
        try:
            self.device = native.describe_device("cuda")
        except FusionError as error:
            raise FusionError(Reason.BACKEND_ABSENT, error.message) from None
        self.emulated, self.plan = bool(self.device.host_memory), "auto"
        self._frames = Frames()

    @property
    def _frame(self) -> Frame:
        return self._frames.current

    @property
    def isa(self) -> str:
        """The architecture of the first device, and whether it is emulated on the host's memory."""
        return f"sm_{self.device.arch // 10}" + (" emulated" if self.emulated else "")

    def check_device(self, device: torch.device) -> None:
        """Raises FusionError unless kernels can run where the weights lie."""
        kind = "cpu" if self.emulated else "cuda"
        if device.type != kind:
            raise FusionError(Reason.DEVICE, f"the weights are on {device}, expected {kind}")
        native.describe_device("cuda", device.index or 0)

    def check_call(self, batch: int, queries: int, cache: Any) -> None:
        """Raises FusionError unless a step of this size on this cache can be queued now."""
        if queries != 1 or batch > MOST_BATCH:
            raise FusionError(
                Reason.ROWS,
                f"the call has {batch} rows of {queries} tokens, expected up to {MOST_BATCH} of "
                "one",
            )
        if cache is None:
            raise FusionError(Reason.CACHE_TYPE, "the call has no cache")
        if streams.capturing() and (
            type(cache) is not StaticCache or not all(c.is_initialized for c in cache.layers)
        ):
            raise FusionError(
                Reason.CAPTURING,
                f"the cache is a {type(cache).__name__}, expected an initialized StaticCache",
            )

    def bind_block(
        self, spec: BlockSpec, tensors: BlockTensors, packed: bool | None = False
    ) -> NativeBlock:
        """Structs over the tensors; FusionError where no kernel takes them. Nothing is packed."""
        weight = tensors.qkv_weight
        self.check_device(weight.device)
        if not spec.attention.causal:
            raise FusionError(
                Reason.UNSUPPORTED, "attention is not causal; CUDA kernels run decoders"
            )
        if weight.dtype == torch.float32:
            raise FusionError(
                Reason.DTYPE,
                f"weights are {weight.dtype}, CUDA kernels take torch.float16 and torch.bfloat16",
            )
        block = NativeBlock(spec, tensors)
        self._prepare(block, _model_of(block))
        return block

    def packed_bytes(self, spec: BlockSpec, dtype: torch.dtype, packed: bool | None) -> int:
        """Bytes of copies: none."""
        return 0

    def bind_model(
        self, blocks, embedding_weight, final_norm, head_weight=None, head_bias=None
    ) -> NativeModel:
        """Structs over a whole model; FusionError where no kernel takes it."""
        model = NativeModel(blocks, embedding_weight, final_norm, head_weight, head_bias)
        self._prepare(model, model.struct)
        return model

    @framed
    def _prepare(self, bound: NativeBlock | NativeModel, model: native.Model) -> None:
        bound.workspaces, bound.sizes, bound.sized_by = Workspaces(bound.device), {}, model
        self._set_shape(bound, 1)
        self._workspace_size(bound, 1)

    def _set_shape(self, bound: NativeBlock | NativeModel, batch: int) -> None:
        call = self._frame.call
        call.dtype, call.threads, call.causal = DTYPES[bound.dtype], 1, 1
        call.batch, call.queries = batch, 1
        call.device, call.ordinal = native.DEVICES["cuda"], bound.device.index or 0
        call.plan = native.PLANS[self.plan]

    def _workspace_size(self, bound: NativeBlock | NativeModel, batch: int) -> int:
        size = bound.sizes.get((batch, self.plan))
        if size is None:
            model = ctypes.byref(bound.sized_by)
            size = self._library.hff_workspace_bytes(self._frame.call_ref, model)
            if size == 0:
                raise FusionError(Reason.UNSUPPORTED, self._library.hff_last_error().decode())
            bound.sizes[batch, self.plan] = size
        return size

    def _set_call(self, bound, batch: int, slots: list, mask, positions, rope) -> Any:
        """Fills the hff_call but for stream and workspace; returns what must stay alive until it is
        queued.
        """
        frame = self._frame
        self._set_shape(bound, batch)
        mask = set_mask(frame.mask, mask, bound.dtype)
        if isinstance(rope, RopeTable):
            length = slots[0].length
            rope.cover_rows(slots[0].buffers[0].shape[2] if length is None else length + 1)
        else:
            rope, positions = rope_of_call(rope, 1, 0, positions)
        rows = rope.current
        frame.set_rows(rows)
        frame.set_positions(positions)  # none: the kernels count on from the cache
        return mask, positions, rows

    def _run(self, function: Any, bound, batch: int, slots: list, *references) -> None:
        """Queues one native call and counts the token that it will append."""
        frame, device = self._frame, bound.device
        size = self._workspace_size(bound, batch)
        with bound.workspaces.lock, streams.on(device):
            stream = streams.current(device)
            piece = bound.workspaces.piece(size, stream, batch, self.plan)
            frame.call.stream = stream
            frame.workspace.data, frame.workspace.bytes = piece.data_ptr(), size
            native.check(function(frame.call_ref, *references))
        for slot in slots:
            slot.ran(1)

    @framed
    def decode(self, model: NativeModel, ids, embeds, slots, mask, positions, rope, keep=0):
        """(hidden (B, 1, hidden), None) after the final norm or, with a head, (None, logits (B, 1,
        vocab)).
        """
        frame, batch = self._frame, (embeds if ids is None else ids).shape[0]
        caches = device_caches_of(slots)
        alive = self._set_call(model, batch, slots, mask, positions, rope)
        if ids is not None:
            frame.set_ids(ids)
        else:
            embeds = embeds.contiguous()
            frame.set_x(embeds)
        hidden, logits, like = None, None, {"dtype": model.dtype, "device": model.device}
        if model.head_weight is not None:
            frame.io.keep = 1
            logits = torch.empty((batch, 1, model.head_rows), **like)
        else:
            hidden = torch.empty((batch, 1, model.struct.hidden), **like)
        frame.set_model_out(logits, hidden)
        references = (model.reference, caches, frame.io_ref)
        self._run(self._library.hff_model_forward, model, batch, slots, *references)
        del alive
        return hidden, logits

    @framed
    def block(self, block: NativeBlock, stage: str, x, slot, mask, positions, rope):
        """One layer up to `stage`, as ReferenceBackend.block."""
        frame, (batch, _, hidden) = self._frame, x.shape
        caches = device_caches_of([slot])
        alive = self._set_call(block, batch, [slot], mask, positions, rope)
        x, like = x.contiguous(), {"dtype": block.dtype, "device": block.device}
        out, up = torch.empty((batch, 1, hidden), **like), None
        if stage == "attention+up":
            up = torch.empty((batch, 1, block.spec.mlp.width), **like)
        frame.set_block_out(stage, x, out, up)
        references = (block.reference, caches, frame.block_io_ref)
        self._run(self._library.hff_block_forward, block, batch, [slot], *references)
        del alive
        return out if up is None else (out, up)
