"""The rule of a store as data: when an update is applied, and when a read is served. No MPI and no arrays in it.

One ``Rule`` stands for one shard. It is told events, in the order in which they happen there: a member's ``push``,
``read``, ``clock`` and ``leave``. Each returns what is to be done now, in this order: ``Apply``, ``Drop``, ``Serve``,
``Defer``, ``Settle``. A member's events come in its own order; those of different members in any.

The three questions, as settings (``Terms``):

- when is an update applied: as it comes, or once ``gather`` of them are there, as their mean; each perhaps divided by
  its staleness (Zhang et al., IJCAI 2016), the updates applied between its read and its application;
- when is a read served: at once, or when every member's clock is at least its own less ``staleness``: then it sees
  all updates of clocks up to its own − staleness − 1 (Ho et al., NIPS 2013);
- what becomes of the late: they count all the same, or are dropped (Chen et al., 2016). Dropping goes in rounds: an
  update belongs to the round that its reader saw last; the first ``gather`` of a round are applied, the rest dropped,
  and a member's next read waits until the round of its last update is over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bitring.settings import Settings, setting


@dataclass(frozen=True)
class Terms(Settings):
    """The settings of a rule; see the module. ``staleness`` None: no read waits.

    Raises ValueError for late updates that are dropped together with a staleness: rounds are their bound.
    """

    gather: int = setting(1, least=1)
    staleness: int | None = setting(None, least=0)
    scale: str = setting("none", one_of=("none", "inverse"))
    late: str = setting("keep", one_of=("keep", "drop"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.late == "drop" and self.staleness is not None:
            raise ValueError(
                f"{type(self).__name__}: late='drop' goes in rounds, and needs staleness=None; got {self.staleness}"
            )


class Apply(NamedTuple):
    """Apply the sum of these updates, each times its scale: (member, number) of each, scales, staleness of each."""

    pushes: tuple[tuple[int, int], ...]
    scales: tuple[float, ...]
    staleness: tuple[int, ...]


class Drop(NamedTuple):
    """Forget an update: it came too late."""

    member: int
    number: int


class Serve(NamedTuple):
    """Answer a read with the values as they are now."""

    member: int
    ticket: int


class Defer(NamedTuple):
    """A read waits, for these members."""

    member: int
    ticket: int
    waits_for: tuple[int, ...]


class Claim(NamedTuple):
    """Answer a claim with the next number."""

    member: int
    ticket: int
    number: int


class Settle(NamedTuple):
    """All members rest, and everything is applied: answer each of these."""

    members: tuple[int, ...]


Action = Apply | Drop | Serve | Defer | Claim | Settle


class _Push(NamedTuple):
    clock: int
    member: int
    number: int
    weight: float
    read: int  # the version that it was computed from


class _Read(NamedTuple):
    ticket: int
    least: float  # every clock must be at least this


class Rule:
    """The rule of one shard of ``members`` members. ``clocks``: those that they begin with, else zeros.

    Members that begin with another clock than 0 are absent until their first read is served: nobody waits for them.

    ``version`` counts the updates applied, each gathering as one; ``settled`` how often all have settled.
    """

    def __init__(self, terms: Terms, members: int, clocks: Sequence[int] | None = None) -> None:
        self.terms = terms
        self.version = 0
        self.settled = 0
        self.clocks: list[int] = [0] * members if clocks is None else list(clocks)
        self._left = [False] * members
        self._absent = [clock > 0 for clock in self.clocks]
        self._resting = [False] * members
        self._ended = [False] * members
        self._seen = [0] * members  # the version that each was served last
        self._begun: dict[int, int] = {}  # member -> the version at which the application of its next update began
        self._gathered: list[_Push] = []
        self._early: list[_Push] = []  # of rounds to come: their members have seen another shard's
        self._waiting: dict[int, _Read] = {}
        self._claimed: dict[tuple[float, ...], int] = {}  # of each row, the number that was given last

    # Events

    def push(self, member: int, number: int, weight: float = 1.0, round_: int | None = None) -> list[Action]:
        """An update of ``weight`` samples has come. ``round_``: the latest its reader saw, where late are dropped.

        ``weight`` 0: a step without samples, which counts for its round.
        """
        push = _Push(self.clocks[member], member, number, weight, self._seen[member] if round_ is None else round_)
        if self.terms.late == "keep" or push.read == self.version:
            self._gathered.append(push)
        elif push.read > self.version:
            self._early.append(push)
        elif weight:
            return [Drop(member, number), *self._go_on()]
        return self._go_on()

    def begin(self, member: int) -> float:
        """A part of a member's next update has come, which is applied at once: what it is to be multiplied by.

        Where updates are applied as they come. All parts have the staleness of the first.
        """
        assert self.terms.gather == 1 and self.terms.late == "keep"
        staleness = self._begun.setdefault(member, self.version) - self._seen[member]
        return 1.0 / max(1, staleness) if self.terms.scale == "inverse" else 1.0

    def read(self, member: int, ticket: int, least: int | None = None) -> list[Action]:
        """A member asks for the values; an earlier read of it is void. ``least``: wait for these clocks of all."""
        bound = -math.inf
        if least is not None:
            bound = least
        elif self.terms.staleness is not None and not self._left[member]:
            bound = self.clocks[member] - self.terms.staleness
        self._waiting[member] = _Read(ticket, bound)
        actions = self._go_on()
        if member in self._waiting:
            actions.append(Defer(member, ticket, self._awaited(member)))
        return actions

    def claim(self, member: int, ticket: int, row: tuple[float, ...]) -> list[Action]:
        """A member asks for the next number of a row of numbers."""
        self._claimed[row] = self._claimed.get(row, -1) + 1
        return [Claim(member, ticket, self._claimed[row])]

    def clock(self, member: int) -> list[Action]:
        """A member's clock moves on by one: what it pushed before was of the clock before."""
        self.clocks[member] += 1
        return self._go_on()

    def leave(self, member: int) -> list[Action]:
        """A member pushes nothing more; nobody waits for it. It may still read."""
        self._left[member] = True
        return self._go_on()

    def rest(self, member: int) -> list[Action]:
        """A member waits until all others rest, too; meanwhile nobody waits for it."""
        self._resting[member] = True
        return self._go_on()

    def go_on(self, member: int) -> None:
        """A member rests no more: it has given up its wait for the others."""
        self._resting[member] = False

    def end(self, member: int) -> list[Action]:
        """A member does nothing more at all."""
        self._ended[member] = True
        self._waiting.pop(member, None)
        return self._go_on()

    # What can be told of it

    @property
    def common_clocks(self) -> list[float]:
        """Each member's clock; infinite for those who have left."""
        return [math.inf if left else clock for clock, left in zip(self.clocks, self._left, strict=True)]

    @property
    def ended(self) -> list[int]:
        """The members that do nothing more at all."""
        return [member for member, ended in enumerate(self._ended) if ended]

    @property
    def resting(self) -> list[int]:
        """The members that wait until all others do."""
        return [member for member, rests in enumerate(self._resting) if rests]

    @property
    def missing(self) -> list[int]:
        """The members for whom those who rest wait."""
        return [m for m, kinds in enumerate(zip(self._resting, self._ended, strict=True)) if not any(kinds)]

    @property
    def waiting(self) -> int:
        """Reads that wait."""
        return len(self._waiting)

    @property
    def gathered(self) -> int:
        """Updates that have come and are neither applied nor dropped."""
        return len(self._gathered) + len(self._early)

    # The rule

    def _at_work(self) -> list[int]:
        """The members that others may have to wait for."""
        idle = zip(self._left, self._resting, self._ended, self._absent, strict=True)
        return [member for member, kinds in enumerate(idle) if not any(kinds)]

    def _awaited(self, member: int) -> tuple[int, ...]:
        if self.terms.late == "drop":
            return tuple(m for m in self._at_work() if m != member)
        least = self._waiting[member].least
        return tuple(m for m in self._at_work() if self.clocks[m] < least)

    def _go_on(self) -> list[Action]:
        actions: list[Action] = []
        while True:
            at_work = self._at_work()
            if self._gathered and len(self._gathered) >= min(self.terms.gather, max(1, self._expected(at_work))):
                actions += self._apply()
                continue
            ready = [m for m, read in self._waiting.items() if self._may_read(m, read, at_work)]
            for m in ready:
                actions += self._serve(m, self._waiting.pop(m))
            if not ready:
                break
        if all(rests or ended for rests, ended in zip(self._resting, self._ended, strict=True)) and any(self._resting):
            actions += self._settle()
        return actions

    def _expected(self, at_work: Sequence[int]) -> int:
        """How many members may have an update in what is gathered; those with one of a round to come have none more.

        A member's update may be of a later round here where another shard has gathered without it, which had not come.
        """
        if not self._early:
            return len(at_work)
        return len({push.member for push in self._gathered} | set(at_work) - {push.member for push in self._early})

    def _may_read(self, member: int, read: _Read, at_work: Sequence[int]) -> bool:
        if self.terms.late == "drop":
            own = any(push.member == member for push in (*self._gathered, *self._early))
            return not own and self._reached(read, at_work)
        return self._reached(read, at_work)

    def _reached(self, read: _Read, at_work: Sequence[int]) -> bool:
        return all(self.clocks[m] >= read.least for m in at_work)

    def _serve(self, member: int, read: _Read) -> list[Action]:
        """Serve a read that may see what has come; what it must see is applied before."""
        actions: list[Action] = []
        if any(push.clock < read.least for push in self._gathered):
            actions += self._apply()
        self._seen[member] = self.version
        self._absent[member] = False
        return [*actions, Serve(member, read.ticket)]

    def _apply(self) -> list[Action]:
        """Apply what is gathered, in the order of clocks and members; another round begins.

        An update without samples counts for its round, and is not applied.
        """
        pushes = sorted(push for push in self._gathered if push.weight)
        total = sum(push.weight for push in pushes)
        staleness = tuple(self._begun.pop(push.member, self.version) - push.read for push in pushes)
        scales = tuple(push.weight / total for push in pushes)
        if self.terms.scale == "inverse":
            scales = tuple(scale / max(1, each) for scale, each in zip(scales, staleness, strict=True))
        self.version += bool(pushes) or self.terms.late == "drop"
        self._gathered = []
        actions: list[Action] = []
        if pushes:
            actions.append(Apply(tuple((p.member, p.number) for p in pushes), scales, staleness))
        if self._early:
            early, self._early = self._early, []
            for push in early:
                if push.read == self.version:
                    self._gathered.append(push)
                elif push.read > self.version:
                    self._early.append(push)
                elif push.weight:
                    actions.append(Drop(push.member, push.number))
        return actions

    def _settle(self) -> list[Action]:
        """Apply what is left; clocks of those who go on become equal."""
        self.settled += 1
        actions: list[Action] = []
        self._gathered += self._early
        self._early = []
        if self._gathered:
            actions += self._apply()
        latest = max(self.clocks)
        for member, left in enumerate(self._left):
            if not left:
                self.clocks[member] = latest
        members = tuple(m for m, ended in enumerate(self._ended) if not ended)
        for member in members:
            self._resting[member] = self._absent[member] = False
            self._seen[member] = self.version
            self._waiting.pop(member, None)
        return [*actions, Settle(members)]
