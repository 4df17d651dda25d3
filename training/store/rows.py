"""Rows of parameters as a user names them: checked, sorted, each once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def checked_rows(rows: Any, shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """Name -> 1-D int64. Raises TypeError and ValueError for what are no rows of these parameters."""
    if not isinstance(rows, Mapping):
        raise TypeError(f"{where}: rows must be a dict of a parameter's name -> integers, got {type(rows).__name__}")
    found: dict[str, Any] = {}
    for name, given in rows.items():
        if name not in shapes:
            raise ValueError(f"{where}: rows: {name!r} is no parameter; known: {', '.join(shapes)}")
        if not shapes[name]:
            raise ValueError(f"{where}: rows: {name!r} has no dimensions, and so no rows")
        numbers = np.asarray(given)
        if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
            raise TypeError(
                f"{where}: rows of {name!r} must be 1-D integers, got {numbers.dtype.name} of shape {numbers.shape}"
            )
        numbers = numbers.astype(np.int64)
        most = shapes[name][0]
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < most:
            odd = numbers[(numbers < 0) | (numbers >= most)][0]
            raise ValueError(f"{where}: rows of {name!r} must be 0 to {most - 1}, got {odd}")
        found[name] = numbers
    return found


def distinct(rows: Any) -> tuple[Any, Any]:
    """The rows sorted, each once; and the place there of each one given, None where they are the same."""
    if rows.size < 2 or (np.diff(rows) > 0).all():
        return rows, None
    found, places = np.unique(rows, return_inverse=True)
    return found, places


def summed(rows: Any, gradients: Any) -> tuple[Any, Any]:
    """The rows sorted, each once, and the sum of each one's gradients, added in the order given."""
    found, places = distinct(rows)
    if places is None:
        return found, gradients
    total = np.zeros((len(found), *gradients.shape[1:]), gradients.dtype)
    np.add.at(total, places, gradients)
    return found, total
