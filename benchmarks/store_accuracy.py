"""The accuracy that modes of the parameter server come to in as many samples as sync, five seeds of each.

    mpirun -n 4 python benchmarks/store_accuracy.py FILE

An MLP 784-128-10 on 20,000 samples of Fashion-MNIST, batches of 16 on each rank, SGD without momentum, five epochs at
falling rates; the last rank is slower: it sleeps as long as its computing takes. Rates are as docs/store.md has them: a
mode that applies each rank's update by itself takes sync's rate over the number of ranks, one that takes the mean of S
updates S times that, and `asynchronous`, which divides by the staleness, sync's. Tested is what `synchronize` leaves,
on 10,000 samples. Each run is added to FILE when it is over, and none is made twice.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import bitring
from bitring.collectives.runtime.objects import allgather, broadcast
from bitring.models.dataset import Data
from bitring.nodes import describe

SEEDS, EPOCHS, BATCH, SAMPLES, LR = 5, 5, 16, 20_000, 0.2
OF_SYNC = {  # mode -> its rate over sync's, on four ranks
    "sync": 1.0,
    "asynchronous": 1.0,
    "asynchronous:scale=none": 0.25,
    "ssp": 0.25,
    "soft_sync": 0.5,
    "backup_workers": 0.75,
    "backup_workers, claimed": 0.75,
    "downpour": 0.25,
    "project_adam": 0.25,
    "hogwild": 0.25,
    "peers": 0.25,
}
"""``peers`` sends by its default, Threshold. ``claimed``: ranks take batches of all samples from a common counter."""


def in_a_new_order(mine: Any, order: np.random.Generator, batches: Any) -> Iterator[tuple[Any, Any]]:
    """Whole batches of this rank's samples."""
    for part in np.split(order.permutation(mine)[: len(mine) // BATCH * BATCH], len(mine) // BATCH):
        yield batches.x[part], batches.y[part]


def accuracy(comm: Any, data: Data, name: str, seed: int) -> float:
    """Per cent of the test samples, after training by one of ``OF_SYNC``."""
    mode, _, claims = name.partition(", ")
    model = bitring.MLP(data.input_shape, data.classes, hidden=(128,), seed=seed)
    parameters = model.parameters
    if mode == "hogwild":
        shared = {name: comm.empty(w.shape, w.dtype) for name, w in parameters.items()}
        for name, w in parameters.items():
            shared[name][...] = w
        model.parameters = parameters = shared
    lr = LR * OF_SYNC[name]
    trainer = bitring.DataParallel(parameters, bitring.SGD(lr=lr), comm=comm, mode=mode)
    mine = np.arange(comm.rank, SAMPLES, comm.size)
    order = np.random.default_rng((seed, comm.rank))
    batches = bitring.Batches(data.x_train[:SAMPLES], data.y_train[:SAMPLES], BATCH)
    for epoch in range(EPOCHS):
        trainer.optimizer = bitring.SGD(lr=lr * (1 - epoch / EPOCHS))
        taken = in_a_new_order(mine, order, batches)
        if claims:
            taken = bitring.claimed(batches, trainer, seed=seed, epoch=epoch)
        for batch in taken:
            begin = time.perf_counter()
            _, gradients = model.loss_and_gradients(*batch)
            if comm.rank == comm.size - 1:
                time.sleep(time.perf_counter() - begin)
            trainer.step(gradients, weight=len(batch[0]))
    trainer.synchronize()
    found: float = broadcast(comm, 100 * model.accuracy(data.x_test, data.y_test), "benchmark")
    trainer.free()
    return found


def main() -> None:
    """Make what runs there are not yet, and print a table."""
    path = Path(sys.argv[1])
    comm = bitring.Communicator(MPI.COMM_WORLD)
    data, machine = bitring.load("fashion-mnist"), describe(comm)
    found: dict[str, Any] = {"machine": machine, "ranks": comm.size, "lr": LR, "of_sync": OF_SYNC, "accuracy": {}}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    found = broadcast(comm, found, "benchmark")
    for seed in range(SEEDS):
        for mode in OF_SYNC:  # the contenders alternate
            runs: list[float] = found["accuracy"].setdefault(mode, [])
            if len(runs) > seed:
                continue
            runs.append(accuracy(comm, data, mode, seed))
            allgather(comm, None, "benchmark")
            if comm.rank == 0:
                path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(f"{seed} {mode:24} {runs[-1]:.2f}", flush=True)
    if comm.rank == 0:
        means = {mode: statistics.mean(runs) for mode, runs in found["accuracy"].items()}
        for mode, mean in means.items():
            print(f"{mode:24} {mean:6.2f}  {mean - means['sync']:+.2f}")


if __name__ == "__main__":
    main()
