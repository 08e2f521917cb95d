"""Names of the fusion rungs and back ends, and what stands behind them in this build."""

from __future__ import annotations

from typing import Any, NamedTuple

from .reference import ReferenceBackend
from .registry import families
from .report import FusionError, Reason, table

FUSIONS = ("none", "decomposed", "attention", "attention+up", "full")
BACKENDS = ("auto", "cpu", "cuda", "reference")


class Resolved(NamedTuple):
    """A back end, or None with the reason why calls run stock."""

    backend: Any
    error: FusionError | None = None


def check_fusion(fusion: str) -> None:
    """Raises FusionError unless `fusion` is the name of a rung."""
    if fusion not in FUSIONS:
        raise FusionError(
            Reason.UNKNOWN_FUSION, f"fusion is {fusion!r}, expected one of {', '.join(FUSIONS)}"
        )


def resolve(name: str) -> Resolved:
    """The back end called `name`.

    Raises FusionError for a name that is not known or not in this build, and where HF_FUSION_ISA
    asks for an instruction set that is absent. "auto" without a native library resolves to no back
    end and the reason.
    """
    if name not in BACKENDS:
        raise FusionError(
            Reason.UNKNOWN_BACKEND, f"backend is {name!r}, expected one of {', '.join(BACKENDS)}"
        )
    if name == "reference":
        return Resolved(ReferenceBackend())
    if name == "cuda":
        raise FusionError(
            Reason.BACKEND_ABSENT,
            "backend is 'cuda', but this build has no CUDA back end; expected auto, cpu or "
            "reference",
        )
    try:
        from . import step

        return Resolved(step.CpuBackend())
    except (ImportError, OSError, FusionError) as error:
        if not isinstance(error, FusionError):
            error = FusionError(Reason.LIBRARY, f"the native library could not be loaded: {error}")
        if name == "cpu" or error.reason is Reason.ISA:
            raise error from None
        return Resolved(None, error)


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
