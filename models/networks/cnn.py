"""A small convolutional network."""

from __future__ import annotations

from bitring.models.layers import Array, Conv, Dense, Flatten, Layer, MaxPool, ReLU
from bitring.models.model import Model


class CNN(Model):
    """conv 5×5×32, ReLU, max-pool 2, conv 5×5×64, ReLU, max-pool 2, dense 1024, ReLU, dense.

    Images are (H, W) or (H, W, C), at least 4×4. Convolutions are unpadded from 28×28 on; smaller images, such as the
    8×8 digits, keep their size ("same" padding). Raises ValueError for other input shapes.
    """

    UNPADDED_FROM = 28

    def layers(self) -> list[Layer]:
        """See Model."""
        if len(self.input_shape) not in (2, 3) or min(self.input_shape[:2]) < 4:
            raise ValueError(
                f"CNN: input_shape must be (H, W) or (H, W, C) with H and W from 4 on, got {self.input_shape}"
            )
        padding = 0 if min(self.input_shape[:2]) >= self.UNPADDED_FROM else 2
        height, width = (((side - 4 + 2 * padding) // 2 - 4 + 2 * padding) // 2 for side in self.input_shape[:2])
        channels = self.input_shape[2] if len(self.input_shape) == 3 else 1
        # The pool stands before the ReLU: the two commute, and so the ReLU has a quarter of the values to do.
        return [
            Conv("conv1", channels, 32, padding=padding, input_gradient=False),
            MaxPool(),
            ReLU(),
            Conv("conv2", 32, 64, padding=padding),
            MaxPool(),
            ReLU(),
            Flatten(),
            Dense("dense1", height * width * 64, 1024),
            ReLU(),
            Dense("dense2", 1024, self.classes),
        ]

    def arrange(self, x: Array) -> Array:
        """See Model. (N, H, W, C)."""
        return x.reshape(*x.shape[:3], -1)
