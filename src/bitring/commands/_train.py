"""The work of ``bitring train``. Importing this initialises MPI."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from mpi4py import MPI

from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.commands._due import Due
from bitring.commands._going_on import PreemptedError, stop_for_now
from bitring.commands._pictures import draw_curve
from bitring.commands._progress import Progress
from bitring.commands._ranks import ending_together, fail, limit_threads, refuse_if_alone, same_everywhere, together
from bitring.commands._settings import Settings, difference
from bitring.commands._units import traffic
from bitring.compression.compressor import Compressor
from bitring.compression.factors import Factors
from bitring.compression.reducers.sufficient_factors import SufficientFactors
from bitring.errors import NonFiniteError
from bitring.exit_codes import ExitCode
from bitring.machine import versions
from bitring.models.dataset import Data, load
from bitring.models.model import Model, models
from bitring.training.batches import Batches, shard
from bitring.training.checkpoints.file import previous, remove_checkpoints
from bitring.training.checkpoints.loading import load_checkpoint
from bitring.training.checkpoints.saving import write_checkpoint
from bitring.training.data_parallel import DataParallel
from bitring.training.mode import Mode
from bitring.training.optimizer import Optimizer
from bitring.training.preemption import Preemption

Record = dict[str, Any]
"""One line of metrics.jsonl.

epoch: from 1 on. train_loss: the mean over the epoch's samples, each as its step found it. test_accuracy.
seconds: of training so far, evaluation left out. samples_per_second: in this epoch, of all ranks.
bytes_sent: so far, the largest over ranks. bytes_exact: what the ring would have sent, exchanging exactly in each step.
digest: of the parameters. telemetry: of the epoch's exchanges, since the run was resumed where that was in its middle.
"""


WARMUP_SHARE = 64
"""One step in so many, the first ones, is exact: gradients are large there and change fast, and residuals lag."""


@dataclass(frozen=True)
class _Parts:
    """The objects that the settings stand for."""

    data: Data
    model: Model
    optimizer: Optimizer
    mode: Mode
    compression: Compressor | None
    batches: Batches
    steps: int  # of all epochs
    warmup_steps: int


@dataclass
class _Epoch:
    """Progress in an epoch that is not over."""

    steps: int = 0
    seconds: float = 0.0  # rank 0's clock
    loss: float = 0.0  # this rank's, summed over its samples


@dataclass
class _Course:
    """A run under way, alike on all ranks but for what is this rank's own.

    ``history``: the records of the epochs that are over; ``epoch``: the one after them; ``sent_before``: payload bytes
    of this rank before its trainer was made; ``saved``: where the last checkpoint was made, in words, None before it.
    """

    settings: Settings
    comm: MPI.Intracomm
    parts: _Parts
    trainer: DataParallel
    history: list[Record]
    epoch: _Epoch
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
            write_checkpoint(_checkpoint(self.settings), self.trainer, extra, keep=self.settings.keep)
        except OSError as error:  # raised on all ranks alike
            fail(self.comm, str(error), status=ExitCode.FAILED)
        self.due.saved()
        self.saved = self.place

    def stop_if_preempted(self) -> None:
        """Save, unless that was done here, and raise PreemptedError where a signal came. Collective.

        A run whose last step is made goes on to its end.
        """
        if self.preemption.requested and self.trainer.steps < self.parts.steps:
            if self.saved != self.place:
                self.save()
            text = f"{_checkpoint(self.settings)} holds all that was trained, up to {self.place}"
            raise PreemptedError(text, resume=True)


def run(settings: Settings) -> None:
    """Train as ``settings`` say, on MPI.COMM_WORLD. Collective."""
    refuse_if_alone()
    comm = MPI.COMM_WORLD
    courses: list[_Course] = []
    with ending_together(comm), Preemption(comm) as preemption:
        try:
            _run(settings, comm, courses, preemption)
        except PreemptedError as preempted:
            stop_for_now(comm, preempted)
        except NonFiniteError as error:  # raised on all ranks alike
            fail(comm, f"{error}; a smaller --lr may help", status=ExitCode.FAILED)
        except KeyboardInterrupt:
            if comm.rank == 0:
                click.echo(f"\ninterrupted{_left(settings, courses)}", err=True)
            raise


def _left(settings: Settings, courses: list[_Course]) -> str:
    """The words for what an interrupted run leaves to go on from."""
    if courses and courses[0].saved is not None:
        return f"; --resume goes on after {courses[0].saved}"
    return _as_it_was(settings) or " before the first checkpoint"


def _as_it_was(settings: Settings) -> str:
    return "; the checkpoint is as it was" if settings.resume and _found(settings) is not None else ""


def _run(settings: Settings, comm: MPI.Intracomm, courses: list[_Course], preemption: Preemption) -> None:
    """See ``run``; the course is put into ``courses`` when there is one."""
    parts = together(comm, lambda: _prepare(settings, comm))
    _stop_before_training(settings, preemption)
    limit_threads(comm)
    trainer = together(
        comm,
        lambda: DataParallel(
            parts.model.parameters,
            parts.optimizer,
            comm=comm,
            mode=parts.mode,
            compression=parts.compression,
            algorithm=settings.algorithm,
            warmup_steps=parts.warmup_steps,
        ),
    )
    course = together(comm, lambda: _begin(settings, comm, parts, trainer, preemption))
    courses.append(course)
    if trainer.steps < parts.steps:
        _stop_before_training(settings, preemption)
    elif comm.rank == 0 and len(course.history) >= settings.epochs:
        click.echo(f"{_checkpoint(settings)} has {_epochs(len(course.history))}: there is nothing left to train")
    _train(course)
    if comm.rank == 0:
        _conclude(course)


def _stop_before_training(settings: Settings, preemption: Preemption) -> None:
    """Raise PreemptedError where a signal came. Collective."""
    if preemption.requested:
        kept = _as_it_was(settings)
        raise PreemptedError(f"nothing more was trained{kept}" if kept else "nothing was trained yet", settings.resume)


def _prepare(settings: Settings, comm: MPI.Intracomm) -> _Parts:
    settings.check()
    optimizer, mode, compression = settings.make_optimizer(), settings.make_mode(), settings.make_compression()
    model = models.get(settings.model)
    if comm.rank == 0:
        _make_writable(settings.output)
        if not (settings.resume or settings.fresh) and (path := _found(settings)) is not None:
            raise ValueError(f"{path} is there, of another run: --resume goes on from it, --fresh deletes it")
    data = load(settings.data, settings.data_directory)
    made = model(data.input_shape, data.classes, seed=settings.seed)
    batches = Batches(data.x_train, data.y_train, settings.batch)
    steps = len(batches) * settings.epochs
    warmup_steps = settings.warmup_steps
    if warmup_steps is None:
        warmup_steps = 0 if compression is None else steps // WARMUP_SHARE
    return _Parts(data, made, optimizer, mode, compression, batches, steps, warmup_steps)


def _make_writable(folder: Path) -> None:
    """Raise OSError unless files can be written to ``folder``, which is made if need be."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise type(error)(f"--output {folder} cannot be written: {error.strerror}") from error


def _checkpoint(settings: Settings) -> Path:
    return settings.output / "checkpoint.npz"


def _found(settings: Settings) -> Path | None:
    """The last checkpoint that is there; the one before it where a run has ended while it put the last in its place."""
    path = _checkpoint(settings)
    return next((each for each in (path, previous(path)) if each.exists()), None)


def _begin(
    settings: Settings, comm: MPI.Intracomm, parts: _Parts, trainer: DataParallel, preemption: Preemption
) -> _Course:
    """The run from its beginning, or from the checkpoint, which the trainer then goes on from. Collective."""
    course = _Course(settings, comm, parts, trainer, [], _Epoch(), -trainer.bytes_sent, preemption)
    path = broadcast(comm, _found(settings) if settings.resume and comm.rank == 0 else None, "bitring train")
    if path is not None:
        _go_on(course, path)
    elif settings.resume and comm.rank == 0:
        click.echo(f"{_checkpoint(settings)} is not there: starting from the beginning")
    if comm.rank == 0:
        for name in ("summary.json", "curve.png"):
            (settings.output / name).unlink(missing_ok=True)
        if path is None:
            remove_checkpoints(_checkpoint(settings))
        _write(settings.output / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in course.history))
    return course


def _go_on(course: _Course, path: Path) -> None:
    """Load the checkpoint. Collective. Raises ValueError when it is of another run."""
    trainer, size = course.trainer, course.comm.size
    extra = load_checkpoint(path, trainer)
    history, settings = extra.get("history"), extra.get("settings")
    if not isinstance(history, list) or not isinstance(settings, dict):
        raise ValueError(f"--resume: {path} was not made by bitring train")
    differs = difference(settings, course.settings.of_the_result())
    if differs is not None:
        option, *values = differs
        made, given = ("its default" if x is None else x for x in values)
        raise ValueError(f"--resume: the checkpoint was made with --{option.replace('_', '-')} {made}; got {given}")
    each = len(course.parts.batches)
    done = trainer.steps - each * len(history)
    if not 0 <= done <= each:
        raise ValueError(
            f"--resume: the checkpoint is of {_epochs(len(history))} and {trainer.steps} steps; "
            f"the data given now make {each} steps an epoch"
        )
    # What each rank had of its own is the sum, or the most, of all on another number of ranks.
    epoch = extra.get("epoch", {"seconds": 0.0, "loss": [0.0]})
    sent = extra.get("bytes_sent", [record["bytes_sent"] for record in history[-1:]] or [0])
    losses = epoch["loss"] if len(epoch["loss"]) == size else [math.fsum(epoch["loss"])] + [0.0] * (size - 1)
    course.history = history
    course.epoch = _Epoch(done, epoch["seconds"], losses[course.comm.rank])
    course.sent_before += sent[course.comm.rank] if len(sent) == size else max(sent)
    course.saved = course.place
    course.due.saved()
    if course.comm.rank == 0 and (done or path != _checkpoint(course.settings)):
        click.echo(f"{path}: going on after {course.place}")


def _train(course: _Course) -> None:
    """Make the steps that are missing. Collective."""
    settings, comm, trainer = course.settings, course.comm, course.trainer
    done, batches = len(course.history), course.parts.batches
    progress = Progress(done, settings.epochs, len(batches), course.epoch.steps) if comm.rank == 0 else None
    # Training that diverges is the trainer's to report, once.
    with progress or contextlib.nullcontext(), np.errstate(over="ignore", invalid="ignore"):
        for epoch in range(done + 1, settings.epochs + 1):
            _steps(course, progress)
            trainer.synchronize()
            due = course.due.after_epoch(epoch) or epoch == settings.epochs
            _end_epoch(course, progress)
            if due:
                course.save()
            course.stop_if_preempted()


def _steps(course: _Course, progress: Progress | None) -> None:
    """Make those that are missing in the epoch. Collective."""
    parts, trainer, epoch = course.parts, course.trainer, course.epoch
    number = len(course.history) + 1
    optimizer: Any = parts.optimizer
    product = Factors if isinstance(parts.compression, SufficientFactors) else None
    allgather(course.comm, None, "bitring train")  # the clock begins when all are there
    begin = time.perf_counter() - epoch.seconds
    for x, y in shard(parts.batches, course.comm, seed=course.settings.seed, epoch=number, start=epoch.steps):
        loss, gradients = parts.model.loss_and_gradients(x, y, product=product)
        # Falls to 0 along a straight line, and the noise of batches and of one bit with it.
        trainer.optimizer = dataclasses.replace(optimizer, lr=optimizer.lr * (1 - trainer.steps / parts.steps))
        course.due.before_step()
        trainer.step(gradients, weight=len(x))
        epoch.steps += 1
        epoch.loss += loss * len(x)
        if progress is not None:
            progress.step(number, loss)
        epoch.seconds = time.perf_counter() - begin
        course.stop_if_preempted()
        if course.due.after_step() and epoch.steps < len(parts.batches):
            course.save()
            begin = time.perf_counter() - epoch.seconds
    epoch.seconds = time.perf_counter() - begin


def _end_epoch(course: _Course, progress: Progress | None) -> None:
    """Append the epoch's record, and begin another. Collective; the replicas are equal."""
    comm, trainer, data = course.comm, course.trainer, course.parts.data
    number = len(course.history) + 1
    digest = trainer.digest()
    same_everywhere(comm, f"after epoch {number} the parameters", digest)
    # Rank 0's clock counts: a run that is resumed must have one history.
    sums = allgather(comm, (course.epoch.loss, course.sent, course.epoch.seconds), "bitring train")
    took = sums[0][2]
    nbytes = sum(array.nbytes for array in course.parts.model.parameters.values())
    exact = 2 * (comm.size - 1) * nbytes * len(course.parts.batches) // comm.size  # an epoch
    record = {
        "epoch": number,
        "train_loss": sum(loss for loss, _, _ in sums) / len(data.y_train),
        "test_accuracy": _accuracy(comm, course.parts.model, data),
        "seconds": took + (course.history[-1]["seconds"] if course.history else 0.0),
        "samples_per_second": len(data.y_train) / took,
        "bytes_sent": max(sent for _, sent, _ in sums),
        "bytes_exact": exact * number,
        "digest": digest,
        "telemetry": {name: x if x is None or math.isfinite(x) else None for name, x in trainer.telemetry().items()},
    }
    course.history.append(record)
    course.epoch = _Epoch()
    if progress is not None:
        progress.epoch(record)
        with (course.settings.output / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _accuracy(comm: MPI.Intracomm, model: Model, data: Data) -> float:
    """On the test samples, each rank looking at its part. Collective."""
    n = len(data.y_test)
    part = slice(n * comm.rank // comm.size, n * (comm.rank + 1) // comm.size)
    right = round(model.accuracy(data.x_test[part], data.y_test[part]) * (part.stop - part.start))
    return float(sum(allgather(comm, right, "bitring train")) / n)


def _conclude(course: _Course) -> None:
    """Write the summary, draw the curve, and say how it went. Rank 0 alone."""
    settings, comm, parts, history = course.settings, course.comm, course.parts, course.history
    last = history[-1]
    optimizer: Any = parts.optimizer
    summary = {
        **{name: last[name] for name in ("test_accuracy", "train_loss", "seconds", "samples_per_second", "bytes_sent")},
        "samples_per_second": round(_mean_speed(history), 3),
        "bytes_exact": last["bytes_exact"],
        "digest": last["digest"],
        "ranks": comm.size,
        "epochs": len(history),
        **settings.of_the_result(),
        **dataclasses.asdict(optimizer),
        "warmup_steps": parts.warmup_steps,
        "algorithms": sorted(set(course.trainer.algorithms)),
        "versions": versions(),
    }
    _write(settings.output / "summary.json", json.dumps(summary, indent=2) + "\n")
    click.echo(f"test accuracy  {last['test_accuracy']:.4f} after {_epochs(len(history))}, {last['seconds']:.1f} s")
    click.echo(f"bytes sent     {_traffic(comm, last)}")
    curve = settings.output / "curve.png"
    title = f"{settings.model} on {settings.data}, {comm.size} rank{'s' * (comm.size != 1)}, {settings.mode}"
    title += f", {'exact' if settings.compression == 'none' else settings.compression}"
    try:
        draw_curve(history, curve, title)
    except ImportError as error:
        click.echo(f"curve          not drawn: {error}")
    else:
        click.echo(f"curve          {curve}")


def _epochs(number: int) -> str:
    return f"{number} epoch{'s' * (number != 1)}"


def _mean_speed(history: list[Record]) -> float:
    """Samples per second over all epochs."""
    return float(len(history) / sum(1 / record["samples_per_second"] for record in history))


def _traffic(comm: MPI.Intracomm, last: Mapping[str, Any]) -> str:
    if comm.size == 1:
        return "none, there is one rank"
    sent, exact = last["bytes_sent"], last["bytes_exact"]
    ratio = f"1/{exact / sent:.1f} of it" if sent else "nothing"
    return f"{traffic(sent)} a rank; an exact exchange in each step sends {traffic(exact)}: {ratio}"


def _write(path: Path, text: str) -> None:
    """All or nothing."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
