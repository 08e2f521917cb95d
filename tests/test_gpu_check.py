"""scripts/gpu_check.sh without a GPU, and the report of its parts."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
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
    "sanitizer": [{"tool": "memcheck", "status": 0, "outcome": "passed", "passed": True}],
}  # fmt: skip


@pytest.fixture
def script() -> str:
    """Path of scripts/gpu_check.sh."""
    path = ROOT / "scripts" / "gpu_check.sh"
    if not path.exists():
        pytest.skip("the tests run apart from their tree")
    return str(path)


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
    assert capsys.readouterr().out.splitlines()[-1] == "sanitizer: memcheck passed"


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


def test_the_script_says_what_it_does_and_takes_nothing_else(script):
    for given, status in (("--help", 0), ("-h", 0), ("small", 2)):
        done = subprocess.run(["bash", script, given], capture_output=True, text=True, check=False)
        assert done.returncode == status and not done.stderr
        first, *_, last = done.stdout.splitlines()
        assert first.startswith("On a machine") and last.startswith("Environment: PYTHON")


STUBS = {
    "nvidia-smi": "echo 'GPU 0: stub'",
    # a library for the target that is asked for, and what it was configured with
    "cmake": """
        [[ $1 == --build ]] && touch "$2/libhf_fusion.so" && exit
        while [[ $1 != -B ]]; do shift; done
        mkdir -p "$2" && echo "$CMAKE_GENERATOR $@" >"$2/options" """,
    # what the parts would leave; where Python would have found the package
    "python": """
        [[ $1 == -c ]] && { [[ $2 == *capability* ]] && echo 90; exit 0; }
        "$REAL" -c 'import importlib.util as u; print(u.find_spec("hf_fusion").origin)' >>"$LOG"
        echo "$@" >>"$LOG"
        [[ $3 == "$IN" && ($* != *--rungs* || $FAILS == every || $* == *"$FAILS"*) ]] && exit 1
        [[ $2 == *.gpu_report ]] || cp "$FOUND/$3.json" "$5" """,
    "compute-sanitizer": """
        echo "$@" >>"$LOG"
        while [[ $1 != */python ]]; do shift; done
        exec "$@" """,
}


# what the script calls beside the stubs; make is not among them
TOOLS = (
    "bash", "cat", "cp", "dirname", "env", "git", "grep", "mkdir", "nproc", "rm", "tail", "timeout",
    "touch",
)  # fmt: skip
RUNGS = ["attention", "attention+up", "full, chain", "full, token"]
# a part, a rung that fails there, and on which the larger parts then run
FAILS = [
    ("", "", RUNGS),
    ("small", "attention+up", [RUNGS[0], *RUNGS[2:]]),
    ("small", "every", []),
    ("parity", "full, token", RUNGS[:3]),
    ("speed", "every", RUNGS),
]


@pytest.mark.parametrize("within, fails, left", FAILS)
def test_every_part_runs_from_the_package_that_was_built(script, tmp_path, within, fails, left):
    """The script from end to end, every program that it calls a stub. A rung that fails by itself
    does not keep the others from being measured.
    """
    programs, found, log, build = (tmp_path / name for name in ("bin", "found", "log", "build"))
    programs.mkdir()
    found.mkdir()
    for name in TOOLS:
        (programs / name).symlink_to(shutil.which(name))
    for name, lines in STUBS.items():
        (programs / name).write_text("#!/usr/bin/env bash\n" + lines)
        (programs / name).chmod(0o755)
    for part in FOUND:
        (found / f"{part}.json").write_text('"complete": true')
    given = {"LOG": log, "FOUND": found, "REAL": sys.executable, "BUILD": build}
    given |= {"IN": within, "FAILS": fails}
    environment = os.environ | {name: str(value) for name, value in given.items()}
    environment |= {"PATH": str(programs), "PYTHON": str(programs / "python"), "PYTHONPATH": ""}
    done = subprocess.run(
        ["bash", script], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "-DHFF_WATCHDOG=ON" in (build / "watchdog/options").read_text()
    assert "WATCHDOG" not in (build / "options").read_text()
    assert (build / "options").read_text().startswith("Ninja -B")
    lines = log.read_text().splitlines()
    origins = [line for line in lines if line.endswith("hf_fusion/__init__.py")]
    ran = [line.split()[2] for line in lines if line.startswith("-m hf_fusion.harness.gpu ")]
    parts = ["small", "parity", "speed"] if left else ["small"]
    times = [part for part in parts for _ in range(1 + len(RUNGS) * (part == within))]
    assert ran == ["stream", *times, *["small"] * 3]
    after = False
    for part in parts:
        run = next(line for line in lines if line.startswith(f"-m hf_fusion.harness.gpu {part} "))
        assert run.endswith(f"{part}.json --rungs {' '.join(left if after else RUNGS)}")
        after = after or part == within
    alone = len(RUNGS) * (within == "small")
    homes = [Path(origin).parent.parent for origin in origins]
    assert homes[: 2 + alone] == [build / "site", *[build / "watchdog/site"] * (1 + alone)]
    assert set(homes[2 + alone :]) == {build / "site"}
    watched = [line for line in lines if line.startswith("--tool ")]
    assert len(watched) == 3 and all("--report-api-errors no" in line for line in watched)
    tools = json.loads((build / "parts/sanitizer.json").read_text())["rows"]
    assert [row["tool"] for row in tools] == ["memcheck", "racecheck", "synccheck"]
    assert {row["outcome"] for row in tools} == {"failed" if within == "small" else "passed"}
    for part in parts:
        assert (build / f"parts/{part}.json").exists() == (part != within)


def test_a_measurement_that_fails_leaves_the_others(tmp_path):
    failed = {"contender": "full, token", "how": "loop", "context": 32, "parity": VERDICT}
    failed |= {"error": "RuntimeError: a | b\nin capture", "passed": False}
    status, page = report(tmp_path, {**FOUND, "speed": [failed, *FOUND["speed"]]})
    assert status == 1 and "| loop | 32 | - | - | FAILED, RuntimeError: a / b in capture |" in page
    assert "| full, token | graph replay | 32 | 2.000 |" in page and "3 rows, 1 failed" in page


def test_rungs_by_themselves_are_reported_with_their_part(tmp_path):
    status, page = report(tmp_path, FOUND)
    alone = {"part": "speed", "complete": True, "rows": FOUND["speed"][:1]}
    (tmp_path / "parts/speed_3.json").write_text(json.dumps(alone))
    assert status == 0 and page.count("full, token") == 1
    status, page = report(tmp_path, FOUND)
    assert status == 1 and page.count("full, token") == 2 and "speed: 3 rows, 0 failed, cut" in page


def test_what_a_part_has_found_survives_an_interrupt(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    record = gpu.Record(tmp_path / "part.json", "small")
    record.add(passed=True)
    whole = (tmp_path / "part.json").read_text()

    def interrupted(path, text, **_):
        with open(path, "w") as file:
            file.write(text[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record.add(passed=True)
    assert (tmp_path / "part.json").read_text() == whole


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_check_says_so(script, tmp_path, capsys):
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode == 2 and "no GPU" in done.stderr
    assert gpu.main(["stream", "--out", str(tmp_path / "stream.json")]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_small_steps_on_the_gpu(tmp_path):
    assert gpu.main(["small", "--out", str(tmp_path / "small.json")]) == 0
