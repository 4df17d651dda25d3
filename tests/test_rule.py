"""The store's rule, alone: every interleaving of pushes, reads, clocks and leaving, at several shards."""

import itertools
import math
from collections import defaultdict, deque
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from bitring.native import extension, native
from bitring.training.store.rule import Apply, Claim, Defer, Drop, Rule, Serve, Settle, Terms

pytestmark = pytest.mark.single

TERMS = st.one_of(
    st.builds(
        Terms,
        gather=st.integers(1, 4),
        staleness=st.one_of(st.none(), st.integers(0, 3)),
        scale=st.sampled_from(["none", "inverse"]),
    ),
    st.builds(Terms, gather=st.integers(1, 4), late=st.just("drop")),
)


class Run:
    """Members that read, push and tick; what they send to each shard arrives in their order, when ``choose`` says."""

    def __init__(self, terms: Terms, members: int, shards: int, steps: list[int], choose: Any) -> None:
        self.terms, self.members, self.choose = terms, members, choose
        self.rules = [Rule(terms, members) for _ in range(shards)]
        self.way: dict[tuple[int, int], deque[tuple[Any, ...]]] = defaultdict(deque)
        self.left = steps  # steps that each has to make
        self.clock = [0] * members
        self.waits = [set(range(shards)) for _ in range(members)]  # shards whose answer is missing
        self.seen = [[0] * shards for _ in range(members)]  # versions
        self.at_rest: set[int] = set()
        self.sent: dict[int, list[int]] = {m: [] for m in range(members)}  # the clock of each push
        self.applied: list[list[tuple[int, int]]] = [[] for _ in range(shards)]
        self.dropped: list[list[tuple[int, int]]] = [[] for _ in range(shards)]
        self.settled = 0
        for m in range(members):
            self.send(m, "read")

    def send(self, m: int, *event: Any) -> None:
        for shard in range(len(self.rules)):
            self.way[m, shard].append(event)

    def go(self) -> None:
        while True:
            ready = [(m, None) for m in range(self.members) if not self.waits[m] and m not in self.at_rest]
            ready += [key for key, queue in self.way.items() if queue]  # type: ignore[misc]
            if not ready:
                break
            m, shard = ready[self.choose(len(ready))]
            if shard is None:
                self.step(m)
            else:
                self.deliver(m, shard)

    def step(self, m: int) -> None:
        if not self.left[m]:  # it leaves, or waits for the others; either way it holds nobody back
            self.at_rest.add(m)
            if self.choose(2):
                self.send(m, "leave")
            self.send(m, "rest")
            return
        self.left[m] -= 1
        empty = self.terms.late == "drop" and self.choose(4) == 0  # a step without samples
        self.send(m, "push", len(self.sent[m]), max(self.seen[m]), float(not empty))
        if not empty:
            self.sent[m].append(self.clock[m])
        self.clock[m] += 1
        self.send(m, "clock")
        self.send(m, "read")
        self.waits[m] = set(range(len(self.rules)))
        if self.terms.staleness is not None:
            clocks = [self.clock[other] for other in range(self.members) if other not in self.at_rest]
            assert max(clocks) - min(clocks) <= self.terms.staleness + 1

    def deliver(self, m: int, shard: int) -> None:
        rule, (kind, *rest) = self.rules[shard], self.way[m, shard].popleft()
        if kind == "push":
            number, round_, weight = rest
            actions = rule.push(m, number, weight, round_ if self.terms.late == "drop" else None)
        elif kind == "read":
            actions = rule.read(m, self.clock[m])
        else:
            actions = getattr(rule, kind)(m)
        for action in actions:
            self.act(shard, action)

    def act(self, shard: int, action: Any) -> None:
        rule = self.rules[shard]
        if isinstance(action, Apply):
            assert len(action.pushes) <= self.terms.gather or (not rule.gathered and len(self.at_rest) > 0)
            assert all(each >= 0 for each in action.staleness)
            if self.terms.scale == "none":
                assert math.isclose(sum(action.scales), 1.0)
            else:
                mean = 1 / len(action.pushes)
                for scale, each in zip(action.scales, action.staleness, strict=True):
                    assert math.isclose(scale, mean / max(1, each))
            self.applied[shard] += action.pushes
        elif isinstance(action, Drop):
            assert self.terms.late == "drop"
            self.dropped[shard].append((action.member, action.number))
        elif isinstance(action, Serve):
            m = action.member
            assert action.ticket == self.clock[m]
            self.waits[m].discard(shard)
            self.seen[m][shard] = rule.version
            self.check_read(shard, m)
        elif isinstance(action, Defer):
            assert action.waits_for, "a read waits for nobody"
            if self.terms.late == "keep":
                assert self.terms.staleness is not None
                bound = self.clock[action.member] - self.terms.staleness
                assert all(rule.clocks[other] < bound for other in action.waits_for)
        elif isinstance(action, Settle):
            self.settled += 1
            assert not rule.gathered

    def check_read(self, shard: int, m: int) -> None:
        there = set(self.applied[shard]) | set(self.dropped[shard])
        own = {(m, number) for number in range(len(self.sent[m]))}
        if self.terms.gather == 1 or self.terms.late == "drop":
            assert own <= there
        if self.terms.staleness is not None:
            for other in range(self.members):
                for number, clock in enumerate(self.sent[other]):
                    if clock <= self.clock[m] - self.terms.staleness - 1:
                        assert (other, number) in there


@settings(max_examples=300)
@given(
    TERMS,
    st.integers(1, 4).flatmap(lambda n: st.lists(st.integers(0, 6), min_size=n, max_size=n)),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_every_interleaving(terms, steps, shards, random):
    wanted = list(steps)
    run = Run(terms, len(steps), shards, list(steps), random.randrange)
    run.go()
    assert run.left == [0] * len(steps), f"members wait for ever: {run.waits}"
    assert run.settled == shards
    for shard in range(shards):
        for m, n in enumerate(wanted):
            applied = [number for member, number in run.applied[shard] if member == m]
            dropped = [number for member, number in run.dropped[shard] if member == m]
            assert sorted(applied + dropped) == list(range(len(run.sent[m]))), "each exactly once"
            assert len(run.sent[m]) == n or terms.late == "drop"
            assert applied == sorted(applied), "in order"
    if terms.late == "keep":
        assert not any(run.dropped)


def as_actions(found: list[Any]) -> list[Any]:
    """What the native rule returns, as the reference's actions."""
    kinds: dict[str, Any] = {
        "apply": lambda updates: Apply(
            tuple((member, number) for member, number, _, _ in updates),
            tuple(scale for _, _, scale, _ in updates),
            tuple(staleness for _, _, _, staleness in updates),
        ),
        "drop": Drop,
        "serve": Serve,
        "defer": lambda member, ticket, members: Defer(member, ticket, tuple(members)),
        "claim": Claim,
        "settle": lambda members: Settle(tuple(members)),
    }
    return [kinds[kind](*values) for kind, *values in found]


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(0, 3), st.integers(0, 99), st.sampled_from([1.0, 7.0, 0.0])).flatmap(
            lambda event: st.one_of(st.none(), st.integers(0, 5)).map(lambda version: (*event, version))
        ),
        st.tuples(st.just("read"), st.integers(0, 3), st.integers(0, 99), st.one_of(st.none(), st.integers(0, 6))),
        st.tuples(st.just("claim"), st.integers(0, 3), st.integers(0, 99), st.lists(st.integers(0, 1), max_size=2)),
        st.tuples(st.sampled_from(["clock", "leave", "rest", "go_on", "end", "begin"]), st.integers(0, 3)),
        st.tuples(st.just("clock"), st.integers(0, 3)),
    ),
    max_size=60,
)


@pytest.mark.skipif(native() is None, reason="there is no native engine")
@settings(max_examples=300)
@given(TERMS, st.integers(1, 4), EVENTS, st.data())
def test_the_native_rule_does_the_same(terms, members, events, data):
    clocks = data.draw(st.lists(st.integers(0, 2), min_size=members, max_size=members))
    rule = Rule(terms, members, clocks)
    drops, inverse = terms.late == "drop", terms.scale == "inverse"
    native_rule = extension.StoreRule(terms.gather, drops, terms.staleness, inverse, clocks)
    for kind, member, *values in events:
        if member >= members or (kind == "begin" and (terms.gather > 1 or drops)):
            continue
        if kind == "begin":
            assert native_rule.begin(member) == rule.begin(member)
            continue
        given = [tuple(x) if isinstance(x, list) else x for x in values]
        wanted = getattr(rule, kind)(member, *given) or []
        assert as_actions(getattr(native_rule, kind)(member, *values) or []) == wanted
        for known in ("version", "settled", "common_clocks", "ended", "resting", "missing", "waiting"):
            assert getattr(native_rule, known) == getattr(rule, known), known


def test_async_applies_each_as_it_comes_scaled_by_its_staleness():
    rule = Rule(Terms(scale="inverse"), 2)
    for m in (0, 1):
        assert rule.read(m, 0) == [Serve(m, 0)]
    assert rule.push(0, 0) == [Apply(((0, 0),), (1.0,), (0,))]
    assert rule.push(0, 1) == [Apply(((0, 1),), (1.0,), (1,))]
    assert rule.push(0, 2) == [Apply(((0, 2),), (0.5,), (2,))]
    assert rule.push(1, 0) == [Apply(((1, 0),), (1 / 3,), (3,))]


def test_an_update_that_comes_in_parts_has_the_staleness_of_its_first():
    rule = Rule(Terms(scale="inverse"), 3)
    assert rule.push(1, 0) == [Apply(((1, 0),), (1.0,), (0,))]
    assert rule.push(1, 1) == [Apply(((1, 1),), (1.0,), (1,))]
    assert rule.begin(0) == 0.5  # it has read version 0, and this is 2
    assert rule.push(2, 0) == [Apply(((2, 0),), (0.5,), (2,))]
    assert rule.begin(0) == 0.5
    assert rule.version == 3, "the update is not there yet"
    assert rule.push(0, 0) == [Apply(((0, 0),), (0.5,), (2,))]
    assert rule.push(0, 1) == [Apply(((0, 1),), (0.25,), (4,))]
    with pytest.raises(AssertionError):
        Rule(Terms(gather=2), 3).begin(0)


def test_a_gathering_is_a_mean_in_rank_order_weighted_by_samples():
    rule = Rule(Terms(gather=3), 3)
    assert rule.push(2, 0, 2.0) == []
    assert rule.push(0, 0, 1.0) == []
    assert rule.push(1, 0, 1.0) == [Apply(((0, 0), (1, 0), (2, 0)), (0.25, 0.25, 0.5), (0, 0, 0))]


def test_backup_workers_drop_the_last_of_a_round():
    rule = Rule(Terms(gather=2, late="drop"), 3)
    assert rule.push(1, 0, round_=0) == []
    assert rule.read(1, 7) == [Defer(1, 7, (0, 2))]
    assert rule.push(0, 0, round_=0) == [Apply(((0, 0), (1, 0)), (0.5, 0.5), (0, 0)), Serve(1, 7)]
    assert rule.push(2, 0, round_=0) == [Drop(2, 0)]
    assert rule.read(2, 8) == [Serve(2, 8)]


def test_who_leaves_or_rests_is_not_waited_for():
    for event in ("leave", "rest", "end"):
        rule = Rule(Terms(gather=3, staleness=0), 3)
        rule.push(0, 0)
        rule.clock(0)
        rule.push(1, 0)
        rule.clock(1)
        assert rule.read(0, 1) == [Defer(0, 1, (2,))]
        assert getattr(rule, event)(2) == [Apply(((0, 0), (1, 0)), (0.5, 0.5), (0, 0)), Serve(0, 1)]


def test_settling_makes_clocks_equal_and_leaves_out_who_has_ended():
    rule = Rule(Terms(gather=3), 3)
    rule.push(0, 0)
    rule.clock(0)
    rule.clock(0)
    assert rule.rest(0) == []
    assert rule.end(2) == [Apply(((0, 0),), (1.0,), (0,))]
    assert rule.rest(1) == [Settle((0, 1))]
    assert rule.clocks[:2] == [2, 2]
    assert rule.ended == [2]
    rule.leave(1)
    assert rule.common_clocks == [2, math.inf, 2]


def test_lone_steps_are_a_read_that_waits_for_clocks():
    rule = Rule(Terms(staleness=0), 2, clocks=[0, 2])
    assert rule.read(1, 0, least=2) == [Defer(1, 0, (0,))]
    assert list(itertools.chain(rule.clock(0), rule.clock(0))) == [Serve(1, 0)]


def test_settings_are_checked():
    with pytest.raises(ValueError, match="Terms: gather must be at least 1; got 0"):
        Terms(gather=0)
    with pytest.raises(ValueError, match="Terms: scale must be one of 'none', 'inverse'; got 'half'"):
        Terms(scale="half")
    with pytest.raises(ValueError, match="Terms: late='drop' goes in rounds, and needs staleness=None; got 1"):
        Terms(late="drop", staleness=1)


def test_a_member_that_joins_in_different_rounds_of_two_shards_holds_up_neither():
    here, there = (Rule(Terms(gather=2, late="drop"), 2, [0, 1]) for _ in range(2))
    for rule in (here, there):
        assert Apply(((0, 0),), (1.0,), (0,)) in rule.push(0, 0, round_=0)
        rule.clock(0)
    assert there.read(1, 7, 1) == [Serve(1, 7)]
    assert Apply(((0, 1),), (1.0,), (0,)) in here.push(0, 1, round_=1)
    assert there.push(0, 1, round_=1) == []  # the other one is at work there
    assert here.read(1, 7, 1) == [Serve(1, 7)]
    assert here.push(1, 0, round_=2) == []
    assert there.push(1, 0, round_=2) == [Apply(((0, 1),), (1.0,), (0,))]
    for rule in (here, there):
        assert Apply(((0, 2), (1, 0)), (0.5, 0.5), (0, 0)) in rule.push(0, 2, round_=2)
