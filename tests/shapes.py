"""The one list of shapes, masks, dtypes and rungs that tests draw from, and the tolerances derived
for them.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch

from hf_fusion.backends import FUSIONS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IMPLEMENTATIONS = ("sdpa", "eager")
BATCHES = (1, 2, 3, 8)
LENGTHS = (1, 2, 7, 15, 16, 17, 31, 32, 33, 127, 128, 129, 513)
# none: no mask is given; dead: one row is masked from its first to its last token
MASKS = ("none", "ones", "left", "right", "ragged", "dead")
STEPS = (1, 3, 1)  # tokens per call after the prompt

# (fusion, back end); the first rung runs no back end
RUNGS = (("none", "cpu"), *((f, b) for f in FUSIONS[1:] for b in ("cpu", "reference")))
KERNEL_RUNGS = (("attention", "cpu"), ("attention+up", "cpu"), ("full", "cpu"))

# changes to a family's tiny configuration that choose another computation
VARIANTS = {
    "gpt_neox": {
        "parallel": {"use_parallel_residual": True},
        "sequential": {"use_parallel_residual": False},
    }
}
# changes that choose other sizes, and choices of the configuration that every size should see once
SIZES = {
    "gpt_neox": {
        "head8": {"hidden_size": 24, "num_attention_heads": 3, "rotary_pct": 1.0},
        "head20": {
            "hidden_size": 60,
            "num_attention_heads": 3,
            "intermediate_size": 101,
            "rotary_pct": 0.5,
        },
        "head37": {
            "hidden_size": 37,
            "num_attention_heads": 1,
            "intermediate_size": 41,
            "rotary_pct": 0.25,
        },
        "head37x3": {
            "hidden_size": 111,
            "num_attention_heads": 3,
            "intermediate_size": 3,
            "rotary_pct": 0.5,
        },
        "head64": {
            "hidden_size": 128,
            "num_attention_heads": 2,
            "intermediate_size": 515,
            "hidden_act": "gelu_new",
        },
        "head80": {"hidden_size": 160, "num_attention_heads": 2, "use_parallel_residual": False},
        "head128": {
            "hidden_size": 128,
            "num_attention_heads": 1,
            "intermediate_size": 1,
            "hidden_act": "relu",
        },
        "head256": {
            "hidden_size": 256,
            "num_attention_heads": 1,
            "intermediate_size": 67,
            "hidden_act": "silu",
        },
        "no_bias": {
            "attention_bias": False,
            "intermediate_size": 65,
            "hidden_act": "gelu_pytorch_tanh",
        },
        "tied": {"tie_word_embeddings": True, "layer_norm_eps": 1e-2, "num_hidden_layers": 3},
        "vocab": {"vocab_size": 1027, "num_hidden_layers": 1, "use_parallel_residual": False},
        "theta": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 1.0,
            }
        },
        "linear_rope": {
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
        },
    }
}

# largest relative L2 error that counts as right where stock itself reaches it
RELATIVE_L2 = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
STOCK_FACTOR = 2.0
ULPS = 2.0


class Case(NamedTuple):
    """One input: a prompt of (batch, length) under a mask, then STEPS. `seed` draws the tokens and
    the holes.

    `embeds`: inputs_embeds in place of input_ids. `positions`: position_ids as generate() would
    give them. `keep`: logits_to_keep of the prompt. `cached`: with a cache; without one there
    are no steps.
    """

    mask: str
    batch: int
    length: int
    seed: int
    embeds: bool
    positions: bool
    keep: int
    cached: bool


def cases(count: int, seed: int) -> list[Case]:
    """`count` cases from every mask x batch x length in an order that `seed` shuffles."""
    triples = [(m, b, n) for m in MASKS for b in BATCHES for n in LENGTHS]
    draw = random.Random(seed)
    draw.shuffle(triples)
    chosen = [triples[i % len(triples)] for i in range(count)]
    return [
        Case(
            *triple,
            seed=draw.randrange(2**31),
            embeds=draw.random() < 0.2,
            positions=draw.random() < 0.4,
            keep=draw.choice((0, 0, 1, 2)),
            cached=draw.random() < 0.85,
        )
        for triple in chosen
    ]


def prompt_mask(case: Case, generator: torch.Generator) -> torch.Tensor:
    """(batch, length) int64, 1 = attend; all ones for "none" and "ones"."""
    batch, length = case.batch, case.length
    mask = torch.ones(batch, length, dtype=torch.int64)
    if case.mask in ("left", "right"):
        for row in range(batch):
            holes = int(torch.randint(0, length, (1,), generator=generator))
            if case.mask == "left":
                mask[row, :holes] = 0
            else:
                mask[row, length - holes :] = 0
    elif case.mask == "ragged":
        mask = (torch.rand(batch, length, generator=generator) < 0.7).long()
        mask[:, -1] = 1
    elif case.mask == "dead":
        mask[int(torch.randint(0, batch, (1,), generator=generator))] = 0
    return mask


def live_queries(mask: torch.Tensor, queries: int) -> torch.Tensor:
    """(batch, queries) bool: which of the last `queries` tokens of mask (batch, keys) see any key;
    others are don't-care.
    """
    return (mask.cumsum(1) > 0)[:, -queries:]
