"""The measurement of ``bitring bench allreduce``. Importing this initialises MPI."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from mpi4py import MPI

from bitring.collectives.schedule import algorithms
from bitring.commands._pictures import COLORS, figure, plain
from bitring.commands._ranks import ending_together, limit_threads, together
from bitring.compression.plan import plan_allreduce
from bitring.machine import describe

LIBRARY = ("library", "library out of place")
"""The MPI library's own Allreduce: on MPI.IN_PLACE, and from one buffer to another."""

_SAMPLE_SECONDS = 2e-3
"""A sample repeats a short call for so long; a clock and a barrier cost microseconds."""

_MAX_CALLS = 1000


class Contender(NamedTuple):
    """``call`` reduces ``source`` to ``result``, which may be the same array."""

    name: str
    call: Callable[[], None]
    source: Any
    result: Any


def run(json_path: Path | None, plot: Path | None, sizes: list[int], names: list[str] | None, samples: int) -> None:
    """Measure, print, and keep the results. Collective."""
    comm = MPI.COMM_WORLD
    with ending_together(comm):
        together(comm, lambda: _check(comm, json_path, plot, names))
        limit_threads(comm)
        machine = describe(comm)
        if comm.rank == 0:
            click.echo(
                f"allreduce of float32, {comm.size} ranks on {machine['nodes']} node{'s' * (machine['nodes'] > 1)}, "
                f"{machine['versions']['mpi']}, thread level {machine['thread_level']}, {machine['processor']}"
            )
            click.echo(f"{'bytes':>10}  {'contender':<22}{'median':>10}{'algbw':>12}{'busbw':>12}  against the library")
        results: list[dict[str, Any]] = []
        for nbytes in sizes:
            measured = measure(comm, max(nbytes // 4, 1), names or algorithms.names(), samples)
            if comm.rank == 0:
                rows = [_row(comm.size, name, seconds, measured) for name, seconds in measured.items()]
                results += [{"nbytes": 4 * max(nbytes // 4, 1), **row} for row in rows]
                for row in rows:
                    click.echo(_line(nbytes, row))
        if comm.rank == 0:
            kept = {"benchmark": "allreduce", "dtype": "float32", "machine": machine, "results": results}
            if json_path is not None:
                json_path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            if plot is not None:
                draw(kept, plot)


def _check(comm: MPI.Intracomm, json_path: Path | None, plot: Path | None, names: list[str] | None) -> None:
    for name in names or []:
        algorithms.get(name)
    if comm.rank != 0:
        return
    for path in (json_path, plot):
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    if plot is not None:
        figure(1, 1)
        if plot.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--plot must end in .png, .svg or .pdf; got {plot}")


def measure(comm: MPI.Intracomm, n: int, names: Sequence[str], samples: int) -> dict[str, list[float]]:
    """Seconds of an AllReduce of ``n`` float32 values, by contender: ``samples`` of each. Collective.

    Contenders are the algorithms ``names`` and the library's own calls. All ranks return the same. Raises
    RuntimeError on all ranks when a sum is wrong.
    """
    x, y = np.empty(n, np.float32), np.empty(n, np.float32)
    plain = MPI.Intracomm(comm).Dup()
    plans = {name: plan_allreduce(x, comm=comm, algorithm=name) for name in names}
    contenders = [Contender(name, plan, x, x) for name, plan in plans.items()]
    contenders += [
        Contender(LIBRARY[0], partial(plain.Allreduce, MPI.IN_PLACE, x), x, x),
        Contender(LIBRARY[1], partial(plain.Allreduce, x, y), x, y),
    ]
    for contender in contenders:
        _check_sum(comm, contender)
    x.fill(0)  # sums of zeros stay zeros, however often they are summed in place
    calls = [_calls(comm, contender) for contender in contenders]
    taken: list[list[float]] = [[] for _ in contenders]
    for turn in range(samples):
        for i in range(len(contenders)):
            i = (i + turn) % len(contenders)
            taken[i].append(_seconds(comm, contenders[i], calls[i]))
    slowest = np.array(taken)
    plain.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
    for plan in plans.values():
        plan.free()
    plain.Free()
    return {contender.name: times.tolist() for contender, times in zip(contenders, slowest, strict=True)}


def _check_sum(comm: MPI.Intracomm, contender: Contender) -> None:
    # Small whole numbers: every order of summation gives the same float32.
    pattern = np.arange(contender.source.size, dtype=np.float32) % 17
    np.add(pattern, comm.rank, out=contender.source)
    contender.call()
    right = pattern * comm.size + comm.size * (comm.size - 1) // 2
    verdicts = comm.allgather(bool(np.array_equal(contender.result, right)))
    if not all(verdicts):
        raise RuntimeError(f"{contender.name}: a wrong sum of {pattern.size} values on rank {verdicts.index(False)}")


def _seconds(comm: MPI.Intracomm, contender: Contender, calls: int) -> float:
    comm.Barrier()
    begin = time.perf_counter()
    for _ in range(calls):
        contender.call()
    return (time.perf_counter() - begin) / calls


def _calls(comm: MPI.Intracomm, contender: Contender) -> int:
    """Calls that make a sample long enough, the same number on all ranks."""
    _seconds(comm, contender, 1)
    seconds: float = comm.allreduce(_seconds(comm, contender, 1), MPI.MAX)
    return max(1, min(_MAX_CALLS, math.ceil(_SAMPLE_SECONDS / seconds)))


def _row(size: int, name: str, seconds: list[float], measured: Mapping[str, list[float]]) -> dict[str, Any]:
    median = statistics.median(seconds)
    best = min(statistics.median(measured[library]) for library in LIBRARY)
    return {
        "contender": name,
        "seconds": median,
        "samples": [float(f"{sample:.4g}") for sample in seconds],
        "times_the_library": best / median,
        "factor": 2 * (size - 1) / size,
    }


def _line(nbytes: int, row: Mapping[str, Any]) -> str:
    algbw = nbytes / row["seconds"]
    return (
        f"{_size(nbytes):>10}  {row['contender']:<22}{_time(row['seconds']):>10}{_speed(algbw):>12}"
        f"{_speed(algbw * row['factor']):>12}  {row['times_the_library']:.2f}x"
    )


def draw(kept: Mapping[str, Any], path: Path) -> None:
    """Draw results as they are kept: times and busbw by size. Raises ImportError without matplotlib, OSError."""
    picture = figure(10.5, 4.4)
    left, right = picture.subplots(1, 2)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in kept["results"]:
        by_name.setdefault(row["contender"], []).append(row)
    colors = iter(COLORS)
    for name, rows in by_name.items():
        library = name in LIBRARY
        style = {
            "color": "0.25" if library else next(colors),
            "linestyle": {LIBRARY[0]: "-", LIBRARY[1]: "--"}.get(name, "-"),
            "linewidth": 1.6,
            "marker": None if library else "o",
            "markersize": 3.5,
            "zorder": 3 if library else 2,
        }
        nbytes = [row["nbytes"] for row in rows]
        label = "the library's, in place" if name == LIBRARY[0] else name.replace("library", "the library's,")
        left.plot(nbytes, [row["seconds"] for row in rows], label=label, **style)
        right.plot(nbytes, [row["nbytes"] / row["seconds"] * row["factor"] / 1e9 for row in rows], **style)
    for axes in (left, right):
        plain(axes)
        axes.set_xscale("log", base=2)
        ticks = sorted({row["nbytes"] for row in kept["results"]})
        axes.set_xticks(ticks, [_size(tick) for tick in ticks], rotation=40, ha="right", fontsize=8)
        axes.minorticks_off()
    left.set_yscale("log")
    left.yaxis.set_major_formatter(_tick)
    left.set_ylabel("time of a call, median")
    right.set_ylabel("busbw, GB/s")
    right.set_ylim(bottom=0)
    machine = kept["machine"]
    picture.legend(loc="outside right center", frameon=False, fontsize=8.5)
    picture.suptitle(
        f"AllReduce, {machine['ranks']} ranks, {machine['versions']['mpi']} at thread level "
        f"{machine['thread_level']}, {machine['processor']}, {machine['cores_of_node']} cores",
        fontsize=10,
    )
    picture.savefig(path)


def _tick(seconds: float, position: int | None) -> str:
    return _time(seconds)


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    raise AssertionError


def _speed(nbytes_a_second: float) -> str:
    for unit, scale in (("GB/s", 1e9), ("MB/s", 1e6)):
        if nbytes_a_second >= scale:
            return f"{nbytes_a_second / scale:.3g} {unit}"
    return f"{nbytes_a_second / 1e3:.3g} kB/s"


def _time(seconds: float) -> str:
    for unit, scale in (("µs", 1e6), ("ms", 1e3)):
        if seconds * scale < 1000:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"
