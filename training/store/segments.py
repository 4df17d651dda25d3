"""An update that is large travels in segments, each of which its owner applies as it comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bitring.training.optimizer import Elementwise, Optimizer
from bitring.training.store.layout import Layout
from bitring.training.store.packing import Form, Piece
from bitring.training.store.table import Setup

SEGMENT_NBYTES = 4 << 20
"""Of so many bytes, or one row, if that is more. Each is a message, for which there is room when its head has come."""


def travels_in_segments(setup: Setup) -> bool:
    """Whether parts of an update may be applied before the rest has come.

    Not where updates are gathered or dropped, which a part cannot be alone; nor in a record, whose lines are updates;
    nor where a copy is to have all of an update or nothing; nor where the optimizer looks at whole parameters, or
    counts updates.
    """
    return (
        setup.terms.gather == 1
        and setup.terms.late == "keep"
        and not any(setup.journal)
        and not setup.copies
        and _by_values(setup.optimizer)
    )


def _by_values(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, Elementwise) and not optimizer.counters


def segments(pieces: Sequence[Piece], layout: Layout) -> Iterator[list[Piece]]:
    """The pieces of an update, in order, in at least one list, which may be empty.

    Plain values of all rows are cut between rows; what is encoded, factors, and rows that are named travel whole.
    """
    segment: list[Piece] = []
    nbytes = 0
    for piece in pieces:
        for part in _cut(piece, layout):
            if segment and nbytes + part.data.size > SEGMENT_NBYTES:
                yield segment
                segment, nbytes = [], 0
            segment.append(part)
            nbytes += part.data.size
    yield segment


def _cut(piece: Piece, layout: Layout) -> Iterator[Piece]:
    if piece.data.size <= SEGMENT_NBYTES or piece.rows is not None or piece.form != Form.VALUES:
        yield piece
        return
    parameter = layout.parameters[piece.parameter]
    row = parameter.width * parameter.dtype.itemsize
    step = max(1, SEGMENT_NBYTES // row) * row
    for at in range(0, piece.data.size, step):
        yield Piece(piece.parameter, None, piece.data[at : at + step], first=at // row)
