"""Which model classes are known, and how a family file describes one.

A family is one file in `patches/` that calls `register_family`. Classes are named as
"module:QualName" strings and compared with the type of a module; nothing is imported for that, and
a subclass is not its parent.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .report import FusionError, Reason
from .spec import Activation, BlockSpec, BlockTensors, NormKind, NormSpec

__all__ = [
    "EncoderCalls",
    "Family",
    "FusionError",
    "ModelParts",
    "Reason",
    "activation_of",
    "class_name",
    "expect_children",
    "expect_parameters",
    "expect_type",
    "families",
    "family_of",
    "is_original",
    "layer_norm_of",
    "register_family",
    "spec_of",
    "unseen",
]


class ModelParts(NamedTuple):
    """The parts of a base model: its layers as a whole, and what lies around them.

    A decoder has all of the first five. Of an encoder, `called` names the children that run as the
    modules they are.
    """

    embedding: Any  # torch.nn.Embedding, weight (vocab, hidden)
    layers: Any  # torch.nn.ModuleList of the family's layer class
    final_norm: Any  # norm module with weight and bias (hidden), or None
    final_norm_spec: NormSpec | None
    rotary: Any  # module (x, position_ids) -> (cos, sin)
    called: tuple[str, ...] = ()


class EncoderCalls(NamedTuple):
    """What the base model of an encoder does around its layers.

    `arguments`: names its forward passes to the embeddings. `embed(base, call)`: hidden states (B,
    S, hidden) from those of them that are in the dict `call`. `finish(base, hidden)`: the model
    output. `owned(base)`: whether nothing else holds what `embed` returns now, so that the layers'
    result may take its place, and asks for gradients in it.
    """

    arguments: tuple[str, ...]
    embed: Callable[[Any, dict], Any]
    finish: Callable[[Any, Any], Any]
    owned: Callable[[Any], bool] = lambda base: False


@dataclass(frozen=True)
class Family:
    """How one family of models is read.

    `layer_class`, `base_class`, `causal_lm_class`: exact classes as "module:QualName"; the last is
    empty for an encoder.
    `to_spec(layer)`: BlockSpec; raises FusionError where the structure is not the one the family
    file knows.
    `tensors(layer)`: BlockTensors of the layer's parameters.
    `parts(base)`: ModelParts; raises FusionError like `to_spec`.
    `watched(layer)`: (dict, key) pairs besides modules and parameters whose value the spec depends
    on.
    `tiny_config(**changes)`: a configuration small enough for tests.
    Decoders: `head(causal_lm)`, the torch.nn.Linear after the base model; `cache_index(layer)`,
    which layer of a cache it fills; `cache_argument`, the name under which a layer takes its cache.
    Encoders: `encoder`.
    """

    name: str
    layer_class: str
    base_class: str
    to_spec: Callable[[Any], BlockSpec]
    tensors: Callable[[Any], BlockTensors]
    parts: Callable[[Any], ModelParts]
    watched: Callable[[Any], Iterable[tuple[dict, str]]]
    tiny_config: Callable[..., Any]
    causal_lm_class: str = ""
    head: Callable[[Any], Any] | None = None
    cache_index: Callable[[Any], int] | None = None
    cache_argument: str = "past_key_values"
    encoder: EncoderCalls | None = None

    def __post_init__(self):
        optional = ("causal_lm_class",) if self.causal_lm_class or not self.encoder else ()
        for name in ("layer_class", "base_class", *optional):
            value = getattr(self, name)
            if type(value) is not str or value.count(":") != 1:
                raise ValueError(f"{name} is {value!r}, expected a string 'module:QualName'")


_families: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Makes a family known under its name; a family of the same name is replaced. Returns it."""
    if not isinstance(family, Family):
        raise TypeError(
            f"register_family got {type(family).__name__}, expected hf_fusion.registry.Family"
        )
    _families[family.name] = family
    return family


def families() -> tuple[Family, ...]:
    """The known families in order of registration."""
    return tuple(_families.values())


def class_name(thing: Any) -> str:
    """The exact class of an object as "module:QualName"."""
    return f"{type(thing).__module__}:{type(thing).__qualname__}"


def family_of(model: Any) -> Family | None:
    """The family whose base model `model` is or contains, by exact class, or None."""
    known = {family.base_class: family for family in _families.values()}
    for module in model.modules():
        if class_name(module) in known:
            return known[class_name(module)]
    return None


def expect_type(owner: str, module: Any, *names: str) -> None:
    """Raises FusionError unless the exact class of `module` is one of `names`."""
    if class_name(module) not in names:
        raise FusionError(
            Reason.MODULE_TYPE, f"{owner} is a {class_name(module)}, expected {' or '.join(names)}"
        )


@functools.cache
def _parameters(cls: type) -> frozenset[str]:
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)


def expect_parameters(owner: str, module: Any, names: Iterable[str]) -> None:
    """Raises FusionError where a class's forward takes a parameter that is not in `names`.

    A release that adds one may have added a meaning; the model then runs stock until the family
    file knows it.
    """
    unknown = _parameters(type(module)) - set(names)
    if unknown:
        raise FusionError(
            Reason.STRUCTURE,
            f"{owner}.forward takes {', '.join(sorted(unknown))}, which is unknown",
        )


def expect_children(owner: str, module: Any, names: tuple[str, ...]) -> None:
    """Raises FusionError unless `module` has exactly the children `names`."""
    have = set(module._modules)
    if have != set(names):
        odd = ", ".join(sorted(have ^ set(names)))
        raise FusionError(Reason.STRUCTURE, f"{owner} has unexpected or missing children: {odd}")


@functools.cache
def _lies_in(path: str, module_names: tuple[str, ...]) -> bool:
    """Whether a source file is one of the top-level packages that these modules belong to."""
    packages = [sys.modules.get(name.partition(".")[0]) for name in module_names]
    files = [getattr(package, "__file__", None) or os.devnull for package in packages]
    folders = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in files)
    return os.path.abspath(path).startswith(folders)


def is_original(function: Any, module_name: str) -> bool:
    """Whether a function's code lies in the package of `module_name`, torch or transformers."""
    code = getattr(function, "__code__", None)
    return code is not None and _lies_in(code.co_filename, (module_name, "torch", "transformers"))


def unseen(module: Any) -> bool:
    """Whether nothing but classes of torch and transformers, as they define them, sees what passes
    through a module: no hook, no other forward, in it and below.
    """
    return all(
        type(m).__module__.startswith(("torch.nn.modules.", "transformers.models."))
        and is_original(type(m).forward, type(m).__module__)
        and not (m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m))
        for m in module.modules()
    )


_ACTIVATIONS = "transformers.activations"
_ACTIVATION_OF = {
    f"{_ACTIVATIONS}:GELUActivation": Activation.GELU_ERF,
    f"{_ACTIVATIONS}:NewGELUActivation": Activation.GELU_TANH,
    f"{_ACTIVATIONS}:GELUTanh": Activation.GELU_TANH,
    f"{_ACTIVATIONS}:SiLUActivation": Activation.SILU,
    f"{_ACTIVATIONS}:LinearActivation": Activation.NONE,
    "torch.nn.modules.activation:ReLU": Activation.RELU,
    "torch.nn.modules.activation:SiLU": Activation.SILU,
}


def activation_of(act: Any) -> str:
    """The Activation that a module of transformers or torch computes, or FusionError."""
    name = class_name(act)
    if name not in _ACTIVATION_OF:
        raise FusionError(
            Reason.ACTIVATION, f"the MLP activation is a {name}, expected GELU, ReLU or SiLU"
        )
    inner = getattr(act, "act", None)
    inner = getattr(inner, "func", inner)  # GELUTanh holds a partial
    if inner is not None and getattr(inner, "__module__", None) not in (
        "torch._C._nn",
        _ACTIVATIONS,
    ):
        raise FusionError(Reason.ACTIVATION, f"{name} calls {inner!r}, expected torch's gelu")
    return _ACTIVATION_OF[name]


def layer_norm_of(owner: str, norm: Any, hidden: int) -> NormSpec:
    """The NormSpec of a torch.nn.LayerNorm over (hidden,), or FusionError."""
    if tuple(norm.normalized_shape) != (hidden,) or norm.weight is None or norm.bias is None:
        raise FusionError(
            Reason.STRUCTURE,
            f"{owner} normalises {tuple(norm.normalized_shape)}, expected ({hidden},) with "
            "weight and bias",
        )
    return NormSpec(NormKind.LAYER, float(norm.eps))


def spec_of(make: Callable[[], BlockSpec]) -> BlockSpec:
    """What `make` returns; a contradiction it runs into becomes a FusionError."""
    try:
        return make()
    except FusionError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise FusionError(Reason.STRUCTURE, f"the layer makes no block: {error}") from error
