"""A large update that travels in segments, beside one that travels whole: three hosts, one of which has the shard.

    python benchmarks/store_segments.py --json FILE

It starts three emulated hosts of one rank (hosts.py; needs root) and runs itself on them. Rank 0 has the only shard,
and sleeps. Rank 1 pushes (``inc``, until a read says that it is applied). Meanwhile rank 2 makes updates of 32 KiB, of
a parameter of its own, one after the other, each until a read says that it is applied; and as many while nobody else
does anything. Both ways take turns, and what is told are medians; of small updates the slowest tenth, too. Memory is
what rank 0 takes beyond what it had before the first update of a store, at the most: what is received, and not yet
given back. For that it has large blocks from the system, and gives them back to it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import hosts
import numpy as np

SMALL = 32 << 10
_TIMES = 5
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_WAYS = {"segments": 4 << 20, "whole": 1 << 40}  # bytes of a segment


def main() -> int:
    parser = argparse.ArgumentParser(description="A large update in segments, and whole.")
    hosts.add_options(parser, hosts=3, rate="1gbit")
    parser.add_argument("--values", type=int, default=4 << 20, help="float32 values of the large update (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    asked = parser.parse_args()
    if hosts.lab() is None:
        return hosts.rerun(asked)
    work(asked)
    return 0


def work(asked: argparse.Namespace) -> None:
    """Measure, print, and keep the results. Collective, of three ranks."""
    from mpi4py import MPI

    from bitring.commands._ranks import ending_together, limit_threads
    from bitring.nodes import describe

    comm, lab = MPI.COMM_WORLD, hosts.lab()
    assert lab is not None
    with ending_together(comm):
        limit_threads(comm)
        if comm.rank == 0:
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)
        found: dict[str, dict[str, list[float]]] = {way: {} for way in _WAYS}
        for number in range(_TIMES + 1):
            for way in _WAYS:
                once = turn(comm, way, asked.values)
                for name, values in once.items() if number else ():
                    found[way].setdefault(name, []).extend(values)
        results = {way: told(comm, each) for way, each in found.items()}
        machine = describe(comm)
        if comm.rank == 0:
            for way, each in results.items():
                for name, value in each.items():
                    print(f"{way:10} {name:36} {value:12.4g}")
            if asked.json:
                network = {"emulated": True, **lab._asdict()}
                kept = {"benchmark": "store_segments", "network": network, "machine": machine}
                kept |= {"values": asked.values, "results": results}
                asked.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def turn(comm: Any, way: str, n: int) -> dict[str, list[float]]:
    """Seconds of this rank's updates, and bytes of memory."""
    import bitring
    from bitring.training.store import segments

    segments.SEGMENT_NBYTES = _WAYS[way]
    values = {"large": np.zeros(n, np.float32), "small": np.zeros(SMALL // 4, np.float32)}
    g = {name: np.ones(w.shape, np.float32) for name, w in values.items()}
    store = bitring.ParameterStore(values, bitring.SGD(lr=1.0), comm=comm, servers=1)

    def push(name: str) -> float:
        began = time.perf_counter()
        store.inc({name: g[name]})
        store.get(rows={name: [0]})
        return time.perf_counter() - began

    times: dict[str, list[float]] = {}
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins again
    comm.Barrier()
    if comm.rank == 2:
        times["small_alone_seconds"] = [push("small") for _ in range(20)]
    asleep(comm)
    if comm.rank == 1:
        times["push_seconds"] = [push("large") for _ in range(3)]
    elif comm.rank == 2:
        until = time.perf_counter() + 3 * 4 * n / 125e6
        times["small_beside_seconds"] = []
        while time.perf_counter() < until:
            times["small_beside_seconds"].append(push("small"))
    asleep(comm)
    if comm.rank == 0:
        times["memory_bytes"] = [float(memory("VmHWM") - before)]
    if not (store.synchronize()["large"] == -3.0).all():
        raise SystemExit("store_segments.py: updates were lost")
    store.free()
    return times


def memory(field: str) -> int:
    """Bytes of this process, now or at the most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def asleep(comm: Any) -> None:
    """Wait for the others without a core."""
    done = comm.Ibarrier()
    while not done.Test():
        time.sleep(1e-3)


def told(comm: Any, mine: dict[str, list[float]]) -> dict[str, float]:
    """Medians of all ranks' measurements, each of which one rank has made."""
    result: dict[str, float] = {}
    for each in comm.allgather(mine):
        for name, values in each.items():
            result[name] = statistics.median(values)
            if name.startswith("small"):
                result[f"{name}_slowest_tenth"] = sorted(values)[9 * len(values) // 10]
    return result


if __name__ == "__main__":
    sys.exit(main())
