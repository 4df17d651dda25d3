"""The roll call: what all ranks of a communicator find out by whether they mean the same, natively.

Among the ranks of one node it goes through their memory. Between nodes it is one message each way between any two of
the nodes' first ranks that are a power of two apart, whatever is to be done; small values travel in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpi4py import MPI

from bitring.collectives.interop.mpi_library import library_functions
from bitring.collectives.node.node_group import NodeGroup
from bitring.collectives.runtime.tags import ROLL_CALL_TAG
from bitring.native import extension


def node_roll_call(shared: NodeGroup) -> tuple[Any, Any]:
    """The roll call of the ranks of a node, and an AllReduce that is one at the same time."""
    return extension.NodeRollCall(shared.node), extension.SharedAllreduce(shared.node, 0, [(0, 0, 1, 0)], None)


def nodes_roll_call(comm: MPI.Intracomm, shared: NodeGroup | None, leaders: Sequence[int]) -> tuple[Any, Any]:
    """The roll call of several nodes, and an AllReduce that is one at the same time.

    ``shared``: the ranks of this node; None where every rank is one of the ``leaders``, which exchange messages.
    """
    roll_call = extension.NodesRollCall(
        None if shared is None else shared.node,
        library=library_functions(),
        handle_size=MPI._sizeof(MPI.Comm),
        comm=MPI._handleof(comm),
        byte=MPI._handleof(MPI.BYTE),
        rank=comm.Get_rank(),
        leaders=leaders,
        tag=ROLL_CALL_TAG,
    )
    return roll_call, extension.LeadersAllreduce(roll_call, 0, 0, 0, 1, 0, 0, 0)
