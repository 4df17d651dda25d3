"""The self-test of ``bitring doctor``: sums by every algorithm against NumPy, and messages' speed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.schedules.schedule import algorithms
from bitring.commands._findings import FAIL, OK, Finding
from bitring.compression.plans.plan import plan_allreduce

_MIB = 1 << 20


def self_test(comm: MPI.Intracomm) -> Iterator[Finding]:
    """AllReduce by every algorithm, and at one bit per value, against NumPy. Collective."""
    for name in algorithms.names():
        yield _tested(comm, f"allreduce {name}", functools.partial(_exact_error, comm, name))
    yield _tested(comm, "allreduce onebit", functools.partial(_onebit_error, comm))


def _tested(comm: MPI.Intracomm, what: str, error: Callable[[], str | None]) -> Finding:
    begin = time.perf_counter()
    problems = comm.allgather(error())
    for rank, problem in enumerate(problems):
        if problem is not None:
            return Finding(what, FAIL, f"rank {rank}: {problem}", "a wrong sum: please report it, with this table")
    return Finding(what, OK, f"right on all ranks, {time.perf_counter() - begin:.2f} s")


def _values(rank: int, n: int) -> Any:
    return np.random.default_rng([rank, n]).standard_normal(n, np.float32)


def _exact_error(comm: MPI.Intracomm, algorithm: str) -> str | None:
    problem = None
    for n in (1, 1000, 300_007):
        x = _values(comm.rank, n)
        plan = plan_allreduce(x, comm=comm, algorithm=algorithm)
        plan()
        plan.free()
        right = np.sum([_values(rank, n) for rank in range(comm.size)], axis=0, dtype=np.float64)
        worst = float(np.abs(x - right).max())
        if not worst < 1e-5 * comm.size:
            problem = problem or f"the sum of {n} values is off by {worst:.3g}"
    return problem


def _onebit_error(comm: MPI.Intracomm) -> str | None:
    """The error of what was applied and what residuals hold, together, against what was given."""
    n = 100_003
    x = _values(comm.rank, n)
    plan: Any = plan_allreduce(x, comm=comm, compression="onebit")
    plan()
    state = plan.state_dict()
    owed = np.array(state["residual"], np.float64)
    owed[slice(*plan.owned)] += state["owner_residual"]
    comm.Allreduce(MPI.IN_PLACE, owed)
    plan.free()
    right = np.sum([_values(rank, n) for rank in range(comm.size)], axis=0, dtype=np.float64)
    worst = float(np.abs(x + owed - right).max())
    same = len(set(comm.allgather(x.tobytes()))) == 1
    if not same:
        return "ranks got different values"
    return None if worst < 1e-4 * comm.size else f"the sum and its residuals are off by {worst:.3g}"


def point_to_point(comm: MPI.Intracomm) -> Finding:
    """Latency and bandwidth between ranks 0 and 1. Collective."""
    text = ""
    if comm.rank < 2:
        seconds = [_one_way(comm, nbytes, repeats) for nbytes, repeats in ((8, 200), (4 * _MIB, 10))]
        text = f"{seconds[0] * 1e6:.1f} µs for 8 bytes, {4 * _MIB / seconds[1] / 1e9:.2f} GB/s for 4 MiB"
    comm.Barrier()
    return Finding("rank 0 to 1", OK, comm.bcast(text))


def _one_way(comm: MPI.Intracomm, nbytes: int, repeats: int) -> float:
    """Half the median time of a message there and back."""
    buffer = np.zeros(nbytes, np.uint8)
    times: list[float] = []
    for _ in range(repeats + 3):
        begin = time.perf_counter()
        if comm.rank == 0:
            comm.Send(buffer, 1)
            comm.Recv(buffer, 1)
        else:
            comm.Recv(buffer, 0)
            comm.Send(buffer, 0)
        times.append(time.perf_counter() - begin)
    return float(np.median(times[3:])) / 2
