"""All hops of a step, numbered: what goes from which rank to which, under which tags. Made once a batch size.

It is what both executors run: ``native_messages``, and ``messages``, its reference.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from bitring.training.placement.conversion import Hop
from bitring.training.placement.wiring import Edge, Wiring

MESSAGES = 2047
"""Messages that one rank can send another in a step: so many tags has a channel."""


class StepHop(NamedTuple):
    """A hop of ``edge``'s value in a step. ``sequences``: of each move, its number among those of its two ranks."""

    edge: Edge
    hop: Hop
    sequences: tuple[int, ...]


class StepHops:
    """Those of a step of so many ``samples``, the same on all ranks. Raises ValueError where there are too many."""

    def __init__(self, wiring: Wiring, samples: int) -> None:
        self.samples = samples
        self.hops: list[StepHop] = []
        self._there: dict[tuple[int, int], list[int]] = {}
        self._back: dict[tuple[int, int], list[int]] = {}
        self._count: Counter[tuple[int, int]] = Counter()
        for edge in wiring.edges.values():
            for microbatch in range(wiring.microbatches[edge.stage]):
                hops = wiring.hops(edge, microbatch, samples)
                self._there[edge.number, microbatch] = [self._add(edge, hop) for hop in hops]
                if edge.gradient:
                    self._back[edge.number, microbatch] = [self._add(edge, hop.adjoint) for hop in hops]
        most = max(self._count.values(), default=0)
        if most > MESSAGES:
            raise ValueError(
                f"ModelParallel: a step would send {most} messages from one rank to another, which may be {MESSAGES}; "
                "take fewer micro-batches"
            )

    def _add(self, edge: Edge, hop: Hop) -> int:
        sequences: list[int] = []
        for source, to, _ in hop.moves:
            sequences.append(self._count[source, to])
            self._count[source, to] += source != to
        self.hops.append(StepHop(edge, hop, tuple(sequences)))
        return len(self.hops) - 1

    def there(self, edge: Edge, microbatch: int) -> list[int]:
        """The numbers of the hops of an edge's value in a micro-batch."""
        return self._there[edge.number, microbatch]

    def back(self, edge: Edge, microbatch: int) -> list[int]:
        """The numbers of their adjoints, in the same order."""
        return self._back[edge.number, microbatch]
