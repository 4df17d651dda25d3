"""Predicted seconds of a step under a placement: what a rank computes, what travels, the update.

A model of four numbers: of a rank's matrix products, of messages and bytes between a replica's ranks, and between
replicas. It knows no cache and no overlap but a pipeline's; it is to tell placements apart, not to be exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bitring.training.placement.assignment import Placed, Shapes
from bitring.training.placement.parts import Part
from bitring.training.placement.predicted import Traffic
from bitring.training.placement.stages import computing
from bitring.training.placement.wiring import Wiring
from bitring.training.prediction.cluster import Machine


class Link(NamedTuple):
    """Seconds of a message, and of a byte of it."""

    message: float
    byte: float

    def sum(self, ranks: int, nbytes: float) -> float:
        """An AllReduce among so many ranks, of which each sends ``nbytes``."""
        return 2 * math.ceil(math.log2(ranks)) * self.message + nbytes * self.byte if ranks > 1 else 0.0


def predicted_seconds(
    wiring: Wiring,
    parts: Mapping[str, Part],
    parameters: Shapes,
    traffic: Traffic,
    samples: int,
    replicas: int,
    machine: Machine,
    inside: Link,
    between: Link,
) -> float:
    """Of a step in which a replica gets so many ``samples``; ``traffic``: what it sends then."""
    ranks = len(traffic.sums)
    moving = 0.0
    for edge, there, back in traffic.edges:
        hops = [
            hop
            for microbatch in range(wiring.microbatches[edge.stage])
            for hop in wiring.hops(edge, microbatch, samples)
        ]
        messages = sum(max(len(hop.sent(rank)) for rank in range(ranks)) for hop in hops)
        moving += (2 if edge.gradient else 1) * messages * inside.message
        moving += (max(there) + max(back)) * inside.byte
    work = _computing(wiring.placed, wiring.shapes, samples, machine, ranks)
    microbatches = max(wiring.microbatches)
    if len(wiring.microbatches) > 1 and all(each == microbatches for each in wiring.microbatches):
        # A pipeline: the slowest stage, as often as there are micro-batches, and the others once; values travel beside
        # the computing but for the first and the last micro-batch.
        seconds = (max(work) * (microbatches - 1) + sum(work)) / microbatches + moving / microbatches
    else:
        seconds = sum(work) + moving
    seconds += inside.sum(ranks, max(traffic.sums)) if max(traffic.sums) else 0.0
    seconds += between.sum(replicas, max(traffic.replicas))
    return seconds + max(_update(parts, parameters, rank, machine) for rank in range(ranks))


def _computing(placed: Sequence[Placed], shapes: Shapes, samples: int, machine: Machine, ranks: int) -> list[float]:
    """Seconds of each stage, forward and backward, on the rank that has most of it."""
    work = [0.0] * (1 + max(each.stage for each in placed))
    for each in placed:
        passes = 3 if getattr(each.node.layer, "input_gradient", True) else 2
        share = 1 if each.split == "rank" else len(each.takes.ranks)
        whole = 2 * passes * samples * computing(each.node, shapes) / machine.flops
        work[each.stage] += whole / share
    return work


def _update(parts: Mapping[str, Part], parameters: Shapes, rank: int, machine: Machine) -> float:
    """What a step of the rank's parameters costs beside computing and exchanging."""
    mine = [
        math.prod(parameters[name]) / (1 if each.axis is None else len(each.ranks))
        for name, each in parts.items()
        if rank in each.ranks
    ]
    return machine.step * sum(mine) + machine.step_array * len(mine)
