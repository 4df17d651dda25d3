"""A store's service that needs no interpreter for the usual: pushes, reads, clocks, ranks' waits for each other.

It runs as a native operation, so that whoever drives jobs carries messages, applies updates and answers reads without
Python's lock: a rank that computes in Python serves the others all the same. Python hears what the training thread
waits for, and what is rare. Messages are those of ``PortableService``, which the other ranks may have.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.interop.mpi_library import library_functions
from bitring.collectives.node.shared_shards import DTYPES
from bitring.collectives.runtime.context import Context
from bitring.collectives.runtime.interrupts import HeldBack
from bitring.collectives.runtime.mailbox import Message
from bitring.compression.exchange.owner_exchange import codec_of
from bitring.native import address_of, extension, native, type_of
from bitring.training.optimizer import Optimizer
from bitring.training.store.codec import MOST_EDITIONS, Codec
from bitring.training.store.layout import Layout
from bitring.training.store.owner import Kind
from bitring.training.store.packing import pack
from bitring.training.store.rule import Terms
from bitring.training.store.service import Service
from bitring.training.store.shard import Shard
from bitring.training.store.table import Setup


def serves(setup: Setup, layout: Layout, codec: Codec) -> bool:
    """Whether this rank's part of a store can be native: updates are applied by a kernel.

    What travels is plain values, or encoded by kernels, at most as many bytes in a message as MPI's calls take.
    """
    return (
        native() is not None
        and _has_kernels(codec, layout, setup.comm.Get_rank())
        and not setup.factors
        and not any(setup.journal)
        and not setup.copies
        and setup.optimizer.native_update() is not None
        and all(w.dtype in DTYPES for w in setup.values.values())
        and _most_nbytes(layout) < extension.StoreService.most_payload
    )


def _has_kernels(codec: Codec, layout: Layout, rank: int) -> bool:
    """Whether what this rank owns, if anything, is encoded by them, where it is."""
    owned = layout.of(rank) if rank < layout.owners else ()
    encoders = [codec.encoder(number, rank) for number, _, _ in owned]
    return all(encoder is None or encoder.has_functions for encoder in encoders)


def _most_nbytes(layout: Layout) -> int:
    """Of one message: rows, their numbers, and what tells them apart, or the changes of several editions."""
    return sum(p.rows * (p.width * p.dtype.itemsize + 8) + 48 * MOST_EDITIONS for p in layout.parameters)


def _numbers(optimizer: Optimizer) -> tuple[Any, float, float, float, float]:
    """The optimizer's kernel and its numbers."""
    update = optimizer.native_update()
    assert update is not None
    return extension.Rule[update.rule], update.lr, update.momentum, update.weight_decay, update.eps


class NativeOwner:
    """A ShardOwner of ``shard``, number ``number`` among owners, where ``serves`` says so."""

    def __init__(
        self, shard: Shard, terms: Terms, clocks: Sequence[int], codec: Codec, number: int, optimizer: Optimizer
    ) -> None:
        self.shard = shard
        slots = [shard.slots[slot] for slot in optimizer.slots]
        parts: list[Any] = []
        for parameter, w in shard.values.items():
            kind, encoder = type_of(w.dtype), codec.encoder(parameter, number)
            assert kind is not None
            slot = address_of(slots[0][parameter]) if slots else 0
            encoded = (None, 0) if encoder is None else (codec_of(encoder, w.dtype, w.dtype), encoder.nbytes(w.size))
            rows, width = w.reshape(len(w), -1).shape
            parts.append((parameter, address_of(w), slot, rows, width, kind, *encoded))
        drops, inverse = terms.late == "drop", terms.scale == "inverse"
        rule = extension.StoreRule(terms.gather, drops, terms.staleness, inverse, list(clocks))
        self.native = extension.StoreOwner(
            rule, len(clocks), parts, *_numbers(optimizer), edits=codec.encodes, keep=shard
        )

    def use(self, member: int, optimizer: Optimizer) -> None:
        """From now on these settings hold for a member's updates."""
        self.native.use(member, *_numbers(optimizer))

    @property
    def clocks(self) -> list[float]:
        """See ShardOwner."""
        return self.native.seen()[0]

    @property
    def applied(self) -> int:
        """See ShardOwner."""
        return self.native.seen()[1]

    @property
    def dropped(self) -> int:
        """See ShardOwner."""
        return self.native.seen()[2]

    @property
    def waiting(self) -> int:
        """See ShardOwner."""
        return self.native.seen()[3]

    @property
    def staleness(self) -> Mapping[int, int]:
        """See ShardOwner."""
        return dict(self.native.seen()[4])

    def load(self, values: Mapping[str, Any], slots: Mapping[str, Mapping[str, Any]]) -> bool:
        """See ShardOwner."""
        self.shard.load(values, slots)
        self.native.restart()
        return True

    def close(self) -> None:
        """See ShardOwner."""


class NativeService(Service):
    """Where ``serves`` says so. ``owner``: of this rank's shard; None: it has none."""

    def __init__(self, context: Context, owners: Sequence[int], owner: NativeOwner | None) -> None:
        super().__init__(context, owners)
        self.owner = owner
        self._failure: Exception | None = None
        self._hearing = threading.Lock()  # messages are acted on in their order
        self._beside = MPI.Query_thread() == MPI.THREAD_MULTIPLE  # two threads may take it further in turn
        self._begun = False  # the ranks know where to reach each other past the MPI library
        self._operation = extension.StoreService(
            library=library_functions(),
            handle_size=MPI._sizeof(MPI.Comm),
            comm=MPI._handleof(context.comm),
            byte=MPI._handleof(MPI.BYTE),
            rank=context.rank,
            size=context.size,
            owner=None if owner is None else owner.native,
        )

    @property
    def nbytes_sent(self) -> int:
        """See Service."""
        return int(self._operation.nbytes_sent)

    def post(self, rank: int, kind: Kind, serial: int = 0, numbers: Sequence[float] = (), payload: Any = None) -> None:
        """See Service."""
        flat = None if payload is None else payload.reshape(-1).view(np.uint8)
        self._operation.post(rank, kind, serial, numbers, flat)

    def lack_room(self, owners: set[int]) -> None:
        """See Service."""
        super().lack_room(owners)
        self._operation.mind_room(bool(owners))

    def look(self) -> None:
        """See Service."""
        with HeldBack():
            self._take()

    def serve(self, seconds: float) -> bool:
        """See Service."""
        if not (self._beside and self._begun):
            return False
        self._operation.wait(seconds)
        return True

    def _take(self) -> bool:
        with self._hearing:
            messages = self._operation.take()
            try:
                for each in messages:
                    self._hear(Message(*each))
            except Exception as error:  # the job's, whoever takes it further now
                self._failure = error
            return bool(messages)

    @property
    def _over(self) -> bool:
        return bool(self._operation.ended)

    def _carry(self) -> bool:
        if self._operation.over and not self._operation.ended:
            if self._operation.error:
                reason = self._operation.reason
                raise RuntimeError(reason) if reason is not None else MPI.Exception(self._operation.error)
            self._operation.begin()
            self._begun = True
        self._operation.advance()  # what is posted goes out: this rank may come to no other call for long
        went = self._take()
        if self._failure is not None:
            raise self._failure
        return went

    def _hear(self, message: Message) -> None:
        source, kind, serial, _, payload = message
        if kind == Kind.END:
            self.ended.add(source)
        elif kind == Kind.USE:
            assert isinstance(self.owner, NativeOwner)
            self.owner.use(source, pickle.loads(payload.tobytes()))
            self._operation.resume()
        elif kind == Kind.SLOTS:
            assert isinstance(self.owner, NativeOwner)
            self.post(source, Kind.ARE, serial, (), pack(self.owner.shard.kept()))
            self._operation.resume()
        else:
            super()._hear(message)
