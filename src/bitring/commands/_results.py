"""The files that a run of ``bitring train`` leaves beside its checkpoints: metrics, summary and curve.

All of this is for rank 0 alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from mpi4py import MPI

from bitring.commands._course import Course, EpochMetrics
from bitring.commands._folder import named, write_text
from bitring.commands._pictures import draw_curve
from bitring.commands._timeline import draw_timeline
from bitring.commands._units import count, traffic
from bitring.machine import versions

_METRICS = "metrics.jsonl"


def begin_metrics(folder: Path, history: Sequence[EpochMetrics]) -> None:
    """Write ``metrics.jsonl`` anew: a line for each of the epochs that are over."""
    write_text(folder / _METRICS, "".join(json.dumps(record) + "\n" for record in history))


def append_metrics(folder: Path, record: EpochMetrics) -> None:
    """Append an epoch's line to ``metrics.jsonl``."""
    with named(folder / _METRICS), (folder / _METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def conclude(course: Course) -> None:
    """Write the summary, draw the curve, and say how it went."""
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
    write_text(settings.output / "summary.json", json.dumps(summary, indent=2) + "\n")
    click.echo(
        f"test accuracy  {last['test_accuracy']:.4f} after {count(len(history), 'epoch')}, {last['seconds']:.1f} s"
    )
    click.echo(f"bytes sent     {_traffic(comm, last)}")
    curve = settings.output / "curve.png"
    title = f"{settings.model} on {settings.data}, {comm.size} rank{'s' * (comm.size != 1)}, {settings.mode}"
    title += f", {'exact' if settings.compression == 'none' else settings.compression}"
    _draw("curve", curve, lambda: draw_curve(history, curve, title))
    if settings.timeline is not None:
        spans, path = course.trainer.timeline(), settings.timeline
        _draw("timeline", path, lambda: draw_timeline(spans, path, f"{title}: the last step on rank 0"))


def _draw(what: str, path: Path, draw: Callable[[], None]) -> None:
    try:
        with named(path):
            draw()
    except ImportError as error:
        click.echo(f"{what:<15}not drawn: {error}")
    else:
        click.echo(f"{what:<15}{path}")


def _mean_speed(history: list[EpochMetrics]) -> float:
    """Samples per second over all epochs."""
    return float(len(history) / sum(1 / record["samples_per_second"] for record in history))


def _traffic(comm: MPI.Intracomm, last: Mapping[str, Any]) -> str:
    if comm.size == 1:
        return "none, there is one rank"
    sent, exact = last["bytes_sent"], last["bytes_exact"]
    ratio = f"1/{exact / sent:.1f} of it" if sent else "nothing"
    return f"{traffic(sent)} per rank; an exact exchange in each step sends {traffic(exact)}: {ratio}"
