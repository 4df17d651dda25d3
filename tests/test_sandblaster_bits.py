"""Sandblaster's parameters have the same bits on any number of ranks, of any speed, with and without copies."""

import time
from typing import Any

import numpy as np
import pytest

import bitring
from bitring.training.lbfgs import LBFGS
from bitring.training.sandblaster import Sandblaster

STEPS = 20
RNG = np.random.default_rng(5)
X = RNG.standard_normal((480, 12))
Y = (X @ RNG.standard_normal((12, 4)) + RNG.standard_normal((480, 4))).argmax(1)


class Slow(bitring.MLP):
    """An MLP that sleeps."""

    sleep = 0.0

    def loss_and_gradients(self, *args: Any, **more: Any) -> Any:
        time.sleep(self.sleep)
        return super().loss_and_gradients(*args, **more)


def trained(comm: Any, backups: bool = True, slow: bool = False) -> tuple[list[float], bytes, bytes]:
    """The losses, and the bytes of the parameters and of the model's."""
    model = Slow((12,), 4, (8,), dtype=np.float64, seed=comm.rank)
    job = Sandblaster(model, LBFGS(), comm=comm, portions=8, backups=backups)
    losses = []
    for step in range(STEPS):
        model.sleep = 0.002 * ((comm.rank + step) % 3) if slow and step % 4 == 0 else 0.0
        losses.append(job.step(X, Y))
    parameters = job.parameters()
    job.free()
    found, own = (b"".join(w.tobytes() for w in each.values()) for each in (parameters, model.parameters))
    return losses, found, own


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], bytes, bytes]:
    """The result of one rank."""
    from mpi4py import MPI

    return trained(MPI.COMM_SELF)


@pytest.mark.parametrize("backups", [True, False])
def test_bits_of_one_rank_on_any_number(comm, agree, alone, backups):
    agree(comm, trained(comm, backups) == alone)
    agree(comm, alone[0] == sorted(alone[0], reverse=True))


def test_bits_with_ranks_of_any_speed(comm, agree, alone):
    agree(comm, trained(comm, slow=True) == alone)
