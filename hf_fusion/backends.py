"""Names of the fusion rungs and back ends, and what stands behind them in this build."""

from __future__ import annotations

from typing import Any

import torch

from .reference import ReferenceBackend
from .registry import families
from .report import FusionError, Reason, table

FUSIONS = ("none", "decomposed", "attention", "attention+up", "full")
BACKENDS = ("auto", "cpu", "cuda", "reference")


class Backends:
    """What stands behind the name of a back end: one for the host's memory, one for CUDA devices.

    `name`: as in `patch`. `error`: why the native library cannot be had under "auto", else None.
    Raises FusionError for a back end asked for by name that is absent, and where HF_FUSION_ISA asks
    for an instruction set that is.
    """

    def __init__(self, name: str):
        self.name, self.error = name, None
        self._made: dict[str, Any] = {}
        if name == "reference":
            self._made = dict.fromkeys(("cpu", "cuda"), ReferenceBackend())
        elif name == "cuda":
            self._made = dict.fromkeys(("cpu", "cuda"), _cuda())
        else:
            self._take_cpu()

    def _take_cpu(self) -> None:
        try:
            from . import step

            self._made["cpu"] = step.CpuBackend()
        except (ImportError, OSError, FusionError) as error:
            if not isinstance(error, FusionError):
                error = FusionError(
                    Reason.LIBRARY, f"the native library could not be loaded: {error}"
                )
            if self.name == "cpu" or error.reason is Reason.ISA:
                raise error from None
            self.error = error

    def of(self, device: torch.device) -> Any:
        """The back end for weights on `device`; FusionError where there is none."""
        kind = "cuda" if device.type == "cuda" and self.name != "cpu" else "cpu"
        found = self._made.get(kind, self.error)
        if found is None:  # "auto", and the first model on a CUDA device
            try:
                found = _cuda()
            except FusionError as error:
                found = error
            self._made[kind] = found
        if isinstance(found, FusionError):
            raise found
        return found


def _cuda() -> Any:
    from . import cuda

    return cuda.CudaBackend()


def check_fusion(fusion: str) -> None:
    """Raises FusionError unless `fusion` is the name of a rung."""
    if fusion not in FUSIONS:
        raise FusionError(
            Reason.UNKNOWN_FUSION, f"fusion is {fusion!r}, expected one of {', '.join(FUSIONS)}"
        )


def resolve(name: str) -> Backends:
    """The back ends called `name`; FusionError for a name that is not known or not to be had."""
    if name not in BACKENDS:
        raise FusionError(
            Reason.UNKNOWN_BACKEND, f"backend is {name!r}, expected one of {', '.join(BACKENDS)}"
        )
    return Backends(name)


class Support:
    """Family by fusion by back end; printable. `rows` are (family, fusion, back end, "yes" or the
    reason).
    """

    def __init__(self, rows: list[tuple[str, str, str, str]]):
        self.rows = rows

    def to_dict(self) -> list[dict]:
        """The rows as dicts, ready for JSON."""
        keys = ("family", "fusion", "backend", "status")
        return [dict(zip(keys, row, strict=True)) for row in self.rows]

    def __str__(self) -> str:
        return "\n".join(table(("family", "fusion", "back end", "supported"), self.rows))

    __repr__ = __str__


def _status(fusion: str, backend: str, status: dict[str, str]) -> str:
    # the first two rungs run no kernel
    return "yes" if fusion in ("none", "decomposed") and backend != "cuda" else status[backend]


def supported() -> Support:
    """What this build can do, with the reason where it cannot."""
    status = {}
    for name in ("cpu", "cuda", "reference"):
        try:
            resolve(name)
            status[name] = "yes"
        except FusionError as error:
            status[name] = f"no: {error.message}"
    rows = [
        (family.name, fusion, backend, _status(fusion, backend, status))
        for family in families()
        for fusion in FUSIONS
        for backend in status
    ]
    return Support(rows)
