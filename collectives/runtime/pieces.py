"""Large arrays between ranks, in pieces: each is a job of the communicator's queue, and its arrival is progress.

So a wait is watched, can be interrupted and is under ``BITRING_TIMEOUT`` as in every other call. No message comes near
MPI's limit of 2^31 bytes, and a rank that passes an array on needs memory for one piece only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mpi4py import MPI

from bitring.collectives.interop.steps import Progress, Steps, wait_for
from bitring.collectives.runtime.agreement import Request, agree
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.ports import read_news
from bitring.collectives.runtime.tags import PIECE_TAG

PIECE_NBYTES = 16 << 20
"""A slow disk takes a second for it, a network less."""

_ALIGNMENT = 16


class Span(NamedTuple):
    """Bytes ``begin`` to ``end`` of array number ``array``; none where the array is empty."""

    array: int
    begin: int
    end: int


def split(sizes: Sequence[int], limit: int = PIECE_NBYTES) -> Iterator[list[Span]]:
    """The bytes of arrays of ``sizes`` bytes, one after the other, in pieces of at most ``limit`` (16 or more) bytes.

    Small arrays share a piece; large ones are cut between values.
    """
    piece: list[Span] = []
    room = limit
    for array, size in enumerate(sizes):
        begin = 0
        while True:
            end = size if size - begin <= room else begin + room - room % _ALIGNMENT
            if end > begin or size == 0:
                piece.append(Span(array, begin, end))
                room -= end - begin
            if end == size:
                break
            yield piece
            piece, room, begin = [], limit, end
    if piece:
        yield piece


def nbytes_of(piece: Sequence[Span]) -> int:
    """Number of bytes in a piece."""
    return sum(end - begin for _, begin, end in piece)


def transfer(comm: MPI.Intracomm, piece: Any, function: str, source: int, target: int | None = None) -> None:
    """Copy the bytes in rank ``source``'s ``piece`` to rank ``target``'s, or to all ranks' for None. Collective.

    ``piece`` is a contiguous NumPy array of bytes, at most 2^31 − 1 of them and equally many where it is read or
    written; None elsewhere. ``function`` is the caller's name. Raises on all ranks as ``allgather`` does.
    """
    context = context_of(comm)
    if context.size == 1 or source == target:
        return

    def steps(progress: Progress) -> Steps:
        request = Request(function, {"source": source, "target": target})
        yield from agree(context.comm, context.roll_call, request, progress)
        yield from read_news()
        progress.exchanging = True
        if target is None:
            progress.peers = frozenset({source} - {context.rank})
            yield from wait_for(context.comm.Ibcast([piece, MPI.BYTE], source), progress)
        elif context.rank == source:
            progress.peers = frozenset({target})
            yield from wait_for(context.comm.Isend([piece, MPI.BYTE], target, PIECE_TAG), progress)
        elif context.rank == target:
            progress.peers = frozenset({source})
            yield from wait_for(context.comm.Irecv([piece, MPI.BYTE], source, PIECE_TAG), progress)
        progress.exchanging = False

    with context.turn(function):
        context.prepare(function)
        context.queue.submit(steps, function).wait()
