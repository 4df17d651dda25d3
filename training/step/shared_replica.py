"""One replica of all the ranks of a node, in memory that they share: what ``Hogwild`` runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.interop.steps import Progress, StepsTo
from bitring.collectives.node.node_group import NodeGroup
from bitring.collectives.node.shared_shards import DTYPES, SharedShards, new_shards
from bitring.collectives.runtime.context import Context, context_of
from bitring.collectives.runtime.jointly import jointly
from bitring.collectives.runtime.objects import agreed_job, allgather
from bitring.collectives.runtime.watch import timeout
from bitring.compression.compressor import Compressor
from bitring.native import address_of, native
from bitring.training.mode import Running
from bitring.training.modes.hogwild import Hogwild
from bitring.training.sparse import Sparse
from bitring.training.step.checks import text_of
from bitring.training.step.replica import Replica
from bitring.training.store.members import Members

_WHERE = "DataParallel: mode hogwild"


class SharedReplica(Running):
    """The parameters of ``replica`` become the first rank's, at the same addresses; the optimizer's slots, too.

    Collective. Raises ValueError on all ranks where they cannot: what they need is said there.
    """

    def __init__(self, comm: MPI.Intracomm, replica: Replica, compressors: Mapping[str, Compressor | None]) -> None:
        self._comm = comm
        self._replica = replica
        self._rank, self._size = comm.Get_rank(), comm.Get_size()
        context = context_of(comm)
        context.prepare("DataParallel")
        group = context.common
        regions = jointly(comm, _WHERE, lambda: _checked(context, replica, compressors), (ValueError,))
        self._require_same_places(regions)
        self._group = group
        self._regions = list({region.number: region for region, _ in regions.values()}.values())
        jointly(comm, _WHERE, self._unite)
        self._shards = self._made(context, group)
        for slot, arrays in self._shards.slots.items():
            replica.optimizer_state[slot] = arrays
        self._members = Members(self._shards.words, self._rank, self._size, group, timeout(), _WHERE)

    def _require_same_places(self, regions: Mapping[str, tuple[Any, int]]) -> None:
        """Raise ValueError where a parameter is another part of the shared memory on another rank."""
        places = {name: where for name, (_, where) in regions.items()}
        for rank, theirs in enumerate(allgather(self._comm, places, _WHERE)):
            for name, where in theirs.items():
                if where != places.get(name):
                    raise ValueError(
                        f"{_WHERE}: the parameter {name!r} is another part of the shared memory on rank {rank} than on "
                        f"rank {self._rank}; all ranks must make their parameters by the same calls of comm.empty"
                    )

    def _unite(self) -> None:
        """All ranks' parts are the first rank's."""
        group = self._group
        if group is not None:
            for region in self._regions:
                group.unite(region)

    def _made(self, context: Context, group: NodeGroup | None) -> SharedShards:
        parameters = self._replica.parameters
        layout = {name: (w.shape, w.dtype) for name, w in parameters.items()}
        slots, words = self._replica.optimizer.slots, Members.count(self._size)
        limit = timeout()

        def steps(progress: Progress) -> StepsTo[SharedShards | None]:
            return new_shards(
                group, context.node.comm, layout, slots, words, parameters, limit, "DataParallel.step", progress
            )

        shards = agreed_job(context, steps, _WHERE)
        if shards is None:
            raise ValueError(f"{_WHERE}: there is no shared memory for the optimizer's state; the log says why")
        return shards

    def step(self, gradients: Mapping[str, Any], weight: float) -> None:
        """Update the model where it is, by this rank's gradients, dense or sparse."""
        if weight:
            values: dict[str, Any] = {}
            starts: dict[str, Any] = {}
            for name, g in gradients.items():
                if isinstance(g, Sparse):
                    starts[name], g = g.starts, g.values
                values[name] = np.require(g, requirements=("C", "ALIGNED"))
            mode, rule = self._replica.mode, self._replica.optimizer.native_update()
            assert isinstance(mode, Hogwild) and rule is not None
            self._shards.update(values, rule, starts, locked=mode.locks)
        self._members.tick()

    def miss(self, text: str) -> None:
        """See Running."""
        self._members.trouble(text, int(self._members.clocks[self._rank]))
        self._members.tick()

    def told(self) -> str | None:
        """See Running. Of several texts since the last call the first."""
        return self._members.told(math.inf)

    def claim(self, row: tuple[int, ...]) -> int:
        """See Running."""
        return self._members.claim(row)

    def leave(self) -> None:
        """See Running."""
        self._members.leave()

    def synchronize(self) -> None:
        """Ranks have met, so every update has been made."""

    def reload(self) -> None:
        """All ranks have filled the memory, with the same, before any goes on."""
        allgather(self._comm, None, _WHERE)

    def free(self) -> None:
        """Each rank has parameters of its own again, and the optimizer's state stays shared until it is dropped."""
        allgather(self._comm, None, _WHERE)
        group = self._group
        if group is not None:
            for region in self._regions:
                group.part_again(region)
        allgather(self._comm, None, _WHERE)

    @property
    def clocks(self) -> list[float]:
        """See Running."""
        return self._members.clocks


def _checked(
    context: Context, replica: Replica, compressors: Mapping[str, Compressor | None]
) -> dict[str, tuple[Any, int]]:
    """The region of each parameter and its place there; empty on a rank alone. Raises ValueError."""
    if native() is None:
        raise ValueError(f"{_WHERE} needs the native engine, which BITRING_NATIVE=0 leaves out, or is not installed")
    if context.topology.nodes > 1:
        raise ValueError(
            f"{_WHERE} is for the ranks of one node, which share memory; these are on {context.topology.nodes} nodes"
        )
    if context.size > 1 and context.common is None:
        raise ValueError(f"{_WHERE}: the ranks of this node share no memory; the log says why")
    optimizer = replica.optimizer
    if optimizer.native_update() is None:
        raise ValueError(f"{_WHERE} needs an optimizer with a native kernel, SGD or AdaGrad; got {text_of(optimizer)}")
    compressed = next((name for name, each in compressors.items() if each is not None), None)
    if compressed is not None:
        raise ValueError(f"{_WHERE}: nothing travels, so compression must be None, got {compressors[compressed]!r}")
    places: dict[str, tuple[Any, int]] = {}
    for name, w in replica.parameters.items():
        if not isinstance(w, np.ndarray):
            raise ValueError(f"{_WHERE}: the parameter {name!r} must be in host memory, got {type(w).__name__}")
        if w.dtype not in DTYPES or not w.flags.c_contiguous:
            raise ValueError(
                f"{_WHERE}: the parameter {name!r} must be float32 or float64 and C-contiguous, got {w.dtype.name} "
                f"with strides {w.strides}"
            )
        if context.common is not None and w.size:
            region = context.common.region_of(w.reshape(-1))
            if region is None:
                raise ValueError(
                    f"{_WHERE}: the parameter {name!r} must be in memory that the ranks share, got this rank's own; "
                    f"write on all ranks, before it is filled and the trainer is made: "
                    f"parameters[{name!r}] = bitring.Communicator(comm).empty({w.shape}, {w.dtype.name!r})"
                )
            places[name] = region, region.where(address_of(w))
    return places
