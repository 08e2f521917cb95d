"""What transformers asks of every model, asked of stock, wrapped and fused ones: all must pass.

The checks restate those of transformers' ModelTesterMixin and GenerationTesterMixin that a patched
forward or a cache of its own could break, with their tolerances, with gradients and without.
`test_hf_sdist.py` runs the originals where they are at hand.
"""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers import DynamicCache, StaticCache
from twins import FAMILIES, HITS, REASONS, build, resolve

import hf_fusion

pytestmark = [pytest.mark.reliability(5), pytest.mark.usefixtures("one_thread")]

MODES = ("stock", "none", "attention", "full")
BATCH, LENGTH = 3, 7


class Bench:
    """Makes models of one family in one mode and keeps them for the count of fused calls."""

    def __init__(self, family: str, mode: str):
        self.family, self.mode, self.models = FAMILIES[family], mode, []

    def make(
        self, dtype: str = "fp32", implementation: str = "sdpa", seed: int = 0, cls=None, **changes
    ):
        return self.wrap(build(self.family.name, changes, dtype, implementation, seed, cls))

    def wrap(self, model):
        """Patches a model as the mode says."""
        if self.mode != "stock":
            hf_fusion.patch(model, self.mode)
            self.models.append(model)
        return model

    def fused(self) -> int:
        """Fused calls of all models made."""
        return sum(hf_fusion.stats(model).fused for model in self.models)


def ids(model, batch: int = BATCH, length: int = LENGTH, seed: int = 3) -> torch.Tensor:
    return torch.randint(
        3, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def greedy(model, tokens, **options):
    mask = options.pop("attention_mask", torch.ones_like(tokens))
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        **options,
    }
    return model.generate(tokens, attention_mask=mask, **options)


def close(a, b, tolerance: float = 1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# Checks without gradients or with: `bench` makes the models


def batching_equivalence(bench):
    model = bench.make()
    tokens = ids(model)
    whole = model(tokens).logits
    for row in range(BATCH):
        close(model(tokens[row : row + 1]).logits[0], whole[row])


def determinism(bench):
    model = bench.make()
    assert torch.equal(model(ids(model)).logits, model(ids(model)).logits)


def eager_matches_sdpa(bench):
    for dtype, tolerance in (("fp32", 1e-4), ("fp16", 5e-3), ("bf16", 1e-2)):
        eager, sdpa = (bench.make(dtype, name) for name in ("eager", "sdpa"))
        one, two = eager(ids(eager)).logits, sdpa(ids(eager)).logits
        worst = float((one - two).detach().abs().max() / one.detach().abs().max())
        assert worst <= tolerance, (
            f"{dtype}: eager and sdpa differ by {worst:.1e} of the largest logit"
        )


def save_and_load(bench, folder):
    model = bench.make()
    model.save_pretrained(folder)
    loaded = bench.wrap(type(model).from_pretrained(folder))
    assert torch.equal(loaded(ids(model)).logits, model(ids(model)).logits)
    assert {name: tuple(t.shape) for name, t in loaded.state_dict().items()} == {
        name: tuple(t.shape) for name, t in model.state_dict().items()
    }
    half = bench.wrap(type(model).from_pretrained(folder, dtype=torch.bfloat16))
    assert half(ids(model)).logits.dtype == torch.bfloat16


def hidden_states(bench):
    model = bench.make()
    out = model(ids(model), output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert all(t.shape == (BATCH, LENGTH, model.config.hidden_size) for t in out.hidden_states)
    plain = model(ids(model))
    assert plain.hidden_states is None
    close(plain.logits, out.logits)


def attentions(bench):
    model = bench.make(implementation="eager")
    out = model(ids(model), output_attentions=True)
    heads = model.config.num_attention_heads
    assert len(out.attentions) == model.config.num_hidden_layers
    assert all(t.shape == (BATCH, heads, LENGTH, LENGTH) for t in out.attentions)
    for t in out.attentions:
        close(t.sum(-1), torch.ones(BATCH, heads, LENGTH))
    model.config.output_attentions = True
    assert len(model(ids(model)).attentions) == model.config.num_hidden_layers
    model.config.output_attentions = False
    close(model(ids(model)).logits, out.logits)


def resize_embeddings(bench):
    model = bench.make()
    before = model(ids(model)).logits
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 10)
    after = model(ids(model)[:, :LENGTH].clamp(max=rows - 1)).logits
    assert after.shape[-1] == rows + 10
    model.resize_token_embeddings(rows)
    assert torch.equal(model(ids(model)).logits, before)


def tied_weights(bench):
    model = bench.make(tie_word_embeddings=True)
    before = model(ids(model)).logits
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.5)
    after = model(ids(model)).logits
    assert not torch.allclose(before, after)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def inputs_embeds(bench):
    model = bench.make()
    tokens = ids(model)
    close(model(inputs_embeds=model.get_input_embeddings()(tokens)).logits, model(tokens).logits)


def outputs_as_tuples(bench):
    model = bench.make()
    named, plain = model(ids(model)), model(ids(model), return_dict=False)
    close(plain[0], named.logits)
    assert type(plain) is tuple and len(plain) == len(named.to_tuple())


def signature(bench):
    model = bench.make()
    assert inspect.signature(model.forward) == inspect.signature(type(model).forward.__get__(model))


def attention_changes(bench):
    model = bench.make()
    before = model(ids(model)).logits
    model.set_attn_implementation("eager")
    close(model(ids(model)).logits, before, 1e-4)
    model.set_attn_implementation("sdpa")
    close(model(ids(model)).logits, before)


def head_losses(bench):
    base = resolve(bench.family.base_class)
    name = base.__name__.removesuffix("Model") + "ForSequenceClassification"
    cls = getattr(inspect.getmodule(base), name, None)
    if cls is None:
        return
    for problem, labels in (
        ("single_label_classification", torch.tensor([0, 1, 1])),
        ("multi_label_classification", torch.tensor([[0.0, 1.0]] * BATCH)),
        ("regression", torch.randn(BATCH, 2)),
    ):
        model = bench.make(cls=cls, pad_token_id=1, problem_type=problem, num_labels=2)
        out = model(ids(model), labels=labels)
        assert out.loss.isfinite() and out.logits.shape == (BATCH, 2)


def cache_format(bench):
    model = bench.make()
    out = model(ids(model), use_cache=True)
    heads = model.config.num_attention_heads
    shape = (BATCH, heads, LENGTH, model.config.hidden_size // heads)
    cache = out.past_key_values
    assert type(cache) is DynamicCache and len(cache.layers) == model.config.num_hidden_layers
    assert cache.get_seq_length() == LENGTH and not cache.is_compileable
    assert all(layer.keys.shape == layer.values.shape == shape for layer in cache.layers)
    rebuilt = DynamicCache([(keys, values) for keys, values, *_ in cache])
    new = ids(model, BATCH, 1, 8)
    close(model(new, past_key_values=rebuilt).logits, model(new, past_key_values=cache).logits)


def continues_from_cache(bench):
    model = bench.make()
    tokens = ids(model)
    first = greedy(model, tokens, return_dict_in_generate=True, max_new_tokens=3)
    rest = greedy(model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=4)
    assert torch.equal(rest, greedy(model, tokens, max_new_tokens=7))


def static_cache_generation(bench):
    model = bench.make()
    out = greedy(model, ids(model), cache_implementation="static", return_dict_in_generate=True)
    assert isinstance(out.past_key_values, StaticCache)
    layer = out.past_key_values.layers[0]
    heads = model.config.num_attention_heads
    assert layer.keys.shape == (BATCH, heads, LENGTH + 6 - 1, model.config.hidden_size // heads)
    assert torch.equal(out.sequences, greedy(model, ids(model)))


def left_padding(bench):
    model = bench.make()
    tokens = ids(model)
    padded = torch.cat([torch.zeros(BATCH, 4, dtype=torch.int64), tokens], 1)
    mask = (torch.arange(LENGTH + 4) >= 4).long().expand(BATCH, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(padded, attention_mask=mask, position_ids=positions).logits
    close(out[:, -1], model(tokens).logits[:, -1])


def generation_methods_agree(bench):
    model = bench.make()
    tokens = ids(model, 1, 12)
    expected = greedy(model, tokens)
    assert torch.equal(greedy(model, tokens, use_cache=False), expected)
    assert torch.equal(greedy(model, tokens, prompt_lookup_num_tokens=2), expected)
    assert torch.equal(greedy(model, tokens, assistant_model=bench.make(seed=5)), expected)
    assert torch.equal(greedy(model, tokens, prefill_chunk_size=3), expected)
    model.config.use_cache = False
    assert torch.equal(greedy(model, tokens), expected)


def beam_outputs(bench):
    model = bench.make()
    out = greedy(
        model, ids(model), num_beams=2, num_return_sequences=2, return_dict_in_generate=True,
        output_scores=True, output_hidden_states=True,
    )  # fmt: skip
    assert (
        out.sequences.shape == (2 * BATCH, LENGTH + 6)
        and len(out.scores) == len(out.hidden_states) == 6
    )
    assert out.past_key_values.layers[0].keys.shape[0] == 2 * BATCH


def meta_then_loaded(bench):
    source = bench.make()
    with torch.device("meta"):
        empty = type(source)(copy.deepcopy(source.config))
    empty = bench.wrap(empty.eval())
    empty.load_state_dict(source.state_dict(), assign=True)
    rotary = bench.family.parts(getattr(empty, empty.base_model_prefix)).rotary
    rotary.to_empty(device="cpu")
    for name, buffer in bench.family.parts(
        getattr(source, source.base_model_prefix)
    ).rotary.named_buffers():
        rotary.get_buffer(name).copy_(buffer)
    assert torch.equal(empty(ids(source)).logits, source(ids(source)).logits)


CHECKS = (
    batching_equivalence, determinism, eager_matches_sdpa, save_and_load, hidden_states, attentions,
    resize_embeddings, tied_weights, inputs_embeds, outputs_as_tuples, signature, attention_changes,
    head_losses, cache_format, continues_from_cache, static_cache_generation, left_padding,
    generation_methods_agree, beam_outputs, meta_then_loaded,
)  # fmt: skip


@pytest.mark.parametrize("grad", (False, True), ids=("no_grad", "grad"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_common_checks(family, check, mode, grad, tmp_path):
    bench = Bench(family, mode)
    with torch.set_grad_enabled(grad):
        check(bench, tmp_path) if "folder" in inspect.signature(check).parameters else check(bench)
    for model in bench.models:
        seen = hf_fusion.stats(model).to_dict()
        REASONS.update(seen["refused"])
        REASONS.update(seen["downgraded"])
        HITS.update(seen["calls"])
    if mode in ("attention", "full") and not grad and check is not signature:
        assert bench.fused() > 0, f"{check.__name__} passed on stock code alone"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_training(family, checkpointing, mode):
    """Gradients reach every parameter and are stock's, and captured states keep theirs."""
    grads = []
    for bench in (Bench(family, "stock"), Bench(family, mode)):
        model = bench.make(implementation="eager")
        model.train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(ids(model), labels=ids(model), use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(g is not None and g.abs().sum() > 0 for g in grads[1].values())
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    model.eval()
    out = model(ids(model), output_hidden_states=True, output_attentions=True)
    kept = (out.hidden_states[0], out.attentions[0])
    for tensor in kept:
        tensor.retain_grad()
    out.logits.flatten()[0].backward()
    assert all(tensor.grad is not None for tensor in kept)
    if bench.models and mode != "none":
        assert hf_fusion.stats(model).fused == 0, "kernels have no gradients"
