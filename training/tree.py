"""State as a tree: dicts of dicts whose leaves are arrays and numbers, as trainers keep it and checkpoints carry it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bitring.arrays import device_of, is_device

Path = tuple[str, ...]


def flattened(tree: Any, where: str) -> dict[str, Any]:
    """Leaves by names such as "layer/w", of nested dicts, lists and tuples: keys, fields' names and numbers, from 0.

    A list of numbers in it is a leaf, which was meant as an array. Raises TypeError for a key that is no text, and
    ValueError for a name that two leaves have.
    """
    found: dict[str, Any] = {}

    def walk(x: Any, name: str) -> None:
        if isinstance(x, Mapping):
            items: Any = x.items()
        elif isinstance(x, (list, tuple)) and not (name and x and all(isinstance(each, (int, float)) for each in x)):
            items = zip(getattr(x, "_fields", map(str, range(len(x)))), x, strict=True)
        elif name in found:
            raise ValueError(f"{where}: two arrays are named {name!r}")
        else:
            found[name] = x
            return
        for key, value in items:
            if not isinstance(key, str) or not key:
                raise TypeError(f"{where} must be named by non-empty strings, got the name {key!r}")
            walk(value, f"{name}/{key}" if name else key)

    walk(tree, "")
    return found


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
