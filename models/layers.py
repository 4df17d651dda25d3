"""Layers with gradients, on NumPy and CuPy alike.

A layer holds shapes and nothing else. ``forward`` returns its output and a function that carries the gradient back.
Parameters are read from the model's dictionary in every call: an optimizer updates those arrays in place.

A weight's first axis counts the outputs, so that what one output's values are made with lies together: the column of
the weight matrix that 1-bit SGD quantizes as one (Seide et al., 2014).

Shape letters: N samples, H rows, W columns, C channels, K kernel side, F filters.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray

Emit = Callable[[str, Array], None]
"""Takes a parameter's name and its gradient, as soon as that is complete. The array is newly made, for the taker."""

Backward = Callable[[Array, Emit], Array]
"""Takes the loss's gradient by the output, which it may overwrite, and returns that by the input (None from a layer
made with ``input_gradient=False``)."""


class Draw(NamedTuple):
    """What is drawn by in a pass: the ``step``'s number, the number in the batch of the array's ``first`` sample.

    Of an array that is cut along its last axis: ``column``, the first of its values there, of ``width`` of all; 0: the
    axis is whole.
    """

    step: int
    first: int = 0
    column: int = 0
    width: int = 0


class Workspace:
    """Memory for what lives during one pass; the next pass gets the same memory again.

    Large arrays made anew come as fresh pages from the system, which costs a sixth of the CNN's time.
    ``make_product``: what a dense weight's gradient dyᵀ·x is made by in this pass; None for the product itself.
    ``node``: the name of the node that is applied; ``draw``: what it draws by, None where nothing is drawn.
    """

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.make_product: Callable[[Array, Array], Any] | None = None
        self.node = ""
        self.draw: Draw | None = None
        self._buffers: list[Array] = []
        self._taken = 0

    def restart(self) -> None:
        """Begin a pass: arrays handed out before will be overwritten."""
        self._taken = 0

    def product(self, dy: Array, x: Array) -> Any:
        """The gradient dyᵀ·x, newly made, as it is wanted in this pass."""
        return dy.T @ x if self.make_product is None else self.make_product(dy, x)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An uninitialised, contiguous array, valid until ``restart``."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if self._taken == len(self._buffers):
            self._buffers.append(None)
        buffer = self._buffers[self._taken]
        if buffer is None or buffer.size < nbytes:
            buffer = self._buffers[self._taken] = self.xp.empty(nbytes, np.uint8)
        self._taken += 1
        return buffer[:nbytes].view(dtype).reshape(shape)


class Layer(ABC):
    """One step of a network. ``shapes`` are those of its parameters by name, the weight before the bias."""

    overwrites_input = False
    """Whether the output is in the input's memory."""

    returns_view = False
    """Whether the output is a view of the input."""

    mixes_samples = False
    """Whether a sample's output depends on the others of its batch, as batch normalization's does."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.shapes = dict(shapes or {})

    @abstractmethod
    def forward(self, workspace: Workspace, parameters: Mapping[str, Array], x: Array) -> tuple[Array, Backward]:
        """The output for ``x``, in ``workspace``'s memory, and the way back."""


class Dense(Layer):
    """y = x Wᵀ + b: (N, inputs) to (N, outputs), with W (outputs, inputs)."""

    def __init__(self, name: str, inputs: int, outputs: int, *, input_gradient: bool = True) -> None:
        self.weight, self.bias = f"{name}.weight", f"{name}.bias"
        super().__init__({self.weight: (outputs, inputs), self.bias: (outputs,)})
        self.input_gradient = input_gradient

    def forward(self, workspace: Workspace, parameters: Mapping[str, Array], x: Array) -> tuple[Array, Backward]:
        """See Layer. Keeps ``x``."""
        xp, weight = workspace.xp, parameters[self.weight]
        y = xp.matmul(x, weight.T, out=workspace.empty((len(x), len(weight)), x.dtype))
        y += parameters[self.bias]

        def backward(dy: Array, emit: Emit) -> Array:
            emit(self.bias, dy.sum(axis=0))
            emit(self.weight, workspace.product(dy, x))
            if not self.input_gradient:
                return None
            return xp.matmul(dy, weight, out=workspace.empty(x.shape, x.dtype))

        return y, backward


class Conv(Layer):
    """Convolution with K×K kernels, stride 1: (N, H, W, C) to (N, H + 2·padding − K + 1, W + 2·padding − K + 1, F).

    The K neighbours in a column of x are laid side by side: K times the data, where patches of K×K values would be K·K
    times. The weight is (F, K, K, C) by filter, column, row, channel, so what a kernel meets in K columns is one run of
    K·K·C values, and an output column of the whole batch is one matrix product over a strided view, with no sum
    outside of the product. The gradient goes back to the input in the same way.
    """

    def __init__(
        self, name: str, channels: int, filters: int, *, kernel: int = 5, padding: int = 0, input_gradient: bool = True
    ) -> None:
        self.weight, self.bias = f"{name}.weight", f"{name}.bias"
        super().__init__({self.weight: (filters, kernel, kernel, channels), self.bias: (filters,)})
        self.kernel, self.padding, self.input_gradient = kernel, padding, input_gradient

    def forward(self, workspace: Workspace, parameters: Mapping[str, Array], x: Array) -> tuple[Array, Backward]:
        """See Layer. Keeps the neighbours laid out from ``x``, not ``x``."""
        xp, weight, k, padding, dtype = workspace.xp, parameters[self.weight], self.kernel, self.padding, x.dtype
        n, h, w, c = x.shape
        if padding:
            padded = workspace.empty((n, h + 2 * padding, w + 2 * padding, c), dtype)
            padded[...] = 0
            padded[:, padding : padding + h, padding : padding + w] = x
            x = padded
        h_in, w_in, f = x.shape[1], x.shape[2], len(weight)
        h_out, w_out = h_in - k + 1, w_in - k + 1
        neighbours = workspace.empty((n, h_out, w_in, k, c), dtype)
        for i in range(k):
            neighbours[:, :, :, i] = x[:, i : i + h_out]
        column = k * c * dtype.itemsize
        met = xp.lib.stride_tricks.as_strided(  # [j]: what output column j meets
            neighbours, (w_out, n * h_out, k * k * c), (column, w_in * column, dtype.itemsize)
        )
        y = workspace.empty((n * h_out, w_out, f), dtype)
        xp.matmul(met, weight.reshape(f, -1).T, out=y.transpose(1, 0, 2))
        y += parameters[self.bias]

        def backward(dy: Array, emit: Emit) -> Array:
            emit(self.bias, dy.reshape(-1, f).sum(axis=0))
            by_column = dy.reshape(n * h_out, w_out, f).transpose(1, 0, 2)
            products = workspace.empty((w_out, f, k * k * c), dtype)
            xp.matmul(by_column.transpose(0, 2, 1), met, out=products)
            emit(self.weight, products.sum(axis=0).reshape(weight.shape))
            if not self.input_gradient:
                return None
            # Input column j takes from the output columns j − k + 1 to j, the last through the kernels' first column.
            turned = xp.ascontiguousarray(weight[:, ::-1].transpose(1, 0, 2, 3)).reshape(k * f, k * c)
            dy = dy.reshape(n * h_out, w_out * f)
            dneighbours = workspace.empty((n * h_out, w_in, k * c), dtype)
            for j in range(w_in):
                first, end = max(0, j - k + 1), min(w_out, j + 1)
                skipped = first - (j - k + 1)
                through = turned[skipped * f : (skipped + end - first) * f]
                xp.matmul(dy[:, first * f : end * f], through, out=dneighbours[:, j])
            return fold(workspace, dneighbours.reshape(neighbours.shape), (n, h, w, c), padding)

        return y.reshape(n, h_out, w_out, f), backward


def fold(workspace: Workspace, neighbours: Array, shape: tuple[int, int, int, int], padding: int) -> Array:
    """Sums ``neighbours`` (N, H + 2·padding − K + 1, W + 2·padding, K, C) to the (N, H, W, C) behind them."""
    n, h, w, c = shape
    if workspace.xp is np:
        from bitring.models import kernels

        dx = workspace.empty(shape, neighbours.dtype)
        kernels.fold(neighbours, dx, padding)
        return dx
    padded = workspace.empty((n, h + 2 * padding, w + 2 * padding, c), neighbours.dtype)
    padded[...] = 0
    for i in range(neighbours.shape[3]):
        padded[:, i : i + neighbours.shape[1]] += neighbours[:, :, :, i]
    return padded[:, padding : padding + h, padding : padding + w]


class ReLU(Layer):
    """max(x, 0), of any shape. Overwrites its input."""

    overwrites_input = True

    def forward(self, workspace: Workspace, parameters: Mapping[str, Array], x: Array) -> tuple[Array, Backward]:
        """See Layer. Keeps its output."""
        y = workspace.xp.maximum(x, 0, out=x)

        def backward(dy: Array, emit: Emit) -> Array:
            dy *= y > 0
            return dy

        return y, backward


class MaxPool(Layer):
    """The largest of each 2×2 square: (N, H, W, C) to (N, H // 2, W // 2, C); an odd last row or column is left out.

    Among equals the first has the gradient, row by row: constant regions of an image make many equals.
    """

    def forward(self, workspace: Workspace, parameters: Mapping[str, Array], x: Array) -> tuple[Array, Backward]:
        """See Layer. Keeps where the largest were."""
        n, h, w, c = shape = x.shape
        y = workspace.empty((n, h // 2, w // 2, c), x.dtype)
        where = workspace.empty(y.shape, np.int8)
        pool(workspace.xp, x, y, where)

        def backward(dy: Array, emit: Emit) -> Array:
            dx = workspace.empty(shape, dy.dtype)
            dx[:, h // 2 * 2 :] = 0
            dx[:, :, w // 2 * 2 :] = 0
            unpool(workspace.xp, dy, where, dx)
            return dx

        return y, backward


def _square(x: Array, h: int, w: int) -> list[Array]:
    """The four values of each 2×2 square as views (N, h, w, C), row by row."""
    return [x[:, i : 2 * h : 2, j : 2 * w : 2] for i in (0, 1) for j in (0, 1)]


def pool(xp: Any, x: Array, y: Array, where: Array) -> None:
    """Writes the largest of each 2×2 square of ``x`` to ``y``, and to ``where`` which it was; NaN is passed on."""
    if xp is np:
        from bitring.models import kernels

        kernels.pool(x, y, where)
        return
    values = _square(x, y.shape[1], y.shape[2])
    y[...] = values[0]
    where[...] = 0
    for m in (1, 2, 3):
        better = (values[m] > y) | (values[m] != values[m])
        xp.copyto(y, values[m], where=better)
        xp.copyto(where, where.dtype.type(m), where=better)


def unpool(xp: Any, dy: Array, where: Array, dx: Array) -> None:
    """Writes each value of ``dy`` to its place in ``dx``, as ``pool`` noted it, and zeros to its square's others."""
    if xp is np:
        from bitring.models import kernels

        kernels.unpool(dy, where, dx)
        return
    for m, target in enumerate(_square(dx, dy.shape[1], dy.shape[2])):
        target[...] = xp.where(where == m, dy, dy.dtype.type(0))


class Flatten(Layer):
    """(N, ...) to (N, product of the rest), a view."""

    returns_view = True

    def forward(self, workspace: Workspace, parameters: Mapping[str, Array], x: Array) -> tuple[Array, Backward]:
        """See Layer."""

        def backward(dy: Array, emit: Emit) -> Array:
            return dy.reshape(x.shape)

        return x.reshape(len(x), -1), backward
