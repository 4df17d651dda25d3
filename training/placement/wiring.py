"""A placed model's values and the layouts that they are taken in: what is converted, how, and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bitring.models.graph import INPUT, kept_values
from bitring.training.placement.assignment import Placed
from bitring.training.placement.conversion import Hop, conversion
from bitring.training.placement.layout import Layout, lay

LOSS = "loss"
"""The name of who takes the logits."""


class Edge(NamedTuple):
    """A value as some nodes take it. ``number``: of all edges; ``gradient``: whether a gradient comes back by it."""

    number: int
    value: str
    takes: Layout
    takers: tuple[str, ...]
    gradient: bool


class Wiring:
    """``placed`` nodes of values with these ``shapes`` (a sample's); the same on all ranks."""

    def __init__(self, placed: Sequence[Placed], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.placed = list(placed)
        self.shapes = shapes
        self.stages = max(each.stage for each in placed) + 1
        self.kept = kept_values([each.node for each in placed])
        last = placed[-1]
        self.gives = {each.node.name: each.gives for each in placed}
        taken: dict[tuple[str, Layout], list[str]] = {}
        for each in placed:
            for name in each.node.inputs:
                taken.setdefault((name, each.takes), []).append(each.node.name)
        taken[last.node.name, lay("samples", last.gives.ranks)] = [LOSS]
        layers = {each.node.name: each.node.layer for each in placed}
        self.edges: dict[tuple[str, Layout], Edge] = {}
        for number, ((value, takes), takers) in enumerate(taken.items()):
            wanted = any(name == LOSS or getattr(layers[name], "input_gradient", True) for name in takers)
            self.edges[value, takes] = Edge(number, value, takes, tuple(takers), wanted and value != INPUT)
        self.loss = self.edges[last.node.name, lay("samples", last.gives.ranks)]
        self.edges_of: dict[str, list[Edge]] = {}
        for edge in self.edges.values():
            self.edges_of.setdefault(edge.value, []).append(edge)
        self._hops: dict[tuple[int, int], tuple[Hop, ...]] = {}

    def width(self, value: str) -> int:
        """The size of the value's last axis."""
        return self.shapes[value][-1]

    def hops(self, edge: Edge, rows: int) -> tuple[Hop, ...]:
        """The conversion of an edge, for so many rows; none for what the model is given, which all ranks have."""
        if edge.value == INPUT:
            return ()
        key = edge.number, rows
        if key not in self._hops:
            self._hops[key] = conversion(self.gives[edge.value], edge.takes, rows, self.width(edge.value))
        return self._hops[key]

    def values_sent(self, edge: Edge, rows: int, rank: int) -> tuple[int, int]:
        """Values that ``rank`` sends to others for an edge in a pass of so many rows: forward, and backward."""
        each = 1
        for side in self.shapes[edge.value][:-1]:
            each *= side
        hops = self.hops(edge, rows)
        there = sum(hop.sent(rank) for hop in hops)
        back = sum(hop.adjoint.sent(rank) for hop in hops) if edge.gradient else 0
        return each * there, each * back
