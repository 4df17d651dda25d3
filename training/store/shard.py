"""A shard: an owner's rows of the parameters, the optimizer's slots for them, and how updates are applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bitring.compression.factors import Factors
from bitring.training.optimizer import Optimizer
from bitring.training.store.layout import Layout, Parameter, by_rows
from bitring.training.store.packing import Form, Piece, bytes_of

Decode = Callable[[Piece, Any], None]
"""Puts what a piece holds, encoded, into an array of as many values."""


class Shard:
    """Of ``values`` (name -> whole array, C-contiguous) what ``owner`` has, in copies of its own."""

    def __init__(self, layout: Layout, owner: int, values: Mapping[str, Any], optimizer: Optimizer) -> None:
        self._layout = layout
        self._owner = owner
        self._parts = {number: (parameter, part) for number, parameter, part in layout.of(owner)}
        self.values = {
            number: np.array(by_rows(values[parameter.name], parameter)[part].reshape(_shape(layout, parameter, part)))
            for number, (parameter, part) in self._parts.items()
        }
        self.slots: dict[str, dict[int, Any]] = {
            slot: {number: np.zeros_like(w) for number, w in self.values.items()} for slot in optimizer.slots
        }
        self.counters: dict[str, dict[int, Any]] = {
            counter: {number: np.zeros((), np.int64) for number in self.values} for counter in optimizer.counters
        }

    def gradient(self, piece: Piece, decode: Decode) -> Any:
        """The values of a piece, like those it is for; a view where it can be."""
        w = self.values[piece.parameter]
        if piece.form == Form.ENCODED:
            decoded = np.empty_like(w)
            decode(piece, decoded.reshape(-1))
            return decoded
        if piece.form == Form.FACTORS:
            values = piece.data.view(w.dtype)
            samples = values.size // sum(w.shape)
            u, v = values[: samples * len(w)], values[samples * len(w) :]
            return Factors(u.reshape(samples, len(w)), v.reshape(samples, w.shape[1])).product()
        values = piece.data.view(w.dtype)
        if piece.rows is None and piece.first is None:
            return values.reshape(w.shape)
        return values.reshape(-1 if piece.rows is None else len(piece.rows), *w.shape[1:])

    def apply(
        self, updates: Sequence[Sequence[Piece]], scales: Sequence[float], optimizer: Optimizer, decode: Decode
    ) -> None:
        """Let the optimizer see the sum of ``updates``, each times its scale, added in this order. In place."""
        if len(updates) == 1:
            for piece in updates[0]:
                g = _scaled(self.gradient(piece, decode), scales[0])
                rows = piece.rows if piece.first is None else slice(piece.first, piece.first + len(g))
                self._update(piece.parameter, rows, g, optimizer)
            return
        sums: dict[int, Any] = {}
        for pieces, scale in zip(updates, scales, strict=True):
            for piece in pieces:
                g = _scaled(self.gradient(piece, decode), scale)
                total = sums.get(piece.parameter)
                if piece.rows is not None:
                    if total is None:
                        total = sums[piece.parameter] = np.zeros_like(self.values[piece.parameter])
                    total[piece.rows] += g
                elif total is None:
                    sums[piece.parameter] = np.array(g)
                else:
                    total += g
        for number, total in sums.items():
            self._update(number, None, total, optimizer)

    def _update(self, number: int, rows: Any, g: Any, optimizer: Optimizer) -> None:
        w, name = self.values[number], self._parts[number][0].name
        slots = {slot: each[number] for slot, each in self.slots.items()}
        counted = {counter: {name: each[number]} for counter, each in self.counters.items()}
        with np.errstate(all="ignore"):  # numbers that overflow are found in the next gradients
            if rows is None:
                optimizer.update({name: w}, {name: g}, {slot: {name: s} for slot, s in slots.items()} | counted)
                return
            some, held = w[rows], {slot: {name: s[rows]} for slot, s in slots.items()}
            optimizer.update({name: some}, {name: g}, held | counted)
            if isinstance(rows, slice):  # they are views
                return
            w[rows] = some
            for slot, s in slots.items():
                s[rows] = held[slot][name]

    def read(self, wanted: Sequence[Piece] | None) -> list[Piece]:
        """Copies of what is wanted; of everything for None."""
        if wanted is None:
            return [Piece(number, None, bytes_of(w)) for number, w in self.values.items()]
        return [
            Piece(p.parameter, p.rows, bytes_of(self.values[p.parameter] if p.rows is None else self._rows(p)))
            for p in wanted
        ]

    def _rows(self, piece: Piece) -> Any:
        return np.ascontiguousarray(self.values[piece.parameter][piece.rows])

    def kept(self) -> list[Piece]:
        """The optimizer's slots and counters, in place; see ``joined_slots``."""
        return [
            Piece(number, None, bytes_of(x))
            for each in (*self.slots.values(), *self.counters.values())
            for number, x in each.items()
        ]

    def load(self, values: Mapping[str, Any], slots: Mapping[str, Mapping[str, Any]]) -> None:
        """Take these values and slots, given whole, for the present ones."""
        for number, (parameter, part) in self._parts.items():
            for whole, mine in [
                (values, self.values[number]),
                *((slots[slot], each[number]) for slot, each in self.slots.items()),
            ]:
                given = by_rows(np.ascontiguousarray(whole[parameter.name]), parameter)[part]
                mine[...] = given.reshape(mine.shape)
            for counter, each in self.counters.items():
                each[number][...] = slots[counter][parameter.name]


def joined_slots(
    layout: Layout, slots: Sequence[str], counters: Sequence[str], parts: Mapping[int, Sequence[Piece]]
) -> dict[str, dict[str, Any]]:
    """Slot or counter -> name -> whole array, of what each owner has ``kept``."""
    found = {slot: layout.empty() for slot in slots}
    counts = {counter: {name: np.zeros((), np.int64) for name in layout.numbers} for counter in counters}
    for owner, kept in parts.items():
        pieces = iter(kept)
        for each in found.values():
            for _, parameter, part in layout.of(owner):
                place = by_rows(each[parameter.name], parameter)[part].reshape(-1)
                place[...] = next(pieces).data.view(parameter.dtype)
        for each in counts.values():
            for _, parameter, _ in layout.of(owner):
                count = each[parameter.name]
                count[...] = max(int(count), int(next(pieces).data.view(np.int64)[0]))
    return found | counts


def _shape(layout: Layout, parameter: Parameter, part: slice) -> tuple[int, ...]:
    return parameter.shape if layout.whole else (part.stop - part.start, *parameter.row_shape)


def _scaled(g: Any, scale: float) -> Any:
    if scale == 1:
        return g
    factor = np.float32(scale) if g.dtype.itemsize == 2 else scale
    return np.multiply(g, factor).astype(g.dtype, copy=False)
