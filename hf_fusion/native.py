"""The native library: loaded by absolute path from inside the package, its statuses raised, its
structs at hand.

Knows ctypes and the C ABI of csrc/include/hf_fusion.h (mirror.py), nothing of models or torch. A
library that is missing, writable by anyone, of another ABI or with other struct sizes is refused
with a FusionError(Reason.LIBRARY). No other place is searched.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import sys
import threading
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

from .mirror import *  # noqa: F403  callers see one module: native.load() beside native.Block
from .report import FusionError, Reason

_REASONS = {
    INVALID: Reason.INVALID,
    UNSUPPORTED: Reason.UNSUPPORTED,
    OUT_OF_MEMORY: Reason.OUT_OF_MEMORY,
    OUT_OF_RANGE: Reason.OUT_OF_RANGE,
}

_SIGNATURES = {
    "hff_model_forward": (
        c_int32, [POINTER(Call), POINTER(Model), POINTER(Cache), POINTER(ModelIo)]
    ),
    "hff_block_forward": (
        c_int32, [POINTER(Call), POINTER(Block), POINTER(Cache), POINTER(BlockIo)]
    ),
    "hff_linear_forward": (c_int32, [POINTER(Linear), POINTER(LinearIo)]),
    "hff_norm_forward": (c_int32, [POINTER(Norm), POINTER(NormIo)]),
    "hff_attend": (c_int32, [POINTER(AttendIo)]),
    "hff_plan_attend": (c_int32, [POINTER(AttendIo), POINTER(AttendPlan)]),
    "hff_packed_bytes": (c_int64, [c_int32, c_int32, c_int64, c_int64]),
    "hff_pack": (c_int32, [POINTER(Linear), c_int32, c_int32, c_int32, POINTER(Buffer)]),
    "hff_fingerprint": (c_uint64, [POINTER(Linear), c_int64, c_int32, c_int64]),
    "hff_describe_device": (c_int32, [c_int32, c_int32, POINTER(Device)]),
    "hff_workspace_bytes": (c_int64, [POINTER(Call), POINTER(Model)]),
    "hff_abi_version": (c_int32, []),
    "hff_struct_size": (c_uint64, [c_int32]),
    "hff_last_error": (c_char_p, []),
    "hff_scratch_bytes": (c_int64, []),
    "hff_isa_name": (c_char_p, [c_int32, POINTER(c_char_p)]),
    "hff_select_isa": (c_int32, [c_char_p]),
    "hff_isa": (c_char_p, []),
    "hff_use_openmp": (c_int32, [c_void_p, c_void_p, c_void_p]),
    "hff_huge_pages": (c_int64, [c_void_p, c_int64]),
    "hff_prefetch": (c_int32, [c_int32, c_int64]),
    "hff_read_stream": (c_double, [c_void_p, c_int64, c_int32]),
}  # fmt: skip

_library: ctypes.CDLL | None = None
_lock = threading.Lock()


def library_path() -> Path:
    """Where the package keeps its library; FusionError(Reason.LIBRARY) where it is absent or not to
    be trusted.
    """
    name = "libhf_fusion.dylib" if sys.platform == "darwin" else "libhf_fusion.so"
    folders = [Path(os.path.abspath(folder)) for folder in sys.modules[__package__].__path__]
    for folder in folders:
        path = folder / name
        if not os.path.lexists(path):
            continue
        for trusted in (path, folder):
            mode = os.stat(trusted).st_mode if trusted is folder else os.lstat(trusted).st_mode
            link, writable = stat.S_ISLNK(mode), f"writable by anyone ({mode & 0o777:o})"
            if link or mode & stat.S_IWOTH:
                raise FusionError(
                    Reason.LIBRARY,
                    f"{trusted} is {'a link' if link else writable}, "
                    "expected a plain file or folder that others may not write",
                )
        return path
    raise FusionError(
        Reason.LIBRARY,
        f"{name} is not in {' or '.join(map(str, folders))}; install the package to build it",
    )


def load() -> ctypes.CDLL:
    """The library, loaded and checked once; FusionError(Reason.LIBRARY or Reason.ISA) where it
    cannot be used.
    """
    global _library
    if _library is not None:
        return _library
    with _lock:
        if _library is None:
            _library = _open(library_path())
    return _library


def _check_whole(path: Path) -> None:
    """Raises FusionError where an ELF file ends before its section table does: loading it could end
    the process.
    """
    with open(path, "rb") as file:
        head = file.read(64)
        size = file.seek(0, os.SEEK_END)
    if head[:5] != b"\x7fELF\x02":
        return  # the loader says what it is
    if len(head) == 64:
        entry, count = (int.from_bytes(head[at : at + 2], sys.byteorder) for at in (58, 60))
        end = int.from_bytes(head[40:48], sys.byteorder) + entry * count
    if len(head) < 64 or size < end:
        raise FusionError(Reason.LIBRARY, f"{path} is cut off after {size} bytes")


def _open(path: Path) -> ctypes.CDLL:
    try:
        _check_whole(path)
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise FusionError(Reason.LIBRARY, f"{path} cannot be loaded: {error}") from error
    version = library.hff_abi_version()
    if version != ABI_VERSION:
        raise FusionError(
            Reason.LIBRARY, f"{path} has ABI version {version}, expected {ABI_VERSION}"
        )
    for index, struct in enumerate(STRUCTS):
        size = library.hff_struct_size(index)
        if size != ctypes.sizeof(struct):
            raise FusionError(
                Reason.LIBRARY,
                f"{path} has {struct.__name__} of {size} bytes, expected {ctypes.sizeof(struct)}",
            )
    if library.hff_isa() is None:
        raise FusionError(Reason.ISA, library.hff_last_error().decode())
    return library


def check(status: int) -> None:
    """Raises FusionError for a status that is not OK, with the library's own sentence."""
    if status != OK:
        raise FusionError(_REASONS.get(status, Reason.INTERNAL), load().hff_last_error().decode())


def describe_device(device: str, ordinal: int = 0) -> Device:
    """What the library finds of a device; FusionError(Reason.UNSUPPORTED) with its reason where it
    finds none.
    """
    found = sized(Device)
    check(load().hff_describe_device(DEVICES[device], ordinal, ctypes.byref(found)))
    return found


def isa() -> str:
    """Name of the instruction set in use, one of `isas`."""
    return load().hff_isa().decode()


def isas() -> list[tuple[str, str | None]]:
    """Every instruction set in rising order, with the reason it cannot be used here, None where it
    can.
    """
    library, found = load(), []
    reason = c_char_p()
    while True:
        name = library.hff_isa_name(len(found), ctypes.byref(reason))
        if name is None:
            return found
        found.append((name.decode(), reason.value.decode() if reason.value else None))


def select_isa(name: str | None) -> str:
    """Forces an instruction set for the process, None for HF_FUSION_ISA or the best; returns the
    one in use.
    """
    check(load().hff_select_isa(name.encode() if name is not None else None))
    return isa()


def use_openmp(folder: Path) -> None:
    """Runs native calls on the threads of the OpenMP runtime that was loaded from `folder`.

    Loads nothing: without a runtime from there in the process, native calls keep threads of their
    own.
    """
    for path in sorted(folder.glob("lib*omp*.so*")):
        try:
            runtime = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
            addresses = [ctypes.cast(getattr(runtime, name), c_void_p) for name in names]
        except (OSError, AttributeError):
            continue
        check(load().hff_use_openmp(*addresses))
        return


def huge_pages(address: int, size: int) -> int:
    """Bytes of [address, address + size) now backed by huge pages, in place."""
    return load().hff_huge_pages(address, size)


def prefetch(dtype: int, rows: int = 1) -> str | None:
    """How row kernels ask memory for weights in calls of `rows` rows, 1 or 2 (a name of
    PREFETCHES); None until the first calls over large weights have found out what is faster here.
    """
    found = load().hff_prefetch(dtype, rows)
    return next((name for name, value in PREFETCHES.items() if value == found), None)


def read_stream_bandwidth(size: int = 512 << 20, threads: int = 1, repeats: int = 3) -> float:
    """Bytes per second at which `threads` threads read `size` bytes of memory on huge pages, median
    of `repeats`.
    """
    library = load()
    with mmap.mmap(-1, size) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        try:
            view = (ctypes.c_char * size).from_buffer(memory)
            address = ctypes.addressof(view)
            ctypes.memset(address, 1, size)
            seconds = sorted(
                library.hff_read_stream(address, size, threads) for _ in range(repeats)
            )
        finally:
            view = None  # memory that something points into does not close
    return size / seconds[repeats // 2]
