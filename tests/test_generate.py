"""Every mode of generate() gives stock's tokens, fused or refused with the expected reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from shapes import VARIANTS
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicSlidingWindowLayer, QuantizedLayer
from transformers.generation.streamers import BaseStreamer
from twins import FAMILIES, Output, Twin, build, fused_hits, judge, twin

import hf_fusion
from hf_fusion.report import Reason

pytestmark = [pytest.mark.reliability(4), pytest.mark.usefixtures("one_thread")]

RUNGS = (
    ("full", "cpu"), ("full", "reference"), ("attention+up", "cpu"), ("attention", "cpu"),
    ("decomposed", "cpu"), ("none", "cpu"),
)  # fmt: skip
TWINS = [
    (family, variant) for family in FAMILIES for variant in VARIANTS.get(family, {"plain": {}})
]
SEEDS = (1, 2)


class Collector(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


class Shift(LogitsProcessor):
    """Forbids one more token at each step."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, : input_ids.shape[1] % scores.shape[1]] -= 1.0
        return scores


class StopAt(StoppingCriteria):
    """Stops at a length."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 17)


def prompt(model, batch: int, length: int, padded: bool, seed: int) -> dict:
    """input_ids and attention_mask (batch, length), left padded by 0, 1, 2, ... tokens; all ones
    where not padded.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(batch):
            ids[row, : row + 1] = 0
            mask[row, : row + 1] = 0
    return {"input_ids": ids, "attention_mask": mask}


@functools.lru_cache(maxsize=None)
def draft(family: str, patched: bool):
    """A smaller model with the vocabulary of the tiny one; its weights are its own."""
    model = build(family, {"num_hidden_layers": 1}, "fp32", "sdpa", seed=7)
    if patched:
        hf_fusion.patch(model)
    return model


def plain(model, inputs, **options):
    """generate() to 14 more tokens."""
    return model.generate(
        **inputs, **{"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, **options}
    )


def long_run(model, inputs):  # a cache grows past its first buffers
    return plain(model, inputs, max_new_tokens=90, eos_token_id=None)


def with_embeds(model, inputs):
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    return plain(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})


def streamed(model, inputs):
    collector = Collector()
    tokens = plain(model, inputs, streamer=collector)
    assert collector.ended == 1 and collector.tokens == tokens.flatten().tolist()
    return tokens


def sampled(model, inputs, **options):
    torch.manual_seed(11)
    return plain(model, inputs, do_sample=True, temperature=0.8, top_k=20, top_p=0.95, **options)


def self_assisted(model, inputs):
    return plain(model, inputs, assistant_model=model)


def cacheless_config(model, inputs):
    return plain(model, inputs, past_key_values=DynamicCache())


class Quantized(QuantizedLayer):
    """A quantised layer that loses nothing."""

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


def quantized_layers(model, inputs):
    cache = DynamicCache(config=model.config)
    cache.layers = [Quantized() for _ in cache.layers]
    return plain(model, inputs, past_key_values=cache)


def sliding_layers(model, inputs):
    cache = DynamicCache(config=model.config)
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=1000) for _ in cache.layers]
    return plain(model, inputs, past_key_values=cache)


def chunked_by_hand(model, inputs):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:, :4], past_key_values=cache)
        model(input_ids=inputs["input_ids"][:, 4:7], past_key_values=cache)
    return plain(model, inputs, past_key_values=cache)


def dictionary(model, inputs, **options):
    return plain(model, inputs, return_dict_in_generate=True, **options)


@dataclass(frozen=True)
class Mode:
    """One way to generate: how to call it, on what, and what a patch must say about it.

    `refused`, `downgraded`: reasons of a whole-model rung; `layer_refused`: of a layer rung.
    """

    call: Callable
    batch: int = 3
    length: int = 9
    padded: bool = False
    implementation: str = "sdpa"
    refused: tuple = ()
    downgraded: tuple = ()
    layer_refused: tuple = ()


def mode(call=plain, **fields) -> Mode:
    """A Mode; fields that Mode lacks are options of the call."""
    known = {name: fields.pop(name) for name in tuple(fields) if name in Mode.__dataclass_fields__}
    return Mode(functools.partial(call, **fields), **known)


CACHE_TYPE = {"refused": (Reason.CACHE_TYPE,), "layer_refused": (Reason.CACHE_TYPE,)}
MODES = {
    "greedy": mode(),
    "greedy, one row": mode(batch=1),
    "greedy, eight rows": mode(batch=8),
    "greedy, twenty rows": mode(batch=20),
    "greedy, left padded": mode(padded=True),
    "greedy, many tokens": mode(long_run, padded=True),
    "greedy, eager": mode(implementation="eager", padded=True),
    "one token prompt": mode(length=1),
    "no cache": mode(use_cache=False, padded=True),
    "beyond max_position_embeddings": mode(batch=1, length=520, max_new_tokens=6),
    "sampling": mode(sampled, padded=True),
    "sampling, several sequences": mode(sampled, num_return_sequences=3),
    "beams": mode(num_beams=4, padded=True),
    "beams, several sequences": mode(num_beams=4, num_return_sequences=3, length_penalty=0.5),
    "beams, early stopping": mode(num_beams=3, early_stopping=True, no_repeat_ngram_size=2),
    "beams, sampling": mode(sampled, num_beams=3),
    "prompt lookup": mode(batch=1, prompt_lookup_num_tokens=3),
    "assisted by itself": mode(self_assisted, batch=1),
    "chunked prefill": mode(prefill_chunk_size=4, length=23),
    "chunked prefill, one row": mode(prefill_chunk_size=5, length=19, batch=1),
    "chunked by hand": mode(chunked_by_hand),
    "inputs_embeds": mode(with_embeds, padded=True),
    "streamer": mode(streamed, batch=1),
    "processors": mode(
        logits_processor=LogitsProcessorList([Shift()]), repetition_penalty=1.3, min_new_tokens=5,
        padded=True,
    ),
    "tokenizers, which stop strings need": mode(tokenizer=object(), assistant_tokenizer=object()),
    "criteria": mode(stopping_criteria=StoppingCriteriaList([StopAt()])),
    "scores and logits": mode(dictionary, output_scores=True, output_logits=True, padded=True),
    "hidden states": mode(dictionary, output_hidden_states=True, downgraded=(Reason.OUTPUTS,)),
    "attentions": mode(
        dictionary, output_attentions=True, implementation="eager", refused=(Reason.OUTPUTS,),
        layer_refused=(Reason.OUTPUTS,),
    ),
    "static cache": mode(cache_implementation="static", padded=True),
    "static cache, one row": mode(cache_implementation="static", batch=1),
    "static cache, beams": mode(cache_implementation="static", num_beams=2),
    "static cache, eager": mode(cache_implementation="static", implementation="eager"),
    "cache without config": mode(cacheless_config, padded=True),
    "quantised layers": mode(quantized_layers, **CACHE_TYPE),
    "sliding layers": mode(sliding_layers, **CACHE_TYPE),
}  # fmt: skip


def flattened(result) -> dict[str, list[torch.Tensor]]:
    """Tokens and float outputs of generate(), in lists under their names."""
    if isinstance(result, torch.Tensor):
        return {"tokens": [result]}
    found = {"tokens": [result["sequences"]]}
    for name in ("scores", "logits", "hidden_states", "attentions"):
        value = result.get(name)
        if value is not None:
            found[name] = [
                t for step in value for t in (step if isinstance(step, tuple) else (step,))
            ]
    return found


@functools.lru_cache(maxsize=None)
def answers(family: str, variant: str, name: str, seed: int) -> tuple[dict, dict | None]:
    """(stock's result, the float64 model's where there is anything but tokens)."""
    pair, chosen = pair_for(family, variant, MODES[name]), MODES[name]
    inputs = prompt(pair.stock, chosen.batch, chosen.length, chosen.padded, seed)
    stock = flattened(chosen.call(pair.stock, inputs))
    return stock, flattened(chosen.call(pair.exact, inputs)) if len(stock) > 1 else None


def pair_for(family: str, variant: str, chosen: Mode) -> Twin:
    """The fp32 twin that a mode runs on."""
    return twin(family, VARIANTS.get(family, {}).get(variant, {}), "fp32", chosen.implementation)


def compare(got: dict, stock: dict, exact: dict | None, bits: bool, stages: int, what: str) -> None:
    """Tokens equal stock's; floats by the parity rule, or bit for bit."""
    assert got.keys() == stock.keys(), f"{what}: {sorted(got)} returned, stock {sorted(stock)}"
    for name, tensors in got.items():
        assert len(tensors) == len(stock[name]) and tensors, f"{what}: {len(tensors)} {name}"
        for index, (one, two) in enumerate(zip(tensors, stock[name])):
            if name == "tokens" or bits:
                assert torch.equal(one, two), (
                    f"{what}: {name} {index} differ from stock's\n{one}\n{two}"
                )
                continue
            three = exact[name][index]
            finite = two.isfinite() & three.isfinite()
            assert torch.equal(one.isfinite(), two.isfinite()), f"{what}: {name} {index}"
            rows = [torch.where(finite, t.double(), 0.0).to(two.dtype)[None] for t in (one, two)]
            truth = torch.where(finite, three, 0.0)[None]
            live = torch.ones(truth.shape[:2], dtype=torch.bool)
            judge(
                Output(name, rows[0], live),
                Output(name, rows[1], live),
                Output(name, truth, live),
                stages,
                what,
            )


@pytest.mark.parametrize("fusion, backend", RUNGS)
@pytest.mark.parametrize("name", MODES)
def test_modes(name, fusion, backend, trials):
    chosen = MODES[name]
    whole = fusion == "full"
    for family, variant in TWINS:
        pair = pair_for(family, variant, chosen)
        for seed in SEEDS:
            what = f"{pair.name}: {name}, {fusion} on {backend}, seed {seed}"
            stock, exact = answers(family, variant, name, seed)
            inputs = prompt(pair.stock, chosen.batch, chosen.length, chosen.padded, seed)
            refused = chosen.refused if whole else chosen.layer_refused if fusion != "none" else ()
            with hf_fusion.patched(pair.fused, fusion, backend):
                least = 0 if refused or fusion == "none" else 1
                with fused_hits(
                    pair.fused, what, refused, chosen.downgraded if whole else (), least
                ) as stats:
                    got = flattened(chosen.call(pair.fused, inputs))
                if fusion == "none":
                    assert stats.calls["wrapped"] > 0, what
                if refused:
                    assert stats.fused == 0, f"{what}: refused, yet {stats}"
            compare(got, stock, exact, fusion == "none" or bool(refused), pair.stages, what)
            trials()


@pytest.mark.parametrize("fusion, backend", RUNGS[:2] + RUNGS[3:4])
@pytest.mark.parametrize("drafted", ("stock", "patched"))
@pytest.mark.parametrize("family, variant", TWINS)
def test_assisted_by_a_draft(family, variant, drafted, fusion, backend, trials):
    pair = pair_for(family, variant, MODES["greedy"])
    for seed in range(3):
        inputs = prompt(pair.stock, 1, 12, False, seed)
        expected = plain(pair.stock, inputs, assistant_model=draft(family, False))
        helper = draft(family, drafted == "patched")
        with (
            hf_fusion.patched(pair.fused, fusion, backend),
            fused_hits(pair.fused, f"{pair.name} seed {seed}"),
        ):
            got = plain(pair.fused, inputs, assistant_model=helper)
        assert torch.equal(got, expected), (
            f"{pair.name}, {fusion}, {drafted} draft, seed {seed}\n{got}\n{expected}"
        )
        trials()


@pytest.mark.parametrize("fusion, backend", RUNGS[:5])
@pytest.mark.parametrize("static", (False, True), ids=("dynamic", "static"))
@pytest.mark.parametrize("family, variant", TWINS)
def test_continue_from_a_cache_across_models(family, variant, static, fusion, backend, trials):
    pair = pair_for(family, variant, MODES["greedy"])
    for seed, padded in ((1, False), (2, True)):
        inputs = prompt(pair.stock, 2, 8, padded, seed)
        whole = plain(pair.stock, inputs, max_new_tokens=18, eos_token_id=None)
        with hf_fusion.patched(pair.fused, fusion, backend):
            for order in ("FF", "FS", "SF", "FSF"):
                what = f"{pair.name}: {order}, {fusion} on {backend}, seed {seed}"
                tokens, cache = inputs["input_ids"], None
                if static:
                    cache = StaticCache(config=pair.stock.config, max_cache_len=40)
                hf_fusion.stats(pair.fused).clear()
                for turn, letter in enumerate(order):
                    model = pair.fused if letter == "F" else pair.stock
                    new = 18 // len(order)
                    mask = torch.ones_like(tokens)
                    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
                    out = dictionary(
                        model, {"input_ids": tokens, "attention_mask": mask}, past_key_values=cache,
                        max_new_tokens=new, eos_token_id=None,
                    )  # fmt: skip
                    tokens, cache = out.sequences, out.past_key_values
                stats = hf_fusion.stats(pair.fused)
                assert stats.fused and not stats.refused and not stats.downgraded, (
                    f"{what}\n{stats}"
                )
                assert torch.equal(tokens, whole), f"{what}\n{tokens}\n{whole}"
                trials()


@pytest.mark.parametrize("fusion, backend", RUNGS[:4])
@pytest.mark.parametrize("family, variant", TWINS)
def test_a_cache_of_inference_mode_goes_on_outside(family, variant, fusion, backend, trials):
    """torch forbids writing to a tensor of inference mode outside of it; stock copies its cache."""
    pair = pair_for(family, variant, MODES["greedy"])
    inputs = prompt(pair.stock, 2, 8, False, 3)
    whole = plain(pair.stock, inputs, max_new_tokens=12, eos_token_id=None)
    with hf_fusion.patched(pair.fused, fusion, backend), fused_hits(pair.fused):
        with torch.inference_mode():
            out = dictionary(pair.fused, inputs, max_new_tokens=4, eos_token_id=None)
        for model in (pair.stock, pair.fused):
            out = dictionary(
                model, {"input_ids": out.sequences.clone()}, past_key_values=out.past_key_values,
                max_new_tokens=4, eos_token_id=None,
            )  # fmt: skip
        assert torch.equal(out.sequences, whole)
    trials()


@torch.no_grad()
@pytest.mark.parametrize("family, variant", TWINS)
def test_what_was_kept_of_a_cache_is_never_overwritten(family, variant, trials):
    """Keys and values handed out stay as they were, whatever becomes of the cache."""
    pair = pair_for(family, variant, MODES["greedy"])
    ids, turned = prompt(pair.stock, 3, 9, False, 4)["input_ids"], torch.tensor([1, 2, 0])
    with hf_fusion.patched(pair.fused), fused_hits(pair.fused):
        for changes in (("crop",), ("reorder", "reorder"), ("reorder", "crop", "reorder")):
            cache, kept = DynamicCache(config=pair.fused.config), []
            pair.fused(ids, past_key_values=cache)
            for change in changes:
                views = [t for layer in cache.layers for t in (layer.keys, layer.values)]
                kept += [(view, view.clone()) for view in views]
                cache.crop(-4) if change == "crop" else cache.reorder_cache(turned)
                pair.fused(ids[:, :3], past_key_values=cache)
                assert all(torch.equal(*both) for both in kept), f"{pair.name}: {changes}"
            trials()
