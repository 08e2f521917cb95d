"""Two models with the same weights, one patched and one stock, and when their answers count as the
same.
"""

from __future__ import annotations

import copy

import torch
from transformers import DynamicCache
from twins import HITS, REASONS, build

import hf_fusion

# relative L2 distance of two right answers; a test of an edit also asks that the edit moves the
# answer MOVED times as far
SAME = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1.2e-1}
MOVED = 3.0
RUNGS = ("decomposed", "attention", "attention+up", "full")
VOCABULARY = 99


def pair(
    seed: int = 0,
    fusion: str | None = "full",
    dtype: str = "fp32",
    backend: str = "auto",
    **changes,
):
    """(patched, stock): tiny models with the same weights; `fusion` None leaves both unpatched."""
    stock = build("gpt_neox", changes, dtype, "sdpa", seed)
    stock.generation_config.eos_token_id = None
    stock.generation_config.pad_token_id = 0
    patched = copy.deepcopy(stock)
    if fusion is not None:
        hf_fusion.patch(patched, fusion, backend)
    return patched, stock


def tokens(
    seed: int, batch: int = 1, length: int = 5, vocabulary: int = VOCABULARY
) -> torch.Tensor:
    """(batch, length) int64."""
    return torch.randint(
        0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


@torch.no_grad()
def answers(model, seed: int = 0, batch: int = 2) -> list[torch.Tensor]:
    """Logits of a prompt of 20 (torch's GEMMs), of one token after it, and of 3 tokens alone (one
    native call each).
    """
    cache = DynamicCache(config=model.config)
    ids = tokens(seed, batch, 21)
    return [
        model(ids[:, :20], past_key_values=cache).logits,
        model(ids[:, 20:], past_key_values=cache).logits,
        model(ids[:, :3], use_cache=False).logits,
    ]


def generate(
    model, seed: int = 0, count: int = 8, batch: int = 1, length: int = 5, **options
) -> list:
    """Tokens of a greedy generation."""
    ids = tokens(seed, batch, length)
    options = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist()


def noted(model) -> hf_fusion.Stats:
    """The counters of a patched model, added to those that the summary prints."""
    counters = hf_fusion.stats(model)
    HITS.update(counters.calls)
    for reasons in (counters.refused, counters.downgraded):
        REASONS.update(reasons)
    return counters


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    """Relative L2 distance; NaN and infinities must lie at the same places, and count nothing."""
    one, two = one.detach().double(), two.detach().double()
    if one.shape != two.shape:
        return float("inf")
    wild = ~one.isfinite()
    if not torch.equal(wild, ~two.isfinite()):
        return float("inf")
    one, two = one.masked_fill(wild, 0), two.masked_fill(wild, 0)
    return float((one - two).norm() / two.norm().clamp(min=1e-30))


def assert_same(got, want, what: str = "") -> None:
    """Fails unless two answers (tensors, or lists of them) are the same up to rounding."""
    if isinstance(want, list):
        assert len(got) == len(want), f"{what}: {len(got)} answers, expected {len(want)}"
        for index, (one, two) in enumerate(zip(got, want)):
            assert_same(one, two, f"{what}, answer {index}")
        return
    assert got.dtype == want.dtype and got.shape == want.shape, (
        f"{what}: {got.dtype} {tuple(got.shape)}, stock {want.dtype} {tuple(want.shape)}"
    )
    off = distance(got, want)
    assert off <= SAME[want.dtype], (
        f"{what}: relative distance {off:.2e} from stock, at most {SAME[want.dtype]:.0e}"
    )


def assert_moved(before: list, after: list, what: str) -> None:
    """Fails unless an edit shows in every answer: a test with an edit that does nothing proves
    nothing.
    """
    for one, two in zip(before, after, strict=True):
        assert distance(one, two) > MOVED * SAME[two.dtype], (
            f"{what}: the edit does not show in stock's own answer"
        )
