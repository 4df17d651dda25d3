"""L-BFGS against SciPy's, evaluation by evaluation; and against SGD and AdaGrad, accuracy by seconds.

    mpirun -n 2 python benchmarks/batch_methods.py --json FILE --plot FILE

Evaluations: softmax regression and an MLP on the digits, in float64, five starts, to within 1e-6 of SciPy's loss after
60 iterations (both see the same function, ridge included); asked of one rank alone. Accuracy: an MLP 64-128-10 on the
digits, three seeds; each method has the step size that was best for it among those in ``RATES``. Seconds to 94% are the
slowest rank's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import bitring
from bitring.commands._pictures import COLORS, figure, plain
from bitring.models.dataset import Data, load
from bitring.nodes import describe

STARTS, SEEDS, WANTED = 5, 3, 0.94
EPOCHS, ITERATIONS, BATCH = 20, 40, 64
RATES = {"sgd": (0.2, 0.05, 0.02), "adagrad": (0.05, 0.02, 0.01)}


class Ridged:
    """A model whose loss has ridge/2·‖w‖² added, so that its minimum is one."""

    def __init__(self, model: Any, x: Any, y: Any, ridge: float) -> None:
        self.model, self.x, self.y, self.ridge = model, x, y, ridge
        self.parameters = model.parameters
        self.seen: list[float] = []

    def flat(self) -> Any:
        """The parameters in one array."""
        return np.concatenate([w.ravel() for w in self.parameters.values()])

    def loss_and_gradients(self, x: Any, y: Any) -> tuple[float, dict[str, Any]]:
        """As the model's; of a portion, whose share of the ridge is its share of the samples."""
        loss, gradients = self.model.loss_and_gradients(x, y)
        for name, w in self.parameters.items():
            loss += 0.5 * self.ridge * float((w**2).sum())
            gradients[name] = gradients[name] + self.ridge * w
        return loss, gradients

    def __call__(self, w: Any) -> tuple[float, Any]:
        """The loss and gradient at ``w``, for SciPy."""
        first = 0
        for value in self.parameters.values():
            value[...] = w[first : first + value.size].reshape(value.shape)
            first += value.size
        loss, gradients = self.loss_and_gradients(self.x, self.y)
        self.seen.append(loss)
        return loss, np.concatenate([g.ravel() for g in gradients.values()])


def evaluations(data: Data, kind: str, seed: int) -> dict[str, float]:
    """How many evaluations each needs, and the losses; on this rank alone."""
    import scipy.optimize

    hidden: Any = {"hidden": (32,)} if kind == "mlp" else {}
    x, y = data.x_train.astype(np.float64), data.y_train

    def fresh() -> Ridged:
        maker: Any = {"softmax": bitring.Softmax, "mlp": bitring.MLP}[kind]
        return Ridged(maker(data.input_shape, data.classes, dtype=np.float64, seed=seed, **hidden), x, y, 1e-3)

    theirs = fresh()
    options = {"maxcor": 10, "maxiter": 60, "maxfun": 1000, "ftol": 0.0, "gtol": 0.0}
    end = scipy.optimize.minimize(theirs, theirs.flat(), jac=True, method="L-BFGS-B", options=options).fun
    needed = next(i for i, loss in enumerate(theirs.seen, 1) if loss <= end + 1e-6)
    ours = fresh()
    job = bitring.Sandblaster(ours, bitring.LBFGS(memory=10), comm=MPI.COMM_SELF, portions=1)
    loss = np.inf
    while loss > end + 1e-6 and job.evaluations < 3 * needed:
        loss = job.step(x, y)
    result = {"scipy": needed, "bitring": job.evaluations, "scipy_loss": float(end), "bitring_loss": float(loss)}
    job.free()
    return result


def curve(data: Data, method: str, rate: float, seed: int) -> list[tuple[float, float]]:
    """Seconds and test accuracy after each epoch or iteration. Collective."""
    comm = MPI.COMM_WORLD
    model = bitring.MLP(data.input_shape, data.classes, hidden=(128,), seed=seed)
    points: list[tuple[float, float]] = []
    spent, begin = 0.0, time.perf_counter()

    def note() -> None:
        nonlocal spent, begin
        spent += time.perf_counter() - begin
        points.append((max(comm.allgather(spent)), float(model.accuracy(data.x_test, data.y_test))))
        begin = time.perf_counter()

    if method == "lbfgs":
        job = bitring.Sandblaster(model, bitring.LBFGS(), comm=comm, portions=4 * comm.size)
        for _ in range(ITERATIONS):
            job.step(data.x_train, data.y_train)
            job.synchronize()
            note()
        job.free()
        return points
    optimizer = bitring.SGD(lr=rate, momentum=0.9) if method == "sgd" else bitring.AdaGrad(lr=rate)
    trainer = bitring.DataParallel(model.parameters, optimizer, comm=comm)
    for epoch in range(EPOCHS):
        batches = bitring.Batches(data.x_train, data.y_train, BATCH)
        for x, y in bitring.shard(batches, comm, seed=seed, epoch=epoch):
            trainer.step(model.loss_and_gradients(x, y)[1], weight=len(x))
        note()
    trainer.free()
    return points


def seconds_to(points: list[tuple[float, float]], wanted: float) -> float:
    """When the accuracy was reached; infinite if never."""
    return next((seconds for seconds, accuracy in points if accuracy >= wanted), float("inf"))


def main() -> None:
    """Measure, and print; rank 0 writes the files."""
    parser = argparse.ArgumentParser(description="L-BFGS against others.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    comm, data = MPI.COMM_WORLD, load("digits")
    machine = describe(comm)
    found: dict[str, Any] = {"benchmark": "batch_methods", "machine": machine, "evaluations": {}, "methods": {}}
    if comm.rank == 0:
        for kind in ("softmax", "mlp"):
            runs = [evaluations(data, kind, seed) for seed in range(STARTS)]
            ratios = [each["bitring"] / each["scipy"] for each in runs]
            found["evaluations"][kind] = {"runs": runs, "median_ratio": statistics.median(ratios)}
            print(f"{kind}: {statistics.median(ratios):.3f} of SciPy's evaluations, median of {STARTS}", flush=True)
    comm.barrier()
    for method in ("lbfgs", "sgd", "adagrad"):
        tried: dict[float, Any] = {}
        for rate in RATES.get(method, (0.0,)):
            tried[rate] = [curve(data, method, rate, seed) for seed in range(SEEDS)]
        of = {rate: statistics.mean(points[-1][1] for points in curves) for rate, curves in tried.items()}
        rate = max(of, key=lambda each: of[each])
        curves = tried[rate]
        to = [seconds_to(points, WANTED) for points in curves]
        found["methods"][method] = {
            "rate": rate or None,
            "accuracy": [points[-1][1] for points in curves],
            "seconds_to_94": [x if np.isfinite(x) else None for x in to],
            "curves": curves,
        }
        if comm.rank == 0:
            print(f"{method} {rate or ''}: {of[rate]:.4f} at the end; to 94%: {to}", flush=True)
    if comm.rank == 0:
        if asked.json:
            asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if asked.plot:
            draw(found["methods"], asked.plot, comm.size)


def draw(methods: dict[str, Any], path: Path, ranks: int) -> None:
    """Accuracy by seconds."""
    drawing = figure(6.5, 4)
    axes = drawing.add_subplot()
    plain(axes)
    for color, (name, method) in zip(COLORS, methods.items(), strict=False):
        for seed, points in enumerate(method["curves"]):
            label = name if seed == 0 else None
            axes.plot(*zip(*points, strict=True), color=color, label=label, linewidth=1)
    axes.set_ylim(0.8, 1)
    axes.set_xlabel("seconds")
    axes.set_ylabel("test accuracy")
    axes.set_title(f"MLP 64-128-10 on the digits, {ranks} ranks, three seeds")
    axes.legend(frameon=False)
    drawing.savefig(path)


if __name__ == "__main__":
    main()
