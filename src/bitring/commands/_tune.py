"""The measurement of ``bitring tune``. Importing this initialises MPI."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from mpi4py import MPI

from bitring.collectives.base_plan import Plan
from bitring.collectives.communicator import Communicator
from bitring.collectives.interop.mpi_library import library_version
from bitring.collectives.plan import library_reduces
from bitring.collectives.runtime.context import context_of
from bitring.collectives.schedules.schedule import algorithms
from bitring.collectives.selection.table import BUILT_IN, Rules, crossovers, path_of_table, read_table, write_table
from bitring.commands._bench_allreduce import dtype_of
from bitring.commands._pictures import size_text
from bitring.commands._ranks import ending_together, fail, limit_threads, together
from bitring.commands._terminal import terminal_width
from bitring.commands._timing import Contender, check_sums, sample
from bitring.compression.plans.plan import plan_allreduce
from bitring.nodes import node_map

_SAMPLES = 15

_AGREEMENT = 1.05


def run(sizes: list[int], dtypes: list[str], seconds: float) -> None:
    """Measure, write the table and print it. Collective."""
    world = MPI.COMM_WORLD
    with ending_together(world):
        path = path_of_table()
        together(world, lambda: _check(world, dtypes, path))
        if world.size == 1:
            fail(world, "there is nothing to choose for one rank; try: mpirun -n 4 bitring tune")
        limit_threads(world)
        comm = Communicator(MPI.Intracomm(world).Dup())
        rules: list[Rules] = []
        progress = _Progress(len(dtypes) * 2 * len(sizes) if world.rank == 0 else 0)
        for name in dtypes:
            for resident in (False, True):
                measured = {
                    nbytes: _measure(comm, nbytes, dtype_of(name), resident, seconds, progress)
                    for nbytes in sorted(set(sizes))
                }
                measured = {nbytes: medians for nbytes, medians in measured.items() if medians}
                if measured:
                    rules.append(_rules(comm, dtype_of(name).itemsize, resident, measured))
        progress.end()
        if world.rank == 0:
            for each in rules:
                click.echo(f"{each.title}: {_ranges(each)}")
        together(world, lambda: _write(path, rules) if world.rank == 0 else None)
        if world.rank == 0:
            click.echo(f"written to {path}")


def _check(comm: MPI.Intracomm, dtypes: list[str], path: Path) -> None:
    for name in dtypes:
        if not library_reduces(np.empty(0, dtype_of(name)), MPI.SUM):
            raise ValueError(f"--dtype must name types that the MPI library reduces, to compare with it; got {name}")
    if comm.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)


def _write(path: Path, rules: list[Rules]) -> None:
    try:
        before = read_table(path)
    except (OSError, ValueError):  # none, or none worth keeping
        before = BUILT_IN
    write_table(path, before.merged(rules))


def _measure(
    comm: Communicator, nbytes: int, dtype: np.dtype[Any], resident: bool, seconds: float, progress: _Progress
) -> dict[str, float]:
    """Median seconds by algorithm; nothing where no memory is shared but was wanted. Collective."""
    n = max(nbytes // dtype.itemsize, 1)
    array = comm.empty(n, dtype) if resident else np.empty(n, dtype)
    shared = context_of(comm).shared
    if resident and not comm.allreduce(shared is not None and shared.region_of(array) is not None, MPI.LAND):
        return {}
    plans: list[Plan] = [plan_allreduce(array, comm=comm, algorithm=name) for name in algorithms.names()]
    contenders = [
        Contender(name, plan, array, array)
        for name, plan in zip(algorithms.names(), plans, strict=True)
        if plan.algorithm == name
    ]
    check_sums(comm, contenders)
    taken = sample(comm, contenders, _SAMPLES, seconds, least=3)
    for plan in plans:
        plan.free()
    progress.advance()
    return {name: statistics.median(times.seconds) for name, times in taken.items()}


def _rules(comm: Communicator, itemsize: int, resident: bool, measured: dict[int, dict[str, float]]) -> Rules:
    native, nodes = context_of(comm).topology.native, len(node_map(comm))
    if nodes > 1:
        measured = {nbytes: as_calls(medians) for nbytes, medians in measured.items()}
    return Rules(library_version(), comm.size, nodes, itemsize, resident, native, crossovers(measured))


def as_calls(medians: dict[str, float]) -> dict[str, float]:
    """What plans took, such that between nodes an algorithm which checks itself is taken unless another is 5% faster.

    A call without a plan by any other has an agreement before it.
    """
    checking = {name for name in medians if algorithms.get(name).self_checking}
    return {name: seconds * (1 if name in checking else _AGREEMENT) for name, seconds in medians.items()}


def _ranges(rules: Rules) -> str:
    first, *others = rules.best
    return ", ".join([first[1], *(f"{name} from {size_text(start)}" for start, name in others)])


class _Progress:
    """A line on a terminal that says how far it is; nothing elsewhere."""

    def __init__(self, parts: int) -> None:
        self._show = partial(click.echo, nl=False) if parts and terminal_width() else None
        self._parts = parts
        self._done = 0

    def advance(self) -> None:
        """One more part is done."""
        self._done += 1
        if self._show is not None:
            self._show(f"\rmeasured {self._done} of {self._parts}")

    def end(self) -> None:
        """Clear the line."""
        if self._show is not None:
            self._show("\r\x1b[K")
