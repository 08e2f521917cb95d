"""Fused models on disk, and where their weights lie in memory."""

from __future__ import annotations

import copy

import graphs
import pytest
import torch

from hf_fusion import FusionError, Reason
from hf_fusion.transform import FusedModel, fuse
from hf_fusion.transform.model import arguments_of


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    ("name", "level"), [(n, "semantic") for n in graphs.MODELS] + [("t5", "explicit")]
)
def test_saved_and_loaded(name, level, tmp_path):
    fused = graphs.fused(name)
    if level == "explicit":
        fused = fuse(
            graphs.model(name), graphs.examples(name), level=level, backends=("aten",), shapes=1
        )
    fused.save(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"graph.json", "weights.safetensors"}
    loaded, arguments = FusedModel.load(tmp_path / "model", ("aten",)), arguments_of(fused)
    got, want = loaded(**arguments), fused(**arguments)
    assert type(got) is type(want) and graphs.furthest(got, want) < 1e-6
    assert not loaded.stats.refused and not fused.stats.refused
    assert [g.kind for g in loaded.report.subgraphs] == [g.kind for g in fused.report.subgraphs]
    with pytest.raises(FusionError):
        loaded(nothing=1)
    fused.stats.clear()


@pytest.mark.parametrize(
    ("old", "new"),
    [('"aten::linear.default"', '"aten::system.default"'), ('"format": 2', '"format": 9'),
     ('"aten::linear.default"', '"os::system"'), ('"aten::gelu.default"', '"aten::relu.default"'),
     ('"transformers.modeling_outputs"', '"os"')],
)  # fmt: skip
def test_a_changed_file_is_refused(old, new, tmp_path):
    graphs.fused("vit").save(tmp_path)
    path = tmp_path / "graph.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(FusionError):
        FusedModel.load(tmp_path)
    with pytest.raises(FusionError):
        FusedModel.load(tmp_path / "absent")


def test_positional_arguments_follow_the_model_s_forward(tmp_path):
    model = graphs.model("bert")
    ids = torch.randint(5, 99, (2, 6))
    fused = fuse(model, {"input_ids": ids, "token_type_ids": ids % 2}, shapes=1)
    fused.save(tmp_path)
    loaded = FusedModel.load(tmp_path)
    want = model(ids, None, ids % 2)
    assert graphs.furthest(loaded(ids, None, ids % 2), want) < 5e-6
    for given in ((ids, ids % 2), (ids,) * 30):
        with pytest.raises(FusionError) as caught:
            loaded(*given)
        assert caught.value.reason is Reason.ARGUMENT
    with pytest.raises(FusionError, match="input_ids is given by position and by name"):
        loaded(ids, token_type_ids=ids % 2, input_ids=ids)


def test_packed_weights_are_views_and_may_be_shared():
    model = copy.deepcopy(graphs.model("llama"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    fused = fuse(model, shapes=1)
    source = fused.captured.graph_module
    packed = {m.weight.untyped_storage().data_ptr() for m in fused.graph.modules()
              if type(m).__name__ == "PackedLinear"}  # fmt: skip
    q = "model.layers.0.self_attn.q_proj.weight"
    assert len(packed) == 4 and fused.report.packed_bytes == 4 * 32 * 2 * (64 + 128)
    assert source.get_parameter(q).untyped_storage().data_ptr() in packed
    assert model.get_parameter(q).untyped_storage().data_ptr() not in packed
    shared = fuse(model, shapes=1, share_weights=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    ids = torch.randint(5, 99, (2, 6))
    model.get_parameter(q).data.mul_(2)
    assert graphs.furthest(model(ids, use_cache=False), shared(ids)) < 1e-6
    assert graphs.furthest(fused.graph(ids)[0], shared(ids).logits) > 1e-6
    # the model's parameters are others now
    assert fused(ids).past_key_values is not None and fused.stats.fused == 0
    assert not shared.stats.refused
