"""Time to accuracy on the handwritten digits with slow ranks: modes of the parameter server against sync, in one run.

Ranks are slow by sleeping: a step takes ``WORK_SECONDS`` beside its computing, and what a case adds. Rank 0 looks at
the test samples after every tenth of its steps. Rates are such that all modes move about as far in as many samples:
with p ranks, sync's is p times the others', which make as many updates as sync has gradients; but `asynchronous`, which
divides its rate by the staleness itself, about p, takes sync's (as Zhang et al. do). Writes what was found to FILE.

    mpirun -n 4 python benchmarks/time_to_accuracy.py [FILE]
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import bitring
from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.nodes import describe

WORK_SECONDS = 0.01
WANTED = 0.945
LR = 0.05
SEEDS = 5
MOST_STEPS = 1500
CASES = {
    "equal ranks": ("asynchronous", "asynchronous:scale=none", "ssp:staleness=10"),
    "one rank 3x slower": ("asynchronous", "asynchronous:scale=none", "ssp:staleness=10"),
    "4% of steps 15x slower": ("asynchronous", "asynchronous:scale=none", "ssp:staleness=10"),
}


def seconds_to(comm: MPI.Intracomm, data: Any, mode: str, case: str, seed: int) -> float:
    """Seconds until rank 0 has reached the accuracy; infinite where it has not."""
    model = bitring.MLP(data.input_shape, data.classes, hidden=(64,), seed=seed)
    lr = LR * comm.size if mode in ("sync", "asynchronous") else LR
    trainer = bitring.DataParallel(model.parameters, bitring.SGD(lr=lr), comm=comm, mode=mode)
    delays = np.random.default_rng((seed, comm.rank))
    samples = np.random.default_rng((seed, comm.rank, 1))
    found = math.inf
    allgather(comm, None, "benchmark")
    begin = time.perf_counter()
    for step in range(MOST_STEPS):
        slow = 3.0 if case.startswith("one rank") and comm.rank == comm.size - 1 else 1.0
        if case.startswith("4%") and delays.random() < 0.04:
            slow = 15.0
        time.sleep(WORK_SECONDS * slow)
        mine = samples.integers(0, len(data.y_train), 16)
        _, gradients = model.loss_and_gradients(data.x_train[mine], data.y_train[mine])
        trainer.step(gradients, weight=len(mine))
        if mode == "sync" or comm.rank == 0:
            if step % 10 == 9 and model.accuracy(data.x_test, data.y_test) >= WANTED:
                found = time.perf_counter() - begin
                break
        elif math.isinf(trainer.clocks[0]):  # it has left
            break
    if mode != "sync":
        trainer.leave()
    trainer.synchronize()
    trainer.free()
    result: float = broadcast(comm, found, "benchmark")
    return result


def main() -> None:
    """Measure, and print a table."""
    comm = MPI.COMM_WORLD
    data, machine = bitring.load("digits"), describe(comm)
    rows: list[dict[str, Any]] = []
    for case, modes in CASES.items():
        seconds: dict[str, list[float]] = {mode: [] for mode in ("sync", *modes)}
        for seed in range(SEEDS):
            for mode, each in seconds.items():  # the contenders alternate
                each.append(seconds_to(comm, data, mode, case, seed))
        medians = {mode: statistics.median(each) for mode, each in seconds.items()}
        for mode, each in seconds.items():
            rows.append({"case": case, "mode": mode, "seconds": each, "of_sync": medians[mode] / medians["sync"]})
            if comm.rank == 0:
                print(f"{case:24} {mode:23} {medians[mode]:6.2f} s  {medians[mode] / medians['sync']:.2f} of sync")
    if comm.rank == 0 and len(sys.argv) > 1:
        settings = {"ranks": comm.size, "work_seconds": WORK_SECONDS, "accuracy": WANTED, "lr": LR, "seeds": SEEDS}
        found = {"machine": machine, **settings, "rows": rows}
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
