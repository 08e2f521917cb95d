"""What the options of `bench` mean together: decoding, or encoders and prompts."""

from __future__ import annotations

import argparse

from .contenders import DEFAULT_RUNGS
from .encoders import DECODER, IMAGE, kind_of
from .inputs import InputError
from .sweep import BENCH_CASES, parse_case
from .work import WorkSettings

DECODE, ENCODE, PREFILL = "decode", "encode", "prefill"
CASES = {
    DECODE: BENCH_CASES,
    ENCODE: ("vit-b16:bf16", "bert-base:bf16"),
    PREFILL: ("pythia-160m:bf16",),
}
DECODE_ONLY = {
    "prompt": 32, "new_tokens": 64, "loop": "generate", "sample": False, "compiled": False,
}  # fmt: skip
"""Options that say something about decoding, with their defaults."""
_WORK_ONLY = ("images", "length", "ragged", "rungs", "peers", "memory")


def choose(arguments: argparse.Namespace) -> str:
    """DECODE, ENCODE or PREFILL; fills the cases. InputError where model and work do not fit."""
    if not arguments.cases:
        arguments.cases = CASES[arguments.work or DECODE]
    kinds = {case: kind_of(parse_case(case)[0]) for case in arguments.cases}
    decoders = [case for case, kind in kinds.items() if kind == DECODER]
    work = arguments.work or (DECODE if decoders else ENCODE)
    for case, kind in kinds.items():
        if (kind == DECODER) != (work != ENCODE):
            expected = "an encoder" if work == ENCODE else "a decoder"
            actual = "a decoder" if kind == DECODER else f"an encoder of {kind}"
            raise InputError(f"case {case!r} is {actual}: expected {expected} for {work}")
        if arguments.images and kind != IMAGE:
            raise InputError(
                f"case {case!r} takes no images, --images is {arguments.images[0]}: expected an "
                "image encoder such as vit-b16"
            )
    return work


def decode_options(arguments: argparse.Namespace) -> None:
    """Checks the options of decoding and fills their defaults."""
    for name in _WORK_ONLY:
        if getattr(arguments, name):
            raise InputError(
                f"{_option(name)} is given for decode: expected it with --work encode or prefill"
            )
    batches = arguments.batch or (1,)
    if len(batches) > 1:
        raise InputError(f"--batch is {_listed(batches)}: expected one number for decode")
    arguments.batch = batches[0]
    for name, default in DECODE_ONLY.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)


def work_settings(arguments: argparse.Namespace, work: str) -> WorkSettings:
    """The settings of encoders and prompts."""
    for name in DECODE_ONLY:
        if getattr(arguments, name) is not None:
            hint = "--peers compile" if name == "compiled" else "--length" * (name == "prompt")
            raise InputError(
                f"{_option(name)} is given for {work}: expected {hint or 'it for decode only'}"
            )
    if arguments.batch and arguments.images:
        raise InputError(
            f"--batch is {_listed(arguments.batch)} and --images is {_listed(arguments.images)}: "
            "expected one of them"
        )
    return WorkSettings(
        cases=tuple(parse_case(case) for case in arguments.cases),
        rungs=DEFAULT_RUNGS if arguments.rungs is None else tuple(arguments.rungs),
        peers=tuple(arguments.peers or ()),
        batches=arguments.batch or arguments.images or (1,),
        lengths=arguments.length,
        ragged=arguments.ragged,
        backend=arguments.backend,
        rounds=arguments.rounds,
        threads=arguments.threads,
        seed=arguments.seed,
        matmul_precision=arguments.matmul_precision or "highest",
        memory=arguments.memory,
    )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _listed(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))
