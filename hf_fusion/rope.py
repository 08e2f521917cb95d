"""Cos and sin of rotary embeddings, as the model's own rotary module gives them, laid out as a table by position."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .report import FusionError, Reason

_LEAST_ROWS = 256
_MOST_ROWS = 1 << 20  # a position past this is looked up by itself


class RopeRows(NamedTuple):
    """Cos and sin of positions 0 .. rows - 1, (rows, rotary_dim) each."""

    cos: torch.Tensor
    sin: torch.Tensor


class RopeTable:
    """A rotary module's cos and sin by position, in `dtype`.

    `current` is replaced as a whole when the table grows, so that a call under way keeps what it started with.
    """

    def __init__(self, rotary: torch.nn.Module, dtype: torch.dtype):
        self.rotary = rotary
        self.like = torch.empty(0, dtype=dtype)
        self._grow(_LEAST_ROWS)

    def cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, q, rotary_dim) each, for positions (B, q) of int64."""
        return self.rotary(self.like, position_ids=positions)

    def _grow(self, rows: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            cos, sin = self.cos_sin(torch.arange(rows).unsqueeze(0))
            self.current = RopeRows(cos[0].contiguous(), sin[0].contiguous())

    def cover(self, positions: torch.Tensor) -> bool:
        """Grows the table to hold `positions` if that is what they lack; FusionError(POSITIONS) for negative ones."""
        least, most = int(positions.min()), int(positions.max())
        if least < 0 or most >= _MOST_ROWS:
            raise FusionError(
                Reason.POSITIONS, f"position ids run from {least} to {most}, expected 0 to {_MOST_ROWS - 1}"
            )
        rows = self.current.cos.shape[0]
        if most < rows:
            return False
        self._grow(max(2 * rows, most + 1))
        return True


class _FixedTable:
    """Cos and sin of one call, (B|1, q, rotary_dim), as a table with a row for each of them."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor):
        width = cos.shape[-1]
        self.current = RopeRows(cos.reshape(-1, width).contiguous(), sin.reshape(-1, width).contiguous())

    def cover(self, positions: torch.Tensor) -> bool:
        """A table of one call cannot grow."""
        return False


def rope_of_call(rope, batch: int, queries: int, past: int, positions: torch.Tensor | None):
    """(table, positions (B|1, q)) of a call: `rope` is a RopeTable, or the (cos, sin) of its very queries."""
    if not isinstance(rope, tuple):
        return rope, torch.arange(past, past + queries).unsqueeze(0) if positions is None else positions
    cos, sin = rope
    return _FixedTable(cos, sin), torch.arange(cos.shape[0] * queries).view(cos.shape[0], queries)
