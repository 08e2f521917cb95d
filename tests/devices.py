"""A CUDA device that is the host's memory: the kernels, emulated, and what calls bring them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from hf_fusion import native

SHARED = {800: 163 << 10, 890: 99 << 10, 900: 227 << 10}  # bytes per CTA by architecture


class Emulated:
    """The library at `path`, built with HFF_EMULATE, as native.load() gives one.

    `calls` counts what was queued on the device, `workspaces` are the addresses that calls brought,
    and `stale` says whether one was not zero before its first use.
    """

    def __init__(self, path: Path):
        self._library = native._open(path)
        self._library.hff_emulate.argtypes = [ctypes.c_int32] * 4 + [ctypes.c_uint64]
        self.calls, self.workspaces, self.stale = 0, set(), False
        self.become()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def become(
        self, arch: int = 900, sms: int = 4, seed: int = 0, whole_team: bool = False
    ) -> None:
        """The device of this thread's next calls, whether its kernels have as many warps as on a
        real one, and the seed of their schedules.
        """
        self._library.hff_emulate(arch, sms, SHARED[arch], whole_team, seed)

    def hff_model_forward(self, call: Any, *arguments: Any) -> int:
        return self._run(self._library.hff_model_forward, call, *arguments)

    def hff_block_forward(self, call: Any, *arguments: Any) -> int:
        return self._run(self._library.hff_block_forward, call, *arguments)

    def _run(self, function: Any, call: Any, *arguments: Any) -> int:
        if call._obj.device == native.DEVICES["cuda"]:
            self.calls += 1
            workspace = call._obj.workspace
            if workspace.data not in self.workspaces:
                self.workspaces.add(workspace.data)
                self.stale |= any(ctypes.string_at(workspace.data, workspace.bytes))
        return function(call, *arguments)


class Unreadable:
    """Inside, whatever would bring a tensor's value to the host raises, or a count from there."""

    METHODS = (
        "item", "tolist", "__bool__", "__int__", "__index__", "__float__", "numpy", "equal",
        "fill_",
    )  # fmt: skip

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
