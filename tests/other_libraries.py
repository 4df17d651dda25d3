"""Arrays of other libraries, for tests without these libraries: what PyTorch and JAX offer by way of DLPack."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np
from typing_extensions import Self

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.argtypes, _pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p


class _Writable:
    """The memory of ``array``, as if it were writable."""

    def __init__(self, array: Any) -> None:
        self._array = array
        described = array.__array_interface__
        self.__array_interface__ = {**described, "data": (described["data"][0], False)}


def capsule_of(array: Any) -> Any:
    """DLPack without a version, so no word on whether it may be written to; bfloat16 as such."""
    bfloat16 = array.dtype == ml_dtypes.bfloat16
    capsule = np.asarray(_Writable(array.view(np.int16) if bfloat16 else array)).__dlpack__()
    if bfloat16:  # the code in a DLTensor's dtype: kDLBfloat instead of kDLInt
        ctypes.c_uint8.from_address(_pointer(capsule, b"dltensor") + 20).value = 4
    return capsule


class Tensor:
    """As PyTorch's on the CPU."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: Any) -> Any:
        return capsule_of(self.array)


class Immutable(bytes):
    """As JAX's on the CPU: its buffer says that its values must not be changed, and its DLPack does not."""

    array: Any

    def __new__(cls, array: Any) -> Self:
        self = super().__new__(cls, array.tobytes())
        self.array = np.frombuffer(self, array.dtype).reshape(array.shape)
        return self

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: Any) -> Any:
        return capsule_of(self.array)
