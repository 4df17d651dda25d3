"""Calls without a plan by what was kept of one before: one call into the extension, whatever the algorithm.

Ranks take themselves for nodes of one rank each, or for two nodes, and for such as were measured.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from bitring.collectives import call_run
from bitring.collectives.allreduce import allreduce
from bitring.collectives.communicator import Communicator
from bitring.collectives.execution.native import DECLINED
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.turn import Turns
from bitring.collectives.selection.table import Rules, Table
from bitring.errors import MismatchError

SIZES = [1, 5, 1009, 300_001]
"""Of the last, messages are cut in segments."""


@pytest.fixture(params=["ring", "multilane", "double_binary_tree", "recursive_doubling", "mpi"])
def ours(request: pytest.FixtureRequest) -> Communicator:
    """For which that algorithm was measured to be the best."""
    algorithm: str = request.param
    world = request.getfixturevalue("two_nodes" if algorithm == "multilane" else "apart")
    context = context_of(world)
    context.prepare("a test")
    size, nodes = context.size, context.topology.nodes
    context.table = Table(tuple(Rules("any", size, nodes, k, False, True, ((0, algorithm),)) for k in (4, 8)))
    return Communicator(world)


def values(rank: int, n: int, dtype: Any) -> np.ndarray:
    """Small whole numbers, whose sums are exact."""
    return np.random.default_rng(rank).integers(1, 9, n).astype(dtype)


def test_sums(ours: Communicator, agree: Any) -> None:
    for n in SIZES:
        dtype, op, ufunc = (np.int64, MPI.MAX, np.maximum) if n < 1000 else (np.float32, MPI.SUM, np.add)
        given = values(ours.rank, n, dtype)
        want = ufunc.reduce([values(r, n, dtype) for r in range(ours.size)])
        x, y = given.copy(), np.empty(n, dtype)
        calls = {
            "Allreduce": functools.partial(ours.Allreduce, x, y, op),
            "allreduce": functools.partial(allreduce, x, out=y, op=op, comm=ours),
            "in place": functools.partial(ours.Allreduce, MPI.IN_PLACE, y, op),
            "out=x": functools.partial(allreduce, y, out=y, op=op, comm=ours),
        }
        for turn, (name, call) in itertools.product(range(3), calls.items()):
            y[:] = given if name in ("in place", "out=x") else 77
            call()
            good = bool((y == want).all() and (x == given).all())
            agree(ours, good, f"{n} values, turn {turn}, {name}: {y[:4]}, not {want[:4]}")


def test_it_is_one_call_into_the_extension(ours: Communicator, agree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, more = np.zeros(1009), np.ones(1009), np.zeros((1, 1009))
    others: list[str] = []
    enter = Turns.enter

    def entered(turns: Turns, call: str, continues: bool) -> None:
        others.append(call)
        enter(turns, call, continues)

    monkeypatch.setattr(Turns, "enter", entered)

    def only(call: Callable[[], object]) -> bool:
        """Whether ``call`` can be all; not each time where a rank was away meanwhile."""
        for _ in range(30):
            others.clear()
            call()
            if not any(MPI.COMM_WORLD.allgather(len(others))):
                return True
        return False

    ours.Allreduce(x, y)
    agree(ours, only(lambda: ours.Allreduce(x, y)), "Allreduce, out of place")
    agree(ours, only(lambda: ours.Allreduce(MPI.IN_PLACE, x)), "Allreduce, in place")
    fast_path = context_of(ours).queue.fast_path
    agree(ours, fast_path.allreduce(x, y, MPI.PROD) == DECLINED, "another operation")
    agree(ours, fast_path.reduce(x, y, MPI.SUM) == DECLINED, "another function")
    allreduce(x, out=y, comm=ours)
    agree(ours, only(lambda: allreduce(x, out=y, comm=ours)), "allreduce")
    agree(ours, fast_path.reduce(more, more, MPI.SUM) == DECLINED, "another shape")
    agree(ours, fast_path.reduce(x[:-1], x[1:], MPI.SUM) == DECLINED, "arrays that overlap")


def test_ranks_that_differ(ours: Communicator, agree: Any) -> None:
    x, y = np.ones(1009), np.empty(1009)
    calls = {
        "Allreduce": lambda n: ours.Allreduce(x[:n], y[:n]),
        "allreduce": lambda n: allreduce(x[:n], out=y[:n], comm=ours),
    }
    for turn, (name, call) in enumerate([*calls.items()] * 2):
        for n in (1009, 1008, 1009):
            call(n)
        odd = ours.rank == turn % ours.size
        with pytest.raises(MismatchError, match=f"{name}: ranks disagree on count"):
            call(1008 if odd else 1009)
        with pytest.raises(MismatchError, match="ranks called different collectives"):
            calls["allreduce" if odd else "Allreduce"](1009)
        agree(ours, bool((x == 1).all()), f"{x}")
        call(1009)
        agree(ours, bool((y == ours.size).all()), f"{y}")


def test_one_rank_has_forgotten_the_call(ours: Communicator, agree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank keeps is bounded, and what it forgets it neither keeps elsewhere nor expects of the others."""
    sizes = (1000, 1001, 1002)
    if ours.rank == 0:
        monkeypatch.setattr(call_run, "_CACHED_RUNNERS", 1)
    for turn in range(4):
        for n in sizes:
            x, y = np.full(n, turn + 1.0), np.empty(n)
            ours.Allreduce(x, y)
            agree(ours, bool((y == ours.size * (turn + 1)).all()), f"turn {turn}, {n} values: {y}")
    context = context_of(ours)
    if ours.rank == 0 and context.cache:
        gone = np.empty(sizes[0])
        assert context.queue.fast_path.allreduce(MPI.IN_PLACE, gone, MPI.SUM) == DECLINED
