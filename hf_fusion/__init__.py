"""Fused kernels under Hugging Face models: `patch` a model, `generate` as before, read the report.

    import hf_fusion
    report = hf_fusion.patch(model)
    model.generate(**inputs)
    print(hf_fusion.stats(model))
    hf_fusion.unpatch(model)
"""

from .attention import attention_stats, register_attention
from .backends import supported
from .patching import patch, patched, stats, unpatch
from .registry import register_family
from .report import FusionError, Reason, Report, Stats

__version__ = "0.1.0"

__all__ = [
    "FusionError",
    "Reason",
    "Report",
    "Stats",
    "attention_stats",
    "patch",
    "patched",
    "register_attention",
    "register_family",
    "stats",
    "supported",
    "unpatch",
]
