"""The same numbers everywhere and for ever, and random enough."""

from __future__ import annotations

import numpy as np
import pytest

from bitring.compression.exchange.shared_random import uniform, words

pytestmark = pytest.mark.single


def test_they_never_change() -> None:
    """Checkpoints and peers of another version rely on them."""
    assert [hex(x) for x in words(0, 0, 2).tolist()] == ["0xb49ab477bb8685e2", "0x238275bc38fcbe91"]


def test_streams_and_seeds_differ_and_prefixes_agree() -> None:
    drawn = {words(seed, stream, 4).tobytes() for seed in range(10) for stream in range(10)}
    assert len(drawn) == 100
    assert words(3, 4, 5).tolist() == words(3, 4, 9)[:5].tolist()
    assert words(1, 2, 0).size == 0


def test_bits_and_values_are_even() -> None:
    n = 40_000
    bits = np.unpackbits(words(1, 2, n).view(np.uint8)).reshape(n, 64)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / n**0.5
    values = uniform(1, 3, n)
    assert -1 <= values.min() < -0.999 and 0.999 < values.max() < 1
    assert abs(values.mean()) < 5 * 0.58 / n**0.5
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 5 / n**0.5
