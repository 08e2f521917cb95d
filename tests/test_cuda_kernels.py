"""The CUDA kernels on host fibers: the native cases of layers and models on emulated devices, their
schedules as data, and 1,000 seeds of every kernel.
"""

from __future__ import annotations

import re
import subprocess

import pytest


def row(name: str, number: int, title: str):
    return pytest.param(name, id=name, marks=pytest.mark.reliability(number, title))


@pytest.mark.parametrize(
    "name",
    [
        row("schedules", 14, "CUDA kernels on fibers"),
        row("seeds", 14, "CUDA kernels on fibers"),
        row("parity", 1, "kernel parity"),
        row("differential", 9, "scalar against others"),
        row("edge", 27, "edge numerics"),
        row("values", 27, "edge numerics"),
        row("determinism", 16, "determinism"),
        row("unsupported", 8, "ABI refusals"),
    ],
)
def test_native_cases_on_the_device(name, cases, trials, capsys):
    """hff_cases --isa cuda; what it prints is shown."""
    command = [cases, "test", "--isa", "cuda", "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    with capsys.disabled():
        print("\n" + done.stdout[-20000:].rstrip())
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]
    counts = [int(count) for count in re.findall(r"trials (\d+) failures 0\b", done.stdout)]
    assert counts and "failures 0" in done.stdout
    # a kernel may have no room for a random shape on a random device, but rarely
    refused = sum(int(count) for count in re.findall(r"\((\d+) refused: no room\)", done.stdout))
    assert name == "unsupported" or refused <= sum(counts) // 20
    trials(sum(counts) - refused)
