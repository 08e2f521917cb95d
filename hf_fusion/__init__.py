"""Fused kernels under Hugging Face models: `patch` a model, `generate` as before, read the report.

    import hf_fusion
    report = hf_fusion.patch(model)
    model.generate(**inputs)
    print(hf_fusion.stats(model))
    hf_fusion.unpatch(model)
"""

from .attention import attention_stats, register_attention
from .backends import supported
from .decoding import custom_generate
from .generation import generate
from .patching import patch, patched, stats, unpatch
from .registry import register_family
from .report import FusionError, Reason, Report, Stats


def fuse(model, example_inputs=None, **options):
    """A `transform.FusedModel` of the model; arguments as of `hf_fusion.transform.fuse`."""
    # not at the top: the graph road's imports are needed by nobody who patches
    from .transform import fuse as graph_fuse

    return graph_fuse(model, example_inputs, **options)


__version__ = "0.1.0"

__all__ = [
    "FusionError",
    "Reason",
    "Report",
    "Stats",
    "attention_stats",
    "custom_generate",
    "fuse",
    "generate",
    "patch",
    "patched",
    "register_attention",
    "register_family",
    "stats",
    "supported",
    "unpatch",
]
