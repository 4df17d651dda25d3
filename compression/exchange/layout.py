"""How a compressed buffer is cut: blocks that span no two parameters, chunks of whole blocks that ranks own, and
segments of chunks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

Piece = tuple[int, int]
"""Values from the first index to before the second: whole blocks of one parameter, encoded in one call."""


@dataclass(frozen=True)
class Layout:
    """``pieces[c]`` make up the chunk that rank c owns: the values from ``owned[c][0]`` to before ``owned[c][1]``."""

    pieces: tuple[tuple[Piece, ...], ...]
    owned: tuple[Piece, ...]


_SEGMENTS = 16
_SEGMENT_VALUES = 1 << 16
_MESSAGES = 128


def segment_length(longest: int, size: int, block: int) -> int:
    """How many values, whole blocks, a message carries where the ``longest`` of ``size`` chunks has so many.

    A chunk has about 16 segments, of at least 65,536 values, and fewer where a rank would have more than 128 messages
    of one kind under way.
    """
    most = max(1, min(_SEGMENTS, _MESSAGES // size))
    return -(-max(_SEGMENT_VALUES, -(-longest // most)) // block) * block


def segments(layout: Layout, block: int) -> tuple[tuple[tuple[Piece, ...], ...], ...]:
    """``layout``'s chunks cut into segments, each of them a tuple of pieces: what one message carries."""
    longest = max(stop - start for start, stop in layout.owned)
    length = segment_length(longest, len(layout.owned), block)
    chunks: list[tuple[tuple[Piece, ...], ...]] = []
    for pieces in layout.pieces:
        chunk: list[list[Piece]] = []
        room = 0
        for start, stop in pieces:
            while start < stop:
                if room < block:
                    chunk.append([])
                    room = length
                end = min(stop, start + room // block * block)
                chunk[-1].append((start, end))
                room -= end - start
                start = end
        chunks.append(tuple(map(tuple, chunk)))
    return tuple(chunks)


def cut(n: int, boundaries: Sequence[int], block: int, size: int) -> Layout:
    """Cut ``n`` values among ``size`` ranks.

    A new parameter begins at each of ``boundaries`` (ascending; 0 need not be there). Each parameter is cut into
    blocks of ``block`` values, the last one shorter; the blocks are dealt out evenly, in order, so that with fewer
    blocks than ranks some chunks are empty.
    """
    starts = sorted({0, *boundaries, n})
    extents = list(itertools.pairwise(starts))
    blocks_before = [0]
    for start, stop in extents:
        blocks_before.append(blocks_before[-1] + -(-(stop - start) // block))
    total = blocks_before[-1]
    pieces: list[tuple[Piece, ...]] = []
    for c in range(size):
        first, last = total * c // size, total * (c + 1) // size
        chunk: list[Piece] = []
        for (start, stop), before, after in zip(extents, blocks_before, blocks_before[1:], strict=False):
            a, b = max(first, before), min(last, after)
            if a < b:
                chunk.append((start + (a - before) * block, min(stop, start + (b - before) * block)))
        pieces.append(tuple(chunk))
    owned: list[Piece] = []
    for chunk_pieces in pieces:
        begin = owned[-1][1] if owned else 0
        owned.append((begin, chunk_pieces[-1][1] if chunk_pieces else begin))
    return Layout(tuple(pieces), tuple(owned))
