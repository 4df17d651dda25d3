"""What a call and a trainer's step cost here, and in another environment, in turns.

    python benchmarks/step.py --against ../before/.venv/bin/python --json FILE
    python benchmarks/step.py --allreduce --against ../before/.venv/bin/python --json FILE

The second times what ``bench allreduce`` compares, size by size: plans by each algorithm, resident ones, plain calls.

Starts the ranks of both environments at once; each sleeps while the other works. A batch of runs of one case is timed
by the one, then by the other, over and over, so that both see the same machine. Shown are, per run, the
best batch, the median of batches, and the best batch by rank 0's processor time, which tells more on a busy machine;
each here and there, and at the end their ratios, which are above 1 where this environment takes longer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BATCH_SECONDS = 5e-3
_NAP_SECONDS = 1e-3
_SETTINGS = {"": {}, "portable ": {"BITRING_NATIVE": "0"}}
"""Environment variables of the ranks, by what their cases' names begin with."""


_SIZES = [4**k for k in range(1, 13)]
"""Bytes, up to 16 MiB."""

Case = Callable[[], object]


def cases() -> dict[str, Callable[[], Case]]:
    """What makes the cases that are timed on the ranks of one job, by name. To make one is collective."""
    import numpy as np
    from mpi4py import MPI

    import bitring
    from bitring import DataParallel

    world, few, received = MPI.COMM_WORLD, np.ones(10), np.empty(10)

    def plan(**settings: Any) -> Case:
        return bitring.plan_allreduce(few, comm=world, **settings)

    def allreduce(algorithm: str) -> Case:
        comm = bitring.Communicator(world, algorithm=algorithm)
        return lambda: comm.Allreduce(MPI.IN_PLACE, few)

    def step(values: int, **settings: Any) -> Case:
        rng = np.random.default_rng(world.rank)
        shapes = {"w": (values - values // 100,), "b": (values // 100,)}
        parameters = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        gradients = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        trainer = DataParallel(parameters, bitring.SGD(lr=1e-6, momentum=0.9), world, **settings)
        return lambda: trainer.step(gradients)

    communicator = bitring.Communicator(world)
    return {
        "plan of 10 values": plan,
        "plan of 10 values by ring": lambda: plan(algorithm="ring"),
        "plan of 10 values by mpi": lambda: plan(algorithm="mpi"),
        "Allreduce of 10 values": lambda: allreduce("auto"),
        "Allreduce of 10 values by ring": lambda: allreduce("ring"),
        "Allreduce of 10 values by mpi": lambda: allreduce("mpi"),
        "Bcast of 10 values": lambda: lambda: communicator.Bcast(few),
        "Reduce of 10 values": lambda: lambda: communicator.Reduce(few, received),
        "step of 1,000 values": lambda: step(1000),
        "step of 1,000 values, onebit": lambda: step(1000, compression="onebit"),
        "step of 1,000 values, local": lambda: step(1000, mode="local"),
        "step of 4 M values": lambda: step(4_000_000),
        "step of 4 M values, onebit": lambda: step(4_000_000, compression="onebit"),
    }


def allreduce_cases() -> dict[str, Callable[[], Case]]:
    """As ``cases``, of exact sums of float32 values."""
    import numpy as np
    from mpi4py import MPI

    import bitring

    world = bitring.Communicator(MPI.COMM_WORLD)
    made: dict[str, Callable[[], Case]] = {}

    def plain(nbytes: int) -> Case:
        x = np.ones(nbytes // 4, np.float32)
        return lambda: world.Allreduce(MPI.IN_PLACE, x)

    def plan(nbytes: int, algorithm: str, empty: Callable[..., Any] = np.empty) -> Case:
        x = empty(nbytes // 4, np.float32)
        x[:] = 1
        return bitring.plan_allreduce(x, comm=world, algorithm=algorithm)

    for nbytes in _SIZES:
        made[f"{nbytes} B, plain call"] = lambda nbytes=nbytes: plain(nbytes)
        made[f"{nbytes} B, auto, resident"] = lambda nbytes=nbytes: plan(nbytes, "auto", world.empty)
        for name in ("auto", *bitring.algorithms()):
            if name not in ("multilane", "leaders"):  # there is one node
                made[f"{nbytes} B, {name}"] = lambda nbytes=nbytes, name=name: plan(nbytes, name)
    return made


def serve(allreduce: bool) -> None:
    """Time what rank 0 is asked for on its standard input, and print it. Asleep in between."""
    import numpy as np
    from mpi4py import MPI

    known, comm = allreduce_cases() if allreduce else cases(), MPI.COMM_WORLD
    names, made = list(known), dict[int, Case]()
    if comm.rank == 0:
        print(json.dumps(names), flush=True)
    while True:
        asked = np.array([int(word) for word in (sys.stdin.readline() or "0 0").split()] if comm.rank == 0 else [0, 0])
        request = comm.Ibcast(asked)
        while not request.Test():
            time.sleep(_NAP_SECONDS)
        number, runs = asked.tolist()
        if runs == 0:
            return
        if number not in made:
            made[number] = known[names[number]]()
        call = made[number]
        comm.Barrier()
        call()
        began, busy = time.perf_counter(), time.process_time()
        for _ in range(runs):
            call()
        seconds = (time.perf_counter() - began) / runs, (time.process_time() - busy) / runs
        comm.Barrier()
        if comm.rank == 0:
            print(*seconds, flush=True)


class Job:
    """The ranks of one environment."""

    def __init__(self, python: Path, ranks: int, settings: dict[str, str], *arguments: str) -> None:
        mpirun = python.parent / "mpirun"
        options = ["--oversubscribe", "--bind-to", "none"] if (python.parent / "ompi_info").exists() else []
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        self._process = subprocess.Popen(
            [mpirun, *options, "-n", str(ranks), python, __file__, "--serve", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **root, "OMP_NUM_THREADS": "1", **settings},
        )
        self.names: list[str] = json.loads(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line: str = self._process.stdout.readline()
        if not line:
            raise SystemExit("step.py: the ranks ended")
        return line

    def time(self, number: int, runs: int) -> tuple[float, ...]:
        """Seconds per run of a case, and those of the processor on rank 0."""
        assert self._process.stdin is not None
        print(number, runs, file=self._process.stdin, flush=True)
        return tuple(map(float, self._answer().split()))

    def end(self) -> None:
        """Let the ranks end."""
        assert self._process.stdin is not None
        print(0, 0, file=self._process.stdin, flush=True)
        self._process.wait()


def shown(seconds: float) -> str:
    """Three digits of a duration."""
    return f"{seconds * 1e9:.0f} ns" if seconds < 1e-5 else f"{seconds * 1e6:.4g} us"


def main() -> None:
    """Time the cases, print, and keep the results."""
    parser = argparse.ArgumentParser(description="What a call and a trainer's step cost, here and elsewhere, in turns.")
    parser.add_argument("--against", type=Path, help="the Python of another environment")
    parser.add_argument("--ranks", type=int, default=2, help="%(default)s")
    parser.add_argument("--batches", type=int, default=50, help="of each case in each environment (%(default)s)")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--json", type=Path, help="keep the results here")
    parser.add_argument("--allreduce", action="store_true", help="time what bench allreduce compares")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.allreduce)
        return
    pythons = [Path(sys.executable)] + ([asked.against.absolute()] if asked.against else [])
    results: dict[str, Any] = {}
    arguments = ["--allreduce"] if asked.allreduce else []
    for prefix, settings in {"": {}}.items() if asked.allreduce else _SETTINGS.items():
        jobs = [Job(python, asked.ranks, settings, *arguments) for python in pythons]
        for number, name in enumerate(jobs[0].names):
            if asked.only not in prefix + name:
                continue
            first = max(min(job.time(number, 10)[0] for _ in range(3)) for job in jobs)
            runs = max(1, min(2000, int(_BATCH_SECONDS / first)))
            taken = [[job.time(number, runs) for job in jobs] for _ in range(asked.batches)]
            columns = [list(zip(*column, strict=True)) for column in zip(*taken, strict=True)]  # of each job
            figures = {
                "best": [min(wall) for wall, _ in columns],
                "median": [statistics.median(wall) for wall, _ in columns],
                "best processor": [min(processor) for _, processor in columns],
            }
            results[prefix + name] = figures
            words = "  ".join(" ".join(map(shown, values)) for values in figures.values())
            ratios = " ".join(f"{values[0] / values[-1]:.2f}" for values in figures.values())
            print(f"{prefix + name:40} {words}  {ratios}", flush=True)
        for job in jobs:
            job.end()
    if asked.json is not None:
        asked.json.write_text(json.dumps({"ranks": asked.ranks, "seconds": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
