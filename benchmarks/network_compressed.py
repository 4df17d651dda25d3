"""Compressed AllReduce between emulated hosts, against exact ones and against what kernels and wire take alone.

    python benchmarks/network_compressed.py --hosts 4 --rate 1gbit --json FILE

Starts the hosts (hosts.py; needs root) and runs itself on them. One float32 gradient, summed in place; the contenders
take turns, and a time is the median of its samples, each from the first rank's begin to the last one's end. Exact sums
pass NaN on; a compressed plan looks for it first, but for ``check_finite=False``, with which DataParallel makes it,
having looked itself: "unchecked".
Two yardsticks for each compressor, in the same run: its kernels on all ranks at once, without messages (each rank
encodes the whole, decodes and adds all ranks' payloads of its chunk, encodes their sum, and decodes the whole), and a
TCP stream of the bytes that it sends from a host. The larger of the two is what an exchange that hides the other cannot
be faster than. And for each kernel a limit of its own: the bytes that it cannot but move between memory and processor,
over what np.add in place moves on all ranks at once.
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
from typing import Any, NamedTuple

import hosts
import numpy as np
from network_allreduce import carry, make_stream, sizes


class Kernel(NamedTuple):
    """What one kind of kernel does in an exchange, and the bytes that it moves between memory and processor."""

    call: Callable[[], None]
    nbytes: int


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


def kernels(comm: Any, encoder: Any, gradient: Any) -> dict[str, Kernel]:
    """What the encoder's kernels do in an owner exchange on this rank: all, and each kind alone."""
    from bitring.compression.exchange.layout import lay_out

    layout = lay_out(encoder, [shape_of(gradient.size)], comm.size)
    pieces = list(layout.pieces)
    residual = np.zeros_like(gradient)
    total = np.empty(max(b - a for a, b, _ in pieces), np.float32)
    payloads = [np.empty(each.nbytes(b - a), np.uint8) for a, b, each in pieces]
    out = gradient.copy()
    (begin, end), n = layout.owned[comm.rank], gradient.size

    def encode(k: int) -> None:
        a, b, each = pieces[k]
        each.encode(gradient[a:b], residual[a:b], payloads[k])

    def decode(k: int) -> None:
        a, b, each = pieces[k]
        each.decode(payloads[k], out[a:b])

    def add(k: int) -> None:
        a, b, each = pieces[k]
        if begin <= a < end:
            for r in range(comm.size):
                each.decode(payloads[k], total[: b - a], accumulate=r > 0)
            each.encode(total[: b - a], residual[a:b], payloads[k])

    def each_piece(*kinds: Callable[[int], None]) -> Callable[[], None]:
        def run() -> None:
            for k in range(len(pieces)):
                for kind in kinds:
                    kind(k)

        return run

    encode_nbytes, sum_nbytes, decode_nbytes = 12 * n, 8 * (end - begin), 4 * n  # a sum itself stays in the cache
    return {
        "kernels": Kernel(each_piece(encode, decode, add), encode_nbytes + sum_nbytes + decode_nbytes),
        "encode": Kernel(each_piece(encode), encode_nbytes),
        "sum": Kernel(each_piece(add), sum_nbytes),
        "decode": Kernel(each_piece(decode), decode_nbytes),
    }


def work(asked: argparse.Namespace, lab: hosts.Lab) -> None:
    """Measure, print, and keep the results. Collective."""
    from mpi4py import MPI

    import bitring
    from bitring.commands._ranks import ending_together, limit_threads
    from bitring.compression.encoder import compressors
    from bitring.nodes import describe
    from bitring.settings import make

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
        zeros = np.zeros_like(x)
        calls["memory"] = partial(np.add, zeros, gradient, out=zeros)
        parts: dict[str, dict[str, Kernel]] = {}
        for name in asked.compressors:
            plan = plans[name]
            before = plan.bytes_sent
            plan()
            sent = comm.allreduce(plan.bytes_sent - before) // lab.hosts
            parts[name] = kernels(comm, make(name, compressors), gradient)
            calls |= {f"{name}: {part}": kernel.call for part, kernel in parts[name].items()}
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
        bandwidth = comm.size * 12 * x.size / statistics.median(taken["memory"])
        limits = {name: limits_of(comm, name, parts[name], taken, bandwidth) for name in asked.compressors}
        if comm.rank == 0:
            print(f"{'':<31}{'median':>10}{'library':>10}{'exact':>8}{'kernels':>11}{'wire':>11}{'of the limit':>14}")
            for each in rows:
                print(line(each))
            kept = {
                "benchmark": "network_compressed",
                "dtype": "float32",
                "nbytes": x.nbytes,
                "network": {"emulated": True, **lab._asdict()},
                "machine": machine,
                "memory_bandwidth": bandwidth,
                "limits": limits,
                "results": rows,
            }
            for name, found in limits.items():
                print(f"\n{name}, at {bandwidth / 1e9:.3g} GB/s of the memory")
                for part, each in found.items():
                    share = f"{each['of_the_memory']:.0%} of the memory's speed"
                    print(f"{part:<10}{each['seconds'] * 1e3:>8.3g} ms  {share}")
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
    """Seconds from when the first rank begins to when the last is done: the hosts share a clock. Collective."""
    comm.Barrier()
    begin = time.perf_counter()
    call()
    end = time.perf_counter()
    done = comm.Ibarrier()
    while not done.Test():  # a blocking barrier would spin on the cores that others need
        time.sleep(2e-4)
    begins, ends = zip(*comm.allgather((begin, end)), strict=True)
    return float(max(ends) - min(begins))


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


def limits_of(
    comm: Any, compressor: str, parts: dict[str, Kernel], taken: dict[str, list[float]], bandwidth: float
) -> dict[str, dict[str, float]]:
    """Of each kind of kernel, on all ranks at once: seconds, and the share of them that moving its bytes takes."""
    found: dict[str, dict[str, float]] = {}
    for part, kernel in parts.items():
        seconds, nbytes = statistics.median(taken[f"{compressor}: {part}"]), comm.allreduce(kernel.nbytes)
        found[part] = {"seconds": seconds, "nbytes": nbytes, "of_the_memory": nbytes / bandwidth / seconds}
    return found


def line(row: dict[str, Any]) -> str:
    text = f"{row['contender']:<31}{row['seconds'] * 1e3:>7.4g} ms{row['times_the_library']:>9.2f}x"
    text += f"{row['times_exact']:>7.2f}x"
    if "kernels" in row:
        text += f"{row['kernels'] * 1e3:>8.3g} ms{row['wire'] * 1e3:>8.3g} ms{row['of_the_limit']:>13.0%}"
    return text


if __name__ == "__main__":
    sys.exit(main())
