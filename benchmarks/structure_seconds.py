"""What ``structure`` predicts for each exchange of a weight, against what that exchange takes.

    python benchmarks/structure_seconds.py --hosts 2 --json FILE

Starts hosts of one rank at 1 Gbit/s (hosts.py; needs root). There ``bitring bench compress`` measures the machine
first; then this file runs itself. For each shape, dense sums, factors to all ranks, factors to the owners of rows and
one bit take turns, as plans of that weight alone. A time is the slowest rank's, per run of four in a row (so that the
emulated switch, which lets some bytes go at once, is a wire like any other), and of several the median. The network
that the prediction is made for is measured as a trainer measures it. Sums by factors are compared with dense ones
first. A rank's own product of its factors, which back-propagation would make, is timed as well and subtracted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hosts
import numpy as np

SHAPES = ((1000, 4096), (1024, 1024), (500, 800), (256, 2304))
"""Of weights: AlexNet's last layer, a hidden layer, the CNN's dense layer, a convolution's with its filters as rows."""

BATCH = 32

RUNS = 4  # in a row


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Predicted seconds of each exchange of a weight against measured ones."
    )
    hosts.add_options(parser, hosts=2, rate="1gbit")
    parser.add_argument("--samples", type=int, default=9, help="times each is timed (%(default)s)")
    parser.add_argument("--machine", type=Path, help="a file of bench compress  [default: measured first]")
    parser.add_argument("--json", type=Path, help="keep the results here")
    asked = parser.parse_args()
    if asked.json is not None and not asked.json.absolute().parent.is_dir():
        parser.error(f"{asked.json} cannot be written: there is no folder {asked.json.parent}")
    if hosts.lab() is not None:
        work(asked)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if asked.machine is None:
            asked.machine = Path(folder) / "machine.json"
            bench = [str(Path(sys.executable).with_name("bitring")), "bench", "compress", "--dtype", "float32"]
            bench += ["--samples", "7", "--json", str(asked.machine)]
            status = hosts.run(bench, hosts=asked.hosts, ranks_per_host=asked.ranks_per_host, rate=asked.rate)
            if status:
                return status
            sys.argv += ["--machine", str(asked.machine)]
        return hosts.rerun(asked)


def work(asked: argparse.Namespace) -> None:
    """Measure, print, and keep the results. Collective."""
    from mpi4py import MPI
    from threadpoolctl import threadpool_limits

    import bitring
    from bitring.commands._ranks import ending_together
    from bitring.nodes import describe
    from bitring.training.prediction.cluster import Cluster
    from bitring.training.step.picking import measured_network

    comm = MPI.COMM_WORLD
    with ending_together(comm):
        threadpool_limits(limits=1)
        latency, bandwidth = measured_network(comm, comm.size)
        choice = bitring.Structure(
            batch=BATCH, encoder="onebit", latency=latency, bandwidth=bandwidth, machine=str(asked.machine)
        )
        cluster = Cluster(comm.size, comm.size, bandwidth, latency)
        results = []
        for shape in SHAPES:
            picked = choice.pick({"weight": shape}, cluster)["weight"]
            measured = measure(comm, shape, list(picked.seconds), asked.samples)
            for exchange, seconds in measured.items():
                row = {"shape": shape, "exchange": exchange, "predicted": picked.seconds[exchange], "measured": seconds}
                results.append(row)
                if comm.rank == 0:
                    ratio = seconds / picked.seconds[exchange]
                    print(
                        f"{shape[0]} x {shape[1]} {exchange:18s}: predicted {1e3 * picked.seconds[exchange]:7.2f} ms, "
                        f"measured {1e3 * seconds:7.2f} ms, ratio {ratio:.2f}",
                        flush=True,
                    )
        if comm.rank == 0 and asked.json is not None:
            found = {
                "benchmark": "structure_seconds",
                "machine": describe(comm),
                "batch": BATCH,
                "latency": latency,
                "bandwidth": bandwidth,
                "results": results,
            }
            asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        else:
            describe(comm)


def measure(comm: Any, shape: tuple[int, int], exchanges: list[str], samples: int) -> dict[str, float]:
    """Seconds of each exchange of a weight. Collective."""
    from mpi4py import MPI

    import bitring

    rng = np.random.default_rng(comm.rank)
    u, v = (rng.standard_normal((BATCH, n), np.float32) / 64 for n in shape)
    factors = bitring.Factors(u, v)
    gradient = u.T @ v
    product = np.empty_like(gradient)
    dense = comm.allreduce(gradient)
    buffers = {exchange: gradient.copy() for exchange in exchanges}
    plans = {
        exchange: bitring.plan_allreduce(
            x, comm=comm, compression=None if exchange == "exact" else exchange, shapes=[shape]
        )
        for exchange, x in buffers.items()
    }
    seconds: dict[str, list[float]] = {exchange: [] for exchange in exchanges}
    for sample in range(samples + 1):
        for exchange, plan in plans.items():
            taken = 0.0
            for _ in range(RUNS if sample else 1):
                buffers[exchange][...] = gradient
                if plan.takes_factors:
                    plan.take(0, factors)
                start = time.perf_counter()
                plan()
                taken += (time.perf_counter() - start) / RUNS
                if plan.takes_factors:
                    start = time.perf_counter()
                    np.matmul(u.T, v, out=product)
                    taken -= (time.perf_counter() - start) / RUNS
            taken = comm.allreduce(taken, MPI.MAX)
            if sample:
                seconds[exchange].append(taken)
            elif exchange != "onebit":
                error = abs(buffers[exchange] - dense).max() / abs(dense).max()
                assert error < 1e-5, f"{exchange} of {shape}: off by {error}"
    for plan in plans.values():
        plan.free()
    return {exchange: statistics.median(each) for exchange, each in seconds.items()}


if __name__ == "__main__":
    raise SystemExit(main())
