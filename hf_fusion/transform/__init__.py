"""Models as graphs: captured, taken apart, put together from fused parts, run and measured."""

from .capture import Capture, capture
from .interface import count_attention_layers
from .multihead import DecomposedMultiheadAttention
from .tracer import DecomposingAttentionTracer, DecomposingTracer, trace_with_decomposition

__all__ = [
    "Capture",
    "DecomposedMultiheadAttention",
    "DecomposingAttentionTracer",
    "DecomposingTracer",
    "capture",
    "count_attention_layers",
    "trace_with_decomposition",
]
