"""Model outputs built without the checks that their constructors make on every call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields
from typing import Any

_set = OrderedDict.__setitem__


def builder(cls: type, first: str, second: str) -> Callable[[Any, Any], Any]:
    """A function (value of `first`, value of `second` or None) -> cls, all other fields None.

    It writes the fields and the items that the constructor of a transformers ModelOutput would
    write, 7 us faster a call; where a trial shows a difference between the two, it is the
    constructor.
    """
    blank = {field.name: None for field in fields(cls)}

    def construct(one: Any, two: Any) -> Any:
        return cls(**{first: one, second: two})

    def build(one: Any, two: Any) -> Any:
        out = cls.__new__(cls)
        namespace = out.__dict__
        namespace.update(blank)
        namespace[first] = one
        namespace[second] = two
        _set(out, first, one)
        if two is not None:
            _set(out, second, two)
        return out

    for trial in ((1.0, 2.0), (1.0, None)):
        try:
            slow, fast = construct(*trial), build(*trial)
        except Exception:  # a constructor of another kind: use it, and let it speak for itself
            return construct
        if (
            type(slow) is not type(fast)
            or vars(slow) != vars(fast)
            or list(slow.items()) != list(fast.items())
        ):
            return construct
    return build
