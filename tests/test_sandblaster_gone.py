"""Sandblaster when a rank dies or ends before the others."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = [pytest.mark.single, pytest.mark.timeout(60)]

START = """
import os, sys, time
import numpy as np
from mpi4py import MPI
import bitring
comm = MPI.COMM_WORLD
last = comm.rank == comm.size - 1
class Model(bitring.Softmax):
    dies = False
    def loss_and_gradients(self, *args, **more):
        if self.dies:
            os._exit(0)
        return super().loss_and_gradients(*args, **more)
rng = np.random.default_rng(0)
x, y = rng.standard_normal((200, 5)), rng.integers(0, 3, 200)
model = Model((5,), 3, dtype=np.float64)
job = bitring.Sandblaster(model, bitring.LBFGS(), comm=comm, portions=20)
job.step(x, y)
"""

DIES = """
job.synchronize()
model.dies = last
began = time.monotonic()
try:
    for _ in range(200):
        job.step(x, y)
        time.sleep(0.02)
    print(f"rank {comm.rank} went on", flush=True)
except bitring.DeadRankError as error:
    print(f"rank {comm.rank}: {error.ranks} {time.monotonic() - began < 10}", flush=True)
"""

ENDS = """
if last:
    sys.exit(0)
losses = [job.step(x, y) for _ in range(5)]
print(f"rank {comm.rank}: {losses == sorted(losses, reverse=True)}", flush=True)
try:
    job.parameters()
except RuntimeError as error:
    print(f"rank {comm.rank}: {error}", flush=True)
"""


def test_a_death_is_named(on_ranks, tmp_path: Path):
    done = on_ranks(3, "-c", START + DIES, cwd=tmp_path)
    assert sorted(done.stdout.split("\n")[:2]) == ["rank 0: (2,) True", "rank 1: (2,) True"], done.stdout + done.stderr


def test_a_rank_that_ends_serves_its_shard_until_all_have(on_ranks, tmp_path: Path):
    done = on_ranks(3, "-c", START + ENDS, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        assert f"rank {rank}: True" in done.stdout
        wanted = f"rank {rank}: Sandblaster.parameters: ranks [2] have freed it, or have ended"
        assert wanted in done.stdout, done.stdout + done.stderr
