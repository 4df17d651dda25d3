"""The messages of a step by the native engine: one operation for a whole step, without Python for each message.

Receives are posted when a step begins, so that what comes before it is wanted needs no second copy. The memory that
values arrive in is made once for a batch size. ``messages`` is the reference; both give the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.interop.mpi_library import library_functions
from bitring.collectives.interop.steps import Progress, Steps, StepsTo
from bitring.collectives.runtime.tags import message_tag
from bitring.compression.encoder import residual_dtype
from bitring.compression.exchange.owner_exchange import codec_of
from bitring.native import address_of, extension, native, type_of
from bitring.training.placement.layout import Region
from bitring.training.placement.messages import Way, shape_of
from bitring.training.placement.step_hops import StepHop, StepHops

_MOST = 2**31
"""A message must have less bytes."""


def serves(way: Way, hops: StepHops) -> bool:
    """Whether the extension is there, and has what these need: decided by what all ranks know."""
    if native() is None or type_of(way.dtype) is None or (way.encoder is not None and not way.encoder.has_functions):
        return False
    values = max((move.region.size * _inner(way, each) for each in hops.hops for move in each.hop.moves), default=0)
    return max(values * way.dtype.itemsize, 0 if way.encoder is None else way.encoder.nbytes(values)) < _MOST


class NativeMessages:
    """This rank's, in steps of one batch size. Sends go on beside the computing; ``finish`` waits for them."""

    runs_in = "the native engine"

    def __init__(self, way: Way, hops: StepHops) -> None:
        self._way, self._hops = way, hops
        self._results: list[Any] = []  # of each hop; None where this rank has no part
        self._nbytes: list[int] = []  # that this rank sends in each hop
        self.nbytes_sent = 0  # in the last step
        self.seconds: dict[int, float] = {}  # waited in the last step, by the number of the edge
        table: list[tuple[int, ...]] = []
        moves: list[tuple[int, ...]] = []
        for number, each in enumerate(hops.hops):
            edge, hop, _ = each
            result, mine = None, way.rank in hop.after.ranks
            if mine:
                result = np.empty(shape_of(hop.after_it(way.rank), way.shapes[edge.value]), way.dtype)
            self._results.append(result)
            address, values = (0, 0) if result is None else (address_of(result), result.size)
            table.append((mine and hop.sums(way.rank), way.encoder is not None, address, values))
            rows = list(self._moves(number, each))
            moves += rows
            self._nbytes.append(sum(row[4] for row in rows if row[1]))
        wide, encoder = residual_dtype(way.dtype), way.encoder
        kind = type_of(way.dtype)
        assert kind is not None, f"the extension has no {way.dtype}"
        self._operation = extension.HopExchange(
            library=library_functions(),
            handle_size=MPI._sizeof(MPI.Comm),
            comm=MPI._handleof(way.comm),
            byte=MPI._handleof(MPI.BYTE),
            rank=way.comm.Get_rank(),
            type=kind,
            hops=np.array(table, np.int64).reshape(-1, len(extension.HopExchange.hop_fields)),
            moves=np.array(moves, np.int64).reshape(-1, len(extension.HopExchange.move_fields)),
            codec=None if encoder is None else codec_of(encoder, way.dtype, wide),
            wide_itemsize=wide.itemsize,
        )
        self._operation.keep(self._results)

    def _moves(self, number: int, each: StepHop) -> Any:
        """The rows of the native table: what this rank sends, gets and keeps in a hop."""
        way, (_, hop, sequences) = self._way, each
        inner, encoder = _inner(way, each), way.encoder
        for move, sequence in zip(hop.moves, sequences, strict=True):
            if way.rank not in (move.source, move.to):
                continue
            sends = move.source == way.rank != move.to
            values = move.region.size * inner
            nbytes = values * way.dtype.itemsize if encoder is None else encoder.nbytes(values)
            peer = move.to if sends else move.source
            nothing = (0, 0, 0, 0)
            before = _runs(hop.before_it(way.rank), move.region, inner) if move.source == way.rank else nothing
            after = _runs(hop.after_it(way.rank), move.region, inner) if move.to == way.rank else nothing
            yield number, sends, way.ranks[peer], message_tag(way.channel, sequence), nbytes, *before, *after

    def begin(self, progress: Progress) -> None:
        """Begin a step."""
        self._progress = progress
        progress.holds = self
        self.nbytes_sent, self.seconds = 0, {}
        self._operation.begin()

    def send(self, number: int, mine: Any) -> None:
        """Send what others get of ``mine`` in hop ``number``; the array may be overwritten afterwards."""
        if self._nbytes[number]:
            mine = np.ascontiguousarray(mine, self._way.dtype)
            self._operation.send(number, address_of(mine))
            self.nbytes_sent += self._nbytes[number]

    def receive(self, number: int, mine: Any, meanwhile: Callable[[], bool]) -> StepsTo[Any]:
        """This rank's part of the value after hop ``number``, from ``mine`` before it and what others send.

        Nothing is there to be had where this rank has no part: None. The array is the taker's for the step. As long as
        it has to wait it calls ``meanwhile``, which does something else, until that returns that there is nothing.
        """
        result = self._results[number]
        if result is None:
            return None
        if mine is not None:
            mine = np.ascontiguousarray(mine, self._way.dtype)  # it stays until the result is there
        self._operation.expect(number, 0 if mine is None else address_of(mine))
        self._operation.advance()
        while not self._operation.over and meanwhile():  # which may take the operation further itself
            if not self._operation.over:
                self._operation.advance()
        begin = time.perf_counter()
        yield from self._run()
        edge = self._hops.hops[number].edge.number
        self.seconds[edge] = self.seconds.get(edge, 0.0) + time.perf_counter() - begin
        return result

    def advance(self) -> None:
        """Take what is under way further, between two layers."""
        self._operation.advance()

    def finish(self) -> Steps:
        """Wait for the sends."""
        self._operation.expect_sent()
        self._operation.advance()
        yield from self._run()

    def _run(self) -> Steps:
        while not self._operation.over:
            yield self._operation
        self._progress.moves += 1
        if self._operation.error:
            if self._operation.reason is not None:
                raise ValueError(self._operation.reason)
            raise MPI.Exception(self._operation.error)


def _inner(way: Way, each: StepHop) -> int:
    """The product of a sample's axes before the last."""
    size = 1
    for side in way.shapes[each.edge.value][:-1]:
        size *= side
    return size


def _runs(of: Region, region: Region, inner: int) -> tuple[int, int, int, int]:
    """Where ``region`` lies in an array of the region ``of``: its first value, runs, values in one, and to the next."""
    width = of.last - of.first
    first = (region.first_row - of.first_row) * inner * width + region.first - of.first
    return first, (region.last_row - region.first_row) * inner, region.last - region.first, width
