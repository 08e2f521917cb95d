"""The native library where the compiler lacks instruction sets, and the environment asks for
arithmetic of another kind: it builds, says why they are not there, and computes as ever.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import kernels_of, tool

LACKED = ("avx2", "avx512", "avx512_bf16", "amx")
CXXFLAGS = "-march=native -ffast-math -funsafe-math-optimizations"


@pytest.fixture(scope="module")
def portable(tmp_path_factory) -> ctypes.CDLL:
    """A library of the portable kernels alone, built under CXXFLAGS."""
    cmake = tool("cmake")
    if not cmake or not (os.environ.get("CXX") or tool("c++") or tool("g++")):
        pytest.skip("no cmake or no C++ compiler to build the library with")
    root, build = Path(__file__).resolve().parents[1], tmp_path_factory.mktemp("portable")
    switches = [f"-DHFF_COMPILES_{isa}=OFF" for isa in LACKED]
    switches += ["-DHFF_CUDA=OFF", f"-DHFF_KERNELS={kernels_of(root) or ''}"]
    switches += ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", f"-DCMAKE_CXX_FLAGS={CXXFLAGS}"]
    for command in (
        [cmake, "-S", str(root), "-B", str(build), *switches],
        [cmake, "--build", str(build), "--target", "hf_fusion"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    library = ctypes.CDLL(str(next(build.glob("libhf_fusion.*"))))
    library.hff_isa_name.restype = library.hff_isa.restype = ctypes.c_char_p
    library.hff_last_error.restype = ctypes.c_char_p
    return library


def test_an_instruction_set_that_is_not_built_is_absent_with_the_reason(portable):
    seen, reason = {}, ctypes.c_char_p()
    while name := portable.hff_isa_name(len(seen), ctypes.byref(reason)):
        seen[name.decode()] = reason.value and reason.value.decode()
    assert seen.pop("scalar") is None and seen.keys() == set(LACKED)
    assert all(why.startswith("built ") for why in seen.values()), seen


def test_one_that_is_not_built_is_refused(portable, monkeypatch):
    monkeypatch.delenv("HF_FUSION_ISA", raising=False)
    assert portable.hff_select_isa(None) == 0 and portable.hff_isa() == b"scalar"
    assert portable.hff_select_isa(b"avx2") != 0
    assert b"instruction set avx2 was asked for, but built " in portable.hff_last_error()
    assert portable.hff_isa() == b"scalar"


def test_flags_of_the_environment_reach_no_kernel(portable):
    commands = json.loads(Path(portable._name).with_name("compile_commands.json").read_text())
    command = next(one for one in commands if one["file"].endswith("abi.cc"))
    words = shlex.split(command["command"])
    assert set(CXXFLAGS.split()) <= set(words)
    words[words.index("-o") + 1] = "-"
    done = subprocess.run(
        [*words, "-E", "-dM"], cwd=command["directory"], capture_output=True, text=True, check=True
    )
    defined = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("#define ")}
    assert "__cplusplus" in defined
    assert not defined & {"__FAST_MATH__", "__SSE3__", "__AVX__"}


def test_loading_the_library_leaves_denormals_to_the_process(portable):
    check = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); sys.exit(float('5e-324') * 1.0 == 0)"
    assert subprocess.run([sys.executable, "-c", check, portable._name]).returncode == 0
