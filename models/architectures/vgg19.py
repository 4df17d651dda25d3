"""VGG-19: 16 convolutions, 3 dense layers (Simonyan and Zisserman, ICLR 2015, configuration E)."""

from __future__ import annotations

from bitring.models.architecture import Architecture, LayerTable
from bitring.models.architectures.vgg16 import vgg


class VGG19(Architecture):
    """143,667,240 parameters, 19.6 G multiply-adds per sample."""

    def layers(self) -> list[LayerTable]:
        """See Architecture."""
        return vgg((2, 2, 4, 4, 4))
