"""Calls of Sandblaster that wait for all ranks, any of which may die in the middle.

All ranks meet, exchange something, and meet again to hear that all have done so. Where one dies before that, those that
are left exchange anew. Meetings have numbers, and one that any rank has heard of has been for all of them: after a
death they tell each other (``survivors``). So a call ends on all ranks or on none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mpi4py import MPI

from bitring.errors import DeadRankError, PeerError
from bitring.training.coordinator import Kind
from bitring.training.sandblaster_service import Service

T = TypeVar("T")


class JointCalls:
    """One rank's. ``until``: waits for something that the service brings; raises what has ended it."""

    def __init__(self, service: Service, until: Callable[[Callable[[], bool]], None]) -> None:
        self._service, self._until = service, until
        self._second: tuple[int, int | None] = (0, None)  # the last meeting after an exchange, and the era of that

    def place(self) -> tuple[int, MPI.Intracomm]:
        """How many ranks have died, and a communicator of those that are left."""
        while (place := self._service.place) is None:
            self._until(lambda: self._service.place is not None)
        return place

    def together(self, function: str, exchange: Callable[[MPI.Intracomm], T]) -> T:
        """What ``exchange`` returns, or raises, on a communicator of those that are left."""
        self._until(lambda: self._is_over(*self._second))  # it may have been interrupted there
        self._meet(function, None)
        while True:
            era, comm = self.place()
            results: list[T] = []
            errors: list[Exception] = []
            try:
                results.append(exchange(comm))
            except DeadRankError as lost:
                if not self._service.survives:
                    raise
                lost.with_traceback(None)  # what was cut short is kept for ever, but not all callers' variables
                self._until(lambda: self._is_past(era))  # noqa: B023
                continue
            except PeerError:
                raise  # all hear of it
            except Exception as error:
                errors.append(error)
            if not self._service.survives or self._meet(function, era):
                break
        if errors:
            raise errors[0]
        return results[0]

    def _meet(self, function: str, era: int | None) -> bool:
        """Wait until all ranks have come here: none is in a step from then on.

        ``era``: of what was exchanged; returns whether all have exchanged it, and False where a rank has died instead.
        """
        service = self._service
        service.finished = []
        number = service.meetings + 1
        service.outbox.append((Kind.HERE, number, () if era is None else (era,), None))
        if era is not None:
            self._second = number, era
        try:
            self._until(lambda: self._is_over(number, era))
        except KeyboardInterrupt:
            if era is None:
                service.outbox.append((Kind.AWAY, number, (), None))
            raise
        if service.finished:
            raise RuntimeError(f"Sandblaster.{function}: ranks {service.finished} have freed it, or have ended")
        return service.meetings >= number

    def _is_over(self, number: int, era: int | None) -> bool:
        service = self._service
        return service.meetings >= number or bool(service.finished) or self._is_past(era)

    def _is_past(self, era: int | None) -> bool:
        """Whether those that are left after further deaths have found out where they are."""
        place = self._service.place
        return era is not None and place is not None and place[0] != era
