"""The executor runs every schedule to the right sums: in a network of its own making, and over MPI."""

from __future__ import annotations

import itertools
import time

import ml_dtypes
import numpy as np
import pytest
from fake_network import DeadlockError, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitring.collectives.execution import portable as executor
from bitring.collectives.execution.portable import execute
from bitring.collectives.execution.transport import make_transport
from bitring.collectives.interop.operators import ufunc_name
from bitring.collectives.interop.steps import Progress
from bitring.collectives.schedules import program
from bitring.collectives.schedules.program import compile_program
from bitring.collectives.schedules.schedule import Algorithm, Receive, Send, algorithms, chunk_start, rounds

CASES = [(name, collective) for name in algorithms.names() for collective in algorithms.get(name).collectives()]
ALLREDUCES = [name for name, collective in CASES if collective == "allreduce"]


def contributions(size: int, n: int, dtype=np.float64, seed: int = 1) -> list[np.ndarray]:
    """Small whole numbers: their sums are exact in any order."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 9, n).astype(dtype) for _ in range(size)]


def expected(collective: str, inputs: list[np.ndarray], rank: int, root: int) -> tuple[slice, np.ndarray]:
    """The part of ``rank``'s buffer that the collective defines, and what it must hold."""
    size, n = len(inputs), inputs[0].size
    starts = [chunk_start(n, size, c) for c in range(size + 1)]
    whole, nothing = slice(0, n), slice(0, 0)
    total = sum(inputs[1:], start=inputs[0].copy())
    if collective == "allreduce":
        return whole, total
    if collective == "reduce":
        return (whole, total) if rank == root else (nothing, total[nothing])
    if collective == "reduce_scatter":
        mine = slice(starts[rank], starts[rank + 1])
        return mine, total[mine]
    if collective == "allgather":
        return whole, np.concatenate([x[starts[r] : starts[r + 1]] for r, x in enumerate(inputs)])
    return whole, inputs[root]


def check_simulated(monkeypatch, name: str, collective: str, size: int, n: int, root: int = 0, **options) -> None:
    inputs = contributions(size, n)
    buffers = [x.copy() for x in inputs]
    run(monkeypatch, algorithms.get(name)(), collective, buffers, root=root, **options)
    for rank, buffer in enumerate(buffers):
        part, want = expected(collective, inputs, rank, root)
        np.testing.assert_array_equal(
            buffer[part], want, err_msg=f"{name} {collective}, rank {rank} of {size}, {n} values, {options}"
        )


@pytest.mark.single
@pytest.mark.parametrize(("name", "collective"), CASES)
def test_every_schedule_sums_right_in_every_order_of_arrival(monkeypatch, name: str, collective: str):
    for size in (1, 2, 3, 4, 5, 8):
        for n in sorted({0, 1, size - 1, size, 7, 61}):
            for segment in (1, 3, 10**6):
                if n == 61 and segment == 1 and size > 4:
                    continue
                check_simulated(
                    monkeypatch, name, collective, size, n, segment=segment, seed=size + n, rendezvous=bool(segment % 2)
                )


@pytest.mark.single
@pytest.mark.parametrize(("name", "collective"), CASES)
def test_every_root(monkeypatch, name: str, collective: str):
    if collective not in ("reduce", "broadcast"):
        return
    for root in range(5):
        check_simulated(monkeypatch, name, collective, 5, 13, root=root, segment=2)


@pytest.mark.single
@pytest.mark.parametrize(("name", "collective"), CASES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 9),
    n=st.integers(0, 70),
    segment=st.integers(1, 20),
    seed=st.integers(0, 1000),
    rendezvous=st.booleans(),
    shared=st.integers(1, 3),
    window=st.integers(1, 3),
    own=st.integers(0, 2),
)
def test_scratch_never_deadlocks_however_little(
    monkeypatch, name, collective, size, n, segment, seed, rendezvous, shared, window, own
):
    with monkeypatch.context() as patch:
        patch.setattr(program, "SHARED_SLOTS", shared)
        patch.setattr(program, "WINDOW", window)
        patch.setattr(executor, "WINDOW", window)
        patch.setattr(program, "OWN_SLOT_STREAMS", own)
        check_simulated(patch, name, collective, size, n, segment=segment, seed=seed, rendezvous=rendezvous)


@pytest.mark.single
@pytest.mark.parametrize("name", ALLREDUCES)
@pytest.mark.parametrize("ufunc", ["add", "maximum"])
def test_bits_are_equal_on_all_ranks_and_whatever_the_timing(monkeypatch, name: str, ufunc: str):
    rng = np.random.default_rng(0)
    for size in (2, 3, 5, 8):
        inputs = [rng.normal(scale=10.0**rank, size=101).astype(np.float32) for rank in range(size)]
        for x in inputs:
            x[rng.integers(0, 101, 20)] = rng.choice(np.array([0.0, -0.0, np.inf, np.nan], "f"), 20)
        results = set()
        for seed in range(4):
            buffers = [x.copy() for x in inputs]
            run(monkeypatch, algorithms.get(name)(), "allreduce", buffers, segment=7, seed=seed, ufunc=ufunc)
            results.update(buffer.tobytes() for buffer in buffers)
        assert len(results) == 1, f"{size} ranks: {len(results)} different results"


@pytest.mark.single
def test_the_network_finds_a_deadlock(monkeypatch):
    class BothReceiveFirst(Algorithm):
        def chunks(self, size):
            return 1

        def allreduce(self, rank, size):
            yield (Receive(1 - rank, 0, 1, reduce=True),)
            yield (Send(1 - rank, 0, 1),)

    with pytest.raises(DeadlockError, match="2 of 2 ranks wait"):
        run(monkeypatch, BothReceiveFirst(), "allreduce", contributions(2, 5), segment=5)


@pytest.mark.single
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 40),
    segment=st.integers(1, 9),
    seed=st.integers(0, 99),
    slots=st.integers(1, 3),
    own=st.integers(0, 1),
)
def test_ranks_may_swap_in_one_round(monkeypatch, n, segment, seed, slots, own):
    class Rotation(Algorithm):
        """Every rank's values go round the ring and home again; and the sum is as it was."""

        def chunks(self, size):
            return 2

        def allreduce(self, rank, size):
            for _ in range(size):
                yield Send((rank + 1) % size, 0, 2), Receive((rank - 1) % size, 0, 2, reduce=False)

    with monkeypatch.context() as patch:
        patch.setattr(program, "SHARED_SLOTS", slots)
        patch.setattr(program, "OWN_SLOT_STREAMS", own)
        for size in (2, 3):
            inputs = [np.arange(n) + 100.0 * rank for rank in range(size)]
            buffers = [x.copy() for x in inputs]
            run(patch, Rotation(), "allreduce", buffers, segment=segment, seed=seed)
            np.testing.assert_array_equal(buffers, inputs)


@pytest.mark.single
def test_a_wrong_schedule_gives_a_wrong_sum(monkeypatch):
    class Twice(Algorithm):
        def chunks(self, size):
            return 1

        def allreduce(self, rank, size):
            for _ in range(2):
                yield Send(1 - rank, 0, 1), Receive(1 - rank, 0, 1, reduce=True)

    buffers = contributions(2, 5)
    want = buffers[0] + buffers[1]
    run(monkeypatch, Twice(), "allreduce", buffers, segment=2)
    np.testing.assert_array_equal(buffers[0], 2 * want)


# Over MPI.


def run_over_mpi(comm, name, collective, buffer, *, segment, op="add", root=0, persistent=False, times=1, nap=0.0):
    made = algorithms.get(name)()
    compiled = compile_program(
        rounds(made, collective, comm.rank, comm.size, root), made.chunks(comm.size), buffer.size, segment
    )
    transport = make_transport(comm, compiled, buffer, op, 0, persistent)
    before = buffer.copy()
    for _ in range(times):
        buffer[:] = before
        for turn, _ in enumerate(execute(transport, Progress())):
            if nap and turn % 3 == comm.rank % 3:
                time.sleep(nap)
    transport.close()


@pytest.fixture(scope="module")
def private():
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Dup()
    yield comm
    comm.Free()


@pytest.mark.parametrize(("name", "collective"), CASES)
@pytest.mark.parametrize("persistent", [False, True], ids=["plain", "persistent"])
def test_sizes_and_segments_over_mpi(private, agree, name: str, collective: str, persistent: bool):
    size = private.size
    root = size - 1 if collective in ("reduce", "broadcast") else 0
    wrong = ""
    for n in sorted({0, 1, size - 1, size, 13, 499}):
        for segment in (1, 3, 10**6):
            if n == 499 and segment == 1:
                segment = 17
            inputs = contributions(size, n)
            buffer = inputs[private.rank].copy()
            run_over_mpi(
                private,
                name,
                collective,
                buffer,
                segment=segment,
                root=root,
                persistent=persistent,
                times=1 + persistent,
            )
            part, want = expected(collective, inputs, private.rank, root)
            if not np.array_equal(buffer[part], want):
                wrong += f"{n} values in segments of {segment}; "
    agree(private, not wrong, wrong)


DTYPES = ["?", "b", "B", "h", "H", "i", "I", "l", "L", "e", "f", "d", "g", "F", "D", "G", ml_dtypes.bfloat16]


def test_every_dtype_and_operation_over_mpi(private, agree):
    from mpi4py import MPI

    wrong = ""
    names = itertools.cycle(ALLREDUCES)
    for dtype in [np.dtype(code) for code in DTYPES]:
        for op in (MPI.SUM, MPI.PROD, MPI.MAX, MPI.MIN, MPI.LAND, MPI.LOR, MPI.LXOR, MPI.BAND, MPI.BOR, MPI.BXOR):
            ufunc, name = ufunc_name(op, dtype), next(names)
            if ufunc is None:
                continue
            inputs = [np.random.default_rng(7 + r).integers(0, 3, 9).astype(dtype) for r in range(private.size)]
            buffer = inputs[private.rank].copy()
            run_over_mpi(private, name, "allreduce", buffer, segment=5, op=ufunc)
            want = inputs[0].copy()
            for x in inputs[1:]:
                getattr(np, ufunc)(want, x, out=want)
            if not np.array_equal(buffer, want):
                wrong += f"{ufunc} of {dtype} by {name}: {buffer} is not {want}; "
    agree(private, not wrong, wrong)


@pytest.mark.parametrize("name", ALLREDUCES)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex64])
def test_bits_are_equal_on_all_ranks_and_in_two_runs(private, agree, name: str, dtype):
    rng = np.random.default_rng(private.rank)
    x = (rng.normal(size=4999) * 10 ** rng.uniform(-3, 3, 4999)).astype(dtype)
    one, two = x.copy(), x.copy()
    run_over_mpi(private, name, "allreduce", one, segment=97)
    run_over_mpi(private, name, "allreduce", two, segment=97, nap=0.0002)
    results = private.allgather((one.tobytes(), two.tobytes()))
    agree(private, len({bits for pair in results for bits in pair}) == 1, "different bits")
    with np.errstate(all="ignore"):
        want = np.sum(private.allgather(x.astype(np.complex128)), axis=0)
        scale = np.sum(private.allgather(np.abs(x.astype(np.complex128))), axis=0)
    digits = ml_dtypes.finfo(dtype).eps
    close = np.abs(one.astype(np.complex128) - want) <= private.size * digits * scale
    agree(private, bool(close.all()), f"not the sum: {one[~close][:3]} against {want[~close][:3]}")


@pytest.mark.parametrize("name", ALLREDUCES)
@pytest.mark.parametrize("ufunc", ["maximum", "minimum", "add"])
def test_signed_zeros_and_nans_are_bit_equal(private, agree, name: str, ufunc: str):
    special = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1.0], np.float32)
    special.view(np.uint32)[2] |= 1 + private.rank  # a NaN that says whose it is
    # All pairs of special values; an odd start, so that vectorised loops begin elsewhere on each rank.
    memory = np.empty(401 + 3 * private.rank, np.float32)
    x = memory[3 * private.rank :][:401]
    x[:] = np.random.default_rng(private.rank).choice(special, 401)
    run_over_mpi(private, name, "allreduce", x, segment=50, op=ufunc)
    if ufunc == "add":
        x[np.isnan(x)] = np.nan  # which of two NaNs an addition passes on is the processor's choice
    results = private.allgather(x.tobytes())
    agree(private, len(set(results)) == 1, "different bits")


@pytest.mark.parametrize("name", ALLREDUCES)
def test_ranks_that_dawdle(private, agree, name: str):
    inputs = contributions(private.size, 257)
    buffer = inputs[private.rank].copy()
    time.sleep(0.01 * private.rank)
    run_over_mpi(private, name, "allreduce", buffer, segment=8, nap=0.001, times=2)
    agree(private, np.array_equal(buffer, sum(inputs)), "wrong sum")
