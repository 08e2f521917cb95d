"""Extension, by worked examples: two forms of attention, a rule, a back end; and the back ends that
come along.
"""

from __future__ import annotations

import graphs
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from hf_fusion import FusionError
from hf_fusion.transform import (
    FusionGroup,
    fuse,
    register_attention_variant,
    register_backend,
    register_fusion_rule,
)
from hf_fusion.transform import groups as kinds
from hf_fusion.transform.backends import unregister_backend
from hf_fusion.transform.inductor import Region, calls_in
from hf_fusion.transform.nodes import name_of
from hf_fusion.transform.ops import attention, library_attention
from hf_fusion.transform.rules import unregister_fusion_rule
from hf_fusion.transform.site import attribute
from hf_fusion.transform.variants import parameter_only, unregister_attention_variant


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    with torch.no_grad():
        yield


# A bias that is looked up in a table by relative position, as in Swin: the look-up depends on
# parameters alone, so it is done once, when the group is built.


def windowed_bias(found, module):
    """The nodes that make the mask, or the part of it that is the bias, out of the table."""
    mask = found.call.mask
    added = [mask] if mask is not None and name_of(mask) == "add" else []
    for part in mask.all_input_nodes if added else [mask]:
        nodes = parameter_only(part)
        if any(name_of(node) == "index" for node in nodes):
            return {"nodes": [*nodes, *added]}
    return None


def with_bias(query, key, value, mask, bias, sinks, call, details):
    return library_attention(query, key, value, mask, bias, sinks, scale=call.scale)


def test_a_windowed_bias_is_looked_up_once():
    register_attention_variant("windowed bias", windowed_bias, with_bias)
    try:
        fused = fuse(graphs.model("swin"), backends=("aten",))
    finally:
        unregister_attention_variant("windowed bias")
    cores = [g for g in fused.report.subgraphs if g.kind == kinds.CORE]
    assert [g.backend for g in cores] == ["attention variant windowed bias"] * 4
    before = graphs.fused("swin").measure()["fused"]["operators"]
    after = fused.measure()["fused"]["operators"]
    assert before["index"] - after.get("index", 0) == 4
    assert max(fused.report.errors) < 5e-6


# Attention within blocks of the sequence, written down with a mask: the fused form never makes the
# scores that the mask would drop.

BLOCK = 16


class BlockAttention(nn.Module):
    def __init__(self, tokens=64, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width) for _ in "qkvo"
        )
        blocks = torch.arange(tokens) // BLOCK
        self.register_buffer("mask", (blocks[:, None] == blocks[None, :])[None, None])

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(attention(q, k, v, self.mask).flatten(2))


def block_diagonal(found, module):
    """The size of the blocks, where the mask is a buffer of equal blocks along the diagonal."""
    if found.call.mask is None or found.call.mask.op != "get_attr" or found.call.causal:
        return None
    mask = attribute(module, found.call.mask.target)
    if mask.dtype != torch.bool or mask.shape[-1] != mask.shape[-2]:
        return None
    size = int(mask[0, 0, 0].sum())
    blocks = torch.arange(mask.shape[-1]) // size
    same = torch.equal(mask[0, 0], blocks[:, None] == blocks[None, :])
    return {"size": size} if same and mask.shape[-1] % size == 0 else None


def in_blocks(query, key, value, mask, bias, sinks, call, details):
    batch, heads, tokens, width = query.shape
    q, k, v = (t.unflatten(2, (-1, details["size"])).transpose(1, 2).flatten(0, 1)
               for t in (query, key, value))  # fmt: skip
    out = scaled_dot_product_attention(q, k, v, scale=call.scale)
    return out.transpose(1, 2).reshape(batch, tokens, heads, width)


def test_attention_in_blocks_makes_no_scores_between_them():
    model, x = BlockAttention().eval(), torch.randn(2, 64, 32)
    plain = fuse(model, x, backends=("aten",))
    seen = []

    def watched(query, *args, **kwargs):
        seen.append(query.shape)
        return in_blocks(query, *args, **kwargs)

    register_attention_variant("block diagonal", block_diagonal, watched)
    try:
        fused = fuse(model, x, backends=("aten",))
        model.mask[0, 0, 0, -1] = True
        other = fuse(model, x, backends=("aten",))
    finally:
        unregister_attention_variant("block diagonal")
    core = next(g for g in fused.report.subgraphs if g.kind == kinds.CORE)
    assert core.backend == "attention variant block diagonal" and seen
    assert next(g for g in plain.report.subgraphs if g.kind == kinds.CORE).backend == "aten"
    assert next(g for g in other.report.subgraphs if g.kind == kinds.CORE).backend == "aten"


def test_a_form_that_refuses_runs_as_common_attention():
    register_attention_variant(
        "never", lambda found, module: {}, with_bias, lambda call, details: "not today"
    )
    try:
        fused = fuse(graphs.model("vit"), backends=("aten",))
    finally:
        unregister_attention_variant("never")
    core = next(g for g in fused.report.subgraphs if g.kind == kinds.CORE)
    assert core.backend == "aten" and core.refused == {"attention variant never": "not today"}


# A rule and a back end: tanh of a projection's result, in place.


def test_a_rule_and_a_back_end_of_ones_own():
    def propose(graph, claims):
        for node in graph.nodes:
            if name_of(node) == "tanh" and name_of(node.args[0]) == "linear":
                yield FusionGroup("tanh linear", [node.args[0], node])

    class TanhLinear(nn.Module):
        def forward(self, x, weight, bias):
            return torch.addmm(bias, x, weight.t()).tanh_()

    register_fusion_rule("tanh linear", propose, order=1)
    register_backend(
        "tanh", 40, lambda site: None if site.group.kind == "tanh linear" else "no tanh",
        lambda site: TanhLinear(),
    )  # fmt: skip
    try:
        fused = fuse(graphs.model("vit"))
    finally:
        unregister_fusion_rule("tanh linear")
        unregister_backend("tanh")
    group = next(g for g in fused.report.subgraphs if g.kind == "tanh linear")
    assert group.backend == "tanh" and fused.measure()["fused"]["operators"]["tanh_"] == 1
    assert any(g.refused.get("tanh") == "no tanh" for g in fused.report.subgraphs)
    with pytest.raises(FusionError, match="tanh"):
        fuse(graphs.model("vit"), backends=("tanh",))


# blocks, projections side by side, epilogues and norms that native kernels take
NATIVE = {
    "vit": {kinds.BLOCK: 2}, "bert": {kinds.BLOCK: 2}, "llama": {kinds.NORM: 3, kinds.PARALLEL: 4},
    "t5": {kinds.NORM: 8, kinds.EPILOGUE: 4}, "gpt_neox": {kinds.EPILOGUE: 2},
    "positions": {kinds.BLOCK: 2},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mask"),
    [(name, name != "vit") for name in NATIVE] + [("bert", False), ("positions", False)],
)
def test_native_kernels_run_what_they_can(name, mask):
    fused = fuse(graphs.model(name), graphs.examples(name, mask), mask=mask)
    for kind, count in NATIVE[name].items():
        ran = [g for g in fused.report.subgraphs if g.kind == kind and g.backend == "native"]
        assert len(ran) == count, kind
    measured = fused.measure()
    library = graphs.fused(name, mask).measure()["fused"]["kernels"]
    assert measured["fused"]["kernels"] < library
    if name in ("vit", "bert"):
        assert measured["fused"]["kernels"] < 0.5 * measured["model, eager"]["kernels"]
    assert not fused.stats.refused
    graphs.fused(name, mask).stats.clear()


def _encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, **{"batch_first": True, **options})
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


CAUSAL = torch.full((7, 7), -torch.inf).triu(1)
PADDING = torch.arange(7) >= torch.tensor([[7], [5], [2]])
HIDDEN = torch.zeros(3, 7).masked_fill(PADDING, -torch.inf)


@pytest.mark.parametrize(
    ("options", "masks", "layers"),
    [({}, {}, 2), ({"norm_first": True}, {}, 2), ({"bias": False}, {}, 2),
     ({"activation": "gelu"}, {"src_key_padding_mask": PADDING}, 2),
     ({}, {"mask": CAUSAL, "is_causal": False}, 2),
     ({}, {"mask": CAUSAL, "is_causal": False, "src_key_padding_mask": HIDDEN}, 0),
     ({"batch_first": False}, {}, 0)],
)  # fmt: skip
def test_layers_of_torch_encoders_are_one_call(options, masks, layers):
    model, x = _encoder(**options), torch.randn(3, 7, 32)
    if not options.get("batch_first", True):
        x = x.transpose(0, 1).contiguous()
    fused = fuse(model, {"src": x, **masks}, dynamic="mask" not in masks)
    blocks = [g for g in fused.report.subgraphs if g.kind == kinds.BLOCK and g.backend == "native"]
    assert len(blocks) == layers
    assert (fused(src=x, **masks) - model(src=x, **masks)).abs().max() < 5e-6
    assert fused.stats.fused == 1


class Added(nn.Module):
    """A residual around a linear, which may have no bias, and a norm after it."""

    def __init__(self, width, bias):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, 40, bias=bias), nn.LayerNorm(40)

    def forward(self, x, y):
        x = x + self.linear(y)
        return x, self.norm(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "joined"), [(40, True), (24, True), (41, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_and_its_residual_are_one_library_operator(bias, width, joined, dtype):
    module = Added(width, bias).eval().to(dtype)
    inputs = {"x": torch.randn(3, 5, 40, dtype=dtype), "y": torch.randn(3, 5, width, dtype=dtype)}
    fused = fuse(module, inputs, backends=("aten",))
    operators = fused.measure()["fused"]["operators"]
    expected = {"_linear_pointwise", "native_layer_norm"}
    if dtype == torch.bfloat16:  # a library operator where oneDNN has it
        joined = joined and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (set(operators) == expected) is joined and operators["native_layer_norm"] == 1
    exact = Added(width, bias).double()
    exact.load_state_dict(module.state_dict())
    with torch.no_grad():
        stock, got = module(**inputs), fused(**inputs)
        want = exact(**{name: tensor.double() for name, tensor in inputs.items()})
    for ours, theirs, truth in zip(got, stock, want, strict=True):
        allowed = 2 * float((theirs - truth).abs().max()) + 2 * torch.finfo(dtype).eps
        assert float((ours - truth).abs().max()) <= allowed
    with torch.backends.mkldnn.flags(enabled=False):
        operators = fuse(module, inputs, backends=("aten",)).measure()["fused"]["operators"]
    assert "_linear_pointwise" not in operators


def test_layers_that_are_not_one_call_say_why():
    notes = " ".join(fuse(graphs.model("t5"), shapes=1).report.notes)
    assert "6 layers are not one call: the attention has a bias" in notes


class Residual(nn.Module):
    """Two regions of one form."""

    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(16, 8), nn.Linear(16, 8)])
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])

    def forward(self, x):
        for linear, norm in zip(self.linears, self.norms):
            x = norm(x + linear(torch.cat([x, x], -1)))
        return x


def test_compiled_regions():
    fused = fuse(Residual().eval(), torch.randn(2, 3, 8), backends=("inductor", "aten"))
    regions = [g for g in fused.report.subgraphs if g.backend == "inductor"]
    assert [g.kind for g in regions] == [kinds.NORM_RESIDUAL] * 2
    operators = fused.measure()["fused"]["operators"]
    assert operators.pop("compiled region") == 2 and set(operators) == {"addmm", "cat"}
    compiled = {id(m._compiled) for m in fused.graph.modules() if isinstance(m, Region)}
    assert len(compiled) == 1, "regions of one form are compiled once"


def test_calls_in_generated_code_are_counted():
    code = """
cpp_fused_add_0 = async_compile.cpp_pybinding(['const float*'], '''void kernel(const float*)''')
def call(self, args):
    # extern_kernels.mm(
    cpp_fused_add_0(buf0, buf1)
    extern_kernels.addmm(arg0, buf1, out=buf2)
    buf3 = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(buf2, buf2, buf2)
    return (buf3, )
"""
    assert calls_in(code) == 3
