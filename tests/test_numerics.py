"""Edge values keep stock's class (nan, inf, finite, zero), and equal input gives equal bits."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shapes import DTYPES, VARIANTS
from torch.nn.functional import layer_norm
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import DynamicCache
from twins import FAMILIES, STOCK_FACTOR, Output, fused_hits, judge, twin

import hf_fusion
from hf_fusion import native
from hf_fusion.attend import KERNELS, attend
from hf_fusion.structs import buffer

TWINS = [
    (family, variant) for family in FAMILIES for variant in VARIANTS.get(family, {"plain": {}})
]
RUNGS = (
    ("attention", "cpu"),
    ("attention+up", "cpu"),
    ("full", "cpu"),
    ("full", "reference"),
    ("decomposed", "cpu"),
)
AT = (1, 3)  # row and token that the edge value is put into


def one_nan(x):
    x[AT] = float("nan")


def one_inf(x):
    x[AT][..., 0] = float("inf")


def minus_inf(x):
    x[AT][..., -1] = -float("inf")


def denormal(x):
    x[AT] = torch.finfo(x.dtype).smallest_normal / 4


def minus_zero(x):
    x[AT] = -0.0


def largest(x):
    x[AT] *= torch.finfo(torch.float16).max / 8


def equal_rows(x):
    x[:] = x[:1, :1].clone()


def constant(x):
    x[AT] = 0.1


def high_mean(x):
    x[AT] = (1e4 + 8 * x[AT].float()).to(x.dtype)


KINDS = (
    one_nan,
    one_inf,
    minus_inf,
    denormal,
    minus_zero,
    largest,
    equal_rows,
    constant,
    high_mean,
)


def class_of(x: torch.Tensor) -> torch.Tensor:
    """0 zero, 1 finite, 2 inf, 3 minus inf, 4 nan."""
    kind = torch.where(x == 0, 0, 1)
    kind = torch.where(x == float("inf"), 2, torch.where(x == -float("inf"), 3, kind))
    return torch.where(x.isnan(), 4, kind)


@torch.no_grad()
def forwards(model, edit, length: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (3, length + 2, vocab) of edited embeds: `length` in one call, then one by one."""
    generator = torch.Generator().manual_seed(21)
    x = torch.randn(3, length + 2, model.config.hidden_size, generator=generator)
    x = x.to(model.dtype)
    edit(x)
    cache, found = DynamicCache(config=model.config), []
    for part in (slice(0, length), slice(length, length + 1), slice(length + 1, length + 2)):
        seen = None if mask is None else mask[:, : part.stop]
        found.append(
            model(inputs_embeds=x[:, part], past_key_values=cache, attention_mask=seen).logits
        )
    return torch.cat(found, 1)


@pytest.mark.reliability(27)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("fusion, backend", RUNGS)
@pytest.mark.parametrize("kind", KINDS)
def test_edge_values_keep_their_class(kind, fusion, backend, trials):
    for family, variant in TWINS:
        for dtype in DTYPES:
            pair = twin(family, VARIANTS.get(family, {}).get(variant, {}), dtype)
            for length in (5, 20):  # one native call, and torch's GEMMs around native attention
                what = f"{pair.name}: {kind.__name__}, {fusion} on {backend}, length {length}"
                stock = forwards(pair.stock, kind, length)
                with hf_fusion.patched(pair.fused, fusion, backend), fused_hits(pair.fused, what):
                    got = forwards(pair.fused, kind, length)
                ours, theirs = class_of(got), class_of(stock)
                if backend == "cpu" and fusion != "decomposed":
                    # stock multiplies by zero what causality hides, and NaN passes; kernels skip it
                    assert bool((ours[AT[0], : AT[1]] == 1).all()), (
                        f"{what}: a later token leaks into earlier ones"
                    )
                    theirs[AT[0], : AT[1]] = 1
                assert torch.equal(ours, theirs), (
                    f"{what}: class {ours[ours != theirs][:5].tolist()} "
                    f"in place of {theirs[ours != theirs][:5].tolist()} "
                    f"at {(ours != theirs).nonzero()[:5].tolist()}"
                )
                trials()


@pytest.mark.reliability(27)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("fusion, backend", RUNGS)
@pytest.mark.parametrize("kind", (denormal, minus_zero, equal_rows, constant, high_mean))
def test_edge_values_keep_parity(kind, fusion, backend, trials):
    for family, variant in TWINS:
        pair = twin(family, VARIANTS.get(family, {}).get(variant, {}), "fp32")
        for length in (5, 20):
            what = f"{pair.name}: {kind.__name__}, {fusion} on {backend}, length {length}"

            kept = []

            def keep(x):
                kind(x)
                kept.append(x.double())

            stock = forwards(pair.stock, keep, length)
            exact = outcome(pair.exact, kept[0])
            with hf_fusion.patched(pair.fused, fusion, backend), fused_hits(pair.fused, what):
                got = forwards(pair.fused, keep, length)
            assert torch.equal(kept[0], kept[1])
            live = torch.ones(got.shape[:2], dtype=torch.bool)
            judge(*(Output("logits", t, live) for t in (got, stock, exact)), pair.stages, what)
            trials()


@torch.no_grad()
def outcome(model, x: torch.Tensor) -> torch.Tensor:
    """Logits of x (batch, tokens, hidden) in one call."""
    return model(inputs_embeds=x, use_cache=False).logits


@pytest.mark.reliability(27)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("fusion, backend", RUNGS)
@pytest.mark.parametrize("kind", (one_nan, one_inf))
def test_what_a_mask_hides_never_leaks(kind, fusion, backend, trials):
    """Tokens that the mask hides change no bit of the others, whatever they hold."""
    for family, variant in TWINS:
        for dtype in DTYPES:
            pair = twin(family, VARIANTS.get(family, {}).get(variant, {}), dtype)
            for length in (5, 20):
                what = (
                    f"{pair.name}: {kind.__name__} masked, {fusion} on {backend}, length {length}"
                )
                mask = torch.ones(3, length + 2, dtype=torch.int64)
                mask[AT] = 0
                others = mask.bool()
                with hf_fusion.patched(pair.fused, fusion, backend), fused_hits(pair.fused, what):
                    got = forwards(pair.fused, kind, length, mask)
                    clean = forwards(pair.fused, lambda x: None, length, mask)
                assert bool(got[others].isfinite().all()), f"{what}: not finite"
                assert torch.equal(got[others], clean[others]), (
                    f"{what}: a masked value moved others"
                )
                trials()


def norm_rows(x, weight, bias, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    norm = native.Norm(buffer(weight), buffer(bias), eps, native.NORMS["layer"])
    io = native.sized(native.NormIo)
    io.dtype, io.threads, io.x, io.out = native.F32, 1, buffer(x), buffer(out)
    io.rows, io.hidden = x.shape
    native.check(native.load().hff_norm_forward(ctypes.byref(norm), ctypes.byref(io)))
    return out


def one_channel(x):
    x[:, 2] = 1e4
    return x


HARD_ROWS = {
    "equal": lambda x: x[:, :1].repeat(1, x.shape[1]),
    "high mean": lambda x: 1e3 + x,
    "one channel": one_channel,
}


@pytest.mark.parametrize("rows", HARD_ROWS.values(), ids=HARD_ROWS)
def test_a_norm_errs_at_most_twice_as_much_as_torch(rows, force_isa):
    """Where a sum in one chain would lose small numbers beside large ones. Equal numbers are the
    bias, to the bit.
    """
    generator = torch.Generator().manual_seed(3)
    usable = [name for name, missing in native.isas() if missing is None]
    for hidden, eps in ((7, 1e-12), (768, 1e-12), (5120, 1e-5)):
        x = rows(torch.randn(64, hidden, generator=generator))
        weight, bias = (torch.randn(hidden, generator=generator) for _ in range(2))
        stock, exact = (
            layer_norm(x.to(dtype), (hidden,), weight.to(dtype), bias.to(dtype), eps).double()
            for dtype in (torch.float32, torch.float64)
        )
        for name in usable:
            force_isa(name)
            error = (norm_rows(x, weight, bias, eps) - exact).abs().max()
            allowed = STOCK_FACTOR * (stock - exact).abs().max()
            assert error <= allowed, f"{name}, hidden {hidden}: {error:.3g} exceeds {allowed:.3g}"


def test_fp16_denormals_are_numbers_where_the_caller_flushes_denormals(force_isa):
    """They are normal numbers in fp32."""
    v = (torch.arange(1024) * 2.0**-24).half().view(1, 16, 1, 64)
    usable = [name for name, missing in native.isas() if missing is None]
    for name in usable:
        force_isa(name)
        torch.set_flush_denormal(True)
        try:
            out = attend(torch.zeros_like(v), torch.zeros_like(v), v)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(out.transpose(1, 2), v), name


def test_scores_too_large_to_be_exact_keep_the_parity_rule(force_isa):
    """One key has all the weight, and neither rounding nor rescaling takes it away."""
    usable = [name for name, missing in native.isas() if missing is None]
    for dtype, size in ((torch.float32, 1e6), (torch.bfloat16, 1e6), (torch.float16, 12e3)):
        q, k = ((torch.randn(1, 2, 40, 80) * size).to(dtype) for _ in range(2))
        v = torch.randn(1, 2, 40, 80).to(dtype)
        stock = sdpa(q, k, v).double()
        exact = sdpa(q.double(), k.double(), v.double())
        allowed = STOCK_FACTOR * (stock - exact).abs().max() + torch.finfo(dtype).eps
        for name in usable:
            force_isa(name)
            for kernel in KERNELS:
                error = (attend(q, k, v, kernel=kernel).transpose(1, 2) - exact).abs().max()
                assert error <= allowed, f"{kernel}, {name}, {dtype}: error {error:.3g}"


@torch.no_grad()
def some_logits(model, batch: int, length: int, seed: int, row: int | None = None) -> torch.Tensor:
    """Logits of a prompt and 3 tokens one by one, of all rows or of one alone."""
    ids = torch.randint(3, 99, (batch, length + 3), generator=torch.Generator().manual_seed(seed))
    ids = ids if row is None else ids[row : row + 1]
    cache = DynamicCache(config=model.config)
    found = [model(input_ids=ids[:, :length], past_key_values=cache).logits]
    for at in range(length, length + 3):
        found.append(model(input_ids=ids[:, at : at + 1], past_key_values=cache).logits)
    return torch.cat(found, 1)


SHAPES = ((1, 4), (2, 7), (4, 4), (3, 40), (1, 129))


@pytest.mark.reliability(16)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family, variant", TWINS)
def test_equal_bits_from_run_to_run_and_for_any_number_of_threads(
    family, variant, dtype, one_thread, trials
):
    pair = twin(family, VARIANTS.get(family, {}).get(variant, {}), dtype)
    with hf_fusion.patched(pair.fused, "full", "cpu"):
        for batch, length in SHAPES:
            for seed in range(3):
                what = f"{pair.name}: batch {batch}, length {length}, seed {seed}"
                torch.set_num_threads(1)
                first = some_logits(pair.fused, batch, length, seed)
                assert torch.equal(some_logits(pair.fused, batch, length, seed), first), (
                    f"{what}: a second run differs"
                )
                trials()
                # torch's GEMMs, which take over above 16 rows, promise nothing across threads
                if batch * length <= 16:
                    for threads in (2, 3, 4):
                        torch.set_num_threads(threads)
                        again = some_logits(pair.fused, batch, length, seed)
                        assert torch.equal(again, first), f"{what}: {threads} threads differ from 1"
                        trials()


@pytest.mark.reliability(16)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family, variant", TWINS)
def test_a_row_has_the_bits_it_has_alone(family, variant, dtype, one_thread, trials):
    """Up to 16 rows, where kernels do everything, a row's bits do not depend on its batch."""
    pair = twin(family, VARIANTS.get(family, {}).get(variant, {}), dtype)
    with hf_fusion.patched(pair.fused, "full", "cpu"):
        for batch, length in ((2, 7), (4, 4), (8, 2), (16, 1)):
            together = some_logits(pair.fused, batch, length, batch)
            for row in range(batch):
                alone = some_logits(pair.fused, batch, length, batch, row)
                assert torch.equal(alone[0], together[row]), (
                    f"{pair.name}: row {row} of {batch}, length {length}"
                )
                trials()


FRESH = """
import hashlib, sys, torch
sys.path.insert(0, {folder!r})
torch.set_num_threads(1)
import hf_fusion
from shapes import DTYPES
from test_numerics import some_logits
from twins import twin
for dtype in DTYPES:
    pair = twin({family!r}, {changes!r}, dtype)
    hf_fusion.patch(pair.fused, "full", "cpu", strict=True)
    bits = some_logits(pair.fused, 3, 5, 1).view(torch.uint8).numpy().tobytes()
    print("digest", dtype, hashlib.sha256(bits).hexdigest(), hf_fusion.stats(pair.fused).fused)
"""


@pytest.mark.reliability(16)
def test_equal_bits_in_fresh_processes(trials):
    family, variant = TWINS[0]
    changes = VARIANTS.get(family, {}).get(variant, {})
    code = FRESH.format(folder=str(Path(__file__).parent), family=family, changes=changes)
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        lines = [line for line in done.stdout.splitlines() if line.startswith("digest ")]
        assert len(lines) == len(DTYPES) and not any(line.endswith(" 0") for line in lines), lines
        found.append(lines)
        trials(len(lines))
    assert found[0] == found[1], "two processes gave different bits"
