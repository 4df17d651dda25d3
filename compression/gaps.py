"""How many bytes indexes take at most; ``gaps_numba.py`` says how they are coded."""

from __future__ import annotations

GROUP = 128


def most_nbytes(block: int, count: int, item_nbits: int) -> int:
    """The most bytes that up to ``count`` of a block's values take, with items of so many bits."""
    return (block + 12 + 5 * (count // GROUP) + count * item_nbits + 7) // 8
