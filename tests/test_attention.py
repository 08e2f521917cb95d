"""The attention kernels on tensors and as attention implementations of transformers: equal to eager
within the parity rule, or refused with a reason.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface

import hf_fusion
from hf_fusion import native
from hf_fusion.attend import KERNELS, attend, plan
from hf_fusion.attention import IMPLEMENTATIONS
from hf_fusion.report import FusionError, Reason

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMMON = dict(num_hidden_layers=2, vocab_size=99)  # noqa: C408
SMALL = dict(hidden_size=32, intermediate_size=37, **COMMON)  # noqa: C408


def config(name: str, **values):
    made = getattr(transformers, f"{name}Config")(**values)
    made._attn_implementation = "eager"
    return made


# model class, configuration; head sizes 8 and 16, groups of 1, 2 and all heads
MODELS = {
    "gpt_neox": ("GPTNeoXForCausalLM", config("GPTNeoX", num_attention_heads=4, **SMALL)),
    "llama": ("LlamaForCausalLM",
              config("Llama", num_attention_heads=4, num_key_value_heads=2, **SMALL)),
    "gpt_bigcode": ("GPTBigCodeForCausalLM",
                    config("GPTBigCode", n_embd=32, n_head=4, n_inner=37, n_layer=2, vocab_size=99,
                           multi_query=True)),
    "mistral": ("MistralForCausalLM",
                config("Mistral", num_attention_heads=4, num_key_value_heads=2, sliding_window=5,
                       **SMALL)),
    "bert": ("BertModel", config("Bert", num_attention_heads=2, **SMALL)),
    "vit": ("ViTModel",
            config("ViT", num_attention_heads=2, hidden_size=32, intermediate_size=37,
                   num_hidden_layers=2, image_size=24, patch_size=8)),
    "t5": ("T5ForConditionalGeneration",
           config("T5", d_model=32, d_kv=8, d_ff=37, num_heads=4, num_layers=2, vocab_size=99,
                  decoder_start_token_id=0)),
}  # fmt: skip
CAUSAL = ("gpt_neox", "llama", "gpt_bigcode", "mistral")


@pytest.fixture(autouse=True, scope="module")
def _registered():
    """The names are registered for this module's tests alone: others look at the registries."""
    before = [dict(kind._global_mapping) for kind in (AttentionInterface, AttentionMaskInterface)]
    hf_fusion.register_attention()
    yield
    for kind, kept in zip((AttentionInterface, AttentionMaskInterface), before):
        for name in set(kind._global_mapping) - set(kept):
            del kind._global_mapping[name]


@pytest.fixture(autouse=True)
def _quiet(one_thread):
    """Falling back warns; a test that does not expect it fails."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message="attention runs in transformers' sdpa")
        yield


def make(name: str, dtype=torch.float32):
    """The model of `MODELS` with random weights that make attention sharp enough to matter."""
    kind, settings = MODELS[name]
    torch.manual_seed(5)
    model = getattr(transformers, kind)(copy.deepcopy(settings)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.15)
    return model.to(dtype)


def inputs(name: str, dtype=torch.float32, padding: str = "none", tokens: int = 19) -> dict:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 24, 24).to(dtype)}
    ids = torch.randint(1, 99, (3, tokens))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for row, pad in enumerate((0, 3, 7) if padding != "none" else ()):
        where = slice(0, pad) if padding == "left" else slice(tokens - pad, tokens)
        given["attention_mask"][row, where] = 0
    if name == "t5":
        given["decoder_input_ids"] = torch.randint(1, 99, (3, 11))
    return given


def output(model, given: dict) -> torch.Tensor:
    out = model(**given)
    found = out.logits if "logits" in out else out.last_hidden_state
    mask = given.get("attention_mask")
    if mask is not None and mask.shape == found.shape[:2]:
        found = found.masked_fill(mask[..., None] == 0, 0)  # what padding gets is nobody's
    return found.double()


def assert_close(got, stock, exact, dtype) -> None:
    """The parity rule: at most twice stock's own error in this dtype and two steps of the dtype."""
    got, stock, exact = (tensor.double() for tensor in (got, stock, exact))
    step = torch.finfo(dtype).eps * exact.abs().max()
    error, allowed = (got - exact).abs().max(), 2 * (stock - exact).abs().max() + 2 * step
    assert torch.isfinite(got).all()
    assert error <= allowed, f"error {error:.3g} exceeds {allowed:.3g}"


# ---------------------------------------------------------------- on tensors


@pytest.mark.reliability(3, "layer and model parity")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_attend_equals_sdpa(kernel, dtype, trials):
    cases = [
        (1, 4, 4, 33, 33, 64, {"causal": True}),
        (2, 4, 2, 5, 70, 40, {}),
        (2, 6, 1, 1, 600, 80, {}),  # decode, one key head
        (1, 2, 2, 130, 257, 128, {"scale": 0.3}),
        (2, 3, 3, 9, 17, 8, {"mask": torch.rand(2, 1, 9, 17) > 0.4}),
        (2, 2, 2, 9, 17, 256, {"mask": torch.randn(2, 2, 9, 17).to(dtype)}),
    ]
    for batch, heads, kv_heads, queries, keys, dim, options in cases:
        q = torch.randn(batch, queries, heads, dim).transpose(1, 2).to(dtype)
        k, v = (torch.randn(batch, kv_heads, keys, dim).to(dtype) for _ in range(2))
        group = heads // kv_heads

        def stock(*tensors, options=options, group=group):
            tensors = (tensors[0], *(t.repeat_interleave(group, 1) for t in tensors[1:]))
            mask, like = options.get("mask"), tensors[0].dtype
            if mask is not None and mask.dtype != torch.bool:
                mask = mask.to(like)
            return torch.nn.functional.scaled_dot_product_attention(
                *tensors, attn_mask=mask, is_causal=options.get("causal", False),
                scale=options.get("scale"),
            ).transpose(1, 2)  # fmt: skip

        got = attend(q, k, v, kernel=kernel, **options)
        assert got.is_contiguous() and got.dtype == dtype
        assert_close(got, stock(q, k, v), stock(q.double(), k.double(), v.double()), dtype)
        trials()


def test_window_and_alignment_are_those_of_a_mask():
    q, k, v = torch.randn(1, 2, 7, 16), torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16)
    at, key = torch.arange(7)[:, None] + 13, torch.arange(20)[None, :]
    seen = (key <= at) & (key > at - 4)
    for kernel in KERNELS:
        windowed = attend(q, k, v, kernel=kernel, causal=True, window=4)
        masked = attend(q, k, v, kernel=kernel, mask=seen)
        assert torch.allclose(windowed, masked, atol=1e-6)


def test_rows_that_see_nothing_are_zero_and_nan_behind_a_mask_stays_there():
    q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    seen = torch.rand(9, 9) > 0.3
    seen[4], seen[:, 6] = False, False
    k[:, :, 6], v[:, :, 6] = float("nan"), float("inf")
    for kernel in KERNELS:
        out = attend(q, k, v, kernel=kernel, mask=seen)
        assert torch.isfinite(out).all() and (out[:, 4] == 0).all()
        assert (out[:, [0, 1, 2, 3, 5]] != 0).any(-1).all()


def test_plan_tells_blocks_and_memory():
    q = torch.randn(1, 12, 2048, 64)
    naive, flash = (plan(q, q, q, kernel=kernel).extra_bytes for kernel in ("naive", "flash"))
    assert naive >= 12 * 2048 * 2048 * 4 and flash <= naive / 16
    assert plan(q, q, q, kernel="tiled", blocks=(16, 64))[:2] == (16, 64)
    twice = torch.randn(1, 12, 4096, 64)
    assert plan(twice, twice, twice, kernel="flash").extra_bytes == flash  # of the length free


REFUSED = {
    "kernel": (Reason.ARGUMENT, {"kernel": "fast"}),
    "mask dtype": (Reason.MASK, {"mask": torch.zeros(3, 3, dtype=torch.float16)}),
    "mask shape": (Reason.MASK, {"mask": torch.zeros(3, 4)}),
    "window": (Reason.INVALID, {"window": 3}),
    "blocks": (Reason.INVALID, {"blocks": (-1, 0)}),
    "scale": (Reason.INVALID, {"scale": float("nan")}),
}


@pytest.mark.parametrize(("reason", "options"), REFUSED.values(), ids=REFUSED)
def test_attend_refuses_options(reason, options):
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(FusionError) as refused:
        attend(q, q, q, **options)
    assert refused.value.reason is reason


def test_attend_refuses_tensors():
    q = torch.randn(1, 2, 3, 8)
    for others, reason in (
        ((q, q.half(), q), Reason.MIXED_DTYPE),
        ((q.double(),) * 3, Reason.DTYPE),
        ((q, q[:, :, :, :4], q), Reason.SHAPE),
        ((q, q.repeat(1, 2, 1, 1), q.repeat(1, 2, 1, 1)), Reason.SHAPE),
        ((q.to("meta"),) * 3, Reason.DEVICE),
        ((q[:0],) * 3, Reason.EMPTY_INPUT),
        ((torch.randn(1, 1, 2, 300),) * 3, Reason.UNSUPPORTED),
    ):
        with pytest.raises(FusionError) as refused:
            attend(*others)
        assert refused.value.reason is reason


# ---------------------------------------------------------------- under transformers


def all_three(name, dtype, given, run):
    """What each implementation gives, stock eager in `dtype`, and stock in fp64."""
    exact_given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    precise = make(name, torch.float64)
    precise.set_attn_implementation("sdpa")  # eager takes fp64's lowest number through fp32: -inf
    exact = run(precise, exact_given)
    stock = run(make(name, dtype), given)
    for implementation, kernel in IMPLEMENTATIONS.items():
        model = make(name, dtype)
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        got = run(model, given)
        counted = hf_fusion.attention_stats(model)
        assert counted.calls[kernel] > 0 and not counted.refused, str(counted)
        yield got, stock, exact


@pytest.mark.reliability(3, "layer and model parity")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "padding"),
    [
        (name, padding)
        for name in MODELS
        for padding in (("none",) if name == "vit" else ("none", "left", "right"))
    ],
)
def test_models_equal_eager(name, dtype, padding, trials):
    given = inputs(name, dtype, padding)
    for got, stock, exact in all_three(name, dtype, given, output):
        assert_close(got, stock, exact, dtype)
        trials()


@pytest.mark.reliability(4, "generation")
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", [*CAUSAL, "t5"])
def test_generation_equals_eager(name, padding, trials):
    given = inputs(name, padding=padding, tokens=9)
    given.pop("decoder_input_ids", None)

    def scores(model, given):
        out = model.generate(
            **given, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=True,
            output_logits=True, return_dict_in_generate=True, pad_token_id=0, tokenizer=object(),
        )  # fmt: skip
        return torch.stack(out.logits)

    for got, stock, exact in all_three(name, torch.float32, given, scores):
        assert_close(got, stock, exact, torch.float32)
        trials()


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_static_cache_and_chunks_equal_eager(name):
    ids = torch.randint(1, 99, (2, 12))

    def run(model, cache):
        logits = [model(ids[:, :7], past_key_values=cache).logits]
        logits.append(model(ids[:, 7:], past_key_values=cache).logits)
        return torch.cat(logits, 1)

    dynamic, static = transformers.DynamicCache, transformers.StaticCache
    for kind, options in ((dynamic, {}), (static, {"max_cache_len": 24})):
        model = make(name)
        stock = run(model, kind(config=model.config, **options))
        model.set_attn_implementation("hf_fusion")
        got = run(model, kind(config=model.config, **options))
        counted = hf_fusion.attention_stats(model)
        assert counted.fused == 4 and not counted.refused, str(counted)
        assert torch.allclose(got, stock, atol=2e-5, rtol=1e-5)


# ---------------------------------------------------------------- refusals


def layer_call(model, **kwargs):
    """One call of the registered function, as the model's first attention module makes it."""
    module = model.model.layers[0].self_attn
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    given = {"attention_mask": None, "scaling": 0.3, **kwargs}
    given = {"query": q, "key": k, "value": k, **given}
    forward = AttentionInterface()["hf_fusion"]
    return forward(module, **given), given


def stock_call(model, given):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(model.model.layers[0].self_attn, **given)[0]


FALLBACKS = {
    "dropout": (Reason.TRAINING, {"dropout": 0.5}),
    "attentions": (Reason.OUTPUTS, {"output_attentions": True}),
    "dtype": (Reason.DTYPE, {name: torch.randn(1, heads, 5, 8).double()
                             for name, heads in (("query", 4), ("key", 2), ("value", 2))}),
    "value size": (Reason.SHAPE, {"value": torch.randn(1, 2, 5, 4)}),
    "fewer keys": (Reason.MASK, {name: torch.randn(1, 2, 3, 8) for name in ("key", "value")}),
    "unknown": (Reason.ARGUMENT, {"block_indices": [3]}),
}  # fmt: skip


@pytest.mark.parametrize(("reason", "kwargs"), FALLBACKS.values(), ids=FALLBACKS)
def test_what_kernels_do_not_take_runs_in_sdpa_and_is_told(reason, kwargs):
    model = make("llama")
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="runs in transformers' sdpa"):
        (out, weights), given = layer_call(model, **kwargs)
    torch.manual_seed(1)
    assert weights is None
    if "dropout" not in kwargs:
        assert torch.equal(out, stock_call(model, given))
    counted = hf_fusion.attention_stats(model)
    assert counted.refused == {reason.value: 1} and counted.fused == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_call(model, **kwargs)  # the second time is counted only
    assert hf_fusion.attention_stats(model).refused == {reason.value: 2}


def test_gradients_run_in_sdpa_and_are_right():
    grads = []
    for implementation in ("sdpa", "hf_fusion"):
        model = make("llama")
        model.set_attn_implementation(implementation)
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(torch.arange(1, 9)[None], labels=torch.arange(1, 9)[None]).loss.backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*grads)
    assert set(hf_fusion.attention_stats(model).refused) == {Reason.GRADIENTS.value}


@pytest.mark.parametrize("name", ["softcap", "s_aux", "head_mask"])
def test_what_sdpa_would_lose_raises(name):
    with pytest.raises(FusionError) as refused:
        layer_call(make("llama"), **{name: torch.ones(4)})
    assert refused.value.reason is Reason.ARGUMENT


def test_strict_raises_and_comes_from_the_environment(monkeypatch):
    try:
        hf_fusion.register_attention(strict=True)
        with pytest.raises(FusionError) as refused:
            layer_call(make("llama"), dropout=0.1)
        assert refused.value.reason is Reason.TRAINING
        monkeypatch.setenv("HF_FUSION_STRICT", "1")
        hf_fusion.register_attention()
        with pytest.raises(FusionError):
            layer_call(make("llama"), dropout=0.1)
    finally:
        monkeypatch.delenv("HF_FUSION_STRICT", raising=False)
        hf_fusion.register_attention()


def test_names_of_others_are_not_replaced():
    mine = AttentionInterface._global_mapping["hf_fusion_tiled"]
    try:
        AttentionInterface.register("hf_fusion_tiled", make)
        with pytest.raises(FusionError) as refused:
            hf_fusion.register_attention()
        assert refused.value.reason is Reason.REGISTERED
        assert AttentionInterface._global_mapping["hf_fusion_tiled"] is make
    finally:
        AttentionInterface.register("hf_fusion_tiled", mine)


def test_every_isa_gives_the_same_within_rounding(force_isa):
    q, k = torch.randn(1, 4, 40, 64), torch.randn(1, 2, 90, 64)
    exact = attend(q, k, k, kernel="naive")
    for name, missing in native.isas():
        if missing is None:
            force_isa(name)
            for kernel in KERNELS:
                assert torch.allclose(attend(q, k, k, kernel=kernel), exact, atol=2e-6)
