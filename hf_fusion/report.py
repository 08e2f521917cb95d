"""Why a call did or did not run fused: the reasons, the exception, the report and the counters."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum


class Reason(Enum):
    """One member per cause of refusal; counters and reports use the value."""

    # found when a model is patched or bound
    UNKNOWN_FAMILY = "unknown model family"
    OTHER_FAMILY = "another model family beside the patched one"
    STRUCTURE = "unexpected structure"
    MODULE_TYPE = "module of an unexpected type"
    FORWARD_REPLACED = "forward replaced"
    HOOKS = "hooks on a covered module"
    ACTIVATION = "unsupported activation"
    ROPE = "unsupported rotary embedding"
    ATTENTION_IMPLEMENTATION = "unsupported attention implementation"
    TENSOR_TYPE = "tensor subclass"
    META = "meta device"
    DEVICE = "device without a back end"
    DTYPE = "unsupported dtype"
    MIXED_DTYPE = "mixed dtypes"
    LAYOUT = "tensor not dense and contiguous"
    SHAPE = "unexpected shape"
    # found when a forward is called
    TRAINING = "training mode"
    GRADIENTS = "gradients enabled"
    AUTOCAST = "autocast enabled"
    TORCH_MODE = "torch function or dispatch mode active"
    FUNCTORCH = "functorch transform active"
    CHANGED = "model changed since it was fused"
    TRACING = "tracing"
    ARGUMENT = "unsupported argument"
    INPUT = "unsupported input"
    EMPTY_INPUT = "zero-length input"
    LABELS = "labels given"
    OUTPUTS = "attentions or hidden states requested"
    RETURN_TUPLE = "tuple output requested"
    NOT_CAUSAL = "attention not causal"
    NOT_ENCODER = "not an encoder"
    MASK = "unsupported attention mask"
    POSITIONS = "unsupported position ids"
    PACKED = "packed sequences"
    CACHE_TYPE = "unsupported cache"
    CACHE_STATE = "cache does not fit the input"
    CACHE_FULL = "cache full"
    ROWS = "more rows than the device's kernels take"
    CAPTURING = "not ready for a graph capture"
    # reported by a back end
    LIBRARY = "native library not available"
    ISA = "instruction set not available"
    UNSUPPORTED = "no kernel for this"
    OUT_OF_RANGE = "token id or position out of range"
    OUT_OF_MEMORY = "scratch memory not available"
    INVALID = "back end refused its arguments"
    INTERNAL = "internal error of the back end"
    # wrong use of the interface
    UNKNOWN_FUSION = "unknown fusion"
    UNKNOWN_BACKEND = "unknown back end"
    BACKEND_ABSENT = "back end not in this build"
    NOT_A_MODEL = "not a torch module"
    CAPTURED = "captured graph stays as it is"
    UNPICKLED = "patch removed by pickling"
    REGISTERED = "name registered by others"

    def __str__(self) -> str:
        return self.value


class FusionError(ValueError):
    """The one exception of hf_fusion.

    `reason` is a member of `Reason`; the message is one sentence with the offending value and what
    was expected.
    """

    def __init__(self, reason: Reason, message: str):
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} [{self.reason.value}]"


@dataclass(frozen=True)
class LayerReport:
    """One layer: what runs it, or why nothing does.

    `backend` and `kernel` (reference, or cpu with an ISA name) are None where `reason` is given.
    """

    index: int
    name: str
    fusion: str
    backend: str | None
    kernel: str | None
    reason: Reason | None = None
    detail: str = ""


@dataclass
class Report:
    """What `patch` did, layer by layer.

    `family` is None where no family file knows the model. `packed_bytes`: size of the packed copies
    of weights that the calls will make and keep. `reason` and `detail` say why a whole model does
    not run in one call, where that shows: it runs stock, or as far as `layers` go.
    """

    model: str
    family: str | None
    fusion: str
    backend: str
    layers: list[LayerReport] = field(default_factory=list)
    packed_bytes: int = 0
    reason: Reason | None = None
    detail: str = ""

    @property
    def fused_layers(self) -> int:
        """Number of layers that nothing keeps from running as `fusion` says."""
        return sum(layer.reason is None for layer in self.layers)

    def to_dict(self) -> dict:
        """The report as plain dicts, lists, strings and numbers, ready for JSON."""
        layers = [
            {**vars(layer), "reason": layer.reason and layer.reason.value} for layer in self.layers
        ]
        return {
            "model": self.model,
            "family": self.family,
            "fusion": self.fusion,
            "backend": self.backend,
            "fused_layers": self.fused_layers,
            "packed_bytes": self.packed_bytes,
            "reason": self.reason and self.reason.value,
            "detail": self.detail,
            "layers": layers,
        }

    def __str__(self) -> str:
        head = (
            f"{self.model}: family {self.family or 'none'}, fusion {self.fusion}, "
            f"back end {self.backend}, {self.fused_layers} of {len(self.layers)} layers, "
            f"{self.packed_bytes} bytes packed"
        )
        lines = [head]
        if self.reason is not None:
            how = "not in one call" if self.fused_layers else "runs stock"
            lines.append(f"{how}: {self.reason.value} ({self.detail})")
        rows = [
            (
                str(layer.index),
                layer.name,
                layer.fusion if layer.reason is None else "stock",
                layer.backend or "-",
                layer.kernel or (f"{layer.reason.value} ({layer.detail})" if layer.reason else "-"),
            )
            for layer in self.layers
        ]
        return "\n".join(
            lines + table(("layer", "name", "runs", "back end", "kernel or reason"), rows)
        )


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a left-aligned text table; no lines without rows."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in [header, *rows]
    ]
    return [line.rstrip() for line in lines]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
    ]


_locked: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def renew_in_child(owner: object, name: str, make: Callable[[], object]) -> None:
    """Sets owner.name to make(), and again in the child of a fork, where a lock may be held by a
    thread that is not there.
    """
    setattr(owner, name, make())
    _locked[owner] = (name, make)


def _renew() -> None:
    for owner, (name, make) in list(_locked.items()):
        setattr(owner, name, make())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


class Stats:
    """Counters of one patched model; safe to update from several threads.

    `fused`: calls of a back end that replaced stock code. `calls`: the same by level: "step"
    (whole model, few rows), "prefill" (whole model, many rows), "encode" (whole encoder), "layer";
    and "wrapped", the calls that passed a wrapper of fusion "none".
    `refused`: forwards that ran stock, by reason. `downgraded`: forwards that ran layer by layer,
    or without the head, where the whole model in one call was wanted, and generations that
    custom_generate left to decode token by token, by reason. `details`: the latest sentence for
    each reason.
    """

    LEVELS = ("step", "prefill", "encode", "layer", "wrapped")

    def __init__(self, note: str = ""):
        renew_in_child(self, "_lock", threading.Lock)
        self.note = note
        self.clear()

    def clear(self) -> None:
        """Sets every counter to zero."""
        with self._lock:
            self.calls: dict[str, int] = dict.fromkeys(self.LEVELS, 0)
            self.refused: dict[str, int] = {}
            self.downgraded: dict[str, int] = {}
            self.details: dict[str, str] = {}

    @property
    def fused(self) -> int:
        """Calls of a back end that replaced stock code."""
        return sum(n for level, n in self.calls.items() if level != "wrapped")

    def count(self, level: str, calls: int = 1) -> None:
        """Adds calls at `level`."""
        with self._lock:
            self.calls[level] += calls

    def refuse(self, error: FusionError) -> None:
        """Adds one forward that ran stock."""
        self._add(self.refused, error)

    def downgrade(self, error: FusionError) -> None:
        """Adds one forward that ran fused below the level it was called at."""
        self._add(self.downgraded, error)

    def _add(self, counts: dict[str, int], error: FusionError) -> None:
        reason = error.reason.value
        with self._lock:
            counts[reason] = counts.get(reason, 0) + 1
            self.details[reason] = error.message

    def to_dict(self) -> dict:
        """The counters as plain dicts, strings and numbers, ready for JSON."""
        with self._lock:
            return {
                "fused": self.fused,
                "calls": dict(self.calls),
                "refused": dict(self.refused),
                "downgraded": dict(self.downgraded),
                "note": self.note,
            }

    def __str__(self) -> str:
        counts = self.to_dict()
        calls = ", ".join(f"{level} {n}" for level, n in counts["calls"].items() if n)
        lines = [f"fused {counts['fused']}" + (f" ({calls})" if calls else "")]
        for kind in ("refused", "downgraded"):
            for reason, n in sorted(counts[kind].items()):
                lines.append(f"{kind} {n}: {reason} ({self.details.get(reason, '')})")
        return "\n".join(lines + ([self.note] if self.note else []))

    __repr__ = __str__
