"""A network as a graph: nodes that each apply a layer to the values of others. One pass through it, and back.

A layer may stand at several nodes, which then share its parameters: their gradients add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bitring.models.layers import Array, Backward, Emit, Layer, Workspace

INPUT = "input"
"""The name of what the model is given."""


class Node(NamedTuple):
    """A layer, and the names of the values that it is applied to: other nodes', or ``INPUT``."""

    name: str
    layer: Layer
    inputs: tuple[str, ...]


def chain(layers: Sequence[Layer]) -> list[Node]:
    """Nodes of layers that follow each other. One with parameters has the name that these begin with."""
    nodes: list[Node] = []
    before = INPUT
    for number, layer in enumerate(layers, start=1):
        name = next(iter(layer.shapes), f"{type(layer).__name__.lower()}{number}").partition(".")[0]
        nodes.append(Node(name, layer, (before,)))
        before = name
    return nodes


def layers_of(nodes: Sequence[Node]) -> list[Layer]:
    """The layers, each once, in the order in which they are met."""
    return list({id(node.layer): node.layer for node in nodes}.values())


def kept_values(nodes: Sequence[Node]) -> set[str]:
    """Names of values that no layer may overwrite: the input, those that several nodes take, and views of these."""
    takers = Counter(name for node in nodes for name in node.inputs)
    kept = {INPUT, *(name for name, count in takers.items() if count > 1)}
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        if node.layer.returns_view and kept.intersection(node.inputs):
            kept.add(node.name)
    for node in reversed(nodes):  # a view that several take is memory of what it is a view of
        if node.layer.returns_view and node.name in kept:
            kept.update(name for name in node.inputs if name in by_name)
    return kept


def apply(
    node: Node, kept: set[str], workspace: Workspace, parameters: Mapping[str, Array], x: Sequence[Array]
) -> tuple[Array, Backward]:
    """The node's output from its inputs ``x``, and the way back; values that are ``kept`` stay as they are."""
    if node.layer.overwrites_input and node.inputs[0] in kept:
        copy = workspace.empty(x[0].shape, x[0].dtype)
        copy[...] = x[0]
        x = [copy]
    workspace.node = node.name
    return node.layer.forward(workspace, parameters, x[0] if len(x) == 1 else tuple(x))


class Gradients:
    """The gradients of values on the way back, each summed over the nodes that took the value."""

    def __init__(self) -> None:
        self._sums: dict[Any, Array] = {}

    def add(self, value: object, gradient: Array) -> None:
        """Take a node's part."""
        before = self._sums.get(value)
        self._sums[value] = gradient if before is None else before + gradient

    def take(self, value: object) -> Array | None:
        """The sum; None where no node has given any."""
        return self._sums.pop(value, None)


class Emitter:
    """Hands out each parameter's gradient when every node of its layer has added its own. One use is one pass."""

    def __init__(self, nodes: Sequence[Node], emit: Emit) -> None:
        self.uses = Counter(name for node in nodes for name in node.layer.shapes)
        self._left = dict(self.uses)
        self._sums: dict[str, Array] = {}
        self._emit = emit

    def __call__(self, name: str, gradient: Array) -> None:
        """Take a node's gradient of the parameter ``name``."""
        if name in self._sums:
            self._sums[name] += gradient
        else:
            self._sums[name] = gradient
        self._left[name] -= 1
        if not self._left[name]:
            self._emit(name, self._sums.pop(name))


def forward(
    nodes: Sequence[Node], workspace: Workspace, parameters: Mapping[str, Array], x: Array
) -> tuple[Array, Callable[[Array, Emit], None]]:
    """The last node's value for the input ``x``, and the way back, which hands out the parameters' gradients."""
    kept = kept_values(nodes)
    values: dict[str, Array] = {INPUT: x}
    backwards: list[Backward] = []
    for node in nodes:
        values[node.name], backward = apply(node, kept, workspace, parameters, [values[name] for name in node.inputs])
        backwards.append(backward)

    def back(dy: Array, emit: Emit) -> None:
        emitter, gradients, make_product = Emitter(nodes, emit), Gradients(), workspace.make_product
        gradients.add(nodes[-1].name, dy)
        for node, backward in zip(reversed(nodes), reversed(backwards), strict=True):
            gradient = gradients.take(node.name)
            if gradient is None:
                continue
            shared = any(emitter.uses[name] > 1 for name in node.layer.shapes)
            workspace.make_product = None if shared else make_product
            dx = backward(gradient, emitter)
            if dx is not None:
                for name, each in zip(node.inputs, dx if len(node.inputs) > 1 else (dx,), strict=True):
                    if name != INPUT:
                        gradients.add(name, each)

    return values[nodes[-1].name], back


def value_shapes(
    nodes: Sequence[Node], parameters: Mapping[str, Array], x: Array, xp: Any
) -> dict[str, tuple[int, ...]]:
    """The shape of each node's value, and of the input, without the samples' axis: seen in a pass of ``x``."""
    workspace, kept = Workspace(xp), kept_values(nodes)
    values: dict[str, Array] = {INPUT: x}
    for node in nodes:
        values[node.name], _ = apply(node, kept, workspace, parameters, [values[name] for name in node.inputs])
    return {name: tuple(value.shape[1:]) for name, value in values.items()}
