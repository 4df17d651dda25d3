"""Fixed: right on average, one of the two neighbours, and residuals that stay small."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from bitring.compression.encoder import VALUE_DTYPES, residual_dtype
from bitring.compression.encoders.fixed import Fixed

pytestmark = pytest.mark.single

each_dtype = pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=lambda dtype: dtype.name)


def decoded(codec: Fixed, values: Any, seed: int) -> Any:
    wide = residual_dtype(values.dtype)
    payload, out = np.empty(codec.nbytes(values.size), np.uint8), np.empty(values.size, wide)
    codec.encode(values, np.zeros(values.size, wide), payload, seed)
    codec.decode(payload, out)
    return out


@each_dtype
@pytest.mark.parametrize("bits", [3, 8])
def test_the_expectation_is_the_value(dtype: Any, bits: int) -> None:
    codec, draws = Fixed(bits, 128), 2000
    values = np.random.default_rng(bits).normal(size=300).astype(dtype)
    values[:4] = [1, 0.25, 1e-3, 0]
    total = np.zeros(values.size)
    for seed in range(draws):
        total += decoded(codec, values, seed)
    first = np.append(np.arange(0, 300, 128), 300)
    steps = np.concatenate(
        [
            np.full(b - a, 2.0 ** np.ceil(np.log2(np.abs(values[a:b].astype(float)).max() / (2 ** (bits - 1) - 1))))
            for a, b in itertools.pairwise(first)
        ]
    )
    error = (total / draws - values.astype(float)) / steps
    # A draw's deviation is at most half a step; 300 values, none beyond 5 deviations of the mean; nor their mean.
    assert np.abs(error).max() < 5 * 0.5 / np.sqrt(draws)
    assert np.abs(error.mean()) < 5 * 0.5 / np.sqrt(draws * 300)


def test_a_value_becomes_one_of_its_two_neighbours_as_often_as_it_is_near() -> None:
    codec = Fixed(8, 64)
    values = np.full(64, 0.3, np.float32)
    values[0] = 127  # the step is 1
    drawn = np.array([decoded(codec, values, seed)[1:] for seed in range(500)])
    assert set(np.unique(drawn).tolist()) == {0.0, 1.0}
    assert abs(drawn.mean() - 0.3) < 5 * 0.46 / np.sqrt(drawn.size)
    # Neither the draws of one seed nor those of one place go together.
    assert drawn.mean(axis=0).std() < 2 * 0.46 / np.sqrt(500)
    assert drawn.mean(axis=1).std() < 2 * 0.46 / np.sqrt(63)


def test_whole_steps_are_exact() -> None:
    values = np.arange(-127, 128, dtype=np.float32) / 16
    assert decoded(Fixed(8, 256), values, 3).tolist() == values.tolist()


def test_seeds_differ_and_one_repeats() -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert decoded(Fixed(), values, 1).tobytes() == decoded(Fixed(), values, 1).tobytes()
    assert decoded(Fixed(), values, 1).tobytes() != decoded(Fixed(), values, 2).tobytes()


@pytest.mark.parametrize("bits", [3, 4, 16])
def test_residuals_stay_within_twice_the_gradients(bits: int) -> None:
    codec, rng = Fixed(bits, 1024), np.random.default_rng(0)
    residual, payload = np.zeros(4096, np.float32), np.empty(codec.nbytes(4096), np.uint8)
    for seed in range(200):
        values = rng.uniform(-1, 1, 4096).astype(np.float32)
        codec.encode(values, residual, payload, seed)
        assert np.abs(residual).max() < 2 / (2 ** (bits - 1) - 3 + 1e-9) if bits > 3 else np.abs(residual).max() < 2


@pytest.mark.parametrize("bits", [2, 17])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match=f"Fixed: bits must be 3 to 16; got {bits}"):
        Fixed(bits)
