"""Interleaved timing: every round runs every contender once, in rotated order.

So drift of the machine hits all alike. A decode step is the time between two tokens as generate()
hands them to a streamer: what a user waits for, transformers' loop included. `loop="forward"` times
calls of the model alone, in a bare greedy loop. `loop="own"` has the rungs run in
hf_fusion.generate and `loop="custom"` in generate() by hf_fusion.custom_generate, stock as ever.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

import hf_fusion
from hf_fusion.cache import CACHE

from .inputs import COMPILED, STOCK, InputError, unaccepted

LOOPS = ("generate", "forward", "own", "custom")
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9}
SKIPPED_STEPS = 2
"""Decode steps after the prompt that are not counted: buffers are allocated and bound there."""


@dataclass(frozen=True)
class Sample:
    """One generation: seconds of the prompt and of each later token, the tokens (batch, new), what
    was fused.
    """

    prefill: float
    steps: tuple[float, ...]
    tokens: torch.Tensor
    calls: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> float:
        """Median seconds of a decode step, the first ones left out."""
        return statistics.median(self.steps[SKIPPED_STEPS:] or self.steps)

    @property
    def quiet_step(self) -> float:
        """Lower quartile of the same steps, which other processes on the machine disturb less."""
        steps = self.steps[SKIPPED_STEPS:] or self.steps
        return statistics.quantiles(steps, n=4)[0] if len(steps) > 1 else steps[0]


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes of one figure over the rounds."""

    median: float
    low: float
    high: float
    minimum: float
    maximum: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value; quartiles are the extremes below three values."""
        if len(values) < 3:
            low, high = min(values), max(values)
        else:
            low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high, min(values), max(values), len(values))

    def scaled(self, factor: float) -> Spread:
        """The same in another unit."""
        parts = (self.median, self.low, self.high, self.minimum, self.maximum)
        return Spread(*(part * factor for part in parts), self.count)

    def to_dict(self) -> dict[str, float]:
        """Plain numbers for JSON."""
        return {
            "median": self.median,
            "q1": self.low,
            "q3": self.high,
            "min": self.minimum,
            "max": self.maximum,
            "rounds": self.count,
        }


class Runner(Protocol):
    """A contender: a name and a way to generate `new_tokens` greedily from a prompt (batch,
    length).
    """

    name: str

    def run(self, prompt: torch.Tensor, new_tokens: int) -> Sample:
        """One timed generation."""


@dataclass
class Recording:
    """Samples of every contender by round, the read stream of the same rounds (bytes/s), failures
    by contender.
    """

    samples: dict[str, list[Sample]]
    stream: list[float]
    failures: dict[str, str]


class RungRunner:
    """`model` under one rung; "stock" leaves it alone, "compiled" is stock with a static cache and
    torch.compile.
    """

    def __init__(
        self,
        model: nn.Module,
        rung: str,
        backend: str = "auto",
        loop: str = "generate",
        sample: bool = False,
    ):
        if loop not in LOOPS:
            raise unaccepted("loop", loop, LOOPS)
        if sample and loop == "forward":
            raise InputError("loop is 'forward', which draws no tokens: expected another to sample")
        self._sampling = SAMPLING if sample else {}
        self.name = rung
        self._model = model
        self._backend = backend
        loops = dict(zip(LOOPS, (generate, forward_loop, own_loop, custom_loop), strict=True))
        stays = rung == COMPILED or (rung == STOCK and loop in ("own", "custom"))
        self._generate = generate if stays else loops[loop]

    def run(self, prompt: torch.Tensor, new_tokens: int) -> Sample:
        """Patches, generates two tokens untimed, then timed; notes what was fused, unpatches."""
        options = self._sampling | (_compiled_options() if self.name == COMPILED else {})
        with applied(self._model, self.name, self._backend) as calls:
            if self.name != COMPILED:  # that one would compile for this length, too
                self._generate(self._model, prompt[:, :1], 2, **self._sampling)
            prefill, steps, tokens = self._generate(self._model, prompt, new_tokens, **options)
            noted = calls()
        return Sample(prefill, steps, tokens, noted)


@contextmanager
def applied(
    model: nn.Module, rung: str, backend: str = "auto"
) -> Iterator[Callable[[], dict[str, Any]]]:
    """`model` under `rung` for the block; yields a function that says what was fused and refused so
    far.
    """
    if rung in (STOCK, COMPILED):
        yield lambda: {"fused": 0, "refused": {}, "downgraded": {}, "calls": {}}
        return
    with hf_fusion.patched(model, fusion=rung, backend=backend):
        yield lambda: noted_calls(model)


def noted_calls(model: nn.Module) -> dict[str, Any]:
    """The counters of a patched model as plain data."""
    return hf_fusion.stats(model).to_dict()


class _Stopwatch:
    """A streamer that keeps the time of every hand-over; the first is the prompt's, before any
    work.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(
    model: nn.Module, prompt: torch.Tensor, new_tokens: int, **options: Any
) -> tuple[float, tuple[float, ...], torch.Tensor]:
    """(prefill seconds, seconds of each later token, tokens (batch, new_tokens)) of generate(),
    greedy where `options` say nothing else.
    """
    watch = _Stopwatch()
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        streamer=watch,
        **{"do_sample": False, **options},
    )
    gaps = tuple(after - before for before, after in zip(watch.times, watch.times[1:]))
    return gaps[0], gaps[1:], output[:, prompt.shape[1] :]


@torch.no_grad()
def forward_loop(
    model: nn.Module, prompt: torch.Tensor, new_tokens: int
) -> tuple[float, tuple[float, ...], torch.Tensor]:
    """As `generate`, timing only the calls of the model."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    fed, times, tokens = prompt, [], []
    for _ in range(new_tokens):
        begin = time.perf_counter()
        logits = model(
            input_ids=fed, use_cache=True, logits_to_keep=1, **{CACHE: cache}
        ).logits
        times.append(time.perf_counter() - begin)
        fed = logits[:, -1:].argmax(-1)
        tokens.append(fed)
    return times[0], tuple(times[1:]), torch.cat(tokens, 1)


def own_loop(
    model: nn.Module, prompt: torch.Tensor, new_tokens: int, **options: Any
) -> tuple[float, tuple[float, ...], torch.Tensor]:
    """As `generate`, by hf_fusion.generate."""
    watch = _Stopwatch()
    call = {"max_new_tokens": new_tokens, "eos_token_id": (), "streamer": watch, **options}
    output = hf_fusion.generate(model, prompt, **call)
    return *_evened(watch.times), output[:, prompt.shape[1] :]


def custom_loop(
    model: nn.Module, prompt: torch.Tensor, new_tokens: int, **options: Any
) -> tuple[float, tuple[float, ...], torch.Tensor]:
    """As `generate`, with hf_fusion.custom_generate."""
    watch = _Stopwatch()
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        custom_generate=partial(hf_fusion.custom_generate, streamer=watch),
        **{"do_sample": False, **options},
    )
    return *_evened(watch.times), output[:, prompt.shape[1] :]


def _evened(times: list[float]) -> tuple[float, tuple[float, ...]]:
    """(prefill seconds, of each later token the mean of them all): those of one native call are
    handed over at once.
    """
    begin, first, *later = times
    count = len(later)
    return first - begin, ((times[-1] - first) / max(count, 1),) * count


def interleave(
    runners: Sequence[Runner],
    prompts: Sequence[torch.Tensor],
    new_tokens: int,
    threads: int,
    stream: Callable[[int], float | None],
    advance: Callable[[str], None] = lambda what: None,
) -> Recording:
    """Runs every contender on each prompt, one prompt a round, after a round that is dropped.

    A contender that raises is out for the later rounds, with its error in `failures`; the first
    contender is the baseline, and its error is raised.
    """
    recording = Recording({runner.name: [] for runner in runners}, [], {})
    with torch_threads(threads):
        for number, prompt in enumerate([prompts[0], *prompts]):
            speed = stream(threads)
            if number and speed:
                recording.stream.append(speed)
            shift = number % len(runners)
            with _collector_off():
                for runner in [*runners[shift:], *runners[:shift]]:
                    advance(runner.name)
                    if runner.name not in recording.failures:
                        _attempt(runner, runner is runners[0], prompt, new_tokens, recording)
            if number == 0:
                for samples in recording.samples.values():
                    samples.clear()
    return recording


def _attempt(
    runner: Runner, baseline: bool, prompt: torch.Tensor, new_tokens: int, recording: Recording
) -> None:
    """Records one run, or its failure."""
    try:
        recording.samples[runner.name].append(runner.run(prompt, new_tokens))
    except Exception as error:
        if baseline:
            raise
        text = (str(error).strip().splitlines() or [""])[0]
        recording.failures[runner.name] = f"{type(error).__name__}: {text}"[:200]


@contextmanager
def _collector_off() -> Iterator[None]:
    """No garbage collection in the block, all of it before."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """torch's intra-op width for the block, put back afterwards; None leaves it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compiled_options() -> dict[str, Any]:
    from transformers import CompileConfig

    config = CompileConfig(mode="default", dynamic=False)
    config._compile_all_devices = True  # the library compiles on accelerators only unless told
    return {"cache_implementation": "static", "compile_config": config}
