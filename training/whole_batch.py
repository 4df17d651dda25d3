"""A batch that every rank holds whole: cut into portions, and compared with others' and the last one."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import numpy as np

from bitring.training.batches import checked_samples

_WORDS = 4093
"""A digest folds this many words onto each other: a prime, so that samples that change places change it."""


def cut(function: str, x: Any, y: Any, portions: int) -> list[Any]:
    """The batch's portions, (x, y) each: ``portions`` of equal size, fewer where there are fewer samples.

    Without ``y``, ``x`` is an iterable of them; empty ones are left out. Raises TypeError or ValueError, which begin
    with ``function``.
    """
    if y is not None:
        samples = checked_samples(f"{function}: x, y", (x, y))
        count = min(portions, samples)
        cuts = [slice(samples * i // count, samples * (i + 1) // count) for i in range(count)]
        pieces: list[Any] = [(x[part], y[part]) for part in cuts]
    elif isinstance(x, Iterable) and not isinstance(x, np.ndarray):
        given = enumerate(x)
        pieces = [piece for i, piece in given if checked_samples(f"{function}: portion {i}", piece)]
    else:
        raise TypeError(f"{function}: x without y must be an iterable of portions, got {type(x).__name__}")
    if not pieces:
        raise ValueError(f"{function}: the batch has no samples")
    return pieces


def digest(arrays: Iterable[tuple[Any, ...]]) -> tuple[float, float]:
    """96 bits of the samples' values: equal on all ranks that give the same, and in two steps."""
    hashed = blake2b(digest_size=12)
    for array in (np.ascontiguousarray(each) for pair in arrays for each in pair):
        hashed.update(f"{array.dtype} {array.shape}".encode())
        data = array.reshape(-1).view(np.uint8)
        whole = data.size // (8 * _WORDS) * 8 * _WORDS
        with np.errstate(over="ignore"):
            hashed.update(data[:whole].view(np.uint64).reshape(-1, _WORDS).sum(0).tobytes())
        hashed.update(data[whole:].tobytes())
    text = hashed.digest()
    return float(int.from_bytes(text[:6], "little")), float(int.from_bytes(text[6:], "little"))
