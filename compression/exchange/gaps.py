"""Bytes that indexes take, at most and on average; ``gaps_numba.py`` says how they are coded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

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
