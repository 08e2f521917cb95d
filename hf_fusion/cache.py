"""A layer of a DynamicCache that kernels append to in place.

As a slot (see slots.py) it offers:
  buffers         (keys, values), each (batch, heads, capacity, head_dim). The tuple is replaced as
                  a whole, so that its identity vouches for the pointers.
  length          tokens present.
  length_address  address of the int64 on the host that holds it; kernels of the CPU advance it.
  reserve         makes room for tokens.
  advance         counts tokens that torch has written.
  count_address   on a device: address of the length there, which its kernels read and advance.
  ran             on a device: counts what queued kernels will have appended. The host counts along
                  and reads nothing back.
"""

from __future__ import annotations

import ctypes
import inspect
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from .report import FusionError, Reason

# under which name models and generate() take a cache, and outputs return it: `cache` since
# transformers 5.24, where models still take it under the old one
OLD_NAME = "past_key_values"
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else OLD_NAME
_LEAST_GROWTH = 64  # tokens
# earlier versions of transformers crop to a length where later ones remove a number of tokens
_CROPS_BY_COUNT = "tokens_to_remove" in inspect.signature(DynamicLayer.crop).parameters


class Layout(NamedTuple):
    """What the keys, and the values, of a layer are beside their length."""

    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple:
    """Two tensors that may be written both inside and outside inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(shape, dtype=dtype, device=device), torch.empty(
            shape, dtype=dtype, device=device
        )


def _users(buffers: tuple[torch.Tensor, torch.Tensor]) -> list[int]:
    """Tensors over each buffer's memory, and what torch itself counts along."""
    return [torch._C._storage_Use_Count(buffer.untyped_storage()._cdata) for buffer in buffers]


class GrowableLayer(DynamicLayer):
    """A DynamicLayer whose tokens lie in buffers with room to grow.

    After a fused call it is packed: buffers and a length. Where stock code needs that (gradients,
    odd shapes, keys or values assigned from outside) it is loose: two plain tensors, exactly what
    DynamicLayer would hold. The next `reserve` packs it again.

    `keys` and `values` are views of the live tokens: what is written into them is in the cache
    until more tokens are appended. Where a caller still holds such a view then, the buffers are its
    own for good and appending goes on in new ones, as DynamicLayer does at every token.
    """

    _layer_type = None  # a registered type would replace DynamicLayer for every model

    def __init__(self, **kwargs):
        self._cell = ctypes.c_int64(0)
        self.length_address = ctypes.addressof(self._cell)
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._loose: list[Any] = [None, None]
        self._started = False
        self._viewed = False  # whether `keys` or `values` have been handed out
        self._unshared: list[int] = []  # users of the buffers' storages where nobody holds a view
        self._spare: tuple[torch.Tensor, torch.Tensor] | None = None
        self._layout: Layout | None = None
        self.native_caches: Any = None  # a back end's structs over the buffers of all layers
        self._capacity = 0
        self._count: torch.Tensor | None = None  # the length on the device, int64
        self._counted = -1  # what it will be when the work queued so far has run

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> GrowableLayer:
        """A loose layer with the state of `layer`; copies nothing."""
        self = cls()
        self._loose = [layer.keys, layer.values]
        self._started = layer.is_initialized
        # which of the two an initialised layer has depends on the release
        vars(self).update({k: v for k, v in vars(layer).items() if k in ("dtype", "device")})
        return self

    # What a back end uses

    @property
    def length(self) -> int:
        """Tokens present."""
        if self.buffers is not None:
            return self._cell.value
        keys = self._loose[0]
        return keys.shape[-2] if self._started and keys is not None and keys.numel() else 0

    def reserve(self, layout: Layout, tokens: int) -> None:
        """Makes room for `tokens` more in `buffers`; moves everything or, on an error, nothing.

        Raises FusionError where the tokens present have another shape, dtype or device, or are
        part of a gradient.
        """
        # the layout is that of the buffers, and none while there are none
        fits = self._layout == layout and self._cell.value + tokens <= self._capacity
        if fits and not self._is_held():
            return
        length = self.length
        if length:
            self._check_live(layout)
            old = self._live(length)
        need = length + tokens
        growth = 0
        if self._layout == layout:
            growth = self._capacity if fits else self._capacity + self._capacity // 2
        capacity = max(need + _LEAST_GROWTH, growth)
        shape = (layout.batch, layout.heads, capacity, layout.head_dim)
        buffers = _allocate(shape, layout.dtype, layout.device)
        if length:
            with torch.no_grad():
                buffers[0][:, :, :length].copy_(old[0])
                buffers[1][:, :, :length].copy_(old[1])
        self._pack(buffers, length, layout)

    def advance(self, tokens: int) -> None:
        """Counts `tokens` that a torch back end has written behind the live ones."""
        self._cell.value += tokens

    def count_address(self) -> int:
        """Address, on the device of `buffers`, of an int64 that holds `length` for work queued from
        now on.
        """
        length, device = self._cell.value, self.buffers[0].device
        if self._count is None or self._count.device != device:
            with torch.inference_mode(False):
                self._count = torch.zeros((), dtype=torch.int64, device=device)
            self._counted = 0
        if self._counted != length:
            with torch.no_grad():
                self._count.fill_(length)
            self._counted = length
        return self._count.data_ptr()

    def ran(self, tokens: int) -> None:
        """Counts `tokens` that kernels queued on the device append and count there."""
        self._cell.value += tokens
        self._counted += tokens

    # How the two states change into each other

    def _pack(self, buffers: tuple, length: int, layout: Layout) -> None:
        # an interrupt may come between any two lines: the layout, which `reserve` trusts, is last
        self._layout, self._spare, self.native_caches = None, None, None
        self._cell.value = length
        self.dtype, self.device = buffers[0].dtype, buffers[0].device
        self.buffers = buffers
        self._loose, self._viewed = [None, None], False
        self._capacity, self._unshared = buffers[0].shape[2], _users(buffers)
        self._layout = layout

    def _loosen(self) -> None:
        """Turns the buffers into plain views; nothing writes to them any more."""
        if self.buffers is None:
            return
        started, length = self.is_initialized, self._cell.value
        self._loose = list(self._live(length)) if started else [None, None]
        self._layout, self._spare, self.native_caches = None, None, None
        self.buffers, self._capacity = None, 0
        self._started = started

    def _is_held(self) -> bool:
        """Whether a view that has been handed out, or one of it, is still there."""
        if self._viewed:
            self._viewed = _users(self.buffers) != self._unshared
        return self._viewed

    def _live(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.buffers is None:
            return self._loose[0], self._loose[1]
        return self.buffers[0][:, :, :length], self.buffers[1][:, :, :length]

    def _check_live(self, layout: Layout) -> None:
        keys, values = self._live(self.length)
        batch, heads, head_dim, dtype, device = layout
        for name, tensor in (("keys", keys), ("values", values)):
            if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
                raise FusionError(
                    Reason.CACHE_STATE, f"cached {name} are a {type(tensor).__name__}"
                )
            if tensor.device != device or tensor.dtype != dtype:
                raise FusionError(
                    Reason.CACHE_STATE,
                    f"cached {name} are {tensor.dtype} on {tensor.device}, expected {dtype} on "
                    f"{device}",
                )
            if tensor.requires_grad:
                raise FusionError(Reason.GRADIENTS, f"cached {name} require gradients")
            expected = (batch, heads, keys.shape[-2], head_dim)
            if tuple(tensor.shape) != expected:
                raise FusionError(
                    Reason.CACHE_STATE,
                    f"cached {name} have shape {tuple(tensor.shape)}, expected {expected}",
                )

    # What transformers uses

    @property
    def keys(self) -> torch.Tensor | None:
        """(batch, heads, length, head_dim), None before the first token."""
        return self._view(0)

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._loosen()
        self._loose[0] = value

    @property
    def values(self) -> torch.Tensor | None:
        """(batch, heads, length, head_dim), None before the first token."""
        return self._view(1)

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._loosen()
        self._loose[1] = value

    def _view(self, which: int) -> torch.Tensor | None:
        if self.buffers is None:
            return self._loose[which]
        if not self.is_initialized:
            return None
        self._viewed = True
        return self.buffers[which][:, :, : self._cell.value]

    @property
    def is_initialized(self) -> bool:
        """Whether the layer has been given a dtype and a device, as DynamicLayer means it."""
        return self._started or (self.buffers is not None and self._cell.value > 0)

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        self._loosen()
        self._started = value

    def get_seq_length(self) -> int:
        """Tokens present."""
        return self.length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As DynamicLayer: takes dtype and device, holds nothing yet."""
        self._loosen()
        super().lazy_initialization(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple:
        """Appends (batch, heads, tokens, head_dim); returns all keys and values."""
        if not self._appendable(key_states, value_states):
            self._loosen()
            return super().update(key_states, value_states, *args, **kwargs)
        batch, heads, tokens, head_dim = key_states.shape
        try:
            layout = Layout(batch, heads, head_dim, key_states.dtype, key_states.device)
            self.reserve(layout, tokens)
        except FusionError:
            self._loosen()
            return super().update(key_states, value_states, *args, **kwargs)
        length = self._cell.value
        with torch.no_grad():
            self.buffers[0][:, :, length : length + tokens].copy_(key_states)
            self.buffers[1][:, :, length : length + tokens].copy_(value_states)
        self._started = True
        self._cell.value = length + tokens
        return self.keys, self.values

    @staticmethod
    def _appendable(keys: torch.Tensor, values: torch.Tensor) -> bool:
        return (
            type(keys) is torch.Tensor
            and type(values) is torch.Tensor
            and keys.dim() == 4
            and keys.shape == values.shape
            and keys.dtype == values.dtype
            and keys.device == values.device
            and not (torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad))
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens; errors are DynamicLayer's."""
        if self.buffers is None or not _CROPS_BY_COUNT or tokens_to_remove > 0:
            return super().crop(tokens_to_remove)
        if tokens_to_remove == 0:
            return None
        started = self.is_initialized
        self._cell.value = max(0, self._cell.value - abs(tokens_to_remove))
        self._started = started
        return None

    def reset(self) -> None:
        """Forgets everything, as DynamicLayer does."""
        self._loosen()
        self._loose, self._started = [None, None], False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row b becomes what row beam_idx[b] was; an identity, where the host sees it, costs
        nothing.
        """
        if self.buffers is None or self._cell.value == 0:
            return super().reorder_cache(beam_idx)
        batch, length = self.buffers[0].shape[0], self._cell.value
        if beam_idx.dim() != 1 or beam_idx.shape[0] != batch:
            self._loosen()
            return super().reorder_cache(beam_idx)
        index = beam_idx.to(self.device)
        held = self._is_held()
        if not held and index.device.type == "cpu" and index.tolist() == list(range(batch)):
            return None
        spare, self._spare = self._spare, None
        spare = spare or _allocate(tuple(self.buffers[0].shape), self.dtype, self.device)
        with torch.no_grad():
            for source, target in zip(self._live(length), spare, strict=True):
                torch.index_select(source, 0, index, out=target[:, :, :length])
        old, self.buffers = self.buffers, spare
        self._unshared, self._viewed = _users(spare), False
        self._spare = None if held else old
        return None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch row `repeats` times."""
        self._loosen()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the batch rows `indices`."""
        self._loosen()
        super().batch_select_indices(indices)

    def offload(self) -> None:
        """Moves the tokens to the CPU."""
        self._loosen()
        super().offload()

    def prefetch(self) -> None:
        """Moves the tokens back to the device they came from."""
        self._loosen()
        super().prefetch()

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Copies and pickles as a plain DynamicLayer holding the live tokens only."""
        state: dict[str, Any] = {"is_initialized": self.is_initialized}
        live = self._live(self._cell.value) if state["is_initialized"] else (None, None)
        packed = self.buffers is not None and state["is_initialized"]
        state["keys"], state["values"] = (t.clone() for t in live) if packed else live
        state.update({k: v for k, v in vars(self).items() if k in ("dtype", "device")})
        return DynamicLayer, (), state
