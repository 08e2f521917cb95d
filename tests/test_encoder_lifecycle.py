"""A patched encoder that is edited, moved, copied or used by many threads answers as stock does,
with and without packed copies of its weights.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from encoders import RUNGS, TEXT, VISION, cast, encoder_pair, hidden_states, sample
from pairs import assert_moved, assert_same, noted
from test_concurrency import in_threads
from test_patching import files, picture
from torch import nn
from twins import ENCODERS, resolve

import hf_fusion
from hf_fusion.forwards import KEY
from hf_fusion.report import Reason

pytestmark = pytest.mark.usefixtures("one_thread")

PACKED = (False, True)


def layers_of(model) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def matrices(model) -> list[nn.Linear]:
    return [m for m in layers_of(model).modules() if isinstance(m, nn.Linear)]


def other(tensor: torch.Tensor) -> torch.Tensor:
    """Values of the same kind as those of a tensor, and others."""
    return tensor.detach().flip(0) * 1.25 + 0.1 * torch.randn_like(tensor)


def copy_(model, family):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(other(p))


def add_to_one_element(model, family):
    with torch.no_grad():
        for linear in matrices(model):
            linear.weight[1, 2].add_(3.0)


def data_whole(model, family):
    for p in model.parameters():
        p.data.mul_(0.8)  # bumps no version
        p.data.add_(0.05)


def data_of_one_matrix(model, family):
    matrices(model)[-1].weight.data.copy_(other(matrices(model)[-1].weight))


def data_of_biases(model, family):
    for linear in matrices(model):
        linear.bias.data.add_(0.5)


def data_of_norms(model, family):
    for m in layers_of(model).modules():
        if isinstance(m, nn.LayerNorm):
            m.weight.data.mul_(1.5)


def numpy_write(model, family):
    for linear in matrices(model):
        linear.weight.detach().numpy()[:] *= 0.7  # by way of memory that torch does not watch


def data_assign(model, family):
    for p in model.parameters():
        p.data = other(p)


def load(model, family):
    model.load_state_dict({k: other(v) if v.is_floating_point() else v
                           for k, v in model.state_dict().items()})  # fmt: skip


def load_assign(model, family):
    model.load_state_dict({k: other(v) if v.is_floating_point() else v
                           for k, v in model.state_dict().items()}, assign=True)  # fmt: skip


def swap_tensors(model, family):
    weight = matrices(model)[0].weight
    torch.utils.swap_tensors(weight, nn.Parameter(other(weight)))


def swap_module(model, family):
    owner, name = next(
        (m, n) for m in layers_of(model).modules() for n, child in m.named_children()
        if isinstance(child, nn.Linear) and child.out_features != child.in_features
    )  # fmt: skip
    old = getattr(owner, name)
    setattr(owner, name, nn.Linear(old.in_features, old.out_features))


def swap_layers(model, family):
    layers = layers_of(model)
    layers[0], layers[1] = layers[1], layers[0]


def step(model, family, make):
    with torch.enable_grad():
        model(**sample(family))[0].square().mean().backward()
    make([p for p in model.parameters() if p.grad is not None]).step()
    model.zero_grad(set_to_none=True)


def optimizer_foreach(model, family):
    step(model, family, lambda ps: torch.optim.SGD(ps, lr=0.1, foreach=True))


def optimizer_fused(model, family):
    step(model, family, lambda ps: torch.optim.AdamW(ps, lr=0.05, fused=True))


def in_inference_mode(model, family):
    with torch.inference_mode():
        for p in model.parameters():
            p.mul_(0.8)


def to_bf16(model, family):
    model.to(torch.bfloat16)


def norm_eps(model, family):
    for m in layers_of(model).modules():
        if isinstance(m, nn.LayerNorm):
            m.eps = 3.0


def scaling(model, family):
    for m in layers_of(model).modules():
        if "scaling" in vars(m):
            m.scaling *= 3.0


EDITS = (
    copy_, add_to_one_element, data_whole, data_of_one_matrix, data_of_biases, data_of_norms,
    numpy_write, data_assign, load, load_assign, swap_tensors, swap_module, swap_layers,
    optimizer_foreach, optimizer_fused, in_inference_mode, to_bf16, norm_eps, scaling,
)  # fmt: skip
TRAINS = {"optimizer_foreach", "optimizer_fused"}


@pytest.mark.reliability(23, "weight edits")
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("family", ENCODERS)
def test_the_next_answer_after_an_edit_is_stock_s(family, packed, edit, trials):
    for fusion, backend in (("full", "cpu"), ("attention+up", "cpu"), ("full", "reference")):
        model, stock = encoder_pair(family, fusion, backend, packed)
        counters = hf_fusion.stats(model)
        what = f"{family}, {fusion} on {backend}, packed {packed}: {edit.__name__}"
        before = hidden_states(model, family)
        assert_same(before, hidden_states(stock, family), f"{what}, before")
        for again in range(2):
            for m in (model, stock):
                torch.manual_seed(11 + again)
                edit(m, family)
            after, want = hidden_states(model, family), hidden_states(stock, family)
            assert_same(after, want, f"{what}, time {again}")
            if not again and before[0].dtype == want[0].dtype:  # the second may undo the first
                assert_moved(before, want, what)
            trials()
        refused = {Reason.GRADIENTS.value} if edit.__name__ in TRAINS else set()
        noted(model)
        assert set(counters.refused) == refused and not counters.downgraded, f"{what}\n{counters}"


@pytest.mark.reliability(23)
@pytest.mark.parametrize("family", ("vit", "bert"))
def test_a_write_past_the_version_counter_shows_within_its_bound(family, trials):
    """Packed copies notice one element written through .data within eight times a row's lines."""
    for index in range(12):
        model, stock = encoder_pair(family, "full", "cpu", True)
        hidden_states(model, family)
        width = max(linear.in_features for linear in matrices(model))
        bound = 8 * -(-width * 4 // 64)
        for m in (model, stock):
            weight = matrices(m)[index].weight
            weight.data[index % weight.shape[0], -1 - index % 5] += 40.0
        want = hidden_states(stock, family)
        with torch.no_grad():
            for _ in range(bound):
                model(**sample(family))
        assert_same(hidden_states(model, family), want, f"{family}, matrix {index}")
        trials()


def bound_bytes(model) -> int:
    """Bytes of packed copies that the bound layers hold."""
    blocks = [vars(layer)[KEY].binding.block for layer in layers_of(model)]
    return sum(block.packing._buffer.nbytes - 64 if block.packing else 0 for block in blocks)


@pytest.mark.reliability(24, "host and model state")
@pytest.mark.parametrize("dtype", ("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("packed", (False, True, None))
def test_the_report_counts_the_bytes_of_the_copies(packed, dtype):
    for family in ENCODERS:
        for sizes in ({}, {"hidden_size": 37, "num_attention_heads": 1, "intermediate_size": 41}):
            model, _ = encoder_pair(family, None, dtype=dtype, **sizes)
            report = hf_fusion.patch(model, backend="cpu", packed=packed)
            hidden_states(model, family)
            assert report.packed_bytes == bound_bytes(model), f"{family} {sizes}"
            weights = sum(m.weight.nbytes for m in matrices(model))
            assert packed is None or (report.packed_bytes >= weights) == packed
            if packed is False:
                assert report.packed_bytes == 0


@pytest.mark.reliability(22, "moves and casts")
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("family", ENCODERS)
def test_moves_and_casts(family, packed, trials):
    for fusion in RUNGS:
        model, stock = encoder_pair(family, fusion, packed=packed)
        hidden_states(model, family)
        for move in (
            lambda m: m.to(torch.bfloat16), lambda m: m.to(torch.float16), copy.deepcopy,
            lambda m: m.share_memory(), lambda m: m.float(), lambda m: m.requires_grad_(False),
        ):  # fmt: skip
            model, stock = move(model), move(stock)
            counters = hf_fusion.stats(model)
            counters.clear()
            what = f"{family}, {fusion}, packed {packed}"
            assert_same(hidden_states(model, family), hidden_states(stock, family), what)
            assert counters.fused and not noted(model).refused, f"{what}\n{counters}"
            trials()


@pytest.mark.reliability(24)
@pytest.mark.parametrize("fusion", RUNGS)
@pytest.mark.parametrize("family", ENCODERS)
def test_a_patched_encoder_is_outwardly_what_it_was(family, fusion, tmp_path):
    model, stock = encoder_pair(family, None)
    before, saved = picture(model), files(model, tmp_path)
    config = model.config.to_json_string()
    for packed in PACKED:
        report = hf_fusion.patch(model, fusion, packed=packed)
        assert report.family == family and report.fused_layers == 2 and report.reason is None
        assert_same(hidden_states(model, family), hidden_states(stock, family))
        assert repr(model) == repr(stock) and list(model.state_dict()) == list(stock.state_dict())
        assert files(model, tmp_path) == saved and model.config.to_json_string() == config
        assert noted(model).fused
        hf_fusion.unpatch(model)
        assert picture(model) == before
    with hf_fusion.patched(model, fusion):
        hidden_states(model, family)
    assert picture(model) == before
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert_same(hidden_states(loaded, family), hidden_states(stock, family), "loaded again")


@pytest.mark.reliability(24)
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("family", ENCODERS)
def test_copies_and_pickles(family, packed):
    model, stock = encoder_pair(family, packed=packed)
    hidden_states(model, family)
    twin, edited = copy.deepcopy(model), copy.deepcopy(stock)
    for m in (twin, edited):
        torch.manual_seed(4)
        copy_(m, family)
    assert_same(hidden_states(twin, family), hidden_states(edited, family), "the copy")
    assert_same(hidden_states(model, family), hidden_states(stock, family), "the original")
    assert noted(twin).fused == 2 and not hf_fusion.stats(twin).refused
    memory = io.BytesIO()
    pickle.dump(model, memory)
    loaded = pickle.loads(memory.getvalue())
    assert "pickling" in hf_fusion.stats(loaded).note
    assert_same(hidden_states(loaded, family), hidden_states(stock, family), "pickled")
    hf_fusion.patch(loaded, packed=packed)
    assert_same(hidden_states(loaded, family), hidden_states(stock, family), "patched again")
    assert noted(loaded).fused == 2
    watched = [weakref.ref(model), weakref.ref(matrices(model)[0].weight)]
    del model
    gc.collect()
    assert [ref() for ref in watched] == [None, None], "a model is kept alive"


@pytest.mark.reliability(20, "concurrency")
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("family", ENCODERS)
def test_threads_get_the_bits_of_one(family, packed, trials):
    model, _ = encoder_pair(family, packed=packed)
    counts = [(1 + n % 3, 2 + 5 * (n % 7)) for n in range(8)]
    calls = [sample(family, n, b, s, ("none", "right")[n % 2]) for n, (b, s) in enumerate(counts)]

    def run(call):
        with torch.no_grad():
            return model(**call).last_hidden_state

    serial = [run(call) for call in calls]
    for cold in (False, True):
        if cold:  # every thread finds the layers unbound
            hf_fusion.patch(model, packed=packed)
        jobs = [[lambda n=(t + i) % 8: (n, run(calls[n])) for i in range(6)] for t in range(8)]
        for results in in_threads(jobs):
            for n, got in results:
                assert torch.equal(got, serial[n]), f"{family}, call {n}, cold {cold}"
                trials()
    assert not noted(model).refused


@pytest.mark.reliability(24)
def test_a_model_around_an_encoder():
    """A module that holds two encoders of one family fuses both."""
    cls = resolve(ENCODERS["bert"].base_class)

    class Pair(nn.Module):
        def __init__(self, one, two):
            super().__init__()
            self.one, self.two = one, two

        def forward(self, **call):
            return self.one(**call).last_hidden_state + self.two(**call).last_hidden_state

    parts = [encoder_pair("bert", None, cls=cls, seed=seed)[0] for seed in (1, 2)]
    stock = Pair(*parts)
    model = copy.deepcopy(stock)
    report = hf_fusion.patch(model)
    assert len(report.layers) == report.fused_layers == 4
    with torch.no_grad():
        assert_same(model(**sample("bert")), stock(**sample("bert")))
    assert noted(model).calls["encode"] == 2


def test_families_are_those_that_the_tests_know():
    assert set(ENCODERS) == {*VISION, *TEXT} and len(TEXT) == 4
    for family in ENCODERS:
        dtype = next(encoder_pair(family)[0].parameters()).dtype
        assert cast(sample(family), dtype).keys() == sample(family).keys()
