"""What an update or an answer is made of, in the bytes of one message."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_FIELDS = 4  # of each piece, int64: parameter, rows (-1: all that the shard has; -2 - first: a run), bytes, form


class Form(enum.IntEnum):
    """What the bytes of a piece are."""

    VALUES = 0  # one after the other
    ENCODED = 1  # an encoder's payload
    FACTORS = 2  # u (K, rows), then v (K, width), whose product uᵀ·v the values are


class Piece(NamedTuple):
    """Values of one parameter that one shard has: all of its rows, or ``rows``, 1-D int64, counted in the shard.

    ``data``: bytes. ``first``: where a run of rows begins, as many as there are bytes for; ``rows`` is None then.
    """

    parameter: int
    rows: Any
    data: Any
    form: Form = Form.VALUES
    first: int | None = None


def bytes_of(values: Any) -> Any:
    """The bytes of a C-contiguous array, in place."""
    return values.reshape(-1).view(np.uint8)


def pack(pieces: Sequence[Piece]) -> Any:
    """A new uint8 array with all of them."""
    table = np.array([[p.parameter, _rows(p), p.data.size, p.form] for p in pieces], np.int64)
    parts = [np.array([len(pieces)], np.int64).view(np.uint8), table.reshape(-1).view(np.uint8)]
    for piece in pieces:
        if piece.rows is not None:
            parts.append(bytes_of(piece.rows))
        parts.append(piece.data)
        if piece.data.size % 8:
            parts.append(np.zeros(-piece.data.size % 8, np.uint8))
    return np.concatenate(parts)


def _rows(piece: Piece) -> int:
    """What stands for them in a message."""
    if piece.rows is not None:
        return len(piece.rows)
    return -1 if piece.first is None else -2 - piece.first


def unpack(payload: Any) -> list[Piece]:
    """The pieces, as views of ``payload``."""
    count = int(payload[:8].view(np.int64)[0])
    at = 8 + 8 * _FIELDS * count
    pieces: list[Piece] = []
    for parameter, n, nbytes, form in payload[8:at].view(np.int64).reshape(count, _FIELDS).tolist():
        rows = None
        if n >= 0:
            rows = payload[at : at + 8 * n].view(np.int64)
            at += 8 * n
        first = -2 - n if n < -1 else None
        pieces.append(Piece(parameter, rows, payload[at : at + nbytes], Form(form), first))
        at += nbytes + -nbytes % 8
    return pieces
