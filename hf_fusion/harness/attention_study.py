"""Attention kernels side by side: naive, tiled and flash beside torch's own, over lengths; and
decoding with as many key heads as query heads, with fewer, with one.

Every row has a verdict from the inputs that were timed: its largest error on sampled queries,
against fp64, is at most twice that of torch's SDPA in the same dtype, and two steps of the dtype.
A row without one has no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hf_fusion import attend as kernels
from hf_fusion import native

from . import machine
from .attention_result import (
    EAGER,
    SDPA,
    TORCH,
    AttentionPoint,
    AttentionResult,
    AttentionRow,
)
from .cases import one_by_one
from .contenders import Contender
from .inputs import DTYPES, InputError, at_least, dtype_name, thread_count, unaccepted
from .memory import fresh_process
from .parity import LIMIT
from .progress import Advance, progress
from .timing import Recording, Spread, interleave, torch_threads

CONTENDERS = (*TORCH, *kernels.KERNELS)
GROUPS = {"MHA": 1, "GQA": 4, "MQA": 0}
"""Query heads that share a key head; 0: all."""
SAMPLED = 64
LAYERS = 8
"""Caches that a decode step goes through, so that none is met again while it is in a near cache."""
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class AttentionSettings:
    """What is measured: a point per dtype, head size and length, then decode steps at `context`.

    A contender that would need more than `most_bytes` beside its operands is left out, with that
    reason. `memory` measures peaks, each in a process of its own.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    head_dims: tuple[int, ...] = (64, 128)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    contenders: tuple[str, ...] = CONTENDERS
    heads: int = 12
    batch: int = 1
    causal: bool = False
    context: int = 4096
    decode_heads: int = 16
    most_bytes: int = 4 << 30
    memory: bool = False
    rounds: int = 5
    threads: int | None = None
    seed: int = 0

    def checked(self) -> AttentionSettings:
        """The same with normal names; InputError for what is not accepted."""
        for name in self.contenders:
            if name not in CONTENDERS:
                raise unaccepted("contender", name, CONTENDERS)
        for what, values in (("length", self.lengths), ("head size", self.head_dims)):
            if not values:
                raise InputError(f"no {what}: expected integers such as 64,128")
            for value in values:
                at_least(what, value, 1)
        for size in self.head_dims:
            if size > native.MAX_HEAD_DIM:
                raise InputError(f"head size is {size}: expected at most {native.MAX_HEAD_DIM}")
        if not self.dtypes:
            raise InputError(f"no dtype: expected some of {', '.join(DTYPES)}")
        at_least("context", self.context, 0)
        if self.decode_heads % GROUPS["GQA"]:
            raise InputError(
                f"decode heads is {self.decode_heads}: expected a multiple of {GROUPS['GQA']}"
            )
        return replace(
            self,
            dtypes=tuple(map(dtype_name, self.dtypes)),
            contenders=tuple(name for name in CONTENDERS if name in {SDPA, *self.contenders}),
            threads=thread_count(self.threads),
        )


def run_attention(settings: AttentionSettings) -> AttentionResult:
    """Measures every point of `settings`."""
    settings = settings.checked()
    first = settings.head_dims[0]
    with one_by_one() as found, torch_threads(settings.threads), torch.no_grad():
        kernels.share_threads()
        for dtype in settings.dtypes:
            for head_dim, length in product(settings.head_dims, settings.lengths):
                with found.one(f"{dtype} head size {head_dim}, {length} tokens"):
                    found.results.append(prefill(settings, dtype, head_dim, length))
            for kind in GROUPS if settings.context else ():
                with found.one(f"{dtype} {kind} decode at {settings.context}"):
                    found.results.append(decode(settings, dtype, first, kind))
    record = machine.environment(settings.threads)
    return AttentionResult(settings, found.results, record, found.ending)


def operands(
    seed: int, batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, dtype: str
) -> Operands:
    """Seeded normal q (batch, heads, queries, dim), and k and v (batch, kv_heads, keys, dim)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return tuple(
        torch.randn(batch, *shape, dim, generator=generator).to(DTYPES[dtype]) for shape in shapes
    )


def compute(name: str, inputs: Operands, causal: bool) -> torch.Tensor:
    """(batch, queries, heads, head_dim) by the contender called `name`."""
    query, key, value = inputs
    if name in kernels.KERNELS:
        return kernels.attend(query, key, value, kernel=name, causal=causal)
    if name == EAGER:
        return _eager(query, key, value, causal).transpose(1, 2)
    backends = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_math": SDPBackend.MATH}
    group = query.shape[1] != key.shape[1]
    call = partial(
        scaled_dot_product_attention, query, key, value, is_causal=causal, enable_gqa=group
    )
    if name not in backends:
        return call().transpose(1, 2)
    with sdpa_kernel(backends[name]):
        return call().transpose(1, 2)


def _eager(query, key, value, causal: bool) -> torch.Tensor:
    """As transformers' eager attention: key heads repeated, softmax in fp32."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool).tril().logical_not()
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def prefill(settings: AttentionSettings, dtype: str, dim: int, length: int) -> AttentionPoint:
    """All queries of a sequence of `length` tokens."""
    heads, batch = settings.heads, settings.batch
    size = torch.finfo(DTYPES[dtype]).bits // 8
    cache = 2 * batch * heads * length * dim * size
    point = AttentionPoint("prefill", dtype, dim, length, length, heads, heads, cache)
    inputs = operands(settings.seed, batch, heads, heads, length, length, dim, dtype)
    with progress(f"{dtype} head size {dim}, {length} tokens", _steps(settings)) as advance:
        _measure(point, settings, [inputs], advance)
        if settings.memory:
            _add_memory(point, settings)
    return point


def decode(settings: AttentionSettings, dtype: str, dim: int, kind: str) -> AttentionPoint:
    """One query per head through LAYERS caches of `context` tokens."""
    heads, keys = settings.decode_heads, settings.context
    kv_heads = heads // (GROUPS[kind] or heads)
    size = torch.finfo(DTYPES[dtype]).bits // 8
    cache = 2 * settings.batch * kv_heads * keys * dim * size
    point = AttentionPoint(kind, dtype, dim, 1, keys, heads, kv_heads, cache)
    layers = [
        operands(settings.seed + layer, settings.batch, heads, kv_heads, 1, keys, dim, dtype)
        for layer in range(LAYERS)
    ]
    with progress(f"{dtype} {kind} decode at {keys}", _steps(settings)) as advance:
        _measure(point, settings, layers, advance)
    return point


def _steps(settings: AttentionSettings) -> int:
    return len(settings.contenders) * (settings.rounds + 2)


def _measure(
    point: AttentionPoint,
    settings: AttentionSettings,
    layers: Sequence[Operands],
    advance: Advance,
) -> None:
    """Fills the rows: who is absent, interleaved times, verdicts."""
    causal = settings.causal and point.queries > 1
    ready = []
    for name in settings.contenders:
        row = AttentionRow(name, extra_bytes=_extra_bytes(name, layers[0], causal))
        point.rows.append(row)
        if (row.extra_bytes or 0) > settings.most_bytes:
            row.absent = f"needs {row.extra_bytes / 2**30:.1f} GiB beside its operands"
            continue
        ready.append(Contender(name, partial(_through, name, causal)))
    recording = interleave(
        ready, [layers] * settings.rounds, 0, settings.threads, lambda threads: None, advance
    )
    _judge(point, recording, layers[0], causal, advance)
    for row in point.rows:
        if row.failure is None and row.absent is None:
            row.ms = Spread.of([s.step for s in recording.samples[row.name]]).scaled(1e3)


def _through(name: str, causal: bool, layers: Sequence[Operands]) -> None:
    for inputs in layers:
        compute(name, inputs, causal)


def _extra_bytes(name: str, inputs: Operands, causal: bool) -> int | None:
    """What a call takes beside its tensors: as planned for ours, the scores for torch's."""
    if name in kernels.KERNELS:
        return kernels.plan(*inputs, kernel=name, causal=causal).extra_bytes
    if name in (EAGER, "sdpa_math"):
        query, key, _ = inputs
        return query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * 4
    return None


def _judge(
    point: AttentionPoint,
    recording: Recording,
    inputs: Operands,
    causal: bool,
    advance: Advance,
) -> None:
    """Errors on sampled queries against fp64, with SDPA's own as yardstick."""
    rows = torch.randperm(point.queries, generator=torch.Generator().manual_seed(1))[:SAMPLED]
    want = _exact(inputs, rows, causal)
    step = torch.finfo(inputs[0].dtype).eps * float(want.abs().max())
    allowed = None
    for row in point.rows:
        advance(f"verdict of {row.name}")
        row.failure = recording.failures.get(row.name)
        if row.failure or row.absent:
            continue
        got = compute(row.name, inputs, causal)[:, rows].double()
        row.error = float((got - want).abs().max())
        allowed = LIMIT * (row.error + step) if allowed is None else allowed
        row.allowed = allowed
        if not row.error <= allowed:
            row.failure = f"error {row.error:.3g} exceeds {allowed:.3g}"


def _exact(inputs: Operands, rows: torch.Tensor, causal: bool) -> torch.Tensor:
    """fp64 attention of some queries, (batch, rows, heads, head_dim)."""
    query, key, value = (tensor.double() for tensor in inputs)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query[:, :, rows] @ key.transpose(2, 3) * query.shape[3] ** -0.5
    if causal:
        hidden = torch.arange(key.shape[2])[None, :] > rows[:, None]
        scores = scores.masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _add_memory(point: AttentionPoint, settings: AttentionSettings) -> None:
    """How much a process of its own grows while each row that has a time runs."""
    for row in point.rows:
        if row.ms is None:
            continue
        found = fresh_process(
            f"{__package__}.attention_memory",
            {
                "contender": row.name,
                "shape": [settings.seed, settings.batch, point.heads, point.kv_heads],
                "tokens": [point.queries, point.keys],
                "head_dim": point.head_dim,
                "dtype": point.dtype,
                "causal": settings.causal,
                "threads": settings.threads,
            },
            row.label,
        )
        row.peak_bytes = found["peak"] - found["loaded"]
