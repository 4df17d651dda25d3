"""HOGWILD!: all ranks of a node update one model in the memory they share (Recht, Ré, Wright and Niu, NIPS 2011).

The arrays of ``Communicator.empty`` that the parameters are become one on all ranks. Each rank computes gradients of
the model as it finds it, which another may be writing, and applies the optimizer to it at once, without waiting for
anybody: w ← w − lr·g, whose w may have changed since g was computed. Without locks an update is lost now and then,
where two ranks write a value at the same moment; with them none is, and blocks of 64 KiB are written whole. Gradients
may be ``Sparse``: only their values, or rows, are read and written.

A rank's gradient counts as much as another's, whatever its weight. Runs differ from each other. Between steps the model
changes under a rank's hands: evaluate a copy, or after ``synchronize`` and before any rank's next step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitring.training.mode import FreeMode, Running

if TYPE_CHECKING:
    from mpi4py import MPI

    from bitring.compression.compressor import Compressor
    from bitring.training.step.replica import Replica


@dataclass(frozen=True)
class Hogwild(FreeMode):
    """Update one model in memory, racy, or under ``locks``."""

    locks: bool = False

    in_shared_memory = True
    takes_sparse = True

    def start(self, comm: MPI.Intracomm, replica: Replica, compressors: Mapping[str, Compressor | None]) -> Running:
        """See FreeMode. Raises ValueError for parameters that are not in shared memory; see ``SharedReplica``."""
        from bitring.training.step.shared_replica import SharedReplica  # MPI is initialised by it

        return SharedReplica(comm, replica, compressors)
