"""What the CUDA back end asks of the runtime, by nvcc's own host code on a runtime that records it:
tests/native/host. No device is needed.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from conftest import tool

ROOT = Path(__file__).resolve().parents[1]
HOST = ROOT / "tests/native/host"
CALLS = (
    "old driver", *(f"sm_{arch}" for arch in (75, 86, 90, 91, 100, 110, 120, 130)), "token",
    "chain", "chain cut off", "no image", "8 resident", "2 resident", "none resident", "apart",
    "layer", "attend",
)  # fmt: skip
IMAGES = "80-real/90a-real/120"
LAYER = ["attend_heads 1 0x5 128 dependent", "phase 1 0x5 132 dependent counts"]


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> dict[str, tuple[list[str], str]]:
    """By call: what was launched or said, and how it ended."""
    compiler = tool("nvcc")
    if compiler is None:
        pytest.skip("no nvcc to compile csrc/cuda with")
    program = tmp_path_factory.mktemp("host") / "calls"
    sources = [str(HOST / name) for name in ("calls.cu", "runtime.cc")]
    options = ["-std=c++17", "-O0", "--cudart=none", f"-I{ROOT / 'csrc'}", f"-I{HOST}"]
    options += ["-gencode=arch=compute_90,code=compute_90", "-o", str(program)]
    options += [f'-DHFF_CUDA_IMAGES="{IMAGES}"']
    done = subprocess.run([compiler, *options, *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}"
    found, lines = [], []
    for line in done.stdout.splitlines():
        if line.startswith("-> "):
            found.append((lines, line.split(": ")[1]))
            lines = []
        else:
            lines.append(line)
    return dict(zip(CALLS, found, strict=True))


def test_every_call_runs_on_its_device_and_gives_the_current_one_back(calls):
    for name, (lines, end) in calls.items():
        assert end.endswith("device 0, error 0"), name
        launched = [line for line in lines if not re.search("no luck|recorder", line)]
        assert all(line.split()[1] == "1" for line in launched), (name, launched)


def test_a_token_is_one_cooperative_launch(calls):
    assert calls["token"][0] == ["token 1 0x5 132 cooperative"]


def test_a_chain_waits_for_what_is_ahead_of_it_and_overlaps_within(calls):
    first = "phase 1 0x5 132"
    assert calls["chain"][0] == [first, *LAYER, f"{first} dependent", *LAYER, f"{first} dependent"]
    assert calls["layer"][0] == [first, *LAYER]


def test_clusters_are_as_large_as_can_be_resident(calls):
    found = [calls[f"{count} resident"][0] for count in ("8", "2", "none")]
    names = ("128 clusters of 4 counts", "64 clusters of 2 counts", "32 counts")
    assert found == [[f"attention_up 1 0x5 {name}"] for name in names]


def test_the_last_launch_moves_the_length(calls):
    """Where up has a launch of its own, which may fail, the one before leaves it."""
    assert calls["apart"][0] == ["attention_up 1 0x5 128 clusters of 4", "phase 1 0x5 132 counts"]


def test_a_device_without_an_image_is_refused(calls):
    """Code of 8.0 and 9.0 is there, of 12.0 PTX too."""
    for arch in (86, 90, 120, 130):
        assert calls[f"sm_{arch}"] == ([], "status 0, device 0, error 0")
    for arch in (91, 100, 110):
        (said,), end = calls[f"sm_{arch}"]
        assert said == f"CUDA device 1, recorder, is sm_{arch}: this build has kernels for {IMAGES}"
        assert end.startswith("status 2")
    assert calls["sm_75"][0][0].endswith("is sm_75: sm_80 is the least")
    (said,), end = calls["no image"]
    assert said.startswith("token (132 blocks") and end.startswith("status 2")


def test_failures_are_reported_once_and_leave_no_error_behind(calls):
    (said,), end = calls["old driver"]
    assert said == "no CUDA device 1: no luck, 0 devices" and end.startswith("status 2")
    (launched, said), end = calls["chain cut off"]
    assert said.endswith("cudaLaunchKernelExC: no luck") and end.startswith("status 5")
