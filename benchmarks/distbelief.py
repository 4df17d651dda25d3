"""L-BFGS by Sandblaster, Downpour with AdaGrad, and SGD: accuracy by seconds, and seconds to an accuracy by ranks.

    for p in 2 1 3 4; do mpirun -n $p python benchmarks/distbelief.py FILE; done
    python benchmarks/distbelief.py FILE --plot PICTURE

As in figures 4 and 5 of Dean et al., "Large Scale Distributed Deep Networks", NIPS 2012, but without a warm start. An
MLP 64-128-10 on the digits, three seeds. Each run is added to FILE when it is over, and none is made twice. Four
replicas stand on few cores: a sample takes its rank ``SAMPLE_SECONDS``, the computing and then sleep; all that is
exchanged is real (``chrt -r 1`` before mpirun keeps other work on the machine out). SGD has momentum, and batches of 64
that are cut between the ranks: any number of ranks makes the same steps. In Downpour each rank takes batches of 64 from
a common counter, and pushes and fetches in each step, as theirs did. Rates are those of ``RATES`` that came to the
accuracy with the fewest samples, on two ranks and another seed. Accuracies are of copies of rank 0's parameters, looked
at when a run is over. Checked: Sandblaster's are the same on any number of ranks.
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
from mpi4py import MPI

import bitring
from bitring.collectives.runtime.objects import broadcast
from bitring.commands._pictures import COLORS, figure, plain
from bitring.models.dataset import Data, load
from bitring.nodes import describe

SEEDS, WANTED = 3, 0.94
SAMPLE_SECONDS = 4e-4
EPOCHS, ITERATIONS, BATCH = 10, 25, 64
RATES = {"SGD": (0.2, 0.1, 0.05, 0.02), "Downpour": (0.1, 0.05, 0.02, 0.01)}
METHODS = ("Sandblaster", "Downpour", "SGD")
RATES_SEED = 100

Note = Callable[[int], None]
"""Keeps rank 0's parameters, after so many samples."""


class Slowed(bitring.MLP):
    """A model whose samples take as long as is said, computing included."""

    seconds = 0.0

    def loss_and_gradients(self, *args: Any, **more: Any) -> Any:
        """See Model."""
        end = time.perf_counter() + self.seconds * len(args[0])
        result = super().loss_and_gradients(*args, **more)
        if self.seconds:
            time.sleep(max(0.0, end - time.perf_counter()))
        return result


def sandblaster(model: Slowed, data: Data, rate: float, seed: int, note: Note) -> None:
    """L-BFGS: an iteration looks at all samples, once or more."""
    job = bitring.Sandblaster(model, bitring.LBFGS(), comm=MPI.COMM_WORLD)
    for _ in range(ITERATIONS):
        job.step(data.x_train, data.y_train)
        job.synchronize()
        note(job.evaluations * len(data.y_train))
    job.free()


def sgd(model: Slowed, data: Data, rate: float, seed: int, note: Note) -> None:
    """All ranks make each step together."""
    comm, done = MPI.COMM_WORLD, 0
    trainer = bitring.DataParallel(model.parameters, bitring.SGD(lr=rate, momentum=0.9), comm=comm)
    for epoch in range(EPOCHS):
        batches = bitring.Batches(data.x_train, data.y_train, BATCH)
        for step, (x, y) in enumerate(bitring.shard(batches, comm, seed=seed, epoch=epoch)):
            trainer.step(model.loss_and_gradients(x, y)[1], weight=len(x))
            done = min(epoch * len(data.y_train) + (step + 1) * BATCH, (epoch + 1) * len(data.y_train))
            if step % 4 == 3:
                note(done)
    trainer.free()


def downpour(model: Slowed, data: Data, rate: float, seed: int, note: Note) -> None:
    """Each rank at its own pace; rank 0 counts its own samples as every rank's."""
    comm, done = MPI.COMM_WORLD, 0
    mode = bitring.Downpour(fetch=1, push=1)
    trainer = bitring.DataParallel(model.parameters, bitring.AdaGrad(lr=rate), comm=comm, mode=mode)
    for epoch in range(EPOCHS):
        batches = bitring.Batches(data.x_train, data.y_train, BATCH)
        for x, y in bitring.claimed(batches, trainer, seed=seed, epoch=epoch):
            trainer.step(model.loss_and_gradients(x, y)[1], weight=len(x))
            done += len(x) * comm.size
            if trainer.steps % max(1, 4 // comm.size) == 0:
                note(done)
    trainer.leave()
    trainer.free()


RUNS = {"Sandblaster": sandblaster, "Downpour": downpour, "SGD": sgd}


def curve(data: Data, method: str, rate: float, seed: int, sample_seconds: float) -> list[tuple[float, int, float]]:
    """Seconds, samples and test accuracy, on rank 0; an empty list elsewhere. Collective."""
    comm = MPI.COMM_WORLD
    model = Slowed(data.input_shape, data.classes, hidden=(128,), seed=seed)
    model.loss_and_gradients(data.x_train[:BATCH], data.y_train[:BATCH])
    model.seconds = sample_seconds
    kept: list[tuple[float, int, dict[str, Any]]] = []
    comm.barrier()
    begin = time.perf_counter()

    def note(samples: int) -> None:
        if comm.rank == 0:
            values = {name: w.copy() for name, w in model.parameters.items()}
            kept.append((time.perf_counter() - begin, samples, values))

    RUNS[method](model, data, rate, seed, note)
    points: list[tuple[float, int, float]] = []
    for seconds, samples, values in kept:
        for name, w in values.items():
            model.parameters[name][...] = w
        points.append((round(seconds, 4), samples, round(float(model.accuracy(data.x_test, data.y_test)), 4)))
    comm.barrier()
    return points


def first(points: list[Any], of: int) -> float:
    """The seconds (0) or samples (1) at which the accuracy was reached; infinite if never."""
    return next((point[of] for point in points if point[2] >= WANTED), float("inf"))


def measure(path: Path) -> None:
    """Make the runs on this many ranks that FILE does not have."""
    comm, data = MPI.COMM_WORLD, load("digits")
    machine = describe(comm)
    found: dict[str, Any] = {"benchmark": "distbelief", "wanted": WANTED, "sample_seconds": SAMPLE_SECONDS}
    found |= {"machines": {}, "rates": {}, "runs": []}
    if comm.rank == 0 and path.exists():
        found = json.loads(path.read_text())
    found = broadcast(comm, found, "benchmark")

    def keep() -> None:
        if comm.rank == 0:
            path.write_text(json.dumps(found) + "\n", encoding="utf-8")

    for method, rates in RATES.items():
        if method not in found["rates"] and comm.size == 2:
            needed = {rate: first(curve(data, method, rate, RATES_SEED, 0.0), 1) for rate in rates}
            found["rates"][method] = {str(rate): n if np.isfinite(n) else None for rate, n in needed.items()}
            found = broadcast(comm, found, "benchmark")
            keep()
    for seed in range(SEEDS):
        for method in METHODS:  # the contenders alternate
            if any((r["ranks"], r["method"], r["seed"]) == (comm.size, method, seed) for r in found["runs"]):
                continue
            rate = 0.0
            if method in RATES:
                if method not in found["rates"]:
                    raise SystemExit("run it on two ranks first, which chooses the rates")
                of = {float(rate): n for rate, n in found["rates"][method].items() if n is not None}
                rate = min(of, key=lambda each: of[each])
            points = curve(data, method, rate, seed, SAMPLE_SECONDS)
            others = [r["curve"] for r in found["runs"] if (r["method"], r["seed"]) == (method, seed)]
            same = all([point[2] for point in points] == [point[2] for point in other] for other in others)
            if method == "Sandblaster" and not broadcast(comm, same, "benchmark"):
                raise SystemExit(f"Sandblaster, seed {seed}: other accuracies on {comm.size} ranks")
            found["machines"][str(comm.size)] = machine
            run = {"ranks": comm.size, "method": method, "seed": seed, "rate": rate or None, "curve": points}
            found["runs"].append(run)
            keep()
            if comm.rank == 0:
                print(f"{comm.size} ranks, {method:12} seed {seed}: {first(points, 0):7.2f} s", flush=True)


def draw(found: dict[str, Any], path: Path) -> None:
    """Accuracy by seconds on the most ranks, and seconds to the accuracy by ranks."""
    drawing = figure(9, 3.8)
    left, right = drawing.subplots(1, 2)
    most = max(run["ranks"] for run in found["runs"])
    for color, method in zip(COLORS, METHODS, strict=False):
        runs = [run for run in found["runs"] if run["method"] == method]
        for run in runs:
            if run["ranks"] == most:
                seconds, _, accuracy = zip(*run["curve"], strict=True)
                label = method if run["seed"] == 0 else None
                left.plot(seconds, accuracy, color=color, label=label, linewidth=1)
        ranks = sorted({run["ranks"] for run in runs})
        to = [[first(run["curve"], 0) for run in runs if run["ranks"] == p] for p in ranks]
        right.plot(ranks, [statistics.median(each) for each in to], "o-", color=color, label=method, linewidth=1.6)
        right.vlines(ranks, [min(each) for each in to], [max(each) for each in to], color=color, linewidth=1)
    for axes in (left, right):
        plain(axes)
    left.set_ylim(0.8, 1)
    left.set_xlabel(f"seconds on {most} ranks")
    left.set_ylabel("test accuracy")
    left.legend(frameon=False)
    right.set_xticks(sorted({run["ranks"] for run in found["runs"]}))
    right.set_ylim(bottom=0)
    right.set_xlabel("ranks")
    right.set_ylabel(f"seconds to {found['wanted']:.0%}; median and range of {SEEDS} seeds")
    drawing.savefig(path)


def main() -> None:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(description="L-BFGS, Downpour with AdaGrad and SGD.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    if asked.plot:
        draw(json.loads(asked.file.read_text()), asked.plot)
    else:
        measure(asked.file)


if __name__ == "__main__":
    main()
