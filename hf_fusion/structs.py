"""Torch tensors as the C structs of the native library: a layer, a model, the caches of a call, a
mask.

Nothing is copied: the structs point into the tensors, which the objects here keep alive.
"""

from __future__ import annotations

import ctypes
from operator import is_
from typing import Any

import torch

from . import native
from .packing import PackedWeights
from .report import FusionError, Reason
from .spec import BlockSpec, BlockTensors, NormSpec, tensor_shapes

DTYPES = {torch.float32: native.F32, torch.bfloat16: native.BF16, torch.float16: native.F16}
_HUGE_PAGE = 2 << 20


def buffer(tensor: torch.Tensor | None) -> native.Buffer:
    """Address and bytes of a contiguous tensor, an empty buffer for None; FusionError(LAYOUT) for
    another layout.
    """
    if tensor is None:
        return native.Buffer()
    if not tensor.is_contiguous():
        raise FusionError(
            Reason.LAYOUT, f"a tensor has strides {tensor.stride()}, expected contiguous ones"
        )
    return native.Buffer(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def extent_bytes(tensor: torch.Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last, whatever its strides."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def linear(weight: torch.Tensor | None, bias: torch.Tensor | None) -> native.Linear:
    """The struct of a matrix in torch.nn.Linear layout, an empty one for None."""
    if weight is None:
        return native.Linear()
    rows, cols = weight.shape
    return native.Linear(buffer(weight), buffer(bias), native.Buffer(), rows, cols, cols)


def _norm(spec: NormSpec, weight: torch.Tensor, bias: torch.Tensor | None) -> native.Norm:
    return native.Norm(buffer(weight), buffer(bias), spec.eps, native.NORMS[spec.kind])


def _check_tensors(
    names: tuple[str, ...], tensors: tuple, shapes: tuple, like: torch.Tensor
) -> None:
    dtype, device = like.dtype, like.device
    for name, tensor, shape in zip(names, tensors, shapes, strict=True):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise FusionError(
                Reason.SHAPE, f"{name} has shape {tuple(tensor.shape)}, expected {shape}"
            )
        if tensor.dtype != dtype:
            raise FusionError(Reason.MIXED_DTYPE, f"{name} is {tensor.dtype}, expected {dtype}")
        if tensor.device != device:
            raise FusionError(Reason.DEVICE, f"{name} is on {tensor.device}, expected {device}")


class NativeBlock:
    """A layer as the native library sees it. The structs point into the parameters, which are kept
    alive here.

    With `packed`, matrix kernels read copies of the matrices instead, `packed_bytes` of them.
    """

    def __init__(self, spec: BlockSpec, tensors: BlockTensors, packed: bool = False):
        self.spec, self.tensors = spec, tensors
        self.dtype, self.device = tensors.qkv_weight.dtype, tensors.qkv_weight.device
        if self.dtype not in DTYPES:
            raise FusionError(
                Reason.DTYPE, f"weights are {self.dtype}, expected float32, bfloat16 or float16"
            )
        _check_tensors(BlockTensors._fields, tensors, tensor_shapes(spec), tensors.qkv_weight)
        heads = spec.attention
        if heads.head_dim > native.MAX_HEAD_DIM:
            raise FusionError(
                Reason.UNSUPPORTED,
                f"head size is {heads.head_dim}, expected at most {native.MAX_HEAD_DIM}",
            )
        self.heads = native.Heads(
            heads.heads,
            heads.kv_heads,
            heads.head_dim,
            heads.rotary_dim,
            heads.scale,
            native.QKV_LAYOUTS[heads.qkv_layout],
        )
        self.struct = native.Block(
            self.heads,
            spec.hidden,
            spec.mlp.width,
            native.RESIDUALS[spec.residual],
            native.ACTIVATIONS[spec.mlp.activation],
            _norm(spec.attention_norm, tensors.attention_norm_weight, tensors.attention_norm_bias),
            _norm(spec.mlp_norm, tensors.mlp_norm_weight, tensors.mlp_norm_bias),
            linear(tensors.qkv_weight, tensors.qkv_bias),
            linear(tensors.k_weight, tensors.k_bias),
            linear(tensors.v_weight, tensors.v_bias),
            linear(tensors.o_weight, tensors.o_bias),
            linear(tensors.up_weight, tensors.up_bias),
            linear(tensors.down_weight, tensors.down_bias),
        )
        self.reference = ctypes.byref(self.struct)
        self.packing = self._pack() if packed else None
        self.packed_bytes = self.packing.bytes if packed else 0

    def _pack(self) -> PackedWeights:
        linears, weights = [], []
        for name in ("qkv", "k", "v", "o", "up", "down"):
            weight = getattr(self.tensors, f"{name}_weight")
            if weight is not None:
                linears.append(getattr(self.struct, name))
                weights.append(weight)
        return PackedWeights(linears, weights, DTYPES[self.dtype])

    def fresh(self) -> bool:
        """Whether the packed copies, if there are any, are still those of the weights."""
        return self.packing is None or self.packing.fresh()


class NativeModel:
    """Embedding, layers, final norm and, for logits, the head, as one struct. An encoder has its
    layers alone and, where `final_norm` is not None, a norm.
    """

    def __init__(self, blocks, embedding_weight, final_norm, head_weight, head_bias):
        spec, weight, bias = final_norm or (None, None, None)
        self.blocks, self.dtype, self.device = blocks, blocks[0].dtype, blocks[0].device
        self.embedding, self.final_norm = embedding_weight, final_norm
        self.head_weight, self.head_bias = head_weight, head_bias
        hidden = blocks[0].spec.hidden
        vocab = embedding_weight.shape[0] if embedding_weight is not None else 0
        outer = (embedding_weight, weight, bias, head_weight, head_bias)
        rows = head_weight.shape[0] if head_weight is not None else 0
        shapes = ((vocab, hidden), (hidden,), (hidden,), (rows, hidden), (rows,))
        names = ("embedding", "final norm weight", "final norm bias", "head weight", "head bias")
        _check_tensors(names, outer, shapes, blocks[0].tensors.qkv_weight)
        for block in blocks:
            if block.spec.hidden != hidden or block.dtype != self.dtype:
                raise FusionError(
                    Reason.MIXED_DTYPE if block.dtype != self.dtype else Reason.SHAPE,
                    f"a layer is {block.spec.hidden} wide in {block.dtype}, the model {hidden} in "
                    f"{self.dtype}",
                )
        self.array = (native.Block * len(blocks))(*(block.struct for block in blocks))
        self.struct = native.sized(native.Model)
        self.struct.hidden, self.struct.vocab = hidden, vocab
        self.struct.embedding = buffer(embedding_weight)
        self.struct.blocks, self.struct.block_count = self.array, len(blocks)
        if final_norm is not None:
            self.struct.final_norm = _norm(spec, weight, bias)
        if head_weight is not None:
            self.struct.head = linear(head_weight, head_bias)
        self.head_rows, self.reference = rows, ctypes.byref(self.struct)

    def back_by_huge_pages(self) -> int:
        """Asks for huge pages under the weights, in the host's memory; the bytes now so backed."""
        return _back_by_huge_pages([t for b in self.blocks for t in b.tensors] + [self.head_weight])


def _back_by_huge_pages(tensors: list[torch.Tensor | None]) -> int:
    """Asks for huge pages under the tensors, in place: fewer TLB misses in the stream. The bytes
    now so backed.
    """
    there = (t for t in tensors if t is not None and t.nbytes)
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in there)
    merged: list[list[int]] = []
    for begin, end in spans:
        if merged and begin - merged[-1][1] <= 1 << 16:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    sizes = ((begin, end - begin) for begin, end in merged)
    return sum(native.huge_pages(begin, size) for begin, size in sizes if size >= _HUGE_PAGE)


def caches_of(slots: list, batch: int, queries: int, blocks: list[NativeBlock]) -> Any:
    """The hff_cache array of `slots`, kept on the first of them as long as the buffers are the
    same; without slots, one for this call.
    """
    if slots[0] is None:
        return _temporary_caches(batch, queries, blocks)
    return _kept_caches(slots, [slot.length_address for slot in slots])


def device_caches_of(slots: list) -> Any:
    """The same with the lengths that lie on the device beside the buffers."""
    return _kept_caches(slots, [slot.count_address() for slot in slots])


def _kept_caches(slots: list, lengths: list[int]) -> Any:
    first = slots[0]
    buffers = [slot.buffers for slot in slots]
    known = getattr(first, "native_caches", None)
    if known is not None and known[1] == lengths and all(map(is_, known[0], buffers)):
        return known[2]
    array = (native.Cache * len(slots))()
    for struct, length, (keys, values) in zip(array, lengths, buffers, strict=True):
        if keys.stride() != values.stride() or keys.stride(3) != 1:
            raise FusionError(
                Reason.CACHE_STATE,
                f"cache strides are {keys.stride()} and {values.stride()}, expected equal ones",
            )
        _set_cache(struct, keys, values, length)
    first.native_caches = (buffers, lengths, array)
    return array


def _set_cache(
    struct: native.Cache, keys: torch.Tensor, values: torch.Tensor, length_address: int
) -> None:
    stride, shape, size = keys.stride(), keys.shape, extent_bytes(keys)
    struct.keys.data, struct.keys.bytes = keys.data_ptr(), size
    struct.values.data, struct.values.bytes = values.data_ptr(), size
    # the stride of a dimension of one element is arbitrary
    struct.token_stride = stride[2] if shape[2] > 1 else shape[3]
    struct.head_stride = stride[1] if shape[1] > 1 else shape[3]
    struct.batch_stride = stride[0] if shape[0] > 1 else shape[3]
    struct.capacity, struct.length = shape[2], length_address


def _temporary_caches(batch: int, queries: int, blocks: list[NativeBlock]) -> Any:
    """Keys and values for one call without a cache: the layers share them, one after the other."""
    array, shared = (native.Cache * len(blocks))(), {}
    array.cells = (ctypes.c_int64 * len(blocks))()
    array.tensors = shared
    for i, block in enumerate(blocks):
        heads = block.spec.attention
        shape = (batch, heads.kv_heads, queries, heads.head_dim)
        if shape not in shared:
            shared[shape] = tuple(torch.empty(shape, dtype=block.dtype) for _ in range(2))
        _set_cache(array[i], *shared[shape], ctypes.addressof(array.cells) + 8 * i)
    return array


def set_mask(
    struct: native.Mask, mask: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Describes a mask (B, keys) or (B|1, 1, q|1, keys) in `struct`; returns the tensor to keep
    alive during the call. `dtype`: the call's, and that of additive masks.
    """
    if mask is None:
        struct.kind = native.MASK_NONE
        return None
    if mask.dim() == 2 and mask.dtype not in (torch.int64, torch.bool):
        mask = mask != 0
    elif mask.dim() == 4 and mask.dtype not in (torch.bool, dtype):
        mask = mask.to(dtype)
    kinds = {torch.bool: native.MASK_BOOL, torch.int64: native.MASK_INT64}
    struct.kind = kinds.get(mask.dtype, native.MASK_ADDITIVE)
    stride, shape = mask.stride(), mask.shape
    struct.data.data, struct.data.bytes = mask.data_ptr(), extent_bytes(mask)
    struct.batch_stride = stride[0] if shape[0] > 1 else 0
    struct.query_stride = stride[2] if mask.dim() == 4 and shape[2] > 1 else 0
    struct.key_stride, struct.keys = stride[-1], shape[-1]
    return mask
