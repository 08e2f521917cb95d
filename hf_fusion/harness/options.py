"""The command line's options, shared by commands: names, checks and help texts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from hf_fusion.backends import BACKENDS

from . import (
    attention_study,
    contenders,
    inputs,
    models,
    peers,
    perplexity,
    plots,
    timing,
    work_options,
)

_RUNGS = f"of {', '.join(inputs.RUNGS)}"
_MOST = 2**31 - 1
_SEED = {"lowest": 0, "highest": inputs.MOST_SEED}
_SHAPES = ", ".join(models.PYTHIA_SHAPES)
_MODEL = (
    'a hub id, a local folder, "tiny" (the shipped checkpoint) or a Pythia shape with seeded '
    f"random weights: {_SHAPES}"
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors, so that every refusal is one line."""

    def error(self, message: str) -> Any:
        """Raises; argparse would print the usage and exit."""
        raise inputs.InputError(message)


def add_ablate(
    parser: argparse.ArgumentParser,
    model: str = "tiny",
    rungs: str = "all but compiled, for a sweep stock,full",
) -> None:
    """The options of an ablation or a sweep of two rungs; `rungs`: the default as help says it."""
    parser.description = (
        "Times each rung beside stock in interleaved rounds. A rung without a verdict gets no "
        "time; compiled is stock and needs none."
    )
    _add_model(parser, model, "bf16")
    note = f"{_RUNGS}, {inputs.COMPILED} (default {rungs})"
    parser.add_argument("--rungs", type=_words, default=None, metavar="A,B", help=note)
    _add_timing(parser)
    parser.set_defaults(prompt=None)
    note = "sequences at once; several make a batch sweep, such as 1,2,4,8,16 (default 1)"
    parser.add_argument("--batch", type=_integers, default=(1,), metavar="N,N", help=note)
    note = "a sweep over tokens already in the cache, such as 32,256,1024,1500,2048"
    parser.add_argument("--context", type=_integers, default=(), metavar="N,N", help=note)
    note = "also peak memory, each rung in a process of its own"
    parser.add_argument("--memory", action="store_true", help=note)
    _add_outputs(parser, picture=True)


def add_perplexity(parser: argparse.ArgumentParser) -> None:
    """The options of a perplexity run."""
    parser.description = "Scores stock and rungs on the same windows, compared in pairs."
    _add_model(parser, "tiny", "fp32")
    note = f"{_RUNGS}; stock is always scored (default full)"
    parser.add_argument("--rungs", type=_words, default=("full",), metavar="A,B", help=note)
    note = f"{', '.join(perplexity.PATHS)}: a window in one call, or token by token (default both)"
    paths = perplexity.PATHS
    parser.add_argument("--path", type=_words, default=paths, metavar="A,B", help=note)
    note = "a UTF-8 text file (default the shipped held-out text)"
    parser.add_argument("--text", metavar="FILE", help=note)
    note = "a name for datasets.load_dataset, in place of a file"
    parser.add_argument("--dataset", metavar="NAME", help=note)
    parser.add_argument("--dataset-config", metavar="NAME", help="such as wikitext-2-raw-v1")
    parser.add_argument("--split", default=None, help="of the dataset (default test)")
    parser.add_argument("--column", default=None, help="of the dataset (default text)")
    add_count(
        parser, "--window", None, "tokens per window (default 512, or the model's length)", 2
    )
    add_count(parser, "--stride", None, "tokens from window to window (default the window)")
    add_count(parser, "--windows", None, "at most this many windows (default all)")
    add_count(parser, "--batch", 1, "windows at once")
    add_threads(parser)
    _add_outputs(parser, picture=False)


def add_bench(parser: argparse.ArgumentParser) -> None:
    """The options of a bench over shapes and dtypes."""
    parser.description = (
        "Decoding: one row per model and dtype, with the share of the machine's read stream. "
        "Encoders and prompts: rungs and other engines per model, batch and length, with the "
        "share of the measured multiply-add peak."
    )
    parser.epilog = "`hf-fusion bench attention` times attention alone and has options of its own."
    note = "; ".join(f"{work}: {' '.join(cases)}" for work, cases in work_options.CASES.items())
    parser.add_argument("cases", nargs="*", metavar="MODEL:DTYPE", help=f"default for {note}")
    works = tuple(work_options.CASES)
    note = f"{', '.join(works)} (default decode for decoders, encode for encoders)"
    parser.add_argument("--work", choices=works, default=None, help=note)
    _add_backend_and_seed(parser)
    _add_timing(parser)
    parser.set_defaults(**dict.fromkeys(work_options.DECODE_ONLY))
    _add_work(parser)
    _add_outputs(parser, picture=True)


def _add_work(parser: argparse.ArgumentParser) -> None:
    note = "sequences at once; several make a sweep, such as 1,8 (default 1; decode takes one)"
    parser.add_argument("--batch", type=_integers, default=None, metavar="N,N", help=note)
    note = "images at once, for an image encoder: what --batch is for text"
    parser.add_argument("--images", type=_integers, default=None, metavar="N,N", help=note)
    note = "tokens of a sequence (default 128) or prompt (default 512); several make a sweep"
    parser.add_argument("--length", type=_integers, default=None, metavar="N,N", help=note)
    note = "random lengths, seeded, with padding at the right: text encoders"
    parser.add_argument("--ragged", action="store_true", help=note)
    rungs = contenders.WORK_RUNGS
    note = f"encode and prefill: of {', '.join(rungs)} (default all but none)"
    parser.add_argument("--rungs", type=_words, default=None, metavar="A,B", help=note)
    note = f"encode and prefill: other engines, of {', '.join(peers.PEERS)}"
    parser.add_argument("--peers", type=_words, default=None, metavar="A,B", help=note)
    note = f"torch.set_float32_matmul_precision: {', '.join(contenders.PRECISIONS)}"
    parser.add_argument("--matmul-precision", default=None, metavar="NAME", help=note)
    note = "encode and prefill: also peak memory, each contender in a process of its own"
    parser.add_argument("--memory", action="store_true", help=note)


def add_attention(parser: argparse.ArgumentParser) -> None:
    """The options of a study of the attention kernels."""
    known = attention_study.AttentionSettings()
    parser.description = (
        "Attention alone: naive, tiled and flash beside torch's own over lengths, then decode "
        "steps with all, a quarter and one of the key heads. --tune measures the block sizes."
    )
    for option, values, note in (
        ("--lengths", known.lengths, "tokens"),
        ("--head-dims", known.head_dims, "head sizes"),
    ):
        note += f" (default {','.join(map(str, values))})"
        parser.add_argument(option, type=_integers, default=values, metavar="N,N", help=note)
    note = f"{', '.join(inputs.DTYPES)} (default {','.join(known.dtypes)})"
    parser.add_argument(
        "--dtypes", type=_words, default=known.dtypes, metavar="A,B", help=note
    )
    note = f"of {', '.join(known.contenders)} (default all); sdpa is the yardstick"
    parser.add_argument(
        "--contenders", type=_words, default=known.contenders, metavar="A,B", help=note
    )
    add_count(parser, "--heads", known.heads, "query and key heads of the lengths")
    add_count(parser, "--batch", known.batch, "sequences")
    parser.add_argument("--causal", action="store_true", help="each query sees its past only")
    add_count(parser, "--context", known.context, "tokens of a decode step's cache, 0 for none", 0)
    add_count(parser, "--decode-heads", known.decode_heads, "query heads of a decode step")
    note = "MiB beside its operands that a contender may need, else it is left out"
    add_count(parser, "--most-memory", known.most_bytes >> 20, note)
    note = "also measure peak memory, each contender in a process of its own"
    parser.add_argument("--memory", action="store_true", help=note)
    note = "time block sizes of the tiled and flash kernels in place of the study"
    parser.add_argument("--tune", action="store_true", help=note)
    add_count(parser, "--rounds", known.rounds, "rounds after the one that warms up")
    add_threads(parser)
    add_count(parser, "--seed", known.seed, "of the operands", **_SEED)
    _add_outputs(parser, picture=True)


def add_info(parser: argparse.ArgumentParser) -> None:
    """The options of the report on this installation."""
    parser.description = "What this installation can do on this machine, or why it cannot."
    parser.add_argument("--json", action="store_true", help="print JSON")


def check_outputs(arguments: argparse.Namespace) -> None:
    """Refuses a place that cannot be written, before anything is measured."""
    if arguments.json == arguments.markdown == "-":
        raise inputs.InputError("--json and --markdown are both -: expected one of them")
    for path in (arguments.json, arguments.markdown):
        if path not in (None, "-"):
            inputs.output_path(path)
    if getattr(arguments, "plot", None) is not None:
        inputs.output_path(arguments.plot, plots.PICTURES)
        plots.library()


def _add_model(parser: argparse.ArgumentParser, model: str, dtype: str) -> None:
    parser.add_argument("--model", default=model, help=f"{_MODEL} (default {model})")
    note = f"{', '.join(inputs.DTYPES)} (default {dtype})"
    parser.add_argument("--dtype", type=told(inputs.dtype_name), default=dtype, help=note)
    _add_backend_and_seed(parser)


def _add_backend_and_seed(parser: argparse.ArgumentParser) -> None:
    note = f"back end of the rungs: {', '.join(BACKENDS)} (default auto)"
    parser.add_argument("--backend", default="auto", help=note)
    add_count(parser, "--seed", 0, "of random weights and prompts", **_SEED)


def _add_timing(parser: argparse.ArgumentParser) -> None:
    add_count(parser, "--prompt", 32, "prompt tokens")
    add_count(parser, "--new-tokens", 64, "tokens generated per round", 2)
    add_count(parser, "--rounds", 7, "rounds after the one that warms up")
    add_threads(parser)
    note = (
        "generate: time between streamed tokens (default); forward: calls of the model alone; own, "
        "custom: rungs in hf_fusion.generate or by hf_fusion.custom_generate, stock in generate()"
    )
    parser.add_argument("--loop", choices=timing.LOOPS, default=timing.LOOPS[0], help=note)
    drawn = ", ".join(f"{name} {value}" for name, value in timing.SAMPLING.items())
    note = f"draw tokens ({drawn}), which are then not compared"
    parser.add_argument("--sample", action="store_true", help=note)
    note = "also stock under torch.compile with a static cache"
    parser.add_argument("--compiled", action="store_true", help=note)


def _add_outputs(parser: argparse.ArgumentParser, picture: bool) -> None:
    note = "write the whole result as JSON; - prints it in place of the table"
    parser.add_argument("--json", metavar="FILE", help=note)
    parser.add_argument("--markdown", metavar="FILE", help="write the table; - prints it")
    if picture:
        parser.add_argument("--plot", metavar="FILE", help=", ".join(plots.PICTURES))


def add_threads(parser: argparse.ArgumentParser) -> None:
    """The option --threads."""
    note = "threads (default torch's own choice)"
    add_count(parser, "--threads", None, note, highest=inputs.MOST_THREADS)


def add_count(
    parser: argparse.ArgumentParser,
    option: str,
    default: int | None,
    note: str,
    lowest: int = 1,
    highest: int = _MOST,
) -> None:
    """One integer from `lowest` to `highest`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise inputs.InputError(f"the value is {text!r}: expected one integer") from None
        return inputs.between("the value", value, lowest, highest)

    if default is not None:
        note += f" (default {default})"
    parser.add_argument(option, type=told(parse), default=default, metavar="N", help=note)


def told(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` with its own message in the error; argparse would replace a ValueError's."""

    def told(text: str) -> Any:
        try:
            return parse(text)
        except inputs.InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return told


_integers = told(lambda text: inputs.integers(text, "the value"))
_words = told(inputs.some_words)
