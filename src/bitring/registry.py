"""Registered things are found by reading a folder: the next algorithm, compressor, model or mode is one new file.

A file registers a class by deriving it from the registry's base: ``class Ring(Algorithm):`` in ``ring.py`` registers
the name ``"ring"``. The file's text is enough to know that, so listing names imports nothing, neither MPI nor a GPU
library; the file is imported when its class is first asked for.
"""

from __future__ import annotations

import importlib
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """The classes of one kind, by name (the file's stem) and by class name.

    ``kind`` is the word used in messages, ``rooms`` the library folders that are scanned, ``base`` the name of the class that registered classes derive from.
    """

    def __init__(self, kind: str, base: str, *rooms: str) -> None:
        self.kind = kind
        self._rooms = rooms
        self._pattern = re.compile(rf"^class (\w+)\({base}\):", re.MULTILINE)
        self._added: dict[str, type[T]] = {}

    @cached_property
    def _found(self) -> dict[str, str]:
        """Name -> class name, of every file in the folder that registers one."""
        found: dict[str, str] = {}
        self._modules: dict[str, str] = {}
        for room in self._rooms:
            for file in sorted((Path(__file__).resolve().parent / room).glob("*.py")):
                classes = self._pattern.findall(file.read_text(encoding="utf-8"))
                if len(classes) > 1:
                    raise RuntimeError(
                        f"{file.name} registers {len(classes)} {self.kind}s ({', '.join(classes)}); a file registers one"
                    )
                if classes:
                    found[file.stem] = classes[0]
                    self._modules[file.stem] = f"bitring.{room.replace('/', '.')}.{file.stem}"
        return found

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted({*self._found, *self._added})

    def class_names(self) -> dict[str, str]:
        """Class name -> registered name, of the folder's own files (for ``bitring.__getattr__``)."""
        return {cls: name for name, cls in self._found.items()}

    def add(self, name: str, cls: type[T]) -> None:
        """Register a class that lives outside the folder. Raises ValueError when the name is taken."""
        if name in self._found or name in self._added:
            raise ValueError(f"the {self.kind} {name!r} is registered already")
        self._added[name] = cls

    def get(self, name: str) -> type[T]:
        """The class registered as ``name``. Raises ValueError, listing the known names, when there is none."""
        if name in self._added:
            return self._added[name]
        if name not in self._found:
            raise ValueError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}")
        module: Any = importlib.import_module(self._modules[name])
        cls: type[T] = getattr(module, self._found[name])
        return cls
