"""The base of models: named parameters, a loss, and gradients handed out layer by layer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bitring.launcher import launched_rank
from bitring.models.graph import Node, chain, forward, layers_of
from bitring.models.layers import Array, Draw, Emit, Layer, Workspace
from bitring.registry import Registry
from bitring.settings import Range, checked


class Model(ABC):
    """A classifier with softmax cross-entropy loss, made of layers.

    input_shape: of one sample, without the batch axis, such as ``(28, 28)``. classes: how many. dtype: float32 or
    float64. seed: of the He initialisation, weights ~ N(0, 2 / inputs), biases 0 (He et al. 2015, arXiv:1502.01852);
    equal seeds give equal parameters on every rank. xp: the array module, ``numpy`` or ``cupy``.

    ``parameters`` is a dict of contiguous arrays, first layer to last, such as ``"conv1.weight"``, ``"conv1.bias"``.
    An optimizer changes the arrays in place. A model's calls share scratch memory: one call at a time.
    """

    EVALUATION_BATCH = 256
    """Samples at a time in ``logits``, ``loss`` and ``accuracy``, which bounds their memory."""

    def __init__(
        self, input_shape: tuple[int, ...], classes: int, *, dtype: Any = np.float32, seed: int = 0, xp: Any = np
    ) -> None:
        name = type(self).__name__
        self.input_shape = tuple(int(side) for side in input_shape)
        if not self.input_shape or min(self.input_shape) < 1:
            raise ValueError(f"{name}: input_shape must be one or more positive sizes, got {input_shape!r}")
        self.classes = checked(name, "classes", classes, int, Range(least=2))
        if np.dtype(dtype).name not in ("float32", "float64"):
            raise ValueError(f"{name}: dtype must be float32 or float64, got {np.dtype(dtype)}")
        checked(name, "seed", seed, int, Range(least=0))
        self.dtype, self.xp = np.dtype(dtype), xp
        self.nodes = self.graph()
        self._workspace = Workspace(xp)
        self._calls = 0  # of loss_and_gradients
        random = np.random.default_rng(seed)
        self.parameters: dict[str, Array] = {}
        for layer in layers_of(self.nodes):
            for parameter, shape in layer.shapes.items():
                value = np.zeros(shape)
                if len(shape) > 1:
                    value = random.normal(0, math.sqrt(2 / math.prod(shape[1:])), shape)
                self.parameters[parameter] = xp.asarray(value.astype(self.dtype))

    @abstractmethod
    def layers(self) -> list[Layer]:
        """The layers from ``arrange``'s result to the logits (N, classes)."""

    def graph(self) -> list[Node]:
        """The nodes, each after those whose values it takes; the last gives the logits. A chain of ``layers``."""
        return chain(self.layers())

    def arrange(self, x: Array) -> Array:
        """``x`` (N, *input_shape) as the first layer wants it: flat, unless a model says otherwise. A view."""
        return x.reshape(len(x), -1)

    def loss_and_gradients(
        self,
        x: Array,
        y: Array,
        on_gradient: Callable[[str, Array], None] | None = None,
        product: Callable[[Array, Array], Any] | None = None,
        draw: Draw | None = None,
    ) -> tuple[float, dict[str, Array]]:
        """The mean loss over the batch, and its gradient by every parameter, newly made, in ``parameters``' order.

        x: (N, *input_shape), floating; y: (N,), integers below ``classes``. ``on_gradient(name, gradient)`` is called
        as soon as each gradient is ready: in a chain of layers in the reverse of ``parameters``' order. An empty batch
        has loss 0 and gradients of zeros. Raises TypeError or ValueError, before any work, when x or y are something
        else.

        A dense weight's gradient is uᵀ·v of the layer's error u (N, outputs) and its input v (N, inputs). With
        ``product=bitring.Factors`` it is given as that, ``product(u, v)`` of new arrays, and not multiplied out.

        ``draw``: what Dropout draws by, a ``bitring.Draw`` with a step's number and that of the first sample in the
        batch of all ranks; None: the number of the call, from 0, and samples that no other rank has.
        """
        x, y = self.checked("loss_and_gradients", x, y)
        ready: dict[str, Array] = {}

        def emit(name: str, gradient: Array) -> None:
            ready[name] = gradient
            if on_gradient is not None:
                on_gradient(name, gradient)

        loss = 0.0
        drawn_by, self._calls = draw or Draw(self._calls, launched_rank() << 32), self._calls + 1
        if len(x):
            logits, back = self._forward(x, drawn_by)
            self._workspace.make_product = None if product is None else lambda u, v: product(u.copy(), v.copy())
            losses, d = self.cross_entropy(logits, y)
            loss = float(losses.mean())
            d /= len(x)
            back(d, emit)
        else:
            for name, value in reversed(self.parameters.items()):
                emit(name, self.xp.zeros_like(value))
        return loss, {name: ready[name] for name in self.parameters}

    def logits(self, x: Array) -> Array:
        """The last layer's output (N, classes), before the softmax; a new array."""
        x = self._checked_x("logits", x)
        out = self.xp.empty((len(x), self.classes), self.dtype)
        for part, logits in self._evaluated(x):
            out[part] = logits
        return out

    def loss(self, x: Array, y: Array) -> float:
        """The mean loss; 0 for no samples. x and y as in ``loss_and_gradients``."""
        x, y = self.checked("loss", x, y)
        total = sum(float(self.cross_entropy(logits, y[part])[0].sum()) for part, logits in self._evaluated(x))
        return total / max(len(x), 1)

    def accuracy(self, x: Array, y: Array) -> float:
        """The share of samples whose largest logit is their class's; 0 for no samples. x and y as above."""
        x, y = self.checked("accuracy", x, y)
        right = sum(int((logits.argmax(axis=1) == y[part]).sum()) for part, logits in self._evaluated(x))
        return right / max(len(x), 1)

    def _forward(self, x: Array, draw: Draw | None = None) -> tuple[Array, Callable[[Array, Emit], None]]:
        self._workspace.restart()
        self._workspace.draw = draw
        return forward(self.nodes, self._workspace, self.parameters, self.arranged(x))

    def arranged(self, x: Array) -> Array:
        """``x`` (N, *input_shape) in the model's dtype, as the first layer wants it."""
        return self.arrange(x.astype(self.dtype, copy=False))

    def _evaluated(self, x: Array) -> Iterator[tuple[slice, Array]]:
        """The logits, some samples at a time; each is overwritten by the next."""
        for first in range(0, len(x), self.EVALUATION_BATCH):
            part = slice(first, first + self.EVALUATION_BATCH)
            yield part, self._forward(x[part])[0]

    def cross_entropy(self, logits: Array, y: Array) -> tuple[Array, Array]:
        """Each sample's loss, and the gradient of their sum by the logits, which are overwritten."""
        samples = self.xp.arange(len(y))
        logits -= logits.max(axis=1, keepdims=True)
        of_class = logits[samples, y]
        exponentials = self.xp.exp(logits)
        sums = exponentials.sum(axis=1)
        probabilities = exponentials / sums[:, None]
        probabilities[samples, y] -= 1
        return self.xp.log(sums) - of_class, probabilities

    def _checked_x(self, method: str, x: Any) -> Array:
        """x as (N, *input_shape); a last axis of one channel may be there or not."""
        function = f"{type(self).__name__}.{method}"
        self._check_array(function, "x", x)
        if x.dtype.kind != "f":
            raise TypeError(f"{function}: x must be floating, such as {self.dtype}, got {x.dtype}")
        if x.ndim == 0 or _without_one_channel(x.shape[1:]) != _without_one_channel(self.input_shape):
            sizes = ", ".join(str(side) for side in self.input_shape)
            raise ValueError(f"{function}: x must have shape (N, {sizes}), got {tuple(x.shape)}")
        return x.reshape(len(x), *self.input_shape)

    def checked(self, method: str, x: Any, y: Any) -> tuple[Array, Array]:
        """x as (N, *input_shape), and y, for ``method``. Raises TypeError or ValueError where they are not."""
        x = self._checked_x(method, x)
        function = f"{type(self).__name__}.{method}"
        self._check_array(function, "y", y)
        if y.dtype.kind not in "iu":
            raise TypeError(f"{function}: y must be integers, got {y.dtype}")
        if y.shape != x.shape[:1]:
            raise ValueError(f"{function}: y must have shape ({len(x)},), as many as x, got {tuple(y.shape)}")
        if len(y) and not (int(y.min()) >= 0 and int(y.max()) < self.classes):
            raise ValueError(
                f"{function}: y must be from 0 to {self.classes - 1}, got {int(y.min())} to {int(y.max())}"
            )
        return x, y

    def _check_array(self, function: str, argument: str, value: Any) -> None:
        if not isinstance(value, self.xp.ndarray):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise TypeError(f"{function}: {argument} must be a {self.xp.__name__} array, got {kind}")


def _without_one_channel(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[:-1] if len(shape) == 3 and shape[-1] == 1 else shape)


models: Registry[Model] = Registry("model", Model, "models/networks", group="bitring.models")
