"""Timing, for the commands that measure collectives. Importing this initialises MPI."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

SAMPLE_SECONDS = 2e-3
"""A sample repeats a short call for so long; a clock and a barrier cost microseconds."""

_MAX_CALLS = 2000


class Contender(NamedTuple):
    """``call`` reduces ``source`` to ``result``, which may be the same array; None where another job has both.

    ``seconds``: measures a sample in another way than by calling ``call``.
    """

    name: str
    call: Callable[[], None]
    source: Any = None
    result: Any = None
    seconds: Callable[[], float] | None = None


class Times(NamedTuple):
    """Of one call: ``seconds`` on the slowest rank, and ``processor`` seconds of all ranks together; one per sample.

    ``processor`` is NaN where another job made the call.
    """

    seconds: list[float]
    processor: list[float]


def sample(
    comm: MPI.Intracomm, contenders: Sequence[Contender], samples: int, seconds: float, least: int
) -> dict[str, Times]:
    """Times of each of ``contenders``: ``samples`` of each, taken in turns. Collective.

    There are fewer, but no fewer than ``least``, where ``seconds`` run out.
    """
    calls = [1 if each.seconds else calls_of(comm, each.call) for each in contenders]
    taken: list[list[float]] = [[] for _ in contenders]
    used: list[list[float]] = [[] for _ in contenders]
    begin = time.perf_counter()
    for turn in range(samples):
        for i in range(len(contenders)):
            i = (i + turn) % len(contenders)
            own = contenders[i].seconds
            before = time.process_time()
            taken[i].append(own() if own else seconds_of(comm, contenders[i].call, calls[i]))
            used[i].append(math.nan if own else (time.process_time() - before) / calls[i])
        if turn + 1 >= least and comm.bcast(time.perf_counter() - begin > seconds):
            break
    slowest, all_used = np.array(taken), np.array(used)
    MPI.Intracomm.Allreduce(comm, MPI.IN_PLACE, slowest, MPI.MAX)
    MPI.Intracomm.Allreduce(comm, MPI.IN_PLACE, all_used, MPI.SUM)
    return {
        contender.name: Times(times.tolist(), processor.tolist())
        for contender, times, processor in zip(contenders, slowest, all_used, strict=True)
    }


def check_sums(comm: MPI.Intracomm, contenders: Sequence[Contender]) -> None:
    """Raise RuntimeError on all ranks when any's sum is wrong. Leaves zeros: their sums stay zeros. Collective."""
    contenders = [each for each in contenders if each.source is not None]
    n, dtype = contenders[0].source.size, contenders[0].source.dtype
    mine, right = pattern(n, dtype, comm.rank), right_sum(n, dtype, comm.size)
    for contender in contenders:
        contender.source[:] = mine
        contender.call()
        verdicts = comm.allgather(bool(np.array_equal(contender.result, right)))
        if not all(verdicts):
            raise RuntimeError(f"{contender.name}: a wrong sum of {n} values on rank {verdicts.index(False)}")
    for contender in contenders:
        contender.source.fill(0)


def calls_of(comm: MPI.Intracomm, call: Callable[[], None]) -> int:
    """Calls that make a sample long enough, the same number on all ranks. Collective."""
    seconds_of(comm, call, 1)
    seconds: float = comm.allreduce(seconds_of(comm, call, 3), MPI.MAX)
    return max(1, min(_MAX_CALLS, math.ceil(SAMPLE_SECONDS / seconds)))


def seconds_of(comm: MPI.Intracomm, call: Callable[[], None], calls: int) -> float:
    """Seconds per call on this rank, of ``calls`` that begin on all ranks together. Collective."""
    comm.Barrier()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def pattern(n: int, dtype: np.dtype[Any], rank: int) -> Any:
    """The values that rank ``rank`` adds: small whole numbers, so that every order of summation gives the same bits."""
    return (np.arange(n) % 7 + rank % 2).astype(dtype)


def right_sum(n: int, dtype: np.dtype[Any], size: int) -> Any:
    """The sum of all ranks' patterns."""
    return (np.arange(n) % 7 * size + size // 2).astype(dtype)
