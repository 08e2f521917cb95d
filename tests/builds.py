"""Tools of the machine, and the native test programs, built once into build/cases."""

from __future__ import annotations

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
def program(name: str) -> str:
    """hff_cases or hff_port_cases: HFF_CASES or HFF_PORT_CASES if set, else built. Skips the test
    where there is nothing to build with.
    """
    variable = name.upper()
    if os.environ.get(variable):
        return os.environ[variable]
    cmake = tool("cmake")
    if not cmake or not (os.environ.get("CXX") or tool("c++") or tool("g++")):
        pytest.skip(
            f"no cmake or no C++ compiler to build tests/native with; set {variable} to a built {name}"
        )
    build = ROOT / "build/cases"
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(build), *OPTIONS],
        [cmake, "--build", str(build), "--parallel", "--target", name],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return str(build / name)
