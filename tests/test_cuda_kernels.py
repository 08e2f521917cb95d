"""The CUDA kernels on host fibers: the native cases of layers and models on emulated devices, their
schedules as data, 1,000 seeds of every kernel, and a norm's numbers.
"""

from __future__ import annotations

import copy
import re
import subprocess

import pytest
import torch
from test_cuda import HALVES, device, model_of, patched  # noqa: F401  (device is a fixture)
from test_numerics import HARD_ROWS
from transformers import DynamicCache
from twins import STOCK_FACTOR, fused_hits


def row(name: str, number: int, title: str):
    return pytest.param(name, id=name, marks=pytest.mark.reliability(number, title))


@pytest.mark.parametrize(
    "name",
    [
        row("schedules", 14, "CUDA kernels on fibers"),
        row("seeds", 14, "CUDA kernels on fibers"),
        row("parity", 1, "kernel parity"),
        row("differential", 9, "scalar against others"),
        row("edge", 27, "edge numerics"),
        row("values", 27, "edge numerics"),
        row("determinism", 16, "determinism"),
        row("unsupported", 8, "ABI refusals"),
    ],
)
def test_native_cases_on_the_device(name, cases, trials, capsys):
    """hff_cases --isa cuda; what it prints is shown."""
    command = [cases, "test", "--isa", "cuda", "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    with capsys.disabled():
        print("\n" + done.stdout[-20000:].rstrip())
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]
    counts = [int(count) for count in re.findall(r"trials (\d+) failures 0\b", done.stdout)]
    assert counts and "failures 0" in done.stdout
    # a kernel may have no room for a random shape on a random device, but rarely
    refused = sum(int(count) for count in re.findall(r"\((\d+) refused: no room\)", done.stdout))
    assert name == "unsupported" or refused <= sum(counts) // 20
    trials(sum(counts) - refused)


@pytest.mark.parametrize("plan", ("chain", "token"))
@pytest.mark.parametrize("dtype", HALVES)
@torch.no_grad()
def test_a_norm_errs_at_most_twice_as_much_as_torch(device, dtype, plan):  # noqa: F811
    """Layers that add a constant and a head that is the unit matrix leave the last norm's numbers,
    of sums that only fp32 holds.
    """
    hidden, constant = 384, 0.003
    model = model_of(dtype, hidden_size=hidden, num_attention_heads=4, vocab_size=hidden)
    torch.nn.init.eye_(model.lm_head.weight)
    for layer in model.gpt_neox.layers:
        for last in (layer.attention.dense, layer.mlp.dense_4h_to_h):
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.constant_(last.bias, constant)
    added, norm = 4 * last.bias, model.gpt_neox.final_layer_norm
    generator = torch.Generator().manual_seed(3)
    with patched(model):
        vars(model)["_hf_fusion"].state.backends.of(torch.device("cpu")).plan = plan
        for kind, rows in HARD_ROWS.items():
            x = rows(300 * torch.randn(4, hidden, generator=generator)).to(added.dtype)
            cache = DynamicCache(config=model.config)
            with fused_hits(model, kind):
                got = model(inputs_embeds=x[:, None], past_key_values=cache).logits[:, 0].double()
            exact = copy.deepcopy(norm).double()(x.double() + 4 * last.bias.double())
            error, stock = ((y.double() - exact).abs().max() for y in (got, norm(x + added)))
            assert error <= STOCK_FACTOR * stock, f"{kind}: {error:.3g}, stock's {stock:.3g}"
