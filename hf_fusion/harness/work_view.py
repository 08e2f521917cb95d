"""Results of `work` as Markdown and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import peers
from .encoders import IMAGE
from .inputs import STOCK
from .machine import describe
from .render import command_line, counts, figure, stock_in_part, table

if TYPE_CHECKING:
    from .work_result import WorkItem, WorkResult, WorkRow


def work_markdown(result: WorkResult) -> str:
    """One table per model and dtype; absent peers, failures, the peak and the command below."""
    settings, record = result.settings, result.environment
    lines = []
    for items in panels(result, by_batch=False):
        first = items[0]
        lines += [
            f"{first.model} ({first.source}), {first.dtype}, {settings.rounds} interleaved rounds, "
            f"fp32 matmul precision {settings.matmul_precision}.",
            "",
            table(_header(first, settings.memory), _body(items, settings.memory)),
            "",
            *_notes(items),
        ]
    lines += result.ending.notes()
    lines += [
        "Error: largest absolute one against stock in higher precision, padding left out, over "
        f"stock's own; {_limit(settings.matmul_precision)}. GFLOP: from the shapes, padding not "
        "counted.",
        describe(record),
        command_line(record),
    ]
    return "\n".join(lines)


def _limit(precision: str) -> str:
    return {
        "highest": "limit 2",
        "high": "limit 2 or, in fp32, 2^-14 of the output in L2",
        "medium": "limit 2, in fp32 over stock's in bf16",
    }[precision]


def panels(result: WorkResult, by_batch: bool) -> list[list[WorkItem]]:
    """Items of one model and dtype together, and of one batch where both batch and length vary."""
    found: dict[Any, list[WorkItem]] = {}
    lengths = result.settings.lengths or ()
    split = by_batch and len(lengths) > 1
    for item in result.items:
        key = (item.model, item.dtype, item.work.batch if split else None)
        found.setdefault(key, []).append(item)
    return list(found.values())


def draw_work(target: Any, result: WorkResult) -> None:
    """A panel of bars for each point that stands alone, of lines for each sweep."""
    groups = panels(result, by_batch=True)
    columns = min(len(groups), 2)
    rows = -(-len(groups) // columns)
    target.set_size_inches(8 * columns, 4.2 * rows)
    for number, items in enumerate(groups):
        axes = target.add_subplot(rows, columns, number + 1)
        axes.spines[["top", "right"]].set_visible(False)
        title = f"{items[0].model} {items[0].dtype}"
        if len(items) == 1:
            _bars(axes, items[0])
            title += f", {items[0].work.label}"
        else:
            _lines(axes, items)
        axes.set_title(title, loc="left")


_MEMORY = ["peak MiB", "activations MB"]


def _header(item: WorkItem, memory: bool) -> list[str]:
    header = ["work", "contender", "ms (quartiles)", item.work.unit, "stock / it", "GFLOP"]
    header += ["share of measured peak"] + (_MEMORY if memory else [])
    return [*header, "error / stock's", "verdict", "calls fused / refused"]


def _body(items: Sequence[WorkItem], memory: bool) -> list[list[str]]:
    body = []
    for item in items:
        body += [_cells(item, row, memory) for row in item.rows]
        for peer in item.absent:
            blank = ["-"] * (len(_header(item, memory)) - 3)
            body.append([item.work.label, peers.LABELS[peer], "absent", *blank])
    return body


def _cells(item: WorkItem, row: WorkRow, memory: bool) -> list[str]:
    time = row.ms and f"{row.ms.median:.3f} ({row.ms.low:.3f}-{row.ms.high:.3f})"
    cells = [
        item.work.label,
        row.label,
        time or "no result",
        figure(row.per_second, "{:.1f}"),
        figure(row.speedup, "{:.2f}"),
        f"{item.flops / 1e9:.2f}",
        figure(row.peak_share, "{:.2f}"),
    ]
    if memory:
        found = row.memory or {}
        cells.append(figure(found.get("peak") and found["peak"] / 2**20, "{:.0f}"))
        cells.append(figure(found.get("activations") and found["activations"] / 1e6, "{:.2f}"))
    verdict = "baseline" if row.name == STOCK else "failed" if row.failure else "ok"
    return [*cells, figure(row.parity and row.parity.ratio, "{:.2f}"), verdict, counts(row.calls)]


def _notes(items: Sequence[WorkItem]) -> list[str]:
    notes = []
    for item in items:
        point = f"- {item.work.label}, "
        notes += [f"{point}{row.label}: {row.failure}" for row in item.rows if row.failure]
        partly = [(row.label, stock_in_part(row)) for row in item.rows]
        notes += [f"{point}{name} {reason}" for name, reason in partly if reason]
        notes += [
            f"{point}{peers.LABELS[peer]} is absent: {reason}"
            for peer, reason in item.absent.items()
        ]
    parity, peak = items[0].rows[0].parity, items[0].peak
    if parity:
        notes.append(f"Stock's own error at {items[0].work.label}: {parity.error:.3g}.")
    if peak:
        notes.append(
            f"Measured peak (2048x2048x2048, native, same rounds): {peak.median / 1e9:.0f} "
            f"GFLOP/s ({peak.low / 1e9:.0f}-{peak.high / 1e9:.0f})."
        )
    return [*notes, ""]


def _bars(axes: Any, item: WorkItem) -> None:
    rows = [row for row in item.rows if row.ms]
    times = [row.ms.median for row in rows]
    errors = [
        [row.ms.median - row.ms.low for row in rows],
        [row.ms.high - row.ms.median for row in rows],
    ]
    colors = [_color(row) for row in rows]
    bars = axes.barh([row.label for row in rows], times, xerr=errors, color=colors, capsize=3)
    marks = [", failed" if row.failure else "" for row in rows]
    axes.bar_label(
        bars,
        [f"  {row.ms.median:.1f} ms, {row.speedup:.2f}x{mark}" for row, mark in zip(rows, marks)],
    )
    if item.peak:
        floor = item.flops / item.peak.median * 1e3
        axes.axvline(floor, color="#c0392b", linestyle="--", label="measured peak")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axes.invert_yaxis()
    axes.set_xlim(0, max(row.ms.high for row in rows) * 1.35)
    axes.set_xlabel("ms (median over rounds, bars: quartiles)")


def _lines(axes: Any, items: Sequence[WorkItem]) -> None:
    by_length = len({item.work.length for item in items}) > 1
    for row in items[0].rows:
        found = [(item, item.row(row.name)) for item in items]
        points = [
            (item.work.length if by_length else item.work.batch, same.per_second)
            for item, same in found
            if same and same.per_second
        ]
        style = "--" if row.peer else "-"
        axes.plot(*zip(*points), style, marker="o", label=row.label) if points else None
    axes.set_ylim(bottom=0)
    images = items[0].work.kind == IMAGE
    axes.set_xlabel("length in tokens" if by_length else "images" if images else "batch")
    axes.set_ylabel(items[0].work.unit)
    axes.legend(fontsize=8)


def _color(row: WorkRow) -> str:
    return "#7f8c8d" if row.name == STOCK else "#b9770e" if row.peer else "#2471a3"
