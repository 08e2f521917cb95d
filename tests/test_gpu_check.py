"""scripts/gpu_check.sh without a GPU, and the report of its parts."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path

import pytest
import torch

from hf_fusion.harness import gpu, gpu_report

ROOT = Path(__file__).resolve().parents[1]
VERDICT = {"error": 1.0, "stock_error": 2.0, "ratio": 0.5, "fused": True, "passed": True}
SPEED = {"how": "graph replay", "context": 32, "ms_per_token": 2.0, "bytes_per_token": 6 * 10**9}
FOUND = {
    "stream": [
        {"kind": "read (sum)", "bytes_per_second": 4e12},
        {"kind": "copy", "bytes_per_second": 5e12},
    ],
    "parity": [{"shape": "pythia-14m", "dtype": "fp16", **VERDICT}],
    "speed": [
        {"contender": "full, token", "parity": VERDICT, **SPEED},
        {"contender": "stock, eager", "parity": None, **SPEED},
    ],
    "small": [{"head_dim": 32, "rung": "attention", "passed": True}],
    "sanitizer": [{"tool": "memcheck", "status": 0, "passed": True}],
}  # fmt: skip


def report(folder: Path, found: dict, complete: bool = True) -> tuple[int, str]:
    """(exit status, page) of a report over these parts."""
    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    for part, rows in found.items():
        data = {"part": part, "complete": complete, "rows": rows, "machine": {"gpu": "H200"}}
        (parts / f"{part}.json").write_text(json.dumps(data))
    status = gpu_report.main([str(parts), "--out", str(folder), "--commit", "abc"])
    assert json.loads((folder / "gpu.json").read_text()).keys() == found.keys()
    return status, (folder / "gpu.md").read_text()


def test_the_report_puts_a_verdict_beside_every_speed(tmp_path, capsys):
    status, page = report(tmp_path, FOUND)
    assert status == 0 and "H200" in page and "commit abc" in page and "4000 GB/s" in page
    first = "| full, token | graph replay | 32 | 2.000 | 0.75 | passed, error 0.50 x stock's |"
    assert first in page
    assert "| stock, eager | graph replay | 32 | 2.000 | 0.75 | stock |" in page
    assert capsys.readouterr().out.splitlines()[-1] == "sanitizer: 1 rows, 0 failed, complete"


@pytest.mark.parametrize("part", ("parity", "speed", "small", "sanitizer"))
def test_one_failure_fails_the_check(tmp_path, part):
    found = copy.deepcopy(FOUND)
    row = found[part][0]
    (row["parity"] if part == "speed" else row)["passed"] = False
    status, page = report(tmp_path, found)
    assert status == 1 and ("FAILED" in page) == (part == "speed")


def test_what_is_missing_or_cut_off_fails_the_check(tmp_path):
    status, page = report(tmp_path, {k: v for k, v in FOUND.items() if k != "sanitizer"})
    assert status == 1 and "sanitizer: not run" in page
    status, page = report(tmp_path, FOUND, complete=False)
    assert status == 1 and "cut off" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_check_says_so(tmp_path, capsys):
    script = ROOT / "scripts" / "gpu_check.sh"
    if not script.exists():
        pytest.skip("the tests run apart from their tree")
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert done.returncode == 2 and "no GPU" in done.stderr
    assert gpu.main(["stream", "--out", str(tmp_path / "stream.json")]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_small_steps_on_the_gpu(tmp_path):
    assert gpu.main(["small", "--out", str(tmp_path / "small.json")]) == 0
