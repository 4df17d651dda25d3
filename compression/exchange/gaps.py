"""Ascending indexes as Golomb-Rice coded gaps: the bytes they take, and their coding in Python.

``gaps_numba.py`` says how they are coded, and does the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from bitring.arrays import Array

Nbytes = TypeVar("Nbytes", int, float)

GROUP = 128


def over_blocks(n: int, block: int, nbytes: Callable[[int], Nbytes]) -> Nbytes:
    """The sum of ``nbytes(values of a block)`` over the blocks of ``n`` values, the last of them being shorter."""
    blocks, rest = divmod(n, block)
    return blocks * nbytes(block) + (nbytes(rest) if rest else 0)


def most_nbytes(block: int, count: int, item_nbits: int) -> int:
    """The most bytes that up to ``count`` of a block's values take, with items of so many bits."""
    return (block + 12 + 5 * (count // GROUP) + count * item_nbits + 7) // 8


def expected_nbytes(block: int, count: int, item_nbits: int) -> float:
    """The bytes that ``count`` of a block's values take, on average, where each is as likely to be among them.

    Gaps are geometric then: with q = 1 - count/block, the mean of gap >> k is q^(2^k) / (1 - q^(2^k)).
    """
    q = 1 - count / block
    gap_nbits = min(k + 1 / (1 - q ** (1 << k)) for k in range(16))
    nbits = 12 + 5 * (count // GROUP) + count * (gap_nbits + item_nbits)
    return min((nbits + 3.5) / 8, most_nbytes(block, count, item_nbits))


def _low_first(x: int, count: int) -> str:
    return f"{x:0{count}b}"[::-1] if count else ""


def encode_gaps(indexes: Array, items: list[int], item_nbits: int) -> Array:
    """The bytes of ascending indexes, from 0 on, and their items."""
    text = ""
    gaps = np.diff(indexes, prepend=-1).astype(int) - 1
    for begin in range(0, gaps.size + 1, GROUP):
        group = gaps[begin : begin + GROUP].tolist()
        mean = sum(group) // len(group) if group else 0
        ks = range(max(mean.bit_length() - 2, 0), min(mean.bit_length() + 1, 15) + 1)
        k = min(ks, key=lambda k: sum((gap >> k) + 1 + k for gap in group))
        text += str(int(len(group) == GROUP)) + _low_first(k, 4)
        if len(group) < GROUP:
            text += _low_first(len(group), 7)
        for gap, item in zip(group, items[begin:], strict=False):
            text += "0" * (gap >> k) + "1" + _low_first(gap % (1 << k), k) + _low_first(item, item_nbits)
    return np.packbits(np.array(list(text)).astype(np.uint8), bitorder="little")


def decode_gaps(payload: Array, count: int, item_nbits: int) -> tuple[list[int], list[int], int]:
    """Indexes below ``count``, items and how many bytes they took. Raises ValueError for what was not encoded so."""
    text = "".join(map(str, np.unpackbits(payload, bitorder="little").tolist()))
    at, index, full = 0, -1, True
    indexes: list[int] = []
    items: list[int] = []

    def take(count: int) -> int:
        nonlocal at
        at += count
        return int(text[at - count : at][::-1] or "0", 2)

    while full:
        full, k = take(1) == 1, take(4)
        for _ in range(GROUP if full else take(7)):
            zeros = text.index("1", at) - at
            at += zeros + 1
            index += (zeros << k) + take(k) + 1
            indexes.append(index)
            items.append(take(item_nbits))
            if index >= count or at > len(text):
                raise ValueError(f"an index beyond {count} values, or bits that are not there")
    if at > len(text):
        raise ValueError("bits that are not there")
    return indexes, items, -(-at // 8)
