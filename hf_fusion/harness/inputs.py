"""What the harness accepts: dtypes, rungs, numbers, files; each refusal is one line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from hf_fusion.backends import BACKENDS, FUSIONS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LONG_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

STOCK = "stock"
COMPILED = "compiled"
LADDER = ("none", "attention", "attention+up", "full")
"""Rungs that must rise in speed, in order."""
RUNGS = (STOCK, *FUSIONS)
"""Every rung that needs no compiler at run time."""
LABELS = {
    STOCK: "Full PyTorch",
    COMPILED: "Full PyTorch, compiled, static cache",
    "none": "none (wrapper only)",
    "decomposed": "decomposed attention",
}

MOST_THREADS = 4096
MOST_SEED = 2**63 - 1


class InputError(ValueError):
    """A value the caller gave that the harness does not accept; one sentence names it and what is
    accepted.
    """


def label(rung: str) -> str:
    """The name of a rung as tables print it."""
    return LABELS.get(rung, rung)


def unaccepted(what: str, value: object, accepted: Iterable[str]) -> InputError:
    """The error for `value` given as `what`, with the accepted values and the nearest of them."""
    names = list(accepted)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return InputError(f"unknown {what} {str(value)!r}: accepted are {', '.join(names)}{hint}")


def dtype_name(value: str) -> str:
    """ "fp32", "bf16" or "fp16" for that name or torch's long one."""
    name = _LONG_NAMES.get(value.removeprefix("torch."), value)
    if name not in DTYPES:
        raise unaccepted("dtype", value, DTYPES)
    return name


def backend_name(value: str) -> str:
    """`value` if it names a back end."""
    if value not in BACKENDS:
        raise unaccepted("back end", value, BACKENDS)
    return value


def rung_names(
    values: Sequence[str], known: Sequence[str] = (*RUNGS, COMPILED)
) -> tuple[str, ...]:
    """The rungs in ladder order, stock first (it is always measured), without repeats; those that
    are not `known` are refused.
    """
    for value in values:
        if value not in known:
            raise unaccepted("rung", value, known)
    wanted = set(values) | {STOCK}
    order = (STOCK, COMPILED) + RUNGS[1:]
    return tuple(rung for rung in order if rung in wanted)


def at_least(what: str, value: int, lowest: int) -> int:
    """`value`, or an error when it is below `lowest`."""
    if value < lowest:
        raise InputError(f"{what} is {value}: expected an integer of at least {lowest}")
    return value


def between(what: str, value: int, lowest: int, highest: int) -> int:
    """`value`, or an error when it is outside `lowest` to `highest`."""
    if at_least(what, value, lowest) > highest:
        raise InputError(f"{what} is {value}: expected an integer of at most {highest}")
    return value


def thread_count(value: int | None) -> int:
    """`value`, None for torch's own width; an error for what is no number of threads."""
    return torch.get_num_threads() if value is None else between("threads", value, 1, MOST_THREADS)


def integers(text: str, what: str, lowest: int = 1) -> tuple[int, ...]:
    """Comma-separated integers, each at least `lowest`."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{what} is {text!r}: expected integers separated by commas, such as 32,256,1024"
        ) from None
    for value in values:
        at_least(what, value, lowest)
    return values


def words(text: str) -> tuple[str, ...]:
    """Comma-separated words, blanks dropped."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def some_words(text: str) -> tuple[str, ...]:
    """The same, at least one."""
    if not (found := words(text)):
        raise InputError(f"the value is {text!r}: expected words separated by commas")
    return found


def read_text(path: str | Path) -> str:
    """The text of a local UTF-8 file; anything else than a regular readable file is an
    InputError.
    """
    resolved = Path(path).expanduser().resolve()
    if resolved.is_dir():
        raise InputError(f"text file {str(path)!r} is a folder: expected a UTF-8 text file")
    if not resolved.is_file():
        raise InputError(f"text file {str(path)!r} is not there: expected a UTF-8 text file")
    try:
        text = resolved.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"text file {str(path)!r} is not UTF-8 (byte {error.start}): expected a UTF-8 text file"
        ) from None
    except OSError as error:
        raise InputError(f"text file {str(path)!r} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise InputError(f"text file {str(path)!r} is empty: expected some text")
    return text


def output_path(path: str | Path, suffixes: Sequence[str] = ()) -> Path:
    """A path that can be written, whose folder is made; any other, or another suffix, is an
    InputError.
    """
    if not str(path):
        raise InputError("output file '': expected a file name")
    try:
        target = Path(path).expanduser()
        if suffixes and target.suffix.lower() not in suffixes:
            raise InputError(
                f"output file {str(path)!r}: accepted endings are {', '.join(suffixes)}"
            )
        if target.is_dir():
            raise InputError(f"output file {str(path)!r} is a folder: expected a file name")
        target.parent.mkdir(parents=True, exist_ok=True)
        _try_to_write(target)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home of that name
        raise unwritable(path, error) from None
    return target


def unwritable(path: str | Path, error: Exception) -> InputError:
    """The error for an output file that `error` keeps from being written."""
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, FileExistsError):
        reason = "its folder is a file"
    return InputError(f"output file {str(path)!r} cannot be written: {reason}")


def _try_to_write(target: Path) -> None:
    """OSError where `target` cannot be opened; leaves what is there, and nothing where nothing is.

    Pipes and devices are not opened: a reader would see them end.
    """
    if target.exists() and not target.is_file():
        if not os.access(target, os.W_OK):
            raise PermissionError(None, "Permission denied")
        return
    new = None if target.exists() else os.path.realpath(target)
    target.open("ab").close()
    if new is not None:
        os.unlink(new)
