"""Torch's current stream, device and capture on CUDA; the host's memory has none of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_NOTHING = nullcontext()


def capturing() -> bool:
    """Whether torch.cuda.graph is recording what this thread puts on its current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def current(device: torch.device) -> int | None:
    """The cudaStream_t of torch's current stream; None for the legacy default stream."""
    return torch.cuda.current_stream(device).cuda_stream or None if device.type == "cuda" else None


def on(device: torch.device) -> AbstractContextManager:
    """Makes `device` the current one inside a with statement."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _NOTHING
    return torch.cuda.device(device)


def settle(device: torch.device) -> None:
    """Waits for the current stream, so that any other may read what was made on it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
