"""Seconds of a schedule in the alpha-beta-gamma model: one clock per rank, one per message.

A message of m bytes takes alpha + m·beta seconds, adding m bytes gamma·m. A rank sends one message at a time, receives
one at a time and adds one at a time, all three at once; it starts whatever can start first. A message starts as soon as
the sender holds its data, so segments run through several rounds like through a pipeline. Not modelled: waiting for a
receive to be posted or for a buffer to be free, and links shared between ranks.

Where all ranks do the same in every round, as in a ring, all clocks are one rank's, and only that one is run.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, groupby
from typing import NamedTuple

from bitring.collectives.schedules.check import MatchedTransfer, RoundEnd, walk
from bitring.collectives.schedules.schedule import Algorithm, Receive, Round, Send, chunk_start, rounds


def cost(
    algorithm: Algorithm,
    collective: str,
    size: int,
    nbytes: int,
    *,
    alpha: float,
    beta: float,
    gamma: float,
    segment_nbytes: int | None = None,
    root: int = 0,
) -> float:
    """Seconds from the common start to the end of the last rank, for ``nbytes`` bytes on ``size`` ranks.

    ``alpha`` is in seconds per message, ``beta`` in seconds per byte sent, ``gamma`` in seconds per byte reduced.
    Messages longer than ``segment_nbytes`` are cut into segments of at most that many bytes; None sends each whole.
    Empty messages cost nothing. Raises ValueError when the algorithm has no such collective, or a number is out of
    range.
    """
    if nbytes < 0 or (segment_nbytes is not None and segment_nbytes < 1) or min(alpha, beta, gamma) < 0:
        raise ValueError(
            f"cost: expected nbytes, alpha, beta, gamma >= 0 and segment_nbytes >= 1, got nbytes {nbytes}, "
            f"alpha {alpha}, beta {beta}, gamma {gamma}, segment_nbytes {segment_nbytes}"
        )
    chunks = algorithm.chunks(size)
    alike = None
    if nbytes >= _LEAST_CHUNK_NBYTES * chunks and root == 0 and not vars(algorithm):
        alike = _one_for_all(type(algorithm), collective, size, segment_nbytes is not None)
    if alike is None:
        events: Iterable[_Passing | RoundEnd] = map(_passing, walk(algorithm, collective, size, root))
    else:
        size, nbytes, events = 1, -(-nbytes // chunks) * chunks, alike
    return _clock(_segments(events, chunks, size, nbytes, segment_nbytes), size, alpha, beta, gamma)


_LEAST_CHUNK_NBYTES = 64
"""Chunks that differ by a byte are taken for equal from here on."""


class _Passing(NamedTuple):
    """A message: chunks ``first`` to ``last``-1 of the sender go to as many chunks from ``into`` on of the receiver."""

    step: int
    sender: int
    receiver: int
    position: int
    first: int
    last: int
    into: int
    reduce: bool


def _passing(event: MatchedTransfer | RoundEnd) -> _Passing | RoundEnd:
    if isinstance(event, RoundEnd):
        return event
    m = event
    return _Passing(m.step, m.sender, m.receiver, m.position, m.first, m.last, m.first, m.reduce)


@lru_cache(maxsize=64)
def _one_for_all(
    algorithm: type[Algorithm], collective: str, size: int, cut: bool
) -> tuple[_Passing | RoundEnd, ...] | None:
    """The events of any rank, which stands for itself and for all its peers; None unless all ranks do the same.

    Doing the same: in each round a rank sends once and receives once, to and from ranks that are in the same round,
    as many chunks, and what these chunks hold was received in the same earlier rounds. Where messages are ``cut``, the
    chunks' order counts, too: in recursive halving it depends on which half a rank keeps.
    """
    made = algorithm()
    if size == 1 or collective not in made.collectives() or collective in ("reduce", "broadcast"):
        return None
    first = [*rounds(made, collective, 0, size)]
    wanted: list[object] | None = None
    peers: list[list[tuple[int, int]]] = []
    for rank in range(size):
        mine = _Habits(made.chunks(size), cut)
        own = first if rank == 0 else rounds(made, collective, rank, size)
        for i, transfers in enumerate(own):
            if not mine.add(transfers) or (wanted is not None and wanted[i : i + 1] != mine.rounds[-1:]):
                return None
        wanted = wanted or mine.rounds
        if len(mine.rounds) != len(wanted):
            return None
        peers.append(mine.peers)
    for rank, talks in enumerate(peers):
        if any(peers[to][i][1] != rank for i, (to, _) in enumerate(talks)):
            return None
    return tuple(_alone(first))


class _Habits:
    """The work of a rank in each round, in words that are the same for ranks that do the same."""

    def __init__(self, chunks: int, ordered: bool) -> None:
        self._arrange: Callable[[Iterable[tuple[int, int]]], object] = list if ordered else sorted
        self.rounds: list[object] = []
        self.peers: list[tuple[int, int]] = []
        self._written = [-1] * chunks  # the round in which each chunk was received last

    def add(self, transfers: Round) -> bool:
        """Take in a round; False where it is not one send and one receive."""
        send = next((t for t in transfers if isinstance(t, Send)), None)
        receive = next((t for t in transfers if isinstance(t, Receive)), None)
        if len(transfers) != 2 or send is None or receive is None:
            return False
        reads, writes = (self._written[t.first : t.last] for t in (send, receive))
        runs = [self._arrange((key, len([*group])) for key, group in groupby(each)) for each in (reads, writes)]
        self.rounds.append((receive.reduce, runs))
        self.peers.append((send.peer, receive.peer))
        self._written[receive.first : receive.last] = [len(self.rounds) - 1] * (receive.last - receive.first)
        return True


def _alone(schedule: Iterable[Round]) -> Iterator[_Passing | RoundEnd]:
    for i, transfers in enumerate(schedule):
        send = next(t for t in transfers if isinstance(t, Send))
        receive = next(t for t in transfers if isinstance(t, Receive))
        yield _Passing(i, 0, 0, 0, send.first, send.last, receive.first, receive.reduce)
        yield RoundEnd(0, i)


@dataclass(eq=False)
class _Segment:
    """A message or part of one: it passes, then it is applied where it arrived."""

    order: tuple[int, int]  # among those that could start together: place in its message, step
    sender: int
    receiver: int
    nbytes: int
    reduce: bool
    to_pass: int = 0  # how many events it waits for: its data, the segment before it
    to_apply: int = 1  # its arrival, what was received before into the same place
    ready: float = 0.0  # the latest of the events so far
    readers: list[_Segment] = field(default_factory=list["_Segment"])  # they carry on what this one brought
    writers: list[_Segment] = field(default_factory=list["_Segment"])  # they are applied on top of it
    follower: _Segment | None = None  # the next of the same message


def _segments(
    events: Iterable[_Passing | RoundEnd], chunks: int, size: int, nbytes: int, segment_nbytes: int | None
) -> list[_Segment]:
    """All segments of all ranks, with who waits for whom."""
    chunk_nbytes = [chunk_start(nbytes, chunks, c + 1) - chunk_start(nbytes, chunks, c) for c in range(chunks)]
    # A cell is what dependencies are kept for: a chunk, or a segment of a chunk that is longer than one.
    pieces = [1 if segment_nbytes is None else max(1, -(-size_ // segment_nbytes)) for size_ in chunk_nbytes]
    cell_nbytes = [
        chunk_start(chunk_nbytes[c], pieces[c], i + 1) - chunk_start(chunk_nbytes[c], pieces[c], i)
        for c in range(chunks)
        for i in range(pieces[c])
    ]
    first_cell = [0, *accumulate(pieces)]
    cell_start = [0, *accumulate(cell_nbytes)]

    segments: list[_Segment] = []
    written: list[list[_Segment | None]] = [[None] * len(cell_nbytes) for _ in range(size)]
    arrived: list[list[tuple[int, int, int, _Segment]]] = [[] for _ in range(size)]  # position, cells, segment

    for event in events:
        if isinstance(event, RoundEnd):
            for _, first, last, segment in sorted(arrived[event.rank], key=lambda arrival: arrival[:2]):
                for before in _distinct(written[event.rank][first:last]):
                    before.writers.append(segment)
                    segment.to_apply += 1
                written[event.rank][first:last] = [segment] * (last - first)
            arrived[event.rank].clear()
            continue
        previous: _Segment | None = None
        first, end = first_cell[event.first], first_cell[event.last]
        aside = first_cell[event.into] - first
        place = 0
        while first < end:
            last = first + 1
            while last < end and (segment_nbytes is None or cell_start[last + 1] - cell_start[first] <= segment_nbytes):
                last += 1
            total = cell_start[last] - cell_start[first]
            if total:
                segment = _Segment((place, event.step), event.sender, event.receiver, total, event.reduce)
                for source in _distinct(written[event.sender][first:last]):
                    source.readers.append(segment)
                    segment.to_pass += 1
                if previous is not None:
                    previous.follower = segment
                    segment.to_pass += 1
                segments.append(segment)
                arrived[event.receiver].append((event.position, first + aside, last + aside, segment))
                previous = segment
                place += 1
            first = last
    return segments


def _distinct(writers: list[_Segment | None]) -> list[_Segment]:
    return [segment for segment in dict.fromkeys(writers) if segment is not None]


def _clock(segments: list[_Segment], size: int, alpha: float, beta: float, gamma: float) -> float:
    """Run the events in order of time. A segment is on the heap when nothing but busy ranks can hold it back."""
    send_free, receive_free, add_free = ([0.0] * size for _ in range(3))
    heap: list[tuple[float, tuple[int, int], int, bool, _Segment]] = []
    pushed = 0

    def push(seconds: float, applies: bool, segment: _Segment) -> None:
        nonlocal pushed
        pushed += 1
        heapq.heappush(heap, (seconds, segment.order, pushed, applies, segment))

    def happened(seconds: float, applies: bool, segment: _Segment) -> None:
        """One of the events that the segment waits for, to pass or to be applied."""
        segment.ready = max(segment.ready, seconds)
        if applies:
            segment.to_apply -= 1
        else:
            segment.to_pass -= 1
        if not (segment.to_apply if applies else segment.to_pass):
            push(segment.ready, applies, segment)

    for segment in segments:
        if not segment.to_pass:
            push(0.0, False, segment)
    finish = 0.0
    while heap:
        seconds, _, _, applies, segment = heapq.heappop(heap)
        sender, receiver = segment.sender, segment.receiver
        if applies:
            free = add_free[receiver] if segment.reduce else seconds
        else:
            free = max(send_free[sender], receive_free[receiver])
        if free > seconds:
            push(free, applies, segment)
            continue
        if not applies:
            end = seconds + alpha + beta * segment.nbytes
            send_free[sender] = receive_free[receiver] = end
            if segment.follower is not None:
                happened(seconds, False, segment.follower)
            happened(end, True, segment)
            continue
        end = seconds
        if segment.reduce:
            end += gamma * segment.nbytes
            add_free[receiver] = end
        finish = max(finish, end)
        for reader in segment.readers:
            happened(end, False, reader)
        for writer in segment.writers:
            happened(end, True, writer)
    return finish
