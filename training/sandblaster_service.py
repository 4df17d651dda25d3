"""What a rank does for Sandblaster beside its computing: a job that goes on from the start to ``free``.

It carries messages (``mailbox``), does what the shard is told, adds up the gradients of the portions that count, and on
rank 0 runs the coordinator. The thread that computes leaves word in ``outbox`` and looks at what is here; the job runs
on the progress thread, or in that thread while it waits. So a rank that computes, or sleeps, keeps nobody waiting.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

import numpy as np

from bitring.collectives.interop.steps import Progress, Steps
from bitring.collectives.runtime.context import Context
from bitring.collectives.runtime.mailbox import Mailbox, Message
from bitring.training.coordinator import Coordinator, Kind
from bitring.training.lbfgs import History
from bitring.training.shard import Shard, held_by
from bitring.training.sum_tree import SumTree

_SEND_EVERY = 8
"""After so many portions that count a replica sends their gradients."""

_IDLE_TURNS = 50
_NAP_SECONDS = 3e-4
_SILENT_SECONDS = 1.0
_STILL_THERE_SECONDS = 10.0


class Service:
    """One rank's part. ``size`` values of ``dtype`` the replicas have; ``backups``: see ``bitring.Sandblaster``."""

    def __init__(self, context: Context, shard: Shard, size: int, dtype: Any, memory: int, backups: bool) -> None:
        self.shard = shard
        self.outbox: deque[tuple[Any, ...]] = deque()  # what the computing thread has to say
        self.awaiting = False  # the computing thread waits for something that comes here
        self.assigned: deque[tuple[int, int]] = deque()  # (evaluation, portion) to compute
        self.point: tuple[int, Any] = (0, None)  # the parameters that arrived last, whole, and their evaluation
        self.over: dict[int, Message] = {}  # steps
        self.all_here: list[int] | None = None  # 0: all ranks have come to the call; -1: all but these, who have ended
        self.latest = 0  # evaluation that was heard of
        self._dtype = np.dtype(dtype)
        self._size = size
        self._rank, self._ranks = context.rank, context.size
        self._cuts = [held_by(rank, self._ranks, size) for rank in range(self._ranks)]
        self._mailbox = Mailbox(context.comm)
        self._arriving: dict[int, tuple[Any, set[int]]] = {}  # evaluation -> parameters, and the shards still missing
        self._computed: dict[tuple[int, int], Any] = {}  # gradients of portions of which is not known if they count
        self._sums = SumTree(1)  # gradients that count, not sent yet
        self._unsent = 0
        self._portions = 1
        self._gradients: SumTree | None = None  # what has come for this shard
        self._evaluation = 0  # the shard's
        self.coordinator: Coordinator | None = None
        if self._rank == 0:
            # Every rank derives the cut from its number: nothing need be exchanged for it.
            nodes = [Shard(np.empty(0), 0, rank, self._ranks, 0).nodes for rank in range(self._ranks)]
            self.coordinator = Coordinator(History(memory), nodes, backups, self._mailbox.send)

    @property
    def nbytes_sent(self) -> int:
        """To other ranks, so far."""
        return self._mailbox.nbytes_sent

    def steps(self, progress: Progress) -> Steps:
        """The job's."""
        progress.exchanging = True  # an error in it is everybody's
        idle, moved_at = 0, time.monotonic()
        while not self._mailbox.over:
            moved = self._listen_to_the_computing_thread()
            for message in self._mailbox.advance():
                self._hear(message)
                moved = True
            now = time.monotonic()
            if moved:
                idle = 0
            elif not self.awaiting:
                idle += 1
                if idle > _IDLE_TURNS and threading.current_thread() is not threading.main_thread():
                    time.sleep(_NAP_SECONDS)  # the core may be wanted
            if moved or (not self.awaiting and now - moved_at > _STILL_THERE_SECONDS):
                progress.moves += 1
                moved_at = now
            if now - moved_at > _SILENT_SECONDS:
                progress.peers = frozenset(self._awaited() - {self._rank})
            yield
        progress.exchanging = False

    def _awaited(self) -> set[int]:
        if self.coordinator is not None:
            return self.coordinator.awaited
        return {0}

    def _listen_to_the_computing_thread(self) -> bool:
        moved = False
        while self.outbox:
            kind, serial, numbers, gradient = self.outbox.popleft()
            moved = True
            if kind == Kind.READY:
                self._portions = int(numbers[0])
                self._sums = SumTree(self._portions)
            elif kind == Kind.DONE and serial == self.latest:
                self._computed[serial, int(numbers[0])] = gradient
            self._mailbox.send(0, kind, serial, numbers)
        return moved

    def _hear(self, message: Message) -> None:
        """Act on a message."""
        source, kind, serial, numbers, payload = message
        if kind in (Kind.READY, Kind.DONE, Kind.GIVES_UP, Kind.ANSWER, Kind.FINISHED, Kind.HERE):
            assert self.coordinator is not None
            self.coordinator.hear(message)
        elif kind == Kind.WORK:
            self._turn_to(serial)
            self.assigned.append((serial, int(numbers[0])))
        elif kind in (Kind.COUNTS, Kind.LATE):
            gradient = self._computed.pop((serial, int(numbers[0])), None)
            if kind == Kind.COUNTS:
                assert gradient is not None and serial == self.latest
                self._sums.add((0, int(numbers[0])), gradient)
                self._unsent += 1
                if self._unsent == _SEND_EVERY:
                    self._send_gradients()
        elif kind == Kind.SEND:
            if serial == self.latest:
                self.assigned.clear()
                self._send_gradients()
        elif kind == Kind.OVER:
            self.over[serial] = message
        elif kind == Kind.POINT:
            self._gather(source, serial, payload)
        elif kind == Kind.GRADIENT:
            if serial == self._evaluation:  # else of a step that an error has ended
                level, number, portions = map(int, numbers)
                self._add(level, number, portions, payload.view(self._dtype))
        elif kind == Kind.ALL_HERE:
            self.all_here = [int(number) for number in numbers]
        elif kind == Kind.CLOSE:
            self._mailbox.close()
        else:
            self._command(Kind(kind), serial, numbers)

    def _command(self, kind: Kind, evaluation: int, numbers: Any) -> None:
        """Do what the shard is told."""
        if kind == Kind.EVALUATE:
            self._evaluation, self._gradients = evaluation, None
            values = self.shard.point(numbers[0]).astype(self._dtype)
            for distance in range(self._ranks):  # not all to the same rank first
                self._mailbox.send((self._rank + distance) % self._ranks, Kind.POINT, evaluation, (), values)
        elif kind == Kind.COMBINE:
            self.shard.combine(numbers)
        elif kind == Kind.FORGET:
            self.shard.forget()
        elif kind == Kind.MEASURE:
            self._answer(self.shard.measure())
        else:
            self._answer(self.shard.accept(kind == Kind.ACCEPT_AND_KEEP))

    def _add(self, level: int, number: int, portions: int, gradient: Any) -> None:
        """Take a node of the sum of ``portions`` gradients, this shard's values of it."""
        if self._gradients is None:
            self._gradients = SumTree(portions)
        self._gradients.add((level, number), gradient)
        if self._gradients.complete:
            self._answer(self.shard.slope(self._gradients.total))

    def _answer(self, products: Any) -> None:
        self._mailbox.send(0, Kind.ANSWER, self._evaluation, products.ravel())

    def _turn_to(self, evaluation: int) -> None:
        """Leave what belongs to an earlier evaluation."""
        if evaluation > self.latest:
            self.latest = evaluation
            self.assigned.clear()
            self._computed.clear()
            self._sums, self._unsent = SumTree(self._portions), 0
            self._arriving = {number: each for number, each in self._arriving.items() if number >= evaluation}

    def _gather(self, source: int, evaluation: int, payload: Any) -> None:
        """Put the parameters together, of which a shard has sent its values."""
        self._turn_to(evaluation)
        if evaluation < self.latest:
            return
        if evaluation not in self._arriving:
            self._arriving[evaluation] = np.empty(self._size, self._dtype), set(range(self._ranks))
        whole, missing = self._arriving[evaluation]
        whole[self._cuts[source]] = payload.view(self._dtype)
        missing.remove(source)
        if not missing:
            del self._arriving[evaluation]
            self.point = evaluation, whole

    def _send_gradients(self) -> None:
        """Send the sums of the portions that count to the shards, each its values."""
        for (level, number), gradient in self._sums.nodes.items():
            for distance in range(self._ranks):
                rank, node = (self._rank + distance) % self._ranks, (level, number, self._portions)
                self._mailbox.send(rank, Kind.GRADIENT, self.latest, node, gradient[self._cuts[rank]])
        self._sums, self._unsent = SumTree(self._portions), 0
