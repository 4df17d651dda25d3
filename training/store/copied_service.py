"""A store's service where each shard has a copy on another rank, its keeper: when a rank dies the others go on.

The owner of a shard hands every message that it hears on to the keeper, in the order in which it acts on them; the
keeper does the same with its copy. So both have the same values, slots, clocks and versions. The owner's answers wait
until the keeper has what they tell of: whatever a rank was told, or has seen, is in both (a chain of two, whose head
answers; van Renesse and Schneider, "Chain Replication", OSDI 2004).

When the owner dies its keeper tells all that it has the shard, and how many of each one's messages it has heard; they
send it the others (``lines``), and it sends them the answers that they may have missed. So each update is applied once.
When the keeper dies the owner goes on without a copy. A rank that has died has left: nobody waits for it. What it had
pushed counts; of its last update some shards may have their part, and others not.

A copy costs the bytes of each message to the shard once more, the computing of its updates and reads a second time, and
the memory of the shard and its slots. When both ranks that have a shard have died the others have a DeadRankError.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bitring.collectives.interop.steps import Progress, Steps
from bitring.collectives.runtime.context import Context
from bitring.collectives.runtime.mailbox import Message
from bitring.collectives.runtime.watch import are
from bitring.errors import DeadRankError
from bitring.training.store.lines import Line, Send, Twin
from bitring.training.store.owner import Kind, Owner
from bitring.training.store.service import PortableService

logger = logging.getLogger("bitring")

_NOTHING = np.empty(0, np.uint8)


def keepers_of(owners: Sequence[int], nodes: Sequence[Sequence[int]]) -> dict[int, int]:
    """Who has the copy of each owner's shard: the next rank, on another node where there are several.

    ``nodes``: the ranks of each. None has one where there is only one rank.
    """
    at = {rank: node for node, ranks in enumerate(nodes) for rank in ranks}
    found: dict[int, int] = {}
    for owner in owners:
        others = [(owner + step) % len(at) for step in range(1, len(at))]
        others.sort(key=lambda rank: at[rank] == at[owner])
        if others:
            found[owner] = others[0]
    return found


class CopiedService(PortableService):
    """One rank's part. ``keepers``: who has the copy of each owner's shard. ``what``: the store's name, for messages.

    ``owner_of``: makes an owner of a shard, or of its copy, given the shard's first owner and what sends.
    """

    def __init__(
        self,
        context: Context,
        owners: Sequence[int],
        keepers: Mapping[int, int],
        owner_of: Callable[[int, Send], Owner],
        what: str,
    ) -> None:
        super().__init__(context, owners, keeps=True)
        self._rank, self._what = context.rank, what
        self._keepers = keepers
        self._places = {shard: shard for shard in owners}  # who answers for it
        self._lines = {shard: Line(shard, keeps=True) for shard in owners}

        def twin(shard: int, copy: bool) -> Twin:
            return Twin(shard, context.size, lambda send: owner_of(shard, send), copy)

        self._twins = {shard: twin(shard, False) for shard in owners if shard == self._rank}
        self._copies = {shard: twin(shard, True) for shard, keeper in keepers.items() if keeper == self._rank}
        self._copied = dict.fromkeys(self._copies, 0)  # messages of each that its owner knows to be heard

    @property
    def owners(self) -> list[Owner]:
        """See Service."""
        return [twin.owner for twin in self._twins.values()]

    def load(self, values: Mapping[str, Any], slots: Mapping[str, Mapping[str, Any]]) -> None:
        """See Service."""
        super().load(values, slots)
        for copy in self._copies.values():
            copy.owner.load(values, slots)

    def steps(self, progress: Progress) -> Steps:
        """See Service."""
        progress.outlives = self._outlives
        yield from super().steps(progress)

    def _awaited(self) -> frozenset[int]:
        if self.leaves:
            return super()._awaited()
        found: set[int] = set()
        for shard in self.awaiting | self.without_room:
            found |= self._held_by.get(shard, {self._places[shard], self._keepers[shard]})
        return frozenset(found - {self._rank} - self.dead)

    # Messages

    def _dispatch(self, rank: int, kind: Kind, serial: int, numbers: Sequence[float], payload: Any) -> None:
        if kind == Kind.TROUBLE:
            super()._dispatch(rank, kind, serial, numbers, payload)
        else:
            letter = self._lines[rank].write(kind, serial, numbers, payload)
            self._mailbox.send(self._places[rank], *letter)

    def _carry(self) -> bool:
        went = super()._carry()
        self._mourn()  # whom the mailbox has heard of
        for shard, copy in self._copies.items():
            if copy.count > self._copied[shard]:
                self._copied[shard] = copy.count
                self._mailbox.send(shard, Kind.COPIED, copy.count)
        return went

    def _hear(self, message: Message) -> None:
        source, kind, serial, numbers, payload = message
        if kind == Kind.TROUBLE:
            super()._hear(message)
        elif kind == Kind.COPY:
            inner, member = map(int, numbers[:2])
            self._copies[source].hear(Message(member, inner, serial, numbers[2:], payload))
        elif kind == Kind.COPIED:
            self._release(self._twins[self._rank], serial)
        elif kind == Kind.TAKES_OVER:
            line = self._lines[serial]
            self._places[serial] = source
            line.forget(int(numbers[0]))
            for letter in line.kept:
                self._mailbox.send(source, *letter)
        elif kind < Kind.VALUES:
            if kind == Kind.END:
                self.ended.add(source)
            self._happens(int(numbers[0]), message)
        else:
            shard = int(numbers[0])
            given = self._lines[shard].read(numbers)
            if given is not None and kind != Kind.HEARD:
                super()._hear(Message(shard, kind, serial, given, payload))

    def _happens(self, shard: int, message: Message) -> None:
        """Something that this rank, which answers for the shard, acts on, and its keeper too."""
        twin, keeper = self._twins[shard], self._keepers[shard]
        alone = keeper in self.dead or keeper == self._rank
        if not alone:
            numbers = (message.kind, message.source, *message.numbers)
            self._mailbox.send(keeper, Kind.COPY, message.serial, numbers, message.payload)
        twin.hear(message)
        if alone:
            self._release(twin, twin.count)

    def _release(self, twin: Twin, count: int) -> None:
        """Send what waited until the copy had heard so many messages."""
        while twin.due and twin.due[0][0] <= count:
            _, member, letter = twin.due.popleft()
            self._mailbox.send(member, *letter)

    @property
    def _served(self) -> bool:
        return (
            all(twin.done and not twin.due for twin in self._twins.values())
            and all(copy.done and copy.count == self._copied[shard] for shard, copy in self._copies.items())
            and all(not line.kept or self._is_over(shard) for shard, line in self._lines.items())
        )

    def _is_over(self, shard: int) -> bool:
        """Whether all members have ended there, or nobody is left to tell: no answer comes any more."""
        both = {shard, self._keepers[shard]}
        return bool(both & self._mailbox.parted) or both <= self.dead

    # Deaths

    def _outlives(self, gone: Sequence[int]) -> bool:
        """Go on without these ranks. Raises DeadRankError where a shard and its copy are gone."""
        self._mailbox.bury(gone)
        self._mourn()
        return True

    def _mourn(self) -> None:
        """Do what is to be done for those who are newly dead."""
        new = self._mailbox.dead - self.dead
        if not new:
            return
        self.dead |= new
        self.ended |= new
        for rank in new:
            self.clocks[rank] = np.inf
        if self._rank in self._mailbox.parted:
            return  # nobody asks this rank for anything any more
        lost = [shard for shard, keeper in self._keepers.items() if {shard, keeper} <= self.dead]
        if lost and not self._ended:
            dead = sorted(self.dead)
            self._context.queue.loses(dead)
            raise DeadRankError(f"{self._what}: {are(dead)} gone, and with them a shard and its copy", dead)
        for shard, twin in self._twins.items():
            if self._keepers[shard] in new:
                self._release(twin, twin.count)
        for shard in sorted(new & self._copies.keys()):
            self._adopt(shard)
        for shard, twin in self._twins.items():
            for rank in sorted(self.dead - set(twin.owner.rule.ended)):
                self._happens(shard, Message(rank, Kind.DIED, 0, (), _NOTHING))
        self._got_on += 1

    def _adopt(self, shard: int) -> None:
        """Answer for a shard whose owner has died."""
        logger.warning("%s: rank %d is gone; rank %d has its shard now", self._what, shard, self._rank)
        self._twins[shard] = twin = self._copies.pop(shard)
        missed = twin.take_over()
        for member, line in enumerate(twin.lines):
            self._mailbox.send(member, Kind.TAKES_OVER, shard, (line.came,))
            for letter in missed[member]:
                self._mailbox.send(member, *letter)
