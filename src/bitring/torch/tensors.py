"""Tensors over arrays' memory and arrays over tensors', also of bfloat16, which NumPy and PyTorch do not share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from bitring.arrays import BFLOAT16

ARRAY_DTYPES: dict[Any, np.dtype[Any]] = {
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: BFLOAT16,
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
"""The dtypes that gradients may have, and NumPy's names for them."""


def array_dtype(dtype: Any, where: str) -> np.dtype[Any]:
    """NumPy's dtype for a gradient's. Raises TypeError, which begins with ``where``, for no float of 16 to 64 bits."""
    try:
        return ARRAY_DTYPES[dtype]
    except KeyError:
        known = ", ".join(each.name for each in ARRAY_DTYPES.values())
        raise TypeError(f"{where} must be of one of {known}; got {str(dtype).removeprefix('torch.')}") from None


def tensor_over(array: Any) -> Any:
    """A tensor over the memory of a NumPy array."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array_over(tensor: Any) -> Any:
    """A NumPy array over the memory of a tensor on the host, whatever it requires."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def bytes_over(tensor: Any) -> Any:
    """The bytes of a contiguous tensor on the host, in place."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def memory_order(tensor: Any) -> tuple[int, ...]:
    """The dimensions from the outermost in memory to the innermost; as they are counted where memory has gaps.

    So ``channels_last`` weights of (out, in, height, width) have (0, 2, 3, 1).
    """
    strides, shape = tensor.stride(), tensor.shape
    order = tuple(sorted(range(len(shape)), key=lambda i: (-strides[i], i)))
    expected = 1
    for i in reversed(order):
        if shape[i] != 1 and strides[i] != expected:
            return tuple(range(len(shape)))
        expected *= max(shape[i], 1)
    return order


def all_finite(tensors: Iterable[Any]) -> bool:
    """Whether no tensor holds NaN or Inf; of a sparse one, in the values it is given by."""
    stored = (t if t.layout == torch.strided else t._values() for t in tensors)
    return all(bool(torch.isfinite(values).all()) for values in stored)
