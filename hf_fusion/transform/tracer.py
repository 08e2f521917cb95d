"""Models as graphs in which attention is explicit."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

from ..report import FusionError, Reason
from .capture import Capture, capture
from .explicit import spell_out
from .interface import attention_layers
from .multihead import DecomposedMultiheadAttention, DropIn

LEVELS = ("semantic", "explicit")


def decompose(captured: Capture, level: str = "explicit") -> int:
    """Brings the captured graph to `level`; returns the number of attentions spelled out."""
    if level not in LEVELS:
        raise FusionError(Reason.ARGUMENT, f"level is {level!r}, expected one of {LEVELS}")
    return spell_out(captured.graph_module) if level == "explicit" else 0


def trace_with_decomposition(
    model: nn.Module,
    concrete_args: dict[str, Any] | None = None,
    *,
    example_inputs: Any = None,
    level: str = "explicit",
    dynamic: bool = True,
) -> fx.GraphModule:
    """The model as a GraphModule with attention as operations, equal to the model in what it gives.

    With example inputs, or a transformers model: torch.export, and calls as the signature's order
    of tensors. Otherwise a symbolic trace with every nn.MultiheadAttention taken apart.
    concrete_args: arguments held constant. The model itself is not changed.
    """
    tracer = DecomposingTracer(example_inputs=example_inputs, level=level, dynamic=dynamic)
    graph = tracer.trace(model, concrete_args)
    return fx.GraphModule(tracer.root, graph, type(model).__name__)


class DecomposingTracer(fx.Tracer):
    """A tracer whose graphs have no opaque attention.

    After `trace`: `decomposed_modules` names the attention layers taken apart, `root` is the module
    that holds the graph's parameters, which are the model's own.
    """

    def __init__(
        self, *, example_inputs: Any = None, level: str = "explicit", dynamic: bool = True
    ):
        super().__init__()
        self.example_inputs, self.level, self.dynamic = example_inputs, level, dynamic
        self.decomposed_modules: list[str] = []

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of `root`; FusionError where it can be traced neither way."""
        if self.example_inputs is not None or hasattr(root, "main_input_name"):
            captured = capture(root, self._examples(concrete_args), dynamic=self.dynamic)
            decompose(captured, self.level)
            self.decomposed_modules = list(captured.expected)
            self.root = captured.graph_module
            return captured.graph_module.graph
        # a copy of the structure over the same parameters: the model keeps its modules
        shared = {id(t): t for t in (*root.parameters(), *root.buffers())}
        root = copy.deepcopy(root, shared)
        self.decomposed_modules = []
        for name, module in list(root.named_modules()):
            if isinstance(module, nn.MultiheadAttention):
                parent, _, child = name.rpartition(".")
                if name:
                    setattr(root.get_submodule(parent), child, DropIn.from_module(module))
                else:
                    root = DropIn.from_module(module)
                self.decomposed_modules.append(name)
        opaque = [
            type(layer).__name__ for layer in attention_layers(root).values()
            if not isinstance(layer, DecomposedMultiheadAttention)
        ]  # fmt: skip
        if opaque:
            raise FusionError(Reason.INPUT, f"{opaque[0]}: give example_inputs to take it apart")
        try:
            return super().trace(root, concrete_args)
        except (TypeError, ValueError, RuntimeError, fx.proxy.TraceError) as error:
            name = type(root).__name__
            raise FusionError(
                Reason.TRACING, f"{name} needs example_inputs, a symbolic trace fails: {error}"
            ) from error

    def _examples(self, concrete_args: dict[str, Any] | None) -> Any:
        if not concrete_args:
            return self.example_inputs
        given = self.example_inputs
        return {**(given if isinstance(given, dict) else {}), **concrete_args}

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        """Attention and the layers around it are looked into."""
        around = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.TransformerDecoder,
                  nn.TransformerDecoderLayer, nn.Transformer)  # fmt: skip
        if isinstance(module, (DropIn, *around)):
            return False
        return super().is_leaf_module(module, module_qualified_name)


DecomposingAttentionTracer = DecomposingTracer
