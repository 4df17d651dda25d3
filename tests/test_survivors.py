"""What ranks agree on after deaths, in any order of messages and deaths; without MPI."""

import random as randoms
from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bitring.collectives.runtime.mailbox import Message
from bitring.training.coordinator import Ended, Kind
from bitring.training.cut import Cut, Holding
from bitring.training.lbfgs import History
from bitring.training.shard import parts_for
from bitring.training.survivors import Survivors

pytestmark = pytest.mark.single

MEMORY, SIZE, STEP = 3, 37, 5
PAIRS = 2


class Rank:
    """A rank that has heard of the end of step ``STEP``, or is to hear of it, and has begun the next one."""

    def __init__(self, rank: int, cut: Cut, before: Any, after: Any, random: randoms.Random, net: Any) -> None:
        self.rank, self.net = rank, net
        self.dead: set[int] = set()
        self.survivors: Survivors | None = None
        self.lost = False
        self.held = Holding.of(0, cut, rank, before[0], MEMORY)
        self.held.load(rank, before, STEP - 1)
        for shard, owner in ((self.held.shard, rank), (self.held.copy, cut.kept_by(rank))):
            if shard is None or owner is None:
                continue
            s, g = after[3][cut.at(owner)], after[1][cut.at(owner)]
            shard.open(STEP)
            shard.follow(s, g, PAIRS - 1, True)
            if random.random() < 0.5:  # it has gone on
                shard.open(STEP + 1)
                shard.follow(s, g + 1, random.choice([0, PAIRS]), True)
        heard = rank == 0 or random.random() < 0.5  # one has
        history = History.of(MEMORY, [PAIRS, 0.5, 1, -1, STEP, 7, 0])
        self.ended = Ended(STEP if heard else STEP - 1, 0, 0.5, 9, history.numbers if heard else (1,) * 7, (4, 1, 2))

    def learn(self, dead: set[int]) -> None:
        if dead <= self.dead or self.rank in dead:
            return
        self.dead |= dead
        for queue in (self.net[source, self.rank] for source in self.dead):
            queue.clear()
        before, spare = self.survivors, None
        if before is not None and before.over:
            assert before.new is not None
            self.held, self.ended = before.new, before.ended
        elif before is not None:
            self.held, spare = before.held, before.new or before.spare
        self.lost = False
        self.survivors = Survivors(
            self.rank, self.dead, self.held, spare, self.ended, 9 + self.rank, self.rank, MEMORY, self.send
        )

    def send(self, rank: int, kind: Kind, serial: int, numbers: Any, payload: Any) -> None:
        data = np.empty(0, np.uint8) if payload is None else payload.reshape(-1).view(np.uint8).copy()
        message = Message(self.rank, kind, serial, np.array(numbers, np.float64), data)
        self.net[self.rank, rank].append((set(self.dead), message))

    def hear(self, dead: set[int], message: Message) -> None:
        self.learn(dead)
        if len(dead) < len(self.dead) or self.lost:
            return
        assert self.survivors is not None
        if message.kind == Kind.LOST:
            self.lost = True
        else:
            self.survivors.hear(message)


def vectors(rng: Any) -> tuple[Any, Any]:
    """w, g, s, y in rows: those before a step, of one pair, and after it, of two."""
    w, g, s0, y0, s, gradient = rng.standard_normal((6, SIZE))
    return np.array([w, g, s0, y0]), np.array([w + s, gradient, s0, s, y0, gradient - g])


@example(6, 313)  # the next one dies when some have not heard that the others have gone on
@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_all_go_on_from_the_same_step_or_all_hear_that_a_shard_is_lost(ranks, seed):
    random = randoms.Random(seed)
    before, after = vectors(np.random.default_rng(seed))
    net: dict[tuple[int, int], deque[Any]] = {(a, b): deque() for a in range(ranks) for b in range(ranks)}
    cut = Cut(tuple(range(ranks)), SIZE, parts_for(ranks), True)
    alive = [Rank(rank, cut, before, after, random, net) for rank in range(ranks)]
    if random.random() < 0.5:  # who has heard of the step's end dies, too, but for another
        alive[-1].ended = alive[0].ended
    died: set[int] = set()
    for _ in range(random.randint(1, min(2, ranks - 1))):
        victim = random.choice(alive)
        if len(alive) == 2 and victim.ended.step == STEP:
            victim = next((each for each in alive if each.ended.step < STEP), victim)
        if sum(each.ended.step == STEP for each in alive if each is not victim) == 0:
            continue
        alive.remove(victim)
        died.add(victim.rank)
        for queue in (net[victim.rank, each] for each in range(ranks)):
            queue.clear()
        for _ in range(random.randint(0, 8 * ranks**2)):
            step(alive, died, net, random)
    if not died:
        return
    while any(net[a.rank, b.rank] for a in alive for b in alive) or any(each.dead != died for each in alive):
        step(alive, died, net, random)
    if any(each.lost for each in alive):
        assert all(each.lost for each in alive)
        gone = {owner for owner in cut.members if {owner, cut.keeper(owner)} <= died}
        assert gone
        return
    shards = []
    for each in alive:
        assert each.survivors is not None
        assert each.survivors.over
        new = each.survivors.new
        assert new is not None
        assert new.cut.members == tuple(rank.rank for rank in alive)
        assert each.survivors.ended.step == STEP
        assert each.survivors.evaluation >= max(9 + rank.rank for rank in alive)
        assert each.survivors.meetings >= max(rank.rank for rank in alive)
        shards.append(new.shard.after(STEP, PAIRS))
        kept = new.cut.kept_by(each.rank)
        assert (new.copy is None) == (kept is None) == (len(alive) == 1)
        if new.copy is not None and kept is not None:
            np.testing.assert_array_equal(new.copy.after(STEP, PAIRS), after[:, new.cut.at(kept)])
    np.testing.assert_array_equal(np.concatenate(shards, axis=1), after)
    history = next(each.survivors.history for each in alive if each.survivors and each.survivors.history)
    basis = after[[2, 3, 4, 5, 1]]
    used = history.gram[np.ix_(history.basis, history.basis)]
    np.testing.assert_allclose(used, basis @ basis.T, rtol=1e-12, atol=1e-12)


def step(alive: list[Rank], died: set[int], net: Any, random: randoms.Random) -> None:
    """One rank learns of a death, or a message arrives."""
    by_rank = {each.rank: each for each in alive}
    full = [pair for pair, queue in net.items() if queue and pair[1] in by_rank]
    if not full or random.random() < 0.1:
        random.choice(alive).learn({random.choice(sorted(died))})
        return
    source, rank = random.choice(full)
    by_rank[rank].hear(*net[source, rank].popleft())
