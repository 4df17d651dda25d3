"""The native executor gives, bit for bit, what the portable one gives: every schedule, many types, every cut."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

from bitring.collectives.execution import library
from bitring.collectives.execution.native import NativeTransport, served
from bitring.collectives.execution.runner import Task
from bitring.collectives.execution.transport import make_transport
from bitring.collectives.interop.operators import ufunc_name
from bitring.collectives.interop.steps import Progress
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.tags import channel_of
from bitring.collectives.schedules.program import compile_program
from bitring.collectives.schedules.schedule import algorithms, rounds
from bitring.native import native

pytestmark = pytest.mark.skipif(native() is None, reason="there is no native engine")

CASES = [(name, collective) for name in algorithms.names() for collective in algorithms.get(name).collectives()]
DTYPES = ["float64", "float16", ml_dtypes.bfloat16, "int32", "complex64", "bool", "longdouble"]


@pytest.fixture
def private(comm):
    duplicate = comm.Dup()
    yield duplicate
    duplicate.Free()


def values(n: int, dtype, rank: int) -> np.ndarray:
    """Whatever is summed of these is rounded, so that the order of a sum shows."""
    rng = np.random.default_rng(rank)
    x = rng.normal(scale=10.0 ** (rank % 3), size=n)
    if np.dtype(dtype).kind == "c":
        return (x + 1j * rng.normal(size=n)).astype(dtype)
    return (x > 1 if np.dtype(dtype) == bool else x * 1000 if np.dtype(dtype).kind == "i" else x).astype(dtype)


def both(comm, name: str, collective: str, n: int, dtype, segment: int, root: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What the two executors make of the same buffer, in two runs each."""
    from mpi4py import MPI

    made = algorithms.get(name)()
    ufunc = ufunc_name(MPI.LOR if np.dtype(dtype) == bool else MPI.SUM, np.dtype(dtype))
    schedule = rounds(made, collective, comm.rank, comm.size, root)
    program = compile_program(schedule, made.chunks(comm.size), n, segment)
    results = []
    for number in (1, 2):
        x = values(n, dtype, comm.rank)
        if number == 1:
            runner = NativeTransport(comm, program, x.dtype, ufunc, channel_of(number))
            runner.bind(x)
        else:
            runner = make_transport(comm, program, x, ufunc, channel_of(number), persistent=True)
        for _ in range(2):
            for operation in runner.steps(Progress()):
                if operation is not None:
                    operation.advance()
        runner.close()
        results.append(x)
    return results[0], results[1]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and bool(np.array_equal(a, b))


def check(comm, agree, name: str, collective: str, cases) -> None:
    wrong = [case for case in cases if not same(*both(comm, name, collective, *case))]
    agree(comm, not wrong, f"{name} {collective}: {wrong}")


@pytest.mark.parametrize(("name", "collective"), CASES)
def test_sizes_and_segments(private, agree, name: str, collective: str):
    size = private.size
    cases = [(n, np.float32, segment) for n in sorted({0, 1, size - 1, size, 7}) for segment in (1, 1000)]
    cases += [(1009, np.float32, segment) for segment in (64, 252, 5000)]
    check(private, agree, name, collective, cases)


@pytest.mark.parametrize(("name", "collective"), CASES)
def test_types(private, agree, name: str, collective: str):
    check(private, agree, name, collective, [(251, dtype, 40) for dtype in DTYPES])


@pytest.mark.parametrize(("name", "collective"), [case for case in CASES if case[1] in ("reduce", "broadcast")])
def test_roots(private, agree, name: str, collective: str):
    check(private, agree, name, collective, [(61, np.float32, 9, root) for root in range(private.size)])


@pytest.mark.parametrize("name", ["binomial_tree", "double_binary_tree", "ring"])
def test_a_thousand_messages(private, agree, name: str):
    check(private, agree, name, "allreduce", [(2003, np.float64, 2)])


def test_large_messages_that_wait_for_their_receive(private, agree):
    check(private, agree, "ring", "allreduce", [(700_001, np.float32, 200_000)])


def test_what_is_served():
    assert served(np.dtype(np.float32), "add", reduces=True)
    assert served(np.dtype("M8[s]"), None, reduces=False)
    assert not served(np.dtype(np.float32).newbyteorder(), "add", reduces=True)
    assert not served(np.dtype(np.float32), None, reduces=True)


@pytest.mark.parametrize("number", [0, 5])
def test_a_rank_without_the_engine_makes_the_same_call_of_the_librarys(comm, agree, monkeypatch, number):
    """A persistent collective of some ranks does not meet another kind of the others."""
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(library, "native", lambda: None)
    context, x = context_of(comm), np.full(9, comm.rank + 1.0)
    runner = library.LibraryRunner(context, Task("allreduce", x, MPI.SUM, number=number))
    for _ in range(2):
        x[:] = comm.rank + 1
        context.queue.call(runner.steps, "a test")
    runner.close()
    agree(comm, bool((x == sum(range(1, comm.size + 1))).all()), f"{x}")
