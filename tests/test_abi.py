"""The C ABI and its mirror, what it refuses, and the native cases run on every kernel."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from hf_fusion import native
from hf_fusion.report import FusionError, Reason

ROOT = Path(__file__).resolve().parents[1]
HEADER = (ROOT / "csrc/include/hf_fusion.h").read_text()
CODE = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.S)
STRUCTS = re.findall(r"typedef struct \{(.*?)\} (\w+);", CODE, flags=re.S)
MIRRORS = dict(zip([name for _, name in STRUCTS], native.STRUCTS))
SCALARS = {
    "char[64]": ctypes.c_char * 64,
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


def fields(body: str) -> list[tuple[str, str]]:
    """(type, name) of a C struct's members in order; a pointer's type ends with *."""
    members = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        head, *more = declaration.removeprefix("const ").split(",")
        kind, name, count = re.fullmatch(r"(\w+\s*\*?)\s*(\w+)(\[\d+\])?", head.strip()).groups()
        kind += count or ""
        members += [(kind.replace(" ", ""), each) for each in (name, *map(str.strip, more))]
    return members


def test_every_struct_of_the_header_is_mirrored():
    assert len(STRUCTS) == len(native.STRUCTS)
    library = native.load()
    for index, (_, name) in enumerate(STRUCTS):
        assert library.hff_struct_size(index) == ctypes.sizeof(MIRRORS[name]), name
    for index in (-1, len(STRUCTS), 2**31 - 1, -(2**31)):
        assert library.hff_struct_size(index) == 0


@pytest.mark.parametrize(("body", "name"), STRUCTS, ids=[name for _, name in STRUCTS])
def test_fields_have_the_header_s_names_types_and_order(body, name):
    mirror = MIRRORS[name]
    assert [field for _, field in fields(body)] == [field[0] for field in mirror._fields_]
    for (kind, field), (_, mirrored) in zip(fields(body), mirror._fields_):
        if kind.endswith("*"):
            assert ctypes.sizeof(mirrored) == ctypes.sizeof(ctypes.c_void_p), field
        else:
            assert mirrored is SCALARS.get(kind, MIRRORS.get(kind)), f"{name}.{field}"


def test_constants_equal_the_header_s():
    header = {name: int(value) for name, value in re.findall(r"\bHFF_(\w+) = (\d+)", CODE)}
    statuses = ("OK", "INVALID", "UNSUPPORTED", "OUT_OF_MEMORY", "OUT_OF_RANGE", "INTERNAL")
    mirrored = {name: getattr(native, name) for name in (*statuses, "F32", "BF16", "F16")}
    mirrored |= {
        f"MASK_{kind}": getattr(native, f"MASK_{kind}")
        for kind in ("NONE", "BOOL", "INT64", "ADDITIVE")
    }
    tables = {
        "ACT": native.ACTIVATIONS,
        "NORM": native.NORMS,
        "RESIDUAL": native.RESIDUALS,
        "QKV": native.QKV_LAYOUTS,
        "PRECISION": native.PRECISIONS,
        "STAGE": native.STAGES,
        "ATTEND": native.ATTENDS,
        "DEVICE": native.DEVICES,
        "PLAN": native.PLANS,
        "PREFETCH": native.PREFETCHES,
    }
    for prefix, table in tables.items():
        mirrored |= {
            f"{prefix}_{name.upper().replace('+', '_')}": value for name, value in table.items()
        }
    # three matrices are no layout of their own: stacked, with k and v given
    assert mirrored.pop("QKV_SEPARATE") == mirrored["QKV_STACKED"]
    assert mirrored == header
    defines = dict(re.findall(r"#define HFF_(\w+) (\d+)", CODE))
    assert set(defines) == {"ABI_VERSION", "MAX_HEAD_DIM", "MAX_THREADS", "SAMPLED_ROWS"}
    for name, value in defines.items():
        assert getattr(native, name) == int(value)


def test_functions_have_the_header_s_argument_counts():
    declared = re.findall(r"HFF_API [\w\s*]+?(hff_\w+)\((.*?)\);", CODE, flags=re.S)
    counts = {
        name: 0 if arguments == "void" else arguments.count(",") + 1 for name, arguments in declared
    }
    assert counts == {name: len(arguments) for name, (_, arguments) in native._SIGNATURES.items()}


def norm_call(rows=2, hidden=3):
    """A valid hff_norm_forward in fp32; the arrays it points into come along."""
    weight, x, out = (
        (ctypes.c_float * hidden)(*[1.0] * hidden),
        (ctypes.c_float * 6)(),
        (ctypes.c_float * 6)(),
    )

    def buffer(array):
        return native.Buffer(ctypes.addressof(array), ctypes.sizeof(array))

    norm = native.Norm(buffer(weight), native.Buffer(), 1e-5, native.NORMS["layer"])
    io = native.sized(native.NormIo)
    io.dtype, io.threads, io.rows, io.hidden = native.F32, 1, rows, hidden
    io.x, io.out = buffer(x), buffer(out)
    return norm, io, (weight, x, out)


BAD = {
    "io.struct_size": [0, 1, 71, 73, 2**64 - 1],
    "io.dtype": [-1, 3, 2**31 - 1],
    "io.threads": [0, -1, 256, -(2**31)],
    "io.rows": [-1, 3, 2**62, 2**63 - 1],
    "io.hidden": [0, -1, 4, 2**62, 2**63 - 1],
    "io.x.bytes": [0, 23, -1],
    "io.out.bytes": [0, 23, -1],
    "io.x.data": [None],
    "io.out.data": [None],
    "norm.kind": [-1, 2],
    "norm.eps": [float("nan"), float("inf"), -1.0],
    "norm.weight.data": [None],
    "norm.weight.bytes": [11],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in BAD for value in BAD[field]]
)
def test_a_struct_that_contradicts_itself_is_refused(field, value):
    norm, io, arrays = norm_call()
    assert native.load().hff_norm_forward(ctypes.byref(norm), ctypes.byref(io)) == native.OK
    before = bytes(arrays[2])
    *path, last = field.split(".")
    target = {"io": io, "norm": norm}[path[0]]
    for name in path[1:]:
        target = getattr(target, name)
    setattr(target, last, value)
    ctypes.memmove(arrays[1], (ctypes.c_float * 6)(*range(6)), 24)
    status = native.load().hff_norm_forward(ctypes.byref(norm), ctypes.byref(io))
    with pytest.raises(FusionError) as caught:
        native.check(status)
    assert status == native.INVALID
    assert caught.value.reason is Reason.INVALID
    assert len(caught.value.message) > 5
    assert bytes(arrays[2]) == before


def test_zero_rows_are_fine_and_touch_nothing():
    norm, io, arrays = norm_call()
    io.rows, io.x, io.out = 0, native.Buffer(), native.Buffer()
    assert native.load().hff_norm_forward(ctypes.byref(norm), ctypes.byref(io)) == native.OK


def test_packed_bytes_are_zero_where_nothing_can_be_packed():
    packed_bytes = native.load().hff_packed_bytes
    for dtype in (native.F32, native.BF16, native.F16):
        for precision in native.PRECISIONS.values():
            size = packed_bytes(dtype, precision, 33, 17)
            assert size >= 33 * 17 * 2 and packed_bytes(dtype, precision, 66, 17) > size
            for rows, cols in ((0, 1), (1, 0), (-1, 8), (2**62, 2**62), (2**63 - 1, 1)):
                assert packed_bytes(dtype, precision, rows, cols) == 0
    assert packed_bytes(3, 0, 8, 8) == packed_bytes(0, 3, 8, 8) == packed_bytes(-1, -1, 8, 8) == 0


def device_call(**changes):
    """A call of a model of one layer on CUDA, as hff_workspace_bytes takes it; what it points into
    comes along.
    """
    memory = (ctypes.c_char * 4096)()
    address = ctypes.addressof(memory)
    buffer = native.Buffer(address - address % 256 + 256, 2048)
    norm = native.Norm(buffer, native.Buffer(), 1e-5, 0)

    def linear(rows):
        return native.Linear(buffer, native.Buffer(), native.Buffer(), rows, 8, 8)

    heads = native.Heads(1, 1, 8, 0, 1.0, 0)
    empty = native.Linear()
    block = native.Block(
        heads, 8, 8, 0, 0, norm, norm, linear(24), empty, empty, linear(8), linear(8), linear(8)
    )
    model = native.sized(native.Model)
    model.hidden, model.block_count = 8, 1
    model.blocks = ctypes.pointer(block)
    call = native.sized(native.Call)
    call.dtype, call.threads, call.batch, call.queries = native.F16, 1, 1, 1
    call.causal, call.device = 1, native.DEVICES["cuda"]
    for name, value in changes.items():
        setattr(call, name, value)
    return call, model, (memory, block, buffer)


def on_device(call, model, buffer, length) -> int:
    """Status of a forward whose length and hidden states lie at addresses that a host must not
    read.
    """
    cache, io = native.Cache(), native.sized(native.ModelIo)
    cache.keys = cache.values = buffer
    cache.batch_stride = cache.head_stride = cache.token_stride = cache.capacity = 8
    cache.length = length
    io.x = io.hidden = buffer
    references = map(ctypes.byref, (call, model, cache, io))
    return native.load().hff_model_forward(*references)


def test_a_device_is_described_or_refused_with_the_reason():
    library, found = native.load(), native.sized(native.Device)
    describe = library.hff_describe_device
    assert describe(native.DEVICES["cuda"], 0, None) == native.INVALID
    for device in (7, -1):
        assert describe(device, 0, ctypes.byref(found)) == native.INVALID
    assert describe(native.DEVICES["cuda"], -1, ctypes.byref(found)) == native.INVALID
    short = native.Device(struct_size=8)
    assert describe(native.DEVICES["cuda"], 0, ctypes.byref(short)) == native.INVALID
    assert describe(native.DEVICES["cpu"], 0, ctypes.byref(found)) == native.UNSUPPORTED
    try:
        assert native.describe_device("cuda").arch >= 800
    except FusionError as absent:
        assert absent.reason is Reason.UNSUPPORTED and len(absent.message) > 20


def test_calls_on_a_device_are_checked_without_reading_it():
    """Addresses of device memory lie where no host memory is: a read of one would end the process.
    """
    far = 1 << 46
    call, model, (_, _, buffer) = device_call()
    status = on_device(call, model, buffer, far)
    need = native.load().hff_workspace_bytes(ctypes.byref(call), ctypes.byref(model))
    if need == 0:
        assert status == native.UNSUPPORTED and native.load().hff_last_error()
    else:
        assert status == native.INVALID and b"workspace" in native.load().hff_last_error()
        for data, size in ((far + 1, need), (far + 128, need), (far, need - 1)):
            call.workspace = native.Buffer(data, size)
            assert on_device(call, model, buffer, far) == native.INVALID
    call.starts = native.Buffer(far, 16)
    assert on_device(call, model, buffer, far) == native.UNSUPPORTED
    for name, value in {"device": 7, "ordinal": -1, "plan": 9, "dtype": 3}.items():
        call, model, (_, _, buffer) = device_call(**{name: value})
        assert on_device(call, model, buffer, far) == native.INVALID
        assert native.load().hff_workspace_bytes(ctypes.byref(call), ctypes.byref(model)) == 0
    call, model, (_, block, buffer) = device_call()
    block.qkv.packed = native.Buffer(far, 1 << 20)
    assert on_device(call, model, buffer, far) == native.INVALID


def test_a_struct_of_another_size_is_not_read_further():
    """A call of steps looks at the head of its model, which a shorter struct may not have."""
    call, model, (_, _, buffer) = device_call(device=native.DEVICES["cpu"])
    io, cache = native.sized(native.ModelIo), native.Cache()
    io.steps, io.ids, io.next = 2, buffer, buffer
    model.vocab, model.head.rows = 8, 9
    for size in (ctypes.sizeof(model), 8):
        model.struct_size = size
        references = map(ctypes.byref, (call, model, cache, io))
        assert native.load().hff_model_forward(*references) == native.INVALID
    assert native.load().hff_last_error() == b"hff_model has another size for the caller"


def test_workspace_is_asked_for_on_devices_only():
    library = native.load()
    call, model, _ = device_call(device=native.DEVICES["cpu"])
    assert library.hff_workspace_bytes(ctypes.byref(call), ctypes.byref(model)) == 0
    assert library.hff_workspace_bytes(None, ctypes.byref(model)) == 0
    assert library.hff_workspace_bytes(ctypes.byref(call), None) == 0


# ---------------------------------------------------------------- the native cases


@pytest.mark.parametrize("arguments, rows", [
    pytest.param(["test"], {1, 2, 13, 16, 17, 20, 21, 24, 26, 27}, id="test"),
    pytest.param(["fuzz", "--trials", "50000"], {8}, id="fuzz"),
])  # fmt: skip
def test_native_cases(cases, arguments, rows, native_rows, capsys):
    """The rows of kernels, and 9 where there are two instruction sets; the summary counts them."""
    done = subprocess.run([cases, *arguments], capture_output=True, text=True, timeout=900)
    counted = native_rows(done.stdout)
    with capsys.disabled():
        print("\n" + done.stdout[-20000:])
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]
    assert counted >= rows, f"no trials of rows {sorted(rows - counted)}"
