"""The forwards that a patch installs on a model, its base model and its layers.

Each tries to run fused and, refused with a reason, calls what was there before; that reaches the
next patched module further down. Module-level functions that take the module as `self`: a copied
model's forwards act on the copy.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from . import streams
from .arguments import check_hidden
from .binding import LayerBinding, ModelBinding
from .cache import CACHE, Layout
from .guard import (
    check_autocast,
    check_environment,
    read_encoder_call,
    read_encoder_layer_call,
    read_layer_call,
    read_model_call,
)
from .outputs import builder
from .reference import finish_attention, finish_up
from .registry import Family
from .report import FusionError, Reason, Stats, renew_in_child
from .sampling import Sampler
from .watch import is_overheard

KEY = "_hf_fusion"  # attribute of a patched module that holds its Handle
CAUSAL_LM, BASE, LAYER, ROOT = "causal_lm", "base", "layer", "root"
STAGES = {
    "decomposed": "full",
    "attention": "attention",
    "attention+up": "attention+up",
    "full": "full",
}
STEP_ROWS = 16  # calls with more count as "prefill"
UNPICKLED = "the patch was removed by pickling; call hf_fusion.patch again"

_is_compiling = torch.compiler.is_compiling
_local = threading.local()
_causal_lm_output = builder(CausalLMOutputWithPast, "logits", CACHE)
_base_output = builder(BaseModelOutputWithPast, "last_hidden_state", CACHE)


class State:
    """What all handles of one patched model share: the options, the back ends and the counters.

    `backends` run whole models, `layer_backends` layers; `error` says why all calls run stock,
    where they do; `every_row`: an encoder computes padding too.
    """

    def __init__(
        self,
        family: Family,
        fusion: str,
        name: str,
        strict: bool,
        backends,
        layer_backends,
        error,
        packed: bool | None = None,
        every_row: bool = False,
    ):
        self.family, self.fusion, self.name, self.strict = family, fusion, name, strict
        self.packed, self.every_row = packed, every_row
        self.backends, self.layer_backends, self.error = backends, layer_backends, error
        self.stats = Stats()
        renew_in_child(self, "lock", threading.RLock)

    def __deepcopy__(self, memo: dict) -> State:
        return State(
            self.family,
            self.fusion,
            self.name,
            self.strict,
            self.backends,
            self.layer_backends,
            self.error,
            self.packed,
            self.every_row,
        )


class Handle:
    """What a patched module keeps: state, level, binding, and the forward it displaced."""

    def __init__(self, state: State, level: str, previous: Callable | None = None):
        self.state, self.level, self.previous = state, level, previous
        self.binding: Any = None

    def __deepcopy__(self, memo: dict) -> Handle:
        import copy

        return Handle(
            copy.deepcopy(self.state, memo), self.level, copy.deepcopy(self.previous, memo)
        )

    def __reduce__(self) -> tuple:
        """A pickled model comes back unpatched, with a sentence in place of the handle."""
        return str, (UNPICKLED,)

    @staticmethod
    def _backend(backends: Any, module: nn.Module) -> Any:
        """The back end for where a module lies, before anything is bound."""
        if streams.capturing():
            raise FusionError(
                Reason.CAPTURING, "the model is not bound, or has changed; expected a call before"
            )
        first = next(module.parameters(), None)
        return backends.of(first.device if first is not None else torch.device("cpu"))

    def layer_binding(self, layer: nn.Module) -> LayerBinding:
        """The layer's binding, made again where needed; FusionError where it cannot be."""
        binding = self.binding
        if binding is not None and binding.intact():
            return binding
        backend = self._backend(self.state.layer_backends, layer)
        with self.state.lock:
            if self.binding is not binding and self.binding is not None and self.binding.intact():
                return self.binding  # another thread was faster
            self.binding = None
            state = self.state
            binding = LayerBinding(state.family, layer, backend, state.packed)
            self.binding = binding
        return binding

    def model_binding(self, module: nn.Module) -> ModelBinding:
        """The binding of a base model or of a model with a head, like `layer_binding`."""
        binding = self.binding
        if binding is not None and binding.intact():
            return binding
        state, lm = self.state, module if self.level == CAUSAL_LM else None
        backend = self._backend(state.backends, module)
        with state.lock:
            if self.binding is not binding and self.binding is not None and self.binding.intact():
                return self.binding
            self.binding = None
            base = getattr(module, module.base_model_prefix) if lm is not None else module
            layers = []
            for index, layer in enumerate(state.family.parts(base).layers):
                handle = vars(layer).get(KEY)
                if type(handle) is not Handle or handle.state is not state:
                    raise FusionError(
                        Reason.FORWARD_REPLACED, f"layer {index} is not patched with the model"
                    )
                layers.append(handle.layer_binding(layer))
            binding = ModelBinding(state.family, base, lm, layers, backend)
            self.binding = binding
        return binding


class _Refused:
    """The outermost forward of a thread that was refused and runs stock, and what ran inside it."""

    __slots__ = ("state", "fused", "refused")

    def __init__(self, state: State):
        self.state, self.fused, self.refused = state, 0, {}


def _count(state: State, level: str, calls: int = 1) -> None:
    state.stats.count(level, calls)
    outer = getattr(_local, "refused", None)
    if outer is not None and outer.state is state:
        outer.fused += calls


def _level_of(rows: int) -> str:
    return "step" if rows <= STEP_ROWS else "prefill"


def _bound(handle: Handle, module: nn.Module) -> ModelBinding:
    """The binding to run a whole model by now; FusionError where that cannot be."""
    if handle.state.error is not None:
        raise handle.state.error
    check_environment()
    if module.training:
        raise FusionError(Reason.TRAINING, "the model is in training mode")
    binding = handle.model_binding(module)
    check_autocast(binding.device)
    return binding


def _reserve(binding: ModelBinding, slots: list, batch: int, tokens: int) -> None:
    layout = Layout(batch, binding.kv_heads, binding.head_dim, binding.dtype, binding.device)
    for slot in slots:
        slot.reserve(layout, tokens)


def _run_model(handle: Handle, module: nn.Module, call: dict[str, Any]) -> Any:
    """A whole model in one call of the back end; FusionError before anything has happened."""
    state, binding = handle.state, _bound(handle, module)
    if state.family.encoder is not None:
        return _run_encoder(handle, binding, module, call)
    ids, embeds, cache, slots, mask, positions, keep, rows = read_model_call(
        binding, call, vars(module.config)
    )
    if cache is not None:
        _reserve(binding, slots, *(embeds if ids is None else ids).shape[:2])
    hidden, logits = binding.backend.decode(
        binding.native, ids, embeds, slots, mask, positions, binding.rope, keep
    )
    _count(state, _level_of(rows))
    return _base_output(hidden, cache) if logits is None else _causal_lm_output(logits, cache)


def native_steps(
    module: nn.Module,
    steps: int,
    call: dict[str, Any],
    sampler: Sampler,
    uniforms: torch.Tensor | None,
) -> torch.Tensor | None:
    """Tokens (B, steps) of as many calls of a causal LM in one call of its back end: each reads the
    token that `sampler` takes of the logits of the one before, at positions one further.

    `call`: the arguments of the first, with input_ids (B, 1), a cache, and a mask of the keys of
    all. `uniforms`: (B, steps) fp64, contiguous, where tokens are drawn. None where that cannot be:
    a model that is not patched as a whole, whose calls something else sees, or whose back end has
    no such call or would refuse one of them.
    """
    handle, forward = vars(module).get(KEY), vars(module).get("forward")
    if type(handle) is not Handle or handle.level != CAUSAL_LM or _is_compiling():
        return None
    ours = forward_for(type(module), CAUSAL_LM, False)
    if getattr(forward, "__func__", None) is not ours or is_overheard(module):
        return None
    try:
        binding = _bound(handle, module)
        run = getattr(binding.backend, "steps", None)
        if run is None:
            return None
        read = read_model_call(binding, call, vars(module.config))
        _reserve(binding, read.slots, read.rows, steps)
        where = read.ids, read.slots, read.mask, read.positions, binding.rope
        tokens = run(binding.native, *where, steps, sampler, uniforms)
    except FusionError:
        return None
    _count(handle.state, _level_of(read.rows), steps)
    return tokens


def _run_encoder(handle: Handle, binding: ModelBinding, module: nn.Module, call: dict) -> Any:
    state, encoder = handle.state, handle.state.family.encoder
    x, mask, owned = read_encoder_call(
        binding, call, vars(module.config), encoder, state.every_row
    )
    if not owned:  # what sees the embeddings may have changed layers
        binding = handle.model_binding(module)
        x = check_hidden("the embeddings", x, binding)
    hidden = binding.backend.encode(binding.native, x, mask, owned)
    _count(state, "encode")
    return encoder.finish(module, hidden)


def _run_layer(handle: Handle, layer: nn.Module, call: dict[str, Any]) -> torch.Tensor:
    """One layer, as far as the rung goes by the back end and the rest by torch."""
    state = handle.state
    if state.error is not None:
        raise state.error
    check_environment()
    if layer.training:
        raise FusionError(Reason.TRAINING, "the layer is in training mode")
    binding = handle.layer_binding(layer)
    check_autocast(binding.device)
    if state.family.encoder is not None:
        x, slot, mask, rope = read_encoder_layer_call(binding, call)
    else:
        x, slot, mask, rope = read_layer_call(binding, call, state.family.cache_argument)
    if slot is not None:
        heads = binding.spec.attention
        layout = (x.shape[0], heads.kv_heads, heads.head_dim, binding.dtype, binding.device)
        slot.reserve(Layout(*layout), x.shape[1])
    stage = STAGES[state.fusion]
    out = binding.backend.block(binding.block, stage, x, slot, mask, None, rope)
    if stage == "attention":
        out = finish_attention(binding.spec, binding.tensors, x, out)
    elif stage == "attention+up":
        out = finish_up(binding.spec, binding.tensors, x, *out)
    _count(state, "layer")
    return out


def _check_strict(handle: Handle, module: nn.Module, refusal: FusionError) -> None:
    """Raises where strict forbids what would follow: stock code in a layer."""
    if handle.level == LAYER or handle.state.error is not None:
        raise refusal
    base = getattr(module, module.base_model_prefix) if handle.level == CAUSAL_LM else module
    check_environment()
    for layer in handle.state.family.parts(base).layers:
        layer_handle = vars(layer).get(KEY)
        if type(layer_handle) is not Handle or layer.training:
            raise refusal
        binding = layer_handle.layer_binding(layer)
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in binding.tensors
        ):
            raise refusal


def _delegate(handle: Handle, module: nn.Module, refusal: FusionError, stock: Callable) -> Any:
    """Runs what was there before and counts once, for the outermost forward."""
    state = handle.state
    if state.strict:
        _check_strict(handle, module, refusal)
    outer = getattr(_local, "refused", None)
    if outer is not None and outer.state is state:
        if handle.level == LAYER:
            outer.refused[refusal.reason] = refusal
        return stock()
    here = _local.refused = _Refused(state)
    try:
        return stock()
    finally:
        _local.refused = outer
        if here.fused:
            state.stats.downgrade(refusal)
            for inner in here.refused.values():
                state.stats.refuse(inner)
        else:
            state.stats.refuse(refusal)


def _arguments(names: tuple[str, ...], args: tuple, kwargs: dict) -> dict[str, Any]:
    """Positional and keyword arguments as one dict."""
    if not args:
        return kwargs
    if len(args) > len(names):
        raise FusionError(
            Reason.ARGUMENT, f"{len(args)} positional arguments, expected at most {len(names)}"
        )
    call = dict(zip(names, args, strict=False))
    if call.keys() & kwargs.keys():
        raise FusionError(Reason.ARGUMENT, "an argument is given twice")
    call.update(kwargs)
    return call


@functools.cache
def forward_for(cls: type, level: str, wrap_only: bool) -> Callable:
    """The function to install as forward of a class; it carries the class's signature."""
    original = cls.forward
    parameters = list(inspect.signature(original).parameters.values())[1:]
    names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    run = _run_layer if level == LAYER else _run_model

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        handle = vars(self).get(KEY)
        if type(handle) is not Handle or _is_compiling():
            return type(self).forward(self, *args, **kwargs)
        try:
            return run(handle, self, _arguments(names, args, kwargs))
        except FusionError as error:
            refusal = error
        previous = handle.previous or MethodType(type(self).forward, self)
        return _delegate(handle, self, refusal, lambda: previous(*args, **kwargs))

    @functools.wraps(original)
    def wrapped(self, *args, **kwargs):
        handle = vars(self).get(KEY)
        if type(handle) is not Handle or _is_compiling():
            return type(self).forward(self, *args, **kwargs)
        handle.state.stats.count("wrapped")
        if handle.previous is not None:
            return handle.previous(*args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    chosen = wrapped if wrap_only else forward
    chosen.hf_fusion_level = level
    return chosen
