"""Sign: the scale by hand, and what it leaves."""

from __future__ import annotations

import numpy as np
import pytest

from bitring.compression.encoders.sign import Sign

pytestmark = pytest.mark.single


def test_the_scale_is_the_mean_magnitude() -> None:
    residual, payload = np.zeros(4, np.float32), np.zeros(Sign().nbytes(4), np.uint8)
    assert Sign().encode(np.array([1, -2, 4, -1], np.float32), residual, payload) == 5
    assert payload[:4].view(np.float32).tolist() == [2]
    assert payload[4] == 0b0101
    assert residual.tolist() == [-1, 0, 2, 1]


@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
def test_what_is_left_is_what_the_docstring_says(spread: float) -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=1024) * 10 ** rng.uniform(0, spread, 1024)).astype(np.float32)
    residual, payload = np.zeros(1024, np.float32), np.zeros(Sign().nbytes(1024), np.uint8)
    Sign().encode(values, residual, payload)
    v = values.astype(float)
    rho2 = np.abs(v).mean() ** 2 / (v**2).mean()
    np.testing.assert_allclose((residual.astype(float) ** 2).sum() / (v**2).sum(), 1 - rho2, rtol=1e-3)
