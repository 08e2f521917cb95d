"""Graphs that look like what a kernel runs and are not: another back end takes them."""

from __future__ import annotations

import graphs
import pytest
import torch
from torch import nn

from hf_fusion.transform import fuse
from hf_fusion.transform import groups as kinds


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    with torch.no_grad():
        yield


class Rms(nn.Module):
    """A root-mean-square norm over `dim` of a projection, times a weight of `shape`."""

    def __init__(self, dim, shape):
        super().__init__()
        torch.manual_seed(0)
        self.dim, self.linear = dim, nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.rand(shape))

    def forward(self, x):
        y = self.linear(x)
        mean = y.pow(2).mean(self.dim, keepdim=True)
        return self.weight * (y * torch.rsqrt(mean + 1e-6))


class Layer(nn.Module):
    """A pre-norm layer; heads: how (B, 13, 8) becomes (B, 2, 13, 4); joined: the way back."""

    def __init__(self, heads, joined, alpha=1.0, mask=None):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.joined, self.alpha = heads, joined, alpha
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.register_buffer("mask", mask)

    def forward(self, x):
        h = self.first(x)
        q, k, v = (self.heads(part(h)) for part in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, self.mask)
        x = torch.add(x, self.o(self.joined(attended)), alpha=self.alpha)
        return x + self.down(self.up(self.second(x)).relu())


def _apart(t):
    return t.view(-1, 13, 2, 4).transpose(1, 2)


def _together(t):
    return t.transpose(1, 2).reshape(-1, 13, 8)


def _apart_interleaved(t):
    return t.view(-1, 13, 4, 2).permute(0, 3, 1, 2)


def _together_interleaved(t):
    return t.permute(0, 2, 3, 1).reshape(-1, 13, 8)


def _lowest(*rows):
    """An additive mask that gives all keys of some queries the lowest number."""
    mask = torch.where(SEEN, 0.0, torch.finfo(torch.float32).min)
    mask[..., rows, :] = torch.finfo(torch.float32).min
    return mask


SEEN = torch.ones(1, 1, 13, 13).tril().bool()
LAYERS = {
    "plain": (Layer(_apart, _together), True),
    "mask": (Layer(_apart, _together, mask=SEEN), True),
    "additive mask": (Layer(_apart, _together, mask=torch.where(SEEN, 0.0, -1e4)), True),
    "a query with the lowest number": (Layer(_apart, _together, mask=_lowest(2, 5)), True),
    "interleaved": (Layer(_apart_interleaved, _together), False),
    "interleaved after": (Layer(_apart, _together_interleaved), False),
    "alpha": (Layer(_apart, _together, alpha=0.5), False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_only_layers_like_the_kernel_s_are_one(name):
    model, whole = LAYERS[name]
    model, x = model.eval(), torch.randn(2, 13, 8)
    fused = fuse(model, x)
    found = {group.kind: group.backend for group in fused.report.subgraphs}
    assert found.get(kinds.BLOCK) == ("native" if whole else None)
    y = torch.randn(3, 13, 8)
    assert graphs.furthest(fused(y), model(y)) < 1e-5 and fused.stats.fused == 1


@pytest.mark.parametrize("name", ["dim", "one number", "a number for each row", "plain"])
def test_only_norms_like_the_kernel_s_are_native(name):
    arguments = {"dim": (1, 8), "one number": (-1, 1), "a number for each row": (-1, (13, 8))}
    model, x = Rms(*arguments.get(name, (-1, 8))).eval(), torch.randn(2, 13, 8)
    fused = fuse(model, x)
    native = [g for g in fused.report.subgraphs if g.kind == kinds.NORM and g.backend == "native"]
    assert len(native) == (name == "plain")
    assert graphs.furthest(fused(x), model(x)) < 1e-5 and fused.stats.fused == 1


class Overlapping(nn.Module):
    """Elementwise work on a tensor of which `view` shows elements several times."""

    def __init__(self, view):
        super().__init__()
        self.view, self.linear = view, nn.Linear(8, 8)

    def forward(self, x):
        return self.view(self.linear(x)).relu()


def expanded(y):
    return (y.mean(1, keepdim=True) * 2).expand(2, 13, 8) + y.tanh()


def unfolded(y):
    return (y * 2).unfold(2, 3, 1) * 3.0


def strided(y):
    return (y * 2).as_strided((2, 13, 6, 3), (104, 8, 1, 1)) * 3.0


@pytest.mark.parametrize("view", (expanded, unfolded, strided))
def test_elements_shown_several_times_are_not_written_over(view):
    model, x = Overlapping(view).eval(), torch.randn(2, 13, 8)
    fused = fuse(model, x, dynamic=False, shapes=1)
    assert graphs.furthest(fused(x), model(x)) < 1e-5 and fused.stats.fused == 1
