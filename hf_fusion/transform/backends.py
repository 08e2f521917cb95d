"""Who runs a group: a table of back ends, asked in the order of their priority.

"aten": library operators; projections side by side as one packed product, a projection with the
residual after it as one operator of oneDNN, attention through scaled_dot_product_attention,
elementwise work over memory that is no longer read. "eager": the group's own nodes, always
possible; a group that nobody else takes is counted as not fused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..report import FusionError, Reason
from .explicit import put_together
from .groups import CORE, ELEMENTWISE, EPILOGUE, GLU, NORM_RESIDUAL, PARALLEL, ROPE, FusionGroup
from .linears import join_residual, packable, packed_projections
from .site import Site, fresh_results, reuse_memory

EAGER = "eager"


@dataclass(frozen=True)
class Backend:
    """A way to run groups.

    refuses(site): why not, or None. build(site): the module in place of the group, see Site.
    Higher `priority` is asked first. `always`: asked whatever was named.
    """

    name: str
    priority: int
    refuses: Callable[[Site], str | None]
    build: Callable[[Site], nn.Module]
    always: bool = False


_BACKENDS: dict[str, Backend] = {}


def register_backend(
    name: str,
    priority: int,
    refuses: Callable[[Site], str | None],
    build: Callable[[Site], nn.Module],
    always: bool = False,
) -> Backend:
    """Adds a back end, or replaces the one of that name.

    "native" has priority 20, "aten" 10, "eager" 0; a negative one must be named to be asked.
    always: it is asked even where others are named.
    """
    _BACKENDS[name] = Backend(name, priority, refuses, build, always)
    return _BACKENDS[name]


def unregister_backend(name: str) -> None:
    """Takes a back end out."""
    _BACKENDS.pop(name, None)


def chosen(names: tuple[str, ...] | None) -> list[Backend]:
    """The back ends named, in that order, or by priority all that are asked by default, those of
    priority 0 and more; the original nodes are always last. FusionError for an unknown name.
    """
    known = sorted(_BACKENDS.values(), key=lambda backend: -backend.priority)
    if names is None:
        return [backend for backend in known if backend.priority >= 0]
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise FusionError(
            Reason.UNKNOWN_BACKEND, f"backends is {names!r}, expected a tuple of names"
        )
    unknown = set(names) - set(_BACKENDS)
    if unknown:
        raise FusionError(
            Reason.UNKNOWN_BACKEND,
            f"back ends {sorted(unknown)} are not among {sorted(_BACKENDS)}",
        )
    order = [name for name in names if name != EAGER] + [EAGER]
    return [b for b in known if b.always and b.name not in order] + [_BACKENDS[n] for n in order]


class Rotary(nn.Module):
    """x cos + rotate_half(x) sin in three operators, two of them in place."""

    fresh_results = (True,)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (..., D); cos and sin broadcast to it, each the same in both halves."""
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out


_ATEN_KINDS = (PARALLEL, CORE, NORM_RESIDUAL, EPILOGUE, GLU, ROPE, ELEMENTWISE)


def _aten_refuses(site: Site) -> str | None:
    if site.group.kind not in _ATEN_KINDS:
        return f"no library operator for a {site.group.kind}"
    if site.group.kind == PARALLEL:
        return packable(site)
    if site.group.kind == CORE and site.group.details["attention"].call is None:
        return "its softmax is not of the form that scaled_dot_product_attention computes"
    if any(node.op == "call_module" for node in site.inner.graph.nodes):
        return "it calls modules of a symbolic trace"
    return None


def _aten_build(site: Site) -> nn.Module:
    group = site.group
    if group.kind == PARALLEL:
        return packed_projections(site)
    if group.kind == CORE:
        put_together(site.inner.graph)
        site.inner.recompile()
    elif group.kind == ROPE:
        roles = group.details["rope"]
        names = [site.placeholders.index(site.node(roles[r].name)) for r in ("x", "cos", "sin")
                 if site.node(roles[r].name) in site.placeholders]  # fmt: skip
        if len(names) == 3:
            module = Rotary()
            module.takes = tuple(names)
            return module
    elif "gelu_tanh" in group.details:
        _spell_gelu(site, group)
    if group.kind == EPILOGUE:
        join_residual(site)
    reuse_memory(site)
    site.inner.fresh_results = fresh_results(site.inner)
    return site.inner


def _spell_gelu(site: Site, group: FusionGroup) -> None:
    """The eight operators become one in the inner graph."""
    graph, (last,) = site.inner.graph, site.results
    source = site.node(group.details["gelu_tanh"].name)
    if source is None:
        return
    with graph.inserting_before(last):
        made = graph.call_function(torch.ops.aten.gelu.default, (source,), {"approximate": "tanh"})
    made.meta = dict(last.meta)
    last.replace_all_uses_with(made)
    graph.eliminate_dead_code()
    site.inner.recompile()


def eager(site: Site) -> nn.Module:
    """The group's own nodes."""
    site.inner.fresh_results = fresh_results(site.inner)
    return site.inner


register_backend("aten", 10, _aten_refuses, _aten_build)
register_backend(EAGER, 0, lambda site: None, eager)
