"""Calls of models outside of generate(): masks, positions, caches and arguments of every kind,
bare models and other heads.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass

import pytest
import torch
from shapes import DTYPES, IMPLEMENTATIONS, VARIANTS
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from twins import FAMILIES, Output, Twin, fused_hits, judge, resolve, twin

import hf_fusion
from hf_fusion.report import Reason

pytestmark = [pytest.mark.reliability(3), pytest.mark.usefixtures("one_thread")]

TWINS = [
    (family, variant) for family in FAMILIES for variant in VARIANTS.get(family, {"plain": {}})
]
RUNGS = (
    ("full", "cpu"),
    ("full", "reference"),
    ("attention+up", "cpu"),
    ("attention", "cpu"),
    ("decomposed", "cpu"),
)
PROMPT = 11


def ids(batch: int, length: int, seed: int = 5) -> torch.Tensor:
    """(batch, length) int64."""
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(seed))


def causal_holes(batch: int, queries: int, keys: int) -> torch.Tensor:
    """(batch, 1, queries, keys) bool: causal with a third of the keys missing, a query's own key
    present.
    """
    past = keys - queries
    drawn = torch.rand(batch, 1, queries, keys, generator=torch.Generator().manual_seed(9)) < 0.67
    return (drawn | torch.eye(queries, keys, dtype=torch.bool).roll(past, 1)).tril(past)


def additive(mask: torch.Tensor, model) -> torch.Tensor:
    """The mask as numbers to add to scores, in the model's dtype."""
    return torch.zeros(mask.shape, dtype=model.dtype).masked_fill(
        ~mask, torch.finfo(model.dtype).min
    )


# Each returns float results with (batch, rows) first. `model` decides about dtypes only.


def outputs_of(model, **call):
    result = model(**call)
    return [
        t
        for t in (result if isinstance(result, tuple) else result.to_tuple())
        if isinstance(t, torch.Tensor)
    ]


def bool_mask(model):
    return outputs_of(
        model, input_ids=ids(3, PROMPT), attention_mask=causal_holes(3, PROMPT, PROMPT)
    )


def float_mask(model):
    mask = additive(causal_holes(1, PROMPT, PROMPT), model)  # one for all rows
    return outputs_of(model, input_ids=ids(3, PROMPT), attention_mask=mask)


def masks_over_a_cache(model):
    cache, tokens = DynamicCache(config=model.config), ids(2, PROMPT)
    first = outputs_of(
        model,
        input_ids=tokens[:, :7],
        past_key_values=cache,
        attention_mask=additive(causal_holes(2, 7, 7), model),
    )
    mask = additive(causal_holes(2, PROMPT - 7, PROMPT), model)
    return first + outputs_of(
        model, input_ids=tokens[:, 7:], past_key_values=cache, attention_mask=mask
    )


def biased_scores(model):
    """Masks whose seen keys carry biases, as ALiBi has them, for many rows and for few."""
    cache, found = DynamicCache(config=model.config), []
    bias = torch.randn(3, 1, PROMPT, PROMPT, generator=torch.Generator().manual_seed(10)).half()
    for past, end in ((0, PROMPT - 2), (PROMPT - 2, PROMPT)):
        mask = additive(causal_holes(3, end - past, end), model)
        seen = mask == 0
        mask[seen] = bias[:, :, past:end, :end].to(model.dtype)[seen]
        tokens = ids(3, PROMPT)[:, past:end]
        found += outputs_of(model, input_ids=tokens, past_key_values=cache, attention_mask=mask)
    return found


def looks_ahead(model):
    mask = causal_holes(2, PROMPT, PROMPT)
    mask[:, :, 2, 5] = True
    return outputs_of(model, input_ids=ids(2, PROMPT), attention_mask=additive(mask, model))


def looks_past_the_tokens(model):
    cache = StaticCache(config=model.config, max_cache_len=20)
    mask = torch.zeros(2, 1, 1, 20, dtype=model.dtype)
    return outputs_of(model, input_ids=ids(2, 1), past_key_values=cache, attention_mask=mask)


def float_padding(model):
    mask = torch.ones(2, PROMPT)
    mask[0, :3] = 0.0
    return [t[:, 3:] for t in outputs_of(model, input_ids=ids(2, PROMPT), attention_mask=mask)]


def given_positions(model, positions, cached=True):
    cache = DynamicCache(config=model.config) if cached else None
    return outputs_of(
        model,
        input_ids=ids(2, PROMPT),
        position_ids=positions,
        past_key_values=cache,
        use_cache=cached,
    )


def far_positions(model):
    return given_positions(model, torch.arange(PROMPT)[None] + torch.tensor([[3], [5000]]))


def odd_positions(model):
    return given_positions(
        model, torch.tensor([[0, 0, 9, 2, 700, 1, 1, 3, 600, 4, 0]], dtype=torch.int32)
    )


def packed_positions(model):
    return given_positions(
        model, torch.arange(PROMPT).remainder(4)[None].expand(2, -1), cached=False
    )


def one_row_of_positions_over_a_cache(model):
    cache, tokens = DynamicCache(config=model.config), ids(3, PROMPT)
    found = []
    for at in range(PROMPT):
        positions = torch.tensor([[3 * at]])
        found += outputs_of(
            model, input_ids=tokens[:, at : at + 1], position_ids=positions, past_key_values=cache
        )
    return found


def static_cache(model):
    cache, tokens = StaticCache(config=model.config, max_cache_len=20), ids(2, PROMPT)
    found = outputs_of(model, input_ids=tokens[:, :6], past_key_values=cache)
    found += outputs_of(model, input_ids=tokens[:, 6:10], past_key_values=cache)
    return found + outputs_of(model, input_ids=tokens[:, 10:], past_key_values=cache)


def kept_by_index(model):
    return outputs_of(
        model, input_ids=ids(2, PROMPT), logits_to_keep=torch.tensor([1, 4, PROMPT - 1])
    )


def more_kept_than_given(model):
    return outputs_of(model, input_ids=ids(2, 3), logits_to_keep=9)


def labels(model):
    wanted = ids(2, PROMPT, 6)
    loss, logits, *_ = outputs_of(model, input_ids=ids(2, PROMPT), labels=wanted)
    assert torch.equal(loss, model.loss_function(logits, wanted, vocab_size=logits.shape[-1]))
    return [logits]


def tuple_output(model):
    return outputs_of(model, input_ids=ids(2, PROMPT), return_dict=False)


def int32_strided_ids(model):
    return outputs_of(model, input_ids=ids(PROMPT, 4).int().t())


def strided_embeds(model):
    embeds = model.get_input_embeddings()(ids(PROMPT, 2)).detach().transpose(0, 1)
    return outputs_of(model, inputs_embeds=embeds)


def not_causal(model):
    return outputs_of(model, input_ids=ids(2, PROMPT), is_causal=False)


@dataclass(frozen=True)
class Call:
    """A call and the reasons a patch must give: of a whole-model rung, and `layer_refused` of a
    layer rung.
    """

    run: object
    refused: tuple = ()
    downgraded: tuple = ()
    layer_refused: tuple = ()
    only: str = ""


MASK = {"refused": (Reason.MASK,), "layer_refused": (Reason.MASK,)}
NOT_CAUSAL = {"refused": (Reason.NOT_CAUSAL,), "layer_refused": (Reason.NOT_CAUSAL,)}
CALLS = {
    "bool 4D mask": Call(bool_mask, only="sdpa"),
    "float 4D mask": Call(float_mask),
    "4D masks over a cache": Call(masks_over_a_cache),
    "biased scores": Call(biased_scores),
    "a mask that looks ahead": Call(looks_ahead, **MASK),
    "a mask over a static cache's empty places": Call(looks_past_the_tokens, **MASK),
    "float padding mask": Call(float_padding),
    "far positions": Call(far_positions),
    "odd positions": Call(odd_positions),
    "packed positions": Call(packed_positions, downgraded=(Reason.PACKED,)),
    "one row of positions": Call(one_row_of_positions_over_a_cache),
    "static cache": Call(static_cache),
    "kept by index": Call(kept_by_index, downgraded=(Reason.ARGUMENT,)),
    "more kept than given": Call(more_kept_than_given),
    "labels": Call(labels, downgraded=(Reason.LABELS,)),
    "tuple": Call(tuple_output, downgraded=(Reason.RETURN_TUPLE,)),
    "int32 strided ids": Call(int32_strided_ids),
    "strided embeds": Call(strided_embeds),
    "not causal": Call(not_causal, **NOT_CAUSAL),
}  # fmt: skip


@functools.lru_cache(maxsize=None)
@torch.no_grad()
def answers(pair: Twin, name: str) -> tuple:
    """Results of stock and of the float64 model."""
    return CALLS[name].run(pair.stock), CALLS[name].run(pair.exact)


def judge_lists(got: list, stock: list, exact: list, stages: int, bits: bool, what: str) -> None:
    """The parity rule for results in lists, or equal bits."""
    assert len(got) == len(stock) == len(exact) > 0, what
    for index, triple in enumerate(zip(got, stock, exact)):
        if bits:
            assert torch.equal(triple[0], triple[1]), f"{what}: result {index} differs from stock's"
            continue
        rows = [t if t.dim() > 2 else t.unsqueeze(1) for t in triple]
        live = torch.ones(rows[0].shape[:2], dtype=torch.bool)
        judge(*(Output(f"result {index}", t, live) for t in rows), stages, what)


@pytest.mark.parametrize("fusion, backend", RUNGS)
@pytest.mark.parametrize("name", CALLS)
def test_calls(name, fusion, backend, trials):
    call, whole = CALLS[name], fusion == "full"
    refused = call.refused if whole else call.layer_refused
    for family, variant in TWINS:
        for implementation in IMPLEMENTATIONS if not call.only else (call.only,):
            for dtype in DTYPES:
                pair = twin(
                    family, VARIANTS.get(family, {}).get(variant, {}), dtype, implementation
                )
                what = f"{pair.name}: {name}, {fusion} on {backend}"
                stock, exact = answers(pair, name)
                with hf_fusion.patched(pair.fused, fusion, backend), torch.no_grad():
                    least = 0 if refused else 1
                    down = call.downgraded if whole else ()
                    with fused_hits(pair.fused, what, refused, down, least) as stats:
                        got = call.run(pair.fused)
                    assert not refused or stats.fused == 0, f"{what}\n{stats}"
                judge_lists(got, stock, exact, pair.stages, bool(refused), what)
                trials()


def classes(family: str) -> list[type]:
    """The base model and every head of a family besides the causal LM's."""
    known = FAMILIES[family]
    base, lm = resolve(known.base_class), resolve(known.causal_lm_class)
    module = sys.modules[base.__module__]
    prefix = base.__name__.removesuffix("Model")
    names = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
    heads = [getattr(module, prefix + name) for name in names if hasattr(module, prefix + name)]
    assert lm not in heads
    return [base, *heads]


@pytest.mark.parametrize("fusion, backend", RUNGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "family, cls", [(family, cls) for family in FAMILIES for cls in classes(family)]
)
def test_bare_models_and_other_heads(family, cls, dtype, fusion, backend, trials):
    pair = Twin(family, {"pad_token_id": 1, "num_labels": 5}, dtype, "sdpa", 3, cls)
    for batch, length, padded in ((1, 1, False), (2, 7, True), (3, 33, True), (8, 2, False)):
        what = f"{pair.name} {cls.__name__}: {fusion} on {backend}, batch {batch}, length {length}"
        call = {
            "input_ids": ids(batch, length, seed=length),
            "attention_mask": torch.ones(batch, length, dtype=torch.int64),
        }
        if padded:
            call["input_ids"][0, -1], call["attention_mask"][0, -1] = 1, 0
        with torch.no_grad():
            stock, exact = outputs_of(pair.stock, **call), outputs_of(pair.exact, **call)
            with (
                hf_fusion.patched(pair.fused, fusion, backend),
                fused_hits(pair.fused, what) as stats,
            ):
                got = outputs_of(pair.fused, **call)
            if fusion == "full":
                assert stats.fused == 1 and stats.calls["layer"] == 0, f"{what}\n{stats}"
        if min(t.numel() for t in stock) > 1:
            judge_lists(got, stock, exact, pair.stages, False, what)
        trials()


def offloaded(config):
    return DynamicCache(config=config, offloading=True)


def encoder_decoder(config):
    return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))


def full_static(config):
    return StaticCache(config=config, max_cache_len=4)


def static_of_inference_mode(config):
    sizes = {"num_heads": config.num_attention_heads, "dtype": torch.float32, "device": "cpu"}
    with torch.inference_mode():
        cache = StaticCache(config=config, max_cache_len=20)
        head_dim = config.hidden_size // config.num_attention_heads
        cache.early_initialization(batch_size=2, head_dim=head_dim, **sizes)
    return cache


@pytest.mark.parametrize("fusion, backend", RUNGS[:3])
@pytest.mark.parametrize(
    "make, reason",
    [
        (offloaded, Reason.CACHE_TYPE),
        (encoder_decoder, Reason.CACHE_TYPE),
        (full_static, Reason.CACHE_FULL),
        (static_of_inference_mode, Reason.CACHE_STATE),
    ],
)
@pytest.mark.parametrize("family, variant", TWINS)
def test_caches_that_stock_may_refuse_end_as_in_stock(
    family, variant, make, reason, fusion, backend
):
    if make is offloaded and torch.cuda.is_available():
        pytest.skip("with a GPU, stock can offload a cache")
    pair = twin(family, VARIANTS.get(family, {}).get(variant, {}), "fp32")

    def end_of(model):
        try:
            with torch.no_grad():
                return model(input_ids=ids(2, 9), past_key_values=make(model.config)).logits
        except Exception as error:  # stock's own, of any type
            return f"{type(error).__name__}: {error}"

    expected = end_of(pair.stock)
    with hf_fusion.patched(pair.fused, fusion, backend):
        with fused_hits(pair.fused, make.__name__, refused=(reason,), least=0):
            got = end_of(pair.fused)
    assert type(got) is type(expected) and (
        torch.equal(got, expected) if type(got) is torch.Tensor else got == expected
    )
