"""Base of all encoders: a gradient and a residual go in, a payload and a new residual come out.

An encoder object is settings, a frozen dataclass; residuals are state, and belong to the caller.
"""

from __future__ import annotations

import functools
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

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
    kernel_file,
    settings_address,
)

Array = Any  # numpy.ndarray or cupy.ndarray

VALUE_DTYPES: tuple[Any, ...] = tuple(np.dtype(x) for x in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
"""The dtypes that can be encoded, and decoded to."""

FLOAT32, FLOAT64 = VALUE_DTYPES[2:]
UINT8 = np.dtype(np.uint8)
_NAMES = ", ".join(dtype.name for dtype in VALUE_DTYPES)


class Encoder(Compressor, ABC):
    """Base of every encoder: a frozen dataclass of settings with ``nbytes``, and ``encode`` and ``decode`` in NumPy.

    A subclass in ``compression/encoders/NAME.py`` is registered as ``NAME``; that file is enough. Plans exchange its
    payloads in Python then, with the same guarantees. For speed, kernels can be added beside it, which give the same
    bits; they are found by name (``kernel_file``) and called in place of the class's own two methods:

    - ``kernels/NAME_numba.py`` for host memory: ``encode`` and ``decode`` as ``functions.py`` describes them, compiled
      to C functions, with which the native engine exchanges;
    - ``kernels/NAME_cuda.py`` for CuPy arrays: ``encode(encoder, values, residual, payload, seed)``, which returns the
      bytes used, and ``decode(encoder, payload, out, accumulate)``.

    The arguments of a class's ``encode`` and ``decode`` are checked before they reach it. Arrays are 1-D and
    contiguous, all in host memory (NumPy) or all on one device (CuPy, in its current stream).
    ``tests/test_encoders.py`` checks every registered encoder the moment its file exists.
    """

    block: int = 1024
    """So many values share levels: what is encoded piece by piece is cut at multiples of it.

    Encoding k blocks gives the bytes that encoding each of them gives, one behind the other.
    """

    fixed_size: ClassVar[bool] = True
    """Whether a payload's length depends on the number of values alone; it is ``nbytes(n)`` then."""

    draws: ClassVar[bool] = False
    """Whether payloads depend on ``seed``."""

    def __init_subclass__(cls) -> None:
        """Put the checks, and the kernels where there are some, before the class's own ``encode`` and ``decode``."""
        super().__init_subclass__()
        for name, before in (("encode", _encoding), ("decode", _decoding)):
            method = cls.__dict__.get(name)
            if method is not None and method not in _modules:
                checked = before(method)
                _modules[checked] = method.__module__
                setattr(cls, name, checked)

    def grain(self, shape: tuple[int, ...]) -> int:
        """A parameter of this ``shape`` is cut among ranks at multiples of so many values; by default of ``block``."""
        return self.block

    def for_parts(self, shapes: Sequence[tuple[int, ...]]) -> list[Encoder]:
        """The encoders of the parts of one buffer, of which each is one rank's; by default this one for all: flat.

        A part is a parameter of that shape, or rows of one: the ``prod(shape[1:])`` values of an index of the first
        dimension each. An encoder whose levels belong to rows and columns returns ones that know them, and a row as
        ``grain``. Their ``block`` is a panel of whole rows; values are encoded panel by panel, and joined as blocks
        are, the last one with fewer rows. What is left of a parameter that nodes' lanes have cut inside a row is flat.
        """
        return [self] * len(shapes)

    def for_shape(self, shape: tuple[int, ...]) -> Encoder:
        """The encoder of a buffer that is one parameter of this ``shape``, all of it one rank's."""
        return self.for_parts([shape])[0]

    @abstractmethod
    def nbytes(self, n: int) -> int:
        """The most bytes that a payload of ``n`` values takes; 0 for none."""

    def expected_nbytes(self, n: int) -> float:
        """The bytes that a payload of ``n`` values may be expected to take, for predictions; by default the most."""
        return self.nbytes(n)

    @abstractmethod
    def encode(self, values: Array, residual: Array, payload: Array, seed: int = 0) -> int:
        """Encode v = values + residual into ``payload``; ``residual`` becomes v - decoded. Returns the bytes used.

        ``values`` (n of float16, bfloat16, float32 or float64) stay as they are; ``residual``: n of
        ``residual_dtype(values.dtype)``, in place; ``payload``: uint8, at least ``nbytes(n)``, of which those behind
        the used ones stay as they are. ``seed``: of what is drawn, in encoders that draw; the same seed, values and
        residual give the same bytes. Raises TypeError for anything but such arrays, or for device arrays without a
        kernel, ValueError for a wrong size, layout or a read-only array.

        What a subclass defines is given such arrays only, one value or more, and a payload of ``nbytes(n)`` bytes;
        ``seed`` where it draws. Scratch is the subclass's to allocate.
        """

    @abstractmethod
    def decode(self, payload: Array, out: Array, accumulate: bool = False) -> None:
        """Out = decoded, or out += decoded.

        ``payload``: exactly the bytes that ``encode`` used; ``out``: as many values as were encoded, of any of the four
        dtypes, whichever was encoded. Sums are made in float32 (float64: in float64) and rounded once; ``write_out``
        does that. Raises as ``encode`` does, and ValueError for a payload that does not fit ``out``, that names values
        which are not there, or has ones behind its last value; ``out`` may have changed then. A payload has no
        checksum: one that is damaged otherwise decodes to other values.

        What a subclass defines is given such arrays only, one value or more; where its payloads have a fixed size, of
        that size. It raises ValueError or IndexError for others that do not fit.
        """

    def settings(self) -> tuple[float, ...]:
        """The numbers that the Numba kernels are given beside the arrays, the same for one object always."""
        return ()

    @property
    def has_functions(self) -> bool:
        """Whether there are C functions that do what this object's ``encode`` and ``decode`` do."""
        modules = {_modules.get(getattr(type(self), name), "") for name in ("encode", "decode")}
        return len(modules) == 1 and kernel_file(*modules, "numba") is not None

    def functions(self, dtype: Any) -> Functions:
        """The kernels for host arrays of ``dtype`` as C functions, compiled or loaded; see ``Functions``.

        Sums of other ranks' payloads are made by the ``decode`` of ``functions(residual_dtype(dtype))``. Raises
        TypeError where there are no kernels.
        """
        residual_dtype(dtype)
        kernels = next(iter(self._kernel_files("numba")), None)
        if kernels is None:
            raise TypeError(f"{type(self).__name__}.functions: it has no kernels that are C functions")
        return Functions(
            address_of(encode_function(kernels, np.dtype(dtype))),
            address_of(decode_function(kernels, np.dtype(dtype))),
            settings_address(self.settings()),
        )

    def device_kernels(self) -> Any:
        """The module with the kernels for device arrays. Raises TypeError where there is none."""
        files = self._kernel_files("cuda")
        if not files:
            name = type(self).__name__
            raise TypeError(f"{name}: arrays must be in host memory, it has no kernels for a device; got device arrays")
        return importlib.import_module(files[0])

    def warm_up(self, dtype: Any) -> None:
        """Compile, or load from the cache, the kernels that encode and decode host arrays of ``dtype``.

        Where ranks share a cache of compiled code, one calls this and the others after it: one compiles, they load.
        Raises TypeError for other dtypes.
        """
        dtypes = {np.dtype(dtype), residual_dtype(dtype)}
        for kernels in self._kernel_files("numba"):
            encode_function(kernels, np.dtype(dtype))
            for each in dtypes:
                decode_function(kernels, each)

    def _kernel_files(self, kind: str) -> list[str]:
        """Of this class and those it derives from, whose methods it may call."""
        methods = (each.__dict__.get("encode") for each in type(self).__mro__)
        files = (kernel_file(_modules[each], kind) for each in methods if each in _modules)
        return [file for file in files if file is not None]


_modules: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""The module in which a checked ``encode`` or ``decode`` was written, beside which its kernels are."""


def _encoding(written: Callable[..., int]) -> Callable[..., int]:
    module = written.__module__

    @functools.wraps(written)
    def encode(
        self: Encoder,
        values: Array,
        residual: Array,
        payload: Array,
        seed: int = 0,
        shape: tuple[int, ...] | None = None,
    ) -> int:
        each = _shaped(self, "encode", shape, values)
        if each is not self:
            return each.encode(values, residual, payload, seed)
        check_encode(self, values, residual, payload)
        n = values.size
        if n == 0:
            return 0
        on_device = is_device(values)
        kernels = kernel_file(module, "cuda" if on_device else "numba")
        if on_device:
            of_device = self.device_kernels()  # may be of a class that this one derives from, and calls
            if kernels is not None:
                used: int = of_device.encode(self, values, residual, payload, seed)
                return used
        elif kernels is not None:
            used = encode_function(kernels, values.dtype)(
                *(values.ctypes.data, residual.ctypes.data, n),
                *(payload.ctypes.data, payload.size, seed, settings_address(self.settings())),
            )
            assert used >= 0, "a payload outgrew nbytes"
            return used
        most = self.nbytes(n)
        returned: Any = written(self, values, residual, payload[:most], *((seed,) if self.draws else ()))
        used = int(returned) if isinstance(returned, (int, np.integer)) else -1
        if not (used == most if self.fixed_size else 0 <= used <= most):
            what = f"{most}, which is nbytes({n})" if self.fixed_size else f"0 to nbytes({n}), {most}"
            raise RuntimeError(
                f"{type(self).__name__}.encode: it must return the bytes used, {what}; it returned {returned!r}"
            )
        return used

    return encode


def _decoding(written: Callable[..., None]) -> Callable[..., None]:
    module = written.__module__

    @functools.wraps(written)
    def decode(
        self: Encoder, payload: Array, out: Array, accumulate: bool = False, shape: tuple[int, ...] | None = None
    ) -> None:
        each = _shaped(self, "decode", shape, out)
        if each is not self:
            each.decode(payload, out, accumulate)
            return
        check_decode(self, payload, out)
        if self.fixed_size:
            check_size(self, payload, out, self.nbytes(out.size))
        if out.size == 0 and payload.size == 0:
            return
        on_device = is_device(out)
        kernels = kernel_file(module, "cuda" if on_device else "numba")
        if on_device:
            of_device = self.device_kernels()
            if kernels is not None:
                of_device.decode(self, payload, out, accumulate)
                return
        reason: Exception | None = None
        if kernels is not None:
            refused = decode_function(kernels, out.dtype)(
                *(payload.ctypes.data, payload.size, out.ctypes.data, out.size),
                *(int(accumulate), settings_address(self.settings())),
            )
        elif out.size == 0:
            refused = 1
        else:
            try:
                written(self, payload, out, accumulate)
                refused = 0
            except (ValueError, IndexError) as error:
                refused, reason = 1, error
        if refused:
            raise ValueError(
                f"{type(self).__name__}.decode: payload must have been encoded for {out.size} values; "
                f"got {payload.size} bytes that have not"
            ) from reason

    return decode


def _shaped(encoder: Encoder, method: str, shape: tuple[int, ...] | None, values: Array) -> Encoder:
    """The encoder of ``values`` that are a parameter of this ``shape``, all of it; None: flat."""
    if shape is None:
        return encoder
    if math.prod(shape) != values.size:
        raise ValueError(
            f"{type(encoder).__name__}.{method}: shape must be of {values.size} values, as many as there are; "
            f"got {tuple(shape)}"
        )
    return encoder.for_shape(tuple(shape))


def write_out(decoded: Array, out: Array, accumulate: bool) -> None:
    """Out = decoded, or out += decoded, as ``Encoder.decode`` has it: in float32 (float64: in float64), rounded once.

    Both have one shape; for a part of a larger array, ``out`` is a view of it.
    """
    wide = residual_dtype(out.dtype)
    with np.errstate(all="ignore"):
        x = decoded.astype(wide)
        out[...] = (out.astype(wide) + x if accumulate else x).astype(out.dtype)


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
