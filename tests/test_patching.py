"""patch and unpatch: what they leave behind, what they refuse, and what a patched model still is to
the outside.
"""

from __future__ import annotations

import copy
import gc
import inspect
import io
import json
import pickle
import weakref
from types import MethodType

import pytest
import torch
from pairs import RUNGS, answers, assert_same, generate, noted, pair, tokens
from torch import nn
from torch.nn.parallel.replicate import replicate
from transformers import (
    DynamicCache,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    GPTNeoXModel,
)
from twins import ENCODERS, FAMILIES, build

import hf_fusion
from hf_fusion import FusionError, native
from hf_fusion.backends import BACKENDS, FUSIONS
from hf_fusion.report import Reason

pytestmark = [
    pytest.mark.reliability(24, "host and model state"),
    pytest.mark.usefixtures("one_thread"),
]


def picture(model: nn.Module) -> list:
    """Class and every attribute, in order and by identity, of every module, with the contents of
    its containers.
    """
    seen = []
    for name, module in model.named_modules():
        namespace = vars(module)
        seen.append((name, type(module), [(key, id(value)) for key, value in namespace.items()]))
        for key, value in namespace.items():
            if isinstance(value, dict):
                seen.append((name, key, [(inner, id(thing)) for inner, thing in value.items()]))
    return seen


def files(model: nn.Module, folder) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("backend", ("auto", "cpu", "reference"))
@pytest.mark.parametrize("fusion", FUSIONS)
def test_unpatch_leaves_every_module_as_it_was(fusion, backend):
    model, _ = pair(0, None)
    before = picture(model)
    hf_fusion.patch(model, fusion, backend)
    assert picture(model) != before, "nothing has been patched"
    hf_fusion.unpatch(model)
    assert picture(model) == before, "unpatched before a call"
    hf_fusion.patch(model, fusion, backend)
    answers(model)
    generate(model)
    hf_fusion.unpatch(model)
    assert picture(model) == before, "unpatched after calls"
    hf_fusion.unpatch(model)
    assert picture(model) == before, "unpatched twice"
    assert hf_fusion.stats(model).note == "not patched"


def test_unpatch_gives_back_forwards_of_others():
    model, _ = pair(0, None)
    layer = model.gpt_neox.layers[1]
    layer.forward = MethodType(type(layer).forward, layer)
    model.forward = MethodType(type(model).forward, model)
    before = picture(model)
    report = hf_fusion.patch(model)
    assert report.layers[1].reason is Reason.FORWARD_REPLACED
    answers(model)
    hf_fusion.unpatch(model)
    assert picture(model) == before


@pytest.mark.parametrize("fusion", RUNGS)
def test_every_attempt_to_patch_again_is_the_last_one(fusion):
    model, stock = pair(1, None)
    before = picture(model)
    for again in (fusion, fusion, *FUSIONS, fusion):
        report = hf_fusion.patch(model, again)
        assert report.fusion == again and report.fused_layers == 2
    assert hf_fusion.stats(model).fused == 0, "a fresh patch starts with fresh counters"
    assert_same(answers(model), answers(stock), fusion)
    levels = noted(model).calls
    assert bool(levels["step"]) == (fusion == "full") and bool(levels["layer"]) == (
        fusion != "full"
    )
    hf_fusion.unpatch(model)
    assert picture(model) == before


def test_patched_restores_what_was_there():
    model, stock = pair(2, None)
    before = picture(model)
    with hf_fusion.patched(model, "attention") as report:
        assert report.fusion == "attention"
        assert_same(answers(model), answers(stock))
        assert hf_fusion.stats(model).fused
    assert picture(model) == before
    hf_fusion.patch(model, "full")
    answers(model)
    outer = hf_fusion.stats(model)
    fused = outer.fused
    with pytest.raises(KeyError), hf_fusion.patched(model, "attention+up", "reference"):
        answers(model)
        raise KeyError
    assert hf_fusion.stats(model) is outer and outer.fused == fused, (
        "the counters of the outer patch are kept"
    )
    assert_same(answers(model), answers(stock))
    assert outer.fused == fused + 3
    hf_fusion.unpatch(model)
    assert picture(model) == before


def test_a_patched_model_is_outwardly_what_it_was(tmp_path):
    model, stock = pair(3, None)
    saved, config = files(model, tmp_path), model.config.to_json_string()
    signatures = [str(inspect.signature(m.forward)) for m in model.modules()]
    for fusion in FUSIONS:
        hf_fusion.patch(model, fusion)
        answers(model)
        assert type(model) is GPTNeoXForCausalLM and isinstance(model, GPTNeoXForCausalLM)
        assert [str(inspect.signature(m.forward)) for m in model.modules()] == signatures
        assert (
            model.forward.__name__ == "forward" and model.forward.__doc__ == stock.forward.__doc__
        )
        assert list(model.state_dict()) == list(stock.state_dict())
        assert [name for name, _ in model.named_modules()] == [
            name for name, _ in stock.named_modules()
        ]
        assert repr(model) == repr(stock)
        assert files(model, tmp_path) == saved and model.config.to_json_string() == config, fusion
        loaded = GPTNeoXForCausalLM.from_pretrained(tmp_path)
        assert_same(answers(loaded.eval()), answers(stock), "loaded again")


def test_nothing_keeps_a_model_alive():
    model, _ = pair(4)
    answers(model)
    generate(model)
    watched = [
        weakref.ref(model),
        weakref.ref(model.gpt_neox.layers[0]),
        weakref.ref(model.lm_head.weight),
    ]
    del model
    gc.collect()
    assert [ref() for ref in watched] == [None] * 3
    model, _ = pair(4)
    answers(model)
    watched = weakref.ref(model.lm_head.weight)
    model.lm_head.weight = nn.Parameter(torch.zeros(99, 32))
    answers(model)
    gc.collect()
    assert watched() is None, "a replaced weight is kept"


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_deep_copy_is_patched_for_itself(fusion):
    model, stock = pair(5, fusion)
    answers(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for m in (other, stock):
            m.lm_head.weight.neg_()
    assert_same(answers(other), answers(stock), fusion)
    assert bool(noted(other).fused) == (fusion != "none")
    hf_fusion.unpatch(other)
    assert not any("_hf_fusion" in vars(m) or "forward" in vars(m) for m in other.modules())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_replicas_of_data_parallel_run_for_themselves(fusion, monkeypatch):
    """By torch's own replicate, onto two devices that are both the CPU."""
    monkeypatch.setitem(replicate.__globals__, "_get_device_index", lambda device, optional: device)
    monkeypatch.setitem(
        replicate.__globals__, "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach: [[t.detach().clone() for t in tensors] for _ in devices],
    )  # fmt: skip
    model, stock = pair(5, fusion)
    before = picture(model)
    replicas = replicate(model, [0, 1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for replica in replicas:
        assert_same(answers(replica), answers(stock), fusion)
    counters = noted(model)
    assert counters.fused == 0
    assert set(counters.refused) == ({Reason.TENSOR_TYPE.value} if fusion != "none" else set())
    assert picture(model) == before


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_pickled_model_comes_back_unpatched_and_says_so(fusion):
    model, stock = pair(6, fusion)
    answers(model)
    memory = io.BytesIO()
    pickle.dump(model, memory)
    other = pickle.loads(memory.getvalue())
    assert_same(answers(other), answers(stock), fusion)
    note = hf_fusion.stats(other).note
    assert "pickling" in note and hf_fusion.stats(other).fused == 0
    hf_fusion.patch(other)
    assert_same(answers(other), answers(stock), fusion)
    assert noted(other).fused == 3
    hf_fusion.unpatch(other)
    assert not any("_hf_fusion" in vars(m) or "forward" in vars(m) for m in other.modules())


@pytest.mark.parametrize("fusion", RUNGS)
def test_hooks_of_users_run_as_in_stock(fusion, trials):
    places = ("", "gpt_neox", "gpt_neox.layers.1", "gpt_neox.layers.0.mlp",
              "gpt_neox.layers.1.attention.dense", "gpt_neox.embed_in",
              "gpt_neox.final_layer_norm", "lm_head")  # fmt: skip
    for place in places:
        for kind in ("register_forward_hook", "register_forward_pre_hook"):
            models, calls = pair(7, fusion), ([], [])
            answers(models[0])
            before = picture(models[0])
            removals = []
            for model, seen in zip(models, calls):

                def hook(module, args, *output, seen=seen):
                    seen.append(type(module))
                    if output and isinstance(output[0], torch.Tensor):
                        return 1.5 * output[0]

                removals.append(getattr(model.get_submodule(place), kind)(hook))
            assert_same(answers(models[0]), answers(models[1]), f"{fusion}: {kind} on {place!r}")
            assert calls[0] == calls[1] and calls[0], (
                f"{fusion}: {kind} on {place!r} ran {len(calls[0])} times"
            )
            removals[0].remove()
            counters = hf_fusion.stats(models[0])
            counters.clear()
            answers(models[0])
            assert counters.fused and not counters.refused, "refused after the hook is gone"
            assert picture(models[0]) == before
            trials()


def test_hooks_for_captured_outputs_do_not_end_fusion():
    model, stock = pair(8)
    for m in (model, stock):
        with torch.no_grad():
            m(tokens(1), output_hidden_states=True, output_attentions=True)
    counters = hf_fusion.stats(model)
    counters.clear()
    assert_same(answers(model), answers(stock))
    assert counters.fused == 3 and not counters.refused and not counters.downgraded


def test_hooks_of_accelerate_come_and_go():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Halve(ModelHook):
        def post_forward(self, module, output):
            if isinstance(output, torch.Tensor):
                return 0.5 * output
            output.logits = 0.5 * output.logits
            return output

    for place in ("", "gpt_neox.layers.0", "gpt_neox.layers.1.mlp"):
        for first in ("hook", "patch"):
            model, stock = pair(9, None)
            before = picture(model)
            if first == "patch":
                hf_fusion.patch(model)
                answers(model)
            add_hook_to_module(model.get_submodule(place), Halve())
            add_hook_to_module(stock.get_submodule(place), Halve())
            if first == "hook":
                hf_fusion.patch(model)
            what = f"hook on {place!r}, {first} first"
            assert_same(answers(model), answers(stock), what)
            hf_fusion.unpatch(model)
            assert_same(answers(model), answers(stock), f"{what}, unpatched")
            remove_hook_from_module(model.get_submodule(place))
            remove_hook_from_module(stock.get_submodule(place))
            assert_same(answers(model), answers(stock), f"{what}, removed")
            hf_fusion.patch(model)
            assert_same(answers(model), answers(stock), f"{what}, patched again")
            assert noted(model).fused, what
            hf_fusion.unpatch(model)
            # accelerate itself leaves an instance forward behind
            assert [s[:2] for s in picture(model)] == [s[:2] for s in before]
            assert not any("_hf_fusion" in vars(m) for m in model.modules())


@pytest.mark.parametrize("cls", (GPTNeoXModel, GPTNeoXForSequenceClassification))
@pytest.mark.parametrize("fusion", RUNGS)
def test_bare_models_and_other_heads(cls, fusion):
    stock = build("gpt_neox", {"num_labels": 3, "pad_token_id": 0}, "fp32", "sdpa", 1, cls)
    model = copy.deepcopy(stock)
    report = hf_fusion.patch(model, fusion)
    assert report.family == "gpt_neox" and report.fused_layers == 2
    with torch.no_grad():
        for length in (4, 30):
            assert_same(
                model(tokens(0, 2, length))[0],
                stock(tokens(0, 2, length))[0],
                f"{cls.__name__} {fusion}",
            )
    assert noted(model).fused


def test_a_report_says_what_runs():
    model, _ = pair(0, None)
    for fusion in FUSIONS:
        for backend in ("auto", "cpu", "reference"):
            report = hf_fusion.patch(model, fusion, backend)
            written = json.loads(json.dumps(report.to_dict()))
            assert written["fused_layers"] == len(written["layers"]) == 2
            assert written["packed_bytes"] == 0 and written["family"] == "gpt_neox"
            assert fusion in str(report) and "gpt_neox.layers.1" in str(report)
            kernels = {layer["kernel"] for layer in written["layers"]}
            assert (kernels == {None}) == (fusion == "none")


def test_supported_names_every_family_fusion_and_back_end():
    rows = hf_fusion.supported().to_dict()
    assert {(r["family"], r["fusion"], r["backend"]) for r in rows} == {
        (family, fusion, backend)
        for family in (*FAMILIES, *ENCODERS)
        for fusion in FUSIONS
        for backend in BACKENDS[1:]
    }
    for row in rows:
        assert row["status"] == "yes" or row["status"].startswith("no: "), row
    cuda = {row["status"] for row in rows if row["backend"] == "cuda"}
    if cuda == {"yes"}:
        assert native.describe_device("cuda").arch >= 800
        return
    model, _ = pair(0, None)
    with pytest.raises(FusionError) as caught:
        hf_fusion.patch(model, backend="cuda")
    assert caught.value.reason is Reason.BACKEND_ABSENT and cuda == {f"no: {caught.value.message}"}
    with pytest.raises(FusionError) as asked:
        native.describe_device("cuda")
    assert asked.value.message == caught.value.message, "not the library's own sentence"


def test_a_cache_outlives_the_patch(trials):
    """The cache of a patched model serves a stock one, and the other way round."""
    for fusion in RUNGS:
        for start, end in ((0, 1), (1, 0)):
            models = pair(10, fusion)
            cache, twin = (DynamicCache(config=models[0].config) for _ in range(2))
            with torch.no_grad():
                models[start](tokens(1, 2, 6), past_key_values=cache)
                models[1](tokens(1, 2, 6), past_key_values=twin)
                copied = copy.deepcopy(cache)
                for used in (cache, copied):
                    got = models[end](tokens(2, 2, 1), past_key_values=used).logits
                    want = models[1](tokens(2, 2, 1), past_key_values=copy.deepcopy(twin)).logits
                    assert_same(got, want, f"{fusion}, {start} to {end}")
                    assert used.get_seq_length() == 7
                    trials()


def test_a_wrong_option_is_named_and_changes_nothing():
    model, _ = pair(0, None)
    before = picture(model)
    for options, value in (
        ({"fusion": "everything"}, "everything"),
        ({"fusion": None}, "None"),
        ({"fusion": 3}, "3"),
        ({"backend": "tpu"}, "tpu"),
        ({"backend": ""}, "''"),
    ):
        for call in (hf_fusion.patch, lambda m, **o: hf_fusion.patched(m, **o).__enter__()):
            with pytest.raises(FusionError, match=value) as caught:
                call(model, **options)
            assert "expected" in str(caught.value) and isinstance(caught.value.reason, Reason)
            assert picture(model) == before
    hf_fusion.patch(model)
    with pytest.raises(FusionError):
        hf_fusion.patch(model, "everything")
    answers(model)
    assert hf_fusion.stats(model).fused == 3, "a failed patch has taken the one before away"
