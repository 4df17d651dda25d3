"""The look for NaN and Inf that all ranks make together before a compressed run changes anything."""

from __future__ import annotations

import numpy as np
from mpi4py import MPI

from bitring.collectives.agreement import wait_for
from bitring.collectives.errors import NonFiniteError
from bitring.collectives.executor import Progress, Steps
from bitring.collectives.state import State


def raise_non_finite(state: State, finite: bool, what: str, progress: Progress) -> Steps:
    """Raise NonFiniteError on all ranks unless values are ``finite`` on each, naming the lowest where they are not."""
    worst = np.array(0 if finite else state.size - state.rank, np.int64)
    yield from wait_for(state.comm.Iallreduce(MPI.IN_PLACE, worst, MPI.MAX), progress)
    if worst > 0:
        raise NonFiniteError(f"{what}: x holds NaN or Inf on rank {state.size - int(worst)}; nothing was changed")
