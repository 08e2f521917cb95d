"""hf_fusion.generate draws as generate() warps: the definition in torch, and native draws by it."""

from __future__ import annotations

import pytest
import torch
from conftest import available_isas
from test_generation import NEW, given_logits, model_of, prompt
from transformers import (
    DynamicCache,
    StaticCache,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import hf_fusion
from hf_fusion import FusionError, generation
from hf_fusion.forwards import native_steps
from hf_fusion.report import Reason
from hf_fusion.sampling import Sampler

pytestmark = [pytest.mark.reliability(4), pytest.mark.usefixtures("one_thread")]

SLACK = 2e-6  # of a probability: native weights are fp32


@pytest.mark.parametrize("temperature", (0.5, 1.0, 1.7))
@pytest.mark.parametrize("top_k", (None, 1, 5, 10**6))
@pytest.mark.parametrize("top_p", (None, 0.0, 0.3, 0.9, 1.0))
def test_scores_are_warped_as_generate_does(temperature, top_k, top_p, trials):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(4)) * 3
    want = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        want = TopKLogitsWarper(top_k)(None, want)
    if top_p is not None:
        want = TopPLogitsWarper(top_p)(None, want)
    got = Sampler(True, temperature, top_k, top_p).scores(logits)
    assert torch.equal(got.isfinite(), want.isfinite())
    torch.testing.assert_close(got, want)
    trials()


def test_draws_follow_the_probabilities():
    """Pearson's statistic of 40,000 draws over 8 tokens, below its 99.99 % quantile."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5, -torch.inf, 1.5, 0.2, -2.0]])
    generator = torch.Generator().manual_seed(5)
    sampler = Sampler(True, 0.8)
    uniforms = sampler.uniforms(40000, 1, "cpu", generator)[:, 0]
    draws = sampler(logits.expand(40000, -1), uniforms)
    seen = draws.bincount(minlength=9).double()
    expected = (logits[0] / 0.8).softmax(-1).double() * 40000
    assert seen[5] == 0
    live = expected > 0
    assert float(((seen - expected)[live] ** 2 / expected[live]).sum()) < 29.9


def test_sampling_repeats_with_its_generator():
    model, inputs = model_of(), prompt(2, 5, 3, True)
    hf_fusion.patch(model)
    made = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        options = {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95}
        made.append(
            hf_fusion.generate(model, **inputs, max_new_tokens=NEW, generator=generator, **options)
        )
    greedy = hf_fusion.generate(model, **inputs, max_new_tokens=NEW)
    first = hf_fusion.generate(model, **inputs, max_new_tokens=NEW, do_sample=True, top_k=1)
    hf_fusion.unpatch(model)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert torch.equal(first, greedy) and not torch.equal(made[0], greedy)


def test_fewer_uniforms_are_the_first_of_more():
    few, many = (
        Sampler(True).uniforms(3, steps, "cpu", torch.Generator().manual_seed(6))
        for steps in (5, 17)
    )
    assert few.dtype == torch.float64 and torch.equal(few, many[:, :5])
    assert (many >= 0).all() and (many < 1).all() and many.unique().numel() == many.numel()


def in_their_shares(logits, sampler, uniforms, tokens) -> torch.Tensor:
    """Whether each uniform of (B, steps) lies in the share of its token; (B, steps) bools."""
    right = torch.zeros_like(tokens, dtype=torch.bool)
    for slack in (0.0, -SLACK, SLACK) if 0 < sampler.top_p < 1 else (0.0,):
        top_p = sampler.top_p + slack
        scores = Sampler(True, sampler.temperature, sampler.top_k, top_p).scores(logits[None])
        shares = scores[0].double().softmax(-1)
        ends = shares.cumsum(-1)[tokens]
        begins = ends - shares[tokens]
        right |= (shares[tokens] > 0) & (begins <= uniforms + SLACK) & (ends > uniforms - SLACK)
    return right


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("isa", available_isas())
def test_native_draws_are_those_of_the_definition(isa, dtype, force_isa, native_calls, trials):
    force_isa(isa)
    options = [
        (1.0, None, 1.0), (0.3, None, 1.0), (1.0, 40, 1.0), (0.7, 1, 1.0), (1.0, None, 0.7),
        (0.3, None, 0.97), (1.5, 40, 0.9), (1.0, 40, 0.0), (1.0, 2**64 + 1, 1.0),
    ]  # fmt: skip
    for size in (1, 2, 63, 129, 2049, 5000):
        model, column = given_logits(size, dtype)
        for seed, (temperature, top_k, top_p) in enumerate(options):
            numbers = torch.Generator().manual_seed(seed)
            column.copy_(torch.randn(size, generator=numbers) * 2)
            column[torch.rand(size, generator=numbers) < 0.1] = -torch.inf
            column[size // 2] = 1.0
            sampler = Sampler(True, temperature, top_k, top_p)
            with hf_fusion.patched(model):
                got = hf_fusion.generate(
                    model, torch.zeros(2, 1).long(), max_new_tokens=33, do_sample=True,
                    temperature=temperature, top_k=top_k, top_p=top_p,
                    generator=torch.Generator().manual_seed(seed),
                )[:, 1:]  # fmt: skip
            uniforms = sampler.uniforms(2, 33, "cpu", torch.Generator().manual_seed(seed))
            right = in_their_shares(column.float(), sampler, uniforms, got)
            assert right.all(), f"{size} logits, {temperature}, {top_k}, {top_p}: {got[~right]}"
            trials()
    assert sum(native_calls) > 0


@pytest.mark.parametrize("options", ({}, {"top_k": 7}, {"temperature": 0.8, "top_p": 0.9}))
@pytest.mark.parametrize("batch", (1, 3, 17))
def test_how_many_tokens_a_native_call_draws_makes_no_difference(
    options, batch, native_calls, monkeypatch, trials
):
    model, inputs = model_of(), prompt(batch, 8, 14, batch > 1)

    def drawn(**more):
        generator = torch.Generator().manual_seed(7)
        call = {"max_new_tokens": NEW, "do_sample": True, "generator": generator}
        return hf_fusion.generate(model, **more, **options, **call, **inputs)

    with hf_fusion.patched(model):
        want = drawn()
        assert native_calls == [1, NEW - 2]
        monkeypatch.setattr(generation, "_LONGEST_CALL", 0.0)
        assert torch.equal(drawn(), want) and native_calls[2:] == [1] * (NEW - 1)
        eos = want[:, 15].tolist()
        often, seldom = (
            drawn(eos_token_id=eos, check_every=every, pad_token_id=0) for every in (1, 4)
        )
        assert torch.equal(often, seldom) and torch.equal(often[:, :9], want[:, :9])
        trials()


@pytest.mark.parametrize("grows", (False, True))
@pytest.mark.parametrize("values", ({3: torch.nan}, {3: torch.inf}, {}))
def test_no_token_is_drawn_where_there_is_no_distribution(values, grows, trials):
    """In torch, for the prompt, and natively; the cache is no longer than before."""
    model, column = given_logits(50, "bf16")
    column.fill_(0.5 if values else -torch.inf)
    for place, value in values.items():
        column[place] = value
    cache, sampler = StaticCache(config=model.config, max_cache_len=9), Sampler(True, top_p=0.9)
    if grows:
        cache = DynamicCache(config=model.config)
    call = {
        "input_ids": torch.zeros(2, 1).long(),
        "attention_mask": torch.ones(2, 9, dtype=torch.bool),
        "position_ids": torch.zeros(2, 1).long(),
        "past_key_values": cache,
    }
    with hf_fusion.patched(model):
        with pytest.raises(FusionError, match="no token can be drawn") as caught:
            hf_fusion.generate(model, torch.zeros(2, 1).long(), max_new_tokens=4, do_sample=True)
        assert caught.value.reason is Reason.INPUT
        with torch.no_grad():
            model(**call)
            held = cache.get_seq_length()
            drawn = native_steps(model, 4, call, sampler, torch.rand(2, 4).double())
            assert drawn is None and cache.get_seq_length() == held
            column.fill_(0.5)
            assert native_steps(model, 4, call, sampler, torch.rand(2, 4).double()).shape == (2, 4)
    trials()
