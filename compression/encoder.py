"""What every encoder is: a gradient and a residual go in, a payload and a new residual come out.

An encoder object is settings, a frozen dataclass; residuals are state, and belong to the caller.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from bitring.arrays import is_device
from bitring.compression.compressor import Compressor
from bitring.compression.compressor import compressors as compressors
from bitring.compression.kernels.functions import (
    Functions,
    address_of,
    decode_function,
    encode_function,
    settings_address,
)

Array = Any  # numpy.ndarray or cupy.ndarray

VALUE_DTYPES: tuple[Any, ...] = tuple(np.dtype(x) for x in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
"""The dtypes that can be encoded, and decoded to."""

FLOAT32, FLOAT64 = VALUE_DTYPES[2:]
UINT8 = np.dtype(np.uint8)
_NAMES = ", ".join(dtype.name for dtype in VALUE_DTYPES)


class Encoder(Compressor, ABC):
    """Base of every encoder. A subclass in ``compression/encoders/NAME.py`` is registered as ``NAME``.

    Its kernels for host memory are in ``kernels/NAME_numba.py`` (``functions.py`` says what they are given); where it
    has some for a device, it overrides ``device_kernels``.

    Arrays are 1-D and contiguous, all in host memory (NumPy) or all on one device (CuPy, in its current stream).
    ``block`` values share levels: what is encoded piece by piece is cut at multiples of it. Encoding k blocks gives the
    bytes that encoding each of them gives, one behind the other.
    ``tests/test_encoders.py`` checks every registered encoder the moment its file exists.
    """

    block: int

    fixed_size: ClassVar[bool] = True
    """Whether a payload's length depends on the number of values alone; it is ``nbytes(n)`` then."""

    draws: ClassVar[bool] = False
    """Whether payloads depend on ``seed``."""

    @abstractmethod
    def nbytes(self, n: int) -> int:
        """The most bytes that a payload of ``n`` values takes; 0 for none."""

    def expected_nbytes(self, n: int) -> float:
        """The bytes that a payload of ``n`` values may be expected to take, for predictions; by default the most."""
        return self.nbytes(n)

    @abstractmethod
    def settings(self) -> tuple[float, ...]:
        """What the kernels are told of the object's settings, the same for one object always."""

    def device_kernels(self) -> Any:
        """What has ``encode(values, residual, payload, block)`` and ``decode(payload, out, block, accumulate)``.

        Both for device arrays, and unchecked. Raises TypeError where there is none.
        """
        raise TypeError(
            f"{type(self).__name__}: arrays must be in host memory, it has no kernels for a device; got device arrays"
        )

    def encode(self, values: Array, residual: Array, payload: Array, seed: int = 0) -> int:
        """Encode v = values + residual into ``payload``; ``residual`` becomes v - decoded. Returns the bytes used.

        ``values`` (n of float16, bfloat16, float32 or float64) stay as they are; ``residual``: n of
        ``residual_dtype(values.dtype)``, in place; ``payload``: uint8, at least ``nbytes(n)``, of which those behind
        the used ones stay as they are. ``seed``: of what is drawn, in encoders that draw; the same seed, values and
        residual give the same bytes. Raises TypeError for anything but such arrays, or for device arrays without a
        kernel, ValueError for a wrong size, layout or a read-only array.
        """
        check_encode(self, values, residual, payload)
        if is_device(values):
            self.device_kernels().encode(values, residual, payload, self.block)
            return self.nbytes(values.size)
        used = encode_function(_kernels(self), values.dtype)(
            *(values.ctypes.data, residual.ctypes.data, values.size),
            *(payload.ctypes.data, payload.size, seed, settings_address(self.settings())),
        )
        assert used >= 0, "a payload outgrew nbytes"
        return used

    def decode(self, payload: Array, out: Array, accumulate: bool = False) -> None:
        """Out = decoded, or out += decoded.

        ``payload``: exactly the bytes that ``encode`` used; ``out``: as many values as were encoded, of any of the four
        dtypes, whichever was encoded. Sums are made in float32 (float64: in float64) and rounded once.
        Raises as ``encode`` does, and ValueError for a payload that does not fit ``out``, that names values which are
        not there, or has ones behind its last value; ``out`` may have changed then. A payload has no checksum: one that
        is damaged otherwise decodes to other values.
        """
        check_decode(self, payload, out)
        if self.fixed_size:
            check_size(self, payload, out, self.nbytes(out.size))
        if is_device(out):
            self.device_kernels().decode(payload, out, self.block, accumulate)
            return
        refused = decode_function(_kernels(self), out.dtype)(
            *(payload.ctypes.data, payload.size, out.ctypes.data, out.size),
            *(int(accumulate), settings_address(self.settings())),
        )
        if refused:
            raise ValueError(
                f"{type(self).__name__}.decode: payload must have been encoded for {out.size} values; "
                f"got {payload.size} bytes that have not"
            )

    def functions(self, dtype: Any) -> Functions:
        """The kernels for host arrays of ``dtype`` as C functions, compiled or loaded; see ``Functions``.

        Sums of other ranks' payloads are made by the ``decode`` of ``functions(residual_dtype(dtype))``.
        """
        residual_dtype(dtype)
        kernels, dtype = _kernels(self), np.dtype(dtype)
        return Functions(
            address_of(encode_function(kernels, dtype)),
            address_of(decode_function(kernels, dtype)),
            settings_address(self.settings()),
        )

    def warm_up(self, dtype: Any) -> None:
        """Compile, or load from the cache, what encodes and decodes host arrays of ``dtype``.

        Where ranks share a cache of compiled code, one calls this and the others after it: one compiles, they load.
        """
        decode_function(_kernels(self), residual_dtype(dtype))
        self.functions(dtype)


def _kernels(encoder: Encoder) -> str:
    return _kernels_of(type(encoder))


@functools.cache
def _kernels_of(kind: type[Encoder]) -> str:
    """The kernel file beside the class that is registered, which ``kind`` may derive from."""
    registered = next(each for each in kind.__mro__ if Encoder in each.__bases__)
    return f"bitring.compression.kernels.{registered.__module__.rpartition('.')[2]}_numba"


def residual_dtype(dtype: Any) -> Any:
    """The residual's dtype for values of ``dtype``: float64 for float64, else float32. Raises TypeError for others."""
    dtype = np.dtype(dtype)
    if dtype not in VALUE_DTYPES:
        raise TypeError(f"compression is for {_NAMES}; got {dtype.name}")
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def packed_nbytes(n: int, block: int, bits: int) -> int:
    """Bytes of ``n`` values of so many ``bits``, packed, with a float32 for each block."""
    blocks, rest = divmod(n, block)
    return blocks * (4 + block * bits // 8) + (4 + (rest * bits + 7) // 8 if rest else 0)


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
