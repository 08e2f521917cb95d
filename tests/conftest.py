"""Shared fixtures, and the summary at the end of a run: per row of reliability, how often it was
tried. A row is one kind of promise, with a number and a name: those of ROWS, and of the tests'
`reliability` markers.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from twins import HITS, REASONS

from hf_fusion import generation, native
from hf_fusion.report import FusionError
from hf_fusion.step import CpuBackend

ROWS = {
    1: "kernel parity", 2: "exact kernels", 3: "layer and model parity", 4: "generation",
    5: "common model checks", 6: "perplexity", 9: "scalar against others", 13: "guard pages",
    16: "determinism", 26: "big index", 27: "edge numerics",
}  # fmt: skip
_trials: Counter = Counter()
_failures: Counter = Counter()
_skips: dict = defaultdict(Counter)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "reliability(row, name): counts the test's trials in a row of the summary"
    )


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """torch.get_num_threads() is 1 for the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def trials(request):
    """Counts trials of a test that makes more than one: call it with how many passed."""
    request.node.hff_trials = 0

    def add(count: int = 1) -> None:
        request.node.hff_trials += count

    return add


@pytest.fixture
def native_rows(request):
    """Counts the trials of every row that hff_cases has printed: call it with its output; returns
    the rows.
    """

    def read(output: str) -> set[int]:
        lines = re.findall(r"^rows? ([\d, ]+) .*: trials (\d+) failures (\d+)", output, re.M)
        found = request.node.hff_rows = [
            [int(row), int(count), int(failures)]
            for rows, count, failures in lines
            for row in rows.split(",")
        ]
        return {row for row, *_ in found}

    return read


def available_isas() -> list[str]:
    """Instruction sets that this machine can run."""
    try:
        return [name for name, reason in native.isas() if reason is None]
    except FusionError:
        return []


@pytest.fixture
def force_isa():
    """Forces an instruction set by name for the rest of the test."""
    yield native.select_isa
    native.select_isa(None)


@pytest.fixture
def native_calls(monkeypatch) -> list[int]:
    """Steps of every native call; a slow machine makes them no shorter."""
    monkeypatch.setattr(generation, "_LONGEST_CALL", 1e3)
    counts: list[int] = []
    original = CpuBackend.steps

    def noting(self, model, ids, slots, mask, positions, rope, steps, *sampling):
        counts.append(steps)
        return original(self, model, ids, slots, mask, positions, rope, steps, *sampling)

    monkeypatch.setattr(CpuBackend, "steps", noting)
    return counts


def tool(name: str) -> str | None:
    """Path of a program, on PATH or beside this Python."""
    beside = Path(sys.executable).parent / name
    return shutil.which(name) or (str(beside) if beside.exists() else None)


def kernels_of(root: Path) -> Path | None:
    """The package's own build where `make` has left it, unless the sources have changed since."""
    package = root / "build/package"
    built = [path.stat().st_mtime for path in package.glob("CMakeFiles/hff_*.dir/csrc/cpu/*.o")]
    sources = [path.stat().st_mtime for path in (root / "csrc").rglob("*") if path.is_file()]
    changed = max(*sources, (root / "CMakeLists.txt").stat().st_mtime)
    return package if built and min(built) > changed else None


@pytest.fixture(scope="session")
def native_build() -> Path:
    """build/cases, with hff_cases, hff_port_cases and a library that has fault switches and
    emulates CUDA.
    """
    cmake = tool("cmake")
    if not cmake or not (os.environ.get("CXX") or tool("c++") or tool("g++")):
        pytest.skip("no cmake or no C++ compiler to build the native cases with")
    root = Path(__file__).resolve().parents[1]
    build = root / "build/cases"
    build.mkdir(parents=True, exist_ok=True)
    switches = [f"-DHFF_{name}=ON" for name in ("TESTS", "FAULTS", "EMULATE")]
    switches.append(f"-DHFF_KERNELS={kernels_of(root) or ''}")
    with open(build / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of a parallel run build once
        for command in (
            [cmake, "-S", str(root), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *switches],
            [cmake, "--build", str(build), "--parallel", str(os.cpu_count())],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return build


@pytest.fixture(scope="session")
def cases(request) -> str:
    """hff_cases: HFF_CASES if set, else built."""
    given = os.environ.get("HFF_CASES")
    return given or str(request.getfixturevalue("native_build") / "hff_cases")


@pytest.fixture(scope="session")
def port_cases(request) -> str:
    """hff_port_cases: HFF_PORT_CASES if set, else built."""
    given = os.environ.get("HFF_PORT_CASES")
    return given or str(request.getfixturevalue("native_build") / "hff_port_cases")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call":
        report.user_properties += [("rows", row) for row in getattr(item, "hff_rows", ())]
    marker = item.get_closest_marker("reliability")
    if marker is not None and not (report.when != "call" and report.passed):
        counted = getattr(item, "hff_trials", None)
        report.user_properties.append(("reliability", [*marker.args, counted]))
    return report


def pytest_runtest_logreport(report):
    """Counts what this process ran, or what its workers report."""
    for name, value in report.user_properties:
        if name == "rows":
            row, trials, failures = value
            _trials[row] += trials
            _failures[row] += failures
        if name != "reliability" or (report.when != "call" and report.passed):
            continue
        row, *title, counted = value
        if title:
            ROWS[row] = title[0]
        if report.skipped:
            longrepr = report.longrepr
            reason = longrepr[2] if isinstance(longrepr, (tuple, list)) else str(longrepr)
            _skips[row][reason.removeprefix("Skipped: ")] += 1
        else:
            # a test that counts its trials has passed those it counted; the one that failed is one
            # more
            _trials[row] += (1 if counted is None else counted) + (
                report.failed and counted is not None
            )
            _failures[row] += report.failed


def pytest_sessionfinish(session):
    """A worker of a parallel run hands what it saw to the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["seen"] = dict(HITS), dict(REASONS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    for total, seen in zip((HITS, REASONS), getattr(node, "workeroutput", {}).get("seen", ())):
        total.update(seen)


def pytest_terminal_summary(terminalreporter):
    if not _trials and not _skips:
        return
    terminalreporter.section("reliability")
    for row in sorted(set(_trials) | set(_skips)):
        trials, failures = _trials[row], _failures[row]
        bound = (
            f"failure rate below {3 / trials:.2%} at 95 %"
            if trials and not failures
            else "no bound"
        )
        skips = "; ".join(f"{count} x {reason}" for reason, count in _skips[row].items()) or "none"
        terminalreporter.line(
            f"row {row:2} {ROWS.get(row, ''):24} {trials:6} trials  {failures} failures  {bound}  "
            f"skips: {skips}"
        )
    fused = ", ".join(f"{level} {count}" for level, count in sorted(HITS.items()) if count)
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(REASONS.items()))
    terminalreporter.line(f"fused calls: {fused or 'none'}")
    terminalreporter.line(f"reasons seen: {reasons or 'none'}")
