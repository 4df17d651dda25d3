"""Layers between branches: they take several values, or a part of one. See ``bitring.models.graph``.

A layer of several inputs gets a tuple of arrays, and its way back returns a tuple of gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from bitring.models.layers import Array, Backward, Emit, Layer, Workspace


class Select(Layer):
    """Number ``index`` along the first axis after the samples': (N, B, ...) to (N, ...), a view."""

    returns_view = True

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, workspace: Workspace, parameters: Mapping[str, Array], x: Array) -> tuple[Array, Backward]:
        """See Layer."""
        shape = x.shape

        def backward(dy: Array, emit: Emit) -> Array:
            dx = workspace.empty(shape, dy.dtype)
            dx[...] = 0
            dx[:, self.index] = dy
            return dx

        return x[:, self.index], backward


class Concatenate(Layer):
    """Values side by side along the last axis: (N, ..., A) and (N, ..., B) to (N, ..., A + B)."""

    def forward(self, workspace: Workspace, parameters: Mapping[str, Array], x: Any) -> tuple[Array, Backward]:
        """See Layer; ``x`` is a tuple."""
        ends = [0]
        for each in x:
            ends.append(ends[-1] + each.shape[-1])
        parts = list(itertools.starmap(slice, itertools.pairwise(ends)))
        y = workspace.empty((*x[0].shape[:-1], ends[-1]), x[0].dtype)
        for each, part in zip(x, parts, strict=True):
            y[..., part] = each

        def backward(dy: Array, emit: Emit) -> Any:
            gradients = [workspace.empty((*dy.shape[:-1], part.stop - part.start), dy.dtype) for part in parts]
            for gradient, part in zip(gradients, parts, strict=True):
                gradient[...] = dy[..., part]
            return tuple(gradients)

        return y, backward


class Add(Layer):
    """The sum of values of one shape."""

    def forward(self, workspace: Workspace, parameters: Mapping[str, Array], x: Any) -> tuple[Array, Backward]:
        """See Layer; ``x`` is a tuple."""
        y = workspace.empty(x[0].shape, x[0].dtype)
        y[...] = x[0]
        for each in x[1:]:
            y += each
        count = len(x)

        def backward(dy: Array, emit: Emit) -> Any:
            copies = [workspace.empty(dy.shape, dy.dtype) for _ in range(count - 1)]
            for copy in copies:
                copy[...] = dy
            return (dy, *copies)

        return y, backward
