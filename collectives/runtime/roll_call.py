"""The roll call: what all ranks of a communicator find out by whether they mean the same, natively.

Among the ranks of one node it goes through their memory. Between nodes it is one message each way between any two of
the nodes' first ranks that are a power of two apart, whatever is to be done; small values travel in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mpi4py import MPI

from bitring.collectives.interop.mpi_library import library_functions
from bitring.collectives.node.node_group import NodeGroup
from bitring.collectives.runtime.tags import ROLL_CALL_TAG
from bitring.native import extension


class Way(NamedTuple):
    """How ranks find out: ``roll_call``. ``allreduce``, and ``others`` of the collectives, do so on their own way."""

    roll_call: Any
    allreduce: Any
    others: Any


def node_roll_call(shared: NodeGroup) -> Way:
    """The way of the ranks of a node."""
    return Way(
        extension.NodeRollCall(shared.node),
        extension.SharedAllreduce(shared.node, 0, [(0, 0, 1, 0)], None),
        extension.NodeCollective(shared.node),
    )


def nodes_roll_call(comm: MPI.Intracomm, shared: NodeGroup | None, nodes: Sequence[Sequence[int]]) -> Way:
    """The way of several nodes, whose ranks are ``nodes``.

    ``shared``: the ranks of this node; None where each is taken for a node of its own.
    """
    roll_call = extension.NodesRollCall(
        None if shared is None else shared.node,
        library=library_functions(),
        handle_size=MPI._sizeof(MPI.Comm),
        comm=MPI._handleof(comm),
        byte=MPI._handleof(MPI.BYTE),
        rank=comm.Get_rank(),
        nodes=nodes,
        tag=ROLL_CALL_TAG,
    )
    collective = extension.LeadersCollective(roll_call, 0, extension.Collective.allreduce, 0, 0, 0, 1, 0, 0, 0)
    return Way(roll_call, collective, collective)
