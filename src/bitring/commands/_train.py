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

from bitring.collectives.errors import NonFiniteError
from bitring.commands._pictures import draw_curve
from bitring.commands._progress import Progress
from bitring.commands._ranks import ending_together, fail, limit_threads, refuse_if_alone, same_everywhere, together
from bitring.commands._settings import Settings
from bitring.commands._units import traffic
from bitring.compression.compressor import Compressor
from bitring.compression.factors import Factors
from bitring.compression.sufficient_factors import SufficientFactors
from bitring.machine import versions
from bitring.models.dataset import Data, load
from bitring.models.model import Model, models
from bitring.training.batches import Batches, shard
from bitring.training.checkpoint import load_checkpoint, save_checkpoint
from bitring.training.data_parallel import DataParallel
from bitring.training.mode import Mode
from bitring.training.optimizer import Optimizer

Record = dict[str, Any]
"""One line of metrics.jsonl.

epoch: from 1 on. train_loss: the mean over the epoch's samples, each as its step found it. test_accuracy.
seconds: of training so far, evaluation left out. samples_per_second: in this epoch, of all ranks.
bytes_sent: so far, the largest over ranks. bytes_exact: what the ring would have sent, exchanging exactly in each step.
digest: of the parameters.
"""


WARMUP_SHARE = 64
"""One step in so many, the first ones, is exact: gradients are large there and change fast, and residuals lag."""


@dataclass(frozen=True)
class _Parts:
    """What the settings stand for."""

    data: Data
    model: Model
    optimizer: Optimizer
    mode: Mode
    compression: Compressor | None
    batches: Batches
    steps: int  # of all epochs
    warmup_steps: int


def run(settings: Settings) -> None:
    """Train as ``settings`` say, on MPI.COMM_WORLD. Collective."""
    refuse_if_alone()
    comm = MPI.COMM_WORLD
    saved: list[int] = []
    with ending_together(comm):
        try:
            _run(settings, comm, saved)
        except NonFiniteError as error:  # raised on all ranks alike
            fail(comm, f"{error}; a smaller --lr may help", status=1)
        except KeyboardInterrupt:
            if comm.rank == 0:
                click.echo(f"\ninterrupted{_left(settings, saved)}", err=True)
            raise


def _left(settings: Settings, saved: list[int]) -> str:
    """What an interrupted run leaves to go on from."""
    if saved:
        return f"; --resume goes on after epoch {saved[-1]}"
    if settings.resume and _checkpoint(settings).exists():
        return "; the checkpoint is as it was"
    return " before the first checkpoint"


def _run(settings: Settings, comm: MPI.Intracomm, saved: list[int]) -> None:
    """See ``run``; the epochs of which there are checkpoints are appended to ``saved``."""
    parts = together(comm, lambda: _prepare(settings, comm))
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
    history = together(comm, lambda: _begin(settings, comm, trainer))
    if history:
        saved.append(len(history))
    if comm.rank == 0 and len(history) >= settings.epochs:
        click.echo(f"{_checkpoint(settings)} has {_epochs(len(history))}: there is nothing left to train")
    _train(settings, comm, parts, trainer, history, saved)
    if comm.rank == 0:
        _conclude(settings, comm, parts, trainer, history)


def _prepare(settings: Settings, comm: MPI.Intracomm) -> _Parts:
    settings.check()
    optimizer, mode, compression = settings.make_optimizer(), settings.make_mode(), settings.make_compression()
    model = models.get(settings.model)
    if comm.rank == 0:
        _make_writable(settings.output)
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


def _begin(settings: Settings, comm: MPI.Intracomm, trainer: DataParallel) -> list[Record]:
    """The records so far: none, or those of the checkpoint that the trainer goes on from. Collective."""
    history: list[Record] = []
    if settings.resume and comm.bcast(_checkpoint(settings).exists() if comm.rank == 0 else None):
        extra = load_checkpoint(_checkpoint(settings), trainer)
        for name, value in settings.of_the_result().items():
            was = extra["settings"][name]
            if was != value:
                made, given = ("its default" if x is None else x for x in (was, value))
                raise ValueError(
                    f"--resume: the checkpoint was made with --{name.replace('_', '-')} {made}; got {given}"
                )
        history = extra["history"]
    elif settings.resume and comm.rank == 0:
        click.echo(f"{_checkpoint(settings)} is not there: starting from the beginning")
    if comm.rank == 0:
        for name in ("summary.json", "curve.png", *(() if history else ("checkpoint.npz", "checkpoint.npz.previous"))):
            (settings.output / name).unlink(missing_ok=True)
        lines = "".join(json.dumps(record) + "\n" for record in history)
        _write(settings.output / "metrics.jsonl", lines)
    return history


def _train(
    settings: Settings,
    comm: MPI.Intracomm,
    parts: _Parts,
    trainer: DataParallel,
    history: list[Record],
    saved: list[int],
) -> None:
    """Make the epochs that are missing in ``history``, and append their records. Collective."""
    data, model, batches = parts.data, parts.model, parts.batches
    optimizer: Any = parts.optimizer
    nbytes = sum(array.nbytes for array in model.parameters.values())
    exact = 2 * (comm.size - 1) * nbytes * len(batches) // comm.size  # an epoch
    sent_before = history[-1]["bytes_sent"] if history else 0
    sent_at_start = trainer.bytes_sent
    seconds = history[-1]["seconds"] if history else 0.0
    product = Factors if isinstance(parts.compression, SufficientFactors) else None
    progress = Progress(len(history), settings.epochs, len(batches)) if comm.rank == 0 else None
    # Training that diverges is the trainer's to report, once.
    with progress or contextlib.nullcontext(), np.errstate(over="ignore", invalid="ignore"):
        for epoch in range(len(history) + 1, settings.epochs + 1):
            total = 0.0
            comm.Barrier()
            begin = time.perf_counter()
            for x, y in shard(batches, comm, seed=settings.seed, epoch=epoch):
                loss, gradients = model.loss_and_gradients(x, y, product=product)
                # Falls to 0 along a straight line, and the noise of batches and of one bit with it.
                trainer.optimizer = dataclasses.replace(optimizer, lr=optimizer.lr * (1 - trainer.steps / parts.steps))
                trainer.step(gradients, weight=len(x))
                total += loss * len(x)
                if progress is not None:
                    progress.step(epoch, loss)
            trainer.synchronize()
            took = time.perf_counter() - begin
            digest = trainer.digest()
            same_everywhere(comm, f"after epoch {epoch} the parameters", digest)
            # Rank 0's clock counts: a run that is resumed must have one history.
            sums = comm.allgather((total, trainer.bytes_sent - sent_at_start, took))
            seconds += sums[0][2]
            history.append(
                {
                    "epoch": epoch,
                    "train_loss": sum(loss for loss, _, _ in sums) / len(data.y_train),
                    "test_accuracy": _accuracy(comm, model, data),
                    "seconds": seconds,
                    "samples_per_second": len(data.y_train) / sums[0][2],
                    "bytes_sent": sent_before + max(sent for _, sent, _ in sums),
                    "bytes_exact": exact * epoch,
                    "digest": digest,
                    "telemetry": {
                        name: x if x is None or math.isfinite(x) else None for name, x in trainer.telemetry().items()
                    },
                }
            )
            if progress is not None:
                progress.epoch(history[-1])
                with (settings.output / "metrics.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(history[-1]) + "\n")
            if epoch % settings.checkpoint_every == 0 or epoch == settings.epochs:
                _save(settings, comm, trainer, history)
                saved.append(epoch)


def _accuracy(comm: MPI.Intracomm, model: Model, data: Data) -> float:
    """On the test samples, each rank looking at its part. Collective."""
    n = len(data.y_test)
    part = slice(n * comm.rank // comm.size, n * (comm.rank + 1) // comm.size)
    right = round(model.accuracy(data.x_test[part], data.y_test[part]) * (part.stop - part.start))
    return int(comm.allreduce(right)) / n


def _save(settings: Settings, comm: MPI.Intracomm, trainer: DataParallel, history: list[Record]) -> None:
    try:
        save_checkpoint(_checkpoint(settings), trainer, history=history, settings=settings.of_the_result())
    except OSError as error:  # raised on all ranks alike
        fail(comm, str(error), status=1)


def _conclude(
    settings: Settings, comm: MPI.Intracomm, parts: _Parts, trainer: DataParallel, history: list[Record]
) -> None:
    """Write the summary, draw the curve, and say how it went. Rank 0 alone."""
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
        "algorithms": sorted(set(trainer.algorithms)),
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
    """Samples a second over all epochs."""
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
