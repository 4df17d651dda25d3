"""The work of ``bitring train``. Importing this initialises MPI."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import math
import time
from typing import Any

import click
import numpy as np
from mpi4py import MPI

from bitring.collectives.communicator import Communicator
from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.commands import _device
from bitring.commands._course import Course, Epoch, Parts, go_on
from bitring.commands._folder import make_writable
from bitring.commands._going_on import PreemptedError, end_with_the_status, stop_for_now
from bitring.commands._kept import checkpoint_path, last_checkpoint, require_said
from bitring.commands._progress import Progress
from bitring.commands._ranks import (
    ending_together,
    fail,
    limit_threads,
    meet,
    refuse_if_alone,
    same_everywhere,
    together,
)
from bitring.commands._results import append_metrics, begin_metrics, conclude
from bitring.commands._settings import Settings
from bitring.commands._units import count
from bitring.compression.factors import Factors
from bitring.errors import NonFiniteError
from bitring.exit_codes import ExitCode
from bitring.models.dataset import Data, load
from bitring.models.model import Model, models
from bitring.training.batches import Batches, shard
from bitring.training.checkpoints.file import remove_checkpoints
from bitring.training.data_parallel import DataParallel
from bitring.training.mode import FreeMode
from bitring.training.preemption import Preemption

WARMUP_SHARE = 64
"""One step in so many, the first ones, is exact: gradients are large there and change fast, and residuals lag."""


def run(settings: Settings) -> None:
    """Train as ``settings`` say, on MPI.COMM_WORLD. Collective."""
    refuse_if_alone()
    comm = MPI.COMM_WORLD
    courses: list[Course] = []
    atexit.register(end_with_the_status)
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


def _left(settings: Settings, courses: list[Course]) -> str:
    """The words for what an interrupted run leaves to go on from."""
    if courses and courses[0].saved is not None:
        return f"; --resume goes on after {courses[0].saved}"
    return _as_it_was(settings) or " before the first checkpoint"


def _as_it_was(settings: Settings) -> str:
    return "; the checkpoint is as it was" if settings.resume and last_checkpoint(settings) is not None else ""


def _run(settings: Settings, comm: MPI.Intracomm, courses: list[Course], preemption: Preemption) -> None:
    """See ``run``; the course is put into ``courses`` when there is one."""
    parts = together(comm, lambda: _prepare(settings, comm))
    _stop_before_training(settings, preemption)
    limit_threads(comm)
    if isinstance(parts.mode, FreeMode) and parts.mode.in_shared_memory:
        together(comm, lambda: _share(parts.model, comm))
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
        click.echo(
            f"{checkpoint_path(settings)} has {count(len(course.history), 'epoch')}: there is nothing left to train"
        )
    _train(course)
    if comm.rank == 0:
        conclude(course)
    meet(comm)  # a launcher may kill the ranks that still write when one that has ended gets a signal


def _stop_before_training(settings: Settings, preemption: Preemption) -> None:
    """Raise PreemptedError where a signal came. Collective."""
    if preemption.requested:
        kept = _as_it_was(settings)
        raise PreemptedError(f"nothing more was trained{kept}" if kept else "nothing was trained yet", settings.resume)


def _prepare(settings: Settings, comm: MPI.Intracomm) -> Parts:
    settings.check()
    optimizer, mode, compression = settings.make_optimizer(), settings.make_mode(), settings.make_compression()
    model = models.get(settings.model)
    xp = _device.array_module(settings.device, comm.rank)
    if comm.rank == 0:
        make_writable(settings.output)
        if settings.timeline is not None:
            make_writable(settings.timeline.parent, f"--timeline {settings.timeline}")
        require_said(settings)
    data = load(settings.data, settings.data_directory)
    made = model(data.input_shape, data.classes, seed=settings.seed, xp=xp)
    batches = Batches(data.x_train, data.y_train, settings.batch)
    steps = len(batches) * settings.epochs
    warmup_steps = settings.warmup_steps
    if warmup_steps is None:
        warmup_steps = 0 if compression is None or isinstance(mode, FreeMode) else steps // WARMUP_SHARE
    return Parts(data, made, optimizer, mode, compression, batches, steps, warmup_steps)


def _share(model: Model, comm: MPI.Intracomm) -> None:
    """Put the model's parameters into memory that the node's ranks share. Collective."""
    if model.xp is np:  # the trainer says what is wrong with a device
        for name, w in model.parameters.items():
            model.parameters[name] = Communicator(comm).empty(w.shape, w.dtype)
            model.parameters[name][...] = w


def _begin(
    settings: Settings, comm: MPI.Intracomm, parts: Parts, trainer: DataParallel, preemption: Preemption
) -> Course:
    """The run from its beginning, or from the checkpoint, which the trainer then goes on from. Collective."""
    course = Course(settings, comm, parts, trainer, [], Epoch(), -trainer.bytes_sent, preemption)
    path = broadcast(comm, last_checkpoint(settings) if settings.resume and comm.rank == 0 else None, "bitring train")
    if path is not None:
        go_on(course, path)
    elif settings.resume and comm.rank == 0:
        click.echo(f"{checkpoint_path(settings)} is not there: starting from the beginning")
    if comm.rank == 0:
        for name in ("summary.json", "curve.png"):
            (settings.output / name).unlink(missing_ok=True)
        if path is None:
            remove_checkpoints(checkpoint_path(settings))
        begin_metrics(settings.output, course.history)
    return course


def _train(course: Course) -> None:
    """Make the steps that are missing. Collective."""
    settings, comm, trainer = course.settings, course.comm, course.trainer
    done, batches = len(course.history), course.parts.batches
    most_left = min((each.most_left for each in trainer.compressors.values() if each is not None), default=math.inf)
    progress = Progress(done, settings.epochs, len(batches), course.epoch.steps, most_left) if comm.rank == 0 else None
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


def _steps(course: Course, progress: Progress | None) -> None:
    """Make those that are missing in the epoch. Collective."""
    parts, trainer, epoch = course.parts, course.trainer, course.epoch
    number = len(course.history) + 1
    optimizer: Any = parts.optimizer
    product = Factors if parts.compression is not None and parts.compression.takes_factors else None
    allgather(course.comm, None, "bitring train")  # the clock begins when all are there
    begin = time.perf_counter() - epoch.seconds
    for x, y in shard(parts.batches, course.comm, seed=course.settings.seed, epoch=number, start=epoch.steps):
        # Falls to 0 along a straight line, and the noise of batches and of one bit with it.
        trainer.optimizer = dataclasses.replace(optimizer, lr=optimizer.lr * (1 - trainer.steps / parts.steps))
        course.due.before_step()
        with trainer.begin(weight=len(x)):
            x, y = parts.model.xp.asarray(x), parts.model.xp.asarray(y)
            loss, _ = parts.model.loss_and_gradients(x, y, on_gradient=trainer.ready, product=product)
            trainer.step()
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


def _end_epoch(course: Course, progress: Progress | None) -> None:
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
        "telemetry": {name: _plain(x) for name, x in trainer.telemetry().items()},
    }
    course.history.append(record)
    course.epoch = Epoch()
    if progress is not None:
        progress.epoch(record)
        append_metrics(course.settings.output, record)


def _plain(x: Any) -> Any:
    """What JSON can hold."""
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _accuracy(comm: MPI.Intracomm, model: Model, data: Data) -> float:
    """On the test samples, each rank looking at its part. Collective."""
    n = len(data.y_test)
    part = slice(n * comm.rank // comm.size, n * (comm.rank + 1) // comm.size)
    x, y = (model.xp.asarray(each[part]) for each in (data.x_test, data.y_test))
    right = round(model.accuracy(x, y) * (part.stop - part.start))
    return float(sum(allgather(comm, right, "bitring train")) / n)
