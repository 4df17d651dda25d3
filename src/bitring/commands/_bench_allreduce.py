"""The measurement of ``bitring bench allreduce``. Importing this initialises MPI."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from mpi4py import MPI

from bitring.arrays import BFLOAT16
from bitring.collectives.base_plan import Plan
from bitring.collectives.communicator import Communicator
from bitring.collectives.plan import library_reduces
from bitring.collectives.runtime.context import context_of
from bitring.collectives.schedules.schedule import algorithms
from bitring.commands._others import LIBRARY, Others
from bitring.commands._pictures import COLORS, figure, plain, size_text
from bitring.commands._ranks import ending_together, limit_threads, together
from bitring.commands._timing import Contender, Times, check_sums, sample
from bitring.compression.plans.plan import plan_allreduce
from bitring.machine import THREAD_LEVELS
from bitring.native import address_of, extension, kernel
from bitring.nodes import describe

RESIDENT, PRIVATE, CALL = "auto, resident", "auto", "plain call"
"""A plan on memory of ``Communicator.empty``, a plan on ordinary arrays, and ``Communicator.Allreduce`` on such."""

LIMIT = "limit"
"""The memory's: all ranks together reduce all ranks' buffers into all of them, in place, and wait for nothing."""

_LIMIT_FROM_NBYTES = 64 << 10

_LEAST_SAMPLES = 5


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype named so, bfloat16 included. Raises ValueError unless it is one of numbers."""
    try:
        dtype = np.dtype(BFLOAT16 if name == "bfloat16" else name)
    except TypeError:
        dtype = np.dtype(object)
    if dtype != BFLOAT16 and dtype.kind not in "iuf":
        raise ValueError(f"--dtype must name numeric types, such as float32 or bfloat16; got {name!r}")
    return dtype


def run(
    json_path: Path | None,
    plot: Path | None,
    sizes: list[int],
    names: list[str] | None,
    dtypes: list[str],
    samples: int,
    seconds: float,
) -> None:
    """Measure, print, and keep the results. Collective."""
    world = MPI.COMM_WORLD
    with ending_together(world), contextlib.ExitStack() as stack:
        together(world, lambda: _check(world, json_path, plot, names, dtypes))
        limit_threads(world)
        machine = describe(world)
        comm = Communicator(MPI.Intracomm(world).Dup())
        others = stack.enter_context(contextlib.closing(Others(MPI.Intracomm(world).Dup(), machine)))
        if comm.rank == 0:
            click.echo(
                f"allreduce, {comm.size} ranks on {machine['nodes']} node{'s' * (machine['nodes'] > 1)}, "
                f"{machine['versions']['mpi']}, thread level {machine['thread_level']}, {machine['processor']}"
            )
            for remark in others.remarks:
                click.echo(remark)
        results: list[dict[str, Any]] = []
        for dtype in dtypes:
            if comm.rank == 0:
                click.echo(
                    f"{dtype:>10}  {'contender':<34}{'median':>10}{'processors':>12}{'algbw':>12}{'busbw':>12}  "
                    f"{'of the limit':>12}  "
                    "against the library's best"
                )
            for nbytes in sizes:
                n = max(nbytes // dtype_of(dtype).itemsize, 1)
                measured = measure(comm, n, names or algorithms.names(), samples, dtype_of(dtype), seconds, others)
                rows = [
                    {"nbytes": n * dtype_of(dtype).itemsize, "dtype": dtype, **_row(comm.size, name, measured)}
                    for name in measured
                ]
                results += rows
                if comm.rank == 0:
                    for row in rows:
                        click.echo(_line(row))
        if comm.rank == 0:
            kept = {"benchmark": "allreduce", "machine": machine, "remarks": others.remarks, "results": results}
            if json_path is not None:
                json_path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            if plot is not None:
                draw(kept, plot)


def _check(
    comm: MPI.Intracomm, json_path: Path | None, plot: Path | None, names: list[str] | None, dtypes: list[str]
) -> None:
    for name in names or []:
        algorithms.get(name)
    for name in dtypes:
        dtype_of(name)
    if comm.rank != 0:
        return
    for path in (json_path, plot):
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    if plot is not None:
        figure(1, 1)
        if plot.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--plot must end in .png, .svg or .pdf; got {plot}")


def measure(
    comm: Communicator,
    n: int,
    names: Sequence[str],
    samples: int,
    dtype: np.dtype[Any],
    seconds: float,
    others: Others | None = None,
) -> dict[str, Times]:
    """Times of an AllReduce of ``n`` values, by contender: ``samples`` of each, fewer where ``seconds`` run out.

    Contenders are the algorithms ``names``, as far as they can be had here, ``"auto"``, and all ``others``. All ranks
    return the same. Raises RuntimeError on all ranks when a sum is wrong. Collective.
    """
    with _contenders(comm, n, names, dtype, others) as contenders:
        check_sums(comm, contenders)
        return sample(comm, contenders, samples, seconds, _LEAST_SAMPLES)


@contextlib.contextmanager
def _contenders(
    comm: Communicator, n: int, names: Sequence[str], dtype: np.dtype[Any], others: Others | None
) -> Generator[list[Contender]]:
    x = np.empty(n, dtype)
    shared = comm.empty(n, dtype)
    plans: list[Plan] = []

    def planned(name: str, array: Any, algorithm: str) -> Contender:
        plans.append(plan_allreduce(array, comm=comm, algorithm=algorithm))
        return Contender(name, plans[-1], array, array)

    found = [planned(name, x, name) for name in names]
    found = [each for each, plan in zip(found, plans, strict=True) if plan.algorithm == each.name]
    found += [
        planned(RESIDENT, shared, "auto"),
        planned(PRIVATE, x, "auto"),
        Contender(CALL, partial(comm.Allreduce, MPI.IN_PLACE, x), x, x),
    ]
    own = MPI.Intracomm(comm).Dup()
    if library_reduces(x, MPI.SUM):
        y = np.empty(n, dtype)
        level = THREAD_LEVELS[MPI.Query_thread()]
        found += [
            Contender(f"{LIBRARY[0]}, {level}", partial(MPI.Intracomm.Allreduce, own, MPI.IN_PLACE, x), x, x),
            Contender(f"{LIBRARY[1]}, {level}", partial(MPI.Intracomm.Allreduce, own, x, y), x, y),
        ]
    if others is not None:
        found += others.contenders(x)
    if (limit := _limit(comm, shared)) is not None:
        found.append(Contender(LIMIT, limit))
    try:
        yield found
    finally:
        for plan in plans:
            plan.free()
        own.Free()


def _limit(comm: Communicator, shared: Any) -> Callable[[], None] | None:
    """This rank's part of reducing all ranks' buffers into all of them; None where they are not mapped here, or small.

    Of ``p`` ranks' buffers of ``n`` values, ``p·n`` values are read and ``p·n`` written.
    """
    common = context_of(comm).common
    region = None if common is None else common.region_of(shared)
    function = kernel("add", shared.dtype)
    if shared.nbytes < _LIMIT_FROM_NBYTES or not comm.allreduce(region is not None and function != 0, MPI.LAND):
        return None
    assert region is not None
    first, last = (shared.size // 64 * part // comm.size * 64 for part in (comm.rank, comm.rank + 1))
    last = shared.size if comm.rank == comm.size - 1 else last
    offset = address_of(shared) - region.address(region.rank) + first * shared.itemsize
    places = [region.address(r) + offset for r in range(comm.size)]
    return partial(extension.reduce, function, last - first, places, places)


def _row(size: int, name: str, measured: Mapping[str, Times]) -> dict[str, Any]:
    medians = {each: statistics.median(times.seconds) for each, times in measured.items()}
    processor = statistics.median(measured[name].processor)
    best = min((each for each in medians if is_library(each)), key=medians.__getitem__, default=None)
    return {
        "contender": name,
        "seconds": medians[name],
        "processor_seconds": None if math.isnan(processor) else processor,
        "samples": [float(f"{each:.4g}") for each in measured[name].seconds],
        "times_the_library": None if best is None else medians[best] / medians[name],
        "best_of_the_library": best,
        "of_the_limit": medians[LIMIT] / medians[name] if LIMIT in medians else None,
        "factor": 2 * (size - 1) / size,
    }


def is_library(name: str) -> bool:
    """Whether the contender is the MPI library's own call."""
    return name.startswith(LIBRARY)


def _line(row: Mapping[str, Any]) -> str:
    algbw = row["nbytes"] / row["seconds"]
    name, limit, ratio = row["contender"], row["of_the_limit"], row["times_the_library"]
    used = "" if row["processor_seconds"] is None else _time(row["processor_seconds"])
    return (
        f"{size_text(row['nbytes']):>10}  {name:<34}{_time(row['seconds']):>10}{used:>12}{_speed(algbw):>12}"
        f"{_speed(algbw * row['factor']):>12}  {'' if limit is None else f'{limit:.0%}':>12}"
        f"  {'' if ratio is None else f'{ratio:.2f}x'}{' (best)' if name == row['best_of_the_library'] else ''}"
    ).rstrip()


def draw(kept: Mapping[str, Any], path: Path) -> None:
    """Draw results as they are kept: times and busbw by size. Raises ImportError without matplotlib, OSError."""
    picture = figure(11, 4.6)
    left, right = picture.subplots(1, 2)
    by_name: dict[str, list[dict[str, Any]]] = {}
    dtypes = sorted({row["dtype"] for row in kept["results"]})
    for row in kept["results"]:
        name = row["contender"] if len(dtypes) == 1 else f"{row['contender']}, {row['dtype']}"
        by_name.setdefault(name, []).append(row)
    styles = {RESIDENT: (COLORS[0], "o", "-"), PRIVATE: (COLORS[1], "o", "-"), CALL: (COLORS[2], "o", "--")}
    cycle: list[tuple[str, str | None, str]] = [
        (color, None, line) for line in ("-", ":", "-.") for color in COLORS[3:]
    ]
    for name, rows in by_name.items():
        contender = rows[0]["contender"]
        style: tuple[str, str | None, str]
        if is_library(contender):
            style = ("0.25" if "multiple" in contender else "0.55", None, "--" if LIBRARY[1] in contender else "-")
        elif contender == LIMIT:
            style = ("0", None, ":")
        elif contender in styles and len(dtypes) == 1:
            style = styles[contender]
        else:
            style = cycle[0]
            cycle = [*cycle[1:], style]
        color, marker, line = style
        drawn = {"color": color, "marker": marker, "linestyle": line, "linewidth": 1.5, "markersize": 3.5}
        nbytes = [row["nbytes"] for row in rows]
        label = name.replace("library", "the library's", 1) if is_library(name) else name
        left.plot(nbytes, [row["seconds"] for row in rows], label=label, **drawn)
        right.plot(nbytes, [row["nbytes"] / row["seconds"] * row["factor"] / 1e9 for row in rows], **drawn)
    for axes in (left, right):
        plain(axes)
        axes.set_xscale("log", base=2)
        ticks = sorted({row["nbytes"] for row in kept["results"]})
        axes.set_xticks(ticks, [size_text(tick) for tick in ticks], rotation=40, ha="right", fontsize=8)
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
