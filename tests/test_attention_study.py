"""The study of the attention kernels: every row judged, nothing timed here."""

from __future__ import annotations

import json
import os

import pytest

from hf_fusion import cli, harness
from hf_fusion.harness import attention_study, attention_tune
from hf_fusion.harness.attention_memory import child
from hf_fusion.harness.inputs import InputError
from hf_fusion.harness.memory import fresh_process

SMALL = harness.AttentionSettings(
    lengths=(16, 40), head_dims=(8,), dtypes=("fp32", "bf16"), heads=2, context=33, decode_heads=4,
    rounds=1, threads=1, causal=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def result():
    return harness.run_attention(SMALL)


def test_every_contender_is_judged_at_every_point(result):
    assert result.passed
    assert [(p.kind, p.dtype, p.keys) for p in result.points] == [
        (kind, dtype, keys)
        for dtype in ("fp32", "bf16")
        for kind, keys in (("prefill", 16), ("prefill", 40), ("MHA", 33), ("GQA", 33), ("MQA", 33))
    ]
    for point in result.points:
        assert [row.name for row in point.rows] == list(attention_study.CONTENDERS)
        for row in point.rows:
            assert row.error <= row.allowed and row.ms.median > 0


def test_caches_shrink_by_the_group_factor(result):
    sizes = {p.kind: p.cache_bytes for p in result.points if p.dtype == "fp32"}
    assert sizes["MHA"] == 2 * 4 * 33 * 8 * 4
    assert sizes["MHA"] == 4 * sizes["GQA"] == 4 * sizes["MQA"]


def test_result_prints_and_goes_through_json(result, tmp_path):
    text = result.markdown()
    for heading in ("fp32, head size 8", "Decode steps at 33 tokens", "GQA 4/1", "naive", "flash"):
        assert heading in text
    harness.write(result, tmp_path / "r.json", tmp_path / "r.md", tmp_path / "r.png")
    read = json.loads((tmp_path / "r.json").read_text())
    assert read["kind"] == "attention" and read["passed"]
    assert read["points"][0]["rows"][0]["over_sdpa"] == 1.0
    assert (tmp_path / "r.png").stat().st_size > 5000


def test_a_wrong_kernel_gets_no_time(monkeypatch):
    right = attention_study.compute

    def wrong(name, inputs, causal):
        out = right(name, inputs, causal)
        return out * 1.001 if name == "flash" else out

    monkeypatch.setattr(attention_study, "compute", wrong)
    settings = attention_study.replace(SMALL, lengths=(16,), dtypes=("fp32",), context=0)
    result = harness.run_attention(settings)
    row = result.points[0].row("flash")
    assert not result.passed and row.ms is None and "exceeds" in row.failure
    assert result.points[0].row("tiled").ms is not None
    assert "no result" in result.markdown() and "failed" in result.markdown()


def test_what_needs_too_much_memory_is_left_out_with_its_reason():
    settings = attention_study.replace(
        SMALL, lengths=(64,), dtypes=("fp32",), context=0, most_bytes=1 << 15
    )
    point = harness.run_attention(settings).points[0]
    assert point.row("naive").ms is None and "GiB" in point.row("naive").absent
    assert point.row("sdpa").ms is not None


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the system keeps the peak of a process"
)
def test_memory_is_of_the_call_alone():
    request = {
        "contender": "naive", "shape": [0, 1, 4, 4], "tokens": [1024, 1024], "head_dim": 8,
        "dtype": "fp32", "causal": False, "threads": 1,
    }  # fmt: skip
    grew = {}
    for name in ("naive", "flash"):
        found = fresh_process(child.__module__, {**request, "contender": name}, name)
        grew[name] = found["peak"] - found["loaded"]
    assert grew["naive"] >= 0.9 * 4 * 1024 * 1024 * 4 > 8 * grew["flash"]


def test_tune_compares_the_table_with_every_candidate():
    settings = attention_study.replace(SMALL, lengths=(40,), dtypes=("fp32",))
    result = attention_tune.run_tune(settings, queries=(8, 16), keys=(16, 32))
    assert [row.kernel for row in result.rows] == ["tiled", "flash"]
    for row in result.rows:
        assert row.best in {row.table, (8, 16), (8, 32), (16, 16), (16, 32)}
        assert row.ratio >= 1.0 and row.holds == (row.ratio <= attention_tune.TOLERANCE)
    assert "attend_table.h" in result.markdown()
    assert result.to_dict()["rows"][0]["ratio"] >= 1.0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"contenders": ("fast",)}, "contender"),
        ({"lengths": ()}, "length"),
        ({"dtypes": ("int8",)}, "dtype"),
        ({"decode_heads": 6}, "decode heads"),
        ({"head_dims": (0,)}, "head size"),
    ],
)
def test_settings_refuse(change, word):
    with pytest.raises(InputError, match=word):
        attention_study.replace(SMALL, **change).checked()


def test_command_line(capsys, tmp_path):
    arguments = "--lengths 16 --head-dims 8 --dtypes fp32 --heads 2 --rounds 1 --threads 1".split()
    assert cli.main(["bench", "attention", *arguments, "--context", "0"]) == 0
    assert "fp32, head size 8" in capsys.readouterr().out
    assert cli.main(["bench", "attention", "--tune", "--plot", str(tmp_path / "x.png")]) == 2
    assert "--tune" in capsys.readouterr().err


def test_group_sizes_are_those_of_the_names():
    made = [
        attention_study.decode(
            attention_study.replace(SMALL, contenders=("flash",)).checked(), "fp32", 8, kind
        )
        for kind in attention_study.GROUPS
    ]
    assert [(p.heads, p.kv_heads) for p in made] == [(4, 4), (4, 1), (4, 1)]
