"""Kernels of ``threshold.py`` for host memory. What they compute: its NumPy code, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitring.compression.kernels.gaps_numba import (
    GROUP,
    GROUP_NBYTES,
    align,
    as_integers,
    decode_block,
    put_group,
    zeros_below,
)
from bitring.compression.kernels.jit import shared
from bitring.compression.kernels.lanes_numba import absolute, bits, lanes, load, store
from bitring.compression.kernels.quantile_numba import kth_largest, sampled_kth_largest
from bitring.compression.kernels.vectors_numba import PART, address, get, put, stack

TAU_NBYTES = 4
SIGN_NBITS = 1


@shared
def _tau_for(values: Any, residual: Any, first: int, stop: int, density: float) -> Any:
    """The tau that about a part ``density`` of the block reaches; where fewer are not zero, a half of these."""
    k: Any = max(np.int64(density * (stop - first)), 1)
    tau = sampled_kth_largest(values, residual, first, stop, k)
    if tau == 0:
        count = 0
        zero = lanes(0.0, values)
        for i in range(first, stop, PART):
            some = np.uint64(bits(absolute(load(values, i, stop) + load(residual, i, stop)) > zero))
            while some:
                some &= some - np.uint64(1)
                count += 1
        if count:
            tau = kth_largest(values, residual, first, stop, PART, (count + 1) // 2)[0]
    return tau


def encode(values: Any, residual: Any, n: int, payload: Any, capacity: int, seed: int, settings: Any) -> Any:
    """See ``functions.py``; settings: block, tau, density (0: tau is fixed)."""
    block: Any = np.int64(settings[0])
    tau, density = np.float32(settings[1]), settings[2]
    gaps, items = as_integers(stack(GROUP_NBYTES)), as_integers(stack(GROUP_NBYTES))
    bit: Any = 0
    for first in range(0, n, block):
        stop = min(first + block, n)
        if density > 0:
            if bit // 8 + TAU_NBYTES > capacity:
                return -1
            exact = _tau_for(values, residual, first, stop, density)
            here = address(payload) + bit // 8
            tau = np.float32(exact)
            put(here, tau)
            if tau > exact:  # which no value may reach
                put(here, get(here, np.uint32(0)) - np.uint32(1))
                tau = get(here, np.float32(0))
            bit += 8 * TAU_NBYTES
        level = lanes(tau if tau > 0 else np.float32(np.inf), values)
        before, count = first - 1, 0
        for i in range(first, stop, PART):
            v = load(values, i, stop) + load(residual, i, stop)
            store(residual, i, stop, v)
            sent = np.uint64(bits(absolute(v) >= level))
            while sent:
                j = i + zeros_below(sent)
                sent &= sent - np.uint64(1)
                negative = residual[j] < 0
                residual[j] += tau if negative else -tau
                gaps[count] = j - before - 1
                items[count] = negative
                before = j
                count += 1
                if count == GROUP:
                    bit = put_group(payload, capacity, bit, gaps, items, count, SIGN_NBITS)
                    if bit < 0:
                        return -1
                    count = 0
        bit = put_group(payload, capacity, bit, gaps, items, count, SIGN_NBITS)
        if bit < 0:
            return -1
        bit = align(bit)
    return bit // 8


def decode(payload: Any, nbytes: int, out: Any, n: int, accumulate: int, settings: Any) -> Any:
    """See ``functions.py``; settings: block, tau, density (0: tau is fixed)."""
    block: Any = np.int64(settings[0])
    tau, density = np.float32(settings[1]), settings[2]
    bit: Any = 0
    for first in range(0, n, block):
        stop = min(first + block, n)
        if density > 0:
            if bit // 8 + TAU_NBYTES > nbytes:
                return -1
            tau = get(address(payload) + bit // 8, np.float32(0))
            bit += 8 * TAU_NBYTES
        bit = decode_block(payload, nbytes, bit, out, first, stop, accumulate, SIGN_NBITS, np.float64(tau))
        if bit < 0:
            return -1
    return 0 if bit == 8 * nbytes else -1
