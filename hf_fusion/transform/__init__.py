"""Models as graphs: captured, taken apart, put together from fused parts, run and measured."""

from . import inductor, native  # noqa: F401  each registers itself
from .backends import register_backend
from .capture import Capture, capture
from .groups import FusionGroup, ParallelFusionGroup
from .interface import count_attention_layers
from .model import FusedModel, fuse
from .multihead import DecomposedMultiheadAttention
from .partition import AttentionFusionPartitioner, FusionBasedPartitioner
from .report import FusionReport
from .rules import register_fusion_rule
from .tracer import DecomposingAttentionTracer, DecomposingTracer, trace_with_decomposition
from .variants import register_attention_variant

__all__ = [
    "AttentionFusionPartitioner",
    "Capture",
    "DecomposedMultiheadAttention",
    "DecomposingAttentionTracer",
    "DecomposingTracer",
    "FusedModel",
    "FusionBasedPartitioner",
    "FusionGroup",
    "FusionReport",
    "ParallelFusionGroup",
    "capture",
    "count_attention_layers",
    "fuse",
    "register_attention_variant",
    "register_backend",
    "register_fusion_rule",
    "trace_with_decomposition",
]
