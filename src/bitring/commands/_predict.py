"""The work of ``bitring predict``."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bitring.commands._pictures import COLORS, figure, plain
from bitring.commands._tables import show_table
from bitring.commands._terminal import terminal_width
from bitring.commands._units import traffic
from bitring.models.architecture import LayerTable, layer_table
from bitring.training.prediction.cluster import BUILT_IN, Cluster, Machine, read_machine
from bitring.training.prediction.predict import BACKWARD, Prediction, predict

PAYS_FROM = 1.1
"""A compressed step must be so many times as fast to be worth it: it changes training, and predictions are rough."""

DECADES = 1.5, 1.5
"""Decades that the picture reaches below and above the bandwidth."""
_POINTS_A_DECADE = 4
_LATENCY = 50e-6


@dataclass(frozen=True)
class Asked:
    """The options, None where not given; ``bandwidth`` in bytes per second, ``latency`` and ``compute`` in seconds."""

    model: str
    ranks: int
    nodes: int
    bandwidth: float | None
    latency: float | None
    batch: int
    flops: float | None
    compute: float | None
    overlap: bool
    machine: Path | None


def run(asked: Asked, json_path: Path | None, plot: Path | None) -> None:
    """Predict, print, and keep the results. Raises ValueError, OSError and ImportError for a user's mistakes."""
    if asked.flops is not None and asked.compute is not None:
        raise ValueError("--flops and --compute both say how long the gradients take; give one")
    if plot is not None:
        figure(1, 1)
        if plot.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--plot must end in .png, .svg or .pdf; got {plot}")
        if asked.nodes == 1:
            raise ValueError("--plot shows seconds by bandwidth, and one node has no network")
    for path in (json_path, plot):
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    layers = layer_table(asked.model)
    machine = BUILT_IN if asked.machine is None else read_machine(asked.machine)
    if asked.flops is not None:
        machine = dataclasses.replace(machine, flops=asked.flops)
    cluster = _cluster(asked, machine)
    bandwidths = _bandwidths(cluster.bandwidth) if plot is not None else []
    progress = _Progress(1 + len(bandwidths))

    def at(bandwidth: float) -> list[Prediction]:
        there = dataclasses.replace(cluster, bandwidth=bandwidth)
        found = predict(layers, there, machine, batch=asked.batch, compute=asked.compute, overlap=asked.overlap)
        progress.advance()
        return found

    predictions = at(cluster.bandwidth)
    curves = [at(bandwidth) for bandwidth in bandwidths]
    progress.end()
    for line in _head(asked, layers, cluster, machine, predictions[0]):
        click.echo(line)
    click.echo()
    best = min(range(len(predictions)), key=lambda i: predictions[i].seconds)
    show_table(
        ("exchange", "by", _sent(cluster), "encode", "wire", "decode", "exposed", "per step", "speed-up"),
        [_row(each, cluster) for each in predictions],
        emphasis=best,
    )
    if not all(each.measured for each in predictions):
        click.echo("~ not measured on this machine: as fast as a copy of its bytes")
    click.echo()
    advised = advice(predictions, cluster) + _assumed(asked, machine)
    click.echo(advised)
    if json_path is not None:
        kept = _kept(asked, cluster, machine, predictions, advised, bandwidths, curves)
        json_path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        draw(asked, cluster, bandwidths, curves, plot)
        click.echo(f"picture  {plot}")


def _cluster(asked: Asked, machine: Machine) -> Cluster:
    """The cluster that was asked for; what was not said of the network is as the machine's file has it."""
    ranks, nodes = asked.ranks, asked.nodes
    if ranks % nodes:
        raise ValueError(
            f"--ranks must be a multiple of --nodes, as many on each node; got {ranks} ranks on {nodes} nodes"
        )
    bandwidth, latency = asked.bandwidth, asked.latency
    if bandwidth is None and machine.bandwidth is not None:
        bandwidth = machine.bandwidth / machine.wire  # measured was what payloads get
    if bandwidth is None and nodes > 1:
        raise ValueError(
            f"--bandwidth is needed between {nodes} nodes, such as 10Gbit, or a --machine whose bench compress "
            "ran on several nodes"
        )
    if latency is None:
        latency = _LATENCY if machine.latency is None else machine.latency
    return Cluster(ranks, nodes, bandwidth or math.inf, latency)


def advice(predictions: Sequence[Prediction], cluster: Cluster) -> str:
    """One sentence: which exchange to take, and whether compression pays."""
    if cluster.ranks == 1:
        return "There is one rank: nothing is exchanged."
    exact = min((each for each in predictions if each.exchange in ("exact", "mpi")), key=lambda each: each.seconds)
    lossless = [each for each in predictions if each.lossless and each.exchange not in ("exact", "mpi")]
    lossy = min((each for each in predictions if not each.lossless), key=lambda each: each.seconds)
    for each in lossless:  # fewer bytes, the same sums
        if exact.seconds >= PAYS_FROM * each.seconds and lossy.seconds * PAYS_FROM >= each.seconds:
            return (
                f"{each.exchange} is the best: {exact.seconds / each.seconds:.1f}x the speed of the exact exchange, "
                "and its sums are exact, too."
            )
    ratio = exact.seconds / lossy.seconds
    if ratio >= PAYS_FROM:
        return (
            f"{lossy.exchange} is the best: {ratio:.1f}x the speed of the exact exchange, which exposes "
            f"{_time(exact.exposed)} of communication in a step of {_time(exact.seconds)}."
        )
    exposed = exact.exposed / exact.seconds
    where = "within one node" if cluster.nodes == 1 else "here"
    how = "at most " if ratio > 1 else ""
    gain = f"{how}{ratio:.2f}x the speed of the exact one, by {lossy.exchange}"
    return (
        f"Compression does not pay {where}: it gives {gain}; exact communication is {exposed:.0%} of a step. "
        f"Exchange exactly ({exact.how if exact.exchange == 'exact' else exact.exchange})."
    )


def _assumed(asked: Asked, machine: Machine) -> str:
    """The assumptions that the advice rests on, where nobody said how fast the ranks are."""
    if asked.ranks == 1 or any(told is not None for told in (asked.flops, asked.compute, asked.machine)):
        return ""
    return (
        f" This is at {_operations(machine.flops)}flop/s per rank, as where bitring is developed; "
        "--flops, --compute or --machine tell of yours."
    )


def _head(
    asked: Asked, layers: Sequence[LayerTable], cluster: Cluster, machine: Machine, exact: Prediction
) -> list[str]:
    values = sum(layer.values for layer in layers)
    multiply_adds = sum(layer.multiply_adds for layer in layers)
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes != 1)}"
    network = (
        "through the node's memory"
        if cluster.nodes == 1
        else f"{rate(cluster.bandwidth)}, {_time(cluster.latency)} per message"
    )
    operations = 2 * (1 + BACKWARD) * multiply_adds * asked.batch
    if asked.compute is None:
        seconds, compute = (
            operations / machine.flops,
            f"{_operations(operations)}flop at {_operations(machine.flops)}flop/s",
        )
    else:
        seconds, compute = asked.compute, f"{_time(asked.compute)} of computing"
    alone = exact.seconds - exact.exposed
    begin = "as back-propagation makes the gradients" if asked.overlap else "when all gradients are there"
    return [
        f"model    {asked.model}: {values:,} parameters, {multiply_adds / 1e9:.3g} G multiply-adds per sample",
        f"ranks    {cluster.ranks} on {nodes}, {network}",
        f"step     {asked.batch} samples per rank, {compute}; exchanges begin {begin}",
        f"alone    {_time(alone)} without an exchange: {_time(seconds)} for the gradients, "
        f"{_time(max(alone - seconds, 0.0))} more for the NaN check, packing and the update",
        f"machine  {machine.title}{' (built-in figures)' if asked.machine is None else ''}",
    ]


def _sent(cluster: Cluster) -> str:
    """The column of bytes: what a network carries, where there is one."""
    return "sent per rank" if cluster.nodes == 1 else "leaving a node"


def _row(each: Prediction, cluster: Cluster) -> tuple[str, ...]:
    return (
        f"{each.exchange}{'' if each.measured else ' ~'}",
        each.how,
        traffic(each.nbytes if cluster.nodes == 1 else each.leaving),
        _time(each.encode),
        _time(each.wire),
        _time(each.decode),
        _time(max(each.exposed, 0.0)),
        _time(each.seconds),
        f"{each.speedup:.2f}x",
    )


def _kept(
    asked: Asked,
    cluster: Cluster,
    machine: Machine,
    predictions: Sequence[Prediction],
    advised: str,
    bandwidths: Sequence[float],
    curves: Sequence[Sequence[Prediction]],
) -> dict[str, Any]:
    """Bandwidths in bytes per second, null for one node's; times in seconds."""
    kept: dict[str, Any] = {
        "prediction": {
            "model": asked.model,
            "ranks": cluster.ranks,
            "nodes": cluster.nodes,
            "bandwidth": cluster.bandwidth if cluster.nodes > 1 else None,
            "latency": cluster.latency,
            "batch": asked.batch,
            "compute": asked.compute,
            "flops": machine.flops,
            "overlap": asked.overlap,
            "machine": machine.title,
        },
        "exchanges": [dataclasses.asdict(each) for each in predictions],
        "advice": advised,
    }
    if curves:
        kept["by_bandwidth"] = [
            {"bandwidth": bandwidth, "seconds": {each.exchange: each.seconds for each in found}}
            for bandwidth, found in zip(bandwidths, curves, strict=True)
        ]
    return kept


def _bandwidths(middle: float) -> list[float]:
    below, above = (round(decades * _POINTS_A_DECADE) for decades in DECADES)
    return [middle * 10 ** (k / _POINTS_A_DECADE) for k in range(-below, above + 1)]


def draw(
    asked: Asked,
    cluster: Cluster,
    bandwidths: Sequence[float],
    curves: Sequence[Sequence[Prediction]],
    path: Path,
) -> None:
    """Draw seconds per step by bandwidth, a line per exchange. Raises ImportError without matplotlib, OSError."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    picture = figure(8, 4.8)
    axes = picture.subplots()
    plain(axes)
    lines: dict[str, list[tuple[float, float]]] = {}
    for bandwidth, found in zip(bandwidths, curves, strict=True):
        for each in found:
            lines.setdefault(each.exchange, []).append((bandwidth * 8, each.seconds))
    styles: Mapping[str, tuple[str, str]] = {"exact": ("0.1", "-"), "mpi": ("0.45", "--")}
    cycle = [(color, line) for line in ("-", "--", ":") for color in COLORS[:-1]]
    for name, points in lines.items():
        color, line = styles.get(name) or cycle.pop(0)
        x, y = zip(*points, strict=True)
        axes.plot(x, y, line, color=color, linewidth=1.8, label=name)
    axes.axvline(cluster.bandwidth * 8, color="0.2", linestyle=":", linewidth=1.2)
    top = axes.get_xaxis_transform()
    axes.text(cluster.bandwidth * 8, 1.01, rate(cluster.bandwidth), transform=top, ha="center", fontsize=8.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_rate_tick))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(_time_tick))
    axes.minorticks_off()
    axes.set_xlabel("bandwidth of a node")
    axes.set_ylabel("predicted time of a step")
    picture.legend(loc="outside right center", frameon=False, fontsize=9)
    nodes = f" on {cluster.nodes} nodes" * (cluster.nodes != cluster.ranks)
    picture.suptitle(f"{asked.model}, {cluster.ranks} ranks{nodes}, {asked.batch} samples per rank", fontsize=11)
    picture.savefig(path)


def _rate_tick(bits: float, position: int | None) -> str:
    return rate(bits / 8)


def _time_tick(seconds: float, position: int | None) -> str:
    return _time(seconds)


def rate(bandwidth: float) -> str:
    """Bytes per second as bits per second, as networks are sold."""
    for unit, scale in (("Gbit/s", 1e9), ("Mbit/s", 1e6)):
        if bandwidth * 8 >= scale:
            return f"{bandwidth * 8 / scale:.3g} {unit}"
    return f"{bandwidth * 8 / 1e3:.3g} kbit/s"


def _operations(number: float) -> str:
    return f"{number / 1e12:,.3g} T" if number >= 1e12 else f"{number / 1e9:,.3g} G"


def _time(seconds: float) -> str:
    if not seconds:
        return "-"
    for unit, scale in (("µs", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


class _Progress:
    """A bar on a terminal, where there is more than one thing to do."""

    def __init__(self, parts: int) -> None:
        self._bar: Any = None
        width = terminal_width()
        if parts > 1 and width is not None:
            try:
                from rich.console import Console
                from rich.progress import Progress
            except ImportError:
                return
            self._bar = Progress(console=Console(force_terminal=True, width=width), transient=True)
            self._task = self._bar.add_task("predicting", total=parts)
            self._bar.start()

    def advance(self) -> None:
        """One more part is done."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def end(self) -> None:
        """Take it away."""
        if self._bar is not None:
            self._bar.stop()
