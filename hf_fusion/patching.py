"""patch, unpatch, patched and stats: forwards go onto one model and come off again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from . import patches as _patches  # noqa: F401  (the families register themselves)
from .backends import Backends, check_fusion, resolve
from .binding import LayerBinding
from .forwards import BASE, CAUSAL_LM, KEY, LAYER, ROOT, UNPICKLED, Handle, State, forward_for
from .registry import Family, class_name, expect_type, families, family_of
from .report import FusionError, LayerReport, Reason, Report, Stats
from .watch import is_ours

# reasons that a model may outgrow between patching and calling
_PASSING = {
    Reason.TRAINING,
    Reason.META,
    Reason.GRADIENTS,
    Reason.HOOKS,
    Reason.DTYPE,
    Reason.MIXED_DTYPE,
}
# what reads one position for another, padding among them: heads with a softmax over all, and layers
_SCORING_PADDING = "ForQuestionAnswering"
_MIXING_PADDING = (nn.Conv1d, nn.RNNBase, nn.MultiheadAttention)
_REPLICATE = "_replicate_for_data_parallel"


def patch(
    model: nn.Module,
    fusion: str = "full",
    backend: str = "auto",
    strict: bool = False,
    packed: bool | None = None,
) -> Report:
    """Makes this model instance run fused, in place; returns what was done, layer by layer.

    fusion: "none" (wrappers that count and delegate), "decomposed" (attention as explicit torch
    operations), "attention", "attention+up", "full". backend: "auto" (by where the weights lie),
    "cpu", "cuda", "reference".
    Weights are bound at the first call, so the model may still be moved, cast or loaded. A patched
    model is patched again with the options given.

    packed: whether matrix kernels, which run encoders and prompts, read copies of the weights in
    the order they need (`Report.packed_bytes`; made again when weights change, of which a write to
    a part of a matrix through `.data` may show some calls later), or the weights as they lie,
    without a copy. None leaves it to the back end.

    Raises FusionError for an unknown option or an absent back end and, with strict or
    HF_FUSION_STRICT=1, for a model that would run stock; strict forwards raise where they would
    otherwise run stock and count the reason.
    """
    if not isinstance(model, nn.Module):
        raise FusionError(
            Reason.NOT_A_MODEL, f"patch got a {type(model).__name__}, expected a torch.nn.Module"
        )
    check_fusion(fusion)
    resolved = resolve(backend)
    strict = strict or os.environ.get("HF_FUSION_STRICT", "") == "1"
    family = family_of(model)
    name = type(model).__name__
    if family is None:
        known = ", ".join(known.name for known in families())
        error = FusionError(
            Reason.UNKNOWN_FAMILY, f"no family file knows {name}, expected one of: {known}"
        )
        if strict:
            raise error
        unpatch(model)
        return Report(name, None, fusion, backend, reason=error.reason, detail=error.message)
    layers = Backends("reference") if fusion == "decomposed" else resolved
    failure = None if fusion in ("none", "decomposed") else resolved.error
    if packed not in (None, True, False):
        raise FusionError(
            Reason.ARGUMENT, f"packed is {packed!r}, expected True, False or None"
        )
    every_row = any(
        type(m).__name__.endswith(_SCORING_PADDING) or isinstance(m, _MIXING_PADDING)
        for m in model.modules()
    )
    state = State(family, fusion, backend, strict, resolved, layers, failure, packed, every_row)
    report = _examine(model, state)
    if strict:
        _insist(report)
    unpatch(model)
    try:
        _install(model, state)
    except BaseException:
        unpatch(model)
        raise
    return report


def unpatch(model: nn.Module) -> None:
    """Takes every forward of hf_fusion off the model; what was there before is there again.
    Harmless twice.
    """
    for module in model.modules():
        namespace = vars(module)
        handle = namespace.get(KEY)
        previous = handle.previous if type(handle) is Handle else None
        for slot in ("_old_forward", "forward"):
            value = namespace.get(slot)
            if is_ours(value):
                if previous is not None:
                    namespace[slot] = previous
                elif slot == "forward":
                    del namespace[slot]
                else:
                    namespace[slot] = MethodType(type(module).forward, module)
            elif slot == "forward" and type(handle) is str and _left_by_pickle(module, value):
                del namespace[slot]
        if handle is not None:
            namespace.pop(_REPLICATE, None)
            del namespace[KEY]


@contextmanager
def patched(
    model: nn.Module,
    fusion: str = "full",
    backend: str = "auto",
    strict: bool = False,
    packed: bool | None = None,
) -> Iterator[Report]:
    """`patch` for a with statement; what was there before is there again afterwards."""
    before: dict[State, nn.Module] = {}  # parts may have patches of their own
    for module in model.modules():
        handle = vars(module).get(KEY)
        if type(handle) is Handle:
            before.setdefault(handle.state, module)
    report = patch(model, fusion, backend, strict, packed)
    try:
        yield report
    finally:
        unpatch(model)
        for state, module in before.items():
            unpatch(module)
            _install(module, state)


def stats(model: nn.Module) -> Stats:
    """The counters of a patched model; empty ones with a note for a model that is not patched."""
    handle = vars(model).get(KEY)
    if type(handle) is Handle:
        return handle.state.stats
    return Stats(note=UNPICKLED if handle == UNPICKLED else "not patched")


def _left_by_pickle(module: nn.Module, value: Any) -> bool:
    """Whether `value` is the class's own forward that unpickling bound in place of ours."""
    return isinstance(value, MethodType) and value.__func__ is type(module).forward


def _bases(model: nn.Module, family: Family) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if class_name(m) == family.base_class]


def _install(model: nn.Module, state: State) -> None:
    family, whole = state.family, state.fusion in ("none", "full")
    vars(model)[KEY] = Handle(state, ROOT)
    for module in model.modules():
        if class_name(module) == family.causal_lm_class and whole:
            _install_one(module, state, CAUSAL_LM)
        elif class_name(module) == family.base_class and whole:
            _install_one(module, state, BASE)
        elif class_name(module) == family.layer_class:
            _install_one(module, state, LAYER)


def _is_replaced(module: nn.Module) -> bool:
    """Whether there is a forward on the instance that is not ours; under accelerate's hooks, one
    that is not the class's own either.
    """
    namespace = vars(module)
    hooked = "_old_forward" in namespace
    value = namespace.get("_old_forward" if hooked else "forward")
    own = hooked and getattr(value, "__func__", None) is type(module).forward
    return not (value is None or is_ours(value) or (own and value.__self__ is module))


def _install_one(module: nn.Module, state: State, level: str) -> None:
    """Installs one forward: under accelerate's hooks, never over another override."""
    namespace = vars(module)
    if _is_replaced(module):
        return
    slot = "_old_forward" if "_old_forward" in namespace else "forward"
    if slot == "forward":
        namespace[_REPLICATE] = MethodType(_replicate_for_data_parallel, module)
    namespace[KEY] = Handle(state, level, namespace.get(slot))
    namespace[slot] = MethodType(forward_for(type(module), level, state.fusion == "none"), module)


def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
    """The module on another device for one call of nn.DataParallel, with a forward of its own: the
    replica's weights are no parameters, so it runs stock and counts that.
    """
    replica = getattr(type(self), _REPLICATE)(self)
    namespace = vars(replica)
    del namespace[_REPLICATE]
    namespace[KEY] = Handle(namespace[KEY].state, namespace[KEY].level)
    namespace["forward"] = MethodType(namespace["forward"].__func__, replica)
    return replica


def _examine(model: nn.Module, state: State) -> Report:
    """The report of a model as it is now; binds nothing for good."""
    family = state.family
    report = Report(type(model).__name__, family.name, state.fusion, state.name)
    if state.error is not None:
        report.reason, report.detail = state.error.reason, state.error.message
    for prefix, base in _bases(model, family):
        names = {id(m): name for name, m in base.named_modules()}
        try:
            layers = list(family.parts(base).layers)
        except FusionError as error:
            report.reason, report.detail = error.reason, error.message
            layers = [m for m in base.modules() if class_name(m) == family.layer_class]
        for layer in layers:
            name = names[id(layer)]
            backend, error = _layer_backend(state, layer)
            if backend is None and error is not None and report.reason is None:
                report.reason, report.detail = error.reason, error.message
            if error is None and backend is not None and state.fusion != "none":
                dtype = family.tensors(layer).qkv_weight.dtype
                report.packed_bytes += backend.packed_bytes(
                    family.to_spec(layer), dtype, state.packed
                )
            report.layers.append(
                LayerReport(
                    index=len(report.layers),
                    name=f"{prefix}.{name}" if prefix else name,
                    fusion=state.fusion,
                    backend=backend.name if error is None and state.fusion != "none" else None,
                    kernel=backend.isa if error is None and state.fusion != "none" else None,
                    reason=error and error.reason,
                    detail=error.message if error else "",
                )
            )
    for other in families():
        for name, base in _bases(model, other) if other is not family else ():
            detail = f"{class_name(base)} is of another family, expected a patch of its own"
            report.layers.append(
                LayerReport(
                    index=len(report.layers),
                    name=name,
                    fusion=state.fusion,
                    backend=None,
                    kernel=None,
                    reason=Reason.OTHER_FAMILY,
                    detail=detail,
                )
            )
    return report


def _layer_backend(state: State, layer: nn.Module) -> tuple[Any, FusionError | None]:
    """(back end or None, why it does not run this layer as it is now or None)."""
    if state.error is not None:
        return None, state.error
    first = next(layer.parameters(), None)
    device = first.device if first is not None else torch.device("cpu")
    try:
        backend = state.layer_backends.of(device)
    except FusionError as error:
        return None, error if state.fusion != "none" else None  # wrappers need no back end
    try:
        expect_type("the layer", layer, state.family.layer_class)
    except FusionError as error:
        return backend, error
    if _is_replaced(layer):
        error = FusionError(
            Reason.FORWARD_REPLACED, "forward has been replaced on the instance"
        )
        return backend, error
    try:
        LayerBinding(state.family, layer, backend)
    except FusionError as error:
        return backend, error
    return backend, None


def _insist(report: Report) -> None:
    """Raises what strict does not forgive: a structure that no later call can make right."""
    if report.reason is not None:
        raise FusionError(report.reason, report.detail)
    for layer in report.layers:
        if layer.reason is not None and layer.reason not in _PASSING:
            raise FusionError(layer.reason, f"layer {layer.index}: {layer.detail}")
