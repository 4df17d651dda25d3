"""bitring.start: plans started together, small ones in one exchange."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from mpi4py import MPI

import bitring
from bitring.collectives.fusion import FUSED_NBYTES
from bitring.errors import PeerError

ALGORITHMS = ("auto", "ring", "recursive_doubling", "mpi")


def fill(arrays: list[np.ndarray], rank: int) -> None:
    for i, x in enumerate(arrays):
        x[...] = np.arange(x.size) % 7 + i + rank


def right(arrays: list[np.ndarray], size: int) -> bool:
    ranks = size * (size - 1) // 2
    return all(np.array_equal(x, size * (np.arange(x.size) % 7 + i) + ranks) for i, x in enumerate(arrays))


def caught(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_plans_started_together(comm, agree, algorithm: str):
    kinds = [(3, "f4"), (100, "f4"), (0, "f4"), (7, "i4"), (FUSED_NBYTES // 4, "f4"), (5, "f4"), (6, "f4"), (2, "f8")]
    arrays = [np.empty(n, dtype) for n, dtype in kinds]
    plans = [bitring.plan_allreduce(x, comm=comm, algorithm=algorithm) for x in arrays]
    before = [plan.bytes_sent for plan in plans]
    for run in range(3):
        fill(arrays, comm.rank)
        bitring.start(plans)
        for plan in reversed(plans) if run == 1 else plans:
            plan.wait()
        agree(comm, right(arrays, comm.size), f"run {run}")
    fill(arrays, comm.rank)
    for plan in plans:
        plan()  # each still runs by itself
    agree(comm, right(arrays, comm.size))
    sent = [plan.bytes_sent - earlier for plan, earlier in zip(plans, before, strict=True)]
    agree(
        comm, comm.size == 1 or all(b % 4 == 0 and (b > 0) == (x.size > 0) for b, x in zip(sent, arrays, strict=True))
    )


def test_small_plans_share_one_exchange(comm, agree):
    arrays = [np.ones(n, np.float32) for n in (1, 2, 3)]
    plans = [bitring.plan_allreduce(x, comm=comm) for x in arrays]
    queue = plans[0].context.queue
    before = queue.count
    bitring.start(plans)
    jobs = queue.count - before
    for plan in plans:
        plan.wait()
    agree(comm, jobs == (1 if comm.size > 1 else 3), str(jobs))


def test_other_plans_go_by_themselves(comm, agree):
    x, y, z = np.ones(50, np.float32), np.ones(4000, np.float32), np.ones(60, np.float32)
    other = comm.Dup()
    plans = [
        bitring.plan_allreduce(x, comm=comm),
        bitring.plan_allreduce(y, comm=comm, compression="onebit"),
        bitring.plan_allreduce(z, comm=other),
    ]
    bitring.start(plans)
    for plan in plans:
        plan.wait()
    agree(comm, bool((x == comm.size).all() and (z == comm.size).all() and np.allclose(y, comm.size)))
    for plan in plans:
        plan.free()
    other.Free()


def test_mistakes(comm):
    plan = bitring.plan_allreduce(np.ones(3, np.float32), comm=comm)
    with pytest.raises(TypeError, match="start: plans must be plans, as plan_allreduce returns; got int"):
        bitring.start([plan, 3])  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError, match="given twice"):
        bitring.start([plan, plan])
    plan.start()
    with pytest.raises(RuntimeError, match="the last run must be waited for first"):
        bitring.start([plan])
    plan.wait()
    plan.free()
    with pytest.raises(RuntimeError, match="the plan was freed"):
        bitring.start([plan])


@pytest.mark.parametrize("algorithm", ["auto", "ring"])
def test_ranks_that_start_other_plans_hear_of_it(comm, agree, algorithm: str):
    if comm.size == 1:
        pytest.skip("one rank cannot differ")
    arrays = [np.ones(n, np.float32) for n in (1, 2, 3)]
    own = comm.Dup()
    plans = [bitring.plan_allreduce(x, comm=own, algorithm=algorithm) for x in arrays]
    mine = plans if comm.rank else plans[::-1]
    error: Exception | None = None
    bitring.start(mine)
    for plan in mine:
        try:
            plan.wait()
        except bitring.MismatchError as problem:
            error = problem
    found = str(error)
    agree(comm, "ranks disagree on plan" in found and f"(plan {plans[0].number})" in found, found)
    if plans[0].context.common is not None and algorithm == "auto":  # else messages had been sent
        fill(arrays, comm.rank)
        bitring.start(plans)
        for plan in plans:
            plan.wait()
        agree(comm, right(arrays, comm.size))
    own.Free()


@pytest.mark.parametrize("algorithm", ["auto", "ring"])
@pytest.mark.parametrize("mistake", ["active", "freed", "not a plan", "twice"])
def test_a_mistake_on_one_rank_is_told_to_the_others(comm, agree, algorithm: str, mistake: str):
    own = comm.Dup()
    arrays = [np.ones(n, np.float32) for n in (3, 4, FUSED_NBYTES)]  # two travel together, one by itself
    plans = [bitring.plan_allreduce(x, comm=own, algorithm=algorithm) for x in arrays]
    last, given = own.rank == own.size - 1, list(plans)
    before = bitring.plan_allreduce(np.ones(2, np.float32), comm=own, algorithm=algorithm)
    before.start()
    if last and mistake == "freed":
        plans[1].free()
    elif last:
        given = {"active": [before, *plans[1:]], "not a plan": [*plans, 3], "twice": [*plans, plans[0]]}[mistake]
    error = caught(lambda: bitring.start(given))  # pyright: ignore[reportArgumentType]
    agree(own, isinstance(error, (RuntimeError, TypeError)) == last, repr(error))
    before.wait()
    errors = [caught(plan.wait) for plan in plans] if not last else []
    told = f"rank {own.size - 1} could not take part: "
    agree(own, all(isinstance(each, PeerError) for each in errors) and (last or told in str(errors[0])), repr(errors))
    x = np.ones(3, np.float32)
    error = caught(lambda: bitring.allreduce(x, x, comm=own))
    # Runs that had begun to exchange messages leave it of no use, on all ranks.
    outcomes = comm.allgather(
        "go on with a new one" in str(error) if error is not None else bool((x == own.size).all())
    )
    agree(comm, all(outcomes), repr(error))
    own.Free()


@pytest.mark.parametrize("mistake", ["active", "freed"])
def test_a_request_that_one_rank_cannot_start(comm, agree, mistake: str):
    own = bitring.Communicator(comm.Dup())
    x = np.ones(3)
    request, last = own.Allreduce_init(MPI.IN_PLACE, x), comm.rank == comm.size - 1
    error: Exception | None = None
    if mistake == "active":
        request.Start()
    elif last:
        request.Free()
    if last:
        error = caught(request.Start)
        agree(comm, isinstance(error, RuntimeError) and mistake in str(error), repr(error))
    if mistake == "active":
        request.Wait()
    if not last:
        request.Start()
        agree(comm, True)
        error = caught(request.Wait)
    good = last or (isinstance(error, PeerError) and f"rank {comm.size - 1} could not take part: " in str(error))
    agree(comm, good, repr(error))
    own.Allreduce(np.ones(3), x)
    agree(comm, bool((x == comm.size).all()), "the communicator is of no use")
    own.Free()
