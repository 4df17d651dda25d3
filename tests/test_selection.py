"""The one place that chooses: what was asked for where it can be had, and why not where it cannot."""

from __future__ import annotations

from typing import Any

import pytest

from bitring.collectives.schedules.query import Query
from bitring.collectives.schedules.schedule import algorithms
from bitring.collectives.schedules.topology import Topology
from bitring.collectives.selection.defaults import LITTLE_NBYTES, NETWORK_FROM_NBYTES, RING_FROM_NBYTES
from bitring.collectives.selection.selection import Choice, check_name, choose, fast_path_limits, segment_values
from bitring.collectives.selection.table import BUILT_IN, Rules, Table

pytestmark = pytest.mark.single

NATIVE = ("shared_memory", "multilane")

KNOWN = (
    "binomial_tree, double_binary_tree, leaders, mpi, multilane, rabenseifner, recursive_doubling, ring, shared_memory"
)


def choice_of(
    asked: str, nbytes: int, topology: Topology, table: Table = BUILT_IN, collective: str = "allreduce", **options: Any
) -> Choice:
    query: dict[str, Any] = {"own": True, "library": True, **options}
    return choose(asked, Query(collective=collective, nbytes=nbytes, topology=topology, **query), table)


@pytest.mark.parametrize(
    ("asked", "collective", "nbytes", "size", "own", "library", "name", "why"),
    [
        ("ring", "allreduce", 1, 4, True, True, "ring", "asked for"),
        ("mpi", "allreduce", 1, 4, True, True, "mpi", "asked for"),
        ("mpi", "allreduce", 1, 4, True, False, "ring", "does not hand this operation, dtype or memory"),
        ("ring", "allreduce", 1, 4, False, True, "mpi", "only the MPI library serves this operation"),
        ("recursive_doubling", "broadcast", 1, 4, True, True, "mpi", "has no broadcast"),
        ("recursive_doubling", "broadcast", 1, 4, True, False, "ring", "has no broadcast, and the MPI library"),
        ("auto", "allreduce", RING_FROM_NBYTES, 4, True, True, "ring", "at least"),
        ("auto", "allreduce", RING_FROM_NBYTES - 1, 4, True, True, "mpi", "fewer than"),
        ("auto", "allreduce", LITTLE_NBYTES, 4, True, False, "recursive_doubling", "the fewest rounds"),
        ("auto", "reduce", 1, 4, True, False, "binomial_tree", "the fewest rounds"),
        ("auto", "broadcast", 1, 4, True, False, "binomial_tree", "the fewest rounds"),
        ("auto", "allgather", 1, 4, True, False, "ring", "does not serve this operation, dtype or memory"),
        ("auto", "allreduce", LITTLE_NBYTES + 1, 4, True, False, "ring", "does not serve this operation"),
        ("auto", "allreduce", 1 << 30, 4, False, True, "mpi", "only the MPI library"),
        ("auto", "allreduce", 1 << 30, 1, True, True, "mpi", "one rank"),
    ],
)
def test_choices(asked, collective, nbytes, size, own, library, name, why):
    choice = choice_of(asked, nbytes, Topology(size), collective=collective, own=own, library=library)
    assert choice.name == name
    assert why in choice.why


ONE_NODE = Topology(4, nodes=1, lanes=4, shared=True, native=True)
TWO_NODES = Topology(5, nodes=2, lanes=2, shared=True, native=True)
FOUR_HOSTS = Topology(4, nodes=4, lanes=1, shared=False, native=True)


@pytest.mark.parametrize(
    ("asked", "topology", "options", "name", "why"),
    [
        ("auto", ONE_NODE, {}, "shared_memory", "all ranks share memory"),
        ("auto", ONE_NODE, {"library": False}, "shared_memory", "all ranks share memory"),
        ("auto", ONE_NODE, {"host": False}, "ring", "at least"),
        ("auto", ONE_NODE, {"collective": "reduce"}, "ring", "at least"),
        ("auto", TWO_NODES, {}, "multilane", "measured on emulated hosts"),
        ("auto", TWO_NODES, {"blocking": False}, "ring", "at least"),
        ("auto", FOUR_HOSTS, {}, "ring", "measured on emulated hosts"),
        ("auto", FOUR_HOSTS, {"collective": "reduce"}, "ring", "at least"),
        ("leaders", FOUR_HOSTS, {}, "leaders", "asked for"),
        ("leaders", FOUR_HOSTS, {"collective": "broadcast"}, "leaders", "asked for"),
        ("leaders", ONE_NODE, {}, "ring", "all ranks are on one node"),
        ("leaders", Topology(4, nodes=4), {}, "ring", "the native engine is not in use"),
        ("leaders", TWO_NODES, {"host": False}, "ring", "the values are on a device"),
        ("shared_memory", ONE_NODE, {}, "shared_memory", "asked for"),
        ("shared_memory", TWO_NODES, {}, "ring", "shared_memory was asked for, but the ranks are on 2 nodes"),
        ("shared_memory", FOUR_HOSTS, {}, "ring", "no ranks share memory"),
        ("shared_memory", Topology(4), {}, "ring", "the native engine is not in use"),
        ("shared_memory", ONE_NODE, {"host": False}, "ring", "the values are on a device"),
        ("shared_memory", ONE_NODE, {"collective": "broadcast"}, "mpi", "has no broadcast"),
        ("multilane", TWO_NODES, {}, "multilane", "asked for"),
        ("multilane", TWO_NODES, {"blocking": False}, "ring", "a nonblocking call cannot set it up"),
        ("multilane", ONE_NODE, {}, "ring", "all ranks are on one node"),
    ],
)
def test_choices_of_the_native_engine(asked, topology, options, name, why):
    choice = choice_of(asked, 1 << 30, topology, **options)
    assert choice.name == name
    assert why in choice.why


@pytest.mark.parametrize(
    ("topology", "below", "above"),
    [
        (Topology(4), ("mpi", RING_FROM_NBYTES), "ring"),
        (Topology(4, nodes=1, lanes=4, native=True), ("mpi", RING_FROM_NBYTES), "ring"),
        (TWO_NODES, ("mpi", NETWORK_FROM_NBYTES), "ring"),
    ],
)
def test_where_the_default_changes(topology, below, above):
    """Of a call that cannot set up what was measured to be the best."""
    name, nbytes = below
    choice = choice_of("auto", nbytes - 1, topology, blocking=False)
    assert choice == (name, f"{nbytes - 1} bytes are fewer than {nbytes} (built-in default)")
    assert choice_of("auto", nbytes, topology, blocking=False).name == above


@pytest.mark.parametrize("topology", [TWO_NODES, FOUR_HOSTS])
def test_little_travels_in_the_messages_by_which_ranks_agree(topology):
    for collective in ("allreduce", "reduce", "reduce_scatter", "broadcast", "allgather"):
        assert choice_of("auto", 1000, topology, collective=collective).name == "leaders"
        assert choice_of("auto", 1000, topology, collective=collective, own=False).name == "mpi"
        assert choice_of("auto", 1 << 24, topology, collective=collective).name != "leaders"
    for collective, nbytes, name in (
        ("broadcast", 1 << 20, "leaders"),
        ("allgather", 1 << 16, "leaders"),
        ("allgather", 1 << 20, "leaders" if topology.lanes > 1 else "mpi"),
        ("reduce_scatter", 1 << 20, "leaders" if topology.lanes > 1 else "mpi"),
    ):
        assert choice_of("auto", nbytes, topology, collective=collective).name == name


def rules(topology: Topology, *best: tuple[int, str], itemsize: int = 4, resident: bool = False) -> Rules:
    return Rules("MPICH 5.0.2", topology.size, topology.nodes, itemsize, resident, topology.native, best)


MEASURED = Table(
    (
        rules(ONE_NODE, (0, "mpi"), (100, "shared_memory"), (1000, "ring")),
        rules(ONE_NODE, (0, "multilane"), (50, "rabenseifner"), resident=True),
        rules(FOUR_HOSTS, (0, "recursive_doubling"), (100, "mpi"), (1000, "multilane")),
        rules(Topology(4, nodes=1), (0, "double_binary_tree")),
    )
)


@pytest.mark.parametrize(
    ("topology", "nbytes", "options", "name"),
    [
        (ONE_NODE, 0, {}, "mpi"),
        (ONE_NODE, 99, {}, "mpi"),
        (ONE_NODE, 99, {"library": False}, "shared_memory"),  # the built-in default, where the measured best cannot be
        (ONE_NODE, 100, {}, "shared_memory"),
        (ONE_NODE, 100, {"asked": "mpi"}, "mpi"),
        (ONE_NODE, 1000, {}, "ring"),
        (ONE_NODE, 1000, {"itemsize": 2}, "ring"),
        (ONE_NODE, 1000, {"host": False, "library": False}, "recursive_doubling"),
        (ONE_NODE, 1000, {"collective": "reduce"}, "mpi"),
        (ONE_NODE, 49, {"resident": True}, "shared_memory"),
        (ONE_NODE, 50, {"resident": True}, "rabenseifner"),
        (ONE_NODE, 50, {"resident": True, "own": False}, "mpi"),
        (Topology(2, nodes=1, lanes=2, native=True), 100, {}, "mpi"),
        (Topology(2, nodes=1, lanes=2), 100, {}, "double_binary_tree"),
        (FOUR_HOSTS, 0, {}, "recursive_doubling"),
        (FOUR_HOSTS, 1000, {}, "leaders"),  # what was measured cannot be there
        (FOUR_HOSTS, 1 << 30, {}, "ring"),
        (TWO_NODES, 1000, {}, "multilane"),
        (TWO_NODES, 1000, {"blocking": False}, "leaders"),
        (Topology(4), 1000, {}, "mpi"),
    ],
)
def test_choices_from_a_measured_table(topology, nbytes, options, name):
    arguments: dict[str, Any] = {"asked": "auto", **options}
    choice = choice_of(nbytes=nbytes, topology=topology, table=MEASURED, **arguments)
    if topology.size == 2 and topology.native:  # shared memory is missing
        assert choice.why.endswith("(built-in default)")
    assert choice.name == name


def test_why_says_what_was_measured():
    choice = choice_of("auto", 70, ONE_NODE._replace(size=3), MEASURED, resident=True)
    assert choice.name == "rabenseifner"
    assert choice.why == (
        "measured on this machine to be the best of 70 bytes with 4 ranks on 1 node, 4-byte values, resident"
    )


def test_direct_limits_between_nodes():
    assert fast_path_limits(FOUR_HOSTS, BUILT_IN) == (0, (512 << 10) - 1)
    assert fast_path_limits(TWO_NODES, BUILT_IN) == (0, (256 << 10) - 1)
    assert fast_path_limits(FOUR_HOSTS, MEASURED) == (1, 0)
    assert fast_path_limits(Topology(4, nodes=4), BUILT_IN) == (1, 0)  # without the native engine


def test_direct_limits_hold_for_every_size_of_values():
    floats = rules(TWO_NODES, (0, "leaders"), (100_000, "ring"))
    assert fast_path_limits(TWO_NODES, Table((floats,))) == (0, 99_999)
    doubles = rules(TWO_NODES, (0, "leaders"), (5000, "multilane"), itemsize=8)
    assert fast_path_limits(TWO_NODES, Table((floats, doubles))) == (0, 4999)
    halves = rules(TWO_NODES, (0, "ring"), (6000, "leaders"), itemsize=2)
    assert fast_path_limits(TWO_NODES, Table((floats, halves))) == (6000, 99_999)
    assert fast_path_limits(TWO_NODES, Table((floats, doubles, halves))) == (1, 0)


def test_direct_limits():
    assert fast_path_limits(ONE_NODE, BUILT_IN) == (0, 1 << 62)
    assert fast_path_limits(ONE_NODE, MEASURED) == (100, 999)
    assert fast_path_limits(ONE_NODE, Table((rules(ONE_NODE, (0, "shared_memory")),))) == (0, 1 << 62)
    assert fast_path_limits(ONE_NODE, Table((rules(ONE_NODE, (0, "mpi")),))) == (1, 0)


def test_what_is_chosen_can_be_run():
    for asked in ("auto", *algorithms.names()):
        for collective in ("allreduce", "reduce_scatter", "allgather", "reduce", "broadcast"):
            for nbytes in (0, 50, 100, 1000, 1 << 30):
                for own, library in ((True, True), (True, False), (False, True)):
                    for topology in (Topology(1), Topology(2), Topology(5), ONE_NODE, TWO_NODES, FOUR_HOSTS):
                        for table in (BUILT_IN, MEASURED):
                            query = Query(
                                collective=collective, nbytes=nbytes, topology=topology, own=own, library=library
                            )
                            name = choose(asked, query, table).name
                            assert algorithms.get(name).missing(query) is None
                            if name == "mpi":
                                assert library
                            elif name == "leaders":
                                assert own and topology.native and topology.nodes > 1
                            elif name in NATIVE:
                                assert own and topology.shared and collective == "allreduce"
                            else:
                                assert own
                                assert collective in algorithms.get(name).collectives()


def test_unknown_names_list_the_known_ones():
    check_name("auto", "allreduce")
    for name in ("rign", "", "Ring"):
        with pytest.raises(ValueError, match=f"unknown algorithm '{name}'; known: {KNOWN}"):
            check_name(name, "allreduce")
        with pytest.raises(ValueError, match=f"unknown algorithm '{name}'; known: {KNOWN}"):
            choice_of(name, 1, Topology(2))


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16, 32])
def test_segments(itemsize):
    for nbytes in [0, 1, 31, 1000, 1 << 16, 1 << 20, 1 << 24, 1 << 28, 1 << 32, (1 << 34) + 7]:
        nbytes -= nbytes % itemsize
        values = segment_values(nbytes, itemsize)
        assert values >= 1
        assert values * itemsize < 1 << 31
        count = -(-(nbytes // itemsize) // values)
        assert count <= 1024 + 1
        assert values * itemsize >= 512 << 10
        if nbytes <= 512 << 20:
            assert values * itemsize == 512 << 10
