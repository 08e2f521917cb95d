"""Calls of a fused model that its graph cannot answer: the model runs, the reason is counted."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import graphs
import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_fusion import FusionError, Reason
from hf_fusion.transform import FusedModel, fuse
from hf_fusion.transform.inputs import example_inputs


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    with torch.no_grad():
        yield


def _ids():
    return torch.randint(5, 99, (2, 6), generator=torch.Generator().manual_seed(0))


def _scaled(model):
    for parameter in model.parameters():
        parameter.mul_(1.5)


def _stepped(model):
    with torch.enable_grad():
        model(_ids())[0].pow(2).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def _hooked(model):
    model.encoder.layer[0].register_forward_hook(lambda module, args, out: out * 2)


def _replaced(model):
    model.encoder.layer[1].output.dense = nn.Linear(64, 32)


def _own_forward(model):
    dense = model.encoder.layer[1].output.dense
    dense.forward = lambda x: nn.functional.linear(x, -dense.weight)


def _shorter(model):
    del model.encoder.layer[1]


def _switched(model):
    model.config.return_dict = False


def _other_epsilon(model):
    model.encoder.layer[0].output.LayerNorm.eps = 1.0


CHANGES = {
    "weights": (_scaled, Reason.CHANGED),
    "optimizer": (_stepped, Reason.CHANGED),
    "train": (lambda model: model.train(), Reason.TRAINING),
    "part in training": (lambda model: model.encoder.layer[0].train(), Reason.TRAINING),
    "hook": (_hooked, Reason.HOOKS),
    "submodule": (_replaced, Reason.CHANGED),
    "forward": (_own_forward, Reason.CHANGED),
    "layers": (_shorter, Reason.CHANGED),
    "cast": (lambda model: model.to(torch.bfloat16), Reason.CHANGED),
    "cast and back": (lambda model: model.to(torch.bfloat16).float(), Reason.CHANGED),
    "epsilon": (_other_epsilon, Reason.CHANGED),
    "switch": (_switched, Reason.CHANGED),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_was_changed_runs_itself(name):
    change, reason = CHANGES[name]
    model = copy.deepcopy(graphs.model("bert"))
    fused = fuse(model, shapes=1)
    ids = _ids()
    fused(ids)
    change(model)
    torch.manual_seed(0)
    want = model(ids)
    torch.manual_seed(0)
    got = fused(ids)
    assert type(got) is type(want) and graphs.furthest(got, want) == 0
    assert fused.stats.refused == {reason.value: 1}


def _config(scale, shift):
    inner = transformers.PretrainedConfig(shift=shift)
    return transformers.PretrainedConfig(scale=scale, inner=inner)


class Configured(nn.Module):
    """Reads what it does from a configuration, which no attention does, and from attributes."""

    def __init__(self):
        super().__init__()
        self.config = _config(2.0, 1)
        self.linear, self.act, self.power = nn.Linear(8, 8), torch.tanh, 1

    def forward(self, x):
        y = self.act(self.linear(x) * self.config.scale + self.config.inner.shift) ** self.power
        return (y, x) if self.config.output_hidden_states else y


@pytest.mark.parametrize(
    ("path", "value"),
    [("config.scale", 3.0), ("config.inner.shift", 2), ("config.output_hidden_states", True),
     ("act", torch.sigmoid), ("power", 3), ("power", torch.arange(8)), ("linear.eps", 1),
     ("config", _config(1.0, 5))],
)  # fmt: skip
def test_configurations_and_attributes_that_were_changed_are_read(path, value):
    model, x = Configured().eval(), torch.randn(2, 13, 8)
    fused = fuse(model, x, shapes=1)
    owner, _, name = path.rpartition(".")
    setattr(functools.reduce(getattr, filter(None, owner.split(".")), model), name, value)
    assert graphs.furthest(fused(x), model(x)) < 1e-6
    assert fused.stats.refused == ({} if name == "eps" else {Reason.CHANGED.value: 1})


def test_saving_a_model_is_no_change_of_it(tmp_path):
    model = copy.deepcopy(graphs.model("vit"))
    model.config.architectures = model.config.dtype = None
    fused = fuse(model, shapes=1)
    model.save_pretrained(tmp_path)
    fused(**example_inputs(model))
    assert model.config.architectures and not fused.stats.refused


def test_a_change_taken_back_is_none():
    model = copy.deepcopy(graphs.model("bert"))
    fused = fuse(model, shapes=1)
    handle = model.pooler.register_forward_hook(lambda module, args, out: out * 2)
    model.train()
    model.eval()
    model.config.return_dict = False
    fused(_ids())
    model.config.return_dict = True
    handle.remove()
    # the hooks that transformers collects hidden states by stay in the model
    assert fused(_ids(), output_hidden_states=True).hidden_states
    fused.stats.clear()
    fused(_ids())
    assert fused.stats.fused == 1 and not fused.stats.refused


def _embeds():
    return torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def frozen():
    """A BERT without trained parameters, fused for embeddings, and its model."""
    model = copy.deepcopy(graphs.model("bert")).requires_grad_(False)
    return fuse(model, {"inputs_embeds": _embeds()}, shapes=1), model


def test_gradients_of_inputs_are_the_model_s(frozen, tmp_path):
    fused, _ = frozen
    fused.save(tmp_path)
    loaded, x = FusedModel.load(tmp_path), _embeds().requires_grad_()
    assert not fused(inputs_embeds=x)[0].requires_grad
    fused.stats.clear()
    with torch.enable_grad():
        fused(inputs_embeds=x)[0].sum().backward()
        with pytest.raises(FusionError, match="no backward") as caught:
            loaded(inputs_embeds=x)
    assert x.grad is not None and fused.stats.refused == {Reason.GRADIENTS.value: 1}
    assert caught.value.reason is Reason.GRADIENTS
    fused.stats.clear()


def test_modes_and_transforms_are_the_model_s(frozen):
    fused, model = frozen
    x = _embeds()
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(inputs_embeds=x)[0].dtype == model(inputs_embeds=x)[0].dtype
    rows = torch.func.vmap(lambda row: fused(inputs_embeds=row[None])[0][0])(x)
    assert graphs.furthest(rows, fused(inputs_embeds=x)[0]) < 1e-5
    with FlopCounterMode(display=False) as flops:
        fused(inputs_embeds=x)
    assert flops.get_total_flops() > 0
    assert fused.stats.refused == {
        reason.value: 1 for reason in (Reason.AUTOCAST, Reason.FUNCTORCH, Reason.TORCH_MODE)
    }
    fused.stats.clear()
    with torch.device("cpu"):
        fused(inputs_embeds=x)
    assert not fused.stats.refused
    fused.stats.clear()


@pytest.mark.parametrize(
    "change",
    [lambda f: f.to(torch.bfloat16), lambda f: f.half(), lambda f: nn.Sequential(f).double(),
     lambda f: f.to("meta"), copy.copy, copy.deepcopy, pickle.dumps,
     lambda f: torch.save(f, io.BytesIO()), lambda f: f.share_memory()],
)  # fmt: skip
def test_casts_and_copies_are_refused_and_leave_the_model_alone(frozen, change):
    fused, model = frozen
    with pytest.raises(FusionError) as caught:
        change(fused)
    assert caught.value.reason is Reason.CAPTURED
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert fused.to(torch.float32).eval() is fused
    fused(inputs_embeds=_embeds())
    assert not fused.stats.refused


@pytest.mark.parametrize(
    ("reason", "call"),
    [(Reason.UNKNOWN_BACKEND, lambda m: fuse(m, backends=("nope",))),
     (Reason.UNKNOWN_BACKEND, lambda m: fuse(m, backends="aten")),
     (Reason.OUT_OF_RANGE, lambda m: fuse(m, {"input_ids": _ids() + 1000})),
     (Reason.ARGUMENT, lambda m: fuse(m, shapes=1).measure(rounds=-1)),
     (Reason.ARGUMENT, lambda m: fuse(m, shapes=1).measure(rounds=1.5)),
     (Reason.ARGUMENT, lambda m: fuse(m, shapes=1).measure(against=("sdpa", "spda"))),
     (Reason.ARGUMENT, lambda m: fuse(m, shapes=1).measure(against="sdpa")),
     (Reason.ARGUMENT, lambda m: fuse(m, shapes=1).save(__file__)),
     (Reason.INPUT, lambda m: fuse(m, shapes=1).measure(_ids()))],
)  # fmt: skip
def test_values_that_are_not_accepted_are_one_error(reason, call):
    with pytest.raises(FusionError) as caught:
        call(graphs.model("bert"))
    assert caught.value.reason is reason


def test_a_configuration_without_a_longest_sequence_is_no_length_of_minus_one():
    config = transformers.XLNetConfig(vocab_size=99, d_model=32, n_layer=1, n_head=4, d_inner=64)
    assert example_inputs(transformers.XLNetModel(config))["input_ids"].shape == (2, 13)


def test_strict_raises_and_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("HF_FUSION_STRICT", "1")
    fused = fuse(graphs.model("bert"), shapes=1)
    with pytest.raises(FusionError, match="int32"):
        fused(_ids().int())
    fused.strict = False
    assert fused(_ids().int())[0].shape == (2, 6, 32)
    assert fused.stats.refused == {Reason.DTYPE.value: 2}
