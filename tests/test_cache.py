"""What a caller reads of a growing cache, keeps of it and writes into it is what stock makes of it.
"""

from __future__ import annotations

import copy
import random

import pytest
import torch
from pairs import assert_same, noted, pair, tokens
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_fusion.cache import GrowableLayer, Layout

NAMES = ("keys", "values")


def edit(cache, kept):
    for layer in cache.layers:
        layer.keys[:, :, :2] = 0.25


def edit_in_place_and_assign(cache, kept):
    for layer in cache.layers:
        layer.values *= 0.5


def edit_what_was_kept(cache, kept):
    """Of one call ago: in stock that is another tensor."""
    for tensor in kept:
        tensor.fill_(7.0)


def edit_a_part_of_what_was_kept(cache, kept):
    for tensor in kept:
        tensor[:, :1, 1:].numpy().fill(7.0)


def crop_and_edit_what_was_there(cache, kept):
    """In stock the rest is a view of it."""
    whole = [getattr(layer, name) for layer in cache.layers for name in NAMES]
    cache.crop(-2)
    for tensor in whole:
        tensor[:, :, 1] = 0.25


def reorder_and_edit_what_was_there(cache, kept):
    whole = [getattr(layer, name) for layer in cache.layers for name in NAMES]
    cache.reorder_cache(torch.tensor([0, 1]))
    for tensor in whole:
        tensor.zero_()


def evict(cache, kept):
    """A sink and a window, as streaming decoders keep them."""
    for layer in cache.layers:
        for name in NAMES:
            whole = getattr(layer, name)
            setattr(layer, name, torch.cat((whole[:, :, :1], whole[:, :, -3:]), 2))


def evict_to_a_view(cache, kept):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, 2:], layer.values[:, :, 2:]


def quantise(cache, kept):
    """To 8 bits and back, where they lie."""
    for layer in cache.layers:
        for name in NAMES:
            whole = getattr(layer, name)
            scale = whole.abs().amax(-1, keepdim=True) / 127
            whole.copy_((whole / scale).round() * scale)


CHANGES = {change.__name__: change for change in (
    edit, edit_in_place_and_assign, edit_what_was_kept, edit_a_part_of_what_was_kept,
    crop_and_edit_what_was_there, reorder_and_edit_what_was_there, evict, evict_to_a_view, quantise,
)}  # fmt: skip


@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_change_between_two_tokens_is_stock_s(name, backend):
    answers = []
    models = pair(3, "full", backend=backend)
    for model in models:
        cache = DynamicCache(config=model.config)
        model(tokens(1, 2, 6), past_key_values=cache)
        kept = [getattr(layer, name) for layer in cache.layers for name in NAMES]
        model(tokens(2, 2, 1), past_key_values=cache)
        CHANGES[name](cache, kept)
        positions = torch.tensor([[7]])
        answers.append([
            model(tokens(seed, 2, 1), past_key_values=cache, position_ids=positions + seed).logits
            for seed in (3, 4)
        ] + [tensor.clone() for tensor in kept])  # fmt: skip
        answers[-1] += [getattr(layer, name) for layer in cache.layers for name in NAMES]
    assert_same(*answers, name)
    assert noted(models[0]).fused == 4


def _appended(layer, tokens: int, seed: int, by_kernel: bool) -> None:
    """As stock appends, or as kernels do."""
    made = torch.randn(2, 2, 3, tokens, 4, generator=torch.Generator().manual_seed(seed))
    if not by_kernel or type(layer) is DynamicLayer:
        layer.update(*made)
        return
    layer.reserve(Layout(2, 3, 4, torch.float32, torch.device("cpu")), tokens)
    for buffer, part in zip(layer.buffers, made, strict=True):
        buffer.numpy()[:, :, layer.length : layer.length + tokens] = part.numpy()
    layer.advance(tokens)


def _program(layer, draw: random.Random) -> list:
    """What is seen after each of some random operations: the live tokens, and all that was kept."""
    kept, seen = [], []
    for _ in range(25):
        choice, seed = draw.randrange(8), draw.randrange(99)
        which, length = draw.choice(NAMES), layer.get_seq_length()
        if choice < 3 or not length:
            _appended(layer, draw.choice((1, 1, 3, 70)), seed, choice > 0)
        elif choice == 3:
            kept.append(getattr(layer, which)[:, :, draw.randrange(length) :])
        elif choice == 4 and kept:
            draw.choice(kept)[:, :, : 1 + seed % 3] = seed
        elif choice == 5:
            layer.crop(-draw.randrange(1, length + 1))
        elif choice == 6:
            layer.reorder_cache(torch.tensor(draw.choice(((0, 1), (1, 0), (1, 1)))))
        elif choice == 7 and kept:
            kept.pop(draw.randrange(len(kept)))
        live = [getattr(layer, name) for name in NAMES] if layer.get_seq_length() else []
        seen.append([tensor.clone() for tensor in (*live, *kept)])
    return seen


def test_what_is_kept_of_a_layer_is_stock_s(trials):
    for seed in range(40):
        got = _program(GrowableLayer(), random.Random(seed))
        want = _program(DynamicLayer(), random.Random(seed))
        for step, (one, two) in enumerate(zip(got, want, strict=True)):
            assert len(one) == len(two) and all(map(torch.equal, one, two)), f"{seed}, step {step}"
        trials()


def test_what_nobody_keeps_costs_no_copy():
    layer = GrowableLayer()
    _appended(layer, 5, 1, True)
    buffers = layer.buffers
    for seed in range(9):
        assert layer.keys.shape[2] == layer.values.shape[2] == layer.length
        _appended(layer, 1, seed, seed % 2 > 0)
        layer.crop(-1)
    assert layer.buffers is buffers
    kept = layer.keys
    layer.crop(-2)
    assert layer.buffers is buffers
    _appended(layer, 1, 9, True)
    assert layer.buffers is not buffers and kept.shape[2] == 5
