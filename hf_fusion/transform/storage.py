"""A FusedModel as a folder: graph.json and weights.safetensors, and nothing that can run code.

What is stored is the captured graph before it was grouped, with the weights in the model's own
layout; loading groups and packs again for the machine at hand, and compares its output on the
stored example with the stored output. torch.export.save is not used: its archive holds the sample
inputs as a pickle, and without them it could not say what a call must look like.
"""

from __future__ import annotations

import importlib
import json
import math
import operator
import re
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from safetensors.torch import load_file, save_file
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..report import FusionError, Reason
from .capture import Capture, Signature
from .explicit import AttentionCall
from .model import FusedModel, assemble
from .site import attribute

FORMAT = 2
GRAPH, WEIGHTS = "graph.json", "weights.safetensors"
_NAMESPACES = ("aten", "hf_fusion")
_OPERATORS = ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg", "truediv", "pow",
              "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")  # fmt: skip
_KINDS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def save(fused: FusedModel, folder: Any) -> None:
    """Writes `fused` to the folder, which is made; FusionError where a node cannot be written."""
    captured, folder = fused.captured, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source, signature = captured.graph_module, captured.signature
    targets = {node.target for node in source.graph.nodes if node.op == "get_attr"}
    weights = {f"weight.{name}": attribute(source, name) for name in sorted(targets)}
    with torch.no_grad():
        expected = fused.graph(*captured.examples)
    weights |= {f"example.{i}": tensor for i, tensor in enumerate(captured.examples)}
    leaves = pytree.tree_leaves(expected)
    weights |= {f"expected.{i}": t for i, t in enumerate(leaves) if isinstance(t, Tensor)}
    # views of packed weights become tensors of their own: the model's layout
    save_file(
        {name: t.detach().clone().contiguous() for name, t in weights.items()}, folder / WEIGHTS
    )
    described = {
        "format": FORMAT,
        "model": fused.report.model,
        "road": captured.road,
        "expected": captured.expected,
        "nodes": [_node(node) for node in source.graph.nodes],
        "signature": {
            "names": signature.names,
            "leaves": [_encoded(leaf) for leaf in signature.leaves],
            "sizes": signature.sizes,
            "dtypes": [_encoded(dtype) for dtype in signature.dtypes],
            "arguments": signature.arguments,
            "positional": fused.positional,
            "structure": pytree.treespec_dumps(signature.structure),
            "defaults": {name: _encoded(value) for name, value in signature.defaults.items()},
        },
        "output": pytree.treespec_dumps(captured.output_spec),
        "output_modules": sorted(_modules_of(captured.output_spec)),
    }
    (folder / GRAPH).write_text(json.dumps(described, indent=1))


def load(folder: Any, backends: tuple[str, ...] | None = None) -> FusedModel:
    """The FusedModel of a folder that `save` wrote, grouped for this machine and checked.

    FusionError where the folder is not one, names an operator that a graph may not have, or gives
    other results here than were stored.
    """
    folder = Path(folder)
    try:
        described = json.loads((folder / GRAPH).read_text())
        tensors = load_file(folder / WEIGHTS)
        if described["format"] != FORMAT:
            raise FusionError(
                Reason.INVALID, f"{folder} has format {described['format']}, expected {FORMAT}"
            )
        captured = _captured(described, tensors)
    except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, FusionError):
            raise
        raise FusionError(Reason.INVALID, f"{folder} is no fused model: {error!r}") from error
    fused = assemble(captured, None, backends, None, described["signature"]["positional"])
    with torch.no_grad():
        got = pytree.tree_leaves(fused.graph(*captured.examples))
    for i, tensor in enumerate(got):
        want = tensors.get(f"expected.{i}")
        if want is None or not _close(tensor, want):
            raise FusionError(Reason.INVALID, f"output {i} on this machine is not the stored one")
    fused.report.model = described["model"]
    return fused


def _close(got: Tensor, want: Tensor) -> bool:
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not got.is_floating_point():
        return torch.equal(got, want)
    limit = _TOLERANCE.get(got.dtype, 0.05) * max(float(want.abs().max()), 1e-30)
    return float((got.double() - want.double()).abs().max()) <= limit


def _modules_of(spec: pytree.TreeSpec) -> set[str]:
    found = {spec.type.__module__} if isinstance(spec.type, type) else set()
    for child in spec.children():
        found |= _modules_of(child)
    return {name for name in found if name.startswith("transformers.")}


def _encoded(value: Any) -> Any:
    """A node's argument in JSON; FusionError for anything that has no form there."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [_encoded(v) for v in value]}
    if isinstance(value, slice):
        return {"slice": [_encoded(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, type_ in _KINDS.items():
        if isinstance(value, type_):
            return {kind: str(value).removeprefix("torch.")}
    raise FusionError(Reason.ARGUMENT, f"a {type(value).__name__} in the graph cannot be stored")


def _decoded(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "node":
        return nodes[inner]
    if kind == "float":
        return float(inner)
    if kind in ("tuple", "list", "slice"):
        parts = [_decoded(v, nodes) for v in inner]
        return slice(*parts) if kind == "slice" else parts if kind == "list" else tuple(parts)
    if kind == "device":
        return torch.device(inner)
    if kind in _KINDS:
        found = getattr(torch, inner)
        if isinstance(found, _KINDS[kind]):
            return found
    raise ValueError(f"{kind} is no kind of argument")


def _target(node: fx.Node) -> str:
    target = node.target
    if node.op in ("placeholder", "get_attr", "output"):
        return str(target)
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return f"{target._schema.name}.{target._overloadname}"
    name = getattr(target, "__name__", "")
    if (
        node.op == "call_function"
        and getattr(operator, name, None) is target
        and name in _OPERATORS
    ):
        return f"operator::{name}"
    raise FusionError(Reason.ARGUMENT, f"{node.name} calls {target}, which cannot be stored")


def _resolved(op: str, name: str) -> Any:
    """The function a stored name stands for: operators of aten, ours, and a few of Python's."""
    if op in ("placeholder", "get_attr", "output"):
        return name
    found = re.fullmatch(r"(\w+)::(\w+)(?:\.(\w+))?", name)
    if op != "call_function" or found is None:
        raise ValueError(f"{op} {name} is no operator")
    space, operator_name, overload = found.groups()
    if space == "operator" and operator_name in _OPERATORS:
        return getattr(operator, operator_name)
    if space in _NAMESPACES and overload:
        packet = getattr(getattr(torch.ops, space), operator_name, None)
        target = getattr(packet, overload, None)
        if isinstance(target, torch._ops.OpOverload):
            return target
    raise ValueError(f"{name} is no operator")


def _node(node: fx.Node) -> dict[str, Any]:
    described = {
        "name": node.name,
        "op": node.op,
        "target": _target(node),
        "args": _encoded(tuple(node.args)),
        "kwargs": {name: _encoded(value) for name, value in node.kwargs.items()},
    }
    stack = [
        [path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"]
        for path, kind in node.meta.get("nn_module_stack", {}).values()
    ]
    if stack:
        described["modules"] = stack
    mark = node.meta.get("hf_fusion")
    if mark:
        said = vars(mark["call"]) if "call" in mark else None
        described["mark"] = {"attention": mark["attention"], "part": mark["part"]}
        if said:
            described["mark"]["call"] = {name: _encoded(value) for name, value in said.items()}
    return described


def _captured(described: dict[str, Any], tensors: dict[str, Tensor]) -> Capture:
    graph, nodes = fx.Graph(), {}
    for entry in described["nodes"]:
        node = graph.create_node(
            entry["op"],
            _resolved(entry["op"], entry["target"]),
            _decoded(entry["args"], nodes),
            {name: _decoded(value, nodes) for name, value in entry["kwargs"].items()},
            entry["name"],
        )
        nodes[entry["name"]] = node
        if "modules" in entry:
            node.meta["nn_module_stack"] = {path: (path, kind) for path, kind in entry["modules"]}
        if "mark" in entry:
            mark = dict(entry["mark"])
            if "call" in mark:
                said = {name: _decoded(value, nodes) for name, value in mark["call"].items()}
                mark["call"] = AttentionCall(**said)
            node.meta["hf_fusion"] = mark
    named = {
        name.removeprefix("weight."): torch.nn.Parameter(tensor, False)
        if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items() if name.startswith("weight.")
    }  # fmt: skip
    graph.lint()
    module = fx.GraphModule(named, graph, described["model"])
    module.meta["attention_layers"] = described["expected"]
    stored = described["signature"]
    for name in described["output_modules"]:
        if not re.fullmatch(r"transformers(\.\w+)+", name):
            raise ValueError(f"{name} is no module of transformers")
        importlib.import_module(name)
    signature = Signature(
        stored["names"],
        [_decoded(leaf, {}) for leaf in stored["leaves"]],
        [tuple(sizes) for sizes in stored["sizes"]],
        [_decoded(dtype, {}) for dtype in stored["dtypes"]],
        stored["arguments"],
        pytree.treespec_loads(stored["structure"]),
        {name: _decoded(value, {}) for name, value in stored["defaults"].items()},
    )
    examples = [tensors[f"example.{i}"] for i in range(len(signature.sizes))]
    _propagate(module, examples)
    output = pytree.treespec_loads(described["output"])
    return Capture(module, signature, output, described["road"], described["expected"], examples)


def _propagate(module: fx.GraphModule, examples: list[Tensor]) -> None:
    """Every node's `val`: what it would give for tensors like the examples."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = iter([mode.from_tensor(tensor) for tensor in examples])
        known: dict[fx.Node, Any] = {}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                value = next(fake)
            elif node.op == "get_attr":
                value = mode.from_tensor(attribute(module, node.target).detach())
            elif node.op == "output":
                continue
            else:
                args = fx.node.map_arg(node.args, known.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, known.__getitem__)
                value = node.target(*args, **kwargs)
            known[node] = node.meta["val"] = value
