"""Compressed AllReduces of 64 KiB to 1 MiB between emulated hosts: what they take beyond what they cannot avoid.

    python benchmarks/small_compressed.py --hosts 2 --rate none --json FILE --name after

Starts the hosts (hosts.py; needs root) and runs itself on them. Plans of one float32 matrix, summed in place, without
the look for NaN that DataParallel makes itself; the MPI library's call and an exact plan take turns with them. Replicas
are checked to be the same bits before they are timed. A sample is the mean of repeated calls on the slowest rank, less
what it takes to fill the array anew before each; a time is the samples' median.

``limit_seconds`` is what cannot be avoided: the payload bytes that leave a host over the rate of a plain TCP stream
measured here, and the seconds that the plan's own telemetry counts in kernels. ``remainder_seconds`` is the rest of the
plan's time: messages, the ranks' agreement, Python, waiting. ``python_calls`` are calls of Python functions and of
functions of extensions in one run of the plan.

``--name`` keeps the run under this name beside what FILE has, so that two versions of the library are measured in
turns: each from its own checkout, with this script and one FILE.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hosts
import numpy as np
from network_allreduce import carry, duration, make_stream, size, sizes

_SAMPLE_SECONDS = 20e-3
_STREAM_NBYTES = 8 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description="What small compressed AllReduces take beyond what they must.")
    hosts.add_options(parser, hosts=2, rate="1gbit")
    parser.add_argument("--sizes", type=sizes, default="64KiB,256KiB,1MiB", help="%(default)s")
    parser.add_argument(
        "--compressors",
        type=lambda text: text.split(","),
        default="onebit:levels=block,onebit:levels=rank_one,float16,topk",
        help="%(default)s",
    )
    parser.add_argument("--samples", type=int, default=15, help="times each is timed (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    parser.add_argument("--name", default="after", help="of these results there (%(default)s)")
    asked = parser.parse_args()
    lab = hosts.lab()
    if lab is None:
        return hosts.rerun(asked)
    work(asked, lab)
    return 0


def work(asked: argparse.Namespace, lab: hosts.Lab) -> None:
    """Measure, print, and keep the results. Collective."""
    from mpi4py import MPI

    from bitring.commands._ranks import ending_together, limit_threads
    from bitring.nodes import describe

    comm = MPI.COMM_WORLD
    with ending_together(comm):
        limit_threads(comm)
        rate = stream_rate(comm, lab)
        rows = [row for nbytes in asked.sizes for row in measure(comm, nbytes, asked, rate, lab)]
        machine = describe(comm)
        if comm.rank == 0:
            for row in rows:
                print(line(row))
        if comm.rank == 0 and asked.json:
            keep(asked, {"stream_bytes_per_second": rate, "machine": machine, "results": rows}, lab)


def keep(asked: argparse.Namespace, run: dict[str, Any], lab: hosts.Lab) -> None:
    """Add a run to the file."""
    kept: dict[str, Any] = {"benchmark": "small_compressed", "network": {"emulated": True, **lab._asdict()}, "runs": {}}
    if asked.json.exists():
        kept = json.loads(asked.json.read_text(encoding="utf-8"))
    kept["runs"].setdefault(asked.name, []).append(run)
    asked.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def stream_rate(comm: Any, lab: hosts.Lab) -> float:
    """Bytes per second of a plain TCP stream from each host to the next one, all at once."""
    stream = make_stream(comm, lab)
    taken: list[float] = []
    for _ in range(5):
        comm.Barrier()
        begin = time.perf_counter()
        carry(stream, memoryview(bytearray(_STREAM_NBYTES)))
        taken.append(max(comm.allgather(time.perf_counter() - begin)))
    return _STREAM_NBYTES / statistics.median(taken)


def measure(comm: Any, nbytes: int, asked: argparse.Namespace, rate: float, lab: hosts.Lab) -> list[dict[str, Any]]:
    """The rows of one size. Collective."""
    from mpi4py import MPI

    import bitring

    side = math.isqrt(nbytes // 4)
    gradient = np.random.default_rng(comm.rank).standard_normal((side, side)).astype(np.float32)
    x = gradient.copy()
    plans = {"exact": bitring.plan_allreduce(x, comm=comm)}
    for name in asked.compressors:
        plans[name] = bitring.plan_allreduce(x, comm=comm, compression=name, check_finite=False)
    for name, plan in plans.items():
        x[:] = gradient
        plan()
        if len(set(comm.allgather(zlib.crc32(x)))) > 1:
            raise RuntimeError(f"{name}: replicas differ")

    def filled(call: Callable[[], None]) -> Callable[[], None]:
        def both() -> None:
            x[:] = gradient
            call()

        return both

    calls = {
        "": filled(lambda: None),
        "library": filled(lambda: comm.Allreduce(MPI.IN_PLACE, x)),
        **{name: filled(plan) for name, plan in plans.items()},
    }
    counts = {name: max(1, math.ceil(_SAMPLE_SECONDS / take(comm, call, 3))) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    kernels: dict[str, list[float]] = {name: [] for name in asked.compressors}
    for turn in range(asked.samples):
        for name in sorted(calls, reverse=bool(turn % 2)):
            taken[name].append(take(comm, calls[name], counts[name]))
            if name in kernels:
                told = plans[name].telemetry
                kernels[name].append(comm.allreduce(told.encode_seconds + told.decode_seconds, MPI.MAX))
    seconds = {name: statistics.median(found) for name, found in taken.items()}
    filling = seconds.pop("")
    rows: list[dict[str, Any]] = []
    for name in seconds:
        spent = seconds[name] - filling
        row: dict[str, Any] = {
            "nbytes": x.nbytes,
            "contender": name,
            "seconds": spent,
            "times_the_library": (seconds["library"] - filling) / spent,
        }
        if name in kernels:
            plan = plans[name]
            before = plan.bytes_sent
            row["python_calls"] = python_calls(plan)
            sent = comm.allreduce(plan.bytes_sent - before) / lab.hosts
            limit = sent / rate + statistics.median(kernels[name])
            row |= {
                "kernel_seconds": statistics.median(kernels[name]),
                "bytes_sent": sent,
                "limit_seconds": limit,
                "remainder_seconds": spent - limit,
            }
        rows.append(row)
    for plan in plans.values():
        plan.free()
    return rows


def python_calls(plan: Callable[[], None]) -> int:
    """Calls of functions in a run of the plan, in this thread, less that of the plan itself and of what counts."""
    found = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        plan()
    finally:
        sys.setprofile(None)
    return found - 2


def take(comm: Any, call: Callable[[], None], calls: int) -> float:
    """Seconds a call on the slowest rank. Collective."""
    comm.Barrier()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return max(comm.allgather(time.perf_counter() - begin)) / calls


def line(row: dict[str, Any]) -> str:
    text = f"{size(row['nbytes']):>8}  {row['contender']:<24}{duration(row['seconds']):>10}"
    text += f"{row['times_the_library']:>7.2f}x the library"
    if "limit_seconds" in row:
        text += f"  limit {duration(row['limit_seconds'])}  remainder {duration(row['remainder_seconds'])}"
        text += f"  {row['python_calls']} calls in Python"
    return text


if __name__ == "__main__":
    sys.exit(main())
