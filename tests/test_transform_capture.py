"""Capture: one operator per attention, the model as it was; spelled out it gives the same."""

from __future__ import annotations

import itertools
import math

import graphs
import pytest
import torch
import transformers
from torch import nn

from hf_fusion import FusionError
from hf_fusion.report import Reason
from hf_fusion.transform import (
    DecomposedMultiheadAttention,
    DecomposingTracer,
    count_attention_layers,
    trace_with_decomposition,
)
from hf_fusion.transform.capture import capture
from hf_fusion.transform.explicit import attention_call
from hf_fusion.transform.ops import attention, explicit_attention
from hf_fusion.transform.tracer import decompose

CASES = [(name, False) for name in graphs.MODELS] + [(name, True) for name in graphs.PADDED]


def attentions(module):
    return [node for node in module.graph.nodes if attention_call(node) is not None]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    yield


@pytest.mark.parametrize(("name", "mask"), CASES)
@torch.no_grad()
def test_semantic_and_explicit_graphs_run_and_agree(name, mask):
    model = graphs.model(name)
    captured = capture(model, graphs.examples(name, mask), mask=mask)
    assert captured.road == ("export" if name == "positions" else "semantic") and not captured.notes
    found = attentions(captured.graph_module)
    assert (
        len(found) == graphs.LAYERS[name] == len(captured.expected) == count_attention_layers(model)
    )
    calls = [attention_call(node) for node in found]
    if name in ("gpt_neox", "gpt2", "llama", "mistral"):
        assert all(c.causal is (c.mask is None) is not mask for c in calls)
        assert all(c.window == (4 if name == "mistral" and not mask else 0) for c in calls)
    if name in ("vit", "bert", "positions", "detr") and not mask:
        assert all(call.mask is None and not call.causal for call in calls)
    given = dict(zip(captured.signature.arguments, captured.examples))
    for source in ("eager", "sdpa"):
        if name != "positions":
            # the backbone has no attention, and says so as an error
            model.set_attn_implementation({"": source, "backbone_config": "eager"})
        stock = model(**given, **captured.signature.defaults)
        assert graphs.furthest(stock, captured.graph_module(*captured.examples)) < 5e-6
    semantic = captured.graph_module(*captured.examples)
    assert decompose(captured, "explicit") == len(found)
    assert not attentions(captured.graph_module)
    parts = {
        n.meta["hf_fusion"]["part"]
        for n in captured.graph_module.graph.nodes
        if "hf_fusion" in n.meta
    }
    assert {"scores", "scale", "softmax", "dropout", "context"} <= parts
    assert graphs.furthest(semantic, captured.graph_module(*captured.examples)) < 5e-6


@pytest.mark.parametrize("name", ["llama", "t5", "positions"])
def test_the_model_is_as_it_was(name):
    model = graphs.model(name)
    before = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    text = repr(getattr(model, "config", None))
    find = transformers.masking_utils.find_packed_sequence_indices
    capture(model, graphs.examples(name))
    with pytest.raises(FusionError):
        capture(model, {"nothing": torch.zeros(2, 3)})
    assert transformers.masking_utils.find_packed_sequence_indices is find
    assert dict(model.named_modules()) == modules and repr(getattr(model, "config", None)) == text
    for key, value in model.state_dict().items():
        assert value.data_ptr() == before[key][0] and torch.equal(value, before[key][1])
    if name != "positions":
        assert model.config._attn_implementation in ("eager", "sdpa")


def random_call(causal, window, softcap, mask, bias, sinks, groups):
    torch.manual_seed(0)
    query = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    key, value = (torch.randn(2, groups, 6, 8, dtype=torch.float64) for _ in range(2))
    given = {"bool": torch.rand(2, 1, 6, 6) < 0.7, "float": torch.randn(2, 1, 6, 6).double()}
    if mask == "bool":
        given["bool"][..., 0] = True
    return (query, key, value, given.get(mask)), {
        "bias": torch.randn(1, 4, 6, 6).double() if bias else None,
        "sinks": torch.randn(4).double() if sinks else None,
        "causal": causal, "window": window, "softcap": softcap, "scale": 0.3,
    }  # fmt: skip


def by_hand(query, key, value, mask, *, bias, sinks, causal, window, softcap, scale):
    """The definition, one query at a time."""
    out = torch.zeros(2, 6, 4, 8, dtype=torch.float64)
    for b, h, i in itertools.product(range(2), range(4), range(6)):
        g = h // (4 // key.shape[1])
        scores = []
        for j in range(6):
            s = float(query[b, h, i] @ key[b, g, j]) * scale
            s = softcap * math.tanh(s / softcap) if softcap else s
            s += float(bias[0, h, i, j]) if bias is not None else 0.0
            hidden = (causal and j > i) or (window and j <= i - window)
            if mask is not None:
                hidden |= mask.dtype == torch.bool and not mask[b, 0, i, j]
                s += 0.0 if mask.dtype == torch.bool else float(mask[b, 0, i, j])
            scores.append(-torch.inf if hidden else s)
        scores += [float(sinks[h])] if sinks is not None else []
        weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
        out[b, i, h] = weights[:6] @ value[b, g]
    return out


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize(
    ("causal", "window", "softcap", "bias", "sinks"),
    [(False, 0, 0, False, False), (True, 0, 0, False, False), (True, 3, 0, False, False),
     (True, 0, 2.0, True, False), (False, 0, 0, True, True), (True, 2, 1.5, True, True)],
)  # fmt: skip
def test_the_operator_is_its_definition(causal, window, softcap, bias, sinks, mask, groups):
    args, kwargs = random_call(causal, window, softcap, mask, bias, sinks, groups)
    expected = by_hand(*args, **kwargs)
    assert (attention(*args, **kwargs) - expected).abs().max() < 1e-12
    assert (explicit_attention(*args, **kwargs) - expected).abs().max() < 1e-12


MASKS = ("none", "bool", "float", "heads")
PADDINGS = ("none", "bool", "float")


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize(
    ("bias", "bias_kv", "zero"), list(itertools.product([False, True], repeat=3))
)
@torch.no_grad()
def test_multihead_attention_taken_apart_is_itself(first, sizes, bias, bias_kv, zero):
    kdim, vdim = (12, 10) if sizes else (None, None)
    module = nn.MultiheadAttention(
        16,
        4,
        bias=bias,
        add_bias_kv=bias_kv,
        add_zero_attn=zero,
        kdim=kdim,
        vdim=vdim,
        batch_first=first,
    ).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    apart = DecomposedMultiheadAttention.from_module(module)
    storages = {p.untyped_storage().data_ptr() for p in module.parameters()}
    assert all(p.untyped_storage().data_ptr() in storages for p in apart.parameters())
    order = (lambda x: x) if first else (lambda x: x.transpose(0, 1))
    query, key, value = (
        order(torch.randn(2, n, e)) for n, e in ((5, 16), (7, kdim or 16), (7, vdim or 16))
    )
    masks = {
        "bool": torch.rand(5, 7) < 0.3,
        "float": torch.randn(5, 7),
        "heads": torch.randn(8, 5, 7),
    }
    masks["bool"][:, 0] = False
    paddings = {
        "bool": torch.tensor([[False] * 5 + [True] * 2, [False] * 7]),
        "float": torch.randn(2, 7),
    }
    for mask, padding, average in itertools.product(MASKS, PADDINGS, (False, True)):
        options = {"attn_mask": masks.get(mask), "key_padding_mask": paddings.get(padding),
                   "average_attn_weights": average}  # fmt: skip
        want, weights = module(query, key, value, **options)
        got, own = apart(query, key, value, need_weights=True, **options)
        assert own.shape == weights.shape and got.shape == want.shape
        assert max((got - want).abs().max(), (own - weights).abs().max()) < 2e-6, (mask, padding)
        assert torch.equal(apart(query, key, value, **options), got)
    one = [x.select(0 if first else 1, 0) for x in (query, key, value)]
    assert (apart(*one) - module(*one)[0]).abs().max() < 2e-6


@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
@pytest.mark.parametrize(
    "mask",
    [torch.zeros(5, 5, dtype=torch.int64), torch.zeros(5, dtype=torch.bool), torch.zeros(1, 5),
     torch.zeros(5, 1), torch.zeros(2, 5, 5), torch.zeros(2, 4, 5, 5)],
    ids=lambda mask: "x".join(map(str, mask.shape)),
)  # fmt: skip
def test_masks_that_multihead_attention_refuses_are_refused(name, mask):
    module = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with pytest.raises((AssertionError, RuntimeError)):
        module(x, x, x, **{name: mask})
    with pytest.raises(FusionError, match=name) as caught:
        DecomposedMultiheadAttention.from_module(module)(x, **{name: mask})
    assert caught.value.reason is Reason.MASK


class Block(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=first)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        y, weights = self.attention(x, x, x)
        return self.norm(x + y), weights


@pytest.mark.parametrize("first", [False, True])
def test_a_module_without_inputs_is_traced_symbolically(first):
    model = Block(first).eval()
    tracer = DecomposingTracer()
    graph = tracer.trace(model)
    assert tracer.decomposed_modules == ["attention"]
    assert sum(node.target is torch.softmax for node in graph.nodes) == 1
    traced, x = trace_with_decomposition(model), torch.randn(3, 5, 16)
    assert graphs.furthest(model(x), traced(x)) < 1e-6
    assert isinstance(model.attention, nn.MultiheadAttention)
    assert len(list(model.parameters())) == len(list(Block(first).parameters()))
    exported = trace_with_decomposition(model, example_inputs=x)
    assert graphs.furthest(model(x), exported(x)) < 1e-6


@pytest.mark.parametrize("hide", [False, True])
@torch.no_grad()
def test_only_a_mask_that_is_all_true_is_dropped(hide):
    class Masked(nn.Module):
        def forward(self, x):
            rows = torch.arange(x.shape[1])
            seen = torch.ones(x.shape[1]).to(torch.bool)[None] & (rows >= int(hide))[None]
            return attention(x[:, None], x[:, None], x[:, None], seen[None, None, 0])

    model, x = Masked().eval(), torch.randn(2, 5, 8)
    captured = capture(model, x)
    (node,) = attentions(captured.graph_module)
    assert (attention_call(node).mask is None) is not hide
    assert graphs.furthest(model(x), captured.graph_module(x)) < 1e-6


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("mask", ["bool", "float", "left"])
@torch.no_grad()
def test_encoders_write_zeros_where_the_fast_path_does(nested, mask):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    norm = nn.LayerNorm(16, bias=True)
    nn.init.normal_(norm.bias)
    model = nn.TransformerEncoder(layer, 2, norm=norm, enable_nested_tensor=nested).eval()
    padding = torch.arange(6) >= torch.tensor([[6], [4], [1]])
    if mask == "left":
        padding = padding.flip(1)
    elif mask == "float":
        padding = torch.zeros(3, 6).masked_fill(padding, -torch.inf)
    given = {"src": torch.randn(3, 6, 16), "src_key_padding_mask": padding}
    captured = capture(model, given)
    want = model(**given)
    zeroed = bool((want[2, 3] == norm.bias).all())
    assert zeroed is (nested and mask != "left")
    assert graphs.furthest(want, captured.graph_module(*captured.examples)) < 5e-6
    other = padding.flip(1).contiguous()
    given = {**given, "src_key_padding_mask": other}
    got = captured.graph_module(given["src"], other)
    assert graphs.furthest(model(**given), got) < 5e-6
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_cannot_be_traced_says_why():
    with pytest.raises(FusionError, match="example_inputs"):
        trace_with_decomposition(nn.TransformerEncoderLayer(16, 2).eval())
    with pytest.raises(FusionError, match="training mode"):
        capture(nn.Linear(2, 2), torch.zeros(2, 2))
    with pytest.raises(FusionError, match="level"):
        decompose(capture(nn.Linear(2, 2).eval(), torch.zeros(2, 2)), "fine")
    with pytest.raises(FusionError, match="ViTModel takes no mask of its pixel_values"):
        capture(graphs.model("vit"), mask=True)


def test_snippets_of_the_design_run():
    model = graphs.model("vit")
    traced = trace_with_decomposition(model)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert graphs.furthest(model(x), traced(x)) < 5e-6
    assert count_attention_layers(model) == 2
