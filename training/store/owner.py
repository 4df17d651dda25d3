"""What the owner of a shard does with messages, as the rule says: it applies updates and answers reads."""

from __future__ import annotations

import enum
import math
import pickle
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from bitring.collectives.runtime.mailbox import Message
from bitring.training.optimizer import Optimizer
from bitring.training.store.codec import Codec, Editions
from bitring.training.store.packing import Piece, pack, unpack
from bitring.training.store.replay import Record
from bitring.training.store.rule import Action, Apply, Claim, Defer, Drop, Rule, Serve
from bitring.training.store.shard import Shard

WINDOW = 4
"""So many updates a member may have under way to an owner."""


class Kind(enum.IntEnum):
    """What a message says; its serial and numbers in brackets."""

    # a member to an owner
    PUSH = 0  # [number] an update: weight, the round that it is of
    CLOCK = 1
    LEAVE = 2
    REST = 3  # [ticket] until all others do: how many troubles it has told, how often it has settled
    END = 4  # it does nothing more at all
    READ = 5  # [ticket] the clock that all must have, NaN: as the rule says; the edition that it knows
    USE = 6  # these settings of the optimizer for its updates from now on
    SLOTS = 7  # [ticket] it asks for the optimizer's
    CLAIM = 8  # [ticket] the next number of a row of numbers, which the payload names
    GO_ON = 9  # it rests no more: its wait for the others was given up
    AHEAD = 10  # [number] a part of the update that is going to have this number
    FORGET = 11  # [number] there will be no such update
    PART = 13  # [number] a part of the update that has this number and whose others follow: it is applied at once
    DIED = 12  # not by the member, but of it: nothing more comes from it
    # an owner to a member
    VALUES = 20  # [ticket] version, updates taken, edition, whether they are changes, 0; clocks, -1 - c: it has ended
    DEFERRED = 21  # [ticket] the members that a read, or a rest, waits for
    TAKEN = 22  # updates taken
    DROPPED = 23  # [number]
    SETTLED = 24  # [ticket] version, updates taken, edition, 0, troubles told by all; clocks as above
    ARE = 25  # [ticket] the slots
    CLAIMED = 26  # [ticket] the number
    HEARD = 27  # nothing but what any message along a line says (``lines``)
    # a rank to all
    TROUBLE = 30  # [step] what was wrong with its update, in words
    # about the copies of shards (``copied_service``)
    COPY = 40  # [serial] to who keeps the copy: what a member has said: kind, member, its numbers
    COPIED = 41  # [count] back: so many of these have been heard
    TAKES_OVER = (
        42  # [shard] to all: its copy is the shard from now on; how many of the receiver's messages it has heard
    )


class ShardOwner(Protocol):
    """What is asked of the owner of a shard, in any thread."""

    @property
    def staleness(self) -> Mapping[int, int]:
        """Of the updates applied -> how many had it."""
        ...

    @property
    def applied(self) -> int:
        """So many updates."""
        ...

    @property
    def dropped(self) -> int:
        """So many updates."""
        ...

    @property
    def clocks(self) -> list[float]:
        """Every member's; infinite for those who have left."""
        ...

    @property
    def waiting(self) -> int:
        """Reads that wait."""
        ...

    def load(self, values: Mapping[str, Any], slots: Mapping[str, Mapping[str, Any]]) -> bool:
        """Go on from these, given whole, while no job advances. Returns that it is done."""
        ...

    def close(self) -> None:
        """All members have ended."""
        ...


class Owner:
    """The owner of ``shard``, number ``number`` among owners. ``send``: to a member, kind, serial, numbers, payload.

    ``record``: takes down what the rule decides.
    """

    def __init__(
        self,
        shard: Shard,
        rule: Rule,
        codec: Codec,
        number: int,
        members: int,
        optimizer: Optimizer,
        send: Callable[[int, Kind, int, Sequence[float], Any], None],
        record: Record | None = None,
    ) -> None:
        self.shard = shard
        self.rule = rule
        self.staleness: Counter[int] = Counter()
        self.applied = self.dropped = 0
        self._number = number
        self._record = record
        self._send = send
        self._codec = codec
        self._editions = Editions(codec, number, shard.values) if codec.encodes else None
        self._optimizers = [optimizer] * members
        self._updates: dict[tuple[int, int], list[Piece]] = {}
        self._wanted: dict[int, tuple[list[Piece] | None, int]] = {}  # of each member's read, and its edition
        self._rests = [0] * members  # the ticket of each one's request to settle
        self._troubles = [0.0] * members  # how many each has told
        self._taken = [0] * members
        self._told = [0] * members

    def hear(self, message: Message) -> None:
        """Act on a member's message."""
        member, kind, serial, numbers, payload = message
        rule = self.rule
        if kind == Kind.PUSH:
            weight, round_ = numbers.tolist()
            if weight:
                self._updates.setdefault((member, serial), []).extend(unpack(payload))
            self._taken[member] += 1
            self._do(rule.push(member, serial, weight, None if math.isnan(round_) else int(round_)))
            if self._taken[member] - self._told[member] >= WINDOW // 2:
                self._told[member] = self._taken[member]
                self._send(member, Kind.TAKEN, 0, (self._taken[member],), None)
        elif kind == Kind.PART:
            self.shard.apply([unpack(payload)], [rule.begin(member)], self._optimizers[member], self._decode)
        elif kind == Kind.AHEAD:
            self._updates.setdefault((member, serial), []).extend(unpack(payload))
        elif kind == Kind.FORGET:
            del self._updates[member, serial]
        elif kind == Kind.CLOCK:
            self._do(rule.clock(member))
        elif kind == Kind.READ:
            least, edition = numbers.tolist()
            self._wanted[member] = (unpack(payload) if payload.size else None), int(edition)
            self._do(rule.read(member, serial, None if math.isnan(least) else int(least)))
        elif kind == Kind.LEAVE:
            self._do(rule.leave(member))
        elif kind == Kind.REST:
            self._rests[member] = serial
            self._troubles[member] = numbers[0]
            if numbers[1] < rule.settled:  # all have met when its wait for that was given up
                self._settle([member])
            else:
                self._do(rule.rest(member))
                missing = rule.missing  # the last one is named to all
                for waits in [] if not rule.resting else rule.resting if len(missing) == 1 else [member]:
                    self._send(waits, Kind.DEFERRED, self._rests[waits], missing, None)
        elif kind == Kind.GO_ON:
            rule.go_on(member)
        elif kind == Kind.END:
            self._do(rule.end(member))
        elif kind == Kind.DIED:
            self._updates.pop((member, self._taken[member]), None)  # what came ahead of an update that does not come
            self._do(rule.leave(member))
            self._do(rule.end(member))
        elif kind == Kind.USE:
            self._optimizers[member] = pickle.loads(payload.tobytes())
        elif kind == Kind.SLOTS:
            self._send(member, Kind.ARE, serial, (), pack(self.shard.kept()))
        else:
            assert kind == Kind.CLAIM
            self._do(rule.claim(member, serial, tuple(payload.view(np.int64).tolist())))

    @property
    def clocks(self) -> list[float]:
        """See ShardOwner."""
        return self.rule.common_clocks

    @property
    def waiting(self) -> int:
        """See ShardOwner."""
        return self.rule.waiting

    def close(self) -> None:
        """See ShardOwner."""
        if self._record is not None:
            self._record.close()

    def load(self, values: Mapping[str, Any], slots: Mapping[str, Mapping[str, Any]]) -> bool:
        """See ShardOwner."""
        self.shard.load(values, slots)
        self._restart()
        return True

    def _restart(self) -> None:
        """The shard's values are others than updates made of them."""
        if self._editions is not None:
            self._editions.restart(self.rule.version)

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if self._record is not None:
                self._record.write(action)
            if isinstance(action, Apply):
                updates = [self._updates.pop(push) for push in action.pushes]
                optimizer = self._optimizers[action.pushes[0][0]]
                self.shard.apply(updates, action.scales, optimizer, self._decode)
                self.staleness.update(action.staleness)
                self.applied += len(updates)
            elif isinstance(action, Drop):
                del self._updates[action.member, action.number]
                self.dropped += 1
                self._send(action.member, Kind.DROPPED, action.number, (), None)
            elif isinstance(action, Serve):
                self._answer(action.member, action.ticket)
            elif isinstance(action, Claim):
                self._send(action.member, Kind.CLAIMED, action.ticket, (action.number,), None)
            elif isinstance(action, Defer):
                self._send(action.member, Kind.DEFERRED, action.ticket, action.waits_for, None)
            else:
                self._settle(action.members)

    def _decode(self, piece: Piece, out: Any) -> None:
        self._codec.decode(piece, self._number, out)

    def _answer(self, member: int, ticket: int) -> None:
        wanted, edition = self._wanted.pop(member)
        changes = False
        if wanted is None and self._editions is not None:
            pieces, changes = self._editions.answer(edition, self.rule.version)
        else:
            pieces = self.shard.read(wanted)
        self._send(member, Kind.VALUES, ticket, self._head(member, changes), pack(pieces))

    def _settle(self, members: Sequence[int]) -> None:
        self._restart()
        values = pack(self.shard.read(None))
        for member in members:
            self._send(member, Kind.SETTLED, self._rests[member], self._head(member, False), values)

    def _head(self, member: int, changes: bool) -> tuple[float, ...]:
        self._told[member] = self._taken[member]
        edition = 0 if self._editions is None else self._editions.number
        ended = set(self.rule.ended)
        clocks = [-1 - clock if m in ended else clock for m, clock in enumerate(self.rule.common_clocks)]
        return (self.rule.version, self._taken[member], edition, float(changes), sum(self._troubles), *clocks)
