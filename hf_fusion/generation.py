"""Greedy decoding and sampling with Python off the critical path.

Ids, finished flags and random numbers stay where the model is; the host looks at the
end-of-sequence flags every `check_every` tokens only. On CUDA, once two steps have run fused, one
step with its sampling is recorded as a graph and replayed for the rest; on the CPU one native call
decodes several tokens. No Python runs between tokens then.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from .cache import CACHE
from .forwards import native_steps
from .patching import stats
from .report import FusionError, Reason
from .sampling import Sampler, positive, refuse

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
    "stop_strings": None, "max_time": None, "constraints": None, "force_words_ids": None,
    "token_healing": False,
}  # fmt: skip
_SAMPLED_NEUTRAL = {
    "min_p": None, "top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip


class Loop:
    """The state of a generation: everything that a step reads or moves on is a tensor."""

    def __init__(
        self,
        model: nn.Module,
        ids: torch.Tensor,
        mask: torch.Tensor,
        steps: int,
        sampler: Sampler,
        generator: torch.Generator | None,
        eos: list[int],
        pad: int,
        streamer: Any,
        cache: DynamicCache | StaticCache | None = None,
    ):
        (batch, prompt), device = ids.shape, ids.device
        self.model, self.sampler, self.prompt = model, sampler, prompt
        self.uniforms = sampler.uniforms(batch, steps, device, generator)
        self.tokens = torch.full((batch, prompt + steps), pad, dtype=torch.int64, device=device)
        self.tokens[:, :prompt] = ids
        # what is not there yet, causality hides
        self.mask = torch.ones(self.tokens.shape, dtype=torch.bool, device=device)
        self.mask[:, :prompt] = mask
        self.column = torch.tensor([prompt], device=device)
        self.positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
        self.ids, self.pad = ids.clone(), pad  # a step writes to them
        self.eos = torch.tensor(eos, device=device, dtype=torch.int64)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.native = 1  # steps that the next native call may take
        self.streamer, self.streamed = streamer, 0  # columns that it has
        self.grows = cache is not None
        if cache is None:
            cache = StaticCache(config=model.config, max_cache_len=prompt + steps)
        self.cache = cache

    def begin(self, past: int, positions: torch.Tensor | None) -> None:
        """Begins after the `past` tokens of the prompt that the cache holds, at the positions
        (B|1, prompt) that are given.
        """
        positions = self.positions if positions is None else positions
        self.ids, self.positions = self.ids[:, past:].clone(), positions[:, past:].clone()

    def _call(self, keys: int | None = None) -> dict[str, Any]:
        return {
            "input_ids": self.ids,
            "attention_mask": self.mask[:, :keys],
            "position_ids": self.positions,
            CACHE: self.cache,
            "use_cache": True,
            "logits_to_keep": 1,
            "return_dict": True,
        }

    def step(self) -> None:
        """One forward of `ids`, and the token after it."""
        # a cache that grows holds no keys that a mask could be longer for
        call, uniforms = self._call(int(self.column) if self.grows else None), None
        logits = self.model(**call).logits[:, -1]
        if self.uniforms is not None:
            uniforms = self.uniforms.index_select(1, self.column - self.prompt)[:, 0]
        token = self.sampler(logits, uniforms).masked_fill(self.finished, self.pad)
        self.tokens.index_copy_(1, self.column, token[:, None])
        self.column.add_(1)
        if self.ids.shape[1] > 1:  # the prompt
            self.ids, self.positions = token[:, None], self.positions[:, -1:] + 1
        else:
            self.ids.copy_(token[:, None])
            self.positions.add_(1)
        if self.eos.numel():
            # isin of ten ids or more takes the unique ones, for whose number it waits
            self.finished.logical_or_((token[:, None] == self.eos).any(1))

    def _native_steps(self, most: int) -> int:
        """Up to `most` tokens in one native call of about _LONGEST_CALL; how many, 0 where the
        model does not run so.
        """
        count, began = min(most, self.native), time.perf_counter()
        if not count:
            return 0
        column, uniforms = int(self.column), None
        if self.uniforms is not None:
            uniforms = self.uniforms[:, column - self.prompt :][:, :count].contiguous()
        tokens = native_steps(self.model, count, self._call(), self.sampler, uniforms)
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
        self.tokens[:, column : column + count] = tokens
        self.column.add_(count)
        return count

    def record(self) -> Any:
        """A graph of one step; nothing runs."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph

    def run(self, steps: int, check_every: int) -> None:
        """Up to `steps` tokens; ends where every row has finished, or up to `check_every` later."""
        self._stream(0)
        (self._run_recorded if self.ids.is_cuda else self._run_native)(steps, check_every)
        self._stream(steps)
        if self.streamer is not None:
            self.streamer.end()

    def _run_native(self, steps: int, check_every: int) -> None:
        done = 0
        while done < steps and not self._over(done, check_every if self.native else 1):
            most = check_every - done % check_every if self.eos.numel() else steps
            count = self._native_steps(min(most, steps - done)) if done else 0
            if count == 0:
                self.step()
            done += count or 1
            self._stream(done)

    def _over(self, done: int, check_every: int) -> bool:
        return bool(self.eos.numel() and done % check_every == 0 and self.finished.all())

    def _run_recorded(self, steps: int, check_every: int) -> None:
        step, recorded, fused = self.step, False, False
        for done in range(steps):
            if done % check_every == 0:
                self._stream(done)
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

    def length(self) -> int:
        """Columns of `tokens` up to the end of the row that finishes last."""
        if not self.eos.numel():
            return self.tokens.shape[1]
        ends = torch.isin(self.tokens[:, self.prompt :], self.eos)
        first = ends.int().argmax(1) + 1
        return self.prompt + int(first.where(ends.any(1), ends.shape[1]).max())

    def _stream(self, done: int) -> None:
        """Hands the streamer what it lacks of the prompt and of `done` tokens after it."""
        if self.streamer is None:
            return
        if not self.streamed:
            self.streamer.put(self.tokens[:, : self.prompt].cpu())
            self.streamed = self.prompt
        last = min(self.prompt + done, self.length())
        for token in self.tokens[:, self.streamed : last].t().cpu():
            self.streamer.put(token.clone())
            self.streamed += 1


def _special(model: nn.Module, eos: Any, pad: Any) -> tuple[list[int], int | None]:
    """(ids that end a sequence, padding id), with the model's own where none are given."""
    config = model.generation_config
    eos = config.eos_token_id if eos is None else eos
    eos = [] if eos is None else list(eos) if isinstance(eos, Iterable) else [eos]
    if not all(type(token) is int and token >= 0 for token in eos):
        refuse("eos_token_id", eos, "ids of at least 0")
    pad = config.pad_token_id if pad is None else pad
    if pad is not None and (type(pad) is not int or pad < 0):
        refuse("pad_token_id", pad, "an id of at least 0")
    return eos, eos[0] if pad is None and eos else pad


def _check_model(model: Any, do_sample: bool) -> None:
    config = getattr(model, "generation_config", None)
    if config is None or model.config.is_encoder_decoder:
        raise FusionError(
            Reason.NOT_A_MODEL, f"generate got a {type(model).__name__}, expected a causal LM"
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise FusionError(
            Reason.ARGUMENT, "the model has learnt prompts, which its own generate() puts in"
        )
    for name, neutral in (_NEUTRAL | (_SAMPLED_NEUTRAL if do_sample else {})).items():
        value = getattr(config, name, None)
        if value not in (None, neutral):
            refuse(f"generation_config.{name}", value, f"{neutral!r}: this loop applies no other")


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
    streamer: Any = None,
) -> torch.Tensor:
    """Tokens (B, prompt and up to max_new_tokens), int64, as model.generate() gives them.

    input_ids: (B, prompt), padded at the left where attention_mask (B, prompt) is 0; without a
    mask, where they are the padding id and that ends no sequence. eos_token_id, pad_token_id: None
    for those of model.generation_config; eos_token_id=() for none. A row ends with its first
    end-of-sequence id and goes on with padding; the result is as long as its longest row.

    Greedy tokens are those of model.generate(do_sample=False) for the same forward. Sampling draws
    from the same distribution by other random numbers; top_k and top_p default to all tokens, and
    `generator` must be on the model's device. `streamer` is given the prompt and each token as
    generate() gives them, those of one native call, or of `check_every` steps of a device, at once.
    The model may be patched or not. A replayed graph counts as one call in stats(model).

    Raises FusionError for a value that is not accepted, where model.generation_config asks for what
    this loop does not do, and on the CPU where logits are no distribution to draw from.
    """
    steps, every = positive("max_new_tokens", max_new_tokens), positive("check_every", check_every)
    sampler = Sampler(do_sample, temperature, top_k, top_p)
    _check_model(model, do_sample)
    if type(input_ids) is not torch.Tensor or input_ids.dim() != 2 or not input_ids.numel():
        shape = tuple(getattr(input_ids, "shape", ()))
        raise FusionError(Reason.INPUT, f"input_ids have shape {shape}, expected (batch, prompt)")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise FusionError(Reason.INPUT, f"input_ids are {input_ids.dtype}, expected int64 or int32")
    ids = input_ids.long()
    eos, pad = _special(model, eos_token_id, pad_token_id)
    mask = _check_mask(attention_mask, ids, eos, pad)
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        refuse("streamer", streamer, "None or an object with put and end")
    pad = 0 if pad is None else pad
    loop = Loop(model, ids, mask, steps, sampler, generator, eos, pad, streamer)
    loop.run(steps, every)
    return loop.tokens[:, : loop.length()].clone()
