"""Waiting for a lock in memory that the ranks of a node share, whose holder may have died with it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from bitring.collectives.node.node_group import NodeGroup
from bitring.waited import Waited

logger = logging.getLogger("bitring")

_LOOK_SECONDS = 0.05
"""A wait of this length is worth a look at who holds the lock; and a Ctrl-C takes effect."""

_SILENCE_SECONDS = 60.0
"""A lock that is held for so long is worth one warning."""


class Holders:
    """Who may hold locks: the ranks of ``group``, of which this one is number ``rank``; None: no other.

    ``limit``: seconds after which a wait is an error.
    """

    def __init__(self, group: NodeGroup | None, rank: int, limit: float) -> None:
        self._group = group
        self._rank = rank
        self._limit = limit

    def until_over(self, attempt: Callable[[float], int], bury: Callable[[int], None], what: str) -> None:
        """Call ``attempt(seconds)`` until it returns -1; before, it returns this rank, or the one that holds a lock.

        Of a rank that has died ``bury`` is told, which takes the lock over. Raises TimeoutError after ``limit``.
        """
        waited, warned = Waited(), False
        while True:
            seconds = waited.look()
            holder = attempt(_LOOK_SECONDS)  # of which what comes now is the outcome, however late
            if holder < 0:
                return
            if holder == self._rank or self._group is None:
                waited = Waited()
                continue
            if self._group.dead(holder):
                bury(holder)
                logger.warning("%s: rank %d has died with a lock, which is taken over", what, self._named(holder))
                continue
            if seconds < min(_SILENCE_SECONDS, self._limit) or (warned and seconds < self._limit):
                continue
            complaint = f"{what} has waited {seconds:.0f} s for rank {self._named(holder)}, which holds a lock"
            if seconds >= self._limit:
                raise TimeoutError(f"{complaint} (BITRING_TIMEOUT={self._limit:g})")
            warned = True
            logger.warning("%s", complaint)

    def _named(self, member: int) -> int:
        return member if self._group is None else self._group.ranks[member]
