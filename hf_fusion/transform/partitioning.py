"""The partitioners and their groups under one name."""

from .groups import FusionGroup, ParallelFusionGroup
from .partition import AttentionFusionPartitioner, FusionBasedPartitioner
from .report import FusionReport

__all__ = [
    "AttentionFusionPartitioner",
    "FusionBasedPartitioner",
    "FusionGroup",
    "FusionReport",
    "ParallelFusionGroup",
]
