"""The trained model reads held-out text as well as stock does, window by window, whole and token
by token.
"""

from __future__ import annotations

import pytest
from twins import HITS

from hf_fusion.harness import PerplexitySettings, run_perplexity
from hf_fusion.harness.perplexity import LIMITS

pytestmark = [pytest.mark.reliability(6), pytest.mark.usefixtures("one_thread")]

BOUNDS = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 2e-3}
# path: (windows, tokens in each, windows at a time)
PATHS = {"prefill": (42, 256, 6), "decode": (42, 256, 14)}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_paired_windows(dtype, path, trials):
    windows, size, batch = PATHS[path]
    # fp16 on a CPU without it costs torch a minute per rung
    rungs = (
        ("decomposed", "attention", "attention+up", "full")
        if (dtype, path) == ("bf16", "prefill")
        else ("full",)
    )
    result = run_perplexity(
        PerplexitySettings(
            model="tiny", dtype=dtype, rungs=("stock", *rungs), paths=(path,), window=size,
            max_windows=windows, batch=batch, threads=1,
        )
    )  # fmt: skip
    assert LIMITS == BOUNDS, "the harness judges by other bounds than it should"
    assert result.scored >= 10_000, f"{result.scored} tokens scored, expected at least 10,000"
    stock, *fused = result.rows
    assert 2 < stock.perplexity < 300, (
        f"stock's perplexity is {stock.perplexity}: the model has learnt nothing"
    )
    assert [row.name for row in fused] == list(rungs)
    for row in fused:
        what = f"{dtype} {path} {row.name}: perplexity {row.perplexity} against {stock.perplexity}"
        assert row.failure is None, f"{what}: {row.failure}"
        assert abs(row.perplexity / stock.perplexity - 1) <= BOUNDS[dtype], what
        assert row.calls["fused"] > 0 and not row.calls["refused"], f"{what}: {row.calls}"
        if row.name == "full":
            assert row.calls["calls"]["step" if path == "decode" else "prefill"] > 0, (
                f"{what}: {row.calls}"
            )
        HITS.update(row.calls["calls"])
        trials(windows)
