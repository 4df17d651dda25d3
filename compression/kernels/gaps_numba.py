"""Sorted indexes as entropy-coded gaps: the parts that the kernels of ``threshold.py`` and ``topk.py`` share.

Golomb-Rice codes (Rice and Plaunt, "Adaptive Variable-Length Coding for Efficient Compression of Spacecraft Television
Data", 1971). Indexes, ascending within a block, travel in groups of 128, the last group of a block being shorter, maybe
empty. Bits, from the lowest of each byte on::

    1 bit: whether the group is full, 4 bits: k, then, where it is not full, 7 bits: how many indexes it has; of each
    index its gap, the number of values passed over since the index before it: gap >> k zeros, a one, the last k
    bits of the gap; and then its item, some bits of the encoder's (a sign, a value)

Each group has the k that is best for it, so that the code follows the density. Gaps of values sent independently with
probability p have the entropy H(p)/p bits; the code then takes at most a few hundredths of a bit more, and one bit a
value (a bitmap) where p is a half. A block's gaps and ones take no more bits than it has values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from bitring.compression.kernels.jit import inline, shared
from bitring.compression.kernels.lanes_numba import get_value, put_value
from bitring.compression.kernels.vectors_numba import I1, I64, address, clear, get, intrinsic, itemsize, put, stack

GROUP = 128
GROUP_NBYTES = 8 * GROUP  # of integers
MOST_K = 15
WINDOW = 56  # bits that one word read at any bit holds


def _count_zeros(llvm_name: str) -> Any:
    @intrinsic
    def count_zeros(typing: Any, word: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            count = builder.module.declare_intrinsic(llvm_name, [I64], ir.FunctionType(I64, [I64, I1]))
            return builder.call(count, [arguments[0], I1(0)])

        return types.int64(types.uint64), generate

    return count_zeros


zeros_below = _count_zeros("llvm.cttz")  # of a word, its lowest one; 64 for zero
zeros_above = _count_zeros("llvm.ctlz")


@intrinsic
def as_integers(typing: Any, address: Any) -> Any:
    """A pointer to int64 at the address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], I64.as_pointer())

    return types.CPointer(types.int64)(types.int64), generate


@shared
def _put_bits(payload: Any, bit: int, word: Any, count: int) -> Any:
    """Write the last ``count`` (at most 56) bits of ``word``, whose others are zero; the position behind them."""
    at, shift = bit >> 3, bit & 7
    word = word << np.uint64(shift)
    if shift:
        word |= np.uint64(payload[at]) & ((np.uint64(1) << np.uint64(shift)) - np.uint64(1))
    for k in range((shift + count + 7) >> 3):
        payload[at + k] = np.uint8(word >> np.uint64(8 * k) & np.uint64(0xFF))
    return bit + count


@inline
def _bits(payload: Any, nbytes: int, bit: int) -> Any:
    """The 56 bits from ``bit`` on, or more; zeros behind the payload."""
    at = bit >> 3
    word = np.uint64(0)
    if at + 8 <= nbytes:
        word = get(address(payload) + at, np.uint64(0))
    else:
        for k in range(nbytes - at):
            word |= np.uint64(payload[at + k]) << np.uint64(8 * k)
    return word >> np.uint64(bit & 7)


@inline
def _ones(count: int) -> Any:
    return (np.uint64(1) << np.uint64(count)) - np.uint64(1)


@shared
def put_group(payload: Any, capacity: int, bit: int, gaps: Any, items: Any, count: int, item_nbits: int) -> Any:
    """Write a group of ``count`` indexes; the position behind it, or -1 where there is no room for it."""
    total = 0
    for j in range(count):
        total += gaps[j]
    # The best k is near the logarithm of the mean.
    near = 64 - zeros_above(np.uint64(total // count)) if count else 0
    best_k, fewest = 0, 1 << 62
    for k in range(max(near - 2, 0), min(near + 1, MOST_K) + 1):
        nbits = count * (k + 1)
        for j in range(count):
            nbits += gaps[j] >> k
        if nbits < fewest:
            best_k, fewest = k, nbits
    full = count == GROUP
    if bit + (5 if full else 12) + fewest + count * item_nbits > 8 * capacity:
        return -1
    bit = _put_bits(payload, bit, np.uint64(full) | np.uint64(best_k) << np.uint64(1), 5)
    if not full:
        bit = _put_bits(payload, bit, np.uint64(count), 7)
    rest = 1 + best_k + item_nbits
    for j in range(count):
        gap = gaps[j]
        zeros = gap >> best_k
        while zeros + rest > WINDOW:
            some = min(zeros, 32)
            bit = _put_bits(payload, bit, np.uint64(0), some)
            zeros -= some
        word = (np.uint64(items[j]) << np.uint64(best_k) | np.uint64(gap) & _ones(best_k)) << np.uint64(1)
        bit = _put_bits(payload, bit, (word | np.uint64(1)) << np.uint64(zeros), zeros + rest)
    return bit


@inline
def align(bit: int) -> Any:
    """The position where the next whole byte begins."""
    return (bit + 7) & ~7


@inline
def decode_block(
    payload: Any, nbytes: int, bit: int, out: Any, first: int, stop: int, accumulate: int, item_nbits: int, level: float
) -> Any:
    """Decode a block to ``out`` from ``first`` to before ``stop``; where the next one begins, or -1.

    An item of 1 bit is a sign, of ``level``; one of 32 is a float32.
    """
    limit = 8 * nbytes
    number = stack(8)
    index: Any = first - 1
    if not accumulate:
        clear(address(out) + first * itemsize(out), (stop - first) * itemsize(out))
    full = True
    while full:
        if bit + 5 > limit:
            return -1
        word = _bits(payload, nbytes, bit)
        full = (word & np.uint64(1)) != 0
        k: Any = np.int64(word >> np.uint64(1) & np.uint64(15))
        count: Any = GROUP
        bit += 5
        if not full:
            count = np.int64(word >> np.uint64(5) & np.uint64(127))
            bit += 7
        for _ in range(count):
            zeros = 0
            word = _bits(payload, nbytes, min(bit, limit))
            run = zeros_below(word)
            while run >= WINDOW:
                zeros += WINDOW
                bit += WINDOW
                if bit >= limit:
                    return -1
                word = _bits(payload, nbytes, bit)
                run = zeros_below(word)
            zeros += run
            bit += run + 1
            if run + 1 + k + item_nbits <= WINDOW:
                word >>= np.uint64(run + 1)
            else:
                word = _bits(payload, nbytes, min(bit, limit))
            bit += k + item_nbits
            if bit > limit or zeros >= stop - first:
                return -1
            index += (zeros << k | np.int64(word & _ones(k))) + 1
            if index >= stop:
                return -1
            item = word >> np.uint64(k) & _ones(item_nbits)
            if item_nbits == 1:
                x = -level if item else level
            else:
                put(number, item)
                x = np.float64(get(number, np.float32(0)))
            put_value(out, index, get_value(out, index) + x if accumulate else x)
    end = align(bit)
    if end > limit or _bits(payload, nbytes, bit) & _ones(end - bit):
        return -1
    return end
