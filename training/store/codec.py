"""What of a store travels encoded: by which encoder, in which pieces, and the residuals of what a rank has sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitring.compression.encoder import Encoder, residual_dtype
from bitring.compression.factors import Factors
from bitring.training.store.layout import Layout
from bitring.training.store.packing import Form, Piece


class Codec:
    """The encoders of a layout's parameters, by name; those that are None, or too small, travel as they are."""

    def __init__(self, layout: Layout, encoders: Mapping[str, Encoder | None]) -> None:
        self._layout = layout
        self._encoders = {
            number: encoder
            for number, parameter in enumerate(layout.parameters)
            if (encoder := encoders.get(parameter.name)) is not None
            and parameter.rows * parameter.width >= encoder.block
        }
        self._of_parts: dict[tuple[int, int], Encoder] = {}

    @property
    def encodes(self) -> bool:
        """Whether anything travels encoded."""
        return bool(self._encoders)

    def __contains__(self, number: int) -> bool:
        return number in self._encoders

    def encoder(self, number: int, owner: int) -> Encoder | None:
        """What encodes the owner's rows of a parameter; None: they travel as they are."""
        if number not in self._encoders:
            return None
        found = self._of_parts.get((number, owner))
        if found is None:
            parameter = self._layout.parameters[number]
            part = parameter.part(owner)
            found = self._encoders[number].for_shape((part.stop - part.start, *parameter.row_shape))
            self._of_parts[number, owner] = found
        return found

    def encode(self, number: int, owner: int, values: Any, residual: Any, seed: int) -> Piece:
        """The piece of ``values``, 1-D, the owner's; what it leaves out is in ``residual`` then, 1-D."""
        encoder = self.encoder(number, owner)
        assert encoder is not None
        payload = np.empty(encoder.nbytes(values.size), np.uint8)
        used = encoder.encode(values, residual, payload, seed)
        return Piece(number, None, payload[:used], Form.ENCODED)

    def decode(self, piece: Piece, owner: int, out: Any, accumulate: bool = False) -> None:
        """Out = decoded, or out += decoded; ``out``: 1-D."""
        encoder = self.encoder(piece.parameter, owner)
        assert encoder is not None
        encoder.decode(np.array(piece.data), out, accumulate)

    def residuals(self) -> dict[int, Any]:
        """New ones, zeros, (rows, width), of what travels encoded."""
        parameters = ((number, self._layout.parameters[number]) for number in self._encoders)
        return {number: np.zeros((p.rows, p.width), residual_dtype(p.dtype)) for number, p in parameters}


class Pushes:
    """This rank's pushes, encoded, and the residuals; what a dropped one took from them goes back.

    The gradient of a dropped push is dropped with it, as where nothing is encoded: residuals are then as if the push
    had not been made. Were it kept, a rank that is always late would send the sum of all its old gradients at once when
    it is in time again (the parameters of a quadratic ended 0.3 from the minimum, and not 0.02).

    Parts of a push may be made ahead of the rest, and forgotten until it is ``complete``.
    """

    def __init__(self, codec: Codec, layout: Layout) -> None:
        self._codec, self._layout = codec, layout
        self.residuals = codec.residuals()
        # Owner and number of a push -> what it took from each parameter's residual there.
        self._taken: dict[tuple[int, int], list[tuple[int, Any]]] = {}
        self._before: dict[int, Any] = {}  # residuals, as they were before a push that is not complete

    def pieces(
        self, owner: int, gradients: Mapping[int, Any], number: int, keep: bool, ahead: bool = False
    ) -> list[Piece]:
        """The owner's parts of whole ``gradients``, (rows, width) or ``Factors`` of that, in push ``number``.

        ``keep``: until it is known whether they are dropped. ``ahead``: there are more to come for this push.
        """
        pieces: list[Piece] = []
        for parameter, g in gradients.items():
            part = self._layout.parameters[parameter].part(owner)
            if part.start == part.stop:
                continue
            if isinstance(g, Factors):
                factors = np.concatenate((g.u[:, part].reshape(-1), g.v.reshape(-1)))
                pieces.append(Piece(parameter, None, factors.view(np.uint8), Form.FACTORS))
            elif parameter in self._codec:
                residual = self.residuals[parameter]
                if ahead and parameter not in self._before:
                    self._before[parameter] = residual.copy()
                own = residual[part].reshape(-1)
                before = own.copy() if keep else None
                pieces.append(self._codec.encode(parameter, owner, g[part].reshape(-1), own, number))
                if before is not None:
                    before -= own
                    self._taken.setdefault((owner, number), []).append((parameter, before))
            else:
                pieces.append(Piece(parameter, None, g[part].reshape(-1).view(np.uint8)))
        return pieces

    def complete(self) -> None:
        """The push whose parts were made has been sent."""
        self._before = {}

    def forget(self, numbers: Mapping[int, int]) -> None:
        """There will be no push of these numbers, by owner: residuals are as before what was made of it ahead."""
        for parameter, residual in self._before.items():
            self.residuals[parameter][...] = residual
        self._before = {}
        for owner, number in numbers.items():
            self._taken.pop((owner, number), None)

    def take_back(self, owner: int, number: int) -> None:
        """A push was dropped there."""
        for parameter, taken in self._taken.pop((owner, number), ()):
            part = self._layout.parameters[parameter].part(owner)
            self.residuals[parameter][part] += taken.reshape(-1, self._layout.parameters[parameter].width)

    def settled(self, owner: int, number: int) -> None:
        """Nothing up to ``number`` comes back from there any more."""
        for key in [key for key in self._taken if key[0] == owner and key[1] <= number]:
            del self._taken[key]


MOST_EDITIONS = 16
"""Encoded changes of so many editions are kept for readers that are behind; who is further behind gets all values, as
does one whose changes would be more bytes."""


class Editions:
    """What readers of a shard know of it, where answers travel encoded: editions, each one's change encoded.

    All readers of one edition hold the same bits; the shard's values less those are the owner's residual.
    """

    def __init__(self, codec: Codec, owner: int, values: Mapping[int, Any]) -> None:
        self._codec, self._owner = codec, owner
        self.number = 0
        self._version = 0
        self._values = values
        self.known = {number: np.array(w) for number, w in values.items()}
        self._changes: dict[int, list[Piece]] = {}

    def restart(self, version: int) -> None:
        """Readers are given the shard's values as they are."""
        self.number += 1
        self._version = version
        self._changes.clear()
        for number, w in self._values.items():
            self.known[number][...] = w

    def answer(self, reader: int, version: int) -> tuple[list[Piece], bool]:
        """For a reader of the edition ``reader``: changes, or all values; whether they are changes."""
        if version != self._version:
            self._publish(version)
        wanted = range(reader + 1, self.number + 1)
        if all(edition in self._changes for edition in wanted):
            pieces = [piece for edition in wanted for piece in self._changes[edition]]
            if sum(piece.data.size for piece in pieces) <= sum(w.nbytes for w in self.known.values()):
                return pieces, True
        return [Piece(n, None, np.array(w).reshape(-1).view(np.uint8)) for n, w in self.known.items()], False

    def _publish(self, version: int) -> None:
        """The next edition."""
        self.number += 1
        self._version = version
        pieces: list[Piece] = []
        for number, w in self._values.items():
            known = self.known[number].reshape(-1)
            wide = residual_dtype(w.dtype)
            change = w.reshape(-1).astype(wide) - known.astype(wide)
            if number in self._codec:
                piece = self._codec.encode(number, self._owner, change, np.zeros(change.size, wide), version)
                self._codec.decode(piece, self._owner, known, accumulate=True)
            else:
                known[...] = w.reshape(-1)
                piece = Piece(number, None, known.copy().view(np.uint8))
            pieces.append(piece)
        self._changes[self.number] = pieces
        self._changes.pop(self.number - MOST_EDITIONS, None)
