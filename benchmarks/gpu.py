"""What a card shows: 1-bit kernels against a copy on the device, and AllReduces of device buffers.

    mpirun -n 2 python benchmarks/gpu.py [--json FILE] [--plot FILE] [--values N] [--samples 9] [--device cuda|host]

Rank 0 alone times the kernels, of all encoders that have some for a device: encode, which adds the residual and leaves
the new one, and decode-and-add, in the types of values that gradients have. All ranks, which may share a card, time
sums of device buffers, exact and at one bit. ``--device host`` runs the same with NumPy in place of CuPy, to try the
program where there is no card: its figures are of the host.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import bitring
from bitring.compression.encoder import VALUE_DTYPES, Encoder, residual_dtype
from bitring.compression.exchange.owner_schedule import encoders
from bitring.nodes import describe

SIDE = 4096
SIZES = tuple(4**k for k in range(5, 14))


def seconds_of(xp: Any, work: Callable[[], object], samples: int) -> float:
    """The median of the seconds that ``work`` takes on the device, each time until all of it is done."""
    wait = (lambda: None) if xp is np else xp.cuda.get_current_stream().synchronize
    taken: list[float] = []
    for sample in range(samples + 2):  # the first compile, and warm up
        wait()
        begin = time.perf_counter()
        work()
        wait()
        if sample >= 2:
            taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def of_device(name: str) -> Encoder | None:
    """The encoder of this name, None where it has no kernels for a device."""
    encoder = encoders.get(name)()
    try:
        encoder.device_kernels()
    except TypeError:
        return None
    return encoder


def kernels(xp: Any, n: int, samples: int) -> list[dict[str, Any]]:
    """Values per second of a copy, of encode and of decode-and-add: flat, and for levels of rank one as a matrix."""
    rows: list[dict[str, Any]] = []
    shape = (n // SIDE, SIDE) if n > SIDE else (1, n)
    n = shape[0] * shape[1]
    for dtype in VALUE_DTYPES:
        random = np.random.default_rng(0).standard_normal(n).astype(np.float32)
        values = xp.asarray(random).astype(dtype)
        target = xp.empty_like(values)
        copy = seconds_of(xp, partial(xp.copyto, target, values), samples)
        for name in encoders.names():
            encoder = of_device(name)
            if encoder is None:
                continue
            whole = encoder.for_shape(shape)
            for each in dict.fromkeys((encoder, whole)):
                residual, payload = xp.zeros(n, residual_dtype(dtype)), xp.empty(each.nbytes(n), np.uint8)
                out = values.copy()
                for operation, work in (
                    ("encode", partial(each.encode, values, residual, payload)),
                    ("decode-and-add", partial(each.decode, payload, out, accumulate=True)),
                ):
                    took = seconds_of(xp, work, samples)
                    rows.append({
                        "encoder": str(each), "operation": operation, "dtype": dtype.name, "values": n,
                        "values_per_second": n / took, "times_copy": copy / took,
                    })  # fmt: skip
    return rows


def sums(xp: Any, samples: int) -> list[dict[str, Any]]:
    """Seconds of AllReduces of device buffers, in place, by size: exact, one bit. Collective."""
    comm, rows = MPI.COMM_WORLD, []
    for n in SIZES:
        x = xp.ones(n, np.float32)
        for compression in (None, "onebit"):
            plan = bitring.plan_allreduce(x, comm=comm, compression=compression, hierarchical=False)
            took = comm.allreduce(seconds_of(xp, plan, samples), MPI.MAX)
            rows.append({"bytes": 4 * n, "compression": compression or "exact", "seconds": took})
            plan.free()
    return rows


def draw(found: dict[str, Any], path: Path) -> None:
    """Kernels as shares of a copy's speed, and sums by size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [f"{row['encoder']}\n{row['operation']}, {row['dtype']}" for row in found["kernels"]]
    left.barh(names, [row["times_copy"] for row in found["kernels"]])
    left.tick_params(axis="y", labelsize=5)
    left.set_xlabel("values per second, of a copy's on the device")
    for name in ("exact", "onebit"):
        rows = [row for row in found["sums"] if row["compression"] == name]
        right.loglog([row["bytes"] for row in rows], [row["seconds"] for row in rows], marker="o", label=name)
    right.set_xlabel("bytes of a buffer")
    right.set_ylabel("seconds of an AllReduce")
    right.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure; rank 0 prints, and keeps the results."""
    parser = argparse.ArgumentParser(description="What a card shows.")
    parser.add_argument("--device", choices=["cuda", "host"], default="cuda")
    parser.add_argument("--values", type=int, default=1 << 24)
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    comm = MPI.COMM_WORLD
    xp: Any = np if asked.device == "host" else importlib.import_module("cupy")
    found: dict[str, Any] = {"benchmark": "gpu", "device": asked.device, "machine": describe(comm)}
    if xp is not np:
        properties = xp.cuda.runtime.getDeviceProperties(0)
        found["card"] = properties["name"].decode()
    found["kernels"] = kernels(xp, asked.values, asked.samples) if comm.rank == 0 else []
    found["sums"] = sums(xp, asked.samples)
    if comm.rank == 0:
        for row in found["kernels"]:
            print(
                f"{row['encoder']} {row['operation']} {row['dtype']}: {row['values_per_second'] / 1e9:.2f}e9 values "
                f"per second, {row['times_copy']:.2f} of a copy"
            )
        for row in found["sums"]:
            print(f"{row['bytes']} bytes, {row['compression']}: {row['seconds'] * 1e6:.0f} µs")
        if asked.json:
            asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if asked.plot:
            draw(found, asked.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
