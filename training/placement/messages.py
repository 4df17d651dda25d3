"""The messages of a step in Python, as steps of a job: the reference of ``native_messages``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from bitring.arrays import bytes_of
from bitring.collectives.interop.steps import Progress, Steps, StepsTo
from bitring.collectives.runtime.tags import message_tag
from bitring.compression.encoder import Encoder, residual_dtype
from bitring.training.placement.conversion import Hop, Move
from bitring.training.placement.layout import Region
from bitring.training.placement.step_hops import StepHops
from bitring.training.step.compression_for import chosen_compressor


class Way(NamedTuple):
    """By what values travel in a replica. ``comm`` is private to bitring; ``ranks``: the replica's numbers in it.

    ``shapes``: of values, a sample's; ``encoder``: of what travels, or None.
    """

    comm: MPI.Intracomm
    ranks: tuple[int, ...]
    rank: int
    channel: int
    shapes: Mapping[str, tuple[int, ...]]
    dtype: np.dtype[Any]
    encoder: Encoder | None


def value_encoder(given: Any) -> Encoder | None:
    """``value_compression``, by name or instance. Raises TypeError and ValueError."""
    made = chosen_compressor("value_compression", given)
    if made is not None and not (isinstance(made, Encoder) and made.fixed_size and not made.draws):
        raise ValueError(
            "ModelParallel: value_compression must be an encoder whose payloads have a fixed size, and that does not "
            f"draw, such as 'float16'; got {made!r}"
        )
    return made


class Messages:
    """This rank's, in steps of one batch size. Sends go on beside the computing; ``finish`` waits for them."""

    runs_in = "Python"

    def __init__(self, way: Way, hops: StepHops) -> None:
        self._way, self._hops = way, hops
        self._sends: list[tuple[MPI.Request, Any]] = []
        self._receives: list[MPI.Request] = []  # of the hop under way; each holds its memory
        self.nbytes_sent = 0  # in the last step
        self.seconds: dict[int, float] = {}  # waited in the last step, by the number of the edge

    def begin(self, progress: Progress) -> None:
        """Begin a step."""
        self._progress = progress
        progress.holds = self
        self.nbytes_sent, self.seconds = 0, {}
        self._sends, self._receives = [], []

    def send(self, number: int, mine: Any) -> None:
        """Send what others get of ``mine`` in hop ``number``; the array may be overwritten afterwards."""
        way, (_, hop, sequences) = self._way, self._hops.hops[number]
        for move, sequence in zip(hop.moves, sequences, strict=True):
            if move.source == way.rank != move.to:
                data = np.array(_within(mine, hop, way.rank, move), way.dtype, order="C", copy=True).reshape(-1)
                message = bytes_of(data) if way.encoder is None else _encoded(way.encoder, data)
                request = way.comm.Isend(message, way.ranks[move.to], message_tag(way.channel, sequence))
                self._sends.append((request, message))
                self.nbytes_sent += message.nbytes

    def receive(self, number: int, mine: Any, meanwhile: Callable[[], bool]) -> StepsTo[Any]:
        """This rank's part of the value after hop ``number``, from ``mine`` before it and what others send.

        Nothing is there to be had where this rank has no part: None. As long as it has to wait it calls ``meanwhile``,
        which does something else, until that returns that there is nothing.
        """
        way, (edge, hop, sequences) = self._way, self._hops.hops[number]
        if way.rank not in hop.after.ranks:
            return None
        inner, region, encoder = way.shapes[edge.value], hop.after_it(way.rank), way.encoder
        due: list[tuple[Move, MPI.Request | None, Any]] = []
        for move, sequence in zip(hop.moves, sequences, strict=True):
            if move.to == way.rank != move.source:
                data = np.empty(shape_of(move.region, inner), way.dtype)
                message = bytes_of(data.reshape(-1))
                if encoder is not None:
                    message = np.empty(encoder.nbytes(data.size), np.uint8)
                tag = message_tag(way.channel, sequence)
                due.append((move, way.comm.Irecv(message, way.ranks[move.source], tag), (data, message)))
            elif move.to == way.rank:
                due.append((move, None, None))
        self._receives = [request for _, request, _ in due if request is not None]
        while not MPI.Request.Testall(self._receives) and meanwhile():
            pass
        begin = time.perf_counter()
        sums = hop.sums(way.rank)
        result = np.zeros(shape_of(region, inner), way.dtype) if sums else np.empty(shape_of(region, inner), way.dtype)
        for move, request, arrived in due:
            if request is None:
                data = _within(mine, hop, way.rank, move)
            else:
                yield from self._wait(request, frozenset((way.ranks[move.source],)))
                data, message = arrived
                if encoder is not None:
                    encoder.decode(message, data.reshape(-1))
            target = _slice(result, region, move.region)
            if sums:
                target += data
            else:
                target[...] = data
        self.seconds[edge.number] = self.seconds.get(edge.number, 0.0) + time.perf_counter() - begin
        return result

    def advance(self) -> None:
        """Take what is under way further, between two layers: the MPI library does it."""

    def finish(self) -> Steps:
        """Wait for the sends."""
        for request, _ in self._sends:
            yield from self._wait(request, frozenset())

    def _wait(self, request: MPI.Request, peers: frozenset[int]) -> Steps:
        while not request.Test():
            self._progress.peers = peers
            yield
        self._progress.moves += 1


def shape_of(region: Region, inner: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an array that holds the region, of samples of shape ``inner``."""
    return (region.last_row - region.first_row, *inner[:-1], region.last - region.first)


def _encoded(encoder: Encoder, values: Any) -> Any:
    """The payload. What it leaves out is lost: the next message is about other samples."""
    payload = np.empty(encoder.nbytes(values.size), np.uint8)
    encoder.encode(values, np.zeros(values.size, residual_dtype(values.dtype)), payload)
    return payload


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
