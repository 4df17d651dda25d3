"""A multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from bitring.models.layers import Dense, Layer, ReLU
from bitring.models.model import Model


class MLP(Model):
    """Dense layers with ReLU between them. Input of any shape.

    hidden: the sizes of the layers before the last; the other arguments are Model's.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        hidden: Sequence[int] = (512, 256),
        *,
        dtype: Any = np.float32,
        seed: int = 0,
        xp: Any = np,
    ) -> None:
        self.hidden = tuple(int(size) for size in hidden)
        if any(size < 1 for size in self.hidden):
            raise ValueError(f"MLP: hidden must be positive sizes, got {hidden!r}")
        super().__init__(input_shape, classes, dtype=dtype, seed=seed, xp=xp)

    def layers(self) -> list[Layer]:
        """See Model."""
        sizes = [prod(self.input_shape), *self.hidden, self.classes]
        layers: list[Layer] = []
        for i, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
            if i > 1:
                layers.append(ReLU())
            layers.append(Dense(f"dense{i}", inputs, outputs, input_gradient=i > 1))
        return layers
