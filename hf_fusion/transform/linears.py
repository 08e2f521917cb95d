"""Projections as one call: side by side over a packed weight, or with what follows them."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear

from .attention import projection_input
from .nodes import VIEW, class_of, is_kernel, name_of
from .site import Site


class PackedLinear(nn.Module):
    """Several projections of one input as one product; results are views of its columns.

    `parts` are the rows of `weight` that belong to each projection, as views.
    """

    def __init__(self, weights: list[Tensor], biases: list[Tensor | None]):
        super().__init__()
        self.widths = [weight.shape[0] for weight in weights]
        self.weight = nn.Parameter(torch.cat([w.detach() for w in weights]), requires_grad=False)
        self.bias = None
        if any(bias is not None for bias in biases):
            filled = [
                weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()
                for weight, bias in zip(weights, biases, strict=True)
            ]
            self.bias = nn.Parameter(torch.cat(filled), requires_grad=False)
        self.fresh_results = (True,) * len(weights)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weight and bias."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)

    def parts(self) -> list[tuple[Tensor, Tensor | None]]:
        """(weight, bias) of each projection, as views of the packed ones."""
        weights = self.weight.detach().split(self.widths)
        biases = self.bias.detach().split(self.widths) if self.bias is not None else None
        return [(w, biases[i] if biases is not None else None) for i, w in enumerate(weights)]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """One (..., width) per projection."""
        return linear(x, self.weight, self.bias).split(self.widths, dim=-1)


def packable(site: Site) -> str | None:
    """Why the projections of a parallel group cannot be packed, or None."""
    for node in projections(site):
        if name_of(node) != "linear" or node.op != "call_function":
            return f"{name_of(node)} keeps its weight by columns"
        if site.parameter(node.args[1]) is None:
            return "a weight is computed"
        if len(node.args) > 2 and node.args[2] is not None and site.parameter(node.args[2]) is None:
            return "a bias is computed"
    return None


def projections(site: Site) -> list:
    """The inner nodes of a parallel group that are projections."""
    return [node for node in site.inner.graph.nodes if name_of(node) in ("linear", "addmm", "mm")]


def packed_projections(site: Site) -> PackedLinear:
    """The packed product in place of a parallel group."""
    nodes = projections(site)
    parameters = [[site.parameter(a) if a is not None else None for a in n.args[1:]] for n in nodes]
    module = PackedLinear(
        [p[0] for p in parameters], [p[1] if len(p) > 1 else None for p in parameters]
    )
    module.takes = (site.placeholders.index(projection_input(nodes[0])),)
    order = [nodes.index(node) for node in site.results]
    if order != list(range(len(nodes))):
        raise ValueError("results of a parallel group are not in the order of its projections")
    return module


_ACTIVATED = {"relu": "relu", "silu": "silu", "gelu": "gelu_erf"}


def activated(site: Site) -> tuple[fx.Node, str]:
    """(projection, activation) of a group of one each, "" where it is another group."""
    work = [node for node in site.inner.graph.nodes if is_kernel(node)]
    if "gelu_tanh" in site.group.details:
        return work[0], "gelu_tanh"
    if len(work) != 2 or name_of(work[1]) not in _ACTIVATED:
        return work[0], ""
    tanh = name_of(work[1]) == "gelu" and work[1].kwargs.get("approximate", "none") == "tanh"
    return work[0], "gelu_tanh" if tanh else _ACTIVATED[name_of(work[1])]


def activated_linear(site: Site, kind: type[nn.Module]) -> nn.Module:
    """kind(weight, bias, activation) in place of a group of a linear and its activation."""
    node, activation = activated(site)
    bias = node.args[2] if len(node.args) > 2 else None
    module = kind(
        site.parameter(node.args[1]).detach(),
        site.parameter(bias).detach() if bias is not None else None,
        activation,
    )
    module.takes = (site.placeholders.index(node.args[0]),)
    return module


def not_activated_linear(site: Site) -> str | None:
    """Why `activated_linear` cannot be had, or None."""
    node, activation = activated(site)
    if not activation:
        return "it ends in no activation that the kernel has"
    if any(class_of(inner) == VIEW for inner in site.inner.graph.nodes):
        return "something else than the projection's result is activated"
    if name_of(node) != "linear" or any(site.parameter(a) is None for a in node.args[1:] if a):
        return f"{name_of(node)} keeps its weight by columns, or computes it"
    return None


def join_residual(site: Site) -> None:
    """A linear and the addition after it become one operator of oneDNN in the inner graph.

    Only where the linear's input is no wider than its result: the operator takes memory
    of its own, which then does not lie on top of the widest activation.
    """
    work = [node for node in site.inner.graph.nodes if is_kernel(node)]
    if [name_of(node) for node in work] != ["linear", "add"] or work[1].kwargs:
        return
    source, node = work
    x, weight, *bias = source.args
    other = next((n for n in node.all_input_nodes if n is not source), None)
    matrix, value = site.parameter(weight), site.value(node)
    if other is None or matrix is None or matrix.shape[1] > matrix.shape[0]:
        return
    if not _onednn(value) or any(not _alike(site.value(n), value) for n in (source, other)):
        return
    with site.inner.graph.inserting_before(node):
        arguments = (x, other, weight, bias[0] if bias else None, "add")
        made = site.inner.graph.call_function(_BINARY, arguments)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    site.inner.graph.erase_node(node)
    site.inner.graph.erase_node(source)
    site.inner.recompile()


_BINARY = None
if torch.backends.mkldnn.is_available():
    _BINARY = torch.ops.mkldnn._linear_pointwise.binary


def _onednn(value: Tensor | None) -> bool:
    if _BINARY is None or not torch.backends.mkldnn.enabled or value is None:
        return False
    bf16 = value.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return value.device.type == "cpu" and (value.dtype == torch.float32 or bf16)


def _alike(value: Tensor | None, other: Tensor) -> bool:
    same = value is not None and str(tuple(value.shape)) == str(tuple(other.shape))
    return same and value.dtype == other.dtype
