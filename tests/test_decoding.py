"""generate(custom_generate=hf_fusion.custom_generate): stock's results in every mode, and native
calls of several tokens where nothing needs Python between them.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager

import pytest
import torch
from test_generate import MODES, SEEDS, TWINS, Collector, answers, compare, flattened, pair_for
from test_generate import prompt as random_prompt
from test_generation import NEW, model_of, prompt
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    StaticCache,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    pipeline,
)
from twins import fused_hits

import hf_fusion
from hf_fusion import decoding
from hf_fusion.harness import load_model
from hf_fusion.report import Reason

pytestmark = [pytest.mark.reliability(4), pytest.mark.usefixtures("one_thread")]

DRAWN = {name for name in MODES if "sampling" in name and "beams" not in name}
# what needs Python between tokens, or a cache that this loop does not grow
TOKEN_BY_TOKEN = {
    "no cache": Reason.CACHE_TYPE, "beams": Reason.ARGUMENT,
    "beams, several sequences": Reason.ARGUMENT, "beams, early stopping": Reason.ARGUMENT,
    "beams, sampling": Reason.ARGUMENT, "prompt lookup": Reason.ARGUMENT,
    "chunked prefill": Reason.ARGUMENT, "chunked prefill, one row": Reason.ARGUMENT,
    "inputs_embeds": Reason.ARGUMENT, "processors": Reason.ARGUMENT, "criteria": Reason.ARGUMENT,
    "scores and logits": Reason.ARGUMENT, "hidden states": Reason.ARGUMENT,
    "attentions": Reason.ARGUMENT, "static cache, beams": Reason.ARGUMENT,
    "quantised layers": Reason.CACHE_TYPE, "sliding layers": Reason.CACHE_TYPE,
    # caches of the caller's, in which rows that have ended would go on
    "cache without config": Reason.ARGUMENT, "chunked by hand": Reason.ARGUMENT,
}  # fmt: skip


@contextmanager
def by_default(model, method=hf_fusion.custom_generate):
    """model.generate() decodes by `method` in the block."""
    model.generate = functools.partial(type(model).generate, model, custom_generate=method)
    try:
        yield
    finally:
        del model.generate


@pytest.mark.parametrize("fusion", ("full", "attention"))
@pytest.mark.parametrize("name", [name for name in MODES if name not in DRAWN | {"streamer"}])
def test_modes(name, fusion, native_calls, trials):
    chosen, whole = MODES[name], fusion == "full"
    for family, variant in TWINS:
        pair = pair_for(family, variant, chosen)
        what, seed = f"{pair.name}: {name}, {fusion}", SEEDS[0]
        stock, exact = answers(family, variant, name, seed)
        inputs = random_prompt(pair.stock, chosen.batch, chosen.length, chosen.padded, seed)
        refused = chosen.refused if whole else chosen.layer_refused
        slow = {TOKEN_BY_TOKEN[name]} if name in TOKEN_BY_TOKEN else set()
        downgraded = slow | set(chosen.downgraded if whole else ())
        native_calls.clear()
        with (
            hf_fusion.patched(pair.fused, fusion),
            by_default(pair.fused),
            fused_hits(pair.fused, what, refused, downgraded, 0 if refused else 1),
        ):
            got = flattened(chosen.call(pair.fused, inputs))
        compare(got, stock, exact, bool(refused), pair.stages, what)
        assert bool(native_calls) == (whole and not slow and not refused), what
        trials()


def generated(model, inputs, **options):
    return model.generate(
        **inputs, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    )


@pytest.mark.parametrize("batch", (1, 3))
def test_rows_end_and_the_cache_is_stock_s(batch, native_calls, trials):
    """A dictionary, a cache of the caller's, and going on from it."""
    model, inputs = model_of(), prompt(batch, 7, 21, batch > 1)
    plain = generated(model, inputs)
    for column in range(7, 7 + NEW, 3):
        eos = plain[:, column].tolist()
        options = {"eos_token_id": eos, "return_dict_in_generate": True}
        want = generated(model, inputs, **options)
        longer = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)
        with hf_fusion.patched(model), by_default(model):
            assert torch.equal(generated(model, inputs, eos_token_id=eos), want.sequences)
            native_calls.clear()
            mine = DynamicCache(config=model.config)
            for given in ({}, {"past_key_values": mine}):
                got = generated(model, inputs, **options, **given)
                assert torch.equal(got.sequences, want.sequences)
                for one, two in zip(got.past_key_values.layers, want.past_key_values.layers):
                    torch.testing.assert_close(one.keys, two.keys)
                    torch.testing.assert_close(one.values, two.values)
            assert bool(native_calls) == (batch == 1)
            ids = torch.cat([want.sequences, want.sequences[:, :2]], 1)
            more = {"input_ids": ids, "attention_mask": longer[:, : ids.shape[1]]}
            native_calls.clear()
            went_on = generated(model, more, past_key_values=mine)
            assert sum(native_calls) == NEW - 1
        assert torch.equal(went_on, generated(model, more))
        trials()


def test_a_static_cache_that_is_kept_holds_what_stock_s_holds(native_calls):
    """Where a row may end, token by token: there is no taking tokens out of such a cache."""
    model, inputs = model_of(), prompt(1, 7, 21, False)
    plain = generated(model, inputs)
    for eos in (None, plain[0, 9].tolist()):
        options = {"eos_token_id": eos, "return_dict_in_generate": True}
        caches = [StaticCache(config=model.config, max_cache_len=7 + NEW) for _ in range(2)]
        want = generated(model, inputs, past_key_values=caches[0], **options).sequences
        native_calls.clear()
        with hf_fusion.patched(model), by_default(model):
            got = generated(model, inputs, past_key_values=caches[1], **options).sequences
        assert torch.equal(got, want) and bool(native_calls) == (eos is None)
        for one, two in zip(caches[1].layers, caches[0].layers, strict=True):
            assert one.get_seq_length() == two.get_seq_length()
            torch.testing.assert_close(one.keys, two.keys)


def test_criteria_of_time_and_text_are_asked_at_every_token(native_calls):
    loaded = load_model("tiny", "fp32")
    model, ids = loaded.model, loaded.tokenizer("The expression", return_tensors="pt")
    text = StopStringCriteria(loaded.tokenizer, ["e"])
    for options in ({"max_time": 0.0}, {"max_time": 1e6}, {"stopping_criteria": [text]}):
        want = generated(model, ids, **options)
        with hf_fusion.patched(model), by_default(model):
            assert torch.equal(generated(model, ids, **options), want)
            assert hf_fusion.stats(model).downgraded == {Reason.ARGUMENT.value: 1}
    assert not native_calls


def test_draws_are_those_of_the_other_loop(native_calls, trials):
    model, inputs = model_of(), prompt(3, 6, 22, True)
    for options in ({}, {"temperature": 0.7}, {"top_k": 9, "top_p": 0.8, "temperature": 1.3}):
        with hf_fusion.patched(model), by_default(model):
            torch.manual_seed(3)
            got = generated(model, inputs, do_sample=True, **{"top_k": 0, **options})
            assert sum(native_calls) == NEW - 1 and not hf_fusion.stats(model).downgraded
            torch.manual_seed(3)
            want = hf_fusion.generate(
                model, **inputs, max_new_tokens=NEW, do_sample=True, **options
            )
            assert torch.equal(got, want)
            greedy = generated(model, inputs, do_sample=True, top_k=1)
        assert torch.equal(greedy, generated(model, inputs))
        native_calls.clear()
        trials()


WARPERS = TemperatureLogitsWarper(0.7), TopKLogitsWarper(9), TopPLogitsWarper(0.8)


@pytest.mark.parametrize(
    "processors, native",
    [
        (WARPERS, True),
        (WARPERS[1:2], True),
        (WARPERS[::-1], False),
        ((TopPLogitsWarper(0.8, min_tokens_to_keep=2),), False),
        ((TopKLogitsWarper(9, filter_value=-1e4),), False),
    ],
)
def test_processors_are_not_lost(processors, native, native_calls):
    """Those that the sampler does not apply, or applies in another order, are left to generate().
    """
    model, inputs = model_of(), prompt(1, 6, 23, False)
    options = {"do_sample": True, "top_k": 0, "logits_processor": LogitsProcessorList(processors)}
    torch.manual_seed(4)
    want = generated(model, inputs, **options)
    with hf_fusion.patched(model), by_default(model):
        torch.manual_seed(4)
        got = generated(model, inputs, **options)
    assert bool(native_calls) == native
    assert native or torch.equal(got, want)


@pytest.mark.parametrize("options", ({}, {"repetition_penalty": 1.3}))
def test_a_streamer(options):
    model, inputs = model_of(), prompt(1, 6, 24, False)
    want, got = Collector(), Collector()
    tokens = generated(model, inputs, streamer=want, **options)
    method = functools.partial(hf_fusion.custom_generate, streamer=got)
    with hf_fusion.patched(model), by_default(model, method):
        assert torch.equal(generated(model, inputs, **options), tokens)
        assert got.tokens == want.tokens and got.ended == 1
        with pytest.raises(hf_fusion.FusionError, match="a streamer is given for beam_search"):
            generated(model, inputs, num_beams=2)


@pytest.mark.parametrize("kind", (DynamicCache, StaticCache))
def test_what_a_streamer_raises_ends_the_cache_where_stock_s_ends(kind, native_calls):
    model, inputs = model_of(), prompt(1, 7, 21, False)
    room = {"max_cache_len": 7 + NEW} if kind is StaticCache else {}

    class Failing(Collector):
        def put(self, value):
            super().put(value)
            if len(self.tokens) >= most:
                raise InterruptedError

    for most in (1, 8, 12):
        caches = [kind(config=model.config, **room) for _ in range(2)]
        with pytest.raises(InterruptedError):
            generated(
                model, inputs, streamer=Failing(), past_key_values=caches[1], eos_token_id=None
            )
        method = functools.partial(hf_fusion.custom_generate, streamer=Failing())
        with (
            hf_fusion.patched(model),
            by_default(model, method),
            pytest.raises(InterruptedError),
        ):
            generated(model, inputs, past_key_values=caches[0], eos_token_id=None)
        assert bool(native_calls) == (most == 12)
        for one, two in zip(caches[0].layers, caches[1].layers, strict=True):
            assert one.get_seq_length() == two.get_seq_length()
            if one.get_seq_length():
                torch.testing.assert_close(one.keys, two.keys)
                torch.testing.assert_close(one.values, two.values)


def test_a_device_keeps_its_own_method():
    model, ids = model_of(), torch.zeros(1, 3, dtype=torch.int64, device="meta")
    with pytest.raises(hf_fusion.FusionError, match="the model is on meta"):
        decoding._plan(model, ids, [], [], model.generation_config, {})


def test_a_model_that_is_not_patched():
    model, inputs = model_of(), prompt(2, 6, 25, True)
    with by_default(model):
        got = generated(model, inputs), generated(model, inputs, num_beams=2)
    assert torch.equal(got[0], generated(model, inputs))
    assert torch.equal(got[1], generated(model, inputs, num_beams=2))


def test_in_a_pipeline(native_calls):
    loaded = load_model("tiny", "fp32")
    run = pipeline("text-generation", model=loaded.model, tokenizer=loaded.tokenizer)
    call = {"max_new_tokens": 12, "do_sample": False}
    want = run("The expression", **call)
    with hf_fusion.patched(loaded.model):
        assert run("The expression", **call, custom_generate=hf_fusion.custom_generate) == want
    assert sum(native_calls) == 11
