"""The native engine, ``bitring._native``: where it is, and whether it is used.

Everything works without it, more slowly: ``BITRING_NATIVE=0`` leaves it out, as does an installation that has none.
``_native.pyi`` says what it offers; ``scripts/stub`` makes that file from the extension.
"""

from __future__ import annotations

import logging
import os
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from bitring.arrays import BFLOAT16

logger = logging.getLogger("bitring")


def _load() -> ModuleType | None:
    """The extension; None where it is not to be used, or is not there, which the log says."""
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


if TYPE_CHECKING:
    import bitring._native

    extension = bitring._native
else:
    extension = _load()
"""The extension, for what runs only where it is there."""


def native() -> ModuleType | None:
    """The extension; None where it is not used."""
    return extension


def operation_of(ufunc: str) -> bitring._native.Op:
    """The extension's name for the reduction that ``numpy.UFUNC`` makes of pairs."""
    return extension.Op[ufunc]


_TYPES = {
    np.dtype(BFLOAT16 if name == "bfloat16" else name): kind
    for name, kind in (extension.Type.__members__.items() if native() is not None else ())
}


def type_of(dtype: np.dtype[Any]) -> bitring._native.Type | None:
    """The extension's name for ``dtype``; None for one that it does not know, such as a swapped byte order."""
    return _TYPES.get(dtype)


def kernel(ufunc: str | None, dtype: np.dtype[Any]) -> int:
    """The native kernel that reduces arrays of ``dtype`` as ``numpy.UFUNC`` does; 0: there is none."""
    kind = type_of(dtype)
    if ufunc is None or kind is None:
        return 0
    return extension.kernel(operation_of(ufunc), kind)


def address_of(x: Any) -> int:
    """The address of the NumPy array ``x``."""
    return int(x.__array_interface__["data"][0])
