"""Stock, reference and kernels give the same function: every family, dtype, mask, batch, length,
rung and instruction set.
"""

from __future__ import annotations

import zlib

import pytest
import shapes
import torch
from conftest import available_isas
from twins import FAMILIES, Twin, twin

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = [(f, v) for f in FAMILIES for v in shapes.VARIANTS.get(f, {"plain": {}})]
SIZES = [(f, s) for f in FAMILIES for s in shapes.SIZES.get(f, {})]
CASES = 10  # per rung of a twin


def seed_of(*names: str) -> int:
    """A number that only depends on the names."""
    return zlib.crc32(" ".join(names).encode())


def variant_twin(family: str, variant: str, dtype: str, implementation: str = "sdpa") -> Twin:
    """The twin of a named variant."""
    return twin(family, shapes.VARIANTS.get(family, {}).get(variant, {}), dtype, implementation)


@pytest.mark.reliability(3)
@pytest.mark.parametrize("fusion, backend", shapes.RUNGS)
@pytest.mark.parametrize("implementation", shapes.IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", shapes.DTYPES)
@pytest.mark.parametrize("family, variant", VARIANTS)
def test_rungs_over_masks_batches_and_lengths(
    family, variant, dtype, implementation, fusion, backend, trials
):
    pair = variant_twin(family, variant, dtype, implementation)
    for case in shapes.cases(CASES, seed_of(family, variant, dtype, implementation)):
        pair.check(case, fusion, backend)
        trials()


@pytest.mark.reliability(3)
@pytest.mark.parametrize("dtype", shapes.DTYPES)
@pytest.mark.parametrize("family, size", SIZES)
def test_sizes(family, size, dtype, trials):
    pair = twin(family, shapes.SIZES[family][size], dtype)
    for fusion, backend in (*shapes.KERNEL_RUNGS, ("full", "reference")):
        for case in shapes.cases(4, seed_of(family, size, dtype)):
            pair.check(case._replace(length=min(case.length, 129)), fusion, backend)
            trials()


@pytest.mark.reliability(3)
@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", shapes.DTYPES)
@pytest.mark.parametrize("family, variant", VARIANTS)
def test_every_instruction_set(family, variant, dtype, isa, force_isa, trials):
    assert force_isa(isa) == isa
    pair = variant_twin(family, variant, dtype)
    for case in shapes.cases(8, seed_of(family, variant, dtype, "sdpa")):
        for fusion in ("attention+up", "full"):
            pair.check(case, fusion, "cpu")
            trials()


@pytest.mark.reliability(3)
@pytest.mark.parametrize("fusion", ("attention", "full"))
@pytest.mark.parametrize("family, variant", VARIANTS)
def test_two_threads(family, variant, fusion, trials):
    torch.set_num_threads(2)
    for dtype in shapes.DTYPES:
        pair = variant_twin(family, variant, dtype)
        for case in shapes.cases(4, seed_of(family, variant, dtype, "sdpa")):
            pair.check(case, fusion, "cpu")
            trials()
