"""Meetings of the ranks of an averager: a small record of each, exchanged before gradients are, and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.plan import plan_exact
from bitring.collectives.runtime.context import context_of
from bitring.errors import MismatchError

ENDS, STEPS, SETTINGS, SCALE, WRONG, WEIGHT, ABSENT = range(7)
"""A record: whether the step is at its end, the steps made, a hash of the settings, the loss scale,
whether something is wrong, the weight, and a hash of the names of the parameters without gradient, 0 for none."""

_PLACE = slice(ENDS, STEPS + 1)
_ALIKE = slice(ENDS, SCALE + 1)
_WIDTH = ABSENT + 1

Records = list[list[float]]
"""Of all ranks, in rank order."""


class Meeting:
    """The exchange of records on ``comm``, for one object only; ``function`` is its name in errors. Collective.

    ``exchange`` does it at once; ``post`` begins it, and ``collect`` ends it.
    """

    def __init__(self, comm: MPI.Intracomm, function: str) -> None:
        self._function = function
        self._context = context_of(comm)
        self._records = np.zeros((self._context.size, _WIDTH))
        self._plan = plan_exact(self._records, comm, MPI.SUM, "auto", function)
        self.posted = False
        """Whether there is something to collect."""

    @property
    def broken(self) -> bool:
        """Whether the communicator cannot be used any more."""
        return bool(self._context.queue.broken)

    def cut_short(self, what: str, error: BaseException) -> None:
        """Make the communicator unusable, since others exchange what this rank has given up; they are told."""
        self._context.queue.cut_short(what, error)

    def post(self, record: Sequence[float], where: str) -> None:
        """Begin to exchange records; it goes on beside the caller."""
        self._write(record, where)
        self._plan.start()
        self.posted = True

    def collect(self) -> Records:
        """The records of all ranks, once they are there. Raises as ``exchange`` does."""
        try:
            self._plan.wait()
        except Exception:
            self.posted = False
            raise
        self.posted = False
        return self._read()

    def exchange(self, record: Sequence[float], where: str) -> Records:
        """The records of all ranks. Raises MismatchError on all, unless they are at the same place, set alike."""
        self._write(record, where)
        self._plan()
        return self._read()

    def free(self) -> None:
        """Free the plan."""
        self._plan.free()

    def _write(self, record: Sequence[float], where: str) -> None:
        self._records[...] = 0.0
        self._records[self._context.rank] = record
        self._plan.what = where

    def _read(self) -> Records:
        records: Records = self._records.tolist()
        first = records[0][_ALIKE]
        if all(record[_ALIKE] == first for record in records):
            return records
        raise MismatchError(f"{self._function}: ranks do not do the same: {_odd_one_out(records)}")


def _odd_one_out(records: Records) -> str:
    """Say which rank is elsewhere than most, or has other settings."""
    for part, words in (
        (_PLACE, "at another call, or has made another number of steps"),
        (slice(SETTINGS, SETTINGS + 1), "with other parameters that require gradients"),
        (slice(SCALE, SCALE + 1), "at another loss scale"),
    ):
        asked: list[Any] = [tuple(record[part]) for record in records]
        usual = Counter(asked).most_common(1)[0][0]
        odd = next((rank for rank, one in enumerate(asked) if one != usual), None)
        if odd is not None:
            detail = f"{asked[odd][-1]:g} instead of {usual[-1]:g}" if part != slice(SETTINGS, SETTINGS + 1) else ""
            return f"rank {odd} is {words} than rank {asked.index(usual)}" + (f" ({detail})" if detail else "")
    return "their records differ"
