"""Encoders that no kernel takes, modes of torch, hooks and strictness: stock's result, or stock's
error, and a counted reason.
"""

from __future__ import annotations

import pytest
import torch
from encoders import RUNGS, TEXT, cast, encoder_pair, hidden_states, sample
from pairs import assert_same, noted
from test_bad_input import assert_same_outcome, outcome
from test_encoder_calls import FUSED, NOISE, answer, tensors
from test_patching import picture
from torch import nn
from twins import ENCODERS

import hf_fusion
from hf_fusion import FusionError
from hf_fusion.report import Reason

pytestmark = [
    pytest.mark.reliability(10, "bad models and input"),
    pytest.mark.usefixtures("one_thread"),
]


def parts_of(model) -> list:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def first_linear(model) -> nn.Linear:
    return next(m for m in parts_of(model)[0].modules() if isinstance(m, nn.Linear))


def bias_nan(model):
    with torch.no_grad():
        first_linear(model).weight[1, 2] = float("nan")


def mixed(model):
    model.bfloat16()
    norm = next(m for m in parts_of(model)[1].modules() if isinstance(m, nn.LayerNorm))
    norm.float()


def own_forward(model):
    linear = first_linear(model)
    linear.forward = lambda x: 0.5 * type(linear).forward(linear, x)


def own_layer_forward(model):
    layer = parts_of(model)[1]
    layer.forward = lambda x, *args, **kwargs: 2.0 * x


def subclass(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    first_linear(model).__class__ = Doubled


def transposed(model):
    weight = first_linear(model).weight
    weight.data = weight.data.t().contiguous().t()


def cut(model):
    storage = first_linear(model).weight.untyped_storage()
    storage.resize_(storage.nbytes() // 2)


MODELS = {
    "NaN in a weight": (bias_nan, FUSED),
    "mixed dtypes": (mixed, {Reason.MIXED_DTYPE}),
    "fp64": (lambda m: m.double(), {Reason.DTYPE}),
    "training": (lambda m: m.train(), {Reason.TRAINING}),
    "a layer in training": (lambda m: parts_of(m)[1].train(), {Reason.TRAINING}),
    "a replaced forward": (own_forward, {Reason.FORWARD_REPLACED}),
    "a replaced layer": (own_layer_forward, {Reason.FORWARD_REPLACED}),
    "a subclass": (subclass, {Reason.MODULE_TYPE}),
    "a strided weight": (transposed, {Reason.LAYOUT}),
    "a storage cut short": (cut, {Reason.LAYOUT}),
    "a layer less": (lambda m: parts_of(m).__delitem__(1), FUSED),
    "no layers": (lambda m: parts_of(m).__delitem__(slice(None)), {Reason.STRUCTURE}),
    "one more child": (lambda m: parts_of(m)[0].add_module("more", nn.Identity()),
                       {Reason.STRUCTURE}),
    "an unknown attention": (lambda m: setattr(m.config, "_attn_implementation_internal", "flex"),
                             {Reason.ATTENTION_IMPLEMENTATION}),
    "meta": (lambda m: m.to("meta"), {Reason.META}),
}  # fmt: skip


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("name", MODELS)
def test_models_that_no_kernel_takes(name, family, trials):
    change, reasons = MODELS[name]
    for fusion in RUNGS:
        for first in ("patch", "change"):
            model, stock = encoder_pair(family, None)
            before = picture(model)
            if first == "patch":
                hf_fusion.patch(model, fusion)
                hidden_states(model, family)
            change(model), change(stock)
            if first == "change":
                hf_fusion.patch(model, fusion)
            call = cast(sample(family), next(model.parameters()).dtype)
            on = model.device
            call = {k: v.to(on) if torch.is_tensor(v) else v for k, v in call.items()}
            what = f"{family}, {fusion}, {name}, {first} first"
            counters = hf_fusion.stats(model)
            counters.clear()
            torch.manual_seed(1)
            want = outcome(lambda: answer(stock, call))
            torch.manual_seed(1)
            got = outcome(lambda: answer(model, call))
            if model.device.type == "meta":
                assert [(t.shape, t.device) for t in got] == [(t.shape, t.device) for t in want]
            else:
                assert_same_outcome(got, want, what)
            seen = set(noted(model).refused) | set(counters.downgraded)
            assert seen <= {reason.value for reason in reasons}, f"{what}\n{counters}"
            # a child that no forward calls is seen when a layer is bound
            late = name == "one more child" and first == "patch"
            assert seen or not reasons or fusion != "full" or late, f"{what}\n{counters}"
            hf_fusion.unpatch(model)
            assert not any("_hf_fusion" in vars(m) for m in model.modules())
            assert name not in ("NaN in a weight", "a strided weight") or picture(model) == before
            trials()


@pytest.mark.parametrize("fusion", RUNGS)
@pytest.mark.parametrize("family", ENCODERS)
def test_modes_of_torch(family, fusion, trials):
    model, stock = encoder_pair(family, fusion)
    hidden_states(model, family)
    call, counters = sample(family), hf_fusion.stats(model)
    modes = {
        "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), Reason.AUTOCAST),
        "gradients": (torch.enable_grad, Reason.GRADIENTS),
        "inference": (torch.inference_mode, None),
        "device": (lambda: torch.device("cpu"), None),
    }
    for name, (mode, reason) in modes.items():
        counters.clear()
        results = []
        for m in (model, stock):
            with torch.no_grad(), mode():
                results.append(tensors(m(**call)))
        assert_same(*results, f"{family}, {fusion}, {name}")
        noted(model)
        expected = set() if reason is None else {reason.value}
        assert set(counters.refused) == expected, f"{family}, {fusion}, {name}\n{counters}"
        assert bool(counters.fused) == (reason is None)
        trials()
    for m in (model, stock):
        m.requires_grad_(False)
    counters.clear()
    assert_same(tensors(model(**call)), tensors(stock(**call)), "frozen, with gradients enabled")
    assert counters.fused and not counters.refused, f"{family}, frozen\n{counters}"
    if family in TEXT:
        embeds = [NOISE.clone().requires_grad_() for _ in range(2)]
        for m, x in zip((model, stock), embeds):
            m(inputs_embeds=x).last_hidden_state.square().sum().backward()
        assert torch.equal(embeds[0].grad, embeds[1].grad)
        assert set(noted(model).refused) == {Reason.GRADIENTS.value}


@pytest.mark.parametrize("fusion", RUNGS)
@pytest.mark.parametrize("family", ENCODERS)
def test_hooks(family, fusion, trials):
    """Hooks on what runs as the module it is run and refuse nothing; others end fusion."""
    model, stock = encoder_pair(family, fusion)
    call, counters = sample(family, mask="right"), hf_fusion.stats(model)
    layers = next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    inner = next(n for n, m in parts_of(model)[0].named_modules() if isinstance(m, nn.Linear))
    places = {"embeddings": set(), f"{layers}.1": {Reason.HOOKS},
              f"{layers}.0.{inner}": {Reason.HOOKS}}  # fmt: skip
    places |= {"pooler": set()} if getattr(model, "pooler", None) is not None else {}
    for place, reasons in places.items():
        for kind in ("register_forward_hook", "register_forward_pre_hook"):
            answer(model, call)
            ran, removals = ([], []), []
            for m, seen in zip((model, stock), ran):

                def hook(module, arguments, *output, seen=seen):
                    seen.append(type(module))
                    return 1.5 * output[0] if output and torch.is_tensor(output[0]) else None

                removals.append(getattr(m.get_submodule(place), kind)(hook))
            counters.clear()
            what = f"{family}, {fusion}: {kind} on {place}"
            assert_same(answer(model, call), answer(stock, call), what)
            assert ran[0] == ran[1] and ran[0], f"{what}: ran {len(ran[0])} times"
            seen = set(noted(model).refused) | set(counters.downgraded)
            if fusion == "full":
                assert seen == {reason.value for reason in reasons}, f"{what}\n{counters}"
            assert counters.fused, what
            for removal in removals:
                removal.remove()
            counters.clear()
            assert_same(answer(model, call), answer(stock, call), f"{what}, removed")
            assert counters.fused and not counters.refused and not counters.downgraded, what
            trials()


@pytest.mark.parametrize("fusion", RUNGS)
@pytest.mark.parametrize("family", ENCODERS)
def test_strict_raises_where_the_default_would_run_stock(family, fusion):
    model, stock = encoder_pair(family, None)
    hf_fusion.patch(model, fusion, strict=True)
    assert_same(hidden_states(model, family), hidden_states(stock, family), "what runs fused runs")
    handle = first_linear(model).register_forward_hook(lambda *_: None)
    with pytest.raises(FusionError) as caught:
        answer(model, sample(family))
    assert caught.value.reason is Reason.HOOKS
    handle.remove()
    with pytest.raises(FusionError) as caught:
        model(**sample(family))
    assert caught.value.reason is Reason.GRADIENTS
    assert_same(hidden_states(model, family), hidden_states(stock, family), "afterwards")
    assert not noted(model).refused
