"""Parameter averaging: equal to ``sync`` at tau 1, weighted by samples, and its errors wait for the exchange."""

import signal
from typing import Any

import numpy as np
import pytest

from bitring.collectives.schedules.schedule import algorithms
from bitring.errors import NonFiniteError, PeerError
from bitring.training.data_parallel import DataParallel
from bitring.training.mode import modes
from bitring.training.modes.block_momentum import BlockMomentum
from bitring.training.modes.local import Local
from bitring.training.optimizers.sgd import SGD

SHAPES = {"a": (40, 50), "b": (7,), "c": (1100,)}


def zeros(dtype: Any = np.float64):
    return {name: np.zeros(shape, dtype) for name, shape in SHAPES.items()}


def random_gradients(rng, dtype: Any = np.float64):
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def pull(parameters, targets):
    """Gradients of half the squared distance to the targets."""
    return {name: w - targets[name] for name, w in parameters.items()}


def raised(call, *arguments):
    try:
        call(*arguments)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_tau_1_with_plain_sgd_equals_sync(comm, agree, weight_decay):
    targets = random_gradients(np.random.default_rng(comm.rank))
    results = []
    for mode in (Local(tau=1), "sync"):
        w = zeros()
        trainer = DataParallel(w, SGD(lr=0.1, weight_decay=weight_decay), comm=comm, mode=mode)
        for step in range(20):
            trainer.step(pull(w, targets), weight=(comm.rank + step) % 3)  # some are 0
        results.append(w)
        trainer.free()
    for name in SHAPES:
        error = np.linalg.norm(results[0][name] - results[1][name]) / max(np.linalg.norm(results[1][name]), 1e-300)
        agree(comm, error < 1e-12, f"{name}: {error}")


def test_averages_by_samples(comm, agree):
    """Every rank's own block, simulated on all of them."""
    optimizer = SGD(lr=0.1, momentum=0.9)
    w = zeros()
    trainer = DataParallel(w, optimizer, comm=comm, mode=Local(tau=3))
    expected = zeros()
    states = [optimizer.init(expected) for _ in range(comm.size)]
    every_target = [random_gradients(np.random.default_rng(rank)) for rank in range(comm.size)]
    weights = np.random.default_rng(0).integers(0, 3, (12, comm.size))
    for block in range(4):
        mean = zeros()
        total = weights[3 * block : 3 * block + 3].sum()
        for rank in range(comm.size):
            alone = {name: x.copy() for name, x in expected.items()}
            for step in range(3 * block, 3 * block + 3):
                if weights[step, rank]:
                    optimizer.update(alone, pull(alone, every_target[rank]), states[rank])
            share = weights[3 * block : 3 * block + 3, rank].sum() / max(total, 1)
            for name in mean:
                mean[name] += share * (alone[name] - expected[name])
        for name in mean:
            expected[name] += mean[name]
        for step in range(3 * block, 3 * block + 3):
            trainer.step(pull(w, every_target[comm.rank]), weight=int(weights[step, comm.rank]))
        agree(comm, all(np.allclose(w[name], expected[name], rtol=1e-12, atol=1e-13) for name in w), f"block {block}")
    trainer.free()


@pytest.mark.parametrize("compression", [None, "onebit"])
@pytest.mark.parametrize("algorithm", ["auto", *algorithms.names()])
def test_replicas_are_equal_after_every_exchange(comm, agree, algorithm, compression):
    rng = np.random.default_rng(comm.rank)
    trainer = DataParallel(
        zeros(np.float32), SGD(lr=0.1), comm=comm, mode=Local(tau=2), algorithm=algorithm, compression=compression
    )
    for step in range(6):
        trainer.step(random_gradients(rng, np.float32), weight=comm.rank + 1)
        equal = len(set(comm.allgather(trainer.digest()))) == 1
        agree(comm, equal == (step % 2 == 1 or comm.size == 1), f"step {step}")
    trainer.free()


def test_synchronize_ends_the_block(comm, agree):
    rng = np.random.default_rng(comm.rank)
    trainer = DataParallel(zeros(), SGD(lr=0.1), comm=comm, mode="local")
    for _ in range(3):
        trainer.step(random_gradients(rng))
    trainer.synchronize()
    after = trainer.digest()
    agree(comm, len(set(comm.allgather(after))) == 1)
    trainer.synchronize()
    agree(comm, trainer.digest() == after, "an empty block changes nothing")
    trainer.free()


def test_error_feedback_loses_nothing(comm, agree):
    """What all ranks' parameters moved by, plus the residuals, is the weighted sum of the local changes."""
    rng = np.random.default_rng(comm.rank)
    w = {"a": np.zeros((50, 60)), "b": np.zeros(2000)}
    trainer = DataParallel(w, SGD(lr=1.0), comm=comm, mode=Local(tau=2), compression="onebit")
    given = {name: np.zeros(x.shape) for name, x in w.items()}
    weight = comm.rank + 1
    for _ in range(20):
        gradients = {name: rng.standard_normal(x.shape) for name, x in w.items()}
        for name, gradient in gradients.items():
            given[name] -= gradient * weight / (comm.size * (comm.size + 1) / 2)
        trainer.step(gradients, weight=weight)
    left = {name: np.zeros(x.shape) for name, x in w.items()}
    for bucket, plan in zip(trainer.buckets, trainer.plans, strict=True):
        owed = plan.state_dict()["residual"].copy()
        owed[slice(*plan.owned)] += plan.state_dict()["owner_residual"]
        for name, part in bucket.unflatten(owed):
            left[name] += part
    for name, x in w.items():
        total = comm.allreduce(given[name])
        error = np.abs(x + comm.allreduce(left[name]) - total).max()
        agree(comm, error < 1e-10, f"{name}: {error}")
    trainer.free()


def test_a_block_without_samples_changes_nothing(comm, agree):
    w = {"w": np.ones(5)}
    trainer = DataParallel(w, SGD(lr=0.1, weight_decay=0.5), comm=comm, mode=Local(tau=2))
    for _ in range(4):
        trainer.step({"w": np.zeros(5)}, weight=0)
    agree(comm, (w["w"] == 1).all() and trainer.steps == 4 and trainer.bytes_sent == 0)
    trainer.free()


def test_not_finite_waits_for_the_exchange(comm, agree):
    """The rank skips the local step; all raise at the exchange, and the step in which it was is made again."""
    w = {"w": np.zeros(5)}
    trainer = DataParallel(w, SGD(lr=1.0), comm=comm, mode=Local(tau=3))
    last = comm.size - 1
    good, bad = {"w": np.ones(5)}, {"w": np.array([1, 1, np.inf, 1, 1])}
    trainer.step(good)
    error = raised(trainer.step, bad if comm.rank == last else good)
    agree(comm, error is None, repr(error))
    error = raised(trainer.step, good)
    found = type(error) is NonFiniteError and f"'w' holds Inf on rank {last}" in str(error) and "(step 1)" in str(error)
    agree(comm, found, repr(error))
    agree(comm, (w["w"] == (-1 if comm.rank == last else -2)).all() and trainer.steps == 2, "all is as before the step")
    trainer.step(good)
    # The last rank made 2 of the 3 steps, and its samples count twice.
    expected = -(3 * 3 * last + 2 * 2) / (3 * last + 2)
    agree(comm, np.allclose(w["w"], expected), f"{w['w']} {expected}")
    agree(comm, len(set(comm.allgather(trainer.digest()))) == 1)
    trainer.free()


def test_bad_arguments_wait_for_the_exchange(comm, agree):
    w = {"w": np.zeros(5)}
    trainer = DataParallel(w, SGD(lr=1.0), comm=comm, mode=Local(tau=2))
    last = comm.size - 1
    error = raised(trainer.step, {"w": np.ones(4 if comm.rank == last else 5)})
    agree(comm, error is None, repr(error))
    error = raised(trainer.synchronize)
    kind = ValueError if comm.rank == last else PeerError
    agree(comm, type(error) is kind and "of shape (5,), got float64 of shape (4,)" in str(error), repr(error))
    trainer.synchronize()
    agree(comm, len(set(comm.allgather(trainer.digest()))) == 1)
    trainer.free()


def test_parameters_that_diverged_are_not_averaged(comm, agree):
    w = {"w": np.zeros(5, np.float32)}
    trainer = DataParallel(w, SGD(lr=1e30), comm=comm, mode=Local(tau=1))
    with np.errstate(over="ignore"):
        error = raised(trainer.step, {"w": np.full(5, 1e30 if comm.rank == 0 else 0, np.float32)})
    found = type(error) is NonFiniteError and "the parameter 'w' holds Inf on rank 0; training diverged" in str(error)
    agree(comm, found, repr(error))
    agree(comm, comm.rank == 0 or (w["w"] == 0).all())
    trainer.free()


@pytest.mark.single
@pytest.mark.parametrize(
    ("tau", "error", "text"),
    [
        (0, ValueError, "Local: tau must be at least 1; got 0"),
        (2.5, TypeError, "Local: tau must be an int; got float"),
        (True, TypeError, "Local: tau must be an int; got bool"),
    ],
)
def test_wrong_settings(tau, error, text):
    with pytest.raises(error) as caught:
        Local(tau=tau)
    assert str(caught.value) == text


@pytest.mark.single
def test_is_registered():
    assert modes.get("local") is Local


@pytest.mark.parametrize("mode", [Local(tau=5), BlockMomentum(tau=5)])
def test_ctrl_c_leaves_no_rank_behind(comm, agree, monkeypatch, mode):
    """It comes in the middle of a step that this rank makes alone: the step is whole when it has its effect."""
    w = zeros()
    trainer = DataParallel(w, SGD(lr=0.1, momentum=0.9), comm=comm, mode=mode)
    gradients, expected, interrupts = random_gradients(np.random.default_rng(0)), zeros(), 0
    moments = SGD(lr=0.1, momentum=0.9).init(expected)
    check = trainer._exchange.checked

    def interrupted(*given):
        signal.raise_signal(signal.SIGINT)
        return check(*given)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for step in range(4):
            with monkeypatch.context() as patch:
                if step in (1, 2) and comm.rank == comm.size - 1:
                    patch.setattr(trainer._exchange, "checked", interrupted)
                try:
                    trainer.step(gradients)
                except KeyboardInterrupt:
                    interrupts += 1
            SGD(lr=0.1, momentum=0.9).update(expected, gradients, moments)
    finally:
        signal.signal(signal.SIGINT, before)
    agree(comm, interrupts == (2 if comm.rank == comm.size - 1 else 0), f"{interrupts} interrupts")
    agree(comm, trainer.steps == 4 and all(np.array_equal(w[name], expected[name]) for name in w), "a step is missing")
    trainer.step(gradients)
    agree(comm, len(set(comm.allgather(trainer.digest()))) == 1, "replicas differ")
    trainer.free()
