"""A gradient as the product of two thin matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from bitring.arrays import Array, is_device, xp_of
from bitring.compression.encoder import VALUE_DTYPES, residual_dtype


@dataclass(frozen=True, eq=False)
class Factors:
    """The gradient uᵀ·v of a 2-D parameter of shape (M, N), over K samples: its sufficient factors (Xie et al., 2016).

    ``u``: (K, M), for a dense layer y = x·Wᵀ the loss's gradient by y; ``v``: (K, N), the layer's input x. Both NumPy
    or both CuPy, of one of the dtypes float16, bfloat16, float32 and float64; they are kept, not copied. K may be 0.
    Raises TypeError and ValueError for anything else.
    """

    u: Array
    v: Array

    def __post_init__(self) -> None:
        for name in ("u", "v"):
            x = getattr(self, name)
            if not (isinstance(x, np.ndarray) or is_device(x)):
                raise TypeError(f"Factors: {name} must be a NumPy or CuPy array; got {type(x).__name__}")
            if isinstance(x, np.ndarray):
                object.__setattr__(self, name, np.asarray(x))  # a masked array's product would hide values
            if x.dtype not in VALUE_DTYPES:
                names = ", ".join(dtype.name for dtype in VALUE_DTYPES)
                raise TypeError(f"Factors: {name} must be of {names}; got {x.dtype}")
            if x.ndim != 2:
                sides = "(K, M)" if name == "u" else "(K, N)"
                raise ValueError(f"Factors: {name} must have shape {sides}, K samples; got {tuple(x.shape)}")
        if is_device(self.u) != is_device(self.v) or self.u.dtype != self.v.dtype:
            raise TypeError(
                f"Factors: u and v must be of one dtype in one memory; got {self.u.dtype} in {_memory(self.u)} and "
                f"{self.v.dtype} in {_memory(self.v)}"
            )
        if len(self.u) != len(self.v):
            raise ValueError(
                f"Factors: u and v must have as many rows, one for each sample; got {len(self.u)} and {len(self.v)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """The gradient's."""
        return self.u.shape[1], self.v.shape[1]

    @property
    def dtype(self) -> Any:
        """The gradient's."""
        return self.u.dtype

    def multiply(self, out: Array, scale: float = 1.0) -> None:
        """Out = scale·uᵀ·v, of the gradient's shape; 16-bit values are multiplied in float32 and rounded once."""
        xp, wide = xp_of(self.u), residual_dtype(self.dtype)
        u, v = self.u.astype(wide, copy=False), self.v.astype(wide, copy=False)
        if scale != 1:
            u = u * wide.type(scale)
        if out.dtype == wide and out.flags.c_contiguous:
            xp.matmul(u.T, v, out=out)
        else:
            out[...] = u.T @ v

    def product(self) -> Array:
        """The gradient, a new array."""
        out = xp_of(self.u).empty(self.shape, self.dtype)
        self.multiply(out)
        return out

    def scaled(self, scale: float) -> Factors:
        """The factors of scale·uᵀ·v, scale at most 1. In 16 bits that with larger values is scaled: it loses less."""

        def times(x: Array) -> Array:
            wide = residual_dtype(self.dtype)
            return (x.astype(wide, copy=False) * wide.type(scale)).astype(self.dtype, copy=False)

        if self.dtype.itemsize == 2 and self.u.size and self.v.size and abs(self.v).max() > abs(self.u).max():
            return Factors(self.u, times(self.v))
        return Factors(times(self.u), self.v)

    def overflows(self) -> bool:
        """Whether finite factors make a gradient that is not finite."""
        if not self.u.size or not self.v.size:
            return False
        bound = len(self.u) * float(abs(self.u).max()) * float(abs(self.v).max())
        if bound <= float(ml_dtypes.finfo(self.dtype).max):
            return False
        with np.errstate(over="ignore", invalid="ignore"):
            return not bool(xp_of(self.u).isfinite(self.product()).all())


def _memory(x: Array) -> str:
    return "device memory" if is_device(x) else "host memory"


def has_factors(arrays: Mapping[str, Any]) -> bool:
    """Whether any of the arrays is given as ``Factors``."""
    return Factors in map(type, arrays.values())


def dense(arrays: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arrays, with ``Factors`` multiplied."""
    if not has_factors(arrays):
        return arrays
    return {name: each.product() if isinstance(each, Factors) else each for name, each in arrays.items()}
