"""Updates of one array by all ranks of a node, in the memory they share: values per second, beside np.add's.

    mpirun -n 2 python benchmarks/store.py --json FILE

np.add runs on one rank, with the others asleep; then all ranks push, each at its own pace. Gradients are whole numbers,
so that at the end every update can be accounted for. Without locks some are lost: the share is shown. Then the calls of
``ParameterStore``, in shared memory, and by messages to shards on all ranks. Then updates and fetches of one bit per
value to shards on all ranks, served natively and in Python, in turn: how many each rank makes per second; and how long
one takes until it is applied, where the other ranks compute in Python.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
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
from bitring.training.store import native_service
from bitring.training.store.messages import MessageTable
from bitring.training.store.rule import Terms
from bitring.training.store.table import Setup, Update

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
    one_bit = [one_bit_results(comm, size) for size in (1 << 10, 1 << 20)]
    if comm.rank == 0:
        print(f"np.add, one rank: {add / 1e9:.2f} G values/s")
        for result in results:
            lost = f", {result['lost']:.2%} lost" if "lost" in result else ""
            rate, of = result["values_per_second"] / 1e9, result["of_np_add"]
            print(f"{result['case']:30} {rate:6.2f} G values/s by {comm.size} ranks, {of:.2f} of np.add{lost}")
        for result in one_bit:
            print(", ".join(f"{name} {value:.4g}" for name, value in result.items()))
        if asked.json:
            whole = {"benchmark": "store", "machine": machine, "np_add": add, "results": results, "one_bit": one_bit}
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


def one_bit_results(comm: MPI.Intracomm, n: int) -> dict[str, float]:
    """Of both services: updates, each with a fetch, per second and rank; and seconds of one while others compute."""
    g, computing = np.ones(n, np.float32), [0.5] * 1000
    found: dict[str, list[float]] = {}
    able = native_service.serves
    for number in range(_BATCHES + 1):
        for way in ("native", "python"):
            native_service.serves = able if way == "native" else lambda *_: False
            values = {"w": np.zeros(n, np.float32)}
            encoders = {"w": bitring.OneBit()}
            encoders["w"].warm_up(np.float32)
            table = MessageTable(Setup(comm, "store.py", values, bitring.SGD(lr=1e-3), Terms(), encoders=encoders))
            pushes = max(8, (1 << 21) // n // 8)
            comm.Barrier()
            began = time.perf_counter()
            for _ in range(pushes):
                table.push(Update({"w": g}, {}))
                table.pull()
            rate = pushes / (comm.allreduce(time.perf_counter() - began) / comm.size)
            comm.Barrier()
            seconds = 0.0
            if comm.rank == comm.size - 1:
                table.pull()
                began = time.perf_counter()
                for _ in range(8):
                    table.push(Update({"w": g}, {}))
                    table.pull()
                seconds = (time.perf_counter() - began) / 8
                for rank in range(comm.size - 1):
                    comm.send(None, rank)
            else:
                while not comm.iprobe(comm.size - 1):
                    sum(computing)
                comm.recv(source=comm.size - 1)
            table.settle()
            table.free()
            seconds = comm.bcast(seconds, comm.size - 1)
            if number:
                found.setdefault(f"{way}_updates_per_second", []).append(rate)
                found.setdefault(f"{way}_seconds_to_a_computing_rank", []).append(seconds)
    native_service.serves = able
    result = {name: statistics.median(each) for name, each in found.items()}
    for name in ("updates_per_second", "seconds_to_a_computing_rank"):
        result[f"{name}_native_of_python"] = result[f"native_{name}"] / result[f"python_{name}"]
    return {"ranks": float(comm.size), "values": float(n), **result}


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
