"""A recurrent layer.

Letters: N samples, T steps, I inputs, H units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitring.models.layers import Array, Backward, Emit, Layer, Workspace


class LSTM(Layer):
    """The last output of a long short-term memory (Hochreiter and Schmidhuber, 1997): (N, T, I) to (N, H).

    With x_t, the output h and the cell c of the step before (zero at first), * value by value::

        i, f, g, o = weight·x_t + recurrent·h + bias      rows of H each, in this order
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(c)

    weight is (4H, I), recurrent (4H, H), bias (4H,). These are ``torch.nn.LSTM``'s, whose two biases are added.
    """

    def __init__(self, name: str, inputs: int, units: int, *, input_gradient: bool = True) -> None:
        self.weight, self.recurrent, self.bias = (f"{name}.{which}" for which in ("weight", "recurrent", "bias"))
        rows = 4 * units
        super().__init__({self.weight: (rows, inputs), self.recurrent: (rows, units), self.bias: (rows,)})
        self.units, self.input_gradient = units, input_gradient

    def forward(self, workspace: Workspace, parameters: Mapping[str, Array], x: Array) -> tuple[Array, Backward]:
        """See Layer. Keeps ``x``, and each step's gates, cells and outputs."""
        xp, dtype, units = workspace.xp, x.dtype, self.units
        weight, recurrent = parameters[self.weight], parameters[self.recurrent]
        n, steps, inputs = x.shape
        # The step is the first axis: each is one matrix product of contiguous rows.
        by_step = workspace.empty((steps, n, inputs), dtype)
        by_step[...] = x.transpose(1, 0, 2)
        flat = by_step.reshape(steps * n, inputs)
        gates = workspace.empty((steps, n, 4 * units), dtype)
        xp.matmul(flat, weight.T, out=gates.reshape(steps * n, 4 * units))
        gates += parameters[self.bias]
        outputs = workspace.empty((steps + 1, n, units), dtype)  # [t]: before step t
        cells = workspace.empty((steps + 1, n, units), dtype)
        outputs[0] = cells[0] = 0
        for t in range(steps):
            each = gates[t]
            each += outputs[t] @ recurrent.T
            for part in (slice(0, 2 * units), slice(3 * units, None)):
                each[:, part] = _sigmoid(xp, each[:, part])
            each[:, 2 * units : 3 * units] = xp.tanh(each[:, 2 * units : 3 * units])
            i, f, g, o = _parts(each, units)
            cells[t + 1] = f * cells[t] + i * g
            outputs[t + 1] = o * xp.tanh(cells[t + 1])

        def backward(dy: Array, emit: Emit) -> Array:
            dgates = workspace.empty(gates.shape, dtype)
            dh, dc = dy, 0
            for t in reversed(range(steps)):
                i, f, g, o = _parts(gates[t], units)
                di, df, dg, do = _parts(dgates[t], units)
                squashed = xp.tanh(cells[t + 1])
                do[...] = dh * squashed * o * (1 - o)
                dc = dc + dh * o * (1 - squashed * squashed)
                di[...] = dc * g * i * (1 - i)
                df[...] = dc * cells[t] * f * (1 - f)
                dg[...] = dc * i * (1 - g * g)
                dc = dc * f
                dh = dgates[t] @ recurrent
            together = dgates.reshape(steps * n, 4 * units)
            emit(self.bias, together.sum(axis=0))
            emit(self.recurrent, together.T @ outputs[:-1].reshape(steps * n, units))
            emit(self.weight, together.T @ flat)
            if not self.input_gradient:
                return None
            dx = workspace.empty(x.shape, dtype)
            dx[...] = (together @ weight).reshape(steps, n, inputs).transpose(1, 0, 2)
            return dx

        y = workspace.empty((n, units), dtype)
        y[...] = outputs[steps]
        return y, backward


def _sigmoid(xp: Any, z: Array) -> Array:
    """1 / (1 + exp(-z)), which cannot overflow."""
    return (xp.tanh(z / 2) + 1) / 2


def _parts(gates: Array, units: int) -> list[Array]:
    """The four gates as views (N, H)."""
    return [gates[:, k * units : (k + 1) * units] for k in range(4)]
