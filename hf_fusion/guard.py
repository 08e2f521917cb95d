"""What a single call must look like to run fused.

Every check raises FusionError with the reason. Nothing visible has changed by then: at most the
layers of a cache have become growable ones with the same content.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext
from transformers.cache_utils import DynamicCache

from .arguments import (
    check_cache_position,
    check_dense,
    check_encoder_mask,
    check_gradients,
    check_hidden,
    check_ids,
    check_mask,
    check_model_mask,
    check_positions,
    check_rope,
)
from .binding import LayerBinding, ModelBinding
from .cache import CACHE, OLD_NAME
from .registry import EncoderCalls
from .report import FusionError, Reason
from .slots import StaticSlot, common_length, upgrade

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # no collector, no captured outputs
    _active_collector = None

_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state
_autocast = torch.is_autocast_enabled

# num_items_in_batch, which Trainer passes down, is for losses alone; the tokenizers, which stop
# strings need, generate() passes down for nothing
_MODEL_ARGUMENTS = {
    "input_ids", "attention_mask", "position_ids", "inputs_embeds", CACHE, OLD_NAME, "use_cache",
    "return_dict", "output_attentions", "output_hidden_states", "is_causal", "labels",
    "logits_to_keep", "cache_position", "num_items_in_batch", "tokenizer", "assistant_tokenizer",
}  # fmt: skip
_LAYER_ARGUMENTS = {
    "hidden_states", "attention_mask", "position_ids", "use_cache", "position_embeddings",
    "output_attentions", "output_hidden_states", "is_causal", "cache_position",
    "num_items_in_batch", "tokenizer", "assistant_tokenizer",
}  # fmt: skip


def check_environment() -> None:
    """Raises FusionError where a mode or transform of torch is active."""
    if _function_modes() or _dispatch_modes() or _autocast("cpu") or _functorch() is not None:
        _explain_environment()
    if _tracing() is not None:
        raise FusionError(Reason.TRACING, "torch.jit is tracing")
    if forward_ad._current_level >= 0:
        raise FusionError(Reason.GRADIENTS, "a level of forward-mode differentiation is open")


def _explain_environment() -> None:
    if _functorch() is not None:
        raise FusionError(Reason.FUNCTORCH, "a functorch transform is active")
    if _autocast("cpu"):
        raise FusionError(Reason.AUTOCAST, "autocast is enabled for the CPU")
    if _dispatch_modes():
        raise FusionError(Reason.TORCH_MODE, "a torch dispatch mode is active")
    for mode in torch.overrides._get_current_function_mode_stack():
        # a default device of cpu changes nothing here
        if type(mode) is not DeviceContext or mode.device.type != "cpu":
            raise FusionError(
                Reason.TORCH_MODE, f"a torch function mode is active: {type(mode).__name__}"
            )


def check_autocast(device: torch.device) -> None:
    """Raises FusionError where autocast is enabled for a `device` other than the CPU."""
    if device.type != "cpu" and _autocast(device.type):
        raise FusionError(Reason.AUTOCAST, f"autocast is enabled for {device.type}")


def captured_outputs() -> dict:
    """What transformers is collecting right now, by name; empty where nothing."""
    return (_active_collector.get() if _active_collector is not None else None) or {}


class ModelCall(NamedTuple):
    """A call of a whole model that may run; ids (B, q) or embeds (B, q, hidden) are given."""

    ids: torch.Tensor | None
    embeds: torch.Tensor | None
    cache: Any
    slots: list
    mask: torch.Tensor | None
    positions: torch.Tensor | None
    keep: int
    rows: int


def read_model_call(binding: ModelBinding, call: dict[str, Any], config: dict) -> ModelCall:
    """The call as a back end takes it; `config`: __dict__ of the called model's configuration."""
    get = call.get
    if not call.keys() <= _MODEL_ARGUMENTS:
        _check_unknown(call, _MODEL_ARGUMENTS)
    if get("labels") is not None:
        raise FusionError(Reason.LABELS, "labels are given")
    _check_outputs(call, vars(binding.config))
    _check_return_dict(call, config)
    ids, embeds = get("input_ids"), get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise FusionError(Reason.INPUT, "expected exactly one of input_ids and inputs_embeds")
    if embeds is None:
        ids = check_ids(ids, binding.device)
        batch, queries = ids.shape
    else:
        embeds = check_hidden("inputs_embeds", embeds, binding)
        batch, queries = embeds.shape[:2]
    keep = get("logits_to_keep", 0)
    if type(keep) is not int or keep < 0:
        raise FusionError(
            Reason.ARGUMENT, f"logits_to_keep is {keep!r}, expected an integer of at least 0"
        )
    if torch.is_grad_enabled():
        check_gradients([*binding.watch.tensors, embeds, get("attention_mask")])

    cache = get(CACHE, get(OLD_NAME))
    if cache is None:
        use_cache = get("use_cache")
        if use_cache if use_cache is not None else vars(binding.config).get("use_cache"):
            cache = DynamicCache(config=binding.config)
    binding.backend.check_call(batch, queries, cache)
    if cache is None:
        slots, past = [None] * binding.count, 0
    else:
        slots = upgrade(cache, 0, binding.count, not binding.backend.asynchronous)
        past = common_length(slots)
    if get("cache_position") is not None:
        check_cache_position(call["cache_position"], past, queries, binding)
    positions = get("position_ids")
    if positions is not None:
        positions = check_positions(positions, batch, queries, binding.device)
    mask = get("attention_mask")
    if mask is not None:
        mask = check_model_mask(mask, batch, queries, past, binding, cache, slots)
    elif (
        cache is None
        and positions is not None
        and queries > 1
        and bool((positions.diff() != 1).any())
    ):
        raise FusionError(
            Reason.PACKED,
            "position_ids restart inside a row, which packs several sequences into it",
        )
    return ModelCall(
        ids, embeds, cache, slots, mask, positions, min(keep, queries), batch * queries
    )


class EncoderCall(NamedTuple):
    """A call of a whole encoder that may run.

    mask: None, (B, S), or (B, 1, 1, S) where everything is computed, padding too: where a sequence
    starts with it, since poolers and heads read the first position, and under heads that score
    every position. owned: the result may take the place of x.
    """

    x: torch.Tensor
    mask: torch.Tensor | None
    owned: bool


_ENCODER_ARGUMENTS = {
    "attention_mask", "return_dict", "output_attentions", "output_hidden_states", "is_causal",
    "use_cache", "num_items_in_batch",
}  # fmt: skip


def read_encoder_call(
    binding: ModelBinding,
    call: dict[str, Any],
    config: dict,
    encoder: EncoderCalls,
    every_row: bool = False,
) -> EncoderCall:
    """The call as a back end takes it, its embeddings made by the model's own module; `every_row`:
    padding is computed.
    """
    known = _ENCODER_ARGUMENTS | set(encoder.arguments)
    if not call.keys() <= known:
        _check_unknown(call, known)
    _check_outputs(call, vars(binding.config), causal=False)
    _check_return_dict(call, config)
    mask = call.get("attention_mask")
    if mask is not None:
        check_dense("attention_mask", mask, 2, binding.device)
    if torch.is_grad_enabled():
        check_gradients([*binding.base.parameters(), *call.values()])
        if not encoder.owned(binding.base):
            raise FusionError(
                Reason.GRADIENTS,
                "gradients are enabled, and what sees the embeddings may require them",
            )
    if call.get(encoder.arguments[0]) is None and call.get("inputs_embeds") is None:
        raise FusionError(Reason.INPUT, f"{encoder.arguments[0]} is None")
    x = encoder.embed(binding.base, call)
    x = check_hidden("the embeddings", x, binding)
    if torch.is_grad_enabled():
        check_gradients([x])
    if mask is not None:
        if tuple(mask.shape) != tuple(x.shape[:2]):
            raise FusionError(
                Reason.MASK,
                f"attention_mask has shape {tuple(mask.shape)}, expected {tuple(x.shape[:2])}",
            )
        mask = mask != 0
        if (every_row and not bool(mask.all())) or bool((mask.any(1) & ~mask[:, 0]).any()):
            mask = mask[:, None, None, :]
    return EncoderCall(x, mask, encoder.owned(binding.base))


def _check_unknown(call: dict, known: set) -> None:
    for name in call.keys() - known:
        if call[name] is not None:
            raise FusionError(
                Reason.ARGUMENT, f"argument {name} is given, which no fused forward takes"
            )


def _check_return_dict(call: dict, config: dict) -> None:
    asked = call.get("return_dict")
    if not (config.get("return_dict", True) if asked is None else asked):
        raise FusionError(Reason.RETURN_TUPLE, "a tuple is asked for in place of a model output")


def _check_outputs(call: dict, config: dict, causal: bool = True) -> None:
    """Refuses where attentions or hidden states are wanted, or attention is not `causal`."""
    get = config.get
    attentions = call.get(
        "output_attentions", get("_output_attentions") or get("output_attentions")
    )
    hidden_states = call.get("output_hidden_states", get("output_hidden_states"))
    if attentions or hidden_states or captured_outputs():
        raise FusionError(Reason.OUTPUTS, "attentions or hidden states are asked for")
    _check_causal(call.get("is_causal", get("is_causal")), causal)


def _check_causal(given: Any, causal: bool) -> None:
    if given not in (None, causal):
        raise FusionError(
            Reason.NOT_CAUSAL if causal else Reason.NOT_ENCODER,
            f"is_causal is {given!r}, expected {causal}",
        )


class LayerCall(NamedTuple):
    """A call of one layer that may run: x (B, q, hidden), cos and sin (B|1, q, rotary_dim)."""

    x: torch.Tensor
    slot: Any
    mask: torch.Tensor | None
    rope: tuple[torch.Tensor, torch.Tensor] | None


def read_layer_call(binding: LayerBinding, call: dict[str, Any], cache_argument: str) -> LayerCall:
    """The call as a back end takes it."""
    get = call.get
    cache = get(cache_argument)
    if not call.keys() <= _LAYER_ARGUMENTS:
        _check_unknown(call, _LAYER_ARGUMENTS | {cache_argument})
    if get("output_attentions") or "attentions" in captured_outputs():
        raise FusionError(Reason.OUTPUTS, "attentions are asked for")
    _check_causal(get("is_causal"), True)
    _check_causal(vars(binding.config).get("is_causal"), True)
    x = check_hidden("hidden_states", get("hidden_states"), binding)
    mask, rope = get("attention_mask"), get("position_embeddings")
    batch, queries = x.shape[:2]
    check_rope(rope, batch, queries, binding)
    if torch.is_grad_enabled():
        check_gradients([x, mask, *rope, *binding.tensors])
    binding.backend.check_call(batch, queries, cache)
    slot, past = None, 0
    if cache is not None:
        counted = not binding.backend.asynchronous
        slot = upgrade(cache, binding.cache_index, 1, counted)[0]
        past = slot.length
    static = type(slot) is StaticSlot
    if get("cache_position") is not None:
        check_cache_position(call["cache_position"], past, queries, binding)
    if mask is not None:
        check_mask(mask, batch, queries, past, binding, slot)
    elif (queries > 1 and (past or binding.implementation == "eager")) or (static and queries == 1):
        raise FusionError(
            Reason.MASK, "attention_mask is None where that does not mean a causal mask"
        )
    return LayerCall(x, slot, mask, rope)


def read_encoder_layer_call(binding: LayerBinding, call: dict[str, Any]) -> LayerCall:
    """The call of an encoder's layer as a back end takes it; position_ids mean nothing to it."""
    get = call.get
    if not call.keys() <= _LAYER_ARGUMENTS:
        _check_unknown(call, _LAYER_ARGUMENTS)
    if get("output_attentions") or "attentions" in captured_outputs():
        raise FusionError(Reason.OUTPUTS, "attentions are asked for")
    _check_causal(get("is_causal"), False)
    _check_causal(vars(binding.config).get("is_causal"), False)
    x = check_hidden("hidden_states", get("hidden_states"), binding)
    mask = get("attention_mask")
    if torch.is_grad_enabled():
        check_gradients([x, mask, *binding.tensors])
    if mask is not None:
        check_encoder_mask(mask, *x.shape[:2], binding)
    return LayerCall(x, None, mask, None)
