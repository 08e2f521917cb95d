"""Transformers' attention as one operator: a function for AttentionInterface, one for its masks.

While `semantic_attention(model)` holds, every attention of the model that goes through the
interface calls `ops.attention`, and a mask that the caller did not give is not built: what it would
say is in the operator's `causal` and `window`. The configurations and transformers' registries are
as before afterwards.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator

from torch import Tensor, nn

from ..report import FusionError, Reason
from .ops import attention

NAME = "hf_fusion_capture"  # of no implementation that `register_attention` adds
_ABSENT = object()
_capture = threading.local()


def interface_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None | object = _ABSENT,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The operator for one call of the interface; a given mask holds causality and window."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None
    if causal and sliding_window is _ABSENT and getattr(_capture, "windows", None):
        raise FusionError(
            Reason.MASK,
            f"{type(module).__name__} leaves the window of {_capture.windows} to a mask",
        )
    window = sliding_window if isinstance(sliding_window, int) and causal else 0
    out = attention(
        query, key, value, attention_mask, position_bias, s_aux,
        scale=scaling, causal=causal, window=window, softcap=softcap or 0.0, dropout=dropout,
    )  # fmt: skip
    return out, None


def interface_mask(
    *args,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs,
) -> Tensor | None:
    """None where the operator's own arguments say the same, else the bool mask of sdpa.

    Transformers allows the skip only for plain causal, causal with a window, and plain
    bidirectional patterns; a window that looks both ways is not in the operator.
    """
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and not getattr(_capture, "masks", False):
        if allow_is_causal_skip:
            if local_size is not None:
                _capture.windows = sorted({*getattr(_capture, "windows", ()), local_size})
            return None
        if allow_is_bidirectional_skip and local_size is None:
            return None
    return sdpa_mask(
        *args, attention_mask=attention_mask, local_size=local_size, allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False, **kwargs,
    )  # fmt: skip


@contextlib.contextmanager
def _registered() -> Iterator[None]:
    """Both functions are in transformers' registries under `NAME` while this holds."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    registries = [AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping]
    before = [registry.get(NAME, _ABSENT) for registry in registries]
    AttentionInterface.register(NAME, interface_attention)
    AttentionMaskInterface.register(NAME, interface_mask)
    try:
        yield
    finally:
        for registry, found in zip(registries, before, strict=True):
            if found is _ABSENT:
                registry.pop(NAME, None)
            else:
                registry[NAME] = found


def configurations(model: nn.Module) -> list:
    """Every configuration by which a module chooses its attention from the interface, each once.

    The others keep their implementation: their modules would read a mask made for the operator as
    one of their own, a bool mask as something to add.
    """
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if not hasattr(config, "_attn_implementation_internal"):
            continue
        if getattr(module, "_supports_attention_backend", False) or calls_interface(module):
            found[id(config)] = config
    return list(found.values())


@contextlib.contextmanager
def semantic_attention(
    model: nn.Module, masks: bool = False, positions: bool = False
) -> Iterator[bool]:
    """Whether attention of the model is chosen by configuration; it is `NAME` while this holds.

    masks: masks are built even where the operator's arguments say the same. positions: the caller
    gives position ids, which may hold several sequences in a row; otherwise they count up, and
    transformers' test for packed sequences, which it cannot make while tracing, says no.
    """
    configs = configurations(model)
    if not configs:
        yield False
        return
    from transformers import masking_utils

    before = [config._attn_implementation_internal for config in configs]
    test = masking_utils.find_packed_sequence_indices
    _capture.masks, _capture.windows = masks, []
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        if not positions:
            masking_utils.find_packed_sequence_indices = lambda position_ids: None
        with _registered():
            yield True
    finally:
        masking_utils.find_packed_sequence_indices = test
        _capture.masks, _capture.windows = False, []
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


_PROJECTIONS = (
    {"q", "k", "v"}, {"query", "key", "value"}, {"q_proj", "k_proj", "v_proj"}, {"qkv"},
    {"in_proj"}, {"c_attn"}, {"query_key_value"}, {"q_lin", "k_lin", "v_lin"},
)  # fmt: skip


def calls_interface(module: nn.Module) -> bool:
    """Whether the module's forward looks its attention up in transformers' interface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(code, "co_names", ())


def is_attention(module: nn.Module) -> bool:
    """Whether the module is an attention layer: torch's own, one that calls the interface, or one
    with the projections of one.
    """
    if isinstance(module, nn.MultiheadAttention) or calls_interface(module):
        return True
    children = {name for name, child in module.named_children() if hasattr(child, "weight")}
    return any(names <= children for names in _PROJECTIONS)


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Attention layers by module path; a layer inside a layer is its outer one's business."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_attention(module):
            # the inner one holds the computation, as BertSelfAttention does in BertAttention
            for outer in [path for path in found if name.startswith(f"{path}." if path else "")]:
                del found[outer]
            found[name] = module
    return found


def count_attention_layers(model: nn.Module) -> int:
    """Number of attention layers of a model."""
    return len(attention_layers(model))
