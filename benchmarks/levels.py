"""What the levels of 1-bit codes cost in accuracy: short trainings without a warm-up, at a learning rate that is high.

    mpirun -n 4 python benchmarks/levels.py --model mlp --lr 0.05 --seeds 8 --json FILE

Fashion-MNIST; the MLP 784-256-10 on 20,000 samples, or the CNN on 10,000; batches of 64, momentum 0.9, 2 epochs. Each
seed has the same start and batches for every exchange. Exact training itself moves by a point when only the order of
its sums changes: means say something, single runs do not.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import bitring
from bitring.models.dataset import Data, load
from bitring.nodes import describe

BATCH, EPOCHS = 64, 2
SAMPLES = {"mlp": 20_000, "cnn": 10_000}


def train(data: Data, model_name: str, compression: str | None, lr: float, seed: int) -> dict[str, Any]:
    """One training. Collective."""
    comm, samples = MPI.COMM_WORLD, SAMPLES[model_name]
    model: Any = (
        bitring.MLP(data.input_shape, data.classes, hidden=(256,), seed=seed)
        if model_name == "mlp"
        else bitring.CNN(data.input_shape, data.classes, seed=seed)
    )
    trainer = bitring.DataParallel(
        model.parameters, bitring.SGD(lr=lr, momentum=0.9), comm=comm, compression=compression
    )
    for epoch in range(EPOCHS):
        order = np.random.default_rng((seed, epoch)).permutation(samples)
        for first in range(0, samples - BATCH + 1, BATCH):
            mine = order[first : first + BATCH][comm.rank :: comm.size]
            _, gradients = model.loss_and_gradients(data.x_train[mine], data.y_train[mine])
            trainer.step(gradients, weight=len(mine))
    result = {
        "accuracy": 100 * float(model.accuracy(data.x_test, data.y_test)),
        "bytes_sent": comm.allreduce(trainer.bytes_sent) / comm.size,
        "residual_ratio": trainer.telemetry().get("residual_ratio"),
    }
    trainer.free()
    return result


def main() -> None:
    """Train each case with each seed; rank 0 prints, and writes the file."""
    parser = argparse.ArgumentParser(description="Accuracy by the levels of 1-bit codes.")
    parser.add_argument("--model", choices=list(SAMPLES), default="mlp")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--compression", nargs="*", default=["onebit", "onebit:levels=row", "onebit:levels=block"])
    parser.add_argument("--json", type=Path, help="runs that this file holds already are not made again")
    asked = parser.parse_args()
    comm, data = MPI.COMM_WORLD, load("fashion_mnist")
    found = {"model": asked.model, "lr": asked.lr, "ranks": comm.size, "machine": describe(comm), "cases": {}}
    if comm.rank == 0 and asked.json and asked.json.exists():
        found["cases"] = json.loads(asked.json.read_text(encoding="utf-8"))["cases"]
    cases: dict[str, Any] = comm.bcast(found["cases"], 0)
    found["cases"] = cases
    for compression in (None, *asked.compression):
        name = compression or "exact"
        runs = cases.setdefault(name, [])
        for seed in range(len(runs), asked.seeds):
            runs.append(train(data, asked.model, compression, asked.lr, seed))
            if comm.rank == 0 and asked.json:
                asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if comm.rank == 0:
            gaps = [run["accuracy"] - exact["accuracy"] for run, exact in zip(runs, cases["exact"], strict=False)]
            print(
                f"{name}: {statistics.mean(run['accuracy'] for run in runs):.2f}%, to exact "
                f"{statistics.mean(gaps):+.2f} ({', '.join(f'{gap:+.1f}' for gap in gaps)}), bytes 1/"
                f"{cases['exact'][0]['bytes_sent'] / max(1, runs[0]['bytes_sent']):.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
