"""One slow replica among those of Sandblaster: portions with and without copies, against equal parts fixed beforehand.

    mpirun -n 4 python benchmarks/stragglers.py --json FILE --plot FILE

A portion takes its rank ``--portion-seconds``, on rank ``--slow`` 20 times as long: after computing, the rest in sleep.
With 64 portions per replica; the ideal is that all ranks compute without a pause until the last portion is there. Fixed
parts are the same portions, 64 to each rank, and a sum. Checked first: parameters to the bit as one rank has them, with
and without copies. Medians of three; ranks sleep most of the time, so that beside other work on the machine
``chrt -r 1 mpirun ...`` measures what it does alone. The picture is of who computed which portion.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import bitring
from bitring.commands._sandblaster import draw_portions
from bitring.nodes import describe

FACTOR, EACH = 20, 64
STEPS = 3
ROUNDS = 3

_WAKES_LATE = 2e-4
"""Seconds by which a sleep may be too long."""


class Sleeper(bitring.Softmax):
    """A model whose portions take as long as is said, computing included."""

    seconds = 0.0

    def loss_and_gradients(self, *args: Any, **more: Any) -> Any:
        """See Model."""
        end = time.perf_counter() + self.seconds
        result = super().loss_and_gradients(*args, **more)
        time.sleep(max(0.0, end - time.perf_counter() - _WAKES_LATE))
        while time.perf_counter() < end:
            pass
        return result


def data(ranks: int) -> tuple[Any, Any]:
    """Samples, four per portion."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4 * EACH * ranks, 16))
    return x, (x @ rng.standard_normal((16, 4))).argmax(1)


def trained(comm: MPI.Intracomm, x: Any, y: Any, portions: int, backups: bool, seconds: float) -> tuple[Any, ...]:
    """Seconds per evaluation, the parameters' bytes, and who computed what (rank 0). Collective."""
    model = Sleeper((16,), 4, dtype=np.float64, seed=1)
    job = bitring.Sandblaster(model, bitring.LBFGS(), comm=comm, portions=portions, backups=backups)
    job.synchronize()
    model.seconds = seconds
    begin = time.perf_counter()
    for _ in range(STEPS):
        job.step(x, y)
    took = (time.perf_counter() - begin) / job.evaluations
    model.seconds = 0
    values = b"".join(w.tobytes() for w in job.parameters().values())
    records = job.records
    job.free()
    return took, values, records


def main() -> None:
    """Check, measure, and print; rank 0 writes the files."""
    parser = argparse.ArgumentParser(description="One slow replica.")
    parser.add_argument("--slow", type=int, default=1)
    parser.add_argument("--portion-seconds", type=float, default=0.02)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    comm = MPI.COMM_WORLD
    x, y = data(comm.size)
    portions = EACH * comm.size
    machine = describe(comm)
    each = [asked.portion_seconds * (FACTOR if rank == asked.slow else 1) for rank in range(comm.size)]
    mine = each[comm.rank]
    alone = trained(MPI.COMM_SELF, x, y, portions, True, 0.0)[1]
    ideal = portions / sum(1 / seconds for seconds in each)
    taken: dict[str, list[float]] = {"portions with copies": [], "portions": []}
    twice: list[float] = []
    for turn in range(ROUNDS):
        for name, each_time in taken.items():  # the contenders alternate
            backups = name == "portions with copies"
            took, values, records = trained(comm, x, y, portions, backups, mine)
            same = comm.allreduce(values == alone, MPI.LAND)
            if not same:
                raise SystemExit(f"{name}: other parameters than one rank's")
            # The fast ranks' own clock: a slow rank may be late.
            each_time.append(min(comm.allgather(took)))
            if backups and comm.rank == 0:
                late = sum(not record.counts for record in records)
                twice.append(late / (len(records) - late))
                if asked.plot and turn == 0:
                    title = f"one of {comm.size} replicas {FACTOR} times slower, {portions} portions, copies"
                    draw_portions(records, asked.plot, title, evaluations=1)
    comm.barrier()
    model = Sleeper((16,), 4, dtype=np.float64, seed=1)
    model.seconds = mine
    begin = time.perf_counter()
    total = np.zeros(1)
    for i in range(EACH * comm.rank, EACH * (comm.rank + 1)):
        total += model.loss_and_gradients(x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4])[0]
    summed = comm.Iallreduce(MPI.IN_PLACE, total)
    while not summed.Test():
        time.sleep(1e-3)
    taken["fixed parts"] = [time.perf_counter() - begin]
    seconds = {"ideal": ideal} | {name: statistics.median(each_time) for name, each_time in taken.items()}
    if comm.rank == 0:
        for name, took in seconds.items():
            print(f"{name:22} {took:8.3f} s per evaluation, {took / ideal:6.3f} of the ideal", flush=True)
        extra = statistics.median(twice)
        print(f"computed twice: {extra:.1%} of the portions")
        found = {
            "benchmark": "stragglers",
            "machine": machine,
            "portions_per_replica": EACH,
            "seconds_per_portion": asked.portion_seconds,
            "slow_rank": asked.slow,
            "factor": FACTOR,
            "seconds_per_evaluation": seconds,
            "each": taken,
            "to_ideal": {name: took / ideal for name, took in seconds.items()},
            "computed_twice": extra,
        }
        if asked.json:
            asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
