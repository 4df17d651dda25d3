"""The bits of trainings: a digest of the parameters after some steps, for each mode, compressor and algorithm.

    mpirun -n 2 python benchmarks/digests.py FILE

Run before a change that must not change results, and after it: the files must be equal. Every rank must have the same
bits, which is checked first. The key names the case; the library, the number of ranks and the engine are the caller's.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

import bitring

STEPS = 7


def train(**settings: Any) -> str:
    """Train some steps on made-up data with samples of unequal weights; the digest of the parameters."""
    comm = MPI.COMM_WORLD
    model = bitring.MLP((40,), 7, seed=1)
    trainer = bitring.DataParallel(
        model.parameters, bitring.SGD(lr=0.05, momentum=0.9), comm=comm, bucket_bytes=20_000, **settings
    )
    random = np.random.default_rng(comm.rank)
    for step in range(STEPS):
        n = (comm.rank + step) % 4 * 3
        x, y = random.normal(size=(n, 40)).astype(np.float32), random.integers(0, 7, n)
        _, gradients = model.loss_and_gradients(x, y)
        trainer.step(gradients, weight=n)
    trainer.synchronize()
    digests = comm.allgather(trainer.digest())
    assert len(set(digests)) == 1, (settings, digests)
    trainer.free()
    return digests[0]


def main() -> None:
    """Train each case; rank 0 writes the file."""
    modes = {"sync": "sync", "local": bitring.Local(tau=3), "block_momentum": bitring.BlockMomentum(tau=3)}
    found: dict[str, str] = {}
    for mode, name in itertools.product(modes, [None, *bitring.compressors()]):
        found[f"{mode}, {name or 'exact'}"] = train(mode=modes[mode], compression=name)
    for algorithm in bitring.algorithms():
        found[f"sync, {algorithm}"] = train(algorithm=algorithm)
    if MPI.COMM_WORLD.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{len(found)} digests")


if __name__ == "__main__":
    main()
