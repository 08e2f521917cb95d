"""Other engines on the same work: torch.compile, OpenVINO, ONNX Runtime; or why one is absent.

They are made from the same model. OpenVINO and ONNX Runtime read it from a file, so that their
memory can be measured in a process that has no torch model.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .inputs import InputError, unaccepted
from .workloads import Entry, Inputs

COMPILE, OPENVINO, ONNXRUNTIME = "compile", "openvino", "onnxruntime"
PEERS = (COMPILE, OPENVINO, ONNXRUNTIME)
LABELS = {
    COMPILE: "torch.compile",
    OPENVINO: "OpenVINO",
    ONNXRUNTIME: "ONNX Runtime",
}
_NEEDS = {
    COMPILE: (),
    OPENVINO: ("openvino",),
    ONNXRUNTIME: ("onnxruntime", "onnx", "onnxscript"),
}
Call = Callable[[Inputs], torch.Tensor]


def peer_names(values: tuple[str, ...]) -> tuple[str, ...]:
    """The peers in the order of PEERS, without repeats."""
    for value in values:
        if value not in PEERS:
            raise unaccepted("peer", value, PEERS)
    return tuple(peer for peer in PEERS if peer in values)


def precision_of(peer: str, dtype: str, matmul: str) -> str | None:
    """The precision in which a peer computes a model of `dtype`, None where it computes none such.

    ONNX Runtime's CPU kernels are fp32 ones; OpenVINO's a choice between fp32 and bf16.
    """
    if peer == COMPILE:
        return dtype
    if peer == ONNXRUNTIME:
        return "fp32"
    if dtype == "fp16":
        return None
    return "bf16" if dtype == "bf16" or matmul == "medium" else "fp32"


def absent(peer: str, dtype: str, matmul: str) -> str | None:
    """Why `peer` cannot be measured here, or None."""
    missing = [package for package in _NEEDS[peer] if find_spec(package) is None]
    if missing:
        return f"not installed: pip install {' '.join(missing)}"
    if peer == COMPILE and not _compiler():
        return "no C++ compiler: expected $CXX, g++, clang++ or c++ on the path"
    if precision_of(peer, dtype, matmul) is None:
        return f"computes in fp32 or bf16, not in {dtype}"
    return None


def build(
    peer: str, model: nn.Module, kind: str, example: Inputs, precision: str, threads: int,
    folder: Path,
) -> tuple[Call, Path | None]:  # fmt: skip
    """A call of `peer` for inputs shaped like `example`, and the file it reads; what a converter
    raises is an InputError.
    """
    try:
        with _quiet():
            if peer == COMPILE:
                return _compile(model, kind), None
            path = _convert(peer, model, kind, example, folder)
            return open_file(peer, path, precision, threads), path
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{LABELS[peer]} does not take the model: {type(error).__name__}: {text}"
        ) from error


def open_file(peer: str, path: Path, precision: str, threads: int) -> Call:
    """A call of the engine `peer` on a model file."""
    return (_open_openvino if peer == OPENVINO else _open_onnx)(path, precision, threads)


def _compile(model: nn.Module, kind: str) -> Call:
    """Inductor in its default mode, without dynamic shapes, freezing or autotuning."""
    entry = torch.compile(Entry(model, kind), dynamic=False)

    @torch.no_grad()
    def call(inputs: Inputs) -> torch.Tensor:
        return _first(entry(*inputs.values()))

    return call


def _convert(peer: str, model: nn.Module, kind: str, example: Inputs, folder: Path) -> Path:
    """Writes the model with fp32 weights and fixed shapes."""
    entry = Entry(_as_fp32(model), kind).eval()
    tensors = tuple(_plain(tensor) for tensor in example.values())
    with torch.no_grad():
        if peer == ONNXRUNTIME:
            path = folder / "model.onnx"
            torch.onnx.export(entry, tensors, path, dynamo=True, verbose=False)
            return path
        import openvino

        shapes = [tuple(tensor.shape) for tensor in tensors]
        converted = openvino.convert_model(entry, example_input=tensors, input=shapes)
        path = folder / "model.xml"
        openvino.save_model(converted, path, compress_to_fp16=False)
        return path


def _open_openvino(path: Path, precision: str, threads: int) -> Call:
    import openvino

    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": {"bf16": "bf16", "fp32": "f32"}[precision],
    }
    compiled = openvino.Core().compile_model(path, "CPU", options)
    request = compiled.create_infer_request()

    def call(inputs: Inputs) -> torch.Tensor:
        fed = [_plain(tensor).numpy() for tensor in inputs.values()]
        request.infer(fed, share_inputs=True, share_outputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data)

    return call


def _open_onnx(path: Path, precision: str, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def call(inputs: Inputs) -> torch.Tensor:
        fed = {name: _plain(value).numpy() for name, value in zip(names, inputs.values())}
        return torch.from_numpy(session.run(None, fed)[0])

    return call


def _as_fp32(model: nn.Module) -> nn.Module:
    """The model itself where it is fp32, else a copy whose weights have the same values."""
    import copy

    if next(model.parameters()).dtype == torch.float32:
        return model
    return copy.deepcopy(model).to(torch.float32)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    candidates = [named] if named else ["g++", "clang++", "c++"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what converters and tracers print and warn off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
