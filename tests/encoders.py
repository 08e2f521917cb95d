"""Inputs, twins and pairs of encoders: what the tests of encoder families share."""

from __future__ import annotations

import copy
import functools
import random
from typing import NamedTuple

import torch
from shapes import DTYPES
from torch import nn
from twins import ENCODERS, Output, build, fused_hits, judge

import hf_fusion

VISION = ("vit", "deit")
TEXT = tuple(name for name in ENCODERS if name not in VISION)
RUNGS = ("decomposed", "attention", "attention+up", "full")
# (fusion, back end, packed)
WAYS = (
    ("none", "cpu", None),
    *((f, "reference", None) for f in RUNGS),
    *((f, "cpu", packed) for f in RUNGS[1:] for packed in (False, True)),
)
MASKS = ("none", "ones", "left", "right", "holes", "dead", "alone")
BATCHES = (1, 2, 3, 8, 9)
LENGTHS = (1, 2, 7, 15, 16, 17, 31, 32, 33, 129, 197)
SIZES = {
    "plain": {},
    "head8": {"hidden_size": 24, "num_attention_heads": 3, "hidden_act": "gelu_new"},
    "head37": {"hidden_size": 37, "num_attention_heads": 1, "intermediate_size": 41},
    "head37x3": {"hidden_size": 111, "num_attention_heads": 3, "intermediate_size": 41},
    "head64": {"hidden_size": 128, "num_attention_heads": 2, "hidden_act": "relu"},
}
PATCH = 6


class Case(NamedTuple):
    """One input: (batch, length) under a mask; `seed` draws its content."""

    mask: str
    batch: int
    length: int
    seed: int


def cases(count: int, seed: str) -> list[Case]:
    """`count` cases that `seed` draws; every mask, batch and length comes up before one returns."""
    draw = random.Random(seed)
    columns = []
    for choices in (MASKS, BATCHES, LENGTHS):
        column: list = []
        while len(column) < count:
            column += draw.sample(choices, len(choices))
        columns.append(column[:count])
    return [Case(*row, seed=draw.randrange(2**31)) for row in zip(*columns, strict=True)]


def tokens_mask(case: Case) -> torch.Tensor:
    """(batch, length) int64, 1 = token; all ones for "none" and "ones"."""
    draw = torch.Generator().manual_seed(case.seed)
    batch, length = case.batch, case.length
    mask = torch.ones(batch, length, dtype=torch.int64)
    holes = torch.randint(0, length, (batch,), generator=draw)[:, None]
    at = torch.arange(length)[None]
    if case.mask == "left":
        mask = (at >= holes).long()
    elif case.mask == "right":
        mask = (at < length - holes).long()
    elif case.mask == "holes":
        mask = (torch.rand(batch, length, generator=draw) < 0.7).long()
        mask[:, -1] = 1
    elif case.mask == "dead":  # one row is padding from its first to its last position
        mask = (at < length - holes).long()
        mask[case.seed % batch] = 0
    elif case.mask == "alone":  # one token a row
        mask = (at == holes).long()
    return mask


def starts_with_tokens(mask: torch.Tensor) -> bool:
    """Whether no sequence but an empty one starts with padding, so that padding is left out."""
    return bool((mask[:, 0].bool() | ~mask.bool().any(1)).all())


YARDSTICKS = (Case("right", 8, 33, 21), Case("none", 9, 17, 22), Case("holes", 3, 129, 23))


def special_tokens(family: str) -> int:
    """Positions before the patches."""
    return 2 if family == "deit" else 1


def arguments(family: str, case: Case, dtype: torch.dtype = torch.float32) -> dict:
    """Keyword arguments of one forward; pictures have 1 row of patches and any length above the
    special tokens.
    """
    draw = torch.Generator().manual_seed(case.seed)
    mask, call = tokens_mask(case), {}
    if family in VISION:
        patches = max(1, case.length - special_tokens(family))
        call["pixel_values"] = torch.randn(
            case.batch, 3, PATCH, PATCH * patches, generator=draw
        ).to(dtype)
        call["interpolate_pos_encoding"] = True
        length = patches + special_tokens(family)
        mask = torch.nn.functional.pad(mask, (length - case.length, 0), value=1)
    else:
        ids = torch.randint(3, 99, (case.batch, case.length), generator=draw)
        call["input_ids"] = ids.masked_fill(mask == 0, 1)
    if case.mask != "none":
        call["attention_mask"] = mask
    return call


def cast(call: dict, dtype: torch.dtype) -> dict:
    """The call with its floats in another dtype."""
    return {
        k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in call.items()
    }


@torch.no_grad()
def outputs(model: nn.Module, call: dict) -> list[Output]:
    """Hidden states and, where the model pools, what it makes of the first position."""
    out = model(**call)
    hidden = out.last_hidden_state
    live = call.get("attention_mask")
    live = torch.ones(hidden.shape[:2]) if live is None else live
    results = [Output("hidden states", hidden, live != 0)]
    if out.get("pooler_output") is not None:
        some = (live != 0).any(1, keepdim=True)
        results.append(Output("pooled", out.pooler_output[:, None], some))
    return results


class EncoderTwin:
    """`stock` and `fused` with the same weights in one dtype, and `exact`, stock in float64."""

    def __init__(self, family: str, size: str, dtype: str, implementation: str, seed: int):
        self.family, self.dtype = family, DTYPES[dtype]
        self.name = f"{family} {size} {dtype} {implementation} weights {seed}"
        self.stock = build(family, SIZES[size], dtype, implementation, seed)
        self.fused = copy.deepcopy(self.stock)
        self.exact = copy.deepcopy(self.stock).double()
        self.exact.config._attn_implementation = "sdpa"
        self.layers = self.stock.config.num_hidden_layers
        self.stages = 2 * self.layers + 1
        self.answers = functools.lru_cache(maxsize=64)(self._answers)

    def _answers(self, case: Case) -> tuple:
        call = arguments(self.family, case, self.dtype)
        exact = outputs(self.exact, cast(call, torch.float64))
        return call, outputs(self.stock, call), exact

    @functools.cached_property
    def yardsticks(self) -> dict[str, tuple[float, float]]:
        """Stock's largest relative errors, of an element and in L2, by kind of output over some
        batches: as in judge_all, the error of one call is one draw of many.
        """
        found: dict[str, tuple[float, float]] = {}
        for case in YARDSTICKS:
            for output, true in zip(*self.answers(case)[1:], strict=True):
                truth = true.value[output.live].double()
                error = output.value[output.live].double() - truth
                largest = float(error.abs().max() / truth.abs().max())
                known = found.get(output.name, (0.0, 0.0))
                relative = float(error.norm() / truth.norm())
                found[output.name] = max(known[0], largest), max(known[1], relative)
        return found

    def check(self, case: Case, fusion: str, backend: str, packed: bool | None) -> list[Output]:
        """One trial: `case` on the patched copy against stock and the exact model."""
        what = f"{self.name}: {fusion} on {backend}, packed {packed}, {case}"
        call, stock, exact = self.answers(case)
        with hf_fusion.patched(self.fused, fusion, backend, packed=packed):
            with fused_hits(self.fused, what, least=int(fusion != "none")) as stats:
                got = outputs(self.fused, call)
        level = {"none": "wrapped", "full": "encode"}.get(fusion, "layer")
        count = 1 if fusion == "full" else self.layers
        assert stats.calls[level] >= count, f"{what}\n{stats}"
        assert fusion != "full" or stats.calls["layer"] == 0, f"{what}\n{stats}"
        if fusion == "none":
            for one, two in zip(got, stock, strict=True):
                assert torch.equal(one.value.nan_to_num(), two.value.nan_to_num()), (
                    f"{what}: a bare wrapper changed bits"
                )
            return got
        for triple in zip(got, stock, exact, strict=True):
            self.judge(*triple, what)
        hidden = got[0]
        if fusion == "full" and starts_with_tokens(tokens_mask(case)):
            assert not bool(hidden.value[~hidden.live].any()), f"{what}: padding is not zero"
        return got

    def judge(self, got: Output, stock: Output, exact: Output, what: str) -> None:
        """The parity rule; a single element has no spread, and is judged with a zero beside it."""
        live = exact.live
        if live.any() and exact.value[live].numel() == 1:
            wide = (torch.cat([o.value, o.value * 0], 2) for o in (got, stock, exact))
            got, stock, exact = (o._replace(value=v) for o, v in zip((got, stock, exact), wide))
        judge(got, stock, exact, self.stages, what, *self.yardsticks[got.name])


@functools.lru_cache(maxsize=None)
def encoder_twin(
    family: str, size: str = "plain", dtype: str = "fp32", implementation: str = "sdpa", seed=0
) -> EncoderTwin:
    """An EncoderTwin, built once per session."""
    return EncoderTwin(family, size, dtype, implementation, seed)


def encoder_pair(
    family: str,
    fusion: str | None = "full",
    backend: str = "auto",
    packed: bool | None = None,
    dtype: str = "fp32",
    cls: type | None = None,
    seed: int = 0,
    **changes,
):
    """(patched, stock): tiny models with the same weights; `fusion` None leaves both unpatched."""
    stock = build(family, changes, dtype, "sdpa", seed, cls)
    model = copy.deepcopy(stock)
    if fusion is not None:
        hf_fusion.patch(model, fusion, backend, packed=packed)
    return model, stock


def sample(family: str, seed: int = 1, batch: int = 3, length: int = 17, mask: str = "none"):
    """Arguments of one forward in fp32."""
    return arguments(family, Case(mask, batch, length, seed))


@torch.no_grad()
def hidden_states(model: nn.Module, family: str, seed: int = 1) -> list[torch.Tensor]:
    """First results of a full batch and of a ragged one, live positions only."""
    dtype = next(model.parameters()).dtype
    found = []
    for mask in ("none", "right"):
        call = cast(sample(family, seed, mask=mask), dtype)
        out = model(**call)[0]
        found.append(out if mask == "none" else out[call["attention_mask"] != 0])
    return found
