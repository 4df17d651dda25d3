"""Overlap: an AllReduce between emulated hosts beside a pure Python loop.

    python benchmarks/overlap.py --json FILE

Starts two hosts of one rank at 1 Gbit/s (hosts.py; needs root) and runs itself on them. Three things take turns: the
plan alone, ``plan()``; the loop beside the plan, from ``plan.start()`` until ``plan.test()``, asked every two
milliseconds, says that it is over; and as much of the loop alone. The first ratio is what the AllReduce took beside the
loop, against alone; the second what the loop took beside the AllReduce, against alone, so that only time in which both
ran counts. Each is of medians; a time is the slowest rank's.

What of it the kernel takes for TCP tells a fourth thing, where there are two hosts: as many bytes each way on a plain
connection, by two threads that wait in the kernel, beside the loop. What the loop takes beside the plan and not beside
these is bitring's and the MPI library's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import hosts
import numpy as np

_SLICE_SECONDS = 2e-3


def main() -> int:
    parser = argparse.ArgumentParser(description="An AllReduce beside a pure Python loop.")
    hosts.add_options(parser, hosts=2, rate="1gbit")
    parser.add_argument("--mib", type=float, default=16, help="size of the buffer of float32 (%(default)s)")
    parser.add_argument("--algorithm", default="auto", help="%(default)s")
    parser.add_argument("--samples", type=int, default=11, help="times each is timed (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    asked = parser.parse_args()
    if asked.hosts < 2:
        parser.error("--hosts: a network has at least 2")
    if asked.json is not None and not asked.json.absolute().parent.is_dir():
        parser.error(f"{asked.json} cannot be written: there is no folder {asked.json.parent}")
    lab = hosts.lab()
    if lab is None:
        return hosts.rerun(asked)
    work(asked, lab)
    return 0


def count(iterations: int) -> int:
    """The loop: what keeps the interpreter lock, and lets go of it only when asked to."""
    total = 0
    for i in range(iterations):
        total += i & 3
    return total


def work(asked: argparse.Namespace, lab: hosts.Lab) -> None:
    """Measure, print, and keep the results. Collective."""
    from mpi4py import MPI

    import bitring
    from bitring.commands._ranks import ending_together, limit_threads
    from bitring.nodes import describe

    comm = MPI.COMM_WORLD
    with ending_together(comm):
        limit_threads(comm)
        machine = describe(comm)
        x = np.empty(round(asked.mib * (1 << 20)) // 4, np.float32)
        plan = bitring.plan_allreduce(x, comm=comm, algorithm=asked.algorithm)
        check_sums(comm, plan, x)
        x.fill(0)  # sums of zeros stay zeros
        piece = iterations_in(_SLICE_SECONDS)
        alone: list[float] = []
        beside: list[float] = []
        loop_alone: list[float] = []  # seconds of a slice
        loop_beside: list[float] = []
        loop_beside_tcp: list[float] = []
        stream = hosts.Stream(1, 2) if comm.size == lab.hosts == 2 else None
        received = bytearray(x.nbytes)
        least = lab.least_seconds(2 * (lab.hosts - 1) * x.nbytes / lab.hosts)
        for _ in range(asked.samples):
            begin = together(comm)
            plan()
            alone.append(time.perf_counter() - begin)

            begin = together(comm)
            plan.start()
            slices = 0
            while not plan.test():
                count(piece)
                slices += 1
            beside.append(time.perf_counter() - begin)
            loop_beside.append(beside[-1] / max(slices, 1))

            begin = together(comm)
            for _ in range(slices):
                count(piece)
            loop_alone.append((time.perf_counter() - begin) / max(slices, 1))

            if stream is not None:
                begin = together(comm)
                threads = stream.exchange(x.data.cast("B"), memoryview(received))
                slices = 0
                while any(thread.is_alive() for thread in threads):
                    count(piece)
                    slices += 1
                loop_beside_tcp.append((time.perf_counter() - begin) / max(slices, 1))
        times = {
            name: slowest(comm, seconds)
            for name, seconds in {
                "alone": alone,
                "beside_the_loop": beside,
                "slice_alone": loop_alone,
                "slice_beside": loop_beside,
                "slice_beside_tcp": loop_beside_tcp,
            }.items()
        }
        if min(times["alone"] + times["beside_the_loop"]) * 1.01 < least:
            raise RuntimeError(f"{plan.algorithm}: faster than the wire, which needs {least:.4f} s")
        if comm.rank == 0:
            report(asked, lab, machine, bitring.explain(plan), x.nbytes, times)


def check_sums(comm: Any, plan: Any, x: Any) -> None:
    """Both ways to run the plan must give the right sum."""
    for run in (plan, lambda: (plan.start(), plan.wait())):
        x[:] = np.arange(x.size, dtype=np.float32) % 17 + comm.rank
        run()
        right = np.arange(x.size, dtype=np.float32) % 17 * comm.size + comm.size * (comm.size - 1) // 2
        if not all(comm.allgather(bool(np.array_equal(x, right)))):
            raise RuntimeError(f"{plan.algorithm}: a wrong sum of {x.size} values")


def iterations_in(seconds: float) -> int:
    """About as many iterations of the loop as take so long."""
    begin = time.perf_counter()
    count(1_000_000)
    return round(1_000_000 * seconds / (time.perf_counter() - begin))


def together(comm: Any) -> float:
    """When all ranks have come here. Collective."""
    comm.Barrier()
    return time.perf_counter()


def slowest(comm: Any, seconds: list[float]) -> list[float]:
    """Of each sample, the slowest rank's. Collective."""
    return [max(sample) for sample in zip(*comm.allgather(seconds), strict=True)]


def report(
    asked: argparse.Namespace,
    lab: hosts.Lab,
    machine: dict[str, Any],
    chosen: str,
    nbytes: int,
    times: dict[str, list[float]],
) -> None:
    medians = {name: statistics.median(seconds) for name, seconds in times.items() if seconds}
    kept = {
        "benchmark": "overlap",
        "dtype": "float32",
        "nbytes": nbytes,
        "algorithm": chosen,
        "network": {"emulated": True, **lab._asdict()},
        "machine": machine,
        "seconds": medians,
        "beside_against_alone": medians["beside_the_loop"] / medians["alone"],
        "loop_against_alone": medians["slice_beside"] / medians["slice_alone"],
        "loop_beside_tcp_against_alone": medians.get("slice_beside_tcp", math.nan) / medians["slice_alone"],
        "samples": {name: [float(f"{sample:.4g}") for sample in seconds] for name, seconds in times.items()},
    }
    print(
        f"AllReduce of {nbytes} bytes between {lab.hosts} emulated hosts ({chosen})\n"
        f"  alone                    {medians['alone'] * 1e3:8.1f} ms\n"
        f"  beside a Python loop     {medians['beside_the_loop'] * 1e3:8.1f} ms   "
        f"{kept['beside_against_alone']:.2f}x\n"
        f"  the loop beside it       {'':8}      {kept['loop_against_alone']:.2f}x its time alone\n"
        f"  the loop beside plain TCP                {kept['loop_beside_tcp_against_alone']:.2f}x"
    )
    if asked.json:
        asked.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
