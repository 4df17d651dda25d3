"""A schedule compiled for one rank and one buffer length: the messages, and what each has to wait for.

Chunks are cut into segments, so that a message is at most ``segment`` values and the next round can begin with the
segments that are there. A program holds no buffer and no communicator: executors bind it to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bitring.collectives.schedules.schedule import Receive, Round, Send, chunk_start

SHARED_SLOTS = 8
"""Scratch segments shared by the receives that reduce into untouched values (a ring's: taken in order)."""

WINDOW = 4
"""Messages of one transfer under way at once; also the scratch segments of a transfer that has its own."""

OWN_SLOT_STREAMS = 64
"""Transfers that may have scratch of their own; a schedule with more takes the rest in order."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a program; values ``start`` to ``stop``-1 of the buffer."""

    sends: bool
    reduces: bool
    peer: int
    start: int
    stop: int
    stream: int  # index of the transfer it is a segment of
    sequence: int  # position among the messages of this direction between the two ranks; both ranks agree on it
    slot: int  # scratch segment it is received in; -1: none
    waits: int  # messages that must finish before it may be sent, received in place, or taken out of scratch
    early: bool  # a receive that may be posted as soon as nothing is waited for, even out of order


@dataclass(frozen=True, slots=True)
class Program:
    """All messages of one rank. ``unblocks[i]`` are the messages that wait for message i."""

    messages: tuple[Message, ...]
    unblocks: tuple[tuple[int, ...], ...]
    streams: tuple[tuple[int, ...], ...]  # the messages of each transfer, in order; transfers in schedule order
    slots: tuple[int, ...]  # the scratch segments in use
    slot_values: int  # values a scratch segment must hold
    values_sent: int


def cells(n: int, chunks: int, segment: int) -> tuple[list[int], list[int]]:
    """Cut ``n`` values into cells of at most ``segment`` values that span no two chunks.

    Returns the cells' starts (one more than cells: the last is n), and each chunk's first cell (likewise).
    """
    starts: list[int] = []
    first: list[int] = []
    for c in range(chunks):
        begin, end = chunk_start(n, chunks, c), chunk_start(n, chunks, c + 1)
        first.append(len(starts))
        starts.extend(range(begin, end, segment))
    first.append(len(starts))
    starts.append(n)
    return starts, first


def compile_program(schedule: Iterable[Round], chunks: int, n: int, segment: int) -> Program:
    """One rank's ``schedule`` on ``n`` values in ``chunks`` chunks, in segments of at most ``segment`` values."""
    starts, first = cells(n, chunks, segment)
    writer = [-1] * (len(starts) - 1)  # per cell: the last message that changes it
    readers: list[list[int]] = [[] for _ in writer]  # per cell: the sends that read it since
    messages: list[Message] = []
    unblocks: list[list[int]] = []
    streams: list[tuple[int, ...]] = []
    sequences: dict[tuple[bool, int], int] = {}
    shared = own_streams = own_slots = values_sent = slot_values = 0

    for transfers in schedule:
        round_start = len(messages)
        # Sends read what is there before the round's receives are applied, so they are entered first.
        for transfer in sorted(transfers, key=lambda t: not isinstance(t, Send)):
            sends = isinstance(transfer, Send)
            reduces = isinstance(transfer, Receive) and transfer.reduce
            begin, end = first[transfer.first], first[transfer.last]
            pieces: list[tuple[int, int]] = []
            while begin < end:
                stop = begin + 1
                while stop < end and starts[stop + 1] - starts[begin] <= segment:
                    stop += 1
                pieces.append((begin, stop))
                begin = stop
            if not pieces:
                continue
            needs = [
                {writer[c] for c in range(a, b)}
                | ({r for c in range(a, b) for r in readers[c]} if not sends else set())
                for a, b in pieces
            ]
            for need in needs:
                need.discard(-1)
            # What replaces values that this same round sends is received aside: ranks that swap would wait for each
            # other's receive, and only then take back what they sent.
            aside = reduces or (not sends and any(i >= round_start for need in needs for i in need))
            # Only receives that build on earlier ones may overtake: a tree's second child. They need scratch of
            # their own, so that nothing received in order ever waits for a segment that they hold.
            early = not sends and all(needs) and (not aside or own_streams < OWN_SLOT_STREAMS)
            base = own_slots
            if aside and early:
                own_streams += 1
                own_slots += min(WINDOW, len(pieces))
            stream: list[int] = []
            for k, ((a, b), need) in enumerate(zip(pieces, needs, strict=True)):
                index = len(messages)
                key = (sends, transfer.peer)
                sequences[key] = sequences.get(key, -1) + 1
                slot = -1
                if aside:
                    slot = SHARED_SLOTS + base + k % WINDOW if early else shared % SHARED_SLOTS
                    shared += not early
                    slot_values = max(slot_values, starts[b] - starts[a])
                if sends:
                    values_sent += starts[b] - starts[a]
                messages.append(
                    Message(
                        sends,
                        reduces,
                        transfer.peer,
                        starts[a],
                        starts[b],
                        len(streams),
                        sequences[key],
                        slot,
                        len(need),
                        early,
                    )
                )
                unblocks.append([])
                for earlier in need:
                    unblocks[earlier].append(index)
                for c in range(a, b):
                    if sends:
                        readers[c].append(index)
                    else:
                        writer[c] = index
                        readers[c] = []
                stream.append(index)
            streams.append(tuple(stream))

    return Program(
        tuple(messages),
        tuple(tuple(u) for u in unblocks),
        tuple(streams),
        tuple(sorted({m.slot for m in messages if m.slot >= 0})),
        slot_values,
        values_sent,
    )
