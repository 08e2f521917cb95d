"""Results of `attention_study` and `attention_tune` as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_fusion.attend import KERNELS

from .attention_result import TORCH
from .attention_study import GROUPS, LAYERS
from .machine import describe
from .render import command_line, figure, table

if TYPE_CHECKING:
    from .attention_result import AttentionPoint, AttentionResult, AttentionRow
    from .attention_tune import TuneResult

_COLORS = {
    "naive": "#c0392b", "tiled": "#e59866", "flash": "#2471a3", "sdpa": "#7f8c8d",
    "sdpa_flash": "#aab7b8", "sdpa_math": "#bfc9ca", "eager": "#5d6d7e",
}  # fmt: skip


def attention_markdown(result: AttentionResult) -> str:
    """One table per dtype and head size, one of decode steps; failures and the command below."""
    settings = result.settings
    lines = [
        f"Attention alone, {settings.heads} heads, batch {settings.batch}, "
        f"{'causal' if settings.causal else 'not causal'}, {settings.rounds} interleaved rounds.",
        "",
    ]
    for points in sweeps(result):
        lines += [f"{points[0].dtype}, head size {points[0].head_dim}", "", _prefill(points), ""]
    steps = [point for point in result.points if point.kind in GROUPS]
    if steps:
        lines += [
            f"Decode steps at {settings.context} tokens, {settings.decode_heads} heads, through "
            f"{LAYERS} caches",
            "",
            _decode(steps),
            "",
        ]
    lines += _notes(result.points)
    lines += result.ending.notes()
    lines += [
        "Error: largest absolute one on sampled queries against fp64; allowed: twice that of torch "
        "SDPA and two steps of the dtype. Memory: planned beside the operands, and, where it was "
        "measured, by how much a process of its own grew.",
        describe(result.environment),
        command_line(result.environment),
    ]
    return "\n".join(lines)


def sweeps(result: AttentionResult) -> list[list[AttentionPoint]]:
    """Points of one dtype and head size, by rising length."""
    found: dict[Any, list[AttentionPoint]] = {}
    for point in result.points:
        if point.kind == "prefill":
            found.setdefault((point.dtype, point.head_dim), []).append(point)
    return [sorted(points, key=lambda point: point.keys) for points in found.values()]


def _prefill(points: Sequence[AttentionPoint]) -> str:
    header = [
        "tokens", "kernel", "ms (quartiles)", "naive / it", "SDPA / it", "GFLOP/s", "memory MiB",
        "grew MiB", "error / allowed", "verdict",
    ]  # fmt: skip
    body = []
    for point in points:
        flops = 4 * point.heads * point.queries * point.keys * point.head_dim
        for row in point.rows:
            rate = row.ms and flops / row.ms.median / 1e6
            body.append([
                str(point.keys), row.label, _time(row),
                figure(point.ratio(row.name, "naive"), "{:.2f}"),
                figure(point.ratio(row.name, "sdpa"), "{:.2f}"),
                figure(rate, "{:.0f}"), _mebibytes(row.extra_bytes), _mebibytes(row.peak_bytes),
                _error(row), _verdict(row),
            ])  # fmt: skip
    return table(header, body)


def _decode(points: Sequence[AttentionPoint]) -> str:
    header = [
        "dtype", "heads", "kernel", "ms (quartiles)", "MHA / it", "SDPA / it", "cache MiB",
        "MHA's / it", "error / allowed", "verdict",
    ]  # fmt: skip
    body = []
    for point in points:
        whole = (p for p in points if p.kind == "MHA" and p.dtype == point.dtype)
        full = next(whole, None)
        for row in point.rows:
            other = full and full.row(row.name)
            faster = other.ms.median / row.ms.median if row.ms and other and other.ms else None
            body.append([
                point.dtype, f"{point.kind} {point.heads}/{point.kv_heads}", row.label, _time(row),
                figure(faster, "{:.2f}"), figure(point.ratio(row.name, "sdpa"), "{:.2f}"),
                _mebibytes(point.cache_bytes),
                figure(full and full.cache_bytes / point.cache_bytes, "{:g}"),
                _error(row), _verdict(row),
            ])  # fmt: skip
    return table(header, body)


def _time(row: AttentionRow) -> str:
    if row.absent:
        return "absent"
    if row.ms is None:
        return "no result"
    return f"{row.ms.median:.3f} ({row.ms.low:.3f}-{row.ms.high:.3f})"


def _mebibytes(count: int | None) -> str:
    return figure(count and count / 2**20, "{:.1f}")


def _error(row: AttentionRow) -> str:
    return "-" if row.error is None else f"{row.error:.2g} / {row.allowed:.2g}"


def _verdict(row: AttentionRow) -> str:
    return "absent" if row.absent else "failed" if row.failure else "ok"


def _notes(points: Sequence[AttentionPoint]) -> list[str]:
    notes = []
    for point in points:
        for row in point.rows:
            reason = row.failure or row.absent
            if reason:
                where = f"{point.kind} {point.dtype} {point.head_dim}, {point.keys} tokens"
                notes.append(f"- {where}, {row.label}: {reason}")
    return [*notes, ""] if notes else []


def draw_attention(target: Any, result: AttentionResult) -> None:
    """Log-log lines of time over length per dtype and head size, with a slope of 2 beside them."""
    groups = sweeps(result)
    columns = 2 if len(groups) > 1 else 1
    rows = max(-(-len(groups) // columns), 1)
    target.set_size_inches(7 * columns, 4.6 * rows)
    for number, points in enumerate(groups):
        axes = target.add_subplot(rows, columns, number + 1)
        axes.spines[["top", "right"]].set_visible(False)
        for name in (*TORCH, *KERNELS):
            found = [(p.keys, p.row(name).ms) for p in points if p.row(name)]
            found = [(keys, ms.median) for keys, ms in found if ms]
            style = "-" if name in KERNELS else "--"
            if found:
                axes.plot(*zip(*found), style, marker="o", color=_COLORS[name],
                          label=TORCH.get(name, name))  # fmt: skip
        first = points[0].row("flash")
        if first and first.ms and len(points) > 1:
            lengths = [point.keys for point in points]
            slope = [first.ms.median * (n / lengths[0]) ** 2 for n in lengths]
            axes.plot(lengths, slope, ":", color="#2c3e50", label="slope 2")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_ylabel("ms (median over rounds)")
        axes.set_title(f"{points[0].dtype}, head size {points[0].head_dim}", loc="left")
        axes.legend(frameon=False, fontsize=8)


def tune_markdown(result: TuneResult) -> str:
    """One row per kernel, dtype, head size and length: the table's block beside the best one."""
    header = ["kernel", "dtype", "head size", "tokens", "table's blocks", "ms", "best blocks", "ms",
              "table / best", "verdict"]  # fmt: skip
    body = [
        [
            row.kernel, row.dtype, str(row.head_dim), str(row.tokens),
            "{} x {}".format(*row.table), f"{row.table_ms:.3f}", "{} x {}".format(*row.best),
            f"{row.best_ms:.3f}", f"{row.ratio:.2f}",
            "holds" if row.holds else "another row would win",
        ]
        for row in result.rows
    ]  # fmt: skip
    return "\n".join([
        f"Blocks of queries x keys on {result.environment['isa']}, {result.settings.rounds} "
        f"interleaved rounds; a row of csrc/attend_table.h holds within "
        f"{result.tolerance - 1:.0%}.",
        "",
        table(header, body),
        "",
        *result.ending.notes(),
        describe(result.environment),
        command_line(result.environment),
    ])  # fmt: skip
