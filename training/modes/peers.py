"""Peers: every rank sends what matters of its updates to every other; there is no server (Strom, Interspeech 2015).

Each rank has a replica w, and keeps a residual r for it. A step with gradient g, u being what the optimizer would take
off w, which is lr·g for plain SGD::

    r ← r + u
    d ← the values of r that reach the threshold, as ±τ      (Threshold; any other encoder in its place)
    r ← r − d
    w ← w − d, here and, when it arrives, on all other ranks

So w = w₀ − the sum of all d, and what a rank's d and its r sum up to is the sum of its u. Nobody waits for anybody's
steps: a rank adds up what arrives while it computes, and takes the sum off w at the end of its step. Only a rank that
takes nothing over for long, such as a stopped one, is waited for when a few messages to it are under way. Replicas
differ between steps; ``synchronize`` waits until all that was sent is applied, and makes them equal to the bit.

The optimizer's state is each rank's own. A rank's gradient counts as much as another's, whatever its weight, and the
updates of p ranks add up: take a learning rate of about 1/p of one rank's.
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
class Peers(FreeMode):
    """Send encoded updates to all ranks: by the trainer's ``compression``, an encoder, or ``Threshold()``."""

    def start(self, comm: MPI.Intracomm, replica: Replica, compressors: Mapping[str, Compressor | None]) -> Running:
        """See FreeMode. Raises ValueError for what ``PeerReplica`` cannot do."""
        from bitring.training.store.peer_replica import PeerReplica  # MPI is initialised by it

        return PeerReplica(comm, replica, compressors)
