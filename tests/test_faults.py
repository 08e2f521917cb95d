"""Failures in the middle: of an allocation, of user code, of the user's patience. The next result
is right.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from inspect import CO_GENERATOR
from pathlib import Path

import pytest
import torch
from pairs import answers, assert_same, generate, noted, pair, tokens
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import hf_fusion
from hf_fusion import native

pytestmark = pytest.mark.usefixtures("one_thread")
PACKAGE = tuple(str(Path(folder).resolve()) + os.sep for folder in hf_fusion.__path__)
RUNGS = ("attention", "attention+up", "full")


def scene(fusion: str, backend: str, queries: int):
    """A model with a warm cache of 6 tokens that has to grow, its twin with the same, and the next
    tokens.
    """
    model, stock = pair(1, fusion, backend=backend)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with torch.no_grad():
        for m, cache in zip((model, stock), caches):
            m(tokens(1, 1, 6), past_key_values=cache)
        for layer in getattr(caches[0], "layers", ()):
            layer.keys = layer.keys.clone()  # loose: the next call allocates
    return model, stock, caches, tokens(2, 1, queries)


def lengths(cache) -> set[int]:
    return {layer.get_seq_length() for layer in cache.layers}


def assert_recovered(model, stock, caches, ids, whole: bool, what: str) -> None:
    """The interrupted call may be made again if nothing of it is in the cache, or counts as made if
    all of it is.
    """
    held = lengths(caches[0])
    assert held <= {6, 6 + ids.shape[1]}, f"{what}: the cache holds {held} tokens"
    if whole:
        assert len(held) == 1, f"{what}: the layers hold {held} tokens"
        with torch.no_grad():
            want = stock(ids, past_key_values=caches[1]).logits
            if held == {6}:
                assert_same(model(ids, past_key_values=caches[0]).logits, want, f"{what}, again")
            one = tokens(3, 1, 1)
            got, want = (m(one, past_key_values=c).logits for m, c in zip((model, stock), caches))
            assert_same(got, want, f"{what}, the next token")
    assert_same(answers(model), answers(stock), f"{what}, afterwards")


class Failing:
    """Raises `error` at the k-th call made from the package of any function it stands in for."""

    def __init__(self, k: int, error: BaseException):
        self.k, self.error, self.count = k, error, 0

    def around(self, function):
        def call(*args, **kwargs):
            if sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
                self.count += 1
                if self.count == self.k:
                    raise self.error
            return function(*args, **kwargs)

        return call


ALLOCATIONS = ("empty", "arange", "index_select", "empty_like", "cat", "zeros")


@pytest.mark.reliability(17, "allocation failures")
@pytest.mark.parametrize("error", (MemoryError, torch.OutOfMemoryError, RuntimeError))
@pytest.mark.parametrize("fusion", RUNGS)
def test_every_torch_allocation_fails_once(fusion, error, monkeypatch, trials):
    for queries in (1, 3, 20):
        for k in range(1, 200):
            model, stock, caches, ids = scene(fusion, "cpu", queries)
            raised = error("not enough memory")
            failing = Failing(k, raised)
            with monkeypatch.context() as patch:
                for name in ALLOCATIONS:
                    patch.setattr(torch, name, failing.around(getattr(torch, name)))
                try:
                    with torch.no_grad():
                        model(ids, past_key_values=caches[0])
                except error as caught:
                    assert caught is raised
            what = f"{fusion}, {queries} queries, allocation {k} fails with {error.__name__}"
            assert_recovered(model, stock, caches, ids, fusion == "full", what)
            if failing.count < k:
                break
            trials()
        assert k > 2, "nothing was allocated"
    noted(model)


@pytest.mark.reliability(17)
@pytest.mark.parametrize(
    "status", (native.OUT_OF_MEMORY, native.INTERNAL, native.UNSUPPORTED, native.INVALID)
)
@pytest.mark.parametrize("fusion", RUNGS)
def test_every_native_call_fails_once(fusion, status, monkeypatch, trials):
    """The library answers with a status; stock runs in the place of what was refused."""
    names = ("hff_model_forward", "hff_block_forward")
    for queries in (1, 3, 20):
        for k in range(1, 50):
            model, stock, caches, ids = scene(fusion, "cpu", queries)
            library, count = native.load(), [0]

            def refused(function):
                def call(*args):
                    count[0] += 1
                    return status if count[0] == k else function(*args)

                return call

            with monkeypatch.context() as patch, torch.no_grad():
                for name in names:
                    patch.setattr(library, name, refused(getattr(library, name)))
                got = model(ids, past_key_values=caches[0]).logits
                want = stock(ids, past_key_values=caches[1]).logits
            what = f"{fusion}, {queries} queries, native call {k} answers {status}"
            assert_same(got, want, what)
            assert lengths(caches[0]) == {6 + queries}, what
            counters = noted(model)
            if count[0] < k:
                assert not counters.refused and not counters.downgraded, what
                break
            assert counters.refused or counters.downgraded, f"{what}: not counted\n{counters}"
            assert_same(answers(model), answers(stock), f"{what}, afterwards")
            trials()
        assert k > 1, "no native call was made"


class Interrupt:
    """A profile function that raises KeyboardInterrupt the k-th time that a signal could be handled
    in the package.

    The interpreter looks for signals where a function begins and after a call of a C function has
    returned. Generators are left out: what is raised while an abandoned one closes goes nowhere, in
    any program.
    """

    def __init__(self, k: int):
        self.k, self.count, self.place = k, 0, ""

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if (
            event in ("call", "c_return")
            and code.co_filename.startswith(PACKAGE)
            and not code.co_flags & CO_GENERATOR
        ):
            self.count += 1
            if self.count == self.k:
                self.place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt


@pytest.mark.reliability(19, "interrupts")
@pytest.mark.parametrize("state", ("first call", "bound"))
@pytest.mark.parametrize("fusion", ("attention", "full"))
def test_an_interrupt_at_every_point(fusion, state, trials):
    """Where signals come at random, this comes everywhere in a bound step, elsewhere at every n-th
    point.
    """
    stride = {("full", "bound"): 1, ("attention", "bound"): 5}.get((fusion, state), 31)
    for queries in (1, 20):
        k = 1
        while True:
            model, stock, caches, ids = scene(fusion, "cpu", queries)
            if state == "first call":
                hf_fusion.patch(model, fusion, "cpu")
            interrupt, raised = Interrupt(k), False
            with torch.no_grad():
                sys.setprofile(interrupt)
                try:
                    model(ids, past_key_values=caches[0])
                except KeyboardInterrupt:
                    raised = True
                finally:
                    sys.setprofile(None)
            what = (
                f"{fusion}, {queries} queries, {state}, interrupted at point {k}, {interrupt.place}"
            )
            if interrupt.count < k:
                break
            assert raised, f"{what}: swallowed"
            assert_recovered(model, stock, caches, ids, fusion == "full", what)
            trials()
            k += stride
        assert k > 20


class Bang(Exception):
    """What user code raises here."""


class At:
    """Raises one and the same exception at the t-th time it is asked."""

    def __init__(self, t: int):
        self.left, self.error = t, Bang(t)

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


class Processor(At, LogitsProcessor):
    def __call__(self, input_ids, scores):
        self.step()
        return scores


class Criterion(At, StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        self.step()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Streamer(At, BaseStreamer):
    def put(self, value):
        self.step()

    def end(self):
        """Nothing."""


def hook(model, at):
    return model.register_forward_hook(lambda *args: at.step()).remove


def inner_hook(model, at):
    return model.gpt_neox.layers[1].mlp.register_forward_pre_hook(lambda *args: at.step()).remove


def sub_forward(model, at):
    mlp = model.gpt_neox.layers[1].mlp
    forward = type(mlp).forward

    def failing(x):
        at.step()
        return forward(mlp, x)

    mlp.forward = failing
    return lambda: delattr(mlp, "forward")


PLACES = {
    "logits processor": lambda m, at: {"logits_processor": LogitsProcessorList([at])},
    "stopping criterion": lambda m, at: {"stopping_criteria": StoppingCriteriaList([at])},
    "streamer": lambda m, at: {"streamer": at},
    "hook": hook, "hook of a part": inner_hook, "forward of a part": sub_forward,
}  # fmt: skip
KINDS = {"logits processor": Processor, "stopping criterion": Criterion, "streamer": Streamer}


@pytest.mark.reliability(18, "exceptions in user code")
@pytest.mark.parametrize("place", PLACES)
def test_an_exception_at_every_step_reaches_the_caller_as_it_is(place, trials):
    model, stock = pair(2, "full")
    want = {fusion: generate(stock, 5, 6) for fusion in RUNGS}
    for t in range(1, 33):
        fusion = RUNGS[t % 3]
        hf_fusion.patch(model, fusion, "cpu")
        at = KINDS.get(place, At)(t)
        done = PLACES[place](model, at)
        options = done if isinstance(done, dict) else {}
        with pytest.raises(Bang) as caught:
            generate(model, 4, 32, **options)
        assert caught.value is at.error, f"{place}, step {t}"
        if not options:
            done()
        counters = hf_fusion.stats(model)
        counters.clear()
        assert generate(model, 5, 6) == want[fusion], (
            f"{place}, step {t}, {fusion}: the next result"
        )
        assert noted(model).fused and not counters.refused and not counters.downgraded, (
            f"{place}, {t}\n{counters}"
        )
        trials()


CHILD = """
import signal, sys, time
import torch
from pairs import generate, pair
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
model, stock = pair(3, sys.argv[1], "fp32", "cpu", num_hidden_layers=4)
work = {"decode": lambda: generate(model, 1, 60),
        "prefill": lambda: generate(model, 1, 1, batch=4, length=600)}
want = [generate(stock, 2, 8), generate(stock, 2, 2, length=40)]
for kind in sys.stdin:
    try:
        print("go", flush=True)
        while True:
            work[kind.strip()]()
    except KeyboardInterrupt:
        caught = time.monotonic()
    got = [generate(model, 2, 8), generate(model, 2, 2, length=40)]
    print("same" if got == want else f"different {got} {want}", caught, flush=True)
"""


@pytest.mark.reliability(19)
@pytest.mark.parametrize(("fusion", "count"), (("full", 70), ("attention", 30)))
def test_sigint_at_random_times(fusion, count, trials):
    """A child generates; SIGINT comes 0 to 30 ms later; the child says how the next result
    compares.
    """
    import random

    draw = random.Random(19)
    command = [sys.executable, "-W", "ignore", "-c", CHILD, fusion]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parent,
    ) as child:  # fmt: skip
        try:
            for number in range(count):
                kind = "decode" if number % 2 else "prefill"
                child.stdin.write(kind + "\n")
                child.stdin.flush()
                assert child.stdout.readline() == "go\n", child.stderr.read()
                time.sleep(draw.random() * 0.03)
                sent = time.monotonic()
                child.send_signal(signal.SIGINT)
                verdict, _, caught = child.stdout.readline().partition(" ")
                assert verdict == "same", (
                    f"trial {number}, {kind}: {verdict} {caught} {child.stderr.read()}"
                )
                assert float(caught) - sent < 5, (
                    f"trial {number}, {kind}: raised after {float(caught) - sent:.1f} s"
                )
                trials()
            child.stdin.close()
            assert child.wait(20) == 0
        finally:
            child.kill()
