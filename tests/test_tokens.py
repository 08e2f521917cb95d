"""Tokens of the trained model: equal to stock's in fp32, and in fp16 and bf16 different only where
stock errs as much.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from shapes import DTYPES, STOCK_FACTOR, ULPS
from twins import fused_hits

import hf_fusion
from hf_fusion.harness import load_model
from hf_fusion.harness.models import heldout_text

pytestmark = [pytest.mark.reliability(4), pytest.mark.usefixtures("one_thread")]

KERNELS = ("full", "attention+up", "attention")


@functools.lru_cache(maxsize=None)
def trained(dtype: str):
    """The shipped model: stock, a copy to patch, and float64."""
    loaded = load_model("tiny", dtype)
    return loaded.model, copy.deepcopy(loaded.model), copy.deepcopy(loaded.model).double()


@functools.lru_cache(maxsize=None)
def text_ids() -> torch.Tensor:
    """The held-out text as token ids (tokens,)."""
    return load_model("tiny", "fp32").tokenizer(heldout_text(), return_tensors="pt").input_ids[0]


def prompts(count: int, length: int, start: int = 0) -> torch.Tensor:
    """(count, length) pieces of the held-out text, spread over it."""
    ids = text_ids()
    apart = (ids.numel() - length - start) // count
    return torch.stack([ids[start + i * apart :][:length] for i in range(count)])


def greedy(model, ids, **options):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )


@pytest.mark.parametrize("fusion, backend", [(f, "cpu") for f in KERNELS] + [("full", "reference")])
def test_256_greedy_tokens_in_fp32(fusion, backend, trials):
    stock, fused, _ = trained("fp32")
    ids = prompts(2, 32)
    expected = greedy(stock, ids, max_new_tokens=256)
    assert len(set(expected[0, 32:].tolist())) > 5, (
        "stock's text repeats one token and proves little"
    )
    with hf_fusion.patched(fused, fusion, backend), fused_hits(fused, fusion, least=256):
        got = greedy(fused, ids, max_new_tokens=256)
    assert torch.equal(got, expected), (
        f"{fusion} on {backend} differs at {(got != expected).nonzero()[:3].tolist()}"
    )
    trials(ids.shape[0])


@torch.no_grad()
def differs_legitimately(
    dtype: str, ids: torch.Tensor, ours: int, theirs: int
) -> tuple[float, float]:
    """(gap, most): how much better stock's token is than ours after ids (tokens,), and how much the
    parity rule allows.

    A logit may be off by twice stock's own error and two units in the last place, so two of them
    by twice that.
    """
    stock, _, exact = trained(dtype)
    logits, truth = (model(ids[None]).logits[0, -1].double() for model in (stock, exact))
    error = float((logits - truth).abs().max())
    ulp = torch.finfo(DTYPES[dtype]).eps * float(truth.abs().max())
    return float(truth[theirs] - truth[ours]), 2 * (STOCK_FACTOR * error + ULPS * ulp)


@pytest.mark.parametrize("fusion", KERNELS)
@pytest.mark.parametrize("dtype", ("bf16", "fp16"))
def test_low_precision_tokens_differ_only_within_stock_error(dtype, fusion, trials):
    stock, fused, _ = trained(dtype)
    ids = prompts(24, 24, start=100)
    expected = greedy(stock, ids, max_new_tokens=40)
    with hf_fusion.patched(fused, fusion), fused_hits(fused, f"{dtype} {fusion}", least=40):
        got = greedy(fused, ids, max_new_tokens=40)
    equal = 0
    for row, (ours, theirs) in enumerate(zip(got, expected)):
        different = (ours != theirs).nonzero()
        equal += len(different) == 0
        if len(different):
            at = int(different[0])
            gap, most = differs_legitimately(dtype, theirs[:at], int(ours[at]), int(theirs[at]))
            assert gap <= most, (
                f"{dtype} {fusion}: prompt {row}, token {at}: "
                f"stock's is {gap:.4f} better, allowed {most:.4f}"
            )
        trials()
    # rounding decides near ties only: most prompts must have none
    assert equal > len(ids) / 2, (
        f"{dtype} {fusion}: only {equal} of {len(ids)} prompts continue as stock does"
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_sampled_rows_equal_rows_alone(dtype, trials):
    """A batch decodes to the tokens that each row gives alone: rows do not see one another."""
    _, fused, _ = trained(dtype)
    ids = prompts(5, 16)
    with hf_fusion.patched(fused), fused_hits(fused, dtype):
        together = greedy(fused, ids, max_new_tokens=20, use_cache=True)
        for row in range(len(ids)):
            # the prompt of 80 rows runs through torch's GEMMs, whose bits depend on the rows;
            # decode starts equal
            alone = greedy(fused, ids[row : row + 1], max_new_tokens=20)
            if dtype == "fp32":
                assert torch.equal(alone[0], together[row]), (
                    f"{dtype}: row {row} differs from itself alone"
                )
            else:
                different = (alone[0] != together[row]).nonzero()
                if len(different):
                    at = int(different[0])
                    gap, most = differs_legitimately(
                        dtype, alone[0, :at], int(together[row, at]), int(alone[0, at])
                    )
                    assert abs(gap) <= most, (
                        f"{dtype}: row {row}, token {at}: gap {gap:.4f}, allowed {most:.4f}"
                    )
            trials()
