"""The command `hf-fusion`: info, ablate, perplexity, bench, attention, graph; thin over `harness`
and `transform`.

Exit codes: 0, every number has its verdict; 1, one has not; 2, a value is not accepted (one line
says which); 130, interrupted; 141, nobody reads stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import hf_fusion
from hf_fusion import FusionError, harness
from hf_fusion.harness import contenders, info, inputs, options, render, work_options
from hf_fusion.transform import command as graph


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; `argv` None means the process's own arguments. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:2] == ["bench", "attention"]:  # a bench of another kind, with options of its own
        argv[:2] = ["attention"]
    return dispatch(build_parser(), argv)


def dispatch(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Parses and runs what the parser's `run` default says, refusals as one line on stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            _quiet_libraries()
            arguments = parser.parse_args(argv)
            return arguments.run(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except (inputs.InputError, FusionError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # nobody reads on
        _drop_stdout()
        return 128 + signal.SIGPIPE
    except OSError as error:
        _drop_stdout()
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands; each sets `run`, which takes the parsed arguments."""
    parser = options.Parser(
        prog="hf-fusion",
        description="Fused kernels for Hugging Face models: what, how fast, how exact.",
    )
    version = f"%(prog)s {hf_fusion.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, add, run, note in (
        ("info", options.add_info, _info, "library, instruction sets, back ends, families"),
        ("ablate", options.add_ablate, _ablate, "time every rung of fusion against stock"),
        ("perplexity", options.add_perplexity, _perplexity, "perplexity of rungs against stock"),
        ("bench", options.add_bench, _bench, "decoding, encoders and prompts for many shapes"),
        ("graph", graph.add, graph.run, "fuse a model's graph, measure it, draw it"),
        ("attention", options.add_attention, _attention, "the same as bench attention"),
    ):
        prog = f"{parser.prog} {'bench ' * (name == 'attention')}{name}"
        command = commands.add_parser(name, help=note, prog=prog)
        add(command)
        command.set_defaults(run=run)
    return parser


def _info(arguments: argparse.Namespace) -> int:
    found = info.collect()
    print(json.dumps(found, indent=2) if arguments.json else info.text(found))
    return 0


def _ablate(arguments: argparse.Namespace) -> int:
    options.check_outputs(arguments)
    sweeping = arguments.context or len(arguments.batch) > 1
    if arguments.context and len(arguments.batch) > 1:
        raise inputs.InputError("--context and several --batch are given: expected one sweep")
    if arguments.context and arguments.prompt is not None:
        raise inputs.InputError("--context and --prompt are given: expected one of them")
    rungs = arguments.rungs or ((inputs.STOCK, "full") if sweeping else inputs.RUNGS)
    settings = ablation_settings(arguments, rungs)
    if arguments.context:
        return report(harness.run_context_sweep(settings, arguments.context), arguments)
    if sweeping:
        return report(harness.run_batch_sweep(settings, arguments.batch), arguments)
    return report(harness.run_ablation(settings), arguments)


def _perplexity(arguments: argparse.Namespace) -> int:
    options.check_outputs(arguments)
    settings = harness.PerplexitySettings(
        model=arguments.model,
        dtype=arguments.dtype,
        rungs=tuple(arguments.rungs),
        paths=tuple(arguments.path),
        backend=arguments.backend,
        text=arguments.text,
        dataset=arguments.dataset,
        dataset_config=arguments.dataset_config,
        split=arguments.split,
        column=arguments.column,
        window=arguments.window,
        stride=arguments.stride,
        max_windows=arguments.windows,
        batch=arguments.batch,
        threads=arguments.threads,
        seed=arguments.seed,
    )
    return report(harness.run_perplexity(settings), arguments)


def _bench(arguments: argparse.Namespace) -> int:
    options.check_outputs(arguments)
    if "attention" in arguments.cases:
        raise inputs.InputError(
            "'attention' is no model: expected hf-fusion bench attention, its options behind that"
        )
    work = work_options.choose(arguments)
    if work != work_options.DECODE:
        return report(harness.run_work(work_options.work_settings(arguments, work)), arguments)
    work_options.decode_options(arguments)
    settings = replace(_timing_settings(arguments, (inputs.STOCK, "full")), batch=arguments.batch)
    with contenders.matmul_precision(arguments.matmul_precision):
        return report(harness.run_bench(arguments.cases, settings), arguments)


def _attention(arguments: argparse.Namespace) -> int:
    options.check_outputs(arguments)
    if arguments.tune and arguments.plot:
        raise inputs.InputError("--tune has no picture: expected no --plot")
    settings = harness.AttentionSettings(
        lengths=arguments.lengths,
        head_dims=arguments.head_dims,
        dtypes=tuple(arguments.dtypes),
        contenders=tuple(arguments.contenders),
        heads=arguments.heads,
        batch=arguments.batch,
        causal=arguments.causal,
        context=arguments.context,
        decode_heads=arguments.decode_heads,
        most_bytes=arguments.most_memory << 20,
        memory=arguments.memory,
        rounds=arguments.rounds,
        threads=arguments.threads,
        seed=arguments.seed,
    )
    run = harness.run_tune if arguments.tune else harness.run_attention
    return report(run(settings), arguments)


def ablation_settings(arguments: argparse.Namespace, rungs: Sequence[str]) -> harness.Settings:
    """The settings that the options of `options.add_ablate` say, for `rungs`."""
    return replace(
        _timing_settings(arguments, rungs),
        model=arguments.model,
        dtype=arguments.dtype,
        batch=arguments.batch[0],
        memory=arguments.memory,
    )


def report(result: Any, arguments: argparse.Namespace) -> int:
    """Writes a result, then prints it; 1 when something in it has no verdict."""
    files = [None if path == "-" else path for path in (arguments.json, arguments.markdown)]
    try:
        harness.write(result, *files, getattr(arguments, "plot", None))
    finally:
        print(render.as_json(result) if arguments.json == "-" else result.markdown())
    if getattr(result, "ending", None) and result.ending.interrupted:
        raise KeyboardInterrupt
    return 0 if result.passed else 1


def _timing_settings(arguments: argparse.Namespace, rungs: Sequence[str]) -> harness.Settings:
    return harness.Settings(
        rungs=(*rungs, inputs.COMPILED) if arguments.compiled else tuple(rungs),
        backend=arguments.backend,
        rounds=arguments.rounds,
        prompt_tokens=32 if arguments.prompt is None else arguments.prompt,
        new_tokens=arguments.new_tokens,
        threads=arguments.threads,
        seed=arguments.seed,
        loop=arguments.loop,
        sample=arguments.sample,
    )


def _drop_stdout() -> None:
    """Where stdout takes nothing, what is left for it is not tried again at exit."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _quiet_libraries() -> None:
    """Keeps other libraries' loading bars and advice on generation flags out of the tables."""
    from transformers.utils import logging as library

    logging.getLogger("transformers").setLevel(logging.ERROR)
    library.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
