"""Whole transformer layers in a graph, read as a BlockSpec and the tensors of its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from ..spec import (
    Activation,
    AttentionSpec,
    BlockSpec,
    BlockTensors,
    MlpSpec,
    NormKind,
    NormSpec,
    QkvLayout,
    Residual,
)
from .attention import Attention, attentions, is_projection
from .groups import BLOCK, Claims, FusionGroup
from .nodes import exclusive_views_down, exclusive_views_up, name_of, owner_of
from .rules import is_residual
from .site import attribute

_ACTIVATIONS = {"relu": Activation.RELU, "silu": Activation.SILU}
# The views of nn.MultiheadAttention where queries, keys and values are one tensor: from q, k or v
# up to what is one, from there up to the projection, from the output projection down, from the mask
# up.
_SPLIT = ["reshape", "transpose", "reshape", "select"]
_STACK = ["contiguous", "squeeze", "transpose", "unsqueeze", "unflatten"]
_BATCH_FIRST = ["reshape", "transpose"]
_OVER_HEADS = ["reshape", "reshape", "expand"]


def _extents(node: fx.Node) -> list[str]:
    return [str(extent) for extent in node.meta["val"].shape]


def _order(view: fx.Node) -> tuple[int, ...]:
    """What a transposition or permutation of four dimensions makes of 0, 1, 2, 3; () for others."""
    order = list(range(4))
    if name_of(view) == "permute":
        return tuple(dim % 4 for dim in view.args[1])
    if name_of(view) != "transpose":
        return ()
    a, b = view.args[1:]
    order[a], order[b] = order[b], order[a]
    return tuple(order)


class _Unlike(Exception):
    """The nodes are not the layer that is looked for; the message says where they part."""


@dataclass(frozen=True)
class Layer:
    """A layer found in a graph. source: its input; mask: the attention's, or None."""

    spec: BlockSpec
    parameters: dict[str, str | None]  # field of BlockTensors -> path of the parameter
    nodes: tuple[fx.Node, ...]
    source: fx.Node
    mask: fx.Node | None
    result: fx.Node

    def tensors(self, module) -> BlockTensors:
        """The layer's parameters in `module`, where they lie."""
        found = {
            name: None if path is None else attribute(module, path).detach()
            for name, path in self.parameters.items()
        }
        return BlockTensors(**found)


class _Reader:
    """Follows one layer from its attention to both ends, and notes what it passes."""

    def __init__(self, attention: Attention):
        self.attention, self.call = attention, attention.call
        self.nodes: list[fx.Node] = []
        self.parameters: dict[str, str | None] = {}

    def _only_reader(self, node: fx.Node, what: str) -> fx.Node:
        if len(node.users) != 1:
            raise _Unlike(f"{what} has {len(node.users)} readers")
        return next(iter(node.users))

    def _linear(self, node: fx.Node, name: str) -> fx.Node:
        """Notes a linear layer; returns what it reads."""
        if name_of(node) != "linear" or not is_projection(node):
            raise _Unlike(f"{name} is {name_of(node)}")
        bias = node.args[2] if len(node.args) > 2 else None
        self.parameters[f"{name}_weight"] = node.args[1].target
        self.parameters[f"{name}_bias"] = bias.target if bias is not None else None
        self.nodes.append(node)
        return node.args[0]

    def _norm(self, node: fx.Node, name: str) -> tuple[NormSpec, fx.Node]:
        """Notes a layer norm over the last dimension; returns its spec and what it reads."""
        if name_of(node) != "layer_norm" or len(node.args[1]) != 1 or len(node.args) < 4:
            raise _Unlike(f"{name} is {name_of(node)}")
        if node.args[2] is None:
            raise _Unlike(f"{name} has no weight")
        self.parameters[f"{name}_weight"] = node.args[2].target
        self.parameters[f"{name}_bias"] = node.args[3].target if node.args[3] is not None else None
        self.nodes.append(node)
        eps = node.args[4] if len(node.args) > 4 else 1e-5
        return NormSpec(NormKind.LAYER, float(eps)), node.args[0]

    def _heads(self, node: fx.Node) -> fx.Node:
        """Past the views that turn (batch, sequence, heads * size) to (batch, heads, sequence,
        size), upwards; notes them.
        """
        views = exclusive_views_up(node)[:2]
        turned = bool(views) and _order(views[0]) == (0, 2, 1, 3)
        if not turned or [name_of(view) for view in views[1:]] != ["reshape"]:
            raise _Unlike("heads are not taken apart as (batch, sequence, heads, size)")
        apart, whole = (_extents(n) for n in (views[1], views[1].args[0]))
        if len(apart) != 4 or len(whole) != 3 or apart[:2] != whole[:2]:
            raise _Unlike("heads are not the last dimension of a projection")
        self.nodes += views
        return views[1].args[0]

    def _stacked(self) -> fx.Node | None:
        """What one projection makes q, k and v of as nn.MultiheadAttention does, batch first; None
        where there are three.
        """
        parts = (self.call.query, self.call.key, self.call.value)
        chains = [exclusive_views_up(node)[: len(_SPLIT)] for node in parts]
        if any([name_of(view) for view in chain] != _SPLIT for chain in chains):
            return None
        if any(sorted(chain[1].args[1:]) != [0, 1] for chain in chains):
            return None
        if [chain[-1].args[1:] for chain in chains] != [(0, 0), (0, 1), (0, 2)]:
            return None
        if len({chain[-1].args[0] for chain in chains}) != 1:
            return None
        views = [chains[0][-1].args[0]]
        while len(views) < len(_STACK) and len(views[-1].args[0].users) == 1:
            views.append(views[-1].args[0])
        if [name_of(view) for view in views] != _STACK or len(views[0].users) != 3:
            return None
        self.nodes += [*(view for chain in chains for view in chain), *views]
        turned = self._linear(views[-1].args[0], "qkv")
        if name_of(turned) != "transpose" or sorted(turned.args[1:]) != [0, 1]:
            raise _Unlike("the layer's input is (sequence, batch)")
        self._only_reader(turned, "the layer's input, transposed,")
        self.nodes.append(turned)
        return turned.args[0]

    def _mask(self, stacked: bool) -> fx.Node | None:
        """The attention's mask, (batch, 1, queries, keys)."""
        mask = self.call.mask
        if mask is None:
            return None
        above = exclusive_views_up(mask)[: len(_OVER_HEADS)]
        if stacked and [name_of(view) for view in above] == _OVER_HEADS:
            self.nodes += above
            mask = above[-1].args[0]
        shape = mask.meta["val"].shape
        if len(shape) != 4 or str(shape[1]) != "1":
            raise _Unlike("the mask is not (batch, 1, queries, keys)")
        return mask

    def _projected(self) -> fx.Node:
        """What q, k and v are made of, all three."""
        sources = []
        for name, node in zip(("qkv", "k", "v"), (self.call.query, self.call.key, self.call.value)):
            sources.append(self._linear(self._heads(node), name))
        if len(set(sources)) != 1:
            raise _Unlike("q, k and v have different inputs")
        return sources[0]

    def _joined(self, stacked: bool) -> fx.Node:
        """The last of the views that make one dimension of heads and size, in this order."""
        views = exclusive_views_down(self.attention.last)
        turns, whole = views[:-1], views[-1] if views else None
        if whole is None or name_of(whole) != "reshape":
            raise _Unlike("the attention's output is not reshaped")
        orders = [(2, 0, 1, 3)] if stacked else [(0, 2, 1, 3)]
        if self.call.merged:
            right = not turns and not stacked
        else:
            right = len(turns) == 1 and _order(turns[0]) in orders
        before, after = _extents(whole.args[0]), _extents(whole)
        together = int(before[-1]) * int(before[-2])
        ends = after[:2] == before[:2] if len(after) == 3 else stacked and len(after) == 2
        if not right or not ends or after[-1] != str(together):
            raise _Unlike("the attention's heads are not put together in order")
        self.nodes += views
        return whole

    def _activation(self, node: fx.Node) -> tuple[str, fx.Node]:
        self.nodes.append(node)
        name = name_of(node)
        if name == "gelu":
            tanh = node.kwargs.get("approximate", "none") == "tanh" or "tanh" in node.args[1:]
            return (Activation.GELU_TANH if tanh else Activation.GELU_ERF), node
        if name not in _ACTIVATIONS:
            raise _Unlike(f"the activation is {name}")
        return _ACTIVATIONS[name], node

    def _residual(self, node: fx.Node, other: fx.Node) -> fx.Node:
        add = self._only_reader(node, name_of(node))
        if not is_residual(add) or other not in add.all_input_nodes:
            raise _Unlike(f"{name_of(node)} is not added to the layer's input")
        self.nodes.append(add)
        return add

    def _mlp(self, source: fx.Node) -> tuple[str, int, fx.Node]:
        """(activation, width, the down projection) of the MLP that reads `source`."""
        ups = [user for user in source.users if is_projection(user)]
        if len(ups) != 1:
            raise _Unlike(f"{len(ups)} projections read what the MLP does")
        self._linear(ups[0], "up")
        kind, act = self._activation(self._only_reader(ups[0], "the up projection"))
        down = self._only_reader(act, "the activation")
        self._linear(down, "down")
        return kind, int(ups[0].meta["val"].shape[-1]), down

    def read(self) -> Layer:
        call = self.call
        if call is None:
            raise _Unlike("the attention is not of a form that is known")
        if call.bias is not None or call.sinks is not None or call.softcap or call.dropout:
            raise _Unlike("the attention has a bias, sinks, a soft cap or dropout")
        if call.window:
            raise _Unlike("the attention has a window")
        stacked = self._stacked()
        projected = self._projected() if stacked is None else stacked
        mask = self._mask(stacked is not None)
        self.nodes += self.attention.nodes
        output = self._only_reader(self._joined(stacked is not None), "the attention")
        self._linear(output, "o")
        if stacked is not None:
            views = exclusive_views_down(output)
            if [name_of(view) for view in views] != _BATCH_FIRST:
                raise _Unlike("the attention's output is not turned to (batch, sequence)")
            self.nodes += views
            output = views[-1]
        passed, noted = list(self.nodes), dict(self.parameters)
        try:
            kind, source, result, rest = self._pre_norm(projected, output)
        except _Unlike:
            # the norm before it, if there is one, ends the layer before
            self.nodes, self.parameters = passed, noted
            kind, source, result, rest = self._post_norm(projected, output)
        query = call.query.meta["val"]
        scale = call.scale if call.scale is not None else int(query.shape[3]) ** -0.5
        heads = AttentionSpec(
            int(query.shape[1]), int(call.key.meta["val"].shape[1]), int(query.shape[3]), 0,
            float(scale), QkvLayout.SEPARATE if stacked is None else QkvLayout.STACKED,
            call.causal and mask is None,
        )  # fmt: skip
        attention_norm, mlp_norm, activation, width = rest
        hidden = int(source.meta["val"].shape[-1])
        spec = BlockSpec(hidden, heads, MlpSpec(width, activation), attention_norm, mlp_norm, kind)
        return Layer(spec, self.parameters, tuple(self.nodes), source, mask, result)

    def _pre_norm(self, projected: fx.Node, output: fx.Node):
        first, source = self._norm(projected, "attention_norm")
        middle = self._residual(output, source)
        norms = [user for user in middle.users if name_of(user) == "layer_norm"]
        if len(norms) != 1:
            raise _Unlike("no norm, or several, before the MLP")
        second, _ = self._norm(norms[0], "mlp_norm")
        activation, width, down = self._mlp(norms[0])
        result = self._residual(down, middle)
        return Residual.SEQUENTIAL, source, result, (first, second, activation, width)

    def _post_norm(self, source: fx.Node, output: fx.Node):
        added = self._residual(output, source)
        norm = self._only_reader(added, "the residual sum")
        first, _ = self._norm(norm, "attention_norm")
        activation, width, down = self._mlp(norm)
        added = self._residual(down, norm)
        result = self._only_reader(added, "the residual sum")
        second, _ = self._norm(result, "mlp_norm")
        return Residual.POST_NORM, source, result, (first, second, activation, width)


def read_layer(attention: Attention) -> tuple[Layer | None, str]:
    """(the layer around an attention, "") or (None, why there is none that a kernel knows)."""
    try:
        layer = _Reader(attention).read()
    except (_Unlike, ValueError) as error:
        return None, str(error)
    inside = set(layer.nodes)
    for node in layer.nodes:
        outside = [user for user in node.users if user not in inside]
        if outside and node is not layer.result:
            return None, f"{name_of(node)} in the middle of it is read outside"
    return layer, ""


def blocks(graph: fx.Graph, claims: Claims) -> Iterator[FusionGroup]:
    """Whole layers, pre-norm or post-norm, without rotary embedding; q, k and v by three
    projections or, as in nn.TransformerEncoder, by one.
    """
    for attention in attentions(graph):
        layer, _ = read_layer(attention)
        if layer is not None:
            owner = owner_of(layer.result).rpartition(".")[0] or owner_of(attention.last)
            pattern = "Norm_QKV_Attention_O_Add_Norm_Up_Act_Down_Add"
            if layer.spec.residual == Residual.POST_NORM:
                pattern = "QKV_Attention_O_Add_Norm_Up_Act_Down_Add_Norm"
            yield FusionGroup(BLOCK, list(layer.nodes), owner, pattern, {"layer": layer})
