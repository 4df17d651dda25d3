"""What every encoder is: a gradient and a residual go in, a payload and a new residual come out.

An encoder object is settings, a frozen dataclass; residuals are state, and belong to the caller.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import ml_dtypes
import numpy as np

from bitring.collectives.arrays import is_device
from bitring.collectives.registry import Registry

Array = Any  # numpy.ndarray or cupy.ndarray

VALUE_DTYPES: tuple[Any, ...] = tuple(np.dtype(x) for x in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
"""The dtypes that can be encoded, and decoded to."""

FLOAT32, FLOAT64 = VALUE_DTYPES[2:]
UINT8 = np.dtype(np.uint8)
_NAMES = ", ".join(dtype.name for dtype in VALUE_DTYPES)


class Encoder(ABC):
    """Base of every encoder. A subclass in ``compression/NAME.py`` registers itself as ``NAME``.

    Arrays are 1-D and contiguous, all in host memory (NumPy) or all on one device (CuPy, in its current stream).
    ``block`` values share levels: what is encoded piece by piece is cut at multiples of it.
    ``tests/test_encoders.py`` checks every registered encoder the moment its file exists.
    """

    block: int

    @abstractmethod
    def nbytes(self, n: int) -> int:
        """The most bytes that a payload of ``n`` values takes; 0 for none."""

    def expected_nbytes(self, n: int) -> float:
        """The bytes that a payload of ``n`` values may be expected to take, for predictions; by default the most."""
        return self.nbytes(n)

    @abstractmethod
    def encode(self, values: Array, residual: Array, payload: Array) -> int:
        """Encode v = values + residual into ``payload``; ``residual`` becomes v - decoded. Returns the bytes used.

        ``values`` (n of float16, bfloat16, float32 or float64) stay as they are; ``residual``: n of
        ``residual_dtype(values.dtype)``, in place; ``payload``: uint8, at least ``nbytes(n)``. Raises TypeError for
        anything but such arrays, ValueError for a wrong size, layout or a read-only array.
        """

    @abstractmethod
    def decode(self, payload: Array, out: Array, accumulate: bool = False) -> None:
        """Out = decoded, or out += decoded.

        ``payload``: exactly the bytes that ``encode`` used; ``out``: as many values as were encoded, of any of the four
        dtypes, whichever was encoded. Sums are made in float32 (float64: in float64) and rounded once.
        Raises as ``encode`` does, and ValueError for a payload that does not fit ``out``.
        """

    def warm_up(self, dtype: Any) -> None:
        """Compile, or load from the cache, what encodes and decodes host arrays of ``dtype``.

        Where ranks share a cache of compiled code, one calls this and the others after it: one compiles, they load.
        """
        values = np.zeros(self.block, dtype)
        wide = np.zeros(self.block, residual_dtype(dtype))
        payload = np.empty(self.nbytes(self.block), np.uint8)
        used = self.encode(values, wide, payload)
        for out in (values, wide):
            self.decode(payload[:used], out)


compressors: Registry[Encoder] = Registry("compressor", "compression", "Encoder")


def residual_dtype(dtype: Any) -> Any:
    """The residual's dtype for values of ``dtype``: float64 for float64, else float32. Raises TypeError for others."""
    dtype = np.dtype(dtype)
    if dtype not in VALUE_DTYPES:
        raise TypeError(f"compression is for {_NAMES}; got {dtype.name}")
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def check_encode(encoder: Encoder, values: Array, residual: Array, payload: Array) -> None:
    """Raise unless the arguments are as ``Encoder.encode`` wants them."""
    function = f"{type(encoder).__name__}.encode"
    _check(function, "values", values, VALUE_DTYPES)
    _check(function, "residual", residual, (residual_dtype(values.dtype),), written=True, like=values)
    _check(function, "payload", payload, (UINT8,), written=True, like=values)
    if residual.size != values.size:
        raise ValueError(f"{function}: residual must have as many values as values, {values.size}; got {residual.size}")
    needed = encoder.nbytes(values.size)
    if payload.size < needed:
        raise ValueError(
            f"{function}: payload must have at least {needed} bytes for {values.size} values; got {payload.size}"
        )


def check_decode(encoder: Encoder, payload: Array, out: Array) -> None:
    """Raise unless the arguments are as ``Encoder.decode`` wants them; the payload's size is the encoder's to check."""
    function = f"{type(encoder).__name__}.decode"
    _check(function, "payload", payload, (UINT8,))
    _check(function, "out", out, VALUE_DTYPES, written=True, like=payload)


def check_size(encoder: Encoder, payload: Array, out: Array, expected: int) -> None:
    """Raise ValueError unless ``payload`` has ``expected`` bytes."""
    if payload.size != expected:
        raise ValueError(
            f"{type(encoder).__name__}.decode: payload must have {expected} bytes for {out.size} values; "
            f"got {payload.size}"
        )


def _on_device(x: Array) -> bool:
    return type(x) is not np.ndarray and is_device(x)


def _check(
    function: str, argument: str, x: Array, dtypes: tuple[Any, ...], written: bool = False, like: Array = None
) -> None:
    on_device = _on_device(x)
    if not (on_device or isinstance(x, np.ndarray)):
        raise TypeError(f"{function}: {argument} must be a NumPy or CuPy array; got {type(x).__name__}")
    if like is not None and on_device != _on_device(like):
        places = ["host", "device"]
        raise TypeError(
            f"{function}: {argument} must be in {places[not on_device]} memory, as the other arrays are; "
            f"got an array in {places[on_device]} memory"
        )
    if x.dtype not in dtypes:  # another byte order is another dtype
        names = " or ".join(dtype.name for dtype in dtypes)
        raise TypeError(f"{function}: {argument} must be of {names}; got {x.dtype.name}, {x.dtype.str!r}")
    if x.ndim != 1:
        raise ValueError(f"{function}: {argument} must be 1-D; got shape {tuple(x.shape)}")
    if not x.flags.c_contiguous:
        raise ValueError(f"{function}: {argument} must be contiguous; got strides {tuple(x.strides)}")
    if written and isinstance(x, np.ndarray) and not x.flags.writeable:
        raise ValueError(f"{function}: {argument} must be writable; got a read-only array")
