"""Registered things are found by looking into a folder: the next algorithm, compressor, model or mode is one new file.

Every file of such a room registers one class under the file's stem: ``collectives/algorithms/ring.py`` holds
``class Ring(Algorithm)``, the algorithm ``"ring"``. Names are known without importing anything; a file is imported when
its class is first asked for. Packages outside register by entry points: the group ``bitring.algorithms``, say, and
``star = "their_package.star:Star"``.
"""

from __future__ import annotations

import importlib
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_LIBRARY = Path(__file__).resolve().parent


class Registry(Generic[T]):
    """The classes of one kind, by name.

    ``kind``: the word used in messages. ``base``: what registered classes derive from. ``rooms``: the folders whose
    files register, such as "collectives/algorithms". ``group``: the entry points of packages outside that do.
    """

    def __init__(self, kind: str, base: type[Any], *rooms: str, group: str | None = None) -> None:
        self.kind = kind
        self._base = base
        self._rooms = rooms
        self._group = group
        self._found: dict[str, type[T]] = {}

    @cached_property
    def _modules(self) -> dict[str, str]:
        """Name -> module, of every file in the rooms."""
        found: dict[str, str] = {}
        for room in self._rooms:
            for file in sorted((_LIBRARY / room).glob("[a-z]*.py")):
                if file.stem in found:
                    raise RuntimeError(f"the {self.kind} {file.stem!r} has two files, the second in {room}")
                found[file.stem] = f"bitring.{room.replace('/', '.')}.{file.stem}"
        return found

    @cached_property
    def _outside(self) -> dict[str, EntryPoint]:
        """Name -> entry point, of the packages outside."""
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self._group) if self._group else ():
            if point.name in self._modules or point.name in found:
                raise RuntimeError(f"the {self.kind} {point.name!r} of {point.value} is registered already")
            found[point.name] = point
        return found

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted({*self._modules, *self._outside})

    def get(self, name: str) -> type[T]:
        """The class registered as ``name``. Raises ValueError, listing the known names, when there is none."""
        found = self._found.get(name)  # every choice of an algorithm asks several
        if found is None:
            found = self._found[name] = self._load(name)
        return found

    def _load(self, name: str) -> type[T]:
        if name in self._modules:
            return self._class_of(self._modules[name])
        if name in self._outside:
            cls: Any = self._outside[name].load()
            if not (isinstance(cls, type) and issubclass(cls, self._base)):
                raise TypeError(f"the {self.kind} {name!r}, {self._outside[name].value}, is no {self._base.__name__}")
            return cls
        raise ValueError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}")

    def named(self, class_name: str) -> type[T] | None:
        """The class of this name: ``BlockMomentum``, which ``block_momentum`` registers. None when there is none."""
        for name in self.names():
            if name.replace("_", "") == class_name.lower():
                cls = self.get(name)
                return cls if cls.__name__ == class_name else None
        return None

    def name_of(self, cls: type[Any]) -> str:
        """The name that a class of the rooms is registered under; of others the class name."""
        return next((name for name, module in self._modules.items() if module == cls.__module__), cls.__name__)

    def _class_of(self, module: str) -> type[T]:
        stem = module.rpartition(".")[2]
        for name, x in vars(importlib.import_module(module)).items():
            named = name.lower() == stem.replace("_", "")
            if named and isinstance(x, type) and issubclass(x, self._base) and x.__module__ == module:
                return x
        raise RuntimeError(
            f"{stem}.py must register a {self.kind}: a class derived from {self._base.__name__} and named as the file, "
            f"such as {stem.title().replace('_', '')}"
        )
