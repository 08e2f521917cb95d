"""A block in plain torch, with casts in the order Hugging Face makes them: the definition of right.

Formulas, for x (B, q, hidden) in the model's dtype:
  norm: torch.nn.functional.layer_norm, or x / rms(x) in fp32, cast, times weight
  q, k, v = split(norm1(x) Wqkv^T + b); RoPE on the leading rotary_dim of q and k, cos and sin in
  the model's dtype
  attn(x) = (softmax(q k^T * scale + mask, in fp32) cast to the model's dtype) v, merged over heads,
  Wo^T + b
  mlp(h) = act(norm2(h) Wup^T + b) Wdown^T + b
  parallel: y = mlp(x) + attn + x; sequential: a = attn + x, y = mlp(a) + a
  post-norm: a = norm1(attn + x), y = norm2(mlp(a) + a), with neither norm inside attn and mlp
Query i of a causal call sees the keys 0 .. past + i, as far as the mask allows; otherwise all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional

from .report import FusionError, Reason
from .spec import Activation, BlockSpec, BlockTensors, NormKind, NormSpec, QkvLayout, Residual

# the function of each Activation
ACTIVATIONS = {
    Activation.NONE: lambda x: x,
    Activation.GELU_ERF: functional.gelu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
    Activation.RELU: functional.relu,
    Activation.SILU: functional.silu,
}


class ReferenceBlock(NamedTuple):
    """A layer bound to its parameters."""

    spec: BlockSpec
    tensors: BlockTensors


class ReferenceModel(NamedTuple):
    """Layers with what comes before and after; `head_weight` None: hidden states only."""

    blocks: list[ReferenceBlock]
    embedding: torch.Tensor | None  # (vocab, hidden); None in an encoder
    final_norm: tuple | None  # (NormSpec, weight, bias)
    head_weight: torch.Tensor | None  # (vocab, hidden)
    head_bias: torch.Tensor | None  # (vocab)


def norm(
    spec: NormSpec, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor:
    """LayerNorm or RMSNorm over the last dimension of x."""
    if spec.kind == NormKind.LAYER:
        return functional.layer_norm(x, weight.shape, weight, bias, spec.eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + spec.eps)
    return weight * wide.to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on the leading dimensions of x (B, H, q, head_dim); cos, sin (B|1, q, rotary_dim)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-high, low), dim=-1) * sin, rest), dim=-1)


def project_qkv(
    spec: BlockSpec, t: BlockTensors, h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B, heads, q, head_dim), k and v (B, kv_heads, q, head_dim) from h (B, q, hidden)."""
    heads = spec.attention
    qkv = functional.linear(h, t.qkv_weight, t.qkv_bias)
    if heads.qkv_layout == QkvLayout.PER_HEAD:
        per_head = qkv.view(*qkv.shape[:2], heads.heads, 3 * heads.head_dim).transpose(1, 2)
        return per_head.chunk(3, dim=-1)
    if heads.qkv_layout == QkvLayout.SEPARATE:
        parts = (
            qkv,
            functional.linear(h, t.k_weight, t.k_bias),
            functional.linear(h, t.v_weight, t.v_bias),
        )
    else:
        parts = qkv.split([heads.width, heads.kv_width, heads.kv_width], dim=-1)
    return tuple(
        part.view(*part.shape[:2], -1, heads.head_dim).transpose(1, 2) for part in parts
    )


def scores_mask(
    mask: torch.Tensor | None,
    queries: int,
    keys: int,
    dtype: torch.dtype,
    causal: bool,
    device: torch.device,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(allowed, bias): bool (B|1, 1, queries, keys), and what to add to the scores; or None."""
    past, bias = keys - queries, None
    allowed = None
    if causal and queries > 1:
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(past)[None, None]
    if mask is not None and mask.dim() == 2:
        seen = (mask[:, :keys] != 0)[:, None, None, :]
        allowed = seen if allowed is None else allowed & seen
    elif mask is not None and mask.dtype == torch.bool:
        allowed = mask[..., :keys] if allowed is None else allowed & mask[..., :keys]
    elif mask is not None:
        bias = mask[..., :keys].to(dtype)
    return allowed, bias


def attend(
    spec: BlockSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Context (B, q, heads * head_dim). NaN in a key that no query may see stays there."""
    groups = spec.attention.heads // spec.attention.kv_heads
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    causal = spec.attention.causal
    allowed, bias = scores_mask(mask, q.shape[2], k.shape[2], q.dtype, causal, q.device)
    scores = torch.matmul(q, k.transpose(2, 3)) * spec.attention.scale
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        unseen = ~allowed.any(dim=2)  # (B|1, 1, keys)
        v = v.masked_fill(unseen[..., None], 0)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    context = torch.matmul(weights, v).transpose(1, 2)
    return context.reshape(*context.shape[:2], -1)


class ReferenceBackend:
    """The calls of a back end in plain torch; the formulas are those of the module."""

    name = "reference"
    isa = "torch"
    asynchronous = False

    def check_device(self, device: torch.device) -> None:
        """Weights may be wherever torch computes."""

    def check_call(self, batch: int, queries: int, cache: Any) -> None:
        """Any number of rows runs, with a cache or without."""

    def packed_bytes(self, spec: BlockSpec, dtype: torch.dtype, packed: bool | None) -> int:
        """Bytes of the copies that `bind_block` would make: none."""
        return 0

    def bind_block(
        self, spec: BlockSpec, tensors: BlockTensors, packed: bool | None = False
    ) -> ReferenceBlock:
        """Keeps spec and tensors together; there is nothing to pack."""
        return ReferenceBlock(spec, tensors)

    def bind_model(
        self, blocks, embedding_weight, final_norm, head_weight=None, head_bias=None
    ) -> ReferenceModel:
        """Keeps the parts of a model together; `final_norm` is (NormSpec, weight, bias)."""
        return ReferenceModel(blocks, embedding_weight, final_norm, head_weight, head_bias)

    def block(self, block: ReferenceBlock, stage: str, x, slot, mask, positions, rope) -> Any:
        """Runs one layer on x (B, q, hidden); appends keys and values to `slot`, if not None.

        The caller has reserved room in the slot. Nothing counts as cached before the call has
        succeeded.

        stage "attention": attention output (B, q, hidden). "attention+up": that, plus x with a
        sequential residual, normed with post-norm, and the activated MLP (B, q, mlp width).
        "full": the layer's output (B, q, hidden).
        mask: None, (B, keys) nonzero to attend, (B|1, 1, q, keys) bool or additive. positions:
        int64 (B|1, q) or None to count on from the cache. rope: a RopeTable, or (cos, sin) of
        (B|1, q, rotary_dim), or None without RoPE.
        """
        past = slot.length if slot is not None else 0
        cos_sin = _rope(rope, positions, past, x) if rope is not None else None
        out = self._stage(block, stage, x, slot, mask, cos_sin)
        if slot is not None:
            slot.advance(x.shape[1])
        return out

    def decode(
        self, model: ReferenceModel, ids, embeds, slots, mask, positions, rope, keep
    ) -> tuple:
        """Hidden states or logits for ids (B, q) or embeds (B, q, hidden); appends to the slots.

        Returns (hidden (B, q, hidden), None) without a head, else (None, logits of the last `keep`
        queries; 0: all).
        """
        x = embeds if ids is None else _embed(model.embedding, ids)
        past = slots[0].length if slots and slots[0] is not None else 0
        cos_sin = _rope(rope, positions, past, x)
        queries = x.shape[1]
        for block, slot in zip(model.blocks, slots, strict=True):
            x = self._stage(block, "full", x, slot, mask, cos_sin)
        x = norm(*model.final_norm, x)
        logits = None
        if model.head_weight is not None:
            logits = functional.linear(
                x[:, -keep:] if keep else x, model.head_weight, model.head_bias
            )
        for slot in slots:
            if slot is not None:
                slot.advance(queries)
        return (x, None) if logits is None else (None, logits)

    def encode(self, model: ReferenceModel, x, mask: torch.Tensor | None, owned=False) -> Any:
        """Hidden states (B, S, hidden) of x (B, S, hidden) after all layers and the final norm.

        mask: None, (B, S) nonzero for tokens, or (B|1, 1, S|1, S) as `block` takes it. The result
        is zero where a (B, S) mask says padding. `owned` means nothing here: x stays as it is.
        """
        for block in model.blocks:
            x = self._stage(block, "full", x, None, mask, None)
        if model.final_norm is not None:
            x = norm(*model.final_norm, x)
        if mask is not None and mask.dim() == 2:
            x = x.masked_fill((mask == 0)[..., None], 0)
        return x

    def _stage(self, block: ReferenceBlock, stage: str, x, slot, mask, cos_sin) -> Any:
        spec, t = block
        post = spec.residual == Residual.POST_NORM
        h = x if post else _norm(spec, t, "attention_norm", x)
        q, k, v = project_qkv(spec, t, h)
        if spec.attention.rotary_dim:
            q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
        if slot is not None:
            k, v = _store(slot, k, v)
        attention = functional.linear(attend(spec, q, k, v, mask), t.o_weight, t.o_bias)
        if stage == "attention":
            return attention
        if stage == "full":
            return finish_attention(spec, t, x, attention)
        if spec.residual != Residual.PARALLEL:
            attention = x = _after_attention(spec, t, x, attention)
        return attention, _up(spec, t, x)


def finish_attention(spec: BlockSpec, tensors: BlockTensors, x, attention) -> torch.Tensor:
    """The layer's output from its input and the result of stage "attention"."""
    if spec.residual != Residual.PARALLEL:
        attention = x = _after_attention(spec, tensors, x, attention)
    return finish_up(spec, tensors, x, attention, _up(spec, tensors, x))


def finish_up(spec: BlockSpec, tensors: BlockTensors, x, attention, up) -> torch.Tensor:
    """The layer's output from its input and the result of stage "attention+up"."""
    mlp = functional.linear(up, tensors.down_weight, tensors.down_bias)
    if spec.residual == Residual.PARALLEL:
        return mlp + attention + x
    mlp = mlp + attention
    return _norm(spec, tensors, "mlp_norm", mlp) if spec.residual == Residual.POST_NORM else mlp


def _norm(spec: BlockSpec, t: BlockTensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return norm(getattr(spec, name), getattr(t, f"{name}_weight"), getattr(t, f"{name}_bias"), x)


def _after_attention(spec: BlockSpec, t: BlockTensors, x, attention) -> torch.Tensor:
    attention = attention + x
    post = spec.residual == Residual.POST_NORM
    return _norm(spec, t, "attention_norm", attention) if post else attention


def _up(spec: BlockSpec, t: BlockTensors, x: torch.Tensor) -> torch.Tensor:
    h = x if spec.residual == Residual.POST_NORM else _norm(spec, t, "mlp_norm", x)
    return ACTIVATIONS[spec.mlp.activation](functional.linear(h, t.up_weight, t.up_bias))


def _embed(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    if int(ids.min()) < 0 or int(ids.max()) >= weight.shape[0]:
        raise FusionError(
            Reason.OUT_OF_RANGE,
            f"token ids reach from {int(ids.min())} to {int(ids.max())}, expected 0 .. "
            f"{weight.shape[0] - 1}",
        )
    return functional.embedding(ids, weight)


def _store(slot: Any, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes behind the live tokens; returns live and written ones, not counted yet."""
    keys, values = slot.buffers
    past, end = slot.length, slot.length + k.shape[2]
    keys[:, :, past:end].copy_(k)
    values[:, :, past:end].copy_(v)
    return keys[:, :, :end], values[:, :, :end]


def _rope(rope: Any, positions: torch.Tensor | None, past: int, x: torch.Tensor) -> tuple:
    if isinstance(rope, tuple):
        return rope
    if positions is None:
        positions = torch.arange(past, past + x.shape[1], device=x.device)[None]
    return rope.cos_sin(positions)
