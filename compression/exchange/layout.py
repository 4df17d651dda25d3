"""How a compressed buffer is cut: blocks that span no two parameters, chunks of whole blocks that ranks own, and
segments of chunks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bitring.compression.encoder import Encoder


class Piece(NamedTuple):
    """Values from ``start`` to before ``stop``: whole blocks of one parameter, encoded in one call by ``encoder``."""

    start: int
    stop: int
    encoder: Encoder


Segment = tuple[Piece, ...]
"""What one message carries."""

Extent = tuple[int, int]
"""Values from the first index to before the second."""


@dataclass(frozen=True)
class Layout:
    """``segments[c]`` make up the chunk that rank c owns: the values from ``owned[c][0]`` to before ``owned[c][1]``."""

    segments: tuple[tuple[Segment, ...], ...]
    owned: tuple[Extent, ...]

    @property
    def encoders(self) -> dict[Encoder, None]:
        """Those of the pieces, in order, each once."""
        return dict.fromkeys(piece.encoder for chunk in self.segments for segment in chunk for piece in segment)

    def expected_nbytes_sent(self, rank: int) -> float:
        """The payload bytes that ``rank`` may be expected to send to others: all but its chunk, then its sum to all."""
        chunks = [
            sum(encoder.expected_nbytes(b - a) for segment in chunk for a, b, encoder in segment)
            for chunk in self.segments
        ]
        return sum(chunks) - chunks[rank] + (len(chunks) - 1) * chunks[rank]


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


def lay_out(
    encoder: Encoder, shapes: Sequence[tuple[int, ...]], size: int, first: int = 0, last: int | None = None
) -> Layout:
    """Cut a buffer of parameters, of these ``shapes`` one behind the other, among ``size`` ranks.

    Or its values from ``first`` to before ``last`` alone, of which the result's indexes count from ``first``. Each
    parameter is cut into blocks of the encoder of its shape, the last one shorter. The blocks are dealt out evenly, in
    order, so that with fewer blocks than ranks some chunks are empty: one goes to the rank to whose part of the buffer
    its first value belongs, where a block of the encoder itself, or a part of one, counts one.
    """
    parts = _parts(encoder, shapes, size, first, last)
    chunks = _dealt(parts, encoder.block, size)
    owned: list[Extent] = []
    for chunk in chunks:
        begin = owned[-1][1] if owned else 0
        owned.append((begin, chunk[-1].stop if chunk else begin))
    longest = max(stop - start for start, stop in owned)
    length = segment_length(longest, size, encoder.block)
    return Layout(tuple(_segments(chunk, length) for chunk in chunks), tuple(owned))


def _parts(encoder: Encoder, shapes: Sequence[tuple[int, ...]], size: int, first: int, last: int | None) -> list[Piece]:
    """The parameters, or what of them is between ``first`` and ``last``, with the encoders of their shapes.

    Of a parameter that is cut there, whole rows keep its encoder, and what is left of rows is flat.
    """
    parts: list[Piece] = []
    start = 0
    for shape in shapes:
        stop = start + math.prod(shape)
        begin, end = max(first, start), stop if last is None else min(last, stop)
        if begin < end:
            columns = math.prod(shape[1:])
            rows = -(-(begin - start) // columns), (end - start) // columns
            shaped = encoder.for_shape((rows[1] - rows[0], *shape[1:]), size) if rows[0] < rows[1] else encoder
            places = [begin, end]
            if shaped != encoder:
                places[1:1] = [start + row * columns for row in rows]
            for (a, b), each in zip(itertools.pairwise(places), (encoder, shaped, encoder), strict=False):
                if a < b:
                    parts.append(Piece(a - first, b - first, each))
        start = stop
    return parts


def _dealt(parts: Sequence[Piece], unit: int, size: int) -> list[list[Piece]]:
    """The pieces of each rank's chunk. A block counts as many units as it has, or begins."""
    weights = [-(-min(part.encoder.block, part.stop - part.start) // unit) for part in parts]
    counts = [-(-(part.stop - part.start) // part.encoder.block) for part in parts]
    total = sum(count * weight for count, weight in zip(counts, weights, strict=True))
    chunks: list[list[Piece]] = []
    for c in range(size):
        first, last = total * c // size, total * (c + 1) // size
        chunk: list[Piece] = []
        before = 0
        for (start, stop, encoder), count, weight in zip(parts, counts, weights, strict=True):
            a, b = (min(max(0, -(-(x - before) // weight)), count) for x in (first, last))
            if a < b:
                chunk.append(Piece(start + a * encoder.block, min(stop, start + b * encoder.block), encoder))
            before += count * weight
        chunks.append(chunk)
    return chunks


def _segments(chunk: Sequence[Piece], length: int) -> tuple[Segment, ...]:
    """A chunk as messages of about ``length`` values."""
    segments: list[list[Piece]] = []
    room = 0
    for start, stop, encoder in chunk:
        block = encoder.block
        while start < stop:
            if room < block:
                segments.append([])
                room = max(length, block)
            end = min(stop, start + room // block * block)
            segments[-1].append(Piece(start, end, encoder))
            room -= end - start
            start = end
    return tuple(map(tuple, segments))
