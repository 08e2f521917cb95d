"""How a token is chosen from logits: the largest, or one drawn as generate() warps them."""

from __future__ import annotations

from typing import Any

import torch

from .report import FusionError, Reason


def refuse(name: str, value: Any, expected: str) -> None:
    """FusionError for an argument that is not what was expected."""
    raise FusionError(Reason.ARGUMENT, f"{name} is {value!r}, expected {expected}")


def positive(name: str, value: Any) -> int:
    """`value`; FusionError unless it is an integer of at least 1."""
    if type(value) is not int or value < 1:
        refuse(name, value, "a positive integer")
    return value


class Sampler:
    """Next tokens (B) from logits (B, vocab): the largest or, with `do_sample`, one drawn from
    softmax(logits / temperature) of the `top_k` largest, with all equals of the last of them, and
    of these, largest first, the fewest that hold `top_p` of the probability.

    Raises FusionError for a value that generate() would not take either.
    """

    def __init__(
        self,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ):
        if do_sample not in (True, False):
            refuse("do_sample", do_sample, "True or False")
        most = torch.finfo(torch.float64).max  # which an int may exceed
        if not isinstance(temperature, (int, float)) or not 0 < temperature <= most:
            refuse("temperature", temperature, "a number above 0")
        if top_k is not None:
            positive("top_k", top_k)
        if top_p is not None and not (isinstance(top_p, (int, float)) and 0 <= top_p <= 1):
            refuse("top_p", top_p, "a number from 0 to 1")
        self.do_sample, self.temperature = do_sample, temperature
        self.top_k, self.top_p = top_k, 1.0 if top_p is None else top_p

    def uniforms(self, batch: int, steps: int, device: Any, generator: Any) -> torch.Tensor | None:
        """(B, steps) fp64 in [0, 1), a column for each token; None where none is drawn. Fewer steps
        are the first of more.
        """
        if not self.do_sample:
            return None
        drawn = torch.rand(
            (steps, batch), dtype=torch.float64, device=device, generator=generator
        )
        return drawn.t().contiguous()

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, vocab) fp32, -inf where a token is out of the question."""
        scores = logits.float() / self.temperature
        if self.top_k is not None:
            least = scores.topk(min(self.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            ranked, order = scores.sort(dim=-1, descending=True, stable=True)
            weights = ranked.softmax(-1).double()
            drop = weights.cumsum(-1) - weights >= self.top_p
            drop[:, 0] = False
            scores = scores.masked_fill(drop.scatter(1, order, drop), -torch.inf)
        return scores

    def __call__(self, logits: torch.Tensor, uniforms: torch.Tensor | None = None) -> torch.Tensor:
        """`uniforms`, (B): a token is the first whose probability, with those before it in order of
        index, exceeds its row's.
        """
        if not self.do_sample:
            # on the CPU argmax of 16-bit numbers takes four times as long, 0.18 ms of 50,304
            return logits.argmax(-1) if logits.is_cuda else logits.max(-1).indices
        sums = self.scores(logits).softmax(-1).double().cumsum(-1)
        if not logits.is_cuda and not bool(sums[:, -1].isfinite().all()):
            raise FusionError(
                Reason.INPUT,
                "no token can be drawn: the logits hold NaN, an infinity, or -inf alone",
            )
        return torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:], right=True)[:, 0]
