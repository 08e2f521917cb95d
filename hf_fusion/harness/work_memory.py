"""The process in which the memory of one contender of `work` is measured."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from hf_fusion.transform.meter import peak_bytes

from . import peers
from .contenders import matmul_precision, peer_contender, rung_contender
from .encoders import load_any
from .memory import forget_peak, resident
from .timing import torch_threads


def child() -> None:
    """A request in the first argument, the answer on stdout, both JSON: bytes resident before and
    at the peak, and, for what torch allocates, the most that one call holds beside inputs, weights
    and packed copies.
    """
    print(json.dumps(_measure(json.loads(sys.argv[1]))))


def _measure(request: dict[str, Any]) -> dict[str, int]:
    inputs = load_file(request["inputs"])
    name, threads = request["contender"], request["threads"]
    with matmul_precision(request["matmul_precision"]), torch_threads(threads):
        if request["file"]:
            forget_peak()
            before, _ = resident()
            path = Path(request["file"])
            peers.open_file(name, path, request["precision"], threads)(inputs)
            return {"loaded": before, "peak": resident()[1]}
        loaded, kind = load_any(request["model"], request["dtype"], request["seed"])
        with tempfile.TemporaryDirectory() as folder:
            forget_peak()
            before, _ = resident()
            if name in peers.PEERS:
                contender = peer_contender(
                    name, loaded.model, kind, inputs, request["precision"], threads, Path(folder)
                )
            else:
                contender = rung_contender(loaded.model, kind, name, request["backend"])
            contender.call(inputs)
            memory = {"loaded": before, "peak": resident()[1]}
            if name not in peers.PEERS or name == peers.COMPILE:
                memory["activations"] = peak_bytes(lambda: contender.call(inputs))
            return memory
