"""What others have put in place of the model's own parts is run or refused, never passed over."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.autograd import forward_ad
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GenerationMixin,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    StaticCache,
    ViTConfig,
    ViTModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox import modeling_gpt_neox

import hf_fusion
from hf_fusion.report import FusionError, Reason

pytestmark = [pytest.mark.usefixtures("one_thread")]

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37,
}  # fmt: skip
IDS = torch.arange(18).reshape(2, 9) * 5 + 3
CAUSAL = torch.ones(9, 9).tril().bool()[None, None]


def neox(attention: str = "sdpa"):
    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=99, pad_token_id=1, eos_token_id=2, **SIZES)
    config._attn_implementation = attention
    return GPTNeoXForCausalLM(config).eval()


def bert(attention: str = "sdpa", cls=BertModel):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=99, **SIZES)
    config._attn_implementation = attention
    return cls(config).eval()


def both(model) -> tuple:
    """(patched, stock)."""
    stock = copy.deepcopy(model)
    hf_fusion.patch(model)
    return model, stock


def own_forward(model, monkeypatch):
    layer = model.gpt_neox.layers[0]
    original = layer.forward
    layer.forward = lambda x, *args, **kwargs: -original(x, *args, **kwargs)
    add_hook_to_module(layer, ModelHook())


def mask_function(model, monkeypatch):
    monkeypatch.setattr(modeling_gpt_neox, "create_causal_mask", lambda **kwargs: ~CAUSAL | CAUSAL)


def registered_mask(model, monkeypatch):
    registered = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    diagonal = CAUSAL & CAUSAL.transpose(-1, -2)
    monkeypatch.setitem(registered, "sdpa", lambda *args, **kwargs: diagonal)


def sdpa(model, monkeypatch):
    original = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, *args, **kwargs: -original(q, k, v, *args, **kwargs),
    )


@pytest.mark.parametrize("replace", (own_forward, mask_function, registered_mask, sdpa))
def test_a_replaced_part_is_what_runs(replace, monkeypatch):
    """Replaced before the patch, and between two calls of a patched model."""
    with torch.no_grad():
        later, plain = both(neox())
        before = later(IDS).logits
        model = neox()
        if replace is own_forward:
            replace(model, monkeypatch)
        else:
            replace(None, monkeypatch)
            assert torch.equal(later(IDS).logits, plain(IDS).logits)
        want = model(IDS).logits
        hf_fusion.patch(model)
        assert torch.allclose(model(IDS).logits, want, atol=1e-5)
    assert not torch.allclose(want, before, atol=1e-3)
    stats = hf_fusion.stats(model)
    assert str(Reason.FORWARD_REPLACED) in stats.refused | stats.downgraded


def test_a_bias_of_repeated_elements_is_seen():
    with torch.no_grad():
        model, stock = both(neox())
        model(IDS)
        for one in (model, stock):
            bias = one.gpt_neox.layers[0].mlp.dense_h_to_4h.bias
            bias.fill_(0.5)
            bias.data = bias.data[:1].expand(37)
        assert torch.allclose(model(IDS).logits, stock(IDS).logits, atol=1e-5)
    assert str(Reason.LAYOUT) in hf_fusion.stats(model).downgraded


@pytest.mark.parametrize(
    "make, layers",
    [(neox, lambda m: m.gpt_neox.layers), (bert, lambda m: m.encoder.layer),
     (lambda: ViTModel(ViTConfig(image_size=12, patch_size=4, **SIZES)).eval(),
      lambda m: m.layers)],
    ids=["gpt_neox", "bert", "vit"],
)  # fmt: skip
@torch.no_grad()
def test_a_layer_added_between_two_calls_runs(make, layers):
    model, stock = both(make())
    vision = model.main_input_name == "pixel_values"
    call = {"pixel_values": torch.randn(2, 3, 12, 12)} if vision else {"input_ids": IDS}
    call |= {} if vision else {"use_cache": False}
    before = model(**call)[0]
    assert torch.allclose(before, stock(**call)[0], atol=1e-5)
    added = copy.deepcopy(layers(stock)[0])
    for one in (model, stock):
        layers(one).append(added)
    want = stock(**call)[0]
    assert torch.allclose(model(**call)[0], want, atol=1e-5)
    assert not torch.allclose(want, before, atol=1e-3)
    assert hf_fusion.stats(model).downgraded == {str(Reason.FORWARD_REPLACED): 1}


@pytest.mark.parametrize("make", (neox, bert))
@torch.no_grad()
def test_a_hook_on_every_module_runs_stock(make):
    def louder(module, inputs, output):
        return output * 1.5 if type(module) is nn.Linear else None

    def squared(module, inputs):
        return (inputs[0].square(),) if type(module) is nn.LayerNorm else None

    model, stock = both(make())
    before = model(IDS)[0]
    for register, hook in (
        (nn.modules.module.register_module_forward_hook, louder),
        (nn.modules.module.register_module_forward_pre_hook, squared),
    ):
        hf_fusion.stats(model).clear()
        handle = register(hook)
        try:
            got, want = model(IDS)[0], stock(IDS)[0]
        finally:
            handle.remove()
        assert torch.equal(got, want) and not torch.allclose(got, before, atol=1e-3)
        assert hf_fusion.stats(model).refused == {str(Reason.HOOKS): 1}
    assert torch.equal(model(IDS)[0], before)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_a_head_with_a_bias(backend):
    """GPT-NeoX has none; whoever puts one in gets it, from row kernels and from matrix kernels."""
    model = neox()
    model.lm_head = nn.Linear(32, 99)
    nn.init.normal_(model.lm_head.bias)
    stock = copy.deepcopy(model)
    hf_fusion.patch(model, backend=backend)
    long = IDS.repeat(1, 5)
    with torch.no_grad():
        for ids, keep in ((IDS, 1), (long, 1), (long, 0)):
            got = model(ids, logits_to_keep=keep).logits
            assert torch.allclose(got, stock(ids, logits_to_keep=keep).logits, atol=1e-5)
    stats = hf_fusion.stats(model)
    assert stats.fused == 3 and not stats.refused and not stats.downgraded


@pytest.mark.parametrize("fusion", ("full", "attention"))
def test_a_mask_edited_behind_torchs_back_is_read_again(fusion):
    mask = torch.where(CAUSAL, 0.0, torch.finfo(torch.float32).min).expand(2, -1, -1, -1).clone()
    model, stock = neox(), neox()
    hf_fusion.patch(model, fusion)
    with torch.no_grad():
        for edit in (False, True):
            if edit:
                mask.numpy()[...] = 0
            got = model(IDS, attention_mask=mask).logits
            assert torch.allclose(got, stock(IDS, attention_mask=mask).logits, atol=1e-5)
            assert bool(hf_fusion.stats(model).refused) == edit


def test_a_query_that_sees_nothing_and_is_seen_runs_stock():
    """An additive mask of the lowest numbers means the mean of all values to stock."""
    lowest = torch.finfo(torch.float32).min
    mask = torch.where(torch.ones(9, 9).tril(-1).bool(), 0.0, lowest).expand(2, 1, 9, 9)
    with torch.no_grad():
        for make, run in ((neox, lambda m: m(IDS, attention_mask=mask)[0]),
                          (bert, lambda m: m(IDS, attention_mask=mask)[0])):  # fmt: skip
            model, stock = both(make())
            assert torch.allclose(run(model), run(stock), atol=1e-5)
            assert hf_fusion.stats(model).fused == 0


def test_a_mask_narrower_than_a_static_cache_is_stocks_error():
    model, stock = both(neox())
    mask = torch.zeros(2, 1, 1, 4)
    for one in (model, stock):
        cache = StaticCache(config=one.config, max_cache_len=20)
        with torch.no_grad(), pytest.raises(RuntimeError, match="size"):
            one(IDS[:, :3], past_key_values=cache)
            one(IDS[:, 3:4], past_key_values=cache, attention_mask=mask)


@pytest.mark.parametrize("make", (neox, bert))
def test_forward_mode_differentiation_runs_stock(make):
    model, stock = both(make("eager"))
    x, tangent = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    found = []
    with torch.no_grad(), forward_ad.dual_level():
        for one in (model, stock):
            out = one(inputs_embeds=forward_ad.make_dual(x.clone(), tangent.clone()))[0]
            found.append(forward_ad.unpack_dual(out).tangent)
    assert torch.equal(*found)
    assert hf_fusion.stats(model).refused == {str(Reason.GRADIENTS): 1}


def test_question_answering_scores_padding_as_stock():
    """Its softmax, and so its loss, runs over all positions."""
    model, stock = both(bert(cls=BertForQuestionAnswering))
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 0
    call = {"attention_mask": mask, "start_positions": torch.tensor([1, 2])}
    call["end_positions"] = torch.tensor([3, 3])
    with torch.no_grad():
        got, want = model(IDS, **call), stock(IDS, **call)
    for name in ("loss", "start_logits", "end_logits"):
        assert torch.allclose(got[name], want[name], atol=1e-5), name
    assert hf_fusion.stats(model).fused == 1


def dual():
    torch.manual_seed(0)
    vision = ViTConfig(image_size=30, patch_size=6, **SIZES)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, BertConfig(vocab_size=99, **SIZES), projection_dim=16
    )
    return VisionTextDualEncoderModel(config).eval()


def test_a_second_family_in_the_model_is_reported():
    model = dual()
    report = hf_fusion.patch(model)
    reasons = [layer.reason for layer in report.layers]
    assert reasons == [None, None, Reason.OTHER_FAMILY] and "BertModel" in str(report)
    with pytest.raises(FusionError, match="of another family"):
        hf_fusion.patch(model, strict=True)


def test_patched_restores_the_patches_of_parts():
    model = dual()
    hf_fusion.patch(model)
    hf_fusion.patch(model.text_model, "attention")
    before = hf_fusion.stats(model), hf_fusion.stats(model.text_model)
    with hf_fusion.patched(model, "attention+up"), torch.no_grad():
        model.get_text_features(IDS), model.get_image_features(torch.randn(1, 3, 30, 30))
    with torch.no_grad():
        model.get_text_features(IDS), model.get_image_features(torch.randn(1, 3, 30, 30))
    assert (hf_fusion.stats(model), hf_fusion.stats(model.text_model)) == before
    assert before[0].calls["encode"] == 1 and before[1].calls["layer"] == 2
    model = neox()
    hf_fusion.patch(model, "attention")
    hf_fusion.patch(model.gpt_neox)
    before = hf_fusion.stats(model), hf_fusion.stats(model.gpt_neox)
    with hf_fusion.patched(model):
        pass
    with torch.no_grad():
        model(IDS)
    assert (hf_fusion.stats(model), hf_fusion.stats(model.gpt_neox)) == before
    assert not before[0].fused and before[1].calls["step"] + before[1].calls["prefill"] == 1


def test_a_report_says_stock_of_what_runs_stock():
    torch.manual_seed(0)
    parts = (BertConfig(vocab_size=99, **SIZES) for _ in range(2))
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    model = EncoderDecoderModel(config=config).eval()
    report = hf_fusion.patch(model)
    assert report.reason is Reason.NOT_ENCODER and report.fused_layers == 2
    assert "runs stock" not in str(report) and "not in one call: not an encoder" in str(report)
    with torch.no_grad():
        model(IDS, decoder_input_ids=IDS)
    assert hf_fusion.stats(model).calls["encode"] == 1
    assert "runs stock: not an encoder" in str(hf_fusion.patch(model.decoder))


def test_a_layer_of_a_subclass_is_reported():
    class Layer(modeling_gpt_neox.GPTNeoXLayer):
        pass

    model = neox()
    model.gpt_neox.layers[1].__class__ = Layer
    report = hf_fusion.patch(model)
    assert [layer.reason for layer in report.layers] == [None, Reason.MODULE_TYPE]
    with pytest.raises(FusionError, match="layer 1: the layer is a .*Layer, expected"):
        hf_fusion.patch(model, strict=True)


def prepared(model):
    """generate() with another way from its state to a call."""
    original = model.prepare_inputs_for_generation

    def reversed_mask(*args, **kwargs):
        call = original(*args, **kwargs)
        call["input_ids"] = call["input_ids"] // 2
        return call

    model.prepare_inputs_for_generation = reversed_mask


def test_custom_generate_leaves_other_calls_to_generate():
    model = neox()
    prepared(model)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    want = model.generate(IDS, **options)
    hf_fusion.patch(model)
    got = model.generate(IDS, custom_generate=hf_fusion.custom_generate, **options)
    assert torch.equal(got, want)
    assert hf_fusion.stats(model).downgraded == {str(Reason.ARGUMENT): 1}
    del model.prepare_inputs_for_generation
    own = GenerationMixin.prepare_inputs_for_generation
    assert type(model).prepare_inputs_for_generation is own


def test_positions_of_the_new_tokens_alone_are_generates_to_read():
    model, stock = both(neox())
    with torch.no_grad():
        for one in (model, stock):
            one.cache = one(IDS[:, :6], use_cache=True).past_key_values
    call = {"attention_mask": torch.ones_like(IDS), "position_ids": torch.arange(6, 9)[None]}
    options = {"max_new_tokens": 4, "do_sample": False} | call
    want = stock.generate(IDS, past_key_values=stock.cache, **options)
    options["custom_generate"] = hf_fusion.custom_generate
    assert torch.equal(model.generate(IDS, past_key_values=model.cache, **options), want)


def test_generate_takes_padding_at_the_right_as_generate_does():
    model, stock = both(neox())
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 1}
    want = stock.generate(IDS, do_sample=False, **options)
    assert torch.equal(hf_fusion.generate(model, IDS, **options), want)


def test_generate_refuses_what_it_does_not_apply():
    model = neox()
    model.generation_config.top_h = 0.1
    with pytest.raises(FusionError, match="top_h is 0.1"):
        hf_fusion.generate(model, IDS, max_new_tokens=1, do_sample=True)
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    learnt = peft.get_peft_model(neox(), config)
    with pytest.raises(FusionError, match="learnt prompts"):
        hf_fusion.generate(learnt, IDS, max_new_tokens=1)


def test_a_call_inside_another_leaves_its_structs_alone(monkeypatch):
    """As a signal handler or a finaliser makes it, between structs and native call."""
    from hf_fusion.frame import Frame

    model, stock = both(neox())
    other, inner, original = IDS[:, :5].flip(0), [], Frame.set_model_out

    def nested(self, *arguments):
        original(self, *arguments)
        if not inner:
            inner.append(None)
            inner[0] = model(other).logits

    with torch.no_grad():
        monkeypatch.setattr(Frame, "set_model_out", nested)
        got = model(IDS).logits
        monkeypatch.undo()
        assert torch.allclose(got, stock(IDS).logits, atol=1e-5)
        assert torch.allclose(inner[0], stock(other).logits, atol=1e-5)
    assert hf_fusion.stats(model).fused == 2
