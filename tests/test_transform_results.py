"""Results of a fused model: memory of their own where the model's have it, the same layout; and
how they are compared before a graph is handed out.
"""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

from hf_fusion import FusionError, Reason
from hf_fusion.transform import FusedModel, fuse


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    with torch.no_grad():
        yield


class Body(nn.Module):
    """Two projections, a parameter and a buffer; what is returned is `made(module, x)`."""

    def __init__(self, made):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.made = nn.Linear(8, 8), nn.Linear(8, 8), made
        self.scale = nn.Parameter(torch.randn(8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        return self.made(self, x)


def silu(x):
    return nn.functional.silu(x)


def facts(output, owners):
    """Per tensor its shape, type, layout, and which earlier tensor or owner has its memory."""
    found, seen = [], {t.untyped_storage().data_ptr(): name for name, t in owners}
    for tensor in graphs.tensors(output):
        here = tensor.untyped_storage().data_ptr()
        found.append((tensor.shape, tensor.dtype, tensor.is_contiguous(), type(tensor),
                      seen.get(here) if tensor.numel() else None))  # fmt: skip
        seen.setdefault(here, len(found))
    return found


RESULTS = {
    "copies": lambda m, x: (m.a(x), x.clone(), x + 0, x * 1.0, x.to(x.dtype, copy=True)),
    "copies of parameters": lambda m, x: (m.a(x), m.scale.clone(), m.scale + 0),
    "views of copies": lambda m, x: (m.a(x), x.clone()[:, 0], x.clone().flatten(0, 1)),
    "copies for a layout": lambda m, x: (m.a(x).tanh(), x.transpose(1, 2).contiguous()),
    "columns": lambda m, x: [part.squeeze(-1).contiguous() for part in m.a(x).split(1, -1)],
    "the inputs": lambda m, x: (m.a(x), x, x[:, 0], x.to(x.dtype), m.scale),
    "projections": lambda m, x: {"q": m.a(x), "k": m.b(x), "first": m.a(x)[:, 0]},
    "projections, activated": lambda m, x: (m.a(x).relu(), m.b(x).tanh() * 2),
    "gated": lambda m, x: silu(m.a(x)) * m.b(x),
    "parts": lambda m, x: m.a(x)[..., :3].relu().tanh(),
    "one twice": lambda m, x: [(y := m.a(x)), y, y.flatten(0, 1), y.tanh()],
    "nothing": lambda m, x: (m.a(x), x[:, :0], None, x.shape[1], "text"),
    "complex": lambda m, x: (m.a(x), torch.fft.fft(m.b(x))),
}  # fmt: skip


@pytest.mark.parametrize("name", RESULTS)
def test_memory_and_layout_are_the_model_s(name, tmp_path):
    model, x = Body(RESULTS[name]).eval(), torch.randn(2, 13, 8)
    fused = fuse(model, x)
    fused.save(tmp_path)
    loaded = FusedModel.load(tmp_path)
    for shape in ((2, 13, 8), (3, 5, 8)):
        x = torch.randn(shape)
        owners = [("x", x), *model.named_parameters()]
        want = model(x)
        for called in (fused, loaded):
            got = called(x)
            assert called.stats.fused and pytree.tree_structure(got) == pytree.tree_structure(want)
            for a, b in zip(graphs.tensors(want), graphs.tensors(got), strict=True):
                assert torch.allclose(a, b, atol=1e-6)
        assert facts(fused(x), owners) == facts(want, owners)


def test_values_written_to_later_are_no_others_values():
    model, x = Body(RESULTS["copies of parameters"]).eval(), torch.randn(2, 13, 8)
    fused, before = fuse(model, x), model.scale.clone()
    for tensor in fused(x):
        tensor.zero_()
    assert torch.equal(model.scale, before) and fused(x)[0].any()


@pytest.mark.parametrize(
    "view", [lambda y: y.transpose(1, 2), lambda y: y[:, :3], lambda y: y.flatten(0, 1)]
)
def test_views_between_a_projection_and_its_activation_are_kept(view):
    model, x = Body(lambda m, x: view(m.a(x)).relu()).eval(), torch.randn(2, 13, 8)
    fused = fuse(model, x)
    assert graphs.furthest(fused(x), model(x)) < 1e-6 and fused.stats.fused == 1


def test_inputs_that_the_model_writes_to_are_compared_as_they_were():
    model, x = Body(lambda m, x: x.add_(1) + m.a(x)).eval(), torch.randn(2, 13, 8)
    before = x.clone()
    fused = fuse(model, x)
    assert torch.equal(x, before) and max(fused.report.errors) < 1e-5
    y = before.clone()
    assert graphs.furthest(fused(x), model(y)) < 1e-6 and torch.equal(x, y)


def test_random_numbers_are_drawn_as_the_model_draws_them():
    model, x = Body(lambda m, x: m.a(x) + torch.rand(8)).eval(), torch.randn(2, 13, 8)
    state = torch.get_rng_state()
    fused = fuse(model, x)
    assert torch.equal(torch.get_rng_state(), state) and max(fused.report.errors) < 1e-5
    found = [torch.manual_seed(3) and called(x) for called in (model, fused)]
    assert graphs.furthest(*found) < 1e-6


def test_a_model_that_writes_to_its_buffers_is_refused():
    model = Body(lambda m, x: (m.calls.add_(1), m.a(x))[1]).eval()
    with pytest.raises(FusionError, match="Body writes to its calls") as caught:
        fuse(model, torch.randn(2, 13, 8))
    assert caught.value.reason is Reason.CHANGED and model.calls == 0


def test_a_difference_that_nothing_can_judge_says_so():
    class Alone(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("one of a kind")

        def forward(self, x):
            shift = 0.0 if torch.compiler.is_exporting() else 1.0
            return super().forward(x) + shift

    with pytest.raises(FusionError, match="1.00e\\+00 from the model's.*one of a kind"):
        fuse(Alone(8, 8).eval(), torch.randn(2, 13, 8))


def test_a_model_without_values_is_refused():
    with pytest.raises(FusionError, match="no values to compare") as caught:
        fuse(nn.Linear(8, 8, device="meta").eval(), torch.empty(2, 13, 8, device="meta"))
    assert caught.value.reason is Reason.META
