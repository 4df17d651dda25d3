"""Messages that have no common order: any rank to any other, at any time, as part of a job that every rank runs.

One receive is posted per source, never one from any source: with MPICH that hangs between hosts. What a message brings
beside its numbers, its payload, travels as a second one, for which the receiver makes room when the first has come. A
rank's messages to another arrive in their order. A farewell (``close``) is the last; so no receive is left posted.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from bitring.collectives.runtime.ports import ports

MOST_NUMBERS = 2048
"""A message has so many numbers at most."""

_HEAD = struct.Struct("<BBHi")  # the kind, whether there is a payload, 0, the serial number; then float64s
_LENGTH = struct.Struct("<q")  # the payload's, in bytes, at the end
_HEAD_TAG, _PAYLOAD_TAG = 1, 2
_FAREWELL = 255
_NOTHING = np.empty(0, np.uint8)


class Message(NamedTuple):
    """A message from rank ``source``: its kind, 0 to 254; a serial number; float64s; the payload's bytes."""

    source: int
    kind: int
    serial: int
    numbers: Any
    payload: Any


class Mailbox:
    """The messages of one rank of ``comm``, which carries nobody else's. One thread at a time uses it."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._rank = comm.Get_rank()
        self._due = [rank for rank in range(comm.Get_size()) if rank != self._rank]  # the source of each receive
        self._room = {rank: np.empty(_HEAD.size + 8 * MOST_NUMBERS + _LENGTH.size, np.uint8) for rank in self._due}
        self._part: dict[int, Message] = {}  # messages whose payload is under way
        self._others = list(self._due)
        self._receives = [comm.Irecv([self._room[rank], MPI.BYTE], rank, _HEAD_TAG) for rank in self._due]
        self._held: deque[tuple[int, bytes, Any]] = deque()  # to be sent when what has come is read
        self._sends: list[MPI.Request] = []
        self._memory: list[Any] = []  # of each send
        self._own: deque[Message] = deque()
        self._closed = False
        self.nbytes_sent = 0

    def send(self, rank: int, kind: int, serial: int = 0, numbers: Sequence[float] = (), payload: Any = None) -> None:
        """Send a message, to this rank itself, too. ``payload``: a contiguous array, which must stay as it is."""
        values = np.asarray(numbers, np.float64)
        assert values.size <= MOST_NUMBERS
        flat = _NOTHING if payload is None else payload.reshape(-1).view(np.uint8)
        if rank == self._rank:
            self._own.append(Message(rank, kind, serial, values.copy(), flat))
            return
        head = _HEAD.pack(kind, flat.size > 0, 0, serial) + values.tobytes()
        self._held.append((rank, head + _LENGTH.pack(flat.size) if flat.size else head, flat))

    def close(self) -> None:
        """Say farewell to all others: this rank sends nothing more."""
        if not self._closed:
            self._closed = True
            self._held.extend((rank, _HEAD.pack(_FAREWELL, 0, 0, 0), _NOTHING) for rank in self._others)

    @property
    def over(self) -> bool:
        """Whether all ranks have said farewell, and everything is sent."""
        return self._closed and not (self._receives or self._sends or self._held or self._own)

    def advance(self) -> list[Message]:
        """Take messages further as far as they go now; returns those that have come."""
        # Nothing is sent while there is unread news: its receiver may be dead.
        while self._held and not ports().unread():
            rank, head, payload = self._held.popleft()
            self._send(head, rank, _HEAD_TAG)
            if payload.size:
                self._send(payload, rank, _PAYLOAD_TAG)
        if self._sends:
            for at in sorted(MPI.Request.Testsome(self._sends) or (), reverse=True):
                del self._sends[at], self._memory[at]
        arrived = list(self._own)
        self._own.clear()
        if self._receives:
            statuses: list[MPI.Status] = []
            landed = MPI.Request.Testsome(self._receives, statuses) or ()
            found = [(self._due[at], status.Get_count(MPI.BYTE)) for at, status in zip(landed, statuses, strict=False)]
            for at in sorted(landed, reverse=True):
                del self._receives[at], self._due[at]
            for source, nbytes in found:
                self._arrive(source, nbytes, arrived)
        return arrived

    def _send(self, data: Any, rank: int, tag: int) -> None:
        self.nbytes_sent += len(data)
        self._sends.append(self._comm.Isend([data, MPI.BYTE], rank, tag))
        self._memory.append(data)  # mpi4py keeps what is received into alive, but not what is sent

    def _arrive(self, source: int, nbytes: int, arrived: list[Message]) -> None:
        """Take over what a source has sent, and post the next receive."""
        message = self._part.pop(source, None)
        if message is None:
            data = self._room[source][:nbytes].tobytes()
            kind, has_payload, _, serial = _HEAD.unpack_from(data)
            if kind == _FAREWELL:
                return
            end = nbytes - _LENGTH.size if has_payload else nbytes
            payload = np.empty(_LENGTH.unpack_from(data, end)[0], np.uint8) if has_payload else _NOTHING
            message = Message(source, kind, serial, np.frombuffer(data[_HEAD.size : end], np.float64), payload)
            if has_payload:
                self._part[source] = message
                self._post(payload, source, _PAYLOAD_TAG)
                return
        arrived.append(message)
        self._post(self._room[source], source, _HEAD_TAG)

    def _post(self, room: Any, source: int, tag: int) -> None:
        self._due.append(source)
        self._receives.append(self._comm.Irecv([room, MPI.BYTE], source, tag))
