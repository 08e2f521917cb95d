"""A stock model, its patched copy and its float64 copy: the three answers that every parity test
compares.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from shapes import DTYPES, RELATIVE_L2, STEPS, STOCK_FACTOR, ULPS, Case, live_queries, prompt_mask
from torch import nn
from transformers import DynamicCache

import hf_fusion
from hf_fusion.registry import families

REASONS: Counter[str] = Counter()  # refusals and downgrades that tests have seen
HITS: Counter[str] = Counter()  # fused calls by level
FAMILIES = {family.name: family for family in families() if family.encoder is None}
ENCODERS = {family.name: family for family in families() if family.encoder is not None}


def resolve(name: str) -> type:
    """The class called "module:QualName"."""
    module, _, qualified = name.partition(":")
    return functools.reduce(getattr, qualified.split("."), importlib.import_module(module))


@torch.no_grad()
def loud(model: nn.Module, seed: int) -> nn.Module:
    """Draws weights under which every part of a layer matters: scores of a few units, biases and
    norms off their defaults.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is not None and weight.dim() > 1:
            fan_in = weight[0].numel()
            spread = 1.0 if isinstance(module, nn.Embedding) else 1.5 * fan_in**-0.5
            weight.normal_(0, spread, generator=generator)
        elif weight is not None:
            weight.normal_(1, 0.3, generator=generator)
        if bias is not None:
            bias.normal_(0, 0.3, generator=generator)
        for name in ("cls_token", "distillation_token", "mask_token", "position_embeddings"):
            token = module._parameters.get(name)
            if token is not None:
                token.normal_(0, 1, generator=generator)
    return model


def build(
    family: str,
    changes: dict,
    dtype: str,
    implementation: str,
    seed: int = 0,
    cls: type | None = None,
):
    """A model of the family's tiny configuration in evaluation mode; `cls` defaults to the one
    with the LM head or, of an encoder, to the base model.
    """
    known = FAMILIES.get(family) or ENCODERS[family]
    config = known.tiny_config(**changes)
    config._attn_implementation = implementation
    model = (cls or resolve(known.causal_lm_class or known.base_class))(config)
    return loud(model, seed).to(DTYPES[dtype]).eval()


class Output(NamedTuple):
    """One result: value (batch, rows, ...) and which of its rows mean anything, (batch, rows)
    bool.
    """

    name: str
    value: torch.Tensor
    live: torch.Tensor


def inputs(case: Case, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both (batch, length of the prompt and all steps)."""
    generator = torch.Generator().manual_seed(case.seed)
    total = case.length + sum(STEPS)
    ids = torch.randint(0, vocabulary, (case.batch, total), generator=generator)
    later = torch.ones(case.batch, total - case.length, dtype=torch.int64)
    return ids, torch.cat([prompt_mask(case, generator), later], 1)


@torch.no_grad()
def run(model: nn.Module, case: Case) -> list[Output]:
    """Logits after the prompt and after each step, and at the end keys and values of the first and
    last layer.
    """
    ids, mask = inputs(case, model.config.vocab_size)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config) if case.cached else None
    outputs, past = [], 0
    for number, queries in enumerate((case.length, *STEPS) if case.cached else (case.length,)):
        part = slice(past, past + queries)
        call = {"past_key_values": cache, "use_cache": case.cached}
        if case.embeds:
            call["inputs_embeds"] = model.get_input_embeddings()(ids[:, part])
        else:
            call["input_ids"] = ids[:, part]
        if case.mask != "none":
            call["attention_mask"] = mask[:, : past + queries]
        if case.positions:
            call["position_ids"] = positions[:, part]
        if number == 0:
            call["logits_to_keep"] = case.keep
        logits = model(**call).logits
        past += queries
        live = live_queries(mask[:, :past], logits.shape[1])
        outputs.append(Output(f"logits of call {number}", logits, live))
    if case.cached:
        assert cache.get_seq_length() == past, (
            f"{case}: cache holds {cache.get_seq_length()} tokens, expected {past}"
        )
        live = live_queries(mask, past)
        for index in sorted({0, len(cache.layers) - 1}):
            for name in ("keys", "values"):
                tensor = getattr(cache.layers[index], name).transpose(1, 2).flatten(2)
                outputs.append(Output(f"{name} of layer {index}", tensor.clone(), live))
    return outputs


def judge(
    got: Output,
    stock: Output,
    exact: Output,
    stages: int,
    what: str,
    yardstick: float = 0.0,
    yardstick_l2: float = 0.0,
) -> None:
    """Fails unless `got` is as right as `stock`, both measured against the float64 `exact`.

    Largest and L2 error at most twice stock's plus two units in the last place; for the largest,
    stock's may also be `yardstick` times the largest value, its relative L2 `yardstick_l2`. The L2
    error of independent roundings grows with the root of `stages`: it stays below RELATIVE_L2
    times that, except where stock's does not stay below RELATIVE_L2. Outputs that are don't-care
    must be finite.
    """
    what, dtype = f"{what}, {got.name}", stock.value.dtype
    assert got.value.shape == stock.value.shape and got.value.dtype == dtype, (
        f"{what}: {got.value.dtype} {tuple(got.value.shape)}, "
        f"stock {stock.value.dtype} {tuple(stock.value.shape)}"
    )
    assert bool(got.value.isfinite().all()), f"{what}: not finite where stock's inputs are"
    live = got.live
    if not bool(live.any()):
        return
    truth = exact.value[live].double()
    assert float(truth.std()) > 1e-3, f"{what}: the reference is constant and proves nothing"
    ours, theirs = got.value[live].double() - truth, stock.value[live].double() - truth
    ulp = torch.finfo(dtype).eps
    worst = int(ours.abs().argmax())
    most = float(truth.abs().max())
    error = float(ours.abs().max())
    limit = STOCK_FACTOR * max(float(theirs.abs().max()), yardstick * most) + ULPS * ulp * most
    assert error <= limit, (
        f"{what}: error {error:.3e} exceeds {limit:.3e} (stock's {float(theirs.abs().max()):.3e}), "
        f"worst element {worst} of {tuple(truth.shape)}: {float((ours + truth).flatten()[worst])}, "
        f"exact {float(truth.flatten()[worst])}"
    )
    scale = float(truth.norm())
    ours_l2, theirs_l2 = float(ours.norm()) / scale, float(theirs.norm()) / scale
    theirs_l2 = max(theirs_l2, yardstick_l2)
    limit = STOCK_FACTOR * theirs_l2 + ULPS * ulp
    if theirs_l2 <= RELATIVE_L2[dtype]:
        limit = min(limit, RELATIVE_L2[dtype] * stages**0.5)
    assert ours_l2 <= limit, (
        f"{what}: relative L2 {ours_l2:.3e} exceeds {limit:.3e} (stock's own {theirs_l2:.3e})"
    )


def judge_all(
    got: list[Output], stock: list[Output], exact: list[Output], stages: int, what: str, draws=()
) -> None:
    """`judge` for outputs in the same order.

    The largest error of one call is one draw of many: the yardstick for the logits, keys or values
    of a run is stock's largest relative error over all its calls, and over `draws`, pairs of stock
    and exact of other calls.
    """
    yardsticks: dict[str, float] = {}
    for output, true in [*zip(stock, exact, strict=True), *draws]:
        if bool(output.live.any()):
            truth = true.value[output.live].double()
            error = (output.value[output.live].double() - truth).abs().max() / truth.abs().max()
            kind = output.name.split()[0]
            yardsticks[kind] = max(yardsticks.get(kind, 0.0), float(error))
    for one, two, three in zip(got, stock, exact, strict=True):
        judge(one, two, three, stages, what, yardsticks.get(two.name.split()[0], 0.0))


@contextmanager
def fused_hits(
    model: nn.Module, what: str = "", refused: tuple = (), downgraded: tuple = (), least: int = 1
) -> Iterator:
    """Fails unless the calls inside ran fused at least `least` times and were refused for exactly
    these reasons.
    """
    stats = hf_fusion.stats(model)
    stats.clear()
    yield stats
    seen = stats.to_dict()
    REASONS.update(seen["refused"])
    REASONS.update(seen["downgraded"])
    HITS.update(seen["calls"])
    assert stats.fused >= least, (
        f"{what}: {stats.fused} fused calls, expected at least {least}\n{stats}"
    )
    for kind, expected in (("refused", refused), ("downgraded", downgraded)):
        assert set(seen[kind]) == {reason.value for reason in expected}, (
            f"{what}: {kind} unexpectedly\n{stats}"
        )


class Twin:
    """`stock` and `fused` with the same weights in one dtype, and `exact`, stock's computation in
    float64.
    """

    def __init__(
        self, family: str, changes: dict, dtype: str, implementation: str, seed: int = 0, cls=None
    ):
        self.name = f"{family} {changes} {dtype} {implementation} weights {seed}"
        self.dtype = DTYPES[dtype]
        self.stock = build(family, changes, dtype, implementation, seed, cls)
        self.fused = copy.deepcopy(self.stock)
        self.exact = copy.deepcopy(self.stock).double()
        self.exact.config._attn_implementation = (
            "sdpa"  # eager takes its softmax in fp32 whatever the dtype
        )
        self.answers = functools.lru_cache(maxsize=64)(self._answers)

    def _answers(self, case: Case) -> tuple[list[Output], list[Output]]:
        return run(self.stock, case), run(self.exact, case)

    def check(self, case: Case, fusion: str, backend: str) -> None:
        """One trial: `case` on the patched copy against stock and the exact model."""
        what = f"{self.name}: {fusion} on {backend}, {case}"
        stock, exact = self.answers(case)
        calls = 1 + len(STEPS) if case.cached else 1
        with hf_fusion.patched(self.fused, fusion, backend):
            least = 0 if fusion == "none" else calls if fusion == "full" else calls * self.layers
            with fused_hits(self.fused, what, least=least) as stats:
                got = run(self.fused, case)
            if fusion == "full":
                assert stats.calls["layer"] == 0, f"{what}: fell back to layers\n{stats}"
        if fusion == "none":
            for one, two in zip(got, stock, strict=True):
                assert torch.equal(one.value, two.value), (
                    f"{what}, {one.name}: a bare wrapper changed bits"
                )
        judge_all(got, stock, exact, self.stages, what)

    @property
    def stages(self) -> int:
        """Attention and MLP of every layer, and the head: each has the cap of one kernel."""
        return 2 * self.layers + 1

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.stock.config.num_hidden_layers


@functools.lru_cache(maxsize=None)
def _twin(family: str, changes: tuple, dtype: str, implementation: str, seed: int) -> Twin:
    return Twin(family, dict(changes), dtype, implementation, seed)


def twin(
    family: str, changes: dict, dtype: str, implementation: str = "sdpa", seed: int = 0
) -> Twin:
    """A Twin, built once per session for changes that can be hashed."""
    try:
        return _twin(family, tuple(sorted(changes.items())), dtype, implementation, seed)
    except TypeError:
        return Twin(family, changes, dtype, implementation, seed)
