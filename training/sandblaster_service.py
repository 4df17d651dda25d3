"""What a rank does for Sandblaster beside its computing: a job that goes on from the start to ``free``.

It carries messages (``mailbox``), does what the shard is told, adds up the gradients of the portions that count, and on
rank 0 runs the coordinator. The thread that computes leaves word in ``outbox`` and looks at what is here; the job runs
on the progress thread, or in that thread while it waits. So a rank that computes, or sleeps, keeps nobody waiting.

When a rank has died those that are left take its shard over (``survivors``), and the step under way is made again.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.interop.library_steps import comm_of
from bitring.collectives.interop.steps import Progress, Steps, StepsTo
from bitring.collectives.runtime.context import Context
from bitring.collectives.runtime.mailbox import Mailbox, Message
from bitring.collectives.runtime.watch import are
from bitring.errors import DeadRankError
from bitring.training.coordinator import TO_COORDINATOR, Coordinator, Ended, Kind
from bitring.training.cut import Cut, Holding
from bitring.training.lbfgs import History
from bitring.training.shard import parts_for
from bitring.training.sum_tree import SumTree
from bitring.training.survivors import KINDS, Survivors

_SEND_EVERY = 8
"""After so many portions that count a replica sends their gradients."""

_IDLE_TURNS = 50
_NAP_SECONDS = 3e-4
_SILENT_SECONDS = 1.0
_STILL_THERE_SECONDS = 10.0


class Service:
    """One rank's part. ``comm``: the ranks of ``context``, a private one. ``whole``: the parameters, 1-D.

    ``memory``, ``backups``, ``survives``: see ``bitring.Sandblaster``.
    """

    def __init__(
        self, context: Context, comm: MPI.Intracomm, whole: Any, memory: int, backups: bool, survives: bool
    ) -> None:
        self.place: tuple[int, MPI.Intracomm] | None = (0, comm)
        """How many ranks have died, and those that are left; None while this is made."""
        self.ended = Ended(0, 0, math.nan, 0, History(memory).numbers, ())
        cut = Cut(tuple(range(context.size)), whole.size, parts_for(context.size), copies=survives)
        self.held = Holding.of(0, cut, context.rank, whole, memory)
        self.outbox: deque[tuple[Any, ...]] = deque()  # what the computing thread has to say
        self.awaiting = False  # the computing thread waits for something that comes here
        self.assigned: deque[tuple[int, int]] = deque()  # (evaluation, portion) to compute
        self.point: tuple[int, Any] = (0, None)  # the parameters that arrived last, whole, and their evaluation
        self.over: dict[int, Ended] = {}  # steps
        self.shown = (0, 0)  # since a death: the evaluation that was of the parameters after a step, and that step
        self.meetings = 0  # of all ranks that are left, so far
        self.finished: list[int] = []  # ranks that have ended, for which a meeting is in vain
        self.latest = 0  # evaluation that was heard of
        self._context = context
        self._dtype = whole.dtype
        self.rank = context.rank
        self._memory, self._backups, self.survives = memory, backups, survives
        self._mailbox = Mailbox(context.comm)
        self._survivors: Survivors | None = None  # while they find out where they are
        self._deferred: list[Message] = []  # until then
        self._making: StepsTo[MPI.Intracomm] | None = None  # of ``place``
        self._said: dict[Kind, tuple[int, Any]] = {}  # to the coordinator, which has not answered: serials, numbers
        self._arriving: dict[int, tuple[Any, set[int]]] = {}  # evaluation -> parameters, and the shards still missing
        self._computed: dict[tuple[int, int], Any] = {}  # gradients of portions of which is not known if they count
        self._sums = SumTree(1)  # gradients that count, not sent yet
        self._unsent = 0
        self._portions = 1
        self._gradients: SumTree | None = None  # what has come for this shard
        self._evaluation = 0  # the shard's
        self.coordinator: Coordinator | None = None
        if self.rank == 0:
            self.coordinator = Coordinator(History(memory), cut, self.ended, backups, self._mailbox.send)

    def has_work(self, evaluation: int) -> bool:
        """Whether the next portion to compute is of this evaluation. For the computing thread."""
        with contextlib.suppress(IndexError):
            while self.assigned[0][0] < self.latest:
                self._take(self.latest)
            return self.assigned[0][0] == evaluation
        return False

    def take_portion(self, evaluation: int) -> int | None:
        """The next portion, if it is of this evaluation. For the computing thread."""
        with contextlib.suppress(IndexError):
            if self.assigned[0][0] == evaluation:
                return self._take(evaluation + 1)
        return None

    def _take(self, before: int) -> int | None:
        """Take the next portion away, if it is of an evaluation before this one."""
        taken = self.assigned.popleft()
        if taken[0] < before:
            return taken[1]
        self.assigned.appendleft(taken)  # the job has put it in the place of what was looked at
        return None

    @property
    def nbytes_sent(self) -> int:
        """To other ranks, so far."""
        return self._mailbox.nbytes_sent

    def steps(self, progress: Progress) -> Steps:
        """The job's."""
        progress.exchanging = True  # an error in it is everybody's
        if self.survives:
            progress.outlives = self._outlives
        idle, moved_at = 0, time.monotonic()
        while not self._mailbox.over:
            moved = self._listen_to_the_computing_thread()
            era = self._mailbox.era
            messages = self._mailbox.advance()
            if self._mailbox.era > era:
                self._mourn()
                moved = True
            for message in messages:
                if not self._mailbox.parting:
                    self._hear_in_its_time(message, progress)
                moved = True
            if self._mailbox.parting:  # so all have come to their end, and who should say so may have died
                self._mailbox.close()
            self._make_comm()
            if self.coordinator is not None:
                self.coordinator.look_again()
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
                progress.peers = frozenset(self._awaited() - {self.rank})
            yield
        progress.exchanging = False

    def _awaited(self) -> set[int]:
        if self._survivors is not None:
            return self._survivors.awaited
        if self.coordinator is not None:
            return self.coordinator.awaited
        return {self._leader}

    @property
    def _leader(self) -> int:
        """The rank that has the coordinator."""
        return self.held.cut.members[0]

    def _listen_to_the_computing_thread(self) -> bool:
        moved = False
        while self.outbox and self._survivors is None:
            kind, serial, numbers, gradient = self.outbox.popleft()
            moved = True
            if kind == Kind.HERE and numbers not in ((), (self._mailbox.era,)):
                continue  # what it has done there is to be done again
            if kind in (Kind.READY, Kind.HERE, Kind.FINISHED):
                self._said[kind] = serial, numbers
            elif kind in (Kind.GIVES_UP, Kind.AWAY):
                self._said.pop(Kind.READY if kind == Kind.GIVES_UP else Kind.HERE, None)
            if kind == Kind.READY:
                self._portions = int(numbers[0])
                if not (self._sums.nodes or self._computed):  # else it has raised, and makes the step again
                    self._sums = SumTree(self._portions)
            elif kind == Kind.DONE and serial == self.latest:
                self._computed[serial, int(numbers[0])] = gradient
            self._mailbox.send(self._leader, kind, serial, numbers)
        return moved

    def _outlives(self, gone: Sequence[int]) -> bool:
        """Go on without these ranks."""
        before = self._mailbox.era
        self._mailbox.bury(gone)
        if self._mailbox.era > before:
            self._mourn()
        return True

    def _mourn(self) -> None:
        """Leave what is under way, and find out with the others that are left where to go on."""
        if self._mailbox.parting:
            return
        self.latest = max(self.latest, self._evaluation)
        self._evaluation, self._gradients = 0, None
        self.assigned.clear()
        self._computed.clear()
        self._sums, self._unsent = SumTree(self._portions), 0
        self._arriving.clear()
        self._deferred.clear()
        self.coordinator = self.place = self._making = None
        if self._said.get(Kind.HERE, (0, ()))[1]:
            del self._said[Kind.HERE]
        before, spare = self._survivors, None
        if before is not None:
            self.held, spare = before.held, before.new or before.spare
        self._survivors = Survivors(
            self.rank,
            self._mailbox.dead,
            self.held,
            spare,
            self.ended,
            self.latest,
            self.meetings,
            self._memory,
            self._mailbox.send,
        )

    def _hear_in_its_time(self, message: Message, progress: Progress) -> None:
        """Act on a message; on those of the steps when the survivors know where they are."""
        survivors = self._survivors
        if survivors is None:
            self._hear(message)
        elif message.kind not in KINDS:
            self._deferred.append(message)
        elif message.kind == Kind.LOST:
            self._context.queue.loses(survivors.dead)
            text = f"Sandblaster: {are(survivors.dead)} gone, and with them a shard and its copy"
            raise DeadRankError(text, survivors.dead)
        else:
            survivors.hear(message)
            if survivors.over:
                self._go_on(survivors, progress)

    def _go_on(self, survivors: Survivors, progress: Progress) -> None:
        """Make the step again that a death has ended, among those that are left."""
        assert survivors.new is not None
        self._survivors, self.held = None, survivors.new
        if survivors.ended.step > self.ended.step:
            self._end(survivors.ended)
        if survivors.meetings > self.meetings:
            self.meetings = survivors.meetings
            self._said.pop(Kind.HERE, None)
        self._turn_to(survivors.evaluation + 1)
        self.shown = self.latest, self.ended.step
        members = self.held.cut.members
        self._making = comm_of(members, self._context.comm, self.held.era, progress)
        if survivors.history is not None:
            survivors.say(self.ended.step + 1)
            ended = self.ended._replace(point=survivors.evaluation)
            self.coordinator = Coordinator(survivors.history, self.held.cut, ended, self._backups, self._mailbox.send)
            self.coordinator.show_point()
        for kind, (serial, numbers) in self._said.items():
            self._mailbox.send(self._leader, kind, serial, numbers)
        for message in self._deferred:
            self._hear(message)
        self._deferred.clear()

    def _make_comm(self) -> None:
        if self._making is not None:
            try:
                next(self._making)
            except StopIteration as made:
                self.place, self._making = (self.held.era, made.value), None

    def _end(self, ended: Ended) -> None:
        """Note that a step is over."""
        self.ended = self.over[ended.step] = ended
        if ended.step >= self._said.get(Kind.READY, (math.inf, ()))[0]:
            del self._said[Kind.READY]

    def _hear(self, message: Message) -> None:
        """Act on a message."""
        source, kind, serial, numbers, payload = message
        if kind in TO_COORDINATOR:
            assert self.coordinator is not None
            self.coordinator.hear(message)
        elif kind == Kind.WORK:
            self._turn_to(serial)
            self.assigned.append((serial, int(numbers[0])))
        elif kind in (Kind.COUNTS, Kind.LATE):
            gradient = self._computed.pop((serial, int(numbers[0])), None)
            if kind == Kind.COUNTS and gradient is not None:  # else an error has ended that evaluation
                self._sums.add((0, int(numbers[0])), gradient)
                self._unsent += 1
                if self._unsent == _SEND_EVERY:
                    self._send_gradients()
        elif kind == Kind.SEND:
            if serial == self.latest:
                self.assigned.clear()
                self._send_gradients()
        elif kind == Kind.OVER:
            self._end(Ended.of(serial, numbers, payload))
        elif kind == Kind.POINT:
            self._gather(source, serial, payload)
        elif kind == Kind.GRADIENT:
            if serial == self._evaluation:  # else of a step that an error has ended
                level, number, portions = map(int, numbers)
                self._add(level, number, portions, payload.view(self._dtype))
        elif kind == Kind.COPY:
            self._change_the_copy(serial, numbers, payload)
        elif kind == Kind.ALL_HERE:
            self._said.pop(Kind.HERE, None)
            self.finished = [int(rank) for rank in numbers]
            if not self.finished:
                self.meetings = serial
        elif kind == Kind.CLOSE:
            self._mailbox.close()
        else:
            self._command(Kind(kind), serial, numbers)

    def _command(self, kind: Kind, evaluation: int, numbers: Any) -> None:
        """Do what the shard is told."""
        shard = self.held.shard
        if kind == Kind.EVALUATE:
            self._evaluation, self._gradients = evaluation, None
            values = shard.point(numbers[0]).astype(self._dtype)
            for rank in self._in_turn():
                self._mailbox.send(rank, Kind.POINT, evaluation, (), values)
            return
        if kind == Kind.COMBINE:
            shard.combine(numbers)
            return
        step, pairs = self.ended.step + 1, len(shard.s)
        shard.open(step)
        if kind == Kind.FORGET:
            shard.forget()
            return
        keep, moved = kind == Kind.ACCEPT_AND_KEEP, kind != Kind.MEASURE
        products = shard.accept(keep) if moved else shard.measure()
        keeper = self.held.cut.keeper(self.rank)
        if keeper is None:
            self._answer(products)
        else:  # the answer goes by the rank that has the copy, so it is there when the copy has changed
            numbers = [step, pairs, keep, moved, *products.ravel()]
            self._mailbox.send(keeper, Kind.COPY, evaluation, numbers, shard.changes(moved))

    def _change_the_copy(self, evaluation: int, numbers: Any, payload: Any) -> None:
        """Do as the shard has done of which this rank has the copy."""
        copy = self.held.copy
        assert copy is not None
        step, pairs, keep, moved = map(int, numbers[:4])
        *s, gradient = (np.array(row) for row in payload.view(np.float64).reshape(1 + moved, -1))
        copy.open(step)
        copy.follow(s[0] if moved else None, gradient, pairs, bool(keep))
        self._mailbox.send(self._leader, Kind.KEPT, evaluation, numbers[4:])

    def _in_turn(self) -> list[int]:
        """All ranks, beginning with this one: not all send to the same one first."""
        members = self.held.cut.members
        at = members.index(self.rank)
        return [*members[at:], *members[:at]]

    def _add(self, level: int, number: int, portions: int, gradient: Any) -> None:
        """Take a node of the sum of ``portions`` gradients, this shard's values of it."""
        if self._gradients is None:
            self._gradients = SumTree(portions)
        self._gradients.add((level, number), gradient)
        if self._gradients.complete:
            self._answer(self.held.shard.slope(self._gradients.total))

    def _answer(self, products: Any) -> None:
        self._mailbox.send(self._leader, Kind.ANSWER, self._evaluation, products.ravel())

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
            cut = self.held.cut
            self._arriving[evaluation] = np.empty(cut.size, self._dtype), set(cut.members)
        whole, missing = self._arriving[evaluation]
        whole[self.held.cut.at(source)] = payload.view(self._dtype)
        missing.remove(source)
        if not missing:
            del self._arriving[evaluation]
            self.point = evaluation, whole

    def _send_gradients(self) -> None:
        """Send the sums of the portions that count to the shards, each its values."""
        for (level, number), gradient in self._sums.nodes.items():
            for rank in self._in_turn():
                node = level, number, self._sums.leaves
                self._mailbox.send(rank, Kind.GRADIENT, self.latest, node, gradient[self.held.cut.at(rank)])
        self._sums, self._unsent = SumTree(self._portions), 0
