"""The k-th largest magnitude of a block, found without sorting: what ``threshold.py`` and ``topk.py`` share."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitring.compression.gaps_numba import zeros_below
from bitring.compression.jit import inline, shared
from bitring.compression.lanes_numba import absolute, bits, lanes, load, store
from bitring.compression.vectors_numba import PART, as_type, clear, get, itemsize, put, stack

DIGIT = 11  # bits
COUNTS = 1 << DIGIT
COUNTS_NBYTES = 4 * COUNTS
NUMBERS_NBYTES = 8 * PART


@inline
def _magnitude(word: Any, like: Any, place: int) -> Any:
    """The number whose bits are ``word``, as wide as those behind ``like``."""
    put(place, word)
    return np.float64(get(place, np.float32(0))) if itemsize(like) == 4 else get(place, np.float64(0))


@shared
def kth_largest(values: Any, residual: Any, first: int, stop: int, step: int, k: int) -> Any:
    """The k-th largest |v|, v = values + residual, and how many of the k are no larger than it.

    Takes 8 values, passes over ``step`` - 8, and so on. Non-negative floats are in the order of their bits, which are
    found 11 at a time, from the highest: one pass counts how many values have which next 11, of those that agree so
    far. 0 where there are fewer than k. NaN does not count.
    """
    numbers, counts = stack(NUMBERS_NBYTES), stack(COUNTS_NBYTES)
    word_nbytes = itemsize(residual)
    shift = 8 * word_nbytes - 1
    prefix = np.uint64(0)
    while shift > 0:
        after = max(shift - DIGIT, 0)
        clear(counts, COUNTS_NBYTES)
        lowest = lanes(_magnitude(prefix << np.uint64(shift), residual, numbers) if prefix else 0.0, residual)
        for i in range(first, stop, step):
            magnitudes = absolute(load(values, i, stop) + load(residual, i, stop))
            chosen = np.uint64(bits(magnitudes >= lowest))
            if chosen:
                store(as_type(numbers, residual), 0, PART, magnitudes)
                if i + PART > stop:
                    chosen &= (np.uint64(1) << np.uint64(stop - i)) - np.uint64(1)
                while chosen:
                    place = numbers + zeros_below(chosen) * word_nbytes
                    chosen &= chosen - np.uint64(1)
                    word = np.uint64(get(place, np.uint32(0))) if word_nbytes == 4 else get(place, np.uint64(0))
                    if word >> np.uint64(shift) == prefix:
                        digit = np.int64(word >> np.uint64(after)) & ((1 << (shift - after)) - 1)
                        place = counts + 4 * digit
                        put(place, np.uint32(get(place, np.uint32(0)) + 1))
        digit = (1 << (shift - after)) - 1
        while digit > 0:
            here = np.int64(get(counts + 4 * digit, np.uint32(0)))
            if here >= k:
                break
            k -= here
            digit -= 1
        prefix = prefix << np.uint64(shift - after) | np.uint64(digit)
        shift = after
    return _magnitude(prefix, residual, numbers), k


SMALLEST_SAMPLED = 4096


@shared
def sampled_kth_largest(values: Any, residual: Any, first: int, stop: int, k: int) -> Any:
    """About the k-th largest |v|: exact below 4096 values, from there on of a quarter of them; 0 for too few."""
    few = stop - first < SMALLEST_SAMPLED
    return kth_largest(values, residual, first, stop, PART if few else 4 * PART, k if few else max(k // 4, 1))[0]
