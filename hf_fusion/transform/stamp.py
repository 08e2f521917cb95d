"""Whether a model is still what was captured, in a few passes at the speed of C."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

from ..report import FusionError, Reason
from ..watch import GLOBAL, Watch, is_inert

# what transformers may add to a configuration that had none; absent is None
_SWITCHES = (
    "return_dict", "output_hidden_states", "output_attentions", "_output_attentions", "use_cache",
    "is_causal",
)  # fmt: skip
# what save_pretrained writes into a configuration, and no forward reads
_LABELS = {"architectures", "dtype", "transformers_version"}
_PLAIN = {bool, int, float, str, tuple, type(None), FunctionType, BuiltinFunctionType}
_version = attrgetter("_version")


def _hooks(module: nn.Module) -> tuple:
    namespace = vars(module)
    return (
        *namespace["_forward_pre_hooks"].values(),
        *(hook for hook in namespace["_forward_hooks"].values() if not is_inert(hook)),
    )


def _configurations(model: nn.Module) -> list[dict]:
    """What the modules' configurations hold, and those inside them, each once."""
    waiting = [vars(module).get("config") for module in model.modules()]
    found: dict[int, dict] = {}
    while waiting:
        config = waiting.pop()
        namespace = config if isinstance(config, dict) else getattr(config, "__dict__", None)
        if isinstance(namespace, dict) and id(namespace) not in found:
            found[id(namespace)] = namespace
            waiting += [v for v in namespace.values() if hasattr(v, "to_diff_dict")]
    return list(found.values())


def _plain(model: nn.Module) -> Iterator[tuple[dict, str, Any]]:
    """(namespace, name, value) of what modules and configurations hold beside modules and tensors:
    numbers, strings, functions.
    """
    for config in _configurations(model):
        yield from ((config, name, config.get(name)) for name in _SWITCHES)
        yield from (entry for entry in _public(config) if entry[1] not in _LABELS)
    for module in model.modules():
        yield from _public(vars(module))


def _public(namespace: dict) -> Iterator[tuple[dict, str, Any]]:
    for name, value in namespace.items():
        if type(value) in _PLAIN and isinstance(name, str) and not name.startswith("_"):
            yield namespace, name, value


def _equal(left: list, right: list) -> bool:
    try:
        return left == right
    except Exception:  # as tensors raise that have come in the place of numbers
        return False


class Stamp:
    """A model's modules with their plain attributes, its parameters and buffers, their versions,
    flags, hooks and configurations, as they are now. Writes through `.data` leave no version, nor
    do writes into lists and dictionaries.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        watch, self._hooked = Watch(), []
        self._containers: list[dict] = []
        for module in model.modules():
            namespace = vars(module)
            for container in (module._modules, module._parameters, module._buffers):
                self._containers += [container] if container else []
                for key in container:
                    watch.entry(container, key)
            watch.entry(namespace, "training")
            if "config" in namespace:
                watch.entry(namespace, "config")
            watch.modules.append(module)
            watch.types.append(type(module))
            if "forward" in namespace:
                watch.entry(namespace, "forward")
            else:
                watch.untouched.append(namespace)
            if namespace["_forward_hooks"] or namespace["_forward_pre_hooks"]:
                self._hooked.append((module, _hooks(module)))
            else:
                watch.unhooked.append(namespace)
        self._sizes = list(map(len, self._containers))
        tensors = [*model.parameters(), *model.buffers()]
        for tensor in tensors:
            watch.tensor(tensor)
        watch.dense = [tensor for tensor in watch.dense if tensor.is_contiguous()]
        self._watch = watch
        # aliases keep the memory, so that an address is not that of a tensor made later
        self._kept = [tensor.detach() for tensor in tensors]
        self._counted = [tensor for tensor in tensors if not tensor.is_inference()]
        self._versions = list(map(_version, self._counted))
        self._plain = list(_plain(model))
        self._dicts, self._names, self._values = map(list, zip(*self._plain))
        self._modules = [(m, m.training, _hooks(m)) for m in watch.modules]

    def check(self) -> None:
        """Raises FusionError where the model is another than it was."""
        if not self._same():
            self._explain()

    def _same(self) -> bool:
        return (
            list(map(_version, self._counted)) == self._versions
            and self._watch.intact()
            and list(map(len, self._containers)) == self._sizes
            and all(_hooks(module) == hooks for module, hooks in self._hooked)
            and self._alike()
        )

    def _alike(self) -> bool:
        return _equal(list(map(dict.get, self._dicts, self._names)), self._values)

    def _renewed(self) -> str | None:
        """The first plain value that is another."""
        for namespace, name, value in self._plain:
            if not _equal([namespace.get(name)], [value]):
                return name
        return None

    def _facts(self) -> tuple:
        watch = self._watch
        return (
            watch.keys, list(map(id, watch.values)), watch.types, *watch.facts, self._versions,
            list(map(id, watch.dense)), list(map(id, watch.untouched)),
        )  # fmt: skip

    def _explain(self) -> None:
        again = "since the model was fused: fuse it again"
        for module, training, hooks in self._modules:
            kind = type(module).__name__
            if module.training != training:
                raise FusionError(Reason.TRAINING, f"the mode of a {kind} has changed {again}")
            if _hooks(module) != hooks:
                raise FusionError(Reason.HOOKS, f"hooks of a {kind} have changed {again}")
        name = self._renewed()
        if name is not None:
            raise FusionError(Reason.CHANGED, f"its {name} has changed {again}")
        if any(GLOBAL):
            raise FusionError(Reason.HOOKS, "hooks or attention functions are set for all models")
        fresh = Stamp(self._model)
        if self._facts() != fresh._facts():
            raise FusionError(
                Reason.CHANGED, f"modules, parameters or buffers have changed {again}"
            )
        # what has come are hooks by which transformers collects outputs that are asked for
        vars(self).update(vars(fresh))
