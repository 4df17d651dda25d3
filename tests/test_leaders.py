"""Small collectives across nodes, in the messages by which ranks find out whether they mean the same.

Ranks take themselves for nodes of one rank each, or for two nodes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mismatches
import numpy as np
import pytest
from mpi4py import MPI
from waiting import needs_no_job

from bitring.collectives.allreduce import allreduce
from bitring.collectives.communicator import Communicator
from bitring.collectives.plan import plan_exact
from bitring.collectives.runtime import watch
from bitring.collectives.runtime.context import context_of
from bitring.errors import MismatchError, PeerError

HOSTS = Path(__file__).resolve().parent.parent / "benchmarks" / "hosts.py"

SIZES = [0, 1, 3, 1009, 4096, 4099, 16_381, 40_009, 70_001]
"""Around the sizes at which the way changes: 16 KiB of values, and the 64 or 256 KiB of a message."""


@pytest.fixture(params=["apart", "two_nodes"])
def world(request: pytest.FixtureRequest) -> Communicator:
    return request.getfixturevalue(request.param)


def values(rank: int, n: int, dtype: Any) -> np.ndarray:
    random = np.random.default_rng(rank)
    if np.dtype(dtype).kind in "iu":
        return random.integers(1, 5, n).astype(dtype)
    return random.normal(size=n).astype(dtype)


@pytest.mark.parametrize(
    ("n", "dtype", "op"),
    [
        *((n, np.float32, "SUM") for n in SIZES),
        (1, np.float16, "MAX"),
        (1009, np.int16, "PROD"),
        (1031, np.complex128, "SUM"),
        (40_009, np.float16, "SUM"),
    ],
)
def test_sums_are_right_and_have_equal_bits_in_every_run(world, agree, n: int, dtype: Any, op: str):
    size, operation = world.Get_size(), getattr(MPI, op)
    ufunc = {"SUM": np.add, "PROD": np.multiply, "MAX": np.maximum}[op]
    want = ufunc.reduce([values(r, n, dtype) for r in range(size)], dtype=dtype)
    tolerance = 2e-2 if dtype is np.float16 else 1e-5
    x = values(world.rank, n, dtype)
    y = np.empty_like(x)
    plan = plan_exact(y, world, operation, "leaders")
    agree(world, plan.algorithm == "leaders", f"{plan.algorithm}: {plan.why}")
    results: list[bytes] = []
    for how in ("called", "started", "called", "Allreduce", "Allreduce", "allreduce", "allreduce"):
        y[...] = x
        if how == "called":
            plan()
        elif how == "started":
            plan.start()
            plan.wait()
        elif how == "Allreduce":
            Communicator(world, algorithm="leaders").Allreduce(x, y, operation)
        else:
            allreduce(x, out=y, op=operation, comm=world, algorithm="leaders")
        results.append(y.tobytes())
        close = np.allclose(y, want, rtol=tolerance, atol=tolerance)
        agree(world, bool(close), f"{how}: {y} instead of {want}")
    agree(world, len(set(results)) == 1, "runs have different bits")
    agree(world, len(set(world.allgather(results[0]))) == 1, "ranks have different bits")
    plan.free()


@pytest.fixture
def dealt(comm: Any, on_nodes: Any) -> Iterator[Communicator]:
    """Ranks are on two nodes in turn, so that those of a node are no neighbours."""
    if comm.size < 3:
        pytest.skip("needs ranks for two nodes of which one has two")
    with on_nodes(lambda rank, size: rank % 2, "auto") as duplicate:
        yield duplicate


@pytest.fixture(params=["apart", "two_nodes", "dealt", "one_node"])
def place(request: pytest.FixtureRequest) -> Communicator:
    return Communicator(request.getfixturevalue("comm" if request.param == "one_node" else request.param))


@pytest.mark.parametrize("n", [0, 1, 2053, 16_384, 16_385, 40_009])
def test_other_collectives(place, agree, n: int):
    """The third time and from then on by the fast path, in place and out of place, from and to each root."""
    size, rank = place.Get_size(), place.Get_rank()
    everyone = [values(r, n, np.float32) for r in range(size)]
    x, total = everyone[rank], np.sum(everyone, axis=0, dtype=np.float64)
    blocks = np.tile(x, size)
    for algorithm, turn in [("auto", k) for k in range(2 * size)] + [("leaders", 0), ("leaders", 1)]:
        comm, root = Communicator(place, algorithm=algorithm), turn % size
        copied = x.copy()
        comm.Bcast(copied, root)
        gathered, again = np.empty((size, n), np.float32), np.empty((size, n), np.float32)
        comm.Allgather(x, gathered)
        again[rank] = x
        comm.Allgather(MPI.IN_PLACE, again)
        reduced, block, inside, summed = np.empty(n, np.float32), np.empty(n, np.float32), x.copy(), blocks.copy()
        comm.Reduce(x, reduced, root=root)
        comm.Reduce(MPI.IN_PLACE if rank == root else inside, inside, MPI.SUM, root)
        comm.Reduce_scatter_block(blocks, block)
        comm.Reduce_scatter_block(MPI.IN_PLACE, summed)
        sums = {"Reduce": reduced, "in place": inside} if rank == root else {}
        sums |= {"Reduce_scatter_block": block, "block in place": summed[:n]}
        good = {
            "Bcast": bool((copied == everyone[root]).all()),
            "Allgather": bool((gathered == np.array(everyone)).all() and (again == gathered).all()),
            "inputs": bool(
                (blocks == np.tile(values(rank, n, np.float32), size)).all()
                and (rank == root or inside is x or (inside == x).all())
            ),
            **{name: np.allclose(got, total, rtol=1e-4, atol=1e-5) for name, got in sums.items()},
        }
        agree(place, all(good.values()), f"{algorithm}, turn {turn}: {good}")


def test_one_rank_comes_the_slow_way(place, agree):
    """Its buffers are such that only the engine, or only the MPI library, reads them; which the others cannot know."""
    size, rank, n = place.Get_size(), place.Get_rank(), 600
    comm, x = Communicator(place), np.full(n, rank + 1.0, np.float32)
    pairs = MPI.FLOAT.Create_contiguous(2).Commit()
    for turn in range(4 * size):
        odd, derived, root = turn % size, turn // size % 2 == 1, turn % 3 % size
        mine = rank == odd and turn >= size

        def given(array: np.ndarray, mine: bool = mine, derived: bool = derived) -> Any:
            return [array, array.size // 2, pairs] if mine and derived else [array, MPI.FLOAT] if mine else array

        copied, gathered = x.copy(), np.empty((size, n), np.float32)
        comm.Bcast(given(copied), root)
        comm.Allgather(given(x), gathered if not derived else [gathered, n, MPI.FLOAT])
        good = bool((copied == root + 1).all() and (np.arange(1, size + 1) == gathered.T).all())
        if not derived:
            reduced, block = np.empty(n, np.float32), np.empty(n, np.float32)
            comm.Reduce(given(x), reduced, root=root)
            comm.Reduce_scatter_block(given(np.tile(x, size)), block)
            good &= rank != root or bool((reduced == size * (size + 1) / 2).all())
            good &= bool((block == size * (size + 1) / 2).all())
        agree(place, good, f"turn {turn}")
    pairs.Free()


@pytest.mark.parametrize("collective", ["Bcast", "Reduce"])
def test_a_call_made_before_goes_one_way(world, agree, collective: str):
    """Whatever a rank's buffers are: the others cannot hear of it. Ranks meet again after 128 such calls."""
    size, rank, n = world.size, world.rank, 30
    every_other = MPI.FLOAT.Create_vector(n, 1, 2).Commit()
    ours, wrong = Communicator(world), list[str]()
    for root, turn in [(root, turn) for root in range(2) for turn in range(140)]:
        x, y = np.full((n, 2), rank + turn, np.float32), np.zeros(n, np.float32)
        odd = rank == turn % size
        if odd and turn % 5 == 1:
            context_of(world).cache.clear()
        if collective == "Bcast":
            values = x[:, 0].copy()
            ours.Bcast([x, 1, every_other] if odd and turn % 3 == 1 else [values, MPI.FLOAT] if odd else values, root)
            got = x[:, 0] if odd and turn % 3 == 1 else values
            want = root + turn
        else:
            ours.Reduce([x[:, 0].copy(), MPI.FLOAT] if odd else x[:, 0].copy(), y, root=root)
            got, want = y, size * turn + size * (size - 1) // 2 if rank == root else 0
        if not (got == want).all() or not (x[:, 1] == rank + turn).all():
            wrong.append(f"root {root}, turn {turn}: {got[:3]}")
    agree(world, not wrong, "; ".join(wrong[:5]))
    every_other.Free()


CALLS = {
    "Bcast": lambda comm, n: comm.Bcast(np.ones(n, np.float32)),
    "Reduce": lambda comm, n: comm.Reduce(np.ones(n, np.float32), np.ones(n, np.float32)),
    "Allreduce": lambda comm, n: comm.Allreduce(MPI.IN_PLACE, np.ones(n, np.float32)),
    "Free": lambda comm, _: comm.Free(),
    "bad": lambda comm, _: comm.Bcast("no buffer"),
    "bad Reduce": lambda comm, n: comm.Reduce("no buffer", np.ones(n, np.float32)),
    "derived": lambda comm, n: comm.Reduce([np.ones(n, np.float32), 1, PACK], [np.ones(n, np.float32), 1, PACK]),
}
PACK = MPI.FLOAT.Create_contiguous(8).Commit()


@pytest.mark.parametrize(
    ("usual", "other", "then", "odds"),
    [
        ("Bcast", ("Bcast", 9), "Allreduce", [-1]),
        ("Bcast", ("Allreduce", 8), "Free", [0]),
        ("Reduce", ("Reduce", 9), "Free", [-1]),
        ("Reduce", ("Bcast", 8), "Allreduce", [0]),
        ("Bcast", ("bad", 8), "Allreduce", [0]),
        ("Reduce", ("bad Reduce", 8), "Free", [-1]),
        ("Reduce", ("derived", 8), "Allreduce", [-1]),
        pytest.param("Bcast", ("Bcast", 9), "Free", range(5), marks=pytest.mark.slow),
        pytest.param("Bcast", ("Allreduce", 8), "Allreduce", range(5), marks=pytest.mark.slow),
        pytest.param("Reduce", ("Reduce", 9), "Allreduce", range(5), marks=pytest.mark.slow),
    ],
)
def test_ranks_that_have_returned_hear_of_a_difference(
    world, agree, usual: str, other: tuple[str, int], then: str, odds: Iterable[int]
):
    """In their next call, or by Free; all that wait hear of it at once, and nobody needs another one to go on."""
    for odd in sorted({odd % world.size for odd in odds}):
        comm = Communicator(MPI.Intracomm(world).Dup())
        for _ in range(4):
            CALLS[usual](comm, 8)
        errors: list[str] = []
        own = other if comm.rank == odd else (usual, 8)
        for name, n in (own, (then, 8)):
            try:
                CALLS[name](comm, n)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
            MPI.COMM_WORLD.Barrier()
        told = [text for text in errors if text.startswith("MismatchError")]
        if "bad" in own[0]:
            agree(world, errors[0].startswith("TypeError") and not told, f"rank {odd} is odd: {errors}")
        else:
            agree(world, len(told) == 1 and usual in told[0], f"rank {odd} is odd: {errors}")
        if then != "Free":
            comm.Free()


@pytest.mark.parametrize("other", ["bad", "count"])
def test_ranks_that_differ_where_all_meet_wait_for_the_last_and_go_on(apart, agree, monkeypatch, other: str):
    """However long they wait: what they ask each other meanwhile is no news where all are waited for."""
    monkeypatch.setattr(watch, "_LOOK_SECONDS", 0.02)
    comm = Communicator(MPI.Intracomm(apart).Dup())
    errors: list[type[Exception]] = []
    for turn in range(4):
        odd = turn == 2 and comm.rank == 0
        if turn == 2 and comm.rank == 1:
            time.sleep(0.3)
        try:
            comm.Allreduce(MPI.IN_PLACE, "no buffer" if odd and other == "bad" else np.ones(9 if odd else 8))
        except Exception as error:
            errors.append(type(error))
    kind = MismatchError if other == "count" else TypeError if comm.rank == 0 else PeerError
    agree(apart, errors == [kind], str(errors))
    comm.Free()


def test_free_while_a_call_waits_that_others_have_not_made(apart, agree):
    comm = Communicator(MPI.Intracomm(apart).Dup())
    for _ in range(4):
        comm.Bcast(np.ones(8))
    request = comm.Iallreduce(MPI.IN_PLACE, np.ones(8)) if comm.rank == 0 else None
    errors: list[str] = []
    for call in (comm.Free, request.Wait if request is not None else None):
        try:
            if call is not None:
                call()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    agree(apart, bool(errors) and all(text.startswith("MismatchError") for text in errors), str(errors))


@pytest.mark.parametrize(("first", "last"), [(0, 4), pytest.param(4, 200, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_ranks_that_differ(world, agree, first: int, last: int):
    comm = Communicator(world, algorithm="auto")
    for seed in range(first, last):
        wrong = mismatches.course(comm, seed, most_good=100 if seed >= 4 else 10)
        agree(world, not wrong, "; ".join(wrong))


@pytest.mark.parametrize("algorithm", ["leaders", "multilane", "ring"])
def test_a_call_that_is_new_to_one_rank_only(world, agree, algorithm: str):
    """It has forgotten what runs the call, which the others have kept."""
    comm, n = Communicator(world, algorithm=algorithm), 3000
    x, y = np.full(n, 1.0), np.empty(n)
    for turn in range(world.size):
        if world.rank == turn % world.size:
            context_of(world).cache.clear()
        for _ in range(2):
            comm.Allreduce(x, y)
            agree(world, bool((y == world.size).all()), f"turn {turn}: {y}")


def test_a_repeated_call_needs_no_job(world, agree):
    """Neither a plan's run nor a call like one before goes to the engine."""
    x, y = np.ones(1000), np.empty(1000)
    big, blocks, ours = np.ones(400_000), np.empty((world.size, 1000)), Communicator(world)
    plan = plan_exact(np.ones(1000), world, MPI.SUM, "auto")
    calls = [
        lambda: ours.Bcast(x),
        lambda: ours.Bcast(big[:200_000], world.size - 1),
        lambda: ours.Reduce(x, y, MPI.MAX),
        lambda: ours.Allgather(x, blocks),
        lambda: ours.Reduce_scatter_block(blocks, x),
        plan,
        lambda: world.Allreduce(x, y),
        lambda: allreduce(x, out=y, comm=world),
        lambda: Communicator(world, algorithm="ring").Allreduce(x, y),
    ]
    for k, call in enumerate(calls):
        call()
        call()
        agree(world, needs_no_job(MPI.COMM_WORLD, context_of(world).queue, call), f"call {k}")
    plan.free()


@pytest.mark.parametrize("algorithm", ["auto", "ring", "mpi"])
def test_buffers_that_overlap_are_read_once(world, agree, algorithm: str):
    """Whatever ways a call tries before the one that it takes: beside a started plan none past the engine is open."""
    n, ours, rank, size = 1000, Communicator(world, algorithm=algorithm), world.rank, world.size
    plan = plan_exact(np.ones(50_000, np.float32), world, MPI.SUM, "auto")
    steps = np.arange(n + 1, dtype=np.float32)
    calls = {
        "Allreduce": lambda x: ours.Allreduce(x[:n], x[1:]),
        "allreduce": lambda x: allreduce(x[:n], out=x[1:], comm=world, algorithm=algorithm),
    }
    for started in (False, True, True):
        for name, call in calls.items():
            if started:
                plan.start()
            x = steps + rank
            call(x)
            if started:
                plan.wait()
            want = size * steps[:n] + size * (size - 1) // 2
            agree(world, bool((x[1:] == want).all()), f"{name}, started {started}: {x[:4]}")
    plan.free()


@pytest.mark.single
@pytest.mark.parametrize(
    ("hosts", "ranks", "seeds"),
    [(3, 1, 4), pytest.param(3, 1, 200, marks=pytest.mark.slow), pytest.param(2, 2, 200, marks=pytest.mark.slow)],
)
@pytest.mark.timeout(600)
def test_ranks_that_differ_on_hosts(clean_environment, hosts: int, ranks: int, seeds: int):
    probe = subprocess.run([sys.executable, HOSTS, "--probe"], capture_output=True, text=True, timeout=150, check=False)
    if probe.returncode != 0:
        pytest.skip((probe.stdout + probe.stderr).strip())
    on_hosts = [HOSTS, "--hosts", hosts, "--ranks-per-host", ranks, "--rate", "none", "--"]
    done = subprocess.run(
        [sys.executable, *map(str, on_hosts), sys.executable, mismatches.__file__, str(seeds)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert f"{seeds} seeds, 0 complaints" in done.stdout, done.stdout + done.stderr
