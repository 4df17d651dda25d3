"""The array function that reduces for an MPI operation, and the pairs of operation and dtype that bitring reduces.

``MPI.MAXLOC`` on its pair types and operations made by ``MPI.Op.Create`` are left to the library's own call.
Combinations that MPI does not define raise TypeError.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.arrays import BFLOAT16, is_numeric

_UFUNCS = {
    "SUM": "add",
    "PROD": "multiply",
    "MAX": "maximum",
    "MIN": "minimum",
    "LAND": "logical_and",
    "LOR": "logical_or",
    "LXOR": "logical_xor",
    "BAND": "bitwise_and",
    "BOR": "bitwise_or",
    "BXOR": "bitwise_xor",
}

_PREDEFINED = {getattr(MPI, name).handle: name for name in (*_UFUNCS, "MAXLOC", "MINLOC", "REPLACE", "NO_OP")}

REDUCTIONS: tuple[MPI.Op, ...] = tuple(getattr(MPI, name) for name in _UFUNCS)
"""The operations that bitring reduces itself, on some dtypes."""

_ARITHMETIC = {"add", "multiply", "maximum", "minimum"}
_LOGICAL = {"logical_and", "logical_or", "logical_xor"}
_BITWISE = {"bitwise_and", "bitwise_or", "bitwise_xor"}
_BY_KIND = {
    "i": _ARITHMETIC | _LOGICAL | _BITWISE,
    "u": _ARITHMETIC | _LOGICAL | _BITWISE,
    "f": _ARITHMETIC,
    "c": {"add", "multiply"},
    "b": _LOGICAL,
}


def require_op(op: MPI.Op, function: str) -> None:
    """Raise TypeError or ValueError, naming ``function``, for what is no operation."""
    if not isinstance(op, MPI.Op):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{function}: op must be an MPI.Op such as MPI.SUM; got {type(op).__name__}")
    if op == MPI.OP_NULL:
        raise ValueError(f"{function}: op must be an operation such as MPI.SUM; got MPI.OP_NULL")


def op_name(op: MPI.Op) -> str:
    """The operation's name in messages between ranks and in errors; "user" for one made by ``MPI.Op.Create``."""
    return _PREDEFINED.get(op.handle, "user")


def ufunc_name(op: MPI.Op, dtype: np.dtype[Any]) -> str | None:
    """Name of the ufunc (``numpy.NAME``, ``cupy.NAME``) that reduces two arrays of ``dtype`` under ``op``.

    None when bitring does not reduce this combination itself. Every ufunc here is commutative bit for bit but for the
    sign of a zero and the payload of a NaN, and computes 16-bit floats in float32, rounding once.
    """
    if not is_numeric(dtype):
        return None
    name = _UFUNCS.get(op_name(op))
    kind = "f" if dtype == BFLOAT16 else dtype.kind
    return name if name in _BY_KIND.get(kind, ()) else None


def require_defined(op: MPI.Op, dtype: np.dtype[Any], function: str) -> None:
    """Raise TypeError, naming ``function``, where MPI does not define the predefined ``op`` on values of ``dtype``."""
    if ufunc_name(op, dtype) is None:
        defined = [op_name(other) for other in REDUCTIONS if ufunc_name(other, dtype) is not None]
        raise TypeError(f"{function}: {op_name(op)} is not defined for {dtype}; defined are {', '.join(defined)}")
