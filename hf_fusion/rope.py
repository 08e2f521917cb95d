"""Cos and sin of rotary embeddings, as the model's own rotary module gives them, as a table by
position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import streams
from .report import FusionError, Reason

_LEAST_ROWS = 256
_MOST_ROWS = 1 << 20  # a position past this is looked up by itself


class RopeRows(NamedTuple):
    """Cos and sin of positions 0 .. rows - 1, (rows, rotary_dim) each."""

    cos: torch.Tensor
    sin: torch.Tensor


class RopeTable:
    """A rotary module's cos and sin of positions 0 .. `rows` - 1 or more, in `dtype` on `device`.

    `current` is replaced as a whole when the table grows, so that a call under way keeps what it
    started with. On a device what it replaces is kept: work queued, or recorded in a graph, goes on
    reading it.
    """

    def __init__(
        self, rotary: torch.nn.Module, dtype: torch.dtype, device: torch.device, rows: int = 0
    ):
        self.rotary = rotary
        self.like = torch.empty(0, dtype=dtype, device=device)
        self._made: list[RopeRows] = []
        self._grow(min(max(rows, _LEAST_ROWS), _MOST_ROWS))

    def cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, q, rotary_dim) each, for positions (B, q) of int64."""
        return self.rotary(self.like, position_ids=positions)

    def _grow(self, rows: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            cos, sin = self.cos_sin(torch.arange(rows, device=self.like.device).unsqueeze(0))
            grown = RopeRows(cos[0].contiguous(), sin[0].contiguous())
        if self.like.device.type != "cpu":
            streams.settle(self.like.device)
            self._made.append(grown)
        self.current = grown

    def cover_rows(self, rows: int) -> None:
        """Grows the table to `rows` positions, as far as tables go; FusionError in a capture."""
        have, need = self.current.cos.shape[0], min(rows, _MOST_ROWS)
        if need <= have:
            return
        if streams.capturing():
            raise FusionError(
                Reason.CAPTURING,
                f"the table of rotary embeddings has {have} positions, and {need} are needed",
            )
        self._grow(min(max(2 * have, need), _MOST_ROWS))

    def cover(self, positions: torch.Tensor) -> bool:
        """Grows the table to hold `positions` if that is what they lack; FusionError(POSITIONS) for
        negative ones.
        """
        least, most = int(positions.min()), int(positions.max())
        if least < 0 or most >= _MOST_ROWS:
            raise FusionError(
                Reason.POSITIONS,
                f"position ids run from {least} to {most}, expected 0 to {_MOST_ROWS - 1}",
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
        rows = (t.reshape(-1, width).contiguous() for t in (cos, sin))
        self.current = RopeRows(*rows)

    def cover(self, positions: torch.Tensor) -> bool:
        """A table of one call cannot grow."""
        return False


def rope_of_call(rope, queries: int, past: int, positions: torch.Tensor | None) -> tuple:
    """(table, positions (B|1, q)) of a call: `rope` is a RopeTable, or the (cos, sin) of its very
    queries, (B|1, q, rotary_dim) each.
    """
    if not isinstance(rope, tuple):
        if positions is None:
            positions = torch.arange(past, past + queries).unsqueeze(0)
        return rope, positions
    cos, sin = rope
    rows = torch.arange(cos.shape[0] * queries, device=cos.device)
    return _FixedTable(cos, sin), rows.view(cos.shape[0], queries)
