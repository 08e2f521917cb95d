"""Libraries whose CUDA device is the host's memory: a stand-in, and the kernels themselves, emulated."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from hf_fusion import native

WORKSPACE = 1000


class StandIn:
    """The library with a device that runs the CPU's kernels on the host's memory.

    As on a device, a missing position is the cache's length, and what lies outside its table gives
    NaN. `calls` counts what was queued; `workspaces` are the addresses that calls brought, and
    `stale` says whether one was not zero before its first use.
    """

    def __init__(self, library: Any):
        self._library = library
        self.calls, self.workspaces, self.stale = 0, set(), False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def hff_describe_device(self, device: int, ordinal: int, out: Any) -> int:
        if device != native.DEVICES["cuda"] or ordinal != 0:
            return self._library.hff_describe_device(device, ordinal, out)
        found = out._obj
        found.name, found.arch, found.sms, found.host_memory = b"stand-in", 900, 2, 1
        return native.OK

    def hff_workspace_bytes(self, call: Any, model: Any) -> int:
        assert self._library.hff_workspace_bytes(call, model) == 0, "the CPU takes no workspace"
        return WORKSPACE * call._obj.batch

    def hff_model_forward(self, call: Any, model: Any, caches: Any, io: Any) -> int:
        outputs = (io._obj.logits, io._obj.hidden)
        return self._run(self._library.hff_model_forward, call, model, caches, io, outputs)

    def hff_block_forward(self, call: Any, block: Any, cache: Any, io: Any) -> int:
        full = io._obj.stage == native.STAGES["full"]
        outputs = (io._obj.out,) if full else (io._obj.attention_out,)
        return self._run(self._library.hff_block_forward, call, block, cache, io, outputs)

    def _run(self, function: Any, call: Any, what: Any, caches: Any, io: Any, outputs) -> int:
        given = call._obj
        if given.device == native.DEVICES["cpu"]:
            return function(call, what, caches, io)
        workspace = (ctypes.c_char * given.workspace.bytes).from_address(given.workspace.data)
        assert given.workspace.data % 256 == 0 and len(workspace) == WORKSPACE * given.batch
        if given.workspace.data not in self.workspaces:
            self.stale |= any(workspace.raw)
            self.workspaces.add(given.workspace.data)
        ctypes.memset(workspace, 1, len(workspace))
        host = native.Call.from_buffer_copy(given)
        host.device = native.DEVICES["cpu"]
        length = ctypes.c_int64.from_address(caches[0].length).value
        position = ctypes.c_int64(length)
        if host.positions.data is None:
            host.positions = native.Buffer(ctypes.addressof(position), 8)
            host.position_batch_stride = host.position_query_stride = 0
        self.calls += 1
        status = function(ctypes.byref(host), what, caches, io)
        if status != native.OUT_OF_RANGE:
            return status
        for output in outputs:
            if output.data is not None:
                ctypes.memset(output.data, 0xFF, output.bytes)
        return native.OK


class Unreadable:
    """Inside, whatever would bring a tensor's value to the host raises."""

    METHODS = ("item", "tolist", "__bool__", "__int__", "__index__", "__float__", "numpy", "equal")

    def __enter__(self):
        self.before = [getattr(torch.Tensor, name) for name in self.METHODS]
        self.equal = torch.equal
        for name in self.METHODS:
            setattr(torch.Tensor, name, self._refuse(name))
        torch.equal = self._refuse("torch.equal")

    def __exit__(self, *_):
        for name, method in zip(self.METHODS, self.before):
            setattr(torch.Tensor, name, method)
        torch.equal = self.equal

    @staticmethod
    def _refuse(name: str):
        def refuse(*_, **__):
            raise AssertionError(f"{name} was called")

        return refuse
