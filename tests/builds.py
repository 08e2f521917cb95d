"""Tools of the machine, and the native test programs, built once into build/cases."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ("-DCMAKE_BUILD_TYPE=Release", "-DHFF_TESTS=ON", "-DHFF_FAULTS=ON", "-DHFF_EMULATE=ON")


def tool(name: str) -> str | None:
    """A program on the path or beside Python, or None."""
    beside = Path(sys.executable).parent / name
    return shutil.which(name) or (str(beside) if beside.exists() else None)


@functools.lru_cache(maxsize=None)
def native_build() -> Path:
    """build/cases: hff_cases, hff_port_cases, and a library that has fault switches and emulates
    CUDA. Skips the test where there is nothing to build with.
    """
    cmake = tool("cmake")
    if not cmake or not (os.environ.get("CXX") or tool("c++") or tool("g++")):
        pytest.skip(
            "no cmake or no C++ compiler to build tests/native with; HFF_CASES and HFF_PORT_CASES "
            "name built programs"
        )
    build = ROOT / "build/cases"
    build.mkdir(parents=True, exist_ok=True)
    with open(build / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of a parallel run build once
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(build), *OPTIONS],
            [cmake, "--build", str(build), "--parallel", str(os.cpu_count())],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return build


def program(name: str) -> str:
    """hff_cases or hff_port_cases: HFF_CASES or HFF_PORT_CASES if set, else built."""
    return os.environ.get(name.upper()) or str(native_build() / name)
