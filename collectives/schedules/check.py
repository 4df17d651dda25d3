"""The symbolic check of a schedule: who contributes what to which chunk, with no data and no MPI.

:func:`walk` takes all ranks through their rounds under the strictest rule that MPI allows, the rendezvous: a message
passes only while its sender and its receiver are both in the rounds that name it. :func:`check` follows the ranks'
contributions along that walk. A schedule that passes has no deadlock whatever the MPI library buffers, and each result
holds each contribution exactly once; an AllReduce ends with the same bits on all ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from bitring.collectives.schedules.schedule import COLLECTIVES, Algorithm, Receive, Send, Transfer, rounds


class ScheduleError(AssertionError):
    """A schedule is wrong; the text says on which rank, in which round, for which chunk."""


class MatchedTransfer(NamedTuple):
    """A send and its receive: chunks ``first`` to ``last``-1."""

    step: int  # on a clock common to all ranks, where every message takes one unit
    sender: int
    sender_round: int
    receiver: int
    receiver_round: int
    position: int  # among the transfers of the receiver's round: receives are applied in this order
    first: int
    last: int
    reduce: bool


class RoundEnd(NamedTuple):
    """All transfers of this round of ``rank`` have passed; what it received is now applied."""

    rank: int
    round: int


@dataclass(frozen=True)
class Traffic:
    """The cost of a correct schedule. Tuples have an entry per rank; traffic is in chunks, ``chunks`` per buffer."""

    chunks: int
    rounds: int  # steps on the common clock from the first message to the last
    messages: tuple[int, ...]  # sent by each rank
    sent: tuple[int, ...]
    received: tuple[int, ...]
    reduced: tuple[int, ...]

    def share(self, chunks: int) -> Fraction:
        """A number of chunks as a fraction of the buffer."""
        return Fraction(chunks, self.chunks)


def walk(algorithm: Algorithm, collective: str, size: int, root: int = 0) -> Iterator[MatchedTransfer | RoundEnd]:
    """All messages, in an order in which they may happen; each rank's round ends with a :class:`RoundEnd`.

    Raises :class:`ScheduleError` for a transfer that names an impossible peer or range, has no counterpart, or differs
    from it in its range, and for a deadlock. Raises ValueError when the algorithm has no such collective.
    """
    _require(algorithm, collective, size, root)
    chunks = algorithm.chunks(size)
    programs = [rounds(algorithm, collective, rank, size, root) for rank in range(size)]
    numbers = [-1] * size  # the round that each rank is in
    starts = [0] * size  # the step in which that round began
    ends = [0] * size  # the step after its last message so far
    open_transfers = [0] * size
    finished = [False] * size
    waiting: dict[tuple[int, int], deque[tuple[int, Transfer]]] = {}  # (sender, receiver) -> unmatched transfers
    # Sends and receives never wait in the same queue: the second of a pair to come takes the first away.

    eager = deque(range(size))  # ranks whose round is over
    while eager:
        rank = eager.popleft()
        starts[rank] = ends[rank]
        numbers[rank] += 1
        transfers = next(programs[rank], None)
        if transfers is None:
            finished[rank] = True
            continue
        open_transfers[rank] = len(transfers)
        if not transfers:
            yield RoundEnd(rank, numbers[rank])
            eager.append(rank)
        for position, transfer in enumerate(transfers):
            peer = transfer.peer
            if not 0 <= peer < size or peer == rank or not 0 <= transfer.first < transfer.last <= chunks:
                raise ScheduleError(
                    f"rank {rank}, round {numbers[rank]}: {_text(transfer)} is impossible among {size} ranks "
                    f"and {chunks} chunks"
                )
            sending = isinstance(transfer, Send)
            key = (rank, peer) if sending else (peer, rank)
            queue = waiting.setdefault(key, deque())
            if not queue or isinstance(queue[0][1], Send) is sending:
                queue.append((position, transfer))
                continue
            other_position, other = queue.popleft()
            if (transfer.first, transfer.last) != (other.first, other.last):
                raise ScheduleError(
                    f"rank {rank}, round {numbers[rank]}: {_text(transfer)} meets rank {peer}, round {numbers[peer]}: "
                    f"{_text(other)}"
                )
            receive = other if sending else transfer
            assert isinstance(receive, Receive)
            step = max(starts[rank], starts[peer])
            yield MatchedTransfer(
                step,
                key[0],
                numbers[key[0]],
                key[1],
                numbers[key[1]],
                other_position if sending else position,
                receive.first,
                receive.last,
                receive.reduce,
            )
            for end in (rank, peer):
                ends[end] = max(ends[end], step + 1)
                open_transfers[end] -= 1
                if not open_transfers[end]:
                    yield RoundEnd(end, numbers[end])
                    eager.append(end)
    if not all(finished):
        raise ScheduleError(_stuck(waiting, numbers, finished))


def check(algorithm: Algorithm, collective: str, size: int, root: int = 0) -> Traffic:
    """Prove a schedule of ``size`` ranks right, and count its rounds and traffic.

    Raises :class:`ScheduleError` for what :func:`walk` raises it for, and when a contribution would count twice or is
    missing at the end, when a chunk is used that was never filled, and when an AllReduce does not add in the same order
    on all ranks.
    """
    _require(algorithm, collective, size, root)
    chunks = algorithm.chunks(size)
    if collective in ("reduce_scatter", "allgather") and chunks != size:
        raise ScheduleError(f"{collective} needs one chunk per rank; among {size} ranks the algorithm has {chunks}")
    sums = _Sums(size)
    if collective == "broadcast":
        held = [[root if rank == root else _EMPTY] * chunks for rank in range(size)]
    elif collective == "allgather":
        held = [[rank if c == rank else _EMPTY for c in range(chunks)] for rank in range(size)]
    else:
        held = [[rank] * chunks for rank in range(size)]
    arrived: list[list[tuple[MatchedTransfer, list[int]]]] = [[] for _ in range(size)]
    messages, sent, received, reduced = ([0] * size for _ in range(4))
    steps = 0

    for event in walk(algorithm, collective, size, root):
        if isinstance(event, MatchedTransfer):
            values = held[event.sender][event.first : event.last]
            if _EMPTY in values:
                c = event.first + values.index(_EMPTY)
                raise ScheduleError(
                    f"rank {event.sender}, round {event.sender_round}: sends chunk {c} to rank {event.receiver} "
                    "before anything is in it"
                )
            arrived[event.receiver].append((event, values))
            steps = max(steps, event.step + 1)
            count = event.last - event.first
            messages[event.sender] += 1
            sent[event.sender] += count
            received[event.receiver] += count
            reduced[event.receiver] += count * event.reduce
        elif arrived[event.rank]:
            for message, values in sorted(arrived[event.rank], key=lambda arrival: arrival[0].position):
                _apply(message, values, held[event.rank], sums)
            arrived[event.rank].clear()

    _require_result(collective, held, sums, root)
    return Traffic(chunks, steps, tuple(messages), tuple(sent), tuple(received), tuple(reduced))


_EMPTY = -1


class _Sums:
    """Distinct sums, numbered: r is rank r's contribution, others are pairs of earlier ones, the lower rank's first."""

    def __init__(self, size: int) -> None:
        self.masks = [1 << rank for rank in range(size)]  # the contributions in each, a bit per rank
        self._numbers: dict[tuple[int, int], int] = {}

    def add(self, lower: int, higher: int) -> int | None:
        """The number of the sum of two; None when they have a contribution in common."""
        number = self._numbers.get((lower, higher))
        if number is None:
            if self.masks[lower] & self.masks[higher]:
                return None
            number = len(self.masks)
            self.masks.append(self.masks[lower] | self.masks[higher])
            self._numbers[lower, higher] = number
        return number


def _apply(message: MatchedTransfer, values: list[int], held: list[int], sums: _Sums) -> None:
    first, last = message.first, message.last
    if not message.reduce:
        held[first:last] = values
        return
    rank, peer = message.receiver, message.sender
    for c, theirs in enumerate(values, first):
        own = held[c]
        where = f"rank {rank}, round {message.receiver_round}: reduces chunk {c} from rank {peer}"
        if own == _EMPTY:
            raise ScheduleError(f"{where} before anything is in it")
        both = sums.add(theirs, own) if peer < rank else sums.add(own, theirs)
        if both is None:
            raise ScheduleError(f"{where}: {_ranks(sums.masks[own] & sums.masks[theirs])} would count twice")
        held[c] = both


def _require(algorithm: Algorithm, collective: str, size: int, root: int) -> None:
    name = type(algorithm).__name__
    if collective not in COLLECTIVES:
        raise ValueError(f"unknown collective {collective!r}; known: {', '.join(COLLECTIVES)}")
    own = algorithm.collectives()
    if collective not in own:
        raise ValueError(f"{name} has no schedule for {collective}; it has: {', '.join(own) or 'none'}")
    if size < 1 or not 0 <= root < size:
        raise ValueError(f"{name} {collective}: expected size >= 1 and 0 <= root < size, got size {size}, root {root}")


def _require_result(collective: str, held: list[list[int]], sums: _Sums, root: int) -> None:
    size = len(held)
    everyone = (1 << size) - 1
    for rank, values in enumerate(held):
        for c, value in enumerate(values):
            if (collective == "reduce_scatter" and c != rank) or (collective == "reduce" and rank != root):
                continue
            wanted = 1 << root if collective == "broadcast" else 1 << c if collective == "allgather" else everyone
            mask = 0 if value == _EMPTY else sums.masks[value]
            if mask != wanted:
                missing, foreign = wanted & ~mask, mask & ~wanted
                wrong = [f"lacks {_ranks(missing)}"] if missing else []
                wrong += [f"should not hold {_ranks(foreign)}"] if foreign else []
                raise ScheduleError(f"rank {rank}, after the last round: chunk {c} {' and '.join(wrong)}")
            if collective == "allreduce" and value != held[0][c]:
                raise ScheduleError(
                    f"rank {rank}, after the last round: chunk {c} was added in another order than on rank 0, "
                    "so bits may differ"
                )


def _ranks(mask: int) -> str:
    named = [str(rank) for rank in range(mask.bit_length()) if mask >> rank & 1]
    more = f" and {len(named) - 8} more" if len(named) > 8 else ""
    return f"the contribution of rank{'s' * (len(named) > 1)} {', '.join(named[:8])}{more}"


def _text(transfer: Transfer) -> str:
    what = (
        f"chunks {transfer.first} to {transfer.last - 1}"
        if transfer.last - transfer.first > 1
        else f"chunk {transfer.first}"
    )
    if isinstance(transfer, Send):
        return f"sends {what} to rank {transfer.peer}"
    return f"receives {what} from rank {transfer.peer}"


def _stuck(
    waiting: dict[tuple[int, int], deque[tuple[int, Transfer]]], numbers: list[int], finished: list[bool]
) -> str:
    """Explain an early end of the walk: a transfer whose peer has finished, else a circle of ranks that wait."""
    waits: dict[int, tuple[int, str]] = {}  # rank -> the peer that it waits for, and how
    for (sender, receiver), queue in waiting.items():
        for _, transfer in queue:
            rank, peer = (sender, receiver) if isinstance(transfer, Send) else (receiver, sender)
            text = f"rank {rank}, round {numbers[rank]}: {_text(transfer)}"
            if finished[peer]:
                return f"{text}, which has finished: the transfer has no counterpart"
            waits[rank] = (peer, text)
    rank = next(iter(waits))
    seen: list[int] = []
    while rank not in seen:
        seen.append(rank)
        rank = waits[rank][0]
    circle = seen[seen.index(rank) :]
    more = f"; and {len(circle) - 8} more ranks" if len(circle) > 8 else ""
    return f"deadlock: {'; '.join(waits[rank][1] for rank in circle[:8])}{more}"
