"""AllReduce of a JAX array inside ``jit``, against the same call outside and against NumPy's.

    mpirun -n 2 python benchmarks/jax_allreduce.py --json FILE --plot FILE
    python benchmarks/jax_allreduce.py --draw --json FILE --plot FILE      # of what was measured before

The ways take turns, so that what else the machine does hits all alike. Milliseconds of the slower rank: the median,
and the lower decile, which says what it costs where nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from mpi4py import MPI

import bitring
import bitring.jax
from bitring.jax import primitive
from bitring.nodes import describe

SIZES = {"4 KiB": 1 << 10, "1 MiB": 1 << 18, "16 MiB": 1 << 22, "64 MiB": 1 << 24}


def ways_of(count: int) -> dict[str, Callable[[], Any]]:
    x = jnp.ones(count, jnp.float32)
    host = np.ones(count, np.float32)
    inside = jax.jit(lambda x: bitring.jax.allreduce(x))
    called_back = jax.jit(lambda x: bitring.jax.allreduce(x))
    with mock.patch.object(primitive, "registered", return_value=False):
        jax.block_until_ready(called_back(x))
    return {
        "bitring.allreduce of NumPy's": lambda: bitring.allreduce(host),
        "eager": lambda: jax.block_until_ready(bitring.jax.allreduce(x)),
        "inside jit": lambda: jax.block_until_ready(inside(x)),
        "inside jit, by callback": lambda: jax.block_until_ready(called_back(x)),
    }


def measure(comm: MPI.Intracomm, count: int, rounds: int) -> dict[str, list[float]]:
    ways = ways_of(count)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 3):
        for name, call in ways.items():
            comm.Barrier()
            began = time.perf_counter()
            call()
            took = comm.allreduce(time.perf_counter() - began, MPI.MAX)
            if number >= 3:
                seconds[name].append(took)
    return {
        name: [round(1e3 * x, 3) for x in (statistics.median(each), statistics.quantiles(each, n=10)[0])]
        for name, each in seconds.items()
    }


def plot(milliseconds: dict[str, dict[str, list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    axes: Any = figure.subplots(1, len(milliseconds))
    for axis, (size, found) in zip(axes, milliseconds.items(), strict=True):
        names = list(found)[::-1]
        bars = axis.barh(names, [found[name][0] for name in names])
        axis.plot([found[name][1] for name in names], names, "|", color="0.1", markersize=14)
        axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        axis.margins(x=0.25)
        axis.set_title(size)
        axis.set_xlabel("ms, median;\nthe line: lower decile")
        if axis is not axes[0]:
            axis.set_yticklabels([])
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--rounds", type=int, default=60)
    given = parser.parse_args()
    if given.draw:
        plot(json.loads(given.json.read_text(encoding="utf-8"))["milliseconds"], given.plot)
        return
    comm = MPI.COMM_WORLD
    whole: dict[str, Any] = {
        "machine": describe(comm),
        "jax": jax.__version__,
        "milliseconds": {},
        "figures": ["median", "lower decile"],
    }
    for name, count in SIZES.items():
        found = measure(comm, count, given.rounds)
        whole["milliseconds"][name] = found
        if comm.rank == 0:
            print(f"{name}: {found}", flush=True)
    if given.json and comm.rank == 0:
        given.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if given.plot and comm.rank == 0:
        plot(whole["milliseconds"], given.plot)


if __name__ == "__main__":
    main()
