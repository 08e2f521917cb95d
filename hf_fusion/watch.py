"""What a bound model depends on, and whether all of it is still the same."""

from __future__ import annotations

import functools
from itertools import repeat
from operator import attrgetter, contains, getitem, is_, itemgetter
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .registry import class_name, is_original
from .report import FusionError, Reason

_forward_hooks, _forward_pre_hooks = itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks")
_tensor_facts = (torch.Tensor.data_ptr, torch.Tensor.numel, attrgetter("dtype"))
_is_contiguous = torch.Tensor.is_contiguous
# what must stay empty for submodules to run as their classes say
GLOBAL = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
    ALL_ATTENTION_FUNCTIONS._local_mapping,
    ALL_MASK_ATTENTION_FUNCTIONS._local_mapping,
)
# modules that do the same in training mode
_INDIFFERENT = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.ModuleList)


# one mapping object per class, so that entries can be compared by it
_class_dict = functools.cache(vars)


def is_ours(method: Any) -> bool:
    """Whether a bound method is a forward that hf_fusion has installed."""
    return hasattr(getattr(method, "__func__", None), "hf_fusion_level")


def is_overheard(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its forward: hooks, another __call__."""
    namespace = vars(module)
    return (
        bool(namespace["_forward_hooks"] or namespace["_forward_pre_hooks"])
        or type(module).__call__ is not nn.Module.__call__
        or namespace.get("_compiled_call_impl") is not None
    )


def is_inert(hook: Any) -> bool:
    """Whether a hook is the one that transformers captures outputs by; it acts when asked to."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing" and getattr(
        hook, "__qualname__", ""
    ).endswith("output_capturing_hook")


def check_function(owner: str, function: Any, module_name: str) -> None:
    """Raises FusionError unless the code lies in the package of `module_name`."""
    if not is_original(function, module_name):
        raise FusionError(
            Reason.FORWARD_REPLACED, f"{owner} is {function!r}, not the one its module defines"
        )


class Watch:
    """Everything a binding depends on, compared by `intact` in a few C-speed passes.

    Entries are (dict, key) whose value must stay the same object; tensors must keep pointer,
    dtype, element count and contiguity; modules their class and no forward of their own; hook
    lists stay as they were found.
    """

    def __init__(self):
        self.dicts: list[Any] = []
        self.keys: list[str] = []
        self.values: list[Any] = []
        self.modules: list[nn.Module] = []
        self.types: list[type] = []
        self.untouched: list[dict] = []  # __dict__ of modules without a forward of their own
        self.unhooked: list[dict] = []  # __dict__ of modules without hooks
        self.hooked: list[tuple[dict, tuple]] = []  # __dict__ of modules, their inert hooks
        self.tensors: list[torch.Tensor] = []
        self.facts: list[list] = [[] for _ in _tensor_facts]
        self.dense: list[torch.Tensor] = []  # those of the tensors that must stay contiguous

    def entry(self, namespace: Any, key: str) -> None:
        """Watches namespace[key]."""
        self.dicts.append(namespace)
        self.keys.append(key)
        self.values.append(namespace[key])

    def tensor(self, tensor: torch.Tensor | None) -> None:
        """Watches where a tensor's elements lie."""
        if tensor is not None:
            self.tensors.append(tensor)
            for fact, values in zip(_tensor_facts, self.facts, strict=True):
                values.append(fact(tensor))
            self.dense.append(tensor)

    def module(self, name: str, module: nn.Module, inner: bool = True, hooks: bool = True) -> None:
        """Watches children, parameters, class, mode, hooks and forward of a module.

        `inner` is False for a module whose forward is ours. Raises FusionError where something
        already keeps the module from running as its class says.
        """
        namespace = vars(module)
        if module.training and type(module) not in _INDIFFERENT:
            raise FusionError(Reason.TRAINING, f"{name} is in training mode")
        for container in (module._modules, module._parameters):
            for key in container:
                self.entry(container, key)
        if type(module) not in _INDIFFERENT:
            self.entry(namespace, "training")
        self.modules.append(module)
        self.types.append(type(module))
        owner = next((cls for cls in type(module).__mro__ if "forward" in vars(cls)), nn.Module)
        if owner is not nn.Module:
            functions = _class_dict(owner)
            check_function(f"{class_name(module)}.forward", functions["forward"], owner.__module__)
            self.entry(functions, "forward")
        if inner and "forward" in namespace:
            raise FusionError(
                Reason.FORWARD_REPLACED, f"{name}.forward has been replaced on the instance"
            )
        if inner:
            self.untouched.append(namespace)
        if hooks:
            self.hooks(name, namespace)

    def hooks(self, name: str, namespace: dict) -> None:
        """Watches the hooks of a module by its __dict__; FusionError where some are not inert."""
        hooks = tuple(namespace["_forward_hooks"].values())
        if namespace["_forward_pre_hooks"] or not all(map(is_inert, hooks)):
            raise FusionError(Reason.HOOKS, f"{name} has forward hooks")
        if hooks:
            self.hooked.append((namespace, hooks))
        else:
            self.unhooked.append(namespace)

    def include(self, other: Watch) -> None:
        """Adds all that another watch watches."""
        for name, mine in vars(self).items():
            if name != "facts":
                mine.extend(getattr(other, name))
        for mine, theirs in zip(self.facts, other.facts, strict=True):
            mine.extend(theirs)

    def compact(self) -> None:
        """Drops entries watched twice."""
        seen = {(id(d), k): i for i, (d, k) in enumerate(zip(self.dicts, self.keys, strict=True))}
        order = sorted(seen.values())
        self.dicts = [self.dicts[i] for i in order]
        self.keys = [self.keys[i] for i in order]
        self.values = [self.values[i] for i in order]

    def intact(self) -> bool:
        """Whether everything is still as it was bound."""
        try:
            if not all(map(is_, map(getitem, self.dicts, self.keys), self.values)):
                return False
        except KeyError:
            return False
        if any(GLOBAL) or list(map(type, self.modules)) != self.types:
            return False
        if any(map(contains, self.untouched, repeat("forward"))):
            return False
        if any(map(_forward_hooks, self.unhooked)) or any(map(_forward_pre_hooks, self.unhooked)):
            return False
        for namespace, hooks in self.hooked:
            if (
                tuple(namespace["_forward_hooks"].values()) != hooks
                or namespace["_forward_pre_hooks"]
            ):
                return False
        for fact, values in zip(_tensor_facts, self.facts, strict=True):
            if list(map(fact, self.tensors)) != values:
                return False
        return all(map(_is_contiguous, self.dense))
