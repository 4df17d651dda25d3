"""Handing the portions of a batch to replicas: small ones, to whoever is free, and copies of the last ones.

A pure rule: no messages and no clock. A replica is given consecutive portions where it can be, since it has their
neighbours at hand and adds their gradients; the first is where its own range would begin if the batch were cut into
equal parts. When all are handed out, free replicas get copies of those that are still out, the oldest first, where that
helps. The first result of a portion counts.
"""

from __future__ import annotations

from collections.abc import Callable


class Portions:
    """The portions 0 … ``count`` − 1 of one evaluation, for ``replicas`` numbered from 0."""

    def __init__(self, count: int, replicas: int, backups: bool) -> None:
        self.count = count
        self._replicas = replicas
        self._backups = backups
        self._free = [(0, count)] if count else []  # runs [first, last) that nobody has
        self._last: dict[int, int] = {}  # the portion that a replica got last
        self._held: dict[int, list[int]] = {}  # portion -> its holders; in the order in which they were handed out
        self._queues: dict[int, list[int]] = {}  # replica -> what it has, in that order
        self._done: set[int] = set()

    @property
    def finished(self) -> bool:
        """Whether every portion has a result."""
        return len(self._done) == self.count

    def holders(self) -> set[int]:
        """The replicas that somebody waits for."""
        return {replica for holders in self._held.values() for replica in holders}

    def held(self, replica: int) -> int:
        """The number of portions that the replica has."""
        return len(self._queues.get(replica, ()))

    def places(self, portion: int) -> list[tuple[int, int]]:
        """Who has it: each such replica, and how many others that one has to compute before."""
        return [(replica, self._queues[replica].index(portion)) for replica in self._held[portion]]

    def next(self, replica: int, helps: Callable[[int], bool] = lambda portion: True) -> int | None:
        """Hand a portion, or a copy of one, to the replica; None when there is nothing for it.

        ``helps``: says of a portion that others have whether a copy is of use.
        """
        portion = self._take(replica)
        if portion is None and self._backups:
            out = [(len(holders), age, at) for age, (at, holders) in enumerate(self._held.items())]
            of_use = (each for each in out if replica not in self._held[each[2]] and helps(each[2]))
            portion = min(of_use, default=(0, 0, None))[2]
        if portion is not None:
            self._held.setdefault(portion, []).append(replica)
            self._queues.setdefault(replica, []).append(portion)
        return portion

    def _take(self, replica: int) -> int | None:
        """The next portion of nobody's: after the replica's last one, else the second half of the longest run."""
        if not self._free:
            return None
        wanted = self._last.get(replica, self.count * replica // self._replicas - 1) + 1
        at = next((i for i, (first, last) in enumerate(self._free) if first <= wanted < last), None)
        if at is None:
            at = max(range(len(self._free)), key=lambda i: self._free[i][1] - self._free[i][0])
            first, last = self._free[at]
            wanted = first if last - first == 1 else (first + last) // 2
        first, last = self._free.pop(at)
        self._free[at:at] = [run for run in ((first, wanted), (wanted + 1, last)) if run[0] < run[1]]
        self._last[replica] = wanted
        return wanted

    def done(self, replica: int, portion: int) -> bool:
        """Take note of a result. Returns whether it counts: it is the portion's first."""
        self._give_up(replica, portion)
        if portion in self._done:
            return False
        self._done.add(portion)
        for holder in self._held.pop(portion, ()):
            self._queues[holder].remove(portion)
        return True

    def leave(self, replica: int) -> None:
        """Take back what the replica has."""
        for portion, holders in list(self._held.items()):
            if replica in holders:
                self._give_up(replica, portion)
                if portion not in self._held and portion not in self._done:
                    self._free.append((portion, portion + 1))

    def _give_up(self, replica: int, portion: int) -> None:
        holders = self._held.get(portion, [])
        if replica in holders:
            holders.remove(replica)
            self._queues[replica].remove(portion)
            if not holders:
                del self._held[portion]
