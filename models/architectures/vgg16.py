"""VGG-16: 13 convolutions, 3 dense layers (Simonyan and Zisserman, ICLR 2015, configuration D)."""

from __future__ import annotations

from bitring.models.architecture import Architecture, Builder, LayerTable


class VGG16(Architecture):
    """138,357,544 parameters, 15.5 G multiply-adds per sample."""

    def layers(self) -> list[LayerTable]:
        """See Architecture."""
        return vgg((2, 2, 3, 3, 3))


def vgg(depths: tuple[int, ...]) -> list[LayerTable]:
    """Stages of so many 3×3 convolutions, each with a pool behind it, and the dense layers."""
    net = Builder(224, 224, 3)
    for stage, (depth, filters) in enumerate(zip(depths, (64, 128, 256, 512, 512), strict=True), start=1):
        for i in range(1, depth + 1):
            net.conv(f"conv{stage}_{i}", filters, 3, padding=1)
        net.pool(2, 2)
    for i, outputs in enumerate((4096, 4096, 1000), start=6):
        net.dense(f"fc{i}", outputs)
    return net.layers
