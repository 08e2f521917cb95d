"""A partitioned graph as a tree: model, modules, groups, operators; identical layers folded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from .nodes import SHAPE, VIEW, bytes_of, class_of, is_kernel, name_of
from .report import FusionReport

MODULE, GROUP, OPERATOR = "module", "group", "operator"


@dataclass(eq=False)
class Box:
    """A part of the picture. count: how many identical neighbours it stands for."""

    level: str
    label: str
    identity: str
    kind: str = ""
    note: str = ""
    estimated_bytes: int = 0
    count: int = 1
    children: list[Box] = field(default_factory=list)
    folded: list[Box] = field(default_factory=list)

    def walk(self) -> Iterator[Box]:
        """This box and those in it, without the folded ones."""
        yield self
        for child in self.children:
            yield from child.walk()

    def operators(self) -> list[Box]:
        """The operators in it."""
        return [box for box in self.walk() if box.level == OPERATOR]

    def shape(self) -> tuple:
        """What makes two boxes look the same: everything but names and numbers in them."""
        label = re.sub(r"\d+", "#", self.label)
        return (self.level, label, self.kind, self.note, tuple(c.shape() for c in self.children))


@dataclass
class Picture:
    """A tree and the edges between its operators, by identity."""

    root: Box
    edges: list[tuple[str, str]]


def _path(node: fx.Node) -> list[str]:
    """Names of the modules around the node, outermost first."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    whole = stack[-1][0].removeprefix("L['self'].").removeprefix("L['self']") if stack else ""
    return whole.split(".") if whole else []


def _common(paths: list[list[str]]) -> list[str]:
    shared = []
    for names in zip(*paths):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return shared


def picture(report: FusionReport, groups: bool = True, fold: bool = True) -> Picture:
    """The report's graph; `groups` False draws it as it was before grouping.

    fold: neighbours that look the same become one box with a count, and their edges its edges.
    """
    nodes = [node for node in report.source.graph.nodes if is_kernel(node)]
    root, modules = Box(MODULE, report.model, "model"), {}

    def module(path: list[str]) -> Box:
        box = root
        for depth in range(1, len(path) + 1):
            key = ".".join(path[:depth])
            if key not in modules:
                modules[key] = Box(MODULE, path[depth - 1], f"module_{key}")
                box.children.append(modules[key])
            box = modules[key]
        return box

    grouped = {node: group for group in report.subgraphs for node in group.nodes} if groups else {}
    why = {entry.name: entry.reason for entry in report.leftovers}
    made: dict[str, Box] = {}
    for node in nodes:
        kind, note = class_of(node), "" if node in grouped or not groups else why.get(node.name, "")
        box = Box(OPERATOR, name_of(node), node.name, kind, note, bytes_of(node))
        group = grouped.get(node)
        if group is None:
            module(_path(node)).children.append(box)
            continue
        if group.name not in made:
            inside = [member for member in group.nodes if is_kernel(member)]
            made[group.name] = Box(
                GROUP, group.fusion_pattern, group.name, group.kind, group.backend,
                group.estimated_internal_bytes,
            )  # fmt: skip
            module(_common([_path(member) for member in inside])).children.append(made[group.name])
        made[group.name].children.append(box)
    places = {node.name: node.name for node in nodes}
    if fold:
        _fold(root, places)
    edges = [(places[a.name], places[b.name]) for b in nodes for a in _sources(b)]
    return Picture(root, list(dict.fromkeys(edge for edge in edges if edge[0] != edge[1])))


def _sources(node: fx.Node) -> list[fx.Node]:
    """The operators whose results the node reads, past views and shapes."""
    found, waiting, seen = [], list(node.all_input_nodes), set()
    while waiting:
        here = waiting.pop(0)
        if here in seen:
            continue
        seen.add(here)
        if is_kernel(here):
            found.append(here)
        elif class_of(here) in (VIEW, SHAPE):
            waiting += here.all_input_nodes
    return found


def _fold(box: Box, places: dict[str, str]) -> None:
    for child in box.children:
        _fold(child, places)
    kept: list[Box] = []
    for child in box.children:
        last = kept[-1] if kept else None
        if last is not None and child.level == MODULE and last.shape() == child.shape():
            last.count += child.count
            last.folded.append(child)
            moved = {
                theirs.identity: ours.identity
                for theirs, ours in zip(child.operators(), last.operators(), strict=True)
            }
            for name, place in places.items():
                places[name] = moved.get(place, place)
        else:
            kept.append(child)
    box.children = kept


def labelled(box: Box) -> str:
    """The box's label, with the range that it stands for."""
    if box.count == 1:
        return box.label
    return f"{box.label} .. {box.folded[-1].label} ×{box.count}"
