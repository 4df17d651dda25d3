"""Replicas that are no longer equal are found, named, and made equal; and nobody copies a trainer by chance."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from waiting import SharedClock

import bitring
from bitring.compression.plans import telemetry
from bitring.errors import MismatchError, PeerError
from bitring.training.data_parallel import DataParallel
from bitring.training.optimizer import Elementwise
from bitring.training.step import meeting


def raised(call: Any, *arguments: Any) -> Any:
    try:
        call(*arguments)
    except Exception as error:
        return error
    return None


def new_trainer(comm: Any, **more: Any) -> DataParallel:
    parameters = {
        "w": np.ones((30, 50), np.float32),
        "none": np.ones((0, 2)),
        "v": np.ones(7),
        "h": np.ones(9, ml_dtypes.bfloat16),
    }
    return DataParallel(parameters, bitring.SGD(lr=0.1, momentum=0.9), comm=comm, **more)


def ones(trainer: DataParallel) -> dict[str, Any]:
    return {name: np.ones_like(w) for name, w in trainer.parameters.items()}


@pytest.mark.parametrize("mode", ["sync", bitring.Local(tau=2), bitring.BlockMomentum(tau=2)], ids=str)
def test_a_changed_replica_is_named(comm, agree, mode):
    trainer = new_trainer(comm, mode=mode, check_every=4)
    for _ in range(4):
        trainer.step(ones(trainer))
    last = comm.size - 1
    if comm.rank == last:
        trainer.parameters["v"][3] += 1
        if "start" in trainer.live()["mode"]:
            trainer.live()["mode"]["start"]["v"][3] += 1
    errors = [raised(trainer.step, ones(trainer)) for _ in range(4)]
    agree(comm, errors[:3] == [None] * 3 and trainer.steps == 8, repr(errors))
    if comm.size > 1 and mode == "sync":
        text = f"(step 7): the parameter 'v' on rank {last} is not what it is on rank 0"
        usual = comm.size > 2 or "the parameter 'v' on rank 1" in str(errors[3])
        agree(comm, type(errors[3]) is MismatchError and text in str(errors[3]) and usual, repr(errors[3]))
    trainer.broadcast(root=0)
    agree(comm, len(set(comm.allgather(trainer.digest()))) == 1)
    for _ in range(4):
        trainer.step(ones(trainer))
    agree(comm, trainer.steps == 12)
    trainer.free()


@pytest.mark.parametrize("mode", ["sync", "local", "block_momentum"])
def test_broadcast(comm, agree, mode):
    """Parameters, slots and the mode's state, its numbers too; from any rank."""
    trainer = new_trainer(comm, mode=mode)
    tree = trainer.live()
    for w in (*tree["parameters"].values(), *tree["optimizer"]["velocity"].values()):
        w[...] = comm.rank
    if "weight" in tree["mode"]:
        tree["mode"]["weight"] = 10.0 + comm.rank
    root = comm.size - 1
    trainer.broadcast(root=root)
    agree(comm, all((w == root).all() for w in (*tree["parameters"].values(), *tree["optimizer"]["velocity"].values())))
    agree(comm, tree["mode"].get("weight", 10.0 + root) == 10.0 + root)
    for wrong, kind in ((comm.size, ValueError), (0.0, TypeError), ("0", TypeError), (np.zeros(2), TypeError)):
        error = raised(trainer.broadcast, wrong if comm.rank == root else 0)
        kind = kind if comm.rank == root else PeerError
        agree(comm, type(error) is kind and "broadcast: root must be a rank" in str(error), repr(error))
    trainer.step(ones(trainer))
    trainer.free()


class Custom(Elementwise):
    """Settings that can be changed in place."""

    slots = ()  # type: ignore[assignment]

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def apply(self, w: Any, g: Any, slots: Any, t: Any, u: Any) -> None:
        w -= self.rate * g


def test_settings_changed_in_place(comm, agree):
    trainer = DataParallel([np.zeros(5)], Custom(0.5), comm=comm)
    trainer.step([np.ones(5)])
    if comm.rank == 0:
        trainer.optimizer.rate = 0.25  # pyright: ignore[reportAttributeAccessIssue]
    error = raised(trainer.step, [np.ones(5)])
    if comm.size > 1:
        agree(comm, type(error) is MismatchError and "has the optimizer Custom(rate=0." in str(error), repr(error))
    trainer.free()


def test_settings_that_do_not_fit(comm, agree):
    trainer = new_trainer(comm, mode="local", compression="onebit")
    plain = DataParallel([np.zeros(5)], "sgd", comm=comm)

    def put(to: DataParallel, name: str, value: Any) -> Any:
        return raised(setattr, to, name, value)

    error = put(plain, "optimizer", bitring.SGD(lr=0.1, momentum=0.9))
    agree(
        comm, type(error) is ValueError and "which keeps ['velocity']; make another trainer" in str(error), repr(error)
    )
    error = put(trainer, "optimizer", bitring.AdaGrad())
    agree(comm, type(error) is ValueError and "must keep the slots ['velocity']" in str(error), repr(error))
    shared = DataParallel([np.zeros(5)], "sgd", comm=comm, mode="asynchronous")
    error = put(shared, "optimizer", Custom(0.5))
    agree(comm, type(error) is ValueError and "must have a native kernel in the mode" in str(error), repr(error))
    shared.free()
    error = put(trainer, "optimizer", bitring.SGD)
    agree(comm, type(error) is TypeError and "optimizer must be a name" in str(error), repr(error))
    error = put(trainer, "mode", "sync")
    agree(comm, type(error) is ValueError and "mode must stay Local" in str(error), repr(error))
    error = put(trainer, "compression", None)
    agree(comm, type(error) is AttributeError and "compression holds for the trainer's life" in str(error), repr(error))
    plain.optimizer = "sgd"  # pyright: ignore[reportAttributeAccessIssue]
    trainer.mode = bitring.Local(tau=1)
    trainer.step(ones(trainer))
    agree(comm, not trainer.in_a_block)
    trainer.free()
    plain.free()


def test_look_ahead_may_begin_later(comm, agree):
    """Block momentum's model and the block's start are one array without look-ahead, two with it."""
    trainers = [
        new_trainer(comm, mode=bitring.BlockMomentum(tau=1, momentum=0.5, nesterov=first)) for first in (False, True)
    ]
    trainers[0].mode = trainers[1].mode
    for trainer in trainers:
        for _ in range(3):
            trainer.step(ones(trainer))
    agree(comm, trainers[0].digest() == trainers[1].digest())
    for trainer in trainers:
        trainer.free()


def test_copies(comm, agree):
    trainer = new_trainer(comm)
    plan = bitring.plan_allreduce(np.ones(5), comm=comm)
    for thing in (trainer, plan, bitring.Communicator(comm)):
        for way in (copy.copy, copy.deepcopy, pickle.dumps):
            error = raised(way, thing)
            found = type(error) is TypeError and f"{type(thing).__name__}: cannot be copied or pickled" in str(error)
            agree(comm, found, repr(error))
    trainer.free()
    plan.free()


@pytest.mark.parametrize("compression", [None, "onebit"])
def test_the_slowest_rank_is_named(comm, agree, monkeypatch, mpi_tmp_path, compression):
    trainer = new_trainer(comm, compression=compression)
    late = comm.size // 2
    trainer.step(ones(trainer))
    trainer.telemetry()
    clock = SharedClock(comm, mpi_tmp_path, monkeypatch, meeting, telemetry)
    for _ in range(5):
        clock.comes_last(late)
        trainer.step(ones(trainer))
    told: Any = trainer.telemetry()
    if comm.size == 1:
        agree(comm, "slowest_rank" not in told or told["slowest_rank"] is None, repr(told))
    else:
        agree(comm, told["slowest_rank"] == late, repr(told))
        agree(comm, told["wait_seconds"] >= 5 * (comm.rank != late), repr(told))
        agree(comm, ("encode_seconds" in told) == (compression is not None), repr(told))
    agree(comm, trainer.telemetry() == {})
    trainer.free()
