"""Peak memory of one rung, measured in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from .inputs import InputError


def peak_memory(settings: dict[str, Any], rung: str) -> dict[str, int]:
    """Bytes resident after loading ("loaded") and at the peak of a generation ("peak"), in a fresh
    process; `settings` are an ablation's.
    """
    return fresh_process(__name__, {**settings, "rung": rung}, f"rung {rung!r}")


def fresh_process(module: str, request: dict[str, Any], what: str) -> dict[str, int]:
    """What `child` of `module` answers to `request` in a fresh process; InputError, naming `what`
    was measured, where that fails.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"from {module} import child; child()", json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"peak memory of {what} was not measured, its process ended with {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def resident() -> tuple[int, int]:
    """(bytes resident now, largest so far) of this process.

    VmHWM belongs to the process image; ru_maxrss, used where /proc is absent, would also count the
    parent's.
    """
    try:
        fields = dict(
            line.split(":", 1)
            for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        )
        return _kilobytes(fields["VmRSS"]), _kilobytes(fields["VmHWM"])
    except (OSError, KeyError):
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return peak, peak


def forget_peak() -> None:
    """Sets the largest-so-far to what is resident now, where the kernel lets a process do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass


def _kilobytes(field: str) -> int:
    return int(field.split()[0]) * 1024


def child() -> None:
    """What the process of `peak_memory` runs: a request in the first argument, the answer on
    stdout, both JSON.
    """
    print(json.dumps(_measure(json.loads(sys.argv[1]))))


def _measure(request: dict[str, Any]) -> dict[str, int]:
    from .models import load_model, prompts
    from .timing import RungRunner, torch_threads

    loaded = load_model(request["model"], request["dtype"], request["seed"])
    (prompt,) = prompts(loaded, 1, request["batch"], request["prompt_tokens"], request["seed"])
    options = (request[name] for name in ("rung", "backend", "loop", "sample"))
    with torch_threads(request["threads"]):
        forget_peak()
        before, _ = resident()
        RungRunner(loaded.model, *options).run(prompt, request["new_tokens"])
    return {"loaded": before, "peak": resident()[1]}
