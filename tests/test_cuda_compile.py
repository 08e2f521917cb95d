"""What nvcc makes of the CUDA kernels, without a device: registers, spills, shared memory and
instructions, per architecture.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from conftest import tool

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
# Code of one virtual architecture, for the real ones that run it.
GROUPS = {"80": ("80", "86", "89"), "90a": ("90a",), "100": ("100", "120")}
ARCHITECTURES = [real for group in GROUPS.values() for real in group]
# All kernels become these. For the rest, which run the same code, what asks for the most registers
# stands for all: of these files and of each kernel's instances in the report of this architecture.
WHOLE = ("80", "90a")
LIKE = {"86": "80", "89": "80", "100": "90a", "120": "90a"}
GREEDY = {"token", "cluster"}
KERNELS = {
    *("attend_heads", "attention_up", "phase", "token"),
    *("attend_naive", "attend_tiled", "attend_flash"),
}
GREEDIEST = {"attention_up", "token"}
REGISTERS = 65536  # of a multiprocessor
# What sm_90 has and sm_80 lacks; the registers between do not matter.
SM_90 = (
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
    "mbarrier.try_wait.parity",
    "barrier.cluster.arrive.release",
    "barrier.cluster.wait.acquire",
    "griddepcontrol.launch_dependents",
    "griddepcontrol.wait",
)
EVERYWHERE = ("ld.acquire.gpu", "ld.shared.v4.u32", "ld.global.cg.v4.u32")


@dataclass(frozen=True)
class Kernel:
    """An entry point as ptxas reports it."""

    name: str  # mangled
    architecture: str
    registers: int
    stack: int  # bytes, as are the rest
    spilled: int
    shared: int


ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def entries(report: str) -> list[Kernel]:
    found = []
    for entry in ENTRY.finditer(report):
        shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", entry["rest"])
        spilled = int(entry["stores"]) + int(entry["loads"])
        sizes = int(entry["registers"]), int(entry["stack"]), spilled
        found.append(
            Kernel(
                entry["name"], entry["architecture"], *sizes, int(shared.group(1)) if shared else 0
            )
        )
    return found


def kernel_of(name: str) -> str:
    """The kernel's own name in a mangled one: a length and so many letters."""
    length, rest = re.match(r"_ZN3hff4cuda(\d+)(\w+)", name).groups()
    return rest[: int(length)]


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr[-4000:]
    return done.stdout + done.stderr


def assemble(compiler: str, ptx: Path, real: str, chosen: tuple[str, ...] = ()) -> list[Kernel]:
    """The kernels of a PTX file, or those chosen, for a real architecture."""
    only = [f"-Xptxas=-e,{name}" for name in chosen]
    out = ptx.with_suffix(f".{real}.cubin")
    return entries(run(compiler, f"-arch=sm_{real}", "-Xptxas=-v", *only, "-cubin", "-o", out, ptx))


def compile_all(compiler: str) -> tuple[dict[str, str], list[Kernel]]:
    """PTX of all files by virtual architecture, and the kernels; two compilers at a time."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:

        def ptx_of(source: Path, group: str) -> Path:
            return Path(folder) / f"{source.stem}.{group}.ptx"

        def whole(source: Path, group: str) -> list[Kernel]:
            made = "-ptx", "-o", ptx_of(source, group), source
            run(compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", f"-arch=compute_{group}", *made)
            return assemble(compiler, made[2], group) if group in WHOLE else []

        def greediest(source: Path, real: str) -> list[Kernel]:
            most = {}
            for kernel in sorted(kernels[source, LIKE[real]], key=lambda k: k.registers):
                most[kernel_of(kernel.name)] = kernel.name
            ptx = ptx_of(source, next(g for g, reals in GROUPS.items() if real in reals))
            return assemble(compiler, ptx, real, tuple(most.values()))

        greedy = [source for source in SOURCES if source.stem in GREEDY]
        work = [(s, g) for g in GROUPS for s in (SOURCES if g in WHOLE else greedy)]
        kernels = dict(zip(work, pool.map(lambda item: whole(*item), work)))
        rest = [(source, real) for source in greedy for real in LIKE]
        kernels.update(zip(rest, pool.map(lambda item: greediest(*item), rest)))
        ptx = dict.fromkeys(GROUPS, "")
        for source, group in work:
            ptx[group] += ptx_of(source, group).read_text()
    return ptx, [kernel for found in kernels.values() for kernel in found]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[dict[str, str], list[Kernel]]:
    """What `compile_all` gives, compiled once for all processes of a parallel run."""
    compiler = tool("nvcc")
    if compiler is None:
        pytest.skip("no nvcc to compile csrc/cuda with")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / "compiled.json"
    with open(folder / "compiled.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            ptx, kernels = compile_all(compiler)
            path.write_text(json.dumps([ptx, list(map(asdict, kernels))]), encoding="utf-8")
    ptx, kernels = json.loads(path.read_text(encoding="utf-8"))
    return ptx, [Kernel(**kernel) for kernel in kernels]


def threads(ptx: str) -> dict[str, int]:
    """The most threads of a block, by entry point."""
    found = re.findall(r"\.entry (\w+)\(.*?\.maxntid (\d+)", ptx, flags=re.S)
    return {name: int(count) for name, count in found}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_keep_to_registers(compiled, architecture):
    """No spills, no stack, no static shared memory, and a block of the most threads can start."""
    ptx, kernels = compiled
    kernels = [kernel for kernel in kernels if kernel.architecture == architecture]
    group = next(group for group, reals in GROUPS.items() if architecture in reals)
    most = threads(ptx[group])
    found = {kernel_of(kernel.name) for kernel in kernels}
    assert found == (KERNELS if architecture in WHOLE else GREEDIEST)
    for kernel in kernels:
        assert (kernel.stack, kernel.spilled, kernel.shared) == (0, 0, 0), kernel
        allocated = (kernel.registers + 7) // 8 * 8 * most[kernel.name]
        assert allocated <= REGISTERS, (kernel, most[kernel.name])


def test_two_blocks_of_a_phase_fit_a_multiprocessor(compiled):
    """A phase asks for its weights while the one before still runs."""
    ptx, kernels = compiled
    for kernel in kernels:
        if "5phaseI" in kernel.name:
            most = threads(ptx["80"])[kernel.name]
            assert 2 * ((kernel.registers + 7) // 8 * 8) * most <= REGISTERS, kernel


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_become_their_instructions(compiled, group):
    ptx = compiled[0][group]
    own = ("cp.async.cg.shared.global",) if group == "80" else SM_90
    assert [wanted for wanted in (*own, *EVERYWHERE) if wanted not in ptx] == []
    assert not re.search(r"\.local\b", ptx), "local memory"
    # counters only: a sum of data by atomics would depend on timing
    atomics = set(re.findall(r"\b(?:atom|red)\.(?!f32|async)\S*\.[a-z]+\d+", ptx))
    assert {atomic.removesuffix(";") for atomic in atomics} == {"atom.acq_rel.gpu.global.add.u32"}
    absent = SM_90 if group == "80" else ("cp.async.cg.shared.global",)
    assert [unwanted for unwanted in absent if unwanted in ptx] == []


def test_nothing_but_weights_is_read_before_the_kernel_ahead_has_ended(compiled):
    """A dependent launch starts early: what comes before its wait are copies of weights into shared
    memory and their barriers.
    """
    waits = 0
    for entry in re.findall(r"\.entry \w+\(.*?\n}\n", compiled[0]["90a"], flags=re.S):
        before, wait, _ = entry.partition("griddepcontrol.wait")
        if not wait:
            continue
        waits += 1
        touched = set(re.findall(r"\b(?:ld|st|atom|red)\.(?!param)\S+", before))
        assert not touched, (entry.split("(")[0], touched)
    assert waits == 2 + 4 + 4  # attend_heads, phase, attention_up
