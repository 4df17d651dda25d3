"""How a compressed buffer is cut: blocks that span no two parameters, chunks of whole blocks that ranks own, and
segments of chunks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
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
    def pieces(self) -> Iterator[Piece]:
        """Of all segments, in order."""
        return (piece for chunk in self.segments for segment in chunk for piece in segment)

    @property
    def encoders(self) -> dict[Encoder, None]:
        """Those of the pieces, in order, each once."""
        return dict.fromkeys(piece.encoder for piece in self.pieces)

    @property
    def expected_nbytes(self) -> float:
        """The payload bytes that the whole buffer may be expected to take."""
        return sum(map(_expected_nbytes, self.segments))

    def expected_nbytes_sent(self, rank: int) -> float:
        """The payload bytes that ``rank`` may be expected to send to others: all but its chunk, then its sum to all."""
        own = _expected_nbytes(self.segments[rank])
        return self.expected_nbytes - own + (len(self.segments) - 1) * own


def _expected_nbytes(chunk: Iterable[Segment]) -> float:
    return sum(encoder.expected_nbytes(b - a) for segment in chunk for a, b, encoder in segment)


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

    Or its values from ``first`` to before ``last`` alone, of which the result's indexes count from ``first``. Ranks own
    as many values as they can: parameters are cut at blocks, or rows, of the encoder, so that with fewer of them than
    ranks some chunks are empty. What a chunk has of each parameter is cut into blocks of the encoder for it, the last
    one shorter.
    """
    chunks = _dealt(_parts(encoder, shapes, first, last), size)
    owned: list[Extent] = []
    for chunk in chunks:
        begin = owned[-1][1] if owned else 0
        owned.append((begin, chunk[-1].stop if chunk else begin))
    longest = max(stop - start for start, stop in owned)
    length = segment_length(longest, size, encoder.block)
    encoders = iter(encoder.for_parts([part.shape for chunk in chunks for part in chunk]))
    pieces = [[Piece(part.start, part.stop, next(encoders)) for part in chunk] for chunk in chunks]
    return Layout(tuple(_segments(chunk, length) for chunk in pieces), tuple(owned))


class _Part(NamedTuple):
    """A parameter, or what a chunk has of one: values from ``start``, never cut inside a ``grain``."""

    start: int
    shape: tuple[int, ...]
    grain: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    @property
    def grains(self) -> int:
        return -(-math.prod(self.shape) // self.grain)

    def between(self, a: int, b: int) -> _Part:
        """The grains from number ``a`` to before number ``b``."""
        begin, end = (min(math.prod(self.shape), k * self.grain) for k in (a, b))
        rows = (b - a, *self.shape[1:])
        return _Part(self.start + begin, rows if math.prod(rows) == end - begin else (end - begin,), self.grain)


_LEAST_ROWS = 16
"""A rank owns so many rows of a matrix, or none: each panel has numbers of all columns."""


def _parts(encoder: Encoder, shapes: Sequence[tuple[int, ...]], first: int, last: int | None) -> list[_Part]:
    """The parameters, or what of them is between ``first`` and ``last``, where whole rows keep their columns."""
    parts: list[_Part] = []
    start = 0
    for shape in shapes:
        stop = start + math.prod(shape)
        begin, end = max(first, start), stop if last is None else min(last, stop)
        if begin < end:
            columns = math.prod(shape[1:])
            rows = -(-(begin - start) // columns), (end - start) // columns
            middle = (rows[1] - rows[0], *shape[1:])
            grain = encoder.grain(middle) if rows[0] < rows[1] else encoder.block
            if grain == columns:
                a, b = (start + row * columns for row in rows)
                wanted = [((a - begin,), encoder.block), (middle, grain), ((end - b,), encoder.block)]
            else:
                wanted = [((end - begin,), encoder.block)]
            for each, its_grain in wanted:
                if math.prod(each):
                    parts.append(_Part(parts[-1].stop if parts else 0, each, its_grain))
        start = stop
    return parts


def _dealt(parts: Sequence[_Part], size: int) -> list[list[_Part]]:
    """What each rank owns of the parts; a grain counts as much as a whole one."""
    weights = [part.grains * part.grain for part in parts]
    total = sum(weights)
    chunks: list[list[_Part]] = []
    for c in range(size):
        chunk: list[_Part] = []
        before = 0
        for part, weight in zip(parts, weights, strict=True):
            least = min(_LEAST_ROWS, total // size // part.grain) if len(part.shape) > 1 else 1
            a, b = (_nearest(part.grains, total * k, before * size, part.grain * size, least) for k in (c, c + 1))
            if a < b:
                chunk.append(part.between(a, b))
            before += weight
        chunks.append(chunk)
    return chunks


def _nearest(count: int, place: int, start: int, grain: int, least: int) -> int:
    """How many of ``count`` grains from ``start`` on are before ``place``, rounded; ``least`` or none on each side."""
    k = min(max(0, (2 * (place - start) + grain) // (2 * grain)), count)
    if 2 * least > count:
        return count if 2 * k > count else 0
    if k < least:
        return least if 2 * k > least else 0
    if count - k < least:
        return count if 2 * (count - k) < least else count - least
    return k


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
