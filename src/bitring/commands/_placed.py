"""The work of ``bitring train --placement ...``, of a model that is split. Importing this initialises MPI."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from mpi4py import MPI

import bitring
from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.commands._kept import checkpoint_path, history_of, last_checkpoint, require_said
from bitring.commands._pictures import draw_curve
from bitring.commands._placed_picture import draw
from bitring.commands._progress import Progress
from bitring.commands._ranks import ending_together, fail, limit_threads, refuse_if_alone, together
from bitring.commands._results import append_metrics, begin_metrics
from bitring.commands._settings import Settings
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
from bitring.training.checkpoints.saving import save_checkpoint
from bitring.training.choice import Choice
from bitring.training.mode import FreeMode
from bitring.training.model_parallel import ModelParallel
from bitring.training.placement.layout import part
from bitring.training.placement.placement import Placement
from bitring.training.placement.schedules import SCHEDULES


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
        pairs = [part.partition("=") for part in text.split(",")]
        return {layer.strip(): int(how) if how.strip().isdigit() else how.strip() for layer, _, how in pairs}
    asked: Pipeline = make(text, _Placements())  # type: ignore[arg-type]
    return Placement(stages=asked.stages, microbatches=asked.microbatches, schedule=asked.schedule)


def run(settings: Settings) -> None:
    """Train as ``settings`` say, on MPI.COMM_WORLD. Collective."""
    refuse_if_alone()
    comm = MPI.COMM_WORLD
    with ending_together(comm):
        try:
            _run(settings, comm)
        except NonFiniteError as error:  # raised on all ranks alike
            fail(comm, f"{error}; a smaller --lr may help", status=ExitCode.FAILED)


def _prepare(settings: Settings, comm: MPI.Intracomm) -> tuple[Data, Model, Any]:
    settings.check()
    if settings.warmup_steps is not None or settings.algorithm != "auto" or settings.timeline is not None:
        raise ValueError("--warmup-steps, --algorithm and --timeline are not for --placement")
    placement = placement_of(settings.placement or "auto")
    if comm.rank == 0:
        settings.output.mkdir(parents=True, exist_ok=True)
        require_said(settings)
    data = load(settings.data, settings.data_directory)
    return data, models.get(settings.model)(data.input_shape, data.classes, seed=settings.seed), placement


def _compressor(settings: Settings) -> Compressor | None:
    made = settings.make_compression()
    if isinstance(made, Choice):
        raise ValueError(f"--compression {settings.compression} is not for --placement, which takes one compressor")
    return made


def _go_on(path: Path, settings: Settings, trainer: ModelParallel, each: int) -> list[dict[str, Any]]:
    """Load the checkpoint; the records of its epochs. Collective. Raises ValueError when it is of another run."""
    history, done = history_of(path, settings, load_checkpoint(path, trainer), trainer.steps, each)
    if done:
        raise ValueError(f"--resume: {path} is of a run without --placement, of the middle of an epoch")
    return history


def _run(settings: Settings, comm: MPI.Intracomm) -> None:
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
    there = broadcast(comm, last_checkpoint(settings) if settings.resume else None, "bitring train")
    if there is not None:
        history = together(comm, lambda: _go_on(there, settings, trainer, len(batches)))
    elif comm.rank == 0:
        remove_checkpoints(checkpoint_path(settings))
    if comm.rank == 0:
        begin_metrics(settings.output, history)
    first = len(history)
    progress = Progress(first, settings.epochs, len(batches), 0) if comm.rank == 0 else None
    seconds, sent = (history[-1]["seconds"], history[-1]["bytes_sent"]) if history else (0.0, 0)
    with progress or contextlib.nullcontext(), np.errstate(over="ignore", invalid="ignore"):
        for epoch in range(first + 1, settings.epochs + 1):
            begin, total = time.perf_counter(), 0.0
            for x, y in bitring.shard(batches, MPI.COMM_SELF, seed=settings.seed, epoch=epoch):  # whole, on all ranks
                trainer.optimizer = dataclasses.replace(optimizer, lr=optimizer.lr * (1 - trainer.steps / steps))
                if own_steps:
                    mine = part(len(x), trainer.replicas, trainer.replica)
                    x, y = x[mine], y[mine]
                loss = trainer.step(x, y)
                total += loss * len(x)
                if progress is not None:
                    progress.step(epoch, loss)
            trainer.parameters()
            took = time.perf_counter() - begin
            seconds += took
            record = {
                "epoch": epoch,
                "train_loss": (_over_replicas(comm, trainer, total) if own_steps else total) / len(data.y_train),
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
            save_checkpoint(checkpoint_path(settings), trainer, history=history, settings=settings.of_the_result())
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
    (settings.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    click.echo(
        f"test accuracy  {last['test_accuracy']:.4f} after {count(len(history), 'epoch')}, {last['seconds']:.1f} s"
    )
    click.echo(f"bytes sent     {traffic(last['bytes_sent'])} per rank at most")
    click.echo(bitring.explain(trainer))
    title = f"{settings.model} on {settings.data}, {count(ranks, 'rank')}, placement {settings.placement}"
    try:
        draw_curve(history, settings.output / "curve.png", title)
        draw(trainer.picture(), settings.output / "placement.png", title)
    except ImportError as error:
        click.echo(f"pictures       not drawn: {error}")
    else:
        click.echo(f"pictures       {settings.output / 'curve.png'}, {settings.output / 'placement.png'}")
