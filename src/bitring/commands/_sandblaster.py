"""The work of ``bitring train --optimizer lbfgs --mode sandblaster``. Importing this initialises MPI."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from mpi4py import MPI

from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.commands._folder import make_writable, named, write_text
from bitring.commands._kept import checkpoint_path, last_checkpoint, require_said
from bitring.commands._pictures import COLORS, draw_curve, figure, plain
from bitring.commands._placed import placement_of
from bitring.commands._progress import Progress
from bitring.commands._ranks import ending_together, fail, limit_threads, refuse_if_alone, together
from bitring.commands._results import append_metrics, begin_metrics
from bitring.commands._settings import Settings, refuse_unused
from bitring.commands._units import count, traffic
from bitring.errors import NonFiniteError
from bitring.exit_codes import ExitCode
from bitring.machine import versions
from bitring.models.dataset import load
from bitring.models.model import models
from bitring.settings import Settings as Checked
from bitring.settings import make, setting, spelled
from bitring.training.checkpoints.file import remove_checkpoints
from bitring.training.checkpoints.loading import load_checkpoint
from bitring.training.checkpoints.saving import write_checkpoint
from bitring.training.coordinator import PortionRecord
from bitring.training.lbfgs import LBFGS
from bitring.training.sandblaster import Sandblaster


@dataclass(frozen=True)
class Portioning(Checked):
    """The settings of the mode."""

    portions: int = setting(64, least=1)
    backups: bool = True


@dataclass(frozen=True)
class _Only:
    """A registry of one class."""

    kind: str
    name: str
    cls: type[Any]

    def get(self, name: str) -> type[Any]:
        if name != self.name:
            raise ValueError(f"--mode sandblaster needs --optimizer lbfgs; got --optimizer {name}")
        return self.cls


def run(settings: Settings) -> None:
    """Train as ``settings`` say, on MPI.COMM_WORLD: an epoch is an iteration over all training samples. Collective."""
    refuse_if_alone()
    comm = MPI.COMM_WORLD
    with ending_together(comm):
        try:
            _run(settings, comm)
        except NonFiniteError as error:  # raised on all ranks alike
            fail(comm, str(error), status=ExitCode.FAILED)


def _prepare(settings: Settings, comm: MPI.Intracomm) -> tuple[LBFGS, Portioning, Any, Any, Any]:
    settings.check()
    optimizer: LBFGS = make(settings.optimizer, _Only("optimizer", "lbfgs", LBFGS))  # type: ignore[arg-type]
    mode: Portioning = make(settings.mode, _Only("mode", "sandblaster", Portioning))  # type: ignore[arg-type]
    for name in ("tau", "lr", "momentum", "warmup_steps"):
        if getattr(settings, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is not for the mode sandblaster")
    if settings.compression != "none":
        raise ValueError("--compression is not for the mode sandblaster")
    if settings.algorithm != "auto" or settings.timeline is not None:
        raise ValueError("--algorithm and --timeline are not for the mode sandblaster")
    refuse_unused(settings, "the mode sandblaster")
    placement = None if settings.placement is None else placement_of(settings.placement)
    if comm.rank == 0:
        make_writable(settings.output)
        require_said(settings)
    data = load(settings.data, settings.data_directory)
    made = models.get(settings.model)(data.input_shape, data.classes, seed=settings.seed)
    return optimizer, mode, data, made, placement


def _of_the_result(settings: Settings) -> dict[str, Any]:
    """The options that must be the same for a run to go on; the checkpoint itself compares the optimizer."""
    return {"model": settings.model, "data": settings.data, "seed": settings.seed}


def _go_on(path: Path, settings: Settings, job: Sandblaster) -> list[dict[str, Any]]:
    """Load the checkpoint: the records of its iterations. Collective. Raises ValueError when it is of another run."""
    extra = load_checkpoint(path, job)
    history, made = extra.get("history"), extra.get("settings", {})
    if not isinstance(history, list):
        raise ValueError(f"--resume: {path} was not made by bitring train")
    for option, value in _of_the_result(settings).items():
        if made.get(option, value) != value:
            raise ValueError(f"--resume: the checkpoint was made with --{option} {made[option]}; got {value}")
    return history


def _save(settings: Settings, job: Sandblaster, history: list[dict[str, Any]]) -> None:
    """Make a checkpoint. Collective. Ends the command when that fails."""
    extra = {"history": history, "settings": _of_the_result(settings)}
    try:
        write_checkpoint(checkpoint_path(settings), job, extra, keep=settings.keep)
    except OSError as error:  # raised on all ranks alike
        fail(job.comm, str(error), status=ExitCode.FAILED)


def _run(settings: Settings, comm: MPI.Intracomm) -> None:
    optimizer, mode, data, made, placement = together(comm, lambda: _prepare(settings, comm))
    limit_threads(comm)
    job = together(
        comm,
        lambda: Sandblaster(
            made,
            optimizer,
            comm=comm,
            portions=mode.portions,
            backups=mode.backups,
            placement=placement,
            replicas=settings.replicas,
        ),
    )
    history: list[dict[str, Any]] = []
    there = broadcast(comm, last_checkpoint(settings) if settings.resume else None, "bitring train")
    if there is not None:
        history = together(comm, lambda: _go_on(there, settings, job))
    elif comm.rank == 0:
        remove_checkpoints(checkpoint_path(settings))
    if comm.rank == 0:
        begin_metrics(settings.output, history)
    begun, done = time.perf_counter(), history[-1]["seconds"] if history else 0.0
    sent = history[-1]["bytes_sent"] if history else 0
    first = len(history)
    progress = Progress(first, settings.epochs, 1, 0) if comm.rank == 0 else None
    with progress or contextlib.nullcontext():
        for epoch in range(first + 1, settings.epochs + 1):
            loss = job.step(data.x_train, data.y_train)
            seconds = done + time.perf_counter() - begun
            job.synchronize()
            pause = time.perf_counter()
            nbytes = max(job.together("train", lambda comm: allgather(comm, job.bytes_sent, "bitring train")))
            samples = len(data.y_train) * (epoch - first)
            record = {
                "epoch": epoch,
                "train_loss": loss,
                "test_accuracy": made.accuracy(data.x_test, data.y_test),
                "seconds": seconds,
                "samples_per_second": samples / max(seconds - done, 1e-9),
                "bytes_sent": sent + nbytes,
                "evaluations": job.evaluations,
                "telemetry": {},
            }
            told = [*history, record]
            history = job.together("train", lambda comm: broadcast(comm, told, "bitring train"))  # noqa: B023
            if job.comm is not comm:  # should rank 0 have died, who knows what it has written
                comm = job.comm
                if comm.rank == 0:
                    begin_metrics(settings.output, history[:-1])
            if progress is not None:
                progress.step(epoch, loss)
                progress.epoch(record)
            if comm.rank == 0:
                append_metrics(settings.output, record)
            if epoch % settings.checkpoint_every.number == 0 or epoch == settings.epochs:
                _save(settings, job, history)
            begun += time.perf_counter() - pause  # what is measured and kept is not training
    if comm.rank == 0:
        _conclude(settings, optimizer, mode, history, job, comm.size)
    job.free()


def _conclude(
    settings: Settings, optimizer: LBFGS, mode: Portioning, history: list[Any], job: Sandblaster, ranks: int
) -> None:
    last = history[-1]
    names = ("test_accuracy", "train_loss", "seconds", "samples_per_second", "bytes_sent", "evaluations")
    summary = {
        **{name: last[name] for name in names},
        "ranks": ranks,
        "epochs": len(history),
        "model": settings.model,
        "data": settings.data,
        "mode": spelled("sandblaster", mode),
        "optimizer": spelled("lbfgs", optimizer),
        "placement": settings.placement,
        "replicas": settings.replicas if settings.placement else ranks,
        "compression": "none",
        "algorithm": "portions",
        "seed": settings.seed,
        **dataclasses.asdict(optimizer),
        "versions": versions(),
    }
    write_text(settings.output / "summary.json", json.dumps(summary, indent=2) + "\n")
    click.echo(
        f"test accuracy  {last['test_accuracy']:.4f} after {count(len(history), 'iteration')}, "
        f"{last['evaluations']} evaluations of the whole data, {last['seconds']:.1f} s"
    )
    click.echo(f"bytes sent     {traffic(last['bytes_sent'])} per rank at most")
    title = f"{settings.model} on {settings.data}, {count(ranks, 'rank')}, L-BFGS by Sandblaster"
    try:
        with named(settings.output):
            draw_curve(history, settings.output / "curve.png", title)
        if job.records:
            draw_portions(job.records, settings.output / "portions.png", title)
    except ImportError as error:
        click.echo(f"pictures       not drawn: {error}")
    else:
        click.echo(f"pictures       {settings.output / 'curve.png'}, {settings.output / 'portions.png'}")


def draw_portions(records: Sequence[PortionRecord], path: Path, title: str, evaluations: int = 3) -> None:
    """Draw who computed which portion, of the last evaluations. Raises ImportError without matplotlib, OSError."""
    last = max(each.evaluation for each in records)
    shown = [each for each in records if each.evaluation > last - evaluations]
    start = min(each.begin for each in shown)
    replicas = max(each.replica for each in shown) + 1
    drawing = figure(9, 1.2 + 0.5 * replicas)
    axes = drawing.add_subplot()
    plain(axes)
    for each in shown:
        axes.barh(
            each.replica,
            (each.end - each.begin) * 1e3,
            left=(each.begin - start) * 1e3,
            height=0.7,
            color=COLORS[each.evaluation % 3] if each.counts else "0.85",
            edgecolor="white",
            linewidth=0.5,
        )
    axes.set_yticks(range(replicas), [f"rank {rank}" for rank in range(replicas)])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds; a colour per evaluation; grey: another rank's result came first")
    axes.set_title(title)
    drawing.savefig(path)
