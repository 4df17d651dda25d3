"""Communicator is a drop-in for mpi4py's: arguments, operations, dtypes, derived communicators, requests, leaks."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI
from run import launcher

from bitring.collectives.communicator import Communicator
from bitring.collectives.runtime.context import Context, context_of
from bitring.collectives.schedules.schedule import algorithms
from bitring.errors import MismatchError, PeerError

ALGORITHMS = ["auto", *algorithms.names()]


@pytest.fixture
def world(comm):
    duplicate = Communicator(comm.Dup(), algorithm="ring")
    yield duplicate
    duplicate.Free()


def triangle(comm) -> int:
    return comm.size * (comm.size + 1) // 2


def text_of(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# Arguments


@pytest.mark.parametrize("name", ALGORITHMS, ids="with_{}".format)  # pytest-mpi takes "mpi" for its mark
def test_every_call_with_every_algorithm(comm, agree, name: str):
    from mpi4py import MPI

    world = Communicator(comm.Dup(), algorithm=name)
    size, rank, last = world.size, world.rank, world.size - 1
    wrong = []

    def check(what: str, got, want) -> None:
        if not np.array_equal(got, want):
            wrong.append(f"{what} of {n}: {got}")

    for n in (0, 1, 5, 30_011):
        ones, total = np.full(n, rank + 1.0), np.full(n, float(triangle(world)))
        y = np.zeros(n)
        world.Allreduce(ones, y)
        check("Allreduce", y, total)
        check("Allreduce's sendbuf", ones, np.full(n, rank + 1.0))
        y = ones.copy()
        world.Allreduce(MPI.IN_PLACE, y)
        check("Allreduce in place", y, total)
        y = np.zeros(n)
        world.Iallreduce(ones, y).Wait()
        check("Iallreduce", y, total)
        request = world.Allreduce_init(ones, y)
        for _ in range(2):
            y[:] = 0
            request.Start()
            request.Wait()
            check("Allreduce_init", y, total)
        request.Free()
        for root in {0, last}:
            y = np.zeros(n)
            world.Reduce(ones, y if rank == root else None, root=root)
            check("Reduce", y, total if rank == root else np.zeros(n))
            y = ones.copy()
            world.Reduce(MPI.IN_PLACE if rank == root else y, y if rank == root else None, root=root)
            check("Reduce in place", y, total if rank == root else ones)
            y = np.full(n, float(rank))
            world.Bcast(y, root=root)
            check("Bcast", y, np.full(n, float(root)))
        whole = np.arange(float(size * n))
        y = np.zeros(n)
        world.Reduce_scatter_block(whole, y)
        check("Reduce_scatter_block", y, size * whole[rank * n : (rank + 1) * n])
        both = whole.copy()
        world.Reduce_scatter_block(MPI.IN_PLACE, both)
        check("Reduce_scatter_block in place", both[:n], size * whole[rank * n : (rank + 1) * n])
        gathered = np.zeros((size, n))
        world.Allgather(ones, gathered)
        check("Allgather", gathered, np.repeat(np.arange(1.0, size + 1), n).reshape(size, n))
        gathered[:] = 0
        gathered[rank] = ones
        world.Allgather(MPI.IN_PLACE, gathered)
        check("Allgather in place", gathered, np.repeat(np.arange(1.0, size + 1), n).reshape(size, n))
        gathered[:] = 0
        world.Iallgather(ones, gathered).Wait()
        check("Iallgather", gathered, np.repeat(np.arange(1.0, size + 1), n).reshape(size, n))
    agree(world, not wrong, "; ".join(wrong[:3]))
    world.Free()


OPERATIONS = ["SUM", "PROD", "MAX", "MIN", "LAND", "LOR", "LXOR", "BAND", "BOR", "BXOR"]
DTYPES = ["?", "b", "B", "h", "H", "i", "I", "l", "L", "f", "d", "g", "F", "D", "G"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_as_the_library_has_them(world, agree, operation: str):
    from mpi4py import MPI

    op, wrong, compared = getattr(MPI, operation), [], 0
    plain = MPI.Intracomm(world)
    for code in DTYPES:
        x = np.random.default_rng(world.rank).integers(0, 3, 23).astype(code)
        own, theirs = x.copy(), x.copy()
        try:
            plain.Allreduce(MPI.IN_PLACE, theirs, op)
        except MPI.Exception:
            if text_of(lambda own=own: world.Allreduce(MPI.IN_PLACE, own, op)) == "":
                continue  # bitring may do what MPI does not define
            continue
        world.Allreduce(MPI.IN_PLACE, own, op)
        compared += 1
        if not np.array_equal(own, theirs):
            wrong.append(f"{operation} of {np.dtype(code)}: {own} is not {theirs}")
    agree(world, not wrong and compared >= 8, f"{compared} compared; {wrong[:2]}")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bit_floats(world, agree, dtype):
    from mpi4py import MPI

    for op, want in [
        (MPI.SUM, triangle(world)),
        (MPI.MAX, world.size),
        (MPI.MIN, 1),
        (MPI.PROD, np.prod(np.arange(1, world.size + 1))),
    ]:
        x = np.full(11, world.rank + 1).astype(dtype)
        world.Allreduce(MPI.IN_PLACE, x, op)
        agree(world, bool((x == np.array(want).astype(dtype)).all()), f"{want}: {x}")
    # Each step rounds once: 2048 + 1 is 2048 in float16, and 256 + 1 is 256 in bfloat16.
    big = 2048 if dtype == np.float16 else 256
    x = np.full(3, big if world.rank == 0 else 1).astype(dtype)
    world.Allreduce(MPI.IN_PLACE, x)
    agree(world, world.size != 2 or bool((x == big).all()), str(x))


def test_pairs_with_a_location(world, agree):
    from mpi4py import MPI

    x = np.zeros(3, dtype=np.dtype([("value", "d"), ("index", "i")], align=True))
    x["value"], x["index"] = -world.rank, world.rank
    out = np.zeros_like(x)
    world.Allreduce([x, 3, MPI.DOUBLE_INT], [out, 3, MPI.DOUBLE_INT], MPI.MINLOC)
    agree(world, bool((out["index"] == world.size - 1).all()), str(out))


def test_buffer_specifications(world, agree):
    from mpi4py import MPI

    want = triangle(world)
    x = np.zeros(10)

    def ones():
        x[:] = world.rank + 1

    cases = {
        "[x, MPI.DOUBLE]": ([x, MPI.DOUBLE], slice(0, 10)),
        "[x, 'd']": ([x, "d"], slice(0, 10)),
        "[x, 4]": ([x, 4], slice(0, 4)),
        "[x, 4, MPI.DOUBLE]": ([x, 4, MPI.DOUBLE], slice(0, 4)),
        "(x, (4, 3))": ((x, (4, 3)), slice(3, 7)),
        "[x, (4, 3), 'd']": ([x, (4, 3), "d"], slice(3, 7)),
        "[x, 4, 3, MPI.DOUBLE]": ([x, 4, 3, MPI.DOUBLE], slice(3, 7)),
        "[x, None, MPI.DOUBLE]": ([x, None, MPI.DOUBLE], slice(0, 10)),
    }
    for what, (spec, part) in cases.items():
        ones()
        world.Allreduce(MPI.IN_PLACE, spec)
        expected = np.full(10, world.rank + 1.0)
        expected[part] = want
        agree(world, np.array_equal(x, expected), f"{what}: {x}")
    raw = bytearray(np.full(4, world.rank + 1, np.int32).tobytes())
    world.Allreduce(MPI.IN_PLACE, [raw, MPI.INT])
    agree(world, bool((np.frombuffer(raw, np.int32) == want).all()), str(raw))
    import array

    values = array.array("i", [world.rank + 1] * 3)
    world.Allreduce(MPI.IN_PLACE, values)
    agree(world, list(values) == [want] * 3, str(values))
    fortran = np.asfortranarray(np.arange(12.0).reshape(3, 4) * (world.rank + 1))
    world.Allreduce(MPI.IN_PLACE, fortran)
    agree(world, np.array_equal(fortran, np.arange(12.0).reshape(3, 4) * want), str(fortran))
    scalar = np.array(world.rank + 1.0)
    world.Allreduce(MPI.IN_PLACE, scalar)
    agree(world, float(scalar) == want, str(scalar))


def test_memory_orders(world, agree):
    """Alike on all ranks where two axes are longer than 1, and in both of a call's buffers."""
    from mpi4py import MPI

    size, odd = world.size, world.rank == world.size - 1
    c = np.arange(6.0).reshape(2, 3)
    fortran = np.asfortranarray(c)
    calls = {
        "Allreduce": lambda x: world.Allreduce(MPI.IN_PLACE, x),
        "Allreduce of two": lambda x: world.Allreduce(x, x.copy(order="K")),
        "Iallreduce": lambda x: world.Iallreduce(MPI.IN_PLACE, x).Wait(),
        "Allreduce_init": lambda x: world.Allreduce_init(MPI.IN_PLACE, x).Free(),
        "Reduce": lambda x: world.Reduce(x, x.copy(order="K")),
        "Reduce_scatter_block": lambda x: world.Reduce_scatter_block(np.repeat(x.reshape(-1), size), x),
        "Allgather": lambda x: world.Allgather(x, np.empty(size * 6)),
        "Iallgather": lambda x: world.Iallgather(x, np.empty(size * 6)).Wait(),
        "Bcast": lambda x: world.Bcast(x),
    }
    for algorithm in ("ring", "auto"):
        world._algorithm = algorithm
        for what, call in calls.items():
            for usual, other in ((c, fortran), (fortran, c)):
                text = text_of(lambda call=call, x=other if odd else usual: call(x.copy(order="K")))
                wrong = size > 1 and not text.startswith(f"MismatchError: {what.split()[0]}: ranks disagree on order: ")
                agree(world, not wrong and (size > 1) == bool(text), f"{what} by {algorithm}: {text}")
            same = text_of(lambda call=call: call(fortran.copy(order="K")))
            agree(world, same == "", f"{what} of Fortran order: {same}")
    row = np.arange(3.0).reshape(1, 3)  # whose one longer axis has no order
    world.Bcast(np.asfortranarray(row) if odd else row)
    for send, receive in ((c, fortran.copy(order="K")), (fortran, c.copy())):
        text = text_of(lambda send=send, receive=receive: world.Allreduce(send, receive))
        agree(world, "Allreduce: sendbuf and recvbuf must have one memory order; got " in text, text)
    total = np.asfortranarray(np.zeros((3, size)))
    world.Allgather(np.full(3, float(world.rank)), total)  # one axis has no order: columns, as in Fortran
    agree(world, np.array_equal(total, np.tile(np.arange(size), (3, 1))), str(total))


def test_what_only_the_library_serves(world, agree):
    from mpi4py import MPI

    def join(a, b, datatype):
        np.frombuffer(b, np.int64)[:] += 10 * np.frombuffer(a, np.int64)

    own = MPI.Op.Create(join, commute=True)
    x, out = np.full(4, 1), np.zeros(4, np.int64)
    plain = np.zeros(4, np.int64)
    MPI.Intracomm(world).Allreduce(x, plain, own)
    world.Allreduce(x, out, own)
    agree(world, np.array_equal(out, plain), f"own operation: {out}")
    request = world.Iallreduce(x, out, own)
    request.Wait()
    agree(world, np.array_equal(out, plain), f"own operation, nonblocking: {out}")
    own.Free()

    vector = MPI.DOUBLE.Create_vector(3, 1, 2).Commit()
    y = np.full(5, float(world.rank))
    world.Bcast([y, 1, vector], root=0)
    agree(world, np.array_equal(y, [0, world.rank, 0, world.rank, 0]), f"derived datatype: {y}")
    vector.Free()

    # One rank needs the library's call: all take it, with equal type signatures.
    y = np.full(3, float(world.rank))
    triple = MPI.DOUBLE.Create_contiguous(3).Commit()
    world.Bcast([y, 1, triple] if world.rank == world.size - 1 else y, root=0)
    agree(world, bool((y == 0).all()), f"mixed datatypes: {y}")
    triple.Free()


def test_not_for_intercommunicators(world, agree):

    if world.size > 1:
        half = world.Split(world.rank % 2, world.rank)
        inter = half.Create_intercomm(0, world, 1 - world.rank % 2)
        text = text_of(lambda: Communicator(inter))
        agree(world, text == "TypeError: Communicator: comm must be an MPI.Intracomm; got Intercomm", text)
        x, y = np.full(3, 1.0), np.zeros(3)
        inter.Allreduce(x, y)  # mpi4py's own
        other = len(range(1 - world.rank % 2, world.size, 2))
        agree(world, bool((y == other).all()), str(y))
        inter.Free()
        half.Free()
    text = text_of(lambda: Communicator(5))  # pyright: ignore[reportArgumentType]
    agree(world, text.startswith("TypeError: Communicator: comm must be an MPI.Intracomm"), text)


# Derived communicators


def test_derived_communicators_keep_the_algorithm(world, agree):
    from mpi4py import MPI

    group = world.Get_group()
    derived = {
        "Dup": world.Dup(),
        "Clone": world.Clone(),
        "Split": world.Split(world.rank % 2, -world.rank),
        "Split_type": world.Split_type(MPI.COMM_TYPE_SHARED),
        "Create": world.Create(group),
        "Create_group": world.Create_group(group),
    }
    for how, comm in derived.items():
        agree(world, type(comm) is Communicator and comm.algorithm == "ring", f"{how}: {comm!r}")
        x = np.full(7, 1.0)
        comm.Allreduce(MPI.IN_PLACE, x)
        agree(world, bool((x == comm.size).all()), f"{how}: {x}")
        comm.Free()
        agree(world, comm == MPI.COMM_NULL, f"{how} is not null after Free")
    out = world.Split(MPI.UNDEFINED if world.rank == 0 else 0)
    agree(world, (out == MPI.COMM_NULL) == (world.rank == 0), "Split with MPI.UNDEFINED")
    if world.rank != 0:
        out.Free()
    group.Free()


def test_a_subclass_stays_one(comm, agree):
    class Mine(Communicator):
        pass

    mine = Mine(comm, algorithm="recursive_doubling")
    again = mine.Dup()
    agree(comm, type(again) is Mine and again.algorithm == "recursive_doubling", repr(again))
    again.Free()


def test_two_libraries_on_one_communicator(world, agree):
    """Each wraps the same communicator, with its own algorithm, and the program goes on using it by itself."""
    from mpi4py import MPI

    one, two = Communicator(world, algorithm="ring"), Communicator(world, algorithm="recursive_doubling")
    agree(world, context_of(one) is context_of(two), "two states")
    rank, size = world.rank, world.size
    right, left = (rank + 1) % size, (rank - 1) % size
    xs = [np.full(400, rank + 1.0), np.full(500, rank + 1.0)]
    came = np.zeros(1, np.int64)
    pending = [
        world.Irecv(came, left, tag=0),
        one.Iallreduce(MPI.IN_PLACE, xs[0]),
        two.Iallreduce(MPI.IN_PLACE, xs[1]),
        world.Isend(np.array([rank]), right, tag=0),
    ]
    said = world.bcast("hello", root=0)
    MPI.Request.Waitall(pending)
    agree(world, came[0] == left and said == "hello", "the program's own messages were disturbed")
    agree(world, all((x == triangle(world)).all() for x in xs), "wrong sum")


# Requests


def test_requests_complete_in_any_mixture(world, agree):
    from mpi4py import MPI

    rank, size = world.rank, world.size
    other = world.Dup()
    right, left = (rank + 1) % size, (rank - 1) % size
    kept = np.zeros(700)
    persistent = world.Allreduce_init(MPI.IN_PLACE, kept)

    def begin():
        xs = [np.full(n, rank + 1.0) for n in (1, 3000, 20_000, 5)]
        came = np.zeros(2)
        comms = [world, other, world, other]
        requests = [comm.Iallreduce(MPI.IN_PLACE, x) for comm, x in zip(comms, xs, strict=True)]
        requests.insert(1, world.Irecv(came, left, tag=5))
        requests.append(world.Isend(np.full(2, float(rank)), right, tag=5))
        kept[:] = rank + 1.0
        persistent.Start()
        return [*xs, kept], came, [*requests, persistent]

    def waitany(requests):
        left_over = len(requests)
        while left_over:
            assert MPI.Request.Waitany(requests) != MPI.UNDEFINED
            left_over -= 1

    def waitsome(requests):
        done = 0
        while done < len(requests):
            done += len(MPI.Request.Waitsome(requests) or [])

    def testall(requests):
        while not MPI.Request.Testall(requests):
            time.sleep(0.0002)

    def one_by_one(requests):
        for request in reversed(requests):
            while not request.Test():
                time.sleep(0.0002)

    ways = {
        "Waitall": MPI.Request.Waitall,
        "Waitany": waitany,
        "Waitsome": waitsome,
        "Testall": testall,
        "Test": one_by_one,
        "Wait": lambda requests: [request.Wait() for request in requests[::-1]],
    }
    for how, complete in ways.items():
        xs, came, requests = begin()
        complete(requests)
        good = all((x == triangle(world)).all() for x in xs) and bool((came == left).all())
        agree(world, good, f"{how}: {[x[0] for x in xs]} {came}")
    persistent.Free()
    other.Free()


def test_communicators_in_different_orders(world, agree):
    from mpi4py import MPI

    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        pytest.skip("needs the progress thread")
    comms = [world.Dup() for _ in range(3)]
    xs = [np.full(2000 + k, world.rank + 1.0) for k in range(3)]
    order = np.random.default_rng(world.rank).permutation(3)
    requests = [comms[k].Iallreduce(MPI.IN_PLACE, xs[k]) for k in order]
    MPI.Request.Waitall(requests)
    agree(world, all((x == triangle(world)).all() for x in xs), "wrong sum")
    for comm in comms:
        comm.Free()


def test_the_first_call_of_a_communicator_may_be_nonblocking(comm, agree):
    """A rank that begins it goes on, though another comes to it only later."""
    from mpi4py import MPI

    world, x, last = Communicator(comm.Dup(), algorithm="ring"), np.full(50, comm.rank + 1.0), comm.size - 1
    if world.rank == last and last > 0:
        world.recv(source=0)
    request = world.Iallreduce(MPI.IN_PLACE, x)
    if world.rank == 0 and last > 0:
        world.send("begun", dest=last)
    request.Wait()
    agree(world, bool((x == triangle(world)).all()), str(x))
    world.Free()


def test_persistent_requests(world, agree):
    from mpi4py import MPI

    x, y = np.zeros(600), np.zeros(600)
    inputs = np.full(600, world.rank + 1.0)
    one, two = world.Allreduce_init(MPI.IN_PLACE, x), world.Allreduce_init(inputs, y, MPI.MAX)
    for turn in range(4):
        x[:] = world.rank + 1
        y[:] = 0
        one.Start()
        two.Start()
        if turn % 2:
            MPI.Request.Waitall([two, one])
        else:
            while not one.Test():
                pass
            two.Wait()
        agree(world, bool((x == triangle(world)).all() and (y == world.size).all()), f"{x[0]} {y[0]}")
    one.Start()
    for forbidden in (one.Start, one.Free):
        with pytest.raises(RuntimeError, match="active request of Allreduce_init"):
            forbidden()
    one.Wait()
    with pytest.raises(MPI.Exception):
        MPI.Prequest.Startall([one])
    one.Free()
    two.Free()
    with pytest.raises(RuntimeError, match="freed request"):
        one.Start()
    agree(world, one == MPI.REQUEST_NULL, "not freed")


def test_a_hundred_requests_at_once(world, agree):
    from mpi4py import MPI

    xs = [np.full(9, world.rank + k) for k in range(100)]
    MPI.Request.Waitall([world.Iallreduce(MPI.IN_PLACE, x) for x in xs])
    base = sum(range(world.size))
    agree(world, all((x == base + k * world.size).all() for k, x in enumerate(xs)), "wrong sum")


# What is left behind


def resident_nbytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def split_and_free(world, times: int) -> None:
    from mpi4py import MPI

    x = np.ones(3)
    for k in range(times):
        part = world.Split((world.rank + k) % 2, world.rank)
        if k % 2:
            x[:] = 1
            part.Allreduce(MPI.IN_PLACE, x)
            assert x[0] == part.size
        part.Free()


def check_no_leak(world, agree, times: int) -> None:
    split_and_free(world, 100)
    gc.collect()
    nbytes, files = resident_nbytes(), len(os.listdir("/proc/self/fd"))
    split_and_free(world, times)
    gc.collect()
    grown = resident_nbytes() - nbytes
    agree(world, grown < 16 << 20, f"{grown} bytes more after {times} communicators")
    agree(world, len(os.listdir("/proc/self/fd")) <= files, "open files were left behind")


@pytest.mark.timeout(600)
def test_splits_leave_nothing_behind(world, agree):
    # MPICH has 2046 communicators in all; with more ranks than that takes too long.
    check_no_leak(world, agree, 2200 if world.size <= 2 else 300)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_splits_leave_nothing_behind(world, agree):
    check_no_leak(world, agree, 10_000)


def test_wrapping_costs_no_communicator(comm, agree):
    x = np.zeros(1)
    again = Communicator(comm)
    for _ in range(3000):
        again = Communicator(comm)
    again.Allreduce(None, x)
    agree(comm, True)


def test_memory_does_not_grow_with_calls(world, agree):
    from mpi4py import MPI

    def calls(times: int) -> None:
        for k in range(times):
            x = np.zeros(1 + k % 50)
            world.Allreduce(MPI.IN_PLACE, x)
            world.Iallreduce(MPI.IN_PLACE, x).Wait()

    calls(100)
    gc.collect()
    before = resident_nbytes()
    calls(200)
    gc.collect()
    agree(world, resident_nbytes() - before < 8 << 20, f"{resident_nbytes() - before} bytes more")
    agree(world, len(context_of(world).cache) <= 16, f"{len(context_of(world).cache)} transports kept")


# Long messages, and thread levels


def memory_free_nbytes() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["ring", "auto", "mpi"], ids="with_{}".format)
def test_more_than_two_gibibytes(comm, agree, name: str):
    from mpi4py import MPI

    n = (1 << 31) + 12_345
    if comm.size > 2 or comm.bcast(memory_free_nbytes()) < comm.size * 2 * n:
        pytest.skip("needs 2 ranks at most, and 5 GB for each")
    world = Communicator(comm.Dup(), algorithm=name)
    x = np.full(n, world.rank + 1, np.uint8)
    world.Allreduce(MPI.IN_PLACE, x)
    agree(world, all((x[k : k + (1 << 26)] == triangle(world)).all() for k in range(0, n, 1 << 26)), "wrong sum")
    world.Free()


@pytest.mark.single
@pytest.mark.parametrize("level", ["single", "serialized"])
def test_below_thread_multiple(clean_environment, level: str):
    text = f"""
import mpi4py
mpi4py.rc.thread_level = {level!r}
import numpy as np
from mpi4py import MPI
from bitring.collectives.communicator import Communicator
assert MPI.Query_thread() < MPI.THREAD_MULTIPLE
for name in ("ring", "rabenseifner", "mpi"):
    world = Communicator(MPI.COMM_WORLD.Dup(), algorithm=name)
    xs = [np.ones(n) for n in (1, 50, 30_000)]
    for x in xs:
        world.Allreduce(MPI.IN_PLACE, x)
    MPI.Request.Waitall([world.Iallreduce(MPI.IN_PLACE, x) for x in xs])
    request = world.Allreduce_init(MPI.IN_PLACE, xs[0])
    request.Start(); request.Wait(); request.Free()
    assert (xs[0] == world.size ** 3).all() and all((x == world.size ** 2).all() for x in xs[1:])
    world.Free()
print("well", flush=True)
"""
    prefix, extra = launcher(2)
    done = subprocess.run(
        [*prefix, sys.executable, "-c", text],
        env=clean_environment(**extra),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.stdout.count("well") == 2, done.stdout + done.stderr


def test_calls_of_many_sizes_keep_little_scratch(comm, agree):
    from mpi4py import MPI

    ours = Communicator(comm, algorithm="ring").Dup()
    for mib in range(1, 33):
        ours.Allreduce(MPI.IN_PLACE, np.ones(mib << 18, np.float32))
    kept = sum(t.scratch_nbytes for alike in context_of(ours).cache.values() for t in alike)
    agree(comm, kept <= 64 << 20, f"{kept} bytes are kept")
    agree(comm, comm.size == 1 or kept > 0, "nothing is kept")
    ours.Free()


# What the MPI library refuses


@pytest.mark.parametrize("n", [10, 300_000])
def test_buffers_that_overlap_are_taken_as_they_are(comm, agree, n: int):
    from mpi4py import MPI

    world = Communicator(comm.Dup(), algorithm="mpi")
    size, rank = world.size, world.rank
    x, blocks, parts = np.full(n, rank + 1.0), np.full(size * n, rank + 1.0), np.zeros(size * n)
    parts[rank * n : (rank + 1) * n] = rank + 1
    world.Reduce(x, x if rank == 0 else None, root=0)
    agree(comm, bool((x == (triangle(comm) if rank == 0 else rank + 1)).all()), f"Reduce: {x[:3]}")
    x[:] = rank + 1
    for call in (world.Allreduce, lambda a, b: world.Iallreduce(a, b).Wait()):
        x[:] = rank + 1
        call(x, x)
        agree(comm, bool((x == triangle(comm)).all()), f"Allreduce: {x[:3]}")
    request = world.Allreduce_init(x, x)
    x[:] = rank + 1
    request.Start()
    request.Wait()
    request.Free()
    agree(comm, bool((x == triangle(comm)).all()), f"Allreduce_init: {x[:3]}")
    world.Reduce_scatter_block(blocks, blocks[:n])
    agree(comm, bool((blocks[:n] == triangle(comm)).all()), f"Reduce_scatter_block: {blocks[:3]}")
    world.Allgather(parts[rank * n : (rank + 1) * n], parts)
    agree(comm, bool((parts == np.repeat(np.arange(1.0, size + 1), n)).all()), f"Allgather: {parts[::n]}")
    for k in range(3):  # no rank is a call ahead
        x[:] = k * (rank + 1)
        y = np.zeros(n)
        world.Reduce(x, y if rank == 0 else None, MPI.SUM, root=0)
        agree(comm, rank != 0 or bool((y == k * triangle(comm)).all()), f"{k}: {y[:3]}")
    world.Free()


@pytest.mark.parametrize("n", [10, 300_000])
def test_what_the_library_refuses_on_one_rank_is_an_error_on_all(comm, agree, n: int):
    from mpi4py import MPI

    world = Communicator(comm.Dup())
    rank, root = world.rank, world.size - 1
    strided, other = np.full(2 * n, rank + 1.0), np.zeros(2 * n)
    vector = MPI.DOUBLE.Create_vector(n, 1, 2).Commit()

    def add(ours, theirs, datatype) -> None:
        np.frombuffer(theirs)[::2] += np.frombuffer(ours)[::2]

    own = MPI.Op.Create(add, commute=True)
    for k in range(3):
        # The root alone hands over one buffer as both.
        text = text_of(lambda: world.Reduce([strided, 1, vector], [strided, 1, vector], own, root))
        wanted = "Exception: " if rank == root else f"PeerError: Reduce: rank {root} could not take part: "
        agree(comm, text.startswith(wanted), text)
        strided[:] = k * (rank + 1)
        world.Reduce([strided, 1, vector], [other, 1, vector] if rank == root else None, own, root)
        agree(comm, rank != root or bool((other[:-1:2] == k * triangle(comm)).all()), f"{k}: {other[:4]}")
        x = np.full(n, rank + 1.0)
        world.Allreduce(MPI.IN_PLACE, x)
        agree(comm, bool((x == triangle(comm)).all()), f"{x[:3]}")
        text = text_of(lambda: world.Iallreduce([strided, 1, vector], [other, 1, vector]).Wait())
        agree(comm, text.startswith("Exception: "), text)  # no library sums derived datatypes
    vector.Free()
    own.Free()
    world.Free()


def raised(call):
    try:
        call()
    except Exception as error:
        return error
    return None


def test_communicators_are_made_by_all_ranks_or_by_none(agree):
    """A rank in another call, or with bad arguments, is an error on all ranks, not a wait in the library."""
    world = Communicator(MPI.COMM_WORLD.Dup())
    last, first = world.rank == world.size - 1, world.rank == 0
    group = world.Get_group()
    for right, wrong, text in (
        (lambda: world.Split(0), lambda: world.Split("red"), "Split: color must be an int of 32 bits; got 'red'"),  # pyright: ignore[reportArgumentType]
        (lambda: world.Split(0, 0), lambda: world.Split(0, 1 << 40), "Split: key must be an int of 32 bits"),
        (lambda: world.Split(0), lambda: world.Split(-7), "Split: color must be at least 0, or MPI.UNDEFINED; got -7"),
        (lambda: world.Create(group), lambda: world.Create(3), "Create: group must be an MPI.Group; got int"),  # pyright: ignore[reportArgumentType]
        (lambda: world.Dup(), lambda: world.Dup(3), "Dup: info must be an MPI.Info; got int"),  # pyright: ignore[reportArgumentType]
    ):
        error = raised(wrong if last else right)
        kinds = (TypeError, ValueError) if last else PeerError
        agree(world, isinstance(error, kinds) and text in str(error), repr(error))
    if world.size > 1:
        error = raised(lambda: world.Split(0) if first else world.Dup())
        agree(world, isinstance(error, MismatchError) and "Dup" in str(error) and "Split" in str(error), repr(error))
    parts = [world.Split(world.rank % 2 == 0), world.Dup(), world.Create(group)]
    x = np.zeros(3)
    for part in parts:
        part.Allreduce(np.ones(3), x)
        agree(world, bool((x == part.size).all()))
        part.Free()
    group.Free()
    world.Free()


def test_a_duplicate_that_the_library_cannot_make_is_not_used(comm, agree):
    """MPICH crashes when what it has made of one is used."""

    answers = iter([MPI.Exception(MPI.ERR_OTHER)])

    def test() -> bool:
        for error in answers:
            raise error
        return True  # as of a request that is over

    made: Any = SimpleNamespace(Test=test)
    context = Context(MPI.Intracomm(comm.Dup()), made, comm.rank, list(range(comm.size)))
    errors = [raised(lambda: context.queue.call(lambda progress: iter(()), "try")) for _ in range(2)]  # pyright: ignore[reportArgumentType]
    agree(comm, "could not duplicate the communicator; where too many are in use" in str(errors[0]), repr(errors[0]))
    agree(comm, "unusable since the MPI library could not duplicate it" in str(errors[1]), repr(errors[1]))
    time.sleep(0.1)  # the progress thread may have something to tell
    agree(comm, context.queue.contact is None, "messages went through it")
    context.close()


def test_free_while_the_first_call_is_under_way(comm, agree):
    """Its duplicate may not be there yet; what is under way ends, done or with an error that says so."""
    for late in range(comm.size):
        other = Communicator(comm.Dup())
        x, total = np.ones(1000, np.float32), np.empty(1000, np.float32)
        if comm.rank == late:
            time.sleep(0.05)
        request = other.Iallreduce(x, total)
        other.Free()
        try:
            request.Wait()
        except RuntimeError as error:
            agree(comm, "was freed" in str(error), repr(error))
        else:
            agree(comm, bool(np.all(total == comm.size)), repr(total[:3]))
        comm.Barrier()
