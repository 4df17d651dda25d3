"""Handing out portions, and sums along a fixed tree, whoever computes what and when."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitring.collectives.runtime.mailbox import Message
from bitring.training import coordinator
from bitring.training.coordinator import Coordinator, Ended, Kind
from bitring.training.cut import Cut
from bitring.training.lbfgs import History
from bitring.training.portions import Portions
from bitring.training.shard import held_by, nodes_of, parts_for, parts_of
from bitring.training.sum_tree import SumTree

pytestmark = pytest.mark.single


@given(st.integers(1, 40), st.integers(1, 6), st.booleans(), st.randoms(use_true_random=False))
def test_every_portion_counts_once_whatever_happens(count, replicas, backups, random):
    portions = Portions(count, replicas, backups)
    held: dict[int, list[int]] = {replica: [] for replica in range(replicas)}
    present = set(held)
    counted: list[int] = []
    for _ in range(20 * count * replicas):
        if portions.finished:
            break
        replica = random.choice(sorted(present))
        if held[replica] and random.random() < 0.5:
            portion = held[replica].pop(random.randrange(len(held[replica])))
            if portions.done(replica, portion):
                counted.append(portion)
        elif len(present) > 1 and random.random() < 0.05:
            present.remove(replica)
            portions.leave(replica)
        else:
            portion = portions.next(replica)
            if portion is not None:
                assert portion not in held[replica]
                assert portion not in counted
                held[replica].append(portion)
    assert sorted(counted) == list(range(count))
    assert portions.finished
    assert portions.holders() <= present
    assert portions.next(min(present)) is None


def test_a_replica_gets_neighbours():
    portions = Portions(64, 4, True)
    got: dict[int, list[int]] = {replica: [] for replica in range(4)}
    for _ in range(16):
        for replica in got:
            portion = portions.next(replica)
            assert portion is not None
            got[replica].append(portion)
    assert got == {replica: list(range(16 * replica, 16 * replica + 16)) for replica in range(4)}


def test_copies_are_of_the_oldest_and_only_where_asked_for():
    portions, without = Portions(3, 2, True), Portions(3, 2, False)
    for each in (portions, without):
        assert [each.next(0), each.next(1), each.next(0)] == [0, 1, 2]
    assert without.next(1) is None
    assert [portions.next(1), portions.next(1), portions.next(1)] == [0, 2, None]
    assert portions.done(1, 0)
    assert not portions.done(0, 0)


def test_copies_are_made_where_they_help(monkeypatch):
    """Of what would not be done before, or is late; a replica without work is asked again after a while."""
    clock = [0.0]
    monkeypatch.setattr(coordinator, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    given: list[tuple[int, int]] = []

    def post(rank: int, kind: Kind, serial: int, numbers: Any, payload: Any) -> None:
        if kind == Kind.WORK:
            given.append((rank, int(numbers[0])))

    def begun(paces: dict[int, float]) -> Coordinator:
        given.clear()
        history = History(0)
        started = Ended(0, 0, math.nan, 0, history.numbers, ())
        made = Coordinator(history, Cut((0, 1), 4, 8, False), started, True, post)
        made._paces |= paces
        for rank in (0, 1):
            made.hear(Message(rank, Kind.READY, 1, (3.0, 1.0, 2.0), None))
        return made

    begun({0: 20, 1: 1})
    assert given == [(0, 0), (0, 1), (1, 2), (1, 0)]
    begun({0: 1})  # nothing is known of rank 1
    assert given == [(0, 0), (0, 1), (1, 2), (1, 0)]
    alike = begun({0: 1, 1: 1})
    assert given == [(0, 0), (0, 1), (1, 2)]
    for clock[0], rank, portion in ((1, 1, 2), (1.25, 0, 0)):
        alike.hear(Message(rank, Kind.DONE, alike.evaluation, (portion, 0.5, 1.0), None))
    for clock[0] in (1.5, 2.7):
        alike.look_again()
    assert given[3:] == []
    clock[0] = 2.8
    alike.look_again()
    assert given[3:] == [(1, 1)]


@pytest.mark.parametrize("ends", [False, True])
def test_who_has_raised_may_begin_with_other_samples_when_the_others_have_raised_too(ends):
    """It does not depend on who raises first: until then it waits, or hears that they have ended the step."""
    told: list[tuple[int, Kind]] = []
    history = History(0)
    started = Ended(0, 0, math.nan, 0, history.numbers, ())
    made = Coordinator(
        history, Cut((0, 1), 4, 8, False), started, True, lambda rank, kind, *rest: told.append((rank, kind))
    )

    def say(rank: int, kind: Kind, numbers: tuple[float, ...] = (), serial: int = 1) -> None:
        made.hear(Message(rank, kind, serial, numbers, None))

    first, other = (1.0, 1.0, 2.0), (1.0, 3.0, 4.0)
    for rank in (0, 1):
        say(rank, Kind.READY, first)
    say(0, Kind.GIVES_UP)
    told.clear()
    say(0, Kind.READY, other)
    assert told == []
    if ends:
        assert made._data == first
        say(1, Kind.DONE, (0, 0.5, 1.0), made.evaluation)
        assert (1, Kind.SEND) in told and (0, Kind.OVER) not in told and made._data == first
    else:
        say(1, Kind.GIVES_UP)
        assert made._data == other and (0, Kind.WORK) in told and (1, Kind.WORK) not in told
        say(1, Kind.READY, other)
        assert (1, Kind.WORK) in told and (0, Kind.OVER) not in told
        told.clear()
        say(1, Kind.READY, first)  # it has not raised
        assert (0, Kind.OVER) in told and (1, Kind.OVER) in told


def test_late_results_of_what_is_finished_do_not_count():
    portions = Portions(1, 2, True)
    assert portions.next(0) == portions.next(1) == 0
    assert portions.done(1, 0)
    assert portions.finished
    assert not portions.done(0, 0)
    assert portions.finished


@given(st.integers(1, 70), st.randoms(use_true_random=False))
def test_sums_do_not_depend_on_the_order_or_on_who_adds(leaves, random):
    values = np.random.default_rng(leaves).standard_normal((leaves, 3)).astype(np.float32)
    wanted = SumTree(leaves)
    for leaf in range(leaves):
        wanted.add((0, leaf), values[leaf].copy())
    adders = [SumTree(leaves) for _ in range(4)]
    order = list(range(leaves))
    random.shuffle(order)
    for leaf in order:
        random.choice(adders).add((0, leaf), values[leaf].copy())
    total = SumTree(leaves)
    for node, value in random.sample(items := [item for adder in adders for item in adder.nodes.items()], len(items)):
        assert not total.complete
        total.add(node, value)
    assert total.complete
    assert total.total.tobytes() == wanted.total.tobytes()
    np.testing.assert_allclose(total.total, values.sum(0, dtype=np.float64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", range(1, 20))
def test_ranks_hold_whole_parts(ranks):
    parts = parts_for(ranks)
    for size in (0, 1, 5, 1000):
        cuts = [held_by(rank, ranks, size) for rank in range(ranks)]
        assert [cut.start for cut in cuts] == [0, *(cut.stop for cut in cuts[:-1])]
        assert cuts[-1].stop == size
    tree = SumTree(parts)
    for rank in range(ranks):
        for node in nodes_of(*parts_of(rank, ranks), parts):
            tree.add(node, 0)
    assert tree.complete
