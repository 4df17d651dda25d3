"""What can be asked of every registered algorithm: where it can run, what runs it, what it costs."""

from __future__ import annotations

import ast
from importlib.metadata import EntryPoint
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest

import bitring
from bitring.collectives.algorithms.ring import Ring
from bitring.collectives.execution.library import LibraryRunner
from bitring.collectives.schedules.query import Query
from bitring.collectives.schedules.schedule import COLLECTIVES, algorithms
from bitring.collectives.schedules.topology import Topology
from bitring.training.prediction.cluster import BUILT_IN, Cluster
from bitring.training.prediction.network import Network

single = pytest.mark.single
LIBRARY = Path(bitring.__file__).parent

TOPOLOGIES = (
    Topology(4),
    Topology(4, nodes=1, lanes=4, shared=True, native=True),
    Topology(5, nodes=2, lanes=2, shared=True, native=True),
)


@single
@pytest.mark.parametrize(
    "file",
    [
        "collectives/selection/selection.py",
        "collectives/execution/runner.py",
        "collectives/plan.py",
        "collectives/fusion.py",
        "collectives/calls.py",
        "collectives/communicator.py",
        "training/prediction/network.py",
    ],
)
def test_no_algorithm_is_named_where_all_are_served(file: str):
    tree = ast.parse((LIBRARY / file).read_text(encoding="utf-8"))
    named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} & set(algorithms.names())
    assert not named


@single
@pytest.mark.parametrize("name", algorithms.names(), ids="with_{}".format)  # pytest-mpi takes "mpi" for its mark
def test_every_algorithm_says_where_it_runs_and_by_what(name: str):
    algorithm = algorithms.get(name)
    assert set(algorithm.collectives()) <= set(algorithm.serves()) <= set(COLLECTIVES)
    assert (algorithm.runner is None) == bool(algorithm.collectives())
    if algorithm.runner is not None:
        assert callable(resolve_name(algorithm.runner))
    able = 0
    for collective in COLLECTIVES:
        for topology in TOPOLOGIES:
            for own, library in ((True, False), (False, True), (True, True)):
                query = Query(collective=collective, nbytes=8, topology=topology, own=own, library=library)
                missing = algorithm.missing(query)
                assert missing is None or missing
                if collective not in algorithm.serves() or not (library if algorithm.library else own):
                    assert missing is not None
                able += missing is None
    assert able


@single
@pytest.mark.parametrize("name", algorithms.names(), ids="with_{}".format)  # pytest-mpi takes "mpi" for its mark
def test_every_algorithm_says_what_it_costs(name: str):
    """Somewhere; more bytes cost more."""
    known = 0
    for ranks, nodes in ((4, 1), (4, 4), (6, 3)):
        network = Network(Cluster(ranks, nodes, bandwidth=1e9), BUILT_IN)
        query = Query(collective="allreduce", nbytes=8, topology=network.topology, own=True, library=True)
        estimates = [algorithms.get(name)().estimate(network, nbytes) for nbytes in (1000, 1 << 24)]
        if algorithms.get(name).missing(query) is not None or estimates[0] is None:
            continue
        assert estimates[1] is not None
        assert 0 < estimates[0].seconds < estimates[1].seconds
        assert network.sent(estimates[0].how or name, 4) >= 1
        known += 1
    assert known


class Handed(Ring):
    """An algorithm of a package outside, with its own way to run, and a place where it cannot."""

    runner = f"{__name__}:HandedRunner"
    fusion = None

    @classmethod
    def missing(cls, query: Query) -> str | None:
        """Only 4-byte values."""
        return super().missing(query) or (None if query.itemsize == 4 else "its values have 4 bytes")


class HandedRunner(LibraryRunner):
    """Counts what was made of it."""

    made = 0

    def __init__(self, state, task):
        super().__init__(state, task)
        HandedRunner.made += 1


def test_an_algorithm_of_its_own_kind_is_one_class(comm, agree, monkeypatch: pytest.MonkeyPatch):
    """Chosen, run and explained, by plans and by calls, though nothing else knows of it."""
    monkeypatch.setitem(algorithms._outside, "handed", EntryPoint("handed", f"{__name__}:Handed", "bitring.algorithms"))
    p, before = comm.size, HandedRunner.made
    x = np.full(11, comm.rank + 1, np.float32)
    plan = bitring.plan_allreduce(x, comm=comm, algorithm="handed")
    plan()
    agree(comm, bitring.explain(plan) == "handed: asked for", bitring.explain(plan))
    agree(comm, bool(np.all(x == p * (p + 1) // 2)), x)
    y = np.full(11, comm.rank + 1, np.float32)
    total = bitring.allreduce(y, comm=comm, algorithm="handed")
    agree(comm, bool(np.all(total == p * (p + 1) // 2)), total)
    agree(comm, HandedRunner.made == before + 2, HandedRunner.made)
    plan = bitring.plan_allreduce(np.zeros(3), comm=comm, algorithm="handed")
    agree(
        comm, bitring.explain(plan) == "ring: handed was asked for, but its values have 4 bytes", bitring.explain(plan)
    )
    agree(comm, HandedRunner.made == before + 2, HandedRunner.made)
