"""A model as one graph: torch.export with every attention kept as one operator.

The road that was taken is recorded: "semantic" (transformers' interface gives one operator per
attention, masks as its arguments), "semantic with masks" (the same, masks computed in the graph),
"export" (plain torch.export, for other modules). The model is not changed; parameters of the graph
are the model's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import Dim

from ..report import FusionError, Reason
from .canonical import canonicalise, writes_are_plain
from .conditions import Condition, conditions_on
from .fast_path import without_fast_path
from .inputs import example_inputs as build_inputs
from .interface import attention_layers, semantic_attention
from .unchanged import unchanged


@dataclass
class Signature:
    """How a call's arguments become the graph's flat inputs.

    names: one per leaf of the arguments, in order; leaves: None where the graph takes the leaf as a
    tensor, else the constant that was captured, alone in a tuple; same: per leaf, the first one
    that is the same tensor; sizes: per tensor, its extents, an int where fixed and a symbol's name
    where free. defaults: arguments added to every call. conditions: what holds of the free extents
    in every call that the graph is right for, see `conditions`.
    """

    names: list[str]
    leaves: list[tuple[Any] | None]
    same: list[int]
    sizes: list[tuple[int | str, ...]]
    dtypes: list[torch.dtype]
    arguments: list[str]
    structure: pytree.TreeSpec
    defaults: dict[str, Any] = field(default_factory=dict)
    conditions: list[Condition] = field(default_factory=list)

    def places(self) -> dict[str, str]:
        """Where each free extent is first found, as `ids.shape[1]`."""
        found: dict[str, str] = {}
        tensors = [n for n, leaf in zip(self.names, self.leaves, strict=True) if leaf is None]
        for name, extents in zip(tensors, self.sizes, strict=True):
            for dim, extent in enumerate(extents):
                if isinstance(extent, str):
                    found.setdefault(extent, f"{name}.shape[{dim}]")
        return found


@dataclass
class Capture:
    """A captured model: the graph, flat inputs to flat outputs, and how calls map onto it."""

    graph_module: fx.GraphModule
    signature: Signature
    output_spec: pytree.TreeSpec
    road: str
    expected: dict[str, str]  # attention layers of the model, module path to class name
    examples: list[Tensor]
    notes: list[str] = field(default_factory=list)


def bind(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Example inputs as named arguments of the model's forward, None left out where it is default.

    A tensor or a tuple is positional, a mapping named. Raises FusionError where they do not fit.
    """
    args, kwargs = (), {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Sequence):
        args = tuple(example_inputs)
    else:
        raise FusionError(
            Reason.INPUT,
            f"example_inputs is {type(example_inputs).__name__}, expected a tensor, tuple or dict",
        )
    return named_arguments(inspect.signature(model.forward), args, kwargs)


def named_arguments(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The call's arguments by name, without those that are None by default and given as None.

    FusionError(ARGUMENT) where the signature refuses them.
    """
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise FusionError(Reason.ARGUMENT, str(error)) from error
    named: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL and value:
            raise FusionError(Reason.ARGUMENT, f"positional arguments in *{name} have no names")
        else:
            named[name] = value
    optional = {name for name, p in signature.parameters.items() if p.default is None}
    return {n: value for n, value in named.items() if value is not None or n not in optional}


def capture(
    model: nn.Module, example_inputs: Any = None, *, dynamic: bool = True, mask: bool = False
) -> Capture:
    """The model as a graph, batch and sequence free where it does not fix them.

    example_inputs: a tensor, a tuple or a dict, with two rows or more; built from the configuration
    where absent, with padding where `mask`. Raises FusionError where the model cannot be exported,
    or is in training mode.
    """
    if not isinstance(model, nn.Module):
        raise FusionError(Reason.NOT_A_MODEL, f"{type(model).__name__} is no torch module")
    if model.training:
        raise FusionError(Reason.TRAINING, "the model is in training mode: call eval() first")
    if example_inputs is None:
        example_inputs = build_inputs(model, mask=mask)
    named = bind(model, example_inputs)
    defaults = _defaults(model, named)
    named = _ordered(inspect.signature(model.forward), named | defaults)
    program, road, notes = _export(model, named, dynamic)
    try:
        if not writes_are_plain(program.graph):
            # writes through views become results; nothing is taken apart, but spelled differently
            program = program.run_decompositions({})
            _check_state(model, program.graph_signature)
        module = program.module(check_guards=False)
        info = module.graph._codegen.pytree_info
        signature, examples = _flatten(module, named, defaults)
        # a plain GraphModule: the exported one checks its calls against a structure that is gone
        module = fx.GraphModule(module, module.graph, type(model).__name__)
        canonicalise(module)
    except FusionError:
        raise
    except Exception as error:  # as above, of many unrelated types
        raise FusionError(Reason.TRACING, _said(model, error)) from error
    expected = {name: type(m).__name__ for name, m in attention_layers(model).items()}
    module.meta["attention_layers"] = expected
    return Capture(module, signature, info.out_spec, road, expected, examples, notes)


def _defaults(model: nn.Module, named: dict[str, Any]) -> dict[str, Any]:
    """Arguments that a captured call always has: no cache, since a graph returns one structure."""
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", False) and "use_cache" not in named:
        if "use_cache" in parameters or (open_ended and hasattr(model, "main_input_name")):
            return {"use_cache": False}
    return {}


def _export(model: nn.Module, named: dict[str, Any], dynamic: bool):
    """(exported program, road, notes) by the first road that works."""
    notes: list[str] = []
    positions = "position_ids" in named
    for masks in (False, True):
        try:
            with semantic_attention(model, masks, positions) as semantic:
                program = _try_export(model, named, dynamic)
            road = "semantic" if semantic else "export"
            return program, road + (" with masks" if masks else ""), notes
        except Exception as error:  # torch.export raises errors of many unrelated types
            failure = error
            notes.append(_first_line(error))
            if not semantic:
                break
    raise FusionError(Reason.TRACING, _said(model, failure)) from failure


def _check_state(model: nn.Module, signature: Any) -> None:
    """FusionError where a call writes to parameters or buffers: the next finds another model."""
    of_parameters = getattr(signature, "parameters_to_mutate", {})
    written = sorted({*signature.buffers_to_mutate.values(), *of_parameters.values()})
    if written:
        raise FusionError(
            Reason.CHANGED, f"{type(model).__name__} writes to its {', '.join(written)} in a call"
        )


def _first_line(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else 'no message'}"


def _said(model: nn.Module, error: Exception) -> str:
    return (
        f"{type(model).__name__} cannot be exported: {_first_line(error)}; expected one that "
        "torch.export takes with these inputs, without branches on values"
    )


def _try_export(model: nn.Module, named: dict[str, Any], dynamic: bool):
    shapes = pytree.tree_map(_free, named) if dynamic else None
    with torch.no_grad(), unchanged(model), without_fast_path(model):
        _spell_out(model, named)
        return torch.export.export(model, (), named, dynamic_shapes=shapes, strict=False)


def _spell_out(model: nn.Module, named: dict[str, Any]) -> None:
    """Gives the model a forward with a parameter for each of the arguments, where it has none.

    torch.export has no dynamic shapes for what a signature takes as **kwargs.
    """
    forward = model.forward
    if set(named) <= set(inspect.signature(forward).parameters):
        return

    def spelled_out(**given: Any) -> Any:
        return forward(**given)

    named_only = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in named]
    spelled_out.__signature__ = inspect.Signature(named_only)
    model.forward = spelled_out


def _ordered(signature: inspect.Signature, named: dict[str, Any]) -> dict[str, Any]:
    """The arguments in the signature's order, as export has its inputs; then the others."""
    return {name: named[name] for name in signature.parameters if name in named} | named


def _free(leaf: Any) -> Any:
    """The first two dimensions of a tensor, which export may find to be fixed."""
    if not isinstance(leaf, Tensor):
        return None
    return {i: Dim.AUTO for i in range(min(2, leaf.dim())) if leaf.shape[i] > 1}


def _flatten(
    module: fx.GraphModule, named: dict[str, Any], defaults: dict[str, Any]
) -> tuple[Signature, list[Tensor]]:
    """Makes the graph's inputs and outputs flat lists; says how a call maps onto them."""
    leaves, structure = pytree.tree_flatten(named)
    placeholders = module.graph.find_nodes(op="placeholder")
    first = {id(leaf): i for i, leaf in reversed(list(enumerate(leaves)))}
    same = [first[id(x)] if isinstance(x, Tensor) else i for i, x in enumerate(leaves)]
    signature = Signature([], [], same, [], [], list(named), structure, defaults)
    examples, free, captured = [], [], {}
    for node, leaf in zip(placeholders, leaves, strict=True):
        tensor = isinstance(leaf, Tensor)
        signature.names.append(node.name)
        signature.leaves.append(None if tensor else (leaf,))
        if tensor:
            value = node.meta["val"]
            signature.sizes.append(
                tuple(int(n) if str(n).isdigit() else str(n.node.expr) for n in value.shape)
            )
            for extent, name, size in zip(value.shape, signature.sizes[-1], leaf.shape):
                if isinstance(name, str) and name not in captured:
                    free.append(extent)
                    captured[name] = size
            signature.dtypes.append(leaf.dtype)
            examples.append(leaf)
        elif node.users:
            node.replace_all_uses_with(leaf)
    for node, leaf in zip(placeholders, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            module.graph.erase_node(node)
    module.graph.set_codegen(fx.graph.CodeGen())
    signature.conditions = conditions_on(free, captured)
    return signature, examples
