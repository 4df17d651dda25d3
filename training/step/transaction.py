"""A step is a transaction: it is made on all ranks, or it has changed nothing on any.

What a step changes is copied before its first change: parameters, the optimizer's state, the mode's, and what plans
carry from run to run. Once ranks have agreed to exchange they meet again at the end, and where any has failed all copy
back. A rank that fails by itself goes on taking part in what the others wait for, so that they meet there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from mpi4py import MPI

from bitring.collectives.runtime.jointly import common_error
from bitring.errors import NonFiniteError
from bitring.training.step.gradient_exchange import GradientExchange
from bitring.training.step.meeting import WAITED, WRONG, Meeting
from bitring.training.step.undo import Numbers, Undo
from bitring.training.step.waits import Waits

_INTERRUPTED_SECONDS = 2.0
"""An interrupted rank takes part in the rest of an exchange for so long; then it leaves the communicator unusable."""


class UsualEnd(Protocol):
    """What a rank whose part of a step has ended well says at its end.

    ``begun``: whether waits were for exchanges, too.
    """

    begun: bool

    def interrupt(self) -> BaseException | None:
        """What is raised for a Ctrl-C that has been held back until now; None where none came."""
        ...

    def end(self, where: str, waited: float) -> list[float]:
        """How long each rank has waited, where all say this; empty where records must be exchanged."""
        ...


class Transaction:
    """The steps of one trainer, one after the other."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        meeting: Meeting,
        exchange: GradientExchange,
        waits: Waits,
        usual: UsualEnd,
    ) -> None:
        self._comm = comm
        self._meeting = meeting
        self._exchange = exchange
        self._waits = waits
        self._usual = usual
        self.undo = Undo()
        self.came = False
        """Whether this rank has come to a meeting in this step: the others know of it, or are told."""
        self.met = False
        """Whether the ranks have agreed in this step."""
        self.waited = 0.0
        """Seconds that this rank has waited for others in steps whose ends were no meetings."""
        self.ends = True
        """Whether they meet again at its end, where they have agreed."""

    def run(
        self, body: Callable[[], None], numbers: Numbers, end: Callable[[bool], Sequence[float]], where: str
    ) -> None:
        """Call ``body``; raise what it raises, or what another rank's raised, with everything as it was before.

        ``numbers``: of the mode's state. ``end``: this rank's record at the step's end; whether it has failed is given.
        """
        failure: BaseException | None = None
        self.open(numbers)
        try:
            body()
        except BaseException as error:
            failure = error
        try:
            self.close(failure, numbers, end, where)
        finally:
            failure = None  # its traceback holds this frame

    def open(self, numbers: Numbers) -> None:
        """What is changed from here on is taken back where ``close`` finds a failure."""
        self.came = self.met = False
        self.ends = True
        self.undo.clear()
        numbers.save()
        self._exchange.begin()

    def close(
        self,
        failure: BaseException | None,
        numbers: Numbers,
        end: Callable[[bool], Sequence[float]],
        where: str,
    ) -> None:
        """The end: raise this rank's ``failure``, or another's, with everything as it was at ``open``."""
        try:
            if self.met and self.ends:
                failure = self._at_the_end(failure, end, where)
            elif self.met and failure is not None:  # the others have made the step
                self._meeting.cut_short(where, failure)
            elif self.met:
                self.waited += self._meeting.waited
            if failure is not None:
                raise failure
        except BaseException:
            self.undo.restore()
            numbers.restore()
            self._exchange.undo()
            raise
        finally:
            failure = None

    def _at_the_end(
        self, failure: BaseException | None, end: Callable[[bool], Sequence[float]], where: str
    ) -> BaseException | None:
        """The exception for all ranks to raise, if any has failed."""
        if failure is None and self._comm.Get_size() == 1:
            return None
        failure = failure or self._usual.interrupt()
        interrupted = failure is not None and not isinstance(failure, Exception)
        seconds = _INTERRUPTED_SECONDS if interrupted else math.inf
        if (failure is not None and not self._exchange.take_part(seconds)) or self._meeting.broken:
            if self._exchange.under_way and failure is not None:
                self._meeting.cut_short(where, failure)
            return failure
        waited = self.waited + self._meeting.waited
        everyone = [] if failure is not None else self._usual.end(where, waited)
        if not everyone:
            records = self._meeting.exchange(end(failure is not None), where)
            if any(record[WRONG] for record in records):
                return common_error(self._comm, where, failure, alike=(NonFiniteError,))
            everyone = [record[WAITED] for record in records]
        self._waits.add(waited - min(everyone) if self._usual.begun else waited, everyone)
        self.waited = 0.0
        return failure
