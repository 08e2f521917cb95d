"""Attention by itself on torch tensors: the naive, tiled and flash kernels of the native library.

    out = softmax(scale query key^T + mask) value

Knows torch and the C ABI, nothing of models; `attention` puts it under transformers.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch

from . import native, streams
from .packing import team_width
from .report import FusionError, Reason
from .structs import DTYPES, extent_bytes

KERNELS = tuple(native.ATTENDS)
_MASKS = {torch.bool: native.MASK_BOOL, torch.int64: native.MASK_INT64}


class Plan(NamedTuple):
    """How a call runs: queries and keys of a block, 0 where the kernel has none; bytes that it
    takes beside its tensors.
    """

    block_queries: int
    block_keys: int
    extra_bytes: int


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    kernel: str = "flash",
    mask: torch.Tensor | None = None,
    causal: bool = False,
    window: int = 0,
    scale: float | None = None,
    blocks: tuple[int, int] = (0, 0),
) -> torch.Tensor:
    """Attention without gradients, (batch, queries, heads, head_dim), contiguous.

    query: (batch, heads, queries, head_dim); key, value: (batch, kv_heads, keys, head_dim), heads a
    multiple of kv_heads; float32, bfloat16 or float16, on the CPU or one CUDA device, any strides.
    mask: broadcastable to (batch, heads, queries, keys); bool and int64 say which keys are seen,
    the query's own dtype is added to the scaled score and hides a key at its lowest value or -inf.
    causal: the last query sees all keys, each before it one less; window: of those, the last so
    many (0: all). scale: None is head_dim ** -0.5. blocks: queries and keys of a block, 0 for the
    table's. A query that sees nothing gives zeros.
    Raises FusionError for what no kernel takes.
    """
    call, out, kept = _call(query, key, value, kernel, mask, causal, window, scale, blocks)
    with streams.on(query.device):
        if query.is_cuda:
            room = query.new_empty(_planned(call).workspace_bytes, dtype=torch.uint8)
            call.workspace = native.Buffer(room.data_ptr(), room.numel())
            kept.append(room)
        native.check(native.load().hff_attend(ctypes.byref(call)))
    del kept
    return out


def plan(query, key, value, **options) -> Plan:
    """How `attend` with these arguments would run."""
    options = {
        "kernel": "flash", "mask": None, "causal": False, "window": 0, "scale": None,
        "blocks": (0, 0), **options,
    }  # fmt: skip
    call, _, kept = _call(query, key, value, **options)
    found = _planned(call)
    del kept
    return Plan(
        found.block_queries, found.block_keys, found.scratch_bytes + found.workspace_bytes
    )


def _planned(call: native.AttendIo) -> native.AttendPlan:
    found = native.sized(native.AttendPlan)
    native.check(native.load().hff_plan_attend(ctypes.byref(call), ctypes.byref(found)))
    return found


def share_threads() -> None:
    """Native calls run on torch's OpenMP threads from now on, where it has any."""
    native.use_openmp(Path(torch.__file__).parent / "lib")


def check_operands(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raises FusionError unless the tensors are what `attend` takes."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
            raise FusionError(Reason.TENSOR_TYPE, f"{name} is a {type(tensor).__name__}")
        if tensor.device.type not in native.DEVICES or tensor.device != query.device:
            raise FusionError(
                Reason.DEVICE, f"{name} is on {tensor.device}, the query on {query.device}"
            )
        if tensor.dtype != query.dtype:
            raise FusionError(Reason.MIXED_DTYPE, f"{name} is {tensor.dtype}, query {query.dtype}")
        if tensor.ndim != 4 or tensor.layout is not torch.strided:
            raise FusionError(Reason.SHAPE, f"{name} has shape {tuple(tensor.shape)}, expected 4-D")
        if tensor.numel() == 0:
            raise FusionError(Reason.EMPTY_INPUT, f"{name} has shape {tuple(tensor.shape)}")
    if query.dtype not in DTYPES:
        raise FusionError(
            Reason.DTYPE, f"query is {query.dtype}, expected float32, bfloat16 or float16"
        )
    if key.shape != value.shape or key.shape[3] != query.shape[3] or (
        key.shape[0] != query.shape[0] or query.shape[1] % key.shape[1]
    ):
        raise FusionError(
            Reason.SHAPE,
            f"query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(value.shape)}",
        )
    if query.shape[3] > native.MAX_HEAD_DIM:
        raise FusionError(
            Reason.UNSUPPORTED,
            f"head size is {query.shape[3]}, expected at most {native.MAX_HEAD_DIM}",
        )


def _call(query, key, value, kernel, mask, causal, window, scale, blocks):
    """The struct, the output, and the tensors that the struct points into."""
    if kernel not in native.ATTENDS:
        raise FusionError(Reason.ARGUMENT, f"kernel is {kernel!r}, expected one of {KERNELS}")
    check_operands(query, key, value)
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    out = query.new_empty((batch, queries, heads, dim))
    call = native.sized(native.AttendIo)
    call.kernel, call.dtype = native.ATTENDS[kernel], DTYPES[query.dtype]
    call.threads, call.causal, call.window = team_width(), causal, window
    call.device, call.ordinal = native.DEVICES[query.device.type], query.device.index or 0
    call.stream = streams.current(query.device)
    call.batch, call.heads, call.kv_heads, call.head_dim = batch, heads, key.shape[1], dim
    call.queries, call.keys = queries, keys
    kept = [_dense(tensor) for tensor in (query, key, value)]
    for name, tensor in zip("qkv", kept, strict=True):
        setattr(call, name, _buffer(tensor))
        setattr(call, f"{name}_strides", native.Strides(*tensor.stride()[:3]))
    rows = out.transpose(1, 2)
    call.out, call.out_strides = _buffer(rows), native.Strides(*rows.stride()[:3])
    if mask is not None:
        kept.append(_give_mask(call, mask, query, (batch, heads, queries, keys)))
    call.scale = dim**-0.5 if scale is None else scale
    call.block_queries, call.block_keys = blocks
    return call, out, kept


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, its last dimension contiguous and its tokens apart."""
    apart = tensor.shape[2] == 1 or tensor.stride(2) > 0
    return tensor if apart and tensor.stride(3) == 1 else tensor.contiguous()


def _buffer(tensor: torch.Tensor) -> native.Buffer:
    return native.Buffer(tensor.data_ptr(), extent_bytes(tensor))


def _give_mask(call, mask, query, shape) -> torch.Tensor:
    if mask.device != query.device or mask.dtype not in (*_MASKS, query.dtype):
        raise FusionError(
            Reason.MASK,
            f"mask is {mask.dtype} on {mask.device}, expected bool, int64 or {query.dtype} on "
            f"{query.device}",
        )
    try:
        mask = mask.expand(shape)
    except RuntimeError:
        raise FusionError(
            Reason.MASK, f"mask has shape {tuple(mask.shape)}, expected one that expands to {shape}"
        ) from None
    batch, head, query, key = mask.stride()
    kind = _MASKS.get(mask.dtype, native.MASK_ADDITIVE)
    call.mask = native.Mask(_buffer(mask), batch, query, key, shape[3], kind)
    call.mask_head_stride = head
    return mask
