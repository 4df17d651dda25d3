"""Checkpoints of the parameter server's modes: on as many ranks, and on others."""

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import bitring
from bitring.collectives.runtime.objects import allgather
from bitring.training.checkpoints.loading import load_checkpoint
from bitring.training.checkpoints.saving import save_checkpoint


def parameters(value: float = 0.0) -> dict[str, Any]:
    return {"w": np.full((40, 32), value, np.float32), "b": np.full(7, value)}


def step(trainer: Any, number: int, rank: int) -> None:
    rng = np.random.default_rng((rank, number))
    trainer.step({n: (w - rng.standard_normal(w.shape)).astype(w.dtype) for n, w in trainer.parameters.items()})


OPTIMIZERS = [bitring.SGD(lr=0.05, momentum=0.9), bitring.AdaGrad(lr=0.1), bitring.Adam(lr=0.01)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda each: type(each).__name__)
def test_it_goes_on_to_the_bit_where_the_order_is_fixed(comm, agree, mpi_tmp_path, optimizer):
    """Gathering all without staleness, saved after ranks have made 3 steps, and going on with 3 more."""
    mode = bitring.ParameterServer(gather=comm.size, staleness=0)
    trainer = bitring.DataParallel(parameters(), optimizer, comm=comm, mode=mode)
    for number in range(3):
        step(trainer, number, comm.rank)
    save_checkpoint(mpi_tmp_path / "c.npz", trainer, epoch=7)
    for number in range(3, 6):
        step(trainer, number, comm.rank)
    other = bitring.DataParallel(parameters(9.0), optimizer, comm=comm, mode=mode)
    extra = load_checkpoint(mpi_tmp_path / "c.npz", other)
    agree(comm, extra == {"epoch": 7} and other.steps == 3, f"{extra} {other.steps}")
    for number in range(3, 6):
        step(other, number, comm.rank)
    agree(comm, other.digest() == trainer.digest())
    state = trainer.state_dict()
    for number in range(6, 8):
        step(trainer, number, comm.rank)
    digest = trainer.digest()
    other.load_state_dict(state)
    for number in range(6, 8):
        step(other, number, comm.rank)
    agree(comm, other.digest() == digest)
    trainer.free()
    other.free()


@pytest.mark.parametrize("mode", ["ssp", "downpour", "project_adam"])
@pytest.mark.parametrize("compression", [None, "onebit"])
def test_on_another_number_of_ranks_nothing_is_lost(comm, agree, mpi_tmp_path, mode, compression):
    """From all ranks to one, and from there to all; parameters, slots, and the sum of residuals."""
    optimizer = bitring.AdaGrad(lr=0.1)
    settings: dict[str, Any] = {"mode": mode, "compression": compression}
    trainer = bitring.DataParallel(parameters(), optimizer, comm=comm, **settings)
    for number in range(3 + comm.rank):
        step(trainer, number, comm.rank)
    save_checkpoint(mpi_tmp_path / "all.npz", trainer)
    state = trainer.state_dict()
    trainer.free()
    residuals = allgather(comm, state["mode"].get("residual", {}), "test")
    ok = True
    if comm.rank == 0:
        alone = bitring.DataParallel(parameters(1.0), optimizer, comm=MPI.COMM_SELF, **settings)
        load_checkpoint(mpi_tmp_path / "all.npz", alone)
        there = alone.state_dict()
        ok = all((there["parameters"][n] == x).all() for n, x in state["parameters"].items())
        ok &= all((there["optimizer"]["squares"][n] == x).all() for n, x in state["optimizer"]["squares"].items())
        for name, x in there["mode"].get("residual", {}).items():
            ok &= bool(np.allclose(x, sum(each[name] for each in residuals), atol=1e-5))
        save_checkpoint(mpi_tmp_path / "one.npz", alone)
        alone.free()
    agree(comm, ok)
    again = bitring.DataParallel(parameters(2.0), optimizer, comm=comm, **settings)
    load_checkpoint(mpi_tmp_path / "one.npz", again)
    got = again.state_dict()
    agree(comm, all((got["parameters"][n] == x).all() for n, x in state["parameters"].items()))
    step(again, 9, comm.rank)
    again.synchronize()
    agree(comm, len(set(allgather(comm, again.digest(), "test"))) == 1)
    again.free()
