"""The layers of a transformers cache as slots, which back ends read and append to.

A slot has `buffers`, `length`, `length_address`, `count_address`, `reserve`, `advance` and `ran` as
cache.py describes them. A GrowableLayer is its own slot; a StaticLayer gets one around it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer

from .cache import GrowableLayer, Layout
from .report import FusionError, Reason


class StaticSlot:
    """One StaticLayer as a slot for one call; buffers and length are the layer's own.

    With `counted` False its length is None: work queued on a device moves it there, and a host's
    copy would not see the steps of a replayed graph. A step past the end of the cache gives NaN.
    """

    def __init__(self, layer: StaticLayer, counted: bool = True):
        self.layer, self.counted = layer, counted
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self.length_address = 0

    @property
    def length(self) -> int | None:
        """Tokens present."""
        if not self.counted:
            return None
        return int(self.layer.cumulative_length) if self.layer.is_initialized else 0

    def reserve(self, layout: Layout, tokens: int) -> None:
        """Checks that the layer is of this layout and, as far as its length is known, that `tokens`
        more fit; FusionError where not.
        """
        layer, (batch, heads, head_dim, dtype, device) = self.layer, layout
        if self.counted and self.length + tokens > layer.max_cache_len:
            raise FusionError(
                Reason.CACHE_FULL,
                f"a static cache of {layer.max_cache_len} tokens holds {self.length}, {tokens} "
                "more do not fit",
            )
        if not layer.is_initialized:
            with torch.inference_mode(False):
                empty = torch.empty((batch, heads, 0, head_dim), dtype=dtype, device=device)
                layer.lazy_initialization(empty, empty)
        expected = (batch, heads, layer.max_cache_len, head_dim)
        for name in ("keys", "values"):
            tensor = getattr(layer, name)
            if type(tensor) is not torch.Tensor or tuple(tensor.shape) != expected:
                shape = tuple(getattr(tensor, "shape", ()))
                raise FusionError(
                    Reason.CACHE_STATE, f"static {name} have shape {shape}, expected {expected}"
                )
            if tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
                raise FusionError(
                    Reason.CACHE_STATE,
                    f"static {name} are {tensor.dtype} on {tensor.device}, expected contiguous "
                    f"{dtype} on {device}",
                )
            if tensor.is_inference() and not torch.is_inference_mode_enabled():
                raise FusionError(Reason.CACHE_STATE, f"static {name} were made in inference mode")
        if layer.cumulative_length.device != device:
            raise FusionError(
                Reason.CACHE_STATE,
                f"a static cache counts its tokens on {layer.cumulative_length.device}, expected "
                f"{device}",
            )
        self.buffers = (layer.keys, layer.values)
        self.length_address = layer.cumulative_length.data_ptr()

    def advance(self, tokens: int) -> None:
        """Counts `tokens` that a torch back end has written behind the live ones."""
        self.layer.cumulative_length.add_(tokens)

    def count_address(self) -> int:
        """Address of the layer's own count."""
        return self.length_address

    def ran(self, tokens: int) -> None:
        """The count that kernels move is the layer's own."""


_STATE = {"keys", "values", "is_initialized", "dtype", "device"}


def _check_cache(cache: Any) -> None:
    kind = type(cache)
    if kind is not DynamicCache and kind is not StaticCache:
        raise FusionError(
            Reason.CACHE_TYPE,
            f"the cache is a {kind.__name__}, expected a DynamicCache or a StaticCache",
        )
    if cache.offloading:
        raise FusionError(Reason.CACHE_TYPE, "the cache is offloaded")
    if "update" in vars(cache):
        raise FusionError(Reason.CACHE_TYPE, "the update method of the cache has been replaced")


def _check_layer(layer: Any) -> None:
    kind = type(layer)
    if kind is GrowableLayer:
        return
    if kind is not DynamicLayer and kind is not StaticLayer:
        raise FusionError(
            Reason.CACHE_TYPE,
            f"a cache layer is a {kind.__name__}, expected DynamicLayer or StaticLayer",
        )
    if kind is StaticLayer:
        length = getattr(layer, "cumulative_length", None)
        if type(length) is not torch.Tensor or length.dtype != torch.int64:
            raise FusionError(
                Reason.CACHE_TYPE, "a static cache layer counts no tokens in an int64"
            )
    if kind is DynamicLayer and not vars(layer).keys() <= _STATE:
        odd = ", ".join(sorted(vars(layer).keys() - _STATE))
        raise FusionError(Reason.CACHE_TYPE, f"a cache layer has attributes of its own: {odd}")


def _fill(cache: Any, count: int) -> None:
    """Appends the layers that a DynamicCache without a config gets at its first update."""
    if len(cache.layers) >= count:
        return
    if cache.layer_class_to_replicate is not DynamicLayer:
        raise FusionError(
            Reason.CACHE_STATE,
            f"the cache has {len(cache.layers)} layers, expected at least {count}",
        )
    cache.layers.extend(GrowableLayer() for _ in range(count - len(cache.layers)))


def upgrade(cache: Any, first: int, count: int, counted: bool = True) -> list[Any]:
    """Slots of the layers first .. first + count - 1 of `cache`.

    DynamicLayers are replaced by GrowableLayers in place, StaticLayers are used as they are;
    `counted`: whether the host knows their length. Raises FusionError for any other cache, before
    anything is replaced.
    """
    _check_cache(cache)
    end = first + count
    if len(cache.layers) < end:
        _fill(cache, end)
    layers = cache.layers[first:end]
    if set(map(type, layers)) == {GrowableLayer}:
        return layers
    for layer in layers:
        _check_layer(layer)
    slots: list[Any] = []
    for index, layer in enumerate(layers, first):
        if type(layer) is DynamicLayer:
            cache.layers[index] = layer = GrowableLayer.adopt(layer)
        slots.append(layer if type(layer) is GrowableLayer else StaticSlot(layer, counted))
    return slots


def common_length(slots: list[Any]) -> int | None:
    """Tokens in every slot, None where the host does not know; FusionError where they disagree."""
    lengths = [slot.length for slot in slots]
    if lengths.count(lengths[0]) != len(lengths):
        raise FusionError(
            Reason.CACHE_STATE, f"the cache layers hold {lengths} tokens, expected one length"
        )
    return lengths[0]
