"""The work of ``bitring train --placement ...``, of a model that is split. Importing this initialises MPI."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from mpi4py import MPI

import bitring
from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.commands._folder import make_writable, named, write_text
from bitring.commands._going_on import PreemptedError, end_with_the_status, stop_for_now
from bitring.commands._kept import checkpoint_path, history_of, last_checkpoint, require_said
from bitring.commands._pictures import draw_curve
from bitring.commands._placed_picture import draw
from bitring.commands._progress import Progress
from bitring.commands._ranks import ending_together, fail, limit_threads, refuse_if_alone, together
from bitring.commands._results import append_metrics, begin_metrics
from bitring.commands._settings import Settings, refuse_unused
from bitring.commands._units import count, traffic
from bitring.compression.compressor import Compressor
from bitring.errors import NonFiniteError
from bitring.exit_codes import ExitCode
from bitring.machine import versions
from bitring.models.dataset import Data, load
from bitring.models.model import Model, models
from bitring.settings import Settings as Checked
from bitring.settings import make, setting
from bitring.training.batches import Batches
from bitring.training.checkpoints.file import remove_checkpoints
from bitring.training.checkpoints.loading import load_checkpoint
from bitring.training.checkpoints.saving import write_checkpoint
from bitring.training.choice import Choice
from bitring.training.mode import FreeMode
from bitring.training.model_parallel import ModelParallel
from bitring.training.placement.layout import part
from bitring.training.placement.placement import Placement
from bitring.training.placement.schedules import SCHEDULES
from bitring.training.preemption import Preemption


@dataclass(frozen=True)
class Pipeline(Checked):
    """The settings of a pipeline, given as text."""

    stages: int = setting(2, least=1)
    microbatches: int = setting(8, least=1)
    schedule: str = setting("one_forward_one_backward", one_of=tuple(SCHEDULES))


class _Placements:
    """A registry of one class, for ``make``."""

    kind = "placement"

    def get(self, name: str) -> type[Any]:
        if name != "pipeline":
            raise ValueError(
                f"unknown placement {name!r}; known: auto, data, hybrid, hybrid_in_turns, "
                "pipeline:stages=2,microbatches=8, or LAYER=samples|columns|rows|RANK, separated by commas"
            )
        return Pipeline


def placement_of(text: str) -> Any:
    """The placement that ``--placement`` asks for. Raises ValueError for what is none."""
    if text in ("auto", "data", "hybrid", "hybrid_in_turns"):
        return text
    if ":" not in text and "=" in text:
        found: dict[str, str | int] = {}
        for part in text.split(","):
            layer, equals, how = (word.strip() for word in part.partition("="))
            if not (layer and equals and how):
                raise ValueError(f"--placement {text}: expected LAYER=samples|columns|rows|RANK; got {part!r}")
            if layer in found:
                raise ValueError(f"--placement {text}: {layer} is given twice")
            found[layer] = int(how) if how.isdecimal() else how
        return found
    asked: Pipeline = make(text, _Placements())  # type: ignore[arg-type]
    return Placement(stages=asked.stages, microbatches=asked.microbatches, schedule=asked.schedule)


def run(settings: Settings) -> None:
    """Train as ``settings`` say, on MPI.COMM_WORLD. Collective."""
    refuse_if_alone()
    comm = MPI.COMM_WORLD
    atexit.register(end_with_the_status)
    with ending_together(comm), Preemption(comm) as preemption:
        try:
            _run(settings, comm, preemption)
        except PreemptedError as preempted:
            stop_for_now(comm, preempted)
        except NonFiniteError as error:  # raised on all ranks alike
            fail(comm, f"{error}; a smaller --lr may help", status=ExitCode.FAILED)
        except KeyboardInterrupt:
            if comm.rank == 0:
                kept = (
                    "; --resume goes on from the checkpoint" if last_checkpoint(settings) else " before the first one"
                )
                click.echo(f"\ninterrupted{kept}", err=True)
            raise


def _prepare(settings: Settings, comm: MPI.Intracomm) -> tuple[Data, Model, Any]:
    settings.check()
    if settings.warmup_steps is not None or settings.algorithm != "auto" or settings.timeline is not None:
        raise ValueError("--warmup-steps, --algorithm and --timeline are not for --placement")
    refuse_unused(settings, "--placement")
    assert settings.placement is not None
    placement = placement_of(settings.placement)
    if comm.rank == 0:
        make_writable(settings.output)
        require_said(settings)
    data = load(settings.data, settings.data_directory)
    return data, models.get(settings.model)(data.input_shape, data.classes, seed=settings.seed), placement


def _compressor(settings: Settings) -> Compressor | None:
    made = settings.make_compression()
    if isinstance(made, Choice):
        raise ValueError(f"--compression {settings.compression} is not for --placement, which takes one compressor")
    return made


@dataclass
class _Epoch:
    """Progress in an epoch that is not over: ``loss`` is summed over its samples."""

    steps: int = 0
    seconds: float = 0.0
    loss: float = 0.0


def _go_on(path: Path, settings: Settings, trainer: ModelParallel, each: int) -> tuple[list[dict[str, Any]], _Epoch]:
    """Load the checkpoint: the records of its epochs, and the next one. Collective.

    Raises ValueError when it is of another run.
    """
    extra = load_checkpoint(path, trainer)
    history, done = history_of(path, settings, extra, trainer.steps, each)
    if done and isinstance(trainer.mode, FreeMode):
        raise ValueError(f"--resume: {path} is of the middle of an epoch, where mode {settings.mode} cannot begin")
    begun = extra.get("epoch", {"seconds": 0.0, "loss": [0.0]})
    return history, _Epoch(done, begun["seconds"], math.fsum(begun["loss"])) if done else _Epoch()


def _save(settings: Settings, trainer: ModelParallel, history: list[dict[str, Any]], epoch: _Epoch) -> None:
    """Make a checkpoint. Collective. Ends the command when that fails."""
    extra = {
        "history": history,
        "settings": settings.of_the_result(),
        "epoch": {"seconds": epoch.seconds, "loss": [epoch.loss]},
    }
    try:
        write_checkpoint(checkpoint_path(settings), trainer, extra, keep=settings.keep)
    except OSError as error:  # raised on all ranks alike
        fail(trainer.comm, str(error), status=ExitCode.FAILED)


def _kept(settings: Settings, history: list[dict[str, Any]], epoch: _Epoch) -> str:
    """What there is to go on from, in words."""
    place = f"step {epoch.steps} of epoch {len(history) + 1}" if epoch.steps else f"epoch {len(history)}"
    return f"{checkpoint_path(settings)} holds all that was trained, up to {place}"


def _run(settings: Settings, comm: MPI.Intracomm, preemption: Preemption) -> None:
    data, model, placement = together(comm, lambda: _prepare(settings, comm))
    limit_threads(comm)
    optimizer: Any = together(comm, settings.make_optimizer)
    compression = together(comm, lambda: _compressor(settings))
    trainer = together(
        comm,
        lambda: ModelParallel(
            model,
            optimizer,
            comm=comm,
            placement=placement,
            replicas=settings.replicas,
            mode=settings.make_mode(),
            compression=compression,
        ),
    )
    batches = Batches(data.x_train, data.y_train, settings.batch)
    steps = len(batches) * settings.epochs
    own_steps = isinstance(trainer.mode, FreeMode)  # each replica's, of its part of every batch
    history: list[dict[str, Any]] = []
    begun = _Epoch()
    there = broadcast(comm, last_checkpoint(settings) if settings.resume else None, "bitring train")
    if there is not None:
        history, begun = together(comm, lambda: _go_on(there, settings, trainer, len(batches)))
    elif comm.rank == 0:
        remove_checkpoints(checkpoint_path(settings))
    if comm.rank == 0:
        begin_metrics(settings.output, history)
    first = len(history)
    progress = Progress(first, settings.epochs, len(batches), begun.steps) if comm.rank == 0 else None
    seconds, sent = (history[-1]["seconds"], history[-1]["bytes_sent"]) if history else (0.0, 0)
    with progress or contextlib.nullcontext(), np.errstate(over="ignore", invalid="ignore"):
        for epoch in range(first + 1, settings.epochs + 1):
            begin = time.perf_counter() - begun.seconds
            whole = bitring.shard(batches, MPI.COMM_SELF, seed=settings.seed, epoch=epoch, start=begun.steps)
            for x, y in whole:  # on all ranks
                trainer.optimizer = dataclasses.replace(optimizer, lr=optimizer.lr * (1 - trainer.steps / steps))
                if own_steps:
                    mine = part(len(x), trainer.replicas, trainer.replica)
                    x, y = x[mine], y[mine]
                loss = trainer.step(x, y)
                begun = _Epoch(begun.steps + 1, time.perf_counter() - begin, begun.loss + loss * len(x))
                if progress is not None:
                    progress.step(epoch, loss)
                if not own_steps and begun.steps < len(batches) and preemption.requested:
                    _save(settings, trainer, history, begun)
                    raise PreemptedError(_kept(settings, history, begun), resume=True)
            trainer.parameters()
            took = time.perf_counter() - begin
            seconds += took
            total = _over_replicas(comm, trainer, begun.loss) if own_steps else begun.loss
            record = {
                "epoch": epoch,
                "train_loss": total / len(data.y_train),
                "test_accuracy": _accuracy(comm, model, data),
                "seconds": seconds,
                "samples_per_second": len(data.y_train) / took,
                "bytes_sent": sent + max(allgather(comm, trainer.bytes_sent, "bitring train")),
                "telemetry": trainer.telemetry(),
            }
            history = broadcast(comm, [*history, record], "bitring train")
            if comm.rank == 0 and progress is not None:
                progress.epoch(record)
                append_metrics(settings.output, record)
            begun = _Epoch()
            stops = epoch < settings.epochs and preemption.requested
            if stops or epoch % settings.checkpoint_every.number == 0 or epoch == settings.epochs:
                _save(settings, trainer, history, begun)
            if stops:
                raise PreemptedError(_kept(settings, history, begun), resume=True)
    if comm.rank == 0:
        _conclude(settings, history, trainer)
    trainer.free()


def _over_replicas(comm: MPI.Intracomm, trainer: ModelParallel, total: float) -> float:
    """The sum of what the replicas have. Collective."""
    return float(sum(dict(allgather(comm, (trainer.replica, total), "bitring train")).values()))


def _accuracy(comm: MPI.Intracomm, model: Model, data: Data) -> float:
    """On the test samples, each rank looking at its part. Collective."""
    n = len(data.y_test)
    part = slice(n * comm.rank // comm.size, n * (comm.rank + 1) // comm.size)
    right = round(model.accuracy(data.x_test[part], data.y_test[part]) * (part.stop - part.start))
    return float(sum(allgather(comm, right, "bitring train")) / n)


def _conclude(settings: Settings, history: list[dict[str, Any]], trainer: ModelParallel) -> None:
    last, ranks = history[-1], trainer.comm.Get_size()
    names = ("test_accuracy", "train_loss", "seconds", "samples_per_second", "bytes_sent")
    summary = {
        **{name: last[name] for name in names},
        "ranks": ranks,
        "epochs": len(history),
        "model": settings.model,
        "data": settings.data,
        "mode": settings.mode,
        "optimizer": settings.optimizer,
        "compression": settings.compression,
        "algorithm": settings.algorithm,
        "placement": settings.placement,
        "replicas": settings.replicas,
        "seed": settings.seed,
        "versions": versions(),
    }
    write_text(settings.output / "summary.json", json.dumps(summary, indent=2) + "\n")
    click.echo(
        f"test accuracy  {last['test_accuracy']:.4f} after {count(len(history), 'epoch')}, {last['seconds']:.1f} s"
    )
    click.echo(f"bytes sent     {traffic(last['bytes_sent'])} per rank at most")
    click.echo(bitring.explain(trainer))
    title = f"{settings.model} on {settings.data}, {count(ranks, 'rank')}, placement {settings.placement}"
    try:
        with named(settings.output):
            draw_curve(history, settings.output / "curve.png", title)
            draw(trainer.picture(), settings.output / "placement.png", title)
    except ImportError as error:
        click.echo(f"pictures       not drawn: {error}")
    else:
        click.echo(f"pictures       {settings.output / 'curve.png'}, {settings.output / 'placement.png'}")
