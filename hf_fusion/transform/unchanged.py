"""A model's modules as they were before it was traced."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Every module's attributes, and what its containers hold, are afterwards what they were.

    A forward that keeps a tensor for later, a table or frequencies, keeps a traced one otherwise.
    """
    before = []
    for module in model.modules():
        held = [(c, c.copy()) for c in vars(module).values() if type(c) in _CONTAINERS]
        before.append((module, dict(vars(module)), held))
    try:
        yield
    finally:
        for module, attributes, held in before:
            vars(module).clear()
            vars(module).update(attributes)
            for container, contents in held:
                container.clear()
                (container.extend if type(container) is list else container.update)(contents)
