"""What gradients that are a step old cost in accuracy: ``delayed`` against ``sync``, by momentum and learning rate.

    mpirun -n 2 python benchmarks/delayed.py --json FILE

Fashion-MNIST, 20,000 samples, MLP 784-256-10, batches of 64, 2 epochs, no warm-up. Each seed has the same start and
batches for every case. Runs that FILE holds already are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
from mpi4py import MPI

import bitring
from bitring.models.dataset import Data, load
from bitring.nodes import describe

SAMPLES, BATCH, EPOCHS = 20_000, 64, 2
MODES = ("sync", "delayed", "delayed:steps=3")
RATES = (0.05, 0.01)
MOMENTA = (0.9, 0.8, 0.5, 0.0)
COMPRESSIONS = (None, "onebit")


def train(data: Data, mode: str, lr: float, momentum: float, compression: str | None, seed: int) -> float:
    """The accuracy in percent on test data. Collective."""
    comm = MPI.COMM_WORLD
    model = bitring.MLP(data.input_shape, data.classes, hidden=(256,), seed=seed)
    trainer = bitring.DataParallel(
        model.parameters, bitring.SGD(lr=lr, momentum=momentum), comm=comm, mode=mode, compression=compression
    )
    for epoch in range(EPOCHS):
        order = np.random.default_rng((seed, epoch)).permutation(SAMPLES)
        for first in range(0, SAMPLES - BATCH + 1, BATCH):
            mine = order[first : first + BATCH][comm.rank :: comm.size]
            _, gradients = model.loss_and_gradients(data.x_train[mine], data.y_train[mine])
            trainer.step(gradients, weight=len(mine))
    trainer.synchronize()
    trainer.free()
    return 100 * float(model.accuracy(data.x_test, data.y_test))


def main() -> None:
    """Train each case with each seed; rank 0 prints, and writes the file."""
    parser = argparse.ArgumentParser(description="Accuracy with gradients that are a step old.")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    comm, data = MPI.COMM_WORLD, load("fashion_mnist")
    cases: dict[str, list[float]] = {}
    if comm.rank == 0 and asked.json and asked.json.exists():
        cases = json.loads(asked.json.read_text(encoding="utf-8"))["accuracy"]
    cases = comm.bcast(cases, 0)
    machine = describe(comm)
    for lr in RATES:
        for momentum in MOMENTA:
            for compression in COMPRESSIONS:
                for mode in MODES:
                    name = f"{mode}, lr {lr}, momentum {momentum}, {compression or 'exact'}"
                    runs = cases.setdefault(name, [])
                    for seed in range(len(runs), asked.seeds):
                        runs.append(train(data, mode, lr, momentum, compression, seed))
                        if comm.rank == 0 and asked.json:
                            found = {"benchmark": "delayed", "machine": machine, "accuracy": cases}
                            asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                    if comm.rank == 0:
                        base = cases[name.replace(mode, "sync", 1)]
                        gap = statistics.mean(runs) - statistics.mean(base)
                        print(f"{name}: {statistics.mean(runs):.2f}, to sync {gap:+.2f}", flush=True)


if __name__ == "__main__":
    main()
