"""Models and inputs that no kernel takes: stock's result, or stock's error, and a counted reason;
or a FusionError.
"""

from __future__ import annotations

import copy

import pytest
import torch
from edits import EDITS
from pairs import RUNGS, answers, assert_same, noted, pair, tokens
from test_patching import picture
from torch import nn
from transformers import DynamicCache, ElectraConfig, ElectraModel, GPT2Config, GPT2LMHeadModel

import hf_fusion
from hf_fusion import FusionError
from hf_fusion.report import Reason

pytestmark = [
    pytest.mark.reliability(10, "bad models and input"),
    pytest.mark.usefixtures("one_thread"),
]


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=99)).eval()


def electra() -> nn.Module:
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    return ElectraModel(ElectraConfig(vocab_size=99, **sizes)).eval()


@pytest.mark.parametrize("make", (gpt2, electra, lambda: nn.Linear(3, 3), lambda: nn.Sequential()))
def test_an_unknown_model_is_reported_and_left_alone(make):
    model = make()
    before = picture(model)
    report = hf_fusion.patch(model)
    assert report.reason is Reason.UNKNOWN_FAMILY and report.family is None and not report.layers
    assert type(model).__name__ in str(report) and "gpt_neox" in str(report)
    assert picture(model) == before
    with pytest.raises(FusionError, match="expected one of: .*gpt_neox") as caught:
        hf_fusion.patch(model, strict=True)
    assert caught.value.reason is Reason.UNKNOWN_FAMILY and picture(model) == before
    hf_fusion.unpatch(model)


@pytest.mark.parametrize("thing", (None, 3, "model", [], GPT2LMHeadModel))
def test_something_that_is_no_model(thing):
    with pytest.raises(FusionError, match="expected a torch.nn.Module") as caught:
        hf_fusion.patch(thing)
    assert caught.value.reason is Reason.NOT_A_MODEL


def shard(model):
    """As accelerate leaves a model that is spread over devices."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(model.gpt_neox.layers[1], AlignDevicesHook("cpu", io_same_device=True))
    model.hf_device_map = {"gpt_neox.layers.0": "cpu", "gpt_neox.layers.1": "disk"}


def offload(model):
    from accelerate import cpu_offload

    cpu_offload(model, "cpu")


def mixed(model):
    """Norms in fp32 in a bf16 model, as some fine-tuned checkpoints have them; stock raises."""
    model.to(torch.bfloat16)
    model.gpt_neox.layers[0].input_layernorm.float()


def nan(model):
    with torch.no_grad():
        model.gpt_neox.layers[0].mlp.dense_4h_to_h.weight[1, 2] = float("nan")


def infinite(model):
    with torch.no_grad():
        model.gpt_neox.layers[1].attention.dense.bias[3] = float("inf")


def strided(model):
    weight = model.gpt_neox.layers[0].attention.dense.weight
    weight.data = weight.data.t().contiguous().t()


def frozen_subclass(model):
    class Marked(nn.Parameter):
        pass

    layer = model.gpt_neox.layers[0].attention.dense
    layer.weight = Marked(layer.weight.detach().clone())


def wrong_shape(model):
    """MLP up and down of another width are fine; a norm that broadcasts over one element is not
    what a block is.
    """
    model.gpt_neox.layers[0].input_layernorm.weight = nn.Parameter(torch.ones(1))


def dynamic_rope(model):
    model.gpt_neox.rotary_emb.rope_type = "dynamic"


MODELS = {
    "training": (lambda m: m.train(), {Reason.TRAINING}),
    "training of a part": (lambda m: m.gpt_neox.layers[1].train(), {Reason.TRAINING}),
    "sharded": (shard, {Reason.HOOKS, Reason.FORWARD_REPLACED}),
    "offloaded": (offload, {Reason.HOOKS, Reason.FORWARD_REPLACED, Reason.META}),
    "mixed dtypes": (mixed, {Reason.MIXED_DTYPE}),
    "nan": (nan, set()),
    "inf": (infinite, set()),
    "strided": (strided, {Reason.LAYOUT}),
    "tensor subclass": (frozen_subclass, {Reason.TENSOR_TYPE}),
    "wrong shape": (wrong_shape, {Reason.SHAPE}),
    "fp64": (lambda m: m.double(), {Reason.DTYPE}),
    "quantised": (lambda m: EDITS["quantised"].apply(m, 0), {Reason.MODULE_TYPE}),
    "lora": (lambda m: EDITS["lora_add"].apply(m, 0), {Reason.MODULE_TYPE}),
    "no layers": (lambda m: setattr(m.gpt_neox, "layers", nn.ModuleList()), {Reason.STRUCTURE}),
    "layer missing": (lambda m: m.gpt_neox.layers.__delitem__(1), set()),
    "extra child": (lambda m: m.gpt_neox.layers[0].add_module("more", nn.Identity()),
                    {Reason.STRUCTURE}),
    "dynamic rope": (dynamic_rope, {Reason.ROPE}),
    "flex attention": (lambda m: setattr(m.config, "_attn_implementation_internal", "no_such"), {
        Reason.ATTENTION_IMPLEMENTATION}),
}  # fmt: skip


def outcome(call):
    """The result of a call, or the exception it ends in."""
    try:
        return call()
    except FusionError as error:
        raise AssertionError(f"a FusionError reached the caller: {error}") from error
    except Exception as error:
        return error


def assert_same_outcome(got, want, what: str) -> None:
    """Equal answers, or errors of one type with one text."""
    if isinstance(want, Exception) or isinstance(got, Exception):
        assert type(got) is type(want) and str(got) == str(want), (
            f"{what}: {got!r}, stock: {want!r}"
        )
    else:
        assert_same(got, want, what)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fusion", RUNGS)
def test_a_model_that_no_kernel_takes(name, fusion, trials):
    change, reasons = MODELS[name]
    for order in ("patched first", "changed first"):
        model, stock = pair(3, None)
        if order == "patched first":
            hf_fusion.patch(model, fusion)
            answers(model)
        change(model), change(stock)
        if order == "changed first":
            hf_fusion.patch(model, fusion)
        what = f"{name}, {fusion}, {order}"
        torch.manual_seed(0)
        want = outcome(lambda: answers(stock))
        torch.manual_seed(0)
        got = outcome(lambda: answers(model))
        assert_same_outcome(got, want, what)
        counters = noted(model)
        seen = set(counters.refused) | set(counters.downgraded)
        assert seen <= {reason.value for reason in reasons}, f"{what}\n{counters}"
        # what only the whole model shows, the layers do not; a child that no forward calls may be
        # added later
        assert seen or not reasons or fusion != "full" or what.startswith("extra child"), (
            f"{what}\n{counters}"
        )
        hf_fusion.unpatch(model)
        assert not any("_hf_fusion" in vars(m) for m in model.modules())
        trials()


def model_inputs(config) -> dict[str, tuple[dict, set]]:
    """Arguments of one forward, and what may be refused; stock may well raise."""
    ids, cache = tokens(0, 2, 6), lambda: DynamicCache(config=config)
    full = DynamicCache(config=config)
    wrong_batch = DynamicCache(config=config)
    for index in range(2):
        full.update(torch.zeros(2, 4, 3, 9), torch.zeros(2, 4, 3, 9), index)
        wrong_batch.update(torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8), index)
    noise = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    later = torch.zeros(2, 1, 6, 6)
    return {
        "no tokens": ({"input_ids": ids[:, :0]}, {Reason.EMPTY_INPUT}),
        "no rows": ({"input_ids": ids[:0]}, {Reason.EMPTY_INPUT}),
        "one dimension": ({"input_ids": ids[0]}, {Reason.INPUT}),
        "floats": ({"input_ids": ids.float()}, {Reason.INPUT}),
        "int32": ({"input_ids": ids.int()}, set()),
        "a list": ({"input_ids": [[1, 2]]}, {Reason.TENSOR_TYPE}),
        "nothing": ({}, {Reason.INPUT}),
        "both": ({"input_ids": ids, "inputs_embeds": noise}, {Reason.INPUT}),
        "token too large": ({"input_ids": ids + 99}, {Reason.OUT_OF_RANGE}),
        "token below zero": ({"input_ids": ids - 99}, {Reason.OUT_OF_RANGE}),
        "token too large in a prefill": ({"input_ids": tokens(0, 2, 30) + 99},
                                         {Reason.OUT_OF_RANGE}),
        "mask too short": ({"input_ids": ids, "attention_mask": ids[:, :4] * 0 + 1}, {Reason.MASK}),
        "mask too long": ({"input_ids": ids, "attention_mask": torch.ones(2, 9)}, set()),
        "mask of other rows": ({"input_ids": ids, "attention_mask": torch.ones(3, 6)},
                               {Reason.MASK}),
        "mask of one dimension": ({"input_ids": ids, "attention_mask": torch.ones(6)},
                                  {Reason.MASK, Reason.INPUT}),
        "mask of three dimensions": ({"input_ids": ids, "attention_mask": torch.ones(2, 6, 6)},
                                     {Reason.INPUT}),
        "mask that looks ahead": ({"input_ids": ids, "attention_mask": later}, {Reason.MASK}),
        "mask a string": ({"input_ids": ids, "attention_mask": "ones"}, {Reason.TENSOR_TYPE}),
        "positions too short": ({"input_ids": ids, "position_ids": torch.arange(4)[None]},
                                {Reason.POSITIONS}),
        "positions below zero": ({"input_ids": ids, "position_ids": torch.arange(6)[None] - 3},
                                 {Reason.POSITIONS}),
        "positions of floats": ({"input_ids": ids, "position_ids": torch.arange(6.0)[None]},
                                {Reason.POSITIONS}),
        "positions far out": ({"input_ids": ids, "position_ids": torch.arange(6)[None] + 5000},
                              set()),
        "packed positions": ({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
                              "use_cache": False}, {Reason.PACKED}),
        "embeds too narrow": ({"inputs_embeds": noise[..., :8]}, {Reason.SHAPE}),
        "embeds in another dtype": ({"inputs_embeds": noise.double()}, {Reason.MIXED_DTYPE}),
        "nan embeds": ({"inputs_embeds": noise * float("nan")}, set()),
        "keep below zero": ({"input_ids": ids, "logits_to_keep": -2}, {Reason.ARGUMENT}),
        "keep a tensor": ({"input_ids": ids, "logits_to_keep": torch.tensor([0, 2])},
                          {Reason.ARGUMENT}),
        "keep too many": ({"input_ids": ids, "logits_to_keep": 50}, set()),
        "cache of another head size": ({"input_ids": ids, "past_key_values": full},
                                       {Reason.CACHE_STATE}),
        "cache of other rows": ({"input_ids": ids, "past_key_values": wrong_batch},
                                {Reason.CACHE_STATE}),
        "cache a tuple": ({"input_ids": ids, "past_key_values": ((noise, noise),) * 2},
                          {Reason.CACHE_TYPE}),
        "cache a number": ({"input_ids": ids, "past_key_values": 5}, {Reason.CACHE_TYPE}),
        "unknown argument": ({"input_ids": ids, "no_such_argument": 1}, {Reason.ARGUMENT}),
        "a tuple asked for": ({"input_ids": ids, "return_dict": False}, {Reason.RETURN_TUPLE}),
        "attentions asked for": ({"input_ids": ids, "output_attentions": True}, {Reason.OUTPUTS}),
        "labels of another shape": ({"input_ids": ids, "labels": ids[:, :2]}, {Reason.LABELS}),
        "sparse ids": ({"input_ids": ids.to_sparse()}, {Reason.INPUT}),
        "not causal": ({"input_ids": ids, "is_causal": False}, {Reason.NOT_CAUSAL}),
        "cache position": ({"input_ids": ids, "past_key_values": cache(),
                            "cache_position": torch.arange(3)},
                           {Reason.POSITIONS, Reason.ARGUMENT}),
    }  # fmt: skip


@pytest.mark.parametrize("fusion", RUNGS)
def test_input_that_no_kernel_takes(fusion, trials):
    model, stock = pair(4, fusion)
    before = picture(model)
    for name in model_inputs(model.config):
        call, reasons = model_inputs(model.config)[name]
        twin = copy.deepcopy(call)
        what = f"{name}, {fusion}"

        def run(m, arguments):
            with torch.no_grad():
                out = m(**arguments)
            return out[0] if isinstance(out, tuple) else out.logits

        counters = hf_fusion.stats(model)
        counters.clear()
        got, want = outcome(lambda: run(model, call)), outcome(lambda: run(stock, twin))
        assert_same_outcome(got, want, what)
        counters = noted(model)
        seen = set(counters.refused) | set(counters.downgraded)
        if fusion == "full":
            expected = {reason.value for reason in reasons}
            assert (seen <= expected and seen) if expected else not seen, f"{what}\n{counters}"
        used = call.get("past_key_values")
        if isinstance(used, DynamicCache) and not isinstance(want, Exception):
            assert used.get_seq_length() == twin["past_key_values"].get_seq_length(), what
        counters.clear()
        assert_same(answers(model), answers(stock), f"after {what}")
        assert counters.fused and not counters.refused, f"after {what}\n{counters}"
        trials()
    # the first forward that asks for attentions leaves transformers' own hooks; nothing else may
    # differ
    hf_fusion.unpatch(model)
    assert [s[:2] for s in picture(model) if isinstance(s[1], type)] == [
        s[:2] for s in before if isinstance(s[1], type)
    ]


@pytest.mark.parametrize("fusion", RUNGS)
@pytest.mark.parametrize("how", ("argument", "environment"))
def test_strict_raises_where_the_default_would_run_stock(fusion, how, monkeypatch):
    model, stock = pair(5, None)
    if how == "environment":
        monkeypatch.setenv("HF_FUSION_STRICT", "1")
    hf_fusion.patch(model, fusion, strict=how == "argument")
    assert_same(answers(model), answers(stock), "what runs fused runs")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(0), past_key_values=cache)
        handle = model.gpt_neox.layers[1].mlp.register_forward_hook(lambda *args: None)
        with pytest.raises(FusionError) as caught:
            model(tokens(1, 1, 1), past_key_values=cache)
        assert caught.value.reason is Reason.HOOKS
        handle.remove()
    with pytest.raises(FusionError) as caught:
        model(tokens(0))
    assert caught.value.reason is Reason.GRADIENTS
    model.train()
    with pytest.raises(FusionError), torch.no_grad():
        model(tokens(0))
    model.eval()
    assert_same(answers(model), answers(stock), "afterwards")
    assert not noted(model).refused


def test_strict_refuses_a_structure_before_anything_is_patched():
    for name in ("lora", "quantised", "strided", "tensor subclass", "wrong shape", "extra child"):
        model, _ = pair(6, None)
        model = MODELS[name][0](model) or model
        before = picture(model)
        with pytest.raises(FusionError) as caught:
            hf_fusion.patch(model, strict=True)
        assert caught.value.reason in MODELS[name][1], name
        assert picture(model) == before, name


def test_a_patch_that_fails_half_way_leaves_nothing(monkeypatch, trials):
    """The k-th forward to be installed raises, for every k."""
    from hf_fusion import patching

    install, reached = patching._install_one, 99
    for k in range(1, 99):
        model, stock = pair(7, None)
        before, count = picture(model), [0]

        def failing(*args):
            count[0] += 1
            if count[0] == k:
                raise KeyboardInterrupt
            return install(*args)

        monkeypatch.setattr(patching, "_install_one", failing)
        try:
            hf_fusion.patch(model)
        except KeyboardInterrupt:
            assert picture(model) == before, f"interrupted at installation {k}"
            assert_same(answers(model), answers(stock))
            trials()
        else:
            reached = k
            break
        finally:
            monkeypatch.setattr(patching, "_install_one", install)
    assert reached == 5, "two layers, a base model and a head"
