"""`fuse`: a model in, a FusedModel out that is called like it and has been held against it."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from ..guard import check_autocast, check_environment
from ..report import FusionError, Reason, Stats
from . import meter
from .backends import chosen
from .capture import Capture, Signature, capture, named_arguments
from .conditions import text, unmet
from .linears import PackedLinear
from .partition import AttentionFusionPartitioner
from .report import FusionReport
from .rewrite import rewrite
from .stamp import Stamp
from .tracer import decompose
from .verify import call_arguments, narrow, verify


class FusedModel(nn.Module):
    """A model as a graph of fused groups.

    Takes the model's arguments and returns the model's outputs, without a cache. A call that the
    graph was not captured for (other arguments or types, sizes it is not right for, gradients), or
    that finds the model changed, runs the model itself and is counted in `stats` with the reason;
    where there is no model any more, as after `load`, and where `strict` is set, as it is at first
    by HF_FUSION_STRICT=1, it raises FusionError. `report` says what was fused, what not, and why.
    Casts, moves, copies and pickles raise FusionError as well.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        captured: Capture,
        report: FusionReport,
        original: nn.Module | None = None,
        positional: list[str] | None = None,
    ):
        super().__init__()
        self.graph = graph
        self.captured, self.report = captured, report
        self.stats = Stats()
        self.strict = os.environ.get("HF_FUSION_STRICT", "") == "1"
        # in a tuple: the model is no part of this one's state
        self._original = (original,)
        self._stamp = Stamp(original) if original is not None else None
        forward = original.forward if original is not None else None
        self._signature = inspect.signature(forward) if forward is not None else None
        self.positional = _positional(self._signature) if positional is None else positional
        self.eval()

    def _apply(self, fn: Any, recurse: bool = True) -> FusedModel:
        """Refuses what would change a tensor: the graph holds the model's own parameters."""
        if not all(fn(tensor) is tensor for tensor in (*self.parameters(), *self.buffers())):
            raise FusionError(
                Reason.CAPTURED, "cast or move the model and fuse it again, or load it there"
            )
        return self

    def share_memory(self) -> FusedModel:
        """Refused: native calls know where the weights lie."""
        raise FusionError(Reason.CAPTURED, "share the model's memory and fuse it again")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise FusionError(
            Reason.CAPTURED,
            "a fused model is neither copied nor pickled: use save and FusedModel.load, or fuse a "
            "copy of the model",
        )

    @property
    def original(self) -> nn.Module | None:
        """The model that refused calls run."""
        return self._original[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for these arguments."""
        if self.original is not None and torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        try:
            tensors = self._tensors(args, kwargs)
        except FusionError as error:
            self.stats.refuse(error)
            if self.original is None or self.strict:
                raise
            return self.original(*args, **kwargs)
        result = pytree.tree_unflatten(self.graph(*tensors), self.captured.output_spec)
        self.stats.count("encode")
        return result

    def _tensors(self, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
        """The graph's inputs of a call; FusionError where it was not captured for them."""
        signature = self.captured.signature
        if not meter.counting():
            check_environment()
        if self._stamp is not None:
            self._stamp.check()
        named = self._named(args, kwargs)
        self._check_positions(named)
        for name, value in signature.defaults.items():
            if named.setdefault(name, value) != value:
                raise FusionError(Reason.ARGUMENT, f"{name} is {named[name]}, expected {value}")
        if set(named) != set(signature.arguments):
            raise FusionError(
                Reason.ARGUMENT,
                f"arguments are {sorted(named)}, captured were {sorted(signature.arguments)}",
            )
        leaves, structure = pytree.tree_flatten({name: named[name] for name in signature.arguments})
        if structure != signature.structure:
            raise FusionError(Reason.ARGUMENT, "arguments are nested in another way than captured")
        tensors = _checked(signature, leaves)
        for device in {tensor.device for tensor in self.captured.examples}:
            check_autocast(device)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *self._trained())):
            raise FusionError(
                Reason.GRADIENTS, "fused groups have no backward: use torch.no_grad()"
            )
        return tensors

    def _named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self._signature is not None:
            return named_arguments(self._signature, args, kwargs)
        if len(args) > len(self.positional):
            raise FusionError(
                Reason.ARGUMENT,
                f"{len(args)} positional arguments, expected at most {self.positional}",
            )
        given = dict(zip(self.positional, args))
        for name in given.keys() & kwargs.keys():
            raise FusionError(Reason.ARGUMENT, f"{name} is given by position and by name")
        names = self.captured.signature.arguments
        named = given | kwargs
        return {n: value for n, value in named.items() if value is not None or n in names}

    def _check_positions(self, named: dict[str, Any]) -> None:
        """FusionError where the model would make a cache: without one it keeps apart what positions
        that start again pack, and so does the graph.
        """
        positions = named.get("position_ids")
        if (
            self.captured.signature.defaults.get("use_cache") is False
            and "use_cache" not in named
            and named.get("attention_mask") is None
            and isinstance(positions, Tensor)
            and bool((positions.diff() != 1).any())
        ):
            raise FusionError(
                Reason.PACKED, "position_ids start again: give use_cache=False to pack sequences"
            )

    def _trained(self) -> list[Tensor]:
        return list(self.original.parameters()) if self.original is not None else []

    def measure(self, inputs: Any = None, **options: Any) -> dict[str, Any]:
        """Kernels, memory and time of this and of the model; see `measure.compare`."""
        from .measure import compare

        return compare(self, inputs, **options)

    def save(self, folder: Any) -> None:
        """Writes the graph and the weights, which stay in the model's own layout; see `storage`."""
        from .storage import save

        save(self, folder)

    @classmethod
    def load(cls, folder: Any, backends: tuple[str, ...] | None = None) -> FusedModel:
        """A saved model, fused again on this machine."""
        from .storage import load

        return load(folder, backends)


def _positional(signature: inspect.Signature | None) -> list[str]:
    """The arguments that a call may give by position, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = signature.parameters.values() if signature is not None else ()
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def _checked(signature: Signature, leaves: list[Any]) -> list[Tensor]:
    tensors, free = [], {}
    kinds = iter(zip(signature.sizes, signature.dtypes, strict=True))
    for name, captured, first, leaf in zip(
        signature.names, signature.leaves, signature.same, leaves, strict=True
    ):
        if captured is not None:
            if type(leaf) is not type(captured[0]) or leaf != captured[0]:
                raise FusionError(
                    Reason.ARGUMENT, f"{name} is {leaf!r}, captured was {captured[0]!r}"
                )
            continue
        if leaves[first] is not leaf:
            raise FusionError(
                Reason.ARGUMENT,
                f"{name} is another tensor than {signature.names[first]}, captured was one",
            )
        sizes, dtype = next(kinds)
        if not isinstance(leaf, Tensor):
            raise FusionError(Reason.INPUT, f"{name} is {type(leaf).__name__}, expected a tensor")
        if type(leaf) not in (Tensor, nn.Parameter):
            raise FusionError(Reason.TENSOR_TYPE, f"{name} is a {type(leaf).__name__}")
        if leaf.dtype != dtype:
            raise FusionError(Reason.DTYPE, f"{name} is {leaf.dtype}, captured was {dtype}")
        shape = tuple(leaf.shape)
        fits = len(shape) == len(sizes) and all(
            n == m if isinstance(m, int) else free.setdefault(m, n) == n and n > 0
            for n, m in zip(shape, sizes, strict=True)
        )
        if not fits:
            raise FusionError(Reason.SHAPE, f"{name} has shape {shape}, captured was {sizes}")
        tensors.append(leaf)
    condition = unmet(signature.conditions, free)
    if condition is not None:
        places = signature.places()
        wrong = ", ".join(f"{place} is {free[name]}" for name, place in places.items())
        raise FusionError(Reason.SHAPE, f"{wrong}, expected {text(condition, places)}")
    return tensors


def fuse(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    level: str = "semantic",
    backends: tuple[str, ...] | None = None,
    partitioner: Any = None,
    dynamic: bool = True,
    mask: bool = False,
    share_weights: bool = False,
    shapes: int = 3,
) -> FusedModel:
    """The model captured, cut into groups, made executable, and verified at `shapes` shapes.

    example_inputs: a tensor, a tuple or a dict; built from the configuration where absent, with
    padding where `mask`. level: "semantic", or "explicit" with attention spelled out before it is
    grouped. backends: names, of which the first that takes a group runs it; None for the default
    ones. partitioner: an AttentionFusionPartitioner by default. share_weights: the model's own
    parameters become views of the packed ones, with the values they have, so that nothing is in
    memory twice; otherwise the model is not touched. Raises FusionError where the model cannot be
    captured or the graph is not the model.
    """
    chosen(backends)
    captured = capture(model, example_inputs, dynamic=dynamic, mask=mask)
    decompose(captured, level)
    fused = assemble(captured, partitioner, backends, model)
    report = fused.report
    report.shapes, report.errors = verify(model, captured, fused.graph, shapes)
    narrow(model, captured, fused.graph, shapes)
    if share_weights:
        _share(model, captured.graph_module, fused.graph)
    fused._stamp = Stamp(model)
    return fused


def assemble(
    captured: Capture,
    partitioner: Any,
    backends: tuple[str, ...] | None,
    original: nn.Module | None = None,
    positional: list[str] | None = None,
) -> FusedModel:
    """A FusedModel of a captured graph, not yet verified."""
    if partitioner is None:
        native = any(backend.name == "native" for backend in chosen(backends))
        partitioner = AttentionFusionPartitioner(whole_layers=native)
    report = partitioner.partition(captured.graph_module)
    report.road = captured.road
    report.notes += captured.notes
    return FusedModel(rewrite(report, backends), captured, report, original, positional)


def _share(model: nn.Module, source: fx.GraphModule, graph: fx.GraphModule) -> None:
    """The model's parameters that were packed become views of the packed ones."""
    modules = [module for module in graph.modules() if isinstance(module, PackedLinear)]
    tensors = [t for m in modules for t in (m.weight, m.bias) if t is not None]
    packed = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    views = {
        name: parameter for name, parameter in source.named_parameters()
        if parameter.untyped_storage().data_ptr() in packed
    }  # fmt: skip
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in views:
            parameter.data = views[name].detach()


def arguments_of(fused: FusedModel) -> dict[str, Any]:
    """The named arguments that the model was captured with."""
    return call_arguments(fused.captured, fused.captured.examples)
