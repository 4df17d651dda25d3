"""What a plan of a small array costs beyond its messages.

    python benchmarks/fixed_cost.py --hosts 2 --rate none --json FILE

Starts emulated hosts (hosts.py; needs root) and runs itself on them; their number is a power of two, of one rank each.
A plan takes turns with the same sum in C++, recursive doubling over ``MPI_Sendrecv`` (fixed_cost.cpp, compiled by the
``mpicxx`` beside this Python), and with the MPI library's own call. Results are checked before they are timed.
``fixed_seconds`` is the plan's time less that of the sum in C++: the median of the differences of neighbouring samples,
each the slowest rank's mean. ``python_seconds`` is from the plan's call to its first ``MPI_Isend``, the median of
single calls on rank 0, less what it takes to read the clock.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hosts
import numpy as np
from network_allreduce import duration, size, sizes

_SOURCE = Path(__file__).with_suffix(".cpp")
_BUILT = _SOURCE.parents[1] / "build" / "fixed_cost"
_SAMPLE_SECONDS = 5e-3


def main() -> int:
    parser = argparse.ArgumentParser(description="What a plan of a small array costs beyond its messages.")
    hosts.add_options(parser, hosts=2, rate="none")
    parser.add_argument("--sizes", type=sizes, default="8,64,512,4KiB,16KiB", help="%(default)s")
    parser.add_argument("--samples", type=int, default=151, help="times each is timed (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    asked = parser.parse_args()
    if hosts.lab() is None:
        if asked.ranks_per_host != 1 or asked.hosts & (asked.hosts - 1):
            parser.error("--hosts: a power of two, of one rank each")
        build()
        return hosts.rerun(asked)
    work(asked)
    return 0


def library() -> Path:
    """Where the compiled C++ is, for the MPI library of this environment."""
    return _BUILT / f"{Path(sys.prefix).name}.so"


def build() -> None:
    """Compile it."""
    _BUILT.mkdir(parents=True, exist_ok=True)
    compiler = Path(sysconfig.get_path("scripts")) / "mpicxx"
    subprocess.run([compiler, "-O3", "-shared", "-fPIC", "-o", library(), _SOURCE], check=True)


def work(asked: argparse.Namespace) -> None:
    """Measure, print, and keep the results. Collective."""
    from mpi4py import MPI

    from bitring.collectives.interop import mpi_library
    from bitring.commands._ranks import ending_together, limit_threads
    from bitring.nodes import describe

    comm, lab = MPI.COMM_WORLD, hosts.lab()
    assert lab is not None
    bare = ctypes.CDLL(str(library()))
    bare.take_first_send.restype = ctypes.c_longlong
    mpi_library.library_path = lambda: str(library())  # it stands in front of the MPI library
    with ending_together(comm):
        limit_threads(comm)
        rows = [measure(comm, nbytes, asked.samples, bare) for nbytes in asked.sizes]
        machine = describe(comm)
        if comm.rank == 0:
            for row in rows:
                print(line(row))
        if comm.rank == 0 and asked.json:
            network = {"emulated": True, **lab._asdict()}
            kept = {"benchmark": "fixed_cost", "network": network, "machine": machine, "results": rows}
            asked.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def measure(comm: Any, nbytes: int, samples: int, bare: ctypes.CDLL) -> dict[str, Any]:
    """A row. Collective."""
    from mpi4py import MPI

    import bitring

    x, room = np.empty(nbytes // 4, np.float32), np.empty(nbytes // 4, np.float32)
    handle = (ctypes.c_int if MPI._sizeof(MPI.Comm) == 4 else ctypes.c_void_p)(MPI._handleof(comm))
    arguments = (ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(room.ctypes.data), x.size, handle)
    plan = bitring.plan_allreduce(x, comm=comm)

    def in_cpp(calls: int) -> None:
        if bare.recursive_doubling(*arguments, calls) != 0:
            raise RuntimeError("MPI_Sendrecv failed")

    def by_plan(calls: int) -> None:
        for _ in range(calls):
            plan()

    def by_library(calls: int) -> None:
        for _ in range(calls):
            comm.Allreduce(MPI.IN_PLACE, x)

    contenders = {"plan": by_plan, "bare": in_cpp, "library": by_library}
    for name, contender in contenders.items():
        x[:] = np.arange(x.size) % 17 + comm.rank
        contender(1)
        right = np.arange(x.size) % 17 * comm.size + comm.size * (comm.size - 1) // 2
        if not all(comm.allgather(bool(np.array_equal(x, right)))):
            raise RuntimeError(f"{name}: a wrong sum of {x.size} values")
    x.fill(0)
    calls = max(1, int(_SAMPLE_SECONDS / take(comm, in_cpp, 20)))
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(samples):
        for name in sorted(contenders, reverse=bool(turn % 2)):
            taken[name].append(take(comm, contenders[name], calls))
    pairs = zip(taken["plan"], taken["bare"], strict=True)
    return {
        "nbytes": nbytes,
        "algorithm": plan.algorithm,
        **{name: statistics.median(found) for name, found in taken.items()},
        "fixed_seconds": statistics.median(mine - least for mine, least in pairs),
        "python_seconds": before_first_send(comm, plan, bare),
    }


def before_first_send(comm: Any, plan: Callable[[], None], bare: ctypes.CDLL) -> float:
    """Seconds from a plan's call to its first message. Collective."""
    clock = time.perf_counter_ns
    reading = statistics.median(-(clock() - clock()) for _ in range(1000))
    found: list[float] = []
    for _ in range(1000):
        bare.take_first_send()
        begin = clock()
        plan()
        found.append(bare.take_first_send() - begin)
    comm.Barrier()
    return max(0.0, statistics.median(found) - reading) * 1e-9


def take(comm: Any, contender: Callable[[int], None], calls: int) -> float:
    """Seconds a call on the slowest rank. Collective."""
    from mpi4py import MPI

    comm.Barrier()
    begin = time.perf_counter()
    contender(calls)
    seconds: float = comm.allreduce(time.perf_counter() - begin, MPI.MAX)
    return seconds / calls


def line(row: dict[str, Any]) -> str:
    times = "".join(f"  {name} {duration(row[name])}" for name in ("plan", "bare", "library"))
    return (
        f"{size(row['nbytes']):>8}  {row['algorithm']}{times}  beyond the bare sum {row['fixed_seconds'] * 1e6:.2f} µs"
        f"  before the first message {row['python_seconds'] * 1e6:.2f} µs"
    )


if __name__ == "__main__":
    sys.exit(main())
