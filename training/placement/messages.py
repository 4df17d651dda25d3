"""The messages of a step: conversions are carried out by what this rank sends and receives, as steps of a job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.arrays import bytes_of
from bitring.collectives.interop.steps import Progress, Steps, StepsTo
from bitring.collectives.runtime.tags import message_tag
from bitring.training.placement.conversion import Hop, Move
from bitring.training.placement.layout import Region


class Messages:
    """This rank's, in one step. ``comm`` is private to bitring; ``ranks``: the numbers in it of the replica's ranks.

    Sends go on beside the computing; ``finish`` waits for them.
    """

    def __init__(self, comm: MPI.Intracomm, ranks: Sequence[int], rank: int, channel: int, progress: Progress) -> None:
        self._comm, self._ranks, self._rank, self._channel = comm, ranks, rank, channel
        self._progress = progress
        self._sends: list[tuple[MPI.Request, Any]] = []
        self.nbytes_sent = 0
        self.seconds: dict[int, float] = {}  # waited, by the number of the edge

    def send(self, hop: Hop, number: int, mine: Any) -> None:
        """Send what others get of ``mine``, which may be overwritten afterwards. ``number``: the message's."""
        for move in hop.moves:
            if move.source == self._rank != move.to:
                data = np.array(_within(mine, hop, self._rank, move), order="C", copy=True)
                request = self._comm.Isend(bytes_of(data.reshape(-1)), self._ranks[move.to], self._tag(number))
                self._sends.append((request, data))
                self.nbytes_sent += data.nbytes

    def receive(self, hop: Hop, number: int, mine: Any, inner: tuple[int, ...], dtype: Any) -> StepsTo[Any]:
        """This rank's part of the value after the hop, from ``mine`` before it and what others send.

        ``inner``: a sample's shape. Nothing is there to be had where this rank has no part: None.
        """
        if self._rank not in hop.after.ranks:
            return None
        region = hop.after_it(self._rank)
        moves = [move for move in hop.moves if move.to == self._rank]
        due: list[tuple[MPI.Request, Any] | None] = []
        for move in moves:
            if move.source == self._rank:
                due.append(None)
            else:
                data = np.empty(shape_of(move.region, inner), dtype)
                source = self._ranks[move.source]
                due.append((self._comm.Irecv(bytes_of(data.reshape(-1)), source, self._tag(number)), data))
        alone = len(moves) == 1 and moves[0].region == region
        sums = hop.sums(self._rank)
        result = np.zeros(shape_of(region, inner), dtype) if sums else np.empty(shape_of(region, inner), dtype)
        for move, each in zip(moves, due, strict=True):
            if each is None:
                data = _within(mine, hop, self._rank, move)
            else:
                request, data = each
                yield from self._wait(request, frozenset((self._ranks[move.source],)))
                if alone:
                    return data
            target = _slice(result, region, move.region)
            if sums:
                target += data
            else:
                target[...] = data
        return result

    def _wait(self, request: MPI.Request, peers: frozenset[int]) -> Steps:
        while not request.Test():
            self._progress.peers = peers
            yield
        self._progress.moves += 1

    def timed(self, number: int, steps: StepsTo[Any]) -> StepsTo[Any]:
        """``steps``, whose time counts as edge ``number``'s."""
        begin = time.perf_counter()
        result = yield from steps
        self.seconds[number] = self.seconds.get(number, 0.0) + time.perf_counter() - begin
        return result

    def finish(self) -> Steps:
        """Wait for the sends."""
        for request, _ in self._sends:
            yield from self._wait(request, frozenset())

    def _tag(self, number: int) -> int:
        return message_tag(self._channel, number)


def shape_of(region: Region, inner: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an array that holds the region, of samples of shape ``inner``."""
    return (region.last_row - region.first_row, *inner[:-1], region.last - region.first)


def _slice(array: Any, of: Region, region: Region) -> Any:
    """The view of ``region`` in an array that holds the region ``of``."""
    return array[
        region.first_row - of.first_row : region.last_row - of.first_row,
        ...,
        region.first - of.first : region.last - of.first,
    ]


def _within(mine: Any, hop: Hop, rank: int, move: Move) -> Any:
    """What moves, of what ``rank`` has before the hop."""
    return _slice(mine, hop.before_it(rank), move.region)
