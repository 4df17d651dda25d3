"""How the commands that measure collectives take a time. Importing this initialises MPI."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

SAMPLE_SECONDS = 2e-3
"""A sample repeats a short call for so long; a clock and a barrier cost microseconds."""

_MAX_CALLS = 2000


def calls_of(comm: MPI.Intracomm, call: Callable[[], None]) -> int:
    """Calls that make a sample long enough, the same number on all ranks. Collective."""
    seconds_of(comm, call, 1)
    seconds: float = comm.allreduce(seconds_of(comm, call, 3), MPI.MAX)
    return max(1, min(_MAX_CALLS, math.ceil(SAMPLE_SECONDS / seconds)))


def seconds_of(comm: MPI.Intracomm, call: Callable[[], None], calls: int) -> float:
    """Seconds a call on this rank, of ``calls`` that begin on all ranks together. Collective."""
    comm.Barrier()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def pattern(n: int, dtype: np.dtype[Any], rank: int) -> Any:
    """What rank ``rank`` adds: small whole numbers, so that every order of summation gives the same bits."""
    return (np.arange(n) % 7 + rank % 2).astype(dtype)


def right_sum(n: int, dtype: np.dtype[Any], size: int) -> Any:
    """The sum of all ranks' patterns."""
    return (np.arange(n) % 7 * size + size // 2).astype(dtype)
