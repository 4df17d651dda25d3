"""Models that a user puts together: layers one after another, or a graph of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bitring.models import descriptions
from bitring.models.descriptions import Description, Named
from bitring.models.graph import INPUT, Node, layers_of
from bitring.models.layers import Array, Layer
from bitring.models.model import Model


class Graph(Model):
    """A classifier whose layers take each other's values by name.

    layers: name -> (description, inputs), each after those whose values it takes. ``inputs`` is the name of a value, or
    several in a tuple: other layers', or "input", which is what the model is given. The last layer gives the logits,
    ``classes`` values. One description with parameters at two places, or equal ones, are one layer, which both share::

        lstm = bitring.LSTM("lstm", 64)
        model = bitring.Graph({
            "a": (bitring.Select(0), "input"), "b": (bitring.Select(1), "input"),
            "code_a": (lstm, "a"), "code_b": (lstm, "b"),
            "both": (bitring.Concatenate(), ("code_a", "code_b")),
            "dense1": (bitring.Dense("dense1", 2), "both"),
        }, input_shape=(2, 140, 256), classes=2)

    The other arguments are Model's. Raises TypeError or ValueError, which name the layer, for what does not fit.
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[Description, str | tuple[str, ...]]],
        input_shape: tuple[int, ...],
        classes: int,
        *,
        dtype: Any = np.float32,
        seed: int = 0,
        xp: Any = np,
    ) -> None:
        kind = type(self).__name__
        self._described = {
            name: (description, (inputs,) if isinstance(inputs, str) else tuple(inputs))
            for name, (description, inputs) in layers.items()
        }
        for name, (description, inputs) in self._described.items():
            if not isinstance(description, Description):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    f"{kind}: layer {name!r} must be a layer such as bitring.Dense('dense1', 10); got {description!r}"
                )
            if name == INPUT:
                raise ValueError(f"{kind}: {INPUT!r} is what the model is given; name the layer otherwise")
            before = [INPUT, *self._described][: [*self._described].index(name) + 1]
            for each in inputs:
                if each not in before:
                    raise ValueError(f"{kind}: layer {name!r} takes {each!r}; before it there are {', '.join(before)}")
        if not self._described:
            raise ValueError(f"{kind}: layers must be one or more")
        super().__init__(input_shape, classes, dtype=dtype, seed=seed, xp=xp)

    @property
    def _is_image(self) -> bool:
        """Whether the input (H, W) is an image of one channel: a layer that takes (H, W, C) takes it."""
        wanting = (descriptions.Convolution, descriptions.MaxPool)
        takers = (description for description, inputs in self._described.values() if INPUT in inputs)
        return len(self.input_shape) == 2 and any(isinstance(each, wanting) for each in takers)

    def graph(self) -> list[Node]:
        """See Model."""
        kind = type(self).__name__
        shapes = {INPUT: (*self.input_shape, 1) if self._is_image else self.input_shape}
        learned = {INPUT: False}  # whether parameters stand behind a value, so that its gradient is wanted
        made: dict[str, tuple[Description, Layer, tuple[int, ...]]] = {}
        nodes: list[Node] = []

        def add(name: str, description: Description, inputs: tuple[str, ...]) -> None:
            of_inputs = [shapes[each] for each in inputs]
            try:
                layer, shape = description.build(of_inputs, any(learned[each] for each in inputs))
            except ValueError as error:
                raise ValueError(f"{kind}: layer {name!r}: {error}") from None
            if isinstance(description, Named):
                first = made.setdefault(description.name, (description, layer, shape))
                if first[0] != description or first[1].shapes != layer.shapes:
                    raise ValueError(
                        f"{kind}: layer {name!r}: another layer has the name {description.name!r}, and they are not "
                        f"the same: {first[0]}, {description}, of parameters {first[1].shapes}, {layer.shapes}"
                    )
                if getattr(layer, "input_gradient", False):
                    first[1].input_gradient = True  # type: ignore[attr-defined]  # some place of it needs one
                layer = first[1]
            shapes[name] = shape
            learned[name] = isinstance(description, Named) or any(learned[each] for each in inputs)
            nodes.append(Node(name, layer, inputs))

        for name, (description, inputs) in self._described.items():
            if isinstance(description, descriptions.Dense) and len(inputs) == 1 and len(shapes[inputs[0]]) > 1:
                add(f"{name}_flat", descriptions.Flatten(), inputs)
                inputs = (f"{name}_flat",)
            add(name, description, inputs)
        last = nodes[-1].name
        taken = {name for node in nodes for name in node.inputs}
        for node in nodes[:-1]:
            if node.name not in taken:
                raise ValueError(f"{kind}: no layer takes {node.name!r}, which is not the last one")
        if shapes[last] != (self.classes,):
            raise ValueError(
                f"{kind}: the last layer, {last!r}, must give {self.classes} values, one a class; "
                f"it gives {shapes[last]}"
            )
        return nodes

    def layers(self) -> list[Layer]:
        """See Model: each layer once."""
        return layers_of(self.nodes)

    def arrange(self, x: Array) -> Array:
        """See Model. As it is; an image of one channel as (N, H, W, 1)."""
        return x.reshape(*x.shape, 1) if self._is_image else x


class Sequence(Graph):
    """A classifier whose layers follow each other, such as ``[bitring.Dense("dense1", 100), bitring.ReLU(), ...]``.

    The last layer gives ``classes`` values. Images may be (H, W) or (H, W, C). The other arguments are Model's.
    """

    def __init__(
        self,
        layers: Iterable[Description],
        input_shape: tuple[int, ...],
        classes: int,
        *,
        dtype: Any = np.float32,
        seed: int = 0,
        xp: Any = np,
    ) -> None:
        described: dict[str, tuple[Description, str]] = {}
        before = INPUT
        for number, description in enumerate(layers, start=1):
            kind = type(description).__name__.lower()
            name = description.name if isinstance(description, Named) else f"{kind}{number}"
            if name in described:
                raise ValueError(f"Sequence: two layers have the name {name!r}; Graph shares one between branches")
            described[name] = description, before
            before = name
        super().__init__(described, input_shape, classes, dtype=dtype, seed=seed, xp=xp)
