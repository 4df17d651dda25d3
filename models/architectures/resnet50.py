"""ResNet-50: 16 bottleneck blocks (He, Zhang, Ren and Sun, CVPR 2016)."""

from __future__ import annotations

from bitring.models.architecture import Architecture, Builder, LayerTable


class ResNet50(Architecture):
    """As in the paper, a stage's first 1×1 convolution having its stride: 25,557,032 parameters, 3.9 G multiply-adds.

    (Where the 3×3 has the stride instead, a later variant, it is 4.1 G.)
    """

    def layers(self) -> list[LayerTable]:
        """See Architecture."""
        net = Builder(224, 224, 3)
        _conv(net, "conv1", 64, 7, stride=2)
        net.pool(3, 2, padding=1)
        for stage, (depth, filters) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), start=2):
            for i in range(1, depth + 1):
                stride = 2 if i == 1 and stage > 2 else 1
                shape, name = net.shape, f"conv{stage}_{i}"
                if i == 1:
                    _conv(net, f"{name}.shortcut", 4 * filters, 1, stride)
                    net.shape = shape
                _conv(net, f"{name}.1", filters, 1, stride)
                _conv(net, f"{name}.2", filters, 3)
                _conv(net, f"{name}.3", 4 * filters, 1)
        net.average()
        net.dense("fc", 1000)
        return net.layers


def _conv(net: Builder, name: str, filters: int, kernel: int, stride: int = 1) -> None:
    net.conv(name, filters, kernel, stride=stride, padding=kernel // 2, bias=False)
    net.norm(f"{name}.norm")
