"""TopK: the largest are sent, exactly, and no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitring.compression.encoder import residual_dtype
from bitring.compression.encoders.topk import TopK

pytestmark = pytest.mark.single


def sent(codec: TopK, values: Any) -> Any:
    """What is decoded."""
    residual = np.zeros(values.size, residual_dtype(values.dtype))
    payload, out = np.empty(codec.nbytes(values.size), np.uint8), np.empty(values.size, residual.dtype)
    codec.decode(payload[: codec.encode(values, residual, payload)], out)
    return out


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("density", [0.0001, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("n", [100, 5000, 1 << 16])
def test_the_k_largest_are_sent_as_they_are(dtype: Any, density: float, n: int) -> None:
    rng = np.random.default_rng(n)
    values = (rng.normal(size=n) * 10 ** rng.uniform(-4, 0, n)).astype(np.float32).astype(dtype)
    values[values == 0] = 1
    out = sent(TopK(density), values)
    k = max(int(density * n), 1)
    order = np.argsort(-np.abs(values), kind="stable")
    expected = np.zeros(n, out.dtype)
    expected[order[:k]] = values[order[:k]]
    assert out.tolist() == expected.tolist()


def test_a_few_large_values_where_no_look_falls_do_not_mislead() -> None:
    # The first look takes every 16th 8 values. Large ones there only, and then there alone none, mislead it both ways.
    for looked in (True, False):
        values = np.random.default_rng(0).normal(size=1 << 16).astype(np.float32)
        there = np.arange(values.size) // 8 % 16 == 0
        values[there == looked] *= 1e6
        out = sent(TopK(0.2), values)
        k = int(0.2 * values.size)
        assert np.sort(np.abs(out))[-k:].tolist() == np.sort(np.abs(values))[-k:].tolist()
        assert np.count_nonzero(out) == k


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1])
def test_sampled_sends_about_as_many_and_all_that_are_larger(density: float) -> None:
    values = np.random.default_rng(5).normal(size=1 << 18).astype(np.float32)
    out = sent(TopK(density, sampled=True), values)
    share = np.count_nonzero(out) / values.size
    assert abs(share - density) < 4 * np.sqrt(density / (values.size / 4)) + 4 / values.size
    for first in range(0, values.size, 1 << 16):
        block, sent_block = values[first : first + (1 << 16)], out[first : first + (1 << 16)]
        assert np.abs(block[sent_block == 0]).max() <= np.abs(sent_block[sent_block != 0]).min()


def test_sampled_sends_no_more_than_twice_as_many() -> None:
    values = np.ones(1 << 16, np.float32)
    assert np.count_nonzero(sent(TopK(0.01, sampled=True), values)) == 2 * int(0.01 * values.size)


def test_of_equal_values_the_first_are_sent() -> None:
    values = np.tile(np.array([-2, 1, 2], np.float32), 100)
    assert np.flatnonzero(sent(TopK(0.05), values)).tolist() == [0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21]


def test_zeros_are_not_sent() -> None:
    values = np.zeros(1 << 16, np.float32)
    values[99] = -1e-42
    assert np.flatnonzero(sent(TopK(), values)).tolist() == [99]


def test_settings_are_checked() -> None:
    with pytest.raises(TypeError, match="TopK: sampled must be a bool; got int"):
        TopK(sampled=1)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="TopK: density must be above 0 and at most 1; got 0"):
        TopK(density=0)
