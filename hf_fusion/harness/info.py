"""What this installation can do here, and the reason for each thing it cannot."""

from __future__ import annotations

from typing import Any

import torch

import hf_fusion

from . import machine
from .render import table


def collect() -> dict[str, Any]:
    """Everything `hf-fusion info` prints, as plain data."""
    record, supported = machine.environment(), hf_fusion.supported()
    return {
        "version": record["versions"]["hf-fusion"],
        "library": _library(),
        "device": _device(),
        "threads": torch.get_num_threads(),
        "cpu": record["cpu"],
        "cores": record["cores"],
        "torch_isa": record["torch_isa"],
        "versions": record["versions"],
        "python": record["python"],
        "commit": record["commit"],
        "backends": _backends(supported.to_dict()),
        "supported": supported.to_dict(),
    }


def text(found: dict[str, Any]) -> str:
    """`collect()` for reading."""
    library = found["library"]
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items() if value)
    lines = [
        f"{versions}, Python {found['python']}"
        + (f", commit {found['commit']}" if found["commit"] else ""),
        f"library   {library['path'] or 'absent: ' + str(library['reason'])}",
        f"kernels   {library['isa'] or 'none'}",
        f"device    {_device_text(found['device'])}",
        f"CPU       {found['cpu']}, {found['cores']} cores; torch uses {found['torch_isa']}",
        f"threads   {found['threads']} (torch.get_num_threads)",
        "",
        table(
            ["instruction set", "here"],
            [[item["name"], item["reason"] or "yes"] for item in library["isas"]],
        ),
        "",
        table(
            ["back end", "here"],
            [[name, reason or "yes"] for name, reason in found["backends"].items()],
        ),
        "",
        _support_table(found["supported"]),
    ]
    return "\n".join(lines)


def _library() -> dict[str, Any]:
    try:
        from hf_fusion import native

        isas = [{"name": name, "reason": reason} for name, reason in native.isas()]
        return {
            "path": str(native.library_path()),
            "isa": native.isa(),
            "isas": isas,
            "reason": None,
        }
    except (ImportError, OSError, hf_fusion.FusionError) as error:
        return {"path": None, "isa": None, "isas": [], "reason": str(error)}


def _device() -> dict[str, Any]:
    """The first CUDA device as the library sees it, or the reason why it sees none."""
    try:
        from hf_fusion import native

        device = native.describe_device("cuda")
    except (ImportError, OSError, hf_fusion.FusionError) as error:
        return {"name": None, "reason": getattr(error, "message", str(error))}
    return {
        "name": device.name.decode(),
        "arch": f"sm_{device.arch // 10}",
        "sms": device.sms,
        "shared_bytes": device.shared_bytes,
        "emulated": bool(device.host_memory),
        "reason": None,
    }


def _device_text(device: dict[str, Any]) -> str:
    if device["name"] is None:
        return f"none: {device['reason']}"
    where = ", emulated" if device["emulated"] else ""
    return f"{device['name']}, {device['arch']}, {device['sms']} SMs{where}"


def _backends(rows: list[dict[str, str]]) -> dict[str, str | None]:
    """Back end -> None when it can run whole layers here, else the reason."""
    found = {row["backend"]: row["status"] for row in rows if row["fusion"] == "full"}
    return {name: None if status == "yes" else status for name, status in found.items()}


def _support_table(rows: list[dict[str, str]]) -> str:
    """Family and fusion down, back ends across."""
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row["family"], row["fusion"]), {})[row["backend"]] = row["status"]
    lines = [
        [*key, *("yes" if at[name] == "yes" else "no" for name in backends)]
        for key, at in cells.items()
    ]
    return table(["family", "fusion", *backends], lines)
