"""State as a tree: dicts of dicts whose leaves are arrays and numbers, as trainers keep it and checkpoints carry it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bitring.arrays import device_of, is_device

Path = tuple[str, ...]


def is_array(x: object) -> bool:
    """Whether a leaf is an array, on the host or on a device."""
    return isinstance(x, np.ndarray) or is_device(x)


def leaves(tree: Mapping[str, Any], at: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Path and leaf, in the dicts' order."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*at, key))
        else:
            yield (*at, key), value


def host_copy(x: Any) -> Any:
    """A new C-contiguous NumPy array with the values of ``x``, or the number ``x`` itself."""
    device = device_of(x)
    if device is None:
        return np.array(x, order="C") if isinstance(x, np.ndarray) else x
    host = np.empty(x.shape, x.dtype)
    event = device.copy_out(host, x)
    while not event.done:
        pass
    return host


def fill(x: Any, host: Any) -> None:
    """Copy the NumPy array ``host`` into the array ``x`` of the same shape and dtype."""
    device = device_of(x)
    if device is None:
        x[...] = host
    else:
        event = device.copy_in(x, np.ascontiguousarray(host))
        while not event.done:
            pass


def copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same tree with NumPy copies of its arrays."""
    return {key: copied(value) if isinstance(value, Mapping) else host_copy(value) for key, value in tree.items()}


def set_leaf(tree: dict[str, Any], path: Path, value: Any) -> None:
    """Give the leaf at ``path`` a new value: an array is filled in place, a number replaced."""
    for key in path[:-1]:
        tree = tree[key]
    if is_array(tree[path[-1]]):
        fill(tree[path[-1]], value)
    else:
        tree[path[-1]] = value
