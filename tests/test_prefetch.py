"""How row kernels ask for weights: a process finds it out over large weights, and no number depends
on it.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from hf_fusion import native

# hidden 512 x vocabulary 50304 in bf16 are 51 MB; the tiny vocabulary leaves the choice open.
SCRIPT = """
from functools import partial

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import hf_fusion
from hf_fusion import native


def decode(vocab, tokens, native_steps):
    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=vocab, hidden_size=512, num_hidden_layers=1,
                           num_attention_heads=8, intermediate_size=64,
                           max_position_embeddings=512, eos_token_id=None)
    model = GPTNeoXForCausalLM(config).to(torch.bfloat16).eval()
    hf_fusion.patch(model)
    generate = partial(hf_fusion.generate, model) if native_steps else model.generate
    return generate(torch.arange(8)[None], max_new_tokens=tokens, do_sample=False)[0].tolist()


decode(1024, 140, True)
print(native.prefetch(native.BF16))
first = decode(50304, 270, {native_steps})
kinds = (native.BF16, 1), (native.BF16, 2), (native.F32, 1)
print(*(native.prefetch(*kind) for kind in kinds), sep=", ")
print(decode(50304, 270, {native_steps}) == first)
"""


@pytest.mark.parametrize("native_steps", [False, True], ids=["generate", "own loop"])
def test_the_first_tokens_over_large_weights_find_it_out(native_steps):
    script = SCRIPT.format(native_steps=native_steps)
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    before, found, same = run.stdout.splitlines()[-3:]
    assert before == "None"
    # another number of rows, another dtype: open
    assert found in [f"{kept}, None, None" for kept in native.PREFETCHES]
    assert same == "True"


@pytest.mark.parametrize(("dtype", "rows"), [(-1, 1), (3, 1), (1, 0), (1, 3), (1, -(2**63))])
def test_what_names_no_call_has_no_answer(dtype, rows):
    assert native.prefetch(dtype, rows) is None
