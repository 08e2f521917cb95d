"""The tensors a call brings: ids or embeddings, positions, masks, cos and sin.

Every check raises FusionError with the reason; some return the tensor in the form back ends take.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch

from .binding import LayerBinding, ModelBinding
from .report import FusionError, Reason
from .slots import StaticSlot


def check_gradients(tensors: list) -> None:
    """Raises FusionError where one of the tensors, None among them, requires gradients."""
    for tensor in tensors:
        if tensor is not None and getattr(tensor, "requires_grad", False):
            raise FusionError(Reason.GRADIENTS, "gradients are enabled and something requires them")


def check_dense(name: str, tensor: Any, dims: int, device: torch.device) -> None:
    """Raises FusionError unless a plain strided tensor has `dims` dimensions, some elements, and
    lies on `device`.
    """
    if type(tensor) is not torch.Tensor:
        raise FusionError(
            Reason.TENSOR_TYPE, f"{name} is a {type(tensor).__name__}, expected torch.Tensor"
        )
    if tensor.device != device:
        raise FusionError(Reason.DEVICE, f"{name} is on {tensor.device}, expected {device}")
    if tensor.layout is not torch.strided or tensor.dim() != dims:
        raise FusionError(
            Reason.INPUT,
            f"{name} has shape {tuple(tensor.shape)}, expected {dims} dense dimensions",
        )
    if tensor.numel() == 0:
        raise FusionError(
            Reason.EMPTY_INPUT, f"{name} has shape {tuple(tensor.shape)}, expected elements"
        )


def check_ids(ids: Any, device: torch.device) -> torch.Tensor:
    """Token ids (B, q) as int64."""
    check_dense("input_ids", ids, 2, device)
    if ids.dtype is torch.int64:
        return ids
    if ids.dtype is torch.int32:
        return ids.to(torch.int64)
    raise FusionError(Reason.INPUT, f"input_ids are {ids.dtype}, expected int64 or int32")


def check_hidden(name: str, x: Any, binding: LayerBinding | ModelBinding) -> torch.Tensor:
    """Hidden states (B, q, hidden) in the model's dtype, contiguous."""
    check_dense(name, x, 3, binding.device)
    if x.shape[2] != binding.hidden:
        raise FusionError(
            Reason.SHAPE,
            f"{name} have shape {tuple(x.shape)}, expected hidden size {binding.hidden}",
        )
    if x.dtype != binding.dtype:
        raise FusionError(
            Reason.MIXED_DTYPE, f"{name} are {x.dtype}, the model is {binding.dtype}"
        )
    return x.contiguous()


def check_positions(
    positions: Any, batch: int, queries: int, device: torch.device
) -> torch.Tensor:
    """Positions (B|1, q) as int64."""
    check_dense("position_ids", positions, 2, device)
    if positions.dtype is torch.int32:
        positions = positions.to(torch.int64)
    rows, columns = positions.shape
    if positions.dtype is not torch.int64 or columns != queries or (rows != batch and rows != 1):
        raise FusionError(
            Reason.POSITIONS,
            f"position_ids are {positions.dtype} of {tuple(positions.shape)}, expected int64 of "
            f"({batch}, {queries})",
        )
    return positions


def check_cache_position(positions: Any, past: int | None, queries: int, binding: Any) -> None:
    """What transformers before 5.4 passes beside position_ids must count on from the cache."""
    if binding.backend.asynchronous:
        raise FusionError(
            Reason.POSITIONS, "cache_position is given, which is not read back from a device"
        )
    expected = torch.arange(past, past + queries, device=binding.device)
    if (
        type(positions) is not torch.Tensor
        or positions.shape != expected.shape
        or not positions.equal(expected)
    ):
        raise FusionError(Reason.POSITIONS, f"cache_position is not {past} .. {past + queries - 1}")


def check_model_mask(mask, batch, queries, past, binding, cache, slots) -> torch.Tensor:
    """A mask as the base model takes it: (batch, keys) or (batch|1, 1, queries, keys)."""
    if type(mask) is torch.Tensor and mask.dim() == 4:
        check_mask(mask, batch, queries, past, binding, slots[0])
        return mask
    check_dense("attention_mask", mask, 2, binding.device)
    # past is None: a static cache on a device, whose keys past the end of the mask no query sees
    keys = (past or 0) + queries
    # without a cache the mask alone says how many keys there are
    if mask.shape[0] != batch or mask.shape[1] < keys or (cache is None and mask.shape[1] != keys):
        raise FusionError(
            Reason.MASK, f"attention_mask has shape {tuple(mask.shape)}, expected ({batch}, {keys})"
        )
    return mask if mask.dtype in (torch.int64, torch.bool) else mask.to(torch.bool)


# the last mask found causal, and by which layer; those after it in a forward share one
_checked = threading.local()


def check_mask(mask, batch, queries, past, binding, slot) -> None:
    """Raises FusionError unless a 4D mask fits and lets no query see a later key.

    `past` None, a static cache on a device: the mask is not read; kernels see no later key.
    """
    check_dense("attention_mask", mask, 4, binding.device)
    keys = (past or 0) + queries
    rows, heads, columns, width = mask.shape
    if type(slot) is StaticSlot:
        keys = slot.layer.max_cache_len
    if rows not in (1, batch) or heads != 1 or columns != queries or width != keys:
        raise FusionError(
            Reason.MASK,
            f"attention_mask has shape {tuple(mask.shape)}, expected ({batch}, 1, {queries}, "
            f"{keys})",
        )
    _check_mask_dtype(mask, binding)
    if past is None or (queries == 1 and width == past + 1):
        return
    version = None if mask.is_inference() else mask._version
    index = getattr(binding, "cache_index", -1)  # -1: a whole model
    last = getattr(_checked, "last", None)
    if last is not None and last[0]() is mask and version is not None:
        if last[1:3] == (version, past) and last[3] < index:
            return
    _checked.last = None
    later = torch.ones(queries, width, dtype=torch.bool, device=mask.device).triu(past + 1)
    seen = (
        mask[..., later]
        if mask.dtype == torch.bool
        else mask[..., later] > torch.finfo(mask.dtype).min / 2
    )
    if bool(seen.any()) or (mask.dtype != torch.bool and bool(mask.isnan().any())):
        raise FusionError(Reason.MASK, "attention_mask lets a query see a later key")
    _check_blind(mask, past)
    _checked.last = (weakref.ref(mask), version, past, index)


def _check_mask_dtype(mask: torch.Tensor, binding: LayerBinding | ModelBinding) -> None:
    """Raises FusionError unless a 4D mask is in the model's dtype or, for sdpa, bool."""
    takes_bool = binding.implementation == "sdpa"
    if mask.dtype != binding.dtype and not (takes_bool and mask.dtype == torch.bool):
        raise FusionError(
            Reason.MASK,
            f"attention_mask is {mask.dtype}, which {binding.implementation} does not mask by",
        )


def _check_blind(mask: torch.Tensor, past: int) -> None:
    """Raises FusionError where an additive mask hides all keys from a query that others see: stock
    gives it the mean of all values, kernels nothing. Query i is key past + i.
    """
    if mask.dtype == torch.bool:
        return
    hidden = torch.finfo(mask.dtype).min / 2
    blind = mask.amax(-1) <= hidden
    if bool(blind.any()):
        own = mask.amax(-2)[..., past : past + blind.shape[-1]]
        if bool((blind & (own > hidden)).any()):
            raise FusionError(Reason.MASK, "attention_mask hides all keys from a query in use")


def check_encoder_mask(mask, batch, length, binding) -> None:
    """Raises FusionError unless a mask is (batch|1, 1, length|1, length), bool or additive."""
    check_dense("attention_mask", mask, 4, binding.device)
    rows, heads, queries, keys = mask.shape
    if rows not in (1, batch) or heads != 1 or queries not in (1, length) or keys != length:
        raise FusionError(
            Reason.MASK,
            f"attention_mask has shape {tuple(mask.shape)}, expected ({batch}, 1, {length}, "
            f"{length})",
        )
    _check_mask_dtype(mask, binding)
    if mask.dtype != torch.bool and bool(mask.isnan().any()):
        raise FusionError(Reason.MASK, "attention_mask holds NaN")
    _check_blind(mask, 0)


def check_rope(rope: Any, batch: int, queries: int, binding: LayerBinding) -> None:
    """Raises FusionError unless `rope` is (cos, sin), (B|1, q, rotary_dim) in the model's dtype."""
    if type(rope) is not tuple or len(rope) != 2:
        raise FusionError(Reason.POSITIONS, "position_embeddings are not a tuple of cos and sin")
    for tensor in rope:
        check_dense("position_embeddings", tensor, 3, binding.device)
        rows, columns, width = tensor.shape
        expected = (batch, queries, binding.spec.attention.rotary_dim)
        if (
            rows not in (1, batch)
            or (columns, width) != expected[1:]
            or tensor.dtype != binding.dtype
        ):
            raise FusionError(
                Reason.POSITIONS,
                f"position_embeddings are {tensor.dtype} of {tuple(tensor.shape)}, expected "
                f"{binding.dtype} of {expected}",
            )
