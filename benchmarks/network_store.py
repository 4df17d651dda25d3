"""A store between two hosts: pushes and fetches beside a TCP stream, small pushes, what a service costs, bytes.

    python benchmarks/network_store.py --rate 1gbit --json FILE

It starts two emulated hosts of one rank (hosts.py; needs root) and runs itself on them. Rank 0 has the only shard but
where shards are on both; rank 1 pushes (``inc``, one or several in a row, until a read says that all is applied) and
fetches (``get``). The contenders take turns; what is told are medians, in payload bytes per second. A small push is one
of 32 KiB to a rank that computes in NumPy; beside it a ping-pong of as many bytes by the MPI library. An idle service's
processor time is taken while the process sleeps. Bytes are those that a rank of a trainer sends per step, with shards
on both ranks, beside an AllReduce's 2(p-1)/p of the parameters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hosts
import numpy as np

SMALL = 32 << 10
_TIMES = 5
_IN_A_ROW = 4
_SMALL_TIMES = 30
_IDLE_SECONDS = 3.0
_NAP_SECONDS = 1e-3
"""Of the progress thread, where something has come a moment ago."""


def main() -> int:
    parser = argparse.ArgumentParser(description="A store between two hosts.")
    hosts.add_options(parser, hosts=2, rate="1gbit")
    parser.add_argument("--values", type=int, default=4 << 20, help="float32 values (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    asked = parser.parse_args()
    if hosts.lab() is None:
        return hosts.rerun(asked)
    work(asked)
    return 0


def work(asked: argparse.Namespace) -> None:
    """Measure, print, and keep the results. Collective, of two ranks."""
    from mpi4py import MPI

    from bitring.commands._ranks import ending_together, limit_threads
    from bitring.nodes import describe

    comm, lab = MPI.COMM_WORLD, hosts.lab()
    assert lab is not None
    with ending_together(comm):
        limit_threads(comm)
        results = {"values": asked.values, **rates(comm, asked.values), **small(comm), **idle(comm), **sent(comm)}
        machine = describe(comm)
        if comm.rank == 0:
            for name, value in results.items():
                print(f"{name:32} {value:12.4g}")
            if asked.json:
                network = {"emulated": True, **lab._asdict()}
                kept = {"benchmark": "network_store", "network": network, "machine": machine, "results": results}
                asked.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def asleep(comm: Any) -> None:
    """Wait for the other rank without a core."""
    done = comm.Ibarrier()
    while not done.Test():
        time.sleep(1e-3)


def rates(comm: Any, n: int) -> dict[str, float]:
    """Bytes per second of pushes, several in a row too, fetches and a stream, from rank 1's side, in turn."""
    import bitring

    g = np.ones(n, np.float32)
    stream = hosts.Stream(2, 1)
    room = memoryview(np.empty(g.nbytes, np.uint8))
    store = bitring.ParameterStore({"w": np.zeros(n, np.float32)}, bitring.SGD(lr=1.0), comm=comm, servers=1)

    def pushed(count: int) -> None:
        for _ in range(count):
            store.inc({"w": g})
        store.get(rows={"w": [0]})

    contenders: dict[str, tuple[int, Callable[[], Any]]] = {  # and how often each moves the array
        "stream": (1, lambda: stream.send(memoryview(g).cast("B"))),
        "push": (1, lambda: pushed(1)),
        "pushes": (_IN_A_ROW, lambda: pushed(_IN_A_ROW)),
        "fetch": (1, store.get),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(_TIMES + 1):
        for name, (count, call) in contenders.items():
            comm.Barrier()
            if comm.rank == 0:
                if name == "stream":
                    stream.receive(room)
            else:
                began = time.perf_counter()
                call()
                if number:
                    seconds[name].append((time.perf_counter() - began) / count)
            asleep(comm)
    wanted = -float((_TIMES + 1) * (1 + _IN_A_ROW))
    if not (store.synchronize()["w"] == wanted).all():
        raise SystemExit("network_store.py: updates were lost")
    store.free()
    stream.close()
    mine = {name: g.nbytes / statistics.median(each) for name, each in seconds.items() if each}
    found = comm.bcast(mine, 1)
    told = {f"{name}_bytes_per_second": rate for name, rate in found.items()}
    return told | {f"{name}_of_stream": found[name] / found["stream"] for name in ("push", "pushes", "fetch")}


def small(comm: Any) -> dict[str, float]:
    """Seconds of a small push to a computing rank, and of a ping-pong."""
    import bitring

    n = SMALL // 4
    g, computing = np.ones(n, np.float32), np.ones(1 << 16)
    store = bitring.ParameterStore({"w": np.zeros(n, np.float32)}, bitring.SGD(lr=1.0), comm=comm, servers=1)
    there, back, pushes = np.ones(n, np.float32), np.empty(n, np.float32), list[float]()
    pings: list[float] = []
    for number in range(_SMALL_TIMES + 1):
        comm.Barrier()
        if comm.rank:
            began = time.perf_counter()
            comm.Send(there, 0)
            comm.Recv(back, 0)
            middle = time.perf_counter()
            comm.Barrier()
            began_push = time.perf_counter()
            store.inc({"w": g})
            store.get(rows={"w": [0]})
            ended = time.perf_counter()
            comm.send(None, 0)
            if number:
                pings.append(middle - began)
                pushes.append(ended - began_push)
        else:
            comm.Recv(back, 1)
            comm.Send(back, 1)
            comm.Barrier()
            while not comm.iprobe(1):
                for _ in range(20):
                    np.sqrt(computing, out=computing)
            comm.recv(source=1)
    store.free()
    ping, push = comm.bcast((statistics.median(pings), statistics.median(pushes)) if comm.rank else None, 1)
    return {"ping_pong_seconds": ping, "small_push_seconds": push, "small_push_limit": _NAP_SECONDS + 3 * ping}


def idle(comm: Any) -> dict[str, float]:
    """The part of a core that a service takes in which nothing happens."""
    import bitring

    store = bitring.ParameterStore({"w": np.zeros(9, np.float32)}, bitring.SGD(lr=1.0), comm=comm, servers=2)
    time.sleep(2.0)
    before = time.process_time()
    time.sleep(_IDLE_SECONDS)
    share = (time.process_time() - before) / _IDLE_SECONDS
    store.free()
    return {"idle_share_of_a_core": comm.allreduce(share) / comm.size}


def sent(comm: Any) -> dict[str, float]:
    """Bytes of a step, over an AllReduce's; and with one bit over those without."""
    import bitring

    shape, steps = (2048, 512), 8
    found: dict[str | None, float] = {}
    for compression in (None, "onebit"):
        w = {"w": np.zeros(shape, np.float32)}
        mode = bitring.ParameterServer(gather=2, staleness=0, servers=2)  # an edition a step
        trainer = bitring.DataParallel(w, bitring.SGD(lr=0.1), comm=comm, mode=mode, compression=compression)
        rng = np.random.default_rng(comm.rank)
        g = rng.standard_normal(shape).astype(np.float32)
        trainer.step({"w": g})
        comm.Barrier()  # both have their first answer, which is of all values
        before = trainer.bytes_sent
        for _ in range(steps):
            trainer.step({"w": g})
        found[compression] = comm.allreduce(trainer.bytes_sent - before) / comm.size / steps
        trainer.free()
    allreduce = 2 * (comm.size - 1) / comm.size * 4 * shape[0] * shape[1]
    return {"bytes_of_allreduce": found[None] / allreduce, "one_bit_of_bytes": found["onebit"] / found[None]}


if __name__ == "__main__":
    sys.exit(main())
