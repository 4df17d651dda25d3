"""A network with one narrow layer between two dense ones."""

from __future__ import annotations

from math import prod

from bitring.models.layers import Dense, Layer, ReLU
from bitring.models.model import Model


class Narrow(Model):
    """Two dense layers, with 16 values between them. Input of any shape."""

    def layers(self) -> list[Layer]:
        """See Model."""
        inputs = prod(self.input_shape)
        return [
            Dense("dense1", inputs, 16, input_gradient=False),
            ReLU(),
            Dense("dense2", 16, self.classes, input_gradient=True),
        ]
