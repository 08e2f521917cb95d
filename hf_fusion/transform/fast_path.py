"""torch's fast path of nn.MultiheadAttention and nn.TransformerEncoder, while a model is captured.

It runs a whole layer as one operator, which hides what the layer does, so it is off. Two things
that it does are results, and the graph does them too. nn.TransformerEncoder takes padding out of
its input (enable_nested_tensor, its default) and puts zeros behind its last layer. A float mask
hides wherever it is not zero, where a layer as separate operators adds it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SIGNATURE = inspect.signature(nn.TransformerEncoder.forward)
_MASKS = ("mask", "src_mask", "src_key_padding_mask")  # of an encoder and of its layers


@contextlib.contextmanager
def without_fast_path(model: nn.Module) -> Iterator[None]:
    """The model's layers as separate operators, with the values that the fast path gives."""
    before = torch.backends.mha.get_fastpath_enabled()
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    hiding = _hiding(model, encoders) if before else []
    hooks = [module.register_forward_pre_hook(_hide, with_kwargs=True) for module in hiding]
    hooks += [hook for encoder in encoders for hook in _zeros_behind(encoder)]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        for hook in hooks:
            hook.remove()


def _hiding(model: nn.Module, encoders: list) -> list[nn.Module]:
    """The encoders whose layers torch runs fast, and such layers elsewhere."""
    whole = [
        encoder for encoder in encoders
        if type(encoder).forward is nn.TransformerEncoder.forward
        and all(map(_is_fast, encoder.layers))
    ]  # fmt: skip
    within = {layer for encoder in whole for layer in encoder.layers}
    return whole + [m for m in model.modules() if m not in within and _is_fast(m)]


def _is_fast(layer: nn.Module) -> bool:
    """Whether it is a layer that torch runs as one operator, given a batch and no gradients."""
    if getattr(type(layer), "forward", None) is not nn.TransformerEncoderLayer.forward:
        return False
    attention = layer.self_attn
    return bool(
        attention.batch_first
        and attention.in_proj_bias is not None
        and attention._qkv_same_embed_dim
        and attention.num_heads % 2 == 0
        and layer.activation_relu_or_gelu
        and layer.norm1.eps == layer.norm2.eps
        and not any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules())
    )


def _hide(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """The call with float masks that hide wherever they are not zero."""
    given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    floats = [n for n in _MASKS if given.get(n) is not None and given[n].is_floating_point()]
    if not floats or given["src"].dim() != 3:
        return None
    for name in floats:
        given[name] = given[name].masked_fill(given[name] != 0, float("-inf"))
    return (), {name: value for name, value in given.items() if name != "self"}


def _zeros_behind(encoder: nn.TransformerEncoder) -> list[Any]:
    """Hooks by which the last layer's output is zero where the encoder's input is padding."""
    if not getattr(encoder, "use_nested_tensor", False) or not len(encoder.layers):
        return []
    padding: list[Tensor | None] = [None]

    def remember(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = _SIGNATURE.bind(module, *args, **kwargs).arguments
        batched = given["src"].dim() == 3 and given.get("mask") is None
        padding[0] = given.get("src_key_padding_mask") if batched else None

    def write(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if padding[0] is None:
            return output
        hidden = padding[0].bool()  # a float mask is 0 where a key is seen
        # tokens behind padding keep their values: torch then does not take it out
        at_the_end = (hidden[:, 1:] >= hidden[:, :-1]).all()
        return output.masked_fill((hidden & at_the_end)[..., None], 0.0)

    def forget(module: nn.Module, args: tuple, output: Tensor) -> None:
        padding[0] = None

    return [
        encoder.register_forward_pre_hook(remember, with_kwargs=True),
        encoder.layers[-1].register_forward_hook(write),
        encoder.register_forward_hook(forget),
    ]
