"""Sorted indexes as Golomb-Rice coded gaps in Python: what ``gaps_numba.py`` writes and reads, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any
GROUP = 128


def _low_first(x: int, count: int) -> str:
    return f"{x:0{count}b}"[::-1] if count else ""


def encode_block(indexes: Array, items: list[int], item_nbits: int) -> Array:
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


def decode_block(payload: Array, item_nbits: int) -> tuple[list[int], list[int], int]:
    """Indexes, items and how many bytes they took."""
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
    return indexes, items, -(-at // 8)
