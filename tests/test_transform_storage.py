"""Fused models on disk, and where their weights lie in memory."""

from __future__ import annotations

import collections
import copy
import json
import shutil

import graphs
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

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


def _inserted(target, *args):
    """A change that calls `target` before the graph does anything else."""
    node = {"name": "made", "op": "call_function", "target": target, "args": {"tuple": args},
            "kwargs": {}}  # fmt: skip

    def change(described):
        described["nodes"].insert(1, node)

    return change


def _set(*path):
    """A change of the value at path[:-1] to path[-1]."""

    def change(described):
        *way, last, value = path
        for step in way:
            described = described[step]
        described[last] = value

    return change


def _renamed(described):
    node = next(node for node in described["nodes"] if node["op"] == "placeholder")
    node["target"] = "x=__import__('torch').__setattr__('hf_fusion_was_here', 1)"


def _power(*args):
    """A change by which the graph computes with numbers of Python first."""
    return _inserted("operator::pow", *args)


MARK = "torch.hf_fusion_was_here=1"
CHANGES = [
    _inserted("aten::manual_seed.default", 7), _inserted("aten::set_grad_enabled.default", False),
    _inserted("aten::from_file.default", "hf_fusion_victim", True, 64),
    _inserted("aten::save.default", None, "hf_fusion_victim"),
    _inserted("aten::rand.default", {"list": [2]}), _inserted("aten::add_.Tensor", 1, 2),
    _renamed, _set("nodes", 0, "target", "lambda x"), _set("nodes", 0, "name", "a b"),
    _set("nodes", 1, "target", f'a"); import torch; {MARK}; ("'),
    _set("nodes", -1, "args", {"a": 1}),
    _set("nodes", -2, "kwargs", {f"a=__import__('torch').__setattr__('{MARK[6:-2]}', 1), b": 1}),
    _set("nodes", None), _set("nodes", 0, "x"), _set("nodes", []), _set("format", "2"),
    _set("signature", "dtypes", [{"dtype": "nonsense"}]), _set("signature", "sizes", []),
    _set("signature", "dtypes", [{"dtype": "int32"}]), _set("signature", "structure", "[1,{}]"),
    _set("signature", "structure", "{"), _set("signature", "positional", 3),
    _power(7, 2**31), _power(2**64, 2), _power("a", 2), _inserted("operator::mul", "a", 2**40),
    _set("output", "[1, null]"), _set("output_modules", ["transformers.nope"]),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_changed_graph_says_it_is_refused_and_does_nothing(
    change, saved, tmp_path, monkeypatch
):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "graph.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))
    seed = torch.initial_seed()
    with pytest.raises(FusionError, match="graph.json"), torch.enable_grad():
        FusedModel.load(tmp_path)
    assert torch.initial_seed() == seed and not hasattr(torch, "hf_fusion_was_here")
    assert len(list(tmp_path.iterdir())) == 2


class Draws(nn.Module):
    """What `made` makes of a projection."""

    def __init__(self, made):
        super().__init__()
        self.linear, self.made = nn.Linear(8, 8), made

    def forward(self, x):
        return self.made(self.linear(x))


Pair = collections.namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    ("made", "what"),
    [(lambda y: nn.functional.dropout(y, 0.5, True), "dropout drops values at random"),
     (lambda y: y + torch.rand(8), "calls aten.rand.default"),
     (lambda y: Pair(y.tanh(), y.relu()), "nested as cannot be stored: .*Pair")],
)  # fmt: skip
def test_what_load_would_refuse_is_not_saved(made, what, tmp_path):
    fused = fuse(Draws(made).eval(), torch.randn(2, 13, 8), shapes=1)
    with pytest.raises(FusionError, match=what) as caught:
        fused.save(tmp_path / "model")
    assert caught.value.reason is Reason.ARGUMENT and not (tmp_path / "model").exists()


def test_numbers_read_out_of_tensors_are_read_by_what_was_loaded(tmp_path):
    fused = fuse(Draws(lambda y: y * y.sum().item()).eval(), torch.randn(2, 13, 8), shapes=1)
    fused.save(tmp_path)
    x = torch.randn(3, 5, 8)
    assert graphs.furthest(FusedModel.load(tmp_path)(x), fused(x)) < 1e-4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    fuse(graphs.model("bert"), shapes=1).save(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [("graph.json", b"\xff\xfe\x00"), ("graph.json", b"[" * 100000), ("graph.json", b"[1]"),
     ("weights.safetensors", b""), ("weights.safetensors", None)],
)  # fmt: skip
def test_files_that_cannot_be_read_are_named(name, content, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FusionError, match=name):
        FusedModel.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [lambda name, t: t * -30, lambda name, t: t * float("nan"), lambda name, t: t.double(),
     lambda name, t: t[:-1].contiguous(), lambda name, t: None],
)  # fmt: skip
@pytest.mark.parametrize("part", ["query.weight", "example.0", "expected.1"])
def test_changed_tensors_are_refused(change, part, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "weights.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(part)]:
        changed = change(name, tensors.pop(name))
        tensors |= {} if changed is None else {name: changed}
    save_file(tensors, path)
    with pytest.raises(FusionError, match="weights.safetensors"):
        FusedModel.load(tmp_path)


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
