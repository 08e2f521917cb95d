"""Greedy decoding and sampling with Python off the critical path.

Ids, finished flags and random draws stay where the model is; the host looks at the end-of-sequence
flags every `check_every` tokens only. On CUDA, once two steps have run fused, one step with its
sampling is recorded as a graph and replayed for the rest; on the CPU one native call decodes
several greedy tokens. No Python runs between tokens then.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import StaticCache

from .forwards import greedy_steps
from .patching import stats
from .report import FusionError, Reason

_WARM_STEPS = 2  # run before a graph is recorded: they bind the model, and show that it runs fused
_LEAST_REPLAYS = 8  # recording takes as long as some steps
_LONGEST_CALL = 0.05  # seconds of native steps, in which no interrupt is seen
# what generate() would apply from a generation configuration, and the value that changes nothing
_NEUTRAL = {
    "num_beams": 1, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "min_length": 0,
    "min_new_tokens": 0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None, "sequence_bias": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None, "guidance_scale": 1.0, "watermarking_config": None,
    "remove_invalid_values": False, "renormalize_logits": False, "num_return_sequences": 1,
    "penalty_alpha": None, "dola_layers": None, "prompt_lookup_num_tokens": None,
    "stop_strings": None, "max_time": None,
}  # fmt: skip
_SAMPLED_NEUTRAL = {"min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


def _refuse(name: str, value: Any, expected: str) -> None:
    raise FusionError(Reason.ARGUMENT, f"{name} is {value!r}, expected {expected}")


def _count(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        _refuse(name, value, "a positive integer")
    return value


class Sampler:
    """Next tokens (B) from logits (B, vocab), as generate() warps and draws: temperature, then the
    `top_k` largest, then the fewest that hold `top_p` of the probability.

    Raises FusionError for a value that generate() would not take either.
    """

    def __init__(self, do_sample: bool, temperature, top_k, top_p, generator=None):
        if do_sample not in (True, False):
            _refuse("do_sample", do_sample, "True or False")
        if not isinstance(temperature, (int, float)) or not temperature > 0:
            _refuse("temperature", temperature, "a number above 0")
        if top_k is not None:
            _count("top_k", top_k)
        if top_p is not None and not (isinstance(top_p, (int, float)) and 0 <= top_p <= 1):
            _refuse("top_p", top_p, "a number from 0 to 1")
        self.do_sample, self.temperature = do_sample, temperature
        self.top_k, self.top_p, self.generator = top_k, top_p, generator

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, vocab) fp32, -inf where a token is out of the question."""
        scores = logits.float() / self.temperature
        if self.top_k is not None:
            least = scores.topk(min(self.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ranked, order = scores.sort(dim=-1, descending=True)
            weights = ranked.softmax(-1)
            drop = weights.cumsum(-1) - weights >= self.top_p
            drop[:, 0] = False
            scores = scores.masked_fill(drop.scatter(1, order, drop), -torch.inf)
        return scores

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.do_sample:
            # on the CPU argmax of 16-bit numbers takes four times as long, 0.18 ms of 50,304
            return logits.argmax(-1) if logits.is_cuda else logits.max(-1).indices
        # the largest of p / e, e exponential, is token i with probability p_i
        noise = torch.empty_like(logits, dtype=torch.float32)
        weights = self.scores(logits).softmax(-1)
        return (weights / noise.exponential_(generator=self.generator)).argmax(-1)


class _Loop:
    """The state of a generation: everything that a step reads or moves on is a tensor."""

    def __init__(self, model, ids, mask, steps: int, sampler: Sampler, eos: list[int], pad: int):
        (batch, prompt), device = ids.shape, ids.device
        self.model, self.sampler = model, sampler
        self.tokens = torch.full((batch, prompt + steps), pad, dtype=torch.int64, device=device)
        self.tokens[:, :prompt] = ids
        # what is not there yet, causality hides
        self.mask = torch.ones(self.tokens.shape, dtype=torch.bool, device=device)
        self.mask[:, :prompt] = mask
        self.column = torch.tensor([prompt], device=device)
        self.positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.ids, self.pad = ids.clone(), pad  # a step writes to them
        self.eos = torch.tensor(eos, device=device, dtype=torch.int64)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.native = 0 if sampler.do_sample else 1  # steps that the next native call may take
        self.cache = StaticCache(config=model.config, max_cache_len=prompt + steps)

    def _call(self) -> dict[str, Any]:
        return {
            "input_ids": self.ids,
            "attention_mask": self.mask,
            "position_ids": self.positions,
            "past_key_values": self.cache,
            "use_cache": True,
            "logits_to_keep": 1,
            "return_dict": True,
        }

    def step(self) -> None:
        """One forward of `ids`, and the token after it."""
        logits = self.model(**self._call()).logits[:, -1]
        token = self.sampler(logits).masked_fill(self.finished, self.pad)
        self.tokens.index_copy_(1, self.column, token[:, None])
        self.column.add_(1)
        if self.ids.shape[1] > 1:  # the prompt
            self.ids, self.positions = token[:, None], self.positions[:, -1:] + 1
        else:
            self.ids.copy_(token[:, None])
            self.positions.add_(1)
        if self.eos.numel():
            self.finished.logical_or_(torch.isin(token, self.eos))

    def _native_steps(self, most: int) -> int:
        """Up to `most` greedy tokens in one native call of about _LONGEST_CALL; how many, 0 where
        the model does not run so.
        """
        count, began = min(most, self.native), time.perf_counter()
        tokens = greedy_steps(self.model, count, self._call()) if count else None
        if tokens is None:
            self.native = 0
            return 0
        self.native = max(1, int(_LONGEST_CALL * count / (time.perf_counter() - began)))
        self.ids.copy_(tokens[:, -1:])
        self.positions.add_(count)
        if self.eos.numel():  # a row that has ended goes on unseen
            ends = torch.isin(tokens, self.eos)
            ended = (ends.cumsum(1) - ends.long() > 0) | self.finished[:, None]
            tokens.masked_fill_(ended, self.pad)
            self.finished.logical_or_(ends.any(1))
        column = int(self.column)
        self.tokens[:, column : column + count] = tokens
        self.column.add_(count)
        return count

    def record(self) -> Any:
        """A graph of one step; nothing runs."""
        graph = torch.cuda.CUDAGraph()
        if self.sampler.generator is not None:
            graph.register_generator_state(self.sampler.generator)
        with torch.cuda.graph(graph):
            self.step()
        return graph

    def run(self, steps: int, check_every: int) -> None:
        """Up to `steps` tokens; ends where every row has finished, or up to `check_every` later."""
        if self.ids.is_cuda:
            return self._run_recorded(steps, check_every)
        done = 0
        while done < steps and not self._over(done, check_every):
            most = check_every - done % check_every if self.eos.numel() else steps
            count = self._native_steps(min(most, steps - done)) if done else 0
            if count == 0:
                self.step()
            done += count or 1

    def _over(self, done: int, check_every: int) -> bool:
        return bool(self.eos.numel() and done % check_every == 0 and self.finished.all())

    def _run_recorded(self, steps: int, check_every: int) -> None:
        step, recorded, fused = self.step, False, False
        for done in range(steps):
            if self._over(done, check_every):
                return
            if recorded:
                step()
                continue
            counted = stats(self.model).calls["step"]
            if done == 1 + _WARM_STEPS and fused and steps - done >= _LEAST_REPLAYS:
                graph, recorded = self.record(), True
                step = graph.replay
            step()
            fused = stats(self.model).calls["step"] > counted

    def length(self, prompt: int) -> int:
        """Columns of `tokens` up to the end of the row that finishes last."""
        if not self.eos.numel():
            return self.tokens.shape[1]
        ends = torch.isin(self.tokens[:, prompt:], self.eos)
        first = ends.int().argmax(1) + 1
        return prompt + int(first.where(ends.any(1), ends.shape[1]).max())


def _special(model: nn.Module, eos: Any, pad: Any) -> tuple[list[int], int | None]:
    """(ids that end a sequence, padding id), with the model's own where none are given."""
    config = model.generation_config
    eos = config.eos_token_id if eos is None else eos
    eos = [] if eos is None else list(eos) if isinstance(eos, Iterable) else [eos]
    if not all(type(token) is int and token >= 0 for token in eos):
        _refuse("eos_token_id", eos, "ids of at least 0")
    pad = config.pad_token_id if pad is None else pad
    if pad is not None and (type(pad) is not int or pad < 0):
        _refuse("pad_token_id", pad, "an id of at least 0")
    return eos, eos[0] if pad is None and eos else pad


def _check_model(model: Any, do_sample: bool) -> None:
    config = getattr(model, "generation_config", None)
    if config is None or model.config.is_encoder_decoder:
        raise FusionError(
            Reason.NOT_A_MODEL, f"generate got a {type(model).__name__}, expected a causal LM"
        )
    for name, neutral in (_NEUTRAL | (_SAMPLED_NEUTRAL if do_sample else {})).items():
        value = getattr(config, name, None)
        if value not in (None, neutral):
            _refuse(f"generation_config.{name}", value, f"{neutral!r}: this loop applies no other")


def _check_mask(mask: Any, ids: torch.Tensor, eos: list[int], pad: int | None) -> torch.Tensor:
    if mask is None:
        padded = pad is not None and pad not in eos
        return (ids != pad).long() if padded else torch.ones_like(ids)
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        shape = tuple(getattr(mask, "shape", ()))
        raise FusionError(
            Reason.MASK, f"attention_mask has shape {shape}, expected {tuple(ids.shape)}"
        )
    return (mask != 0).long().to(ids.device)


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Iterable[int] | None = None,
    pad_token_id: int | None = None,
    check_every: int = 16,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Tokens (B, prompt and up to max_new_tokens), int64, as model.generate() gives them.

    input_ids: (B, prompt), padded at the left where attention_mask (B, prompt) is 0; without a
    mask, where they are the padding id and that ends no sequence. eos_token_id, pad_token_id: None
    for those of model.generation_config; eos_token_id=() for none. A row ends with its first
    end-of-sequence id and goes on with padding; the result is as long as its longest row.

    Greedy tokens are those of model.generate(do_sample=False) for the same forward. Sampling draws
    from the same distribution by other random numbers; top_k and top_p default to all tokens, and
    `generator` must be on the model's device. The model may be patched or not. A replayed graph
    counts as one call in stats(model).

    Raises FusionError for a value that is no such thing, and where model.generation_config asks for
    what this loop does not do.
    """
    steps, every = _count("max_new_tokens", max_new_tokens), _count("check_every", check_every)
    sampler = Sampler(do_sample, temperature, top_k, top_p, generator)
    _check_model(model, do_sample)
    if type(input_ids) is not torch.Tensor or input_ids.dim() != 2 or not input_ids.numel():
        shape = tuple(getattr(input_ids, "shape", ()))
        raise FusionError(Reason.INPUT, f"input_ids have shape {shape}, expected (batch, prompt)")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise FusionError(Reason.INPUT, f"input_ids are {input_ids.dtype}, expected int64 or int32")
    ids = input_ids.long()
    eos, pad = _special(model, eos_token_id, pad_token_id)
    mask = _check_mask(attention_mask, ids, eos, pad)
    loop = _Loop(model, ids, mask, steps, sampler, eos, 0 if pad is None else pad)
    loop.run(steps, every)
    return loop.tokens[:, : loop.length(ids.shape[1])].clone()
