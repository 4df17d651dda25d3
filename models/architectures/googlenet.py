"""GoogLeNet: 22 layers deep, nine inception modules (Szegedy et al., CVPR 2015)."""

from __future__ import annotations

from bitring.models.architecture import Architecture, Builder, LayerTable

# The paper's table 1: filters of 1×1, 3×3 reduce, 3×3, 5×5 reduce, 5×5, pool projection.
MODULES = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


class GoogLeNet(Architecture):
    """Without the auxiliary classifiers: 6,998,552 parameters, 1.6 G multiply-adds per sample."""

    def layers(self) -> list[LayerTable]:
        """See Architecture."""
        net = Builder(224, 224, 3)
        net.conv("conv1", 64, 7, stride=2, padding=3)
        net.pool(3, 2, up=True)
        net.conv("conv2_reduce", 64, 1)
        net.conv("conv2", 192, 3, padding=1)
        for name, filters in MODULES.items():
            if name in ("3a", "4a", "5a"):
                net.pool(3, 2, up=True)
            _inception(net, name, *filters)
        net.average()
        net.dense("fc", 1000)
        return net.layers


def _inception(net: Builder, name: str, one: int, reduce3: int, three: int, reduce5: int, five: int, pool: int) -> None:
    height, width, _ = shape = net.shape
    net.conv(f"{name}.1x1", one, 1)
    for kernel, reduce, filters in ((3, reduce3, three), (5, reduce5, five)):
        net.shape = shape
        net.conv(f"{name}.{kernel}x{kernel}_reduce", reduce, 1)
        net.conv(f"{name}.{kernel}x{kernel}", filters, kernel, padding=kernel // 2)
    net.shape = shape
    net.conv(f"{name}.pool", pool, 1)
    net.shape = height, width, one + three + five + pool
