"""Perplexity of each rung against stock over the same windows of a text.

Both models see the same windows (paired), so the difference of their mean negative log-likelihoods
is known far better than either perplexity. The path is "prefill" (a window in one call) or "decode"
(its tokens one by one through the KV cache, each fed the text's own token, so that the decode
kernels are what is judged).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hf_fusion.cache import CACHE

from . import machine
from .inputs import (
    COMPILED,
    RUNGS,
    STOCK,
    InputError,
    at_least,
    backend_name,
    dtype_name,
    read_text,
    rung_names,
    thread_count,
    unaccepted,
)
from .models import LoadedModel, heldout_text, load_model, token_stream
from .progress import progress
from .render import perplexity_markdown
from .timing import applied, noted_calls, torch_threads

PATHS = ("prefill", "decode")
LIMITS = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 2e-3}
"""Largest accepted relative difference of perplexity."""
NEGLIGIBLE = 0.1
"""A difference beyond two standard errors is a bias, and fails, from this share of the limit on."""
_CHUNK = 64  # positions whose logits are raised to fp64 at a time


@dataclass(frozen=True)
class PerplexitySettings:
    """What to score. `text` is a file, None the held-out text of the shipped model; `dataset` a
    `datasets` name, with `split` None for "test" and `column` None for "text".
    """

    model: str = "tiny"
    dtype: str = "fp32"
    rungs: tuple[str, ...] = ("full",)
    paths: tuple[str, ...] = PATHS
    backend: str = "auto"
    text: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str | None = None
    column: str | None = None
    window: int | None = None
    stride: int | None = None
    max_windows: int | None = None
    batch: int = 1
    threads: int | None = None
    seed: int = 0


@dataclass
class PerplexityRow:
    """One rung on one path: `nll` is the mean over scored tokens, in nats; differences are against
    stock's same path.
    """

    name: str
    label: str
    path: str
    nll: float
    perplexity: float
    relative_difference: float = 0.0
    difference: float = 0.0
    standard_error: float | None = None
    within_limit: bool = True
    within_noise: bool | None = None
    failure: str | None = None
    calls: dict[str, Any] = field(default_factory=dict)
    window_nll: list[float] = field(default_factory=list)


@dataclass
class PerplexityResult:
    """Rows, stock's first on each path, and what they were scored on."""

    settings: PerplexitySettings
    model: str
    source: str
    dtype: str
    corpus: str
    window: int
    windows: int
    scored: int
    limit: float
    rows: list[PerplexityRow]
    environment: dict[str, Any]
    positions: int | None = None

    @property
    def passed(self) -> bool:
        """Whether every rung keeps the limit and was fused."""
        return all(row.failure is None for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"kind": "perplexity", "passed": self.passed, **asdict(self)}

    def markdown(self) -> str:
        """The table with its notes."""
        return perplexity_markdown(self)


def run_perplexity(
    settings: PerplexitySettings, loaded: LoadedModel | None = None, text: str | None = None
) -> PerplexityResult:
    """Scores stock and every rung of `settings`. `loaded` reuses a model, `text` takes the place of
    a file.
    """
    rungs = _check(settings)
    corpus, text = ("text given by the caller", text) if text is not None else corpus_text(settings)
    dtype = dtype_name(settings.dtype)
    loaded = loaded or load_model(settings.model, dtype, settings.seed)
    ids = _tokens(loaded, text)
    size = settings.window or min(512, loaded.positions or 512)
    windows, fresh = cut_windows(ids, size, settings.stride, settings.max_windows)
    rows = []
    steps = len(rungs) * len(settings.paths) * -(-windows.shape[0] // settings.batch)
    with (
        progress(f"perplexity of {settings.model} {dtype}", steps) as advance,
        torch_threads(settings.threads),
    ):
        for path in settings.paths:
            stock = None
            for rung in rungs:
                row = _score(loaded, rung, path, windows, fresh, settings, advance)
                stock = _judge(row, stock, fresh, LIMITS[dtype])
                rows.append(row)
    return PerplexityResult(
        settings,
        settings.model,
        loaded.source,
        dtype,
        corpus,
        windows.shape[1],
        windows.shape[0],
        int(fresh.sum()),
        LIMITS[dtype],
        rows,
        machine.environment(settings.threads),
        loaded.positions,
    )


def corpus_text(settings: PerplexitySettings) -> tuple[str, str]:
    """(description, text) of the corpus the settings name; datasets are loaded only when asked
    for.
    """
    if settings.dataset is None:
        if settings.text is None:
            return "held-out text of the shipped model", heldout_text()
        return f"text {settings.text}", read_text(settings.text)
    if settings.text is not None:
        raise InputError(
            f"both text {settings.text!r} and dataset {settings.dataset!r} are given: expected one"
        )
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"dataset {settings.dataset!r} needs the package datasets: pip install datasets"
        ) from None
    split, column = settings.split or "test", settings.column or "text"
    try:
        rows = datasets.load_dataset(settings.dataset, settings.dataset_config, split=split)
    except Exception as error:  # for a name it cannot find, of a dozen unrelated types
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"dataset {settings.dataset!r}, split {split!r} cannot be loaded: {first}"
        ) from None
    if column not in rows.column_names:
        raise unaccepted("column", column, rows.column_names)
    return f"dataset {settings.dataset}, {split}", "\n\n".join(rows[column])


def cut_windows(
    ids: torch.Tensor, size: int, stride: int | None = None, most: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(windows (n, size), tokens scored in each (n)) of ids (tokens,): whole windows only, `stride`
    apart.

    The first token of a window has nothing before it and is never scored; where windows overlap, a
    token is scored in the first window that holds it. A text shorter than one window is one window.
    """
    at_least("window", size, 2)
    stride = at_least("stride", size if stride is None else stride, 1)
    if stride > size:
        raise InputError(f"stride is {stride}: expected at most the window, {size}")
    if ids.numel() < 2:
        raise InputError(f"the text has {ids.numel()} tokens: expected at least 2")
    size = min(size, ids.numel())
    windows = ids.unfold(0, size, min(stride, size))[:most]
    fresh = torch.full((windows.shape[0],), min(stride, size - 1))
    fresh[0] = size - 1
    return windows, fresh


@torch.no_grad()
def window_nll(
    model: nn.Module, windows: torch.Tensor, fresh: torch.Tensor, path: str
) -> torch.Tensor:
    """Summed negative log-likelihood (n) fp64, in nats, of the last `fresh` tokens of each of
    windows (n, size).
    """
    if path == "prefill":
        logits = model(input_ids=windows, use_cache=False).logits
        losses = [
            _losses(logits[:, at : at + _CHUNK], windows[:, 1:][:, at : at + _CHUNK])
            for at in range(0, windows.shape[1] - 1, _CHUNK)
        ]
    else:
        losses = _decoded_losses(model, windows)
    per_token = torch.cat(losses, 1)
    counted = torch.arange(per_token.shape[1])[None] >= per_token.shape[1] - fresh[:, None]
    return (per_token * counted).sum(1)


def _decoded_losses(model: nn.Module, windows: torch.Tensor) -> list[torch.Tensor]:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    losses = []
    for at in range(windows.shape[1] - 1):
        logits = model(
            input_ids=windows[:, at : at + 1], use_cache=True, **{CACHE: cache}
        ).logits
        losses.append(_losses(logits, windows[:, at + 1 : at + 2]))
    return losses


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(n, positions) fp64 of logits (n, >= positions, vocabulary) and targets (n, positions)."""
    logits = logits[:, : targets.shape[1]].double()
    return functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def _score(
    loaded: LoadedModel,
    rung: str,
    path: str,
    windows: torch.Tensor,
    fresh: torch.Tensor,
    settings: PerplexitySettings,
    advance: Callable[[str], None],
) -> PerplexityRow:
    """One row without its comparison."""
    from .inputs import label

    sums = []
    with applied(loaded.model, rung, settings.backend):
        for at in range(0, windows.shape[0], settings.batch):
            part = slice(at, at + settings.batch)
            sums.append(window_nll(loaded.model, windows[part], fresh[part], path))
            advance(f"{rung}, {path}")
        calls = {} if rung == STOCK else noted_calls(loaded.model)
    nll = torch.cat(sums)
    mean = float(nll.sum() / fresh.sum())
    return PerplexityRow(
        rung, label(rung), path, mean, math.exp(mean), calls=calls, window_nll=nll.tolist()
    )


def _judge(
    row: PerplexityRow, stock: PerplexityRow | None, fresh: torch.Tensor, limit: float
) -> PerplexityRow:
    """Compares a row with stock's, window by window; returns stock's row."""
    if stock is None:
        return row
    weights = fresh.double()
    paired = (_wide(row) - _wide(stock)) / weights
    row.difference = row.nll - stock.nll
    row.relative_difference = math.expm1(row.difference)
    if len(paired) > 1:
        row.standard_error = float(paired.std() / math.sqrt(len(paired)))
        row.within_noise = abs(row.difference) <= 2 * row.standard_error
    row.within_limit = abs(row.relative_difference) <= limit
    if row.name != "none" and not row.calls["fused"]:
        reasons = ", ".join(f"{reason} x {count}" for reason, count in row.calls["refused"].items())
        row.failure = f"nothing was fused ({reasons or 'no reason counted'})"
    elif row.within_noise is False and abs(row.relative_difference) > NEGLIGIBLE * limit:
        row.failure = (
            f"relative difference {row.relative_difference:+.2e} is beyond two standard errors, "
            f"{2 * row.standard_error:.1e}"
        )
    elif not row.within_limit:
        row.failure = f"relative difference {row.relative_difference:+.2e} is beyond {limit:.0e}"
    return stock


def _wide(row: PerplexityRow) -> torch.Tensor:
    return torch.tensor(row.window_nll, dtype=torch.float64)


def _tokens(loaded: LoadedModel, text: str) -> torch.Tensor:
    """The text by the model's tokenizer; a shape without one borrows the shipped model's."""
    lender = loaded
    if loaded.tokenizer is None:
        from transformers import AutoTokenizer

        from .models import tiny_folder

        tokenizer = AutoTokenizer.from_pretrained(str(tiny_folder()), trust_remote_code=False)
        lender = LoadedModel(loaded.name, loaded.dtype, loaded.source, loaded.model, tokenizer)
    ids = token_stream(lender, text)
    if ids is None:
        raise InputError(
            f"the text has no tokens that model {loaded.name!r} knows: expected text for its "
            "tokenizer"
        )
    return ids


def _check(settings: PerplexitySettings) -> tuple[str, ...]:
    """The rungs; InputError for what is not accepted."""
    backend_name(settings.backend)
    at_least("batch", settings.batch, 1)
    thread_count(settings.threads)
    if settings.max_windows is not None:
        at_least("windows", settings.max_windows, 1)
    if COMPILED in settings.rungs:
        raise InputError(
            "rung 'compiled' has no perplexity of its own: expected rungs of hf_fusion"
        )
    for path in settings.paths or ("",):
        if path not in PATHS:
            raise unaccepted("path", path, PATHS)
    for name in ("dataset_config", "split", "column"):
        if settings.dataset is None and getattr(settings, name) is not None:
            raise InputError(
                f"{name.replace('_', ' ')} {getattr(settings, name)!r} is given without a dataset: "
                "expected --dataset"
            )
    return rung_names(settings.rungs, RUNGS)
