"""The owner exchange: a sum over ranks of gradients that travel encoded (Seide et al., 2014; CNTK's aggregation).

Encoded payloads cannot be summed, so every chunk has an owner:

1. each rank encodes gradient + residual, chunk by chunk, keeps what the encoding left out as its new residual, and
   sends chunk c to rank c;
2. the owner decodes and adds all ranks' payloads in rank order, adds its own second residual, encodes the sum,
   and sends the same bytes to everybody;
3. everybody, the owner too, decodes these bytes: replicas stay bit-identical.

With payloads of m bytes for the whole buffer, each rank sends 2(p−1)/p·m bytes. Chunks are cut into segments; in the
native engine each of them is a message, so that encoding, wire and decoding overlap. The portable exchange, in Python,
sends whole chunks; it serves device buffers and encoders that have no kernels, and is the reference: both give the same
bits.

A message is the payloads of its pieces, after their lengths as uint32 where these depend on the values.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.arrays import Array, Event, device_of, xp_of
from bitring.collectives.interop.cuda_aware import cuda_aware
from bitring.collectives.interop.mpi_library import library_functions
from bitring.collectives.interop.steps import Progress, Steps, StepsTo, run
from bitring.collectives.runtime.ports import read_news
from bitring.collectives.runtime.tags import message_tag
from bitring.compression.encoder import Encoder, residual_dtype
from bitring.compression.exchange.layout import Layout, Piece
from bitring.compression.exchange.run_stats import SAMPLE, Norms, RunStats, samples
from bitring.native import address_of, extension, type_of

_TO_OWNER = 1024
_FROM_OWNER = 1025


class OwnerExchange(ABC):
    """The exchange of n values, bound to an array, summed in place over the ranks of ``comm``.

    State, in the array's memory: ``residual``, n values; ``owner_residual``, one for each value of the chunk this rank
    owns (``owned``: first index, and the one after the last). Both float32, or float64 for float64 values.
    """

    operation: Any = None
    keeps = False
    """Whether residuals are copied on the way, before a run changes them, so that ``bring_back`` can."""
    nbytes_sent = 0  # nobody knows before a run
    scratch_nbytes = 0

    def __init__(self, comm: MPI.Intracomm, like: Array, layout: Layout, channel: int) -> None:
        """``like``: an array of as many values, of the same type and in the same memory as those to be summed."""
        self._comm = comm
        self._rank, self._size = comm.Get_rank(), comm.Get_size()
        self._tags = message_tag(channel, _TO_OWNER), message_tag(channel, _FROM_OWNER)
        self._fixed_size = all(encoder.fixed_size for encoder in layout.encoders)
        self._segments = layout.segments
        self.expected_nbytes = layout.expected_nbytes_sent(self._rank)
        """The payload bytes that a run may be expected to send to other ranks."""
        self.owned = layout.owned[self._rank]
        xp, exact = xp_of(like), residual_dtype(like.dtype)
        self.residual = xp.zeros(like.size, exact)
        self.owner_residual = xp.zeros(self.owned[1] - self.owned[0], exact)
        self.stats = RunStats()
        self.runs = 0
        """The number of the next run, from 1, on which seeds depend; the caller's to count."""

    @abstractmethod
    def bind(self, buffer: Array) -> None:
        """Work on ``buffer`` from now on."""

    def unbind(self) -> None:
        """The next run is on another buffer."""

    def prepare(self) -> None:
        """The operation's next run is another one, number ``runs``."""

    def note(self) -> None:
        """The operation has been run, and ``stats`` is about that from now on."""

    @abstractmethod
    def steps(self, progress: Progress) -> Steps:
        """One exchange; ``stats`` is about it afterwards."""

    def forget(self) -> None:
        """The residuals stay as they are now, where they are kept."""

    def bring_back(self) -> None:
        """Give the residuals the values of the last ``forget``, where they are kept; not during a run."""

    def close(self) -> None:
        """Nothing is kept that MPI would want back."""

    def _seed(self) -> int:
        """Each rank rounds for itself, in each run."""
        return self.runs * self._size + self._rank


def codec_of(encoder: Encoder, values: np.dtype[Any], sums: np.dtype[Any]) -> extension.Codec:
    """The encoder's C functions for values and for sums of these dtypes."""
    of_values, of_sums = encoder.functions(values), encoder.functions(sums)
    return extension.Codec(
        encode=of_values.encode,
        decode=of_values.decode,
        encode_sum=of_sums.encode,
        decode_sum=of_sums.decode,
        settings=of_values.settings,
    )


class NativeOwnerExchange(OwnerExchange):
    """Of host buffers, without Python per message; the encoder's kernels are called as C functions."""

    keeps = True

    def __init__(self, comm: MPI.Intracomm, like: Array, layout: Layout, channel: int) -> None:
        super().__init__(comm, like, layout, channel)
        number, kind = itertools.count(), type_of(like.dtype)
        assert kind is not None, f"the extension has no {like.dtype}"
        encoders = list(layout.encoders)
        pieces = [
            (owner, k, a, b, encoder.nbytes(b - a), encoders.index(encoder))
            for owner, chunk in enumerate(self._segments)
            for k, segment in zip(number, chunk, strict=False)
            for a, b, encoder in segment
        ]
        columns = np.ascontiguousarray(np.array(pieces, np.int64).reshape(-1, 6).T)
        owners, numbers, starts, stops, nbytes, encoded_by = columns
        to_owner_tag, from_owner_tag = self._tags
        self.operation = extension.OwnerExchange(
            library=library_functions(),
            handle_size=MPI._sizeof(MPI.Comm),
            comm=MPI._handleof(comm),
            byte=MPI._handleof(MPI.BYTE),
            rank=self._rank,
            size=self._size,
            type=kind,
            codecs=[codec_of(encoder, like.dtype, self.residual.dtype) for encoder in encoders],
            fixed_size=self._fixed_size,
            owners=owners,
            segments=numbers,
            starts=starts,
            stops=stops,
            nbytes=nbytes,
            encoded_by=encoded_by,
            residual=address_of(self.residual),
            owner_residual=address_of(self.owner_residual),
            owned_from=self.owned[0],
            to_owner_tag=to_owner_tag,
            from_owner_tag=from_owner_tag,
        )
        self._kept: tuple[Array, Array] | None = None
        self._buffer: Array = None

    def bind(self, buffer: Array) -> None:
        """See OwnerExchange."""
        self._buffer = buffer
        self.bind_at(address_of(buffer))

    def bind_at(self, address: int) -> None:
        """As ``bind``, on memory that the caller keeps."""
        self.operation.bind(address)

    def prepare(self) -> None:
        """See OwnerExchange."""
        if self._kept is None:
            self._kept = np.empty_like(self.residual), np.empty_like(self.owner_residual)
            self.operation.keep(*map(address_of, self._kept))
        self.operation.prepare(self.runs, self._seed())

    def forget(self) -> None:
        """See OwnerExchange."""
        self.operation.forget()

    def bring_back(self) -> None:
        """See OwnerExchange."""
        self.operation.bring_back()

    def note(self) -> None:
        """See OwnerExchange."""
        of = self.operation.stats
        norms, owner_norms = (Norms(each.values, each.sums, each.residual) for each in (of.norms, of.owner_norms))
        seconds, encode, decode = of.nanoseconds / 1e9, of.encode / 1e9, of.decode / 1e9
        self.stats = RunStats(seconds, encode, decode, of.bytes_sent, norms, owner_norms, of.finite)

    def steps(self, progress: Progress) -> Steps:
        """See OwnerExchange."""
        self.prepare()
        yield from run(self.operation, progress)
        self.note()


class _PayloadBuffer:
    """The payloads of one chunk: where they are encoded or decoded, and where MPI sends or receives them."""

    def __init__(self, pieces: Sequence[Piece], fixed_size: bool, like: Array) -> None:
        self.pieces = pieces
        self.most = [encoder.nbytes(b - a) for a, b, encoder in pieces]
        self.header = 0 if fixed_size else 4 * len(pieces)
        device = device_of(like)
        self.bytes: Array = xp_of(like).empty(self.header + sum(self.most), np.uint8)
        self.nbytes = self.bytes.size  # those used
        self.wire: Any = self.bytes
        self._device = device
        self._staged = device is not None and not cuda_aware()
        if device is not None and self._staged:
            self.wire = device.pinned(self.bytes.size)

    def lengths(self) -> Any:
        """How long each piece's payload is; written where that depends on the values."""
        return self.bytes[: self.header].view(np.uint32) if self.header else self.most

    def out(self) -> Event | None:
        """Make what was encoded ready to be sent."""
        if self._device is None:
            return None
        return self._device.copy_out(self.wire, self.bytes) if self._staged else self._device.record()

    def taken_in(self) -> None:
        """Make what was received ready to be decoded; the stream orders the decoding after it."""
        if self._device is not None and self._staged:
            self._device.copy_in(self.bytes, self.wire)


class PortableOwnerExchange(OwnerExchange):
    """In Python over mpi4py."""

    def __init__(self, comm: MPI.Intracomm, like: Array, layout: Layout, channel: int) -> None:
        super().__init__(comm, like, layout, channel)
        fixed = self._fixed_size
        self._sum = xp_of(like).empty(self.owner_residual.size, self.owner_residual.dtype)
        chunks = [list(itertools.chain(*chunk)) for chunk in self._segments]
        self._encoded = [_PayloadBuffer(pieces, fixed, like) for pieces in chunks]  # by owner: this rank's chunks
        self._summed = [_PayloadBuffer(pieces, fixed, like) for pieces in chunks]  # by owner: the encoded sums
        mine = chunks[self._rank]
        self._incoming = [_PayloadBuffer(mine, fixed, like) for r in range(self._size) if r != self._rank]
        self._incoming.insert(self._rank, self._encoded[self._rank])
        numbers = [[k] * len(segment) for k, segment in enumerate(itertools.chain(*self._segments))]
        starts = (piece.start for piece in itertools.chain(*chunks))
        self._numbers = dict(zip(starts, itertools.chain(*numbers), strict=True))
        self._every = min(SAMPLE, len(numbers))
        self._x: Array = None

    def bind(self, buffer: Array) -> None:
        """See OwnerExchange."""
        self._x = buffer

    def steps(self, progress: Progress) -> Steps:
        """See OwnerExchange."""
        progress.exchanging = True
        self.stats = RunStats()
        began = time.perf_counter()
        others = [(self._rank + k) % self._size for k in range(1, self._size)]
        receives = {r: self._receive(self._incoming[r], r, 0) for r in others}
        sums = {r: self._receive(self._summed[r], r, 1) for r in others}
        sends: list[MPI.Request] = []
        for owner in [*others, self._rank]:
            message = self._encoded[owner]
            self._encode(message, self._x, self.residual, 0, self._seed(), self.stats.norms)
            if owner != self._rank:
                yield from _reached(message.out(), progress)
                sends += yield from self._send(message, owner, 0)
            MPI.Request.Testall(sends)  # lets the library push on what is under way
            progress.moves += 1
        begin = self.owned[0]
        for r in range(self._size):
            if r != self._rank:
                yield from self._arrived(receives[r], r, progress)
                self._incoming[r].taken_in()
            self._decode(self._incoming[r], self._sum, begin, accumulate=r > 0)
        summed = self._summed[self._rank]
        self._encode(summed, self._sum, self.owner_residual, begin, ~self._seed(), self.stats.owner_norms)
        yield from _reached(summed.out(), progress)
        for r in others:
            sends += yield from self._send(summed, r, 1)
        self._decode(summed, self._x, 0, accumulate=False)
        for r in others:
            yield from self._arrived(sums[r], r, progress)
            self._summed[r].taken_in()
            self._decode(self._summed[r], self._x, 0, accumulate=False)
        progress.peers = frozenset(others)
        while not MPI.Request.Testall(sends):
            yield
        device = device_of(self._x)
        yield from _reached(None if device is None else device.record(), progress)
        progress.moves += 1
        progress.exchanging = False
        self.stats.seconds = time.perf_counter() - began

    def _encode(
        self, message: _PayloadBuffer, values: Array, residual: Array, origin: int, seed: int, norms: Norms
    ) -> None:
        """Encode a chunk; ``values[0]`` is value ``origin`` of the buffer, and so is ``residual[0]``."""
        began = time.perf_counter()
        on_host = device_of(values) is None
        start, lengths = message.header, message.lengths()
        for k, (a, b, encoder) in enumerate(message.pieces):
            left = residual[a - origin : b - origin]
            v = values[a - origin : b - origin]
            sampled = on_host and self._numbers[a] % self._every == self.runs % self._every
            if sampled:
                norms.look_before(samples(v), samples(left))
            used = encoder.encode(v, left, message.bytes[start : start + message.most[k]], piece_seed(seed, a))
            if sampled:
                norms.look_after(samples(left))
            if on_host:
                self.stats.look_at_all(left)
            lengths[k] = used
            start += used
        message.nbytes = start
        self.stats.encode += time.perf_counter() - began

    def _decode(self, message: _PayloadBuffer, out: Array, origin: int, accumulate: bool) -> None:
        """Decode a chunk; ``out[0]`` is value ``origin`` of the buffer."""
        began = time.perf_counter()
        start = message.header
        for (a, b, encoder), nbytes in zip(message.pieces, message.lengths(), strict=True):
            stop = start + int(nbytes)
            encoder.decode(message.bytes[start:stop], out[a - origin : b - origin], accumulate=accumulate)
            start = stop
        self.stats.decode += time.perf_counter() - began

    def _receive(self, message: _PayloadBuffer, source: int, kind: int) -> MPI.Request:
        return self._comm.Irecv(message.wire, source, self._tags[kind]) if message.bytes.size else MPI.REQUEST_NULL

    def _send(self, message: _PayloadBuffer, to: int, kind: int) -> StepsTo[list[MPI.Request]]:
        yield from read_news()
        self.stats.bytes_sent += message.nbytes
        sent = message.wire[: message.nbytes]
        return [self._comm.Isend(sent, to, self._tags[kind])] if message.bytes.size else []

    def _arrived(self, request: MPI.Request, source: int, progress: Progress) -> Steps:
        progress.peers = frozenset((source,))
        while not request.Test():
            yield
        progress.moves += 1


def exchange_for(like: Array, all_native: bool) -> type[OwnerExchange]:
    """The kind for arrays such as ``like``: in the native engine for host memory, where ``all_native``.

    That is: all ranks have that engine, and the encoder's C functions.
    """
    return NativeOwnerExchange if all_native and device_of(like) is None else PortableOwnerExchange


def piece_seed(seed: int, start: int) -> int:
    """A seed for the piece that begins at value ``start``: others have others."""
    mixed = (seed + 0x9E3779B97F4A7C15 * (start + 1)) % (1 << 64)
    return mixed - (1 << 64) if mixed >> 63 else mixed


def _reached(event: Event | None, progress: Progress) -> Steps:
    while event is not None and not event.done:
        yield
    progress.moves += 1
