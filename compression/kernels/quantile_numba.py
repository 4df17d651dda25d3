"""The k-th largest magnitude of a block, found without sorting: what ``threshold.py`` and ``topk.py`` share."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitring.compression.kernels.gaps_numba import zeros_below
from bitring.compression.kernels.jit import inline, shared
from bitring.compression.kernels.lanes_numba import absolute, bits, lanes, load, store
from bitring.compression.kernels.vectors_numba import PART, as_type, clear, get, itemsize, put, stack

DIGIT = 11  # bits
COUNTS = 1 << DIGIT
COUNTS_NBYTES = 4 * COUNTS
NUMBERS_NBYTES = 8 * PART
COARSER = 16
WORTH_A_LOOK = 512  # steps


@inline
def _magnitude(word: Any, like: Any, place: int) -> Any:
    """The number whose bits are ``word``, as wide as those behind ``like``."""
    put(place, word)
    return np.float64(get(place, np.float32(0))) if itemsize(like) == 4 else get(place, np.float64(0))


@shared
def _count(
    values: Any,
    residual: Any,
    first: int,
    stop: int,
    step: int,
    lowest: float,
    prefix: Any,
    shift: Any,
    after: Any,
    counts: int,
) -> Any:
    """Count at ``counts`` how many |v| have which bits ``after`` to ``shift``; how many there are in all.

    Of those that are ``lowest`` or more and have the bits ``prefix`` from ``shift`` on.
    """
    numbers = stack(NUMBERS_NBYTES)
    word_nbytes = itemsize(residual)
    clear(counts, COUNTS_NBYTES)
    counted = 0
    limit = lanes(lowest, residual)
    for i in range(first, stop, step):
        magnitudes = absolute(load(values, i, stop) + load(residual, i, stop))
        chosen = np.uint64(bits(magnitudes >= limit))
        if chosen:
            store(as_type(numbers, residual), 0, PART, magnitudes)
            if i + PART > stop:
                chosen &= (np.uint64(1) << np.uint64(stop - i)) - np.uint64(1)
            while chosen:
                place = numbers + zeros_below(chosen) * word_nbytes
                chosen &= chosen - np.uint64(1)
                word = np.uint64(get(place, np.uint32(0))) if word_nbytes == 4 else get(place, np.uint64(0))
                if word >> np.uint64(shift) == prefix:
                    place = counts + 4 * (np.int64(word >> np.uint64(after)) & ((1 << (shift - after)) - 1))
                    put(place, np.uint32(get(place, np.uint32(0)) + 1))
                    counted += 1
    return counted


@inline
def _digit_of(counts: int, digit: Any, k: Any) -> Any:
    """From ``digit`` down: where the k-th number counted is, and which it is of those there; 0 for fewer."""
    while digit > 0:
        here = np.int64(get(counts + 4 * digit, np.uint32(0)))
        if here >= k:
            break
        k -= here
        digit -= 1
    return digit, k


@shared
def kth_largest(values: Any, residual: Any, first: int, stop: int, step: int, k: Any) -> Any:
    """The k-th largest |v|, v = values + residual, and how many of the k are no larger than it.

    Takes 8 values, passes over ``step`` - 8, and so on. Non-negative floats are in the order of their bits, which are
    found 11 at a time, from the highest: one pass counts how many values have which next 11, of those that agree so
    far. What is surely smaller, as every 16th step tells, is passed over 8 values at a time; should that have been too
    much, it is counted after all. 0 where there are fewer than k. NaN does not count.
    """
    number, counts = stack(NUMBERS_NBYTES), stack(COUNTS_NBYTES)
    shift: Any = 8 * itemsize(residual) - 1
    prefix = np.uint64(0)
    wanted = k
    lowest = 0.0
    if stop - first >= WORTH_A_LOOK * step:
        after = shift - DIGIT
        _count(values, residual, first, stop, COARSER * step, 0.0, prefix, shift, after, counts)
        digit, _ = _digit_of(counts, COUNTS - 1, 2 * k // COARSER + COARSER // 2)
        lowest = _magnitude(np.uint64(digit) << np.uint64(after), residual, number)
    while shift > 0:
        after = max(shift - DIGIT, 0)
        counted = _count(values, residual, first, stop, step, lowest, prefix, shift, after, counts)
        if not prefix and lowest > 0 and counted < wanted:
            _count(values, residual, first, stop, step, 0.0, prefix, shift, after, counts)
        digit, k = _digit_of(counts, (1 << (shift - after)) - 1, k)
        prefix = prefix << np.uint64(shift - after) | np.uint64(digit)
        shift = after
        lowest = _magnitude(prefix << np.uint64(shift), residual, number)
    return lowest, k


SMALLEST_SAMPLED = 4096


@shared
def sampled_kth_largest(values: Any, residual: Any, first: int, stop: int, k: Any) -> Any:
    """About the k-th largest |v|: exact below 4096 values, from there on of a quarter of them; 0 for too few."""
    few = stop - first < SMALLEST_SAMPLED
    return kth_largest(values, residual, first, stop, PART if few else 4 * PART, k if few else max(k // 4, 1))[0]
