"""A picture of clocks over time, and of who waited for whom: ranks at their own pace, under bounded staleness.

    mpirun -n 4 python benchmarks/clocks.py --mode ssp:staleness=3 --picture FILE

Every step of a rank is a sleep of 20 ms. Rank 1 is held up for half a second once; the last rank takes 2.5 times as
long from the middle on. Lines are the ranks' clocks; their level parts are waits. Beside each is the rank for which it
has waited longest, by its telemetry (``waited_for``), and for how long.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from mpi4py import MPI

import bitring

_STEP_SECONDS = 0.02


def main() -> None:
    """Make the steps, and draw them. Collective."""
    parser = argparse.ArgumentParser(description="A picture of clocks over time.")
    parser.add_argument("--mode", default="ssp:staleness=3", help="%(default)s")
    parser.add_argument("--steps", type=int, default=60, help="%(default)s")
    parser.add_argument("--picture", type=Path, required=True, help="a file to draw into")
    asked = parser.parse_args()
    comm = MPI.COMM_WORLD
    w, g = {"w": np.zeros(100, np.float32)}, {"w": np.ones(100, np.float32)}
    trainer = bitring.DataParallel(w, "sgd", comm=comm, mode=asked.mode)
    comm.Barrier()
    began = time.perf_counter()
    ticks = [0.0]
    with trainer:
        for step in range(asked.steps):
            late = comm.rank == comm.size - 1 and step > asked.steps // 2
            time.sleep(_STEP_SECONDS * (2.5 if late else 1))
            if comm.rank == 1 and step == asked.steps // 5:
                time.sleep(0.5)
            trainer.step(g)
            ticks.append(time.perf_counter() - began)
    told: list[tuple[list[float], dict[int, float]]] = comm.gather((ticks, trainer.telemetry()["waited_for"])) or []
    if comm.rank == 0:
        draw(asked.picture, asked.mode, told)
    trainer.synchronize()
    trainer.free()


def draw(path: Path, mode: str, told: list[tuple[list[float], dict[int, float]]]) -> None:
    """The picture; ``told``: of each rank when its clock moved, and for whom it has waited."""
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    axes: Any
    for rank, (ticks, waited_for) in enumerate(told):
        label = f"rank {rank}"
        if waited_for:
            longest = max(waited_for, key=lambda each: waited_for[each])
            label += f": {waited_for[longest]:.2f} s for rank {longest}"
        axes.step(ticks, range(len(ticks)), where="post", label=label)
    axes.set(xlabel="seconds", ylabel="clock", title=f"{mode}, {len(told)} ranks: who waited for whom")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
