"""Linear: levels and bytes by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitring.compression.encoders.linear import Linear

pytestmark = pytest.mark.single


def test_levels_and_bytes_by_hand() -> None:
    codec = Linear(bits=4, block=64)
    residual, payload = np.zeros(5, np.float32), np.zeros(codec.nbytes(5), np.uint8)
    assert codec.encode(np.array([7, -3.4, 0.5, -0.6, -7], np.float32), residual, payload) == 7
    assert payload[:4].view(np.float32).tolist() == [1]  # the step: 7 / (2^3 - 1)
    assert payload[4:].tolist() == [0xD7, 0xF0, 0x09]  # 7, -3; 0 (a tie, to even), -1; -7
    np.testing.assert_allclose(residual, [0, -0.4, 0.5, 0.4, 0], atol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_residual_is_larger_than_its_value_nor_than_half_a_step(bits: int) -> None:
    codec = Linear(bits, 128)
    values = np.random.default_rng(bits).standard_t(2, 1000).astype(np.float32)
    residual, payload = np.zeros(1000, np.float32), np.empty(codec.nbytes(1000), np.uint8)
    codec.encode(values, residual, payload)
    assert (np.abs(residual) <= np.abs(values)).all()
    for first in range(0, 1000, 128):
        step = np.abs(values[first : first + 128]).max() / (2 ** (bits - 1) - 1)
        assert np.abs(residual[first : first + 128]).max() <= 0.5001 * step


def test_values_too_small_for_a_step_are_left() -> None:
    codec = Linear()
    residual, payload = np.full(3, 1e-40, np.float32), np.zeros(codec.nbytes(3), np.uint8)
    codec.encode(np.zeros(3, np.float32), residual, payload)
    assert not payload.any()
    assert residual.tolist() == np.full(3, 1e-40, np.float32).tolist()


def test_bytes_of_a_payload() -> None:
    assert [Linear(3, 64).nbytes(n) for n in (0, 1, 2, 3, 64, 65)] == [0, 5, 5, 6, 28, 33]


@pytest.mark.parametrize(("bits", "error"), [(1, ValueError), (9, ValueError), (4.0, TypeError), (True, TypeError)])
def test_bits_must_be_2_to_8(bits: Any, error: Any) -> None:
    with pytest.raises(error, match=r"Linear: bits must be (2 to 8|an int); got"):
        Linear(bits)
