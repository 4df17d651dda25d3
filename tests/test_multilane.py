"""Multi-lane AllReduce among ranks that are told to be on nodes of uneven size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitring.collectives.plan import plan_exact

SIZES = [0, 1, 2, 1009, 100_003]


@pytest.fixture
def world(two_nodes):
    return two_nodes


def values(rank: int, n: int, dtype: Any = np.float32) -> np.ndarray:
    """Small whole numbers, whose sums are exact."""
    return np.random.default_rng(rank).integers(-99, 99, n).astype(dtype)


def total(size: int, n: int, dtype: Any = np.float32) -> np.ndarray:
    return sum((values(r, n, dtype) for r in range(size)), start=np.zeros(n, dtype))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("memory", ["private", "resident", "mixed"])
def test_a_plan(world, agree, n: int, memory: str):
    from mpi4py import MPI

    x = world.empty(n + 3)[3:]
    if memory == "private" or (memory == "mixed" and world.rank == world.size - 1):
        x = np.empty(n, np.float32)
    plan = plan_exact(x, world, MPI.SUM, "multilane")
    want = total(world.size, n)
    for how in ("called", "started", "called"):
        x[:] = values(world.rank, n)
        if how == "called":
            plan()
        else:
            plan.start()
            plan.wait()
        agree(world, bool(np.array_equal(x, want)), f"{how}: {x} instead of {want}")
    agree(world, plan.algorithm == "multilane", f"{plan.algorithm}: {plan.why}")
    plan.free()


def test_types_and_operations(world, agree):
    from mpi4py import MPI

    for dtype, op, ufunc in (
        (np.float64, MPI.SUM, np.add),
        (np.int16, MPI.MAX, np.maximum),
        (np.float16, MPI.MIN, np.minimum),
    ):
        x = values(world.rank, 5003, dtype)
        plan = plan_exact(x, world, op, "multilane")
        plan()
        want = ufunc.reduce([values(r, 5003, dtype) for r in range(world.size)])
        agree(world, plan.algorithm == "multilane" and bool(np.array_equal(x, want)), f"{dtype} {ufunc}: {x}")
        plan.free()


def test_bits_are_equal_on_all_ranks(world, agree):
    from mpi4py import MPI

    x = np.random.default_rng(world.rank).normal(size=10_007).astype(np.float32)
    plan = plan_exact(x, world, MPI.SUM, "multilane")
    plan()
    agree(world, len(set(world.allgather(x.tobytes()))) == 1, "the ranks have different bits")
    plan.free()


def test_several_plans_at_once(world, agree):
    from mpi4py import MPI

    xs = [values(world.rank, n) for n in SIZES]
    plans = [plan_exact(x, world, MPI.SUM, "multilane") for x in xs]
    for plan in plans:
        plan.start()
    for k in np.random.default_rng(world.rank).permutation(len(plans)):
        plans[k].wait()
    for x, n, plan in zip(xs, SIZES, plans, strict=True):
        agree(world, bool(np.array_equal(x, total(world.size, n))), f"{n} values: {x}")
        plan.free()


@pytest.mark.parametrize("n", SIZES)
def test_calls_without_a_plan(world, agree, n: int):
    from mpi4py import MPI

    want = total(world.size, n)
    for turn in range(3):
        x, y = values(world.rank, n), np.empty(n, np.float32)
        world.Allreduce(x, y)
        agree(world, bool(np.array_equal(y, want)), f"turn {turn}: {y}")
        world.Allreduce(MPI.IN_PLACE, x)
        agree(world, bool(np.array_equal(x, want)), f"turn {turn}, in place: {x}")
        resident = world.empty(n)
        resident[:] = values(world.rank, n)
        world.Allreduce(MPI.IN_PLACE, resident)
        agree(world, bool(np.array_equal(resident, want)), f"turn {turn}, resident: {resident}")
