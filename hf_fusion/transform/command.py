"""The command `hf-fusion graph MODEL`: fuse, verify, measure, and write report and picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..harness import encoders, inputs, options
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
    note = f"{', '.join(inputs.DTYPES)} (default fp32)"
    dtype = options.told(inputs.dtype_name)
    parser.add_argument("--dtype", type=dtype, default="fp32", help=note)
    note = "attention as one operator, or spelled out before it is grouped (default semantic)"
    parser.add_argument("--level", choices=LEVELS, default="semantic", help=note)
    note = "native, aten, inductor; the original nodes are always last (default native,aten)"
    names = options.told(inputs.some_words)
    parser.add_argument("--backends", type=names, default=None, metavar="A,B", help=note)
    options.add_count(parser, "--batch", 1, "rows")
    options.add_count(parser, "--length", 128, "tokens of a sequence")
    parser.add_argument("--mask", action="store_true", help="with an attention mask and padding")
    options.add_count(parser, "--rounds", 5, "rounds of the clock, 0 for none", 0)
    parser.add_argument("--compiled", action="store_true", help="also torch.compile of the model")
    options.add_threads(parser)
    options.add_count(parser, "--seed", 0, "of random weights", 0, inputs.MOST_SEED)
    note = "where report.md, report.json and graph.html go (default graph-MODEL)"
    parser.add_argument("--out", metavar="FOLDER", default=None, help=note)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; 0 where every attention layer was found."""
    chosen(arguments.backends)
    name = arguments.model.rstrip("/").rpartition("/")[2]
    folder = made(Path(arguments.out or f"graph-{name}"))
    torch.set_num_threads(inputs.thread_count(arguments.threads))
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
