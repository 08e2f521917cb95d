"""Measurements beside stock, each with its verdict: ablation, sweeps, bench, perplexity.

from hf_fusion.harness import Settings, run_ablation
print(run_ablation(Settings(model="pythia-70m", dtype="bf16")).markdown())
"""

from .ablation import AblationResult, Row, Settings, run_ablation
from .attention_result import AttentionResult
from .attention_study import AttentionSettings, run_attention
from .attention_tune import TuneResult, run_tune
from .encoders import ENCODER_SHAPES
from .inputs import RUNGS, InputError
from .models import PYTHIA_SHAPES, LoadedModel, load_model
from .perplexity import PerplexityResult, PerplexityRow, PerplexitySettings, run_perplexity
from .render import write
from .sweep import BenchResult, SweepResult, run_batch_sweep, run_bench, run_context_sweep
from .work import WorkSettings, run_work
from .work_result import WorkItem, WorkResult, WorkRow

__all__ = [
    "AblationResult",
    "AttentionResult",
    "AttentionSettings",
    "BenchResult",
    "ENCODER_SHAPES",
    "InputError",
    "LoadedModel",
    "PYTHIA_SHAPES",
    "PerplexityResult",
    "PerplexityRow",
    "PerplexitySettings",
    "RUNGS",
    "Row",
    "Settings",
    "SweepResult",
    "TuneResult",
    "WorkItem",
    "WorkResult",
    "WorkRow",
    "WorkSettings",
    "load_model",
    "run_ablation",
    "run_attention",
    "run_batch_sweep",
    "run_bench",
    "run_context_sweep",
    "run_perplexity",
    "run_tune",
    "run_work",
    "write",
]
