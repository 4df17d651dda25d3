"""The native engine, ``bitring._native``: where it is, and whether it is used.

Everything works without it, more slowly: ``BITRING_NATIVE=0`` leaves it out, as does an installation that has none.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import numpy as np

from bitring.arrays import NUMERIC_DTYPES

logger = logging.getLogger("bitring")


@functools.cache
def native() -> Any:
    """The extension; None where it is not to be used, or is not there (then the log says so once)."""
    setting = os.environ.get("BITRING_NATIVE", "")
    if setting not in ("", "0", "1"):
        raise ValueError(f"BITRING_NATIVE must be 0 or 1; got {setting!r}")
    if setting == "0":
        return None
    try:
        import bitring._native as _native
    except ImportError as error:
        if setting == "1":
            raise
        logger.warning("the native engine is not used: %s", error)
        return None
    return _native


# The order of native/kernels.h.
_OPERATIONS = (
    "add",
    "multiply",
    "maximum",
    "minimum",
    "logical_and",
    "logical_or",
    "logical_xor",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
)
_TYPE_NUMBERS = {dtype: number for number, dtype in enumerate(NUMERIC_DTYPES)}


def operation_number(ufunc: str) -> int:
    """The extension's number for the reduction that ``numpy.UFUNC`` makes of pairs."""
    return _OPERATIONS.index(ufunc)


def type_number(dtype: np.dtype[Any]) -> int | None:
    """The extension's number for ``dtype``; None for one that it does not know, such as a swapped byte order."""
    return _TYPE_NUMBERS.get(dtype)


def kernel(ufunc: str | None, dtype: np.dtype[Any]) -> int:
    """The native kernel that reduces arrays of ``dtype`` as ``numpy.UFUNC`` does; 0: there is none."""
    module, number = native(), type_number(dtype)
    if module is None or ufunc is None or number is None:
        return 0
    return int(module.kernel(operation_number(ufunc), number))


def address_of(x: Any) -> int:
    """The address of the NumPy array ``x``."""
    return int(x.__array_interface__["data"][0])
