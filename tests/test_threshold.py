"""Threshold: what is sent, how much, and what its indexes cost against their entropy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bitring.compression.encoders.threshold import Threshold
from bitring.compression.exchange.gaps import decode_gaps

pytestmark = pytest.mark.single


def encode(codec: Threshold, values: Any, residual: Any) -> Any:
    payload = np.empty(codec.nbytes(values.size), np.uint8)
    return payload[: codec.encode(values, residual, payload)]


def test_values_that_reach_tau_by_hand() -> None:
    codec, residual = Threshold(tau=2), np.array([0, 1, 0, 0, 0], np.float32)
    payload = encode(codec, np.array([1.5, 1, -2, 7, -1.9], np.float32), residual)
    assert decode_gaps(payload, 5, 1) == ([1, 2, 3], [0, 1, 0], payload.size)
    assert residual.tolist() == np.array([1.5, 0, 0, 5, -1.9], np.float32).tolist()
    out = np.full(5, 7, np.float32)
    codec.decode(payload, out)
    assert out.tolist() == [0, 2, -2, 2, 0]


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("distribution", ["normal", "laplace", "standard_cauchy"])
def test_tau_is_found_for_a_density(density: float, distribution: str) -> None:
    n = 1 << 18
    values = getattr(np.random.default_rng(1), distribution)(size=n).astype(np.float32)
    residual = np.zeros(n, np.float32)
    encode(Threshold(density=density), values, residual)
    sent = np.count_nonzero(residual != values) / n
    # A quarter of the values tells: 4 deviations of that sample's.
    assert abs(sent - density) < 4 * np.sqrt(density / (n / 4)) + 4 / n


def test_of_few_values_that_are_not_zero_the_upper_half_is_sent() -> None:
    values, residual = np.zeros(1 << 16, np.float32), np.zeros(1 << 16, np.float32)
    values[[77, 5000, 60_000]] = [-3, 1, 2]
    encode(Threshold(density=0.01), values, residual)
    assert residual[[77, 5000, 60_000]].tolist() == [-1, 1, 0]


def entropy_of(gaps: Any) -> float:
    """Bits a gap."""
    _, counts = np.unique(gaps, return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


@pytest.mark.parametrize("density", [0.002, 0.01, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("fixed", [True, False], ids=["tau", "density"])
def test_bits_of_a_sent_index_are_near_the_entropy_of_the_gaps(density: float, fixed: bool) -> None:
    n = 1 << 21
    values = np.random.default_rng(2).normal(size=n).astype(np.float32)
    tau = float(np.quantile(np.abs(values), 1 - density)) if fixed else None
    residual = np.zeros(n, np.float32)
    nbits = 8 * encode(Threshold(tau) if fixed else Threshold(density=density), values, residual).size
    sent = np.flatnonzero(residual != values)
    # The gaps of values sent independently: their entropy can be told exactly; a histogram of so few underestimates it.
    p = sent.size / n
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) / p
    if density >= 0.05:
        assert abs(entropy_of(np.diff(sent)) - entropy) < 0.01 * entropy
    assert nbits / sent.size - 1 < 1.15 * entropy  # without the sign, which is a bit of entropy of its own
    if density <= 0.01:
        assert nbits / sent.size < 1.15 * entropy  # even with it


def test_the_code_follows_a_density_that_changes() -> None:
    rng, n = np.random.default_rng(3), 1 << 20
    densities = np.repeat(10 ** rng.uniform(-3, -0.5, n >> 12), 1 << 12)
    values = (rng.random(n) < densities).astype(np.float32)
    nbits = 8 * encode(Threshold(tau=1), values, np.zeros(n, np.float32)).size - values.sum()
    entropy = -(densities * np.log2(densities) + (1 - densities) * np.log2(1 - densities)).sum()
    assert nbits < 1.15 * entropy


def test_settings_are_checked() -> None:
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"Threshold: tau must be above 0 and at most 3e\+38; got"):
            Threshold(wrong)
    with pytest.raises(TypeError, match="Threshold: density must be a number; got str"):
        Threshold(density="0.1")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"Threshold: density must be above 0 and at most 1; got 1\.5"):
        Threshold(density=1.5)
    with pytest.raises(ValueError, match=r"Threshold: expected tau or density; got both, 1 and 0\.1"):
        Threshold(tau=1, density=0.1)
