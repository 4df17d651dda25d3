"""Sums of gradients over the ranks of a replica that have the same part of a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from bitring.collectives.communicator import Communicator
from bitring.collectives.plan import ExactPlan, plan_exact
from bitring.training.placement.parts import Part


class Shared(NamedTuple):
    """Gradients of the parameters that the ranks of ``comm`` share, one after the other in ``flat``, and its plan."""

    comm: Communicator
    flat: Any
    views: dict[str, Any]
    plan: ExactPlan


class SharedSums:
    """An exact exchange for each set of ranks that share parameters. Collective on ``comm``, all ranks'.

    ``replica``, ``rank``: this rank's place; ``mine``: its parts, by parameter.
    """

    def __init__(
        self, comm: MPI.Intracomm, replica: int, rank: int, parts: Mapping[str, Part], mine: Mapping[str, Any]
    ) -> None:
        self._shared: list[Shared] = []
        self._told = 0
        for ranks in sorted({part.ranks for part in parts.values() if part.axis is None and len(part.ranks) > 1}):
            made = Communicator(comm).Split(replica if rank in ranks else MPI.UNDEFINED, rank)
            if rank in ranks:
                arrays = {name: mine[name] for name, part in parts.items() if part.axis is None and part.ranks == ranks}
                self._shared.append(_share(made, arrays))

    def add(self, gradients: dict[str, Any]) -> None:
        """Put the sums in the place of this rank's gradients, until the next call. Collective."""
        for _, flat, views, plan in self._shared:
            np.concatenate([gradients[name] for name in views], axis=None, out=flat)
            plan()
            gradients.update(views)

    def tell(self, parameters: Mapping[str, Any]) -> None:
        """Give all ranks that share some of the parameters the values of the first of them. Collective."""
        for comm, flat, views, _ in self._shared:
            if comm.Get_rank() == 0:
                np.concatenate([parameters[name] for name in views], axis=None, out=flat)
                self._told += flat.nbytes
            comm.Bcast(flat, 0)
            for name, values in views.items():
                parameters[name][...] = values

    @property
    def nbytes_sent(self) -> int:
        """By this rank to others, so far."""
        return self._told + sum(shared.plan.bytes_sent for shared in self._shared)

    def free(self) -> None:
        """Free the plans and communicators. Collective."""
        for shared in self._shared:
            shared.plan.free()
            shared.comm.Free()
        self._shared = []


def _share(comm: Communicator, arrays: Mapping[str, Any]) -> Shared:
    flat = comm.empty(sum(w.size for w in arrays.values()), next(iter(arrays.values())).dtype)
    views: dict[str, Any] = {}
    first = 0
    for name, w in arrays.items():
        views[name] = flat[first : first + w.size].reshape(w.shape)
        first += w.size
    return Shared(comm, flat, views, plan_exact(flat, comm, MPI.SUM, "auto", "ModelParallel"))
