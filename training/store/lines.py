"""Lines between the ranks of a store and its shards, whoever answers for a shard: each message arrives once, in order.

A line has two ends: a rank, and a shard. Messages along it are numbered, and each says how many have come the other
way. An end that keeps what it has written can write it again to whoever goes on in the place of the other end, from
the first message on that was not heard there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bitring.collectives.runtime.mailbox import Message
from bitring.training.store.owner import WINDOW, Kind, Owner

_HEAD = 3  # numbers of each message on a line: the shard, its number, how many have come

Send = Callable[[int, Kind, int, Sequence[float], Any], None]


class Letter(NamedTuple):
    """A message along a line. ``numbers`` begin with the shard, the message's number, and how many have come."""

    kind: Kind
    serial: int
    numbers: tuple[float, ...]
    payload: Any


class Line:
    """One end. ``keeps``: what it has written, until that is known to have been heard."""

    def __init__(self, shard: int, keeps: bool) -> None:
        self.came = 0
        """So many messages have come from the other end."""
        self.keeps = keeps
        self.kept: deque[Letter] = deque()
        self._shard = shard
        self._written = 0

    def write(self, kind: Kind, serial: int, numbers: Sequence[float], payload: Any) -> Letter:
        """The next message, as it is to be sent."""
        self._written += 1
        letter = Letter(kind, serial, (self._shard, self._written, self.came, *numbers), payload)
        if self.keeps:
            self.kept.append(letter)
        return letter

    def read(self, numbers: Any) -> Any:
        """The numbers that a message had when it was written; None where it has come before."""
        _, number, heard = map(int, numbers[:_HEAD])
        self.forget(heard)
        if number <= self.came:
            return None
        assert number == self.came + 1
        self.came = number
        return numbers[_HEAD:]

    def forget(self, heard: int) -> None:
        """The other end has heard so many."""
        while self.kept and self.kept[0].numbers[1] <= heard:
            self.kept.popleft()


class Twin:
    """The owner of a shard of which another rank has a copy, or that copy: both do the same with the same messages.

    ``members``: so many ranks. ``owner_of``: makes the owner, given what sends. ``copy``: whether it is the copy, which
    keeps what it would send.
    """

    def __init__(self, shard: int, members: int, owner_of: Callable[[Send], Owner], copy: bool) -> None:
        self.count = 0
        """So many messages have been heard."""
        self.lines = [Line(shard, keeps=copy) for _ in range(members)]
        self.due: deque[tuple[int, int, Letter]] = deque()
        """What is to be sent when the copy has heard so many messages: that number, the member, the message."""
        self.owner = owner_of(self._answer)
        self._told = [0] * members

    def hear(self, message: Message) -> None:
        """Act on a member's message, or on that of its death."""
        member, kind = message.source, message.kind
        self.count += 1
        if kind == Kind.DIED:
            self.owner.hear(message)
            return
        line = self.lines[member]
        self.owner.hear(message._replace(numbers=line.read(message.numbers)))
        if kind == Kind.END or line.came - self._told[member] >= 2 * WINDOW:
            self._answer(member, Kind.HEARD, 0, (), None)

    def _answer(self, member: int, kind: Kind, serial: int, numbers: Sequence[float], payload: Any) -> None:
        line = self.lines[member]
        self._told[member] = line.came
        letter = line.write(kind, serial, numbers, payload)
        if not line.keeps:
            self.due.append((self.count, member, letter))

    def take_over(self) -> list[list[Letter]]:
        """From now on the copy is the shard. Returns, by member, what it may have missed."""
        missed = [list(line.kept) for line in self.lines]
        for line in self.lines:
            line.keeps = False
            line.kept.clear()
        return missed

    @property
    def done(self) -> bool:
        """Whether nothing more comes from any member."""
        return len(self.owner.rule.ended) == len(self.lines)
