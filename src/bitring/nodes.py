"""The nodes of a communicator's ranks, and what they may use there; as all of them find out together."""

from __future__ import annotations

import os
import platform
from typing import Any

from mpi4py import MPI

from bitring import launcher, machine
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.objects import allgather


def describe(comm: MPI.Intracomm) -> dict[str, Any]:
    """This machine and this run of ``comm``, as plain data. Collective."""
    return {
        "processor": machine.processor(),
        "cores_of_node": os.cpu_count(),
        "cores_of_rank": [len(cpus) for cpus in allgather(comm, os.sched_getaffinity(0), "describe")],
        "load_average": round(os.getloadavg()[0], 1),  # above 1 or so, others were at work, too
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "ranks": comm.Get_size(),
        "nodes": len(node_map(comm)),
        "thread_level": machine.THREAD_LEVELS[MPI.Query_thread()],
        "versions": machine.versions(),
    }


def node_map(comm: MPI.Intracomm) -> list[list[int]]:
    """The ranks of each node, by what MPI says of shared memory. Collective."""
    context = context_of(comm)
    context.prepare("node_map")
    return context.nodes


def thread_share(comm: MPI.Intracomm) -> int:
    """Number of threads that this rank may use, as ``launcher.thread_share`` counts them. Collective."""
    cores = allgather(comm, os.sched_getaffinity(0), "thread_share")
    node = next(ranks for ranks in node_map(comm) if comm.Get_rank() in ranks)
    return launcher.thread_share([cores[rank] for rank in node], node.index(comm.Get_rank()))
