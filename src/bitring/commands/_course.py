"""A run of ``bitring train`` under way: how far it is, its checkpoints, and how it goes on from one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from mpi4py import MPI

from bitring.collectives.runtime.objects import allgather
from bitring.commands._due import Due
from bitring.commands._going_on import PreemptedError
from bitring.commands._kept import checkpoint_path, history_of
from bitring.commands._ranks import fail
from bitring.commands._settings import Settings
from bitring.compression.compressor import Compressor
from bitring.exit_codes import ExitCode
from bitring.models.dataset import Data
from bitring.models.model import Model
from bitring.training.batches import Batches
from bitring.training.checkpoints.loading import load_checkpoint
from bitring.training.checkpoints.saving import write_checkpoint
from bitring.training.choice import Choice
from bitring.training.data_parallel import DataParallel
from bitring.training.mode import BaseMode
from bitring.training.optimizer import Optimizer
from bitring.training.preemption import Preemption

EpochMetrics = dict[str, Any]
"""One line of metrics.jsonl.

epoch: from 1 on. train_loss: the mean over the epoch's samples, each as its step found it. test_accuracy.
seconds: of training so far, evaluation left out. samples_per_second: in this epoch, of all ranks.
bytes_sent: so far, the largest over ranks. bytes_exact: what the ring would have sent, exchanging exactly in each step.
digest: of the parameters. telemetry: of the epoch's exchanges, since the run was resumed where that was in its middle.
"""


@dataclass(frozen=True)
class Parts:
    """The objects that the settings stand for."""

    data: Data
    model: Model
    optimizer: Optimizer
    mode: BaseMode
    compression: Compressor | Choice | None
    batches: Batches
    steps: int  # of all epochs
    warmup_steps: int


@dataclass
class Epoch:
    """Progress in an epoch that is not over."""

    steps: int = 0
    seconds: float = 0.0  # rank 0's clock
    loss: float = 0.0  # this rank's, summed over its samples


@dataclass
class Course:
    """A run under way, identical on all ranks but for what is this rank's own.

    ``history``: the records of the epochs that are over; ``epoch``: the one after them; ``sent_before``: payload bytes
    of this rank before its trainer was made; ``saved``: where the last checkpoint was made, in words, None before it.
    """

    settings: Settings
    comm: MPI.Intracomm
    parts: Parts
    trainer: DataParallel
    history: list[EpochMetrics]
    epoch: Epoch
    sent_before: int
    preemption: Preemption
    saved: str | None = None

    def __post_init__(self) -> None:
        self.due = Due(self.settings.checkpoint_every, self.trainer)

    @property
    def place(self) -> str:
        """The place that training has come to, in words."""
        if self.epoch.steps:
            return f"step {self.epoch.steps} of epoch {len(self.history) + 1}"
        return f"epoch {len(self.history)}"

    @property
    def sent(self) -> int:
        """Payload bytes of this rank so far."""
        return self.sent_before + self.trainer.bytes_sent

    def save(self) -> None:
        """Make a checkpoint of now, between two steps, but not inside a block. Collective.

        The run is not changed by it, and going on from it gives the same bits. Ends the command when that fails.
        """
        epoch = self.epoch
        own = allgather(self.comm, (epoch.loss, self.sent), "bitring train")
        extra = {
            "history": self.history,
            "settings": self.settings.of_the_result(),
            "epoch": {"seconds": epoch.seconds, "loss": [loss for loss, _ in own]},
            "bytes_sent": [sent for _, sent in own],
        }
        try:
            write_checkpoint(checkpoint_path(self.settings), self.trainer, extra, keep=self.settings.keep)
        except OSError as error:  # raised on all ranks alike
            fail(self.comm, str(error), status=ExitCode.FAILED)
        self.due.saved()
        self.saved = self.place

    def stop_if_preempted(self) -> None:
        """Save, unless that was done here, and raise PreemptedError where a signal came. Collective.

        A run whose last step is made goes on to its end. In a block, which begins when the signal was heard of in the
        exchange of a checkpoint, it goes on to the block's end.
        """
        if self.preemption.requested and self.trainer.steps < self.parts.steps and not self.trainer.in_a_block:
            if self.saved != self.place:
                self.save()
            text = f"{checkpoint_path(self.settings)} holds all that was trained, up to {self.place}"
            raise PreemptedError(text, resume=True)


def go_on(course: Course, path: Path) -> None:
    """Load the checkpoint. Collective. Raises ValueError when it is of another run."""
    trainer, size = course.trainer, course.comm.size
    extra = load_checkpoint(path, trainer)
    history, done = history_of(path, course.settings, extra, trainer.steps, len(course.parts.batches))
    # What each rank had of its own is the sum, or the most, of all on another number of ranks.
    epoch = extra.get("epoch", {"seconds": 0.0, "loss": [0.0]})
    sent = extra.get("bytes_sent", [record["bytes_sent"] for record in history[-1:]] or [0])
    losses = epoch["loss"] if len(epoch["loss"]) == size else [math.fsum(epoch["loss"])] + [0.0] * (size - 1)
    course.history = history
    course.epoch = Epoch(done, epoch["seconds"], losses[course.comm.rank])
    course.sent_before += sent[course.comm.rank] if len(sent) == size else max(sent)
    course.saved = course.place
    course.due.saved()
    if course.comm.rank == 0 and (done or path != checkpoint_path(course.settings)):
        click.echo(f"{path}: going on after {course.place}")
