"""Bits that ranks tell each other in the record that they exchange anyway, and signals that came to any."""

from __future__ import annotations

from mpi4py import MPI

from bitring.training.preemption import NOTICE, watching
from bitring.training.step.meeting import TOLD, Records


class Notices:
    """``own``: what this rank tells when ranks meet next. ``everyone``: what any told in the last step, or 0."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self.own = 0
        self.everyone = 0

    def to_tell(self) -> int:
        """The bits for the record: a signal that came to this rank among them."""
        for preemption in watching(self._comm):
            if preemption.noted:
                return self.own | NOTICE
        return self.own

    def hear(self, records: Records, told: int) -> None:
        """Ranks have met, and this one told these bits."""
        self.own &= ~told
        self.everyone = 0
        for record in records:
            self.everyone |= int(record[TOLD])
        for preemption in watching(self._comm):
            preemption.learn(bool(self.everyone & NOTICE))

    def step_is_made(self) -> None:
        """Whoever asks for the answer of a preemption next gets that of this step."""
        for preemption in watching(self._comm):
            preemption.answer_is_new = True
