"""What a rank does for a store beside its computing: a job that goes on until ``free``.

It carries messages, is the owner of the rank's shard, and takes what answers the rank's own requests. The thread that
trains leaves messages in ``post`` and waits for what is here; the job runs on the progress thread, or in any thread of
this rank's that waits for anything. ``PortableService`` serves everywhere and is the reference; ``native_service`` has
the one that needs no interpreter where nothing but the usual is asked.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bitring.collectives.interop.steps import Progress, Steps
from bitring.collectives.runtime.context import Context
from bitring.collectives.runtime.mailbox import Mailbox, Message
from bitring.training.store.owner import Kind, Owner, ShardOwner

_SILENT_SECONDS = 1.0
_STILL_THERE_SECONDS = 10.0

_ANSWERS = frozenset({Kind.VALUES, Kind.SETTLED, Kind.ARE, Kind.CLAIMED})


class Service(ABC):
    """One rank's part. ``owners``: their ranks."""

    def __init__(self, context: Context, owners: Sequence[int]) -> None:
        self.owner: ShardOwner | None = None
        self.awaiting: set[int] = set()  # owners whose answer the training thread waits for
        self.ticket = 0  # of its last request
        self.answers: dict[int, Message] = {}  # to that request, by the owner's rank
        self.without_room: set[int] = set()  # owners to whom it has sent as much as it may, and waits for that
        self.leaves = False  # it waits for the end of all
        self._got_on = 0  # how often the training thread has; it may have begun another wait since the last look
        self.taken = dict.fromkeys(owners, 0)  # updates that each has taken over
        self.dropped: deque[tuple[int, int]] = deque()  # owner and number of updates that were
        self.troubles: deque[tuple[int, str]] = deque()  # step and text
        self.troubles_heard = 0
        self.clocks = [0.0] * context.size  # as heard last
        self.ended: set[int] = set()
        self.dead: set[int] = set()  # whom it goes on without
        self._context = context
        self._held_by: dict[int, set[int]] = {}  # members that this rank's request waits for, by owner

    @property
    def owners(self) -> Sequence[ShardOwner]:
        """Of the shards that this rank answers for."""
        return [] if self.owner is None else [self.owner]

    def load(self, values: Mapping[str, Any], slots: Mapping[str, Mapping[str, Any]]) -> None:
        """Have all shards here go on from these, given whole, while no job advances."""
        for owner in self.owners:
            owner.load(values, slots)

    @property
    @abstractmethod
    def nbytes_sent(self) -> int:
        """To other ranks, so far."""

    def held_by(self, owners: Collection[int]) -> set[int]:
        """The ranks that these owners have said the last request waits for."""
        return set[int]().union(*(self._held_by.get(owner, ()) for owner in owners))

    @abstractmethod
    def post(self, rank: int, kind: Kind, serial: int = 0, numbers: Sequence[float] = (), payload: Any = None) -> None:
        """Leave a message to be sent, from any thread; ``payload`` stays as it is. After END there is none."""

    def lack_room(self, owners: set[int]) -> None:
        """The training thread waits until these have taken over more of its updates; none: it does not."""
        self.without_room = owners

    def look(self) -> None:
        """Take, in the training thread, what has come and is at hand."""

    def serve(self, seconds: float) -> bool:
        """Take messages further in the training thread, until there is something to look at, or for so long; 0: once.

        Returns False where that is the engine's matter.
        """
        return False

    def ask(self, owners: Sequence[int]) -> int:
        """A new ticket, of a request that these owners are going to answer."""
        self.ticket += 1
        self._got_on += 1
        self.answers = {}
        self._held_by = {}
        self.awaiting = set(owners)
        return self.ticket

    def steps(self, progress: Progress) -> Steps:
        """The job's."""
        progress.exchanging = True  # an error in it is everybody's
        progress.holds = self
        moved_at, waited, got_on = time.monotonic(), False, self._got_on
        while not self._over:
            before = len(self._waits())
            went = self._carry()
            now = time.monotonic()
            waits = self._waits()
            begins, waited = bool(waits) and not waited, bool(waits)
            fewer, got_on = len(waits) < before or self._got_on != got_on, self._got_on
            moved = begins or (fewer if before else went)
            if moved or (not waits and now - moved_at > _STILL_THERE_SECONDS):
                progress.moves += 1
                moved_at = now
            progress.idle = not (waits or went)
            if waits and now - moved_at > _SILENT_SECONDS:
                progress.peers = self._awaited()
            yield None if went else self._operation
        progress.exchanging = False

    _operation: Any = None
    """What takes messages further without Python."""

    @property
    @abstractmethod
    def _over(self) -> bool:
        """Whether all ranks have ended."""

    @abstractmethod
    def _carry(self) -> bool:
        """Send what is posted, and act on what has come. Returns whether there was anything."""

    def _waits(self) -> set[int]:
        """The ranks that the training thread waits for."""
        if self.leaves:
            return set(range(self._context.size)) - self.ended
        return self.awaiting | self.without_room

    def _awaited(self) -> frozenset[int]:
        """The ranks that are waited for: owners, or those that owners say they wait for."""
        found = self._waits() - self.awaiting
        for owner in self.awaiting:
            found |= self._held_by.get(owner, {owner})
        return frozenset(found - {self._context.rank})

    def _hear(self, message: Message) -> None:
        """Act on an owner's message, or on what a rank tells all."""
        source, kind, serial, numbers, payload = message
        if kind in _ANSWERS:
            if kind in (Kind.VALUES, Kind.SETTLED):
                self._take_over(source, numbers[1])
                self._learn(numbers[5:].tolist())
            if source in self.awaiting and serial == self.ticket:
                self.answers[source] = message
                self.awaiting.discard(source)
                self._got_on += 1
        elif kind == Kind.TAKEN:
            self._take_over(source, numbers[0])
        elif kind == Kind.DEFERRED:
            if serial == self.ticket:
                self._held_by[source] = {int(member) for member in numbers}
        elif kind == Kind.DROPPED:
            self.dropped.append((source, serial))
        else:
            assert kind == Kind.TROUBLE
            self.troubles.append((serial, payload.tobytes().decode()))
            self.troubles_heard += 1

    def _take_over(self, owner: int, count: float) -> None:
        self.taken[owner] = int(count)
        self._got_on += owner in self.without_room
        self.without_room.discard(owner)

    def _learn(self, clocks: Sequence[float]) -> None:
        """Clocks as an owner knows them; -1 - c: of a member that has ended."""
        for member, clock in enumerate(clocks):
            if clock < 0:
                self.ended.add(member)
            self.clocks[member] = max(self.clocks[member], -1 - clock if clock < 0 else clock)


class PortableService(Service):
    """In Python, with ``mailbox``, whose ``keeps`` this is."""

    def __init__(self, context: Context, owners: Sequence[int], keeps: bool = False) -> None:
        super().__init__(context, owners)
        self._mailbox = Mailbox(context.comm, keeps)
        self._posted: deque[tuple[int, Kind, int, Sequence[float], Any]] = deque()
        self._ends = 0
        self._ended = False

    @property
    def nbytes_sent(self) -> int:
        """See Service."""
        return self._mailbox.nbytes_sent

    def post(self, rank: int, kind: Kind, serial: int = 0, numbers: Sequence[float] = (), payload: Any = None) -> None:
        """See Service."""
        self._posted.append((rank, kind, serial, numbers, payload))

    @property
    def _over(self) -> bool:
        return self._mailbox.over

    def _carry(self) -> bool:
        went = self._send()
        for message in self._mailbox.advance():
            self._hear(message)
            went = True
        return went

    def _send(self) -> bool:
        sent = False
        while self._posted:
            rank, kind, serial, numbers, payload = self._posted.popleft()
            self._dispatch(rank, kind, serial, numbers, payload)
            sent = True
            self._ended |= kind == Kind.END
        if self._ended and self._served:
            self._mailbox.close()  # nobody asks this rank for anything any more
        return sent

    def _dispatch(self, rank: int, kind: Kind, serial: int, numbers: Sequence[float], payload: Any) -> None:
        self._mailbox.send(rank, kind, serial, numbers, payload)

    @property
    def _served(self) -> bool:
        """Whether all that others may want of this rank is done."""
        return self.owner is None or self._ends == self._context.size

    def _hear(self, message: Message) -> None:
        if message.kind == Kind.END:
            self._ends += 1
            self.ended.add(message.source)
        if message.kind < Kind.VALUES:
            assert isinstance(self.owner, Owner)
            self.owner.hear(message)
        else:
            super()._hear(message)
