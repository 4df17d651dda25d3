"""AlexNet: 5 convolutions, 3 dense layers (Krizhevsky, Sutskever and Hinton, NIPS 2012)."""

from __future__ import annotations

from bitring.models.architecture import Architecture, Builder, LayerTable


class AlexNet(Architecture):
    """As in the paper, where conv2, conv4 and conv5 are in two groups: 60,965,224 parameters, 0.72 G multiply-adds."""

    def layers(self) -> list[LayerTable]:
        """See Architecture."""
        net = Builder(227, 227, 3)
        net.conv("conv1", 96, 11, stride=4)
        net.pool(3, 2)
        net.conv("conv2", 256, 5, padding=2, groups=2)
        net.pool(3, 2)
        net.conv("conv3", 384, 3, padding=1)
        net.conv("conv4", 384, 3, padding=1, groups=2)
        net.conv("conv5", 256, 3, padding=1, groups=2)
        net.pool(3, 2)
        for i, outputs in enumerate((4096, 4096, 1000), start=6):
            net.dense(f"fc{i}", outputs)
        return net.layers
