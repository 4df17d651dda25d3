"""Small collectives across nodes, in the messages by which ranks find out whether they mean the same.

Ranks take themselves for nodes of one rank each, or for two nodes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import mismatches
import numpy as np
import pytest

from bitring.collectives.allreduce import allreduce
from bitring.collectives.communicator import Communicator
from bitring.collectives.plan import plan_exact
from bitring.collectives.runtime.context import context_of

HOSTS = Path(__file__).resolve().parent.parent / "benchmarks" / "hosts.py"

SIZES = [0, 1, 3, 1009, 2053, 16_381, 40_009]
"""Around the sizes at which the way changes: 8 KiB of values, and the 64 or 128 KiB of a message."""


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
    from mpi4py import MPI

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


@pytest.mark.parametrize("n", [0, 1, 16_381])
def test_other_collectives(world, agree, n: int):
    size, rank = world.Get_size(), world.Get_rank()
    comm = Communicator(world, algorithm="leaders")
    everyone = [values(r, n, np.float32) for r in range(size)]
    x, root = everyone[rank], size - 1
    total = np.sum(everyone, axis=0, dtype=np.float64)
    for turn in range(3):
        copied = x.copy()
        comm.Bcast(copied, root)
        gathered = np.empty((size, n), np.float32)
        comm.Allgather(x, gathered)
        reduced, block = np.empty(n, np.float32), np.empty(n, np.float32)
        comm.Reduce(x, reduced, root=root)
        comm.Reduce_scatter_block(np.tile(x, size), block)
        good = {
            "Bcast": bool((copied == everyone[root]).all()),
            "Allgather": bool((gathered == np.array(everyone)).all()),
            "Reduce": rank != root or np.allclose(reduced, total, rtol=1e-4, atol=1e-5),
            "Reduce_scatter_block": np.allclose(block, total, rtol=1e-4, atol=1e-5),
        }
        agree(world, all(good.values()), f"turn {turn}: {good}")


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
    plan = plan_exact(np.ones(1000), world, mismatches.MPI.SUM, "auto")
    calls = [
        plan,
        lambda: world.Allreduce(x, y),
        lambda: allreduce(x, out=y, comm=world),
        lambda: Communicator(world, algorithm="ring").Allreduce(x, y),
    ]
    for k, call in enumerate(calls):
        call()
        call()
        before = context_of(world).queue.count
        for _ in range(5):
            call()
        agree(world, context_of(world).queue.count == before, f"call {k}")
    plan.free()


@pytest.mark.parametrize("algorithm", ["auto", "ring", "mpi"])
def test_buffers_that_overlap_are_read_once(world, agree, algorithm: str):
    """Whatever ways a call tries before the one that it takes: beside a started plan none past the engine is open."""
    n, ours, rank, size = 1000, Communicator(world, algorithm=algorithm), world.rank, world.size
    plan = plan_exact(np.ones(50_000, np.float32), world, mismatches.MPI.SUM, "auto")
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
    probe = subprocess.run([sys.executable, HOSTS, "--probe"], capture_output=True, text=True, timeout=30, check=False)
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
