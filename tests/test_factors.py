"""A gradient as two thin matrices."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import bitring
from bitring.compression.encoder import VALUE_DTYPES
from bitring.compression.factors import Factors

pytestmark = pytest.mark.single


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("samples", [0, 1, 6])
def test_the_product(dtype: Any, samples: int) -> None:
    rng = np.random.default_rng(samples)
    u, v = (rng.standard_normal((samples, n)).astype(dtype) for n in (3, 5))
    factors = Factors(u, v)
    assert (factors.shape, factors.dtype) == ((3, 5), dtype)
    expected = u.astype(float).T @ v.astype(float)
    tolerance = 4 * float(ml_dtypes.finfo(dtype).eps) * float(np.abs(expected).max(initial=1))
    product = factors.product()
    assert product.dtype == dtype
    np.testing.assert_allclose(product.astype(float), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(factors.scaled(0.25).product().astype(float), expected / 4, rtol=0, atol=tolerance)
    out = np.full((5, 3), 9, dtype).T  # not contiguous
    factors.multiply(out)
    np.testing.assert_allclose(out.astype(float), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("turned", [False, True])
def test_a_small_scale_loses_no_small_values(dtype: Any, turned: bool) -> None:
    small, large = np.full((1, 2), 2e-6, dtype), np.full((1, 2), 1000, dtype)
    factors = (Factors(large, small) if turned else Factors(small, large)).scaled(1e-3)
    wide = factors.u.astype(float).T @ factors.v.astype(float)
    np.testing.assert_allclose(wide, 2e-6, rtol=0.05)


def test_overflow_is_found() -> None:
    for dtype, large in ((np.float16, 300), (np.float32, 1e20)):
        u = np.full((2, 3), large, dtype)
        assert Factors(u, u).overflows()
        v = np.zeros((2, 3), dtype)
        v[0, 0] = large
        assert not Factors(u[:, :2] * dtype(0.5), v * dtype(0.001)).overflows()
    # Large on both sides, but never in the same sample.
    u, v = np.array([[1e30], [0]], np.float32), np.array([[0], [1e30]], np.float32)
    assert not Factors(u, v).overflows()


@pytest.mark.parametrize(
    ("u", "v", "error", "text"),
    [
        ([[1.0]], np.ones((1, 2)), TypeError, "Factors: u must be a NumPy or CuPy array; got list"),
        (np.ones((1, 2)), np.ones(2), ValueError, r"Factors: v must have shape \(K, N\), K samples; got \(2,\)"),
        (np.ones((1, 2)), np.ones((2, 2)), ValueError, "u and v must have as many rows, .*; got 1 and 2"),
        (np.ones((1, 2)), np.ones((1, 2), np.float32), TypeError, "of one dtype .*; got float64 .* and float32"),
        (np.ones((1, 2), int), np.ones((1, 2)), TypeError, "Factors: u must be of float16, .*; got int64"),
    ],
)
def test_bad_arguments(u: Any, v: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Factors(u, v)


@pytest.mark.parametrize("make", [bitring.Softmax, bitring.MLP, bitring.CNN])
def test_models_hand_factors_over(make: Any) -> None:
    """Of dense weights, nothing else; multiplied out they are the gradients, and they outlive the next pass."""
    rng = np.random.default_rng(0)
    x, y = rng.random((6, 8, 8)).astype(np.float32), rng.integers(0, 10, 6)
    model = make((8, 8), 10)
    seen: list[tuple[str, type]] = []
    loss, factors = model.loss_and_gradients(x, y, lambda name, g: seen.append((name, type(g))), product=Factors)
    expected_loss, expected = model.loss_and_gradients(x, y)
    model.loss_and_gradients(x[::-1], y)
    assert loss == expected_loss
    assert list(factors) == list(expected)
    dense = [name for name in expected if name.startswith("dense") and name.endswith("weight")]
    assert dense and [name for name, g in factors.items() if isinstance(g, Factors)] == dense
    assert [name for name, kind in reversed(seen) if kind is Factors] == dense
    for name, g in factors.items():
        product = g.product() if isinstance(g, Factors) else g
        np.testing.assert_allclose(product, expected[name], rtol=1e-5, atol=1e-7)
    _, empty = model.loss_and_gradients(x[:0], y[:0], product=Factors)
    assert all(not g.any() for g in empty.values())
