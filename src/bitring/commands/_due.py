"""Time of a training run's next checkpoint: the same answer on all ranks, without an exchange of its own."""

from __future__ import annotations

import time

from bitring.commands._units import Interval
from bitring.training.data_parallel import DataParallel

NOTICE = 1
"""The bit of a trainer's notices by which rank 0, whose clock decides, says that it is time."""


class Due:
    """Asked between steps. In modes with blocks it is due at a block's end: saving makes no difference to the run.

    By steps, at the last end before the interval is over: no more steps than that are ever unsaved.
    """

    def __init__(self, every: Interval, trainer: DataParallel) -> None:
        self._every = every
        self._trainer = trainer
        self._block = 1  # steps of the longest block so far
        self._block_from = trainer.steps
        self.saved()

    def saved(self) -> None:
        """There is a checkpoint of now."""
        self._since = time.monotonic()
        self._steps = self._trainer.steps

    def before_step(self) -> None:
        """Let rank 0 tell the others, with the step's record, when it is time."""
        late = self._every.unit == "seconds" and time.monotonic() - self._since >= self._every.number
        if late and self._trainer.rank == 0:
            self._trainer.notices.own |= NOTICE

    def after_step(self) -> bool:
        """Whether a checkpoint is due."""
        if self._trainer.in_a_block:
            return False
        steps = self._trainer.steps
        self._block, self._block_from = max(self._block, steps - self._block_from), steps
        if self._every.unit == "epochs":
            return False
        if self._every.unit == "seconds":
            return bool(self._trainer.notices.everyone & NOTICE)
        return steps > self._steps and steps - self._steps + self._block > self._every.number

    def after_epoch(self, epoch: int) -> bool:
        """The same, when epoch number ``epoch``, from 1, has ended and replicas are equal."""
        return self.after_step() or (self._every.unit == "epochs" and epoch % self._every.number == 0)
