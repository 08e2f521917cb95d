"""What a node is: an operator's common name and class, whoever traced the graph.

Exported graphs hold aten operators, symbolic traces modules, functions and methods; both get the
same names here. Views and questions about shapes are no work and are not counted as operators.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from . import ops
from .canonical import is_view

GEMM, NORM, ATTENTION, SOFTMAX = "gemm", "norm", "attention", "softmax"
POINTWISE, OTHER, VIEW, SHAPE, INPUT = "pointwise", "other", "view", "shape", "input"

LINEAR = {"linear", "addmm", "mm"}
_CLASSES = {
    GEMM: LINEAR
    | {"matmul", "bmm", "baddbmm", "convolution", "conv1d", "conv2d", "conv3d", "einsum"},
    NORM: {"layer_norm", "group_norm", "batch_norm", "instance_norm", "rms_norm"},
    ATTENTION: {"attention", "scaled_dot_product_attention", "multi_head_attention"},
    SOFTMAX: {"softmax", "log_softmax"},
    VIEW: {
        "reshape", "view", "transpose", "permute", "unsqueeze", "squeeze", "expand", "flatten",
        "unflatten", "split", "chunk", "unbind", "contiguous", "getitem", "t", "dropout",
        "identity", "slice", "select", "split_with_sizes", "alias", "detach", "expand_as",
        "narrow", "movedim",
    },
    SHAPE: {"sym_size", "size", "getattr", "dim", "eq", "_assert", "ge", "floordiv",
            "_assert_scalar",
            "sym_constrain_range_for_size", "_guards_fn", "sym_numel", "sym_float", "sym_int"},
    POINTWISE: {"gelu", "relu", "silu", "tanh", "sigmoid", "add", "mul", "sub", "div", "truediv",
                "neg", "pow", "rsqrt", "exp", "hardswish", "hardtanh", "relu6", "to", "where",
                "masked_fill", "iadd", "imul"},
}  # fmt: skip
_MODULES = {
    "multiheadattention": "multi_head_attention", "layernorm": "layer_norm", "dropin": "attention",
    "batchnorm2d": "batch_norm", "batchnorm1d": "batch_norm", "groupnorm": "group_norm",
    "rmsnorm": "rms_norm", "conv1d": "conv1d", "nondynamicallyquantizablelinear": "linear",
}  # fmt: skip
ACTIVATIONS = {"gelu", "relu", "silu", "tanh", "sigmoid", "hardswish", "relu6", "leaky_relu", "elu"}


def name_of(node: fx.Node) -> str:
    """The operator's common name: linear, layer_norm, add, ..."""
    target = node.target
    if node.op == "call_module":
        kind = type(_module(node)).__name__.lower()
        return _MODULES.get(kind, kind)
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    if node.op == "call_method":
        return str(target)
    return getattr(target, "__name__", str(target))


def _module(node: fx.Node) -> nn.Module | None:
    owner = node.graph.owning_module
    try:
        return owner.get_submodule(node.target) if owner is not None else None
    except AttributeError:
        return None


def class_of(node: fx.Node) -> str:
    """One of the classes above."""
    if node.op in ("placeholder", "get_attr", "output"):
        return INPUT
    if _is_scalar(node):
        return SHAPE
    name = name_of(node)
    tensor = isinstance(node.meta.get("val"), torch.Tensor)
    for kind, names in _CLASSES.items():
        if name in names and not (kind == SHAPE and tensor):
            return kind
    if node.target is ops.attention:
        return ATTENTION
    if is_view(node):
        return VIEW
    tags = getattr(node.target, "tags", ())
    return POINTWISE if torch.Tag.pointwise in tags else OTHER


def _is_scalar(node: fx.Node) -> bool:
    value = node.meta.get("val")
    scalar = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
    if isinstance(value, scalar):
        return True
    return value is None and node.target in (operator.floordiv, torch.ops.aten.sym_size.int)


def is_kernel(node: fx.Node) -> bool:
    """Whether running the node is work: not an input, a view or a shape."""
    return class_of(node) not in (INPUT, SHAPE, VIEW)


def owner_of(node: fx.Node) -> str:
    """Path of the innermost module, above single linear and norm layers, that the node ran in."""
    return module_path(node)[-1][0] if module_path(node) else ""


_LEAVES = ("Linear", "Conv1D", "LayerNorm", "Dropout", "Norm", "Embedding", "Activation", "GELU")


def module_path(node: fx.Node) -> list[tuple[str, str]]:
    """(path, class name) of the modules around the node, outermost first, without leaf layers."""
    found = []
    for path, kind in node.meta.get("nn_module_stack", {}).values():
        name = kind if isinstance(kind, str) else kind.__name__
        found.append(
            (path.removeprefix("L['self'].").removeprefix("L['self']"), name.split(".")[-1])
        )
    while found and any(found[-1][1].endswith(leaf) for leaf in _LEAVES):
        found.pop()
    return found


def bytes_of(node: fx.Node) -> int:
    """Bytes of the node's tensors at the captured sizes; 0 where no value is known."""
    values = node.meta.get("val")
    if values is None and "tensor_meta" in node.meta:
        meta = node.meta["tensor_meta"]
        if hasattr(meta, "shape"):
            return int(meta.shape.numel()) * meta.dtype.itemsize
    total = 0
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(value, torch.Tensor):
            count = 1
            for extent in value.shape:
                count *= extent if isinstance(extent, int) else int(extent.node.hint or 1)
            total += count * value.element_size()
    return total


def exclusive_views_up(node: fx.Node) -> list[fx.Node]:
    """Views above `node`, as long as each has one reader; nearest first."""
    found = []
    while class_of(node) == VIEW and len(node.users) == 1 and node.all_input_nodes:
        found.append(node)
        node = node.args[0]
    return found


def exclusive_views_down(node: fx.Node) -> list[fx.Node]:
    """Views below `node`, as long as each node has one reader; nearest first."""
    found = []
    while len(node.users) == 1:
        (node,) = node.users
        if class_of(node) != VIEW or name_of(node) == "getitem":
            break
        found.append(node)
    return found
