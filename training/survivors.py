"""After a death: those that are left find out where they all were, and cut the shards anew among themselves.

Each tells the first of them, the *leader*, which step it has heard the end of. The latest such step is where all go on:
a shard can take back what the step after it has changed. Then each sends the values of its shard, and of the copy that
it keeps of a dead rank's, to whom they belong from now on, as shards and as copies. What a rank held before it keeps
until all have what they need, so another death in the middle of this only begins it again. No vector is changed: the
step is made again with the same bits.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from bitring.collectives.runtime.mailbox import Message
from bitring.collectives.runtime.watch import are
from bitring.training.coordinator import Ended, Kind
from bitring.training.cut import Cut, Holding
from bitring.training.lbfgs import NUMBERS, History
from bitring.training.sum_tree import SumTree

logger = logging.getLogger("bitring")

KINDS = frozenset({Kind.REPORT, Kind.MOVE, Kind.ROWS, Kind.MOVED, Kind.RESUME, Kind.LOST})
"""The messages of this module."""

_NOWHERE = -1

Post = Callable[[int, Kind, int, Sequence[float], Any], None]


class _Room:
    """Where the vectors of a shard, or of a copy, come together, in rows."""

    def __init__(self, width: int) -> None:
        self._rows: Any = None
        self._width = self._missing = width

    def put(self, first: int, rows: Any) -> None:
        if self._rows is None:
            self._rows = np.empty((len(rows), self._width))
        self._rows[:, first : first + rows.shape[1]] = rows
        self._missing -= rows.shape[1]

    @property
    def full(self) -> bool:
        return self._missing == 0

    def rows(self, count: int) -> Any:
        return np.empty((count, 0)) if self._rows is None else self._rows


class Survivors:
    """One rank's part, after one death or several at once; after a further one another begins.

    ``held``: what the rank holds; ``spare``: what it was about to hold when a further rank died, if that was complete.
    ``evaluation``: the last that it has heard of; ``meetings``: how many have been. ``ended``: the last step. When
    ``over`` they are where all go on.
    """

    def __init__(
        self,
        rank: int,
        dead: Collection[int],
        held: Holding,
        spare: Holding | None,
        ended: Ended,
        evaluation: int,
        meetings: int,
        memory: int,
        send: Post,
    ) -> None:
        self.held, self.spare = held, spare
        self.ended, self.evaluation, self.meetings = ended, evaluation, meetings
        self.over = False
        self.dead = sorted(dead)
        self.history: History | None = None
        """The leader's, when it is over."""
        self._rank, self._memory, self._send = rank, memory, send
        members = tuple(each for each in held.cut.members if each not in dead)
        self.leader = members[0]
        self._cut = dataclasses.replace(held.cut, members=members)
        kept = self._cut.kept_by(rank)
        self._rooms = [_Room(_width(self._cut.at(each))) for each in (rank, kept) if each is not None]
        self._moving = False
        self.new: Holding | None = None
        """What this rank is to hold, when it is complete."""
        self._reports: dict[int, Message] = {}
        self._grams: dict[int, Any] = {}
        numbers = [held.era, _NOWHERE if spare is None else spare.era, evaluation, meetings, *ended.numbers]
        send(self.leader, Kind.REPORT, ended.step, numbers, np.frombuffer(ended.text, np.uint8))

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that are left."""
        return self._cut.members

    @property
    def awaited(self) -> set[int]:
        """The ranks that this one waits for."""
        if self._rank != self.leader:
            return {self.leader}
        return set(self.members) - set(self._grams if len(self._reports) == len(self.members) else self._reports)

    def hear(self, message: Message) -> None:
        """Act on a message of ``KINDS``, but LOST."""
        source, kind, step, numbers, payload = message
        if kind == Kind.REPORT:
            self._reports[source] = message
            if len(self._reports) == len(self.members):
                self._decide()
        elif kind == Kind.MOVE:
            self.evaluation, self.meetings = map(int, numbers[1:3])
            self.ended = Ended.of(step, numbers[3:], payload)
            self._move(int(numbers[0]))
            self._complete()
        elif kind == Kind.ROWS:
            room, first, rows = map(int, numbers)
            self._rooms[room].put(first, payload.view(np.float64).reshape(rows, -1))
            self._complete()
        elif kind == Kind.MOVED:
            self._grams[source] = payload.view(np.float64)
            if len(self._grams) == len(self.members):
                self._remember()
                self._tell(Kind.RESUME, step, (), None)
        else:
            self.over = True

    def say(self, step: int) -> None:
        """Log that the others go on, making this step."""
        left = len(self.members)
        text = "Sandblaster: %s gone; %d of %d ranks go on, with step %d anew"
        logger.warning(text, are(self.dead), left, left + len(self.dead), step)

    def _tell(self, kind: Kind, step: int, numbers: Sequence[float], payload: Any) -> None:
        for rank in self.members:
            self._send(rank, kind, step, numbers, payload)

    def _decide(self) -> None:
        """The leader's, when all have reported: where to go on, and from what."""
        era = max(int(report.numbers[0]) for report in self._reports.values())
        evaluation, meetings = (max(int(report.numbers[i]) for report in self._reports.values()) for i in (2, 3))
        ends = [Ended.of(report.serial, report.numbers[4:], report.payload) for report in self._reports.values()]
        # Where some have loaded a state, which all will do again, shards have different numbers of pairs.
        latest = max(ends, key=lambda ended: (ended.step, -_pairs(ended)))
        if era != self.held.era:
            assert self.spare is not None
            self.held = self.spare
        cut = self.held.cut
        if any(_supplier(cut, owner, self.members) is None for owner in cut.members):
            self._tell(Kind.LOST, latest.step, (), None)
            return
        text = np.frombuffer(latest.text, np.uint8)
        self._tell(Kind.MOVE, latest.step, [era, evaluation, meetings, *latest.numbers], text)

    def _move(self, era: int) -> None:
        """Send what this rank has to where it belongs from now on."""
        if era != self.held.era:  # the others had come so far; so it is complete
            assert self.spare is not None
            self.held = self.spare
        self.spare = None
        self._moving = True
        cut = self.held.cut
        for owner in cut.members:
            if _supplier(cut, owner, self.members) != self._rank:
                continue
            shard = self.held.shard if owner == self._rank else self.held.copy
            assert shard is not None
            rows = shard.after(self.ended.step, _pairs(self.ended))
            old = cut.at(owner)
            for member in self.members:
                new = self._cut.at(member)
                first, last = max(old.start, new.start), min(old.stop, new.stop)
                if first >= last:
                    continue
                part = np.ascontiguousarray(rows[:, first - old.start : last - old.start])
                for room, receiver in enumerate((member, self._cut.keeper(member))):
                    if receiver is not None:
                        numbers = [room, first - new.start, len(part)]
                        self._send(receiver, Kind.ROWS, self.ended.step, numbers, part)

    def _complete(self) -> None:
        """Take over what this rank is to hold, when it is all there."""
        if self.new is not None or not self._moving or not all(room.full for room in self._rooms):
            return
        kept = self._cut.kept_by(self._rank)
        shards = []
        for owner, room in zip((self._rank, kept), self._rooms, strict=False):
            assert owner is not None
            rows = room.rows(2 + 2 * _pairs(self.ended))
            shards.append(self._cut.shard(owner, rows[0], self._memory))
            shards[-1].load(rows, self.ended.step)
        self.new = Holding(len(self.dead), self._cut, shards[0], shards[1] if kept is not None else None)
        self._send(self.leader, Kind.MOVED, self.ended.step, (), shards[0].gram())

    def _remember(self) -> None:
        """The leader's: L-BFGS's history, from what all ranks know and the vectors' products."""
        history = History.of(self._memory, self.ended.history)
        products = SumTree(self._cut.parts)
        for rank, gram in self._grams.items():
            nodes = self._cut.nodes(rank)
            for node, values in zip(nodes, gram.reshape(len(nodes), -1), strict=True):
                products.add(node, values.copy())
        history.remeasured(products.total)
        self.history = history


def _pairs(ended: Ended) -> int:
    return int(ended.history[NUMBERS.index("pairs")])


def _width(values: slice) -> int:
    return int(values.stop - values.start)


def _supplier(cut: Cut, owner: int, alive: Collection[int]) -> int | None:
    """Who has the values of a rank's shard: it, else its keeper; None where both are dead."""
    if owner in alive:
        return owner
    keeper = cut.keeper(owner)
    return keeper if keeper in alive else None
