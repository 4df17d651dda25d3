"""``Communicator``: mpi4py's Intracomm whose AllReduce and related calls run bitring's algorithms."""

from __future__ import annotations

from typing import Any

from mpi4py import MPI
from typing_extensions import Self

from bitring.collectives.agreement import wait_for
from bitring.collectives.calls import (
    Call,
    allgather_call,
    allreduce_call,
    bcast_call,
    reduce_call,
    reduce_scatter_block_call,
)
from bitring.collectives.executor import Progress, Steps
from bitring.collectives.requests import GeneralRequest, PersistentRequest
from bitring.collectives.selection import check_name
from bitring.collectives.state import state_of


class Communicator(MPI.Intracomm):
    """A drop-in for ``MPI.Intracomm``: the same communicator, with bitring's collectives.

    ``Communicator(comm)`` wraps ``comm`` without duplicating it; ``Dup``, ``Split`` and ``Create`` return
    Communicators with the same ``algorithm``. Allreduce, Iallreduce, Allreduce_init, Reduce, Reduce_scatter_block,
    Allgather and Bcast are bitring's; all else is mpi4py's own. What bitring does not serve (operations made by
    ``MPI.Op.Create``, derived datatypes) goes to the MPI library, on all ranks alike.

    All ranks must make these calls alike: where they differ in dtype, count, operation, root or algorithm, or where
    one rank's arguments are bad, every rank raises (MismatchError, PeerError) and none hangs.
    """

    _algorithm = "auto"

    def __new__(cls, comm: MPI.Comm | None = None, algorithm: str = "auto") -> Self:
        """Raise ValueError for an unknown algorithm, TypeError for anything but an intracommunicator."""
        if comm is not None and not isinstance(comm, MPI.Intracomm):
            raise TypeError(f"Communicator: comm must be an MPI.Intracomm; got {type(comm).__name__}")
        check_name(algorithm)
        self = super().__new__(cls, comm)
        self._algorithm = algorithm
        return self

    def __init__(self, comm: MPI.Comm | None = None, algorithm: str = "auto") -> None:
        pass

    @property
    def algorithm(self) -> str:
        """The algorithm asked for: a registered name, or ``"auto"``."""
        return self._algorithm

    def _derived(self, comm: MPI.Comm) -> Any:
        return type(self)(comm, self._algorithm) if isinstance(comm, MPI.Intracomm) else comm

    def Dup(self, info: MPI.Info | None = None) -> Self:
        """As mpi4py's; returns a Communicator."""
        derived: Self = self._derived(super().Dup(info))
        return derived

    def Clone(self) -> Self:
        """As mpi4py's; returns a Communicator."""
        derived: Self = self._derived(super().Clone())
        return derived

    def Split(self, color: int = 0, key: int = 0) -> Self:
        """As mpi4py's; returns a Communicator."""
        derived: Self = self._derived(super().Split(color, key))
        return derived

    def Split_type(self, split_type: int, key: int = 0, info: MPI.Info = MPI.INFO_NULL) -> Self:
        """As mpi4py's; returns a Communicator."""
        derived: Self = self._derived(super().Split_type(split_type, key, info))
        return derived

    def Create(self, group: MPI.Group) -> Self:
        """As mpi4py's; returns a Communicator."""
        derived: Self = self._derived(super().Create(group))
        return derived

    def Create_group(self, group: MPI.Group, tag: int = 0) -> Self:
        """As mpi4py's; returns a Communicator."""
        derived: Self = self._derived(super().Create_group(group, tag))
        return derived

    def _run(self, call: Call) -> bool:
        """Run the call in this thread. Whether the library's own call is still to be made, outside the engine."""
        state = state_of(self)
        state.lane.submit(lambda progress: call.steps(state, progress), call.request.function).wait()
        return call.choice == "mpi"

    def Allreduce(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM) -> None:
        """Reduce over all ranks; every rank gets the same bits in ``recvbuf``."""
        if self._run(allreduce_call(state_of(self), "Allreduce", sendbuf, recvbuf, op, self._algorithm)):
            super().Allreduce(sendbuf, recvbuf, op)

    def Iallreduce(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM) -> MPI.Request:
        """Begin an Allreduce; the request works in any mixed Waitall. Errors are raised by its Wait or Test."""
        state = state_of(self)
        call = allreduce_call(state, "Iallreduce", sendbuf, recvbuf, op, self._algorithm)

        def steps(progress: Progress) -> Steps:
            yield from call.steps(state, progress)
            if call.choice == "mpi":
                yield from wait_for(state.comm.Iallreduce(sendbuf, recvbuf, op), progress)

        return GeneralRequest(state, steps, "Iallreduce")

    def Allreduce_init(
        self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM, info: MPI.Info = MPI.INFO_NULL
    ) -> MPI.Prequest:
        """A persistent Allreduce: ``Start`` begins it; Wait, Test and any mixed Waitall complete it.

        Start each request by itself: ``MPI.Prequest.Startall`` does not reach bitring.
        """
        state = state_of(self)
        call = allreduce_call(state, "Allreduce_init", sendbuf, recvbuf, op, self._algorithm)
        state.lane.submit(lambda progress: call.settle(state, progress), "Allreduce_init").wait()
        transport = None if call.choice == "mpi" else call.transport(state, state.new_channel(), persistent=True)

        def steps(progress: Progress) -> Steps:
            if transport is None:
                yield from wait_for(state.comm.Iallreduce(sendbuf, recvbuf, op), progress)
            else:
                yield from call.run(state, transport, progress)

        return PersistentRequest(state, steps, "Allreduce_init", transport)

    def Reduce(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM, root: int = 0) -> None:
        """Reduce over all ranks into ``recvbuf`` of rank ``root``."""
        if self._run(reduce_call(state_of(self), sendbuf, recvbuf, op, root, self._algorithm)):
            super().Reduce(sendbuf, recvbuf, op, root)

    def Reduce_scatter_block(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM) -> None:
        """Reduce over all ranks; rank r gets block r."""
        if self._run(reduce_scatter_block_call(state_of(self), sendbuf, recvbuf, op, self._algorithm)):
            super().Reduce_scatter_block(sendbuf, recvbuf, op)

    def Allgather(self, sendbuf: Any, recvbuf: Any) -> None:
        """Gather every rank's ``sendbuf`` in ``recvbuf`` of every rank, in rank order."""
        if self._run(allgather_call(state_of(self), sendbuf, recvbuf, self._algorithm)):
            super().Allgather(sendbuf, recvbuf)

    def Bcast(self, buf: Any, root: int = 0) -> None:
        """Copy rank ``root``'s ``buf`` to every rank's."""
        if self._run(bcast_call(state_of(self), buf, root, self._algorithm)):
            super().Bcast(buf, root)
