"""Bcast, Reduce, Allgather and Reduce_scatter_block, and a trainer's step of a small model, against mpi4py's calls.

    python benchmarks/network_calls.py --hosts 4 --rate 1gbit --json FILE
    python benchmarks/network_calls.py --hosts 4 --steps --json FILE
    mpirun -n 2 python benchmarks/network_calls.py --json FILE         on one node

Without mpirun it starts emulated hosts (hosts.py; needs root) and runs itself on them. Calls are of float32 values, out
of place; ``nbytes`` is what each rank gives, of a Reduce_scatter_block what it gets. With --steps: a step of a
multi-layer perceptron on handwritten digits, from gradients to parameters, by ``bitring.DataParallel`` and by hand: the
gradients copied to one flat buffer, ``MPI.Comm.Allreduce`` of it in place, and SGD with momentum in NumPy.

Results are checked before they are timed. The contenders take turns; a time is the median of the samples, each the mean
of repeated calls from the first rank's begin to the last one's end, and processor seconds are those of all ranks
together. So a Bcast whose root runs ahead, as the library's does, may have begun before the last one has ended
everywhere.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hosts
import numpy as np
from network_allreduce import duration, size, sizes

LIBRARY, OURS = "library", "bitring"

_SAMPLE_SECONDS = 10e-3

HIDDEN = {"64-32-10": (32,), "64-512-256-10": (512, 256)}
"""The perceptrons' names and hidden layers."""


class Contender(NamedTuple):
    """``check`` raises where the last ``call`` has left something wrong."""

    call: Callable[[], Any]
    check: Callable[[], None]


def main() -> int:
    parser = argparse.ArgumentParser(description="Calls against mpi4py's.")
    hosts.add_options(parser, hosts=4, rate="1gbit")
    parser.add_argument("--sizes", type=sizes, default="4,64,1KiB,8KiB,64KiB,1MiB", help="%(default)s")
    parser.add_argument("--steps", action="store_true", help="a trainer's step in place of calls")
    parser.add_argument("--samples", type=int, default=9, help="times each is timed (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    asked = parser.parse_args()
    from bitring.launcher import launched_size

    if hosts.lab() is None and launched_size() == 1:
        return hosts.rerun(asked)
    work(asked)
    return 0


def work(asked: argparse.Namespace) -> None:
    """Measure, print, and keep the results. Collective."""
    from mpi4py import MPI

    from bitring.commands._ranks import ending_together, limit_threads
    from bitring.nodes import describe

    comm, lab = MPI.COMM_WORLD, hosts.lab()
    with ending_together(comm):
        limit_threads(comm)
        network = None if lab is None else {"emulated": True, **lab._asdict()}
        rows: list[dict[str, Any]] = []
        for case, contenders in cases(comm, asked):
            row = {**case, **measure(comm, contenders, asked.samples)}
            rows.append(row)
            if comm.rank == 0:
                print(line(row), flush=True)
        machine = describe(comm)
        if comm.rank == 0 and asked.json:
            kept = {"benchmark": "network_calls", "network": network, "machine": machine, "results": rows}
            asked.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def cases(comm: Any, asked: argparse.Namespace) -> Any:
    """What is measured: its description, and the contenders by name. Collective."""
    if asked.steps:
        for name in HIDDEN:
            yield {"model": name}, steps(comm, name)
        return
    import bitring

    own = bitring.Communicator(comm.Dup())
    for nbytes in asked.sizes:
        for name in ("Bcast", "Reduce", "Allgather", "Reduce_scatter_block"):
            yield {"nbytes": nbytes, "call": name}, {LIBRARY: call(comm, name, nbytes), OURS: call(own, name, nbytes)}


def call(comm: Any, name: str, nbytes: int) -> Contender:
    """One call of ``comm``."""
    n, ranks, rank = nbytes // 4, comm.Get_size(), comm.Get_rank()
    mine = (np.arange(n) % 17 + rank).astype(np.float32)
    total = sum(((np.arange(n) % 17 + r).astype(np.float32) for r in range(ranks)), np.zeros(n, np.float32))
    got = np.zeros(n * ranks if name == "Allgather" else n, np.float32)
    if name == "Bcast":
        got[:] = mine
        return Contender(lambda: comm.Bcast(got), lambda: same(got, mine - rank))
    if name == "Reduce":
        return Contender(lambda: comm.Reduce(mine, got), lambda: same(got, total if rank == 0 else 0 * total))
    if name == "Allgather":
        everyone = np.concatenate([mine - rank + r for r in range(ranks)])
        return Contender(lambda: comm.Allgather(mine, got), lambda: same(got, everyone))
    blocks = np.tile(mine, ranks)
    return Contender(lambda: comm.Reduce_scatter_block(blocks, got), lambda: same(got, total))


def steps(comm: Any, name: str) -> dict[str, Contender]:
    """Steps of the same model, from the same gradients."""
    from mpi4py import MPI

    import bitring

    data, rate, momentum = bitring.load("digits"), 0.01, 0.9
    model, other = (bitring.MLP(data.input_shape, data.classes, HIDDEN[name], seed=0) for _ in range(2))
    x, y = (array[comm.rank :: comm.size][:32] for array in (data.x_train, data.y_train))
    _, given = model.loss_and_gradients(x, y)
    gradients = {key: value.copy() for key, value in given.items()}
    trainer = bitring.DataParallel(model.parameters, bitring.SGD(lr=rate, momentum=momentum), comm=comm)
    flat = np.empty(sum(value.size for value in gradients.values()), np.float32)
    velocity, weights = np.zeros_like(flat), other.parameters
    made = {LIBRARY: 0, OURS: 0}

    def by_hand() -> None:
        at = 0
        for value in gradients.values():
            flat[at : at + value.size] = value.reshape(-1)
            at += value.size
        comm.Allreduce(MPI.IN_PLACE, flat)
        np.multiply(velocity, np.float32(momentum), out=velocity)
        np.divide(flat, np.float32(comm.size), out=flat)
        np.add(velocity, flat, out=velocity)
        np.multiply(velocity, np.float32(rate), out=flat)
        at = 0
        for key, value in gradients.items():
            weights[key] -= flat[at : at + value.size].reshape(value.shape)
            at += value.size
        made[LIBRARY] += 1

    def by_trainer() -> None:
        trainer.step(gradients)
        made[OURS] += 1

    def check() -> None:
        if made[LIBRARY] == made[OURS]:
            for key in gradients:
                if not np.allclose(weights[key], model.parameters[key], rtol=1e-4, atol=1e-5):
                    raise RuntimeError(f"{key}: parameters differ after {made[OURS]} steps")

    return {LIBRARY: Contender(by_hand, check), OURS: Contender(by_trainer, check)}


def same(got: Any, want: Any) -> None:
    if not np.array_equal(got, want):
        raise RuntimeError(f"wrong values: {got[:4]} instead of {want[:4]}")


def measure(comm: Any, contenders: dict[str, Contender], samples: int) -> dict[str, Any]:
    """Medians of the contenders' times. Collective."""
    counts: dict[str, int] = {}
    for name, contender in contenders.items():
        contender.call()
        contender.check()
        counts[name] = max(1, math.ceil(_SAMPLE_SECONDS / take(comm, contender.call, 2)[0]))
    most = max(counts.values())
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(samples):
        for name in sorted(contenders, reverse=bool(turn % 2)):
            taken[name].append(take(comm, contenders[name].call, most))
    row: dict[str, Any] = {}
    for name, found in taken.items():
        row[name] = {
            "seconds": statistics.median(seconds for seconds, _ in found),
            "processor_seconds": statistics.median(busy for _, busy in found),
            "samples": [float(f"{seconds:.4g}") for seconds, _ in found],
        }
    row["times_the_library"] = row[LIBRARY]["seconds"] / row[OURS]["seconds"]
    return row


def take(comm: Any, call: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Seconds a call, and processor seconds of all ranks. Collective.

    From the first rank's begin to the last one's end, on the machine's one clock: with more ranks than cores a rank
    that gets one late would otherwise not count the time in which others have run ahead.
    """
    from mpi4py import MPI

    comm.Barrier()
    busy, begin = time.process_time(), time.perf_counter()
    for _ in range(calls):
        call()
    end, busy = time.perf_counter(), time.process_time() - busy
    return (comm.allreduce(end, MPI.MAX) - comm.allreduce(begin, MPI.MIN)) / calls, comm.allreduce(busy) / calls


def line(row: dict[str, Any]) -> str:
    what = row.get("model") or f"{size(row['nbytes']):>8}  {row['call']}"
    times = "".join(
        f"  {name} {duration(row[name]['seconds'])} ({duration(row[name]['processor_seconds'])})"
        for name in (LIBRARY, OURS)
    )
    return f"{what:<32}{times}  {row['times_the_library']:.2f}x"


if __name__ == "__main__":
    sys.exit(main())
