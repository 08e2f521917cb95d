"""Which library the package loads: its own, unaltered, and nothing a folder, a variable or a link
offers instead.

Each case copies the package and its library aside, tampers with the copy and runs it in a fresh
child process: the library is refused with a reason and the model runs stock, or the decoy is never
opened.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_fusion
from hf_fusion import native

pytestmark = pytest.mark.reliability(28, "loader and trust")

# Imports torch and transformers once, then forks for every case it reads: {"site", "cwd",
# "environment", "load_only"}.
SERVER = """
import json, os, sys
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM


def load(native):
    try:
        native.load()
        return ""
    except native.FusionError as caught:
        return f"{caught.reason.name}: {caught.message}"


def run(case):
    import hf_fusion
    from hf_fusion import native
    result = {"package": list(hf_fusion.__path__)[0]}
    if not case["load_only"]:
        config = GPTNeoXConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                               intermediate_size=64, vocab_size=40, max_position_embeddings=64)
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(config).eval()
        ids = torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            stock = model.generate(ids, max_new_tokens=4, do_sample=False)
            report = hf_fusion.patch(model)
            ours = model.generate(ids, max_new_tokens=4, do_sample=False)
        result |= {"equal": torch.equal(stock, ours), "fused": hf_fusion.stats(model).fused,
                   "reason": report.reason.name if report.reason else None}
    result["error"] = load(native)
    maps = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else ""
    loaded = (line for line in maps.splitlines() if "libhf_fusion" in line)
    result["loaded"] = sorted({line.split()[-1] for line in loaded})
    return result


for line in sys.stdin:
    case = json.loads(line)
    child = os.fork()
    if child == 0:
        # an editable install answers for hf_fusion before sys.path does
        sys.meta_path[:] = [finder for finder in sys.meta_path
                            if "ScikitBuild" not in type(finder).__name__]
        sys.path.insert(0, case["site"])
        os.chdir(case["cwd"])
        os.environ.update(case["environment"])
        print("RESULT" + json.dumps(run(case)), flush=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"EXIT{status}", flush=True)
"""

DECOY = """
#include <stdint.h>
int32_t hff_abi_version(void) { return 99; }
uint64_t hff_struct_size(int32_t i) { return 1; }
"""
LOUD_DECOY = (
    DECOY
    + """
#include <stdio.h>
__attribute__((constructor)) static void loud(void) { puts("OPENED BY MISTAKE"); fflush(stdout); }
"""
)
ENTRIES = [
    name for name in native._SIGNATURES if name not in ("hff_abi_version", "hff_struct_size")
]


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of hf_fusion, patches inside, library included; its parent goes on PYTHONPATH."""
    copy = tmp_path / "site" / "hf_fusion"
    sources = [
        Path(folder) for folder in hf_fusion.__path__ if (Path(folder) / "native.py").exists()
    ]
    skipped = shutil.ignore_patterns("__pycache__", "tiny_pythia", "harness", "*.so", "*.dylib")
    shutil.copytree(sources[0], copy, ignore=skipped)
    if not (copy / "patches").exists():
        patches = Path(sys.modules["hf_fusion.patches"].__file__).parent
        shutil.copytree(patches, copy / "patches", ignore=skipped)
    shutil.copy(native.library_path(), copy)
    copy.chmod(0o755)
    return copy


def library(package: Path) -> Path:
    return package / native.library_path().name


class Server:
    """The process above; `environment` is there before its dynamic loader starts."""

    def __init__(self, log: Path, **environment: str):
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        variables.pop("HF_FUSION_ISA", None)
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=variables,
        )

    def run(
        self, package: Path, cwd: Path | None = None, load_only: bool = False, **environment: str
    ) -> dict:
        """The outcome of patch() and generate() with this copy of the package, or of loading the
        library alone.
        """
        case = {
            "site": str(package.parent),
            "cwd": str(cwd or package.parent),
            "load_only": load_only,
            "environment": environment,
        }
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        lines = []
        for line in self.process.stdout:
            lines.append(line.rstrip())
            if line.startswith("EXIT"):
                break
        shown = "\n".join(lines) + "\n" + self.log.read_text()[-4000:]
        assert lines and lines[-1] == "EXIT0", shown
        assert not any("OPENED BY MISTAKE" in line for line in lines), shown
        result = json.loads(next(line for line in lines if line.startswith("RESULT"))[6:])
        assert result["package"] == str(package), "the copy was not the package that ran"
        assert load_only or result["equal"]
        return result

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("server") / "stderr")
    yield running
    running.close()


def refused(result: dict, words: str) -> None:
    assert result["fused"] == 0
    assert result["reason"] == "LIBRARY"
    assert result["error"].startswith("LIBRARY: ")
    assert words in result["error"]


def build_decoy(path: Path, source: str) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler to build a decoy with")
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)


def test_the_copy_as_it_is_runs_fused(server, package):
    result = server.run(package)
    assert result["fused"] > 0
    assert result["loaded"] == [str(library(package))] or sys.platform != "linux"


@pytest.mark.parametrize("way", ["cwd", "LD_LIBRARY_PATH", "PATH", "HF_FUSION_LIBRARY"])
def test_a_decoy_elsewhere_is_never_opened(server, package, tmp_path, way):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    decoy = folder / library(package).name
    build_decoy(decoy, LOUD_DECOY)
    value = str(decoy) if way == "HF_FUSION_LIBRARY" else str(folder)
    value = value + os.pathsep + os.environ["PATH"] if way == "PATH" else value
    if way == "LD_LIBRARY_PATH":  # read when a process starts
        server = Server(tmp_path / "stderr", LD_LIBRARY_PATH=value)
    result = server.run(package, folder) if way == "cwd" else server.run(package, **{way: value})
    if way == "LD_LIBRARY_PATH":
        server.close()
    assert result["fused"] > 0
    assert str(decoy) not in result["loaded"]


def test_a_decoy_elsewhere_does_not_replace_a_missing_library(server, package, tmp_path):
    decoy = tmp_path / library(package).name
    build_decoy(decoy, LOUD_DECOY)
    library(package).unlink()
    refused(server.run(package, tmp_path), "is not in")


@pytest.mark.parametrize(
    "kept", ["nothing", "a header", "a quarter", "half", "all but a page", "all but a byte"]
)
def test_a_truncated_library_is_refused(server, package, kept):
    path = library(package)
    size = path.stat().st_size
    bytes_kept = {"nothing": 0, "a header": 64, "a quarter": size // 4, "half": size // 2}
    os.truncate(path, bytes_kept.get(kept, size - (4096 if kept == "all but a page" else 1)))
    refused(server.run(package), str(path))


def test_another_file_is_refused(server, package):
    library(package).write_bytes(b"#!/bin/sh\necho OPENED BY MISTAKE\n")
    refused(server.run(package), "cannot be loaded")


def test_a_folder_in_its_place_is_refused(server, package):
    library(package).unlink()
    library(package).mkdir()
    refused(server.run(package), str(library(package)))


def test_another_abi_is_refused(server, package):
    functions = "\n".join(f"int {name}(void) {{ return 0; }}" for name in ENTRIES)
    build_decoy(library(package), DECOY + functions)
    refused(server.run(package), f"ABI version 99, expected {native.ABI_VERSION}")


def test_other_struct_sizes_are_refused(server, package):
    functions = "\n".join(f"int {name}(void) {{ return 0; }}" for name in ENTRIES)
    decoy = DECOY.replace("return 99", f"return {native.ABI_VERSION}")
    build_decoy(library(package), decoy + functions)
    refused(server.run(package), "of 1 bytes, expected")


def test_a_library_without_an_entry_is_refused(server, package):
    build_decoy(library(package), DECOY)
    refused(server.run(package), "cannot be loaded")


def test_a_link_is_refused(server, package, tmp_path):
    target = tmp_path / "real.so"
    shutil.move(library(package), target)
    library(package).symlink_to(target)
    refused(server.run(package), "is a link")


def test_a_dangling_link_is_refused(server, package, tmp_path):
    library(package).unlink()
    library(package).symlink_to(tmp_path / "absent.so")
    refused(server.run(package), "is a link")


@pytest.mark.parametrize("what", ["library", "folder"])
@pytest.mark.parametrize("mode", [0o757, 0o777, 0o702])
def test_what_anyone_may_write_is_refused(server, package, what, mode):
    path = {"library": library(package), "folder": package}[what]
    path.chmod(mode)
    refused(server.run(package), str(path))


@pytest.mark.parametrize("name", ["amx9", "../scalar", "AVX2", "scalar ", "avx2,scalar", "%s%n"])
def test_an_unknown_isa_fails_loudly(server, package, name):
    result = server.run(package, load_only=True, HF_FUSION_ISA=name)
    assert result["error"].startswith("ISA: ")
    assert name in result["error"]


def test_a_known_isa_is_taken(server, package):
    assert server.run(package, HF_FUSION_ISA="scalar")["fused"] > 0
