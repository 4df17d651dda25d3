"""Gradients that travel as error and activation: equal to the dense exchange, and fewer bytes where they are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitring
from bitring.compression.encoder import VALUE_DTYPES
from bitring.compression.factors import Factors
from bitring.compression.reducers.sufficient_factors import pays
from bitring.errors import NonFiniteError, PeerError
from bitring.training.data_parallel import DataParallel
from bitring.training.modes.local import Local
from bitring.training.optimizers.sgd import SGD

SHAPES: dict[str, Any] = {"w": (60, 80), "b": (80,), "k": (3, 4, 5), "thin": (2, 30), "last": (70, 50)}
SIZES = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}


def raised(call: Any, *arguments: Any, **named: Any) -> Any:
    try:
        call(*arguments, **named)
    except Exception as error:
        return error
    return None


def new_trainer(comm: Any, dtype: Any = np.float32, compression: Any = "sufficient_factors", **more: Any) -> Any:
    parameters = {name: np.zeros(shape, dtype) for name, shape in SHAPES.items()}
    return DataParallel(parameters, SGD(lr=1.0), comm=comm, compression=compression, **more)


def gradients(rank: int, step: int, samples: int, dtype: Any = np.float32) -> dict[str, Any]:
    """Of the mean over ``samples`` samples: factors for the matrices."""
    rng = np.random.default_rng((rank, step))

    def some(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(dtype)

    return {
        name: Factors(some(samples, shape[0]), some(samples, shape[1])) if len(shape) == 2 else some(*shape)
        for name, shape in SHAPES.items()
    }


def dense(given: dict[str, Any]) -> dict[str, Any]:
    return {name: g.product() if isinstance(g, Factors) else g for name, g in given.items()}


def samples_of(comm: Any, step: int) -> list[int]:
    """Uneven parts; rank 0 has none in step 1."""
    return [0 if (r, step) == (0, 1) and comm.size > 1 else 1 + (r + step) % 3 for r in range(comm.size)]


@pytest.mark.parametrize(
    ("compression", "dtype"),
    [
        *((x, dtype) for x in ("sufficient_factors", "row_owners") for dtype in VALUE_DTYPES),
        *((x, np.float32) for x in (None, "onebit", "powersgd")),
    ],
)
def test_equals_the_dense_gradients(comm: Any, agree: Any, dtype: Any, compression: Any) -> None:
    """Whatever the compression: factors are multiplied out where they are of no use."""
    trainers = [new_trainer(comm, dtype, compression), new_trainer(comm, dtype, compression)]
    for step in range(4):
        weight = samples_of(comm, step)[comm.rank]
        given = gradients(comm.rank, step, weight, dtype)
        trainers[0].step(given, weight=weight)
        trainers[1].step(dense(given), weight=weight)
        agree(comm, trainers[0].digest() == comm.bcast(trainers[0].digest()), f"step {step}")
    tolerance = {2: 0.15, 4: 1e-4, 8: 1e-12}[np.dtype(dtype).itemsize]
    for name, w in trainers[0].parameters.items():
        error = float(np.abs(w.astype(float) - trainers[1].parameters[name].astype(float)).max())
        agree(comm, error < tolerance, f"{name}: {error}")
    for trainer in trainers:
        trainer.free()


def test_bytes_sent(comm: Any, agree: Any) -> None:
    """Two matrices as factors, and the thin one, which does not pay, with the others by the ring."""
    trainer = new_trainer(comm, algorithm="ring")
    samples = samples_of(comm, 0)
    trainer.step(gradients(comm.rank, 0, samples[comm.rank]), weight=samples[comm.rank])
    total = sum(samples)
    paying = [name for name in ("w", "thin", "last") if pays(total, SHAPES[name])]
    agree(comm, "w" in paying and "last" in paying)
    as_factors = total * 4 * sum(sum(SHAPES[name]) for name in paying)
    densely = 4 * sum(int(np.prod(shape)) for name, shape in SHAPES.items() if name not in paying)
    counts = 3 * 8 * comm.size
    expected = (comm.size - 1) * (as_factors + counts + 2 * densely)
    sent = comm.allreduce(trainer.bytes_sent)
    agree(comm, sent == expected, f"{sent}, not {expected}")
    trainer.free()


def test_bytes_sent_by_row_owners(comm: Any, agree: Any) -> None:
    """Of the module's closed form: v to all, columns of u and rows of the products to and from their owners."""
    trainer = new_trainer(comm, algorithm="ring", compression="row_owners")
    samples, p = samples_of(comm, 0), comm.size
    trainer.step(gradients(comm.rank, 0, samples[comm.rank]), weight=samples[comm.rank])
    total = sum(samples)
    paying = [name for name in ("w", "thin", "last") if total * (SHAPES[name][0] / p + SHAPES[name][1]) < SIZES[name]]
    agree(comm, "w" in paying and "last" in paying)
    expected = (p - 1) * 3 * 8 * p
    for name in paying:
        m, n = SHAPES[name]
        owned = [m * (r + 1) // p - m * r // p for r in range(p)]
        columns = sum(samples[r] * (m - owned[r]) for r in range(p))
        expected += 4 * ((p - 1) * total * n + columns + (p - 1) * m * n)
    expected += 8 * (p - 1) * sum(size for name, size in SIZES.items() if name not in paying)
    sent = comm.allreduce(trainer.bytes_sent)
    agree(comm, sent == expected, f"{sent}, not {expected}")
    trainer.free()


def test_dense_where_it_is_fewer_bytes_or_one_rank_has_no_factors(comm: Any, agree: Any) -> None:
    exact, trainer = new_trainer(comm, compression=None), new_trainer(comm)
    before = 0, 0
    for step, samples in enumerate((200, 3, 3)):
        given = gradients(comm.rank, step, samples)
        if step == 1 and comm.rank == comm.size - 1:
            given = dense(given)
        for each in (exact, trainer):
            each.step(given)
        close = all(
            np.allclose(w, exact.parameters[name], rtol=1e-4, atol=1e-3) for name, w in trainer.parameters.items()
        )
        agree(comm, close, f"step {step}")
        agree(comm, trainer.digest() == comm.bcast(trainer.digest()), f"step {step}")
        now = exact.bytes_sent, trainer.bytes_sent
        densely, sent = (a - b for a, b in zip(now, before, strict=True))
        before = now
        agree(comm, comm.size == 1 or (sent < 0.5 * densely) == (step == 2), f"step {step}: {sent}, exact {densely}")
    exact.free()
    trainer.free()


@pytest.mark.parametrize("more", [{"warmup_steps": 2}, {"mode": Local(tau=2)}, {"bucket_bytes": 100}], ids=str)
def test_other_ways_to_train(comm: Any, agree: Any, more: dict[str, Any]) -> None:
    trainers = [new_trainer(comm, compression=compression, **more) for compression in ("sufficient_factors", None)]
    for step in range(4):
        weight = samples_of(comm, step)[comm.rank]
        for trainer in trainers:
            trainer.step(gradients(comm.rank, step, weight), weight=weight)
    for trainer in trainers:
        trainer.synchronize()
        agree(comm, trainer.digest() == comm.bcast(trainer.digest()))
    mine, theirs = (trainer.parameters for trainer in trainers)
    agree(comm, all(np.allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-4) for name in SHAPES))
    for trainer in trainers:
        trainer.free()


def test_beside_the_loop(comm: Any, agree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bits, it makes no difference."""
    digests = []
    for overlap_bytes in (0, 1 << 30):
        monkeypatch.setattr("bitring.training.step.bucket_sizes.OVERLAP_BYTES", overlap_bytes)
        trainer = new_trainer(comm, bucket_bytes=100)
        for step in range(3):
            trainer.step(gradients(comm.rank, step, 2), weight=2)
        digests.append(trainer.digest())
        trainer.free()
    agree(comm, digests[0] == digests[1] == comm.bcast(digests[0]))


@pytest.mark.parametrize("compression", ["sufficient_factors", None])
@pytest.mark.parametrize(("bad", "text"), [(np.nan, "holds NaN"), (np.inf, "holds Inf"), (3e38, "holds Inf")])
def test_non_finite_factors(comm: Any, agree: Any, compression: Any, bad: float, text: str) -> None:
    """Or finite ones whose product is not."""
    trainer = new_trainer(comm, compression=compression)
    given = gradients(comm.rank, 0, 3)
    trainer.step(given)
    before = trainer.digest()
    last = comm.size - 1
    if comm.rank == last:
        given["last"].v[1, 7] = bad
        given["last"].u[1, 7] = 2.0
    error = raised(trainer.step, given)
    wanted = f"the gradient of 'last' {text} on rank {last}"
    agree(comm, isinstance(error, NonFiniteError) and wanted in str(error), repr(error))
    agree(comm, trainer.digest() == before)
    trainer.step(gradients(comm.rank, 1, 3))
    agree(comm, trainer.digest() == comm.bcast(trainer.digest()))
    trainer.free()


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "text"),
    [
        ("w", (80, 60), np.float32, "must be float32 of shape (60, 80), got float32 of shape (80, 60)"),
        ("w", (60, 80), np.float64, "must be float32 of shape (60, 80), got float64"),
        ("b", (8, 10), np.float32, "must be float32 of shape (80,), got float32 of shape (8, 10)"),
    ],
)
def test_wrong_factors(comm: Any, agree: Any, name: str, shape: tuple[int, int], dtype: Any, text: str) -> None:
    wrong = Factors(*(np.ones((3, side), dtype) for side in shape))
    trainer = new_trainer(comm)
    last = comm.size - 1
    given = gradients(comm.rank, 0, 3)
    error = raised(trainer.step, {**given, name: wrong} if comm.rank == last else given)
    kind = ValueError if comm.rank == last else PeerError
    agree(comm, type(error) is kind and f"the gradient of {name!r} {text}" in str(error), repr(error))
    trainer.step(given)
    trainer.free()


def test_a_plan_by_itself(comm: Any, agree: Any) -> None:
    x = np.zeros(30 * 40 + 40)
    plan: Any = bitring.plan_allreduce(x, comm=comm, compression="sufficient_factors", shapes=[(30, 40), (40,)])
    every = [
        Factors(*(np.random.default_rng((r, 0)).standard_normal((2, n)) for n in (30, 40))) for r in range(comm.size)
    ]
    expected = np.sum([each.product() for each in every], axis=0)
    for factors in (every[comm.rank], None):  # as factors, and as x has them
        if factors is None:
            x[:1200] = every[comm.rank].product().ravel()
        else:
            plan.take(0, factors)
        x[1200:] = 1
        plan()
        agree(comm, bool(np.allclose(x[:1200].reshape(30, 40), expected, atol=1e-12)))
        agree(comm, bool((x[1200:] == comm.size).all()))
    plan.take(0, Factors(np.full((1, 30), np.inf), np.ones((1, 40))))
    error = raised(plan)
    agree(comm, isinstance(error, NonFiniteError), repr(error))
    x[:] = comm.rank
    plan()  # those factors are gone
    agree(comm, bool((x == sum(range(comm.size))).all()), f"{x}")
    plan.free()


@pytest.mark.single
def test_train_hands_factors_over(on_ranks: Any, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    arguments = ["--model", "mlp", "--compression", "sufficient_factors", "--epochs", "1", "--output", tmp_path]
    result = on_ranks(2, "-m", "bitring", "train", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["bytes_sent"] < summary["bytes_exact"] / 2
    assert summary["test_accuracy"] > 0.8
