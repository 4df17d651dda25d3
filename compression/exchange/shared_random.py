"""Random numbers that are the same on every rank without being exchanged, whatever its CPU, GPU or library versions."""

from __future__ import annotations

from typing import Any

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def words(seed: int, stream: int, n: int, xp: Any = np) -> Any:
    """``n`` uint64 of the given stream: SplitMix64 (Steele et al., 2014) of its counter. ``xp``: numpy or cupy."""
    start = _mixed(_mixed(seed & _WORD) ^ (stream & _WORD))
    x = xp.arange(n, dtype=np.uint64)
    x *= np.uint64(_GOLDEN)
    x += np.uint64(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return x


def _mixed(x: int) -> int:
    x = (x + _GOLDEN) & _WORD
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift)) * factor & _WORD
    return x ^ (x >> 31)


def uniform(seed: int, stream: int, n: int) -> Any:
    """``n`` float64 from -1 to below 1, multiples of 2**-52."""
    return (words(seed, stream, n) >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
