"""What a fused model was captured for: masks, sizes, arguments; and the model left as it was."""

from __future__ import annotations

import itertools
import json

import graphs
import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import hf_fusion
from hf_fusion import FusionError
from hf_fusion.transform import FusedModel, fuse
from hf_fusion.transform.capture import capture
from hf_fusion.transform.inputs import like
from hf_fusion.transform.model import arguments_of


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    with torch.no_grad():
        yield


def test_registries_are_as_they_were():
    registries = [AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping]
    hf_fusion.register_attention()
    before = [dict(registry) for registry in registries]
    fuse(graphs.model("bert"), shapes=1)
    assert [dict(registry) for registry in registries] == before
    assert hf_fusion.register_attention()


OWN = {"MPNet": {}, "RoFormer": {}, "Bloom": {"n_head": 4}, "Falcon": {}}


@pytest.mark.parametrize("name", OWN)
def test_models_with_attention_of_their_own_are_padded_as_they_pad(name):
    torch.manual_seed(0)
    sizes = graphs.SIZES | {"vocab_size": 99} | OWN[name]
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
    ids, seen = torch.randint(5, 99, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    fused = fuse(model.eval(), {"input_ids": ids, "attention_mask": seen}, backends=("aten",))
    assert fused.report.road == "export"
    seen[0, 4:] = 0
    want = model(input_ids=ids, attention_mask=seen, **fused.captured.signature.defaults)
    got = fused(input_ids=ids, attention_mask=seen)
    assert graphs.furthest(want, got) < 5e-6 and fused.stats.fused == 1


@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.bool])
def test_masks_that_hide_nothing_are_drawn_with_padding(kind):
    drawn = like("attention_mask", torch.ones(2, 7, dtype=kind), (3, 6), torch.Generator())
    assert drawn.dtype == kind and drawn.sum(1).tolist() == [4, 6, 5]
    assert drawn[0].tolist() == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("head", ["SequenceClassification", "MaskedLM", "QuestionAnswering"])
def test_arguments_may_go_through_open_ended_parameters(head):
    config = transformers.BertConfig(**graphs.SIZES, vocab_size=99)
    model = getattr(transformers, f"BertFor{head}")(config).eval()
    fused, ids = fuse(model, backends=("aten",), shapes=1), torch.randint(5, 99, (3, 6))
    assert graphs.furthest(model(input_ids=ids), fused(input_ids=ids)) < 5e-6
    assert fused.stats.fused == 1


def test_an_encoder_alone_is_given_no_decoder_input():
    config = transformers.LongT5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4
    )
    fused = fuse(transformers.LongT5EncoderModel(config).eval(), mask=True, backends=("aten",))
    assert fused.captured.signature.arguments == ["input_ids", "attention_mask", "use_cache"]
    assert max(fused.report.errors) < 5e-6


def test_hidden_states_asked_for_are_given():
    model, ids = graphs.model("bert"), torch.randint(5, 99, (2, 7))
    given = {"output_hidden_states": True, "input_ids": ids, "token_type_ids": ids % 2}
    fused = fuse(model, given, backends=("aten",), shapes=1)
    got = fused(**given)
    assert len(got.hidden_states) == 3 and graphs.furthest(model(**given), got) < 5e-6
    assert fused.stats.fused == 1


class Scaled(nn.Module):
    """A scale of 2 where none is given, of 3 where it is given as None."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, scale=2.0, shift=None):
        y = self.linear(x) * (3.0 if scale is None else scale)
        return y if shift is None else y + shift


def test_none_is_an_argument_where_it_is_no_default(tmp_path):
    model, x = Scaled().eval(), torch.randn(2, 13, 8)
    fused = fuse(model, x, backends=("aten",))
    assert graphs.furthest(model(x, None), fused(x, scale=None)) == 0 and not fused.stats.fused
    assert graphs.furthest(model(x), fused(x, shift=None)) < 1e-6 and fused.stats.fused == 1
    none = fuse(model, {"x": x, "scale": None}, backends=("aten",))
    none.save(tmp_path)
    for called in (none, FusedModel.load(tmp_path, ("aten",))):
        assert graphs.furthest(model(x, None), called(x, scale=None)) < 1e-6
        assert called.stats.fused == 1
    assert graphs.furthest(model(x), none(x)) == 0 and none.stats.fused == 1


def test_one_tensor_for_several_arguments_is_one_in_every_call(tmp_path):
    model = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    q, k, v = torch.randn(3, 2, 5, 16)
    fused = fuse(model, (q, q, q), backends=("aten",))
    assert graphs.furthest(model(q, k, v), fused(q, k, v)) == 0 and not fused.stats.fused
    assert graphs.furthest(model(v, v, v), fused(v, v, v)) < 1e-6 and fused.stats.fused == 1
    fused.save(tmp_path)
    loaded = FusedModel.load(tmp_path, ("aten",))
    assert graphs.furthest(fused(v, v, v), loaded(v, v, v)) < 1e-6
    with pytest.raises(FusionError, match="another tensor than query"):
        loaded(q, k, v)
    loaded(**arguments_of(loaded))


@pytest.mark.parametrize("count", [0, -1, "3", 1.5, None])
def test_a_graph_is_verified_at_one_shape_or_more(count):
    with pytest.raises(FusionError, match="expected 1 or more"):
        fuse(graphs.model("bert"), shapes=count)


class Keeps(nn.Module):
    """Keeps a table in an attribute, a buffer and a dict when it is first called."""

    def __init__(self, fails=False):
        super().__init__()
        self.linear, self.kept, self.fails = nn.Linear(8, 8), {}, fails
        self.register_buffer("base", torch.rand(8))

    def forward(self, x):
        if not hasattr(self, "table"):
            self.table = self.kept["table"] = self.base * 2
            self.register_buffer("other", self.base + 1)
        if self.fails and x.sum() > 0:
            return x
        return self.linear(x) + self.table * self.kept["table"] + self.other


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize("fails", [False, True])
def test_what_a_forward_keeps_is_not_what_was_traced(fails):
    model, x = Keeps(fails).eval(), torch.rand(2, 13, 8)
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    if fails:
        with pytest.raises(FusionError, match="without branches on values"):
            capture(model, x)
    else:
        captured = capture(model, x)
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == before
    assert not model.kept and list(model._buffers) == ["base"]
    if not fails:
        assert graphs.furthest(model(x), captured.graph_module(x)) < 1e-6
        assert type(model.table) is torch.Tensor


class Branches(nn.Module):
    """Branches on the length, takes the first eight, and wants lengths that three does not divide.

    written: with a write through a view, for which the graph is traced again.
    """

    def __init__(self, written=False):
        super().__init__()
        self.linear, self.written = nn.Linear(8, 8), written

    def forward(self, x):
        y = self.linear(x)
        if self.written:
            y[:, 0].add_(1.0)
        y = y * 2 if x.shape[1] > 8 else y
        if x.shape[1] % 3 == 0 or x.shape[0] * x.shape[1] > 60:
            y = y + 1
        return y, y[:, :10].sum(1)


@pytest.mark.parametrize("written", [False, True])
def test_sizes_that_the_graph_was_not_traced_for_run_the_model(written, tmp_path):
    model, x = Branches(written).eval(), torch.randn(2, 13, 8)
    fused = fuse(model, x, backends=("aten",))
    assert len(set(fused.report.shapes)) == 3
    fused.save(tmp_path)
    loaded = FusedModel.load(tmp_path, ("aten",))
    for rows, length in itertools.product((1, 2, 3, 9), (2, 8, 9, 10, 11, 12, 13, 30, 31, 61)):
        x, right = torch.randn(rows, length, 8), length % 3 and rows * length <= 60 and length > 10
        fused.stats.clear()
        assert graphs.furthest(model(x), fused(x)) < 1e-6, (rows, length)
        assert fused.stats.fused == bool(right) != bool(fused.stats.refused)
        if right:
            assert graphs.furthest(model(x), loaded(x)) < 1e-6
        else:
            with pytest.raises(FusionError, match=r"x.shape\[1\] is .*, expected .*x.shape\[1\]"):
                loaded(x)


@pytest.mark.parametrize("changed", [[["gt", "x", 1]], [["exec", 1, 2]], [["gt", 1]], ["gt"], 1])
def test_conditions_of_another_form_are_refused(changed, tmp_path):
    fuse(Scaled().eval(), torch.randn(2, 13, 8), backends=("aten",), shapes=1).save(tmp_path)
    described = json.loads((tmp_path / "graph.json").read_text())
    described["signature"]["conditions"] = changed
    (tmp_path / "graph.json").write_text(json.dumps(described))
    with pytest.raises(FusionError, match="no graph that save wrote"):
        FusedModel.load(tmp_path)


def test_positions_that_restart_are_packed_only_without_a_cache():
    """transformers separates what they pack where there is no cache, and makes one by default."""
    model, ids = graphs.model("llama"), torch.randint(5, 99, (1, 8))
    places = torch.arange(8)[None]
    fused = fuse(
        model, {"input_ids": ids, "position_ids": places}, backends=("aten",), shapes=1
    )
    for given, options, reasons in (
        (places, {}, {}),
        (places % 4, {"use_cache": False}, {}),
        (places % 4, {}, {"packed sequences": 1}),
    ):
        call = {"input_ids": ids, "position_ids": given, **options}
        with torch.no_grad():
            off = fused(**call).logits - model(**call).logits
        assert off.abs().max() < 5e-6 and fused.stats.refused == reasons


def test_positions_end_where_their_table_does():
    config = transformers.BertConfig(**graphs.SIZES, vocab_size=99, max_position_embeddings=14)
    model = transformers.BertModel(config).eval()
    fused, ids = fuse(model, backends=("aten",)), torch.randint(5, 99, (2, 14))
    assert fused.report.shapes == ["2x13", "1x14", "3x11"]
    assert graphs.furthest(model(ids), fused(ids)) < 5e-6 and fused.stats.fused == 1
    with pytest.raises((RuntimeError, IndexError)):
        fused(torch.randint(5, 99, (2, 15)))
    assert fused.stats.refused == {"unexpected shape": 1}


class Single(nn.Module):
    """Does something else with one row, or with a length of one."""

    def __init__(self, dim):
        super().__init__()
        self.linear, self.dim = nn.Linear(8, 8), dim

    def forward(self, x):
        return self.linear(x) * (2 if x.shape[self.dim] == 1 else 1)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_size_of_one_is_taken_where_the_graph_is_right_for_it(dim):
    model = Single(dim).eval()
    fused = fuse(model, torch.randn(2, 13, 8), backends=("aten",), shapes=1)
    for rows, length in ((1, 5), (3, 1)):
        x, right = torch.randn(rows, length, 8), (rows, length)[dim] != 1
        fused.stats.clear()
        assert graphs.furthest(model(x), fused(x)) < 1e-6 and fused.stats.fused == right


class Lowered(nn.Module):
    """Layers in bf16, a norm in fp32, as mixed models have them."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 256).bfloat16(), nn.Linear(256, 64).bfloat16()
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(self.down(nn.functional.gelu(self.up(x))).float())


def test_parameters_of_several_types_are_verified():
    torch.manual_seed(0)
    fused = fuse(Lowered().eval(), torch.randn(2, 5, 64).bfloat16())
    assert len(fused.report.errors) == 3


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min, -65504.0])
def test_additive_masks_are_drawn_as_they_are(hidden):
    causal = torch.full((7, 7), hidden).triu(1)
    grown = like("mask", causal, (12, 12), torch.Generator())
    assert torch.equal(grown, torch.full((12, 12), hidden).triu(1))
    fused = fuse(
        graphs.model("llama"),
        {"input_ids": torch.randint(5, 99, (2, 7)), "attention_mask": causal.expand(2, 1, 7, 7)},
        backends=("aten",), shapes=2,
    )  # fmt: skip
    assert max(fused.report.errors) < 5e-6
    padding = torch.zeros(2, 1, 1, 7)
    padding[0, ..., 4:] = hidden
    drawn = like("mask", padding, (3, 1, 1, 5), torch.Generator())
    assert torch.equal(drawn[..., 0, :].sum((1, 2)), torch.tensor([hidden, 0, hidden]))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("layers", [0, 2])
def test_float_padding_that_is_finite_is_taken_as_torch_takes_it(layers, activation):
    """Its fast path, which only has relu and gelu, hides by it; otherwise it is added."""
    torch.manual_seed(0)
    activation = nn.functional.relu if activation == "relu" else torch.tanh
    layer = nn.TransformerEncoderLayer(16, 4, 32, activation=activation, batch_first=True)
    encoder = nn.TransformerEncoder(layer, layers or 1, enable_nested_tensor=False)
    model = encoder.eval() if layers else layer.eval()
    padding = torch.zeros(2, 7)
    padding[0, 5:] = -torch.inf
    fused = fuse(model, {"src": torch.randn(2, 7, 16), "src_key_padding_mask": padding}, shapes=1)
    for hidden in (-torch.inf, -1.0):
        given = {"src": torch.randn(2, 7, 16), "src_key_padding_mask": (padding < 0) * hidden}
        given["src_key_padding_mask"].nan_to_num_(0.0, neginf=-torch.inf)
        with torch.no_grad():
            assert graphs.furthest(model(**given), fused(**given)) < 5e-6, hidden
    assert fused.stats.fused == 2


@pytest.mark.parametrize("first", [True, False])
def test_an_encoder_that_is_causal_is_verified_with_causal_masks(first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=first)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 7, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(7 if first else 2)
    given = {"src": x, "mask": mask, "is_causal": True}
    fused = fuse(model, given, backends=("aten",))
    assert max(fused.report.errors) < 5e-6
    assert graphs.furthest(model(**given), fused(**given)) < 5e-6 and fused.stats.fused == 1


def test_a_model_that_fails_at_other_sizes_says_so():
    class Fails(Scaled):
        def forward(self, x):
            if not torch.compiler.is_exporting() and x.shape[1] != 13:
                raise RuntimeError("thirteen")
            return self.linear(x)

    with pytest.raises(FusionError, match="the model itself fails: RuntimeError: thirteen"):
        fuse(Fails().eval(), torch.randn(2, 13, 8), backends=("aten",))


def test_rows_that_see_no_key_are_alike_at_both_levels():
    model, ids = graphs.model("llama"), torch.randint(5, 99, (2, 7))
    model.set_attn_implementation("sdpa")
    left = torch.ones(2, 7, dtype=torch.int64)
    left[0, :3] = 0
    want = model(ids, attention_mask=left, use_cache=False)
    for level in ("semantic", "explicit"):
        fused = fuse(model, mask=True, level=level, backends=("eager",), shapes=1)
        assert graphs.furthest(want, fused(ids, attention_mask=left)) < 5e-6, level
        assert fused.stats.fused == 1


@pytest.mark.parametrize("name", ["bart", "mistral", "t5"])
def test_the_operator_asks_nothing_of_free_sizes(name):
    assert not graphs.fused(name).captured.signature.conditions


def test_sizes_are_held_to_the_example_where_a_condition_has_no_form():
    class Root(Scaled):
        def forward(self, x):
            return self.linear(x) * (2 if x.shape[1] ** 0.5 > 3 else 1)

    model = Root().eval()
    fused = fuse(model, torch.randn(2, 13, 8), backends=("aten",))
    assert fused.report.shapes == ["2x13x8", "1x13x8", "3x13x8"]
    for length in (13, 14, 5):
        x = torch.randn(4, length, 8)
        assert graphs.furthest(model(x), fused(x)) < 1e-6
    assert fused.stats.fused == 1 and fused.stats.refused == {"unexpected shape": 2}
