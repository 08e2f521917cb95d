"""A patched model that is moved, cast, copied and edited answers as stock does with the very next
call.
"""

from __future__ import annotations

import copy
import importlib.util
from itertools import product

import pytest
import torch
from edits import EDITS
from pairs import RUNGS, SAME, answers, assert_moved, assert_same, distance, noted, pair, tokens
from transformers import DynamicCache

import hf_fusion
from hf_fusion.report import Reason

pytestmark = pytest.mark.usefixtures("one_thread")


def cast(dtype):
    """Casts in place."""
    return lambda model, source: model.to(dtype)


def by_way_of_meta(model, source):
    """Loses every element, then takes those of `source`, buffers included."""
    model.to("meta")
    with torch.no_grad():
        assert model(tokens(0).to("meta")).logits.is_meta
    model.to_empty(device="cpu")
    with torch.no_grad():
        tensors = dict([*source.named_parameters(), *source.named_buffers()])
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(tensors[name])
    return model


MOVES = {
    "fp32": cast(torch.float32),
    "bf16": cast(torch.bfloat16),
    "fp16": cast(torch.float16),
    "fp64": cast(torch.float64),
    "cpu": lambda model, source: model.to("cpu"),
    "meta": by_way_of_meta,
    "deepcopy": lambda model, source: copy.deepcopy(model),
    "share": lambda model, source: model.share_memory(),
}


@pytest.mark.reliability(22, "moves and casts")
@pytest.mark.parametrize("fusion", RUNGS)
def test_every_ordered_pair_of_moves(fusion, trials):
    for number, (first, second) in enumerate(product(MOVES, repeat=2)):
        model, stock = pair(number % 5, fusion)
        answers(model)
        for move in (first, second):
            model, stock = (
                MOVES[move](model, stock),
                MOVES[move](stock, stock) if move != "meta" else stock,
            )
            what = f"{fusion}, weights {number % 5}, {first} then {second}, after {move}"
            counters = hf_fusion.stats(model)
            counters.clear()
            assert_same(answers(model), answers(stock), what)
            double = next(model.parameters()).dtype == torch.float64
            reasons = {Reason.DTYPE.value} if double else set()
            assert set(counters.refused) == reasons and bool(counters.fused) != double, (
                f"{what}\n{counters}"
            )
            assert not noted(model).downgraded, f"{what}\n{counters}"
        trials()


@pytest.mark.reliability(22)
def test_meta_calls_are_counted_as_meta():
    model, _ = pair()
    model.to("meta")
    with torch.no_grad():
        model(tokens(0).to("meta"))
    assert set(hf_fusion.stats(model).refused) == {Reason.META.value}


@pytest.mark.reliability(22)
@pytest.mark.parametrize("fusion", RUNGS)
def test_a_model_cast_between_two_tokens(fusion, trials):
    for first, second in product((torch.float32, torch.bfloat16, torch.float16), repeat=2):
        model, stock = pair(3, fusion)
        model.to(first), stock.to(first)
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        with torch.no_grad():
            for m, cache in zip((model, stock), caches):
                m(tokens(1), past_key_values=cache)
            model.to(second), stock.to(second)
            results = []
            for m, cache in zip((model, stock), caches):
                try:
                    results.append(m(tokens(2, 1, 1), past_key_values=cache).logits)
                except RuntimeError as error:
                    results.append(error)
        what = f"{fusion}, {first} then {second}"
        if isinstance(results[1], RuntimeError):
            assert isinstance(results[0], RuntimeError), f"{what}: stock raises {results[1]}"
        else:
            # keys in the cache carry the rounding of the dtype they were made in
            assert distance(*results) <= max(SAME[first], SAME[second]), what
        trials()


@pytest.mark.reliability(22)
def test_a_copy_owns_its_weights_and_counters(trials):
    for fusion in RUNGS:
        model, stock = pair(1, fusion)
        before = answers(model)
        other = copy.deepcopy(model)
        counters = hf_fusion.stats(model)
        counters.clear()
        with torch.no_grad():
            for m in (other, stock):
                for p in m.parameters():
                    p.mul_(0.7)
        assert_same(answers(other), answers(stock), f"{fusion}, the copy")
        assert counters.fused == 0 and hf_fusion.stats(other).fused > 0, (
            "the copy counts for the original"
        )
        assert_same(answers(model), before, f"{fusion}, the original")
        hf_fusion.unpatch(other)
        counters.clear()
        answers(model)
        assert counters.fused > 0, "unpatching the copy has unpatched the original"
        trials()


def missing(kind: str) -> str:
    """Why a kind of edit cannot be tried here, or an empty string."""
    if kind.startswith("lora") and importlib.util.find_spec("peft") is None:
        return "peft is not installed"
    if kind == "quantised" and not (
        importlib.util.find_spec("torch.ao.quantization")
        and torch.backends.quantized.supported_engines[1:]
    ):
        return "this torch has no dynamic quantisation"
    return ""


@pytest.mark.reliability(23, "weight edits")
@pytest.mark.parametrize("fusion", RUNGS)
@pytest.mark.parametrize("kind", EDITS)
def test_the_next_answer_after_an_edit_is_stock_s(kind, fusion, trials):
    if missing(kind):
        pytest.skip(missing(kind))
    apply, reasons = EDITS[kind]
    model, stock = pair(2, fusion, num_hidden_layers=3)
    before = answers(model)
    assert_same(before, answers(stock), f"{kind} at {fusion}, before")
    counters = hf_fusion.stats(model)
    counters.clear()
    edited, twin = apply(model, 11), apply(stock, 11)
    after, want = answers(edited, 0), answers(twin, 0)
    what = f"{kind} at {fusion}"
    assert_same(after, want, what)
    if want[0].shape == before[0].shape:
        assert_moved(before, want, what)
    seen = set(noted(model).refused) | set(counters.downgraded)
    allowed = {reason.value for reason in reasons}
    assert seen <= allowed and (seen or not reasons or fusion != "full"), (
        f"{what}: reasons\n{counters}"
    )
    assert counters.fused > 0, f"{what}: nothing ran fused any more\n{counters}"
    # edited once more: what was bound a moment ago is old again
    twice = answers(apply(edited, 12)), answers(apply(twin, 12))
    assert_same(*twice, f"{what}, twice")
    trials(2)


@pytest.mark.reliability(23)
@pytest.mark.parametrize("fusion", RUNGS)
def test_an_edit_between_two_tokens(fusion, trials):
    for kind in (
        "copy_",
        "data_write",
        "data_assign",
        "load_assign",
        "swap_module",
        "tie",
        "norm_eps",
        "no_bias",
    ):
        model, stock = pair(4, fusion)
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        with torch.no_grad():
            for m, cache in zip((model, stock), caches):
                m(tokens(1), past_key_values=cache)
                m(tokens(2, 1, 1), past_key_values=cache)
                EDITS[kind].apply(m, 5)
            got, want = (
                m(tokens(3, 1, 1), past_key_values=c).logits for m, c in zip((model, stock), caches)
            )
        assert_same(got, want, f"{kind} at {fusion}")
        assert not hf_fusion.stats(model).refused
        trials()


@pytest.mark.reliability(23)
@pytest.mark.parametrize("fusion", RUNGS)
def test_gradients_are_stock_s(fusion):
    model, stock = pair(5, fusion)
    for m in (model, stock):
        ids = tokens(1, 2, 6)
        m(ids, labels=ids).loss.backward()
    for (name, one), two in zip(model.named_parameters(), stock.parameters()):
        assert torch.equal(one.grad, two.grad), f"{fusion}: gradient of {name}"
    assert hf_fusion.stats(model).fused == 0
