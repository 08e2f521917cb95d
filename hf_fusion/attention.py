"""The native attention kernels as attention implementations of transformers.

    hf_fusion.register_attention()
    model.set_attn_implementation("hf_fusion")     # or "hf_fusion_tiled", "hf_fusion_naive"
    print(hf_fusion.attention_stats(model))

A model computes everything else as before. What the kernels do not take runs in transformers' own
sdpa function, counted with its reason. The flash kernel's name does not say so: transformers takes
every name with "flash" in it for a build of the flash-attn package, and asks for that.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .attend import attend, check_operands, share_threads
from .guard import check_autocast, check_environment
from .report import FusionError, Reason, Stats

IMPLEMENTATIONS = {"hf_fusion": "flash", "hf_fusion_tiled": "tiled", "hf_fusion_naive": "naive"}

# Arguments that change the result and that sdpa does not know either: it would ignore them.
_REFUSED = ("softcap", "s_aux", "sinks", "head_mask", "layer_head_mask")
# Arguments that do not change it, which sdpa leaves unread as well.
_UNREAD = {
    "position_ids", "use_cache", "output_hidden_states", "return_dict", "num_items_in_batch",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "logits_to_keep",
    "tokenizer", "assistant_tokenizer",
}  # fmt: skip


class AttentionStats(Stats):
    """Counters of a model's attention layers: calls by kernel, calls that ran in sdpa by reason."""

    LEVELS = tuple(IMPLEMENTATIONS.values())


_counters: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def register_attention(strict: bool = False) -> tuple[str, ...]:
    """Makes the names in `IMPLEMENTATIONS` known to transformers, for this process; returns them.

    They then go into `set_attn_implementation` of any model that follows transformers' attention
    interface: self and cross attention, grouped heads, padding, sliding windows, position biases,
    caches. Attention runs without gradients, on the CPU and, where this build has the kernels, on
    CUDA devices.

    Calls that the kernels do not take run in transformers' sdpa function and are counted
    (`attention_stats`); the first of each reason warns. Those are: dropout above 0, gradients,
    other devices and dtypes, autocast, tensor subclasses, torch modes, tracing and compiling, head
    sizes above 256, values of another head size, attention weights asked for, and causal attention
    without a mask to fewer keys than queries. With `strict`, or HF_FUSION_STRICT=1, they raise
    FusionError. What sdpa would leave out (softcap, attention sinks, head masks) raises always.
    Raises FusionError(Reason.REGISTERED) where others have taken a name.
    """
    strict = strict or os.environ.get("HF_FUSION_STRICT", "") == "1"
    interface, masks = AttentionInterface(), AttentionMaskInterface()
    for name in IMPLEMENTATIONS:
        found = interface.get(name) if name in interface else None
        if found is not None and getattr(found, "func", None) is not _forward:
            raise FusionError(Reason.REGISTERED, f"{name} is registered as {found!r}")
    for name, kernel in IMPLEMENTATIONS.items():
        AttentionInterface.register(name, partial(_forward, kernel, strict))
        if name not in masks:
            AttentionMaskInterface.register(name, sdpa_mask)
    try:
        share_threads()
    except FusionError:
        pass  # the library is absent: every call says so
    return tuple(IMPLEMENTATIONS)


def attention_stats(model: torch.nn.Module) -> AttentionStats:
    """What the attention layers of `model` have run since they were made, added up."""
    total = AttentionStats()
    for module in model.modules():
        with _lock:
            counted = _counters.get(module)
        if counted is None:
            continue
        for level, calls in counted.calls.items():
            total.calls[level] += calls
        for reason, calls in counted.refused.items():
            total.refused[reason] = total.refused.get(reason, 0) + calls
        total.details.update(counted.details)
    return total


def _forward(
    kernel: str,
    strict: bool,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: (batch, heads, tokens, head_dim) in, (batch, tokens, heads,
    head_dim) out.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise FusionError(Reason.ARGUMENT, f"{name} is given, which no kernel applies")
    stock: Callable = partial(
        sdpa_attention_forward, module, query, key, value, attention_mask, dropout=dropout,
        scaling=scaling, is_causal=is_causal, **kwargs,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return stock()
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    try:
        _check(query, key, value, attention_mask, dropout, kwargs)
        out = _run(kernel, query, key, value, attention_mask, scaling, is_causal, kwargs)
    except FusionError as error:
        if strict:
            raise
        _refuse(module, error)
        return stock()
    _counter(module).count(kernel)
    return out, None


def _check(query, key, value, mask, dropout, kwargs) -> None:
    """Raises FusionError for a call that the kernels do not take."""
    if dropout:
        raise FusionError(Reason.TRAINING, f"dropout of {dropout} is applied")
    check_environment()
    check_autocast(query.device)
    bias = kwargs.get("position_bias")
    tensors = [tensor for tensor in (query, key, value, mask, bias) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise FusionError(Reason.GRADIENTS, "gradients are asked for")
    if kwargs.get("output_attentions"):
        raise FusionError(Reason.OUTPUTS, "attention weights are asked for")
    for name, given in kwargs.items():
        known = name in _UNREAD or name in _REFUSED
        if given is not None and not known and name not in (
            "position_bias", "sliding_window", "output_attentions",
        ):  # fmt: skip
            raise FusionError(Reason.ARGUMENT, f"{name} is given, which no kernel knows")
    check_operands(query, key, value)


def _run(kernel, query, key, value, mask, scaling, is_causal, kwargs) -> torch.Tensor:
    queries, keys = query.shape[2], key.shape[2]
    bias = kwargs.get("position_bias")
    causal = bool(is_causal) and mask is None and queries > 1
    if causal and keys > queries:  # a static cache, empty so far: what follows is room
        key, value, keys = key[:, :, :queries], value[:, :, :queries], queries
    if causal and keys < queries:
        raise FusionError(
            Reason.MASK, f"{queries} queries are more than the {keys} keys, and causal"
        )
    if mask is not None:
        mask = mask[..., :keys]
    if bias is not None:
        mask = _with_bias(mask, bias[..., :keys], query.dtype)
    elif mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    window = (kwargs.get("sliding_window") or 0) if causal else 0
    return attend(
        query, key, value, kernel=kernel, mask=mask, causal=causal, window=window, scale=scaling
    )


def _with_bias(mask, bias, dtype) -> torch.Tensor:
    """A position bias and a mask as one additive mask."""
    bias = bias.to(dtype)
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(dtype).min)
    return bias + mask.to(dtype)


def _counter(module: torch.nn.Module) -> AttentionStats:
    with _lock:
        found = _counters.get(module)
        if found is None:
            found = _counters[module] = AttentionStats()
        return found


def _refuse(module: torch.nn.Module, error: FusionError) -> None:
    counter = _counter(module)
    first = error.reason.value not in counter.refused
    counter.refuse(error)
    if first:
        warnings.warn(f"attention runs in transformers' sdpa: {error}", stacklevel=3)
