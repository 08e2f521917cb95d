"""torch's fast path of nn.MultiheadAttention and nn.TransformerEncoder, while a model is captured.

It runs a whole layer as one operator, which hides what the layer does, so it is off. One thing that
it does is a result: nn.TransformerEncoder takes padding out of its input (enable_nested_tensor,
its default) and puts zeros behind its last layer. The graph writes them too.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SIGNATURE = inspect.signature(nn.TransformerEncoder.forward)


@contextlib.contextmanager
def without_fast_path(model: nn.Module) -> Iterator[None]:
    """The model's layers as separate operators, with the values that the fast path gives."""
    before = torch.backends.mha.get_fastpath_enabled()
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    hooks = [hook for encoder in encoders for hook in _zeros_behind(encoder)]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        for hook in hooks:
            hook.remove()


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
