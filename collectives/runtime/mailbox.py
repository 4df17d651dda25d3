"""Messages that have no common order: any rank to any other, at any time, as part of a job that every rank runs.

One receive is posted per source, never one from any source: with MPICH that hangs between hosts. What a message brings
beside its numbers, its payload, travels as a second one, for which the receiver makes room when the first has come. A
rank's messages to another arrive in their order. A farewell (``close``) is the last; so no receive is left posted.

A rank that has died may be buried (``bury``). The first that any rank hears of another then is who is dead: so both
bury the same, and what was sent before does not reach whoever knows of more deaths than its sender did. Where letters
are kept (``keeps``) it does: what is lost is what the dead have sent, and were to get.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from bitring.collectives.runtime.keeping import never_free
from bitring.collectives.runtime.ports import ports
from bitring.errors import PeerError
from bitring.waited import Waited

MOST_NUMBERS = 2048
"""A message has so many numbers at most."""

# The kind, whether there is a payload, the era, the serial number, and how many float64s follow.
_HEAD = struct.Struct("<BBHiq")
_LENGTH = struct.Struct("<q")  # the payload's, in bytes, at the end
_HEAD_TAG, _PAYLOAD_TAG = 1, 2
_FAREWELL, _OBITUARY = 255, 254
_NOTHING = np.empty(0, np.uint8)

_NEWS_SECONDS = 2.0
"""So long after the library's error in a message with a rank it is known whether that has died."""


class Message(NamedTuple):
    """A message from rank ``source``: its kind, 0 to 253; a serial number; float64s; the payload's bytes."""

    source: int
    kind: int
    serial: int
    numbers: Any
    payload: Any


class Mailbox:
    """The messages of one rank of ``comm``, which carries nobody else's. One thread at a time uses it.

    ``keeps``: a death loses nothing of what those that are left have sent each other.
    """

    def __init__(self, comm: MPI.Intracomm, keeps: bool = False) -> None:
        self._comm = comm
        self._keeps = keeps
        self._rank = comm.Get_rank()
        self._due = [rank for rank in range(comm.Get_size()) if rank != self._rank]  # the source of each receive
        self._room = {rank: np.empty(_HEAD.size + 8 * MOST_NUMBERS + _LENGTH.size, np.uint8) for rank in self._due}
        self._part: dict[int, tuple[int, Message]] = {}  # eras, and messages whose payload is under way
        self._others = list(self._due)
        self._receives = [comm.Irecv([self._room[rank], MPI.BYTE], rank, _HEAD_TAG) for rank in self._due]
        self._held: deque[tuple[int, bytes, Any]] = deque()  # to be sent when what has come is read
        self._sends: list[MPI.Request] = []
        self._memory: list[tuple[int, Any]] = []  # of each send: to whom, and what
        self._own: deque[Message] = deque()
        self._closed = False
        self._errors: dict[int, tuple[Waited, MPI.Exception]] = {}  # of messages with a rank, which may be dead
        self.dead: set[int] = set()
        self.parted: set[int] = set()
        """The ranks that have said farewell."""
        self.parting = False
        """Whether any rank, this one too, has said farewell."""
        self.nbytes_sent = 0

    def send(self, rank: int, kind: int, serial: int = 0, numbers: Sequence[float] = (), payload: Any = None) -> None:
        """Send a message, to this rank itself, too. ``payload``: a contiguous array, which must stay as it is.

        What is for the dead goes nowhere.
        """
        if rank in self.dead:
            return
        values = np.asarray(numbers, np.float64)
        assert values.size <= MOST_NUMBERS
        flat = _NOTHING if payload is None else payload.reshape(-1).view(np.uint8)
        if rank == self._rank:
            self._own.append(Message(rank, kind, serial, values.copy(), flat))
            return
        head = _HEAD.pack(kind, flat.size > 0, self.era, serial, values.size) + values.tobytes()
        self._held.append((rank, head + _LENGTH.pack(flat.size) if flat.size else head, flat))

    @property
    def era(self) -> int:
        """The number of the dead: what was sent in an earlier one does not arrive."""
        return len(self.dead)

    def bury(self, ranks: Collection[int]) -> None:
        """Go on without these ranks, which are dead. Raises PeerError where they have taken this one for dead."""
        new = set(ranks) - self.dead
        if not new:
            return
        if self._rank in new:
            raise PeerError(f"the other ranks have gone on without rank {self._rank}, which they took for dead")
        self.dead |= new
        self._others = [rank for rank in self._others if rank not in new]
        for rank in new:
            self._part.pop(rank, None)
        for at in reversed([at for at, rank in enumerate(self._due) if rank in new]):
            never_free((self._receives.pop(at), self._room[self._due.pop(at)]))
        for at in reversed([at for at, (rank, _) in enumerate(self._memory) if rank in new]):
            never_free((self._sends.pop(at), self._memory.pop(at)))
        self._held = deque(
            each for each in self._held if each[0] not in new and (self._keeps or each[1][0] == _FAREWELL)
        )
        if not self._keeps:
            self._own.clear()
        if not self._closed:
            head = (
                _HEAD.pack(_OBITUARY, 0, self.era, 0, len(self.dead))
                + np.array(sorted(self.dead), np.float64).tobytes()
            )
            self._held.extend((rank, head, _NOTHING) for rank in self._others)

    def close(self) -> None:
        """Say farewell to all others: this rank sends nothing more."""
        if not self._closed:
            self._closed = self.parting = True
            self.parted.add(self._rank)
            self._held.extend((rank, _HEAD.pack(_FAREWELL, 0, 0, 0, 0), _NOTHING) for rank in self._others)

    @property
    def over(self) -> bool:
        """Whether all ranks have said farewell, and everything is sent."""
        return self._closed and not (self._receives or self._sends or self._held or self._own)

    def advance(self) -> list[Message]:
        """Take messages further as far as they go now; returns those that have come."""
        self._mind_errors()
        # Nothing is sent while there is unread news: its receiver may be dead.
        while self._held and not ports().unread():
            rank, head, payload = self._held.popleft()
            self._send(head, rank, _HEAD_TAG)
            if payload.size:
                self._send(payload, rank, _PAYLOAD_TAG)
        if self._sends:
            for at in sorted(self._complete(self._sends, [rank for rank, _ in self._memory]), reverse=True):
                del self._sends[at], self._memory[at]
        arrived: list[tuple[int, Message]] = []
        if not self._held:  # what this rank has told itself may end it, but not before the others are told
            arrived += [(self.era, message) for message in self._own]
            self._own.clear()
        if self._receives:
            landed = self._complete(self._receives, self._due)
            found = [(self._due[at], nbytes) for at, nbytes in landed.items()]
            for at in sorted(landed, reverse=True):
                del self._receives[at], self._due[at]
            for source, nbytes in found:
                if source not in self.dead:  # by now
                    self._arrive(source, nbytes, arrived)
        return [message for era, message in arrived if self._keeps or era == self.era]

    def _complete(self, requests: list[MPI.Request], ranks: Sequence[int]) -> dict[int, int]:
        """The positions of those that are complete -> bytes that have come. ``ranks``: whom each is with."""
        statuses: list[MPI.Status] = []
        if not self._keeps:
            landed = MPI.Request.Testsome(requests, statuses) or ()
            return {at: status.Get_count(MPI.BYTE) for at, status in zip(landed, statuses, strict=False)}
        found: dict[int, int] = {}
        for at, (request, rank) in enumerate(zip(requests, ranks, strict=True)):
            if rank in self._errors:
                continue
            status = MPI.Status()
            try:
                if request.Test(status):
                    found[at] = status.Get_count(MPI.BYTE)
            except MPI.Exception as error:
                self._note(rank, error)
        return found

    def _note(self, rank: int, error: MPI.Exception) -> None:
        """A message with this rank has failed, as when it dies in the midst of it, which is heard of in a moment."""
        if not self._keeps:
            raise error
        self._errors[rank] = Waited(), error

    def _mind_errors(self) -> None:
        """Raise the error of a message with a rank that is not said to have died since."""
        for rank, (waited, error) in list(self._errors.items()):
            if rank in self.dead:
                del self._errors[rank]
            elif waited.look() > _NEWS_SECONDS:
                raise error

    def _send(self, data: Any, rank: int, tag: int) -> None:
        if rank in self._errors:
            return
        self.nbytes_sent += len(data)
        try:
            self._sends.append(self._comm.Isend([data, MPI.BYTE], rank, tag))
        except MPI.Exception as error:
            self._note(rank, error)
            return
        self._memory.append((rank, data))  # mpi4py keeps what is received into alive, but not what is sent

    def _arrive(self, source: int, nbytes: int, arrived: list[tuple[int, Message]]) -> None:
        """Take over what a source has sent, and post the next receive."""
        era, message = self._part.pop(source, (0, None))
        if message is None:
            data = self._room[source][:nbytes].tobytes()
            kind, has_payload, era, serial, _ = _HEAD.unpack_from(data)
            if kind == _FAREWELL:
                self.parting = True
                self.parted.add(source)
                return
            if kind == _OBITUARY:
                self._post(self._room[source], source, _HEAD_TAG)
                self.bury([int(rank) for rank in np.frombuffer(data[_HEAD.size :], np.float64)])
                return
            end = nbytes - _LENGTH.size if has_payload else nbytes
            payload = np.empty(_LENGTH.unpack_from(data, end)[0], np.uint8) if has_payload else _NOTHING
            message = Message(source, kind, serial, np.frombuffer(data[_HEAD.size : end], np.float64), payload)
            if has_payload:
                self._part[source] = era, message
                self._post(payload, source, _PAYLOAD_TAG)
                return
        arrived.append((era, message))
        self._post(self._room[source], source, _HEAD_TAG)

    def _post(self, room: Any, source: int, tag: int) -> None:
        try:
            self._receives.append(self._comm.Irecv([room, MPI.BYTE], source, tag))
        except MPI.Exception as error:
            self._note(source, error)
            return
        self._due.append(source)
