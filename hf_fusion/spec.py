"""What a transformer block is, in shapes and named choices; every back end reads this.

Nothing here imports torch. Sizes are element counts. A spec that contradicts itself cannot be
built: the constructors raise ValueError naming field and value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple


class NormKind:
    """How a norm centres: LAYER subtracts the mean, RMS does not."""

    LAYER = "layer"
    RMS = "rms"
    ALL = (LAYER, RMS)


class QkvLayout:
    """Rows of the fused projection: q, k, v of head 0, of head 1, ... or all q, all k, all v; or
    three projections.
    """

    PER_HEAD = "per_head"
    STACKED = "stacked"
    SEPARATE = "separate"
    ALL = (PER_HEAD, STACKED, SEPARATE)


class Residual:
    """PARALLEL: mlp(norm2(x)) + attn(norm1(x)) + x. SEQUENTIAL: a = attn(norm1(x)) + x, then
    mlp(norm2(a)) + a. POST_NORM: a = norm1(attn(x) + x), then norm2(mlp(a) + a).
    """

    PARALLEL = "parallel"
    SEQUENTIAL = "sequential"
    POST_NORM = "post_norm"
    ALL = (PARALLEL, SEQUENTIAL, POST_NORM)


class Activation:
    """Function between the two projections of the MLP."""

    NONE = "none"
    GELU_ERF = "gelu_erf"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    SILU = "silu"
    ALL = (NONE, GELU_ERF, GELU_TANH, RELU, SILU)


def _positive(name: str, value: int) -> None:
    if type(value) is not int or value <= 0:
        raise ValueError(f"{name} is {value!r}, expected a positive integer")


def _finite(name: str, value: float, least: float) -> None:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        raise ValueError(f"{name} is {value!r}, expected a finite number of at least {least}")


def _one_of(name: str, value: Any, choices: tuple) -> None:
    if type(value) is not type(choices[0]) or value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(str, choices))}")


@dataclass(frozen=True)
class NormSpec:
    """A norm over the hidden size, with weight and, for LAYER, bias."""

    kind: str
    eps: float

    def __post_init__(self):
        _one_of("norm kind", self.kind, NormKind.ALL)
        _finite("norm eps", self.eps, 0.0)


@dataclass(frozen=True)
class AttentionSpec:
    """Heads of one attention; heads / kv_heads query heads share a key and value head.

    RoPE rotates the leading `rotary_dim` elements of each head, element i with element i +
    rotary_dim / 2.
    `scale` multiplies the scores. `causal`: no query sees a later key.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    scale: float
    qkv_layout: str
    causal: bool = True

    def __post_init__(self):
        _positive("heads", self.heads)
        _positive("kv_heads", self.kv_heads)
        _positive("head_dim", self.head_dim)
        _one_of("qkv_layout", self.qkv_layout, QkvLayout.ALL)
        _one_of("causal", self.causal, (True, False))
        if not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale!r}, expected a finite number")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads is {self.heads}, expected a multiple of kv_heads, {self.kv_heads}"
            )
        if type(self.rotary_dim) is not int or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"rotary_dim is {self.rotary_dim!r}, expected 0 .. head_dim, {self.head_dim}"
            )
        if self.rotary_dim % 2:
            raise ValueError(f"rotary_dim is {self.rotary_dim}, expected an even number")
        if self.qkv_layout == QkvLayout.PER_HEAD and self.heads != self.kv_heads:
            raise ValueError(
                f"kv_heads is {self.kv_heads}, expected {self.heads} with qkv_layout per_head"
            )

    @property
    def width(self) -> int:
        """Columns of the O projection."""
        return self.heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Rows of the fused QKV projection, or of the three together."""
        return self.width + 2 * self.kv_width

    @property
    def kv_width(self) -> int:
        """Rows of a K or V projection."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class MlpSpec:
    """Two projections with an activation between them; `width` is the size in between."""

    width: int
    activation: str

    def __post_init__(self):
        _positive("mlp width", self.width)
        _one_of("activation", self.activation, Activation.ALL)


@dataclass(frozen=True)
class BlockSpec:
    """One transformer layer."""

    hidden: int
    attention: AttentionSpec
    mlp: MlpSpec
    attention_norm: NormSpec
    mlp_norm: NormSpec
    residual: str

    def __post_init__(self):
        _positive("hidden", self.hidden)
        _one_of("residual", self.residual, Residual.ALL)


class BlockTensors(NamedTuple):
    """Parameters of one layer, in torch.nn.Linear layout (rows, cols); a bias may be None.

    With QkvLayout.SEPARATE, `qkv_weight` and `qkv_bias` are q's; otherwise k and v are None.
    """

    attention_norm_weight: Any  # (hidden)
    attention_norm_bias: Any  # (hidden)
    mlp_norm_weight: Any  # (hidden)
    mlp_norm_bias: Any  # (hidden)
    qkv_weight: Any  # (attention.qkv_width or attention.width, hidden)
    qkv_bias: Any  # (attention.qkv_width or attention.width)
    o_weight: Any  # (hidden, attention.width)
    o_bias: Any  # (hidden)
    up_weight: Any  # (mlp.width, hidden)
    up_bias: Any  # (mlp.width)
    down_weight: Any  # (hidden, mlp.width)
    down_bias: Any  # (hidden)
    k_weight: Any = None  # (attention.kv_width, hidden)
    k_bias: Any = None  # (attention.kv_width)
    v_weight: Any = None  # (attention.kv_width, hidden)
    v_bias: Any = None  # (attention.kv_width)


def tensor_shapes(spec: BlockSpec) -> BlockTensors:
    """The shape each tensor of a block must have, as tuples in the fields of BlockTensors."""
    heads, hidden, mlp = spec.attention, spec.hidden, spec.mlp.width
    separate = heads.qkv_layout == QkvLayout.SEPARATE
    qkv, width = heads.width if separate else heads.qkv_width, heads.width
    kv = {}
    if separate:
        kv = dict.fromkeys(("k_weight", "v_weight"), (heads.kv_width, hidden))
        kv |= dict.fromkeys(("k_bias", "v_bias"), (heads.kv_width,))
    return BlockTensors(
        attention_norm_weight=(hidden,),
        attention_norm_bias=(hidden,),
        mlp_norm_weight=(hidden,),
        mlp_norm_bias=(hidden,),
        qkv_weight=(qkv, hidden),
        qkv_bias=(qkv,),
        o_weight=(hidden, width),
        o_bias=(hidden,),
        up_weight=(mlp, hidden),
        up_bias=(mlp,),
        down_weight=(hidden, mlp),
        down_bias=(hidden,),
        **kv,
    )
