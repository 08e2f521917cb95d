"""Kernels on host fibers: right ones give the same bits under every seed, faults are found; and the
CUDA back end compiles.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from conftest import tool

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
# What the primitives must become on sm_90; the registers between do not matter.
INSTRUCTIONS = (
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint",
    "createpolicy.fractional.L2::evict_first",
    "mbarrier.arrive.expect_tx",
    "mbarrier.try_wait.parity",
    "fence.mbarrier_init.release.cluster",
    "barrier.cluster.arrive.release",
    "barrier.cluster.wait.acquire",
    "mapa.u64",
    "cp.async.cg.shared.global",
    "cp.async.wait_group 1",
    "ld.acquire.gpu.global.u32",
    "atom.acq_rel.gpu.global.add.u32",
    "st.relaxed.gpu.global.u32",
    "ld.global.cg.v4.u32",
    "ld.global.nc.L1::no_allocate.v4.u32",
    "griddepcontrol.wait",
    "ex2.approx.ftz.f32",
)


@pytest.mark.reliability(16, "determinism")
def test_kernels_on_fibers(port_cases, trials, capsys):
    """Each case is a kernel under 1,000 seeds, or a fault that is found within them; the list is
    printed.
    """
    done = subprocess.run([port_cases], capture_output=True, text=True, timeout=600)
    with capsys.disabled():
        print("\n" + done.stdout[-40000:])
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]
    found = re.search(r"runs of right kernels (\d+), failures 0$", done.stdout.strip())
    assert found, done.stdout[-2000:]
    trials(int(found.group(1)))


def nvcc(*arguments: str) -> str:
    compiler = tool("nvcc")
    if compiler is None:
        pytest.skip("no nvcc to compile csrc/cuda/port_cuda.h with")
    source = str(ROOT / "tests/native/port_primitives.cu")
    command = [compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", *arguments, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("watchdog", [False, True], ids=["plain", "watchdog"])
def test_primitives_compile_for_every_architecture(watchdog, tmp_path):
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in ARCHITECTURES]
    if watchdog:
        targets = ["-arch=sm_90a", "-DHFF_WATCHDOG"]
    nvcc("-Xcompiler=-Wall,-Wextra", *targets, "-c", "-o", str(tmp_path / "port.o"))


def test_primitives_become_their_instructions(tmp_path):
    nvcc("-arch=sm_90", "-ptx", "-o", str(tmp_path / "port.ptx"))
    ptx = (tmp_path / "port.ptx").read_text()
    assert [i for i in INSTRUCTIONS if i not in ptx] == []


def test_make_hip_compiles_the_attention_kernels_or_says_that_it_cannot():
    """HIP 5.2, wave64 and wave32; what runs them is the fibers above."""
    make = [tool("make") or "make", "-C", str(ROOT), "--no-print-directory", "hip"]
    absent = subprocess.run([*make, "HIPCC=no-such-hipcc"], capture_output=True, text=True)
    assert absent.returncode == 0 and "nothing is compiled" in absent.stdout
    if tool("hipcc") is None:
        pytest.skip("no hipcc to compile csrc/cuda/port_hip.h with")
    done = subprocess.run(
        [*make, "HIP_ARGS=-Rpass-analysis=kernel-resource-usage"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr[-4000:]
    assert "gfx908 gfx90a gfx1030" in done.stdout
    spills = re.findall(r"(?:[SV]GPRs Spill|ScratchSize \[bytes/lane\]): (\d+)", done.stderr)
    assert len(spills) == 3 * 27 * 3 and set(spills) == {"0"}
