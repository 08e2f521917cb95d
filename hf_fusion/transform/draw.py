"""Pictures of a partitioned graph: one HTML file, Mermaid, DOT. Nothing is fetched to show them."""

from __future__ import annotations

import html

from .report import FusionReport
from .tree import GROUP, MODULE, OPERATOR, Box, Picture, labelled, picture

COLOURS = {
    "parallel linear": "#cfe3ff", "attention core": "#ffd9b8", "norm and residual": "#d8f0d0",
    "norm": "#d8f0d0", "gemm epilogue": "#e4d7ff", "gated unit": "#ffd6e7", "block": "#ffe9a8",
    "rotary embedding": "#d3f1ef", "elementwise": "#eceff3", "chain": "#eceff3",
}  # fmt: skip
_PLAIN = "#ffffff"
_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:24px;color:#1b2733;background:#fff}
details{margin:3px 0 3px 14px;border-left:2px solid #d5dce4;padding-left:8px}
details.group{border:1px solid #b8c3cf;border-radius:5px;padding:2px 8px}
summary{cursor:pointer}
summary small,li small{color:#5b6b7b}
ul{margin:2px 0 4px 22px;padding:0;list-style:square}
li.left{color:#8a3b12}
input.tab{display:none}
label.tab{display:inline-block;padding:4px 14px;border:1px solid #b8c3cf;cursor:pointer}
.page{display:none;margin-top:10px}
#tab-after:checked~#page-after,#tab-before:checked~#page-before{display:block}
#tab-after:checked~label[for=tab-after]{background:#e6eef7}
#tab-before:checked~label[for=tab-before]{background:#e6eef7}
table{border-collapse:collapse;margin:10px 0}
td,th{border:1px solid #d5dce4;padding:2px 9px;text-align:left}
.key span{display:inline-block;padding:1px 8px;margin:0 6px 4px 0;border-radius:4px}
.key span{border:1px solid #b8c3cf}
"""


def to_html(report: FusionReport) -> str:
    """A page with the graph before and after grouping; every level folds at a click."""
    after, before = picture(report), picture(report, groups=False)
    key = "".join(
        f'<span style="background:{COLOURS.get(kind, _PLAIN)}">{html.escape(kind)}</span>'
        for kind in dict.fromkeys(group.kind for group in report.subgraphs)
    )
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{html.escape(report.model)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(report.model)}</h1>",
        f"<pre>{html.escape(report.summary_stats())}</pre>{_measured(report)}",
        '<input class="tab" type="radio" name="tab" id="tab-after" checked>',
        '<input class="tab" type="radio" name="tab" id="tab-before">',
        '<label class="tab" for="tab-after">after</label>',
        '<label class="tab" for="tab-before">before</label>',
        f'<div class="page" id="page-after"><p class="key">{key}</p>{_page(after)}</div>',
        f'<div class="page" id="page-before">{_page(before)}</div>',
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _measured(report: FusionReport) -> str:
    rows = [(name, r) for name, r in report.measured.items() if isinstance(r, dict)]
    if not rows:
        return ""
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{r['kernels']}</td>"
        f"<td>{r['peak_bytes'] / 1e6:.3f}</td></tr>"
        for name, r in rows
    )
    return f"<table><tr><th>measured</th><th>kernels</th><th>peak MB</th></tr>{cells}</table>"


def _page(shown: Picture) -> str:
    sources: dict[str, list[str]] = {}
    for start, end in shown.edges:
        sources.setdefault(end, []).append(start)
    return _details(shown.root, sources, True)


def _details(box: Box, sources: dict[str, list[str]], opened: bool) -> str:
    if box.level == OPERATOR:
        reads = ", ".join(sources.get(box.identity, ()))
        arrow = f" <small>&larr; {html.escape(reads)}</small>" if reads else ""
        note = f" <small>({html.escape(box.note)})</small>" if box.note else ""
        mark = ' class="left"' if box.note else ""
        return (
            f'<ul><li{mark} data-node="{html.escape(box.identity)}">{html.escape(box.label)} '
            f"<small>{html.escape(box.identity)}</small>{arrow}{note}</li></ul>"
        )
    inside = "".join(_details(child, sources, False) for child in box.children)
    colour = f' style="background:{COLOURS.get(box.kind, _PLAIN)}"' if box.level == GROUP else ""
    count = len(box.operators())
    note = f"{count} operators" + (f", {box.note}" if box.note else "")
    state = " open" if opened else ""
    return (
        f'<details class="{box.level}"{colour}{state}><summary>{html.escape(labelled(box))} '
        f"<small>{html.escape(note)}</small></summary>{inside}</details>"
    )


def to_mermaid(report: FusionReport, groups: bool = True, fold: bool = True) -> str:
    """A Mermaid flowchart with nested subgraphs."""
    shown = picture(report, groups, fold)
    names = _names(shown)
    lines = ["flowchart TB"]

    def put(box: Box, depth: int) -> None:
        pad, label = "  " * depth, labelled(box).replace('"', "'")
        if box.level == OPERATOR:
            lines.append(f'{pad}{names[box.identity]}["{label}"]')
            return
        lines.append(f'{pad}subgraph {names[box.identity]}["{label}"]')
        for child in box.children:
            put(child, depth + 1)
        lines.append(f"{pad}end")

    put(shown.root, 1)
    lines += [f"  {names[start]} --> {names[end]}" for start, end in shown.edges]
    for box in shown.root.walk():
        if box.level == GROUP:
            lines.append(f"  style {names[box.identity]} fill:{COLOURS.get(box.kind, _PLAIN)}")
    return "\n".join(lines) + "\n"


def to_dot(report: FusionReport, groups: bool = True, fold: bool = True) -> str:
    """A DOT graph with a cluster per module and group."""
    shown = picture(report, groups, fold)
    names = _names(shown)
    lines = ["digraph model {", '  node [shape=box, fontname="sans-serif"];']

    def put(box: Box, depth: int) -> None:
        pad, label = "  " * depth, labelled(box).replace("\\", "\\\\").replace('"', '\\"')
        if box.level == OPERATOR:
            lines.append(f'{pad}{names[box.identity]} [label="{label}"];')
            return
        lines.append(f"{pad}subgraph cluster_{names[box.identity]} {{")
        lines.append(f'{pad}  label="{label}";')
        if box.level == GROUP:
            lines.append(f'{pad}  style=filled; fillcolor="{COLOURS.get(box.kind, _PLAIN)}";')
        for child in box.children:
            put(child, depth + 1)
        lines.append(f"{pad}}}")

    put(shown.root, 1)
    lines += [f"  {names[start]} -> {names[end]};" for start, end in shown.edges]
    return "\n".join([*lines, "}"]) + "\n"


def _names(shown: Picture) -> dict[str, str]:
    """A plain word per box: module paths hold dots, and a model may call an operator `end`."""
    letters = {MODULE: "m", GROUP: "g", OPERATOR: "n"}
    return {box.identity: f"{letters[box.level]}{i}" for i, box in enumerate(shown.root.walk())}
