"""The native back end: groups that one call of the package's own CPU kernels runs.

A whole layer, a projection with its activation, projections side by side, a root-mean-square norm.
Weights are read where they lie; no panels are packed beforehand.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import native
from ..packing import precision_of, team_width
from ..report import FusionError
from ..step import CpuBackend
from ..structs import DTYPES, buffer, linear
from . import meter
from .backends import register_backend
from .blocks import Layer
from .groups import BLOCK, EPILOGUE, NORM, NORM_RESIDUAL, PARALLEL
from .linears import activated_linear, not_activated_linear, packable, packed_projections
from .site import Site

NAME = "native"


class NativeLinear(nn.Module):
    """act(x W^T + b) in one native call."""

    fresh_results = (True,)

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none"):
        super().__init__()
        self._tensors = (weight, bias)
        self._struct, self._library = linear(weight, bias), native.load()
        self._activation, self._dtype = native.ACTIVATIONS[activation], weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """x (..., columns) of the weight's type."""
        with meter.opaque("native linear", 1) as written:
            x = x.contiguous()
            out = x.new_empty((*x.shape[:-1], self._struct.rows))
            io = native.sized(native.LinearIo)
            io.dtype, io.threads = DTYPES[self._dtype], team_width()
            io.rows, io.activation = x.numel() // self._struct.cols, self._activation
            io.precision, io.x, io.out = precision_of(io.dtype), buffer(x), buffer(out)
            native.check(
                self._library.hff_linear_forward(ctypes.byref(self._struct), ctypes.byref(io))
            )
            return written(out)


class NativeParallel(nn.Module):
    """Projections of one input as one native product over their packed weight."""

    def __init__(self, packed: nn.Module):
        super().__init__()
        self.packed, self.takes, self.widths = packed, packed.takes, packed.widths
        self.fresh_results = packed.fresh_results
        bias = packed.bias.detach() if packed.bias is not None else None
        self._linear = NativeLinear(packed.weight.detach(), bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """One (..., width) per projection."""
        return self._linear(x).split(self.widths, dim=-1)


class NativeNorm(nn.Module):
    """x / rms(x) * weight in one native call, after a residual addition where `adds`."""

    def __init__(self, weight: Tensor, eps: float, adds: bool, both: bool):
        super().__init__()
        self._weight, self._library = weight, native.load()
        self._struct = native.Norm(buffer(weight), native.Buffer(), eps, native.NORMS["rms"])
        self._adds, self._both = adds, both
        self.fresh_results = (True, True) if both else (True,)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        """The normed tensor; the sum before it where that is read as well."""
        x = x + other if self._adds else x
        with meter.opaque("native norm", 1) as written:
            source = x.contiguous()
            out = torch.empty_like(source)
            io = native.sized(native.NormIo)
            io.dtype, io.threads = DTYPES[x.dtype], team_width()
            io.hidden = x.shape[-1]
            io.rows, io.x, io.out = x.numel() // io.hidden, buffer(source), buffer(out)
            native.check(
                self._library.hff_norm_forward(ctypes.byref(self._struct), ctypes.byref(io))
            )
            written(out)
        return (x, out) if self._both else out


class NativeLayer(nn.Module):
    """A whole layer in one native call."""

    fresh_results = (True,)

    def __init__(self, backend: CpuBackend, spec: Any, tensors: Any):
        super().__init__()
        self._backend, self._block = backend, backend.bind_block(spec, tensors)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, S, hidden); mask as the attention takes it."""
        with meter.opaque("native layer", 1) as written:
            mask = mask if mask is None or mask.dtype == torch.bool else _not_blind(mask)
            return written(self._backend.block(self._block, "full", x, None, mask, None, None))


def _not_blind(mask: Tensor) -> Tensor:
    """The additive mask, where it gives all keys of a query the dtype's lowest number a higher one:
    a sum with it leaves such a query all of them, and the kernel would leave it none.
    """
    hidden, highest = 0.99 * torch.finfo(mask.dtype).min, mask.amax(-1, keepdim=True)
    blind = (highest <= hidden) & highest.isfinite()
    return mask.masked_fill(blind & (mask == highest), hidden) if bool(blind.any()) else mask


def _refuses(site: Site) -> str | None:
    kind = site.group.kind
    if kind not in (BLOCK, EPILOGUE, PARALLEL, NORM, NORM_RESIDUAL):
        return f"no kernel for this kind, {kind}"
    try:
        native.load()
    except FusionError as error:
        return str(error)
    values = [site.value(node) for node in site.results]
    for value in values:
        if value is None or value.dtype not in DTYPES or value.device.type != "cpu":
            return "a result is not float32, bfloat16 or float16 on the CPU"
    if kind == PARALLEL:
        return packable(site)
    if kind in (NORM, NORM_RESIDUAL):
        return _norm_refuses(site)
    return not_activated_linear(site) if kind == EPILOGUE else _layer_refuses(site, values[0])


def _layer_refuses(site: Site, value: Tensor) -> str | None:
    layer = site.group.details["layer"]
    mask = layer.mask.meta["val"] if layer.mask is not None else None
    if mask is not None and mask.dtype not in (torch.bool, value.dtype):
        return "the mask is neither bool nor of the layer's type"
    tensors = layer.tensors(site.outer)
    if any(tensor is not None and tensor.dtype != value.dtype for tensor in tensors):
        return "a parameter has another type than the layer's result"
    try:
        CpuBackend().bind_block(layer.spec, tensors)
    except FusionError as error:
        return str(error)
    return None


def _norm_refuses(site: Site) -> str | None:
    roles = site.group.details.get("rms")
    if roles is None:
        return "layer norm is one library operator already"
    if not isinstance(roles["eps"], (int, float)):
        return "the norm's epsilon is computed"
    weight = site.node(roles["weight"].name)
    if weight is None or site.parameter(weight) is None:
        return "the norm's weight is not a parameter"
    if tuple(site.parameter(weight).shape) != (site.value(site.results[-1]).shape[-1],):
        return "the norm's weight is not one number for each column"
    if site.parameter(weight).dtype != site.value(site.results[-1]).dtype:
        return "the norm's weight has another type than its result"
    names = {node.name for node in site.results}
    allowed = {site.group.details["norm"].name, site.group.details["source"].name}
    return None if names <= allowed else "something inside the norm is read outside"


def _build(site: Site) -> nn.Module:
    kind = site.group.kind
    if kind == BLOCK:
        return _build_layer(site)
    if kind == PARALLEL:
        return NativeParallel(packed_projections(site))
    if kind in (NORM, NORM_RESIDUAL):
        return _build_norm(site)
    return activated_linear(site, NativeLinear)


def _build_layer(site: Site) -> nn.Module:
    layer = site.group.details["layer"]
    paths = {node.name: node.target for node in site.outer.graph.find_nodes(op="get_attr")}
    assert set(filter(None, layer.parameters.values())) <= set(paths.values())
    module = NativeLayer(CpuBackend(), layer.spec, layer.tensors(site.outer))
    reads = [node for node in (layer.source, layer.mask) if node is not None]
    module.takes = tuple(site.placeholders.index(_inner(site, layer, node)) for node in reads)
    return module


def _inner(site: Site, layer: Layer, node: fx.Node) -> fx.Node:
    """The inner graph's input for a node outside, by what reads it."""
    reader = next(inside for inside in layer.nodes if node in inside.all_input_nodes)
    place = [*reader.args, *reader.kwargs.values()].index(node)
    made = site.node(reader.name)
    return [*made.args, *made.kwargs.values()][place]


def _build_norm(site: Site) -> nn.Module:
    details = site.group.details
    roles = details["rms"]
    adds = site.group.kind == NORM_RESIDUAL
    weight = site.parameter(site.node(roles["weight"].name)).detach()
    module = NativeNorm(weight, float(roles["eps"]), adds, len(site.results) == 2)
    if adds:
        reads = site.node(details["source"].name).args[:2]
    else:
        reads = [node for node in site.placeholders if site.parameter(node) is None]
    module.takes = tuple(site.placeholders.index(node) for node in reads)
    return module


register_backend(NAME, 20, _refuses, _build)
