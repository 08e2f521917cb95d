"""Calls of encoders with arguments of every kind: fused where a kernel takes them, otherwise
stock's result, or stock's error, and a counted reason.
"""

from __future__ import annotations

import copy

import pytest
import torch
from encoders import RUNGS, TEXT, VISION, encoder_pair, hidden_states, sample
from pairs import assert_same, noted
from test_bad_input import assert_same_outcome, outcome
from transformers import DynamicCache
from twins import ENCODERS

import hf_fusion
from hf_fusion import FusionError
from hf_fusion.report import Reason

pytestmark = [
    pytest.mark.reliability(10, "bad models and input"),
    pytest.mark.usefixtures("one_thread"),
]

BERTS = tuple(name for name in TEXT if name != "distilbert")
BATCH, LENGTH = 3, 17
PARTIAL = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.7
PARTIAL |= torch.eye(LENGTH, dtype=torch.bool)
ADDED = torch.zeros(PARTIAL.shape).masked_fill(~PARTIAL, torch.finfo(torch.float32).min)
RIGHT = (torch.arange(LENGTH) < torch.tensor([[17], [4], [9]])).long()
NOISE = torch.randn(BATCH, LENGTH, 32, generator=torch.Generator().manual_seed(3))
FUSED, NOTHING = frozenset(), None  # no reason; any reason or none, as stock itself may raise

# arguments of a forward beside input_ids or pixel_values -> (families, reasons at the full rung)
CALLS = {
    "nothing": ({}, ENCODERS, FUSED),
    "2D ones": ({"attention_mask": RIGHT * 0 + 1}, ENCODERS, FUSED),
    "2D ragged": ({"attention_mask": RIGHT}, ENCODERS, FUSED),
    "2D bool": ({"attention_mask": RIGHT.bool()}, ENCODERS, FUSED),
    "2D float": ({"attention_mask": RIGHT.float()}, ENCODERS, FUSED),
    "2D int32": ({"attention_mask": RIGHT.int()}, ENCODERS, FUSED),
    "2D strided": ({"attention_mask": RIGHT.t().contiguous().t()}, ENCODERS, FUSED),
    "4D bool": ({"attention_mask": PARTIAL}, ENCODERS, {Reason.INPUT}),
    "4D bool of one row": ({"attention_mask": PARTIAL[:1]}, ENCODERS, {Reason.INPUT}),
    "4D additive": ({"attention_mask": ADDED}, ENCODERS, {Reason.INPUT}),
    "4D biases": ({"attention_mask": ADDED + NOISE[:, None, :, :LENGTH]}, ENCODERS,
                  {Reason.INPUT}),
    "4D of other heads": ({"attention_mask": PARTIAL.repeat(1, 4, 1, 1)}, ENCODERS,
                          {Reason.INPUT, Reason.MASK}),
    "4D too small": ({"attention_mask": PARTIAL[..., :9]}, ENCODERS, {Reason.INPUT, Reason.MASK}),
    "3D": ({"attention_mask": PARTIAL[:, 0]}, ENCODERS, {Reason.INPUT, Reason.MASK}),
    "1D": ({"attention_mask": RIGHT[0]}, ENCODERS, {Reason.INPUT}),
    "2D too short": ({"attention_mask": RIGHT[:, :9]}, ENCODERS, {Reason.MASK}),
    "2D of other rows": ({"attention_mask": RIGHT[:2]}, ENCODERS, {Reason.MASK}),
    "2D empty": ({"attention_mask": RIGHT[:, :0]}, ENCODERS, {Reason.EMPTY_INPUT}),
    "a string for a mask": ({"attention_mask": "ones"}, ENCODERS, {Reason.TENSOR_TYPE}),
    "hidden states": ({"output_hidden_states": True}, ENCODERS, {Reason.OUTPUTS}),
    "attentions": ({"output_attentions": True}, ENCODERS, {Reason.OUTPUTS}),
    "tuple": ({"return_dict": False}, ENCODERS, {Reason.RETURN_TUPLE}),
    "causal": ({"is_causal": True}, ENCODERS, NOTHING),
    "unknown argument": ({"no_such_argument": 1}, ENCODERS, {Reason.ARGUMENT}),
    "embeds": ({"input_ids": None, "inputs_embeds": NOISE}, TEXT, FUSED),
    "ragged embeds": ({"input_ids": None, "inputs_embeds": NOISE, "attention_mask": RIGHT}, TEXT,
                      FUSED),
    "strided embeds": ({"input_ids": None, "inputs_embeds": NOISE.transpose(0, 1).contiguous()
                        .transpose(0, 1)}, TEXT, FUSED),
    "embeds of another dtype": ({"input_ids": None, "inputs_embeds": NOISE.double()}, TEXT,
                                NOTHING),
    "embeds too narrow": ({"input_ids": None, "inputs_embeds": NOISE[..., :8]}, TEXT, NOTHING),
    "NaN embeds": ({"input_ids": None, "inputs_embeds": NOISE * float("nan")}, TEXT, FUSED),
    "ids and embeds": ({"inputs_embeds": NOISE}, TEXT, {Reason.INPUT}),
    "neither": ({"input_ids": None}, TEXT, {Reason.INPUT}),
    "positions": ({"position_ids": torch.arange(LENGTH).flip(0)[None]}, TEXT, FUSED),
    "positions of a row": ({"position_ids": torch.arange(LENGTH)[None] + RIGHT}, TEXT, FUSED),
    "positions far out": ({"position_ids": torch.arange(LENGTH)[None] + 5000}, TEXT, NOTHING),
    "token types": ({"token_type_ids": RIGHT * 0}, BERTS, FUSED),
    "two token types": ({"token_type_ids": 1 - RIGHT}, ("bert",), FUSED),
    "no tokens": ({"input_ids": torch.ones(2, 0, dtype=torch.int64)}, TEXT, NOTHING),
    "no rows": ({"input_ids": torch.ones(0, 5, dtype=torch.int64)}, TEXT, NOTHING),
    "ids of floats": ({"input_ids": NOISE[..., 0]}, TEXT, NOTHING),
    "ids out of range": ({"input_ids": torch.full((2, 5), 99)}, TEXT, NOTHING),
    "int32 ids": ({"input_ids": (RIGHT + 5).int()}, TEXT, FUSED),
    "cache asked for": ({"use_cache": True}, BERTS, FUSED),
    "encoder states": ({"encoder_hidden_states": NOISE}, BERTS, {Reason.ARGUMENT}),
    "encoder mask": ({"encoder_attention_mask": RIGHT}, BERTS, {Reason.ARGUMENT}),
    "a picture that fits": ({"pixel_values": torch.randn(2, 3, 30, 30),
                             "interpolate_pos_encoding": None}, VISION, FUSED),
    "a picture that does not": ({"interpolate_pos_encoding": False}, VISION, NOTHING),
    "a picture of fp64": ({"pixel_values": torch.randn(2, 3, 6, 42).double()}, VISION, FUSED),
    "one channel": ({"pixel_values": torch.randn(2, 1, 30, 30)}, VISION, NOTHING),
    "no pictures": ({"pixel_values": torch.randn(0, 3, 30, 30)}, VISION, NOTHING),
    "no pixels given": ({"pixel_values": None}, VISION, {Reason.INPUT}),
    "a strided picture": ({"pixel_values": torch.randn(2, 42, 6, 3).permute(0, 3, 2, 1)}, VISION,
                          FUSED),
}  # fmt: skip


def tensors(out) -> list[torch.Tensor]:
    """Every tensor of an output, in order, tuples inside it unrolled."""
    found = []
    for value in out if isinstance(out, tuple) else out.to_tuple():
        values = value if isinstance(value, (tuple, list)) else (value,)
        found += [t for t in values if isinstance(t, torch.Tensor)]
    return found


def answer(model, call: dict) -> list[torch.Tensor]:
    """Tensors of one forward without gradients; hidden states of tokens only."""
    with torch.no_grad():
        found = tensors(model(**call))
    mask = call.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not call.get("output_attentions"):
        found[0] = found[0][mask != 0]
    return found


def check(model, stock, call: dict, reasons, fusion: str, what: str) -> None:
    """Same result or error as stock; refused or downgraded for `reasons` at the full rung."""
    counters = hf_fusion.stats(model)
    counters.clear()
    got = outcome(lambda: answer(model, copy.copy(call)))
    want = outcome(lambda: answer(stock, copy.copy(call)))
    assert_same_outcome(got, want, what)
    seen = set(noted(model).refused) | set(counters.downgraded)
    if fusion == "full" and reasons is not NOTHING:
        expected = {reason.value for reason in reasons}
        assert seen <= expected and bool(seen) == bool(expected), f"{what}\n{counters}"
        assert expected or counters.calls["encode"] == 1, f"{what}\n{counters}"


@pytest.mark.parametrize("fusion", RUNGS)
@pytest.mark.parametrize("family", ENCODERS)
def test_calls(family, fusion, trials):
    model, stock = encoder_pair(family, fusion)
    for name, (changes, families, reasons) in CALLS.items():
        if family not in families:
            continue
        call = sample(family, batch=BATCH, length=LENGTH) | changes
        call = {k: v for k, v in call.items() if v is not None}
        check(model, stock, call, reasons, fusion, f"{family}, {fusion}: {name}")
        trials()
    counters = hf_fusion.stats(model)
    counters.clear()
    assert_same(hidden_states(model, family), hidden_states(stock, family), "afterwards")
    assert counters.fused and not counters.refused and not counters.downgraded


@pytest.mark.parametrize("family", BERTS)
def test_a_cache_is_stock_s_affair(family):
    model, stock = encoder_pair(family)
    calls = [
        sample(family) | {"past_key_values": DynamicCache(config=model.config), "use_cache": True}
        for _ in range(2)
    ]
    got, want = outcome(lambda: answer(model, calls[0])), outcome(lambda: answer(stock, calls[1]))
    assert_same_outcome(got, want, family)
    counters = noted(model)
    assert set(counters.refused) == {Reason.ARGUMENT.value} and not counters.fused
    lengths = [call["past_key_values"].get_seq_length() for call in calls]
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize("changes", (
    {"is_decoder": True}, {"is_decoder": True, "add_cross_attention": True},
), ids=str)  # fmt: skip
@pytest.mark.parametrize("fusion", RUNGS)
@pytest.mark.parametrize("family", BERTS)
def test_decoders_run_stock(family, fusion, changes):
    model, stock = encoder_pair(family, fusion, **changes)
    report = hf_fusion.patch(model, fusion)
    assert report.fused_layers == 0 and {r.reason for r in report.layers} == {Reason.NOT_ENCODER}
    for more in ({}, {"encoder_hidden_states": NOISE} if len(changes) > 1 else {}):
        call = sample(family) | {"use_cache": False} | more
        assert_same_outcome(outcome(lambda: answer(model, call)), answer(stock, call), family)
    counters = noted(model)
    assert counters.fused == 0 and Reason.NOT_ENCODER.value in counters.refused, counters
    with pytest.raises(FusionError) as caught:
        hf_fusion.patch(model, fusion, strict=True)
    assert caught.value.reason is Reason.NOT_ENCODER


@pytest.mark.parametrize("family", BERTS)
def test_an_encoder_that_is_told_to_be_a_decoder(family):
    model, stock = encoder_pair(family)
    hidden_states(model, family)
    for m in (model, stock):
        m.config.is_decoder = True
    call = sample(family, mask="right") | {"use_cache": False}
    assert_same(answer(model, call), answer(stock, call), f"{family}, config.is_decoder")
    assert Reason.NOT_ENCODER.value in noted(model).downgraded
    for m in (model, stock):
        m.config.is_decoder = False
    assert_same(answer(model, call), answer(stock, call), f"{family}, back")
    assert hf_fusion.stats(model).calls["encode"] == 3
