"""The portable executor: runs a program over mpi4py's point-to-point calls. The reference for every other executor.

Receives are posted early, sums are made in the order the schedule fixes, whatever order messages arrive in, and the
operands of each reduction are ordered by rank, so that two ranks that reduce the same pair get the same bits.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from mpi4py import MPI

from bitring.arrays import Event
from bitring.collectives.interop.steps import Progress, Steps
from bitring.collectives.runtime.ports import ports
from bitring.collectives.schedules.program import WINDOW

if TYPE_CHECKING:
    from bitring.collectives.execution.transport import Transport


def execute(transport: Transport, progress: Progress) -> Steps:
    """Run the transport's program once on its buffer; yields whenever there is nothing to do but wait."""
    program = transport.program
    messages, unblocks, streams = program.messages, program.unblocks, program.streams
    waits = [m.waits for m in messages]
    unfinished = len(messages)
    position = [0] * len(streams)  # per stream: its next message that has not begun
    under_way = [0] * len(streams)
    in_order = [k for k, stream in enumerate(streams) if not messages[stream[0]].sends]
    turn = 0  # the streams in_order[:turn] have begun all their receives
    busy: set[int] = set()  # slots in use
    wanting: dict[int, set[int]] = {}  # slot -> streams whose next message is received there
    arrived: set[int] = set()  # received into scratch, waiting for their turn to be taken over
    requests: list[MPI.Request] = []
    request_of: list[int] = []  # the message of each request
    held: deque[int] = deque()  # messages to be sent when what has come is read; they must not overtake each other
    events: list[tuple[Event, int, bool]] = []  # the message, and whether it begins then, or ends

    def may_begin(index: int) -> bool:
        m = messages[index]
        free = waits[index] == 0
        if m.sends or (m.early and free):
            return free
        in_turn = turn == len(in_order) or m.stream <= in_order[turn]
        return in_turn and (free or m.slot >= 0)

    def start(index: int) -> None:
        """Hand a message to the library. Nothing is sent while there is unread news: its receiver may be dead."""
        if messages[index].sends and (held or ports().unread()):
            held.append(index)
            return
        requests.append(transport.begin(index))
        request_of.append(index)

    def begin(stream: int) -> None:
        """Begin as many of the stream's messages as may begin now, and of the streams that this lets in."""
        nonlocal turn
        todo = [stream]
        while todo:
            stream = todo.pop()
            while position[stream] < len(streams[stream]) and under_way[stream] < WINDOW:
                index = streams[stream][position[stream]]
                m = messages[index]
                if not may_begin(index):
                    break
                if m.slot >= 0:
                    if m.slot in busy:
                        wanting.setdefault(m.slot, set()).add(stream)
                        break
                    busy.add(m.slot)
                position[stream] += 1
                under_way[stream] += 1
                event = transport.prepare(index)
                if event is None:
                    start(index)
                else:
                    events.append((event, index, True))
            before = turn
            while turn < len(in_order) and position[in_order[turn]] == len(streams[in_order[turn]]):
                turn += 1
            if before < turn < len(in_order):
                todo.append(in_order[turn])

    def finish(index: int) -> None:
        """End a message: free its memory, and go on with the messages that waited for it."""
        nonlocal unfinished
        done = [index]
        while done:
            index = done.pop()
            m = messages[index]
            transport.release(index)
            unfinished -= 1
            under_way[m.stream] -= 1
            if m.slot >= 0:
                busy.discard(m.slot)
                for stream in sorted(wanting.pop(m.slot, ())):
                    begin(stream)
            for later in unblocks[index]:
                waits[later] -= 1
                if waits[later] == 0:
                    if later not in arrived:
                        begin(messages[later].stream)
                    elif apply(later):
                        done.append(later)
            begin(m.stream)

    def apply(index: int) -> bool:
        """Reduce or copy what was received. Returns whether it is done: a device's work ends with an event."""
        event = transport.apply(index)
        if event is not None:
            events.append((event, index, False))
        return event is None

    progress.exchanging = True
    for stream in range(len(streams)):
        begin(stream)
    while unfinished:
        waiting_to_be_sent = list(held)
        held.clear()
        for index in waiting_to_be_sent:
            start(index)
        completed = MPI.Request.Testsome(requests) if requests else None
        landed = [request_of[k] for k in completed or ()]
        for k in sorted(completed or (), reverse=True):
            requests[k], request_of[k] = requests[-1], request_of[-1]
            requests.pop()
            request_of.pop()
        for index in landed:
            if messages[index].sends:
                finish(index)
            elif waits[index]:
                arrived.add(index)
            elif apply(index):
                finish(index)
        reached: list[tuple[int, bool]] = []
        if events:
            waiting, events = events, []
            for event, index, begins in waiting:
                if event.done:
                    reached.append((index, begins))
                else:
                    events.append((event, index, begins))
        for index, begins in reached:
            if begins:
                start(index)
            else:
                finish(index)
        if landed or reached:
            progress.moves += 1
        else:
            progress.peers = frozenset(messages[index].peer for index in request_of)
            yield
    progress.exchanging = False
