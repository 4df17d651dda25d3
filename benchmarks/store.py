"""Updates of one array by all ranks of a node, in the memory they share: values per second, beside np.add's.

    mpirun -n 2 python benchmarks/store.py --json FILE

np.add runs on one rank, with the others asleep; then all ranks push, each at its own pace. Gradients are whole numbers,
so that at the end every update can be accounted for. Without locks some are lost: the share is shown. Then the calls of
``ParameterStore``, in shared memory, and by messages to shards on all ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import bitring
from bitring.collectives.node.shared_shards import SharedShards, new_shards
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.objects import agreed_job
from bitring.nodes import describe

_BATCH_SECONDS = 0.5
_BATCHES = 5


def shards_of(comm: MPI.Intracomm, n: int, slots: tuple[str, ...]) -> SharedShards:
    """An array of n float32 values, ``w``."""
    context = context_of(comm)
    context.prepare("benchmarks/store.py")
    layout = {"w": ((n,), np.dtype(np.float32))}
    made = agreed_job(
        context,
        lambda progress: new_shards(
            context.common, context.node.comm, layout, slots, 1, None, math.inf, "a benchmark", progress
        ),
        "benchmarks/store.py",
    )
    if made is None:
        raise SystemExit("store.py: the ranks share no memory")
    return made


def together(comm: MPI.Intracomm, n: int, call: Callable[[], None]) -> tuple[float, int]:
    """Values per second of all ranks together, in the best of some batches; and a rank's calls in all of them."""
    call()
    began = time.perf_counter()
    call()
    runs = comm.allreduce(max(int(_BATCH_SECONDS / (time.perf_counter() - began)), 1), MPI.MIN)
    rates: list[float] = []
    for _ in range(_BATCHES):
        comm.Barrier()
        began = time.perf_counter()
        for _ in range(runs):
            call()
        rates.append(comm.size * runs * n / comm.allreduce(time.perf_counter() - began, MPI.MAX))
    return max(rates), runs * _BATCHES + 2


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description="Updates of one array by all ranks of a node.")
    parser.add_argument("--values", type=int, default=4 << 20, help="float32 values (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    asked = parser.parse_args()
    comm, n = bitring.Communicator(MPI.COMM_WORLD.Dup()), asked.values
    machine = describe(comm)
    a, b, c = (np.ones(n, np.float32) for _ in range(3))
    add = add_rate(comm, n, lambda: np.add(a, b, out=c))
    results: list[dict[str, Any]] = []
    cases: list[tuple[str, bitring.Optimizer, bool]] = [
        ("sgd", bitring.SGD(lr=1.0), True),
        ("sgd without locks", bitring.SGD(lr=1.0), False),
        ("sgd, momentum 0.9", bitring.SGD(lr=1.0, momentum=0.9), True),
        ("adagrad", bitring.AdaGrad(lr=1.0), True),
    ]
    for name, optimizer, locked in cases:
        shards, rule = shards_of(comm, n, optimizer.slots), optimizer.native_update()
        assert rule is not None
        result: dict[str, Any] = {"case": name, "ranks": comm.size, "values": n}
        rate, calls = together(comm, n, partial(shards.update, {"w": a}, rule, locked=locked))
        result |= {"values_per_second": rate, "of_np_add": rate / add}
        if "momentum" not in name and name != "adagrad":
            wanted = comm.size * calls * n
            result["lost"] = 1 + float(shards.arrays["w"].sum(dtype=np.float64)) / wanted
        results.append(result)
        comm.Barrier()
    out = np.empty(n, np.float32)
    shards = shards_of(comm, n, ())
    rate, _ = together(comm, n, lambda: shards.read({"w": out}))
    results.append(
        {"case": "read", "ranks": comm.size, "values": n, "values_per_second": rate, "of_np_add": rate / add}
    )
    results += store_results(comm, n, a, add)
    if comm.rank == 0:
        print(f"np.add, one rank: {add / 1e9:.2f} G values/s")
        for result in results:
            lost = f", {result['lost']:.2%} lost" if "lost" in result else ""
            rate, of = result["values_per_second"] / 1e9, result["of_np_add"]
            print(f"{result['case']:30} {rate:6.2f} G values/s by {comm.size} ranks, {of:.2f} of np.add{lost}")
        if asked.json:
            whole = {"benchmark": "store", "machine": machine, "np_add": add, "results": results}
            asked.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def store_results(comm: MPI.Intracomm, n: int, g: Any, add: float) -> list[dict[str, Any]]:
    """Of ``ParameterStore.inc`` and ``get``, one after the other, on all ranks: each moves n values."""
    results: list[dict[str, Any]] = []
    for way, servers in (("in shared memory", None), ("by messages", comm.size)):
        store = bitring.ParameterStore({"w": np.zeros(n, np.float32)}, bitring.SGD(lr=1.0), comm=comm, servers=servers)

        def both(store: Any = store) -> None:
            store.inc({"w": g})
            store.get()

        rate, calls = together(comm, n, both)
        values = store.synchronize()["w"]
        if not (values == -comm.size * calls).all():
            raise SystemExit(f"store.py: updates were lost {way}")
        name = {"case": f"inc and get, {way}", "ranks": comm.size, "values": n}
        results.append({**name, "values_per_second": rate, "of_np_add": rate / add})
        store.free()
    return results


def add_rate(comm: MPI.Intracomm, n: int, call: Callable[[], Any]) -> float:
    """Values per second of ``call`` on rank 0 alone; the same on all ranks."""
    best = math.inf
    for _ in range(40 if comm.rank == 0 else 0):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    done = comm.Ibarrier()
    while not done.Test():
        time.sleep(1e-3)
    rate: float = comm.bcast(n / best)
    return rate


if __name__ == "__main__":
    main()
