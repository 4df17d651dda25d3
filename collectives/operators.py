"""Which array function reduces for an MPI operation, and which pairs of operation and dtype bitring reduces itself.

Everything else (``MPI.MAXLOC`` on its pair types, operations made by ``MPI.Op.Create``, combinations MPI does not
define) is the library's own call's.
"""

from __future__ import annotations

import numpy as np
from mpi4py import MPI

from bitring.collectives.arrays import BFLOAT16

_NAMES = {
    MPI.SUM: "add",
    MPI.PROD: "multiply",
    MPI.MAX: "maximum",
    MPI.MIN: "minimum",
    MPI.LAND: "logical_and",
    MPI.LOR: "logical_or",
    MPI.LXOR: "logical_xor",
    MPI.BAND: "bitwise_and",
    MPI.BOR: "bitwise_or",
    MPI.BXOR: "bitwise_xor",
}

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


def ufunc_name(op: MPI.Op, dtype: np.dtype) -> str | None:
    """Name of the ufunc (``numpy.NAME``, ``cupy.NAME``) that reduces two arrays of ``dtype`` under ``op``.

    None when bitring does not reduce this combination itself. Every ufunc here is commutative bit for bit but for the
    sign of a zero and the payload of a NaN, and computes 16-bit floats in float32, rounding once.
    """
    name = _NAMES.get(op)
    kind = "f" if dtype == BFLOAT16 else dtype.kind
    return name if name in _BY_KIND.get(kind, ()) else None
