"""Sandblaster with replicas that are split between ranks: results of whole ones, the same bits on any number."""

import threading
from typing import Any

import numpy as np
import pytest

import bitring
from bitring.collectives.runtime.objects import allgather
from bitring.errors import MismatchError, PeerError
from bitring.training.coordinator import Kind
from bitring.training.lbfgs import LBFGS
from bitring.training.sandblaster import Sandblaster
from bitring.training.sandblaster_service import Service

RNG = np.random.default_rng(6)
X = RNG.standard_normal((120, 11))
Y = (X @ RNG.standard_normal((11, 4)) + RNG.standard_normal((120, 4))).argmax(1)


def model(seed: int = 0) -> Any:
    return bitring.MLP((11,), 4, (9, 7), dtype=np.float64, seed=seed)


def trained(comm: Any, steps: int = 3, **settings: Any) -> tuple[list[float], Any]:
    job = Sandblaster(model(comm.rank), LBFGS(), comm=comm, portions=4, **settings)
    losses = [job.step(X, Y) for _ in range(steps)]
    parameters = job.parameters()
    job.free()
    return losses, np.concatenate([w.reshape(-1) for w in parameters.values()])


def placements(size: int) -> list[tuple[Any, int]]:
    """Placements, and numbers of replicas, that suit so many ranks."""
    found: list[tuple[Any, int]] = [("hybrid", 1)]
    if size % 2 == 0:
        found.append(({"dense1": "columns", "dense2": "rows"}, size // 2))
    if size == 3:
        found.append((bitring.Placement(stages=3, microbatches=2), 1))
    return found


def test_split_replicas_give_what_whole_ones_do(comm, agree):
    wanted_losses, wanted = trained(comm)
    for placement, replicas in placements(comm.size):
        losses, values = trained(comm, placement=placement, replicas=replicas)
        off = float(np.abs(values - wanted).max() / np.abs(wanted).max())
        agree(comm, off < 1e-9 and np.allclose(losses, wanted_losses, rtol=1e-10), f"{replicas} replicas: {off:.1e}")
        everyone = allgather(comm, (losses, values.tobytes()), "test")
        agree(comm, all(each == everyone[0] for each in everyone))


def test_the_same_bits_on_one_replica_and_several(comm, agree):
    if comm.size != 4:
        pytest.skip("needs four ranks")
    two = comm.Split(comm.rank // 2)
    results = [trained(each, placement="hybrid", replicas=each.size // 2) for each in (comm, two)]
    agree(comm, results[0][0] == results[1][0] and results[0][1].tobytes() == results[1][1].tobytes())
    two.Free()


def test_what_is_raised_ends_the_step_on_all_ranks_of_the_replica(comm, agree, monkeypatch):
    job = Sandblaster(model(), LBFGS(), comm=comm, portions=4, placement="hybrid")
    first = job.step(X, Y)

    def fails() -> bool:
        raise OSError("no more portions")

    if comm.rank == 0:  # the leader, between two portions
        monkeypatch.setattr(job, "_has_work", fails)
    with pytest.raises(OSError if comm.rank == 0 else PeerError, match=r"no more portions|has left it by OSError"):
        job.step(X, Y)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="the batch has no samples"):  # before the step
        job.step(X[:0], Y[:0])
    with pytest.raises(ValueError, match="x must have shape"):  # in the passes
        job.step(X[:, :5], Y)
    agree(comm, job.step(X, Y) < first)
    job.free()


def test_the_step_is_over_when_all_ranks_of_the_replica_hear_it(comm, agree, monkeypatch):
    """The leader's word, and not the coordinator's, may be the first that the others hear."""
    hear = Service._hear

    def late(self: Service, message: Any) -> None:
        if message.kind == Kind.OVER:
            threading.Timer(0.1, hear, (self, message)).start()
        else:
            hear(self, message)

    if comm.rank > 0:
        monkeypatch.setattr(Service, "_hear", late)
    job = Sandblaster(model(), LBFGS(), comm=comm, portions=4, placement="hybrid")
    losses = [job.step(X, Y) for _ in range(2)]
    agree(comm, losses == sorted(losses, reverse=True))
    job.free()


def test_a_replicas_ranks_with_other_samples(comm, agree):
    """One has fewer portions than the leader hands out."""
    job = Sandblaster(model(), LBFGS(), comm=comm, placement="hybrid")
    portions = [(X[i : i + 40], Y[i : i + 40]) for i in (0, 40, 80)]
    if comm.size > 1:
        with pytest.raises(MismatchError, match="of a split replica gave other samples"):
            job.step(iter(portions[: 3 - (comm.rank == comm.size - 1)]))
    agree(comm, np.isfinite(job.step(iter(portions))))
    job.free()


def test_no_number_in_a_portion_is_raised_on_all_ranks(comm, agree):
    job = Sandblaster(model(), LBFGS(), comm=comm, portions=4, placement="hybrid")
    first = job.step(X, Y)
    with pytest.raises(bitring.NonFiniteError, match="the loss is nan"):
        job.step(np.where(X > 2, np.nan, X), Y)
    agree(comm, job.step(X, Y) < first)
    job.free()


def test_arguments(comm):
    with pytest.raises(ValueError, match="replicas needs a placement, each rank is one without it; got 2"):
        Sandblaster(model(), LBFGS(), comm=comm, replicas=2)
    with pytest.raises(ValueError, match=f"replicas must divide the {comm.size} ranks; got 7"):
        Sandblaster(model(), LBFGS(), comm=comm, placement="hybrid", replicas=7)
    with pytest.raises(ValueError, match="placement must be named, portions are too many to try; got 'auto'"):
        Sandblaster(model(), LBFGS(), comm=comm, placement="auto")
    if comm.size > 1:
        with pytest.raises(MismatchError, match="Sandblaster: placement is"):
            Sandblaster(model(), LBFGS(), comm=comm, placement="hybrid" if comm.rank else "data")
