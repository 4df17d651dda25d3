"""A placed model's values and the layouts that they are taken in: what is converted, how, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from bitring.models.graph import INPUT, kept_values
from bitring.training.placement.assignment import Placed
from bitring.training.placement.conversion import Hop, conversion, in_words
from bitring.training.placement.layout import Layout, lay, part

LOSS = "loss"
"""The name of who takes the logits."""


class Edge(NamedTuple):
    """A value as some nodes take it. ``number``: of all edges; ``gradient``: whether a gradient comes back by it.

    ``stage``: the takers'. ``crosses``: the takers run in micro-batches, the layer that makes the value all at once.
    """

    number: int
    value: str
    stage: int
    takes: Layout
    takers: tuple[str, ...]
    gradient: bool
    crosses: bool


class Wiring:
    """``placed`` nodes of values with these ``shapes`` (a sample's); the same on all ranks.

    ``microbatches``: in how many parts each stage runs a batch.
    """

    def __init__(
        self, placed: Sequence[Placed], shapes: Mapping[str, tuple[int, ...]], microbatches: Sequence[int]
    ) -> None:
        self.placed = list(placed)
        self.shapes = shapes
        self.microbatches = tuple(microbatches)
        self.kept = kept_values([each.node for each in placed])
        last = placed[-1]
        self.gives = {each.node.name: each.gives for each in placed}
        self.stage_of = {each.node.name: each.stage for each in placed}
        taken: dict[tuple[str, int, Layout], list[str]] = {}
        for each in placed:
            for name in each.node.inputs:
                taken.setdefault((name, each.stage, each.takes), []).append(each.node.name)
        at_the_end = last.node.name, last.stage, lay("samples", last.gives.ranks)
        taken[at_the_end] = [LOSS]
        layers = {each.node.name: each.node.layer for each in placed}
        self.edges: dict[tuple[str, int, Layout], Edge] = {}
        for number, ((value, stage, takes), takers) in enumerate(taken.items()):
            wanted = any(name == LOSS or getattr(layers[name], "input_gradient", True) for name in takers)
            crosses = value != INPUT and self.microbatches[self.stage_of[value]] != self.microbatches[stage]
            self.edges[value, stage, takes] = Edge(
                number, value, stage, takes, tuple(takers), wanted and value != INPUT, crosses
            )
        self.loss = self.edges[at_the_end]
        self.edges_of: dict[str, list[Edge]] = {}
        for edge in self.edges.values():
            self.edges_of.setdefault(edge.value, []).append(edge)

    def edge(self, value: str, taker: Placed) -> Edge:
        """The one by which a node takes a value."""
        return self.edges[value, taker.stage, taker.takes]

    def width(self, value: str) -> int:
        """The size of the value's last axis."""
        return self.shapes[value][-1]

    def size(self, value: str) -> int:
        """The product of a sample's other axes."""
        size = 1
        for side in self.shapes[value][:-1]:
            size *= side
        return size

    def cut(self, stage: int, microbatch: int, samples: int) -> slice:
        """Which of the samples a micro-batch has."""
        return part(samples, self.microbatches[stage], microbatch)

    def hops(self, edge: Edge, microbatch: int, samples: int) -> tuple[Hop, ...]:
        """The conversion of an edge in a micro-batch; none for what the model is given, which all ranks have.

        Micro-batches of a value that was made all at once are its parts on the ranks, one after the other.
        """
        if edge.value == INPUT:
            return ()
        cut = self.cut(edge.stage, microbatch, samples)
        gives = self.gives[edge.value]
        if edge.crosses:
            gives = lay("whole", gives.ranks[microbatch : microbatch + 1])
        return conversion(gives, edge.takes, cut.stop - cut.start, self.width(edge.value))

    def nbytes_sent(self, edge: Edge, samples: int, rank: int, nbytes: Callable[[int], int]) -> tuple[int, int]:
        """Bytes that ``rank`` sends to others for an edge in a step: forward, and backward.

        ``nbytes``: those of a message of so many values.
        """
        hops = [
            hop for microbatch in range(self.microbatches[edge.stage]) for hop in self.hops(edge, microbatch, samples)
        ]
        inner = self.size(edge.value)

        def sent(hops: Sequence[Hop]) -> int:
            return sum(nbytes(inner * move.region.size) for hop in hops for move in hop.sent(rank))

        return sent(hops), sent([hop.adjoint for hop in hops]) if edge.gradient else 0

    def in_words(self, edge: Edge) -> str:
        """An edge's conversion, by its name among collectives."""
        if edge.crosses:
            return f"{self.microbatches[edge.stage]} broadcasts in turn"
        return in_words(self.gives[edge.value], edge.takes)
