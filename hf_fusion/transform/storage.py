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
from collections.abc import Callable
from keyword import iskeyword
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..report import FusionError, Reason
from .backends import chosen
from .capture import Capture, Signature
from .conditions import unmet
from .explicit import AttentionCall
from .model import FusedModel, arguments_of, assemble
from .site import attribute

FORMAT = 2
GRAPH, WEIGHTS = "graph.json", "weights.safetensors"
_NAMESPACES = ("aten", "hf_fusion")
_OPERATORS = ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg", "truediv", "pow",
              "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")  # fmt: skip
# of those that read no tensor, the ones that make one of their arguments alone
_MAKERS = {"arange", "empty", "eye", "full", "linspace", "ones", "scalar_tensor", "tril_indices",
           "triu_indices", "zeros"}  # fmt: skip
# of those that may draw random numbers, the ones that do not without dropout
_DROPOUT = {"dropout", "scaled_dot_product_attention"}
# of those that are torch's own business, the ones that are not among its core operators
_PRIVATE = {"__and__", "__or__", "__xor__", "_convolution", "_unsafe_view", "_unsafe_index",
            "_weight_norm", "_weight_norm_interface"}  # fmt: skip
_RESULTS = ("Tensor", "List[Tensor]", "int", "SymInt", "float", "bool", "number")
_KINDS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


_has_kernel = torch._C._dispatch_has_kernel


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
            "structure": pytree.treespec_dumps(signature.structure),
            "defaults": {name: _encoded(value) for name, value in signature.defaults.items()},
            "conditions": signature.conditions,
        },
        "output": pytree.treespec_dumps(captured.output_spec),
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
        positional = _names(described["signature"]["positional"])
        fused = assemble(captured, None, backends, None, positional)
        got = _outputs(fused)
    except Exception as error:  # what a changed file leads to is of many unrelated types
        raise FusionError(
            Reason.INVALID,
            f"{folder / GRAPH} and {WEIGHTS} are no graph that save wrote: {_line(error)}",
        ) from error
    expected = [name for name in tensors if name.startswith("expected.")]
    for i, tensor in enumerate(got):
        want = tensors.get(f"expected.{i}")
        if want is None or len(got) != len(expected) or not _close(tensor, want):
            raise FusionError(
                Reason.INVALID, f"output {i} on this machine is not the one in {folder / WEIGHTS}"
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


def _names(names: Any) -> list[str]:
    """The names, each an identifier: fx writes them into code."""
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or iskeyword(name):
            raise ValueError(f"{name!r} is no name")
    return list(names)


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


def _target(node: fx.Node) -> str:
    target = node.target
    if node.op in ("placeholder", "get_attr", "output"):
        return str(target)
    if isinstance(target, torch._ops.OpOverload) and _is_plain(target):
        return f"{target._schema.name}.{target._overloadname}"
    name = getattr(target, "__name__", "")
    if (
        node.op == "call_function"
        and getattr(operator, name, None) is target
        and name in _OPERATORS
    ):
        return f"operator::{name}"
    raise FusionError(Reason.ARGUMENT, f"{node.name} calls {target}, which cannot be stored")


def _is_plain(target: torch._ops.OpOverload) -> bool:
    """Whether the operator is aten's or ours and only makes results of its operands: it reads a
    tensor, or is one of `_MAKERS`, writes to nothing, and draws no random numbers.
    """
    schema = target._schema
    space, _, name = schema.name.partition("::")
    if space not in _NAMESPACES or schema.is_mutable or not schema.returns:
        return False
    if torch.Tag.nondeterministic_seeded in target.tags and name not in _DROPOUT:
        return False
    if name.startswith("_") and torch.Tag.core not in target.tags and name not in _PRIVATE:
        return False
    if not _has_kernel(target.name()):
        return False
    reads = any("Tensor" in str(argument.type) for argument in schema.arguments)
    if not all(str(result.type) in _RESULTS for result in schema.returns):
        return False
    return reads or name in _MAKERS


def _drops(target: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the call drops values at random."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    given = dict(zip((argument.name for argument in target._schema.arguments), args)) | kwargs
    return any(given.get(name) for name in ("dropout", "dropout_p", "train"))


def _resolved(op: str, name: str) -> Any:
    """The function a stored name stands for: plain operators, and a few of Python's; names of
    parameters and inputs are identifiers, since fx writes them into code.
    """
    if op == "get_attr":
        if not re.fullmatch(r"\w+(\.\w+)*", name):
            raise ValueError(f"{name!r} is no path of a parameter")
        return name
    if op == "placeholder":
        return _names([name])[0]
    if op == "output":
        return op
    found = re.fullmatch(r"(\w+)::(\w+)(?:\.(\w+))?", name)
    if op != "call_function" or found is None:
        raise ValueError(f"{op} {name} is no operator")
    space, operator_name, overload = found.groups()
    if space == "operator" and operator_name in _OPERATORS:
        return getattr(operator, operator_name)
    if space in _NAMESPACES and overload:
        packet = getattr(getattr(torch.ops, space), operator_name, None)
        target = getattr(packet, overload, None)
        if isinstance(target, torch._ops.OpOverload) and _is_plain(target):
            return target
    raise ValueError(f"{name} is no operator that a graph may hold")


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
            {name: _decoded(entry["kwargs"][name], nodes) for name in _names(entry["kwargs"])},
            *_names([entry["name"]]),
        )
        if _drops(node.target, node.args, node.kwargs):
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
