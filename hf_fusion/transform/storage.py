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
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..report import FusionError, Reason
from .allowed import check_numbers, drops, names, resolved, target_name
from .backends import chosen
from .capture import Capture, Signature
from .conditions import unmet
from .explicit import AttentionCall
from .model import FusedModel, arguments_of, assemble
from .site import attribute

FORMAT = 2
GRAPH, WEIGHTS = "graph.json", "weights.safetensors"
_KINDS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def save(fused: FusedModel, folder: Any) -> None:
    """Writes `fused` to the folder, which is made; FusionError where a node, or a file, cannot be
    written.
    """
    captured, folder = fused.captured, Path(folder)
    source, signature = captured.graph_module, captured.signature
    targets = {node.target for node in source.graph.nodes if node.op == "get_attr"}
    weights = {f"weight.{name}": attribute(source, name) for name in sorted(targets)}
    with torch.no_grad():
        expected = fused.graph(*captured.examples)
    weights |= {f"example.{i}": tensor for i, tensor in enumerate(captured.examples)}
    leaves = pytree.tree_leaves(expected)
    weights |= {f"expected.{i}": t for i, t in enumerate(leaves) if isinstance(t, Tensor)}
    # views of packed weights become tensors of their own: the model's layout
    weights = {name: t.detach().clone().contiguous() for name, t in weights.items()}
    described = {
        "format": FORMAT,
        "model": fused.report.model,
        "road": captured.road,
        "expected": captured.expected,
        "nodes": [_node(node) for node in source.graph.nodes],
        "signature": {
            "names": signature.names,
            "leaves": [_encoded(leaf) for leaf in signature.leaves],
            "same": signature.same,
            "sizes": signature.sizes,
            "dtypes": [_encoded(dtype) for dtype in signature.dtypes],
            "arguments": signature.arguments,
            "positional": fused.positional,
            "structure": _structure(signature.structure),
            "defaults": {name: _encoded(value) for name, value in signature.defaults.items()},
            "conditions": signature.conditions,
        },
        "output": _structure(captured.output_spec),
        "output_modules": sorted(_modules_of(captured.output_spec)),
    }
    text = json.dumps(described, indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / WEIGHTS)
        (folder / GRAPH).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise FusionError(
            Reason.ARGUMENT, f"{folder} cannot be written: {_line(error)}"
        ) from error


def load(folder: Any, backends: tuple[str, ...] | None = None) -> FusedModel:
    """The FusedModel of a folder that `save` wrote, grouped for this machine and checked.

    FusionError where the folder is not one, names an operator that a graph may not have, or gives
    other results here than were stored.
    """
    folder = Path(folder)
    chosen(backends)
    described = _read(folder / GRAPH, "JSON", lambda path: json.loads(path.read_text("utf-8")))
    tensors = _read(folder / WEIGHTS, "safetensors", load_file)
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        found = described.get("format") if isinstance(described, dict) else None
        raise FusionError(
            Reason.INVALID, f"{folder / GRAPH} has format {found!r}, expected {FORMAT}"
        )
    try:
        captured = _captured(described, tensors)
        positional = names(described["signature"]["positional"])
        fused = assemble(captured, None, backends, None, positional)
        got = _outputs(fused)
    except Exception as error:  # what a changed file leads to is of many unrelated types
        raise FusionError(
            Reason.INVALID,
            f"{folder / GRAPH} and {WEIGHTS} are no graph that save wrote: {_line(error)}",
        ) from error
    want = {name: tensor for name, tensor in tensors.items() if name.startswith("expected.")}
    found = {f"expected.{i}": leaf for i, leaf in enumerate(got) if isinstance(leaf, Tensor)}
    for name in sorted(want.keys() | found.keys()):
        if name not in want or name not in found or not _close(found[name], want[name]):
            which = name.removeprefix("expected.")
            raise FusionError(
                Reason.INVALID,
                f"output {which} on this machine is not the one in {folder / WEIGHTS}",
            )
    fused.report.model = described["model"]
    return fused


def _read(path: Path, kind: str, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except Exception as error:  # safetensors' errors share no type with others
        raise FusionError(
            Reason.INVALID, f"{path} cannot be read as {kind}: {_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__


@torch.no_grad()
def _outputs(fused: FusedModel) -> list[Tensor]:
    """What the graph gives for the stored example, which must be a call that it takes."""
    given = fused._tensors((), arguments_of(fused))
    if [t.data_ptr() for t in given] != [t.data_ptr() for t in fused.captured.examples]:
        raise ValueError("the arguments' structure is not that of the example")
    got = fused.graph(*given)
    pytree.tree_unflatten(got, fused.captured.output_spec)
    return pytree.tree_leaves(got)


def _close(got: Tensor, want: Tensor) -> bool:
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not got.numel() or not (got.is_floating_point() or got.is_complex()):
        return torch.equal(got, want)
    if got.is_complex():
        got, want = torch.view_as_real(got.resolve_conj()), torch.view_as_real(want)
    limit = _TOLERANCE.get(got.dtype, 0.05) * max(float(want.abs().max()), 1e-30)
    return float((got.double() - want.double()).abs().max()) <= limit


def _structure(spec: pytree.TreeSpec) -> str:
    try:
        return pytree.treespec_dumps(spec)
    except Exception as error:  # of classes that have no name there
        raise FusionError(
            Reason.ARGUMENT, f"arguments or outputs are nested as cannot be stored: {_line(error)}"
        ) from error


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
    if value is None or isinstance(value, (bool, int, float, str)):
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


def _node(node: fx.Node) -> dict[str, Any]:
    if drops(node):
        raise FusionError(Reason.ARGUMENT, f"{node.name} drops values at random: not stored")
    described = {
        "name": node.name,
        "op": node.op,
        "target": target_name(node),
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
            resolved(entry["op"], entry["target"]),
            _decoded(entry["args"], nodes),
            {name: _decoded(entry["kwargs"][name], nodes) for name in names(entry["kwargs"])},
            *names([entry["name"]]),
        )
        if drops(node):
            raise ValueError(f"{node.name} drops values at random")
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
        stored["same"],
        [tuple(sizes) for sizes in stored["sizes"]],
        [_decoded(dtype, {}) for dtype in stored["dtypes"]],
        stored["arguments"],
        pytree.treespec_loads(stored["structure"]),
        {name: _decoded(value, {}) for name, value in stored["defaults"].items()},
        stored["conditions"],
    )
    taken = [i for i, leaf in enumerate(signature.leaves) if leaf is None]
    examples = [tensors[f"example.{taken.index(signature.same[i])}"] for i in taken]
    sizes = {
        name: size for extents, example in zip(signature.sizes, examples, strict=True)
        for name, size in zip(extents, example.shape, strict=True)
    }  # fmt: skip
    if unmet(signature.conditions, sizes) is not None:
        raise ValueError("the stored example does not meet the stored conditions")
    _propagate(module, examples)
    output = pytree.treespec_loads(described["output"])
    return Capture(module, signature, output, described["road"], described["expected"], examples)


def _propagate(module: fx.GraphModule, examples: list[Tensor]) -> None:
    """Every node's `val`: what it would give for tensors like the examples."""
    # a ShapeEnv makes numbers that are read out of tensors unknown ones
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with fake_mode as mode, torch.no_grad():
        fake = iter([mode.from_tensor(tensor, static_shapes=True) for tensor in examples])
        known: dict[fx.Node, Any] = {}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                value = next(fake)
            elif node.op == "get_attr":
                tensor = attribute(module, node.target).detach()
                value = mode.from_tensor(tensor, static_shapes=True)
            elif node.op == "output":
                continue
            else:
                args = fx.node.map_arg(node.args, known.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, known.__getitem__)
                check_numbers(node.target, args)
                value = node.target(*args, **kwargs)
            known[node] = node.meta["val"] = value
