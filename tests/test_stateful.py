"""Programs of up to 20 steps on a patched model and its unpatched twin; after every step both say
the same.

A program is a list of (step, seed) drawn from a seed. A failing one is shrunk by leaving steps out,
and printed.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
from typing import NamedTuple

import pytest
import torch
from edits import EDITS
from pairs import SAME, distance, generate, pair, tokens
from test_lifecycle import missing
from transformers import DynamicCache, StaticCache
from twins import HITS, REASONS

import hf_fusion
from hf_fusion.backends import FUSIONS

PROGRAMS, CHUNKS, LENGTH = 300, 10, 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# edits that leave a plain GPTNeoXForCausalLM of the same vocabulary, so that any other step may
# follow
SAFE = (
    "copy_", "add_", "data_write", "data_assign", "data_assign_bias", "vector", "swap_tensors",
    "load", "load_assign", "parameter_assign", "tie", "swap_module", "swap_layers", "norm_eps",
    "attention_scale", "residual", "activation", "no_bias", "frequencies", "optimizer_foreach",
    "pruned_for_good", "lora_merge_and_unload",
)  # fmt: skip
STEPS: dict = {}


class Mismatch(Exception):
    """The two worlds differ."""


class World:
    """A model with its cache, its batch rows and the hooks set so far. `fused` is the patched one
    of the two.
    """

    def __init__(self, model, fused: bool):
        self.model, self.fused = model, fused
        self.cache, self.rows, self.hooks = None, 0, []
        self.worst = torch.float32  # the least precise dtype that what is cached has been through

    def forward(self, ids: torch.Tensor, **call) -> torch.Tensor:
        with torch.no_grad():
            return self.model(ids, past_key_values=self.cache, **call).logits

    def note(self) -> None:
        """Adds the counters to the summary's before they go with the patch."""
        if self.fused:
            counters = hf_fusion.stats(self.model)
            HITS.update(counters.calls)
            REASONS.update(counters.refused)
            REASONS.update(counters.downgraded)
            counters.clear()


def step(weight: int = 1):
    """Registers a step, drawn in proportion to `weight`. It gets a World and a Random of its own.
    """

    def register(function):
        STEPS[function.__name__] = (function, weight)
        return function

    return register


@step(3)
def prompt(world, draw):
    """Starts a cache, dynamic or static, with a prompt."""
    config = world.model.config
    world.rows = draw.choice((1, 2, 3))
    static = draw.random() < 0.25
    world.cache = (
        StaticCache(config=config, max_cache_len=96) if static else DynamicCache(config=config)
    )
    ids = tokens(draw.randrange(99), world.rows, draw.choice((1, 4, 7, 20)))
    return world.forward(ids)


@step(6)
def forward(world, draw):
    """A few tokens behind what is cached, sometimes with a mask or positions."""
    if world.cache is None:
        return world.forward(tokens(draw.randrange(99), 2, 5))
    count, seed, how = draw.choice((1, 1, 1, 3, 18)), draw.randrange(99), draw.randrange(4)
    past = int(world.cache.get_seq_length())
    if past + count > 90:
        return None
    call = {}
    if how == 1:
        call["attention_mask"] = (
            torch.rand(world.rows, past + count, generator=_generator(seed)) < 0.8
        ).long()
        call["attention_mask"][:, -count:] = 1
    elif how == 2:
        call["position_ids"] = torch.arange(past, past + count)[None] + 2
    elif how == 3:
        call["logits_to_keep"] = 1
    return world.forward(tokens(seed, world.rows, count), **call)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@step(2)
def generated(world, draw):
    options = draw.choice(
        ({}, {"num_beams": 2}, {"do_sample": True, "top_k": 5}, {"prompt_lookup_num_tokens": 3})
    )
    batch = 1 if "prompt_lookup_num_tokens" in options else draw.choice((1, 2))
    dtype = next(world.model.parameters()).dtype
    torch.manual_seed(3)
    result = generate(world.model, draw.randrange(99), 4, batch, **options)
    # in a low precision two right models may choose different tokens
    return result if dtype == torch.float32 else None


def _dynamic(world) -> bool:
    return type(world.cache) is DynamicCache and world.cache.get_seq_length() > 1


@step()
def crop(world, draw):
    if _dynamic(world):
        world.cache.crop(-draw.randrange(1, int(world.cache.get_seq_length())))
        return world.cache.get_seq_length()


@step()
def reorder(world, draw):
    if world.cache is not None and world.cache.get_seq_length():
        world.cache.reorder_cache(
            torch.tensor([draw.randrange(world.rows) for _ in range(world.rows)])
        )


@step()
def select(world, draw):
    if _dynamic(world):
        rows = sorted(draw.sample(range(world.rows), draw.randrange(1, world.rows + 1)))
        world.cache.batch_select_indices(torch.tensor(rows))
        world.rows = len(rows)


@step()
def repeat(world, draw):
    if _dynamic(world) and world.rows < 4:
        world.cache.batch_repeat_interleave(2)
        world.rows *= 2


@step()
def copy_cache(world, draw):
    """Goes on with a copy; the original must not be touched by that."""
    if _dynamic(world):
        world.kept = world.cache
        world.cache = copy.deepcopy(world.cache)


@step()
def kept_cache(world, draw):
    """Back to the original of the latest copy."""
    if getattr(world, "kept", None) is not None and world.kept.layers[0].keys is not None:
        world.cache, world.kept = world.kept, None
        world.rows = world.cache.layers[0].keys.shape[0]


@step()
def look_at_cache(world, draw):
    if _dynamic(world):
        return [world.cache.layers[i].keys.clone() for i in (0, 1)]


@step(2)
def cast(world, draw):
    world.model.to(draw.choice(DTYPES))
    world.cache = None  # stock cannot mix dtypes either


@step(6)
def edited(world, draw):
    kind, seed = draw.choice(SAFE), draw.randrange(99)
    if missing(kind) or (
        kind == "optimizer_foreach" and next(world.model.parameters()).dtype != torch.float32
    ):
        return
    dtype = next(world.model.parameters()).dtype
    EDITS[kind].apply(world.model, seed)
    world.model.to(dtype)


@step(2)
def hook(world, draw):
    names = (
        "",
        "gpt_neox",
        "gpt_neox.layers.0",
        "gpt_neox.layers.1.mlp",
        "lm_head",
        "gpt_neox.embed_in",
    )
    module = world.model.get_submodule(draw.choice(names))

    def halve(module, args, output):
        return 0.5 * output if isinstance(output, torch.Tensor) else None

    world.hooks.append(module.register_forward_hook(halve))


@step(2)
def unhook(world, draw):
    while world.hooks:
        world.hooks.pop().remove()


@step()
def captured(world, draw):
    with torch.no_grad():
        return list(world.model(tokens(1, 1, 4), output_hidden_states=True).hidden_states)


@step(3)
def patch(world, draw):
    fusion, backend = draw.choice(FUSIONS), draw.choice(("auto", "reference"))
    if world.fused:
        world.note()
        hf_fusion.patch(world.model, fusion, backend)


@step()
def unpatch(world, draw):
    if world.fused:
        world.note()
        hf_fusion.unpatch(world.model)


@step()
def within(world, draw):
    fusion = draw.choice(FUSIONS)
    if not world.fused:
        return forward(world, draw)
    with hf_fusion.patched(world.model, fusion):
        return forward(world, draw)


@step()
def deepcopy(world, draw):
    unhook(world, draw)  # a copied hook has no handle
    world.note()
    world.model = copy.deepcopy(world.model)


@step()
def pickled(world, draw):
    """Comes back unpatched; patched again or not."""
    unhook(world, draw)
    again = draw.random() < 0.7
    world.note()
    was = any("_hf_fusion" in vars(m) for m in world.model.modules())
    memory = io.BytesIO()
    pickle.dump(world.model, memory)
    world.model = pickle.loads(memory.getvalue())
    if world.fused and was and hf_fusion.stats(world.model).note in ("", "not patched"):
        raise Mismatch("an unpickled model does not say that it is unpatched")
    if world.fused and again:
        hf_fusion.patch(world.model)


@step()
def adapter(world, draw):
    """A LoRA adapter, used once and taken off."""
    if missing("lora_add"):
        return None
    wrapped = EDITS["lora_add"].apply(world.model, 3)
    with torch.no_grad():
        logits = wrapped(tokens(1, 1, 4)).logits
    world.model = wrapped.unload().eval()
    return logits


@step()
def trained(world, draw):
    """Gradients of a loss, in evaluation mode and then in training mode."""
    ids = tokens(2, 1, 4)
    world.model.train(draw.random() < 0.5)
    world.model(ids, labels=ids).loss.backward()
    grad = world.model.lm_head.weight.grad.clone()
    world.model.zero_grad()
    world.model.eval()
    return grad


def compare(got, want, what: str) -> None:
    """Raises Mismatch unless two results of a step are the same."""
    if isinstance(want, list) and want and isinstance(want[0], torch.Tensor):
        for one, two in zip(got, want, strict=True):
            compare(one, two, what)
    elif isinstance(want, torch.Tensor):
        off = distance(got, want) if got.dtype == want.dtype else float("inf")
        if off > SAME[want.dtype] * 2:
            raise Mismatch(
                f"{what}: relative distance {off:.2e}, at most {2 * SAME[want.dtype]:.0e}"
            )
    elif got != want:
        raise Mismatch(f"{what}: {got}, stock {want}")


class Step(NamedTuple):
    name: str
    seed: int


def program(seed: int) -> list[Step]:
    """Up to LENGTH steps."""
    draw = random.Random(seed)
    names, weights = list(STEPS), [weight for _, weight in STEPS.values()]
    count = draw.randint(5, LENGTH)
    return [Step(name, draw.randrange(2**31)) for name in draw.choices(names, weights, k=count)]


def run(seed: int, steps: list[Step]) -> tuple[str, int]:
    """What goes wrong with a program, empty where nothing does, and how many calls ran fused."""
    model, stock = pair(seed % 3, FUSIONS[1 + seed % 4])
    worlds = World(model, True), World(stock, False)
    hits = sum(HITS.values())
    for number, (name, step_seed) in enumerate(steps):
        results = []
        for world in worlds:
            torch.default_generator.manual_seed(step_seed % 1000)
            try:
                results.append(STEPS[name][0](world, random.Random(step_seed)))
            except Mismatch as error:
                return f"step {number}, {name}: {error}", 0
            except Exception as error:
                results.append(f"{type(error).__name__}: {error}")
        try:
            compare(*results, f"step {number}, {name}")
            ids = tokens(step_seed % 97, 1, 3)
            with torch.no_grad():
                compare(
                    *(w.model(ids, use_cache=False).logits for w in worlds),
                    f"after step {number}, {name}",
                )
        except Mismatch as error:
            return str(error), 0
    worlds[0].note()
    return "", sum(HITS.values()) - hits


def shrink(seed: int, steps: list[Step]) -> list[Step]:
    """The same program without the steps that its failure does not need."""
    index = 0
    while index < len(steps):
        shorter = steps[:index] + steps[index + 1 :]
        if run(seed, shorter)[0]:
            steps = shorter
        else:
            index += 1
    return steps


@pytest.mark.reliability(11, "stateful programs")
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_programs(chunk, one_thread, trials):
    fused = 0
    for seed in range(chunk, PROGRAMS, CHUNKS):
        steps = program(seed)
        failure, hits = run(seed, steps)
        if failure:
            least = shrink(seed, steps)
            pytest.fail(
                f"program {seed}: {failure}\nshrunk to {run(seed, least)[0]}\n"
                f"{[tuple(s) for s in least]}"
            )
        fused += hits > 0
        trials()
    # some programs start by taking the patch off
    assert fused > 0.8 * PROGRAMS / CHUNKS, (
        f"{fused} of {PROGRAMS // CHUNKS} programs ran anything fused"
    )
