"""A choice's compressors, the same on all ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.plan import plan_exact
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.jointly import jointly
from bitring.collectives.runtime.objects import broadcast
from bitring.training.choice import Choice, Picked
from bitring.training.prediction.cluster import BUILT_IN, Cluster

_FEW, _MANY = 8, 1 << 18
_TIMES = 5


def picked_jointly(
    comm: MPI.Intracomm, choice: Choice, parameters: Mapping[str, Any], by_owners: bool
) -> dict[str, Picked]:
    """What rank 0 picks for each parameter. Collective. On nodes of unequal ranks, as if they had equally many."""
    nodes, ranks = max(1, context_of(comm).topology.nodes), comm.Get_size()
    latency, bandwidth = 0.0, math.inf
    if nodes > 1:
        latency, bandwidth = choice.given_network() or measured_network(comm, nodes)
    shapes = {name: tuple(w.shape) for name, w in parameters.items()}
    cluster = Cluster(nodes * -(-ranks // nodes), nodes, bandwidth, latency)
    picked = jointly(
        comm, "DataParallel", lambda: choice.pick(shapes, cluster, by_owners) if comm.Get_rank() == 0 else {}
    )
    everyone: dict[str, Picked] = broadcast(comm, picked, "DataParallel")
    return everyone


def measured_network(comm: MPI.Intracomm, nodes: int) -> tuple[float, float]:
    """Seconds per message and bytes per second out of a node, by AllReduces of a few and of many values. Collective.

    The bytes are those of the wire, of which payloads get a part.
    """
    seconds: list[float] = []
    for count in (_FEW, _MANY):
        plan = plan_exact(np.zeros(count, np.float32), comm, MPI.SUM, "auto", "DataParallel")
        times: list[float] = []
        for _ in range(_TIMES):
            began = time.perf_counter()
            plan()
            times.append(time.perf_counter() - began)
        plan.free()
        seconds.append(median(times))
    latency = seconds[0] / (2 * math.ceil(math.log2(nodes)))
    leaving = 2 * (nodes - 1) / nodes * 4 * _MANY / BUILT_IN.wire
    found: tuple[float, float] = broadcast(
        comm, (latency, leaving / max(seconds[1] - seconds[0], 1e-9)), "DataParallel"
    )
    return found
