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
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bitring.collectives.runtime.mailbox import Message
from bitring.errors import MismatchError, NonFiniteError
from bitring.training.lbfgs import Accept, Combine, Command, Evaluate, Forget, History, Measure, iteration
from bitring.training.portions import Portions
from bitring.training.shard import parts_for
from bitring.training.sum_tree import Node, SumTree

HELD = 2
"""So many portions a replica has: one that it computes, and the next."""


ERRORS = NonFiniteError, MismatchError
"""What may end a step on all ranks."""


class Kind(enum.IntEnum):
    """What a message says. Serial: an evaluation's number, a step's in READY and OVER."""

    # a replica to the coordinator
    READY = 0  # it makes a step: of so many portions, and the digest of its data
    DONE = 1  # a portion, its loss times its share of the samples, the seconds it took
    GIVES_UP = 2  # it computes no more in this step
    FINISHED = 17  # it makes no more calls
    HERE = 19  # it has come to a call that waits for all
    # the coordinator to a replica
    WORK = 3  # a portion
    COUNTS = 4  # a portion's result is the first
    LATE = 5  # it is not
    SEND = 6  # all portions are there: send what is left to the shards
    OVER = 7  # the step is: an error's number or 0, the loss, whose point the parameters are, evaluations; as READY
    CLOSE = 18  # everybody has finished: say farewell
    ALL_HERE = 20  # the call may go on; or -1 and the ranks that make no more calls
    # the coordinator to a shard
    EVALUATE = 8  # at this step along the direction
    MEASURE = 9
    COMBINE = 10  # the coefficients
    ACCEPT = 11
    ACCEPT_AND_KEEP = 12
    FORGET = 13
    # a shard to the coordinator
    ANSWER = 14  # products, for each of the shard's nodes
    # a shard to a replica
    POINT = 15  # the shard's values of the parameters to evaluate
    # a replica to a shard
    GRADIENT = 16  # a node of the tree of portions: level and number; the shard's values of its gradient


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
    """``nodes``: those of every rank's shard, in which it answers. ``backups``: whether to hand out copies."""

    def __init__(self, history: History, nodes: Sequence[Sequence[Node]], backups: bool, post: Post) -> None:
        self.history = history
        self.steps = 0  # that are over
        self.evaluation = 0
        self.batch: tuple[float, ...] | None = None  # the digest of the last step's, whose gradient the shards have
        self.records: deque[PortionRecord] = deque(maxlen=1 << 16)
        self._nodes = nodes
        self._backups = backups
        self._post = post
        self._ranks = range(len(nodes))
        self._run: Generator[Command, Any, float] | None = None
        self._data: tuple[float, ...] = ()  # the portions' number, and the digest, of the step under way
        self._ready: dict[int, None] = {}  # replicas that compute in it
        self._portions = Portions(0, 1, False)
        self._losses = SumTree(1)
        self._answers = SumTree(1)
        self._asked = False  # the shards
        self._evaluating = False  # replicas, too
        self._point = 0  # the evaluation whose point are the parameters
        self._finished: set[int] = set()
        self._here: set[int] = set()

    @property
    def awaited(self) -> set[int]:
        """The ranks that the step under way waits for."""
        if self._run is None:
            return set(self._ranks) - self._here - self._finished
        return self._portions.holders() if not self._portions.finished else set(self._ranks) if self._asked else set()

    def hear(self, message: Message) -> None:
        """Act on a message from a replica or a shard."""
        source, kind, serial, numbers, _ = message
        if kind == Kind.READY:
            self._begin(source, serial, tuple(numbers))
        elif kind == Kind.GIVES_UP:
            self._ready.pop(source, None)
            self._portions.leave(source)
            for replica in self._ready:
                self._hand(replica)
        elif kind == Kind.DONE:
            self._done(source, serial, *numbers)
        elif kind == Kind.FINISHED:
            self._finished.add(source)
            self._gather()
            if len(self._finished) == len(self._ranks):
                for rank in self._ranks:
                    self._post(rank, Kind.CLOSE, 0, (), None)
        elif kind == Kind.HERE:
            self._here.add(source)
            self._gather()
        elif kind == Kind.ANSWER and self._asked and serial == self.evaluation:
            nodes = self._nodes[source]
            for node, values in zip(nodes, np.reshape(numbers, (len(nodes), -1)), strict=True):
                self._answers.add(node, values.copy())
            self._go_on_when_answered()

    def _gather(self) -> None:
        """Let the ranks go on that are in a call which waits for all, when all are; or when some never will be."""
        if self._here and len(self._here | self._finished) == len(self._ranks):
            numbers = [-1, *sorted(self._finished)] if self._finished else [0]
            here, self._here = self._here, set()
            for rank in here:
                self._post(rank, Kind.ALL_HERE, 0, numbers, None)

    def _begin(self, replica: int, step: int, data: tuple[float, ...]) -> None:
        """Let the replica take part in the step, if it is not over."""
        if step <= self.steps:
            return
        if self._run is None:
            self._data = data
            self._ready = {replica: None}
            self._run = iteration(self.history, new_batch=data != self.batch)
            self.batch = None  # until the step is over
            self._advance(None)
            return
        if data != self._data:
            if self._evaluating:  # else the shards are at work; the replica sees it when the step is over
                self._end(math.nan, MismatchError(f"Sandblaster.step: rank {replica} gave other samples than another"))
            return
        self._ready[replica] = None
        self._hand(replica)

    def _hand(self, replica: int) -> None:
        while not self._portions.finished and self._portions.held(replica) < HELD:
            portion = self._portions.next(replica)
            if portion is None:
                return
            self._post(replica, Kind.WORK, self.evaluation, [portion], None)

    def _done(self, replica: int, evaluation: int, portion: float, loss: float, seconds: float) -> None:
        counts = evaluation == self.evaluation and self._portions.done(replica, int(portion))
        now = time.perf_counter()
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
        self._answers = SumTree(parts_for(len(self._nodes)))
        self._asked = True
        if isinstance(command, Evaluate):
            self._evaluating = True
            self._evaluate(command.step)
            count = int(self._data[0])
            self._losses = SumTree(count)
            self._portions = Portions(count, len(self._nodes), self._backups)
            for _ in range(HELD):
                for replica in self._ready:
                    portion = self._portions.next(replica)
                    if portion is not None:
                        self._post(replica, Kind.WORK, self.evaluation, [portion], None)
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
            self._evaluate(0.0)
            self._point = self.evaluation
        self._run = None
        self._ready = {}
        self._asked = self._evaluating = False
        self.steps += 1
        self.batch = None if error is not None else self._data
        kind = 0 if error is None else 1 + ERRORS.index(type(error))
        numbers = [kind, loss, self._point, self.history.evaluations, *self._data]
        payload = np.frombuffer(str(error).encode(), np.uint8) if error is not None else None
        for rank in self._ranks:
            self._post(rank, Kind.OVER, self.steps, numbers, payload)
