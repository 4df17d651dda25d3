"""Compressed AllReduce between emulated hosts, against exact ones and against what kernels and wire take alone.

    python benchmarks/network_compressed.py --hosts 4 --rate 1gbit --json FILE

Starts the hosts (hosts.py; needs root) and runs itself on them. One float32 gradient, summed in place; the contenders
take turns, and a time is the median of its samples, each the slowest rank's. Exact sums pass NaN on; a compressed plan
looks for it first, but for ``check_finite=False``, with which DataParallel makes it, having looked itself: "unchecked".
Two yardsticks for each compressor, in the same run: its kernels on all ranks at once, without messages (each rank
encodes the whole, decodes and adds all ranks' payloads of its chunk, encodes their sum, and decodes the whole), and a
TCP stream of the bytes that it sends from a host. The larger of the two is what an exchange that hides the other cannot
be faster than.
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
from functools import partial
from pathlib import Path
from typing import Any

import hosts
import numpy as np
from network_allreduce import carry, make_stream, sizes


def main() -> int:
    parser = argparse.ArgumentParser(description="Compressed AllReduce between emulated hosts.")
    hosts.add_options(parser, hosts=4, rate="1gbit")
    parser.add_argument("--size", type=sizes, default="64MiB", help="bytes of the gradient (%(default)s)")
    parser.add_argument("--compressors", type=lambda text: text.split(","), default="onebit", help="%(default)s")
    parser.add_argument("--samples", type=int, default=7, help="times each is timed (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    asked = parser.parse_args()
    lab = hosts.lab()
    if lab is None:
        return hosts.rerun(asked)
    work(asked, lab)
    return 0


def shape_of(n: int) -> tuple[int, ...]:
    """So many values are a square matrix where they can be, a parameter of its kind; else flat."""
    side = math.isqrt(n)
    return (side, side) if side * side == n else (n,)


def kernels(comm: Any, encoder: Any, gradient: Any) -> Callable[[], None]:
    """What the encoder's kernels do in an owner exchange on this rank."""
    from bitring.compression.exchange.layout import lay_out

    chunks = lay_out(encoder, [shape_of(gradient.size)], comm.size).segments
    residual = np.zeros_like(gradient)
    total = np.empty(max(b - a for chunk in chunks for segment in chunk for a, b, _ in segment), np.float32)
    payload = np.empty(2 * encoder.nbytes(total.size), np.uint8)
    out = gradient.copy()

    def encode(each: Any, values: Any, left: Any) -> Any:
        return payload[: each.encode(values, left, payload)]

    def work() -> None:
        for owner, chunk in enumerate(chunks):
            for segment in chunk:
                for a, b, each in segment:
                    code = encode(each, gradient[a:b], residual[a:b])
                    each.decode(code, out[a:b])
                    if owner != comm.rank:
                        continue
                    for r in range(comm.size):
                        each.decode(code, total[: b - a], accumulate=r > 0)
                    encode(each, total[: b - a], residual[a:b])

    return work


def work(asked: argparse.Namespace, lab: hosts.Lab) -> None:
    """Measure, print, and keep the results. Collective."""
    from mpi4py import MPI

    import bitring
    from bitring.commands._ranks import ending_together, limit_threads
    from bitring.compression.encoder import compressors
    from bitring.nodes import describe

    comm = MPI.COMM_WORLD
    with ending_together(comm):
        limit_threads(comm)
        machine = describe(comm)
        gradient = np.random.default_rng(comm.rank).standard_normal(asked.size[0] // 4).astype(np.float32)
        x = gradient.copy()
        stream = make_stream(comm, lab)
        plans: dict[str, Any] = {"exact": bitring.plan_allreduce(x, comm=comm)}
        compressor_of = {label: name for name in asked.compressors for label in (name, f"{name}, unchecked")}
        for label, name in compressor_of.items():
            plans[label] = bitring.plan_allreduce(
                x, comm=comm, compression=name, shapes=[shape_of(x.size)], check_finite=label == name
            )
        check(comm, x, gradient, plans)
        calls: dict[str, Callable[[], None]] = {"library": partial(comm.Allreduce, MPI.IN_PLACE, x), **plans}
        for name in asked.compressors:
            plan = plans[name]
            before = plan.bytes_sent
            plan()
            sent = comm.allreduce(plan.bytes_sent - before) // lab.hosts
            calls[f"{name}: kernels"] = kernels(comm, compressors.get(name)(), gradient)
            calls[f"{name}: wire"] = partial(carry, stream, memoryview(bytearray(sent if stream else 0)))
        taken: dict[str, list[float]] = {name: [] for name in calls}
        told: dict[str, list[dict[str, Any]]] = {label: [] for label in compressor_of}
        for turn in range(asked.samples + 1):
            for name, call in calls.items():
                x[:] = gradient
                seconds = timed(comm, call)
                if turn:  # the first is to warm up
                    taken[name].append(seconds)
                    if name in told:
                        told[name].append(vars(plans[name].telemetry))
        rows = [row(name, compressor_of.get(name), taken, told) for name in ("library", *plans)]
        if comm.rank == 0:
            print(f"{'':<21}{'median':>10}{'library':>10}{'exact':>8}{'kernels':>11}{'wire':>11}{'of the limit':>14}")
            for each in rows:
                print(line(each))
            kept = {
                "benchmark": "network_compressed",
                "dtype": "float32",
                "nbytes": x.nbytes,
                "network": {"emulated": True, **lab._asdict()},
                "machine": machine,
                "results": rows,
            }
            if asked.json:
                asked.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def check(comm: Any, x: Any, gradient: Any, plans: dict[str, Any]) -> None:
    """Replicas are bit for bit the same, and what compression left out is in the residuals."""
    wanted = comm.allreduce(gradient.astype(np.float64))
    for name, plan in plans.items():
        x[:] = gradient
        plan()
        got = x.astype(np.float64)
        state = plan.state_dict()
        if state:
            owed = state["residual"].astype(np.float64)
            owed[slice(*plan.owned)] += state["owner_residual"]
            got += comm.allreduce(owed)
        right = bool(np.allclose(got, wanted, rtol=0, atol=1e-4)) and len(set(comm.allgather(zlib.crc32(x)))) == 1
        if not all(comm.allgather(right)):
            raise RuntimeError(f"{name}: a wrong sum, or replicas that differ")


def timed(comm: Any, call: Callable[[], None]) -> float:
    """Seconds of a call on the slowest rank. Collective."""
    comm.Barrier()
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    done = comm.Ibarrier()
    while not done.Test():  # a blocking barrier would spin on the cores that others need
        time.sleep(2e-4)
    return float(max(comm.allgather(seconds)))


def row(
    name: str, compressor: str | None, taken: dict[str, list[float]], told: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    medians = {each: statistics.median(found) for each, found in taken.items()}
    seconds = medians[name]
    found: dict[str, Any] = {
        "contender": name,
        "seconds": seconds,
        "samples": [float(f"{sample:.4g}") for sample in taken[name]],
        "times_the_library": medians["library"] / seconds,
        "times_exact": medians["exact"] / seconds,
    }
    if compressor is not None:
        parts = {part: medians[f"{compressor}: {part}"] for part in ("kernels", "wire")}
        found |= {**parts, "of_the_limit": max(parts.values()) / seconds}
        found["telemetry_of_rank_0"] = {
            key: statistics.median(run[key] for run in told[name])
            for key in ("encode_seconds", "decode_seconds", "wire_seconds", "wait_seconds", "bytes_sent", "contraction")
        }
    return found


def line(row: dict[str, Any]) -> str:
    text = f"{row['contender']:<21}{row['seconds'] * 1e3:>7.4g} ms{row['times_the_library']:>9.2f}x"
    text += f"{row['times_exact']:>7.2f}x"
    if "kernels" in row:
        text += f"{row['kernels'] * 1e3:>8.3g} ms{row['wire'] * 1e3:>8.3g} ms{row['of_the_limit']:>13.0%}"
    return text


if __name__ == "__main__":
    sys.exit(main())
