"""One operator that says what an attention is: `torch.ops.hf_fusion.attention`.

    y = dropout(softmax(cap(q k^T * scale) + bias, masked by mask, causal, window, with sinks)) v

q (B, H, Q, D), k (B, G, K, D), v (B, G, K, E), with G a divisor of H: query head h reads key and
value head h // (H / G). mask broadcasts to (B, H, Q, K): bool, true where a query may look, or of
floating type, added to the scores; bias is added as well. causal: query i sees keys 0 .. i. window
w > 0: query i sees no key before i - w + 1. softcap c > 0: cap(s) = c tanh(s / c). sinks (H): one
more score per row, whose probability is dropped. y is (B, Q, H, E) and contiguous, the layout the
output projection reads.

The operator is composite: whatever runs it sees the library operators inside, so nothing that it
does hides from a counter or from autograd. `library_attention` is what runs, `explicit_attention`
the same as the definition spells it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, Tensor? bias=None, "
    "Tensor? sinks=None, *, float? scale=None, bool causal=False, int window=0, "
    "float softcap=0.0, float dropout=0.0) -> Tensor"
)
_library = torch.library.Library("hf_fusion", "DEF")
_library.define(SCHEMA)


def _grouped(tensor: Tensor, heads: int) -> Tensor:
    """Keys or values (B, G, K, D) with every head repeated for the query heads that read it."""
    groups = tensor.shape[1]
    return tensor if groups == heads else tensor.repeat_interleave(heads // groups, dim=1)


def _visible(query: Tensor, key: Tensor, causal: bool, window: int) -> Tensor | None:
    """Bool (Q, K): the keys that causality and window leave; None where they leave all."""
    if not causal and window <= 0:
        return None
    rows = torch.arange(query.shape[2], device=query.device)[:, None]
    columns = torch.arange(key.shape[2], device=query.device)[None, :]
    seen = columns <= rows if causal else None
    if window > 0:
        near = columns > rows - window
        seen = near if seen is None else seen & near
    return seen


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as something to add; finite, so that a row without any key stays a number."""
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    dropout: float = 0.0,
) -> Tensor:
    """The operator as matmul, scale, mask, softmax, dropout, matmul, merge."""
    heads = query.shape[1]
    key, value = _grouped(key, heads), _grouped(value, heads)
    scores = torch.matmul(query, key.transpose(2, 3))
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    for added in (bias, mask, _visible(query, key, causal, window)):
        if added is not None:
            scores = scores + _as_bias(added, scores.dtype)
    if sinks is not None:
        extra = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat((scores, extra.to(scores.dtype)), dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if sinks is not None:
        weights = weights[..., :-1]
    if dropout > 0:
        weights = drop(weights, dropout, True)
    return torch.matmul(weights, value).transpose(1, 2).contiguous()


def library_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    dropout: float = 0.0,
) -> Tensor:
    """The operator through scaled_dot_product_attention; spelled out with a soft cap or sinks."""
    if softcap > 0 or sinks is not None:
        return explicit_attention(
            query, key, value, mask, bias, sinks, scale=scale, causal=causal, window=window,
            softcap=softcap, dropout=dropout,
        )  # fmt: skip
    added = mask
    # of sizes that are free in a graph nothing is asked that would hold it to the answer
    square = statically_known_true(query.shape[2] == key.shape[2])
    whole = window <= 0 or statically_known_true(window >= key.shape[2])
    if mask is not None or bias is not None or not whole or not square:
        seen = _visible(query, key, causal, window)
        if seen is not None:
            boolean = added is None or added.dtype == torch.bool
            both = added is not None and boolean
            added = (added & seen) if both else seen if added is None else (
                added + _as_bias(seen, added.dtype)
            )  # fmt: skip
        causal = False
    if bias is not None:
        added = bias if added is None else bias + _as_bias(added, bias.dtype)
    if added is not None and added.dtype != torch.bool:
        added = added.to(query.dtype)
    heads, groups = query.shape[1], key.shape[1]
    if heads != groups and added is not None:
        key, value = _grouped(key, heads), _grouped(value, heads)
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=added, dropout_p=dropout, is_causal=causal, scale=scale,
        enable_gqa=key.shape[1] != heads,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous()


_library.impl("attention", library_attention, "CompositeImplicitAutograd")
attention = torch.ops.hf_fusion.attention.default
