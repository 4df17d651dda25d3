"""Block momentum against its formulas, computed on every rank for all ranks."""

import numpy as np
import pytest

from bitring.collectives.schedules.schedule import algorithms
from bitring.training.data_parallel import DataParallel
from bitring.training.mode import modes
from bitring.training.modes.block_momentum import BlockMomentum
from bitring.training.modes.local import Local
from bitring.training.optimizers.adagrad import AdaGrad
from bitring.training.optimizers.sgd import SGD


def targets(size, n):
    return [np.random.default_rng(rank).standard_normal(n) for rank in range(size)]


def by_the_formulas(mode, optimizer, goals, weights, blocks):
    """Yield (S, W) after each block: where training goes on, and the model."""
    momentum = 1 - 1 / len(goals) if mode.momentum is None else mode.momentum
    model, delta = np.zeros_like(goals[0]), np.zeros_like(goals[0])
    start = model.copy()
    for _ in range(blocks):
        mean = np.zeros_like(model)
        for goal, weight in zip(goals, weights, strict=True):
            alone = {"w": start.copy()}
            state = optimizer.init(alone)  # the local momentum begins anew with each block
            for _ in range(mode.tau):
                optimizer.update(alone, {"w": alone["w"] - goal}, state)
            mean += alone["w"] * weight / sum(weights)
        delta = momentum * delta + mode.zeta * (mean - start)
        model = model + delta
        start = model + momentum * delta if mode.nesterov else model
        yield start, model


@pytest.mark.parametrize(
    "mode",
    [
        BlockMomentum(tau=3),
        BlockMomentum(tau=2, nesterov=False),
        BlockMomentum(tau=3, momentum=0.4, zeta=0.8),
        BlockMomentum(tau=1, momentum=0.9, zeta=0.2, nesterov=False),
    ],
    ids=str,
)
def test_equals_the_formulas(comm, agree, mode):
    optimizer = SGD(lr=0.1, momentum=0.9)
    goals = targets(comm.size, 1500)
    weights = [rank + 1 for rank in range(comm.size)]
    w = np.zeros(1500)
    trainer = DataParallel([w], optimizer, comm=comm, mode=mode)
    model = w
    for block, (start, model) in enumerate(by_the_formulas(mode, optimizer, goals, weights, 5)):  # noqa: B007
        for _ in range(mode.tau):
            trainer.step([w - goals[comm.rank]], weight=weights[comm.rank])
        agree(comm, np.allclose(w, start, rtol=1e-12, atol=1e-13), f"block {block}")
    trainer.synchronize()
    agree(comm, np.allclose(w, model, rtol=1e-12, atol=1e-13), "synchronize leaves the model")
    trainer.free()


def test_without_momentum_it_is_local(comm, agree):
    goals = targets(comm.size, 100)
    results = []
    for mode in (BlockMomentum(tau=4, momentum=0.0), Local(tau=4)):
        w = np.zeros(100)
        trainer = DataParallel([w], SGD(lr=0.1), comm=comm, mode=mode)
        for _ in range(12):
            trainer.step([w - goals[comm.rank]])
        results.append(w)
        trainer.free()
    agree(comm, np.allclose(*results, rtol=1e-13, atol=1e-14))


def test_moves_as_far_as_all_ranks_together(comm, agree):
    """Under a constant gradient, the mean moves by one rank's step a block; momentum makes it N in the long run."""
    w = np.zeros(1)
    trainer = DataParallel([w], SGD(lr=1.0), comm=comm, mode=BlockMomentum(tau=1, nesterov=False))
    for block in range(10):
        before = w.copy()
        trainer.step([np.ones(1)])
        expected = comm.size * (1 - (1 - 1 / comm.size) ** (block + 1))
        agree(comm, np.allclose(before - w, expected), f"block {block}: {before - w}")
    trainer.free()


@pytest.mark.parametrize("compression", [None, "onebit"])
@pytest.mark.parametrize("algorithm", ["auto", *algorithms.names()])
def test_replicas_are_equal_after_every_exchange(comm, agree, algorithm, compression):
    rng = np.random.default_rng(comm.rank)
    trainer = DataParallel(
        {"a": np.zeros((40, 50), np.float32), "b": np.zeros(7, np.float32)},
        SGD(lr=0.1, momentum=0.5),
        comm=comm,
        mode=BlockMomentum(tau=2),
        algorithm=algorithm,
        compression=compression,
    )
    for step in range(6):
        gradients = {name: rng.standard_normal(w.shape).astype(np.float32) for name, w in trainer.parameters.items()}
        trainer.step(gradients, weight=comm.rank + 1)
        equal = len(set(comm.allgather(trainer.digest()))) == 1
        agree(comm, equal == (step % 2 == 1 or comm.size == 1), f"step {step}")
    trainer.free()


def test_synchronize_twice_is_once(comm, agree):
    goals = targets(comm.size, 100)
    w = np.zeros(100)
    trainer = DataParallel([w], SGD(lr=0.1), comm=comm, mode=BlockMomentum(tau=2))
    for _ in range(5):
        trainer.step([w - goals[comm.rank]])
    trainer.synchronize()
    model = w.copy()
    trainer.synchronize()
    agree(comm, np.array_equal(w, model))
    agree(comm, len(set(comm.allgather(trainer.digest()))) == 1)
    trainer.free()


def test_a_block_without_samples_changes_nothing(comm, agree):
    w = np.ones(5)
    trainer = DataParallel([w], SGD(lr=0.1), comm=comm, mode=BlockMomentum(tau=2, momentum=0.5))
    for _ in range(2):
        trainer.step([np.ones(5)])
    before = w.copy()
    for _ in range(2):
        trainer.step([np.ones(5)], weight=0)
    agree(comm, np.array_equal(w, before))
    trainer.free()


def test_what_scales_the_steps_stays(comm, agree):
    """AdaGrad's sums of squares are no momentum, and are kept over blocks."""
    w = np.zeros(5)
    trainer = DataParallel([w], AdaGrad(), comm=comm, mode=BlockMomentum(tau=1))
    for _ in range(3):
        trainer.step([np.full(5, 2.0)])
    agree(comm, (trainer.state_dict()["optimizer"]["squares"]["0"] == 12).all())
    trainer.free()


@pytest.mark.single
@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"tau": 0}, ValueError, "BlockMomentum: tau must be at least 1; got 0"),
        ({"momentum": 1.0}, ValueError, "BlockMomentum: momentum must be at least 0 and below 1; got 1.0"),
        ({"momentum": -0.5}, ValueError, "BlockMomentum: momentum must be at least 0 and below 1; got -0.5"),
        ({"zeta": 0}, ValueError, "BlockMomentum: zeta must be above 0 and finite; got 0"),
        ({"zeta": "1"}, TypeError, "BlockMomentum: zeta must be a number; got str"),
    ],
    ids=str,
)
def test_wrong_settings(given, error, text):
    with pytest.raises(error) as caught:
        BlockMomentum(**given)
    assert str(caught.value) == text


@pytest.mark.single
def test_is_registered():
    assert modes.get("block_momentum") is BlockMomentum
