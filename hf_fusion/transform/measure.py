"""A fused model beside the model it came from, by the meter and the clock, in one run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..report import FusionError, Reason
from . import meter
from .inductor import calls_in
from .interface import configurations
from .model import FusedModel, arguments_of


@contextlib.contextmanager
def implementation(configs: list, name: str) -> Iterator[None]:
    """The attention implementation of these `configurations` of a model set to `name` meanwhile."""
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            # parts without an attention keep their own
            if config._attn_implementation_internal is not None:
                config._attn_implementation_internal = name
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config._attn_implementation_internal = value


def compare(
    fused: FusedModel,
    inputs: dict[str, Any] | None = None,
    *,
    against: tuple[str, ...] = ("eager", "sdpa"),
    compiled: bool = False,
    rounds: int = 0,
    beside: dict[str, Callable[[], Any]] | None = None,
) -> dict[str, Any]:
    """Readings by form: "fused", the implementations in `against`, the unfused graph.

    inputs: named arguments, the captured ones by default. compiled: also torch.compile of the model
    as it is, with the calls in the code it generated for kernels. rounds: interleaved rounds of the
    clock, none by default. beside: more calls to measure, by name. The result is kept in
    `report.measured`. FusionError for inputs without names, implementations that transformers does
    not know and rounds that are not counted.
    """
    if inputs is not None and not isinstance(inputs, Mapping):
        raise FusionError(
            Reason.INPUT, f"inputs is {type(inputs).__name__}, expected arguments by name"
        )
    if type(rounds) is not int or rounds < 0:
        raise FusionError(Reason.ARGUMENT, f"rounds is {rounds!r}, expected 0 or more")
    known = ("eager", *ALL_ATTENTION_FUNCTIONS)
    if not isinstance(against, (tuple, list)) or not set(against) <= set(known):
        raise FusionError(
            Reason.ARGUMENT, f"against is {against!r}, expected names of {', '.join(known)}"
        )
    model = fused.original
    arguments = {**arguments_of(fused), **(inputs or {})}
    calls: dict[str, Callable[[], Any]] = {"fused": lambda: fused(**arguments)}
    calls["graph, not fused"] = lambda: fused.captured.graph_module(*fused._tensors((), arguments))
    if model is not None and configurations(model):
        for name in against:
            calls[f"model, {name}"] = _with(model, name, arguments)
    elif model is not None:
        calls["model"] = lambda: model(**arguments)
    calls |= beside or {}
    readings = {name: meter.read(call) for name, call in calls.items()}
    if compiled and model is not None:
        calls["model, torch.compile"], count = compiled_call(model, arguments)
        call = calls["model, torch.compile"]
        readings["model, torch.compile"] = meter.Reading(count, meter.peak_bytes(call), 0)
    if rounds:
        for name, times in meter.seconds(calls, rounds).items():
            readings[name].seconds = times
    measured = {name: reading.to_dict() for name, reading in readings.items()}
    if "model, torch.compile" in measured:
        measured["model, torch.compile"]["written_bytes"] = None
    for reading in measured.values():
        reading["kernels_over_fused"] = reading["kernels"] / measured["fused"]["kernels"]
    fused.report.measured = measured
    return measured


def _with(model: nn.Module, name: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    configs = configurations(model)  # once: looking for them is no work of the model

    def call() -> Any:
        with implementation(configs, name):
            return model(**arguments)

    return call


@torch.no_grad()
def compiled_call(model: nn.Module, arguments: dict[str, Any]) -> tuple[Callable[[], Any], int]:
    """(a call of the compiled model, kernels it calls)."""
    from torch._inductor.utils import run_and_get_code

    compiled = torch.compile(model, dynamic=False)
    _, codes = run_and_get_code(lambda: compiled(**arguments))
    return lambda: compiled(**arguments), sum(map(calls_in, codes))
