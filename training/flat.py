"""All values of a model in one array."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def flat(arrays: Mapping[str, Any], dtype: Any) -> Any:
    """All values, one array after the other, in a new array."""
    return np.concatenate([np.asarray(x, dtype).reshape(-1) for x in arrays.values()])


def fill(arrays: Mapping[str, Any], values: Any) -> None:
    """Put the values back, in place."""
    first = 0
    for x in arrays.values():
        x[...] = values[first : first + x.size].reshape(x.shape)
        first += x.size
