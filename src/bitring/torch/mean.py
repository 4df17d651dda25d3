"""The weighted mean of tensors over all ranks, in one call or in two: all done, or nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mpi4py import MPI

from bitring.collectives.communicator import Communicator
from bitring.collectives.runtime.jointly import common_error
from bitring.errors import NonFiniteError
from bitring.torch.bucket import Entry
from bitring.torch.exchange import Exchange
from bitring.torch.meeting import WEIGHT, WRONG, Meeting
from bitring.torch.residuals import Kept, give, take
from bitring.torch.tensors import all_finite
from bitring.training.step.meeting import total_weight


class Mean:
    """The mean over ranks of tensors like ``entries``; ``function`` is what errors name. Collective."""

    def __init__(
        self, comm: Communicator, entries: Sequence[Entry], bucket_bytes: int, function: str, meeting: Meeting
    ) -> None:
        self._comm = comm
        self._function = function
        self._meeting = meeting
        self.exchange = Exchange(comm, entries, "auto", bucket_bytes)
        self._failure: BaseException | None = None
        self.views: dict[str, Any] = {
            name: view
            for bucket in self.exchange.buckets
            for name, view in zip(bucket.names, bucket.views, strict=True)
        }
        """The means, by name, after ``finish``."""

    def begin(self, tensors: Mapping[str, Any], weight: float, steps: int, problem: Exception | None = None) -> bool:
        """Begin the mean of ``tensors``, of ``weight`` on this rank. Collective; whether any rank has weight.

        Raises on all ranks, with nothing changed: ``problem``, and NonFiniteError where a tensor holds NaN or Inf.
        """
        where = f"{self._function} (step {steps})"
        self._where, self._steps = where, steps
        if problem is None and weight:
            bad = next((name for name, tensor in tensors.items() if not all_finite([tensor])), None)
            if bad is not None:
                rank = self._comm.Get_rank()
                problem = NonFiniteError(f"{where}: what is exchanged for {bad!r} on rank {rank} holds NaN or Inf")
        records = self._meeting.exchange((0.0, steps, 0.0, 1.0, problem is not None, weight, 0.0), where)
        if any(record[WRONG] for record in records):
            error = common_error(self._comm, where, problem, alike=(NonFiniteError,))
            assert error is not None
            raise error
        total = total_weight((record[WEIGHT] for record in records), where)
        if not total:
            return False
        self._failure = None
        self.exchange.begin()
        try:
            for bucket in self.exchange.buckets:
                self.exchange.load([tensors[name] for name in bucket.names], weight / total, start=True)
        except BaseException as error:
            self._failure = error
        return True

    def finish(self) -> None:
        """Wait for the mean that was begun; raises on all ranks, with residuals as before, what went wrong on any."""
        failure = self._failure
        try:
            if failure is None:
                self.exchange.finish()
        except BaseException as error:
            failure = error
        if failure is not None and not self._meeting.broken:
            self.exchange.take_part(math.inf)
        if not self._meeting.broken:
            records = self._meeting.exchange((1.0, self._steps, 0.0, 1.0, failure is not None, 0.0, 0.0), self._where)
            if any(record[WRONG] for record in records):
                failure = common_error(self._comm, self._where, failure, alike=(NonFiniteError,))
        if failure is not None:
            self.exchange.undo()
            raise failure

    def of(self, tensors: Mapping[str, Any], weight: float, steps: int, problem: Exception | None = None) -> bool:
        """``begin`` and ``finish``."""
        there = self.begin(tensors, weight, steps, problem)
        if there:
            self.finish()
        return there

    def take(self) -> Kept:
        """What compressed exchanges carry. Collective."""
        return take(self._comm, self.exchange)

    def give(self, kept: Kept) -> None:
        """Go on with what ``take`` returned."""
        give(self.exchange, kept)

    def free(self) -> None:
        """Free plans and memory."""
        self.exchange.free()


def new_meeting(comm: MPI.Intracomm, function: str) -> tuple[Communicator, Meeting]:
    """A communicator of its own, and a meeting on it. Collective."""
    own = Communicator(comm).Dup()
    return own, Meeting(own, function)
