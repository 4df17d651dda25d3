"""AllReduce through shared memory: ``Communicator.empty``, calls with and without plans, what is left behind."""

from __future__ import annotations

import gc
import os
import threading
import time
from typing import Any

import numpy as np
import pytest

from bitring.arrays import NUMERIC_DTYPES
from bitring.collectives.communicator import Communicator
from bitring.collectives.interop.operators import ufunc_name
from bitring.collectives.plan import plan_exact
from bitring.errors import MismatchError, PeerError
from bitring.native import native

pytestmark = pytest.mark.skipif(native() is None, reason="there is no native engine")

# Around the small way's limit for 2 to 5 ranks, in float32 values, and around a stage.
SIZES = [0, 1, 8, 9, 3277, 4096, 5461, 8191, 8192, 8193, 131_072, 131_073, 400_009]


@pytest.fixture
def world(comm):
    duplicate = Communicator(comm.Dup())
    yield duplicate
    duplicate.Free()


def values(rank: int, n: int, dtype: Any = np.float32) -> np.ndarray:
    """Sums of these are rounded, so that their order shows."""
    dtype = np.dtype(dtype)
    x = np.random.default_rng(rank + 1).normal(scale=10.0 ** (rank % 3), size=n)
    if dtype.kind in "iub":
        return (np.abs(x) * (1 if dtype.itemsize == 1 else 100)).astype(dtype)
    return x.astype(dtype)


def in_rank_order(size: int, n: int, dtype: Any = np.float32, ufunc: Any = np.add) -> np.ndarray:
    total = values(0, n, dtype)
    with np.errstate(all="ignore"):
        for rank in range(1, size):
            ufunc(total, values(rank, n, dtype), out=total)
    return total


def mappings() -> int:
    """Mappings of memory that bitring shares, of this process."""
    with open("/proc/self/maps", encoding="utf-8") as file:
        return sum("memfd:bitring" in line for line in file)


def outcome(call) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def works(world) -> bool:
    from mpi4py import MPI

    x = np.full(5, world.rank + 1.0)
    world.Allreduce(MPI.IN_PLACE, x)
    return bool((x == world.size * (world.size + 1) / 2).all())


def everyone_raises(world, agree, call, kind: type[Exception], *texts: str) -> None:
    got, text = outcome(call)
    agree(world, got == kind.__name__ and all(part in text for part in texts), f"{got}: {text}")
    agree(world, works(world), "the communicator does not work afterwards")


def is_shared(world, x) -> bool:
    """Whether ``x`` lies in memory that the communicator's ranks map; alone there is nothing to share."""
    from bitring.collectives.runtime.context import context_of

    shared = context_of(world).shared
    return world.size == 1 or (shared is not None and shared.region_of(x.reshape(-1)) is not None)


@pytest.mark.parametrize("shape", [5, 0, (3, 4), (2, 0, 3), (), (np.int64(2), 7), np.int64(6), [2, 3]])
def test_empty(world, agree, shape):
    for dtype in (np.float32, "i2", complex, np.dtype("f8")):
        x = world.empty(shape, dtype)
        want = np.empty(shape, dtype)
        ok = x.shape == want.shape and x.dtype == want.dtype and x.flags.c_contiguous and x.flags.writeable
        agree(world, ok, f"{x.shape} {x.dtype} {x.flags}")
        x[...] = 1
        agree(world, x.size == 0 or is_shared(world, x), "not in shared memory")
        world.Barrier()


def test_bad_arguments_of_empty(world, agree):
    everyone_raises(world, agree, lambda: world.empty((2, -1)), ValueError, "empty: shape", "(2, -1)")
    everyone_raises(world, agree, lambda: world.empty((2, 1.5)), ValueError, "empty: shape", "(2, 1.5)")
    everyone_raises(world, agree, lambda: world.empty(3, object), TypeError, "empty: dtype")
    everyone_raises(world, agree, lambda: world.empty(3, "no such type"), TypeError, "no such type")
    if world.size > 1:
        odd = world.rank == world.size - 1
        everyone_raises(world, agree, lambda: world.empty(4 if odd else 3), MismatchError, "shape", "(4,)", "(3,)")
        everyone_raises(world, agree, lambda: world.empty(3, "f8" if odd else "f4"), MismatchError, "dtype", "float64")
        kind = ValueError if odd else PeerError
        for wrong in (-1, None, 1.5, "x", object()):
            everyone_raises(world, agree, lambda wrong=wrong: world.empty(wrong if odd else 3), kind, "empty: shape")


def test_memory_is_given_back(world, agree):
    x = world.empty(1000)
    del x
    gc.collect()
    before, descriptors = mappings(), len(os.listdir("/proc/self/fd"))
    for k in range(300 if world.size <= 2 else 60):
        x = world.empty(100 + k)
        view = x[3:]
        del x
        view[:] = 1
        del view
    gc.collect()
    world.Barrier()
    agree(world, mappings() == before, f"{before} mappings have become {mappings()}")
    agree(world, len(os.listdir("/proc/self/fd")) == descriptors, "descriptors are left open")


def test_the_communicator_may_go_before_its_memory(comm, agree):
    world = Communicator(comm.Dup())
    x = world.empty(50_000)
    x[:] = 3
    world.Free()
    gc.collect()
    comm.Barrier()
    agree(comm, bool((x == 3).all()), "the memory is gone")


def test_nothing_is_left_of_communicators(comm, agree):
    from mpi4py import MPI

    def use() -> None:
        world = Communicator(comm.Dup())
        x = world.empty(20_000)
        parts = [world, world.Dup(), world.Split(world.rank % 2), world.Split(0, -world.rank)]
        for part in parts:
            y = np.ones(9000, np.float32)
            part.Allreduce(MPI.IN_PLACE, y)
            x[:] = 1
            part.Allreduce(MPI.IN_PLACE, x)
            agree(comm, bool((y == part.size).all() and (x == part.size).all()), str(y))
        for part in parts[::-1]:
            part.Free()

    use()
    gc.collect()
    before = mappings()
    use()
    use()
    gc.collect()
    agree(comm, mappings() == before, f"{before} mappings have become {mappings()}")
    agree(comm, not [name for name in os.listdir("/dev/shm") if name.startswith("bitring")], "something in /dev/shm")


@pytest.mark.parametrize("n", SIZES)
def test_calls(world, agree, n: int):
    from mpi4py import MPI

    want = in_rank_order(world.size, n)
    resident = world.empty(n + 7)
    for turn in range(3):
        x, y = values(world.rank, n), np.empty(n, np.float32)
        world.Allreduce(x, y)
        unchanged = bool(np.array_equal(x, values(world.rank, n)))
        agree(world, unchanged and bool(np.array_equal(y, want)), f"turn {turn}: {y} instead of {want}")
        for name, z in (
            ("private", x),
            ("a view of private memory", np.empty(n + 1, np.float32)[1:]),
            ("resident", resident[:n]),
            ("resident elsewhere", resident[world.rank % 2 + 2 :][:n]),
            ("mixed", resident[5:][:n] if world.rank == 0 else np.empty(n, np.float32)),
        ):
            z[:] = values(world.rank, n)
            world.Allreduce(MPI.IN_PLACE, z)
            agree(world, bool(np.array_equal(z, want)), f"turn {turn}, {name}: {z} instead of {want}")
        z = resident[1:][:n]
        world.Allreduce(values(world.rank, n), z)
        agree(world, bool(np.array_equal(z, want)), f"turn {turn}, into resident: {z}")


@pytest.mark.parametrize("n", [5, 20_011])
def test_every_type(world, agree, n: int):
    from mpi4py import MPI

    operations = {"add": MPI.SUM, "maximum": MPI.MAX, "logical_or": MPI.LOR, "bitwise_xor": MPI.BXOR}
    for dtype in NUMERIC_DTYPES:
        for name, op in operations.items():
            if ufunc_name(op, dtype) != name:
                continue
            want = in_rank_order(world.size, n, dtype, getattr(np, name))
            x = values(world.rank, n, dtype)
            world.Allreduce(MPI.IN_PLACE, x, op)
            agree(world, bool(np.array_equal(x, want)), f"{name} of {dtype}: {x} instead of {want}")


@pytest.mark.parametrize("n", [7, 100_003])
def test_arguments_read_in_different_ways(world, agree, n: int):
    """Some ranks' arguments take the native way at once, others' are read by Python first."""
    from mpi4py import MPI

    want, first = in_rank_order(world.size, n), world.rank == 0
    ways = {
        "list": lambda x: [x, MPI.FLOAT],
        "count": lambda x: [x, n, MPI.FLOAT],
        "memoryview": lambda x: x.data,
        "matrix": lambda x: x.reshape(1, n),
    }
    works(world)
    works(world)
    for name, way in ways.items():
        for odd in (first, not first):
            x, y = values(world.rank, n), np.zeros(n, np.float32)
            world.Allreduce(MPI.IN_PLACE, way(x) if odd else x)
            agree(world, bool(np.array_equal(x, want)), f"{name}: {x}")
            world.Allreduce(values(world.rank, n), way(y) if odd else y)
            agree(world, bool(np.array_equal(y, want)), f"{name}, two buffers: {y}")


@pytest.mark.parametrize("n", [4, 50_000])
def test_ranks_that_differ(world, agree, n: int):
    from mpi4py import MPI

    works(world)
    works(world)
    if world.size == 1:
        return
    last = world.size - 1
    odd = world.rank == last
    x = np.zeros(n, np.float32)
    for _ in range(3):
        for term, argument, op in (
            ("count", np.zeros(n + 1, np.float32) if odd else x, MPI.SUM),
            ("dtype", np.zeros(n, np.int32) if odd else x, MPI.SUM),
            ("op", x, MPI.MAX if odd else MPI.SUM),
        ):
            text = f"Allreduce: ranks disagree on {term}: rank {last} gave"
            everyone_raises(
                world, agree, lambda a=argument, o=op: world.Allreduce(MPI.IN_PLACE, a, o), MismatchError, text
            )
        sent = np.zeros(n + 1, np.float32) if odd else x
        kind = ValueError if odd else PeerError
        everyone_raises(world, agree, lambda sent=sent: world.Allreduce(sent, x.copy()), kind, "Allreduce")


def test_plans_run_out_of_order(world, agree):
    from mpi4py import MPI

    if world.size == 1:
        return
    first, second = (plan_exact(np.zeros(n, np.float32), world, MPI.SUM, "auto") for n in (10, 40_000))
    agree(world, first.algorithm == "shared_memory", first.why)
    odd = world.rank == world.size - 1
    for run in (lambda plan: plan(), lambda plan: (plan.start(), plan.wait())):
        both = ("10 float32", "40000 float32", f"rank {world.size - 1}")
        everyone_raises(world, agree, lambda run=run: run(second if odd else first), MismatchError, *both)
    # A plan on one rank, a call on the others.
    everyone_raises(
        world, agree, lambda: first() if odd else world.Allreduce(MPI.IN_PLACE, np.zeros(10, np.float32)), MismatchError
    )
    first()
    second()
    first.free()
    second.free()


@pytest.mark.parametrize("n", [100, 50_000, 400_009])
@pytest.mark.parametrize("memory", ["private", "resident"])
def test_plans(world, agree, n: int, memory: str):
    from mpi4py import MPI

    want = in_rank_order(world.size, n)
    x = world.empty(n) if memory == "resident" else np.empty(n, np.float32)
    plan = plan_exact(x, world, MPI.SUM, "auto")

    def started():
        plan.start()
        count, until = 0, time.monotonic() + 0.02
        while time.monotonic() < until:
            count += 1  # Python, which the run goes on beside
        plan.wait()

    def polled():
        plan.start()
        while not plan.test():
            pass

    def from_a_thread():
        thread = threading.Thread(target=plan)
        thread.start()
        while thread.is_alive():
            time.sleep(0)
        thread.join()

    for how in (plan, started, polled, from_a_thread, plan):
        x[:] = values(world.rank, n)
        how()
        agree(world, bool(np.array_equal(x, want)), f"{how}: {x} instead of {want}")
    plan.free()


def test_a_plan_keeps_its_memory(world, agree):
    from mpi4py import MPI

    x = world.empty(50_000)
    x[:] = 1
    plan = plan_exact(x, world, MPI.SUM, "auto")
    del x
    gc.collect()
    plan()
    plan()
    agree(world, plan.algorithm in ("shared_memory", "mpi"), plan.why)
    plan.free()


def test_in_place_said_with_none(world, agree):
    for _ in range(3):
        x = np.full(5, world.rank + 1.0)
        world.Allreduce(None, x)
        agree(world, bool((x == world.size * (world.size + 1) / 2).all()), str(x))


def test_memory_of_another_communicator(world, agree):
    from mpi4py import MPI

    other = world.Dup()
    x = other.empty(30_000)
    for comm in (world, other, world):
        x[:] = values(world.rank, 30_000)
        comm.Allreduce(MPI.IN_PLACE, x)
        agree(world, bool(np.array_equal(x, in_rank_order(world.size, 30_000))), str(x))
    other.Free()


def test_many_operations_of_mixed_kinds(world, agree):
    from mpi4py import MPI

    rng = np.random.default_rng(0)  # the same on all ranks
    resident = world.empty(60_000)
    plan = plan_exact(resident[:20_000], world, MPI.SUM, "auto")
    wrong = []
    for k in range(200):
        n = int(rng.choice([1, 8, 9, 500, 9000, 33_000]))
        x = resident[n % 3 :][:n] if rng.integers(2) else np.empty(n, np.float32)
        x[:] = world.rank + k % 7
        want = world.size * (world.size - 1) / 2 + world.size * (k % 7)
        kind = rng.integers(5)
        if kind == 0:
            resident[:20_000] = world.rank
            plan()
            x, want = resident[:20_000], world.size * (world.size - 1) / 2
        elif kind == 1:
            world.Iallreduce(MPI.IN_PLACE, x).Wait()
        elif kind == 2:
            world.Bcast(x, root=k % world.size)
            want = k % world.size + k % 7
        else:
            world.Allreduce(MPI.IN_PLACE, x)
        if not (x == want).all():
            wrong.append((k, int(kind), n, want, x[:3]))
        if rng.integers(30) == 0:
            time.sleep(0.001 * (world.rank % 2))
    agree(world, not wrong, str(wrong[:3]))
    plan.free()
