"""Results as Markdown, and the files they are written to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.report import markdown_table

from .inputs import STOCK, InputError, output_path, unwritable
from .machine import describe
from .plots import PICTURES, median_ms, picture
from .timing import SAMPLING

if TYPE_CHECKING:
    from .ablation import AblationResult, Row, Settings
    from .perplexity import PerplexityResult
    from .sweep import BenchResult, SweepResult


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(markdown_table(header, rows))


def write(
    result: Any, json_file: Any = None, markdown_file: Any = None, picture_file: Any = None
) -> None:
    """Writes whichever files are named; `result` has to_dict() and markdown(). InputError names
    those that cannot be written, after the others are.
    """
    refused = []
    for file, suffixes, put in (
        (json_file, (), lambda path: _put(as_json(result), path)),
        (markdown_file, (), lambda path: _put(result.markdown(), path)),
        (picture_file, PICTURES, lambda path: picture(result, path)),
    ):
        try:
            if file:
                put(output_path(file, suffixes))
        except OSError as error:
            refused.append(str(unwritable(file, error)))
        except InputError as error:
            refused.append(str(error))
    if refused:
        raise InputError("; ".join(refused))


def as_json(result: Any) -> str:
    """The whole result as JSON."""
    return json.dumps(result.to_dict(), indent=2, allow_nan=True)


def _put(text: str, path: Path) -> None:
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def ablation_markdown(result: AblationResult) -> str:
    """One row per rung; failures, the ladder, bytes, stream, machine and command below."""
    settings = result.settings
    memory = any(row.memory for row in result.rows)
    header = [
        "rung",
        "ms/token (quartiles)",
        "tokens/s",
        "speed-up",
        "share of stream",
        "prefill ms",
    ]
    header += ["peak MiB"] if memory else []
    header += ["tokens equal", "logit error / stock's", "calls fused / refused"]
    lines = [
        f"{settings.model} ({result.source}), {settings.dtype}, batch {settings.batch}, prompt "
        f"{settings.prompt_tokens}, {settings.new_tokens} tokens, {_chosen(settings)}, "
        f"loop {settings.loop}, {settings.rounds} interleaved rounds.",
        "",
        table(header, [_ablation_row(row, memory) for row in result.rows]),
        "",
        *_notes(result),
    ]
    return "\n".join(lines)


def sweep_markdown(result: SweepResult) -> str:
    """One row per point, one column per rung."""
    rungs = [row.name for row in result.points[0][1].rows]
    unit = "ms/step" if result.kind == "batch" else "ms/token"
    header = [
        result.kind,
        *(f"{row.label} {unit}" for row in result.points[0][1].rows),
        "speed-up",
        "stream floor ms",
    ]
    header += ["full, times its first point", "share of stream", "verdict"]
    first = median_ms(result.points[0][1].rows[-1])
    body = []
    for value, point in result.points:
        last = point.rows[-1]
        body.append(
            [
                f"{value}",
                *(_spread(point.row(rung)) for rung in rungs),
                figure(last.speedup, "{:.2f}"),
                figure(point.stream_floor_ms, "{:.2f}"),
                figure(median_ms(last) / first if first and median_ms(last) else None, "{:.2f}"),
                figure(last.stream_share, "{:.2f}"),
                "ok" if point.passed else "failed",
            ]
        )
    header[-3] = f"{rungs[-1]}, times its first point"
    failures = [
        f"- {result.kind} {value}, {row.label}: {row.failure or stock_in_part(row)}"
        for value, point in result.points
        for row in point.rows
        if row.failure or stock_in_part(row)
    ]
    failures += [
        f"- {result.kind} {value}: {point.beyond}" for value, point in result.points if point.beyond
    ]
    failures += result.ending.notes()
    settings, source = result.points[0][1].settings, result.points[0][1].source
    title = (
        f"{settings.model} ({source}), {settings.dtype}, loop {settings.loop}, {settings.rounds} "
        f"interleaved rounds of {settings.new_tokens} tokens."
    )
    record = result.points[0][1].environment
    return "\n".join(
        [title, "", table(header, body), "", *failures, describe(record), command_line(record)]
    )


def bench_markdown(result: BenchResult) -> str:
    """One row per shape and dtype."""
    compiled = any(item.row("compiled") for item in result.items)
    header = ["shape, dtype", "MB/token", "stock ms/token"] + (
        ["stock compiled ms/token"] if compiled else []
    )
    header += [
        "full ms/token",
        "stock / full",
        "stream GB/s",
        "share of stream",
        "tokens equal",
        "logit error / stock's",
    ]
    body = []
    for item in result.items:
        full = item.row("full")
        body.append(
            [
                f"{item.settings.model} {item.settings.dtype}",
                f"{item.bytes_per_step / 1e6:.0f}",
                _spread(item.row(STOCK)),
                *([_spread(item.row("compiled"))] if compiled else []),
                _spread(full),
                figure(full.speedup, "{:.2f}"),
                figure(item.stream_gbs and item.stream_gbs.median, "{:.1f}"),
                figure(full.stream_share, "{:.2f}"),
                figure(full.tokens_equal, "{:.0%}"),
                figure(full.parity and full.parity.ratio, "{:.2f}"),
            ]
        )
    failures = [
        f"- {item.settings.model} {item.settings.dtype}, {row.label}: "
        f"{row.failure or stock_in_part(row)}"
        for item in result.items
        for row in item.rows
        if row.failure or stock_in_part(row)
    ]
    failures += [f"- {item.settings.model}: {item.beyond}" for item in result.items if item.beyond]
    failures += result.ending.notes()
    settings, record = result.items[0].settings, result.items[0].environment
    title = (
        f"Batch {settings.batch}, prompt {settings.prompt_tokens}, {settings.new_tokens} tokens, "
        f"{_chosen(settings)}, loop {settings.loop}, {settings.rounds} interleaved rounds, weights "
        f"by seed {settings.seed}."
    )
    return "\n".join(
        [title, "", table(header, body), "", *failures, describe(record), command_line(record)]
    )


def perplexity_markdown(result: PerplexityResult) -> str:
    """One row per rung and path against stock over the same windows."""
    header = [
        "rung",
        "path",
        "perplexity",
        "relative difference",
        "limit",
        "difference of mean NLL (standard error)",
        "within 2 SE",
        "verdict",
        "calls fused / refused",
    ]
    body = []
    for row in result.rows:
        if row.name == STOCK:
            body.append(
                [row.label, row.path, f"{row.perplexity:.6f}", "-", "-", "-", "-", "baseline", "-"]
            )
            continue
        noise = (
            "-"
            if row.standard_error is None
            else f"{row.difference:+.2e} ({row.standard_error:.1e})"
        )
        body.append(
            [
                row.label,
                row.path,
                f"{row.perplexity:.6f}",
                f"{row.relative_difference:+.2e}",
                f"{result.limit:.0e}",
                noise,
                {True: "yes", False: "no", None: "-"}[row.within_noise],
                "ok" if row.failure is None else "failed",
                counts(row.calls),
            ]
        )
    failures = [f"- {row.label}, {row.path}: {row.failure}" for row in result.rows if row.failure]
    if result.positions and result.window > result.positions:
        failures.append(f"The window exceeds the model's {result.positions} positions.")
    title = (
        f"{result.model} ({result.source}), {result.dtype}, {result.corpus}: {result.windows} "
        f"windows of {result.window} tokens, {result.scored} tokens scored, the same for every row."
    )
    lines = [title, "", table(header, body), "", *failures, describe(result.environment)]
    return "\n".join([*lines, command_line(result.environment)])


def _chosen(settings: Settings) -> str:
    """How tokens are chosen."""
    if not settings.sample:
        return "greedy"
    return ", ".join(f"{name} {value}" for name, value in SAMPLING.items() if value is not True)


def _ablation_row(row: Row, memory: bool) -> list[str]:
    share = figure(row.stream_share, "{:.2f}")
    cells = [
        row.label,
        _spread(row),
        figure(row.tokens_per_s, "{:.1f}"),
        figure(row.speedup, "{:.2f}"),
        share,
        figure(row.prefill_ms and row.prefill_ms.median, "{:.1f}"),
    ]
    cells += [figure(row.memory and row.memory["peak"] / 2**20, "{:.0f}")] if memory else []
    ratio = figure(row.parity and row.parity.ratio, "{:.2f}")
    return [*cells, figure(row.tokens_equal, "{:.0%}"), ratio, counts(row.calls)]


def _notes(result: AblationResult) -> list[str]:
    notes = [f"- {row.label} has no time: {row.failure}" for row in result.rows if row.failure]
    for row in result.rows:
        if stock_in_part(row):
            notes.append(f"- {row.label} {stock_in_part(row)}")
        if row.divergences and not row.failure:
            first = row.divergences[0]
            notes.append(
                f"- {row.label} leaves stock's tokens first at token {first.token} of prompt "
                f"{first.prompt}: top-2 gap {first.gap:.3g}, logit error {first.error:.3g} "
                "(rounding)"
            )
    stream = result.stream_gbs
    floor = (
        "no read stream measured"
        if stream is None
        else (
            f"read stream of 512 MB in the same rounds {stream.median:.1f} GB/s "
            f"({stream.low:.1f}-{stream.high:.1f}), floor {result.stream_floor_ms:.2f} ms"
        )
    )
    parity = result.rows[0].parity
    notes.append(
        f"Ladder: {result.ladder}. Bytes per step {result.bytes_per_step / 1e6:.1f} MB; {floor}."
    )
    if result.beyond:
        notes.append(f"{result.beyond[0].upper()}{result.beyond[1:]}.")
    if any((row.stream_share or 0) > 1 for row in result.rows):
        notes.append(
            "A share above 1: weights stay in the CPU's caches from step to step, or memory is "
            "faster during steps than while the stream is read."
        )
    if result.wrapper_us:
        cost = result.wrapper_us
        notes.append(
            f"Wrapper alone: {cost.median:.1f} us per layer call ({cost.low:.1f} to "
            f"{cost.high:.1f})."
        )
    notes.append(
        f"Stock's own largest logit error against higher precision: {parity.error:.3g}; limit for "
        f"a rung {parity.limit:g} times that."
    )
    return [*notes, describe(result.environment), command_line(result.environment)]


def stock_in_part(row: Any) -> str | None:
    """What of a row that has its times ran stock, None when nothing did."""
    if row.failure or not row.calls.get("refused"):
        return None
    reasons = (f"{reason} x {count}" for reason, count in row.calls["refused"].items())
    return f"ran stock in part: {', '.join(reasons)}"


def counts(calls: dict[str, Any]) -> str:
    """Calls fused and refused, as a cell."""
    return (
        f"{calls['fused']} / {sum(calls['refused'].values())}"
        if calls and "fused" in calls
        else "-"
    )


def _spread(row: Row | None) -> str:
    if row is None or row.step_ms is None:
        return "no result"
    return f"{row.step_ms.median:.3f} ({row.step_ms.low:.3f}-{row.step_ms.high:.3f})"


def figure(value: float | None, form: str) -> str:
    """A number in `form`, as a cell."""
    return "-" if value is None else form.format(value)


def command_line(record: dict[str, Any]) -> str:
    """The command that reproduces a result."""
    return f"Command: `{record['command']}`"
