"""Calls and plans of which some are not alike on all ranks: a program for ranks, and what tests import.

    mpirun -n 3 python tests/mismatches.py 200     with the seeds from 0 to 199

All ranks draw the same course of deeds. In some of them one rank, the odd one, does something else: it gives another
dtype, count, operation, algorithm, or runs another plan. Then all ranks must raise, an array that is only read must be
as it was, and the next deed must work. Of a Bcast or Reduce that ranks make without waiting for all, those that have
returned must raise in their next call, and the next deed is on another communicator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.allreduce import allreduce
from bitring.collectives.communicator import Communicator
from bitring.collectives.plan import plan_exact
from bitring.collectives.runtime.context import context_of
from bitring.errors import MismatchError

COUNTS = [0, 1, 3, 100, 2_000, 17_000, 40_000]
DEEDS = ["Allreduce", "allreduce", "in place", "plan", "Bcast", "Allgather", "Reduce", "Reduce_scatter_block"]
DIFFERENCES = ["dtype", "count", "op", "algorithm", "plan", "function", "root"]


def course(comm: Communicator, seed: int, most_good: int = 100) -> list[str]:
    """Make the course of ``seed`` on ``comm``, and return this rank's complaints. Collective."""
    random = np.random.default_rng(seed)
    size, rank = comm.Get_size(), comm.Get_rank()
    values = [int(random.choice(COUNTS)) for _ in range(4)]
    algorithms = [str(random.choice(["auto", "leaders", "ring", "mpi"])) for _ in values]
    comm = Communicator(MPI.Intracomm(comm).Dup(), comm.algorithm)
    plans, own, wrong = _plans(comm, values, algorithms), [comm], list[str]()
    for _ in range(3):
        deed, good = str(random.choice(DEEDS)), int(random.choice([0, 1, 2, most_good]))
        k, odd = int(random.integers(len(plans))), int(random.integers(size))
        difference = str(random.choice([d for d in DIFFERENCES if (d == "plan") <= (deed == "plan")]))
        for _ in range(good):
            wrong += _alike(comm, deed, values[k], plans[k])
        x = np.full(values[k], rank + 1, np.float32)
        call, kind = _call(comm, deed, x, plans[k]), "no error"
        if rank == odd:
            call = _other(comm, deed, difference, values[k], plans, k) or call
        try:
            call()
        except Exception as error:
            kind = type(error).__name__
            if not isinstance(error, MismatchError):
                wrong.append(f"seed {seed}: {deed} with another {difference} on rank {odd}: {error!r}")
        kinds = MPI.COMM_WORLD.allgather(kind)
        broken = any(MPI.COMM_WORLD.allgather(context_of(comm).queue.broken is not None))
        late = deed in ("Bcast", "Reduce") and "MismatchError" in kinds and (broken or "no error" in kinds)
        if kinds != ["MismatchError"] * size and (kinds != ["no error"] * size or size > 1) and not late:
            wrong.append(f"seed {seed}: {deed} with another {difference} on rank {odd}: {kinds}")
        if (
            deed in ("Allreduce", "allreduce", "Allgather", "Reduce", "Reduce_scatter_block")
            and not (x == rank + 1).all()
        ):
            wrong.append(f"seed {seed}: {deed} with another {difference} on rank {odd} has changed its input")
        if late:
            wrong += _raises_at_last(comm, kind == "no error")
            for plan in plans:
                plan.free()
            own.append(Communicator(MPI.Intracomm(comm).Dup(), comm.algorithm))
            comm = own[-1]
            plans = _plans(comm, values, algorithms)
        wrong += _alike(comm, deed, values[k], plans[k])
    for plan in plans:
        plan.free()
    for each in own:
        each.Free()
    return wrong


def _plans(comm: Communicator, counts: list[int], algorithms: list[str]) -> list[Any]:
    return [
        plan_exact(np.zeros(n, np.float32), comm, MPI.SUM, algorithm)
        for n, algorithm in zip(counts, algorithms, strict=True)
    ]


def _raises_at_last(comm: Communicator, returned: bool) -> list[str]:
    """What is wrong with the next call of a rank that has ``returned`` from one that was not the same on all ranks."""
    try:
        comm.Allreduce(MPI.IN_PLACE, np.ones(3))
    except Exception as error:
        if isinstance(error, MismatchError if returned else RuntimeError):
            return []
        return [f"the next call, of a rank that has {'' if returned else 'not '}returned: {error!r}"]
    return ["the next call did not raise"]


def _call(comm: Communicator, deed: str, x: Any, plan: Any) -> Callable[[], Any]:
    y = np.empty_like(x)
    calls: dict[str, Callable[[], Any]] = {
        "Allreduce": lambda: comm.Allreduce(x, y),
        "allreduce": lambda: allreduce(x, out=y, comm=comm),
        "in place": lambda: comm.Allreduce(MPI.IN_PLACE, x),
        "plan": plan,
        "Bcast": lambda: comm.Bcast(x, 0),
        "Allgather": lambda: comm.Allgather(x, np.empty((comm.Get_size(), x.size), x.dtype)),
        "Reduce": lambda: comm.Reduce(x, y, root=comm.Get_size() - 1),
        "Reduce_scatter_block": lambda: comm.Reduce_scatter_block(np.tile(x, comm.Get_size()), y),
    }
    return calls[deed]


def _other(
    comm: Communicator, deed: str, difference: str, n: int, plans: list[Any], k: int
) -> Callable[[], Any] | None:
    """What the odd rank does instead; it is not the same to anybody."""
    x = np.ones(n, np.float32)
    if difference == "plan" or (deed == "plan" and difference != "function"):
        return plans[(k + 1) % len(plans)]
    if difference == "function":
        if deed == "Reduce_scatter_block":
            return lambda: comm.Bcast(x, 0)
        return lambda: comm.Reduce_scatter_block(np.ones(comm.Get_size() * n, np.float32), x)
    if difference == "count":
        return _call(comm, deed, np.ones(n + 1, np.float32), None)
    if difference == "dtype" and n > 0:
        return _call(comm, deed, np.ones(n, np.int64), None)
    if difference == "op" and deed in ("Allreduce", "Reduce"):
        return lambda: getattr(comm, deed)(x, np.empty_like(x), MPI.MAX)
    if difference == "root" and deed in ("Bcast", "Reduce") and comm.Get_size() > 2:
        return lambda: comm.Bcast(x, 1) if deed == "Bcast" else comm.Reduce(x, np.empty_like(x), root=1)
    return (
        _call(Communicator(comm, algorithm="double_binary_tree"), deed, x, None)
        if deed != "allreduce"
        else (lambda: allreduce(x, comm=comm, algorithm="double_binary_tree"))
    )


def _alike(comm: Communicator, deed: str, n: int, plan: Any) -> list[str]:
    """Do it right, and see to the result."""
    size, rank = comm.Get_size(), comm.Get_rank()
    x, y = np.full(n, rank + 1, np.float32), np.empty(n, np.float32)
    want = np.float32(size * (size + 1) // 2)
    if deed == "plan":
        plan.flat[:] = x
        plan()
        y = plan.flat
    elif deed == "Bcast":
        comm.Bcast(x, size - 1)
        y, want = x, np.float32(size)
    elif deed == "Allgather":
        gathered = np.empty((size, n), np.float32)
        comm.Allgather(x, gathered)
        y = gathered - np.arange(size, dtype=np.float32)[:, None]
        want = np.float32(1)
    elif deed == "Reduce":
        comm.Reduce(x, y, root=size - 1)
        if rank != size - 1:
            return []
    elif deed == "Reduce_scatter_block":
        comm.Reduce_scatter_block(np.tile(x, size), y)
    elif deed == "in place":
        comm.Allreduce(MPI.IN_PLACE, x)
        y = x
    else:
        _call(comm, deed, x, plan)() if deed != "Allreduce" else comm.Allreduce(x, y)
        if deed == "allreduce":
            y = allreduce(x, comm=comm)
    return [] if (y == want).all() else [f"{deed} of {n} values: {y[y != want][:4]} instead of {want}"]


def main() -> None:
    """Make as many courses as asked for; every rank's complaints go to its standard output."""
    comm = Communicator(MPI.COMM_WORLD.Dup())
    wrong: list[str] = []
    for seed in range(int(sys.argv[1])):
        wrong += course(comm, seed)
    for complaint in wrong[:10]:
        print(f"rank {comm.Get_rank()}: {complaint}", flush=True)
    total = comm.allreduce(len(wrong))
    if comm.Get_rank() == 0:
        print(f"{sys.argv[1]} seeds, {total} complaints", flush=True)
    comm.Free()


if __name__ == "__main__":
    main()
