"""A pipeline of two stages on two cores, against one rank alone, and against what its micro-batches allow.

    mpirun -n 2 python benchmarks/pipeline.py --json FILE

An MLP of four dense layers with 1,024 outputs each, SGD with momentum, one BLAS thread a rank. The first layer needs no
gradient by its input, and has 1,536 inputs so that it computes as much as the others: two stages are equal. With m
micro-batches a pipeline of two stages can be 2m/(m + 1) times as fast as one rank.

These take turns: one rank makes the step, the other sleeps; both ranks make the whole step, each its own, which tells
what two busy cores of this machine take from each other; one rank in micro-batches, which are smaller matrices; the
pipeline by each schedule. A time is the slowest rank's, and of several the median. First the parameters after three
steps are compared with one rank's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

INPUTS, WIDTH, STAGES = 1536, 1024, [("dense1", "dense2"), ("dense3", "dense4")]


def main() -> None:
    parser = argparse.ArgumentParser(description="A pipeline of two stages on two cores.")
    parser.add_argument("--samples", type=int, default=2048, help="of a batch (%(default)s)")
    parser.add_argument("--microbatches", type=int, default=8, help="%(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="times each is timed (%(default)s)")
    parser.add_argument("--json", type=Path, help="keep the results here")
    asked = parser.parse_args()

    from mpi4py import MPI
    from threadpoolctl import threadpool_limits

    from bitring.commands._ranks import ending_together
    from bitring.nodes import describe

    comm = MPI.COMM_WORLD
    if comm.size != 2:
        parser.error(f"it needs two ranks; got {comm.size}")
    with ending_together(comm):
        threadpool_limits(limits=1)
        machine = describe(comm)
        found = measure(comm, asked.samples, asked.microbatches, asked.rounds)
        if comm.rank == 0 and asked.json is not None:
            found = {"benchmark": "pipeline", "machine": machine, "results": found}
            asked.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(comm: Any, samples: int, microbatches: int, rounds: int) -> dict[str, Any]:
    """Times of all. Collective."""
    from mpi4py import MPI

    import bitring
    from bitring.commands._ranks import meet

    def model() -> Any:
        return bitring.MLP((INPUTS,), WIDTH, (WIDTH,) * 3, seed=1)

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((samples, INPUTS), np.float32), rng.integers(0, WIDTH, samples)
    optimizer = bitring.SGD(lr=1e-3, momentum=0.9)
    alone = model()
    state = optimizer.init(alone.parameters)

    def whole() -> None:
        _, gradients = alone.loss_and_gradients(x, y)
        optimizer.update(alone.parameters, gradients, state)

    def split(on: Any, stages: Any, schedule: str) -> Any:
        placement = bitring.Placement(stages=stages, microbatches=microbatches, schedule=schedule)
        return bitring.ModelParallel(model(), optimizer, comm=on, placement=placement)

    schedules = ("one_forward_one_backward", "gpipe")
    pipelines = {schedule: split(comm, STAGES, schedule) for schedule in schedules}
    in_parts = split(MPI.COMM_SELF, 1, schedules[0])
    for _ in range(3):
        whole()
        for each in pipelines.values():
            each.step(x, y)
    for schedule, each in pipelines.items():
        after = each.parameters()
        for name, w in alone.parameters.items():
            if not np.allclose(after[name], w, rtol=1e-3, atol=1e-4 * np.abs(w).max()):
                raise ValueError(f"{schedule}: {name} is not as on one rank")

    def on_one(work: Callable[[], object]) -> Callable[[], object]:
        return lambda: work() if comm.rank == 0 else None

    contenders: dict[str, Callable[[], object]] = {
        "one rank": on_one(whole),
        "both ranks, each all of it": whole,
        "one rank, in micro-batches": on_one(lambda: in_parts.step(x, y)),
        **{schedule: lambda each=each: each.step(x, y) for schedule, each in pipelines.items()},  # type: ignore[misc]
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    waited = dict.fromkeys(schedules, 0.0)
    for each in pipelines.values():
        each.telemetry()
    for _ in range(rounds):
        for name, work in contenders.items():
            meet(comm)
            begin = time.perf_counter()
            work()
            mine = time.perf_counter() - begin
            meet(comm)
            seconds[name].append(comm.allreduce(mine, MPI.MAX))
    for schedule, each in pipelines.items():
        waited[schedule] = comm.allreduce(each.telemetry()["conversion_seconds"], MPI.MAX) / rounds
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ideal = 2 * microbatches / (microbatches + 1)
    found: dict[str, Any] = {"samples": samples, "microbatches": microbatches, "ideal_speedup": ideal}
    found |= {"milliseconds": {name: 1e3 * each for name, each in medians.items()}}
    found |= {"speedup": {schedule: medians["one rank"] / medians[schedule] for schedule in schedules}}
    found |= {"of_ideal": {schedule: speedup / ideal for schedule, speedup in found["speedup"].items()}}
    found |= {"waited_milliseconds": {schedule: 1e3 * each for schedule, each in waited.items()}}
    if comm.rank == 0:
        print(f"{samples} samples, {microbatches} micro-batches: at most {ideal:.2f} times as fast")
        for name, each in medians.items():
            of = (
                f", {found['speedup'][name]:.2f} times, {found['of_ideal'][name]:.2f} of that" if name in waited else ""
            )
            print(f"  {name}: {1e3 * each:.1f} ms{of}")
        print(f"  waited: {found['waited_milliseconds']}")
    return found


if __name__ == "__main__":
    main()
