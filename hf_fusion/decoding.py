"""generate()'s greedy search and sampling with several tokens in one native call: a callable for
its `custom_generate`.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    MaxLengthCriteria,
    StaticCache,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GENERATION_MODES_MAPPING

from .cache import CACHE, GrowableLayer
from .forwards import KEY, Handle
from .generation import Loop
from .report import FusionError, Reason
from .sampling import Sampler

_CHECK_EVERY = 16  # tokens between two looks at the ends of rows
_ARGUMENTS = {
    "attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep",
    "cache_position",  # before transformers 5.4: of the prompt, counting on from the cache
}  # fmt: skip
# how generate() turns its state into a call, and the call's outputs into its state
_METHODS = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
_LAYERS = {DynamicCache: {DynamicLayer, GrowableLayer}, StaticCache: {StaticLayer}}
# whether generate() marks a cache that the caller has given; before, any may be the caller's
_MARKS = "_is_user_defined" in inspect.unwrap(
    GenerationMixin._prepare_cache_for_generation
).__code__.co_names
_RECORDS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# in the order in which generate() applies them, each with the Sampler's argument that it carries
_WARPERS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
}


class _Plan(NamedTuple):
    """What a Loop needs of a call of generate()."""

    sampler: Sampler
    steps: int
    eos: list[int]
    past: int


def _refuse(message: str) -> None:
    raise FusionError(Reason.ARGUMENT, f"{message}: generate() decodes token by token")


def _sampler(mode: GenerationMode, processors: Any) -> Sampler:
    drawn, options = mode is GenerationMode.SAMPLE, {}
    if not drawn and mode is not GenerationMode.GREEDY_SEARCH:
        _refuse(f"the generation mode is {mode.value}")
    known = list(_WARPERS) if drawn else []
    for processor in processors:
        kind = type(processor)
        if kind not in known or getattr(processor, "filter_value", -torch.inf) != -torch.inf:
            _refuse(f"a logits processor is a {kind.__name__}")
        if getattr(processor, "min_tokens_to_keep", 1) != 1:
            _refuse(f"min_tokens_to_keep is {processor.min_tokens_to_keep}")
        known = known[known.index(kind) + 1 :]
        options[_WARPERS[kind]] = getattr(processor, _WARPERS[kind])
    return Sampler(drawn, **options)


def _plan(model, ids: torch.Tensor, processors, criteria, config: Any, call: dict) -> _Plan:
    """FusionError with the reason where generate() has to decode token by token."""
    for name in _METHODS:
        if name in vars(model) or getattr(type(model), name) is not getattr(GenerationMixin, name):
            _refuse(f"{name} is not GenerationMixin's")
    sampler = _sampler(config.get_generation_mode(), processors)
    if ids.device.type != "cpu":
        _refuse(f"the model is on {ids.device}")
    for name in _RECORDS:
        if getattr(config, name):
            _refuse(f"{name} is set")
    for name in call.keys() - _ARGUMENTS:
        if call[name] is not None:
            _refuse(f"{name} is given")
    limit, eos = None, []
    for one in criteria:
        if type(one) is MaxLengthCriteria:
            limit = one.max_length if limit is None else min(limit, one.max_length)
        elif type(one) is EosTokenCriteria:
            eos += one.eos_token_id.tolist()
        else:
            _refuse(f"a stopping criterion is a {type(one).__name__}")
    if limit is None or limit <= ids.shape[1] or ids.numel() == 0:
        _refuse(f"max_length is {limit} for {tuple(ids.shape)} tokens")
    if config.prefill_chunk_size is not None:
        _refuse(f"prefill_chunk_size is {config.prefill_chunk_size}")
    cache, mask = call.get(CACHE), call.get("attention_mask")
    if type(cache) not in _LAYERS or not call.get("use_cache"):
        raise FusionError(
            Reason.CACHE_TYPE,
            f"the cache is a {type(cache).__name__}, expected a DynamicCache or a StaticCache",
        )
    odd = {type(layer) for layer in cache.layers} - _LAYERS[type(cache)]
    if odd:
        raise FusionError(
            Reason.CACHE_TYPE,
            f"a cache layer is a {odd.pop().__name__}, expected DynamicLayer or StaticLayer",
        )
    past = int(cache.get_seq_length())
    length = mask.shape[1] if mask is not None else getattr(config, "_mask_length", ids.shape[1])
    if length != ids.shape[1] or past >= length:
        _refuse(f"{past} of {length} tokens are cached, of which {ids.shape[1]} are given")
    positions = call.get("position_ids")
    if positions is not None and positions.shape[-1] != ids.shape[1]:
        _refuse(f"position_ids have shape {tuple(positions.shape)} for {tuple(ids.shape)} tokens")
    kept = config.return_dict_in_generate or getattr(cache, "_is_user_defined", not _MARKS)
    if kept and eos and (ids.shape[0] > 1 or type(cache) is StaticCache):
        _refuse("the cache is kept, and rows end apart or before it can be cropped")
    return _Plan(sampler, limit - ids.shape[1], eos, past)


@torch.no_grad()
def custom_generate(
    model: nn.Module,
    input_ids: torch.Tensor,
    logits_processor: Any = (),
    stopping_criteria: Any = (),
    generation_config: Any = None,
    inputs_tensor: torch.Tensor | None = None,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """The decoding method of `model.generate(**inputs, custom_generate=hf_fusion.custom_generate)`:
    greedy search and sampling of a patched model with several tokens in one native call.

    Takes what generate() has prepared and returns what its own method would: greedy tokens are the
    same, and drawn ones of the same distribution by other random numbers of torch's generator. What
    needs Python between tokens (other logits processors and stopping criteria, scores, beams, a
    cache other than DynamicCache and StaticCache) is decoded by generate()'s own method, with the
    reason among `downgraded` in stats(model). generate() hands a callable no streamer; to give one,
    pass functools.partial(hf_fusion.custom_generate, streamer=streamer). Nor does it find the
    tokenizer for stop_strings then: give a StopStringCriteria among stopping_criteria.
    """
    prepared = logits_processor, stopping_criteria, generation_config, model_kwargs
    plan, handle = None, vars(model).get(KEY)
    if type(handle) is Handle:
        try:
            plan = _plan(model, input_ids, *prepared)
        except FusionError as refusal:
            handle.state.stats.downgrade(refusal)
    if plan is not None:
        return _run(model, input_ids, plan, generation_config, streamer, model_kwargs)
    return _own_method(model, input_ids, *prepared, inputs_tensor, streamer)


def _run(model, input_ids, plan: _Plan, config: Any, streamer: Any, call: dict) -> Any:
    mask, pad, cache = call.get("attention_mask"), config._pad_token_tensor, call[CACHE]
    loop = Loop(
        model, input_ids, torch.ones_like(input_ids) if mask is None else mask, plan.steps,
        plan.sampler, None, plan.eos, 0 if pad is None else int(pad), streamer, cache,
    )  # fmt: skip
    loop.begin(plan.past, call.get("position_ids"))
    try:
        loop.run(plan.steps, _CHECK_EVERY)
    except BaseException:
        if streamer is not None:  # the cache may go on after what the streamer was given
            _shorten(cache, max(plan.past, loop.streamed))
        raise
    tokens = loop.tokens[:, : loop.length()].clone()
    if type(cache) is DynamicCache:  # a row that ends inside a native call has gone on
        _shorten(cache, tokens.shape[1] - 1)
    if not config.return_dict_in_generate:
        return tokens
    return GenerateDecoderOnlyOutput(sequences=tokens, **{CACHE: cache})


def _shorten(cache: DynamicCache | StaticCache, length: int) -> None:
    """Takes what lies after the first `length` tokens out of a cache."""
    further = int(cache.get_seq_length()) - length
    if further > 0 and type(cache) is DynamicCache:
        cache.crop(-further)
    elif further > 0:
        for layer in cache.layers:
            layer.keys[:, :, length:].zero_()
            layer.values[:, :, length:].zero_()
            layer.cumulative_length.fill_(length)


def _own_method(model, input_ids, processors, criteria, config, call, inputs_tensor, streamer):
    """What generate() would have returned without a callable."""
    mode = config.get_generation_mode()
    method = getattr(type(model), GENERATION_MODES_MAPPING[mode], None)
    if method is None:
        raise FusionError(
            Reason.ARGUMENT, f"the generation mode is {mode.value}, which transformers has no more"
        )
    takes, given = inspect.signature(method).parameters, {}
    if "inputs_tensor" in takes:
        given["inputs_tensor"] = inputs_tensor
    if streamer is not None:
        if "streamer" not in takes:
            raise FusionError(Reason.ARGUMENT, f"a streamer is given for {mode.value}")
        streamer.put(input_ids.cpu())
        given["streamer"] = streamer
    return method(
        model,
        input_ids,
        logits_processor=processors,
        stopping_criteria=criteria,
        generation_config=config,
        **given,
        **call,
    )
