"""Dropout, drawn by sample: which values are dropped depends on the step and on the sample's number in the batch.

So it does not depend on which rank computes a sample, nor on what it computes beside it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitring.models.layers import Array, Backward, Draw, Emit, Layer, Workspace

_MASK = 2**64 - 1


class Dropout(Layer):
    """Each value becomes 0 with probability ``rate``, else x / (1 − rate) (Srivastava et al., 2014). Any shape.

    Overwrites its input. Without a ``Draw`` in the workspace, when a model is only evaluated, values stay as they are.
    """

    overwrites_input = True

    def __init__(self, rate: float, seed: int) -> None:
        super().__init__()
        self.rate, self.seed = rate, seed

    def forward(self, workspace: Workspace, parameters: Mapping[str, Array], x: Array) -> tuple[Array, Backward]:
        """See Layer. Keeps the factors."""
        if workspace.draw is None or not self.rate:
            return x, lambda dy, emit: dy
        factors = workspace.empty(x.shape, x.dtype)
        kept = drawn(workspace.xp, x.shape, workspace.draw, self.seed + zlib.crc32(workspace.node.encode()))
        workspace.xp.multiply(kept >= np.uint64(int(self.rate * 2**64)), x.dtype.type(1 / (1 - self.rate)), out=factors)
        x *= factors

        def backward(dy: Array, emit: Emit) -> Array:
            dy *= factors
            return dy

        return x, backward


def drawn(xp: Any, shape: tuple[int, ...], draw: Draw, seed: int) -> Array:
    """Uniform uint64 numbers of this ``shape``, by splitmix64 of seed, step, sample and place (Steele et al., 2014)."""
    width = draw.width or shape[-1]
    inner = 1
    for side in shape[1:-1]:
        inner *= side
    key = _mixed_int(_mixed_int(seed) + draw.step)
    rows = _mixed(xp.arange(draw.first, draw.first + shape[0], dtype=np.uint64) + np.uint64(key))
    columns = xp.arange(draw.column, draw.column + shape[-1], dtype=np.uint64)
    places = (xp.arange(inner, dtype=np.uint64) * np.uint64(width))[:, None] + columns[None, :]
    return _mixed(rows[:, None] + places.reshape(1, -1) * np.uint64(0x9E3779B97F4A7C15)).reshape(shape)


def _mixed(z: Array) -> Array:
    """Of an array, which is overwritten; arithmetic modulo 2**64."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def _mixed_int(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31
