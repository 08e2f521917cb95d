"""What a number needs beside it to be a claim: machine, versions, commit, command."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import hf_fusion

STREAM_BYTES = 512 * 1024 * 1024
PEAK_SIZE, PEAK_REPEATS = 2048, 2
# Environment variables that move timings: OMP_WAIT_POLICY=passive slows stock, and hardly us.
_MOVING = ("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_CPU_", "HF_FUSION_ISA")


def environment(threads: int | None = None) -> dict[str, Any]:
    """Machine, versions, commit and command line of this process, ready for JSON."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "isa": _isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": threads or torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("hf-fusion", "torch", "transformers")},
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_MOVING)},
        "commit": commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def describe(record: dict[str, Any]) -> str:
    """One line for under a table."""
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items() if value)
    source = f", commit {record['commit']}" if record["commit"] else ""
    moved = "".join(f"; {name}={value}" for name, value in record["variables"].items())
    return (
        f"Machine: {record['cpu']}, {record['cores']} cores, threads {record['threads']}, "
        f"kernels {record['isa'] or 'absent'}; {versions}{source}{moved}."
    )


def cpu_model() -> str:
    """The CPU's name as the kernel gives it, else the architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the source tree the package runs from, with "+" when that tree has changes;
    None elsewhere.
    """
    for root in hf_fusion.__path__:
        folder = Path(root).parent
        if not (folder / ".git").exists():
            continue
        try:
            head = _git(folder, "rev-parse", "--short=12", "HEAD")
            changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
        except (OSError, subprocess.SubprocessError):
            return None
        return head + ("+" if changed else "")
    return None


def read_stream(threads: int) -> float | None:
    """Bytes per second that `threads` threads read from a 512 MB buffer; None where the library is
    absent.
    """
    try:
        from hf_fusion import native

        return float(native.read_stream_bandwidth(STREAM_BYTES, threads))
    except (ImportError, OSError, AttributeError, hf_fusion.FusionError):
        return None


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {name: _version(name) for name in packages}
    return {name: value for name, value in found.items() if value}


def multiply_add_peak(dtype: torch.dtype) -> Callable[[int], float | None]:
    """A function of the thread count: floating-point operations per second of a square native
    product of PEAK_SIZE, in packed panels, best of PEAK_REPEATS; None where the library is absent.

    Its precision is the one that torch.set_float32_matmul_precision says when it is made.
    """
    try:
        from hf_fusion import native, structs
        from hf_fusion.packing import PackedWeights, precision_of

        library = native.load()
    except (ImportError, OSError, hf_fusion.FusionError):
        return lambda threads: None
    n, kind = PEAK_SIZE, structs.DTYPES[dtype]
    weight, x, out = (torch.ones(n, n, dtype=dtype) for _ in range(3))
    linear = structs.linear(weight, None)
    panels = PackedWeights([linear], [weight], kind)
    io = native.sized(native.LinearIo)
    io.dtype, io.rows, io.x, io.out = kind, n, structs.buffer(x), structs.buffer(out)
    io.precision = precision_of(kind)

    def measure(threads: int) -> float:
        io.threads, times = threads, []
        for _ in range(PEAK_REPEATS):
            begin = time.perf_counter()
            native.check(library.hff_linear_forward(ctypes.byref(linear), ctypes.byref(io)))
            times.append(time.perf_counter() - begin)
        return 2 * n**3 / min(times)

    measure.keeps = (weight, x, out, panels)
    return measure


def _isa() -> str | None:
    try:
        from hf_fusion import native

        return native.isa()
    except (ImportError, OSError, AttributeError, hf_fusion.FusionError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return getattr(hf_fusion, "__version__", None) if name == "hf-fusion" else None
