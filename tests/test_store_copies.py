"""Shards with a copy: whoever dies, at any moment, each update of the others is applied once, and nobody waits."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import bitring
from bitring.collectives.runtime.mailbox import Message
from bitring.training.store import service as service_module
from bitring.training.store.codec import Codec
from bitring.training.store.copied_service import CopiedService, keepers_of
from bitring.training.store.layout import Layout
from bitring.training.store.lines import Line
from bitring.training.store.owner import WINDOW, Kind, Owner
from bitring.training.store.packing import Piece, bytes_of, pack, unpack
from bitring.training.store.rule import Rule, Terms
from bitring.training.store.shard import Shard

pytestmark = [pytest.mark.single, pytest.mark.timeout(120)]

STEPS = 6
VALUES = 6
FAREWELL, OBITUARY = 255, 254


class Network:
    """Messages between ranks of one process: in order from each to each, else as ``luck`` has it."""

    def __init__(self, size: int, luck: random.Random) -> None:
        self.size, self.luck = size, luck
        self.wires: dict[tuple[int, int], deque[Message]] = {(a, b): deque() for a in range(size) for b in range(size)}
        self.killed: set[int] = set()

    def kill(self, rank: int) -> None:
        """What it has sent may not get out any more, from some message on."""
        self.killed.add(rank)
        for other in range(self.size):
            wire = self.wires[rank, other]
            for _ in range(self.luck.randrange(len(wire) + 1)):
                wire.pop()


class FakeMailbox:
    """A ``Mailbox`` that keeps, on a network."""

    nbytes_sent = 0

    def __init__(self, comm: Any, keeps: bool) -> None:
        assert keeps
        self._rank, self._network = comm
        self.dead: set[int] = set()
        self.parted: set[int] = set()

    def _others(self) -> list[int]:
        return [rank for rank in range(self._network.size) if rank not in {self._rank} | self.dead]

    def send(self, rank: int, kind: int, serial: int = 0, numbers: Any = (), payload: Any = None) -> None:
        data = np.empty(0, np.uint8) if payload is None else payload.reshape(-1).view(np.uint8).copy()
        assert self._rank not in self.parted
        if rank not in self.dead:
            message = Message(self._rank, int(kind), serial, np.array(numbers, float), data)
            self._network.wires[self._rank, rank].append(message)

    def bury(self, ranks: Any) -> None:
        assert self._rank not in ranks
        if set(ranks) - self.dead:
            self.dead |= set(ranks)
            if self._rank not in self.parted:
                for rank in self._others():
                    self.send(rank, OBITUARY, 0, sorted(self.dead))

    def close(self) -> None:
        if self._rank not in self.parted:
            for rank in self._others():
                self.send(rank, FAREWELL)
            self.parted.add(self._rank)

    @property
    def over(self) -> bool:
        return self._rank in self.parted and {*self._others()} <= self.parted

    def advance(self) -> list[Message]:
        came: list[Message] = []
        sources = list(range(self._network.size))
        self._network.luck.shuffle(sources)
        for source in sources:
            wire = self._network.wires[source, self._rank]
            for _ in range(self._network.luck.randrange(4)):
                if not wire or source in self.dead:
                    break
                message = wire.popleft()
                if message.kind == FAREWELL:
                    self.parted.add(source)
                elif message.kind == OBITUARY:
                    self.bury(set(map(int, message.numbers)))
                else:
                    came.append(message)
        return came


class Job:
    """All ranks of a store in one process."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch, optimizer: bitring.Optimizer) -> None:
        self.luck = luck = random.Random(seed)
        self.size = luck.choice((2, 3, 4))
        owners = list(range(luck.randint(1, self.size)))
        self.terms = Terms(staleness=luck.choice((None, 0, 1)))
        self.network = Network(self.size, luck)
        self.optimizer = optimizer
        monkeypatch.setattr(service_module, "Mailbox", FakeMailbox)
        values = {"w": np.zeros(VALUES)}
        self.layout = layout = Layout(values, len(owners), False)
        codec = Codec(layout, {})
        self.owners = [owner for owner in owners if [*layout.of(owner)]]
        keepers = keepers_of(self.owners, [range(self.size)])

        def owner_of(number: int, send: Any) -> Owner:
            shard, rule = Shard(layout, number, values, optimizer), Rule(self.terms, self.size)
            return Owner(shard, rule, codec, number, self.size, optimizer, send)

        self.services = [
            CopiedService(self.context(rank), self.owners, keepers, owner_of, "test") for rank in range(self.size)
        ]
        self.pushed = [dict.fromkeys(self.owners, 0) for _ in range(self.size)]
        self.seen: dict[tuple[int, int], Any] = {}  # by reader and shard
        self.programs = [self.program(rank) for rank in range(self.size)]
        self.victim = luck.randrange(self.size)
        self.ready = set(range(self.size))  # whose program goes on

    def context(self, rank: int) -> Any:
        queue = SimpleNamespace(loses=lambda dead: None)
        return SimpleNamespace(comm=(rank, self.network), rank=rank, size=self.size, queue=queue)

    def counts(self, values: Any) -> list[int]:
        """How many updates of each rank there are in a value of plain SGD."""
        return [int(values[0] // 100**rank % 100) for rank in range(self.size)]

    def program(self, rank: int) -> Iterator[Any]:
        """A rank's steps; yields what it waits for."""
        service = self.services[rank]
        leaves_at = self.luck.choice((None, None, self.luck.randrange(STEPS)))
        for clock in range(STEPS):
            if clock == leaves_at:
                for owner in self.owners:
                    service.post(owner, Kind.LEAVE)
                break
            yield lambda: all(self.pushed[rank][o] - service.taken[o] < WINDOW for o in self.owners)
            for owner in self.owners:
                part = self.layout.parameters[0].part(owner)
                g = np.full(part.stop - part.start, self.gradient(rank))
                number = self.pushed[rank][owner]
                service.post(owner, Kind.PUSH, number, (1.0, np.nan), pack([Piece(0, None, bytes_of(g))]))
                self.pushed[rank][owner] += 1
            for owner in self.owners:
                service.post(owner, Kind.CLOCK)
            yield from self.ask(rank, Kind.READ, (np.nan, -1.0))
            self.check_reads(rank, clock + 1)
        yield from self.ask(rank, Kind.REST, (0.0, 0.0))
        for owner in self.owners:
            service.post(owner, Kind.END)
        service.ended.add(rank)
        yield lambda: False

    def gradient(self, rank: int) -> float:
        return -(100.0**rank) if isinstance(self.optimizer, bitring.SGD) and not self.optimizer.momentum else -1.0

    def ask(self, rank: int, kind: Kind, numbers: Any) -> Iterator[Any]:
        service = self.services[rank]
        ticket = service.ask(self.owners)
        for owner in self.owners:
            service.post(owner, kind, ticket, numbers)
        yield lambda: not service.awaiting

    def check_reads(self, rank: int, clock: int) -> None:
        if self.gradient(self.size - 1) == -1.0:
            return
        for owner in self.owners:
            values = unpack(self.services[rank].answers[owner].payload)[0].data.view(np.float64)
            counts = self.counts(values)
            assert (values == values[0]).all() and counts[rank] == clock
            if self.terms.staleness is not None:
                behind = [r for r in range(self.size) if counts[r] < clock - self.terms.staleness]
                assert all(r in self.network.killed or self.left(r, counts[r]) for r in behind)
            before = self.seen.get((rank, owner), [0] * self.size)
            assert all(b <= c for b, c in zip(before, counts, strict=True)), "something read was lost"
            self.seen[rank, owner] = counts

    def left(self, rank: int, count: int) -> bool:
        return count == self.pushed[rank][self.owners[0]]

    def run(self) -> list[int]:
        """Until all that are left have ended, with a death. Returns the ranks that are left."""
        dies_at = self.luck.randrange(400)
        waits: list[Any] = [lambda: True] * self.size
        told: dict[int, int] = {}
        for turn in range(60_000):
            left = [rank for rank in range(self.size) if rank not in self.network.killed]
            if turn == dies_at and not self.services[self.victim]._over:
                self.network.kill(self.victim)
                told = {rank: turn + self.luck.randrange(300) for rank in left if rank != self.victim}
                continue
            if all(self.services[rank]._over for rank in left):
                return left
            rank = self.luck.choice(left)
            service = self.services[rank]
            if service._over:
                continue
            if told.get(rank, turn + 1) <= turn:
                service._outlives([self.victim])
            service._carry()
            if waits[rank]() and self.luck.random() < 0.7:
                waits[rank] = next(self.programs[rank])
        raise AssertionError("somebody waits for ever")

    def shards(self, left: list[int]) -> dict[int, Owner]:
        """Who has them at the end."""
        twins = (self.services[rank]._twins for rank in left)
        return {shard: twin.owner for each in twins for shard, twin in each.items()}


def seeds(pytestconfig: pytest.Config) -> range:
    return range(2000 if pytestconfig.getoption("--all") else 70)


def test_each_update_of_those_that_are_left_is_applied_once(monkeypatch, pytestconfig):
    taken_over = 0
    for seed in seeds(pytestconfig):
        job = Job(seed, monkeypatch, bitring.SGD(lr=1.0))
        left = job.run()
        shards = job.shards(left)
        lost = set(job.owners) - shards.keys()  # all was over before: its keeper had no need to take it over
        assert lost <= job.network.killed
        for shard, owner in shards.items():
            values = owner.shard.values[0]
            counts = job.counts(values)
            assert (values == values[0]).all(), f"seed {seed}"
            for rank in range(job.size):
                most = job.pushed[rank][shard]
                assert counts[rank] == most if rank in left else counts[rank] <= most, f"seed {seed}, shard {shard}"
            taken_over += shard in job.network.killed
    assert taken_over > 15


@pytest.mark.parametrize(
    "optimizer",
    [bitring.SGD(lr=0.5, momentum=0.9), bitring.AdaGrad(lr=0.1), bitring.Adam(lr=0.1)],
    ids=lambda each: type(each).__name__,
)
def test_the_optimizers_slots_follow(monkeypatch, optimizer):
    for seed in range(12):
        job = Job(seed, monkeypatch, optimizer)
        for owner in job.shards(job.run()).values():
            alone, slots = {"w": np.zeros(VALUES)}, optimizer.init({"w": np.zeros(VALUES)})
            for _ in range(owner.applied):  # all gradients are equal, so their order is of no matter
                optimizer.update(alone, {"w": -np.ones(VALUES)}, slots)
            shard = owner.shard
            assert (shard.values[0] == alone["w"][0]).all(), f"seed {seed}"
            assert all((shard.slots[slot][0] == slots[slot]["w"][0]).all() for slot in optimizer.slots)


def test_a_message_along_a_line_is_read_once():
    line, other = Line(3, keeps=True), Line(3, keeps=False)
    first, second = (line.write(Kind.PUSH, 0, (number,), None) for number in (7.0, 8.0))
    assert [*other.read(first.numbers)] == [7.0] and other.read(first.numbers) is None
    assert [*line.kept] == [first, second]
    assert [*line.read(other.write(Kind.TAKEN, 0, (), None).numbers)] == []
    assert [*line.kept] == [second]
    assert [*other.read(second.numbers)] == [8.0] and other.came == 2 and not other.kept


def test_a_copy_is_on_another_node_where_there_is_one():
    assert keepers_of(range(4), [range(4)]) == {0: 1, 1: 2, 2: 3, 3: 0}
    assert keepers_of(range(2), [(0, 1), (2, 3)]) == {0: 2, 1: 2}
    assert keepers_of(range(4), [(0, 1), (2, 3)]) == {0: 2, 1: 2, 2: 0, 3: 0}
    assert keepers_of([0], [[0]]) == {}
