"""Sandblaster's coordinator, on rank 0: it sees numbers and no vector, and says what everybody does next.

It runs L-BFGS's iteration (``lbfgs.iteration``): each command goes to all shards; for an evaluation it hands portions
to replicas as well. Serial numbers count evaluations; a result that carries another than the present one is late, and
does not count. Nothing here communicates: ``hear`` is told messages, and what is to be sent goes to ``post``.
"""

from __future__ import annotations

import enum
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bitring.collectives.runtime.mailbox import Message
from bitring.errors import MismatchError, NonFiniteError
from bitring.training.cut import Cut
from bitring.training.lbfgs import NUMBERS, Accept, Combine, Command, Evaluate, Forget, History, Measure, iteration
from bitring.training.portions import Portions
from bitring.training.sum_tree import SumTree

HELD = 2
"""So many portions a replica has: one that it computes, and the next."""

_LATE = 0.5
"""By so much of the time for a portion a replica may be late with one."""

_LOOK_SECONDS = 1e-3

ERRORS = NonFiniteError, MismatchError
"""What may end a step on all ranks."""


class Kind(enum.IntEnum):
    """What a message says. Serial: an evaluation's number, a step's in READY and OVER."""

    # a replica to the coordinator
    READY = 0  # it makes a step: of so many portions, and the digest of its data
    DONE = 1  # a portion, its loss times its share of the samples, the seconds it took
    GIVES_UP = 2  # it computes no more in this step
    FINISHED = 17  # it makes no more calls
    HERE = 19  # it has come to where all meet. Serial: the meeting's number; numbers: see ``Service.meet``
    AWAY = 29  # it has left again, interrupted
    # the coordinator to a replica
    WORK = 3  # a portion
    COUNTS = 4  # a portion's result is the first
    LATE = 5  # it is not
    SEND = 6  # all portions are there: send what is left to the shards
    OVER = 7  # the step is: see ``Ended``
    CLOSE = 18  # everybody has finished: say farewell
    ALL_HERE = 20  # the call may go on; or the ranks that make no more calls
    # the coordinator to a shard
    EVALUATE = 8  # at this step along the direction
    MEASURE = 9
    COMBINE = 10  # the coefficients
    ACCEPT = 11
    ACCEPT_AND_KEEP = 12
    FORGET = 13
    # a shard to the coordinator
    ANSWER = 14  # products, for each of the shard's nodes
    # a shard to the rank that has its copy
    COPY = 21  # the step, the pairs before, whether there is a new one, and whether it moved; products; the changes
    # the rank that has a shard's copy to the coordinator
    KEPT = 22  # that shard's answer, when the copy has changed as it has
    # after a death, between those that are left: see ``survivors``
    REPORT = 23
    MOVE = 24
    ROWS = 25
    MOVED = 26
    RESUME = 27
    LOST = 28
    # a shard to a replica
    POINT = 15  # the shard's values of the parameters to evaluate
    # a replica to a shard
    GRADIENT = 16  # a node of the tree of portions: level and number; the shard's values of its gradient


TO_COORDINATOR = frozenset(
    {Kind.READY, Kind.DONE, Kind.GIVES_UP, Kind.ANSWER, Kind.KEPT, Kind.FINISHED, Kind.HERE, Kind.AWAY}
)


class Ended(NamedTuple):
    """A step that is over: what all ranks know of it.

    error: 1 + its place in ``ERRORS``, with its ``text``, or 0. loss: at the new parameters. point: the evaluation that
    was of these. history: its ``lbfgs.NUMBERS``. data: the number of portions, and the digest of their samples; none
    before the first step.
    """

    step: int
    error: int
    loss: float
    point: int
    history: tuple[float, ...]
    data: tuple[float, ...]
    text: bytes = b""

    @classmethod
    def of(cls, step: int, numbers: Iterable[float], text: Any) -> Ended:
        """Of a message's parts."""
        error, loss, point, *rest = map(float, numbers)
        k = len(NUMBERS)
        return cls(step, int(error), loss, int(point), tuple(rest[:k]), tuple(rest[k:]), bytes(text))

    @property
    def numbers(self) -> list[float]:
        """For a message."""
        return [self.error, self.loss, self.point, *self.history, *self.data]


class PortionRecord(NamedTuple):
    """What became of a portion: which replica had it, from when to when (seconds), and whether it was the first."""

    step: int
    evaluation: int
    portion: int
    replica: int
    begin: float
    end: float
    counts: bool


Post = Callable[[int, Kind, int, Sequence[float], Any], None]
"""Send to a rank: kind, serial, numbers, payload."""


class Coordinator:
    """``cut``: of the vectors. ``ended``: the last step. ``backups``: whether to hand out copies of portions."""

    def __init__(self, history: History, cut: Cut, ended: Ended, backups: bool, post: Post) -> None:
        self.history = history
        self.steps = ended.step  # that are over
        self.evaluation = ended.point
        self.batch = (ended.data or None) if not ended.error else None  # whose gradient the shards have: its digest
        self.records: deque[PortionRecord] = deque(maxlen=1 << 16)
        self._cut = cut
        self._nodes = {rank: cut.nodes(rank) for rank in cut.members}
        self._backups = backups
        self._post = post
        self._ranks = cut.members
        self._run: Generator[Command, Any, float] | None = None
        self._data: tuple[float, ...] = ()  # the portions' number, and the digest, of the step under way
        self._ready: dict[int, None] = {}  # replicas that compute in it
        self._given_up: dict[int, tuple[float, ...]] = {}  # those that have raised in it, and what they begin anew
        self._portions = Portions(0, 1, False)
        self._losses = SumTree(1)
        self._answers = SumTree(1)
        self._asked = False  # the shards
        self._evaluating = False  # replicas, too
        self._point = ended.point  # the evaluation whose point are the parameters
        self._paces: dict[int, float] = {}  # seconds that a replica takes for a portion
        self._since: dict[int, float] = {}  # when a replica began what it computes
        self._looked = 0.0  # when, whether a copy is of use by now
        self._finished: set[int] = set()
        self._here: dict[int, int] = {}  # ranks -> the number of the meeting that they have come to

    @property
    def awaited(self) -> set[int]:
        """The ranks that the step under way waits for."""
        if self._run is None:
            return set(self._ranks) - self._here.keys() - self._finished
        return self._portions.holders() if not self._portions.finished else set(self._ranks) if self._asked else set()

    def hear(self, message: Message) -> None:
        """Act on a message from a replica or a shard."""
        source, kind, serial, numbers, _ = message
        if kind == Kind.READY:
            self._begin(source, serial, tuple(numbers))
        elif kind == Kind.GIVES_UP:
            self._ready.pop(source, None)
            self._portions.leave(source)
            self._given_up[source] = ()
            for replica in self._ready:
                self._hand(replica)
            if self._evaluating and not self._ready:
                self._begin_anew()
        elif kind == Kind.DONE:
            self._done(source, serial, *numbers)
        elif kind == Kind.FINISHED:
            self._finished.add(source)
            self._gather()
            if len(self._finished) == len(self._ranks):
                for rank in self._ranks:
                    self._post(rank, Kind.CLOSE, 0, (), None)
        elif kind == Kind.HERE:
            self._here[source] = serial
            self._gather()
        elif kind == Kind.AWAY:
            self._here.pop(source, None)
        elif self._asked and serial == self.evaluation:
            owner = source if kind == Kind.ANSWER else self._cut.kept_by(source)
            assert owner is not None
            nodes = self._nodes[owner]
            for node, values in zip(nodes, np.reshape(numbers, (len(nodes), -1)), strict=True):
                self._answers.add(node, values.copy())
            self._go_on_when_answered()

    def _gather(self) -> None:
        """Let the ranks go on that are in a call which waits for all, when all are; or when some never will be."""
        if self._here and len(self._here.keys() | self._finished) == len(self._ranks):
            here, self._here = self._here, {}
            for rank, meeting in here.items():
                self._post(rank, Kind.ALL_HERE, meeting, sorted(self._finished), None)

    def _begin(self, replica: int, step: int, data: tuple[float, ...]) -> None:
        """Let the replica take part in the step, if it is not over."""
        if step <= self.steps:
            return
        if self._evaluating and not self._ready and data != self._data:
            self._run = None  # all have given up: it is another step now, from the same parameters
        if self._run is None:
            self._data = data
            self._ready = {replica: None}
            self._given_up.pop(replica, None)
            self._run = iteration(self.history, new_batch=data != self.batch)
            self.batch = None  # until the step is over
            self._advance(None)
            return
        if data != self._data:
            if replica in self._given_up:  # the others may do so, too, or end the step, which it then hears of
                self._given_up[replica] = data
            elif self._evaluating:  # else the shards are at work; the replica sees it when the step is over
                self._end(math.nan, MismatchError(f"Sandblaster.step: rank {replica} gave other samples than another"))
            return
        self._given_up.pop(replica, None)
        self._ready[replica] = None
        self._hand(replica)

    def _begin_anew(self) -> None:
        """All have given the step up: those that wait to begin it with other samples do."""
        waiting = {replica: data for replica, data in self._given_up.items() if data}
        self._given_up = dict.fromkeys(self._given_up, ())
        for replica, data in waiting.items():
            self._begin(replica, self.steps + 1, data)

    def _hand(self, replica: int) -> None:
        while not self._portions.finished and self._portions.held(replica) < HELD and self._hand_one(replica):
            pass

    def _hand_one(self, replica: int) -> bool:
        """Hand the replica a portion. Returns whether there was one for it."""
        now = time.perf_counter()
        if not self._portions.held(replica):
            self._since[replica] = now
        portion = self._portions.next(replica, lambda portion: self._helps(portion, replica, now))
        if portion is not None:
            self._post(replica, Kind.WORK, self.evaluation, [portion], None)
        return portion is not None

    def _helps(self, portion: int, replica: int, now: float) -> bool:
        """Whether the replica would have the portion done before those that have it; or they are late with it."""
        pace = self._paces.get(replica)
        places = self._portions.places(portion)
        if pace is None or any(holder not in self._paces for holder, _ in places):
            return True
        own = self._since[replica] + (self._portions.held(replica) + 1) * pace
        ends = [(self._since[holder] + (ahead + 1) * self._paces[holder], holder) for holder, ahead in places]
        return all(own < end or now > end + _LATE * self._paces[holder] for end, holder in ends)

    def look_again(self) -> None:
        """To be called now and then: those who have portions may be late with them by now."""
        now = time.perf_counter()
        if now - self._looked > _LOOK_SECONDS and self._evaluating and not self._portions.finished:
            self._looked = now
            idle = [replica for replica in self._ready if not self._portions.held(replica)]
            for replica in sorted(idle, key=lambda each: self._paces.get(each, 0.0)):
                if not self._hand_one(replica):
                    return  # nor is it of use by a slower one

    def _done(self, replica: int, evaluation: int, portion: float, loss: float, seconds: float) -> None:
        counts = evaluation == self.evaluation and self._portions.done(replica, int(portion))
        now = self._since[replica] = time.perf_counter()
        self._paces[replica] = (self._paces.get(replica, seconds) + seconds) / 2
        self.records.append(
            PortionRecord(self.steps + 1, evaluation, int(portion), replica, now - seconds, now, counts)
        )
        self._post(replica, Kind.COUNTS if counts else Kind.LATE, evaluation, [portion], None)
        if counts:
            self._losses.add((0, int(portion)), loss)
            if self._portions.finished:
                for rank in self._ranks:
                    self._post(rank, Kind.SEND, evaluation, [], None)
                self._go_on_when_answered()
                return
        if replica in self._ready:
            self._hand(replica)

    def _go_on_when_answered(self) -> None:
        if not (self._asked and self._answers.complete and self._portions.finished):
            return
        self._asked = False
        answer = self._answers.total
        if self._evaluating:
            self._evaluating = False
            answer = float(self._losses.total), float(answer[0])
        self._advance(answer)

    def _advance(self, answer: Any) -> None:
        """Run the iteration to its next command that the shards answer, or to its end."""
        assert self._run is not None
        try:
            while True:
                command = self._run.send(answer)
                answer = None
                if isinstance(command, Combine):
                    self._tell_shards(Kind.COMBINE, command.coefficients)
                elif isinstance(command, Forget):
                    self._tell_shards(Kind.FORGET)
                else:
                    self._ask(command)
                    return
        except StopIteration as end:
            self._end(end.value, None)
        except NonFiniteError as error:
            self._end(math.nan, error)

    def _ask(self, command: Evaluate | Measure | Accept) -> None:
        self._answers = SumTree(self._cut.parts)
        self._asked = True
        if isinstance(command, Evaluate):
            self._evaluating = True
            self._evaluate(command.step)
            count = int(self._data[0])
            self._losses = SumTree(count)
            self._portions = Portions(count, len(self._ranks), self._backups)
            for _ in range(HELD):
                for replica in self._ready:
                    self._hand_one(replica)
        elif isinstance(command, Measure):
            self._point = self.evaluation
            self._tell_shards(Kind.MEASURE)
        else:
            self._point = self.evaluation
            self._tell_shards(Kind.ACCEPT_AND_KEEP if command.keep else Kind.ACCEPT)

    def _evaluate(self, step: float) -> None:
        self.evaluation += 1
        self._tell_shards(Kind.EVALUATE, [step])

    def _tell_shards(self, kind: Kind, numbers: Any = ()) -> None:
        for rank in self._ranks:
            self._post(rank, kind, self.evaluation, numbers, None)

    def _end(self, loss: float, error: Exception | None) -> None:
        """End the step, well or by an error that all ranks raise."""
        if self._point != self.evaluation:  # replicas have a point that was not accepted
            self.show_point()
        self._run = None
        self._ready, self._given_up = {}, {}
        self._asked = self._evaluating = False
        self.steps += 1
        self.batch = None if error is not None else self._data
        kind = 0 if error is None else 1 + ERRORS.index(type(error))
        text = b"" if error is None else str(error).encode()
        ended = Ended(self.steps, kind, loss, self._point, self.history.numbers, self._data, text)
        for rank in self._ranks:
            self._post(rank, Kind.OVER, self.steps, ended.numbers, np.frombuffer(text, np.uint8))

    def show_point(self) -> None:
        """Give the parameters to all replicas, anew."""
        self._evaluate(0.0)
        self._point = self.evaluation
