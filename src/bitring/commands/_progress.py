"""The display of a training run: a bar on a terminal, else a line per epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import click

from bitring.commands._terminal import terminal_width
from bitring.commands._units import traffic


class Progress:
    """A context manager around the epochs ``done`` to ``epochs``, of ``steps`` steps each; for rank 0 alone.

    The first of them goes on after ``begun`` steps. ``most_left``: the ``residual_ratio`` above which it says so.
    """

    def __init__(self, done: int, epochs: int, steps: int, begun: int, most_left: float = math.inf) -> None:
        self._epochs, self._most_left = epochs, most_left
        self._bar: Any = None
        width = terminal_width()
        if width is not None:
            self._bar = _bar(width)
        if self._bar is not None:
            self._task = self._bar.add_task(
                "", total=epochs * steps, completed=done * steps + begun, epoch=done + 1, loss=""
            )

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, epoch: int, loss: float) -> None:
        """A step of ``epoch`` was made; ``loss`` is this rank's."""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, epoch=epoch, loss=f"loss {loss:.3f}")

    def epoch(self, record: Mapping[str, Any]) -> None:
        """An epoch has ended."""
        line = (
            f"epoch {record['epoch']:>{len(str(self._epochs))}}/{self._epochs}  loss {record['train_loss']:.4f}  "
            f"test accuracy {record['test_accuracy']:.4f}  {record['samples_per_second']:,.0f} samples/s  "
            f"{traffic(record['bytes_sent'])} sent  {record['seconds']:.1f} s"
            f"{_of_exchanges(record['telemetry'], self._most_left)}"
        )
        if self._bar is None:
            click.echo(line)
        else:
            self._bar.console.print(line, highlight=False)


def _of_exchanges(telemetry: Mapping[str, Any], most_left: float) -> str:
    """Summary of the epoch's exchanges: their time, the rank waited for, and the parts left out or hidden."""
    if "staleness" in telemetry:
        return _of_a_store(telemetry)
    if "slowest_rank" not in telemetry:
        return ""
    names = [name for name in ("encode", "wire", "decode", "wait") if f"{name}_seconds" in telemetry]
    parts = ", ".join(f"{name} {telemetry[f'{name}_seconds']:.2g} s" for name in names)
    slowest = "" if telemetry["slowest_rank"] is None else f" for rank {telemetry['slowest_rank']}"
    ratio = telemetry.get("residual_ratio")
    left = "" if ratio is None else f"; residual {ratio:.2g} of the gradient"
    if ratio is not None and ratio > most_left:
        left += f", too much (above {most_left:g}): a lower learning rate or more levels help"
    share = telemetry.get("hidden_share")
    hidden = "" if share is None else f"; {share:.0%} hidden"
    return f"  ({parts}{slowest}{left}{hidden})"


def _of_a_store(telemetry: Mapping[str, Any]) -> str:
    """Summary of the epoch in a mode of the parameter server: this rank's waits, and its shard's updates."""
    ages = {int(age): count for age, count in telemetry["staleness"].items()}
    mean = sum(age * count for age, count in ages.items()) / max(1, sum(ages.values()))
    dropped = f", {telemetry['dropped']} dropped" if telemetry["dropped"] else ""
    ranks: Mapping[Any, float] = telemetry["waited_for"]
    most = f", most for rank {max(ranks, key=lambda each: ranks[each])}" if ranks else ""
    return (
        f"  (wait {telemetry['wait_seconds']:.2g} s{most}; {telemetry['applied']} updates{dropped}, "
        f"staleness {mean:.2g}, at most {max(ages, default=0)})"
    )


def _bar(width: int) -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ImportError:
        return None
    return Progress(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(force_terminal=True, width=width),
        expand=True,
        transient=True,
        refresh_per_second=4,
    )
