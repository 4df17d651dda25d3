"""Low-rank gradients: the kernels against NumPy, and what the power iteration finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bitring
from bitring.compression.kernels.powersgd_numba import (
    low_rank,
    low_rank_reference,
    orthogonalise,
    orthogonalise_reference,
    subtract_low_rank,
    unit_rows,
)
from bitring.compression.reducers.powersgd import PowerSGD

M, N = 30, 41


def matrix(rng: Any, shape: tuple[int, int], rank: int) -> Any:
    return rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))


def best(matrix: Any, rank: int) -> Any:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.single
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("m", "n", "r"), [(1, 1, 1), (30, 41, 4), (257, 3, 2), (3, 130, 3)])
def test_kernels_are_the_reference(m: int, n: int, r: int, dtype: Any) -> None:
    rng = np.random.default_rng(m)
    tolerance = 100 * np.finfo(dtype).eps
    p, q = rng.standard_normal((m, r)).astype(dtype), rng.standard_normal((r, n)).astype(dtype)
    out = np.full((m, n), np.nan, dtype)
    low_rank(p, q, out)
    np.testing.assert_allclose(out, low_rank_reference(p, q), rtol=0, atol=tolerance)
    subtract_low_rank(p, q, out)
    np.testing.assert_allclose(out, 0, atol=tolerance)
    expected = orthogonalise_reference(p)
    orthogonalise(p, 1e-5)
    np.testing.assert_allclose(np.abs(p), np.abs(expected), rtol=0, atol=tolerance * 100)
    np.testing.assert_allclose(p.T @ p, np.eye(r), rtol=0, atol=tolerance)
    lengths = np.linalg.norm(q.astype(float), axis=1, keepdims=True)
    expected = q / lengths
    unit_rows(q, q.copy())
    np.testing.assert_allclose(q, expected, rtol=tolerance)


@pytest.mark.single
def test_columns_that_say_nothing_become_zeros() -> None:
    rng = np.random.default_rng(0)
    p = rng.standard_normal((20, 6)).astype(np.float32)
    p[:, 1] = 0
    p[:, 2] = 3 * p[:, 0]
    p[3, 3] = np.inf
    p[:, 5] *= 1e-30
    orthogonalise(p, 1e-5)
    np.testing.assert_allclose(p.T @ p, np.diag([1, 0, 0, 0, 1, 1]), atol=1e-5)
    q = np.zeros((3, 4), np.float32)
    q[0], q[2] = 2, np.nan
    unit_rows(q, np.arange(12, dtype=np.float32).reshape(3, 4))
    assert q.tolist() == [[0.5] * 4, [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.single
def test_who_travels_exactly() -> None:
    columns = PowerSGD(matrix_rank=4).columns
    assert columns((100, 50), np.float32) == 4
    assert columns((100,), np.float32) == columns((), np.float32) == 0
    assert columns((64, 3, 5, 5), np.float32) == 4
    assert columns((8, 8), np.float32) == 0  # 4·16 values are no fewer than 64
    assert columns((9, 9), np.float32) == 4
    assert columns((9, 9), np.float16) == 0  # P and Q have 4 bytes per value
    assert columns((2, 1000), np.float32) == 0
    assert columns((0, 7), np.float32) == 0


@pytest.mark.single
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"matrix_rank": 0}, ValueError, "PowerSGD: matrix_rank must be at least 1; got 0"),
        ({"matrix_rank": 2.0}, TypeError, "PowerSGD: matrix_rank must be an int; got float"),
        ({"seed": -1}, ValueError, "PowerSGD: seed must be at least 0; got -1"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        PowerSGD(**arguments)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-3), (np.float64, 1e-11)])
def test_a_sum_of_no_higher_rank_is_exact(comm: Any, agree: Any, dtype: Any, tolerance: float) -> None:
    """At once, from a random start: gradients of rank 1 on each rank, approximated by as many columns as ranks."""
    x = np.empty(M * N, dtype)
    plan: Any = bitring.plan_allreduce(
        x, comm=comm, compression=PowerSGD(matrix_rank=max(comm.size, 2)), shapes=[(M, N)]
    )
    for step in range(2):
        every = [matrix(np.random.default_rng((r, step)), (M, N), 1).astype(dtype) for r in range(comm.size)]
        x[:] = every[comm.rank].ravel()
        plan()
        expected = np.sum([each.astype(float) for each in every], axis=0).ravel()
        error = float(np.abs(x - expected).max() / np.abs(expected).max())
        agree(comm, error < tolerance, f"step {step}: {error}")
    plan.free()


def test_the_warm_start_finds_the_best_approximation(comm: Any, agree: Any) -> None:
    """Of a gradient that stays the same, without what is left over. A start that is not kept does not get better."""
    rng = np.random.default_rng(5)
    u, v = np.linalg.qr(rng.standard_normal((M, M)))[0], np.linalg.qr(rng.standard_normal((N, N)))[0]
    total = (u * 0.7 ** np.arange(M)) @ v[:M]
    x = np.empty(M * N)
    plan: Any = bitring.plan_allreduce(x, comm=comm, compression=PowerSGD(matrix_rank=3), shapes=[(M, N)])
    wanted = best(total, 3)
    least = np.linalg.norm(total - wanted)
    errors: list[float] = []
    for _ in range(12):
        x[:] = total.ravel() * 2 * (comm.rank + 1) / (comm.size * (comm.size + 1))
        plan()
        plan.state_dict()["residual"][:] = 0
        errors.append(float(np.linalg.norm(total - x.reshape(M, N))))
    if comm.size > 1:
        agree(comm, errors[0] > 1.1 * least and errors[-1] < 1.001 * least, f"{least} {errors}")
        agree(comm, bool(np.allclose(x.reshape(M, N), wanted, atol=0.02)))
    plan.free()


def test_a_start_that_was_zero_begins_anew(comm: Any, agree: Any) -> None:
    x = np.zeros(M * N)
    plan: Any = bitring.plan_allreduce(x, comm=comm, compression=PowerSGD(matrix_rank=2), shapes=[(M, N)])
    fresh = plan.state_dict()["warm_start/0"].copy()
    plan()
    agree(comm, bool(np.array_equal(plan.state_dict()["warm_start/0"], fresh) and fresh.any()))
    total = matrix(np.random.default_rng(1), (M, N), 1)  # one of two columns has nothing to say
    for _ in range(3):
        x[:] = total.ravel()
        plan()
        agree(comm, bool(np.allclose(x, comm.size * total.ravel(), atol=1e-10)))
    plan.free()


def test_two_sums_carry_everything(comm: Any, agree: Any) -> None:
    """P's and exact parameters in one AllReduce, Q's in another: the bytes of a ring."""
    shapes = [(60, 50), (60,), (40, 5, 10), (3, 3)]
    x = np.ones(sum(int(np.prod(shape)) for shape in shapes), np.float32)
    plan: Any = bitring.plan_allreduce(
        x, comm=comm, compression=PowerSGD(matrix_rank=2), shapes=shapes, algorithm="ring"
    )
    plan()
    first, second = 2 * 60 + 60 + 2 * 40 + 9, 2 * 50 + 2 * 50
    sent = comm.allreduce(plan.bytes_sent)
    agree(comm, sent == 2 * (comm.size - 1) * 4 * (first + second), f"{sent}")
    agree(comm, bool(np.allclose(x, comm.size)))
    plan.free()
