"""Whether a graph is the model: outputs compared at several shapes, on inputs that say something.

A difference counts as rounding up to sixteen units in the last place of the largest value. Beyond
that, the graph may err, against the model in higher precision, at most twice as much as the model
itself does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..report import FusionError, Reason
from .capture import Capture
from .conditions import unmet, value
from .inputs import like

ROUNDINGS, FACTOR = 16, 2.0
_REACH = 64  # how far from a size one that meets the conditions is looked for
_FLOOR = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def shapes(captured: Capture, count: int = 3) -> list[dict[str, int]]:
    """Sizes for every free extent: the captured ones, one row and more, three rows and fewer.

    Where the graph has conditions on them, the nearest sizes that meet these.
    """
    sizes = _free_extents(captured)
    own = {name: size for name, (size, _) in sizes.items()}
    found: list[dict[str, int]] = []
    for step in range(count):
        more = step // 3
        wanted = [(None, 1, 3)[step % 3], (0, 5, -2)[step % 3] + 2 * more]
        near = sorted(range(-_REACH, _REACH + 1), key=lambda n: abs(n - wanted[1]))
        tried = (
            _sizes(captured, sizes, rows, grown, more) for rows in (wanted[0], None)
            for grown in near
        )  # fmt: skip
        conditions = captured.signature.conditions
        fitting = (made for made in tried if unmet(conditions, made) is None)
        found.append(next(fitting, own) if step else own)
    return found


def _free_extents(captured: Capture) -> dict[str, tuple[int, bool]]:
    """Per free extent its captured size, and whether it counts rows, as a first dimension does.

    An extent of another tensor than the first is what the first one's of the same size is: a mask
    of (length, length) has no rows.
    """
    extents = captured.signature.sizes
    pairs = [zip(e, x.shape, strict=True) for e, x in zip(extents, captured.examples, strict=True)]
    found: dict[str, tuple[int, bool]] = {}
    first: dict[int, list[int]] = {}
    for which, pair in enumerate(pairs):
        for dim, (name, size) in enumerate(pair):
            if not isinstance(name, str):
                continue
            if which == 0:
                first.setdefault(size, []).append(dim)
            alike = first.get(size, [dim])
            found.setdefault(name, (size, dim == 0 if dim in alike else 0 in alike))
    return found


def _sizes(
    captured: Capture, extents: dict[str, tuple[int, bool]], rows: int | None, grown: int, more: int
) -> dict[str, int]:
    """Sizes with so many rows, the captured number for None, and so much longer otherwise."""
    made = {
        # extents of one size in one place move together: they are one dimension to the model
        name: max((size if rows is None else rows) + more if leading else size + grown, 1)
        for name, (size, leading) in extents.items()
    }
    for sign, *terms in captured.signature.conditions:
        if sign == "eq" and isinstance(terms[0], str) and not terms[0].isidentifier():
            made[terms[0]] = value(terms[1], made)
    return made


def inputs_at(captured: Capture, sizes: dict[str, int], seed: int) -> list[Tensor]:
    """Tensors of the captured kinds at other sizes."""
    generator = torch.Generator().manual_seed(seed)
    signature, made = captured.signature, {}
    kinds = iter(zip(captured.examples, signature.sizes, strict=True))
    for index, (name, leaf) in enumerate(zip(signature.names, signature.leaves, strict=True)):
        if leaf is not None:
            continue
        example, extents = next(kinds)
        shape = tuple(sizes.get(n, d) if isinstance(n, str) else n
                      for n, d in zip(extents, example.shape, strict=True))  # fmt: skip
        first = signature.same[index]
        made[index] = made[first] if first in made else like(name, example, shape, generator)
    return list(made.values())


def call_arguments(captured: Capture, tensors: list[Tensor]) -> dict[str, Any]:
    """The model's named arguments for flat tensors."""
    flat, values = iter(tensors), []
    for leaf in captured.signature.leaves:
        values.append(next(flat) if leaf is None else leaf[0])
    return pytree.tree_unflatten(values, captured.signature.structure)


def _tensors(output: Any) -> list[Tensor]:
    """The output's tensors, complex ones as pairs of numbers."""
    found = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in found]


def _copies(given: list[Tensor]) -> list[Tensor]:
    """Tensors of the same values, one where there is one."""
    made = {id(tensor): tensor.clone() for tensor in given}
    return [made[id(tensor)] for tensor in given]


def _seeded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call that draws the random numbers that another such call draws, and takes none away."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return function(*args, **kwargs)


@torch.no_grad()
def verify(
    model: nn.Module, captured: Capture, run: Callable[..., Any], count: int = 3, seed: int = 1
) -> tuple[list[str], list[float]]:
    """(shapes, largest difference at each); FusionError(INVALID) where one is too large.

    Also refused: fewer than one shape (ARGUMENT), and outputs that are constant or not finite, for
    which any graph would pass.
    """
    if type(count) is not int or count < 1:
        raise FusionError(Reason.ARGUMENT, f"verified at {count!r} shapes, expected 1 or more")
    if any(tensor.is_meta for tensor in (*captured.examples, *model.parameters())):
        raise FusionError(Reason.META, "tensors on the meta device have no values to compare")
    named, errors = [], []
    compared = _Compared(model, captured, run)
    for step, sizes in enumerate(shapes(captured, count)):
        given = captured.examples if step == 0 else inputs_at(captured, sizes, seed + step)
        named.append(_label(given))
        errors.append(compared(given, telling=True))
    return named, errors


@torch.no_grad()
def narrow(
    model: nn.Module, captured: Capture, run: Callable[..., Any], count: int = 3, seed: int = 1
) -> None:
    """Adds conditions where the graph is not the model at one row, or at a length of one.

    torch.export takes for granted that no extent is one, and says so nowhere. What `verify` does
    with `count` shapes is not done again.
    """
    extents, conditions = _free_extents(captured), captured.signature.conditions
    done, compared = shapes(captured, count), _Compared(model, captured, run)
    for leading in (True, False):
        names = [name for name, (_, rows) in extents.items() if rows is leading]
        ones = {name: 1 if name in names else size for name, (size, _) in extents.items()}
        if not names or unmet(conditions, ones) or any(
            all(sizes[name] == 1 for name in names) for sizes in done
        ):  # fmt: skip
            continue
        try:
            compared(inputs_at(captured, ones, seed + count))
        except Exception:  # of the model too, which may refuse such inputs
            conditions += [["gt", name, 1] for name in names]


def _label(given: list[Tensor]) -> str:
    return " ".join("x".join(map(str, tensor.shape)) for tensor in given)


class _Compared:
    """The largest difference of a graph from its model; FusionError(INVALID) where too large."""

    def __init__(self, model: nn.Module, captured: Capture, run: Callable[..., Any]):
        self.model, self.captured, self.run = model, captured, run
        self.exact: nn.Module | None = None

    def __call__(self, given: list[Tensor], telling: bool = False) -> float:
        """telling: outputs that any graph would have are refused as well."""
        label = _label(given)
        try:
            want = self._run(self.model, given)
        except Exception as error:  # whatever a model raises
            raise FusionError(
                Reason.OUT_OF_RANGE if isinstance(error, IndexError) else Reason.INVALID,
                f"at {label} the model itself fails: {type(error).__name__}: {error}; expected "
                "one that takes inputs like its example at other sizes",
            ) from error
        got = _tensors(_seeded(self.run, *_copies(given)))
        kinds = [[(tensor.shape, tensor.dtype) for tensor in found] for found in (want, got)]
        if kinds[0] != kinds[1]:
            raise FusionError(
                Reason.INVALID, f"at {label} the graph's outputs have other shapes or types"
            )
        if telling:
            _check_telling(want, label)
        worst = 0.0
        for index, (a, b) in enumerate(zip(want, got, strict=True)):
            if not a.is_floating_point():
                if not torch.equal(a, b):
                    raise FusionError(Reason.INVALID, f"at {label} output {index} differs")
                continue
            difference = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
            worst = max(worst, difference)
            largest = float(a.abs().max()) if a.numel() else 0.0
            limit = ROUNDINGS * torch.finfo(a.dtype).eps * largest
            if not difference <= limit:
                self._check_rounding(given, index, a, b, label)
        return worst

    def _run(self, model: nn.Module, given: list[Tensor], dtype: torch.dtype | None = None) -> Any:
        """The model's tensors for copies of the inputs, which it may write to, of another type."""
        arguments = call_arguments(self.captured, _copies(given))
        arguments = arguments if dtype is None else _raised(arguments, dtype)
        return _tensors(_seeded(model, **arguments))

    def _check_rounding(self, given: list[Tensor], index: int, a: Tensor, b: Tensor, label: str):
        dtype = _higher(self.model)
        try:
            if self.exact is None:
                self.exact = copy.deepcopy(self.model).to(dtype)
            best = self._run(self.exact, given, dtype)[index].double()
        except Exception as error:  # of a model that cannot be copied, or not run in that type
            off = float((a.double() - b.double()).abs().max())
            raise FusionError(
                Reason.INVALID,
                f"at {label} output {index} is {off:.2e} from the model's, which cannot be told to "
                f"be rounding: in {dtype} it raises {type(error).__name__}: {error}",
            ) from error
        stock, ours = (float((x.double() - best).abs().max()) for x in (a, b))
        if not ours <= FACTOR * stock + _FLOOR[a.dtype] * float(best.abs().max()):
            raise FusionError(
                Reason.INVALID,
                f"at {label} output {index} is {ours:.2e} off, the model itself {stock:.2e}",
            )


def _check_telling(outputs: list[Tensor], label: str) -> None:
    floating = [t for t in outputs if t.is_floating_point() and t.numel() > 1]
    if not floating:
        raise FusionError(Reason.INVALID, f"at {label} the model gives nothing to compare")
    for tensor in floating:
        if not bool(torch.isfinite(tensor).all()):
            raise FusionError(Reason.INVALID, f"at {label} an output of the model is not finite")
    if not any(float(tensor.double().std()) > 0 for tensor in floating):
        raise FusionError(
            Reason.INVALID, f"at {label} every output of the model is constant: nothing is shown"
        )


def _higher(model: nn.Module) -> torch.dtype:
    """A type above the model's lowest: one for all of it, as its inputs meet every parameter."""
    low = {torch.bfloat16, torch.float16} & {p.dtype for p in model.parameters()}
    return torch.float32 if low else torch.float64


def _raised(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def raised(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if floating else leaf

    return pytree.tree_map(raised, arguments)
