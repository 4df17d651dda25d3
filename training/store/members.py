"""The ranks of a node that use one store in the memory they share: clocks, who has left, waits for each other.

All of it is words in that memory; whoever waits sleeps until the bell is rung, and looks now and then who is gone.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from hashlib import blake2b

import numpy as np

from bitring.collectives.node.node_group import NodeGroup
from bitring.collectives.node.shared_words import SharedWords
from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.interrupts import HeldBack
from bitring.collectives.runtime.watch import SILENCE_SECONDS, gone_in_words
from bitring.errors import DeadRankError
from bitring.waited import Waited

logger = logging.getLogger("bitring")

_LOOK_SECONDS = 0.05
_SERVE_SECONDS = 1e-3
"""Below MPI's thread level multiple a wait serves what other stores are asked."""

_GONE_SECONDS = 0.25

_LEFT, _ENDED, _RESTS = 1, 2, 4
"""Bits of a member's state: it pushes nothing more; it does nothing more; it holds nobody back for now."""

_MOST_STALENESS = 255
_TEXT_WORDS = 64
_TEXTS = 8
_ROWS = 1 << 14
"""Their memory is taken as they are used."""


class Members:
    """``words``: ``count(size)`` of them. This is rank ``rank`` of ``size``, all of one node.

    ``group``: theirs, None for a rank alone. ``limit``: seconds after which a wait is an error. ``what``: who waits,
    for messages.
    """

    def __init__(
        self, words: SharedWords, rank: int, size: int, group: NodeGroup | None, limit: float, what: str
    ) -> None:
        self._words = words
        self._rank = rank
        self._size = size
        self._group = group
        self._limit = limit
        self._what = what
        at, self._parts = 0, dict[str, slice]()
        for name, count in _layout(size).items():
            self._parts[name] = slice(at, at + count)
            at += count
        self._arrived = 0
        self._has_met = False  # in a call that was interrupted
        self._heard = 0
        self._news: list[tuple[int, str]] = []
        self.waited = 0.0
        """Seconds, in all."""
        self.waited_for: dict[int, float] = defaultdict(float)
        """Rank -> seconds of these in which it was the last, or one of the last, that was waited for."""

    @staticmethod
    def count(size: int) -> int:
        """Words that so many members take."""
        return sum(_layout(size).values())

    def _part(self, name: str) -> np.ndarray:
        part: np.ndarray = self._words.values[self._parts[name]]
        return part

    # Clocks

    @property
    def clocks(self) -> list[float]:
        """Every member's; infinite for those who have left."""
        states = self._part("states").tolist()
        clocks = self._part("clocks").tolist()
        return [math.inf if s & (_LEFT | _ENDED) else float(c) for s, c in zip(states, clocks, strict=True)]

    @property
    def ended(self) -> list[int]:
        """Those who do nothing more."""
        return [rank for rank, state in enumerate(self._part("states").tolist()) if state & _ENDED]

    def begin(self, clock: int) -> None:
        """This member's clock at the beginning."""
        self._part("clocks")[self._rank] = clock

    def tick(self) -> None:
        """Move this member's clock on by one."""
        self._part("clocks")[self._rank] += 1
        self._words.ring()

    def wait_for_clocks(self, least: int, call: str) -> None:
        """Wait until no other member that holds somebody back has a smaller clock."""

        def behind() -> list[int]:
            states, clocks = self._part("states").tolist(), self._part("clocks").tolist()
            pairs = enumerate(zip(states, clocks, strict=True))
            return [rank for rank, (state, clock) in pairs if rank != self._rank and not state and clock < least]

        self._until(behind, call)

    def leave(self) -> None:
        """This member pushes nothing more."""
        self._set(_LEFT)

    def end(self) -> None:
        """This member does nothing more."""
        self._set(_LEFT | _ENDED)

    def _set(self, bits: int) -> None:
        self._part("states")[self._rank] |= bits
        self._words.ring()

    # All together

    def meet(self, call: str, between: Callable[[], None]) -> None:
        """Wait for all members but those who have ended; ``between``: what is done while none goes on. Collective.

        All clocks are the furthest one's then, but those of members that have left. Who gives up its wait for the
        others, as by Ctrl-C, goes on as before it came; where all had come by then, its next call is the one that met.
        """
        if self._has_met:
            self._has_met = False
            between()
            return
        left = bool(self._part("states")[self._rank] & _LEFT)
        try:
            self._arrive(call, left)
        except BaseException:
            self._has_met = not self._withdrawn()
            if self._has_met:
                self._depart(call, left, lambda: None)
            raise
        self._depart(call, left, between)

    def _arrive(self, call: str, left: bool) -> None:
        self._arrived += 1
        with self._words.held():
            self._part("arrivals")[self._rank] = self._arrived
            self._part("states")[self._rank] |= _RESTS
            if not left:
                most = self._part("most")
                most[0] = max(most[0], self._part("clocks")[self._rank])
        self._words.ring()
        while True:
            self._until(self._missing, call)
            with self._words.held():  # nobody withdraws
                if not self._missing():
                    return

    def _missing(self) -> list[int]:
        """Those who have not arrived where this member is."""
        states, arrivals = self._part("states").tolist(), self._part("arrivals").tolist()
        pairs = enumerate(zip(states, arrivals, strict=True))
        return [rank for rank, (state, arrived) in pairs if not state & _ENDED and arrived < self._arrived]

    def _withdrawn(self) -> bool:
        """This member's arrival is taken back, unless all have arrived."""
        with self._words.held():
            if not self._missing():
                return False
            self._arrived -= 1
            self._part("arrivals")[self._rank] = self._arrived
            self._part("states")[self._rank] &= ~_RESTS
            return True

    def _depart(self, call: str, left: bool, between: Callable[[], None]) -> None:
        """All have arrived. Nobody goes on before all have done what is ``between``, which no Ctrl-C interrupts."""
        with HeldBack():
            between()
            if not left:
                self._part("clocks")[self._rank] = self._part("most")[0]
            self._part("states")[self._rank] &= ~_RESTS
            self._arrived += 1
            self._part("arrivals")[self._rank] = self._arrived
            self._words.ring()
            self._until(self._missing, call)

    def wait_for_ends(self, call: str) -> None:
        """Wait until all members have ended."""
        self._until(lambda: sorted(set(range(self._size)) - set(self.ended)), call)

    # What is told, and handed out

    def trouble(self, text: str, step: int) -> None:
        """Tell all members, this one too, what was wrong with this one's update of a step."""
        data = text.encode(errors="replace")[: 8 * _TEXT_WORDS].ljust(8 * _TEXT_WORDS, b"\0")
        with self._words.held():
            told = self._part("told")
            at = int(told[0]) % _TEXTS * (_TEXT_WORDS + 1)
            entry = self._part("texts")[at : at + _TEXT_WORDS + 1]
            entry[0] = step
            entry[1:] = np.frombuffer(data, np.int64)
            told[0] += 1

    def told(self, step: float) -> str | None:
        """The first thing told of an earlier step than this; with it all others of earlier steps are forgotten.

        Of many that were not asked for the last few are known.
        """
        if int(self._part("told")[0]) != self._heard:
            with self._words.held():
                count = int(self._part("told")[0])
                for number in range(max(self._heard, count - _TEXTS), count):
                    at = number % _TEXTS * (_TEXT_WORDS + 1)
                    entry = self._part("texts")[at : at + _TEXT_WORDS + 1]
                    text = entry[1:].tobytes().rstrip(b"\0").decode(errors="ignore")
                    self._news.append((int(entry[0]), text))
                self._heard = count
        earlier = [text for at, text in self._news if at < step]
        self._news = [each for each in self._news if each[0] >= step]
        return earlier[0] if earlier else None

    def claim(self, row: tuple[int, ...]) -> int:
        """The next number of a row of numbers, 0, 1, 2, ..., each of which one member gets. Rows are never forgotten.

        Raises RuntimeError for one row more than there is room for.
        """
        name = int.from_bytes(blake2b(repr(row).encode(), digest_size=7).digest(), "little") + 1
        with self._words.held():
            names, numbers = self._part("rows"), self._part("numbers")
            for at in range(_ROWS):
                place = (name + at) % _ROWS
                if names[place] in (0, name):
                    names[place] = name
                    number = int(numbers[place])
                    numbers[place] += 1
                    return number
        raise RuntimeError(f"{self._what}: numbers of more than {_ROWS} rows were claimed")

    def count_update(self, seen: int) -> int:
        """Count an update of values that were of the version ``seen``; returns how many there were since: staleness."""
        with self._words.held():
            version = self._part("version")
            staleness = int(version[0]) - seen
            version[0] += 1
            self._part("staleness")[min(staleness, _MOST_STALENESS)] += 1
            return staleness

    @property
    def staleness(self) -> dict[int, int]:
        """Staleness -> how many updates of all members had it; what is larger counts as the largest."""
        return {each: count for each, count in enumerate(self._part("staleness").tolist()) if count}

    @property
    def version(self) -> int:
        """How many updates there have been."""
        return int(self._part("version")[0])

    # Waits

    def _until(self, awaited: Callable[[], Collection[int]], call: str) -> None:
        """Wait until ``awaited``, the members that are waited for, is empty.

        Raises DeadRankError where one of them is gone, TimeoutError after the limit.
        """
        missing = awaited()
        if not missing:
            return
        last = missing
        began, waited, looked, warned = time.monotonic(), Waited(), 0.0, False
        serves = engine.serves_in_waits
        try:
            while True:
                seconds = waited.look()
                seen = self._words.bell
                missing = awaited()
                if not missing:
                    return
                last = missing
                self._words.wait(seen, _SERVE_SECONDS if serves else _LOOK_SECONDS)
                if serves:
                    for queue in list(engine.queues):
                        engine.nudge(queue)
                if seconds - looked < _GONE_SECONDS:
                    continue
                looked = seconds
                gone = [] if self._group is None else self._group.gone(missing, seconds)
                before, missing = missing, awaited()
                last = missing
                if not missing:
                    return
                gone = [rank for rank in gone if rank in missing or rank not in before]  # who came just before it went
                if gone:
                    engine.bereaved = True
                    raise DeadRankError(f"{self._what}.{call}: {gone_in_words(gone)}", gone)
                if seconds >= self._limit or (seconds >= SILENCE_SECONDS and not warned):
                    complaint = (
                        f"rank {self._rank} has waited {seconds:.0f} s in {self._what}.{call} for ranks {list(missing)}"
                    )
                    if seconds >= self._limit:
                        engine.bereaved = True
                        raise TimeoutError(f"{complaint} (BITRING_TIMEOUT={self._limit:g})")
                    warned = True
                    logger.warning("%s", complaint)
        finally:
            seconds = time.monotonic() - began
            self.waited += seconds
            for rank in last:
                self.waited_for[rank] += seconds


def _layout(size: int) -> dict[str, int]:
    """The words, by what they are for."""
    return {
        "clocks": size,
        "states": size,
        "arrivals": size,
        "most": 1,
        "version": 1,
        "staleness": _MOST_STALENESS + 1,
        "told": 1,
        "texts": _TEXTS * (_TEXT_WORDS + 1),
        "rows": _ROWS,
        "numbers": _ROWS,
    }
