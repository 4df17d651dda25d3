"""A store whose updates and answers travel as one bit per value, served natively and in Python, in turn.

    mpirun -n 2 python benchmarks/store_onebit.py --json FILE

Shards are on all ranks, reached by messages. All ranks make updates, each followed by a fetch of everything, at their
own pace: how many of these pairs a rank makes per second. Then the last rank makes some while the others compute in
Python: how long one takes. What is told are medians.
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
from bitring.commands._ranks import ending_together, limit_threads
from bitring.nodes import describe
from bitring.training.store import native_service
from bitring.training.store.messages import MessageTable
from bitring.training.store.rule import Terms
from bitring.training.store.table import Setup, Update

_VALUES = (1 << 10, 1 << 18, 1 << 20)
_TIMES = 9
_PAIRS = 8  # at least, and while the others compute


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description="A store with one bit per value, served natively and in Python.")
    parser.add_argument("--json", type=Path, help="keep the results here")
    asked = parser.parse_args()
    comm = MPI.COMM_WORLD
    with ending_together(comm):
        limit_threads(comm)
        results = [of(comm, n) for n in _VALUES]
        machine = describe(comm)
    if comm.rank == 0:
        for result in results:
            print(", ".join(f"{name} {value:.4g}" for name, value in result.items()))
        if asked.json:
            whole = {"benchmark": "store_onebit", "machine": machine, "results": results}
            asked.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def of(comm: MPI.Intracomm, n: int) -> dict[str, float]:
    """Both services' figures for n float32 values."""
    able = native_service.serves
    found: dict[str, list[float]] = {}
    for number in range(_TIMES + 1):
        for way in ("native", "python"):
            native_service.serves = able if way == "native" else lambda *_: False
            rate, seconds = once(comm, n)
            if number:
                found.setdefault(f"{way}_pairs_per_second", []).append(rate)
                found.setdefault(f"{way}_seconds_beside_computing", []).append(seconds)
    native_service.serves = able
    result = {name: statistics.median(each) for name, each in found.items()}
    for name in ("pairs_per_second", "seconds_beside_computing"):
        result[f"{name}_native_of_python"] = result[f"native_{name}"] / result[f"python_{name}"]
    return {"ranks": comm.size, "values": n, **result}


def once(comm: MPI.Intracomm, n: int) -> tuple[float, float]:
    """Pairs per second of a rank, and seconds of one to ranks that compute, the same on all ranks."""
    g = np.ones(n, np.float32)
    encoder = bitring.OneBit()
    encoder.warm_up(np.float32)
    values, encoders = {"w": np.zeros(n, np.float32)}, {"w": encoder}
    table = MessageTable(Setup(comm, "store_onebit.py", values, bitring.SGD(lr=1e-3), Terms(), encoders=encoders))

    def pairs(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            table.push(Update({"w": g}, {}))
            table.pull()
        return (time.perf_counter() - began) / count

    pairs(1)
    comm.Barrier()
    rate = 1 / (comm.allreduce(pairs(max(_PAIRS, (1 << 20) // n))) / comm.size)
    comm.Barrier()
    seconds = 0.0
    if comm.rank == comm.size - 1:
        seconds = pairs(_PAIRS)
        for rank in range(comm.size - 1):
            comm.send(None, rank)
    else:
        compute_until_told(comm)
    applied = comm.allreduce(table.counts()["applied"])
    table.settle()
    table.free()
    if not applied:
        raise SystemExit("store_onebit.py: nothing was applied")
    told: float = comm.bcast(seconds, comm.size - 1)
    return rate, told


def compute_until_told(comm: Any) -> None:
    """In Python, holding the interpreter."""
    numbers = [0.5] * 1000
    while not comm.iprobe(comm.size - 1):
        sum(numbers)
    comm.recv(source=comm.size - 1)


if __name__ == "__main__":
    main()
