"""Several cases in one run: a failing one or an interrupt does not lose those that are finished."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hf_fusion import FusionError

from .inputs import InputError


@dataclass
class Ending:
    """What a run over cases did not measure: a reason for each case that failed, and whether it
    was interrupted.
    """

    lost: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def complete(self) -> bool:
        """Whether every case was measured."""
        return not self.lost and not self.interrupted

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return vars(self)

    def notes(self) -> list[str]:
        """Lines for under a table."""
        lines = [f"- {case} has no result: {reason}" for case, reason in self.lost.items()]
        return [*lines, "Interrupted: only what was finished."] if self.interrupted else lines


class Cases:
    """Results so far, and the ending; made by `one_by_one`."""

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.ending = Ending()
        self.error: Exception | None = None

    @contextmanager
    def one(self, case: str) -> Iterator[None]:
        """A block that measures `case`; what it raises is the reason why that has no result."""
        try:
            yield
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            told = isinstance(error, (InputError, FusionError))
            self.ending.lost[case] = text if told else f"{type(error).__name__}: {text}"
            traceback.clear_frames(error.__traceback__)  # models among what they hold
            self.error = self.error or error


@contextmanager
def one_by_one() -> Iterator[Cases]:
    """Ends at an interrupt with what is finished; where nothing is, raises what kept it."""
    found = Cases()
    try:
        yield found
    except KeyboardInterrupt:
        if not found.results:
            raise
        found.ending.interrupted = True
    if not found.results and found.error:
        raise found.error
