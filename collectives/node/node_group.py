"""Sharing among the ranks of one communicator on one node through the native engine, made once, by all of them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection
from typing import Any

from mpi4py import MPI

from bitring.collectives.interop.library_steps import allgather_steps
from bitring.collectives.interop.steps import Progress, StepsTo
from bitring.collectives.node.node_memory import share
from bitring.collectives.node.presence import own_descriptor, presence_of
from bitring.native import address_of, extension

LEFT_SECONDS = 5.0
"""Seconds after which everything that a process did before it left has arrived."""


class Part:
    """The first ``nbytes`` of a rank's part of a region, for ``numpy.asarray``; the array keeps the region."""

    def __init__(self, region: Any, rank: int, nbytes: int) -> None:
        self._region = region
        self.__array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (region.address(rank), False),
        }


class NodeGroup:
    """``node``: the native Node; ``ranks``: the communicator's ranks on it; ``presences``: one for each of them, None
    for this rank, and for ranks that this process may not watch.
    """

    def __init__(self, node: Any, ranks: list[int], presences: list[Any]) -> None:
        self.node = node
        self.ranks = ranks
        self._presences = presences
        self.fast_path: Any = None  # the one that reduces in this group's memory
        self._regions: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._count = 0

    def gone(self, awaited: Collection[int], seconds: float) -> list[int]:
        """The ranks that are gone, of a wait of ``seconds`` for the ranks ``awaited`` (none: not known).

        One that died is missed at once. One that left the job in good order may have done its part before.
        """
        gone: list[int] = []
        for rank, presence in zip(self.ranks, self._presences, strict=True):
            if presence is None:
                continue
            in_vain = rank in awaited or (not awaited and seconds > LEFT_SECONDS)
            if presence.dead or (in_vain and presence.left):
                gone.append(rank)
        return gone

    def new_region(self, comm: MPI.Intracomm, nbytes: int, progress: Progress) -> StepsTo[Any]:
        """Memory, ``nbytes`` of this rank, that all ranks of ``comm``, the node's, map; None where there is none."""
        self._count += 1
        region = yield from share(comm, nbytes, self._count, progress)
        if region is not None:
            self._regions[self._count] = region
            if self.fast_path is not None:
                self.fast_path.add(region)
                weakref.finalize(region, self.fast_path.remove, region.number)
        return region

    def new_part(self, comm: MPI.Intracomm, nbytes: int, progress: Progress) -> StepsTo[Part | None]:
        """This rank's part of a new region, for ``numpy.asarray``."""
        region = yield from self.new_region(comm, nbytes, progress)
        return None if region is None else Part(region, region.rank, region.nbytes)

    def unite(self, region: Any) -> None:
        """Make all ranks' parts of ``region`` the first rank's, at the same addresses, as each rank does for itself.

        It is not reduced in place from here on. Raises OSError where the system refuses.
        """
        self._regions.pop(region.number, None)
        if self.fast_path is not None:
            self.fast_path.remove(region.number)
        region.unite(0)

    def part_again(self, region: Any) -> None:
        """End ``unite``: each rank's part is its own again, and has the values."""
        region.part_again()
        self._regions[region.number] = region
        if self.fast_path is not None:
            self.fast_path.add(region)

    def dead(self, member: int) -> bool:
        """Whether the rank with this number in the node has died."""
        presence = self._presences[member]
        return presence is not None and presence.dead

    def region_of(self, flat: Any) -> Any:
        """The region that the 1-D NumPy array lies in; None for private memory."""
        address = address_of(flat)
        return next((region for region in self._regions.values() if region.holds(address, flat.nbytes)), None)


def make_node_group(comm: MPI.Intracomm, ranks: list[int], progress: Progress) -> StepsTo[NodeGroup | None]:
    """The group of the ranks of ``comm``, a node; None on all of them where memory cannot be shared.

    ``ranks``: their numbers in the communicator that the group is for.
    """
    region = yield from share(comm, extension.Node.nbytes(comm.Get_size()), 0, progress)
    if region is None:
        return None
    if comm.Get_size() > len(os.sched_getaffinity(0)):
        extension.set_crowded(True)
    everyone = yield from allgather_steps(comm, own_descriptor(), progress)
    presences = [None if r == comm.Get_rank() else presence_of(each) for r, each in enumerate(everyone)]
    return NodeGroup(extension.Node(region, ranks), ranks, presences)
