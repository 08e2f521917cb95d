"""Is a rung right? Its logit error, with stock's own error in the same dtype as yardstick.

The reference is stock with parameters in fp32 (fp64 for an fp32 model). Logits are taken along one
token sequence: the end of the prompt in one call, then token by token through the cache, so that
both paths are judged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hf_fusion.cache import CACHE

from .inputs import STOCK
from .timing import applied

LIMIT = 2.0
"""A rung's error may be this many times stock's own."""
PROMPT_ROWS = 32
DECODED = 16


@dataclass(frozen=True)
class Parity:
    """error, stock_error: largest absolute logit error against the reference; relative_l2: of all
    logits compared, which may be `granted` whatever the largest is.
    """

    error: float
    stock_error: float
    relative_l2: float
    limit: float = LIMIT
    granted: float = 0.0

    @property
    def ratio(self) -> float:
        """error / stock_error; 0 where both are 0."""
        if self.error == 0.0:
            return 0.0
        return self.error / self.stock_error if self.stock_error else float("inf")

    @property
    def passed(self) -> bool:
        """Whether the ratio keeps the limit, or all errors what is granted; false for NaN."""
        return self.ratio <= self.limit or self.relative_l2 <= self.granted

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "ratio": self.ratio, "passed": self.passed}


@dataclass(frozen=True)
class Divergence:
    """Where a generation first leaves stock's: token number, stock's top-2 logit gap there, and the
    measured error.

    Two roundings of the same sum may order two logits differently only when the gap is below the
    errors of both.
    """

    prompt: int
    row: int
    token: int
    gap: float
    error: float

    @property
    def explained(self) -> bool:
        """Whether the gap is within the measured logit error."""
        return self.gap <= self.error

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "explained": self.explained}


def measure_parity(
    model: nn.Module,
    rungs: Sequence[str],
    prompt: torch.Tensor,
    continuation: torch.Tensor,
    backend: str = "auto",
    advance: Callable[[str], None] = lambda what: None,
) -> dict[str, Parity]:
    """Parity of each rung (stock's own among them) on `prompt` (batch, length) followed by
    `continuation` (batch, n).
    """
    continuation = continuation[:, :DECODED]
    reference = reference_logits(model, prompt, continuation)
    norm = float(reference.norm()) or 1.0
    found: dict[str, Parity] = {}
    stock_error = 0.0
    for rung in [STOCK, *(rung for rung in rungs if rung != STOCK)]:
        advance(f"parity of {rung}")
        with applied(model, rung, backend):
            difference = logits_along(model, prompt, continuation).to(reference.dtype) - reference
        error = float(difference.abs().max())
        if rung == STOCK:
            stock_error = error
        found[rung] = Parity(error, stock_error, float(difference.norm()) / norm)
    return found


def reference_logits(
    model: nn.Module, prompt: torch.Tensor, continuation: torch.Tensor
) -> torch.Tensor:
    """`logits_along` of a copy with fp32 parameters, fp64 where the model has fp32; buffers stay as
    they are.
    """
    return logits_along(raised(model), prompt, continuation)


def raised(model: nn.Module) -> nn.Module:
    """A copy with fp32 parameters, fp64 where the model has fp32; buffers stay as they are."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        wide = torch.float64 if parameter.dtype == torch.float32 else torch.float32
        parameter.data = parameter.data.to(wide)
    return copied


@torch.no_grad()
def logits_along(
    model: nn.Module, prompt: torch.Tensor, continuation: torch.Tensor
) -> torch.Tensor:
    """Logits (batch, min(length, 32) + n, vocabulary): the prompt's last positions, then each token
    of `continuation`.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    keep = min(prompt.shape[1], PROMPT_ROWS)
    parts = [
        model(input_ids=prompt, use_cache=True, logits_to_keep=keep, **{CACHE: cache}).logits
    ]
    for index in range(continuation.shape[1]):
        token = continuation[:, index : index + 1]
        parts.append(model(input_ids=token, use_cache=True, **{CACHE: cache}).logits)
    return torch.cat(parts, 1)


def compare_tokens(
    model: nn.Module,
    prompts: Sequence[torch.Tensor],
    stock: Sequence[torch.Tensor],
    other: Sequence[torch.Tensor],
    error: float,
) -> tuple[float, list[Divergence]]:
    """(share of sequences equal to stock's, where each of the others first leaves it).

    `error`: largest logit difference that rounding explains. The gap at a divergence is stock's, in
    one call over the tokens both share.
    """
    equal = total = 0
    found: list[Divergence] = []
    for number, (prompt, expected, actual) in enumerate(zip(prompts, stock, other)):
        for row in range(prompt.shape[0]):
            total += 1
            differs = (expected[row] != actual[row]).nonzero()
            if differs.numel() == 0:
                equal += 1
                continue
            token = int(differs[0])
            shared = torch.cat([prompt[row], expected[row, :token]])[None]
            found.append(Divergence(number, row, token, top2_gap(model, shared), error))
    return equal / max(total, 1), found


@torch.no_grad()
def top2_gap(model: nn.Module, ids: torch.Tensor) -> float:
    """Difference of the two largest logits after `ids` (1, n)."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    best, second = logits.topk(2).values.tolist()
    return best - second
