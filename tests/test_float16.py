"""Float16 and BFloat16: rounding, and what does not fit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from bitring.compression.encoder import Encoder
from bitring.compression.encoders.bfloat16 import BFloat16
from bitring.compression.encoders.float16 import Float16

pytestmark = pytest.mark.single

each_half = pytest.mark.parametrize(
    ("codec", "half"), [(Float16(), np.float16), (BFloat16(), ml_dtypes.bfloat16)], ids=["float16", "bfloat16"]
)


@each_half
def test_the_payload_is_the_rounded_values(codec: Encoder, half: Any) -> None:
    values = np.random.default_rng(0).normal(size=1001).astype(np.float32)
    residual, payload = np.zeros(1001, np.float32), np.zeros(2002, np.uint8)
    assert codec.encode(values, residual, payload) == 2002
    assert payload.view(half).tobytes() == values.astype(half).tobytes()
    assert residual.tolist() == (values - values.astype(half).astype(np.float32)).tolist()


@each_half
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_too_large_goes_in_portions(codec: Encoder, half: Any, dtype: Any) -> None:
    largest = float(ml_dtypes.finfo(half).max)
    portions = 2.5 if dtype == np.float64 or half == np.float16 else 1.003
    values, residual = np.array([portions * largest, -portions * largest]).astype(dtype), np.zeros(2, dtype)
    payload, out, total = np.zeros(4, np.uint8), np.zeros(2, np.float64), np.zeros(2)
    for _ in range(3):
        codec.encode(values, residual, payload)
        codec.decode(payload, out)
        assert np.isfinite(residual).all()
        total += out
        values = np.zeros(2, dtype)
    np.testing.assert_allclose(total, [portions * largest, -portions * largest], rtol=1e-2)
