"""Softmax regression."""

from __future__ import annotations

from math import prod

from bitring.models.layers import Dense, Layer
from bitring.models.model import Model


class Softmax(Model):
    """Softmax regression: one dense layer, a convex problem. Input of any shape."""

    def layers(self) -> list[Layer]:
        """See Model."""
        return [Dense("dense1", prod(self.input_shape), self.classes, input_gradient=False)]
