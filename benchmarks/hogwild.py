"""HOGWILD! on a node: updates per second of all ranks, against those of one.

    mpirun -n 2 python benchmarks/hogwild.py --json FILE

Logistic regression tells even digits from odd ones by the pairs of pixels that are both dark, some 150 of 2,016 per
image: gradients are sparse. A rank alone and all ranks take turns, batch after batch, while the others sleep; racy, and
under locks. Updates are counted per second of the clock, and of the processor's time, which tells more on a busy
machine. Checked at the end: the accuracy on images that were not seen, which each way of training must reach.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import bitring
from bitring.nodes import describe

_SAMPLES = 8
_BATCH_SECONDS = 0.4
_BATCHES = 6
_ACCURACY = 0.95


def features() -> tuple[list[Any], Any, int]:
    """For each image the places of its features, which are 1; whether the digit is even, 1 or -1; how many places."""
    data = bitring.load("digits")
    pixels = np.concatenate([data.x_train, data.x_test]).reshape(-1, 64)
    labels = np.concatenate([data.y_train, data.y_test])
    numbers = np.zeros((64, 64), np.int64)
    for number, (a, b) in enumerate(itertools.combinations(range(64), 2)):
        numbers[a, b] = number
    found: list[Any] = []
    for image in pixels:
        dark = np.flatnonzero(image > pixels.max() / 2)
        a, b = np.triu_indices(dark.size, 1)
        found.append(numbers[dark[a], dark[b]])
    return found, np.where(labels % 2, -1.0, 1.0), 64 * 63 // 2


class Regression:
    """Steps on images drawn at random, from the model's weights as they are at the moment."""

    def __init__(self, comm: Any, found: list[Any], y: Any, n: int, locks: bool) -> None:
        self._w = comm.empty(n)
        self._w[...] = 0
        mode = bitring.Hogwild(locks=locks)
        self.trainer = bitring.DataParallel({"w": self._w}, bitring.SGD(lr=0.002), comm=comm, mode=mode)
        self._found, self._y = found, y
        self._seen = len(y) * 4 // 5
        self._random = np.random.default_rng(comm.rank)

    def step(self) -> None:
        """One update."""
        chosen = self._random.integers(0, self._seen, _SAMPLES)
        places = [self._found[i] for i in chosen]
        margins = [self._y[i] * float(self._w[at].sum()) for i, at in zip(chosen, places, strict=True)]
        slopes = -self._y[chosen] / (1 + np.exp(margins))
        values = np.repeat(slopes.astype(np.float32), [at.size for at in places])
        self.trainer.step({"w": bitring.Sparse(np.concatenate(places), values, self._w.shape)})

    def accuracy(self) -> float:
        """Of the images that were not seen."""
        w = self._w.copy()
        right = [self._y[i] * w[self._found[i]].sum() > 0 for i in range(self._seen, len(self._y))]
        return float(np.mean(right))


def rates(comm: Any, model: Regression, ranks: int) -> tuple[float, float]:
    """Updates per second by the first ``ranks`` ranks: of the clock, and of each one's processor."""
    comm.Barrier()
    made, began, busy = 0, time.perf_counter(), time.process_time()
    while comm.rank < ranks and time.perf_counter() - began < _BATCH_SECONDS:
        model.step()
        made += 1
    busy = time.process_time() - busy
    done = comm.Ibarrier()
    while not done.Test():
        time.sleep(1e-3)
    return comm.allreduce(made / _BATCH_SECONDS), comm.allreduce(made / busy if made else 0.0)


def main() -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description="Updates per second by HOGWILD!, of all ranks and of one.")
    parser.add_argument("--json", type=Path, help="keep the results here")
    asked = parser.parse_args()
    comm = bitring.Communicator(MPI.COMM_WORLD.Dup())
    machine = describe(comm)
    found, y, n = features()
    results: list[dict[str, Any]] = []
    for locks in (False, True):
        model = Regression(comm, found, y, n, locks)
        rates(comm, model, comm.size)
        pairs = [(rates(comm, model, 1), rates(comm, model, comm.size)) for _ in range(_BATCHES)]
        model.trainer.synchronize()
        accuracy = model.accuracy()
        if accuracy < _ACCURACY:
            raise SystemExit(f"hogwild.py: the accuracy is {accuracy:.3f} only")
        result: dict[str, Any] = {"locks": locks, "ranks": comm.size, "accuracy": accuracy}
        for kind, name in enumerate(("clock", "processor")):
            one, everyone = (statistics.median(each[kind] for each in side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(b[kind] / a[kind] for a, b in pairs)
            result[name] = {"of_one": one, "of_all": everyone, "ratio": ratio}
        results.append(result)
        comm.Barrier()
        model.trainer.free()
        if comm.rank == 0:
            print(f"{'with locks' if locks else 'racy'}, accuracy {accuracy:.3f}")
            for name in ("clock", "processor"):
                one, everyone, ratio = result[name].values()
                rates_of = f"{one:6.0f} updates by one rank, {everyone:6.0f} by all: {ratio:.2f} times"
                print(f"  per second of the {name:9} {rates_of}")
    if comm.rank == 0 and asked.json:
        whole = {"benchmark": "hogwild", "machine": machine, "results": results}
        asked.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
