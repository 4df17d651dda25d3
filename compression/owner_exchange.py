"""The owner exchange: a sum over ranks of gradients that travel encoded (Seide et al., 2014; CNTK's aggregation).

Encoded payloads cannot be summed, so every chunk has an owner:

1. each rank encodes gradient + residual, chunk by chunk, keeps what the encoding left out as its new residual, and
   sends chunk c to rank c;
2. the owner decodes and adds all ranks' payloads in rank order, adds its own second residual, encodes the sum,
   and sends the same bytes to everybody;
3. everybody, the owner too, decodes these bytes: replicas stay bit-identical.

With payloads of m bytes for the whole buffer, each rank sends 2(p−1)/p·m bytes in 2(p−1) messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.arrays import Array, Event, device_of, xp_of
from bitring.collectives.cuda_aware import cuda_aware
from bitring.collectives.executor import Progress, Steps
from bitring.collectives.transport import message_tag
from bitring.compression.encoder import Encoder, residual_dtype
from bitring.compression.layout import cut

_TO_OWNER = 0
_FROM_OWNER = 1


class _Payload:
    """The bytes of one encoded chunk: where they are encoded or decoded, and where MPI sends or receives them."""

    def __init__(self, nbytes: int, like: Array) -> None:
        device = device_of(like)
        self.bytes: Array = xp_of(like).empty(nbytes, np.uint8)
        self.wire: Any = self.bytes
        self._device = device
        self._staged = device is not None and not cuda_aware()
        if device is not None and self._staged:
            self.wire = device.pinned(nbytes)

    def out(self) -> Event | None:
        """Make what was encoded ready to be sent."""
        if self._device is None:
            return None
        return self._device.copy_out(self.wire, self.bytes) if self._staged else self._device.record()

    def taken_in(self) -> None:
        """Make what was received ready to be decoded; the stream orders the decoding after it."""
        if self._device is not None and self._staged:
            self._device.copy_in(self.bytes, self.wire)


class OwnerExchange:
    """The exchange bound to ``x``, a 1-D array of n values summed in place over the ranks of ``comm``.

    State, in x's memory: ``residual``, n values; ``owner_residual``, one for each value of the chunk this rank owns
    (``owned``: first index, and the one after the last). Both float32, or float64 for float64 values.
    """

    def __init__(
        self, comm: MPI.Intracomm, x: Array, encoder: Encoder, boundaries: Sequence[int], channel: int
    ) -> None:
        self._comm = comm
        self._rank, self._size = comm.Get_rank(), comm.Get_size()
        self._x = x
        self._encoder = encoder
        self._tags = tuple(message_tag(channel, k) for k in (_TO_OWNER, _FROM_OWNER))
        layout = cut(x.size, boundaries, encoder.block, self._size)
        self._pieces = layout.pieces
        self.owned = layout.owned[self._rank]
        xp, exact = xp_of(x), residual_dtype(x.dtype)
        self.residual = xp.zeros(x.size, exact)
        self.owner_residual = xp.zeros(self.owned[1] - self.owned[0], exact)
        self._sum = xp.empty(self.owner_residual.size, exact)
        nbytes = [sum(encoder.nbytes(b - a) for a, b in chunk) for chunk in self._pieces]
        mine = nbytes[self._rank]
        self._encoded = [_Payload(k, x) for k in nbytes]  # by owner: this rank's chunks
        self._summed = [_Payload(k, x) for k in nbytes]  # by owner: the encoded sums
        self._incoming = [_Payload(mine if r != self._rank else 0, x) for r in range(self._size)]
        self._incoming[self._rank] = self._encoded[self._rank]
        self.nbytes_sent = sum(nbytes) - mine + (self._size - 1) * mine

    def steps(self, progress: Progress) -> Steps:
        """One exchange."""
        others = [(self._rank + k) % self._size for k in range(1, self._size)]
        receives = {r: self._receive(self._incoming[r], r, _TO_OWNER) for r in others}
        sums = {r: self._receive(self._summed[r], r, _FROM_OWNER) for r in others}
        sends: list[MPI.Request] = []
        for owner in [*others, self._rank]:
            start = 0
            for a, b in self._pieces[owner]:
                start += self._encode(self._x[a:b], self.residual[a:b], self._encoded[owner], start)
            if owner != self._rank:
                yield from _reached(self._encoded[owner].out(), progress)
                sends += self._send(self._encoded[owner], owner, _TO_OWNER)
            MPI.Request.Testall(sends)  # lets the library push on what is under way
            progress.moves += 1
        begin = self.owned[0]
        for r in range(self._size):
            if r != self._rank:
                yield from self._arrived(receives[r], r, progress)
                self._incoming[r].taken_in()
            self._decode(self._incoming[r], self._rank, self._sum, begin, accumulate=r > 0)
        summed, start = self._summed[self._rank], 0
        for a, b in self._pieces[self._rank]:
            mine = slice(a - begin, b - begin)
            start += self._encode(self._sum[mine], self.owner_residual[mine], summed, start)
        yield from _reached(summed.out(), progress)
        for r in others:
            sends += self._send(summed, r, _FROM_OWNER)
        self._decode(summed, self._rank, self._x, 0, accumulate=False)
        for r in others:
            yield from self._arrived(sums[r], r, progress)
            self._summed[r].taken_in()
            self._decode(self._summed[r], r, self._x, 0, accumulate=False)
        progress.peers = frozenset(others)
        while not MPI.Request.Testall(sends):
            yield
        device = device_of(self._x)
        yield from _reached(None if device is None else device.record(), progress)
        progress.moves += 1

    def _encode(self, values: Array, residual: Array, payload: _Payload, start: int) -> int:
        nbytes = self._encoder.nbytes(values.size)
        used = self._encoder.encode(values, residual, payload.bytes[start : start + nbytes])
        assert used == nbytes, "the owner exchange needs payloads of a known length"
        return used

    def _decode(self, payload: _Payload, owner: int, out: Array, origin: int, accumulate: bool) -> None:
        """Decode the chunk of ``owner``; ``out[0]`` is value ``origin`` of the buffer."""
        start = 0
        for a, b in self._pieces[owner]:
            stop = start + self._encoder.nbytes(b - a)
            self._encoder.decode(payload.bytes[start:stop], out[a - origin : b - origin], accumulate=accumulate)
            start = stop

    def _receive(self, payload: _Payload, source: int, phase: int) -> MPI.Request:
        return self._comm.Irecv(payload.wire, source, self._tags[phase]) if payload.bytes.size else MPI.REQUEST_NULL

    def _send(self, payload: _Payload, to: int, phase: int) -> list[MPI.Request]:
        return [self._comm.Isend(payload.wire, to, self._tags[phase])] if payload.bytes.size else []

    def _arrived(self, request: MPI.Request, source: int, progress: Progress) -> Steps:
        progress.peers = frozenset((source,))
        while not request.Test():
            yield
        progress.moves += 1


def _reached(event: Event | None, progress: Progress) -> Steps:
    while event is not None and not event.done:
        yield
    progress.moves += 1
