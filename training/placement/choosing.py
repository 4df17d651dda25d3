"""What ``placement="auto"`` chooses from, and by what: predicted seconds of a step on the ranks that there are."""

from __future__ import annotations

import math
from typing import Any

from mpi4py import MPI

from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.objects import allgather
from bitring.models.model import Model
from bitring.training.placement.assignment import assign
from bitring.training.placement.messages import Way
from bitring.training.placement.parts import parts_of
from bitring.training.placement.placement import Placement
from bitring.training.placement.seconds import Link, predicted_seconds
from bitring.training.placement.split import Replica, predicted_of, refuse_mixing, wiring_of
from bitring.training.prediction.cluster import BUILT_IN
from bitring.training.step.picking import measured_network


def considered(ranks: int) -> list[Any]:
    """What ``placement="auto"`` chooses from; the first among equals."""
    pipelines = [Placement(stages=ranks, microbatches=each * ranks) for each in (1, 2, 4)] if ranks > 1 else []
    return ["data", "hybrid", *pipelines]


def links(comm: MPI.Intracomm, replica: Replica) -> tuple[Link, Link]:
    """Between a replica's ranks, and between replicas: memory inside a node, else the network, measured. Collective."""
    nodes = context_of(comm).nodes
    memory = Link(BUILT_IN.local_latency, 4 * len(replica.ranks) / BUILT_IN.copy_together)
    if len(nodes) == 1:
        return memory, memory
    latency, bandwidth = measured_network(comm, len(nodes))
    network = Link(latency, max(map(len, nodes)) / (bandwidth * BUILT_IN.wire))
    alone = all(any(set(ranks) <= set(node) for node in nodes) for ranks in allgather(comm, replica.ranks, "links"))
    return (memory if alone else network), network


def seconds_of(
    model: Model, way: Way, placement: Any, replicas: int, samples: int, inside: Link, between: Link
) -> float:
    """Predicted seconds of a step under ``placement``; infinite where the model cannot be placed so."""
    try:
        placed = assign(placement, model.nodes, way.shapes, len(way.ranks))
        wiring, parts = wiring_of(placement, placed, way.shapes), parts_of(placed)
        refuse_mixing(wiring, replicas)
    except ValueError:
        return math.inf
    traffic = predicted_of(model, way, placement, replicas, samples)
    whole = {name: w.shape for name, w in model.parameters.items()}
    return predicted_seconds(wiring, parts, whole, traffic, samples, replicas, BUILT_IN, inside, between)
