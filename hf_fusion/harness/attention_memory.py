"""Peak memory of one attention, in a process of its own (`attention_study`)."""

from __future__ import annotations

import json
import sys

import torch

from .attention_study import compute, operands
from .memory import forget_peak, resident
from .timing import torch_threads


def child() -> None:
    """A request in the first argument, the answer on stdout, both JSON: bytes resident before the
    call, its output not counted, and at its peak.
    """
    request = json.loads(sys.argv[1])
    seed, batch, heads, kv_heads = request["shape"]
    queries, keys = request["tokens"]
    small = operands(seed, batch, heads, kv_heads, 16, 16, request["head_dim"], request["dtype"])
    inputs = operands(
        seed, batch, heads, kv_heads, queries, keys, request["head_dim"], request["dtype"]
    )
    with torch_threads(request["threads"]), torch.no_grad():
        compute(request["contender"], small, request["causal"])  # what is loaded on first use
        forget_peak()
        before, _ = resident()
        out = compute(request["contender"], inputs, request["causal"])
        peak = resident()[1]
    print(json.dumps({"loaded": before + out.numel() * out.element_size(), "peak": peak}))
