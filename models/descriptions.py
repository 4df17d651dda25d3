"""Layers as a user writes them, without sizes that follow from what comes before: ``bitring.Dense("dense1", 500)``.

A description is a value: it holds settings, and ``build`` makes the layer for the shapes of its inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from bitring.models import dropout, joins, layers, recurrent
from bitring.models.layers import Layer
from bitring.settings import Settings, setting

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Description(Settings, ABC):
    """Base of all. Shapes are those of one sample, without the batch axis."""

    @abstractmethod
    def build(self, shapes: Sequence[Shape], input_gradient: bool) -> tuple[Layer, Shape]:
        """The layer for inputs of these ``shapes``, and its output's. Raises ValueError for those it cannot take.

        ``input_gradient``: whether anything wants the gradient by the inputs.
        """

    def refused(self, shapes: Sequence[Shape], wanted: str) -> ValueError:
        """The error for shapes that it cannot take."""
        return ValueError(f"{self} takes {wanted}; got {' and '.join(map(str, shapes)) or 'nothing'}")

    def only(self, shapes: Sequence[Shape], dimensions: int | None, wanted: str) -> Shape:
        """The one shape, of so many dimensions; None: of any."""
        if len(shapes) != 1 or (dimensions is not None and len(shapes[0]) != dimensions):
            raise self.refused(shapes, wanted)
        return shapes[0]


@dataclass(frozen=True)
class Named(Description):
    """Base of those with parameters, whose names begin with ``name``."""

    name: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name or "." in self.name:
            raise ValueError(f"{type(self).__name__}: name must be without dots, and not empty; got {self.name!r}")


@dataclass(frozen=True)
class Dense(Named):
    """y = x Wᵀ + b, of ``outputs`` values. An input of several dimensions is flattened."""

    outputs: int = setting(10, least=1)

    def build(self, shapes: Sequence[Shape], input_gradient: bool) -> tuple[Layer, Shape]:
        """See Description."""
        (inputs,) = self.only(shapes, 1, "one flat value")
        return layers.Dense(self.name, inputs, self.outputs, input_gradient=input_gradient), (self.outputs,)


@dataclass(frozen=True)
class Convolution(Named):
    """``filters`` kernels of ``kernel``² pixels over (H, W, C), stride 1, with so many zeros around: ``padding``."""

    filters: int = setting(32, least=1)
    kernel: int = setting(5, least=1)
    padding: int = setting(0, least=0)

    def build(self, shapes: Sequence[Shape], input_gradient: bool) -> tuple[Layer, Shape]:
        """See Description."""
        wanted = f"one value (H, W, C), with H and W of at least {self.kernel - 2 * self.padding}"
        h, w, c = self.only(shapes, 3, wanted)
        more = 2 * self.padding - self.kernel + 1
        if min(h, w) + more < 1 or self.padding >= self.kernel:
            raise self.refused(shapes, wanted + " and padding below kernel")
        layer = layers.Conv(
            self.name, c, self.filters, kernel=self.kernel, padding=self.padding, input_gradient=input_gradient
        )
        return layer, (h + more, w + more, self.filters)


@dataclass(frozen=True)
class LSTM(Named):
    """The last output of a long short-term memory over (steps, inputs): ``units`` values."""

    units: int = setting(64, least=1)

    def build(self, shapes: Sequence[Shape], input_gradient: bool) -> tuple[Layer, Shape]:
        """See Description."""
        _, inputs = self.only(shapes, 2, "one value (steps, inputs)")
        return recurrent.LSTM(self.name, inputs, self.units, input_gradient=input_gradient), (self.units,)


@dataclass(frozen=True)
class ReLU(Description):
    """max(x, 0)."""

    def build(self, shapes: Sequence[Shape], input_gradient: bool) -> tuple[Layer, Shape]:
        """See Description."""
        return layers.ReLU(), self.only(shapes, None, "one value")


@dataclass(frozen=True)
class Dropout(Description):
    """In training each value becomes 0 with probability ``rate``, else x / (1 − rate)."""

    rate: float = setting(0.5, least=0, below=1)
    seed: int = setting(0, least=0)

    def build(self, shapes: Sequence[Shape], input_gradient: bool) -> tuple[Layer, Shape]:
        """See Description."""
        return dropout.Dropout(self.rate, self.seed), self.only(shapes, None, "one value")


@dataclass(frozen=True)
class MaxPool(Description):
    """The largest of each 2×2 square of (H, W, C)."""

    def build(self, shapes: Sequence[Shape], input_gradient: bool) -> tuple[Layer, Shape]:
        """See Description."""
        wanted = "one value (H, W, C), with H and W of at least 2"
        h, w, c = self.only(shapes, 3, wanted)
        if min(h, w) < 2:
            raise self.refused(shapes, wanted)
        return layers.MaxPool(), (h // 2, w // 2, c)


@dataclass(frozen=True)
class Flatten(Description):
    """All values of a sample in one row."""

    def build(self, shapes: Sequence[Shape], input_gradient: bool) -> tuple[Layer, Shape]:
        """See Description."""
        size = 1
        for side in self.only(shapes, None, "one value"):
            size *= side
        return layers.Flatten(), (size,)


@dataclass(frozen=True)
class Select(Description):
    """Number ``index`` along the first axis: one of several inputs that were given as one array."""

    index: int = setting(0, least=0)

    def build(self, shapes: Sequence[Shape], input_gradient: bool) -> tuple[Layer, Shape]:
        """See Description."""
        wanted = f"one value of at least two dimensions, the first above {self.index}"
        shape = self.only(shapes, None, wanted)
        if len(shape) < 2 or shape[0] <= self.index:
            raise self.refused(shapes, wanted)
        return joins.Select(self.index), shape[1:]


@dataclass(frozen=True)
class Concatenate(Description):
    """Values side by side along the last axis."""

    def build(self, shapes: Sequence[Shape], input_gradient: bool) -> tuple[Layer, Shape]:
        """See Description."""
        if len(shapes) < 2 or len({shape[:-1] for shape in shapes}) > 1:
            raise self.refused(shapes, "two values or more that are equal but for their last axes")
        return joins.Concatenate(), (*shapes[0][:-1], sum(shape[-1] for shape in shapes))


@dataclass(frozen=True)
class Add(Description):
    """The sum of values of one shape."""

    def build(self, shapes: Sequence[Shape], input_gradient: bool) -> tuple[Layer, Shape]:
        """See Description."""
        if len(shapes) < 2 or len(set(shapes)) > 1:
            raise self.refused(shapes, "two values or more of one shape")
        return joins.Add(), shapes[0]
