"""Published networks as tables of layers: what each has to learn, and how much it computes. None can be trained here.

An architecture states the paper's layers in a few lines; shapes and multiply-adds follow. bitring's own models have
a table too, read from their layers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from bitring.models.layers import Conv, Dense, Flatten, MaxPool
from bitring.models.model import Model, models
from bitring.registry import Registry


@dataclass(frozen=True)
class LayerTable:
    """A layer's parameters by name, their shapes (outputs first), and what one sample makes it compute.

    ``kind``: ``"conv"``, ``"dense"``, ``"lstm"``, ``"embedding"`` or ``"norm"``. ``multiply_adds``: of one sample on
    its way forward. ``factors``: the pairs (u, v) with ∇W = Σ u·vᵀ that one sample gives for the layer's matrix; 0
    where the gradient is not such a sum of few.
    """

    name: str
    kind: str
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    multiply_adds: int
    factors: int = 0

    @property
    def values(self) -> int:
        """Number of values to learn."""
        return sum(math.prod(shape) for _, shape in self.parameters)


class Builder:
    """Lays layers one behind the other. ``shape`` (H, W, C) is what the last one gives, and may be set to go back."""

    def __init__(self, height: int, width: int, channels: int) -> None:
        self.shape = height, width, channels
        self.layers: list[LayerTable] = []

    def conv(
        self,
        name: str,
        filters: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        """A convolution; with ``groups``, each filter sees only its group's channels."""
        channels = self.shape[2]
        self._slide(kernel, stride, padding, filters)
        weight = (filters, kernel, kernel, channels // groups)
        parameters = [(f"{name}.weight", weight), (f"{name}.bias", (filters,))][: 1 + bias]
        computed = math.prod(weight) * self.shape[0] * self.shape[1]
        self.layers.append(LayerTable(name, "conv", tuple(parameters), computed))

    def norm(self, name: str) -> None:
        """A batch normalisation: a scale and a shift for each channel. Its few operations are not counted."""
        channels = self.shape[2]
        parameters = ((f"{name}.weight", (channels,)), (f"{name}.bias", (channels,)))
        self.layers.append(LayerTable(name, "norm", parameters, 0))

    def pool(self, kernel: int, stride: int, *, padding: int = 0, up: bool = False) -> None:
        """A pooling layer; ``up``: a last window that reaches beyond the edge counts."""
        self._slide(kernel, stride, padding, self.shape[2], up)

    def average(self) -> None:
        """The mean over all positions."""
        self.shape = 1, 1, self.shape[2]

    def dense(self, name: str, outputs: int) -> None:
        """A fully connected layer."""
        inputs = math.prod(self.shape)
        self.shape = 1, 1, outputs
        parameters = ((f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,)))
        self.layers.append(LayerTable(name, "dense", parameters, outputs * inputs, factors=1))

    def _slide(self, kernel: int, stride: int, padding: int, channels: int, up: bool = False) -> None:
        height, width = (
            (side + 2 * padding - kernel + (stride - 1 if up else 0)) // stride + 1 for side in self.shape[:2]
        )
        self.shape = height, width, channels


class Architecture(ABC):
    """A published network. A subclass in ``models/architectures/NAME.py`` is registered as ``NAME``."""

    @abstractmethod
    def layers(self) -> list[LayerTable]:
        """The layers, first to last."""


architectures: Registry[Architecture] = Registry("architecture", Architecture, "models/architectures")

OWN_INPUT, OWN_CLASSES = (28, 28), 10
"""Input and classes that bitring's own models are looked at with: Fashion-MNIST."""


def layer_tables() -> list[str]:
    """The names that ``layer_table`` knows."""
    return sorted({*architectures.names(), *models.names()})


def layer_table(name: str) -> list[LayerTable]:
    """The layers of a published network, or of one of bitring's own models on 28×28 images of 10 classes.

    Raises ValueError, listing the known names, for an unknown one.
    """
    if name in architectures.names():
        return architectures.get(name)().layers()
    if name in models.names():
        return layers_of(models.get(name)(OWN_INPUT, OWN_CLASSES))
    raise ValueError(f"unknown model {name!r}; known: {', '.join(layer_tables())}")


def layers_of(model: Model) -> list[LayerTable]:
    """The layers of a model that bitring can train. Raises TypeError for a layer with parameters of another kind."""
    sides = (*model.input_shape, 1)[:3] if len(model.input_shape) > 1 else (1, 1, *model.input_shape)
    build = Builder(*sides)
    for layer in model.layers():
        if isinstance(layer, Conv):
            filters = layer.shapes[layer.weight][0]
            build.conv(layer.weight.removesuffix(".weight"), filters, layer.kernel, padding=layer.padding)
        elif isinstance(layer, Dense):
            build.dense(layer.weight.removesuffix(".weight"), layer.shapes[layer.weight][0])
        elif isinstance(layer, MaxPool):
            build.pool(2, 2)
        elif isinstance(layer, Flatten):
            build.shape = 1, 1, math.prod(build.shape)
        elif layer.shapes:
            raise TypeError(f"layers_of: expected layers Conv and Dense, got {type(layer).__name__} with parameters")
    return build.layers
