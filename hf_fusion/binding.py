"""A model's parts bound to a back end, with a watch over what was bound.

Nothing is captured when a model is patched; the first call binds, every call asks the watch, and a
watch that finds a change leads to a fresh binding or, where a part is not what the family file
knows, to a FusionError.
"""

from __future__ import annotations

import sys
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .registry import Family, class_name
from .report import FusionError, Reason
from .rope import RopeTable
from .spec import BlockTensors, tensor_shapes
from .watch import GLOBAL, Watch, check_function, is_ours

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = ("eager", "sdpa")
_REGISTRIES = {"attention": ALL_ATTENTION_FUNCTIONS, "mask": ALL_MASK_ATTENTION_FUNCTIONS}
# what base models make their masks by, in the namespaces of their modules
_MASK_FUNCTIONS = ("create_causal_mask", "create_bidirectional_mask")


def check_parameter(
    owner: str,
    tensor: Any,
    shape: tuple,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Raises FusionError unless `tensor` is a plain dense parameter of `shape` and, where they are
    given, of `dtype` on `device`.
    """
    if type(tensor) is not nn.Parameter:
        raise FusionError(
            Reason.TENSOR_TYPE, f"{owner} is a {class_name(tensor)}, expected torch.nn.Parameter"
        )
    if tensor.is_meta:
        raise FusionError(Reason.META, f"{owner} is on the meta device")
    if device is not None and tensor.device != device:
        raise FusionError(Reason.DEVICE, f"{owner} is on {tensor.device}, the rest on {device}")
    if tensor.dtype not in DTYPES:
        raise FusionError(Reason.DTYPE, f"{owner} is {tensor.dtype}, expected fp32, bf16 or fp16")
    if dtype is not None and tensor.dtype != dtype:
        raise FusionError(Reason.MIXED_DTYPE, f"{owner} is {tensor.dtype}, the rest is {dtype}")
    if tensor.layout is not torch.strided or not tensor.is_contiguous():
        raise FusionError(Reason.LAYOUT, f"{owner} is not dense and contiguous")
    end = tensor.storage_offset() * tensor.element_size() + tensor.nbytes
    if end > tensor.untyped_storage().nbytes():
        raise FusionError(Reason.LAYOUT, f"{owner} ends beyond its storage")
    if tuple(tensor.shape) != tuple(shape):
        raise FusionError(
            Reason.SHAPE, f"{owner} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
        )


def _dtype_and_device(tensors: BlockTensors, shapes: BlockTensors) -> tuple:
    """What all tensors share; FusionError where one differs, or has another shape."""
    dtype = device = None
    for name, tensor, shape in zip(BlockTensors._fields, tensors, shapes, strict=True):
        if shape is not None and (tensor is not None or name.endswith("weight")):
            check_parameter(name, tensor, shape, dtype, device)
            dtype, device = tensor.dtype, tensor.device
    return dtype, device


def watch_attention(watch: Watch, config: Any) -> str:
    """Watches the choice of the attention function; returns its name or raises FusionError."""
    namespace = vars(config)
    name = namespace.get("_attn_implementation_internal")
    if name not in IMPLEMENTATIONS:
        raise FusionError(
            Reason.ATTENTION_IMPLEMENTATION,
            f"the attention implementation is {name!r}, expected one of "
            f"{', '.join(IMPLEMENTATIONS)}",
        )
    watch.entry(namespace, "_attn_implementation_internal")
    for kind, registry in _REGISTRIES.items():
        registered = registry._global_mapping
        if name in registered:
            check_function(f"{kind} function {name!r}", registered[name], "transformers")
            watch.entry(registered, name)
    function = nn.functional.scaled_dot_product_attention
    if name == "sdpa" and type(function) is not BuiltinFunctionType:
        raise FusionError(
            Reason.FORWARD_REPLACED,
            f"torch.nn.functional.scaled_dot_product_attention is {function!r}, not torch's",
        )
    watch.entry(vars(nn.functional), "scaled_dot_product_attention")
    if any(GLOBAL):
        raise FusionError(Reason.HOOKS, "global module hooks or a local attention function are set")
    return name


class LayerBinding:
    """One layer bound to a back end: spec, tensors, the back end's block, and a watch."""

    def __init__(
        self, family: Family, layer: nn.Module, backend: Any, packed: bool | None = False
    ):
        self.spec = family.to_spec(layer)
        self.tensors = family.tensors(layer)
        self.backend = backend
        self.hidden = self.spec.hidden
        self.dtype, self.device = _dtype_and_device(self.tensors, tensor_shapes(self.spec))
        backend.check_device(self.device)
        self.cache_index = family.cache_index(layer) if family.cache_index is not None else 0
        if type(self.cache_index) is not int or self.cache_index < 0:
            raise FusionError(
                Reason.STRUCTURE,
                f"the layer's cache index is {self.cache_index!r}, expected an index",
            )
        self.watch = watch = Watch()
        self.config = None
        for name, module in layer.named_modules():
            watch.module(f"layer.{name}" if name else "layer", module, bool(name), bool(name))
            config = vars(module).get("config")
            if config is not None:
                watch.entry(vars(module), "config")
                self.config = config if self.config is None else self.config
                if config is not self.config:
                    raise FusionError(Reason.STRUCTURE, f"layer.{name} has a config of its own")
        for namespace, key in family.watched(layer):
            watch.entry(namespace, key)
            if getattr(namespace[key], "__code__", None) is not None:
                check_function(key, namespace[key], type(layer).__module__)
        self.implementation = watch_attention(watch, self.config)
        for tensor in self.tensors:
            watch.tensor(tensor)
        watch.compact()
        self.block = backend.bind_block(self.spec, self.tensors, packed)
        self.copied = getattr(self.block, "packed_bytes", 0) > 0

    def intact(self) -> bool:
        """Whether everything is still as it was bound, packed copies included."""
        return self.watch.intact() and (not self.copied or self.block.fresh())


class ModelBinding:
    """A base model, of a decoder with or without its head, bound to a back end.

    `layers` are the LayerBindings of its layers, `lm` the module with the head or None.
    """

    def __init__(self, family, base: nn.Module, lm: nn.Module | None, layers: list, backend: Any):
        self.parts = parts = family.parts(base)
        self.base = base
        self.config = vars(base)["config"]
        self.count = len(layers)
        self.watch = watch = Watch()
        if not layers:
            raise FusionError(Reason.STRUCTURE, "the model has no layers")
        self._outer(base, lm)
        self._layers(layers)
        first = layers[0]
        self.backend, self.device = backend, first.device
        self.dtype, self.hidden = first.dtype, first.spec.hidden
        self.kv_heads, self.head_dim = first.spec.attention.kv_heads, first.spec.attention.head_dim
        self.implementation = first.implementation
        self.rope, self.frequencies = None, None
        self.copied = [layer.block for layer in layers if layer.copied]
        embedding, norm = self._embedding(), self._final_norm()
        head = self._head(family, lm)
        if parts.rotary is not None:
            self._rotary(parts.rotary, first.spec.attention.rotary_dim)
            rows = self._positions() if backend.asynchronous else 0
            self.rope = RopeTable(parts.rotary, self.dtype, self.device, rows)
        watch.compact()
        self.native = backend.bind_model([layer.block for layer in layers], embedding, norm, *head)

    def _positions(self) -> int:
        """Positions a call may use that nothing on the host sees: those the model was made for."""
        most = vars(self.config).get("max_position_embeddings")
        return most if type(most) is int else 0

    def _embedding(self) -> torch.Tensor | None:
        if self.parts.embedding is None:
            return None
        weight = self.parts.embedding.weight
        self._check("the embedding", weight, (weight.shape[0], self.hidden))
        self.watch.tensor(weight)
        return weight

    def _check(self, owner: str, tensor: Any, shape: tuple) -> None:
        check_parameter(owner, tensor, shape, self.dtype, self.device)

    def _final_norm(self) -> tuple | None:
        norm = self.parts.final_norm
        if norm is None:
            return None
        for name in ("weight", "bias"):
            tensor = getattr(norm, name)
            self._check(f"the final norm's {name}", tensor, (self.hidden,))
            self.watch.tensor(tensor)
        return self.parts.final_norm_spec, norm.weight, norm.bias

    def _head(self, family: Family, lm: nn.Module | None) -> tuple:
        if lm is None:
            return None, None
        linear = family.head(lm)
        rows = linear.weight.shape[0]
        self._check("the head's weight", linear.weight, (rows, self.hidden))
        if linear.bias is not None:
            self._check("the head's bias", linear.bias, (rows,))
        self.watch.module("the head", linear)
        self.watch.tensor(linear.weight)
        self.watch.tensor(linear.bias)
        return linear.weight, linear.bias

    def _outer(self, base: nn.Module, lm: nn.Module | None) -> None:
        """Watches the modules outside the layers; the called one's own hooks run outside of it."""
        watch, parts = self.watch, self.parts
        watch.entry(vars(base), "config")
        module = vars(sys.modules[type(base).__module__])
        for name in _MASK_FUNCTIONS:
            if name in module:
                check_function(name, module[name], "transformers")
                watch.entry(module, name)
        if lm is not None:
            watch.module("the model", lm, inner=False, hooks=False)
            watch.entry(vars(lm), "config")
            self._own_forward("the base model", base)
        watch.module("the base model", base, inner=False, hooks=lm is not None)
        for name, module in base._modules.items():
            if module is not parts.layers and name not in parts.called:
                watch.module(name, module)
        watch.module("layers", parts.layers)
        if parts.final_norm is not None:
            watch.entry(vars(parts.final_norm), "eps")
        if parts.embedding is not None:
            watch.entry(vars(parts.embedding), "max_norm")

    def _layers(self, layers: list) -> None:
        for index, (module, layer) in enumerate(zip(self.parts.layers, layers, strict=True)):
            if self.parts.rotary is not None and layer.cache_index != index:
                raise FusionError(
                    Reason.STRUCTURE, f"layer {index} fills layer {layer.cache_index} of the cache"
                )
            if layer.config is not self.config:
                raise FusionError(Reason.STRUCTURE, f"layer {index} has a config of its own")
            if layer.dtype != layers[0].dtype:
                raise FusionError(
                    Reason.MIXED_DTYPE, f"layer {index} is {layer.dtype}, layer 0 {layers[0].dtype}"
                )
            if layer.device != layers[0].device:
                raise FusionError(
                    Reason.DEVICE, f"layer {index} is on {layer.device}, layer 0 {layers[0].device}"
                )
            if (layer.spec.hidden, layer.spec.attention) != (
                layers[0].spec.hidden,
                layers[0].spec.attention,
            ):
                raise FusionError(Reason.SHAPE, f"layer {index} has other sizes than layer 0")
            self.watch.include(layer.watch)
            self._own_forward(f"layer {index}", module)
            self.watch.hooks(f"layer {index}", vars(module))

    def _own_forward(self, name: str, module: nn.Module) -> None:
        if not is_ours(vars(module).get("forward")):
            raise FusionError(
                Reason.FORWARD_REPLACED, f"{name}.forward has been replaced on the instance"
            )
        self.watch.entry(vars(module), "forward")

    def _rotary(self, rotary: nn.Module, rotary_dim: int) -> None:
        kind, frequencies = vars(rotary).get("rope_type"), rotary._buffers.get("inv_freq")
        if type(kind) is not str or "dynamic" in kind or kind == "longrope":
            raise FusionError(
                Reason.ROPE, f"the rope type is {kind!r}, which changes with the length"
            )
        if type(frequencies) is not torch.Tensor or frequencies.device != self.device:
            raise FusionError(
                Reason.ROPE, f"the rotary frequencies are not a plain tensor on {self.device}"
            )
        if 2 * frequencies.numel() != rotary_dim:
            raise FusionError(
                Reason.ROPE,
                f"there are {frequencies.numel()} rotary frequencies, expected {rotary_dim // 2}",
            )
        for namespace, key in ((vars(rotary), "rope_type"), (vars(rotary), "attention_scaling")):
            self.watch.entry(namespace, key)
        self.watch.entry(rotary._buffers, "inv_freq")
        self.frequencies = frequencies
        self.bound_frequencies = self._frequencies_now()

    def _frequencies_now(self) -> Any:
        """What tells whether the frequencies that the table was made from have changed.

        Their values: a change in place shows in no pointer. On a device, reading them would wait
        for all work queued there: version and address are compared, which a write through `.data`
        leaves as they are.
        """
        now = self.frequencies
        if not self.backend.asynchronous:
            return now.detach().clone()
        return now.data_ptr(), -1 if now.is_inference() else now._version, now.dtype

    def intact(self) -> bool:
        """Whether everything is still as it was bound, and no layer has been added."""
        if len(self.parts.layers) != self.count or not self.watch.intact():
            return False
        if not all(block.fresh() for block in self.copied):
            return False
        if self.frequencies is None:
            return True
        now, then = self.frequencies, self.bound_frequencies
        if self.backend.asynchronous:
            return then == self._frequencies_now()
        return now.dtype is then.dtype and torch.equal(now, then)
