"""Replicas that send each other encoded updates: nothing is lost, they are equal after synchronize, nobody waits."""

from __future__ import annotations

import gc
import math
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
from silence import Told

import bitring
from bitring.collectives.communicator import Communicator
from bitring.compression.encoders.threshold import Threshold
from bitring.compression.encoders.topk import TopK

SHAPES = {"w": (23, 50), "empty": (0, 3), "b": (11,)}
LR, TAU = 0.5, 0.25
"""Powers of two: with whole gradients every sum is exact, whatever its order."""


@pytest.fixture
def world(comm):
    duplicate = Communicator(comm.Dup())
    yield duplicate
    duplicate.Free()


def trainer_of(world, optimizer: Any = None, **rest: Any) -> Any:
    dtype = rest.pop("dtype", np.float32)
    parameters = {name: np.ones(shape, dtype) for name, shape in SHAPES.items()}
    rest = {"mode": "peers", "compression": Threshold(tau=TAU), **rest}
    return bitring.DataParallel(parameters, optimizer or bitring.SGD(lr=LR), comm=world, **rest)


def whole_gradients(rank: int, step: int, dtype: Any = np.float32) -> dict[str, Any]:
    random = np.random.default_rng([rank, step])
    return {name: random.integers(-2, 3, shape).astype(dtype) for name, shape in SHAPES.items()}


def outcome(call) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def conserved(world, trainer, steps: dict[int, int]) -> bool:
    """Whether w = 1 − the sum of what ranks have sent: the sum of their lr·g, less their residuals. Collective."""
    wanted = {name: np.ones(shape) for name, shape in SHAPES.items()}
    for rank, made in steps.items():
        for step in range(made):
            for name, g in whole_gradients(rank, step).items():
                wanted[name] -= LR * g
    residual = trainer.state_dict()["mode"]["residual"]
    for theirs in world.allgather(residual):
        for name, r in theirs.items():
            wanted[name] += r
    return all(np.array_equal(w, wanted[name]) for name, w in trainer.parameters.items())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sent_and_residual_are_the_updates_and_replicas_are_equal(world, agree, dtype):
    """Strom's invariant, to the bit, with ranks that make different numbers of steps, and drains in between."""
    trainer = trainer_of(world, dtype=dtype)
    made = dict.fromkeys(range(world.size), 0)
    for more in (2, 5):
        for _ in range(more + 3 * world.rank):
            trainer.step(whole_gradients(world.rank, trainer.steps, dtype))
        for rank in made:
            made[rank] += more + 3 * rank
        trainer.synchronize()
        agree(world, len(set(world.allgather(trainer.digest()))) == 1, "replicas differ")
        agree(world, conserved(world, trainer, made), f"after {made}")
        agree(world, trainer.clocks == [float(each) for each in made.values()], str(trainer.clocks))
    agree(world, (trainer.bytes_sent > 0) == (world.size > 1))
    trainer.free()


def test_between_nodes_too(apart, agree):
    trainer = trainer_of(apart)
    for step in range(4):
        trainer.step(whole_gradients(apart.rank, step))
    trainer.synchronize()
    agree(apart, conserved(apart, trainer, dict.fromkeys(range(apart.size), 4)))
    trainer.free()


@pytest.mark.parametrize(
    "optimizer",
    [
        bitring.SGD(lr=0.1),
        bitring.SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        bitring.AdaGrad(lr=0.1, weight_decay=0.1),
    ],
    ids=repr,
)
def test_what_is_encoded_without_loss_is_the_optimizer(world, agree, optimizer):
    """Where one rank alone makes steps; the others follow."""
    trainer = trainer_of(world, optimizer, compression=TopK(density=1.0))
    mine = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    state = optimizer.init(mine)
    for step in range(3):
        random = np.random.default_rng(step)
        gradients = {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
        if world.rank == 0:
            trainer.step(gradients)
        optimizer.update(mine, gradients, state)
    trainer.synchronize()
    agree(world, all(np.array_equal(trainer.parameters[name], mine[name]) for name in mine))
    trainer.free()


def test_nobody_waits_for_a_rank_that_computes(world, agree):
    """It sums up what arrives meanwhile, and applies it at its next step."""
    if world.size == 1:
        pytest.skip("needs another rank")
    trainer = trainer_of(world)
    if world.rank == 0:
        for other in range(1, world.size):
            world.recv(source=other)  # outside bitring, until they have made all their steps
        trainer.step(whole_gradients(0, 0), weight=0)
    else:
        for step in range(20):
            trainer.step(whole_gradients(world.rank, step))
        world.send("through", 0)
    trainer.synchronize()
    agree(world, conserved(world, trainer, {rank: 20 * (rank > 0) for rank in range(world.size)}))
    agree(world, trainer.clocks == [1.0] + [20.0] * (world.size - 1), str(trainer.clocks))
    trainer.free()


def test_what_is_under_way_is_bounded(world, agree, mpi_tmp_path):
    """By credits: without the service of the receiver, who does not enter bitring, a sender stops after a few."""
    from bitring.collectives.runtime.engine import engine

    if world.size == 1:
        pytest.skip("needs another rank")
    trainer = trainer_of(world)
    running = trainer._stepper.running
    told_of = Told(mpi_tmp_path, world.rank)

    def tell_when_stopped() -> None:
        while 0 not in running._service.without_room:
            time.sleep(1e-3)
        told_of.tell()

    world.Barrier()
    if world.rank == 0:
        with engine._lock:  # nothing is served here
            world.Barrier()
            told_of.await_all(range(1, world.size))
    else:
        threading.Thread(target=tell_when_stopped, daemon=True).start()
        world.Barrier()
    most = 0
    if world.rank:
        for step in range(9):
            trainer.step(whole_gradients(world.rank, step))
            most = max(most, running._sent[0] - running._service.taken[0])
    agree(world, most <= 4, str(most))
    job = running._job
    agree(world, world.rank == 0 or 0 in job.waited_for, f"{job.waited} s, for {dict(job.waited_for)}")
    trainer.synchronize()
    agree(world, conserved(world, trainer, {rank: 9 * (rank > 0) for rank in range(world.size)}))
    trainer.free()


def test_not_finite_is_raised_once_by_each_rank(world, agree):
    trainer = trainer_of(world)
    bad = whole_gradients(0, 0)
    bad["b"][2] = math.nan
    world.Barrier()
    if world.rank == world.size - 1:
        trainer.step(bad)
    raised, text, until = 0, "", time.monotonic() + 60
    while raised == 0 and time.monotonic() < until:
        kind, text = outcome(lambda: trainer.step({name: np.zeros_like(g) for name, g in bad.items()}))
        raised += kind == "NonFiniteError" and f"'b' holds NaN on rank {world.size - 1}" in text
        time.sleep(0.01)
    agree(world, raised == 1, text)
    trainer.synchronize()
    agree(world, all(bool((w == 1).all()) for w in trainer.parameters.values()))
    trainer.free()


def test_leaving_keeps_nobody(world, agree):
    """And what others send afterwards is applied there, too."""
    trainer = trainer_of(world)
    with trainer:
        trainer.step(whole_gradients(world.rank, 0))
        if world.rank == 0:
            trainer.leave()
        else:
            for step in range(1, 12):
                trainer.step(whole_gradients(world.rank, step))
    trainer.synchronize()
    agree(world, conserved(world, trainer, {rank: 12 if rank else 1 for rank in range(world.size)}))
    agree(world, trainer.clocks == [math.inf] * world.size, str(trainer.clocks))
    trainer.free()


def test_a_checkpoint_keeps_what_was_not_sent(world, agree, mpi_tmp_path):
    path = mpi_tmp_path / "peers.npz"
    trainer = trainer_of(world)
    for step in range(3):
        trainer.step(whole_gradients(world.rank, step))
    bitring.save_checkpoint(path, trainer)
    other = trainer_of(world)
    bitring.load_checkpoint(path, other)
    for step in range(3, 5):
        other.step(whole_gradients(world.rank, step))
    other.synchronize()
    agree(world, conserved(world, other, dict.fromkeys(range(world.size), 5)))
    state = trainer.state_dict()
    trainer.step(whole_gradients(world.rank, 9))
    trainer.load_state_dict(state)
    agree(world, trainer.steps == 3 and conserved(world, trainer, dict.fromkeys(range(world.size), 3)))
    for each in (trainer, other):
        each.free()


@pytest.mark.parametrize(
    ("rest", "text"),
    [
        ({"compression": "powersgd"}, "compression must be an encoder, such as Threshold(); got PowerSGD("),
        ({"optimizer": "adam"}, "is for the optimizers SGD and AdaGrad; got Adam("),
        ({"dtype": np.float16}, "the parameter 'w' must be float32 or float64 in host memory, got float16"),
        ({"check_every": 1}, "check_every must be 0 in mode peers"),
    ],
    ids=["compression", "optimizer", "dtype", "check_every"],
)
def test_what_it_cannot_do_is_refused_on_all_ranks(world, agree, rest, text):
    kind, said = outcome(lambda: trainer_of(world, **rest))
    agree(world, kind == "ValueError" and text in said, f"{kind}: {said}")


def test_nothing_keeps_a_trainer_that_was_freed(world, agree):
    trainer = trainer_of(world)
    running = weakref.ref(trainer._stepper.running)
    trainer.free()
    del trainer
    gc.collect()
    agree(world, running() is None)
