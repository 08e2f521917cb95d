"""Encoders, fused, give stock's function: every family, dtype, mask, batch, length, rung and
instruction set.
"""

from __future__ import annotations

import random

import pytest
import torch
from conftest import available_isas
from encoders import (
    RUNGS,
    SIZES,
    VISION,
    WAYS,
    Case,
    cases,
    encoder_pair,
    encoder_twin,
    hidden_states,
    sample,
    starts_with_tokens,
)
from pairs import distance
from shapes import DTYPES, IMPLEMENTATIONS, RELATIVE_L2
from twins import ENCODERS, fused_hits

import hf_fusion

pytestmark = [pytest.mark.reliability(3), pytest.mark.usefixtures("one_thread")]

CASES = 22  # per family and dtype, each at WAYS_PER_CASE of the WAYS
WAYS_PER_CASE = 3
CORNERS = (
    Case("none", 1, 1, 1), Case("dead", 1, 7, 2), Case("dead", 2, 33, 3), Case("holes", 9, 197, 4),
    Case("left", 3, 31, 5), Case("right", 8, 129, 6), Case("alone", 3, 16, 7),
)  # fmt: skip


@pytest.fixture
def precision():
    """Sets torch's fp32 matmul precision for the rest of the test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ENCODERS)
def test_rungs_over_masks_batches_and_lengths(family, dtype, trials):
    draw = random.Random(f"{family} {dtype}")
    ways: list = []
    for number, case in enumerate(cases(CASES, f"{family} {dtype}")):
        size, implementation = draw.choice(list(SIZES)), IMPLEMENTATIONS[number % 2]
        pair = encoder_twin(family, size, dtype, implementation)
        ways = ways if len(ways) >= WAYS_PER_CASE else [*ways, *draw.sample(WAYS, len(WAYS))]
        for way in ways[:WAYS_PER_CASE]:
            pair.check(case, *way)
            trials()
        ways = ways[WAYS_PER_CASE:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ENCODERS)
def test_corners_at_the_full_rung(family, dtype, trials):
    for case in CORNERS:
        for way in (("full", "cpu", False), ("full", "cpu", True), ("full", "reference", None)):
            encoder_twin(family, "plain", dtype).check(case, *way)
            trials()


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(dtype, isa, force_isa, trials):
    assert force_isa(isa) == isa
    for family in ENCODERS:
        for number, case in enumerate(cases(4, f"{family} {dtype}")):
            pair = encoder_twin(family, ("plain", "head37")[number % 2], dtype)
            for packed in (False, True):
                pair.check(case, ("full", "attention+up")[number // 2], "cpu", packed)
                trials()


@pytest.mark.parametrize("packed", (False, True))
def test_two_threads(packed, trials):
    torch.set_num_threads(2)
    for family, dtype in zip(ENCODERS, (*DTYPES, *DTYPES), strict=True):
        for case in (Case("right", 9, 33, 8), Case("none", 2, 33, 9)):
            encoder_twin(family, "head37x3", dtype).check(case, "full", "cpu", packed)
            trials()


@pytest.mark.parametrize("mask", ("left", "right", "holes", "dead"))
@pytest.mark.parametrize("family", ENCODERS)
def test_what_lies_under_padding_reaches_no_token(family, mask, trials):
    """Bits of the tokens do not depend on what is in padded positions, and NaN there stays out."""
    for packed in (False, True):
        model, _ = encoder_pair(family, "full", "cpu", packed)
        call = sample(family, mask=mask, batch=4)
        with torch.no_grad():
            x = model.embeddings(**{k: v for k, v in call.items() if k != "attention_mask"})
        seen = call["attention_mask"] != 0

        def replaced(value, x=x, seen=seen):
            return lambda *_: torch.where(seen[..., None], x, torch.tensor(value))

        results = []
        for value in (0.0, 3.0, float("nan"), float("inf")):
            hook = model.embeddings.register_forward_hook(replaced(value))
            with torch.no_grad(), fused_hits(model, f"{family} {mask} {value}"):
                results.append(model(**call).last_hidden_state)
            hook.remove()
            if starts_with_tokens(seen):
                assert not bool(results[-1][~seen].any()), "padding is not zero"
            assert torch.equal(results[-1][seen], results[0][seen]), (
                f"{family}, {mask}: {value} under padding"
            )
            trials()


@pytest.mark.parametrize("family", [f for f in ENCODERS if f not in VISION])
def test_a_row_does_not_depend_on_its_padding(family, trials):
    """A ragged batch gives every sentence what it gets alone, up to rounding."""
    pair = encoder_twin(family)
    lengths = (1, 5, 16, 17, 33, 2)
    ids = torch.randint(3, 99, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = ids.masked_fill(mask == 0, 1)
    for packed in (False, True):
        with torch.no_grad(), hf_fusion.patched(pair.fused, "full", "cpu", packed=packed):
            batch = pair.fused(input_ids=ids, attention_mask=mask).last_hidden_state
            for row, length in enumerate(lengths):
                alone = pair.fused(input_ids=ids[row : row + 1, :length]).last_hidden_state[0]
                off = distance(batch[row, :length], alone)
                assert off <= RELATIVE_L2[torch.float32] * pair.stages**0.5, f"row {row}: {off:.1e}"
                trials()


def exact_of(pair, case):
    """(arguments, hidden states of the float64 model, stock's relative L2 error)."""
    call, stock, exact = pair.answers(case)
    truth = exact[0].value[exact[0].live]
    return call, truth, distance(stock[0].value[stock[0].live], truth)


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("family", ENCODERS)
def test_the_precision_of_fp32_products_is_torch_s(family, packed, precision, trials):
    """highest: fp32's error; high: 2^-14; medium: bf16's at most; and back, with the same bits."""
    pair, case = encoder_twin(family, "head64"), Case("right", 3, 33, 11)
    precision("highest")
    call, truth, theirs = exact_of(pair, case)
    live, first = tuple(call["attention_mask"].shape), None
    assert live == tuple(pair.answers(case)[1][0].live.shape)
    with torch.no_grad(), hf_fusion.patched(pair.fused, "full", "cpu", packed=packed):
        for name in ("highest", "medium", "highest", "high", "medium", "highest"):
            precision(name)
            with fused_hits(pair.fused, f"{pair.name} {name}"):
                hidden = pair.fused(**call).last_hidden_state
            ours = distance(hidden[call["attention_mask"] != 0], truth)
            if name == "highest":
                assert ours <= 2 * theirs + 2e-7, f"{ours:.1e}, stock {theirs:.1e}"
                first = hidden if first is None else first
                assert torch.equal(hidden, first), "another precision has left something behind"
            cap = 2.0**-14 if name == "high" else RELATIVE_L2[torch.bfloat16] * pair.stages**0.5
            assert ours <= cap, f"{name}: {ours:.1e}"
            trials()


@pytest.mark.parametrize("packed", (False, True))
def test_a_precision_set_by_back_end_is_the_cpu_s(packed, precision):
    pair, backends = encoder_twin("bert", "head64"), torch.backends
    call = sample("bert", mask="right", batch=3)
    with torch.no_grad(), hf_fusion.patched(pair.fused, "full", "cpu", packed=packed):
        for way, name, spelled in (
            (backends.mkldnn.matmul, "medium", "bf16"), (backends.mkldnn.matmul, "high", "tf32"),
            (backends.mkldnn.matmul, "highest", "ieee"), (backends.cuda.matmul, "highest", "tf32"),
        ):  # fmt: skip
            precision(name)
            expected = pair.fused(**call).last_hidden_state
            precision("highest")
            way.fp32_precision = spelled
            with fused_hits(pair.fused, f"{name} {spelled}"):
                hidden = pair.fused(**call).last_hidden_state
            assert torch.equal(hidden, expected), f"{name} {spelled}"


@pytest.mark.parametrize("packed", (False, True, None))
def test_an_instruction_set_chosen_between_two_calls(packed, force_isa, trials):
    isas = available_isas()
    for family in ENCODERS:
        for dtype in DTYPES:
            pair, case = encoder_twin(family, "head37", dtype), Case("holes", 3, 33, 12)
            call, stock, exact = pair.answers(case)
            with torch.no_grad(), hf_fusion.patched(pair.fused, "full", "cpu", packed=packed):
                for isa in (*isas, *reversed(isas)):
                    force_isa(isa)
                    what = f"{pair.name} {isa}"
                    with fused_hits(pair.fused, what):
                        hidden = pair.fused(**call).last_hidden_state
                    pair.judge(stock[0]._replace(value=hidden), stock[0], exact[0], what)
                    trials()


@pytest.mark.reliability(16, "determinism")
@pytest.mark.parametrize("fusion", RUNGS)
def test_equal_input_gives_equal_bits(fusion, trials):
    for family in ENCODERS:
        for packed in (False, True):
            model, _ = encoder_pair(family, fusion, packed=packed)
            one = hidden_states(model, family)
            assert all(map(torch.equal, one, hidden_states(model, family))), family
            trials()
