"""nn.MultiheadAttention as the operations it stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from ..report import FusionError, Reason


class DecomposedMultiheadAttention(nn.Module):
    """Multi-head attention as projections, matmul, scale, masks, softmax, matmul, projection.

    Takes what nn.MultiheadAttention takes and means the same: batch_first or not, kdim and vdim,
    bias_kv, zero attention, bool and float masks per batch or per head, padding, causality,
    averaged or single weights, unbatched input. Returns the output; with need_weights, (output,
    weights). Control flow depends on the construction and on what is None, not on values, except
    for unbatched input (2-D), which no symbolic trace can tell from batched.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim is {embed_dim}, expected a multiple of {num_heads} heads")
        kind = {"device": device, "dtype": dtype}
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.head_dim, self.dropout = embed_dim // num_heads, dropout
        self.batch_first, self.add_zero_attn = batch_first, add_zero_attn
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, **kind)
        self.k_proj = nn.Linear(kdim or embed_dim, embed_dim, bias, **kind)
        self.v_proj = nn.Linear(vdim or embed_dim, embed_dim, bias, **kind)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **kind)
        self.bias_k = self.bias_v = None
        if add_bias_kv:
            self.bias_k = nn.Parameter(torch.zeros(1, 1, embed_dim, **kind))
            self.bias_v = nn.Parameter(torch.zeros(1, 1, embed_dim, **kind))

    @classmethod
    def from_module(cls, module: nn.MultiheadAttention) -> DecomposedMultiheadAttention:
        """The same attention with the same weights: views of the module's own, no copies."""
        with torch.device("meta"):
            made = cls(
                module.embed_dim, module.num_heads, module.dropout, module.in_proj_bias is not None,
                False, module.add_zero_attn, module.kdim, module.vdim, module.batch_first,
            )  # fmt: skip
        if module.in_proj_weight is not None:
            weights = module.in_proj_weight.detach().chunk(3)
        else:
            weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases = (None,) * 3
        if module.in_proj_bias is not None:
            biases = module.in_proj_bias.detach().chunk(3)
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
            _set(getattr(made, name), weight, bias)
        _set(made.out_proj, module.out_proj.weight, module.out_proj.bias)
        if module.bias_k is not None:
            made.bias_k = nn.Parameter(module.bias_k.detach(), module.bias_k.requires_grad)
            made.bias_v = nn.Parameter(module.bias_v.detach(), module.bias_v.requires_grad)
        return made.train(module.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        """query (B, Q, E), or (Q, B, E) without batch_first, or (Q, E); key and value like it.

        key_padding_mask (B, K) and attn_mask (Q, K) or (B * H, Q, K): bool, true where a query may
        not look, or float, added; FusionError for any other. is_causal is a hint, as in torch:
        attn_mask must say it. A query that may look nowhere gives NaN, as torch's weights and its
        fast path do; where torch computes neither, it gives zeros.
        """
        key = query if key is None else key
        value = key if value is None else value
        single = not isinstance(query, torch.fx.Proxy) and query.dim() == 2
        if single:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            # one transpose per tensor, so that projections of one tensor are seen to have one input
            turned = {id(t): t.transpose(0, 1) for t in (query, key, value)}
            query, key, value = (turned[id(t)] for t in (query, key, value))
        q, k, v = self._projected(query, key, value)
        scores = torch.matmul(q, k.transpose(-2, -1)) * self.head_dim**-0.5
        scores = self._masked(scores, attn_mask, key_padding_mask, query.shape[0])
        weights = dropout(torch.softmax(scores, dim=-1), self.dropout, self.training)
        out = torch.matmul(weights, v).transpose(1, 2)
        out = self.out_proj(out.reshape(query.shape[0], query.shape[1], self.embed_dim))
        if single:
            out, weights = out.squeeze(0), weights.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if not need_weights:
            return out
        return out, weights.mean(dim=-3) if average_attn_weights else weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k, v (B, H, tokens, D), with the added token of bias_kv and the zero one."""
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.bias_k is not None:
            k = torch.cat((k, self.bias_k.expand(k.shape[0], -1, -1)), dim=1)
            v = torch.cat((v, self.bias_v.expand(v.shape[0], -1, -1)), dim=1)
        q, k, v = (
            t.reshape(t.shape[0], t.shape[1], self.num_heads, self.head_dim).transpose(1, 2)
            for t in (q, k, v)
        )
        if self.add_zero_attn:
            k, v = (torch.cat((t, torch.zeros_like(t[:, :, :1])), dim=2) for t in (k, v))
        return q, k, v

    def _masked(self, scores: Tensor, mask: Any, padding: Any, batch: Any) -> Tensor:
        extra = (self.bias_k is not None) + self.add_zero_attn
        if not isinstance(scores, torch.fx.Proxy):
            rows, queries, keys = scores.shape[0], scores.shape[2], scores.shape[3] - extra
            each = (rows * self.num_heads, queries, keys)
            _check("attn_mask", mask, (queries, keys), each)
            _check("key_padding_mask", padding, (rows, keys))
        if mask is not None:
            mask = _additive(mask, scores, extra)
            if mask.dim() == 3:
                mask = mask.reshape(batch, self.num_heads, mask.shape[1], mask.shape[2])
            scores = scores + mask
        if padding is not None:
            scores = scores + _additive(padding, scores, extra).unsqueeze(1).unsqueeze(1)
        return scores


class DropIn(DecomposedMultiheadAttention):
    """The same with the defaults and the result of nn.MultiheadAttention, to stand in its place."""

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, *args, **kwargs):
        """(output, weights or None)."""
        result = super().forward(query, key, value, key_padding_mask, need_weights, *args, **kwargs)
        return result if need_weights else (result, None)


def _set(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), bias.requires_grad)


def _check(name: str, mask: Tensor | None, *shapes: tuple) -> None:
    """FusionError for what torch refuses as well, where it would be added in another way."""
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise FusionError(Reason.MASK, f"{name} is {mask.dtype}, expected bool or floating point")
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(str(tuple(map(int, shape))) for shape in shapes)
        raise FusionError(Reason.MASK, f"{name} has shape {tuple(mask.shape)}, expected {wanted}")


def _additive(mask: Tensor, scores: Tensor, extra: int) -> Tensor:
    """A mask to add, with `extra` more keys that everyone sees."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, float("-inf"))
    return nn.functional.pad(mask, (0, extra)) if extra else mask
