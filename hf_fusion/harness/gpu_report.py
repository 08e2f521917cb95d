"""The parts of a GPU check as one JSON document, one page of Markdown and a short table."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from .render import table

PARTS = ("stream", "parity", "speed", "small", "sanitizer")


def collect(folder: Path) -> dict[str, Any]:
    """What the parts have left in `folder`, by part, with what rungs by themselves have left of it;
    absent ones are missing.
    """
    found: dict[str, Any] = {}
    for part in PARTS:
        for path in (folder / f"{part}.json", *sorted(folder.glob(f"{part}_[0-9].json"))):
            if not path.is_file():
                continue
            data = json.loads(path.read_text(encoding="utf-8"))
            whole = found.setdefault(part, data)
            if whole is not data:
                whole["rows"] += data["rows"]
                whole["complete"] = False  # some rung has taken its process along
    return found


def read_stream(found: dict[str, Any]) -> float | None:
    """Bytes per second that the device reads; None where that was not measured."""
    rows = found.get("stream", {}).get("rows", [])
    return next((r["bytes_per_second"] for r in rows if r["kind"].startswith("read")), None)


def speed_table(found: dict[str, Any]) -> str:
    """Milliseconds a token, share of the read stream, and the verdict beside each."""
    stream, lines = read_stream(found), []
    for row in found.get("speed", {}).get("rows", []):
        share, took = "-", row.get("ms_per_token")
        if stream and took:
            share = f"{1e3 * row['bytes_per_token'] / took / stream:.2f}"
        verdict = "stock"
        if "error" in row:
            verdict = "FAILED, " + " ".join(row["error"].replace("|", "/").split())[:99]
        elif row["parity"] is not None:
            word = "passed" if row["parity"]["passed"] else "FAILED"
            verdict = f"{word}, error {row['parity']['ratio']:.2f} x stock's"
        elif "stock" not in row["contender"]:
            verdict = "none"
        lines.append(
            [row["contender"], row["how"], str(row["context"]), f"{took:.3f}" if took else "-"]
            + [share, verdict]
        )
    header = ["contender", "how", "context", "ms/token", "share of stream", "verdict"]
    return table(header, lines) if lines else "No decode was timed."


def parity_table(found: dict[str, Any]) -> str:
    """Trials, failures and the largest error over stock's own, by shape and dtype."""
    groups: dict[tuple, list] = defaultdict(list)
    for row in found.get("parity", {}).get("rows", []):
        groups[row["shape"], row["dtype"]].append(row)
    lines = [
        [*key, str(len(rows)), str(sum(not row["passed"] for row in rows))]
        + [f"{max(row['ratio'] for row in rows):.2f}"]
        for key, rows in groups.items()
    ]
    header = ["shape", "dtype", "trials", "failures", "largest error / stock's"]
    return table(header, lines) if lines else "No parity was tried."


def summary(found: dict[str, Any]) -> list[str]:
    """One line a part: how many rows, how many failed, whether it came to its end; how each tool of
    the sanitizer ended.
    """
    lines = []
    for part in PARTS:
        if part not in found:
            lines.append(f"{part}: not run")
            continue
        rows = found[part]["rows"]
        if part == "sanitizer":
            lines.append("sanitizer: " + ", ".join(f"{r['tool']} {r['outcome']}" for r in rows))
            continue
        failed = sum(row.get("passed") is False for row in rows)
        end = "complete" if found[part]["complete"] else "cut off by its time limit or an error"
        lines.append(f"{part}: {len(rows)} rows, {failed} failed, {end}")
    return lines


def markdown(found: dict[str, Any], commit: str) -> str:
    """The page."""
    machine = next(iter(found.values()), {}).get("machine", {})
    stream = read_stream(found)
    where = f"{machine.get('gpu', 'unknown GPU')}, torch {machine.get('versions', {}).get('torch')}"
    return "\n".join(
        [
            f"# GPU check: {where}, commit {commit or 'unknown'}",
            "",
            f"Read stream: {stream / 1e9:.0f} GB/s." if stream else "Read stream: not measured.",
            "",
            speed_table(found),
            "",
            parity_table(found),
            "",
            *(f"- {line}" for line in summary(found)),
            "",
            "Command: `scripts/gpu_check.sh`",
            "",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Writes gpu.json and gpu.md beside each other and prints the short table; 1 where a row failed
    or a part is missing or cut off.
    """
    parser = argparse.ArgumentParser(prog="hf_fusion.harness.gpu_report", description=__doc__)
    parser.add_argument("parts", type=Path, help="folder with the JSON files of the parts")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--commit", default="", help="of the tree that was built")
    arguments = parser.parse_args(argv)
    found = collect(arguments.parts)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "gpu.md").write_text(markdown(found, arguments.commit), encoding="utf-8")
    print(speed_table(found), *summary(found), sep="\n")
    rows = [row for part in found.values() for row in part["rows"]]
    whole = set(PARTS) <= found.keys() and all(part["complete"] for part in found.values())
    verdicts = [row.get("passed", (row.get("parity") or {}).get("passed", True)) for row in rows]
    return 0 if whole and all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
