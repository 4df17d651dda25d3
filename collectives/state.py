"""What bitring keeps for a communicator: a private duplicate, and the jobs and caches that use it.

It hangs on the communicator as an MPI attribute: made at the first collective call, shared by every library that uses
bitring on the communicator, freed with it. Nothing is keyed by address or handle.
"""

from __future__ import annotations

import functools
from typing import Any

from mpi4py import MPI

from bitring.collectives.abort import abort_on_exception
from bitring.collectives.engine import Lane, engine
from bitring.collectives.transport import CHANNELS


class State:
    """``lane`` runs the communicator's jobs; ``plans`` counts the plans created, the same on all ranks."""

    def __init__(self, comm: MPI.Intracomm, made: MPI.Request | None, rank: int, size: int) -> None:
        """``comm`` is private to bitring; ``made`` the request that makes it, if it is not there yet."""
        self.lane = Lane(comm, made, rank)
        self.rank = rank
        self.size = size
        self.plans = 0
        self.cache: dict[Any, Any] = {}

    @property
    def comm(self) -> MPI.Intracomm:
        """The private duplicate; nobody else's messages travel in it."""
        return self.lane.comm

    def new_channel(self) -> int:
        """The channel of the next plan; channel 0 is for calls without one."""
        self.plans += 1
        return 1 + (self.plans - 1) % (CHANNELS - 1)

    @functools.cached_property
    def node(self) -> State:
        """The state of the ranks of this node, those that share memory. Collective when first asked for."""
        comm = MPI.Intracomm(self.comm.Split_type(MPI.COMM_TYPE_SHARED))
        return State(comm, None, comm.Get_rank(), comm.Get_size())

    @functools.cached_property
    def leaders(self) -> MPI.Intracomm:
        """The first ranks of all nodes; COMM_NULL on the other ranks. Collective when first asked for."""
        return MPI.Intracomm(self.comm.Split(0 if self.node.rank == 0 else MPI.UNDEFINED))

    @functools.cached_property
    def nodes(self) -> int:
        """Number of nodes. Collective when first asked for."""
        return int(self.comm.allreduce(self.node.rank == 0))

    def close(self) -> None:
        """Free everything. Collective, as freeing a communicator is."""
        self.cache.clear()
        if "leaders" in self.__dict__ and self.leaders != MPI.COMM_NULL:
            self.leaders.Free()
        if "node" in self.__dict__:
            self.node.close()
        self.lane.drain_notes()
        self.lane.broken = "it was freed"
        self.lane.comm.Free()


@functools.cache
def _keyval() -> int:
    def delete(comm: MPI.Comm, keyval: int, state: State) -> None:
        state.close()

    return MPI.Comm.Create_keyval(delete_fn=delete)


def state_of(comm: MPI.Intracomm) -> State:
    """The communicator's state, made on first use; collective then."""
    state = comm.Get_attr(_keyval())
    if state is None:
        engine.check("the first collective of a communicator")
        abort_on_exception()
        # Nonblocking, since a nonblocking collective may be the first, and ranks may come to it in different orders.
        private, made = MPI.Intracomm(comm).Idup()
        if comm.Get_size() == 1:
            made.Wait()  # nobody to wait for; and plans of one rank run no job that would
        state = State(private, made, comm.Get_rank(), comm.Get_size())
        comm.Set_attr(_keyval(), state)
    assert isinstance(state, State)
    return state
