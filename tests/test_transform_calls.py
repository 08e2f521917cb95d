"""Calls of a fused model that its graph cannot answer: the model runs, and the reason is counted."""

from __future__ import annotations

import copy

import graphs
import pytest
import torch
from torch import nn

from hf_fusion import Reason
from hf_fusion.transform import fuse


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
