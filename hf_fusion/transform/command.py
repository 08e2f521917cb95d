"""The command `hf-fusion graph MODEL`: fuse, verify, measure, and write report and picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..harness import encoders, inputs
from .backends import chosen
from .draw import to_html
from .inputs import longest_sequence
from .model import FusedModel, arguments_of, fuse
from .tracer import LEVELS


def add(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-fusion graph`."""
    parser.description = (
        "Captures a model as a graph, groups it, runs the groups, holds the outputs against the "
        "model's at three shapes, and counts kernels and memory before and after."
    )
    note = f"one of {', '.join(encoders.ENCODER_SHAPES)}, a Pythia shape, a folder or a hub id"
    parser.add_argument("model", metavar="MODEL", help=note)
    parser.add_argument("--dtype", type=inputs.dtype_name, default="fp32", help="(default fp32)")
    parser.add_argument("--level", choices=LEVELS, default="semantic", help="(default semantic)")
    note = "back ends by name, the original nodes always last (default all that are registered)"
    parser.add_argument("--backends", type=inputs.words, default=None, metavar="A,B", help=note)
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows (default 1)")
    note = "tokens of a sequence (default 128)"
    parser.add_argument("--length", type=int, default=128, metavar="N", help=note)
    parser.add_argument("--mask", action="store_true", help="with an attention mask and padding")
    note = "rounds of the clock (default 5; 0 measures no time)"
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help=note)
    parser.add_argument("--compiled", action="store_true", help="also torch.compile of the model")
    parser.add_argument("--threads", type=int, default=None, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random weights")
    note = "where report.md, report.json and graph.html go (default graph-MODEL)"
    parser.add_argument("--out", metavar="FOLDER", default=None, help=note)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; 0 where every attention layer was found."""
    if arguments.batch < 1 or arguments.length < 1 or arguments.rounds < 0:
        raise inputs.InputError("--batch and --length are positive, --rounds is not negative")
    if abs(arguments.seed) >= 1 << 62:
        raise inputs.InputError(f"--seed is {arguments.seed}: expected less than 2**62")
    if arguments.backends == ():
        raise inputs.InputError("--backends names none, expected A,B")
    chosen(arguments.backends)
    name = arguments.model.rstrip("/").rpartition("/")[2]
    folder = made(Path(arguments.out or f"graph-{name}"))
    if arguments.threads is not None:
        torch.set_num_threads(inputs.at_least("--threads", arguments.threads, 1))
    loaded, _ = encoders.load_any(arguments.model, arguments.dtype, arguments.seed)
    longest = longest_sequence(getattr(loaded.model, "config", None))
    if arguments.length > longest:
        raise inputs.InputError(
            f"--length is {arguments.length}: the model's sequences have at most {longest} tokens"
        )
    fused = fuse(
        loaded.model, level=arguments.level, backends=arguments.backends, mask=arguments.mask
    )
    given = sized(fused, arguments.batch, arguments.length, arguments.seed)
    try:
        fused.measure(given, compiled=arguments.compiled, rounds=arguments.rounds)
    except (IndexError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        raise inputs.InputError(
            f"the model does not run with --batch {arguments.batch} --length {arguments.length}: "
            f"{first}"
        ) from error
    fused.report.model = f"{name} {arguments.dtype}"
    sizes = ", ".join(f"{key} {'x'.join(map(str, tensor.shape))}" for key, tensor in given.items())
    fused.report.notes.append(f"measured with {sizes}, {torch.get_num_threads()} threads")
    write(fused, folder)
    print(fused.report.to_markdown())
    print(f"written: {folder}")
    return 0 if fused.report.detection_rate == 1.0 else 1


def sized(fused: FusedModel, batch: int, length: int, seed: int) -> dict[str, Any]:
    """Tensors of the captured kinds with `batch` rows, and `length` tokens where that is free."""
    from .verify import inputs_at

    captured = fused.captured
    sizes = {}
    for extents in captured.signature.sizes:
        for dim, extent in enumerate(extents):
            if isinstance(extent, str):
                sizes.setdefault(extent, batch if dim == 0 else length)
    tensors = iter(inputs_at(captured, sizes, seed))
    given = arguments_of(fused)
    return {name: next(tensors) for name in given if isinstance(given[name], torch.Tensor)}


def made(folder: Path) -> Path:
    """The folder, made where it was not; InputError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise inputs.InputError(f"--out {folder} cannot be made: {error.strerror}") from None
    return folder


def write(fused: FusedModel, folder: Path) -> None:
    """report.md, report.json and graph.html in the folder; InputError where it is not writable."""
    report = fused.report
    pages = {"report.md": report.to_markdown(), "report.json": report.to_json(),
             "graph.html": to_html(report)}  # fmt: skip
    made(folder)
    try:
        for name, text in pages.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise inputs.InputError(f"--out {folder} is not writable: {error.strerror}") from None
