"""A step that fails changes nothing: what it changes is copied before, and copied back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bitring.arrays import xp_of
from bitring.training.tree import Path, is_array, leaves, set_leaf


class Undo:
    """Copies of arrays, each taken once in a step, before the step's first change of it.

    The memory of the copies stays for the next step: as much as what is saved.
    """

    def __init__(self) -> None:
        self._copies: dict[Any, Any] = {}
        self._saved: dict[Any, Sequence[Any]] = {}

    def clear(self) -> None:
        """A new step begins: what there is by now stays."""
        self._saved.clear()

    def save(self, key: object, arrays: Sequence[Any]) -> None:
        """Copy ``arrays``, of one dtype, unless that was done in this step; ``key`` is always of the same arrays."""
        if key in self._saved or not arrays:
            return
        xp = xp_of(arrays[0])
        copy = self._copies.get(key)
        if copy is None:
            copy = self._copies[key] = xp.empty(sum(array.size for array in arrays), arrays[0].dtype)
        if len(arrays) == 1:  # a plain copy is quicker than what concatenate does with a large array
            copy.reshape(arrays[0].shape)[...] = arrays[0]
        else:
            xp.concatenate(arrays, axis=None, out=copy)
        self._saved[key] = arrays

    def restore(self) -> None:
        """Give the arrays the values they had when they were saved."""
        for key, arrays in self._saved.items():
            start = 0
            for array in arrays:
                array[...] = self._copies[key][start : start + array.size].reshape(array.shape)
                start += array.size
        self._saved.clear()


class Numbers:
    """The numbers in a tree of state, as they are now."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self._tree = tree
        self._paths = [path for path, leaf in leaves(tree) if not is_array(leaf)]
        self._values: list[tuple[Path, Any]] = []
        self.save()

    def save(self) -> None:
        """Note them down."""
        self._values = [(path, _at(self._tree, path)) for path in self._paths]

    def restore(self) -> None:
        """Give them back the values that were noted down."""
        for path, value in self._values:
            set_leaf(self._tree, path, value)


def _at(tree: Mapping[str, Any], path: Path) -> Any:
    found: Any = tree
    for key in path:
        found = found[key]
    return found


def arrays_in(tree: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Path and array of those in a tree of state."""
    return ((path, leaf) for path, leaf in leaves(tree) if is_array(leaf))
