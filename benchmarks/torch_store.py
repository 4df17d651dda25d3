"""Updates per second of a parameter server: a ``ParameterStore``, and PyTorch's RPC pattern, on the same arrays.

    PYTHONPATH=build/torch python benchmarks/torch_store.py --json FILE

On each of N processes (``--ranks``) a worker fetches the parameters, and pushes gradients of whole numbers, as fast as
it can; rank 0 holds them. PyTorch's is the pattern of its tutorial: worker processes call ``rpc_sync`` on an object
that the server process has, which applies SGD under a lock and returns the parameters. Here the server is a process of
its own; in the store it is one of the ranks, which pushes, too. Contenders take turns, each run a job of its own, and
what the store comes to at the end is checked before anything is told. ``shared``: the store in the node's memory;
``messages``: with the shard on rank 0.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTENDERS = ("shared", "messages", "torch")
_TIMES = 3


def store_updates(servers: int | None, values: int, updates: int) -> None:
    """One rank of a job: rank 0 prints the updates per second of all."""
    import numpy as np
    from mpi4py import MPI

    import bitring

    comm = MPI.COMM_WORLD
    w, g = {"w": np.zeros(values, np.float32)}, {"w": -np.ones(values, np.float32)}
    with bitring.ParameterStore(w, bitring.SGD(lr=1.0), comm=comm, servers=servers) as store:
        store.synchronize()
        began = time.perf_counter()
        for _ in range(updates):
            store.get()
            store.inc(g)
        end = store.synchronize()["w"]
        seconds = time.perf_counter() - began
    if not (end == comm.size * updates).all():
        raise SystemExit("torch_store.py: updates were lost")
    if comm.rank == 0:
        print(json.dumps(comm.size * updates / seconds), flush=True)
    store.free()


class Server:
    """The parameters, as in PyTorch's tutorial on parameter servers by RPC."""

    def __init__(self, values: int) -> None:
        import threading

        import torch

        self.w = torch.zeros(values)
        self.lock = threading.Lock()

    def update_and_fetch(self, gradient: Any) -> Any:
        """Apply a gradient, and return the parameters."""
        with self.lock:
            if gradient is not None:
                self.w -= gradient
            return self.w.clone()


def torch_worker(server: Any, values: int, updates: int) -> None:
    """What a worker process does."""
    import torch

    gradient = -torch.ones(values)
    server.rpc_sync().update_and_fetch(None)
    for _ in range(updates):
        server.rpc_sync().update_and_fetch(gradient)


def torch_process(rank: int, ranks: int, values: int, updates: int) -> None:
    """Process ``rank`` of ``ranks`` workers and a server, which is rank 0 and prints the updates per second."""
    import torch
    from torch.distributed import rpc

    torch.set_num_threads(1)
    names = ["server", *(f"worker{number}" for number in range(1, ranks + 1))]
    rpc.init_rpc(names[rank], rank=rank, world_size=ranks + 1)
    if rank == 0:
        server = rpc.RRef(Server(values))
        warm = [rpc.rpc_async(name, torch_worker, args=(server, values, 2)) for name in names[1:]]
        torch.futures.wait_all(warm)
        began = time.perf_counter()
        work = [rpc.rpc_async(name, torch_worker, args=(server, values, updates), timeout=0) for name in names[1:]]
        torch.futures.wait_all(work)
        seconds = time.perf_counter() - began
        if not bool((server.local_value().w == ranks * (updates + 2)).all()):
            raise SystemExit("torch_store.py: updates were lost")
        print(json.dumps(ranks * updates / seconds), flush=True)
    rpc.shutdown()


def run(contender: str, ranks: int, values: int, updates: int) -> float:
    """Updates per second, of a job of its own."""
    counts = [str(values), str(updates)]
    if contender != "torch":
        command = [str(Path(sys.executable).with_name("mpirun")), "-n", str(ranks), sys.executable, __file__]
        done = subprocess.run([*command, "--work", contender, *counts], stdout=subprocess.PIPE, check=True, timeout=120)
        return float(json.loads(done.stdout))
    with tempfile.TemporaryDirectory() as folder:
        port = 20000 + os.getpid() % 20000
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TMPDIR": folder}
        command = [sys.executable, __file__, "--work", "torch", *counts, "--ranks", str(ranks), "--rank"]
        jobs = [
            subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE if rank == 0 else None)
            for rank in range(ranks + 1)
        ]
        said = [job.communicate(timeout=120)[0] for job in jobs]
        if any(job.returncode for job in jobs):
            raise SystemExit("torch_store.py: a process of PyTorch has failed")
        return float(json.loads(said[0]))


def main() -> None:
    """Measure, print, and keep the results; or one process's part."""
    parser = argparse.ArgumentParser(description="Updates per second beside PyTorch's RPC.")
    parser.add_argument("--ranks", type=int, default=2, help="workers (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    parser.add_argument("--work", nargs=3, metavar=("CONTENDER", "VALUES", "UPDATES"), help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        contender, values, updates = asked.work[0], int(asked.work[1]), int(asked.work[2])
        if contender == "torch":
            torch_process(asked.rank, asked.ranks, values, updates)
        else:
            store_updates(None if contender == "shared" else 1, values, updates)
        return
    from fault_jobs import describe

    results: list[dict[str, Any]] = []
    for values, updates in ((1 << 10, 300), (1 << 20, 40)):
        rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for _ in range(_TIMES):
            for name in CONTENDERS:
                rates[name].append(run(name, asked.ranks, values, updates))
        medians = {name: statistics.median(each) for name, each in rates.items()}
        row = {"values": values, "ranks": asked.ranks, **{f"{name}_per_second": x for name, x in medians.items()}}
        row |= {f"{name}_over_torch": medians[name] / medians["torch"] for name in CONTENDERS[:-1]}
        results.append(row)
        print("  ".join(f"{name} {x:.4g}" for name, x in row.items()), flush=True)
        if asked.json:
            kept = {"benchmark": "torch_store", "machine": describe(), "results": results}
            asked.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
