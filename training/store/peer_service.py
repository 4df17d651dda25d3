"""What a rank does for the mode ``peers`` beside its computing: it adds up the updates of others as they arrive."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from bitring.collectives.runtime.context import Context
from bitring.collectives.runtime.mailbox import Message
from bitring.training.store.owner import WINDOW, Kind
from bitring.training.store.service import PortableService


class PeerService(PortableService):
    """Kinds are those of a store. PUSH: an update, serial its sender's steps, numbers each parameter's bytes. REST:
    whatever was sent before has arrived, serial how often that was asked. TAKEN: updates taken over.

    ``take``: adds the payload of an update, and the bytes of each parameter, to what this rank has to apply.
    """

    def __init__(self, context: Context, take: Callable[[Any, Any], None]) -> None:
        super().__init__(context, range(context.size))
        self._take = take
        self._rank = context.rank
        self._came = [0] * context.size  # updates, by sender
        self.rests = [0] * context.size

    def _hear(self, message: Message) -> None:
        source, kind, serial, numbers, payload = message
        if kind == Kind.PUSH:
            self.clocks[source] = max(self.clocks[source], float(serial))
            self._take(payload, numbers)
            self._came[source] += 1
            # Who has sent END is owed nothing, and nothing may be said after this rank's own.
            if self._came[source] % (WINDOW // 2) == 0 and not self._ended and source not in self.ended:
                self._mailbox.send(source, Kind.TAKEN, 0, (float(self._came[source]),))
        elif kind == Kind.TAKEN:
            self.taken[source] = int(numbers[0])
            self.without_room.discard(source)
        elif kind == Kind.CLOCK:
            self.clocks[source] = max(self.clocks[source], float(serial))
        elif kind == Kind.REST:
            self.rests[source] = serial
            self.awaiting.discard(source)
        elif kind == Kind.LEAVE:
            self.clocks[source] = math.inf
        elif kind == Kind.END:
            self._ends += 1
            self.ended.add(source)
            self.clocks[source] = math.inf
            self.without_room.discard(source)
            self.awaiting.discard(source)
        else:
            assert kind == Kind.TROUBLE
            self.troubles.append((serial, payload.tobytes().decode()))
