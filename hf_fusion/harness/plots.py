"""Results as pictures: bars for an ablation and a bench, lines for a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .inputs import COMPILED, STOCK, InputError

if TYPE_CHECKING:
    from .ablation import AblationResult, Row
    from .sweep import BenchResult, SweepResult

PICTURES = (".png", ".svg", ".pdf")


def median_ms(row: Row | None) -> float | None:
    """Median milliseconds of a step, None without a result."""
    return row.step_ms.median if row and row.step_ms else None


def library() -> Any:
    """matplotlib; InputError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "a picture needs matplotlib, which is not installed: pip install matplotlib"
        ) from None
    return matplotlib


def picture(result: Any, path: Path) -> None:
    """Bars for an ablation, lines for a sweep and for attention, grouped bars for a bench, both for
    `work`.
    """
    library().use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    if result.to_dict()["kind"] in ("work", "attention"):
        from .attention_view import draw_attention
        from .work_view import draw_work

        (draw_work if result.to_dict()["kind"] == "work" else draw_attention)(figure, result)
        figure.savefig(path, dpi=150)
        return
    axes = figure.add_subplot()
    draw = {"ablation": _draw_ladder, "sweep": _draw_sweep, "bench": _draw_bench}.get(
        result.to_dict()["kind"]
    )
    if draw is None:
        raise InputError(
            "this result has no picture: accepted are ablation, sweep, bench and attention results"
        )
    draw(axes, result)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _draw_ladder(axes: Any, result: AblationResult) -> None:
    rows = [row for row in result.rows if row.step_ms]
    medians = [row.step_ms.median for row in rows]
    errors = [
        [row.step_ms.median - row.step_ms.low for row in rows],
        [row.step_ms.high - row.step_ms.median for row in rows],
    ]
    colors = ["#7f8c8d" if row.name in (STOCK, COMPILED) else "#2471a3" for row in rows]
    bars = axes.barh([row.label for row in rows], medians, xerr=errors, color=colors, capsize=3)
    axes.bar_label(bars, [f"  {row.step_ms.median:.2f} ms, {row.speedup:.2f}x" for row in rows])
    if result.stream_floor_ms:
        axes.axvline(result.stream_floor_ms, color="#c0392b", linestyle="--", label="read stream")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axes.invert_yaxis()
    axes.set_xlim(0, max(medians) * 1.3)
    axes.set_xlabel("ms per token (median over rounds, bars: quartiles)")
    settings = result.settings
    title = f"{settings.model} {settings.dtype}, batch {settings.batch}, threads {settings.threads}"
    axes.set_title(title, loc="left")


def _draw_sweep(axes: Any, result: SweepResult) -> None:
    first = result.points[0][1]
    for row in first.rows:
        points = [(value, median_ms(point.row(row.name))) for value, point in result.points]
        points = [(value, time) for value, time in points if time]
        axes.plot(*zip(*points), marker="o", label=row.label) if points else None
    floor = [
        (value, point.stream_floor_ms) for value, point in result.points if point.stream_floor_ms
    ]
    if floor:
        axes.plot(*zip(*floor), color="#c0392b", linestyle="--", label="read stream")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the cache" if result.kind == "context" else "batch")
    axes.set_ylabel("ms per decode step")
    axes.set_title(
        f"{first.settings.model} {first.settings.dtype}, threads {first.settings.threads}"
    )
    axes.legend()


def _draw_bench(axes: Any, result: BenchResult) -> None:
    names = [f"{item.settings.model}\n{item.settings.dtype}" for item in result.items]
    for offset, rung in ((-0.2, STOCK), (0.2, "full")):
        times = [median_ms(item.row(rung)) or 0.0 for item in result.items]
        bars = axes.bar([place + offset for place in range(len(names))], times, 0.4, label=rung)
        axes.bar_label(bars, [f"{time:.1f}" for time in times], fontsize=8)
    floors = [item.stream_floor_ms for item in result.items]
    for place, floor in enumerate(floors):
        if floor:
            axes.hlines(floor, place - 0.4, place + 0.4, color="#c0392b", linestyle="--")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("ms per token (dashed: read stream)")
    axes.legend()
