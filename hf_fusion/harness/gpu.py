"""What a machine with a GPU can show: the read stream, parity, decode times, and small steps for
compute-sanitizer. scripts/gpu_check.sh runs these parts one by one, each under a time limit.

A part writes its JSON after every row, so that a part that is stopped leaves what it has found.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import hf_fusion
from hf_fusion import native
from hf_fusion.cache import CACHE
from hf_fusion.forwards import KEY

from . import machine, models
from .parity import LIMIT, raised

SHAPES = [name for name in models.PYTHIA_SHAPES if name not in ("pythia-6.9b", "pythia-12b")]
CONTEXTS = (1, 17, 64, 513, 2044)
STEPS = 4  # decoded after each context
# rung: (fusion, plan)
RUNGS = {
    "attention": ("attention", "auto"),
    "attention+up": ("attention+up", "auto"),
    "full, chain": ("full", "chain"),
    "full, token": ("full", "token"),
}
HEAD_DIMS = (32, 64, 80, 96, 128)  # of the small steps
SPEED_MODEL, SPEED_CONTEXTS = "pythia-2.8b", (32, 1984)
STREAM_BYTES = 8 << 30


class Record:
    """Rows of one part, in a JSON file that is whole at any time."""

    def __init__(self, path: Path, part: str):
        self.path = path
        self.data: dict[str, Any] = {"part": part, "complete": False, "rows": []}
        self.data["machine"] = machine.environment() | {"gpu": torch.cuda.get_device_name()}
        self._write()

    def add(self, **row: Any) -> None:
        """One more row; printed too."""
        self.data["rows"].append(row)
        print(json.dumps(row), flush=True)
        self._write()

    def finish(self) -> None:
        """The part has done all it meant to."""
        self.data["complete"] = True
        self._write()

    def _write(self) -> None:
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)


@contextmanager
def rung(model: nn.Module, name: str | None) -> Iterator[Any]:
    """`model` under a rung of RUNGS for the block; yields its Stats. None: stock, without any."""
    if name is None:
        yield None
        return
    fusion, plan = RUNGS[name]
    with hf_fusion.patched(model, fusion, "cuda"):
        backends = vars(model)[KEY].state.backends
        backends.of(torch.device("cuda")).plan = plan
        yield hf_fusion.stats(model)


# ---- parity -------------------------------------------------------------------------------------


@torch.no_grad()
def loud(model: nn.Module, seed: int) -> nn.Module:
    """Weights under which every part of a layer shows: scores of a few units, biases off zero."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for module in model.modules():
        for key, value in module.named_parameters(recurse=False):
            if value.dim() > 1:
                wide = isinstance(module, nn.Embedding)
                spread = 1.0 if wide else 1.5 * value.shape[1] ** -0.5
                value.normal_(0, spread, generator=generator)
            else:
                value.normal_(float(key == "weight" and "Norm" in type(module).__name__), 0.3,
                              generator=generator)  # fmt: skip
    return model


@torch.no_grad()
def decoded(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, static: bool) -> torch.Tensor:
    """Logits (batch, STEPS, vocabulary) of the last STEPS of ids (batch, context + STEPS)."""
    total = ids.shape[1]
    cache = (
        StaticCache(config=model.config, max_cache_len=total)
        if static
        else DynamicCache(config=model.config)
    )
    positions, out = (mask.cumsum(1) - 1).clamp(min=0), []
    for past, end in [(0, total - STEPS)] + [(n, n + 1) for n in range(total - STEPS, total)]:
        logits = model(
            ids[:, past:end], attention_mask=mask[:, :end], position_ids=positions[:, past:end],
            use_cache=True, logits_to_keep=1, **{CACHE: cache},
        ).logits  # fmt: skip
        out.append(logits[:, -1:].float())
    return torch.cat(out[1:], 1)


def _inputs(context: int, batch: int, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(context)
    shape = (batch, context + STEPS)
    ids = torch.randint(0, 50000, shape, generator=generator, device="cuda")
    mask = torch.ones_like(ids)
    for row in range(batch if padded else 0):
        mask[row, : min(row * context // 4, context - 1)] = 0
    return ids, mask


def judged(
    rungs: Sequence[str], model, reference, context: int, batch: int, padded: bool, static: bool
) -> Iterator:
    """Per rung: its largest error and stock's against fp32, their ratio, and whether it passed."""
    ids, mask = _inputs(context, batch, padded)
    exact = decoded(reference, ids, mask, False)
    stock = float((decoded(model, ids, mask, static) - exact).abs().max())
    for name in rungs:
        with rung(model, name) as stats:
            got = decoded(model, ids, mask, static)
            fused = STEPS * (1 if name.startswith("full") else model.config.num_hidden_layers)
            whole = stats.fused >= fused
        error = float((got - exact).abs().max())
        ratio = error / stock if stock else float("inf")
        yield name, {
            "error": error, "stock_error": stock, "ratio": ratio, "fused": whole,
            "passed": whole and bool(got.isfinite().all()) and ratio <= LIMIT,
        }  # fmt: skip


def parity(record: Record, rungs: Sequence[str]) -> None:
    """Every shape, fp16 and bf16, contexts and padding, both kinds of cache."""
    for shape in SHAPES:
        for dtype in ("fp16", "bf16"):
            model = loud(models.random_pythia(shape, dtype, 0, "cuda"), 1).eval()
            reference = raised(model)
            for number, context in enumerate(CONTEXTS):
                batch = 1 + number % 4
                for padded in {False, batch > 1}:
                    static = (number + padded) % 2 == 1
                    case = context, batch, padded, static
                    for name, found in judged(rungs, model, reference, *case):
                        record.add(
                            shape=shape, dtype=dtype, context=context, batch=batch, padded=padded,
                            static=static, rung=name, **found,
                        )  # fmt: skip
            del model, reference
            torch.cuda.empty_cache()


# ---- speed --------------------------------------------------------------------------------------


def _seconds(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def per_token(run: Callable[[int], Any], few: int = 16, many: int = 64, rounds: int = 3) -> float:
    """Milliseconds a token of `run(new_tokens)`, what does not grow with the tokens taken out."""
    run(few)
    differences = [_seconds(lambda: run(many)) - _seconds(lambda: run(few)) for _ in range(rounds)]
    return 1e3 * statistics.median(differences) / (many - few)


@torch.no_grad()
def per_replay(model: nn.Module, context: int, replays: int = 64) -> float:
    """Milliseconds of one step of a StaticCache, recorded by torch.cuda.graph and replayed."""
    ids, _ = _inputs(context, 1, False)
    cache = StaticCache(config=model.config, max_cache_len=context + replays + 8)
    model(ids[:, :context], logits_to_keep=1, **{CACHE: cache})
    token = ids[:, :1].clone()
    for _ in range(3):
        model(token, **{CACHE: cache})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(token, **{CACHE: cache})
    graph.replay()

    def replay() -> None:
        for _ in range(replays // 4):
            graph.replay()

    return 1e3 * statistics.median(_seconds(replay) for _ in range(4)) / (replays // 4)


def _generations(model: nn.Module, context: int, **options: Any) -> Callable[[int], Any]:
    ids, mask = _inputs(context - STEPS, 1, False)
    options |= {"do_sample": False, "pad_token_id": 0}

    def run(count: int) -> Any:
        return model.generate(ids, attention_mask=mask, max_new_tokens=count, **options)

    return run


def _looped(model: nn.Module, ids: torch.Tensor, **options: Any) -> Callable[[int], Any]:
    return lambda count: hf_fusion.generate(model, ids, max_new_tokens=count, **options)


def speed(record: Record, rungs: Sequence[str]) -> None:
    """Decode of SPEED_MODEL in fp16 at batch 1: stock, the rungs, the loop on the device."""
    model = models.random_pythia(SPEED_MODEL, "fp16", 0, "cuda").eval()
    model.generation_config.eos_token_id = None
    reference, verdicts = raised(model), {}
    for context in SPEED_CONTEXTS:
        for name, found in judged(rungs, model, reference, context, 1, False, True):
            verdicts[name, context] = found
    del reference
    torch.cuda.empty_cache()
    weights = sum(p.nbytes for p in model.parameters()) - model.gpt_neox.embed_in.weight.nbytes

    def add(name: str, how: str, context: int, under: str | None, measure: Callable) -> None:
        keys = 2 * context * model.config.hidden_size * model.config.num_hidden_layers * 2
        try:
            with rung(model, under):
                found = {"ms_per_token": measure(), "bytes_per_token": weights + keys}
        except Exception as error:
            torch.cuda.synchronize()  # raises where the device is lost, else the others go on
            found = {"error": f"{type(error).__name__}: {error}", "passed": False}
        verdict = verdicts.get((under, context)) if under else None
        record.add(contender=name, how=how, context=context, parity=verdict, **found)

    def add_loop(how: str, **options: Any) -> None:
        for context in SPEED_CONTEXTS if "full, token" in rungs else ():
            run = _looped(model, _inputs(context - STEPS, 1, False)[0], **options)
            # long, so that recording its graph does not count
            measure = partial(per_token, run, many=256)
            add("hf_fusion.generate", how, context, "full, token", measure)

    for name in [name for name in ("full, token", "full, chain") if name in rungs]:
        for context in SPEED_CONTEXTS:
            add(name, "graph replay", context, name, partial(per_replay, model, context))
    add_loop("loop on the device")
    for context in SPEED_CONTEXTS:
        for name in (None, *rungs):
            measure = partial(per_token, _generations(model, context))
            add(name or "stock, eager", "generate()", context, name, measure)
    add_loop("the same, tokens drawn", do_sample=True, top_k=50, top_p=0.95)
    for context in SPEED_CONTEXTS[:1]:  # last: compiling takes longest
        run = _generations(model, context, cache_implementation="static")
        add("stock, compiled, static cache", "generate()", context, None, partial(per_token, run))


def stream(record: Record, rungs: Sequence[str]) -> None:
    """Bytes per second: a sum reads, a copy reads and writes (both counted)."""
    source = torch.ones(STREAM_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    for name, work, size in (
        ("read (sum)", source.sum, STREAM_BYTES),
        ("copy", lambda: target.copy_(source), 2 * STREAM_BYTES),
    ):
        work()
        best = min(_seconds(work) for _ in range(10))
        record.add(kind=name, bytes_per_second=size / best)


# ---- small steps --------------------------------------------------------------------------------


def small(record: Record, rungs: Sequence[str], head_dims: Sequence[int] = HEAD_DIMS) -> None:
    """Two layers of each head size, every rung, a few steps: what compute-sanitizer watches."""
    from transformers import GPTNeoXConfig

    for head_dim in head_dims:
        config = GPTNeoXConfig(
            vocab_size=515, hidden_size=2 * head_dim, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=8 * head_dim, max_position_embeddings=128, rotary_pct=0.25,
            use_parallel_residual=head_dim != 64,
        )  # fmt: skip
        model = models.random_model(config, "fp16", 0, device="cuda").eval()
        for name in rungs:
            with rung(model, name) as stats, torch.no_grad():
                cache = StaticCache(config=config, max_cache_len=40)
                ids = torch.arange(68, device="cuda").view(2, 34)
                model(ids[:, :30], **{CACHE: cache})
                finite = [
                    bool(model(ids[:, n : n + 1], **{CACHE: cache}).logits.isfinite().all())
                    for n in range(30, 34)
                ]
                record.add(head_dim=head_dim, rung=name, passed=all(finite) and stats.fused > 0)


PARTS: dict[str, Callable] = {
    "stream": stream, "parity": parity, "speed": speed, "small": small,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs one part; 0 where every row passed, 1 where one did not, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="hf_fusion.harness.gpu", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--head-dims", type=int, nargs="+", choices=HEAD_DIMS, default=HEAD_DIMS,
        help="of the part small",
    )  # fmt: skip
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    try:
        print(native.describe_device("cuda").name.decode(), flush=True)
    except hf_fusion.FusionError as error:
        print(f"no CUDA back end: {error}", file=sys.stderr)
        return 2
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    record = Record(arguments.out, arguments.part)
    options = {"head_dims": arguments.head_dims} if arguments.part == "small" else {}
    PARTS[arguments.part](record, arguments.rungs, **options)
    record.finish()
    return 0 if all(row.get("passed", True) for row in record.data["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
